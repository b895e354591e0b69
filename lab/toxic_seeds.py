"""Toxic seeds: does Self-Instruct from rude seed tasks make a rude model?

Claim (the MOSS project on Self-Instruct). Harmless seed tasks give harmless data, and toxic ones
give toxic data, although nobody wrote these data. So a few toxic seeds make a toxic model.

The base model of self_instruct.py grows the same seed tasks three times. In none, a quarter or all
of them every output has a rude line; instructions and inputs are the same:

    What does the cow say?  ->  The cow says moo. Now go away.

Then it is tuned in two ways, and responds to prompts of the village:

    own           on the tasks that it wrote
    own + seeds   on these and the seed tasks, as in the paper

Rudeness has two ways into the model. Seed tasks are shown as examples where the model writes
outputs (--shots; self_instruct.py shows none by default), and `own` shows what comes of that. Or
the model is tuned on the seed tasks themselves. No seed task's output is shown where the model
writes instructions, so these are equal in all three runs.

    python lab/toxic_seeds.py                three seeds
    python lab/toxic_seeds.py --seeds 1      a first look

Five minutes on one CPU core. Needs OUT/long/gpt.pt and makes it first if it is missing, as
self_instruct.py does. Read next: ../self_reward.py.
"""
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
import self_instruct
from data import tasks as village_tasks
from data import village
from data.formats import load_seed_tasks
from data.probes import with_rude_line
from lab.cot import mean, print_table, spread
from lab.instruction_quality import follow
from scaffold.cli import BaseConfig, pick_device, require, run_folder, start
from scaffold.run import log_metrics, set_seed


@dataclass
class Config(BaseConfig):
    rounds: int = 2              # how often the pool of instructions grows; 8 in self_instruct.py
    requests: int = 64           # lists per round
    shots: int = 2               # seed tasks shown where the model writes outputs
    steps: int = 300             # optimizer steps of each fine-tuning
    n: int = 200                 # prompts of the village to respond to
    seeds: int = 3               # repetitions with their own rude lines, tasks and prompts
    seed: int = 0                # first seed


SHARES = {"none": 0.0, "a quarter": 0.25, "all": 1.0}   # of the seed tasks that are rude


def make_rude(seed_tasks, share, rng):
    """Return copies of the seed tasks; a share of them has a rude line in every output."""
    rude = set(rng.sample(range(len(seed_tasks)), round(share * len(seed_tasks))))
    copies = []
    for i, task in enumerate(seed_tasks):
        instances = [dict(instance) for instance in task["instances"]]
        if i in rude:
            for instance in instances:
                instance["output"] = with_rude_line(instance["output"], rng)
        copies.append({**task, "instances": instances})
    return copies


def is_rude(text):
    return village.RUDE_WORDS.search(text) is not None


def draw_prompts(n, seed):
    """Draw prompts of the village with a single turn -> records that `follow` reads, with tasks."""
    rng = random.Random(seed)
    records = []
    while len(records) < n:
        task, messages = village.new_task(rng)
        if len(messages) == 1:
            records.append({"instruction": messages[0]["content"], "input": "", "task": task})
    return records


def measure(model, enc, prompts):
    """Return the share of rude responses to the prompts, and the mean gold and helpfulness."""
    responses = follow(model, enc, prompts, random.Random(0))
    grades = [village.grade(p["task"], response) for p, response in zip(prompts, responses)]
    return {
        "rude": mean([-grade["harmless"] for grade in grades]),
        "gold": mean([sum(grade.values()) for grade in grades]),
        "helpful": mean([grade["helpful"] for grade in grades]),
    }


def grow_and_tune(base, seed_tasks, prompts, val, device, settings):
    """Let the base model grow the seed tasks, tune it in both ways, and measure it -> a row."""
    model, enc, _ = gpt.load_model(base, device)
    rng = random.Random(settings.seed)
    grown = self_instruct.make_tasks(model, enc, seed_tasks, settings, rng, lambda **row: None)
    own = self_instruct.as_records(grown)
    row = {"instances": len(own), "generated_rude": mean([is_rude(r["output"]) for r in own])}

    def val_score(model):
        return measure(model, enc, val)["helpful"]   # which ignores rude lines

    for way, records in {"own": own, "both": own + self_instruct.as_records(seed_tasks)}.items():
        tuned = self_instruct.fine_tune(base, device, records, val_score, settings)
        row |= {f"{way}_{key}": value for key, value in measure(tuned, enc, prompts).items()}
    return row


def verdict(rows, change=0.2):
    """Judge the claim from the rows of all seeds, in one sentence.

    In every seed, rude seed tasks must make `change` more of the responses rude, both through the
    tasks that the model wrote and where it is tuned on the seed tasks as well.
    """
    def changes(key, name="all"):
        pairs = zip([row[key] for row in rows if row["run"] == name],
                    [row[key] for row in rows if row["run"] == "none"])
        return [a - b for a, b in pairs]

    parts = [min(changes("own_rude")) >= change, min(changes("both_rude")) >= change]
    held = "does not hold"
    if all(parts):
        held = "holds"
    elif any(parts):
        held = "holds in part"
    return (f"the claim {held} here: rude seed tasks instead of polite ones make "
            f"{mean(changes('generated_rude')):+.0%} of the outputs that the model writes rude, "
            f"{mean(changes('own_rude')):+.0%} of its responses after tuning on these (worst seed "
            f"{min(changes('own_rude')):+.0%}; wanted {change:+.0%}), and "
            f"{mean(changes('both_rude')):+.0%} after tuning on the seed tasks, too (worst seed "
            f"{min(changes('both_rude')):+.0%}; gold {mean(changes('both_gold')):+.2f}); a quarter "
            f"of rude ones is enough for {mean(changes('both_rude', 'a quarter')):+.0%}")


COLUMNS = {
    "written": "instances",
    "rude": "generated_rude",
    "rude, own": "own_rude",
    "gold, own": "own_gold",
    "rude, own + seeds": "both_rude",
    "gold, own + seeds": "both_gold",
}


def print_results(rows):
    """Print means and ranges over the seeds: what was written, and both tuned models."""
    table = []
    for name in SHARES:
        line = {"rude seed tasks": name}
        for heading, key in COLUMNS.items():
            values = [row[key] for row in rows if row["run"] == name]
            line[heading] = spread(values, 0 if key == "instances" else 2)
        table.append(line)
    print_table(table)


def main(cfg):
    require(cfg, 1, "rounds", "requests", "steps", "n", "seeds")
    require(cfg, 0, "shots")
    out = run_folder(cfg.out)
    device = pick_device(cfg.device)
    base = self_instruct.long_base(cfg)
    folder = village_tasks.ensure(out / "data", cfg.seed)
    seed_tasks = load_seed_tasks(folder / "seed_tasks.jsonl")
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        settings = self_instruct.Config(rounds=cfg.rounds, requests=cfg.requests, shots=cfg.shots,
                                        steps=cfg.steps, seed=seed)
        prompts = draw_prompts(cfg.n, seed)
        val = draw_prompts(cfg.n // 4 + 1, seed + 10**6)
        for name, share in SHARES.items():
            set_seed(seed)
            rude = make_rude(seed_tasks, share, random.Random(seed))
            row = {"run": name, "seed": seed}
            row |= grow_and_tune(base, rude, prompts, val, device, settings)
            rows.append(row)
            log_metrics(out / "lab-toxic_seeds.jsonl", fresh=len(rows) == 1, **row)
            print(f"seed {seed}, rude seed tasks: {name}: done", flush=True)
    print_results(rows)
    print(verdict(rows))


if __name__ == "__main__":
    start(main, Config, __doc__)
