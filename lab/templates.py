"""Several prompt templates per task: does a model that read many wordings understand one that it never read?

Claim (Sanh et al. 2021, T0; Wang et al. 2022, Self-Instruct). Tasks asked in several wordings, drawn at random, teach the
intent; one fixed wording teaches the wording, and another then finds the model lost.

Every task of the village has four phrasings. The last is held out everywhere, in pretraining too:

    0  What does the cow say?         1  Which sound does the cow make?
    2  How does the cow sound?        3  The cow says what?

Copies of OUT/gpt.pt are fine-tuned on equal tokens of school-like demonstrations (each has full marks): one reads every task in
phrasing 0, another in phrasings 0 and 1, the last in 0, 1 and 2. Then all answer the same new tasks in each phrasing.
The pretrained model has met phrasings 0 to 2 in books; so the difference on 1 and 2 shows what fine-tuning narrows, and the
difference on 3 shows what it can teach.

    python lab/templates.py                three seeds
    python lab/templates.py --seeds 1      a first look

Two minutes on two CPU cores. Needs OUT/gpt.pt, and pretrains it first when it is missing. Read next: lab/forgetting.py.
"""
import random, sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt, sft
from data import village
from lab.cot import base_model, spread


@dataclass
class Config:
    out: str = "out"
    "folder of the run; its gpt.pt is where every copy starts"
    tokens: int = 120_000
    "tokens of demonstrations that are read in one epoch"
    epochs: int = 2
    "passes over them"
    lr: float = 1e-3
    "peak learning rate, cosine to a tenth; sft.py's"
    batch_tokens: int = 1024
    "tokens per step, padding included"
    n: int = 200
    "new tasks, each asked in all four phrasings"
    seeds: int = 3
    "repetitions, each with its own demonstrations and tasks; the table has mean and range"
    seed: int = 0
    "first seed"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


RUNS = {"one": [0], "two": [0, 1], "three": [0, 1, 2]}


def careful(task, rng):
    """A demonstration with full marks: the web's way of answering, tried again until the grader is content."""
    while True:
        answer = village.demonstration(task, rng)
        if village.gold(task, answer) > 0.99:   # three wishes of three make 1.0000000000000002
            return answer


def ask(number, phrasing, use=None):
    """Task `number` -> (task, messages). The number decides everything but the wording; use cases come equally often."""
    rng = random.Random(f"task {number}")
    return village.new_task(rng, use=use or rng.choice(list(village.SHARES)), phrasing=phrasing)


def demonstrations(enc, phrasings, tokens, seed, use=None):
    """Chats of full marks until they make `tokens` tokens; each is asked in one of the phrasings. Even numbers: for training."""
    rng, chats, used, number = random.Random(seed), [], 0, seed * 10**6
    while used < tokens:
        task, messages = ask(number, rng.choice(phrasings), use)
        chats.append({"messages": messages + [{"role": "assistant", "content": careful(task, rng)}], "task": task})
        used, number = used + len(sft.render(chats[-1]["messages"], enc)[0]), number + 2
    return chats


def new_tasks(n, seed, phrasing, use=None):
    """n tasks that no run of this seed was trained on, by their numbers. Odd numbers: for the test."""
    return [ask(seed * 10**6 + 2 * i + 1, phrasing, use) for i in range(n)]


def grade(model, enc, tasks):
    """Mean gold of greedy answers to (task, messages)."""
    answers = sft.reply(model, enc, [m for _, m in tasks], 64, temperature=0)
    return sum(village.gold(t, a) for (t, _), a in zip(tasks, answers)) / len(tasks)


def verdict(rows, gain=0.05):
    """One sentence: three wordings must beat one by `gain` of gold on the held-out wording, in every seed."""
    by = {(r["run"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    gains = {p: [by["three", s][f"phrasing_{p}"] - by["one", s][f"phrasing_{p}"] for s in seeds] for p in range(4)}
    mean = {p: sum(g) / len(g) for p, g in gains.items()}
    known = sum(by["two", s]["phrasing_2"] - by["one", s]["phrasing_2"] for s in seeds) / len(seeds)
    return (f"the claim {'holds' if min(gains[3]) >= gain else 'does not hold'} here: three wordings instead of one change gold "
            f"on the held-out wording by {mean[3]:+.2f} (worst seed {min(gains[3]):+.2f}; wanted {gain:+.2f}), on those "
            f"that only three read by {(mean[1] + mean[2]) / 2:+.2f}, on the one that both read by {mean[0]:+.2f}; two instead of "
            f"one, on a wording that only pretraining knew, by {known:+.2f}")


def main(cfg):
    gpt.require(cfg, 1, "tokens", "epochs", "batch_tokens", "n", "seeds")
    gpt.require(cfg, 0, "lr", most=10)
    load, rows, log = base_model(cfg), [], Path(cfg.out) / "lab-templates.jsonl"
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for run, phrasings in RUNS.items():
            gpt.set_seed(seed)
            model, enc = load()
            chats = demonstrations(enc, phrasings, cfg.tokens, seed)
            examples = sft.tokenize(chats, enc, model.config.block_size)
            for epoch in sft.tune(model, examples, cfg.epochs, cfg.batch_tokens, cfg.lr, seed, "templates"):
                print(f"seed {seed}, {run}: {len(chats):,} demonstrations, epoch {epoch} done", flush=True)
            row = dict(run=run, seed=seed, demonstrations=len(chats))
            row |= {f"phrasing_{p}": grade(model, enc, new_tasks(cfg.n, seed, p)) for p in range(4)}
            rows.append(row)
            gpt.log_metrics(log, fresh=len(rows) == 1, **row)
    print(f"\n{'wordings':10}" + "".join(f"{'gold, phrasing ' + str(p) + (' (new)' if p == 3 else ''):24}" for p in range(4)))
    for run in RUNS:
        mine = [r for r in rows if r["run"] == run]
        print(f"{run:10}" + "".join(f"{spread([r[f'phrasing_{p}'] for r in mine]):24}" for p in range(4)))
    print(f"\n{verdict(rows)}")


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
