"""The village's tasks as Self-Instruct sees them: an instruction, an input that may be empty, an output; and a reader that grades any of them.

    instruction   Which colour is named in the text? Say it twice.        the last sentence is a manner: how to say it
    input         Ann found a red ball at the mill.
    output        The colour is red. The colour is red.

    python data/tasks.py                             print ten tasks
    python data/tasks.py --out out/data              write seed_tasks.jsonl, tasks_test.jsonl and pages/, the texts that make a model promptable

Whoever has never seen a numbered list cannot be asked to go on with one. So a model that is to write tasks reads pages first: lists
of tasks, worked examples, labels with inputs, and which task is a classification. They show one half of the world: a pair of a
topic and a manner whose hash is odd is on no page and in no seed task, nor is the fourth wording of an instruction.
"""
import argparse, json, random, re, sys, zlib
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import corpus, village
from data.village import FACTS, IGNORANCE, KINDS, LIFE, RUDE_LINES, WORDS, Reply, Story, Wishes, sentences, slots


class Sort(Reply):
    """A word and its kind: a task with a few labels."""
    FORMS = dict(sort=(["Is it an animal, a food, a place or a colour?", "Tell me the kind of this: animal, food, place or colour.",
                        "Put the word where it belongs: animal, food, place or colour.", "Animal, food, place or colour, which is it?"],
                       "It is of the kind {sort}.", "{sort}.", 0.5))

    def make(self, pick, rng):
        kind = rng.choice(MORE_WORDS["sort"])
        return dict(topic="sort", known=True, sort=kind, word=pick(kind))


class Same(Reply):
    """Two people and what they like: yes or no."""
    FORMS = dict(same=(["Do the two like the same food, yes or no?", "Say yes if both like the same food, else say no.",
                        "Tell me yes or no: is it the same food for both?", "The same food for the two of them, yes or no?"],
                       "The answer is {yesno}.", "{yesno}.", 0.5))

    def make(self, pick, rng):
        (one, two), food = rng.sample(WORDS["person"], 2), pick("food")
        other = food if rng.random() < 0.5 else rng.choice([f for f in WORDS["food"] if f != food])
        return dict(topic="same", known=True, text=f"{one} likes {food}. {two} likes {other}.", yesno="yes" if food == other else "no")


class Line(Reply):
    """Three things in a row: which is first, and which is last?"""
    FORMS = dict(first=(["Which thing comes first in the line?", "Name the first thing of the line.", "Tell me what stands first.",
                         "The line starts with what?"], "The first is the {thing}.", "{thing}.", 0.5),
                 last=(["Which thing comes last in the line?", "Name the last thing of the line.", "Tell me what stands last.",
                        "The line ends with what?"], "The last is the {thing}.", "{thing}.", 0.5))

    def make(self, pick, rng):
        topic, line = rng.choice(list(self.FORMS)), rng.sample(WORDS["thing"], 3)
        return dict(topic=topic, known=True, text=", ".join(line) + ".", thing=line[0 if topic == "first" else 2])


MORE_WORDS = dict(sort=["animal", "food", "place", "colour"], yesno=["yes", "no"], x=list("1234"), y=list("12345"))
ALL = {k: v for k, v in KINDS.items() if k != "chat"} | dict(sort=Sort(), same=Same(), line=Line())
CLASSIFICATION = ("tone", "manners", "sort", "same")

# How each topic that has an input is asked when the input stands apart, and the input itself.
ASK = {("closedqa", t): ["Read the text. " + q, "Answer from the text: " + q, "Look it up in the text: " + q, "The text will tell: " + q]
       for t, (_, q) in LIFE.items()}
ASK |= {("extract", k): [f"Which {k} is named in the text?", f"Find the {k} in the text.", f"Pick the {k} out of the text.",
                         f"The text names which {k}?"] for k in LIFE}
ASK |= {("summary", "story"): ["Sum up the story in one sentence.", "Say in one sentence what happens.", "Make the story short, please.",
                               "Tell the story in short."],
        ("rewrite", "polite"): ["Say it in a polite way.", "Make the line more polite, please.", "How do I ask for this nicely?", "Turn it into a polite line."],
        ("rewrite", "past"): ["Put the line in the past.", "Tell it as a thing of the past.", "Say it in the past tense.", "It was yesterday, so say it anew."],
        ("rewrite", "plural"): ["Make it two of them.", "Say it with two, not one.", "Not one but two: say it anew.", "There are two now, so say it anew."],
        ("classify", "tone"): ["Is the line happy or sad?", "Which mood is it, happy or sad?", "Tell me if this is happy or sad.", "Happy or sad, what is it?"],
        ("classify", "manners"): ["Is the line polite or rude?", "How does it sound, polite or rude?", "Tell me if this is polite or rude.", "Polite or rude, what is it?"]}
INPUT = {("rewrite", "polite"): "Give me the {thing}!", ("rewrite", "past"): "{person} walks to the {place}.",
         ("rewrite", "plural"): "{person} has a {thing}.", ("sort", "sort"): "{word}"}
INPUT |= {op: "{text}" for op in [*ASK, ("same", "same"), ("line", "first"), ("line", "last")] if op not in INPUT}

# Manners can be asked of any task: three wordings, and what becomes of the answer.
MANNERS = dict(
    well=(["Start with: Well.", "Begin your answer with: Well.", "Say well before it."], "Well. {answer}"),
    thanks=(["End with: Thank you.", "Do not forget to say thank you.", "Say thank you after it."], "{answer} Thank you."),
    twice=(["Say it twice.", "Say it two times.", "Give the answer twice."], "{answer} {answer}"),
    listen=(["Say it to {person}.", "Tell it to {person}.", "It is {person} who wants to know."], "Listen, {person}. {answer}"),
    here=(["You are at the {place}.", "Say that you are at the {place}.", "Speak from the {place}."], "Here at the {place}: {answer}"),
    sure=(["Say that you are sure.", "Be sure of it and say so.", "I want you to be sure."], "{answer} I am sure."))


@lru_cache(maxsize=None)
def pattern(template):
    return village.pattern(template, WORDS | MORE_WORDS)


def match(template, text):
    found = pattern(template).fullmatch(text)
    return found and found.groupdict()


def wordings(op):
    """The four ways in which a topic is asked; the last is held out."""
    kind = ALL[op[0]]
    return ASK.get(op) or (kind.ASK if isinstance(kind, Wishes) else kind.ASK[op[1]] if hasattr(kind, "ASK") else kind.FORMS[op[1]][0])


OPS = [(k, t) for k, v in ALL.items() for t in getattr(v, "FORMS", v.ASK if k == "brainstorm" else [k])]


def seen(op, manner):
    """Is this pair in the half of the world that pages and seed tasks show?"""
    return manner is None or zlib.crc32(f"{op[1]} {manner}".encode()) % 2 == 0


def new_task(rng, op=None, half="seen", wording=None):
    """-> a task: village's fields, and op, instruction, input, manner and its words. half: seen, unseen (both mean a manner's pair) or plain."""
    pick = lambda slot: rng.choice(WORDS[slot])
    op = op or rng.choice(OPS + [o for o in OPS if isinstance(ALL[o[0]], Wishes)] * 2)   # long texts have more to vary
    task = {}
    while task.get("topic", op[1]) != op[1] or not task:
        task = {"kind": op[0]} | ALL[op[0]].make(pick, rng)
    manner = None
    if half == "unseen" or half == "seen" and rng.random() < 0.5:
        manner = rng.choice([m for m in MANNERS if seen(op, m) == (half == "seen")] or [None])
    said = {"person": pick("person"), "place": pick("place")}
    number = rng.randrange(3) if wording is None else wording
    kind = ALL[op[0]]
    parts = [wordings(op)[number]] + [kind.ASK_WISH[w] for w in task.get("wishes", ())]
    instruction = " ".join(parts).format(**task) + (" " + rng.choice(MANNERS[manner][0]).format(**said) if manner else "")
    return task | dict(op=op, instruction=instruction, input=INPUT.get(op, "").format(**task), manner=manner, said=said)


def ideal(task, rng, whole=0.7):
    """A right answer, in the manner asked for; now and then a short one."""
    kind = ALL[task["kind"]]
    if isinstance(kind, Wishes):
        answer = kind.answer(task, rng, care=1.0)
    elif task["kind"] == "brainstorm":
        words = rng.sample(WORDS[task["topic"]], 2 + WORDS["number"].index(task["number"]))
        answer = ", ".join(words[:-1]) + " and " + words[-1] + "."
    elif not task["known"]:
        answer = rng.choice(IGNORANCE)
    else:
        _, long, short, worth = kind.FORMS[task["topic"]]
        answer = (long if rng.random() < whole or worth < 0.4 else short).format(**task)
    return MANNERS[task["manner"]][1].format(answer=answer, **task["said"]) if task["manner"] else answer


def read_instruction(text):
    """The inverse of new_task, without the input: a task with what the instruction alone tells, or None if it is not one of ours."""
    manner, said, core = None, {}, text
    for name, (forms, _) in MANNERS.items():
        for form in forms:
            n = len(form.split())
            head, tail = " ".join(text.split()[:-n]), " ".join(text.split()[-n:])
            if (found := match(form, tail)) is not None:
                manner, said, core = name, found, head
    for op in OPS:
        kind = ALL[op[0]]
        for number, form in enumerate(wordings(op)):
            if isinstance(kind, Wishes):
                task = read_wishes(kind, form, core)
            else:
                task = match(form, core)
            if task is not None:
                topic = {} if isinstance(kind, Wishes) else {"topic": op[1]}
                return complete({"kind": op[0], "op": op, "wording": number, "manner": manner, "said": said} | topic | task)
    return None


def read_wishes(kind, form, text):
    """A request of several sentences -> its words and wishes, or None where one is said twice or is not among the wishes."""
    n = len(sentences(form) or [])
    lines = sentences(text) or []
    task = match(form, " ".join(lines[:n])) if len(lines) > n else None
    wishes = []
    i = n
    while task is not None and i < len(lines):
        for name, wish in kind.ASK_WISH.items():
            k = len(sentences(wish))
            found = match(wish, " ".join(lines[i:i + k]))
            if found is not None and name not in wishes:
                task, wishes, i = task | found, wishes + [name], i + k
                break
        else:
            return None
    return task and task | {"wishes": wishes}


def complete(task):
    """What the village knows beyond the words of an instruction: facts, and what nobody can know."""
    kind, topic = task["kind"], task.get("topic")
    if kind == "advert":
        task["price"] = FACTS["price"][task["food"]]
    if kind == "openqa":
        key, asked = slots(ALL[kind].FORMS[topic][1])
        task["known"] = topic in list(FACTS)[:5]
        task |= {asked: FACTS[topic][task[key]]} if task["known"] else {}
    elif kind == "other":
        task["known"] = True
        if topic == "digit":
            return task | {"digit": str(int(task["x"]) + int(task["y"]))}
        back = {v: k for k, v in FACTS["hanzi"].items()}
        task |= {"hanzi": FACTS["hanzi"][task["english"]]} if topic == "hanzi" else {"english": back[task["hanzi"]]}
    elif hasattr(ALL[kind], "FORMS"):
        task["known"] = True
    return task


def read_input(task, text):
    """Add what the input tells to a task that was read from its instruction; None if the input does not fit it."""
    op = task["op"]
    if op not in INPUT:
        return task if not text else None
    kind, topic = op
    if kind in ("closedqa", "extract"):
        told = {}
        for line in sentences(text) or [""]:
            found = next((((t, w)) for t, (s, _) in LIFE.items() if (w := match(s, line)) is not None), None)
            if found is None or found[0] in told or found[1]["person"] != told.get("person", task.get("person", found[1]["person"])):
                return None
            told |= {"person": found[1]["person"], found[0]: found[1][found[0]]}
        return task | told | {"known": topic in told}
    if kind == "summary":
        for last in ("mood", "food"):
            if (found := match(" ".join(Story.PARTS[p][0] for p in ("place", "thing", last)), text)) is not None:
                return task | found
        return None
    if kind == "classify" and topic == "tone":
        found = match("{person} is {mood}.", text)
        return found and task | found | {"label": "happy" if found["mood"] in village.GOOD_MOODS else "sad"}
    if kind == "classify":
        polite = match("Could you please give me the {thing}?", text)
        return task | {"label": "polite" if polite else "rude"} if polite or text in RUDE_LINES else None
    if kind == "sort":
        found = [k for k in MORE_WORDS["sort"] if text.strip(".") in WORDS[k]]
        return task | {"sort": found[0]} if found else None
    if kind == "same":
        lines = [match("{person} likes {food}.", line) for line in sentences(text) or []]
        if len(lines) != 2 or None in lines or lines[0]["person"] == lines[1]["person"]:
            return None
        return task | {"yesno": "yes" if lines[0]["food"] == lines[1]["food"] else "no"}
    if kind == "line":
        things = text.removesuffix(".").split(", ")
        return task | {"thing": things[0 if topic == "first" else -1]} if len(things) > 1 and set(things) <= set(WORDS["thing"]) else None
    found = match(INPUT[op], text)
    return found and task | found


def read_prompt(text):
    """A prompt as the village's chats have it, instruction and input in one -> its task; {"kind": "nonsense"} if it is none of ours."""
    task = read_instruction(text)
    if task and not task["manner"] and task["op"] not in INPUT:
        return task
    starts = [0] + [m.end() for m in re.finditer("[.!?:] ", text)]
    spans = [text[i:m.end()] for i in starts for m in re.finditer("[.!?]", text) if m.end() > i]   # any of them may be the text asked about
    for op in ASK:
        for form in KINDS[op[0]].FORMS[op[1]][0]:
            for span in spans if "{text}" in form else ("",):
                found = match(form.replace("{text}", "\0"), text.replace(span, "\0", 1) if span else text)
                start = {"kind": op[0], "topic": op[1], "op": op, "known": True, "manner": None}
                whole = found is not None and (read_input(start | found, span) if span else start | found)
                if whole:
                    return whole
    return {"kind": "nonsense"}


def helpful(task, output):
    """0 to 1, as the village grades it; 0 where the manner is not kept. task: from read_input, or from new_task."""
    if task["manner"] == "twice":
        half = len(output) // 2
        output = output[:half] if output[:half] == output[half + 1:] and output[half:half + 1] == " " else ""
    elif task["manner"]:
        before, after = MANNERS[task["manner"]][1].format(answer="\0", **task["said"]).split("\0")
        output = output[len(before):len(output) - len(after)] if output.startswith(before) and output.endswith(after) else ""
    return ALL[task["kind"]].helpful(task, output)


def audit(instruction, input, output):
    """-> (valid, fits, right): is it a task of this world, does the input belong to it, is the output right?"""
    task = read_instruction(instruction)
    whole = task and read_input(task, input)
    needed = 0.4 if task and isinstance(ALL[task["kind"]], Reply) else 1.0
    return task is not None, whole is not None, whole is not None and helpful(whole, output) >= needed


def answered(rng, wrong=0.1, **choice):
    """A task with an output; some outputs are those of another task of the same topic, as on the web."""
    task = new_task(rng, **choice)
    other = new_task(rng, op=task["op"]) if rng.random() < wrong else task
    return task, ideal(other, rng)


def label_of(task):
    return next(task[k] for k in ("label", "sort", "yesno") if k in task)


def list_page(rng):
    return "Come up with a series of tasks:\n" + "\n".join(f"{i}. {new_task(rng)['instruction']}" for i in range(1, rng.randint(11, 14)))


def question_page(rng):
    """A list of what people ask a chat: instruction and input in one, as in the village's prompts."""
    lines = []
    while len(lines) < 11:
        task, messages = village.new_task(rng)
        lines += [f"{len(lines) + 1}. {messages[0]['content']}"] if len(messages) == 1 else []
    return "Come up with a series of tasks:\n" + "\n".join(lines)


def example_block(task, examples):
    """A task with its examples, input first: 'Task: I', then 'Input: X' and 'Output: Y' of each."""
    return f"Task: {task['instruction']}\n" + "".join((f"Input: {x}\n" if x else "") + f"Output: {y}\n" for x, y in examples)


def example_page(rng):
    blocks = []
    for _ in range(rng.randint(4, 6)):
        task, output = answered(rng)
        blocks.append(example_block(task, [(task["input"], output)]))
    return "\n".join(blocks)


def example(rng):
    """A task alone, with one to three examples where it has an input: what a page of tasks teaches slowly, because the other
    blocks distract, this teaches fast."""
    task, output = answered(rng)
    found, asked = {task["input"]: output}, read_instruction(task["instruction"])
    for _ in range(rng.randint(0, 2) if task["input"] else 0):
        whole = None
        while whole is None:   # until the input fits: the person that an instruction names must be in it
            text = new_task(rng, op=task["op"], half="plain")["input"]
            whole = read_input(asked, text)
        found[text] = ideal(whole, rng)
    return example_block(task, found.items())


def label_page(rng):
    """Output first: each label, and an input that gets it."""
    blocks = []
    for _ in range(rng.randint(3, 5)):
        task = new_task(rng, op=rng.choice([o for o in OPS if o[1] in CLASSIFICATION]))
        block, labels = f"Task: {task['instruction']}\n", set()
        while len(labels) < 2:
            other = new_task(rng, op=task["op"], half="plain")
            if label_of(other) in labels:
                continue
            labels.add(label_of(other))
            block += f"Class label: {ideal(other | {'manner': task['manner'], 'said': task['said']}, rng)}\nInput: {other['input']}\n"
        blocks.append(block)
    return "\n".join(blocks)


def kind_page(rng):
    """Which task is a classification?"""
    lines = []
    for _ in range(rng.randint(5, 8)):
        yes = rng.random() < 0.4
        task = new_task(rng, op=rng.choice([o for o in OPS if (o[1] in CLASSIFICATION) == yes]))
        lines.append(f"Task: {task['instruction']}\nIs it classification? {'Yes' if task['op'][1] in CLASSIFICATION else 'No'}\n")
    return "\n".join(lines)


# Each page, and its share of what is read; the rest is what the model has read before.
PAGES = dict(list_pages=(list_page, 0.14), question_pages=(question_page, 0.12), examples=(example, 0.34), example_pages=(example_page, 0.14),
             label_pages=(label_page, 0.08), kind_pages=(kind_page, 0.04))


def write_pages(folder, seed=0, megabytes=10.0):
    """pages/: the pages, and the old sources anew so that nothing is forgotten."""
    folder, rng = Path(folder) / "pages", random.Random(seed)
    sources = PAGES | {k: (f, share * (1 - sum(v[1] for v in PAGES.values()))) for k, (f, share) in corpus.SOURCES.items()}
    corpus.write_texts(folder, sources, rng, megabytes)
    return folder


def seed_tasks(rng, n=175):
    """People's tasks: right, of every topic, in the paper's format; a classification shows two inputs of different labels."""
    found = []
    for i in range(n):
        task = new_task(rng, op=OPS[i % len(OPS)])
        given = [(task["input"], ideal(task, rng))]
        while task["op"][1] in CLASSIFICATION and len(given) < 2:
            other = new_task(rng, op=task["op"], half="plain") | {k: task[k] for k in ("manner", "said")}
            if label_of(other) != label_of(task):
                given.append((other["input"], ideal(other, rng)))
        found.append(dict(id=f"seed_task_{i}", name=task["op"][1], instruction=task["instruction"], is_classification=task["op"][1] in CLASSIFICATION,
                          instances=[{"input": x, "output": y} for x, y in given]))
    return found


def ensure(folder, seed=0):
    """Write seed tasks, validation and test tasks and pages/ into the folder unless they are there. -> the folder.

    Parts of the test: seen (pairs of topic and manner that the pages show), unseen (pairs that they do not), and user: the fourth
    wording, with or without a manner, which no page and no seed has.
    """
    folder, rng = Path(folder), random.Random(seed)
    if (folder / "pages" / "mixture.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tests = [dict(part=part) | new_task(rng, half=half, wording=wording)
             for part, n, half, wording in (("seen", 256, "seen", None), ("unseen", 256, "unseen", None), ("user", 252, "seen", 3)) for _ in range(n)]
    for name, records in (("seed_tasks", seed_tasks(rng)), ("tasks_val", [new_task(rng) for _ in range(200)]), ("tasks_test", tests)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8", newline="\n")
    write_pages(folder, seed)
    return folder


def show(n, seed):
    rng = random.Random(seed)
    for _ in range(n):
        task, output = answered(rng, half=rng.choice(["seen", "unseen"]))
        print(f"instruction  {task['instruction']}\ninput        {task['input']}\noutput       {output}    {audit(task['instruction'], task['input'], output)}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10, help="how many tasks to print [%(default)s]")
    parser.add_argument("--out", default="", help="write the files to this folder instead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"wrote {ensure(args.out, args.seed)}") if args.out else show(args.n, args.seed)
