"""A run that is killed three times ends with the same bits as one that is not.

    python lab/resume.py
"""
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from scaffold.run import Run, set_seed

CALL = "import sys; from lab import resume; resume.demo(sys.argv[1], int(sys.argv[2]), sys.argv[3])"


def demo(out, kill_at, resume=""):
    """Train a small model with dropout and noise from three generators; kill it at a step."""
    set_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    rng = random.Random(0)
    cfg = SimpleNamespace(out=out, save_every=10, resume=bool(resume))
    run = Run(cfg, "demo", model=model, optimizer=optimizer, rng=rng)
    for step in run.steps(100):
        x = torch.randn(8, 4) + rng.random() + np.random.rand()
        loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
        norm = run.take_step(loss, optimizer, model, 1e-2, [step])
        run.log(step=step, loss=loss.item(), grad_norm=norm)
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save(model.state_dict(), Path(out) / "demo.weights")


def main():
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        for out, kills in ((whole, [-1]), (killed, [5, 37, 71, -1])):
            for i, kill_at in enumerate(kills):
                call = [sys.executable, "-c", CALL, out, str(kill_at), "resume" if i else ""]
                root = Path(__file__).parent.parent
                code = subprocess.run(call, cwd=root, capture_output=True).returncode
                end = f"killed at step {kill_at}" if code == -signal.SIGKILL else "came to its end"
                print(f"{out.name:7} {end}")
        a, b = [torch.load(out / "demo.weights", weights_only=True) for out in (whole, killed)]
        print("same weights, bit for bit:", all(torch.equal(a[k], b[k]) for k in a))
        same = (whole / "demo.jsonl").read_bytes() == (killed / "demo.jsonl").read_bytes()
        print("same log, byte for byte:  ", same)


if __name__ == "__main__":
    main()
