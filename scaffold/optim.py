"""The optimizer, its learning rate schedule, and mixed precision."""
import math

import torch


def adamw(model, lr, weight_decay=0.0, betas=(0.9, 0.95)):
    """Build AdamW with weight decay on matrices only, not on biases and LayerNorm gains."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def lr_at(step, steps, lr, schedule="cosine", floor=0.1):
    """Return the learning rate of a step: linear warmup over 5% of the steps, then the schedule.

    schedule: constant, or linear or cosine down to floor * lr.
    """
    warmup = max(1, steps // 20)
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = (step - warmup) / max(1, steps - warmup)
    shape = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
    return lr * (floor + (1 - floor) * shape)


def autocast(device):
    """Use bf16 on a GPU, and fp32 on a CPU, where small models gain nothing from bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
