"""lab/candidates.py: what is measured, on which rankings, and the verdict on these numbers."""
import pytest

import sft
from data import labelers, village
from data.formats import load_comparisons
from lab import candidates
from lab_run import Started, make_run, start
from scaffold.cli import UserError
from tiny import read_jsonl


def test_diversity_by_hand():
    """ROUGE-L of 'a b' and 'a c' is 1/2, of equal strings 1, of 'a b' and 'd' 0."""
    records = [{"responses": ["a b", "a c", "a b"]}, {"responses": ["a b", "d"]}]
    got = candidates.diversity(records)
    assert got["distinct"] == pytest.approx((2 / 3 + 1) / 2)
    assert got["rouge_l"] == pytest.approx(((0.5 + 0.5 + 1) / 3 + 0) / 2)


def verdict(tied=(.01, .01), accuracy=(.75, .72), gold=(.6, .7)):
    """Return the verdict on two seeds with these numbers of beam search; samples: .05, .7, .5."""
    rows = []
    for seed in range(2):
        rows.append({"run": "sample", "seed": seed, "tied": .05, "accuracy": .7, "ppo_gold": .5})
        rows.append({"run": "beam", "seed": seed, "tied": tied[seed], "accuracy": accuracy[seed],
                     "ppo_gold": gold[seed]})
    return candidates.verdict(rows)


def test_the_verdict_holds_when_all_parts_do():
    text = verdict()
    assert "claim holds here" in text
    assert "tied prompts by -4.0 points" in text
    assert "accuracy on samples by +3.5 points (worst seed +2.0)" in text
    assert "gold by +0.15 (worst seed +0.10)" in text


@pytest.mark.parametrize("numbers", [
    {"tied": (.01, .06)},
    {"accuracy": (.8, .69)},
    {"gold": (.4, .9)},
])
def test_the_verdict_holds_in_part_when_one_seed_fails(numbers):
    assert "holds in part" in verdict(**numbers)


def test_the_verdict_does_not_hold_when_all_parts_fail():
    assert "does not hold" in verdict(tied=(.06, .06), accuracy=(.6, .6), gold=(.4, .4))


def test_it_runs_and_logs(tmp_path, capsys, monkeypatch):
    """Both reward models are tested on the same rankings, of samples."""
    out = make_run(tmp_path)
    read = []   # per reward model: its training and its validation records

    def measure(out, folder, train, val, seed, cfg, **settings):
        row = measure_rlhf(out, folder, train, val, seed, cfg, **settings)
        read.append([load_comparisons(f"{folder}/{name}.jsonl") for name in ("train", "val")])
        return row

    measure_rlhf = candidates.measure_rlhf
    monkeypatch.setattr(candidates, "measure_rlhf", measure)
    before = sorted(out.rglob("*"))
    candidates.main(candidates.Config(out=str(out), updates=4, n=6, seeds=1, device="cpu"))
    assert set(out.rglob("*")) - set(before) == {out / "lab-candidates.jsonl"}
    rows = read_jsonl(out / "lab-candidates.jsonl")
    assert [(r["run"], r["seed"]) for r in rows] == [("sample", 0), ("beam", 0)]
    (sampled, val), (beams, same_val) = read
    assert val == same_val
    assert all(len(set(r["responses"])) == len(r["responses"]) for r in beams)
    assert rows[1]["distinct"] == 1
    assert rows[0]["tied"] == pytest.approx(1 - len(sampled) / 20)
    assert "the claim" in capsys.readouterr().out


def test_ppo_gold_is_the_mean_grade_of_the_policy_on_new_prompts(tmp_path, monkeypatch):
    out = make_run(tmp_path / "run")
    folder = tmp_path / "made"
    folder.mkdir()
    responses = []
    sample_responses = sft.sample_responses

    def spy(*args, **kwargs):
        responses[:] = sample_responses(*args, **kwargs)
        return responses

    monkeypatch.setattr(sft, "sample_responses", spy)
    prompts = read_jsonl(out / "data" / "rank_train.jsonl")
    model, enc, _ = candidates.gpt.load_model(out / "sft.pt")
    ranked = labelers.rank(model, enc, prompts)
    cfg = candidates.Config(updates=4, n=7, device="cpu")
    row = candidates.measure_rlhf(out, folder, ranked, ranked, 0, cfg)
    tests = read_jsonl(out / "data" / "prompts_test.jsonl")[:7]
    grades = [village.gold(r["task"], text) for r, text in zip(tests, responses)]
    assert len(responses) == 7
    assert row["ppo_gold"] == pytest.approx(sum(grades) / 7)
    _, held_out = [r for r in read_jsonl(folder / "reward.jsonl") if "split" in r]
    assert row["accuracy"] == held_out["accuracy"]
    assert held_out["prompts"] == len(ranked)


def test_too_few_updates_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match="--updates 3"):
        candidates.main(candidates.Config(out=str(tmp_path), updates=3))


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "main", start)
    with pytest.raises(Started) as started:
        candidates.main(candidates.Config(out=str(tmp_path / "new"), seed=3, device="cpu"))
    stage = started.value.args[0]
    assert (stage.out, stage.seed, stage.device) == (str(tmp_path / "new"), 3, "cpu")
    assert "sft.pt is missing" in capsys.readouterr().out
