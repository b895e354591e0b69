"""Batches in parts, and logits in chunks: less memory, and the same numbers and gradients."""

import pytest
import torch
import torch.nn.functional as F

import dpo
import gpt
import ppo
import reward
import sft
from data.rankings import Comparison
from scaffold import optim
from tiny import END, ENC, assert_close, random_gpt, random_ids, tiny_gpt, tiny_reward

pytestmark = pytest.mark.usefixtures("seeded")

PARTS = [2, 3, 5, 7, 100]   # of batches of five rows; more parts than rows are as many as rows
LENGTHS = [9, 14, 11, 14, 8]


def gradient(loss, *models):
    """Return d loss / d p of all parameters in one vector; 0 where the loss does not depend on p"""
    p = [p for model in models for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, p, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def batch():
    """Return ids (5, 14), and a mask (5, 14) of responses that differ in length."""
    ids = gpt.pad([torch.tensor(row) for row in random_ids(LENGTHS)])
    mask = torch.zeros_like(ids)
    for row, n in enumerate(LENGTHS):
        mask[row, 3 + row:n] = 1
    return ids, mask


# The two helpers


@pytest.mark.parametrize("n", PARTS)
def test_parts_give_the_values_and_gradients_of_the_whole(n):
    layer = torch.nn.Linear(4, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(5, 3, dtype=torch.float64)

    def f(x, shift):
        return (layer(x) + shift).tanh()

    whole = f(x, shift)
    parts = optim.in_parts(f, n, x, shift)
    weights = torch.randn(5, 3, dtype=torch.float64)   # a loss that treats every row differently
    assert_close(parts, whole)
    assert_close(torch.autograd.grad((parts * weights).sum(), [x, *layer.parameters()]),
                 torch.autograd.grad((whole * weights).sum(), [x, *layer.parameters()]))


def test_one_part_calls_the_function_once_with_the_tensors_themselves():
    x = torch.randn(5)
    assert optim.in_parts(lambda t: t, 1, x) is x


def test_dropout_in_parts_is_the_same_in_the_forward_and_the_backward_pass():
    """Recomputed with other random numbers, the gradient would belong to another loss."""
    x = torch.ones(6, 100, requires_grad=True)
    y = optim.in_parts(lambda x: F.dropout(x, 0.5), 3, x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())   # each kept number is doubled, and so is its gradient
    assert len(set(x.grad.unique().tolist())) == 2


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("limit", [10**9, 500, 120, 1])
def test_cross_entropy_in_chunks(monkeypatch, limit, temperature, reduction):
    """At most `limit` logits at a time, or those of one token; the formula is torch's."""
    monkeypatch.setattr(optim, "LOGITS", limit)
    model = random_gpt()
    states = torch.randn(23, 32, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (23,))
    seen = []
    unembed = model.unembed

    def counting(states):
        seen.append(len(states) * 50)
        return unembed(states)

    model.unembed = counting
    got = optim.cross_entropy(model, states, targets, temperature, reduction)
    want = F.cross_entropy(unembed(states).float() / temperature, targets, reduction=reduction)
    torch.testing.assert_close(got, want)
    assert max(seen) <= max(limit, 50)
    weights = torch.randn(got.shape)
    torch.testing.assert_close(torch.autograd.grad((got * weights).sum(), states),
                               torch.autograd.grad((want * weights).sum(), states))


def test_the_default_model_computes_all_logits_of_a_batch_at_once():
    """Chunks would round sums in another order: the published numbers have none."""
    assert 2048 * ENC.n_vocab < optim.LOGITS


# The losses of the scripts


@pytest.mark.parametrize("n", PARTS)
def test_log_probs_in_parts(n):
    model = random_gpt()
    ids, mask = batch()
    weights = torch.randn(5, 13)
    whole = gpt.token_logprobs(model, ids, mask=mask[:, 1:])
    parts = gpt.token_logprobs(model, ids, mask=mask[:, 1:], parts=n)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient((parts * weights).sum(), model),
                               gradient((whole * weights).sum(), model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", PARTS)
def test_sft_in_parts(n):
    """The mean is over all response tokens: not a mean of the means of the parts."""
    model = random_gpt()
    whole = sft.chat_loss(model, *batch())
    parts = sft.chat_loss(model, *batch(), n)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(parts, model), gradient(whole, model),
                               rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", ["ranking", "token-margin", "regression"])
@pytest.mark.parametrize("n", PARTS)
def test_reward_in_parts(n, loss):
    """A part may end within the responses of a prompt; their pairs are still in the loss."""
    rows = [torch.tensor(row) for row in random_ids(LENGTHS, ENC.n_vocab)]
    records = [dict(ranks=[2, 1, 3], scores=[0.0, 1.0, -1.0]), dict(ranks=[1, 2], scores=[1, 0])]
    comparisons = [Comparison(rows[:3], 3, records[0]), Comparison(rows[3:], 3, records[1])]
    model = tiny_reward(1)

    def loss_of(n):
        cfg = reward.Config(loss=loss, grad_accum=n)
        return reward.batch_loss(model, comparisons, torch.device("cpu"), cfg)

    torch.testing.assert_close(loss_of(n), loss_of(1))
    torch.testing.assert_close(gradient(loss_of(n), model), gradient(loss_of(1), model),
                               rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", PARTS)
def test_dpo_in_parts(n):
    model = random_gpt()
    ids, mask = batch()
    examples = [sft.Example(i[:k], m[:k]) for i, m, k in zip(ids, mask, LENGTHS)]
    pairs = [(0, 1), (0, 2), (3, 4)]

    def loss_of(n):
        logprobs = dpo.pair_logprobs(model, examples, pairs, parts=n)
        return dpo.dpo_loss(*logprobs, *torch.zeros(2, 3), 0.1)[0]

    torch.testing.assert_close(loss_of(n), loss_of(1))
    torch.testing.assert_close(gradient(loss_of(n), model), gradient(loss_of(1), model),
                               rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", PARTS)
def test_ppo_in_parts(n):
    """The rollout is the same, and so are both losses, which average over tokens."""
    policy, reference = tiny_gpt(1), tiny_gpt(2)
    reward_model, value_model = tiny_reward(3), tiny_reward(4)
    prompts = random_ids([4, 6, 5, 4, 7], 200)
    b, rows = {}, torch.arange(5)
    for parts in (1, n):
        cfg = ppo.Config(grad_accum=parts, max_new_tokens=8)
        b[parts] = ppo.rollout(policy, policy, reference, reward_model, value_model, prompts, END,
                               cfg, seed=0)
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        torch.testing.assert_close(getattr(b[n], name), getattr(b[1], name))
    advantages, returns = torch.randn_like(b[1].values), torch.randn_like(b[1].values)

    def gradient_of(parts):
        cfg = ppo.Config(grad_accum=parts)
        pg, vf, _ = ppo.losses(policy, value_model, b[1], advantages, returns, rows, cfg)
        return gradient(pg + vf, policy, value_model)

    torch.testing.assert_close(gradient_of(n), gradient_of(1), rtol=1e-4, atol=1e-6)
