"""Tests of scaffold/run.py: a run survives a kill, a damaged file, a full disk; it stops at a NaN.

The training scripts themselves are killed in test_processes.py.
"""

import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import gpt
import sft
from data.formats import write_records
from scaffold.cli import UserError, start
from scaffold.run import (
    Diverged,
    Run,
    digest,
    ensure_stage,
    json_line,
    load_checkpoint,
    log_metrics,
    save_checkpoint,
    set_seed,
    take_step,
    unlock,
)
from tiny import ENC, ROOT, read_jsonl

# Checkpoints


def test_a_checkpoint_comes_back(tmp_path):
    path = tmp_path / "new" / "c.pt"
    state = dict(a=torch.randn(3), b=[1, "two", None, {"c": (4, 5.0)}])
    save_checkpoint(path, **state)
    back = load_checkpoint(path)
    assert torch.equal(back["a"], state["a"])
    assert back["b"] == state["b"]
    assert [p.name for p in path.parent.iterdir()] == ["c.pt"]


def test_a_write_that_fails_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, a=1)
    old = path.read_bytes()

    def full_disk(state, f):
        (f if hasattr(f, "write") else open(f, "wb")).write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    for file in (path, tmp_path / "first.pt"):
        with pytest.raises(OSError):
            save_checkpoint(file, a=2)
    assert path.read_bytes() == old
    assert not (tmp_path / "first.pt").exists()


class Malice:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_never_runs_code(tmp_path):
    torch.save({"model": Malice(str(tmp_path / "hacked"))}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="c.pt"):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "hacked").exists()


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, a=torch.randn(999))
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:100], whole[:-1], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="c.pt"):
            load_checkpoint(path)
    with pytest.raises(UserError, match="gone.pt"):
        load_checkpoint(tmp_path / "gone.pt")


def test_every_flipped_bit_of_a_weight_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    weight = torch.arange(64.0)
    save_checkpoint(path, weight=weight)
    raw = path.read_bytes()
    begin = raw.index(weight.numpy().tobytes())
    for bit in range(0, 8 * 256, 37):
        broken = bytearray(raw)
        broken[begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_checkpoint(path)


def test_nan_is_never_saved(tmp_path):
    """The last step of a run may make the weights NaN; no later step would notice."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, model={"w": torch.ones(3)})
    before = path.read_bytes()
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(Diverged, match="c.pt: not saved.*--lr"):
            save_checkpoint(path, model={"a": [torch.ones(2), (torch.tensor([1, bad]),)]})
    assert contents(tmp_path) == {"c.pt": before}


def shared_lists():
    """Return lists that hold each other twice: 2^60 elements if one does not look out."""
    part = [torch.ones(3)]
    for _ in range(60):
        part = [part, part]
    return part


def repack(path, compression):
    """Write a checkpoint's archive again with another compression."""
    with zipfile.ZipFile(path) as old:
        files = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in files.items():
            new.writestr(name, content)


EXPANDED = {
    "a repeated number": torch.zeros(1).expand(2**30),
    "repeated rows": torch.zeros(1, 2**14).expand(2**16, -1),
    "views of one storage": [torch.zeros(2**14)[:].view(2**7, -1) for _ in range(1)] * 9,
    "no storage": torch.zeros(2**30, device="meta"),
}


@pytest.mark.parametrize("tensors", EXPANDED.values(), ids=EXPANDED)
@pytest.mark.parametrize("new_format", [True, False])
def test_a_small_file_cannot_hold_large_tensors(tmp_path, tensors, new_format):
    """A weight that repeats one number is 4 GB as soon as a model copies it."""
    path = tmp_path / "c.pt"
    torch.save({"model": tensors}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match="c.pt: not a readable checkpoint"):
        load_checkpoint(path)


def test_tied_and_nested_tensors_are_read(tmp_path):
    path = tmp_path / "c.pt"
    weight = torch.randn(9, 9)
    torch.save({"model": [weight, weight], "nested": shared_lists()}, path)
    assert torch.equal(load_checkpoint(path)["model"][1], weight)


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """A thousandth of its size on disk."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, weight=torch.zeros(10**6))
    repack(path, zipfile.ZIP_STORED)
    load_checkpoint(path)
    repack(path, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(path)


def test_log_metrics_appends_rows_or_starts_anew(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log_metrics(path, step=0)
    log_metrics(path, step=1, loss=2.5)
    assert read_jsonl(path) == [{"step": 0}, {"step": 1, "loss": 2.5}]
    log_metrics(path, fresh=True, step=9)
    assert read_jsonl(path) == [{"step": 9}]


def strict(text):
    """Read JSON as JavaScript, jq and Rust do: NaN and Infinity are errors."""
    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


NUMBERS = {
    "a number": (0.5, 0.5),
    "NaN": (math.nan, None),
    "infinity": (math.inf, None),
    "in a list": ([1.0, [-math.inf], (math.nan, 2)], [1.0, [None], [None, 2]]),
    "in a dict": ({"a": {"b": math.nan, "c": [math.nan]}}, {"a": {"b": None, "c": [None]}}),
    "of numpy": (np.float64("nan"), None),
    "half a surrogate pair": ("猫 \ud800", "猫 \ud800"),
    "others": ([True, None, 7, "NaN", "猫"], [True, None, 7, "NaN", "猫"]),
}


@pytest.mark.parametrize("value, want", NUMBERS.values(), ids=NUMBERS)
def test_logs_and_records_are_strict_json(tmp_path, value, want):
    log_metrics(tmp_path / "log.jsonl", step=0, value=value)
    write_records(tmp_path / "records.jsonl", [{"step": 0, "value": value}] * 2)
    for name in ("log", "records"):
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [strict(line) for line in lines] == [{"step": 0, "value": want}] * len(lines)


def test_only_numbers_that_are_none_change_a_line():
    row = {"é": [0.1 + 0.2, 1e-30, -0.0, 10**20], "b": "\ud800 猫"}
    assert json_line(row) == json.dumps(row) + "\n"


def test_the_seed_decides_the_numbers_of_all_generators():
    def draw(seed):
        set_seed(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    one, again, other = draw(1), draw(1), draw(2)
    assert one == again
    assert all(a != b for a, b in zip(one, other))


# A small run in this process


class Killed(BaseException):
    """No code catches it, as no code catches SIGKILL."""


def small(out, kill_at=None, n=20, lr=1e-2, resume=False, save_every=4, nan_at=None):
    """Train with one of everything that has a state -> weights, log as a string."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    rng = random.Random(0)
    counts = {}
    seen = []
    cfg = SimpleNamespace(out=str(out), save_every=save_every, resume=resume, lr=lr)
    parts = dict(model=model, optimizer=optimizer, rng=rng, counts=counts, seen=seen)
    run = Run(cfg, "small", **parts)
    for step in run.steps(n):
        noise = rng.random() + random.random() + np.random.rand() + np.random.randn()
        loss = model(torch.randn(8, 4) + noise).square().mean()
        if step == nan_at:
            loss = loss * math.nan
        norm = run.take_step(loss, optimizer, model, lr, [step, step + 1])
        counts[f"{step % 3}"] = counts.get(f"{step % 3}", 0) + 1
        seen.append(noise)
        run.log(step=step, loss=loss.item(), grad_norm=norm, counts=dict(counts), seen=len(seen))
        if step == kill_at:
            raise Killed
    save_checkpoint(Path(out) / "small.pt", model=model.state_dict())
    run.finish()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    return weights, (Path(out) / "small.jsonl").read_text()


def killed(out, at, **settings):
    """Run `small` and kill it after a step."""
    with pytest.raises(Killed):
        small(out, kill_at=at, **settings)
    unlock(Path(out))  # a dead process holds no lock


def same(a, b):
    """Do two runs have the same log and, bit for bit, the same weights?"""
    return a[1] == b[1] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def contents(folder):
    """Return {name: bytes} of the files in a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was never killed."""
    return small(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("at", range(20))
def test_a_run_killed_at_any_step_resumes_as_the_same_run(whole, tmp_path, at):
    killed(tmp_path, at)
    assert same(small(tmp_path, resume=True), whole)


def test_a_run_may_be_killed_often_and_save_at_another_interval(whole, tmp_path):
    killed(tmp_path, 3, save_every=2)
    for at, every in ((6, 3), (6, 1), (13, 5), (18, 7)):
        killed(tmp_path, at, save_every=every, resume=True)
    assert same(small(tmp_path, resume=True), whole)


STATE = ["model", "optimizer", "rng", "counts", "seen", "torch", "numpy", "python"]


@pytest.mark.parametrize("part", STATE)
def test_every_part_of_the_state_matters(whole, tmp_path, part):
    """Without it the run would be another one. So the tests above can fail."""
    killed(tmp_path, 9)
    state = load_checkpoint(tmp_path / "small.state")
    killed(tmp_path / "fresh", 0)
    first = load_checkpoint(tmp_path / "fresh" / "small.state")
    where = "random" if part in ("torch", "numpy", "python") else "parts"
    state[where][part] = first[where][part]
    save_checkpoint(tmp_path / "small.state", **state)
    assert not same(small(tmp_path, resume=True), whole)


def damage(path, how):
    """Damage a file; a number flips one bit at that percentage of its length."""
    raw = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "other":
        torch.save({"model": 1}, path)
    elif how == "incomplete":
        torch.save({"settings": {}}, path)
    else:
        raw[how * len(raw) // 100] ^= 16
        path.write_bytes(raw)


@pytest.mark.parametrize("how", ["empty", "half", "other", "incomplete", "gone", 20, 40, 60, 80])
def test_a_damaged_state_is_replaced_by_the_one_before(whole, tmp_path, capsys, how):
    """A kill between the two renames leaves only the older state ("gone").

    A flipped bit shows in a checksum.
    """
    killed(tmp_path, 14)
    damage(tmp_path / "small.state", how)
    assert same(small(tmp_path, resume=True), whole)
    shown = capsys.readouterr()
    if isinstance(how, int) and "at step 12 of 20" in shown.out:
        return  # the bit was between the records of the file: nothing is lost
    assert "at step 8 of 20" in shown.out
    if how != "gone":
        assert "warning" in shown.err
        assert "small.state" in shown.err


def change_state(path, **changes):
    """Exchange entries of a state file (None removes one); parts of parts are merged."""
    state = load_checkpoint(path)
    for key, value in changes.items():
        state[key] = state[key] | value if isinstance(value, dict) and value else value
    torch.save({k: v for k, v in state.items() if v is not None}, path)


OTHER_STATES = {
    "no parts": dict(parts=None),
    "empty parts": dict(parts={}),
    "a list of parts": dict(parts=[]),
    "other weights": dict(parts={"model": {"w": torch.zeros(3)}}),
    "a number for the weights": dict(parts={"model": 5}),
    "a weight of another size": dict(parts={"model": {"0.weight": torch.zeros(2, 2)}}),
    "no optimizer": dict(parts={"optimizer": {}}),
    "another generator": dict(parts={"rng": (1, 2, 3)}),
    "no counts": dict(parts={"counts": None}),
    "no random states": dict(random={"torch": None}),
    "empty random states": dict(random={}),
    "a random state of floats": dict(random={"torch": torch.zeros(9)}),
    "settings in a list": dict(settings=[]),
    "a step after the last": dict(step=21),
    "a step before the first": dict(step=-1),
    "a step in words": dict(step="twelve"),
    "a step of 1e9 digits": dict(step=1e300),
    "a negative log": dict(log_bytes=-1),
    "no time": dict(seconds=None),
}


@pytest.mark.parametrize("changes", OTHER_STATES.values(), ids=OTHER_STATES)
def test_a_state_of_another_shape_is_replaced_by_the_one_before(whole, tmp_path, capsys, changes):
    killed(tmp_path, 14)
    change_state(tmp_path / "small.state", **changes)
    assert same(small(tmp_path, resume=True), whole)
    shown = capsys.readouterr()
    assert "at step 8 of 20" in shown.out
    [line] = [x for x in shown.err.splitlines() if "warning" in x]
    assert "small.state: not" in line


@pytest.mark.parametrize("changes", OTHER_STATES.values(), ids=OTHER_STATES)
def test_two_states_of_another_shape_are_an_error(tmp_path, changes):
    killed(tmp_path, 14)
    for name in ("small.state", "small.state.old"):
        change_state(tmp_path / name, **changes)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="neither this state nor the one before"):
        small(tmp_path, resume=True)
    assert before == contents(tmp_path)


@pytest.mark.parametrize("content", [5, [], {"settings": []}, None, "state", torch.zeros(2)])
def test_what_is_no_state_is_replaced_by_the_one_before(whole, tmp_path, content):
    killed(tmp_path, 14)
    torch.save(content, tmp_path / "small.state")
    assert same(small(tmp_path, resume=True), whole)


def test_two_damaged_states_are_an_error_and_are_kept(tmp_path):
    killed(tmp_path, 14)
    for name in ("small.state", "small.state.old"):
        damage(tmp_path / name, "half")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="neither"):
        small(tmp_path, resume=True)
    assert before == contents(tmp_path)


def test_a_damaged_state_never_replaces_a_good_one(whole, tmp_path):
    killed(tmp_path, 14)
    damage(tmp_path / "small.state", "half")
    killed(tmp_path, 12, resume=True)  # resumes at 8 and saves at 12
    damage(tmp_path / "small.state", "gone")  # as if killed between the two renames
    assert same(small(tmp_path, resume=True), whole)


def test_resume_without_a_state_starts_from_the_beginning(tmp_path, capsys):
    small(tmp_path, resume=True)
    assert "nothing to resume" in capsys.readouterr().out


def test_a_finished_run_cannot_be_resumed(tmp_path):
    small(tmp_path)
    with pytest.raises(UserError, match="is finished; leave --resume out to train it again$"):
        small(tmp_path, resume=True)


@pytest.mark.parametrize("name, again", {"gpt": True, "sft": True, "reward": False}.items())
def test_resuming_a_finished_run_names_init_where_it_continues_a_checkpoint(tmp_path, name, again):
    save_checkpoint(tmp_path / f"{name}.pt")
    cfg = SimpleNamespace(out=str(tmp_path), save_every=0, resume=True, init="")
    with pytest.raises(UserError, match="is finished") as e:
        Run(cfg, name)
    unlock(tmp_path)
    assert (f"--init {tmp_path / name}.pt" in str(e.value)) == again


def test_training_again_keeps_the_old_checkpoint_and_says_so(whole, tmp_path, capsys):
    small(tmp_path)
    old = contents(tmp_path)
    assert "again" not in capsys.readouterr().out
    killed(tmp_path, 14, lr=1e-3)
    assert "small.pt is trained again" in capsys.readouterr().out
    kept = contents(tmp_path)
    assert kept["small.pt"] == old["small.pt"]
    assert kept["small.jsonl.old"] == old["small.jsonl"]
    small(tmp_path, lr=1e-3, resume=True)
    kept = contents(tmp_path)
    assert kept["small.pt"] != old["small.pt"]
    assert kept["small.pt.old"] == old["small.pt"]
    assert kept["small.jsonl.old"] == old["small.jsonl"]


def test_a_run_that_diverges_keeps_the_old_checkpoint_and_its_log(tmp_path):
    small(tmp_path)
    old = contents(tmp_path)
    with pytest.raises(Diverged):
        small(tmp_path, nan_at=5)
    unlock(tmp_path)
    assert contents(tmp_path)["small.pt"] == old["small.pt"]
    assert contents(tmp_path)["small.jsonl.old"] == old["small.jsonl"]


ALL = ["dpo-ipo.pt", "long/gpt.pt", "ppo.pt", "reward.pt", "self_reward/M2.pt", "sft.pt"]


@pytest.mark.parametrize("name, resting", {
    "gpt": ALL,
    "sft": ["dpo-ipo.pt", "ppo.pt", "reward.pt"],
    "reward": ["ppo.pt"],
    "ppo": [],
    "dpo-ipo": [],
}.items())
def test_training_again_names_the_checkpoints_that_rest_on_the_old_one(
    tmp_path, capsys, name, resting
):
    for file in ["gpt.pt", *ALL]:
        save_checkpoint(tmp_path / file)
    Run(SimpleNamespace(out=str(tmp_path), save_every=0, resume=False), name)
    unlock(tmp_path)
    printed = capsys.readouterr().out
    assert f"{name}.pt is trained again" in printed
    assert ("these rest on" in printed) == bool(resting)
    assert printed.partition("old one: ")[2].strip() == ", ".join(resting)


OTHER_RUNS = {  # settings -> what the error must contain
    "lr": (dict(lr=1e-3), "--lr 0.01, not 0.001"),
    "steps": (dict(n=21), "gives 21 steps, the saved run had 20"),
}


@pytest.mark.parametrize("settings, words", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_a_run_cannot_be_resumed_with_other_settings(tmp_path, settings, words):
    killed(tmp_path, 9)
    with pytest.raises(UserError, match=words):
        small(tmp_path, resume=True, **settings)


def test_a_new_run_reports_that_it_discards_an_unfinished_one(tmp_path, capsys):
    killed(tmp_path, 9)
    small(tmp_path)
    assert "discarding" in capsys.readouterr().out


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_new_run_keeps_nothing_of_the_one_before(whole, tmp_path, at):
    """Neither its log, even if the new one is killed before it saves again, nor its states."""
    killed(tmp_path, 14, lr=1e-3)
    killed(tmp_path, at)
    assert {p.name for p in tmp_path.iterdir()} == {"small.jsonl", "small.run.json", "small.state"}
    assert same(small(tmp_path, resume=True), whole)
    killed(tmp_path, 14)
    killed(tmp_path, 2, save_every=0)
    assert not list(tmp_path.glob("*.state*"))


def change(data):
    (data / "a.txt").write_text("A.txt")


def rename(data):
    (data / "a.txt").rename(data / "c.txt")


def delete(data):
    (data / "b.txt").unlink()


@pytest.mark.parametrize("edit", [change, rename, delete])
def test_a_run_cannot_be_resumed_with_other_files(tmp_path, edit):
    """It can again when the files are what they were."""
    data = tmp_path / "data"
    cfg = SimpleNamespace(out=str(tmp_path / "out"), save_every=1, resume=False)

    def write_data():
        data.mkdir(exist_ok=True)
        for path in data.iterdir():
            path.unlink()
        for name in ("a.txt", "b.txt"):
            (data / name).write_text(name)

    def train(resume):
        cfg.resume = resume
        run = Run(cfg, "small", [data], seen=[])
        for step in run.steps(5):
            if step == 3 and not resume:
                break
        unlock(tmp_path / "out")

    write_data()
    train(resume=False)
    edit(data)
    with pytest.raises(UserError, match="has changed since it started"):
        train(resume=True)
    unlock(tmp_path / "out")
    write_data()
    train(resume=True)


PLACES = {
    "relative": lambda p: os.path.relpath(p),
    "with a detour": lambda p: f"{p.parent}/../{p.parent.name}/./{p.name}",
    "a copy of another name": lambda p: shutil.copytree(p, p.with_name("copy")),
    "a link": lambda p: p.with_name("link").symlink_to(p) or p.with_name("link"),
    "moved": lambda p: p.rename(p.with_name("moved")),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_run_can_be_resumed_with_the_same_files_at_another_place(tmp_path, place, kind):
    """A flag may name them by any path, and their names may differ, but not those in a folder."""
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "a.txt").write_text("a")
    (data / "deep" / "b.txt").write_text("b")

    def train(folder, resume, **flags):
        path = str(folder) + "/a.txt" * (kind == "file")
        cfg = SimpleNamespace(out=str(tmp_path / "out"), save_every=1, resume=resume,
                              **dict(data=path, val="") | flags)
        run = Run(cfg, "small", [cfg.data, cfg.val], seen=[])
        for step in run.steps(5):
            if step == 3 and not resume:
                break
        unlock(tmp_path / "out")
        return run

    train(data, resume=False)
    with pytest.raises(UserError, match="started with --val , not a file"):
        train(data, resume=True, val=str(data / "deep" / "b.txt"))
    unlock(tmp_path / "out")
    assert train(place(data), resume=True).resumed


def test_a_file_that_moves_inside_a_folder_changes_it(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("a")
    before = digest([tmp_path])
    (tmp_path / "a.txt").rename(tmp_path / "deep" / "a.txt")
    assert digest([tmp_path]) != before


def test_the_digest_leaves_out_empty_paths(tmp_path):
    (tmp_path / "a").write_text("a")
    assert digest(["", tmp_path / "a", ""]) == digest([tmp_path / "a"])
    assert digest([tmp_path / "a"]) != digest([""])


def test_ctrl_c_in_the_last_step_lets_the_run_finish(tmp_path):
    run = Run(SimpleNamespace(out=str(tmp_path), save_every=0, resume=False), "small")
    for step in run.steps(3):
        run.stop = step == 2
    run.finish()


def test_save_every_0_leaves_no_state(tmp_path):
    killed(tmp_path, 9, save_every=0)
    assert {p.name for p in tmp_path.iterdir()} == {"small.jsonl", "small.run.json"}


FULL_DISK = """
import resource
from scaffold import run
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
run.save_checkpoint({path!r}, model=list(range(9999)))
"""


@pytest.mark.parametrize("room", [0, 1, 1000, 6000])
def test_a_full_disk_loses_neither_state(whole, tmp_path, room):
    """A process that can write no file of more than `room` bytes tries to save."""
    killed(tmp_path, 9)
    newest = tmp_path / "small.state"
    older = tmp_path / "small.state.old"
    before = newest.read_bytes(), older.read_bytes()
    code = FULL_DISK.format(room=room, path=str(newest))
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "OSError" in done.stderr.splitlines()[-1], done.stderr
    assert before == (newest.read_bytes(), older.read_bytes())
    assert not list(tmp_path.glob("*.part"))
    assert same(small(tmp_path, resume=True), whole)


# Locks and signals


HOLD_LOCK = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused(whole, tmp_path):
    """It writes nothing. A process that was killed holds no lock."""
    call = [sys.executable, "-c", HOLD_LOCK, tmp_path]
    holder = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="another process is training there"):
        small(tmp_path)
    assert not list(tmp_path.iterdir())
    holder.kill()
    holder.wait()
    assert same(small(tmp_path), whole)


def test_a_second_script_in_the_same_folder_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    out = tmp_path / "out"
    text.write_text("the miller has a dog\n" * 400)
    flags = f"--data {text} --out {out} --steps 100000 --device cpu --block-size 32"
    call = [sys.executable, ROOT / "gpt.py", *flags.split()]
    first = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (out / "gpt.jsonl").exists():
            assert first.poll() is None
        done = subprocess.run(call, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert "another process is training there" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        first.kill()
        first.wait()


def test_ctrl_c_ends_the_run_after_the_step_and_saves_it(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        counts = {}
        cfg = SimpleNamespace(out=str(tmp_path), save_every=0, resume=False)
        run = Run(cfg, "small", counts=counts)
        with pytest.raises(KeyboardInterrupt):
            for step in run.steps(9):
                if step == 5:
                    os.kill(os.getpid(), signal.SIGINT)
                counts[str(step)] = "whole"
        assert load_checkpoint(tmp_path / "small.state")["step"] == 6
        assert len(counts) == 6
        run.stop = True
        with pytest.raises(KeyboardInterrupt):
            run.interrupt()  # a second Ctrl-C does not wait
    finally:
        signal.signal(signal.SIGINT, before)


# Steps of the optimizer


def test_take_step_clips_sets_the_rate_and_clears_old_gradients():
    layer = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=99.0)
    begin = layer.weight.item()
    for i in range(1, 3):  # gradients that add up would move it further
        loss = 30 * layer(torch.ones(1, 1)).sum()
        assert take_step(loss, optimizer, layer, lr=0.5) == pytest.approx(30)
        assert layer.weight.item() == pytest.approx(begin - 0.5 * i, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_with_nan_or_inf_changes_no_weight(bad, where):
    weight = nn.Parameter(torch.ones(3))
    model = nn.Module()
    model.weight = weight
    loss = weight.sum()
    if where == "gradient":
        weight.register_hook(lambda g: g * bad)
    else:
        loss = loss * 0 + bad
    with pytest.raises(Diverged):
        take_step(loss, torch.optim.AdamW([weight]), model, 0.1)
    assert torch.equal(weight, torch.ones(3))


def test_a_nan_names_step_batch_and_checkpoint(whole, tmp_path):
    """The checkpoint it names is the last good state: resuming there gives the whole run."""
    where = r"small, step 10: loss nan.*; batch of records \[10, 11\]"
    good = r"last good checkpoint: .*small\.state, of step 8"
    with pytest.raises(Diverged, match=f"{where}; {good}") as e:
        small(tmp_path, nan_at=10)
    assert isinstance(e.value, UserError)
    assert "\n" not in str(e.value)
    assert "--lr" in str(e.value)
    unlock(tmp_path)
    assert same(small(tmp_path, resume=True), whole)


def test_a_script_stops_at_an_infinite_loss(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    out = tmp_path / "out"
    text.write_text("the miller has a dog\n" * 400)
    loss = gpt.lm_loss
    calls = []

    def sixth_is_infinite(*args):
        calls.append(args)
        factor = math.inf if len(calls) == 6 else 1
        return loss(*args) * factor

    monkeypatch.setattr(gpt, "lm_loss", sixth_is_infinite)
    sizes = "--n-layer 1 --n-embd 16 --block-size 32"
    flags = f"--data {text} --out {out} --steps 9 --save-every 2 {sizes} --device cpu"
    monkeypatch.setattr(sys, "argv", ["gpt.py", *flags.split()])
    with pytest.raises(SystemExit) as e:
        start(gpt.main, gpt.Config, "")
    [line] = [x for x in capsys.readouterr().err.splitlines() if "last good" in x]
    assert e.value.code == 2
    assert "step 5" in line
    ids = json.loads(re.search(r"batch of token ids (\[.*?\])", line)[1])
    assert "miller" in ENC.decode(ids)
    assert "gpt.state, of step 4" in line
    assert not (out / "gpt.pt").exists()


# The chain of stages


CHAIN = [  # stage, the one before
    ("sft", "gpt"),
    ("reward", "sft"),
    ("dpo", "sft"),
    ("ppo", "reward"),
    ("self_reward", "gpt"),
]


@pytest.mark.parametrize("stage, before", [*CHAIN, ("lab.tool_use", "gpt")])
def test_a_stage_does_not_discard_an_unfinished_run_of_the_one_before(tmp_path, stage, before):
    """It may be hours of pretraining, with settings that only the user knows."""
    state = tmp_path / f"{before}.state"
    state.write_bytes(b"hours of work")
    stage = importlib.import_module(stage)
    words = f"{before}.state: a run stopped here; continue it with --resume"
    with pytest.raises(UserError, match=words):
        stage.main(stage.Config(out=str(tmp_path), device="cpu"))
    assert state.read_bytes() == b"hours of work"
    assert list(tmp_path.iterdir()) == [state]


class Stage:
    """Stands for the module of a stage."""

    __name__ = "stage"
    Config = SimpleNamespace

    def __init__(self):
        self.configs = []

    def main(self, cfg):
        self.configs.append(cfg)


def test_ensure_stage_runs_only_a_missing_stage(tmp_path, capsys):
    stage = Stage()
    cfg = SimpleNamespace(seed=3, device="cpu", resume=True, lr=1.0)
    path = tmp_path / "stage.pt"
    ensure_stage(path, stage, cfg, steps=7)
    want = dict(out=str(tmp_path), seed=3, device="cpu", resume=True, steps=7)
    assert [vars(c) for c in stage.configs] == [want]
    assert f"{path} is missing: running stage.py first\n" == capsys.readouterr().out
    ensure_stage(path, Stage(), cfg)
    assert "first, with its default settings and data\n" in capsys.readouterr().out
    path.touch()
    ensure_stage(path, stage, cfg)
    assert len(stage.configs) == 1
    assert capsys.readouterr().out == ""


def test_ensure_stage_reports_a_checkpoint_that_a_stopped_run_would_replace(tmp_path, capsys):
    save_checkpoint(tmp_path / "sft.pt")
    ensure_stage(tmp_path / "sft.pt", sft, SimpleNamespace())
    assert not capsys.readouterr().out
    save_checkpoint(tmp_path / "sft.state")
    ensure_stage(tmp_path / "sft.pt", sft, SimpleNamespace())
    assert "a later run of sft.py stopped" in capsys.readouterr().out


def test_ensure_stage_takes_a_script_without_resume(tmp_path):
    stage = Stage()
    ensure_stage(tmp_path / "stage.pt", stage, SimpleNamespace(seed=0, device="cpu"))
    assert stage.configs[0].resume is False


class Called(Exception):
    """Raised by the stand-in for the stage before."""


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("stage, before", CHAIN)
def test_resume_is_passed_down_the_chain(tmp_path, monkeypatch, stage, before, resume):
    """Any stage may have been killed: the missing one resumes too, with the same settings."""
    configs = []

    def called(cfg):
        configs.append(cfg)
        raise Called

    stage = importlib.import_module(stage)
    monkeypatch.setattr(importlib.import_module(before), "main", called)
    out = str(tmp_path / "out")
    with pytest.raises(Called):
        stage.main(stage.Config(out=out, seed=3, device="cpu", resume=resume))
    [cfg] = configs
    assert cfg.resume == resume
    assert cfg.out == out
    assert cfg.seed == 3
    assert cfg.device == "cpu"


@pytest.mark.parametrize("path", ["small.jsonl", ".", "../run"])
def test_a_log_is_never_written_over_what_the_run_reads(tmp_path, path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "small.jsonl").write_text("data")
    cfg = SimpleNamespace(out=str(out), save_every=0, resume=False)
    with pytest.raises(UserError, match="would write its log"):
        Run(cfg, "small", [out / path])
    unlock(out)
    assert contents(out) == {"small.jsonl": b"data"}
