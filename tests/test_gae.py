"""What GAE and whitening must satisfy, checked against slow plain Python from the definitions.

Batches are ragged and poisoned: rewards and values are NaN outside the mask, so a leak cannot go
unnoticed.
"""
import math
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F

import gae as gae_module
from gae import Config, gae, main, whiten


pytestmark = pytest.mark.usefixtures("seeded")

GAMMA_LAM = [
    (1.0, 0.95),
    (1.0, 0.0),
    (1.0, 1.0),
    (0.9, 0.95),
    (0.9, 0.5),
    (0.0, 0.95),
]
T = 12


def ragged(seed=0, poison=math.nan):
    """Return random rewards, values and mask, each (B, T), fp64.

    The degenerate rows come first, then six random ones. `poison` fills what is outside the mask.
    """
    g = torch.Generator().manual_seed(seed)
    runs = [
        (0, T),      # the whole row
        (4, T),      # no end token
        (4, 5),      # one token, in three places
        (T - 1, T),
        (0, 1),
        (T, T),      # empty
    ]
    for _ in range(6):
        start = torch.randint(T, (1,), generator=g).item()
        end = torch.randint(start, T + 1, (1,), generator=g).item()
        runs.append((start, end))
    mask = torch.zeros(len(runs), T, dtype=torch.long)
    for row, (start, end) in zip(mask, runs):
        row[start:end] = 1
    fill = torch.full(mask.shape, poison, dtype=torch.float64)
    rewards, values = torch.randn(2, *mask.shape, generator=g, dtype=torch.float64)
    rewards = torch.where(mask.bool(), rewards, fill)
    values = torch.where(mask.bool(), values, fill)
    return rewards, values, mask


def reference(batch, advantage):
    """Return (B, T): advantage(r, v, t) at step t of each response, 0 elsewhere.

    r and v are lists of the rewards and values of one response, so a reference sees nothing else.
    """
    rewards, values, mask = batch
    out = torch.zeros_like(rewards)
    for i, row in enumerate(mask.tolist()):
        n = sum(row)
        if n == 0:
            continue
        start = row.index(1)
        r = rewards[i, start:start + n].tolist()
        v = values[i, start:start + n].tolist()
        for t in range(n):
            out[i, start + t] = advantage(r, v, t)
    return out


def discounted_sum(rewards, gamma):
    return sum(gamma ** k * r for k, r in enumerate(rewards))


def n_step(r, v, t, n, gamma):
    """n rewards, then the critic's value, which is 0 after the end."""
    value_after = v[t + n] if t + n < len(v) else 0.0
    return discounted_sum(r[t:t + n], gamma) + gamma ** n * value_after - v[t]


# What it computes

@pytest.mark.parametrize("gamma, lam", GAMMA_LAM)
@pytest.mark.parametrize("seed", range(3))
def test_is_the_discounted_sum_of_td_errors(gamma, lam, seed):
    def definition(r, v, t):
        td_errors = [n_step(r, v, k, 1, gamma) for k in range(t, len(r))]
        return discounted_sum(td_errors, gamma * lam)

    batch = ragged(seed)
    torch.testing.assert_close(gae(*batch, gamma, lam)[0], reference(batch, definition))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_0_is_one_step_td(gamma):
    batch = ragged()
    one_step = reference(batch, lambda r, v, t: n_step(r, v, t, 1, gamma))
    torch.testing.assert_close(gae(*batch, gamma, 0.0)[0], one_step)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_1_is_the_monte_carlo_return_minus_the_value(gamma):
    batch = ragged()
    monte_carlo = reference(batch, lambda r, v, t: discounted_sum(r[t:], gamma) - v[t])
    torch.testing.assert_close(gae(*batch, gamma, 1.0)[0], monte_carlo)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5)])
def test_is_the_lambda_mixture_of_all_n_step_advantages(gamma, lam):
    """A = (1-lam) * sum over n of lam^(n-1) A(n).

    Every n past the end gives the Monte Carlo advantage, so the last term takes all their weights,
    which sum to lam^(N-1).
    """
    def mixture(r, v, t):
        last = len(r) - t
        total = lam ** (last - 1) * n_step(r, v, t, last, gamma)
        for n in range(1, last):
            total += (1 - lam) * lam ** (n - 1) * n_step(r, v, t, n, gamma)
        return total

    batch = ragged()
    torch.testing.assert_close(gae(*batch, gamma, lam)[0], reference(batch, mixture))


def test_the_defaults_are_gamma_1_and_lambda_95():
    batch = ragged()
    for got, want in zip(gae(*batch), gae(*batch, 1.0, 0.95)):
        assert torch.equal(got, want)
    assert Config() == Config(gamma=1.0, lam=0.95)


# rewards, values, mask, each (1, T)
WORKED = (
    torch.tensor([[-.02, .02, .97, 0]]),
    torch.tensor([[.5, .6, .8, .9]]),
    torch.tensor([[1, 1, 1, 0]]),
)


def test_worked_example():
    """beta is .1, k1 is [.2, -.2, .3], the end token scores 1; the value .9 is on padding."""
    td_errors, _ = gae(*WORKED, 1.0, 0.0)
    torch.testing.assert_close(td_errors, torch.tensor([[.08, .22, .17, 0]]))
    advantages, returns = gae(*WORKED, 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.tensor([[.442425, .3815, .17, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[.942425, .9815, .97, 0]]))
    whitened = whiten(advantages, WORKED[2])
    torch.testing.assert_close(whitened, torch.tensor([[.951809, .429934, -1.381743, 0]]))


def test_perfect_critic_leaves_nothing_to_learn():
    """V is the reward still to come, and stays 1 after the end. A known bug gives [1, 0, 0, 1]."""
    rewards = torch.tensor([[0., 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    for lam in (0.0, 0.95, 1.0):
        advantages, returns = gae(rewards, torch.ones(2, 5), mask, 1.0, lam)
        assert torch.equal(advantages, torch.zeros(2, 5))
        assert torch.equal(returns, mask.float())
    assert torch.equal(whiten(advantages, mask), torch.zeros(2, 5))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_perfect_critic_of_random_rewards(gamma, lam):
    rewards, values, mask = ragged(poison=7.0)
    batch = rewards, values, mask
    to_go = reference(batch, lambda r, v, t: discounted_sum(r[t:], gamma))
    perfect = torch.where(mask.bool(), to_go, values)
    advantages, returns = gae(rewards, perfect, mask, gamma, lam)
    torch.testing.assert_close(advantages, torch.zeros_like(perfect))
    torch.testing.assert_close(returns, to_go)


def test_a_score_on_the_last_token_is_the_return_of_every_token():
    """Terminal reward, gamma 1, lambda 1: each return is the response's score, whatever V is."""
    _, values, mask = ragged()
    score = torch.randn(len(mask), 1, dtype=torch.float64)                 # (B, 1)
    last = mask.bool() & (mask.cumsum(1) == mask.sum(1, keepdim=True))     # (B, T)
    advantages, returns = gae(last * score, values, mask, 1.0, 1.0)
    torch.testing.assert_close(returns, mask * score)
    torch.testing.assert_close(advantages, torch.where(mask.bool(), score - values, 0))


def test_a_score_reaches_k_tokens_back_with_weight_lambda_to_the_k():
    rewards = torch.tensor([[0., 0, 0, 0, 1]])
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    advantages, _ = gae(rewards, torch.zeros(1, 5), mask, 1.0, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0, .125, .25, .5, 1]]))


@pytest.mark.parametrize("gamma, lam", GAMMA_LAM)
def test_returns_are_unwhitened_advantages_plus_values(gamma, lam):
    rewards, values, mask = ragged()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(returns, torch.where(mask.bool(), advantages + values, 0))
    # In units ten times larger, everything is ten times larger. A whitened part would not scale.
    ten_advantages, ten_returns = gae(10 * rewards, 10 * values, mask, gamma, lam)
    torch.testing.assert_close(ten_advantages, 10 * advantages)
    torch.testing.assert_close(ten_returns, 10 * returns)


# Where a response begins and ends

def test_end_token_first():
    """A response of one token has no future: A = r - V and return = r, at any lambda and place."""
    for column in range(4):
        mask = torch.zeros(1, 4, dtype=torch.bool)
        mask[0, column] = True
        for lam in (0.0, 0.95, 1.0):
            rewards = torch.full((1, 4), 2.0)
            advantages, returns = gae(rewards, torch.full((1, 4), 0.5), mask, 1.0, lam)
            assert torch.equal(advantages, 1.5 * mask)
            assert torch.equal(returns, 2.0 * mask)


def test_a_response_cut_at_the_edge_ends_there_like_any_other():
    """A response in the last column gives the same numbers as with padding behind it.

    So it is not bootstrapped, with or without an end token.
    """
    rewards, values = torch.randn(2, 3, 5)
    full = gae(rewards, values, torch.ones(3, 5))
    roomy = gae(
        F.pad(rewards, (0, 2), value=1.0),
        F.pad(values, (0, 2), value=1.0),
        F.pad(torch.ones(3, 5), (0, 2), value=0.0),
    )
    for x, y in zip(full, roomy):
        assert torch.equal(x, y[:, :5])
    torch.testing.assert_close(full[0][:, -1], rewards[:, -1] - values[:, -1])


def test_nothing_outside_the_mask():
    rewards, values, mask = ragged()
    for x in gae(rewards, values, mask):
        outside = x[mask == 0]
        assert torch.equal(outside, torch.zeros_like(outside))  # NaN equals nothing, so no NaN


@pytest.mark.parametrize("B, T", [(2, 3), (0, 3), (2, 0)])
def test_all_zero_rows_and_empty_batches(B, T):
    rewards = torch.full((B, T), math.nan)
    values = torch.full((B, T), math.inf)
    for x in gae(rewards, values, torch.zeros(B, T)):
        assert torch.equal(x, torch.zeros(B, T))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30, 1.0])
@pytest.mark.parametrize("where", ["rewards", "values"])
def test_garbage_outside_the_mask_changes_nothing(garbage, where):
    rewards, values, mask = ragged(poison=0.0)
    clean = gae(rewards, values, mask)
    dirty = {"rewards": rewards, "values": values}
    dirty[where] = torch.where(mask.bool(), dirty[where], garbage)
    for x, y in zip(clean, gae(**dirty, mask=mask)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("left, right", [(3, 0), (0, 3), (2, 5)])
def test_padding_columns_change_nothing(left, right):
    def pad(x, fill):
        return F.pad(x, (left, right), value=fill)

    rewards, values, mask = ragged()
    wide = gae(pad(rewards, 3.0), pad(values, -2.0), pad(mask, 0))
    for x, y in zip(gae(rewards, values, mask), wide):
        assert torch.equal(pad(x, 0.0), y)


def test_batch_composition_changes_nothing():
    rewards, values, mask = ragged()
    together = gae(rewards, values, mask)
    for i in range(len(mask)):
        alone = gae(rewards[i:i + 1], values[i:i + 1], mask[i:i + 1])
        for x, y in zip(together, alone):
            assert torch.equal(x[i:i + 1], y)


def test_credit_flows_backwards_only():
    """A reward is credited to its token and those before it: later ones cannot have caused it."""
    rewards = torch.zeros(1, 6)
    values = torch.randn(1, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0]])
    before, _ = gae(rewards, values, mask)
    rewards[0, 3] += 1
    after, _ = gae(rewards, values, mask)
    assert (after != before).tolist() == [[False, True, True, True, False, False]]


def test_a_second_run_is_a_second_episode():
    rewards, values = torch.randn(2, 1, 5)
    both, _ = gae(rewards, values, torch.tensor([[1, 1, 0, 1, 1]]))
    first, _ = gae(rewards, values, torch.tensor([[1, 1, 0, 0, 0]]))
    second, _ = gae(rewards, values, torch.tensor([[0, 0, 0, 1, 1]]))
    assert torch.equal(both, first + second)


# What it accepts and refuses

def test_gradients_do_not_flow():
    rewards = torch.randn(2, 3, requires_grad=True)
    values = torch.randn(2, 3, requires_grad=True)
    mask = torch.ones(2, 3)
    advantages, returns = gae(rewards, values, mask)
    for x in (advantages, returns, whiten(values, mask)):
        assert not x.requires_grad
        # A loss can use them: they come from no_grad and are not inference tensors.
        (values.sum() + (values * x).sum()).backward()


def test_inputs_are_left_alone():
    rewards, values, mask = ragged()
    copies = [x.clone() for x in (rewards, values, mask)]
    advantages, _ = gae(rewards, values, mask)
    whiten(advantages, mask)
    for x, y in zip((rewards, values, mask), copies):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32], ids=str)
def test_any_mask_type_gives_the_same(kind):
    rewards, values, mask = ragged()
    assert torch.equal(gae(rewards, values, mask.to(kind))[0], gae(rewards, values, mask)[0])
    assert torch.equal(whiten(rewards, mask.to(kind)), whiten(rewards, mask))


def test_results_are_at_least_fp32():
    rewards, values, mask = WORKED
    half = gae(rewards.bfloat16(), values.bfloat16(), mask)
    assert [x.dtype for x in half] == [torch.float32] * 2
    assert [x.dtype for x in gae(*ragged())] == [torch.float64] * 2
    _, returns = gae(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), torch.ones(1, 2))  # integers
    torch.testing.assert_close(returns, torch.tensor([[.95, 1.0]]))
    assert whiten(values.bfloat16(), mask).dtype == torch.float32


@pytest.mark.parametrize("shapes", [
    ((2, 4), (2, 5), (2, 4)),
    ((2, 4), (2, 4), (2, 1)),
    ((2, 4), (1, 4), (2, 4)),
    ((2,), (2, 4), (2, 4)),
    ((4,), (4,), (4,)),
    ((2, 4, 1), (2, 4, 1), (2, 4, 1)),
], ids=str)
def test_wrong_shapes_are_refused_not_broadcast(shapes):
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        gae(*(torch.ones(s) for s in shapes))


@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan, math.inf])
def test_gamma_and_lambda_outside_0_1_are_refused(name, bad):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\]"):
        gae(*ragged(), **{name: bad})


# Whitening

def test_whitened_mean_is_0_and_biased_variance_1_over_the_whole_batch():
    rewards, _, mask = ragged()
    x = whiten(3 * rewards + 5, mask)
    inside = x[mask == 1]
    assert inside.mean().item() == pytest.approx(0, abs=1e-12)
    assert inside.var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert inside.var(correction=1).item() != pytest.approx(1, abs=1e-3)
    outside = x[mask == 0]
    assert torch.equal(outside, torch.zeros_like(outside))


def test_a_better_response_stays_better():
    """Whitening each row would make both rows equal; whitening the batch keeps row 0 ahead."""
    x = torch.tensor([[1., 1, 0], [-1, -1, -1]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[1., 1, 0], [-1, -1, 0]]))
    x = torch.tensor([[2., 3], [0, 1]])
    torch.testing.assert_close(whiten(x, torch.ones(2, 2)), (x - 1.5) / math.sqrt(1.25))


def test_whitening_ignores_shift_scale_padding_and_order():
    def pad(y, fill):
        return F.pad(y, (1, 4, 0, 2), value=fill)

    rewards, _, mask = ragged()
    x = whiten(rewards, mask)
    torch.testing.assert_close(whiten(rewards + 100, mask), x)
    torch.testing.assert_close(whiten(rewards * 20, mask), x, rtol=1e-6, atol=1e-6)  # up to eps
    torch.testing.assert_close(whiten(-rewards, mask), -x)
    torch.testing.assert_close(whiten(pad(rewards, math.inf), pad(mask, 0)), pad(x, 0.0))
    order = torch.randperm(len(rewards))
    torch.testing.assert_close(whiten(rewards[order], mask[order]), x[order])


def test_whitening_eps_is_added_under_the_root():
    x = torch.tensor([[1e-4, -1e-4]])  # variance 1e-8 = eps
    want = torch.tensor([[1., -1]]) / math.sqrt(2)
    torch.testing.assert_close(whiten(x, torch.ones(1, 2)), want)


def test_whitening_one_element_none_and_a_constant():
    x = torch.tensor([[3., math.nan]])
    assert torch.equal(whiten(x, torch.tensor([[1, 0]])), torch.zeros(1, 2))
    assert torch.equal(whiten(x, torch.tensor([[0, 0]])), torch.zeros(1, 2))
    assert torch.equal(whiten(torch.zeros(0, 2), torch.zeros(0, 2)), torch.zeros(0, 2))
    assert torch.equal(whiten(torch.full((2, 2), 0.5), torch.ones(2, 2)), torch.zeros(2, 2))


def test_whitening_refuses_another_shape():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 1\)"):
        whiten(torch.ones(2, 3), torch.ones(2, 1))


# Running the file

def run_script(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gae.py", *flags])
    runpy.run_path(gae_module.__file__, run_name="__main__")


def test_the_printed_lesson(capsys):
    main(Config())
    out = capsys.readouterr().out
    advantages = (".442425", ".381500", ".170000")
    returns = (".942425", ".981500", ".970000")
    whitened_and_first_n_step = ("0.9518", "-1.3817", "0.424175")
    for number in (*advantages, *returns, *whitened_and_first_n_step):
        assert number in out, number
    lines = [line.split() for line in out.splitlines()]
    side_by_side = lines.index(["action", "0", ".95", "1", "0", ".95", "1"])
    assert lines[side_by_side + 1] == "a 0.0800 0.4424 0.4700 0.5800 0.9424 0.9700".split()


@pytest.mark.parametrize("lam, first", [("0", "0.080000"), ("0.5", "0.232500"), ("1", "0.470000")])
def test_the_printed_n_step_parts_add_up_to_the_printed_advantage(lam, first, capsys, monkeypatch):
    run_script(monkeypatch, "--lam", lam)
    out = capsys.readouterr().out
    assert f"The first A, {first}," in out
    n_step_lines = [line for line in out.splitlines() if line.startswith("  n = ")]
    parts = [float(line.split("=")[2].split()[0]) for line in n_step_lines]
    assert sum(parts) == pytest.approx(float(first), abs=2e-6)


def test_an_unknown_flag_is_an_error(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "--lambda", "1")
    assert "--lambda" in capsys.readouterr().err
