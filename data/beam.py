"""Beam search: the likeliest responses to a prompt, instead of samples.

Idea. The beam holds the `width` likeliest beginnings of a response. Each step extends them by every
token of the vocabulary and keeps the `width` likeliest of all results. A response that has ended
stays in the beam as it is, until likelier ones push it out. Responses are ranked by

    log p(y|x) = sum_t log p(y_t | x, y_<t)        the end token included

This sum is not divided by the length, so a short response ranks above a longer one whose tokens are
as likely. The responses of a beam are all different, while samples of a likely one repeat it.

Letters: P prompts, W responses per prompt, N rows of the cache, V vocabulary.
"""
import math
from typing import NamedTuple

import torch

from data.text import pad, sorted_batches
from data.tokenizer import end_of


class Hypothesis(NamedTuple):
    """A response and its log-probability."""
    ids: list        # the end token included, if there is one
    logprob: float   # sum over all ids, in nats


@torch.inference_mode()
def beam_search(model, prompts, width, max_new_tokens, stop):
    """Return the `width` likeliest continuations per prompt that a beam finds, the best first.

    prompts: lists of ids, shorter than the context. Returns one list of Hypotheses per prompt, all
    different. A continuation ends with `stop` (included), after max_new_tokens, or at the end of
    the context. There are fewer than `width` only if no more exist.
    """
    import gpt   # a later stage, so not imported at the top

    device = model.wte.weight.device
    V = model.config.vocab_size
    lengths = [len(p) for p in prompts]
    limits = [min(max_new_tokens, model.config.block_size - n) for n in lengths]
    limits = torch.tensor(limits, device=device)[:, None]                     # (P, 1)
    ids = pad([torch.tensor(p) for p in prompts]).to(device)                  # (P, T)
    cache = gpt.KVCache(model, *ids.shape)
    states = model.hidden(ids, cache)                                         # (P, T, C)
    cache.fill(lengths)
    prompt = torch.arange(len(prompts), device=device)[:, None]   # (P, 1), an index
    states = states[prompt[:, 0], cache.lengths - 1]                          # (N, C), N = P
    # Each beam starts with one response, the empty one. Only open responses have a cache row.
    tokens = prompt.new_zeros(len(prompts), 1, 0)                             # (P, W, t)
    totals = torch.zeros(len(prompts), 1, device=device)                      # (P, W)
    is_open = torch.ones_like(totals, dtype=torch.bool)                       # (P, W)
    while is_open.any():
        logprobs = totals.new_full((*totals.shape, V), -math.inf)             # (P, W, V)
        logprobs[:, :, 0] = 0   # an ended response continues in one way and keeps its total
        logprobs[is_open] = model.unembed(states).float().log_softmax(-1)
        extended = (totals[:, :, None] + logprobs).flatten(1)                 # (P, W*V)
        totals, best = extended.topk(min(width, extended.shape[1]))   # (P, W); W grows to width
        parent = best // V                                                    # (P, W)
        cache_rows = (is_open.flatten().cumsum(0) - 1).view_as(is_open)       # (P, W)
        cache_rows = cache_rows[prompt, parent]   # those of the parents
        is_open = is_open[prompt, parent]
        new = torch.where(is_open, best % V, -1)   # -1 after the end
        tokens = torch.cat([tokens[prompt, parent], new[:, :, None]], 2)      # (P, W, t+1)
        is_open = is_open & (new != stop) & (tokens.shape[2] < limits)
        cache.keep(cache_rows[is_open])
        states = model.hidden(new[is_open][:, None], cache)[:, 0]             # (N, C)
        cache.step()
    found = []
    for rows, scores in zip(tokens.tolist(), totals.tolist()):
        found.append([Hypothesis([i for i in row if i >= 0], score)
                      for row, score in zip(rows, scores) if score > -math.inf])
    return found


def beam_responses(model, enc, chats, n, max_new_tokens):
    """Return for each chat at most n different responses (strings), the likeliest first.

    Two lists of ids may spell the same string, so the beam is a little wider than n.
    """
    import sft   # a later stage, so not imported at the top

    prompts = [sft.render_prompt(chat, enc) for chat in chats]
    found = {}
    for rows in sorted_batches([len(p) for p in prompts], 64):
        beams = beam_search(model, [prompts[i] for i in rows], n + 3, max_new_tokens, end_of(enc))
        for i, beam in zip(rows, beams):
            strings = [sft.decode_response(hypothesis.ids, enc) for hypothesis in beam]
            found[i] = list(dict.fromkeys(strings))[:n]
    return [found[i] for i in range(len(chats))]
