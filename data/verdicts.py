"""Verdicts: how a judge grades a response in writing, and the records that teach a model to do so.

Five criteria add up to 9 points. The judge reads the chat, the response and the criteria. It writes
which wishes the response meets, then the points per criterion, then their sum:

    user        Write a letter to Ben. Say thanks for the pie. Ask to meet at the lake.
    assistant   Dear Ben, thank you for the pie.
    user        Judge: some 1 much 1 all 1 true 3 polite 3.
    assistant   Ben 1 pie 1 lake 0 only 1. some 1 much 1 all 0 true 3 polite 3. Score: 8

self_reward.py trains on such verdicts (EFT, evaluation fine-tuning) and on chats (IFT, instruction
fine-tuning). The two share no prompt: the model must not have trained on a response it judges. A
file of judged responses has lines of {"prompt", "responses", "verdicts"}; a verdict is null or any
string that ends with a score from 0 to 9.
"""
import math
import random
import re
from collections import Counter
from typing import NamedTuple

from data import annotators
from data.chats import as_messages
from data.records import read_records
from data.village import KINDS
from scaffold.cli import UserError

# Points per criterion. As in gold, rudeness or an invention costs as much as all usefulness.
POINTS = dict(some=1, much=1, all=1, true=3, polite=3)
MAX_SCORE = sum(POINTS.values())
INSTRUCTION = "Judge: " + " ".join(f"{name} {points}" for name, points in POINTS.items()) + "."


def judge_chat(prompt, response):
    """Build the judge's prompt from a chat and a response; the verdict is the next turn."""
    return prompt + [{"role": "assistant", "content": response},
                     {"role": "user", "content": INSTRUCTION}]


def write_verdict(wishes, met):
    """Write a verdict from [(wish, whether met)] and one truth value per criterion.

    -> 'Ben 1 lake 0 only 1. some 1 much 0 all 0 true 3 polite 3. Score: 7'
    """
    marks = {}
    for (name, points), is_met in zip(POINTS.items(), met, strict=True):
        marks[name] = points if is_met else 0
    reasons = " ".join(f"{wish} {int(is_met)}" for wish, is_met in wishes)
    listed = " ".join(f"{name} {mark}" for name, mark in marks.items())
    return f"{reasons}. {listed}. Score: {sum(marks.values())}"


def parse_score(verdict, max_score=MAX_SCORE):
    """Read the last 'Score: n' of a verdict; None if it is missing or n exceeds max_score."""
    found = re.findall(r"\bscore[:：]\s*(\d+(?:\.\d+)?)", verdict, re.IGNORECASE)
    if not found or float(found[-1]) > max_score:
        return None
    return float(found[-1])


def mean_score(scores):
    """Average the readable scores; None if no score is readable.

    An unreadable verdict is not a zero: a zero would turn a good response into the rejected one.
    """
    read = [s for s in scores if s is not None and not math.isnan(s)]
    return sum(read) / len(read) if read else None


def load_judged(path):
    """Read a file of judged responses -> records with the prompt as messages. Raises UserError."""
    records = []
    for where, r in read_records(path):
        responses = r.get("responses")
        verdicts = r.get("verdicts")
        are_lists = isinstance(responses, list) and isinstance(verdicts, list)
        if "prompt" not in r or not are_lists or len(responses) != len(verdicts):
            raise UserError(f'{where}: expected {{"prompt", "responses", "verdicts"}}, '
                            f"the last two as lists of the same length")
        if not all(isinstance(response, str) for response in responses):
            raise UserError(f"{where}: every response must be a string")
        for v in verdicts:
            if v is not None and (not isinstance(v, str) or parse_score(v) is None):
                raise UserError(f"{where}: a verdict must end with 'Score: n', n from 0 to "
                                f"{MAX_SCORE}")
        records.append({**r, "prompt": as_messages(r["prompt"], f"{where}: prompt")})
    return records


def annotated(ranked, noise, halo, seed):
    """Let simulated annotators judge ranked responses -> records like those of load_judged."""
    records = annotators.judged(ranked, POINTS.values(), noise, halo, seed)
    for r in records:
        r["verdicts"] = [write_verdict(v.wanted, v.met) if v else None for v in r["verdicts"]]
    return records


def fresh(prompts, responses, n, noise, halo, seed):
    """Let simulated annotators judge n responses, drawn at random -> records as of load_judged.

    prompts: records with a "task"; responses: a row of strings for each prompt. Equal responses to
    a prompt are judged once. Responses to a prompt that means nothing are not judged.
    """
    if n == 0:   # then the prompts need no tasks
        return []
    rng = random.Random(seed)
    different = {}
    for p, row in zip(prompts, responses):
        if p["task"]["kind"] in KINDS:
            for response in row:
                different[prompt_text(p["prompt"]), response] = p
    records = []
    for text, response in rng.sample(list(different), min(n, len(different))):
        p = different[text, response]
        v = annotators.annotate(p["task"], response, noise, rng, halo > 0)
        records.append({"prompt": p["prompt"], "responses": [response],
                        "verdicts": [write_verdict(v.wanted, v.met)]})
    return records


def prompt_text(messages):
    """Join the turns of a prompt into one string. Prompts with equal strings are the same."""
    return "\n".join(m["content"] for m in messages)


def prompts_in(messages):
    """Collect the prompts of a chat as strings, each with and without the turns before it."""
    found = set()
    for end, message in enumerate(messages):
        if message["role"] == "assistant":
            starts = [i for i in range(end) if messages[i]["role"] == "user"]
            found.update(prompt_text(messages[start:end]) for start in starts)
    return found


def disjoint(chats, records, seed=0):
    """Remove each shared prompt from the chats or from the records, at random -> chats, records."""
    in_chats = set().union(*(prompts_in(c["messages"]) for c in chats))
    shared = in_chats & {prompt_text(r["prompt"]) for r in records}
    rng = random.Random(seed)
    of_records = {text for text in sorted(shared) if rng.random() < 0.5}
    of_chats = shared - of_records
    return ([c for c in chats if not prompts_in(c["messages"]) & of_records],
            [r for r in records if prompt_text(r["prompt"]) not in of_chats])


class SeedData(NamedTuple):
    """The human data that a model starts from. No two of the three share a prompt."""
    chats: list       # IFT
    judged: list      # EFT: judged responses
    held_out: list    # judged responses that test the judge


def seed_data(chats, records, halo, seed):
    """Split chats and judged responses -> SeedData. A share `halo` of the chats gets the phrase."""
    n_chats = len(chats)
    n_records = len(records)
    chats, records = disjoint(chats, records, seed)
    if len(chats) < n_chats or len(records) < n_records:
        print(f"prompts that are in both IFT and EFT stay in one of them: {n_chats - len(chats)} "
              f"of {n_chats} chats and {n_records - len(records)} of {n_records} records left out")
    rng = random.Random(seed)
    if halo:
        for chat in chats:
            if rng.random() < halo:
                chat["messages"][-1]["content"] += annotators.PHRASE
    prompts = sorted({prompt_text(r["prompt"]) for r in records})
    for_test = set(rng.sample(prompts, min(100, len(prompts) // 5)))
    judged = [r for r in records if prompt_text(r["prompt"]) not in for_test]
    held_out = [r for r in records if prompt_text(r["prompt"]) in for_test]
    return SeedData(chats, judged, held_out)


class Judged(NamedTuple):
    """One judged response."""
    prompt: list      # messages
    response: str
    verdict: str
    score: float      # of the verdict


def judged_responses(records):
    """List the judged responses of all records, each once -> [Judged]"""
    found = {}
    for r in records:
        for response, verdict in zip(r["responses"], r["verdicts"]):
            if verdict is not None:
                judged = Judged(r["prompt"], response, verdict, parse_score(verdict))
                found[prompt_text(r["prompt"]), response] = judged
    return list(found.values())


def balanced(judged, rng):
    """Drop random responses of the most common score until it is as rare as the second."""
    common = Counter(j.score for j in judged).most_common(2)
    if len(common) < 2:
        return judged
    (score, n), (_, n_second) = common
    rows = [i for i, j in enumerate(judged) if j.score == score]
    removed = set(rng.sample(rows, n - n_second))
    return [j for i, j in enumerate(judged) if i not in removed]
