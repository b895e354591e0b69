"""In-context learning: a base model solves a task from a few examples in its prompt, with no training at all.

Claim (Brown et al. 2020; Min et al. 2022). More examples help; whether their labels are right hardly matters, but that they
are of the same domain and in the same format does.

The prompt is a page of examples, then a text alone. Nothing says what is asked but the page. The base model OUT/gpt.pt,
never tuned, goes on:

    The cow says moo.           Ann is proud.
    The hen says cluck.         This is happy.
    The dog                     Tom is tired.
            says woof.
                                        This is sad.

Five kinds of pages:    right         texts of the task with their labels
                        shuffled      the same texts, the labels of the page's eight examples dealt out anew
                        wrong         the same texts, every label replaced by another of the task
                        other domain  texts and labels of another task
                        other format  the same texts and labels, written 'label: text'

The village's texts are short: no page of facts has more than three lines. So the prompts of 4 and 8 examples are longer than
anything of their kind that the base model has read, and the second group of rows shows what reading longer pages mends.

Scored in two ways: the likeliest of the task's labels (chance is printed), and greedy generation. The second group
is a copy of the model that read on for a while: pages of 2 to 9 examples of other tasks than those tested (MetaICL).

    python lab/icl.py                      three seeds
    python lab/icl.py --read-on 0          the base model alone

Two minutes on two CPU cores. Needs OUT/gpt.pt, and pretrains it first when it is missing. Read next: lab/templates.py.
"""
import random, sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt, sft
from data.village import FACTS, GOOD_MOODS, RUDE_LINES, WORDS
from lab.cot import base_model, spread


@dataclass
class Config:
    out: str = "out"
    "folder of the run; its gpt.pt is asked"
    n: int = 64
    "queries per task, each with examples of its own"
    read_on: int = 400
    "steps that the copy reads on, on pages of other tasks; 0 leaves it out"
    lr: float = 5e-4
    "learning rate of reading on"
    batch_tokens: int = 1024
    "tokens per step of reading on"
    seeds: int = 3
    "repetitions, each with its own queries and examples; the table has mean and range"
    seed: int = 0
    "first seed"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


SHOTS = (0, 1, 2, 4, 8)
PAGES = ("right", "shuffled", "wrong", "other domain", "other format")


def tone(rng):
    mood = rng.choice(WORDS["mood"])
    return f"{rng.choice(WORDS['person'])} is {mood}.\n", "This is happy" if mood in GOOD_MOODS else "This is sad"


def manners(rng):
    if rng.random() < 0.5:
        return rng.choice(RUDE_LINES) + "\n", "This is rude"
    return f"Could you please give me the {rng.choice(WORDS['thing'])}?\n", "This is polite"


def fact(name, form):
    """A task whose answers everybody in the village knows; the space belongs to the label, as it does to the word's token."""
    def draw(rng):
        key, value = rng.choice(list(FACTS[name].items()))
        return f"The {key}", form.format(value)
    return draw, [form.format(value) for value in sorted(set(FACTS[name].values()))]


TESTED = dict(tone=(tone, ["This is happy", "This is sad"]), manners=(manners, ["This is polite", "This is rude"]),
              sound=fact("sound", " says {}"), feed=fact("feed", " eats {}"))
OTHER = dict(tone="sound", manners="feed", sound="tone", feed="manners")   # neither its texts nor its labels
READ = dict(price=fact("price", " costs {} coins"), ware=fact("ware", " sells {}"), work=fact("work", " works at the {}"),
            hanzi=fact("hanzi", " is {} in Chinese"))


def line(text, label):
    return f"{text}{label}.\n"


def examples_of(draw, query, rng, n=max(SHOTS)):
    """n examples (text, label), none with the query's text: else the answer could be copied."""
    found = []
    while len(found) < n:
        example = draw(rng)
        if example[0] != query:
            found.append(example)
    return found


def shuffled(examples, rng):
    """The same texts and the same labels, dealt out anew."""
    labels = [label for _, label in examples]
    rng.shuffle(labels)
    return [(text, label) for (text, _), label in zip(examples, labels)]


def wrong(examples, labels, rng):
    return [(text, rng.choice([x for x in labels if x != label])) for text, label in examples]


def page(kind, shots, name, query, rng):
    """The prompt: `shots` examples as the kind of page has them, then the query. Of one rng state, fewer are a part of more."""
    draw, labels = TESTED[name]
    examples = examples_of(draw, query, rng)
    if kind == "shuffled":
        examples = shuffled(examples, rng)
    elif kind == "wrong":
        examples = wrong(examples, labels, rng)
    elif kind == "other domain":
        examples = examples_of(TESTED[OTHER[name]][0], query, rng)
    write = (lambda text, label: f"{label.strip()}: {text.strip()}\n") if kind == "other format" else line
    return "".join(write(*e) for e in examples[:shots]) + query


@torch.no_grad()
def likeliest(model, enc, prompts, labels, device, batch=256):
    """The label with the highest log p(label and its full stop | prompt), for each prompt."""
    rows = []
    for prompt in prompts:
        start = enc.encode_ordinary(prompt)
        for label in labels:
            said = enc.encode_ordinary(label + ".")
            rows.append((torch.tensor(start + said), torch.tensor([0] * len(start) + [1] * len(said))))
    scores = []
    for i in range(0, len(rows), batch):
        ids, mask = (t.to(device) for t in sft.collate(rows, range(i, min(i + batch, len(rows)))))        # (B, T) each
        scores.append((gpt.token_logprobs(model, ids) * mask[:, 1:]).sum(1).cpu())                        # (B,)
    best = torch.cat(scores).view(len(prompts), len(labels)).argmax(1)                                    # (N,)
    return [labels[i] for i in best.tolist()]


def generated(model, enc, prompts):
    """What greedy decoding writes up to the end of the line, without its full stop."""
    ids = gpt.generate(model, [enc.encode_ordinary(p) for p in prompts], 12, temperature=0, stop=gpt.end_of(enc))
    return [enc.decode([i for i in row if i < len(enc._mergeable_ranks)]).split("\n")[0].removesuffix(".") for row in ids]


def read_on(model, enc, cfg, seed):
    """Next-token training on pages of other tasks: 2 to 9 lines of one of them, as a page of examples and its query would be."""
    rng, device = random.Random(seed), model.wte.weight.device
    optimizer = gpt.adamw(model, cfg.lr)
    model.train()
    for step in range(cfg.read_on):
        texts, n = [], 0
        while n < cfg.batch_tokens:
            draw = READ[rng.choice(list(READ))][0]
            text = "".join(line(*draw(rng)) for _ in range(rng.randint(2, 9)))
            texts.append(torch.tensor((enc.encode_ordinary(text) + [gpt.end_of(enc)])[:model.config.block_size]))
            n += len(texts[-1])
        ids, segments = (t.to(device) for t in gpt.pack(texts, model.config.block_size))                  # (B, T) each
        gpt.take_step(gpt.lm_loss(model, ids, segments), optimizer, model, gpt.lr_at(step, cfg.read_on, cfg.lr))
    model.eval()


def measure(model, enc, cfg, seed, device):
    """-> rows {task, page, shots, likely, generated}: accuracies. All cells ask the same queries."""
    rows = []
    for name, (draw, labels) in TESTED.items():
        queries = [draw(random.Random(f"{seed} {name} {i}")) for i in range(cfg.n)]
        for kind in PAGES:
            for shots in SHOTS if kind == "right" else SHOTS[1:]:   # without examples all pages are the same
                prompts = [page(kind, shots, name, q, random.Random(f"{seed} page {i}")) for i, (q, _) in enumerate(queries)]
                likely, said = likeliest(model, enc, prompts, labels, device), generated(model, enc, prompts)
                rows.append(dict(task=name, page=kind, shots=shots, chance=1 / len(labels),
                                 likely=sum(a == b for a, (_, b) in zip(likely, queries)) / cfg.n,
                                 generated=sum(a == b for a, (_, b) in zip(said, queries)) / cfg.n))
    return rows


def accuracy(rows, model, kind, shots, score="likely"):
    """Mean over tasks of each seed's rows: one number per seed. Shots 0 belong to the right page, and stand for all."""
    kind, seeds = kind if shots else "right", sorted({r["seed"] for r in rows})
    cells = [[r[score] for r in rows if (r["model"], r["page"], r["shots"], r["seed"]) == (model, kind, shots, s)] for s in seeds]
    return [sum(c) / len(c) for c in cells]


def verdict(rows, model, score, margin=0.05):
    """Which parts of the claim hold for this model, by mean accuracy of a score, at the number of shots where right labels do
    best; `margin` counts as a difference. Where examples do not help, indifferent labels say nothing: the claim does not hold."""
    right = {s: sum(x) / len(x) for s in SHOTS for x in [accuracy(rows, model, "right", s, score)]}
    best = max(SHOTS[1:], key=right.get)
    mean = {kind: sum(x) / len(x) for kind in PAGES for x in [accuracy(rows, model, kind, best, score)]}
    parts = {"examples help": mean["right"] - right[0] > margin,
             "the more the better": right[SHOTS[-1]] >= right[best] - margin,
             "shuffled labels hardly matter": mean["right"] - mean["shuffled"] <= margin,
             "wrong labels hardly matter": mean["right"] - mean["wrong"] <= margin,
             "another domain is worse": mean["right"] - mean["other domain"] > margin,
             "another format is worse": mean["right"] - mean["other format"] > margin}
    held = "holds" if all(parts.values()) else "holds in part" if parts["examples help"] else "does not hold"
    return f"{model}, {score}: the claim {held} here, at {best} shots: " + "; ".join(
        f"{k}: {'yes' if v else 'no'}" for k, v in parts.items())


def main(cfg):
    gpt.require(cfg, 1, "n", "batch_tokens", "seeds")
    gpt.require(cfg, 0, "read_on")
    gpt.require(cfg, 0, "lr", most=10)
    load, rows, log, device = base_model(cfg), [], Path(cfg.out) / "lab-icl.jsonl", gpt.pick_device(cfg.device)
    models = ["base"] + ["read on"] * (cfg.read_on > 0)
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        gpt.set_seed(seed)
        model, enc = load()
        for name in models:
            if name == "read on":
                read_on(model, enc, cfg, seed)
            for row in measure(model, enc, cfg, seed, device):
                rows.append(dict(model=name, seed=seed, **row))
                gpt.log_metrics(log, fresh=len(rows) == 1, **rows[-1])
            print(f"seed {seed}, {name}: done", flush=True)
    chance = sum(1 / len(labels) for _, labels in TESTED.values()) / len(TESTED)
    for score in ("likely", "generated"):
        print(f"\n{'likeliest label' if score == 'likely' else 'greedy generation'}, mean of {', '.join(TESTED)}"
              + (f" (chance {chance:.2f})" if score == "likely" else "") + f"\n{'shots':24}" + "".join(f"{s:<18}" for s in SHOTS))
        for name in models:
            for kind in PAGES:
                print(f"{name:8}{kind:16}" + "".join(f"{spread(accuracy(rows, name, kind, s, score)):18}" for s in SHOTS))
    print(f"\n{'right labels by task':24}" + "".join(f"{s:<18}" for s in SHOTS))
    for name in models:
        for task in TESTED:
            mine = [r for r in rows if r["task"] == task]
            print(f"{name:8}{task:16}" + "".join(f"{spread(accuracy(mine, name, 'right', s)):18}" for s in SHOTS))
    print("\n" + "\n".join(verdict(rows, name, score) for name in models for score in ("likely", "generated")))


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
