"""Properties of chat.py: it shows what the model generates, drops whole turns, never crashes."""
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
import tools
from data.formats import load_chats, save_chat
from data.tokenizer import decode_token, end_of, fingerprint, get_tokenizer
from scaffold import cli
from scaffold.cli import UserError
from scaffold.table import printable
from scaffold.run import save_checkpoint
from sft import render_prompt

ROOT = Path(__file__).resolve().parent.parent
ENC = get_tokenizer()
END = end_of(ENC)
ASSISTANT = ENC.encode_single_token("<|assistant|>")


def tiny(block_size=48, seed=0):
    """A GPT with random weights, far from uniform."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, block_size, n_layer=2, n_head=4, n_embd=32))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.eval()


def reciter(plan, block_size=128):
    """A GPT that recites `plan` ({position: next token}) after any prompt: only positions count."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, block_size, n_layer=1, n_head=1, n_embd=128))
    for p in model.h.parameters():
        p.data.zero_()
    embeddings = torch.nn.functional.normalize(torch.randn(ENC.n_vocab, 128))
    model.wte.weight.data = embeddings
    tokens = [plan.get(position, END) for position in range(block_size)]
    model.wpe.weight.data = 20 * embeddings[tokens]
    return model.eval()


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def encode(*messages):
    return render_prompt(list(messages), ENC)


def plan_for(prompt, response):
    """The plan of a reciter that gives this response to a first prompt."""
    start = len(encode(*user(prompt))) - 1
    return {start + i: token for i, token in enumerate(ENC.encode_ordinary(response))}


# The stream

@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_stream_is_what_generate_returns(temperature):
    """The same tokens for the same seed, up to the last position of the context."""
    rng = random.Random(0)
    for seed in range(8):
        model = tiny(seed=seed)
        ids = [rng.randrange(ENC.n_vocab) for _ in range(rng.choice([1, 2, 20, 46, 47]))]
        want, = gpt.generate(model, [ids], 30, temperature=temperature, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        assert list(chat.stream(model, ids, 30, temperature, generator)) == want
        assert len(want) == min(30, 48 - len(ids))


def test_the_stream_does_not_run_ahead():
    model = tiny()
    hidden = model.hidden
    calls = []

    def counting(*args):
        calls.append(args)
        return hidden(*args)

    model.hidden = counting
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

class ScriptedModel:
    """A stand-in for chat.stream and gpt.generate: `script(response so far)` is what comes next.

    The script returns a string or token ids. `drawn` counts the tokens that were streamed.
    """

    def __init__(self, monkeypatch, script, block_size=128):
        self.config = gpt.GPTConfig(ENC.n_vocab, block_size, 1, 1, 2)
        self.script = script
        self.drawn = 0
        monkeypatch.setattr(chat, "stream", self.stream)
        monkeypatch.setattr(gpt, "generate", self.generate)

    def tokens(self, ids):
        new = self.script(ENC.decode(ids[ids.index(ASSISTANT) + 1:]))
        if isinstance(new, str):
            new = ENC.encode_ordinary(new)
        return new + [END]

    def stream(self, model, ids, max_new_tokens, temperature, rng):
        for token in self.tokens(ids)[:max_new_tokens]:
            self.drawn += 1
            yield token

    def generate(self, model, prompts, max_new_tokens, **sampling):
        return [self.tokens(ids)[:max_new_tokens] for ids in prompts]


def respond(model, db=None, on_query=None, **settings):
    """The pieces of the response to "?"."""
    cfg = chat.Config(**settings)
    return list(chat.respond(model, ENC, encode(*user("?")), cfg, None, db, on_query))


def byte_tokens(raw):
    """One token per byte."""
    return [ENC.encode_single_token(bytes([b])) for b in raw]


def test_characters_are_shown_whole(monkeypatch):
    """If each byte is a token, no half character is shown, and none is lost."""
    text = "e\u0301 牛 👩‍👩‍👧 \U0001f9ff ü!"
    model = ScriptedModel(monkeypatch, lambda _: byte_tokens(text.encode()))
    pieces = respond(model)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) == len(text)


@pytest.mark.parametrize("raw, want", [
    (b"a\xe7\x89", "a\ufffd"),
    (b"\xff\xfea", "\ufffd\ufffda"),
    (b"\xe7\x89a", "\ufffda"),
    (b"\x9b1m", "\ufffd1m"),
])
def test_invalid_utf8_is_shown_as_replacement_characters(monkeypatch, raw, want):
    model = ScriptedModel(monkeypatch, lambda _: byte_tokens(raw))
    assert "".join(respond(model)) == want


def test_text_is_shown_at_once(monkeypatch):
    ids = ENC.encode_ordinary("The cow says moo.")
    model = ScriptedModel(monkeypatch, lambda _: ids)
    pieces = chat.respond(model, ENC, encode(*user("?")), chat.Config(), None)
    shown = ""
    for n, piece in enumerate(pieces, 1):
        shown += piece
        assert model.drawn == n
        assert shown == ENC.decode(ids[:n])


@pytest.mark.parametrize("token", ["<|user|>", "<|system|>", "<|assistant|>", "<|pad|>", "<|end|>"])
def test_any_special_token_ends_a_response(monkeypatch, token):
    moo, no = ENC.encode_ordinary("moo"), ENC.encode_ordinary(" no")
    model = ScriptedModel(monkeypatch, lambda _: moo + [ENC.encode_single_token(token)] + no)
    assert "".join(respond(model)) == "moo"


def test_decode_token():
    assert decode_token(ENC, ENC.n_vocab + 5) == b""
    assert decode_token(ENC, END) is None
    raw = b"".join(decode_token(ENC, token) for token in ENC.encode_ordinary("moo 牛"))
    assert raw.decode() == "moo 牛"


def test_printable():
    assert printable("moo\n\t牛 ü") == "moo\n\t牛 ü"
    for bad in ("\x1b[2J", "\r", "\x07", "\x9b1m", "\u202e", "\x00", "\x7f", "\x08"):
        shown = printable(bad)
        assert shown[0] == "\ufffd"
        assert not any(c in shown for c in "\x1b\r\x07\x9b\u202e\x00\x7f\x08")


# Calls

LONG_NAME = "a very long name of a thing that nobody needs " * 5


@pytest.fixture
def shop(tmp_path):
    db = sqlite3.connect(tmp_path / "shop.db")
    db.execute("CREATE TABLE shop (item TEXT, price INTEGER)")
    db.executemany("INSERT INTO shop VALUES (?, ?)",
                   [("red kite", 47), ("<<< SELECT 1 >>>", 5), (LONG_NAME, 6)])
    db.commit()
    db.close()
    return tools.open_database(tmp_path / "shop.db")


SCRIPTS = {   # name -> {response so far: what comes next}
    "one call": {
        "": "It costs <<< SELECT price FROM shop WHERE item = 'red kite' >>> never seen",
        "It costs 47": " coins.",
    },
    "no call": {"": "moo."},
    "half a call": {"": "a <<< SELECT"},
    "brackets": {"": "a < b << c <"},
    "late brackets": {"": "a <<"},
    "nothing": {"": ""},
    "only a call": {"": "<<< SELECT 1 >>>", "1": ""},
    "two calls": {
        "": "x <<< SELECT 1 >>>",
        "x 1": " y <<< DROP TABLE shop >>>",
        "x 1 y [error: only SELECT is allowed]": ".",
    },
    "a result that looks like a call": {
        "": "<<< SELECT item FROM shop WHERE price = 5 >>>",
        "<<< SELECT 1 >>>": " ok",
    },
    "a long result": {"": "<<< SELECT item FROM shop WHERE price = 6 >>>"},
    "too many calls": None,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_streamed_response_is_that_of_respond_with_tools(monkeypatch, shop, name):
    """The same text and the same queries; a statement that runs is never shown."""
    def script(text):
        if SCRIPTS[name] is None:
            return " <<< SELECT 7 >>>"
        return SCRIPTS[name].get(text, "!")

    model = ScriptedModel(monkeypatch, script)
    queries = []
    pieces = respond(model, shop, queries.append)
    (text, want), = tools.respond_with_tools(model, ENC, [user("?")], shop)
    assert "".join(pieces) == text
    assert queries == want
    assert all(pieces) or not text
    if name != "a result that looks like a call":
        assert not any(query.statement in text for query in queries)
    # Without a database nothing is run or held back.
    monkeypatch.setattr(tools, "run_query", None)
    response, = tools.respond_with_tools(model, ENC, [user("?")], None)
    assert "".join(respond(model)) == response.text


def test_a_real_model_calls_and_continues(shop):
    """A GPT, not a stand-in, writes a call, is stopped, and continues after the result."""
    statement = "SELECT item FROM shop WHERE price = 6"
    prompt = encode(*user("How much?"))
    plan = plan_for("How much?", f"It is <<< {statement} >>>")
    result = tools.run_query(shop, statement)
    head = prompt + ENC.encode_ordinary(tools.splice(ENC, prompt, "It is ", result, 128))
    start = len(head) - 1
    assert start > max(plan), "the result must be longer than the call, or the plans overlap"
    for i, token in enumerate(ENC.encode_ordinary(", no more.")):
        plan[start + i] = token
    model = reciter(plan)
    queries = []
    cfg = chat.Config(temperature=0)
    text = "".join(chat.respond(model, ENC, prompt, cfg, None, shop, queries.append))
    assert text.startswith("It is a very long name")
    assert text.endswith(", no more.")
    assert queries == [(statement, result)]
    responses = tools.respond_with_tools(model, ENC, [user("How much?")], shop, temperature=0)
    assert responses == [(text, queries)]


# Turns

def test_the_oldest_turns_are_dropped_whole():
    rng = random.Random(0)
    for _ in range(200):
        system = []
        content = "Be kind. " * rng.randint(0, 2)
        if rng.randint(0, 1):
            system = [{"role": "system", "content": content}]
        turns = []
        for i in range(2 * rng.randint(0, 6) + 1):
            role = "assistant" if i % 2 else "user"
            turns.append({"role": role, "content": "moo " * rng.randint(0, 12)})
        reserve = rng.choice([16, 40, 64])
        kept = chat.fit_context(system + turns, ENC, 128, reserve)
        n = len(kept) - len(system)
        assert kept == system + turns[-n:]
        assert n % 2 == 1
        assert len(encode(*kept)) <= 128 - reserve or n == 1
        if n < len(turns):
            one_more = encode(*system, *turns[-n - 2:])
            assert len(one_more) > 128 - reserve, "no more is dropped than necessary"


@pytest.mark.parametrize("text", ["moo " * 200, "a" * 3_000_000, "牛" * 500_000, "moo " * 112],
                         ids=["words", "one long word", "Chinese", "no room for a response"])
def test_what_cannot_fit_is_a_one_line_error(text):
    start = time.monotonic()
    with pytest.raises(UserError, match="context of 128") as e:
        chat.fit_context(user(text), ENC, 128, 64)
    assert time.monotonic() - start < 1
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 200


def test_what_leaves_some_room_for_a_response_fits():
    assert chat.fit_context(user("moo " * 100), ENC, 128, 64) == user("moo " * 100)


def test_a_system_message_that_is_too_long_is_named():
    system = [{"role": "system", "content": "moo " * 120}]
    with pytest.raises(UserError, match="system message"):
        chat.fit_context(system + user("hi"), ENC, 128, 64)


# Whole conversations, in this process

def checkpoint(path, model, **extra):
    gpt.save_model(path, model, ENC, "", **extra)
    return path


class Stdin(io.TextIOWrapper):
    """A pipe that holds these bytes."""

    def __init__(self, content):
        super().__init__(io.BytesIO(content), encoding="ascii")


@pytest.fixture
def converse(monkeypatch, capsys, tmp_path):
    def converse(content, model=None, **settings):
        """Run chat.main on this input -> (stdout, stderr)."""
        if isinstance(content, str):
            content = content.encode()
        monkeypatch.setattr(sys, "stdin", Stdin(content))
        if model is not None:
            settings["checkpoint"] = str(checkpoint(tmp_path / "m.pt", model))
        defaults = {"temperature": 0.0, "device": "cpu", "max_new_tokens": 30}
        chat.main(chat.Config(**defaults | settings))
        return capsys.readouterr()
    return converse


def test_a_name_that_no_file_can_have_does_not_end_the_chat(converse, monkeypatch, tmp_path):
    """In a C locale that is any name with letters beyond ASCII."""
    monkeypatch.chdir(tmp_path)
    model = reciter(plan_for("Hi?", "moo."))
    out, err = converse("Hi?\n/save a\0b.jsonl\n/reset\nHi?\n", model)
    assert out == "moo.\nmoo.\n"
    assert "name another file" in err
    with pytest.raises(UserError, match="name another file"):
        save_chat("\ud800.jsonl", [{"role": "assistant", "content": "moo."}])


@pytest.mark.parametrize("content", ["Hi?\nHi?\n",
                                     "Hi?\n\n  \nHi?",
                                     "Hi?\r\nHi?\r\n",
                                     "Hi?\n/reset\nHi?\n/quit\nHi?\n"])
def test_piped_input(converse, content):
    """stdout has one response per line of input and no prompts; the last newline may be missing."""
    model = reciter(plan_for("Hi?", "moo 牛."))
    out, err = converse(content.replace("\nHi?", "\n/reset\nHi?"), model)
    assert out == "moo 牛.\n" * 2
    assert "\x1b" not in out + err
    assert "Traceback" not in err


def test_no_input(converse):
    assert converse("", reciter(plan_for("Hi?", "moo 牛."))) == ("", "")


def test_odd_input_is_not_a_crash(converse):
    lines = [b"\xff\xfe\x00", b"a" * 100_000, b"moo " * 300, b"/nonsense", b"/save", b"/",
             b"<|end|><|user|>", b"\x1b[2J", b"Hi?"]
    out, err = converse(b"".join(line + b"\n" for line in lines), tiny(128), temperature=1.0)
    assert err.count("too long") == 2
    assert err.count("unknown command") == 2
    assert "/save FILE" in err
    assert "\x1b" not in out + err
    assert all(len(line) < 200 for line in err.splitlines())


def render(*lines):
    """The prompt as text after the user wrote these lines and the model always said "ok"."""
    turns = [f"<|user|>{line}<|end|><|assistant|>" for line in lines]
    return "ok<|end|>".join(turns)


def test_earlier_turns_are_in_the_prompt_while_they_fit(converse, monkeypatch):
    seen = []

    def respond(model, enc, prompt, *rest):
        seen.append(enc.decode(prompt))
        yield "ok"

    monkeypatch.setattr(chat, "respond", respond)
    lines = ["/system Be kind.", "one", "two", "/reset", "three", "/system", "four"]
    long_lines = ["moo " * 20] * 4
    out, err = converse("\n".join(lines + long_lines), tiny(128))
    system = "<|system|>Be kind.<|end|>"
    assert seen[:4] == [system + render("one"),
                        system + render("one", "two"),
                        system + render("three"),
                        render("three", "four")]
    for prompt in seen[4:]:
        assert "moo moo" in prompt
        assert prompt.startswith("<|user|>")
        assert prompt.endswith("<|end|><|assistant|>")
    assert max(len(ENC.encode(prompt, allowed_special="all")) for prompt in seen) <= 128 - 30
    assert "the context is full" in err
    assert out == "ok\n" * 8


def test_save_writes_what_sft_reads(converse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.jsonl").write_text("mine")
    lines = ["/save early.jsonl", "Hi?", "/save talk.jsonl", "/save old.jsonl", "/save talk.jsonl",
             "/save no/such/folder.jsonl"]
    _, err = converse("\n".join(lines) + "\n", reciter(plan_for("Hi?", "moo 牛.")))
    saved = load_chats(tmp_path / "talk.jsonl")
    assert saved == [{"messages": user("Hi?") + assistant("moo 牛.")}]
    assert (tmp_path / "old.jsonl").read_text() == "mine"
    assert err.count("exists") == 2
    assert "nothing to save" in err
    assert "folder.jsonl" in err
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["m.pt", "old.jsonl", "talk.jsonl"]


@pytest.mark.parametrize("line", [
    b"/save a\0b.jsonl",
    b"/save a\x1b[2Jb.jsonl",
    b"/save a\tb.jsonl",
    b"/save \x1b]0;title\x07/x.jsonl",
    b"/save \xc2\x9b2J.jsonl",
    b"/save a\xe2\x80\xaeb.jsonl",
    b"/save " + b"a" * 5000,
    b"/\x1b[2J",
    b"/a\rb",
    b"/" + b"a" * 5000,
    b"/save\0x",
])
def test_a_command_is_quoted_without_its_control_characters(converse, tmp_path, monkeypatch, line):
    """No name of a file with control characters is created, and no escape code reaches stderr."""
    monkeypatch.chdir(tmp_path)
    out, err = converse(b"Hi?\n" + line + b"\nHi?\n", reciter(plan_for("Hi?", "moo")))
    assert out.startswith("moo\n")
    [message] = err.splitlines()
    assert message.isprintable()
    assert len(message) < 310
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt"]


def test_queries_are_shown_and_the_database_is_found(converse, shop, tmp_path):
    statement = "SELECT item FROM shop WHERE price = 6"
    model = reciter(plan_for("Hi?", f"<<< {statement} >>>"))
    out, err = converse("Hi?\n", model, max_new_tokens=100)   # shop.db lies beside the checkpoint
    assert out.startswith("a very long name")
    assert "SELECT" not in out
    assert f"    {statement} -> a very" in err
    shutil.move(tmp_path / "shop.db", tmp_path / "mine.db")
    out, _ = converse("Hi?\n", model)
    assert "SELECT" in out, "no database: the statement is ordinary text"
    out, _ = converse("Hi?\n", model, db=str(tmp_path / "mine.db"), max_new_tokens=100)
    assert "SELECT" not in out
    with pytest.raises(UserError, match="gone.db"):
        converse("Hi?\n", model, db=str(tmp_path / "gone.db"))


def test_same_seed_same_conversation(converse):
    outs = []
    for seed in (1, 1, 2):
        out, _ = converse("one\ntwo\n", tiny(), seed=seed, temperature=1.0, max_new_tokens=10)
        outs.append(out)
    assert outs[0] == outs[1]
    assert outs[1] != outs[2]


def test_which_checkpoint_is_loaded(converse, tmp_path):
    with pytest.raises(UserError, match="python ppo.py"):
        converse("Hi?\n", out=str(tmp_path))
    for name in ("gpt", "sft", "dpo", "ppo"):   # each takes precedence over those before it
        token = ENC.encode_ordinary(name[0])[0]
        extra = {"val_fraction": 0.05} if name == "gpt" else {}
        checkpoint(tmp_path / f"{name}.pt", reciter(dict.fromkeys(range(128), token)), **extra)
        out, _ = converse("Hi?\n", out=str(tmp_path), max_new_tokens=3)
        assert out == 3 * name[0] + "\n"


def test_a_reward_model_is_refused(converse, tmp_path):
    model = reward.RewardModel(tiny())
    path = tmp_path / "reward.pt"
    save_checkpoint(path, model=model.state_dict(), gpt=vars(model.body.config), tokenizer="",
                        fingerprint=fingerprint(ENC))
    with pytest.raises(UserError, match="is a reward model"):
        converse("Hi?\n", checkpoint=str(path))


def test_a_base_model_continues_each_line_alone(converse, tmp_path, monkeypatch):
    seen = []
    stream = chat.stream

    def spy(model, ids, *rest):
        seen.append(ids)
        return stream(model, ids, *rest)

    monkeypatch.setattr(chat, "stream", spy)
    path = checkpoint(tmp_path / "gpt.pt", tiny(), val_fraction=0.05)
    _, err = converse("Tom went\nto the\n", checkpoint=str(path))
    assert seen == [ENC.encode_ordinary("Tom went"), ENC.encode_ordinary("to the")]
    assert "base model" in err


# In a real shell

def start(args, cwd, **pipes):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "", "LC_ALL": "C"}
    command = [sys.executable, ROOT / "chat.py", "--device", "cpu", *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, env=env, **pipes)


def pipe_through(args, cwd, text):
    """Run chat.py with this input -> (exit code, stdout, stderr)."""
    process = start(args, cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE)
    out, err = process.communicate(text.encode(), timeout=120)
    return process.returncode, out.decode(), err.decode()


def test_a_real_pipe(tmp_path):
    path = checkpoint(tmp_path / "m.pt", reciter(plan_for("牛?", "moo 牛.")))
    result = pipe_through(["--checkpoint", path, "--temperature", 0], tmp_path, "牛?\n")
    assert result == (0, "moo 牛.\n", "")


def test_a_base_model_in_a_real_pipe(tmp_path):
    """echo "Tom went to the" | python chat.py --checkpoint gpt.pt"""
    model = tiny()
    checkpoint(tmp_path / "gpt.pt", model, val_fraction=0.05)
    code, out, err = pipe_through(["--checkpoint", "gpt.pt", "--seed", 3], tmp_path,
                                  "Tom went to the\n")
    prompt = ENC.encode_ordinary("Tom went to the")
    ids, = gpt.generate(model, [prompt], 100, temperature=0.7, seed=3)
    special = [i for i, token in enumerate(ids) if ENC.is_special_token(token)]
    text = ENC.decode(ids[:min(special, default=len(ids))])
    assert text
    assert out == printable(text) + "\n"
    assert "base model" in err
    assert code == 0


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has pseudo-terminals")
@pytest.mark.parametrize("end", ["ctrl-d", "ctrl-c"])
def test_a_real_terminal(tmp_path, end):
    import pty
    if end == "ctrl-c" and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        pytest.skip("started in the background, where Ctrl-C is ignored")
    path = checkpoint(tmp_path / "m.pt", reciter(plan_for("Hi?", "moo.")))
    ours, theirs = pty.openpty()
    process = start(["--checkpoint", path, "--temperature", 0], tmp_path, stdin=theirs,
                    stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = b""

    def read_until(text):
        nonlocal shown
        deadline = time.time() + 120
        while text not in shown and time.time() < deadline:
            shown += os.read(ours, 1000)
        assert text in shown, shown

    read_until(b"> ")
    os.write(ours, b"Hi?\n")
    read_until(b"moo.\r\n> ")
    if end == "ctrl-d":
        os.write(ours, b"\x04")
    else:
        time.sleep(0.5)   # input() misses a signal that arrives just before it starts to read
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    try:
        shown += os.read(ours, 1000)
    except OSError:   # Linux reports a closed pseudo-terminal this way
        pass
    os.close(ours)
    assert b"Traceback" not in shown


@pytest.mark.parametrize("args, part", [
    ("--out new", "python ppo.py"),
    ("--checkpoint gone.pt", "gone.pt"),
    ("--checkpoint text.pt", "text.pt"),
    ("--checkpoint m.pt --db text.pt", "not a SQLite database"),
    ("--checkpoint m.pt --temperature -1", "--temperature"),
    ("--chekpoint x", "--checkpoint"),
    ("--max-new-tokens 0", "--max-new-tokens"),
])
def test_a_users_mistake_is_one_line(tmp_path, monkeypatch, capsys, args, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("no checkpoint")
    checkpoint(tmp_path / "m.pt", tiny())
    monkeypatch.setattr(sys, "argv", ["chat.py", *args.split()])
    with pytest.raises(SystemExit) as e:
        cli.start(chat.main, chat.Config, chat.__doc__)
    error = capsys.readouterr().err
    assert e.value.code == 2
    assert error.count("\n") == 1
    assert part in error
    assert not (tmp_path / "new").exists()
