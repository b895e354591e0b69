"""What PPO must satisfy, each stated once. Slow references are plain Python, one token or one row at a time.

Two models of the world serve as rulers. A tree of 15 answers is small enough to be summed over: there the optimum of
reward minus beta * KL is a formula, and PPO must find it. And a tiny random GPT, whose answers end about half of the time,
goes through `main` itself.
"""
import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import gae
import gpt
import ppo
import reward
import run as training
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


def tiny_reward(seed):
    model = reward.RewardModel(tiny_gpt(seed))
    torch.nn.init.normal_(model.head.weight, std=0.2)
    model.mean.fill_(0.3)
    model.std.fill_(0.7)
    return model.eval()


PROMPTS = ["Hi", "What does the cow say?", "Name two animals.", "Who bakes the bread, and who sells it on the market?",
           "Is it late?", "苹果", "Tell me about the mill.", "Why?", "Count to three, please.", "Where is Ada?", "And Tom?"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder as the earlier stages leave it, without having trained: sft.pt, reward.pt, prompts.jsonl, text.txt."""
    folder = tmp_path_factory.mktemp("chain")
    gpt.save_model(folder / "sft.pt", tiny_gpt(1), ENC, "")
    gpt.save_checkpoint(folder / "reward.pt", model=tiny_reward(2).state_dict(), gpt=vars(tiny_gpt(2).config), tokenizer="",
                        fingerprint=gpt.fingerprint(ENC))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    document = "The miller has a dog. The dog sleeps by the mill, and the miller bakes bread.\n"
    (folder / "text.txt").write_text("<|end|>\n".join([document] * 200))
    return folder


@pytest.fixture
def train(checkpoints, tmp_path):
    """train(**settings) -> (rows of the log, the trained policy, the folder): one short run of ppo.main, each in its own folder."""
    def run(**settings):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(checkpoints, out)
        small = dict(prompts=str(out / "prompts.jsonl"), text=str(out / "text.txt"), out=str(out), updates=2, rollout=8, epochs=2,
                     minibatches=2, warmup=0, max_new_tokens=8, ptx=0.0, table=False, gold="", device="cpu")
        ppo.main(ppo.Config(**{**small, **settings}))
        name = settings.get("name", "ppo")
        rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        return rows, gpt.load_model(out / f"{name}.pt")[0], out
    return run


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


RUNS = [(0, 9), (3, 9), (3, 4), (8, 9), (0, 1), (9, 9), (2, 7), (5, 8)]  # full row, edges, one token, an empty row, usual ones


def ragged(n, T=9, poison=math.nan):
    """n random (B, T) fp64 tensors and the mask of RUNS; poison fills what is outside it."""
    mask = torch.zeros(len(RUNS), T)
    for row, (start, end) in zip(mask, RUNS):
        row[start:end] = 1
    return *(torch.where(mask.bool(), torch.randn(mask.shape, dtype=torch.float64), poison) for _ in range(n)), mask


def tokens(mask):
    return [(i, t) for i, row in enumerate(mask.tolist()) for t, m in enumerate(row) if m]


# The reward of a token

@pytest.mark.parametrize("beta", [0.0, 0.05, 2.0])
@pytest.mark.parametrize("kind", [torch.float, torch.long, torch.bool])
def test_kl_rewards_by_brute_force(beta, kind):
    logprobs, ref, mask = ragged(2)
    scores = torch.randn(len(mask), dtype=torch.float64)
    want = torch.zeros_like(logprobs)
    for i, t in tokens(mask):
        last = t == max(u for j, u in tokens(mask) if j == i)
        want[i, t] = -beta * (logprobs[i, t] - ref[i, t]) + (scores[i] if last else 0)
    got = ppo.kl_rewards(scores, logprobs, ref, mask.to(kind), beta)
    torch.testing.assert_close(got, want)  # NaN outside the mask, a row without tokens: zeros there, and no NaN


def test_kl_rewards_worked_example():
    """The episode of gae.py: k1 [.2, -.2, .3], beta .1, score 1 on the end token; prompt and padding get nothing."""
    logprobs, ref = torch.tensor([[9., 9, -.5, -1.2, -.3, 9]]), torch.tensor([[1., 2, -.7, -1., -.6, 3]])
    rewards = ppo.kl_rewards(torch.tensor([1.0]), logprobs, ref, torch.tensor([[0, 0, 1, 1, 1, 0]]), 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[0, 0, -.02, .02, .97, 0]]))


def test_the_score_is_paid_once_and_on_the_last_token():
    zeros, mask = torch.zeros(len(RUNS), 9), ragged(0)[0]
    rewards = ppo.kl_rewards(torch.arange(1., len(RUNS) + 1), zeros, zeros, mask, 0.5)
    want = [{end - 1: i + 1.0} if end > start else {} for i, (start, end) in enumerate(RUNS)]
    assert [{t: r for t, r in enumerate(row) if r} for row in rewards.tolist()] == want


def test_leaving_the_reference_costs_and_returning_pays():
    """A token that the policy likes better than the reference does was moved towards: it costs. The zoo has the sign flipped."""
    mask, zero = torch.ones(1, 1), torch.zeros(1)
    assert ppo.kl_rewards(zero, torch.tensor([[-1.]]), torch.tensor([[-3.]]), mask, 0.5).item() == -1.0
    assert ppo.kl_rewards(zero, torch.tensor([[-3.]]), torch.tensor([[-1.]]), mask, 0.5).item() == 1.0


# A tree of answers: up to 3 tokens of {end, a, b}. A state is the text so far; as in a binary heap, the state after `a`
# is 2s + 1 and after `b` 2s + 2. Policies are tables of logits (7, 3).

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


def sample_answers(logits, n, rng):
    """n answers of the policy -> states, actions, mask, (n, 3) each."""
    state, alive, steps = torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.bool), []
    for _ in range(3):
        action = torch.multinomial(logits[state].softmax(-1), 1, generator=rng)[:, 0] * alive
        steps.append((state, action, alive.float()))
        alive = alive & (action > 0)
        state = (2 * state + action).clamp(max=6) * alive
    return [torch.stack(x, 1) for x in zip(*steps)]


def tree_score(actions, mask):
    """+1 for each a, -.3 for each b, -1 for an answer that does not end."""
    count = lambda action: ((actions == action) * mask).sum(1)
    return count(1) - 0.3 * count(2) - (count(0) == 0).float()


def tree_logprobs(logits, states, actions):
    return logits.log_softmax(-1)[states, actions]


def tree_policy(seed):
    return 0.5 * torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_tree():
    states, actions, mask = all_answers()
    words = ["".join("eab"[a] for a, m in zip(*row) if m) for row in zip(actions.tolist(), mask.tolist())]
    assert words == ["e", "ae", "aae", "aaa", "aab", "abe", "aba", "abb", "be", "bae", "baa", "bab", "bbe", "bba", "bbb"]
    assert tree_score(actions, mask)[:5].tolist() == pytest.approx([0, 1, 2, 2, 0.7])
    frequency = torch.zeros(15)
    for row in zip(*(x.tolist() for x in sample_answers(tree_policy(1), 4000, torch.Generator().manual_seed(0)))):
        frequency[list(zip(states.tolist(), actions.tolist(), mask.tolist())).index(row)] += 1 / 4000
    probability = (tree_logprobs(tree_policy(1), states, actions) * mask).sum(1).exp()
    assert probability.sum().item() == pytest.approx(1)
    assert (frequency - probability).abs().max() < 0.03


def test_the_mean_penalty_is_the_exact_kl():
    """k1 summed over an answer, averaged over all answers by their probability. (k2, half its square, is not the KL.)"""
    states, actions, mask = all_answers()
    policy, ref = tree_policy(1).log_softmax(-1), tree_policy(2).log_softmax(-1)
    logprobs, ref_logprobs = policy[states, actions], ref[states, actions]
    probability = (logprobs * mask).sum(1).exp()
    penalty = ppo.kl_rewards(torch.zeros(15), logprobs, ref_logprobs, mask, 1.0).sum(1)
    # The same number from the definition, by the chain rule: visits of a state times the KL of its next token.
    kl = (policy.exp() * (policy - ref)).sum(1)
    visits = [1.0, *policy[0, 1:].exp().tolist()]
    visits += [visits[s] * policy[s, a].exp().item() for s in (1, 2) for a in (1, 2)]
    assert -(probability * penalty).sum().item() == pytest.approx(sum(v * k for v, k in zip(visits, kl.tolist())))


def test_the_policy_gradient_of_the_penalty_is_the_gradient_of_the_kl():
    """What decides for k1 and against k3: k3 has the right mean too, but the wrong gradient through the samples."""
    states, actions, mask = all_answers()
    logits, ref = tree_policy(1).requires_grad_(), tree_policy(2)
    whole = lambda table: (tree_logprobs(table, states, actions) * mask).sum(1)
    logprobs, p = whole(logits), whole(logits).exp()
    exact = torch.autograd.grad((p * (logprobs - whole(ref))).sum(), logits)[0]
    rewards = ppo.kl_rewards(torch.zeros(15), tree_logprobs(logits, states, actions).detach(), tree_logprobs(ref, states, actions), mask, 1.0)
    sampled = torch.autograd.grad((p.detach() * rewards.sum(1) * whole(logits)).sum(), logits)[0]
    torch.testing.assert_close(sampled, -exact)
    k = whole(logits).detach() - whole(ref)
    k3 = torch.autograd.grad((p.detach() * -(torch.exp(-k) - 1 + k) * whole(logits)).sum(), logits)[0]
    assert (k3 + exact).abs().max() > 0.01


def learn_tree(ref, seed=0, kl_rewards=ppo.kl_rewards, gamma=1.0):
    """PPO on the tree, made of the project's own functions -> logits, values. 150 rollouts of 256 answers, 4 epochs."""
    rng = torch.Generator().manual_seed(seed)
    logits, values = ref.clone().requires_grad_(), torch.zeros(7, dtype=ref.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values])
    for update in range(150):
        with torch.no_grad():
            states, actions, mask = sample_answers(logits, 256, rng)
            old, old_values = tree_logprobs(logits, states, actions), values[states]
            rewards = kl_rewards(tree_score(actions, mask), old, tree_logprobs(ref, states, actions), mask, BETA)
            advantages, returns = gae.gae(rewards, old_values, mask, gamma, 0.95)
            advantages = gae.whiten(advantages, mask)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - update / 150)
        for _ in range(4):
            loss, _ = ppo.policy_loss(tree_logprobs(logits, states, actions), old, advantages, mask)
            loss = loss + ppo.value_loss(values[states], old_values, returns, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return logits.detach(), values.detach()


def distance_from_the_optimum(ref, logits, values):
    """-> (total variation to pi0 * exp(r / beta) / Z, value of the empty text minus J* = beta * log Z)."""
    states, actions, mask = all_answers()
    p, q = ((tree_logprobs(x, states, actions) * mask).sum(1).exp() for x in (ref, logits))
    best = p * (tree_score(actions, mask) / BETA).exp()
    return 0.5 * (q - best / best.sum()).abs().sum().item(), (values[0] - BETA * best.sum().log()).item()


@pytest.mark.parametrize("seed", range(2))
def test_ppo_reaches_the_closed_form_optimum(seed):
    ref = tree_policy(seed)
    variation, error = distance_from_the_optimum(ref, *learn_tree(ref, seed))
    assert variation < 0.01 and abs(error) < 0.01


def test_uniform_reference_has_the_known_optimum():
    """J* of the textbook case, by hand: the tree as rlhf papers' toy, pi0 uniform, is worth 0.9005."""
    assert distance_from_the_optimum(torch.zeros(7, 3), torch.zeros(7, 3), torch.zeros(7))[1] == pytest.approx(-0.90053, abs=1e-5)


def k2_in_the_reward(scores, logprobs, ref, mask, beta):
    return ppo.kl_rewards(scores, (logprobs - ref) ** 2 / 2, torch.zeros_like(ref), mask, beta)


def k3_in_the_reward(scores, logprobs, ref, mask, beta):
    return ppo.kl_rewards(scores, (ref - logprobs).exp() - 1 + logprobs - ref, torch.zeros_like(ref), mask, beta)


def kl_maximised(scores, logprobs, ref, mask, beta):
    return ppo.kl_rewards(scores, ref, logprobs, mask, beta)


def score_on_every_token(scores, logprobs, ref, mask, beta):
    return ppo.kl_rewards(0 * scores, logprobs, ref, mask, beta) + scores[:, None] * mask


@pytest.mark.parametrize("bug", [dict(kl_rewards=k2_in_the_reward), dict(kl_rewards=k3_in_the_reward), dict(kl_rewards=kl_maximised),
                                 dict(kl_rewards=score_on_every_token), dict(gamma=0.9)], ids=lambda b: str(*b.values()))
def test_the_tree_shows_known_bugs(bug):
    """The ruler itself: each of these was found in somebody's code, and misses the optimum by far more than ours may."""
    ref = tree_policy(0)
    assert distance_from_the_optimum(ref, *learn_tree(ref, **bug))[0] > 0.05


# The policy's loss

# advantage, ratio, loss of the token, d loss / d logprob, clipped
CASES = [(1, 1.0, -1.0, -1.0, 0), (1, 1.1, -1.1, -1.1, 0), (1, 1.5, -1.2, 0.0, 1), (1, 0.5, -0.5, -0.5, 0),
         (-1, 1.0, 1.0, 1.0, 0), (-1, 0.9, 0.9, 0.9, 0), (-1, 0.5, 0.8, 0.0, 1), (-1, 1.5, 1.5, 1.5, 0), (-2, 9.0, 18.0, 18.0, 0)]


def test_policy_loss_case_by_case():
    """Too far in the good direction: no more gain, no gradient. Too far in the bad direction: the full price, undamped."""
    advantages, ratio, losses, gradients, clipped = (torch.tensor([x], dtype=torch.float64) for x in zip(*CASES))
    logprobs = ratio.log().requires_grad_()
    old, mask = torch.zeros_like(ratio), torch.ones_like(ratio)
    loss, fraction = ppo.policy_loss(logprobs, old, advantages, mask)
    loss.backward()
    assert loss.item() == pytest.approx(losses.mean().item()) == pytest.approx((-3.8 + 22.2) / 9)
    torch.testing.assert_close(logprobs.grad, gradients / len(CASES))
    assert fraction.item() == pytest.approx(clipped.mean().item()) == pytest.approx(2 / 9)
    assert not fraction.requires_grad
    for i, case in enumerate(CASES):
        one = [x[:, i:i + 1].detach() for x in (logprobs, old, advantages, mask)]
        assert [x.item() for x in ppo.policy_loss(*one)] == pytest.approx([case[2], case[4]])


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_policy_loss_by_brute_force(clip):
    logprobs, old, advantages, mask = ragged(3, poison=5.0)
    total = clipped = 0
    for i, t in tokens(mask):
        ratio = math.exp(logprobs[i, t] - old[i, t])
        gains = ratio * advantages[i, t].item(), min(max(ratio, 1 - clip), 1 + clip) * advantages[i, t].item()
        total, clipped = total - min(gains), clipped + (gains[1] < gains[0])
    loss, fraction = ppo.policy_loss(logprobs, old, advantages, mask, clip)
    assert loss.item() == pytest.approx(total / len(tokens(mask)))
    assert fraction.item() == pytest.approx(clipped / len(tokens(mask))) and clipped > 3


def test_every_token_weighs_the_same():
    """Mean over the tokens of the batch, not over answers of their means, nor over padding: 1 token of -4 beside 3 of 0."""
    zeros, mask = torch.zeros(2, 5), torch.tensor([[0, 1, 0, 0, 0], [0, 1, 1, 1, 0]])
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
    policy, fraction = ppo.policy_loss(x[0], x[1], x[2], mask)
    return torch.stack([policy, fraction, ppo.value_loss(x[0], x[1], x[2], mask)])


@pytest.mark.parametrize("garbage", [1.0, -1e4, 1e9])
def test_garbage_outside_the_mask_changes_no_loss_and_gets_no_gradient(garbage):
    x, mask = torch.stack(ragged(3, poison=0.0)[:3]), ragged(0)[0]
    clean = losses(x, mask)
    dirty = torch.where(mask.bool(), x, garbage * torch.randn_like(x)).requires_grad_()
    torch.testing.assert_close(losses(dirty, mask), clean)
    losses(dirty, mask).sum().backward()
    assert torch.equal(dirty.grad[:, mask == 0], torch.zeros_like(dirty.grad[:, mask == 0]))


def test_padding_rows_and_columns_change_no_loss():
    x, mask = torch.stack(ragged(3, poison=0.0)[:3]), ragged(0)[0]
    pad = lambda y, fill: torch.nn.functional.pad(y, (2, 3, 0, 2), value=fill)
    torch.testing.assert_close(losses(pad(x, 1.5), pad(mask, 0)), losses(x, mask))
    assert torch.equal(losses(x, 0 * mask), torch.zeros(3, dtype=x.dtype))  # nothing to learn from is 0, not NaN


# The critic's loss

@pytest.mark.parametrize("clip", [0.1, 0.2, 1.0])
def test_value_loss_by_brute_force(clip):
    values, old, returns, mask = ragged(3, poison=3.0)
    total = 0
    for i, t in tokens(mask):
        v, o, r = values[i, t].item(), old[i, t].item(), returns[i, t].item()
        total += max((v - r) ** 2, (min(max(v, o - clip), o + clip) - r) ** 2) / 2
    assert ppo.value_loss(values, old, returns, mask, clip).item() == pytest.approx(total / len(tokens(mask)))


def test_value_loss_case_by_case():
    """Near the old value: the plain half square. Moved far towards the target: held at the clip, no gradient. Moved away: full."""
    #                       near   overshot    away    overshot
    values = torch.tensor([[0.1, 0.9, -0.5, -0.9]], requires_grad=True)
    old, returns, mask = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 1.0, -1.0]]), torch.ones(1, 4)
    loss = ppo.value_loss(values, old, returns, mask)
    assert loss.item() == pytest.approx((0.9 ** 2 + 0.8 ** 2 + 1.5 ** 2 + 0.8 ** 2) / 8)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.9, 0, -1.5, 0]]) / 4)


# Frame and controller

def test_answer_mask_by_brute_force():
    """In: what produced the first answer token, and what produced the last (the end token). Out: prompt and padding."""
    prompts, lengths = torch.tensor([1, 3, 3, 7, 2]), torch.tensor([2, 8, 4, 8, 2])  # the last row: an empty answer
    mask = ppo.answer_mask(prompts, lengths, 8)
    assert mask.shape == (5, 7)
    for i, (p, n) in enumerate(zip(prompts.tolist(), lengths.tolist())):
        token = ["prompt"] * p + ["answer"] * (n - p) + ["pad"] * (8 - n)
        assert mask[i].tolist() == [float(token[t + 1] == "answer") for t in range(7)]


def test_adapt_beta():
    beta = lambda kl, n=100, horizon=1000: ppo.adapt_beta(0.5, kl, 6.0, n, horizon)
    assert beta(6.0) == 0.5                                          # on target: as it was
    assert beta(6.6) == pytest.approx(0.5 * 1.01)                    # 10% too far, a tenth of the horizon: 1% more
    assert beta(5.4) == pytest.approx(0.5 * 0.99)
    assert beta(600.0) == beta(9.0) == pytest.approx(0.5 * 1.02)     # an error counts for at most 20%
    assert beta(0.0) == beta(-3.0) == pytest.approx(0.5 * 0.98)
    assert beta(9.0, n=50) == pytest.approx(0.5 * 1.01)
    assert beta(0.0, n=1_000_000) == pytest.approx(0.5 * 0.8)        # however many answers: a negative beta would pay for leaving


# A rollout

CFG = SimpleNamespace(max_new_tokens=8, missing_end=-3.0)


@pytest.fixture(scope="module")
def models():
    """policy, reference, reward, value: four different ones, so that none can stand in for another unseen."""
    return tiny_gpt(1), tiny_gpt(3), tiny_reward(2), tiny_reward(4)


def prompt_ids():
    return [sft.render_prompt([{"role": "user", "content": p}], ENC) for p in PROMPTS]


@pytest.mark.parametrize("sampler", ["policy", "reference"])
def test_rollout_equals_a_recomputation_row_by_row_and_token_by_token(models, sampler):
    policy, reference, reward_model, value_model = models
    sampling = policy if sampler == "policy" else reference
    prompts = prompt_ids() * 2
    b = ppo.roll_out(sampling, *models, prompts, END, CFG, seed=5)
    assert b["answers"] == gpt.generate(sampling, prompts, 8, stop=END, seed=5)
    assert {bool(x) for x in b["ended"]} == {True, False} and len({len(a) for a in b["answers"]}) > 2
    T = b["ids"].shape[1]
    for k in ("mask", "logprobs", "old_logprobs", "ref_logprobs", "values"):
        assert b[k].shape == (len(prompts), T - 1)
    with torch.no_grad():
        for i, (prompt, answer) in enumerate(zip(prompts, b["answers"])):
            text = prompt + answer
            assert b["ids"][i, :len(text)].tolist() == text and b["lengths"][i] == len(text)
            assert b["mask"][i].sum() == len(answer) and bool(b["ended"][i]) == (END in answer)
            for t in range(len(prompt) - 1, len(text) - 1):  # the action that made text[t + 1], from nothing but text[:t + 1]
                seen = torch.tensor([text[:t + 1]])
                want = [m(seen)[0, -1].log_softmax(-1)[text[t + 1]] for m in (policy, reference)]
                want += [want[sampler == "reference"], value_model(seen)[0, -1]]
                got = [b[k][i, t] for k in ("logprobs", "ref_logprobs", "old_logprobs", "values")]
                assert b["mask"][i, t] == 1
                torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-4, atol=1e-5)
            score = reward_model(torch.tensor([text]))[0, -1].item() if answer[-1] == END else -3.0
            assert b["scores"][i].item() == pytest.approx(score, abs=1e-5)
    assert not any(v.requires_grad for v in b.values() if torch.is_tensor(v))


def test_a_policy_that_is_its_reference_has_no_kl(models):
    b = ppo.roll_out(models[0], models[0], tiny_gpt(1), *models[2:], prompt_ids(), END, CFG, seed=0)
    assert torch.equal(b["logprobs"], b["ref_logprobs"])
    rewards = ppo.kl_rewards(b["scores"], b["logprobs"], b["ref_logprobs"], b["mask"], 100.0)
    torch.testing.assert_close(rewards.sum(1), b["scores"])


def test_padding_of_a_rollout_reaches_no_real_token(models):
    """A row alone, and beside a much longer one: the same numbers."""
    prompts = prompt_ids()
    alone = ppo.roll_out(*models[:1], *models, prompts[:1], END, CFG, seed=3)
    n = alone["lengths"][0]
    beside = torch.cat([alone["ids"], torch.full((1, 30), END)], 1)
    for model, key in ((models[0], "logprobs"), (models[1], "ref_logprobs")):
        torch.testing.assert_close(gpt.token_logprobs(model, beside)[0, :n - 1], alone[key][0, :n - 1])
    torch.testing.assert_close(models[3](beside)[0, :n - 1], alone["values"][0, :n - 1])


# The loop

class Recorder:
    """Stands in front of a function and keeps what goes in and what comes out."""

    def __init__(self, monkeypatch, module, name):
        self.calls, function = [], getattr(module, name)
        def recorded(*args, **kwargs):
            kept = [a.detach().clone() if torch.is_tensor(a) else a for a in args]
            self.calls.append((kept, function(*args, **kwargs)))
            return self.calls[-1][1]
        monkeypatch.setattr(module, name, recorded)


def by_token(rows, mask):
    """The masked numbers of many (b, T) tensors, in a fixed order."""
    return torch.cat([x[m > 0] for x, m in zip(rows, mask)]).sort().values


def test_main_feeds_the_losses_with_what_the_equations_say(train, monkeypatch):
    rollouts, policy_calls, value_calls = (Recorder(monkeypatch, ppo, n) for n in ("roll_out", "policy_loss", "value_loss"))
    rows, policy, out = train(updates=3, epochs=2, minibatches=3, lr=1e-2, beta=0.3, lam=0.9)
    assert len(rollouts.calls) == 3 and len(policy_calls.calls) == len(value_calls.calls) == 3 * 2 * 3
    for update, (args, b) in enumerate(rollouts.calls):
        rewards = ppo.kl_rewards(b["scores"], b["logprobs"], b["ref_logprobs"], b["mask"], 0.3)
        raw, returns = gae.gae(rewards, b["values"], b["mask"], 1.0, 0.9)
        white = (raw - raw[b["mask"] > 0].mean()) / raw[b["mask"] > 0].std(correction=0)
        for epoch in range(2):  # each pass sees every answer once; whitened over the rollout, not the minibatch; returns are not
            calls = slice(update * 6 + epoch * 3, update * 6 + epoch * 3 + 3)
            logprobs, old, advantages, mask = zip(*(c[0][:4] for c in policy_calls.calls[calls]))
            values, old_values, targets, value_mask = zip(*(c[0][:4] for c in value_calls.calls[calls]))
            for seen, want in ((old, b["logprobs"]), (advantages, white), (old_values, b["values"]), (targets, returns)):
                torch.testing.assert_close(by_token(seen, mask), by_token([want], [b["mask"]]), rtol=1e-3, atol=1e-4)
            assert all(torch.equal(x, y) for x, y in zip(mask, value_mask))
        first = policy_calls.calls[update * 6]
        here = first[0][3] > 0
        assert (first[0][0] - first[0][1])[here].abs().max() < 1e-5 and first[1][1] == 0  # ratio 1, nothing clipped
        torch.testing.assert_close(value_calls.calls[update * 6][0][0][here], value_calls.calls[update * 6][0][1][here])
        assert rows[update]["val/ratio_first"] == pytest.approx(1, abs=1e-6)
    moved = policy_calls.calls[-1][0]
    assert (moved[0] - moved[1]).abs().max() > 1e-3  # while later steps see a policy that has moved
    # Four models: two learn, two are as they were.
    _, trained, reference, reward_model, value_model = rollouts.calls[0][0][:5]
    assert same_weights(reference, gpt.load_model(out / "sft.pt")[0]) and not same_weights(trained, reference)
    assert same_weights(reward_model, reward.load_reward(out / "reward.pt")[0]) and not same_weights(value_model, reward_model)
    assert same_weights(policy, trained)
    assert not any(m.training for m in (trained, reference, reward_model, value_model))  # dropout would break the ratio


def test_while_the_critic_warms_up_the_policy_waits(train, monkeypatch):
    rollouts = Recorder(monkeypatch, ppo, "roll_out")
    rows, policy, out = train(updates=4, warmup=2, lr=1e-2)
    kl = [r["objective/kl"] for r in rows]  # of the policy that an update starts with
    assert kl[:3] == pytest.approx([0, 0, 0], abs=1e-5) and abs(kl[3]) > 1e-3
    values = [args[4] for args, _ in rollouts.calls]
    assert not same_weights(values[0], reward.load_reward(out / "reward.pt")[0])
    start = gpt.load_model(out / "sft.pt")[0]
    assert not same_weights(policy, start)
    steps = Recorder(monkeypatch, training, "take_step")
    train(updates=3, warmup=2)
    stepped = [type(args[2]) for args, _ in steps.calls]  # per update: 2 epochs of 2 minibatches
    assert stepped.count(gpt.GPT) == 4 and stepped.count(reward.RewardModel) == 12 and gpt.GPT not in stepped[:8]


def test_gold_is_the_mean_grade_of_the_answers_and_teaches_nothing(train, monkeypatch, tmp_path):
    """Each answer is graded by the task of its own prompt, here a number that names it; the log is all that changes."""
    rollouts = Recorder(monkeypatch, ppo, "roll_out")
    monkeypatch.setattr(sft, "gold_hook", lambda spec, records: spec and (lambda task, answer: len(answer) + task))
    path = write(tmp_path / "tasks.jsonl", *(dict(prompt=p, task=100 * 2 ** i) for i, p in enumerate(PROMPTS)))
    task_of = {tuple(p["ids"]): p["task"] for p in ppo.load_prompts(path, ENC, 64, 8)}
    graded, policy, _ = train(gold="some:grader", prompts=str(path), rollout=5)
    for row, (args, b) in zip(graded, rollouts.calls):
        grades = [len(ENC.decode([i for i in answer if i != END])) + task_of[tuple(p)] for p, answer in zip(args[5], b["answers"])]
        assert row["objective/gold"] == pytest.approx(sum(grades) / 5)
    rows, same, _ = train(gold="", prompts=str(path), rollout=5)
    assert same_weights(policy, same) and rows == [{k: v for k, v in r.items() if k != "objective/gold"} for r in graded]


def test_learning_rate_0_changes_nothing_in_any_epoch(train):
    rows, policy, out = train(updates=3, epochs=3, lr=0.0)
    assert same_weights(policy, gpt.load_model(out / "sft.pt")[0])
    for row in rows:
        assert row["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert row["val/ratio"] == pytest.approx(1, abs=1e-6) and row["policy/approxkl_avg"] < 1e-10
        assert row["policy/clipfrac_avg"] == row["val/clipfrac_avg"] == 0
        assert row["loss/policy_avg"] == pytest.approx(0, abs=0.5)
        assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"], abs=1e-5)


def test_the_score_rises_and_beta_holds_the_policy_back(train):
    """The whole loop learns: without a penalty the score climbs and the KL with it; a large beta keeps the policy where it was."""
    settings = dict(updates=12, rollout=64, lr=2e-3, epochs=2, minibatches=1)
    free, held = train(beta=0.0, **settings)[0], train(beta=10.0, **settings)[0]
    assert free[-1]["objective/scores"] > free[0]["objective/scores"] + 1
    assert free[-1]["objective/kl"] > 1 > 0.5 > held[-1]["objective/kl"]


def test_same_seed_same_log_and_same_weights(train):
    (_, one, a), (_, two, b), (_, _, c) = (train(seed=s, ptx=0.5) for s in (7, 7, 8))
    assert (a / "ppo.jsonl").read_bytes() == (b / "ppo.jsonl").read_bytes() != (c / "ppo.jsonl").read_bytes()
    assert same_weights(one, two)


def test_offline_answers_all_come_from_the_reference(train, monkeypatch):
    rollouts, steps = Recorder(monkeypatch, ppo, "roll_out"), Recorder(monkeypatch, ppo, "policy_loss")
    rows, _, out = train(updates=3, lr=1e-2, offline=True)
    start = gpt.load_model(out / "sft.pt")[0]
    for args, b in rollouts.calls:
        assert same_weights(args[0], start)
        assert torch.equal(b["old_logprobs"], b["ref_logprobs"])
    assert not torch.equal(b["logprobs"], b["old_logprobs"])  # the policy has moved on, the samples have not
    drift = [abs(r["val/ratio_first"] - 1) for r in rows]
    assert drift[0] < 1e-6 < 1e-4 < drift[2]                  # so the ratio carries the change, from one update to the next
    args, b = rollouts.calls[2][0], rollouts.calls[2][1]
    torch.testing.assert_close(by_token([c[0][1] for c in steps.calls[8:10]], [c[0][3] for c in steps.calls[8:10]]),
                               by_token([b["ref_logprobs"]], [b["mask"]]), rtol=1e-4, atol=1e-5)


def test_offline_samples_cannot_steer_beta(train):
    """Under the reference's samples the mean log-ratio is minus a KL: a controller would lower beta for ever."""
    with pytest.raises(UserError, match="--offline with --target-kl"):
        train(offline=True, target_kl=6.0)


@pytest.mark.parametrize("bad", [dict(beta=0.0, target_kl=6.0), dict(warmup=2, updates=2), dict(warmup=5, updates=2), dict(minibatches=9)], ids=str)
def test_settings_that_would_do_nothing_are_refused(train, bad):
    """beta 0 times any factor is 0; a warmup to the end trains no policy; 8 answers make no 9 minibatches."""
    with pytest.raises(UserError, match="--" + next(iter(bad))) as e:
        train(**bad)
    assert "\n" not in str(e.value)


def test_minibatches_are_as_many_as_asked_and_of_like_size(train, monkeypatch):
    """8 answers in 5 parts are 2, 2, 2, 1, 1; torch.chunk would make four of 2."""
    batches = Recorder(monkeypatch, ppo, "minibatch_losses")
    train(updates=1, epochs=1, minibatches=5)
    assert [len(args[5]) for args, _ in batches.calls] == [2, 2, 2, 1, 1]
    assert sorted(i for args, _ in batches.calls for i in args[5].tolist()) == list(range(8))


@pytest.mark.parametrize("stop_kl, most", [(1e-9, 1), (1e9, 12), (0.0, 12)])
def test_stop_kl_takes_no_step_once_the_policy_has_moved(train, monkeypatch, stop_kl, most):
    """The first minibatch is never the reason: its ratio is 1. The second sees the move, and steps no further. 0: never."""
    steps = Recorder(monkeypatch, training, "take_step")
    rows = train(updates=1, epochs=6, minibatches=2, lr=1e-2, stop_kl=stop_kl)[0]
    models = [type(args[2]) for args, _ in steps.calls]
    assert models.count(gpt.GPT) == most and models.count(reward.RewardModel) <= 12


def test_target_kl_moves_beta_towards_it(train, monkeypatch):
    """Too little KL: beta falls, and the next update pays by it. Too much: it rises. Without a target it stays.

    Up to the first update that trains the policy the answers are the untrained policy's: their KL of 0 says nothing.
    """
    paid = Recorder(monkeypatch, ppo, "kl_rewards")
    for warmup in (0, 2):
        paid.calls.clear()
        low = train(updates=warmup + 4, warmup=warmup, lr=1e-5, beta=0.5, target_kl=6.0)[0]
        betas = [r["objective/beta"] for r in low]
        assert betas[:warmup + 2] == [0.5] * (warmup + 2) and betas[-1] < betas[-2] < 0.5
        assert betas[warmup + 2] == pytest.approx(ppo.adapt_beta(0.5, low[warmup + 1]["objective/kl"], 6.0, 8))
        assert [args[4] for args, _ in paid.calls] == betas
    high = train(updates=3, lr=3e-2, epochs=4, beta=0.5, target_kl=1e-3)[0]
    assert high[1]["objective/kl"] > 1e-3 and high[2]["objective/beta"] > high[1]["objective/beta"]
    assert [r["objective/beta"] for r in train(updates=2, lr=1e-2, beta=0.5)[0]] == [0.5, 0.5]


def test_ptx_keeps_the_policy_a_language_model(train):
    """The text's loss falls with the ptx term, and far less without it; with lr 0 in the other half, ptx is what moved it."""
    def text_loss(model, out):
        ids = torch.tensor([ENC.encode_ordinary((out / "text.txt").read_text()[:200])])[:, :30]
        return -gpt.token_logprobs(model, ids).mean().item()
    settings = dict(updates=4, epochs=2, minibatches=2, lr=3e-3)
    with_ptx, without = (train(ptx=ptx, **settings) for ptx in (2.0, 0.0))
    start = text_loss(gpt.load_model(without[2] / "sft.pt")[0], without[2])
    assert text_loss(*with_ptx[1:]) < start - 0.3
    assert text_loss(*without[1:]) > start - 0.1


def test_every_step_of_the_ptx_term_reads_another_text(train, monkeypatch, tmp_path):
    """It goes on through the text, and does not begin again in each epoch or update."""
    path = tmp_path / "sacks.txt"
    path.write_text("<|end|>\n".join(f"On day {n} the miller sold {7 * n % 100} sacks, and the dog slept.\n" for n in range(200)))
    read = Recorder(monkeypatch, gpt, "lm_loss")
    train(ptx=0.5, text=str(path), updates=3)
    assert len({str(args[1].tolist()) for args, _ in read.calls}) == len(read.calls) == 3 * 2 * 2


def test_diagnostics_by_hand():
    """Two answers, of 2 and 1 tokens. KL and entropy are sums over an answer, then means over answers; -beta * KL is no gain."""
    tensor = lambda rows: torch.tensor(rows, dtype=torch.float64)
    b = dict(logprobs=tensor([[-1, -2, 7], [-3, 7, 7]]), ref_logprobs=tensor([[-2, -4, 8], [-2, 9, 9]]), values=tensor([[1, 1, 50], [1, 50, 50]]),
             mask=tensor([[1, 1, 0], [1, 0, 0]]), scores=tensor([2, -3]), ended=torch.tensor([True, False]))
    stats = [dict(pg=1.0, vf=2.0, clipfrac=0.0, ratio=1.0, approxkl=0.0, norm=3.0, vclip=0.0),
             dict(pg=2.0, vf=4.0, clipfrac=0.5, ratio=1.5, approxkl=0.2, norm=5.0, vclip=0.5)]
    row = ppo.diagnostics(b, tensor([[2, 1, 0], [3, 0, 0]]), stats, 0.1, 1e-3, 4)
    want = {"objective/kl": 1.0, "objective/scores": -0.5, "objective/non_score_reward": -0.1, "objective/rlhf_reward": -0.6,
            "objective/entropy": 3.0, "objective/length": 1.5, "val/num_eos_tokens": 1, "objective/beta": 0.1, "episode": 10,
            "update": 4, "lr": 1e-3, "loss/policy_avg": 1.5, "loss/value_avg": 3.0, "policy/clipfrac_avg": 0.25, "val/ratio": 1.25,
            "policy/approxkl_avg": 0.1, "policy/grad_norm": 4.0, "val/clipfrac_avg": 0.25, "val/ratio_first": 1.0,
            "val/explained_variance": 1 - 5 / 2}  # errors 1, 0, 2 of returns 2, 1, 3, whose spread is 1, 1, 0
    assert {k: row[k] for k in want} == pytest.approx(want)


# Prompts and checkpoints

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}]


@pytest.mark.parametrize("record, prompt", [
    ({"prompt": "Hi"}, [{"role": "user", "content": "Hi"}]),
    ({"prompt": CHAT[:4]}, CHAT[:4]),
    ({"messages": CHAT}, CHAT[:4]),
    ({"messages": CHAT[:4]}, CHAT[:4]),
    ({"instruction": "Name two animals.", "output": "Cow, cat."}, None),
    ({"instruction": "Name two animals.", "input": "", "output": ""}, None),
    ({"instruction": "Name two animals.", "output": " \n"}, None),
    ({"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2]}, [{"role": "user", "content": "Hi"}]),
    ({"prompt": CHAT[:4], "chosen": CHAT[4:], "rejected": [{"role": "assistant", "content": "Go away."}]}, CHAT[:4]),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, [{"role": "user", "content": "Hi"}]),
    ({"chosen": CHAT, "rejected": CHAT[:4] + [{"role": "assistant", "content": "Go away."}]}, CHAT[:4]),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, [{"role": "user", "content": "Hi"}]),
], ids=["text", "messages", "chat", "chat that waits for its answer", "alpaca", "alpaca without an answer", "alpaca with a blank answer", "ranked", "what follows a prompt", "pair", "pair of chats", "transcripts"])
def test_load_prompts_reads_every_format(tmp_path, record, prompt):
    [found] = ppo.load_prompts(write(tmp_path / "p.jsonl", {**record, "user": "u1"}), ENC, 64, 8)
    if prompt is None:  # Alpaca's wording is drawn from templates
        [message] = found["prompt"]
        assert message["role"] == "user" and "Name two animals." in message["content"] and "Cow" not in message["content"]
        prompt = found["prompt"]
    assert found["prompt"] == prompt and found["user"] == "u1" and found.get("output") == record.get("output")
    assert found["ids"] == sft.render_prompt(prompt, ENC) and found["ids"][-1] == ENC._special_tokens["<|assistant|>"]


def test_long_prompts_are_left_out_aloud_and_never_cut(tmp_path, capsys):
    n = len(sft.render_prompt([{"role": "user", "content": "Hi"}], ENC))
    path = write(tmp_path / "p.jsonl", {"prompt": "Hi"}, {"prompt": "Hi " * 60}, {"prompt": "Hi"}, {"prompt": "Ho " * 60})
    assert len(ppo.load_prompts(path, ENC, n + 8, 8)) == 2  # exactly full still fits
    assert "p.jsonl: 2 of 4 prompts left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="p.jsonl: no usable prompt"):
        ppo.load_prompts(path, ENC, n + 7, 8)


def test_records_without_a_prompt_are_left_out_aloud(tmp_path, capsys):
    other = "\n\nHuman: Ho\n\nAssistant: b"
    path = write(tmp_path / "p.jsonl", {"prompt": "Hi"}, {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": other},
                 {"messages": CHAT[2:3]})  # two transcripts of different prompts; an answer to nothing
    assert len(ppo.load_prompts(path, ENC, 64, 8)) == 1
    assert "p.jsonl: 2 of 3 prompts left out" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [{"prompt": 3}, {"prompt": []}, {"prompt": [{"role": "boss", "content": "x"}]}, {"text": "Hi"}, [1], "{",
                                 {"messages": "Hi"}, {"chosen": "Hi"}], ids=str)
def test_a_bad_line_is_named_in_one_line(tmp_path, bad):
    path = write(tmp_path / "p.jsonl", {"prompt": "Hi"}, bad)
    with pytest.raises(UserError, match=r"p\.jsonl:2: ") as e:
        ppo.load_prompts(path, ENC, 64, 8)
    assert "\n" not in str(e.value)


def test_what_is_left_out_of_own_prompts_is_said_once(train, tmp_path, capsys):
    train(prompts=str(write(tmp_path / "p.jsonl", *({"prompt": p} for p in PROMPTS), {"prompt": "Hi " * 60})))
    printed = capsys.readouterr().out
    assert printed.count("left out") == 1 and printed.count("before:") == 4


def test_fewer_prompts_than_a_rollout_are_asked_again_and_more_are_all_asked(train, monkeypatch):
    rollouts = Recorder(monkeypatch, ppo, "roll_out")
    train(rollout=25, updates=2)
    asked = [[tuple(p) for p in args[5]] for args, _ in rollouts.calls]
    assert [len(a) for a in asked] == [25, 25] and all(len(set(a)) == len(PROMPTS) for a in asked)
    assert all(2 <= a.count(p) <= 3 for a in asked for p in set(a))


def test_checkpoints_of_another_tokenizer_are_refused(train, checkpoints, tmp_path):
    raw = json.loads((gpt.HERE / "data" / "tokenizer.json").read_text())
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps({**raw, "ranks": raw["ranks"][:-1]}))
    state = gpt.load_checkpoint(checkpoints / "reward.pt")
    shutil.copytree(checkpoints, tmp_path / "mixed")
    gpt.save_checkpoint(tmp_path / "mixed" / "reward.pt", **{**state, "tokenizer": str(foreign), "fingerprint": gpt.fingerprint(gpt.get_tokenizer(str(foreign)))})
    with pytest.raises(UserError, match="different tokenizers"):
        train(out=str(tmp_path / "mixed"))
    gpt.save_checkpoint(tmp_path / "mixed" / "reward.pt", **{**state, "fingerprint": "0" * 16})
    with pytest.raises(UserError, match="another tokenizer"):
        train(out=str(tmp_path / "mixed"))


def test_a_missing_reward_model_is_trained_first_with_the_same_seed_and_device(tmp_path, monkeypatch, capsys):
    class Stop(Exception):
        pass
    def stage(cfg):
        assert (cfg.out, cfg.seed, cfg.device) == (str(tmp_path), 5, "cpu")
        raise Stop
    monkeypatch.setattr(reward, "main", stage)
    with pytest.raises(Stop):
        ppo.main(ppo.Config(out=str(tmp_path), seed=5, device="cpu"))
    assert "reward.pt is missing" in capsys.readouterr().out


def test_plain_pytest_finds_the_modules():
    """`pytest`, unlike `python -m pytest`, does not put the current folder on the path."""
    code = ("import os, sys, pytest; sys.path = [p for p in sys.path if os.path.abspath(p) != os.getcwd()]; "
            "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests/test_gae.py']))")
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd=gpt.HERE, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# Training that goes wrong says so

HEALTHY = {"update": 9, "objective/kl": 2.0, "objective/entropy": 6.0, "objective/length": 10.0, "val/ratio_first": 1.0, "policy/clipfrac_avg": 0.1,
           "val/explained_variance": 0.5, "val/num_eos_tokens": 128, "objective/scores_std": 0.8}


@pytest.mark.parametrize("name, key, edge, beyond", [
    ("ratio", "val/ratio_first", 1.009, 1.02), ("ratio", "val/ratio_first", 0.991, 0.98), ("kl below 0", "objective/kl", -0.4, -0.6),
    ("kl", "objective/kl", 19.0, 21.0), ("entropy", "objective/entropy", 1.01, 0.9), ("clip", "policy/clipfrac_avg", 0.3, 0.31),
    ("value", "val/explained_variance", 0.0, -0.01), ("length", "val/num_eos_tokens", 1, 0), ("scores", "objective/scores_std", 0.051, 0.04)])
def test_each_warning_has_its_own_bound(name, key, edge, beyond):
    cfg = ppo.Config()
    assert ppo.warnings(HEALTHY, 0.5, cfg) == {} == ppo.warnings(HEALTHY | {key: edge}, 0.5, cfg)
    found = ppo.warnings(HEALTHY | {key: beyond}, 0.5, cfg)
    assert set(found) == {name} and "\n" not in found[name]


def test_bounds_that_depend_on_the_settings():
    assert ppo.warnings(HEALTHY | {"objective/kl": 30.0}, 0.5, ppo.Config(target_kl=10.0)) == {}
    assert set(ppo.warnings(HEALTHY | {"objective/kl": 50.0}, 0.5, ppo.Config(target_kl=10.0))) == {"kl"}
    assert ppo.warnings(HEALTHY | {"val/explained_variance": -1.0, "update": 4}, 0.5, ppo.Config()) == {}      # the critic has just begun
    assert ppo.warnings(HEALTHY | {"val/explained_variance": -1.0}, 0.5, ppo.Config(warmup=10)) == {}
    offline = ppo.Config(offline=True)             # samples of the reference: both are as they must be
    assert ppo.warnings(HEALTHY | {"val/ratio_first": 0.5, "objective/kl": -3.0}, 0.5, offline) == {}


def test_published_runs_warn_only_where_the_reward_was_hacked():
    """The logs in results/: healthy runs are silent, the one without a KL penalty is not."""
    found = {}
    for path in sorted((sft.Path(__file__).parent.parent / "results").glob("ppo-*seed*.jsonl")):
        log = [json.loads(line) for line in path.read_text().splitlines()]
        first = log[0]["objective/entropy"] / log[0]["objective/length"]
        found[path.stem] = {name for row in log for name in ppo.warnings(row, first, ppo.Config())}
    assert found.pop("ppo-beta-0-seed0") >= {"kl", "entropy"} and len(found) >= 6 and not any(found.values()), found


def shout(capsys):
    return [line.split("warning, update ")[1] for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "warning, update " in line]


def only(capsys, words):
    lines = [x for x in shout(capsys) if words in x]
    assert len(lines) == 1, "said, and said once"
    return lines[0]


def test_a_healthy_run_is_silent(train, capsys):
    train(updates=5, lr=1e-4)
    assert shout(capsys) == []


def test_a_ratio_that_is_not_1_is_said(train, monkeypatch, capsys):
    """Dropout in the forward pass of the update, none in that of the rollout."""
    true = gpt.token_logprobs
    monkeypatch.setattr(gpt, "token_logprobs", lambda model, ids, t=1.0: true(model, ids, t) + (0.2 if torch.is_grad_enabled() else 0.0))
    train(updates=2)
    assert "the ratio is 1.221 before the first step" in only(capsys, "ratio is")


def test_a_kl_below_0_is_said(train, monkeypatch, capsys):
    """Answers of another model than the one that is trained: here of the frozen one, without --offline."""
    true = ppo.roll_out

    def of_another(sampler, policy, reference, *rest, **how):
        b = true(reference, policy, reference, *rest, **how)
        return b | {"old_logprobs": b["logprobs"]}
    monkeypatch.setattr(ppo, "roll_out", of_another)
    train(updates=6, lr=1e-2)
    assert "cannot be below 0" in only(capsys, "KL to the reference is -")


def test_a_policy_that_runs_away_is_said(train, capsys):
    """Everything at once: KL explodes, the entropy is gone, most ratios are clipped, the values are worse than none."""
    train(updates=8, lr=1.0, beta=0.0)
    lines = shout(capsys)
    for words in ("KL to the reference has grown", "entropy fell", "of the ratios are clipped", "explained variance"):
        assert sum(words in x for x in lines) == 1, words


def test_answers_that_never_end_are_said(train, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "generate", lambda model, prompts, n, **how: [[5] * n for _ in prompts])
    train(updates=1)
    assert "no answer came to its end within 8 tokens" in only(capsys, "came to its end")


def test_a_reward_model_that_says_nothing_is_said(train, checkpoints, monkeypatch, capsys):
    true = reward.load_reward

    def flat(*args):
        model, enc = true(*args)
        torch.nn.init.zeros_(model.head.weight)
        return model, enc
    monkeypatch.setattr(reward, "load_reward", flat)
    monkeypatch.setattr(ppo.Config, "missing_end", 0.0)
    train(updates=1, missing_end=-0.43)
    assert "same score" in only(capsys, "score")
