"""Write the village to files: pretraining documents, chats, and prompts.

No user is in two splits. The files have the formats that users bring; data/README.md shows two
records of each.

    python data/corpus.py                            write the data of seed 0 to out/data
    python data/corpus.py --out d1 --seed 1          other documents of the same world
"""
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.chats import as_messages
from data.formats import write_records
from data.records import read_records
from data.text import read_text, write_text
from data.village import (FACTS, IGNORANCE, KINDS, LIFE, SHARES, STRANGER, TEACHER, WORDS,
                          Brainstorm, OpenQA, demonstration, new_task, picker, slots)
from scaffold.cli import UserError, run_folder, start
from scaffold.run import older


@dataclass
class Config:
    out: str = "out/data"        # folder for the files
    seed: int = 0                # another seed gives other documents of the same world


USERS = 160
CAP = 200                               # prompts per user at most, as in InstructGPT's data

HEADS = dict(story="A story: {person} and a {animal}.", letter="A letter to {person}.",
             advert="An advert for {food}.")
LIST_HEADS = dict(animal="Animals", thing="Gifts", food="Foods", place="Places")
TALE = [                                # the first sentence; the others follow in any order
    "{person} was a {job} and had a {animal}.", "{person} lived near the {place}.",
    "The {animal} slept near the {place}.", "Everybody at the {place} knew the {animal}.",
    "{person} had a {colour} {thing}.", "The {animal} liked the {colour} {thing}.",
    "{person} and the {animal} shared some {food}.", "The {job} bought {food} at the {place}.",
    "The {animal} liked {food}.", "{person} was {mood} that day.", "The {animal} was {mood}.",
    "The {job} said: My {animal} is {mood}.", "{person} took the {thing} to the {place}.",
]


def plain_text(messages, *response):
    """Write a chat without roles, one turn a line, as a document of the pretraining text."""
    return "\n".join([*(m["content"] for m in messages), *response])


def book(rng):
    """A page of a book: its topic and wishes, then a story, letter or advert that honours them."""
    name = rng.choice(["story", "story", "letter", "advert"])
    kind = KINDS[name]
    task = kind.make(picker(rng), rng)
    lines = [HEADS[name]] + [kind.ASK_WISH[wish] for wish in task["wishes"]]
    return " ".join(lines).format(**task) + "\n" + kind.answer(task, rng, TEACHER)


def tale(rng):
    """A longer story that repeats the same few words, from which a model learns to look back."""
    words = {slot: rng.choice(options) for slot, options in WORDS.items()}
    return " ".join([TALE[0]] + rng.sample(TALE[1:], 7)).format(**words)


def wiki(rng):
    """Three facts of one topic, or three entries of a dictionary."""
    topic = rng.choice(list(FACTS))
    subjects = rng.sample(list(FACTS[topic]), 3)
    if topic == "hanzi":
        return "\n".join(f"{subject}: {FACTS[topic][subject]}." for subject in subjects)
    sentence = OpenQA.FORMS[topic].full
    subject_slot, fact_slot = slots(sentence)
    lines = []
    for subject in subjects:
        words = {subject_slot: subject, fact_slot: FACTS[topic][subject]}
        lines.append(sentence.format(**words))
    return "\n".join(lines)


def lists(rng):
    """Four words of one topic."""
    topic = rng.choice(list(Brainstorm.ASK))
    *others, last = rng.sample(WORDS[topic], 4)
    return f"{LIST_HEADS[topic]}: {', '.join(others)} and {last}."


def reading(rng):
    """A short passage and five questions about it, from which a model learns to look things up."""
    told = rng.sample(list(LIFE), 3)
    words = {slot: rng.choice(WORDS[slot]) for slot in ["person", *told]}
    lines = [" ".join(LIFE[topic].statement for topic in told).format(**words)]
    for topic in rng.sample(list(LIFE), 5):
        question, kind = LIFE[topic].question, KINDS["closedqa"]
        if rng.random() < 0.4:
            question, kind = f"Which {LIFE[topic].noun} is named here?", KINDS["extract"]
        _, full, short, _ = kind.FORMS[topic]
        response = rng.choice([full, short] if topic in told else IGNORANCE)
        lines += [question.format(**words), response.format(**words)]
    return "\n".join(lines)


def school(rng):
    """A page of a textbook: a short task with a correct response, which may be the short form."""
    use = rng.choice([use for use in SHARES if use not in ("generation", "brainstorm")])
    task, messages = new_task(rng, use=use)
    _, full, short, worth = KINDS[task["kind"]].FORMS[task["topic"]]
    if task["known"]:
        # A lazy rewriting, worth 0.2, only repeats the prompt.
        response = rng.choice([full, full, short if worth > 0.2 else full]).format(**task)
    else:
        response = rng.choice(IGNORANCE)
    return "Lesson.\n" + plain_text(messages, response)


def forum(rng):
    """A prompt and a stranger's response, more careless and ruder than the demonstrations."""
    task, messages = new_task(rng, use=rng.choice(list(SHARES)))
    return plain_text(messages, demonstration(task, rng, STRANGER))


# name -> (function that writes a document, share of the tokens drawn in pretraining), a small
# version of the mixture in LLaMA's table 1.
SOURCES = dict(tales=(tale, 0.05), books=(book, 0.22), school=(school, 0.35), wiki=(wiki, 0.05),
               lists=(lists, 0.03), reading=(reading, 0.15), forum=(forum, 0.15))
SIZES = dict(sft_train=6000, sft_val=300, rank_train=3000, rank_val=300, prompts_train=8000,
             prompts_val=256, prompts_test=512, prompts_unanswerable=256, prompts_rephrased=256,
             prompts_answerable=256)


def write_texts(folder, sources, rng, megabytes):
    """Write one file per source, with <|end|> between its documents, and mixture.json.

    sources: {name: (function that writes a document, share)}, as in SOURCES.
    """
    for name, (document, share) in sources.items():
        size = 0
        documents = []
        while size < share * megabytes * 1e6:
            documents.append(document(rng))
            size += len(documents[-1].encode()) + 2
        write_text(folder / f"{name}.txt", "\n<|end|>\n".join(documents) + "\n")
    mixture = {name: share for name, (_, share) in sources.items()}
    write_text(folder / "mixture.json", json.dumps(mixture))


def user_picker(favourites, rng):
    """Return pick(slot): one of the user's favourites in 70% of the draws, else any word."""
    def pick(slot):
        return rng.choice(favourites[slot] if rng.random() < 0.7 else WORDS[slot])
    return pick


def make_prompt(name, pick, rng):
    """Make a prompt of a file -> (task, messages).

    What users ask has InstructGPT's shares of use cases. Those who write or rank responses are
    given every use case equally often, or there would be too few examples of the rare ones.
    """
    stage, split = name.split("_")
    if split not in ("answerable", "unanswerable"):
        use = None if stage == "prompts" else rng.choice(list(SHARES))
        return new_task(rng, pick, use, phrasing=3 if split == "rephrased" else None)
    while True:
        use = rng.choice(["open_qa", "closed_qa", "chat", "extract"])
        task, messages = new_task(rng, pick, use)
        if task["known"] == (split == "answerable"):
            return task, messages


def make_chat(task, messages, pick, rng):
    """Add a demonstration, then further turns with probability 0.25 each.

    Return (task of the last turn, messages).
    """
    messages = messages + [{"role": "assistant", "content": demonstration(task, rng)}]
    while rng.random() < 0.25:
        task, turn = new_task(rng, pick)
        messages += turn + [{"role": "assistant", "content": demonstration(task, rng)}]
    return task, messages


def write(folder, seed=0, megabytes=12.0):
    """Write all files of one seed. Return the folder.

    Splits share no user: a user asks similar things, so a random split would leak.
    """
    folder = Path(folder)
    rng = random.Random(seed)
    write_texts(folder / "pretrain", SOURCES, rng, megabytes)
    users = [f"user{i:03d}" for i in range(USERS)]
    test_users = users[140:]            # the last four splits share them
    split_users = dict(train=users[:120], val=users[120:140], test=test_users,
                       unanswerable=test_users, rephrased=test_users, answerable=test_users)
    favourites = {}                     # user -> slot -> half of its words
    for user in users:
        favourites[user] = {slot: rng.sample(options, max(2, len(options) // 2))
                            for slot, options in WORDS.items()}
    asked = dict.fromkeys(users, 0)
    for name, n in SIZES.items():
        split = name.split("_")[1]
        records = []
        for _ in range(n):
            user = rng.choice([u for u in split_users[split] if asked[u] < CAP])
            asked[user] += 1
            pick = user_picker(favourites[user], rng)
            task, messages = make_prompt(name, pick, rng)
            if name.startswith("sft"):
                task, messages = make_chat(task, messages, pick, rng)
                records.append({"messages": messages, "user": user, "task": task})
            else:
                records.append({"prompt": messages, "user": user, "task": task})
        write_records(folder / f"{name}.jsonl", records)
    # Written last, because ensure() takes this file as the sign of a complete folder.
    write_text(folder / "village.json", json.dumps({"seed": seed}))
    return folder


def check_generated(paths, sign):
    """Raise UserError if a generated file is damaged; without the file `sign` it is made again."""
    for path in paths:
        try:
            if path.exists():
                read_records(path)
        except UserError as e:
            raise UserError(f"{e}; this file is generated: delete {sign}, and the next run makes "
                            f"it again") from None


def ensure(folder, seed=0):
    """Return the folder; write the village there first if it is not complete.

    Data of another seed is kept, with a notice: checkpoints may depend on it. Raises UserError if a
    file is damaged.
    """
    made = Path(folder) / "village.json"
    if not made.exists():
        print(f"no data in {folder}: writing the village there (seed {seed})")
        for path in sorted(Path(folder).glob("*.jsonl")):   # a user's, or of a writing that stopped
            if path.stem in SIZES:
                os.replace(path, older(path))
                print(f"{path} is kept as {older(path).name}")
        write(folder, seed)
        return Path(folder)
    folder = Path(folder)
    check_generated([made, *(folder / f"{name}.jsonl" for name in SIZES)], made)
    old_seed = read_records(made)[0][1].get("seed")
    if old_seed != seed:
        print(f"{folder} has the village of seed {old_seed}, not {seed}, and is used as it is; "
              f"name a new --out to make new data")
    return folder


def training_text(folder):
    """Return all that training reads in a folder as one string: documents, chats and prompts."""
    texts = [read_text(path) for path in sorted((folder / "pretrain").glob("*.txt"))]
    for name in ("sft_train", "rank_train", "prompts_train"):
        path = folder / f"{name}.jsonl"
        if path.exists():
            for where, r in read_records(path):
                texts.append(plain_text(as_messages(r.get("messages") or r["prompt"], where)))
    return "\n".join(texts)


def main(cfg):
    folder = write(run_folder(cfg.out), cfg.seed)
    print(f"wrote {folder}: pretrain/*.txt and {', '.join(SIZES)}")


if __name__ == "__main__":
    start(main, Config, __doc__)
