"""How well scores order ranked responses: accuracy, its competitors, and the labelers' agreement.

A comparison is a reward.Comparison: the id tensors of K responses (rows), the length of their
prompt (start), and the record with their ranks, 1 for the best.
"""
import itertools
from collections import Counter


def ranked_pairs(ranks):
    """Return the pairs (better, worse) of indices into K ranks, ties left out."""
    return [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def pair_accuracy(scores, ranks, distance=None):
    """Return (share of pairs that the scores order as the ranks do, number of pairs).

    scores, ranks: one list of K numbers per prompt. Ties in rank are no pairs; ties in score count
    half. distance: a condition on the difference of the two ranks.
    """
    right = n = 0
    for s, r in zip(scores, ranks):
        for i, j in ranked_pairs(r):
            if distance is None or distance(r[j] - r[i]):
                right += (s[i] > s[j]) + 0.5 * (s[i] == s[j])
                n += 1
    return (right / n if n else float("nan")), n


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
    """Return how often two labelers agree, of the pairs that neither ties."""
    pairs = []
    for c in comparisons:
        a, b = c.record["ranks"], c.record["ranks_other"]
        for i, j in itertools.combinations(range(len(a)), 2):
            if a[i] != a[j] and b[i] != b[j]:
                pairs.append((a[i] < a[j]) == (b[i] < b[j]))
    return sum(pairs) / len(pairs) if pairs else float("nan")


def report(name, comparisons, scores, others):
    """Return a row for the log: accuracy against the labelers, also by rank distance.

    length_alone is the accuracy of a liking for long responses. others: {label: scores} of other
    ways to order the responses.
    """
    ranks = [c.record["ranks"] for c in comparisons]
    accuracy, pairs = pair_accuracy(scores, ranks)
    row = dict(split=name, prompts=len(comparisons), pairs=pairs, accuracy=accuracy)
    row["distance_1"] = pair_accuracy(scores, ranks, lambda d: d == 1)[0]
    row["distance_2"] = pair_accuracy(scores, ranks, lambda d: d == 2)[0]
    row["distance_3+"] = pair_accuracy(scores, ranks, lambda d: d > 2)[0]
    row["length_alone"] = pair_accuracy([[len(r) for r in c.rows] for c in comparisons], ranks)[0]
    for label, other in others.items():
        row[label] = pair_accuracy(other, ranks)[0]
    if all("ranks_other" in c.record for c in comparisons):
        row["labelers_agree"] = agreement(comparisons)
    return row


def print_ranking(record, scores):
    """Print the responses of one prompt, the highest score first."""
    print(f"--- {record['prompt'][-1]['content']!r}")
    rows = zip(scores, record["ranks"], record["responses"])
    for score, rank, response in sorted(rows, reverse=True):
        print(f"score {score:6.2f}  labeler's rank {rank}  {response!r}")
