"""Tests of every training script, killed and resumed, and shared by two processes.

The work is done by processes.py; these tests read its report.
"""

import json
import os
import signal
import subprocess
import sys

import pytest

from tiny import ROOT


def run_processes(folder, what):
    """Run tests/processes.py -> its report.

    A job that was started in the background ignores Ctrl-C; processes.py mends that in its forks.
    """
    call = [sys.executable, ROOT / "tests" / "processes.py", folder, what]
    done = subprocess.run(call, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    return run_processes(tmp_path_factory.mktemp("kills"), "kills")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_processes(tmp_path_factory.mktemp("ranks"), "ranks")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return run_processes(tmp_path_factory.mktemp("inputs"), "inputs")


READERS = [
    "gpt with its own tokenizer",
    "gpt with the embedded tokenizer",
    "gpt --init",
    "gpt --init-from",
    "sft",
    "sft --select reward",
    "reward",
    "dpo",
    "ppo",
    "ppo --text",
    "self_reward",
    "self_reward --test",
    "self_reward on the village",
]


@pytest.mark.parametrize("case", READERS)
def test_a_run_is_not_resumed_with_any_changed_file_that_it_reads(inputs, case):
    """The files are those that the process opens; each is replaced by one of the same size."""
    entry = inputs[case]
    assert entry["first"][0] == 0
    assert entry["read"] == entry["expected"]
    assert set(entry["resumed"]) == set(entry["read"])
    for code, line in entry["resumed"].values():
        assert code == 2
        assert "a file that this run reads has changed since it started" in line
    assert entry["unchanged"][0] == 0


SCRIPTS = ["gpt", "sft", "reward", "dpo", "ppo"]


@pytest.mark.parametrize("name", [*SCRIPTS, "self_reward-pairs-random"])
def test_a_run_that_is_killed_and_resumed_is_the_same_run(kills, name):
    """SIGKILL, Ctrl-C and SIGKILL come at random moments; weights and log are bit for bit equal."""
    entry = kills[name]
    assert entry["codes"][0] == 0
    assert entry["codes"][-1] == 0
    assert -signal.SIGKILL in entry["codes"]
    assert entry["rows"] >= 8
    assert entry["same_log"]
    assert entry["same_weights"]
    assert entry["left"] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_have_the_losses_of_one(ranks, name):
    """Equal to rounding. Only the first process writes, or the log would be twice as long."""
    entry = ranks[name]
    assert entry["codes"] == [0, 0, 0]
    assert entry["same_length"]
    assert entry["steps"] >= 5
    assert entry["losses"][0] != entry["losses"][1]
    assert entry["difference"] < 1e-4   # of losses up to 7; Muon's steps magnify rounding


def test_a_dead_process_ends_the_other_one_with_an_error(ranks):
    first, second = ranks["dead"]["codes"]
    assert second == -signal.SIGKILL
    assert first != 0
    assert first != "hung"


@pytest.mark.slow
def test_torchrun_shares_gpt_and_is_refused_by_evaluate(tmp_path):
    """The command of README, and a script that runs in one process."""
    text = tmp_path / "text.txt"
    out = tmp_path / "out"
    text.write_text("the miller has a dog\n" * 400)

    def torchrun(*args):
        call = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *args]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(call, capture_output=True, text=True, env=env, timeout=200)

    sizes = "--n-layer 1 --n-embd 16 --block-size 32"
    flags = f"--data {text} --out {out} --steps 20 {sizes} --device cpu"
    done = torchrun(ROOT / "gpt.py", *flags.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 1, done.stderr
    assert len((out / "gpt.jsonl").read_text().splitlines()) == 20
    done = torchrun(ROOT / "evaluate.py", "--out", out)
    assert done.returncode != 0
    assert "one process" in done.stderr
