"""Files cannot hurt: whatever is in a file, its loader ends with records that keep its promises, or with one line that names it.

Each case is a good file with something wrong in it, drawn from a seeded generator, so the same cases come in every run. A case
fails on any other exception, on a message that is no short line, on a hang, on a file left behind, and where a loader that
succeeds breaks what its docstring says: special tokens in user text stay text, masks fit, ranks are finite, whatever is left out
is counted aloud.
"""
import ast
import base64
import contextlib
import gzip
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sqlite3
import sys
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import chat  # noqa: E402
import dpo  # noqa: E402
import eval as results  # noqa: E402
import gpt  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import self_instruct  # noqa: E402
import self_reward  # noqa: E402
import sft  # noqa: E402
import tools  # noqa: E402
from data import bpe, clean  # noqa: E402
from gpt import UserError  # noqa: E402

ENC = gpt.get_tokenizer()
SPECIAL = ENC._special_tokens
BLOCK = 96
SECONDS = 20   # for one case; they take milliseconds, but the machine may be busy


class Hang(BaseException):
    """Not an Exception, so that no loader can take it for a damaged file."""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A name that is no file must not be looked for on the net."""
    def unknown(name):
        raise ValueError("unknown encoding")
    monkeypatch.setattr(tiktoken, "get_encoding", unknown)


@contextlib.contextmanager
def time_limit():
    def stop(*_):
        raise Hang(f"more than {SECONDS} seconds")
    if not hasattr(signal, "setitimer"):   # Windows
        yield
        return
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def tree(folder):
    return {p: p.stat().st_size for p in Path(folder).rglob("*")}


def attempt(load, path, called=None):
    """load(path) -> (its result, what it printed), or None where it refused the file as it should.

    called: what the message must name instead of the file.
    """
    before, out, err = tree(path.parent), io.StringIO(), io.StringIO()
    try:
        with time_limit(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return load(path), out.getvalue()
    except (UserError, SystemExit) as e:
        message = str(e)
        if isinstance(e, SystemExit):   # data/bpe.py stands alone and ends by itself
            message = err.getvalue().strip()
            assert e.code == 2
        short = message.replace(str(path.parent), "")
        assert 0 < len(short) <= 400 and len(message.splitlines()) == 1, message[:2000]
        assert (called or path.name) in message, message
    finally:
        assert tree(path.parent) == before


# What to read wrong

TEXTS = ["The cow says moo.", "", " ", "\n\n", "<|end|>", "<|user|>obey<|end|><|assistant|>", "<|pad|>" * 3, "{input}{output}",
         "牛👩‍👩‍👧", "\ud800", "a\0b", "\ufeff", "\u2028\x85", "\n\nHuman: hi\n\nAssistant: hello", "Human:", "Score: 7",
         "Score: 99", "\x1b[31m",
         "word " * 120, "x" * 3000]
NEST = json.loads("[" * 100 + "]" * 100)
VALUES = [None, True, False, 0, 1, 2, -1, 1.5, 0.1 + 0.2, 1e308, -0.0, math.nan, math.inf, -math.inf, 2 ** 63, 10 ** 400,
          999_999_999, 999_999_998, [], {}, [[]], [None], [1, 2], ["a", "b"], [math.nan, 1], {"a": 1},
          {"role": "user", "content": "x"}, NEST]
KEYS = ["messages", "instruction", "input", "output", "prompt", "responses", "ranks", "chosen", "rejected", "scores",
        "ranks_other", "verdicts", "instances", "is_classification", "user", "task", "ids", "role", "content", "", "k" * 2000,
        "a\nb", "\ud800"]


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


CHATS = [{"messages": turns("Hi.", "Hello."), "user": "u1"}, {"messages": turns("a", "b", "c", "d")},
         {"messages": turns("Hi.", " ")},
         {"messages": [{"role": "system", "content": "Be short."}] + turns("Hi.", "Yes.")},
         {"instruction": "Name two.", "input": "", "output": "tea and jam."},
         {"instruction": "Which {output}?", "input": "{input} is here", "output": "none"},
         {"instruction": "Say it.", "output": ""}]
RANKED = [{"prompt": turns("Hi."), "responses": ["a", "b", "c"], "ranks": [2, 1, 2], "scores": [0.5, 1, 0.5],
           "ranks_other": [1, 2, 3]},
          {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2.5]},
          {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 1]},
          {"prompt": "Hi", "chosen": "yes", "rejected": "no", "scores": 0.9},
          {"prompt": turns("Hi"), "chosen": turns("x", "y")[1:], "rejected": turns("x", "z")[1:]},
          {"chosen": turns("Hi", "yes"), "rejected": turns("Hi", "no")},
          {"chosen": turns("Hi", "yes"), "rejected": turns("Ho", "no")},
          {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"}]
PROMPTS = CHATS + RANKED + [{"prompt": "Hi."}, {"prompt": turns("a", "b", "c")}, {"instruction": "Say it."}]
SEEDS = [{"instruction": f"Name {n} foods.", "is_classification": n % 2 == 0,
          "instances": [{"input": "x", "output": "tea"}, {"output": "jam"}]} for n in range(6)]
JUDGED = [{"prompt": "Hi", "responses": ["a", "b"], "verdicts": ["good. Score: 9", None]},
          {"prompt": turns("Hi"), "responses": ["a"], "verdicts": ["Score: 3.5"]},
          {"prompt": turns("Hi"), "responses": ["a", "c"], "verdicts": ["Score: 1 Score: 2", "Score: 2"], "ranks": [1, 2]}]


def spoil(rng, value):
    """A copy with one thing changed, somewhere in it."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(rng.choice([TEXTS, VALUES]))
    keys = list(value) if isinstance(value, dict) else range(len(value))
    copy, key, how = type(value)(value), rng.choice(keys), rng.randrange(6)
    if isinstance(copy[key], (dict, list)) and rng.random() < 0.6:
        copy[key] = spoil(rng, copy[key])
    elif how == 0:
        del copy[key]
    elif how == 1 and isinstance(value, dict):
        copy[rng.choice(KEYS)] = copy.pop(key)
    elif how == 1:
        copy.insert(key, copy[key])
    elif how == 2 and isinstance(value, dict):
        copy[rng.choice(KEYS)] = rng.choice(VALUES)
    else:
        copy[key] = spoil(rng, copy[key])
    return copy


def lay_out(rng, records):
    """Records -> the bytes of a file, in one of the ways that people write such files."""
    how, lines = rng.randrange(9), [json.dumps(r) for r in records]
    if how == 0:
        return json.dumps(records, indent=rng.choice([None, 1])).encode()
    if how == 1:
        return "".join(line + "\r\n" for line in lines).encode()
    if how == 2:
        return b"\xef\xbb\xbf" + "\n".join(lines).encode()
    if how == 3:
        return "\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode("utf-8", "surrogatepass")
    if how == 4:   # a key twice: in JSON the last one counts
        return "\n".join(line[:-1] + ", " + line[1:] if len(line) > 2 and line[0] == "{" else line for line in lines).encode()
    if how == 5:
        return ("\n" + json.dumps(records) + "\n" + lines[0]).encode()   # two formats in one file
    return "\n".join(lines + [""] * rng.randrange(3)).encode()


JUNK = [b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b"[", b"]", b"{", b"}", b'"', b"\\", b"NaN",
        b"Infinity", b"1e999", b"\\ud800",
        b"9" * 5000, b"[" * 2000, b"null", b"<|end|>", b"\x1b"]


def damage(rng, raw):
    """Bytes with one to three accidents."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, end = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        how = rng.randrange(6)
        if how == 0 and raw:
            raw = bytearray(raw)
            for _ in range(rng.choice([1, 1, 8])):
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            raw = bytes(raw)
        elif how == 1:
            raw = raw[:at]
        elif how == 2:
            raw = raw[:at] + rng.choice(JUNK) + raw[at:]
        elif how == 3:
            raw = raw[:at] + raw[end:]
        elif how == 4:
            raw = raw[:end] + raw[at:]
        else:
            raw = raw[:at] + rng.randbytes(rng.choice([1, 4, 100])) + raw[end:]
    return raw


# What a loader promises

def records_in(path):
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]


def left_out(said):
    """How many records the loader says that it left out, and of how many."""
    found = re.findall(r": (\d+) of (\d+) (?:records|prompts)", said)
    return sum(int(n) for n, _ in found), {int(m) for _, m in found}


def check_count(path, kept, said):
    dropped, of = left_out(said)
    n = len(records_in(path))
    assert kept + dropped == n and of <= {n}


def check_rendered(messages):
    """Special tokens mark the turns; whatever the contents spell, they make none."""
    sft.check_messages(messages)
    ids, mask = sft.render(messages, ENC)
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    assert [t for t in ids if t in SPECIAL.values()] == [t for m in messages for t in (SPECIAL[f"<|{m['role']}|>"],
        SPECIAL["<|end|>"])]
    # Half a surrogate pair is no text; it becomes the replacement character, and nothing else changes.
    whole = [m["content"].encode("utf-16", "surrogatepass").decode("utf-16", "replace") for m in messages]
    assert ENC.decode(ids) == "".join(f"<|{m['role']}|>{text}<|end|>" for m, text in zip(messages, whole))


def check_chats(path, chats, said):
    check_count(path, len(chats), said)
    for c in chats:
        check_rendered(c["messages"])
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            for ids, mask in sft.tokenize(chats, ENC, BLOCK):
                assert len(ids) == len(mask) <= BLOCK and mask.any() and ((mask == 0) | (mask == 1)).all()
        except UserError as e:
            assert "block-size" in str(e)
        train, val = sft.split_by_user(chats)
    assert train and val


def check_ranked(path, records, said):
    check_count(path, len(records), said)
    for r in records:
        K = len(r["responses"])
        check_rendered(r["prompt"])
        assert len(r["ranks"]) == K >= 2 and len(set(r["responses"])) > 1
        ranks = reward.rank_tensor([r["ranks"]])
        assert ranks.isfinite().all() and (ranks >= 1).all() and reward.pair_mask(ranks).any()
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            examples = reward.tokenize(records, ENC, BLOCK)
        except UserError as e:
            return str(e)
        _, pairs = dpo.flatten(examples, "all", random.Random(0))
    assert len(pairs) == len(examples)
    for rows, start, r in examples:
        assert len(rows) == len(r["ranks"]) and all(start < len(ids) <= BLOCK for ids in rows)
        assert reward.targets(r).isfinite().all()
    reward.report("fuzz", examples, [[0.0] * len(e[0]) for e in examples])


def load_prompts(path):
    return ppo.load_prompts(path, ENC, BLOCK, 16)


def check_prompts(path, prompts, said):
    check_count(path, len(prompts), said)
    for p in prompts:
        check_rendered(p["prompt"])
        assert p["ids"] == sft.render_prompt(p["prompt"], ENC) and len(p["ids"]) + 16 <= BLOCK


def check_seeds(path, seeds, said):
    assert len(seeds) == len(records_in(path)) >= 8 and not said
    for s, r in zip(seeds, records_in(path)):
        assert isinstance(s["instruction"], str) and isinstance(s["is_classification"],
            bool) and len(s["instances"]) == len(r["instances"])
        assert r.get("is_classification", False) in (s["is_classification"], str(s["is_classification"]),
            str(s["is_classification"]).lower())
        assert all(isinstance(i["input"], str) and isinstance(i["output"], str) for i in s["instances"])


def check_judged(path, records, said):
    assert len(records) == len(records_in(path)) and not said
    for r in records:
        check_rendered(r["prompt"])
    with contextlib.redirect_stdout(io.StringIO()):
        for ids, mask in self_reward.eft_examples(records, ENC, BLOCK, random.Random(0)):
            assert len(ids) == len(mask) <= BLOCK and set(mask.tolist()) == {0, 1}


JSON_LOADERS = {"chats": (sft.load_chats, check_chats, CHATS, 360),
                "ranked": (reward.load_comparisons, check_ranked, RANKED, 420),
                "prompts": (load_prompts, check_prompts, PROMPTS, 320),
                "seeds": (self_instruct.read_seeds, check_seeds, SEEDS, 400),
                "judged": (self_reward.load_judged, check_judged, JUDGED, 300)}
TEXT_CASES, MIXTURE_CASES, TOKENIZER_CASES, DATABASE_CASES, CHECKPOINT_CASES, FOLDER_CASES = 150, 80, 150, 150, 330, 120


@pytest.mark.parametrize("name", JSON_LOADERS)
def test_any_records_load_or_are_refused(tmp_path, name):
    load, check, pool, n = JSON_LOADERS[name]
    rng, least, loaded = random.Random(name), 8 if name == "seeds" else 1, 0
    for case in range(n):
        records = [rng.choice(pool) for _ in range(rng.randint(least, least + 2))]
        for _ in range(rng.choice([0, 1, 1, 2])):
            i = rng.randrange(len(records))
            records[i] = spoil(rng, records[i])
        raw = lay_out(rng, records)
        raw = damage(rng, raw) if rng.random() < 0.3 else raw
        path = tmp_path / f"case{case}.{rng.choice(['jsonl', 'json'])}"
        if rng.random() < 0.1:
            path, raw = path.with_suffix(".jsonl.gz"), gzip.compress(raw, 1)
            raw = damage(rng, raw) if rng.random() < 0.5 else raw
        path.write_bytes(raw)
        found = attempt(load, path)
        if found:
            check(path, *found)
            loaded += 1
        path.unlink()
    assert n / 10 < loaded < n * 9 / 10   # both ends are reached, or the generator is no good


def bomb(size=200_000_000):
    z, zeros = zlib.compressobj(1, wbits=31), bytes(10_000_000)
    return b"".join(z.compress(zeros) for _ in range(size // len(zeros))) + z.flush()


def hard_files(good):
    """name -> the bytes of a file that is hard to swallow. good: a file that is read."""
    packed, rng, long = gzip.compress(good), random.Random(0), "The cow says moo. " * 56_000
    deep = {f"deep {depth} {k}": (k * depth + "0" + {"[": "]", '{"a":': "}"}[k] * depth * close).encode()
            for depth in (900, 1000, 100_000) for k in ("[", '{"a":') for close in (0, 1)}
    inside = {f"deep value {key}": good + b'\n{"%s": ' % key.encode() + b"[" * depth + b"]" * depth + b"}"
              for depth, key in ((960, "messages"), (100_000, "prompt"), (960, "output"), (100_000, "user"))}
    noise = {f"random {n}.{end}": rng.randbytes(n) for n in (1, 10, 1000, 100_000) for end in ("jsonl", "gz")}
    cut = {f"cut {n}.gz": packed[:n] for n in (0, 1, 5, 12, len(packed) // 2, len(packed) - 5, len(packed) - 1)}
    return deep | inside | noise | cut | {
        "empty": b"", "lines": b"\n\r\n \n", "list": b"[]", "object": b"{}", "null": b"null", "nan": b"NaN",
        "text": b'"<|end|>"', "bom": b"\xef\xbb\xbf", "nul": bytes(1000), "utf-16": good.decode("utf-8").encode("utf-16"),
        "latin": "é".encode("latin1"),
        "list of lists": b"[[[]]]", "digits": b"9" * 5000,
        "digits inside": b'{"prompt": %s}' % (b"9" * 5000), "spaces": b" " * 1_000_000, "one line": b"x" * 1_000_000,
        "one text": b'{"messages": "%s"}' % (b"y" * 1_000_000),
        "long key": b'{"%s": 1}' % (b"k" * 1_000_000), "many keys": json.dumps({f"key{i}": i for i in range(5000)}).encode(),
        "long answer": json.dumps({"messages": turns("q", long), "responses": ["a", "b"], "ranks": [1, 2], "prompt": "q",
                                   "chosen": long}).encode(),
        "long prompt": json.dumps({"prompt": long, "responses": ["a", "b"], "ranks": [1, 2],
                                   "verdicts": ["Score: 1", None]}).encode(),
        "twice.gz": packed + packed, "rest.gz": packed + b"rest", "zeros behind.gz": packed + bytes(100), "plain.gz": good,
        "gzip.jsonl": packed,
        "twice packed.gz": gzip.compress(packed)}


@pytest.mark.parametrize("name", JSON_LOADERS)
def test_hard_files(tmp_path, name):
    load, check, pool, _ = JSON_LOADERS[name]
    good = "\n".join(json.dumps(r) for r in pool + pool[:2]).encode()
    files = hard_files(good)
    for case, raw in files.items():
        path = tmp_path / case
        path.write_bytes(raw)
        found = attempt(load, path)
        if found:
            check(path, *found)
        path.unlink()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.gz").mkdir()
    for path in (tmp_path / "folder.jsonl", tmp_path / "folder.gz", tmp_path / "missing.jsonl",
                 tmp_path / "no" / "folder.jsonl", tmp_path / ("n" * 300)):
        if path.parent.exists():
            assert attempt(load, path) is None


def test_a_gzip_bomb_ends_soon_and_small(tmp_path):
    """200 MB in a file of 1 MB and less: no text is packed so well. sft.read_records unpacks for all loaders."""
    bombs = {"bomb.jsonl.gz": bomb(), "bomb of lines.gz": gzip.compress(b"\n" * 5_000_000, 1) * 40,
             "bomb of records.gz": gzip.compress(b'{"prompt": "Hi."}\n' * 300_000, 1) * 40}
    for case, raw in bombs.items():
        (tmp_path / case).write_bytes(raw)
        tracemalloc.start()
        try:
            assert attempt(load_prompts, tmp_path / case) is None
            assert tracemalloc.get_traced_memory()[1] < 120e6
        finally:
            tracemalloc.stop()
        (tmp_path / case).unlink()


# Texts

def text_of(train, val):
    """The text of all documents of a source."""
    ids = torch.cat(train + val)
    return ENC.decode(ids[ids != SPECIAL["<|end|>"]].tolist())


def test_any_text_loads_or_is_refused(tmp_path):
    rng, loaded = random.Random("text"), 0
    pieces = TEXTS[:9] + ["\n<|end|>\n", "\r\n<|end|>\r\n", "<|end|>", " ", "\0", "Tom went to the lake. ", "<IP> 1.2.3.4 ",
                          "5 5 5"]
    for case in range(TEXT_CASES):
        raw = "".join(rng.choices(pieces, k=rng.randint(0, 60))).encode() * rng.choice([1, 1, 3])
        raw = damage(rng, raw) if rng.random() < 0.4 else raw
        path = tmp_path / f"case{case}.txt"
        path.write_bytes(raw)
        found = attempt(lambda p: gpt.read_corpus(p, ENC, 16, 0.1), path)
        documents = attempt(clean.read_documents, path)
        words = attempt(lambda p: bpe.count_words(bpe.read_texts([p])), path)
        assert (documents is None) == (words is None)   # UTF-8, or not
        if found:
            loaded += 1
            text = raw.decode("utf-8-sig")
            kept = [t for t in re.split(r"^<\|end\|>\r?(?:\n|\Z)", text, flags=re.M) if t.strip()]
            (train, val, _), = found[0].values()
            assert text_of(train, val) == "".join(kept)
            assert [t.strip("\r\n") for t in kept] == documents[0][path]
            with time_limit():
                clean.clean(documents[0][path])
        path.unlink()
    assert TEXT_CASES / 10 < loaded < TEXT_CASES
    for raw in (b" " * 1_000_000, b"x" * 1_000_000, b"<|end|>\n" * 50_000, bytes(10_000), rng.randbytes(10_000)):
        path.write_bytes(raw)
        for load in (lambda p: gpt.read_corpus(p, ENC, 16, 0.1), clean.read_documents,
                     lambda p: bpe.count_words(bpe.read_texts([p]))):
            attempt(load, path)


def test_any_mixture_loads_or_is_refused(tmp_path):
    rng, folder = random.Random("mixture"), tmp_path / "corpus"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("Tom went to the lake.\n<|end|>\n" * 60)
    for case in range(MIXTURE_CASES):
        raw = json.dumps(spoil(rng, {"a": rng.choice([1, 0.5, *VALUES]),
                                     "b": 2}) if case % 2 else {"a": rng.choice(VALUES + TEXTS), "b": 1}).encode()
        raw = damage(rng, raw) if rng.random() < 0.3 else rng.choice([raw, b"[" * 100_000]) if rng.random() < 0.05 else raw
        (folder / "mixture.json").write_bytes(raw)
        found = attempt(lambda p: gpt.read_corpus(folder, ENC, 16, 0.1), folder / "mixture.json")
        if found:
            weights = [w for _, _, w in found[0].values()]
            assert len(weights) == 2 and all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0
    for fraction in (math.nan, 0, 1, -1, math.inf):
        assert attempt(lambda p: gpt.read_corpus(p, ENC, 16, fraction), folder / "a.txt") is None


# Tokenizers and databases

RAW = json.loads((ROOT / "data" / "tokenizer.json").read_text())
SMALL = {**RAW, "ranks": RAW["ranks"][:300]}


def check_tokenizer(enc):
    special = {enc._special_tokens[s] for s in gpt.SPECIAL}
    for text in ("Tom went to the lake. 你好 \0\x1b 17 <|end|>", "".join(map(chr, range(1, 400))), "<|user|>\r\n  ", ""):
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids) == text and not special & set(ids)
    assert len(special) == 5 and enc.n_vocab == len(enc._mergeable_ranks) + 5


def test_any_tokenizer_loads_or_is_refused(tmp_path):
    rng, loaded = random.Random("tokenizer"), 0
    patterns = ["", "a", "x*", "\\K", "(?!)", "(", "\\p{L}+", "(?s:.)", ".", "\\p{L}+|\\P{L}", "(a+)+$|[\\s\\S]", "[\n" * 40,
                "(?=a)|[\\s\\S]", "|a"]
    for case in range(TOKENIZER_CASES):
        raw, how = dict(SMALL), rng.randrange(8)
        if how == 0:
            raw = spoil(rng, raw)
        elif how == 1:
            raw["pattern"] = rng.choice(patterns)
        elif how == 2:
            raw["ranks"] = raw["ranks"] + rng.sample(raw["ranks"], 2)   # a token twice: then a special token would share an id
        elif how == 3:
            raw["ranks"] = raw["ranks"][:]
            del raw["ranks"][rng.randrange(300)]
        elif how == 4:
            raw["ranks"] = raw["ranks"] + [rng.choice(["", "!", "4", 5, None, "AAAA", "é",
                base64.b64encode(rng.randbytes(9)).decode()])]
        elif how == 5:
            raw["ranks"] = rng.sample(raw["ranks"], 300)
        content = json.dumps(raw, indent=0).encode()
        content = damage(rng, content) if how > 5 else content
        path = tmp_path / f"case{case}.json"
        path.write_bytes(content)
        found = attempt(lambda p: gpt.get_tokenizer(str(p)), path)
        if found:
            with time_limit():
                check_tokenizer(found[0])
            loaded += 1
        path.unlink()
    assert TOKENIZER_CASES / 20 < loaded < TOKENIZER_CASES
    for content in (b"", b"[" * 100_000, rng.randbytes(1000), b'{"a":' * 100_000):
        path.write_bytes(content)
        assert attempt(lambda p: gpt.get_tokenizer(str(p)), path) is None
    for name in ("n" * 5000, "a\0b", str(tmp_path), "no such name"):
        assert attempt(lambda p: gpt.get_tokenizer(name), path, called="tokenizer") is None


def test_any_database_opens_or_is_refused(tmp_path):
    rng, path, opened = random.Random("database"), tmp_path / "good.db", 0
    db = sqlite3.connect(path)
    with db:
        db.execute("CREATE TABLE shop (item TEXT PRIMARY KEY, price INTEGER)")
        db.executemany("INSERT INTO shop VALUES (?, ?)", [(f"thing {i} ü", i) for i in range(60)])
        db.execute("CREATE VIEW dear AS SELECT * FROM shop WHERE price > 10")
    db.close()
    good = path.read_bytes()
    schema = good.find(b"CREATE TABLE")
    for case in range(DATABASE_CASES):
        raw, how = good, rng.randrange(5)
        if how == 0:
            raw = good[:16] + damage(rng, good[16:])
        elif how == 1:
            raw = damage(rng, good)
        elif how == 2:
            raw = good[:rng.randrange(len(good))]
        else:   # in the schema, where names and statements stand
            raw = bytearray(good)
            for _ in range(rng.choice([1, 2, 4])):
                raw[schema - 30 + rng.randrange(160)] = rng.choice([0, 1, 10, 34, 39, 255, rng.randrange(256)])
        path = tmp_path / f"case{case}.db"
        path.write_bytes(bytes(raw))
        found = attempt(tools.open_database, path)
        if found:
            opened += 1
            for statement in ("SELECT price FROM shop WHERE item = 'thing 7 ü'", "SELECT * FROM dear",
                              "SELECT sum(price), item FROM shop", "DROP TABLE shop", "\ud800"):
                with time_limit():
                    answer = tools.run_query(found[0], statement)
                assert isinstance(answer, str) and answer.isprintable() and 0 < len(answer) <= 300
            found[0].close()
            assert path.read_bytes() == bytes(raw)
        path.unlink()
    assert DATABASE_CASES / 10 < opened < DATABASE_CASES


# Checkpoints

class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


SIZES = dict(vocab_size=305, block_size=16, n_layer=1, n_head=2, n_embd=8)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """name -> what torch.save is given: a policy and a reward model, as the scripts write them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("states")
    (folder / "text.txt").write_text("Tom went to the lake.\n<|end|>\n" * 60)
    (folder / "t.json").write_text(json.dumps(SMALL))
    model, enc = gpt.GPT(gpt.GPTConfig(**SIZES)), gpt.get_tokenizer(str(folder / "t.json"))
    base = dict(gpt=dict(SIZES, dropout=0.0, bias=True), tokenizer=str(folder / "t.json"), fingerprint=gpt.fingerprint(enc),
                seed=0)
    return {"policy": dict(base, model=model.state_dict(), data=str(folder / "text.txt"), val_fraction=0.1, mixture="",
                           val_loss=1.0),
            "reward": dict(base, model=reward.RewardModel(model).state_dict(), loss="ranking")}


def saved(state, zipped=True):
    f = io.BytesIO()
    torch.save(state, f, _use_new_zipfile_serialization=zipped)
    return f.getvalue()


def spoil_state(rng, state):
    """A checkpoint with one thing in it that does not belong there."""
    state, how = dict(state), rng.randrange(6)
    tensors = [torch.zeros(3), torch.zeros(8, 8), torch.zeros(0), torch.full((8,), math.nan), torch.zeros(8, dtype=torch.int64),
               torch.zeros(()), torch.zeros(2, 2, 2, 2)]
    odd = VALUES[:-1] + TEXTS + tensors
    if how == 0:
        state[rng.choice(list(state))] = rng.choice(odd)
    elif how == 1:
        del state[rng.choice(list(state))]
    elif how == 2:
        state["gpt"] = {**state["gpt"], rng.choice([*SIZES, "bias", "rotary", "k" * 900]): rng.choice(odd + [3, 16, 10 ** 7,
            10 ** 12, -2])}
    else:
        model = dict(state["model"])
        keys = rng.sample(list(model), rng.choice([1, 1, len(model) // 2]))
        for key in keys:
            value = model.pop(key)
            if how == 3:
                model[key] = rng.choice(odd)
            elif how == 4:
                model[rng.choice(["body." + key, key[:-1], key.upper(), 5, "k" * 900])] = value
        state["model"] = model
    return state


def test_any_checkpoint_loads_or_is_refused(tmp_path, states):
    rng, loaded, folder = random.Random("checkpoint"), 0, tmp_path / "run"
    folder.mkdir()
    for case in range(CHECKPOINT_CASES):
        state, how = states[rng.choice(["policy", "reward"])], rng.randrange(10)
        state = spoil_state(rng, state) if how < 7 else [state, *VALUES[:-1]][rng.randrange(len(VALUES))] if how == 7 else state
        raw = saved(state, zipped=rng.random() < 0.9)
        raw = damage(rng, raw) if how > 7 else raw
        path = folder / "gpt.pt"
        path.write_bytes(raw)
        if found := attempt(gpt.load_model, path):
            assert found[0][0](torch.tensor([[1, 2, 3]])).shape == (1, 3, 305)
            loaded += 1
        reader = rng.randrange(4)
        if reader == 0 and (found := attempt(reward.load_reward, path)):
            assert found[0][0].score(torch.tensor([[1, 2, 3]]), torch.tensor([3])).shape == (1,)
        if reader == 1:
            attempt(lambda p: chat.load_policy(SimpleNamespace(out=str(folder), checkpoint=""), "cpu"), path)
        if reader == 2:
            attempt(lambda p: gpt.corpus_of(p, ENC, 16), path, called=".")   # it may be the text that is wrong, or gone
        if reader == 3:
            path = path.rename(folder / "ppo.pt")
            attempt(lambda p: results.policies(folder), path)
        path.unlink()
    assert CHECKPOINT_CASES / 20 < loaded < CHECKPOINT_CASES * 0.7
    path = folder / "c.pt"
    for raw in (b"", b"PK", rng.randbytes(1000), bytes(1000), b"PK\3\4" + rng.randbytes(1000)):
        path.write_bytes(raw)
        for load in (gpt.load_checkpoint, gpt.load_model, reward.load_reward):
            assert attempt(load, path) is None
    for path in (folder, tmp_path / "missing.pt"):
        assert attempt(gpt.load_model, path) is None


def test_code_in_a_checkpoint_never_runs(tmp_path, states):
    (tmp_path / "m").mkdir()
    path, mark = tmp_path / "m" / "c.pt", tmp_path / "hacked"
    bad = Malice(str(mark))
    files = [pickle.dumps(x, protocol) for protocol in range(6) for x in (bad, {"model": bad}, [bad] * 2)]
    for state in states.values():
        changes = [dict(model=bad), dict(gpt=bad), dict(tokenizer=bad), dict(extra=bad),
                   dict(model={**state["model"], "ln_f.weight": bad}), {"model": {bad: 1}}]
        files += [saved({**state, **change}, zipped) for change in changes for zipped in (True, False)]
    for raw in files:
        for name in ("c.pt", "pytorch_model.bin"):
            (tmp_path / "m" / name).write_bytes(raw)
        (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
        for load in (gpt.load_checkpoint, gpt.load_model, reward.load_reward, lambda p: gpt.corpus_of(p, ENC, 16)):
            assert attempt(load, path) is None
        assert attempt(lambda p: gpt.GPT.from_pretrained(p.parent), path, called=str(path.parent)) is None
        assert not mark.exists()
    pickle.loads(files[0])   # it is malice indeed
    assert mark.exists()


CONFIG = dict(vocab_size=20, n_positions=8, n_layer=2, n_head=2, n_embd=8, model_type="gpt2")


def test_any_folder_of_weights_loads_or_is_refused(tmp_path):
    rng, loaded = random.Random("folder"), 0
    torch.manual_seed(0)
    gpt.GPT(gpt.GPTConfig(20, 8, 2, 2, 8)).save_pretrained(tmp_path / "good")
    weights, config = (gpt.load_checkpoint(tmp_path / "good" / "pytorch_model.bin"),
                       json.loads((tmp_path / "good" / "config.json").read_text()))
    odd = VALUES + [3, 10 ** 7, 10 ** 12, "two", -2]
    for case in range(FOLDER_CASES):
        folder, how = tmp_path / f"case{case}", rng.randrange(6)
        folder.mkdir()
        c, w = dict(config), dict(weights)
        if how == 0:
            c[rng.choice([k for k in CONFIG if k in c])] = rng.choice(odd)
        elif how == 1:
            c = spoil(rng, c)
        elif how == 2:
            w[rng.choice(list(w))] = rng.choice(VALUES[:-1] + TEXTS + [torch.zeros(3), torch.zeros(0), torch.zeros(())])
        elif how == 3:
            w = rng.choice([{k: v for k, v in w.items() if rng.random() < 0.5}, {"model": w}, list(w), {5: 5},
                            w["transformer.ln_f.bias"]])
        raw, config_raw = saved(w), json.dumps(c).encode()
        raw, config_raw = damage(rng, raw) if how == 4 else raw, damage(rng, config_raw) if how == 5 else config_raw
        (folder / "config.json").write_bytes(config_raw)
        (folder / "pytorch_model.bin").write_bytes(raw)
        if found := attempt(gpt.GPT.from_pretrained, folder, called=folder.name):
            assert found[0](torch.tensor([[1, 2, 3]])).shape == (1, 3, found[0].config.vocab_size)
            loaded += 1
        shutil.rmtree(folder)
    assert FOLDER_CASES / 20 < loaded < FOLDER_CASES
    folder.mkdir()
    for config_raw in (b"", b"[" * 100_000, b"[]", b"null", rng.randbytes(100)):
        (folder / "config.json").write_bytes(config_raw)
        assert attempt(gpt.GPT.from_pretrained, folder, called=folder.name) is None


# What this file has found, by name: each was a traceback, a message of many lines or pages, or something lost without a word

def pair(**more):
    return {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2], **more}


DEEP = b"[" * 100_000
REFUSED = {  # name -> loader, content (a record, or bytes), what the line says
    "a key of 2000 letters": (sft.load_chats, {"k" * 2000: 1}, "expected"),
    "a key of 2000 letters in rankings": (reward.load_comparisons, {"k" * 2000: 1}, "expected"),
    "scores that are texts": (reward.load_comparisons, pair(scores=["a", "b"]), "one number per response"),
    "scores that are nan": (reward.load_comparisons, pair(scores=[math.nan, 1]), "one number per response"),
    "other ranks that are null": (reward.load_comparisons, pair(ranks_other=[None, 1]), "one number per response"),
    "other ranks without end": (reward.load_comparisons, pair(ranks_other=[10 ** 400, 1]), "one number per response"),
    "ranks that differ in the ninth digit": (reward.load_comparisons, pair(ranks=[999_999_998, 999_999_999]),
        "no record with two answers"),
    "is_classification: yes": (self_instruct.read_seeds, [{**SEEDS[0], "is_classification": "yes"}] * 8, "true or false"),
    "a tokenizer with a token twice": (gpt.get_tokenizer, {**SMALL, "ranks": SMALL["ranks"] + SMALL["ranks"][5:6]}, "twice"),
    "a tokenizer without a byte": (gpt.get_tokenizer, {**SMALL, "ranks": SMALL["ranks"][1:]}, "256 bytes"),
    "a pattern that drops spaces": (gpt.get_tokenizer, {**SMALL, "pattern": r"\S+"}, "every character"),
    "a pattern of nothing": (gpt.get_tokenizer, {**SMALL, "pattern": r"x*"}, "empty text"),
    "a pattern before each a": (gpt.get_tokenizer, {**SMALL, "pattern": r"(?=a)|[\s\S]"}, "empty text"),
    "a deep tokenizer": (gpt.get_tokenizer, DEEP, "not a tokenizer file")}


@pytest.mark.parametrize("name", REFUSED)
def test_found_and_mended(tmp_path, name):
    load, content, says = REFUSED[name]
    path = tmp_path / "file.json"
    if load is not gpt.get_tokenizer and isinstance(content, dict):
        content = [content]
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert attempt(lambda p: load(str(p)), path) is None
    with pytest.raises(UserError, match=says):
        load(str(path))


def test_scores_in_pairs_are_somebody_elses_key(tmp_path):
    """README of data/: further keys are ignored. In {"chosen", "rejected"} these two are, whatever they hold."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "chosen": "yes", "rejected": "no", "scores": 0.9, "ranks_other": None,
                                "user": 3}))
    (record, ), said = attempt(reward.load_comparisons, path)
    assert not {"scores", "ranks_other"} & set(record) and record["user"] == 3 and not said
    check_ranked(path, [record], said)


@pytest.mark.parametrize("content", [b'{"a": 1%s}' % (b"0" * 400), DEEP, b'{"%s": 1}' % (b"k" * 3000)],
                         ids=["a weight of 400 digits", "deep", "a long name"])
def test_found_and_mended_in_a_mixture(tmp_path, content):
    (tmp_path / "a.txt").write_text("Tom went to the lake.\n" * 60)
    (tmp_path / "mixture.json").write_bytes(content)
    assert attempt(lambda p: gpt.read_corpus(p.parent, ENC, 16, 0.1), tmp_path / "mixture.json") is None


def test_a_validation_share_that_is_no_number(tmp_path):
    (tmp_path / "a.txt").write_text("Tom went to the lake.\n" * 60)
    assert attempt(lambda p: gpt.read_corpus(p, ENC, 16, math.nan), tmp_path / "a.txt") is None


@pytest.mark.parametrize("name", [b"\xff\xff\xff\xff", b"a\nb\r"], ids=["no UTF-8", "lines"])
def test_found_and_mended_in_a_database(tmp_path, name):
    """SQLite quotes a damaged schema in its error text, which then is no UTF-8, or no line."""
    path = tmp_path / "shop.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE shop (item TEXT, price INTEGER)")
    db.close()
    raw = path.read_bytes()
    assert raw.count(b"tableshopshop") == 1
    path.write_bytes(raw.replace(b"tableshopshop", b"table" + name + b"shop"))
    assert attempt(tools.open_database, path) is None


def test_a_table_whose_name_is_bytes(tmp_path):
    path = tmp_path / "shop.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE shop (item TEXT, price INTEGER)")
    db.execute("PRAGMA writable_schema = ON")
    db.execute("UPDATE sqlite_master SET name = ?", (b"shop", ))
    db.commit()
    db.close()
    if found := attempt(tools.open_database, path):
        assert tools.run_query(found[0], "SELECT item FROM shop").startswith("[error: ")   # it is no table of ours
        found[0].close()


@pytest.mark.parametrize("change", [dict(tokenizer=5), dict(tokenizer="n" * 5000), dict(model=[1, 2]), dict(model={5: 5}),
                                    dict(gpt=[]), dict(sizes=dict(n_layer=10 ** 9)),
                                    dict(sizes=dict(n_head=0)), dict(sizes=dict(n_head=-2)),
                                    dict(sizes=dict(vocab_size=10 ** 12)), dict(sizes=dict(n_embd=10 ** 7))],
                                    ids=lambda x: str(x)[:40])
def test_found_and_mended_in_a_checkpoint(tmp_path, states, change):
    path, state = tmp_path / "gpt.pt", {**states["policy"], **change}
    state["gpt"] = {**state["gpt"], **state.pop("sizes")} if "sizes" in state else state["gpt"]
    path.write_bytes(saved(state))
    assert attempt(gpt.load_model, path) is None


@pytest.mark.parametrize("state", [[1], 5, {}, {"model": 5}, {"data": 5, "val_fraction": 0.1, "mixture": ""},
                                   {"data": "n" * 5000, "val_fraction": 0.1, "mixture": ""}], ids=lambda x: str(x)[:40])
def test_a_checkpoint_of_somebody_else(tmp_path, state):
    path = tmp_path / "gpt.pt"
    path.write_bytes(saved(state))
    assert attempt(lambda p: gpt.corpus_of(p, ENC, 16), path) is None
    assert attempt(lambda p: [name for name, _ in results.policies(p.parent)],
                   path.rename(tmp_path / "other.pt"))[0] == []   # the table is of policies


@pytest.mark.parametrize("change", [dict(n_layer="two"), dict(n_layer=10 ** 9), dict(n_head=0), dict(n_embd=10 ** 7),
                                    dict(vocab_size=-1), DEEP, [1, 2]],
                         ids=lambda x: str(x)[:40])
def test_found_and_mended_in_a_folder_of_weights(tmp_path, change):
    folder = tmp_path / "gpt2"
    gpt.GPT(gpt.GPTConfig(20, 8, 2, 2, 8)).save_pretrained(folder)
    if isinstance(change, list):
        (folder / "pytorch_model.bin").write_bytes(saved(change))
    else:
        (folder / "config.json").write_bytes(change if change is DEEP else json.dumps({**CONFIG, **change}).encode())
    assert attempt(gpt.GPT.from_pretrained, folder, called="gpt2") is None


# Code

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}


def unsafe(source):
    """-> what in a program's text could run code that comes from a file, as (line, what)."""
    found, tree = [], ast.parse(source)
    # `eval.table` is our module eval.py; the function is never the head of an attribute.
    heads = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for n in ast.walk(tree):
        what = None
        if isinstance(n, ast.Import):
            what = next((a.name for a in n.names if a.name.split(".")[0] in UNSAFE_MODULES), None)
        elif isinstance(n, ast.ImportFrom):
            module = (n.module or "").split(".")[0]
            names = {a.name for a in n.names} & (UNSAFE_NAMES | {"load", "system", "popen"})
            what = module if module in UNSAFE_MODULES or names and module in ("torch", "os", "numpy", "builtins") else None
        elif isinstance(n, ast.Name) and n.id in UNSAFE_NAMES and id(n) not in heads:
            what = n.id
        elif isinstance(n, ast.Attribute) and ast.unparse(n) in ("os.system", "os.popen", "torch.jit.load", "torch.package",
            "builtins.eval", "builtins.exec"):
            what = ast.unparse(n)
        elif isinstance(n, ast.Attribute) and n.attr == "load" and isinstance(n.value, ast.Name) and n.value.id in ("torch",
            "np", "numpy"):
            calls = [c for c in ast.walk(tree) if isinstance(c, ast.Call) and c.func is n]
            safe = [k for c in calls for k in c.keywords if k.arg == "weights_only" and isinstance(k.value,
                ast.Constant) and k.value.value is True]
            what = None if safe or calls and n.value.id != "torch" else f"{n.value.id}.load"
        elif isinstance(n, ast.keyword) and n.arg in ("shell",
            "allow_pickle") and not (isinstance(n.value, ast.Constant) and n.value.value is False):
            what = n.arg
        elif isinstance(n, ast.Constant) and isinstance(n.value,
            str) and n.value in UNSAFE_MODULES:   # importlib.import_module("pickle")
            what = n.value
        if what:
            found.append((n.value.lineno if isinstance(n, ast.keyword) else n.lineno, what))
    return found


def test_nothing_unpickles_evaluates_or_executes():
    found = {p.name: unsafe(p.read_text(encoding="utf-8")) for folder in (ROOT, ROOT / "data",
        ROOT / "lab") for p in folder.glob("*.py")}
    assert len(found) > 15 and {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize("source", [
    "import pickle", "import os, marshal as m", "from pickle import loads", "import yaml", "from torch import load",
    "import importlib; importlib.import_module('pickle')",
    "eval('1')", "f = exec", "print(list(map(eval, x)))", "__import__('os')", "compile(x, '', 'exec')",
    "import builtins; builtins.eval(x)",
    "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=w)", "f = torch.load",
    "np.load(p, allow_pickle=True)",
    "subprocess.run(x, shell=True)", "subprocess.run(x, shell=s)", "os.system(x)", "from os import system"])
def test_unsafe_code_is_found(source):
    assert unsafe(source)


@pytest.mark.parametrize("source", ["import eval\neval.main(cfg)", "import eval as results\nresults.main(c)", "model.eval()",
                                    "torch.load(p, weights_only=True)",
                                    "re.compile(x)", "subprocess.run([x])", "json.load(f)", "np.load(p)", "shell = 1"])
def test_safe_code_is_not(source):
    assert not unsafe(source)


def test_there_are_two_thousand_cases():
    records = sum(n for _, _, _, n in JSON_LOADERS.values()) + len(JSON_LOADERS) * (len(hard_files(b"x")) + 4)
    others = (TEXT_CASES, MIXTURE_CASES, TOKENIZER_CASES, DATABASE_CASES, CHECKPOINT_CASES, FOLDER_CASES)
    assert records + sum(others) >= 2000
