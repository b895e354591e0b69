"""lab/doctor.py: silent on healthy logs, ours and TRL's; each sign where its cause is put in."""
import json
import math

import pytest

from lab import doctor
from scaffold.cli import UserError
from tiny import ROOT, read_jsonl, write_jsonl

RESULTS = ROOT / "results"
TESTS = ROOT / "tests"
HACKED = "ppo-beta-0-seed100"
PPO_LOGS = [path for path in sorted(RESULTS.glob("ppo-*.jsonl")) if path.stem != HACKED]
OTHERS = sorted(path for stage in ("gpt", "sft", "reward", "dpo")
                for path in RESULTS.glob(f"{stage}-*.jsonl"))


def signs_of(path):
    return doctor.signs(doctor.read_log(path))


@pytest.mark.parametrize("path", PPO_LOGS + OTHERS, ids=lambda path: path.stem)
def test_published_healthy_logs_have_no_sign(path):
    assert signs_of(path) == {}


def test_the_published_hacked_run_has_signs():
    found = signs_of(RESULTS / f"{HACKED}.jsonl")
    assert set(found) >= {"kl", "entropy", "gold stalls"}
    rows = {row["update"]: row for row in read_jsonl(RESULTS / f"{HACKED}.jsonl")[1:]}
    assert rows[found["kl"].at]["objective/kl"] > 20
    assert rows[found["kl"].at - 1]["objective/kl"] <= 20


# Logs of TRL 1.12.0, experimental.ppo, of a GPT-2 with random weights: two layers of width 32, 64
# tokens, 32 responses of at most 16 per update. Healthy: lr 1e-4. The other: lr 1e-2, kl_coef 0.


def test_a_healthy_log_of_trl_has_no_sign():
    rows = doctor.read_log(TESTS / "trl_ppo_healthy.json")
    assert len(rows) == 8
    assert doctor.signs(rows) == {}


def test_a_log_of_trl_with_a_large_learning_rate_has_signs():
    rows = doctor.read_log(TESTS / "trl_ppo_large_lr.json")
    found = doctor.signs(rows)
    assert set(found) == {"clip", "large steps"}
    assert found["clip"].at == rows[0]["step"] == 1
    assert rows[0]["policy/clipfrac_avg"] > 0.3


def test_our_log_has_every_metric_of_trl_but_those_the_docstring_names():
    theirs = set(doctor.read_log(TESTS / "trl_ppo_healthy.json")[0])
    source = (ROOT / "scaffold" / "health.py").read_text()
    missing = {name for name in theirs if f'"{name}"' not in source}
    assert missing == {"eps", "epoch"}
    assert "\n    eps " in doctor.__doc__


def test_names_of_openrlhf_are_read(tmp_path):
    row = {"train/kl": 0.9, "train/response_length": 40.0, "train/reward": 0.5,
           "train/ppo_clip_ratio": 0.5, "train/policy_loss": 0.1}
    path = write_jsonl(tmp_path / "x.jsonl", row, row)
    found = signs_of(path)
    assert set(found) == {"kl", "clip"}
    assert "36 nats" in found["kl"].line


# Each sign


def healthy(n=40):
    """A healthy log of PPO, made up; its metrics move a little and have no noise."""
    rows = []
    for update in range(n):
        done = update / n
        rows.append({
            "update": update,
            "objective/kl": 2 * done,
            "objective/scores": done,
            "objective/scores_std": 0.6,
            "objective/gold": 0.1 + 0.5 * done,
            "objective/entropy": 4.0 - done,
            "objective/length": 10.0 + done,
            "val/num_eos_tokens": 128,
            "val/ratio_first": 1.0,
            "val/explained_variance": 0.5,
            "loss/value_avg": 0.3 - 0.1 * done,
            "policy/approxkl_avg": 0.002,
            "policy/clipfrac_avg": 0.02})
    return rows


def changed(key, function, n=40):
    """A healthy log whose metric `key` is function(done), done from 0 to 1."""
    return [row | {key: function(row["update"] / n)} for row in healthy(n)]


def test_the_made_up_log_is_healthy():
    assert doctor.signs(healthy()) == {}
    assert doctor.signs(healthy(3)) == {}


@pytest.mark.parametrize(("key", "function", "name"), [
    ("objective/scores", lambda done: 1 - done, "score falls"),
    ("objective/gold", lambda done: 0.5 - 0.3 * done, "gold stalls"),
    ("objective/kl", lambda done: 0.0, "kl stays 0"),
    ("objective/kl", lambda done: -3 * done, "kl below 0"),
    ("objective/entropy", lambda done: 4 + 8 * done, "entropy rises"),
    ("objective/entropy", lambda done: 4 * (1 - done), "entropy"),
    ("val/num_eos_tokens", lambda done: 128 - round(100 * done), "ends fall"),
    ("loss/value_avg", lambda done: 0.1 + done, "value loss rises"),
    ("policy/approxkl_avg", lambda done: done, "large steps"),
    ("policy/clipfrac_avg", lambda done: done, "clip"),
    ("val/ratio_first", lambda done: 1.02, "ratio"),
    ("val/explained_variance", lambda done: -done, "value"),
])
def test_each_sign_of_ppo(key, function, name):
    found = doctor.signs(changed(key, function))
    assert set(found) == {name}
    sign = found[name]
    assert sign.line
    if sign.at is not None:   # the update of the first row that shows it
        before = changed(key, function)[:sign.at]
        assert name not in (doctor.signs(before) if before else {})
        assert name in doctor.signs(changed(key, function)[:sign.at + 1])


def test_longer_responses_are_a_sign():
    rows = [row | {"objective/length": 10 + 20 * n / 40, "objective/entropy": 4 + 8 * n / 40}
            for n, row in enumerate(healthy())]
    assert set(doctor.signs(rows)) == {"length"}


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_metric_that_stops_being_a_number_is_a_sign(value):
    rows = healthy()
    rows[7]["loss/value_avg"] = value
    found = doctor.signs(rows)
    assert set(found) == {"not finite"}
    assert found["not finite"].at == 7


def test_a_metric_that_is_missing_is_no_sign():
    keys = set(healthy()[0]) - {"update", "objective/scores"}
    for key in keys:
        rows = [{k: v for k, v in row.items() if k != key} for row in healthy()]
        assert doctor.signs(rows) == {}, key


def dpo(**changes):
    """A healthy log of DPO, with some metrics replaced by functions of the step."""
    rows = []
    for step in range(20):
        row = {"step": step, "loss": math.log(2) - 0.01 * step, "rewards/margins": 0.05 * step,
               "rewards/accuracies": 0.5 + 0.01 * step, "drift/chosen": -0.05 * step}
        rows.append(row | {key.replace("_", "/"): f(step) for key, f in changes.items()})
    return rows


@pytest.mark.parametrize(("changes", "names"), [
    ({}, set()),
    ({"loss": lambda step: 3.0 - 0.01 * step}, {"dpo start"}),
    ({"rewards_margins": lambda step: 0.3 + 0.05 * step}, {"dpo start"}),
    ({"rewards_accuracies": lambda step: 0.5 - 0.02 * step}, {"dpo accuracy"}),
    ({"drift_chosen": lambda step: -3.0 * step}, {"dpo drift"}),
    ({"loss": lambda step: math.log(2) + 0.01 * step}, {"loss rises"}),
])
def test_each_sign_of_dpo(changes, names):
    assert set(doctor.signs(dpo(**changes))) == names


def test_a_negative_loss_is_a_sign():
    rows = [{"step": step, "loss": 0.5 - 0.1 * step} for step in range(10)]
    found = doctor.signs(rows)
    assert found["loss below 0"].at == 6


# The atlas


def test_bugs_with_the_same_signs_are_named(tmp_path):
    def bug(name, *runs):
        return {"bug": name, "stage": "ppo", "runs": [{"signs": list(s)} for s in runs]}

    atlas = write_jsonl(tmp_path / "atlas.jsonl", {"stage": "ppo", "metrics": []},
                        bug("both", {"kl", "clip"}, {"kl", "clip"}, {"kl", "clip", "value"}),
                        bug("one", {"kl"}, {"kl"}, set()),
                        bug("rarely", {"kl"}, set(), set()),
                        bug("none", set(), set(), set()),
                        bug("other", {"value"}, {"value"}, {"value"}))
    assert doctor.similar_bugs({"kl", "clip"}, atlas) == [("both", 1.0), ("one", 0.5)]
    assert doctor.similar_bugs({"length"}, atlas) == []
    assert doctor.similar_bugs({"kl"}, tmp_path / "none.jsonl") == []


# The script


def test_what_is_printed(tmp_path, capsys):
    path = write_jsonl(tmp_path / "x.jsonl", *healthy())
    doctor.main(doctor.Config(logs=(str(path),)))
    assert capsys.readouterr().out == f"{path}: healthy; 40 rows without a sign of trouble\n"
    write_jsonl(path, *changed("policy/clipfrac_avg", lambda done: 0.2 + done))
    doctor.main(doctor.Config(logs=(str(path),)))
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: signs of trouble in 40 rows\n  clip (from 4): ")


def test_a_log_that_is_still_written_is_read(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", *healthy(), '{"update": 40, "objec')
    assert len(doctor.read_log(path)) == 40


@pytest.mark.parametrize(("content", "words"), [
    (b'{"a": 1}\n{"b"\n{"c": 2}\n', "x.jsonl:2: not a line of JSON"),
    (b"[1, 2]", "expected JSON objects"),
    (b'{"step": 1, "accuracy_of_mine": 2}\n', "x.jsonl: no metric of this log is known"),
    (b"", "x.jsonl: no metric of this log is known"),
    (b"\xff\xfe\x00", "not text"),
    (json.dumps({"log_history": [1]}).encode(), "expected JSON objects"),
])
def test_a_file_that_is_no_log_is_one_line(tmp_path, content, words):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        doctor.main(doctor.Config(logs=(str(path),)))


def test_a_missing_name_says_what_to_type():
    with pytest.raises(UserError, match="python lab/doctor.py out/ppo.jsonl"):
        doctor.main(doctor.Config())
