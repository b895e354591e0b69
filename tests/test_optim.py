"""Tests of scaffold/optim.py: AdamW, Muon and the schedule of their learning rate."""

import math

import pytest
import torch

from scaffold import optim
from scaffold.optim import adamw, lr_at, muon, orthogonalize
from tiny import assert_close, random_gpt


def test_learning_rate():
    rates = {
        schedule: [lr_at(step, 200, 2.0, schedule) for step in range(200)]
        for schedule in ("cosine", "constant", "linear")
    }
    for rate in rates.values():
        # The warmup is a twentieth of the steps and does not start at 0.
        assert rate[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
        assert max(rate) == rate[10]
        assert rate[10] == pytest.approx(2.0)
    assert set(rates["constant"][9:]) == {2.0}
    for name in ("cosine", "linear"):
        assert all(a > b for a, b in zip(rates[name][10:], rates[name][11:]))
        assert rates[name][-1] == pytest.approx(0.2, abs=0.02)
        assert lr_at(200, 200, 2.0, name) == pytest.approx(0.2)
        assert rates[name][105] == pytest.approx(1.1)  # halfway between peak and floor
    assert rates["cosine"][57] > rates["linear"][57]
    assert lr_at(0, 1, 2.0) == 2.0
    assert lr_at(200, 200, 2.0, floor=0.5) == pytest.approx(1.0)


def test_weight_decay_is_for_matrices_only():
    model = random_gpt()
    groups = adamw(model, 1e-3, 0.1).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert all(decay[id(p)] == (0.1 if p.dim() == 2 else 0) for p in model.parameters())
    assert len(decay) == len(list(model.parameters()))


def test_adamw_by_hand():
    """Four steps of AdamW (1711.05101, algorithm 2) in plain Python, with betas .9 and .95.

    Only the matrix decays.
    """
    layer = torch.nn.Linear(1, 1).double()
    optimizer = adamw(layer, 0.1, 0.5)
    want = [
        dict(x=layer.weight.item(), m=0.0, v=0.0, decay=0.5),
        dict(x=layer.bias.item(), m=0.0, v=0.0, decay=0.0),
    ]
    for step, gradient in enumerate((1.0, -0.3, 2.0, 0.1), 1):
        for p, w in zip((layer.weight, layer.bias), want):
            p.grad = torch.full_like(p, gradient)
            w["m"] = 0.9 * w["m"] + 0.1 * gradient
            w["v"] = 0.95 * w["v"] + 0.05 * gradient**2
            m = w["m"] / (1 - 0.9**step)
            v = w["v"] / (1 - 0.95**step)
            w["x"] = w["x"] * (1 - 0.1 * w["decay"]) - 0.1 * m / (math.sqrt(v) + 1e-8)
        optimizer.step()
        got = [layer.weight.item(), layer.bias.item()]
        assert got == pytest.approx([w["x"] for w in want], abs=1e-9)


@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-4), (True, 0.05)])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24), (1, 7)])
def test_orthogonalize_keeps_the_directions_and_evens_out_the_sizes(
    shape, bf16, tolerance, monkeypatch
):
    monkeypatch.setattr(optim, "BF16_CPU", bf16)
    torch.manual_seed(0)
    M = torch.randn(shape) * torch.logspace(0, -2, shape[1])   # some directions are large
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    assert len(S) == 1 or S[0] / S[-1] > 2
    step = orthogonalize(M)
    inside = U.T @ step @ V.T                                                 # nearly diagonal
    assert_close(inside, inside.diag().diag(), tolerance)
    large = inside.diag()[S > 0.01 * S[0]]
    assert ((0.6 < large) & (large < 1.3)).all()
    assert (inside.diag() > -tolerance).all()
    assert_close(orthogonalize(1000 * M), step, tolerance)   # its size does not matter
    assert not orthogonalize(torch.zeros(shape)).any()


def by_hand(p, grads, lr, decay):
    """Return a matrix after Muon's steps, in fp64 and with an exact polar factor."""
    p = p.double()
    M = torch.zeros_like(p)
    for g in grads:
        M = 0.95 * M + g.double()
        U, _, V = torch.linalg.svd(g.double() + 0.95 * M, full_matrices=False)
        p = p - lr * decay * p - lr * 0.2 * max(p.shape) ** 0.5 * U @ V
    return p


def test_muon_takes_orthogonal_steps_of_the_size_of_adamw():
    model = random_gpt()
    optimizer = muon(model, 1e-2, 0.5)
    p = model.h[0].mlp.c_fc.weight
    start = p.detach().clone()
    torch.manual_seed(0)
    grads = [torch.randn_like(p) for _ in range(3)]
    for g in grads:
        optimizer.zero_grad()
        p.grad = g.clone()
        optimizer.step()
    want = by_hand(start, grads, 1e-2, 0.5)
    moved = (want - start).norm()
    assert (p - want).norm() < 0.3 * moved   # the singular values are only about 1
    rms = (p - start).square().mean().sqrt() / (3 * 1e-2)
    assert 0.1 < rms < 0.25


def test_muon_is_for_the_matrices_of_the_blocks_and_adamw_for_the_rest():
    """The rest moves bit for bit as with AdamW."""
    one, two = random_gpt(), random_gpt()
    two.load_state_dict(one.state_dict())
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    optimizers = [muon(one, 1e-2, 0.1), adamw(two, 1e-2, 0.1)]
    for _ in range(3):
        for model, optimizer in zip((one, two), optimizers):
            torch.manual_seed(1)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
    for (name, p), q in zip(one.named_parameters(), two.parameters()):
        in_block = name.startswith("h.") and p.dim() == 2
        assert torch.equal(p, q) == (not in_block), name
        assert not torch.equal(p, before[name])


def test_muon_resumes_bit_for_bit():
    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()

    straight, first, second = (random_gpt() for _ in range(3))
    first.load_state_dict(straight.state_dict())
    train(straight, muon(straight, 1e-2, 0.1), range(6))
    half = muon(first, 1e-2, 0.1)
    train(first, half, range(3))
    second.load_state_dict(first.state_dict())
    rest = muon(second, 5.0)
    rest.load_state_dict(half.state_dict())
    train(second, rest, range(3, 6))
    for p, q in zip(straight.parameters(), second.parameters()):
        assert torch.equal(p, q)


def test_muon_agrees_with_that_of_pytorch():
    """Which works in bfloat16, so the steps are equal to about a percent."""
    torch.manual_seed(0)
    mine = random_gpt()
    theirs = random_gpt()
    theirs.load_state_dict(mine.state_dict())
    matrices = [p for name, p in theirs.named_parameters() if name.startswith("h.") and p.dim() > 1]
    optimizers = [
        muon(mine, 1e-2, 0.1),
        torch.optim.Muon(matrices, 1e-2, 0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    start = [p.detach().clone() for p in matrices]
    for step in range(3):
        for model, optimizer in zip((mine, theirs), optimizers):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
    ours = dict(mine.named_parameters())
    names = [name for name in ours if name.startswith("h.") and ours[name].dim() > 1]
    for name, p, before in zip(names, matrices, start):
        moved = (p - before).norm()
        assert (ours[name] - p).norm() < 0.05 * moved, name
