"""ROUGE against preference: does overlap with a reference tell which response people prefer?

Claim (the case for RLHF; Stiennon et al. 2020, figure 4). ROUGE counts shared words, so it cannot
express human preference. A model trained on preferences can.

The gold program orders the ranked responses of held-out users. Five judges that do not know it
order the same responses:

    ROUGE-L, demonstration   overlap with a response from the training data: careless, and rude
                             one time in four
    ROUGE-L, ideal           overlap with a response that gets full marks, which nobody has in
                             practice
    length                   the longer the better
    reward model             OUT/reward.pt, trained on rankings of other users
    labeler                  the simulated labeler's ranking, noise included; the reward model was
                             trained on such rankings

The second test makes pairs in which words and meaning disagree: a right response worded
differently from the reference, and a wrong one with mostly the same words. ROUGE must fail on
these. The question is whether the reward model does better.

    python lab/rouge.py                    OUT/data/ranked_val.jsonl and three sets of made pairs
    python lab/rouge.py --out out/seed1    another run

Half a minute on one CPU core. Needs OUT/reward.pt and trains it first if it is missing.
Read next: lab/attention.py.
"""
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import reward
from data import labelers, village
from data.formats import load_comparisons
from data.rankings import pair_accuracy
from lab.cot import mean, print_table, spread
from scaffold.cli import BaseConfig, pick_device, require, run_folder, start
from scaffold.run import ensure_stage, log_metrics
from self_instruct import rouge_l


@dataclass
class Config(BaseConfig):
    n: int = 300                 # ranked prompts, and made pairs of each kind
    seeds: int = 3               # repetitions with their own references and made pairs
    seed: int = 0                # first seed, also that of the run if it must be made first


MADE = {                                    # kind of made pair -> the use case of its tasks
    "short but right": "open_qa",
    "another list": "brainstorm",
    "polite": "summary",
    "other ignorance": "closed_qa",
}


class Agreement(NamedTuple):
    """How well a judge agrees with gold."""
    accuracy: float         # share of pairs ordered as gold does
    spearman: float         # mean rank correlation within a prompt


class MadePair(NamedTuple):
    """right is worded differently from the reference; wrong has mostly the same words."""
    task: dict
    prompt: list
    reference: str
    right: str
    wrong: str


class Choices(NamedTuple):
    """Share of made pairs in which a judge prefers the right response."""
    rouge: float
    reward: float


def average_ranks(x):
    """Rank from 0; equal values share their mean rank: [3.0, 1.0, 3.0] -> [1.5, 0.0, 1.5]."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) - 1) / 2 for a in x]


def spearman(x, y):
    """Return the rank correlation of two lists; 0 if one of them is constant."""
    x = average_ranks(x)
    y = average_ranks(y)
    centre = (len(x) - 1) / 2

    def covariance(p, q):
        return sum((a - centre) * (b - centre) for a, b in zip(p, q))

    scale = covariance(x, x) * covariance(y, y)
    return covariance(x, y) / scale ** 0.5 if scale else 0.0


def ideal(task, rng, tries=3000):
    """Draw demonstrations until one gets full marks; return it, or the best of all tries."""
    best = village.demonstration(task, rng)
    for _ in range(tries - 1):
        if village.gold(task, best) == 1:
            break
        response = village.demonstration(task, rng)
        if village.gold(task, response) > village.gold(task, best):
            best = response
    return best


def listed(words):
    """['cat', 'dog', 'cow'] -> 'cat, dog and cow.'"""
    start = ", ".join(words[:-1]) + " and " if len(words) > 1 else ""
    return f"{start}{words[-1]}."


def made_pair(kind, rng):
    """Draw a MadePair of one of the kinds of MADE."""
    while True:
        task, prompt = village.new_task(rng, use=MADE[kind])
        if task.get("known", True) == (kind != "other ignorance"):
            break
    if kind == "another list":
        words = village.WORDS[task["topic"]]
        named = rng.sample(words, 2 + village.WORDS["number"].index(task["number"]))
        others = rng.sample([w for w in words if w not in named], len(named))
        return MadePair(task, prompt, listed(named), right=listed(others), wrong=listed(named[:-1]))
    if kind == "other ignorance":
        reference, right = rng.sample(village.IGNORANCE, 2)
        return MadePair(task, prompt, reference, right, wrong=made_rude(reference, rng))
    form = village.KINDS[task["kind"]].FORMS[task["topic"]]
    reference = form.full.format(**task)
    asked = village.slots(form.full)[-1]
    other_words = [w for w in village.WORDS[asked] if w != task[asked]]
    wrong = form.full.format(**task | {asked: rng.choice(other_words)})
    if kind == "polite":
        wrong = made_rude(reference, rng)
    return MadePair(task, prompt, reference, form.short.format(**task), wrong)


def made_rude(response, rng):
    return f"{response} {village.RUDE_LINES[3 + rng.randrange(3)]}"


def judge(records, rewards, rng):
    """Return {judge: Agreement} over the records; pairs of equal gold do not count.

    rewards: the reward model's scores of all responses of all records, in order.
    """
    golds = []
    names = ("ROUGE-L, demonstration", "ROUGE-L, ideal", "length", "reward model", "labeler")
    scores = {name: [] for name in names}       # one list per record
    start = 0
    for record in records:
        task, responses = record["task"], record["responses"]
        demonstration = village.demonstration(task, rng)
        best = ideal(task, rng)
        end = start + len(responses)
        golds.append([village.gold(task, r) for r in responses])
        scores["ROUGE-L, demonstration"].append([rouge_l(demonstration, r) for r in responses])
        scores["ROUGE-L, ideal"].append([rouge_l(best, r) for r in responses])
        scores["length"].append([len(r.split()) for r in responses])
        scores["reward model"].append(rewards[start:end])
        scores["labeler"].append([-rank for rank in record["ranks"]])
        start = end
    gold_ranks = [[-gold for gold in row] for row in golds]
    graded = [i for i, row in enumerate(golds) if len(set(row)) > 1]
    agreement = {}
    for name in names:
        accuracy, _ = pair_accuracy(scores[name], gold_ranks)
        correlation = mean([spearman(scores[name][i], golds[i]) for i in graded])
        agreement[name] = Agreement(accuracy, correlation)
    return agreement


def share_right(scores):
    """Return how often the right response scores higher, from [right, wrong, right, wrong, ...]."""
    pairs = list(zip(scores[::2], scores[1::2]))
    return pair_accuracy(pairs, [(1, 2)] * len(pairs))[0]        # a tie counts half


def judge_made(n, model, enc, rng):
    """Return {kind: Choices} over n made pairs of each kind.

    Pairs in which gold does not prefer the right response do not count.
    """
    choices = {}
    for kind in MADE:
        prompts = []
        responses = []
        overlaps = []
        for _ in range(n):
            pair = made_pair(kind, rng)
            if village.gold(pair.task, pair.right) <= village.gold(pair.task, pair.wrong):
                continue
            for response in (pair.right, pair.wrong):
                prompts.append(pair.prompt)
                responses.append(response)
                overlaps.append(rouge_l(pair.reference, response))
        rewards = reward.score_responses(model, enc, prompts, responses)
        choices[kind] = Choices(share_right(overlaps), share_right(rewards))
    return choices


def verdict(agreements, made):
    """Judge the claim from the numbers of all seeds, in one sentence.

    With a demonstration as the reference, ROUGE-L must order fewer pairs as gold does than the
    reward model, in every seed. The results with an ideal reference and on made pairs are reported
    as well.
    """
    def loses(name):
        return all(r[name].accuracy < r["reward model"].accuracy for r in agreements)

    holds = loses("ROUGE-L, demonstration")
    beside_ideal = "worse, too" if loses("ROUGE-L, ideal") else "not always worse"
    rouge_misled = [kind for kind in MADE if mean([m[kind].rouge for m in made]) < 0.5]
    reward_misled = [kind for kind in MADE if mean([m[kind].reward for m in made]) < 0.5]
    named = f" ({', '.join(reward_misled)})" if reward_misled else ""
    return (f"The claim {'holds' if holds else 'does not hold'} here: ROUGE-L to a demonstration "
            f"orders the responses {'worse' if holds else 'not always worse'} than the reward "
            f"model, to an ideal reference {beside_ideal}; of the {len(MADE)} kinds of made pairs, "
            f"shared words mislead ROUGE-L in {len(rouge_misled)}, and the reward model in "
            f"{len(reward_misled)}{named}.")


def print_results(agreements, made):
    """Print means and ranges over the seeds."""
    print_table([{"judge": name,
                  "pairs as gold": spread([r[name].accuracy for r in agreements], 3),
                  "Spearman with gold": spread([r[name].spearman for r in agreements], 3)}
                 for name in agreements[0]])
    print()
    print_table([{"made pairs": kind,
                  "ROUGE-L right": spread([m[kind].rouge for m in made], 3),
                  "reward model right": spread([m[kind].reward for m in made], 3)}
                 for kind in MADE])


def main(cfg):
    require(cfg, 1, "n", "seeds")
    device = pick_device(cfg.device)
    out = run_folder(cfg.out)
    ensure_stage(out / "reward.pt", reward, cfg)
    model, enc = reward.load_reward(out / "reward.pt", device)
    records = load_comparisons(labelers.ensure(out, cfg.seed, cfg.device)[1])[:cfg.n]
    prompts = [r["prompt"] for r in records for _ in r["responses"]]
    responses = [response for r in records for response in r["responses"]]
    rewards = reward.score_responses(model, enc, prompts, responses)
    agreements = []                             # one {judge: Agreement} per seed
    made = []                                   # one {kind: Choices} per seed
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        rng = random.Random(seed)
        agreements.append(judge(records, rewards, rng))
        made.append(judge_made(cfg.n, model, enc, rng))
        log_metrics(out / "lab-rouge.jsonl", fresh=seed == cfg.seed, seed=seed,
                    judges=agreements[-1], made=made[-1])
    print(f"{len(records)} prompts of held-out users, {len(responses):,} responses, "
          f"{cfg.seeds} sets of references")
    print_results(agreements, made)
    example = made_pair("short but right", random.Random(cfg.seed))
    print(f"example: {example.prompt[-1]['content']!r}  reference {example.reference!r}  "
          f"right {example.right!r}  wrong {example.wrong!r}")
    print(verdict(agreements, made))


if __name__ == "__main__":
    start(main, Config, __doc__)
