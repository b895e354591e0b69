"""A GPT in one file: tokenizer, model, generation with a KV cache, checkpoints, next-token pretraining.

Idea. A language model learns to speak by guessing the next token of a great deal of text. The loss of a text
x_1 .. x_T is

    L = -1/(T-1) * sum_t log p(x_{t+1} | x_1 .. x_t)                      a causal model: p never sees x_{t+1}

and the model is GPT-2's: token + position embeddings, then n_layer blocks of

    x = x + attention(layernorm(x))        softmax(q k' / sqrt(d)) v over the positions to the left
    x = x + mlp(layernorm(x))              4C wide, tanh GELU

a last LayerNorm, and logits read off with the token embedding itself (tied weights).

    python gpt.py                                    pretrain on the embedded village (made on the first run)
    python gpt.py --data my.txt --out out/mine       on any UTF-8 text: a file, or a folder of *.txt
    python gpt.py --sample "Tom went to the"         continue a text with the checkpoint that is there

Two minutes and a half on two CPU cores. Read next: sft.py.

Letters: B batch, T time, C channels, H heads, D = C/H, V vocabulary. `logits[:, t]` predicts `ids[:, t+1]`.
Padding stands on the right, in training and in generation: a causal model's real tokens never see it.
"""
import argparse, ast, base64, dataclasses, difflib, hashlib, inspect, json, math, os, random, re, sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import regex  # tiktoken depends on it; the standard `re` does not know \p{L}
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

# What stands around a training loop has a file of its own; later stages know it by this one's name.
from run import (Run, UserError, fair, join, load_checkpoint, log_metrics, once, run_folder, save_checkpoint, set_seed, share,
                 take_step)

HERE = Path(__file__).parent


@dataclass
class Config:
    data: str = ""
    "a UTF-8 text file, or a folder of *.txt (one source each); a line <|end|> parts documents; empty: the village"
    mixture: str = ""
    "how often each source is drawn, such as 'books=2,web=1'; empty: mixture.json of the folder, else by size"
    out: str = "out"
    "folder of this run: checkpoints, metrics and generated data; use one folder per seed"
    tokenizer: str = ""
    "a file made by data/bpe.py or a tiktoken name such as gpt2; empty: the village's 1024 tokens, fit for any text"
    init: str = ""
    "a checkpoint to read on from; it decides the sizes below, but --block-size may lengthen its context"
    init_from: str = ""
    "a folder with GPT-2 weights in Hugging Face's layout to start from; it decides the five sizes below"
    n_layer: int = 2
    "depth; 2 x 128 learns the village in minutes, 6 x 384 wants a GPU"
    n_head: int = 4
    "attention heads; must divide n_embd"
    n_embd: int = 128
    "width; time grows with its square"
    block_size: int = 128
    "context in tokens; prompt and answer of every later stage must fit in it"
    dropout: float = 0.0
    "0 when each text is seen about once; 0.1 to 0.2 when a small text is seen many times"
    steps: int = 7000
    "optimizer steps; 1 to 2 epochs of the text are the usual amount"
    batch_tokens: int = 512
    "tokens per step; small steps, and many, teach a tiny model fastest; 100k and more for 100M parameters"
    lr: float = 2e-3
    "peak learning rate of AdamW; 2e-3 below 1M parameters, 6e-4 at 100M"
    schedule: str = "cosine"
    "cosine (down to a tenth) or constant; both after a short warmup"
    weight_decay: float = 0.01
    "on matrices only"
    val_fraction: float = 0.05
    "the tail of each source that is kept for validation"
    eval_every: int = 1000
    "steps between two looks at the validation loss"
    sample: str = ""
    "a text to continue with OUT/gpt.pt; nothing is trained"
    save_every: int = 500
    "steps between two savings of all that --resume needs, in OUT/gpt.state; 0: on Ctrl-C alone"
    resume: bool = False
    "go on with the run in OUT that was stopped or killed, bit for bit"
    seed: int = 0
    "same seed, same machine, same run"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


@dataclass
class GPTConfig:
    """Sizes of a GPT-2. `vocab_size` counts the special tokens, `block_size` is the longest sequence."""
    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None, layer=0, mask=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)     # (B, H, T, D) each
        if cache is not None:
            k, v = cache.write(layer, k, v)                                   # (B, H, S, D), S >= T
        if T > 1 or cache is None:
            # A cache is filled once, from empty, so a long input starts at position 0 and plain causality is right.
            y = F.scaled_dot_product_attention(q, k[:, :, :T], v[:, :, :T], attn_mask=mask, is_causal=mask is None,
                                               dropout_p=self.dropout if self.training else 0.0)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.visible())
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))                # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))          # GPT-2's GELU is the tanh form


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, layer=0, mask=None):
        x = x + self.drop(self.attn(self.ln_1(x), cache, layer, mask))
        return x + self.drop(self.mlp(self.ln_2(x)))


def sines(T, C):
    """Positions as in Vaswani et al. (2017), small: (T, C)."""
    angle = torch.arange(T)[:, None] * 10_000 ** -(torch.arange(0, C, 2) / C)                     # (T, ceil(C/2))
    return 0.05 * torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :C]


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): pre-LayerNorm, learned positions, tanh GELU, tied embeddings."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f"--n-embd {config.n_embd} is no multiple of --n-head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        for name, p in self.named_parameters():
            # GPT-2's init. Residual projections are scaled down so that depth does not blow up the stream; peaked
            # logits at the start would also meet denormal numbers, which a CPU multiplies 100 times slower.
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # Two departures, for the sake of small models: wider token embeddings, and positions that start as sines. Copying words
        # from the prompt, what a tiny model learns last, comes a little sooner (one seed, 1.2M tokens: loss 0.51 instead of
        # 0.53, and one more kind of word is copied). Both are trained as usual.
        nn.init.normal_(self.wte.weight, std=0.06)
        self.wpe.weight.data = sines(config.block_size, config.n_embd)

    def hidden(self, ids, cache=None, segments=None):
        """(B, T) token ids -> (B, T, C) states after the last LayerNorm: what every head reads.

        segments (B, T), if given, numbers the texts that `pack` put into a row: each starts at position 0 and sees only itself.
        """
        B, T = ids.shape
        if T > self.config.block_size:
            raise UserError(f"a sequence of {T} tokens is longer than the context of {self.config.block_size}")
        positions, mask = torch.arange(T, device=ids.device), None
        if segments is not None:
            fresh = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))                            # (B, T)
            mask = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]                 # (B, 1, T, T)
            positions = positions - (positions * fresh).cummax(1).values                          # (B, T)
        elif cache is not None and T == 1:
            positions = cache.lengths[:, None]                                                    # (B, 1)
        x = self.drop(self.wte(ids) + self.wpe(positions))                                        # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer, mask)
        return self.ln_f(x)

    def forward(self, ids, segments=None):
        """(B, T) -> logits (B, T, V)."""
        return F.linear(self.hidden(ids, segments=segments), self.wte.weight)

    # Hugging Face's GPT-2 stores the four matrices of a block as (in, out): the transpose of nn.Linear.
    TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

    @classmethod
    def from_pretrained(cls, folder, dropout=0.0):
        """Read GPT-2 weights (config.json and model.safetensors or pytorch_model.bin) from a local folder."""
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise UserError(f"{folder}: no config.json there; --init-from wants a folder in Hugging Face's GPT-2 layout")
        try:
            raw = json.loads(read_text(folder / "config.json"))
            config = GPTConfig(*[raw[k] for k in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")], dropout=dropout)
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(f"{folder}/config.json: not a GPT-2 configuration ({type(e).__name__} {brief(e)})") from None
        if (folder / "model.safetensors").exists():
            try:
                from safetensors.torch import load_file
            except ImportError:
                raise UserError(f"{folder}/model.safetensors needs one more package: pip install safetensors") from None
            try:
                weights = load_file(folder / "model.safetensors")
            except Exception as e:  # safetensors has errors of its own
                raise UserError(f"{folder}/model.safetensors: not readable ({brief(e)}); fetch it again") from None
        elif (folder / "pytorch_model.bin").exists():
            weights = load_checkpoint(folder / "pytorch_model.bin")
        else:
            raise UserError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there")
        try:
            weights = {k.removeprefix("transformer."): v for k, v in weights.items()}
            check_sizes(config, weights)
            model = cls(config)
            model.load_state_dict({k: weights[k].T if k.endswith(cls.TRANSPOSED) else weights[k]
                                   for k in model.state_dict()})
        except Exception as e:  # as in load_model
            raise UserError(f"{folder}: the weights do not fit config.json ({type(e).__name__}: {brief(e)})") from None
        return model

    def add_tokens(self, vocab_size):
        """Grow the vocabulary: GPT-2 has no role tokens. New rows start as the mean of the old, which no softmax dislikes."""
        old = self.wte.weight.data
        self.wte = nn.Embedding(vocab_size, self.config.n_embd, device=old.device)
        self.wte.weight.data = torch.cat([old, old.mean(0).expand(vocab_size - len(old), -1)])
        self.config.vocab_size = vocab_size

    def lengthen(self, block_size):
        """Grow the context: the new positions start as sines, as the old ones did, and want texts of that length to learn from."""
        old = self.wpe.weight.data
        self.wpe = nn.Embedding(block_size, self.config.n_embd, device=old.device)
        self.wpe.weight.data = torch.cat([old, sines(block_size, self.config.n_embd)[len(old):].to(old)])
        self.config.block_size = block_size

    def save_pretrained(self, folder):
        """Write config.json and pytorch_model.bin that transformers' GPT2LMHeadModel reads."""
        c, folder, state = self.config, Path(folder), self.state_dict()
        if not c.bias:   # theirs always has biases: zeros do the same
            state |= {k: torch.zeros(len(state[k.replace("bias", "weight")])) for k in GPT(replace(c, bias=True)).state_dict() if k not in state}
        weights = {"transformer." + k: (v.T if k.endswith(self.TRANSPOSED) else v).cpu().contiguous() for k, v in state.items()}
        save_checkpoint(folder / "pytorch_model.bin", **weights, **{"lm_head.weight": weights["transformer.wte.weight"]})
        (folder / "config.json").write_text(json.dumps(dict(
            model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size, n_positions=c.block_size,
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, activation_function="gelu_new",
            layer_norm_epsilon=1e-5, tie_word_embeddings=True), indent=1))


class KVCache:
    """Keys and values of the tokens seen so far, for rows of different lengths: right padding, no left padding.

    `lengths[b]` is the position the next token of row b takes. Prefill writes a padded block; the garbage a short
    row leaves behind its end is overwritten by its own next tokens before it can be seen.
    """

    def __init__(self, config, B, S, device, dtype):
        shape = (config.n_layer, B, config.n_head, S, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)               # (L, B, H, S, D)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(B, dtype=torch.long, device=device)        # (B,)
        self.longest = 0                      # max of lengths, kept on the host: asking a GPU each step would stall it

    def write(self, layer, k, v):
        T = k.shape[2]
        if T > 1:
            self.k[layer, :, :, :T], self.v[layer, :, :, :T] = k, v
        else:
            rows = torch.arange(len(k), device=k.device)
            self.k[layer, rows, :, self.lengths] = k[:, :, 0]
            self.v[layer, rows, :, self.lengths] = v[:, :, 0]
        end = max(T, self.longest + 1)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]           # (B, H, end, D)

    def visible(self):
        """(B, 1, 1, S): a row's new token sees the positions up to and including its own."""
        return (torch.arange(self.longest + 1, device=self.k.device) <= self.lengths[:, None])[:, None, None]

    def keep(self, rows):
        self.k, self.v, self.lengths = self.k[:, rows], self.v[:, rows], self.lengths[rows]


def sample_tokens(logits, temperature=1.0, top_k=None, top_p=None, rng=None):
    """(B, V) -> (B,) token ids. temperature 0 takes the most likely; top_k, then top_p, cut the tail first."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)                                                # (B, V)
    if top_p is not None:
        ordered, order = probs.sort(dim=-1, descending=True)
        # A token goes when those above it already hold top_p: the one that crosses the line stays, so one always does.
        ordered[:, 1:][(ordered.cumsum(-1) - ordered)[:, 1:] >= top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return torch.multinomial(probs, 1, generator=rng)[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, stop=None, seed=None):
    """Continue a ragged batch of prompts. Returns one list of new ids per prompt, the stop token included if reached.

    prompts: list of non-empty id lists. A row ends at `stop`, after max_new_tokens, or at the end of the context.
    Raises UserError for an empty prompt or one that leaves no room in the context.
    """
    config, device, B = model.config, model.wte.weight.device, len(prompts)
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    for i, p in enumerate(prompts):
        if not 0 < len(p) < config.block_size:
            raise UserError(f"prompt {i + 1} has {len(p)} tokens; the context of {config.block_size} wants "
                            f"1 to {config.block_size - 1}: shorten it, or train with a larger --block-size")
    was_training = model.training
    model.eval()
    rng = None if seed is None else torch.Generator(device).manual_seed(seed)
    lengths = [len(p) for p in prompts]
    ids = pad([torch.tensor(p) for p in prompts], 0).to(device)               # (B, T)
    cache = KVCache(config, B, min(config.block_size, max(lengths) + max_new_tokens), device, model.wte.weight.dtype)
    states = model.hidden(ids, cache)                                         # (B, T, C)
    cache.lengths, cache.longest = torch.tensor(lengths, device=device), max(lengths)
    states = states[torch.arange(B, device=device), cache.lengths - 1]        # (B, C), the last real token of each row
    new, alive = [[] for _ in prompts], list(range(B))
    while True:
        tokens = sample_tokens(F.linear(states, model.wte.weight), temperature, top_k, top_p, rng)
        keep = []
        for row, token in enumerate(tokens.tolist()):
            i = alive[row]
            new[i].append(token)
            if token != stop and len(new[i]) < max_new_tokens and lengths[i] + len(new[i]) < config.block_size:
                keep.append(row)
        if not keep:
            model.train(was_training)
            return new
        # Finished rows leave the batch, so the last long answer does not pay for all the short ones.
        if len(keep) < len(alive):
            rows = torch.tensor(keep, device=device)
            cache.keep(rows)
            tokens, alive = tokens[rows], [alive[r] for r in keep]
            cache.longest = max(lengths[i] + len(new[i]) - 1 for i in alive)
        states = model.hidden(tokens[:, None], cache)[:, 0]                   # (B, C)
        cache.lengths, cache.longest = cache.lengths + 1, cache.longest + 1


def logprobs_of(logits, ids, temperature=1.0):
    """logits (B, T, V), ids (B, T) -> (B, T-1) fp32: entry t is log p(ids[:, t+1] | ids[:, :t+1])."""
    logprobs = F.log_softmax(logits[:, :-1].float() / temperature, dim=-1)    # (B, T-1, V)
    return logprobs.gather(-1, ids[:, 1:, None])[..., 0]                      # (B, T-1)


def token_logprobs(model, ids, temperature=1.0):
    """(B, T) ids -> (B, T-1) fp32 log-probabilities of each next token at the given sampling temperature."""
    return logprobs_of(model(ids), ids, temperature)


def pad(rows, value=0):
    """1-D tensors of different lengths -> (B, T), filled up on the right."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PROBE = "".join(map(chr, range(1, 500))) + "Tom's 17 cats.\r\n\n  \u2028\u3000 你好，👩‍👩‍👧"   # characters of all kinds


def get_tokenizer(name=None):
    """A `tiktoken.Encoding`: the embedded one (no name), a file made by data/bpe.py, or a tiktoken name such as gpt2.

    All have the five special tokens. Encode other people's text with `encode_ordinary`: whatever it spells,
    it can then never produce a special token. Raises UserError when there is no such tokenizer.
    """
    path = Path(name) if name else HERE / "data" / "tokenizer.json"
    if os.path.isfile(path):   # not path.is_file(), which raises for a name that is too long
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            ranks = {base64.b64decode(token, validate=True): rank for rank, token in enumerate(raw["ranks"])}
            if raw["special"] != SPECIAL or not {bytes([b]) for b in range(256)} <= set(ranks):
                raise ValueError(f"it needs the 256 bytes and the special tokens {SPECIAL}")
            if len(ranks) < len(raw["ranks"]):   # else a special token would share its id with the last of them
                raise ValueError("a token is there twice")
            # tiktoken drops what the pattern does not match, without a word, and dies of a pattern that matches nothing.
            found = [m[0] for m in regex.finditer(raw["pattern"], PROBE)]
            if "".join(found) != PROBE or not all(found) or regex.match(raw["pattern"], ""):
                raise ValueError("its pattern must match every character, and never the empty text")
            special = {token: len(ranks) + i for i, token in enumerate(raw["special"])}
            return tiktoken.Encoding(raw["name"], pat_str=raw["pattern"], mergeable_ranks=ranks, special_tokens=special)
        except (ValueError, KeyError, TypeError, OSError, RecursionError, regex.error) as e:
            raise UserError(f"{path}: not a tokenizer file ({brief(e)}); make one with: python data/bpe.py --data my.txt") from None
    try:
        enc = tiktoken.get_encoding(name)
    except Exception as e:  # tiktoken downloads its vocabularies: no network shows as many kinds of error
        raise UserError(f"tokenizer {brief(repr(name))}: neither a file nor a tiktoken name that can be had here "
                        f"({type(e).__name__}); make one with: python data/bpe.py --data my.txt --out my.json") from None
    special = {**enc._special_tokens, **{token: enc.n_vocab + i for i, token in enumerate(SPECIAL)}}
    return tiktoken.Encoding(name, pat_str=enc._pat_str, mergeable_ranks=enc._mergeable_ranks, special_tokens=special)


def end_of(enc):
    """The id of <|end|>: the end of a document, and of a turn."""
    return enc._special_tokens["<|end|>"]


def fingerprint(enc):
    """A short hash of everything that decides what an id means, kept in checkpoints to refuse a foreign tokenizer."""
    h = hashlib.sha256(enc._pat_str.encode())
    for token, rank in sorted(enc._mergeable_ranks.items(), key=lambda x: x[1]):
        h.update(len(token).to_bytes(4, "big") + token)
    h.update(repr(sorted(enc._special_tokens.items())).encode())
    return h.hexdigest()[:16]


def check_sizes(config, weights):
    """Raise ValueError unless weights are of these sizes. Before a model is made: a damaged size could ask for all the memory there is."""
    V, T, C = config.vocab_size, config.block_size, config.n_embd
    if weights["wte.weight"].shape != (V, C) or weights["wpe.weight"].shape != (T, C) or f"h.{config.n_layer - 1}.ln_1.weight" not in weights:
        raise ValueError("other vocabulary, context, width or depth")
    if not config.n_head > 0:
        raise ValueError(f"{config.n_head} heads")


def save_model(path, model, enc, tokenizer, **extra):
    """A checkpoint that load_model reads. tokenizer is the name that get_tokenizer finds enc by."""
    save_checkpoint(path, model=model.state_dict(), gpt=dataclasses.asdict(model.config), tokenizer=tokenizer,
                    fingerprint=fingerprint(enc), **extra)


def load_model(path, device="cpu", dropout=0.0):
    """-> (GPT in eval mode, tokenizer, the whole checkpoint). Raises UserError for a foreign tokenizer or shape."""
    state = load_checkpoint(path)
    if (not isinstance(state, dict) or not {"model", "gpt", "tokenizer", "fingerprint"} <= set(state)
            or not isinstance(state["tokenizer"], str)):
        raise UserError(f"{path}: a file, but no checkpoint of this project")
    try:
        enc = get_tokenizer(state["tokenizer"])
    except UserError as e:
        raise UserError(f"{path}: its tokenizer is gone: {e}") from None
    if fingerprint(enc) != state["fingerprint"]:
        raise UserError(f"{path}: trained with another tokenizer than {state['tokenizer'] or 'data/tokenizer.json'} "
                        f"holds now; train it again, or bring that tokenizer back")
    try:
        config = GPTConfig(**{**state["gpt"], "dropout": dropout})
        # A reward model keeps its body under "body.", and three small things beside it.
        body = {k.removeprefix("body."): v for k, v in state["model"].items() if k.startswith("body.")} or state["model"]
        check_sizes(config, body)
        model = GPT(config)
        model.load_state_dict(body)
    except Exception as e:  # a size that is a text, weights that are no dict, a tensor that is none: each fails in its own way
        raise UserError(f"{path}: its weights do not fit its own sizes ({type(e).__name__}: {brief(e)})") from None
    return model.to(device).eval(), enc, state


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    ok = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in ok:
        raise UserError(f"--device {name}: choose auto, cpu, cuda or mps")
    if not ok[name]:
        raise UserError(f"--device {name}: this machine has none that torch can use; type --device cpu")
    return torch.device(name)


def autocast(device):
    """bf16 matrix products on a GPU; fp32 on a CPU, where small models gain nothing from less."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def adamw(model, lr, weight_decay=0.0, betas=(0.9, 0.95)):
    """AdamW with decay on matrices only: biases and LayerNorm gains have no reason to shrink."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def lr_at(step, steps, lr, schedule="cosine", floor=0.1):
    """Learning rate of a step: a linear warmup over the first twentieth, then constant, linear or cosine to floor * lr."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
    return lr * shape if schedule == "constant" else lr * (floor + (1 - floor) * shape)


def field_advice(cls):
    """{field: the string literal under it}: the one place where a setting is explained serves --help too."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {a.target.id: b.value.value for a, b in zip(body, body[1:])
            if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        known = [o for a in self._actions for o in a.option_strings]
        for word in message.split():
            if word.startswith("--") and "unrecognized" in message:
                near = difflib.get_close_matches(word.split("=")[0], known, 1, 0.4)
                message = f"unknown flag {word}" + (f"; did you mean {near[0]}?" if near else "; see --help")
                break
        raise UserError(message)


def parse(cls, doc, argv=None):
    """Command line -> Config: a flag per field (n_layer -> --n-layer), its advice as help."""
    advice = field_advice(cls)
    parser = OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(cls):
        flag, text = "--" + f.name.replace("_", "-"), advice[f.name].replace("%", "%%") + f" [{f.default}]"
        if isinstance(f.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            parser.add_argument(flag, type=type(f.default), default=f.default, metavar=type(f.default).__name__, help=text)
    return cls(**vars(parser.parse_args(argv)))


def require(cfg, least, *names, most=math.inf):
    """Raise UserError unless each named setting is between `least` and `most`."""
    for name in names:
        if not least <= getattr(cfg, name) <= most:
            bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be {bounds}")


def run(main, cls, doc, shared=False):
    """Start a script: a user's mistake ends it with one line on stderr and exit code 2, never with a traceback.

    shared: whether several processes of torchrun may do its work together.
    """
    try:
        cfg = parse(cls, doc)
        if "RANK" in os.environ and not shared:
            raise UserError("this script runs in one process; start it with python, not with torchrun")
        join(getattr(cfg, "device", "cpu"))
        main(cfg)
    except UserError as e:
        sys.exit(print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr) or 2)
    except OSError as e:   # no place on the disk, no permission, a file where a folder should be
        sys.exit(print(f"{Path(sys.argv[0]).name}: {e.filename or 'file'}: {e.strerror or e}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        goes_on = ", and --resume goes on" * hasattr(cls, "resume")   # some scripts start again
        sys.exit(print(f"\nstopped; what was finished is in its folder{goes_on}", file=sys.stderr) or 130)


def brief(text, most=160):
    """Somebody else's words, such as a library's error, as a short part of one line."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[:most - 3] + "..."


def read_text(path):
    """A UTF-8 file as a string, or a UserError that names the byte that is not."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: byte {e.start} is not UTF-8; convert it: iconv -f latin1 -t utf-8") from None


def read_corpus(path, enc, block_size, val_fraction, mixture=""):
    """Text -> {source: (training documents, validation documents, weight)}; a document is a tensor of ids that ends with <|end|>.

    path is a file or a folder; every *.txt in it is a source. A line that is just <|end|> parts the documents of a
    file. The last part of each source is kept for validation. Weights, as shares of the tokens drawn: `mixture`
    ('books=2,web=1'), else the folder's mixture.json, else by size. Raises UserError for a missing, empty or short text.
    """
    path, end = Path(path), end_of(enc)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no *.txt file in this folder")
    sources = {}
    for file in files:
        texts = [t for t in re.split(r"^<\|end\|>\r?(?:\n|\Z)", read_text(file), flags=re.M) if t.strip()]
        documents = [torch.tensor(enc.encode_ordinary(t) + [end], dtype=torch.int32) for t in texts]
        total = sum(map(len, documents))
        if not total * min(val_fraction, 1 - val_fraction) > block_size:   # so that nan is refused, too
            raise UserError(f"{file}: {total} tokens are too few: with --val-fraction {val_fraction} both parts must exceed one "
                            f"block of {block_size} tokens; bring more text, or a smaller --block-size")
        val, missing = [], math.ceil(total * val_fraction)
        while missing > 0:   # whole documents from the end; the one on the border is cut
            last = documents.pop()
            if len(last) > missing + 1:   # of one token alone nothing is predicted
                documents.append(last[:-missing])
                last = last[-missing:]
            val.append(last)
            missing -= len(last)
        name = file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.stem
        sources[name] = (documents, val[::-1], sum(map(len, documents)))
    weights, written = {}, path / "mixture.json"
    origin = f"--mixture {brief(repr(mixture))}" if mixture else f"{written}"
    try:
        if mixture:
            weights = {k.strip(): float(v) for k, v in (part.split("=") for part in mixture.split(","))}
        elif path.is_dir() and written.exists():
            weights = {k: float(v) for k, v in json.loads(read_text(written)).items()}
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{origin}: " + ("write it as name=weight,name=weight" if mixture else
                        'expected a JSON object such as {"books": 2, "web": 1}')) from None
    if weights and not (min(weights.values()) >= 0 < sum(weights.values()) < math.inf):
        raise UserError(f"{origin}: weights must be 0 or more, and not all 0")
    if set(weights) - set(sources):
        raise UserError(f"{origin} names {brief(sorted(set(weights) - set(sources)))}, "
                        f"but the sources are {brief(sorted(sources))}")
    return {k: (v[0], v[1], weights.get(k, 0.0) if weights else v[2]) for k, v in sources.items()}


def pack(texts, T):
    """Lay texts (1-D tensors, each at most T long) into rows of length T -> ids (B, T), segments (B, T), both padded with 0.

    Segments count from 1 within a row. First come, first served: a text that does not fit the open row starts the next.
    """
    rows, used = [[]], 0
    for text in texts:
        if used + len(text) > T:
            rows, used = rows + [[]], 0
        rows[-1].append(text)
        used += len(text)
    ids, segments = torch.zeros(2, len(rows), T, dtype=torch.long)                                # (B, T) each
    for b, row in enumerate(rows):
        start = 0
        for i, text in enumerate(row, 1):
            ids[b, start:start + len(text)], segments[b, start:start + len(text)] = text, i
            start += len(text)
    return ids, segments


def corpus_of(path, enc, block_size, other=""):
    """The text a checkpoint was pretrained on (or another), split and weighted as it was then."""
    if other:
        return read_corpus(other, enc, block_size, Config.val_fraction)
    state = load_checkpoint(path)
    kinds = dict(data=str, val_fraction=float, mixture=str)
    if not isinstance(state, dict) or not all(isinstance(state.get(k), kind) for k, kind in kinds.items()):
        raise UserError(f"{path}: does not say which text it was pretrained on; make it with: python gpt.py --out {Path(path).parent}")
    if not os.path.exists(state["data"]):
        raise UserError(f"{path}: the text it was pretrained on is gone: {brief(state['data'])}; bring it back, or pretrain anew")
    return read_corpus(state["data"], enc, block_size, state["val_fraction"], state["mixture"])


def document_odds(sources, T):
    """How often to draw a document of each source, so that its share of the tokens is its weight."""
    return [weight * len(train) / sum(min(len(d), T) for d in train) for train, _, weight in sources.values()]


def draw_documents(sources, odds, n_tokens, T, rng):
    """Documents by odds until they make n_tokens; of a long one, a random window of T tokens. -> texts, {source: tokens}."""
    names = list(sources)
    texts, drawn = [], dict.fromkeys(names, 0)
    while sum(drawn.values()) < n_tokens:
        name = rng.choices(names, odds)[0]
        document = sources[name][0][rng.randrange(len(sources[name][0]))]
        start = rng.randrange(max(1, len(document) - T + 1))
        texts.append(document[start:start + T])
        drawn[name] += len(texts[-1])
    return texts, drawn


def predicted(segments):
    """(B, T) -> (B, T-1): whether the next token belongs to the same text."""
    return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


def lm_loss(model, ids, segments, reduction="mean"):
    """Next-token cross-entropy in nats over packed rows (B, T); no token is predicted from another text."""
    inside = predicted(segments)                                                                  # (B, T-1)
    states = model.hidden(ids, segments=segments)[:, :-1][inside]                                 # (N, C)
    return F.cross_entropy(F.linear(states, model.wte.weight).float(), ids[:, 1:][inside], reduction=reduction)


@torch.no_grad()
def val_loss(model, sources, enc, device, limit=40_000):
    """-> (loss in nats per token, weighted as the sources are drawn; bits per byte of the predicted tokens)."""
    was_training, T = model.training, model.config.block_size
    model.eval()
    total = weights = nats = size = 0.0
    n_bytes = torch.zeros(enc.n_vocab)   # of each token; special tokens are no text
    for token, rank in enc._mergeable_ranks.items():
        n_bytes[rank] = len(token)
    for _, documents, weight in sources.values():
        texts, n = [], 0
        for document in documents:
            if n < limit:
                texts += document[:limit - n].split(T)
                n += len(document)
        ids, segments = pack(texts, T)
        loss = sum(lm_loss(model, i.to(device), s.to(device), "sum").item() for i, s in zip(ids.split(32), segments.split(32)))
        inside = predicted(segments)
        total, weights = total + weight * loss / inside.sum().item(), weights + weight
        nats, size = nats + loss, size + n_bytes[ids[:, 1:][inside]].sum().item()
    model.train(was_training)
    return total / weights, nats / math.log(2) / size


def main(cfg):
    require(cfg, 1, "steps", "batch_tokens", "block_size", "n_layer", "n_head", "n_embd", "eval_every")
    require(cfg, 0, "lr", "weight_decay", most=10)
    require(cfg, 0, "dropout", most=0.99)
    if cfg.schedule not in ("cosine", "constant"):
        raise UserError(f"--schedule {cfg.schedule}: choose cosine or constant")
    device, out = pick_device(cfg.device), run_folder(cfg.out)
    set_seed(cfg.seed)
    if cfg.sample:
        model, enc, _ = load_model(out / "gpt.pt", device)
        ids = generate(model, [enc.encode_ordinary(cfg.sample)], 100, temperature=0.8, stop=end_of(enc), seed=cfg.seed)[0]
        return print(cfg.sample + enc.decode(ids))
    enc = get_tokenizer(cfg.tokenizer)
    if cfg.init:
        model, enc, base = load_model(cfg.init, device, cfg.dropout)
        cfg.tokenizer = base["tokenizer"]
        if cfg.block_size > model.config.block_size:
            model.lengthen(cfg.block_size)
    elif cfg.init_from:
        model = GPT.from_pretrained(cfg.init_from, cfg.dropout).to(device)
        if not model.config.vocab_size <= enc.n_vocab <= model.config.vocab_size + len(SPECIAL):
            raise UserError(f"--init-from {cfg.init_from} has {model.config.vocab_size} tokens, the tokenizer {enc.n_vocab}; "
                            f"name the one it was trained with, such as --tokenizer gpt2")
        model.add_tokens(enc.n_vocab)
    else:
        model = GPT(GPTConfig(enc.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout)).to(device)
    if not cfg.data:
        from data import corpus
        cfg.data = str(once(lambda: corpus.ensure(out / "data", cfg.seed)) / "pretrain")
    T = model.config.block_size
    sources = read_corpus(cfg.data, enc, T, cfg.val_fraction, cfg.mixture)
    size = {name: sum(map(len, s[0])) for name, s in sources.items()}
    print(f"gpt.py: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {sum(size.values()):,} tokens, device {device}")
    optimizer, odds = adamw(model, cfg.lr, cfg.weight_decay), document_odds(sources, T)
    rng, drawn = random.Random(cfg.seed), dict.fromkeys(sources, 0)
    run = Run(cfg, "gpt", [cfg.data, cfg.init, cfg.init_from], model=model, optimizer=optimizer, rng=rng, drawn=drawn)
    model.train()
    for step in run.steps(cfg.steps):
        texts, tokens = draw_documents(sources, odds, cfg.batch_tokens, T, rng)
        drawn.update({name: drawn[name] + tokens[name] for name in drawn})
        texts = share(texts)
        ids, segments = pack(texts, T)                                                            # (B, T) each
        with autocast(device):
            loss = fair(lm_loss(model, ids.to(device), segments.to(device)), sum(map(len, texts)) - len(texts))
        lr, what = lr_at(step, cfg.steps, cfg.lr, cfg.schedule), f"texts from {enc.decode(texts[0][:12].tolist())!r} on"
        norm = run.take_step(loss, optimizer, model, lr, what)
        row = dict(step=step, loss=loss.item(), grad_norm=norm)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            row["val_loss"], row["bits_per_byte"] = val_loss(model, sources, enc, device)
            run.bar.set_postfix(loss=f"{loss.item():.3f}", val=f"{row['val_loss']:.3f}")
        run.log(**row)
    epochs = {name: round(n / size[name], 2) for name, n in drawn.items()}
    print(f"validation loss {row['val_loss']:.3f} nats per token, {row['bits_per_byte']:.3f} bits per byte, "
          f"{sum(drawn.values()) / run.seconds():,.0f} tokens/s; epochs per source: {epochs}")
    save_model(out / "gpt.pt", model, enc, cfg.tokenizer, seed=cfg.seed, data=cfg.data, val_fraction=cfg.val_fraction,
               mixture=cfg.mixture, val_loss=row["val_loss"])
    run.finish()
    first = next(iter(sources.values()))[1][0][:8].tolist()
    text = enc.decode(generate(model, [first], 60, temperature=0.8, stop=end_of(enc), seed=cfg.seed)[0])
    print(f"--- a sample\n{enc.decode(first)}|{text}\n---\nsaved {out / 'gpt.pt'}; next: python sft.py --out {out}")


if __name__ == "__main__":
    run(main, Config, __doc__, shared=True)
