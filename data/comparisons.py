"""Comparisons in every format that users bring become a prompt, K responses and their ranks.

Rank 1 is best. Every reader raises UserError with the key that is malformed and why, and Unusable
for what teaches nothing. data/README.md shows two records of each format.
"""
from typing import NamedTuple

from data.chats import (
    PROMPT_KEYS, find_key, has_transcript, is_transcript, parse_transcript, read_messages,
    read_prompt, refuse_label, with_system)
from data.records import Unusable
from scaffold.cli import UserError, brief


class Ranked(NamedTuple):
    """The responses to one prompt."""
    prompt: list       # messages
    responses: list    # K strings
    ranks: list        # K numbers from 1, which is best; equal ranks are a tie


def is_number(x, least):
    """Return whether x is a number from `least` to 1e9, neither bool nor nan."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and least <= x < 1e9


def read_ranked(r, where):
    """Read {"prompt", "responses", "ranks"}."""
    responses = r["responses"]
    ranks = r["ranks"]
    lists = isinstance(responses, list) and isinstance(ranks, list)
    if not lists or len(responses) != len(ranks) or len(responses) < 2:
        raise UserError(f"{where}: responses and ranks must be two lists of the same length K >= 2")
    for i, response in enumerate(responses):
        if not isinstance(response, str):
            raise UserError(f"{where}: responses[{i}]: expected a string, "
                            f"found {type(response).__name__}")
    for i, rank in enumerate(ranks):
        if not is_number(rank, 1):
            raise UserError(f"{where}: ranks[{i}]: {brief(repr(rank))} is no number from 1 (best) "
                            f"on; equal ranks are a tie")
    for key in ("scores", "ranks_other"):
        values = r.get(key, ranks)
        if (not isinstance(values, list) or len(values) != len(responses)
                or not all(is_number(x, -1e9) for x in values)):
            raise UserError(f"{where}: {key} must be a list with one number per response")
    return Ranked(read_prompt(r, where), responses, ranks)


def read_preference(r, where):
    """Read {"prompt", "output_1", "output_2", "preference": 1 or 2}; 1.5 is a tie."""
    preference = r["preference"]
    if preference is None:
        raise Unusable(where, "no preference")
    try:
        number = float(preference)
    except (ValueError, TypeError, OverflowError):
        number = 0
    if isinstance(preference, bool) or not 1 <= number <= 2:
        raise UserError(f"{where}: preference: expected 1 or 2, the number of the better output, "
                        f"found {brief(repr(preference))}")
    sides = [read_side(r[key], f"{where}: {key}") for key in ("output_1", "output_2")]
    return join_sides(r, sides, [number, 3 - number], where)


def read_side(value, where):
    """Turn one side of a pair into messages if it is a chat or a transcript, else a string."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return read_messages(value, where)
    return parse_transcript(value, where) if is_transcript(value) else value


def continued(side, prompt, r, where):
    """Return the whole chat of one side of a pair.

    side: a response as a string, or messages, which are the whole chat or what follows the prompt.
    """
    if isinstance(side, str):
        return [*prompt, {"role": "assistant", "content": side}]
    whole = with_system(side, r, where)
    only_response = side[0]["role"] == "assistant" and whole[:len(prompt)] != prompt
    return prompt + side if only_response else whole


def join_sides(r, sides, ranks, where):
    """Find the prompt that both sides of a pair share -> Ranked."""
    prompt = []
    if find_key(r, PROMPT_KEYS):
        prompt = read_prompt(r, where)
        if has_transcript(r):
            sides = [side.strip() if isinstance(side, str) else side for side in sides]
    elif any(isinstance(side, str) and side.strip() for side in sides):
        raise UserError(f'{where}: no prompt: expected "prompt" beside the two responses, or two '
                        f"whole chats, or transcripts that start with 'Human:'")
    chats = [continued(side, prompt, r, where) for side in sides]
    prompts = [c[:-1] for c in chats]
    last = [c[-1] for c in chats]
    responses = [m["content"] for m in last]
    if not all(response.strip() for response in responses):
        raise Unusable(where, "one of the two responses is empty")
    if not prompts[0] or prompts[0] != prompts[1] or any(m["role"] != "assistant" for m in last):
        raise Unusable(where, "the two sides do not share a prompt and end with a response")
    return Ranked(prompts[0], responses, ranks)


def is_comparison(r):
    """Return whether a record has the keys of a comparison."""
    formats = ({"responses", "ranks"}, {"chosen", "rejected"}, {"output_1", "output_2"})
    return any(keys <= set(r) for keys in formats)


def read_comparison(r, where):
    """Turn a record of ranked responses in any format into Ranked."""
    if "responses" in r and "ranks" in r and find_key(r, PROMPT_KEYS):
        return read_ranked(r, where)
    if "chosen" in r and "rejected" in r:
        sides = [read_side(r[key], f"{where}: {key}") for key in ("chosen", "rejected")]
        return join_sides(r, sides, [1, 2], where)
    if "output_1" in r and "output_2" in r and "preference" in r:
        return read_preference(r, where)
    refuse_label(r, where, 'join a good and a bad response to the same prompt into '
                           '{"prompt", "chosen", "rejected"}')
    raise UserError(f'{where}: expected "chosen" and "rejected", "output_1", "output_2" and '
                    f'"preference", or "prompt", "responses" and "ranks"; '
                    f"found {brief(sorted(r))}")
