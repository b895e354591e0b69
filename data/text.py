"""Pretraining text: files become documents, documents become rows of tokens.

A text file holds documents separated by lines that are just `<|end|>` or `<|endoftext|>`; a .jsonl
file has one per line, {"text": ...}. Each file of a folder is a source. A source is drawn as often
as its mixture weight says (LLaMA, 2302.13971, table 1).
"""
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data.encodings import decode
from data.records import Unusable, kind_of, read_bytes, read_usable
from data.tokenizer import end_of
from scaffold.cli import UserError, brief
from scaffold.run import load_checkpoint


class Source(NamedTuple):
    """One text file, tokenized. A document is a 1-D tensor of ids that ends with <|end|>."""
    train: list      # documents, cut to the context
    val: list        # documents, whole
    weight: float    # share of the tokens drawn, relative to the other sources


def read_text(path):
    """Return a text file as a string. Raises UserError naming the first byte that is not UTF-8."""
    return decode(read_bytes(Path(path)), path)


def write_text(path, text):
    """Write a UTF-8 file atomically, with "\\n" as the line end on every system."""
    path = Path(path)
    if path.exists() and not path.is_file():   # a pipe or a device
        path.write_text(text, encoding="utf-8", newline="\n")
        return
    path = path.resolve()   # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def split_documents(text):
    """Cut a string at the lines that are just <|end|> or <|endoftext|>; drop blank documents."""
    documents = re.split(r"^<\|(?:end|endoftext)\|>\r?(?:\n|\Z)", text, flags=re.M)
    return [d for d in documents if d.strip()]


def read_documents(path):
    """Return the documents of a text file, or of a file of records with the key "text"."""
    def read(record, where):
        if "text" not in record:
            raise UserError(f'{where}: expected {{"text": string}}, found {brief(sorted(record))}')
        text = record["text"]
        if text is None or text == "":
            raise Unusable(where, "no text")
        if not isinstance(text, str):
            raise UserError(f"{where}: text: expected a string, found {type(text).__name__}")
        return text

    if kind_of(path) in (".jsonl", ".json", ".csv", ".tsv"):
        texts = read_usable(path, read, "a text")
    else:
        texts = [read_text(path)]
    return [document for text in texts for document in split_documents(text)]


def bare(name):
    """Return the name of a file without its ending: "deep/a.txt.gz" becomes "deep/a"."""
    if name.lower().endswith(".gz"):
        name = name[:-3]
    return name.removesuffix(Path(name).suffix)


def find_texts(path):
    """Return {name: file} of a file, or of every *.txt and *.jsonl, plain or .gz, of a folder.

    The name is the path below the folder without its ending. Hidden files and folders are left
    out: they are copies and settings that other programs made. Raises UserError if there is no
    file, or if two have the same name.
    """
    path = Path(path)
    if not path.is_dir():
        return {bare(path.name): path}
    files = {}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or kind_of(file) not in (".txt", ".jsonl") or not file.is_file():
            continue
        name = bare(inside.as_posix())
        if name in files:
            raise UserError(f"{file} and {files[name]}: two sources of the same name; rename one")
        files[name] = file
    if not files:
        raise UserError(f"{path}: no *.txt or *.jsonl file in this folder")
    return files


def split_validation(documents, n):
    """Cut n tokens from the end of a list of documents -> (train, validation).

    Whole documents move to the validation part; the one at the border is cut in two.
    """
    train = list(documents)
    val = []
    while n > 0:
        last = train.pop()
        if len(last) > n + 1:   # at least two tokens stay: a single one predicts nothing
            train.append(last[:-n])
            last = last[-n:]
        val.append(last)
        n -= len(last)
    return train, val[::-1]


def cut(document, T):
    """Cut a document into pieces of at most T tokens, so that each token is read equally often.

    A piece starts with the last token of the piece before. So every token but the first of the
    document is predicted in one piece, <|end|> included.
    """
    return [document[i:i + T] for i in range(0, max(1, len(document) - 1), max(1, T - 1))]


def read_weights(path, mixture):
    """Return ({source: weight}, origin of the weights) from --mixture or the folder's mixture.json.

    The dict is empty if there is neither. Raises UserError for malformed weights.
    """
    file = path / "mixture.json"
    origin = f"--mixture {brief(repr(mixture))}" if mixture else str(file)
    weights = {}
    try:
        if mixture:
            parts = [part.split("=") for part in mixture.split(",")]
            weights = {name.strip(): float(weight) for name, weight in parts}
        elif path.is_dir() and file.exists():
            raw = json.loads(read_text(file))
            weights = {name: float(weight) for name, weight in raw.items()}
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        form = "write it as name=weight,name=weight"
        if not mixture:
            form = 'expected a JSON object such as {"books": 2, "web": 1}'
        raise UserError(f"{origin}: {form}") from None
    # Token counts may be weights, too. Beyond these bounds, quotients of weights are not exact.
    valid = all(w == 0 or 1e-9 <= w <= 1e15 for w in weights.values())
    if weights and not (valid and any(weights.values())):
        raise UserError(f"{origin}: weights must be 0, or from 1e-9 to 1e15, and not all 0")
    return weights, origin


def read_corpus(path, enc, block_size, val_fraction, mixture=""):
    """Read a file of documents, or every *.txt and *.jsonl of a folder -> {name: Source}.

    The tail of each source is kept for validation. Training documents are cut to block_size. The
    weights are `mixture` ('books=2,web=1'), else those of the folder's mixture.json, else the
    sizes. Raises UserError for a text that is missing or too short.
    """
    share = min(val_fraction, 1 - val_fraction)   # of the smaller part
    if not share > 0:   # this form also refuses nan
        raise UserError(f"{path}: --val-fraction {val_fraction} must be above 0 and below 1")
    end = end_of(enc)
    sources = {}
    for name, file in find_texts(path).items():
        documents = [torch.tensor(enc.encode_ordinary(text) + [end], dtype=torch.int32)
                     for text in read_documents(file)]
        total = sum(map(len, documents))
        smaller = total * share
        if not smaller > block_size:
            most = math.ceil(smaller) - 1   # the longest context that this text allows
            shorter = f", or a --block-size of at most {most}" if most > 1 else ""
            raise UserError(f"{file}: {total} tokens are too few: with --val-fraction "
                            f"{val_fraction} and a context of {block_size} tokens, "
                            f"{math.floor(block_size / share) + 1:,} are needed; use more text"
                            f"{shorter}")
        train, val = split_validation(documents, math.ceil(total * val_fraction))
        pieces = [piece for document in train for piece in cut(document, block_size)]
        sources[name] = Source(pieces, val, sum(map(len, train)))
    weights, origin = read_weights(Path(path), mixture)
    if not weights:
        return sources
    unknown = set(weights) - set(sources)
    if unknown:
        raise UserError(f"{origin} names {brief(sorted(unknown))}, "
                        f"but the sources are {brief(sorted(sources))}")
    return {name: s._replace(weight=weights.get(name, 0.0)) for name, s in sources.items()}


WITHOUT_TEXT = "for ppo.py name another text with --text, or do without it: --ptx 0"


def remembered(name, path):
    """Return where the file or folder is that the checkpoint `path` remembers as `name`.

    It may stand where it was, or beside the checkpoint: after out/ was moved, out/data/pretrain is
    data/pretrain there. Devices and pipes are left out, because reading one might never end.
    """
    parts = [part for part in re.split(r"[/\\]", name) if part]
    beside = [Path(path).parent.joinpath(*parts[i:]) for i in range(len(parts))]
    places = [name, *beside]
    return [Path(p) for p in places if os.path.isfile(p) or os.path.isdir(p)]


def text_entries(cfg):
    """Return what a checkpoint remembers of the text in cfg.data. find_text reads it."""
    return dict(data=os.path.abspath(cfg.data), val_fraction=cfg.val_fraction, mixture=cfg.mixture)


def find_text(path):
    """Return a checkpoint and where the text is that it was pretrained on. Raises UserError."""
    if not os.path.exists(path):
        raise UserError(f"{path} is missing, which names the text it was pretrained on; "
                        f"{WITHOUT_TEXT}")
    state = load_checkpoint(path)
    kinds = dict(data=str, val_fraction=float, mixture=str)
    known = isinstance(state, dict) and all(isinstance(state.get(k), t) for k, t in kinds.items())
    if not known:
        raise UserError(f"{path}: does not name the text it was pretrained on; {WITHOUT_TEXT}")
    places = remembered(state["data"], path)
    if not places:
        raise UserError(f"{path}: its pretraining text is gone: {brief(state['data'])}; restore "
                        f"it, or {WITHOUT_TEXT}")
    return state, places[0]


def checkpoint_text(path, enc, block_size, other=""):
    """Read the text a checkpoint was pretrained on, split and weighted as it was then.

    Read `other` instead if it is given. Raises UserError if the text is not to be found.
    """
    if other:
        return read_corpus(other, enc, block_size, val_fraction=0.05)
    state, text = find_text(path)
    return read_corpus(text, enc, block_size, state["val_fraction"], state["mixture"])


def text_if_there(path, enc, block_size):
    """Return what checkpoint_text returns; None, with a notice, if the text is gone."""
    try:
        find_text(path)
    except UserError as e:
        print(f"no LM loss: {e}", file=sys.stderr)
        return None
    return checkpoint_text(path, enc, block_size)


def text_files(path, other=""):
    """Return the files and folders that decide what checkpoint_text returns."""
    return [other] if other else [path, find_text(path)[1]]


def draw_rows(sources, drawn, n_tokens, T, rng):
    """Fill rows of T tokens with random documents -> ids, segments (B, T), as `pack` returns.

    There are as many rows as fit into n_tokens, but at least one. The last document of a row is cut
    where the row ends. A document that `cut` has not cut to T tokens contributes a random window.
    The next document comes from the source that is furthest behind its weight. drawn: {source:
    tokens so far}, changed in place.
    """
    weights = {name: source.weight for name, source in sources.items() if source.weight}
    pieces = []
    for _ in range(max(1, n_tokens // T)):
        room = T
        while room:
            name = min(weights, key=lambda name: drawn.get(name, 0) / weights[name])
            train = sources[name].train
            document = train[rng.randrange(len(train))]
            first = rng.randrange(max(1, len(document) - T + 1))
            pieces.append(document[first:first + room])
            drawn[name] = drawn.get(name, 0) + len(pieces[-1])
            room -= len(pieces[-1])
    return pack(pieces, T)


def windows(documents, T, limit):
    """Cut the first `limit` tokens of some documents into pieces of at most T tokens."""
    pieces, n = [], 0
    for document in documents:
        if n < limit:
            pieces += cut(document[:limit - n], T)
            n += len(document)
    return pieces


def pad(rows, value=0):
    """Stack 1-D tensors of different lengths, padded on the right: (B, T)."""
    return pad_sequence(rows, batch_first=True, padding_value=value)


def pack(documents, T):
    """Lay documents (1-D tensors, each at most T long) into rows of length T.

    Returns ids and segments, both (B, T) and padded with 0. Segments number the documents of a row
    from 1. A document that does not fit into the current row starts the next one.
    """
    rows, used = [[]], 0
    for document in documents:
        if used + len(document) > T:
            rows.append([])
            used = 0
        rows[-1].append(document)
        used += len(document)
    ids = torch.zeros(len(rows), T, dtype=torch.long)                         # (B, T)
    segments = torch.zeros(len(rows), T, dtype=torch.long)                    # (B, T)
    for b, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row, 1):
            end = start + len(document)
            ids[b, start:end] = document
            segments[b, start:end] = number
            start = end
    return ids, segments


def by_length(f, ids, lengths):
    """Return f(ids), (B, T) -> (B, T) or (B, T, C), and skip most of the padding.

    If more than a fifth is padding, f takes four groups of rows of similar length, each cut to its
    longest row; the result is 0 after the cut.
    """
    if lengths.sum() >= 0.8 * ids.numel():   # or an empty batch
        return f(ids)
    order = lengths.argsort()
    parts = []
    for rows in order.chunk(4):
        T = int(lengths[rows[-1]])
        part = f(ids[rows, :T])                                               # (n, T) or (n, T, C)
        parts.append(F.pad(part, (0, 0) * (part.ndim - 2) + (0, ids.shape[1] - T)))
    return torch.cat(parts)[order.argsort()]


def sorted_batches(lengths, size):
    """Yield the indices of rows, `size` rows of similar length at a time."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for first in range(0, len(order), size):
        yield order[first:first + size]


def predicted(segments):
    """Return where the next token belongs to the same document: (B, T) -> (B, T-1)."""
    return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


def batches(lengths, batch_tokens, rng):
    """Group indices into batches of similar length, at most batch_tokens each with padding.

    This is as fast as packing, and no response can attend to another chat. Only pools of 32 batches
    are sorted: sorting all of the data would give every epoch the same neighbours.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool_size = max(1, 32 * batch_tokens * len(lengths) // max(1, sum(lengths)))
    result = []
    for start in range(0, len(order), pool_size):
        batch = []
        for i in sorted(order[start:start + pool_size], key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
                result.append(batch)
                batch = []
            batch.append(i)
        result.append(batch)
    rng.shuffle(result)
    return result
