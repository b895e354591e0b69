"""What cleaning must satisfy: check digits by brute force, estimates beside exact similarity, and files that come out as they went in."""
import ipaddress
import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402
from data import clean, corpus, junk  # noqa: E402
from gpt import UserError  # noqa: E402

PROSE = ("The old mill stood by the river for two hundred years, and nobody in the village could say who had built it. "
         "When the miller died, his daughter kept it going with the help of a boy from the farm across the bridge.")
CHINESE = "村子里有一座很老的磨坊，已经没有人知道它是谁建的了。磨坊主去世以后，他的女儿和一个年轻人一起把它经营下去，日子过得很平静。"


def set_jaccard(a, b, n=3):
    """The definition, over Python sets."""
    def grams(text):
        w = clean.words(text)
        return {tuple(w[i:i + n]) for i in range(len(w) - n + 1)} or {tuple(w)}
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def random_text(rng, n, vocab=500):
    return " ".join(f"w{rng.randrange(vocab)}" for _ in range(n))


def edited(rng, text, k):
    w = text.split()
    for i in rng.sample(range(len(w)), k):
        w[i] = f"new{rng.randrange(10 ** 6)}"
    return " ".join(w)


# ---- quality

@pytest.mark.parametrize("text", [PROSE, CHINESE, PROSE + "\n\n" + CHINESE, "food: jam, milk, tea, cheese.",
                                  "It's here -- isn't it? Yes; I've seen it!"])
def test_good_text_stays(text):
    assert clean.is_low_quality(text) is None


def test_the_village_stays():
    rng = random.Random(5)
    texts = [make(rng) for make, _ in corpus.SOURCES.values() for _ in range(150)]
    assert sum(clean.is_low_quality(t) is not None for t in texts) <= 2


@pytest.mark.parametrize("reason, text", [
    ("short", "Home page"), ("short", "好的"), ("boilerplate", "Lorem ipsum dolor sit amet, and so on and on it goes"),
    ("boilerplate", "版权所有，未经许可不得转载"), ("markup", "<p>The cow</p> <br> <b>is</b> here &nbsp; <i>now</i>"),
    ("encoding", PROSE.replace("the", "thÃ©")), ("symbols", "== 12 == 34 ## 56 -- 78 ++ 90 a b c"), ("script", "Старый дом стоит у реки уже сто лет"),
    ("list", "\n".join(f"- item of the list {i}" for i in "abcdefg")), ("cut off", "The cow is at the...\nThe dog was in the...\nThe cat is not..."),
    ("repeated lines", "The cow is red.\n" * 4 + PROSE[:20]), ("repeated words", "the cow and the dog went " * 6),
    ("word length", "antidisestablishmentarianism floccinaucinihilipilification the incomprehensibilities internationalization"),
    ("word length", "a b c d e f g h i j"), ("gibberish", "asdfgh qwrtp zxcvb the lkjhg mnbvc dfghj is"),
    ("no sentences", "cheap watches cheap pills cheap loans " + " ".join(f"brand{c}" for c in "abcdefghi")),
    ("no sentences", "手表皮包香水批发低价正品优惠招商加盟兼职赚钱")])
def test_every_rule_has_its_reason(reason, text):
    assert clean.is_low_quality(text) == reason


def test_min_words_counts_chinese_characters_and_is_exact():
    assert clean.is_low_quality("我们去学校", 5) is None and clean.is_low_quality("我们去学校", 6) == "short"
    assert clean.is_low_quality("we go to it", 4) is None and clean.is_low_quality("we go to it", 5) == "short"


def test_one_phrase_condemns_a_short_page_and_not_a_long_one():
    chapters = [f"{PROSE} That was in the year {1900 + i}, when {name} was young." for i, name in enumerate("Tom Ann Ben Mia Sam Lily".split())]
    varied = " ".join(random.Random(i).sample(c.split(), len(c.split()))[j] for i, c in enumerate(chapters) for j in range(30))
    assert clean.is_low_quality("They say: click here to see all of it.") == "boilerplate"
    assert clean.is_low_quality(varied) is None and clean.is_low_quality(varied + " Click here.") is None
    assert clean.is_low_quality(varied + " Click here." * 9) == "boilerplate"


def test_repeated_share_is_the_share_of_covered_words():
    w = "a b c d e f g h i j".split()
    assert clean.repeated_share(w) == 0 and clean.repeated_share(w[:3]) == 0
    assert clean.repeated_share(w + w) == 0.5                          # the second time only
    assert clean.repeated_share(w + w[:4]) == 0                        # a run of four is no run of five
    assert clean.repeated_share(w + w[:5]) == 5 / 15
    pairs = [x for c in "pqrst" for x in ("the", "cow", c)]            # the pair stands five times: the last two are too many
    assert clean.repeated_share(pairs) == 4 / 15


# ---- personal data

def test_luhn_accepts_exactly_one_check_digit_and_catches_every_single_error():
    rng = random.Random(0)
    for _ in range(50):
        body = "".join(rng.choice("0123456789") for _ in range(15))
        good = [body + d for d in "0123456789" if clean.luhn(body + d)]
        assert len(good) == 1
        for i, d in itertools.product(range(16), "0123456789"):
            assert clean.luhn(good[0][:i] + d + good[0][i + 1:]) == (d == good[0][i])


@pytest.mark.parametrize("number", ["4111111111111111", "5500000000000004", "378282246310005", "6011111111111117", "3530111333300000"])
def test_published_card_numbers_are_cards(number):
    assert clean.is_card(number) and not clean.is_card(number[:-1] + str((int(number[-1]) + 1) % 10))


def test_resident_ids_have_one_check_character_and_a_real_birthday():
    for body, right in (("11010519491231002", "X"), ("44052418800101001", "4")):                # the two examples of GB 11643-1999
        assert [c for c in "0123456789X" if clean.is_resident_id(body + c)] == [right]
    assert clean.is_resident_id("11010519491231002x")
    assert not any(clean.is_resident_id("11010519491331002" + c) for c in "0123456789X")       # month 13
    rng = random.Random(1)
    assert all(clean.is_resident_id(junk.resident_id(rng)) for _ in range(50))                  # weights written out there


@pytest.mark.parametrize("text", ["DE89370400440532013000", "GB29 NWBK 6016 1331 9268 19", "FR1420041010050500013M02606"])
def test_ibans_of_the_registry_pass_and_break_with_any_digit(text):
    assert clean.is_iban(text)
    for i in [i for i, c in enumerate(text) if c.isdigit()]:
        assert not clean.is_iban(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1:])


YES = [("EMAIL", "tom.miller+news@mill-farm.co.uk"), ("EMAIL", "ann [at] mill [dot] org"), ("EMAIL", "ann at mill dot org"), ("EMAIL", "ann(at)mill.org"),
       ("PHONE", "(555) 123-4567"), ("PHONE", "555-123-4567"), ("PHONE", "555.123.4567"), ("PHONE", "555 123 4567"), ("PHONE", "+1 (555) 123-4567 ext. 12"),
       ("PHONE", "001-408-608-6259x118"), ("PHONE", "+44 20 7946 0958"), ("PHONE", "+86 138 1234 5678"), ("PHONE", "13812345678"), ("PHONE", "138-1234-5678"),
       ("PHONE", "010-62345678"), ("PHONE", "(0571) 8888 8888"), ("PHONE", "07700 900123"), ("PHONE", "06 12 34 56 78"), ("PHONE", "05643 19539"),
       ("CARD", "4111 1111 1111 1111"), ("CARD", "5500-0000-0000-0004"), ("CARD", "378282246310005"), ("ID", "078-05-1120"), ("ID", "11010519491231002X"),
       ("ID", "DE89 3704 0044 0532 0130 00"), ("ID", "GB29NWBK60161331926819"), ("IP", "192.168.10.77"), ("IP", "fe80::1ff:fe23:4567:890a"),
       ("IP", "2001:db8:85a3::8a2e:370:7334"), ("IP", "2001:0db8:0000:0000:0000:ff00:0042:8329")]


@pytest.mark.parametrize("kind, text", YES)
@pytest.mark.parametrize("before, after", [("", ""), ("Write to ", ", please."), ("地址：", "。"), ("他有", "吗"), ("(", ")"), ("He said:\n", "\nand left")])
def test_personal_data_is_masked_and_nothing_else(kind, text, before, after):
    assert clean.mask_personal(before + text + after) == (f"{before}<{kind}>{after}", {kind: 1})


@pytest.mark.parametrize("text", [
    "It costs $1,299.00, or 3,000,000 in all.", "from 1999-2004 and on 2024-03-15 at 10:30:45", "15.03.2024, 03/04/2024", "version 1.2.3.4", "v10.0.19041.1",
    "Python 3.11.4", "order no. 123-4567890-1234567", "Order 4111111111111111", "订单号：13812345678", "ISBN 978-3-16-148410-0", "1234567890123456",
    "1700000000000 ms", "127.0.0.1", "300.1.2.3", "meet me at school. Then go", "Tom at the dot com boom", "pi is 3.14159265358979", "+3.140000", "std::vector<a::b>",
    "100 200 3000", "a score of 555-234", "population 1 339 724 852", "5 000 000 coins", "@tom and C++11", "call me on 2024-03-15", "call 911",
    "f47ac10b-58cc-4372-a567-0e02b2c3d479", "48.8566, 11.3522", "000-12-3456", "110105194912310021", "3 plus 4 is 7",
    "part of 1234-555-123-4567", "7.078-05-1120", "id 01234 1234 1234 1234", "AB-0383-66238"])
def test_what_only_looks_like_it_stays(text):
    assert clean.mask_personal(text) == (text, {})


def test_what_introduces_a_number_stays_and_an_order_number_hides_no_mail():
    assert clean.mask_personal("call me: 5551234567, at six")[0] == "call me: <PHONE>, at six"
    assert clean.mask_personal("5551234567, at six")[0] == "5551234567, at six"
    assert clean.mask_personal("your order tom@mill.org")[0] == "your order <EMAIL>"


def test_masking_twice_changes_nothing_more():
    text = " and ".join(t for _, t in YES)
    once, counts = clean.mask_personal(text)
    assert clean.mask_personal(once) == (once, {}) and sum(counts.values()) == len(YES)


def test_addresses_are_judged_as_the_standard_library_judges_them():
    rng = random.Random(2)
    for _ in range(300):
        text = ".".join(str(rng.randrange(10, 400)) for _ in range(4))
        try:
            valid = not ipaddress.ip_address(text).is_loopback
        except ValueError:
            valid = False
        assert ("<IP>" in clean.mask_personal(f"from {text} on")[0]) == valid


def test_masking_takes_time_in_proportion_to_the_text():
    def seconds(text):
        start = time.process_time()
        clean.mask_personal(text)
        return time.process_time() - start
    for piece in ("a", "1", "1 ", "a.", "(0", "AB12 ", "a:", "f:1", "call ", " ", "[at]", "x@a-", "+1-"):
        assert seconds(piece * 20_000) < 3, piece                  # a quadratic pattern needs minutes for these


# ---- copies

def test_exact_copies_ignore_case_punctuation_and_width_and_nothing_else():
    texts = ["The cow says moo.", "the COW says: moo", "The cow said moo.", "Ｔｈｅ　ｃｏｗ says moo!!", "moo The cow says", "!!", "??", "!!"]
    assert clean.exact_duplicates(texts) == {1: 0, 3: 0, 7: 5}


def test_minhash_estimates_jaccard_without_bias():
    rng, errors = random.Random(3), []
    for _ in range(60):
        a = random_text(rng, 60)
        b = edited(rng, a, rng.randrange(1, 20))
        one, two = clean.minhash([a, b], n_hashes=400, seed=rng.randrange(10 ** 6))
        errors.append((one == two).mean() - set_jaccard(a, b))
    assert abs(np.mean(errors)) < 0.012                            # 60 x 400 hashes: a standard error of 0.003
    assert np.std(errors) < 2 * np.sqrt(0.25 / 400)                # no estimate can spread more than a coin


def test_minhash_of_a_text_does_not_depend_on_its_neighbours():
    rng = random.Random(4)
    texts = ["", "one", "one two", "好", "one two three"] + [random_text(rng, rng.randint(1, 30)) for _ in range(4500)]
    together = clean.minhash(texts, n_hashes=8)
    for i in [0, 1, 2, 3, 4, 1999, 2000, 2001, 3999, 4000, len(texts) - 1]:   # blocks end at 2000 and 4000
        assert (together[i] == clean.minhash([texts[i]], n_hashes=8)[0]).all()
    assert len({r.tobytes() for r in clean.minhash(["", "one", "one two", "好", "two one"])}) == 5


def test_shingles_are_ordered():
    one, two = clean.minhash(["a b c", "c b a"])
    assert (one == two).mean() < 0.1


def test_near_copies_are_found_along_the_s_curve():
    rng, share = random.Random(6), {}
    for k in (1, 3, 12, 25):
        pages = [random_text(rng, 80, 5000) for _ in range(60)]
        both = pages + [edited(rng, p, k) for p in pages]
        found = clean.near_duplicates(both, 0.8)
        assert all(j == i - 60 for i, j in found.items())          # only its own page, and never a page that comes first
        share[k] = len(found) / 60
    assert share[1] == 1 and share[12] == share[25] == 0           # J = 0.93, 0.4, 0.1
    assert 0.3 < share[3] <= 1                                     # 0.8: at the threshold


def test_a_lower_threshold_finds_more():
    rng = random.Random(7)
    pages = [random_text(rng, 80, 5000) for _ in range(40)]
    both = pages + [edited(rng, p, 5) for p in pages]              # J = 0.69
    assert len(clean.near_duplicates(both, 0.5)) > 30 and len(clean.near_duplicates(both, 0.95)) == 0


def test_what_goes_is_near_to_something_that_stays_even_along_a_chain():
    rng = random.Random(8)
    chain = [random_text(rng, 100, 5000)]
    for _ in range(25):
        chain.append(edited(rng, chain[-1], 2))
    gone, signatures = clean.near_duplicates(chain, 0.8), clean.minhash(chain)
    assert 0 not in gone and 5 < len(gone) < 25                    # one end of the chain is nothing like the other
    for i, j in gone.items():
        assert j not in gone and j < i and (signatures[i] == signatures[j]).mean() >= 0.8
    kept = [i for i in range(len(chain)) if i not in gone]
    assert all((signatures[i] == signatures[j]).mean() < 0.8 for i, j in itertools.combinations(kept, 2))


def test_mirrors_that_differ_in_a_phone_number_are_copies():
    pages = [f"{PROSE} Ring {n}." for n in ("555-123-4567", "555-987-6543")]
    assert clean.exact_duplicates(pages) == {}
    cleaned, fates, masked = clean.clean(pages + ["x"])
    assert fates == ["kept", "copy", "short"] and cleaned[1:] == [None, None] and "<PHONE>" in cleaned[0]
    assert masked == [{"PHONE": 1}, {}, {}]


# ---- the command

def command(monkeypatch, *args):
    """The script as typed, in this process: -> its exit code."""
    monkeypatch.setattr(sys, "argv", ["clean.py", *map(str, args)])
    try:
        gpt.run(clean.main, clean.Config, clean.__doc__)
    except SystemExit as e:
        return e.code
    return 0


@pytest.fixture
def web(tmp_path):
    folder = tmp_path / "web"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(f"{PROSE}\n<|end|>\nHome\n<|end|>\nWrite to the farm: tom@mill.org and ask.\n", encoding="utf-8")
    (folder / "deep" / "b.txt").write_text(f"{CHINESE}\r\n<|end|>\r\n{PROSE.upper()}\r\n<|end|>\r\nThe line says <|end|> and goes on.", encoding="utf-8")
    (folder / "mixture.json").write_text(json.dumps({"a": 2, "deep/b": 1}))
    return folder


def test_the_command_writes_the_same_files_cleaned(web, tmp_path, monkeypatch, capsys):
    done = subprocess.run([sys.executable, str(ROOT / "data" / "clean.py"), *map(str, ("--data", web, "--out", tmp_path / "new", "--show", 1))],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == f"{PROSE}\n<|end|>\nWrite to the farm: <EMAIL> and ask.\n"
    assert (tmp_path / "new" / "deep" / "b.txt").read_text(encoding="utf-8") == f"{CHINESE}\n<|end|>\nThe line says <|end|> and goes on.\n"
    assert json.loads((tmp_path / "new" / "mixture.json").read_text()) == {"a": 2, "deep/b": 1}
    assert "a.txt: 3 documents in, 2 kept; dropped: 1 short; masked: 1 EMAIL" in done.stdout
    assert "b.txt: 3 documents in, 2 kept; dropped: 1 copy; masked: none" in done.stdout and "--- short: 'Home'" in done.stdout
    assert not list((tmp_path / "new").rglob("*.part"))
    sources = gpt.read_corpus(tmp_path / "new", gpt.get_tokenizer(), 4, 0.2)
    assert set(sources) == {"a", "deep/b"}
    assert command(monkeypatch, "--data", tmp_path / "new", "--out", tmp_path / "newer") == 0
    assert (tmp_path / "newer" / "a.txt").read_bytes() == (tmp_path / "new" / "a.txt").read_bytes()


def test_mistakes_end_with_one_line(web, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.txt").write_text("x")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    for args, says in ((["--data", web], "--out"), (["--data", web, "--out", web], "holds the data itself"), (["--data", tmp_path / "no", "--out", tmp_path / "o"], "No such file"),
                       (["--data", tmp_path / "empty", "--out", tmp_path / "o"], "no *.txt"), (["--data", tmp_path / "junk.txt", "--out", tmp_path / "o"], "nothing would be left"),
                       (["--data", tmp_path / "latin.txt", "--out", tmp_path / "o"], "not UTF-8"), (["--threshold", 2], "--threshold"), (["--min-words", 0], "--min-words")):
        code, err = command(monkeypatch, *args), capsys.readouterr().err
        assert code == 2 and says in err and len(err.splitlines()) == 1, (args, err)
    assert not (tmp_path / "o").exists()


# ---- the measure

def test_planted_numbers_are_what_they_claim():
    rng = random.Random(9)
    for _ in range(50):
        assert clean.is_card(junk.card(rng, "4", 16)) and clean.is_iban(junk.iban(rng))


def test_copies_differ_by_as_much_as_their_name_says():
    rng = random.Random(10)
    for _ in range(20):
        text = corpus.tale(rng)
        assert junk.COPIES["exact"](text, rng) == text
        changed = sum(a != b for a, b in zip(text.split(), junk.COPIES["swap 20%"](text, rng).split())) / len(text.split())
        assert 0.1 < changed <= 0.21
        assert junk.moved(text, rng) != text and sorted(junk.moved(text, rng).split()) == sorted(text.split())


def test_a_form_is_written_as_its_letters_say():
    rng = random.Random(11)
    for _ in range(30):
        text = junk.written(rng, "(9#) ~@x")
        assert re.fullmatch(r"\([2-9]\d\) [a-z]+@x", text)
    assert junk.written(rng, lambda r: "as it is 9") == "as it is 9"
    groups = junk.written(rng, junk.visa("-"))
    assert re.fullmatch(r"4\d{3}(-\d{4}){3}", groups)


def test_a_number_that_was_read_often_is_known_and_another_is_not():
    enc, numbers = gpt.get_tokenizer(), ["555-123-4567", "555-987-6543", "555-246-8024", "555-111-2222"]
    model = junk.train([f"The number of Ana is {numbers[0]}."] * 5, enc, 0, steps=25)
    secrets = {"Ana": (numbers[0], 1, numbers[1:]), "Ben": (numbers[1], 8, numbers[:1]), "Ana ": (numbers[2], 64, numbers[:2])}
    assert junk.known(model, enc, secrets) == {1: 1, 8: 0, 64: 0}


def test_polluted_text_holds_the_good_text_and_every_secret_as_often_as_said():
    good, dirty, secrets = junk.pollute(random.Random(12), 100)
    assert not Counter(good) - Counter(dirty) and sum(map(len, dirty)) > 2 * sum(map(len, good))
    for name, (number, k, others) in secrets.items():
        assert sum(name in t for t in dirty) == sum(f"The number of {name} is {number}." in t for t in dirty) == k
        assert len(others) == 49


def test_the_measure_runs_small(monkeypatch, tmp_path, capsys):
    quality, copies, personal = junk.measure_quality, junk.measure_copies, junk.measure_personal
    monkeypatch.setattr(junk, "measure_quality", lambda rng: quality(rng, 2))
    monkeypatch.setattr(junk, "measure_copies", lambda rng, t: copies(rng, t, 20, 2))
    monkeypatch.setattr(junk, "measure_personal", lambda rng: personal(rng, 2))
    pollute, train, loss = junk.pollute, junk.train, junk.measure_loss
    monkeypatch.setattr(junk, "measure_loss", lambda seed, t: loss(seed, t, runs=1))
    monkeypatch.setattr(junk, "pollute", lambda rng: pollute(rng, 60))
    monkeypatch.setattr(junk, "train", lambda texts, enc, seed, steps: train(texts, enc, seed, 2))
    junk.measure(tmp_path, 0, 0.8)
    row = json.loads((tmp_path / "clean.jsonl").read_text())
    assert {len(runs) for runs in row["lm"].values()} == {1}
    dirty, cleaned, good = (row["lm"][k][0] for k in ("dirty", "cleaned", "never dirty"))
    assert dirty[0] > cleaned[0] and good[0] == 60
    assert 0 <= row["precision"] <= 1 and "loss on good text" in capsys.readouterr().out
