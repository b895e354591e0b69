"""A GPT: the model, generation with a KV cache, and next-token pretraining.

Idea. A language model learns by predicting the next token of a lot of text. The loss of a document
x_1 .. x_T is

    L = -1/(T-1) * sum_t log p(x_{t+1} | x_1 .. x_t)          causal: p never sees x_{t+1}

The model is GPT-2: token and position embeddings, n_layer blocks of

    x = x + attention(layernorm(x))        softmax(q k' / sqrt(d)) v over all earlier positions
    x = x + mlp(layernorm(x))              4C wide, tanh GELU

a last LayerNorm, and logits from the token embedding (tied weights).

    python gpt.py                                    pretrain on the village, generated on first use
    python gpt.py --data my.txt --out out/mine       on any text, or a folder of *.txt and *.jsonl
    python gpt.py --init-from gpt2-folder            start from GPT-2 weights

1.5 minutes on two CPU cores. Read next: sft.py. Elsewhere: text (data/), optimizer (scaffold/).

Letters: B batch, T time, C channels, H heads, D = C/H, V vocabulary, S cache slots, N tokens.
`logits[:, t]` predicts `ids[:, t+1]`. Padding is on the right, so that real tokens never see it.
"""
import math
import random
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import checkpoint, corpus, huggingface
from data.text import by_length, draw_rows, pack, pad, predicted, read_corpus, text_entries, windows
from data.tokenizer import EMBEDDED, end_of, get_tokenizer, token_bytes
from scaffold.cli import RunConfig, UserError, choose, pick_device, require, run_folder, start
from scaffold.distributed import global_mean, rank0_first, shard
from scaffold.optim import adamw, autocast, cross_entropy, in_parts, lr_at, muon
from scaffold.run import Run, load_checkpoint, save_checkpoint, set_seed


@dataclass
class Config(RunConfig):
    data: str = ""               # a text, or a folder of *.txt and *.jsonl; empty: the village
    mixture: str = ""            # source weights: 'books=2,web=1'; empty: mixture.json, else sizes
    tokenizer: str = ""          # a file made by data/bpe.py, or gpt2; empty: the village's
    init: str = ""               # a checkpoint to continue; --block-size may extend its context
    init_from: str = ""          # a folder with GPT-2 weights in Hugging Face's layout
    n_layer: int = 2             # depth; 2 x 128 learns the village in minutes, 6 x 384 needs a GPU
    n_head: int = 4              # attention heads; must divide n_embd
    n_embd: int = 128            # width; time grows with its square
    block_size: int = 128        # context in tokens; must hold prompt and response of later stages
    dropout: float = 0.0         # 0.1 to 0.2 if a small text is read many times
    steps: int = 1200            # optimizer steps; usually about 1 epoch of the text
    batch_tokens: int = 2048     # tokens per step, in rows of block_size
    optimizer: str = "muon"      # muon (needs fewer tokens) or adamw; see scaffold/optim.py
    lr: float = 6e-3             # peak; 1e-3 from other weights or above 100M; adamw: a third
    schedule: str = "cosine"     # cosine (down to 0) or constant; both after a short warmup
    weight_decay: float = 0.01   # on matrices only
    val_fraction: float = 0.05   # share of each source kept for validation, from its end
    eval_every: int = 200        # steps between evaluations


@dataclass
class GPTConfig:
    """Sizes of a GPT-2. vocab_size counts the special tokens, block_size is the longest input."""
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
        if config.n_embd % config.n_head:
            raise UserError(f"--n-embd {config.n_embd}: not a multiple of --n-head {config.n_head}")
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None, layer=0, mask=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv                                                         # (B, H, T, D) each
        if cache is not None and T == 1:
            y = cache.attend(layer, q, qkv[1:])                               # (B, H, 1, D)
        else:
            if cache is not None:   # the prefill: q and k cover the same tokens
                cache.kv[layer][:, :, :, :T] = qkv[1:]
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None,
                dropout_p=self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))                # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


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


def sinusoids(T, C):
    """Return the position codes of Vaswani et al. (1706.03762), scaled by 0.05: (T, C)."""
    angle = torch.arange(T)[:, None] * 10_000 ** -(torch.arange(0, C, 2) / C)   # (T, ceil(C/2))
    return 0.05 * torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :C]


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): pre-LayerNorm, learned positions, tied embeddings."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        for name, p in self.named_parameters():
            if p.dim() == 2:   # GPT-2's init: projections into the residual shrink with n_layer
                scale = math.sqrt(2 * config.n_layer) if "c_proj" in name else 1
                nn.init.normal_(p, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # Two departures: wider token embeddings, and positions that start as sinusoids. A small
        # model then copies words from the prompt sooner (1.2M tokens: loss 0.51, not 0.53).
        nn.init.normal_(self.wte.weight, std=0.06)
        self.wpe.weight.data = sinusoids(config.block_size, config.n_embd)

    def hidden(self, ids, cache=None, segments=None, lengths=None):
        """Map token ids (B, T) to the states after the last LayerNorm (B, T, C).

        segments (B, T) numbers the documents of a packed row: each starts at position 0 and attends
        only to itself. lengths (B,), without a cache: how many states each row needs; the others
        are not computed. Raises UserError if T exceeds the context.
        """
        if lengths is not None:
            return by_length(self.hidden, ids, lengths)
        T = ids.shape[1]
        if T > self.config.block_size:
            raise UserError(f"{T} tokens are longer than the context of {self.config.block_size}")
        positions = torch.arange(T, device=ids.device)                        # (T,)
        mask = None   # plain causality
        if segments is not None:
            first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))        # (B, T)
            positions = positions - (positions * first).cummax(1).values      # (B, T)
            mask = (segments[:, :, None] == segments[:, None]).tril()[:, None]   # (B, 1, T, T)
        elif cache is not None and T == 1:
            positions = cache.open_slots()                                    # (B, 1)
        x = self.drop(self.wte(ids) + self.wpe(positions))                    # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer, mask)
        return self.ln_f(x)

    def forward(self, ids, segments=None):
        """Map token ids (B, T) to logits (B, T, V)."""
        return self.unembed(self.hidden(ids, segments=segments))

    def unembed(self, states):
        """Map states (..., C) to logits (..., V)."""
        return F.linear(states, self.wte.weight)

    @classmethod
    def from_weights(cls, sizes, weights, where, dropout=0.0):
        """Build a GPT from sizes and weights; `where` names their file in the error message."""
        with checkpoint.damage_reported(where):
            config = GPTConfig(**{**sizes, "dropout": dropout})
            body = checkpoint.body_weights(config, weights)
            model = cls(config)
            model.load_state_dict(body)
            return model

    @classmethod
    def from_pretrained(cls, folder, dropout=0.0):
        """Read GPT-2 weights in Hugging Face's layout from a local folder."""
        return cls.from_weights(*huggingface.read(folder), folder, dropout)

    save_pretrained = huggingface.write   # model.save_pretrained(folder), in the same layout


class KVCache:
    """Keys and values of the tokens seen so far. lengths[b] is the position of row b's next token.

    The rows are padded on the right. Each new token overwrites a slot of padding in its row.
    """

    def __init__(self, model, B, T):
        c = model.config
        shape = (2, B, c.n_head, T, c.n_embd // c.n_head)
        self.kv = [model.wte.weight.new_zeros(shape) for _ in model.h]   # each (2, B, H, S, D)
        self.block_size = c.block_size
        self.fill([0] * B)

    def open_slots(self):
        """Pick a slot for each row's new token, mask those after it; return positions (B, 1)."""
        if self.longest == self.kv[0].shape[3]:   # attention reads all S slots: add only a few
            for layer, kv in enumerate(self.kv):   # one by one: all at once would double the memory
                self.kv[layer] = F.pad(kv, (0, 0, 0, 16))
        _, B, H, S, _ = self.kv[0].shape
        first = torch.arange(0, 2 * B * H * S, S, device=self.lengths.device)   # of each S slots
        self.slots = first + self.lengths.repeat_interleave(H).repeat(2)      # (2*B*H,)
        later = torch.arange(S, device=self.lengths.device) > self.lengths[:, None]   # (B, S)
        bias = self.kv[0].new_zeros(B, S).masked_fill(later, -math.inf)
        self.bias = bias.repeat_interleave(H, 0)[:, None]                     # (B*H, 1, S)
        return self.lengths[:, None]

    def attend(self, layer, q, kv):
        """Store kv (2, B, H, 1, D) of each row's new token; let q attend to it and those before.

        q and the result are (B, H, 1, D). For one query, two products beat the fused kernel.
        """
        D = q.shape[-1]
        self.kv[layer].view(-1, D)[self.slots] = kv.reshape(-1, D)
        k, v = self.kv[layer].flatten(1, 2)                                   # (B*H, S, D) each
        scores = torch.baddbmm(self.bias, q.reshape(-1, 1, D), k.mT, alpha=D ** -0.5)
        return (scores.softmax(-1) @ v).view(q.shape)

    def fill(self, lengths):
        """Set the lengths of the rows after the prefill."""
        self.lengths = torch.tensor(lengths, device=self.kv[0].device)        # (B,)
        self.longest = max(lengths)   # as a Python int: .item() would wait for the GPU

    def step(self):
        """Count one more token in every row; a finished row may stay at the end of the context."""
        self.lengths = (self.lengths + 1).clamp(max=self.block_size - 1)
        self.longest += 1

    def keep(self, rows):
        """Keep only these rows of the batch, in this order; a row may be repeated."""
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = kv[:, rows]
        self.lengths = self.lengths[rows]


def sample_tokens(logits, temperature=1.0, top_k=None, top_p=None, rng=None):
    """Sample one id per row, (B, V) -> (B,), after top_k and top_p; temperature 0 is greedy."""
    if temperature < 1e-6:   # smaller ones would make the logits infinite
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)                                                # (B, V)
    if top_p is not None:
        ordered, order = probs.sort(dim=-1, descending=True)
        # Remove a token if those above it already hold top_p; the one that reaches it stays.
        remove = ordered.cumsum(-1) - ordered >= top_p
        remove[:, 0] = False
        probs = probs.masked_fill(remove.scatter(-1, order, remove), 0)
    sums = probs.cumsum(-1)   # inverse transform sampling; torch.multinomial is slower on a CPU
    u = torch.rand(len(probs), 1, generator=rng, device=probs.device) * sums[:, -1:]
    return torch.searchsorted(sums, u, right=True)[:, 0]


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, stop=None,
             seed=None):
    """Continue a ragged batch of prompts, given as lists of ids.

    Returns one list of new ids per prompt. A row ends with `stop` (included), after max_new_tokens,
    or at the end of the context. Raises UserError for a prompt that is empty or fills the context.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    block_size = model.config.block_size
    device = model.wte.weight.device
    for i, n in enumerate(map(len, prompts), 1):
        if not 0 < n < block_size:
            raise UserError(f"prompt {i} has {n} tokens, the context of {block_size} allows 1 to "
                            f"{block_size - 1}: shorten it, or train with a larger --block-size")
    was_training = model.training
    model.eval()
    rng = None if seed is None else torch.Generator(device).manual_seed(seed)
    unique = {p: row for row, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
    ids = pad([torch.tensor(p) for p in unique]).to(device)                   # (P, T)
    cache = KVCache(model, *ids.shape)
    states = model.hidden(ids, cache)                                         # (P, T, C)
    cache.fill([len(p) for p in unique])
    rows = torch.tensor([unique[tuple(p)] for p in prompts], device=device)
    cache.keep(rows)   # equal prompts share their prefill
    states = states[rows, cache.lengths - 1]   # (B, C), at the last real token of each row
    new = [[] for _ in prompts]
    limits = [min(max_new_tokens, block_size - len(p)) for p in prompts]
    alive = {i: i for i in range(len(prompts))}   # row of the batch: its prompt, until it ends
    while True:
        tokens = sample_tokens(model.unembed(states), temperature, top_k, top_p, rng)   # (B,)
        ids = tokens.tolist()
        for row, i in list(alive.items()):
            new[i].append(ids[row])
            if ids[row] == stop or len(new[i]) == limits[i]:
                del alive[row]
        if not alive:
            model.train(was_training)
            return new
        if len(alive) < 0.8 * len(ids):   # not after every token: dropping rows copies the cache
            rows = torch.tensor(list(alive), device=device)
            alive = dict(enumerate(alive.values()))
            tokens = tokens[rows]
            cache.keep(rows)
        states = model.hidden(tokens[:, None], cache)[:, 0]                   # (B, C)
        cache.step()


def token_logprobs(model, ids, temperature=1.0, mask=None, states=None, parts=1):
    """Return log p(ids[:, t+1] | ids[:, :t+1]) at index t, fp32: (B, T) -> (B, T-1).

    With a mask (B, T-1), it is 0 elsewhere. states: model.hidden(ids). parts: see in_parts.
    """
    mask = torch.ones_like(ids[:, 1:]).bool() if mask is None else mask.bool()
    if parts > 1:
        return in_parts(lambda i, m: token_logprobs(model, i, temperature, m), parts, ids, mask)
    if states is None:
        last = torch.arange(1, ids.shape[1], device=ids.device) * mask        # (B, T-1)
        lengths = F.pad(last, (1, 0), value=1).amax(1)   # (B,), of the states that are needed
        states = model.hidden(ids, lengths=lengths)                           # (B, T, C)
    nll = cross_entropy(model, states[:, :-1][mask], ids[:, 1:][mask], temperature)   # (N,)
    return nll.new_zeros(mask.shape).masked_scatter(mask, -nll)               # (B, T-1)


def save_model(path, model, enc, tokenizer, **extra):
    """Write a checkpoint for load_model. tokenizer: the name by which get_tokenizer finds enc."""
    save_checkpoint(path, model=model.state_dict(), gpt=asdict(model.config),
                    **checkpoint.tokenizer_entries(enc, tokenizer), **extra)


def load_model(path, device="cpu", dropout=0.0):
    """Read a checkpoint -> (GPT in eval mode, tokenizer, the whole checkpoint)."""
    state = load_checkpoint(path)
    enc = checkpoint.tokenizer_of(state, path)
    model = GPT.from_weights(state["gpt"], state["model"], path, dropout)
    return model.to(device).eval(), enc, state


def lm_loss(model, ids, segments, reduction="mean"):
    """Next-token cross-entropy in nats over packed rows, ids and segments (B, T)."""
    inside = predicted(segments)                                              # (B, T-1)
    states = model.hidden(ids, segments=segments)[:, :-1][inside]             # (N, C)
    return cross_entropy(model, states, ids[:, 1:][inside], reduction=reduction)


@torch.no_grad()
def val_loss(model, sources, enc, device, limit=40_000):
    """Return (nats per token, weighted by source; bits per byte) on `limit` tokens per source."""
    was_training, T = model.training, model.config.block_size
    model.eval()
    n_bytes = torch.tensor([float(len(b)) for b in token_bytes(enc)])         # (V,)
    weighted = nats = size = 0.0
    for source in sources.values():
        ids, segments = pack(windows(source.val, T, limit), T)                # (B, T) each
        loss = sum(lm_loss(model, rows.to(device), parts.to(device), "sum").item()
                   for rows, parts in zip(ids.split(32), segments.split(32)))
        inside = predicted(segments)                                          # (B, T-1)
        weighted += source.weight * loss / inside.sum().item()
        nats += loss
        size += n_bytes[ids[:, 1:][inside]].sum().item()
    model.train(was_training)
    return weighted / sum(s.weight for s in sources.values()), nats / math.log(2) / size


def first_model(cfg, device):
    """Build the model of --init, of --init-from or of the flags -> (GPT, tokenizer)."""
    if cfg.init:
        model, enc, base = load_model(cfg.init, device, cfg.dropout)
        cfg.tokenizer = base["tokenizer"]   # for the new checkpoint
        if cfg.block_size > model.config.block_size:
            checkpoint.extend_context(model, sinusoids(cfg.block_size, model.config.n_embd))
        return model, enc
    enc = get_tokenizer(cfg.tokenizer)
    if cfg.init_from:
        model = GPT.from_pretrained(cfg.init_from, cfg.dropout)
        checkpoint.add_special_tokens(model, enc, cfg.init_from)
    else:
        sizes = (cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout)
        model = GPT(GPTConfig(enc.n_vocab, *sizes))
    return model.to(device), enc


def main(cfg):
    require(cfg, 1, "steps", "batch_tokens", "n_head", "n_embd", "eval_every")
    require(cfg, 2, "block_size")
    require(cfg, 1, "n_layer", most=1000)
    require(cfg, 0, "lr", "weight_decay", most=10)
    require(cfg, 0, "dropout", most=0.99)
    choose(cfg, "schedule", "cosine", "constant")
    choose(cfg, "optimizer", "muon", "adamw")
    device = pick_device(cfg.device)
    out = run_folder(cfg.out)
    set_seed(cfg.seed)
    model, enc = first_model(cfg, device)
    if not cfg.data:
        cfg.data = str(rank0_first(lambda: corpus.ensure(out / "data", cfg.seed)) / "pretrain")
    T = model.config.block_size
    sources = read_corpus(cfg.data, enc, T, cfg.val_fraction, cfg.mixture)
    size = {name: sum(map(len, source.train)) for name, source in sources.items()}
    print(f"gpt.py: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
          f"{sum(size.values()):,} tokens, device {device}")
    optimizer = {"muon": muon, "adamw": adamw}[cfg.optimizer](model, cfg.lr, cfg.weight_decay)
    rng = random.Random(cfg.seed)
    drawn = dict.fromkeys(sources, 0)   # tokens of each source so far
    run = Run(cfg, "gpt", [cfg.data, cfg.init_from, cfg.init or cfg.tokenizer or EMBEDDED],
              model=model, optimizer=optimizer, rng=rng, drawn=drawn)
    model.train()
    for step in run.steps(cfg.steps):
        ids, segments = map(shard, draw_rows(sources, drawn, cfg.batch_tokens, T, rng))
        with autocast(device):
            loss = lm_loss(model, ids.to(device), segments.to(device))
        loss = global_mean(loss, predicted(segments).sum())
        lr = lr_at(step, cfg.steps, cfg.lr, cfg.schedule, floor=0)
        norm = run.take_step(loss, optimizer, model, lr, ids[0, :8], "token id")
        row = dict(step=step, loss=loss.item(), grad_norm=norm)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            row["val_loss"], row["bits_per_byte"] = val_loss(model, sources, enc, device)
            run.bar.set_postfix(loss=f"{row['loss']:.3f}", val=f"{row['val_loss']:.3f}")
        run.log(**row)
    epochs = {name: round(drawn[name] / n, 2) for name, n in size.items()}
    print(f"validation loss {row['val_loss']:.3f} nats per token, {row['bits_per_byte']:.3f} bits "
          f"per byte, {sum(drawn.values()) / run.seconds():,.0f} tokens/s; epochs: {epochs}")
    save_model(out / "gpt.pt", model, enc, cfg.tokenizer, seed=cfg.seed, val_loss=row["val_loss"],
               **text_entries(cfg))
    run.finish()
    prompt = next(iter(sources.values())).val[0][:min(8, T - 1)].tolist()
    sample = generate(model, [prompt], 60, temperature=0.8, stop=end_of(enc), seed=cfg.seed)[0]
    print(f"--- a sample\n{enc.decode(prompt)}|{enc.decode(sample)}")
    print(f"---\nsaved {out / 'gpt.pt'}; next: python sft.py --out {out}")


if __name__ == "__main__":
    start(main, Config, __doc__, distributed=True)
