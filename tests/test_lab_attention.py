"""lab/attention.py: what each model sees and is asked, and a verdict that follows the numbers."""
import random

import pytest
import torch

import gpt
from data import corpus
from data.text import Source, pack, read_corpus
from data.tokenizer import end_of
from lab import attention
from tiny import ENC, read_jsonl

MASK = attention.mask_token(ENC)


def tiny(seed=0):
    """Return a random two-layer GPT whose weights are far from their start."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, attention.T, 2, 2, 16))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.eval()


def copier(seed):
    """Return a GPT whose blocks add nothing: it predicts at a place what stands there.

    Such a model finds every word that is left in sight.
    """
    model = tiny(seed)
    for block in model.h:
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            layer.weight.data.zero_()
            layer.bias.data.zero_()
    return model


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_token_sees_its_left_and_a_bidirectional_token_sees_all(causal):
    model = tiny()
    T = 9
    ids = torch.randint(0, 500, (1, T))
    before = attention.logits_of(model, ids, causal)[0]
    for changed in range(T):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 500
        after = attention.logits_of(model, other, causal)[0]
        differs = (after - before).abs().amax(-1) > 1e-5
        assert differs.tolist() == [not causal or t >= changed for t in range(T)]


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_do_not_see_each_other(causal):
    model = tiny()
    documents = [torch.randint(0, 500, (n,)) for n in (5, 11, 3, 20)]
    ids, segments = pack(documents, 40)
    states = attention.hidden(model, ids, segments, causal)
    remaining = iter(documents)
    for row, segment in zip(states, segments):
        for k in range(1, int(segment.max()) + 1):
            document = next(remaining)
            ones = torch.ones(1, len(document), dtype=torch.long)
            alone = attention.hidden(model, document[None], ones, causal)[0]
            assert torch.allclose(row[segment == k], alone, atol=1e-5)


def test_the_causal_model_is_the_gpt_itself():
    model = tiny()
    ids = torch.randint(0, 500, (3, 12))
    assert torch.allclose(attention.logits_of(model, ids, True), model(ids), atol=1e-5)


def test_the_bidirectional_model_differs_where_there_is_a_right_side():
    model = tiny()
    ids = torch.randint(0, 500, (3, 12))
    single = attention.logits_of(model, ids[:, :1], False)
    assert torch.allclose(single, model(ids[:, :1]), atol=1e-5)
    first = attention.logits_of(model, ids, False)[:, 0]
    assert not torch.allclose(first, model(ids)[:, 0], atol=1e-2)


def test_hidden_tokens_are_chosen_and_shown_as_in_bert():
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 500, (400, 64))
    real = torch.ones(400, 64, dtype=torch.bool)
    real[:, 50:] = False
    shown, chosen = attention.hide_tokens(ids, real, 0.15, MASK, 500, rng)
    assert not chosen[~real].any()
    assert (shown == ids)[~chosen].all()
    n = chosen.sum().item()
    assert n / real.sum().item() == pytest.approx(0.15, abs=0.01)
    masked = (shown == MASK)[chosen].sum().item() / n
    same = (shown == ids)[chosen].sum().item() / n
    assert masked == pytest.approx(0.8, abs=0.02)
    assert same == pytest.approx(0.1, abs=0.02)      # a random token equals the old once in 500


def test_best_fit_is_the_candidate_of_the_likeliest_document():
    model = tiny(3)
    ids = torch.randint(0, 500, (1, 10))
    candidates = random.Random(0).sample(range(500), 80)

    def score(word, place):
        document = ids[0].tolist()
        document[place] = word
        logprobs = model(torch.tensor([document]))[0].log_softmax(-1)
        return sum(logprobs[t, document[t + 1]].item() for t in range(9))

    for place in (1, 4, 9):
        scores = {word: score(word, place) for word in candidates}
        assert attention.best_fit(model, ids, place, candidates) == max(scores, key=scores.get)


def test_gaps_are_words_in_the_middle_of_held_out_documents(tmp_path):
    corpus.write(tmp_path, seed=1, megabytes=0.2)
    sources = read_corpus(tmp_path / "pretrain", ENC, attention.T, 0.2)
    held_out = {tuple(d[:attention.T].tolist()) for s in sources.values() for d in s.val}
    gaps, candidates = attention.draw_gaps(sources, ENC, 40, random.Random(0))
    assert len(gaps) == 40
    for document, place in gaps:
        assert tuple(document) in held_out
        assert document[place] in candidates
        assert len(document) // 3 <= place <= 2 * len(document) // 3
        assert place + 4 < len(document)
        word = ENC.decode([document[place]])
        assert word[0] == " "
        assert word[1:].isalpha()


def learnt_document():
    """Return a document, sources that hold nothing else, and a Gap in its middle."""
    text = "Tom has a red boat and Ann has a blue kite in the old barn."
    document = torch.tensor(ENC.encode_ordinary(text) + [end_of(ENC)])
    sources = {"one": Source([document], [document], weight=1.0)}
    place = next(t for t in range(5, 12) if attention.is_word(ENC, document[t].item()))
    return document.tolist(), sources, attention.Gap(document.tolist(), place)


@pytest.mark.parametrize("causal", [True, False])
def test_both_models_learn_a_document(causal):
    document, sources, gap = learnt_document()
    cfg = attention.Config(steps=60, batch_tokens=64, n_embd=32, lr=1e-2)
    words = sorted({t for t in document if attention.is_word(ENC, t)})
    model = attention.train(causal, sources, ENC, cfg, 0, torch.device("cpu"))
    right = attention.measure(model, causal, [gap], words, MASK)
    assert right["gap, both sides"] == 1
    if causal:
        assert set(right) == {"gap, both sides", "next", "run", "gap, left side"}
        assert right["next"] == 1
        assert right["run"] == 1
    else:
        assert set(right) == {"gap, both sides", "next", "run"}


@pytest.mark.parametrize("causal", [True, False])
def test_no_guess_depends_on_the_word_to_find(causal):
    model = copier(5)
    rng = random.Random(6)
    document = [rng.randrange(500) for _ in range(14)]
    candidates = sorted(rng.sample(range(500), 20))
    place = 6
    gaps = [attention.Gap(document[:place] + [word] + document[place + 1:], place)
            for word in candidates]
    right = attention.measure(model, causal, gaps, candidates, MASK)
    for task in set(right) - {"run"}:
        assert right[task] == pytest.approx(1 / 20)     # one constant guess, right exactly once


def test_the_bidirectional_model_predicts_the_next_token_at_a_mask():
    model = copier(7)
    rng = random.Random(8)
    document = [rng.randrange(500) for _ in range(14)]
    place = 6

    def guess(ids):
        logits = attention.logits_of(model, torch.tensor([ids]), False)[0, -1]
        return logits[:500].argmax().item()

    at_mask = guess(document[:place] + [MASK])
    at_word = guess(document[:place])
    assert at_mask != at_word
    document[place] = at_mask
    gap = attention.Gap(document, place)
    assert attention.measure(model, False, [gap], list(range(500)), MASK)["next"] == 1


CAUSAL = {"gap, left side": 0.5, "gap, both sides": 0.7, "next": 0.5, "run": 0.4}
BIDIRECTIONAL = {"gap, both sides": 0.8, "next": 0.3, "run": 0.2}
GOOD = {"causal": CAUSAL, "bidirectional": BIDIRECTIONAL}


def test_the_verdict_holds_when_all_numbers_agree_with_the_claim():
    assert attention.verdict([GOOD, GOOD]).count("does not hold") == 0
    assert attention.verdict([GOOD]).count("holds") == 3


@pytest.mark.parametrize("task, value, part", [
    ("gap, both sides", 0.6, "whole document it does not hold"),
    ("gap, both sides", 0.4, "and does not hold here for the gap"),
    ("next", 0.6, "claim does not hold here for what comes next"),
    ("run", 0.5, "claim does not hold here for what comes next"),
])
def test_one_seed_is_enough_to_refute_a_part_of_the_verdict(task, value, part):
    bad = {"causal": CAUSAL, "bidirectional": BIDIRECTIONAL | {task: value}}
    assert part in attention.verdict([GOOD, bad])


def test_it_runs_and_logs(tmp_path, capsys):
    corpus.write(tmp_path / "data", seed=0, megabytes=0.3)
    cfg = attention.Config(out=str(tmp_path), steps=2, n=3, seeds=2, n_embd=16, device="cpu")
    attention.main(cfg)
    printed = capsys.readouterr().out
    assert printed.count("The claim ") == 1
    assert "bidirectional" in printed
    assert [r["seed"] for r in read_jsonl(tmp_path / "lab-attention.jsonl")] == [0, 1]
