"""Tests of data/chats.py: every format of a chat, what is skipped, and what a bad one is told."""

import random

import pytest

from data.chats import WITH_INPUT, WITHOUT_INPUT, as_messages, is_transcript
from data.formats import load_chats, load_prompts, load_val
from scaffold.cli import UserError
from tiny import assistant, chat, user, write_jsonl

SYSTEM = {"role": "system", "content": "Be kind."}
HI = chat("Hi.", "Hello.")
KIND = [SYSTEM, *HI]


def turns(role, content, *rows):
    """Return messages with these two keys from rows of (role, content)."""
    return [{role: r, content: c} for r, c in rows]


CHATS = {  # record -> messages
    "messages": ({"messages": KIND}, KIND),
    "human, gpt": (
        {"conversations": turns("from", "value", ("human", "Hi."), ("gpt", "Hello."))}, HI),
    "system, user, chatgpt": (
        {"conversations": turns(
            "from", "value", ("system", "Be kind."), ("user", "Hi."), ("chatgpt", "Hello."))},
        KIND),
    "user, assistant": (
        {"conversations": turns("from", "value", ("user", "Hi."), ("assistant", "Hello."))}, HI),
    "role and content": ({"conversations": HI}, HI),
    "conversation": ({"conversation": HI}, HI),
    "from and value as messages": (
        {"messages": turns("from", "value", ("human", "Hi."), ("gpt", "Hello."))}, HI),
    "capitals": ({"messages": turns("role", "content", ("User", "Hi."), ("GPT", "Hello."))}, HI),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be kind."}, *HI]}, KIND),
    "other keys in a message": ({"messages": [{**m, "id": 1, "name": "x"} for m in HI]}, HI),
    "no tools called": (
        {"messages": [{**m, "tool_calls": None} for m in HI]}, HI),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"},
                                                   {"type": "text", "text": "i."}]}, HI[1]]}, HI),
    "a system column": ({"messages": HI, "system": "Be kind."}, KIND),
    "a system column beside conversations": ({"conversations": HI, "system": "Be kind."}, KIND),
    "a system column and a system message": ({"messages": KIND, "system": "Be rude."}, KIND),
    "an empty system column": ({"messages": HI, "system": " "}, HI),
    "no system column": ({"messages": HI, "system": None}, HI),
    "prompt and completion": ({"prompt": "Hi.", "completion": "Hello."}, HI),
    "prompt and response": ({"prompt": "Hi.", "response": "Hello."}, HI),
    "both as messages": ({"prompt": [HI[0]], "completion": [HI[1]]}, HI),
    "prompt as messages": ({"prompt": [SYSTEM, HI[0]], "completion": "Hello."}, KIND),
    "completion as messages": ({"prompt": "Hi.", "completion": [HI[1]]}, HI),
    "prompt, completion, system": (
        {"prompt": "Hi.", "completion": "Hello.", "system": "Be kind."}, KIND),
    "a transcript as prompt": (
        {"prompt": "\n\nHuman: Hi.\n\nAssistant:", "completion": " Hello.\n"}, HI),
    "the filled key counts": (
        {"prompt": "Hi.", "completion": None, "output": "Hello.", "instruction": None}, HI),
    "columns of another format": (
        {"messages": None, "prompt": "Hi.", "completion": "Hello."}, HI),
    "keys of another format in messages": (
        {"messages": [{"role": None, "content": None, "from": "human", "value": "Hi."},
                      {"role": "assistant", "content": "Hello.", "from": None}]}, HI),
    "chosen side of a pair": ({"prompt": "Hi.", "chosen": "Hello.", "rejected": "Go!"}, HI),
    "chosen side of chats": ({"chosen": HI, "rejected": chat("Hi.", "Go!")}, HI),
    "best of a ranking": (
        {"prompt": "Hi.", "responses": ["Go!", "Hello.", "x"], "ranks": [3, 1, 2]}, HI),
    "the preferred output": (
        {"prompt": "Hi.", "output_1": "Go!", "output_2": "Hello.", "preference": 2}, HI),
    "messages beside a pair": ({"messages": HI, "chosen": "x", "rejected": "y"}, HI),
}


@pytest.mark.parametrize("record, messages", CHATS.values(), ids=CHATS)
def test_every_format_of_a_chat_is_read(tmp_path, record, messages):
    path = write_jsonl(tmp_path / "c.jsonl", {**record, "user": "u1"})
    [found] = load_chats(path)
    assert found["messages"] == messages
    assert found["user"] == "u1"
    [prompt] = load_prompts(path)
    assert prompt["prompt"] == messages[:-1]


def test_a_bare_list_of_messages_is_a_chat(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", KIND, HI)
    assert [c["messages"] for c in load_chats(path)] == [KIND, HI]


@pytest.mark.parametrize("instruction", ["instruction", "question", "query"])
@pytest.mark.parametrize("response", ["output", "response", "answer", "completion"])
@pytest.mark.parametrize("given", [None, "input", "context"])
def test_instructions_have_many_names(tmp_path, instruction, response, given):
    record = {instruction: "Say it.", response: "It.", "system": "Be kind."}
    if given:
        record[given] = "a pie"
    templates = WITH_INPUT if given else WITHOUT_INPUT
    wordings = {t.format(instruction="Say it.", input="a pie") for t in templates}
    path = write_jsonl(tmp_path / "c.jsonl", *[record] * 30)
    chats = [c["messages"] for c in load_chats(path)]
    assert {c[1]["content"] for c in chats} == wordings
    assert all(c == [SYSTEM, user(c[1]["content"]), assistant("It.")] for c in chats)
    prompts = [p["prompt"] for p in load_prompts(path)]
    assert prompts == [prompts[0]] * 30   # so that one prompt is not on both sides of a split
    assert prompts[0][1]["content"] in wordings


def test_an_instruction_may_hold_half_a_surrogate_pair(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", {"instruction": "Say \ud800.", "output": "x"})
    assert "Say \ud800." in load_prompts(path)[0]["prompt"][0]["content"]


def test_the_split_knows_an_instruction_by_any_name(tmp_path, capsys):
    records = [{"query": "Answer.", "context": f"What is {i % 40}?", "answer": f"a{i}"}
               for i in range(120)]
    random.Random(0).shuffle(records)
    chats = load_chats(write_jsonl(tmp_path / "c.jsonl", *records))
    train, val = load_val(chats, "", None, 0)
    assert len(val) == 6
    assert not {r["context"] for r in train} & {r["context"] for r in val}


def test_training_on_comparisons_is_printed(tmp_path, capsys):
    pair = {"prompt": "Hi.", "chosen": "Hello.", "rejected": "Go!"}
    path = write_jsonl(tmp_path / "c.jsonl", pair, {"messages": HI}, pair)
    load_chats(path)
    assert capsys.readouterr().out == (
        f"{path}: 2 of 3 records are comparisons; the response to learn from is the chosen or "
        f"best one\n")


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
UNUSABLE = {  # record -> reason
    "a tool's message": (
        {"messages": [*HI, {"role": "tool", "content": "42"}, HI[1]]}, "comes from one"),
    "a tool's message by from": (
        {"conversations": turns("from", "value", ("human", "Hi."), ("tool", "4"), ("gpt", "4"))},
        "comes from one"),
    "a call": ({"messages": [HI[0], CALL]}, "calls a tool"),
    "a call without content": ({"messages": [HI[0], {**CALL, "content": None}]}, "calls a tool"),
    "a call as in older files": (
        {"messages": [*HI, {"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
        "calls a tool"),
    "content null": ({"messages": [HI[0], {"role": "assistant", "content": None}]}, "no content"),
    "value null": ({"conversations": [{"from": "human", "value": None}, HI[1]]}, "no content"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
                      HI[1]]}, "not text"),
    "content null in a prompt": (
        {"prompt": [{"role": "user", "content": None}], "completion": "a"}, "no content"),
    "no messages": ({"messages": []}, "no response"),
    "no conversations": ({"conversations": None}, "no response"),
    "no response": ({"messages": HI[:1]}, "no response"),
    "completion null": ({"prompt": "Hi.", "completion": None}, "no response"),
    "completion blank": ({"prompt": "Hi.", "completion": [assistant(" ")]}, "no response"),
    "prompt null": ({"prompt": None, "completion": "a"}, "no prompt"),
    "a pair with an empty side": ({"prompt": "Hi.", "chosen": "", "rejected": "a"}, "empty"),
}


@pytest.mark.parametrize("record, reason", UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_chat_is_skipped_and_counted(tmp_path, capsys, record, reason):
    path = write_jsonl(tmp_path / "c.jsonl", record, {"messages": HI})
    assert [c["messages"] for c in load_chats(path)] == [HI]
    out = capsys.readouterr().out
    assert f"{path}: 1 of 2 records skipped: " in out
    assert reason in out


MALFORMED = {  # record -> what the message says after the line
    "an unknown role": (
        {"messages": [*HI, {"role": "function", "content": "x"}]},
        "messages[2]: role 'function' is none of system, user, assistant, tool"),
    "an unknown from": (
        {"conversations": [{"from": "observation", "value": "x"}]},
        "conversations[0]: role 'observation' is none of system, user, assistant, tool"),
    "a role that is a number": ({"messages": [{"role": 1, "content": "x"}]}, "messages[0]: role 1"),
    "no role": ({"messages": [HI[0], {"content": "x"}]}, "messages[1]: no role"),
    "no content": ({"messages": [HI[0], {"role": "assistant"}]}, "messages[1]: no content"),
    "content that is a number": (
        {"messages": [{"role": "user", "content": 3}]}, "messages[0]: content: expected a string"),
    "a part without type": (
        {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0]: content[0]: "),
    "a part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        "messages[0]: content[0]: text must be a string"),
    "a message that is a string": ({"messages": [HI[0], "Hi."]}, "messages[1]: expected an object"),
    "messages that are a string": ({"messages": "Hi."}, "messages: expected a list of messages"),
    "a bare list": ([HI[0], {"role": "boss", "content": "x"}], "messages[1]: role 'boss'"),
    "a prompt": (
        {"prompt": [{"role": "boss", "content": "x"}], "completion": "a"},
        "prompt[0]: role 'boss'"),
    "a prompt that is a number": (
        {"prompt": 3, "completion": "a"}, "prompt: expected a string or messages, found int"),
    "a completion": (
        {"prompt": "Hi.", "completion": [{"role": "boss", "content": "x"}]},
        "completion[0]: role 'boss'"),
    "an answer that is an object": (
        {"question": "Hi.", "answer": {"text": ["a"]}}, "answer: found dict"),
    "an input that is a list": (
        {"instruction": "Hi.", "input": ["a"], "output": "x"}, "input: found list"),
    "a system column": ({"messages": HI, "system": 3}, "system: found int"),
    "labels": (
        {"prompt": "Hi.", "completion": "Go!", "label": False},
        '"label" calls a single response good or bad (KTO); keep the records whose label is true'),
    "labels of chats": ({"messages": HI, "label": True}, '"label" calls a single response'),
    "labels of a table": (
        {"prompt": "Hi.", "completion": "a", "label": "True"}, '"label" calls a single response'),
}


@pytest.mark.parametrize("record, message", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_chat_is_told_what_and_why(tmp_path, record, message):
    path = write_jsonl(tmp_path / "c.jsonl", {"messages": HI}, record)
    with pytest.raises(UserError) as e:
        load_chats(path)
    assert str(e.value).startswith(f"{path}:2: {message}")
    assert len(str(e.value).splitlines()) == 1


TRANSCRIPTS = {  # prompt -> messages
    "\n\nHuman: Hi.\n\nAssistant:": [user("Hi.")],
    "\n\nHuman: Hi.": [user("Hi.")],
    "Human: Hi.\n\nAssistant:": [user("Hi.")],
    "\r\n\r\nHuman: Hi.\r\n\r\nAssistant: Hello.\r\n\r\nHuman: Two\r\nlines.\r\n\r\nAssistant: ":
        [*HI, user("Two\nlines.")],
    "Human: Hi.": [user("Human: Hi.")],
    "Tell me about Human: and\n\nAssistant:": [user("Tell me about Human: and\n\nAssistant:")],
    "Humans: who?\n\nAssistant:": [user("Humans: who?\n\nAssistant:")],
    "": [user("")],
}


@pytest.mark.parametrize("prompt", TRANSCRIPTS)
def test_a_transcript_becomes_turns_and_other_strings_stay(prompt):
    assert as_messages(prompt, "here") == TRANSCRIPTS[prompt]
    assert is_transcript(prompt) == (TRANSCRIPTS[prompt] != [user(prompt)])


def test_chats_from_a_table(tmp_path):
    """Flat records. Empty cells are absent keys."""
    path = tmp_path / "c.csv"
    path.write_text("prompt,completion,system,user\nHi.,Hello.,,u1\nHi.,Hello.,Be kind.,\nHi.,,,\n")
    assert [(c["messages"], c["user"]) for c in load_chats(path)] == [(HI, "u1"), (KIND, None)]


@pytest.mark.parametrize("record, want", [
    ({"system_prompt": "Be kind.", "prompt": "Hi.", "completion": "Yo."}, "Be kind.|Hi.|Yo."),
    ({"prompt": "Hi.", "input": "", "context": "Ann.", "output": "Yo."}, "Ann."),
    ({"prompt": "", "question": "Who?", "response": "", "answer": "Me."}, "Me."),
])
def test_a_blank_column_does_not_hide_the_one_with_a_value(tmp_path, record, want):
    path = write_jsonl(tmp_path / "x.jsonl", record)
    text = "|".join(m["content"] for m in load_chats(path)[0]["messages"])
    assert want in text
