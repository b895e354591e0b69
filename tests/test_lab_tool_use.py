"""Properties of lab/tool_use.py: demonstrations are right, and held-out tasks stay held out."""
import json
import random
import re
import sqlite3
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gpt
import tools
from data import corpus
from data.tokenizer import end_of, get_tokenizer
from lab import tool_use
from scaffold.cli import UserError, start
from sft import render_prompt

ENC = get_tokenizer()
END = end_of(ENC)
ITEMS = [f"{colour} {thing}" for colour in ("red", "blue", "white")
         for thing in ("kite", "hat", "cup", "boat")]
SHOP = {item: 10 + 3 * i for i, item in enumerate(ITEMS)}
ABSENT = ["green drum", "black boat"]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def open_shop(path, prices):
    """Write a shop {item: price} and open it."""
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE shop (item TEXT PRIMARY KEY, price INTEGER)")
    db.executemany("INSERT INTO shop VALUES (?, ?)", prices.items())
    db.commit()
    db.close()
    return tools.open_database(path)


@pytest.fixture
def shop_db(tmp_path):
    return open_shop(tmp_path / "market.db", SHOP)


def right_response(task):
    """Find the right response from the words of the prompt and SHOP, without SQL."""
    text = task.prompt[0]["content"]
    named = sorted((item for item in SHOP if item in text), key=text.index)
    numbers = [int(digits) for digits in re.findall(r"\d+", text)]
    if task.shape == "price":
        return f"The {named[0]} costs {SHOP[named[0]]} coins."
    if task.shape == "which":
        item, = (item for item in SHOP if SHOP[item] == numbers[0])
        return f"For {numbers[0]} coins you get the {item}."
    if task.shape == "extreme":
        word, thing = re.search(r"(cheapest|dearest) (\w+)", text).groups()
        prices = [price for item, price in SHOP.items() if item.endswith(thing)]
        price = min(prices) if word == "cheapest" else max(prices)
        return f"The {word} {thing} costs {price} coins."
    if task.shape == "sum":
        return f"Together they cost {SHOP[named[0]] + SHOP[named[1]]} coins."
    if task.shape == "count":
        n = sum(price < numbers[0] for price in SHOP.values())
        return f"Things for less than {numbers[0]} coins: {n}."
    assert task.shape == "nothing"
    beginning = re.fullmatch(r"(The (?:green drum|black boat) costs |For \d\d coins you get the )"
                             r"\{call\}.*", task.response)[1]
    return f"{beginning}{tools.NOTHING}: I do not know."


def draw_tasks(n, seed=0):
    """Draw n tasks of each shape, and 2 n that have no answer."""
    rng = random.Random(seed)
    kinds = [(shape, ()) for shape in tool_use.SHAPES] + [("price", ABSENT), ("which", ABSENT)]
    return [tool_use.draw_task(shape, rng.randrange(6), SHOP, rng, absent)
            for _ in range(n) for shape, absent in kinds]


# Demonstrations

def test_the_right_response_is_right(shop_db):
    for task in draw_tasks(40):
        assert tool_use.right_response(task, shop_db) == right_response(task), task
        assert "the shop" in task.prompt[0]["content"].lower()


def test_every_demonstration_fits_the_context(shop_db):
    examples = tool_use.tool_examples(draw_tasks(40), shop_db, ENC)
    assert max(len(ids) for ids, _ in examples) < 128


def decode(ids):
    return ENC.decode(ids.tolist())


def test_the_two_sequences_of_a_demonstration(shop_db):
    """The first teaches the whole call and no end; the second what follows the result, and the end.
    The result itself is never learned."""
    for task in draw_tasks(10):
        before, result, after = tool_use.response_parts(task, shop_db)
        (ids, mask), (ids2, mask2) = tool_use.tool_examples([task], shop_db, ENC)
        prompt = render_prompt(task.prompt, ENC)
        for x, m in ((ids, mask), (ids2, mask2)):
            assert x.shape == m.shape
            assert set(m.tolist()) == {0, 1}
            assert m.diff().abs().sum() == 1, "0 ... 0 1 ... 1"
        assert decode(ids[mask == 0]) == ENC.decode(prompt)
        assert decode(ids[mask == 1]) == f"{before}<<< {task.statement} >>>"
        assert decode(ids2[mask2 == 0]) == ENC.decode(prompt) + before + result
        assert decode(ids2[mask2 == 1]) == after + "<|end|>"
        assert END not in ids[mask == 1].tolist()
        assert ids2[-1] == END
        # Training shows the same tokens that generation continues.
        text = tools.splice(ENC, prompt, before, result, 128)
        assert ids2[mask2 == 0].tolist() == prompt + ENC.encode_ordinary(text)


def test_an_earlier_turn_is_complete_and_true(shop_db):
    """It is given, not learned, and it is only there if all of it fits."""
    tasks = draw_tasks(20)
    chat = {"messages": user("Hi.") + assistant("Hello, how are you?") + user("never") * 3}
    possible = [task.prompt + assistant(right_response(task)) for task in tasks]
    possible.append(chat["messages"][:2])
    longer = tool_use.with_earlier_turn(tasks, shop_db, ENC, 100, random.Random(0), [chat])
    assert {len(task.prompt) for task in longer} == {1, 3}
    assert sum(len(task.prompt) == 3 for task in longer) > 0.5 * len(longer)
    for task, follow_up in zip(tasks, longer):
        *earlier, last = follow_up.prompt
        assert [last] == task.prompt
        assert tool_use.response_parts(follow_up, shop_db) == tool_use.response_parts(task, shop_db)
        if earlier:
            assert [m["role"] for m in earlier] == ["user", "assistant"]
            assert earlier in possible
        for (ids, mask), (_, mask_alone) in zip(tool_use.tool_examples([follow_up], shop_db, ENC),
                                                tool_use.tool_examples([task], shop_db, ENC)):
            assert len(ids) <= 100 or not earlier
            assert mask.sum() == mask_alone.sum()


def test_make_shop(tmp_path):
    rng = random.Random(0)
    old = tool_use.make_shop(tmp_path / "a" / "old.db", ITEMS, rng)
    new = tool_use.make_shop(tmp_path / "a" / "new.db", ITEMS[3:], rng, unlike=old)
    assert all(new[item] != old[item] for item in new)
    assert len(set(new.values())) == len(new)
    assert all(10 <= price <= 99 for price in new.values())
    db = tools.open_database(tmp_path / "a" / "new.db")
    for item, price in new.items():
        statement = f"SELECT price FROM shop WHERE item = '{item}'"
        assert tools.run_query(db, statement) == str(price)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["new.db", "old.db"]


@pytest.mark.parametrize("seed", range(12))
def test_the_two_shops_differ_in_every_price(tmp_path, seed):
    old, new, known = tool_use.make_shops(tmp_path, random.Random(seed))
    assert set(old) <= set(known)
    assert len(set(new) - set(known)) == 8
    assert not any(new[item] == price for item, price in old.items() if item in new)


def test_guess_rate_by_hand(shop_db):
    rng = random.Random(0)
    prices = [tool_use.draw_task("price", 0, SHOP, rng) for _ in range(60)]
    assert tool_use.guess_rate(prices, shop_db) == {"price": 0.0}, "no two prices are alike"
    statements = ["SELECT 1", "SELECT 1.0 * 1", "SELECT 2", "SELECT 1 + 1", "SELECT 3"]
    tasks = [tool_use.Task("x", [], statement, "") for statement in statements]
    assert tool_use.guess_rate(tasks, shop_db) == {"x": 2 / 10}


# The experiment

@pytest.fixture
def chain(tmp_path, monkeypatch):
    """A folder as pretraining leaves it, with a few of the village's records."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 128, 2, 2, 64))
    gpt.save_model(tmp_path / "gpt.pt", model, ENC, "", val_fraction=0.05)
    prompt = user("Is this a good or a bad feeling? Tom is sad.")
    task = {"kind": "classify", "topic": "tone", "known": True, "feeling": "bad"}
    demonstration = json.dumps({"messages": prompt + assistant("This is a bad feeling.")})
    test_prompt = json.dumps({"prompt": prompt, "task": task})
    (tmp_path / "sft_train.jsonl").write_text(8 * (demonstration + "\n"))
    (tmp_path / "prompts_test.jsonl").write_text(test_prompt + "\n")
    monkeypatch.setattr(corpus, "ensure", lambda folder, seed: tmp_path)
    return tmp_path


def read_log(folder):
    return [json.loads(line) for line in (folder / "tools.jsonl").read_text().splitlines()]


def test_a_model_learns_to_call_and_to_continue(chain, shop_db):
    """It learns one task by heart. In shops with other prices its response follows the shop."""
    items = ["red kite", "blue hat"]
    task = tool_use.draw_task("price", 0, dict.fromkeys(items, 1), random.Random(0))
    examples = []
    for price in (11, 40, 73, 99):
        db = open_shop(chain / f"{price}.db", dict.fromkeys(items, price))
        call, rest = tool_use.tool_examples([task], db, ENC)
        if not examples:
            examples.append(call)   # the call is the same in every shop
        examples.append(rest)
    cfg = tool_use.Config(out=str(chain), epochs=100, lr=5e-3, batch_tokens=300)
    model = tool_use.train("tool", chain / "gpt.pt", examples, torch.device("cpu"), cfg)
    cfg = tool_use.Config()
    other = open_shop(chain / "other.db", dict.fromkeys(items, 62))
    assert tool_use.accuracy(model, ENC, [task], shop_db, True, cfg) == {"price": 1.0}
    assert tool_use.accuracy(model, ENC, [task], other, True, cfg) == {"price": 1.0}
    assert tool_use.accuracy(model, ENC, [task], other, False, cfg) == {"price": 0.0}


def test_the_command(chain, capsys):
    cfg = dict(out=str(chain), demos=12, epochs=1, n=2, max_new_tokens=8, device="cpu")
    tool_use.main(tool_use.Config(**cfg))
    shown = capsys.readouterr().out
    assert "a guess" in shown
    assert "usual tasks, tool" in shown
    assert "python chat.py --checkpoint" in shown
    log = read_log(chain)
    new, old = log[0]["shop"], log[0]["shop_train"]
    assert all(new[item] != old.get(item) for item in new)
    assert len(set(new) - set(old)) >= 8
    rows = {row["row"]: row for row in log if "row" in row}
    assert rows["no tool"]["price"] == 0
    assert rows["a guess"]["price"] < 0.1
    assert "gold" in rows["usual tasks: tool"]
    files = sorted(file.name for file in (chain / "tools").iterdir())
    assert files == ["sft.pt", "shop.db", "shop_train.db"]
    assert not (chain / "sft.pt").exists(), "evaluate.py would take it for the policy"
    tool_use.main(tool_use.Config(**cfg))
    assert read_log(chain) == log, "same seed, same run"


def pattern_of(wording):
    """A regular expression for a wording with any words in its slots."""
    return re.sub(r"\\\{\w+\\\}", r"[a-z0-9 ]+", re.escape(wording))


def test_held_out_means_held_out(chain, monkeypatch):
    """No training sequence has a wording, an item or a price of the test."""
    trained_on = []

    def train(name, path, examples, device, cfg):
        trained_on.append(examples)
        return gpt.load_model(path)[0]

    monkeypatch.setattr(tool_use, "train", train)
    tool_use.main(tool_use.Config(out=str(chain), demos=1500, n=1, max_new_tokens=4, device="cpu"))
    new, old = read_log(chain)[0]["shop"], read_log(chain)[0]["shop_train"]
    assert len(trained_on) == 2
    for examples in trained_on:
        text = " ".join(decode(ids) for ids, _ in examples)
        for item in set(new) - set(old):
            assert f"The {item} costs {new[item]} " not in text
        for shape in tool_use.SHAPES.values():
            *learned, held_out = shape.wordings
            assert not re.search(pattern_of(held_out), text)
            for wording in learned:
                assert re.search(pattern_of(wording), text), wording
        named = {item for item in new if item in text}
        assert len(set(new) - named) == 8, "eight items are named nowhere"
        for item, price in new.items():
            assert f"The {item} costs {price} coins" not in text


def test_a_stopped_pretraining_is_not_discarded(tmp_path):
    state = tmp_path / "gpt.state"
    state.write_bytes(b"hours of work")
    with pytest.raises(UserError, match="gpt.state: a run .*--resume"):
        tool_use.main(tool_use.Config(out=str(tmp_path), device="cpu"))
    assert state.read_bytes() == b"hours of work"
    assert list(tmp_path.iterdir()) == [state]


@pytest.mark.parametrize("args, part", [
    ("--demos 0", "--demos 0"),
    ("--epoch 3", "--epochs"),
    ("--device tpu", "--device tpu"),
])
def test_a_users_mistake_is_one_line(tmp_path, monkeypatch, capsys, args, part):
    monkeypatch.setattr(sys, "argv", f"tool_use.py --out {tmp_path} {args}".split())
    with pytest.raises(SystemExit) as e:
        start(tool_use.main, tool_use.Config, tool_use.__doc__)
    error = capsys.readouterr().err
    assert e.value.code == 2
    assert error.count("\n") == 1
    assert part in error
