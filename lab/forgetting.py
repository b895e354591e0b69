"""Forgetting: what does a model lose that is tuned on one task, and for too long?

Claim (the usual advice on prompt tuning and fine-tuning). Tune on many tasks at once and for few epochs. Tuned on one task
alone the model does that task better and all others worse, and the longer, the worse.

Two copies of OUT/sft.pt read the same number of tokens of school-like demonstrations (each has full marks):

    one task        demonstrations of --task alone
    all tasks       demonstrations of every use case, that one among them

After some epochs each is asked new questions of that task and of all others, and reads held-out pretraining text.

    python lab/forgetting.py                        three seeds
    python lab/forgetting.py --task classify        another task: open_qa, closed_qa, extract, summary, rewrite, other, ...

Two minutes on two CPU cores. Needs OUT/sft.pt, and trains it first when it is missing. Read next: ../reward.py.
"""
import random, sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt, sft
from data import village
from lab.cot import base_model, spread
from lab.templates import demonstrations, grade, new_tasks


@dataclass
class Config:
    out: str = "out"
    "folder of the run; its sft.pt is where both copies start"
    task: str = "rewrite"
    "the use case that is tuned on alone"
    tokens: int = 8000
    "tokens of demonstrations that are read in one epoch; a few hundred demonstrations, as people collect for one task"
    epochs: int = 16
    "passes over them"
    lr: float = 1e-3
    "peak learning rate, cosine to a tenth; sft.py's"
    batch_tokens: int = 1024
    "tokens per step, padding included"
    n: int = 100
    "new questions of the task, and as many of all others together"
    seeds: int = 3
    "repetitions, each with its own demonstrations and questions; the table has mean and range"
    seed: int = 0
    "first seed"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


RUNS = dict(one="one task", all="all tasks")


def looks(epochs):
    """Epochs after which to look: 1, 4, 16, ... and the last."""
    return sorted({4 ** k for k in range(10) if 4 ** k < epochs} | {epochs})


def verdict(rows, change=0.05):
    """One sentence from the last look against the start. The claim has four parts: one task alone makes that task better and the
    others worse, all tasks together do not make the others worse, and more epochs make the loss of text greater."""
    last = max(r["epoch"] for r in rows)
    first = min(r["epoch"] for r in rows if r["epoch"])

    def mean(run, epoch, key):
        found = [r[key] for r in rows if r["run"] == run and r["epoch"] == epoch]
        return sum(found) / len(found)
    moved = {(run, key): mean(run, last, key) - mean(run, 0, key) for run in RUNS for key in ("task", "others", "lm_loss")}
    longer = mean("one", last, "others") - mean("one", first, "others")
    parts = [moved["one", "task"] > change, moved["one", "others"] < -change, longer < -change,
             moved["all", "others"] >= -change]
    held = "holds" if all(parts) else "holds in part" if any(parts) else "does not hold"
    return (f"the claim {held} here: after {last} epochs of one task its gold changed by {moved['one', 'task']:+.2f}, that of the "
            f"others by {moved['one', 'others']:+.2f} (by {longer:+.2f} since epoch {first}) and the loss on text by "
            f"{moved['one', 'lm_loss']:+.2f}; with all tasks by {moved['all', 'task']:+.2f}, {moved['all', 'others']:+.2f} and "
            f"{moved['all', 'lm_loss']:+.2f}")


def main(cfg):
    gpt.require(cfg, 1, "tokens", "epochs", "batch_tokens", "n", "seeds")
    gpt.require(cfg, 0, "lr", most=10)
    if cfg.task not in village.SHARES:
        raise gpt.UserError(f"--task {cfg.task}: choose one of {', '.join(village.SHARES)}")
    load, rows, log = base_model(cfg, "sft.pt"), [], Path(cfg.out) / "lab-forgetting.jsonl"
    device, others = gpt.pick_device(cfg.device), [u for u in village.SHARES if u != cfg.task]
    model, enc = load()
    text = gpt.corpus_of(Path(cfg.out) / "gpt.pt", enc, model.config.block_size)
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        questions = new_tasks(cfg.n, seed, None, cfg.task)
        foreign = [q for i, use in enumerate(others) for q in new_tasks(cfg.n // len(others) + 1, seed, None, use)]

        def look(run, epoch):
            rows.append(dict(run=run, seed=seed, epoch=epoch, task=grade(model, enc, questions),
                             others=grade(model, enc, foreign),
                             lm_loss=gpt.val_loss(model, text, enc, device, limit=4000)[0]))
            gpt.log_metrics(log, fresh=len(rows) == 1, **rows[-1])
            print(f"seed {seed}, {RUNS[run]}, epoch {epoch}: done", flush=True)
        for run in RUNS:
            gpt.set_seed(seed)
            model, enc = load()
            look(run, 0)
            chats = demonstrations(enc, [0, 1, 2], cfg.tokens, seed, cfg.task if run == "one" else None)
            examples = sft.tokenize(chats, enc, model.config.block_size)
            for epoch in sft.tune(model, examples, cfg.epochs, cfg.batch_tokens, cfg.lr, seed, "forgetting"):
                if epoch in looks(cfg.epochs):
                    look(run, epoch)
    print(f"\n{'tuned on':12}{'epochs':8}{'gold of ' + cfg.task:22}{'gold of the others':22}{'loss on text':22}")
    for run in RUNS:
        for epoch in [0] + looks(cfg.epochs):
            mine = [r for r in rows if r["run"] == run and r["epoch"] == epoch]
            cells = (spread([r[k] for r in mine]) for k in ("task", "others", "lm_loss"))
            print(f"{RUNS[run]:12}{epoch:<8}" + "".join(f"{c:22}" for c in cells))
    print(f"\n{verdict(rows)}")


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
