"""Tests of data/comparisons.py: every format of a comparison, and what a bad one is told."""

import pytest

from data.formats import load_chats, load_comparisons, load_prompts, load_val
from scaffold.cli import UserError
from tiny import assistant, chat, user, write_jsonl

HI = [user("Hi.")]
SYSTEM = {"role": "system", "content": "Be kind."}
PAIR = {"chosen": "yes", "rejected": "no"}
HUMAN = "\n\nHuman: Hi."
TALK = "\n\nHuman: Ho.\n\nAssistant: Ha.\n\nHuman: Hi.\n\nAssistant:"
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]
OUTPUTS = {"prompt": "Hi.", "output_1": "yes", "output_2": "no"}

COMPARISONS = {  # record -> prompt, responses, ranks
    "a transcript as prompt": (
        {"prompt": f"{HUMAN}\n\nAssistant:", "chosen": " yes", "rejected": " no"},
        HI, ["yes", "no"], [1, 2]),
    "a transcript of several turns as prompt": (
        {"prompt": TALK, **PAIR}, [*chat("Ho.", "Ha."), *HI], ["yes", "no"], [1, 2]),
    "a transcript as prompt, line ends of Windows": (
        {"prompt": TALK.replace("\n", "\r\n"), **PAIR},
        [*chat("Ho.", "Ha."), *HI], ["yes", "no"], [1, 2]),
    "a transcript as prompt beside whole transcripts": (
        {"prompt": HUMAN, "chosen": f"{HUMAN}\n\nAssistant: yes",
         "rejected": f"{HUMAN}\n\nAssistant: no"}, HI, ["yes", "no"], [1, 2]),
    "a plain prompt beside whole transcripts": (
        {"prompt": "Hi.", "chosen": f"{HUMAN}\n\nAssistant: yes",
         "rejected": f"{HUMAN}\n\nAssistant: no"}, HI, ["yes", "no"], [1, 2]),
    "a transcript as prompt beside messages": (
        {"prompt": f"{HUMAN}\n\nAssistant:", "chosen": [assistant("yes")],
         "rejected": [assistant("no")]}, HI, ["yes", "no"], [1, 2]),
    "transcripts, line ends of Windows": (
        {"chosen": f"{TALK} yes".replace("\n", "\r\n"),
         "rejected": f"{TALK} no\n".replace("\n", "\r\n")},
        [*chat("Ho.", "Ha."), *HI], ["yes", "no"], [1, 2]),
    "a transcript as prompt of a ranking": (
        {"prompt": f"{HUMAN}\n\nAssistant:", "responses": ["a", "b", "c"], "ranks": [2, 1, 3]},
        HI, ["a", "b", "c"], [2, 1, 3]),
    "parts": ({"prompt": PARTS, **PAIR}, HI, ["yes", "no"], [1, 2]),
    "from and value": (
        {"chosen": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "yes"}],
         "rejected": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "no"}]},
        HI, ["yes", "no"], [1, 2]),
    "a string beside messages": (
        {"prompt": "Hi.", "chosen": "yes", "rejected": [assistant("no")]},
        HI, ["yes", "no"], [1, 2]),
    "a system column": (
        {"prompt": "Hi.", "system": "Be kind.", **PAIR}, [SYSTEM, *HI], ["yes", "no"], [1, 2]),
    "a system column beside chats": (
        {"system": "Be kind.", "chosen": chat("Hi.", "yes"), "rejected": chat("Hi.", "no")},
        [SYSTEM, *HI], ["yes", "no"], [1, 2]),
    "a system column beside a prompt and chats": (
        {"prompt": "Hi.", "system": "Be kind.", "chosen": chat("Hi.", "yes"),
         "rejected": chat("Hi.", "no")}, [SYSTEM, *HI], ["yes", "no"], [1, 2]),
    "the first output": ({**OUTPUTS, "preference": 1}, HI, ["yes", "no"], [1, 2]),
    "the second output": ({**OUTPUTS, "preference": 2}, HI, ["yes", "no"], [2, 1]),
    "a preference in a table": ({**OUTPUTS, "preference": "2"}, HI, ["yes", "no"], [2, 1]),
    "a preference with a fraction": (
        {**OUTPUTS, "preference": 1.25}, HI, ["yes", "no"], [1.25, 1.75]),
}


@pytest.mark.parametrize("record, prompt, responses, ranks", COMPARISONS.values(), ids=COMPARISONS)
def test_every_format_of_a_comparison_is_read(tmp_path, record, prompt, responses, ranks):
    path = write_jsonl(tmp_path / "r.jsonl", {**record, "user": "u1"})
    [found] = load_comparisons(path)
    assert (found["prompt"], found["responses"], found["ranks"]) == (prompt, responses, ranks)
    assert found["user"] == "u1"
    best = responses[ranks.index(min(ranks))]
    assert load_chats(path)[0]["messages"] == [*prompt, assistant(best)]
    assert load_prompts(path)[0]["prompt"] == prompt


@pytest.mark.parametrize("key", ["instruction", "question", "query"])
@pytest.mark.parametrize("given", [{}, {"input": "a pie"}, {"context": "a pie"}])
@pytest.mark.parametrize("sides", [
    PAIR,
    {"output_1": "yes", "output_2": "no", "preference": 1},
    {"responses": ["yes", "no"], "ranks": [1, 2]},
], ids=["pair", "outputs", "ranks"])
def test_the_prompt_may_be_an_instruction_with_input(tmp_path, key, given, sides):
    path = write_jsonl(tmp_path / "r.jsonl", *[{key: "Say it.", **given, **sides}] * 9)
    found = load_comparisons(path)
    assert found == [found[0]] * 9   # one wording, so that it is one prompt in the split
    [message] = found[0]["prompt"]
    assert message["role"] == "user"
    assert "Say it." in message["content"]
    assert ("a pie" in message["content"]) == bool(given)
    assert found[0]["responses"] == ["yes", "no"]
    assert found[0]["ranks"] == [1, 2]


def test_no_instruction_is_on_both_sides_of_the_split(tmp_path, capsys):
    records = [{"instruction": f"What is {i % 40}?", **PAIR, "n": i} for i in range(120)]
    comparisons = load_comparisons(write_jsonl(tmp_path / "r.jsonl", *records))
    train, val = load_val(comparisons, "", None, 0)
    assert len(val) == 6
    assert not {r["instruction"] for r in train} & {r["instruction"] for r in val}


UNUSABLE = {  # record -> reason
    "chosen empty": ({"prompt": "Hi.", "chosen": "", "rejected": "no"}, "is empty"),
    "rejected blank": ({"prompt": "Hi.", "chosen": "yes", "rejected": " \n"}, "is empty"),
    "rejected null": ({"prompt": "Hi.", "chosen": "yes", "rejected": None}, "is empty"),
    "a side empty in a transcript": (
        {"chosen": f"{HUMAN}\n\nAssistant: yes", "rejected": f"{HUMAN}\n\nAssistant:"}, "is empty"),
    "a side empty in a chat": (
        {"chosen": chat("Hi.", " "), "rejected": chat("Hi.", "no")}, "is empty"),
    "no prompt, both sides empty": ({"chosen": "", "rejected": ""}, "is empty"),
    "an output empty": ({**OUTPUTS, "output_2": "", "preference": 1}, "is empty"),
    "a content null": (
        {"prompt": HI, "chosen": [{"role": "assistant", "content": None}],
         "rejected": [assistant("no")]}, "no content"),
    "a tool": (
        {"prompt": [*HI, {"role": "tool", "content": "42"}], **PAIR}, "comes from one"),
    "prompt null": ({"prompt": None, **PAIR}, "no prompt"),
    "no preference": ({**OUTPUTS, "preference": None}, "no preference"),
    "a tie": ({**OUTPUTS, "preference": 1.5}, "tied"),
    "the same": ({"prompt": "Hi.", "chosen": "yes", "rejected": "yes"}, "tied or the same"),
    "two prompts": ({"chosen": chat("Hi.", "yes"), "rejected": chat("Ho.", "no")}, "share"),
}


@pytest.mark.parametrize("record, reason", UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_comparison_is_skipped_and_counted(tmp_path, capsys, record, reason):
    path = write_jsonl(tmp_path / "r.jsonl", record, {"prompt": "Hi.", **PAIR})
    assert len(load_comparisons(path)) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path}: 1 of 2 records skipped: ")
    assert reason in line


MALFORMED = {  # record -> what the message says after the line
    "an unknown role": (
        {"chosen": [*HI, {"role": "function", "content": "x"}], "rejected": chat("Hi.", "no")},
        "chosen[1]: role 'function' is none of system, user, assistant, tool"),
    "a role in the prompt": (
        {"prompt": [{"role": "boss", "content": "x"}], **PAIR}, "prompt[0]: role 'boss'"),
    "a side that is a number": (
        {"prompt": "Hi.", "chosen": "yes", "rejected": 3}, "rejected: expected a list of messages"),
    "no prompt": (PAIR, 'no prompt: expected "prompt" beside the two responses'),
    "a response": (
        {"prompt": "Hi.", "responses": ["a", 2], "ranks": [1, 2]},
        "responses[1]: expected a string"),
    "a rank": (
        {"prompt": "Hi.", "responses": ["a", "b"], "ranks": [1, 0]}, "ranks[1]: 0 is no number"),
    "preference 3": ({**OUTPUTS, "preference": 3}, "preference: expected 1 or 2"),
    "preference 0": ({**OUTPUTS, "preference": 0}, "preference: expected 1 or 2"),
    "preference true": ({**OUTPUTS, "preference": True}, "preference: expected 1 or 2"),
    "preference a": ({**OUTPUTS, "preference": "output_1"}, "preference: expected 1 or 2"),
    "preference NaN": ({**OUTPUTS, "preference": float("nan")}, "preference: expected 1 or 2"),
    "no preference key": (OUTPUTS, "expected "),
    "labels": (
        {"prompt": "Hi.", "completion": "Go!", "label": False},
        '"label" calls a single response good or bad (KTO); join a good and a bad response to the '
        'same prompt into {"prompt", "chosen", "rejected"}'),
}


@pytest.mark.parametrize("record, message", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_comparison_is_told_what_and_why(tmp_path, record, message):
    path = write_jsonl(tmp_path / "r.jsonl", {"prompt": "Hi.", **PAIR}, record)
    with pytest.raises(UserError) as e:
        load_comparisons(path)
    assert str(e.value).startswith(f"{path}:2: {message}")
    assert len(str(e.value).splitlines()) == 1


def test_comparisons_from_a_table(tmp_path):
    path = tmp_path / "r.tsv"
    path.write_text("prompt\tchosen\trejected\nHi.\tyes\tno\nHi.\tyes\t\nHo.\ta\tb\n")
    found = load_comparisons(path)
    assert [(r["prompt"][0]["content"], r["responses"]) for r in found] == [
        ("Hi.", ["yes", "no"]), ("Ho.", ["a", "b"])]
