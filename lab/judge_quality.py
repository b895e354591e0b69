"""How good are the responses of a model that trains on its own grades, and how well does it judge?

self_reward.py calls this after every round, and logs and prints the rows of this table:

    gold ±            mean gold score of the responses to the test prompts, and its 95% interval
    win/tie/lose M1   % of responses with a higher, an equal, a lower gold score than M1's
    last              the same against the model before this round
    own acc           share of pairs of the model's own responses that its judge orders as gold does
    log p             the same if the response with the higher log-probability wins: no judge needed
    r                 rank correlation of the judge's scores with gold
    EFT acc           accuracy of the judge on held-out responses of the SFT model
    score             mean score by the judge; it grows with self-praise, too
    made up, rude     share of inventions where nobody can know the answer; share of rude responses
    length            tokens per response
    pairs             pairs of the round, and the shares that gold confirms (agree) and contradicts
    thanks            with --halo: share of responses that end with the overrated phrase

Gold comes from a program that grades (self_reward.py --grade), which no model trains on. Without
one, only score, length and pairs are measured. Read self_reward.py first.
"""
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dpo
import eval
import reward
import self_reward
import sft
from data.annotators import PHRASE
from data.verdicts import mean_score


def average_ranks(x):
    """Rank n numbers; equal numbers share the mean of their ranks. -> (n,)"""
    x = torch.tensor(x, dtype=torch.float64)
    return (x[:, None] > x).sum(1) + 0.5 * (x[:, None] == x).sum(1)           # (n,)


def spearman(x, y):
    """Rank correlation of two lists of numbers; nan if one of them is constant."""
    return torch.corrcoef(torch.stack([average_ranks(x), average_ranks(y)]))[0, 1].item()


def missing_as_lowest(scores):
    """Give responses without a score (None) one below all others."""
    return [[-1.0 if s is None else s for s in row] for row in scores]


def accuracy(scores, golds):
    """Share of pairs of different gold that the scores order as gold does; equal scores count half.

    scores, golds: a row per prompt, an entry per response. Pairs are pairs of one row.
    """
    ranks = [[-g for g in row] for row in golds]
    return reward.pair_accuracy(missing_as_lowest(scores), ranks)[0]


def win_tie_lose(golds, others):
    """Shares of gold scores above, equal to and below the other model's in the same place."""
    pairs = [(a, b) for row, other in zip(golds, others) for a, b in zip(row, other)]
    wins = sum(a > b for a, b in pairs)
    losses = sum(a < b for a, b in pairs)
    ties = len(pairs) - wins - losses
    return [n / len(pairs) for n in (wins, ties, losses)]


def agreement(pairs, golds):
    """Shares of self_reward.Pairs that gold confirms and contradicts; {} without gold scores."""
    if golds is None:
        return {}
    agree = sum(golds[p.prompt][p.chosen] > golds[p.prompt][p.rejected] for p in pairs)
    contradict = sum(golds[p.prompt][p.chosen] < golds[p.prompt][p.rejected] for p in pairs)
    return dict(agree=agree / len(pairs), contradict=contradict / len(pairs))


def mean_length(enc, responses):
    """Mean number of tokens of a list of strings."""
    return sum(len(enc.encode_ordinary(r)) for r in responses) / len(responses)


def likelihood(model, enc, prompts, responses):
    """Log-probability of each response under the model. -> rows like `responses`"""
    examples = []
    for p, row in zip(prompts, responses):
        examples += [self_reward.tokenize(enc, p["prompt"], response) for response in row]
    values = iter(dpo.all_logprobs(model, examples).tolist())
    return [[next(values) for _ in row] for row in responses]


class Grades(NamedTuple):
    """What the program that grades says of the responses to some prompts."""
    golds: list       # gold scores, a row per prompt
    row: dict         # their mean with its interval, shares of made-up and of rude responses


def grade_all(prompts, responses, grade):
    """Grade rows of responses to prompts that have a "task". Returns Grades."""
    golds = []
    made_up = []
    rude = []
    for p, row in zip(prompts, responses):
        grades = [grade(p["task"], response) for response in row]
        golds.append([sum(g.values()) for g in grades])
        rude += [-g["harmless"] for g in grades]
        if not p["task"].get("known", True):
            made_up += [-g["honest"] for g in grades]
    mean, ci = eval.interval([sum(row) / len(row) for row in golds])
    return Grades(golds, dict(gold=mean, gold_ci=ci, made_up=sum(made_up) / max(1, len(made_up)),
                              rude=sum(rude) / len(rude)))


class EvalSet(NamedTuple):
    """What every model is measured on."""
    prompts: list     # records with a "prompt" and perhaps a "task"
    held_out: list    # judged responses; none if they cannot be graded
    grade: object     # function of (task, response), or None


class Measured(NamedTuple):
    row: dict         # of the table
    golds: list       # gold scores of the responses, or None
    responses: list   # a row per prompt
    scores: list      # by the judge


def measure(policy, judge_model, enc, test, cfg):
    """Sample responses of the policy, let the judge score them, grade both. Returns Measured."""
    responses = self_reward.sample(policy, enc, test.prompts, cfg.candidates, cfg.max_new_tokens,
                                   cfg.seed)
    scores, parsed = self_reward.judge(judge_model, enc, test.prompts, responses, cfg, cfg.seed)
    flat = [response for row in responses for response in row]
    row = dict(self_score=mean_score([s for values in scores for s in values]),
               parsed=parsed, length=mean_length(enc, flat))
    if not test.grade:
        return Measured(row, None, responses, scores)
    golds, grade_row = grade_all(test.prompts, responses, test.grade)
    row |= grade_row
    row["judge_accuracy"] = accuracy(scores, golds)
    judged = [(s, g) for values, gold_row in zip(scores, golds) for s, g in zip(values, gold_row)
              if s is not None]
    row["spearman"] = spearman(*zip(*judged)) if judged else None
    row["likelihood_accuracy"] = accuracy(likelihood(policy, enc, test.prompts, responses), golds)
    if test.held_out:
        others = [r["responses"] for r in test.held_out]
        other_scores, _ = self_reward.judge(judge_model, enc, test.held_out, others, cfg, cfg.seed)
        other_golds = grade_all(test.held_out, others, test.grade).golds
        row["held_out_accuracy"] = accuracy(other_scores, other_golds)
    if cfg.halo:
        row["thanks"] = sum(r.endswith(PHRASE.strip()) for r in flat) / len(flat)
    return Measured(row, golds, responses, scores)


def rows_without_training(m1, measured, enc, test, cfg):
    """Measure what M1 gives without training: its greedy response, and the best of N by its judge.

    -> two rows. Each response is compared with all N samples of M1; the best is one of them.
    """
    best = []
    for row, scores in zip(measured.responses, missing_as_lowest(measured.scores)):
        best.append(row[scores.index(max(scores))])
    chats = [p["prompt"] for p in test.prompts]
    greedy = sft.reply(m1, enc, chats, cfg.max_new_tokens, temperature=0)
    rows = []
    for stage, responses in (("M1 greedy", greedy), (f"M1 best of {cfg.candidates}", best)):
        golds, grade_row = grade_all(test.prompts, [[r] for r in responses], test.grade)
        wins = win_tie_lose([row * cfg.candidates for row in golds], measured.golds)
        rows.append(dict(stage=stage, vs_m1=wins, length=mean_length(enc, responses)) | grade_row)
    return rows


def report(stage, policy, judge_model, enc, test, history, cfg):
    """Measure a model, and compare it with M1 and with the model before it. -> rows of the table

    history: of the models so far, [gold scores, responses] each; this model is appended. The main
    run has two more rows for M1.
    """
    measured = measure(policy, judge_model, enc, test, cfg)
    golds = measured.golds
    row = dict(stage=stage) | measured.row
    if test.grade and history:
        row["vs_m1"] = win_tie_lose(golds, history[0][0])
        row["vs_last"] = win_tie_lose(golds, history[-1][0])
    rows = [row]
    if test.grade and not history and self_reward.variant(cfg) == "main":
        rows += rows_without_training(policy, measured, enc, test, cfg)
    history.append([golds, measured.responses])
    return rows


class Column(NamedTuple):
    heading: str
    key: str          # of the row
    form: str         # format of the number; SHARES for three of them


SHARES = "%/%/%"
COLUMNS = [
    Column("gold", "gold", ".3f"),
    Column("±", "gold_ci", ".2f"),
    Column("win/tie/lose M1", "vs_m1", SHARES),
    Column("last", "vs_last", SHARES),
    Column("own acc", "judge_accuracy", ".3f"),
    Column("log p", "likelihood_accuracy", ".3f"),
    Column("r", "spearman", ".2f"),
    Column("EFT acc", "held_out_accuracy", ".3f"),
    Column("score", "self_score", ".2f"),
    Column("made up", "made_up", ".0%"),
    Column("rude", "rude", ".1%"),
    Column("length", "length", ".1f"),
    Column("pairs", "pairs", "d"),
    Column("agree", "agree", ".2f"),
    Column("contra", "contradict", ".2f"),
    Column("thanks", "thanks", ".0%"),
]


def cell(value, form):
    """Format a value of the table; None is '-'."""
    if value is None:
        return "-"
    if form == SHARES:
        return "/".join(f"{100 * share:.0f}" for share in value)
    return format(value, form)


def format_table(rows):
    """Rows -> the printed table, without the columns that no row has."""
    columns = [c for c in COLUMNS if any(row.get(c.key) is not None for row in rows)]
    lines = [["run", "model"] + [c.heading for c in columns]]
    for row in rows:
        lines.append([row["run"], row["stage"]] + [cell(row.get(c.key), c.form) for c in columns])
    widths = [max(map(len, column)) for column in zip(*lines)]
    printed = []
    for line in lines:
        names = [text.ljust(width) for text, width in zip(line[:2], widths)]
        numbers = [text.rjust(width) for text, width in zip(line[2:], widths[2:])]
        printed.append("  ".join(names + numbers))
    return "\n".join(printed)


def table_of_runs(out, log_path, rows):
    """The table of a run (its log and its rows) and of all other runs in the same folder."""
    rows = list(rows)
    for path in sorted(out.glob("self_reward-*.jsonl")):
        if path != log_path:
            rows += [row for _, row in sft.read_records(path) if "stage" in row]
    return format_table(rows)
