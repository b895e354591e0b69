"""What GAE and whitening must satisfy, each stated once. Slow references are plain Python, written from the definitions.

Batches are ragged and poisoned: outside the mask, rewards and values are NaN, so that nothing there leaks in unseen.
"""
import math
import runpy
import sys

import pytest
import torch

import gae as gae_module
from gae import Config, gae, main, whiten


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


GAMMA_LAM = [(1.0, 0.95), (1.0, 0.0), (1.0, 1.0), (0.9, 0.95), (0.9, 0.5), (0.0, 0.95)]


def ragged(seed=0, T=12, poison=math.nan):
    """Random (rewards, values, mask), (B, T) fp64: the degenerate rows first, then random runs. poison fills the rest."""
    g = torch.Generator().manual_seed(seed)
    runs = [(0, T), (4, T), (4, 5), (T - 1, T), (0, 1), (T, T)]  # full row, no end token, length 1 three times, empty
    for _ in range(6):
        start = torch.randint(T, (1,), generator=g).item()
        runs.append((start, torch.randint(start, T + 1, (1,), generator=g).item()))
    mask = torch.zeros(len(runs), T, dtype=torch.long)
    for row, (start, end) in zip(mask, runs):
        row[start:end] = 1
    fill = torch.full(mask.shape, poison, dtype=torch.float64)
    rewards, values = torch.randn(2, *mask.shape, generator=g, dtype=torch.float64)
    rewards, values = (torch.where(mask.bool(), x, fill) for x in (rewards, values))
    return rewards, values, mask


def episodes(rewards, values, mask):
    """Yield (row, start, r, v) with r and v plain lists over the response only: what a reference may look at."""
    for i, row in enumerate(mask.tolist()):
        if 1 in row:
            start, n = row.index(1), sum(row)
            yield i, start, rewards[i, start:start + n].tolist(), values[i, start:start + n].tolist()


def reference(batch, advantage):
    """(B, T) of advantage(r, v, t) at response step t, 0 elsewhere."""
    out = torch.zeros_like(batch[0])
    for i, start, r, v in episodes(*batch):
        for t in range(len(r)):
            out[i, start + t] = advantage(r, v, t)
    return out


def td_error(r, v, t, gamma):
    return r[t] + (gamma * v[t + 1] if t + 1 < len(v) else 0.0) - v[t]


def n_step(r, v, t, n, gamma):
    """n real rewards, then the critic, which is worth 0 past the end."""
    rewards = sum(gamma ** l * r[t + l] for l in range(min(n, len(r) - t)))
    return rewards + (gamma ** n * v[t + n] if t + n < len(v) else 0.0) - v[t]


# What it computes

@pytest.mark.parametrize("gamma, lam", GAMMA_LAM)
@pytest.mark.parametrize("seed", range(3))
def test_is_the_discounted_sum_of_td_errors(gamma, lam, seed):
    batch = ragged(seed)
    def definition(r, v, t):
        return sum((gamma * lam) ** l * td_error(r, v, t + l, gamma) for l in range(len(r) - t))
    torch.testing.assert_close(gae(*batch, gamma, lam)[0], reference(batch, definition))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_0_is_one_step_td(gamma):
    batch = ragged()
    torch.testing.assert_close(gae(*batch, gamma, 0.0)[0], reference(batch, lambda r, v, t: n_step(r, v, t, 1, gamma)))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_1_is_the_monte_carlo_return_minus_the_value(gamma):
    batch = ragged()
    monte_carlo = reference(batch, lambda r, v, t: sum(gamma ** l * x for l, x in enumerate(r[t:])) - v[t])
    torch.testing.assert_close(gae(*batch, gamma, 1.0)[0], monte_carlo)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5)])
def test_is_the_lambda_mixture_of_all_n_step_advantages(gamma, lam):
    """(1-lam) * sum of lam^(n-1) A(n); every n past the end is Monte Carlo, so the last one collects lam^(N-1) in all."""
    def mixture(r, v, t):
        last = len(r) - t
        head = sum((1 - lam) * lam ** (n - 1) * n_step(r, v, t, n, gamma) for n in range(1, last))
        return head + lam ** (last - 1) * n_step(r, v, t, last, gamma)
    batch = ragged()
    torch.testing.assert_close(gae(*batch, gamma, lam)[0], reference(batch, mixture))


def test_the_defaults_are_gamma_1_and_lambda_95():
    batch = ragged()
    for got, want in zip(gae(*batch), gae(*batch, 1.0, 0.95)):
        assert torch.equal(got, want)
    assert Config() == Config(gamma=1.0, lam=0.95)


# rewards, values, mask, each (1, T)
WORKED = torch.tensor([[-.02, .02, .97, 0]]), torch.tensor([[.5, .6, .8, .9]]), torch.tensor([[1, 1, 1, 0]])


def test_worked_example():
    """beta .1, k1 [.2, -.2, .3], score 1 on the end token; the critic's .9 on the padding must not matter."""
    advantages, returns = gae(*WORKED, 1.0, 0.95)
    torch.testing.assert_close(gae(*WORKED, 1.0, 0.0)[0], torch.tensor([[.08, .22, .17, 0]]))
    torch.testing.assert_close(advantages, torch.tensor([[.442425, .3815, .17, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[.942425, .9815, .97, 0]]))
    torch.testing.assert_close(whiten(advantages, WORKED[2]), torch.tensor([[.951809, .429934, -1.381743, 0]]))


def test_perfect_critic_leaves_nothing_to_learn():
    """V = reward still to come, and the critic goes on saying 1 after the end: a known bug gives [1, 0, 0, 1] here."""
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
    to_go = reference((rewards, values, mask), lambda r, v, t: sum(gamma ** l * x for l, x in enumerate(r[t:])))
    values = torch.where(mask.bool(), to_go, values)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, torch.zeros_like(values))
    torch.testing.assert_close(returns, to_go)


def test_a_score_on_the_last_token_is_the_return_of_every_token():
    """Terminal reward, gamma 1, lambda 1: whatever the critic says, each token's target is the score of its response."""
    _, values, mask = ragged()
    score = torch.randn(len(mask), 1, dtype=torch.float64)
    last = mask.bool() & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    advantages, returns = gae(last * score, values, mask, 1.0, 1.0)
    torch.testing.assert_close(returns, mask * score)
    torch.testing.assert_close(advantages, torch.where(mask.bool(), score - values, 0))


def test_a_score_reaches_k_tokens_back_with_weight_lambda_to_the_k():
    rewards, mask = torch.tensor([[0., 0, 0, 0, 1]]), torch.tensor([[0, 1, 1, 1, 1]])
    torch.testing.assert_close(gae(rewards, torch.zeros(1, 5), mask, 1.0, 0.5)[0], torch.tensor([[0, .125, .25, .5, 1]]))


@pytest.mark.parametrize("gamma, lam", GAMMA_LAM)
def test_returns_are_unwhitened_advantages_plus_values(gamma, lam):
    rewards, values, mask = ragged()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(returns, torch.where(mask.bool(), advantages + values, 0))
    # Made before whitening: in ten times larger units all of it is ten times larger. A whitened part would not grow.
    ten = gae(10 * rewards, 10 * values, mask, gamma, lam)
    torch.testing.assert_close(ten[0], 10 * advantages)
    torch.testing.assert_close(ten[1], 10 * returns)


# Where a response begins and ends

def test_end_token_first():
    """A response of one token has no future: A = r - V and return = r, for every lambda, wherever the token stands."""
    for column in range(4):
        mask = torch.zeros(1, 4, dtype=torch.bool)
        mask[0, column] = True
        for lam in (0.0, 0.95, 1.0):
            advantages, returns = gae(torch.full((1, 4), 2.0), torch.full((1, 4), 0.5), mask, 1.0, lam)
            assert torch.equal(advantages, 1.5 * mask)
            assert torch.equal(returns, 2.0 * mask)


def test_a_response_cut_at_the_edge_ends_there_like_any_other():
    """No end token, or one in the last column: the same numbers as with room for padding behind it, so no bootstrap."""
    rewards, values = torch.randn(2, 3, 5)
    full = gae(rewards, values, torch.ones(3, 5))
    roomy = gae(*(torch.cat([x, fill], 1) for x, fill in
                  ((rewards, torch.ones(3, 2)), (values, torch.ones(3, 2)), (torch.ones(3, 5), torch.zeros(3, 2)))))
    for x, y in zip(full, roomy):
        assert torch.equal(x, y[:, :5])
    torch.testing.assert_close(full[0][:, -1], rewards[:, -1] - values[:, -1])


def test_nothing_outside_the_mask():
    batch = ragged()
    for x in gae(*batch):
        assert torch.equal(x[batch[2] == 0], torch.zeros_like(x[batch[2] == 0]))  # equal also says: no NaN


def test_all_zero_rows_and_empty_batches():
    for B, T in ((2, 3), (0, 3), (2, 0)):
        for x in gae(torch.full((B, T), math.nan), torch.full((B, T), math.inf), torch.zeros(B, T)):
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
    rewards, values, mask = ragged()
    pad = lambda x, fill: torch.nn.functional.pad(x, (left, right), value=fill)
    wide = gae(pad(rewards, 3.0), pad(values, -2.0), pad(mask, 0))
    for x, y in zip(gae(rewards, values, mask), wide):
        assert torch.equal(pad(x, 0.0), y)


def test_batch_composition_changes_nothing():
    batch = ragged()
    together = gae(*batch)
    for i in range(len(batch[0])):
        for x, y in zip(together, gae(*(z[i:i + 1] for z in batch))):
            assert torch.equal(x[i:i + 1], y)


def test_credit_flows_backwards_only():
    """A reward is credited to its own token and to those before it: the later ones could not have caused it."""
    rewards, values, mask = torch.zeros(1, 6), torch.randn(1, 6), torch.tensor([[0, 1, 1, 1, 1, 0]])
    before, _ = gae(rewards, values, mask)
    rewards[0, 3] += 1
    changed = gae(rewards, values, mask)[0] != before
    assert changed.tolist() == [[False, True, True, True, False, False]]


def test_a_second_run_is_a_second_episode():
    x, gap = torch.randn(2, 1, 5), torch.tensor([[1, 1, 0, 1, 1]])
    advantages, _ = gae(x[0], x[1], gap)
    first, second = (gae(x[0], x[1], gap * torch.tensor(part))[0] for part in ([[1, 1, 1, 0, 0]], [[0, 0, 1, 1, 1]]))
    assert torch.equal(advantages, first + second)


# What it takes and refuses

def test_gradients_do_not_flow():
    rewards, values = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    mask = torch.ones(2, 3)
    advantages, returns = gae(rewards, values, mask)
    for x in (advantages, returns, whiten(values, mask)):
        assert not x.requires_grad
        (values.sum() + (values * x).sum()).backward()  # made under no_grad, but usable in a loss: not inference tensors


def test_inputs_are_left_alone():
    batch = ragged()
    copies = [x.clone() for x in batch]
    whiten(gae(*batch)[0], batch[2])
    for x, y in zip(batch, copies):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_any_mask_type_and_at_least_fp32():
    rewards, values, mask = ragged()
    for kind in (torch.bool, torch.int32, torch.float32):
        assert torch.equal(gae(rewards, values, mask.to(kind))[0], gae(rewards, values, mask)[0])
        assert torch.equal(whiten(rewards, mask.to(kind)), whiten(rewards, mask))
    half = gae(WORKED[0].bfloat16(), WORKED[1].bfloat16(), WORKED[2])
    assert [x.dtype for x in half] == [torch.float32] * 2
    assert [x.dtype for x in gae(*ragged())] == [torch.float64] * 2
    integers = gae(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), torch.ones(1, 2))[1]
    torch.testing.assert_close(integers, torch.tensor([[.95, 1.0]]))
    assert whiten(WORKED[1].bfloat16(), WORKED[2]).dtype == torch.float32


@pytest.mark.parametrize("shapes", [((2, 4), (2, 5), (2, 4)), ((2, 4), (2, 4), (2, 1)), ((2, 4), (1, 4), (2, 4)),
                                    ((2,), (2, 4), (2, 4)), ((4,), (4,), (4,)), ((2, 4, 1), (2, 4, 1), (2, 4, 1))])
def test_wrong_shapes_are_refused_not_broadcast(shapes):
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        gae(*(torch.ones(s) for s in shapes))


@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan, math.inf])
def test_gamma_and_lambda_outside_0_1_are_refused(name, bad):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\]"):
        gae(*ragged(), **{name: bad})


# Whitening

def masked(x, mask):
    return x[mask.bool()]


def test_whitened_mean_0_and_biased_variance_1_over_the_whole_batch():
    rewards, _, mask = ragged()
    x = whiten(3 * rewards + 5, mask)
    assert masked(x, mask).mean().item() == pytest.approx(0, abs=1e-12)
    assert masked(x, mask).var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert masked(x, mask).var(correction=1).item() != pytest.approx(1, abs=1e-3)
    assert torch.equal(x[mask == 0], torch.zeros_like(x[mask == 0]))


def test_a_better_answer_stays_better():
    """Per-row whitening would give two identical rows; the whole batch's keeps that row 0 beat row 1."""
    x = torch.tensor([[1., 1, 0], [-1, -1, -1]]), torch.tensor([[1, 1, 0], [1, 1, 0]])
    torch.testing.assert_close(whiten(*x), torch.tensor([[1., 1, 0], [-1, -1, 0]]))
    shape = torch.tensor([[2., 3], [0, 1]]), torch.ones(2, 2)
    torch.testing.assert_close(whiten(*shape), (shape[0] - 1.5) / math.sqrt(1.25))


def test_whitening_ignores_shift_scale_padding_and_order():
    rewards, _, mask = ragged()
    x = whiten(rewards, mask)
    torch.testing.assert_close(whiten(rewards + 100, mask), x)
    torch.testing.assert_close(whiten(rewards * 20, mask), x, rtol=1e-6, atol=1e-6)  # up to eps
    torch.testing.assert_close(whiten(-rewards, mask), -x)
    pad = lambda y, fill: torch.nn.functional.pad(y, (1, 4, 0, 2), value=fill)
    torch.testing.assert_close(whiten(pad(rewards, math.inf), pad(mask, 0)), pad(x, 0.0))
    order = torch.randperm(len(rewards))
    torch.testing.assert_close(whiten(rewards[order], mask[order]), x[order])


def test_whitening_eps_stands_under_the_root():
    x = torch.tensor([[1e-4, -1e-4]])  # variance 1e-8 = eps
    torch.testing.assert_close(whiten(x, torch.ones(1, 2)), torch.tensor([[1., -1]]) / math.sqrt(2))


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

def test_the_printed_lesson(capsys):
    main(Config())
    out = capsys.readouterr().out
    for number in (".442425", ".381500", ".170000", ".942425", ".981500", ".970000", "0.9518", "-1.3817", "0.424175"):
        assert number in out, number
    lines = [line.split() for line in out.splitlines()]
    side_by_side = lines.index(["action", "0", ".95", "1", "0", ".95", "1"])
    assert lines[side_by_side + 1] == "a 0.0800 0.4424 0.4700 0.5800 0.9424 0.9700".split()


@pytest.mark.parametrize("lam, first", [("0", "0.080000"), ("0.5", "0.232500"), ("1", "0.470000")])
def test_the_command_line(lam, first, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gae.py", "--lam", lam])
    runpy.run_path(gae_module.__file__, run_name="__main__")
    out = capsys.readouterr().out
    assert f"the first A, {first}," in out
    parts = [float(line.split("=")[2].split()[0]) for line in out.splitlines() if line.startswith("  n = ")]
    assert sum(parts) == pytest.approx(float(first), abs=2e-6)  # the printed n-step parts add up to the printed A


def test_an_unknown_flag_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gae.py", "--lambda", "1"])
    with pytest.raises(SystemExit):
        runpy.run_path(gae_module.__file__, run_name="__main__")
    assert "--lambda" in capsys.readouterr().err
