"""Resume: a run that is killed again and again ends with the same bits as one that is not.

Claim (scaffold/run.py). A run continues with --resume as if nothing had happened: same weights,
same log.

A small model trains for 100 steps with everything that a restart can lose: Adam's moments, dropout,
and noise from the generators of torch, NumPy and Python. Its state is saved every 10 steps. One run
is never stopped. The other is killed at steps 5, 37 and 71, as by `kill -9`, and cannot save.
Each time it resumes from its last saved state and repeats the lost steps.

    python lab/resume.py                                    both runs, compared
    python lab/resume.py --out out/demo --kill-at 37        by hand: one run, killed
    python lab/resume.py --out out/demo --resume            the same run, to its end

Ten seconds on two CPU cores. Read next: ../scaffold/run.py.
"""
import os
import random
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from scaffold.cli import RunConfig, UserError, start
from scaffold.run import Run, load_checkpoint, save_checkpoint, set_seed


@dataclass
class Config(RunConfig):
    out: str = ""                # folder of a single run; empty: both runs, in a temporary folder
    kill_at: int = -1            # step at which a single run kills itself; -1: never
    save_every: int = 10         # steps between saves of the training state


STEPS = 100
KILLS = (5, 37, 71)


def train(cfg):
    """Train a small model on noise; kill the process with SIGKILL at step cfg.kill_at."""
    set_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    settings = replace(cfg, kill_at=-1)         # a resumed run may be killed elsewhere, or never
    run = Run(settings, "demo", model=model, optimizer=optimizer, rng=rng)
    for step in run.steps(STEPS):
        x = torch.randn(8, 4) + rng.random() + np.random.rand()                # (B, C)
        loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
        norm = run.take_step(loss, optimizer, model, 1e-2, [step])
        run.log(step=step, loss=loss.item(), grad_norm=norm)
        if step == cfg.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    save_checkpoint(Path(cfg.out) / "demo.pt", model=model.state_dict())
    run.finish()


def run_process(out, kill_at=-1, resume=False):
    """Run this script in a separate process and print how it ends."""
    command = [sys.executable, __file__, "--out", str(out), "--kill-at", str(kill_at)]
    if resume:
        command.append("--resume")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL:
        print(f"{out.name:8}killed at step {kill_at}")
    elif done.returncode == 0:
        print(f"{out.name:8}finished")
    else:
        raise UserError(f"{' '.join(command)} failed: {done.stderr}")


def compare(a, b):
    """Print whether the runs in two folders have the same weights and the same log."""
    weights_a = load_checkpoint(a / "demo.pt")["model"]
    weights_b = load_checkpoint(b / "demo.pt")["model"]
    same_weights = all(torch.equal(weights_a[k], weights_b[k]) for k in weights_a)
    same_log = (a / "demo.jsonl").read_bytes() == (b / "demo.jsonl").read_bytes()
    print(f"same weights, bit for bit: {same_weights}")
    print(f"same log, byte for byte:   {same_log}")


def main(cfg):
    if cfg.out:
        train(cfg)
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        killed = Path(folder) / "killed"
        run_process(whole)
        for n, step in enumerate(KILLS):
            run_process(killed, kill_at=step, resume=n > 0)
        run_process(killed, resume=True)
        compare(whole, killed)


if __name__ == "__main__":
    start(main, Config, __doc__)
