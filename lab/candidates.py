"""Candidates: should people rank samples, or the best responses of a beam search?

Claim (some notes on InstructGPT say that the K responses to rank come from a beam search; the paper
samples). Beam search gives K different responses, so fewer ties, and likelier ones, so the reward
model learns more from the same prompts.

For the same prompts, K and labelers, the candidates are made in two ways:

    samples          K samples at temperature 1, as data/labelers.py does by default
    beam search      the K likeliest responses that a beam finds; see data/beam.py

A reward model is trained on each and tested on the same rankings of *samples* to prompts of other
users. Samples are what it will score in PPO. Then PPO runs with each.

    python lab/candidates.py                 three seeds
    python lab/candidates.py --seeds 1       a first look

Fifteen minutes on two CPU cores. Needs OUT/sft.pt and trains it first if it is missing.
Read next: lab/reward_size.py.
"""
import itertools
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
import ppo
import reward
import sft
from data import corpus, labelers, village
from data.formats import mean_grade, write_records
from data.records import read_records
from lab.cot import mean, print_table, spread
from scaffold.cli import BaseConfig, pick_device, require, run_folder, start
from scaffold.run import ensure_stage, log_metrics, set_seed
from self_instruct import rouge_l


@dataclass
class Config(BaseConfig):
    prompts: int = 3000          # prompts whose responses are ranked for training
    updates: int = ppo.Config.updates   # of PPO, with each reward model
    n: int = 512                 # held-out prompts to grade PPO's responses on
    seeds: int = 3               # repetitions with their own rankings, reward models and PPO
    seed: int = 0                # first seed


VARIANTS = {"sample": "samples", "beam": "beam search"}


def diversity(records):
    """Measure how much the responses to a prompt differ; both numbers are means over the prompts.

    distinct: share of different strings. rouge_l: mean ROUGE-L of two of the responses, 1 if all
    are the same.
    """
    distinct = [len(set(r["responses"])) / len(r["responses"]) for r in records]
    overlap = []
    for r in records:
        pairs = itertools.combinations(r["responses"], 2)
        overlap.append(mean([rouge_l(a, b) for a, b in pairs]))
    return {"distinct": mean(distinct), "rouge_l": mean(overlap)}


def measure_rlhf(out, folder, train, val, seed, cfg, **settings):
    """Train a reward model and a policy in another folder -> a row of results.

    They start from OUT/sft.pt. train, val: ranked responses; settings: more of reward.Config; cfg:
    has updates, n and device. accuracy and accuracy_against_gold are the reward model's on val;
    ppo_gold is the mean gold of the policy's responses to new prompts.
    """
    folder = Path(folder)
    for name in ("gpt.pt", "sft.pt"):
        shutil.copy(out / name, folder)
    write_records(folder / "train.jsonl", train)
    write_records(folder / "val.jsonl", val)
    shared = dict(out=str(folder), seed=seed, device=cfg.device)
    reward.main(reward.Config(**shared, **settings, data=str(folder / "train.jsonl"),
                              val=str(folder / "val.jsonl")))
    ppo.main(ppo.Config(**shared, prompts=str(out / "data" / "prompts_train.jsonl"),
                        updates=cfg.updates, table=False))
    log = [row for _, row in read_records(folder / "reward.jsonl")]
    _, held_out = [row for row in log if "split" in row]   # training, validation
    policy, enc, _ = gpt.load_model(folder / "ppo.pt", pick_device(cfg.device))
    records = [r for _, r in read_records(out / "data" / "prompts_test.jsonl")][:cfg.n]
    responses = sft.sample_responses(policy, enc, [r["prompt"] for r in records], 64, seed=seed)
    return {
        "accuracy": held_out["accuracy"],
        "accuracy_against_gold": held_out["accuracy_against_gold"],
        "ppo_gold": mean_grade(village.gold, records, responses),
    }


def verdict(rows):
    """Judge the claim from the rows of all seeds, in one sentence.

    It has three parts: with beam search fewer prompts are tied, the reward model is more accurate
    in every seed, and PPO's gold is higher in every seed.
    """
    of = {(r["run"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})

    def gains(key):
        return [of["beam", s][key] - of["sample", s][key] for s in seeds]

    parts = [max(gains("tied")) < 0, min(gains("accuracy")) > 0, min(gains("ppo_gold")) > 0]
    held = "does not hold"
    if all(parts):
        held = "holds"
    elif any(parts):
        held = "holds in part"
    return (f"the claim {held} here: beam search instead of samples changes the share of tied "
            f"prompts by {100 * mean(gains('tied')):+.1f} points, the reward model's accuracy on "
            f"samples by {100 * mean(gains('accuracy')):+.1f} points (worst seed "
            f"{100 * min(gains('accuracy')):+.1f}), and PPO's gold by "
            f"{mean(gains('ppo_gold')):+.2f} (worst seed {min(gains('ppo_gold')):+.2f})")


def print_results(rows):
    """Print means and ranges over the seeds."""
    headings = {
        "different": "distinct", "ROUGE-L of two": "rouge_l", "all tied": "tied",
        "accuracy on samples": "accuracy", "against gold": "accuracy_against_gold",
        "PPO's gold": "ppo_gold",
    }
    table = []
    for name, title in VARIANTS.items():
        chosen = [r for r in rows if r["run"] == name]
        table.append({"candidates": title} | {
            heading: spread([r[key] for r in chosen], 3) for heading, key in headings.items()})
    print_table(table)


def main(cfg):
    require(cfg, 1, "prompts", "n", "seeds")
    require(cfg, ppo.Config.value_warmup + 1, "updates")
    out = run_folder(cfg.out)
    device = pick_device(cfg.device)
    ensure_stage(out / "sft.pt", sft, cfg)
    folder = corpus.ensure(out / "data", cfg.seed)
    train = [r for _, r in read_records(folder / "rank_train.jsonl")][:cfg.prompts]
    val = [r for _, r in read_records(folder / "rank_val.jsonl")]
    model, enc, _ = gpt.load_model(out / "sft.pt", device)
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        ranked_val = labelers.rank(model, enc, val, seed)   # samples, for both
        for name in VARIANTS:
            set_seed(seed)
            ranked = labelers.rank(model, enc, train, seed, candidates=name)
            row = {"run": name, "seed": seed, "tied": 1 - len(ranked) / len(train)}
            row |= diversity(ranked)
            with TemporaryDirectory() as folder:
                row |= measure_rlhf(out, folder, ranked, ranked_val, seed, cfg)
            rows.append(row)
            log_metrics(out / "lab-candidates.jsonl", fresh=len(rows) == 1, **row)
    print_results(rows)
    print(verdict(rows))


if __name__ == "__main__":
    start(main, Config, __doc__)
