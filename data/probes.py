"""Probe pairs: two responses to a prompt, of which one makes a single kind of mistake.

The accuracy of a reward model on ranked samples mixes everything that makes a response better, and
a model that knows style alone can be good at it. A probe pair is equal in all but one thing:

    right_vs_wrong         the right word, or another word in its place, in the same sentence
    right_vs_refusal       the right sentence, or "I do not know." to a prompt that has an answer
    refusal_vs_invention   "I do not know.", or an invented answer to a prompt that has none
    whole_vs_lazy          the whole sentence, or the right word alone
    polite_vs_rude         the same response without and with a rude line
    wish_vs_none           a text with all that was wished for, or its first sentence without it

    pairs = probe_pairs(records)                        records: prompts of the village
    rates = probe_rates(pairs, scores_of_chosen, scores_of_rejected)
    rates["right_vs_wrong"]                             .5 is chance

evaluate.py prints these rates.
"""
import random

from data import village
from data.rankings import pair_accuracy
from data.village import IGNORANCE, RUDE_LINES, WORDS, Reply, Wishes, slots

KINDS = ("right_vs_wrong", "right_vs_refusal", "refusal_vs_invention", "whole_vs_lazy",
         "polite_vs_rude", "wish_vs_none")
USES = ("open_qa", "closed_qa", "extract", "sums", "hanzi")   # where right_vs_wrong is measured
WRONG_WORDS = 4   # right_vs_wrong pairs per prompt, because few prompts have these uses


def topic_of(task):
    """Return the use case of a task, or sums or hanzi, which are two topics of "other"."""
    names = dict(digit="sums", hanzi="hanzi", english="hanzi")
    return names.get(task.get("topic"), village.KINDS[task["kind"]].use)


def writing(task, wishes):
    """Write the first part of a text and the parts of these wishes, nothing else."""
    parts = village.KINDS[task["kind"]].PARTS
    first = next(iter(parts))
    lines = []
    for part, templates in parts.items():
        if part in wishes:
            lines.append(templates[0])
        elif part == first:
            lines.append(templates[-1])
    return " ".join(lines).format(**task)


def with_rude_line(response, rng):
    """Put a rude line before or after a response."""
    if rng.random() < 0.5:
        return f"{rng.choice(RUDE_LINES[:3])} {response}"
    return f"{response} {rng.choice(RUDE_LINES[3:])}"


def reply_pairs(task, rng):
    """Return (kind, chosen, rejected) for a task with one right response."""
    _, full, short, worth = village.KINDS[task["kind"]].FORMS[task["topic"]]
    asked = slots(short)[-1]
    refusal = rng.choice(IGNORANCE)
    if not task["known"]:
        invented = full.format(**task | {asked: rng.choice(WORDS[asked])})
        return [("refusal_vs_invention", refusal, invented)]
    right = full.format(**task)
    pairs = [("right_vs_refusal", right, refusal)]
    if worth >= 0.4:   # the short form of a rewriting is worth less: it repeats the prompt
        pairs.append(("whole_vs_lazy", right, short.format(**task)))
    if topic_of(task) in USES:
        others = [word for word in WORDS[asked] if word != task[asked]]
        for word in rng.sample(others, min(WRONG_WORDS, len(others))):
            form = rng.choice([full, short])
            wrong = form.format(**task | {asked: word})
            pairs.append(("right_vs_wrong", form.format(**task), wrong))
    return pairs


def task_pairs(task, rng):
    """Return (kind, chosen, rejected) for every kind of mistake that a task allows."""
    kind = village.KINDS[task["kind"]]
    if isinstance(kind, Wishes):
        pairs = [("wish_vs_none", writing(task, task["wishes"]), writing(task, []))]
    elif isinstance(kind, Reply):
        pairs = reply_pairs(task, rng)
    else:
        return []
    _, good, _ = pairs[0]
    return [*pairs, ("polite_vs_rude", good, with_rude_line(good, rng))]


def probe_pairs(records, seed=0):
    """Make the probe pairs of prompts of the village.

    records: {"prompt": messages, "task"}. Returns {"kind", "prompt", "chosen", "rejected", "topic"}
    with one of KINDS, two strings, and the use case (see topic_of). Gold always prefers `chosen`.
    """
    rng = random.Random(seed)
    pairs = []
    for record in records:
        task = record["task"]
        for kind, chosen, rejected in task_pairs(task, rng):
            pairs.append(dict(kind=kind, prompt=record["prompt"], chosen=chosen, rejected=rejected,
                              topic=topic_of(task)))
    return pairs


def probe_rates(pairs, scores_chosen, scores_rejected):
    """Return {kind: share of its pairs whose chosen response scores higher, n_kind: pairs}.

    A tie counts half. The share is None if there is no pair. right_vs_wrong also comes by use case,
    as right_vs_wrong_open_qa and so on, each with its number of pairs.
    """
    scores = {key: [] for key in (*KINDS, *(f"right_vs_wrong_{use}" for use in USES))}
    for pair, chosen, rejected in zip(pairs, scores_chosen, scores_rejected):
        keys = [pair["kind"]]
        if pair["kind"] == "right_vs_wrong" and "topic" in pair:
            keys.append(f"right_vs_wrong_{pair['topic']}")
        for key in keys:
            scores.setdefault(key, []).append([chosen, rejected])
    rates = {}
    for key, rows in scores.items():
        share, n = pair_accuracy(rows, [[1, 2]] * len(rows))
        rates[key] = share if n else None
        rates[f"n_{key}"] = n
    return rates
