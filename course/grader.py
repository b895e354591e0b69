"""Runs a student's functions in a child process, compares their outputs, and names the mistake.

The child (course/child.py) computes and the parent compares, with nothing but JSON between them: no
code of a student runs here, and nothing is unpickled. A sheet (course/sheet.py makes it) holds the
right outputs and, as a few numbers per case, those of known mistakes and of their pairs.

This is no sandbox. A determined student can read files and use the network: grade unknown code in a
container that holds nothing of value.
"""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from course import probes, tasks

ROOT = Path(__file__).resolve().parent.parent
START = ("import sys; sys.path[:0] = sys.argv[2:]; "
         "from course import child; child.main(sys.argv[1])")
LIMIT = 60.0   # seconds without a result
MEMORY = 2 * 2**30   # bytes of resident memory
LONGEST = 2**20   # characters of a submitted file


@dataclass
class Finding:
    """What was found out about one part."""
    part: dict
    right: list = field(default_factory=list)    # names of its concepts that are right
    lines: list = field(default_factory=list)    # what to tell the student
    names: list = field(default_factory=list)    # the known mistakes that explain the outputs
    wrong: list = field(default_factory=list)    # names of the concepts that are wrong
    line: int = 0                                # of the student's file, 0 if unknown
    printed: str = ""

    @property
    def points(self):
        return sum(c["points"] for c in self.part["concepts"] if c["name"] in self.right)

    @property
    def most(self):
        return sum(c["points"] for c in self.part["concepts"])


def leaves(result):
    """Flatten a result of the child into its tensors, numbers, strings and errors."""
    if isinstance(result, list):
        return [leaf for item in result for leaf in leaves(item)]
    return [result]


def is_numeric(leaf):
    return isinstance(leaf, dict) and "values" in leaf


def close(a, b, tolerance):
    """Are two numbers equal up to a tolerance? NaN equals NaN, an infinity itself."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b or abs(a - b) <= tolerance * (1 + abs(b))


def is_error(leaf):
    return isinstance(leaf, dict) and "error" in leaf


def same_leaf(a, b, tolerance):
    if is_numeric(a) and is_numeric(b):
        return (a["shape"] == b["shape"] and len(a["values"]) == len(b["values"])
                and all(close(x, y, tolerance) for x, y in zip(a["values"], b["values"])))
    if isinstance(a, dict) and isinstance(b, dict):   # the same kind of error
        return str(a.get("error")).split(":")[0] == str(b.get("error")).split(":")[0]
    return a == b


def same(a, b, tolerance):
    """Are two results equal? Shapes must agree, values up to the tolerance; dtypes may differ."""
    a, b = leaves(a), leaves(b)
    return len(a) == len(b) and all(same_leaf(x, y, tolerance) for x, y in zip(a, b))


def hashed(text):
    return zlib.crc32(text.encode("utf-8", "replace")) % 9973 / 100


def signature(result):
    """Reduce a result to a few numbers that other results do not have: a list of floats."""
    numbers = []
    for leaf in leaves(result):
        if is_numeric(leaf):
            finite = [x if math.isfinite(x) else 1234.5 for x in leaf["values"]]
            numbers.append(hashed(str(leaf["shape"])))
            numbers.append(sum(x * math.cos(1 + 2.3 * i) for i, x in enumerate(finite)))
        else:
            text = leaf["error"].split(":")[0] if isinstance(leaf, dict) else str(leaf)
            numbers.append(hashed(text))
    return numbers


def matches(outputs, known, cases):
    """Does a known mistake explain all outputs? known: {case: signature}."""
    for case in cases:
        mine, theirs = signature(outputs[case.name]), known[case.name]
        if len(mine) != len(theirs):
            return False
        if not all(close(a, b, 3 * case.tolerance) for a, b in zip(mine, theirs)):
            return False
    return True


def well_formed(result, depth=0):
    """Is this what child.plain writes? Whatever else a child wrote is not compared."""
    if isinstance(result, list):
        return depth < 20 and all(well_formed(item, depth + 1) for item in result)
    if isinstance(result, dict) and "values" in result:
        values = result["values"]
        return (isinstance(values, list) and isinstance(result.get("shape"), list)
                and all(isinstance(v, int | float) for v in values))
    return isinstance(result, str) or (isinstance(result, dict) and
                                       isinstance(result.get("error"), str))


def where(shape, i):
    """Return the place of value i of a tensor in words."""
    index = []
    for size in reversed(shape):
        index.append(i % size)
        i //= size
    index.reverse()
    names = {1: ["position"], 2: ["row", "position"]}.get(len(index))
    if names:
        return ", ".join(f"{n} {k}" for n, k in zip(names, index)) + ": "
    return f"at {index}: " if index else ""


def difference(mine, right, tolerance):
    """Say where two results of one case first differ."""
    a, b = leaves(mine), leaves(right)
    for x, y in zip(a, b):
        if same_leaf(x, y, tolerance):
            continue
        if is_error(x):
            return f"raises {x['error']}"
        if not (is_numeric(x) and is_numeric(y)):
            return f"gives {brief(x)}, wanted {brief(y)}"
        if x["shape"] != y["shape"]:
            return f"has the shape {tuple(x['shape'])}, wanted {tuple(y['shape'])}"
        for i, (v, w) in enumerate(zip(x["values"], y["values"])):
            if not close(v, w, tolerance):
                return f"{where(x['shape'], i)}yours {v:.5g}, wanted {w:.5g}"
    return f"returns {len(a)} results, wanted {len(b)}"


def brief(leaf):
    if is_numeric(leaf):
        return f"numbers of the shape {tuple(leaf['shape'])}"
    return f"an error ({leaf['error']})" if isinstance(leaf, dict) else repr(leaf)


def unexplained(outputs, right, wrong, cases):
    """Say what an unknown mistake breaks: NaN, or that padding or neighbours change the result."""
    lines = []
    broken = {c.name for c in wrong for leaf in leaves(outputs[c.name]) if is_error(leaf)}
    for case in cases:
        if case.twin and case in wrong and case.name not in broken:
            lines.append(f"The result changes with {case.twin_differs}.")
    numbers = [v for case in wrong for leaf in leaves(outputs[case.name]) if is_numeric(leaf)
               for v in leaf["values"]]
    wanted = [v for case in wrong for leaf in leaves(right[case.name]) if is_numeric(leaf)
              for v in leaf["values"]]
    if any(map(math.isnan, numbers)) and not any(map(math.isnan, wanted)):
        lines.append("There is a NaN in the result.")
    if any("no gradient" in leaves(outputs[c.name]) for c in wrong):
        lines.append("The loss has no gradient.")
    return list(dict.fromkeys(lines))


def holds(case, outputs, right):
    """Is a case right? One with a twin needs the result of the twin, be that right or wrong."""
    mine = outputs[case.name]
    failed = any(map(is_error, leaves(mine)))
    wanted = outputs[case.twin] if case.twin and not failed else right[case.name]
    return same(mine, wanted, case.tolerance)


def judge(part, row, seed):
    """Compare what the child sent about one part with the sheet -> Finding."""
    found = Finding(part, wrong=[c["name"] for c in part["concepts"]])
    outputs = row["outputs"]
    if row.get("died"):
        found.lines.append(row["died"])
        return found
    if row["refused"] or row["changed"]:
        what = row["refused"] or [f"changed {name}" for name in row["changed"]]
        found.lines.append(f"not allowed in a check: {what[0]}")
        return found
    cases = probes.of(part["name"], seed)[0]
    if "" in outputs:
        found.lines.append(outputs[""]["error"])
        found.line = outputs[""]["line"]
        return found
    if set(outputs) != {c.name for c in cases} or not all(map(well_formed, outputs.values())):
        found.lines.append("the child process sent something else than results")
        return found
    wrong = [c for c in cases if not holds(c, outputs, part["right"])]
    found.wrong = list(dict.fromkeys(c.concept for c in wrong))
    found.right = [c["name"] for c in part["concepts"] if c["name"] not in found.wrong]
    if not wrong:
        return found
    errors = [leaf for c in wrong for leaf in leaves(outputs[c.name]) if is_error(leaf)]
    found.line = next((e["line"] for e in errors if e.get("line")), 0)
    if errors and all(e["error"].startswith("NotImplementedError") for e in errors):
        found.lines.append("not solved yet")
        found.right = []
        found.wrong = [c["name"] for c in part["concepts"]]
        return found
    found.lines.append(f"{wrong[0].name}: "
                       f"{difference(outputs[wrong[0].name], part['right'][wrong[0].name], 1e-4)}")
    explain(found, part, outputs, wrong, cases)
    core = part["concepts"][0]["name"]   # a stub is right about empty masks and the like
    if not found.names and all(c in wrong for c in cases if c.concept == core):
        found.right = []
        found.wrong = [c["name"] for c in part["concepts"]]
    return found


def explain(found, part, outputs, wrong, cases):
    """Add the known mistakes that give the same outputs, else what can be said without them."""
    for bug in part["bugs"] + part["pairs"]:
        if matches(outputs, bug["signature"], cases):
            found.names = bug["names"]
            if bug["convention"]:
                found.right = [c["name"] for c in part["concepts"]]
                found.wrong = []
                found.lines.append(f"a convention, not a bug: {bug['says']}")
            else:
                found.lines.append(f"known mistake ({', '.join(bug['names'])}): {bug['says']}")
            return
    found.lines += unexplained(outputs, part["right"], wrong, cases)


def read_submission(folder, file):
    """Return a file of a submission as text -> (text, "") or ("", why not)."""
    path = next((p for p in (Path(folder) / file, Path(folder) / Path(file).name)
                 if p.is_file()), None)
    if path is None:
        return "", f"{file} is missing"
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as e:
        return "", f"{file} cannot be read: {e}"
    return (text, "") if len(text) <= LONGEST else ("", f"{file} is longer than a megabyte")


def copy_clean(tree, clean):
    """Copy what the child needs; the graded functions are cut out of the files in `clean`."""
    for folder, names in (("", ["*.py"]), ("data", ["*.py", "*.json"]), ("scaffold", ["*.py"]),
                          ("course", ["child.py", "probes.py"])):
        (tree / folder).mkdir(exist_ok=True)
        for path in sorted(p for name in names for p in (ROOT / folder).glob(name)):
            shutil.copyfile(path, tree / folder / path.name)
    for file, text in clean.items():
        (tree / file).write_text(text, encoding="utf-8", newline="\n")


def resident(pid):
    """Return the resident memory of a process in bytes, 0 where that is unknown."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


def kill(process):
    """End a child and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def student_user():
    """Return Popen's arguments that run the child as the user `student`, if root grades."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return {}
    import pwd   # not on Windows
    try:
        entry = pwd.getpwnam("student")
    except KeyError:
        return {}
    return dict(user=entry.pw_uid, group=entry.pw_gid, extra_groups=[])


def run_child(folder, limit, memory):
    """Run the child on FOLDER/job.json -> (rows of results, why it ended early or "")."""
    results = folder / "result.jsonl"
    results.write_text("")
    for path in (folder, results):
        path.chmod(0o777)   # the child may be another user
    environment = {k: v for k, v in os.environ.items() if k in ("SYSTEMROOT", "PATH", "LANG")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    torch_folder = str(Path(torch.__file__).parent.parent)
    command = [sys.executable, "-I", "-c", START, str(folder), str(folder / "tree"), torch_folder]
    with open(folder / "printed.txt", "wb") as printed:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=printed, stderr=subprocess.STDOUT,
                                   start_new_session=True, **student_user())
    size, since, why = 0, time.monotonic(), ""
    try:
        while process.poll() is None:
            time.sleep(0.02)
            if results.stat().st_size != size:
                size, since = results.stat().st_size, time.monotonic()
            patience = limit if size else LIMIT   # importing torch is not the student's time
            if time.monotonic() - since > patience:
                why = f"no result after {patience:.0f} seconds"
            elif resident(process.pid) > memory:
                why = f"used more than {memory / 2**30:.1f} GB of memory"
            if why:
                break
    finally:
        kill(process)
    rows = []
    for line in results.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break   # the child died while it wrote
    if not why:
        why = f"the process ended before it had a result (exit code {process.returncode})"
    return rows, why


def run_parts(parts, files, clean, seed, limit=LIMIT, memory=MEMORY, finished=print):
    """Run parts in a child; a part that ends the child is blamed and left out of the next.

    files: {file: the student's text}. Calls `finished` with each row as it is there; a row is
    {"part", "outputs", "refused", "changed"}, or {"part", "died": why}.
    """
    todo = [{**p, "clean": clean[p["file"]]} for p in parts]
    todo = [{k: p[k] for k in ("name", "file", "module", "functions", "clean")} for p in todo]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "tree").mkdir()
        copy_clean(folder / "tree", clean)
        while todo:
            job = {"parts": todo, "files": files, "seed": seed}
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            rows, why = run_child(folder, limit, memory)
            if not rows:
                printed = (folder / "printed.txt").read_bytes()[-2000:].decode("utf-8", "replace")
                raise RuntimeError(f"the child process did not start: {why}\n{printed}")
            done = [r for r in rows if isinstance(r, dict) and "part" in r]
            for row, part in zip(done, todo):
                ok = row["part"] == part["name"] and isinstance(row.get("outputs"), dict)
                finished(row if ok else dict(part=part["name"], died="forged results"))
            todo = todo[len(done):]
            if todo:
                finished(dict(part=todo[0]["name"], died=why))
                todo = todo[1:]


def check(assignment, folder, sheet, limit=LIMIT, memory=MEMORY, told=lambda finding: None):
    """Grade one assignment of a submission -> [Finding], in the order of its parts.

    told: called with each Finding as soon as it is known.
    """
    parts = {p["name"]: p for p in assignment["parts"]}
    findings = {}
    if not all(p["functions"] for p in parts.values()):   # A10 and A14 have nothing to run
        right, lines = tasks.check(assignment, folder)
        [part] = parts.values()
        wrong = [c["name"] for c in part["concepts"] if c["name"] not in right]
        found = Finding(part, right=right, wrong=wrong, lines=lines)
        told(found)
        return [found]

    def finish(name, found):
        findings[name] = found
        told(found)

    files, ready = {}, []
    for name, part in parts.items():
        files[part["file"]], why = read_submission(folder, part["file"])
        if why:
            wrong = [c["name"] for c in part["concepts"]]
            finish(name, Finding(part, wrong=wrong, lines=[why]))
        else:
            ready.append(part)

    def finished(row):
        row = {"outputs": {}, "refused": [], "changed": [], "printed": ""} | row
        found = judge(parts[row["part"]], row, sheet["seed"])
        found.printed = str(row["printed"])
        finish(row["part"], found)

    if ready:
        run_parts(ready, files, sheet["clean"], sheet["seed"], limit, memory, finished)
    return [findings[name] for name in parts]
