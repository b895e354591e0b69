"""What DPO must satisfy. References are slow plain Python over one pair or one token at a time.

Two small settings measure the whole, as for PPO. A tree of 15 responses can be summed over: from
rankings by Bradley and Terry's rule, with known rewards, the best policy is a formula, and DPO must
find it. And a tiny random GPT goes through `main` itself.
"""
import itertools
import math
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import dpo
import gpt
import sft
from data import labelers, rankings
from scaffold import health
from scaffold.cli import UserError
from sft import Example
from tiny import (
    END,
    ENC,
    Recorder,
    read_jsonl,
    same_weights,
    softplus,
    tiny_gpt,
    tree_policy,
    tree_responses,
    tree_score,
    user,
    write_jsonl,
)

pytestmark = pytest.mark.usefixtures("seeded")

LN_2 = math.log(2)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder as sft.py leaves it, with an untrained model."""
    folder = tmp_path_factory.mktemp("chain")
    gpt.save_model(folder / "sft.pt", tiny_gpt(1), ENC, "")
    return folder


# The loss

def random_logprobs():
    """Return policy_chosen, policy_rejected, ref_chosen, ref_rejected of 6 pairs, (4, 6) fp64."""
    return 3 * torch.randn(4, 6, dtype=torch.float64) - 8


def loss_of_pair(h, beta, smoothing, kind):
    """The loss of a pair whose log-ratios differ by h, from the papers."""
    if kind == "ipo":
        return (h - 0.5 / beta) ** 2
    # -log sigmoid(x) = softplus(-x). With smoothing e, cDPO is the cross-entropy of
    # sigmoid(beta h) with a label of 1 - e.
    return (1 - smoothing) * softplus(-beta * h) + smoothing * softplus(beta * h)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
@pytest.mark.parametrize("smoothing, kind", [
    (0.0, "sigmoid"),
    (0.1, "sigmoid"),
    (0.4, "sigmoid"),
    (0.0, "ipo"),
])
def test_dpo_loss_by_brute_force(beta, smoothing, kind):
    logprobs = random_logprobs()
    loss, chosen, rejected = dpo.dpo_loss(*logprobs, beta, label_smoothing=smoothing, kind=kind)
    losses = []
    chosen_rewards = []
    rejected_rewards = []
    for pw, pl, rw, rl in logprobs.T.tolist():
        losses.append(loss_of_pair(pw - pl - (rw - rl), beta, smoothing, kind))
        chosen_rewards.append(beta * (pw - rw))
        rejected_rewards.append(beta * (pl - rl))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(losses) / len(losses))
    assert chosen.tolist() == pytest.approx(chosen_rewards)
    assert rejected.tolist() == pytest.approx(rejected_rewards)


def test_dpo_loss_by_hand():
    """The margins are .1 * (2 - -1) = .3 and .1 * (-1 - 3) = -.4, with the default beta of .1.

    softplus(-.3) = .554355 and softplus(.4) = .913015.
    """
    logprobs = torch.tensor([[-3., -6], [-9, -2], [-5, -5], [-8, -5]])
    loss, chosen, rejected = dpo.dpo_loss(*logprobs)
    assert loss.item() == pytest.approx((0.554355 + 0.913015) / 2, abs=1e-6)
    assert chosen.tolist() == pytest.approx([0.2, -0.1])
    assert rejected.tolist() == pytest.approx([-0.1, 0.3])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_policy_that_is_its_reference_has_loss_ln_2(smoothing):
    chosen, rejected = random_logprobs()[:2]
    loss, chosen_rewards, rejected_rewards = dpo.dpo_loss(
        chosen, rejected, chosen, rejected, 0.7, label_smoothing=smoothing
    )
    assert loss.item() == pytest.approx(LN_2)
    assert not chosen_rewards.any()
    assert not rejected_rewards.any()


def gradients(logprobs, *args, **kwargs):
    logprobs = logprobs.clone().requires_grad_()
    dpo.dpo_loss(*logprobs, *args, **kwargs)[0].backward()
    return logprobs.grad


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_gradient_weighs_a_pair_by_how_wrong_the_implicit_reward_is(beta):
    """DPO, section 4: beta * sigmoid(r_l - r_w) on the chosen, minus the same on the rejected."""
    logprobs = random_logprobs()
    _, chosen, rejected = dpo.dpo_loss(*logprobs, beta)
    weight = beta * torch.sigmoid(rejected - chosen) / logprobs.shape[1]
    torch.testing.assert_close(gradients(logprobs, beta)[:2], torch.stack([-weight, weight]))


def test_the_rewards_have_no_gradient():
    _, chosen, rejected = dpo.dpo_loss(*random_logprobs().requires_grad_(), 0.1)
    assert not chosen.requires_grad
    assert not rejected.requires_grad


@pytest.mark.parametrize("shifted", [
    pytest.param([1, 1, 0, 0], id="policy"),
    pytest.param([0, 0, 1, 1], id="reference"),
    pytest.param([1, 0, 1, 0], id="chosen"),
])
@pytest.mark.parametrize("kwargs", [{}, dict(label_smoothing=0.3), dict(kind="ipo")], ids=str)
def test_a_common_shift_of_two_logprobs_changes_nothing(shifted, kwargs):
    """Rewards are only known up to a function of the prompt, f(x)."""
    logprobs = random_logprobs()
    f = 5 * torch.randn(6, dtype=torch.float64)
    moved = logprobs + torch.tensor(shifted)[:, None] * f
    loss = dpo.dpo_loss(*logprobs, 0.3, **kwargs)[0]
    torch.testing.assert_close(dpo.dpo_loss(*moved, 0.3, **kwargs)[0], loss)
    torch.testing.assert_close(gradients(moved, 0.3, **kwargs), gradients(logprobs, 0.3, **kwargs))


def test_large_margins_are_neither_infinite_nor_nan():
    logprobs = torch.tensor([[-1e4, 0], [0, -1e4], [0, 0], [0, 0]])
    assert dpo.dpo_loss(*logprobs, 1.0)[0].item() == 5000
    assert gradients(logprobs, 1.0).isfinite().all()


def one_pair(h):
    """Return the log-probabilities (4, 1) of a pair whose log-ratios differ by h."""
    return torch.tensor([[h], [0], [0], [0]], dtype=torch.float64)


@pytest.mark.parametrize("e", [0.05, 0.25, 0.45])
def test_label_smoothing_has_its_minimum_at_the_margin_of_labels_wrong_e_of_the_time(e):
    """The margin is log((1-e)/e), and the loss there is the entropy of such a label."""
    beta = 0.5
    margin = math.log((1 - e) / e)
    loss = dpo.dpo_loss(*one_pair(margin / beta), beta, label_smoothing=e)[0].item()
    assert loss == pytest.approx(-e * math.log(e) - (1 - e) * math.log(1 - e))

    def slope(margin):
        return gradients(one_pair(margin / beta), beta, label_smoothing=e)[0].item()

    assert slope(margin - 1) < -1e-3
    assert abs(slope(margin)) < 1e-12
    assert slope(margin + 1) > 1e-3


@pytest.mark.parametrize("e", [0.05, 0.25, 0.45])
def test_swapped_pairs_with_1_minus_e_wrong_labels_have_the_same_loss(e):
    logprobs = random_logprobs()
    swapped = logprobs[[1, 0, 3, 2]]
    loss = dpo.dpo_loss(*logprobs, 0.5, label_smoothing=e)[0]
    torch.testing.assert_close(dpo.dpo_loss(*swapped, 0.5, label_smoothing=1 - e)[0], loss)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_has_its_minimum_at_a_difference_of_1_over_2_beta(beta):
    def loss(h):
        return dpo.dpo_loss(*one_pair(h), beta, kind="ipo")[0].item()

    best = 0.5 / beta
    assert loss(best) == pytest.approx(0, abs=1e-20)
    assert not gradients(one_pair(best), beta, kind="ipo").any()
    assert loss(best + 2) == pytest.approx(4)
    assert loss(best - 2) == pytest.approx(4)
    beyond = gradients(one_pair(best + 3), beta, kind="ipo")
    assert beyond[:2].flatten().tolist() == pytest.approx([6, -6])


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="hinge"):
        dpo.dpo_loss(*random_logprobs(), kind="hinge")


# The log-probability of a response

class Table(torch.nn.Module):
    """A "model" whose next-token probabilities depend on the position alone."""

    def __init__(self, probs):
        super().__init__()
        self.wte = torch.nn.Embedding(1, 1)
        self.logits = torch.nn.Parameter(torch.tensor(probs).log())
        self.rows = []

    def hidden(self, ids, lengths):
        self.rows.append(len(ids))
        return self.logits[:ids.shape[1]].expand(len(ids), -1, -1)

    def unembed(self, states):
        return states


THREE = [[.5, .3, .2], [.1, .15, .75], [.9, .05, .05], [.3, .3, .4]]


def test_three_tokens_by_hand():
    """Prompt 0, response 1, end token 2. Each token is predicted at the position before it."""
    ids = torch.tensor([[0, 1, 2]])
    logprob = dpo.response_logprobs(Table(THREE), ids, torch.tensor([[0, 1, 1]]))
    assert logprob.item() == pytest.approx(math.log(.3) + math.log(.75))
    unended = dpo.response_logprobs(Table(THREE), ids, torch.tensor([[0, 1, 0]]))
    assert unended.item() == pytest.approx(math.log(.3))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_of_the_prompt_only_the_length_matters_to_a_table(first):
    ids = torch.tensor([[first, 0, 1, 2]])
    logprob = dpo.response_logprobs(Table(THREE), ids, torch.tensor([[0, 0, 1, 1]]))
    assert logprob.item() == pytest.approx(math.log(.15) + math.log(.05))


def test_it_is_a_sum_and_no_mean():
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.tensor([
        [0, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1, 1, 1, 1],
    ])
    logprobs = dpo.response_logprobs(Table([[0.25] * 4] * 9), ids, mask)
    assert logprobs.tolist() == pytest.approx([-n * math.log(4) for n in (1, 4, 8)])


def example(prompt, response):
    """Return the Example of a prompt and a response, both lists of token ids."""
    mask = [0] * len(prompt) + [1] * len(response)
    return Example(torch.tensor(prompt + response), torch.tensor(mask))


def examples_of(texts, prompts=("Hi", "What does the cow say?")):
    """Return the Examples of all texts as responses to the first prompt, then to the next."""
    examples = []
    for p in prompts:
        prompt = sft.render_prompt([user(p)], ENC)
        for text in texts:
            examples.append(example(prompt, ENC.encode_ordinary(text) + [END]))
    return examples


TEXTS = ["moo", "", "The cow says moo.", "It is late. It is late. It is late.", "苹果"]


@torch.no_grad()
def slow_logprob(model, ids, mask):
    """Sum over the response's tokens, each from what stands before it and nothing else."""
    total = 0.0
    for t in range(1, len(ids)):
        if mask[t]:
            total += model(ids[None, :t])[0, -1].log_softmax(-1)[ids[t]].item()
    return total


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_logprobs_equal_a_token_by_token_recomputation_in_any_batch_size(batch):
    """Rows are sorted by length and must be put back."""
    model = tiny_gpt(1)
    examples = examples_of(TEXTS)
    logprobs = dpo.all_logprobs(model, examples, batch)
    want = [slow_logprob(model, ids, mask) for ids, mask in examples]
    assert logprobs.tolist() == pytest.approx(want, abs=1e-4)
    assert len({round(x, 3) for x in logprobs.tolist()}) == len(examples)
    order = torch.randperm(len(examples)).tolist()
    shuffled = dpo.all_logprobs(model, [examples[i] for i in order], batch)
    torch.testing.assert_close(shuffled, logprobs[order])


@pytest.mark.parametrize("garbage", [0, END, 7])
def test_what_stands_behind_the_end_changes_nothing(garbage):
    model = tiny_gpt(1)
    [(ids, mask)] = examples_of(["moo"], ["Hi"])
    longer_ids = torch.cat([ids, torch.full((20,), garbage)])
    longer_mask = torch.cat([mask, torch.zeros(20, dtype=torch.long)])
    want = dpo.response_logprobs(model, ids[None], mask[None])
    got = dpo.response_logprobs(model, longer_ids[None], longer_mask[None])
    torch.testing.assert_close(got, want)


PAIRS = [(0, 2), (0, 4), (2, 4), (6, 5), (0, 3)]


def test_pairs_that_share_a_response_share_its_pass():
    """Five pairs of six responses take six rows, with the numbers and gradients of ten."""
    model = tiny_gpt(1)
    examples = examples_of(TEXTS)

    def alone(i):
        ids, mask = examples[i]
        return dpo.response_logprobs(model, ids[None], mask[None])[0]

    better = torch.stack([alone(i) for i, _ in PAIRS])
    worse = torch.stack([alone(j) for _, j in PAIRS])
    want = torch.stack([better, worse])                                               # (2, 5)
    got = dpo.pair_logprobs(model, examples, PAIRS)
    torch.testing.assert_close(got, want)
    weights = torch.randn(2, len(PAIRS))
    parameter = model.h[0].mlp.c_fc.weight
    want_gradient = torch.autograd.grad((want * weights).sum(), parameter)[0]
    gradient = torch.autograd.grad((got * weights).sum(), parameter)[0]
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-5)
    counting = Table([[0.25] * ENC.n_vocab] * 64)
    dpo.pair_logprobs(counting, examples, PAIRS)
    assert counting.rows == [6]


def flat_gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])


def test_a_pair_of_equal_responses_has_no_gradient():
    model = tiny_gpt(1)
    examples = examples_of(["moo", "moo"], ["Hi"])
    ref = dpo.all_logprobs(tiny_gpt(2), examples)
    logprobs = dpo.pair_logprobs(model, examples, [(0, 1)])
    loss, _, _ = dpo.dpo_loss(*logprobs, *ref[:, None], 0.5)
    assert loss.item() == pytest.approx(LN_2)
    assert flat_gradient(loss, model).abs().max() < 1e-6


def test_a_pair_of_different_responses_has_a_gradient_at_loss_ln_2():
    model = tiny_gpt(1)
    logprobs = dpo.pair_logprobs(model, examples_of(TEXTS), [(0, 2)])
    loss, _, _ = dpo.dpo_loss(*logprobs, *logprobs.detach(), 0.5)
    assert loss.item() == pytest.approx(LN_2)
    assert flat_gradient(loss, model).abs().max() > 1e-2


def test_for_a_small_beta_the_step_is_that_of_plain_likelihood():
    """For beta -> 0 every pair weighs beta / 2, and the gradient is that of log pi_l - log pi_w.

    With a usual beta the pairs weigh differently.
    """
    model = tiny_gpt(1)
    examples = examples_of(TEXTS)
    ref = dpo.all_logprobs(tiny_gpt(2), examples)[torch.tensor(PAIRS).T]

    def gradient(beta):
        logprobs = dpo.pair_logprobs(model, examples, PAIRS)
        return flat_gradient(dpo.dpo_loss(*logprobs, *ref, beta)[0], model)

    beta = 1e-4
    better, worse = dpo.pair_logprobs(model, examples, PAIRS)
    want = -beta / 2 * flat_gradient(better.mean() - worse.mean(), model)
    assert (gradient(beta) - want).norm() < 0.01 * want.norm()
    assert torch.cosine_similarity(gradient(1.0), want, dim=0) < 0.99


# The tree of responses in tiny.py

BETA = 0.5
STATES, ACTIONS, MASK = tree_responses()
SCORE = tree_score(ACTIONS, MASK)


def tree_logprobs(logits):
    """Return the log-probability of each of the 15 responses."""
    return (logits.log_softmax(-1)[STATES, ACTIONS] * MASK).sum(1)


def learn_tree(ref, logprobs=tree_logprobs, ref_logprobs=tree_logprobs, kind="sigmoid"):
    """Minimise DPO's loss over all pairs, weighed by Bradley and Terry's rule -> logits."""
    logits = ref.clone().requires_grad_()
    pairs = torch.tensor(list(itertools.permutations(range(15), 2))).T                # (2, 210)
    p_better = torch.sigmoid(SCORE[pairs[0]] - SCORE[pairs[1]]).to(ref.dtype)         # (210,)
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=300,
        history_size=30,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
    )

    def closure():
        optimizer.zero_grad()
        policy = logprobs(logits)[pairs]
        reference = ref_logprobs(ref)[pairs]
        # Label smoothing counts the reverse of each pair with its probability.
        smoothing = 1 - p_better
        loss, _, _ = dpo.dpo_loss(*policy, *reference, BETA, label_smoothing=smoothing, kind=kind)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach()


def distance_from_the_optimum(ref, logits):
    """Return the total variation to pi_ref * exp(r / beta) / Z, and the implicit rewards' error.

    The error is the largest one of a difference between two rewards.
    """
    p = tree_logprobs(ref)
    q = tree_logprobs(logits)
    best = (p + SCORE / BETA).softmax(0)
    variation = 0.5 * (q.exp() - best).abs().sum().item()
    error = BETA * (q - p) - SCORE
    return variation, (error.max() - error.min()).item()


@pytest.mark.parametrize("seed", range(2))
def test_dpo_reaches_the_optimum_that_ppo_looks_for(seed):
    """Its implicit reward beta * log(pi / pi_ref) is the true reward, up to a constant."""
    ref = tree_policy(seed)
    variation, error = distance_from_the_optimum(ref, learn_tree(ref))
    assert variation < 1e-3
    assert error < 1e-2
    at_the_start, _ = distance_from_the_optimum(ref, ref)
    assert at_the_start > 0.3


def mean_logprobs(logits):
    return tree_logprobs(logits) / MASK.sum(1)


def logprobs_without_the_end(logits):
    return (logits.log_softmax(-1)[STATES, ACTIONS] * MASK * (ACTIONS > 0)).sum(1)


def no_logprobs(logits):
    return 0 * tree_logprobs(logits)


@pytest.mark.parametrize("bug", [
    pytest.param(dict(logprobs=mean_logprobs, ref_logprobs=mean_logprobs), id="mean"),
    pytest.param(
        dict(logprobs=logprobs_without_the_end, ref_logprobs=logprobs_without_the_end),
        id="no end",
    ),
    pytest.param(dict(ref_logprobs=no_logprobs), id="no reference"),
    pytest.param(dict(kind="ipo"), id="ipo"),
])
def test_the_tree_shows_known_bugs(bug):
    """Each misses the optimum by far more than DPO may. (IPO is no bug: its optimum differs.)"""
    ref = tree_policy(0)
    variation, _ = distance_from_the_optimum(ref, learn_tree(ref, **bug))
    assert variation > 0.05


# Pairs

def choose_pairs(responses, ranks, how, seed=0):
    return rankings.choose_pairs(responses, ranks, how, random.Random(seed))


def test_all_pairs_by_brute_force():
    """Ties and equal responses make no pair. Rank 1 is best."""
    responses = ["a", "b", "a", "c", "d"]
    ranks = [2, 1, 3, 2, 2.5]
    want = set()
    for i, j in itertools.permutations(range(5), 2):
        if ranks[i] < ranks[j] and responses[i] != responses[j]:
            want.add((i, j))
    pairs = choose_pairs(responses, ranks, "all")
    assert len(want) == 8
    assert len(pairs) == 8
    assert set(pairs) == want


def test_without_different_responses_or_ranks_there_is_no_pair():
    assert choose_pairs(["a", "a"], [1, 2], "random") == []
    assert choose_pairs(["a", "b"], [1, 1], "extreme") == []


def test_extreme_pairs_are_the_best_against_the_worst():
    ranks = [2, 1, 4, 3, 1, 4]
    chosen = [choose_pairs("abcdef", ranks, "extreme", seed) for seed in range(40)]
    # Ties at either end are drawn.
    assert {pair for [pair] in chosen} == {(1, 2), (1, 5), (4, 2), (4, 5)}
    [pair] = choose_pairs(["a", "b", "a"], [1, 2, 3], "extreme")
    assert pair in {(0, 1), (1, 2)}


def test_random_pairs_are_any_of_all():
    ranks = [2, 1, 3, 2]
    chosen = [choose_pairs("abcd", ranks, "random", seed) for seed in range(100)]
    assert {pair for [pair] in chosen} == set(choose_pairs("abcd", ranks, "all"))
    assert chosen[3] == choose_pairs("abcd", ranks, "random", seed=3)


def comparisons(*records):
    """Return the Comparisons of (prompt, responses, ranks)."""
    dicts = [dict(prompt=[user(p)], responses=r, ranks=ranks) for p, r, ranks in records]
    return rankings.tokenize(dicts, sft.render_prompt, ENC, 64)


def test_flatten_keeps_what_belongs_together():
    """Indices are into the flat list. A prompt without a pair leaves no response."""
    examples, pairs = dpo.flatten(comparisons(
        ("Hi", ["moo", "no"], [2, 1]),
        ("Who?", ["a", "a"], [1, 2]),
        ("Is it late?", ["yes", "", "no"], [1, 2, 2]),
    ), "all", random.Random(0))
    hi = "<|user|>Hi<|end|><|assistant|>"
    late = "<|user|>Is it late?<|end|><|assistant|>"
    want = [(hi, "moo"), (hi, "no"), (late, "yes"), (late, ""), (late, "no")]
    assert len(examples) == len(want)
    for (ids, mask), (prompt, response) in zip(examples, want):
        assert ENC.decode(ids[mask == 0].tolist()) == prompt
        assert ENC.decode(ids[mask == 1].tolist()) == response + "<|end|>"
    assert pairs == [[(1, 0)], [(2, 3), (2, 4)]]


def test_flatten_without_a_pair_is_an_error():
    with pytest.raises(UserError, match="no prompt has two different responses"):
        dpo.flatten(comparisons(("Who?", ["a", "a"], [1, 2])), "all", random.Random(0))


# The log

def test_metrics_by_hand():
    policy = torch.tensor([[-1., -2, -3], [-5, -1, -3]])
    ref = torch.tensor([[-2., -2, -2], [-2, -2, -2]])
    row = health.dpo_metrics(policy, ref, *dpo.dpo_loss(*policy, *ref, 0.5))
    assert row == pytest.approx({
        "loss": (softplus(-2) + softplus(0.5) + softplus(0)) / 3,
        "rewards/chosen": 0.0,
        "rewards/rejected": -0.5,
        "rewards/margins": 0.5,
        "rewards/accuracies": 1 / 3,    # a margin of 0 is not accurate
        "logps/chosen": -2.0,
        "logps/rejected": -3.0,
        "drift/chosen": 0.0,
        "drift/rejected": -1.0,
    })


def test_held_out_pairs_by_a_slow_recomputation():
    policy = tiny_gpt(1)
    cfg = dpo.Config(beta=0.3, label_smoothing=0.1)
    examples = examples_of(TEXTS)
    ref = dpo.all_logprobs(tiny_gpt(2), examples)
    row = dpo.held_out(policy, examples, PAIRS, ref, cfg)
    slow = torch.tensor([slow_logprob(policy, ids, mask) for ids, mask in examples])
    index = torch.tensor(PAIRS).T
    loss, chosen, rejected = dpo.dpo_loss(*slow[index], *ref[index], 0.3, 0.1)
    assert row["eval_loss"] == pytest.approx(loss.item(), abs=1e-4)
    accuracy = (chosen > rejected).float().mean().item()
    assert row["eval_rewards/accuracies"] == pytest.approx(accuracy)
    assert row["eval_logps/chosen"] == pytest.approx(slow[index[0]].mean().item(), abs=1e-3)


def test_sample_metrics_are_of_the_policys_samples():
    policy = tiny_gpt(1)
    reference = tiny_gpt(2)
    cfg = dpo.Config(max_new_tokens=8, seed=5)
    chats = [[user(p)] for p in ("Hi", "Who bakes?", "Why?")]
    prompts = [sft.render_prompt(chat, ENC) for chat in chats]
    records = [dict(ids=ids, task=task) for ids, task in zip(prompts, (100, 200, 400))]

    def grade(task, text):
        return task + len(text)

    row = dpo.sampled(policy, reference, ENC, records, grade, cfg)
    responses = gpt.generate(policy, prompts, 8, stop=END, seed=5)
    kl = 0.0
    gold = 700
    for prompt, response in zip(prompts, responses):
        ids, mask = example(prompt, response)
        kl += slow_logprob(policy, ids, mask) - slow_logprob(reference, ids, mask)
        gold += len(ENC.decode([i for i in response if i != END]))
    assert row["samples/kl"] == pytest.approx(kl / 3, abs=1e-3)
    assert row["samples/length"] == pytest.approx(sum(len(r) for r in responses) / 3)
    assert row["samples/gold"] == pytest.approx(gold / 3)
    ungraded = dpo.sampled(policy, reference, ENC, records, None, cfg)
    assert set(ungraded) == {"samples/kl", "samples/length"}
    assert dpo.sampled(policy, reference, ENC, [], None, cfg) == {}


# The stage as a whole

WORDS = ["mill", "dog", "bread", "cow"]


def ranked(n=48):
    """Responses with 'good' are better, with two still better. Each record has a tie."""
    records = []
    for i in range(n):
        word = WORDS[i % 4]
        responses = [f"{word} bad bad", f"good {word} bad", f"good good {word}", f"bad {word} bad"]
        ranks = [3, 2, 1, 3]
        order = [(i + k) % 4 for k in range(4)]
        records.append(dict(
            prompt=f"Tell me about the {word}.",
            responses=[responses[k] for k in order],
            ranks=[ranks[k] for k in order],
            user=f"u{i % 12}",
        ))
    return records


def as_ranked(record):
    return record


def as_pair(record):
    """The best response against the first of the worst two."""
    best = record["responses"][record["ranks"].index(1)]
    worst = record["responses"][record["ranks"].index(3)]
    return dict(prompt=record["prompt"], chosen=best, rejected=worst, user=record["user"])


def as_transcripts(record):
    pair = as_pair(record)
    start = f"\n\nHuman: {pair['prompt']}\n\nAssistant: "
    chosen = start + pair["chosen"]
    return dict(chosen=chosen, rejected=start + pair["rejected"], user=record["user"])


class Trained(NamedTuple):
    steps: list          # rows of the log with a training loss
    evaluations: list    # rows of the log with a held-out loss
    out: Path


@pytest.fixture
def train(checkpoints, tmp_path):
    """Run dpo.main briefly in a new folder: train(**settings) -> Trained."""
    def run(records=None, **settings):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(checkpoints, out)
        small = dict(
            data=str(write_jsonl(out / "ranked.jsonl", *(records or ranked()))),
            out=str(out),
            epochs=2,
            lr=3e-3,
            batch_prompts=8,
            max_new_tokens=8,
            gold="",
            device="cpu",
        )
        cfg = dpo.Config(**{**small, **settings})
        dpo.main(cfg)
        rows = read_jsonl(out / f"{cfg.name}.jsonl")
        steps = [r for r in rows if "loss" in r]
        evaluations = [r for r in rows if "eval_loss" in r]
        return Trained(steps, evaluations, out)

    return run


def load(out, name):
    return gpt.load_model(out / f"{name}.pt")[0]


@pytest.mark.parametrize("form", [as_ranked, as_pair, as_transcripts])
def test_training_makes_the_better_responses_likelier_for_users_it_never_saw(train, form, capsys):
    steps, evaluations, out = train([form(r) for r in ranked()], epochs=4)
    first, last = evaluations[0], evaluations[-1]
    assert first["eval_loss"] == pytest.approx(LN_2, abs=1e-5)
    assert first["samples/kl"] == pytest.approx(0, abs=1e-4)
    assert steps[0]["loss"] == pytest.approx(LN_2, abs=1e-5)
    assert last["eval_rewards/accuracies"] > 0.9
    assert last["eval_loss"] < 0.4
    assert abs(last["samples/kl"]) > 1e-3
    policy = load(out, "dpo")
    start = load(out, "sft")
    examples = examples_of(["good good cow", "bad cow bad"], ["Tell me about the cow."])
    good, bad = dpo.all_logprobs(policy, examples) - dpo.all_logprobs(start, examples)
    assert good > bad + 1
    assert same_weights(start, tiny_gpt(1))
    assert not same_weights(policy, start)
    printed = capsys.readouterr().out
    assert "before:" in printed
    assert "after:" in printed
    assert "evaluate.py" not in printed
    assert f"{last['eval_loss']:.3f}" in printed


def test_main_feeds_the_loss_with_what_the_equations_say(train, monkeypatch):
    """In each step the reference's numbers are those of sft.pt, pair by pair."""
    batches = Recorder(monkeypatch, dpo, "pair_logprobs")
    losses = Recorder(monkeypatch, dpo, "dpo_loss")
    steps, _, out = train(beta=0.3, label_smoothing=0.1)
    start = load(out, "sft")
    training_losses = [c for c in losses.calls if c[1][0].requires_grad]  # not the evaluations
    assert len(steps) > 8
    assert len(batches.calls) == len(steps)
    assert len(training_losses) == len(steps)
    for (batch_args, logprobs), (args, _) in zip(batches.calls, training_losses):
        model, examples, pairs = batch_args
        ref = dpo.all_logprobs(start, examples)[torch.tensor(pairs).T]
        torch.testing.assert_close(torch.stack(args[2:4]), ref, rtol=1e-4, atol=1e-4)
        assert torch.equal(torch.stack(args[:2]), logprobs)
        assert args[4:] == [0.3, 0.1, "sigmoid"]
        assert not model.training
    # At the first step the policy is the reference; later it is not.
    first = torch.stack(training_losses[0][0][:4])
    last = torch.stack(training_losses[-1][0][:4])
    torch.testing.assert_close(first[:2], first[2:], rtol=1e-4, atol=1e-4)
    assert (last[:2] - last[2:]).abs().max() > 1


def test_each_epoch_trains_once_on_every_pair_that_is_not_tied(train, monkeypatch):
    batches = Recorder(monkeypatch, dpo, "pair_logprobs")
    train(beta=0.3, label_smoothing=0.1)
    (_, examples, _), _ = batches.calls[0]

    def n_good(i):
        ids, mask = examples[i]
        return ENC.decode(ids[mask > 0].tolist()).count("good")

    seen = [pair for (_, _, pairs), _ in batches.calls for pair in pairs]
    assert all(n_good(better) > n_good(worse) for better, worse in seen)
    assert len(seen) == 2 * len(set(seen))  # two epochs
    n_prompts = len(examples) // 4
    assert len(set(seen)) == 5 * n_prompts  # of 6 pairs, one is a tie


@pytest.mark.parametrize("how, n", [("all", 5), ("extreme", 1), ("random", 1)])
def test_the_choice_of_pairs_is_for_training_and_not_for_evaluation(train, monkeypatch, how, n):
    batches = Recorder(monkeypatch, dpo, "pair_logprobs")
    evaluations = Recorder(monkeypatch, dpo, "held_out")
    train(pairs=how, epochs=1)
    seen = [pair for (_, _, pairs), _ in batches.calls for pair in pairs]
    prompts = {better // 4 for better, _ in seen}
    assert len(seen) == n * len(prompts)
    assert len(prompts) > 30
    held_out_pairs = evaluations.calls[0][0][2]
    assert len(held_out_pairs) % 5 == 0


def test_nll_keeps_the_better_responses_likely(train):
    """With the term their log-probability stays above what it is without."""
    plain = train(epochs=3).steps
    held = train(epochs=3, nll=5.0).steps
    assert "nll_loss" not in plain[0]
    assert held[0]["loss"] == plain[0]["loss"]
    assert held[0]["grad_norm"] != plain[0]["grad_norm"]
    assert held[-1]["logps/chosen"] > plain[-1]["logps/chosen"] + 1
    assert held[-1]["nll_loss"] < held[0]["nll_loss"] - 0.5


def test_nll_is_a_mean_over_tokens(train, monkeypatch):
    """It is the better response's mean token loss, averaged over pairs."""
    batches = Recorder(monkeypatch, dpo, "pair_logprobs")
    steps = train(epochs=1, nll=0.1).steps
    for ((_, examples, pairs), logprobs), row in zip(batches.calls, steps):
        losses = []
        for (better, _), logprob in zip(pairs, logprobs[0].tolist()):
            _, mask = examples[better]
            losses.append(-logprob / mask.sum().item())
        assert row["nll_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_larger_beta_stays_nearer(train):
    near = train(beta=2.0, epochs=3).evaluations[-1]["eval_drift/rejected"]
    far = train(beta=0.05, epochs=3).evaluations[-1]["eval_drift/rejected"]
    assert abs(near) < 0.7 * abs(far)


def test_learning_rate_0_changes_nothing(train):
    steps, evaluations, out = train(lr=0.0)
    assert same_weights(load(out, "dpo"), load(out, "sft"))
    for row in steps:
        assert row["loss"] == pytest.approx(LN_2, abs=1e-5)
    assert evaluations[-1] | dict(step=0) == evaluations[0]


def test_gold_is_for_reports(train, monkeypatch):
    def load_grader(spec, records):
        if not spec:
            return None
        return lambda task, response: len(response)

    monkeypatch.setattr(dpo, "load_grader", load_grader)
    records = [r | dict(task={"kind": "any"}) for r in ranked()]
    graded = train(records, epochs=1, gold="some:grader")
    plain = train(records, epochs=1)
    assert same_weights(load(graded.out, "dpo"), load(plain.out, "dpo"))
    for row in graded.evaluations:
        del row["samples/gold"]
    assert graded.evaluations == plain.evaluations


def test_evaluations_come_as_often_as_asked_and_at_either_end(train):
    steps, evaluations, _ = train(eval_every=5)
    want = {0, *range(5, len(steps) + 1, 5), len(steps)}
    assert [r["step"] for r in evaluations] == sorted(want)


def test_same_seed_same_log_and_same_weights(train):
    a, b, c = (train(seed=seed, epochs=1).out for seed in (7, 7, 8))
    log_a, log_b, log_c = ((out / "dpo.jsonl").read_bytes() for out in (a, b, c))
    assert log_a == log_b
    assert log_b != log_c
    assert same_weights(load(a, "dpo"), load(b, "dpo"))


def test_a_variant_has_its_own_checkpoint_and_log(train):
    _, evaluations, out = train(name="dpo-ipo", loss="ipo", beta=0.1, epochs=1)
    assert evaluations[0]["eval_loss"] == pytest.approx(25, abs=1e-3)  # (0 - 1/(2 * 0.1))^2
    assert (out / "dpo-ipo.pt").exists()
    assert not (out / "dpo.pt").exists()
    assert not (out / "dpo.jsonl").exists()


@pytest.mark.parametrize("named, settings", [
    ("--loss", dict(loss="hinge")),
    ("--pairs", dict(pairs="best")),
    ("--beta", dict(beta=0.0)),
    ("--beta", dict(beta=-1.0)),
    ("--label-smoothing", dict(label_smoothing=0.5)),
    ("--nll", dict(nll=-1.0)),
    ("--label-smoothing", dict(label_smoothing=-0.1)),
    ("--loss", dict(loss="ipo", label_smoothing=0.1)),
    ("--epochs", dict(epochs=0)),
    ("--name", dict(name="sft")),
    ("--name", dict(name="ppo")),
    ("--batch-prompts", dict(batch_prompts=0)),
    ("--eval-every", dict(eval_every=0)),
    ("--device", dict(device="tpu")),
    ("nowhere.jsonl", dict(data="nowhere.jsonl")),
], ids=str)
def test_a_bad_setting_is_named_in_one_line(train, named, settings):
    with pytest.raises(UserError) as e:
        train(**settings)
    assert "\n" not in str(e.value)
    assert named in str(e.value)


def test_a_bad_record_is_named_in_one_line(train):
    with pytest.raises(UserError, match=r"ranked\.jsonl:2: "):
        train([ranked()[0], {"prompt": "Hi", "chosen": "a"}])


def test_only_ties_are_an_error(train):
    with pytest.raises(UserError, match="no record has two responses of different rank"):
        train([{"prompt": "Hi", "responses": ["a", "b"], "ranks": [2, 2]}])


def test_a_missing_sft_model_is_trained_first_with_the_same_seed_and_device(
    tmp_path, monkeypatch, capsys
):
    class Stop(Exception):
        pass

    def stage(cfg):
        assert cfg.out == str(tmp_path)
        assert cfg.seed == 5
        assert cfg.device == "cpu"
        raise Stop

    monkeypatch.setattr(sft, "main", stage)
    with pytest.raises(Stop):
        dpo.main(dpo.Config(out=str(tmp_path), seed=5, device="cpu"))
    assert "sft.pt is missing" in capsys.readouterr().out


def test_without_data_it_trains_on_the_rankings_of_this_runs_sft_model(
    checkpoints, tmp_path, monkeypatch
):
    """They are the files that data.labelers makes for the reward model."""
    out = tmp_path / "run"
    shutil.copytree(checkpoints, out)
    train_file = str(write_jsonl(tmp_path / "24.jsonl", *ranked(24)))
    val_file = str(write_jsonl(tmp_path / "4.jsonl", *ranked(4)))

    def ensure(folder, seed, device):
        assert str(folder) == str(out)
        assert seed == 3
        assert device == "cpu"
        return [train_file, val_file]

    monkeypatch.setattr(labelers, "ensure", ensure)
    evaluations = Recorder(monkeypatch, dpo, "held_out")
    cfg = dpo.Config(out=str(out), seed=3, device="cpu", gold="", max_new_tokens=8)
    dpo.main(cfg)
    assert cfg.data == train_file
    assert cfg.val == val_file
    held_out_pairs = evaluations.calls[0][0][2]
    assert len(held_out_pairs) == 4 * 5
