"""The tokenizer: the embedded one, a file made by data/bpe.py, or one of tiktoken's.

    enc = get_tokenizer()                      # 1,024 tokens, learned on the village
    enc.encode_ordinary("The cow says moo.")   # no text can produce a special token
"""
import base64
import hashlib
import json
import os
import re
from pathlib import Path

import tiktoken

from scaffold.cli import UserError, brief

EMBEDDED = Path(__file__).with_name("tokenizer.json")
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
# Characters of all kinds, for a test of a tokenizer's pattern.
PROBE = "".join(map(chr, range(1, 500)))
PROBE += "Tom's 17 cats.\r\n\n  \u2028\u3000 你好，👩‍👩‍👧"


def check_pattern(pattern):
    """Raise ValueError unless the pattern matches every character and never the empty string.

    tiktoken drops characters that do not match, and panics at an empty match. In this vocabulary
    of bytes the empty string has an id, so an empty match shows up instead. A pattern that calls
    itself can exhaust the stack on a long text, which ends the process.
    """
    if re.search(r"\\g<|\(\?(R|P>|&)", pattern):
        raise ValueError("its pattern must not call itself")
    ranks = {bytes([b]): b for b in range(256)} | {b"": 256}
    enc = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ids = enc.encode_ordinary(PROBE)
    if 256 in ids + enc.encode_ordinary("") or enc.decode(ids) != PROBE:
        raise ValueError("its pattern must match every character, and never the empty string")


def to_json(name, pattern, tokens):
    """Return the text of a tokenizer file. tokens: the bytes of each ordinary token, by id."""
    ranks = [base64.b64encode(token).decode() for token in tokens]
    content = {"name": name, "pattern": pattern, "ranks": ranks, "special": SPECIAL}
    return json.dumps(content, indent=0) + "\n"


def carried(enc):
    """Return the text of the file of an encoding, or None for tiktoken's: its name is enough."""
    if enc.special_tokens_set != set(SPECIAL):   # tiktoken's have <|endoftext|>, too
        return None
    return to_json(enc.name, enc._pat_str, token_bytes(enc)[:-len(SPECIAL)])


def from_json(text):
    """Build the tiktoken.Encoding of what to_json returned. Raises ValueError and others."""
    raw = json.loads(text)
    ranks = {base64.b64decode(token, validate=True): i for i, token in enumerate(raw["ranks"])}
    if raw["special"] != SPECIAL or not {bytes([b]) for b in range(256)} <= set(ranks):
        raise ValueError(f"it needs the 256 bytes and the special tokens {SPECIAL}")
    if len(ranks) < len(raw["ranks"]):   # a special token would share its id with an ordinary one
        raise ValueError("it has the same token twice")
    check_pattern(raw["pattern"])
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding(raw["name"], pat_str=raw["pattern"], mergeable_ranks=ranks,
                             special_tokens=special)


def get_tokenizer(name=None):
    """Return a `tiktoken.Encoding` with the five special tokens.

    name: a file made by data/bpe.py, a tiktoken name such as gpt2, or None for the embedded one.
    Raises UserError if there is no such tokenizer.
    """
    path = Path(name or EMBEDDED)
    if os.path.isfile(path):   # Path.is_file raises for a name that is too long
        try:
            return from_json(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as e:
            raise UserError(f"{path}: not a tokenizer file ({brief(e)}); "
                            f"make one with: python data/bpe.py --data my.txt") from None
    try:
        enc = tiktoken.get_encoding(name)
    except Exception as e:   # tiktoken downloads its vocabularies, which fails in many ways
        raise UserError(f"tokenizer {brief(repr(name))}: neither a file nor a tiktoken name "
                        f"available here ({type(e).__name__}); make one with: "
                        f"python data/bpe.py --data my.txt --out my.json") from None
    # tiktoken has no public way to extend an encoding; its README recommends these attributes.
    special = {token: enc.n_vocab + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding(name, pat_str=enc._pat_str, mergeable_ranks=enc._mergeable_ranks,
                             special_tokens=enc._special_tokens | special)


def end_of(enc):
    """Return the id of <|end|>, which ends a document and a chat turn."""
    return enc.encode_single_token("<|end|>")


def token_bytes(enc):
    """Return the bytes of each token id as a list of length n_vocab; b"" for special tokens."""
    table = [b""] * enc.n_vocab
    for token, rank in enc._mergeable_ranks.items():
        table[rank] = token
    return table


def decode_token(enc, token):
    """Return the bytes of a token: None for a special token, b"" for an id without a token."""
    if enc.is_special_token(token):
        return None
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return b""


def fingerprint(enc):
    """Return a short hash of everything that gives ids their meaning; checkpoints store it."""
    h = hashlib.sha256(enc._pat_str.encode())
    for token, _ in sorted(enc._mergeable_ranks.items(), key=lambda item: item[1]):
        h.update(len(token).to_bytes(4, "big") + token)
    h.update(repr(sorted(enc._special_tokens.items())).encode())
    return h.hexdigest()[:16]
