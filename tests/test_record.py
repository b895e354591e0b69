"""Tests of scaffold/record.py: what a run leaves beside its log."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

import ppo
import sft
from scaffold import record
from scaffold.cli import RunConfig
from scaffold.record import changed_settings, commit, read_record
from scaffold.run import Run, digest, unlock
from tiny import ROOT, read_jsonl


@dataclass
class Config(RunConfig):
    lr: float = 1e-3
    beta: float = 0.1
    data: str = ""


def begin(out, inputs=(), **settings):
    """Take two of three steps -> the run."""
    run = Run(Config(out=str(out), save_every=1, **settings), "demo", inputs)
    for step in run.steps(3):
        run.log(step=step)
        if step == 1:
            return run


def test_a_record_says_how_to_repeat_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lab/x.py", "--lr", "0.5", "--data", "a b.json"])
    data = tmp_path / "a b.json"
    data.write_text("{}")
    run = begin(tmp_path / "out", [data, ""], seed=7, lr=0.5, data=str(data))
    found = read_record(tmp_path / "out", "demo")
    assert found["command"] == "python lab/x.py --lr 0.5 --data 'a b.json'"
    assert found["changed"] == {"lr": 0.5, "data": str(data)}
    assert found["settings"] == vars(run.cfg)
    assert found["inputs"] == {str(data): digest([data])}
    kept = {k: found[k] for k in ("seed", "steps", "processes", "device", "finished")}
    assert kept == dict(seed=7, steps=3, processes=1, device="cpu", finished=False)
    assert (found["commit"], found["dirty"]) == commit()


def test_the_record_of_a_finished_run_has_its_time(tmp_path):
    run = begin(tmp_path)
    before = read_record(tmp_path, "demo")
    run.finish()
    after = read_record(tmp_path, "demo")
    assert after["finished"] and after["seconds"] >= before["seconds"] > 0
    assert {k for k in after if after[k] != before[k]} == {"finished", "seconds"}
    assert read_jsonl(tmp_path / "demo.jsonl") == [{"step": 0}, {"step": 1}]   # no row changed


def test_a_retrained_stage_keeps_the_record_of_the_old_one(tmp_path):
    begin(tmp_path, lr=0.5).finish()
    (tmp_path / "demo.pt").write_bytes(b"")
    unlock(tmp_path)
    begin(tmp_path, lr=0.25)
    old = json.loads((tmp_path / "demo.run.json.old").read_text())
    assert (old["changed"], read_record(tmp_path, "demo")["changed"]) == ({"lr": 0.5}, {"lr": 0.25})


@pytest.mark.parametrize("module", [ppo, sft])
def test_what_a_script_fills_in_is_no_change(module, tmp_path):
    cfg = module.Config(out=str(tmp_path), seed=3, device="cpu", resume=True, save_every=1)
    assert changed_settings(cfg) == {}
    name = "prompts" if module is ppo else "data"
    setattr(cfg, name, str(tmp_path / "data" / "village.jsonl"))
    assert changed_settings(cfg) == {}
    setattr(cfg, name, str(tmp_path / "mine.jsonl"))
    assert changed_settings(cfg) == {name: str(tmp_path / "mine.jsonl")}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"command": 1}', "[" * 100_000])
def test_a_damaged_record_is_none(tmp_path, text):
    (tmp_path / "demo.run.json").write_text(text)
    assert read_record(tmp_path, "demo") == {}
    assert read_record(tmp_path / "nowhere", "demo") == {}


def test_without_git_there_is_no_commit(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    commit.cache_clear()
    monkeypatch.setattr(subprocess, "run", missing)
    assert commit() == (None, None)
    commit.cache_clear()


def test_the_root_is_that_of_the_project():
    assert record.ROOT == ROOT
