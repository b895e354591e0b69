"""Checks of the assignments in which nothing is written but JSON: A10 (predict) and A14 (bug hunt).

They read a student's files and run nothing.
"""
import hashlib
import json
import math
import statistics
from pathlib import Path

NUMBERS = ("last score", "last gold", "highest gold", "its update")
LOG = "out/ppo-beta-0.jsonl"
NEAR = 0.02   # how far a measured number may be from that of the log


def place(student, file, line):
    """Return the hash of a line of a file, which does not say where the line is."""
    return hashlib.sha256(f"{student} {file}:{line}".encode()).hexdigest()[:16]


def read_json(folder, name, kind):
    """Return the content of a JSON file of a submission. Raises ValueError with one line."""
    path = Path(folder) / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{name} is missing") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{name} is not JSON: {e}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{name}: expected a JSON {'list' if kind is list else 'object'}")
    return content


def smooth(values, n=9):
    """Return the means of n neighbours, fewer at the ends, as in results/README.md."""
    half = n // 2
    return [statistics.mean(values[max(0, i - half):i + half + 1]) for i in range(len(values))]


def measured(rows):
    """Return the four numbers of A10 from the rows of a log."""
    score = smooth([row["objective/scores"] for row in rows])
    gold = smooth([row["objective/gold"] for row in rows])
    best = max(gold)
    return dict(zip(NUMBERS, (score[-1], gold[-1], best, gold.index(best))))


def numbers_in(record):
    """Are the four numbers there, and finite?"""
    values = [record.get(name) for name in NUMBERS] if isinstance(record, dict) else [None]
    return all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def read_log(folder):
    """Return the rows of the student's log. Raises ValueError with one line."""
    path = next((p for p in (Path(folder) / LOG, Path(folder) / Path(LOG).name) if p.is_file()),
                None)
    if path is None:
        raise ValueError(f"{LOG} is missing: run the command first")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = measured([row for row in rows if "objective/gold" in row])
    except (ValueError, KeyError, TypeError, IndexError):
        raise ValueError(f"{LOG} is not the log of a run with grades") from None
    return found


def check_prediction(assignment, folder):
    """Check A10.json -> (names of the properties that are right, lines for the student)."""
    record = read_json(folder, "A10.json", dict)
    right, lines = [], []
    if numbers_in(record) and str(record.get("why", "")).strip():
        right.append("predictions")
    else:
        lines.append(f"A10.json needs the numbers {', '.join(NUMBERS)}, and \"why\"")
    try:
        log = read_log(folder)
    except ValueError as e:
        return right, [*lines, str(e)]
    mine = record.get("measured")
    if not numbers_in(mine):
        return right, [*lines, 'A10.json needs the same four numbers under "measured"']
    off = [name for name in NUMBERS if abs(mine[name] - log[name]) > NEAR]
    if off:
        lines.append(f"measured, {off[0]}: yours {mine[off[0]]:g}, the log says "
                     f"{log[off[0]]:.2f}")
    else:
        right.append("measured")
    if len(str(record.get("surprise", ""))) >= 40:
        right.append("surprise")
    else:
        lines.append('"surprise" is empty or a word: what had you not expected?')
    return right, lines


def check_hunt(assignment, folder):
    """Check A14.json -> (names of the bugs that are found, lines for the student)."""
    entries = read_json(folder, "A14.json", list)
    bugs = assignment["hunt"]
    right, lines = set(), []
    for entry in entries[:len(bugs)]:   # no more guesses than bugs
        entry = entry if isinstance(entry, dict) else {}
        where = place(assignment["student"], entry.get("file"), entry.get("line"))
        found = [f"bug {n}" for n, places in enumerate(bugs, 1) if where in places]
        told = str(entry.get("metric", "")).strip() and str(entry.get("why", "")).strip()
        if found and told:
            right.update(found)
        else:
            missing = 'needs "metric" and "why"' if found else "no bug there"
            lines.append(f"{entry.get('file')}, line {entry.get('line')}: {missing}")
    if len(entries) < len(bugs):
        lines.append(f"{len(entries)} entries for {len(bugs)} bugs")
    return sorted(right), lines


def check(assignment, folder):
    """Check an assignment without code -> (names of what is right, lines)."""
    checks = {"prediction": check_prediction, "hunt": check_hunt}
    try:
        return checks[assignment["parts"][0]["kind"]](assignment, folder)
    except ValueError as e:
        return [], [str(e)]
