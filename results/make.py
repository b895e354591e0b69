"""Run every experiment of results/ and publish its numbers.

    bash results/make.sh             all of this, then the tables and the figure (figures.py)
    python results/make.py --jobs 4  more steps at a time

A step is one command. It prints to out/make/NAME.log, and trains in a folder of out/ where no other
step runs at the same time. Its metrics become files of results/ (keep.py), and out/make/NAME.done
marks it as finished.

Start it again to go on: finished steps are skipped, and a step that was interrupted resumes, or
starts again if its script cannot resume. The first failure is the last step. To make a step again,
delete its .done file; to make everything again, delete out/.

Two hours on two CPU cores, with two steps at a time and one thread each.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from results.keep import header, publish
from scaffold.cli import UserError, require, start
from scaffold.record import ROOT
from scaffold.run import lock, unlock


@dataclass
class Config:
    jobs: int = 2            # steps at a time, each with one thread


SEEDS = range(100, 105)      # no setting was chosen on these; tuning uses seeds below 100
LONG_SEEDS = SEEDS[:3]       # of the chapters that take longer: self_instruct, self_reward, tools
FIRST = SEEDS[0]             # of single runs; the short experiments count up from here

CONTROLS = {"update-sft": "--update sft", "pairs-gold": "--pairs gold",
            "pairs-random": "--pairs random", "frozen-judge": "--frozen-judge",
            "no-replay": "--replay 0", "fresh-eft": "--fresh-eft 200"}
LABS = ("cot", "icl", "templates", "forgetting", "attention", "rouge", "grpo", "refresh",
        "candidates", "reward_size", "toxic_seeds", "structured", "expand_prompts")
SIZES = {"2x96": "--n-layer 2 --n-embd 96", "4x192": "--n-layer 4 --n-embd 192"}
REWARDS = {"no-logprobs": "--no-logprobs", "regression": "--loss regression",
           "token-margin": "--loss token-margin"}
RESUMABLE = ("gpt.py", "sft.py", "reward.py", "ppo.py", "dpo.py", "self_reward.py")


class Step(NamedTuple):
    """A command, the folder it trains in, and the files it makes."""
    script: str
    flags: str
    seed: int
    folder: str              # in out/
    files: dict              # {file of results/: metrics file of the folder}, without .jsonl
    source: str = ""         # the folder of out/ that `folder` is a copy of
    every: int = 1           # thin out PPO's updates

    @property
    def name(self):
        return next(iter(self.files))

    @property
    def settings(self):
        """Return the command as one types it."""
        command = f"python {self.script} --seed {self.seed} --out out/{self.folder} {self.flags}"
        return command.strip()


def default_run(seed):
    """Return the steps of table (A): all stages, PPO without ptx, DPO, and their grades."""
    run = f"seed{seed}"
    stages = {f"{stage}-{run}": stage for stage in ("gpt", "sft", "reward", "ppo")}
    no_ptx = "--no-table --name ppo-no-ptx --ptx 0"
    graded = f"--json --save out/{run}/eval.jsonl"
    return [
        Step("ppo.py", "--no-table", seed, run, stages, every=1 if seed == FIRST else 5),
        Step("ppo.py", no_ptx, seed, run, {f"ppo-no-ptx-{run}": "ppo-no-ptx"}, every=5),
        Step("dpo.py", "", seed, run, {f"dpo-{run}": "dpo"}),
        Step("evaluate.py", graded, seed, run, {f"eval-{run}": "eval"}),
    ]


def overoptimisation():
    """Return the steps of figure (C): long runs with and without the KL penalty."""
    run = f"seed{FIRST}"
    flags = "--no-table --updates 150 --name"
    return [
        Step("ppo.py", f"{flags} ppo-beta-0 --beta 0", FIRST, run,
             {f"ppo-beta-0-{run}": "ppo-beta-0"}),
        Step("ppo.py", f"{flags} ppo-long", FIRST, run, {f"ppo-long-{run}": "ppo-long"}),
    ]


def long_chapters(seed):
    """Return the steps of Self-Instruct (the paper's filters, ours), self-rewarding and tools."""
    run = f"seed{seed}"
    return [
        Step("self_instruct.py", "--likelihood 0 --steps 0", seed, run,
             {f"self_instruct-paper-{run}": "self_instruct"}),
        Step("self_instruct.py", "", seed, run, {f"self_instruct-{run}": "self_instruct"}),
        Step("self_reward.py", "", seed, run, {f"self_reward-main-{run}": "self_reward-main"}),
        Step("self_reward.py", "--halo 0.05", seed, run,
             {f"self_reward-halo-{run}": "self_reward-halo"}),
        Step("lab/tool_use.py", "", seed, run, {f"tools-{run}": "tools"}),
    ]


def controls():
    """Return the steps of the self-rewarding runs that change one thing."""
    run = f"seed{FIRST}"
    return [Step("self_reward.py", flags, FIRST, f"{run}-controls",
                 {f"self_reward-{name}-{run}": f"self_reward-{name}"}, source=run)
            for name, flags in CONTROLS.items()]


def labs():
    """Return the steps of the short experiments, with three seeds each, cleaning, and atlas."""
    run = f"seed{FIRST}"
    folder = f"{run}-labs"
    made = [Step(f"lab/{name}.py", "", FIRST, folder, {f"lab-{name}": f"lab-{name}"}, source=run)
            for name in LABS]
    return [*made, Step("lab/cleaning.py", "", FIRST, folder, {"clean": "clean"}, source=run),
            Step("lab/break_it.py", "--atlas", FIRST, folder, {"atlas": "atlas"}, source=run)]


def other_settings():
    """Return single runs: sixteen epochs chosen by reward, other reward models with their PPO."""
    seed = LONG_SEEDS[1]
    run = f"seed{seed}"
    made = [Step("sft.py", "--epochs 16 --select reward", seed, f"{run}-epochs16",
                 {"sft-epochs16": "sft"}, source=run)]
    for name, flags in REWARDS.items():
        folder = f"{run}-{name}"
        graded = f"--best-of 0 --json --save out/{folder}/eval.jsonl"
        made += [Step("reward.py", flags, seed, folder, {f"reward-{name}-{run}": "reward"},
                      source=run),
                 Step("ppo.py", "--no-table", seed, folder, {f"ppo-{name}-{run}": "ppo"}, every=5),
                 Step("evaluate.py", graded, seed, folder, {f"eval-{name}-{run}": "eval"})]
    return made


def sizes():
    """Return the steps of a smaller and a larger model, up to its reward model."""
    made = []
    for size, flags in SIZES.items():
        folder = f"size-{size}"
        end = f"{folder}-seed{FIRST}"
        graded = f"--json --save out/{folder}/eval.jsonl"
        made += [
            Step("gpt.py", flags, FIRST, folder, {f"gpt-{end}": "gpt"}),
            Step("reward.py", "", FIRST, folder, {f"sft-{end}": "sft", f"reward-{end}": "reward"}),
            Step("evaluate.py", graded, FIRST, folder, {f"eval-{end}": "eval"}),
        ]
    return made


def all_steps():
    """Return every step, the long ones first. The steps of a folder run in this order."""
    made = []
    for seed in SEEDS:
        made += default_run(seed)
    made += [*labs(), *sizes(), *long_chapters(FIRST), *controls()]
    for seed in LONG_SEEDS[1:]:
        made += long_chapters(seed)
    return [*made, *overoptimisation(), *other_settings()]


class Running(NamedTuple):
    """A step that runs."""
    step: Step
    process: subprocess.Popen
    header: dict             # of the files that it makes
    began: float             # in seconds


class Maker:
    """Runs steps, `jobs` at a time, in a folder that has the scripts, out/ and results/."""

    def __init__(self, steps, root=ROOT, jobs=2, pause=1):
        self.steps = steps
        self.root = root
        self.jobs = jobs
        self.pause = pause       # seconds between two looks at the running steps
        self.out = root / "out"
        self.marks = self.out / "make"
        self.results = root / "results"

    def log(self, step):
        return self.marks / f"{step.name}.log"

    def mark(self, step):
        return self.marks / f"{step.name}.done"

    def is_done(self, step):
        """Return whether this very command has finished and its files are still there."""
        mark = self.mark(step)
        if not mark.exists() or json.loads(mark.read_text())["settings"] != step.settings:
            return False
        return all((self.results / f"{name}.jsonl").exists() for name in step.files)

    def warn_of_other_commits(self):
        """Print a note if finished steps were run at other commits than the present one."""
        present = header(None, "")["commit"]
        commits = [json.loads(self.mark(step).read_text())["commit"]
                   for step in self.steps if self.is_done(step)]
        others = [str(commit) for commit in commits if commit != present]
        if others:
            print(f"{len(others)} of {len(self.steps)} steps are done, but at other commits: "
                  f"{', '.join(sorted(set(others)))}; to repeat them, delete out/")

    def check_folders(self):
        """Raise UserError if a folder has a run that this script did not start."""
        ours = {step.folder for step in self.steps if self.log(step).exists()}
        for folder in {step.folder for step in self.steps} - ours:
            if (self.out / folder).exists():
                raise UserError(f"{self.out / folder}: this run was not made by results/make.sh; "
                                f"move it away, its numbers may be of another commit")

    def ready(self, waiting, running):
        """Return the waiting steps that may start now.

        A step waits for the running and the earlier waiting steps of its folder, and, before a copy
        is made, for those of the folder that is copied.
        """
        taken = {r.step.folder for r in running}
        found = []
        for step in waiting:
            needed = {step.folder}
            if step.source and not (self.out / step.folder).exists():
                needed.add(step.source)
            if not needed & taken:
                found.append(step)
            taken.add(step.folder)
        return found

    def copy_source(self, step):
        """Make the folder of a step that trains in a copy, unless it is there."""
        folder = self.out / step.folder
        if not step.source or folder.exists():
            return
        part = folder.with_suffix(".part")     # renamed when it is complete
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(self.out / step.source, part, ignore=shutil.ignore_patterns("*.state*"))
        part.rename(folder)

    def begin(self, step):
        """Start the command of a step -> Running."""
        words = [sys.executable, *shlex.split(step.settings)[1:]]
        states = sorted((self.out / step.folder).rglob("*.state*"))   # an earlier start was stopped
        if states and step.script in RESUMABLE:
            words.append("--resume")
        else:
            for state in states:
                state.unlink()
        with open(self.log(step), "a") as log:
            self.copy_source(step)
            process = subprocess.Popen(words, cwd=self.root, stdout=log, stderr=log,
                                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        print(f"start {step.settings}", flush=True)
        return Running(step, process, header(step.seed, step.settings), time.time())

    def problem(self, ended):
        """Return what is wrong with a step whose process has ended, or an empty string."""
        step = ended.step
        if ended.process.returncode:
            return f"exit code {ended.process.returncode}"
        for metrics in step.files.values():
            if not (self.out / step.folder / f"{metrics}.jsonl").exists():
                return f"no out/{step.folder}/{metrics}.jsonl"
        return ""

    def finish(self, ended):
        """Publish the metrics of a step and mark it as done -> "", or what is wrong with it."""
        step = ended.step
        problem = self.problem(ended)
        if problem:
            print(f"stop  {step.settings}: {problem}", flush=True)
            return f"{step.settings}: {problem}; see {self.log(step)}"
        for name, metrics in step.files.items():
            publish(self.out / step.folder / f"{metrics}.jsonl", self.results / f"{name}.jsonl",
                    ended.header, step.every)
        seconds = round(time.time() - ended.began)
        self.mark(step).write_text(json.dumps(ended.header | {"seconds": seconds}) + "\n")
        n_done = sum(map(self.is_done, self.steps))
        print(f"done  {step.settings}: {seconds} s; {n_done} of {len(self.steps)}", flush=True)
        return ""

    def run(self):
        """Run all steps that are not done. Raises UserError if one fails.

        After a failure no step starts. Those that run come to their end.
        """
        self.marks.mkdir(parents=True, exist_ok=True)
        lock(self.marks)
        self.check_folders()
        self.warn_of_other_commits()
        waiting = [step for step in self.steps if not self.is_done(step)]
        running = []
        failures = []
        try:
            while running or (waiting and not failures):
                free = 0 if failures else self.jobs - len(running)
                for step in self.ready(waiting, running)[:free]:
                    waiting.remove(step)
                    running.append(self.begin(step))
                time.sleep(self.pause)
                ended = [r for r in running if r.process.poll() is not None]
                running = [r for r in running if r not in ended]
                failures += filter(None, map(self.finish, ended))
        finally:
            for r in running:      # Ctrl-C reaches them, too: they save their state and end
                r.process.wait()
            unlock(self.marks)
        if failures:
            raise UserError(failures[0])


def main(cfg):
    require(cfg, 1, "jobs")
    Maker(all_steps(), jobs=cfg.jobs).run()


if __name__ == "__main__":
    start(main, Config, __doc__)
