"""Chats in every format that users bring become messages: [{"role", "content"}, ...].

The roles are system, user and assistant, the contents strings. Every reader raises UserError with
the key that is malformed and why, and Unusable for what cannot be trained on. data/README.md shows
two records of each format.
"""
import random
import re

from data.records import Unusable
from scaffold.cli import UserError, brief

# The keys under which a record may hold a chat, a prompt, the input to it, and the response.
CHAT_KEYS = ("messages", "conversations", "conversation")
PROMPT_KEYS = ("prompt", "instruction", "question", "query")
INPUT_KEYS = ("input", "context")
SYSTEM_KEYS = ("system", "system_prompt")
RESPONSE_KEYS = ("output", "response", "answer", "completion")

ROLES = {"system": "system", "developer": "system",
         "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
         "tool": "tool"}

# One intent, many wordings: a template drawn at random keeps the model from learning the wording
# (T0; Self-Instruct).
WITH_INPUT = ["{instruction}\n\n{input}",
              "{instruction}\nInput: {input}",
              "{input}\n\n{instruction}",
              "Task: {instruction}\n\n{input}"]
WITHOUT_INPUT = ["{instruction}",
                 "Task: {instruction}"]


def find_key(record, keys):
    """Return the first of these keys that has a value, else the first in the record."""
    present = [key for key in keys if key in record]
    filled = [key for key in present if record[key] not in (None, "")]
    return next(iter(filled + present), None)


def string_at(record, key, where):
    """Return the string under a key, "" if there is none. Raises UserError for other values."""
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key}: found {type(value).__name__}; prompts, inputs and "
                        f"responses must be strings")
    return value


def read_content(content, where):
    """Turn the content of a message, a string or a list of text parts, into a string."""
    if content is None:
        raise Unusable(where, "a message has no content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where}: content: expected a string or a list of parts, "
                        f"found {type(content).__name__}")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or "type" not in part:
            raise UserError(f'{where}: content[{i}]: expected {{"type": "text", "text": string}}')
        if part["type"] != "text":
            raise Unusable(where, "a message has a part that is not text")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where}: content[{i}]: text must be a string")
        texts.append(part["text"])
    return "".join(texts)


def read_message(m, where):
    """Turn one message into {"role": system|user|assistant, "content": string}."""
    if not isinstance(m, dict):
        raise UserError(f"{where}: expected an object with role and content, "
                        f"found {type(m).__name__}")
    role = m.get(find_key(m, ("role", "from")))
    if role is None:
        raise UserError(f"{where}: no role")
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise UserError(f"{where}: role {brief(repr(role))} is none of system, user, assistant, "
                        f"tool")
    if known == "tool" or m.get("tool_calls") or m.get("function_call"):
        raise Unusable(where, "a message calls a tool or comes from one")
    content_key = find_key(m, ("content", "value"))
    if content_key is None:
        raise UserError(f"{where}: no content")
    return {"role": known, "content": read_content(m[content_key], where)}


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


def read_messages(messages, where):
    """Turn a non-empty list of messages of any format into those that check_messages accepts."""
    if not isinstance(messages, list) or not messages:
        found = type(messages).__name__ if messages else "none"
        raise UserError(f"{where}: expected a list of messages, found {found}")
    return [read_message(m, f"{where}[{i}]") for i, m in enumerate(messages)]


def is_transcript(text):
    """Return whether a string is '\\n\\nHuman: ...\\n\\nAssistant: ...' rather than one turn."""
    text = text.replace("\r\n", "\n")
    opened = re.match(r"\s*(Human|Assistant):", text)
    return bool(opened) and (text.startswith("\n\n") or "\n\nAssistant:" in text)


def parse_transcript(text, where="transcript"):
    """Turn Anthropic's '\\n\\nHuman: ...\\n\\nAssistant: ...' into messages."""
    text = "\n\n" + text.replace("\r\n", "\n").lstrip()
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if parts[0].strip() or len(parts) < 3:
        raise UserError(f"{where}: expected a transcript that starts with 'Human:' or 'Assistant:'")
    role = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2])
    return [{"role": role[name], "content": content.strip()} for name, content in turns]


def as_messages(prompt, where):
    """Turn a prompt, which is a string, a transcript or messages, into messages."""
    if isinstance(prompt, list):
        return read_messages(prompt, where)
    if not isinstance(prompt, str):
        raise UserError(f"{where}: expected a string or messages, found {type(prompt).__name__}")
    if not is_transcript(prompt):
        return [{"role": "user", "content": prompt}]
    messages = parse_transcript(prompt, where)
    opens_response = messages[-1] == {"role": "assistant", "content": ""}
    if opens_response and len(messages) > 1:
        return messages[:-1]
    return messages


def has_transcript(record):
    """Return whether a record's prompt is a transcript; then a space opens the response."""
    prompt = record[find_key(record, PROMPT_KEYS)]
    return isinstance(prompt, str) and is_transcript(prompt)


def prompt_of(messages):
    """Return the chat before its last response; [] if there is no response."""
    responses = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return messages[:responses[-1]] if responses else []


def with_system(messages, record, where):
    """Put the record's system column before messages that have no system message yet."""
    system = string_at(record, find_key(record, SYSTEM_KEYS), where)
    if not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def fill_template(instruction, given, rng):
    """Word an instruction and its input, "" without one, as one of several templates does."""
    template = rng.choice(WITH_INPUT if given.strip() else WITHOUT_INPUT)
    fields = {"instruction": instruction, "input": given}
    # A single pass of substitution leaves braces in a user's text alone.
    return re.sub(r"\{(\w+)\}", lambda m: fields[m[1]], template)


def read_prompt(record, where, rng=None):
    """Return the messages of a record's prompt, instruction, question or query.

    rng draws a template for all but a plain prompt. Without it the text decides, so that the same
    text has the same wording everywhere.
    """
    key = find_key(record, PROMPT_KEYS)
    value = record[key]
    if value is None:
        raise Unusable(where, "no prompt")
    if isinstance(value, str) and not is_transcript(value):
        given = string_at(record, find_key(record, INPUT_KEYS), where)
        if key != "prompt" or given.strip():
            rng = rng or random.Random(f"{value}\n{given}".encode("utf-8", "surrogatepass"))
            value = fill_template(value, given, rng)
    return with_system(as_messages(value, f"{where}: {key}"), record, where)


def refuse_label(record, where, advice):
    """Raise UserError for a record of KTO: a chat or response with a label, true or false."""
    label = str(record.get("label")).lower()
    if label in ("true", "false") and find_key(record, CHAT_KEYS + RESPONSE_KEYS):
        raise UserError(f'{where}: "label" calls a single response good or bad (KTO); {advice}')


def has_chat(record):
    """Return whether a record is a chat; a null beside a prompt is an unused column of a table."""
    key = find_key(record, CHAT_KEYS)
    return key is not None and (record[key] is not None or not find_key(record, PROMPT_KEYS))


def read_turns(record, where):
    """Return the messages under one of CHAT_KEYS, [] if there are none."""
    key = find_key(record, CHAT_KEYS)
    if not record[key]:
        return []
    return with_system(read_messages(record[key], f"{where}: {key}"), record, where)


def read_chat(record, where, rng):
    """Turn a chat, or a prompt and its response, into messages that hold a response.

    rng draws the templates. Raises Unusable if no message holds a response.
    """
    refuse_label(record, where, "keep the records whose label is true, without the label")
    response_key = find_key(record, RESPONSE_KEYS)
    if has_chat(record):
        messages = read_turns(record, where)
    elif response_key and find_key(record, PROMPT_KEYS):
        messages = read_prompt(record, where, rng)
        response = record[response_key]
        if isinstance(response, list):
            messages = messages + read_messages(response, f"{where}: {response_key}")
        else:
            content = string_at(record, response_key, where)
            if has_transcript(record):
                content = content.strip()
            messages = [*messages, {"role": "assistant", "content": content}]
    else:
        raise UserError(f'{where}: expected {{"messages": [...]}}, {{"prompt", "completion"}} or '
                        f'{{"instruction", "input", "output"}}, found {brief(sorted(record))}')
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise Unusable(where, "no response to learn from")
    return messages
