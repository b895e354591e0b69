"""The record formats that users bring: chats, ranked responses, prompts and seed tasks.

Files are .json (one list) or .jsonl (one object per line), optionally gzipped (.gz).
data/README.md shows two records of each format.

A malformed record is a UserError with file and line. A record that is well-formed but unusable,
such as a chat without a response, is skipped; the number of skipped records is printed.
"""
import gzip
import importlib
import io
import json
import random
import re
import zlib
from pathlib import Path

import torch

from data.text import write_text
from scaffold.cli import UserError, brief

# One intent, many wordings: a template drawn at random keeps the model from learning the wording
# (T0; Self-Instruct).
WITH_INPUT = ["{instruction}\n\n{input}",
              "{instruction}\nInput: {input}",
              "{input}\n\n{instruction}",
              "Task: {instruction}\n\n{input}"]
WITHOUT_INPUT = ["{instruction}",
                 "Task: {instruction}"]


def read_bytes(path):
    """Return the content of a file, decompressed if it ends in .gz. Raises UserError."""
    try:
        raw = path.read_bytes()
        if path.suffix != ".gz":
            return raw
        # Text shrinks 3 to 20 times; a file made to fill the memory shrinks 1,000 times.
        most = max(10_000_000, 100 * len(raw))
        content = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(most + 1)
    except OSError as e:   # BadGzipFile is an OSError
        raise UserError(f"{path}: {e.strerror or e}") from None
    except (EOFError, zlib.error):
        raise UserError(f"{path}: the compressed file is damaged or cut off") from None
    if len(content) > most:
        raise UserError(f"{path}: decompresses to more than 100 times its size, unlike any text; "
                        f"if you trust it: gunzip {path}")
    return content


def read_records(path):
    """Read a .json, .jsonl or .gz file -> [(where, record)], where is 'file:line' for messages.

    Raises UserError unless the file holds at least one record and all records are JSON objects.
    """
    path = Path(path)
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[:e.start].count(10) + 1
        raise UserError(f"{path}:{line}: byte {e.start} is not UTF-8") from None
    records = []
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}: not a JSON list ({e})") from None
        records = [(f"{path}: record {i}", r) for i, r in enumerate(whole, 1)]
    else:
        for i, line in enumerate(text.split("\n"), 1):   # splitlines() would also cut at U+2028
            if not line.strip():
                continue
            try:
                records.append((f"{path}:{i}", json.loads(line)))
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}:{i}: not a JSON object ({e})") from None
    if not records:
        raise UserError(f"{path}: no records in it")
    for where, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return records


def write_records(path, records):
    """Write JSON lines atomically."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def save_chat(path, messages):
    """Write a conversation as one line of JSON to a new file; never overwrite one."""
    if not path:
        raise UserError("name a file: /save FILE")
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError("nothing to save yet")
    try:
        with open(path, "x", encoding="utf-8") as f:
            f.write(json.dumps({"messages": messages}) + "\n")
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; name another file") from None


def print_skipped(path, total, counts):
    """Print how many of the records of a file were skipped, and why. counts: {reason: number}."""
    for reason, n in counts.items():
        if n:
            print(f"{path}: {n} of {total} records skipped: {reason}")


def is_message(m):
    """Return whether m is {"role": system|user|assistant, "content": string}."""
    return (isinstance(m, dict)
            and m.get("role") in ("system", "user", "assistant")
            and isinstance(m.get("content"), str))


def check_messages(messages, where="messages"):
    """Return a non-empty list of {"role", "content"} messages, or raise UserError."""
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise UserError(f'{where}: expected '
                        f'[{{"role": "system|user|assistant", "content": "..."}}, ...]')
    return messages


def as_messages(prompt, where):
    """Turn a prompt, a string or messages, into messages."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return check_messages(prompt, where)


def prompt_of(messages):
    """Return the chat before its last response; [] if there is no response."""
    responses = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return messages[:responses[-1]] if responses else []


def parse_transcript(text, where="transcript"):
    """Turn Anthropic's '\\n\\nHuman: ...\\n\\nAssistant: ...' into messages."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    if parts[0].strip() or len(parts) < 3:
        raise UserError(f"{where}: expected a transcript that starts with 'Human:' or 'Assistant:'")
    role = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2])
    return [{"role": role[name], "content": content.strip()} for name, content in turns]


def as_chat(record, where, rng):
    """Turn {"messages"} or Alpaca's {"instruction", "input", "output"} into messages.

    Returns None if no message holds a response. Raises UserError for other records.
    """
    if "messages" in record:
        messages = check_messages(record["messages"], where)
    elif "instruction" in record and "output" in record:
        fields = {k: record.get(k) for k in ("instruction", "input", "output")}
        fields = {k: "" if v is None else v for k, v in fields.items()}
        if not all(isinstance(v, str) for v in fields.values()):
            raise UserError(f"{where}: instruction, input and output must be strings")
        template = rng.choice(WITH_INPUT if fields["input"].strip() else WITHOUT_INPUT)
        # A single pass of substitution leaves braces in a user's text alone.
        prompt = re.sub(r"\{(\w+)\}", lambda m: fields[m[1]], template)
        messages = [{"role": "user", "content": prompt},
                    {"role": "assistant", "content": fields["output"]}]
    else:
        raise UserError(f'{where}: expected {{"messages": [...]}} or {{"instruction", "input", '
                        f'"output"}}, found {brief(sorted(record))}')
    answered = any(m["role"] == "assistant" and m["content"].strip() for m in messages)
    return messages if answered else None


def load_chats(path, seed=0):
    """Read chats or Alpaca records -> [{"messages", ...}]. seed: draws the templates for Alpaca."""
    rng = random.Random(seed)
    chats, empty = [], 0
    for where, record in read_records(path):
        messages = as_chat(record, where, rng)
        if messages is None:
            empty += 1
        else:
            chats.append({**record, "messages": messages})
    print_skipped(path, len(chats) + empty, {"no response to learn from": empty})
    if not chats:
        raise UserError(f"{path}: no record has a response to learn from")
    return chats


def is_number(x, least):
    """Return whether x is a number from `least` to 1e9, neither bool nor nan."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and least <= x < 1e9


def read_ranked(r, where):
    """Check {"prompt", "responses", "ranks"} -> (prompt messages, responses, ranks)."""
    responses = r["responses"]
    ranks = r["ranks"]
    lists = isinstance(responses, list) and isinstance(ranks, list)
    if not lists or len(responses) != len(ranks) or len(responses) < 2:
        raise UserError(f"{where}: responses and ranks must be two lists of the same length K >= 2")
    if not all(isinstance(x, str) for x in responses):
        raise UserError(f"{where}: every response must be a string")
    if not all(is_number(x, 1) for x in ranks):
        raise UserError(f"{where}: every rank must be a number from 1 (best) on; equal is a tie")
    for key in ("scores", "ranks_other"):
        values = r.get(key, ranks)
        if (not isinstance(values, list) or len(values) != len(responses)
                or not all(is_number(x, -1e9) for x in values)):
            raise UserError(f"{where}: {key} must be a list with one number per response")
    return as_messages(r["prompt"], where), responses, ranks


def read_comparison(r, where):
    """Turn a record of ranked responses into (prompt messages, responses, ranks), rank 1 best.

    Accepts {"prompt", "responses", "ranks"}, {"prompt", "chosen", "rejected"}, and pairs of whole
    chats or Anthropic transcripts. Returns None if the chats of a pair do not share a prompt.
    """
    if "responses" in r and "ranks" in r and "prompt" in r:
        return read_ranked(r, where)
    if "chosen" not in r or "rejected" not in r:
        raise UserError(f'{where}: expected "chosen" and "rejected", or "prompt", "responses" and '
                        f'"ranks"; found {brief(sorted(r))}')
    pair = [r["chosen"], r["rejected"]]
    if "prompt" in r and all(isinstance(x, str) for x in pair):
        return as_messages(r["prompt"], where), pair, [1, 2]
    chats = [parse_transcript(x, where) if isinstance(x, str) else check_messages(x, where)
             for x in pair]
    if "prompt" in r:   # then each side is a whole chat, or only the response
        prompt = as_messages(r["prompt"], where)
        for i, c in enumerate(chats):
            only_response = c[0]["role"] == "assistant" and c[:len(prompt)] != prompt
            if only_response:
                chats[i] = prompt + c
    prompts = [c[:-1] for c in chats]
    last = [c[-1] for c in chats]
    if not prompts[0] or prompts[0] != prompts[1] or any(m["role"] != "assistant" for m in last):
        return None
    return prompts[0], [m["content"] for m in last], [1, 2]


def load_comparisons(path):
    """Read ranked responses -> [{"prompt": messages, "responses", "ranks", ...}]."""
    kept, malformed_pairs, tied = [], 0, 0
    for where, r in read_records(path):
        comparison = read_comparison(r, where)
        if comparison is None:
            malformed_pairs += 1
            continue
        prompt, responses, ranks = comparison
        # In fp32, as the loss sees them: ranks that differ in the ninth digit are a tie.
        levels = set(torch.tensor(ranks, dtype=torch.float).tolist())
        if len(levels) < 2 or len(set(responses)) < 2:
            tied += 1
            continue
        if ranks is not r.get("ranks"):   # the "scores" of a pair are not one number per response
            r = {k: v for k, v in r.items() if k not in ("scores", "ranks_other")}
        kept.append({**r, "prompt": prompt, "responses": responses, "ranks": ranks})
    print_skipped(path, len(kept) + malformed_pairs + tied, {
        "the two sides do not share a prompt and end with a response": malformed_pairs,
        "all responses are tied or the same": tied})
    if not kept:
        raise UserError(f"{path}: no record has two responses of different rank")
    return kept


def read_prompt(r, where, rng):
    """Return the prompt of a record of any format as messages; None or [] if it has none."""
    if "prompt" in r:
        return as_messages(r["prompt"], where)
    if "chosen" in r:
        comparison = read_comparison(r, where)
        return comparison[0] if comparison else None
    if "messages" in r:
        if not r["messages"]:
            return None
        messages = check_messages(r["messages"], where)
    else:
        # The response is not used, so a stand-in replaces an empty one.
        if not str(r.get("output", "-") or "").strip():
            r = {**r, "output": "-"}
        messages = as_chat(r, where, rng)
    return messages if messages[-1]["role"] == "user" else prompt_of(messages)


def load_prompts(path):
    """Read prompts from records of any format -> [{"prompt": messages, ...}]."""
    rng = random.Random(0)
    kept, unusable = [], 0
    for where, r in read_records(path):
        prompt = read_prompt(r, where, rng)
        if prompt:
            kept.append({**r, "prompt": prompt})
        else:
            unusable += 1
    print_skipped(path, len(kept) + unusable, {"no prompt before a response": unusable})
    if not kept:
        raise UserError(f"{path}: no record has a prompt")
    return kept


def is_seed_task(r):
    """Return whether r is a seed task in the format of Self-Instruct's seed_tasks.jsonl."""
    instances = r.get("instances")
    flag = r.get("is_classification", False)
    return (isinstance(r.get("instruction"), str)
            and isinstance(instances, list)
            and all(isinstance(i, dict) and isinstance(i.get("output"), str)
                    and isinstance(i.get("input", ""), str) for i in instances)
            and flag in (True, False, "true", "True", "false", "False"))


def load_seed_tasks(path):
    """Read at least 8 seed tasks -> [{"instruction", "is_classification", "instances"}]."""
    tasks = []
    for where, r in read_records(path):
        if not is_seed_task(r):
            raise UserError(f'{where}: expected {{"instruction": string, "instances": [{{"input", '
                            f'"output"}}], "is_classification": true or false}}')
        instances = [{"input": i.get("input") or "", "output": i["output"]} for i in r["instances"]]
        tasks.append({"instruction": r["instruction"],
                      "is_classification": r.get("is_classification") in (True, "true", "True"),
                      "instances": instances})
    if len(tasks) < 8:
        raise UserError(f"{path}: {len(tasks)} seed tasks; a prompt shows 8, so bring 8 or more")
    return tasks


def prompt_key(record):
    """Return the prompt of a record as a string, "" if it has none.

    For Alpaca's records it is what fills the template, because the template is random.
    """
    if "instruction" in record and "output" in record:
        return f"{record['instruction']}\n{record.get('input') or ''}"
    messages = record.get("prompt")
    if not isinstance(messages, list) or not all(map(is_message, messages)):
        messages = prompt_of(record.get("messages", []))
    return "\n".join(m["content"] for m in messages)


def users_of(records):
    """Return the user of each record as a string, None without one."""
    return [None if r.get("user") is None else str(r["user"]) for r in records]


def split_by_user(records, fraction=0.05, seed=0):
    """Split records into (train, validation) that share no user.

    If the records name fewer than two users, the parts share no prompt instead. One user asks
    similar things, and one prompt may have many records, so a random split would leak. Beside
    records with users, those without one are for training. If there is only one prompt, both parts
    are all records.
    """
    groups = users_of(records)
    if len(set(groups) - {None}) < 2:
        # A record without a prompt is a group of its own.
        groups = [prompt_key(r) or f"record {i}" for i, r in enumerate(records)]
    names = sorted(set(groups) - {None})
    if len(names) < 2:
        return records, records
    random.Random(seed).shuffle(names)
    held_out = set(names[:max(1, round(fraction * len(names)))])
    in_val = [group in held_out for group in groups]
    train = [r for r, v in zip(records, in_val) if not v]
    val = [r for r, v in zip(records, in_val) if v]
    return train, val


def split_names(train, val):
    """Name two parts of the data by what they do not share -> (name of train, name of val)."""
    users = set(users_of(val))
    if None not in users and not users & set(users_of(train)):
        return "training users", "held-out users"
    if not {prompt_key(r) for r in val} & {prompt_key(r) for r in train}:
        return "training prompts", "held-out prompts"
    return "training", "validation"


def load_val(train, path, load, seed):
    """Load the validation records of a file, or split them off by user -> (train, validation)."""
    if path:
        return train, load(path)
    n = len(train)
    train, val = split_by_user(train, seed=seed)
    print(f"{len(val):,} of {n:,} records are for validation: {split_names(train, val)[1]}")
    return train, val


def load_grader(spec, records, flag="--gold"):
    """Import the grader 'package.module:function', which grades (task, response).

    Grades are for reports only. Returns None if the spec is empty or a record has no task with
    a kind: users may use "task" for something else. Raises UserError for a wrong spec.
    """
    graded = all(isinstance(r.get("task"), dict) and "kind" in r["task"] for r in records)
    if not spec or not graded:
        return None
    try:
        module, name = spec.split(":")
        return getattr(importlib.import_module(module), name)
    except (ValueError, ImportError, AttributeError, TypeError) as e:
        raise UserError(f"{flag} {spec}: write it as module:function ({e})") from None


def mean_grade(grader, records, responses):
    """Return the mean grade of one response (a string) per record."""
    return sum(grader(r["task"], text) for r, text in zip(records, responses)) / len(responses)
