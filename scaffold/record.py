"""NAME.run.json: what one must know about a run besides its numbers, so that it can be repeated.

    {"command": "python ppo.py --seed 100", "commit": "36c0f7d", "dirty": false, "device": "cpu",
     "processes": 1, "seed": 100, "settings": {"lr": 0.0003, ...}, "changed": {"beta": 0},
     "inputs": {"out/sft.pt": "5d0e0f3a", ...}, "steps": 60, "seconds": 61.2, "finished": true}

scaffold/run.py writes it at the start of a run, with each of its states, and at the end.
lab/report.py reads it.
"""
import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Settings that do not change what a run computes, or that stand elsewhere in the record.
ASIDE = ("out", "seed", "device", "resume", "save_every")


def git(*arguments):
    """Run git in this repository -> CompletedProcess."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


@functools.cache
def commit():
    """Return (short commit, whether a tracked file differs from it); (None, None) without git."""
    try:
        head = git("rev-parse", "--short", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
    except OSError:   # git is not installed
        return None, None
    if head.returncode:
        return None, None
    return head.stdout.strip(), bool(changes.stdout.strip())


def command():
    """Return the command that started this process, as one types it in this repository."""
    script = Path(sys.argv[0])
    if script.resolve().is_relative_to(ROOT):
        script = script.resolve().relative_to(ROOT)
    return shlex.join(["python", script.as_posix(), *sys.argv[1:]])


def changed_settings(cfg):
    """Return the settings of a Config that differ from their defaults, except those ASIDE.

    Files of OUT/data are no change: a script fills in their names if its user names no data.
    """
    village = Path(getattr(cfg, "out", "")) / "data"
    found = {}
    for name, value in vars(cfg).items():
        filled_in = isinstance(value, str | Path) and Path(value).is_relative_to(village)
        if name not in ASIDE and not filled_in and value != getattr(type(cfg), name, value):
            found[name] = value
    return found


def describe(cfg, device, processes, inputs, steps):
    """Return the record of a run that begins. inputs: {file: checksum}."""
    short, dirty = commit()
    return dict(command=command(), commit=short, dirty=dirty, device=str(device),
                processes=processes, seed=getattr(cfg, "seed", None), settings=dict(vars(cfg)),
                changed=changed_settings(cfg), inputs=inputs, steps=steps)


def record_path(folder, name):
    """Return the path of the record of a run."""
    return Path(folder) / f"{name}.run.json"


def write_record(path, record):
    """Write a record; a crash leaves the one before."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_record(folder, name):
    """Return the record of a run; {} if it has none, or if it is damaged."""
    try:
        record = json.loads(record_path(folder, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    kinds = dict(command=str, settings=dict, changed=dict, inputs=dict, steps=int)
    if not isinstance(record, dict):
        return {}
    return record if all(isinstance(record.get(k), t) for k, t in kinds.items()) else {}
