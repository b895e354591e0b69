"""Properties of lab/instruction_quality.py, each measure counted by hand."""

import random

import pytest

import self_instruct
from data import tasks
from lab import instruction_quality as quality

# Diversity


VERBS = {
    "Write a story about Tom.": ("write", "story"),
    "Tell me the price of it.": ("tell", "price"),
    "Is it an animal?": ("is", "animal"),
    "Sum up the story.": ("sum", "up"),
    "Is it a": ("is", ""),
    "Name": ("name", ""),
}


@pytest.mark.parametrize("instruction, pair", VERBS.items(), ids=VERBS)
def test_a_verb_and_its_object_skip_the_small_words(instruction, pair):
    assert quality.first_words(instruction) == pair


PAGE = """Come up with a series of tasks:
1. Read on the page.
Task: Heard in a task here.
12. Twelfth of a list.
"""


def test_lines_read_have_no_number_and_no_task_in_front(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text(PAGE, encoding="utf-8")
    read = quality.lines_read(tmp_path)
    assert {"Read on the page.", "Heard in a task here.", "Twelfth of a list."} <= read


SEEDS = [{"instruction": "Name two more animals."}, {"instruction": "Write a letter to Tom."}]
READ = {"Read on the page.", "Heard in a task here."}
MADE = [
    "Name two more animals.",  # a seed
    "Read on the page.",
    "Heard in a task here.",
    "Write a letter to Ann.",  # ROUGE-L of 0.8 with a seed
    "Write a poem for Ann.",
    "zebra quagga okapi",
]


@pytest.fixture(scope="module")
def diversity():
    return quality.diversity([{"instruction": x} for x in MADE], SEEDS, READ)


def test_an_instruction_is_new_if_it_is_no_seed_and_no_line_that_was_read(diversity):
    assert diversity["new_share"] == pytest.approx(3 / 6)


def nearest(instruction):
    return max(self_instruct.rouge_l(instruction, seed["instruction"]) for seed in SEEDS)


def test_similarity_is_the_mean_rouge_l_to_the_nearest_seed(diversity):
    assert nearest(MADE[0]) == 1
    assert diversity["rouge_to_seed"] == pytest.approx(sum(nearest(x) for x in MADE) / 6)


def test_the_histogram_has_ten_bins_and_1_is_in_the_last(diversity):
    histogram = diversity["histogram"]
    middle = sum(0.1 <= nearest(x) < 0.8 for x in MADE)
    assert len(histogram) == 10
    assert sum(histogram) == 6
    assert histogram[9] == 1
    assert histogram[8] == 1
    assert histogram[0] == 4 - middle


def test_words_and_pairs_are_counted(diversity):
    assert diversity["words"] == pytest.approx(sum(len(x.split()) for x in MADE) / 6)
    assert diversity["verb_noun_pairs"] == 6
    assert diversity["verb_noun_top"] == 1


def test_the_top_share_has_the_four_commonest_objects_of_a_verb():
    twelve = [{"instruction": f"Write {c}{d} now please"} for c in "abcdef" for d in "gh"]
    assert quality.diversity(twelve, SEEDS, set())["verb_noun_top"] == pytest.approx(4 / 12)


# Quality


def unseen_wording():
    """Return a wording of a manner in which no page asks for a price."""
    wordings = {
        "well": "Say well before it.",
        "thanks": "Say thank you after it.",
        "sure": "I want you to be sure.",
        "twice": "Say it twice.",
    }
    return next(w for m, w in wordings.items() if not tasks.seen(("openqa", "price"), m))


def made(instruction, x="", y="", is_classification=False):
    pairs = [{"input": x, "output": y}] if y else []
    return {
        "instruction": instruction,
        "is_classification": is_classification,
        "instances": pairs,
    }


def test_the_audit_counts_what_the_village_knows():
    price = "How much is the cake?"
    row = quality.audit(
        [
            made(price, "", "Costs 9."),
            made(price, "", "Costs 4."),  # a wrong price
            made(price, "zebra", "Costs 9.", is_classification=True),  # has input, no label
            made("Fly to the moon.", "", "Costs 9."),  # no task of this world
            made(f"{price} {unseen_wording()}"),  # no instance
        ],
        tasks,
    )
    assert row == dict(
        tasks=5,
        with_instance=4,
        valid=4 / 5,
        fits=2 / 4,
        right=1 / 4,
        kind_right=3 / 4,  # of the four valid ones
        unseen_pairs=1 / 5,
    )


def test_corrected_outputs_are_right_and_unreadable_records_are_dropped():
    price = {"instruction": "How much is the cake?", "input": "", "output": "4."}
    moon = {"instruction": "Fly to the moon.", "input": "", "output": "4."}
    food = {"instruction": "Find the food in the text.", "input": "Tom likes soup.", "output": "x"}
    zebra = food | {"input": "zebra"}
    found = quality.corrected([price, moon, food, zebra], tasks, random.Random(0))
    asked = [(r["instruction"], r["input"]) for r in found]
    assert asked == [(r["instruction"], r["input"]) for r in (price, food)]
    for r in found:
        assert tasks.audit(r["instruction"], r["input"], r["output"]) == (True, True, True)
    assert price["output"] == "4.", "the argument is left as it was"


# Worth


def test_an_output_is_the_first_line_of_a_greedy_response(monkeypatch):
    records = [{"instruction": "Name two animals.", "input": x} for x in ("", "Tom has 牛.", "")]
    asked = []

    def ask(model, enc, prompts, max_new_tokens, **sampling):
        assert sampling["temperature"] == 0
        asked.extend(prompts)
        return [(" cat.\nTask: more", False), ("\n\ndog. ", True), ("", True)]

    monkeypatch.setattr(self_instruct, "ask", ask)
    assert quality.follow(None, None, records, random.Random(0)) == ["cat.", "dog.", ""]
    for record, prompt in zip(records, asked, strict=True):
        assert record["instruction"] in prompt
        assert record["input"] in prompt
        assert "cat" not in prompt
