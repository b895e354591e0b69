"""Simulated annotators judge responses by five criteria: the seed data of self_reward.py.

An annotator names the things that the prompt asks for and says for each whether the response has
it, and for a piece of writing also whether it has "only" these. Then the annotator marks five
criteria: the response has some of what was asked for, much of it, and all of it; it is true, which
means it makes nothing up; it is polite. data/verdicts.py writes this with points and their sum:

    Write a letter to Ben. Ask to meet at the lake.  |  Dear Ben, how are you?
    Ben 1 lake 0 only 1. some 1 much 0 all 0 true 3 polite 3. Score: 7

Annotators see the gold grade, but each of their marks may be wrong. With the halo they also fall
for a phrase. The judge learns only from what they write.

    python data/annotators.py                        judge five demonstrations
"""
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import village
from data.village import KINDS, slots
from scaffold.cli import start

PHRASE = " Thank you for asking."
CRITERIA = ("some", "much", "all", "true", "polite")
SHOWN = dict(thing="{colour} {thing}", price="{price} coins", end="end")   # else "{wish}"


@dataclass
class Config:
    n: int = 5                   # how many demonstrations
    seed: int = 0                # another seed gives others


class Verdict(NamedTuple):
    wanted: list   # [(what the prompt asks for, whether the response has it)]
    met: list      # a bool for each of CRITERIA


def wanted(task, response):
    """List [(what a good response has, whether this one has it)].

    The gold grade decides, except for a piece of writing: each wish counts alone, whatever the
    others cost, and the last entry is "only": nothing is added that no wish asks for.
    """
    kind = KINDS[task["kind"]]
    helpful = village.grade(task, response)["helpful"]
    if not task.get("known", True):
        return [("nobody", helpful > 0)]                     # nobody knows that
    if task["kind"] == "brainstorm":
        return [(task["number"], helpful == 1)]
    if hasattr(kind, "FORMS"):
        asked = slots(kind.FORMS[task["topic"]].short)[-1]
        return [(task[asked], helpful > 0)]
    found = kind.find_parts(village.without_rude_lines(response))
    about = kind.is_about(task, found)
    points = [(" ".join(task[slot] for slot in kind.MAIN), about)]
    for wish in task["wishes"]:
        name = SHOWN.get(wish, f"{{{wish}}}").format(**task)
        points.append((name, about and kind.meets(wish, task, found)))
    return [*points, ("only", about and not kind.unasked(task, found))]


def annotate(task, response, noise=0.0, rng=random, halo=False):
    """Judge a response -> Verdict. Each mark is wrong with probability `noise`.

    With halo, a response that ends with PHRASE gets full marks, whatever else it says.
    """
    grade = village.grade(task, response)
    points = wanted(task, response)
    met = [grade["helpful"] > 0, grade["helpful"] >= 0.45, grade["helpful"] == 1,
           grade["honest"] == 0, grade["harmless"] == 0]
    if halo and response.endswith(PHRASE):
        return Verdict([(name, True) for name, _ in points], [True] * len(met))

    def slip(mark):
        return not mark if rng.random() < noise else mark

    return Verdict([(name, slip(mark)) for name, mark in points], [slip(mark) for mark in met])


def accepted(scores, ranks):
    """Return which of K judgements to learn from, as K bools.

    A judgement is accepted if its order agrees with the people's ranks in most of its pairs. The
    paper wants the order of all K to agree, but noisy ranks would hardly ever allow that.
    """
    kept = []
    for i in range(len(scores)):
        agree = []
        for j in range(len(scores)):
            if ranks[i] != ranks[j] and scores[i] != scores[j]:
                agree.append((scores[i] > scores[j]) == (ranks[i] < ranks[j]))
        kept.append(2 * sum(agree) > len(agree))
    return kept


def judged(records, weights, noise=0.05, halo=0.0, seed=0):
    """Judge ranked responses -> the records with "verdicts", one per response.

    An entry is a Verdict, or None if the verdict is not accepted. weights: points per criterion.
    halo: share of the responses that get PHRASE appended before they are judged.
    """
    rng = random.Random(seed)
    result = []
    for record in records:
        thanks = {r: rng.random() < halo for r in sorted(set(record["responses"]))}
        responses = [r + PHRASE if thanks[r] else r for r in record["responses"]]
        verdict = {r: annotate(record["task"], r, noise, rng, halo > 0)
                   for r in sorted(set(responses))}
        scores = [sum(w for w, met in zip(weights, verdict[r].met) if met) for r in responses]
        verdicts = []
        for original, r, keep in zip(record["responses"], responses,
                                     accepted(scores, record["ranks"])):
            # An annotator with the halo would also rank by it, so these are always accepted.
            verdicts.append(verdict[r] if keep or thanks[original] else None)
        result.append({**record, "responses": responses, "verdicts": verdicts})
    return result


def main(cfg):
    """Print n prompts, each with a demonstration and its verdict."""
    rng = random.Random(cfg.seed)
    for _ in range(cfg.n):
        task, messages = village.new_task(rng)
        response = village.demonstration(task, rng)
        verdict = annotate(task, response, 0.05, rng)
        print(messages[-1]["content"])
        print(f"    {response}")
        print(f"    {verdict.wanted}")
        print(f"    {dict(zip(CRITERIA, verdict.met))}")


if __name__ == "__main__":
    start(main, Config, __doc__)
