"""Measure what Self-Instruct made: is it new, is it right, and what is it worth as training data?

self_instruct.py calls report and report_worth at the end of a run. They write these rows to
OUT/self_instruct.jsonl:

    diversity   how much is new, and how similar is the nearest seed task
    audit       are instruction, input and output right? (the paper's table 2, by program)
    one label   why labels come before inputs: the share of the commonest label in either order
    worth       gold of the base model fine-tuned on seven mixtures, on held-out tasks

All but `diversity` need a module that grades: self_instruct.py --gold, by default data/tasks.py.
Sources: Self-Instruct, arXiv:2212.10560. Read self_instruct.py first.
"""
import random
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
import self_instruct
from data.exam import mean_and_ci
from data.records import read_records
from data.text import read_text
from data.words import count_words, words

SMALL_WORDS = "a an the me my it i is of to with for in from".split()
PARTS = ("seen", "unseen", "user")   # of the test tasks: see data/tasks.py


def first_words(instruction):
    """Return roughly (verb, object): the first word, and the next one not in SMALL_WORDS."""
    verb, *others = words(instruction) or [""]
    return verb, next((word for word in others if word not in SMALL_WORDS), "")


def lines_read(folder):
    """Return all lines of the folder's *.txt files, without list numbers and "Task:"."""
    lines = set()
    for file in sorted(Path(folder).rglob("*.txt")):
        for line in read_text(file).split("\n"):
            lines.add(re.sub(r"^(\d+\.|Task:) ", "", line))
    return lines


def diversity(tasks, seeds, read):
    """Measure how new and how varied the instructions are.

    tasks and seeds: the new tasks and the seed tasks. read: the lines that the model has read.
    """
    made = [t["instruction"] for t in tasks]
    given = {s["instruction"] for s in seeds}
    nearest = [max(self_instruct.rouge_l(x, seed) for seed in given) for x in made]
    histogram = [0] * 10
    for similarity in nearest:
        histogram[min(9, int(10 * similarity))] += 1
    objects = {}   # verb -> Counter of its objects
    for x in made:
        verb, noun = first_words(x)
        objects.setdefault(verb, Counter())[noun] += 1
    # The paper's figure 3: the 20 commonest verbs with the 4 commonest objects of each.
    verbs = sorted(objects.values(), key=Counter.total, reverse=True)[:20]
    top = sum(n for nouns in verbs for _, n in nouns.most_common(4))
    return dict(new_share=sum(x not in read and x not in given for x in made) / len(made),
                verb_noun_pairs=sum(len(nouns) for nouns in objects.values()),
                verb_noun_top=top / len(made),
                rouge_to_seed=sum(nearest) / len(nearest),
                histogram=histogram,
                words=sum(map(count_words, made)) / len(made))


def audit(tasks, gold):
    """Grade all tasks, with the first instance of each: valid, input fits, output right."""
    verdicts = []
    for t in tasks:
        for first in t["instances"][:1]:
            verdicts.append(gold.audit(t["instruction"], first["input"], first["output"]))
    n = max(1, len(verdicts))
    read = [gold.read_instruction(t["instruction"]) for t in tasks]
    kind_right = [gold.is_classification(r["op"]) == t["is_classification"]
                  for r, t in zip(read, tasks) if r]
    unseen = [r for r in read if r and not gold.seen(r["op"], r["manner"])]
    return dict(tasks=len(tasks), with_instance=n, valid=len(kind_right) / len(tasks),
                fits=sum(v.fits for v in verdicts) / n,
                right=sum(v.right for v in verdicts) / n,
                kind_right=sum(kind_right) / max(1, len(kind_right)),
                unseen_pairs=len(unseen) / len(tasks))


def label_shares(model, enc, tasks, seeds, gold, rng):
    """Return the share of labels that are their topic's commonest, inputs first and labels first.

    Classification tasks get new instances in both orders. A share is None if there is no label.
    """
    row = {}
    group = [t["instruction"] for t in tasks if t["is_classification"]]
    for name, label_first in [("input_first", False), ("label_first", True)]:
        labels = {}   # topic -> labels
        written = self_instruct.instances(model, enc, group, label_first, seeds, 0, rng)
        for instruction, pairs in zip(group, written):
            task = gold.read_instruction(instruction)
            if task is None or not gold.is_classification(task["op"]):
                continue
            for x, _ in pairs:
                whole = gold.read_input(task, x)
                if whole is not None:
                    labels.setdefault(task["op"], []).append(gold.label_of(whole))
        n = sum(len(found) for found in labels.values())
        commonest = sum(max(Counter(found).values()) for found in labels.values())
        row[name] = commonest / n if n else None
    return row


def follow(model, enc, tasks, rng):
    """Let a model follow instructions in random templates, greedily -> outputs.

    An output is the first line: a model that was never fine-tuned does not stop there.
    """
    prompts = [self_instruct.prompt_of(t, rng) for t in tasks]
    results = self_instruct.ask(model, enc, prompts, 64, temperature=0)
    return [text.strip().split("\n")[0] for text, _ in results]


def grades(model, enc, tasks, gold):
    outputs = follow(model, enc, tasks, random.Random(0))
    return [gold.helpful(task, output) for task, output in zip(tasks, outputs)]


def corrected(records, gold, rng):
    """Replace all outputs with correct ones; drop records that cannot be read.

    The paper did this with a better model: the share of top-rated responses rose from 44% to 54%.
    """
    results = []
    for record in records:
        task = gold.read_instruction(record["instruction"])
        whole = task and gold.read_input(task, record["input"])
        if whole:
            results.append({**record, "output": gold.ideal(whole, rng)})
    return results


def mixtures(tasks, seeds, gold, rng):
    """Return {name: records to fine-tune on}; None: no fine-tuning."""
    seed_records = self_instruct.as_records(seeds)
    own = self_instruct.as_records(tasks)
    own = rng.sample(own, len(own))
    world = []
    for _ in own:
        task = gold.new_task(rng)
        world.append({"instruction": task["instruction"], "input": task["input"],
                      "output": gold.ideal(task, rng)})
    return {"base, not tuned": None,
            "seeds only": seed_records,
            "seeds + a quarter of its own": seed_records + own[:len(own) // 4],
            "seeds + half of its own": seed_records + own[:len(own) // 2],
            "seeds + all of its own": seed_records + own,
            "the same, outputs corrected": seed_records + corrected(own, gold, rng),
            "seeds + as many of the world's": seed_records + world,
            "all of these": seed_records + world + own}


def worth(cfg, base, device, tasks, seeds, gold, folder):
    """Fine-tune the base model on each mixture and grade it on held-out tasks -> rows.

    folder holds tasks_val.jsonl, which chooses the checkpoint, and tasks_test.jsonl.
    """
    tests = [record for _, record in read_records(folder / "tasks_test.jsonl")]
    val = [record for _, record in read_records(folder / "tasks_val.jsonl")]
    model, enc, _ = gpt.load_model(base, device)

    def val_score(model):
        return sum(grades(model, enc, val, gold))

    rows = []
    seeds_only = None
    for name, records in mixtures(tasks, seeds, gold, random.Random(cfg.seed)).items():
        if records:
            model = self_instruct.fine_tune(base, device, records, val_score, cfg)
        scores = grades(model, enc, tests, gold)
        if name == "seeds only":
            seeds_only = scores
        rows.append(worth_row(name, len(records or []), scores, tests, seeds_only))
    return rows


def worth_row(name, n_records, scores, tests, seeds_only):
    """Average the scores of a mixture over all tests and each part; pair them with seeds_only."""
    row = dict(arm=name, records=n_records, gold=sum(scores) / len(scores))
    for part in PARTS:
        of_part = [score for score, test in zip(scores, tests) if test["part"] == part]
        row[part] = sum(of_part) / len(of_part)
        row[f"{part}_whole"] = sum(score > 0.999 for score in of_part) / len(of_part)
    if seeds_only:
        gain = [a - b for a, b in zip(scores, seeds_only)]
        row["above_seeds"], row["above_seeds_ci"] = mean_and_ci(gain)
    return row


def report(model, enc, tasks, seeds, gold, folder, rng, log):
    """Print and log diversity and, with a gold module, audit and label shares."""
    read = lines_read(folder) if folder.exists() else set()
    rows = {"diversity": diversity(tasks, seeds, read)}
    if gold:
        rows["audit"] = audit(tasks, gold)
        rows["one label"] = label_shares(model, enc, tasks, seeds, gold, rng)
    for name, row in rows.items():
        cells = [f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
        print(f"{name:12} " + "  ".join(cells))
        log(row=name, **row)


def report_worth(cfg, base, device, tasks, seeds, gold, folder, log):
    """Print and log a row per mixture."""
    for row in worth(cfg, base, device, tasks, seeds, gold, folder):
        line = ("{arm:34} {records:5d}   gold {gold:.3f}   seen {seen:.3f}   "
                "unseen {unseen:.3f}   user {user:.3f}").format(**row)
        if "above_seeds" in row:
            line += "   above seeds only {above_seeds:+.3f} ±{above_seeds_ci:.3f}".format(**row)
        print(line)
        log(row="worth", **row)
