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

import gpt
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


# A1: one frame for logits and targets. Logits are logs of COUNTS, so probabilities are shares.


COUNTS = torch.tensor([[4, 1, 1, 9, 16, 1], [1, 25, 4, 1, 1, 4], [9, 1, 1, 1, 4, 16],
                       [1, 4, 36, 1, 9, 1], [16, 9, 1, 4, 1, 1]], dtype=torch.float64)   # (5, 6)


class Counted:
    """A model whose state at each place is one of five, and whose logits are log COUNTS."""

    def __init__(self, counts, dtype=torch.float64):
        self.counts = counts
        self.wte = SimpleNamespace(weight=counts.log().T.to(dtype))   # (V, C) = (6, 5)
        self.config = SimpleNamespace(vocab_size=6, block_size=64)
        self.calls = 0
        self.rows = []

    def hidden(self, ids, cache=None, segments=None, lengths=None):
        self.calls += 1
        t = torch.arange(ids.shape[1])
        states = torch.eye(5, dtype=self.wte.weight.dtype)[(ids + t) % 5]
        if lengths is not None:   # what was not asked for is not there
            states = states * (t < lengths[:, None]).unsqueeze(-1)
        return states

    def unembed(self, states):
        self.rows.append(len(states))
        return states @ self.wte.weight.T

    def __call__(self, ids, segments=None):
        return self.unembed(self.hidden(ids))


def counted_entropy(model, states, targets, temperature=1.0, reduction="none"):
    """Stand in for scaffold.optim.cross_entropy with a Counted model."""
    powers = (states.double() @ model.counts) ** (1 / temperature)
    shares = powers[torch.arange(len(targets)), targets] / powers.sum(1)
    nats = -shares.log().float()
    return {"none": nats, "sum": nats.sum(), "mean": nats.sum() / max(1, len(nats))}[reduction]


def whole_parts(function, n, *tensors):
    """Stand in for scaffold.optim.in_parts: the same parts, without its saving of memory."""
    parts = zip(*(t.tensor_split(min(n, len(t))) for t in tensors))
    return torch.cat([function(*part) for part in parts])


def shuffled_counts(draw):
    return COUNTS[torch.randperm(5, generator=draw.rng)]


def cross_entropy_cases(draw):
    counts = shuffled_counts(draw)
    states = torch.eye(5, dtype=torch.float64)[draw.ids(9, high=5)] + 0.1 * draw.normal(9, 5)
    targets = draw.ids(9, high=6)

    def run(**kwargs):
        return lambda f: call(f, Counted(counts), states, targets, **kwargs)

    def in_half(f):
        model = Counted(counts, torch.bfloat16)
        losses = f(model, states.bfloat16(), targets)
        return [str(losses.dtype), losses.double()]

    def most_rows(f):
        model = Counted(counts)
        f(model, states, targets)
        return [max(model.rows) <= 4, sum(model.rows) >= 9]

    def gradient(f):
        return gradients(lambda x: f(Counted(counts), x, targets, temperature=2.0).sum(), states)

    return [
        Case("each token", "the loss", run()),
        Case("mean", "reduction", run(reduction="mean")),
        Case("sum", "reduction", run(reduction="sum")),
        Case("temperature 2", "temperature", run(temperature=2.0)),
        Case("gradient at temperature 2", "temperature", gradient),
        Case("a model in bf16", "fp32", in_half, tolerance=1e-3),
        Case("LOGITS is 24, that is 4 tokens", "at most LOGITS logits", most_rows),
    ], {"LOGITS": 24, "in_parts": whole_parts}


def token_logprobs_cases(draw):
    counts = shuffled_counts(draw)
    ids = draw.ids(3, 7, high=6)
    mask = rows_of_ones([2, 0, 3], [4, 6, 4], 6)
    rest = rows_of_ones([0, 0, 0], [4, 6, 4], 6) > 0
    other = ids.clone()
    other[:, 1:] = torch.where(rest, ids[:, 1:], (ids[:, 1:] + 1) % 6)

    def run(ids, *args, **kwargs):
        return lambda f: f(Counted(counts), ids, *args, **kwargs)

    def with_states(f):
        model = Counted(counts)
        states = model.hidden(ids)
        return [f(model, ids, states=states), model.calls]

    return [
        Case("all tokens", "the frame", run(ids)),
        Case("temperature 2", "temperature", run(ids, 2.0)),
        Case("with a mask", "the mask", run(ids, mask=mask)),
        Case("other tokens behind the mask", "the mask", run(other, mask=mask), "with a mask",
             "tokens that the mask leaves out"),
        Case("in two parts", "parts", run(ids, mask=mask, parts=2)),
        Case("with states", "states are used", with_states),
        Case("dtype", "fp32", lambda f: str(f(Counted(counts), ids).dtype)),
    ], {"cross_entropy": counted_entropy, "in_parts": whole_parts}


def predicted_cases(draw):
    n = draw.random.randrange(2, 5)
    segments = torch.tensor([[1] * n + [2] * (6 - n) + [3, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2, 3],
                             [1, 1, 1, 0, 0, 0, 0, 0, 0]])
    return [
        Case("three rows", "inside a document", lambda f: call(f, segments)),
        Case("no padding", "inside a document", lambda f: f(segments[1:2])),
        Case("padding", "padding", lambda f: f(segments[2:])),
    ], {}


# A2: the model


def doubled(module, draw, scale=0.5):
    """Return a module in double precision with random weights, in eval mode."""
    module = module.double().eval()
    for p in module.parameters():
        p.data = draw.normal(*p.shape, scale=scale)
    return module


def config_of(n_layer=1, n_head=2, n_embd=8, **sizes):
    return gpt.GPTConfig(**{"vocab_size": 20, "block_size": 12, **sizes}, n_layer=n_layer,
                         n_head=n_head, n_embd=n_embd)


class ToyCache:
    """Keeps what attention stores, and answers a query by a formula that is no attention."""

    def __init__(self, positions=None):
        self.kv = [torch.zeros(2, 2, 2, 9, 4, dtype=torch.float64)]
        self.positions = positions

    def attend(self, layer, q, kv):
        return q + 0.5 * kv[0] - 0.25 * kv[1]

    def open_slots(self):
        return self.positions


def attention_cases(draw):
    module = doubled(gpt.Attention(config_of()), draw)
    x = draw.normal(2, 6, 8)
    later = x.clone()
    later[:, 4:] += 1.0
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[0, 0, 3:, :3] = False   # two documents, the second from position 3
    mask[1, 0, 2:, :2] = False

    def prefill(f):
        cache = ToyCache()
        y = f(module, x, cache, 0)
        return [y, cache.kv[0][:, :, :, :6]]

    def on(x):
        return lambda f: call(lambda x: f(module, x), x)

    return [
        Case("six tokens", "attention", on(x)),
        Case("gradient", "attention",
             lambda f: gradients(lambda x: (f(module, x) * later).sum(), x)),
        Case("first four tokens", "causal", lambda f: f(module, x)[:, :4]),
        Case("another ending", "causal", lambda f: f(module, later)[:, :4], "first four tokens",
             "later tokens"),
        Case("with a mask", "the mask", lambda f: f(module, x, mask=mask)),
        Case("a prefill", "the cache", prefill),
        Case("one token with a cache", "the cache", lambda f: f(module, x[:, :1], ToyCache(), 0)),
    ], {}


def mlp_cases(draw):
    module = doubled(gpt.MLP(config_of()), draw)   # the two GELUs differ by less than 0.0005
    x = draw.normal(2, 3, 8)
    return [Case("six tokens", "tanh GELU", lambda f: call(lambda x: f(module, x), x),
                 tolerance=1e-6),
            Case("gradient", "tanh GELU",
                 lambda f: gradients(lambda x: f(module, x).sum(), x))], {}


class ToyBlock(torch.nn.Module):
    """Adds to each place a weighted sum of what it may see."""

    def forward(self, x, cache=None, layer=0, mask=None):
        T = x.shape[1]
        if mask is None:
            seen = torch.ones(T, T, dtype=torch.bool).tril()
        else:
            seen = mask if mask.dtype == torch.bool else mask > -1.0
        seen = seen.reshape(-1, T, T).double()
        return x + 0.3 * (seen * torch.arange(1, T + 1)) @ x


def hidden_cases(draw):
    model = doubled(gpt.GPT(config_of()), draw)
    model.h = torch.nn.ModuleList([ToyBlock()])
    ids = draw.ids(2, 8, high=20)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 3, 3, 3, 3, 3]])
    real = segments > 0
    other = ids.clone()
    other[0, :3] = (ids[0, :3] + 5) % 20
    cache = ToyCache(torch.tensor([[4], [7]]))
    lengths = torch.tensor([3, 8])

    def gradient(f):
        loss = (f(model, ids) ** 3).sum()
        if not loss.requires_grad:
            return "no gradient"
        return list(torch.autograd.grad(loss, [model.wte.weight, model.wpe.weight]))

    return [
        Case("plain text", "embeddings and blocks", lambda f: f(model, ids)),
        Case("gradient", "embeddings and blocks", gradient),
        Case("packed", "packed rows", lambda f: f(model, ids, segments=segments)[real]),
        Case("second document", "packed rows",
             lambda f: f(model, ids, segments=segments)[0, 3:7]),
        Case("another first document", "packed rows",
             lambda f: f(model, other, segments=segments)[0, 3:7], "second document",
             "another document of the row"),
        Case("one token with a cache", "positions of the cache",
             lambda f: f(model, ids[:, :1], cache)),
        Case("lengths", "lengths", lambda f: f(model, ids, lengths=lengths)[0, :3]),
    ], {}


def unembed_cases(draw):
    model = doubled(gpt.GPT(config_of()), draw)
    states = draw.normal(2, 3, 8)

    def gradient(f):
        model.wte.weight.grad = None
        f(model, states).square().sum().backward()
        grad = model.wte.weight.grad
        return "no gradient" if grad is None else grad

    return [Case("logits", "tied weights", lambda f: call(lambda x: f(model, x), states)),
            Case("gradient of the embedding", "tied weights", gradient)], {}


# A3: the cache, sampling, generation


def cache_model(n_head=2, n_embd=6, block_size=12):
    weight = torch.zeros(8, n_embd, dtype=torch.float64)
    return SimpleNamespace(config=config_of(n_head=n_head, n_embd=n_embd, block_size=block_size),
                           wte=SimpleNamespace(weight=weight), h=[None])


def cache_cases(draw):
    q, new, q2, new2 = [draw.normal(*shape) for shape in
                        [(3, 2, 1, 3), (2, 3, 2, 1, 3)] * 2]
    kv = draw.normal(2, 3, 2, 6, 3)
    lengths = [2, 6, 4]
    garbage = kv.clone()
    for row, n in enumerate(lengths):
        garbage[:, row, :, n:] = 50.0

    def steps(kv, rows=(0, 1, 2)):
        rows = list(rows)
        cache = gpt.KVCache(cache_model(), len(rows), kv.shape[3])
        cache.kv[0] = kv[:, rows].clone()
        cache.fill([lengths[r] for r in rows])
        first = cache.open_slots(), cache.attend(0, q[rows], new[:, rows])
        cache.step()
        second = cache.open_slots(), cache.attend(0, q2[rows], new2[:, rows])
        return first, second

    return [
        Case("positions", "positions", lambda f: [s[0] for s in steps(kv)]),
        Case("two steps", "attention over the past", lambda f: [s[1] for s in steps(kv)]),
        Case("garbage on padding", "padding", lambda f: [s[1] for s in steps(garbage)], "two steps",
             "what stands on padding"),
        Case("a short row in a batch", "rows are independent", lambda f: steps(kv)[0][1][:1]),
        Case("a short row alone", "rows are independent", lambda f: steps(kv, [0])[0][1],
             "a short row in a batch", "the other rows of the batch"),
    ], {}


SHARES = torch.tensor([0.10, 0.40, 0.01, 0.15, 0.30, 0.04], dtype=torch.float64)


def sample_cases(draw):
    shares = SHARES[torch.randperm(6, generator=draw.rng)]
    logits = shares.log().repeat(20_000, 1)
    few = draw.normal(4, 6)

    def counts(f, **kwargs):
        rng = torch.Generator().manual_seed(3)
        drawn = f(logits.clone(), rng=rng, **kwargs)
        return torch.bincount(drawn, minlength=6).double() / len(drawn)

    def frequencies(**kwargs):
        return lambda f: counts(f, **kwargs)

    def support(**kwargs):
        return lambda f: counts(f, **kwargs) > 0

    def seeded(f):
        draws = []
        for noise in (1, 2):
            torch.manual_seed(noise)
            draws.append(f(logits[:50].clone(), rng=torch.Generator().manual_seed(5)))
        return [torch.equal(*draws), draws[0].shape[0]]

    return [
        Case("temperature 0", "greedy", lambda f: f(few.clone(), temperature=0)),
        Case("frequencies", "the distribution", frequencies(), tolerance=0.02),
        Case("frequencies at temperature 2", "temperature", frequencies(temperature=2.0),
             tolerance=0.02),
        Case("top 3", "top_k", support(top_k=3)),
        Case("frequencies of the top 3", "top_k", frequencies(top_k=3), tolerance=0.02),
        Case("top .65", "top_p", support(top_p=0.65)),
        Case("top .05", "top_p", support(top_p=0.05)),
        Case("frequencies of the top .65", "top_p", frequencies(top_p=0.65), tolerance=0.02),
        Case("the same generator", "the generator", seeded),
    ], {}


class ToyLM:
    """A language model whose next token depends on all earlier tokens and their places."""

    def __init__(self, values, block_size=12):
        self.__dict__.update(vars(cache_model(1, 2, block_size)), values=values, training=True)

    def train(self, mode=True):
        self.training = mode
        return self

    def eval(self):
        return self.train(False)

    def hidden(self, ids, cache=None, segments=None, lengths=None):
        T = ids.shape[1]
        if cache is None or T > 1 or not hasattr(cache, "seen"):
            seen = self.values[ids] * torch.arange(1, T + 1)                  # (B, T)
            if cache is not None:
                cache.kv[0][0, :, 0, :T, 0] = seen
                cache.seen = True
            states = seen.cumsum(1)
        else:
            S = cache.kv[0].shape[3]
            if cache.longest >= S:
                cache.kv[0] = torch.nn.functional.pad(cache.kv[0], (0, 0, 0, 8))
            rows = torch.arange(len(ids))
            at = cache.lengths
            cache.kv[0][0, rows, 0, at, 0] = self.values[ids[:, 0]] * (at + 1)
            past = torch.arange(cache.kv[0].shape[3]) <= at[:, None]
            states = (cache.kv[0][0, :, 0, :, 0] * past).sum(1, keepdim=True)
        states = states + (0.37 if self.training else 0.0)
        return torch.stack([states, torch.ones_like(states)], -1)

    def unembed(self, states):
        return torch.sin(states[..., :1] * torch.arange(2.0, 10.0, dtype=torch.float64))

    def __call__(self, ids, segments=None):
        return self.unembed(self.hidden(ids))


def greedy_tokens(logits, temperature=1.0, top_k=None, top_p=None, rng=None):
    """Stand in for gpt.sample_tokens: the likeliest token at every temperature."""
    return logits.argmax(-1)


def generate_cases(draw):
    values = draw.normal(8)
    prompts = [[1, 2], [3, 4, 5, 6, 7], [1, 2], [5], [2, 2, 2, 2]]
    long = [[1] * 9, [2, 3]]

    def run(prompts, n, **kwargs):
        return lambda f: f(ToyLM(values), [list(p) for p in prompts], n, temperature=0, **kwargs)

    def mode(f):
        model = ToyLM(values)
        f(model, [[1, 2]], 2, temperature=0)
        after = model.training
        f(model.eval(), [[1, 2]], 2, temperature=0)
        return [after, model.training]

    stop = ToyLM(values).eval()(torch.tensor([[1, 2]]))[0, -1].argmax().item()
    return [
        Case("ragged prompts", "ragged prompts", run(prompts, 6)),
        Case("a long prompt first", "ragged prompts", run(prompts[1:], 6)),
        Case("a short row in a batch", "rows are independent",
             lambda f: run(prompts, 6)(f)[3]),
        Case("a short row alone", "rows are independent", lambda f: run(prompts[3:4], 6)(f)[0],
             "a short row in a batch", "the other rows of the batch"),
        Case("stop", "the end", run(prompts, 6, stop=stop)),
        Case("context", "the end", run(long, 8)),
        Case("one token", "the end", run(prompts, 1)),
        Case("train and eval mode", "no dropout, the mode is restored", mode),
        Case("in train mode", "no dropout, the mode is restored", run(prompts[:1], 5)),
    ], {"sample_tokens": greedy_tokens}


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


# A5: rankings


# (first better than second) for each row of ranks that the cases use
PAIRS = {(1, 2, 2, 3): [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)], (2, 0, 1, 0): [(2, 0)],
         (1, 1, 1, 0): [], (3, 1, 4, 2): [(0, 2), (1, 0), (1, 2), (1, 3), (3, 0), (3, 2)]}


def listed_pairs(ranks):
    """Stand in for reward.pair_mask on the ranks in PAIRS."""
    mask = torch.zeros(len(ranks), 4, 4, dtype=torch.bool)
    for row, of_row in enumerate(ranks.long().tolist()):
        for i, j in PAIRS[tuple(of_row)]:
            mask[row, i, j] = True
    return mask


def ranks_of(draw, *rows):
    rows = list(rows)
    draw.random.shuffle(rows)
    return torch.tensor(rows).double()


def pair_mask_cases(draw):
    ranks = ranks_of(draw, (1, 2, 2, 3), (3, 1, 4, 2), (2, 0, 1, 0), (1, 1, 1, 0))

    def marked(ranks):
        return lambda f: [f(ranks.clone()).double(), []]

    return [
        Case("distinct ranks", "who is better", marked(torch.tensor([[3.0, 1, 4, 2]]))),
        Case("ties", "ties", marked(torch.tensor([[1.0, 2, 2, 3], [1, 1, 1, 1]]))),
        Case("absent responses", "absent responses", marked(torch.tensor([[2.0, 0, 1, 0]]))),
        Case("a batch", "who is better", marked(ranks)),
    ], {}


def ranking_loss_cases(draw):
    ranks = ranks_of(draw, (1, 2, 2, 3), (3, 1, 4, 2), (2, 0, 1, 0))
    scores = draw.normal(3, 4)
    tied = torch.cat([ranks, torch.tensor([[1.0, 1, 1, 0]])])
    more = torch.cat([scores, draw.normal(1, 4)])
    wrong = torch.tensor([[-2000.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    one = torch.tensor([[1.0, 2, 2, 3]]).double()

    return [
        Case("three prompts", "the loss", lambda f: call(f, scores, ranks)),
        Case("gradient", "the loss", lambda f: gradients(f, scores, ranks)),
        Case("one prompt", "mean over pairs, then prompts", lambda f: f(scores[:1], ranks[:1])),
        Case("a tied prompt more", "mean over pairs, then prompts", lambda f: call(f, more, tied),
             "three prompts", "a prompt without a pair"),
        Case("very wrong scores", "stable", lambda f: [f(wrong, one), gradients(f, wrong, one)]),
        Case("all tied", "no pair", lambda f: f(scores[:1], tied[3:])),
    ], {"pair_mask": listed_pairs}


class ToyReward:
    """Scores (B, T) as given; with lengths, 0 behind them."""

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, ids, lengths=None):
        if lengths is None:
            return self.scores
        return self.scores * (torch.arange(ids.shape[1]) < lengths[:, None])

    forward = __call__


def score_cases(draw):
    scores, ids = draw.normal(4, 6), draw.ids(4, 6)
    lengths = torch.tensor([6, 2, 4, 3])
    other = torch.where(torch.arange(6) < lengths[:, None], scores, 40.0)
    return [
        Case("four rows", "the last real token",
             lambda f: f(ToyReward(scores), ids, lengths.clone())),
        Case("40 on padding", "padding", lambda f: f(ToyReward(other), ids, lengths.clone()),
             "four rows", "the padding"),
        Case("gradient", "the last real token",
             lambda f: gradients(lambda s: f(ToyReward(s), ids, lengths).sum(), scores)),
    ], {}


class Letters:
    """An encoding of one id per letter, with <|end|> = 99."""

    def encode_ordinary(self, text):
        return [ord(c) - 96 for c in text]

    def encode_single_token(self, token):
        return 99


def tokenize_cases(draw):
    prompts = ["abcdefgh", "ab", "abc"]
    records = [{"prompt": p, "responses": ["xyz", "uv", "w" * draw.random.randrange(4, 6)],
                "ranks": [2, 1, 3], "user": i} for i, p in enumerate(prompts)]
    records[2]["responses"][2] = "z" * 20

    def run(records, block):
        def result(f):
            found = f([dict(r) for r in records], lambda p, enc: enc.encode_ordinary(p), Letters(),
                      block)
            return [[[r.tolist() for r in c.rows], c.start, c.record["responses"],
                     c.record["ranks"]] for c in found]
        return result

    return [
        Case("all fits", "prompt, response, end", run(records[:2], 40)),
        Case("a long prompt", "the prompt is cut at its beginning", run(records[:1], 9)),
        Case("a response that is too long", "what does not fit is left out", run(records, 12)),
    ], {}


# A6: the reward of a token


def response_mask_cases(draw):
    starts = torch.tensor([2, 4, 1])
    lengths = torch.tensor([5, 7, 1 + draw.random.randrange(1, 4)])

    def marked(starts, lengths, T):
        return lambda f: f(starts.clone(), lengths.clone(), T).double()

    return [
        Case("three rows", "response tokens and the end", marked(starts, lengths, 7)),
        Case("one response token", "response tokens and the end",
             marked(torch.tensor([3]), torch.tensor([4]), 6)),
        Case("no response", "an empty response", marked(torch.tensor([3]), torch.tensor([3]), 5)),
    ], {}


def kl_rewards_cases(draw):
    logprobs, ref = draw.normal(4, 6) - 2.0, draw.normal(4, 6) - 2.0
    scores = draw.normal(4)
    mask = rows_of_ones([2, 0, 1, 3], [5, 6, 2, 3], 6)   # the last row is empty
    inside = mask > 0
    spoiled = torch.where(inside, logprobs, NAN)
    moved = torch.where(inside, logprobs, logprobs + 2.0)
    zero = torch.zeros(4, dtype=torch.float64)

    def run(scores, logprobs, beta):
        return lambda f: call(f, scores, logprobs, ref, mask, beta)

    return [
        Case("beta .2", "penalty and score", run(scores, logprobs, 0.2)),
        Case("beta 0", "the score on the last token", run(scores, logprobs, 0.0)),
        Case("scores of 0", "the penalty", run(zero, logprobs, 0.5)),
        Case("padding moved", "padding", run(scores, moved, 0.2), "beta .2",
             "log-probs outside the mask"),
        Case("NaN outside the mask", "padding", run(scores, spoiled, 0.2), "beta .2",
             "what stands outside the mask"),
        Case("an empty row", "an empty response", lambda f: f(
            scores[3:], logprobs[3:], ref[3:], mask[3:], 0.2)),
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
    # Clipped above and below; a small step; a large one in the wrong direction: not clipped.
    step[0, :4] = torch.tensor([0.5, -0.5, 0.1, -0.5])
    advantages = draw.normal(3, 5)
    advantages[0, :4] = torch.tensor([1.0, -1.0, 1.0, 1.0])
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
    step[1, 1:3] = 0.6
    returns[1, 1:3] = old[1, 1:3]   # clipped V is nearer than V
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


# A9: rollout and losses


PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5, 6]]
RESPONSES = [[11, 1], [12, 13, 14, 15], [1]]   # 1 is the end token; the second was cut for length
MASK = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 1, 0]]).float()   # (3, T-1)


def canned(model, prompts, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, stop=None,
           seed=None):
    """Stand in for gpt.generate: RESPONSES, changed where the sampling is not PPO's."""
    shift = 3 * (temperature != 1) + 5 * (top_k is not None) + 7 * (top_p is not None)
    more = [] if stop == 1 else [2]
    return [[x if x == 1 else x + shift for x in r] + more for r in RESPONSES]


def canned_mask(starts, lengths, T):
    """Stand in for ppo.response_mask on PROMPTS and RESPONSES."""
    return torch.nn.functional.pad(MASK, (0, T - 1 - MASK.shape[1]))


class ToyValue:
    """Values and scores that depend on tokens and places."""

    def __init__(self, scale):
        self.scale = torch.tensor(scale, dtype=torch.float64)

    def __call__(self, ids, lengths=None):
        return torch.cos(self.scale * ids + 0.5 * torch.arange(ids.shape[1]))

    def score(self, ids, lengths):
        return torch.sin(self.scale * ids[torch.arange(len(ids)), lengths - 1] + lengths)


def rollout_cases(draw):
    scales = (draw.normal(4) * 0.2 + 1.0).tolist()
    cfg = SimpleNamespace(max_new_tokens=4, grad_accum=1, missing_eos_score=-3.0)

    def rolled(f, names, offline=False):
        policy, reference = toy(scales[0]), toy(scales[1])
        sampler = reference if offline else policy
        b = f(sampler, policy, reference, ToyValue(scales[2]), ToyValue(scales[3]),
              [list(p) for p in PROMPTS], 1, cfg, 7)
        return [getattr(b, name) for name in names.split()]

    def fields(names, **kwargs):
        return lambda f: rolled(f, names, **kwargs)

    return [
        Case("ids and responses", "sampling at temperature 1, to the end token",
             fields("ids lengths responses")),
        Case("mask", "the mask", fields("mask")),
        Case("log-probs", "log-probs of three models", fields("logprobs ref_logprobs")),
        Case("old log-probs", "log-probs of three models", fields("old_logprobs")),
        Case("old log-probs, offline", "old is the sampler", fields("old_logprobs", offline=True)),
        Case("values", "values before the action", fields("values")),
        Case("scores", "scores", fields("scores")),
        Case("ended", "scores", fields("ended")),
    ], {"generate": canned, "token_logprobs": token_table, "response_mask": canned_mask}


def toy_policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """Stand in for ppo.policy_loss: a formula in which every argument counts."""
    loss = ((2 * logprobs - old_logprobs) * advantages * mask).sum() * (1 + clip)
    return loss, torch.tensor(0.25)


def toy_value_loss(values, old_values, returns, mask, clip=0.2):
    """Stand in for ppo.value_loss."""
    return ((values - 0.5 * old_values) * returns * mask).sum() * (1 - clip)


def losses_cases(draw):
    B, T = 4, 7
    lengths = torch.tensor([5, 7, 4, 6])
    mask = rows_of_ones([2, 1, 2, 3], [4, 6, 3, 5], T - 1)
    ids = draw.ids(B, T)
    b = SimpleNamespace(ids=ids, lengths=lengths, mask=mask, ref_logprobs=draw.normal(B, T - 1),
                        old_logprobs=token_table(toy(1.3), ids) + 0.3 * draw.normal(B, T - 1),
                        logprobs=draw.normal(B, T - 1), values=draw.normal(B, T - 1))
    advantages, returns = draw.normal(B, T - 1), draw.normal(B, T - 1)
    rows = torch.tensor([2, 0, 3])
    cfg = SimpleNamespace(grad_accum=1, clip=0.2, value_clip=0.3)
    policy_scale, value_scale = 1.3, 0.9

    def run(f):
        policy, value = toy(policy_scale), ToyValue(value_scale)
        policy.scale.requires_grad_(True)
        value.scale.requires_grad_(True)
        pg_loss, vf_loss, stat = f(policy, value, b, advantages, returns, rows, cfg)
        return policy, value, pg_loss, vf_loss, {k: float(v) for k, v in stat.items()}

    def gradient(f, of_value):
        policy, value, pg_loss, vf_loss, _ = run(f)
        loss, leaf = (vf_loss, value.scale) if of_value else (pg_loss, policy.scale)
        if not loss.requires_grad:
            return "no gradient"
        grad = torch.autograd.grad(loss, leaf, allow_unused=True)[0]
        return "no gradient" if grad is None else grad

    def stat(*names):
        return lambda f: [run(f)[4][name] for name in names]

    return [
        Case("policy loss", "policy loss", lambda f: run(f)[2]),
        Case("gradient of the policy", "policy loss", lambda f: gradient(f, False)),
        Case("value loss", "value loss", lambda f: run(f)[3]),
        Case("gradient of the critic", "value loss", lambda f: gradient(f, True)),
        Case("approxkl", "approxkl", stat("approxkl")),
        Case("ratio", "other statistics", stat("ratio")),
        Case("clip fractions", "other statistics", stat("clipfrac", "vclip")),
        Case("losses", "other statistics", stat("pg", "vf")),
    ], {"token_logprobs": token_table, "policy_loss": toy_policy_loss,
        "value_loss": toy_value_loss} | mean_of(mask[rows])


# A11: DPO


def dpo_loss_cases(draw):
    logprobs = [draw.normal(5) - 6.0 for _ in range(4)]

    def run(**kwargs):
        return lambda f: call(f, *logprobs, **kwargs)[0][0]

    def rewards(f):
        leaves = [x.clone().requires_grad_(True) for x in logprobs]
        _, chosen, rejected = f(*leaves, beta=0.3)
        return [chosen, rejected, carries_gradient([chosen, rejected])]

    return [
        Case("beta .1", "the loss", run()),
        Case("beta .5", "the loss", run(beta=0.5)),
        Case("gradient", "the loss",
             lambda f: gradients(f, *logprobs, wrt=(0, 1), beta=0.5)),
        Case("very wrong", "stable",
             lambda f: f(*[torch.tensor([x]) for x in (-9e3, 0.0, 0.0, 0.0)], beta=1.0)[0]),
        Case("rewards", "rewards", rewards),
        Case("label smoothing .2", "label smoothing", run(beta=0.5, label_smoothing=0.2)),
        Case("ipo", "ipo", run(beta=0.3, kind="ipo")),
        Case("kind hinge", "ipo", run(kind="hinge")),
    ], {}


def response_logprobs_cases(draw):
    ids = draw.ids(3, 8)
    mask = rows_of_ones([2, 4, 3], [5, 8, 4], 8).long()
    padded = torch.cat([ids, torch.zeros(3, 3, dtype=torch.long)], 1)
    longer = torch.cat([mask, torch.zeros(3, 3, dtype=torch.long)], 1)
    return [
        Case("three responses", "sum over the response", lambda f: f(toy(1.3), ids, mask)),
        Case("the same with padding", "padding", lambda f: f(toy(1.3), padded, longer),
             "three responses", "the padding"),
    ], {"token_logprobs": token_table}


def choose_pairs_cases(draw):
    responses = ["a", "b", "c", "a"]
    ranks = [2.0, 1.0, 3.0, 1.0]

    def run(responses, ranks, how, seed=1):
        return lambda f: sorted([list(p) for p in f(list(responses), list(ranks), how,
                                                    random.Random(seed))])

    def drawn(f):
        found = [f(list(responses), list(ranks), "random", random.Random(s)) for s in range(40)]
        return [sorted({len(pairs) for pairs in found}), len({tuple(p[0]) for p in found})]

    nearly = [1.0, 1.000000001, 2.0]
    return [
        Case("all", "all pairs, better first", run(responses, ranks, "all")),
        Case("equal responses", "equal responses", run(["a", "a", "b"], [1.0, 2.0, 3.0], "all")),
        Case("ties", "ties", run(["a", "b", "c"], [1.0, 1.0, 2.0], "all")),
        Case("ranks that differ in the ninth digit", "ties", run(["a", "b", "c"], nearly, "all")),
        Case("extreme", "extreme", run(responses, ranks, "extreme")),
        Case("random", "random", drawn),
        Case("nothing to choose from", "random", run(["a", "a"], [1.0, 2.0], "random")),
    ], {}


# A12: honest evaluation


def mean_and_ci_cases(draw):
    values = draw.normal(9).tolist()
    return [
        Case("nine values", "the mean", lambda f: f(list(values))[0]),
        Case("their interval", "the interval", lambda f: f(list(values))[1]),
        Case("two values", "the interval", lambda f: list(f(values[:2]))),
        Case("one value", "one value", lambda f: list(f(values[:1]))),
    ], {}


def win_rate_cases(draw):
    mine = [0.5, 1.0, -1.0, 0.0, 0.5, 1.0]
    theirs = [0.5, 0.5, 0.0, 0.0, 0.5, -1.0]
    order = draw.random.sample(range(6), 6)
    mine, theirs = [[x[i] for i in order] for x in (mine, theirs)]
    distinct = [x + 0.01 * i for i, x in enumerate(mine)]
    return [
        Case("wins, losses and ties", "ties count half", lambda f: f(list(mine), list(theirs))[0]),
        Case("the other way round", "ties count half", lambda f: f(list(theirs), list(mine))[0]),
        Case("no ties", "wins", lambda f: f(distinct, [x - 0.005 for x in theirs])[0]),
        Case("wins only", "wins", lambda f: f([1.0, 2.0], [0.0, 0.0])[0]),
    ], {"mean_and_ci": lambda values: (sum(values) / len(values), 0.0)}


# A13: a judge is data


def parse_score_cases(draw):
    n = draw.random.randrange(2, 9)

    def read(*texts, **kwargs):
        return lambda f: [f(text, **kwargs) for text in texts]

    return [
        Case("one score", "the score", read(f"true 3. Score: {n}", f"Score: {n}.5")),
        Case("numbers before it", "the last score", read(f"some 1 much 0. Score: {n}",
                                                         f"Score: 1. No: Score: {n}")),
        Case("no score", "None", read("true 3 polite 3", "", "Score: none")),
        Case("above the maximum", "None", read("Score: 10", "Score: 99", f"Score: 1, Score: 1{n}")),
        Case("another maximum", "None", read("Score: 10", max_score=10)),
        Case("letters and colons", "the score", read(f"SCORE: {n}", f"score：{n}", f"Score:{n}")),
        Case("another word", "None", read(f"underscore: {n}")),
    ], {}


def mean_score_cases(draw):
    a, b = [float(draw.random.randrange(1, 10)) for _ in range(2)]
    return [
        Case("two scores", "the mean", lambda f: f([a, b])),
        Case("None among them", "unreadable is not 0", lambda f: f([a, None, b])),
        Case("NaN among them", "unreadable is not 0", lambda f: f([a, NAN, b])),
        Case("a score of 0", "0 is a score", lambda f: f([0.0, b])),
        Case("nothing readable", "None", lambda f: [f([None, NAN]), f([])]),
    ], {}


def make_pairs_cases(draw):
    texts = [["a", "b", "c"], ["a", "b", "c"], ["a", "a", "b"], ["a", "b", "c"], ["a", "b", "c"],
             ["a", "b", "a"]]
    x = float(draw.random.randrange(1, 4))
    scores = [[x, x + 4, x + 2], [5.0, 5.0, 5.0], [x, x + 3, x + 1], [2.0, None, 2.5],
              [None, None, 3.0], [1.0, 4.0, 6.0]]

    def run(rows, margin=1.0):
        def result(f):
            pairs, dropped = f([texts[i] for i in rows], [list(scores[i]) for i in rows], margin)
            return [[list(p) for p in pairs], {k: v for k, v in dict(dropped).items() if v}]
        return result

    return [
        Case("highest and lowest", "highest against lowest", run([0])),
        Case("equal scores", "no pair without a difference", run([1, 0])),
        Case("equal texts", "no pair without a difference", run([2, 5])),
        Case("below the margin", "the margin", run([3, 0])),
        Case("exactly the margin", "the margin", run([0], margin=4.0)),
        Case("not judged", "not judged", run([4, 3], margin=0.1)),
        Case("all prompts", "highest against lowest", run([0, 1, 2, 3, 4, 5])),
    ], {}


PROBES = {
    "cross_entropy": cross_entropy_cases, "token_logprobs": token_logprobs_cases,
    "predicted": predicted_cases,
    "attention": attention_cases, "mlp": mlp_cases, "hidden": hidden_cases,
    "unembed": unembed_cases,
    "cache": cache_cases, "sample_tokens": sample_cases, "generate": generate_cases,
    "render": render_cases, "response_loss": response_loss_cases, "chat_loss": chat_loss_cases,
    "split_by_user": split_cases,
    "pair_mask": pair_mask_cases, "ranking_loss": ranking_loss_cases, "score": score_cases,
    "tokenize": tokenize_cases,
    "response_mask": response_mask_cases, "kl_rewards": kl_rewards_cases,
    "gae": gae_cases, "whiten": whiten_cases,
    "masked_mean": masked_mean_cases, "policy_loss": policy_loss_cases,
    "value_loss": value_loss_cases,
    "rollout": rollout_cases, "losses": losses_cases,
    "dpo_loss": dpo_loss_cases, "response_logprobs": response_logprobs_cases,
    "choose_pairs": choose_pairs_cases,
    "mean_and_ci": mean_and_ci_cases, "win_rate": win_rate_cases,
    "parse_score": parse_score_cases, "mean_score": mean_score_cases,
    "make_pairs": make_pairs_cases,
}


def of(name, seed=0):
    """Return (cases, stand-ins) of a part. Seed 0 is public; a teacher's seed is not."""
    return PROBES[name](Draw(seed))
