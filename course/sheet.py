"""Makes a sheet: what the grader and a student may know about assignments. For teachers only.

A sheet is one JSON object: goal, points and hints of each assignment, the files as they are handed
out (the graded functions cut), the right output of every case, and a few numbers per case for each
known mistake and each pair of them. It holds no code of the solution.

    {"seed": 0, "clean": {file: text}, "assignments": {"A7": {"title", ..., "parts": [...]}}}
"""
import ast
import contextlib
import functools
import io
import itertools
import json
import random
import re
import runpy
import statistics
from pathlib import Path
from typing import NamedTuple

from course import child, grader, tasks
from course.assignments import ASSIGNMENTS, HUNT
from course.mistakes import MISTAKES

ROOT = Path(__file__).resolve().parent.parent


BEGIN = "<!-- assignments: made by kit.py table -->"
END = "<!-- end of assignments -->"


class Change(NamedTuple):
    """A known mistake: one change of the reference."""
    name: str
    says: str
    old: str
    new: str
    convention: bool = False


def reference(file):
    return (ROOT / file).read_text(encoding="utf-8")


def cut(text, name, anchor, message):
    """Cut a function's body from its anchor on -> (the text without, the lines that were removed).

    name: "function" or "Class.method". The anchor is the beginning of exactly one statement of the
    body, else ValueError.
    """
    node = child.find(ast.parse(text), name)
    if node is None:
        raise ValueError(f"{name}: no such function")
    lines = text.splitlines(keepends=True)
    starts = [i for i, s in enumerate(node.body)
              if "".join(lines[s.lineno - 1:s.end_lineno]).lstrip().startswith(anchor)]
    if len(starts) != 1:
        raise ValueError(f"{name}: {len(starts)} statements begin with {anchor!r}, not one")
    i = starts[0]
    first = node.body[i].lineno - 1
    while lines[first - 1].lstrip().startswith("#"):   # a comment about what is cut
        first -= 1
    indent = " " * node.body[i].col_offset
    stub = f'{indent}raise NotImplementedError("{message}")\n'
    removed = "".join(lines[first:node.end_lineno])
    return "".join(lines[:first]) + stub + "".join(lines[node.end_lineno:]), removed


def clean_files(names):
    """Cut the functions of these assignments -> ({file: text}, [removed texts])."""
    clean, removed = {}, []
    for name in names:
        a = ASSIGNMENTS[name]
        for part in a.parts:
            for function, anchor in part.cuts.items():
                text = clean.get(part.file) or reference(part.file)
                message = f"{name}: python course/kit.py check {name}"
                clean[part.file], gone = cut(text, function, anchor, message)
                removed.append(gone)
        for file, function, anchor in a.also:
            message = f"not part of this handout: it would show what {name} asks for"
            clean[file], _ = cut(reference(file), function, anchor, message)
    return clean, removed


@functools.cache
def mutants():
    """Return the zoo of published bugs -> {name: Mutant}."""
    return {m.name: m for m in runpy.run_path(str(ROOT / "tests" / "zoo.py"))["MUTANTS"]}


def changes_of(part):
    """Return the known mistakes of a part: mutants of the zoo and mistakes of students."""
    zoo = mutants()
    found = [Change(name, f"{zoo[name].bug} ({zoo[name].published})", zoo[name].old, zoo[name].new)
             for name in part.bugs.split()]
    return found + [Change(m.name, m.says, m.old, m.new, m.convention) for m in MISTAKES
                    if m.part == part.name]


def apply(change, text):
    """Return the text with a change, or None if its old text does not stand there once."""
    return text.replace(change.old, change.new) if text.count(change.old) == 1 else None


def described(part):
    """Return a part as the grader needs it, without outputs."""
    return {"name": part.name, "file": part.file,
            "module": part.file.removesuffix(".py").replace("/", "."),
            "functions": list(part.cuts), "concepts": [c._asdict() for c in part.concepts]}


def outputs_of(part, text, seed):
    """Run trusted code of one part in this process -> {case: result}."""
    with contextlib.redirect_stdout(io.StringIO()):
        return child.run_part(described(part), text, reference(part.file), seed, part.file)


def signed(outputs):
    return {case: grader.signature(result) for case, result in outputs.items()}


def answered(part, seed, twist=None, pairs=True):
    """Return a described part with its right outputs, those of its known mistakes and of pairs."""
    text = reference(part.file)
    known = changes_of(part)
    bugs, pairs_found = [], []
    if twist:
        public = Change("public-solution", "this is the public solution, and your handout changes "
                        f"the specification: {twist['says']}", "", "")
        bugs.append(entry([public], signed(outputs_of(part, text, seed))))
        text = apply(twist["change"], text)
    right = outputs_of(part, text, seed)
    if "" in right:
        raise ValueError(f"{part.name}: {right['']}")
    changed = [(c, apply(c, text)) for c in known]
    changed = [(c, new) for c, new in changed if new is not None]
    for change, new in changed:
        bugs.append(entry([change], signed(outputs_of(part, new, seed))))
    for (a, new), (b, _) in itertools.combinations(changed if pairs else [], 2):
        both = apply(b, new)
        if both is not None and not (a.convention or b.convention):
            pairs_found.append(entry([a, b], signed(outputs_of(part, both, seed))))
    return described(part) | {"right": right, "bugs": bugs, "pairs": pairs_found}


def entry(changes, signature):
    return {"names": [c.name for c in changes], "says": "; and ".join(c.says for c in changes),
            "convention": all(c.convention for c in changes), "signature": signature}


def drawn_twist(assignment, student, seed):
    """Draw the twist of a student -> {"part", "says", "change"}, None if there is none."""
    if not assignment.twists or not student:
        return None
    rng = random.Random(f"{seed} {assignment.name} {student}")
    twist = rng.choice(assignment.twists)
    x = str(rng.choice(twist.values))
    return {"part": twist.part, "says": twist.says.replace("{x}", x),
            "change": Change(twist.name, "", twist.old, twist.new.replace("{x}", x))}


def rows_of(runs):
    """Return {seed: rows} of results/RUNS-seed*.jsonl."""
    found = {}
    for path in sorted((ROOT / "results").glob(f"{runs}-seed*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        found[path.stem] = [json.loads(line) for line in lines]
    return found


def band_text(band):
    """Return the mean and range of a published number over its seeds, in words."""
    values = []
    for rows in rows_of(band.runs).values():
        fitting = [r[band.key] for r in rows if r.get(band.key) is not None
                   and all(r.get(k) == v for k, v in band.where.items())]
        values += fitting[-1:]
    low, mean, high = [format(x, band.form) for x in
                       (min(values), statistics.mean(values), max(values))]
    return f"{band.says}: {mean} ({low} to {high} over {len(values)} seeds)"


def first_advantage():
    """Return the number that ends A7, from the episode that gae.py prints."""
    import gae
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        gae.main(gae.Config())
    row = re.search(r"^a  +(\S+) +(\S+) +(\S+)", printed.getvalue(), re.M)
    return "the first advantage at lambda 0, .95 and 1: " + ", ".join(row.groups())


def exploited():
    """Return the numbers of A10 in the published run, in words."""
    [rows] = rows_of("ppo-beta-0").values()
    found = tasks.measured([row for row in rows if "objective/gold" in row])
    return ", ".join(f"{name} {x:.2f}" if name != "its update" else f"{name} {x}"
                     for name, x in found.items())


def hunted(student, seed, k):
    """Draw the bugs of a student's hunt -> ({file: text with bugs}, [hashes of the lines of each]).

    Without a student, all of a class hunt the same bugs.
    """
    rng = random.Random(f"{seed if student else 0} hunt {student}")
    files, marks = {}, []
    for name in rng.sample(HUNT, len(HUNT)):
        m = mutants()[name]
        text = files.get(m.file) or reference(m.file)
        if len(marks) < k and apply(m, text) and m.file not in files:   # lines must not move
            files[m.file] = apply(m, text)
            first = text[:text.index(m.old)].count("\n") + 1
            last = first + m.new.rstrip("\n").count("\n")
            marks.append([tasks.place(student, m.file, n) for n in range(first, last + 1)])
    return files, marks


def without_code(a, student, seed):
    """Return the assignment's dictionary beyond what all have: its task, and its one part."""
    part = {"name": a.name, "file": f"{a.name}.json", "kind": a.kind, "functions": [],
            "concepts": [c._asdict() for c in a.concepts]}
    k = len(a.concepts)
    found = {"parts": [part], "student": student,
             "task": a.task.replace("{k}", str(k))}
    if a.kind == "hunt":
        found["hunt"] = hunted(student, seed, k)[1]
    return found


def numbers_of(a):
    """Return the numbers that end an assignment, in words."""
    numbers = [band_text(band) for band in a.bands]
    if a.name == "A7":
        numbers.append(first_advantage())
    if a.kind == "prediction":
        numbers.append(f"the published run: {exploited()}")
    return numbers


def table():
    """Return the assignments as a Markdown table, for teachers."""
    lines = ["| | functions | goal | level | hours | points | mistakes it names | twist | "
             "numbers at the end |", "|---|---|---|---|---|---|---|---|---|"]
    for a in ASSIGNMENTS.values():
        functions = ", ".join(f"`{name}`" for part in a.parts for name in part.cuts)
        concepts = [c for part in a.parts for c in part.concepts] + list(a.concepts)
        named = sum(len(changes_of(part)) for part in a.parts)
        cells = [f"{a.name} {a.title}", functions or "none", a.goal, a.level, a.hours,
                 sum(c.points for c in concepts), named or "-",
                 ", ".join(t.name for t in a.twists) or "-", "; ".join(numbers_of(a)) or "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def make(names, seed=0, student="", twist_seed=0, pairs=True):
    """Make the sheet of some assignments; with a student, those that have twists are changed."""
    sheet = {"seed": seed, "clean": clean_files(list(ASSIGNMENTS))[0], "assignments": {}}
    for name in names:
        a = ASSIGNMENTS[name]
        twist = drawn_twist(a, student, twist_seed)
        parts = [answered(p, seed, twist if twist and twist["part"] == p.name else None, pairs)
                 for p in a.parts]
        sheet["assignments"][name] = {
            "title": a.title, "goal": a.goal, "level": a.level, "hours": a.hours,
            "finish": a.finish, "numbers": numbers_of(a), "twist": twist["says"] if twist else "",
            "task": "", "parts": parts}
        if a.kind:
            sheet["assignments"][name] |= without_code(a, student, twist_seed)
    return sheet
