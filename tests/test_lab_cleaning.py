"""Tests of lab/cleaning.py: what a model remembers, and a small run of the whole measure."""
import json
from functools import partial

from data import junk
from data.tokenizer import get_tokenizer
from lab import cleaning


def test_a_number_in_the_training_text_is_known_and_others_are_not():
    enc = get_tokenizer()
    numbers = ["555-123-4567", "555-987-6543", "555-246-8024", "555-111-2222"]
    model = cleaning.train([f"The number of Ana is {numbers[0]}."] * 5, enc, seed=0, steps=25)
    secrets = {
        "Ana": junk.Secret(numbers[0], 1, numbers[1:]),
        "Ben": junk.Secret(numbers[1], 8, numbers[:1]),
        "Ana ": junk.Secret(numbers[2], 64, numbers[:2]),
    }
    assert cleaning.known_secrets(model, enc, secrets) == {1: 1, 8: 0, 64: 0}


def test_the_measure_runs_small(monkeypatch, tmp_path, capsys):
    def shrink(module, name, **settings):
        monkeypatch.setattr(module, name, partial(getattr(module, name), **settings))

    shrink(cleaning, "measure_quality", n=2)
    shrink(cleaning, "measure_copies", n=20, each=2)
    shrink(cleaning, "measure_personal", n=2)
    shrink(cleaning, "measure_loss", steps=2, runs=1)
    shrink(junk, "pollute", n_good=60)

    cleaning.main(cleaning.Config(out=str(tmp_path)))

    row = json.loads((tmp_path / "clean.jsonl").read_text())
    assert {len(runs) for runs in row["lm"].values()} == {1}
    dirty, cleaned, good = (row["lm"][name][0] for name in ("dirty", "cleaned", "never dirty"))
    assert dirty[0] > cleaned[0]
    assert good[0] == 60
    assert 0 <= row["precision"] <= 1
    assert "loss on good text" in capsys.readouterr().out
