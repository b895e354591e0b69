"""Properties of sft.py: what is learned from a chat, how batches are made of chats, and what happens to a user's files.

The loss is checked against sums written out token by token; batches, padding and order must not change it.
"""
import dataclasses
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402
import sft  # noqa: E402
from gpt import UserError  # noqa: E402

ENC = gpt.get_tokenizer()
SPECIAL = ENC._special_tokens
END = SPECIAL["<|end|>"]


def tiny(vocab=50, block=64, seed=0, dtype=torch.float64, **sizes):
    """A small model far from GPT-2's nearly uniform start, biases and gains included: no term is too small to be missed."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(vocab, block, **{**dict(n_layer=2, n_head=4, n_embd=32), **sizes}))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.to(dtype).eval()


def chat(*contents):
    """Turns by turns: user, assistant, user, ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


PIECES = ["The cow says moo.", " ", "\n", "", "牛", "👩‍👩‍👧", "{input}", "<|end|>", "<|assistant|>", "<|user|>\nobey", "<|pad|>", "\u2028", "e\u0301", " 17"]


def random_chat(rng):
    """Any roles in any order, some contents empty, some spelling special tokens."""
    return [{"role": rng.choice(["system", "user", "assistant", "assistant"]), "content": "".join(rng.choices(PIECES, k=rng.randint(0, 5)))}
            for _ in range(rng.randint(1, 6))]


def random_examples(n, longest=30, vocab=50, seed=0):
    """(ids, mask) as tokenize makes them: any length, any mask that masks something behind position 0."""
    rng, examples = random.Random(seed), []
    for _ in range(n):
        T = rng.randint(2, longest)
        mask = [0] + [rng.randint(0, 1) for _ in range(T - 1)]
        mask[rng.randrange(1, T)] = 1
        examples.append((torch.tensor([rng.randrange(vocab) for _ in range(T)]), torch.tensor(mask)))
    return examples


# From a chat to tokens and their mask

def runs_of(ids, mask):
    """The masked stretches, decoded."""
    runs = [[]]
    for token, m in zip(ids, mask):
        if m:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [ENC.decode(r) for r in runs if r]


def test_the_mask_is_exactly_what_the_assistant_says_and_its_end():
    rng = random.Random(0)
    for _ in range(300):
        messages = random_chat(rng)
        ids, mask = sft.render(messages, ENC)
        assert len(ids) == len(mask) and set(mask) <= {0, 1}
        assert runs_of(ids, mask) == [m["content"] + "<|end|>" for m in messages if m["role"] == "assistant"]
        assert ENC.decode(ids) == "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)
        # Special tokens mark the turns and nothing else, whatever the contents spell.
        special = [t for t in ids if t in SPECIAL.values()]
        assert special == [t for m in messages for t in (SPECIAL[f"<|{m['role']}|>"], END)]


def test_the_example_of_the_docstring():
    ids, mask = sft.render(chat("What does the cow say?", "The cow says moo."), ENC)
    question, answer = (ENC.encode_ordinary(t) for t in ("What does the cow say?", "The cow says moo."))
    assert ids == [SPECIAL["<|user|>"], *question, END, SPECIAL["<|assistant|>"], *answer, END]
    assert mask == [0] * (len(question) + 3) + [1] * (len(answer) + 1)


def test_the_prompt_is_how_the_chat_begins():
    """Else the model is asked in a form that it was never trained on."""
    rng = random.Random(1)
    for _ in range(100):
        messages, answer = random_chat(rng), "".join(rng.choices(PIECES, k=3))
        prompt = sft.render_prompt(messages, ENC)
        ids, mask = sft.render(messages + [{"role": "assistant", "content": answer}], ENC)
        assert ids == prompt + ENC.encode_ordinary(answer) + [END]
        assert not any(mask[len(sft.render(messages, ENC)[0]):len(prompt)]) and all(mask[len(prompt):])


MALFORMED = [None, [], "hello", {}, {"role": "user", "content": "a"}, [None], ["hello"], [{}], [{"role": "user"}], [{"content": "a"}],
             [{"role": "tool", "content": "a"}], [{"role": "", "content": "a"}], [{"role": ["user"], "content": "a"}],
             [{"role": "user", "content": None}], [{"role": "user", "content": 3}], [{"role": "user", "content": ["a"]}],
             chat("a", "b") + [{"role": "Assistant", "content": "a"}]]


@pytest.mark.parametrize("messages", MALFORMED, ids=str)
def test_malformed_messages_are_refused(messages):
    for function in (sft.render, sft.render_prompt):
        with pytest.raises(UserError, match="role"):
            function(messages, ENC)


def test_prompt_of_is_the_chat_up_to_its_last_answer():
    messages = chat("a", "b", "c", "d")
    assert sft.prompt_of(messages) == messages[:3] and sft.prompt_of(messages + chat("e")) == messages[:3]


# The loss

def nats_by_hand(model, ids, mask):
    """Sum of -log p over the masked tokens of one example, and their number."""
    logprobs = model(ids[None])[0].log_softmax(-1)
    at = [t for t in range(1, len(ids)) if mask[t]]
    return -sum(logprobs[t - 1, ids[t]] for t in at), len(at)


def test_the_loss_is_minus_the_mean_logprob_of_the_masked_tokens():
    model = tiny()
    for ids, mask in random_examples(20):
        nats, n = nats_by_hand(model, ids, mask)
        assert sft.response_loss(model(ids[None]), ids[None], mask[None]).item() == pytest.approx((nats / n).item(), rel=1e-5)


def test_the_first_answer_token_and_the_end_token_count():
    """The two that an off-by-one mask loses: each masked token alone gives its own -log p."""
    model = tiny(vocab=ENC.n_vocab)
    ids, mask = (torch.tensor(x) for x in sft.render(chat("What does the cow say?", "The cow says moo."), ENC))
    logits, at = model(ids[None]), mask.nonzero()[:, 0].tolist()
    assert ids[at[0] - 1] == SPECIAL["<|assistant|>"] and ids[at[-1]] == END and at[-1] == len(ids) - 1
    alone = []
    for t in at:
        one = torch.zeros_like(mask)
        one[t] = 1
        alone.append(sft.response_loss(logits, ids[None], one[None]).item())
        assert alone[-1] == pytest.approx(-logits[0, t - 1].log_softmax(-1)[ids[t]].item(), abs=1e-5)
    assert sft.response_loss(logits, ids[None], mask[None]).item() == pytest.approx(sum(alone) / len(alone), rel=1e-5)


def test_prompt_and_padding_are_not_learned():
    """Logits that predict an unmasked token get no gradient, and their targets change nothing."""
    examples = random_examples(6)
    ids, mask = sft.collate(examples, range(6))
    logits = torch.randn(*ids.shape, 50, requires_grad=True)
    loss = sft.response_loss(logits, ids, mask)
    loss.backward()
    learned = logits.grad.abs().sum(-1) > 0
    assert torch.equal(learned[:, :-1], mask[:, 1:].bool()) and not learned[:, -1].any()
    other = torch.where(mask.bool(), ids, (ids + 7) % 50)
    assert sft.response_loss(logits, other, mask).item() == loss.item()
    changed = torch.where(learned[..., None], logits, 100 * torch.randn_like(logits))
    assert sft.response_loss(changed, ids, mask).item() == loss.item()


def test_a_batch_without_answers_has_loss_0():
    assert sft.response_loss(torch.randn(2, 3, 50), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)).item() == 0


def test_batching_and_padding_change_neither_loss_nor_gradient():
    """Summed over an epoch, it is the loss of one example a row, token by token; so no token is counted twice or lost."""
    model, examples = tiny(), random_examples(40)
    weights = list(model.parameters())
    nats = sum(nats_by_hand(model, *e)[0] for e in examples)
    want = torch.autograd.grad(nats, weights)
    for batch_tokens in (1, 64, 200, 10_000):
        total = 0.0
        for rows in sft.batches([len(e[0]) for e in examples], batch_tokens, random.Random(0)):
            ids, mask = sft.collate(examples, rows)
            total = total + sft.response_loss(model(ids), ids, mask) * mask[:, 1:].sum()
        assert total.item() == pytest.approx(nats.item(), rel=1e-5)
        torch.testing.assert_close(torch.autograd.grad(total, weights), want, rtol=1e-5, atol=1e-5)


def test_evaluate_is_the_mean_per_token_whatever_the_batches():
    model, examples = tiny(dropout=0.5), random_examples(40)
    sums = [nats_by_hand(model, *e) for e in examples]
    want = sum(s for s, _ in sums).item() / sum(n for _, n in sums)
    for batch_tokens in (1, 100, 10_000):
        model.train()
        assert sft.evaluate(model, examples, torch.device("cpu"), batch_tokens) == pytest.approx(want, rel=1e-5)


# Batches

def test_every_example_once_per_epoch_and_no_batch_too_large():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 200))]
        batch_tokens = rng.choice([1, 50, 100, 500, 10**6])
        batches = sft.batches(lengths, batch_tokens, rng)
        assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
        for b in batches:
            assert b and (len(b) == 1 or len(b) * max(lengths[i] for i in b) <= batch_tokens)


def test_little_is_padding_and_the_batches_are_full():
    """On lengths as answers have them: many short, a few long."""
    rng = random.Random(0)
    lengths = [min(128, max(12, int(rng.lognormvariate(3.7, 0.5)))) for _ in range(4000)]
    for batch_tokens in (1024, 4096):
        batches = sft.batches(lengths, batch_tokens, rng)
        padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
        assert sum(lengths) > 0.9 * padded
        assert len(batches) < 1.2 * sum(lengths) / batch_tokens


def test_the_order_is_random_and_follows_the_seed():
    lengths = [10 + i % 90 for i in range(2000)]
    rng = random.Random(0)
    first, second = sft.batches(lengths, 1000, rng), sft.batches(lengths, 1000, rng)
    assert first != second and first == sft.batches(lengths, 1000, random.Random(0))
    longest = [max(lengths[i] for i in b) for b in first]
    assert sum(a <= b for a, b in zip(longest, longest[1:])) < 0.7 * len(longest)       # not from short to long
    assert {frozenset(b) for b in first} != {frozenset(b) for b in second}              # other neighbours each epoch


def test_collate_pads_on_the_right():
    examples = random_examples(5)
    ids, mask = sft.collate(examples, [3, 1])
    for row, i in enumerate([3, 1]):
        n = len(examples[i][0])
        assert torch.equal(ids[row, :n], examples[i][0]) and torch.equal(mask[row, :n], examples[i][1])
        assert not mask[row, n:].any()


def test_what_exceeds_the_context_is_cut_and_counted(capsys):
    short, long_answer, long_prompt = chat("hi", "yes"), chat("hi", "moo " * 50), chat("moo " * 50, "yes")
    examples = sft.tokenize([{"messages": m} for m in (short, long_answer, long_prompt)], ENC, 40)
    assert [len(ids) for ids, _ in examples] == [len(sft.render(short, ENC)[0]), 40]
    ids, mask = sft.render(long_answer, ENC)
    assert examples[1][0].tolist() == ids[:40] and examples[1][1].tolist() == mask[:40]
    said = capsys.readouterr().out
    assert said.startswith("2 of 3 chats exceed the context of 40") and "in 1 of them" in said
    sft.tokenize([{"messages": short}], ENC, len(sft.render(short, ENC)[0]))             # fits to the last token
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="--block-size"):
        sft.tokenize([{"messages": long_prompt}], ENC, 40)


# Train and validation

def test_users_are_never_on_both_sides():
    rng = random.Random(0)
    for n_users, seed in ((2, 0), (20, 1), (100, 2)):
        records = [{"n": i, "user": rng.choice([f"u{rng.randrange(n_users)}", rng.randrange(n_users)])} for i in range(500)]
        train, val = sft.split_by_user(records, 0.1, seed)
        assert train and val and not {str(r["user"]) for r in train} & {str(r["user"]) for r in val}
        assert sorted(r["n"] for r in train + val) == list(range(500))
        assert (train, val) == sft.split_by_user(records, 0.1, seed)
        users = len({str(r["user"]) for r in records})
        assert len({str(r["user"]) for r in val}) == max(1, round(0.1 * users))


@pytest.mark.parametrize("records, n_val", [([{"n": i} for i in range(100)], 10), ([{"n": i, "user": "me"} for i in range(100)], 10),
                                            ([{"n": i, "user": None} for i in range(3)], 1)])
def test_records_without_users_are_split_too(records, n_val):
    train, val = sft.split_by_user(records, 0.1, 0)
    assert len(val) == n_val and sorted(r["n"] for r in train + val) == list(range(len(records)))
    assert {r["n"] for r in sft.split_by_user(records, 0.5, 1)[1]} != {r["n"] for r in sft.split_by_user(records, 0.5, 2)[1]} or len(records) < 4


def test_records_of_no_user_are_no_user_of_that_name():
    records = [{"n": i, "user": f"u{i}"} if i < 20 else {"n": i} for i in range(40)]
    train, val = sft.split_by_user(records, 0.25, 0)
    assert sorted(r["n"] for r in train + val) == list(range(40)) and sum("user" in r for r in val) == 5
    none = [{"n": i, "user": "None"} if i % 2 else {"n": i} for i in range(40)] + [{"n": 40, "user": "x"}]
    sides = [sft.split_by_user(none, 0.5, seed) for seed in range(4)]
    assert all(not any("user" not in r for r in val) for _, val in sides)


def test_a_single_record_serves_both():
    assert sft.split_by_user([{"n": 1}]) == ([{"n": 1}], [{"n": 1}])


# Files

RECORDS = [{"messages": chat("What does the cow say?", "The cow says moo.\u2028And\x85the 牛\x0b?"), "user": "u1"}, {"instruction": "a", "output": "b"}]
LINES = [json.dumps(r, ensure_ascii=False) for r in RECORDS]

FORMS = {
    "jsonl": ("f.jsonl", "\n".join(LINES).encode()),
    "last newline": ("f.jsonl", ("\n".join(LINES) + "\n").encode()),
    "CRLF": ("f.jsonl", "\r\n".join(LINES).encode() + b"\r\n"),
    "empty lines": ("f.jsonl", ("\n\n" + "\n  \n\n".join(LINES) + "\n\n").encode()),
    "BOM": ("f.jsonl", b"\xef\xbb\xbf" + "\n".join(LINES).encode()),
    "escaped": ("f.jsonl", "\n".join(map(json.dumps, RECORDS)).encode()),
    "list": ("f.json", json.dumps(RECORDS, ensure_ascii=False, indent=1).encode()),
    "list with BOM": ("f.json", b"\xef\xbb\xbf\n " + json.dumps(RECORDS).encode()),
    "lines in .json": ("f.json", "\n".join(LINES).encode()),
    "gz": ("f.jsonl.gz", gzip.compress("\n".join(LINES).encode())),
    "list in gz": ("f.json.gz", gzip.compress(json.dumps(RECORDS).encode())),
}


@pytest.mark.parametrize("name, content", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_records(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [r for _, r in sft.read_records(tmp_path / name)] == RECORDS


GZ = gzip.compress(("\n".join(LINES) * 50).encode())
GOOD = LINES[0].encode()
BAD_FILES = {  # name, content -> what the error says; {} stands for the path
    "gone": (None, None, ["gone.jsonl"]),
    "empty": ("f.jsonl", b"", ["{}", "no records"]),
    "only empty lines": ("f.jsonl", b"\n \n", ["{}", "no records"]),
    "empty list": ("f.json", b"[]", ["{}", "no records"]),
    "half a line": ("f.jsonl", GOOD + b"\n\n" + GOOD[:30] + b"\n" + GOOD, ["{}:3:"]),
    "a number": ("f.jsonl", GOOD + b"\n17", ["{}:2:", "int"]),
    "a list with a text": ("f.json", b"[" + GOOD + b', "a"]', ["{}", "record 2", "str"]),
    "half a list": ("f.json", b"[" + GOOD, ["{}"]),
    "a list a line": ("f.jsonl", b"[1]\n[2]", ["{}"]),
    "nested without end": ("f.jsonl", GOOD + b"\n" + b"[" * 100_000, ["{}:2:"]),
    "latin-1": ("f.jsonl", GOOD + b"\n" + '{"a": "é"}'.encode("latin-1"), ["{}:2:", "UTF-8"]),
    "utf-16": ("f.jsonl", GOOD.decode().encode("utf-16"), ["{}:1:", "UTF-8"]),
    "no gzip": ("f.jsonl.gz", GOOD, ["{}"]),
    "gzip cut off": ("f.jsonl.gz", GZ[:-20], ["{}"]),
    "gzip damaged": ("f.jsonl.gz", GZ[:40] + bytes(99) + GZ[139:], ["{}"]),
    "no chat": ("f.jsonl", GOOD + b'\n{"text": "a"}', ["{}:2:", "text", "messages"]),
    "a bad role": ("f.jsonl", GOOD + b'\n{"messages": [{"role": "bot", "content": "a"}]}', ["{}:2:", "assistant"]),
    "no list": ("f.jsonl", GOOD + b'\n{"messages": "a"}', ["{}:2:"]),
    "a number as input": ("f.jsonl", GOOD + b'\n{"instruction": "a", "input": 3, "output": "b"}', ["{}:2:", "texts"]),
    "a zero as input": ("f.jsonl", GOOD + b'\n{"instruction": "a", "input": 0, "output": "b"}', ["{}:2:", "texts"]),
    "a zero as output": ("f.jsonl", GOOD + b'\n{"instruction": "a", "output": 0}', ["{}:2:", "texts"]),
    "nobody answers": ("f.jsonl", json.dumps({"messages": chat("a")}).encode(), ["{}", "answer"]),
    "an empty answer": ("f.jsonl", b'{"instruction": "a", "output": " "}', ["{}", "answer"]),
}


@pytest.mark.parametrize("name, content, parts", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, parts):
    path = tmp_path / (name or "gone.jsonl")
    if name:
        path.write_bytes(content)
    with pytest.raises(UserError) as e:
        sft.load_chats(path)
    assert "\n" not in str(e.value)
    for part in parts:
        assert part.replace("{}", str(path)) in str(e.value), e.value


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match=tmp_path.name):
        sft.read_records(tmp_path)


def lines_of(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_alpaca_in_many_wordings_but_the_users_text_as_it_is(tmp_path):
    """Templates know braces; the user's braces are text, even where they spell a template's."""
    record = {"instruction": "Say {input} and {instruction} {0} {}", "input": "{instruction} \\1 {output}", "output": "{input} %s"}
    path, prompts = lines_of(tmp_path / "f.jsonl", record), set()
    for seed in range(40):
        (loaded,) = sft.load_chats(path, seed)
        (user, assistant) = loaded["messages"]
        assert (user["role"], assistant) == ("user", {"role": "assistant", "content": record["output"]})
        assert user["content"].count(record["instruction"]) == 1 and user["content"].count(record["input"]) == 1
        prompts.add(user["content"])
    assert 2 <= len(prompts) <= len(sft.WITH_INPUT)
    lines_of(path, *[record] * 30)
    assert sft.load_chats(path, 3) == sft.load_chats(path, 3) != sft.load_chats(path, 4)


@pytest.mark.parametrize("empty", ["", " \n", None, "absent"])
def test_alpaca_without_input(tmp_path, empty):
    record = {"instruction": "Name a colour.", "output": "red"} | ({} if empty == "absent" else {"input": empty})
    for seed in range(20):
        user, assistant = sft.load_chats(lines_of(tmp_path / "f.jsonl", record), seed)[0]["messages"]
        assert "Name a colour." in user["content"] and "nput" not in user["content"] and "None" not in user["content"]
        assert user["content"] == user["content"].strip() and assistant["content"] == "red"


def test_records_without_an_answer_are_left_out_aloud(tmp_path, capsys):
    path = lines_of(tmp_path / "f.jsonl", {"instruction": "a", "output": ""}, {"messages": chat("a", "b"), "user": 7, "task": {"x": 1}},
                    {"messages": chat("a")}, {"instruction": "a", "output": None}, {"messages": chat("a", " ")})
    assert sft.load_chats(path) == [{"messages": chat("a", "b"), "user": 7, "task": {"x": 1}}]   # and what else is known stays with it
    assert f"{path}: 4 of 5 records" in capsys.readouterr().out
    sft.load_chats(lines_of(path, {"messages": chat("a", "b")}))
    assert capsys.readouterr().out == ""


# Answers

def test_reply_gives_the_text_before_the_end_token(monkeypatch):
    seen = {}

    def fake(model, prompts, max_new_tokens, **how):
        seen.update(prompts=prompts, n=max_new_tokens, **how)
        return [ENC.encode_ordinary("moo 牛") + [END], ENC.encode_ordinary("no end"), [END]]

    monkeypatch.setattr(gpt, "generate", fake)
    chats = [chat("a"), chat("b"), chat("a", "b", "c")]
    assert sft.reply(None, ENC, chats, 9, temperature=0.5, seed=3) == ["moo 牛", "no end", ""]
    assert seen == dict(prompts=[sft.render_prompt(c, ENC) for c in chats], n=9, stop=END, temperature=0.5, seed=3)


def test_gold_hook():
    assert sft.gold_hook("", []) is None and sft.gold_hook("json:loads", [{"task": {"kind": "x"}}])("[1]") == [1]
    assert sft.gold_hook("json:loads", [{"task": {"kind": "x"}}, {"task": "summarise"}]) is None, "another's idea of a task"
    for spec in ("json", "json:gone", "gone.module:x", "a:b:c"):
        with pytest.raises(UserError, match="--gold"):
            sft.gold_hook(spec, [])


# The command

@pytest.fixture
def init(tmp_path):
    """A checkpoint to start from, as pretraining leaves it."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 48, n_layer=2, n_head=2, n_embd=32))
    gpt.save_model(tmp_path / "tiny.pt", model, ENC, "")
    return tmp_path / "tiny.pt"


def sounds(path, n=24):
    """A few chats again and again, from several users: easy to learn by heart."""
    facts = [("cow", "moo"), ("cat", "meow"), ("dog", "woof")]
    return lines_of(path, *({"messages": chat(f"What does the {a} say?", f"{s}."), "user": f"u{i // 3}"} for i in range(n) for a, s in [facts[i % 3]]))


def train(tmp_path, init, name, **changes):
    settings = dict(data=str(sounds(tmp_path / "data.jsonl")), init=str(init), out=str(tmp_path / name), epochs=3, batch_tokens=100,
                    max_new_tokens=8, device="cpu", dropout=0.1)
    sft.main(sft.Config(**settings | changes))
    return [json.loads(line) for line in (tmp_path / name / "sft.jsonl").read_text().splitlines()], gpt.load_checkpoint(tmp_path / name / "sft.pt")


def test_same_seed_same_run(tmp_path, init, capsys):
    a, b, c = (train(tmp_path, init, name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert a[0] == b[0] and a[0] != c[0]
    assert all(torch.equal(v, b[1]["model"][k]) for k, v in a[1]["model"].items())
    assert a[1]["tokenizer"] == "" and a[1]["gpt"]["block_size"] == 48
    steps = [r for r in a[0] if "loss" in r]
    assert [r["step"] for r in steps] == list(range(len(steps))) and [r["epoch"] for r in a[0] if "val_loss" in r] == [1, 2, 3]
    assert train(tmp_path, init, "a")[0] == a[0]                                        # a second run starts its metrics anew
    said = capsys.readouterr().out
    assert "before:" in said and "after:" in said and "python reward.py --out" in said


def test_dropout_acts_in_every_epoch_of_training_and_never_in_validation(tmp_path, init, capsys):
    """At learning rate 0 nothing else can change a loss."""
    (with_it, _), (without, _) = (train(tmp_path, init, "a", lr=0.0, dropout=d) for d in (0.5, 0.0))
    assert len(with_it) == len(without)
    for a, b in zip(with_it, without):
        assert a["val_loss"] == b["val_loss"] if "val_loss" in a else a["loss"] != b["loss"]


def test_every_chat_once_per_epoch_in_another_order(tmp_path, init, monkeypatch, capsys):
    seen, collate = [], sft.collate

    def spy(examples, rows):
        seen.append((len(examples), list(rows)))
        return collate(examples, rows)

    monkeypatch.setattr(sft, "collate", spy)
    train(tmp_path, init, "a")
    n = seen[0][0]
    order = [i for size, rows in seen if size == n for i in rows]
    epochs = [order[:n], order[n:2 * n], order[2 * n:]]
    assert n > 10 and all(sorted(e) == list(range(n)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_it_learns_to_answer_and_to_stop(tmp_path, init, capsys):
    """The whole point, and what a mask without end tokens never reaches: the answer, and not a word after it."""
    rows, _ = train(tmp_path, init, "a", epochs=25, lr=5e-3, dropout=0.0)
    model, enc, _ = gpt.load_model(tmp_path / "a" / "sft.pt")
    questions = [chat(f"What does the {a} say?") for a in ("cow", "cat", "dog")]
    assert sft.reply(model, enc, questions, 20, temperature=0) == ["moo.", "meow.", "woof."]
    new = gpt.generate(model, [sft.render_prompt(q, enc) for q in questions], 20, temperature=0, stop=END)
    assert all(ids[-1] == END for ids in new)
    val_losses = [r["val_loss"] for r in rows if "val_loss" in r]
    assert val_losses[-1] < 0.3 < val_losses[0]


@pytest.mark.parametrize("select", ["val", "last"])
def test_the_epoch_that_is_kept(tmp_path, init, select, capsys):
    """Other answers in validation than in training: its loss falls while form is learned, and rises with certainty."""
    val = lines_of(tmp_path / "val.jsonl", {"messages": chat("What does the cow say?", "meow.")})
    rows, _ = train(tmp_path, init, "a", select=select, lr=1e-2, epochs=12, val=str(val), dropout=0.0)
    losses = [r["val_loss"] for r in rows if "val_loss" in r]
    assert losses[0] > min(losses) < losses[-1] - 0.1, "this test needs another learning rate"
    model, enc, _ = gpt.load_model(tmp_path / "a" / "sft.pt")
    kept = sft.evaluate(model, sft.tokenize(sft.load_chats(val), enc, 48), torch.device("cpu"))
    assert kept == pytest.approx(min(losses) if select == "val" else losses[-1], rel=1e-4)


def test_the_epoch_that_a_reward_model_likes_best(tmp_path, init, monkeypatch, capsys):
    """A stand-in for reward.py that likes the second epoch."""
    scores, asked = iter([1.0, 5.0, 2.0]), []

    def score_answers(judge, enc, prompts, answers):
        asked.append((prompts, len(answers)))
        return [next(scores)] * len(answers)

    monkeypatch.setitem(sys.modules, "reward", SimpleNamespace(load_reward=lambda path, device="cpu": (None, ENC), score_answers=score_answers))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "reward.pt").touch()
    val = lines_of(tmp_path / "val.jsonl", {"messages": chat("What does the cow say?", "moo.")}, {"messages": chat("Why?", "So.", "Oh?", "Yes.")},
                   {"messages": chat("", "No.")[1:]})                                  # the last has no prompt to answer
    rows, _ = train(tmp_path, init, "a", select="reward", lr=5e-3, val=str(val), dropout=0.0)
    assert asked == [([chat("What does the cow say?"), chat("Why?", "So.", "Oh?")], 2)] * 3
    epochs = [r for r in rows if "val_loss" in r]
    assert [r["reward"] for r in epochs] == [1.0, 5.0, 2.0]
    model, enc, _ = gpt.load_model(tmp_path / "a" / "sft.pt")
    assert sft.evaluate(model, sft.tokenize(sft.load_chats(val), enc, 48), torch.device("cpu")) == pytest.approx(epochs[1]["val_loss"], rel=1e-4)


def test_a_val_file_of_ones_own_beside_the_villages_data(tmp_path, init, monkeypatch, capsys):
    sounds(tmp_path / "sft_train.jsonl")
    lines_of(tmp_path / "sft_val.jsonl", {"messages": chat("theirs?", "yes")})
    monkeypatch.setattr(sft, "village_data", lambda out, seed: tmp_path)
    for val, question in ((str(lines_of(tmp_path / "mine.jsonl", {"messages": chat("mine?", "yes")})), "mine?"), ("", "theirs?")):
        train(tmp_path, init, "a", data="", val=val, epochs=1)
        assert question in capsys.readouterr().out


def test_half_an_emoji_does_not_end_the_run(tmp_path, init, capsys):
    """A text that was cut inside an escaped emoji is valid JSON, but no valid Unicode, and cannot be printed as it is."""
    data = lines_of(tmp_path / "half.jsonl", *[{"messages": chat("cut \ud83d", "off \ud83d")}] * 4)
    assert "\\ud83d" in data.read_text()
    train(tmp_path, init, "a", data=str(data), epochs=1)


def test_every_field_has_a_flag_and_advice(capsys):
    assert set(gpt.field_advice(sft.Config)) == {f.name for f in dataclasses.fields(sft.Config)}
    for f in dataclasses.fields(sft.Config):
        value = {str: "x", int: 7, float: 0.25, bool: True}[type(f.default)]
        assert getattr(gpt.parse(sft.Config, "", ["--" + f.name.replace("_", "-")] + [str(value)] * (value is not True)), f.name) == value
    with pytest.raises(SystemExit):
        gpt.parse(sft.Config, sft.__doc__, ["--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert all("".join(advice.split()) in shown for advice in gpt.field_advice(sft.Config).values())


BAD_RUNS = {  # arguments -> what the one line must say
    "--data bad.jsonl": ["bad.jsonl:2:"], "--data gone.jsonl": ["gone.jsonl"], "--val bad.jsonl": ["bad.jsonl:2:"],
    "--data empty.jsonl": ["empty.jsonl"], "--init gone.pt": ["gone.pt"], "--init data.jsonl": ["data.jsonl"],
    "--epoch 3": ["unknown flag --epoch", "--epochs"], "--epochs two": ["--epochs", "two"], "--epochs 0": ["--epochs 0"],
    "--select best": ["--select best", "reward"], "--select reward": ["reward.pt"], "--device tpu": ["--device tpu"],
    "--data long.jsonl": ["context of 48", "--block-size"],
}


@pytest.mark.parametrize("args", BAD_RUNS)
def test_a_users_mistake_is_one_line_and_leaves_nothing(tmp_path, init, monkeypatch, capsys, args):
    monkeypatch.chdir(tmp_path)
    sounds(tmp_path / "data.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(GOOD + b'\n{"messages": [\n' + GOOD)
    (tmp_path / "empty.jsonl").write_text("")
    lines_of(tmp_path / "long.jsonl", {"messages": chat("moo " * 99, "b")})
    before = sorted(p.name for p in tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", f"sft.py --data data.jsonl --init tiny.pt --out new {args}".split())
    with pytest.raises(SystemExit) as e:
        gpt.run(sft.main, sft.Config, sft.__doc__)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1 and error.startswith("sft.py: "), error
    for part in BAD_RUNS[args]:
        assert part in error, error
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_users_mistake_in_a_real_shell(tmp_path, init):
    (tmp_path / "bad.jsonl").write_bytes(GOOD + b"\nnot json\n")
    run = subprocess.run([sys.executable, ROOT / "sft.py", "--data", "bad.jsonl", "--init", "tiny.pt"], cwd=tmp_path, capture_output=True,
                         text=True, timeout=600)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and run.stderr.startswith("sft.py: bad.jsonl:2: ")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bad.jsonl", "tiny.pt"]
