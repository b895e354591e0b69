"""GAE(lambda): was this token better than expected?

A response is an episode. The state is the text so far, the action is the next token, and the reward
is the reward model's score, paid on the last token (PPO adds a small KL penalty on every token).
The critic V predicts the reward still to come. The advantage A[t] compares V[t] with what followed
token t; PPO makes a token likelier if A[t] > 0. How many rewards should we see before we trust V?

    1 step       A1[t] = r[t] + gamma V[t+1] - V[t]                    = delta[t], the TD error
    2 steps      A2[t] = r[t] + gamma r[t+1] + gamma^2 V[t+2] - V[t]   = delta[t] + gamma delta[t+1]
    n steps      An[t] = n rewards, then gamma^n V[t+n], minus V[t]    = sum of gamma^l delta[t+l]
    to the end   all the rewards, minus V[t]                           = Monte Carlo return - V[t]

Few steps have low variance but inherit the critic's errors. Many steps are unbiased but noisy,
because every later token was sampled. GAE averages all of them with weights that fall by lambda per
step. delta[t+l] is part of every An with n > l, and those weights add up to lambda^l, so one
backward pass is enough:

    A[t] = (1-lambda) (A1[t] + lambda A2[t] + lambda^2 A3[t] + ...)
         = sum over l of (gamma lambda)^l delta[t+l]
         = delta[t] + gamma lambda A[t+1]
    return[t] = A[t] + V[t]              the critic's target

lambda 0 is one-step TD, lambda 1 is Monte Carlo; textbooks call them TD(0) and TD(1), other authors
number the n-step returns, so that their TD(1) has two steps. Use lambda close to 1 and gamma = 1: a
response is short and its end matters most.

Frame: with ids (B, T+1), action t chooses ids[:, t+1], and V[t] is the value of the state before
it. The mask is 1 on response tokens, the end token included: each row is zeros (prompt), ones,
zeros (padding). After the last 1 the episode is over and the value is 0, whatever the critic says
there (no bootstrapping), even if the response was cut for length; PPO penalises that instead.
ppo.py calls these widths T and T-1.

    python gae.py                        # one small episode, worked step by step (2 s)
    python gae.py --lam 0                # the same, trusting the critic after one token
    python -m pytest tests/test_gae.py   # the statements above, as tests

Sources: GAE, arXiv:1506.02438 eq. 16; in PPO, arXiv:1707.06347 eq. 11-12; for language models,
arXiv:2009.01325 (gamma 1, lambda .95). Whitening: openai/lm-human-preferences.
"""
from dataclasses import dataclass

import torch

from scaffold.cli import UserError, start


@dataclass
class Config:
    gamma: float = 1.0   # discount per token, in [0, 1]; below 1 a good ending counts less
    lam: float = 0.95    # 0 trusts the critic, 1 the sample; the score reaches k tokens back
                         # with weight lam^k


@torch.no_grad()   # A is a constant in the loss: its gradient would train V for the policy's sake
def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Advantages and returns of a batch of responses (arXiv:1506.02438, eq. 16).

    rewards  (B, T)  reward of action t, in units of the normalised score
    values   (B, T)  V of the state before action t, in the same units
    mask     (B, T)  1 or True on the response's actions, one run per row (a second run counts as a
                     second episode); outside it, rewards and values may be anything, even NaN
    gamma, lam       discount and GAE's lambda, both in [0, 1]

    Returns (advantages, returns), each (B, T), fp32 (fp64 if given fp64), 0 outside the mask,
    without gradient and not whitened: advantages + values is V's target in the reward's units.
    Raises ValueError if shapes differ or are not (B, T), or if gamma or lam is outside [0, 1].
    """
    shapes = [tuple(x.shape) for x in (rewards, values, mask)]
    if rewards.ndim != 2 or len(set(shapes)) > 1:
        raise ValueError("gae needs rewards, values and mask, all (B, T), but got {}, {}, {}. One "
                         "column too many? Action t makes ids[:, t+1], so pass values[:, :-1] and "
                         "mask[:, 1:]".format(*shapes))
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {x}. "
                             f"Usual for responses: gamma=1.0, lam=0.95")
    dtype = torch.promote_types(torch.result_type(rewards, values), torch.float32)
    mask = mask.bool()
    # With V = 0 outside the response nothing bootstraps. torch.where, because NaN * 0 is NaN.
    values = torch.where(mask, values, 0).to(dtype)                           # (B, T)
    advantages = torch.zeros_like(values)                                     # (B, T)
    next_value = values.new_zeros(len(values))                                # (B,)
    next_advantage = next_value
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]             # (B,)
        advantage = delta + gamma * lam * next_advantage
        # 0 outside the mask: nothing flows from padding to the end token, nor from V to a prompt.
        next_advantage = torch.where(mask[:, t], advantage, 0)                # (B,)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


@torch.no_grad()
def whiten(x, mask):
    """Shift and scale x to mean 0 and variance 1 (biased, eps 1e-8) over the mask of the batch.

    x, mask: the same shape, usually (B, T), else ValueError; x outside the mask may be anything.
    Returns that shape, 0 outside the mask, without gradient. A single element gives 0.

    Over the batch, never per row: a mean of 0 in every row would hide which response was better.
    """
    if x.shape != mask.shape:
        raise ValueError(f"whiten needs x and mask of the same shape, "
                         f"got {tuple(x.shape)} and {tuple(mask.shape)}")
    mask = mask.bool()
    x = torch.where(mask, x, 0).to(torch.promote_types(x.dtype, torch.float32))
    n = mask.sum().clamp(min=1)
    x = torch.where(mask, x - x.sum() / n, 0)
    return x * torch.rsqrt(x.square().sum() / n + 1e-8)   # n, not n-1: one token gives 0, not 0/0


def print_episode(ids, mask, columns):
    """Print one line per action. columns: (T, 6) reward, V, delta, A, return, whitened A."""
    print("t  state ends  action   mask   reward  V before    delta         A    return  whitened")
    for t, row in enumerate(columns):
        print(f"{t}  {ids[t]:<10}  {ids[t + 1]:<8} {mask[0, t]:>4}",
              "{:8.2f} {:9.2f} {:8.2f} {:9.6f} {:9.6f} {:9.4f}".format(*row))
    print("Read bottom-up: V is 0 after the last token, so the final delta is reward - V. The .90\n"
          "on padding is unused. Each A is its delta + gamma * lambda * the A below.")


def print_mixture(deltas, advantage, gamma, lam):
    """Print the n-step advantages of an episode of 3 actions and their weights. deltas: (3,)."""
    print(f"\nThe first A, {advantage:.6f}, is a mixture of n-step advantages:")
    for n in (1, 2, 3):
        a_n = sum(gamma ** k * deltas[k] for k in range(n))
        # More than 3 steps stop at the end, too, so n = 3 gets all the remaining weight.
        weight = (1 - lam) * lam ** (n - 1) if n < 3 else lam ** 2
        note = "   (Monte Carlo)" if n == 3 else ""
        print(f"  n = {n}  {a_n:9.6f} * {weight:.4f} = {a_n * weight:9.6f}{note}")


def print_lambdas(actions, pairs):
    """Print advantages and returns at lambda 0, .95 and 1. pairs: three (A, return), (3,) each."""
    print("\n           advantage at lambda               return at lambda\n"
          "action          0      .95        1            0      .95        1")
    for t, action in enumerate(actions):
        cells = ["".join(f"{x[t]:9.4f}" for x in triple) for triple in zip(*pairs)]
        print(f"{action:<8}" + "    ".join(cells))
    print("At lambda 0 variance is low, but earlier tokens see the score only through V, one\n"
          "token further per update. Lambda 1 has no bias, but the noise of all later\n"
          "tokens. At .95 the score counts .95 one token back, .90 two, .006 a hundred.")


def main(cfg):
    """Print an episode step by step, the mixture behind its first advantage, and three lambdas."""
    ids = ["who", "is", "Ada", "a", "baker", "<|end|>", "<|pad|>"]   # T+1 = 7, 3 of the response
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])                        # (1, T)
    values = torch.tensor([[.3, .4, .5, .6, .8, .9]])                # (1, T) .9 on padding
    rewards = torch.tensor([[0, 0, -.02, .02, .97, 0]])              # (1, T) -.1 log-ratio; score 1
    try:
        advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)
    except ValueError as e:
        raise UserError(e) from None
    deltas, _ = gae(rewards, values, mask, cfg.gamma, 0.0)   # at lambda 0, A is delta
    columns = [rewards, values, deltas, advantages, returns, whiten(advantages, mask)]
    print(f"Prompt: {' '.join(ids[:3])}   Response: {' '.join(ids[3:6])}   "
          f"gamma {cfg.gamma:g}, lambda {cfg.lam:g}\n")
    print_episode(ids, mask, torch.cat(columns).T.tolist())
    response = slice(2, 5)
    print_mixture(deltas[0, response].tolist(), advantages[0, 2].item(), cfg.gamma, cfg.lam)
    pairs = [gae(rewards, values, mask, cfg.gamma, lam) for lam in (0.0, 0.95, 1.0)]
    print_lambdas(ids[3:6], [(adv[0, response], ret[0, response]) for adv, ret in pairs])


if __name__ == "__main__":
    start(main, Config, __doc__)
