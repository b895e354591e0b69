"""The optimizers, their learning rate schedule, mixed precision, and batches in parts."""
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Whether the CPU multiplies bf16 matrices, faster than fp32; others emulate it, ten times slower.
BF16_CPU = any(torch.cpu.get_capabilities().get(k) for k in ("avx512_bf16", "amx_bf16"))
LOGITS = 2**25   # the most at a time: those of 667 tokens with GPT-2's vocabulary, 134 MB


def adamw(model, lr, weight_decay=0.0, betas=(0.9, 0.95)):
    """Build AdamW with weight decay on matrices only, not on biases and LayerNorm gains."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def orthogonalize(M, steps=5):
    """Return about U V' for a matrix M = U S V' (fp32).

    Singular values that are not tiny become 0.7 to 1.2; those near 0 stay small.

    Newton-Schulz iteration: each step maps the singular values s of X to a s + b s^3 + c s^5. The
    coefficients are Jordan's: a is as large as possible, so that small values grow fast. The
    products are in bf16 where that is faster; its rounding is below the error of the method.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = M.shape[0] <= M.shape[1]
    X = M if wide else M.T
    X = X / X.norm().clamp(min=1e-7)   # singular values of at most 1
    if M.is_cuda or BF16_CPU:
        X = X.bfloat16()
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.to(M.dtype) if wide else X.T.to(M.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, except that the groups with "muon" take orthogonal steps.

    A few directions dominate the gradient of a weight matrix, U S V' with a few large values in S.
    They dominate AdamW's step, too. Muon steps along U V', in which all directions count the same,
    so those with small gradients learn as fast (Jordan et al. 2024, kellerjordan.github.io).

        M = momentum * M + G                         G: the gradient
        W = W - lr * 0.2 * sqrt(max(m, n)) * orthogonalize(G + momentum * M)     W: (m, n)

    The factor gives the elements of the step a root mean square of 0.2, as AdamW's usually have, so
    that one lr suits both (Liu et al. 2025, 2502.16982). AdamW trains the embeddings, because a
    batch uses few of their rows. Use large batches: a step costs as much as about 400 tokens.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if group["muon"] and p.grad is not None:
                    self.muon_step(p, group["lr"], group["weight_decay"])
                    p.grad = None   # so that AdamW skips it
        super().step()

    def muon_step(self, p, lr, weight_decay, momentum=0.95):
        if p not in self.state:   # AdamW.load_state_dict expects "step"
            self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
        M = self.state[p]["momentum"]
        M.mul_(momentum).add_(p.grad)
        step = orthogonalize(p.grad + momentum * M)
        p.mul_(1 - lr * weight_decay)
        p.add_(step, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def muon(model, lr, weight_decay=0.0, betas=(0.9, 0.95)):
    """Build Muon for the matrices of the blocks; AdamW, as in `adamw`, trains the rest."""
    groups = adamw(model, lr, weight_decay, betas).param_groups
    blocks = {id(p) for name, p in model.named_parameters() if ".attn." in name or ".mlp." in name}
    matrices = [p for p in groups[0]["params"] if id(p) in blocks]
    embeddings = [p for p in groups[0]["params"] if id(p) not in blocks]
    return Muon([{"params": matrices, "weight_decay": weight_decay, "muon": True},
                 {"params": embeddings, "weight_decay": weight_decay, "muon": False},
                 {"params": groups[1]["params"], "weight_decay": 0.0, "muon": False}],
                lr=lr, betas=betas, fused=True)


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


def in_parts(f, n, *tensors):
    """Return f(*tensors), (B, ...) each, computed in n parts of the rows; f keeps rows apart.

    The gradient of any loss of the whole result is exact, whatever the loss averages over. It needs
    the memory of one part, and one more forward pass.
    """
    n = min(n, len(tensors[0]))
    if n <= 1:
        return f(*tensors)
    parts = zip(*(t.tensor_split(n) for t in tensors))
    return torch.cat([checkpoint(f, *part, use_reentrant=False) for part in parts])


def cross_entropy(model, states, targets, temperature=1.0, reduction="none"):
    """F.cross_entropy in fp32 of the logits of some states: (N, C), (N,) -> (N,), or a scalar.

    reduction: none, sum or mean. At most LOGITS logits exist at a time.
    """
    each = "none" if reduction == "none" else "sum"

    def part(states, targets):
        logits = model.unembed(states).float()                                # (n, V)
        if temperature != 1:
            logits = logits / temperature
        return F.cross_entropy(logits, targets, reduction=each).view(-1)

    most = max(1, LOGITS // len(model.wte.weight))   # tokens of a part
    n = math.ceil(len(targets) / most)
    losses = in_parts(part, n, states, targets)                               # (N,), or (n,) sums
    if reduction == "none":
        return losses
    return losses.sum() / (len(targets) if reduction == "mean" else 1)
