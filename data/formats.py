"""The records that users bring: chats, ranked responses, prompts and seed tasks; their split.

Each loader reads every format that data/README.md shows. data/records.py turns files into records,
data/chats.py and data/comparisons.py turn one record into messages, responses and ranks.

A malformed record is a UserError with file, line and key. A record that is well-formed but
unusable, such as a chat without a response, is skipped; the number of skipped records is printed.
If more than half of a file is unusable, that is a UserError, too.
"""
import importlib
import random

import torch

from data import village
from data.chats import (
    CHAT_KEYS, INPUT_KEYS, PROMPT_KEYS, RESPONSE_KEYS, find_key, has_chat, is_message, prompt_of,
    read_chat, read_prompt, read_turns)
from data.comparisons import is_comparison, read_comparison
from data.records import Unusable, read_records, read_usable
from data.text import write_text
from scaffold.cli import UserError, brief
from scaffold.run import json_line


def readable_line(record):
    """Return a record as a line of JSON; half of a surrogate pair, not in UTF-8, stays escaped."""
    line = json_line(record, ensure_ascii=False)
    try:
        line.encode()
        return line
    except UnicodeEncodeError:
        return json_line(record)


def write_records(path, records):
    """Write JSON lines atomically."""
    write_text(path, "".join(map(readable_line, records)))


def save_chat(path, messages):
    """Write a conversation as one line of JSON to a new file; never overwrite one."""
    if not path:
        raise UserError("name a file: /save FILE")
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError("nothing to save yet")
    try:
        with open(path, "x", encoding="utf-8") as f:
            f.write(json_line({"messages": messages}))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; name another file") from None
    except ValueError as e:   # NUL, or a letter that the file names of this system cannot have
        raise UserError(f"{path!r}: {e}; name another file") from None


def load_chats(path, seed=0):
    """Read chats, prompts with responses, or comparisons -> [{"messages", ...}].

    Of a comparison the best response is the one to learn from. seed: draws the templates for
    instructions.
    """
    rng = random.Random(seed)
    n_comparisons = 0

    def read(r, where):
        nonlocal n_comparisons
        if has_chat(r) or not is_comparison(r):
            return {**r, "messages": read_chat(r, where, rng)}
        prompt, responses, ranks = read_comparison(r, where)
        n_comparisons += 1
        best = responses[ranks.index(min(ranks))]
        return {**r, "messages": [*prompt, {"role": "assistant", "content": best}]}

    chats = read_usable(path, read, "a response to learn from")
    if n_comparisons:
        print(f"{path}: {n_comparisons} of {len(chats)} records are comparisons; the response to "
              f"learn from is the chosen or best one")
    return chats


def load_comparisons(path):
    """Read ranked responses -> [{"prompt": messages, "responses", "ranks", ...}]."""
    def read(r, where):
        prompt, responses, ranks = read_comparison(r, where)
        # In fp32, as the loss sees them: ranks that differ in the ninth digit are a tie.
        levels = set(torch.tensor(ranks, dtype=torch.float).tolist())
        if len(levels) < 2 or len(set(responses)) < 2:
            raise Unusable(where, "all responses are tied or the same")
        if ranks is not r.get("ranks"):   # the "scores" of a pair are not one number per response
            r = {k: v for k, v in r.items() if k not in ("scores", "ranks_other")}
        return {**r, "prompt": prompt, "responses": responses, "ranks": ranks}

    return read_usable(path, read, "two responses of different rank")


def prompt_from(r, where):
    """Return the prompt of a record of any format as messages."""
    is_chat = has_chat(r)
    if r.get("prompt") is not None or (find_key(r, PROMPT_KEYS) and not is_chat):
        return read_prompt(r, where)
    if is_chat:
        messages = read_turns(r, where)
        if messages and messages[-1]["role"] != "user":
            messages = prompt_of(messages)
        if not messages:
            raise Unusable(where, "no prompt before a response")
        return messages
    if is_comparison(r) or "chosen" in r:
        return read_comparison(r, where).prompt
    raise UserError(f"{where}: expected one of {', '.join(PROMPT_KEYS + CHAT_KEYS)} or chosen, "
                    f"found {brief(sorted(r))}")


def load_prompts(path):
    """Read prompts from records of any format -> [{"prompt": messages, ...}]."""
    return read_usable(path, lambda r, where: {**r, "prompt": prompt_from(r, where)}, "a prompt")


def check_seed_task(r, where):
    """Raise UserError unless r has the format of Self-Instruct's seed_tasks.jsonl."""
    def is_instance(i):
        return (isinstance(i, dict) and isinstance(i.get("output"), str)
                and isinstance(i.get("input", ""), str))

    if not isinstance(r.get("instruction"), str):
        raise UserError(f"{where}: expected a string as instruction")
    instances = r.get("instances")
    if not isinstance(instances, list):
        raise UserError(f'{where}: expected a list of {{"input", "output"}} as instances')
    for i, instance in enumerate(instances):
        if not is_instance(instance):
            raise UserError(f'{where}: expected the strings "input" and "output" in instances[{i}]')
    if r.get("is_classification", False) not in (True, False, "true", "True", "false", "False"):
        raise UserError(f"{where}: expected true or false as is_classification")


def load_seed_tasks(path):
    """Read at least 8 seed tasks -> [{"instruction", "is_classification", "instances"}]."""
    tasks = []
    for where, r in read_records(path):
        check_seed_task(r, where)
        instances = [{"input": i.get("input") or "", "output": i["output"]} for i in r["instances"]]
        tasks.append({"instruction": r["instruction"],
                      "is_classification": r.get("is_classification") in (True, "true", "True"),
                      "instances": instances})
    if len(tasks) < 8:
        raise UserError(f"{path}: {len(tasks)} seed tasks; a prompt shows 8, so bring 8 or more")
    return tasks


def prompt_key(record):
    """Return the prompt of a record as a string, "" if it has none.

    For a chat made from an instruction it is what fills the template, because the template is
    random.
    """
    messages = record.get("prompt")
    key = find_key(record, PROMPT_KEYS)
    if isinstance(messages, list) and messages and all(map(is_message, messages)):
        pass
    elif key and isinstance(record[key], str) and find_key(record, RESPONSE_KEYS):
        return f"{record[key]}\n{record.get(find_key(record, INPUT_KEYS)) or ''}"
    else:
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
    if len(val) == n:
        print("warning: with a single prompt, validation repeats the training data")
    else:
        print(f"{len(val):,} of {n:,} records are for validation: {split_names(train, val)[1]}")
    return train, val


def load_grader(spec, records, flag="--gold"):
    """Import the grader 'package.module:function', which grades (task, response).

    Grades are for reports only. Returns None if the spec is empty or a record has no task with
    a kind that the grader knows: users may use "task" for something else. Raises UserError for a
    wrong spec.
    """
    kinds = [r["task"].get("kind") if isinstance(r.get("task"), dict) else None for r in records]
    ours = spec.startswith("data.village:")
    if not spec or None in kinds or ours and not set(kinds) <= {*village.KINDS, "nonsense"}:
        return None
    try:
        module, name = spec.split(":")
        return getattr(importlib.import_module(module), name)
    except (ValueError, ImportError, AttributeError, TypeError) as e:
        raise UserError(f"{flag} {spec}: write it as module:function ({e})") from None


def mean_grade(grader, records, responses):
    """Return the mean grade of one response (a string) per record."""
    return sum(grader(r["task"], text) for r, text in zip(records, responses)) / len(responses)
