"""PPO: improve the fine-tuned model against the reward model without drifting far from it.

Idea. Sample responses, score them with the reward model, and make the better ones more likely. Four
models take part:

    policy     the model that learns; starts as the fine-tuned model        (the actor)
    reference  the fine-tuned model, frozen; a KL penalty keeps the policy near it
    reward     scores a finished response; frozen
    value      predicts the score from a prefix; starts as the reward model (the critic)

    maximise  E[ r(x, y) - beta * log( pi(y|x) / pi_ref(y|x) ) ] + ptx * E_text[ log pi(text) ]

(InstructGPT, eq. 2). One update (lab/explain.py prints one): sample responses, score them, give
each token a reward (a KL penalty; on the last token, the score too), estimate advantages A
(gae.py), take a few epochs of clipped steps (PPO, 1707.06347, eq. 7):

    ratio  = pi_new(a|s) / pi_old(a|s)           s: the text so far, a: the next token
    loss   = -mean min( ratio * A, clip(ratio, 1-eps, 1+eps) * A )               eps: --clip

    python ppo.py                                            all stages; ends with the results table
    python ppo.py --beta 0 --name ppo-beta-0 --updates 150   no KL: score rises, true grade stalls
    python ppo.py --prompts pairs.jsonl --out out/mine       your prompts, see data/README.md

A minute on two CPU cores; four minutes with the stages before it. Read next: evaluate.py, dpo.py.
Elsewhere: metrics and warnings (scaffold/health.py), record formats (data/formats.py).

Action frame: quantities per token are (B, T-1). Index t belongs to the action that produced
ids[:, t+1]; its value is V(state before it), read at position t. The mask is 1 on response tokens,
the end token included, and 0 after it.
"""
import math
import random
from dataclasses import dataclass

import torch

import gae
import gpt
import reward
import sft
from data import corpus
from data.formats import load_grader, load_prompts, mean_grade
from data.rollouts import write_rollout
from data.text import checkpoint_text, draw_rows, pad, predicted, text_files
from data.tokenizer import end_of
from scaffold.cli import RunConfig, UserError, check_name, pick_device, require, run_folder, start
from scaffold.distributed import (
    all_gather_ids, all_reduce_mean, global_mean, rank, rank0_first, shard, world_size)
from scaffold.health import masked_mean, ppo_metrics, warn_once
from scaffold.optim import adamw, in_parts, lr_at
from scaffold.run import Run, ensure_stage, set_seed
from scaffold.table import print_samples


@dataclass
class Config(RunConfig):
    prompts: str = ""            # prompts in any record format; empty: the village's
    text: str = ""               # text for the ptx term; empty: the text of OUT/gpt.pt
    name: str = "ppo"            # the checkpoint becomes OUT/NAME.pt; evaluate.py lists all names
    updates: int = 60            # rollouts; judge by gold or samples when to stop, not by reward
    rollout_size: int = 128      # responses per update; more is steadier
    epochs: int = 4              # passes over a rollout; more than four rarely pays
    minibatches: int = 2         # steps per pass
    grad_accum: int = 1          # compute each batch in so many parts: less memory, a third slower
    value_warmup: int = 3        # first updates, of the critic only: prefixes are new to it
    lr: float = 3e-4             # of policy and value; 3e-4 below 1M parameters, 1e-5 at 100M
    beta: float = 0.1            # KL coefficient; 0 invites reward hacking, 0.5 blocks learning
    target_kl: float = 0.0       # above 0: adapt beta to keep the KL near this (nats; 6 is usual)
    stop_kl: float = 0.0         # above 0: end an update at this KL per token (0.02 is usual)
    clip: float = 0.2            # how far the ratio of a token may move in one update
    value_clip: float = 0.2      # the same for values; fits rewards of std 1
    gamma: float = 1.0           # discount per token; keep 1
    lam: float = 0.95            # GAE's lambda: 1 trusts the final score, 0 trusts the critic
    ptx: float = 0.5             # weight of the pretraining loss: the policy stays a language model
    ptx_tokens: int = 256        # tokens of that text per step
    missing_eos_score: float = -3.0   # replaces the score of a response without an end token
    max_new_tokens: int = 48     # longest response
    offline: bool = False        # sample from the SFT model instead; metrics are of its samples
    gold: str = "data.village:gold"   # module:function, the true grade of a response; logged only
    table: bool = True           # end with evaluate.py's table and the page of lab/report.py
    save_every: int = 5          # updates between saves of the training state; 0: on Ctrl-C only


@dataclass
class Rollout:
    """B sampled responses and what the models say about them, in the action frame."""
    ids: torch.Tensor            # (B, T) prompt and response, padded on the right
    lengths: torch.Tensor        # (B,) tokens of prompt and response together
    mask: torch.Tensor           # (B, T-1) 1 on the response's actions
    logprobs: torch.Tensor       # (B, T-1) of the policy before this update
    old_logprobs: torch.Tensor   # (B, T-1) of the sampler: with --offline the reference
    ref_logprobs: torch.Tensor   # (B, T-1) of the reference
    values: torch.Tensor         # (B, T-1) before the update
    scores: torch.Tensor         # (B,) of the reward model
    ended: torch.Tensor          # (B,) whether there is an end token
    responses: list              # B lists of ids


def kl_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """Reward per token: -beta * (log pi - log pi_ref) on each, plus the score on the last.

    scores (B,); logprobs, ref_logprobs, mask (B, T-1) -> (B, T-1), 0 outside the mask. A row
    without response tokens gets no score.

    The penalty is the log-ratio d = log pi - log pi_ref (k1), not k3 = exp(-d) - 1 + d. Both have
    the KL as mean, but only k1 as a reward gives the KL's gradient. For a token rarer than in the
    reference, -k1 is positive and makes it likelier again; -k3 is negative and makes it rarer.
    """
    mask = mask.bool()
    rewards = torch.where(mask, -beta * (logprobs - ref_logprobs), 0.0)       # (B, T-1)
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = mask & (steps == torch.where(mask, steps, -1).amax(1, keepdim=True))   # (B, T-1)
    return rewards + torch.where(last, scores[:, None], 0.0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """PPO's clipped surrogate (1707.06347, eq. 7), mean over the masked tokens.

    All (B, T-1) -> (loss, clip fraction). Once a ratio passes 1 + clip (A > 0) or 1 - clip (A < 0),
    the token's loss is flat. One that moved in the wrong direction is not clipped: it is corrected.
    """
    mask = mask.float()
    ratio = torch.exp(torch.where(mask > 0, logprobs - old_logprobs, 0.0))    # (B, T-1)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    return loss, masked_mean((clipped > unclipped).float(), mask).detach()


def value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the mean squared error of V; per token the larger of the errors of V and clipped V.

    Clipped V stays within `clip` of the old V, as in PPO's first code. All (B, T-1) -> scalar.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)           # (B, T-1)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * masked_mean(errors, mask.float())


def adapt_beta(beta, kl, target, n, horizon=1_000):
    """Raise beta if the mean KL of n responses is above the target, lower it if below.

    By at most 20% * n / horizon (Ziegler et al., 1909.08593). Their horizon is 10,000 responses for
    a run of a million; a run here has about 8,000. n / horizon is capped at 1: beta stays positive.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return beta * (1 + error * min(1.0, n / horizon))


def response_mask(prompt_lengths, lengths, T):
    """Mark the actions that produced response tokens: (B,), (B,) -> (B, T-1)."""
    target = torch.arange(1, T, device=lengths.device)   # action t produced the token at t+1
    return ((target >= prompt_lengths[:, None]) & (target < lengths[:, None])).float()


@torch.no_grad()
def rollout(sampler, policy, reference, reward_model, value_model, prompts, end, cfg, seed):
    """Sample a response to each prompt (a list of ids) and run all four models on it -> Rollout."""
    device = policy.wte.weight.device
    # Each process samples its shard with its own seed, then all processes get all responses.
    responses = gpt.generate(sampler, shard(prompts), cfg.max_new_tokens, stop=end,
                             seed=seed + rank())
    responses = all_gather_ids(responses, cfg.max_new_tokens, device)
    ids = pad([torch.tensor(p + r) for p, r in zip(prompts, responses)]).to(device)   # (B, T)
    starts = torch.tensor([len(p) for p in prompts], device=device)
    lengths = starts + torch.tensor([len(r) for r in responses], device=device)   # (B,)
    ended = torch.tensor([r[-1] == end for r in responses], device=device)
    mask = response_mask(starts, lengths, ids.shape[1])                       # (B, T-1)
    # The same forward pass at temperature 1 as in the loss, so the first ratio is 1.
    logprobs = gpt.token_logprobs(policy, ids, mask=mask, parts=cfg.grad_accum)   # (B, T-1)
    ref_logprobs = gpt.token_logprobs(reference, ids, mask=mask, parts=cfg.grad_accum)
    scores = in_parts(reward_model.score, cfg.grad_accum, ids, lengths)       # (B,)
    return Rollout(
        ids=ids, lengths=lengths, mask=mask, ended=ended, responses=responses,
        logprobs=logprobs, ref_logprobs=ref_logprobs,
        old_logprobs=ref_logprobs if sampler is reference else logprobs,
        values=in_parts(value_model, cfg.grad_accum, ids, lengths)[:, :-1],
        scores=torch.where(ended, scores, cfg.missing_eos_score))


def losses(policy, value_model, b, advantages, returns, rows, cfg):
    """Return (policy loss, value loss, statistics) of these rows of a rollout."""
    T = int(b.lengths[rows].max())
    ids = b.ids[rows, :T]   # (n, T) of n rows; no autocast: bf16 rounds ratios near 1 to 1
    mask = b.mask[rows, :T - 1]                                               # (n, T-1)
    old = b.old_logprobs[rows, :T - 1]
    logprobs = gpt.token_logprobs(policy, ids, mask=mask, parts=cfg.grad_accum)   # (n, T-1)
    old_values = b.values[rows, :T - 1]
    values = in_parts(value_model, cfg.grad_accum, ids, b.lengths[rows])[:, :-1]
    pg_loss, clipfrac = policy_loss(logprobs, old, advantages[rows, :T - 1], mask, cfg.clip)
    vf_loss = value_loss(values, old_values, returns[rows, :T - 1], mask, cfg.value_clip)
    pg_loss = global_mean(pg_loss, mask.sum())
    vf_loss = global_mean(vf_loss, mask.sum())
    log_ratio = (logprobs - old).detach() * mask
    value_clipped = ((values - old_values).abs() > cfg.value_clip).float()
    stat = dict(pg=pg_loss.item(), vf=vf_loss.item(), clipfrac=clipfrac.item(),
                ratio=masked_mean(log_ratio.exp(), mask).item(),
                approxkl=0.5 * masked_mean(log_ratio ** 2, mask).item(),   # k2, to second order
                vclip=masked_mean(value_clipped, mask).item())
    return pg_loss, vf_loss, all_reduce_mean(stat)


def ptx_loss(policy, sources, drawn, cfg, rng):
    """Next-token loss on freshly drawn pretraining documents."""
    T = policy.config.block_size
    device = policy.wte.weight.device
    ids, segments = map(shard, draw_rows(sources, drawn, cfg.ptx_tokens, T, rng))
    loss = gpt.lm_loss(policy, ids.to(device), segments.to(device))
    return global_mean(loss, predicted(segments).sum())


def minibatches(n, cfg, rng, device):
    """Yield the row indices of each step: cfg.epochs shuffled passes over n rows."""
    orders = [rng.sample(range(n), n) for _ in range(cfg.epochs)]
    for order in orders:
        yield from torch.tensor(order, device=device).tensor_split(cfg.minibatches)


def next_prompts(prompts, order, n, rng):
    """Take the next n prompts of a shuffled pass. order: the indices left, changed in place."""
    if len(order) < n:   # a new pass; drop the rest, repeat prompts if there are fewer than n
        order[:] = rng.sample(range(len(prompts)), len(prompts)) * math.ceil(n / len(prompts))
    taken = [prompts[i] for i in order[:n]]
    order[:] = order[n:]
    return taken


def check(cfg):
    require(cfg, 1, "updates", "epochs", "grad_accum", "max_new_tokens")
    require(cfg, 2, "rollout_size")
    require(cfg, 1, "minibatches", most=cfg.rollout_size)
    require(cfg, 0, "gamma", "lam", "clip", most=1)
    require(cfg, 0, "beta", "ptx", "target_kl", "stop_kl", "value_clip", "lr")
    require(cfg, 0, "value_warmup", most=cfg.updates - 1)   # at least one update trains the policy
    check_name(cfg, "gpt", "sft", "reward", "dpo")
    if cfg.offline and cfg.target_kl:
        raise UserError("--offline with --target-kl: frozen samples do not measure the policy's KL")
    if cfg.target_kl and not cfg.beta:
        raise UserError("--beta 0 with --target-kl: beta is adapted by factors; start from 0.1")
    if cfg.rollout_size % world_size():
        raise UserError(f"--rollout-size {cfg.rollout_size}: not a multiple of {world_size()}")


def main(cfg):
    check(cfg)
    device = pick_device(cfg.device)
    out = run_folder(cfg.out)
    ensure_stage(out / "reward.pt", reward, cfg)
    set_seed(cfg.seed)
    policy, enc, base = gpt.load_model(out / "sft.pt", device)
    reference = gpt.load_model(out / "sft.pt", device)[0].requires_grad_(False)
    reward_model = reward.load_reward(out / "reward.pt", device, enc)[0]
    reward_model.requires_grad_(False)
    value_model = reward.load_reward(out / "reward.pt", device)[0]
    village = not cfg.prompts
    if village:
        folder = rank0_first(lambda: corpus.ensure(out / "data", cfg.seed))
        cfg.prompts = str(folder / "prompts_train.jsonl")
    room = policy.config.block_size - cfg.max_new_tokens   # tokens of the longest prompt
    prompts = sft.fit_prompts(load_prompts(cfg.prompts), enc, room)
    if not prompts:
        raise UserError(f"{cfg.prompts}: no prompt fits the context; lower --max-new-tokens")
    gold = load_grader(cfg.gold, prompts)
    state = {"beta": cfg.beta, "warned": {}}
    inputs = [out / "sft.pt", out / "reward.pt", cfg.prompts]
    if cfg.ptx:
        sources = checkpoint_text(out / "gpt.pt", enc, policy.config.block_size, cfg.text)
        inputs += text_files(out / "gpt.pt", cfg.text)
        state["drawn"] = dict.fromkeys(sources, 0)   # tokens of each source so far
    policy_optimizer = adamw(policy, cfg.lr)
    value_optimizer = adamw(value_model, cfg.lr)
    rng = random.Random(cfg.seed)
    order = []   # prompts left in this pass
    run = Run(cfg, cfg.name, inputs, policy=policy, value=value_model, rng=rng, order=order,
              state=state, policy_optimizer=policy_optimizer, value_optimizer=value_optimizer)
    print(f"ppo.py: {len(prompts):,} prompts, {cfg.updates} updates of {cfg.rollout_size} "
          f"responses, device {device}")
    for update in run.steps(cfg.updates):
        batch = next_prompts(prompts, order, cfg.rollout_size, rng)
        sampler = reference if cfg.offline else policy
        b = rollout(sampler, policy, reference, reward_model, value_model,
                    [p["ids"] for p in batch], end_of(enc), cfg, seed=rng.randrange(2**31))
        rewards = kl_rewards(b.scores, b.logprobs, b.ref_logprobs, b.mask, state["beta"])
        advantages, returns = gae.gae(rewards, b.values, b.mask, cfg.gamma, cfg.lam)   # (B, T-1)
        advantages = gae.whiten(advantages, b.mask)   # V's targets, the returns, stay unwhitened
        value_lr = lr_at(update, cfg.updates, cfg.lr, "linear")
        turn = max(0, update - cfg.value_warmup)   # the policy starts later, with its own warmup
        lr = lr_at(turn, cfg.updates - cfg.value_warmup, cfg.lr, "linear")
        stats = []
        for rows in minibatches(len(batch), cfg, rng, device):
            pg_loss, vf_loss, stat = losses(policy, value_model, b, advantages, returns,
                                            shard(rows), cfg)
            if stats and 0 < cfg.stop_kl < stat["approxkl"]:
                break   # before the step: the policy has moved far enough
            stat["norm"] = 0.0
            if update >= cfg.value_warmup:
                if cfg.ptx:
                    pg_loss += cfg.ptx * ptx_loss(policy, sources, state["drawn"], cfg, rng)
                stat["norm"] = run.take_step(pg_loss, policy_optimizer, policy, lr, rows, "row")
            run.take_step(vf_loss, value_optimizer, value_model, value_lr, rows, "row")
            stats.append(stat)
        row = ppo_metrics(b, returns, stats, state["beta"], lr, update)
        if gold:
            texts = [sft.decode_response(ids, enc) for ids in b.responses]
            row["objective/gold"] = mean_grade(gold, batch, texts)
        run.log(**row)
        warn_once(run, row, state, cfg)
        write_rollout(out / f"{cfg.name}-rollout.jsonl", b, rewards, advantages, batch, enc, gold,
                      update=update, beta=state["beta"])
        if cfg.target_kl and update > cfg.value_warmup:   # the policy had moved before this rollout
            kl = row["objective/kl"]
            state["beta"] = adapt_beta(state["beta"], kl, cfg.target_kl, len(batch))
    gpt.save_model(out / f"{cfg.name}.pt", policy, enc, base["tokenizer"], seed=cfg.seed,
                   beta=cfg.beta)
    run.finish()
    if village:   # prompts of users the policy has not seen
        prompts = sft.fit_prompts(load_prompts(folder / "prompts_val.jsonl"), enc, room)
    shown = [p["prompt"] for p in prompts[:4]]
    before = sft.sample_responses(reference, enc, shown, cfg.max_new_tokens, seed=cfg.seed)
    after = sft.sample_responses(policy, enc, shown, cfg.max_new_tokens, seed=cfg.seed)
    print_samples(shown, before, after)
    print(f"---\nsaved {out / cfg.name}.pt; next: python chat.py --out {out}")
    if cfg.table:
        from lab import report   # lazy: it needs all stages
        report.after_training(cfg, graded=village and gold)


if __name__ == "__main__":
    start(main, Config, __doc__, distributed=True)
