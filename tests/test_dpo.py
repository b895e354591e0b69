"""What DPO must satisfy, each stated once. Slow references are plain Python over one pair or one token at a time.

Two rulers, as for PPO. A tree of 15 answers is small enough to be summed over: rankings by Bradley and Terry's rule of known
rewards have one best policy, a formula, and DPO must find it. And a tiny random GPT goes through `main` itself.
"""
import itertools
import json
import math
import random
import shutil

import pytest
import torch

import dpo
import gpt
import reward
import sft
from gpt import UserError

ENC = gpt.get_tokenizer()
END = ENC._special_tokens["<|end|>"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_gpt(seed):
    """2 layers x 32, random; pushed towards the end token, so that answers of 8 tokens end about half of the time."""
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 64, 2, 2, 32))
    torch.manual_seed(seed)  # after the init, and every matrix anew: the tests do not depend on how gpt.py draws its weights
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.1)
        end = model.wte.weight[END]
        model.ln_f.bias.copy_(5.5 * end / end.square().sum())
    return model.eval()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder as sft.py leaves it, without having trained."""
    folder = tmp_path_factory.mktemp("chain")
    gpt.save_model(folder / "sft.pt", tiny_gpt(1), ENC, "")
    return folder


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def softplus(x):
    return math.log1p(math.exp(x))


def four(n=6, scale=3.0):
    """policy_chosen, policy_rejected, ref_chosen, ref_rejected: n pairs, fp64."""
    return scale * torch.randn(4, n, dtype=torch.float64) - 8


# The loss

def brute(p, beta, e=0.0, kind="sigmoid"):
    """-> (loss, chosen rewards, rejected rewards), from the papers, one pair at a time."""
    losses, rewards = [], []
    for pw, pl, rw, rl in zip(*p.tolist()):
        h = pw - pl - (rw - rl)
        # -log sigmoid(x) = softplus(-x); cDPO is the cross-entropy of sigmoid(beta h) with a label that is 1 - e
        losses.append((1 - e) * softplus(-beta * h) + e * softplus(beta * h) if kind == "sigmoid" else (h - 0.5 / beta) ** 2)
        rewards.append((beta * (pw - rw), beta * (pl - rl)))
    return sum(losses) / len(losses), *zip(*rewards)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
@pytest.mark.parametrize("e, kind", [(0.0, "sigmoid"), (0.1, "sigmoid"), (0.4, "sigmoid"), (0.0, "ipo")])
def test_dpo_loss_by_brute_force(beta, e, kind):
    p = four()
    loss, chosen, rejected = dpo.dpo_loss(*p, beta, label_smoothing=e, kind=kind)
    want = brute(p, beta, e, kind)
    assert loss.shape == () and loss.item() == pytest.approx(want[0])
    assert chosen.tolist() == pytest.approx(want[1]) and rejected.tolist() == pytest.approx(want[2])


def test_dpo_loss_by_hand():
    """Margins .1 * (2 - -1) = .3 and .1 * (-1 - 3) = -.4: softplus(-.3) = .554355, softplus(.4) = .913015. beta 0.1 is the default."""
    p = torch.tensor([[-3., -6], [-9, -2], [-5, -5], [-8, -5]])
    loss, chosen, rejected = dpo.dpo_loss(*p)
    assert loss.item() == pytest.approx((0.554355 + 0.913015) / 2, abs=1e-6)
    assert chosen.tolist() == pytest.approx([0.2, -0.1]) and rejected.tolist() == pytest.approx([-0.1, 0.3])


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_a_policy_that_is_its_reference_has_loss_ln_2(e):
    p = four()
    loss, chosen, rejected = dpo.dpo_loss(p[0], p[1], p[0], p[1], 0.7, label_smoothing=e)
    assert loss.item() == pytest.approx(math.log(2)) and not chosen.any() and not rejected.any()


def gradients(p, *args, **kwargs):
    p = p.clone().requires_grad_()
    dpo.dpo_loss(*p, *args, **kwargs)[0].backward()
    return p.grad


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_gradient_weighs_a_pair_by_how_wrong_the_implicit_reward_has_it(beta):
    """DPO, section 4: beta * sigmoid(r_l - r_w) on the chosen, minus the same on the rejected."""
    p = four()
    _, chosen, rejected = dpo.dpo_loss(*p, beta)
    weight = beta * torch.sigmoid(rejected - chosen) / p.shape[1]
    torch.testing.assert_close(gradients(p, beta)[:2], torch.stack([-weight, weight]))
    assert not chosen.requires_grad and not dpo.dpo_loss(*p.requires_grad_(), beta)[1].requires_grad


@pytest.mark.parametrize("kwargs", [{}, dict(label_smoothing=0.3), dict(kind="ipo")], ids=str)
def test_what_the_prompt_alone_adds_changes_nothing(kwargs):
    """f(x) added to the log-probabilities of both answers, of either model: rewards are only known up to such an f."""
    p, f = four(), 5 * torch.randn(6, dtype=torch.float64)
    for shift in (torch.stack([f, f, 0 * f, 0 * f]), torch.stack([0 * f, 0 * f, f, f]), torch.stack([f, 0 * f, f, 0 * f])):
        torch.testing.assert_close(dpo.dpo_loss(*(p + shift), 0.3, **kwargs)[0], dpo.dpo_loss(*p, 0.3, **kwargs)[0])
        torch.testing.assert_close(gradients(p + shift, 0.3, **kwargs), gradients(p, 0.3, **kwargs))


def test_large_margins_are_neither_infinite_nor_nan():
    p = torch.tensor([[-1e4, 0], [0, -1e4], [0, 0], [0, 0]])
    assert dpo.dpo_loss(*p, 1.0)[0].item() == 5000
    assert gradients(p, 1.0).isfinite().all()


@pytest.mark.parametrize("e", [0.05, 0.25, 0.45])
def test_label_smoothing_stops_where_the_margin_says_how_often_the_rankings_are_wrong(e):
    """The least loss is the entropy of a label that is wrong e of the time, at margin log((1-e)/e); beyond it pulls back."""
    beta, zero = 0.5, torch.zeros(1, dtype=torch.float64)
    at = lambda margin: torch.stack([zero + margin / beta, zero, zero, zero])
    best = math.log((1 - e) / e)
    assert dpo.dpo_loss(*at(best), beta, label_smoothing=e)[0].item() == pytest.approx(-e * math.log(e) - (1 - e) * math.log(1 - e))
    slopes = [gradients(at(m), beta, label_smoothing=e)[0].item() for m in (best - 1, best, best + 1)]
    assert slopes[0] < -1e-3 and abs(slopes[1]) < 1e-12 and slopes[2] > 1e-3
    # And the rankings turned round, with 1 - e of them wrong, are the same rankings.
    p = four()
    torch.testing.assert_close(dpo.dpo_loss(*p, beta, label_smoothing=e)[0],
                               dpo.dpo_loss(*p[[1, 0, 3, 2]], beta, label_smoothing=1 - e)[0])


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_is_at_rest_at_a_difference_of_1_over_2_beta(beta):
    zero = torch.zeros(1, dtype=torch.float64)
    at = lambda h: torch.stack([zero + h, zero, zero, zero])
    loss = lambda h: dpo.dpo_loss(*at(h), beta, kind="ipo")[0].item()
    assert loss(0.5 / beta) == pytest.approx(0, abs=1e-20) and not gradients(at(0.5 / beta), beta, kind="ipo").any()
    assert loss(0.5 / beta + 2) == pytest.approx(4) == pytest.approx(loss(0.5 / beta - 2))
    assert gradients(at(0.5 / beta + 3), beta, kind="ipo")[:2].flatten().tolist() == pytest.approx([6, -6])


def test_an_unknown_kind_is_an_error():
    with pytest.raises(KeyError):
        dpo.dpo_loss(*four(), kind="hinge")


# What a model says of an answer

class Table(torch.nn.Module):
    """A 'model' whose next-token probabilities depend on the position alone."""

    def __init__(self, probs):
        super().__init__()
        self.wte = torch.nn.Embedding(1, 1)
        self.logits = torch.nn.Parameter(torch.tensor(probs).log())
        self.rows = []

    def forward(self, ids):
        self.rows.append(len(ids))
        return self.logits[:ids.shape[1]].expand(len(ids), -1, -1)


THREE = [[.5, .3, .2], [.1, .15, .75], [.9, .05, .05], [.3, .3, .4]]


def test_three_tokens_by_hand():
    """Prompt 0, answer 1, end 2: the answer is foretold at the prompt, the end at the answer; what stands at the end is not asked."""
    model = Table(THREE)
    ids, mask = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]])
    assert dpo.answer_logprobs(model, ids, mask).item() == pytest.approx(math.log(.3) + math.log(.75))
    # The same answer behind another prompt of two tokens stands one place later, and nothing else of the prompt counts.
    for first in range(3):
        longer = dpo.answer_logprobs(model, torch.tensor([[first, 0, 1, 2]]), torch.tensor([[0, 0, 1, 1]]))
        assert longer.item() == pytest.approx(math.log(.15) + math.log(.05))
    unended = dpo.answer_logprobs(model, ids, torch.tensor([[0, 1, 0]]))
    assert unended.item() == pytest.approx(math.log(.3))


def test_it_is_a_sum_and_no_mean():
    model = Table([[0.25] * 4] * 9)
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0, 0], [0] + [1] * 8])
    assert dpo.answer_logprobs(model, ids, mask).tolist() == pytest.approx([-n * math.log(4) for n in (1, 4, 8)])


def answers_of(texts, prompts=("Hi", "What does the cow say?")):
    """[(ids, mask)] of all texts to the first prompt, then of all to the next."""
    found = []
    for p in prompts:
        prompt = sft.render_prompt([{"role": "user", "content": p}], ENC)
        for t in texts:
            said = ENC.encode_ordinary(t) + [END]
            found.append((torch.tensor(prompt + said), torch.tensor([0] * len(prompt) + [1] * len(said))))
    return found


TEXTS = ["moo", "", "The cow says moo.", "It is late. It is late. It is late.", "苹果"]


def slow_logprob(model, ids, mask):
    """Token by token, each from nothing but what stands before it."""
    with torch.no_grad():
        return sum(model(ids[None, :t])[0, -1].log_softmax(-1)[ids[t]].item() for t in range(1, len(ids)) if mask[t])


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_logprobs_equal_a_token_by_token_recomputation_whatever_the_batch(batch):
    model, answers = tiny_gpt(1), answers_of(TEXTS)
    got = dpo.all_logprobs(model, answers, batch)
    assert got.tolist() == pytest.approx([slow_logprob(model, *a) for a in answers], abs=1e-4)
    assert len({round(x, 3) for x in got.tolist()}) == len(answers)  # sorted by length, they found their way back
    order = torch.randperm(len(answers)).tolist()
    torch.testing.assert_close(dpo.all_logprobs(model, [answers[i] for i in order], batch), got[order])


def test_what_stands_behind_the_end_changes_nothing():
    model, [(ids, mask)] = tiny_gpt(1), answers_of(["moo"], ["Hi"])
    for garbage in (0, END, 7):
        longer = torch.cat([ids, torch.full((20,), garbage)])[None]
        more = torch.cat([mask, torch.zeros(20, dtype=torch.long)])[None]
        torch.testing.assert_close(dpo.answer_logprobs(model, longer, more), dpo.answer_logprobs(model, ids[None], mask[None]))


PAIRS = [(0, 2), (0, 4), (2, 4), (6, 5), (0, 3)]


def test_pairs_share_the_passes_of_their_answers():
    """Five pairs of six answers: six rows. The same numbers, and the same gradient, as ten rows would give."""
    model, answers = tiny_gpt(1), answers_of(TEXTS)
    got = dpo.pair_logprobs(model, answers, PAIRS)
    one = lambda i: dpo.answer_logprobs(model, answers[i][0][None], answers[i][1][None])[0]
    want = torch.stack([torch.stack([one(i) for i in side]) for side in zip(*PAIRS)])
    torch.testing.assert_close(got, want)
    weights = torch.randn(2, len(PAIRS))
    grads = [torch.autograd.grad((x * weights).sum(), model.h[0].mlp.c_fc.weight)[0] for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    counting = Table([[0.25] * ENC.n_vocab] * 64)
    dpo.pair_logprobs(counting, answers, PAIRS)
    assert counting.rows == [6]


def flat_gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])


def test_two_equal_answers_pull_at_nothing():
    model, answers = tiny_gpt(1), answers_of(["moo", "moo"], ["Hi"])
    ref = dpo.all_logprobs(tiny_gpt(2), answers)
    loss = dpo.dpo_loss(*dpo.pair_logprobs(model, answers, [(0, 1)]), *ref[:, None], 0.5)[0]
    assert loss.item() == pytest.approx(math.log(2)) and flat_gradient(loss, model).abs().max() < 1e-6
    logprobs = dpo.pair_logprobs(model, answers_of(TEXTS), [(0, 2)])
    other = dpo.dpo_loss(*logprobs, *logprobs.detach(), 0.5)[0]  # of two different answers, too, at loss ln 2
    assert other.item() == pytest.approx(math.log(2))
    assert flat_gradient(other, model).abs().max() > 1e-2


def test_for_a_small_beta_the_step_is_that_of_plain_likelihood():
    """beta -> 0: every pair weighs beta / 2, whatever the margin, and the direction is that of log pi(w) - log pi(l)."""
    model, answers, beta = tiny_gpt(1), answers_of(TEXTS), 1e-4
    ref = dpo.all_logprobs(tiny_gpt(2), answers)[torch.tensor(PAIRS).T]
    logprobs = dpo.pair_logprobs(model, answers, PAIRS)
    got = flat_gradient(dpo.dpo_loss(*logprobs, *ref, beta)[0], model)
    want = -beta / 2 * flat_gradient((logprobs := dpo.pair_logprobs(model, answers, PAIRS))[0].mean() - logprobs[1].mean(), model)
    assert (got - want).norm() < 0.01 * want.norm()
    large = flat_gradient(dpo.dpo_loss(*dpo.pair_logprobs(model, answers, PAIRS), *ref, 1.0)[0], model)
    assert torch.cosine_similarity(large, want, dim=0) < 0.99  # with a real beta the pairs weigh differently


# A tree of answers: up to 3 tokens of {end, a, b}, as in test_ppo.py. Policies are tables of logits (7, 3).

BETA = 0.5


def all_answers():
    """Every answer there is -> states, actions, mask, (15, 3) each."""
    paths = []
    def walk(path):
        for action in range(3):
            longer = path + [(path and 2 * path[-1][0] + path[-1][1] or 0, action)]
            if action == 0 or len(longer) == 3:
                paths.append(longer)
            else:
                walk(longer)
    walk([])
    fill = [p + [(0, 0)] * (3 - len(p)) for p in paths]
    return *torch.tensor(fill).unbind(-1), torch.tensor([[float(t < len(p)) for t in range(3)] for p in paths])


STATES, ACTIONS, MASK = all_answers()
COUNT = lambda action: ((ACTIONS == action) * MASK).sum(1)
SCORE = COUNT(1) - 0.3 * COUNT(2) - (COUNT(0) == 0).float()  # +1 for each a, -.3 for each b, -1 without an end


def tree_logprobs(logits):
    return (logits.log_softmax(-1)[STATES, ACTIONS] * MASK).sum(1)


def learn_tree(ref, logprobs=tree_logprobs, reference=tree_logprobs, **kwargs):
    """Minimise DPO's loss over all pairs, each in either order as often as Bradley and Terry say -> logits."""
    logits, pairs = ref.clone().requires_grad_(), torch.tensor(list(itertools.permutations(range(15), 2))).T
    share = torch.sigmoid(SCORE[pairs[0]] - SCORE[pairs[1]]).to(ref.dtype)
    optimizer = torch.optim.LBFGS([logits], max_iter=300, history_size=30, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        p, r = logprobs(logits)[pairs], reference(ref)[pairs]
        # One call per pair would be slow; a pair and its reverse, with the reverse as smoothing, are one call.
        loss = dpo.dpo_loss(*p, *r, BETA, label_smoothing=1 - share, **kwargs)[0]
        loss.backward()
        return loss
    optimizer.step(closure)
    return logits.detach()


def distance_from_the_optimum(ref, logits):
    """-> (total variation to pi_ref * exp(r / beta) / Z, largest error of the implicit rewards' differences)."""
    p, q = tree_logprobs(ref), tree_logprobs(logits)
    best = (p + SCORE / BETA).softmax(0)
    error = BETA * (q - p) - SCORE
    return 0.5 * (q.exp() - best).abs().sum().item(), (error.max() - error.min()).item()


def tree_policy(seed):
    return 0.5 * torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(2))
def test_dpo_reaches_the_optimum_that_ppo_looks_for(seed):
    """And its implicit reward, beta * log(pi / pi_ref), is the reward behind the rankings, up to a constant: -beta * log Z."""
    ref = tree_policy(seed)
    variation, error = distance_from_the_optimum(ref, learn_tree(ref))
    assert variation < 1e-3 and error < 1e-2
    assert distance_from_the_optimum(ref, ref)[0] > 0.3


def mean_logprobs(logits):
    return (logits.log_softmax(-1)[STATES, ACTIONS] * MASK).sum(1) / MASK.sum(1)


def without_the_end(logits):
    return (logits.log_softmax(-1)[STATES, ACTIONS] * MASK * (ACTIONS > 0)).sum(1)


@pytest.mark.parametrize("bug", [dict(logprobs=mean_logprobs, reference=mean_logprobs), dict(logprobs=without_the_end, reference=without_the_end),
                                 dict(reference=lambda ref: 0 * tree_logprobs(ref)), dict(kind="ipo")], ids=["mean", "no end", "no reference", "ipo"])
def test_the_tree_shows_known_bugs(bug):
    """The ruler itself: each of these misses the optimum by far more than ours may. (IPO is no bug, but has another optimum.)"""
    ref = tree_policy(0)
    assert distance_from_the_optimum(ref, learn_tree(ref, **bug))[0] > 0.05


# Pairs

def test_all_pairs_by_brute_force():
    """Ties and equal texts make no pair; a lower rank number is better; 8 of 10 pairs are left."""
    answers, ranks = ["a", "b", "a", "c", "d"], [2, 1, 3, 2, 2.5]
    want = {(i, j) for i, j in itertools.permutations(range(5), 2) if ranks[i] < ranks[j] and answers[i] != answers[j]}
    got = dpo.choose_pairs(answers, ranks, "all", random.Random(0))
    assert len(got) == len(want) == 8 and set(got) == want
    assert dpo.choose_pairs(["a", "a"], [1, 2], "random", random.Random(0)) == dpo.choose_pairs(["a", "b"], [1, 1], "extreme", random.Random(0)) == []


def test_extreme_pairs_are_the_best_against_the_worst():
    answers, ranks = list("abcdef"), [2, 1, 4, 3, 1, 4]
    got = [dpo.choose_pairs(answers, ranks, "extreme", random.Random(s)) for s in range(40)]
    assert {p for [p] in got} == {(1, 2), (1, 5), (4, 2), (4, 5)}  # ties at either end are drawn
    assert dpo.choose_pairs(["a", "b", "a"], [1, 2, 3], "extreme", random.Random(0))[0] in ((0, 1), (1, 2))


def test_random_pairs_are_any_of_all():
    answers, ranks = list("abcd"), [2, 1, 3, 2]
    got = [dpo.choose_pairs(answers, ranks, "random", random.Random(s)) for s in range(100)]
    assert {p for [p] in got} == set(dpo.choose_pairs(answers, ranks, "all", random.Random(0)))
    assert got[3] == dpo.choose_pairs(answers, ranks, "random", random.Random(3))


def examples_of(*records):
    return reward.tokenize([{"prompt": [{"role": "user", "content": p}], "responses": a, "ranks": r} for p, a, r in records], ENC, 64)


def test_flatten_keeps_what_belongs_together():
    """Indices are those of the flat list; a mask covers exactly the answer and its end; a prompt without a pair leaves no answer."""
    answers, pairs = dpo.flatten(examples_of(("Hi", ["moo", "no"], [2, 1]), ("Who?", ["a", "a"], [1, 2]),
                                             ("Is it late?", ["yes", "", "no"], [1, 2, 2])), "all", random.Random(0))
    said = [ENC.decode([i for i, m in zip(ids.tolist(), mask.tolist()) if m]) for ids, mask in answers]
    assert said == [t + "<|end|>" for t in ("moo", "no", "yes", "", "no")]
    assert pairs == [[(1, 0)], [(2, 3), (2, 4)]]
    asked = [ENC.decode([i for i, m in zip(ids.tolist(), mask.tolist()) if not m]) for ids, mask in answers]
    assert asked == ["<|user|>Hi<|end|><|assistant|>"] * 2 + ["<|user|>Is it late?<|end|><|assistant|>"] * 3
    with pytest.raises(UserError, match="no prompt has two different answers"):
        dpo.flatten(examples_of(("Who?", ["a", "a"], [1, 2])), "all", random.Random(0))


# The log

def test_metrics_by_hand():
    policy, ref = torch.tensor([[-1., -2, -3], [-5, -1, -3]]), torch.tensor([[-2., -2, -2], [-2, -2, -2]])
    row = dpo.metrics(policy, ref, *dpo.dpo_loss(*policy, *ref, 0.5))
    assert row == pytest.approx({"loss": (softplus(-2) + softplus(0.5) + softplus(0)) / 3, "rewards/chosen": 0.0, "rewards/rejected": -0.5,
                                 "rewards/margins": 0.5, "rewards/accuracies": 1 / 3, "logps/chosen": -2.0, "logps/rejected": -3.0,
                                 "drift/chosen": 0.0, "drift/rejected": -1.0})  # a margin of 0 is not accurate


def test_held_out_pairs_by_a_slow_recomputation():
    policy, reference, cfg = tiny_gpt(1), tiny_gpt(2), dpo.Config(beta=0.3, label_smoothing=0.1)
    answers = answers_of(TEXTS)
    ref = dpo.all_logprobs(reference, answers)
    row = dpo.held_out(policy, answers, PAIRS, ref, cfg)
    chosen, rejected = torch.tensor([[slow_logprob(policy, *answers[i]) for i in side] for side in zip(*PAIRS)])
    want = dpo.dpo_loss(chosen, rejected, *ref[torch.tensor(PAIRS).T], 0.3, 0.1)
    assert row["eval_loss"] == pytest.approx(want[0].item(), abs=1e-4)
    assert row["eval_rewards/accuracies"] == pytest.approx((want[1] > want[2]).float().mean().item())
    assert row["eval_logps/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-3)


def test_samples_are_the_policys_own():
    policy, reference, cfg = tiny_gpt(1), tiny_gpt(2), dpo.Config(max_new_tokens=8, seed=5)
    records = [{"prompt": [{"role": "user", "content": p}], "task": 100 * 2 ** i} for i, p in enumerate(["Hi", "Who bakes?", "Why?"])]
    row = dpo.sampled(policy, reference, ENC, records, lambda task, text: task + len(text), cfg)
    prompts = [sft.render_prompt(r["prompt"], ENC) for r in records]
    said = gpt.generate(policy, prompts, 8, stop=END, seed=5)
    kl = [slow_logprob(m, torch.tensor(p + a), torch.tensor([0] * len(p) + [1] * len(a))) for m in (policy, reference) for p, a in zip(prompts, said)]
    assert row["samples/kl"] == pytest.approx(sum(kl[:3]) / 3 - sum(kl[3:]) / 3, abs=1e-3)
    assert row["samples/length"] == pytest.approx(sum(map(len, said)) / 3)
    texts = [ENC.decode([i for i in a if i != END]) for a in said]
    assert row["samples/gold"] == pytest.approx((700 + sum(map(len, texts))) / 3)
    assert set(dpo.sampled(policy, reference, ENC, records, None, cfg)) == {"samples/kl", "samples/length"}
    assert dpo.sampled(policy, reference, ENC, [], None, cfg) == {}


# The stage as a whole

WORDS = ["mill", "dog", "bread", "cow"]


def ranked(n=48):
    """Answers that say 'good' are better, and better still when they say it twice; a tie in every record."""
    for i in range(n):
        w = WORDS[i % 4]
        texts, ranks = [f"{w} bad bad", f"good {w} bad", f"good good {w}", f"bad {w} bad"], [3, 2, 1, 3]
        order = [(i + k) % 4 for k in range(4)]
        yield dict(prompt=f"Tell me about the {w}.", responses=[texts[k] for k in order], ranks=[ranks[k] for k in order], user=f"u{i % 12}")


def pairs_of(r):
    best, worst = (r["responses"][r["ranks"].index(k)] for k in (1, 3))
    return dict(prompt=r["prompt"], chosen=best, rejected=worst, user=r["user"])


def transcripts_of(r):
    p = pairs_of(r)
    return {k: f"\n\nHuman: {p['prompt']}\n\nAssistant: {p[k]}" for k in ("chosen", "rejected")} | dict(user=r["user"])


@pytest.fixture
def train(checkpoints, tmp_path):
    """train(**settings) -> (steps of the log, looks of the log, the folder): one short run of dpo.main, each in its own folder."""
    def run(records=None, **settings):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(checkpoints, out)
        data = write(out / "ranked.jsonl", *(records or ranked()))
        small = dict(data=str(data), out=str(out), epochs=2, lr=3e-3, batch_prompts=8, max_new_tokens=8, gold="", device="cpu")
        dpo.main(dpo.Config(**{**small, **settings}))
        rows = [json.loads(line) for line in (out / f"{settings.get('name', 'dpo')}.jsonl").read_text().splitlines()]
        return [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r], out
    return run


@pytest.mark.parametrize("make", [lambda r: r, pairs_of, transcripts_of], ids=["ranked", "pairs", "transcripts"])
def test_training_makes_the_better_answers_likelier_for_users_it_never_saw(train, make, capsys):
    steps, looks, out = train([make(r) for r in ranked()], epochs=4)
    assert looks[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5) and looks[0]["samples/kl"] == pytest.approx(0, abs=1e-4)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert looks[-1]["eval_rewards/accuracies"] > 0.9 and looks[-1]["eval_loss"] < 0.4 and abs(looks[-1]["samples/kl"]) > 1e-3
    policy, start = (gpt.load_model(out / f"{name}.pt")[0] for name in ("dpo", "sft"))
    answers = answers_of(["good good cow", "bad cow bad"], ["Tell me about the cow."])
    moved = dpo.all_logprobs(policy, answers) - dpo.all_logprobs(start, answers)
    assert moved[0] > moved[1] + 1
    assert same_weights(start, tiny_gpt(1)) and not same_weights(policy, start)
    printed = capsys.readouterr().out
    assert "before:" in printed and "after:" in printed and "eval.py" not in printed and f"{looks[-1]['eval_loss']:.3f}" in printed


class Recorder:
    """Stands in front of a function and keeps what goes in and what comes out."""

    def __init__(self, monkeypatch, module, name):
        self.calls, function = [], getattr(module, name)
        def recorded(*args, **kwargs):
            kept = [a.detach().clone() if torch.is_tensor(a) else a for a in args]
            self.calls.append((kept, function(*args, **kwargs)))
            return self.calls[-1][1]
        monkeypatch.setattr(module, name, recorded)


def test_main_feeds_the_loss_with_what_the_equations_say(train, monkeypatch):
    """In every step the reference's numbers are those of sft.pt, pair by pair, while the policy's move away; ties take no part."""
    batches, losses = Recorder(monkeypatch, dpo, "pair_logprobs"), Recorder(monkeypatch, dpo, "dpo_loss")
    steps, _, out = train(beta=0.3, label_smoothing=0.1)
    start = gpt.load_model(out / "sft.pt")[0]
    calls = [c for c in losses.calls if c[1][0].requires_grad]  # not those of the looks
    assert len(calls) == len(batches.calls) == len(steps) > 8
    for ((model, answers, pairs), logprobs), (args, result) in zip(batches.calls, calls):
        ref = dpo.all_logprobs(start, answers)[torch.tensor(pairs).T]
        torch.testing.assert_close(torch.stack(args[2:4]), ref, rtol=1e-4, atol=1e-4)
        assert torch.equal(torch.stack(args[:2]), logprobs) and args[4:] == [0.3, 0.1, "sigmoid"]
        assert not model.training
    torch.testing.assert_close(torch.stack(calls[0][0][:2]), torch.stack(calls[0][0][2:4]), rtol=1e-4, atol=1e-4)
    assert (torch.stack(calls[-1][0][:2]) - torch.stack(calls[-1][0][2:4])).abs().max() > 1
    answers, said = batches.calls[0][0][1], lambda i: ENC.decode(answers[i][0][answers[i][1] > 0].tolist())
    seen = [p for (_, _, pairs), _ in batches.calls for p in pairs]
    goodness = lambda i: said(i).count("good")
    assert all(goodness(i) > goodness(j) for i, j in seen)
    assert len(seen) == 2 * len(set(seen)) == 2 * 5 * (len(answers) // 4)  # each epoch every pair once: 5 of 6, the sixth is a tie


@pytest.mark.parametrize("how, n", [("all", 5), ("extreme", 1), ("random", 1)])
def test_the_choice_of_pairs_decides_what_is_trained_on_and_not_what_is_measured(train, monkeypatch, how, n):
    batches, looks = (Recorder(monkeypatch, dpo, name) for name in ("pair_logprobs", "held_out"))
    train(pairs=how, epochs=1)
    seen = [p for (_, _, pairs), _ in batches.calls for p in pairs]
    prompts = {i // 4 for i, _ in seen}
    assert len(seen) == n * len(prompts) and len(prompts) > 30
    assert len(looks.calls[0][0][2]) % 5 == 0


def test_nll_holds_the_better_answers_up(train):
    """The term is the better answer's mean token loss; with it their log-probability does not fall below what it is without."""
    plain, held = train(epochs=3)[0], train(epochs=3, nll=5.0)[0]
    assert "nll_loss" not in plain[0] and held[0]["loss"] == plain[0]["loss"] and held[0]["grad_norm"] != plain[0]["grad_norm"]
    assert held[-1]["logps/chosen"] > plain[-1]["logps/chosen"] + 1
    assert held[-1]["nll_loss"] < held[0]["nll_loss"] - 0.5


def test_nll_is_a_mean_over_tokens(train, monkeypatch):
    batches = Recorder(monkeypatch, dpo, "pair_logprobs")
    steps = train(epochs=1, nll=0.1)[0]
    for ((_, answers, pairs), logprobs), row in zip(batches.calls, steps):
        want = sum(-logprobs[0, k].item() / answers[i][1].sum().item() for k, (i, _) in enumerate(pairs)) / len(pairs)
        assert row["nll_loss"] == pytest.approx(want, rel=1e-5)


def test_a_larger_beta_stays_nearer(train):
    near, far = (abs(train(beta=b, epochs=3)[1][-1]["eval_drift/rejected"]) for b in (2.0, 0.05))
    assert near < 0.7 * far


def test_learning_rate_0_changes_nothing(train):
    steps, looks, out = train(lr=0.0)
    assert same_weights(*(gpt.load_model(out / f"{name}.pt")[0] for name in ("dpo", "sft")))
    assert all(r["loss"] == pytest.approx(math.log(2), abs=1e-5) for r in steps)
    assert all(looks[-1][k] == looks[0][k] for k in looks[0] if k != "step")


def test_gold_is_for_reports(train, monkeypatch):
    monkeypatch.setattr(sft, "gold_hook", lambda spec, records: spec and (lambda task, answer: len(answer)))
    records = [r | dict(task={"kind": "any"}) for r in ranked()]
    (_, graded, a), (_, plain, b) = train(records, epochs=1, gold="some:grader"), train(records, epochs=1)
    assert same_weights(*(gpt.load_model(out / "dpo.pt")[0] for out in (a, b)))
    assert [{k: v for k, v in r.items() if k != "samples/gold"} for r in graded] == plain and "samples/gold" in graded[0]


def test_looks_come_as_often_as_asked_and_at_either_end(train):
    steps, looks, _ = train(eval_every=5)
    assert [r["step"] for r in looks] == sorted({0, *range(5, len(steps) + 1, 5), len(steps)})


def test_same_seed_same_log_and_same_weights(train):
    (_, _, a), (_, _, b), (_, _, c) = (train(seed=s, epochs=1) for s in (7, 7, 8))
    assert (a / "dpo.jsonl").read_bytes() == (b / "dpo.jsonl").read_bytes() != (c / "dpo.jsonl").read_bytes()
    assert same_weights(*(gpt.load_model(out / "dpo.pt")[0] for out in (a, b)))


def test_a_variant_has_its_own_checkpoint_and_log(train):
    _, looks, out = train(name="dpo-ipo", loss="ipo", beta=0.1, epochs=1)
    assert looks[0]["eval_loss"] == pytest.approx(25, abs=1e-3)  # (0 - 1/(2 * 0.1))^2
    assert (out / "dpo-ipo.pt").exists() and not (out / "dpo.pt").exists() and not (out / "dpo.jsonl").exists()


@pytest.mark.parametrize("bad", [dict(loss="hinge"), dict(pairs="best"), dict(beta=0.0), dict(beta=-1.0), dict(label_smoothing=0.5), dict(nll=-1.0),
                                 dict(label_smoothing=-0.1), dict(loss="ipo", label_smoothing=0.1), dict(epochs=0), dict(name="sft"), dict(name="ppo"),
                                 dict(batch_prompts=0), dict(eval_every=0), dict(device="tpu"), dict(data="nowhere.jsonl")], ids=str)
def test_a_bad_setting_ends_in_one_line(train, bad):
    with pytest.raises(UserError) as e:
        train(**bad)
    assert "\n" not in str(e.value)
    assert ("--" + next(iter(bad)).replace("_", "-") in str(e.value)) or "data" in bad


def test_a_bad_record_is_named_in_one_line(train):
    with pytest.raises(UserError, match=r"ranked\.jsonl:2: "):
        train([next(ranked()), {"prompt": "Hi", "chosen": "a"}])


def test_only_ties_are_an_error(train):
    with pytest.raises(UserError, match="nothing to learn from"):
        train([{"prompt": "Hi", "responses": ["a", "b"], "ranks": [2, 2]}])


def test_a_missing_fine_tuned_model_is_trained_first_with_the_same_seed_and_device(tmp_path, monkeypatch, capsys):
    class Stop(Exception):
        pass
    def stage(cfg):
        assert (cfg.out, cfg.seed, cfg.device) == (str(tmp_path), 5, "cpu")
        raise Stop
    monkeypatch.setattr(sft, "main", stage)
    with pytest.raises(Stop):
        dpo.main(dpo.Config(out=str(tmp_path), seed=5, device="cpu"))
    assert "sft.pt is missing" in capsys.readouterr().out


def test_the_village_is_ranked_as_for_the_reward_model(checkpoints, tmp_path, monkeypatch):
    """Without --data: the files that data.labelers makes of this run's sft.pt, and no other."""
    from data import labelers
    shutil.copytree(checkpoints, tmp_path / "run")
    paths = [str(write(tmp_path / f"{n}.jsonl", *list(ranked())[:n])) for n in (24, 4)]
    def ensure(out, seed, device):
        assert (str(out), seed, device) == (str(tmp_path / "run"), 3, "cpu")
        return paths
    monkeypatch.setattr(labelers, "ensure", ensure)
    looks = Recorder(monkeypatch, dpo, "held_out")
    cfg = dpo.Config(out=str(tmp_path / "run"), seed=3, device="cpu", gold="", max_new_tokens=8)
    dpo.main(cfg)
    assert (cfg.data, cfg.val) == tuple(paths) and len(looks.calls[0][0][2]) == 4 * 5
