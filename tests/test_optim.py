"""Tests of scaffold/optim.py: AdamW and the schedule of its learning rate."""

import math

import pytest
import torch

from scaffold.optim import adamw, lr_at
from tiny import random_gpt


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
