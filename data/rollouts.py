"""The last rollout of a PPO run, as JSON lines: what was sampled, and what each token was paid.

    {"update": 59, "beta": 0.1, "prompt": messages, "response": "The cow says moo.", "score": 1.2,
     "ended": true, "task": {...}, "gold": 1.0, "tokens": ["The", " cow", ..., "<|end|>"],
     "logprobs": [...], "ref_logprobs": [...], "rewards": [...], "values": [...],
     "advantages": [...]}

One line per response. All lists have one item per token of the response, the end token included.
Advantages are whitened, as the loss sees them. "task" and "gold" are there if the prompts have
grades.
"""
from data.formats import write_records
from data.tokenizer import decode_token
from scaffold.distributed import rank


def token_text(enc, token):
    """Return a token as a string; bytes that are only a part of a character stay escaped."""
    raw = decode_token(enc, token)
    return enc.decode([token]) if raw is None else raw.decode("utf-8", "backslashreplace")


def rollout_rows(b, rewards, advantages, records, enc, gold=None, **shared):
    """Turn a ppo.Rollout into rows. rewards, advantages (B, T-1); gold: the grader, or None.

    records: what the prompts came from; shared: entries that all rows have.
    """
    columns = dict(logprobs=b.logprobs, ref_logprobs=b.ref_logprobs, rewards=rewards,
                   values=b.values, advantages=advantages)
    mask = b.mask.bool().cpu()                                                # (B, T-1)
    columns = {name: x.cpu() for name, x in columns.items()}
    rows = []
    for i, (record, ids) in enumerate(zip(records, b.responses)):
        ordinary = [token for token in ids if not enc.is_special_token(token)]
        row = shared | dict(prompt=record["prompt"], response=enc.decode(ordinary),
                            score=b.scores[i].item(), ended=bool(b.ended[i]))
        if gold:
            row |= dict(task=record["task"], gold=gold(record["task"], row["response"]))
        row["tokens"] = [token_text(enc, token) for token in ids]
        for name, x in columns.items():
            row[name] = [round(value, 5) for value in x[i][mask[i]].tolist()]
        rows.append(row)
    return rows


def write_rollout(path, *args, **shared):
    """Write the rows of rollout_rows; they replace those of the update before."""
    if rank() == 0:
        write_records(path, rollout_rows(*args, **shared))
