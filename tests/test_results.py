"""results/: README.md holds the tables that the files make, and the files stay small."""
import json
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "results"
sys.path.insert(0, str(RESULTS))
import figures  # noqa: E402
import keep  # noqa: E402

LOGS = sorted(RESULTS.glob("*.jsonl"))


def test_the_tables_of_the_readme_are_those_of_the_files(tmp_path, monkeypatch):
    copy = tmp_path / "README.md"
    copy.write_bytes(figures.README.read_bytes())
    monkeypatch.setattr(figures, "README", copy)
    figures.write_tables(figures.tables())
    assert copy.read_bytes() == (RESULTS / "README.md").read_bytes()


def test_a_table_without_its_marks_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "README", tmp_path / "README.md")
    figures.README.write_text("# Results\n")
    with pytest.raises(SystemExit, match="no <!-- table A"):
        figures.write_tables({"A": "|a|"})


def test_the_row_of_the_reward_model_is_in_table_b_alone(monkeypatch):
    policy = dict(stage="ppo", gold=0.5, refused_rate=0.25, gold_minus_greedy_ci=0.06)
    probes = dict(stage="reward", right_vs_wrong=0.75, n_right_vs_wrong=80, wish_vs_none=None)
    runs = dict(eval={0: [policy, probes]}, reward={})
    monkeypatch.setattr(figures, "load", runs.get)
    assert "| ppo | 0.50 | - | - | 25% |" in figures.table_a()
    assert "| reward |" not in figures.table_a()
    assert "| right vs wrong | 0.75 | 80 |" in figures.table_b()
    assert "| wish vs none | - | - |" in figures.table_b()


@pytest.mark.parametrize("values, text", [
    ([0.1, 0.5, 0.3], "0.30 (0.10 to 0.50)"),
    ([0.201, 0.202], "0.20"),
    ([0.5, None], "0.50"),
    ([None], "-"),
])
def test_spread_is_the_mean_and_the_range(values, text):
    assert figures.spread(values) == text


@pytest.mark.parametrize("row, published", [
    ({"step": 1, "loss": 0.5}, False),
    ({"step": 1, "loss": 0.5, "val_loss": 0.6}, True),
    ({"step": 1, "eval_loss": 0.6}, True),
    ({"epoch": 1, "val_loss": 0.6}, True),
    ({"split": "held-out users"}, True),
    ({"config": {"out": "out"}}, False),
])
def test_training_steps_are_not_published(row, published):
    assert keep.is_report(row) == published


def test_every_thins_out_the_updates_and_keeps_the_last():
    lines = [json.dumps({"update": n}) for n in range(13)]
    kept = [json.loads(line)["update"] for line in keep.keep(lines, every=5)]
    assert kept == [0, 5, 10, 12]


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_a_published_log_has_nothing_to_leave_out(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    every = 5 if path.stem.startswith("ppo-no-ptx") else 1
    assert keep.keep(lines, every) == lines


def test_the_folder_is_small():
    assert len(LOGS) > 40
    assert sum(path.stat().st_size for path in RESULTS.iterdir() if path.is_file()) < 800_000
