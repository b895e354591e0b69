"""Tests of gpt.py: the model, generation with a cache, sampling, losses, checkpoints, pretraining.

Slow references are plain Python loops written from the definitions. Models are tiny and mostly in
double precision, so that a tolerance of 1e-10 tells a wrong formula from rounding.
"""

import base64
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gpt
from data.text import Source, checkpoint_text, pack, pad, read_corpus, text_files
from data.tokenizer import fingerprint, get_tokenizer
from scaffold.cli import UserError, field_help, start
from scaffold.run import load_checkpoint, save_checkpoint, unlock
from tiny import (
    END,
    ENC,
    ROOT,
    assert_close,
    random_documents,
    random_gpt,
    random_ids,
    read_jsonl,
    write_documents,
    write_tokenizer,
)

CPU = torch.device("cpu")


def tensors(lengths):
    """Return one 1-D tensor of random ids for each length."""
    return [torch.tensor(ids) for ids in random_ids(lengths)]


@torch.no_grad()
def greedy_by_hand(model, prompt, max_new_tokens):
    """Generate greedily, one row, without cache or padding: the whole text again for each token."""
    ids = list(prompt)
    while len(ids) < model.config.block_size and len(ids) - len(prompt) < max_new_tokens:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def until(stop, ids):
    """Cut ids after the first `stop`."""
    return ids[: ids.index(stop) + 1] if stop in ids else ids


# Generation


BATCHES = {
    "ragged": [1, 5, 17, 2, 40, 62, 63],
    "one token each": [1, 1, 1],
    "one row": [9],
    "equal": [8, 8, 8, 8],
}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("bias", [True, False])
def test_greedy_generation_equals_a_loop_without_cache(lengths, bias):
    model = random_gpt(bias=bias)
    prompts = random_ids(lengths)
    want = [greedy_by_hand(model, p, 30) for p in prompts]
    assert gpt.generate(model, prompts, 30, temperature=0) == want


@pytest.mark.parametrize("temperature", [1e-7, 1e-45, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature):
    """Logits divided by it would be infinite, and their softmax NaN."""
    model = random_gpt(dtype=torch.float32)
    prompts = random_ids([3, 9])
    greedy = gpt.generate(model, prompts, 12, temperature=0)
    assert gpt.generate(model, prompts, 12, temperature=temperature) == greedy


def test_rows_that_stop_leave_the_others_alone():
    """Every token that occurs is tried as the stop token, so rows stop in many orders.

    The stop token is part of the response.
    """
    model = random_gpt()
    prompts = random_ids([1, 5, 17, 2, 40, 3])
    free = [greedy_by_hand(model, p, 20) for p in prompts]
    orders = set()
    for stop in sorted(set(sum(free, []))):
        new = gpt.generate(model, prompts, 20, temperature=0, stop=stop)
        assert new == [until(stop, row) for row in free]
        orders.add(tuple(map(len, new)))
    assert len(orders) > 5
    assert any(len(set(lengths)) > 2 for lengths in orders)


@pytest.mark.parametrize("temperature, stop", [(1.0, 7), (0.5, 3), (0, 7)])
def test_the_cache_gives_each_token_the_logprob_of_the_full_forward(temperature, stop, monkeypatch):
    """PPO relies on this: the distribution that is sampled from is the one that is scored."""
    model = random_gpt()
    prompts = random_ids([1, 5, 17, 2, 40, 3, 30, 60] * 3)
    steps = []  # for each step, the tokens that were sampled and their log-probs
    sample = gpt.sample_tokens

    def spy(logits, *args, **kwargs):
        tokens = sample(logits, *args, **kwargs)
        logprobs = logits.float().log_softmax(-1)
        chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
        steps.append(list(zip(tokens.tolist(), chosen.tolist())))
        return tokens

    monkeypatch.setattr(gpt, "sample_tokens", spy)
    responses = gpt.generate(model, prompts, 30, temperature=temperature, stop=stop, seed=0)
    assert len(set(map(len, responses))) > 3
    assert len(steps) == max(map(len, responses))
    for prompt, response in zip(prompts, responses):
        ids = torch.tensor([prompt + response])
        wanted = gpt.token_logprobs(model, ids)[0, len(prompt) - 1:].tolist()
        for drawn, token, want in zip(steps, response, wanted):
            # Finished rows are dropped some tokens later, so a row has no fixed place.
            same = [got for other, got in drawn if other == token]
            assert min(abs(got - want) for got in same) < 1e-5


@pytest.mark.parametrize(
    "rows",
    [[5, 3, 1], [4, 0], [2, 2, 4, 2], [0, 1, 2, 3, 4, 5]],
    ids=["three", "two", "repeated", "all"],
)
def test_batch_composition_changes_no_greedy_response(rows):
    model = random_gpt()
    prompts = random_ids([1, 5, 17, 2, 40, 3])
    alone = [gpt.generate(model, [p], 20, temperature=0, stop=7)[0] for p in prompts]
    together = gpt.generate(model, [prompts[i] for i in rows], 20, temperature=0, stop=7)
    assert together == [alone[i] for i in rows]


@pytest.mark.parametrize("n", [1, 3])
def test_max_new_tokens_is_respected(n):
    responses = gpt.generate(random_gpt(), random_ids([1, 9, 62]), n)
    assert [len(r) for r in responses] == [n, n, min(n, 2)]  # the context has 64 positions
    assert gpt.generate(random_gpt(), random_ids([1, 9]), 0) == [[], []]
    assert gpt.generate(random_gpt(), [], n) == []


def test_samples_of_one_prompt_share_its_prefill_and_nothing_else(monkeypatch):
    model = random_gpt()
    one, two = random_ids([9, 4])
    prefilled = []
    hidden = model.hidden

    def spy(ids, cache):
        prefilled.append(len(ids))
        return hidden(ids, cache)

    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", spy)
        responses = gpt.generate(model, [one] * 40 + [two] + [one] * 40, 12, stop=7, seed=0)
    assert prefilled[0] == 2
    assert len(set(map(tuple, responses))) > 60
    greedy = gpt.generate(model, [one, two, one], 12, temperature=0)
    assert greedy == [greedy_by_hand(model, p, 12) for p in (one, two, one)]


def test_a_row_may_wait_at_the_end_of_the_context():
    """It is finished, but few rows are: they stay in the batch, while the others go on."""
    model = random_gpt(block=16)
    prompts = random_ids([15] + [2] * 9)
    responses = gpt.generate(model, prompts, 99, temperature=0)
    assert list(map(len, responses)) == [1] + [14] * 9
    assert responses == [greedy_by_hand(model, p, 16 - len(p)) for p in prompts]


def test_a_response_may_fill_the_context_but_not_exceed_it():
    """The model can read all that it wrote: PPO scores prompt and response in one forward pass."""
    model = random_gpt(block=16)
    prompts = random_ids([1, 7, 14, 15])
    for p, new in zip(prompts, gpt.generate(model, prompts, 99, seed=0)):
        assert len(p + new) == 16
        model(torch.tensor([p + new]))
    for p in prompts:
        assert len(p + gpt.generate(model, [p], 99, seed=0)[0]) == 16


@pytest.mark.parametrize("length", [0, 16, 17])
def test_a_prompt_that_is_empty_or_fills_the_context_is_refused(length):
    with pytest.raises(UserError, match=f"prompt 2 has {length} tokens"):
        gpt.generate(random_gpt(block=16), random_ids([3, length, 4]), 5)


def test_an_input_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="17 tokens"):
        random_gpt(block=16)(torch.zeros(1, 17, dtype=torch.long))


# Sampling


def chi_square(tokens, probs):
    """Chi-square statistic of sampled tokens against probs (V,)."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probs)).double()
    expected = probs.double() * len(tokens)
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_at_the_temperature(temperature):
    """Two tokens are sampled, so that the second must be drawn given the first of its own row."""
    V = 6
    model = random_gpt(vocab=V, block=8, n_embd=8, n_head=2)
    responses = gpt.generate(model, [[2, 5]] * 8000, 2, temperature=temperature, seed=0)
    first = (model(torch.tensor([[2, 5]]))[0, -1] / temperature).softmax(-1)  # (V,)
    longer = torch.tensor([[2, 5, i] for i in range(V)])  # (V, 3)
    second = (model(longer)[:, -1] / temperature).softmax(-1)  # (V, V)
    probs = (first[:, None] * second).flatten().detach()  # (V * V,)
    pairs = [a * V + b for a, b in responses]
    assert chi_square(pairs, probs) < 75  # 35 degrees of freedom: p < 1e-4
    assert chi_square(pairs, probs.roll(1)) > 1000


def support(logits, **settings):
    """Return, for each row of logits, the set of tokens that 400 draws yield."""
    rng = torch.Generator().manual_seed(0)
    drawn = gpt.sample_tokens(logits.repeat(400, 1), rng=rng, **settings).view(400, -1)
    return [set(column.tolist()) for column in drawn.T]


CUTS = [  # settings, and how many of the probabilities .4 .3 .2 .1 are kept
    (dict(), 4),
    (dict(top_k=1), 1),
    (dict(top_k=3), 3),
    (dict(top_k=9), 4),
    (dict(top_p=1e-9), 1),
    (dict(top_p=0.39), 1),
    (dict(top_p=0.41), 2),
    (dict(top_p=0.69), 2),
    (dict(top_p=0.71), 3),
    (dict(top_p=0.95), 4),
    (dict(top_p=1.0), 4),
    (dict(temperature=0), 1),
    (dict(top_k=2, top_p=0.5), 1),  # top_k comes first: .4 of .7 is more than half
    (dict(top_k=2, top_p=0.6), 2),
    (dict(temperature=0.5, top_p=0.5), 1),  # temperature comes first: .53 .30 .13 .03
    (dict(temperature=4.0, top_p=0.71), 3),  # .29 .27 .24 .20
]


@pytest.mark.parametrize("settings, n", CUTS, ids=[str(c[0]) for c in CUTS])
def test_top_k_and_top_p_keep_exactly_the_likeliest(settings, n):
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # Each row has its own order and its own level.
    rows = torch.stack([probs.roll(i).log() + 3 * i for i in range(4)])
    assert support(rows, **settings) == [{(i + j) % 4 for j in range(n)} for i in range(4)]


@pytest.mark.parametrize("settings", [dict(top_k=3), dict(top_p=0.85)], ids=str)
def test_kept_tokens_keep_their_odds(settings):
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    rng = torch.Generator().manual_seed(0)
    drawn = gpt.sample_tokens(probs.log().repeat(20_000, 1), rng=rng, **settings)
    kept = torch.tensor([4, 2, 3]) / 9
    assert chi_square((drawn - 1).tolist(), kept) < 18.5  # 2 degrees of freedom: p < 1e-4


def test_a_token_of_probability_0_is_never_drawn():
    """Whatever the random number: both ends of [0, 1), and the borders between two tokens."""
    probs = torch.tensor([0, 0.25, 0, 0.25, 0.5, 0]).expand(5, 6)
    draws = torch.tensor([0, 0.25, 0.4999999, 0.5, 1 - 2 ** -24])

    class Fixed:
        """A torch with these random numbers."""

        def __getattr__(self, name):
            return getattr(torch, name)

        def rand(self, *shape, **settings):
            return draws.view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "torch", Fixed())
        tokens = gpt.sample_tokens(probs.log())
    assert tokens.tolist() == [1, 3, 3, 4, 4]


def test_ties():
    """top_p keeps the smallest set, with any of the equal tokens; top_k drops less likely ones."""
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert len(support(logits, top_p=0.01)[0]) == 1
    kept = support(logits, top_k=2)[0]
    assert kept <= {0, 1, 2}
    assert len(kept) >= 2
    assert support(logits, temperature=0)[0] <= {0, 1, 2}


def test_top_p_0_is_greedy():
    assert support(torch.tensor([[1.0, 3.0, 2.0]]), top_p=0.0) == [{1}]


def test_same_seed_same_response():
    model = random_gpt()
    prompts = random_ids([1, 5, 17, 2])
    before = torch.get_rng_state()
    first = gpt.generate(model, prompts, 20, seed=1)
    assert torch.equal(torch.get_rng_state(), before), "a given seed leaves the global state alone"
    torch.rand(3)
    assert gpt.generate(model, prompts, 20, seed=1) == first
    assert gpt.generate(model, prompts, 20, seed=2) != first
    torch.manual_seed(5)
    second = gpt.generate(model, prompts, 20)
    assert gpt.generate(model, prompts, 20) != second
    torch.manual_seed(5)
    assert gpt.generate(model, prompts, 20) == second


@pytest.mark.parametrize("training", [True, False])
def test_generation_is_without_dropout_and_restores_the_mode(training):
    model = random_gpt(dropout=0.5)
    prompts = random_ids([1, 5])
    want = [greedy_by_hand(model, p, 10) for p in prompts]
    model.train(training)
    assert gpt.generate(model, prompts, 10, temperature=0) == want
    assert model.training is training
    assert model.h[0].training is training


def test_dropout_acts_in_training_only():
    model = random_gpt(dropout=0.5)
    ids = torch.tensor(random_ids([9]))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


# The model


def test_a_token_changes_no_output_before_it_and_every_output_from_it_on():
    model = random_gpt()
    ids = torch.tensor(random_ids([20, 20]))
    before = model(ids)
    for t in (1, 7, 19):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % 50
        after = model(changed)
        assert_close(after[:, :t], before[:, :t])
        assert (after[:, t:] - before[:, t:]).abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize("filler", [0, 49])
def test_right_padding_and_other_rows_change_no_real_token(filler):
    model = random_gpt()
    rows = tensors([1, 5, 17, 2, 64])
    ids = pad(rows, filler)
    states = model.hidden(ids)
    logprobs = gpt.token_logprobs(model, ids)
    for i, row in enumerate(rows):
        n = len(row)
        assert_close(states[i, :n], model.hidden(row[None])[0])
        assert_close(logprobs[i, : n - 1], gpt.token_logprobs(model, row[None])[0], 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_are_those_of_the_next_token(temperature):
    model = random_gpt()
    ids = torch.tensor(random_ids([9, 9]))
    logits = model(ids)
    got = gpt.token_logprobs(model, ids, temperature)
    assert got.shape == (2, 8)
    for b in range(2):
        for t in range(8):
            odds = [math.exp(x / temperature) for x in logits[b, t].tolist()]
            want = math.log(odds[ids[b, t + 1]] / sum(odds))
            assert got[b, t].item() == pytest.approx(want, abs=1e-5)


def test_logprobs_are_fp32_whatever_the_model():
    model = random_gpt(dtype=torch.bfloat16)
    ids = torch.tensor(random_ids([9]))
    got = gpt.token_logprobs(model, ids)
    assert got.dtype == torch.float32
    # The softmax itself is in fp32; rounding after it would not be enough.
    logits = model(ids)[0, :-1].float()
    want = logits.log_softmax(-1)[torch.arange(8), ids[0, 1:]]
    assert_close(got[0], want, 1e-6)
    assert gpt.generate(model, [[1, 2]], 3, temperature=0, seed=0)[0]


def test_gradients_reach_every_weight():
    model = random_gpt()
    ids = torch.tensor(random_ids([64]))
    gpt.token_logprobs(model, ids).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().sum() > 0, name


def test_a_fresh_model_starts_as_gpt_2_does():
    """Its blocks do. The embeddings are wider, but the first guess is still close to uniform."""
    model = gpt.GPT(gpt.GPTConfig(500, 64, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        elif name.startswith("h."):
            want = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(want, rel=0.05), name
            assert p.mean().item() == pytest.approx(0, abs=want / 20), name
        else:
            assert 0.01 < p.std() < 0.1, name
    ids = torch.randint(500, (4, 64))
    logits = model(ids)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(500), abs=1.0)
    assert logits.std() < 1


def test_embeddings_are_tied():
    model = random_gpt()
    ids = torch.tensor(random_ids([5]))
    assert_close(model(ids), model.hidden(ids) @ model.wte.weight.T)
    assert sum(p.shape == (50, 32) for p in model.parameters()) == 1


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="30.*4"):
        gpt.GPT(gpt.GPTConfig(50, 16, n_layer=1, n_head=4, n_embd=30))


@pytest.mark.parametrize("n_embd, n_head", [(33, 3), (1, 1)])
def test_the_width_may_be_odd(n_embd, n_head):
    model = random_gpt(n_embd=n_embd, n_head=n_head)
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 50)


# Packed rows and the loss


PACKED = [3, 1, 9, 16, 5, 5, 6, 2, 7]


def test_a_packed_document_has_the_states_it_has_alone():
    """Positions restart, other documents are not seen, and padding is part of no document."""
    model = random_gpt(block=16)
    documents = tensors(PACKED)
    ids, segments = pack(documents, 16)
    states = model.hidden(ids, segments=segments)
    logits = model(ids, segments=segments)
    rest = iter(documents)
    for row in range(len(ids)):
        for i in range(1, segments[row].max() + 1):
            document = next(rest)[None]
            here = segments[row] == i
            assert_close(states[row, here], model.hidden(document)[0])
            assert_close(logits[row, here], model(document)[0])
    assert next(rest, None) is None


def test_a_packed_document_does_not_see_the_others():
    model = random_gpt(block=16)
    ids, segments = pack(tensors([6, 7]), 16)
    before = model.hidden(ids, segments=segments)
    for t in range(16):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 50
        after = model.hidden(changed, segments=segments)
        others = segments[0] != segments[0, t]
        assert torch.equal(after[0, others], before[0, others])


def nats_by_hand(model, documents):
    """Return the sum of -log p of every token but the first of each document, and their number."""
    nats = 0.0
    n = 0
    for document in documents:
        logprobs = model(document[None])[0].log_softmax(-1)
        for t in range(len(document) - 1):
            nats = nats - logprobs[t, document[t + 1]]
            n += 1
    return nats, n


def test_lm_loss_and_its_gradient_are_those_of_one_document_a_row():
    model = random_gpt(block=16)
    documents = tensors(PACKED)
    nats, n = nats_by_hand(model, documents)
    want = torch.autograd.grad(nats / n, list(model.parameters()))
    packed = pack(documents, 16)
    alone = pad(documents), pad([torch.ones_like(d) for d in documents])
    garbage = torch.where(packed[1] > 0, packed[0], 17), packed[1]
    for ids, segments in (packed, alone, garbage):
        assert_close(gpt.lm_loss(model, ids, segments, "sum").double(), nats, 1e-5)
        loss = gpt.lm_loss(model, ids, segments)
        assert_close(loss.double(), nats / n, 1e-5)
        assert_close(torch.autograd.grad(loss, list(model.parameters())), want, 1e-6)


def test_val_loss_by_brute_force():
    """The loss weighs sources as they are drawn. Bits per byte count every predicted byte alike.

    An end token costs nats but has no bytes: counting its letters would flatter the number.
    """
    model = random_gpt(vocab=ENC.n_vocab, block=32)
    texts = [
        "Tom went to the mill.",
        "The cow 牛 says moo. ",
        "a",
        "It costs 17 coins, said Ann.\n",
        "🐄",
    ]
    documents = [torch.tensor(ENC.encode_ordinary(t) + [END], dtype=torch.int32) for t in texts]
    assert 1 < min(map(len, documents[:2]))
    assert max(map(len, documents)) <= 32
    sources = {
        "a": Source(train=[documents[0]], val=documents[:2], weight=3.0),
        "b": Source(train=[documents[0]], val=documents[2:], weight=1.0),
    }
    loss, bits = gpt.val_loss(model, sources, ENC, CPU)
    nats_a, n_a = nats_by_hand(model, [d.long() for d in documents[:2]])
    nats_b, n_b = nats_by_hand(model, [d.long() for d in documents[2:]])
    assert loss == pytest.approx((3 * nats_a / n_a + nats_b / n_b).item() / 4, rel=1e-5)
    size = sum(len(ENC.decode_bytes(d[1:-1].tolist())) for d in documents)
    assert bits == pytest.approx((nats_a + nats_b).item() / math.log(2) / size, rel=1e-5)


def test_val_loss_is_without_dropout_and_restores_the_mode():
    model = random_gpt(vocab=ENC.n_vocab, block=32, dropout=0.5)
    documents = [torch.arange(20)]
    sources = {"a": Source(train=documents, val=documents, weight=1.0)}
    want = gpt.val_loss(model, sources, ENC, CPU)
    model.train()
    assert gpt.val_loss(model, sources, ENC, CPU) == want
    assert model.training


def test_val_loss_stops_at_its_limit_inside_a_long_document():
    """A book is one document: without this, each validation would read a twentieth of the book."""
    model = random_gpt(vocab=ENC.n_vocab, block=32)
    book = torch.arange(500)
    short = {"a": Source(train=[book[:64]], val=[book[:64]], weight=1.0)}
    long = {"a": Source(train=[book], val=[book], weight=1.0)}
    want = gpt.val_loss(model, short, ENC, CPU, limit=64)
    assert gpt.val_loss(model, long, ENC, CPU, limit=64) == want


# Checkpoints of a model


def saved(path, tokenizer="", **changes):
    """Save a tiny model, then exchange some entries of the file (None removes one)."""
    model = random_gpt(vocab=ENC.n_vocab, block=32, dtype=torch.float32)
    gpt.save_model(path, model, ENC, tokenizer, note="kept")
    state = load_checkpoint(path) | changes
    save_checkpoint(path, **{k: v for k, v in state.items() if v is not None})
    return model


def test_load_model_gives_back_the_model_in_eval_mode(tmp_path):
    model = saved(tmp_path / "m.pt")
    ids = torch.tensor([[1, 2, 3]])
    back, enc, state = gpt.load_model(tmp_path / "m.pt", dropout=0.5)
    assert torch.equal(back(ids), model(ids))
    assert not back.training
    assert back.config.dropout == 0.5
    assert fingerprint(enc) == fingerprint(ENC)
    assert state["note"] == "kept"
    back.train()
    assert not torch.equal(back(ids), model(ids))


def test_load_model_takes_the_body_of_a_reward_model(tmp_path):
    """Its file has the same weights under another prefix, with a head beside them."""
    model = random_gpt(vocab=ENC.n_vocab, block=32, dtype=torch.float32)
    body = {"body." + k: v for k, v in model.state_dict().items()}
    saved(tmp_path / "rm.pt", model=body | {"head.weight": torch.zeros(1, 32)})
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(gpt.load_model(tmp_path / "rm.pt")[0](ids), model(ids))


def test_dropout_of_pretraining_is_not_inherited(tmp_path):
    """A policy that inherits dropout has ratios that are noise, even before its first step."""
    model = random_gpt(ENC.n_vocab, dropout=0.3, dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    gpt.save_model(tmp_path / "m.pt", model, ENC, "")
    back = gpt.load_model(tmp_path / "m.pt")[0].train()
    assert back.config.dropout == 0
    assert torch.equal(back(ids), model(ids))


def swapped(items, i, j):
    items = list(items)
    items[i], items[j] = items[j], items[i]
    return items


RAW = json.loads((ROOT / "data" / "tokenizer.json").read_text())
OTHER_TOKENIZERS = {
    "two bytes": dict(ranks=swapped(RAW["ranks"], 65, 66)),
    "two merges": dict(ranks=swapped(RAW["ranks"], 700, 800)),
    "another token": dict(ranks=RAW["ranks"][:-1] + [base64.b64encode(b"zqzq").decode()]),
    "the pattern": dict(pattern=r"\p{L}+|\P{L}"),
    "two specials": dict(special=swapped(RAW["special"], 1, 3)),
}


@pytest.mark.parametrize("changes", OTHER_TOKENIZERS.values(), ids=OTHER_TOKENIZERS)
def test_an_old_checkpoint_refuses_another_tokenizer(tmp_path, changes):
    """Old ones only name their tokenizer."""
    name = write_tokenizer(tmp_path / "t.json")
    saved(tmp_path / "m.pt", tokenizer=name, tokenizer_json=None)
    gpt.load_model(tmp_path / "m.pt")
    write_tokenizer(tmp_path / "t.json", **changes)
    changed = r"m\.pt: .*t\.json( has changed|: not a tokenizer file)"
    with pytest.raises(UserError, match=changed):
        gpt.load_model(tmp_path / "m.pt")


@pytest.mark.parametrize("changes", OTHER_TOKENIZERS.values(), ids=OTHER_TOKENIZERS)
def test_a_checkpoint_carries_its_tokenizer(tmp_path, monkeypatch, changes):
    """Whatever happens to the file that it names, and to the checkpoint itself."""
    name = write_tokenizer(tmp_path / "t.json", **(changes | {"special": RAW["special"]}))
    enc = get_tokenizer(name)
    model = random_gpt(vocab=ENC.n_vocab, block=32, dtype=torch.float32)
    gpt.save_model(tmp_path / "m.pt", model, enc, name)
    write_tokenizer(tmp_path / "t.json")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "m.pt").rename(elsewhere / "renamed.pt")
    monkeypatch.chdir(elsewhere)
    for _ in ("the file is another one", "the file is gone"):
        _, back, state = gpt.load_model("renamed.pt")
        assert fingerprint(back) == fingerprint(enc) == state["fingerprint"]
        assert back.name == enc.name
        assert back.encode_ordinary("AB, zqzq 17.") == enc.encode_ordinary("AB, zqzq 17.")
        (tmp_path / "t.json").unlink(missing_ok=True)
    assert len(state["tokenizer_json"]) < 50_000
    gpt.save_model("again.pt", model, back, state["tokenizer"])  # as the next stage does
    assert fingerprint(gpt.load_model("again.pt")[1]) == fingerprint(enc)


def test_a_name_of_tiktoken_is_not_carried(tmp_path, theirs):
    enc = get_tokenizer("theirs")
    model = random_gpt(vocab=enc.n_vocab, block=32, dtype=torch.float32)
    gpt.save_model(tmp_path / "m.pt", model, enc, "theirs")
    _, back, state = gpt.load_model(tmp_path / "m.pt")
    assert state["tokenizer_json"] is None
    assert fingerprint(back) == fingerprint(enc)


DAMAGED_TOKENIZERS = {
    "a number": 5,
    "empty": "",
    "half": json.dumps(RAW)[:5000],
    "a list": "[]",
    "nested": "[" * 100_000,
    "too few tokens": json.dumps(RAW | {"ranks": RAW["ranks"][:20]}),
    "another one": json.dumps(RAW | {"pattern": r"\p{L}+|\P{L}"}),
}


@pytest.mark.parametrize("text", DAMAGED_TOKENIZERS.values(), ids=DAMAGED_TOKENIZERS)
def test_a_damaged_tokenizer_in_a_checkpoint_is_refused(tmp_path, text):
    saved(tmp_path / "m.pt", tokenizer_json=text)
    with pytest.raises(UserError, match=r"m\.pt: its tokenizer is (damaged|not the one)") as e:
        gpt.load_model(tmp_path / "m.pt")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["t.json", "deep/t.json", "/gone/deep/t.json", r"C:\gone\t.json"])
def test_an_old_checkpoint_finds_its_tokenizer_beside_it(tmp_path, monkeypatch, name):
    """Even if another one of the same name stands in the current folder."""
    run = tmp_path / "run"
    here = tmp_path / "here"
    here.mkdir()
    run.mkdir()
    monkeypatch.chdir(here)
    saved(run / "m.pt", tokenizer=name, tokenizer_json=None)
    with pytest.raises(UserError, match="m.pt: its tokenizer is missing, put it beside"):
        gpt.load_model(run / "m.pt")
    write_tokenizer(run / "t.json")
    write_tokenizer(here / "t.json", pattern=r"\p{L}+|\P{L}")
    assert fingerprint(gpt.load_model(run / "m.pt")[1]) == fingerprint(ENC)
    assert fingerprint(gpt.load_model("../run/m.pt")[1]) == fingerprint(ENC)


SIZES = dict(vocab_size=ENC.n_vocab, block_size=32, n_layer=2, n_head=4, n_embd=32)
FOREIGN_CHECKPOINTS = {
    "another width": dict(gpt=SIZES | dict(n_embd=64)),
    "another depth": dict(gpt=SIZES | dict(n_layer=3)),
    "an unknown size": dict(gpt=SIZES | dict(rotary=True)),
    "no sizes": dict(gpt=None),
    "no model": dict(model=None),
    "no fingerprint": dict(fingerprint=None),
    "no weights": dict(model={}),
}


@pytest.mark.parametrize("changes", FOREIGN_CHECKPOINTS.values(), ids=FOREIGN_CHECKPOINTS)
def test_a_checkpoint_that_is_not_ours_is_refused(tmp_path, changes):
    saved(tmp_path / "m.pt", **changes)
    with pytest.raises(UserError, match="m.pt") as e:
        gpt.load_model(tmp_path / "m.pt")
    assert "\n" not in str(e.value)


# Pretraining


def pretrain(tmp_path, name, **changes):
    """Run gpt.main on a small text, out in tmp_path/name -> rows of the log, checkpoint."""
    data = write_documents(tmp_path / "text.txt", random_documents([3, 8, 1] * 12))
    settings = dict(
        data=str(data),
        out=str(tmp_path / name),
        n_layer=1,
        n_head=2,
        n_embd=16,
        block_size=32,
        batch_tokens=128,
        steps=10,
        eval_every=4,
        device="cpu",
        dropout=0.1,
    )
    gpt.main(gpt.Config(**settings | changes))
    rows = read_jsonl(tmp_path / name / "gpt.jsonl")
    return rows, load_checkpoint(tmp_path / name / "gpt.pt")


def test_same_seed_same_run(tmp_path, capsys):
    rows_a, state_a = pretrain(tmp_path, "a")
    rows_b, state_b = pretrain(tmp_path, "b")
    rows_c, _ = pretrain(tmp_path, "c", seed=1)
    assert rows_a == rows_b
    assert len(rows_a) == 10
    assert all(torch.equal(v, state_b["model"][k]) for k, v in state_a["model"].items())
    assert [r["loss"] for r in rows_a] != [r["loss"] for r in rows_c]
    assert pretrain(tmp_path, "a")[0] == rows_a  # a second run starts its log anew
    assert [r["step"] for r in rows_a if "val_loss" in r] == [3, 7, 9]
    assert "python sft.py --out" in capsys.readouterr().out


def test_later_stages_find_the_text_of_pretraining(tmp_path, capsys):
    """It is split and weighted as it was: else they would validate on what was trained on."""
    folder = tmp_path / "texts"
    for name, n in (("a", 30), ("b", 60)):
        write_documents(folder / f"{name}.txt", random_documents([3] * n, seed=n))
    pretrain(tmp_path, "run", data=str(folder), val_fraction=0.2, mixture="b=3,a=1", steps=1)
    checkpoint = tmp_path / "run" / "gpt.pt"

    def plain(sources):
        return {
            name: ([d.tolist() for d in s.train], [d.tolist() for d in s.val], s.weight)
            for name, s in sources.items()
        }

    want = read_corpus(folder, ENC, 32, 0.2, "b=3,a=1")
    assert plain(checkpoint_text(checkpoint, ENC, 32)) == plain(want)
    other = checkpoint_text(checkpoint, ENC, 32, str(folder / "a.txt"))
    assert plain(other) == plain(read_corpus(folder / "a.txt", ENC, 32, 0.05))


@pytest.mark.parametrize("remembered", ["", "out/run/data/texts", "/gone/data/texts",
                                        r"C:\gone\data\texts"])
def test_the_text_of_pretraining_is_found_beside_a_moved_checkpoint(
    tmp_path, monkeypatch, capsys, remembered
):
    """From any folder. New checkpoints remember the whole path, older ones what was typed."""
    run = tmp_path / "out" / "run"
    for name in "ab":
        write_documents(run / "data" / "texts" / f"{name}.txt", random_documents([3] * 30))
    monkeypatch.chdir(tmp_path)
    pretrain(tmp_path, "out/run", data="out/run/data/texts", steps=1)
    state = load_checkpoint(run / "gpt.pt")
    assert state["data"] == str(run / "data" / "texts")
    if remembered:
        save_checkpoint(run / "gpt.pt", **state | dict(data=remembered))
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    run.rename(moved)
    monkeypatch.chdir(moved.parent)
    for path in (moved / "gpt.pt", "renamed/gpt.pt"):
        assert list(checkpoint_text(path, ENC, 32)) == ["a", "b"]
        assert Path(text_files(path)[1]).resolve() == moved / "data" / "texts"
    (moved / "data" / "texts").rename(moved / "other")
    with pytest.raises(UserError, match="gpt.pt: its pretraining text is gone.*--text.*--ptx 0"):
        checkpoint_text(moved / "gpt.pt", ENC, 32)
    (moved / "gpt.pt").unlink()
    with pytest.raises(UserError, match="gpt.pt is missing.*--text.*--ptx 0"):
        checkpoint_text(moved / "gpt.pt", ENC, 32)


def test_a_device_is_never_read_as_the_text_of_pretraining(tmp_path, capsys):
    pretrain(tmp_path, "run", steps=1)
    path = tmp_path / "run" / "gpt.pt"
    os.mkfifo(tmp_path / "run" / "pipe")
    for name in ("/dev/zero", "/gone/pipe", "", "\0", "x" * 5000):
        save_checkpoint(path, **load_checkpoint(path) | dict(data=name))
        with pytest.raises(UserError, match="gpt.pt: its pretraining text is gone"):
            checkpoint_text(path, ENC, 32)


def test_a_run_is_resumed_with_the_same_files_at_other_places(tmp_path, monkeypatch, capsys):
    """Its folder, its text and its tokenizer may have other paths and names; nothing changes."""
    files = tmp_path / "files"
    files.mkdir()
    settings = dict(tokenizer=write_tokenizer(files / "t.json"), save_every=2)
    whole = pretrain(tmp_path, "whole", **settings)

    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(gpt, "val_loss", kill)
        with pytest.raises(Killed):
            pretrain(tmp_path, "run", **settings)
    unlock(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "text.txt").rename(files / "renamed.txt")
    (files / "t.json").rename(tmp_path / "renamed.json")
    monkeypatch.chdir(files)
    settings |= dict(data="renamed.txt", tokenizer="../renamed.json", resume=True)
    rows, state = pretrain(tmp_path, "moved", **settings)
    assert "resuming gpt at step 2" in capsys.readouterr().out
    assert rows == whole[0]
    assert all(torch.equal(v, whole[1]["model"][k]) for k, v in state["model"].items())


def test_pretraining_learns_and_saves_what_it_measured(tmp_path, capsys):
    rows, _ = pretrain(tmp_path, "a", steps=60, lr=1e-2, dropout=0.0)
    assert rows[0]["loss"] == pytest.approx(math.log(ENC.n_vocab), abs=0.5)
    assert rows[-1]["val_loss"] < 4.5
    model, enc, _ = gpt.load_model(tmp_path / "a" / "gpt.pt")
    sources = read_corpus(tmp_path / "text.txt", enc, 32, 0.05)
    loss, bits = gpt.val_loss(model, sources, enc, CPU)
    assert loss == pytest.approx(rows[-1]["val_loss"])
    assert bits == pytest.approx(rows[-1]["bits_per_byte"])


@pytest.mark.parametrize("block_size", [2, 3, 8])
def test_a_short_context_is_enough_to_finish(tmp_path, capsys, block_size):
    """The sample at the end starts with 8 tokens, or fewer if they fill the context."""
    pretrain(tmp_path, "a", block_size=block_size, steps=2)
    assert "--- a sample" in capsys.readouterr().out


def test_pretraining_starts_from_pretrained_weights(tmp_path, capsys):
    model = random_gpt(vocab=ENC.n_vocab, block=48, dtype=torch.float32)
    model.save_pretrained(tmp_path / "hub")
    _, state = pretrain(tmp_path, "a", init_from=str(tmp_path / "hub"), steps=1, lr=0.0)
    w = torch.load(tmp_path / "hub" / "pytorch_model.bin")
    assert torch.equal(state["model"]["wte.weight"], w["lm_head.weight"])
    assert state["gpt"]["block_size"] == 48
    assert state["gpt"]["dropout"] == 0.1, "--dropout holds for a pretrained model, too"


def test_gpt_2_starts_with_its_own_tokenizer(tmp_path, theirs, capsys):
    """Its weights know none of our special tokens: they get five new rows, the others stay."""
    random_gpt(vocab=257, block=48, dtype=torch.float32).save_pretrained(tmp_path / "theirs")
    _, state = pretrain(tmp_path, "a", init_from="theirs", tokenizer="theirs", steps=1, lr=0.0)
    w = torch.load(tmp_path / "theirs" / "pytorch_model.bin")
    assert state["gpt"]["vocab_size"] == 262
    assert torch.equal(state["model"]["wte.weight"][:257], w["lm_head.weight"])
    gpt.load_model(tmp_path / "a" / "gpt.pt")


@pytest.mark.parametrize("vocab", [300, ENC.n_vocab - 6, ENC.n_vocab + 1, 5000])
def test_pretrained_weights_of_another_tokenizer_are_refused(tmp_path, vocab):
    """Too many tokens are as wrong as too few: each id would mean another token."""
    random_gpt(vocab=vocab, block=48, dtype=torch.float32).save_pretrained(tmp_path / "hub")
    with pytest.raises(UserError, match=f"{vocab}.*--tokenizer"):
        pretrain(tmp_path, "a", init_from=str(tmp_path / "hub"), steps=1)


# The command


def test_every_setting_is_explained():
    assert all(len(text) > 10 for text in field_help(gpt.Config).values())


BAD_FLAGS = {  # arguments -> what the line must contain
    "--stpes 3": ["unknown flag --stpes", "--steps"],
    "--n_layer=3": ["unknown flag --n_layer", "--n-layer"],
    "--block 3": ["unknown flag --block"],
    "word": ["word"],
    "--steps many": ["--steps", "many"],
    "--steps 1.5": ["--steps", "1.5"],
    "--lr fast": ["--lr", "fast"],
    "--steps": ["--steps"],
    "--data gone.txt": ["gone.txt"],
    "--device tpu": ["--device tpu", "cpu"],
    "--n-embd 30": ["--n-embd 30", "--n-head 4"],
    "--tokenizer gone.json": ["gone.json"],
    "--init-from gone": ["gone", "config.json"],
    "--sample Hello": ["unknown flag --sample"],
    "--schedule Cosine": ["--schedule Cosine", "cosine"],
    "--steps 0": ["--steps 0"],
    "--eval-every 0": ["--eval-every 0"],
    "--batch-tokens 0": ["--batch-tokens 0"],
    "--block-size 1": ["--block-size 1", "at least 2"],
    "--val-fraction 0": ["--val-fraction 0"],
    "--out text.txt": ["text.txt"],
}


@pytest.mark.parametrize("args", BAD_FLAGS)
def test_a_mistake_of_the_user_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, args):
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "text.txt", random_documents([40]))
    small = "--data text.txt --out new --block-size 16 --n-layer 1 --steps 30"
    monkeypatch.setattr(sys, "argv", f"gpt.py {small} {args}".split())
    with pytest.raises(SystemExit) as e:
        start(gpt.main, gpt.Config, gpt.__doc__)
    error = capsys.readouterr().err
    assert e.value.code == 2, error
    assert error.count("\n") == 1, error
    assert error.startswith("gpt.py: "), error
    for part in BAD_FLAGS[args]:
        assert part in error, error
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_a_mistake_of_the_user_in_a_real_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "gpt.py", "--stpes", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())
    assert done.stderr == "gpt.py: unknown flag --stpes; did you mean --steps?\n"
