"""Share one batch among several processes, as in `torchrun --nproc_per_node=2 sft.py`.

Every process draws the same global batch and works on its shard. Losses and gradients are averaged
by the number of tokens, so the result equals that of one process. In PPO each process samples its
shard of the responses with its own seed. Only rank 0 writes files; if one process dies, all of them
end. The backend is gloo on CPUs and nccl on GPUs. With one process these functions change nothing,
so a reader of the scripts can skip them.
"""
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def rank():
    """Return the number of this process; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Return the number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until every process arrives here."""
    if world_size() > 1:
        dist.barrier()


def init_distributed(device="auto"):
    """Join the process group under torchrun (10-minute timeout); only rank 0 prints."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")


def shard(rows):
    """Return this process's part of a batch, or all of it if there are fewer rows than processes.

    In the second case all processes have the same rows, and `global_mean` corrects for that.
    """
    if len(rows) < world_size():
        return rows
    return rows[rank()::world_size()]


def global_mean(loss, n):
    """Rescale a local mean over n items so that the average over ranks is the global mean."""
    if world_size() == 1:
        return loss
    total = torch.as_tensor(n, dtype=torch.float32, device=loss.device).clone()
    dist.all_reduce(total)
    return loss * (n * world_size() / total)


def average_gradients(model):
    """Give every process the mean gradient, so that all of them keep the same weights.

    DistributedDataParallel wraps forward() only, and our losses call hidden() and score() as well.
    """
    if world_size() == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads]) / world_size()
    dist.all_reduce(flat)
    for g, mean in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


def all_gather_ids(rows, length, device="cpu"):
    """Gather the id lists (at most `length` ids each) that every process made from its shard.

    Returns all lists in the order of the global batch. All shards must have the same size.
    """
    if world_size() == 1:
        return rows
    local = torch.full((len(rows), length), -1)                               # (n/world, length)
    for i, row in enumerate(rows):
        local[i, :len(row)] = torch.tensor(row)
    parts = [torch.empty_like(local, device=device) for _ in range(world_size())]
    dist.all_gather(parts, local.to(device))
    merged = torch.stack(parts, 1).flatten(0, 1).tolist()                     # (n, length)
    return [[i for i in row if i >= 0] for row in merged]


def all_reduce_mean(row):
    """Average the floats of a log row over the processes; other values stay as they are."""
    names = [k for k, v in row.items() if isinstance(v, float)]
    if world_size() == 1 or not names:
        return row
    means = torch.tensor([row[k] for k in names], dtype=torch.float64) / world_size()
    means = means.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(means)
    return row | dict(zip(names, means.tolist()))


def rank0_first(make):
    """Call make() on rank 0 first; the other ranks follow and find the files it wrote."""
    if rank():
        barrier()
    result = make()
    if rank() == 0:
        barrier()
    return result
