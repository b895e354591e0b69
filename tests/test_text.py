"""Tests of data/text.py: documents, train and validation parts, the mixture, packing."""

import random

import pytest
import torch
from tiny import (
    ENC,
    END,
    SPECIAL,
    assert_close,
    random_documents,
    random_ids,
    write_documents,
)

from gpt import UserError, document_odds, draw_documents, pack, read_corpus


def ids_of(documents):
    """Tokenize documents, each with its end token, into one list of ids."""
    return [i for d in documents for i in ENC.encode_ordinary(d) + [END]]


# Reading


LENGTHS = {
    "short": [1, 2, 3, 4] * 8,
    "one": [60],
    "a long one last": [1] * 50 + [40],
    "a long one first": [40] + [1] * 50,
}


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_token_is_used_once_and_the_tail_is_for_validation(tmp_path, fraction, lengths):
    documents = random_documents(lengths)
    path = write_documents(tmp_path / "a.txt", documents)
    train, val, weight = read_corpus(path, ENC, 16, fraction)["a"]
    total = len(ids_of(documents))
    n_val = sum(map(len, val))
    assert torch.cat(train + val).tolist() == ids_of(documents)
    assert n_val == pytest.approx(fraction * total, abs=2)
    assert weight == total - n_val
    # At most one document is cut, where the two parts meet; all others are whole.
    parts = [d.tolist() for d in train + val]
    if len(parts) > len(documents):
        border = len(train)
        parts[border - 1 : border + 1] = [parts[border - 1] + parts[border]]
    assert parts == [ids_of([d]) for d in documents]


def test_a_text_cannot_spell_a_special_token(tmp_path):
    string = "He wrote <|end|> and <|assistant|> on the wall <|end|>\n" * 20
    path = write_documents(tmp_path / "a.txt", [string])
    train, val, _ = read_corpus(path, ENC, 16, 0.2)["a"]
    ids = torch.cat(train + val).tolist()
    assert [i for i in ids if i in SPECIAL.values()] == [END]
    assert ENC.decode(ids) == string + "<|end|>"


SEPARATORS = {
    "Windows": ("<|end|>\r\n", ""),
    "at the end of the file": ("<|end|>\n", "<|end|>"),
    "at the end, with a newline": ("<|end|>\n", "<|end|>\n"),
}


@pytest.mark.parametrize("separator, last", SEPARATORS.values(), ids=SEPARATORS)
def test_no_separator_stays_in_the_text(tmp_path, separator, last):
    """A model that reads one as letters would learn to spell its end token."""
    documents = random_documents([3] * 20)
    path = tmp_path / "a.txt"
    path.write_bytes((separator.join(documents) + last).encode())
    train, val, _ = read_corpus(path, ENC, 16, 0.2)["a"]
    assert torch.cat(train + val).tolist() == ids_of(documents)


def test_sources_and_their_weights(tmp_path):
    for name, n in (("a", 30), ("b", 60), ("c", 20)):
        write_documents(tmp_path / f"{name}.txt", random_documents([n]))
    (tmp_path / "notes.md").write_text("never read")

    def weights(mixture=""):
        sources = read_corpus(tmp_path, ENC, 16, 0.2, mixture)
        return {name: weight for name, (_, _, weight) in sources.items()}

    by_size = weights()
    assert set(by_size) == {"a", "b", "c"}
    assert by_size["b"] == pytest.approx(2 * by_size["a"], rel=0.1)
    assert weights("a=2, b=.5") == {"a": 2, "b": 0.5, "c": 0}
    (tmp_path / "mixture.json").write_text('{"c": 3, "a": 1}')
    assert weights() == {"a": 1, "b": 0, "c": 3}
    assert weights("b=1") == {"a": 0, "b": 1, "c": 0}  # the flag outranks the file


def test_two_files_of_one_name_in_two_folders_are_both_read(tmp_path):
    documents = random_documents([20, 20])
    for folder, document in zip("xy", documents):
        write_documents(tmp_path / folder / "book.txt", [document])
    sources = read_corpus(tmp_path, ENC, 16, 0.2)
    n = sum(len(d) for train, val, _ in sources.values() for d in train + val)
    assert n == len(ids_of(documents))


BAD_CORPORA = {  # file, mixture -> what the error must contain
    ("gone.txt", ""): ["gone.txt"],
    ("empty.txt", ""): ["empty.txt", "0 tokens"],
    ("no_txt", ""): ["no_txt", "*.txt"],
    ("short.txt", ""): ["short.txt", "--block-size"],
    ("latin.txt", ""): ["latin.txt", "byte 9", "iconv"],
    ("good", "b=1"): ["'b'", "'a'"],
    ("good", "a"): ["--mixture", "name=weight"],
    ("good", "a=much"): ["--mixture", "a=much"],
    ("good", "a=0"): ["a=0"],
    ("good", "a=-1"): ["a=-1"],
    ("bad_mixture", ""): ["mixture.json"],
}


@pytest.mark.parametrize("file, mixture", BAD_CORPORA)
def test_a_bad_corpus_is_named(tmp_path, file, mixture):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "no_txt").mkdir()
    (tmp_path / "no_txt" / "page.html").write_text("page")
    (tmp_path / "short.txt").write_text("A few words.")
    # The first bad byte comes after 8 characters but 9 bytes.
    (tmp_path / "latin.txt").write_bytes("aber \u00e9 !".encode() + b"\xe9t\xe9")
    for folder in ("good", "bad_mixture"):
        write_documents(tmp_path / folder / "a.txt", random_documents([30]))
    (tmp_path / "bad_mixture" / "mixture.json").write_text("a: 1")
    with pytest.raises(UserError) as e:
        read_corpus(tmp_path / file, ENC, 16, 0.2, mixture)
    assert "\n" not in str(e.value)
    for part in BAD_CORPORA[file, mixture]:
        assert part in str(e.value), e.value


# Drawing


def draw(sources, n=150_000, T=32):
    """Draw documents of n tokens -> {source: share of the tokens}, documents."""
    rng = random.Random(0)
    documents, drawn = draw_documents(sources, document_odds(sources, T), n, T, rng)
    total = sum(map(len, documents))
    assert n <= total
    assert total < n + T
    assert sum(drawn.values()) == total
    assert max(map(len, documents)) <= T
    return {name: tokens / total for name, tokens in drawn.items()}, documents


def test_token_shares_follow_the_weights_whatever_the_lengths():
    """Short documents are drawn more often; one longer than the context counts as a window."""
    sources = {
        "short": ([torch.full((5,), 1)] * 10, [], 6.0),
        "long": ([torch.full((30,), 2)] * 10, [], 3.0),
        "book": ([torch.full((3000,), 3)], [], 1.0),
        "never": ([torch.full((9,), 4)], [], 0.0),
    }
    shares, documents = draw(sources)
    want = {"short": 0.6, "long": 0.3, "book": 0.1, "never": 0}
    assert shares == pytest.approx(want, abs=0.01)
    # The returned numbers of tokens are those that were drawn.
    counts = torch.cat(documents).bincount(minlength=5) / sum(map(len, documents))
    assert_close(counts[1:].double(), torch.tensor(list(shares.values())).double(), 1e-6)


def test_token_shares_do_not_depend_on_the_order_of_a_file():
    sources = {
        "sorted": ([torch.zeros(4)] * 1000 + [torch.zeros(30)] * 1000, [], 1.0),
        "even": ([torch.zeros(17)] * 9, [], 1.0),
    }
    assert draw(sources)[0] == pytest.approx({"sorted": 0.5, "even": 0.5}, abs=0.02)


def test_a_window_of_a_long_document_reaches_both_ends():
    sources = {"a": ([torch.arange(100, 140), torch.arange(7)], [], 1.0)}
    odds = document_odds(sources, 32)
    documents, _ = draw_documents(sources, odds, 5000, 32, random.Random(0))
    starts = set()
    for ids in (d.tolist() for d in documents):
        assert ids in (list(range(7)), list(range(ids[0], ids[0] + 32)))
        starts.add(ids[0])
    assert starts == {0} | set(range(100, 109))


# Packing


def test_pack_loses_nothing_and_keeps_the_order():
    rng = random.Random(0)
    for _ in range(20):
        lengths = [rng.randint(1, 16) for _ in range(rng.randint(1, 30))]
        documents = [torch.tensor(ids) + 1 for ids in random_ids(lengths)]
        ids, segments = pack(documents, 16)
        assert ids.shape == segments.shape
        assert ids.shape[1] == 16
        assert ids.dtype == torch.long
        assert segments.dtype == torch.long
        assert not ids[segments == 0].any()
        unpacked = []
        for row, numbers in zip(ids, segments):
            n = numbers.max().item()
            assert n >= 1
            # Segments are numbered from 1 in their order; padding comes after them.
            padding = [0] * (numbers == 0).sum().item()
            assert numbers.tolist() == sorted(numbers[numbers > 0].tolist()) + padding
            unpacked += [row[numbers == i].tolist() for i in range(1, n + 1)]
        assert unpacked == [d.tolist() for d in documents]
