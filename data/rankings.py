"""Ranked responses: their tokens, their pairs, and how well scores or people order them."""
import itertools
from collections import Counter
from typing import NamedTuple

import torch

from data.tokenizer import end_of
from scaffold.cli import UserError
from scaffold.table import format_table


class Comparison(NamedTuple):
    """The tokenized responses of one prompt."""
    rows: list      # K tensors of ids: prompt, response, end token
    start: int      # length of the prompt
    record: dict    # "prompt", "responses", "ranks", ... of the K responses


def tokenize(records, render, enc, block_size):
    """Tokenize ranked responses -> [Comparison]. render: sft.render_prompt.

    A prompt too long for the context loses its beginning, for all its responses alike, so that the
    comparison stays fair. A response that fills the context without a prompt is skipped.
    """
    comparisons, cut, lost = [], 0, 0
    for r in records:
        prompt = render(r["prompt"], enc)
        responses = [enc.encode_ordinary(a) + [end_of(enc)] for a in r["responses"]]
        fits = [i for i, ids in enumerate(responses) if len(ids) < block_size]
        lost += len(responses) - len(fits)
        if len({r["ranks"][i] for i in fits}) < 2:   # no pair is left
            continue
        room = block_size - max(len(responses[i]) for i in fits)
        cut += len(prompt) > room
        prompt = prompt[-room:]
        rows = [torch.tensor(prompt + responses[i]) for i in fits]
        lists = [k for k in ("responses", "ranks", "ranks_other", "scores") if k in r]
        kept = {k: [r[k][i] for i in fits] for k in lists}
        comparisons.append(Comparison(rows, len(prompt), {**r, **kept}))
    if cut or lost:
        print(f"{cut} of {len(records)} prompts lose their beginning to fit the context of "
              f"{block_size}; {lost} responses that do not fit at all are skipped")
    if not comparisons:
        raise UserError(f"no comparison fits the context of {block_size}; enlarge --block-size")
    return comparisons


def ranked_pairs(ranks):
    """Return the pairs (better, worse) of indices into K ranks, without ties."""
    return [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def choose_pairs(responses, ranks, how, rng):
    """Return pairs (better, worse) of indices of K responses; skip ties and equal responses.

    how: all, extreme (the widest difference in rank) or random (one pair).
    """
    in_fp32 = torch.tensor(ranks, dtype=torch.float).tolist()   # as in the reward model's loss
    pairs = [(i, j) for i, j in ranked_pairs(in_fp32) if responses[i] != responses[j]]
    if not pairs or how == "all":
        return pairs
    if how == "extreme":
        widest = max(ranks[j] - ranks[i] for i, j in pairs)
        pairs = [(i, j) for i, j in pairs if ranks[j] - ranks[i] == widest]
    return [rng.choice(pairs)]


def pair_accuracy(scores, ranks, distance=None):
    """Return (share of pairs that the scores order as the ranks do, number of pairs).

    scores, ranks: one list of K numbers per prompt. A tie in rank is not a pair; a tie in score
    counts half. distance: a condition on the difference of the two ranks.
    """
    right = n = 0
    for s, r in zip(scores, ranks):
        for i, j in ranked_pairs(r):
            if distance is None or distance(r[j] - r[i]):
                n += 1
                if s[i] > s[j]:
                    right += 1
                elif s[i] == s[j]:
                    right += 0.5
    return (right / n if n else float("nan")), n


def targets(record):
    """Return the goal of the regression, (K,): the scores, else minus the ranks, centred."""
    goal = torch.tensor(record.get("scores") or [-r for r in record["ranks"]], dtype=torch.float)
    return goal - goal.mean()


def aligned(scores, comparisons):
    """Pair the token scores (sum of K, T) -> (better, worse, mask), each (pairs, T).

    The mask is 1 on the positions where both responses of a pair have a token.
    """
    positions = torch.arange(scores.shape[1])
    better, worse, mask = [], [], []
    first = 0   # row of the comparison's first response
    for c in comparisons:
        for i, j in ranked_pairs(c.record["ranks"]):
            better.append(first + i)
            worse.append(first + j)
            shorter = min(len(c.rows[i]), len(c.rows[j]))
            mask.append((positions >= c.start) & (positions < shorter))
        first += len(c.rows)
    return scores[better], scores[worse], torch.stack(mask).to(scores.device)


def word_scores(comparisons):
    """Count words, the simplest reward model: +1 for a token of a better response, -1 of a worse.

    Returns {token: mean, from -1 to 1}.
    """
    good, bad = Counter(), Counter()
    for c in comparisons:
        for i, j in ranked_pairs(c.record["ranks"]):
            good.update(c.rows[i][c.start:].tolist())
            bad.update(c.rows[j][c.start:].tolist())
    return {t: (good[t] - bad[t]) / (good[t] + bad[t]) for t in good | bad}


def agreement(comparisons):
    """Return how often two labelers agree on a pair, among the pairs that neither ties."""
    pairs = []
    for c in comparisons:
        a, b = c.record["ranks"], c.record["ranks_other"]
        for i, j in itertools.combinations(range(len(a)), 2):
            if a[i] != a[j] and b[i] != b[j]:
                pairs.append((a[i] < a[j]) == (b[i] < b[j]))
    return sum(pairs) / len(pairs) if pairs else float("nan")


def report(name, comparisons, scores, words, gold):
    """Return a row for the log: accuracies of the scores and of simple baselines.

    words: word_scores; gold: the grader, or None. length_alone is the accuracy of preferring the
    longer response, and gold_program that of the grader. accuracy_against_gold compares the scores
    with the grader. distance_n counts only pairs whose ranks differ by n, if there are any.
    """
    ranks = [c.record["ranks"] for c in comparisons]
    accuracy, pairs = pair_accuracy(scores, ranks)
    row = dict(split=name, prompts=len(comparisons), pairs=pairs, accuracy=accuracy)
    distances = {"1": lambda d: d == 1, "2": lambda d: d == 2, "3+": lambda d: d > 2}
    for distance, condition in distances.items():
        accuracy, n = pair_accuracy(scores, ranks, condition)
        if n:
            row[f"distance_{distance}"] = accuracy
    row["length_alone"] = pair_accuracy([[len(r) for r in c.rows] for c in comparisons], ranks)[0]
    counts = [[sum(words.get(t, 0) for t in r[c.start:].tolist()) for r in c.rows]
              for c in comparisons]
    row["word_counts"] = pair_accuracy(counts, ranks)[0]
    if gold:
        golds = [[gold(c.record["task"], a) for a in c.record["responses"]] for c in comparisons]
        row["gold_program"] = pair_accuracy(golds, ranks)[0]
    if all("ranks_other" in c.record for c in comparisons):
        row["labelers_agree"] = agreement(comparisons)
    if gold:
        row["accuracy_against_gold"] = pair_accuracy(scores, [[-g for g in r] for r in golds])[0]
    return row


def probe_rows(records, scores):
    """Return one row per kind of record: how often the better response of a pair scores higher.

    scores: K numbers per record. A tie in score counts half. A record without "kind" is of the kind
    "pairs".
    """
    pairs = {}   # kind -> (score of the better response, score of the worse)
    for r, s in zip(records, scores):
        found = pairs.setdefault(str(r.get("kind", "pairs")), [])
        found += [(s[i], s[j]) for i, j in ranked_pairs(r["ranks"])]
    rows = []
    for kind, found in pairs.items():
        n = len(found)
        better, worse = zip(*found)
        rows.append(dict(kind=kind, share=pair_accuracy(found, [(1, 2)] * n)[0], n=n,
                         better=sum(better) / n, worse=sum(worse) / n))
    return rows


def print_probes(records, scores):
    """Print the probe_rows as a table."""
    print(format_table(probe_rows(records, scores), {
        "kind": ("kind", ""),
        "better scores higher": ("share", ".1%"),
        "pairs": ("n", ",d"),
        "mean score, better": ("better", ".2f"),
        "mean score, worse": ("worse", ".2f"),
    }))


def print_widest(records, scores):
    """Print the responses to the prompt whose scores differ most, the highest score first."""
    spread = [max(s) - min(s) for s in scores]
    widest = spread.index(max(spread))
    record = records[widest]
    print(f"--- {record['prompt'][-1]['content']!r}")
    rows = zip(scores[widest], record["ranks"], record["responses"])
    for score, rank, response in sorted(rows, reverse=True):
        print(f"score {score:6.2f}  labeler's rank {rank}  {response!r}")
