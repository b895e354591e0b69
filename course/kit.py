"""The course kit: assignments made from the real files, and a grader that names the mistake.

For students, in a handout; all of it works offline:

    python course/kit.py list                  the assignments, with points
    python course/kit.py check A7              your functions, property by property
    python course/kit.py check                 every assignment
    python course/kit.py hint A7 --level 3     more help: 0 place, 1 mistake, 2 what training would
                                               show, 3 the line of the docstring; never code
    python course/kit.py watch                 check again after every save, and move on

For teachers, in a clone:

    python course/kit.py handout OUT A4-A9                      one for all
    python course/kit.py handout OUT A4-A9 --student ada --seed 7   with a twist and bugs of her own
    python course/kit.py grade FOLDER A4-A9 --seed 7            a folder of submissions -> CSV
    python course/kit.py grade FOLDER A4-A9 --seed 7 --twists   each with its student's twists
    python course/kit.py autograder ZIP A4-A9 --seed 7          for Gradescope
    python course/kit.py table                                  write the table of course/README.md

Exit code 0 if all public checks passed, 1 if not. Submitted code runs in a process of its own with
limits on time and memory. That is no sandbox: see course/README.md.
"""
import ast
import csv
import io
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from course import grader
from scaffold.cli import UserError, require, start

HANDOUT = ROOT / "course" / "handout.json"
COMMANDS = ("list", "check", "hint", "watch", "handout", "grade", "autograder", "table")


@dataclass
class Config:
    words: tuple = ()            # a command, its folder or file, and assignments: A7 or A4-A9
    level: int = 2               # of hint, 0 to 3
    seed: int = 0                # of the probes' inputs; 0 is public, keep yours private
    student: str = ""            # handout: whose twist and bugs to draw, by name and --seed
    twists: bool = False         # grade: the folders are named after students with twists
    gradescope: str = ""         # grade: write results.json of the one submission there
    csv: str = ""                # grade: write the table there instead of to the terminal
    seconds: float = 60.0        # without a result, after which a function is stopped


def load_sheet(names=(), seed=0, student="", twist_seed=0):
    """Return the sheet of the handout, or make it from the solutions of this clone."""
    if HANDOUT.exists():
        return json.loads(HANDOUT.read_text(encoding="utf-8"))
    from course import sheet   # lazy: a handout does not have it
    return sheet.make(names or all_names(), seed, student, twist_seed)


def all_names():
    """Return the names of the assignments that are here."""
    if HANDOUT.exists():
        return list(load_sheet()["assignments"])
    from course.assignments import ASSIGNMENTS
    return list(ASSIGNMENTS)


def chosen(words):
    """Turn A7, A4-A9 or nothing (all) into names of assignments. Raises UserError."""
    here = all_names()
    names = []
    for word in words:
        first, _, last = word.upper().partition("-")
        last = last or first
        if first not in here or last not in here or here.index(first) > here.index(last):
            raise UserError(f"{word}: no such assignment; choose from {', '.join(here)}, or a "
                            f"range such as {here[0]}-{here[-1]}")
        names += here[here.index(first):here.index(last) + 1]
    return list(dict.fromkeys(names)) or here


def print_list():
    sheet = load_sheet()
    for name, a in sheet["assignments"].items():
        points = sum(c["points"] for p in a["parts"] for c in p["concepts"])
        print(f"{name:4} {a['title']:28} level {a['level']}, {a['hours']} h, {points:2} points: "
              f"{a['goal']}")
        for part in a["parts"]:
            print(f"       {part['file']}: {', '.join(part['functions'])}")


def report(name, found):
    """Return what a student sees about one function, a list of lines."""
    marks = []
    for concept in found.part["concepts"]:
        mark = "ok" if concept["name"] in found.right else "wrong"
        marks.append(f"{concept['name']} {mark}")
    head = f"{name} {found.part['name']:14} {found.points} of {found.most}"
    some = found.wrong and found.right
    lines = [f"{head}   ({', '.join(marks)})" if some else head]
    lines += [f"     {line}" for line in found.lines]
    if found.wrong and found.printed.strip():
        lines.append(f"     printed: {found.printed.strip()[:500]}")
    return lines


def line_of(folder, part):
    """Return the line of a function in a submission, 1 if it cannot be found."""
    text, _ = grader.read_submission(folder, part["file"])
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError):
        return 1
    name = part["functions"][0].split(".")[-1]
    return next((n.lineno for n in nodes if isinstance(n, ast.FunctionDef) and n.name == name), 1)


def escaped(text):
    """Escape a message for a GitHub workflow command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def tell_github(name, findings, folder):
    """Write a summary and one annotation per wrong function, where GitHub Actions runs this."""
    if not os.environ.get("GITHUB_ACTIONS"):
        return
    rows = [f"### {name}", "| function | points | |", "|---|---|---|"]
    for f in findings:
        text = " ".join(f.lines).replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| {f.part['name']} | {f.points} of {f.most} | {text} |")
        if f.wrong:
            line = f.line or line_of(folder, f.part)
            print(f"::error file={f.part['file']},line={line}::"
                  f"{escaped(name + ' ' + f.part['name'] + ': ' + ' '.join(f.lines))}")
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n".join(rows) + "\n\n")


def check(names, cfg, sheet=None):
    """Check assignments of this folder and print the findings -> whether all are right."""
    sheet = sheet or load_sheet(names)
    right = True
    for name in names:
        a = sheet["assignments"][name]
        findings = grader.check(a, ROOT, sheet, cfg.seconds)
        for f in findings:
            print("\n".join(report(name, f)))
        tell_github(name, findings, ROOT)
        wrong = [f for f in findings if f.wrong]
        right = right and not wrong
        if wrong:
            print(f"     more: python course/kit.py hint {name}")
        else:
            print(f"{name}: public checks passed. To finish: {a['finish']}")
            print("\n".join(f"     {number}" for number in a["numbers"]))
    return right


def hint(names, cfg):
    """Print the first wrong property of each function, with help up to the level."""
    require(cfg, 0, "level", most=3)
    sheet = load_sheet(names)
    for name in names:
        for found in grader.check(sheet["assignments"][name], ROOT, sheet, cfg.seconds):
            if not found.wrong:
                continue
            concept = next(c for c in found.part["concepts"] if c["name"] in found.wrong)
            print(f"{name} {found.part['name']}: {concept['name']}")
            if not found.part["functions"]:
                print("\n".join(f"     {line}" for line in found.lines))
                continue
            steps = [found.lines[:1], found.lines[1:], [f"in training: {concept['shows']}"],
                     [f"docstring: \"{concept['line']}\""]]
            for step in steps[:cfg.level + 1]:
                print("\n".join(f"     {line}" for line in step))


def watch(names, cfg):
    """Check the first assignment that is not right, again after every save, until all are."""
    sheet = load_sheet(names)
    while names:
        files = [ROOT / p["file"] for p in sheet["assignments"][names[0]]["parts"]]
        before = [f.stat().st_mtime_ns for f in files]
        if check(names[:1], cfg, sheet):
            names = names[1:]
            continue
        print(f"     waiting for a change of {', '.join(sorted({f.name for f in files}))}; "
              f"Ctrl-C ends", flush=True)
        while [f.stat().st_mtime_ns for f in files] == before:
            time.sleep(0.3)
    print("all public checks passed")


def gradescope_tests(sheet, findings):
    """Return the "tests" of Gradescope's results.json; what has not run yet has 0 points."""
    tests = []
    visibility = "after_due_date" if sheet["seed"] else "visible"
    for name, a in sheet["assignments"].items():
        for part in a["parts"]:
            found = findings.get((name, part["name"]))
            for number, c in enumerate(part["concepts"], 1):
                right = found is not None and c["name"] in found.right
                text = "not run yet" if found is None else "\n".join(found.lines)
                tests.append({
                    "name": f"{name} {part['name']}: {c['name']}", "number": f"{name}.{number}",
                    "score": c["points"] if right else 0, "max_score": c["points"],
                    "status": "passed" if right else "failed",
                    "output": "" if right else text, "visibility": visibility})
    return tests


def write_whole(path, text):
    """Write a file so that a reader sees the old text or the new one, never half of it."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)


def grade_one(folder, sheet, cfg):
    """Grade one submission -> {(assignment, part): Finding}; results.json is always up to date."""
    findings = {}

    def write():
        if cfg.gradescope:
            result = {"tests": gradescope_tests(sheet, findings), "visibility": "visible"}
            write_whole(cfg.gradescope, json.dumps(result, indent=1))

    write()
    for name, a in sheet["assignments"].items():
        def told(found, name=name):
            findings[name, found.part["name"]] = found
            write()

        grader.check(a, folder, sheet, cfg.seconds, told=told)
    return findings


def submissions(folder):
    """Return the submissions in a folder: its subfolders, or the folder itself if it is one."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if sorted(folder.glob("*.py")):
        return [folder]
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise UserError(f"{folder}: no submissions; expected one folder per student")
    return found


def grade(folder, names, cfg):
    """Grade submissions and write a table: one row per student, points per assignment."""
    found = submissions(Path(folder))
    if cfg.gradescope and len(found) != 1:
        raise UserError(f"--gradescope takes one submission, {folder} has {len(found)}")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["student", *names, "total", "of", "notes"])
    sheet = None
    for submission in found:
        student = submission.name if cfg.twists else ""
        if sheet is None or student:
            sheet = load_sheet(names, cfg.seed, student, cfg.seed)
        findings = grade_one(submission, sheet, cfg)
        points = {name: sum(f.points for (n, _), f in findings.items() if n == name)
                  for name in names}
        notes = [f"{n} {part}: {' '.join(f.lines)}" for (n, part), f in findings.items()
                 if f.lines]
        most = sum(f.most for f in findings.values())
        writer.writerow([submission.name, *points.values(), sum(points.values()), most,
                         " | ".join(notes)])
        print(f"{submission.name}: {sum(points.values())} of {most}", file=sys.stderr)
        if cfg.csv:
            write_whole(cfg.csv, table.getvalue())
    if not cfg.csv:
        print(table.getvalue(), end="")


def make_handout(out, names, cfg):
    if HANDOUT.exists():
        raise UserError("this is a handout; make handouts in a clone of the project")
    from course import handout   # lazy: a handout does not have it
    handout.write(out, names, student=cfg.student, twist_seed=cfg.seed)
    print(f"{out}: {', '.join(names)}; next: hand out the folder, then "
          f"python course/kit.py grade FOLDER {' '.join(names)} --seed PRIVATE")


def make_autograder(out, names, cfg):
    if HANDOUT.exists():
        raise UserError("this is a handout; make the autograder in a clone of the project")
    from course import handout
    folder = Path(tempfile.mkdtemp())
    try:
        handout.write(folder / "grader", names, seed=cfg.seed)
        handout.write_autograder(out, folder / "grader")
    finally:
        shutil.rmtree(folder)
    print(f"{out}: upload it to Gradescope as the autograder of a programming assignment")


def write_table():
    """Write the table of assignments, with numbers of results/, between its marks in README.md."""
    if HANDOUT.exists():
        raise UserError("this is a handout; its README has the table")
    from course import sheet
    path = ROOT / "course" / "README.md"
    head, rest = path.read_text(encoding="utf-8").split(sheet.BEGIN)
    write_whole(path, head + sheet.BEGIN + "\n" + sheet.table() + sheet.END
                + rest.split(sheet.END)[1])


def main(cfg):
    command = cfg.words[0] if cfg.words else "list"
    rest = list(cfg.words[1:])
    if command not in COMMANDS:
        raise UserError(f"{command}: no such command; choose {', '.join(COMMANDS)}")
    require(cfg, 1, "seconds", most=3600)
    if command in ("handout", "grade", "autograder"):
        if not rest:
            raise UserError(f"{command}: name a folder or file, then assignments, such as "
                            f"python course/kit.py {command} OUT A4-A9")
        run = {"handout": make_handout, "grade": grade, "autograder": make_autograder}[command]
        run(rest[0], chosen(rest[1:]), cfg)
    elif command == "list":
        print_list()
    elif command == "check":
        if not check(chosen(rest), cfg):
            sys.exit(1)
    elif command == "table":
        write_table()
    elif command == "hint":
        hint(chosen(rest), cfg)
    else:
        watch(chosen(rest), cfg)


if __name__ == "__main__":
    start(main, Config, __doc__)
