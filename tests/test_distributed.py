"""Tests of scaffold/distributed.py without processes. Those are in test_processes.py."""

import sys

import pytest
import torch

from scaffold import distributed


def as_rank(monkeypatch, rank, world_size):
    """Make this process believe that it is one of several."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)


def test_other_ranks_print_nothing_whatever_it_is(monkeypatch, capfd):
    """What they would print need not fit the encoding of the console."""
    as_rank(monkeypatch, 1, 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    distributed.init_distributed("cpu")
    assert sys.stdout.encoding == "utf-8"
    print("猫 \ud800", flush=True)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_shards_make_the_batch_and_global_means_average_to_the_mean(monkeypatch, world_size, n):
    """Every row is in one shard where there are enough rows for all processes."""
    terms = [torch.arange(1.0, 2 + i) ** 2 for i in range(n)]  # row i has i + 1 terms
    shards = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        shards.append(distributed.shard(list(range(n))))
    if n >= world_size:
        assert sorted(i for shard in shards for i in shard) == list(range(n))
        assert all(shards)
    counts = [sum(len(terms[i]) for i in shard) for shard in shards]
    total = float(sum(counts))
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda t: t.fill_(total))
    means = []
    for shard, count in zip(shards, counts):
        local = torch.cat([terms[i] for i in shard]).mean()
        means.append(distributed.global_mean(local, count))
    torch.testing.assert_close(sum(means) / world_size, torch.cat(terms).mean())


def test_gathered_ids_are_in_the_order_of_the_batch(monkeypatch):
    responses = [[1], [2, 2], [], [4, 4, 4], [5], [6]]
    shards = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        shards.append(distributed.shard(responses))

    def all_gather(parts, mine):
        for part, shard in zip(parts, shards):
            part.fill_(-1)
            for i, row in enumerate(shard):
                part[i, : len(row)] = torch.tensor(row)

    monkeypatch.setattr(distributed.dist, "all_gather", all_gather)
    assert distributed.all_gather_ids(shards[0], 3) == responses
