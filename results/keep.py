"""Publish a metrics file: one line that says where it comes from, then the reports.

    {"commit": "36c0f7d", "dirty": false, "seed": 100, "settings": "python ppo.py --seed 100 ...",
     "machine": {"cpu": "AMD EPYC", "cores": 2, "torch": "2.9.0", "python": "3.11.2"}}

Training steps are left out; the tables, the figure and the text of README.md do not read them.
"""
import json
import os
import platform
import re
from pathlib import Path

import torch

from scaffold.record import git

HEADER = ("commit", "dirty", "seed", "settings", "machine")


def machine():
    """Return the processor, its cores and the versions that matter; no names, no paths."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"model name\s*: (.+)", cpuinfo.read_text())
        cpu = model[1] if model else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__,
            "python": platform.python_version()}


def header(seed, settings):
    """Return the first line of a published file, as a dict.

    settings: the command that makes the file. commit is None outside a git repository. dirty: some
    tracked file differs from the commit; the files that are written here do not count.
    """
    commit = git("rev-parse", "--short", "HEAD")
    written = [":!results/*.jsonl", ":!results/*.png", ":!results/README.md", ":!README.md"]
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return {"commit": commit.stdout.strip() or None, "dirty": bool(changes.stdout.strip()),
            "seed": seed, "settings": settings, "machine": machine()}


def is_header(row):
    """Return whether a row is the first line of a published file."""
    return "machine" in row


def is_report(row):
    """Return whether a row is more than a training step or the settings of its run."""
    if "config" in row:
        return False
    return "step" not in row or "val_loss" in row or "eval_loss" in row


def keep(lines, every=1):
    """Return the lines to publish. every: of PPO's updates, keep the multiples and the last."""
    kept = []
    for number, line in enumerate(lines, 1):
        row = json.loads(line)
        chosen = row.get("update", 0) % every == 0 or number == len(lines)
        if chosen and is_report(row):
            kept.append(line)
    return kept


def publish(source, target, first, every=1):
    """Write `first` (a header) and the published lines of a metrics file to `target`."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join([json.dumps(first) + "\n", *keep(lines, every)])
    target.write_text(text, encoding="utf-8")
