"""Properties of data/tasks.py: what is asked reads back, what is right is graded right, and pages
and seed tasks show one half of the world.

The right outputs to compare with are written here by hand: OUTPUTS and MANNERS below. The sweep
asks for every topic in every wording and every manner.
"""

import functools
import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from data import corpus, tasks, village
from data.formats import load_comparisons, load_prompts
from data.text import read_corpus
from data.tokenizer import get_tokenizer
from data.village import WORDS
from tiny import documented_formats, read_jsonl, write_jsonl

ROOT = Path(__file__).resolve().parent.parent

# What a right output looks like. For a piece of writing: each sentence, in order, as (the wish that
# asks for it, the sentence if the wish is there, the sentence if it is not).

OUTPUTS = {
    "story": [
        (
            "place",
            "One day {person} met a {animal} at the {place}.",
            "One day {person} met a {animal}.",
        ),
        ("thing", "They found a {colour} {thing}.", ""),
        ("food", "They shared some {food}.", ""),
        ("mood", "In the end they were {mood}.", ""),
        ("end", "The end.", ""),
    ],
    "letter": [
        ("food", "Dear {person}, thank you for the {food}.", "Dear {person}, how are you?"),
        ("mood", "I am {mood} today.", ""),
        ("place", "Let us meet at the {place}.", ""),
        ("job", "Yours, the {job}.", ""),
    ],
    "advert": [
        ("", "", "Fresh {food} for everybody!"),
        ("effect", "It makes you {effect}.", ""),
        ("price", "It costs {price} coins.", ""),
        ("place", "Buy it at the {place}.", ""),
    ],
}

MANNERS = {
    None: "{output}",
    "well": "Well. {output}",
    "thanks": "{output} Thank you.",
    "twice": "{output} {output}",
    "listen": "Listen, {person}. {output}",
    "here": "I am at the {place}. {output}",
    "sure": "{output} I am sure.",
}


def plain_output(task):
    """Return what the task asks for and nothing more, without its manner."""
    if task["kind"] in OUTPUTS:
        lines = [yes if wish in task["wishes"] else no for wish, yes, no in OUTPUTS[task["kind"]]]
        return " ".join(line for line in lines if line).format(**task)
    if task["kind"] == "brainstorm":
        n = ["two", "three", "four"].index(task["number"]) + 2
        *others, last = WORDS[task["topic"]][:n]
        return f"{', '.join(others)} and {last}."
    if not task["known"]:
        return "I do not know."
    _, sentence, _, _ = tasks.ALL[task["kind"]].FORMS[task["topic"]]
    return sentence.format(**task)


def in_manner(manner, said, output):
    return MANNERS[manner].format(output=output, **said)


def right_output(task):
    return in_manner(task["manner"], task["said"], plain_output(task))


def audit(task, output):
    return tasks.audit(task["instruction"], task["input"], output)


RIGHT = (True, True, True)
WRONG = (True, True, False)


# Tasks to test


def random_tasks(n, seed=0, **settings):
    """Draw n tasks of all halves and wordings."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(n):
        half = rng.choice(["plain", "seen", "unseen"])
        drawn.append(tasks.new_task(rng, half=half, wording=rng.randrange(4), **settings))
    return drawn


def with_manner(task, manner, form, said):
    """Return a plain task, asked in a manner."""
    instruction = task["instruction"] + " " + form.format(**said)
    return task | dict(instruction=instruction, manner=manner, said=said)


class Asked(NamedTuple):
    wording: int
    task: dict
    read: dict  # the task as read_instruction reads it


@pytest.fixture(scope="module")
def sweep():
    """Ask for every topic in its four wordings, plain and in every manner.

    The wordings of a manner take turns. Each round of 6 manners counts 7 turns: with 6, every
    manner would keep to one of its three wordings.
    """
    rng = random.Random(0)
    turn = 0
    asked = []
    for op in tasks.OPS:
        for wording in range(4):
            asked.append((wording, tasks.new_task(rng, op, "plain", wording)))
            for manner, (forms, _) in tasks.MANNERS.items():
                said = {slot: rng.choice(WORDS[slot]) for slot in ("person", "place")}
                task = tasks.new_task(rng, op, "plain", wording)
                asked.append((wording, with_manner(task, manner, forms[turn % 3], said)))
                turn += 1
            turn += 1
    return [Asked(wording, t, tasks.read_instruction(t["instruction"])) for wording, t in asked]


def test_the_sweep_asks_for_every_topic_in_every_wording(sweep):
    asked = {(a.task["op"], a.wording) for a in sweep}
    assert asked == {(op, wording) for op in tasks.OPS for wording in range(4)}
    assert len(tasks.OPS) > 30


def test_the_sweep_asks_in_every_wording_of_every_manner(sweep):
    forms = {(m, form) for m, (forms, _) in tasks.MANNERS.items() for form in forms}
    asked = set()
    for a in sweep:
        for manner, form in forms:
            ends = a.task["instruction"].endswith(form.format(**a.task["said"]))
            if manner == a.task["manner"] and ends:
                asked.add((manner, form))
    assert asked == forms


# Reading back


def test_every_instruction_reads_back_to_what_was_asked(sweep):
    for a in sweep:
        assert a.read is not None, a.task
        assert a.read["wording"] == a.wording
        for key in ("op", "manner", "kind"):
            assert a.read[key] == a.task[key]
        apart = {"wording", "known", "topic", "op", "said", "manner", "kind"}
        for key in a.read.keys() - apart:
            assert str(a.task[key]) == str(a.read[key]), a


def test_the_words_that_a_manner_fills_into_the_output_are_read_back(sweep):
    for a in sweep:
        needed = set(village.slots(MANNERS[a.task["manner"]])) - {"output"}
        assert needed <= set(a.read["said"]), "else the manner could not be graded"
        assert a.read["said"].items() <= a.task["said"].items()


def test_every_input_reads_back_to_the_words_of_the_right_output(sweep):
    for a in sweep:
        whole = tasks.read_input(a.read, a.task["input"])
        assert whole is not None, a.task
        assert whole.get("known", True) == a.task.get("known", True)
        assert whole.get("topic") == a.task.get("topic")
        kind = tasks.ALL[a.task["kind"]]
        if whole.get("known") and hasattr(kind, "FORMS"):
            _, sentence, _, _ = kind.FORMS[a.task["topic"]]
            for slot in village.slots(sentence):
                assert str(whole[slot]) == str(a.task[slot]), (a.task, whole)


def test_right_and_ideal_outputs_get_their_grades_before_and_after_reading_back(sweep):
    rng = random.Random(1)
    for a in sweep:
        least = 0.4 if hasattr(tasks.ALL[a.task["kind"]], "FORMS") else 0.999
        for task in (a.task, tasks.read_input(a.read, a.task["input"])):
            assert tasks.helpful(task, right_output(a.task)) == pytest.approx(1), a.task
            assert tasks.helpful(task, tasks.ideal(a.task, rng)) >= least, a.task


def test_the_audit_accepts_right_and_ideal_outputs(sweep):
    rng = random.Random(1)
    for a in rng.sample(sweep, 300):
        assert audit(a.task, right_output(a.task)) == RIGHT
        assert audit(a.task, tasks.ideal(a.task, rng)) == RIGHT


# The English of the templates


def filled(template):
    """Yield (words, string): the template with every word in every slot, the others at random."""
    rng = random.Random(template)
    words = WORDS | tasks.MORE_WORDS | {"text": ["Tom is sad."], "output": ["cat and dog."]}
    words["word"] = WORDS["animal"] + WORDS["colour"]
    names = village.slots(template)
    for slot in names or [None]:
        for word in words[slot] if slot else [None]:
            chosen = {name: rng.choice(words[name]) for name in names}
            if slot:
                chosen[slot] = word
            yield chosen, template.format(**chosen)


INSTRUCTIONS = {op: tasks.wordings(op) for op in tasks.OPS}
MANNER_FORMS = [form for manner in tasks.MANNERS.values() for form in manner.wordings]


def test_the_input_of_a_rewriting_is_the_sentence_that_the_village_rewrites():
    for topic, form in tasks.ALL["rewrite"].FORMS.items():
        sentence = tasks.INPUT["rewrite", topic]
        assert all(sentence in phrasing for phrasing in form.phrasings)
        assert form.short.rstrip(".") == sentence.rstrip(".!")


def test_an_instruction_fits_one_wording_of_one_topic():
    forms = [form for wordings in INSTRUCTIONS.values() for form in wordings] + MANNER_FORMS
    assert len(set(forms)) == len(forms)
    for form in forms:
        for words, string in filled(form):
            assert [f for f in forms if tasks.match(f, string) is not None] == [form]
            assert tasks.match(form, string) == words


def test_a_prompt_of_the_village_fits_one_topic(prompts):
    for prompt in prompts:
        fits = set()
        for op in tasks.ASK:
            for form in village.KINDS[op[0]].FORMS[op[1]].phrasings:
                for span in tasks.spans(prompt.text) if "{text}" in form else [""]:
                    if tasks.read_filled(op, form, prompt.text, span):
                        fits.add(op)
        expected = (prompt.task["kind"], prompt.task.get("topic"))
        assert fits == ({expected} if expected in tasks.ASK else set()), prompt


def test_instructions_and_inputs_read_as_english():
    """a cat, an owl, one space, a capital and an end. The input of sort is a bare word."""
    own = [form for kind in ("sort", "same", "line") for form in tasks.ALL[kind].FORMS.values()]
    templates = [form for wordings in INSTRUCTIONS.values() for form in wordings]
    templates += MANNER_FORMS + [manner.form for manner in tasks.MANNERS.values()]
    templates += [form.full for form in own]
    templates += [form for op, form in tasks.INPUT.items() if op != ("sort", "sort")]
    for template in templates:
        for _, string in filled(template):
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", string, re.I), string
            assert not re.search(r"  | [.,!?:]", string), string
            assert string[-1] in ".!?", string
            assert template.startswith("{output}") or not string[0].islower(), string


def test_the_four_wordings_of_an_instruction_differ_and_none_is_long():
    """The fourth is held out, so no other may be in it or around it."""
    for op, forms in INSTRUCTIONS.items():
        plain = [" ".join(re.findall(r"[a-z{}]+", form.lower())) for form in forms]
        assert len(set(plain)) == 4
        for other in plain[:3]:
            assert plain[3] not in other
            assert op[0] == "closedqa" or other not in plain[3]
        assert all(len(form.split()) <= 13 for form in forms)


# Halves


HALVES = {"unseen": {False}, "seen": {True}, "plain": {True}}


@pytest.mark.parametrize("half", HALVES)
def test_the_half_decides_which_manners_a_topic_is_asked_in(half):
    rng = random.Random(2)
    for op in tasks.OPS:
        drawn = [tasks.new_task(rng, op, half) for _ in range(16)]
        assert {tasks.seen(t["op"], t["manner"]) for t in drawn} == HALVES[half]
        with_and_without = {t["manner"] is None for t in drawn} == {True, False}
        assert with_and_without == (half == "seen")
        if half == "plain":
            assert {t["manner"] for t in drawn} == {None}


@pytest.mark.parametrize("op", tasks.OPS, ids=" ".join)
def test_every_topic_has_manners_in_both_halves(op):
    assert 0 < sum(tasks.seen(op, manner) for manner in tasks.MANNERS) < len(tasks.MANNERS)
    assert tasks.seen(op, None)


# Wrong outputs


SLOTS = "person animal thing colour place food job mood effect hanzi sound".split()


def holds(word, text):
    return re.search(rf"\b{word}\b", text)


def altered(task, output, rng):
    """Yield the output with one of its words replaced by another word of the same slot."""
    for slot in SLOTS:
        for word in WORDS[slot]:
            if not holds(word, output):
                continue
            others = [w for w in WORDS[slot] if w != word]
            if task["kind"] == "brainstorm" and slot == task["topic"]:
                # Another animal is as good as this one, unless it is there already.
                others = [w for w in others if holds(w, plain_output(task))]
            yield re.sub(rf"\b{word}\b", rng.choice(others), output, count=1)


def test_an_output_with_one_word_altered_is_wrong():
    rng = random.Random(3)
    n = 0
    for task in random_tasks(150, seed=3):
        for output in altered(task, right_output(task), rng):
            assert audit(task, output) == WRONG, (task["instruction"], task["input"], output)
            n += 1
    assert n > 200


@pytest.mark.parametrize("manner", MANNERS)
def test_an_output_in_another_manner_is_wrong(manner):
    for task in random_tasks(50, seed=4):
        output = in_manner(manner, task["said"], plain_output(task))
        as_asked = manner == task["manner"]
        assert audit(task, output) == (True, True, as_asked), task


@pytest.mark.parametrize("manner", MANNERS)
def test_a_manner_with_a_wrong_word_is_wrong(manner):
    for task in random_tasks(50, seed=4):
        said = {s: next(w for w in WORDS[s] if w != task["said"][s]) for s in ("person", "place")}
        output = in_manner(manner, said, plain_output(task))
        has_no_words = manner not in ("listen", "here")
        assert audit(task, output).right == (manner == task["manner"] and has_no_words)


TWICE = {
    "cat and dog. cat and dog.": True,
    "cat and dog. dog and cat.": False,
    "cat and dog.": False,
    "cat and dog.cat and dog.": False,
    "cat and dog.,cat and dog.": False,
    "cat and dog.  cat and dog.": False,
    "cat and dog. cat and dog. cat and dog.": False,
    " ": False,
    "": False,
}


@pytest.mark.parametrize("output, right", TWICE.items(), ids=map(repr, TWICE))
def test_twice_means_the_same_output_twice(output, right):
    assert tasks.audit("Name two animals. Say it twice.", "", output) == (True, True, right)


READ_TOM = "Read the text. What did Tom lose?"
SUM_UP = "Sum up the story in one sentence."
SORT = "Is it an animal, a food, a place or a colour?"
SAME = "Do the two like the same food, yes or no?"
LAST = "Which thing comes last in the list?"
ADVERT = "Write an advert for cake. Say what it costs."
HAT = "Tom likes soup. Tom lost a hat."
BAKER = "Tom likes soup. Tom is a baker."
STORY = "One day Tom met a cat at the mill. They found a red ball. They shared some pie."

RIGHT_OUTPUTS = [
    ("Name three animals.", "", "cat, dog and cow."),
    ("How much is the cake?", "", "The cake costs 9 coins."),
    ("How much is the cake?", "", "Costs 9."),
    ("How old is the baker?", "", "I do not know."),
    ("What is 3 plus 5?", "", "The sum is 8."),
    ("What does 猫 mean?", "", "It means cat."),
    ("How do you say dog in Chinese?", "", "In Chinese it is 狗."),
    (READ_TOM, HAT, "Tom lost a hat."),
    (READ_TOM, BAKER, "I do not know."),
    ("Find the food in the text.", HAT, "Food: soup."),
    ("Find the job in the text.", "Tom likes soup.", "Nobody told me."),
    (SUM_UP, STORY, "Tom found a red ball at the mill."),
    ("Say it in a polite way.", "Give me the cup!", "Could you please give me the cup?"),
    ("Is the feeling good or bad?", "Tom is cheerful.", "good."),
    ("Is the line polite or rude?", "Now go away.", "This is rude."),
    (SORT, "duck", "an animal."),
    (SAME, "Tom likes pie. Ann likes pie.", "yes."),
    (LAST, "ball, hat, cup.", "The cup comes last."),
    (ADVERT, "", "Fresh cake for everybody! It costs 9 coins."),
]

WRONG_OUTPUTS = [
    ("Name three animals.", "", "cat and dog."),
    ("Name three animals.", "", "cat, dog and cake."),
    ("How much is the cake?", "", "The cake costs 4 coins."),
    ("How old is the baker?", "", "The baker is 43 years old."),
    ("How old is the baker?", "", "43."),
    ("What is 3 plus 5?", "", "The sum is 7."),
    ("How do you say dog in Chinese?", "", "In Chinese it is 猫."),
    (READ_TOM, HAT, "Tom lost a cup."),
    (READ_TOM, BAKER, "Tom lost a hat."),
    (SUM_UP, STORY, "Tom found a red ball at the inn."),
    ("Say it in a polite way.", "Give me the cup!", "Give me the cup."),
    ("Is the feeling good or bad?", "Tom is worried.", "This is a good feeling."),
    (SORT, "soup", "It is an animal."),
    (SAME, "Tom likes pie. Ann likes jam.", "The answer is yes."),
    (LAST, "ball, hat, cup.", "The hat comes last."),
    (ADVERT, "", "Fresh cake for everybody! It costs 4 coins."),
    (ADVERT, "", "Fresh cake for everybody!"),
    (ADVERT, "", "Fresh cake for everybody! It costs 9 coins. Buy it today."),
    (ADVERT, "", "Fresh milk for everybody! It costs 9 coins."),
]


@pytest.mark.parametrize("case", RIGHT_OUTPUTS, ids=" ".join)
def test_this_output_is_right(case):
    assert tasks.audit(*case) == RIGHT


@pytest.mark.parametrize("case", WRONG_OUTPUTS, ids=" ".join)
def test_this_output_is_wrong(case):
    assert tasks.audit(*case) == WRONG


# Instructions that are no task of this world


def test_a_foreign_word_makes_an_instruction_invalid():
    rng = random.Random(5)
    for task in random_tasks(80, seed=5):
        words = task["instruction"].split()
        at = rng.randrange(len(words))
        inserted = [*words[:at], "quickly", *words[at:]]
        replaced = [*words[:at], "zebra", *words[at + 1 :]]
        appended = [*words, "zebra."]
        for broken in (inserted, replaced, appended):
            assert tasks.read_instruction(" ".join(broken)) is None, broken


def test_a_missing_word_makes_an_instruction_invalid():
    rng = random.Random(5)
    known = {w for op in tasks.OPS for form in tasks.wordings(op) for w in form.split()}
    for task in random_tasks(80, seed=5):
        words = task["instruction"].split()
        at = rng.randrange(len(words))
        optional = words[at] == "please."
        if words[at] in known and not optional and not task["manner"] and not task.get("wishes"):
            broken = " ".join(words[:at] + words[at + 1 :])
            assert tasks.read_instruction(broken) is None, broken


def pieces_of_writing():
    """Yield tasks with wishes as (task, first sentence, the sentences of its wishes)."""
    drawn = random_tasks(30, seed=6, op=("story", "story"))
    drawn += random_tasks(20, seed=7, op=("letter", "letter"))
    drawn += random_tasks(20, seed=8, op=("advert", "advert"))
    for task in drawn:
        first = village.sentences(task["instruction"])[0]
        forms = tasks.ALL[task["kind"]].ASK_WISH
        yield task, first, [forms[wish].format(**task) for wish in task["wishes"]]


def read(*lines):
    return tasks.read_instruction(" ".join(lines))


def test_wishes_are_read_in_order():
    for task, first, wishes in pieces_of_writing():
        assert read(first, *wishes)["wishes"] == task["wishes"]


def test_a_wish_that_comes_twice_makes_an_instruction_invalid():
    rng = random.Random(6)
    for _, first, wishes in pieces_of_writing():
        assert read(first, *wishes, rng.choice(wishes)) is None


def test_a_wish_that_comes_twice_with_other_words_makes_an_instruction_invalid():
    mill, inn = "Ask to meet at the mill.", "Ask to meet at the inn."
    assert read("Write a letter to Tom.", mill)["place"] == "mill"
    assert read("Write a letter to Tom.", mill, inn) is None


def test_a_missing_doubled_or_foreign_sentence_makes_an_instruction_invalid():
    for _, first, wishes in pieces_of_writing():
        assert read(*wishes) is None
        assert read(first) is None
        assert read(first, first, *wishes) is None
        assert read(first, *wishes, "The mill is big.") is None


@pytest.mark.parametrize("wish", ["Ask to meet at the zoo.", "Let them share pie."])
def test_a_wish_with_a_foreign_word_or_of_another_kind_makes_an_instruction_invalid(wish):
    assert read("Write a letter to Tom.", wish) is None


def test_two_tasks_or_two_manners_make_an_instruction_invalid():
    for task in random_tasks(60, seed=9):
        assert read(task["instruction"], "Name two animals.") is None
        assert read("Name two animals.", task["instruction"]) is None
        if task["manner"]:
            assert read(task["instruction"], "Say it two times.") is None


NO_TASKS = [
    "Read the text.",
    "Say it twice.",
    "End with: Thank you.",
    "Say that you are at the mill.",
    "Where does Tom live?",
    "Give two ideas.",
    "Start with: Well. Name two animals.",
    "",
]


@pytest.mark.parametrize("instruction", NO_TASKS)
def test_this_is_no_task(instruction):
    assert tasks.read_instruction(instruction) is None


def test_an_invalid_instruction_has_no_fitting_input_and_no_right_output():
    verdict = tasks.audit("Fly to the moon.", "Tom has a hat.", "I do not know.")
    assert verdict == (False, False, False)


# Inputs


def input_sort(op):
    """Name the sort of inputs that an op takes; ops of the same sort take the same inputs."""
    if op not in tasks.INPUT:
        return "none"
    kind, topic = op
    if kind in ("closedqa", "extract"):
        return "facts"
    return kind if kind == "line" else f"{kind} {topic}"


def input_about(person, op, rng):
    """Draw an input of the op; facts are about the person, if there is one."""
    text = tasks.new_task(rng, op)["input"]
    while person and input_sort(op) == "facts" and not text.startswith(person + " "):
        text = tasks.new_task(rng, op)["input"]
    return text


@pytest.mark.parametrize("op", tasks.OPS, ids=" ".join)
def test_an_input_fits_the_topics_of_its_sort_and_no_others(op):
    rng = random.Random(10)
    task = tasks.new_task(rng, op)
    person = task["person"] if op[0] == "closedqa" else None
    instruction = tasks.read_instruction(task["instruction"])
    for other in tasks.OPS:
        text = input_about(person, other, rng)
        fits = tasks.read_input(dict(instruction), text) is not None
        assert fits == (input_sort(op) == input_sort(other)), (task["instruction"], text)


UNFIT_INPUTS = [
    (READ_TOM, "Ann likes soup. Ann lost a hat."),
    (READ_TOM, "Tom likes soup. Ann lost a hat."),
    (READ_TOM, "Tom lost a hat. Tom lost a cup."),
    (READ_TOM, "Tom lost a hat. It is red."),
    (READ_TOM, "Tom lost a hat. Tom likes"),
    ("Find the food in the text.", "Tom likes soup. Ann lost a hat."),
    ("Find the food in the text.", ""),
    (SAME, "Tom likes pie."),
    (SAME, "Tom likes pie. Tom likes jam."),
    (SAME, "Tom likes pie. Ann likes jam. Ben likes jam."),
    ("Which thing comes first in the list?", "ball."),
    ("Which thing comes first in the list?", "ball, zebra."),
    (SORT, "zebra"),
    ("Is the line polite or rude?", "Tom is cheerful."),
    ("Is the feeling good or bad?", "Now go away."),
    ("Say it in a polite way.", "Give me the zebra!"),
    ("Name two animals.", "Tom has a hat."),
    ("Name two animals.", " "),
]


@pytest.mark.parametrize("instruction, text", UNFIT_INPUTS)
def test_this_input_does_not_fit(instruction, text):
    assert tasks.audit(instruction, text, "I do not know.") == (True, False, False)


# Grades


def careless_response(task, rng, care):
    kind = village.KINDS[task["kind"]]
    return kind.answer(task, rng, village.LABELER._replace(care=care))


def test_a_grade_is_the_villages_in_every_manner():
    rng = random.Random(11)
    grades = Counter()
    for _ in range(250):
        task = tasks.new_task(rng, half=rng.choice(["plain", "seen", "unseen"]))
        if task["kind"] not in village.KINDS:
            continue
        whole = tasks.read_input(tasks.read_instruction(task["instruction"]), task["input"])
        for care in (0.3, 1.0):
            response = careless_response(task, rng, care)
            output = in_manner(task["manner"], task["said"], response)
            grade = village.grade(task, response)["helpful"]
            assert tasks.helpful(task, output) == pytest.approx(grade)
            assert tasks.helpful(whole, output) == pytest.approx(grade)
            grades[grade] += 1
    assert len(grades) > 4
    assert grades[0.0] > 0
    assert grades[1.0] > 0


class Prompt(NamedTuple):
    text: str
    task: dict  # the task it was made from
    read: dict  # the task as read_prompt reads it


@pytest.fixture(scope="module")
def prompts():
    """Draw prompts of the village in each use case but chat and each wording, 5 of each."""
    rng = random.Random(19)
    drawn = []
    for use in [use for use in village.SHARES if use != "chat"]:
        for wording in list(range(4)) * 5:
            task, messages = village.new_task(rng, use=use, phrasing=wording)
            text = messages[-1]["content"]
            drawn.append(Prompt(text, task, tasks.read_prompt(text)))
    return drawn


def test_prompts_of_every_kind_but_chat_are_read_back(prompts):
    for prompt in prompts:
        assert prompt.read["kind"] == prompt.task["kind"], prompt
    assert {prompt.read["kind"] for prompt in prompts} == village.KINDS.keys() - {"chat"}


def test_a_prompt_reads_back_to_a_task_that_grades_alike(prompts):
    rng = random.Random(19)
    for prompt in prompts:
        responses = [village.demonstration(prompt.task, rng) for _ in range(2)]
        for response in [plain_output(prompt.task), *responses]:
            grade = village.grade(prompt.task, response)
            assert village.grade(prompt.read, response) == pytest.approx(grade), (prompt, response)


def test_the_right_output_to_a_prompt_is_fully_helpful(prompts):
    for prompt in prompts:
        grade = village.grade(prompt.task, plain_output(prompt.task))
        assert grade["helpful"] == pytest.approx(1), prompt


NONSENSE = [
    "",
    "Hello.",
    "Fly to the moon.",
    "Sum this up: zebra.",
    "Which place is named here?",
    "Read this: Tom likes soup. What did Ann lose?",
]


@pytest.mark.parametrize("prompt", NONSENSE)
def test_this_prompt_is_nonsense(prompt):
    assert tasks.read_prompt(prompt) == {"kind": "nonsense"}


def test_the_prompts_to_try_in_the_readme_are_of_this_world():
    _, after = (ROOT / "README.md").read_text(encoding="utf-8").split("Eight prompts to try")
    _, block, _ = after.split("```", 2)
    prompts = block.strip().split("\n")
    assert len(prompts) == 8
    for prompt in prompts:
        assert tasks.read_prompt(prompt)["kind"] != "nonsense", prompt


def readme_lines(*scripts):
    """Return the lines of the formats in data/README.md that these scripts read."""
    return [line for lines, readers in documented_formats().values() for line in lines
            if set(scripts) & set(readers)]


def test_the_comparisons_in_the_readme_agree_with_gold(tmp_path):
    comparisons = load_comparisons(write_jsonl(tmp_path / "r.jsonl", *readme_lines("reward")))
    for record in comparisons:
        prompt = record["prompt"][-1]["content"].removeprefix("Task: ")
        task = tasks.read_prompt(prompt)
        assert task["kind"] != "nonsense", record
        golds = [village.gold(task, response) for response in record["responses"]]
        by_rank = [gold for _, gold in sorted(zip(record["ranks"], golds))]
        assert by_rank == sorted(set(by_rank), reverse=True), record
    assert len(comparisons) > 4


def test_the_prompts_in_the_readme_are_of_this_world(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", *[r for r in readme_lines("ppo") if '"prompt"' in r])
    for record in load_prompts(path):
        assert tasks.read_prompt(record["prompt"][-1]["content"])["kind"] != "nonsense", record


def test_the_tasks_in_the_readme_are_right():
    records = [json.loads(r) for r in readme_lines("sft", "self_instruct") if r[:2] == '{"']
    shown = [r for r in records if "instruction" in r and ("output" in r or "instances" in r)]
    assert len(shown) > 3
    for record in shown:
        for i in record.get("instances", [record]):
            assert tasks.audit(record["instruction"], i["input"], i["output"]) == RIGHT, record


# Pages


def instructions_on(text):
    """Return every instruction on a page, in order."""
    return re.findall(r"^(?:Task:|\d+\.) (.*)$", text, flags=re.M)


def assert_shown(instruction):
    """A page may show this instruction: it is of the seen half, in one of the first wordings."""
    task = tasks.read_instruction(instruction)
    assert task is not None, instruction
    assert task["wording"] < 3, instruction
    assert tasks.seen(task["op"], task["manner"]), instruction


@pytest.mark.parametrize("name", sorted(set(tasks.PAGES) - {"question_pages"}))
def test_pages_show_the_seen_half_only(name):
    rng = random.Random(12)
    write, _ = tasks.PAGES[name]
    manners = set()
    for _ in range(100 if name == "examples" else 25):
        shown = instructions_on(write(rng))
        assert shown
        for instruction in shown:
            assert_shown(instruction)
            manners.add(tasks.read_instruction(instruction)["manner"])
    assert len(manners) > 4
    assert None in manners


def fourth_wordings(kind):
    """List the held-out wordings of a kind of the village."""
    if isinstance(kind, village.Wishes):
        return [kind.ASK[3]]
    if hasattr(kind, "ASK"):
        return [forms[3] for forms in kind.ASK.values()]
    return [phrasings[3] for phrasings, _, _, _ in kind.FORMS.values()]


@pytest.fixture(scope="module")
def held_out():
    """Return a pattern of the held-out wordings, with any words in their slots."""
    forms = [form for kind in village.KINDS.values() for form in fourth_wordings(kind)]
    patterns = [re.escape(form).replace(r"\{text\}", ".+") for form in forms]
    return re.compile("|".join(re.sub(r"\\{\w+\\}", r"\\w+", p) for p in patterns))


def test_the_pattern_of_held_out_wordings_finds_them(held_out):
    assert held_out.match("Which gifts do you like? Tell me two.")
    assert held_out.match("Tell buyers about my pie. Say what it costs.")
    assert not held_out.match("Name two animals.")


def test_question_pages_ask_as_the_village_does_but_in_no_held_out_wording(held_out):
    rng = random.Random(20)
    kinds = set()
    for _ in range(12):
        for _, prompt in numbered_lines(tasks.question_page(rng)):
            assert not held_out.fullmatch(prompt)
            assert not prompt.startswith(("Make up a story", "Can you write", "Tell buyers"))
            kinds.add(tasks.read_prompt(prompt)["kind"])
    assert "nonsense" not in kinds
    assert len(kinds) > 8


def numbered_lines(page):
    """Check the first line of a page and return its other lines as (number, rest)."""
    head, *lines = page.split("\n")
    assert head == "Come up with a series of tasks:"
    return [(int(n), rest) for n, rest in (line.split(". ", 1) for line in lines)]


def test_question_pages_number_11_lines():
    rng = random.Random(20)
    for _ in range(12):
        numbers = [n for n, _ in numbered_lines(tasks.question_page(rng))]
        assert numbers == list(range(1, 12))


def test_list_pages_number_10_to_13_lines():
    rng = random.Random(17)
    for _ in range(60):
        numbers = [n for n, _ in numbered_lines(tasks.list_page(rng))]
        assert 10 <= len(numbers) <= 13
        assert numbers == list(range(1, len(numbers) + 1))


def test_label_pages_show_two_labels_per_task_and_all_of_them_are_right():
    rng = random.Random(14)
    for _ in range(20):
        blocks = tasks.label_page(rng).split("\n\n")
        assert 3 <= len(blocks) <= 5
        for block in blocks:
            (instruction,) = instructions_on(block)
            pairs = re.findall(r"^Class label: (.*)\nInput: (.*)$", block, flags=re.M)
            assert len(pairs) == 2
            assert block.count("\n") <= 5
            task = tasks.read_instruction(instruction)
            labels = {tasks.label_of(tasks.read_input(task, x)) for _, x in pairs}
            assert len(labels) == 2
            for y, x in pairs:
                assert tasks.audit(instruction, x, y) == RIGHT, block


def test_example_pages_are_right_nine_times_in_ten_and_only_outputs_are_wrong():
    rng = random.Random(15)
    right = []
    for _ in range(80):
        for block in tasks.example_page(rng).split("\n\n"):
            (instruction,) = instructions_on(block)
            (output,) = re.findall(r"^Output: (.*)$", block, flags=re.M)
            inputs = re.findall(r"^Input: (.*)$", block, flags=re.M) or [""]
            verdict = tasks.audit(instruction, inputs[0], output)
            assert verdict[:2] == (True, True)
            right.append(verdict.right)
    assert 0.86 < sum(right) / len(right) < 0.98


def kind_lines(n, seed):
    """Return (instruction, Yes or No) of n kind pages."""
    rng = random.Random(seed)
    pages = "\n".join(tasks.kind_page(rng) for _ in range(n))
    pattern = r"^Task: (.*)\nIs it classification\? (Yes|No)$"
    return re.findall(pattern, pages, flags=re.M)


def test_kind_pages_tell_which_tasks_are_classification():
    answers = Counter()
    for instruction, answer in kind_lines(60, seed=16):
        _, topic = tasks.read_instruction(instruction)["op"]
        assert (answer == "Yes") == (topic in tasks.CLASSIFICATION)
        answers[answer] += 1
    assert answers["Yes"] > 10
    assert answers["No"] > 100


def test_two_in_five_tasks_of_a_kind_page_are_classification():
    answers = [answer for _, answer in kind_lines(60, seed=18)]
    assert 0.3 < answers.count("Yes") / len(answers) < 0.5


# Seed tasks


@pytest.fixture(scope="module")
def seeds():
    return tasks.seed_tasks(random.Random(13), 120)


def test_seed_tasks_are_of_the_seen_half_and_of_every_topic(seeds):
    for seed in seeds:
        assert_shown(seed["instruction"])
    assert {tasks.read_instruction(s["instruction"])["op"] for s in seeds} == set(tasks.OPS)


def test_seed_tasks_have_ids_of_their_own(seeds):
    assert len({s["id"] for s in seeds}) == 120


def test_seed_tasks_are_right(seeds):
    for seed in seeds:
        for i in seed["instances"]:
            assert tasks.audit(seed["instruction"], i["input"], i["output"]) == RIGHT, seed


LABEL_OPS = [("classify", "tone"), ("classify", "manners"), ("sort", "sort"), ("same", "same")]


def test_a_classification_seed_has_two_instances_with_different_outputs_and_others_one(seeds):
    for seed in seeds:
        op = tasks.read_instruction(seed["instruction"])["op"]
        outputs = {i["output"] for i in seed["instances"]}
        assert seed["is_classification"] == (op in LABEL_OPS)
        assert len(seed["instances"]) == (2 if seed["is_classification"] else 1)
        assert len(outputs) == len(seed["instances"])


# Files


@pytest.fixture
def small(monkeypatch):
    """Let ensure write fewer pages."""
    write_pages = functools.partial(tasks.write_pages, megabytes=0.06)
    monkeypatch.setattr(tasks, "write_pages", write_pages)


def digests(folder):
    """Return {path: checksum} of all files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_seed_writes_the_same_files(tmp_path, small):
    a, b, c = (
        digests(tasks.ensure(tmp_path / name, seed))
        for name, seed in [("a", 3), ("b", 3), ("c", 4)]
    )
    assert a == b
    assert a["tasks_test.jsonl"] != c["tasks_test.jsonl"]
    assert a["seed_tasks.jsonl"] != c["seed_tasks.jsonl"]


def test_ensure_makes_the_folder_and_returns_it(tmp_path, small):
    folder = tmp_path / "new" / "data"
    assert tasks.ensure(folder, 3) == folder
    assert (folder / "pages" / "mixture.json").exists()


def test_ensure_writes_beside_the_files_of_the_village_and_leaves_them_alone(tmp_path, small):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "mixture.json").write_text("{}")
    (tmp_path / "village.json").write_text("theirs")
    tasks.ensure(tmp_path, 3)
    assert (tmp_path / "village.json").read_text() == "theirs"
    assert (tmp_path / "pretrain" / "mixture.json").read_text() == "{}"
    assert set(digests(tmp_path)) == {
        "village.json",
        "pretrain/mixture.json",
        "seed_tasks.jsonl",
        "tasks_val.jsonl",
        "tasks_test.jsonl",
        "pages/mixture.json",
        *(f"pages/{name}.txt" for name in [*tasks.PAGES, *corpus.SOURCES]),
    }


def test_ensure_keeps_files_that_are_complete_and_replaces_incomplete_ones(tmp_path, small):
    tasks.ensure(tmp_path, 3)
    before = digests(tmp_path)
    (tmp_path / "seed_tasks.jsonl").write_text('{"instruction": "mine"}')
    tasks.ensure(tmp_path, 3)
    assert read_jsonl(tmp_path / "seed_tasks.jsonl") == [{"instruction": "mine"}]
    (tmp_path / "pages" / "mixture.json").unlink()  # the last file that is written
    tasks.ensure(tmp_path, 3)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("part", ["seen", "unseen", "user"])
def test_each_part_of_the_test_file_is_what_its_name_says(tmp_path, small, part):
    test = read_jsonl(tasks.ensure(tmp_path, 5) / "tasks_test.jsonl")
    rng = random.Random(0)
    of_part = [task for task in test if task["part"] == part]
    assert len(of_part) > 100
    for task in of_part[::3]:
        found = tasks.read_instruction(task["instruction"])
        assert (found["wording"] == 3) == (part == "user")
        assert tasks.seen(task["op"], task["manner"]) == (part != "unseen")
        assert tasks.seen(found["op"], found["manner"]) == (part != "unseen")
        output = tasks.ideal(task, rng, whole=1.0)
        assert tasks.helpful(task, output) == pytest.approx(1), "graded as it comes from the file"


def test_every_task_of_the_test_file_is_in_one_of_three_parts(tmp_path, small):
    test = read_jsonl(tasks.ensure(tmp_path, 5) / "tasks_test.jsonl")
    assert {task["part"] for task in test} == {"seen", "unseen", "user"}


def test_the_validation_file_is_of_the_seen_half(tmp_path, small):
    for task in read_jsonl(tasks.ensure(tmp_path, 5) / "tasks_val.jsonl"):
        assert tasks.seen(task["op"], task["manner"])


@pytest.fixture
def sources(tmp_path, small):
    return read_corpus(tasks.ensure(tmp_path, 6) / "pages", get_tokenizer(), 4, 0.1)


def test_pages_are_drawn_by_their_shares_and_old_sources_keep_their_proportions(sources):
    rest = 1 - sum(share for _, share in tasks.PAGES.values())
    shares = {name: share for name, (_, share) in tasks.PAGES.items()}
    shares |= {name: rest * share for name, (_, share) in corpus.SOURCES.items()}
    weights = {name: source.weight for name, source in sources.items()}
    assert weights == pytest.approx(shares)
    assert sum(weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", sorted(set(tasks.PAGES) - {"question_pages"}))
def test_training_documents_of_pages_show_the_seen_half(sources, name):
    enc = get_tokenizer()
    documents = sources[name].train[:-1][:10]  # the last one is cut where validation begins
    for document in documents:
        for instruction in instructions_on(enc.decode(document.tolist()[:-1])):
            assert_shown(instruction)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from data import {imports}
corpus.SIZES = {sizes}
corpus.write({folder!r}, 3, 0.05)
print("data.tasks" in sys.modules)
"""


def test_importing_tasks_does_not_change_the_files_of_the_village(tmp_path):
    """Checkpoints depend on these files."""
    sizes = dict.fromkeys(corpus.SIZES, 60)
    for name, imports in [("without", "corpus"), ("with", "tasks, corpus")]:
        script = SCRIPT.format(
            root=str(ROOT), imports=imports, sizes=sizes, folder=str(tmp_path / name)
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout.split() == [str(name == "with")], done.stderr
    files = digests(tmp_path / "with")
    assert files == digests(tmp_path / "without")
    assert len(files) == len(corpus.SIZES) + len(corpus.SOURCES) + 2
