"""What PPO must satisfy. References are slow plain Python, one token or one row at a time.

Two small settings measure the whole. A tree of 15 responses can be summed over: there the optimum
of reward minus beta * KL is a formula, and PPO must find it. And a tiny random GPT, which ends
about half of its responses, goes through `main` itself.
"""
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import gae
import gpt
import ppo
import reward
import sft
from data.checkpoint import tokenizer_entries
from data.tokenizer import get_tokenizer
from scaffold import health
from scaffold import run as training
from scaffold.cli import UserError
from scaffold.run import load_checkpoint, save_checkpoint
from tiny import (
    END,
    ENC,
    ROOT,
    Recorder,
    read_jsonl,
    same_weights,
    save_reward,
    tiny_gpt,
    tiny_reward,
    tree_policy,
    tree_responses,
    tree_score,
    user,
    write_jsonl,
    write_tokenizer,
)

pytestmark = pytest.mark.usefixtures("seeded")

PROMPTS = [
    "Hi",
    "What does the cow say?",
    "Name two animals.",
    "Who bakes the bread, and who sells it on the market?",
    "Is it late?",
    "苹果",
    "Tell me about the mill.",
    "Why?",
    "Count to three, please.",
    "Where is Ada?",
    "And Tom?",
]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder as the earlier stages leave it: untrained models, prompts and a text file."""
    folder = tmp_path_factory.mktemp("chain")
    gpt.save_model(folder / "sft.pt", tiny_gpt(1), ENC, "")
    save_reward(folder / "reward.pt", tiny_reward(2))
    write_jsonl(folder / "prompts.jsonl", *({"prompt": p} for p in PROMPTS))
    document = "The miller has a dog. The dog sleeps by the mill, and the miller bakes bread.\n"
    (folder / "text.txt").write_text("<|end|>\n".join([document] * 200))
    return folder


class Trained(NamedTuple):
    rows: list         # of the log
    policy: gpt.GPT
    out: Path


@pytest.fixture
def train(checkpoints, tmp_path):
    """Run ppo.main briefly in a new folder: train(**settings) -> Trained."""
    def run(**settings):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(checkpoints, out)
        small = dict(
            prompts=str(out / "prompts.jsonl"),
            text=str(out / "text.txt"),
            out=str(out),
            updates=2,
            rollout_size=8,
            epochs=2,
            minibatches=2,
            value_warmup=0,
            max_new_tokens=8,
            ptx=0.0,
            table=False,
            gold="",
            device="cpu",
        )
        cfg = ppo.Config(**{**small, **settings})
        ppo.main(cfg)
        policy, _, _ = gpt.load_model(out / f"{cfg.name}.pt")
        return Trained(read_jsonl(out / f"{cfg.name}.jsonl"), policy, out)

    return run


# (first token, one past the last) of the response in each row
RUNS = [
    (0, 9),     # the whole row
    (3, 9),     # up to the edge
    (3, 4),     # one token, in three places
    (8, 9),
    (0, 1),
    (9, 9),     # empty
    (2, 7),     # the usual case
    (5, 8),
]
T = 9


def ragged_mask():
    mask = torch.zeros(len(RUNS), T)
    for row, (start, end) in zip(mask, RUNS):
        row[start:end] = 1
    return mask


def ragged(n, poison=math.nan):
    """Return n random (B, T) fp64 tensors with `poison` outside the mask, and the mask."""
    mask = ragged_mask()
    tensors = []
    for _ in range(n):
        x = torch.randn(mask.shape, dtype=torch.float64)
        tensors.append(torch.where(mask.bool(), x, poison))
    return *tensors, mask


def places(mask):
    """Return (row, column) of every token inside the mask."""
    return mask.nonzero().tolist()


# The reward of a token

@pytest.mark.parametrize("beta", [0.0, 0.05, 2.0])
@pytest.mark.parametrize("kind", [torch.float, torch.long, torch.bool], ids=str)
def test_kl_rewards_by_brute_force(beta, kind):
    """They are 0 outside the mask, even though the log-probabilities are NaN there."""
    logprobs, ref_logprobs, mask = ragged(2)
    scores = torch.randn(len(mask), dtype=torch.float64)
    want = torch.zeros_like(logprobs)
    for i, t in places(mask):
        want[i, t] = -beta * (logprobs[i, t] - ref_logprobs[i, t])
        _, end = RUNS[i]
        if t == end - 1:
            want[i, t] += scores[i]
    got = ppo.kl_rewards(scores, logprobs, ref_logprobs, mask.to(kind), beta)
    torch.testing.assert_close(got, want)


def test_kl_rewards_worked_example():
    """The episode of gae.py: k1 is [.2, -.2, .3], beta .1, and the end token scores 1."""
    logprobs = torch.tensor([[9., 9, -.5, -1.2, -.3, 9]])
    ref_logprobs = torch.tensor([[1., 2, -.7, -1., -.6, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    rewards = ppo.kl_rewards(torch.tensor([1.0]), logprobs, ref_logprobs, mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[0, 0, -.02, .02, .97, 0]]))


def test_the_score_is_paid_once_and_on_the_last_token():
    mask = ragged_mask()
    zeros = torch.zeros_like(mask)
    scores = torch.arange(1., len(RUNS) + 1)
    rewards = ppo.kl_rewards(scores, zeros, zeros, mask, 0.5)
    for score, (start, end), row in zip(scores.tolist(), RUNS, rewards.tolist()):
        paid = {t: r for t, r in enumerate(row) if r}
        assert paid == ({end - 1: score} if end > start else {})


def test_leaving_the_reference_costs_and_returning_pays():
    """A token that the policy likes better than the reference does costs."""
    def reward_of(logprob, ref_logprob):
        logprobs = torch.tensor([[logprob]])
        ref_logprobs = torch.tensor([[ref_logprob]])
        return ppo.kl_rewards(torch.zeros(1), logprobs, ref_logprobs, torch.ones(1, 1), 0.5).item()

    assert reward_of(-1.0, -3.0) == -1.0
    assert reward_of(-3.0, -1.0) == 1.0


# The tree of responses in tiny.py

BETA = 0.5


def sample_responses(logits, n, rng):
    """Sample n responses of a policy on the tree -> states, actions, mask, (n, 3) each."""
    state = torch.zeros(n, dtype=torch.long)
    alive = torch.ones(n, dtype=torch.bool)
    steps = []
    for _ in range(3):
        action = torch.multinomial(logits[state].softmax(-1), 1, generator=rng)[:, 0] * alive
        steps.append((state, action, alive.float()))
        alive = alive & (action > 0)
        state = (2 * state + action).clamp(max=6) * alive
    return [torch.stack(x, 1) for x in zip(*steps)]


def tree_logprobs(logits, states, actions):
    """Return the log-probability of each action, (N, 3)."""
    return logits.log_softmax(-1)[states, actions]


def response_logprobs(logits):
    """Return the log-probability of each of the 15 responses."""
    states, actions, mask = tree_responses()
    return (tree_logprobs(logits, states, actions) * mask).sum(1)


def test_the_tree():
    states, actions, mask = tree_responses()
    words = []
    for row, n in zip(actions.tolist(), mask.sum(1).int().tolist()):
        words.append("".join("eab"[action] for action in row[:n]))
    assert words == "e ae aae aaa aab abe aba abb be bae baa bab bbe bba bbb".split()
    assert tree_score(actions, mask)[:5].tolist() == pytest.approx([0, 1, 2, 2, 0.7])


def test_samples_of_the_tree_are_as_frequent_as_they_are_probable():
    policy = tree_policy(1)
    probability = response_logprobs(policy).exp()
    assert probability.sum().item() == pytest.approx(1)
    responses = torch.stack(tree_responses())                                         # (3, 15, 3)
    samples = torch.stack(sample_responses(policy, 4000, torch.Generator().manual_seed(0)))
    equal = (samples[:, :, None] == responses[:, None]).all(-1).all(0)                # (4000, 15)
    assert (equal.sum(1) == 1).all()
    assert (equal.double().mean(0) - probability).abs().max() < 0.03


def test_the_mean_penalty_is_the_exact_kl():
    """k1 summed over a response, averaged over all responses. (k2, half its square, is not.)"""
    states, actions, mask = tree_responses()
    policy = tree_policy(1).log_softmax(-1)
    ref = tree_policy(2).log_softmax(-1)
    logprobs = policy[states, actions]
    probability = (logprobs * mask).sum(1).exp()
    rewards = ppo.kl_rewards(torch.zeros(15), logprobs, ref[states, actions], mask, 1.0)
    mean_penalty = -(probability * rewards.sum(1)).sum().item()
    # The definition, by the chain rule: the visits of a state times the KL of its next token.
    kl = (policy.exp() * (policy - ref)).sum(1)                                       # (7,)
    visits = [1.0, *policy[0, 1:].exp().tolist()]
    for state in (1, 2):
        for action in (1, 2):
            visits.append(visits[state] * policy[state, action].exp().item())
    assert mean_penalty == pytest.approx(sum(v * k for v, k in zip(visits, kl.tolist())))


def test_the_policy_gradient_of_the_penalty_is_the_gradient_of_the_kl():
    """This is why the reward uses k1: k3 has the right mean, but the wrong policy gradient."""
    states, actions, mask = tree_responses()
    logits = tree_policy(1).requires_grad_()
    ref = tree_policy(2)
    logprobs = response_logprobs(logits)
    probability = logprobs.exp()
    kl = (probability * (logprobs - response_logprobs(ref))).sum()
    exact = torch.autograd.grad(kl, logits, retain_graph=True)[0]

    def policy_gradient(rewards):
        objective = (probability.detach() * rewards * logprobs).sum()
        return torch.autograd.grad(objective, logits, retain_graph=True)[0]

    with torch.no_grad():
        policy_logprobs = tree_logprobs(logits, states, actions)
        ref_logprobs = tree_logprobs(ref, states, actions)
        rewards = ppo.kl_rewards(torch.zeros(15), policy_logprobs, ref_logprobs, mask, 1.0).sum(1)
        k1 = logprobs - response_logprobs(ref)
        k3 = torch.exp(-k1) - 1 + k1
    torch.testing.assert_close(policy_gradient(rewards), -exact)
    assert (policy_gradient(-k3) + exact).abs().max() > 0.01


def learn_tree(ref, seed=0, kl_rewards=ppo.kl_rewards, gamma=1.0):
    """Run PPO on the tree with the project's functions -> logits, values.

    150 rollouts of 256 responses, 4 epochs each.
    """
    rng = torch.Generator().manual_seed(seed)
    logits = ref.clone().requires_grad_()
    values = torch.zeros(7, dtype=ref.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values])
    for update in range(150):
        with torch.no_grad():
            states, actions, mask = sample_responses(logits, 256, rng)
            scores = tree_score(actions, mask)
            old_logprobs = tree_logprobs(logits, states, actions)
            ref_logprobs = tree_logprobs(ref, states, actions)
            old_values = values[states]
            rewards = kl_rewards(scores, old_logprobs, ref_logprobs, mask, BETA)
            advantages, returns = gae.gae(rewards, old_values, mask, gamma, 0.95)
            advantages = gae.whiten(advantages, mask)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - update / 150)
        for _ in range(4):
            logprobs = tree_logprobs(logits, states, actions)
            pg_loss, _ = ppo.policy_loss(logprobs, old_logprobs, advantages, mask)
            vf_loss = ppo.value_loss(values[states], old_values, returns, mask)
            optimizer.zero_grad()
            (pg_loss + vf_loss).backward()
            optimizer.step()
    return logits.detach(), values.detach()


def distance_from_the_optimum(ref, logits, values):
    """Return the total variation to the best policy, and the error of the first state's value.

    The best policy is pi_ref * exp(r / beta) / Z, and its value is J* = beta * log Z.
    """
    _, actions, mask = tree_responses()
    p = response_logprobs(ref).exp()
    q = response_logprobs(logits).exp()
    best = p * (tree_score(actions, mask) / BETA).exp()
    variation = 0.5 * (q - best / best.sum()).abs().sum().item()
    return variation, (values[0] - BETA * best.sum().log()).item()


@pytest.mark.parametrize("seed", range(2))
def test_ppo_reaches_the_closed_form_optimum(seed):
    ref = tree_policy(seed)
    variation, error = distance_from_the_optimum(ref, *learn_tree(ref, seed))
    assert variation < 0.01
    assert abs(error) < 0.01


def test_a_uniform_reference_has_the_known_optimum():
    """By hand, J* of the tree is 0.90053 if the reference is uniform."""
    uniform = torch.zeros(7, 3)
    _, error = distance_from_the_optimum(uniform, uniform, torch.zeros(7))
    assert error == pytest.approx(-0.90053, abs=1e-5)


def k2_in_the_reward(scores, logprobs, ref_logprobs, mask, beta):
    k2 = (logprobs - ref_logprobs) ** 2 / 2
    return ppo.kl_rewards(scores, k2, torch.zeros_like(k2), mask, beta)


def k3_in_the_reward(scores, logprobs, ref_logprobs, mask, beta):
    k3 = (ref_logprobs - logprobs).exp() - 1 + logprobs - ref_logprobs
    return ppo.kl_rewards(scores, k3, torch.zeros_like(k3), mask, beta)


def kl_maximised(scores, logprobs, ref_logprobs, mask, beta):
    return ppo.kl_rewards(scores, ref_logprobs, logprobs, mask, beta)


def score_on_every_token(scores, logprobs, ref_logprobs, mask, beta):
    penalty = ppo.kl_rewards(0 * scores, logprobs, ref_logprobs, mask, beta)
    return penalty + scores[:, None] * mask


@pytest.mark.parametrize("bug", [
    pytest.param(dict(kl_rewards=k2_in_the_reward), id="k2 in the reward"),
    pytest.param(dict(kl_rewards=k3_in_the_reward), id="k3 in the reward"),
    pytest.param(dict(kl_rewards=kl_maximised), id="KL maximised"),
    pytest.param(dict(kl_rewards=score_on_every_token), id="score on every token"),
    pytest.param(dict(gamma=0.9), id="gamma 0.9"),
])
def test_the_tree_shows_known_bugs(bug):
    """Published bugs miss the optimum by far more than PPO may, so the tree can tell."""
    ref = tree_policy(0)
    variation, _ = distance_from_the_optimum(ref, *learn_tree(ref, **bug))
    assert variation > 0.05


# The policy's loss

class Case(NamedTuple):
    advantage: float
    ratio: float
    loss: float        # of the token
    gradient: float    # d loss / d logprob
    clipped: int


CASES = [
    Case(1, 1.0, -1.0, -1.0, 0),
    Case(1, 1.1, -1.1, -1.1, 0),
    Case(1, 1.5, -1.2, 0.0, 1),    # too far in the good direction: no more gain, no gradient
    Case(1, 0.5, -0.5, -0.5, 0),
    Case(-1, 1.0, 1.0, 1.0, 0),
    Case(-1, 0.9, 0.9, 0.9, 0),
    Case(-1, 0.5, 0.8, 0.0, 1),
    Case(-1, 1.5, 1.5, 1.5, 0),    # too far in the bad direction: the full loss
    Case(-2, 9.0, 18.0, 18.0, 0),
]


def test_policy_loss_of_all_cases_in_a_batch():
    columns = torch.tensor(CASES, dtype=torch.float64).T[:, None]    # (5, 1, 9)
    advantages, ratio, losses, gradients, clipped = columns          # (1, 9) each
    logprobs = ratio.log().requires_grad_()
    loss, fraction = ppo.policy_loss(logprobs, 0 * ratio, advantages, torch.ones_like(ratio))
    loss.backward()
    assert loss.item() == pytest.approx(losses.mean().item())
    assert loss.item() == pytest.approx((-3.8 + 22.2) / 9)
    torch.testing.assert_close(logprobs.grad, gradients / len(CASES))
    assert fraction.item() == pytest.approx(clipped.mean().item())
    assert fraction.item() == pytest.approx(2 / 9)
    assert not fraction.requires_grad


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"advantage {c.advantage}, ratio {c.ratio}")
def test_policy_loss_case_by_case(case):
    logprobs = torch.tensor([[case.ratio]], dtype=torch.float64).log()
    advantages = torch.tensor([[case.advantage]], dtype=torch.float64)
    loss, fraction = ppo.policy_loss(logprobs, 0 * logprobs, advantages, torch.ones(1, 1))
    assert loss.item() == pytest.approx(case.loss)
    assert fraction.item() == pytest.approx(case.clipped)


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_policy_loss_by_brute_force(clip):
    logprobs, old, advantages, mask = ragged(3, poison=5.0)
    losses = []
    n_clipped = 0
    for i, t in places(mask):
        ratio = math.exp(logprobs[i, t] - old[i, t])
        gain = ratio * advantages[i, t].item()
        clipped_gain = min(max(ratio, 1 - clip), 1 + clip) * advantages[i, t].item()
        losses.append(-min(gain, clipped_gain))
        n_clipped += clipped_gain < gain
    loss, fraction = ppo.policy_loss(logprobs, old, advantages, mask, clip)
    assert loss.item() == pytest.approx(sum(losses) / len(losses))
    assert fraction.item() == pytest.approx(n_clipped / len(losses))
    assert n_clipped > 3


def test_every_token_weighs_the_same():
    """The mean is over the tokens of the batch: not over responses, and not over padding."""
    zeros = torch.zeros(2, 5)
    mask = torch.tensor([[0, 1, 0, 0, 0], [0, 1, 1, 1, 0]])
    advantages = torch.tensor([[0, 4., 0, 0, 0], [0, 0, 0, 0, 0]])
    assert ppo.policy_loss(zeros, zeros, advantages, mask)[0].item() == -1.0
    assert ppo.value_loss(zeros, zeros, advantages, mask, 9.0).item() == 0.5 * 16 / 4


def test_first_step_is_the_plain_policy_gradient():
    logprobs, advantages, mask = ragged(2, poison=0.0)
    logprobs.requires_grad_()
    loss, fraction = ppo.policy_loss(logprobs, logprobs.detach(), advantages, mask)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages * mask / mask.sum())
    assert fraction.item() == 0
    assert loss.item() == pytest.approx(-(advantages * mask).sum().item() / mask.sum().item())


def losses(x, mask):
    """Return policy loss, clip fraction and value loss of x (3, B, T)."""
    pg_loss, fraction = ppo.policy_loss(x[0], x[1], x[2], mask)
    return torch.stack([pg_loss, fraction, ppo.value_loss(x[0], x[1], x[2], mask)])


@pytest.mark.parametrize("garbage", [1.0, -1e4, 1e9])
def test_garbage_outside_the_mask_changes_no_loss_and_gets_no_gradient(garbage):
    mask = ragged_mask()
    x = torch.stack(ragged(3, poison=0.0)[:3])
    dirty = torch.where(mask.bool(), x, garbage * torch.randn_like(x)).requires_grad_()
    torch.testing.assert_close(losses(dirty, mask), losses(x, mask))
    losses(dirty, mask).sum().backward()
    outside = dirty.grad[:, mask == 0]
    assert torch.equal(outside, torch.zeros_like(outside))


def test_padding_rows_and_columns_change_no_loss():
    def pad(y, fill):
        return F.pad(y, (2, 3, 0, 2), value=fill)

    mask = ragged_mask()
    x = torch.stack(ragged(3, poison=0.0)[:3])
    torch.testing.assert_close(losses(pad(x, 1.5), pad(mask, 0)), losses(x, mask))
    # An empty mask gives 0, not NaN.
    assert torch.equal(losses(x, 0 * mask), torch.zeros(3, dtype=x.dtype))


# The critic's loss

@pytest.mark.parametrize("clip", [0.1, 0.2, 1.0])
def test_value_loss_by_brute_force(clip):
    values, old, returns, mask = ragged(3, poison=3.0)
    losses = []
    for i, t in places(mask):
        v, o, r = values[i, t].item(), old[i, t].item(), returns[i, t].item()
        clipped = min(max(v, o - clip), o + clip)
        losses.append(max((v - r) ** 2, (clipped - r) ** 2) / 2)
    loss = ppo.value_loss(values, old, returns, mask, clip)
    assert loss.item() == pytest.approx(sum(losses) / len(losses))


def test_value_loss_case_by_case():
    """Near the old value: half the square. Far towards the target: clipped, no gradient."""
    #                        near  towards  away  towards
    values = torch.tensor([[0.1, 0.9, -0.5, -0.9]], requires_grad=True)
    old = torch.zeros(1, 4)
    returns = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    loss = ppo.value_loss(values, old, returns, torch.ones(1, 4))
    assert loss.item() == pytest.approx((0.9 ** 2 + 0.8 ** 2 + 1.5 ** 2 + 0.8 ** 2) / 8)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.9, 0, -1.5, 0]]) / 4)


# Mask and controller

def test_response_mask_by_brute_force():
    """It covers the action of the first response token up to that of the end token."""
    prompt_lengths = torch.tensor([1, 3, 3, 7, 2])
    lengths = torch.tensor([2, 8, 4, 8, 2])        # the last response is empty
    mask = ppo.response_mask(prompt_lengths, lengths, 8)
    assert mask.shape == (5, 7)
    for i, (p, n) in enumerate(zip(prompt_lengths.tolist(), lengths.tolist())):
        token = ["prompt"] * p + ["response"] * (n - p) + ["pad"] * (8 - n)
        assert mask[i].tolist() == [float(token[t + 1] == "response") for t in range(7)]


@pytest.mark.parametrize("kl, n, factor", [
    pytest.param(6.0, 100, 1, id="on target"),
    pytest.param(6.6, 100, 1.01, id="10% above, a tenth of the horizon"),
    pytest.param(5.4, 100, 0.99, id="10% below"),
    pytest.param(9.0, 100, 1.02, id="50% above, counted as 20%"),
    pytest.param(600.0, 100, 1.02, id="far above, counted as 20%"),
    pytest.param(0.0, 100, 0.98, id="far below, counted as 20%"),
    pytest.param(-3.0, 100, 0.98, id="negative"),
    pytest.param(9.0, 50, 1.01, id="half as many responses"),
    pytest.param(0.0, 1_000_000, 0.8, id="more responses than the horizon"),  # beta stays positive
])
def test_adapt_beta(kl, n, factor):
    assert ppo.adapt_beta(0.5, kl, 6.0, n, 1000) == pytest.approx(0.5 * factor)


def test_adapt_beta_is_exact_on_target_and_at_its_bounds():
    assert ppo.adapt_beta(0.5, 6.0, 6.0, 100, 1000) == 0.5
    above = [ppo.adapt_beta(0.5, kl, 6.0, 100, 1000) for kl in (9.0, 600.0)]
    assert above[0] == above[1]
    below = [ppo.adapt_beta(0.5, kl, 6.0, 100, 1000) for kl in (0.0, -3.0)]
    assert below[0] == below[1]


# A rollout

CFG = SimpleNamespace(max_new_tokens=8, missing_eos_score=-3.0, grad_accum=1)


class Models(NamedTuple):
    policy: gpt.GPT
    reference: gpt.GPT
    reward_model: reward.RewardModel
    value_model: reward.RewardModel


@pytest.fixture(scope="module")
def models():
    """Four different models, so that no test passes if one is used in another's place."""
    return Models(tiny_gpt(1), tiny_gpt(3), tiny_reward(2), tiny_reward(4))


def prompt_ids():
    return [sft.render_prompt([user(p)], ENC) for p in PROMPTS]


@pytest.mark.parametrize("sampler", ["policy", "reference"])
def test_rollout_equals_a_recomputation_row_by_row_and_token_by_token(models, sampler):
    sampling = models.policy if sampler == "policy" else models.reference
    prompts = prompt_ids() * 2
    b = ppo.rollout(sampling, *models, prompts, END, CFG, seed=5)
    assert b.responses == gpt.generate(sampling, prompts, 8, stop=END, seed=5)
    assert set(b.ended.tolist()) == {True, False}
    assert len({len(response) for response in b.responses}) > 2
    T = b.ids.shape[1]
    for k in ("mask", "logprobs", "old_logprobs", "ref_logprobs", "values"):
        assert getattr(b, k).shape == (len(prompts), T - 1)
        assert not getattr(b, k).requires_grad
    assert not b.scores.requires_grad
    for i, (prompt, response) in enumerate(zip(prompts, b.responses)):
        check_row(b, i, prompt, response, models, sampler)


def check_row(b, i, prompt, response, models, sampler):
    ids = prompt + response
    assert b.ids[i, :len(ids)].tolist() == ids
    assert b.lengths[i] == len(ids)
    assert b.ended[i].item() == (END in response)
    assert b.mask[i].sum() == len(response)
    with torch.no_grad():
        # The action t made ids[t + 1]. It is recomputed from ids[:t + 1] and nothing else.
        for t in range(len(prompt) - 1, len(ids) - 1):
            seen = torch.tensor([ids[:t + 1]])
            logprob = models.policy(seen)[0, -1].log_softmax(-1)[ids[t + 1]]
            ref_logprob = models.reference(seen)[0, -1].log_softmax(-1)[ids[t + 1]]
            old_logprob = logprob if sampler == "policy" else ref_logprob
            value = models.value_model(seen)[0, -1]
            assert b.mask[i, t] == 1
            torch.testing.assert_close(b.logprobs[i, t], logprob, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(b.ref_logprobs[i, t], ref_logprob, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(b.old_logprobs[i, t], old_logprob, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(b.values[i, t], value, rtol=1e-4, atol=1e-5)
        if response[-1] == END:
            score = models.reward_model(torch.tensor([ids]))[0, -1].item()
        else:
            score = -3.0
    assert b.scores[i].item() == pytest.approx(score, abs=1e-5)


def test_a_policy_that_is_its_reference_has_no_kl(models):
    policy = models.policy
    b = ppo.rollout(policy, policy, tiny_gpt(1), *models[2:], prompt_ids(), END, CFG, seed=0)
    assert torch.equal(b.logprobs, b.ref_logprobs)
    rewards = ppo.kl_rewards(b.scores, b.logprobs, b.ref_logprobs, b.mask, 100.0)
    torch.testing.assert_close(rewards.sum(1), b.scores)


def test_padding_of_a_rollout_reaches_no_real_token(models):
    """A row gives the same numbers alone and with the padding that a longer row would need."""
    b = ppo.rollout(models.policy, *models, prompt_ids()[:1], END, CFG, seed=3)
    n = b.lengths[0] - 1
    first = len(prompt_ids()[0]) - 1
    padded = torch.cat([b.ids, torch.full((1, 30), END)], 1)
    logprobs = gpt.token_logprobs(models.policy, padded)
    ref_logprobs = gpt.token_logprobs(models.reference, padded)
    values = models.value_model(padded)
    torch.testing.assert_close(logprobs[0, first:n], b.logprobs[0, first:n])
    torch.testing.assert_close(ref_logprobs[0, first:n], b.ref_logprobs[0, first:n])
    torch.testing.assert_close(values[0, :n], b.values[0, :n])


# The loop

def by_token(rows, mask):
    """Return the masked numbers of many (b, T) tensors, sorted."""
    return torch.cat([x[m > 0] for x, m in zip(rows, mask)]).sort().values


def arguments(calls):
    """Return the first four arguments of several calls, as four tuples."""
    return zip(*(args[:4] for args, _ in calls))


def test_main_feeds_the_losses_with_what_the_equations_say(train, monkeypatch):
    """Each epoch sees every response once. Advantages are whitened over the rollout."""
    rollouts = Recorder(monkeypatch, ppo, "rollout")
    policy_losses = Recorder(monkeypatch, ppo, "policy_loss")
    value_losses = Recorder(monkeypatch, ppo, "value_loss")
    rows, _, _ = train(updates=3, epochs=2, minibatches=3, lr=1e-2, beta=0.3, lam=0.9)
    assert len(rollouts.calls) == 3
    assert len(policy_losses.calls) == 3 * 2 * 3
    assert len(value_losses.calls) == 3 * 2 * 3
    for update, (_, b) in enumerate(rollouts.calls):
        rewards = ppo.kl_rewards(b.scores, b.logprobs, b.ref_logprobs, b.mask, 0.3)
        raw, returns = gae.gae(rewards, b.values, b.mask, 1.0, 0.9)
        inside = raw[b.mask > 0]
        white = (raw - inside.mean()) / inside.std(correction=0)
        for epoch in range(2):
            first = update * 6 + epoch * 3
            calls = slice(first, first + 3)
            _, old, advantages, mask = arguments(policy_losses.calls[calls])
            _, old_values, targets, value_mask = arguments(value_losses.calls[calls])
            for seen, want in (
                (old, b.logprobs),
                (advantages, white),
                (old_values, b.values),
                (targets, returns),
            ):
                want = by_token([want], [b.mask])
                torch.testing.assert_close(by_token(seen, mask), want, rtol=1e-3, atol=1e-4)
            assert all(torch.equal(x, y) for x, y in zip(mask, value_mask))
        # Before the first step the ratio is 1, and nothing is clipped.
        args, (_, fraction) = policy_losses.calls[update * 6]
        logprobs, old, _, mask = args[:4]
        values, old_values = value_losses.calls[update * 6][0][:2]
        assert (logprobs - old)[mask > 0].abs().max() < 1e-5
        assert fraction == 0
        torch.testing.assert_close(values[mask > 0], old_values[mask > 0])
        assert rows[update]["val/ratio_first"] == pytest.approx(1, abs=1e-6)
    # Later steps see a policy that has moved.
    logprobs, old = policy_losses.calls[-1][0][:2]
    assert (logprobs - old).abs().max() > 1e-3


def test_policy_and_value_model_learn_while_reference_and_reward_model_stay(train, monkeypatch):
    rollouts = Recorder(monkeypatch, ppo, "rollout")
    _, saved, out = train(updates=3, epochs=2, minibatches=3, lr=1e-2, beta=0.3, lam=0.9)
    _, policy, reference, reward_model, value_model = rollouts.calls[0][0][:5]
    assert same_weights(reference, gpt.load_model(out / "sft.pt")[0])
    assert not same_weights(policy, reference)
    assert same_weights(reward_model, reward.load_reward(out / "reward.pt")[0])
    assert not same_weights(value_model, reward_model)
    assert same_weights(saved, policy)
    # Dropout would make the first ratio differ from 1.
    assert not any(m.training for m in (policy, reference, reward_model, value_model))


def test_while_the_critic_warms_up_the_policy_waits(train, monkeypatch):
    rollouts = Recorder(monkeypatch, ppo, "rollout")
    rows, policy, out = train(updates=4, value_warmup=2, lr=1e-2)
    kl = [r["objective/kl"] for r in rows]  # of the policy before each update
    assert kl[:3] == pytest.approx([0, 0, 0], abs=1e-5)
    assert abs(kl[3]) > 1e-3
    value_model = rollouts.calls[0][0][4]
    assert not same_weights(value_model, reward.load_reward(out / "reward.pt")[0])
    assert not same_weights(policy, gpt.load_model(out / "sft.pt")[0])


def test_a_warmup_update_steps_the_value_model_alone(train, monkeypatch):
    steps = Recorder(monkeypatch, training, "take_step")
    train(updates=3, value_warmup=2)  # each update has 2 epochs of 2 minibatches
    stepped = [type(args[2]) for args, _ in steps.calls]
    assert stepped.count(gpt.GPT) == 4
    assert stepped.count(reward.RewardModel) == 12
    assert gpt.GPT not in stepped[:8]


def test_gold_is_the_mean_grade_of_the_responses_and_teaches_nothing(
    train, monkeypatch, tmp_path
):
    """A response is graded by its own prompt's task, here a number; only the log changes."""
    def load_grader(spec, records):
        if not spec:
            return None
        return lambda task, response: len(response) + task

    rollouts = Recorder(monkeypatch, ppo, "rollout")
    monkeypatch.setattr(ppo, "load_grader", load_grader)
    records = [dict(prompt=p, task=100 * 2 ** i) for i, p in enumerate(PROMPTS)]
    path = write_jsonl(tmp_path / "tasks.jsonl", *records)
    task_of = {tuple(ids): record["task"] for ids, record in zip(prompt_ids(), records)}
    graded = train(gold="some:grader", prompts=str(path), rollout_size=5)
    assert len(graded.rows) == len(rollouts.calls)
    for row, (args, b) in zip(graded.rows, rollouts.calls):
        grades = []
        for prompt, response in zip(args[5], b.responses):
            text = ENC.decode([i for i in response if i != END])
            grades.append(len(text) + task_of[tuple(prompt)])
        assert row["objective/gold"] == pytest.approx(sum(grades) / 5)
    plain = train(gold="", prompts=str(path), rollout_size=5)
    assert same_weights(graded.policy, plain.policy)
    for row in graded.rows:
        del row["objective/gold"]
    assert plain.rows == graded.rows


def test_learning_rate_0_changes_nothing_in_any_epoch(train):
    rows, policy, out = train(updates=3, epochs=3, lr=0.0)
    assert same_weights(policy, gpt.load_model(out / "sft.pt")[0])
    for row in rows:
        assert row["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert row["val/ratio"] == pytest.approx(1, abs=1e-6)
        assert row["policy/approxkl_avg"] < 1e-10
        assert row["policy/clipfrac_avg"] == 0
        assert row["val/clipfrac_avg"] == 0
        assert row["loss/policy_avg"] == pytest.approx(0, abs=0.5)
        assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"], abs=1e-5)


def test_the_score_rises_and_beta_holds_the_policy_back(train):
    """Without a penalty score and KL rise; a large beta keeps the policy where it was."""
    settings = dict(updates=12, rollout_size=64, lr=2e-3, epochs=2, minibatches=1)
    free = train(beta=0.0, **settings).rows
    held = train(beta=10.0, **settings).rows
    assert free[-1]["objective/scores"] > free[0]["objective/scores"] + 1
    assert free[-1]["objective/kl"] > 1
    assert held[-1]["objective/kl"] < 0.5


def test_same_seed_same_log_and_same_weights(train):
    a, b, c = (train(seed=seed, ptx=0.5) for seed in (7, 7, 8))
    log_a, log_b, log_c = ((run.out / "ppo.jsonl").read_bytes() for run in (a, b, c))
    assert log_a == log_b
    assert log_b != log_c
    assert same_weights(a.policy, b.policy)


def test_offline_responses_all_come_from_the_reference(train, monkeypatch):
    rollouts = Recorder(monkeypatch, ppo, "rollout")
    policy_losses = Recorder(monkeypatch, ppo, "policy_loss")
    rows, _, out = train(updates=3, lr=1e-2, offline=True)
    start, _, _ = gpt.load_model(out / "sft.pt")
    for args, b in rollouts.calls:
        assert same_weights(args[0], start)
        assert torch.equal(b.old_logprobs, b.ref_logprobs)
    # The policy moves on and the samples do not, so the ratio grows from update to update.
    assert not torch.equal(b.logprobs, b.old_logprobs)
    drift = [abs(r["val/ratio_first"] - 1) for r in rows]
    assert drift[0] < 1e-6
    assert drift[2] > 1e-4
    _, old, _, mask = arguments(policy_losses.calls[8:10])  # the first epoch of the last update
    want = by_token([b.ref_logprobs], [b.mask])
    torch.testing.assert_close(by_token(old, mask), want, rtol=1e-4, atol=1e-5)


def test_offline_samples_cannot_adapt_beta(train):
    """On the reference's samples the mean log-ratio is minus a KL, so beta would fall for ever."""
    with pytest.raises(UserError, match="--offline with --target-kl"):
        train(offline=True, target_kl=6.0)


@pytest.mark.parametrize("flag, settings", [
    pytest.param("--beta", dict(beta=0.0, target_kl=6.0), id="any factor of a beta of 0 is 0"),
    pytest.param("--value-warmup", dict(value_warmup=2, updates=2), id="a warmup of the whole run"),
    pytest.param("--value-warmup", dict(value_warmup=5, updates=2), id="a warmup longer than that"),
    pytest.param("--minibatches", dict(minibatches=9), id="8 responses in 9 minibatches"),
])
def test_settings_that_would_do_nothing_are_refused(train, flag, settings):
    with pytest.raises(UserError, match=flag) as e:
        train(**settings)
    assert "\n" not in str(e.value)


def test_minibatches_are_as_many_as_asked_and_of_like_size(train, monkeypatch):
    """8 responses in 5 parts are 2, 2, 2, 1, 1; torch.chunk would make four of 2."""
    batches = Recorder(monkeypatch, ppo, "losses")
    train(updates=1, epochs=1, minibatches=5)
    rows = [args[5].tolist() for args, _ in batches.calls]
    assert [len(r) for r in rows] == [2, 2, 2, 1, 1]
    assert sorted(i for r in rows for i in r) == list(range(8))


@pytest.mark.parametrize("stop_kl, n_steps", [
    pytest.param(1e-9, 1, id="small"),  # the first step moves the policy, and no second is taken
    pytest.param(1e9, 12, id="large"),
    pytest.param(0.0, 12, id="off"),
])
def test_stop_kl_takes_no_step_once_the_policy_has_moved(train, monkeypatch, stop_kl, n_steps):
    steps = Recorder(monkeypatch, training, "take_step")
    train(updates=1, epochs=6, minibatches=2, lr=1e-2, stop_kl=stop_kl)
    stepped = [type(args[2]) for args, _ in steps.calls]
    assert stepped.count(gpt.GPT) == n_steps
    assert stepped.count(reward.RewardModel) <= 12


@pytest.mark.parametrize("warmup", [0, 2])
def test_too_little_kl_lowers_beta_and_the_next_update_uses_it(train, monkeypatch, warmup):
    """Up to the first update that trains the policy, its KL is 0 and says nothing."""
    paid = Recorder(monkeypatch, ppo, "kl_rewards")
    settings = dict(updates=warmup + 4, value_warmup=warmup, lr=1e-5, beta=0.5, target_kl=6.0)
    rows, _, _ = train(**settings)
    betas = [r["objective/beta"] for r in rows]
    assert betas[:warmup + 2] == [0.5] * (warmup + 2)
    kl = rows[warmup + 1]["objective/kl"]
    assert betas[warmup + 2] == pytest.approx(ppo.adapt_beta(0.5, kl, 6.0, 8))
    assert betas[-1] < betas[-2]
    assert betas[-2] < 0.5
    assert [args[4] for args, _ in paid.calls] == betas


def test_too_much_kl_raises_beta(train):
    rows, _, _ = train(updates=3, lr=3e-2, epochs=4, beta=0.5, target_kl=1e-3)
    assert rows[1]["objective/kl"] > 1e-3
    assert rows[2]["objective/beta"] > rows[1]["objective/beta"]


def test_without_a_target_beta_stays(train):
    rows, _, _ = train(updates=2, lr=1e-2, beta=0.5)
    assert [r["objective/beta"] for r in rows] == [0.5, 0.5]


def test_ptx_keeps_the_policy_a_language_model(train):
    """The loss on the text falls with the ptx term and hardly changes without it."""
    def text_loss(name, out):
        model, _, _ = gpt.load_model(out / f"{name}.pt")
        ids = ENC.encode_ordinary((out / "text.txt").read_text()[:200])[:30]
        return -gpt.token_logprobs(model, torch.tensor([ids])).mean().item()

    settings = dict(updates=4, epochs=2, minibatches=2, lr=3e-3)
    with_ptx = train(ptx=2.0, **settings)
    without = train(ptx=0.0, **settings)
    start = text_loss("sft", without.out)
    assert text_loss("ppo", with_ptx.out) < start - 0.3
    assert text_loss("ppo", without.out) > start - 0.1


def test_every_step_of_the_ptx_term_reads_another_text(train, monkeypatch, tmp_path):
    """It goes on through the text and does not begin again in each epoch or update."""
    line = "On day {} the miller sold {} sacks, and the dog slept.\n"
    documents = [line.format(n, 7 * n % 100) for n in range(200)]
    path = tmp_path / "sacks.txt"
    path.write_text("<|end|>\n".join(documents))
    losses = Recorder(monkeypatch, gpt, "lm_loss")
    train(ptx=0.5, text=str(path), updates=3)
    texts = {str(args[1].tolist()) for args, _ in losses.calls}
    assert len(losses.calls) == 3 * 2 * 2
    assert len(texts) == 3 * 2 * 2


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_metrics_by_hand():
    """Two responses, of 2 tokens and of 1. The numbers of 7 and above are outside the mask.

    KL and entropy are sums over a response, then means over responses.
    """
    b = SimpleNamespace(
        logprobs=tensor([[-1, -2, 7], [-3, 7, 7]]),
        ref_logprobs=tensor([[-2, -4, 8], [-2, 9, 9]]),
        values=tensor([[1, 1, 50], [1, 50, 50]]),
        mask=tensor([[1, 1, 0], [1, 0, 0]]),
        scores=tensor([2, -3]),
        ended=torch.tensor([True, False]),
    )
    returns = tensor([[2, 1, 0], [3, 0, 0]])
    stats = [
        dict(pg=1.0, vf=2.0, clipfrac=0.0, ratio=1.0, approxkl=0.0, norm=3.0, vclip=0.0),
        dict(pg=2.0, vf=4.0, clipfrac=0.5, ratio=1.5, approxkl=0.2, norm=5.0, vclip=0.5),
    ]
    row = health.ppo_metrics(b, returns, stats, 0.1, 1e-3, 4)
    want = {
        "objective/kl": 1.0,
        "objective/scores": -0.5,
        "objective/non_score_reward": -0.1,
        "objective/rlhf_reward": -0.6,
        "objective/entropy": 3.0,
        "objective/length": 1.5,
        "objective/beta": 0.1,
        "episode": 10,
        "update": 4,
        "lr": 1e-3,
        "loss/policy_avg": 1.5,
        "loss/value_avg": 3.0,
        "policy/clipfrac_avg": 0.25,
        "policy/approxkl_avg": 0.1,
        "policy/grad_norm": 4.0,
        "val/num_eos_tokens": 1,
        "policy/entropy_avg": 2.0,
        "val/ratio": 1.25,
        "val/ratio_var": 0.125,   # of 1 and 1.5, divided by n - 1, as TRL does
        "val/ratio_first": 1.0,
        "val/clipfrac_avg": 0.25,
        # Errors of 1, 0 and 2; the returns 2, 1 and 3 differ from their mean by 0, 1 and 1.
        "val/explained_variance": 1 - 5 / 2,
    }
    assert {k: row[k] for k in want} == pytest.approx(want)
    assert health.ppo_metrics(b, returns, stats[:1], 0.1, 1e-3, 4)["val/ratio_var"] == 0


# Prompts and checkpoints

def test_prompts_that_are_all_too_long_are_an_error(train, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "Hi " * 60}, {"prompt": "Ho " * 60})
    with pytest.raises(UserError, match="p.jsonl: no prompt fits the context"):
        train(prompts=str(path), max_new_tokens=8)


def test_the_number_of_skipped_prompts_is_printed_once(train, tmp_path, capsys):
    records = [{"prompt": p} for p in [*PROMPTS, "Hi " * 60]]
    train(prompts=str(write_jsonl(tmp_path / "p.jsonl", *records)))
    printed = capsys.readouterr().out
    assert printed.count("prompts skipped") == 1
    assert printed.count("before:") == 4


def test_a_rollout_larger_than_the_prompts_uses_each_of_them_equally_often(train, monkeypatch):
    rollouts = Recorder(monkeypatch, ppo, "rollout")
    train(rollout_size=25, updates=2)
    assert len(rollouts.calls) == 2
    for args, _ in rollouts.calls:
        prompts = [tuple(ids) for ids in args[5]]
        assert len(prompts) == 25
        assert len(set(prompts)) == len(PROMPTS)
        assert {prompts.count(p) for p in prompts} <= {2, 3}


def test_checkpoints_of_different_tokenizers_are_refused(train, checkpoints, tmp_path):
    raw = json.loads((ROOT / "data" / "tokenizer.json").read_text())
    ranks = [*raw["ranks"][:-2], *reversed(raw["ranks"][-2:])]
    other = write_tokenizer(tmp_path / "other.json", ranks=ranks)
    mixed = tmp_path / "mixed"
    shutil.copytree(checkpoints, mixed)
    state = load_checkpoint(checkpoints / "reward.pt")
    change = tokenizer_entries(get_tokenizer(other), other)
    save_checkpoint(mixed / "reward.pt", **{**state, **change})
    with pytest.raises(UserError, match="differ in tokenizer"):
        train(out=str(mixed))
    save_checkpoint(mixed / "reward.pt", **{**state, "fingerprint": "0" * 16})
    with pytest.raises(UserError, match="tokenizer.json has changed"):
        train(out=str(mixed))


def test_a_missing_reward_model_is_trained_first_with_the_same_seed_and_device(
    tmp_path, monkeypatch, capsys
):
    class Stop(Exception):
        pass

    def stage(cfg):
        assert cfg.out == str(tmp_path)
        assert cfg.seed == 5
        assert cfg.device == "cpu"
        raise Stop

    monkeypatch.setattr(reward, "main", stage)
    with pytest.raises(Stop):
        ppo.main(ppo.Config(out=str(tmp_path), seed=5, device="cpu"))
    assert "reward.pt is missing" in capsys.readouterr().out


def test_plain_pytest_finds_the_modules():
    """`pytest`, unlike `python -m pytest`, does not put the current folder on the path."""
    code = (
        "import os, sys, pytest\n"
        "sys.path = [p for p in sys.path if os.path.abspath(p) != os.getcwd()]\n"
        "options = ['--collect-only', '-q', '-p', 'no:cacheprovider']\n"
        "sys.exit(pytest.main([*options, 'tests/test_gae.py']))\n"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# Training that goes wrong gives a warning

HEALTHY = {
    "update": 9,
    "objective/kl": 2.0,
    "objective/entropy": 6.0,
    "objective/length": 10.0,
    "objective/scores_std": 0.8,
    "val/ratio_first": 1.0,
    "val/explained_variance": 0.5,
    "val/num_eos_tokens": 128,
    "policy/clipfrac_avg": 0.1,
}


def warnings(change, **settings):
    """Return the warnings of a healthy row with some entries changed."""
    return health.warnings(HEALTHY | change, 0.5, ppo.Config(**settings))


def test_a_healthy_row_gives_no_warning():
    assert warnings({}) == {}


@pytest.mark.parametrize("name, key, edge, beyond", [
    ("ratio", "val/ratio_first", 1.009, 1.02),
    ("ratio", "val/ratio_first", 0.991, 0.98),
    ("kl below 0", "objective/kl", -0.4, -0.6),
    ("kl", "objective/kl", 19.0, 21.0),
    ("entropy", "objective/entropy", 1.01, 0.9),
    ("clip", "policy/clipfrac_avg", 0.3, 0.31),
    ("value", "val/explained_variance", 0.0, -0.01),
    ("length", "val/num_eos_tokens", 1, 0),
    ("scores", "objective/scores_std", 0.051, 0.04),
])
def test_each_warning_has_its_own_bound(name, key, edge, beyond):
    assert warnings({key: edge}) == {}
    found = warnings({key: beyond})
    assert set(found) == {name}
    assert "\n" not in found[name]


def test_bounds_that_depend_on_the_settings():
    assert warnings({"objective/kl": 30.0}, target_kl=10.0) == {}
    assert set(warnings({"objective/kl": 50.0}, target_kl=10.0)) == {"kl"}
    # At first the critic has learned too little to judge it.
    assert warnings({"val/explained_variance": -1.0, "update": 4}) == {}
    assert warnings({"val/explained_variance": -1.0}, value_warmup=10) == {}
    # The samples of the reference make both numbers so.
    assert warnings({"val/ratio_first": 0.5, "objective/kl": -3.0}, offline=True) == {}


def test_published_runs_warn_only_where_the_reward_was_hacked():
    """Of the logs in results/, only the run without a KL penalty gives warnings."""
    found = {}
    for path in sorted((ROOT / "results").glob("ppo-*seed*.jsonl")):
        _, *log = read_jsonl(path)   # the first line says how the file was made
        first_entropy = log[0]["objective/entropy"] / log[0]["objective/length"]
        found[path.stem] = set()
        for row in log:
            found[path.stem] |= set(health.warnings(row, first_entropy, ppo.Config()))
    assert found.pop("ppo-beta-0-seed100") >= {"kl", "entropy"}
    assert len(found) >= 6
    assert not any(found.values()), found


def printed_warnings(capsys):
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line.split("warning, update ")[1] for line in lines if "warning, update " in line]


def printed_warning(capsys, words):
    """Return the only warning that contains these words."""
    lines = [line for line in printed_warnings(capsys) if words in line]
    assert len(lines) == 1, "the warning must be printed once"
    return lines[0]


def test_a_healthy_run_prints_no_warning(train, capsys):
    train(updates=5, lr=1e-4)
    assert printed_warnings(capsys) == []


def test_a_first_ratio_other_than_1_gives_a_warning(train, monkeypatch, capsys):
    """Such as from dropout in the update and none in the rollout."""
    token_logprobs = gpt.token_logprobs

    def shifted_in_the_update(model, ids, mask, states=None, parts=1):
        shift = 0.2 if torch.is_grad_enabled() and states is None else 0.0   # of the policy
        return token_logprobs(model, ids, mask=mask, states=states) + shift * mask

    monkeypatch.setattr(gpt, "token_logprobs", shifted_in_the_update)
    train(updates=2)
    line = printed_warning(capsys, "ratio is")
    assert "the ratio is 1.221 before the first step" in line


def test_a_kl_below_0_gives_a_warning(train, monkeypatch, capsys):
    """The responses are those of another model: here the frozen one, without --offline."""
    rollout = ppo.rollout

    def samples_of_the_reference(sampler, policy, reference, *rest, **kwargs):
        b = rollout(reference, policy, reference, *rest, **kwargs)
        return replace(b, old_logprobs=b.logprobs)

    monkeypatch.setattr(ppo, "rollout", samples_of_the_reference)
    train(updates=6, lr=1e-2)
    assert "cannot be negative" in printed_warning(capsys, "KL to the reference is -")


def test_a_policy_that_diverges_gives_every_warning_once(train, capsys):
    """The KL explodes, the entropy falls, ratios are clipped, and the values are useless."""
    train(updates=8, lr=1.0, beta=0.0)
    lines = printed_warnings(capsys)
    for words in (
        "too far for the reward model",
        "entropy fell",
        "of the ratios are clipped",
        "explained variance",
    ):
        assert sum(words in line for line in lines) == 1, words


def test_responses_that_never_end_give_a_warning(train, monkeypatch, capsys):
    def never_ending(model, prompts, n, **kwargs):
        return [[5] * n for _ in prompts]

    monkeypatch.setattr(gpt, "generate", never_ending)
    train(updates=1)
    line = printed_warning(capsys, "response ended")
    assert "no response ended within 8 tokens" in line


def test_a_reward_model_with_one_score_for_all_gives_a_warning(train, monkeypatch, capsys):
    load_reward = reward.load_reward

    def flat(*args):
        model, enc = load_reward(*args)
        torch.nn.init.zeros_(model.head.weight)
        return model, enc

    monkeypatch.setattr(reward, "load_reward", flat)
    # -0.43 is this model's score, so responses without an end token do not differ either.
    train(updates=1, missing_eos_score=-0.43)
    assert "same score" in printed_warning(capsys, "score")
