"""The village's tasks in Self-Instruct's form, and a reader that grades any of them.

    instruction   Which food is named in the text? Say it twice.
    input         Ann lost a ball. Ann likes soup.
    output        Food: soup. Food: soup.

The input may be empty. The last sentence of an instruction may be a manner: how to say the output.
new_task draws a task. read_instruction and read_input turn its words back into the task, and
helpful grades an output. So a program can audit every task that a model writes.

    python data/tasks.py                     print ten tasks
    python data/tasks.py --out out/data      write the files below

    seed_tasks.jsonl                         175 tasks as people would write them
    tasks_val.jsonl, tasks_test.jsonl        tasks to grade a fine-tuned model on
    pages/                                   documents that make a base model promptable

A model continues a numbered list only if it has read numbered lists. So the base model of
Self-Instruct reads pages first: lists of tasks, worked examples, labels with inputs, and tasks with
"Is it classification?". The pages show half of the world. A pair of topic and manner whose hash is
odd appears on no page and in no seed task. Neither does the fourth wording of an instruction.
"""
import random
import re
import sys
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import corpus, village
from data.formats import write_records
from data.village import FACTS, IGNORANCE, KINDS, LIFE, RUDE_LINES, WORDS
from data.village import Form, OpenQA, Reply, Story, Wishes, picker, sentences, slots
from scaffold.cli import start


@dataclass
class Config:
    n: int = 10        # how many tasks to print
    out: str = ""      # write the files to this folder instead
    seed: int = 0      # another seed gives other tasks of the same world


class Sort(Reply):
    """A word and its kind: a classification with four labels."""
    FORMS = dict(
        sort=Form(["Is it an animal, a food, a place or a colour?",
                   "Tell me what kind of word this is: animal, food, place or colour.",
                   "Put the word where it belongs: animal, food, place or colour.",
                   "Animal, food, place or colour, which is it?"],
                  "It is {sort}.", "{sort}.", 0.5))

    def make(self, pick, rng):
        kind = rng.choice(list(SORTS))
        return dict(topic="sort", known=True, sort=SORTS[kind], word=pick(kind))


class Same(Reply):
    """Two people and what they like: a classification with the labels yes and no."""
    FORMS = dict(
        same=Form(["Do the two like the same food, yes or no?",
                   "Say yes if both like the same food, and no if not.",
                   "Tell me yes or no: do both like the same food?",
                   "Yes or no, is it the same food for both?"],
                  "The answer is {yesno}.", "{yesno}.", 0.5))

    def make(self, pick, rng):
        one, two = rng.sample(WORDS["person"], 2)
        food = pick("food")
        if rng.random() < 0.5:
            other = food
        else:
            other = rng.choice([f for f in WORDS["food"] if f != food])
        return dict(topic="same", known=True, text=f"{one} likes {food}. {two} likes {other}.",
                    yesno="yes" if food == other else "no")


class Line(Reply):
    """A list of three things: which is first, and which is last?"""
    FORMS = dict(
        first=Form(["Which thing comes first in the list?", "Name the first thing in the list.",
                    "Tell me what comes first.", "What does the list begin with?"],
                   "The {thing} comes first.", "{thing}.", 0.5),
        last=Form(["Which thing comes last in the list?", "Name the last thing in the list.",
                   "Tell me what comes last.", "What does the list end with?"],
                  "The {thing} comes last.", "{thing}.", 0.5))

    def make(self, pick, rng):
        topic = rng.choice(list(self.FORMS))
        line = rng.sample(WORDS["thing"], 3)
        return dict(topic=topic, known=True, text=", ".join(line) + ".",
                    thing=line[0] if topic == "first" else line[-1])


SORTS = dict(animal="an animal", food="a food", place="a place", colour="a colour")
MORE_WORDS = dict(sort=list(SORTS.values()), yesno=["yes", "no"], x=list("1234"), y=list("12345"))
ALL = {name: kind for name, kind in KINDS.items() if name != "chat"}
ALL |= dict(sort=Sort(), same=Same(), line=Line())
CLASSIFICATION = ("tone", "manners", "sort", "same")   # topics whose outputs are labels

# An op is a pair (kind, topic). ASK: the wordings of the ops whose input is a separate string.
ASK = {("closedqa", topic): ["Read the text. " + life.question,
                             "Answer from the text: " + life.question,
                             "Look it up in the text: " + life.question,
                             "What does the text say? " + life.question]
       for topic, life in LIFE.items()}
ASK |= {("extract", topic): [f"Which {life.noun} is named in the text?",
                             f"Find the {life.noun} in the text.",
                             f"Pick the {life.noun} out of the text.",
                             f"What is the {life.noun} in the text?"]
        for topic, life in LIFE.items()}
ASK |= {
    ("summary", "story"): ["Sum up the story in one sentence.", "Say in one sentence what happens.",
                           "Make the story shorter, please.", "Tell me the story in one line."],
    ("rewrite", "polite"): ["Say it in a polite way.", "Make the line more polite, please.",
                            "How do I ask for this nicely?", "Make it sound more polite."],
    ("rewrite", "past"): ["Put the line in the past tense.", "Make it happen yesterday.",
                          "Say it about yesterday.", "Now put it in the past."],
    ("rewrite", "plural"): ["Change one to two.", "Say it with two, not one.",
                            "Make it two instead of one.", "Now say it with two."],
    ("classify", "tone"): ["Is the feeling good or bad?", "Does it feel good or bad?",
                           "Tell me if this is a good or a bad feeling.",
                           "Good or bad, which feeling is it?"],
    ("classify", "manners"): ["Is the line polite or rude?", "How does it sound, polite or rude?",
                              "Tell me if this is polite or rude.",
                              "Polite or rude, which is it?"]}

# INPUT: the form of each op's input. An op without an entry has no input.
INPUT = {("rewrite", "polite"): "Give me the {thing}!",
         ("rewrite", "past"): "{person} waits at the {place}.",
         ("rewrite", "plural"): "{person} has a {thing}.",
         ("sort", "sort"): "{word}"}
INPUT |= {op: "{text}" for op in [*ASK, ("same", "same"), ("line", "first"), ("line", "last")]
          if op not in INPUT}


class Manner(NamedTuple):
    wordings: list   # three ways to ask for it
    form: str        # the output in this manner


MANNERS = dict(   # any task can be asked in any manner
    well=Manner(["Start with: Well.", "Begin your answer with: Well.", "First say: Well."],
                "Well. {output}"),
    thanks=Manner(["End with: Thank you.", "Do not forget to say thank you.",
                   "Say thank you after it."],
                  "{output} Thank you."),
    twice=Manner(["Say it twice.", "Say it two times.", "Give the answer twice."],
                 "{output} {output}"),
    listen=Manner(["Say it to {person}.", "Tell it to {person}.",
                   "It is {person} who wants to know."],
                  "Listen, {person}. {output}"),
    here=Manner(["Say that you are at the {place}.", "First tell me that you are at the {place}.",
                 "Begin by saying that you are at the {place}."],
                "I am at the {place}. {output}"),
    sure=Manner(["Say that you are sure.", "Add that you are sure.", "End by saying: I am sure."],
                "{output} I am sure."))


@lru_cache(maxsize=None)
def pattern(template):
    return village.pattern(template, WORDS | MORE_WORDS)


def match(template, text):
    """Invert str.format: return {slot: word}, or None if the text does not fit the template."""
    found = pattern(template).fullmatch(text)
    return None if found is None else found.groupdict()


def topics(name):
    """List the topics of a kind. A kind with wishes has one topic."""
    kind = ALL[name]
    if isinstance(kind, Wishes):
        return [name]
    return list(kind.ASK if name == "brainstorm" else kind.FORMS)


OPS = [(name, topic) for name in ALL for topic in topics(name)]
LONG_OPS = [(name, topic) for name, topic in OPS if isinstance(ALL[name], Wishes)]


def wordings(op):
    """Return the four ways to ask for a topic; the last one is held out."""
    name, topic = op
    kind = ALL[name]
    if op in ASK:
        return ASK[op]
    if isinstance(kind, Wishes):
        return kind.ASK
    return kind.ASK[topic] if name == "brainstorm" else kind.FORMS[topic].phrasings


def is_classification(op):
    _, topic = op
    return topic in CLASSIFICATION


def seen(op, manner):
    """Return whether the pages and the seed tasks show this pair of topic and manner."""
    _, topic = op
    return manner is None or zlib.crc32(f"{topic} {manner}".encode()) % 2 == 0


def draw_manner(op, half, rng):
    """Draw a manner, or None: always None for "plain", half of the time for "seen"."""
    if half == "plain" or (half == "seen" and rng.random() >= 0.5):
        return None
    return rng.choice([m for m in MANNERS if seen(op, m) == (half == "seen")] or [None])


def new_task(rng, op=None, half="seen", wording=None):
    """Draw a task: the village's fields, and op, instruction, input, manner and said.

    half     "seen" or "unseen" pairs of topic and manner, or "plain": no manner
    wording  0 to 3; None draws one of the first three
    said     the words that fill the slots of the manner
    """
    pick = picker(rng)
    op = op or rng.choice(OPS + LONG_OPS * 2)   # long texts have more to vary
    name, topic = op
    kind = ALL[name]
    task = {"kind": name} | kind.make(pick, rng)
    while task.get("topic", topic) != topic:
        task = {"kind": name} | kind.make(pick, rng)
    manner = draw_manner(op, half, rng)
    said = {"person": pick("person"), "place": pick("place")}
    number = rng.randrange(3) if wording is None else wording
    wishes = [kind.ASK_WISH[w] for w in task.get("wishes", [])]
    instruction = " ".join([wordings(op)[number], *wishes]).format(**task)
    if manner:
        instruction += " " + rng.choice(MANNERS[manner].wordings).format(**said)
    return task | dict(op=op, instruction=instruction, input=INPUT.get(op, "").format(**task),
                       manner=manner, said=said)


def ideal(task, rng, whole=0.7):
    """Write a correct output in the task's manner, a whole sentence with probability `whole`."""
    kind = ALL[task["kind"]]
    if isinstance(kind, Wishes):
        output = kind.answer(task, rng, village.TEACHER)
    elif task["kind"] == "brainstorm":
        words = rng.sample(WORDS[task["topic"]], kind.count(task))
        output = ", ".join(words[:-1]) + " and " + words[-1] + "."
    elif not task["known"]:
        output = rng.choice(IGNORANCE)
    else:
        _, full, short, worth = kind.FORMS[task["topic"]]
        output = (full if rng.random() < whole or worth < 0.4 else short).format(**task)
    return in_manner(task, output)


def in_manner(task, output):
    """Put an output into the task's manner."""
    if task["manner"] is None:
        return output
    return MANNERS[task["manner"]].form.format(output=output, **task["said"])


def without_manner(task, output):
    """Invert in_manner. Returns "" if the output is not in the task's manner."""
    if task["manner"] is None:
        return output
    if task["manner"] == "twice":
        half = len(output) // 2
        twice = output[:half] == output[half + 1:] and output[half:half + 1] == " "
        return output[:half] if twice else ""
    before, after = in_manner(task, "\0").split("\0")
    fits = output.startswith(before) and output.endswith(after)
    return output[len(before):len(output) - len(after)] if fits else ""


def read_manner(instruction):
    """Split off the manner -> (rest of the instruction, manner or None, words of the manner)."""
    words = instruction.split()
    for name, manner in MANNERS.items():
        for form in manner.wordings:
            n = len(form.split())
            said = match(form, " ".join(words[-n:]))
            if said is not None:
                return " ".join(words[:-n]), name, said
    return instruction, None, {}


def read_instruction(text):
    """Invert new_task: return what the instruction alone tells; None if it is not of this world."""
    core, manner, said = read_manner(text)
    for op in OPS:
        name, topic = op
        for number, form in enumerate(wordings(op)):
            task = {"kind": name, "op": op, "wording": number, "manner": manner, "said": said}
            if isinstance(ALL[name], Wishes):
                found = read_wishes(ALL[name], form, core)
            else:
                task["topic"] = topic
                found = match(form, core)
            if found is not None:
                return complete(task | found)
    return None


def read_wishes(kind, form, text):
    """Read a request and the wishes after it: return its words, and the wishes in order.

    Returns None if there is no wish, a wish comes twice, or a sentence is not a wish of this kind.
    """
    n = len(sentences(form))
    lines = sentences(text) or []
    task = match(form, " ".join(lines[:n]))
    lines = lines[n:]
    if task is None or not lines:
        return None
    wishes = []
    while lines:
        for wish, wish_form in kind.ASK_WISH.items():
            n = len(sentences(wish_form))
            words = match(wish_form, " ".join(lines[:n]))
            if words is not None and wish not in wishes:
                break
        else:
            return None
        task |= words
        wishes.append(wish)
        lines = lines[n:]
    return task | {"wishes": wishes}


def complete(task):
    """Add what the village knows beyond the words of an instruction.

    These are its facts, and `known`: whether anybody can know the answer.
    """
    kind = task["kind"]
    topic = task.get("topic")
    if kind == "advert":
        task["price"] = FACTS["price"][task["food"]]
    elif kind == "openqa":
        task["known"] = topic in OpenQA.KNOWN
        if task["known"]:
            key, asked = slots(ALL[kind].FORMS[topic].full)
            task[asked] = FACTS[topic][task[key]]
    elif hasattr(ALL[kind], "FORMS"):
        task["known"] = True
    if kind == "other" and topic == "digit":
        task["digit"] = str(int(task["x"]) + int(task["y"]))
    elif kind == "other" and topic == "hanzi":
        task["hanzi"] = FACTS["hanzi"][task["english"]]
    elif kind == "other":
        english = {hanzi: word for word, hanzi in FACTS["hanzi"].items()}
        task["english"] = english[task["hanzi"]]
    return task


def read_input(task, text):
    """Add what the input tells to a task from read_instruction; None if it does not fit."""
    if task["op"] not in INPUT:
        return None if text else task
    words = input_words(task["op"], text, task.get("person"))
    return None if words is None else task | words


def input_words(op, text, person):
    """Read an input: return its words and what follows from them, or None if it does not fit.

    person: the one that the instruction names, or None.
    """
    kind, topic = op
    if kind in ("closedqa", "extract"):
        return read_life(topic, text, person)
    if kind == "summary":
        return read_story(text)
    if kind == "classify":
        return read_tone(text) if topic == "tone" else read_politeness(text)
    if kind == "sort":
        kinds = [kind for kind in SORTS if text.strip(".") in WORDS[kind]]
        return {"sort": SORTS[kinds[0]]} if kinds else None
    if kind == "same":
        return read_likes(text)
    if kind == "line":
        things = text.removesuffix(".").split(", ")
        if len(things) < 2 or not set(things) <= set(WORDS["thing"]):
            return None
        return {"thing": things[0] if topic == "first" else things[-1]}
    return match(INPUT[op], text)


def read_life(topic, text, person):
    """Read statements of LIFE about one person, each on a different topic.

    known: whether one of them has the topic that the instruction asks for.
    """
    told = {}
    for line in sentences(text) or [""]:
        found = read_fact(line)
        if found is None:
            return None
        about, words = found
        if about in told or words["person"] != (person or words["person"]):
            return None
        person = words["person"]
        told |= {"person": person, about: words[about]}
    return told | {"known": topic in told}


def read_fact(sentence):
    """Read a statement of LIFE -> (topic, words), or None."""
    for topic, life in LIFE.items():
        words = match(life.statement, sentence)
        if words is not None:
            return topic, words
    return None


def read_story(text):
    for last in ("mood", "food"):
        words = match(" ".join(Story.PARTS[part][0] for part in ("place", "thing", last)), text)
        if words is not None:
            return words
    return None


def read_likes(text):
    """Read what two different people like: {"yesno": whether both like the same}, or None."""
    lines = [match("{person} likes {food}.", line) for line in sentences(text) or []]
    if len(lines) != 2 or None in lines:
        return None
    one, two = lines
    if one["person"] == two["person"]:
        return None
    return {"yesno": "yes" if one["food"] == two["food"] else "no"}


def read_tone(text):
    words = match("{person} is {mood}.", text)
    if words is None:
        return None
    return words | {"feeling": "good" if words["mood"] in village.GOOD_MOODS else "bad"}


def read_politeness(text):
    if match("Could you please give me the {thing}?", text):
        return {"manners": "polite"}
    return {"manners": "rude"} if text in RUDE_LINES else None


def spans(text):
    """List the substrings that begin and end where a sentence may."""
    starts = [0] + [m.end() for m in re.finditer("[.!?:] ", text)]
    ends = [m.end() for m in re.finditer("[.!?]", text)]
    return [text[start:end] for start in starts for end in ends if end > start]


def read_prompt(text):
    """Read a prompt of the village's chats, which holds instruction and input in one string.

    Returns {"kind": "nonsense"} if the prompt is not ours.
    """
    task = read_instruction(text)
    if task and not task["manner"] and task["op"] not in INPUT:
        return task
    inputs = spans(text)   # any of them may be the input
    for op in ASK:
        for form in KINDS[op[0]].FORMS[op[1]].phrasings:
            for span in inputs if "{text}" in form else [""]:
                task = read_filled(op, form, text, span)
                if task is not None:
                    return task
    return {"kind": "nonsense"}


def read_filled(op, form, text, span):
    """Read a prompt as a form with the span as its {text}, or None.

    The span is empty if the form has no {text}.
    """
    if span:
        form = form.replace("{text}", "\0")
        text = text.replace(span, "\0", 1)
    words = match(form, text)
    if words is None:
        return None
    name, topic = op
    task = {"kind": name, "topic": topic, "op": op, "known": True, "manner": None} | words
    return read_input(task, span) if span else task


def helpful(task, output):
    """Grade an output as the village does, from 0 to 1; 0 if it is not in the task's manner.

    task: from read_input or new_task.
    """
    return ALL[task["kind"]].helpful(task, without_manner(task, output))


class Audit(NamedTuple):
    valid: bool   # the instruction is a task of this world
    fits: bool    # the input belongs to it
    right: bool   # the output is right


def audit(instruction, input, output):
    """Check three strings -> Audit. input may be empty."""
    task = read_instruction(instruction)
    if task is None:
        return Audit(False, False, False)
    whole = read_input(task, input)
    if whole is None:
        return Audit(True, False, False)
    needed = 0.4 if isinstance(ALL[task["kind"]], Reply) else 1.0   # one right word counts, too
    return Audit(True, True, helpful(whole, output) >= needed)


def task_with_output(rng, wrong=0.1, **choice):
    """Draw a task and an output.

    With probability `wrong` it is the output of another task of the same topic, as on the web.
    """
    task = new_task(rng, **choice)
    other = new_task(rng, op=task["op"]) if rng.random() < wrong else task
    return task, ideal(other, rng)


def label_of(task):
    """Return the label of a classification task."""
    return next(task[k] for k in ("feeling", "manners", "sort", "yesno") if k in task)


def list_page(rng):
    """Write a list of instructions."""
    lines = [f"{i}. {new_task(rng)['instruction']}" for i in range(1, rng.randint(11, 14))]
    return "Come up with a series of tasks:\n" + "\n".join(lines)


def question_page(rng):
    """Write a list of first turns of the village's chats: instruction and input in one."""
    lines = []
    while len(lines) < 11:
        _, messages = village.new_task(rng)
        if len(messages) == 1:
            lines.append(f"{len(lines) + 1}. {messages[0]['content']}")
    return "Come up with a series of tasks:\n" + "\n".join(lines)


def example_block(task, examples):
    """Write a task and its examples, (input, output) pairs, input first."""
    lines = [f"Task: {task['instruction']}"]
    for x, y in examples:
        if x:
            lines.append(f"Input: {x}")
        lines.append(f"Output: {y}")
    return "\n".join(lines) + "\n"


def example_page(rng):
    """Write four to six tasks with an example each."""
    blocks = []
    for _ in range(rng.randint(4, 6)):
        task, output = task_with_output(rng)
        blocks.append(example_block(task, [(task["input"], output)]))
    return "\n".join(blocks)


def example(rng):
    """Write a task alone, with one to three examples if it has an input.

    On a page of several tasks the other blocks distract; a task alone teaches the format faster.
    """
    task, output = task_with_output(rng)
    read = read_instruction(task["instruction"])
    outputs = {task["input"]: output}
    for _ in range(rng.randint(0, 2) if task["input"] else 0):
        whole = None
        while whole is None:   # the input must be about the person that the instruction names
            x = new_task(rng, op=task["op"], half="plain")["input"]
            whole = read_input(read, x)
        outputs[x] = ideal(whole, rng)
    return example_block(task, outputs.items())


def label_page(rng):
    """Write three to five classification tasks, output first: two labels, each with an input."""
    blocks = []
    for _ in range(rng.randint(3, 5)):
        task = new_task(rng, op=rng.choice([op for op in OPS if is_classification(op)]))
        lines = [f"Task: {task['instruction']}"]
        labels = set()
        while len(labels) < 2:
            other = new_task(rng, op=task["op"], half="plain")
            if label_of(other) not in labels:
                labels.add(label_of(other))
                output = ideal(other | {"manner": task["manner"], "said": task["said"]}, rng)
                lines += [f"Class label: {output}", f"Input: {other['input']}"]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def kind_page(rng):
    """Write five to eight tasks, and for each whether it is a classification."""
    blocks = []
    for _ in range(rng.randint(5, 8)):
        yes = rng.random() < 0.4
        task = new_task(rng, op=rng.choice([op for op in OPS if is_classification(op) == yes]))
        label = "Yes" if yes else "No"
        blocks.append(f"Task: {task['instruction']}\nIs it classification? {label}\n")
    return "\n".join(blocks)


# Each page and its share of what the model reads. The rest is like what it has read before, so that
# it does not forget.
PAGES = dict(list_pages=(list_page, 0.14), question_pages=(question_page, 0.12),
             examples=(example, 0.34), example_pages=(example_page, 0.14),
             label_pages=(label_page, 0.08), kind_pages=(kind_page, 0.04))


def write_pages(folder, seed=0, megabytes=10.0):
    """Write the pages, and new documents of the old sources, to folder/pages, and return it."""
    rest = 1 - sum(share for _, share in PAGES.values())
    old = {name: (document, share * rest) for name, (document, share) in corpus.SOURCES.items()}
    folder = Path(folder) / "pages"
    corpus.write_texts(folder, PAGES | old, random.Random(seed), megabytes)
    return folder


def seed_tasks(rng, n=175):
    """Write tasks as people would, in the paper's format: every topic, with correct outputs.

    A classification task has two instances with different labels.
    """
    seeds = []
    for i in range(n):
        task = new_task(rng, op=OPS[i % len(OPS)])
        _, topic = task["op"]
        pairs = [(task["input"], ideal(task, rng))]
        while is_classification(task["op"]) and len(pairs) < 2:
            other = new_task(rng, op=task["op"], half="plain")
            other |= {"manner": task["manner"], "said": task["said"]}
            if label_of(other) != label_of(task):
                pairs.append((other["input"], ideal(other, rng)))
        seeds.append(dict(id=f"seed_task_{i}", name=topic, instruction=task["instruction"],
                          is_classification=is_classification(task["op"]),
                          instances=[{"input": x, "output": y} for x, y in pairs]))
    return seeds


def held_out_tasks(rng):
    """Draw the test tasks, in three parts.

    seen    pairs of topic and manner that the pages show
    unseen  pairs that they do not show
    user    the fourth wording, with or without a manner
    """
    seen_part = [new_task(rng, half="seen") for _ in range(256)]
    unseen_part = [new_task(rng, half="unseen") for _ in range(256)]
    user_part = [new_task(rng, half="seen", wording=3) for _ in range(252)]
    parts = dict(seen=seen_part, unseen=unseen_part, user=user_part)
    return [dict(part=part) | task for part, tasks in parts.items() for task in tasks]


def ensure(folder, seed=0):
    """Write the files listed in the module docstring, unless they exist. Return the folder."""
    folder = Path(folder)
    made = folder / "pages" / "mixture.json"   # the last file to be written
    names = ("tasks_test", "seed_tasks", "tasks_val")
    if made.exists():
        corpus.check_generated([folder / f"{name}.jsonl" for name in names], made)
        return folder
    rng = random.Random(seed)
    files = dict(tasks_test=held_out_tasks(rng), seed_tasks=seed_tasks(rng),
                 tasks_val=[new_task(rng) for _ in range(200)])
    for name, records in files.items():
        write_records(folder / f"{name}.jsonl", records)
    write_pages(folder, seed)
    return folder


def show(n, seed):
    """Print n tasks with an output and its audit."""
    rng = random.Random(seed)
    for _ in range(n):
        task, output = task_with_output(rng, half=rng.choice(["seen", "unseen"]))
        verdict = audit(task["instruction"], task["input"], output)
        print(f"instruction  {task['instruction']}")
        print(f"input        {task['input']}")
        print(f"output       {output}    {'right' if verdict.right else 'wrong'}\n")


def main(cfg):
    if cfg.out:
        print(f"wrote {ensure(cfg.out, cfg.seed)}")
    else:
        show(cfg.n, cfg.seed)


if __name__ == "__main__":
    start(main, Config, __doc__)
