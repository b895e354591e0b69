"""lab/grpo.py: the advantage and the KL in closed form, PPO as in ppo.py, and the verdict."""
import itertools
import math

import pytest
import torch

import gpt
import ppo
import reward
from lab import grpo
from lab_run import Started, make_reward_run, start
from scaffold.cli import UserError
from tiny import Recorder, assert_close, read_jsonl, same_weights


@pytest.fixture
def s(tmp_path):
    """The Setup of a tiny run, with small rollouts."""
    make_reward_run(tmp_path)
    s = grpo.load(grpo.Config(out=str(tmp_path), device="cpu"))
    s.ppo.rollout_size = 8
    s.ppo.max_new_tokens = 8
    return s


# The advantage


def random_scores(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_group_advantages_of_a_worked_example():
    scores = torch.tensor([1.0, 2.0, 3.0, 7.0, 7.0, 4.0])
    root = math.sqrt(1.5)   # 1 / std of 1, 2, 3
    half = math.sqrt(0.5)   # 7, 7, 4 are 1, 1, -2 around their mean, with a std of sqrt(2)
    expected = torch.tensor([-root, 0, root, half, half, -2 * half])
    assert_close(grpo.group_advantages(scores, 3), expected, 1e-6)
    assert_close(grpo.group_advantages(scores, 3, std=False),
                 torch.tensor([-1.0, 0, 1, 1, 1, -2]), 1e-6)


@pytest.mark.parametrize("group", [2, 4, 8])
def test_each_group_has_mean_0_and_std_1(group):
    advantages = grpo.group_advantages(random_scores(16), group).view(-1, group)
    assert_close(advantages.mean(1), torch.zeros(16 // group, dtype=torch.float64))
    assert_close(advantages.square().mean(1), torch.ones(16 // group, dtype=torch.float64))


def test_the_shift_and_scale_of_a_group_do_not_matter():
    scores = random_scores(12)
    shift = torch.tensor([5.0, -2.0, 0.3]).repeat_interleave(4)
    scale = torch.tensor([0.1, 1.0, 30.0]).repeat_interleave(4)
    expected = grpo.group_advantages(scores, 4)
    assert_close(grpo.group_advantages(scale * scores + shift, 4), expected)
    centred = grpo.group_advantages(scores, 4, std=False)
    assert_close(grpo.group_advantages(scale * scores + shift, 4, std=False), scale * centred)


@pytest.mark.parametrize("score", [0.0, 0.1, -3.0, 1 / 3, 7.7])
@pytest.mark.parametrize("group", [2, 3, 7, 8])
@pytest.mark.parametrize("std", [True, False])
def test_equal_scores_have_no_advantage(score, group, std):
    scores = torch.full((2 * group,), score)
    scores[group:] = torch.arange(group)   # another group is not concerned
    advantages = grpo.group_advantages(scores, group, std)
    assert advantages.isfinite().all()
    assert advantages[:group].abs().max() < 1e-3
    assert advantages[group:].abs().max() > 0.4


def test_without_std_the_expected_step_is_the_policy_gradient():
    """Each score is a part of its group's mean, so the step shrinks by 1 - 1/G."""
    G = 3
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    score = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    exact, = torch.autograd.grad(logits.softmax(0) @ score, logits)
    expected = torch.zeros_like(logits)
    for actions in itertools.product(range(3), repeat=G):
        actions = torch.tensor(actions)
        logprobs = logits.log_softmax(0)[actions]
        advantages = grpo.group_advantages(score[actions], G, std=False)
        step, = torch.autograd.grad(advantages @ logprobs / G, logits)
        expected += logprobs.sum().exp().detach() * step
    assert_close(expected, (1 - 1 / G) * exact)


# The KL


def two_policies():
    """Return the logits of a policy and the log-probs of its reference, over five tokens."""
    rng = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 5, generator=rng, dtype=torch.float64)
    return logits.requires_grad_(), other.log_softmax(0)


def kl(p, q):
    """KL(p || q) of log-probs (V,)."""
    return (p.exp() * (p - q)).sum()


def expected_gradient(logits, estimate):
    """Return the mean gradient of estimate(logprob, token) of tokens sampled from the policy."""
    total = torch.zeros_like(logits)
    for token in range(len(logits)):
        logprob = logits.log_softmax(0)[token]
        gradient, = torch.autograd.grad(estimate(logprob, token), logits)
        total += logprob.exp().detach() * gradient
    return total


def k3_of(logprob, ref_logprob):
    return grpo.k3(logprob.view(1, 1), ref_logprob.view(1, 1), torch.ones(1, 1))


def test_the_mean_of_k3_is_the_kl():
    logits, ref = two_policies()
    policy = logits.log_softmax(0)
    mean = sum(policy[i].exp() * k3_of(policy[i], ref[i]) for i in range(5))
    assert_close(mean, kl(policy, ref))


def test_in_a_loss_k3_has_the_gradient_of_the_reversed_kl_and_k1_has_none():
    logits, ref = two_policies()
    gradient = expected_gradient(logits, lambda logprob, token: k3_of(logprob, ref[token]))
    exact, = torch.autograd.grad(kl(ref, logits.log_softmax(0)), logits)
    assert_close(gradient, exact)
    k1 = expected_gradient(logits, lambda logprob, token: logprob - ref[token])
    assert_close(k1, torch.zeros_like(k1))


def test_in_a_reward_k1_has_the_gradient_of_the_kl():
    logits, ref = two_policies()

    def loss(logprob, token):
        return (logprob - ref[token]).detach() * logprob

    exact, = torch.autograd.grad(kl(logits.log_softmax(0), ref), logits)
    assert_close(expected_gradient(logits, loss), exact)


def test_k3_by_brute_force():
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-0.5, math.nan, math.nan]])
    ref = torch.tensor([[-1.5, -2.0, 0.0], [-3.0, -math.inf, 0.0]])
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    each = [math.exp(-d) - 1 + d for d in (0.5, 0.0, 2.5)]
    assert min(each) == each[1] == 0
    assert grpo.k3(logprobs, ref, mask).item() == pytest.approx(sum(each) / 3)


# The updates


def test_ppo_updates_are_those_of_ppo(s):
    n = s.ppo.value_warmup + 2
    learner = grpo.new_learner(s, 3, critic=True)
    grpo.train("ppo", range(n), grpo.ppo_update, n, s, learner)
    ppo.main(ppo.Config(out=str(s.out), seed=3, device="cpu", updates=n, rollout_size=8,
                        max_new_tokens=8, table=False))
    assert same_weights(learner.policy, gpt.load_model(s.out / "ppo.pt")[0])
    assert not same_weights(learner.policy, s.reference)


@pytest.mark.parametrize("std", [True, False])
def test_grpo_learns_to_end_responses(s, monkeypatch, std):
    """A response without an end scores -3, any other 0."""
    s.ppo.rollout_size = 32
    s.ppo.lr = 3e-3
    monkeypatch.setattr(s.reward_model, "score", lambda ids, lengths: torch.zeros(len(ids)))
    rollouts = Recorder(monkeypatch, ppo, "rollout").calls
    cfg = grpo.Config(group=4, std=std, beta=0.01)
    grpo.train("grpo", range(12), grpo.grpo_update, 12, s, grpo.new_learner(s, 0), cfg)
    ended = [b.ended.float().mean().item() for _, b in rollouts]
    assert 0.2 < ended[0] < 0.8
    assert min(ended[-2:]) > ended[0] + 0.15


def test_beta_holds_the_policy_back(s, monkeypatch):
    s.ppo.rollout_size = 32
    s.ppo.lr = 3e-3
    monkeypatch.setattr(s.reward_model, "score", lambda ids, lengths: torch.zeros(len(ids)))
    rollouts = Recorder(monkeypatch, ppo, "rollout").calls
    drift = []
    for beta in (0.0, 10.0):
        learner = grpo.new_learner(s, 0)
        grpo.train("grpo", range(8), grpo.grpo_update, 8, s, learner, grpo.Config(beta=beta))
        last = rollouts[-1][1]
        drift.append(grpo.k3(last.logprobs, last.ref_logprobs, last.mask).item())
    assert drift[1] < 0.5 * drift[0]


def test_a_group_shares_its_prompt_and_one_advantage(s, monkeypatch):
    rollouts = Recorder(monkeypatch, ppo, "rollout").calls
    losses = Recorder(monkeypatch, ppo, "policy_loss").calls
    text_losses = Recorder(monkeypatch, ppo, "ptx_loss").calls
    grpo.grpo_update(0, 4, s, grpo.new_learner(s, 0), grpo.Config(group=4))
    (arguments, b), = rollouts
    prompts = arguments[5]
    assert len(prompts) == s.ppo.rollout_size == 8
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3] != prompts[4]
    assert prompts[4] == prompts[5] == prompts[6] == prompts[7]
    assert len(losses) == len(text_losses) == s.ppo.epochs * s.ppo.minibatches
    expected = grpo.group_advantages(b.scores, 4).unique()
    for (_, _, advantages, mask, _), _ in losses:
        assert (advantages[mask == 0] == 0).all()
        per_row = advantages.sum(1) / mask.sum(1)
        assert_close(advantages, per_row[:, None] * mask, 1e-5)
        assert (per_row[:, None] - expected).abs().amin(1).max() < 1e-5


def test_learning_rate_0_changes_nothing(s):
    s.ppo.lr = 0.0
    learner = grpo.new_learner(s, 0)
    grpo.grpo_update(0, 4, s, learner, grpo.Config())
    assert same_weights(learner.policy, s.reference)


# The comparison


def test_a_copy_of_sft_is_measured_as_sft(s):
    rows = grpo.evaluate_policies(s, {"copy": s.reference}, seed=0)
    assert {"sft", "sft-greedy", "copy"} <= set(rows)
    assert rows["copy"]["kl_to_sft"] == 0
    for key, _ in grpo.COLUMNS.values():
        assert rows["copy"].get(key) == rows["sft"].get(key)


def test_cells_leave_out_what_is_unknown():
    rows = [{"gold": .2, "made_up": None}, {"gold": .4}]
    columns = {"gold": ("gold", 2), "made up": ("made_up", 2)}
    assert grpo.cells(rows, columns) == {"gold": "0.30 (0.20..0.40)", "made up": "-"}


def verdict(equal_samples, seconds=20, equal_time=.7):
    """Return the verdict on two seeds where PPO has a gold of .6 and takes 40 seconds."""
    runs = {"sft": (.1, None), "ppo": (.6, 40), "grpo": (equal_samples, seconds),
            "grpo-longer": (equal_time, 40)}
    return grpo.verdict([{"run": name, "seed": seed, "gold": gold, "cpu_seconds": cpu}
                         for name, (gold, cpu) in runs.items() for seed in range(2)])


def test_the_verdict_holds():
    text = verdict(.58)
    assert "claim holds" in text
    assert "changes gold by -0.02" in text
    assert "0.50 times" in text
    assert "in as many CPU seconds, by +0.10" in text


@pytest.mark.parametrize("numbers", [
    pytest.param(dict(equal_samples=.5), id="worse"),
    pytest.param(dict(equal_samples=.6, seconds=41), id="slower"),
])
def test_the_verdict_does_not_hold(numbers):
    assert "does not hold" in verdict(**numbers)


def test_it_runs_and_logs(s, capsys, monkeypatch):
    monkeypatch.setattr(grpo, "load", lambda cfg: s)
    grpo.main(grpo.Config(out=str(s.out), group=4, updates=4, seeds=1, seed=2, device="cpu"))
    rows = {r["run"]: r for r in read_jsonl(s.out / "lab-grpo.jsonl")}
    assert list(rows) == list(grpo.TITLES)
    assert {r["seed"] for r in rows.values()} == {2}
    assert rows["ppo"]["updates"] == rows["grpo"]["updates"] == 4
    expected = 4 * rows["ppo"]["cpu_seconds"] / rows["grpo"]["cpu_seconds"]
    assert rows["grpo-longer"]["updates"] == max(1, round(expected))
    assert rows["sft"]["updates"] is None
    assert "the claim" in capsys.readouterr().out


@pytest.mark.parametrize("flag, settings", [
    ("--group 7", dict(group=7)),
    ("--group 1", dict(group=1)),
    ("--updates 3", dict(updates=3)),
    ("--beta -1", dict(beta=-1.0)),
])
def test_settings_that_cannot_work_are_user_errors(tmp_path, flag, settings):
    with pytest.raises(UserError, match=flag):
        grpo.main(grpo.Config(out=str(tmp_path), **settings))


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reward, "main", start)
    with pytest.raises(Started) as started:
        grpo.main(grpo.Config(out=str(tmp_path / "new"), seed=3, device="cpu"))
    stage = started.value.args[0]
    assert (stage.out, stage.seed, stage.device) == (str(tmp_path / "new"), 3, "cpu")
    assert "reward.pt is missing" in capsys.readouterr().out
