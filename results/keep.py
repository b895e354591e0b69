"""Copy the published part of a metrics file: the reports and not the training steps.

    python results/keep.py out/seed0/gpt.jsonl results/gpt-seed0.jsonl
    python results/keep.py out/seed0/ppo-no-ptx.jsonl results/ppo-no-ptx-seed0.jsonl --every 5

The tables, the figure and the text of README.md read nothing else. Lines are copied as they are, so
a second pass changes nothing.
"""
import argparse
import json
from pathlib import Path


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


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--every", type=int, default=1, help="thin out PPO's updates [1]")
    args = parser.parse_args()
    lines = args.source.read_text(encoding="utf-8").splitlines(keepends=True)
    args.target.write_text("".join(keep(lines, args.every)), encoding="utf-8")


if __name__ == "__main__":
    main()
