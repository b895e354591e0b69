"""ROUGE against preference: does overlap with a reference answer say which answer people like better?

Claim (the case for RLHF; Stiennon et al. 2020, figure 4). ROUGE counts shared words, so it cannot express human preference; a
model trained on preferences can.

The ranked answers of held-out users are ordered by what the gold program says of them, and by five judges that do not know it:

    ROUGE-L, demonstration   overlap with an answer as the training data have it: careless, one in four rude
    ROUGE-L, ideal           overlap with an answer that gold gives full marks: more than anybody has in practice
    length                   the longer the better
    reward model             OUT/reward.pt, which saw rankings of other users
    labeler                  the simulated person's own ranking: what the reward model learned from, noise included

and pairs are made where words and meaning part: a right answer in other words than the reference, and a wrong one in its words.
(ROUGE must lose these; the question is whether the reward model does any better.)

    python lab/rouge.py                    OUT/data/ranked_val.jsonl and three sets of made pairs
    python lab/rouge.py --out out/seed1    another run

Half a minute on one CPU core. Needs OUT/reward.pt and trains it first when it is missing. Read next: lab/attention.py.
"""
import random, sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt, reward
from data import labelers, village
from run import announce


@dataclass
class Config:
    out: str = "out"
    "folder of the run"
    n: int = 300
    "ranked prompts, and made pairs of each kind"
    seeds: int = 3
    "sets of references and of made pairs; the table has mean and range"
    seed: int = 0
    "of the run, if it has to be made, and of the first set"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


def average_ranks(x):
    """[3.0, 1.0, 3.0] -> [1.5, 0.0, 1.5]: equal values share the mean of their places."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) - 1) / 2 for a in x]


def spearman(x, y):
    """Correlation of the ranks, ties shared; 0 where one side has no order at all."""
    n, (x, y) = len(x), (average_ranks(x), average_ranks(y))
    centre = (n - 1) / 2
    cov, vx, vy = (sum((a - centre) * (b - centre) for a, b in zip(p, q)) for p, q in ((x, y), (x, x), (y, y)))
    return cov / (vx * vy) ** 0.5 if vx * vy else 0.0


def ideal(task, rng, tries=3000):
    """A demonstration with full marks: drawn until one has them, else the best one drawn."""
    best = ""
    for _ in range(tries):
        answer = village.demonstration(task, rng)
        if not best or village.gold(task, answer) > village.gold(task, best):
            best = answer
        if village.gold(task, best) == 1:
            break
    return best


def made_pair(kind, rng):
    """-> (task, chat, reference, a right answer in other words, a wrong one in the reference's words)."""
    use = {"short but right": "open_qa", "another list": "brainstorm", "polite": "summary", "other ignorance": "closed_qa"}[kind]
    while True:
        task, chat = village.new_task(rng, use=use)
        if use == "brainstorm" or task["known"] != (kind == "other ignorance"):
            break
    if use == "brainstorm":
        words = village.WORDS[task["topic"]]
        named = rng.sample(words, 2 + village.WORDS["number"].index(task["number"]))
        other = rng.sample([w for w in words if w not in named], len(named))
        return task, chat, *(", ".join(w[:-1]) + (" and " if w[1:] else "") + w[-1] + "." for w in (named, other, named[:-1]))
    if kind == "other ignorance":
        reference, other = rng.sample(village.IGNORANCE, 2)
        return task, chat, reference, other, f"{reference} {village.RUDE_LINES[3 + rng.randrange(3)]}"
    _, whole, lazy, _ = village.KINDS[task["kind"]].FORMS[task["topic"]]
    asked = village.slots(whole)[-1]
    wrong = task | {asked: rng.choice([w for w in village.WORDS[asked] if w != task[asked]])}
    reference = whole.format(**task)
    overlap = whole.format(**wrong) if kind == "short but right" else f"{reference} {village.RUDE_LINES[3 + rng.randrange(3)]}"
    return task, chat, reference, lazy.format(**task), overlap


MADE = ("short but right", "another list", "polite", "other ignorance")


def judge(records, rewards, rng):
    """-> {judge: (share of pairs ordered as gold does, mean Spearman within a prompt)}; pairs of equal gold do not count.

    rewards: the reward model's scores of all answers, in order.
    """
    from self_instruct import rouge_l
    golds, scores, rewards = [], {}, iter(rewards)
    for r in records:
        golds.append([village.gold(r["task"], a) for a in r["responses"]])
        references = {"ROUGE-L, demonstration": village.demonstration(r["task"], rng), "ROUGE-L, ideal": ideal(r["task"], rng)}
        for name, reference in references.items():
            scores.setdefault(name, []).append([rouge_l(reference, a) for a in r["responses"]])
        scores.setdefault("length", []).append([len(a.split()) for a in r["responses"]])
        scores.setdefault("reward model", []).append([next(rewards) for _ in r["responses"]])
        scores.setdefault("labeler", []).append([-k for k in r["ranks"]])
    graded = [i for i, g in enumerate(golds) if len(set(g)) > 1]
    return {name: (reward.pair_accuracy(s, [[-g for g in row] for row in golds])[0],
                   sum(spearman(s[i], golds[i]) for i in graded) / len(graded)) for name, s in scores.items()}


def judge_made(n, model, enc, rng):
    """-> {kind: (ROUGE-L's share of right choices, the reward model's)}; a tie counts half."""
    from self_instruct import rouge_l
    table = {}
    for kind in MADE:
        pairs = [p for p in (made_pair(kind, rng) for _ in range(n)) if village.gold(p[0], p[3]) > village.gold(p[0], p[4])]
        rewards = reward.score_answers(model, enc, [p[1] for p in pairs for _ in "rw"], [a for p in pairs for a in p[3:]])
        overlap = [rouge_l(p[2], a) for p in pairs for a in p[3:]]
        table[kind] = tuple(reward.pair_accuracy(list(zip(s[::2], s[1::2])), [(1, 2)] * len(pairs))[0] for s in (overlap, rewards))
    return table


def spread(values):
    return f"{sum(values) / len(values):6.3f} ({min(values):.3f} to {max(values):.3f})"


def verdict(runs, made):
    """The claim, put to the numbers of all seeds: with a reference that can be had, ROUGE orders fewer pairs as gold does than the
    reward model. What an ideal reference, and the made pairs, do to that is said beside it."""
    holds = all(r["ROUGE-L, demonstration"][0] < r["reward model"][0] for r in runs)
    near = all(r["ROUGE-L, ideal"][0] < r["reward model"][0] for r in runs)
    fooled = [[k for k in MADE if sum(m[k][j] for m in made) < len(made) / 2] for j in (0, 1)]
    return (f"The claim {'holds' if holds else 'does not hold'} here: ROUGE-L to a demonstration orders the answers "
            f"{'worse' if holds else 'not always worse'} than the reward model, to an ideal reference {'worse, too' if near else 'not always worse'}; "
            f"of the {len(MADE)} kinds of made pairs, shared words mislead ROUGE-L in {len(fooled[0])}, and the reward model in {len(fooled[1])}"
            f"{' (' + ', '.join(fooled[1]) + ')' if fooled[1] else ''}.")


def main(cfg):
    gpt.require(cfg, 1, "n", "seeds")
    device, out = gpt.pick_device(cfg.device), gpt.run_folder(cfg.out)
    if not (out / "reward.pt").exists():
        announce(out / "reward.pt", "training it", False)
        reward.main(reward.Config(out=cfg.out, seed=cfg.seed, device=cfg.device))
    model, enc = reward.load_reward(out / "reward.pt", device)
    records = reward.load_comparisons(labelers.ensure(out, cfg.seed, cfg.device)[1])[:cfg.n]
    runs, made, log = [], [], out / "lab-rouge.jsonl"
    flat = [(r["prompt"], a) for r in records for a in r["responses"]]
    rewards = reward.score_answers(model, enc, *zip(*flat))
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        rng = random.Random(seed)
        runs.append(judge(records, rewards, rng))
        made.append(judge_made(cfg.n, model, enc, rng))
        gpt.log_metrics(log, seed=seed, judges=runs[-1], made=made[-1])
    print(f"{len(records)} prompts of held-out users, {sum(len(r['responses']) for r in records):,} answers, {cfg.seeds} sets of references\n"
          f"{'judge':24}{'pairs as gold':>24}{'Spearman with gold':>26}")
    for name in runs[0]:
        print(f"{name:24}{spread([r[name][0] for r in runs]):>24}{spread([r[name][1] for r in runs]):>26}")
    print(f"\n{'made pairs':24}{'ROUGE-L right':>24}{'reward model right':>26}")
    for kind in MADE:
        print(f"{kind:24}{spread([m[kind][0] for m in made]):>24}{spread([m[kind][1] for m in made]):>26}")
    kind = MADE[0]
    task, chat, reference, right, wrong = made_pair(kind, random.Random(cfg.seed))
    print(f"such as: {chat[-1]['content']!r}  reference {reference!r}  right {right!r}  wrong {wrong!r}\n{verdict(runs, made)}")


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
