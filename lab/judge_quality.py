"""Measure a self-rewarding model: how good its responses are, and how well it judges them.

self_reward.py calls this for M1 and after every round. The columns of its table are:

    gold, ±           mean gold score of the responses to the test prompts, its 95% interval
    win/tie/lose M1   % of responses with a gold score above, equal to and below that of M1's
    last              the same against the model of the round before
    own acc           share of pairs of the policy's responses that the judge orders as gold does
    log p             the same, ordered by the log-prob of the response, which needs no judge
    r                 rank correlation of the judge's scores with gold
    EFT acc           accuracy of the judge on held-out responses of the SFT model
    score             mean score by the judge, which also rises if the judge becomes generous
    made up           share of inventions among the responses to prompts nobody can answer
    rude, length      share of rude responses; tokens per response
    pairs             pairs of the round; gold confirms (agree) or contradicts (contra) a share
    thanks            with --halo, share of responses that end with the overrated phrase

A second table says which mistakes the judge sees: its accuracy on the probe pairs of data/probes.py
by kind, such as right against wrong. Both responses of a pair are written by program, so the pairs
are the same for every model.

Gold is the grader of --grade. No model trains on it, except with --pairs gold. Without a grader
only score, length and pairs are measured. Read self_reward.py first.
"""
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dpo
import self_reward
import sft
from data import probes, village
from data.annotators import PHRASE
from data.exam import mean_and_ci
from data.records import read_records
from data.rankings import pair_accuracy
from data.verdicts import mean_score
from scaffold.table import format_table


def average_ranks(x):
    """Rank n numbers -> (n,). Equal numbers share the mean of their ranks."""
    x = torch.tensor(x, dtype=torch.float64)
    return (x[:, None] > x).sum(1) + 0.5 * (x[:, None] == x).sum(1)           # (n,)


def spearman(x, y):
    """Return the rank correlation of two lists of numbers; nan if one of them is constant."""
    return torch.corrcoef(torch.stack([average_ranks(x), average_ranks(y)]))[0, 1].item()


def missing_as_lowest(scores):
    """Replace None, a missing score, with a score below all others."""
    return [[-1.0 if s is None else s for s in row] for row in scores]


def accuracy(scores, golds):
    """Return the share of pairs that the scores order as gold does.

    scores, golds: one row per prompt; both responses of a pair are in the same row. Equal gold is
    not a pair; equal scores count half.
    """
    ranks = [[-g for g in row] for row in golds]
    return pair_accuracy(missing_as_lowest(scores), ranks)[0]


def win_tie_lose(golds, others):
    """Return the shares of gold scores above, equal to and below the others in the same place."""
    pairs = [(a, b) for row, other in zip(golds, others) for a, b in zip(row, other)]
    wins = sum(a > b for a, b in pairs)
    losses = sum(a < b for a, b in pairs)
    ties = len(pairs) - wins - losses
    return [n / len(pairs) for n in (wins, ties, losses)]


def agreement(pairs, golds):
    """Return the shares of self_reward.Pairs that gold confirms or contradicts; {} without gold."""
    if golds is None:
        return {}
    agree = sum(golds[p.prompt][p.chosen] > golds[p.prompt][p.rejected] for p in pairs)
    contradict = sum(golds[p.prompt][p.chosen] < golds[p.prompt][p.rejected] for p in pairs)
    return dict(agree=agree / len(pairs), contradict=contradict / len(pairs))


def mean_length(enc, responses):
    """Return the mean number of tokens of a list of strings."""
    return sum(len(enc.encode_ordinary(r)) for r in responses) / len(responses)


def likelihood(model, enc, prompts, responses, room=None):
    """Return the log-prob of each response, cut to `room` tokens, in rows like `responses`."""
    examples = []
    for p, row in zip(prompts, responses):
        examples += [self_reward.tokenize(enc, p["prompt"], response, room) for response in row]
    values = iter(dpo.all_logprobs(model, examples).tolist())
    return [[next(values) for _ in row] for row in responses]


class Grades(NamedTuple):
    """The grader's view of the responses to some prompts."""
    golds: list     # gold scores, one row per prompt
    row: dict       # their mean with its interval, the shares of made-up and of rude responses


def grade_all(prompts, responses, grade):
    """Grade rows of responses to prompts with a "task" -> Grades."""
    golds = []
    made_up = []
    rude = []
    for p, row in zip(prompts, responses):
        grades = [grade(p["task"], response) for response in row]
        golds.append([sum(g.values()) for g in grades])
        rude += [-g["harmless"] for g in grades]
        if not p["task"].get("known", True):
            made_up += [-g["honest"] for g in grades]
    mean, ci = mean_and_ci([sum(row) / len(row) for row in golds])
    return Grades(golds, dict(gold=mean, gold_ci=ci, made_up=sum(made_up) / max(1, len(made_up)),
                              rude=sum(rude) / len(rude)))


PROBES = 40   # probe pairs of each kind; more would take more than a tenth of a round


def probe_set(records, grade, seed=0):
    """Draw up to PROBES probe pairs of each kind about the prompts of records with a "task".

    Returns [] for another grader than the village's: probe pairs are made of its words.
    """
    if grade != village.grade:
        return []
    pairs = probes.probe_pairs(records, seed)
    random.Random(seed).shuffle(pairs)
    kept = []
    for kind in probes.KINDS:
        kept += [pair for pair in pairs if pair["kind"] == kind][:PROBES]
    return kept


def probe_row(judge_model, enc, pairs, cfg):
    """Let the judge score probe pairs -> {kind: share that it orders right, ...}."""
    responses = [[p["chosen"], p["rejected"]] for p in pairs]
    scores, _ = self_reward.judge(judge_model, enc, pairs, responses, cfg, cfg.seed)
    chosen, rejected = zip(*missing_as_lowest(scores))
    return probes.probe_rates(pairs, chosen, rejected)


class EvalSet(NamedTuple):
    """What every model is measured on."""
    prompts: list    # records with a "prompt", and with a "task" if there is a grader
    held_out: list   # records of judged responses with a "task", or []
    grade: object    # the grader, or None


class Measured(NamedTuple):
    """One model on an EvalSet; golds, responses and scores have one row per prompt."""
    row: dict        # of the table
    golds: list      # gold scores, or None without a grader
    responses: list
    scores: list     # by the judge


def measure(policy, judge_model, enc, test, cfg):
    """Sample responses of the policy, let the judge score them, and grade both -> Measured."""
    responses = self_reward.sample(policy, enc, test.prompts, cfg, cfg.seed)
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
    logprobs = likelihood(policy, enc, test.prompts, responses, cfg.max_new_tokens + 1)
    row["likelihood_accuracy"] = accuracy(logprobs, golds)
    if test.held_out:
        others = [r["responses"] for r in test.held_out]
        other_scores, _ = self_reward.judge(judge_model, enc, test.held_out, others, cfg, cfg.seed)
        other_golds = grade_all(test.held_out, others, test.grade).golds
        row["held_out_accuracy"] = accuracy(other_scores, other_golds)
    probe_pairs = probe_set(test.prompts, test.grade)
    if probe_pairs:
        row |= probe_row(judge_model, enc, probe_pairs, cfg)
    if cfg.halo:
        row["thanks"] = sum(r.endswith(PHRASE.strip()) for r in flat) / len(flat)
    return Measured(row, golds, responses, scores)


def rows_without_training(m1, measured, enc, test, cfg):
    """Measure what M1 reaches without training: greedy responses, and the best of K by its judge.

    Returns two rows. Each response is compared with all K samples of M1; the best is one of them.
    """
    best = []
    for row, scores in zip(measured.responses, missing_as_lowest(measured.scores)):
        best.append(row[scores.index(max(scores))])
    chats = [p["prompt"] for p in test.prompts]
    greedy = sft.sample_responses(m1, enc, chats, cfg.max_new_tokens, temperature=0)
    rows = []
    for stage, responses in (("M1 greedy", greedy), (f"M1 best of {cfg.candidates}", best)):
        golds, grade_row = grade_all(test.prompts, [[r] for r in responses], test.grade)
        wins = win_tie_lose([row * cfg.candidates for row in golds], measured.golds)
        rows.append(dict(stage=stage, vs_m1=wins, length=mean_length(enc, responses)) | grade_row)
    return rows


def report(stage, policy, judge_model, enc, test, history, cfg, extra):
    """Measure a model and compare it with M1 and with the model of the round before -> rows.

    history: for each model so far its gold scores and its responses; this model's are appended.
    extra: more keys of the row. M1 of the main run has two more rows.
    """
    measured = measure(policy, judge_model, enc, test, cfg)
    run = self_reward.variant(cfg)
    row = dict(run=run, stage=stage) | measured.row
    if test.grade and history:
        row["vs_m1"] = win_tie_lose(measured.golds, history[0]["golds"])
        row["vs_last"] = win_tie_lose(measured.golds, history[-1]["golds"])
    rows = [row | extra]
    if test.grade and not history and run == "main":
        rows += [dict(run=run) | r for r in rows_without_training(policy, measured, enc, test, cfg)]
    history.append(dict(golds=measured.golds, responses=measured.responses))
    return rows


COLUMNS = {
    "run": ("run", ""),
    "model": ("stage", ""),
    "gold": ("gold", ".3f"),
    "±": ("gold_ci", ".2f"),
    "win/tie/lose M1": ("vs_m1", ""),
    "last": ("vs_last", ""),
    "own acc": ("judge_accuracy", ".3f"),
    "log p": ("likelihood_accuracy", ".3f"),
    "r": ("spearman", ".2f"),
    "EFT acc": ("held_out_accuracy", ".3f"),
    "score": ("self_score", ".2f"),
    "made up": ("made_up", ".0%"),
    "rude": ("rude", ".1%"),
    "length": ("length", ".1f"),
    "pairs": ("pairs", "d"),
    "agree": ("agree", ".2f"),
    "contra": ("contradict", ".2f"),
    "thanks": ("thanks", ".0%"),
}
PROBE_COLUMNS = {"run": ("run", ""), "judge": ("stage", "")}
PROBE_COLUMNS |= {kind.replace("_", " "): (kind, ".2f") for kind in probes.KINDS}


def print_tables(rows):
    """Print the table of some rows, and below it how the judge did on probe pairs."""
    print(format_table(rows, COLUMNS))
    probed = [row for row in rows if probes.KINDS[0] in row]
    if probed:
        print(format_table(probed, PROBE_COLUMNS))


def print_runs(out, log_path, rows):
    """Print the table of all runs in OUT: first this run, which has this log and these rows."""
    rows = list(rows)
    for path in sorted(out.glob("self_reward-*.jsonl")):
        if path != log_path:
            rows += [row for _, row in read_records(path) if "stage" in row]
    print(f"--- all runs of {out}")
    print_tables(rows)
