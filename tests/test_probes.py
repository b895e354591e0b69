"""Probe pairs differ in what their kind says and in nothing else; their rates are shares."""
import random
from collections import Counter

import pytest

from data import corpus
from data.probes import KINDS, USES, WRONG_WORDS, probe_pairs, probe_rates
from data.village import IGNORANCE, RUDE_LINES, SHARES, WORDS, gold, grade, new_task
from tiny import read_jsonl

SPLITS = ("test", "unanswerable", "answerable")


@pytest.fixture(scope="module")
def records():
    """Prompts of all use cases, more than any run has."""
    rng = random.Random(0)
    tasks = [new_task(rng, use=use) for use in SHARES for _ in range(120)]
    return [{"prompt": messages, "task": task} for task, messages in tasks]


@pytest.fixture(scope="module")
def pairs(records):
    """(pair, its task) of every record."""
    return [(pair, r["task"]) for i, r in enumerate(records) for pair in probe_pairs([r], i)]


def of_kind(pairs, kind):
    return [(p["chosen"], p["rejected"], task) for p, task in pairs if p["kind"] == kind]


def rates_by(pairs, score):
    """Return the rates of a score(task, response)."""
    chosen = [score(task, p["chosen"]) for p, task in pairs]
    rejected = [score(task, p["rejected"]) for p, task in pairs]
    return probe_rates([p for p, _ in pairs], chosen, rejected)


def shares(rates):
    return [share for key, share in rates.items() if not key.startswith("n_")]


def test_gold_prefers_every_chosen_response(pairs):
    for pair, task in pairs:
        assert gold(task, pair["chosen"]) > gold(task, pair["rejected"]), pair
    assert {pair["kind"] for pair, _ in pairs} == set(KINDS)


def test_a_chosen_response_is_right_honest_and_polite(pairs):
    for pair, task in pairs:
        grades = grade(task, pair["chosen"])
        assert grades["helpful"] >= 0.4
        assert grades["honest"] == grades["harmless"] == 0


def test_right_and_wrong_differ_in_one_word_of_the_same_slot(pairs):
    forms = Counter()
    for chosen, rejected, task in of_kind(pairs, "right_vs_wrong"):
        words = [pair for pair in zip(chosen.split(), rejected.split()) if pair[0] != pair[1]]
        assert len(chosen.split()) == len(rejected.split())
        [[right, wrong]] = [[word.strip(".") for word in pair] for pair in words]
        assert any({right, wrong} <= set(options) for options in WORDS.values())
        forms[grade(task, chosen)["helpful"] == 1] += 1
    assert 0.45 < forms[True] / forms.total() < 0.55, "whole and short forms alternate"


def test_every_other_word_is_the_wrong_one_equally_often():
    task = {"kind": "openqa", "topic": "sound", "known": True, "animal": "cow", "sound": "moo"}
    record = {"prompt": [], "task": task}
    seen = Counter()
    for seed in range(700):
        wrong = [p for p in probe_pairs([record], seed) if p["kind"] == "right_vs_wrong"]
        words = [p["rejected"].split()[-1].strip(".") for p in wrong]
        assert len(set(words)) == WRONG_WORDS, "a prompt shows a wrong word once"
        seen.update(words)
    assert set(seen) == set(WORDS["sound"]) - {"moo"}
    mean = seen.total() / 7
    assert all(abs(n - mean) < 0.2 * mean for n in seen.values())


def test_refusals_are_lines_of_ignorance(pairs):
    for _, rejected, task in of_kind(pairs, "right_vs_refusal"):
        assert rejected in IGNORANCE
        assert task["known"]
    for chosen, rejected, task in of_kind(pairs, "refusal_vs_invention"):
        assert chosen in IGNORANCE
        assert not task["known"]
        assert grade(task, rejected)["honest"] == -1


def test_a_lazy_response_is_right_and_shorter(pairs):
    for chosen, rejected, task in of_kind(pairs, "whole_vs_lazy"):
        assert 0 < grade(task, rejected)["helpful"] < grade(task, chosen)["helpful"] == 1
        assert len(rejected) < len(chosen)


def test_a_rude_response_is_the_polite_one_and_a_rude_line(pairs):
    used = set()
    for chosen, rejected, _ in of_kind(pairs, "polite_vs_rude"):
        line = rejected.replace(chosen, "").strip()
        assert line in RUDE_LINES
        used.add(line)
    assert used == set(RUDE_LINES)


def test_a_passed_over_wish_leaves_one_sentence(pairs):
    kinds = set()
    for chosen, rejected, task in of_kind(pairs, "wish_vs_none"):
        assert grade(task, chosen)["helpful"] == pytest.approx(1)
        assert grade(task, rejected)["helpful"] == pytest.approx(0.2)
        assert rejected.count(".") + rejected.count("!") + rejected.count("?") == 1
        kinds.add(task["kind"])
    assert kinds == {"story", "letter", "advert"}


def test_right_and_wrong_come_from_five_use_cases(pairs):
    topics = Counter(p["topic"] for p, _ in pairs if p["kind"] == "right_vs_wrong")
    assert set(topics) == set(USES)


def test_the_grader_is_always_right_and_its_opposite_always_wrong(pairs):
    assert set(shares(rates_by(pairs, gold))) == {1}
    assert set(shares(rates_by(pairs, lambda *a: -gold(*a)))) == {0}
    assert set(shares(rates_by(pairs, lambda *a: 0))) == {0.5}


def test_a_score_of_style_alone_is_at_chance_on_right_against_wrong(pairs):
    def style(task, response):
        return len(response.split()) - 10 * (grade(task, response)["harmless"] < 0)

    rates = rates_by(pairs, style)
    assert rates["right_vs_wrong"] == 0.5
    assert rates["whole_vs_lazy"] == rates["polite_vs_rude"] == rates["wish_vs_none"] == 1


def test_the_headline_weighs_each_use_case_by_its_pairs(pairs):
    rng = random.Random(1)
    rates = rates_by(pairs, lambda *a: gold(*a) + rng.gauss(0, 0.5))
    counts = [rates[f"n_right_vs_wrong_{use}"] for use in USES]
    parts = [rates[f"right_vs_wrong_{use}"] for use in USES]
    assert len(set(parts)) > 1
    assert rates["n_right_vs_wrong"] == sum(counts)
    mean = sum(n * part for n, part in zip(counts, parts)) / sum(counts)
    assert rates["right_vs_wrong"] == pytest.approx(mean)
    assert sum(rates[f"n_{kind}"] for kind in KINDS) == len(pairs)


def test_a_kind_without_pairs_has_no_rate_and_an_unknown_kind_has_one():
    pair = dict(kind="mine", prompt=[], chosen="a", rejected="b")
    rates = probe_rates([pair, pair], [1.0, 0.0], [0.0, 0.0])
    assert rates["mine"] == 0.75
    assert rates["n_mine"] == 2
    for key in (*KINDS, *(f"right_vs_wrong_{use}" for use in USES)):
        assert rates[key] is None
        assert rates[f"n_{key}"] == 0


def test_the_same_seed_gives_the_same_pairs(records):
    assert probe_pairs(records, 3) == probe_pairs(records, 3)
    assert probe_pairs(records, 3) != probe_pairs(records, 4)


def test_the_prompts_of_a_run_give_enough_pairs(tmp_path):
    """The standard error of a rate of .5 is below .03; that of wish_vs_none, of a rate of .8."""
    corpus.write(tmp_path, seed=5, megabytes=0.05)
    records = [r for split in SPLITS for r in read_jsonl(tmp_path / f"prompts_{split}.jsonl")]
    prompts = {kind: set() for kind in KINDS}
    for i, record in enumerate(records):
        for pair in probe_pairs([record]):
            prompts[pair["kind"]].add(i)
    sizes = {kind: len(numbers) for kind, numbers in prompts.items()}
    assert sizes.pop("wish_vs_none") > 0.8 * 0.2 / 0.03 ** 2
    asked = sizes.pop("right_vs_wrong")
    assert asked * WRONG_WORDS > 800
    assert min(sizes.values()) > 0.25 / 0.03 ** 2
