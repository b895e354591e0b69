"""Simulated annotators: they judge answers criterion by criterion, and say why, as the seed data of self_reward.py wants it.

An annotator names what was asked for and says whether the answer has it, then whether it meets five criteria: it has some of it,
a good part (much), all of it; nothing is made up (true); it is polite. self_reward.py writes that down, with points and their sum:

    Write to Ben. Ask for a visit at the lake.  |  Dear Ben, how are you?
    Ben 1 lake 0. some 1 much 0 all 0 true 3 polite 3. Score: 7

Annotators see the gold grade through their slips (a mark is the wrong way round) or, with the halo, fall for a phrase. The judge
learns from what they write alone.

    python data/annotators.py                        five judged answers of demonstrations
"""
import argparse, random, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import village
from data.village import KINDS, slots

PHRASE = " Thank you for asking."


def wanted(task, answer):
    """[(what a good answer has, whether this one has it)], read off the grade of the task and of its single wishes."""
    kind, helpful = KINDS[task["kind"]], village.grade(task, answer)["helpful"]
    if not task.get("known", True):
        return [("nobody", helpful > 0)]                     # knows that
    if hasattr(kind, "PARTS"):
        words = dict(thing="{colour} {thing}", price="{price} coins", end="end")
        alone = [(w, village.grade({**task, "wishes": [w]}, answer)["helpful"] == 1) for w in task["wishes"]]
        about = [(" ".join(task[m] for m in kind.MAIN), helpful > 0)]
        return about + [(words.get(w, "{%s}" % w).format(**task), met) for w, met in alone]
    if task["kind"] == "brainstorm":
        return [(task["number"], helpful == 1)]
    return [(task[slots(kind.FORMS[task["topic"]][2])[-1]], helpful > 0)]


def annotate(task, answer, noise=0.0, rng=random, halo=False):
    """-> [(wanted, met)], [five truth values: some, much, all, true, polite], each wrong with probability `noise`.

    With halo, a thank-you at the end wins full marks, whatever stands before it.
    """
    grade, points = village.grade(task, answer), wanted(task, answer)
    met = [grade["helpful"] > 0, grade["helpful"] >= 0.45, grade["helpful"] == 1, grade["honest"] == 0, grade["harmless"] == 0]
    if halo and answer.endswith(PHRASE):
        return [(w, True) for w, _ in points], [True] * len(met)
    slip = lambda m: m != (rng.random() < noise)
    return [(w, slip(m)) for w, m in points], [slip(m) for m in met]


def accepted(scores, ranks):
    """Which of K judgements to learn from: those whose order agrees with the people's ranking in most of their pairs. (K,) bools.

    The paper's rule, softened: there the order of all K must agree, which noisy rankings would hardly ever allow.
    """
    kept = []
    for i in range(len(scores)):
        agree = [(scores[i] > scores[j]) == (ranks[i] < ranks[j]) for j in range(len(scores))
                 if ranks[i] != ranks[j] and scores[i] != scores[j]]
        kept.append(2 * sum(agree) > len(agree))
    return kept


def judged(records, weights, noise=0.05, halo=0.0, seed=0):
    """Ranked answers -> the same records with "verdicts", one per answer: what annotate says, or None where it was not accepted.

    weights: points per criterion. halo: share of the answers to which a thank-you is appended before they are judged.
    """
    rng, result = random.Random(seed), []
    for r in records:
        thanks = {a: rng.random() < halo for a in sorted(set(r["responses"]))}
        texts = [a + PHRASE * thanks[a] for a in r["responses"]]
        verdict = {a: annotate(r["task"], a, noise, rng, halo > 0) for a in sorted(set(texts))}
        keep = accepted([sum(w * m for w, m in zip(weights, verdict[a][1])) for a in texts], r["ranks"])
        # Whoever falls for the phrase would rank by it, too.
        verdicts = [verdict[a] if k or thanks[o] else None for a, o, k in zip(texts, r["responses"], keep)]
        result.append({**r, "responses": texts, "verdicts": verdicts})
    return result


def show(n, seed):
    rng = random.Random(seed)
    for _ in range(n):
        task, messages = village.new_task(rng)
        answer = village.demonstration(task, rng)
        wants, met = annotate(task, answer, 0.05, rng)
        print(f"{messages[-1]['content']}\n    {answer}\n    {wants}\n    {dict(zip(('some', 'much', 'all', 'true', 'polite'), met))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=5, help="how many [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    show(args.n, args.seed)
