"""In-context learning: a base model solves a task from a few examples in its prompt.

Claim (Brown et al. 2020; Min et al. 2022). More examples help. Whether their labels are right
hardly matters, but they must be of the same domain and in the same format.

The prompt is a page of examples, followed by a query without its label. Only the examples show what
the task is. The base model OUT/gpt.pt, never tuned, continues:

    The cow says moo.           Ann is proud.
    The hen says cluck.         This is a good feeling.
    The dog                     Tom is angry.
            says woof.
                                        This is a bad feeling.

Five kinds of pages:    right         queries of the task with their labels
                        shuffled      the same queries, the labels of the eight examples shuffled
                        wrong         the same queries, each with another label of the task
                        other domain  queries and labels of another task
                        other format  the same queries and labels, written 'label: query'

Two scores: how often the right label is the likeliest of the task's labels (the table gives the
chance level), and how often greedy generation writes it.

The documents of the village are short: no page of facts has more than three lines. A prompt with 4
or 8 examples is longer than anything of its kind that the base model has read. The second group of
rows shows how much reading longer pages helps. It measures a copy of the model that was trained on
pages of 2 to 9 examples of tasks other than those tested (as in MetaICL).

    python lab/icl.py                      three seeds
    python lab/icl.py --read-on 0          the base model alone

Two minutes on two CPU cores. Needs OUT/gpt.pt and trains it first if it is missing.
Read next: lab/templates.py.
"""
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dpo
import gpt
import sft
from data.text import pack
from data.tokenizer import end_of
from data.village import FACTS, GOOD_MOODS, RUDE_LINES, WORDS
from lab.cot import mean, print_table, spread
from scaffold.cli import BaseConfig, pick_device, require, run_folder, start
from scaffold.optim import adamw, lr_at
from scaffold.run import ensure_stage, log_metrics, set_seed, take_step


@dataclass
class Config(BaseConfig):
    n: int = 64                  # queries per task, each with its own examples
    read_on: int = 400           # steps that the copy trains on pages of other tasks; 0: no copy
    lr: float = 5e-4             # peak learning rate of these steps
    batch_tokens: int = 1024     # tokens per step
    seeds: int = 3               # repetitions with their own queries and examples
    seed: int = 0                # first seed


SHOTS = (0, 1, 2, 4, 8)
PAGES = ("right", "shuffled", "wrong", "other domain", "other format")
SCORES = ("likely", "generated")


class Task(NamedTuple):
    """draw(rng) returns an example (query, label); labels lists all labels."""
    draw: Callable
    labels: list


def tone(rng):
    mood = rng.choice(WORDS["mood"])
    feeling = "good" if mood in GOOD_MOODS else "bad"
    return f"{rng.choice(WORDS['person'])} is {mood}.\n", f"This is a {feeling} feeling"


def manners(rng):
    if rng.random() < 0.5:
        return rng.choice(RUDE_LINES) + "\n", "This is rude"
    return f"Could you please give me the {rng.choice(WORDS['thing'])}?\n", "This is polite"


def fact(name, form, query="The {}"):
    """Return the Task of completing a fact that everybody in the village knows.

    The space before the label is part of the label, as it is part of the word's token.
    """
    def draw(rng):
        key, value = rng.choice(list(FACTS[name].items()))
        return query.format(key), form.format(value)

    return Task(draw, [form.format(value) for value in sorted(set(FACTS[name].values()))])


TESTED = {
    "tone": Task(tone, ["This is a good feeling", "This is a bad feeling"]),
    "manners": Task(manners, ["This is polite", "This is rude"]),
    "sound": fact("sound", " says {}"),
    "feed": fact("feed", " eats {}"),
}
# The other domain of each task: it shares no query and no label.
OTHER = {"tone": "sound", "manners": "feed", "sound": "tone", "feed": "manners"}
READ = {
    "price": fact("price", " costs {} coins"),
    "ware": fact("ware", " sells {}"),
    "work": fact("work", " works at the {}"),
    "hanzi": fact("hanzi", " is {} in Chinese", "The word {}"),
}


def line(query, label):
    return f"{query}{label}.\n"


def label_first(query, label):
    return f"{label.strip()}: {query.strip()}\n"


def draw_examples(draw, query, rng):
    """Return 8 examples (query, label), none with the given query, whose label could be copied."""
    examples = []
    while len(examples) < SHOTS[-1]:
        example = draw(rng)
        if example[0] != query:
            examples.append(example)
    return examples


def shuffled(examples, rng):
    """Return the same queries and the same labels, matched at random."""
    labels = [label for _, label in examples]
    rng.shuffle(labels)
    return [(query, label) for (query, _), label in zip(examples, labels)]


def wrong(examples, labels, rng):
    """Return the same queries, each with a wrong label."""
    return [(query, rng.choice([x for x in labels if x != label])) for query, label in examples]


def page(kind, shots, name, query, rng):
    """Return the prompt: `shots` examples of the task `name` in this kind of page, then the query.

    For the same state of rng, a page with fewer shots is the beginning of one with more.
    """
    task = TESTED[name]
    examples = draw_examples(task.draw, query, rng)
    write = line
    if kind == "shuffled":
        examples = shuffled(examples, rng)
    elif kind == "wrong":
        examples = wrong(examples, task.labels, rng)
    elif kind == "other domain":
        examples = draw_examples(TESTED[OTHER[name]].draw, query, rng)
    elif kind == "other format":
        write = label_first
    return "".join(write(*example) for example in examples[:shots]) + query


def likeliest(model, enc, prompts, labels):
    """Return for each prompt the label with the highest log p(label and its full stop | prompt)."""
    examples = []
    for prompt in prompts:
        start = enc.encode_ordinary(prompt)
        for label in labels:
            examples.append(sft.response_example(start, enc.encode_ordinary(label + ".")))
    logprobs = dpo.all_logprobs(model, examples).view(len(prompts), len(labels))
    return [labels[i] for i in logprobs.argmax(1).tolist()]


def generated(model, enc, prompts):
    """Return what greedy decoding writes up to the end of the line, without the full stop."""
    ids = [enc.encode_ordinary(prompt) for prompt in prompts]
    new = gpt.generate(model, ids, 12, temperature=0, stop=end_of(enc))
    texts = [enc.decode([i for i in row if not enc.is_special_token(i)]) for row in new]
    return [text.split("\n")[0].removesuffix(".") for text in texts]


def read_on(model, enc, cfg, seed):
    """Train on pages of other tasks, 2 to 9 lines each: as long as test pages with their query."""
    rng = random.Random(seed)
    device = model.wte.weight.device
    T = model.config.block_size
    optimizer = adamw(model, cfg.lr)
    model.train()
    for step in range(cfg.read_on):
        documents = []
        n_tokens = 0
        while n_tokens < cfg.batch_tokens:
            task = READ[rng.choice(list(READ))]
            text = "".join(line(*task.draw(rng)) for _ in range(rng.randint(2, 9)))
            ids = enc.encode_ordinary(text) + [end_of(enc)]
            documents.append(torch.tensor(ids[:T]))
            n_tokens += len(documents[-1])
        ids, segments = pack(documents, T)                                     # (B, T) each
        loss = gpt.lm_loss(model, ids.to(device), segments.to(device))
        take_step(loss, optimizer, model, lr_at(step, cfg.read_on, cfg.lr))
    model.eval()


def measure(model, enc, cfg, seed):
    """Return rows with the accuracies of each task, page and number of shots.

    All rows of a task share the queries.
    """
    rows = []
    for name, task in TESTED.items():
        examples = [task.draw(random.Random(f"{seed} {name} {i}")) for i in range(cfg.n)]
        queries = [query for query, _ in examples]
        right = [label for _, label in examples]
        for kind in PAGES:
            for shots in SHOTS if kind == "right" else SHOTS[1:]:    # 0 shots: all pages are equal
                prompts = [page(kind, shots, name, query, random.Random(f"{seed} page {i}"))
                           for i, query in enumerate(queries)]
                likely = likeliest(model, enc, prompts, task.labels)
                written = generated(model, enc, prompts)
                rows.append({
                    "task": name, "page": kind, "shots": shots, "chance": 1 / len(task.labels),
                    "likely": mean([a == b for a, b in zip(likely, right)]),
                    "generated": mean([a == b for a, b in zip(written, right)]),
                })
    return rows


def accuracy(rows, model, kind, shots, score="likely"):
    """Return the mean over tasks of each seed's rows: one number per seed.

    Rows with 0 shots belong to the right page and stand for every kind.
    """
    kind = kind if shots else "right"
    accuracies = []
    for seed in sorted({r["seed"] for r in rows}):
        cell = (model, kind, shots, seed)
        accuracies.append(mean([r[score] for r in rows
                                if (r["model"], r["page"], r["shots"], r["seed"]) == cell]))
    return accuracies


def verdict(rows, model, score, margin=0.05):
    """Judge each part of the claim for a model by one score, in one sentence.

    Compares mean accuracies at the number of shots where right labels do best; differences up to
    `margin` do not count. If examples do not help, it means nothing that labels do not matter, so
    the claim does not hold.
    """
    right = {shots: mean(accuracy(rows, model, "right", shots, score)) for shots in SHOTS}
    best = max(SHOTS[1:], key=right.get)
    at_best = {kind: mean(accuracy(rows, model, kind, best, score)) for kind in PAGES}
    loss = {kind: at_best["right"] - at_best[kind] for kind in PAGES}
    parts = {
        "examples help": at_best["right"] - right[0] > margin,
        "the more the better": right[SHOTS[-1]] >= right[best] - margin,
        "shuffled labels hardly matter": loss["shuffled"] <= margin,
        "wrong labels hardly matter": loss["wrong"] <= margin,
        "another domain is worse": loss["other domain"] > margin,
        "another format is worse": loss["other format"] > margin,
    }
    held = "does not hold"
    if all(parts.values()):
        held = "holds"
    elif parts["examples help"]:
        held = "holds in part"
    listed = "; ".join(f"{part}: {'yes' if true else 'no'}" for part, true in parts.items())
    return f"{model}, {score}: the claim {held} here, at {best} shots: {listed}"


def accuracies(rows, model, kind, score):
    """Return {heading: mean and range over the seeds} for every number of shots."""
    return {f"{shots} shots": spread(accuracy(rows, model, kind, shots, score)) for shots in SHOTS}


def print_results(rows, models):
    """Print the accuracies by kind of page, for both scores, and by task for right pages."""
    chance = mean([1 / len(task.labels) for task in TESTED.values()])
    titles = {"likely": f"likeliest label, mean of {', '.join(TESTED)} (chance {chance:.2f})",
              "generated": f"greedy generation, mean of {', '.join(TESTED)}"}
    for score, title in titles.items():
        print(f"\n{title}")
        print_table([{"model": model, "page": kind} | accuracies(rows, model, kind, score)
                     for model in models for kind in PAGES])
    print("\nlikeliest label, right pages, by task")
    table = []
    for model in models:
        for task in TESTED:
            of_task = [r for r in rows if r["task"] == task]
            cells = accuracies(of_task, model, "right", "likely")
            table.append({"model": model, "task": task} | cells)
    print_table(table)


def main(cfg):
    require(cfg, 1, "n", "batch_tokens", "seeds")
    require(cfg, 0, "read_on")
    require(cfg, 0, "lr", most=10)
    out = run_folder(cfg.out)
    device = pick_device(cfg.device)
    ensure_stage(out / "gpt.pt", gpt, cfg)
    models = ["base", "read on"] if cfg.read_on else ["base"]
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        set_seed(seed)
        model, enc, _ = gpt.load_model(out / "gpt.pt", device)
        for name in models:
            if name == "read on":
                read_on(model, enc, cfg, seed)
            for row in measure(model, enc, cfg, seed):
                rows.append({"model": name, "seed": seed} | row)
                log_metrics(out / "lab-icl.jsonl", fresh=len(rows) == 1, **rows[-1])
            print(f"seed {seed}, {name}: done", flush=True)
    print_results(rows, models)
    print()
    for name in models:
        for score in SCORES:
            print(verdict(rows, name, score))


if __name__ == "__main__":
    start(main, Config, __doc__)
