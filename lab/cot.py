"""Chain of thought: does a model add better when its demonstrations show the steps?

Claim (Wei et al. 2022; Chung et al. 2022, FLAN). A few demonstrations with worked steps, mixed into
many others, improve the responses that need several steps and do not make the other tasks worse.

A model does the same amount of work for every token. If the response is one number, the two layers
must find it at once. Steps are tokens too, and each of them is easy given those before it:

    What do cake, milk and pie cost?       with steps    cake 9. milk 6, 15. pie 2, 17. So 17.
                                           without       17.

Four copies of OUT/gpt.pt are tuned on the same demonstrations of the usual tasks, mixed with sums
of two to four prices:

    steps                    sums with steps, TOKENS tokens of them
    no steps, same tokens    sums without steps: more sums, because each is shorter
    no steps, same number    sums without steps, as many as with steps: fewer tokens
    no sums                  the usual demonstrations alone

The test sums use sets of foods that no training sum has in any order. The usual tasks are measured
by their gold grade.

    python lab/cot.py                      three seeds, each with its own held-out sets
    python lab/cot.py --seeds 1            a first look

Four minutes on two CPU cores. Needs OUT/gpt.pt and trains it first if it is missing.
Read next: lab/icl.py.
"""
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
import sft
from data import corpus, village
from data.formats import load_chats, mean_grade
from data.records import read_records
from scaffold.cli import BaseConfig, pick_device, require, run_folder, start
from scaffold.run import ensure_stage, log_metrics, set_seed
from scaffold.table import format_table


@dataclass
class Config(BaseConfig):
    tokens: int = 150_000        # tokens of sums in one epoch
    demos: int = 2000            # demonstrations of the usual tasks, mixed in
    epochs: int = 2              # passes over both
    lr: float = 2e-3             # peak learning rate, cosine to a tenth; twice that of sft.py,
                                 # because arithmetic is new to the model
    batch_tokens: int = 512      # tokens per step, padding included; sums need many small steps
    n: int = 200                 # held-out sums, a third of each size
    seeds: int = 3               # repetitions with their own sums, held-out sets and order
    seed: int = 0                # first seed


PRICE = {food: int(price) for food, price in village.FACTS["price"].items()}
SIZES = (2, 3, 4)                           # foods in a sum
VARIANTS = {
    "steps": "steps",
    "answers": "no steps, same tokens",
    "same": "no steps, same number",
    "none": "no sums",
}


class Sum(NamedTuple):
    """A problem: what do these foods cost together?"""
    foods: list
    prompt: str
    steps: str
    total: int


def make_sum(rng, size):
    """Return the Sum of `size` different foods, whose prices are facts of the village."""
    foods = rng.sample(list(PRICE), size)
    total = PRICE[foods[0]]
    steps = [f"{foods[0]} {total}."]
    for food in foods[1:]:
        total += PRICE[food]
        steps.append(f"{food} {PRICE[food]}, {total}.")
    prompt = f"What do {', '.join(foods[:-1])} and {foods[-1]} cost?"
    return Sum(foods, prompt, " ".join(steps), total)


def held_out(foods, seed, share=0.2):
    """Return whether this set of foods, in any order, is kept for the test."""
    return random.Random(f"{seed} {sorted(foods)}").random() < share


def draw_sum(rng, size, seed, test):
    """Draw sums until one is held out (test=True) or is not (test=False)."""
    while True:
        problem = make_sum(rng, size)
        if held_out(problem.foods, seed) == test:
            return problem


def chat_of(problem, steps):
    """Return a Sum as a chat of one turn each, with or without the steps in its response."""
    response = f"{problem.steps} So {problem.total}." if steps else f"{problem.total}."
    return [{"role": "user", "content": problem.prompt},
            {"role": "assistant", "content": response}]


def final_number(response):
    """Return the last word of a response as a number, or None if it is not one."""
    word = response.strip().removesuffix(".").split(" ")[-1]
    return int(word) if word.isascii() and word.isdigit() else None


def count_tokens(chats, enc):
    return sum(len(sft.render(chat["messages"], enc)[0]) for chat in chats)


def training_sums(enc, seed, steps, tokens=math.inf, n=math.inf):
    """Draw chats until they have `tokens` tokens in all, or until there are n of them.

    The same seed draws the same sums, with or without steps. Only the number of sums differs.
    """
    rng = random.Random(seed)
    chats = []
    used = 0
    while used < tokens and len(chats) < n:
        problem = draw_sum(rng, rng.choice(SIZES), seed, test=False)
        chats.append({"messages": chat_of(problem, steps)})
        used += count_tokens(chats[-1:], enc)
    return chats


def all_training_sums(enc, seed, tokens):
    """Return {variant: training sums as chats}."""
    steps = training_sums(enc, seed, steps=True, tokens=tokens)
    return {
        "steps": steps,
        "answers": training_sums(enc, seed, steps=False, tokens=tokens),
        "same": training_sums(enc, seed, steps=False, n=len(steps)),
        "none": [],
    }


def mean(values):
    return sum(values) / len(values)


def spread(values, digits=2):
    """Format the mean and the range over seeds: '0.30 (0.10..0.50)'."""
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f}..{max(values):.{digits}f})"
    return text


def print_table(rows):
    """Print rows {heading: string} as a table."""
    print(format_table(rows, {heading: (heading, "") for heading in rows[0]}))


def respond(model, enc, problems):
    """Return greedy responses to the prompts of Sums."""
    prompts = [chat_of(problem, steps=False)[:1] for problem in problems]
    return sft.sample_responses(model, enc, prompts, 48, temperature=0)


def are_right(problems, responses):
    """Return for each Sum whether its response ends with the right total."""
    return [final_number(response) == problem.total
            for problem, response in zip(problems, responses)]


def measure(model, enc, seen, new, usual, val_examples, seed):
    """Return a row of results.

    seen, new: Sums of training and of held-out sets. usual: records with the prompts of the usual
    tasks. val_examples: tokenized demonstrations of those tasks.
    """
    row = {"seen_sums": mean(are_right(seen, respond(model, enc, seen)))}
    responses = respond(model, enc, new)
    right = are_right(new, responses)
    row["new_sums"] = mean(right)
    for size in SIZES:
        row[f"new_of_{size}"] = mean([r for p, r in zip(new, right) if len(p.foods) == size])
    prompts = [record["prompt"] for record in usual]
    usual_responses = sft.sample_responses(model, enc, prompts, 64, seed=seed)
    row["gold"] = mean_grade(village.gold, usual, usual_responses)
    row["loss"] = sft.val_loss(model, val_examples, model.wte.weight.device)
    row["sample"] = f"{new[-1].prompt} {responses[-1]}"
    return row


def verdict(rows, gain=0.10, harm=0.05):
    """Judge the claim from the rows of all seeds, in one sentence.

    Steps must raise the accuracy by `gain` at equal tokens in every seed. The usual tasks must lose
    at most `harm` of gold, on average, against the copy that saw no sums.
    """
    of = {(r["run"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    gains = [of["steps", s]["new_sums"] - of["answers", s]["new_sums"] for s in seeds]
    change = mean([of["steps", s]["gold"] - of["none", s]["gold"] for s in seeds])
    holds = min(gains) >= gain and change >= -harm
    return (f"the claim {'holds' if holds else 'does not hold'} here: at equal tokens, steps "
            f"change the accuracy on new sums by {100 * mean(gains):+.0f} points (worst seed "
            f"{100 * min(gains):+.0f}; wanted {100 * gain:+.0f}), and the gold grade of the usual "
            f"tasks by {change:+.2f} against no sums at all (allowed {-harm:+.2f})")


def print_results(rows):
    """Print means and ranges over the seeds, and a sample of the last seed."""
    keys = ("seen_sums", "new_sums", *(f"new_of_{size}" for size in SIZES), "gold", "loss")
    table = []
    for name, title in VARIANTS.items():
        variant = [r for r in rows if r["run"] == name]
        sizes = {key: f"{variant[0][key]:,}" for key in ("sums", "tokens")}
        table.append({"": title} | sizes | {key: spread([r[key] for r in variant]) for key in keys})
    print_table(table)
    for row in rows[-len(VARIANTS):]:
        print(f"{VARIANTS[row['run']]:22} {row['sample']}")


def main(cfg):
    require(cfg, 1, "tokens", "demos", "epochs", "batch_tokens", "n", "seeds")
    require(cfg, 0, "lr", most=10)
    out = run_folder(cfg.out)
    device = pick_device(cfg.device)
    ensure_stage(out / "gpt.pt", gpt, cfg)
    model, enc, _ = gpt.load_model(out / "gpt.pt", device)
    T = model.config.block_size
    folder = corpus.ensure(out / "data", cfg.seed)
    demos = load_chats(folder / "sft_train.jsonl")
    val_examples = sft.tokenize(load_chats(folder / "sft_val.jsonl"), enc, T)
    usual = [record for _, record in read_records(folder / "prompts_val.jsonl")]
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        rng = random.Random(seed)
        chosen = rng.sample(demos, min(cfg.demos, len(demos)))
        sizes = [size for size in SIZES for _ in range(cfg.n // 3 + 1)]
        new = [draw_sum(rng, size, seed, test=True) for size in sizes]
        seen = [draw_sum(rng, size, seed, test=False) for size in sizes]
        sums = all_training_sums(enc, seed, cfg.tokens)
        for name, title in VARIANTS.items():
            set_seed(seed)
            model, _, _ = gpt.load_model(out / "gpt.pt", device)
            chats = sums[name] + chosen
            examples = sft.tokenize(chats, enc, T)
            for epoch in sft.fine_tune(model, examples, cfg.epochs, cfg.batch_tokens, cfg.lr, seed,
                                       name):
                print(f"seed {seed}, {title}: epoch {epoch} done", flush=True)
            n_tokens = cfg.epochs * count_tokens(chats, enc)
            row = {"run": name, "seed": seed, "sums": len(sums[name]), "tokens": n_tokens}
            row |= measure(model, enc, seen, new, usual, val_examples, seed)
            rows.append(row)
            log_metrics(out / "lab-cot.jsonl", fresh=len(rows) == 1, **row)
    print_results(rows)
    print(verdict(rows))


if __name__ == "__main__":
    start(main, Config, __doc__)
