"""lab/forgetting.py: the two copies are comparable, and the verdict follows the numbers."""
import pytest

import sft
from data import village
from lab import cot, forgetting, templates
from lab_run import Started, make_run, start
from scaffold.cli import UserError
from tiny import ENC, read_jsonl


@pytest.mark.parametrize("epochs, measured", [
    (1, [1]),
    (16, [1, 4, 16]),
    (20, [1, 4, 16, 20]),
])
def test_measured_epochs_end_with_the_last(epochs, measured):
    assert forgetting.measured_epochs(epochs) == measured


def test_one_task_and_all_tasks_have_equal_tokens():
    one = templates.demonstrations(ENC, [0, 1, 2], 8000, 0, "rewrite")
    every = templates.demonstrations(ENC, [0, 1, 2], 8000, 0, None)
    assert {chat["task"]["use"] for chat in one} == {"rewrite"}
    assert {chat["task"]["use"] for chat in every} == set(village.SHARES)
    tokens = cot.count_tokens(one, ENC)
    assert abs(tokens - cot.count_tokens(every, ENC)) < 0.015 * tokens


def verdict(task=.9, others=.1, all_others=.7, first=.4):
    """Return the verdict on two seeds.

    After 16 epochs of one task: the gold of that task and of the others; of all tasks: that of the
    others. first: the gold of the others after one epoch of one task. At the start: .2 and .5.
    """
    golds = {
        ("one", 0): (.2, .5), ("one", 1): (.5, first), ("one", 16): (task, others),
        ("all", 0): (.2, .5), ("all", 1): (.4, .6), ("all", 16): (.5, all_others),
    }
    rows = []
    for (name, epoch), (gold, gold_others) in golds.items():
        for seed in range(2):
            rows.append({"run": name, "epoch": epoch, "seed": seed, "task": gold,
                         "others": gold_others, "lm_loss": 1.0})
    return forgetting.verdict(rows)


def test_the_verdict_holds_when_all_parts_do():
    text = verdict()
    assert "claim holds here" in text
    assert "16 epochs" in text
    assert "+0.70" in text
    assert "-0.40 (by -0.30 since epoch 1)" in text


@pytest.mark.parametrize("numbers", [
    pytest.param({"others": .6}, id="nothing is forgotten"),
    pytest.param({"all_others": .1}, id="all tasks forget as well"),
    pytest.param({"task": .2}, id="nothing is learned"),
    pytest.param({"first": .1}, id="more epochs are no worse"),
])
def test_the_verdict_holds_in_part_when_one_part_fails(numbers):
    assert "holds in part" in verdict(**numbers)


def test_the_verdict_does_not_hold_when_all_parts_fail():
    assert "does not hold" in verdict(task=.2, others=.5, all_others=.1, first=.5)


def test_it_runs_and_logs(tmp_path, capsys, monkeypatch):
    out = make_run(tmp_path)
    demonstrations = forgetting.demonstrations
    uses = []

    def spy(*args):
        uses.append(args[-1])
        return demonstrations(*args)

    monkeypatch.setattr(forgetting, "demonstrations", spy)
    cfg = forgetting.Config(out=str(out), tokens=300, epochs=2, n=9, seeds=1, device="cpu")
    forgetting.main(cfg)
    assert uses == ["rewrite", None]
    rows = read_jsonl(out / "lab-forgetting.jsonl")
    expected = [(name, epoch) for name in forgetting.VARIANTS for epoch in (0, 1, 2)]
    assert [(r["run"], r["epoch"]) for r in rows] == expected
    one, every = [r for r in rows if r["epoch"] == 0]
    for key in ("task", "others", "lm_loss"):
        assert one[key] == every[key]       # both copies start from the same checkpoint
    assert "the claim" in capsys.readouterr().out


def test_an_unknown_task_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="--task cooking"):
        forgetting.main(forgetting.Config(out=str(tmp_path), task="cooking"))


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "main", start)
    with pytest.raises(Started) as started:
        forgetting.main(forgetting.Config(out=str(tmp_path / "new"), seed=3, device="cpu"))
    stage = started.value.args[0]
    assert (stage.out, stage.seed, stage.device) == (str(tmp_path / "new"), 3, "cpu")
    assert "sft.pt is missing" in capsys.readouterr().out
