"""Byte-level BPE: learn a tokenizer from any text, and write it as a small JSON file for tiktoken.

The idea. A token is a string of bytes. Start with the 256 single bytes, so that every text can be
encoded. Cut the text into words with a regex, and count them. Then repeat: find the adjacent pair
of tokens that occurs most often inside words, make it one new token everywhere, and append it to
the vocabulary. Frequent words end up as one token, rare words as several.

A tiny example: the words "under" (4 times), "mis" (3) and "stood" (2). The pairs d-e, e-r, n-d and
u-n are the most frequent (4 each). A tie goes to the smallest pair, so d-e is first. There are ten
merges, in this order:
    d+e  de+r  n+der  u+nder      i+s  m+is      o+d  o+od  s+t  st+ood
"misunderstood" does not occur in the text. To encode it, replay the merges in order. The result is
three tokens: mis+under+stood.

    python data/bpe.py --data book.txt                             # out/tokenizer.json, 1024 tokens
    python data/bpe.py --data folder_of_txt --vocab-size 4096      # every *.txt and *.jsonl in it
    python data/bpe.py --data book.txt --out out/small.json --vocab-size 300

Time on one core, 4096 merges: 10 MB of English or code take a few seconds. 10 MB of Chinese take
about a minute, because almost every clause is a different word. The worst case is a text without
spaces or punctuation, which is one word: a minute per megabyte.
"""
import heapq
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import tiktoken
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.text import find_texts, read_documents, write_text
from data.tokenizer import SPECIAL, to_json
from scaffold.cli import UserError, start

# GPT-4's pattern, but each digit is a token: 17 and 71 share their parts, so a model can learn sums
# digit by digit. If you change it, let every character match: tiktoken silently drops the rest.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s{0,63}[\r\n]|\s{1,64}(?!\S)|\s+"
)
BYTES = [bytes([b]) for b in range(256)]


@dataclass
class Config:
    data: str = ""                    # a text, or a folder: every *.txt below it is read, and
                                      # every *.jsonl; use what the model will train on
    out: str = "out/tokenizer.json"   # the file to write; do not overwrite a tokenizer in use:
                                      # checkpoints need the one that they were trained with
    vocab_size: int = 1024            # all tokens, the 256 bytes and 5 specials included;
                                      # 1024 suits the village, 4096 to 8192 a few MB of English


def kind_of(char):
    """Return "space", or the major Unicode category of a character, such as "L" for letters."""
    # Python counts \x1c to \x1f, four control characters, as spaces. Unicode and tiktoken do not.
    if char.isspace() and not "\x1c" <= char <= "\x1f":
        return "space"
    return unicodedata.category(char)[0]


@cache
def to_re(pattern, last=sys.maxunicode):
    r"""Compile a pattern of tiktoken with the standard `re`, which does not know \p{L} and \p{N}.

    \p{L}, \p{N}, \s and \S become ranges of characters up to the code point `last`; \S must be
    outside brackets.

    Python and tiktoken have tables of different Unicode versions. A character that is new in the
    later version may be a letter for one and not for the other. Words with it are then cut in
    different ways here and in tiktoken: fewer merges apply to them, but every text round-trips.
    """
    ranges = defaultdict(str)
    for kind, run in groupby(range(last + 1), key=lambda code: kind_of(chr(code))):
        codes = list(run)
        ranges[kind] += f"\\U{codes[0]:08x}-\\U{codes[-1]:08x}"
    classes = {
        r"\p{L}": ranges["L"],
        r"\p{N}": ranges["N"],
        r"\s": ranges["space"],
        r"\S": "^" + ranges["space"],
    }
    parts = []
    in_brackets = False
    for part in re.findall(r"\\p\{[LN]\}|\\.|.", pattern):
        if part in classes:
            parts.append(classes[part] if in_brackets else f"[{classes[part]}]")
            continue
        parts.append(part)
        if part in "[]":
            in_brackets = part == "["
    return re.compile("".join(parts))


def find_files(data):
    """Return the file, or all files of documents below the folder. Raises UserError for none."""
    if not data or not Path(data).exists():
        raise UserError(f"no file or folder '{data}': type --data FILE_OR_FOLDER")
    return list(find_texts(data).values())


def read_texts(files):
    """Yield the documents of each file, one at a time, as gpt.py reads them.

    The lines between them, just `<|end|>`, are no text: a token for them would never be used. No
    word spans two documents, so the order of the files does not matter. Raises UserError if a file
    cannot be read.
    """
    for path in files:
        yield from read_documents(path)


def count_words(texts):
    """Cut strings into words with PATTERN. Returns a Counter of words as bytes.

    A text of millions of words has only some ten thousand different ones, and training needs each
    of these only once.
    """
    counts = Counter()
    for text in texts:
        # `re` is slow with many ranges above U+FFFF, and few texts have letters or numbers there.
        has_rare = any(char > "\uffff" and char.isalnum() for char in set(text))
        words = to_re(PATTERN, sys.maxunicode if has_rare else 0xFFFF)
        counts.update(words.findall(text))
    return Counter({word.encode("utf-8"): n for word, n in counts.items()})


def merge_pair(word, pair):
    """Make each occurrence of a pair in a word one token.

    Returns (tokens, changes): the new list of tokens, and (pair, +1 or -1) for each pair that
    appears or disappears. Merges go from left to right, one at a time, and each sees the word as
    the merges before it left it. So overlaps such as "aaaa" need no special case.
    """
    a, b = pair
    ab = a + b
    merged = []
    changes = []
    i = 0
    while i < len(word):
        if word[i] == a and i + 1 < len(word) and word[i + 1] == b:
            if merged:
                changes.append(((merged[-1], a), -1))
                changes.append(((merged[-1], ab), 1))
            if i + 2 < len(word):
                changes.append(((b, word[i + 2]), -1))
                changes.append(((ab, word[i + 2]), 1))
            changes.append((pair, -1))
            merged.append(ab)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged, changes


def train_bpe(counts, n_merges):
    """Learn the merges from a Counter of words. Returns a list of pairs, in order.

    Each pair is the most frequent one after the merges before it; ties go to the
    smallest tuple. The list is shorter than n_merges if no pair is left that occurs twice: its
    token would memorise one place of the text.

    No two merges make the same bytes, because a string that no merge crosses is always cut in the
    same way. So the bytes alone identify a merge. tiktoken relies on that: it ranks a pair by its
    concatenation and never sees the merges.
    """
    words = [[BYTES[b] for b in word] for word in counts]
    freqs = list(counts.values())
    pair_counts = Counter()
    where = defaultdict(set)   # pair -> indices of the words that contain it or once did
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += freqs[i]
            where[pair].add(i)
    # An entry of a heap cannot change. Push each changed count as a new entry and keep the old one;
    # an entry is valid only if its count equals pair_counts. The heap pops the smallest entry, so
    # counts are negative. The pair itself breaks ties.
    heap = [(-n, pair) for pair, n in pair_counts.items()]
    heapq.heapify(heap)

    merges = []
    for _ in tqdm(range(n_merges), desc="merges", leave=False, disable=None):
        while heap and -heap[0][0] != pair_counts[heap[0][1]]:
            heapq.heappop(heap)
        if not heap or -heap[0][0] < 2:
            break
        _, best = heapq.heappop(heap)
        merges.append(best)
        # This is fast because only words with the pair change, and only counts next to a merge.
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


def vocabulary(merges):
    """Return the bytes of every ordinary token; the position is its id."""
    return BYTES + [a + b for a, b in merges]


def save(path, merges):
    """Write the tokenizer file: the pattern, the tokens in the order of their ids, the specials."""
    write_text(path, to_json("village", PATTERN, vocabulary(merges)))


def bytes_per_token(counts, merges):
    """Compute the mean length of a token on the counted words.

    tiktoken encodes them, which also checks that it accepts the ranks.
    """
    ranks = {token: rank for rank, token in enumerate(vocabulary(merges))}
    # The words are already cut, so this pattern matches a whole word. PATTERN would panic on a word
    # of a million spaces.
    enc = tiktoken.Encoding("words", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    n_tokens = sum(len(enc.encode_ordinary(word.decode())) * n for word, n in counts.items())
    n_bytes = sum(len(word) * n for word, n in counts.items())
    return n_bytes / n_tokens


def check(cfg, files):
    """Raise UserError for settings that cannot work."""
    least = len(BYTES) + len(SPECIAL) + 1
    if cfg.vocab_size < least:
        raise UserError(f"--vocab-size {cfg.vocab_size} has no room for 256 bytes, {len(SPECIAL)} "
                        f"specials and a merge: type --vocab-size {least}")
    out = Path(cfg.out)
    if out.is_dir() or out.resolve() in [file.resolve() for file in files]:
        raise UserError(f"--out {out} is a folder or the text itself: type --out SOMETHING.json")


def main(cfg):
    files = find_files(cfg.data)
    check(cfg, files)   # before the slow part
    counts = count_words(read_texts(files))
    if not counts:
        raise UserError(f"no text in {cfg.data}: give a file that is not empty with --data")
    print(f"{len(files)} file(s), {counts.total():,} words, {len(counts):,} different")
    merges = train_bpe(counts, cfg.vocab_size - len(BYTES) - len(SPECIAL))
    try:
        save(cfg.out, merges)
    except OSError as e:
        raise UserError(f"cannot write {cfg.out} ({e.strerror}): change --out") from None

    size = len(vocabulary(merges)) + len(SPECIAL)
    early = ""
    if size < cfg.vocab_size:
        early = f" (not {cfg.vocab_size}: no pair occurs twice any more)"
    ratio = bytes_per_token(counts, merges)
    print(f"{cfg.out}: {size} tokens{early}, {ratio:.2f} bytes per token on this text")


if __name__ == "__main__":
    start(main, Config, __doc__)
