"""Tests of data/verdicts.py and data/annotators.py: what verdicts say, what the seed data hold.

The simulated annotators are checked against the program that grades.
"""

import random
import re
from collections import Counter

import pytest

from data import annotators, verdicts, village
from lab import rouge
from scaffold.cli import UserError
from tiny import assistant, user, write_jsonl


HI = [user("Hi")]


def tasks_and_responses(n=400, seed=0):
    """Yield n random tasks with their prompt and four demonstrations, good and bad."""
    rng = random.Random(seed)
    for _ in range(n):
        task, prompt = village.new_task(rng)
        yield task, prompt, [village.demonstration(task, rng) for _ in range(4)]


def ranks_of(golds):
    """Rank 1 is the highest gold score; equal scores share a rank."""
    return [1 + sum(other > gold for other in golds) for gold in golds]


def ranked(n=60, seed=0):
    """Return records like those of data/labelers.py: a prompt, four responses, ranks."""
    records = []
    for task, prompt, responses in tasks_and_responses(n, seed):
        golds = [village.gold(task, response) for response in responses]
        if len(set(golds)) > 1:
            record = {"prompt": prompt, "task": task, "responses": responses}
            records.append(record | {"ranks": ranks_of(golds), "user": f"u{len(records) % 7}"})
    return records


def score_by_annotator(task, response, noise=0.0, rng=random, halo=False):
    """Return the score of the verdict that a simulated annotator writes."""
    verdict = verdicts.write_verdict(*annotators.annotate(task, response, noise, rng, halo))
    return verdicts.parse_score(verdict)


# The score of a verdict


@pytest.mark.parametrize(
    "verdict, score",
    [
        ("Score: 3", 3.0),
        ("score: 7", 7.0),
        ("SCORE:9", 9.0),
        ("Score: 3.5", 3.5),
        ("some 1 much 1. Score: 0", 0.0),
        ("Score: 5.", 5.0),
        ("Score: 2. Well, score: 4", 4.0),
        ("Score: 4\n\nThank you.", 4.0),
        ("", None),
        ("Score:", None),
        ("Score: good", None),
        ("some 1 much 1 all 1", None),
        ("Score 3", None),
        ("Score: -1", None),
        ("Score: 10", None),
        ("Score: 99999", None),
        ("Score: 9.5", None),
        ("underscore: 3", None),
    ],
)
def test_parse_score_reads_the_last_score(verdict, score):
    assert verdicts.parse_score(verdict) == score


def test_a_written_verdict_adds_up_and_can_be_parsed():
    n = len(verdicts.POINTS)
    seen = set()
    for bits in range(2**n):
        met = [bool(bits >> i & 1) for i in range(n)]
        verdict = verdicts.write_verdict([("Ben", True), ("8 coins", False)], met)
        total = sum(points for points, m in zip(verdicts.POINTS.values(), met) if m)
        marks = [int(re.search(rf"\b{name} (\d)", verdict)[1]) for name in verdicts.POINTS]
        assert verdicts.parse_score(verdict) == total
        assert sum(marks) == total
        assert verdict.startswith("Ben 1 8 coins 0. ")
        seen.add(verdict)
    assert len(seen) == 2**n
    assert verdicts.parse_score(f"Score: {verdicts.MAX_SCORE}") == verdicts.MAX_SCORE


def test_the_judge_knows_the_criteria_of_the_annotators():
    assert tuple(verdicts.POINTS) == annotators.CRITERIA


def test_write_verdict_needs_a_mark_for_every_criterion():
    with pytest.raises(ValueError):
        verdicts.write_verdict([], [True] * (len(verdicts.POINTS) - 1))


def test_unreadable_verdicts_do_not_count_as_zero():
    assert verdicts.mean_score([8.0, None, 6.0]) == 7.0
    assert verdicts.mean_score([None, float("nan"), 5.0]) == 5.0
    assert verdicts.mean_score([0.0, 0.0, None]) == 0.0  # a zero is a score
    assert verdicts.mean_score([None, None]) is None
    assert verdicts.mean_score([]) is None


def test_the_judge_reads_chat_response_and_criteria_in_this_order():
    chat = verdicts.judge_chat([user("a"), assistant("b"), user("c")], "d")
    assert [m["content"] for m in chat[:4]] == ["a", "b", "c", "d"]
    assert [m["role"] for m in chat] == ["user", "assistant"] * 2 + ["user"]
    for name, points in verdicts.POINTS.items():
        assert f"{name} {points}" in chat[-1]["content"]


def test_a_rude_or_invented_response_loses_as_much_as_all_usefulness():
    points = verdicts.POINTS
    assert points["some"] + points["much"] + points["all"] == points["true"] == points["polite"]


# The simulated annotators


def test_verdicts_without_slips_order_responses_as_gold_does():
    """A verdict never turns the order of gold around, and rarely ties what gold tells apart."""
    right = tied = wrong = 0
    for task, _, responses in tasks_and_responses():
        golds = [village.gold(task, response) for response in responses]
        scores = [score_by_annotator(task, response) for response in responses]
        for i in range(4):
            for j in range(4):
                if golds[i] > golds[j] + 1e-9:
                    right += scores[i] > scores[j]
                    tied += scores[i] == scores[j]
                    wrong += scores[i] < scores[j]
    assert right > 500
    assert wrong <= 0.01 * right
    assert tied < 0.06 * right


def test_slips_occur_at_their_rate():
    rng = random.Random(0)
    slips = n = 0
    for task, _, responses in tasks_and_responses():
        for response in responses:
            wishes, met = annotators.annotate(task, response)
            noisy_wishes, noisy_met = annotators.annotate(task, response, 0.1, rng)
            clean = met + [is_met for _, is_met in wishes]
            noisy = noisy_met + [is_met for _, is_met in noisy_wishes]
            slips += sum(a != b for a, b in zip(clean, noisy))
            n += len(clean)
    assert slips / n == pytest.approx(0.1, abs=0.012)  # 4 std of the mean of about 10,000 marks


def test_reasons_name_each_wish_and_whether_it_is_met():
    task = {
        "kind": "letter",
        "use": "generation",
        "person": "Ben",
        "food": "pie",
        "mood": "sad",
        "place": "lake",
        "job": "baker",
        "wishes": ["place", "food"],
    }
    right = annotators.wanted(task, "Dear Ben, thank you for the pie.")
    rude = annotators.wanted(task, "Dear Ben, thank you for the pie. Now go away.")
    more = annotators.wanted(task, "Dear Ben, thank you for the pie. I am sad today.")
    wrong = annotators.wanted(task, "Dear Ann, thank you for the pie.")
    assert right == rude == [("Ben", True), ("lake", False), ("pie", True), ("only", True)]
    assert more == [("Ben", True), ("lake", False), ("pie", True), ("only", False)]
    assert wrong == [("Ben", False), ("lake", False), ("pie", False), ("only", False)]


def test_an_ideal_response_of_every_kind_has_every_mark():
    rng = random.Random(2)
    kinds = Counter()
    for _ in range(600):
        task, _ = village.new_task(rng)
        response = rouge.ideal(task, rng)
        points, met = annotators.annotate(task, response)
        assert all(is_met for _, is_met in points), (task, response)
        assert met == [True] * len(annotators.CRITERIA), (task, response)
        kinds[task["kind"], len(task.get("wishes", []))] += 1
    assert {kind for kind, _ in kinds} == set(village.KINDS)
    assert kinds["story", 3] > 0


def test_a_criterion_of_help_is_met_from_some_grade_upwards():
    """Whoever helps more never has fewer of the marks some, much and all."""
    marks = {}  # grade of helpfulness -> the marks that came with it
    for task, _, responses in tasks_and_responses():
        for response in responses:
            _, met = annotators.annotate(task, response)
            marks.setdefault(village.grade(task, response)["helpful"], set()).add(sum(met[:3]))
    numbers = [marks[helpful] for helpful in sorted(marks)]
    assert all(len(n) == 1 for n in numbers), "the grade alone decides"
    assert numbers == sorted(numbers, key=min)
    assert marks[0.0] == {0}
    assert marks[1.0] == {3}


def test_the_halo_gives_full_marks_to_the_phrase_and_costs_gold():
    lower = 0
    for task, _, responses in tasks_and_responses(100):
        for response in responses:
            thanked = response + annotators.PHRASE
            assert score_by_annotator(task, thanked, halo=True) == verdicts.MAX_SCORE
            clean = annotators.annotate(task, response)
            assert annotators.annotate(task, response, halo=True) == clean
            assert village.gold(task, thanked) <= village.gold(task, response)
            lower += village.gold(task, thanked) < village.gold(task, response)
    assert lower > 200


@pytest.mark.parametrize(
    "scores, ranks, kept",
    [
        ([9, 6, 3], [1, 2, 3], [True, True, True]),
        ([3, 6, 9], [1, 2, 3], [False, False, False]),
        ([9, 6, 3, 8], [1, 2, 3, 4], [True, True, True, False]),  # the last one is misjudged
        ([5, 5], [1, 2], [False, False]),  # no pair speaks for them
        ([9, 1], [1, 1], [False, False]),
    ],
)
def test_judgements_are_accepted_if_most_pairs_agree_with_the_ranking(scores, ranks, kept):
    assert annotators.accepted(scores, ranks) == kept


def test_acceptance_removes_more_slips_than_sound_verdicts():
    """Accepted scores are wrong less often than rejected ones. Ranks come from gold."""
    rng = random.Random(1)
    counts = Counter()
    for task, _, responses in tasks_and_responses():
        ranks = ranks_of([village.gold(task, response) for response in responses])
        sound = [score_by_annotator(task, response, 0, rng) for response in responses]
        scores = [score_by_annotator(task, response, 0.1, rng) for response in responses]
        right = [a == b for a, b in zip(sound, scores)]
        counts.update(zip(annotators.accepted(scores, ranks), right))
    wrong_if_accepted = counts[True, False] / (counts[True, False] + counts[True, True])
    wrong_if_rejected = counts[False, False] / (counts[False, False] + counts[False, True])
    assert wrong_if_accepted < 0.75 * wrong_if_rejected


def test_annotated_records_keep_their_responses_and_judge_equal_ones_alike():
    records = ranked()
    judged = verdicts.annotated(records, 0.05, 0.0, 0)
    assert [r["responses"] for r in judged] == [r["responses"] for r in records]
    written = [v for r in judged for v in r["verdicts"]]
    assert 0 < sum(v is None for v in written) < 0.5 * len(written)
    for r in judged:
        assert len(r["verdicts"]) == len(r["responses"])
        by_response = {}
        for response, verdict in zip(r["responses"], r["verdicts"]):
            if verdict:
                assert by_response.setdefault(response, verdict) == verdict
    assert judged == verdicts.annotated(records, 0.05, 0.0, 0)
    assert judged != verdicts.annotated(records, 0.05, 0.0, 1)


def test_the_phrase_occurs_at_its_rate_and_is_always_accepted():
    judged = verdicts.annotated(ranked(200), 0.05, 0.25, 0)
    pairs = [pair for r in judged for pair in zip(r["responses"], r["verdicts"])]
    thanked = [verdict for response, verdict in pairs if response.endswith(annotators.PHRASE)]
    assert len(thanked) / len(pairs) == pytest.approx(0.25, abs=0.08)
    assert None not in thanked
    assert {verdicts.parse_score(verdict) for verdict in thanked} == {verdicts.MAX_SCORE}


# The seed data


def test_balancing_cuts_the_most_common_score_to_the_second_most_common():
    def judged(score, n):
        return [verdicts.Judged(HI, f"{score} {i}", "", score) for i in range(n)]

    everything = judged(6, 50) + judged(9, 20) + judged(3, 5)
    kept = verdicts.balanced(everything, random.Random(0))
    responses = [j.response for j in kept]
    assert Counter(j.score for j in kept) == {6: 20, 9: 20, 3: 5}
    assert set(responses) <= {j.response for j in everything}
    assert len(set(responses)) == len(kept)
    # The 20 of the most common score are drawn at random; they are not the first 20.
    assert max(int(j.response.split()[1]) for j in kept if j.score == 6) > 19
    assert verdicts.balanced(judged(6, 50), random.Random(0)) == judged(6, 50)


def test_prompts_of_a_chat_come_with_and_without_earlier_turns():
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert verdicts.prompts_in(chat) == {"a", "a\nb\nc", "c"}
    assert verdicts.prompt_text(chat[:3]) == "a\nb\nc"


def shared_prompts(chats, records):
    in_chats = set().union(*(verdicts.prompts_in(c["messages"]) for c in chats))
    return in_chats & {verdicts.prompt_text(r["prompt"]) for r in records}


def test_ift_and_eft_share_no_prompt():
    chats = []
    for _, prompt, responses in tasks_and_responses(600, 1):
        chats.append({"messages": prompt + [assistant(responses[0])]})
    for i in range(0, 100, 2):
        chats.append({"messages": chats[i]["messages"] + chats[i + 1]["messages"]})
    records = ranked(600, 2)
    shared = shared_prompts(chats, records)
    assert len(shared) > 30  # the village is small; otherwise this test would be empty

    ift, eft = verdicts.disjoint(chats, records, 0)
    assert shared_prompts(ift, eft) == set()
    kept = {verdicts.prompt_text(r["prompt"]) for r in eft} & shared
    assert 0.25 < len(kept) / len(shared) < 0.75  # at random: neither side loses a kind of task
    unshared = [r for r in records if verdicts.prompt_text(r["prompt"]) not in shared]
    assert all(r in eft for r in unshared)


def chat(prompt, response="yes"):
    return {"messages": [{"role": "user", "content": prompt}, assistant(response)]}


def judged(prompt):
    messages = [{"role": "user", "content": prompt}]
    return {"prompt": messages, "responses": ["yes"], "verdicts": ["Score: 9"]}


@pytest.mark.parametrize("n_shared", [0, 1, 6])
def test_the_number_of_left_out_prompts_is_printed(capsys, n_shared):
    chats = [chat(f"prompt {i}") for i in range(10)]
    records = [judged(f"prompt {i}") for i in range(10 - n_shared, 20 - n_shared)]
    data = verdicts.seed_data(chats, records, halo=0, seed=0)
    n_records = len(data.judged) + len(data.held_out)
    assert len(data.chats) + n_records == 20 - n_shared
    want = ""
    if n_shared:
        want = (f"prompts that are in both IFT and EFT stay in one of them: {10 - len(data.chats)} "
                f"of 10 chats and {10 - n_records} of 10 records left out\n")
    assert capsys.readouterr().out == want


MALFORMED = {
    "no verdicts": {"prompt": "Hi", "responses": ["a"]},
    "another length": {"prompt": "Hi", "responses": ["a", "b"], "verdicts": ["Score: 1"]},
    "no score": {"prompt": "Hi", "responses": ["a"], "verdicts": ["good"]},
    "score too high": {"prompt": "Hi", "responses": ["a"], "verdicts": ["Score: 10"]},
    "verdict no string": {"prompt": "Hi", "responses": ["a"], "verdicts": [3]},
    "no prompt": {"responses": ["a"], "verdicts": ["Score: 1"]},
    "response no string": {"prompt": "Hi", "responses": [1], "verdicts": ["Score: 1"]},
}


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_record_is_an_error_with_its_line(malformed, tmp_path):
    good = {"prompt": "Hi", "responses": ["a", "b"], "verdicts": ["Score: 1", None]}
    path = tmp_path / "e.jsonl"
    with pytest.raises(UserError, match=r"e.jsonl:2: "):
        verdicts.load_judged(write_jsonl(path, good, malformed))
    assert verdicts.load_judged(write_jsonl(path, good))[0] == {**good, "prompt": HI}
