"""Forgetting: what does a model lose when it is tuned on a single task, and for too long?

Claim (the usual advice on fine-tuning). Tune on many tasks at once and for few epochs. A model that
is tuned on one task alone gets better at it and worse at all others, and more epochs make the
others worse still.

Two copies of OUT/sft.pt read the same number of tokens of perfect demonstrations (gold 1):

    one task        demonstrations of --task alone
    all tasks       demonstrations of every use case, --task included

After some of the epochs each copy is measured: gold on new prompts of that task and of all others,
and the loss on held-out pretraining text.

    python lab/forgetting.py                        three seeds
    python lab/forgetting.py --task classify        another task; a wrong name lists them all

Two minutes on two CPU cores. Needs OUT/sft.pt and trains it first if it is missing.
Read next: ../reward.py.
"""
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
import sft
from data import village
from data.text import checkpoint_text
from lab.cot import mean, print_table, spread
from lab.templates import demonstrations, grade, new_tasks
from scaffold.cli import BaseConfig, choose, pick_device, require, run_folder, start
from scaffold.run import ensure_stage, log_metrics, set_seed


@dataclass
class Config(BaseConfig):
    task: str = "rewrite"        # the use case that one copy is tuned on alone
    tokens: int = 8000           # tokens of demonstrations in one epoch: a few hundred of them, as
                                 # people collect for one task
    epochs: int = 16             # passes over them
    lr: float = 1e-3             # peak learning rate, cosine to a tenth; the same as sft.py's
    batch_tokens: int = 1024     # tokens per step, padding included
    n: int = 100                 # new prompts of the task, and as many of all others together
    seeds: int = 3               # repetitions with their own demonstrations and prompts
    seed: int = 0                # first seed


VARIANTS = {"one": "one task", "all": "all tasks"}


def measured_epochs(epochs):
    """Return the epochs after which to measure: 1, 4, 16, ... and the last."""
    return sorted({4 ** k for k in range(10) if 4 ** k < epochs} | {epochs})


def measure(model, enc, tasks, others, text, device):
    """Return the mean gold of the one task and of the others, and the loss on pretraining text."""
    return {
        "task": grade(model, enc, tasks),
        "others": grade(model, enc, others),
        "lm_loss": gpt.val_loss(model, text, enc, device, limit=4000)[0],
    }


def verdict(rows, change=0.05):
    """Judge the claim from the rows of all seeds, in one sentence.

    The claim has four parts: one task alone makes that task better, makes the others worse, and
    makes them even worse with more epochs; all tasks together do not make the others worse.
    """
    last = max(r["epoch"] for r in rows)
    first = min(r["epoch"] for r in rows if r["epoch"] > 0)

    def at(variant, epoch, key):
        return mean([r[key] for r in rows if (r["run"], r["epoch"]) == (variant, epoch)])

    def moved(variant, key):
        return at(variant, last, key) - at(variant, 0, key)

    longer = at("one", last, "others") - at("one", first, "others")
    parts = [moved("one", "task") > change, moved("one", "others") < -change, longer < -change,
             moved("all", "others") >= -change]
    held = "does not hold"
    if all(parts):
        held = "holds"
    elif any(parts):
        held = "holds in part"
    return (f"the claim {held} here: after {last} epochs of one task its gold changed by "
            f"{moved('one', 'task'):+.2f}, that of the others by {moved('one', 'others'):+.2f} (by "
            f"{longer:+.2f} since epoch {first}) and the loss on text by "
            f"{moved('one', 'lm_loss'):+.2f}; with all tasks by {moved('all', 'task'):+.2f}, "
            f"{moved('all', 'others'):+.2f} and {moved('all', 'lm_loss'):+.2f}")


def print_results(rows, task, epochs):
    """Print means and ranges over the seeds."""
    table = []
    for name, title in VARIANTS.items():
        for epoch in epochs:
            chosen = [r for r in rows if (r["run"], r["epoch"]) == (name, epoch)]
            table.append({
                "tuned on": title,
                "epochs": str(epoch),
                f"gold of {task}": spread([r["task"] for r in chosen]),
                "gold of the others": spread([r["others"] for r in chosen]),
                "loss on text": spread([r["lm_loss"] for r in chosen]),
            })
    print_table(table)


def main(cfg):
    require(cfg, 1, "tokens", "epochs", "batch_tokens", "n", "seeds")
    require(cfg, 0, "lr", most=10)
    choose(cfg, "task", *village.SHARES)
    out = run_folder(cfg.out)
    device = pick_device(cfg.device)
    ensure_stage(out / "sft.pt", sft, cfg)
    model, enc, _ = gpt.load_model(out / "sft.pt", device)
    T = model.config.block_size
    text = checkpoint_text(out / "gpt.pt", enc, T)
    other_uses = [use for use in village.SHARES if use != cfg.task]
    measured = [0] + measured_epochs(cfg.epochs)
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        tasks = new_tasks(cfg.n, seed, None, cfg.task)
        others = []
        for use in other_uses:
            others += new_tasks(cfg.n // len(other_uses) + 1, seed, None, use)
        for name, title in VARIANTS.items():
            set_seed(seed)
            model, _, _ = gpt.load_model(out / "sft.pt", device)
            use = cfg.task if name == "one" else None
            examples = sft.tokenize(demonstrations(enc, [0, 1, 2], cfg.tokens, seed, use), enc, T)
            epochs = sft.fine_tune(model, examples, cfg.epochs, cfg.batch_tokens, cfg.lr, seed,
                                   name)
            for epoch in itertools.chain([0], epochs):      # 0: before the first step
                if epoch not in measured:
                    continue
                row = {"run": name, "seed": seed, "epoch": epoch}
                row |= measure(model, enc, tasks, others, text, device)
                rows.append(row)
                log_metrics(out / "lab-forgetting.jsonl", fresh=len(rows) == 1, **row)
                print(f"seed {seed}, {title}, epoch {epoch}: done", flush=True)
    print_results(rows, cfg.task, measured)
    print(verdict(rows))


if __name__ == "__main__":
    start(main, Config, __doc__)
