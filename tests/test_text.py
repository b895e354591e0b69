"""Tests of data/text.py: documents, train and validation parts, the mixture, packing."""

import gzip
import json
import os
import random
import re

import pytest
import torch

from data.text import (
    Source,
    batches,
    by_length,
    checkpoint_text,
    cut,
    draw_rows,
    find_texts,
    pack,
    predicted,
    read_corpus,
    read_documents,
    sorted_batches,
    split_documents,
    windows,
    write_text,
)
from scaffold.cli import UserError
from scaffold.run import save_checkpoint
from tiny import (
    END,
    ENC,
    SPECIAL,
    assert_close,
    join_pieces,
    random_documents,
    random_ids,
    write_documents,
    write_jsonl,
)


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
    source = read_corpus(path, ENC, 16, fraction)["a"]
    total = len(ids_of(documents))
    n_val = sum(map(len, source.val))
    train = join_pieces(source.train)
    assert train + torch.cat(source.val).tolist() == ids_of(documents)
    assert n_val == pytest.approx(fraction * total, abs=2)
    assert source.weight == total - n_val == len(train)
    # Validation documents are whole, except the one at the border.
    assert all(d[-1] == END for d in source.val)
    assert max(map(len, source.train)) <= 16


def test_a_text_cannot_spell_a_special_token(tmp_path):
    string = "He wrote <|end|> and <|assistant|> on the wall <|end|>\n" * 20
    path = write_documents(tmp_path / "a.txt", [string])
    source = read_corpus(path, ENC, 16, 0.2)["a"]
    ids = join_pieces(source.train) + torch.cat(source.val).tolist()
    assert [i for i in ids if i in SPECIAL.values()] == [END]
    assert ENC.decode(ids) == string + "<|end|>"


SEPARATORS = {
    "of GPT-2": ("<|endoftext|>\n", "<|endoftext|>"),
    "of GPT-2, Windows": ("<|endoftext|>\r\n", ""),
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
    source = read_corpus(path, ENC, 16, 0.2)["a"]
    assert join_pieces(source.train) + torch.cat(source.val).tolist() == ids_of(documents)


def test_sources_and_their_weights(tmp_path):
    for name, n in (("a", 30), ("b", 60), ("c", 20)):
        write_documents(tmp_path / f"{name}.txt", random_documents([n]))
    (tmp_path / "notes.md").write_text("never read")

    def weights(mixture=""):
        sources = read_corpus(tmp_path, ENC, 16, 0.2, mixture)
        return {name: source.weight for name, source in sources.items()}

    by_size = weights()
    assert set(by_size) == {"a", "b", "c"}
    assert by_size["b"] == pytest.approx(2 * by_size["a"], rel=0.1)
    assert weights("a=2, b=.5") == {"a": 2, "b": 0.5, "c": 0}
    (tmp_path / "mixture.json").write_text('{"c": 3, "a": 1}')
    assert weights() == {"a": 1, "b": 0, "c": 3}
    assert weights("b=1") == {"a": 0, "b": 1, "c": 0}  # the flag outranks the file


def write_texts(path, documents):
    """Write documents as JSON lines."""
    return write_jsonl(path, *[{"text": d, "id": i} for i, d in enumerate(documents)])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.txt.gz"])
def test_records_with_a_text_and_compressed_texts_are_documents(tmp_path, name):
    documents = random_documents([3] * 20)
    write_texts(tmp_path / "lines", documents)
    rows = "text\n" + "".join(f'"{d}"\n' for d in documents)
    content = {
        "a.jsonl": (tmp_path / "lines").read_text(),
        "a.json": json.dumps([{"text": d} for d in documents]),
        "a.csv": rows,
        "a.txt.gz": "<|end|>\n".join(documents),
    }
    content["a.jsonl.gz"] = content["a.jsonl"]
    raw = content[name].encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    [source] = [read_corpus(tmp_path / name, ENC, 16, 0.2)["a"]]
    assert join_pieces(source.train) + torch.cat(source.val).tolist() == ids_of(documents)


def test_a_record_without_a_text_is_skipped_and_a_document_may_hold_separators(tmp_path, capsys):
    path = write_texts(tmp_path / "a.jsonl", ["a\n<|endoftext|>\nb", None, "", "c", "d", "<|end|>"])
    assert read_documents(path) == ["a\n", "b", "c", "d"]
    assert f"{path}: 2 of 6 records skipped: no text" in capsys.readouterr().out


@pytest.mark.parametrize("record, message", [
    ({"messages": []}, ":2: expected {\"text\": string}, found ['messages']"),
    ({"text": 3}, ":2: text: expected a string, found int"),
])
def test_a_record_that_is_no_text_is_named(tmp_path, record, message):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "x"}, record)
    with pytest.raises(UserError) as e:
        read_documents(path)
    assert str(e.value) == f"{path}{message}"


def test_a_folder_may_mix_kinds_of_files_and_hidden_ones_are_passed_over(tmp_path):
    documents = random_documents([30] * 3)
    (tmp_path / "deep").mkdir()
    write_documents(tmp_path / "a.txt", documents[:1])
    write_texts(tmp_path / "deep" / "b.jsonl", documents[1:2])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(documents[2].encode()))
    (tmp_path / "mixture.json").write_text('{"a": 1, "deep/b": 2, "c": 3}')
    for hidden in ("._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "deep/.cache/x.jsonl"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"\0\xff\xfe")
    (tmp_path / "folder.txt").mkdir()
    sources = read_corpus(tmp_path, ENC, 16, 0.2)
    assert {name: s.weight for name, s in sources.items()} == {"a": 1, "c": 3, "deep/b": 2}
    assert list(find_texts(tmp_path)) == ["a", "c", "deep/b"]


def test_a_folder_below_a_hidden_one_can_be_named(tmp_path):
    write_documents(tmp_path / ".data" / "a.txt", random_documents([30]))
    assert list(read_corpus(tmp_path / ".data", ENC, 16, 0.2)) == ["a"]


def test_two_sources_of_one_name_are_refused(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match="a.txt and .*a.jsonl: two sources of the same name"):
        find_texts(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_text_with_a_mark_is_read(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("牛 says\n".encode(encoding))
    assert read_documents(tmp_path / "a.txt") == ["牛 says\n"]


def test_two_files_of_one_name_in_two_folders_are_both_read(tmp_path):
    documents = random_documents([20, 20])
    for folder, document in zip("xy", documents):
        write_documents(tmp_path / folder / "book.txt", [document])
    sources = read_corpus(tmp_path, ENC, 16, 0.2)
    n = sum(len(join_pieces(s.train)) + sum(map(len, s.val)) for s in sources.values())
    assert n == len(ids_of(documents))


BAD_CORPORA = {  # file, mixture -> what the error must contain
    ("gone.txt", ""): ["gone.txt"],
    ("empty.txt", ""): ["empty.txt", "0 tokens"],
    ("no_txt", ""): ["no_txt", "*.txt"],
    ("short.txt", ""): ["short.txt", "81 are needed"],
    ("latin.txt", ""): ["latin.txt", "byte 9", "iconv"],
    ("good", "b=1"): ["'b'", "'a'"],
    ("good", "a"): ["--mixture", "name=weight"],
    ("good", "a=much"): ["--mixture", "a=much"],
    ("good", "a=0"): ["a=0"],
    ("good", "a=-1"): ["a=-1"],
    ("good", "a=1,b=nan"): ["a=1,b=nan", "from 1e-9"],
    ("good", "a=3e-308"): ["a=3e-308", "from 1e-9"],
    ("good", "a=1e300"): ["a=1e300", "to 1e15"],
    ("good", "a=inf"): ["a=inf"],
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


@pytest.mark.parametrize("share", [0.05, 0.2, 0.3, 0.5, 0.9])
def test_the_numbers_named_for_a_short_text_are_exact(tmp_path, share):
    """The needed tokens suffice, and so does the context; one token more is refused."""
    path = tmp_path / "a.txt"

    def write(n):
        path.write_text(ENC.decode(ENC.encode_ordinary(" cow") * (n - 1)))

    write(90)
    with pytest.raises(UserError, match="90 tokens are too few") as e:
        read_corpus(path, ENC, 128, share)
    needed, most = re.search(r"([\d,]+) are needed.* of at most (\d+)", str(e.value)).groups()
    read_corpus(path, ENC, int(most), share)
    with pytest.raises(UserError, match="90 tokens are too few"):
        read_corpus(path, ENC, int(most) + 1, share)
    needed = int(needed.replace(",", ""))
    write(needed)
    read_corpus(path, ENC, 128, share)
    write(needed - 1)
    with pytest.raises(UserError, match=f"{needed - 1} tokens are too few"):
        read_corpus(path, ENC, 128, share)


@pytest.mark.parametrize("separator", ["<|end|>\n", "<|end|>\r\n"], ids=["Unix", "Windows"])
def test_documents_are_cut_at_the_lines_that_are_just_an_end_token(separator):
    text = separator.join(["one\n", "two <|end|>\n<|end|> three\n", " \n", "four\n"])
    assert split_documents(text) == ["one\n", "two <|end|>\n<|end|> three\n", "four\n"]


def test_write_text_makes_folders_and_keeps_line_ends(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "苹果\nb\r\n")
    assert path.read_bytes() == "苹果\nb\r\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_write_that_fails_keeps_the_old_text(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half an emoji: \ud83d")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


# Drawing


def draw(sources, n=4000, T=32):
    """Draw n rows -> {source: share of the tokens}, windows: the 1-D tensors of all segments."""
    drawn = dict.fromkeys(sources, 0)
    ids, segments = draw_rows(sources, drawn, n * T + T // 2, T, random.Random(0))
    assert ids.shape == segments.shape == (n, T)
    assert ids.dtype == segments.dtype == torch.long
    assert sum(drawn.values()) == n * T
    pieces = []
    for row, numbers in zip(ids, segments):
        counts = numbers.bincount()
        assert counts[0] == 0, "no slot is padding"
        assert (numbers.diff() >= 0).all()
        pieces += row.split(counts[1:].tolist())
    return {name: tokens / (n * T) for name, tokens in drawn.items()}, pieces


def test_token_shares_follow_the_weights_whatever_the_lengths():
    """Short documents are drawn more often; one longer than the context counts as a window."""
    sources = {
        "short": Source([torch.full((5,), 1)] * 10, val=[], weight=6.0),
        "long": Source([torch.full((30,), 2)] * 10, val=[], weight=3.0),
        "book": Source([torch.full((3000,), 3)], val=[], weight=1.0),
        "never": Source([torch.full((9,), 4)], val=[], weight=0.0),
    }
    for n in (4, 4000):
        shares, pieces = draw(sources, n)
        want = {"short": 0.6, "long": 0.3, "book": 0.1, "never": 0}
        assert shares == pytest.approx(want, abs=30 / (n * 32))
        # The numbers in `drawn` are those of the rows.
        counts = torch.cat(pieces).bincount(minlength=5) / (n * 32)
        assert_close(counts[1:].double(), torch.tensor(list(shares.values())).double(), 1e-6)


def test_token_shares_go_on_from_those_before():
    a = Source([torch.full((8,), 1)], val=[], weight=1.0)
    b = Source([torch.full((8,), 2)], val=[], weight=1.0)
    drawn = {"a": 160, "b": 0}
    ids, _ = draw_rows({"a": a, "b": b}, drawn, 160, 32, random.Random(0))
    assert (ids == 2).all()
    assert drawn == {"a": 160, "b": 160}


def test_a_window_is_the_beginning_of_a_document_or_any_part_of_a_long_one():
    documents = [torch.arange(100, 140), torch.arange(7)]
    _, pieces = draw({"a": Source(documents, val=[], weight=1.0)})
    starts = set()
    ends = set()
    for ids in map(torch.Tensor.tolist, pieces):
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        starts.add(ids[0])
        ends.add(ids[-1])
    assert starts == {0} | set(range(100, 109))
    assert ends >= {6, 139}


@pytest.mark.parametrize("T", [1, 2, 3, 7])
def test_cut_lets_every_token_but_the_first_be_predicted_once(T):
    for n in range(1, 40):
        pieces = cut(torch.arange(n), T)
        assert all(1 <= len(p) <= T for p in pieces)
        assert pieces[0][0] == 0
        if T > 1:  # with a context of one token nothing is predicted
            assert torch.cat([p[1:] for p in pieces]).tolist() == list(range(1, n))
        if n <= T:
            assert len(pieces) == 1


def times_predicted(sources, n_tokens, T, n_rows):
    """Return how often each of n_tokens different ids is predicted in n_rows drawn rows."""
    drawn = dict.fromkeys(sources, 0)
    ids, segments = draw_rows(sources, drawn, n_rows * T, T, random.Random(0))
    return ids[:, 1:][predicted(segments)].bincount(minlength=n_tokens)


def test_documents_of_all_lengths_are_read_evenly_and_so_are_their_ends(tmp_path, monkeypatch):
    """Each token is an id of its own, so that it can be counted."""
    T = 32
    lengths = [5, 20, 31, 32, 33, 34, 50, 62, 63, 64, 65, 100, 400, 1500] * 4
    total = sum(lengths)

    class Numbers:
        def encode_ordinary(self, text):
            return list(map(int, text.split()))

    numbers = iter(range(total))
    documents = [" ".join(str(next(numbers)) for _ in range(n)) + "\n" for n in lengths]
    path = write_documents(tmp_path / "a.txt", documents)
    monkeypatch.setattr("data.text.end_of", lambda enc: total)
    source = read_corpus(path, Numbers(), T, 0.01)["a"]
    pieces = [p[p < total] for p in source.train]  # without the end tokens, which are all alike
    counts = times_predicted({"a": source._replace(train=pieces)}, total, T, 40 * total // T)
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    ends = starts[1:] - 1  # without that of the last document, which is for validation
    assert (counts[starts] == 0).all()
    inside = torch.ones(total, dtype=torch.bool)
    inside[starts] = False
    inside[-total // 50 :] = False  # the validation part and the document at the border
    rate = counts[inside].double()
    # A piece may be cut at the end of its row: the last tokens of a piece come less often.
    assert rate.min() > 0.4 * rate.mean()
    assert rate.max() < 2 * rate.mean()
    assert counts[ends].double().mean() > 0.7 * rate.mean()


def test_the_draws_from_short_documents_are_as_they_always_were():
    """Runs on the village can be repeated: none of its documents is longer than the context."""
    documents = [torch.tensor(ids) for ids in random_ids([3, 32, 17, 8, 31, 25, 1], seed=1)]
    assert [p.tolist() for d in documents for p in cut(d, 32)] == [d.tolist() for d in documents]
    ids, _ = draw_rows({"a": Source(documents, [], 1.0)}, {"a": 0}, 96, 32, random.Random(5))
    rng = random.Random(5)
    want = []
    for _ in range(3):
        row = []
        while len(row) < 32:
            row += documents[rng.randrange(7)].tolist()
            rng.randrange(1)
        want.append(row[:32])
    assert ids.tolist() == want


def test_the_cut_at_the_end_of_a_row_favours_no_continuation():
    """Half of the documents end after four tokens, the others go on: so it is in the rows."""
    short = torch.tensor([1, 1, 1, 1, 9])
    long = torch.tensor([1, 1, 1, 1] + [2] * 20)
    _, pieces = draw({"a": Source([short, long], val=[], weight=1.0)}, n=8000)
    fifth = [ids[4].item() for ids in pieces if len(ids) > 4]
    assert fifth.count(9) / len(fifth) == pytest.approx(0.5, abs=0.02)


# Packing and batches


@pytest.mark.parametrize("lengths", [[7, 2, 9, 4, 4, 8, 1], [9, 9, 8, 9, 7, 9, 9], [1, 1, 9]])
def test_by_length_gives_the_numbers_of_one_call_and_their_gradient(lengths):
    torch.manual_seed(0)
    ids = torch.randint(50, (len(lengths), 9))
    inside = (torch.arange(9) < torch.tensor(lengths)[:, None])[..., None]    # (B, 9, 1)
    table = torch.randn(50, 3, requires_grad=True)
    calls = []

    def f(ids):
        calls.append(ids.numel())
        return table[ids].cumsum(1)

    got = by_length(f, ids, torch.tensor(lengths))
    assert got.shape == (len(lengths), 9, 3)
    padding = 1 - sum(lengths) / ids.numel()
    if padding < 0.2:
        assert calls == [ids.numel()]
    else:
        assert sum(calls) < 0.8 * ids.numel()
    want = f(ids)
    torch.testing.assert_close(got * inside, want * inside)
    wanted = torch.autograd.grad((want * inside).sum(), table)[0]
    torch.testing.assert_close(torch.autograd.grad((got * inside).sum(), table)[0], wanted)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_sorted_batches_have_each_row_once_in_the_order_of_length(size):
    lengths = [5, 3, 9, 3, 5, 1, 3]
    rows = list(sorted_batches(lengths, size))
    assert sum(rows, []) == [5, 1, 3, 6, 0, 4, 2]
    assert all(len(batch) == size for batch in rows[:-1])


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


def test_windows_are_the_first_tokens_in_pieces():
    documents = [torch.arange(10), torch.arange(10, 15), torch.arange(15, 40)]
    pieces = windows(documents, T=4, limit=17)
    assert [p.tolist() for p in pieces] == [
        [0, 1, 2, 3],
        [3, 4, 5, 6],
        [6, 7, 8, 9],
        [10, 11, 12, 13],
        [13, 14],
        [15, 16],
    ]


def test_an_epoch_has_every_example_once_and_no_batch_that_is_too_large():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 200))]
        batch_tokens = rng.choice([1, 50, 100, 500, 10**6])
        epoch = batches(lengths, batch_tokens, rng)
        assert sorted(i for b in epoch for i in b) == list(range(len(lengths)))
        for b in epoch:
            assert b
            assert len(b) == 1 or len(b) * max(lengths[i] for i in b) <= batch_tokens


@pytest.mark.parametrize("batch_tokens", [1024, 4096])
def test_batches_are_full_and_have_little_padding(batch_tokens):
    """On lengths as responses have them: many short, a few long."""
    rng = random.Random(0)
    lengths = [min(128, max(12, int(rng.lognormvariate(3.7, 0.5)))) for _ in range(4000)]
    epoch = batches(lengths, batch_tokens, rng)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in epoch)
    assert sum(lengths) > 0.9 * padded
    assert len(epoch) < 1.2 * sum(lengths) / batch_tokens


def test_the_order_is_random_and_follows_the_seed():
    lengths = [10 + i % 90 for i in range(2000)]
    rng = random.Random(0)
    first = batches(lengths, 1000, rng)
    second = batches(lengths, 1000, rng)
    assert first != second
    assert first == batches(lengths, 1000, random.Random(0))
    longest = [max(lengths[i] for i in b) for b in first]
    rising = sum(a <= b for a, b in zip(longest, longest[1:]))
    assert rising < 0.7 * len(longest)  # not from short to long
    # Each epoch puts other examples side by side.
    assert {frozenset(b) for b in first} != {frozenset(b) for b in second}


def test_write_text_keeps_a_link(tmp_path):
    target = tmp_path / "target.txt"
    target.write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_write_text_writes_to_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "row\n")
    assert os.read(reader, 100) == b"row\n"
    os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]


# The text that a checkpoint remembers


def remember(path, data):
    """Write what checkpoint_text reads of a checkpoint."""
    save_checkpoint(path, data=str(data), val_fraction=0.2, mixture="")


@pytest.mark.parametrize("folder", ["moved", "moved/deeper"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_text_that_moved_with_its_checkpoint_is_found(tmp_path, monkeypatch, folder, absolute):
    """out/gpt.pt remembers out/data/pretrain, and out/ becomes another folder."""
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "out" / "data" / "pretrain" / "a.txt", random_documents([30]))
    remember("out/gpt.pt", tmp_path / "out/data/pretrain" if absolute else "out/data/pretrain")
    before = checkpoint_text("out/gpt.pt", ENC, 16)
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    (tmp_path / "out").rename(tmp_path / folder)
    monkeypatch.chdir("/")
    after = checkpoint_text(tmp_path / folder / "gpt.pt", ENC, 16)
    assert after.keys() == before.keys()
    assert all(torch.equal(a, b) for a, b in zip(after["a"].train, before["a"].train))


def test_a_text_that_is_gone_is_named_with_what_to_type(tmp_path):
    remember(tmp_path / "gpt.pt", "gone/text.txt")
    with pytest.raises(UserError, match="gone/text.txt.*--text.*--ptx 0"):
        checkpoint_text(tmp_path / "gpt.pt", ENC, 16)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_remembered_device_or_pipe_is_not_read(tmp_path):
    """It might never end. A checkpoint of a stranger could name it."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/zero", "/dev/stdin", tmp_path / "pipe"):
        remember(tmp_path / "gpt.pt", name)
        with pytest.raises(UserError, match="text is gone"):
            checkpoint_text(tmp_path / "gpt.pt", ENC, 16)
