"""Every training script, killed and resumed, and shared by two processes: see processes.py."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def processes(folder, what):
    """The report of tests/processes.py."""
    # A job that was started in the background ignores Ctrl-C; processes.py sets it right in its forks.
    done = subprocess.run([sys.executable, HERE / "processes.py", folder, what], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    return processes(tmp_path_factory.mktemp("kills"), "kills")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return processes(tmp_path_factory.mktemp("ranks"), "ranks")


SCRIPTS = ["gpt", "sft", "reward", "dpo", "ppo"]


@pytest.mark.parametrize("name", SCRIPTS + ["self_reward-pairs-random"])
def test_killed_and_resumed_it_is_the_same_run(kills, name):
    """SIGKILL, Ctrl-C and SIGKILL again, at random moments: then weights and log are, bit for bit, those of a run that nobody disturbed."""
    found = kills[name]
    assert found["codes"][0] == 0 == found["codes"][-1] and -signal.SIGKILL in found["codes"] and found["rows"] >= 8
    assert found["same_log"] and found["same_weights"] and found["left"] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_are_one_run(ranks, name):
    """Same global batches, same losses, to rounding; only the first one writes, or the log would be twice as long."""
    found = ranks[name]
    assert found["codes"] == [0, 0, 0] and found["same_length"] and found["steps"] >= 5
    assert found["losses"][0] != found["losses"][1] and found["difference"] < 1e-5


def test_a_dead_process_ends_the_other_one(ranks):
    first, second = ranks["dead"]["codes"]
    assert second == -signal.SIGKILL and first not in (0, "hung")


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The command of README, and a script that works alone."""
    (tmp_path / "text.txt").write_text("the miller has a dog\n" * 400)
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = f"--data {tmp_path / 'text.txt'} --out {tmp_path / 'out'} --steps 20 --n-layer 1 --n-embd 16 --block-size 32 --device cpu".split()
    done = subprocess.run([*call, HERE.parent / "gpt.py", *flags], capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0 and done.stdout.count("saved") == 1, done.stderr
    assert len((tmp_path / "out" / "gpt.jsonl").read_text().splitlines()) == 20
    done = subprocess.run([*call, HERE.parent / "eval.py", "--out", tmp_path / "out"], capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode != 0 and "one process" in done.stderr
