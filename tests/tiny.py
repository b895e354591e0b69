"""What the tests share: tiny models, small files, messages, and a tree small enough to enumerate.

Import a name from here with `from tiny import random_gpt`. The fixture `seeded` is in conftest.py:
a file whose tests draw random tensors has `pytestmark = pytest.mark.usefixtures("seeded")`.
"""

import json
import math
import random
import re
from pathlib import Path

import torch

import gpt
import reward
from data import tokenizer
from scaffold.run import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
ENC = tokenizer.get_tokenizer()
SPECIAL = {name: ENC.encode_single_token(name) for name in tokenizer.SPECIAL}
END = SPECIAL["<|end|>"]


# Models


def random_gpt(vocab=50, block=64, seed=0, dtype=torch.float64, scale=0.3, **sizes):
    """Return a small GPT in eval mode whose weights, biases and gains are far from their start.

    Noise of std `scale` is added to every parameter, so that no term of the forward pass is too
    small to be missed by a test. In double precision a tolerance of 1e-10 tells a wrong formula
    from rounding. `sizes` overrides n_layer=2, n_head=4, n_embd=32 and the rest of GPTConfig.
    """
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=4, n_embd=32) | sizes
    model = gpt.GPT(gpt.GPTConfig(vocab, block, **sizes))
    for p in model.parameters():
        p.data += scale * torch.randn_like(p)
    return model.to(dtype).eval()


def tiny_gpt(seed):
    """Return a random GPT, fp32, context 64; about half of its responses end within 8 tokens."""
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 64, n_layer=2, n_head=2, n_embd=32))
    torch.manual_seed(seed)  # after the init: the tests do not depend on how gpt.py draws weights
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.1)
        end = model.wte.weight[END]
        model.ln_f.bias.copy_(5.5 * end / end.square().sum())  # raises the end token's logit
    return model.eval()


def tiny_reward(seed):
    """Return a random reward model with a mean of 0.3 and a std of 0.7 to normalise with."""
    model = reward.RewardModel(tiny_gpt(seed))
    torch.nn.init.normal_(model.head.weight, std=0.2)
    model.mean.fill_(0.3)
    model.std.fill_(0.7)
    return model.eval()


def save_reward(path, model):
    """Save a RewardModel as reward.py does, under the built-in tokenizer."""
    config = vars(model.body.config)
    weights = model.state_dict()
    fingerprint = tokenizer.fingerprint(ENC)
    save_checkpoint(path, model=weights, gpt=config, tokenizer="", fingerprint=fingerprint)


def same_weights(a, b):
    """Are two models equal, bit for bit? Takes modules or state dicts."""
    a, b = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Tensors and numbers


def random_ids(lengths, vocab=50, seed=0):
    """Return one list of random token ids for each length."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(n)] for n in lengths]


def assert_close(a, b, tolerance=1e-10):
    """Compare two tensors, or two sequences of tensors, at one absolute and relative tolerance."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def softplus(x):
    """log(1 + exp(x)) of a float, which is -log sigmoid(-x)."""
    return math.log1p(math.exp(x))


# Messages and files


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def chat(*contents):
    """Return messages that alternate: user, assistant, user, ..."""
    return [(user, assistant)[i % 2](content) for i, content in enumerate(contents)]


def write_jsonl(path, *records):
    """Write one record a line and return the path. A string is written as it is: a broken line."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def documented_formats():
    """Return {format: (two lines, scripts)} of the table of formats in data/README.md."""
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| `(.+)` <br> `(.+)` \| (.+) \|$", text, re.M)
    return {name: ([a.replace("\\|", "|"), b.replace("\\|", "|")], scripts.split(", "))
            for name, a, b, scripts in rows}


def read_jsonl(path):
    """Return the records of a file of JSON lines, such as a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def random_documents(lengths, seed=0):
    """Return one document for each length, of that many lines; no two lines are alike."""
    rng = random.Random(seed)

    def line():
        name = rng.choice(["Tom", "Ann", "Mia"])
        return f"{name} has {rng.randrange(10**6)} apples, 苹果.\n"

    return ["".join(line() for _ in range(n)) for n in lengths]


def write_documents(path, documents):
    """Write documents into one text file, separated as gpt.py expects, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("<|end|>\n".join(documents).encode())
    return path


def join_pieces(pieces):
    """Undo data.text.cut for documents that end with <|end|>, in order -> a list of ids."""
    ids = []
    for piece in map(torch.Tensor.tolist, pieces):
        if ids and ids[-1] != END:  # the document goes on, with a token that it shares
            assert piece[0] == ids.pop()
        ids += piece
    return ids


def write_tokenizer(path, **changes):
    """Write data/tokenizer.json with some entries changed and return the new path, a string."""
    raw = json.loads((ROOT / "data" / "tokenizer.json").read_text())
    path.write_text(json.dumps(raw | changes))
    return str(path)


# Calls


class Recorder:
    """Replaces module.name by a wrapper that keeps every call.

    `calls` is a list of (positional arguments, result); tensors among the arguments are copied.
    """

    def __init__(self, monkeypatch, module, name):
        self.calls = []
        function = getattr(module, name)

        def recorded(*args, **kwargs):
            kept = [a.detach().clone() if torch.is_tensor(a) else a for a in args]
            result = function(*args, **kwargs)
            self.calls.append((kept, result))
            return result

        monkeypatch.setattr(module, name, recorded)


# A tree of responses: up to 3 tokens of {0: end, 1: a, 2: b}. A state is what was written so far;
# as in a binary heap, the state after `a` is 2s + 1 and after `b` is 2s + 2. A policy is a table
# of logits (7, 3), small enough that its best version is a formula.


def tree_responses():
    """Return states, actions and mask, (15, 3) each: all responses that the tree has."""
    paths = []

    def walk(path, state):
        for action in range(3):
            longer = path + [(state, action)]
            if action == 0 or len(longer) == 3:
                paths.append(longer)
            else:
                walk(longer, 2 * state + action)

    walk([], 0)
    padded = [p + [(0, 0)] * (3 - len(p)) for p in paths]
    states, actions = torch.tensor(padded).unbind(-1)
    mask = torch.tensor([[float(t < len(p)) for t in range(3)] for p in paths])
    return states, actions, mask


def tree_score(actions, mask):
    """Score responses (N, 3) -> (N,): +1 for each a, -0.3 for each b, -1 without an end token."""

    def count(action):
        return ((actions == action) * mask).sum(1)

    return count(1) - 0.3 * count(2) - (count(0) == 0).float()


def tree_policy(seed):
    """Return a random policy: logits (7, 3), fp64."""
    rng = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(7, 3, generator=rng, dtype=torch.float64)
