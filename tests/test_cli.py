"""Tests of scaffold/cli.py: flags from a Config, and mistakes that end in one line."""

import dataclasses
import importlib
import io
import sys
from types import SimpleNamespace

import pytest
import torch

from scaffold.cli import (
    BaseConfig,
    RunConfig,
    UserError,
    brief,
    check_name,
    choose,
    fail,
    field_help,
    parse,
    pick_device,
    require,
    run_folder,
    start,
)
from tiny import ROOT

# Flags


# Every module with a Config: gpt, sft, ..., lab.tool_use
SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in (ROOT, ROOT / "data", ROOT / "lab")
    for path in sorted(folder.glob("*.py"))
    if "\nclass Config" in path.read_text(encoding="utf-8")
]
VALUES = {str: "x", int: 7, float: 0.25, bool: True, tuple: ["a", "b"]}


def flag(name):
    return "--" + name.replace("_", "-")


def test_a_field_with_a_tuple_takes_the_words_without_a_flag(capsys):
    @dataclasses.dataclass
    class Config:
        words: tuple = ()   # what to do, with which files
        level: int = 2      # how much

    assert parse(Config, "", []) == Config()
    assert parse(Config, "", ["check", "a.py", "--level", "3"]) == Config(["check", "a.py"], 3)
    with pytest.raises(UserError, match="unknown flag --lvel; did you mean --level"):
        parse(Config, "", ["check", "--lvel", "3"])
    with pytest.raises(SystemExit):
        parse(Config, "", ["--help"])
    assert "what to do, with which files" in capsys.readouterr().out


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
        if f.default == ():   # words without a flag
            args = value
        assert parse(Config, "", args) == dataclasses.replace(Config(), **{f.name: value}), f.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_text_and_the_default_of_every_field(script, capsys):
    module = importlib.import_module(script)
    texts = field_help(module.Config)
    assert set(texts) == {f.name for f in dataclasses.fields(module.Config)}
    assert [name for name, text in texts.items() if len(text) < 10] == []
    with pytest.raises(SystemExit) as e:
        parse(module.Config, module.__doc__, ["--help"])
    assert e.value.code == 0
    shown = squeeze(capsys.readouterr().out)
    for name, text in texts.items():
        default = getattr(module.Config(), name)
        assert squeeze(text) in shown
        if default != ():   # words without a flag
            assert flag(name) in shown
            assert squeeze(f"[{default}]") in shown


@dataclasses.dataclass
class Switches:
    on: bool = True  # a switch that is on, at 100%
    off: bool = False  # a switch that is off


def test_a_switch_can_be_turned_off(capsys):
    assert parse(Switches, "", ["--no-on", "--off"]) == Switches(on=False, off=True)
    with pytest.raises(SystemExit):
        parse(Switches, "", ["--help"])
    assert "at 100%" in capsys.readouterr().out


@dataclasses.dataclass
class Inherited(RunConfig):
    out: str = "elsewhere"
    save_every: int = 5  # updates between saves
    lr: float = 1e-3  # peak learning rate: the first line,
    #                   and the second
    plain: str = "x"


def test_help_texts_are_inherited_continued_and_replaced():
    texts = field_help(Inherited)
    assert texts["out"] == field_help(BaseConfig)["out"]
    assert texts["seed"] == field_help(BaseConfig)["seed"]
    assert texts["resume"] == field_help(RunConfig)["resume"]
    assert texts["save_every"] == "updates between saves"
    assert texts["lr"] == "peak learning rate: the first line, and the second"
    assert texts["plain"] == ""
    assert parse(Inherited, "", []).out == "elsewhere"


@pytest.mark.parametrize("value", [2**53 + 1, -(2**53) - 1, 10**30])
def test_an_integer_beyond_what_torch_takes_is_refused(value):
    with pytest.raises(UserError, match=f"--seed {value}: must be between"):
        parse(RunConfig, "", ["--seed", str(value)])
    assert parse(RunConfig, "", ["--seed", "-3"]).seed == -3


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300"])
def test_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(UserError, match="--lr .*: must be between"):
        parse(Inherited, "", [f"--lr={value}"])


# Checks


@pytest.mark.parametrize("value", [0, 0.5, 1])
def test_require_takes_what_is_within_its_bounds(value):
    require(SimpleNamespace(clip_ratio=value), 0, "clip_ratio", most=1)


@pytest.mark.parametrize("value", [-1, 1.01, float("nan"), float("inf")])
def test_require_names_the_flag_the_value_and_the_bounds(value):
    with pytest.raises(UserError, match=rf"--clip-ratio {value}: must be between 0 and 1"):
        require(SimpleNamespace(clip_ratio=value), 0, "clip_ratio", most=1)
    if not value > 1:
        with pytest.raises(UserError, match=rf"--clip-ratio {value}: must be at least 0"):
            require(SimpleNamespace(clip_ratio=value), 0, "clip_ratio")


def test_choose_names_the_flag_the_value_and_the_choices():
    choose(SimpleNamespace(my_loss="b"), "my_loss", "a", "b", "c")
    with pytest.raises(UserError, match="--my-loss d: choose a, b or c"):
        choose(SimpleNamespace(my_loss="d"), "my_loss", "a", "b", "c")


def test_a_name_is_no_path_and_no_other_stage():
    check_name(SimpleNamespace(name="ppo-2"), "gpt", "sft")
    for name in ("", "base", "sft", "a/b"):
        with pytest.raises(UserError, match=f"--name {name!r}: must not be"):
            check_name(SimpleNamespace(name=name), "gpt", "sft")


def test_run_folder_takes_a_folder_or_a_new_name_but_no_file(tmp_path):
    (tmp_path / "file").touch()
    assert run_folder(str(tmp_path)) == tmp_path
    assert run_folder(tmp_path / "new") == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"--out .*file: this is a file"):
        run_folder(tmp_path / "file")


def test_brief_makes_part_of_a_line():
    assert brief("two\n  lines") == "two lines"
    assert brief("x" * 160) == "x" * 160
    assert brief("x" * 161) == "x" * 157 + "..."


# Ends


def test_fail_prints_one_line_and_exits(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    with pytest.raises(SystemExit) as e:
        fail("no such thing", 7)
    assert e.value.code == 7
    assert capsys.readouterr().err == "script.py: no such thing\n"


@pytest.fixture
def console(monkeypatch):
    """Make sys.stdout a console of an encoding: console("ascii") -> function that reads it."""
    def open_console(encoding):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, newline="\n"))
        monkeypatch.setattr(sys, "argv", ["script.py"])

        def read():
            sys.stdout.flush()
            return raw.getvalue().decode(encoding)

        return read

    return open_console


# encoding -> how it prints ODD: half a surrogate pair has no encoding at all
ODD = "µ – 猫 👍 \ud800."
PRINTED = {
    "ascii": "? ? ? ? ?.",
    "latin-1": "µ ? ? ? ?.",
    "cp1252": "µ – ? ? ?.",
    "gb18030": "µ – 猫 👍 ?.",
    "utf-8": "µ – 猫 👍 ?.",
}


@pytest.mark.parametrize("encoding, printed", PRINTED.items(), ids=PRINTED)
def test_what_a_console_cannot_show_is_replaced(console, encoding, printed):
    read = console(encoding)
    start(lambda cfg: print(cfg.out, ODD), BaseConfig, "")
    assert read() == f"out {printed}\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_console_shows_the_help(monkeypatch, console, script, encoding):
    module = importlib.import_module(script)
    read = console(encoding)
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as e:
        start(module.main, module.Config, module.__doc__)
    assert e.value.code == 0
    assert "--" in read()


def test_a_script_for_one_process_refuses_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as e:
        start(print, Switches, "")
    assert e.value.code == 2
    assert "one process" in capsys.readouterr().err


TROUBLE = {  # what main raises -> exit code, parts of the line
    "full disk": (OSError(28, "No space left on device", "x.pt"), 2, ["x.pt", "No space left"]),
    "no errno": (PermissionError("no name, no number"), 2, ["no name"]),
    "Ctrl-C": (KeyboardInterrupt(), 130, ["stopped"]),
    "no memory": (MemoryError(), 2, ["out of memory"]),
    "no GPU memory": (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, ["out of memory"]),
}


@pytest.mark.parametrize("error, code, parts", TROUBLE.values(), ids=TROUBLE)
def test_an_error_of_the_machine_is_one_line_too(monkeypatch, capsys, error, code, parts):
    def main(cfg):
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as e:
        start(main, Inherited, "")
    line = capsys.readouterr().err.lstrip("\n")
    assert e.value.code == code, line
    assert line.count("\n") == 1, line
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("shape", [(2**50,), (2**62, 4), (2**40, 2**40)])
def test_a_size_that_cannot_be_allocated_is_one_line(monkeypatch, capsys, shape):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as e:
        start(lambda cfg: torch.zeros(shape), Switches, "")
    assert e.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("script.py: out of memory; make the model or the batches smaller")
    assert line.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(cfg):
        torch.zeros(2, 3) @ torch.zeros(2, 3)

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(RuntimeError, match="shapes"):
        start(main, Switches, "")


def test_ctrl_c_mentions_resume_where_a_script_has_it(monkeypatch, capsys):
    def main(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["script.py"])
    for Config, mentioned in ((Inherited, True), (Switches, False)):
        with pytest.raises(SystemExit):
            start(main, Config, "")
        assert ("--resume" in capsys.readouterr().err) == mentioned


def test_pick_device_takes_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cpu"):
        pick_device("cuda")
