"""What a talk must satisfy: streamed text is the generated text, turns are forgotten whole, and nothing that is typed is a crash."""
import io
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import chat
import gpt
import reward
import sft
import tools
from gpt import UserError

ROOT = Path(__file__).resolve().parent.parent
ENC = gpt.get_tokenizer()
SPECIAL = ENC._special_tokens
END = gpt.end_of(ENC)


def tiny(block=48, seed=0, vocab=ENC.n_vocab):
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(vocab, block, n_layer=2, n_head=4, n_embd=32))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.eval()


def reciter(plan, block=128):
    """A real GPT that says what stands in `plan` ({position: token}), whatever it is told: its position decides."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, block, n_layer=1, n_head=1, n_embd=128))
    for p in model.h.parameters():
        p.data.zero_()
    model.wte.weight.data = torch.nn.functional.normalize(torch.randn(ENC.n_vocab, 128))
    model.wpe.weight.data.zero_()
    for position in range(block):
        model.wpe.weight.data[position] = 20 * model.wte.weight.data[plan.get(position, END)]
    return model.eval()


def user(text):
    return [{"role": "user", "content": text}]


def prompt_of(*messages):
    return sft.render_prompt(list(messages), ENC)


def says(question, text, plan=None):
    """The plan of a reciter that answers `text` (a string or tokens) to a first question."""
    start, tokens = len(prompt_of(*user(question))) - 1, ENC.encode_ordinary(text) if isinstance(text, str) else text
    return {**(plan or {}), **{start + i: t for i, t in enumerate(tokens)}}


# The stream

@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_stream_is_what_generate_says(temperature):
    """Token by token, with the same seed: for every prompt length, up to the last place in the context."""
    rng = random.Random(0)
    for seed in range(8):
        model = tiny(seed=seed)
        ids = [rng.randrange(ENC.n_vocab) for _ in range(rng.choice([1, 2, 20, 46, 47]))]
        want, = gpt.generate(model, [ids], 30, temperature=temperature, seed=seed)
        assert list(chat.stream(model, ids, 30, temperature, torch.Generator().manual_seed(seed))) == want
        assert len(want) == min(30, 48 - len(ids))


def test_the_stream_does_not_run_ahead():
    model, calls = tiny(), []
    hidden = model.hidden
    model.hidden = lambda *a: calls.append(1) or hidden(*a)
    tokens = chat.stream(model, [1, 2, 3], 30)
    for n in range(1, 5):
        next(tokens)
        assert len(calls) == n
    tokens.close()


@pytest.mark.parametrize("n", [0, 48, 100])
def test_a_prompt_that_does_not_fit_is_refused(n):
    with pytest.raises(UserError, match=f"{n} tokens"):
        next(chat.stream(tiny(), [1] * n, 5))


# From tokens to text

class Script:
    """chat.stream and gpt.generate of a model that answers by a function: what it has said so far -> what it says next."""

    def __init__(self, monkeypatch, said, block=128):
        self.config, self.said, self.drawn = gpt.GPTConfig(ENC.n_vocab, block, 1, 1, 2), said, 0
        monkeypatch.setattr(chat, "stream", self.stream)
        monkeypatch.setattr(gpt, "generate", lambda model, prompts, n, **k: [list(self.tokens(p))[:n] for p in prompts])

    def tokens(self, ids):
        text = self.said(ENC.decode(ids[ids.index(SPECIAL["<|assistant|>"]) + 1:]))
        return (ENC.encode_ordinary(text) if isinstance(text, str) else text) + [END]

    def stream(self, model, ids, max_new_tokens, temperature, rng):
        for token in self.tokens(ids)[:max_new_tokens]:
            self.drawn += 1
            yield token


def pieces(script, db=None, on_call=None, **settings):
    return list(chat.answer(script, ENC, prompt_of(*user("?")), chat.Config(**settings), None, db, on_call))


def bytewise(text):
    return [ENC._mergeable_ranks[bytes([b])] for b in text.encode()]


def test_characters_come_whole(monkeypatch):
    """Each byte a token: no half character is ever shown, and none is lost."""
    text = "e\u0301 牛 👩‍👩‍👧 \U0001f9ff ü!"
    script = Script(monkeypatch, lambda _: bytewise(text))
    found = pieces(script)
    assert "".join(found) == text and "\ufffd" not in "".join(found) and len(found) == len(text)


@pytest.mark.parametrize("raw, want", [(b"a\xe7\x89", "a\ufffd"), (b"\xff\xfea", "\ufffd\ufffda"), (b"\xe7\x89a", "\ufffda"), (b"\x9b1m", "\ufffd1m")])
def test_bytes_that_are_no_text_show_as_such(monkeypatch, raw, want):
    assert "".join(pieces(Script(monkeypatch, lambda _: [ENC._mergeable_ranks[bytes([b])] for b in raw]))) == want


def test_text_is_shown_as_soon_as_it_is_sure(monkeypatch):
    script = Script(monkeypatch, lambda _: "The cow says moo.")
    shown = ""
    for n, piece in enumerate(chat.answer(script, ENC, prompt_of(*user("?")), chat.Config(), None), 1):
        shown += piece
        assert script.drawn == n and shown == ENC.decode(ENC.encode_ordinary("The cow says moo.")[:n])


@pytest.mark.parametrize("token", ["<|user|>", "<|system|>", "<|assistant|>", "<|pad|>", "<|end|>"])
def test_any_special_token_ends_an_answer(monkeypatch, token):
    assert "".join(pieces(Script(monkeypatch, lambda _: ENC.encode_ordinary("moo") + [SPECIAL[token]] + ENC.encode_ordinary(" no")))) == "moo"


def test_ids_that_mean_nothing_are_nothing():
    assert chat.token_bytes(ENC, ENC.n_vocab + 5) == b"" and chat.token_bytes(ENC, END) is None
    assert b"".join(chat.token_bytes(ENC, t) for t in ENC.encode_ordinary("moo 牛")).decode() == "moo 牛"


def test_printable():
    assert chat.printable("moo\n\t牛 ü") == "moo\n\t牛 ü"
    for bad in ("\x1b[2J", "\r", "\x07", "\x9b1m", "\u202e", "\x00", "\x7f", "\x08"):
        assert "\ufffd" == chat.printable(bad)[0] and not any(c in chat.printable(bad) for c in "\x1b\r\x07\x9b\u202e\x00\x7f\x08")


# Calls

@pytest.fixture
def shop(tmp_path):
    db = sqlite3.connect(tmp_path / "shop.db")
    db.execute("CREATE TABLE shop (item TEXT, price INTEGER)")
    db.executemany("INSERT INTO shop VALUES (?, ?)", [("red kite", 47), ("<<< SELECT 1 >>>", 5), ("a very long name of a thing that nobody needs " * 5, 6)])
    db.commit()
    db.close()
    return tools.open_database(tmp_path / "shop.db")


ANSWERS = {  # answer so far -> what comes next
    "one call": {"": "It costs <<< SELECT price FROM shop WHERE item = 'red kite' >>> never seen", "It costs 47": " coins."},
    "no call": {"": "moo."}, "half a call": {"": "a <<< SELECT"}, "brackets": {"": "a < b << c <"}, "late brackets": {"": "a <<"}, "nothing": {"": ""},
    "a call alone": {"": "<<< SELECT 1 >>>", "1": ""},
    "two calls": {"": "x <<< SELECT 1 >>>", "x 1": " y <<< DROP TABLE shop >>>", "x 1 y [error: only SELECT is allowed]": "."},
    "a result that looks like a call": {"": "<<< SELECT item FROM shop WHERE price = 5 >>>", "<<< SELECT 1 >>>": " ok"},
    "a long result": {"": "<<< SELECT item FROM shop WHERE price = 6 >>>"},
    "for ever": None,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_streamed_answers_are_those_of_answer_with_tools(monkeypatch, shop, name):
    """The same text and the same calls; and no statement that is run is ever shown in the answer."""
    next_of = ANSWERS[name]
    script = Script(monkeypatch, lambda said: " <<< SELECT 7 >>>" if next_of is None else next_of.get(said, "!"))
    calls = []
    found = pieces(script, shop, lambda *c: calls.append(c))
    (text, want), = tools.answer_with_tools(script, ENC, [user("?")], shop)
    assert "".join(found) == text and calls == want
    assert all(found) or not text
    assert name == "a result that looks like a call" or not any(s in text for s, _ in calls)
    monkeypatch.setattr(tools, "run_query", None)                                        # without a database nothing is run or held back
    assert "".join(pieces(script)) == tools.answer_with_tools(script, ENC, [user("?")], None)[0][0]


def test_a_real_model_greedy_and_streamed(shop):
    """No stand-in: a GPT that writes a call, is stopped, and goes on after the result."""
    statement = "SELECT item FROM shop WHERE price = 6"
    plan = says("How much?", f"It is <<< {statement} >>>")
    result = tools.run_query(shop, statement)
    head = prompt_of(*user("How much?")) + ENC.encode_ordinary(tools.splice(ENC, prompt_of(*user("How much?")), "It is ", result, 128))
    assert len(head) - 1 > max(plan), "the result must be longer than the statement, else the plan contradicts itself"
    model = reciter({**plan, **{len(head) - 1 + i: t for i, t in enumerate(ENC.encode_ordinary(", no more."))}})
    calls = []
    text = "".join(chat.answer(model, ENC, prompt_of(*user("How much?")), chat.Config(temperature=0), None, shop, lambda *c: calls.append(c)))
    assert text.startswith("It is a very long name") and text.endswith(", no more.") and calls == [(statement, result)]
    assert tools.answer_with_tools(model, ENC, [user("How much?")], shop, temperature=0) == [(text, calls)]


# Turns

def test_the_oldest_turns_are_forgotten_whole():
    rng = random.Random(0)
    for _ in range(200):
        system = [{"role": "system", "content": "Be kind. " * rng.randint(0, 2)}] * rng.randint(0, 1)
        turns = [{"role": ("user", "assistant")[i % 2], "content": "moo " * rng.randint(0, 12)} for i in range(2 * rng.randint(0, 6) + 1)]
        reserve = rng.choice([16, 40, 64])
        kept = chat.fit(system + turns, ENC, 128, reserve)
        n = len(kept) - len(system)
        assert kept == system + turns[-n:] and n % 2 == 1
        assert len(prompt_of(*kept)) <= 128 - reserve or n == 1
        assert n == len(turns) or len(prompt_of(*system, *turns[-n - 2:])) > 128 - reserve, "no more is forgotten than must be"


def test_what_cannot_fit_is_one_clear_line():
    for text in ("moo " * 200, "a" * 3_000_000, "牛" * 500_000, "moo " * 112):
        start = time.monotonic()
        with pytest.raises(UserError, match="context of 128") as e:
            chat.fit(user(text), ENC, 128, 64)
        assert time.monotonic() - start < 1 and "\n" not in str(e.value) and len(str(e.value)) < 200
    assert chat.fit(user("moo " * 100), ENC, 128, 64) == user("moo " * 100), "what leaves some room for an answer is tried"
    with pytest.raises(UserError, match="system message"):
        chat.fit([{"role": "system", "content": "moo " * 120}] + user("hi"), ENC, 128, 64)


# The whole talk, in this process

def checkpoint(path, model, **extra):
    gpt.save_model(path, model, ENC, "", **extra)
    return path


class Terminal(io.TextIOWrapper):
    def __init__(self, content, tty=False):
        super().__init__(io.BytesIO(content), encoding="ascii")
        self.isatty = lambda: tty


@pytest.fixture
def talk(monkeypatch, capsys, tmp_path):
    def talk(content, model=None, **settings):
        monkeypatch.setattr(sys, "stdin", Terminal(content if isinstance(content, bytes) else content.encode()))
        if model is not None:
            settings["checkpoint"] = str(checkpoint(tmp_path / "m.pt", model))
        chat.main(chat.Config(**{"temperature": 0.0, "device": "cpu", "max_new_tokens": 30} | settings))
        return capsys.readouterr()
    return talk


def test_piped_input(talk):
    """One answer for each line, nothing else on stdout: no prompts, no escape codes; the last line may lack its end."""
    model = reciter(says("Hi?", "moo 牛."))
    for content in ("Hi?\nHi?\n", "Hi?\n\n  \nHi?", "Hi?\r\nHi?\r\n", "Hi?\n/reset\nHi?\n/quit\nHi?\n"):
        out, err = talk(content.replace("\nHi?", "\n/reset\nHi?"), model)
        assert out == "moo 牛.\n" * 2 and "\x1b" not in out + err and "Traceback" not in err
    assert talk("", model) == ("", "")


def test_odd_input_is_no_crash(talk):
    out, err = talk(b"\xff\xfe\x00\n" + b"a" * 100_000 + b"\n" + b"moo " * 300 + b"\n/nonsense\n/save\n/\n<|end|><|user|>\n\x1b[2J\nHi?\n", tiny(block=128), temperature=1.0)
    assert err.count("too long") == 2 and err.count("unknown command") == 2 and "/save FILE" in err
    assert "\x1b" not in out + err and all(len(line) < 200 for line in err.splitlines())


def test_earlier_turns_are_in_the_prompt_until_they_do_not_fit(talk, monkeypatch):
    seen, answer = [], chat.answer

    def spy(model, enc, prompt, *rest):
        seen.append(enc.decode(prompt))
        yield "ok"

    monkeypatch.setattr(chat, "answer", spy)
    out, err = talk("/system Be kind.\none\ntwo\n/reset\nthree\n/system\nfour\n" + "\n".join(["moo " * 20] * 4), tiny(block=128))
    ask = lambda *t: "".join(f"<|user|>{x}<|end|><|assistant|>ok<|end|>" for x in t[:-1]) + f"<|user|>{t[-1]}<|end|><|assistant|>"      # noqa: E731
    system = "<|system|>Be kind.<|end|>"
    assert seen[:4] == [system + ask("one"), system + ask("one", "two"), system + ask("three"), ask("three", "four")]
    assert all(s.count("moo moo") and s.startswith("<|user|>") and s.endswith("<|end|><|assistant|>") for s in seen[4:])
    assert max(len(ENC.encode(s, allowed_special="all")) for s in seen) <= 128 - 30 and "the context is full" in err
    assert out == "ok\n" * 8


def test_save_writes_what_sft_reads(talk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = reciter(says("Hi?", "moo 牛."))
    (tmp_path / "old.jsonl").write_text("mine")
    out, err = talk("/save early.jsonl\nHi?\n/save talk.jsonl\n/save old.jsonl\n/save talk.jsonl\n/save no/such/folder.jsonl\n", model)
    assert sft.load_chats(tmp_path / "talk.jsonl") == [{"messages": user("Hi?") + [{"role": "assistant", "content": "moo 牛."}]}]
    assert (tmp_path / "old.jsonl").read_text() == "mine" and err.count("exists") == 2 and "nothing to save" in err and "folder.jsonl" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt", "old.jsonl", "talk.jsonl"]


def test_calls_are_shown_and_the_database_is_found(talk, shop, tmp_path):
    statement = "SELECT item FROM shop WHERE price = 6"
    model = reciter(says("Hi?", f"<<< {statement} >>>"))
    out, err = talk("Hi?\n", model, max_new_tokens=100)                    # shop.db lies beside the checkpoint
    assert out.startswith("a very long name") and "SELECT" not in out and f"    {statement} -> a very" in err
    shutil.copy(tmp_path / "shop.db", tmp_path / "mine.db")
    (tmp_path / "shop.db").unlink()
    assert "SELECT" in talk("Hi?\n", model)[0], "no database: the statement is only text"
    assert "SELECT" not in talk("Hi?\n", model, db=str(tmp_path / "mine.db"), max_new_tokens=100)[0]
    with pytest.raises(UserError, match="gone.db"):
        talk("Hi?\n", model, db=str(tmp_path / "gone.db"))


def test_same_seed_same_talk(talk):
    a, b, c = (talk("one\ntwo\n", tiny(), seed=s, temperature=1.0, max_new_tokens=10)[0] for s in (1, 1, 2))
    assert a == b != c


def test_which_checkpoint_talks(talk, tmp_path):
    with pytest.raises(UserError, match="python ppo.py"):
        talk("Hi?\n", out=str(tmp_path))
    for name in ("gpt", "sft", "dpo", "ppo"):                              # each in turn is preferred to those before it
        plan = {i: ENC.encode_ordinary(name[0])[0] for i in range(128)}
        checkpoint(tmp_path / f"{name}.pt", reciter(plan), **({"val_fraction": 0.05} if name == "gpt" else {}))
        assert talk("Hi?\n", out=str(tmp_path), max_new_tokens=3)[0] == 3 * name[0] + "\n"
    judge = reward.RewardModel(tiny())
    gpt.save_checkpoint(tmp_path / "reward.pt", model=judge.state_dict(), gpt=vars(judge.body.config), tokenizer="", fingerprint=gpt.fingerprint(ENC))
    with pytest.raises(UserError, match="is a reward model"):
        talk("Hi?\n", checkpoint=str(tmp_path / "reward.pt"))


def test_a_base_model_continues_each_line(talk, tmp_path, monkeypatch):
    seen, stream = [], chat.stream
    monkeypatch.setattr(chat, "stream", lambda model, ids, *rest: seen.append(ids) or stream(model, ids, *rest))
    out, err = talk("Tom went\nto the\n", checkpoint=str(checkpoint(tmp_path / "gpt.pt", tiny(), val_fraction=0.05)))
    assert seen == [ENC.encode_ordinary("Tom went"), ENC.encode_ordinary("to the")] and "base model" in err


# In a real shell

def start(args, cwd, **pipes):
    return subprocess.Popen([sys.executable, ROOT / "chat.py", "--device", "cpu", *map(str, args)], cwd=cwd,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "", "LC_ALL": "C"}, **pipes)


def test_a_real_pipe(tmp_path):
    path = checkpoint(tmp_path / "m.pt", reciter(says("牛?", "moo 牛.")))
    run = start(["--checkpoint", path, "--temperature", 0], tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = run.communicate("牛?\n".encode(), timeout=120)
    assert (run.returncode, out.decode(), err) == (0, "moo 牛.\n", b"")


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are a thing of POSIX")
@pytest.mark.parametrize("end", ["ctrl-d", "ctrl-c"])
def test_a_real_terminal(tmp_path, end):
    import pty
    if end == "ctrl-c" and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        pytest.skip("started in the background, where Ctrl-C is ignored")
    path = checkpoint(tmp_path / "m.pt", reciter(says("Hi?", "moo.")))
    ours, theirs = pty.openpty()
    run = start(["--checkpoint", path, "--temperature", 0], tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = b""

    def until(text):
        nonlocal shown
        deadline = time.time() + 120
        while text not in shown and time.time() < deadline:
            shown += os.read(ours, 1000)
        assert text in shown, shown
    until(b"> ")
    os.write(ours, b"Hi?\n")
    until(b"moo.\r\n> ")
    if end == "ctrl-d":
        os.write(ours, b"\x04")
    else:
        os.killpg(run.pid, signal.SIGINT)
    assert run.wait(60) == 0
    try:
        shown += os.read(ours, 1000)
    except OSError:   # Linux's way to say that the other side is closed
        pass
    os.close(ours)
    assert b"Traceback" not in shown


def test_a_users_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.pt").write_text("no checkpoint")
    path = checkpoint(tmp_path / "m.pt", tiny())
    for args, part in ((f"--out {tmp_path / 'new'}", "python ppo.py"), (f"--checkpoint {tmp_path / 'gone.pt'}", "gone.pt"),
                       (f"--checkpoint {tmp_path / 'text.pt'}", "text.pt"), (f"--checkpoint {path} --db {tmp_path / 'text.pt'}", "not a SQLite database"),
                       (f"--checkpoint {path} --temperature -1", "--temperature"), ("--chekpoint x", "--checkpoint"), ("--max-new-tokens 0", "--max-new-tokens")):
        monkeypatch.setattr(sys, "argv", ["chat.py", *args.split()])
        with pytest.raises(SystemExit) as e:
            gpt.run(chat.main, chat.Config, chat.__doc__)
        error = capsys.readouterr().err
        assert e.value.code == 2 and error.count("\n") == 1 and part in error, error
    assert not (tmp_path / "new").exists()
