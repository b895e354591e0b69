"""lab/icl.py: what pages show, how labels are scored, and a verdict that follows the numbers."""
import random

import pytest
import torch

import gpt
from data import village
from lab import icl
from lab_run import Started, make_run, start
from tiny import ENC, read_jsonl


def test_labels_of_tone_are_right():
    rng = random.Random(0)
    for _ in range(100):
        query, label = icl.tone(rng)
        good = any(mood in query for mood in ("happy", "proud", "cheerful"))
        assert label == ("This is a good feeling" if good else "This is a bad feeling")


def test_labels_of_manners_are_right():
    rng = random.Random(0)
    for _ in range(100):
        query, label = icl.manners(rng)
        rude = bool(village.RUDE_WORDS.search(query) or "Not you again" in query)
        assert (label == "This is rude") == rude


@pytest.mark.parametrize("name, verb", [("sound", "says"), ("feed", "eats")])
def test_facts_are_right(name, verb):
    rng = random.Random(0)
    for _ in range(100):
        query, label = icl.TESTED[name].draw(rng)
        key = query.removeprefix("The ")
        assert icl.line(query, label) == f"The {key} {verb} {village.FACTS[name][key]}.\n"


@pytest.mark.parametrize("name", icl.TESTED)
def test_every_label_occurs(name):
    rng = random.Random(0)
    task = icl.TESTED[name]
    assert {task.draw(rng)[1] for _ in range(400)} == set(task.labels)


def test_no_tested_task_is_trained_on():
    assert not set(icl.TESTED) & set(icl.READ)


def all_examples(task):
    """Return {query: label} of a task."""
    return dict(task.draw(random.Random(i)) for i in range(1500))


TRUTH = {name: all_examples(task) for name, task in icl.TESTED.items()}
QUERIES = sorted({query for truth in TRUTH.values() for query in truth})
LABELS = [label for task in icl.TESTED.values() for label in task.labels]


def parse_page(body):
    """Read the examples of a page back, with the queries and labels of all tasks."""
    lines = {f"{query}{label}.\n": (query, label) for query in QUERIES for label in LABELS}
    examples = []
    while body:
        line = next(line for line in lines if body.startswith(line))
        examples.append(lines[line])
        body = body.removeprefix(line)
    return examples


@pytest.mark.parametrize("name", icl.TESTED)
def test_pages_show_what_their_kind_says(name):
    task = icl.TESTED[name]
    truth = TRUTH[name]
    moved = 0
    for i in range(30):
        query, _ = task.draw(random.Random(i))
        bodies = {}
        for kind in icl.PAGES:
            page = icl.page(kind, 8, name, query, random.Random(f"p{i}"))
            assert page.endswith(query)
            bodies[kind] = page.removesuffix(query)
        right, shuffled, wrong, foreign = (parse_page(bodies[kind]) for kind in icl.PAGES[:4])
        assert len(right) == len(shuffled) == len(wrong) == len(foreign) == 8
        for text, label in right:
            assert text != query
            assert label == truth[text]
        assert [t for t, _ in right] == [t for t, _ in shuffled] == [t for t, _ in wrong]
        assert sorted(x for _, x in right) == sorted(x for _, x in shuffled)
        for text, label in wrong:
            assert label != truth[text]
            assert label in task.labels
        assert not {x for _, x in foreign} & set(task.labels)
        assert not {t for t, _ in foreign} & set(truth)
        reformatted = [f"{label.strip()}: {text.strip()}\n" for text, label in right]
        assert bodies["other format"] == "".join(reformatted)
        moved += sum(a != b for a, b in zip(right, shuffled))
    assert moved > 30


@pytest.mark.parametrize("kind", icl.PAGES)
def test_a_page_of_fewer_examples_is_the_beginning_of_one_of_more(kind):
    query = "Tom is sad.\n"
    pages = [icl.page(kind, shots, "tone", query, random.Random(1)) for shots in icl.SHOTS]
    heads = [page.removesuffix(query) for page in pages]
    assert heads[0] == ""
    for shorter, longer in zip(heads, heads[1:]):
        assert longer.startswith(shorter)
        assert len(longer) > len(shorter)


@pytest.mark.parametrize("kind", icl.PAGES)
def test_the_longest_page_fits_the_context_with_its_response(kind):
    lengths = []
    for name, task in icl.TESTED.items():
        for i in range(20):
            query, _ = task.draw(random.Random(i))
            page = icl.page(kind, 8, name, query, random.Random(i))
            lengths.append(len(ENC.encode_ordinary(page)))
    assert max(lengths) + 12 < 128


def test_the_likeliest_label_is_that_of_the_sums_written_out():
    torch.manual_seed(1)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 64, 1, 2, 16)).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p)
    prompts = [f"{word}\n" for word in village.WORDS["animal"] + village.WORDS["food"]]
    labels = ["meow", "moo", "happy", "sad", " says moo"]

    def logprob(prompt, continuation):
        start = ENC.encode_ordinary(prompt)
        new = ENC.encode_ordinary(continuation)
        logprobs = model(torch.tensor([start + new]))[0].log_softmax(-1)
        return sum(logprobs[len(start) + i - 1, t].item() for i, t in enumerate(new))

    def best(stop):
        return [max(labels, key=lambda label: logprob(prompt, label + stop)) for prompt in prompts]

    expected = best(".")
    assert icl.likeliest(model, ENC, prompts, labels) == expected
    assert len(set(expected)) > 1
    assert expected != best("")     # without the full stop, "moo" would win as the start of "moon"


def verdict(right, none, last=None, **others):
    """Return the verdict for a model that needs four examples.

    right: the accuracy with right labels; none: that with 0, 1 or 2 examples and with pages of
    another domain or format. others: the accuracies of other kinds of pages. last: the accuracy of
    every page at 8 shots, if it differs from that at 4.
    """
    others = {kind.replace("_", " "): value for kind, value in others.items()}
    values = {"right": right, "shuffled": right, "wrong": right, "other domain": none,
              "other format": none} | others
    rows = []
    for seed in range(2):
        for task in "ab":
            row = {"model": "base", "seed": seed, "task": task, "generated": 0}
            rows.append(row | {"page": "right", "shots": 0, "likely": none})
            for kind, value in values.items():
                at_8 = value if last is None else last
                for shots, likely in ((1, none), (2, none), (4, value), (8, at_8)):
                    rows.append(row | {"page": kind, "shots": shots, "likely": likely})
    return icl.verdict(rows, "base", "likely")


def test_the_verdict_holds_when_all_parts_do():
    assert "claim holds here" in verdict(.9, .5)


@pytest.mark.parametrize("change, part", [
    ({"shuffled": .6}, "shuffled labels hardly matter: no"),
    ({"wrong": .6}, "wrong labels hardly matter: no"),
    ({"other_domain": .88}, "another domain is worse: no"),
    ({"other_format": .9}, "another format is worse: no"),
])
def test_the_verdict_holds_in_part_when_one_part_fails(change, part):
    text = verdict(.9, .5, **change)
    assert "holds in part" in text
    assert part in text
    assert text.count(": no") == 1


def test_the_verdict_sees_that_more_examples_are_worse():
    text = verdict(.9, .5, last=.5)
    assert "at 4 shots" in text
    assert "the more the better: no" in text
    assert text.count(": no") == 1
    assert "holds in part" in text


def test_labels_that_do_not_matter_say_nothing_when_examples_do_not_help():
    text = verdict(.5, .5)
    assert "examples help: no" in text
    assert "wrong labels hardly matter: yes" in text
    assert "does not hold" in text


def test_examples_that_help_are_a_part_of_the_claim():
    assert "holds in part" in verdict(.9, .5, wrong=.1)
    text = verdict(.5, .6, shuffled=.3, wrong=.3, other_domain=.6, other_format=.6)
    assert "does not hold" in text


def test_accuracy_is_the_mean_over_tasks_for_each_seed():
    rows = []
    for seed, task, likely in ((0, "a", .2), (0, "b", .4), (1, "a", 1.), (1, "b", 0.)):
        rows.append({"model": "base", "seed": seed, "page": "right", "shots": 4, "task": task,
                     "likely": likely})
    assert icl.accuracy(rows, "base", "right", 4) == pytest.approx([.3, .5])


def test_it_runs_logs_and_leaves_the_base_model_alone(tmp_path, capsys):
    out = make_run(tmp_path)
    before = (out / "gpt.pt").read_bytes()
    icl.main(icl.Config(out=str(out), n=2, read_on=2, batch_tokens=128, seeds=1, device="cpu"))
    rows = read_jsonl(out / "lab-icl.jsonl")
    assert len(rows) == 2 * len(icl.TESTED) * (1 + 4 * len(icl.PAGES))
    assert {r["model"] for r in rows} == {"base", "read on"}
    for row in rows:
        assert 0 <= row["likely"] <= 1
        assert 0 <= row["generated"] <= 1
    printed = capsys.readouterr().out
    for model in ("base", "read on"):
        for score in ("likely", "generated"):
            assert f"{model}, {score}: the claim" in printed
    assert (out / "gpt.pt").read_bytes() == before


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "main", start)
    with pytest.raises(Started) as started:
        icl.main(icl.Config(out=str(tmp_path / "new"), seed=3, device="cpu"))
    stage = started.value.args[0]
    assert (stage.out, stage.seed, stage.device) == (str(tmp_path / "new"), 3, "cpu")
    assert "gpt.pt is missing" in capsys.readouterr().out
