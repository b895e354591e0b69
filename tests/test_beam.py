"""data/beam.py: a beam without limits finds every response; its log-probs are the model's."""
import itertools

import pytest
import torch

import gpt
import sft
from data import beam
from tiny import END, ENC, random_gpt, random_ids, tiny_gpt, user

STOP = 3
V = 4
PROMPTS = [[1, 2], [0, 0, 1, 2, 1], [2]]


def every_continuation(n):
    """Return all lists of at most n ids of the vocabulary that end with STOP or have n ids."""
    found = []
    for length in range(1, n + 1):
        for ids in itertools.product(range(V), repeat=length):
            ended = ids[-1] == STOP or length == n
            if ended and STOP not in ids[:-1]:
                found.append(list(ids))
    return found


def logprob(model, prompt, ids):
    row = gpt.token_logprobs(model, torch.tensor([prompt + ids]))[0]
    return row[len(prompt) - 1:].sum().item()


def enumerated(model, prompt, n):
    """Return (log-probability, ids) of every continuation, the best first."""
    scored = [(logprob(model, prompt, ids), ids) for ids in every_continuation(n)]
    return sorted(scored, reverse=True)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_beam_as_wide_as_all_sequences_equals_enumeration(n):
    model = random_gpt(vocab=V, dtype=torch.float32)
    beams = beam.beam_search(model, PROMPTS, 200, n, STOP)
    for prompt, found in zip(PROMPTS, beams):
        want = enumerated(model, prompt, n)
        assert len(want) == {1: 4, 2: 13, 4: 121}[n]
        assert [h.ids for h in found] == [ids for _, ids in want]
        assert [h.logprob for h in found] == pytest.approx([p for p, _ in want], abs=1e-4)
        assert sum(torch.tensor([h.logprob for h in found]).exp()) == pytest.approx(1, abs=1e-4)


def slow_beam(model, prompt, width, n):
    """Return the beam of one prompt as (log-probability, ids), without a cache or batches."""
    held = [(0.0, [])]
    for _ in range(n):
        extended = []
        for score, ids in held:
            if ids and ids[-1] == STOP:
                extended.append((score, ids))
            else:
                longer = [ids + [token] for token in range(V)]
                extended += [(logprob(model, prompt, ids), ids) for ids in longer]
        held = sorted(extended, reverse=True)[:width]
    return held


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_a_narrow_beam_equals_one_without_cache_and_batch(width, seed):
    model = random_gpt(vocab=V, dtype=torch.float32, seed=seed)
    beams = beam.beam_search(model, PROMPTS, width, 9, STOP)
    for prompt, found in zip(PROMPTS, beams):
        want = slow_beam(model, prompt, width, 9)
        assert [h.ids for h in found] == [ids for _, ids in want]
        assert [h.logprob for h in found] == pytest.approx([p for p, _ in want], abs=1e-4)


def test_a_beam_of_one_is_greedy_decoding():
    prompts = random_ids([5, 17, 9, 1])
    model = tiny_gpt(0)
    beams = beam.beam_search(model, prompts, 1, 12, END)
    greedy = gpt.generate(model, prompts, 12, temperature=0, stop=END)
    assert [[h.ids for h in found] for found in beams] == [[ids] for ids in greedy]


def test_a_response_ends_where_the_context_does():
    """The shorter prompt goes on after the longer one has filled its context."""
    model = random_gpt(vocab=V, block=8, dtype=torch.float32)
    prompts = [[1] * 6, [2] * 2]
    for n, longest in ((99, [2, 6]), (1, [1, 1])):
        beams = beam.beam_search(model, prompts, 6, n, STOP)
        assert [max(len(h.ids) for h in found) for found in beams] == longest
        for prompt, found in zip(prompts, beams):
            for h in found:
                assert h.logprob == pytest.approx(logprob(model, prompt, h.ids), abs=1e-4)


def test_the_order_of_the_prompts_changes_nothing():
    model = tiny_gpt(1)
    chats = [[user(text)] for text in ("Hi", "What does the cow say?", "Why?", "Name two foods.")]
    responses = beam.beam_responses(model, ENC, chats, 5, 8)
    assert beam.beam_responses(model, ENC, chats[::-1], 5, 8) == responses[::-1]


def test_responses_are_different_strings_the_likeliest_first():
    model = tiny_gpt(1)
    chat = [user("Hi")]
    [responses] = beam.beam_responses(model, ENC, [chat], 6, 8)
    assert len(responses) == len(set(responses)) == 6
    [found] = beam.beam_search(model, [sft.render_prompt(chat, ENC)], 9, 8, END)
    strings = [sft.decode_response(h.ids, ENC) for h in found]
    assert responses[0] == strings[0]
    assert [s for s in strings if s in responses][:6] == responses
    scores = [h.logprob for h in found]
    assert scores == sorted(scores, reverse=True)


def test_one_string_spelled_in_two_ways_is_one_response(monkeypatch):
    """'a' + 'b' and 'ab' are different ids."""
    spelled = [[ENC.encode_ordinary(c)[0] for c in text] for text in ("cow", "dog")]
    joined = ENC.encode_ordinary("cow")
    assert joined != spelled[0]
    beams = [[beam.Hypothesis(ids + [END], -1.0) for ids in (spelled[0], joined, spelled[1])]]
    monkeypatch.setattr(beam, "beam_search", lambda *args: beams)
    assert beam.beam_responses(None, ENC, [[user("Hi")]], 5, 8) == [["cow", "dog"]]
    assert beam.beam_responses(None, ENC, [[user("Hi")]], 1, 8) == [["cow"]]
