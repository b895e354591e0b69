"""Tests of data/clean.py.

Check digits are tested by brute force, MinHash beside the exact similarity, files by a round trip.
"""
import ipaddress
import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import clean, corpus, junk
from data.text import read_corpus
from data.tokenizer import get_tokenizer
from scaffold.cli import start

ROOT = Path(__file__).resolve().parent.parent
PROSE = (
    "The old mill stood by the river for two hundred years, and nobody in the village could say "
    "who had built it. When the miller died, his daughter kept it going with the help of a boy "
    "from the farm across the bridge."
)
CHINESE = (
    "村子里有一座很老的磨坊，已经没有人知道它是谁建的了。"
    "磨坊主去世以后，他的女儿和一个年轻人一起把它经营下去，日子过得很平静。"
)


def jaccard(a, b, n=3):
    """Compute the Jaccard similarity of two documents by its definition, over Python sets."""

    def grams(text):
        words = clean.split_words(text)
        return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)} or {tuple(words)}

    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def random_text(rng, n, vocab=500):
    return " ".join(f"w{rng.randrange(vocab)}" for _ in range(n))


def replace_words(rng, text, k):
    """Replace k words by new ones."""
    words = text.split()
    for i in rng.sample(range(len(words)), k):
        words[i] = f"new{rng.randrange(10**6)}"
    return " ".join(words)


# Quality


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(PROSE, id="English"),
        pytest.param(CHINESE, id="Chinese"),
        pytest.param(PROSE + "\n\n" + CHINESE, id="both"),
        pytest.param("food: jam, milk, tea, cheese.", id="list"),
        pytest.param("It's here -- isn't it? Yes; I've seen it!", id="dialogue"),
    ],
)
def test_good_text_is_kept(text):
    assert clean.is_low_quality(text) is None


def test_the_village_is_kept():
    rng = random.Random(5)
    texts = [make(rng) for make, _ in corpus.SOURCES.values() for _ in range(150)]
    assert sum(clean.is_low_quality(text) is not None for text in texts) <= 4


@pytest.mark.parametrize(
    "reason, text",
    [
        ("short", "Home page"),
        ("short", "好的"),
        ("boilerplate", "Lorem ipsum dolor sit amet, and so on and on it goes"),
        ("boilerplate", "版权所有，未经许可不得转载"),
        ("markup", "<p>The cow</p> <br> <b>is</b> here &nbsp; <i>now</i>"),
        ("encoding", PROSE.replace("the", "thÃ©")),
        ("symbols", "== 12 == 34 ## 56 -- 78 ++ 90 a b c"),
        ("script", "Старый дом стоит у реки уже сто лет"),
        ("list", "\n".join(f"- item of the list {c}" for c in "abcdefg")),
        ("cut off", "The cow is at the...\nThe dog was in the...\nThe cat is not..."),
        ("repeated lines", "The cow is red.\n" * 4 + PROSE[:20]),
        ("repeated words", "the cow and the dog went " * 6),
        (
            "word length",
            "antidisestablishmentarianism floccinaucinihilipilification the "
            "incomprehensibilities internationalization",
        ),
        ("word length", "a b c d e f g h i j"),
        ("gibberish", "asdfgh qwrtp zxcvb the lkjhg mnbvc dfghj is"),
        (
            "no sentences",
            "cheap watches cheap pills cheap loans branda brandb brandc brandd brande brandf "
            "brandg brandh brandi",
        ),
        ("no sentences", "手表皮包香水批发低价正品优惠招商加盟兼职赚钱"),
    ],
)
def test_a_dropped_document_has_the_reason_of_its_rule(reason, text):
    assert clean.is_low_quality(text) == reason


@pytest.mark.parametrize("text, n_words", [("我们去学校", 5), ("we go to it", 4)])
def test_min_words_is_exact_and_counts_chinese_characters(text, n_words):
    assert clean.is_low_quality(text, n_words) is None
    assert clean.is_low_quality(text, n_words + 1) == "short"


def test_one_boilerplate_phrase_drops_a_short_document_but_not_a_long_one():
    chapters = []
    for i, name in enumerate(["Tom", "Ann", "Ben", "Mia", "Sam", "Lily"]):
        words = f"{PROSE} That was in the year {1900 + i}, when {name} was young.".split()
        chapters += random.Random(i).sample(words, len(words))[:30]
    long = " ".join(chapters)
    assert clean.is_low_quality("They say: click here to see all of it.") == "boilerplate"
    assert clean.is_low_quality(long) is None
    assert clean.is_low_quality(long + " Click here.") is None
    assert clean.is_low_quality(long + " Click here." * 9) == "boilerplate"


def test_repeated_share_is_the_share_of_covered_words():
    words = list("abcdefghij")
    assert clean.repeated_share(words) == 0
    assert clean.repeated_share(words[:3]) == 0
    assert clean.repeated_share(words + words) == 0.5  # only the second run is a repetition
    assert clean.repeated_share(words + words[:4]) == 0  # four words are not a run of five
    assert clean.repeated_share(words + words[:5]) == 5 / 15


def test_a_pair_of_words_is_a_repetition_from_the_fourth_time_on():
    words = []
    for c in "pqrst":
        words += ["the", "cow", c]  # five times: the last two are too many
    assert clean.repeated_share(words) == 4 / 15


# Check digits


def test_luhn_accepts_one_check_digit_and_detects_every_single_error():
    rng = random.Random(0)
    for _ in range(50):
        body = "".join(rng.choice("0123456789") for _ in range(15))
        good = [body + d for d in "0123456789" if clean.luhn(body + d)]
        assert len(good) == 1
        for i, d in itertools.product(range(16), "0123456789"):
            assert clean.luhn(good[0][:i] + d + good[0][i + 1:]) == (d == good[0][i])


@pytest.mark.parametrize(
    "number",
    [
        "4111111111111111",
        "5500000000000004",
        "378282246310005",
        "6011111111111117",
        "3530111333300000",
    ],
)
def test_published_card_numbers_are_cards(number):
    other_check_digit = str((int(number[-1]) + 1) % 10)
    assert clean.is_card(number)
    assert not clean.is_card(number[:-1] + other_check_digit)


@pytest.mark.parametrize("body, check", [("11010519491231002", "X"), ("44052418800101001", "4")])
def test_the_examples_of_gb_11643_have_one_check_character(body, check):
    assert [c for c in "0123456789X" if clean.is_resident_id(body + c)] == [check]


def test_a_resident_id_may_end_in_a_small_x():
    assert clean.is_resident_id("11010519491231002x")


def test_a_resident_id_needs_a_real_birthday():
    assert not any(clean.is_resident_id("11010519491331002" + c) for c in "0123456789X")


def test_resident_ids_by_the_printed_weights_are_accepted():
    rng = random.Random(1)
    assert all(clean.is_resident_id(junk.resident_id(rng)) for _ in range(50))


@pytest.mark.parametrize(
    "iban",
    ["DE89370400440532013000", "GB29 NWBK 6016 1331 9268 19", "FR1420041010050500013M02606"],
)
def test_ibans_of_the_registry_are_accepted_and_fail_with_any_digit_changed(iban):
    assert clean.is_iban(iban)
    for i, c in enumerate(iban):
        if c.isdigit():
            assert not clean.is_iban(iban[:i] + str((int(c) + 1) % 10) + iban[i + 1:])


# Masks

PERSONAL = [
    ("EMAIL", "tom.miller+news@mill-farm.co.uk"),
    ("EMAIL", "ann [at] mill [dot] org"),
    ("EMAIL", "ann at mill dot org"),
    ("EMAIL", "ann(at)mill.org"),
    ("PHONE", "(555) 123-4567"),
    ("PHONE", "555-123-4567"),
    ("PHONE", "555.123.4567"),
    ("PHONE", "555 123 4567"),
    ("PHONE", "+1 (555) 123-4567 ext. 12"),
    ("PHONE", "001-408-608-6259x118"),
    ("PHONE", "+44 20 7946 0958"),
    ("PHONE", "+86 138 1234 5678"),
    ("PHONE", "13812345678"),
    ("PHONE", "138-1234-5678"),
    ("PHONE", "010-62345678"),
    ("PHONE", "(0571) 8888 8888"),
    ("PHONE", "07700 900123"),
    ("PHONE", "06 12 34 56 78"),
    ("PHONE", "05643 19539"),
    ("CARD", "4111 1111 1111 1111"),
    ("CARD", "5500-0000-0000-0004"),
    ("CARD", "378282246310005"),
    ("ID", "078-05-1120"),
    ("ID", "11010519491231002X"),
    ("ID", "DE89 3704 0044 0532 0130 00"),
    ("ID", "GB29NWBK60161331926819"),
    ("IP", "192.168.10.77"),
    ("IP", "fe80::1ff:fe23:4567:890a"),
    ("IP", "2001:db8:85a3::8a2e:370:7334"),
    ("IP", "2001:0db8:0000:0000:0000:ff00:0042:8329"),
]


@pytest.mark.parametrize("kind, text", PERSONAL)
@pytest.mark.parametrize(
    "before, after",
    [
        ("", ""),
        ("Write to ", ", please."),
        ("地址：", "。"),
        ("他有", "吗"),
        ("(", ")"),
        ("He said:\n", "\nand left"),
    ],
)
def test_personal_data_is_masked_and_nothing_else(kind, text, before, after):
    masked, counts = clean.mask_personal(before + text + after)
    assert masked == f"{before}<{kind}>{after}"
    assert counts == {kind: 1}


@pytest.mark.parametrize(
    "text",
    [
        "It costs $1,299.00, or 3,000,000 in all.",
        "from 1999-2004 and on 2024-03-15 at 10:30:45",
        "15.03.2024, 03/04/2024",
        "version 1.2.3.4",
        "v10.0.19041.1",
        "Python 3.11.4",
        "order no. 123-4567890-1234567",
        "Order 4111111111111111",
        "订单号：13812345678",
        "ISBN 978-3-16-148410-0",
        "1234567890123456",
        "1700000000000 ms",
        "127.0.0.1",
        "300.1.2.3",
        "meet me at school. Then go",
        "Tom at the dot com boom",
        "pi is 3.14159265358979",
        "+3.140000",
        "std::vector<a::b>",
        "100 200 3000",
        "a score of 555-234",
        "population 1 339 724 852",
        "5 000 000 coins",
        "@tom and C++11",
        "call me on 2024-03-15",
        "call 911",
        "f47ac10b-58cc-4372-a567-0e02b2c3d479",
        "48.8566, 11.3522",
        "000-12-3456",
        "110105194912310021",
        "3 plus 4 is 7",
        "part of 1234-555-123-4567",
        "7.078-05-1120",
        "id 01234 1234 1234 1234",
        "AB-0383-66238",
    ],
)
def test_text_that_only_looks_like_personal_data_stays(text):
    assert clean.mask_personal(text) == (text, {})


@pytest.mark.parametrize(
    "text, masked",
    [
        ("call me: 5551234567, at six", "call me: <PHONE>, at six"),
        ("5551234567, at six", "5551234567, at six"),
        ("your order tom@mill.org", "your order <EMAIL>"),
    ],
)
def test_the_words_before_a_number_can_decide(text, masked):
    assert clean.mask_personal(text)[0] == masked


def test_masking_twice_changes_nothing_more():
    once, counts = clean.mask_personal(" and ".join(text for _, text in PERSONAL))
    assert sum(counts.values()) == len(PERSONAL)
    assert clean.mask_personal(once) == (once, {})


def test_ip_addresses_are_those_of_the_standard_library():
    rng = random.Random(2)
    for _ in range(300):
        text = ".".join(str(rng.randrange(10, 400)) for _ in range(4))
        try:
            valid = not ipaddress.ip_address(text).is_loopback
        except ValueError:
            valid = False
        masked, _ = clean.mask_personal(f"from {text} on")
        assert ("<IP>" in masked) == valid


@pytest.mark.parametrize(
    "piece",
    ["a", "1", "1 ", "a.", "(0", "AB12 ", "a:", "f:1", "call ", " ", "[at]", "x@a-", "+1-"],
)
def test_masking_takes_linear_time(piece):
    start_time = time.process_time()
    clean.mask_personal(piece * 20_000)
    assert time.process_time() - start_time < 3  # a quadratic pattern needs minutes


# Copies


def test_exact_copies_ignore_case_punctuation_and_width_only():
    texts = [
        "The cow says moo.",
        "the COW says: moo",
        "The cow said moo.",
        "Ｔｈｅ　ｃｏｗ says moo!!",
        "moo The cow says",
        "!!",
        "??",
        "!!",
    ]
    assert clean.exact_duplicates(texts) == {1: 0, 3: 0, 7: 5}


def test_minhash_estimates_jaccard_without_bias():
    rng = random.Random(3)
    errors = []
    for _ in range(60):
        a = random_text(rng, 60)
        b = replace_words(rng, a, rng.randrange(1, 20))
        row_a, row_b = clean.minhash([a, b], n_hashes=400, seed=rng.randrange(10**6))
        errors.append((row_a == row_b).mean() - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.012  # 60 x 400 hashes: a standard error of 0.003
    assert np.std(errors) < 2 * np.sqrt(0.25 / 400)  # 0.25 is the largest variance of one hash


def test_the_minhash_of_a_document_does_not_depend_on_the_others():
    rng = random.Random(4)
    texts = ["", "one", "one two", "好", "one two three"]
    texts += [random_text(rng, rng.randint(1, 30)) for _ in range(4500)]
    together = clean.minhash(texts, n_hashes=8)
    for i in [0, 1, 2, 3, 4, 1999, 2000, 2001, 3999, 4000, len(texts) - 1]:  # a block has 2000
        alone = clean.minhash([texts[i]], n_hashes=8)[0]
        assert (together[i] == alone).all(), i


def test_different_short_documents_have_different_minhashes():
    rows = clean.minhash(["", "one", "one two", "好", "two one"])
    assert len({row.tobytes() for row in rows}) == 5


def test_the_order_of_words_counts():
    row_a, row_b = clean.minhash(["a b c", "c b a"])
    assert (row_a == row_b).mean() < 0.1


def test_near_copies_are_found_along_the_s_curve():
    rng = random.Random(6)
    share = {}
    for k in (1, 3, 12, 25):
        pages = [random_text(rng, 80, 5000) for _ in range(60)]
        copies = [replace_words(rng, page, k) for page in pages]
        found = clean.near_duplicates(pages + copies, 0.8)
        assert all(j == i - 60 for i, j in found.items())  # a copy of its own page
        share[k] = len(found) / 60
    assert share[1] == 1  # J = 0.93
    assert 0.3 < share[3] <= 1  # J = 0.8: at the threshold
    assert share[12] == 0  # J = 0.4
    assert share[25] == 0  # J = 0.1


def test_a_lower_threshold_finds_more():
    rng = random.Random(7)
    pages = [random_text(rng, 80, 5000) for _ in range(40)]
    copies = [replace_words(rng, page, 5) for page in pages]  # J = 0.69
    assert len(clean.near_duplicates(pages + copies, 0.5)) > 30
    assert len(clean.near_duplicates(pages + copies, 0.95)) == 0


def test_along_a_chain_every_dropped_document_resembles_one_that_stays():
    rng = random.Random(8)
    chain = [random_text(rng, 100, 5000)]
    for _ in range(25):
        chain.append(replace_words(rng, chain[-1], 2))
    dropped = clean.near_duplicates(chain, 0.8)
    signatures = clean.minhash(chain)
    assert 0 not in dropped
    assert 5 < len(dropped) < 25  # the ends of the chain have nothing in common
    for i, j in dropped.items():
        assert j not in dropped
        assert j < i
        assert (signatures[i] == signatures[j]).mean() >= 0.8
    kept = [i for i in range(len(chain)) if i not in dropped]
    for i, j in itertools.combinations(kept, 2):
        assert (signatures[i] == signatures[j]).mean() < 0.8


def test_mirrors_that_differ_in_a_phone_number_are_copies():
    pages = [f"{PROSE} Ring {number}." for number in ("555-123-4567", "555-987-6543")]
    assert clean.exact_duplicates(pages) == {}
    first, copy, short = clean.clean(pages + ["x"])
    assert "<PHONE>" in first.text
    assert first[1:] == ("kept", {"PHONE": 1})
    assert copy == (None, "copy", {})
    assert short == (None, "short", {})


# The command


def run_command(monkeypatch, *args):
    """Run the script in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["clean.py", *map(str, args)])
    try:
        start(clean.main, clean.Config, clean.__doc__)
    except SystemExit as e:
        return e.code
    return 0


@pytest.fixture
def web(tmp_path):
    """A folder with two files, a mixture, and documents of every kind."""
    folder = tmp_path / "web"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(
        f"{PROSE}\n<|end|>\nHome\n<|end|>\nWrite to the farm: tom@mill.org and ask.\n",
        encoding="utf-8",
    )
    (folder / "deep" / "b.txt").write_text(
        f"{CHINESE}\r\n<|end|>\r\n{PROSE.upper()}\r\n<|end|>\r\n"
        f"The line says <|end|> and goes on.",
        encoding="utf-8",
    )
    (folder / "mixture.json").write_text(json.dumps({"a": 2, "deep/b": 1}))
    return folder


def test_the_command_writes_the_same_files_cleaned(web, tmp_path):
    new = tmp_path / "new"
    command = [sys.executable, ROOT / "data" / "clean.py", "--data", web, "--out", new]
    done = subprocess.run([*command, "--show", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a = (new / "a.txt").read_text(encoding="utf-8")
    b = (new / "deep" / "b.txt").read_text(encoding="utf-8")
    assert a == f"{PROSE}\n<|end|>\nWrite to the farm: <EMAIL> and ask.\n"
    assert b == f"{CHINESE}\n<|end|>\nThe line says <|end|> and goes on.\n"
    assert json.loads((new / "mixture.json").read_text()) == {"a": 2, "deep/b": 1}
    assert not list(new.rglob("*.part"))
    assert "a.txt: 3 documents in, 2 kept; dropped: 1 short; masked: 1 EMAIL" in done.stdout
    assert "b.txt: 3 documents in, 2 kept; dropped: 1 copy; masked: none" in done.stdout
    assert "--- short: 'Home'" in done.stdout


def test_cleaned_files_can_be_read_and_stay_the_same_when_cleaned_again(
    web, tmp_path, monkeypatch
):
    new = tmp_path / "new"
    newer = tmp_path / "newer"
    assert run_command(monkeypatch, "--data", web, "--out", new) == 0
    assert set(read_corpus(new, get_tokenizer(), 4, 0.2)) == {"a", "deep/b"}
    assert run_command(monkeypatch, "--data", new, "--out", newer) == 0
    assert (newer / "a.txt").read_bytes() == (new / "a.txt").read_bytes()


def test_documents_of_json_lines_become_a_text(tmp_path, monkeypatch):
    data = tmp_path / "web.jsonl"
    data.write_text(json.dumps({"text": PROSE}) + "\n" + json.dumps({"text": "Home"}) + "\n")
    assert run_command(monkeypatch, "--data", data, "--out", tmp_path / "new") == 0
    assert (tmp_path / "new" / "web.txt").read_text(encoding="utf-8") == PROSE + "\n"


@pytest.mark.parametrize(
    "args, message",
    [
        ("--out o", "--data"),
        ("--data web", "--out"),
        ("--data web --out web", "the folder of the data itself"),
        ("--data no --out o", "No such file"),
        ("--data empty --out o", "no *.txt"),
        ("--data junk.txt --out o", "nothing would be left"),
        ("--data latin.txt --out o", "not UTF-8"),
        ("--threshold 2", "--threshold"),
        ("--min-words 0", "--min-words"),
    ],
)
def test_mistakes_end_with_one_line(web, tmp_path, monkeypatch, capsys, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.txt").write_text("x")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    code = run_command(monkeypatch, *args.split())
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "o").exists()
