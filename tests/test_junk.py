"""Tests of data/junk.py: the planted items are what their names say."""
import os
import random
import re
import subprocess
import sys
from collections import Counter
from functools import partial

from data import clean, corpus, junk
from tiny import ROOT


def test_planted_numbers_have_right_check_digits():
    rng = random.Random(9)
    for _ in range(50):
        assert clean.is_card(junk.card(rng, "4", 16))
        assert clean.is_iban(junk.iban(rng))


def test_copies_differ_as_their_names_say():
    rng = random.Random(10)
    for _ in range(20):
        text = corpus.tale(rng)
        words = text.split()
        assert junk.COPIES["exact"](text, rng) == text
        swapped = junk.COPIES["swap 20%"](text, rng).split()
        changed = sum(a != b for a, b in zip(words, swapped)) / len(words)
        assert 0.1 < changed <= 0.21
        exchanged = junk.COPIES["halves exchanged"](text, rng)
        assert exchanged != text
        assert sorted(exchanged.split()) == sorted(words)


def test_a_template_is_filled_character_by_character():
    rng = random.Random(11)
    for _ in range(30):
        assert re.fullmatch(r"\([2-9]\d\) [a-z]+@x", junk.write_form(rng, "(9#) ~@x"))


def test_a_form_may_be_a_function():
    rng = random.Random(11)
    assert junk.write_form(rng, lambda rng: "as it is 9") == "as it is 9"
    visa = junk.write_form(rng, partial(junk.visa, separator="-"))
    assert re.fullmatch(r"4\d{3}(-\d{4}){3}", visa)


def test_polluted_text_holds_the_good_text_and_every_secret():
    good, dirty, secrets = junk.pollute(random.Random(12), 100)
    assert not Counter(good) - Counter(dirty)
    assert sum(map(len, dirty)) > 2 * sum(map(len, good))
    for person, secret in secrets.items():
        sentence = f"The number of {person} is {secret.number}."
        assert sum(person in text for text in dirty) == secret.n_documents
        assert sum(sentence in text for text in dirty) == secret.n_documents
        assert len(secret.others) == 49


MAKE_DATA = """
import random
import sys
from data import corpus, junk, tasks
from lab import cleaning
print(junk.pollute(random.Random(3), 60))
print(cleaning.measure_copies(random.Random(3), 0.5, n=200, each=20))
corpus.SIZES = dict.fromkeys(corpus.SIZES, 40)
folder = corpus.write(sys.argv[1], seed=3, megabytes=0.03)
tasks.write_pages(folder, seed=3, megabytes=0.03)
print([path.read_text() for path in sorted(folder.rglob("*.*"))])
"""


def test_a_seed_makes_the_same_data_whatever_pythons_hash_seed(tmp_path):
    """The order of a set of strings differs from process to process."""
    outputs = set()
    for hash_seed in "012":
        done = subprocess.run([sys.executable, "-c", MAKE_DATA, tmp_path / hash_seed], cwd=ROOT,
                              env={**os.environ, "PYTHONHASHSEED": hash_seed},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1
