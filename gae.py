"""GAE(lambda): was this token better than expected?

A response is an episode: the state is the text so far, the action is the next token, and the reward is the reward
model's score, paid on the last token only (PPO adds a small KL penalty on every token). The critic V guesses how much
reward is still to come. The advantage A[t] compares that guess with what followed token t; PPO makes a token likelier
if A[t] > 0. How many tokens of truth should we wait for before trusting V for the rest?

    1 step       A1[t] = r[t] + gamma V[t+1] - V[t]                    = delta[t], the TD error
    2 steps      A2[t] = r[t] + gamma r[t+1] + gamma^2 V[t+2] - V[t]   = delta[t] + gamma delta[t+1]
    n steps      An[t] = n rewards, then gamma^n V[t+n], minus V[t]    = sum over l < n of gamma^l delta[t+l]
    to the end   all the rewards, minus V[t]                           = Monte Carlo return minus V[t]

Few steps: little noise, but wrong while the critic is wrong. Many: right on average, but blurred by every token sampled
later. GAE averages them all, with weights that fall by lambda per step. delta[t+l] is part of every An with n > l, and
those weights add up to lambda^l, so one pass from the last token back to the first is enough:

    A[t] = (1-lambda) (A1[t] + lambda A2[t] + lambda^2 A3[t] + ...)
         = sum over l of (gamma lambda)^l delta[t+l]
         = delta[t] + gamma lambda A[t+1]
    return[t] = A[t] + V[t]              what V[t] should have said: the critic's target

lambda 0 is one-step TD, lambda 1 is Monte Carlo. Take lambda close to 1, and gamma = 1: a response is short and its end
matters most. The article this project started from calls the mixture "eligibility traces", and its parts TD(0) (1 step),
TD(1) (2 steps) and so on to Monte Carlo. Elsewhere the number in TD(.) is lambda, so TD(1) IS Monte Carlo: other names,
same estimator.

Frame: with ids (B, T+1), action t is the choice of ids[:, t+1], and V[t] is the state BEFORE it. The mask is 1 on
response tokens, end token included: each row is zeros (prompt), then ones, then zeros (padding). After the last 1 the
episode is over and worth 0, whatever the critic says there: never bootstrap, not even if the response was cut for
length (PPO gives that a penalty instead).

    python gae.py                        # one small episode, worked step by step (2 s)
    python gae.py --lam 0                # the same, trusting the critic after one token
    python -m pytest tests/test_gae.py   # the statements above, as tests

Sources: GAE, arXiv:1506.02438 eq. 16; in PPO, arXiv:1707.06347 eq. 11-12; for language models, arXiv:2009.01325 (gamma 1,
lambda .95) and InstructGPT, arXiv:2203.02155 (no discount, lambda not printed). Whitening: openai/lm-human-preferences.
"""
from dataclasses import dataclass

import torch


@dataclass
class Config:
    gamma: float = 1.0
    """discount per token, in [0, 1]; keep 1: below it, a good ending is worth less the longer the answer"""
    lam: float = 0.95
    """0 trusts the critic, 1 the sample, usually .95 to 1; the score reaches k tokens back with weight lam^k"""


@torch.no_grad()  # an advantage is data: a gradient through it would teach the critic to flatter the policy
def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Advantages and returns of a batch of responses: arXiv:1506.02438 eq. 16, cut off at the end of each response.

    rewards  (B, T)  reward of action t, in units of the normalised score: -beta*KL, plus the score on the last token
    values   (B, T)  V of the state before action t, in the same units
    mask     (B, T)  1 or True on the response's actions, one run per row (a second run counts as a second episode);
                     outside it, rewards and values may be anything, even NaN
    gamma, lam       discount and GAE's lambda, both in [0, 1]

    Returns (advantages, returns), each (B, T), fp32 (fp64 if given fp64), same units, 0 outside the mask, no gradient.
    The advantages are not whitened: advantages + values is a target for V only in the reward's own units.
    Raises ValueError if the shapes differ or are not (B, T), or if gamma or lam is outside [0, 1].
    """
    shapes = [tuple(x.shape) for x in (rewards, values, mask)]
    if rewards.ndim != 2 or len(set(shapes)) > 1:
        raise ValueError("gae wants rewards, values and mask, all (B, T), but got {}, {}, {}. One column too many? Action "
                         "t makes ids[:, t+1], so pass values[:, :-1] and mask[:, 1:]".format(*shapes))
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {x}. Usual for responses: gamma=1.0, lam=0.95")

    dtype = torch.promote_types(torch.result_type(rewards, values), torch.float32)  # bf16 loses small deltas
    mask = mask.bool()
    # From here on V past the end is 0, and that is all "never bootstrap" takes. where, not times: NaN * 0 is NaN.
    values = torch.where(mask, values, 0).to(dtype)                                        # (B, T)

    advantages = torch.zeros_like(values)                                                  # (B, T)
    next_value = next_advantage = values.new_zeros(len(values))                            # (B,) the end is worth 0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                          # (B,)
        # Padding must hand nothing back to the end token, and the last prompt token must get no credit for V[t+1].
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0)  # (B,)
        next_value = values[:, t]                                                          # (B,)
        advantages[:, t] = next_advantage
    return advantages, advantages + values


@torch.no_grad()
def whiten(x, mask):
    """Shift and scale x to mean 0 and variance 1 (biased, eps 1e-8 under the root) over the mask of the WHOLE batch.

    x, mask  one shape, usually (B, T), else ValueError; x outside the mask may be anything
    Returns that shape, without unit or gradient, 0 outside the mask. A single element gives 0, an empty mask zeros.

    Over the batch, never per row: if every row had mean 0, it would be lost that one answer was better than another.
    """
    if x.shape != mask.shape:
        raise ValueError(f"whiten wants x and mask of one shape, got {tuple(x.shape)} and {tuple(mask.shape)}")
    mask = mask.bool()
    x = torch.where(mask, x, 0).to(torch.promote_types(x.dtype, torch.float32))
    n = mask.sum().clamp(min=1)
    x = torch.where(mask, x - x.sum() / n, 0)
    return x * torch.rsqrt(x.square().sum() / n + 1e-8)  # over n, not n-1: a single token must give 0, not 0/0


def main(config):
    """Print an episode step by step, the n-step mixture behind its first advantage, and three lambdas side by side."""
    gamma, lam = config.gamma, config.lam
    ids = ["who", "is", "Ada", "a", "baker", "<|end|>", "<|pad|>"]  # T+1 = 7 tokens, T = 6 actions, 3 of response
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])                       # (1, T)
    values = torch.tensor([[.3, .4, .5, .6, .8, .9]])               # (1, T) the critic has an opinion on padding too: .9
    rewards = torch.tensor([[0, 0, -.02, .02, .97, 0]])             # (1, T) score 1 at the end, beta .1, KL .2, -.2, .3
    deltas, _ = gae(rewards, values, mask, gamma, 0.0)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    columns = torch.cat([rewards, values, deltas, advantages, returns, whiten(advantages, mask)]).T.tolist()

    print(f"Prompt: {' '.join(ids[:3])}   Response: {' '.join(ids[3:6])}   gamma {gamma:g}, lambda {lam:g}\n\n"
          "t  state ends  action   mask   reward  V before    delta         A    return  whitened")
    for t, row in enumerate(columns):
        print(f"{t}  {ids[t]:<10}  {ids[t + 1]:<8} {mask[0, t]:>4}",
              "{:8.2f} {:9.2f} {:8.2f} {:9.6f} {:9.6f} {:9.4f}".format(*row))
    print("Read it upwards. The end is worth 0, so the last delta is reward - V; the .90 under it, padding, is unused.\n"
          "Each A is its own delta + gamma * lambda * the A below. Whitening keeps the order, not the unit or the sign.")

    print(f"\nWhere the first A, {advantages[0, 2]:.6f}, comes from: n-step advantages and their weights")
    for n in (1, 2, 3):
        a_n = sum(gamma ** l * deltas[0, 2 + l].item() for l in range(n))
        weight = (1 - lam) * lam ** (n - 1) if n < 3 else lam ** 2  # n > 3 would stop at the end too: 3 gets all the rest
        print(f"  n = {n}  {a_n:9.6f} * {weight:.4f} = {a_n * weight:9.6f}" + "   (Monte Carlo)" * (n == 3))

    print("\n           advantage at lambda               return at lambda\n"
          "action          0      .95        1            0      .95        1")
    pairs = [gae(rewards, values, mask, gamma, x) for x in (0.0, 0.95, 1.0)]
    for t in (2, 3, 4):
        print(f"{ids[t + 1]:<8}" + "    ".join("".join(f"{x[0, t]:9.4f}" for x in xs) for xs in zip(*pairs)))
    print("Lambda 0 trusts V after one token: little noise, but only the last token sees the score, which travels back\n"
          "through V by about one token per update. Lambda 1 uses what really came: no bias, but the luck of all later\n"
          "tokens is in it. At .95 the score counts .95 one token back, .90 two, .006 a hundred: long answers want more.")


if __name__ == "__main__":
    from gpt import UserError, run

    def checked(config):
        try:
            main(config)
        except ValueError as e:
            raise UserError(e) from None

    run(checked, Config, __doc__)
