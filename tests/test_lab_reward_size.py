"""lab/reward_size.py: which models it compares, and a verdict that follows the numbers."""
import pytest
import torch

import gpt
import reward
import sft
from data import probes
from lab import reward_size
from lab_run import Started, make_run, start
from scaffold.cli import UserError
from tiny import ENC, read_jsonl, tiny_reward, user


def test_measure_probes_counts_the_pairs_whose_better_response_scores_higher():
    model = tiny_reward(0)
    pairs = []
    for i in range(40):
        kind = probes.KINDS[i % 3]
        pairs.append({"kind": kind, "prompt": [user(f"Hi {i}")], "chosen": f"a {i}",
                      "rejected": f"{i} b"})
    rates = reward_size.measure_probes(model, ENC, pairs)
    assert list(rates) == list(probes.KINDS)
    for kind in probes.KINDS[:3]:
        right = []
        for pair in pairs:
            if pair["kind"] == kind:
                chat = [pair["prompt"]]
                [better] = reward.score_responses(model, ENC, chat, [pair["chosen"]])
                [worse] = reward.score_responses(model, ENC, chat, [pair["rejected"]])
                right.append(better > worse)
        assert rates[kind] == pytest.approx(sum(right) / len(right))
    assert rates[probes.KINDS[5]] is None


def verdict(accuracy, gold):
    """Return the verdict on two seeds. The reward model of equal size has .7, .5 and .6."""
    rows = []
    for seed in range(2):
        rows.append({"run": "equal", "seed": seed, "accuracy": .7, "ppo_gold": .5,
                     "right_vs_wrong": .6})
        rows.append({"run": "half", "seed": seed, "accuracy": accuracy[seed],
                     "ppo_gold": gold[seed], "right_vs_wrong": .55})
        rows.append({"run": "double", "seed": seed, "accuracy": .1, "ppo_gold": .1,
                     "right_vs_wrong": .1})
    return reward_size.verdict(rows)


def test_the_verdict_holds_when_the_smaller_one_loses_little():
    text = verdict([.7, .68], [.45, .53])
    assert "claim holds" in text
    assert "accuracy by -1.0 points" in text
    assert "wrong by -5.0 points" in text
    assert "gold by -0.01" in text


@pytest.mark.parametrize("accuracy, gold", [([.7, .6], [.5, .5]), ([.7, .7], [.5, .4])])
def test_the_verdict_does_not_hold_when_it_loses_accuracy_or_gold(accuracy, gold):
    assert "does not hold" in verdict(accuracy, gold)


def test_it_runs_and_logs(tmp_path, capsys):
    out = make_run(tmp_path)
    cfg = reward_size.Config(out=str(out), double=True, steps=2, updates=4, n=6, seeds=1,
                             device="cpu")
    reward_size.main(cfg)
    rows = read_jsonl(out / "lab-reward_size.jsonl")
    assert [(r["run"], r["width"]) for r in rows] == [("half", 8), ("equal", 16), ("double", 32)]
    policy, _, _ = gpt.load_model(out / "sft.pt")
    for width in (8, 32):
        model, _, _ = gpt.load_model(out / f"width-{width}" / "sft.pt")
        assert vars(model.config) == vars(policy.config) | {"n_embd": width}
    assert not (out / "width-16").exists()
    shown = capsys.readouterr().out
    assert "right vs wrong" in shown
    assert "the claim" in shown


def test_models_of_another_width_are_trained_once(tmp_path):
    out = make_run(tmp_path)
    policy, _, _ = gpt.load_model(out / "sft.pt")
    cfg = reward_size.Config(steps=2, device="cpu")
    path = reward_size.tuned_model(out, 8, policy.config, cfg)
    written = path.stat().st_mtime_ns
    assert reward_size.tuned_model(out, 8, policy.config, cfg) == path
    assert path.stat().st_mtime_ns == written
    assert reward_size.tuned_model(out, 16, policy.config, cfg) == out / "sft.pt"


def test_a_width_that_the_heads_do_not_divide_is_a_user_error(tmp_path):
    out = make_run(tmp_path)
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 128, n_layer=1, n_head=4, n_embd=12))
    gpt.save_model(out / "sft.pt", model, ENC, "")
    with pytest.raises(UserError, match="half of its width of 12"):
        reward_size.main(reward_size.Config(out=str(out), device="cpu"))


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "main", start)
    with pytest.raises(Started) as started:
        reward_size.main(reward_size.Config(out=str(tmp_path / "new"), seed=3, device="cpu"))
    stage = started.value.args[0]
    assert (stage.out, stage.seed, stage.device) == (str(tmp_path / "new"), 3, "cpu")
    assert "sft.pt is missing" in capsys.readouterr().out
