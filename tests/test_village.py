"""The world: every task can be graded, and the demonstrations leave something to gain."""
import itertools
import random
import re
from collections import Counter

import pytest

from data import corpus, village
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
            first = "One day {person} met a {animal} at the {place}."
        parts = dict(thing="They found a {colour} {thing}.", food="They shared some {food}.",
                     mood="In the end they were {mood}.", end="The end.")
        return joined(first, parts, task)
    if kind == "letter":
        first = "Dear {person}, how are you?"
        if "food" in wishes:
            first = "Dear {person}, thank you for the {food}."
        parts = dict(mood="I am {mood} today.", place="Let us meet at the {place}.",
                     job="Yours, the {job}.")
        return joined(first, parts, task)
    if kind == "advert":
        parts = dict(effect="It makes you {effect}.", price="It costs {price} coins.",
                     place="Buy it at the {place}.")
        return joined("Fresh {food} for everybody!", parts, task)
    if kind == "brainstorm":
        n = {"two": 2, "three": 3, "four": 4}[task["number"]]
        words = village.WORDS[task["topic"]][:n]
        return ", ".join(words[:-1]) + " and " + words[-1] + "."
    if not task["known"]:
        return "I do not know."
    return KINDS[kind].FORMS[task["topic"]].full.format(**task)


def test_a_perfect_response_to_any_task_is_worth_exactly_1():
    """Exactly: data/annotators.py and lab/rouge.py compare with 1."""
    seen = Counter()
    for task in tasks(1500):
        response = perfect_response(task)
        assert gold(task, response) == 1, (task, response)
        seen[task["kind"], len(task.get("wishes", []))] += 1
    assert {kind for kind, _ in seen} == set(KINDS)
    assert {n for kind, n in seen if kind in ("story", "letter", "advert")} == {1, 2, 3}


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
    ("One day Tom met a cat at the mill. They shared some pie.", 1.0),
    ("One day Tom met a cat at the mill. They shared some pie. The end.", 0.8),
    ("One day Tom met a cat. They shared some pie.", 0.6),
    ("One day Tom met a cat. They shared some jam.", 0.2),
    ("One day Tom met a cat.", 0.2),
    ("One day Tom met a cat at the farm.", 0.2),
    ("One day Tom met a cat. They found a hat.", 0.0),
    ("One day Tom met a cat. They found a hat. In the end they were sad. The end.", 0.0),
    ("One day Ann met a cat. They shared some pie.", 0.0),
    ("One day Tom met a dog.", 0.0),
    ("One day Tom met a cat at the mill. They shared some pie. They shared some pie.", 0.0),
    ("They shared some pie. One day Tom met a cat at the mill.", 0.0),
    ("One day Tom met a cat at the mill. They shared some", 0.0),
    ("mill pie Tom cat", 0.0),
    ("", 0.0),
])
def test_a_story_earns_its_share_of_the_wishes_it_meets(response, worth):
    task = dict(kind="story", use="generation", person="Tom", animal="cat", place="mill",
                food="pie", colour="red", thing="hat", mood="sad", wishes=["place", "food"])
    assert gold(task, response) == pytest.approx(worth)


def subsets(words):
    return [list(s) for n in range(len(words) + 1) for s in itertools.combinations(words, n)]


@pytest.mark.parametrize("name", ["story", "letter", "advert"])
def test_a_sentence_that_no_wish_asks_for_costs_a_fifth(name):
    """Every response made of right, wrong or general sentences, against every set of wishes."""
    kind = KINDS[name]
    first, *others = kind.PARTS
    rng = random.Random(0)
    task = {"kind": name, "use": "generation"} | kind.make(village.picker(rng), rng)
    wrong = {slot: next(w for w in village.WORDS[slot] if w != task[slot])
             for slot in task.keys() & village.WORDS.keys() - set(kind.MAIN)}
    for wishes in subsets(list(kind.ASK_WISH))[1:]:
        asked = task | {"wishes": wishes}
        for present in subsets(others):
            for right in subsets([first, *present]):
                lines = []
                for part in [first, *present]:
                    if part in right:
                        lines.append(kind.PARTS[part][0].format(**task))
                    else:
                        lines.append(kind.PARTS[part][-1].format(**task | wrong))
                met = [w for w in wishes if w in right or (w == "end" and w in present)]
                unasked = [part for part in present if part not in wishes]
                expected = max(0, 0.2 + 0.8 * len(met) / len(wishes) - 0.2 * len(unasked))
                assert gold(asked, " ".join(lines)) == pytest.approx(expected), (wishes, lines)


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


def test_the_response_of_a_careful_writer_is_worth_1():
    rng = random.Random(2)
    for task in tasks(500):
        if "wishes" in task:
            assert gold(task, KINDS[task["kind"]].answer(task, rng, village.TEACHER)) == 1


# The English of the templates

def phrasings(kind):
    """List the four phrasings of every topic of a kind."""
    if isinstance(kind, village.Wishes):
        return [kind.ASK]
    if isinstance(kind, village.Brainstorm):
        return list(kind.ASK.values())
    return [form.phrasings for form in kind.FORMS.values()]


def parts(kind):
    """List the templates that a program must tell apart when it reads a response of this kind."""
    if isinstance(kind, village.Wishes):
        return [template for templates in kind.PARTS.values() for template in templates]
    return []


def wishes(kind):
    return list(kind.ASK_WISH.values()) if isinstance(kind, village.Wishes) else []


def responses(kind):
    if isinstance(kind, village.Reply):
        return [t for form in kind.FORMS.values() for t in (form.full, form.short)]
    return parts(kind)


ASKED = [form for kind in KINDS.values() for forms in phrasings(kind) for form in forms]
LIVES = [line for life in village.LIFE.values() for line in (life.statement, life.question)]
WISHES = [wish for kind in KINDS.values() for wish in wishes(kind)]
RESPONSES = [response for kind in KINDS.values() for response in responses(kind)]
TEMPLATES = ASKED + LIVES + WISHES + RESPONSES + corpus.TALE + list(corpus.HEADS.values())
WORDS = village.WORDS | dict(x=list("1234"), y=list("12345"), text=["Tom is sad."])


def filled(template):
    """Yield (words, string): the template with every word in every slot, the others at random."""
    rng = random.Random(template)
    names = village.slots(template)
    for slot in names or [None]:
        for word in WORDS[slot] if slot else [None]:
            words = {name: rng.choice(WORDS[name]) for name in names}
            if slot:
                words[slot] = word
            yield words, template.format(**words)


def test_match_is_the_inverse_of_format():
    for template in TEMPLATES:
        if {"text", "x", "y"} & set(village.slots(template)):
            continue                    # data/tasks.py reads these
        for words, string in filled(template):
            assert village.match(template, string) == words
            assert village.match(template, string + " x") is None


@pytest.mark.parametrize("templates", [
    [form for form in ASKED + LIVES + WISHES if "{text}" not in form],
    *[parts(kind) for kind in KINDS.values() if parts(kind)],
])
def test_a_string_fits_one_template(templates):
    for template in templates:
        for _, string in filled(template):
            fits = [t for t in templates if village.pattern(t, WORDS).fullmatch(string)]
            assert fits == [template]


def test_every_string_reads_as_english():
    """a cat, an owl, 2 coins, one space, a capital and an end."""
    for template in TEMPLATES:
        for _, string in filled(template):
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", string, re.I), string
            assert not re.search(r"\b1 (coins|years)\b", string), string
            assert not re.search(r"  | [.,!?:]", string), string
            assert string[-1] in ".!?", string
            lazy = template in RESPONSES and re.fullmatch(r"\{\w+\}\.", template)
            assert lazy or not string[0].islower(), string


def test_the_four_phrasings_of_a_topic_differ_and_none_is_long():
    """The fourth is held out, so no other may be in it or around it."""
    for kind in KINDS.values():
        for forms in phrasings(kind):
            assert len(forms) == 4
            plain = [" ".join(re.findall(r"[a-z{}]+", form.lower())) for form in forms]
            assert len(set(plain)) == 4
            for other in plain[:3]:
                assert plain[3] not in other
                assert other not in plain[3]
            assert all(len(form.split()) <= 13 for form in forms)


def test_unasked_details_fit_a_sentence_of_their_own():
    """The grader counts sentences, so a template of a part holds one."""
    for kind in KINDS.values():
        for template in parts(kind):
            assert len(village.sentences(template)) == 1


def test_prices_are_plural_and_a_sum_is_a_digit():
    prices = [int(price) for price in village.FACTS["price"].values()]
    assert len(set(prices)) == len(prices)
    assert all(2 <= price <= 9 for price in prices)
    sums = [int(task["digit"]) for task in tasks(3000) if task.get("topic") == "digit"]
    assert sums
    assert all(2 <= total <= 9 for total in sums)
