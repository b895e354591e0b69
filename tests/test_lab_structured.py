"""lab/structured.py: what is asked and held out, what a parser accepts, and the verdict."""
import json
import random

import pytest

import gpt
from data import tasks
from lab import structured
from lab_run import Started, make_run, start
from scaffold.cli import UserError
from tiny import ENC, read_jsonl


def test_the_record_is_what_the_text_says():
    """The village's own reader of statements finds the same words."""
    rng = random.Random(0)
    for _ in range(200):
        fields = rng.sample(structured.FIELDS, rng.choice([1, 2, 3]))
        request = structured.make_request(fields, rng)
        text, _, order = request.prompt.rpartition(" Give ")
        assert list(request.record) == fields
        assert [word for word in fields if f"the {word}" in order] == fields
        for field, word in request.record.items():
            told = tasks.read_life(field, text, None)
            assert told["known"] == (word is not None)
            if word is not None:
                assert told[field] == word


def test_a_request_lists_its_fields_as_a_sentence():
    rng = random.Random(0)
    ends = [structured.make_request(structured.FIELDS[:n], rng).prompt.split(" Give ")[1]
            for n in (1, 2, 3)]
    a, b, c = structured.FIELDS[:3]
    assert ends == [f"the {a} as JSON.", f"the {a} and the {b} as JSON.",
                    f"the {a}, the {b} and the {c} as JSON."]


def fields_of(chat):
    return frozenset(json.loads(chat["messages"][-1]["content"]))


@pytest.mark.parametrize("seed", range(3))
def test_tuning_never_asks_for_a_new_pair_or_for_a_tested_request(seed):
    tests = structured.test_requests(200, seed)
    chats = structured.training_chats(3000, seed, tests)
    asked = {fields_of(chat) for chat in chats}
    pairs = structured.new_pairs(seed)
    assert {frozenset(r.record) for r in tests["new pair"]} == pairs
    assert not asked & pairs
    assert {frozenset(r.record) for r in tests["asked"]} <= asked
    assert {len(fields) for fields in asked} == {1, 2}
    assert {len(r.record) for r in tests["three fields"]} == {3}
    assert set().union(*asked) == set(structured.FIELDS)
    n = len(structured.FIELDS)
    assert len(asked) == n + n * (n - 1) // 2 - len(pairs)    # every other combination is asked
    prompts = {chat["messages"][0]["content"] for chat in chats}
    assert not prompts & {r.prompt for group in tests.values() for r in group}


def test_other_seeds_hold_out_other_pairs():
    assert len({frozenset(structured.new_pairs(seed)) for seed in range(10)}) > 3


def test_every_demonstration_is_exact():
    for chat in structured.training_chats(100, 0, {}):
        response = chat["messages"][-1]["content"]
        assert structured.grade(json.loads(response), response).exact


RECORD = {"place": "mill", "food": None}


@pytest.mark.parametrize("response, valid, keys, right", [
    ('{"place": "mill", "food": null}', True, True, [True, True]),
    ('{"food":null,"place":"mill"}', True, True, [True, True]),      # order, spaces: no matter
    ('{"place": "mill"}', True, False, [True, False]),               # left out is not null
    ('{"place": "mill", "food": null, "job": null}', True, False, [True, True]),
    ('{"place": "mill", "food": "null"}', True, True, [True, False]),
    ('{"place": null, "food": "tea"}', True, True, [False, False]),
    ('{"place": ["mill"], "food": false}', True, True, [False, False]),
    ("{}", True, False, [False, False]),
    ("[]", True, False, [False, False]),
    ("null", True, False, [False, False]),
    ('{"place": "mill", "food": null', False, False, [False, False]),
    ('{"place": "mill", "food": null}.', False, False, [False, False]),
    ("{'place': 'mill', 'food': None}", False, False, [False, False]),
    ('Here: {"place": "mill", "food": null}', False, False, [False, False]),
    ("", False, False, [False, False]),
    ("[" * 100_000, False, False, [False, False]),
])
def test_a_response_is_graded_as_a_program_reads_it(response, valid, keys, right):
    grade = structured.grade(RECORD, response)
    assert (grade.valid, grade.keys, list(grade.right.values())) == (valid, keys, right)
    assert grade.exact == (keys and all(right))


def test_scores_are_shares_of_responses_and_of_fields():
    requests = [structured.Request("", RECORD), structured.Request("", {"job": "smith"})]
    scores = structured.scores(requests, ['{"place": "mill", "food": "tea"}', "The smith."])
    assert (scores["valid"], scores["keys"], scores["exact"]) == (.5, .5, 0)
    assert scores["fields"] == pytest.approx(1 / 3)
    assert (scores["named"], scores["nulls"]) == (.5, 0)
    assert scores["by_field"]["place"] == 1
    assert scores["by_field"]["job"] == 0
    assert scores["by_field"]["thing"] is None      # nobody asked for it


@pytest.mark.parametrize("block_size", [60, 128, 1000])
def test_a_page_shows_as_many_examples_as_fit(block_size):
    for i in range(20):
        rng = random.Random(i)
        fields = rng.sample(structured.FIELDS, 2)
        request = structured.make_request(fields, rng)
        pages = {}
        for shots in structured.SHOTS:
            text, shown = structured.page(request, shots, block_size, ENC, random.Random(i))
            lines = text.split("\n")
            assert lines[-2:] == [request.prompt, structured.OPENING]
            assert len(lines) == 2 * shown + 2
            for answer in lines[1:-2:2]:
                assert list(json.loads(answer)) == fields
            pages[shown] = text.removesuffix(f"{request.prompt}\n{structured.OPENING}")
            if shown < shots:       # one more would not have fitted
                whole = structured.page(request, shown + 1, 10**6, ENC, random.Random(i))[0]
                whole += json.dumps(request.record).removeprefix(structured.OPENING) + "\n"
                assert len(ENC.encode_ordinary(whole)) > block_size
        if block_size == 1000:
            assert set(pages) == set(structured.SHOTS)
        for shorter, longer in zip(sorted(pages), sorted(pages)[1:]):
            assert pages[longer].startswith(pages[shorter])


def verdict(few=.0, asked=.95, new=.9, three=.9, gold=.5):
    """Return the verdict on two seeds; without examples the gold is .5 and nothing is exact."""
    rows = []
    for seed in range(2):
        for shots in structured.SHOTS:
            rows += [{"model": "few-shot", "examples": shots, "seed": seed, "group": group,
                      "exact": few if shots == 2 else 0} for group in structured.GROUPS]
        for n, values, mean_gold in ((0, (0, 0, 0), .5), (100, (asked, new, three), gold)):
            rows += [{"model": "tuned", "examples": n, "seed": seed, "group": group,
                      "exact": value, "gold": mean_gold}
                     for group, value in zip(structured.GROUPS, values)]
    return structured.verdict(rows)


def test_the_verdict_holds_when_all_parts_do():
    text = verdict()
    assert "claim holds here" in text
    assert "after 100 examples" in text
    assert ": no" not in text


@pytest.mark.parametrize("change, part", [
    ({"few": .5}, "few-shot fails (best 0.50): no"),
    ({"new": .6}, "new pair as well (0.60): no"),
    ({"three": .1}, "three fields as well (0.10): no"),
    ({"gold": .4}, "usual tasks keep their gold (-0.10): no"),
])
def test_the_verdict_holds_in_part_when_one_part_fails(change, part):
    text = verdict(**change)
    assert "holds in part" in text
    assert part in text
    assert text.count(": no") == 1


def test_no_worse_than_nothing_says_nothing():
    text = verdict(asked=.1, new=.1, three=.1)
    assert "does not hold" in text
    assert "new pair as well (0.10): yes" in text


def test_it_runs_logs_and_leaves_the_base_model_alone(tmp_path, capsys):
    out = make_run(tmp_path)
    before = (out / "gpt.pt").read_bytes()
    structured.main(structured.Config(out=str(out), examples=10, demos=5, epochs=1, n=20, seeds=1,
                                      device="cpu"))
    rows = read_jsonl(out / "lab-structured.jsonl")
    models = [("few-shot", shots) for shots in structured.SHOTS]
    models += [("tuned", n) for n in (0, 1, 10)]
    expected = [(*model, group) for model in models for group in structured.GROUPS]
    assert [(r["model"], r["examples"], r["group"]) for r in rows] == expected
    for row in rows:
        assert 0 <= row["exact"] <= row["keys"] <= row["valid"] <= 1
        assert ("gold" in row) == (row["model"] == "tuned")
    printed = capsys.readouterr().out
    assert "valid JSON" in printed
    assert "the claim does not hold here" in printed
    assert (out / "gpt.pt").read_bytes() == before


def test_too_few_test_requests_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match="--n 5"):
        structured.main(structured.Config(out=str(tmp_path), n=5))


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "main", start)
    with pytest.raises(Started) as started:
        structured.main(structured.Config(out=str(tmp_path / "new"), seed=3, device="cpu"))
    stage = started.value.args[0]
    assert (stage.out, stage.seed, stage.device) == (str(tmp_path / "new"), 3, "cpu")
    assert "gpt.pt is missing" in capsys.readouterr().out
