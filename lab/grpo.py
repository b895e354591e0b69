"""GRPO: PPO without a critic. Is the mean of a group as good as a second network?

PPO's critic learns which score a prompt and a prefix will get, and costs as much time as the
policy. GRPO (Shao et al. 2024, DeepSeekMath, 2402.03300) samples G responses to each prompt
instead. The mean of their scores r says what that prompt gets:

    A_i = (r_i - mean(r_1 .. r_G)) / std(r_1 .. r_G)                for each token of response i
    loss = -mean min( ratio * A, clip(ratio, 1-eps, 1+eps) * A ) + beta * mean k3

(their eq. 3 and 4). The mean goes over all tokens of a step, as in ppo.py; the paper averages the
tokens of each response first. Std of the group: Dr. GRPO (2503.20783) leaves it out, --no-std.

The KL. With d = log pi - log pi_ref of a sampled token, two estimators have the KL as their mean:

    k1 = d                    PPO subtracts beta * k1 from the reward
    k3 = exp(-d) - 1 + d      GRPO adds beta * k3 to the loss

GRPO compares one number per response and divides it by the std of the group. A penalty in that
number would lose its place in the response, and beta would weigh differently in each group. So the
penalty goes into the loss. There k1 does nothing: the mean of its gradient is 0. The mean gradient
of k3 is that of KL(pi_ref || pi) of the next token. This is another divergence than the
KL(pi || pi_ref) of PPO, but both are 0 only at the reference.

Claim (DeepSeekMath). Without a critic, GRPO does as well as PPO from as many samples, in less time.

    ppo                    the loop of ppo.py with its settings; only the critic learns at first
    grpo, equal samples    as many responses, to fewer prompts
    grpo, equal time       as many CPU seconds of training

All start from OUT/sft.pt and OUT/reward.pt, and respond to prompts of held-out users.

    python lab/grpo.py                     three seeds
    python lab/grpo.py --no-std --seeds 1  a first look at Dr. GRPO

Six minutes on two CPU cores. Trains the stages before it if they are missing.
Read next: lab/refresh.py.
"""
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate
import gae
import gpt
import ppo
import reward
import sft
from data import corpus
from data.formats import load_prompts
from data.text import checkpoint_text
from data.tokenizer import end_of
from lab.cot import mean, print_table, spread
from scaffold.cli import BaseConfig, UserError, pick_device, require, run_folder, start
from scaffold.health import masked_mean
from scaffold.optim import adamw, lr_at
from scaffold.run import ensure_stage, log_metrics, set_seed, take_step


@dataclass
class Config(BaseConfig):
    group: int = 8               # responses per prompt, G; divides the rollout size of ppo.py
    beta: float = 0.1            # weight of k3 in the loss of GRPO
    std: bool = True             # divide by the std of the group; --no-std is Dr. GRPO
    updates: int = 40            # rollouts of PPO, and of GRPO at equal samples
    seeds: int = 3               # repetitions on the same models, with other prompts and samples
    seed: int = 0                # first seed


TITLES = {
    "sft": "sft",
    "sft-greedy": "sft, greedy",
    "ppo": "ppo",
    "grpo": "grpo, equal samples",
    "grpo-longer": "grpo, equal time",
}


def group_advantages(scores, group, std=True):
    """Compare each score with the others of its group (2402.03300, section 4.1.2): (B,) -> (B,).

    Each `group` consecutive scores are of responses to the same prompt. The mean of a group becomes
    0 and, with `std`, its standard deviation 1. A group of equal scores gives 0: it has nothing to
    teach.
    """
    scores = scores.view(-1, group)                                           # (B/G, G)
    advantages = scores - scores.mean(1, keepdim=True)
    if std:   # the bound keeps rounding errors of equal scores from becoming advantages of 1
        advantages = advantages / scores.std(1, correction=0, keepdim=True).clamp(min=1e-3)
    return advantages.flatten()


def k3(logprobs, ref_logprobs, mask):
    """Estimate KL(pi || pi_ref) per token from samples of pi, mean over the mask (their eq. 4).

    All (B, T-1). Never negative, unlike log pi - log pi_ref itself.
    """
    d = torch.where(mask > 0, logprobs - ref_logprobs, 0.0)                   # (B, T-1)
    return masked_mean(torch.expm1(-d) + d, mask)


@dataclass
class Setup:
    """What all runs share."""
    out: Path                    # the run whose checkpoints they start from
    device: torch.device
    enc: object                  # the tokenizer
    tokenizer: str               # its name in checkpoints
    reference: gpt.GPT
    reward_model: reward.RewardModel
    prompts: list                # of training users, with their tokens as "ids"
    held_out: Path               # a file of prompts of other users
    sources: dict                # text for the ptx term
    ppo: ppo.Config              # settings of both methods: rollouts, steps, learning rate, ptx


@dataclass
class Learner:
    """What an update changes."""
    policy: gpt.GPT
    optimizer: torch.optim.Optimizer
    rng: random.Random
    order: list                  # prompts left in this pass
    drawn: dict                  # tokens of each source so far
    value_model: reward.RewardModel = None             # PPO only
    value_optimizer: torch.optim.Optimizer = None


def load(cfg):
    """Load a run -> Setup. Trains the stages that are missing."""
    out = run_folder(cfg.out)
    device = pick_device(cfg.device)
    ensure_stage(out / "reward.pt", reward, cfg)
    folder = corpus.ensure(out / "data", cfg.seed)
    reference, enc, base = gpt.load_model(out / "sft.pt", device)
    reward_model = reward.load_reward(out / "reward.pt", device)[0]
    block_size = reference.config.block_size
    settings = ppo.Config()
    room = block_size - settings.max_new_tokens
    return Setup(
        out=out, device=device, enc=enc, tokenizer=base["tokenizer"],
        reference=reference.requires_grad_(False),
        reward_model=reward_model.requires_grad_(False),
        prompts=sft.fit_prompts(load_prompts(folder / "prompts_train.jsonl"), enc, room),
        held_out=folder / "prompts_val.jsonl",
        sources=checkpoint_text(out / "gpt.pt", enc, block_size),
        ppo=settings)


def new_learner(s, seed, critic=False):
    """Start from OUT/sft.pt, as ppo.py does; a critic starts from OUT/reward.pt."""
    set_seed(seed)
    policy, _, _ = gpt.load_model(s.out / "sft.pt", s.device)
    learner = Learner(policy, adamw(policy, s.ppo.lr), random.Random(seed), order=[],
                      drawn=dict.fromkeys(s.sources, 0))
    if critic:
        learner.value_model = reward.load_reward(s.out / "reward.pt", s.device)[0]
        learner.value_optimizer = adamw(learner.value_model, s.ppo.lr)
    return learner


def ppo_update(update, updates, s, learner):
    """Take one of `updates` updates, as the loop of ppo.py does."""
    p = s.ppo
    policy = learner.policy
    value_model = learner.value_model
    rng = learner.rng
    batch = ppo.next_prompts(s.prompts, learner.order, p.rollout_size, rng)
    b = ppo.rollout(policy, policy, s.reference, s.reward_model, value_model,
                    [r["ids"] for r in batch], end_of(s.enc), p, seed=rng.randrange(2**31))
    rewards = ppo.kl_rewards(b.scores, b.logprobs, b.ref_logprobs, b.mask, p.beta)   # (B, T-1)
    advantages, returns = gae.gae(rewards, b.values, b.mask, p.gamma, p.lam)
    advantages = gae.whiten(advantages, b.mask)
    value_lr = lr_at(update, updates, p.lr, "linear")
    turn = max(0, update - p.value_warmup)
    lr = lr_at(turn, updates - p.value_warmup, p.lr, "linear")
    for rows in ppo.minibatches(len(batch), p, rng, s.device):
        pg_loss, vf_loss, _ = ppo.losses(policy, value_model, b, advantages, returns, rows, p)
        if update >= p.value_warmup:
            pg_loss += p.ptx * ppo.ptx_loss(policy, s.sources, learner.drawn, p, rng)
            take_step(pg_loss, learner.optimizer, policy, lr, where=f"ppo, update {update}")
        take_step(vf_loss, learner.value_optimizer, value_model, value_lr,
                  where=f"critic, update {update}")


def no_critic(ids, lengths):
    """Stand in for the value model in ppo.rollout: (B, T) -> zeros (B, T)."""
    return torch.zeros_like(ids)


def grpo_update(update, updates, s, learner, cfg):
    """Take one of `updates` updates (2402.03300, algorithm 1)."""
    p = s.ppo
    policy = learner.policy
    rng = learner.rng
    batch = ppo.next_prompts(s.prompts, learner.order, p.rollout_size // cfg.group, rng)
    prompts = [r["ids"] for r in batch for _ in range(cfg.group)]
    b = ppo.rollout(policy, policy, s.reference, s.reward_model, no_critic, prompts,
                    end_of(s.enc), p, seed=rng.randrange(2**31))
    advantages = group_advantages(b.scores, cfg.group, cfg.std)[:, None] * b.mask    # (B, T-1)
    lr = lr_at(update, updates, p.lr, "linear")
    for rows in ppo.minibatches(len(prompts), p, rng, s.device):
        mask = b.mask[rows]                                                   # (n, T-1) of n rows
        logprobs = gpt.token_logprobs(policy, b.ids[rows], mask=mask)
        loss, _ = ppo.policy_loss(logprobs, b.logprobs[rows], advantages[rows], mask, p.clip)
        loss += cfg.beta * k3(logprobs, b.ref_logprobs[rows], mask)
        loss += p.ptx * ppo.ptx_loss(policy, s.sources, learner.drawn, p, rng)
        take_step(loss, learner.optimizer, policy, lr, where=f"grpo, update {update}")


def train(name, updates, take_update, *arguments):
    """Call take_update for each number of the range `updates`; return the CPU seconds."""
    begin = time.process_time()   # of all cores together, without the time of other processes
    for update in tqdm(updates, desc=name, mininterval=1):
        take_update(update, *arguments)
    return time.process_time() - begin


def evaluate_policies(s, policies, seed):
    """Return {name: row of evaluate.py} of sft, sft-greedy and the policies {name: GPT}."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in ("sft.pt", "reward.pt"):
            shutil.copy(s.out / file, folder)
        for name, policy in policies.items():
            gpt.save_model(folder / f"{name}.pt", policy, s.enc, s.tokenizer)
        rows = evaluate.evaluate(evaluate.Config(
            out=str(folder), seed=seed, device=s.device.type, prompts=str(s.held_out), best_of=0))
    return {row["stage"]: row for row in rows}


COLUMNS = {                      # heading: (key of a row of evaluate.py, digits)
    "gold": ("gold", 2),
    "win rate vs sft": ("win_rate_vs_sft", 2),
    "refused": ("refused_rate", 2),
    "made up": ("hallucination_rate", 2),
    "rude": ("rude_rate", 2),
    "score": ("reward", 2),
    "KL": ("kl_to_sft", 1),
    "length": ("length", 1),
}


def measures(row):
    """Return the measures of a row of evaluate.py that the tables show."""
    return {key: row.get(key) for key, _ in COLUMNS.values()}


def cells(rows, columns):
    """Return {heading: mean and range over the rows}, "-" without values."""
    found = {}
    for heading, (key, digits) in columns.items():
        values = [r[key] for r in rows if r.get(key) is not None]
        found[heading] = spread(values, digits) if values else "-"
    return found


def verdict(rows, margin=0.03):
    """Judge the claim from the rows of all seeds, in one sentence.

    From as many samples, GRPO must come within `margin` of PPO's gold in less time, on average.
    """
    def average(name, key):
        return mean([r[key] for r in rows if r["run"] == name])

    gold = average("ppo", "gold")
    change = average("grpo", "gold") - gold
    longer = average("grpo-longer", "gold") - gold
    time_ratio = average("grpo", "cpu_seconds") / average("ppo", "cpu_seconds")
    holds = change >= -margin and time_ratio < 1
    return (f"the claim {'holds' if holds else 'does not hold'} here: from as many samples GRPO "
            f"changes gold by {change:+.2f} against PPO (allowed {-margin:+.2f}), in "
            f"{time_ratio:.2f} times the CPU seconds; in as many CPU seconds, by {longer:+.2f}")


def print_results(rows):
    """Print means and ranges over the seeds."""
    columns = {"updates": ("updates", 0), "CPU s": ("cpu_seconds", 0)} | COLUMNS
    table = []
    for name, title in TITLES.items():
        table.append({"": title} | cells([r for r in rows if r["run"] == name], columns))
    print_table(table)


def compare(s, seed, cfg):
    """Train and measure all runs of one seed -> their rows."""
    n = cfg.updates
    learners = {name: new_learner(s, seed, critic=name == "ppo")
                for name in ("ppo", "grpo", "grpo-longer")}
    seconds = {}
    seconds["ppo"] = train("ppo", range(n), ppo_update, n, s, learners["ppo"])
    seconds["grpo"] = train("grpo", range(n), grpo_update, n, s, learners["grpo"], cfg)
    longer = max(1, round(n * seconds["ppo"] / seconds["grpo"]))
    seconds["grpo-longer"] = train("grpo, longer", range(longer), grpo_update, longer, s,
                                   learners["grpo-longer"], cfg)
    updates = {"ppo": n, "grpo": n, "grpo-longer": longer}
    measured = evaluate_policies(s, {k: v.policy for k, v in learners.items()}, seed)
    return [{"run": name, "seed": seed, "updates": updates.get(name),
             "cpu_seconds": seconds.get(name)} | measures(measured[name]) for name in TITLES]


def main(cfg):
    require(cfg, 1, "seeds")
    require(cfg, 2, "group")
    require(cfg, 0, "beta")
    require(cfg, ppo.Config.value_warmup + 1, "updates")   # PPO's policy waits for its critic
    if ppo.Config.rollout_size % cfg.group:
        raise UserError(f"--group {cfg.group}: must divide the {ppo.Config.rollout_size} responses "
                        f"of an update, such as 4, 8 or 16")
    s = load(cfg)
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for row in compare(s, seed, cfg):
            rows.append(row)
            log_metrics(s.out / "lab-grpo.jsonl", fresh=len(rows) == 1, **row)
        print(f"seed {seed}: done", flush=True)
    print_results(rows)
    print(verdict(rows))


if __name__ == "__main__":
    start(main, Config, __doc__)
