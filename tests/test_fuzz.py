"""Any file, however broken, loads into valid records or is refused with one line that names it.

A case is a good file with something wrong in it; broken_files.py makes them from seeds. A case
fails if the loader
- raises anything but a UserError, or a message that is not one short line with the file's name,
- does not end within seconds, or leaves a file behind,
- succeeds and breaks what its docstring promises: special tokens in user text stay text, masks
  fit, ranks are finite, and what is left out is counted and printed.
"""
import contextlib
import io
import json
import math
import pickle
import random
import re
import shutil
import signal
import sqlite3
import tracemalloc
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

import pytest
import tiktoken
import torch

import broken_files
import chat
import dpo
import gpt
import reward
import self_reward
import sft
import tools
from broken_files import CONFIG, FOLDER_SIZES, SEED_TASKS, SMALL_TOKENIZER, Malice, saved
from data import bpe, clean, text, tokenizer
from data.checkpoint import policies
from data.chats import check_messages
from data.formats import load_chats, load_comparisons, load_prompts, load_seed_tasks, split_by_user
from data.rankings import report, targets, tokenize
from data.records import kind_of, read_records
from data.tokenizer import token_bytes
from data.verdicts import load_judged
from scaffold.cli import UserError
from scaffold.run import load_checkpoint
from tiny import ENC, SPECIAL, join_pieces

BLOCK = 96       # tokens of a context
NEW_TOKENS = 16  # room for a response
SECONDS = 20     # for one case; most take milliseconds, but the machine may be busy
N_CASES = dict(text=150, mixture=80, tokenizer=150, database=150, checkpoint=330, folder=120)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A tokenizer name that is not a file must not be looked up on the network."""
    def unknown(name):
        raise ValueError("unknown encoding")

    monkeypatch.setattr(tiktoken, "get_encoding", unknown)


# The property

class Loaded(NamedTuple):
    result: Any
    printed: str


def attempt(load, path, name=None):
    """Return load(path) and what it printed, or None if it refused the file properly.

    name: what the message must contain instead of the file's name.
    """
    before = file_sizes(path.parent)
    out = io.StringIO()
    try:
        with time_limit(), contextlib.redirect_stdout(out):
            return Loaded(load(path), out.getvalue())
    except UserError as e:
        check_message(str(e), path, name)
    finally:
        assert file_sizes(path.parent) == before


def check_message(message, path, name):
    short = message.replace(str(path.parent), "")
    assert len(short) > 0, message
    assert len(short) <= 400, message[:2000]
    assert len(message.splitlines()) == 1, message[:2000]
    assert (name or path.name) in message, message


def file_sizes(folder):
    return {p: p.stat().st_size for p in folder.rglob("*")}


class Hang(BaseException):
    """Not an Exception, so that no loader can take it for a damaged file."""


@contextlib.contextmanager
def time_limit():
    def stop(*_):
        raise Hang(f"more than {SECONDS} seconds")

    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def silently():
    return contextlib.redirect_stdout(io.StringIO())


# Records: what each loader promises

def records_in(path):
    return [record for _, record in read_records(path)]


def check_count(path, kept, printed):
    """Every record of the file is kept, or counted in the printed lines."""
    n_records = len(records_in(path))
    n_skipped, totals = skipped(printed)
    assert kept + n_skipped == n_records
    assert totals <= {n_records}


def skipped(printed):
    """Return how many records or prompts were skipped, and the totals that the lines name."""
    counts = re.findall(r"\b(\d+) of (\d+) (?:records|prompts) skipped", printed)
    return sum(int(n) for n, _ in counts), {int(total) for _, total in counts}


def check_rendered(messages):
    """Special tokens mark the turns. No content can spell one."""
    check_messages(messages)
    ids, mask = sft.render(messages, ENC)
    assert len(ids) == len(mask)
    assert set(mask) <= {0, 1}
    roles = [SPECIAL[f"<|{m['role']}|>"] for m in messages]
    want = [token for role in roles for token in (role, SPECIAL["<|end|>"])]
    assert [t for t in ids if t in SPECIAL.values()] == want
    turns = [f"<|{m['role']}|>{whole(m['content'])}<|end|>" for m in messages]
    assert ENC.decode(ids) == "".join(turns)


def whole(string):
    """Replace halves of surrogate pairs, which UTF-8 cannot encode, as tiktoken does."""
    return string.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_masked(ids, mask):
    assert len(ids) == len(mask)
    assert len(ids) <= BLOCK
    assert mask.any()
    assert ((mask == 0) | (mask == 1)).all()


def check_chats(path, chats, printed):
    check_count(path, len(chats), printed)
    for c in chats:
        check_rendered(c["messages"])
    with silently():
        try:
            for ids, mask in sft.tokenize(chats, ENC, BLOCK):
                check_masked(ids, mask)
        except UserError as e:
            assert "block-size" in str(e)
        train, val = split_by_user(chats)
    assert train
    assert val


def check_comparisons(path, records, printed):
    check_count(path, len(records), printed)
    for r in records:
        check_rendered(r["prompt"])
        assert len(r["ranks"]) == len(r["responses"])
        assert len(r["ranks"]) >= 2
        assert len(set(r["responses"])) > 1
        ranks = reward.rank_tensor([r["ranks"]])
        assert ranks.isfinite().all()
        assert (ranks >= 1).all()
        assert reward.pair_mask(ranks).any()
    with silently():
        try:
            comparisons = tokenize(records, sft.render_prompt, ENC, BLOCK)
        except UserError as e:
            assert "no comparison fits the context" in str(e)
            return
        _, pairs = dpo.flatten(comparisons, "all", random.Random(0))
        assert len(pairs) == len(comparisons)
        for c in comparisons:
            assert len(c.rows) == len(c.record["ranks"])
            assert all(c.start < len(ids) for ids in c.rows)
            assert all(len(ids) <= BLOCK for ids in c.rows)
            assert targets(c.record).isfinite().all()
        scores = [[0.0] * len(c.rows) for c in comparisons]
        report("fuzz", comparisons, scores, {}, None)


def check_prompts(path, prompts, printed):
    check_count(path, len(prompts), printed)
    for p in prompts:
        check_rendered(p["prompt"])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        fitting = sft.fit_prompts(prompts, ENC, BLOCK - NEW_TOKENS)
    n_skipped, totals = skipped(out.getvalue())
    assert len(fitting) + n_skipped == len(prompts)
    assert totals <= {len(prompts)}
    for p in fitting:
        assert p["ids"] == sft.render_prompt(p["prompt"], ENC)
        assert len(p["ids"]) + NEW_TOKENS <= BLOCK


def check_seed_tasks(path, tasks, printed):
    records = records_in(path)
    assert len(tasks) == len(records)
    assert len(tasks) >= 8
    assert not printed
    for task, record in zip(tasks, records):
        assert isinstance(task["instruction"], str)
        is_classification = task["is_classification"]
        assert isinstance(is_classification, bool)
        spellings = (is_classification, str(is_classification), str(is_classification).lower())
        assert record.get("is_classification", False) in spellings
        assert len(task["instances"]) == len(record["instances"])
        for instance in task["instances"]:
            assert isinstance(instance["input"], str)
            assert isinstance(instance["output"], str)


def check_judged(path, records, printed):
    assert len(records) == len(records_in(path))
    assert not printed
    for r in records:
        check_rendered(r["prompt"])
    with silently():
        for ids, mask in self_reward.eft_examples(records, ENC, BLOCK, random.Random(0)):
            assert len(ids) == len(mask)
            assert len(ids) <= BLOCK
            assert set(mask.tolist()) == {0, 1}


def check_documents(path, documents, printed):
    if kind_of(path) not in (".jsonl", ".json", ".csv", ".tsv"):   # a text
        return
    texts = [record.get("text") for record in records_in(path)]
    with_text = [text for text in texts if text]
    n_skipped, _ = skipped(printed)
    assert len(with_text) + n_skipped == len(texts)
    for document in documents:
        assert document.strip()
        assert any(document in text for text in with_text)


class Loader(NamedTuple):
    load: Callable    # path -> records
    check: Callable   # (path, records, printed): asserts what the loader promises
    pool: list        # good records
    cases: int
    least: int = 1    # records in a file


LOADERS = {
    "chats": Loader(load_chats, check_chats, broken_files.CHATS, 900),
    "ranked": Loader(load_comparisons, check_comparisons, broken_files.RANKED, 900),
    "prompts": Loader(load_prompts, check_prompts, broken_files.PROMPTS, 800),
    "documents": Loader(text.read_documents, check_documents, broken_files.DOCUMENTS, 300),
    "seeds": Loader(load_seed_tasks, check_seed_tasks, SEED_TASKS, 400, least=8),
    "judged": Loader(load_judged, check_judged, broken_files.JUDGED, 300),
}


@pytest.mark.parametrize("name", LOADERS)
def test_any_records_load_or_are_refused(tmp_path, name):
    loader = LOADERS[name]
    rng = random.Random(name)
    n_loaded = 0
    for case in range(loader.cases):
        ending, raw = broken_files.record_file(rng, loader.pool, loader.least)
        path = tmp_path / f"case{case}.{ending}"
        path.write_bytes(raw)
        loaded = attempt(loader.load, path)
        if loaded:
            loader.check(path, *loaded)
            n_loaded += 1
        path.unlink()
    # The cases must reach both ends, or they test little.
    assert n_loaded > loader.cases / 10
    assert n_loaded < loader.cases * 9 / 10


@pytest.mark.parametrize("name", LOADERS)
def test_hard_files_load_or_are_refused(tmp_path, name):
    loader = LOADERS[name]
    good = "\n".join(json.dumps(r) for r in loader.pool + loader.pool[:2]).encode()
    for file_name, raw in broken_files.hard_files(good).items():
        path = tmp_path / file_name
        path.write_bytes(raw)
        loaded = attempt(loader.load, path)
        if loaded:
            loader.check(path, *loaded)
        path.unlink()


@pytest.mark.parametrize("name", LOADERS)
def test_a_path_that_is_no_file_is_refused(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.gz").mkdir()
    for file_name in ("folder.jsonl", "folder.gz", "missing.jsonl", "no/folder.jsonl", "n" * 300):
        assert attempt(LOADERS[name].load, tmp_path / file_name) is None


def test_a_gzip_bomb_ends_soon_and_small(tmp_path):
    """All loaders unpack with the same function, so one of them will do."""
    for name, raw in broken_files.gzip_bombs().items():
        path = tmp_path / name
        path.write_bytes(raw)
        tracemalloc.start()
        try:
            assert attempt(load_prompts, path) is None
            assert tracemalloc.get_traced_memory()[1] < 120e6
        finally:
            tracemalloc.stop()
        path.unlink()


# Texts

def read_corpus(path, val_fraction=0.1):
    return text.read_corpus(path, ENC, 16, val_fraction)


def count_words(path):
    return bpe.count_words(bpe.read_texts([path]))


def text_of(source):
    ids = join_pieces(source.train) + torch.cat(source.val).tolist()
    return ENC.decode([i for i in ids if i != SPECIAL["<|end|>"]])


def test_any_text_loads_or_is_refused(tmp_path):
    rng = random.Random("text")
    n_loaded = 0
    for case in range(N_CASES["text"]):
        raw = broken_files.text_file(rng)
        path = tmp_path / f"case{case}.txt"
        path.write_bytes(raw)
        corpus = attempt(read_corpus, path)
        documents = attempt(clean.read_sources, path)
        words = attempt(count_words, path)
        # These two refuse a file for one reason alone: it is not UTF-8.
        assert (documents is None) == (words is None)
        if corpus:
            n_loaded += 1
            string = raw.decode("utf-8-sig")
            pieces = re.split(r"^<\|(?:end|endoftext)\|>\r?(?:\n|\Z)", string, flags=re.M)
            kept = [p for p in pieces if p.strip()]
            [source] = corpus.result.values()
            assert text_of(source) == "".join(kept)
            assert documents.result[path.stem] == [p.strip("\r\n") for p in kept]
            with time_limit():
                clean.clean(documents.result[path.stem])
        path.unlink()
    assert n_loaded > N_CASES["text"] / 10
    assert n_loaded < N_CASES["text"]
    spaces = b" " * 1_000_000
    one_line = b"x" * 1_000_000
    ends = b"<|end|>\n" * 50_000
    for raw in (spaces, one_line, ends, bytes(10_000), rng.randbytes(10_000)):
        path.write_bytes(raw)
        for load in (read_corpus, clean.read_sources, count_words):
            attempt(load, path)


def test_any_mixture_loads_or_is_refused(tmp_path):
    rng = random.Random("mixture")
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("Tom went to the lake.\n<|end|>\n" * 60)
    path = folder / "mixture.json"
    for case in range(N_CASES["mixture"]):
        path.write_bytes(broken_files.mixture_file(rng, case))
        loaded = attempt(lambda p: read_corpus(p.parent), path)
        if loaded:
            weights = [source.weight for source in loaded.result.values()]
            assert len(weights) == 2
            assert all(math.isfinite(w) for w in weights)
            assert all(w >= 0 for w in weights)
            assert sum(weights) > 0


@pytest.mark.parametrize("fraction", [math.nan, 0, 1, -1, math.inf])
def test_a_validation_share_outside_0_1_is_refused(tmp_path, fraction):
    path = tmp_path / "a.txt"
    path.write_text("Tom went to the lake.\n<|end|>\n" * 60)
    assert attempt(lambda p: read_corpus(p, fraction), path) is None


# Tokenizers and databases

def get_tokenizer(path):
    return tokenizer.get_tokenizer(str(path))


def check_tokenizer(enc):
    special = {enc.encode_single_token(name) for name in SPECIAL}
    mixed = "Tom went to the lake. 你好 \0\x1b 17 <|end|>"
    first_characters = "".join(map(chr, range(1, 400)))
    for string in (mixed, first_characters, "<|user|>\r\n  ", ""):
        ids = enc.encode_ordinary(string)
        assert enc.decode(ids) == string
        assert not special & set(ids)
    assert special == set(range(enc.n_vocab - 5, enc.n_vocab))
    ordinary = token_bytes(enc)[:-5]
    assert len(ordinary) == enc.n_vocab - 5
    assert len(set(ordinary)) == enc.n_vocab - 5


def test_any_tokenizer_loads_or_is_refused(tmp_path):
    rng = random.Random("tokenizer")
    n_loaded = 0
    for case in range(N_CASES["tokenizer"]):
        path = tmp_path / f"case{case}.json"
        path.write_bytes(broken_files.tokenizer_file(rng))
        loaded = attempt(get_tokenizer, path)
        if loaded:
            with time_limit():
                check_tokenizer(loaded.result)
            n_loaded += 1
        path.unlink()
    assert n_loaded > N_CASES["tokenizer"] / 20
    assert n_loaded < N_CASES["tokenizer"]
    for content in (b"", b"[" * 100_000, rng.randbytes(1000), b'{"a":' * 100_000):
        path.write_bytes(content)
        assert attempt(get_tokenizer, path) is None


@pytest.mark.parametrize("name", [
    pytest.param("n" * 5000, id="5000 letters"),
    pytest.param("a\0b", id="a NUL"),
    pytest.param(".", id="a folder"),
    pytest.param("no such name", id="unknown"),
])
def test_a_tokenizer_name_that_is_no_file_is_refused(tmp_path, name):
    unused = tmp_path / "unused"
    refused = attempt(lambda _: tokenizer.get_tokenizer(name), unused, name="tokenizer")
    assert refused is None


def test_any_database_opens_or_is_refused(tmp_path):
    rng = random.Random("database")
    good = broken_files.good_database(tmp_path / "good.db")
    n_opened = 0
    for case in range(N_CASES["database"]):
        raw = broken_files.database_file(rng, good)
        path = tmp_path / f"case{case}.db"
        path.write_bytes(raw)
        loaded = attempt(tools.open_database, path)
        if loaded:
            n_opened += 1
            check_queries(loaded.result)
            loaded.result.close()
            assert path.read_bytes() == raw
        path.unlink()
    assert n_opened > N_CASES["database"] / 10
    assert n_opened < N_CASES["database"]


def check_queries(db):
    """Any query ends in one short printable line."""
    for statement in (
        "SELECT price FROM shop WHERE item = 'thing 7 ü'",
        "SELECT * FROM dear",
        "SELECT sum(price), item FROM shop",
        "DROP TABLE shop",
        "\ud800",
    ):
        with time_limit():
            response = tools.run_query(db, statement)
        assert isinstance(response, str)
        assert response.isprintable()
        assert len(response) > 0
        assert len(response) <= 300


# Checkpoints

THREE_TOKENS = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    return broken_files.good_states(tmp_path_factory.mktemp("states"))


def checkpoint_text(path):
    return text.checkpoint_text(path, ENC, 16)


def chat_with(path):
    return chat.load_policy(SimpleNamespace(out=str(path.parent), checkpoint=""), "cpu")


def test_any_checkpoint_loads_or_is_refused(tmp_path, states):
    rng = random.Random("checkpoint")
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "gpt.pt"
    n_loaded = 0
    for _ in range(N_CASES["checkpoint"]):
        path.write_bytes(broken_files.checkpoint_file(rng, states))
        loaded = attempt(gpt.load_model, path)
        if loaded:
            model = loaded.result[0]
            assert model(THREE_TOKENS).shape == (1, 3, 305)
            n_loaded += 1
        read_with_another_script(rng.randrange(4), path)
        path.unlink()
    assert n_loaded > N_CASES["checkpoint"] / 20
    assert n_loaded < N_CASES["checkpoint"] * 0.7


def read_with_another_script(n, path):
    if n == 0:
        loaded = attempt(reward.load_reward, path)
        if loaded:
            model = loaded.result[0]
            assert model.score(THREE_TOKENS, torch.tensor([3])).shape == (1,)
    elif n == 1:
        attempt(chat_with, path)
    elif n == 2:
        attempt(checkpoint_text, path, name=".")  # the text may be what is wrong or missing
    else:
        path.rename(path.with_name("ppo.pt"))
        attempt(lambda p: policies(p.parent), path.with_name("ppo.pt"))
        path.with_name("ppo.pt").rename(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    rng = random.Random("no checkpoint")
    path = tmp_path / "c.pt"
    for raw in (b"", b"PK", rng.randbytes(1000), bytes(1000), b"PK\3\4" + rng.randbytes(1000)):
        path.write_bytes(raw)
        for load in (load_checkpoint, gpt.load_model, reward.load_reward):
            assert attempt(load, path) is None
    for path in (tmp_path, tmp_path / "missing.pt"):
        assert attempt(gpt.load_model, path) is None


def test_code_in_a_checkpoint_never_runs(tmp_path, states):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    mark = tmp_path / "hacked"
    files = malicious_files(Malice(str(mark)), states)
    for raw in files:
        for name in ("c.pt", "pytorch_model.bin"):
            (folder / name).write_bytes(raw)
        for load in (load_checkpoint, gpt.load_model, reward.load_reward, checkpoint_text):
            assert attempt(load, folder / "c.pt") is None
        assert attempt(gpt.GPT.from_pretrained, folder, name=str(folder)) is None
        assert not mark.exists()
    pickle.loads(files[0])  # the files do run code if they are unpickled
    assert mark.exists()


def malicious_files(malice, states):
    """Pickles of every protocol, and checkpoints in both formats, that contain the object."""
    files = []
    for protocol in range(6):
        for content in (malice, {"model": malice}, [malice, malice]):
            files.append(pickle.dumps(content, protocol))
    for state in states.values():
        for change in (
            dict(model=malice),
            dict(gpt=malice),
            dict(tokenizer=malice),
            dict(extra=malice),
            dict(model={**state["model"], "ln_f.weight": malice}),
            dict(model={malice: 1}),
        ):
            files.append(saved({**state, **change}))
            files.append(saved({**state, **change}, new_format=False))
    return files


def test_any_folder_of_weights_loads_or_is_refused(tmp_path):
    rng = random.Random("folder")
    config, weights = broken_files.good_folder(tmp_path / "good")
    n_loaded = 0
    for case in range(N_CASES["folder"]):
        raw_config, raw_weights = broken_files.weights_files(rng, config, weights)
        folder = tmp_path / f"case{case}"
        folder.mkdir()
        (folder / "config.json").write_bytes(raw_config)
        (folder / "pytorch_model.bin").write_bytes(raw_weights)
        loaded = attempt(gpt.GPT.from_pretrained, folder, name=folder.name)
        if loaded:
            model = loaded.result
            assert model(THREE_TOKENS).shape == (1, 3, model.config.vocab_size)
            n_loaded += 1
        shutil.rmtree(folder)
    assert n_loaded > N_CASES["folder"] / 40  # most changes of config.json make another model
    assert n_loaded < N_CASES["folder"]
    folder.mkdir()
    for raw_config in (b"", b"[" * 100_000, b"[]", b"null", rng.randbytes(100)):
        (folder / "config.json").write_bytes(raw_config)
        assert attempt(gpt.GPT.from_pretrained, folder, name=folder.name) is None


def test_there_are_two_thousand_cases():
    n_files = len(broken_files.hard_files(b"x")) + 5  # and five paths that are no files
    n_records = sum(loader.cases + n_files for loader in LOADERS.values())
    assert n_records + sum(N_CASES.values()) >= 2000


# What this file has found. Each case was a traceback, a message of many lines or pages, or
# something lost without notice.

DEEP = b"[" * 100_000


def pair(**more):
    return {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2], **more}


def write_json(path, content):
    """Write bytes as they are, and anything else as JSON."""
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    path.write_bytes(content)


@pytest.mark.parametrize("load, record, message", [
    pytest.param(load_chats, {"k" * 2000: 1}, "expected", id="a key of 2000 letters"),
    pytest.param(
        load_comparisons, {"k" * 2000: 1}, "expected",
        id="a key of 2000 letters in rankings",
    ),
    pytest.param(
        load_comparisons, pair(scores=["a", "b"]), "one number per response",
        id="scores that are strings",
    ),
    pytest.param(
        load_comparisons, pair(scores=[math.nan, 1]), "one number per response",
        id="scores that are nan",
    ),
    pytest.param(
        load_comparisons, pair(ranks_other=[None, 1]), "one number per response",
        id="other ranks that are null",
    ),
    pytest.param(
        load_comparisons, pair(ranks_other=[10 ** 400, 1]), "one number per response",
        id="other ranks of 400 digits",
    ),
    pytest.param(
        load_comparisons, pair(ranks=[999_999_998, 999_999_999]),
        "no record has two responses",
        id="ranks that differ in the ninth digit",
    ),
])
def test_records_mishandled_before_are_refused(tmp_path, load, record, message):
    path = tmp_path / "file.json"
    write_json(path, [record])
    assert attempt(load, path) is None
    with pytest.raises(UserError, match=message):
        load(path)


def test_is_classification_yes_is_refused(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, [{**SEED_TASKS[0], "is_classification": "yes"}] * 8)
    assert attempt(load_seed_tasks, path) is None
    with pytest.raises(UserError, match="true or false"):
        load_seed_tasks(path)


RANKS = SMALL_TOKENIZER["ranks"]


@pytest.mark.parametrize("content, message", [
    pytest.param({**SMALL_TOKENIZER, "ranks": RANKS + RANKS[5:6]}, "twice", id="a token twice"),
    pytest.param({**SMALL_TOKENIZER, "ranks": RANKS[1:]}, "256 bytes", id="a byte is missing"),
    pytest.param(
        {**SMALL_TOKENIZER, "pattern": r"\S+"}, "every character",
        id="a pattern that drops spaces",
    ),
    pytest.param(
        {**SMALL_TOKENIZER, "pattern": r"x*"}, "the empty string",
        id="a pattern that matches nothing",
    ),
    pytest.param(
        {**SMALL_TOKENIZER, "pattern": r"(?=a)|[\s\S]"}, "the empty string",
        id="a pattern that matches nothing before each a",
    ),
    pytest.param(DEEP, "not a tokenizer file", id="deep"),
])
def test_tokenizers_mishandled_before_are_refused(tmp_path, content, message):
    path = tmp_path / "file.json"
    write_json(path, content)
    assert attempt(get_tokenizer, path) is None
    with pytest.raises(UserError, match=message):
        get_tokenizer(path)


def test_scores_in_a_pair_are_ignored(tmp_path):
    """data/README.md: further keys are ignored, and these are not keys of a pair."""
    path = tmp_path / "pairs.jsonl"
    record = {"prompt": "Hi", "chosen": "yes", "rejected": "no", "user": 3}
    write_json(path, {**record, "scores": 0.9, "ranks_other": None})
    (loaded,), printed = attempt(load_comparisons, path)
    assert not {"scores", "ranks_other"} & set(loaded)
    assert loaded["user"] == 3
    assert not printed
    check_comparisons(path, [loaded], printed)


@pytest.mark.parametrize("content", [
    pytest.param(b'{"a": 1%s}' % (b"0" * 400), id="a weight of 400 digits"),
    pytest.param(DEEP, id="deep"),
    pytest.param(b'{"%s": 1}' % (b"k" * 3000), id="a long name"),
])
def test_mixtures_mishandled_before_are_refused(tmp_path, content):
    (tmp_path / "a.txt").write_text("Tom went to the lake.\n" * 60)
    (tmp_path / "mixture.json").write_bytes(content)
    assert attempt(lambda p: read_corpus(p.parent), tmp_path / "mixture.json") is None


def test_a_validation_share_of_nan_is_refused_for_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Tom went to the lake.\n" * 60)
    assert attempt(lambda p: read_corpus(p, math.nan), path) is None


def shop(path, *statements):
    """Write a database with one table, then run more statements on it."""
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE shop (item TEXT, price INTEGER)")
    for statement in statements:
        db.execute(*statement)
    db.commit()
    db.close()


@pytest.mark.parametrize("name", [
    pytest.param(b"\xff\xff\xff\xff", id="not UTF-8"),
    pytest.param(b"a\nb\r", id="lines"),
])
def test_a_damaged_schema_is_refused_in_one_line(tmp_path, name):
    """SQLite quotes the schema in its message, which then is not UTF-8 or not one line."""
    path = tmp_path / "shop.db"
    shop(path)
    raw = path.read_bytes()
    assert raw.count(b"tableshopshop") == 1
    path.write_bytes(raw.replace(b"tableshopshop", b"table" + name + b"shop"))
    assert attempt(tools.open_database, path) is None


def test_a_table_whose_name_is_bytes_cannot_be_queried(tmp_path):
    path = tmp_path / "shop.db"
    shop(
        path,
        ("PRAGMA writable_schema = ON",),
        ("UPDATE sqlite_master SET name = ?", (b"shop",)),
    )
    loaded = attempt(tools.open_database, path)
    if loaded:
        assert tools.run_query(loaded.result, "SELECT item FROM shop").startswith("[error: ")
        loaded.result.close()


@pytest.mark.parametrize("change", [
    pytest.param(dict(tokenizer=5), id="tokenizer 5"),
    pytest.param(dict(tokenizer="n" * 5000), id="a tokenizer name of 5000 letters"),
    pytest.param(dict(model=[1, 2]), id="a list of weights"),
    pytest.param(dict(model={5: 5}), id="a weight named 5"),
    pytest.param(dict(gpt=[]), id="no sizes"),
    pytest.param(dict(sizes=dict(n_layer=10 ** 9)), id="10^9 layers"),
    pytest.param(dict(sizes=dict(n_head=0)), id="0 heads"),
    pytest.param(dict(sizes=dict(n_head=-2)), id="-2 heads"),
    pytest.param(dict(sizes=dict(vocab_size=10 ** 12)), id="10^12 tokens"),
    pytest.param(dict(sizes=dict(n_embd=10 ** 7)), id="10^7 channels"),
])
def test_checkpoints_mishandled_before_are_refused(tmp_path, states, change):
    state = {**states["policy"], **change}
    if "sizes" in state:
        state["gpt"] = {**state["gpt"], **state.pop("sizes")}
    path = tmp_path / "gpt.pt"
    path.write_bytes(saved(state))
    assert attempt(gpt.load_model, path) is None


@pytest.mark.parametrize("state", [
    pytest.param([1], id="a list"),
    pytest.param(5, id="a number"),
    pytest.param({}, id="empty"),
    pytest.param({"model": 5}, id="model 5"),
    pytest.param({"data": 5, "val_fraction": 0.1, "mixture": ""}, id="data 5"),
    pytest.param({"data": "n" * 5000, "val_fraction": 0.1, "mixture": ""}, id="a long data path"),
])
def test_a_checkpoint_of_another_program_has_no_text_and_is_no_policy(tmp_path, state):
    path = tmp_path / "gpt.pt"
    path.write_bytes(saved(state))
    assert attempt(checkpoint_text, path) is None
    loaded = attempt(lambda p: policies(p.parent), path.rename(tmp_path / "other.pt"))
    assert [stage for stage, _ in loaded.result] == []


@pytest.mark.parametrize("change", [
    pytest.param(dict(n_layer="two"), id="layers, a string"),
    pytest.param(dict(n_layer=10 ** 9), id="10^9 layers"),
    pytest.param(dict(n_head=0), id="0 heads"),
    pytest.param(dict(n_embd=10 ** 7), id="10^7 channels"),
    pytest.param(dict(vocab_size=-1), id="-1 tokens"),
])
def test_wrong_sizes_in_a_folder_of_weights_are_refused(tmp_path, change):
    folder = tmp_path / "gpt2"
    gpt.GPT(gpt.GPTConfig(*FOLDER_SIZES)).save_pretrained(folder)
    write_json(folder / "config.json", {**CONFIG, **change})
    assert attempt(gpt.GPT.from_pretrained, folder, name="gpt2") is None


@pytest.mark.parametrize("file, content", [
    pytest.param("config.json", DEEP, id="a deep config"),
    pytest.param("pytorch_model.bin", saved([1, 2]), id="a list of weights"),
])
def test_wrong_files_in_a_folder_of_weights_are_refused(tmp_path, file, content):
    folder = tmp_path / "gpt2"
    gpt.GPT(gpt.GPTConfig(*FOLDER_SIZES)).save_pretrained(folder)
    (folder / file).write_bytes(content)
    assert attempt(gpt.GPT.from_pretrained, folder, name="gpt2") is None
