"""Properties of gpt.py: the model, its cache, the sampler, the tokenizer, the files it reads and writes, pretraining.

Slow references are plain Python loops written from the definitions; models are tiny and mostly in double precision, so that
a tolerance of 1e-10 tells a wrong formula from rounding.
"""
import base64
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402
from gpt import UserError  # noqa: E402

ENC = gpt.get_tokenizer()
END = ENC.encode_single_token("<|end|>")


def tiny(vocab=50, block=64, seed=0, dtype=torch.float64, **sizes):
    """A small model far from GPT-2's nearly uniform start, biases and gains included: no term is too small to be missed."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(vocab, block, **{**dict(n_layer=2, n_head=4, n_embd=32), **sizes}))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.to(dtype).eval()


def texts_of(lengths, vocab=50, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(n)] for n in lengths]


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def greedy_by_hand(model, prompt, max_new_tokens):
    """One row, no cache, no padding, the whole text again for each token."""
    ids = list(prompt)
    while len(ids) < model.config.block_size and len(ids) - len(prompt) < max_new_tokens:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt):]


def until(stop, ids):
    return ids[:ids.index(stop) + 1] if stop in ids else ids


# Generation

BATCHES = {"ragged": [1, 5, 17, 2, 40, 62, 63], "one token each": [1, 1, 1], "one row": [9], "equal": [8, 8, 8, 8]}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("bias", [True, False])
def test_greedy_generation_equals_a_loop_without_cache(lengths, bias):
    model, prompts = tiny(bias=bias), texts_of(lengths)
    assert gpt.generate(model, prompts, 30, temperature=0) == [greedy_by_hand(model, p, 30) for p in prompts]


def test_rows_that_stop_leave_the_others_alone():
    """Every token that occurs is tried as the stop token, so rows leave in many orders; it is part of the answer."""
    model, prompts = tiny(), texts_of([1, 5, 17, 2, 40, 3])
    free = [greedy_by_hand(model, p, 20) for p in prompts]
    orders = set()
    for stop in sorted(set(sum(free, []))):
        new = gpt.generate(model, prompts, 20, temperature=0, stop=stop)
        assert new == [until(stop, row) for row in free]
        orders.add(tuple(map(len, new)))
    assert len(orders) > 5 and any(len(set(o)) > 2 for o in orders)


@pytest.mark.parametrize("temperature, stop", [(1.0, 7), (0.5, 3), (0, 7)])
def test_the_cache_gives_each_token_the_logprob_of_the_full_forward(temperature, stop, monkeypatch):
    """What PPO lives on: the distribution that is sampled is the distribution that is scored."""
    model, prompts, seen, sample = tiny(), texts_of([1, 5, 17, 2, 40, 3, 30, 60] * 3), [], gpt.sample_tokens

    def spy(logits, *args, **kwargs):
        tokens = sample(logits, *args, **kwargs)
        seen.append(logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist())
        return tokens

    monkeypatch.setattr(gpt, "sample_tokens", spy)
    answers = gpt.generate(model, prompts, 30, temperature=temperature, stop=stop, seed=0)
    assert len(set(map(len, answers))) > 3
    for step, logprobs in enumerate(seen):
        alive = [i for i, a in enumerate(answers) if len(a) > step]
        assert len(alive) == len(logprobs)
        for i, got in zip(alive, logprobs):
            n = len(prompts[i]) + step
            want = gpt.token_logprobs(model, torch.tensor([(prompts[i] + answers[i])[:n + 1]]))[0, n - 1].item()
            assert got == pytest.approx(want, abs=1e-5)


def test_batch_composition_changes_no_greedy_answer():
    model, prompts = tiny(), texts_of([1, 5, 17, 2, 40, 3])
    alone = [gpt.generate(model, [p], 20, temperature=0, stop=7)[0] for p in prompts]
    for rows in ([5, 3, 1], [4, 0], [2, 2, 4, 2], [0, 1, 2, 3, 4, 5]):
        assert gpt.generate(model, [prompts[i] for i in rows], 20, temperature=0, stop=7) == [alone[i] for i in rows]


@pytest.mark.parametrize("n", [1, 3])
def test_max_new_tokens_is_respected(n):
    assert [len(a) for a in gpt.generate(tiny(), texts_of([1, 9, 62]), n)] == [n, n, min(n, 2)]
    assert gpt.generate(tiny(), texts_of([1, 9]), 0) == [[], []]
    assert gpt.generate(tiny(), [], n) == []


def test_an_answer_may_fill_the_context_but_not_leave_it():
    """To the last token, and the model can read what it wrote: PPO scores prompt and answer in one forward pass."""
    model, prompts = tiny(block=16), texts_of([1, 7, 14, 15])
    for p, new in zip(prompts, gpt.generate(model, prompts, 99, seed=0)):
        assert len(p + new) == 16
        model(torch.tensor([p + new]))
    for p in prompts:
        assert len(p + gpt.generate(model, [p], 99, seed=0)[0]) == 16


@pytest.mark.parametrize("length", [0, 16, 17])
def test_a_prompt_that_is_empty_or_fills_the_context_is_refused(length):
    with pytest.raises(UserError, match=f"prompt 2 has {length} tokens"):
        gpt.generate(tiny(block=16), texts_of([3, length, 4]), 5)


def test_a_text_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="17 tokens"):
        tiny(block=16)(torch.zeros(1, 17, dtype=torch.long))


# Sampling

def chi_square(tokens, probs):
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probs)).double()
    expected = probs.double() * len(tokens)
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_at_the_temperature(temperature):
    """Pairs of tokens, so that the second must be drawn given the first of its own row."""
    model, V = tiny(vocab=6, block=8, n_embd=8, n_head=2), 6
    answers = gpt.generate(model, [[2, 5]] * 8000, 2, temperature=temperature, seed=0)
    first = (model(torch.tensor([[2, 5]]))[0, -1] / temperature).softmax(-1)
    second = (model(torch.tensor([[2, 5, i] for i in range(V)]))[:, -1] / temperature).softmax(-1)
    pairs = (first[:, None] * second).flatten().detach()
    assert chi_square([a * V + b for a, b in answers], pairs) < 75                     # 35 degrees: p < 1e-4
    assert chi_square([a * V + b for a, b in answers], pairs.roll(1)) > 1000


def support(logits, **how):
    """Per row, the set of tokens that 400 draws yield."""
    rng = torch.Generator().manual_seed(0)
    drawn = gpt.sample_tokens(logits.repeat(400, 1), rng=rng, **how).view(400, -1)
    return [set(column.tolist()) for column in drawn.T]


CUTS = [  # of the probabilities .4 .3 .2 .1, how many tokens stay
    (dict(), 4), (dict(top_k=1), 1), (dict(top_k=3), 3), (dict(top_k=9), 4),
    (dict(top_p=1e-9), 1), (dict(top_p=0.39), 1), (dict(top_p=0.41), 2), (dict(top_p=0.69), 2), (dict(top_p=0.71), 3),
    (dict(top_p=0.95), 4), (dict(top_p=1.0), 4), (dict(temperature=0), 1),
    (dict(top_k=2, top_p=0.5), 1), (dict(top_k=2, top_p=0.6), 2),   # top_k first: .4 of .7 is more than half
    (dict(temperature=0.5, top_p=0.5), 1), (dict(temperature=4.0, top_p=0.71), 3),   # temperature first: .53 and .29 .26 .24 .20
]


@pytest.mark.parametrize("how, n", CUTS, ids=[str(c[0]) for c in CUTS])
def test_top_k_and_top_p_keep_exactly_the_likeliest(how, n):
    probs = torch.tensor([.4, .3, .2, .1])
    rows = torch.stack([probs.roll(i).log() + 3 * i for i in range(4)])                 # each row has its own order and level
    assert support(rows, **how) == [{(i + j) % 4 for j in range(n)} for i in range(4)]


def test_what_is_kept_keeps_its_odds():
    probs = torch.tensor([.1, .4, .2, .3])
    for how in (dict(top_k=3), dict(top_p=0.85)):
        drawn = gpt.sample_tokens(probs.log().repeat(20_000, 1), rng=torch.Generator().manual_seed(0), **how)
        assert chi_square((drawn - 1).tolist(), torch.tensor([4, 2, 3]) / 9) < 18.5     # 2 degrees: p < 1e-4


def test_ties():
    """top_p keeps the smallest set, whichever of the equal ones is in it; top_k never takes a less likely token."""
    logits = torch.tensor([[1., 1., 1., 0.]])
    assert len(support(logits, top_p=0.01)[0]) == 1
    kept = support(logits, top_k=2)[0]
    assert kept <= {0, 1, 2} and len(kept) >= 2
    assert support(logits, temperature=0)[0] <= {0, 1, 2}


def test_top_p_0_is_greedy():
    assert support(torch.tensor([[1., 3., 2.]]), top_p=0.0) == [{1}]


def test_same_seed_same_answer():
    model, prompts = tiny(), texts_of([1, 5, 17, 2])
    before = torch.get_rng_state()
    first = gpt.generate(model, prompts, 20, seed=1)
    assert torch.equal(torch.get_rng_state(), before), "a seed of its own leaves the global stream alone"
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
    model, prompts = tiny(dropout=0.5), texts_of([1, 5])
    want = [greedy_by_hand(model, p, 10) for p in prompts]
    model.train(training)
    assert gpt.generate(model, prompts, 10, temperature=0) == want
    assert model.training is training and model.h[0].training is training


def test_dropout_acts_in_training_only():
    model, ids = tiny(dropout=0.5), torch.tensor(texts_of([9]))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


# The model

def test_the_future_changes_nothing():
    model, ids = tiny(), torch.tensor(texts_of([20, 20]))
    before = model(ids)
    for t in (1, 7, 19):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % 50
        after = model(changed)
        close(after[:, :t], before[:, :t])
        assert (after[:, t:] - before[:, t:]).abs().amax((0, 2)).min() > 1e-3           # and the past changes all that follows


def test_right_padding_and_neighbours_change_no_real_token():
    model, texts = tiny(), [torch.tensor(t) for t in texts_of([1, 5, 17, 2, 64])]
    for filler in (0, 49):
        ids = gpt.pad(texts, filler)
        states, logprobs = model.hidden(ids), gpt.token_logprobs(model, ids)
        for row, text in enumerate(texts):
            close(states[row, :len(text)], model.hidden(text[None])[0])
            close(logprobs[row, :len(text) - 1], gpt.token_logprobs(model, text[None])[0], 1e-6)


def test_logprobs_are_those_of_the_next_token():
    model, ids = tiny(), torch.tensor(texts_of([9, 9]))
    logits = model(ids)
    for temperature in (1.0, 0.7, 2.0):
        got = gpt.token_logprobs(model, ids, temperature)
        assert got.shape == (2, 8)
        for b in range(2):
            for t in range(8):
                scores = [math.exp(x / temperature) for x in logits[b, t].tolist()]
                assert got[b, t].item() == pytest.approx(math.log(scores[ids[b, t + 1]] / sum(scores)), abs=1e-5)


def test_logprobs_are_fp32_whatever_the_model():
    model, ids = tiny(dtype=torch.bfloat16), torch.tensor(texts_of([9]))
    got = gpt.token_logprobs(model, ids)
    assert got.dtype == torch.float32
    close(got, gpt.logprobs_of(model(ids).float(), ids), 1e-6)                          # softmax in fp32, not rounded after it
    assert gpt.generate(model, [[1, 2]], 3, temperature=0, seed=0)[0]


def test_gradients_reach_every_weight():
    model, ids = tiny(), torch.tensor(texts_of([64]))
    gpt.token_logprobs(model, ids).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().sum() > 0, name


def test_a_fresh_model_starts_as_gpt_2_does():
    """In its blocks; the embeddings are wider, but not so wide that the first guess is peaked: that is slow on a CPU."""
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
    assert F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item() == pytest.approx(math.log(500), abs=1.0)
    assert logits.std() < 1


def test_embeddings_are_tied():
    model, ids = tiny(), torch.tensor(texts_of([5]))
    close(model(ids), model.hidden(ids) @ model.wte.weight.T)
    assert sum(p.shape == (50, 32) for p in model.parameters()) == 1


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="30.*4"):
        gpt.GPT(gpt.GPTConfig(50, 16, n_layer=1, n_head=4, n_embd=30))


@pytest.mark.parametrize("n_embd, n_head", [(33, 3), (1, 1)])
def test_an_odd_width_is_a_width(n_embd, n_head):
    assert tiny(n_embd=n_embd, n_head=n_head)(torch.tensor([[1, 2]])).shape == (1, 2, 50)


# Several texts in a row

def test_pack_loses_nothing_and_keeps_the_order():
    rng = random.Random(0)
    for _ in range(20):
        texts = [torch.tensor(t) + 1 for t in texts_of([rng.randint(1, 16) for _ in range(rng.randint(1, 30))])]
        ids, segments = gpt.pack(texts, 16)
        assert ids.shape == segments.shape and ids.shape[1] == 16 and ids.dtype == segments.dtype == torch.long
        assert not ids[segments == 0].any()
        unpacked = []
        for row, numbers in zip(ids, segments):
            n = numbers.max().item()
            assert n >= 1 and numbers.tolist() == sorted(numbers[numbers > 0].tolist()) + [0] * (numbers == 0).sum().item()
            unpacked += [row[numbers == i].tolist() for i in range(1, n + 1)]
        assert unpacked == [t.tolist() for t in texts]


PACKED = [3, 1, 9, 16, 5, 5, 6, 2, 7]


def test_a_packed_text_has_the_states_it_has_alone():
    """Positions restart and nothing is seen of other texts; the padding is no text."""
    model, texts = tiny(block=16), [torch.tensor(t) for t in texts_of(PACKED)]
    ids, segments = gpt.pack(texts, 16)
    states, logits, rest = model.hidden(ids, segments=segments), model(ids, segments=segments), iter(texts)
    for row in range(len(ids)):
        for i in range(1, segments[row].max() + 1):
            text, here = next(rest)[None], segments[row] == i
            close(states[row, here], model.hidden(text)[0])
            close(logits[row, here], model(text)[0])
    assert next(rest, None) is None


def test_a_packed_text_sees_no_other():
    model = tiny(block=16)
    ids, segments = gpt.pack([torch.tensor(t) for t in texts_of([6, 7])], 16)
    before = model.hidden(ids, segments=segments)
    for t in range(16):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 50
        after = model.hidden(changed, segments=segments)
        others = segments[0] != segments[0, t]
        assert torch.equal(after[0, others], before[0, others])


def nats_by_hand(model, texts):
    """Sum of -log p of every token but the first of each text, and their number."""
    nats, n = 0.0, 0
    for text in texts:
        logprobs = model(text[None])[0].log_softmax(-1)
        for t in range(len(text) - 1):
            nats, n = nats - logprobs[t, text[t + 1]], n + 1
    return nats, n


def test_lm_loss_is_that_of_one_text_a_row_and_its_gradient_too():
    model, texts = tiny(block=16), [torch.tensor(t) for t in texts_of(PACKED)]
    nats, n = nats_by_hand(model, texts)
    want = torch.autograd.grad(nats / n, list(model.parameters()))
    packed = gpt.pack(texts, 16)
    alone = gpt.pad(texts), gpt.pad([torch.ones_like(t) for t in texts])
    garbage = torch.where(packed[1] > 0, packed[0], 17), packed[1]
    for ids, segments in (packed, alone, garbage):
        close(gpt.lm_loss(model, ids, segments, "sum").double(), nats, 1e-5)
        loss = gpt.lm_loss(model, ids, segments)
        close(loss.double(), nats / n, 1e-5)
        close(torch.autograd.grad(loss, list(model.parameters())), want, 1e-6)


def test_val_loss_by_brute_force():
    """Weighted per source as they are drawn; bits per byte unweighted, over the bytes that are predicted. An end token costs
    nats but is no text: its letters would flatter the number."""
    model = tiny(vocab=ENC.n_vocab, block=32)
    words = ["Tom went to the mill.", "The cow 牛 says moo. ", "a", "It costs 17 coins, said Ann.\n", "🐄"]
    docs = [torch.tensor(ENC.encode_ordinary(w) + [END], dtype=torch.int32) for w in words]
    assert 1 < min(map(len, docs[:2])) and max(map(len, docs)) <= 32
    sources = {"a": ([docs[0]], docs[:2], 3.0), "b": ([docs[0]], docs[2:], 1.0)}
    per_source = [nats_by_hand(model, [d.long() for d in s[1]]) for s in sources.values()]
    loss, bits = gpt.val_loss(model, sources, ENC, torch.device("cpu"))
    assert loss == pytest.approx((3 * per_source[0][0] / per_source[0][1] + per_source[1][0] / per_source[1][1]).item() / 4, rel=1e-5)
    size = sum(len(ENC.decode_bytes(d[1:-1].tolist())) for d in docs)
    assert bits == pytest.approx(sum(nats for nats, _ in per_source).item() / math.log(2) / size, rel=1e-5)


def test_val_loss_is_without_dropout_and_restores_the_mode():
    model, docs = tiny(vocab=ENC.n_vocab, block=32, dropout=0.5), [torch.arange(20)]
    want = gpt.val_loss(model, {"a": (docs, docs, 1.0)}, ENC, torch.device("cpu"))
    model.train()
    assert gpt.val_loss(model, {"a": (docs, docs, 1.0)}, ENC, torch.device("cpu")) == want
    assert model.training


def test_val_loss_keeps_its_limit_when_a_document_is_long():
    """A book is one document: without a limit inside it, each look at the validation loss reads a twentieth of the book."""
    model, book = tiny(vocab=ENC.n_vocab, block=32), torch.arange(500)
    short, long = ({"a": ([d], [d], 1.0)} for d in (book[:64], book))
    assert gpt.val_loss(model, long, ENC, torch.device("cpu"), limit=64) == gpt.val_loss(model, short, ENC, torch.device("cpu"), limit=64)


# The corpus

def documents(lengths, seed=0):
    """Texts of that many lines each; no two lines alike."""
    rng = random.Random(seed)
    return ["".join(f"{rng.choice(['Tom', 'Ann', 'Mia'])} has {rng.randrange(10**6)} apples, 苹果.\n" for _ in range(n)) for n in lengths]


def write_documents(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("<|end|>\n".join(texts).encode())
    return path


def whole(texts):
    return [i for t in texts for i in ENC.encode_ordinary(t) + [END]]


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("lengths", [[1, 2, 3, 4] * 8, [60], [1] * 50 + [40], [40] + [1] * 50])
def test_every_token_is_used_once_and_the_tail_is_for_validation(tmp_path, fraction, lengths):
    texts = documents(lengths)
    train, val, weight = gpt.read_corpus(write_documents(tmp_path / "a.txt", texts), ENC, 16, fraction)["a"]
    total, n_val = len(whole(texts)), sum(map(len, val))
    assert torch.cat(train + val).tolist() == whole(texts)
    assert n_val == pytest.approx(fraction * total, abs=2) and weight == total - n_val
    # One document at most is cut, where the two parts meet; all others are whole.
    parts = [d.tolist() for d in train + val]
    if len(parts) > len(texts):
        parts[len(train) - 1:len(train) + 1] = [parts[len(train) - 1] + parts[len(train)]]
    assert parts == [whole([t]) for t in texts]


def test_text_cannot_spell_a_special_token(tmp_path):
    text = "He wrote <|end|> and <|assistant|> on the wall <|end|>\n" * 20
    train, val, _ = gpt.read_corpus(write_documents(tmp_path / "a.txt", [text]), ENC, 16, 0.2)["a"]
    ids = torch.cat(train + val).tolist()
    assert [i for i in ids if i in ENC._special_tokens.values()] == [END] and ENC.decode(ids) == text + "<|end|>"


@pytest.mark.parametrize("separator, last", [("<|end|>\r\n", ""), ("<|end|>\n", "<|end|>"), ("<|end|>\n", "<|end|>\n")])
def test_separators_of_windows_and_at_the_end_of_the_file(tmp_path, separator, last):
    """None of them may stay in the text as letters: the model would learn to spell its own end token."""
    texts = documents([3] * 20)
    (tmp_path / "a.txt").write_bytes((separator.join(texts) + last).encode())
    train, val, _ = gpt.read_corpus(tmp_path / "a.txt", ENC, 16, 0.2)["a"]
    assert torch.cat(train + val).tolist() == whole(texts)


def test_sources_and_their_weights(tmp_path):
    for name, n in (("a", 30), ("b", 60), ("c", 20)):
        write_documents(tmp_path / f"{name}.txt", documents([n]))
    (tmp_path / "notes.md").write_text("never read")
    weights = lambda mixture="": {k: v[2] for k, v in gpt.read_corpus(tmp_path, ENC, 16, 0.2, mixture).items()}
    by_size = weights()
    assert set(by_size) == {"a", "b", "c"} and by_size["b"] == pytest.approx(2 * by_size["a"], rel=0.1)
    assert weights("a=2, b=.5") == {"a": 2, "b": .5, "c": 0}
    (tmp_path / "mixture.json").write_text('{"c": 3, "a": 1}')
    assert weights() == {"a": 1, "b": 0, "c": 3}
    assert weights("b=1") == {"a": 0, "b": 1, "c": 0}                                   # the flag outranks the file


def test_two_files_of_one_name_in_two_folders_are_both_read(tmp_path):
    texts = documents([20, 20])
    for folder, text in zip("xy", texts):
        write_documents(tmp_path / folder / "book.txt", [text])
    sources = gpt.read_corpus(tmp_path, ENC, 16, 0.2)
    assert sum(len(d) for train, val, _ in sources.values() for d in train + val) == len(whole(texts))


BAD_CORPUS = {  # file, mixture -> what the error says
    ("gone.txt", ""): ["gone.txt"], ("empty.txt", ""): ["empty.txt", "0 tokens"], ("no_txt", ""): ["no_txt", "*.txt"],
    ("short.txt", ""): ["short.txt", "--block-size"], ("latin.txt", ""): ["latin.txt", "byte 9", "iconv"],
    ("good", "b=1"): ["'b'", "'a'"], ("good", "a"): ["--mixture", "name=weight"], ("good", "a=much"): ["--mixture", "a=much"],
    ("good", "a=0"): ["a=0"], ("good", "a=-1"): ["a=-1"], ("bad_mixture", ""): ["mixture.json"],
}


@pytest.mark.parametrize("file, mixture", BAD_CORPUS)
def test_a_bad_corpus_is_named(tmp_path, file, mixture):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "no_txt").mkdir()
    (tmp_path / "no_txt" / "page.html").write_text("page")
    (tmp_path / "short.txt").write_text("A few words.")
    (tmp_path / "latin.txt").write_bytes("aber \u00e9 !".encode() + b"\xe9t\xe9")         # the fault is behind 8 characters but 9 bytes
    for folder in ("good", "bad_mixture"):
        write_documents(tmp_path / folder / "a.txt", documents([30]))
    (tmp_path / "bad_mixture" / "mixture.json").write_text("a: 1")
    with pytest.raises(UserError) as e:
        gpt.read_corpus(tmp_path / file, ENC, 16, 0.2, mixture)
    assert "\n" not in str(e.value)
    for part in BAD_CORPUS[file, mixture]:
        assert part in str(e.value), e.value


def shares(sources, n=150_000, T=32):
    texts, drawn = gpt.draw_documents(sources, gpt.document_odds(sources, T), n, T, random.Random(0))
    total = sum(map(len, texts))
    assert n <= total < n + T and sum(drawn.values()) == total and max(map(len, texts)) <= T
    return {k: v / total for k, v in drawn.items()}, texts


def test_token_shares_follow_the_weights_whatever_the_lengths():
    """Short documents are drawn more often to make up the same share; one longer than the context counts as a window."""
    sources = {"short": ([torch.full((5,), 1)] * 10, [], 6.0), "long": ([torch.full((30,), 2)] * 10, [], 3.0),
               "book": ([torch.full((3000,), 3)], [], 1.0), "never": ([torch.full((9,), 4)], [], 0.0)}
    got, texts = shares(sources)
    assert got == pytest.approx({"short": .6, "long": .3, "book": .1, "never": 0}, abs=0.01)
    counts = torch.cat(texts).bincount(minlength=5) / sum(map(len, texts))
    close(counts[1:].double(), torch.tensor(list(got.values())).double(), 1e-6)         # what it says it drew is what it drew


def test_token_shares_do_not_trust_the_head_of_a_sorted_file():
    sources = {"sorted": ([torch.zeros(4)] * 1000 + [torch.zeros(30)] * 1000, [], 1.0), "even": ([torch.zeros(17)] * 9, [], 1.0)}
    assert shares(sources)[0] == pytest.approx({"sorted": .5, "even": .5}, abs=0.02)


def test_a_draw_is_a_stretch_of_a_document_and_reaches_both_ends():
    sources = {"a": ([torch.arange(100, 140), torch.arange(7)], [], 1.0)}
    texts = [t.tolist() for t in gpt.draw_documents(sources, gpt.document_odds(sources, 32), 5000, 32, random.Random(0))[0]]
    starts = set()
    for t in texts:
        assert t == list(range(7)) or t == list(range(t[0], t[0] + 32))
        starts.add(t[0])
    assert starts == {0} | set(range(100, 109))


# Hugging Face's layout

def hugging_face_gpt2(w, c, ids):
    """GPT-2 from the two files alone, as transformers computes it: Conv1D is x @ w + b with w (in, out)."""
    ln = lambda x, n: F.layer_norm(x, x.shape[-1:], w[n + ".weight"], w[n + ".bias"], c["layer_norm_epsilon"])
    conv = lambda x, n: x @ w[n + ".weight"] + w[n + ".bias"]
    T, H = ids.shape[1], c["n_head"]
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]
    for layer in range(c["n_layer"]):
        p = f"transformer.h.{layer}."
        q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in conv(ln(x, p + "ln_1"), p + "attn.c_attn").chunk(3, -1))
        a = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(torch.ones(T, T).tril() == 0, -math.inf).softmax(-1)
        x = x + conv((a @ v).transpose(1, 2).flatten(2), p + "attn.c_proj")
        m = conv(ln(x, p + "ln_2"), p + "mlp.c_fc")
        x = x + conv(0.5 * m * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m ** 3))), p + "mlp.c_proj")
    return ln(x, "transformer.ln_f") @ w["lm_head.weight"].T


def test_the_saved_files_are_gpt_2_in_hugging_faces_names(tmp_path):
    model, ids = tiny(dtype=torch.float32), torch.tensor(texts_of([20, 20]))
    model.save_pretrained(tmp_path)
    w, c = torch.load(tmp_path / "pytorch_model.bin"), json.loads((tmp_path / "config.json").read_text())
    assert set(w) == {"lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"} | {
        f"transformer.{n}.{k}" for k in ("weight", "bias") for n in ["ln_f"] + [
            f"h.{i}.{m}" for i in range(2) for m in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]}
    shapes = {k.removeprefix("transformer.h.0."): tuple(v.shape) for k, v in w.items()}
    assert shapes["attn.c_attn.weight"] == (32, 96) and shapes["mlp.c_fc.weight"] == (32, 128) and shapes["mlp.c_proj.weight"] == (128, 32)
    assert {k: c[k] for k in ("model_type", "activation_function", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")} == dict(
        model_type="gpt2", activation_function="gelu_new", vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    close(hugging_face_gpt2(w, c, ids), model(ids).detach(), 1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_saved_and_read_again_it_is_the_same_model(tmp_path, bias):
    model, ids = tiny(dtype=torch.float32, bias=bias), torch.tensor(texts_of([20, 20]))
    model.save_pretrained(tmp_path)
    close(gpt.GPT.from_pretrained(tmp_path).eval()(ids), model(ids), 1e-6)


def test_reads_the_layout_of_the_hub(tmp_path):
    """gpt2's own files have no 'transformer.' before the names, no lm_head, and carry the causal mask as a buffer."""
    model, ids = tiny(dtype=torch.float32), torch.tensor(texts_of([20]))
    model.save_pretrained(tmp_path)
    w = torch.load(tmp_path / "pytorch_model.bin")
    w = {k.removeprefix("transformer."): v for k, v in w.items() if k != "lm_head.weight"}
    torch.save(w | {"h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()}, tmp_path / "pytorch_model.bin")
    assert torch.equal(gpt.GPT.from_pretrained(tmp_path).eval()(ids), model(ids))


@pytest.mark.parametrize("damage", ["no folder", "no config", "no weights", "broken config", "config of another model", "a weight is missing", "other sizes"])
def test_a_damaged_folder_is_named(tmp_path, damage):
    folder = tmp_path / "gpt2"
    if damage != "no folder":
        tiny(dtype=torch.float32).save_pretrained(folder)
    config = folder / "config.json"
    if damage == "no config":
        config.unlink()
    if damage == "no weights":
        (folder / "pytorch_model.bin").unlink()
    if damage == "broken config":
        config.write_text(config.read_text()[:40])
    if damage == "config of another model":
        config.write_text('{"model_type": "llama", "hidden_size": 32}')
    if damage == "a weight is missing":
        w = torch.load(folder / "pytorch_model.bin")
        torch.save({k: v for k, v in w.items() if "h.1." not in k}, folder / "pytorch_model.bin")
    if damage == "other sizes":
        config.write_text(config.read_text().replace('"n_embd": 32', '"n_embd": 64'))
    with pytest.raises(UserError, match="gpt2"):
        gpt.GPT.from_pretrained(folder)


# The tokenizer

def random_text(rng, n):
    """Characters of every kind, but no surrogates: those are no text."""
    kinds = [lambda: rng.choice(" \n\r\t'sST1.\x85\u2028\u3000"), lambda: chr(rng.randrange(0x20)), lambda: rng.choice("abcdefg"),
             lambda: chr(rng.randrange(0x4E00, 0xA000)), lambda: chr(rng.randrange(0x1F300, 0x1FB00)),
             lambda: chr(rng.randrange(0xD800)), lambda: chr(rng.randrange(0xE000, 0x110000)), lambda: rng.choice(gpt.SPECIAL)]
    return "".join(rng.choice(kinds)() for _ in range(n))


def test_any_text_round_trips_and_never_makes_a_special_token():
    rng, special = random.Random(0), set(ENC._special_tokens.values())
    fixed = ["", " ", "\x00", "\ufeffBOM", "村里的苹果", "👩‍👩‍👧‍👦🇫🇷👍🏽", "مرحبا हिन्दी", "\r\n" * 99] + gpt.SPECIAL + ["".join(gpt.SPECIAL)]
    for text in fixed + [random_text(rng, rng.randint(1, 80)) for _ in range(300)]:
        ids = ENC.encode_ordinary(text)
        assert ENC.decode(ids) == text and not special & set(ids)


def test_the_special_tokens():
    ids = [ENC.encode_single_token(s) for s in gpt.SPECIAL]
    assert len(set(ids)) == 5 and {"<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"} == set(gpt.SPECIAL)
    assert sorted(ids) == list(range(len(ENC._mergeable_ranks), ENC.n_vocab))           # beside the ordinary ones, not among them
    assert ENC._special_tokens["<|pad|>"] != ENC._special_tokens["<|end|>"]


@pytest.mark.parametrize("piece", [" ", "a", "\n", "猫", "!", "\u3000"])
def test_a_million_of_one_character_does_not_crash(piece):
    text = piece * (1_000_000 // len(piece.encode())) + "x"
    assert ENC.decode(ENC.encode_ordinary(text)) == text


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A stand-in for tiktoken's gpt2, which is a download; and a folder of that name, as its weights often lie in one."""
    enc = tiktoken.Encoding("theirs", pat_str=r"\w+|\W", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"theirs": enc}[name])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()


def test_a_tiktoken_name_gets_our_special_tokens_behind_its_own(theirs):
    enc = gpt.get_tokenizer("theirs")
    assert enc._special_tokens == {"<|endoftext|>": 256} | {s: 257 + i for i, s in enumerate(gpt.SPECIAL)}
    assert enc.n_vocab == 262 and enc.encode_ordinary("a<|end|>") == list(b"a<|end|>")
    with pytest.raises(UserError, match="'gone'"):
        gpt.get_tokenizer("gone")


def tokenizer_file(path, **changes):
    raw = json.loads((ROOT / "data" / "tokenizer.json").read_text())
    path.write_text(json.dumps(raw | changes))
    return str(path)


def test_a_tokenizer_from_a_file(tmp_path):
    enc = gpt.get_tokenizer(tokenizer_file(tmp_path / "t.json"))
    assert gpt.fingerprint(enc) == gpt.fingerprint(ENC) and enc._special_tokens == ENC._special_tokens
    assert enc.encode_ordinary("The cow, 牛.") == ENC.encode_ordinary("The cow, 牛.")
    ids = dict(zip(gpt.SPECIAL, [ENC._special_tokens[s] for s in gpt.SPECIAL[::-1]]))
    other = tiktoken.Encoding("other", pat_str=ENC._pat_str, mergeable_ranks=ENC._mergeable_ranks, special_tokens=ids)
    assert gpt.fingerprint(other) != gpt.fingerprint(ENC)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": "x"', '{"name": "x", "pattern": ".", "ranks": ["?"], "special": []}',
                                     b"\xff\xfe\x00", dict(special=[]), dict(special=gpt.SPECIAL[:2]), "a folder"])
def test_a_broken_tokenizer_file_is_named(tmp_path, content):
    path = tmp_path / "t.json"
    if isinstance(content, dict):
        tokenizer_file(path, **content)
    elif content == "a folder":
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="t.json"):
        gpt.get_tokenizer(str(path))


# Checkpoints

def test_a_checkpoint_comes_back(tmp_path):
    state = dict(a=torch.randn(3), b=[1, "two", None, {"c": (4, 5.0)}])
    gpt.save_checkpoint(tmp_path / "new" / "c.pt", **state)
    back = gpt.load_checkpoint(tmp_path / "new" / "c.pt")
    assert torch.equal(back["a"], state["a"]) and back["b"] == state["b"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["c.pt"]


def test_a_write_that_fails_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    gpt.save_checkpoint(path, a=1)
    old = path.read_bytes()

    def full_disk(state, f):
        (f if hasattr(f, "write") else open(f, "wb")).write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    for file in (path, tmp_path / "first.pt"):
        with pytest.raises(OSError):
            gpt.save_checkpoint(file, a=2)
    assert path.read_bytes() == old and not (tmp_path / "first.pt").exists()


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_never_runs_code(tmp_path):
    torch.save({"model": Malice(str(tmp_path / "hacked"))}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="c.pt"):
        gpt.load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "hacked").exists()


def test_a_damaged_checkpoint_is_named(tmp_path):
    gpt.save_checkpoint(tmp_path / "c.pt", a=torch.randn(999))
    whole_file = (tmp_path / "c.pt").read_bytes()
    for content in (b"", b"text", whole_file[:100], whole_file[:-1], whole_file[:len(whole_file) // 2]):
        (tmp_path / "c.pt").write_bytes(content)
        with pytest.raises(UserError, match="c.pt"):
            gpt.load_checkpoint(tmp_path / "c.pt")
    with pytest.raises(UserError, match="gone.pt"):
        gpt.load_checkpoint(tmp_path / "gone.pt")


def saved(path, enc=ENC, name="", **changes):
    """A checkpoint of a tiny model, with a few entries exchanged."""
    model = tiny(vocab=enc.n_vocab, block=32, dtype=torch.float32)
    gpt.save_model(path, model, enc, name, note="kept")
    state = gpt.load_checkpoint(path)
    gpt.save_checkpoint(path, **{k: v for k, v in (state | changes).items() if v is not None})
    return model


def test_load_model_gives_back_the_model_in_eval_mode(tmp_path):
    model, ids = saved(tmp_path / "m.pt"), torch.tensor([[1, 2, 3]])
    back, enc, state = gpt.load_model(tmp_path / "m.pt", dropout=0.5)
    assert torch.equal(back(ids), model(ids)) and not back.training and back.config.dropout == 0.5
    assert gpt.fingerprint(enc) == gpt.fingerprint(ENC) and state["note"] == "kept"
    back.train()
    assert not torch.equal(back(ids), model(ids))
    # A reward model's file: the same body under another prefix, with a head beside it.
    body = {"body." + k: v for k, v in model.state_dict().items()} | {"head.weight": torch.zeros(1, 32)}
    saved(tmp_path / "rm.pt", model=body)
    assert torch.equal(gpt.load_model(tmp_path / "rm.pt")[0](ids), model(ids))


def test_dropout_of_pretraining_does_not_come_along(tmp_path):
    """Who loads a model decides: a policy that inherits dropout has ratios that are noise, even before its first step."""
    model, ids = tiny(ENC.n_vocab, dropout=0.3, dtype=torch.float32), torch.tensor([[1, 2, 3]])
    gpt.save_model(tmp_path / "m.pt", model, ENC, "")
    back = gpt.load_model(tmp_path / "m.pt")[0].train()
    assert back.config.dropout == 0 and torch.equal(back(ids), model(ids))


def swapped(items, i, j):
    items = list(items)
    items[i], items[j] = items[j], items[i]
    return items


RAW = json.loads((ROOT / "data" / "tokenizer.json").read_text())


@pytest.mark.parametrize("change", [dict(ranks=swapped(RAW["ranks"], 65, 66)), dict(ranks=swapped(RAW["ranks"], 700, 800)),
                                    dict(ranks=RAW["ranks"][:-1] + [base64.b64encode(b"zqzq").decode()]), dict(pattern=r"\p{L}+|\P{L}"),
                                    dict(special=swapped(RAW["special"], 1, 3))],
                         ids=["two bytes", "two merges", "another token", "the pattern", "two specials"])
def test_a_checkpoint_refuses_another_tokenizer(tmp_path, change):
    name = tokenizer_file(tmp_path / "t.json")
    saved(tmp_path / "m.pt", name=name)
    gpt.load_model(tmp_path / "m.pt")
    tokenizer_file(tmp_path / "t.json", **change)
    with pytest.raises(UserError, match="(m.pt|t.json).*tokenizer"):
        gpt.load_model(tmp_path / "m.pt")


@pytest.mark.parametrize("changes", [
    dict(gpt=dict(vocab_size=ENC.n_vocab, block_size=32, n_layer=2, n_head=4, n_embd=64)),
    dict(gpt=dict(vocab_size=ENC.n_vocab, block_size=32, n_layer=3, n_head=4, n_embd=32)),
    dict(gpt=dict(vocab_size=ENC.n_vocab, block_size=32, n_layer=2, n_head=4, n_embd=32, rotary=True)),
    dict(gpt=None), dict(model=None), dict(fingerprint=None), dict(model={})], ids=str)
def test_a_checkpoint_that_is_not_ours_is_refused(tmp_path, changes):
    saved(tmp_path / "m.pt", **changes)
    with pytest.raises(UserError, match="m.pt") as e:
        gpt.load_model(tmp_path / "m.pt")
    assert "\n" not in str(e.value)


# Settings and small parts

def test_every_field_has_a_flag_and_advice(capsys):
    assert set(gpt.field_advice(gpt.Config)) == {f.name for f in dataclasses.fields(gpt.Config)}
    assert all(len(advice) > 10 for advice in gpt.field_advice(gpt.Config).values())
    for f in dataclasses.fields(gpt.Config):
        value = {str: "x", int: 7, float: 0.25, bool: True}[type(f.default)]
        cfg = gpt.parse(gpt.Config, "", ["--" + f.name.replace("_", "-")] + [str(value)] * (value is not True))
        assert cfg == dataclasses.replace(gpt.Config(), **{f.name: value}), f.name
    assert gpt.parse(gpt.Config, "", []) == gpt.Config()
    with pytest.raises(SystemExit) as e:
        gpt.parse(gpt.Config, gpt.__doc__, ["--help"])
    shown = "".join(capsys.readouterr().out.split())                                    # argparse wraps, also after a hyphen
    assert e.value.code == 0
    for name, advice in gpt.field_advice(gpt.Config).items():
        assert "--" + name.replace("_", "-") in shown and "".join(advice.split()) in shown
        assert f"[{getattr(gpt.Config(), name)}]" in shown


@dataclasses.dataclass
class Switches:
    on: bool = True
    "a switch that is on, at 100%"
    off: bool = False
    "a switch that is off"


def test_a_switch_has_a_no(capsys):
    assert gpt.parse(Switches, "", ["--no-on", "--off"]) == Switches(on=False, off=True)
    with pytest.raises(SystemExit):
        gpt.parse(Switches, "", ["--help"])
    assert "at 100%" in capsys.readouterr().out


BAD_FLAGS = {  # arguments -> what the one line must say
    "--stpes 3": ["unknown flag --stpes", "--steps"], "--n_layer=3": ["unknown flag --n_layer", "--n-layer"],
    "--block 3": ["unknown flag --block"], "word": ["word"],
    "--steps many": ["--steps", "many"], "--steps 1.5": ["--steps", "1.5"], "--lr fast": ["--lr", "fast"], "--steps": ["--steps"],
    "--data gone.txt": ["gone.txt"], "--device tpu": ["--device tpu", "cpu"], "--n-embd 30": ["--n-embd 30", "--n-head 4"],
    "--tokenizer gone.json": ["gone.json"], "--init-from gone": ["gone", "config.json"], "--sample Hello": ["gpt.pt"],
    "--schedule Cosine": ["--schedule Cosine", "cosine"], "--steps 0": ["--steps 0"], "--eval-every 0": ["--eval-every 0"],
    "--batch-tokens 0": ["--batch-tokens 0"], "--val-fraction 0": ["--val-fraction 0"], "--out text.txt": ["text.txt"],
}


@pytest.mark.parametrize("args", BAD_FLAGS)
def test_a_users_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, args):
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "text.txt", documents([40]))
    monkeypatch.setattr(sys, "argv", f"gpt.py --data text.txt --out new --block-size 16 --n-layer 1 --steps 30 {args}".split())
    with pytest.raises(SystemExit) as e:
        gpt.run(gpt.main, gpt.Config, gpt.__doc__)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1 and error.startswith("gpt.py: "), error
    for part in BAD_FLAGS[args]:
        assert part in error, error
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("trouble, code, parts", [(OSError(28, "No space left on device", "x.pt"), 2, ["x.pt", "No space left"]),
                                                  (PermissionError("no name, no number"), 2, ["no name"]), (KeyboardInterrupt(), 130, ["stopped"])])
def test_trouble_of_the_machine_is_no_traceback_either(monkeypatch, capsys, trouble, code, parts):
    def main(cfg):
        raise trouble

    monkeypatch.setattr(sys, "argv", ["gpt.py"])
    with pytest.raises(SystemExit) as e:
        gpt.run(main, gpt.Config, "")
    error = capsys.readouterr().err.lstrip("\n")
    assert e.value.code == code and error.count("\n") == 1 and all(part in error for part in parts), error


def test_a_users_mistake_in_a_real_shell(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "gpt.py", "--stpes", "3"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (run.returncode, run.stdout) == (2, "") and not list(tmp_path.iterdir())
    assert run.stderr == "gpt.py: unknown flag --stpes; did you mean --steps?\n"


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpt.pick_device("auto") == gpt.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cpu"):
        gpt.pick_device("cuda")


def test_learning_rate():
    rates = {s: [gpt.lr_at(i, 200, 2.0, s) for i in range(200)] for s in ("cosine", "constant", "linear")}
    for rate in rates.values():
        assert rate[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])           # a twentieth of warmup, never 0
        assert max(rate) == rate[10] == pytest.approx(2.0)
    assert set(rates["constant"][9:]) == {2.0}
    for name in ("cosine", "linear"):
        assert all(a > b for a, b in zip(rates[name][10:], rates[name][11:]))
        assert rates[name][-1] == pytest.approx(0.2, abs=0.02) and gpt.lr_at(200, 200, 2.0, name) == pytest.approx(0.2)
        assert rates[name][105] == pytest.approx(1.1)                                   # halfway between top and floor
    assert rates["cosine"][57] > rates["linear"][57]
    assert gpt.lr_at(0, 1, 2.0) == 2.0 and gpt.lr_at(200, 200, 2.0, floor=0.5) == pytest.approx(1.0)


def test_weight_decay_is_for_matrices_only():
    model = tiny()
    groups = gpt.adamw(model, 1e-3, 0.1).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert all(decay[id(p)] == (0.1 if p.dim() == 2 else 0) for p in model.parameters()) and len(decay) == len(list(model.parameters()))


def test_adamw_by_hand():
    """Four steps of AdamW (1711.05101, algorithm 2) in plain Python, with betas .9 and .95; only the matrix decays."""
    layer = torch.nn.Linear(1, 1).double()
    optimizer = gpt.adamw(layer, 0.1, 0.5)
    want = [[p.item(), 0.0, 0.0, decay] for p, decay in ((layer.weight, 0.5), (layer.bias, 0.0))]
    for step, gradient in enumerate((1.0, -0.3, 2.0, 0.1), 1):
        for p, row in zip((layer.weight, layer.bias), want):
            p.grad = torch.full_like(p, gradient)
            x, m, v, decay = row
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient ** 2
            x = x * (1 - 0.1 * decay) - 0.1 * (m / (1 - 0.9 ** step)) / (math.sqrt(v / (1 - 0.95 ** step)) + 1e-8)
            row[:3] = x, m, v
        optimizer.step()
        assert [layer.weight.item(), layer.bias.item()] == pytest.approx([row[0] for row in want], abs=1e-9)


def test_take_step_clips_sets_the_rate_and_clears_old_gradients():
    weight = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(weight.parameters(), lr=99.0)
    start = weight.weight.item()
    for i in range(1, 3):                                                               # gradients that add up would move it further
        assert gpt.take_step(30 * weight(torch.ones(1, 1)).sum(), optimizer, weight, lr=0.5) == pytest.approx(30)
        assert weight.weight.item() == pytest.approx(start - 0.5 * i, abs=1e-5)


# Pretraining

def pretrain(tmp_path, name, **changes):
    data = write_documents(tmp_path / "text.txt", documents([3, 8, 1] * 12))
    settings = dict(data=str(data), out=str(tmp_path / name), n_layer=1, n_head=2, n_embd=16, block_size=32, batch_tokens=128, steps=10,
                    eval_every=4, device="cpu", dropout=0.1)
    gpt.main(gpt.Config(**settings | changes))
    rows = [json.loads(line) for line in (tmp_path / name / "gpt.jsonl").read_text().splitlines()]
    return rows, gpt.load_checkpoint(tmp_path / name / "gpt.pt")


def test_same_seed_same_run(tmp_path, capsys):
    a, b, c = pretrain(tmp_path, "a"), pretrain(tmp_path, "b"), pretrain(tmp_path, "c", seed=1)
    assert a[0] == b[0] and len(a[0]) == 10
    assert all(torch.equal(v, b[1]["model"][k]) for k, v in a[1]["model"].items())
    assert [r["loss"] for r in a[0]] != [r["loss"] for r in c[0]]
    assert pretrain(tmp_path, "a")[0] == a[0]                                           # a second run starts its metrics anew
    assert [r["step"] for r in a[0] if "val_loss" in r] == [3, 7, 9]
    assert "python sft.py --out" in capsys.readouterr().out


def test_later_stages_find_the_very_text_of_pretraining(tmp_path, capsys):
    """Split and weighted as it was: else a later stage validates on what was learned by heart."""
    for name, n in (("a", 30), ("b", 60)):
        write_documents(tmp_path / "texts" / f"{name}.txt", documents([3] * n, seed=n))
    pretrain(tmp_path, "run", data=str(tmp_path / "texts"), val_fraction=0.2, mixture="b=3,a=1", steps=1)
    checkpoint, folder = tmp_path / "run" / "gpt.pt", tmp_path / "texts"
    plain = lambda sources: {k: ([d.tolist() for d in t], [d.tolist() for d in v], w) for k, (t, v, w) in sources.items()}
    assert plain(gpt.corpus_of(checkpoint, ENC, 32)) == plain(gpt.read_corpus(folder, ENC, 32, 0.2, "b=3,a=1"))
    assert plain(gpt.corpus_of(checkpoint, ENC, 32, str(folder / "a.txt"))) == plain(gpt.read_corpus(folder / "a.txt", ENC, 32, 0.05))


def test_it_learns_and_continues_a_text(tmp_path, capsys):
    rows, state = pretrain(tmp_path, "a", steps=60, lr=1e-2, dropout=0.0)
    assert rows[0]["loss"] == pytest.approx(math.log(ENC.n_vocab), abs=0.5) and rows[-1]["val_loss"] < 4.5
    model, enc, _ = gpt.load_model(tmp_path / "a" / "gpt.pt")
    train, val, _ = gpt.read_corpus(tmp_path / "text.txt", enc, 32, 0.05)["text"]
    loss, bits = gpt.val_loss(model, {"text": (train, val, 1.0)}, enc, torch.device("cpu"))
    assert (loss, bits) == pytest.approx((rows[-1]["val_loss"], rows[-1]["bits_per_byte"]))   # what is saved is what was measured
    capsys.readouterr()
    gpt.main(gpt.Config(out=str(tmp_path / "a"), sample="Tom has", device="cpu"))
    assert capsys.readouterr().out.startswith("Tom has")


def test_it_starts_from_pretrained_weights(tmp_path, capsys):
    tiny(vocab=ENC.n_vocab, block=48, dtype=torch.float32).save_pretrained(tmp_path / "hub")
    _, state = pretrain(tmp_path, "a", init_from=str(tmp_path / "hub"), steps=1, lr=0.0)
    w = torch.load(tmp_path / "hub" / "pytorch_model.bin")
    assert torch.equal(state["model"]["wte.weight"], w["lm_head.weight"]) and state["gpt"]["block_size"] == 48
    assert state["gpt"]["dropout"] == 0.1, "--dropout holds for a pretrained model, too"


def test_gpt_2_starts_with_its_own_tokenizer(tmp_path, theirs, capsys):
    """Its weights know no special token of ours: they get five new rows, and the old ones keep their meaning."""
    tiny(vocab=257, block=48, dtype=torch.float32).save_pretrained(tmp_path / "theirs")
    _, state = pretrain(tmp_path, "a", init_from="theirs", tokenizer="theirs", steps=1, lr=0.0)
    w = torch.load(tmp_path / "theirs" / "pytorch_model.bin")
    assert state["gpt"]["vocab_size"] == 262 and torch.equal(state["model"]["wte.weight"][:257], w["lm_head.weight"])
    gpt.load_model(tmp_path / "a" / "gpt.pt")


@pytest.mark.parametrize("vocab", [300, ENC.n_vocab - 6, ENC.n_vocab + 1, 5000])
def test_pretrained_weights_of_another_tokenizer_are_refused(tmp_path, vocab):
    """Too many tokens is as wrong as too few: each id would mean another word."""
    tiny(vocab=vocab, block=48, dtype=torch.float32).save_pretrained(tmp_path / "hub")
    with pytest.raises(UserError, match=f"{vocab}.*--tokenizer"):
        pretrain(tmp_path, "a", init_from=str(tmp_path / "hub"), steps=1)
