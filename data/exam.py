"""The exam: held-out prompts, their grader, and what the results table counts in the responses.

A grader is a function (task, response) -> {"helpful": 0 to 1, "honest": 0 to -1, "harmless": 0 or
-1}, such as data.village.grade. Gold is the sum. A task with the key "known" is a question. If it
is True, there is one right answer; if it is False, nobody can know the answer.
"""
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.corpus import plain_text, training_text
from data.chats import as_messages
from data.formats import load_grader
from data.records import read_records
from scaffold.cli import UserError


@dataclass
class Exam:
    """The prompts and what all rows of the table share."""
    chats: list            # prompts as messages: n for gold, then more questions for their rates
    tasks: list            # their tasks for the grader
    n: int                 # number of prompts for gold
    new: list              # whether the wording appears nowhere in the training data, (n,)
    grade: object          # the grader
    opponent: list = field(default_factory=list)   # gold of the sft samples to compare with, (n,)

    def golds(self, responses):
        """Return the gold grades of responses to the first prompts."""
        return [sum(self.grade(t, a).values()) for t, a in zip(self.tasks, responses)]


def load_exam(folder, prompts="", n=512, grader="data.village:grade"):
    """Read n prompts with tasks -> Exam without an opponent. Raises UserError if they lack tasks.

    prompts: a file; empty: the test prompts in `folder`, and its two files of further questions.
    """
    path = Path(prompts or folder / "prompts_test.jsonl")
    records = [r for _, r in read_records(path)][:n]
    n = len(records)
    for name in ("prompts_unanswerable.jsonl", "prompts_answerable.jsonl"):
        if not prompts and (folder / name).exists():
            records += [r for _, r in read_records(folder / name)]
    grade = load_grader(grader, records, "--grade")
    if grade is None or not all("prompt" in r for r in records):
        raise UserError(f"{path}: the grader needs prompts with a task; these have none")
    chats = [as_messages(r["prompt"], path) for r in records]
    # The world is small: training has read some of the same prompts, asked by other users.
    known = training_text(path.parent)
    new = [plain_text(chat) not in known for chat in chats[:n]]
    return Exam(chats, [r["task"] for r in records], n, new, grade)


def mean_and_ci(values):
    """Return the mean of a list and the half-width of its 95% interval."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), 1.96 * x.std().item() / math.sqrt(len(x))


def outcome(grade, task, response):
    """Return what a question got: right, wrong or refused; admitted or made up if nobody can know.

    Returns None for a task that is no question.
    """
    if "known" not in task:
        return None
    # A refusal is a response that would be honest if nobody could know.
    refused = grade(task | {"known": False}, response)["honest"] == 0
    if not task["known"]:
        return "admitted" if refused else "made up"
    if refused:
        return "refused"
    return "right" if grade(task, response)["helpful"] > 0 else "wrong"


def question_rates(exam, responses):
    """Return the shares of outcomes among the answerable and the unanswerable questions."""
    outcomes = [outcome(exam.grade, t, a) for t, a in zip(exam.tasks, responses)]
    answerable = [o for o in outcomes if o in ("right", "wrong", "refused")]
    unanswerable = [o for o in outcomes if o in ("admitted", "made up")]

    def share(among, name):
        return among.count(name) / len(among) if among else None

    return dict(
        n_answerable=len(answerable), n_unanswerable=len(unanswerable),
        refused_rate=share(answerable, "refused"), right_rate=share(answerable, "right"),
        wrong_rate=share(answerable, "wrong"),
        hallucination_rate=share(unanswerable, "made up"))


def grade_row(exam, responses):
    """Grade the responses of one policy to all prompts of the exam -> part of a row."""
    n = exam.n
    grades = [exam.grade(t, a) for t, a in zip(exam.tasks, responses[:n])]
    gold = [sum(g.values()) for g in grades]
    wins = [0.5 if g == o else float(g > o) for g, o in zip(gold, exam.opponent)]
    gold_new = [g for g, new in zip(gold, exam.new) if new]
    gold_mean, gold_ci = mean_and_ci(gold)
    win_rate, win_rate_ci = mean_and_ci(wins)
    return dict(
        gold=gold_mean, gold_ci=gold_ci, win_rate_vs_sft=win_rate, win_rate_ci=win_rate_ci,
        gold_new=sum(gold_new) / max(1, len(gold_new)), n_new=len(gold_new),
        helpful=sum(g["helpful"] for g in grades) / n,
        rude_rate=sum(-g["harmless"] for g in grades) / n,
        golds=gold, **question_rates(exam, responses))
