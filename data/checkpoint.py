"""Checkpoints of a GPT: those of a run, their tokenizer, their sizes, and growing a model.

A checkpoint carries its tokenizer, so the file alone is enough: move it, rename it, mail it.
"""
from contextlib import contextmanager

import torch
import torch.nn as nn

from data.huggingface import knows_special_tokens
from data.text import remembered
from data.tokenizer import SPECIAL, carried, fingerprint, from_json, get_tokenizer
from scaffold.cli import UserError, brief
from scaffold.run import load_checkpoint


def is_policy(path):
    """Return whether a file is a checkpoint of this project and not a reward model."""
    state = load_checkpoint(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        return False
    return "head.weight" not in state["model"]


def policies(out):
    """Return {stage: path}: base and sft if present, then every other policy by name."""
    found = {}
    for stage, path in (("base", out / "gpt.pt"), ("sft", out / "sft.pt")):
        if path.exists():
            found[stage] = path
    for path in sorted(out.glob("*.pt")):
        if path.stem not in ("gpt", "sft") and is_policy(path):
            found[path.stem] = path
    return found


def tokenizer_entries(enc, name):
    """Return what a checkpoint keeps of its tokenizer. name: the one that get_tokenizer knows."""
    return dict(tokenizer=name, tokenizer_json=carried(enc), fingerprint=fingerprint(enc))


def carried_tokenizer(state, path):
    """Return the tokenizer that a checkpoint carries. Raises UserError if it is damaged."""
    try:
        enc = from_json(state["tokenizer_json"])
    except Exception as e:   # a damaged file can fail in many ways; report them alike
        raise UserError(f"{path}: its tokenizer is damaged ({brief(e)})") from None
    if fingerprint(enc) != state["fingerprint"]:
        raise UserError(f"{path}: its tokenizer is not the one that it was trained with")
    return enc


def named_tokenizer(state, path):
    """Return the tokenizer that an older checkpoint only names, which may stand beside it.

    Raises UserError if it is missing or changed.
    """
    name = state["tokenizer"]
    files = [place for place in remembered(name, path) if place.is_file()]
    try:
        found = [get_tokenizer(str(place)) for place in files or [name]]
    except UserError as e:
        raise UserError(f"{path}: its tokenizer is missing, put it beside: {e}") from None
    for enc in found:
        if fingerprint(enc) == state["fingerprint"]:
            return enc
    raise UserError(f"{path}: {name or 'data/tokenizer.json'} has changed since this checkpoint "
                    f"was trained; restore the old one, or train again")


def tokenizer_of(state, path):
    """Return the tokenizer of a loaded checkpoint. Raises UserError if it is missing or changed."""
    keys = {"model", "gpt", "tokenizer", "fingerprint"}
    complete = isinstance(state, dict) and keys <= set(state)
    if not complete or not isinstance(state["tokenizer"], str):
        raise UserError(f"{path}: not a checkpoint of this project")
    carries = state.get("tokenizer_json") is not None
    enc = carried_tokenizer(state, path) if carries else named_tokenizer(state, path)
    rows = state["gpt"].get("vocab_size") if isinstance(state["gpt"], dict) else None
    if rows != enc.n_vocab:
        raise UserError(f"{path}: embeds {brief(rows)} tokens, but its tokenizer has {enc.n_vocab}")
    return enc


def check_readable(writer, reader, name):
    """Raise UserError unless the model `reader` can read all that the model `writer` writes.

    Both are loaded checkpoints, of any size; name: the reader's, for the message.
    """
    if reader["fingerprint"] != writer["fingerprint"]:
        raise UserError(f"{name}: its tokenizer is not that of the policy, whose responses it is "
                        f"to read; pretrain it with the same --tokenizer")
    context = writer["gpt"]["block_size"]
    if reader["gpt"]["block_size"] < context:
        raise UserError(f"{name}: its context of {reader['gpt']['block_size']} is too short for "
                        f"what the policy writes; pretrain it with --block-size {context}")


def body_weights(config, weights):
    """Return the weights of the GPT itself; for a reward model, those below the head.

    Raises ValueError, or another exception, if the sizes differ from the config, or if the weights
    would give NaN. Call it before building the model, because a damaged size could demand all
    available memory.
    """
    body = {k[5:]: v for k, v in weights.items() if k.startswith("body.")} or weights
    V, T, C = config.vocab_size, config.block_size, config.n_embd
    shapes = (body["wte.weight"].shape, body["wpe.weight"].shape)
    blocks = all(body[f"h.{i}.mlp.c_fc.weight"].shape == (4 * C, C) for i in range(config.n_layer))
    if shapes != ((V, C), (T, C)) or not blocks or config.n_head < 1:
        raise ValueError("other vocabulary, context, width, depth or heads")
    for name, tensor in weights.items():
        # No weight of a working model is near 10,000. With larger ones a square may be infinite.
        if tensor.is_floating_point() and not tensor.abs().amax() < 1e4:
            raise ValueError(f"{name} has NaN, infinite or huge numbers")
    if "std" in weights and not weights["std"] > 0:   # of a reward model, which divides by it
        raise ValueError("std must be above 0")
    return body


@contextmanager
def damage_reported(where):
    """Turn any exception of a block that reads weights into a UserError that names their file."""
    try:
        yield
    except Exception as e:   # a corrupt file can fail in many ways; report them alike
        reason = brief(repr(e))
        raise UserError(f"{where}: its weights are damaged or do not fit ({reason})") from None


def add_special_tokens(model, enc, folder):
    """Grow a GPT-2 read from `folder` by our special tokens, if the tokenizer has them.

    New rows start at the mean embedding, so new tokens get average logits. Rows that pad the
    vocabulary to a multiple of 64, such as GPT-2's 50,304, are dropped. Raises UserError if enc is
    not the tokenizer of the model.
    """
    size = model.config.vocab_size
    n_ordinary = enc.n_vocab - len(SPECIAL)
    padding = max(128, n_ordinary // 50)   # at most; Megatron pads 50,257 to 51,200
    if size > enc.n_vocab and size % 64 == 0 and size <= n_ordinary + padding:
        kept = enc.n_vocab if knows_special_tokens(folder) else n_ordinary
        print(f"{folder}: the last {size - kept} of {size} tokens are padding, and are dropped")
    elif n_ordinary <= size <= enc.n_vocab:
        kept = size
    else:
        raise UserError(f"--init-from {folder} has {size} tokens, the tokenizer {enc.n_vocab}; "
                        f"name the one it was trained with, such as --tokenizer gpt2")
    old = model.wte.weight.data[:kept]                                        # (V, C)
    new = old.mean(0).expand(enc.n_vocab - kept, -1)
    model.wte = nn.Embedding(enc.n_vocab, model.config.n_embd, device=old.device)
    model.wte.weight.data = torch.cat([old, new])
    model.config.vocab_size = enc.n_vocab


def extend_context(model, table):
    """Grow the context to the rows of the position table (T, C); trained rows keep their values.

    Train on longer documents before relying on the new positions.
    """
    old = model.wpe.weight.data
    model.wpe = nn.Embedding(*table.shape, device=old.device)
    model.wpe.weight.data = torch.cat([old, table[len(old):].to(old)])
    model.config.block_size = len(table)
