"""Tests of scaffold/table.py: what scripts print about their results."""

import math

from scaffold.table import format_table, print_row, print_samples
from tiny import chat


def test_columns_are_aligned_and_empty_ones_are_left_out():
    rows = [
        {"name": "sft", "gold": 0.5, "n": 100, "split": [0.4, 0.5, 0.1]},
        {"name": "best-of-16", "gold": None, "n": 7},
    ]
    columns = {
        "stage": ("name", ""),
        "gold": ("gold", ".3f"),
        "KL": ("kl", ".1f"),
        "n": ("n", "d"),
        "shares": ("split", ""),
    }
    assert format_table(rows, columns).splitlines() == [
        "stage        gold    n    shares",
        "sft         0.500  100  40/50/10",
        "best-of-16      -    7         -",
    ]


def test_numbers_that_a_log_lost_are_dashes():
    """A log has null for NaN: a row looks the same from memory and from a log."""
    columns = {"gold": ("gold", ".3f"), "vs M1": ("vs", ""), "n": ("n", "d")}
    for missing in (math.nan, None):
        rows = [{"gold": missing, "vs": [0.5, missing, 0.25], "n": 1}]
        assert format_table(rows, columns).split() == ["vs", "M1", "n", "50/-/25", "1"]
        rows.append({"gold": 0.5, "vs": missing, "n": 2})
        assert [line.split() for line in format_table(rows, columns).splitlines()[1:]] == [
            ["-", "50/-/25", "1"], ["0.500", "-", "2"]]


def test_a_row_is_one_line_of_names_and_values(capsys):
    print_row({"epoch": 3, "val_loss": 0.12345, "split": "val"})
    assert capsys.readouterr().out == "epoch  3  val_loss 0.123  split val\n"


def test_printed_samples_are_those_of_each_prompt(capsys):
    print_samples([chat("a"), chat("b", "c", "d")], ["1", "2"], ["3\n", "4"])
    want = "--- 'a'\nbefore: '1'\nafter:  '3\\n'\n--- 'd'\nbefore: '2'\nafter:  '4'\n"
    assert capsys.readouterr().out == want
