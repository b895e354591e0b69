"""Tests of data/formats.py: every format that users bring, and what is said of a bad record."""

import gzip
import json
import math
import random
import re

import pytest

from data.chats import WITH_INPUT, prompt_of
from data.comparisons import read_comparison
from data.formats import (
    load_chats,
    load_comparisons,
    load_grader,
    load_prompts,
    load_seed_tasks,
    load_val,
    split_by_user,
    split_names,
    write_records,
)
from data.records import read_records
from data.text import read_documents
from data.verdicts import load_judged
from scaffold.cli import UserError
from tiny import assistant, chat, documented_formats, user, write_jsonl

# Files


RECORDS = [
    {
        "messages": chat("What does the cow say?", "The cow says moo.\u2028And\x85the 牛\x0b?"),
        "user": "u1",
    },
    {"instruction": "a", "output": "b"},
]
LINES = [json.dumps(r, ensure_ascii=False) for r in RECORDS]
LIST = json.dumps(RECORDS)

FILES = {  # name, content
    "jsonl": ("f.jsonl", "\n".join(LINES).encode()),
    "last newline": ("f.jsonl", ("\n".join(LINES) + "\n").encode()),
    "CRLF": ("f.jsonl", "\r\n".join(LINES).encode() + b"\r\n"),
    "empty lines": ("f.jsonl", ("\n\n" + "\n  \n\n".join(LINES) + "\n\n").encode()),
    "BOM": ("f.jsonl", b"\xef\xbb\xbf" + "\n".join(LINES).encode()),
    "escaped": ("f.jsonl", "\n".join(map(json.dumps, RECORDS)).encode()),
    "list": ("f.json", json.dumps(RECORDS, ensure_ascii=False, indent=1).encode()),
    "list with BOM": ("f.json", b"\xef\xbb\xbf\n " + LIST.encode()),
    "lines in .json": ("f.json", "\n".join(LINES).encode()),
    "utf-16": ("f.jsonl", "\n".join(LINES).encode("utf-16")),
    "utf-32": ("f.jsonl", "\n".join(LINES).encode("utf-32")),
    "gz": ("f.jsonl.gz", gzip.compress("\n".join(LINES).encode())),
    "list in gz": ("f.json.gz", gzip.compress(LIST.encode())),
}


@pytest.mark.parametrize("name, content", FILES.values(), ids=FILES)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [r for _, r in read_records(tmp_path / name)] == RECORDS


GZ = gzip.compress(("\n".join(LINES) * 50).encode())
GOOD = LINES[0].encode()


def second_line(record):
    """Return a file whose first line is good and whose second is this record."""
    return GOOD + b"\n" + json.dumps(record).encode()


BAD_FILES = {  # name, content -> what the error must contain; {} stands for the path
    "empty": ("f.jsonl", b"", ["{}", "no records"]),
    "only empty lines": ("f.jsonl", b"\n \n", ["{}", "no records"]),
    "empty list": ("f.json", b"[]", ["{}", "no records"]),
    "half a line": ("f.jsonl", GOOD + b"\n\n" + GOOD[:30] + b"\n" + GOOD, ["{}:3:"]),
    "a number": ("f.jsonl", GOOD + b"\n17", ["{}:2:", "int"]),
    "a list with a string": ("f.json", b"[" + GOOD + b', "a"]', ["{}", "record 2", "str"]),
    "half a list": ("f.json", b"[" + GOOD, ["{}"]),
    "a list a line": ("f.jsonl", b"[1]\n[2]", ["{}"]),
    "nested without end": ("f.jsonl", GOOD + b"\n" + b"[" * 100_000, ["{}:2:"]),
    "latin-1": ("f.jsonl", GOOD + b"\n" + '{"a": "é"}'.encode("latin-1"), ["{}:2:", "UTF-8"]),
    "utf-16 without a mark": ("f.jsonl", GOOD.decode().encode("utf-16-le"), ["{}:1:", "UTF-16LE"]),
    "no gzip": ("f.jsonl.gz", GOOD, ["{}"]),
    "gzip cut off": ("f.jsonl.gz", GZ[:-20], ["{}"]),
    "gzip damaged": ("f.jsonl.gz", GZ[:40] + bytes(99) + GZ[139:], ["{}"]),
    "no chat": ("f.jsonl", second_line({"text": "a"}), ["{}:2:", "text", "messages"]),
    "a bad role": (
        "f.jsonl",
        second_line({"messages": [{"role": "bot", "content": "a"}]}),
        ["{}:2:", "assistant"],
    ),
    "no list": ("f.jsonl", second_line({"messages": "a"}), ["{}:2:"]),
    "a number as input": (
        "f.jsonl",
        second_line({"instruction": "a", "input": 3, "output": "b"}),
        ["{}:2:", "strings"],
    ),
    "a zero as input": (
        "f.jsonl",
        second_line({"instruction": "a", "input": 0, "output": "b"}),
        ["{}:2:", "strings"],
    ),
    "a zero as output": (
        "f.jsonl",
        second_line({"instruction": "a", "output": 0}),
        ["{}:2:", "strings"],
    ),
    "no response": ("f.jsonl", json.dumps({"messages": chat("a")}).encode(), ["{}", "response"]),
    "a blank response": ("f.jsonl", b'{"instruction": "a", "output": " "}', ["{}", "response"]),
}


@pytest.mark.parametrize("name, content, parts", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as e:
        load_chats(path)
    assert "\n" not in str(e.value)
    for part in parts:
        assert part.replace("{}", str(path)) in str(e.value), e.value


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl") as e:
        load_chats(tmp_path / "gone.jsonl")
    assert "\n" not in str(e.value)


def test_written_records_come_back_and_are_readable(tmp_path):
    path = tmp_path / "new" / "f.jsonl"
    write_records(path, RECORDS)
    assert [r for _, r in read_records(path)] == RECORDS
    assert "牛" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["f.jsonl"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match=tmp_path.name):
        read_records(tmp_path)


# Chats


def test_alpaca_has_many_wordings_but_the_strings_of_the_user_stay_as_they_are(tmp_path):
    """Templates have braces. A user's braces are plain text, even where they spell a template's."""
    record = {
        "instruction": "Say {input} and {instruction} {0} {}",
        "input": "{instruction} \\1 {output}",
        "output": "{input} %s",
    }
    path = write_jsonl(tmp_path / "f.jsonl", record)
    prompts = set()
    for seed in range(40):
        [loaded] = load_chats(path, seed)
        prompt, response = loaded["messages"]
        assert prompt["role"] == "user"
        assert response == assistant(record["output"])
        assert prompt["content"].count(record["instruction"]) == 1
        assert prompt["content"].count(record["input"]) == 1
        prompts.add(prompt["content"])
    assert 2 <= len(prompts)
    assert len(prompts) <= len(WITH_INPUT)
    write_jsonl(path, *[record] * 30)
    assert load_chats(path, 3) == load_chats(path, 3)
    assert load_chats(path, 3) != load_chats(path, 4)


NO_INPUT = {
    "empty": {"input": ""},
    "blank": {"input": " \n"},
    "null": {"input": None},
    "absent": {},
}


@pytest.mark.parametrize("no_input", NO_INPUT.values(), ids=NO_INPUT)
def test_alpaca_without_input(tmp_path, no_input):
    record = {"instruction": "Name a colour.", "output": "red"} | no_input
    path = write_jsonl(tmp_path / "f.jsonl", record)
    for seed in range(20):
        prompt, response = load_chats(path, seed)[0]["messages"]
        assert "Name a colour." in prompt["content"]
        assert "nput" not in prompt["content"]
        assert "None" not in prompt["content"]
        assert prompt["content"] == prompt["content"].strip()
        assert response["content"] == "red"


def test_records_without_a_response_are_skipped_and_counted(tmp_path, capsys):
    """Other keys of a record that is kept stay with it."""
    path = write_jsonl(
        tmp_path / "f.jsonl",
        {"instruction": "a", "output": ""},
        {"messages": chat("a", "b"), "user": 7, "task": {"x": 1}},
        {"messages": chat("a")},
        {"instruction": "a", "output": None},
        {"messages": chat("a", " ")},
        *[{"messages": chat("c", "d")}] * 3,
    )
    kept = load_chats(path)
    assert kept[0] == {"messages": chat("a", "b"), "user": 7, "task": {"x": 1}}
    assert len(kept) == 4
    assert f"{path}: 4 of 8 records skipped" in capsys.readouterr().out
    load_chats(write_jsonl(path, {"messages": chat("a", "b")}))
    assert capsys.readouterr().out == ""


def test_prompt_of_is_the_chat_up_to_its_last_response():
    messages = chat("a", "b", "c", "d")
    assert prompt_of(messages) == messages[:3]
    assert prompt_of([*messages, user("e")]) == messages[:3]


HI = [user("Hi")]
CHAT = [
    {"role": "system", "content": "Be kind."},
    user("Hi"),
    assistant("Hello."),
    user("Who are you?"),
]


# Train and validation


def users_of(records):
    return {str(r["user"]) for r in records}


@pytest.mark.parametrize("n_users, seed", [(2, 0), (20, 1), (100, 2)])
def test_no_user_is_on_both_sides_of_the_split(n_users, seed):
    rng = random.Random(n_users)
    users = [u for i in range(n_users) for u in (f"u{i}", i)]  # strings and numbers
    records = [{"n": i, "user": rng.choice(users)} for i in range(500)]
    train, val = split_by_user(records, 0.1, seed)
    assert train
    assert val
    assert not users_of(train) & users_of(val)
    assert sorted(r["n"] for r in train + val) == list(range(500))
    assert (train, val) == split_by_user(records, 0.1, seed)
    assert len(users_of(val)) == max(1, round(0.1 * len(users_of(records))))


WITHOUT_USERS = {  # records, size of the validation part
    "no user": ([{"n": i} for i in range(100)], 10),
    "one user": ([{"n": i, "user": "me"} for i in range(100)], 10),
    "null": ([{"n": i, "user": None} for i in range(3)], 1),
}


@pytest.mark.parametrize("records, n_val", WITHOUT_USERS.values(), ids=WITHOUT_USERS)
def test_records_without_users_are_split_too(records, n_val):
    train, val = split_by_user(records, 0.1, 0)
    assert len(val) == n_val
    assert sorted(r["n"] for r in train + val) == list(range(len(records)))
    if len(records) >= 4:  # three records may be split alike twice
        _, one = split_by_user(records, 0.5, 1)
        _, two = split_by_user(records, 0.5, 2)
        assert {r["n"] for r in one} != {r["n"] for r in two}


def test_records_without_a_user_are_split_beside_those_with_one():
    records = [{"n": i, "user": f"u{i}"} if i < 20 else {"n": i} for i in range(40)]
    train, val = split_by_user(records, 0.25, 0)
    assert sorted(r["n"] for r in train + val) == list(range(40))
    assert sum("user" in r for r in val) == 5


def test_a_record_without_a_user_is_not_of_the_user_none():
    records = [{"n": i, "user": "None"} if i % 2 else {"n": i} for i in range(40)]
    records.append({"n": 40, "user": "x"})
    for seed in range(4):
        _, val = split_by_user(records, 0.5, seed)
        assert all("user" in r for r in val)


def test_a_single_record_is_both_train_and_validation():
    assert split_by_user([{"n": 1}]) == ([{"n": 1}], [{"n": 1}])


def test_load_val_reads_the_file_or_splits_by_user():
    records = [{"n": i, "user": f"u{i % 5}"} for i in range(50)]
    assert load_val(records, "v.jsonl", lambda path: [path], 3) == (records, ["v.jsonl"])
    assert load_val(records, "", None, 3) == split_by_user(records, seed=3)


def questions(n=40):
    """Return n prompts, three times each."""
    return [f"What is {i}?" for i in range(n)] * 3


REPEATED = {  # kind -> (reader, records in which each of 40 prompts stands three times)
    "pairs": (
        load_comparisons,
        [{"prompt": q, "chosen": f"a{i}", "rejected": "b"} for i, q in enumerate(questions())],
    ),
    "ranked chats": (
        load_comparisons,
        [
            {"prompt": [*CHAT[:3], user(q)], "responses": ["a", f"b{i}"], "ranks": [1, 2]}
            for i, q in enumerate(questions())
        ],
    ),
    "pairs of one user": (
        load_comparisons,
        [
            {"prompt": q, "chosen": f"a{i}", "rejected": "b", "user": "me"}
            for i, q in enumerate(questions())
        ],
    ),
    "chats": (
        load_chats,
        [{"messages": chat("Hi", "Hello.", q, f"a{i}")} for i, q in enumerate(questions())],
    ),
    "Alpaca": (
        load_chats,
        [{"instruction": q, "input": "", "output": f"a{i}"} for i, q in enumerate(questions())],
    ),
    "Alpaca with inputs": (
        load_chats,
        [
            {"instruction": "Answer.", "input": q, "output": f"a{i}"}
            for i, q in enumerate(questions())
        ],
    ),
    "chats with a prompt of another kind": (
        load_chats,
        [
            {"messages": chat(q, f"a{i}"), "prompt": f"template {i}"}
            for i, q in enumerate(questions())
        ],
    ),
    "prompts": (load_prompts, [{"prompt": q} for q in questions()]),
    "prompts of Alpaca": (load_prompts, [{"instruction": q, "output": "a"} for q in questions()]),
    "prompts of pairs": (
        load_prompts,
        [{"prompt": q, "chosen": "a", "rejected": "b"} for q in questions()],
    ),
}


@pytest.mark.parametrize("load, records", REPEATED.values(), ids=REPEATED)
def test_without_users_no_prompt_is_on_both_sides_of_the_split(tmp_path, capsys, load, records):
    loaded = load(write_jsonl(tmp_path / "f.jsonl", *records))
    train, val = load_val(loaded, "", load, seed=1)

    def asked(part):
        return {re.search(r"What is \d+\?", json.dumps(r))[0] for r in part}

    assert len(asked(val)) == 2  # 5% of 40
    assert not asked(train) & asked(val)
    assert len(val) == 6
    assert len(train) == 114
    assert split_names(train, val) == ("training prompts", "held-out prompts")
    assert "6 of 120 records are for validation: held-out prompts" in capsys.readouterr().out


def test_a_single_prompt_is_on_both_sides_and_is_not_called_held_out(capsys):
    records = [{"prompt": HI, "chosen": f"a{i}", "rejected": "b"} for i in range(9)]
    assert load_val(records, "", None, 0) == (records, records)
    printed = capsys.readouterr().out
    assert printed == "warning: with a single prompt, validation repeats the training data\n"


def test_chats_without_a_prompt_are_split_one_by_one():
    records = [{"messages": [assistant(f"a{i}")]} for i in range(40)]
    train, val = split_by_user(records, 0.1, 0)
    assert len(val) == 4
    assert len(train) == 36


def record_of(user, text):
    return {"prompt": chat(text), "user": user}


SPLITS = {  # records for training, for validation -> how they are called
    "users": ([record_of("a", "x"), record_of(1, "y")], [record_of("b", "x")], "users"),
    "a user in both": ([record_of("a", "x"), record_of(1, "y")], [record_of("1", "z")], "prompts"),
    "no users": ([record_of(None, "x")], [record_of(None, "y")], "prompts"),
    "one has none": ([record_of("a", "x")], [record_of("b", "y"), record_of(None, "z")], "prompts"),
    "users and prompts in both": ([record_of("a", "x")], [record_of("a", "x")], ""),
    "prompts in both": ([record_of(None, "x")], [record_of(None, "x")], ""),
}


@pytest.mark.parametrize("train, val, unit", SPLITS.values(), ids=SPLITS)
def test_the_names_of_a_split_say_what_is_held_out(train, val, unit):
    names = (f"training {unit}", f"held-out {unit}") if unit else ("training", "validation")
    assert split_names(train, val) == names


# Comparisons


def transcript(*contents):
    """Return a chat as Anthropic's hh-rlhf writes it: Human, Assistant, Human, ..."""
    roles = ("Human", "Assistant")
    return "".join(f"\n\n{roles[i % 2]}: {content}" for i, content in enumerate(contents))


COMPARISONS = {  # record -> prompt, responses, ranks
    "ranked": (
        {"prompt": "Hi", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]},
        (HI, ["a", "b", "c"], [2, 1, 2]),
    ),
    "ranked, chat": (
        {"prompt": CHAT, "responses": ["a", "b"], "ranks": [1.5, 1]},
        (CHAT, ["a", "b"], [1.5, 1]),
    ),
    "pair": (
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        (HI, ["a", "b"], [1, 2]),
    ),
    "pair, chat": (
        {"prompt": CHAT, "chosen": "a", "rejected": "b\n"},
        (CHAT, ["a", "b\n"], [1, 2]),
    ),
    "pair of chats": (
        {"chosen": [*CHAT, assistant("a")], "rejected": [*CHAT, assistant("b")]},
        (CHAT, ["a", "b"], [1, 2]),
    ),
    "pair of chats beside a prompt": (
        {"prompt": "Hi", "chosen": chat("Hi", "a"), "rejected": chat("Hi", "b")},
        (HI, ["a", "b"], [1, 2]),
    ),
    "continuations of a prompt": (
        {"prompt": CHAT, "chosen": [assistant("a")], "rejected": [assistant("b")]},
        (CHAT, ["a", "b"], [1, 2]),
    ),
    "continuations of a string": (
        {"prompt": "Hi", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        (HI, ["a", "b"], [1, 2]),
    ),
    "continuations of several turns": (
        {
            "prompt": HI,
            "chosen": [assistant("Hello."), *HI, assistant("a")],
            "rejected": [assistant("Hello."), *HI, assistant("b")],
        },
        ([*HI, assistant("Hello."), *HI], ["a", "b"], [1, 2]),
    ),
    "whole chats that the assistant opens": (
        {
            "prompt": [assistant("Hello."), *HI],
            "chosen": [assistant("Hello."), *HI, assistant("a")],
            "rejected": [assistant("Hello."), *HI, assistant("b")],
        },
        ([assistant("Hello."), *HI], ["a", "b"], [1, 2]),
    ),
    "transcripts": (
        {"chosen": transcript("Hi", "a"), "rejected": transcript("Hi", "b")},
        (HI, ["a", "b"], [1, 2]),
    ),
    "transcripts with other white space": (
        {
            "chosen": "Human:Hi\n\nAssistant:a",
            "rejected": "\n\n\nHuman:  Hi\n\nAssistant: b\n",
        },
        (HI, ["a", "b"], [1, 2]),
    ),
    "transcripts with Human: in a turn": (
        {
            "chosen": transcript("Say Human: or\nAssistant: now", "Human: it is"),
            "rejected": transcript("Say Human: or\nAssistant: now", "no"),
        },
        ([user("Say Human: or\nAssistant: now")], ["Human: it is", "no"], [1, 2]),
    ),
    "transcripts of several turns": (
        {
            "chosen": transcript("Hi", "Hello.", "Two\n\nparts?", "a"),
            "rejected": transcript("Hi", "Hello.", "Two\n\nparts?", "b"),
        },
        ([*HI, assistant("Hello."), user("Two\n\nparts?")], ["a", "b"], [1, 2]),
    ),
}


@pytest.mark.parametrize("record, want", COMPARISONS.values(), ids=COMPARISONS)
def test_every_format_of_a_comparison_is_read(record, want, tmp_path):
    assert read_comparison(record, "here") == want
    path = write_jsonl(tmp_path / "r.jsonl", {**record, "user": "u1"})
    [found] = load_comparisons(path)
    assert (found["prompt"], found["responses"], found["ranks"]) == want
    assert found["user"] == "u1"


RANKED = {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2]}
BAD_COMPARISONS = {
    "one response": {**RANKED, "responses": ["a"], "ranks": [1]},
    "more ranks than responses": {**RANKED, "ranks": [1, 2, 3]},
    "responses that are a string": {**RANKED, "responses": "ab"},
    "ranks that are a number": {**RANKED, "ranks": 1},
    "no responses": {**RANKED, "responses": []},
    "a response that is a number": {**RANKED, "responses": ["a", 2]},
    "a response that is null": {**RANKED, "responses": ["a", None]},
    "a prompt that is a number": {**RANKED, "prompt": 5},
    "a prompt without messages": {**RANKED, "prompt": []},
    "rank NaN": {**RANKED, "ranks": [1, math.nan]},
    "rank inf": {**RANKED, "ranks": [1, math.inf]},
    "rank -inf": {**RANKED, "ranks": [1, -math.inf]},
    "rank 0": {**RANKED, "ranks": [1, 0]},
    "rank -1": {**RANKED, "ranks": [1, -1]},
    "rank 0.5": {**RANKED, "ranks": [1, 0.5]},
    "rank true": {**RANKED, "ranks": [1, True]},
    "rank '2'": {**RANKED, "ranks": [1, "2"]},
    "rank null": {**RANKED, "ranks": [1, None]},
    "rank [2]": {**RANKED, "ranks": [1, [2]]},
    "fewer scores than responses": {**RANKED, "scores": [1.0]},
    "scores that are a number": {**RANKED, "scores": 3},
    "no rejected": {"prompt": "Hi", "chosen": "a"},
    "no chosen": {"prompt": "Hi", "rejected": "a"},
    "no prompt": {"responses": ["a", "b"], "ranks": [1, 2]},
    "no comparison": {"text": "Hi"},
    "no keys": {},
    "chosen that is a number": {"prompt": "Hi", "chosen": 1, "rejected": "b"},
    "one transcript": {"chosen": "no transcript", "rejected": transcript("Hi", "b")},
    "chats without messages": {"chosen": [], "rejected": []},
    "a bad role": {"chosen": [{"role": "boss", "content": "x"}], "rejected": HI},
    "a list": [1, 2],
    "no JSON": "text",
    "half an object": "{",
    "a string": '"text"',
    "null": "null",
}


@pytest.mark.parametrize("bad", BAD_COMPARISONS.values(), ids=BAD_COMPARISONS)
def test_a_bad_comparison_is_named_in_one_line(bad, tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", RANKED, bad)
    with pytest.raises(UserError, match=r"r\.jsonl:2: ") as e:
        load_comparisons(path)
    assert "\n" not in str(e.value)


def test_unusable_comparisons_are_skipped_and_counted(tmp_path, capsys):
    """Unusable: two prompts, or no response at the end. All tied or equal: nothing to learn."""
    unusable = [
        {"chosen": transcript("Hi", "a"), "rejected": transcript("Ho", "b")},
        {"chosen": transcript("Hi"), "rejected": transcript("Hi")},
        {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
    ]
    tied = [{**RANKED, "ranks": [3, 3]}, {"prompt": "Hi", "chosen": "a", "rejected": "a"}]
    path = write_jsonl(tmp_path / "r.jsonl", *unusable, RANKED, *tied, *[RANKED] * 4)
    assert len(load_comparisons(path)) == 5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "r.jsonl: 3 of 10 records skipped" in lines[0]
    assert "prompt" in lines[0]
    assert "r.jsonl: 2 of 10 records skipped" in lines[1]
    assert "tied" in lines[1]
    write_jsonl(path, *unusable, *tied)
    with pytest.raises(UserError, match="r.jsonl: no record"):
        load_comparisons(path)


def test_ties_beside_other_ranks_are_kept(tmp_path, capsys):
    record = {"prompt": "Hi", "responses": ["a", "a", "b", "c"], "ranks": [1, 2, 2, 2]}
    [found] = load_comparisons(write_jsonl(tmp_path / "r.jsonl", record))
    assert found["ranks"] == [1, 2, 2, 2]
    assert capsys.readouterr().out == ""


# Prompts


DIALOGUE = [*CHAT, assistant("A model.")]
PROMPTS = {  # record -> prompt
    "string": ({"prompt": "Hi"}, HI),
    "messages": ({"prompt": CHAT}, CHAT),
    "chat": ({"messages": DIALOGUE}, CHAT),
    "chat that ends with the user": ({"messages": CHAT}, CHAT),
    "ranked": ({"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2]}, HI),
    "continuations of a prompt": (
        {"prompt": CHAT, "chosen": DIALOGUE[4:], "rejected": [assistant("Go away.")]},
        CHAT,
    ),
    "pair": ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, HI),
    "pair of chats": (
        {"chosen": DIALOGUE, "rejected": [*CHAT, assistant("Go away.")]},
        CHAT,
    ),
    "transcripts": (
        {"chosen": transcript("Hi", "a"), "rejected": transcript("Hi", "b")},
        HI,
    ),
}


@pytest.mark.parametrize("record, prompt", PROMPTS.values(), ids=PROMPTS)
def test_the_prompt_of_every_format_is_read(tmp_path, record, prompt):
    path = write_jsonl(tmp_path / "p.jsonl", {**record, "user": "u1"})
    [found] = load_prompts(path)
    assert found["prompt"] == prompt
    assert found["user"] == "u1"
    assert "output" not in found


ALPACA = {
    "response": {"output": "Cow, cat."},
    "empty input and output": {"input": "", "output": ""},
    "blank output": {"output": " \n"},
}


@pytest.mark.parametrize("fields", ALPACA.values(), ids=ALPACA)
def test_the_prompt_of_an_alpaca_record_is_read_whatever_its_output(tmp_path, fields):
    """Its wording is drawn from templates."""
    record = {"instruction": "Name two animals.", "user": "u1"} | fields
    [found] = load_prompts(write_jsonl(tmp_path / "p.jsonl", record))
    [message] = found["prompt"]
    assert message["role"] == "user"
    assert "Name two animals." in message["content"]
    assert "Cow" not in message["content"]
    assert found["user"] == "u1"
    assert found["output"] == fields["output"]


def test_records_without_a_prompt_are_skipped_and_counted(tmp_path, capsys):
    """Here two transcripts of different prompts, and a response to nothing."""
    pair = {"chosen": transcript("Hi", "a"), "rejected": transcript("Ho", "b")}
    opening = {"messages": [assistant("Hello.")]}
    path = write_jsonl(tmp_path / "p.jsonl", *[{"prompt": "Hi"}] * 2, pair, opening)
    assert len(load_prompts(path)) == 2
    out = capsys.readouterr().out
    assert "p.jsonl: 1 of 4 records skipped: the two sides do not share a prompt" in out
    assert "p.jsonl: 1 of 4 records skipped: no prompt before a response" in out
    write_jsonl(path, pair, opening)
    with pytest.raises(UserError, match="p.jsonl: no record has a prompt"):
        load_prompts(path)


BAD_PROMPTS = {
    "a number": {"prompt": 3},
    "no messages": {"prompt": []},
    "a bad role": {"prompt": [{"role": "boss", "content": "x"}]},
    "no prompt": {"text": "Hi"},
    "a list": [1],
    "half an object": "{",
    "messages that are a string": {"messages": "Hi"},
    "no rejected": {"chosen": "Hi"},
}


@pytest.mark.parametrize("bad", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_a_bad_prompt_is_named_in_one_line(tmp_path, bad):
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "Hi"}, bad)
    with pytest.raises(UserError, match=r"p\.jsonl:2: ") as e:
        load_prompts(path)
    assert "\n" not in str(e.value)


# Seed tasks


SEED_TASK = {
    "instruction": "Name an animal.",
    "is_classification": False,
    "instances": [{"input": "", "output": "Cow."}],
}


def test_seed_tasks_keep_their_instances(tmp_path):
    tasks = [{**SEED_TASK, "id": i, "is_classification": "True"} for i in range(8)]
    tasks[0]["instances"] = [{"output": "Dog."}]  # the input may be absent
    loaded = load_seed_tasks(write_jsonl(tmp_path / "s.jsonl", *tasks))
    assert loaded[0]["instances"] == [{"input": "", "output": "Dog."}]
    assert loaded[1:] == [SEED_TASK | {"is_classification": True}] * 7


BAD_SEED_TASKS = {  # record -> what the message says
    "no instruction": ({"instances": []}, "expected a string as instruction"),
    "no instances": ({"instruction": "a"}, "expected a list of"),
    "no output": ({"instruction": "a", "instances": [{"output": "b"}, {"input": "a"}]},
                  'expected the strings "input" and "output" in instances[1]'),
    "an odd flag": ({**SEED_TASK, "is_classification": "maybe"},
                    "expected true or false as is_classification"),
}


@pytest.mark.parametrize("bad, message", BAD_SEED_TASKS.values(), ids=BAD_SEED_TASKS)
def test_a_bad_seed_task_is_told_what_and_why(tmp_path, bad, message):
    path = write_jsonl(tmp_path / "s.jsonl", *[SEED_TASK] * 8, bad)
    with pytest.raises(UserError) as e:
        load_seed_tasks(path)
    assert str(e.value).startswith(f"{path}:9: {message}")


def test_fewer_than_8_seed_tasks_are_an_error(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", *[SEED_TASK] * 7)
    with pytest.raises(UserError, match="7 seed tasks"):
        load_seed_tasks(path)


# The grader


def test_load_grader():
    assert load_grader("", []) is None
    assert load_grader("json:loads", [{"task": {"kind": "x"}}])("[1]") == [1]
    # A "task" that is no dict with a kind means something else in other people's records.
    assert load_grader("json:loads", [{"task": {"kind": "x"}}, {"task": "summarise"}]) is None


@pytest.mark.parametrize("spec", ["json", "json:gone", "gone.module:x", "a:b:c", ".relative:x"])
def test_a_grader_that_cannot_be_loaded_is_named(spec):
    with pytest.raises(UserError, match=f"--gold {spec}: "):
        load_grader(spec, [])
    with pytest.raises(UserError, match=f"--grade {spec}: "):
        load_grader(spec, [], "--grade")


@pytest.mark.parametrize("empty", [[], None, {}, "", 0], ids=repr)
def test_a_chat_without_messages_is_skipped_as_a_prompt(tmp_path, capsys, empty):
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "Hi"}, {"messages": empty})
    assert [r["prompt"] for r in load_prompts(path)] == [[user("Hi")]]
    assert "p.jsonl: 1 of 2 records skipped: no prompt before a response" in capsys.readouterr().out


def test_a_wrong_grader_is_reported_under_its_own_flag():
    graded = [{"task": {"kind": "story"}}]
    with pytest.raises(UserError, match="--grade nonsense: write it as module:function"):
        load_grader("nonsense", graded, "--grade")


# The table of data/README.md


READERS = {
    "gpt": read_documents,
    "sft": load_chats,
    "reward": load_comparisons,
    "dpo": load_comparisons,
    "ppo": load_prompts,
    "self_instruct": load_seed_tasks,
    "self_reward --eft": load_judged,
}
ENDINGS = {"text": "txt", "a table with a header": "csv"}   # the others are .jsonl


@pytest.mark.parametrize("name", documented_formats())
def test_every_documented_format_is_read_by_the_scripts_it_names(tmp_path, name):
    lines, scripts = documented_formats()[name]
    copies = 4 if name == "seed tasks" else 1   # there, 8 are the least
    path = tmp_path / f"f.{ENDINGS.get(name, 'jsonl')}"
    path.write_text("\n".join(lines * copies), encoding="utf-8")
    n = 1 if name in ENDINGS else 2 * copies
    for script in scripts:
        assert len(READERS[script](path)) == n
    for script in {"sft", "reward", "self_instruct"} - set(scripts):
        with pytest.raises(UserError, match=path.name):
            READERS[script](path)


def test_the_table_shows_all_formats():
    assert len(documented_formats()) == 17
