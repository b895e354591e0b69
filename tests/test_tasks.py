"""Properties of data/tasks.py: what is asked can be read back, what is right is graded right, and the pages show one half of the world.

The sweep asks every topic in every wording and every manner; right and wrong answers are built here a second time, by hand.
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

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402
from data import corpus, tasks, village  # noqa: E402
from data.village import WORDS  # noqa: E402

SHOWN = {"wording", "known", "topic", "op", "said", "manner", "kind"}   # what is compared apart from the words


def mannered(task, manner, form, said):
    """The same task, asked in a manner."""
    return task | dict(instruction=task["instruction"] + " " + form.format(**said), manner=manner, said=said)


@pytest.fixture(scope="module")
def sweep():
    """Every topic, each of its four wordings, plain and in every manner, whose wordings take turns: [(wording, task, task as read)]."""
    rng, found, turn = random.Random(0), [], 0
    for op in tasks.OPS:
        for wording in range(4):
            asked = [tasks.new_task(rng, op, "plain", wording)]
            for manner, (forms, _) in tasks.MANNERS.items():
                said = {s: rng.choice(WORDS[s]) for s in ("person", "place")}
                asked.append(mannered(tasks.new_task(rng, op, "plain", wording), manner, forms[turn % 3], said))
                turn += 1
            found += [(wording, t, tasks.read_instruction(t["instruction"])) for t in asked]
            turn += 1   # 7 a round: else each manner would keep to one of its three wordings
    return found


def some(n, seed=0, **choice):
    rng = random.Random(seed)
    return [tasks.new_task(rng, half=rng.choice(["plain", "seen", "unseen"]), wording=rng.randrange(4), **choice) for _ in range(n)]


def best(task):
    """What is asked for and nothing more, without its manner."""
    wish = task.get("wishes", ())
    if task["kind"] == "story":
        lines = ["{person} went to the {place} with a {animal}." if "place" in wish else "One day {person} met a {animal}."]
        more = dict(thing="They found a {colour} {thing}.", food="They had some {food} with them.", mood="In the evening they were {mood}.", end="The end.")
    elif task["kind"] == "letter":
        lines = ["Dear {person}, thank you for the {food}." if "food" in wish else "Dear {person}, how are you?"]
        more = dict(mood="I am {mood} today.", place="Please come to the {place}.", job="Yours, the {job}.")
    elif task["kind"] == "advert":
        lines = ["Fresh {food} for everybody!"]
        more = dict(mood="It makes you {mood}.", price="It costs {price} coins.", place="Come to the {place} today.")
    elif task["kind"] == "brainstorm":
        words = WORDS[task["topic"]][:{"two": 2, "three": 3, "four": 4}[task["number"]]]
        return ", ".join(words[:-1]) + " and " + words[-1] + "."
    else:
        return tasks.ALL[task["kind"]].FORMS[task["topic"]][1].format(**task) if task["known"] else "I do not know."
    return " ".join(lines + [s for w, s in more.items() if w in wish]).format(**task)


WRAPPED = dict(well="Well. {a}", thanks="{a} Thank you.", twice="{a} {a}", listen="Listen, {person}. {a}", here="Here at the {place}: {a}",
               sure="{a} I am sure.")


def wrapped(task, answer):
    return WRAPPED[task["manner"]].format(a=answer, **task["said"]) if task["manner"] else answer


def right(task, output):
    return tasks.audit(task["instruction"], task["input"], output)


# Reading back

def test_every_instruction_reads_back_to_what_was_asked(sweep):
    assert {(t["op"], w) for w, t, _ in sweep} == {(op, w) for op in tasks.OPS for w in range(4)} and len(tasks.OPS) > 30
    forms = {(m, f) for m, (forms, _) in tasks.MANNERS.items() for f in forms}
    assert forms == {(t["manner"], f) for _, t, _ in sweep for m, f in forms if m == t["manner"] and t["instruction"].endswith(f.format(**t["said"]))}
    for wording, task, read in sweep:
        assert read is not None, task
        assert (read["op"], read["wording"], read["manner"], read["kind"]) == (task["op"], wording, task["manner"], task["kind"])
        assert all(str(task[k]) == str(v) for k, v in read.items() if k not in SHOWN), (task, read)
        assert read["said"].items() <= task["said"].items()
        spoken = set(village.slots(tasks.MANNERS[task["manner"]][1])) - {"answer"} if task["manner"] else set()
        assert spoken <= set(read["said"]), "a manner whose words cannot be read cannot be graded"


def test_every_input_reads_back_and_every_ideal_answer_is_right(sweep):
    rng = random.Random(1)
    for _, task, read in sweep:
        whole, kind = tasks.read_input(read, task["input"]), tasks.ALL[task["kind"]]
        assert whole is not None, task
        assert whole.get("known", True) == task.get("known", True) and whole.get("topic") == task.get("topic")
        needed = village.slots(kind.FORMS[task["topic"]][1]) if whole.get("known") and hasattr(kind, "FORMS") else []
        assert all(str(whole[s]) == str(task[s]) for s in needed), (task, whole)
        best_output = wrapped(task, best(task))
        for t in (task, whole):
            assert tasks.helpful(t, best_output) == pytest.approx(1), (task, best_output)
            assert tasks.helpful(t, tasks.ideal(task, rng)) >= (0.4 if hasattr(kind, "FORMS") else 0.999), task
        if rng.random() < 0.3:
            assert right(task, best_output) == right(task, tasks.ideal(task, rng)) == (True, True, True)


def test_half_decides_the_manner_and_every_topic_has_both_halves():
    rng = random.Random(2)
    for op in tasks.OPS:
        for half, wanted in (("unseen", {False}), ("seen", {True}), ("plain", {True})):
            found = [tasks.new_task(rng, op, half) for _ in range(16)]
            assert {tasks.seen(t["op"], t["manner"]) for t in found} == wanted
            assert (half == "seen") == (len({t["manner"] is None for t in found}) == 2)
            assert half != "plain" or not any(t["manner"] for t in found)
        assert 0 < sum(tasks.seen(op, m) for m in tasks.MANNERS) < len(tasks.MANNERS) and tasks.seen(op, None)


# Wrong answers

def test_an_answer_with_one_word_altered_is_wrong():
    rng, n = random.Random(3), 0
    for task in some(150, seed=3):
        output = wrapped(task, best(task))
        for slot in ("person", "animal", "thing", "colour", "place", "food", "job", "mood", "hanzi", "sound", "label"):
            for word in WORDS[slot]:
                if re.search(rf"\b{word}\b", output):
                    others = [w for w in WORDS[slot] if w != word]
                    if task["kind"] == "brainstorm" and slot == task["topic"]:   # any other animal would do, unless it is there already
                        others = [w for w in others if re.search(rf"\b{w}\b", best(task))]
                    other = rng.choice(others)
                    altered = re.sub(rf"\b{word}\b", other, output, count=1)
                    n += 1
                    assert right(task, altered) == (True, True, False), (task["instruction"], task["input"], altered)
    assert n > 200


def test_an_answer_in_another_manner_is_wrong():
    for task in some(50, seed=4):
        person, place = (next(w for w in WORDS[s] if w != task["said"][s]) for s in ("person", "place"))
        for manner in [None, *tasks.MANNERS]:
            as_asked = manner == task["manner"]
            assert right(task, wrapped(task | {"manner": manner}, best(task))) == (True, True, as_asked), (task, manner)
            strange = wrapped(task | {"manner": manner, "said": {"person": person, "place": place}}, best(task))
            assert right(task, strange)[2] == (as_asked and manner not in ("listen", "here"))


def test_said_twice_means_the_same_twice():
    task = mannered(dict(kind="brainstorm", topic="animal", number="two", input="", instruction="Name two animals."), "twice", "Say it twice.", {})
    for output, fine in (("cat and dog. cat and dog.", True), ("cat and dog. dog and cat.", False), ("cat and dog.", False), ("", False), (" ", False),
                         ("cat and dog.cat and dog.", False), ("cat and dog.,cat and dog.", False), ("cat and dog. cat and dog. cat and dog.", False), ("cat and dog.  cat and dog.", False)):
        assert right(task, output) == (True, True, fine), output


@pytest.mark.parametrize("instruction, input, output, fine", [
    ("Name three animals.", "", "cat, dog and cow.", True), ("Name three animals.", "", "cat and dog.", False), ("Name three animals.", "", "cat, dog and cake.", False),
    ("How much is the cake?", "", "The cake costs 9 coins.", True), ("How much is the cake?", "", "9.", True), ("How much is the cake?", "", "The cake costs 4 coins.", False),
    ("How old is the baker?", "", "I do not know.", True), ("How old is the baker?", "", "The baker is 43 years old.", False), ("How old is the baker?", "", "43.", False),
    ("What is 3 plus 5?", "", "The sum is 8.", True), ("What is 3 plus 5?", "", "The sum is 7.", False), ("What does 猫 mean?", "", "It means cat.", True),
    ("How do you say dog in Chinese?", "", "In Chinese it is 狗.", True), ("How do you say dog in Chinese?", "", "In Chinese it is 猫.", False),
    ("Read the text. What does Tom have?", "Tom likes soup. Tom has a hat.", "Tom has a hat.", True),
    ("Read the text. What does Tom have?", "Tom likes soup. Tom has a hat.", "Tom has a cup.", False),
    ("Read the text. What does Tom have?", "Tom likes soup. Tom is a baker.", "I do not know.", True),
    ("Read the text. What does Tom have?", "Tom likes soup. Tom is a baker.", "Tom has a hat.", False),
    ("Find the food in the text.", "Tom likes soup. Tom has a hat.", "The food is soup.", True), ("Find the job in the text.", "Tom likes soup.", "Nobody told me.", True),
    ("Sum up the story in one sentence.", "Tom went to the mill with a cat. They found a red ball. They had some tea with them.", "Tom found a red ball at the mill.", True),
    ("Sum up the story in one sentence.", "Tom went to the mill with a cat. They found a red ball. They had some tea with them.", "Tom found a red ball at the inn.", False),
    ("Say it in a polite way.", "Give me the cup!", "Could you please give me the cup?", True), ("Say it in a polite way.", "Give me the cup!", "Give me the cup.", False),
    ("Is the line happy or sad?", "Tom is merry.", "happy.", True), ("Is the line happy or sad?", "Tom is tired.", "This is happy.", False),
    ("Is the line polite or rude?", "Now go away.", "This is rude.", True), ("Is it an animal, a food, a place or a colour?", "duck", "animal.", True),
    ("Is it an animal, a food, a place or a colour?", "soup", "It is of the kind animal.", False),
    ("Do the two like the same food, yes or no?", "Tom likes tea. Ann likes tea.", "yes.", True), ("Do the two like the same food, yes or no?", "Tom likes tea. Ann likes jam.", "The answer is yes.", False),
    ("Which thing comes last in the line?", "ball, hat, cup.", "The last is the cup.", True), ("Which thing comes last in the line?", "ball, hat, cup.", "The last is the hat.", False),
    ("Write an advert for cake. Say what it costs.", "", "Fresh cake for everybody! It costs 9 coins.", True), ("Write an advert for cake. Say what it costs.", "", "Fresh cake for everybody! It costs 4 coins.", False),
    ("Write an advert for cake. Say what it costs.", "", "Fresh cake for everybody!", False), ("Write an advert for cake. Say what it costs.", "", "Fresh milk for everybody! It costs 9 coins.", False)])
def test_right_and_wrong_as_a_careful_reader_would_have_it(instruction, input, output, fine):
    assert tasks.audit(instruction, input, output) == (True, True, fine)


# What is no task of this world

def test_a_foreign_or_a_missing_word_makes_an_instruction_invalid():
    rng = random.Random(5)
    for task in some(80, seed=5):
        words = task["instruction"].split()
        at = rng.randrange(len(words))
        for broken in (words[:at] + ["quickly"] + words[at:], words[:at] + ["zebra"] + words[at + 1:], words + ["zebra."]):
            assert tasks.read_instruction(" ".join(broken)) is None, broken
        known = {w for op in tasks.OPS for form in tasks.wordings(op) for w in form.split()}
        if words[at] in known and words[at] != "please." and not task["manner"] and not task.get("wishes"):
            assert tasks.read_instruction(" ".join(words[:at] + words[at + 1:])) is None, (words, at)


def test_sentences_may_be_neither_doubled_nor_lost_nor_added():
    rng = random.Random(6)
    for task in some(30, seed=6, op=("story", "story")) + some(20, seed=7, op=("letter", "letter")) + some(20, seed=8, op=("advert", "advert")):
        kind = tasks.ALL[task["kind"]]
        head = task["instruction"].split(". ")[0] + "."
        wishes = [kind.ASK_WISH[w].format(**task) for w in task["wishes"]]
        assert tasks.read_instruction(" ".join([head] + wishes))["wishes"] == task["wishes"]
        assert tasks.read_instruction(" ".join([head] + wishes + [rng.choice(wishes)])) is None, "a wish said twice"
        assert tasks.read_instruction(" ".join(wishes)) is None and tasks.read_instruction(head) is None
        assert tasks.read_instruction(" ".join([head] + wishes + ["The mill is big."])) is None
        assert tasks.read_instruction(" ".join([head, head] + wishes)) is None
    for task in some(60, seed=9):
        assert tasks.read_instruction(task["instruction"] + " Name two animals.") is None
        assert tasks.read_instruction("Name two animals. " + task["instruction"]) is None
        if task["manner"]:
            assert tasks.read_instruction(task["instruction"] + " Say it two times.") is None, "two manners"
    for lone in ("Read the text.", "Say it twice.", "End with: Thank you.", "You are at the mill.", "", "Where does Tom live?", "Give two ideas.", "Start with: Well. Name two animals."):
        assert tasks.read_instruction(lone) is None, lone


def test_a_wish_of_another_word_in_a_second_telling_is_still_a_wish_said_twice():
    assert tasks.read_instruction("Write a letter to Tom. Ask for a visit at the mill. Ask for a visit at the inn.") is None
    assert tasks.read_instruction("Write a letter to Tom. Ask for a visit at the zoo.") is None
    assert tasks.read_instruction("Write a letter to Tom. They have tea.") is None, "a wish of stories"
    assert tasks.read_instruction("Write a letter to Tom. Ask for a visit at the mill.")["place"] == "mill"


def family(op):
    """Topics whose inputs are of one sort."""
    return "" if op not in tasks.INPUT else "life" if op[0] in ("closedqa", "extract") else op[0] if op[0] == "line" else op


def test_an_input_fits_the_tasks_of_its_sort_and_no_other():
    rng = random.Random(10)
    for op in tasks.OPS:
        task = tasks.new_task(rng, op)
        read = tasks.read_instruction(task["instruction"])
        for other in tasks.OPS:
            if other == ("rewrite", "plural") and family(op) == "life":
                continue   # "Tom has a hat." tells something of Tom, too
            given = tasks.new_task(rng, other)["input"]
            while op[0] == "closedqa" and family(other) == "life" and not given.startswith(task["person"] + " "):
                given = tasks.new_task(rng, other)["input"]
            assert (tasks.read_input(dict(read), given) is not None) == (family(op) == family(other)), (task["instruction"], given)


@pytest.mark.parametrize("instruction, input", [
    ("Read the text. What does Tom have?", "Ann likes soup. Ann has a hat."), ("Read the text. What does Tom have?", "Tom likes soup. Ann has a hat."),
    ("Read the text. What does Tom have?", "Tom has a hat. Tom has a cup."), ("Read the text. What does Tom have?", "Tom has a hat. It is red."),
    ("Read the text. What does Tom have?", "Tom has a hat. Tom likes"), ("Find the food in the text.", "Tom likes soup. Ann has a hat."), ("Find the food in the text.", ""),
    ("Do the two like the same food, yes or no?", "Tom likes tea."), ("Do the two like the same food, yes or no?", "Tom likes tea. Tom likes jam."),
    ("Do the two like the same food, yes or no?", "Tom likes tea. Ann likes jam. Ben likes jam."), ("Which thing comes first in the line?", "ball."),
    ("Which thing comes first in the line?", "ball, zebra."), ("Is it an animal, a food, a place or a colour?", "zebra"), ("Is the line polite or rude?", "Tom is merry."),
    ("Is the line happy or sad?", "Now go away."), ("Say it in a polite way.", "Give me the zebra!"), ("Name two animals.", "Tom has a hat."), ("Name two animals.", " ")])
def test_inputs_that_do_not_fit(instruction, input):
    assert tasks.audit(instruction, input, "I do not know.") == (True, False, False)


def test_nonsense_is_nothing_of_all():
    assert tasks.audit("Fly to the moon.", "Tom has a hat.", "I do not know.") == (False, False, False)


# The grade is the village's

def test_helpful_is_the_villages_grade_under_any_manner():
    rng, grades = random.Random(11), Counter()
    for _ in range(250):
        task = tasks.new_task(rng, half=rng.choice(["plain", "seen", "unseen"]))
        if task["kind"] not in village.KINDS:
            continue
        for care in (0.3, 1.0):
            demonstration = village.KINDS[task["kind"]].answer(task, rng, care) if task.get("wishes") else village.KINDS[task["kind"]].answer(task, rng)
            graded = village.grade(task, demonstration)["helpful"]
            assert tasks.helpful(task, wrapped(task, demonstration)) == pytest.approx(graded)
            assert tasks.helpful(tasks.read_input(tasks.read_instruction(task["instruction"]), task["input"]), wrapped(task, demonstration)) == pytest.approx(graded)
            grades[graded] += 1
    assert len(grades) > 4 and grades[0.0] and grades[1.0]


def test_a_prompt_of_a_chat_reads_back_to_a_task_that_grades_alike():
    """The village's own prompts have instruction and text in one, in four wordings: any answer gets the grade of the task it was made from."""
    rng, n = random.Random(19), Counter()
    for use in village.SHARES:
        for wording in range(4) if use != "chat" else ():
            for _ in range(5):
                task, messages = village.new_task(rng, use=use, phrasing=wording)
                read = tasks.read_prompt(messages[-1]["content"])
                assert read["kind"] == task["kind"], messages
                for answer in (best(task), village.demonstration(task, rng), village.demonstration(task, rng)):
                    assert village.grade(read, answer) == pytest.approx(village.grade(task, answer)), (messages, answer, read)
                n[task["kind"], village.grade(task, best(task))["helpful"] == pytest.approx(1)] += 1
    assert {k for k, _ in n} == set(village.KINDS) - {"chat"} and all(fine for _, fine in n)
    for text in ("", "Hello.", "Fly to the moon.", "Sum it up: zebra.", "Which place is named here?", "Read this: Tom likes soup. What does Ann have?"):
        assert tasks.read_prompt(text) == {"kind": "nonsense"}, text


# Pages

def told_on(text):
    """Every instruction on a page, in order."""
    return re.findall(r"^(?:Task:|\d+\.) (.*)$", text, flags=re.M)


def check_seen(instructions):
    for x in instructions:
        read = tasks.read_instruction(x)
        assert read is not None and read["wording"] < 3 and tasks.seen(read["op"], read["manner"]), x


@pytest.mark.parametrize("name", sorted(set(tasks.PAGES) - {"question_pages"}))
def test_pages_show_the_seen_half_only(name):
    rng, shown, manners = random.Random(12), [], set()
    for _ in range(100 if name == "examples" else 25):
        text = tasks.PAGES[name][0](rng)
        assert told_on(text)
        shown += told_on(text)
    check_seen(shown)
    manners = {tasks.read_instruction(x)["manner"] for x in shown}
    assert len(manners) > 4 and None in manners


def test_question_pages_ask_as_the_village_does_but_in_no_held_out_wording():
    fourth = [f for kind in village.KINDS.values() for f in ([kind.ASK[3]] if isinstance(kind, village.Wishes) else
              [forms[3] for forms in kind.ASK.values()] if hasattr(kind, "ASK") else [forms[0][3] for forms in kind.FORMS.values()])]
    held_out = re.compile("|".join(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(f).replace(r"\{text\}", ".+")) for f in fourth))
    assert held_out.match("Any two gifts?") and held_out.match("Praise tea to buyers. Say what it costs.") and not held_out.match("Name two animals.")
    rng, kinds = random.Random(20), set()
    for _ in range(12):
        head, *lines = tasks.question_page(rng).split("\n")
        assert head == "Come up with a series of tasks:" and [int(x.split(".")[0]) for x in lines] == list(range(1, 12))
        for x in (line.split(". ", 1)[1] for line in lines):
            assert not held_out.fullmatch(x) and not x.startswith(("Make up a tale", "Send ", "Praise "))
            kinds.add(tasks.read_prompt(x)["kind"])
    assert "nonsense" not in kinds and len(kinds) > 8


def test_seed_tasks_show_the_seen_half_and_are_right():
    seeds = tasks.seed_tasks(random.Random(13), 120)
    check_seen(s["instruction"] for s in seeds)
    assert len({s["id"] for s in seeds}) == 120
    for s in seeds:
        op = tasks.read_instruction(s["instruction"])["op"]
        assert all(tasks.audit(s["instruction"], i["input"], i["output"]) == (True, True, True) for i in s["instances"]), s
        assert s["is_classification"] == (op in [("classify", "tone"), ("classify", "manners"), ("sort", "sort"), ("same", "same")])
        assert len(s["instances"]) == 1 + s["is_classification"] and len({i["output"] for i in s["instances"]}) == len(s["instances"])
    assert {tasks.read_instruction(s["instruction"])["op"] for s in seeds} == set(tasks.OPS), "people's tasks are of every topic"


def labels_of(block):
    return re.findall(r"^Class label: (.*)\nInput: (.*)$", block, flags=re.M)


def test_label_pages_show_two_labels_a_task_and_all_of_them_are_right():
    rng = random.Random(14)
    for _ in range(20):
        blocks = tasks.label_page(rng).split("\n\n")
        assert 3 <= len(blocks) <= 5
        for block in blocks:
            (instruction,), found = told_on(block), labels_of(block)
            assert len(found) == 2 and block.count("\n") <= 5
            assert all(tasks.audit(instruction, x, y) == (True, True, True) for y, x in found), block
            read = tasks.read_instruction(instruction)
            assert len({tasks.label_of(tasks.read_input(read, x)) for _, x in found}) == 2


def test_example_pages_are_right_nine_times_in_ten():
    rng, graded = random.Random(15), []
    for _ in range(80):
        for block in tasks.example_page(rng).split("\n\n"):
            (instruction,), (output,) = told_on(block), re.findall(r"^Output: (.*)$", block, flags=re.M)
            given = re.findall(r"^Input: (.*)$", block, flags=re.M)
            graded.append(tasks.audit(instruction, given[0] if given else "", output))
    assert all(g[:2] == (True, True) for g in graded), "only outputs are wrong on the web"
    assert 0.86 < sum(g[2] for g in graded) / len(graded) < 0.98


def test_kind_pages_tell_which_is_which():
    rng, answers = random.Random(16), Counter()
    for _ in range(60):
        for instruction, answer in re.findall(r"^Task: (.*)\nIs it classification\? (Yes|No)$", tasks.kind_page(rng), flags=re.M):
            assert (answer == "Yes") == (tasks.read_instruction(instruction)["op"][1] in tasks.CLASSIFICATION)
            answers[answer] += 1
    assert answers["Yes"] > 10 and answers["No"] > 100


def test_two_in_five_tasks_of_a_kind_page_are_classification():
    rng = random.Random(18)
    pages = "\n".join(tasks.kind_page(rng) for _ in range(60))
    yes, no = pages.count("classification? Yes"), pages.count("classification? No")
    assert 0.3 < yes / (yes + no) < 0.5


def test_list_pages_count():
    rng = random.Random(17)
    for _ in range(60):
        head, *lines = tasks.list_page(rng).split("\n")
        assert head == "Come up with a series of tasks:" and 10 <= len(lines) <= 13
        assert [int(x.split(".")[0]) for x in lines] == list(range(1, len(lines) + 1))


# Files

@pytest.fixture
def small(monkeypatch):
    """ensure() with fewer pages."""
    monkeypatch.setattr(tasks, "write_pages", functools.partial(tasks.write_pages, megabytes=0.06))


def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def jsonl(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_ensure_writes_the_same_once_and_touches_nothing_else(tmp_path, small):
    folders = [tmp_path / x for x in "abc"]
    for f, seed in zip(folders, (3, 3, 4)):
        (f / "pretrain").mkdir(parents=True)
        (f / "pretrain" / "mixture.json").write_text("{}")
        (f / "village.json").write_text("theirs")
        assert tasks.ensure(f, seed) == f
    a, b, c = map(digests, folders)
    assert a == b and a["tasks_test.jsonl"] != c["tasks_test.jsonl"] and a["seed_tasks.jsonl"] != c["seed_tasks.jsonl"]
    assert (folders[0] / "village.json").read_text() == "theirs" and (folders[0] / "pretrain" / "mixture.json").read_text() == "{}"
    assert set(a) == {"village.json", "pretrain/mixture.json", "seed_tasks.jsonl", "tasks_val.jsonl", "tasks_test.jsonl", "pages/mixture.json",
                      *(f"pages/{name}.txt" for name in [*tasks.PAGES, *corpus.SOURCES])}
    # What is whole stays, whoever edited it; what was cut off before its last file is written again.
    (folders[0] / "seed_tasks.jsonl").write_text("mine")
    tasks.ensure(folders[0], 3)
    assert (folders[0] / "seed_tasks.jsonl").read_text() == "mine"
    (folders[0] / "pages" / "mixture.json").unlink()
    tasks.ensure(folders[0], 3)
    assert digests(folders[0]) == a


def test_ensure_makes_the_folder(tmp_path, small):
    assert (tasks.ensure(tmp_path / "new" / "data", 3) / "pages" / "mixture.json").exists()


def test_the_test_file_keeps_its_promises(tmp_path, small):
    tests = jsonl(tasks.ensure(tmp_path, 5) / "tasks_test.jsonl")
    rng, parts = random.Random(0), {p: [t for t in tests if t["part"] == p] for p in ("seen", "unseen", "user")}
    assert sum(map(len, parts.values())) == len(tests) and min(map(len, parts.values())) > 100
    for name, part in parts.items():
        for t in part[::3]:
            read = tasks.read_instruction(t["instruction"])
            assert (read["wording"] == 3) == (name == "user")
            assert tasks.seen(t["op"], t["manner"]) == (name != "unseen") and tasks.seen(read["op"], read["manner"]) == (name != "unseen")
            assert tasks.helpful(t, tasks.ideal(t, rng, whole=1.0)) == pytest.approx(1), "a task is gradable as it comes from the file"
    assert all(tasks.seen(t["op"], t["manner"]) for t in jsonl(tmp_path / "tasks_val.jsonl"))


def test_gpt_reads_the_pages_by_their_shares(tmp_path, small):
    enc = gpt.get_tokenizer()
    sources = gpt.read_corpus(tasks.ensure(tmp_path, 6) / "pages", enc, 4, 0.1)
    assert set(sources) == {*tasks.PAGES, *corpus.SOURCES} and sum(s[2] for s in sources.values()) == pytest.approx(1)
    assert all(sources[name][2] == pytest.approx(share) for name, (_, share) in tasks.PAGES.items())
    rest = 1 - sum(share for _, share in tasks.PAGES.values())
    assert all(sources[name][2] == pytest.approx(rest * share) for name, (_, share) in corpus.SOURCES.items()), "the old texts keep their proportions"
    for name in set(tasks.PAGES) - {"question_pages"}:
        check_seen(told_on("\n".join(enc.decode(d.tolist()[:-1]) for d in sources[name][0][:-1][:10])))   # the last is cut where validation begins


def test_the_village_writes_as_if_tasks_were_not_there(tmp_path):
    """Checkpoints rest on its files: importing data.tasks must not change a byte of them."""
    sizes = dict.fromkeys(corpus.SIZES, 60)
    code = ("import sys; sys.path.insert(0, {!r}); from data import {}corpus; corpus.SIZES = {}; corpus.write({!r}, 3, 0.05); "
            "print('data.tasks' in sys.modules)")
    for name, more in (("without", ""), ("with", "tasks, ")):
        done = subprocess.run([sys.executable, "-c", code.format(str(ROOT), more, sizes, str(tmp_path / name))], capture_output=True, text=True)
        assert done.stdout.split() == [str(bool(more))], done.stderr
    assert digests(tmp_path / "with") == digests(tmp_path / "without") and len(digests(tmp_path / "with")) == len(corpus.SIZES) + len(corpus.SOURCES) + 2
