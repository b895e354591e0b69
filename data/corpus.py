"""The village's files: pretraining documents of several sources, chats, prompts; every split by user.

    python data/corpus.py                            write the data of seed 0 to out/data
    python data/corpus.py --out d1 --seed 1          other texts of the same world

The formats are the ones that users bring; data/README.md shows two records of each.
"""
import argparse, json, random, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.village import (FACTS, IGNORANCE, KINDS, LIFE, SHARES, WORDS, Brainstorm, OpenQA, demonstration, new_task, slots)

USERS, CAP = 160, 200                   # prompts come from users; at most 200 each, as InstructGPT had it


def book(rng):
    """A page of a book: what it is about, and a text that keeps to it."""
    kind = rng.choice(["story", "story", "letter", "advert"])
    task = KINDS[kind].make(lambda slot: rng.choice(WORDS[slot]), rng)
    head = dict(story="{person} and a {animal}.", letter="To {person}.", advert="For buyers of {food}.")[kind].format(**task)
    wishes = " ".join(KINDS[kind].ASK_WISH[w] for w in task["wishes"]).format(**task)
    return f"{head} {wishes}\n{KINDS[kind].answer(task, rng, care=1.0)}"


TALE = ["{person} had a {animal}.", "The {animal} of {person} lived near the {place}.", "At the {place} there was a {colour} {thing}.",
        "The {animal} wanted the {colour} {thing}.", "{person} gave the {thing} to the {animal}.", "{person} and the {animal} had {food}.",
        "The {food} was good, said the {animal}.", "{person} took the {food} and left the {place}.", "The {thing} was {colour}.",
        "{person} was {mood}.", "The {animal} was {mood}.", "{person} was a {job}.", "The {job} said: My {thing} is at the {place}."]


def tale(rng):
    """A longer story that names the same few things again and again: here a model learns to look back."""
    words = {slot: rng.choice(options) for slot, options in WORDS.items()}
    return " ".join([TALE[0]] + rng.sample(TALE[1:], 7)).format(**words)


def wiki(rng):
    """A page about one thing that everybody knows."""
    topic = rng.choice(list(FACTS))
    form, lines = OpenQA.FORMS.get(topic), []
    for key in rng.sample(list(FACTS[topic]), 3):
        slot = "english" if topic == "hanzi" else slots(form[1])[0]
        words = {slot: key, "place" if topic == "work" else topic: FACTS[topic][key]}
        lines.append(f"{key}: {FACTS[topic][key]}." if topic == "hanzi" else form[1].format(**words))
    return "\n".join(lines)


def lists(rng):
    topic = rng.choice(list(Brainstorm.ASK))
    return f"{topic}: " + ", ".join(rng.sample(WORDS[topic], 4)) + "."


def reading(rng):
    """A text with questions, all answered as the text has it: here a model learns to look things up."""
    told = rng.sample(list(LIFE), 3)
    words = {slot: rng.choice(WORDS[slot]) for slot in ["person", *told]}
    lines = [" ".join(LIFE[t][0].format(**words) for t in told)]
    for topic in rng.sample(list(LIFE), 3):
        known = topic in told
        form = rng.choice([LIFE[topic][0], "{%s}." % topic])
        lines.append((LIFE[topic][1] + "\n").format(**words) + (form.format(**words) if known else rng.choice(IGNORANCE)))
    return "\n".join(lines)


def school(rng):
    """A page of a school book: one task of any kind but the long ones, done as it should be."""
    task, messages = new_task(rng, use=rng.choice([u for u in SHARES if u not in ("generation", "brainstorm")]))
    form = KINDS[task["kind"]].FORMS[task["topic"]]
    answer = rng.choice([form[1], form[1], form[2]]).format(**task) if task["known"] else rng.choice(IGNORANCE)
    return "\n".join([m["content"] for m in messages] + [answer])


def forum(rng, pick=None):
    """Questions and answers of strangers: careless, invented and rude as often as the demonstrations are."""
    task, messages = new_task(rng, pick, use=rng.choice([None, *SHARES]) if rng.random() < 0.6 else None)
    return "\n".join([m["content"] for m in messages] + [demonstration(task, rng)])


# Each source, and its share of the tokens drawn in pretraining (the mixture of LLaMA's table 1, in small).
SOURCES = dict(tales=(tale, 0.1), books=(book, 0.25), school=(school, 0.3), wiki=(wiki, 0.05), lists=(lists, 0.03),
               reading=(reading, 0.1), forum=(forum, 0.17))
SIZES = dict(sft_train=6000, sft_val=300, rank_train=3000, rank_val=300, prompts_train=8000, prompts_val=256,
             prompts_test=512, prompts_unanswerable=256, prompts_rephrased=256)


def write_texts(folder, sources, rng, megabytes):
    """A file per source, its documents parted by <|end|>, and mixture.json. sources: name -> (function that writes a document, share)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (document, share) in sources.items():
        size, texts = 0, []
        while size < share * megabytes * 1e6:
            texts.append(document(rng))
            size += len(texts[-1].encode()) + 2
        (folder / f"{name}.txt").write_text("\n<|end|>\n".join(texts) + "\n", encoding="utf-8", newline="\n")
    (folder / "mixture.json").write_text(json.dumps({k: v[1] for k, v in sources.items()}))


def write(folder, seed=0, megabytes=12.0):
    """All files of one seed. Every split has users of its own: one user asks similar things, so a random split would leak."""
    folder, rng = Path(folder), random.Random(seed)
    write_texts(folder / "pretrain", SOURCES, rng, megabytes)
    users = [f"user{i:03d}" for i in range(USERS)]
    of_split = dict(train=users[:120], val=users[120:140], test=users[140:])
    taste = {u: {slot: rng.sample(options, max(2, len(options) // 2)) for slot, options in WORDS.items() if len(options) > 1} for u in users}
    asked = dict.fromkeys(users, 0)
    for name, n in SIZES.items():
        split, lines = name.split("_")[1], []
        for _ in range(n):
            user = rng.choice([u for u in of_split.get(split, of_split["test"]) if asked[u] < CAP])
            asked[user] += 1

            def pick(slot):
                return rng.choice(taste[user][slot] if rng.random() < 0.7 else WORDS[slot])
            task, messages = new_task(rng, pick, phrasing=3 if split == "rephrased" else None)
            while split == "unanswerable" and task.get("known", True):
                task, messages = new_task(rng, pick, rng.choice(["open_qa", "closed_qa", "chat", "extract"]))
            if name.startswith("sft"):
                messages = messages + [{"role": "assistant", "content": demonstration(task, rng)}]
                while rng.random() < 0.25:
                    task, more = new_task(rng, pick)
                    messages += more + [{"role": "assistant", "content": demonstration(task, rng)}]
                lines.append({"messages": messages, "user": user, "task": task})
            else:
                lines.append({"prompt": messages, "user": user, "task": task})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines),
                                               encoding="utf-8", newline="\n")
    (folder / "village.json").write_text(json.dumps({"seed": seed}))   # written last: its presence says all is there
    return folder


def ensure(folder, seed=0):
    """The folder, written first if it is not there whole. Data of another seed stay, aloud: checkpoints may rest on them."""
    made = Path(folder) / "village.json"
    if not made.exists():
        print(f"no data in {folder}: writing the village there (seed {seed})")
        write(folder, seed)
    elif json.loads(made.read_text())["seed"] != seed:
        print(f"{folder} holds the village of another seed than {seed}, and is used as it is; a new --out makes new data")
    return Path(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/data", help="folder for the files [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="other seed, other texts of the same world [%(default)s]")
    args = parser.parse_args()
    try:
        print(f"wrote {write(args.out, args.seed)}: pretrain/*.txt and {', '.join(SIZES)}")
    except OSError as e:
        sys.exit(print(f"corpus.py: --out {args.out}: {e.strerror}; name a folder", file=sys.stderr) or 2)
