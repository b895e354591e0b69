"""Tests of scaffold/cli.py: flags from a Config, and mistakes that end in one line."""

import dataclasses
import importlib
import sys

import pytest
import torch

from gpt import UserError, parse, pick_device
from gpt import field_advice as field_help
from gpt import run as start

SCRIPTS = [
    "gpt",
    "sft",
    "reward",
    "dpo",
    "ppo",
    "eval",
    "chat",
    "tools",
    "self_instruct",
    "self_reward",
]
VALUES = {str: "x", int: 7, float: 0.25, bool: True}


def flag(name):
    return "--" + name.replace("_", "-")


def squeeze(text):
    """Remove all white space: argparse breaks lines, also after a hyphen."""
    return "".join(text.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_of_a_script_has_a_flag(script):
    Config = importlib.import_module(script).Config
    assert parse(Config, "", []) == Config()
    for f in dataclasses.fields(Config):
        value = VALUES[type(f.default)]
        args = [flag(f.name)] if value is True else [flag(f.name), str(value)]
        assert parse(Config, "", args) == dataclasses.replace(Config(), **{f.name: value}), f.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_advice_and_the_default_of_every_field(script, capsys):
    module = importlib.import_module(script)
    advice = field_help(module.Config)
    assert set(advice) == {f.name for f in dataclasses.fields(module.Config)}
    assert all(len(text) > 10 for text in advice.values())
    with pytest.raises(SystemExit) as e:
        parse(module.Config, module.__doc__, ["--help"])
    assert e.value.code == 0
    shown = squeeze(capsys.readouterr().out)
    for name, text in advice.items():
        assert flag(name) in shown
        assert squeeze(text) in shown
        assert squeeze(f"[{getattr(module.Config(), name)}]") in shown


@dataclasses.dataclass
class Switches:
    on: bool = True
    "a switch that is on, at 100%"
    off: bool = False
    "a switch that is off"


def test_a_switch_can_be_turned_off(capsys):
    assert parse(Switches, "", ["--no-on", "--off"]) == Switches(on=False, off=True)
    with pytest.raises(SystemExit):
        parse(Switches, "", ["--help"])
    assert "at 100%" in capsys.readouterr().out


TROUBLE = {  # what main raises -> exit code, parts of the line
    "full disk": (OSError(28, "No space left on device", "x.pt"), 2, ["x.pt", "No space left"]),
    "no errno": (PermissionError("no name, no number"), 2, ["no name"]),
    "Ctrl-C": (KeyboardInterrupt(), 130, ["stopped"]),
}


@pytest.mark.parametrize("error, code, parts", TROUBLE.values(), ids=TROUBLE)
def test_an_error_of_the_machine_is_one_line_too(monkeypatch, capsys, error, code, parts):
    def main(cfg):
        raise error

    monkeypatch.setattr(sys, "argv", ["gpt.py"])
    with pytest.raises(SystemExit) as e:
        start(main, importlib.import_module("gpt").Config, "")
    line = capsys.readouterr().err.lstrip("\n")
    assert e.value.code == code, line
    assert line.count("\n") == 1, line
    assert all(part in line for part in parts), line


def test_pick_device_takes_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cpu"):
        pick_device("cuda")
