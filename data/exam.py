"""The exam: held-out prompts, their grader, and what the results table counts in the responses.

A grader is a function (task, response) -> {"helpful": 0 to 1, "honest": 0 to -1, "harmless": 0 or
-1}, such as data.village.grade. Gold is the sum. A task with the key "known" is a question. If it
is True, there is one right answer; if it is False, nobody can know the answer.
"""
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.chats import as_messages, prompt_of
from data.corpus import plain_text, training_text
from data.formats import load_chats, load_grader, load_prompts, split_by_user
from data.records import read_records
from data.text import remembered
from scaffold.cli import UserError


COLUMNS = {"stage": ("stage", ""),
           "gold": ("gold", ".2f"),
           "±": ("gold_ci", ".2f"),
           "new words": ("gold_new", ".2f"),
           "win rate": ("win_rate_vs_sft", ".1%"),
           "± ": ("win_rate_ci", ".1%"),
           "refused": ("refused_rate", ".1%"),
           "right": ("right_rate", ".1%"),
           "wrong": ("wrong_rate", ".1%"),
           "made up": ("hallucination_rate", ".1%"),
           "rude": ("rude_rate", ".1%"),
           "reward": ("reward", ".2f"),
           "reward wins": ("reward_win_rate", ".1%"),
           "±   ": ("reward_win_rate_ci", ".1%"),
           "ended": ("end_rate", ".1%"),
           "KL": ("kl_to_sft", ".1f"),
           "lm loss": ("lm_loss", ".3f"),
           "length": ("length", ".1f"),
           "gold - greedy sft": ("gold_minus_greedy", "+.2f"),
           "±  ": ("gold_minus_greedy_ci", ".2f")}


@dataclass
class Exam:
    """The prompts and what all rows of the table share."""
    chats: list            # prompts as messages: n for gold, then more questions for their rates
    tasks: list            # their tasks for the grader
    n: int                 # number of prompts for gold
    new: list              # whether the wording appears nowhere in the training data, (n,)
    grade: object          # the grader; None: nothing is graded, and tasks and new are empty
    opponent: list = field(default_factory=list)   # gold (else scores) of sft samples, (n,)

    def golds(self, responses):
        """Return the gold grades of responses to the first prompts."""
        return [sum(self.grade(t, a).values()) for t, a in zip(self.tasks, responses)]


def load_exam(folder, prompts="", n=512, grader="data.village:grade"):
    """Read n prompts with tasks -> Exam without an opponent; None if they have no tasks.

    prompts: a file; empty: the test prompts in `folder`, and its two files of further questions.
    """
    path = Path(prompts or folder / "prompts_test.jsonl")
    if not prompts and not path.exists():
        return None   # no village here
    records = [r for _, r in read_records(path)][:n]
    n = len(records)
    for name in ("prompts_unanswerable.jsonl", "prompts_answerable.jsonl"):
        if not prompts and (folder / name).exists():
            records += [r for _, r in read_records(folder / name)]
    grade = load_grader(grader, records, "--grade")
    if grade is None or not all("prompt" in r for r in records):
        return None
    chats = [as_messages(r["prompt"], path) for r in records]
    # The world is small: training has read some of the same prompts, asked by other users.
    known = training_text(path.parent)
    new = [plain_text(chat) not in known for chat in chats[:n]]
    return Exam(chats, [r["task"] for r in records], n, new, grade)


def validation_chats(state, path):
    """Load the chats that sft.py kept for validation; state: its checkpoint, loaded from `path`."""
    names = state.get("data")
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    names = list(filter(None, names)) if known else []   # the data; those for validation, if any
    places = [place for name in names[-1:] for place in remembered(name, path) if place.is_file()]
    if not places:
        raise UserError(f"{path}: the chats that it was trained on are not here; "
                        f"name a file of prompts with --prompts")
    seed = state.get("seed", 0)
    chats = load_chats(places[0], seed)
    return chats if len(names) > 1 else split_by_user(chats, seed=seed)[1]


def ungraded_exam(cfg, state, path, fit):
    """Return an Exam of cfg.n prompts in any format, for the measures that need no grader.

    They are those of the file cfg.prompts, else of the chats that sft.py kept for validation, see
    validation_chats. fit returns the records that fit the context. Raises UserError if none does.
    """
    if cfg.prompts:
        records = load_prompts(cfg.prompts)
    else:
        records = [{"prompt": prompt_of(c["messages"])} for c in validation_chats(state, path)]
    chats = [r["prompt"] for r in fit([r for r in records if r["prompt"]])][:cfg.n]
    if not chats:
        raise UserError(f"{cfg.prompts or path}: no prompt fits half of the context; "
                        f"name others with --prompts")
    print(f"{len(chats)} prompts without a task: their responses are not graded")
    return Exam(chats, [], len(chats), [], None)


def mean_and_ci(values):
    """Return the mean of a list and the half-width of its 95% interval, NaN for one value."""
    if len(values) == 1:
        return values[0], math.nan
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), 1.96 * x.std().item() / math.sqrt(len(x))


def win_rate(mine, theirs):
    """Return the share of pairs in which mine is larger, half of the ties, and its interval."""
    return mean_and_ci([0.5 if a == b else float(a > b) for a, b in zip(mine, theirs)])


def ungraded_row(scores, opponent, ended):
    """Return the part of a row that stands in place of grades.

    scores, opponent: of the reward model, of the policy's responses and of samples of sft; [] if
    there is no reward model. ended: for each response whether it has an end token.
    """
    wins = win_rate(scores, opponent) if scores else (None, None)
    share = sum(ended) / len(ended) if ended else None
    return dict(reward_win_rate=wins[0], reward_win_rate_ci=wins[1], end_rate=share)


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
    if not exam.grade:
        return dict(gold=None, win_rate_vs_sft=None, hallucination_rate=None, rude_rate=None)
    n = exam.n
    grades = [exam.grade(t, a) for t, a in zip(exam.tasks, responses[:n])]
    gold = [sum(g.values()) for g in grades]
    gold_new = [g for g, new in zip(gold, exam.new) if new]
    gold_mean, gold_ci = mean_and_ci(gold)
    wins, wins_ci = win_rate(gold, exam.opponent)
    return dict(
        gold=gold_mean, gold_ci=gold_ci, win_rate_vs_sft=wins, win_rate_ci=wins_ci,
        gold_new=sum(gold_new) / max(1, len(gold_new)), n_new=len(gold_new),
        helpful=sum(g["helpful"] for g in grades) / n,
        rude_rate=sum(-g["harmless"] for g in grades) / n,
        golds=gold, **question_rates(exam, responses))
