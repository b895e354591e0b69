"""A run survives a kill, a damaged file, a full disk and a second process, and stops at a NaN. The scripts themselves: test_processes.py."""
import importlib
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import gpt
import run as training
from gpt import UserError
from run import Run

HERE = Path(__file__).parent


# A small run in this process

class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def small(out, kill_at=None, n=20, lr=1e-2, resume=False, save_every=4, poison=None):
    """A run with everything in it that has a state. -> its weights, its log."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer, rng, counts, seen = torch.optim.AdamW(model.parameters()), random.Random(0), {}, []
    run = Run(SimpleNamespace(out=str(out), save_every=save_every, resume=resume, lr=lr), "small", model=model, optimizer=optimizer, rng=rng,
              counts=counts, seen=seen)
    for step in run.steps(n):
        noise = rng.random() + random.random() + np.random.rand() + np.random.randn()
        x = torch.randn(8, 4) + noise
        loss = model(x).square().mean() * (math.nan if step == poison else 1)
        norm = run.take_step(loss, optimizer, model, lr, f"the batch of noise {noise:.3f}")
        counts[f"{step % 3}"] = counts.get(f"{step % 3}", 0) + 1
        seen.append(noise)
        run.log(step=step, loss=loss.item(), grad_norm=norm, counts=dict(counts), seen=len(seen))
        if step == kill_at:
            raise Killed
    torch.save(model.state_dict(), Path(out) / "small.pt")
    run.finish()
    return {k: v.clone() for k, v in model.state_dict().items()}, (Path(out) / "small.jsonl").read_text()


def killed(out, at, **settings):
    with pytest.raises(Killed):
        small(out, kill_at=at, **settings)
    training.unlock(Path(out))   # a dead process holds no lock


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("at", range(20))
def test_killed_at_any_step(whole, tmp_path, at):
    killed(tmp_path, at)
    assert same(small(tmp_path, resume=True), whole)


def test_killed_again_and_again_with_another_rhythm_of_saving(whole, tmp_path):
    killed(tmp_path, 3, save_every=2)
    for at, every in ((6, 3), (6, 1), (13, 5), (18, 7)):
        killed(tmp_path, at, save_every=every, resume=True)
    assert same(small(tmp_path, resume=True), whole)


@pytest.mark.parametrize("part", ["model", "optimizer", "rng", "counts", "seen", "torch", "numpy", "python"])
def test_every_part_of_the_state_matters(whole, tmp_path, part):
    """Without it the run would be another one: so the tests above could fail."""
    killed(tmp_path, 9)
    state = training.load_checkpoint(tmp_path / "small.state")
    fresh = tmp_path / "fresh"
    killed(fresh, 0)
    start = training.load_checkpoint(fresh / "small.state")
    where = "random" if part in ("torch", "numpy", "python") else "parts"
    state[where][part] = start[where][part]
    training.save_checkpoint(tmp_path / "small.state", **state)
    assert not same(small(tmp_path, resume=True), whole)


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(raw[:len(raw) // 2])
    elif how == "other":
        torch.save({"model": 1}, path)
    else:
        raw[how * len(raw) // 100] ^= 16
        path.write_bytes(raw)


@pytest.mark.parametrize("how", ["gone", "empty", "half", "other", 20, 40, 60, 80])
def test_a_damaged_state_gives_way_to_the_one_before(whole, tmp_path, capsys, how):
    """A kill between the two renames leaves the older one alone ('gone'); a bit that flips on the disk shows in a checksum."""
    killed(tmp_path, 14)
    damage(tmp_path / "small.state", how)
    assert same(small(tmp_path, resume=True), whole)
    shown = capsys.readouterr()
    if isinstance(how, int) and "at step 12 of 20" in shown.out:
        return                                                 # a bit between the records: nothing is lost
    assert "at step 8 of 20" in shown.out and (how == "gone" or "warning" in shown.err and "small.state" in shown.err)


def test_every_flipped_bit_of_a_weight_is_noticed(tmp_path):
    path, weight = tmp_path / "a.pt", torch.arange(64.0)
    gpt.save_checkpoint(path, weight=weight)
    raw = path.read_bytes()
    start = raw.index(weight.numpy().tobytes())
    for bit in range(0, 8 * 256, 37):
        broken = bytearray(raw)
        broken[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(UserError, match="not a readable checkpoint"):
            gpt.load_checkpoint(path)


def test_two_damaged_states_are_an_error_and_stay(tmp_path):
    killed(tmp_path, 14)
    for name in ("small.state", "small.state.old"):
        damage(tmp_path / name, "half")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match="neither"):
        small(tmp_path, resume=True)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_what_cannot_be_resumed_is_said(tmp_path, capsys):
    small(tmp_path / "new", resume=True)
    assert "nothing to resume" in capsys.readouterr().out      # it starts from the beginning
    with pytest.raises(UserError, match="is finished"):
        small(tmp_path / "new", resume=True)
    killed(tmp_path, 9)
    for settings, words in ((dict(lr=1e-3), "--lr 0.01, not 0.001"), (dict(n=21), "21 steps now and made 20")):
        with pytest.raises(UserError, match=words):
            small(tmp_path, resume=True, **settings)
        training.unlock(tmp_path)
    small(tmp_path)
    assert "discarded now" in capsys.readouterr().out


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_run_begun_anew_keeps_nothing_of_the_one_before(whole, tmp_path, at):
    """Neither its log, if the new one is killed before it saves a second time, nor its states, which would come back."""
    small(tmp_path)
    killed(tmp_path, 14, lr=1e-3)
    killed(tmp_path, at)
    assert {p.name for p in tmp_path.iterdir()} == {"small.pt", "small.jsonl", "small.state"}
    assert same(small(tmp_path, resume=True), whole)
    killed(tmp_path, 14)
    killed(tmp_path, 2, save_every=0)
    assert not list(tmp_path.glob("*.state*"))


def test_a_damaged_state_never_takes_the_place_of_a_good_one(whole, tmp_path):
    killed(tmp_path, 14)
    damage(tmp_path / "small.state", "half")
    killed(tmp_path, 12, resume=True)                          # it goes on at 8 and saves at 12
    damage(tmp_path / "small.state", "gone")                   # as if it was killed between the two renames
    assert same(small(tmp_path, resume=True), whole)


def test_files_that_changed_are_another_run(tmp_path):
    data, cfg = tmp_path / "data", SimpleNamespace(out=str(tmp_path / "out"), save_every=1, resume=False)
    data.mkdir()
    for name in ("a.txt", "b.txt"):
        (data / name).write_text(name)

    def go(resume):
        cfg.resume = resume
        run = Run(cfg, "small", [data], seen=[])
        for step in run.steps(5):
            if step == 3 and not resume:
                break
        training.unlock(tmp_path / "out")
    go(False)
    for change in (lambda: (data / "a.txt").write_text("A.txt"), lambda: (data / "a.txt").rename(data / "c.txt"), lambda: (data / "b.txt").unlink()):
        change()
        with pytest.raises(UserError, match="is not what it was"):
            go(True)
        training.unlock(tmp_path / "out")
    for name in ("a.txt", "b.txt"):
        (data / name).write_text(name)
    (data / "c.txt").unlink(missing_ok=True)
    go(True)


def test_a_path_that_is_not_given_is_no_file(tmp_path):
    (tmp_path / "a").write_text("a")
    assert training.digest(["", tmp_path / "a", ""]) == training.digest([tmp_path / "a"]) != training.digest([""])


def test_ctrl_c_in_the_last_step_lets_it_end(tmp_path):
    run = Run(SimpleNamespace(out=str(tmp_path), save_every=0, resume=False), "small")
    for step in run.steps(3):
        run.stop = step == 2
    run.finish()


def test_a_run_that_saves_nothing_leaves_nothing(tmp_path):
    killed(tmp_path, 9, save_every=0)
    assert {p.name for p in tmp_path.iterdir()} == {"small.jsonl"}


@pytest.mark.parametrize("room", [0, 1, 1000, 6000])
def test_a_full_disk_loses_neither_state(whole, tmp_path, room):
    """Files of more than `room` bytes cannot be written any more, from some step on: both states stay, and serve afterwards."""
    killed(tmp_path, 9)
    before = {name: (tmp_path / name).read_bytes() for name in ("small.state", "small.state.old")}
    call = f"import os, resource, run; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room})); run.save_checkpoint({str(tmp_path / 'small.state')!r}, " \
           f"{str(tmp_path / 'small.state.old')!r}, model=list(range(9999)))"
    done = subprocess.run([sys.executable, "-c", call], cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 1 and "OSError" in done.stderr.splitlines()[-1], done.stderr
    assert before == {name: (tmp_path / name).read_bytes() for name in before} and not list(tmp_path.glob("*.part"))
    assert same(small(tmp_path, resume=True), whole)


def test_a_second_process_is_refused(whole, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, os, sys; f = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(f, fcntl.LOCK_EX); "
                               "print('locked', flush=True); sys.stdin.read()", tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="another process is training there"):
        small(tmp_path)
    assert not list(tmp_path.iterdir())                        # and it leaves the other one's files alone
    holder.kill()
    holder.wait()
    assert same(small(tmp_path), whole)                        # a killed process holds nothing


def test_two_real_runs_in_one_folder(tmp_path):
    (tmp_path / "text.txt").write_text("the miller has a dog\n" * 400)
    call = [sys.executable, HERE.parent / "gpt.py", *f"--data {tmp_path / 'text.txt'} --out {tmp_path / 'out'} --steps 100000 --device cpu --block-size 32".split()]
    first = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "out" / "gpt.jsonl").exists():
            assert first.poll() is None
        done = subprocess.run(call, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "another process is training there" in done.stderr and "Traceback" not in done.stderr
    finally:
        first.kill()
        first.wait()


def test_ctrl_c_ends_after_the_step_and_saves_it(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        torch.manual_seed(0)
        run = Run(SimpleNamespace(out=str(tmp_path), save_every=0, resume=False), "small", counts=(counts := {}))
        with pytest.raises(KeyboardInterrupt):
            for step in run.steps(9):
                if step == 5:
                    os.kill(os.getpid(), signal.SIGINT)
                counts[str(step)] = "whole"
        assert training.load_checkpoint(tmp_path / "small.state")["step"] == 6 == len(counts)
        run.stop = True
        with pytest.raises(KeyboardInterrupt):
            run.interrupt()                                    # the second one does not wait
    finally:
        signal.signal(signal.SIGINT, before)


# A NaN

def test_a_nan_names_step_batch_and_checkpoint_and_spoils_no_weight(whole, tmp_path):
    with pytest.raises(training.Diverged, match=r"small, step 10, batch: the batch of noise .*; last good checkpoint: .*small.state, of step 8: loss nan") as e:
        small(tmp_path, poison=10)
    assert isinstance(e.value, UserError) and "\n" not in str(e.value) and "--lr" in str(e.value)
    training.unlock(tmp_path)
    assert same(small(tmp_path, resume=True), whole)           # what is saved is the last good state, indeed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_no_weight_changes_where_there_is_no_number(bad, where):
    weight = nn.Parameter(torch.ones(3))
    model = nn.Module()
    model.weight = weight
    if where == "gradient":
        weight.register_hook(lambda g: g * bad)
    with pytest.raises(training.Diverged):
        training.take_step(weight.sum() if where == "gradient" else weight.sum() * 0 + bad, torch.optim.AdamW([weight]), model, 0.1)
    assert torch.equal(weight, torch.ones(3))


def test_a_real_script_stops_at_a_nan(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the miller has a dog\n" * 400)
    loss, calls = gpt.lm_loss, []
    monkeypatch.setattr(gpt, "lm_loss", lambda *args: calls.append(1) or loss(*args) * (math.inf if len(calls) == 6 else 1))
    monkeypatch.setattr(sys, "argv", ["gpt.py", *f"--data {text} --out {tmp_path / 'out'} --steps 9 --save-every 2 --n-layer 1 --n-embd 16 --block-size 32 --device cpu".split()])
    with pytest.raises(SystemExit) as e:
        gpt.run(gpt.main, gpt.Config, "")
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "last good" in x]
    assert e.value.code == 2 and "step 5" in line and "miller" in line and "gpt.state, of step 4" in line and not (tmp_path / "out" / "gpt.pt").exists()


# Several processes, without the processes

@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_shares_make_the_whole_and_fair_means_make_the_mean(monkeypatch, world, n):
    """Every row is in one share (where there are enough), and the average of the fair means is the mean over all terms."""
    terms = [torch.arange(1.0, 2 + i) ** 2 for i in range(n)]   # row i has i + 1 terms
    monkeypatch.setattr(training, "world", lambda: world)
    shares, parts = [], []
    for r in range(world):
        monkeypatch.setattr(training, "rank", lambda: r)
        shares.append(training.share(list(range(n))))
    if n >= world:
        assert sorted(i for s in shares for i in s) == list(range(n)) and all(shares)
    counts = [sum(len(terms[i]) for i in s) for s in shares]
    monkeypatch.setattr(training.dist, "all_reduce", lambda t: t.fill_(float(sum(counts))))
    for s, count in zip(shares, counts):
        parts.append(training.fair(torch.cat([terms[i] for i in s]).mean(), count))
    torch.testing.assert_close(sum(parts) / world, torch.cat(terms).mean())


def test_answers_come_back_in_the_order_of_the_prompts(monkeypatch):
    answers = [[1], [2, 2], [], [4, 4, 4], [5], [6]]
    monkeypatch.setattr(training, "world", lambda: 3)
    shares = []
    for r in range(3):
        monkeypatch.setattr(training, "rank", lambda: r)
        shares.append(training.share(answers))

    def gather(parts, mine):
        for part, s in zip(parts, shares):
            part.fill_(-1)
            for i, row in enumerate(s):
                part[i, :len(row)] = torch.tensor(row)
    monkeypatch.setattr(training.dist, "all_gather", gather)
    assert training.gathered(shares[0], 3) == answers


def test_the_demonstration(capsys):
    """python run.py, as README shows it."""
    training.main()
    shown = capsys.readouterr().out
    assert shown.count("killed at step") == 3 and shown.count("True") == 2


@pytest.mark.parametrize("stage, before", [("sft", "gpt"), ("reward", "sft"), ("dpo", "sft"), ("ppo", "reward"), ("self_reward", "gpt"), ("tools", "gpt")])
def test_a_stage_does_not_throw_away_a_stopped_run_of_the_one_before(tmp_path, stage, before):
    """It may be hours of a user's own pretraining, with settings that only they know."""
    state = tmp_path / f"{before}.state"
    state.write_bytes(b"hours of work")
    stage = importlib.import_module(stage)
    with pytest.raises(UserError, match=f"{before}.state: a run was stopped there; go on with --resume"):
        stage.main(stage.Config(out=str(tmp_path), device="cpu"))
    assert state.read_bytes() == b"hours of work" and list(tmp_path.iterdir()) == [state]


class Called(Exception):
    """Raised by the stand-in for the stage before."""


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("stage, before", [("sft", "gpt"), ("reward", "sft"), ("dpo", "sft"), ("ppo", "reward"), ("self_reward", "gpt")])
def test_resume_goes_down_the_chain(tmp_path, monkeypatch, stage, before, resume):
    """A kill may have come in any stage: the missing one is told to go on, too, with the same folder, seed and device."""
    asked = []

    def called(cfg):
        asked.append(cfg)
        raise Called
    stage, before = importlib.import_module(stage), importlib.import_module(before)
    monkeypatch.setattr(before, "main", called)
    with pytest.raises(Called):
        stage.main(stage.Config(out=str(tmp_path / "out"), seed=3, device="cpu", resume=resume))
    assert (asked[0].resume, asked[0].out, asked[0].seed, asked[0].device) == (resume, str(tmp_path / "out"), 3, "cpu")
