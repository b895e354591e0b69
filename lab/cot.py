"""Chain of thought: does a model add up better when its demonstrations show the steps?

Claim (Wei et al. 2022; Chung et al. 2022, FLAN). A few demonstrations with worked steps among many others improve the
answers to questions of several steps, and leave the other tasks as good as they were.

A model spends the same work on every token. An answer that is one number must be had in two layers; steps are tokens, each
of which is easy given those before it:

    What do cake, milk and tea cost?       with steps    cake 9. milk 1, 10. tea 2, 12. So 12.
                                           without       12.

Four copies of OUT/gpt.pt read the same demonstrations of the usual tasks, mixed with sums of two to four prices:

    steps           sums with steps, TOKENS tokens of them
    answers         sums without, the same number of tokens: more sums are seen, because each is shorter
    answers, same n sums without, as many sums as with steps: fewer tokens
    no sums         the usual demonstrations alone

The sums are tested on sets of foods that no training sum had in any order; the usual tasks by their gold grade.

    python lab/cot.py                      three seeds, each with its own held-out sets
    python lab/cot.py --seeds 1            a first look

Four minutes on two CPU cores. Needs OUT/gpt.pt, and pretrains it first when it is missing. Read next: lab/icl.py.
"""
import random, sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt, sft
from data import village
from run import announce


@dataclass
class Config:
    out: str = "out"
    "folder of the run; its gpt.pt is where every copy starts"
    tokens: int = 150_000
    "tokens of sums that are read in one epoch"
    demos: int = 2000
    "demonstrations of the usual tasks among them"
    epochs: int = 2
    "passes over both"
    lr: float = 2e-3
    "peak learning rate, cosine to a tenth; arithmetic is new to the model and wants more than sft.py's"
    batch_tokens: int = 512
    "tokens per step, padding included; sums are learned by many small steps"
    n: int = 200
    "held-out sums of each size to answer, and validation prompts of the usual tasks"
    seeds: int = 3
    "repetitions, each with its own sums, held-out sets and order; the table has mean and range"
    seed: int = 0
    "first seed"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


PRICE = {food: int(price) for food, price in village.FACTS["price"].items()}
SIZES = (2, 3, 4)   # foods of a sum
RUNS = dict(steps="steps", answers="answers, same tokens", same="answers, same number", none="no sums")


def make_sum(rng, size):
    """-> {"foods", "question", "steps", "total"}: what `size` different foods cost together, everybody knows what each costs."""
    foods = rng.sample(list(PRICE), size)
    total, steps = PRICE[foods[0]], [f"{foods[0]} {PRICE[foods[0]]}."]
    for food in foods[1:]:
        total += PRICE[food]
        steps.append(f"{food} {PRICE[food]}, {total}.")
    question = f"What do {', '.join(foods[:-1])} and {foods[-1]} cost?"
    return dict(foods=foods, question=question, steps=" ".join(steps), total=total)


def held_out(foods, seed, share=0.2):
    """Whether this set of foods, in whatever order, is kept for the test."""
    return random.Random(f"{seed} {sorted(foods)}").random() < share


def draw_sum(rng, size, seed, test):
    while True:
        found = make_sum(rng, size)
        if held_out(found["foods"], seed) == test:
            return found


def chat_of(task, steps):
    answer = f"{task['steps']} So {task['total']}." if steps else f"{task['total']}."
    return [{"role": "user", "content": task["question"]}, {"role": "assistant", "content": answer}]


def final_number(answer):
    """The last word of an answer as a number, or None: with steps or without, that is what counts."""
    word = answer.strip().removesuffix(".").split(" ")[-1]
    return int(word) if word.isascii() and word.isdigit() else None


def size_of(chats, enc):
    return sum(len(sft.render(c["messages"], enc)[0]) for c in chats)


def training_sums(enc, seed, steps, tokens=None, n=None):
    """Chats until they make `tokens` tokens, or n of them. Of one seed all runs draw the same sums, one longer than the other."""
    rng, chats, used = random.Random(seed), [], 0
    while (used < tokens) if n is None else (len(chats) < n):
        chats.append({"messages": chat_of(draw_sum(rng, rng.choice(SIZES), seed, test=False), steps)})
        used += size_of(chats[-1:], enc)
    return chats


def base_model(cfg, name="gpt.pt"):
    """OUT/gpt.pt or OUT/sft.pt, made first when it is missing. -> a function that loads a fresh copy: (model, tokenizer)."""
    out, stage = gpt.run_folder(cfg.out), {"gpt.pt": gpt, "sft.pt": sft}[name]
    if not (out / name).exists():
        announce(out / name, "training it", False)
        stage.main(stage.Config(out=cfg.out, seed=cfg.seed, device=cfg.device))
    return lambda: gpt.load_model(out / name, gpt.pick_device(cfg.device))[:2]


def spread(values, digits=2):
    """'mean (lowest..highest)' of the repetitions."""
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f}" + (f" ({min(values):.{digits}f}..{max(values):.{digits}f})" if len(values) > 1 else "")


def verdict(rows, gain=0.10, harm=0.05):
    """One sentence from the rows of all seeds: steps must win `gain` of accuracy at equal tokens in every seed, and the usual
    tasks must lose no more than `harm` of gold, on average, against the run that saw no sums."""
    by = {(r["run"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    gains = [by["steps", s]["new_sums"] - by["answers", s]["new_sums"] for s in seeds]
    change = sum(by["steps", s]["gold"] - by["none", s]["gold"] for s in seeds) / len(seeds)
    held = "holds" if min(gains) >= gain and change >= -harm else "does not hold"
    mean = sum(gains) / len(gains)
    return (f"the claim {held} here: at equal tokens steps change the accuracy on new sums by {100 * mean:+.0f} points "
            f"(worst seed {100 * min(gains):+.0f}; wanted {100 * gain:+.0f}), and the gold "
            f"grade of the usual tasks by {change:+.2f} against no sums at all (allowed {-harm:+.2f})")


def accuracy(model, enc, tasks):
    answers = sft.reply(model, enc, [chat_of(t, False)[:1] for t in tasks], 48, temperature=0)
    return sum(final_number(a) == t["total"] for t, a in zip(tasks, answers)) / len(tasks), answers


def main(cfg):
    gpt.require(cfg, 1, "tokens", "demos", "epochs", "batch_tokens", "n", "seeds")
    gpt.require(cfg, 0, "lr", most=10)
    load, log = base_model(cfg), Path(cfg.out) / "lab-cot.jsonl"
    folder, rows = sft.village_data(cfg.out, cfg.seed), []
    usual = sft.load_chats(folder / "sft_train.jsonl")
    kept = sft.load_chats(folder / "sft_val.jsonl")
    prompts = [r for _, r in sft.read_records(folder / "prompts_val.jsonl")]
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        rng = random.Random(seed)
        demos = rng.sample(usual, min(cfg.demos, len(usual)))
        sizes = [size for size in SIZES for _ in range(cfg.n // 3 + 1)]
        new, seen = ([draw_sum(rng, size, seed, test) for size in sizes] for test in (True, False))
        n_steps = None
        for run in RUNS:
            gpt.set_seed(seed)
            model, enc = load()
            n = dict(none=0, same=n_steps).get(run)
            sums = training_sums(enc, seed, run == "steps", cfg.tokens, n)
            n_steps = n_steps or len(sums)
            examples = sft.tokenize(sums + demos, enc, model.config.block_size)
            for epoch in sft.tune(model, examples, cfg.epochs, cfg.batch_tokens, cfg.lr, seed, "cot"):
                print(f"seed {seed}, {RUNS[run]}: {len(sums):,} sums, epoch {epoch} done", flush=True)
            row = dict(run=run, seed=seed, sums=len(sums), tokens=cfg.epochs * size_of(sums + demos, enc))
            row["seen_sums"] = accuracy(model, enc, seen)[0]
            row["new_sums"], answers = accuracy(model, enc, new)
            for size in SIZES:
                right = [final_number(a) == t["total"] for t, a in zip(new, answers) if len(t["foods"]) == size]
                row[f"new_of_{size}"] = sum(right) / len(right)
            said = sft.reply(model, enc, [r["prompt"] for r in prompts], 64, seed=seed)
            row["gold"] = sum(village.gold(r["task"], a) for r, a in zip(prompts, said)) / len(prompts)
            row["loss"] = sft.evaluate(model, sft.tokenize(kept, enc, model.config.block_size), model.wte.weight.device)
            row["sample"] = f"{new[-1]['question']} {answers[-1]}"
            rows.append(row)
            gpt.log_metrics(log, fresh=len(rows) == 1, **row)
    columns = ("seen_sums", "new_sums", *(f"new_of_{size}" for size in SIZES), "gold", "loss")
    print(f"\n{'':21} {'sums':>6} {'tokens':>8}  " + "".join(f"{c:19}" for c in columns))
    for run, name in RUNS.items():
        mine = [r for r in rows if r["run"] == run]
        cells = (spread([r[c] for r in mine]) for c in columns)
        print(f"{name:21} {mine[0]['sums']:6,} {mine[0]['tokens']:8,}  " + "".join(f"{c:19}" for c in cells))
    print("".join(f"\n{RUNS[r['run']]:21} {r['sample']}" for r in rows[-4:]) + f"\n\n{verdict(rows)}")


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
