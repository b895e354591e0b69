"""Break it: put a known bug into a copy of this code and see what it does to the log of a run.

A short healthy run and the same run with one bug of tests/zoo.py, same seed, same checkpoints. Five
healthy runs of other seeds give each metric its band: their range within two updates, widened by
half its width on both sides. The first metric to leave its band is the symptom. A bug without one
has no symptom at this size: it may still cost quality, and only a test finds it.

    python lab/break_it.py --list          all bugs, and what the atlas says of each
    python lab/break_it.py kl-sign         a minute; later bugs of that stage need a few seconds
    python lab/break_it.py causal-off --stage sft        the same bug in another stage
    python lab/break_it.py --atlas         every bug with three seeds: ten minutes
    python tests/mutants.py --show kl-sign               the change alone

Each line of the picture is a metric: "." inside its band, "^" above, "v" below, "!" no number. The
runs stand in OUT/break_it and are used again while code and checkpoints are the same. The stages
before it are trained first if OUT lacks them. Read next: lab/doctor.py.
"""
import math
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import tempfile
import zlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import reward
from data import corpus, labelers
from data.text import write_text
from lab.doctor import ATLAS, read_log, signs
from mutants import copy_tree, mutated
from scaffold.cli import BaseConfig, UserError, brief, choose, run_folder, start
from scaffold.run import digest, ensure_stage, json_line
from scaffold.table import format_table
from zoo import MUTANTS


@dataclass
class Config(BaseConfig):
    bugs: tuple = ()             # names of bugs; --list has them
    stage: str = ""              # ppo, sft, reward or dpo; empty: where the bug stands
    list: bool = False           # list all bugs and what they show; runs nothing
    atlas: bool = False          # run every bug with three seeds; writes OUT/atlas.jsonl
    only: str = ""               # with --atlas: these bugs, separated by commas


class Short(NamedTuple):
    """How to run a stage briefly. FOLDER stands for that of the run."""
    needs: tuple                 # checkpoints
    flags: str
    data: dict                   # {file of OUT/data: its first lines that the run reads}


SHORT = {
    "ppo": Short(
        ("sft.pt", "reward.pt"),
        "--prompts FOLDER/prompts_train.jsonl --updates 12 --rollout-size 32 --minibatches 1 "
        "--epochs 3 --value-warmup 1 --lr 5e-4 --max-new-tokens 24 --ptx 0 --no-table "
        "--save-every 0",
        {"prompts_train": 512}),
    "sft": Short(
        ("gpt.pt",),
        "--data FOLDER/sft_train.jsonl --val FOLDER/sft_val.jsonl --epochs 2 --batch-tokens 512 "
        "--save-every 0",
        {"sft_train": 512, "sft_val": 64}),
    "reward": Short(
        ("sft.pt",),
        "--data FOLDER/ranked_train.jsonl --val FOLDER/ranked_val.jsonl --epochs 1 "
        "--batch-prompts 8 --normalise-on 64 --save-every 0",
        {"ranked_train": 320, "ranked_val": 64}),
    "dpo": Short(
        ("sft.pt",),
        "--data FOLDER/ranked_train.jsonl --val FOLDER/ranked_val.jsonl --batch-prompts 8 "
        "--eval-every 10 --save-every 0",
        {"ranked_train": 320, "ranked_val": 64}),
}
STAGES = {"ppo": "ppo", "gae": "ppo", "gpt": "ppo", "sft": "sft", "run": "sft", "optim": "sft",
          "reward": "reward", "dpo": "dpo"}   # test module of a bug -> the stage that shows it
STAGE_OF = {"pad-as-end": "ppo", "gelu-exact": "ppo"}
RESUMED = "only a resumed run has it"
PACKED = "only pretraining and the ptx term pack documents"
NOT_RUN = {
    "attention-scale-ignored": "only Hugging Face's weights have it",
    "code-in-checkpoint": "only a hostile file shows it",
    "ends-never-read": PACKED,
    "half-checkpoint": "only the checkpoint has it, after the run",
    "ipo-target": "only --loss ipo has it",
    "margin-on-padding": "only --loss token-margin has it",
    "mean-of-means": "only several processes have it",
    "nan-steps-on": "only a run that diverges shows it",
    "old-is-not-the-sampler": "only --offline has it",
    "packed-attention": PACKED,
    "packed-loss": PACKED,
    "packed-positions": PACKED,
    "prompt-split-leaks": "only a script that splits the data itself has it",
    "ptx-same-batch": PACKED,
    "resume-replays-batches": RESUMED,
    "resume-with-another-tokenizer": RESUMED,
    "resume-without-optimizer": RESUMED,
    "resume-without-rng": RESUMED,
    "rows-twice": RESUMED,
    "set-order": "two runs in different processes must be compared",
    "specials-parsed": "only text that spells special tokens has it",
    "tail-truncated": "only long comparisons have it",
    "temperature-forgotten": "stages train at temperature 1",
    "temperature-twice": "stages train at temperature 1",
    "top-p-short": "no stage samples with top-p",
    "user-split-leaks": "only a script that splits the data itself has it",
}
HEALTHY = 5         # runs of the band
ATLAS_SEEDS = 3     # of them, those that a bug runs with, too
REACH = 2           # updates before and after that belong to the band of an update
FLOOR = 0.02        # the least margin of a band, relative to its values
LIMIT = 300         # seconds for one run
ASIDE = ("update", "episode", "step", "epoch", "lr", "objective/beta", "prompts", "pairs")
ROOTS = {path.stem for path in sorted(ROOT.iterdir())}   # names of this repository's modules


class Exit(NamedTuple):
    """Where a metric leaves its band."""
    at: int        # update or step
    value: float
    low: float
    high: float


def stage_of(m):
    """Return the stage whose log may show a bug, or None."""
    if m.name in NOT_RUN:
        return None
    return STAGE_OF.get(m.name, STAGES.get(m.tests.split()[0]))


# Running


def child(tree, arguments, output):
    """Run a script of a copied tree in this process; print into the file `output`."""
    printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    for name in [n for n in sys.modules if n.split(".")[0] in ROOTS]:
        del sys.modules[name]
    foreign = [p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tests", ROOT / "lab")]
    sys.path[:] = [str(tree), *foreign]
    os.chdir(tree)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def run_stage(tree, stage, seed, cfg, log):
    """Run a stage briefly in a copied tree; keep its log at `log` and what it printed beside it."""
    short = SHORT[stage]
    out = Path(cfg.out)
    with tempfile.TemporaryDirectory() as folder:
        for name in short.needs:
            shutil.copy(out / name, folder)
        for name, n in short.data.items():
            with open(out / "data" / f"{name}.jsonl", encoding="utf-8") as f:
                write_text(Path(folder) / f"{name}.jsonl", "".join(islice(f, n)))
        arguments = [f"{stage}.py", "--out", folder, "--seed", str(seed), "--device", cfg.device,
                     *short.flags.replace("FOLDER", folder).split()]
        printed = Path(folder) / "printed.txt"
        # A fork has torch already; its import would take longer than the run.
        fork = "fork" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("fork" if fork else "spawn")
        process = context.Process(target=child, args=(tree, arguments, printed))
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            process.join()
        text = printed.read_text(encoding="utf-8", errors="replace").replace(folder, "out")
        made = Path(folder) / f"{stage}.jsonl"
        rows = made.read_text(encoding="utf-8") if made.exists() else ""
    write_text(log, rows)
    write_text(log.with_suffix(".txt"), f"{text}\nexit code {process.exitcode}\n")


def key_of(out):
    """Return a checksum of the code and the checkpoints that decide what a run logs."""
    patterns = ("*.py", "data/*.py", "data/*.json", "scaffold/*.py", "tests/zoo.py")
    code = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    data = [out / "data" / f"{name}.jsonl" for short in SHORT.values() for name in short.data]
    files = digest([*code, *(out / f"{name}.pt" for name in ("gpt", "sft", "reward")), *data])
    return f"{files}-{zlib.crc32(repr(SHORT).encode()):08x}"


class Result(NamedTuple):
    """What is left of a run."""
    rows: list     # of the log
    printed: str
    crash: str     # its last words, if it did not finish


class Runs:
    """Short runs of all stages, kept in OUT/break_it."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.folder = Path(cfg.out) / "break_it" / key_of(Path(cfg.out))

    def get(self, stage, seed, bug=None):
        """Return the Result of a run, healthy without a bug; run it first if it is missing."""
        log = self.folder / f"{stage}-{bug.name if bug else 'healthy'}-{seed}.jsonl"
        text = log.with_suffix(".txt")
        if not text.exists():
            with tempfile.TemporaryDirectory() as folder:
                tree = copy_tree(ROOT, Path(folder) / "tree")
                if bug:
                    path = tree / bug.file
                    changed = mutated(bug, path.read_text(encoding="utf-8"))
                    path.write_text(changed, encoding="utf-8")
                    for compiled in sorted(path.parent.glob(f"__pycache__/{path.stem}.*.pyc")):
                        compiled.unlink()
                run_stage(tree, stage, seed, self.cfg, log)
        printed = text.read_text(encoding="utf-8")
        said, code = printed.rstrip().rsplit("\nexit code ", 1)
        lines = re.split(r"[\r\n]+", said.strip())
        crash = "" if code == "0" else lines[-1] if code != "None" else f"stopped after {LIMIT} s"
        rows = read_log(log) if log.stat().st_size else []
        return Result(rows, printed, crash)

    def band(self, stage):
        """Return the band of a stage, see band(); raises UserError if a healthy run fails."""
        logs = []
        for seed in range(self.cfg.seed, self.cfg.seed + HEALTHY):
            result = self.get(stage, seed)
            if result.crash:
                raise UserError(f"the healthy run of {stage}.py failed: {result.crash}")
            logs.append(result.rows)
        return logs, band(logs)


# Bands


def metrics_of(rows):
    """Return {metric: [(update or step, value)]} of a log; a value that is no number is NaN."""
    found = defaultdict(list)
    for n, row in enumerate(rows):
        for name, value in row.items():
            if name in ASIDE or isinstance(value, str | bool):
                continue
            at = row.get("update", row.get("step", row.get("epoch", n)))
            found[name].append((at, math.nan if value is None else value))
    return dict(found)


def band(logs):
    """Return {metric: [(low, high)]}, one band for each time the metric is logged.

    Its range over the logs and over REACH neighbours on both sides, widened by half its width on
    both sides. A short series has no neighbours; its range is widened by its whole width.
    """
    series = [metrics_of(rows) for rows in logs]
    found = {}
    for name in series[0]:
        values = [[value for _, value in one[name]] for one in series if name in one]
        n = min(map(len, values))
        reach = min(REACH, n // 6)
        found[name] = []
        for t in range(n):
            near = [x for one in values for x in one[max(0, t - reach):t + reach + 1]
                    if math.isfinite(x)]
            low, high = (min(near), max(near)) if near else (math.nan, math.nan)
            wider = (high - low) * (0.5 if reach else 1.0)
            margin = max(wider, FLOOR * max(abs(low), abs(high)), 1e-6)
            found[name].append((low - margin, high + margin))
    return found


def outside(value, low, high):
    """Return the sign that the picture has for a value."""
    if math.isnan(low):
        return "."
    if not math.isfinite(value):
        return "!"
    if low <= value <= high:
        return "."
    return "^" if value > high else "v"


def picture(rows, bands):
    """Return {metric: one sign for each time it is logged}."""
    found = {}
    for name, values in metrics_of(rows).items():
        if name in bands:
            marks = [outside(value, *limits) for (_, value), limits in zip(values, bands[name])]
            found[name] = "".join(marks)
    return found


def exits(rows, bands):
    """Return {metric: Exit} of the metrics that leave their bands, the first ones first.

    Of a long series, one value outside is noise, and two in a row are an exit; "!" always is.
    """
    metrics = metrics_of(rows)
    found = {}
    for name, marks in picture(rows, bands).items():
        left = re.search(r"!|[^.]" if len(marks) < 6 else r"!|[^.]{2}", marks)
        if left:
            n = left.start()
            at, value = metrics[name][n]
            found[name] = Exit(at, value, *bands[name][n])
    return dict(sorted(found.items(), key=lambda item: item[1].at))


# What is printed


def samples(printed):
    """Return [(prompt, response after training)] of what a stage printed at its end."""
    found = re.findall(r"^--- (.+)\nbefore: .*\nafter:  (.*)$", printed, re.M)
    return [(prompt, response) for prompt, response in found]


def print_bug(m, stage, broken, healthy, bands):
    """Print what one bug does: its change, the picture, the samples, the doctor's signs."""
    print(f"{m.name}: {m.bug}\n{m.file} ({m.published})\n- {m.old.strip()}\n+ {m.new.strip()}\n")
    if broken.crash:
        print(f"{stage}.py stopped: {broken.crash}\n")
    left = exits(broken.rows, bands)
    pictures = picture(broken.rows, bands)
    unit = "update" if stage == "ppo" else "step"
    if left:
        first = next(iter(left))
        x = left[first]
        print(f"{first} leaves the band of {HEALTHY} healthy seeds first, at {unit} {x.at}: "
              f"{x.value:.3g}, healthy {x.low:.3g} to {x.high:.3g}\n")
        rows = [{"metric": name, "picture": pictures[name], "at": left[name].at}
                for name in left]
        print(format_table(rows, {"metric": ("metric", ""), "each": ("picture", ""),
                                  f"{unit}": ("at", "d")}))
        inside = [name for name in pictures if name not in left]
        print(f"\nalways inside: {', '.join(inside) if inside else 'none'}")
    else:
        print("No metric leaves its band: this bug does not show in a short log.")
    found = signs(broken.rows) if broken.rows else {}
    print(f"lab/doctor.py sees: {', '.join(found) if found else 'nothing'}")
    pairs = list(zip(samples(healthy.printed), samples(broken.printed)))
    for (prompt, good), (_, bad) in pairs:
        print(f"--- {prompt}\nhealthy: {good}\nbroken:  {bad}")


def atlas_row(m, stage, results, bands):
    """Return the row of a bug in the atlas. results: {seed: Result}."""
    runs = []
    counts = defaultdict(list)
    for seed, result in results.items():
        left = exits(result.rows, bands)
        first = next(iter(left), None)
        run = {"seed": seed, "first": first, "at": left[first].at if first else None}
        runs.append(run | {"signs": list(signs(result.rows)) if result.rows else [],
                           "crash": result.crash})
        for name, x in left.items():
            counts[name].append(x.at)
    usual = {name: min(ats) for name, ats in counts.items() if len(ats) > len(results) / 2}
    return {"bug": m.name, "stage": stage, "runs": runs, "outside": usual}


def false_alarms(logs):
    """Return the metrics with which each healthy log leaves the band of the others."""
    return [list(exits(log, band(logs[:i] + logs[i + 1:]))) for i, log in enumerate(logs)]


def make_atlas(cfg, runs):
    """Run every bug with ATLAS_SEEDS seeds and write OUT/atlas.jsonl."""
    chosen = [m for m in MUTANTS if stage_of(m)]
    if cfg.only:
        names = cfg.only.split(",")
        chosen = [find(name) for name in names]
    rows = []
    bands = {}
    for stage in SHORT:
        logs, bands[stage] = runs.band(stage)
        rows.append({"stage": stage, "seeds": [cfg.seed + i for i in range(HEALTHY)],
                     "metrics": list(bands[stage]), "false_alarms": false_alarms(logs)})
    for m in tqdm(chosen, desc="atlas", mininterval=1):
        stage = cfg.stage or stage_of(m)
        results = {seed: runs.get(stage, seed, m)
                   for seed in range(cfg.seed, cfg.seed + ATLAS_SEEDS)}
        rows.append(atlas_row(m, stage, results, bands[stage]))
    path = Path(cfg.out) / "atlas.jsonl"
    write_text(path, "".join(json_line(row) for row in rows))
    print_list(path)
    print(f"saved {path}")


def summary(row):
    """Say in a few words what the runs of a bug in the atlas show."""
    runs = row["runs"]
    if all(run["crash"] for run in runs):
        return f"stops: {brief(runs[0]['crash'], 60)}"
    shown = [run for run in runs if run["first"]]
    if not shown:
        return "does not show"
    names = [run["first"] for run in shown]
    name = max(names, key=names.count)
    at = median(run["at"] for run in shown if run["first"] == name)
    return f"{name} at {at:g} ({names.count(name)} of {len(runs)} seeds; any metric: {len(shown)})"


def print_list(path=ATLAS):
    """Print all bugs by stage, with what the atlas at `path` says of each."""
    known = {row["bug"]: row for row in (read_log(path) if path.exists() else []) if "bug" in row}
    order = {stage: n for n, stage in enumerate([*SHORT, None])}
    rows = []
    for m in sorted(MUTANTS, key=lambda m: order[stage_of(m)]):
        shows = summary(known[m.name]) if m.name in known else "not in the atlas"
        if not stage_of(m):
            shows = f"not run: {NOT_RUN.get(m.name, 'no stage of the chain has it')}"
        rows.append({"stage": stage_of(m) or "-", "bug": m.name, "shows": shows})
    print(format_table(rows, {"stage": ("stage", ""), "bug": ("bug", ""),
                              "first outside its band": ("shows", "")}))


def find(name):
    """Return the bug of this name. Raises UserError."""
    found = [m for m in MUTANTS if m.name == name]
    if not found:
        raise UserError(f"no bug named {name!r}; see python lab/break_it.py --list")
    return found[0]


def prepare(cfg):
    """Make what short runs need in OUT: checkpoints, village and rankings. Preload torch."""
    out = run_folder(cfg.out)
    ensure_stage(out / "reward.pt", reward, cfg)
    corpus.ensure(out / "data", cfg.seed)
    labelers.ensure(out, cfg.seed, cfg.device)
    torch.set_num_threads(1)   # a process with threads cannot be forked
    torch.optim.AdamW([torch.zeros(1)])   # imports half of torch, once for all runs
    return Runs(cfg)


def main(cfg):
    if cfg.list:
        print_list()
        return
    if cfg.atlas:
        make_atlas(cfg, prepare(cfg))
        return
    if not cfg.bugs:
        raise UserError("name a bug: python lab/break_it.py kl-sign; --list has them all")
    if cfg.stage:
        choose(cfg, "stage", *SHORT)
    chosen = [find(name) for name in cfg.bugs]
    for m in chosen:
        if not (cfg.stage or stage_of(m)):
            raise UserError(f"{m.name}: {NOT_RUN.get(m.name, 'no stage of the chain has it')}; "
                            f"force one with --stage ppo, sft, reward or dpo")
    runs = prepare(cfg)
    for m in chosen:
        stage = cfg.stage or stage_of(m)
        _, bands = runs.band(stage)
        print_bug(m, stage, runs.get(stage, cfg.seed, m), runs.get(stage, cfg.seed), bands)


if __name__ == "__main__":
    start(main, Config, __doc__)
