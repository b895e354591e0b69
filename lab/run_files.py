"""What the folder of a run has to report on: logs, records, the last rollout, evaluate.py's table.

lab/report.py draws it, lab/replay.py copies it.
"""
import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import ppo
from scaffold.cli import UserError, brief
from scaffold.health import warnings
from scaffold.record import ROOT, read_record

STAGES = ("gpt", "sft", "reward", "dpo")
HARMLESS = ("name", "table")     # settings that change no number of the log


class Files(NamedTuple):
    """What a folder has about a run; empty for what is missing."""
    out: Path
    name: str
    rows: list       # the log of PPO
    logs: dict       # {stage: rows} of the other logs
    records: dict    # {stage: record}, see scaffold/record.py
    table: list      # rows of evaluate.py
    rollout: list    # rows of data/rollouts.py
    stale: bool      # whether the table is older than the policy


def read_log(path):
    """Return the rows of a file of JSON lines; [] if it is missing.

    A last line that a kill cut off is left out. Raises UserError for any other bad line.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as e:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not a line of JSON ({brief(e)})") from None
        if row is not None and not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object")
        if row:
            rows.append(row)
    return rows


def read_files(out, name):
    """Read a folder -> Files. Raises UserError if it has no log."""
    stages = [*STAGES, name]
    logs = {stage: read_log(out / f"{stage}.jsonl") for stage in stages}
    logs = {stage: rows for stage, rows in logs.items() if rows}
    rows = [row for row in logs.pop(name, []) if isinstance(row.get("update"), int)]
    if not rows and not logs:
        raise UserError(f"{out}: no log to report on; make one: python ppo.py --out {out}")
    records = {stage: read_record(out, stage) for stage in stages}
    made = [path.stat().st_mtime for path in (out / "eval.jsonl", out / f"{name}.pt")
            if path.exists()]
    return Files(out=out, name=name, rows=rows, logs=logs,
                 records={k: v for k, v in records.items() if v},
                 table=read_log(out / "eval.jsonl"),
                 rollout=read_log(out / f"{name}-rollout.jsonl"),
                 stale=len(made) == 2 and made[1] > made[0] + 60)


def series(rows, key):
    """Return (update, value) of the rows that have a number. key: a name, or a function of rows."""
    value = key if callable(key) else lambda row: row.get(key)
    return [(row["update"], value(row)) for row in rows if isinstance(value(row), int | float)]


def entropy(row):
    """Return the entropy in nats per token, or None."""
    total, length = row.get("objective/entropy"), row.get("objective/length")
    return total / length if total is not None and length else None


def end_rate(row):
    """Return the share of responses with an end token, or None."""
    ends, episode = row.get("val/num_eos_tokens"), row.get("episode")
    return ends * (row["update"] + 1) / episode if ends is not None and episode else None


def published():
    """Return the rows of the published runs, results/ppo-seed*.jsonl."""
    logs = [read_log(path) for path in sorted((ROOT / "results").glob("ppo-seed*.jsonl"))]
    return [row for rows in logs for row in rows if "update" in row]


def missing_band(files):
    """Return why the published runs cannot stand behind the charts; "" if they can."""
    if files.name not in files.records:
        return "the settings of this run are not recorded"
    for stage in ("gpt", "sft", "reward", files.name):
        changed = files.records.get(stage, {}).get("changed", {})
        changed = [name for name in changed if name not in HARMLESS]
        if changed:
            return f"{stage} has other settings ({', '.join(changed)})"
    return "" if published() else "their logs are not in results/"


def band(rows, key, start=5):
    """Return (update, lowest, highest) over runs, at the updates that all of them have.

    These are every fifth. Between 0 and `start` the policy begins to learn, which a straight edge
    would hide, so the band begins there.
    """
    values = defaultdict(list)
    for update, value in series([row for row in rows if row["update"] >= start], key):
        values[update].append(value)
    most = max(map(len, values.values()), default=0)
    return [(x, min(found), max(found)) for x, found in sorted(values.items())
            if len(found) == most]


def found_warnings(files):
    """Return {name: (text, updates)} of the warnings that ppo.py prints about this log."""
    settings = files.records.get(files.name, {}).get("settings", {})
    cfg = SimpleNamespace(**vars(ppo.Config()) | settings)
    found = {}
    for row in files.rows:
        known = defaultdict(lambda: math.nan, {k: v for k, v in row.items() if v is not None})
        first = entropy(files.rows[0]) or math.nan
        for name, text in warnings(known, first, cfg).items():
            found.setdefault(name, (text, []))[1].append(row["update"])
    return found
