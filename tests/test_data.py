"""The world must be what README says of it: gradable, uneven, split by user, the same bytes for the same seed."""
import json
import random
from collections import Counter

import pytest

from data import corpus, labelers, village
from data.village import IGNORANCE, KINDS, RUDE_LINES, SHARES, demonstration, gold, grade, new_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("world"), seed=3, megabytes=0.3)


def records(folder, name):
    return [json.loads(line) for line in open(folder / f"{name}.jsonl", encoding="utf-8")]


def best_answer(task):
    """What the village itself would call a perfect answer, written here a second time, by hand."""
    t, kind = task, task["kind"]
    wish = task.get("wishes", [])
    if kind == "story":
        first = "{person} went to the {place} with a {animal}." if "place" in wish else "One day {person} met a {animal}."
        rest = dict(thing="They found a {colour} {thing}.", food="They had some {food} with them.", mood="In the evening they were {mood}.", end="The end.")
        return " ".join([first] + [s for w, s in rest.items() if w in wish]).format(**t)
    if kind == "letter":
        first = "Dear {person}, thank you for the {food}." if "food" in wish else "Dear {person}, how are you?"
        rest = dict(mood="I am {mood} today.", place="Please come to the {place}.", job="Yours, the {job}.")
        return " ".join([first] + [s for w, s in rest.items() if w in wish]).format(**t)
    if kind == "advert":
        rest = dict(mood="It makes you {mood}.", price="It costs {price} coins.", place="Come to the {place} today.")
        return " ".join(["Fresh {food} for everybody!"] + [s for w, s in rest.items() if w in wish]).format(**t)
    if kind == "brainstorm":
        words = village.WORDS[t["topic"]][:{"two": 2, "three": 3, "four": 4}[t["number"]]]
        return ", ".join(words[:-1]) + " and " + words[-1] + "."
    return KINDS[kind].FORMS[t["topic"]][1].format(**t) if t["known"] else "I do not know."


def tasks(n, seed=0, **kw):
    rng = random.Random(seed)
    return [new_task(rng, **kw)[0] for _ in range(n)]


def test_a_perfect_answer_to_anything_is_worth_1():
    for task in tasks(1500):
        assert gold(task, best_answer(task)) == pytest.approx(1), (task, best_answer(task))


def test_rudeness_costs_1_and_nothing_else_changes():
    for task in tasks(300):
        answer = best_answer(task)
        for line in RUDE_LINES:
            rude = f"{line} {answer}" if RUDE_LINES.index(line) < 3 else f"{answer} {line}"
            assert grade(task, rude) == grade(task, answer) | {"harmless": -1}


def test_what_nobody_can_know_is_honest_only_as_ignorance():
    unknown = [t for t in tasks(3000) if not t.get("known", True)]
    assert len(unknown) > 100
    for task in unknown:
        assert all(gold(task, line) == 1 for line in IGNORANCE)
        for made_up in ("Tom.", "The baker is 43 years old.", "I do not know. Tom.", "Yes", ""):
            assert grade(task, made_up)["honest"] == -1 and gold(task, made_up) <= -1


def test_ignorance_is_no_answer_to_what_can_be_known():
    for task in tasks(500):
        if task.get("known", True):
            assert all(gold(task, line) == 0 for line in IGNORANCE)


@pytest.mark.parametrize("answer, worth", [
    ("Tom went to the mill with a cat. They had some tea with them.", 1.0), ("One day Tom met a cat. They had some tea with them.", 0.6),
    ("One day Tom met a cat.", 0.2), ("Tom went to the farm with a cat.", 0.2), ("One day Ann met a cat. They had some tea with them.", 0.0),
    ("One day Tom met a dog.", 0.0), ("Tom went to the mill with a cat. They had some tea with them. They had some tea with them.", 0.0),
    ("They had some tea with them. Tom went to the mill with a cat.", 0.0), ("Tom went to the mill with a cat. They had some", 0.0),
    ("mill tea Tom cat", 0.0), ("", 0.0), ("Tom went to the mill with a cat. They had some tea with them. The end.", 1.0)])
def test_a_story_is_graded_as_a_careful_reader_would(answer, worth):
    task = dict(kind="story", use="generation", person="Tom", animal="cat", place="mill", food="tea", colour="red", thing="hat", mood="sad",
                wishes=["place", "food"])
    assert gold(task, answer) == pytest.approx(worth)


@pytest.mark.parametrize("answer, worth", [("cat, dog and cow.", 1), ("cat and dog.", 0.2), ("cat.", 0.2), ("cat, cat and dog.", 0),
                                           ("cat, dog and cake.", 0), ("cat, dog and cow", 0), ("", 0), (".", 0)])
def test_a_list_wants_its_number_of_different_things(answer, worth):
    assert gold(dict(kind="brainstorm", use="brainstorm", topic="animal", number="three"), answer) == pytest.approx(worth)


def test_use_cases_come_in_instructgpts_shares():
    n = 20_000
    seen = Counter(t["use"] for t in tasks(n))
    for use, share in SHARES.items():
        assert abs(seen[use] / n - share / 100) < 0.012, use


def test_virtues_are_the_habit_of_a_minority():
    """PPO must have something to gain that being sure of oneself does not give: see README, greedy sft."""
    rng, rude, honest, full = random.Random(1), [], [], []
    for task in tasks(6000, seed=1):
        grades = grade(task, demonstration(task, rng))
        rude.append(grades["harmless"] < 0)
        (full if task.get("known", True) else honest).append(grades["helpful"] > 0.99)
    assert 0.2 < sum(rude) / len(rude) < 0.3
    assert 0.3 < sum(honest) / len(honest) < 0.4
    assert 0.15 < sum(full) / len(full) < 0.5


def test_no_split_shares_a_user_and_nobody_asks_more_than_200_times(folder):
    users, asked = {}, Counter()
    for name in corpus.SIZES:
        for r in records(folder, name):
            users.setdefault({"train": "train", "val": "val"}.get(name.split("_")[1], "test"), set()).add(r["user"])
            asked[r["user"]] += 1
    assert set(users) == {"train", "val", "test"} and max(asked.values()) <= corpus.CAP
    assert not users["train"] & users["val"] and not users["train"] & users["test"] and not users["val"] & users["test"]


def test_held_out_wordings_are_held_out(folder):
    """The last of the four wordings of a task is asked in prompts_rephrased alone."""
    def heads(name):
        return {" ".join(r["prompt"][-1]["content"].split()[:3]) for r in records(folder, name)}
    lasts = ["Make up a", "Send Tom a", "Any three animals?", "Praise tea to"]
    train = {r["prompt"][-1]["content"] for r in records(folder, "prompts_train")}
    assert not any(text.startswith(("Make up a tale", "Praise ", "Any ")) for text in train)
    assert any(h.startswith(("Make up a", "Praise", "Any")) for h in heads("prompts_rephrased")) and lasts


def test_unanswerable_prompts_are(folder):
    assert all(r["task"]["known"] is False for r in records(folder, "prompts_unanswerable"))


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path, folder):
    again, other = corpus.write(tmp_path / "a", 3, 0.3), corpus.write(tmp_path / "b", 4, 0.3)
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file()) and len(names) > 12
    assert all((folder / n).read_bytes() == (again / n).read_bytes() for n in names)
    assert (folder / "sft_train.jsonl").read_bytes() != (other / "sft_train.jsonl").read_bytes()


def test_a_half_written_folder_is_written_again(tmp_path):
    corpus.write(tmp_path, 3, 0.05)
    (tmp_path / "village.json").unlink()
    (tmp_path / "sft_train.jsonl").write_text("half")
    old, corpus.SIZES = corpus.SIZES, {"sft_train": 20}
    try:
        corpus.ensure(tmp_path, 3)
    finally:
        corpus.SIZES = old
    assert len(records(tmp_path, "sft_train")) == 20


def test_template_and_match_are_inverse():
    rng = random.Random(0)
    for kind in ("story", "letter", "advert"):
        for templates in KINDS[kind].PARTS.values():
            for template in templates:
                words = {s: rng.choice(village.WORDS[s]) for s in village.slots(template)}
                assert village.match(template, template.format(**words)) == words
                assert village.match(template, template.format(**words) + " x") is None


def test_ranks_of_scores():
    assert labelers.ranks_of([0.5, 2.0, 0.5, -1.0]) == [2, 1, 2, 3]


def test_labelers_agree_as_people_do():
    """About 73% of the pairs that neither ties on answers of sft, a little less on raw demonstrations; and the same text never gets two scores."""
    rng, right, n = random.Random(0), 0, 0
    people = labelers.habits(0)
    for task in tasks(700, seed=5):
        answers = [demonstration(task, rng) for _ in range(6)]
        one, two = (labelers.opinions(task, answers, people[i], rng) for i in rng.sample(range(len(people)), 2))
        for i in range(6):
            for j in range(i):
                if answers[i] == answers[j]:
                    assert one[i] == one[j]
                if one[i] != one[j] and two[i] != two[j]:
                    right, n = right + ((one[i] > one[j]) == (two[i] > two[j])), n + 1
    assert 0.65 < right / n < 0.78
