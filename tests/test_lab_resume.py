"""lab/resume.py: the demonstration shows what it claims, and would show the contrary."""
import signal

import pytest

from lab import resume
from scaffold.cli import UserError


@pytest.fixture
def two_runs(tmp_path):
    """Return two folders with equal finished runs."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        resume.train(resume.Config(out=str(folder)))
    return folders


def test_equal_runs_are_equal(two_runs, capsys):
    capsys.readouterr()
    resume.compare(*two_runs)
    assert capsys.readouterr().out.count("True") == 2


def test_another_log_is_seen(two_runs, capsys):
    with open(two_runs[1] / "demo.jsonl", "a") as f:
        f.write("{}\n")
    capsys.readouterr()
    resume.compare(*two_runs)
    printed = capsys.readouterr().out
    assert "bit for bit: True" in printed
    assert "byte for byte:   False" in printed


def test_other_weights_are_seen(two_runs, capsys):
    resume.train(resume.Config(out=str(two_runs[1]), seed=1))
    capsys.readouterr()
    resume.compare(*two_runs)
    assert "bit for bit: False" in capsys.readouterr().out


@pytest.mark.parametrize("returncode, text", [
    (-signal.SIGKILL, "run     killed at step 5\n"),
    (0, "run     finished\n"),
])
def test_the_end_of_a_process_is_printed(returncode, text, tmp_path, monkeypatch, capsys):
    done = resume.subprocess.CompletedProcess([], returncode)
    monkeypatch.setattr(resume.subprocess, "run", lambda *args, **kwargs: done)
    resume.run_process(tmp_path / "run", kill_at=5)
    assert capsys.readouterr().out == text


def test_a_process_that_fails_is_a_user_error(tmp_path, monkeypatch):
    done = resume.subprocess.CompletedProcess([], 2, stderr="no space left")
    monkeypatch.setattr(resume.subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(UserError, match="no space left"):
        resume.run_process(tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_with_the_same_bits(capsys):
    resume.main(resume.Config())
    lines = capsys.readouterr().out.splitlines()
    ends = [line.split(maxsplit=1) for line in lines[:5]]
    assert ends[0] == ["whole", "finished"]
    assert ends[1:4] == [["killed", f"killed at step {n}"] for n in resume.KILLS]
    assert ends[4] == ["killed", "finished"]
    assert lines[5].endswith("True")
    assert lines[6].endswith("True")
