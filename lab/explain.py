"""One update of PPO, token by token: two prompts, two responses, and every number in between.

It prints, in the order of ppo.py's loop:

    1  the responses: log-probs of policy and reference, reward, V, A, return, whitened A per token
    2  the steps: the ratio of each token before each step, and which tokens are clipped
    3  what moved: the probability of each token and V, before and after
    4  the row that ppo.py would log

    python lab/explain.py                            improves out/ppo.pt further, or out/sft.pt
    python lab/explain.py --checkpoint out/sft.pt    the first update of a run: no KL yet
    python lab/explain.py --lr 3e-3 --epochs 6       too large a step: see what the clip stops
    python lab/explain.py --beta 1                   the penalty outweighs the score

Five seconds; it trains the stages before it if they are missing, and saves nothing. The critic is
OUT/reward.pt, as at the start of a run: ppo.py does not keep its own. There is no ptx term. The
functions are those of ppo.py.
"""
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import chat
import gae
import gpt
import ppo
import reward
import sft
from data import corpus
from data.formats import load_prompts
from data.tokenizer import end_of, fingerprint
from scaffold.cli import BaseConfig, UserError, brief, pick_device, require, run_folder, start
from scaffold.health import ppo_metrics
from scaffold.optim import adamw
from scaffold.run import ensure_stage, set_seed, take_step
from scaffold.table import format_table, printable


@dataclass
class Config(BaseConfig):
    checkpoint: str = ""         # policy to improve; empty: ppo.pt of OUT, else dpo.pt or sft.pt
    prompts: str = ""            # prompts in any record format; empty: the village's
    epochs: int = 4              # steps, each on both responses
    lr: float = 3e-4             # of policy and value
    beta: float = 0.1            # KL coefficient
    clip: float = 0.2            # how far the ratio of a token may move in one update
    lam: float = 0.95            # GAE's lambda
    max_new_tokens: int = 24     # longest response


class Step(NamedTuple):
    """A step of the update, as seen before it is taken."""
    ratios: torch.Tensor         # (B, T-1)
    clipped: torch.Tensor        # (B, T-1) 1 where the loss of a token is flat
    stat: dict                   # of ppo.losses, and the gradient norm


class Update(NamedTuple):
    """Everything an update computes; tensors per token are (B, T-1)."""
    b: ppo.Rollout
    rewards: torch.Tensor
    raw: torch.Tensor            # advantages before whitening
    advantages: torch.Tensor     # whitened
    returns: torch.Tensor
    steps: list                  # of Step
    logprobs: torch.Tensor       # of the policy after the update
    values: torch.Tensor         # after the update
    row: dict                    # for the log


def settings(cfg):
    """Return the ppo.Config of one update of two prompts, with both in every step."""
    require(cfg, 1, "epochs", "max_new_tokens")
    require(cfg, 0, "lr", "beta")
    require(cfg, 0, "clip", "lam", most=1)
    return ppo.Config(out=cfg.out, seed=cfg.seed, device=cfg.device, epochs=cfg.epochs, lr=cfg.lr,
                      beta=cfg.beta, clip=cfg.clip, lam=cfg.lam, max_new_tokens=cfg.max_new_tokens,
                      updates=1, rollout_size=2, minibatches=1, value_warmup=0, ptx=0.0)


def flat_tokens(logprobs, b, advantages, clip):
    """Mark the tokens whose loss is flat, so that they have no gradient -> (B, T-1)."""
    flat = torch.zeros_like(b.mask)
    for i, t in b.mask.nonzero().tolist():
        one = (slice(i, i + 1), slice(t, t + 1))
        _, fraction = ppo.policy_loss(logprobs[one], b.old_logprobs[one], advantages[one],
                                      b.mask[one], clip)
        flat[one] = fraction
    return flat


def update(policy, reference, reward_model, value_model, prompts, end, cfg, rng):
    """Take one update on these prompts (lists of ids), as ppo.main does -> Update."""
    b = ppo.rollout(policy, policy, reference, reward_model, value_model, prompts, end, cfg,
                    seed=rng.randrange(2**31))
    rewards = ppo.kl_rewards(b.scores, b.logprobs, b.ref_logprobs, b.mask, cfg.beta)
    raw, returns = gae.gae(rewards, b.values, b.mask, cfg.gamma, cfg.lam)     # (B, T-1)
    advantages = gae.whiten(raw, b.mask)
    policy_optimizer = adamw(policy, cfg.lr)
    value_optimizer = adamw(value_model, cfg.lr)
    steps = []
    for rows in ppo.minibatches(len(prompts), cfg, rng, b.ids.device):
        with torch.no_grad():
            logprobs = gpt.token_logprobs(policy, b.ids, mask=b.mask)         # (B, T-1)
            flat = flat_tokens(logprobs, b, advantages, cfg.clip)
        pg_loss, vf_loss, stat = ppo.losses(policy, value_model, b, advantages, returns, rows, cfg)
        stat["norm"] = take_step(pg_loss, policy_optimizer, policy, cfg.lr)
        take_step(vf_loss, value_optimizer, value_model, cfg.lr)
        steps.append(Step((logprobs - b.old_logprobs).exp(), flat, stat))
    with torch.no_grad():
        logprobs = gpt.token_logprobs(policy, b.ids, mask=b.mask)             # (B, T-1)
        values = value_model(b.ids, b.lengths)[:, :-1]
    row = ppo_metrics(b, returns, [step.stat for step in steps], cfg.beta, cfg.lr, 0)
    return Update(b, rewards, raw, advantages, returns, steps, logprobs, values, row)


def tokens_of(u, i, enc):
    """Return (index in the action frame, token as text) of response i."""
    actions = u.b.mask[i].nonzero().flatten().tolist()
    return [(t, repr(printable(enc.decode([u.b.ids[i, t + 1].item()])))) for t in actions]


def response_table(u, i, enc):
    """Format response i, one line per token."""
    tensors = {"log pi": u.b.logprobs, "log pi_ref": u.b.ref_logprobs,
               "log-ratio": u.b.logprobs - u.b.ref_logprobs, "reward": u.rewards,
               "V before": u.b.values, "A": u.raw, "return": u.returns, "whitened A": u.advantages}
    rows = [{"t": t, "token": token} | {k: x[i, t].item() for k, x in tensors.items()}
            for t, token in tokens_of(u, i, enc)]
    columns = {"t": ("t", "d"), "token": ("token", "")} | {k: (k, ".3f") for k in tensors}
    return format_table(rows, columns)


def ratio_table(u, i, enc):
    """Format the ratios of response i before each step and after the last; * marks a clip."""
    rows = []
    for t, token in tokens_of(u, i, enc):
        row = {"token": token, "A": u.advantages[i, t].item()}
        for n, step in enumerate(u.steps, 1):
            mark = "*" if step.clipped[i, t] else " "
            row[f"step {n}"] = f"{step.ratios[i, t]:.3f}{mark}"
        row["after"] = f"{(u.logprobs - u.b.old_logprobs)[i, t].exp():.3f}"
        rows.append(row)
    names = [name for name in rows[0] if name not in ("token", "A")]
    columns = {"token": ("token", ""), "whitened A": ("A", ".3f")} | {k: (k, "") for k in names}
    return format_table(rows, columns)


def step_table(u):
    """Format what the losses say before each step."""
    names = {"policy loss": "pg", "value loss": "vf", "mean ratio": "ratio",
             "approx. KL": "approxkl", "clipped": "clipfrac", "gradient norm": "norm"}
    rows = [{"step": n} | step.stat for n, step in enumerate(u.steps, 1)]
    columns = {"step": ("step", "d")} | {k: (name, ".4f") for k, name in names.items()}
    return format_table(rows, columns)


def moved_table(u, i, enc):
    """Format how the probability and V of each token of response i moved."""
    rows = []
    for t, token in tokens_of(u, i, enc):
        rows.append({"token": token, "whitened A": u.advantages[i, t].item(),
                     "p before": u.b.logprobs[i, t].exp().item(),
                     "p after": u.logprobs[i, t].exp().item(),
                     "V before": u.b.values[i, t].item(), "V after": u.values[i, t].item(),
                     "return": u.returns[i, t].item()})
    names = list(rows[0])[1:]
    return format_table(rows, {"token": ("token", "")} | {k: (k, ".3f") for k in names})


def with_the_advantage(u):
    """Count the tokens whose log-prob moved in the direction of their advantage -> (n, of)."""
    moved = (u.logprobs - u.b.logprobs) * u.advantages
    return int(((moved > 0) & (u.b.mask > 0)).sum()), int(u.b.mask.sum())


def print_update(u, prompts, enc, cfg):
    """Print the update in four parts. prompts: the records."""
    print("1. Two responses. Each line is an action: it chose the token, in the state before it.\n"
          f"reward = -beta * log-ratio (beta {cfg.beta:g}); on the last token, plus the score. "
          f"A is GAE\nwith gamma {cfg.gamma:g} and lambda {cfg.lam:g}; return = A + V. "
          f"The mean of whitened A is 0 over both responses.")
    for i, record in enumerate(prompts):
        question = brief(printable(record["prompt"][-1]["content"]), 60)
        response = brief(printable(sft.decode_response(u.b.responses[i], enc)), 60)
        ended = "" if u.b.ended[i] else ", for a response without an end token"
        print(f"\nPrompt: {question}   Response: {response}\nscore {u.b.scores[i]:.3f}{ended}\n")
        print(response_table(u, i, enc))
    print(f"\n2. {len(u.steps)} steps on both responses. Below, the ratio of each token before "
          f"each step: it starts\nat 1. * marks a token that is clipped: its ratio has moved by "
          f"more than {cfg.clip:g} with its\nadvantage, and this step takes no gradient from it.\n")
    print(step_table(u))
    for i in range(len(prompts)):
        print(f"\n{ratio_table(u, i, enc)}")
    n, of = with_the_advantage(u)
    print(f"\n3. What moved. {n} of {of} tokens moved with their advantage: likelier if A > 0, "
          f"rarer if A < 0.\nThe others share weights with them. V moves towards the return.")
    for i in range(len(prompts)):
        before = (u.b.logprobs[i] * u.b.mask[i]).sum()
        print(f"\n{moved_table(u, i, enc)}\nlog-prob of the response: {before:.3f} before, "
              f"{u.logprobs[i].sum():.3f} after")
    print("\n4. The row that ppo.py logs.\n")
    for name, value in u.row.items():
        print(f"{name:<28}{value:.6g}")


def main(cfg):
    ppo_cfg = settings(cfg)
    device = pick_device(cfg.device)
    out = run_folder(cfg.out)
    ensure_stage(out / "reward.pt", reward, cfg)
    set_seed(cfg.seed)
    policy, enc, start_path, _ = chat.load_policy(cfg, device)
    reference = gpt.load_model(out / "sft.pt", device)[0].requires_grad_(False)
    reward_model, reward_enc = reward.load_reward(out / "reward.pt", device)
    reward_model.requires_grad_(False)
    value_model = reward.load_reward(out / "reward.pt", device)[0]
    if fingerprint(enc) != fingerprint(reward_enc):
        raise UserError(f"{start_path} and {out / 'reward.pt'} differ in tokenizer")
    path = cfg.prompts or corpus.ensure(out / "data", cfg.seed) / "prompts_train.jsonl"
    records = sft.fit_prompts(load_prompts(path), enc,
                              policy.config.block_size - cfg.max_new_tokens)
    if not records:
        raise UserError(f"{path}: no prompt fits the context; lower --max-new-tokens")
    rng = random.Random(cfg.seed)
    batch = ppo.next_prompts(records, [], ppo_cfg.rollout_size, rng)
    print(f"policy {start_path}, reference {out / 'sft.pt'}, reward model and critic "
          f"{out / 'reward.pt'}\n")
    u = update(policy, reference, reward_model, value_model, [p["ids"] for p in batch],
               end_of(enc), ppo_cfg, rng)
    print_update(u, batch, enc, ppo_cfg)


if __name__ == "__main__":
    start(main, Config, __doc__)
