"""The exam: which prompts are new, what a question got, and what a policy that refuses gets."""
import math
import random
from types import SimpleNamespace

import pytest

from data import corpus
from data.exam import (
    Exam, grade_row, load_exam, mean_and_ci, outcome, ungraded_exam, ungraded_row)
from data.formats import load_chats, load_val, write_records
from data.probes import writing
from data.village import IGNORANCE, KINDS, RUDE_LINES, WORDS, Reply, Wishes, grade, new_task, slots
from scaffold.cli import UserError
from tiny import assistant, chat, user, write_jsonl


@pytest.fixture(scope="module")
def exam():
    """An exam of 400 prompts in the village's shares and 200 further questions."""
    rng = random.Random(0)
    drawn = [new_task(rng) for _ in range(400)]
    drawn += [new_task(rng, use="open_qa") for _ in range(200)]
    tasks, chats = zip(*drawn)
    exam = Exam(chats, tasks, n=400, new=[True] * 400, grade=grade)
    exam.opponent = exam.golds(lazy_responses(exam))
    return exam


def lazy_responses(exam):
    """Respond as greedy decoding of sft does at worst: the first sentence, one word, an invention.

    Nothing is rude, every short answer is right, and no wish is met.
    """
    responses = []
    for task in exam.tasks:
        kind = KINDS[task["kind"]]
        if isinstance(kind, Wishes):
            responses.append(writing(task, []))
        elif isinstance(kind, Reply):
            _, full, short, _ = kind.FORMS[task["topic"]]
            asked = slots(short)[-1]
            form = short if task["known"] else full
            responses.append(form.format(**{asked: WORDS[asked][0]} | task))
        else:
            responses.append(f"{WORDS[task['topic']][0]}.")
    return responses


def questions(n=300):
    rng = random.Random(1)
    uses = ("open_qa", "closed_qa", "extract", "chat", "summary", "rewrite", "classify", "other")
    return [new_task(rng, use=use)[0] for use in uses for _ in range(n // len(uses))]


def test_mean_and_ci_by_hand():
    mean, half_width = mean_and_ci([0.0, 1.0, 0.5, 0.5])
    assert mean == 0.5
    assert half_width == pytest.approx(1.96 * math.sqrt(0.5 / 3) / 2)


@pytest.mark.parametrize("line", ["", *RUDE_LINES])
def test_the_outcome_of_a_question_ignores_a_rude_line(line):
    def said(response):
        return f"{line} {response}" if line in RUDE_LINES[:3] else f"{response} {line}".strip()

    for task in questions():
        _, full, short, _ = KINDS[task["kind"]].FORMS[task["topic"]]
        for refusal in IGNORANCE:
            wanted = "refused" if task["known"] else "admitted"
            assert outcome(grade, task, said(refusal)) == wanted
        if task["known"]:
            assert outcome(grade, task, said(full.format(**task))) == "right"
            assert outcome(grade, task, said(short.format(**task))) == "right"
        for other in ("", "Well.", "I do not know", "I do not know. Or do I?"):
            wanted = "wrong" if task["known"] else "made up"
            assert outcome(grade, task, said(other)) == wanted


def test_a_task_with_many_good_responses_has_no_outcome():
    rng = random.Random(2)
    for use in ("generation", "brainstorm"):
        for _ in range(50):
            assert outcome(grade, new_task(rng, use=use)[0], "I do not know.") is None


def test_the_three_rates_of_answerable_questions_add_up_to_one(exam):
    rng = random.Random(3)
    lazy = lazy_responses(exam)
    mixed = [rng.choice([response, "I do not know.", "Well."]) for response in lazy]
    row = grade_row(exam, mixed)
    assert row["refused_rate"] + row["right_rate"] + row["wrong_rate"] == pytest.approx(1)
    assert min(row["refused_rate"], row["right_rate"], row["wrong_rate"]) > 0.25
    assert row["hallucination_rate"] == pytest.approx(2 / 3, abs=0.15)
    known = [task["known"] for task in exam.tasks if "known" in task]
    assert row["n_answerable"] == sum(known)
    assert row["n_unanswerable"] == len(known) - sum(known)


def test_rates_without_questions_are_missing():
    task, messages = new_task(random.Random(0), use="brainstorm")
    row = grade_row(Exam([messages] * 2, [task] * 2, 2, [True] * 2, grade, [0, 0]), ["a", "b"])
    for key in ("refused_rate", "right_rate", "wrong_rate", "hallucination_rate"):
        assert row[key] is None
    assert row["n_answerable"] == row["n_unanswerable"] == 0


def test_a_policy_that_refuses_everything_looks_bad(exam):
    """It is below even a lazy policy that invents an answer to every unanswerable question."""
    refusing = grade_row(exam, ["I do not know."] * len(exam.tasks))
    lazy = grade_row(exam, lazy_responses(exam))
    assert refusing["refused_rate"] == 1
    assert refusing["right_rate"] == refusing["hallucination_rate"] == 0
    assert lazy["right_rate"] == lazy["hallucination_rate"] == 1
    unanswerable = [task.get("known") is False for task in exam.tasks[:400]]
    assert refusing["gold"] == pytest.approx(sum(unanswerable) / 400)
    assert refusing["gold"] + 0.03 < lazy["gold"]
    assert refusing["win_rate_vs_sft"] < 0.3


def test_new_words_stand_in_no_text_and_in_no_turn_of_a_chat(tmp_path):
    """Each prompt is asked once, in another place of the training data, except the last two."""
    places = {
        "in a text": "In a text?",
        "in sft_train": "In a chat?",
        "earlier turn": "Earlier?",
        "in rank_train": "In rankings?",
        "in prompts_train": "In prompts?",
        "in a test file": "In a test?",
        "nowhere": "Nowhere?",
    }
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "forum.txt").write_text("Ann?\nYes.\n<|end|>\nIn a text?\nNo.\n")
    turns = chat("Earlier?", "Yes.", "In a chat?", "No.", "Bye.", "Bye.")
    write_jsonl(tmp_path / "sft_train.jsonl", {"messages": turns})
    write_jsonl(tmp_path / "rank_train.jsonl", {"prompt": [user("In rankings?")]})
    write_jsonl(tmp_path / "prompts_train.jsonl", {"prompt": [user("In prompts?")]})
    write_jsonl(tmp_path / "prompts_rephrased.jsonl", {"prompt": [user("In a test?")]})
    task = {"kind": "brainstorm", "topic": "animal", "number": "two"}
    records = [{"prompt": [user(prompt)], "task": task} for prompt in places.values()]
    known_chat = [user("Earlier?"), assistant("Yes."), user("In a chat?")]
    new_chat = [user("In a chat?"), assistant("Yes."), user("Earlier?")]
    records += [{"prompt": messages, "task": task} for messages in (known_chat, new_chat)]
    write_records(tmp_path / "prompts_test.jsonl", records)
    new = load_exam(tmp_path).new
    assert [place for place, is_new in zip(places, new) if is_new] == ["in a test file", "nowhere"]
    assert new[-2:] == [False, True]


def test_a_prompt_is_new_until_a_document_shows_it(tmp_path):
    """The school and the forum write prompts as the base model is prompted: one turn a line."""
    (tmp_path / "pretrain").mkdir()
    rng = random.Random(0)
    records = []
    for use in ("open_qa", "chat", "generation", "summary"):
        task, messages = new_task(rng, use=use)
        records.append({"prompt": messages, "task": task})
    write_records(tmp_path / "prompts_test.jsonl", records)
    assert load_exam(tmp_path).new == [True] * 4
    document = corpus.plain_text(records[1]["prompt"], "Your name is Tom.")
    (tmp_path / "pretrain" / "school.txt").write_text(f"A cat.\n<|end|>\n{document}\n")
    assert load_exam(tmp_path).new == [True, False, True, True]


def test_the_further_questions_are_read_with_the_test_prompts_alone(tmp_path):
    corpus.write(tmp_path, seed=1, megabytes=0.05)
    exam = load_exam(tmp_path, n=100)
    assert exam.n == 100
    assert len(exam.tasks) == len(exam.chats) == 100 + 256 + 256
    assert sum(task.get("known") is True for task in exam.tasks[100:]) == 256
    other = load_exam(tmp_path, prompts=str(tmp_path / "prompts_rephrased.jsonl"), n=100)
    assert len(other.tasks) == 100


WITHOUT_TASKS = {
    "none": [{"prompt": "Hi"}],
    "one of two": [{"prompt": "Hi", "task": {"kind": "cow", "known": True}}, {"prompt": "Ho"}],
    "a string": [{"prompt": "Hi", "task": "greet"}],
    "another format": [{"instruction": "Hi", "output": "Ho", "task": {"kind": "cow"}}],
}


@pytest.mark.parametrize("records", WITHOUT_TASKS.values(), ids=WITHOUT_TASKS)
def test_prompts_without_tasks_give_no_graded_exam(tmp_path, records):
    assert load_exam(tmp_path, prompts=str(write_jsonl(tmp_path / "p.jsonl", *records))) is None
    assert load_exam(tmp_path) is None  # no village in this folder


def chats(n):
    return [{"messages": chat(f"Hi {i}", "Ho"), "user": f"u{i % 25}"} for i in range(n)]


def ask(state, path, prompts="", n=512, fit=lambda records: records):
    """Return the first words of the prompts of an ungraded exam."""
    exam = ungraded_exam(SimpleNamespace(prompts=prompts, n=n), state, path, fit)
    assert exam.n == len(exam.chats)
    assert exam.grade is None
    return [c[0]["content"] for c in exam.chats]


def test_an_ungraded_exam_asks_what_sft_held_out(tmp_path):
    data = write_jsonl(tmp_path / "chats.jsonl", *chats(100))
    val = write_jsonl(tmp_path / "val.jsonl", *chats(7))
    checkpoint = tmp_path / "sft.pt"
    for seed in (0, 5):
        _, held_out = load_val(load_chats(data, seed), "", load_chats, seed)
        want = [c["messages"][0]["content"] for c in held_out]
        assert len(want) == 4
        assert ask({"data": [str(data), ""], "seed": seed}, checkpoint) == want
        assert ask({"data": ["/gone/chats.jsonl", ""], "seed": seed}, checkpoint) == want
    assert ask({"data": [str(data), str(val)]}, checkpoint) == [f"Hi {i}" for i in range(7)]
    assert ask({"data": [str(data), str(val)]}, checkpoint, n=3) == ["Hi 0", "Hi 1", "Hi 2"]


FORGOTTEN = [{}, {"data": "x"}, {"data": []}, {"data": ["", ""]}, {"data": [5, ""]},
             {"data": ["gone.jsonl", ""]}, {"data": ["chats.jsonl", "gone.jsonl"]}]


@pytest.mark.parametrize("state", FORGOTTEN, ids=str)
def test_an_ungraded_exam_without_chats_names_the_flag(tmp_path, state):
    write_jsonl(tmp_path / "chats.jsonl", *chats(50))
    with pytest.raises(UserError, match="sft.pt: the chats .* not here; .*--prompts"):
        ask(state, tmp_path / "sft.pt")


def test_an_ungraded_exam_takes_any_format_and_what_fits(tmp_path):
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    records = [pair, pair | {"prompt": "Ho"}, {"messages": chat("Hu")}]
    path = write_jsonl(tmp_path / "p.jsonl", *records)
    assert ask({}, tmp_path, str(path)) == ["Hi", "Ho", "Hu"]
    assert ask({}, tmp_path, str(path), fit=lambda records: records[1:]) == ["Ho", "Hu"]
    with pytest.raises(UserError, match="p.jsonl: no prompt fits"):
        ask({}, tmp_path, str(path), fit=lambda records: [])


def test_the_row_without_grades_by_hand():
    row = ungraded_row([1.0, 0.0, 2.0, 5.0], [0.5, 0.5, 2.0, 1.0], [True, False, True, True])
    assert row["reward_win_rate"] == 2.5 / 4
    assert row["reward_win_rate_ci"] == pytest.approx(1.96 * math.sqrt(0.6875 / 3) / 2)
    assert row["end_rate"] == 0.75
    assert set(ungraded_row([], [], ()).values()) == {None}
    assert ungraded_row([1.0], [0.5], [True])["reward_win_rate"] == 1
    assert math.isnan(ungraded_row([1.0], [0.5], [True])["reward_win_rate_ci"])
