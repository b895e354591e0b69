"""Several prompt templates per task: does tuning on many phrasings help with a new phrasing?

Claim (Sanh et al. 2021, T0; Wang et al. 2022, Self-Instruct). A model that reads each task in
several phrasings, drawn at random, learns the intent. A model that reads a single phrasing learns
that phrasing and fails on others.

Every task of the village has four phrasings. The last is held out everywhere, in pretraining too:

    0  What does the cow say?         1  What sound does the cow make?
    2  Tell me what the cow says.     3  What is the sound of the cow?

Copies of OUT/gpt.pt are fine-tuned on equal tokens of perfect demonstrations (gold 1). One reads
every task in phrasing 0, another in phrasings 0 and 1, the last in 0, 1 and 2. Then all respond to
the same new tasks in each phrasing. Pretraining has shown phrasings 0 to 2 in books. So phrasings 1
and 2 measure what fine-tuning on one phrasing loses, and phrasing 3 measures what fine-tuning on
several can teach.

    python lab/templates.py                three seeds
    python lab/templates.py --seeds 1      a first look

Two minutes on two CPU cores. Needs OUT/gpt.pt and trains it first if it is missing.
Read next: lab/forgetting.py.
"""
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
import sft
from data import village
from data.formats import mean_grade
from lab.cot import count_tokens, mean, print_table, spread
from scaffold.cli import BaseConfig, pick_device, require, run_folder, start
from scaffold.run import ensure_stage, log_metrics, set_seed


@dataclass
class Config(BaseConfig):
    tokens: int = 120_000        # tokens of demonstrations in one epoch
    epochs: int = 2              # passes over them
    lr: float = 1e-3             # peak learning rate, cosine to a tenth; the same as sft.py's
    batch_tokens: int = 1024     # tokens per step, padding included
    n: int = 200                 # new tasks, each in all four phrasings
    seeds: int = 3               # repetitions with their own demonstrations and tasks
    seed: int = 0                # first seed


PHRASINGS = range(4)
VARIANTS = {"one": [0], "two": [0, 1], "three": [0, 1, 2]}      # the phrasings of each copy


def perfect_demonstration(task, rng):
    """Draw demonstrations until the gold program gives one full marks."""
    while True:
        response = village.demonstration(task, rng)
        if village.gold(task, response) == 1:
            return response


def numbered_task(number, phrasing, use=None):
    """Return a record with a task and its prompt; the number decides everything but the phrasing.

    Without `use`, every use case is equally likely.
    """
    rng = random.Random(f"task {number}")
    use = use or rng.choice(list(village.SHARES))
    task, prompt = village.new_task(rng, use=use, phrasing=phrasing)
    return {"task": task, "prompt": prompt}


def demonstrations(enc, phrasings, tokens, seed, use=None):
    """Return chats with perfect responses, `tokens` tokens in all, each in one of the phrasings.

    Training tasks have even numbers, test tasks (see new_tasks) odd ones.
    """
    rng = random.Random(seed)
    chats = []
    used = 0
    number = seed * 10**6
    while used < tokens:
        record = numbered_task(number, rng.choice(phrasings), use)
        response = perfect_demonstration(record["task"], rng)
        messages = record["prompt"] + [{"role": "assistant", "content": response}]
        chats.append({"messages": messages, "task": record["task"]})
        used += count_tokens(chats[-1:], enc)
        number += 2
    return chats


def new_tasks(n, seed, phrasing, use=None):
    """Return n records with tasks that no copy of this seed is trained on."""
    return [numbered_task(seed * 10**6 + 2 * i + 1, phrasing, use) for i in range(n)]


def grade(model, enc, tasks):
    """Return the mean gold grade of greedy responses to the records of tasks."""
    prompts = [record["prompt"] for record in tasks]
    responses = sft.sample_responses(model, enc, prompts, 64, temperature=0)
    return mean_grade(village.gold, tasks, responses)


def verdict(rows, gain=0.05):
    """Judge the claim from the rows of all seeds, in one sentence.

    Three phrasings must beat one by `gain` of gold on the held-out phrasing, in every seed.
    """
    of = {(r["run"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})

    def gains(variant, phrasing):
        key = f"phrasing_{phrasing}"
        return [of[variant, s][key] - of["one", s][key] for s in seeds]

    held_out = gains("three", 3)
    read_by_three = (mean(gains("three", 1)) + mean(gains("three", 2))) / 2
    holds = min(held_out) >= gain
    return (f"the claim {'holds' if holds else 'does not hold'} here: three phrasings instead of "
            f"one change gold on the held-out phrasing by {mean(held_out):+.2f} (worst seed "
            f"{min(held_out):+.2f}; wanted {gain:+.2f}), on those that only three read by "
            f"{read_by_three:+.2f}, on the one that both read by {mean(gains('three', 0)):+.2f}; "
            f"two instead of one, on a phrasing that only pretraining knew, by "
            f"{mean(gains('two', 2)):+.2f}")


def print_results(rows):
    """Print means and ranges over the seeds."""
    table = []
    for name in VARIANTS:
        line = {"phrasings read": name}
        variant = [r for r in rows if r["run"] == name]
        for p in PHRASINGS:
            heading = f"gold, phrasing {p}" + (" (held out)" if p == 3 else "")
            line[heading] = spread([r[f"phrasing_{p}"] for r in variant])
        table.append(line)
    print_table(table)


def main(cfg):
    require(cfg, 1, "tokens", "epochs", "batch_tokens", "n", "seeds")
    require(cfg, 0, "lr", most=10)
    out = run_folder(cfg.out)
    device = pick_device(cfg.device)
    ensure_stage(out / "gpt.pt", gpt, cfg)
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for name, phrasings in VARIANTS.items():
            set_seed(seed)
            model, enc, _ = gpt.load_model(out / "gpt.pt", device)
            chats = demonstrations(enc, phrasings, cfg.tokens, seed)
            examples = sft.tokenize(chats, enc, model.config.block_size)
            for epoch in sft.fine_tune(model, examples, cfg.epochs, cfg.batch_tokens, cfg.lr, seed,
                                       name):
                print(f"seed {seed}, {name}: epoch {epoch} done", flush=True)
            row = {"run": name, "seed": seed, "demonstrations": len(chats)}
            for p in PHRASINGS:
                row[f"phrasing_{p}"] = grade(model, enc, new_tasks(cfg.n, seed, p))
            rows.append(row)
            log_metrics(out / "lab-templates.jsonl", fresh=len(rows) == 1, **row)
    print_results(rows)
    print(verdict(rows))


if __name__ == "__main__":
    start(main, Config, __doc__)
