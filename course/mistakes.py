"""Mistakes that students make and that tests/zoo.py does not have, each one change of the code.

A convention is no mistake: it keeps its points, and the grader says which convention is used here.
Not part of a handout: `old` is the solution.
"""
from typing import NamedTuple


class Mistake(NamedTuple):
    name: str
    part: str     # of course/assignments.py
    says: str
    old: str      # stands exactly once in the file
    new: str
    convention: bool = False


MISTAKES = [
    # A4
    Mistake("role-trained", "render", "the role token is trained, too: nobody has to predict it",
            "add([enc.encode_single_token(f\"<|{m['role']}|>\")], 0)",
            "add([enc.encode_single_token(f\"<|{m['role']}|>\")], trained)"),
    Mistake("end-missing", "render", "a turn has no end token",
            'add(enc.encode_ordinary(m["content"]) + [end_of(enc)], trained)',
            'add(enc.encode_ordinary(m["content"]), trained)'),
    Mistake("loss-unshifted", "response_loss",
            "a token is predicted from a state that has already seen it",
            "logits[:, :-1][mask].float()", "logits[:, 1:][mask].float()"),
    Mistake("loss-summed", "response_loss", "the loss is a sum: long batches take larger steps",
            "    return total / mask.sum().clamp(min=1)\n", "    return total\n"),
    Mistake("loss-over-all", "response_loss", "the sum is divided by prompt and padding, too",
            "    return total / mask.sum().clamp(min=1)\n", "    return total / mask.numel()\n"),
    Mistake("empty-is-nan", "response_loss", "0/0 for a batch without a trained token",
            "    return total / mask.sum().clamp(min=1)\n", "    return total / mask.sum()\n"),
    Mistake("chat-loss-sign", "chat_loss", "the loss lacks its minus sign",
            "return -gpt.token_logprobs(model, ids, mask=mask, parts=parts).sum() / mask",
            "return gpt.token_logprobs(model, ids, mask=mask, parts=parts).sum() / mask"),
    Mistake("chat-loss-summed", "chat_loss", "the loss is a sum: long batches take larger steps",
            "parts=parts).sum() / mask.sum().clamp(min=1)", "parts=parts).sum()"),
    Mistake("split-unseeded", "split_by_user", "the split ignores the seed",
            "    random.Random(seed).shuffle(names)\n", "    random.shuffle(names)\n"),
    # A7
    Mistake("whiten-n-1", "whiten", "the variance is divided by n - 1 (Bessel), here by n, so that "
            "a single token gives 0", "x.square().sum() / n + 1e-8",
            "x.square().sum() / (n - 1).clamp(min=1) + 1e-8", convention=True),
    Mistake("lambda-forgotten", "gae", "lambda is missing: this is the Monte Carlo return",
            "delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
    Mistake("gamma-for-lambda", "gae", "gamma stands where lambda belongs",
            "delta + gamma * lam * next_advantage", "delta + gamma * gamma * next_advantage"),
    Mistake("gamma-forgotten", "gae", "the recursion discounts by lambda alone",
            "delta + gamma * lam * next_advantage", "delta + lam * next_advantage"),
    Mistake("no-baseline", "gae", "V of the state before the token is not subtracted",
            "gamma * next_value - values[:, t]", "gamma * next_value"),
    Mistake("forward-in-time", "gae", "the recursion runs forward: A[t+1] is not known yet",
            "for t in reversed(range(values.shape[1])):", "for t in range(values.shape[1]):"),
    Mistake("rewards-in-place", "gae", "the caller's rewards are changed in place",
            "    values = torch.where(mask, values, 0).to(dtype)",
            "    rewards.mul_(mask)\n    values = torch.where(mask, values, 0).to(dtype)"),
    Mistake("values-times-mask", "gae", "NaN * 0 is NaN: mask with torch.where",
            "values = torch.where(mask, values, 0).to(dtype)",
            "values = (values * mask).to(dtype)"),
    Mistake("gae-with-gradient", "gae", "a gradient flows through advantages into the critic",
            "@torch.no_grad()   # A is a constant in the loss: its gradient would train V for the "
            "policy's sake\n", ""),
    Mistake("whiten-with-gradient", "whiten", "a gradient flows through the whitened advantages",
            "@torch.no_grad()\ndef whiten", "def whiten"),
    Mistake("x-times-mask", "whiten", "NaN * 0 is NaN: mask with torch.where",
            "x = torch.where(mask, x, 0).to(torch", "x = (x * mask).to(torch"),
    Mistake("variance-for-std", "whiten", "x is divided by the variance, not by its square root",
            "torch.rsqrt(x.square().sum() / n + 1e-8)", "1 / (x.square().sum() / n + 1e-8)"),
    # A8
    Mistake("masked-sum", "masked_mean", "a sum instead of a mean",
            "return (x * mask).sum() / mask.sum().clamp(min=1)", "return (x * mask).sum()"),
    Mistake("empty-mask-is-nan", "masked_mean", "0/0 for an empty mask",
            "return (x * mask).sum() / mask.sum().clamp(min=1)",
            "return (x * mask).sum() / mask.sum()"),
    Mistake("mean-of-row-means", "masked_mean", "the mean of each row, then of the rows: tokens of "
            "short responses weigh more", "return (x * mask).sum() / mask.sum().clamp(min=1)",
            "return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()"),
    Mistake("ratio-without-exp", "policy_loss", "the ratio is 1 + the log-ratio: right for small "
            "steps only", "torch.exp(torch.where(mask > 0, logprobs - old_logprobs, 0.0))",
            "1 + torch.where(mask > 0, logprobs - old_logprobs, 0.0)"),
    Mistake("policy-summed", "policy_loss", "the loss is a sum: long batches take larger steps",
            "loss = masked_mean(torch.maximum(unclipped, clipped), mask)",
            "loss = (torch.maximum(unclipped, clipped) * mask).sum()"),
    Mistake("policy-per-row", "policy_loss", "the mean of each row, then of the rows: tokens of "
            "short responses weigh more",
            "loss = masked_mean(torch.maximum(unclipped, clipped), mask)",
            "loss = ((torch.maximum(unclipped, clipped) * mask).sum(1) / mask.sum(1)).mean()"),
    Mistake("ratio-detached", "policy_loss", "the ratio has no gradient, so nothing is learned",
            "mask > 0, logprobs - old_logprobs, 0.0", "mask > 0, (logprobs - old_logprobs).detach()"
            ", 0.0"),
    Mistake("clip-above-only", "policy_loss", "the ratio is not clipped from below",
            "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)"),
    Mistake("clipfrac-of-the-ratio", "policy_loss", "the clip fraction counts every ratio outside "
            "the clip, here only those whose loss is clipped", "(clipped > unclipped).float()",
            "((ratio - 1).abs() > clip).float()", convention=True),
    Mistake("clipfrac-with-gradient", "policy_loss", "the clip fraction is not detached",
            "return loss, masked_mean((clipped > unclipped).float(), mask).detach()",
            "return loss, masked_mean((clipped > unclipped).float(), mask) + 0 * loss"),
    Mistake("value-unclipped", "value_loss", "the values are not clipped",
            "errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)",
            "errors = (values - returns) ** 2"),
    Mistake("value-clipped-only", "value_loss", "only the clipped values count: where the clip "
            "holds, there is no gradient",
            "errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)",
            "errors = (clipped - returns) ** 2"),
    Mistake("value-not-halved", "value_loss", "the half is missing",
            "return 0.5 * masked_mean(errors", "return masked_mean(errors"),
    Mistake("value-clip-sign", "value_loss", "the step is subtracted from the old values",
            "old_values + (values - old_values).clamp(-clip, clip)",
            "old_values - (values - old_values).clamp(-clip, clip)"),
]
