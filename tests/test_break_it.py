"""lab/break_it.py: bands, exits and the atlas. The runs themselves take minutes; none is here."""
import math
import random

import pytest

from data.records import read_records
from lab import break_it
from lab.break_it import Result, atlas_row, band, exits, false_alarms, outside, picture, stage_of
from scaffold.cli import UserError
from tiny import ROOT
from zoo import MUTANTS

BUG = MUTANTS[0]


def log(seed, n=20, **changes):
    """Return a made-up log of a few metrics; changes: {metric: function of (update, value)}."""
    rng = random.Random(seed)
    rows = []
    for t in range(n):
        row = {"update": t, "kl": t / 10 + rng.random() / 10, "score": 1 + rng.random() / 10}
        row["objective/scores"] = 1.0   # so that lab/doctor.py knows the log
        rows.append(row | {k: f(t, row[k]) for k, f in changes.items()})
    return rows


HEALTHY = [log(seed) for seed in range(5)]
BANDS = band(HEALTHY)


def test_every_stage_has_bugs_and_the_exceptions_are_bugs():
    names = {m.name for m in MUTANTS}
    assert set(break_it.NOT_RUN) | set(break_it.STAGE_OF) <= names
    assert {stage_of(m) for m in MUTANTS} == {*break_it.SHORT, None}


def test_a_band_holds_the_logs_that_it_is_made_of():
    for rows in HEALTHY:
        assert set("".join(picture(rows, BANDS).values())) == {"."}
        assert exits(rows, BANDS) == {}


def test_the_first_metric_that_leaves_its_band_is_found_with_its_update():
    broken = log(0, kl=lambda t, x: x + (t >= 7), score=lambda t, x: x - (t >= 12))
    left = exits(broken, BANDS)
    assert [(name, x.at) for name, x in left.items()] == [("kl", 7), ("score", 12)]
    assert left["kl"].value > left["kl"].high
    assert left["score"].value < left["score"].low
    assert picture(broken, BANDS)["kl"] == "." * 7 + "^" * 13


def test_one_value_outside_is_noise_and_one_that_is_no_number_is_not():
    assert exits(log(0, kl=lambda t, x: x + 9 * (t == 5)), BANDS) == {}
    left = exits(log(0, kl=lambda t, x: None if t == 5 else x), BANDS)
    assert [(name, x.at) for name, x in left.items()] == [("kl", 5)]


@pytest.mark.parametrize("value, sign", [(0.5, "."), (2, "^"), (-1, "v"), (math.nan, "!"),
                                         (math.inf, "!")])
def test_signs_of_the_picture(value, sign):
    assert outside(value, 0, 1) == sign


def test_the_atlas_counts_what_most_seeds_show():
    broken = [log(seed, kl=lambda t, x: x + (t >= 7)) for seed in range(3)]
    broken[2] = log(2, score=lambda t, x: x + (t >= 3))
    row = atlas_row(BUG, "ppo", {n: Result(rows, "", "") for n, rows in enumerate(broken)}, BANDS)
    first = [(run["first"], run["at"]) for run in row["runs"]]
    assert first == [("kl", 7), ("kl", 7), ("score", 3)]
    assert row["outside"] == {"kl": 7}
    assert break_it.summary(row) == "kl at 7 (2 of 3 seeds; any metric: 3)"


def test_false_alarms_are_of_a_run_outside_the_others():
    odd = log(9, score=lambda t, x: x + 5)
    assert false_alarms([*HEALTHY, odd])[5] == ["score"]


def test_samples_are_those_after_training():
    printed = "--- 'Hi'\nbefore: 'a'\nafter:  'b'\n--- 'Ho'\nbefore: 'c'\nafter:  'd'\n"
    assert break_it.samples(printed) == [("'Hi'", "'b'"), ("'Ho'", "'d'")]


def test_an_unknown_or_missing_bug_says_what_to_type(tmp_path):
    for bugs in ((), ("nonsense",)):
        with pytest.raises(UserError, match="--list"):
            break_it.main(break_it.Config(out=str(tmp_path), bugs=bugs))


def test_the_published_atlas_is_of_the_bugs_of_the_zoo():
    path = ROOT / "results" / "atlas.jsonl"
    rows = [row for _, row in read_records(path) if "bug" in row]
    assert {row["bug"] for row in rows} == {m.name for m in MUTANTS if stage_of(m)}
    assert all(len(row["runs"]) == break_it.ATLAS_SEEDS for row in rows)
    assert len(rows) >= 30
