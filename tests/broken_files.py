"""Good files and seeded ways to break them, for test_fuzz.py.

Every function that draws takes a random.Random, so each run of the tests sees the same files.
"""
import base64
import csv
import gzip
import io
import json
import math
import os
import random
import sqlite3
import zlib

import torch

import gpt
import reward
from data.tokenizer import fingerprint, get_tokenizer
from scaffold.run import load_checkpoint
from tiny import ROOT, assistant, chat

# Values to put where they do not belong

TEXTS = [
    "The cow says moo.",
    "",
    " ",
    "\n\n",
    "<|end|>",
    "<|user|>obey<|end|><|assistant|>",
    "<|pad|><|pad|><|pad|>",
    "{input}{output}",
    "牛👩‍👩‍👧",
    "\ud800",                                # half a surrogate pair
    "a\0b",
    "\ufeff",
    "\u2028\x85",
    "\n\nHuman: hi\n\nAssistant: hello",
    "Human:",
    "Score: 7",
    "Score: 99",
    "\x1b[31m",
    "word " * 120,
    "x" * 3000,
]
NEST = json.loads("[" * 100 + "]" * 100)
VALUES = [
    None, True, False,
    0, 1, 2, -1, 1.5, 0.1 + 0.2, 1e308, -0.0, math.nan, math.inf, -math.inf, 2 ** 63, 10 ** 400,
    999_999_999, 999_999_998,                # equal in fp32
    [], {}, [[]], [None], [1, 2], ["a", "b"], [math.nan, 1], {"a": 1},
    {"role": "user", "content": "x"},
    NEST,
]
NO_NEST = VALUES[:-1]
KEYS = [
    "messages", "instruction", "input", "output",
    "prompt", "responses", "ranks", "chosen", "rejected", "scores", "ranks_other", "verdicts",
    "instances", "is_classification", "user", "task", "ids", "role", "content",
    "", "k" * 2000, "a\nb", "\ud800",
]

# Good records: a loader keeps each of them, or leaves it out and counts it

CHATS = [
    {"messages": chat("Hi.", "Hello."), "user": "u1"},
    {"messages": chat("a", "b", "c", "d")},
    {"messages": chat("Hi.", " ")},
    {"messages": [{"role": "system", "content": "Be short."}, *chat("Hi.", "Yes.")]},
    {"instruction": "Name two.", "input": "", "output": "tea and jam."},
    {"instruction": "Which {output}?", "input": "{input} is here", "output": "none"},
    {"instruction": "Say it.", "output": ""},
    {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi."}]},
                  {"role": "assistant", "content": "Yes."}], "system": "Be short."},
    {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": None}]},
    {"messages": [*chat("Hi.", "Yes."), {"role": "tool", "content": "42"}]},
    {"prompt": "Hi.", "completion": "Hello."},
    {"prompt": chat("Hi."), "completion": [assistant("Hello.")]},
    {"question": "Who?", "context": "Tom is a baker.", "answer": "Tom."},
    {"query": "Say it.", "response": "It."},
    chat("Hi.", "a bare list"),
]
RANKED = [
    {"prompt": chat("Hi."), "responses": ["a", "b", "c"], "ranks": [2, 1, 2],
     "scores": [0.5, 1, 0.5], "ranks_other": [1, 2, 3]},
    {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2.5]},
    {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 1]},
    {"prompt": "Hi", "chosen": "yes", "rejected": "no", "scores": 0.9},
    {"prompt": chat("Hi"), "chosen": [assistant("y")], "rejected": [assistant("z")]},
    {"chosen": chat("Hi", "yes"), "rejected": chat("Hi", "no")},
    {"chosen": chat("Hi", "yes"), "rejected": chat("Ho", "no")},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
    {"prompt": "\r\n\r\nHuman: Hi\r\n\r\nAssistant:", "chosen": " yes", "rejected": " no"},
    {"instruction": "Say it.", "input": "x", "chosen": "yes", "rejected": "no"},
    {"question": "Hi", "chosen": "yes", "rejected": " "},
    {"instruction": "Say it.", "output_1": "a", "output_2": "b", "preference": 2},
    {"prompt": "Hi", "system": "Be short.", "output_1": "a", "output_2": "b", "preference": 1.5},
]
DOCUMENTS = [
    {"text": "Tom went to the lake."},
    {"text": "One.\n<|endoftext|>\nTwo.\n"},
    {"text": None, "title": "nothing"},
    {"text": "<|end|> 你好", "user": 1},
]
PROMPTS = CHATS + RANKED + [
    {"prompt": "Hi."},
    {"prompt": chat("a", "b", "c")},
    {"instruction": "Say it."},
]
SEED_TASKS = [
    {"instruction": f"Name {n} foods.", "is_classification": n % 2 == 0,
     "instances": [{"input": "x", "output": "tea"}, {"output": "jam"}]}
    for n in range(6)
]
JUDGED = [
    {"prompt": "Hi", "responses": ["a", "b"], "verdicts": ["good. Score: 9", None]},
    {"prompt": chat("Hi"), "responses": ["a"], "verdicts": ["Score: 3.5"]},
    {"prompt": chat("Hi"), "responses": ["a", "c"], "verdicts": ["Score: 1 Score: 2", "Score: 2"],
     "ranks": [1, 2]},
]


# Breaking records

def change_one_thing(rng, value):
    """Return a copy of a JSON value with one thing changed, at any depth."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(rng.choice([TEXTS, VALUES]))
    is_dict = isinstance(value, dict)
    keys = list(value) if is_dict else range(len(value))
    copy = type(value)(value)
    key = rng.choice(keys)
    how = rng.randrange(6)
    if isinstance(copy[key], (dict, list)) and rng.random() < 0.6:
        copy[key] = change_one_thing(rng, copy[key])
    elif how == 0:
        del copy[key]
    elif how == 1 and is_dict:
        moved = copy.pop(key)
        copy[rng.choice(KEYS)] = moved
    elif how == 1:
        copy.insert(key, copy[key])
    elif how == 2 and is_dict:
        added = rng.choice(VALUES)
        copy[rng.choice(KEYS)] = added
    else:
        copy[key] = change_one_thing(rng, copy[key])
    return copy


def serialize(rng, records):
    """Return records as the bytes of a file, in one of the ways that such files are written."""
    how = rng.randrange(13)
    lines = [json.dumps(r) for r in records]
    if how == 0:
        return json.dumps(records, indent=rng.choice([None, 1])).encode()
    if how == 1:
        return "".join(line + "\r\n" for line in lines).encode()
    if how == 2:
        return b"\xef\xbb\xbf" + "\n".join(lines).encode()
    if how == 3:
        raw_lines = [json.dumps(r, ensure_ascii=False) for r in records]
        return "\n".join(raw_lines).encode("utf-8", "surrogatepass")
    if how == 4:
        return "\n".join(with_every_key_twice(line) for line in lines).encode()
    if how == 5:  # two formats in one file
        return ("\n" + json.dumps(records) + "\n" + lines[0]).encode()
    if how == 6:
        return json.dumps({"version": 1, "data": records}).encode()
    if how == 7:
        return "\n".join(json.dumps(r, indent=2) for r in records).encode()
    if how == 8:
        raw_lines = [json.dumps(r, ensure_ascii=rng.random() < 0.5) for r in records]
        encoding = rng.choice(["utf-16", "utf-32", "gb18030", "utf-16-le"])
        return "\n".join(raw_lines).encode(encoding, "replace")
    return "\n".join(lines + [""] * rng.randrange(3)).encode()


def table_file(rng, records):
    """Return (file name ending, bytes) of records as CSV or TSV; a cell holds a string or JSON."""
    objects = [r for r in records if isinstance(r, dict)]
    if objects and rng.random() < 0.5:   # most files have the same columns in all rows
        objects = [r for r in objects if set(r) == set(objects[0])]
    names = list(dict.fromkeys(name for r in objects for name in r))
    ending, delimiter = rng.choice([("csv", ","), ("csv", ";"), ("tsv", "\t"), ("csv", "\t")])
    out = io.StringIO()
    quoting = rng.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
    table = csv.writer(out, delimiter=delimiter, quoting=quoting)
    table.writerow(names)
    for r in objects:
        cells = [r.get(name) for name in names]
        table.writerow([c if c is None or isinstance(c, str) else json.dumps(c) for c in cells])
    return ending, out.getvalue().encode("utf-8", "surrogatepass")


def with_every_key_twice(line):
    """{"a": 1} -> {"a": 1, "a": 1}. In JSON the last one counts."""
    if len(line) > 2 and line[0] == "{":
        return line[:-1] + ", " + line[1:]
    return line


# Breaking bytes

JUNK = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b"[", b"]", b"{", b"}",
    b'"', b"\\", b"NaN", b"Infinity", b"1e999", b"\\ud800", b"9" * 5000, b"[" * 2000, b"null",
    b"<|end|>", b"\x1b",
]


def damage(rng, raw):
    """Return bytes with one to three accidents."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        raw = accident(rng, raw)
    return raw


def accident(rng, raw):
    """Flip bits, cut, drop, repeat, insert or overwrite, at a random place."""
    start, end = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    how = rng.randrange(6)
    if how == 0 and raw:
        return flip_bits(rng, raw, rng.choice([1, 1, 8]))
    if how == 1:
        return raw[:start]
    if how == 2:
        return raw[:start] + rng.choice(JUNK) + raw[start:]
    if how == 3:
        return raw[:start] + raw[end:]
    if how == 4:
        return raw[:end] + raw[start:]
    return raw[:start] + rng.randbytes(rng.choice([1, 4, 100])) + raw[end:]


def flip_bits(rng, raw, n):
    raw = bytearray(raw)
    for _ in range(n):
        place = rng.randrange(len(raw))
        raw[place] ^= 1 << rng.randrange(8)
    return bytes(raw)


def zipped(raw, level=9):
    """gzip without the time of day, so that every run sees the same bytes."""
    return gzip.compress(raw, level, mtime=0)


# Files of records

def record_file(rng, pool, least):
    """Return (file name ending, bytes): at least `least` records, some of them changed."""
    records = [rng.choice(pool) for _ in range(rng.randint(least, least + 2))]
    for _ in range(rng.choice([0, 1, 1, 2])):
        i = rng.randrange(len(records))
        records[i] = change_one_thing(rng, records[i])
    ending, raw = rng.choice(["jsonl", "json"]), serialize(rng, records)
    if rng.random() < 0.15:
        ending, raw = table_file(rng, records)
    if rng.random() < 0.3:
        raw = damage(rng, raw)
    if rng.random() < 0.1:
        ending += ".gz"
        raw = zipped(raw, 1)
        if rng.random() < 0.5:
            raw = damage(rng, raw)
    return ending, raw


def hard_files(good):
    """Return {file name: bytes} of files that are hard to read. good: a file that loads."""
    return {
        **deep_files(good),
        **random_files(),
        **cut_files(zipped(good)),
        **odd_files(good),
        **long_files(),
        **odd_gzip_files(good),
    }


def deep_files(good):
    """Brackets nested so deep that a recursive parser fails, alone and as a value in a record."""
    files = {}
    for depth in (900, 1000, 100_000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            half = opening * depth + "0"
            files[f"deep {depth} {opening} unclosed"] = half.encode()
            files[f"deep {depth} {opening}"] = (half + closing * depth).encode()
    for key, depth in (("messages", 960), ("prompt", 100_000), ("output", 960), ("user", 100_000)):
        value = b"[" * depth + b"]" * depth
        files[f"deep value {key}"] = good + b'\n{"%s": ' % key.encode() + value + b"}"
    return files


def random_files():
    rng = random.Random(0)
    files = {}
    for n in (1, 10, 1000, 100_000):
        for ending in ("jsonl", "gz"):
            files[f"random {n}.{ending}"] = rng.randbytes(n)
    return files


def cut_files(packed):
    """The beginning of a gzip file, up to one byte less than the whole."""
    size = len(packed)
    lengths = (0, 1, 5, 12, size // 2, size - 5, size - 1)
    return {f"cut {n}.gz": packed[:n] for n in lengths}


def odd_files(good):
    return {
        "empty": b"",
        "lines": b"\n\r\n \n",
        "list": b"[]",
        "object": b"{}",
        "null": b"null",
        "nan": b"NaN",
        "text": b'"<|end|>"',
        "bom": b"\xef\xbb\xbf",
        "nul": bytes(1000),
        "utf-16": good.decode("utf-8").encode("utf-16"),
        "latin": "é".encode("latin1"),
        "list of lists": b"[[[]]]",
        "digits": b"9" * 5000,
        "digits inside": b'{"prompt": %s}' % (b"9" * 5000),
    }


def long_files():
    long = "The cow says moo. " * 56_000
    ranked = {"responses": ["a", "b"], "ranks": [1, 2]}
    long_response = {"messages": chat("q", long), **ranked, "prompt": "q", "chosen": long}
    long_prompt = {"prompt": long, **ranked, "verdicts": ["Score: 1", None]}
    return {
        "spaces": b" " * 1_000_000,
        "one line": b"x" * 1_000_000,
        "one text": b'{"messages": "%s"}' % (b"y" * 1_000_000),
        "long key": b'{"%s": 1}' % (b"k" * 1_000_000),
        "many keys": json.dumps({f"key{i}": i for i in range(5000)}).encode(),
        "long response": json.dumps(long_response).encode(),
        "long prompt": json.dumps(long_prompt).encode(),
    }


def odd_gzip_files(good):
    packed = zipped(good)
    return {
        "twice.gz": packed + packed,
        "rest.gz": packed + b"rest",
        "zeros behind.gz": packed + bytes(100),
        "plain.gz": good,
        "gzip.jsonl": packed,
        "twice packed.gz": zipped(packed),
    }


def gzip_bombs():
    """Return {file name: bytes}: about 200 MB in at most 1 MB. No text compresses so well."""
    deflate = zlib.compressobj(1, wbits=31)
    zeros = bytes(10_000_000)
    blocks = [deflate.compress(zeros) for _ in range(20)]
    return {
        "bomb.jsonl.gz": b"".join(blocks) + deflate.flush(),
        "bomb of lines.gz": zipped(b"\n" * 5_000_000, 1) * 40,
        "bomb of records.gz": zipped(b'{"prompt": "Hi."}\n' * 300_000, 1) * 40,
    }


# Texts and mixtures

TEXT_PIECES = TEXTS[:9] + [
    "\n<|end|>\n",
    "\r\n<|end|>\r\n",
    "\n<|endoftext|>\n",
    "<|end|>",
    " ",
    "\0",
    "Tom went to the lake. ",
    "<IP> 1.2.3.4 ",
    "5 5 5",
]


def text_file(rng):
    pieces = rng.choices(TEXT_PIECES, k=rng.randint(0, 60))
    raw = "".join(pieces).encode() * rng.choice([1, 1, 3])
    if rng.random() < 0.4:
        raw = damage(rng, raw)
    return raw


def mixture_file(rng, case):
    """Return the bytes of a mixture.json for the sources a and b."""
    if case % 2:
        weights = change_one_thing(rng, {"a": rng.choice([1, 0.5, *VALUES]), "b": 2})
    else:
        weights = {"a": rng.choice(VALUES + TEXTS), "b": 1}
    raw = json.dumps(weights).encode()
    if rng.random() < 0.3:
        return damage(rng, raw)
    if rng.random() < 0.05:
        return rng.choice([raw, b"[" * 100_000])
    return raw


# Tokenizers

BUILT_IN = json.loads((ROOT / "data" / "tokenizer.json").read_text())
SMALL_TOKENIZER = {**BUILT_IN, "ranks": BUILT_IN["ranks"][:300]}
PATTERNS = [
    "", "a", "x*", "\\K", "(?!)", "(", "\\p{L}+", "(?s:.)", ".", "\\p{L}+|\\P{L}",
    "(a+)+$|[\\s\\S]", "[\n" * 40, "(?=a)|[\\s\\S]", "|a",
]


def tokenizer_file(rng):
    raw = dict(SMALL_TOKENIZER)
    ranks = list(raw["ranks"])
    how = rng.randrange(8)
    if how == 0:
        raw = change_one_thing(rng, raw)
    elif how == 1:
        raw["pattern"] = rng.choice(PATTERNS)
    elif how == 2:  # a token twice: then a special token would share an id
        raw["ranks"] = ranks + rng.sample(ranks, 2)
    elif how == 3:
        del ranks[rng.randrange(300)]
        raw["ranks"] = ranks
    elif how == 4:
        new = base64.b64encode(rng.randbytes(9)).decode()
        raw["ranks"] = ranks + [rng.choice(["", "!", "4", 5, None, "AAAA", "é", new])]
    elif how == 5:
        raw["ranks"] = rng.sample(ranks, 300)
    content = json.dumps(raw, indent=0).encode()
    if how > 5:
        content = damage(rng, content)
    return content


# Databases

def good_database(path):
    """Write a database with two tables and an index, and return its bytes."""
    db = sqlite3.connect(path)
    with db:
        db.execute("CREATE TABLE shop (item TEXT PRIMARY KEY, price INTEGER)")
        rows = [(f"thing {i} ü", i) for i in range(60)]
        db.executemany("INSERT INTO shop VALUES (?, ?)", rows)
        db.execute("CREATE TABLE dear AS SELECT * FROM shop WHERE price > 10")
        db.execute("CREATE INDEX cheap ON shop (item) WHERE price < 10")
    db.close()
    return path.read_bytes()


def database_file(rng, good):
    how = rng.randrange(5)
    if how == 0:  # behind the file's magic string
        return good[:16] + damage(rng, good[16:])
    if how == 1:
        return damage(rng, good)
    if how == 2:
        return good[:rng.randrange(len(good))]
    return damage_schema(rng, good)


def damage_schema(rng, good):
    """Overwrite bytes where the names and the statements of the tables are."""
    raw = bytearray(good)
    start = good.find(b"CREATE TABLE") - 30
    for _ in range(rng.choice([1, 2, 4])):
        byte = rng.choice([0, 1, 10, 34, 39, 255, rng.randrange(256)])
        raw[start + rng.randrange(160)] = byte
    return bytes(raw)


# Checkpoints

SIZES = dict(vocab_size=305, block_size=16, n_layer=1, n_head=2, n_embd=8)


class Malice:
    """An object whose unpickling creates a folder at `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def good_states(folder):
    """Return the checkpoints of a policy and of a reward model, as the scripts save them.

    The text and the tokenizer that they name are in `folder`.
    """
    torch.manual_seed(0)
    (folder / "text.txt").write_text("Tom went to the lake.\n<|end|>\n" * 60)
    tokenizer = folder / "t.json"
    tokenizer.write_text(json.dumps(SMALL_TOKENIZER))
    model = gpt.GPT(gpt.GPTConfig(**SIZES))
    common = dict(
        gpt=dict(SIZES, dropout=0.0, bias=True),
        tokenizer=str(tokenizer),
        fingerprint=fingerprint(get_tokenizer(str(tokenizer))),
        seed=0,
    )
    policy = dict(
        common,
        model=model.state_dict(),
        data=str(folder / "text.txt"),
        val_fraction=0.1,
        mixture="",
        val_loss=1.0,
    )
    reward_model = dict(common, model=reward.RewardModel(model).state_dict(), loss="ranking")
    return {"policy": policy, "reward": reward_model}


def saved(state, new_format=True):
    """Return the bytes that torch.save writes, in the zip format or in the one before it."""
    f = io.BytesIO()
    torch.save(state, f, _use_new_zipfile_serialization=new_format)
    return f.getvalue()


def change_state(rng, state):
    """Return a copy of a checkpoint with one entry, one size or one or more tensors changed."""
    state = dict(state)
    how = rng.randrange(6)
    tensors = [
        torch.zeros(3),
        torch.zeros(8, 8),
        torch.zeros(0),
        torch.full((8,), math.nan),
        torch.zeros(8, dtype=torch.int64),
        torch.zeros(()),
        torch.zeros(2, 2, 2, 2),
    ]
    wrong = NO_NEST + TEXTS + tensors
    if how == 0:
        value = rng.choice(wrong)
        state[rng.choice(list(state))] = value
    elif how == 1:
        del state[rng.choice(list(state))]
    elif how == 2:
        size = rng.choice([*SIZES, "bias", "rotary", "k" * 900])
        value = rng.choice(wrong + [3, 16, 10 ** 7, 10 ** 12, -2])
        state["gpt"] = {**state["gpt"], size: value}
    else:
        action = {3: "replace", 4: "rename", 5: "drop"}[how]
        state["model"] = change_weights(rng, state["model"], action, wrong)
    return state


def change_weights(rng, weights, action, wrong):
    """Replace, rename or drop one tensor, or half of them."""
    weights = dict(weights)
    for key in rng.sample(list(weights), rng.choice([1, 1, len(weights) // 2])):
        value = weights.pop(key)
        if action == "replace":
            weights[key] = rng.choice(wrong)
        elif action == "rename":
            new_key = rng.choice(["body." + key, key[:-1], key.upper(), 5, "k" * 900])
            weights[new_key] = value
    return weights


def checkpoint_file(rng, states):
    state = states[rng.choice(["policy", "reward"])]
    how = rng.randrange(10)
    if how < 7:
        state = change_state(rng, state)
    elif how == 7:
        state = rng.choice([state, *NO_NEST])
    raw = saved(state, new_format=rng.random() < 0.9)
    if how > 7:
        raw = damage(rng, raw)
    return raw


# Folders of weights in Hugging Face's layout

FOLDER_SIZES = (20, 8, 2, 2, 8)  # vocabulary, context, layers, heads, channels
CONFIG = dict(
    vocab_size=20, n_positions=8, n_layer=2, n_head=2, n_embd=8, model_type="gpt2"
)


def good_folder(folder):
    """Save a small GPT and return its (config, weights), the contents of the folder."""
    torch.manual_seed(0)
    gpt.GPT(gpt.GPTConfig(*FOLDER_SIZES)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return config, load_checkpoint(folder / "pytorch_model.bin")


def weights_files(rng, config, weights):
    """Return the bytes of config.json and of pytorch_model.bin; at most one of them is broken."""
    config = dict(config)
    weights = dict(weights)
    how = rng.randrange(6)
    if how == 0:
        value = rng.choice(VALUES + [3, 10 ** 7, 10 ** 12, "two", -2])
        config[rng.choice([k for k in CONFIG if k in config])] = value
    elif how == 1:
        config = change_one_thing(rng, config)
    elif how == 2:
        tensors = [torch.zeros(3), torch.zeros(0), torch.zeros(())]
        value = rng.choice(NO_NEST + TEXTS + tensors)
        weights[rng.choice(list(weights))] = value
    elif how == 3:
        half = {k: v for k, v in weights.items() if rng.random() < 0.5}
        one_tensor = weights["transformer.ln_f.bias"]
        weights = rng.choice([half, {"model": weights}, list(weights), {5: 5}, one_tensor])
    raw_weights = saved(weights)
    raw_config = json.dumps(config).encode()
    if how == 4:
        raw_weights = damage(rng, raw_weights)
    if how == 5:
        raw_config = damage(rng, raw_config)
    return raw_config, raw_weights
