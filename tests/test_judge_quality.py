"""Tests of lab/judge_quality.py: the measures in the table of self_reward.py."""

import math
import random
from collections import Counter

import pytest
import torch

import gpt
import sft
from data import probes, village
from data.tokenizer import get_tokenizer
from lab import judge_quality
from self_reward import Config, Pair

ENC = get_tokenizer()


def tiny_gpt():
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 128, 1, 2, 16))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize(
    "x, y, correlation",
    [
        ([1, 2, 3, 4], [10, 20, 30, 1000], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        # Ranks (1, 2.5, 2.5, 4) against (1, 2, 3, 4): 4.5 / sqrt(4.5 * 5).
        ([0, 5, 5, 9], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),
    ],
)
def test_spearman_by_hand(x, y, correlation):
    assert judge_quality.spearman(x, y) == pytest.approx(correlation)


def test_spearman_of_a_constant_is_nan():
    assert math.isnan(judge_quality.spearman([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize(
    "scores, golds, accuracy",
    [
        ([3, 1, 2], [1, 0, 0.5], 1),
        ([2, 2], [1, 0], 0.5),  # equal scores count half
        ([1, 2], [1, 0], 0),
        ([9, 0, 5], [1, 1, 0], 0.5),  # one pair right, one wrong, one of equal gold
        ([None, 5.0], [1, 0], 0),  # a missing score is the lowest
    ],
)
def test_accuracy_by_hand(scores, golds, accuracy):
    assert judge_quality.accuracy([scores], [golds]) == accuracy


def test_win_tie_lose_by_hand():
    shares = judge_quality.win_tie_lose([[1, 0], [0.5, 0]], [[0, 0], [0.5, 1]])
    assert shares == [0.25, 0.5, 0.25]


def test_agreement_by_hand():
    golds = [[0, 1], [1, 0], [1, 1], [2, 3]]
    pairs = [Pair(0, 1, 0), Pair(1, 1, 0), Pair(2, 0, 1), Pair(3, 1, 0)]
    assert judge_quality.agreement(pairs, golds) == dict(agree=0.5, contradict=0.25)
    assert judge_quality.agreement(pairs, None) == {}


def test_likelihood_sums_the_log_probabilities_with_the_end_token():
    model = tiny_gpt()
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in ("Hi", "Who are you?")]
    responses = [["Hello.", "I am Tom."], ["I am Tom.", ""]]
    values = judge_quality.likelihood(model, ENC, prompts, responses)
    for p, row, row_values in zip(prompts, responses, values):
        for response, value in zip(row, row_values):
            chat = p["prompt"] + [{"role": "assistant", "content": response}]
            ids, mask = sft.render(chat, ENC)
            logp = torch.log_softmax(model(torch.tensor([ids])), -1)[0]
            total = sum(logp[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t])
            assert value == pytest.approx(total, abs=1e-4)


# Probe pairs


def village_prompts(n, seed=0):
    rng = random.Random(seed)
    drawn = [village.new_task(rng) for _ in range(n)]
    return [{"prompt": messages, "task": task} for task, messages in drawn]


def test_the_probe_set_has_as_many_pairs_of_each_kind_as_it_may():
    prompts = village_prompts(600)
    possible = Counter(pair["kind"] for pair in probes.probe_pairs(prompts))
    drawn = judge_quality.probe_set(prompts, village.grade)
    most = judge_quality.PROBES
    assert Counter(p["kind"] for p in drawn) == {k: min(n, most) for k, n in possible.items()}
    assert set(possible) == set(probes.KINDS)
    assert drawn == judge_quality.probe_set(prompts, village.grade)
    # A prompt may have several pairs of a kind. The set must not be filled by the first prompts.
    right_or_wrong = [p["prompt"][-1]["content"] for p in drawn if p["kind"] == "right_vs_wrong"]
    assert len(set(right_or_wrong)) > 0.6 * most


@pytest.mark.parametrize("grade", [None, lambda task, response: {"helpful": 1.0}])
def test_another_grader_has_no_probe_pairs(grade):
    assert judge_quality.probe_set(village_prompts(20), grade) == []


@pytest.mark.parametrize(
    "chosen, rejected, rate",
    [
        ("Score: 9", "Score: 3", 1),
        ("Score: 3", "Score: 9", 0),
        ("Score: 5", "Score: 5", 0.5),
        ("Score: 0", "no score", 1),  # a missing score is the lowest
    ],
)
def test_the_judges_scores_make_the_rates(monkeypatch, chosen, rejected, rate):
    pairs = judge_quality.probe_set(village_prompts(600), village.grade)
    pairs = [p for p in pairs if p["kind"] == "wish_vs_none"]
    good = {p["chosen"] for p in pairs}

    def sample_responses(model, enc, chats, *_, **__):
        return [chosen if chat[-2]["content"] in good else rejected for chat in chats]

    monkeypatch.setattr(sft, "sample_responses", sample_responses)
    row = judge_quality.probe_row(tiny_gpt(), ENC, pairs, Config())
    assert row["wish_vs_none"] == rate
    assert row["n_wish_vs_none"] == len(pairs) == judge_quality.PROBES
