"""Tests of data/tokenizer.py: round trips, special tokens, tokenizers from files and tiktoken."""

import random

import pytest
import tiktoken

from data.tokenizer import SPECIAL as NAMES
from data.tokenizer import end_of, fingerprint, get_tokenizer, token_bytes
from scaffold.cli import UserError
from tiny import END, ENC, SPECIAL, write_tokenizer


def random_string(rng, n):
    """Return n characters of every kind, but no surrogates: those cannot be encoded."""
    kinds = [
        lambda: rng.choice(" \n\r\t'sST1.\x85\u2028\u3000"),
        lambda: chr(rng.randrange(0x20)),
        lambda: rng.choice("abcdefg"),
        lambda: chr(rng.randrange(0x4E00, 0xA000)),
        lambda: chr(rng.randrange(0x1F300, 0x1FB00)),
        lambda: chr(rng.randrange(0xD800)),
        lambda: chr(rng.randrange(0xE000, 0x110000)),
        lambda: rng.choice(NAMES),
    ]
    return "".join(rng.choice(kinds)() for _ in range(n))


STRINGS = [
    "",
    " ",
    "\x00",
    "\ufeffBOM",
    "村里的苹果",
    "👩‍👩‍👧‍👦🇫🇷👍🏽",
    "مرحبا हिन्दी",
    "\r\n" * 99,
    *NAMES,
    "".join(NAMES),
]


def test_any_string_round_trips_and_never_makes_a_special_token():
    rng = random.Random(0)
    special = set(SPECIAL.values())
    for string in STRINGS + [random_string(rng, rng.randint(1, 80)) for _ in range(300)]:
        ids = ENC.encode_ordinary(string)
        assert ENC.decode(ids) == string
        assert not special & set(ids)


def test_the_special_tokens_are_five_ids_behind_the_ordinary_ones():
    ids = [ENC.encode_single_token(name) for name in NAMES]
    assert len(set(ids)) == 5
    assert {"<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"} == set(NAMES)
    assert sorted(ids) == list(range(len(ENC.token_byte_values()), ENC.n_vocab))
    assert ENC.encode_single_token("<|pad|>") != ENC.encode_single_token("<|end|>")


def test_end_of_is_the_id_of_the_end_token():
    assert end_of(ENC) == END


def test_token_bytes_make_the_string_and_special_tokens_have_none():
    table = token_bytes(ENC)
    assert len(table) == ENC.n_vocab
    string = "".join(STRINGS)
    assert b"".join(table[i] for i in ENC.encode_ordinary(string)) == string.encode()
    assert [i for i, b in enumerate(table) if b == b""] == sorted(SPECIAL.values())


@pytest.mark.parametrize("piece", [" ", "a", "\n", "猫", "!", "\u3000"])
def test_a_million_of_one_character_does_not_crash(piece):
    string = piece * (1_000_000 // len(piece.encode())) + "x"
    assert ENC.decode(ENC.encode_ordinary(string)) == string


def test_a_tiktoken_name_gets_our_special_tokens_behind_its_own(theirs):
    enc = get_tokenizer("theirs")
    assert enc.special_tokens_set == {"<|endoftext|>", *NAMES}
    assert enc.encode_single_token("<|endoftext|>") == 256
    assert [enc.encode_single_token(name) for name in NAMES] == [257, 258, 259, 260, 261]
    assert enc.n_vocab == 262
    assert enc.encode_ordinary("a<|end|>") == list(b"a<|end|>")
    with pytest.raises(UserError, match="'gone'"):
        get_tokenizer("gone")


def test_a_tokenizer_from_a_file(tmp_path):
    enc = get_tokenizer(write_tokenizer(tmp_path / "t.json"))
    assert fingerprint(enc) == fingerprint(ENC)
    assert enc.special_tokens_set == ENC.special_tokens_set
    assert {name: enc.encode_single_token(name) for name in NAMES} == SPECIAL
    assert enc.encode_ordinary("The cow, 牛.") == ENC.encode_ordinary("The cow, 牛.")


def test_the_fingerprint_depends_on_the_ids_of_the_special_tokens():
    # Private parts of tiktoken are read here: there is no public way to copy an encoding.
    other = tiktoken.Encoding(
        "other",
        pat_str=ENC._pat_str,
        mergeable_ranks=ENC._mergeable_ranks,
        special_tokens=dict(zip(NAMES, [SPECIAL[name] for name in NAMES[::-1]])),
    )
    assert fingerprint(other) != fingerprint(ENC)


BROKEN_FILES = {
    "empty": b"",
    "a list": b"[]",
    "no entries": b"{}",
    "half an object": b'{"name": "x"',
    "no base64": b'{"name": "x", "pattern": ".", "ranks": ["?"], "special": []}',
    "not UTF-8": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_tokenizer_file_is_named(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="t.json"):
        get_tokenizer(str(path))


@pytest.mark.parametrize("special", [[], NAMES[:2]], ids=["none", "two"])
def test_a_tokenizer_file_without_our_special_tokens_is_named(tmp_path, special):
    path = write_tokenizer(tmp_path / "t.json", special=special)
    with pytest.raises(UserError, match="t.json"):
        get_tokenizer(path)


def test_a_folder_is_no_tokenizer_file(tmp_path):
    path = tmp_path / "t.json"
    path.mkdir()
    with pytest.raises(UserError, match="t.json"):
        get_tokenizer(str(path))


@pytest.mark.parametrize("pattern", [
    r"(\(\g<0>?\))|[\s\S]",
    r"(?<x>\(\g<x>?\))|[\s\S]",
    r"(?P>x)|(?P<x>[\s\S])",
    r"(?R)|[\s\S]",
])
def test_a_pattern_that_calls_itself_is_refused(tmp_path, pattern):
    with pytest.raises(UserError, match="t.json: not a tokenizer file"):
        get_tokenizer(write_tokenizer(tmp_path / "t.json", pattern=pattern))
