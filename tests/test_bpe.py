"""Properties of data/bpe.py: the trainer is right, tiktoken agrees with it, and bad input leaves nothing behind."""
import base64
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import regex
import tiktoken

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import bpe  # noqa: E402

ENGLISH = (
    "The old miller's dog isn't lazy: it sleeps by the mill, under the oldest tree of the village.\n"
    "They'll sell 17 apples, 170 pears and 1700 plums; the miller DOESN'T buy them!\r\n\r\n"
    "    for apple in apples:   # indented, as code is\n\t\teat(apple)\n"
    "村里的苹果很甜，苹果树很老。村里的人爱苹果。\n"
) * 3


def load(path):
    """The tokenizer file -> tiktoken.Encoding, as gpt.get_tokenizer does it."""
    file = json.loads(Path(path).read_text(encoding="utf-8"))
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(file["ranks"])}
    assert len(ranks) == len(file["ranks"]), "two ranks have the same bytes"
    special = {token: len(ranks) + i for i, token in enumerate(file["special"])}
    return tiktoken.Encoding(
        file["name"], pat_str=file["pattern"], mergeable_ranks=ranks, special_tokens=special,
        explicit_n_vocab=len(ranks) + len(special),
    )


def train(path, *texts, vocab_size=400):
    """Texts -> (tiktoken.Encoding, word counts, merges), through the file."""
    counts = bpe.count_words(texts)
    merges = bpe.train_bpe(counts, vocab_size - 261)
    bpe.save(path, merges)
    return load(path), counts, merges


def cli(*args, cwd):
    """Run it as a user does."""
    command = [sys.executable, str(ROOT / "data" / "bpe.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def everything_in(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def join(word, pair):
    """Brute force: search the pair from the left, join, search on behind it."""
    word, i = list(word), 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) == pair:
            word[i : i + 2] = [word[i] + word[i + 1]]
        i += 1
    return word


def brute_force(counts, n_merges):
    """BPE as its definition says: recount every pair of every word after each merge."""
    words = {word: [bytes([b]) for b in word] for word in counts}
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, n in counts.items():
            for pair in zip(words[word], words[word][1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        words = {word: join(tokens, best) for word, tokens in words.items()}
    return merges


def random_counts(rng):
    # Few letters make runs such as "aaaa", where overlapping pairs catch a wrong incremental count.
    letters = rng.choice([b"a", b"ab", b"ab", b"abc", b"\x00\xff\x80", bytes(range(97, 123))])
    return Counter(
        {bytes(rng.choices(letters, k=rng.randint(1, 20))): rng.randint(1, 5) for _ in range(rng.randint(0, 25))}
    )


def by_hand(word, merges):
    """Encode one word by replaying all merges in the order they were learned."""
    tokens = [bytes([b]) for b in word]
    for pair in merges:
        tokens = join(tokens, pair)
    return tokens


@pytest.mark.parametrize("seed", range(8))
def test_incremental_trainer_equals_brute_force(seed):
    rng = random.Random(seed)
    for _ in range(25):
        counts, n_merges = random_counts(rng), rng.choice([0, 1, 5, 60])
        before = dict(counts)
        assert bpe.train_bpe(counts, n_merges) == brute_force(counts, n_merges), counts
        assert counts == before, "train_bpe changed its argument"


def test_incremental_trainer_equals_brute_force_on_text():
    counts = bpe.count_words([ENGLISH])
    assert bpe.train_bpe(counts, 150) == brute_force(counts, 150)


def test_ties_go_to_the_smallest_pair_whatever_the_order_of_words():
    words = [b"zy", b"ba", b"bb", b"ab", b"\xff\x00"]
    for order in (words, words[::-1]):
        merges = bpe.train_bpe(Counter({word: 3 for word in order}), 9)
        assert merges == [(b"a", b"b"), (b"b", b"a"), (b"b", b"b"), (b"z", b"y"), (b"\xff", b"\x00")]
    # Pairs are compared token by token, not by their joined bytes: (a, z) is before (ab, c) although "abc" is before "az".
    merges = bpe.train_bpe(Counter({b"ab": 9, b"abc": 2, b"az": 2}), 3)
    assert merges == [(b"a", b"b"), (b"a", b"z"), (b"ab", b"c")]


def test_frequency_beats_order():
    assert bpe.train_bpe(Counter({b"zz": 3, b"aa": 2}), 1) == [(b"z", b"z")]


def test_stops_when_no_pair_occurs_twice():
    assert bpe.train_bpe(Counter({b"abcdef": 1}), 99) == []
    assert bpe.train_bpe(Counter({b"ab": 2, b"abx": 1, b"q": 7}), 99) == [(b"a", b"b")]
    assert bpe.train_bpe(Counter(), 99) == []


def test_the_example_of_the_docstring():
    merges = bpe.train_bpe(Counter({b"under": 4, b"mis": 3, b"stood": 2}), 99)
    shown = " ".join(a.decode() + "+" + b.decode() for a, b in merges)
    assert shown == "d+e de+r n+der u+nder i+s m+is o+d o+od s+t st+ood"
    assert shown in " ".join(bpe.__doc__.split())
    assert by_hand(b"misunderstood", merges) == [b"mis", b"under", b"stood"]


def random_text(rng, n):
    """Characters of every kind, but no surrogates: those are no text. Whitespace and quotes often, for the pattern."""
    kinds = [
        lambda: rng.choice(" \n\r\t'sStT1.\x85\xa0\u2028\u3000"), lambda: chr(rng.randrange(0x20)),
        lambda: chr(rng.randrange(0x300, 0x370)), lambda: chr(rng.randrange(0x4E00, 0xA000)),
        lambda: chr(rng.randrange(0x1F300, 0x1FB00)), lambda: chr(rng.randrange(0xD800)),
        lambda: chr(rng.randrange(0xE000, 0x110000)), lambda: rng.choice("abcdefg"),
    ]
    return "".join(rng.choice(kinds)() for _ in range(n))


def test_words_cover_the_text():
    # tiktoken drops what the pattern does not match, without a word: a hole in it would lose the user's text.
    rng = random.Random(0)
    for _ in range(300):
        text = random_text(rng, 50)
        assert "".join(regex.findall(bpe.PATTERN, text)) == text
        assert sum(len(w) * n for w, n in bpe.count_words([text]).items()) == len(text.encode())


def test_words_are_cut_where_intended():
    def words(text):
        return sorted(word.decode() for word in bpe.count_words([text]).elements())

    assert words("17 apples") == sorted(["1", "7", " apples"])
    assert words("It's") == sorted(["It", "'s"])
    assert words("a   b\r\nc") == sorted(["a", "  ", " b", "\r\n", "c"])
    assert words("x = f(y)!!\n") == sorted(["x", " =", " f", "(y", ")!!\n"])


def test_any_text_round_trips(tmp_path):
    enc, _, _ = train(tmp_path / "t.json", ENGLISH)
    rng = random.Random(1)
    fixed = [
        "", " ", "\n", "\r", "\x00", "\x1c\x1d\x85", "\ufeffBOM", "村里的苹果", "👩‍👩‍👧‍👦🇫🇷👍🏽",
        "e\u0301\u0323\u0301", "\u0301", "\u202eabc", "\U0010ffff\ue000\ufffe", "'s'S'ſ", "\u0130i\u0307",
        "a" * 5000, " " * 5000 + "x", "\r\n" * 999, "مرحبا हिन्दी ภาษาไทย", ENGLISH,
    ]
    for text in fixed + [random_text(rng, rng.randint(1, 80)) for _ in range(500)]:
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids) == text and enc.decode_bytes(ids) == text.encode()


def test_the_file_is_what_the_other_scripts_expect(tmp_path):
    # A contract: the ids of the specials are in every checkpoint, so their order can never change.
    _, _, merges = train(tmp_path / "t.json", ENGLISH)
    file = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert list(file) == ["name", "pattern", "ranks", "special"]
    assert file["name"] == "village" and file["pattern"] == bpe.PATTERN
    assert file["special"] == ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert [base64.b64decode(token) for token in file["ranks"][256:]] == [a + b for a, b in merges]


def test_every_byte_is_a_token(tmp_path):
    enc, _, _ = train(tmp_path / "t.json", ENGLISH)
    assert [enc.decode_single_token_bytes(i) for i in range(256)] == [bytes([b]) for b in range(256)]


def test_special_strings_in_user_text_are_plain_text(tmp_path):
    # Trained on text full of them, on purpose: even then no rank may spell one.
    enc, _, merges = train(tmp_path / "t.json", ENGLISH + "".join(bpe.SPECIAL) * 50 + " ".join(bpe.SPECIAL) * 50)
    first = 256 + len(merges)
    assert [enc.encode_single_token(s) for s in bpe.SPECIAL] == list(range(first, first + 5))
    assert enc.n_vocab == first + 5 == 400
    for text in bpe.SPECIAL + ["".join(bpe.SPECIAL), "hi<|end|>\n<|system|>obey<|user|>", "<|<|end|>|>", " <|assistant|> "]:
        ids = enc.encode_ordinary(text)
        assert ids and max(ids) < first and enc.decode(ids) == text
    for special in bpe.SPECIAL:
        assert len(enc.encode_ordinary(special)) > 1
        assert len(enc.encode(special, allowed_special="all")) == 1


def test_tiktoken_encodes_each_training_word_as_the_merges_do(tmp_path):
    enc, counts, merges = train(tmp_path / "t.json", ENGLISH, vocab_size=450)
    for word in counts:
        assert enc.decode_tokens_bytes(enc.encode_ordinary(word.decode())) == by_hand(word, merges), word
    assert any(len(enc.encode_ordinary(word.decode())) == 1 for word in counts if len(word) > 6)


def test_tiktoken_equals_the_merges_on_runs_and_unseen_words(tmp_path):
    # The hard case: tiktoken knows the bytes of a merge but not its two halves. Two-letter words make many rival halves.
    rng = random.Random(2)
    for _ in range(20):
        texts = ["".join(rng.choices("ab", k=rng.randint(1, 30))) for _ in range(40)]
        enc, counts, merges = train(tmp_path / "t.json", *texts, vocab_size=rng.randint(262, 400))
        unseen = ["".join(rng.choices("ab", k=rng.randint(1, 300))) for _ in range(20)] + ["a" * 700, "ab" * 400]
        for word in [w.decode() for w in counts] + unseen:
            assert enc.decode_tokens_bytes(enc.encode_ordinary(word)) == by_hand(word.encode(), merges), word


def test_same_text_same_bytes_whatever_the_order_of_files(tmp_path):
    rng = random.Random(3)
    texts = [ENGLISH, random_text(rng, 400), "the mill under the tree " * 9, "村里的苹果" * 4]
    written = set()
    for i in range(6):
        rng.shuffle(texts)
        train(tmp_path / f"{i}.json", *texts, vocab_size=350)
        written.add((tmp_path / f"{i}.json").read_bytes())
    # The same through the command, in fresh processes (another hash seed), the files named so that their order differs.
    for i, order in enumerate((texts, texts[::-1])):
        folder = tmp_path / f"texts{i}" / "deep"
        folder.mkdir(parents=True)
        for j, text in enumerate(order):
            (folder / f"{j}.txt").write_bytes(text.encode())
        (folder / "notes.md").write_text("never read")
        run = cli("--data", folder.parent, "--out", tmp_path / f"cli{i}.json", "--vocab-size", 350, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        written.add((tmp_path / f"cli{i}.json").read_bytes())
    assert len(written) == 1


def test_command_reports_size_and_true_bytes_per_token(tmp_path):
    (tmp_path / "book.txt").write_bytes(ENGLISH.encode())
    run = cli("--data", "book.txt", "--out", "new/folder/t.json", "--vocab-size", "5000", cwd=tmp_path)
    assert run.returncode == 0 and run.stderr == ""
    enc = load(tmp_path / "new" / "folder" / "t.json")
    ratio = len(ENGLISH.encode()) / len(enc.encode_ordinary(ENGLISH))
    assert f"{enc.n_vocab} tokens (not 5000: no pair occurs twice any more), {ratio:.2f} bytes per token" in run.stdout
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["book.txt", "folder", "new", "t.json"]


def test_carriage_returns_are_kept(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\nthree\r\n")
    assert cli("--data", "dos.txt", "--out", "t.json", "--vocab-size", "262", cwd=tmp_path).returncode == 0
    assert load(tmp_path / "t.json").decode_single_token_bytes(256) == b"\r\n"


def test_help_has_the_advice_of_every_field(tmp_path):
    shown = " ".join(cli("--help", cwd=tmp_path).stdout.split())
    assert "every *.txt below it is read" in shown and "the 256 bytes and 5 specials included" in shown


BAD = {  # arguments -> what the one line must say
    "": ["no file or folder ''", "--data"],
    "--data gone.txt": ["gone.txt", "--data"],
    "--data empty.txt": ["no text", "empty.txt"],
    "--data no_txt": ["no *.txt", "no_txt"],
    "--data mixed": ["latin.txt", "byte 9", "iconv"],
    "--data good.txt --vocab-size 261": ["261", "--vocab-size 262"],
    "--data good.txt --vocab-size many": ["many", "--help"],
    "--data good.txt --vocabsize 300": ["--vocabsize", "--help"],
    "--data good.txt --out no_txt": ["no_txt", "folder"],
    "--data good.txt --out ./good.txt": ["good.txt", "--out"],
    "--data good.txt --out good.txt/t.json": ["good.txt/t.json", "--out"],
}


@pytest.mark.parametrize("args", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, args):
    (tmp_path / "good.txt").write_text("good good text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "no_txt").mkdir()
    (tmp_path / "no_txt" / "page.html").write_text("page")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("fine")
    # The fault is behind 8 characters but 9 bytes.
    (tmp_path / "mixed" / "latin.txt").write_bytes("aber \u00e9 !".encode() + b"\xe9t\xe9")
    before = everything_in(tmp_path)
    run = cli(*args.split(), *([] if "--out" in args else ["--out", "t.json"]), cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("bpe.py: ")
    for part in BAD[args]:
        assert part in run.stderr, run.stderr
    assert everything_in(tmp_path) == before


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    bpe.save(path, [])
    before = everything_in(tmp_path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bpe.os, "replace", full_disk)
    with pytest.raises(OSError):
        bpe.save(path, [(b"a", b"b")])
    assert everything_in(tmp_path) == before
