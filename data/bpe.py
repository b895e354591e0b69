"""Byte-level BPE: learn a tokenizer from any text, and write it as a small JSON file that tiktoken loads.

The idea. A token is a string of bytes. Start with the 256 single bytes, so that every text can be encoded. Cut the text
into words with a regex, and count them. Then repeat: find the adjacent pair of tokens that occurs most often inside words,
make the two one new token everywhere, append it to the vocabulary. Frequent words end as one token, rare ones as pieces.

A tiny example: the words "under" (4 times), "mis" (3) and "stood" (2). Of all pairs d-e, e-r, n-d and u-n are the most
frequent (4 each); on a tie the smallest wins, so d-e is first. Ten merges, in this order:
    d+e  de+r  n+der  u+nder      i+s  m+is      o+d  o+od  s+t  st+ood
"misunderstood" was never seen. Encoding it is replaying the merges in order, and gives three tokens: mis+under+stood.

    python data/bpe.py --data book.txt                                       # -> out/tokenizer.json, 1024 tokens
    python data/bpe.py --data folder_of_txt --vocab-size 4096                # every *.txt below the folder
    python data/bpe.py --data book.txt --out out/small.json --vocab-size 300

Time on one core, 4096 merges: 10 MB of English or code, 5 seconds; 10 MB of Chinese, about a minute, because almost every
clause is a different word. The slowest is a text without spaces or punctuation (one word): a minute a megabyte.
"""
import argparse
import ast
import base64
import heapq
import inspect
import json
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

import regex  # not in requirements.txt by name: tiktoken depends on it. The standard `re` does not know \p{L}
import tiktoken
from tqdm import tqdm

# GPT-4's pattern, but each digit is its own token: 17 and 71 then share their parts, and sums can be learned digit by digit.
# If you change it, let every character match some alternative: tiktoken silently drops what does not match.
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s{0,63}[\r\n]|\s{1,64}(?!\S)|\s+"
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
BYTES = [bytes([b]) for b in range(256)]


@dataclass
class Config:
    data: str = ""
    "a UTF-8 text file, or a folder: every *.txt below it is read; take the text that the model will train on"
    out: str = "out/tokenizer.json"
    "where the tokenizer goes; a checkpoint trained with another tokenizer is useless, so do not overwrite one in use"
    vocab_size: int = 1024
    "tokens in all, the 256 bytes and 5 specials included; 1024 suits the tiny world, 4096 to 8192 some MB of real English"


def fail(message):
    print(f"bpe.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def find_files(data):
    if not os.path.exists(data):  # also the empty default
        fail(f"no file or folder '{data}': type python data/bpe.py --data FILE_OR_FOLDER")
    files = sorted(p for p in Path(data).rglob("*.txt") if p.is_file()) if os.path.isdir(data) else [Path(data)]
    return files or fail(f"no *.txt file below {data}: rename your files to *.txt, or type --data FILE")


def read_texts(files):
    """Yield one text a file: only one is in memory at a time, and no word spans two files, so their order is irrelevant."""
    for path in files:
        try:
            # Not read_text(): it would turn \r\n into \n, and the tokenizer would never learn the \r it meets later.
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            fail(f"{path} is not UTF-8 at byte {error.start}: type iconv -f LATIN1 -t UTF-8 {path} > fixed.txt")
        except OSError as error:
            fail(f"cannot read {path} ({error.strerror}): give a readable file with --data")


def count_words(texts, pattern=PATTERN):
    """Iterable of str -> Counter of words as bytes. A text of millions of words has few different ones: count each once."""
    counts = Counter()
    for text in texts:
        counts.update(match.group() for match in regex.finditer(pattern, text))
    return Counter({word.encode("utf-8"): n for word, n in counts.items()})


def merge_pair(word, pair):
    """List of tokens -> (the list with each occurrence of the pair made one token, which pairs came (+1) and went (-1)).

    Left to right, one merge at a time: each is seen in the word as the merges before it left it, so "aaaa" needs no care.
    """
    (a, b), ab = pair, pair[0] + pair[1]
    merged, changes, i = [], [], 0
    while i < len(word):
        if word[i] == a and i + 1 < len(word) and word[i + 1] == b:
            if merged:
                changes += ((merged[-1], a), -1), ((merged[-1], ab), 1)
            if i + 2 < len(word):
                changes += ((b, word[i + 2]), -1), ((ab, word[i + 2]), 1)
            changes.append((pair, -1))
            merged.append(ab)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged, changes


def train_bpe(counts, n_merges):
    """Counter of words -> the merges in order: each the most frequent adjacent pair, on a tie the smallest tuple.

    Fewer than n_merges come back if no pair is left that occurs twice: such a token would memorise one place of the text.
    No two merges make the same bytes (a piece of text that no merge crosses is always cut the same way), so the bytes
    alone identify a merge. tiktoken relies on that: it ranks a pair by its concatenation and never sees the merges.
    """
    words = [[BYTES[b] for b in word] for word in counts]
    freqs = list(counts.values())
    pair_counts, where = Counter(), defaultdict(set)  # where: pair -> words that have it now or had it once
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += freqs[i]
            where[pair].add(i)
    # Each count that changes is pushed again and the old entry stays: an entry is true only if it equals pair_counts.
    # Python's heap gives the smallest, so counts are negative, and the pair itself is the tie-break.
    heap = [(-n, pair) for pair, n in pair_counts.items()]
    heapq.heapify(heap)

    merges = []
    for _ in tqdm(range(n_merges), desc="merges", leave=False, disable=None):
        while heap and -heap[0][0] != pair_counts[heap[0][1]]:
            heapq.heappop(heap)
        if not heap or -heap[0][0] < 2:
            break
        best = heapq.heappop(heap)[1]
        merges.append(best)
        # The whole speed is here: only words that hold the pair are touched, and only counts beside a merge change.
        delta = Counter()
        for i in where.pop(best):
            words[i], changes = merge_pair(words[i], best)
            for pair, sign in changes:
                delta[pair] += sign * freqs[i]
                if sign > 0:
                    where[pair].add(i)
        for pair, change in delta.items():
            if change:
                pair_counts[pair] += change
                heapq.heappush(heap, (-pair_counts[pair], pair))
    return merges


def save(path, merges, pattern=PATTERN):
    """Write the JSON whole or not at all: a run killed half-way must not leave half a tokenizer beside good checkpoints."""
    ranks = [base64.b64encode(token).decode() for token in BYTES + [a + b for a, b in merges]]
    content = {"name": "village", "pattern": pattern, "ranks": ranks, "special": SPECIAL}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # the same folder: os.replace is atomic within one disk only
    try:
        part.write_bytes((json.dumps(content, indent=0) + "\n").encode())  # bytes: the same file on Windows too
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def main(config):
    # All that can be wrong is checked before the slow part, but for the disk.
    if config.vocab_size < 256 + len(SPECIAL) + 1:
        fail(f"vocab_size {config.vocab_size} has no room for 256 bytes, 5 specials and a merge: type --vocab-size 262")
    files = find_files(config.data)
    if os.path.isdir(config.out) or Path(config.out).resolve() in [path.resolve() for path in files]:
        fail(f"--out {config.out} is a folder or the text itself: type --out SOMETHING.json")
    counts = count_words(read_texts(files))
    if not counts:
        fail(f"no text in {config.data}: give a file that is not empty with --data")
    print(f"{len(files)} file(s), {counts.total():,} words, {len(counts):,} different")
    merges = train_bpe(counts, config.vocab_size - 256 - len(SPECIAL))
    try:
        save(config.out, merges)
    except OSError as error:
        fail(f"cannot write {config.out} ({error.strerror}): give a writable place with --out")

    # tiktoken counts the tokens: a check that it takes the ranks. The words are cut already, so the pattern takes all
    # (and unlike PATTERN it does not panic on a million spaces in a row).
    ranks = {token: rank for rank, token in enumerate(BYTES + [a + b for a, b in merges])}
    enc = tiktoken.Encoding("words", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    n_tokens = sum(len(enc.encode_ordinary(word.decode())) * n for word, n in counts.items())
    ratio = sum(len(word) * n for word, n in counts.items()) / n_tokens
    size = len(ranks) + len(SPECIAL)
    early = f" (not {config.vocab_size}: no pair occurs twice any more)" if size < config.vocab_size else ""
    print(f"{config.out}: {size} tokens{early}, {ratio:.2f} bytes per token on this text")


if __name__ == "__main__":
    # The line under each field of Config is its help. Python throws such strings away, so they are read from the source.
    body = ast.parse(inspect.getsource(Config)).body[0].body
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=style)
    parser.error = lambda message: fail(f"{message}: type python data/bpe.py --help")
    for field, advice in zip(fields(Config), body[1::2]):
        parser.add_argument(f"--{field.name.replace('_', '-')}", f"--{field.name}", type=field.type, default=field.default, help=advice.value.value)
    main(Config(**vars(parser.parse_args())))
