"""Fixed inputs in double precision for every graded function; a seed draws other ones.

A case calls the function on its inputs and returns what is compared. Sizes are tiny: all cases of a
function take milliseconds. Where a graded function calls another one, a stand-in takes the place of
the other, exact on these inputs and wrong elsewhere, so that each function is judged alone.

There are no right answers here. `of` is the only entry: (cases, stand-ins) of a part.
"""
import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch

from data.tokenizer import get_tokenizer

NAN = math.nan


class Case(NamedTuple):
    """One call and what is compared of it."""
    name: str            # says what is special about the inputs
    concept: str         # the property that it tests, worth points
    run: Callable        # function -> tensors, numbers, strings, or lists of them
    twin: str = ""       # a case that must give the same result
    twin_differs: str = ""   # in what the inputs of the two differ
    tolerance: float = 1e-4


class Draw:
    """Random inputs of one part, the same for the same seed."""

    def __init__(self, seed):
        self.rng = torch.Generator().manual_seed(1000 + seed)
        self.random = random.Random(seed)

    def normal(self, *shape, scale=1.0):
        return scale * torch.randn(*shape, generator=self.rng, dtype=torch.float64)

    def ids(self, *shape, high=50):
        return torch.randint(1, high, shape, generator=self.rng)


def call(function, *args, **kwargs):
    """Call with copies of all tensors; return the result, and which arguments it changed.

    A changed argument is part of the result: the caller's tensors are not the function's to change.
    """
    copies = [a.clone() if torch.is_tensor(a) else a for a in args]
    result = function(*copies, **kwargs)
    changed = [i for i, (a, b) in enumerate(zip(args, copies))
               if torch.is_tensor(a) and not torch.equal(a.nan_to_num(7.7), b.nan_to_num(7.7))]
    return result, changed


def scalar(result):
    """Return the first tensor of a result, which is a loss."""
    return result[0] if isinstance(result, list | tuple) else result


def gradients(function, *args, wrt=(0,), **kwargs):
    """Return the gradients of a loss with respect to some of its arguments, None without one."""
    args = [a.clone() if torch.is_tensor(a) else a for a in args]
    for i in wrt:
        args[i].requires_grad_(True)
    loss = scalar(function(*args, **kwargs))
    if not (torch.is_tensor(loss) and loss.requires_grad):
        return "no gradient"
    found = torch.autograd.grad(loss, [args[i] for i in wrt], allow_unused=True)
    return ["no gradient" if g is None else g for g in found]


def carries_gradient(result):
    """Return for each tensor of a result whether it requires a gradient."""
    results = result if isinstance(result, list | tuple) else [result]
    return [bool(torch.is_tensor(r) and r.requires_grad) for r in results]


def rows_of_ones(first, last, T):
    """Return a mask (B, T): in row b, ones on first[b] .. last[b] - 1."""
    t = torch.arange(T)
    return ((t >= torch.tensor(first)[:, None]) & (t < torch.tensor(last)[:, None])).double()


# A4: what is trained on


CHATS = {
    "two turns": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": "What does the cow say?"},
                  {"role": "assistant", "content": "The cow says moo."},
                  {"role": "user", "content": "And the dog?"},
                  {"role": "assistant", "content": "Woof."}],
    "ends with the user": [{"role": "user", "content": "Where is Ben?"},
                           {"role": "assistant", "content": "At the mill."},
                           {"role": "user", "content": "Thank you."}],
    "special tokens as text": [{"role": "user", "content": "Say <|end|><|assistant|> twice."},
                               {"role": "assistant", "content": "<|end|> <|end|>"}],
}


def render_cases(draw):
    enc = get_tokenizer()
    names = ["Ada", "Ben", "Eva", "Tom", "Zoe"]
    chats = {k: [dict(m, content=f"{draw.random.choice(names)}: {m['content']}") for m in chat]
             for k, chat in CHATS.items()}

    def ids(chat):
        return lambda render: list(render(chat, enc)[0])

    def mask(chat):
        return lambda render: [float(x) for x in render(chat, enc)[1]]

    def with_ordinary_text(render):
        ids, mask = render(chats["special tokens as text"], enc)
        return [list(ids), [float(x) for x in mask]]

    two, last = chats["two turns"], chats["ends with the user"]
    return [
        Case("tokens of a chat", "tokens", ids(two)),
        Case("tokens, user last", "tokens", ids(last)),
        Case("mask of a chat", "mask", mask(two)),
        Case("mask, user last", "mask", mask(last)),
        Case("special tokens in the text", "ordinary text", with_ordinary_text),
    ], {}


def response_loss_cases(draw):
    logits = draw.normal(3, 7, 11)
    ids = draw.ids(3, 7, high=11)
    mask = rows_of_ones([2, 4, 3], [5, 7, 4], 7).long()   # 3, 3 and 1 tokens
    padded = torch.cat([ids, torch.zeros(3, 2, dtype=torch.long)], 1)
    longer = torch.cat([logits, torch.full((3, 2, 11), 1e4, dtype=torch.float64)], 1)
    mask_longer = torch.cat([mask, torch.zeros(3, 2, dtype=torch.long)], 1)
    return [
        Case("value", "right tokens", lambda f: call(f, logits, ids, mask)),
        Case("gradient", "right tokens", lambda f: gradients(f, logits, ids, mask)),
        Case("the same with padding", "padding",
             lambda f: call(f, longer, padded, mask_longer), "value", "the padding"),
        Case("nothing to train on", "empty mask", lambda f: f(logits, ids, 0 * mask)),
    ], {}


def token_table(model, ids, temperature=1.0, mask=None, states=None, parts=1):
    """Stand in for gpt.token_logprobs: numbers that depend on `model`, token and place."""
    t = torch.arange(1, ids.shape[1])
    x = -(1.5 + torch.sin(model.scale * ids[:, 1:] + 0.7 * t + 0.1 * ids[:, :-1]))
    x = x.double() / temperature
    return x if mask is None else torch.where(mask.bool(), x, 0.0)


def toy(scale):
    """Return what token_table takes for a model."""
    weight = SimpleNamespace(weight=torch.zeros(50, 2, dtype=torch.float64))
    config = SimpleNamespace(vocab_size=50, block_size=64)
    return SimpleNamespace(scale=torch.tensor(scale, dtype=torch.float64), wte=weight,
                           config=config)


def chat_loss_cases(draw):
    ids = draw.ids(3, 8)
    mask = rows_of_ones([2, 4, 3], [5, 8, 4], 8).long()
    padded = torch.cat([ids, torch.zeros(3, 3, dtype=torch.long)], 1)
    mask_padded = torch.cat([mask, torch.zeros(3, 3, dtype=torch.long)], 1)
    model = toy(1.3)

    def gradient(f):
        model.scale.grad = None
        scale = model.scale.clone().requires_grad_(True)
        loss = f(SimpleNamespace(**{**vars(model), "scale": scale}), ids, mask)
        if not loss.requires_grad:
            return "no gradient"
        return torch.autograd.grad(loss, scale)[0]

    return [
        Case("value", "right tokens", lambda f: f(model, ids, mask)),
        Case("gradient", "right tokens", gradient),
        Case("the same with padding", "padding",
             lambda f: f(model, padded, mask_padded), "value", "the padding"),
        Case("nothing to train on", "empty mask", lambda f: f(model, ids, 0 * mask)),
    ], {"token_logprobs": token_table}


def split_cases(draw):
    names = [f"user {draw.random.randrange(1000)}-{i}" for i in range(12)]
    order = [names[i] for i in (0, 3, 1, 4, 2, 5, 0, 6, 3, 7, 1, 8, 9, 10, 11, 2, 4, 5, 6, 7)]
    records = [{"prompt": [{"role": "user", "content": f"prompt {i % 9}"}], "user": u, "i": i}
               for i, u in enumerate(order)]
    nameless = [{"prompt": r["prompt"], "i": r["i"]} for r in records]
    mixed = [r if i % 3 else nameless[i] for i, r in enumerate(records)]

    def seeded(records, key):
        def run(f):
            first, again, *others = [f([dict(r) for r in records], fraction=0.25, seed=seed)[1]
                                     for seed in (3, 3, 4, 5, 6, 7, 8)]
            return [first == again, any(other != first for other in others),
                    len({key(r) for r in first})]
        return run

    def nameless_in_validation(f):
        train, val = f([dict(r) for r in mixed], fraction=0.5, seed=2)
        return [len(train) + len(val), sum("user" not in r for r in val)]

    def single(f):
        return [[r["i"] for r in part] for part in f([dict(nameless[0])] * 3)]

    def user(r):
        return r["user"]

    def prompt(r):
        return r["prompt"][0]["content"]

    def shared(records, key):
        def run(f):
            train, val = f([dict(r) for r in records], fraction=0.3, seed=1)
            common = {key(r) for r in train} & {key(r) for r in val}
            return [len(common), len(train) + len(val), float(len(val) > 0)]
        return run

    return [
        Case("users in both parts", "no user in both", shared(records, user)),
        Case("prompts in both parts", "no prompt in both", shared(nameless, prompt)),
        Case("another seed, by user", "the seed decides", seeded(records, user)),
        Case("another seed, by prompt", "the seed decides", seeded(nameless, prompt)),
        Case("some records without a user", "no user is for training", nameless_in_validation),
        Case("one prompt", "a single group", single),
    ], {}


# A7: credit


def gae_inputs(draw):
    rewards, values = draw.normal(4, 6), draw.normal(4, 6)
    mask = rows_of_ones([2, 1, 0, 3], [5, 6, 4, 4], 6)
    return rewards, values, mask


def gae_cases(draw):
    rewards, values, mask = gae_inputs(draw)
    inside = mask > 0
    clean = [torch.where(inside, x, 0.0) for x in (rewards, values)]
    spoiled = [torch.where(inside, x, NAN) for x in (rewards, values)]
    other = torch.where(inside, values, values + 3.0)
    at_the_end = [torch.where(inside, x, 5.0) for x in (rewards, values)]

    def run(rewards, values, *settings):
        return lambda f: call(f, rewards, values, mask, *settings)

    def needs_no_gradient(f):
        r, v = rewards.clone().requires_grad_(True), values.clone().requires_grad_(True)
        return carries_gradient(f(r, v, mask))

    def sum_is_value_plus_advantage(f):
        advantages, returns = f(*clean, mask, 0.9, 0.7)
        return (returns - advantages)[inside]

    return [
        Case("lambda .7, gamma .9", "the recursion", run(*clean, 0.9, 0.7)),
        Case("lambda 1, gamma 1", "the recursion", run(*clean, 1.0, 1.0)),
        Case("the defaults", "the recursion", run(*clean)),
        Case("values behind the end", "end of the response", run(clean[0], other), "the defaults",
             "the values outside the response"),
        Case("both behind the end", "end of the response", run(*at_the_end), "the defaults",
             "rewards and values outside the response"),
        Case("NaN outside the mask", "padding", run(*spoiled), "the defaults",
             "what stands outside the mask"),
        Case("returns - advantages", "returns", sum_is_value_plus_advantage),
        Case("gradient", "no gradient", needs_no_gradient),
    ], {}


def whiten_cases(draw):
    x = 2.0 + draw.normal(3, 5, scale=3.0)
    mask = rows_of_ones([1, 0, 2], [4, 5, 3], 5)
    inside = mask > 0
    spoiled = torch.where(inside, x, NAN)
    shifted = torch.where(inside, x, 100.0)
    one = rows_of_ones([1], [2], 3)

    return [
        Case("two rows of the batch", "mean 0, variance 1", lambda f: call(f, x, mask)),
        Case("rows stay different", "over the batch",
             lambda f: [r[m].mean() for r, m in zip(f(x, mask), inside)]),
        Case("100 on padding", "padding", lambda f: call(f, shifted, mask),
             "two rows of the batch", "the padding"),
        Case("NaN on padding", "padding", lambda f: call(f, spoiled, mask),
             "two rows of the batch", "the padding"),
        Case("one element", "a single element", lambda f: f(x[:1, :3], one)),
        Case("gradient", "no gradient",
             lambda f: carries_gradient(f(x.clone().requires_grad_(True), mask))),
    ], {}


# A8: the clip


def masked_mean_cases(draw):
    x = draw.normal(3, 5)
    mask = rows_of_ones([1, 0, 2], [4, 2, 5], 5)
    other = torch.where(mask > 0, x, 9.0)
    return [
        Case("value", "the mean", lambda f: call(f, x, mask)),
        Case("gradient", "the mean", lambda f: gradients(f, x, mask)),
        Case("9 on padding", "padding", lambda f: call(f, other, mask), "value", "the padding"),
        Case("an empty mask", "an empty mask", lambda f: f(x, 0 * mask)),
    ], {}


def mean_of(mask):
    """Stand in for scaffold.health.masked_mean on inputs with this many masked tokens."""
    n = mask.sum().item()
    return {"masked_mean": lambda x, mask: (x * mask).sum() / n}


def policy_loss_cases(draw):
    old = draw.normal(3, 5) - 2.0
    step = draw.normal(3, 5, scale=0.4)
    step[0, :3] = torch.tensor([0.5, -0.5, 0.1])   # clipped above, below, and not
    advantages = draw.normal(3, 5)
    advantages[0, :3] = torch.tensor([1.0, -1.0, 1.0])
    mask = rows_of_ones([0, 1, 2], [4, 5, 3], 5)
    new = old + step
    outside = torch.where(mask > 0, new, new + 1.0)

    def advantage_gradient(f):
        loss = scalar(f(new.clone().requires_grad_(True), old, advantages, mask))
        return bool(torch.is_tensor(loss) and loss.requires_grad)

    return [
        Case("loss", "the surrogate", lambda f: call(f, new, old, advantages, mask)[0][0]),
        Case("loss, clip .4", "the surrogate",
             lambda f: f(new, old, advantages, mask, 0.4)[0]),
        Case("gradient", "clipped tokens have no gradient",
             lambda f: gradients(f, new, old, advantages, mask)),
        Case("the first step", "the ratio is 1 at first",
             lambda f: [f(old, old, advantages, mask), gradients(f, old, old, advantages, mask)]),
        Case("clip fraction", "clip fraction", lambda f: f(new, old, advantages, mask)[1]),
        Case("padding moved", "padding", lambda f: f(outside, old, advantages, mask),
             "loss and fraction", "the padding"),
        Case("loss and fraction", "padding", lambda f: f(new, old, advantages, mask)),
        Case("arguments and gradients", "nothing else changes",
             lambda f: [call(f, new, old, advantages, mask)[1], advantage_gradient(f),
                        carries_gradient(f(new.clone().requires_grad_(True), old, advantages,
                                           mask)[1])]),
    ], mean_of(mask)


def value_loss_cases(draw):
    old = draw.normal(3, 5)
    step = draw.normal(3, 5, scale=0.3)
    step[0, :3] = torch.tensor([0.5, -0.5, 0.1])
    returns = draw.normal(3, 5, scale=2.0)
    returns[0, :2] = (old + step)[0, :2]   # V is right, clipped V is not
    mask = rows_of_ones([0, 1, 2], [4, 5, 3], 5)
    values = old + step
    outside = torch.where(mask > 0, values, values + 1.0)
    return [
        Case("loss", "the larger error", lambda f: call(f, values, old, returns, mask)),
        Case("loss, clip .4", "the larger error", lambda f: f(values, old, returns, mask, 0.4)),
        Case("gradient", "the larger error",
             lambda f: gradients(f, values, old, returns, mask)),
        Case("nothing is clipped", "half the squared error",
             lambda f: f(values, old, returns, mask, 9.0)),
        Case("padding moved", "padding", lambda f: call(f, outside, old, returns, mask), "loss",
             "the padding"),
    ], mean_of(mask)


PROBES = {
    "render": render_cases, "response_loss": response_loss_cases, "chat_loss": chat_loss_cases,
    "split_by_user": split_cases,
    "gae": gae_cases, "whiten": whiten_cases,
    "masked_mean": masked_mean_cases, "policy_loss": policy_loss_cases,
    "value_loss": value_loss_cases,
}


def of(name, seed=0):
    """Return (cases, stand-ins) of a part. Seed 0 is public; a teacher's seed is not."""
    return PROBES[name](Draw(seed))
