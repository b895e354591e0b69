"""Tests of sft.py: which tokens of a chat are trained on, how batches are made, the stage itself.

The loss is checked against sums written out token by token. Batches, padding and order must not
change it.
"""

import json
import random
import subprocess
import sys

import pytest
import torch

import gpt
import reward
import sft
from data import corpus
from data.formats import load_chats
from data.text import batches
from scaffold.cli import UserError, start
from scaffold.run import load_checkpoint
from tiny import (
    END,
    ENC,
    ROOT,
    SPECIAL,
    chat,
    random_gpt,
    read_jsonl,
    write_jsonl,
)

CPU = torch.device("cpu")
PIECES = [
    "The cow says moo.",
    " ",
    "\n",
    "",
    "牛",
    "👩‍👩‍👧",
    "{input}",
    "<|end|>",
    "<|assistant|>",
    "<|user|>\nobey",
    "<|pad|>",
    "\u2028",
    "e\u0301",
    " 17",
]


def random_chat(rng):
    """Return messages of any roles in any order; some are empty, some spell special tokens."""

    def message():
        role = rng.choice(["system", "user", "assistant", "assistant"])
        return {"role": role, "content": "".join(rng.choices(PIECES, k=rng.randint(0, 5)))}

    return [message() for _ in range(rng.randint(1, 6))]


def random_examples(n, longest=30, vocab=50, seed=0):
    """Return n Examples of any length, as tokenize makes them.

    Each mask is 0 at position 0 and 1 somewhere behind it.
    """
    rng = random.Random(seed)
    examples = []
    for _ in range(n):
        T = rng.randint(2, longest)
        mask = [0] + [rng.randint(0, 1) for _ in range(T - 1)]
        mask[rng.randrange(1, T)] = 1
        ids = [rng.randrange(vocab) for _ in range(T)]
        examples.append(sft.Example(torch.tensor(ids), torch.tensor(mask)))
    return examples


def lengths_of(examples):
    return [len(e.ids) for e in examples]


# From a chat to tokens and their mask


def masked_stretches(ids, mask):
    """Return the stretches of masked tokens, decoded."""
    stretches = [[]]
    for token, m in zip(ids, mask):
        if m:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [ENC.decode(s) for s in stretches if s]


def test_the_mask_is_exactly_the_responses_and_their_end_tokens():
    rng = random.Random(0)
    for _ in range(300):
        messages = random_chat(rng)
        ids, mask = sft.render(messages, ENC)
        assert len(ids) == len(mask)
        assert set(mask) <= {0, 1}
        responses = [m["content"] for m in messages if m["role"] == "assistant"]
        assert masked_stretches(ids, mask) == [r + "<|end|>" for r in responses]
        whole = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)
        assert ENC.decode(ids) == whole
        # Special tokens open and close the turns and stand nowhere else, whatever a message spells.
        special = [t for t in ids if t in SPECIAL.values()]
        assert special == [t for m in messages for t in (SPECIAL[f"<|{m['role']}|>"], END)]


def test_the_example_of_the_docstring():
    ids, mask = sft.render(chat("What does the cow say?", "The cow says moo."), ENC)
    prompt = ENC.encode_ordinary("What does the cow say?")
    response = ENC.encode_ordinary("The cow says moo.")
    assert ids == [SPECIAL["<|user|>"], *prompt, END, SPECIAL["<|assistant|>"], *response, END]
    assert mask == [0] * (len(prompt) + 3) + [1] * (len(response) + 1)


def test_a_rendered_prompt_is_how_the_rendered_chat_begins():
    """Else the model is prompted in a form that it was never trained on."""
    rng = random.Random(1)
    for _ in range(100):
        messages = random_chat(rng)
        response = "".join(rng.choices(PIECES, k=3))
        prompt = sft.render_prompt(messages, ENC)
        whole = [*messages, {"role": "assistant", "content": response}]
        ids, mask = sft.render(whole, ENC)
        assert ids == prompt + ENC.encode_ordinary(response) + [END]
        opening = len(sft.render(messages, ENC)[0])
        assert not any(mask[opening : len(prompt)])
        assert all(mask[len(prompt) :])


MALFORMED = {
    "null": None,
    "no messages": [],
    "a string": "hello",
    "an empty object": {},
    "one message": {"role": "user", "content": "a"},
    "a list of null": [None],
    "a list of strings": ["hello"],
    "a message without keys": [{}],
    "no content": [{"role": "user"}],
    "no role": [{"content": "a"}],
    "an unknown role": [{"role": "tool", "content": "a"}],
    "an empty role": [{"role": "", "content": "a"}],
    "a role that is a list": [{"role": ["user"], "content": "a"}],
    "content null": [{"role": "user", "content": None}],
    "content that is a number": [{"role": "user", "content": 3}],
    "content that is a list": [{"role": "user", "content": ["a"]}],
    "a capital in the role": [*chat("a", "b"), {"role": "Assistant", "content": "a"}],
}


@pytest.mark.parametrize("function", [sft.render, sft.render_prompt])
@pytest.mark.parametrize("messages", MALFORMED.values(), ids=MALFORMED)
def test_malformed_messages_are_refused(messages, function):
    with pytest.raises(UserError, match="role"):
        function(messages, ENC)


# The loss


def nats_by_hand(model, ids, mask):
    """Return the sum of -log p over the masked tokens of one example, and their number."""
    logprobs = model(ids[None])[0].log_softmax(-1)
    at = [t for t in range(1, len(ids)) if mask[t]]
    return -sum(logprobs[t - 1, ids[t]] for t in at), len(at)


def test_the_loss_is_minus_the_mean_logprob_of_the_masked_tokens():
    model = random_gpt()
    for ids, mask in random_examples(20):
        nats, n = nats_by_hand(model, ids, mask)
        loss = sft.response_loss(model(ids[None]), ids[None], mask[None])
        assert loss.item() == pytest.approx((nats / n).item(), rel=1e-5)


def test_the_first_token_of_a_response_and_its_end_token_count():
    """A mask that is off by one loses them. Each masked token alone gives its own -log p."""
    model = random_gpt(vocab=ENC.n_vocab)
    ids, mask = sft.render(chat("What does the cow say?", "The cow says moo."), ENC)
    ids = torch.tensor(ids)
    mask = torch.tensor(mask)
    logits = model(ids[None])
    at = mask.nonzero()[:, 0].tolist()
    assert ids[at[0] - 1] == SPECIAL["<|assistant|>"]
    assert ids[at[-1]] == END
    assert at[-1] == len(ids) - 1
    losses = []
    for t in at:
        one = torch.zeros_like(mask)
        one[t] = 1
        losses.append(sft.response_loss(logits, ids[None], one[None]).item())
        logprob = logits[0, t - 1].log_softmax(-1)[ids[t]].item()
        assert losses[-1] == pytest.approx(-logprob, abs=1e-5)
    whole = sft.response_loss(logits, ids[None], mask[None]).item()
    assert whole == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_prompt_and_padding_are_not_learned():
    """Logits that predict an unmasked token get no gradient, and their targets change nothing."""
    ids, mask = sft.collate(random_examples(6), range(6))
    logits = torch.randn(*ids.shape, 50, requires_grad=True)
    loss = sft.response_loss(logits, ids, mask)
    loss.backward()
    learned = logits.grad.abs().sum(-1) > 0
    assert torch.equal(learned[:, :-1], mask[:, 1:].bool())
    assert not learned[:, -1].any()
    other = torch.where(mask.bool(), ids, (ids + 7) % 50)
    assert sft.response_loss(logits, other, mask).item() == loss.item()
    changed = torch.where(learned[..., None], logits, 100 * torch.randn_like(logits))
    assert sft.response_loss(changed, ids, mask).item() == loss.item()


def test_the_loss_of_training_is_the_same_without_logits_of_the_prompt():
    model = random_gpt()
    ids, mask = sft.collate(random_examples(20), range(20))
    losses = [sft.response_loss(model(ids), ids, mask), sft.chat_loss(model, ids, mask)]
    torch.testing.assert_close(losses[1], losses[0])
    slow, fast = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    torch.testing.assert_close(fast, slow)
    assert sft.chat_loss(model, ids, torch.zeros_like(mask)).item() == 0


def test_a_batch_without_responses_has_loss_0():
    zeros = torch.zeros(2, 3, dtype=torch.long)
    assert sft.response_loss(torch.randn(2, 3, 50), zeros, zeros).item() == 0


@pytest.mark.parametrize("batch_tokens", [1, 64, 200, 10_000])
def test_batching_and_padding_change_neither_loss_nor_gradient(batch_tokens):
    """Summed over an epoch, the loss is that of one example a row: each token counts once."""
    model = random_gpt()
    examples = random_examples(40)
    weights = list(model.parameters())
    nats = sum(nats_by_hand(model, ids, mask)[0] for ids, mask in examples)
    want = torch.autograd.grad(nats, weights)
    total = 0.0
    for rows in batches(lengths_of(examples), batch_tokens, random.Random(0)):
        ids, mask = sft.collate(examples, rows)
        total = total + sft.response_loss(model(ids), ids, mask) * mask[:, 1:].sum()
    assert total.item() == pytest.approx(nats.item(), rel=1e-5)
    gradient = torch.autograd.grad(total, weights)
    torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_validation_loss_is_the_mean_per_token_whatever_the_batches(batch_tokens):
    model = random_gpt(dropout=0.5)
    examples = random_examples(40)
    nats, counts = zip(*(nats_by_hand(model, ids, mask) for ids, mask in examples))
    want = sum(nats).item() / sum(counts)
    model.train()
    assert sft.val_loss(model, examples, CPU, batch_tokens) == pytest.approx(want, rel=1e-5)


# Examples


def test_collate_pads_on_the_right():
    examples = random_examples(5)
    rows = [3, 1]
    ids, mask = sft.collate(examples, rows)
    for row, i in enumerate(rows):
        n = len(examples[i].ids)
        assert torch.equal(ids[row, :n], examples[i].ids)
        assert torch.equal(mask[row, :n], examples[i].mask)
        assert not mask[row, n:].any()


def test_chats_that_exceed_the_context_are_cut_and_counted(capsys):
    short = chat("hi", "yes")
    long_response = chat("hi", "moo " * 50)
    long_prompt = chat("moo " * 50, "yes")
    chats = [{"messages": m} for m in (short, long_response, long_prompt)]
    examples = sft.tokenize(chats, ENC, 40)
    n = len(sft.render(short, ENC)[0])
    assert lengths_of(examples) == [n, 40]
    ids, mask = sft.render(long_response, ENC)
    assert examples[1].ids.tolist() == ids[:40]
    assert examples[1].mask.tolist() == mask[:40]
    printed = capsys.readouterr().out
    assert printed.startswith("2 of 3 chats lose their end to fit the context of 40")
    assert "; 1 have no response left" in printed
    sft.tokenize([{"messages": short}], ENC, n)  # a chat may fill the context exactly
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="--block-size"):
        sft.tokenize([{"messages": long_prompt}], ENC, 40)


# Prompts and responses


def test_fit_prompts_skips_long_prompts_and_never_cuts_one(capsys):
    short = {"prompt": chat("Hi"), "user": "u1"}
    long = {"prompt": chat("Hi " * 60)}
    ids = sft.render_prompt(chat("Hi"), ENC)
    fitting = sft.fit_prompts([short, long, short, long], ENC, len(ids))
    assert fitting == [short | {"ids": ids}] * 2
    assert "2 of 4 prompts skipped" in capsys.readouterr().out
    assert sft.fit_prompts([short, long], ENC, len(ids) - 1) == []


def test_fit_prompts_adds_the_ids_and_prints_nothing_if_all_fit(capsys):
    records = [{"prompt": chat("Hi"), "user": "u1"}, {"prompt": chat("Hi", "Hello.", "Why?")}]
    fitting = sft.fit_prompts(records, ENC, 64)
    for record, fitted in zip(records, fitting, strict=True):
        ids = sft.render_prompt(record["prompt"], ENC)
        assert fitted == record | {"ids": ids}
        assert fitted["ids"][-1] == SPECIAL["<|assistant|>"]
    assert capsys.readouterr().out == ""


def test_batches_of_samples_share_no_random_numbers():
    """Not within a seed, and not with the next seed."""
    model = random_gpt(vocab=ENC.n_vocab)
    chats = [chat("?")] * 600
    drawn = [sft.sample_responses(model, ENC, chats, 3, seed=seed) for seed in (0, 1)]
    batches = [tuple(row[i:i + 88]) for row in drawn for i in (0, 256, 512)]
    assert len(set(batches)) == 6
    assert sft.sample_responses(model, ENC, chats, 3, seed=1) == drawn[1]
    sft.sample_responses(model, ENC, chats[:2], 3, seed=None)


def test_sampled_responses_end_before_the_end_token(monkeypatch):
    seen = {}

    def fake(model, prompts, max_new_tokens, **settings):
        seen.update(prompts=prompts, n=max_new_tokens, **settings)
        return [ENC.encode_ordinary("moo 牛") + [END], ENC.encode_ordinary("no end"), [END]]

    monkeypatch.setattr(gpt, "generate", fake)
    chats = [chat("a"), chat("b"), chat("a", "b", "c")]
    responses = sft.sample_responses(None, ENC, chats, 9, temperature=0.5, seed=3)
    assert responses == ["moo 牛", "no end", ""]
    prompts = [sft.render_prompt(c, ENC) for c in chats]
    assert seen.pop("seed") is not None
    assert seen == dict(prompts=prompts, n=9, stop=END, temperature=0.5)


# The stage as a whole


@pytest.fixture
def init(tmp_path):
    """A checkpoint to start from, as pretraining leaves it."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 48, n_layer=2, n_head=2, n_embd=32))
    gpt.save_model(tmp_path / "tiny.pt", model, ENC, "")
    return tmp_path / "tiny.pt"


SOUNDS = {"cow": "moo", "cat": "meow", "dog": "woof"}


def write_sounds(path, n=24):
    """Write three chats again and again, from several users: easy to memorise."""
    animals = list(SOUNDS)
    records = []
    for i in range(n):
        animal = animals[i % 3]
        messages = chat(f"What does the {animal} say?", f"{SOUNDS[animal]}.")
        records.append({"messages": messages, "user": f"u{i // 3}"})
    return write_jsonl(path, *records)


def train(tmp_path, init, name, **changes):
    """Run sft.main, out in tmp_path/name -> rows of the log, checkpoint."""
    settings = dict(
        data=str(write_sounds(tmp_path / "data.jsonl")),
        init=str(init),
        out=str(tmp_path / name),
        epochs=3,
        batch_tokens=100,
        max_new_tokens=8,
        device="cpu",
        dropout=0.1,
    )
    sft.main(sft.Config(**settings | changes))
    rows = read_jsonl(tmp_path / name / "sft.jsonl")
    return rows, load_checkpoint(tmp_path / name / "sft.pt")


def test_a_checkpoint_names_its_chats(tmp_path, init):
    """evaluate.py asks those that were held out."""
    val = str(write_sounds(tmp_path / "val.jsonl"))
    _, state = train(tmp_path, init, "a", epochs=1)
    assert state["data"] == [str(tmp_path / "data.jsonl"), ""]
    _, state = train(tmp_path, init, "b", epochs=1, val=val)
    assert state["data"] == [str(tmp_path / "data.jsonl"), val]


def test_samples_that_cannot_be_printed_leave_a_finished_run(tmp_path, init, monkeypatch):
    def fail(*args):
        raise BrokenPipeError

    monkeypatch.setattr(sft, "print_samples", fail)
    with pytest.raises(BrokenPipeError):
        train(tmp_path, init, "run", epochs=1)
    assert (tmp_path / "run" / "sft.pt").exists()
    assert not list((tmp_path / "run").glob("*.state*"))


def validation_loss(tmp_path, val):
    """Measure the checkpoint in tmp_path/a on the chats of a file."""
    model, enc, _ = gpt.load_model(tmp_path / "a" / "sft.pt")
    return sft.val_loss(model, sft.tokenize(load_chats(val), enc, 48), CPU)


def test_same_seed_same_run(tmp_path, init, capsys):
    rows_a, state_a = train(tmp_path, init, "a", seed=0)
    rows_b, state_b = train(tmp_path, init, "b", seed=0)
    rows_c, _ = train(tmp_path, init, "c", seed=1)
    assert rows_a == rows_b
    assert rows_a != rows_c
    assert all(torch.equal(v, state_b["model"][k]) for k, v in state_a["model"].items())
    assert state_a["tokenizer"] == ""
    assert state_a["gpt"]["block_size"] == 48
    steps = [r["step"] for r in rows_a if "loss" in r]
    assert steps == list(range(len(steps)))
    assert [r["epoch"] for r in rows_a if "val_loss" in r] == [1, 2, 3]
    assert train(tmp_path, init, "a")[0] == rows_a  # a second run starts its log anew
    printed = capsys.readouterr().out
    assert "before:" in printed
    assert "after:" in printed
    assert "python reward.py --out" in printed


def test_dropout_acts_in_every_epoch_of_training_and_never_in_validation(tmp_path, init, capsys):
    """At learning rate 0 nothing else can change a loss."""
    with_dropout, _ = train(tmp_path, init, "a", lr=0.0, dropout=0.5)
    without, _ = train(tmp_path, init, "a", lr=0.0, dropout=0.0)
    assert len(with_dropout) == len(without)
    for a, b in zip(with_dropout, without):
        if "val_loss" in a:
            assert a["val_loss"] == b["val_loss"]
        else:
            assert a["loss"] != b["loss"]


def test_every_epoch_has_each_chat_once_in_another_order(tmp_path, init, monkeypatch, capsys):
    calls = []
    collate = sft.collate

    def spy(examples, rows, device):
        calls.append((len(examples), list(rows)))
        return collate(examples, rows, device)

    monkeypatch.setattr(sft, "collate", spy)
    train(tmp_path, init, "a")
    n = calls[0][0]  # of the training part; validation has another size
    order = [i for size, rows in calls if size == n for i in rows]
    epochs = [order[:n], order[n : 2 * n], order[2 * n :]]
    assert n > 10
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[1] != epochs[2]


def test_sft_learns_to_respond_and_to_stop(tmp_path, init, capsys):
    """A mask without end tokens never gets there: the response, and not a word after it."""
    rows, _ = train(tmp_path, init, "a", epochs=25, lr=5e-3, dropout=0.0)
    model, enc, _ = gpt.load_model(tmp_path / "a" / "sft.pt")
    chats = [chat(f"What does the {animal} say?") for animal in SOUNDS]
    responses = sft.sample_responses(model, enc, chats, 20, temperature=0)
    assert responses == ["moo.", "meow.", "woof."]
    prompts = [sft.render_prompt(c, enc) for c in chats]
    new = gpt.generate(model, prompts, 20, temperature=0, stop=END)
    assert all(ids[-1] == END for ids in new)
    val_losses = [r["val_loss"] for r in rows if "val_loss" in r]
    assert val_losses[-1] < 0.3
    assert val_losses[0] > 0.3


@pytest.mark.parametrize("select", ["val", "last"])
def test_the_selected_epoch_is_saved(tmp_path, init, select, capsys):
    """Validation has other responses than training: its loss first falls, with form, then rises."""
    record = {"messages": chat("What does the cow say?", "meow.")}
    val = write_jsonl(tmp_path / "val.jsonl", record)
    settings = dict(select=select, lr=1e-2, epochs=16, val=str(val), dropout=0.0)
    rows, _ = train(tmp_path, init, "a", **settings)
    losses = [r["val_loss"] for r in rows if "val_loss" in r]
    assert losses[0] > min(losses), "this test needs another learning rate"
    assert min(losses) < losses[-1] - 0.1, "this test needs another learning rate"
    want = min(losses) if select == "val" else losses[-1]
    assert validation_loss(tmp_path, val) == pytest.approx(want, rel=1e-4)


def test_select_reward_saves_the_epoch_with_the_best_score(tmp_path, init, monkeypatch, capsys):
    """Stand-in scores: the second epoch is the best."""
    scores = iter([1.0, 5.0, 2.0])
    calls = []

    def score_responses(model, enc, prompts, responses):
        calls.append((prompts, len(responses)))
        return [next(scores)] * len(responses)

    monkeypatch.setattr(reward, "load_reward", lambda path, device, enc: (None, ENC))
    monkeypatch.setattr(reward, "score_responses", score_responses)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "reward.pt").touch()
    val = write_jsonl(
        tmp_path / "val.jsonl",
        {"messages": chat("What does the cow say?", "moo.")},
        {"messages": chat("Why?", "So.", "Oh?", "Yes.")},
        {"messages": chat("", "No.")[1:]},  # has no prompt
    )
    settings = dict(select="reward", lr=5e-3, val=str(val), dropout=0.0)
    rows, _ = train(tmp_path, init, "a", **settings)
    prompts = [chat("What does the cow say?"), chat("Why?", "So.", "Oh?")]
    assert calls == [(prompts, 2)] * 3
    epochs = [r for r in rows if "val_loss" in r]
    assert [r["reward"] for r in epochs] == [1.0, 5.0, 2.0]
    assert validation_loss(tmp_path, val) == pytest.approx(epochs[1]["val_loss"], rel=1e-4)


def test_a_given_val_file_is_used_beside_the_data_of_the_village(
    tmp_path, init, monkeypatch, capsys
):
    write_sounds(tmp_path / "sft_train.jsonl")
    write_jsonl(tmp_path / "sft_val.jsonl", {"messages": chat("theirs?", "yes")})
    mine = write_jsonl(tmp_path / "mine.jsonl", {"messages": chat("mine?", "yes")})
    monkeypatch.setattr(corpus, "ensure", lambda folder, seed: tmp_path)
    for val, prompt in ((str(mine), "mine?"), ("", "theirs?")):
        train(tmp_path, init, "a", data="", val=val, epochs=1)
        assert prompt in capsys.readouterr().out


def test_half_an_emoji_does_not_end_the_run(tmp_path, init, capsys):
    """A string cut inside an escaped emoji is valid JSON but not valid Unicode: print fails."""
    records = [{"messages": chat("cut \ud83d", "off \ud83d")}] * 4
    data = write_jsonl(tmp_path / "half.jsonl", *records)
    assert "\\ud83d" in data.read_text()
    train(tmp_path, init, "a", data=str(data), epochs=1)


# The command


GOOD_LINE = json.dumps({"messages": chat("a\u2028b", "c")}, ensure_ascii=False)
BAD_RUNS = {  # arguments -> what the line must contain
    "--data bad.jsonl": ["bad.jsonl:2:"],
    "--data gone.jsonl": ["gone.jsonl"],
    "--val bad.jsonl": ["bad.jsonl:2:"],
    "--data empty.jsonl": ["empty.jsonl"],
    "--init gone.pt": ["gone.pt"],
    "--init data.jsonl": ["data.jsonl"],
    "--epoch 3": ["unknown flag --epoch", "--epochs"],
    "--epochs two": ["--epochs", "two"],
    "--epochs 0": ["--epochs 0"],
    "--select best": ["--select best", "reward"],
    "--select reward": ["reward.pt"],
    "--device tpu": ["--device tpu"],
    "--data long.jsonl": ["context of 48", "--block-size"],
}


@pytest.mark.parametrize("args", BAD_RUNS)
def test_a_mistake_of_the_user_is_one_line_and_writes_nothing(
    tmp_path, init, monkeypatch, capsys, args
):
    monkeypatch.chdir(tmp_path)
    write_sounds(tmp_path / "data.jsonl")
    write_jsonl(tmp_path / "bad.jsonl", GOOD_LINE, '{"messages": [', GOOD_LINE)
    write_jsonl(tmp_path / "long.jsonl", {"messages": chat("moo " * 99, "b")})
    (tmp_path / "empty.jsonl").write_text("")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    argv = f"sft.py --data data.jsonl --init tiny.pt --out new {args}"
    monkeypatch.setattr(sys, "argv", argv.split())
    with pytest.raises(SystemExit) as e:
        start(sft.main, sft.Config, sft.__doc__)
    error = capsys.readouterr().err
    assert e.value.code == 2, error
    assert error.count("\n") == 1, error
    assert error.startswith("sft.py: "), error
    for part in BAD_RUNS[args]:
        assert part in error, error
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_mistake_of_the_user_in_a_real_shell(tmp_path, init):
    write_jsonl(tmp_path / "bad.jsonl", GOOD_LINE, "not json")
    done = subprocess.run(
        [sys.executable, ROOT / "sft.py", "--data", "bad.jsonl", "--init", "tiny.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("sft.py: bad.jsonl:2: ")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bad.jsonl", "tiny.pt"]
