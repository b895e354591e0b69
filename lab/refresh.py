"""Refresh: the reward model goes stale while PPO runs, and people must rank again.

Claim (Stiennon et al. 2020; the usual warning about PPO). The reward model knows what it was
trained on: samples of the SFT model. PPO moves the policy away from them, to responses that nobody
has ranked, and there the reward model is wrong more often. If people rank responses of the policy
too, and the reward model learns from their rankings, PPO improves further.

After one round of PPO, copies of all that PPO trains go on with different reward models:

    stale    OUT/reward.pt to the end: one long run
    fresh    before each round, people rank samples of the present policy
    more     before each round, people rank further samples of the SFT model (only with --more);
             fresh against more is what the policy's own samples are worth

The reward model is trained on with the new rankings and as many old ones, so that it does not
forget. The KL's reference stays the SFT model. Critic, optimizers and the learning rate schedule
just go on, so that all copies take equal updates.

The reward model is measured before and after each round, on responses of the policy to prompts of
held-out users that people have ranked:

    agrees      share of the pairs that it orders as a labeler does
    possible    the same of the gold program. It falls as the responses become more alike, because
                then the labelers' errors decide
    right       share of the pairs that it orders as the gold program does

    python lab/refresh.py                     three seeds
    python lab/refresh.py --seeds 1 --more    a first look, with the third run

Nine minutes on two CPU cores. Trains the stages before it if they are missing.
Read next: ../self_reward.py, where the policy ranks its own responses.
"""
import copy
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo
import reward
import sft
from data import labelers, village
from data.formats import load_comparisons
from data.records import read_records
from data.rankings import report, tokenize
from lab.cot import mean, print_table
from lab.grpo import (
    COLUMNS, cells, evaluate_policies, load, measures, new_learner, ppo_update, train)
from scaffold.cli import BaseConfig, require, start
from scaffold.optim import adamw, lr_at
from scaffold.run import log_metrics, take_step


@dataclass
class Config(BaseConfig):
    rounds: int = 3              # rounds of PPO; people rank again before all but the first
    updates: int = 20            # updates of a round
    rankings: int = 600          # prompts whose responses people rank before a round
    more: bool = False           # also train the run whose new rankings are of the SFT model
    seeds: int = 3               # repetitions on the same models, with other prompts and samples
    seed: int = 0                # first seed


class Records(NamedTuple):
    """What people rank and have ranked."""
    ranked: list      # rankings that OUT/reward.pt has learned from
    prompts: list     # of training users; people rank responses to some of them
    held_out: list    # prompts of other users, for the measures


def load_records(s, cfg):
    """Read the records of a run."""
    ranked_path, _ = labelers.ensure(s.out, cfg.seed, cfg.device)
    prompts, held_out = [
        [record for _, record in read_records(s.out / "data" / f"{name}.jsonl")]
        for name in ("rank_train", "rank_val")]
    return Records(load_comparisons(ranked_path), prompts, held_out)


def train_on(s, reward_model, records, seed):
    """Train the reward model for one more pass, over these rankings -> a new RewardModel."""
    cfg = reward.Config(epochs=1, seed=seed)
    model = copy.deepcopy(reward_model).requires_grad_(True).train()
    model.mean.zero_()   # reward.py trains the raw scores, too
    model.std.fill_(1)
    comparisons = tokenize(records, sft.render_prompt, s.enc, model.body.config.block_size)
    sizes = [len(c.rows) * max(map(len, c.rows)) for c in comparisons]
    plan = reward.batch_plan(sizes, cfg, random.Random(seed))
    optimizer = adamw(model, cfg.lr, 0.01)
    for step, rows in enumerate(plan):
        loss = reward.batch_loss(model, [comparisons[i] for i in rows], s.device, cfg)
        take_step(loss, optimizer, model, lr_at(step, len(plan), cfg.lr), where="reward model")
    reward.normalise(model, s.reference, s.enc, records, cfg)
    return model.eval().requires_grad_(False)


def rank_again(s, policy, prompts, n, seed):
    """Let people rank responses of the policy to n of the prompts -> their rankings."""
    rng = random.Random(seed)
    asked = rng.sample(prompts, min(n, len(prompts)))
    return labelers.rank(policy, s.enc, asked, rng.randrange(2**31))


def with_old(new, old, seed):
    """Return the new rankings and as many of the old ones, or all of these if they are fewer."""
    return new + random.Random(seed).sample(old, min(len(new), len(old)))


def quality(s, policy, prompts, seed):
    """Measure the reward model on ranked responses of the policy to all prompts -> row."""
    ranked = labelers.rank(policy, s.enc, prompts, seed)
    comparisons = tokenize(ranked, sft.render_prompt, s.enc, policy.config.block_size)
    scores = reward.score_all(s.reward_model, comparisons, s.device)
    row = report("", comparisons, scores, {}, village.gold)
    return {"pairs": row["pairs"], "agrees": row["accuracy"], "possible": row["gold_program"],
            "right": row["accuracy_against_gold"]}


def play_round(s, learner, number, prompts, seed, cfg):
    """Train the learner for round `number`, from 1 -> what is known of the round.

    The reward model is measured before and after, on the same prompts.
    """
    updates = range((number - 1) * cfg.updates, number * cfg.updates)
    before = quality(s, learner.policy, prompts, seed)
    train(f"round {number}", updates, ppo_update, cfg.rounds * cfg.updates, s, learner)
    after = quality(s, learner.policy, prompts, seed)
    row = {"round": number}
    for name in before:
        row[f"{name}_before"] = before[name]
        row[f"{name}_after"] = after[name]
    return row


def play_all(s, records, seed, cfg):
    """Train and measure all runs of one seed -> rows: one per run and round, two of the SFT model.

    The run "first" is the first round, which the others share.
    """
    learner = new_learner(s, seed, critic=True)
    rows = [{"run": "first"} | play_round(s, learner, 1, records.held_out, seed, cfg)]
    policies = {"first-1": learner.policy}
    for run in ("stale", "fresh", "more")[:2 + cfg.more]:
        copied = copy.deepcopy(learner)
        setup = s
        known = records.ranked
        for number in range(2, cfg.rounds + 1):
            if run != "stale":
                ranked = copied.policy if run == "fresh" else s.reference
                new = rank_again(s, ranked, records.prompts, cfg.rankings, seed + number)
                model = train_on(s, setup.reward_model, with_old(new, known, seed), seed)
                setup = replace(s, reward_model=model)
                known = known + new
            row = play_round(setup, copied, number, records.held_out, seed, cfg)
            rows.append({"run": run} | row)
            policies[f"{run}-{number}"] = copy.deepcopy(copied.policy)
    measured = evaluate_policies(s, policies, seed)
    rows = [row | measures(measured[f"{row['run']}-{row['round']}"]) for row in rows]
    for name in ("sft", "sft-greedy"):
        rows.append({"run": name, "round": 0} | measures(measured[name]))
    return [{"seed": seed} | row for row in rows]


def verdict(rows, change=0.02):
    """Judge the claim from the rows of all seeds, in one sentence.

    Its three parts, on average over the seeds, each by at least `change`: over the long run the
    reward model becomes less right about the policy's responses; new rankings after the first round
    make it more right about the same responses; the last policy is better by gold.
    """
    last = max(r["round"] for r in rows)

    def average(run, number, key):
        return mean([r[key] for r in rows if (r["run"], r["round"]) == (run, number)])

    sft = average("first", 1, "right_before")
    stale = average("stale", last, "right_after")
    old = average("first", 1, "right_after")
    new = average("fresh", 2, "right_before")
    gold = average("fresh", last, "gold") - average("stale", last, "gold")
    parts = [sft - stale >= change, new - old >= change, gold >= change]
    held = "does not hold"
    if all(parts):
        held = "holds"
    elif any(parts):
        held = "holds in part"
    return (f"the claim {held} here: of the pairs of samples the reward model orders {sft:.2f} "
            f"right before PPO and {stale:.2f} after {last} rounds; new rankings after the first "
            f"round change it from {old:.2f} to {new:.2f} on the same responses; after {last} "
            f"rounds they have changed gold by {gold:+.2f}")


QUALITY = {f"{heading} {when}": (f"{heading}_{when}", 2)
           for heading in ("right", "agrees", "possible") for when in ("before", "after")}


def print_results(rows):
    """Print means and ranges over the seeds: of the reward models, then of the policies."""
    for columns in (QUALITY, COLUMNS):
        table = []
        for run, number in dict.fromkeys((r["run"], r["round"]) for r in rows):
            if number or columns is COLUMNS:   # the SFT model has no round
                of_round = [r for r in rows if (r["run"], r["round"]) == (run, number)]
                table.append({"run": run, "round": str(number or "-")} | cells(of_round, columns))
        print_table(table)
        print()


def main(cfg):
    require(cfg, 1, "rankings", "seeds")
    require(cfg, 2, "rounds")
    require(cfg, ppo.Config.value_warmup + 1, "updates")   # the policy waits for its critic
    s = load(cfg)
    records = load_records(s, cfg)
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for row in play_all(s, records, seed, cfg):
            rows.append(row)
            log_metrics(s.out / "lab-refresh.jsonl", fresh=len(rows) == 1, **row)
        print(f"seed {seed}: done", flush=True)
    print_results(rows)
    print(verdict(rows))


if __name__ == "__main__":
    start(main, Config, __doc__)
