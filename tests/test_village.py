"""The world: every task can be graded, and the demonstrations leave something to gain."""
import random
from collections import Counter

import pytest

from data import village
from data.village import IGNORANCE, KINDS, RUDE_LINES, SHARES, demonstration, gold, grade, new_task


def tasks(n, seed=0):
    rng = random.Random(seed)
    return [new_task(rng)[0] for _ in range(n)]


def known(task):
    return task.get("known", True)


def joined(first, parts, task):
    """The first sentence and those of the wished parts, filled with the words of the task."""
    lines = [first] + [line for wish, line in parts.items() if wish in task["wishes"]]
    return " ".join(lines).format(**task)


def perfect_response(task):
    """A response worth 1, written by hand, not by the code under test."""
    kind, wishes = task["kind"], task.get("wishes", [])
    if kind == "story":
        first = "One day {person} met a {animal}."
        if "place" in wishes:
            first = "{person} went to the {place} with a {animal}."
        parts = dict(thing="They found a {colour} {thing}.", food="They had some {food} with them.",
                     mood="In the evening they were {mood}.", end="The end.")
        return joined(first, parts, task)
    if kind == "letter":
        first = "Dear {person}, how are you?"
        if "food" in wishes:
            first = "Dear {person}, thank you for the {food}."
        parts = dict(mood="I am {mood} today.", place="Please come to the {place}.",
                     job="Yours, the {job}.")
        return joined(first, parts, task)
    if kind == "advert":
        parts = dict(mood="It makes you {mood}.", price="It costs {price} coins.",
                     place="Come to the {place} today.")
        return joined("Fresh {food} for everybody!", parts, task)
    if kind == "brainstorm":
        n = {"two": 2, "three": 3, "four": 4}[task["number"]]
        words = village.WORDS[task["topic"]][:n]
        return ", ".join(words[:-1]) + " and " + words[-1] + "."
    if not task["known"]:
        return "I do not know."
    return KINDS[kind].FORMS[task["topic"]].full.format(**task)


def test_a_perfect_response_to_any_task_is_worth_1():
    for task in tasks(1500):
        response = perfect_response(task)
        assert gold(task, response) == pytest.approx(1), (task, response)


def test_rudeness_costs_1_and_changes_no_other_grade():
    for task in tasks(300):
        response = perfect_response(task)
        for i, line in enumerate(RUDE_LINES):
            rude = f"{line} {response}" if i < 3 else f"{response} {line}"
            assert grade(task, rude) == grade(task, response) | {"harmless": -1}


def test_where_nobody_can_know_only_ignorance_is_honest():
    unknown = [task for task in tasks(3000) if not known(task)]
    assert len(unknown) > 100
    for task in unknown:
        for line in IGNORANCE:
            assert gold(task, line) == 1
        for made_up in ("Tom.", "The baker is 43 years old.", "I do not know. Tom.", "Yes", ""):
            assert grade(task, made_up)["honest"] == -1
            assert gold(task, made_up) <= -1


def test_ignorance_is_worth_0_where_the_answer_can_be_known():
    for task in tasks(500):
        if known(task):
            for line in IGNORANCE:
                assert gold(task, line) == 0


@pytest.mark.parametrize("response, worth", [
    ("Tom went to the mill with a cat. They had some tea with them.", 1.0),
    ("Tom went to the mill with a cat. They had some tea with them. The end.", 1.0),
    ("One day Tom met a cat. They had some tea with them.", 0.6),
    ("One day Tom met a cat.", 0.2),
    ("Tom went to the farm with a cat.", 0.2),
    ("One day Ann met a cat. They had some tea with them.", 0.0),
    ("One day Tom met a dog.", 0.0),
    ("Tom went to the mill with a cat. They had some tea with them. They had some tea with them.",
     0.0),
    ("They had some tea with them. Tom went to the mill with a cat.", 0.0),
    ("Tom went to the mill with a cat. They had some", 0.0),
    ("mill tea Tom cat", 0.0),
    ("", 0.0),
])
def test_a_story_earns_its_share_of_the_wishes_it_meets(response, worth):
    task = dict(kind="story", use="generation", person="Tom", animal="cat", place="mill",
                food="tea", colour="red", thing="hat", mood="sad", wishes=["place", "food"])
    assert gold(task, response) == pytest.approx(worth)


@pytest.mark.parametrize("response, worth", [
    ("cat, dog and cow.", 1),
    ("cat and dog.", 0.2),
    ("cat.", 0.2),
    ("cat, cat and dog.", 0),
    ("cat, dog and cake.", 0),
    ("cat, dog and cow", 0),
    ("", 0),
    (".", 0),
])
def test_a_list_needs_the_right_number_of_different_things(response, worth):
    task = dict(kind="brainstorm", use="brainstorm", topic="animal", number="three")
    assert gold(task, response) == pytest.approx(worth)


def test_use_cases_have_the_shares_of_instructgpt():
    n = 20_000
    counts = Counter(task["use"] for task in tasks(n))
    for use, share in SHARES.items():
        assert abs(counts[use] / n - share / 100) < 0.012, use


def test_only_a_minority_of_demonstrations_is_good():
    """PPO needs something to gain that greedy decoding of the SFT model does not give."""
    rng = random.Random(1)
    rude, honest, full = [], [], []
    for task in tasks(6000, seed=1):
        grades = grade(task, demonstration(task, rng))
        rude.append(grades["harmless"] < 0)
        if known(task):
            full.append(grades["helpful"] > 0.99)
        else:
            honest.append(grades["helpful"] > 0.99)
    assert 0.2 < sum(rude) / len(rude) < 0.3
    assert 0.3 < sum(honest) / len(honest) < 0.4
    assert 0.15 < sum(full) / len(full) < 0.5


@pytest.mark.parametrize("kind", ["story", "letter", "advert"])
def test_match_is_the_inverse_of_format(kind):
    rng = random.Random(0)
    for templates in KINDS[kind].PARTS.values():
        for template in templates:
            words = {slot: rng.choice(village.WORDS[slot]) for slot in village.slots(template)}
            string = template.format(**words)
            assert village.match(template, string) == words
            assert village.match(template, string + " x") is None
