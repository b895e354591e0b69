"""Tool use: does a model that queries a database beat one that memorises it?

Claim (Toolformer, 2302.04761; WebGPT, 2112.09332). A model that writes queries gives right answers
about a database it has never seen. A model fine-tuned on the same facts knows only the old ones.

tools.py has the protocol. A model learns it from demonstrations alone. The result replaces the
statement, so each demonstration gives two training sequences, with these loss masks:

    <|user|> How ... shop? <|end|> <|assistant|> The red kite costs <<< SELECT ... >>>
       0      0        0      0          0        1   1   1    1     1    1     1   1
    <|user|> How ... shop? <|end|> <|assistant|> The red kite costs 47 coins. <|end|>
       0      0        0      0          0        0   0   0    0    0    1       1

The first has no end token, because the turn is not over. In the second the result has mask 0: the
model must not learn to write what the database says.

Two copies of OUT/gpt.pt are fine-tuned on the village's chats and on tasks about one shop. "tool"
learns to call; "no tool" learns the responses with the results filled in. Both are tested on a new
shop, where every price is different.

    python lab/tool_use.py                           both models, then the table of right responses
    python chat.py --checkpoint out/tools/sft.pt     ask about the new shop yourself

Five to six minutes on one CPU core. Needs OUT/gpt.pt (trained first if missing) and Python 3.11.
Read next: chat.py.
"""
import os
import random
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
import sft
from data import corpus
from data.formats import load_chats, load_grader
from data.records import read_records
from data.tokenizer import end_of
from data.village import WORDS
from scaffold.cli import BaseConfig, pick_device, require, run_folder, start
from scaffold.run import ensure_stage, log_metrics, set_seed
from tools import NOTHING, open_database, respond_with_tools, run_query


@dataclass
class Config(BaseConfig):
    demos: int = 3000            # tasks about the shop, mixed with the village's demonstrations
    epochs: int = 4              # passes over the data
    lr: float = 1e-3             # peak learning rate, cosine to a tenth
    batch_tokens: int = 1024     # tokens per step, padding included; half of sft.py's, because
                                 # copying a number takes many steps to learn
    n: int = 100                 # test tasks of each shape and wording
    prompts: str = ""            # the usual tasks; empty: OUT/data/prompts_test.jsonl
    max_new_tokens: int = 100    # longest piece of a response; a statement takes up to 60 tokens
    gold: str = "data.village:gold"   # module:function that grades (task, response), for reports


class Shape(NamedTuple):
    wordings: list   # the last one is held out of training
    statement: str
    response: str    # {call} stands for the result


class Task(NamedTuple):
    shape: str        # a key of SHAPES, or "nothing" if the database has no answer
    prompt: list      # messages
    statement: str
    response: str     # {call} stands for the result


class Row(NamedTuple):
    """One line of the results table."""
    label: str
    model: str
    tasks: list
    db: sqlite3.Connection   # holds the right results
    executor: bool           # False: the model's calls are not run


# Every wording names the shop. The village asks for such prices without naming a shop, too; then
# the right response is that nobody knows.
COST = ["How much is the {} in the shop?",
        "What does the {} cost in the shop?",
        "Tell me the price of the {} in the shop.",
        "What is the price of the {} in the shop?",
        "In the shop, how much is the {}?",
        "In the shop, what does the {} cost?"]
SHAPES = dict(
    price=Shape([wording.format("{item}") for wording in COST],
                "SELECT price FROM shop WHERE item = '{item}'",
                "The {item} costs {call} coins."),
    which=Shape(["What can I buy in the shop for {n} coins?",
                 "Which thing in the shop costs {n} coins?",
                 "In the shop, what costs {n} coins?",
                 "I have {n} coins. What do I get in the shop?",
                 "Tell me what I get for {n} coins in the shop.",
                 "What do I get for {n} coins in the shop?"],
                "SELECT item FROM shop WHERE price = {n}",
                "For {n} coins you get the {call}."),
    extreme=Shape([wording.format("{most} {thing}") for wording in COST],
                  "SELECT {minmax}(price) FROM shop WHERE item LIKE '% {thing}'",
                  "The {most} {thing} costs {call} coins."),
    sum=Shape(["What do the {item} and the {other} cost in the shop?",
               "How much are the {item} and the {other} in the shop?",
               "I buy the {item} and the {other} in the shop. How much is it?",
               "In the shop, how much are the {item} and the {other}?",
               "Tell me the price of the {item} and the {other} in the shop.",
               "In the shop, what do the {item} and the {other} cost?"],
              "SELECT sum(price) FROM shop WHERE item IN ('{item}', '{other}')",
              "Together they cost {call} coins."),
    count=Shape(["How many things in the shop cost less than {n} coins?",
                 "How many things cost less than {n} coins in the shop?",
                 "Count the things in the shop for less than {n} coins.",
                 "Tell me how many things in the shop cost less than {n} coins.",
                 "In the shop, how many things cost less than {n} coins?",
                 "In the shop, count the things for less than {n} coins."],
                "SELECT count(*) FROM shop WHERE price < {n}",
                "Things for less than {n} coins: {call}."))
# Shares of the training tasks: what is harder to copy gets more.
SHARES = dict(price=0.2, which=0.2, extreme=0.15, sum=0.3, count=0.15)
COLUMNS = [*SHAPES, "nothing"]


def make_shop(path, items, rng, unlike=None):
    """Write a shop to a SQLite file -> {item: price}.

    Prices are distinct two-digit numbers. No item costs the same as in the shop `unlike`.
    """
    unlike = unlike or {}
    while True:
        prices = dict(zip(items, rng.sample(range(10, 100), len(items))))
        if not any(prices[item] == unlike.get(item) for item in items):
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    db = sqlite3.connect(part)
    with db:
        db.execute("CREATE TABLE shop (item TEXT PRIMARY KEY, price INTEGER)")
        db.executemany("INSERT INTO shop VALUES (?, ?)", prices.items())
    db.close()
    os.replace(part, path)
    return prices


def make_shops(folder, rng):
    """Write the training shop and the new shop -> (old, new, known); the shops are {item: price}.

    `known` lists the items that training may name. Eight items of the new shop are not among them.
    Neither shop sells all known items, and items in both shops have different prices.
    """
    items = [f"{colour} {thing}" for colour in WORDS["colour"] for thing in WORDS["thing"]]
    rng.shuffle(items)
    unseen, known = items[:8], items[8:]
    old_items = rng.sample(known, 24)
    new_items = unseen + rng.sample(known, 20)
    old = make_shop(folder / "shop_train.db", old_items, rng)
    new = make_shop(folder / "shop.db", new_items, rng, unlike=old)
    return old, new, known


def draw_task(shape, wording, shop, rng, absent=()):
    """Draw a Task of a shape about the shop {item: price}.

    absent: items that the shop does not sell. If given, the database has no answer.
    """
    wordings, statement, response = SHAPES[shape]
    item, other = rng.sample(list(shop), 2)
    n = rng.randint(11, 99) if shape == "count" else shop[item]
    if absent:
        item = rng.choice(absent)
        n = rng.choice([price for price in range(10, 100) if price not in shop.values()])
    minmax, most = rng.choice([("min", "cheapest"), ("max", "dearest")])
    slots = dict(item=item, other=other, n=n, thing=item.split()[-1], minmax=minmax, most=most)
    return Task(shape="nothing" if absent else shape,
                prompt=[{"role": "user", "content": wordings[wording].format(**slots)}],
                statement=statement.format(**slots),
                response=response.format(**slots, call="{call}"))


def training_tasks(shop, known, n, rng):
    """Draw n tasks; the database finds nothing for a quarter of the shapes price and which."""
    missing = [item for item in known if item not in shop]
    tasks = []
    for _ in range(n):
        shape = rng.choices(list(SHARES), list(SHARES.values()))[0]
        absent = missing if shape in ("price", "which") and rng.random() < 0.25 else ()
        tasks.append(draw_task(shape, rng.randrange(5), shop, rng, absent))
    return tasks


def held_out_tasks(shop, known, wordings, n, rng):
    """Draw n tasks of each shape, and n for which the database finds nothing."""
    missing = [item for item in known if item not in shop]
    tasks = []
    for shape in SHAPES:
        tasks += [draw_task(shape, rng.choice(wordings), shop, rng) for _ in range(n)]
    for _ in range(n):
        shape = rng.choice(["price", "which"])
        tasks.append(draw_task(shape, rng.choice(wordings), shop, rng, missing))
    return tasks


def response_parts(task, db):
    """Split the right response into three strings: before the result, the result, after it."""
    result = run_query(db, task.statement)
    before, after = task.response.split("{call}")
    return before, result, ": I do not know." if result == NOTHING else after


def right_response(task, db):
    return "".join(response_parts(task, db))


def tool_examples(tasks, db, enc):
    """Make the two training sequences of each task -> [sft.Example]."""
    examples = []
    for task in tasks:
        before, result, after = response_parts(task, db)
        prompt = sft.render_prompt(task.prompt, enc)
        call = enc.encode_ordinary(f"{before}<<< {task.statement} >>>")
        head = prompt + enc.encode_ordinary(before + result)
        tail = enc.encode_ordinary(after) + [end_of(enc)]
        examples += [sft.response_example(given, learned)
                     for given, learned in ((prompt, call), (head, tail))]
    return examples


def with_earlier_turn(tasks, db, enc, block_size, rng, chats=()):
    """Put an earlier turn before each task: another task with its response, or one from `chats`.

    A task that would then exceed the context stays as it is. Without such examples the model fails
    on every turn but the first.
    """
    longer = []
    for task in tasks:
        other = rng.choice(tasks)
        earlier = [*other.prompt, {"role": "assistant", "content": right_response(other, db)}]
        if chats and rng.random() < 0.5:
            earlier = rng.choice(chats)["messages"][:2]
        follow_up = task._replace(prompt=earlier + task.prompt)
        n_tokens = max(len(ids) for ids, _ in tool_examples([follow_up], db, enc))
        longer.append(follow_up if n_tokens <= block_size else task)
    return longer


def train(name, path, examples, device, cfg):
    """Fine-tune the checkpoint at `path` on examples, as sft.py does -> model."""
    set_seed(cfg.seed)
    model, _, _ = gpt.load_model(path, device)

    def log(**row):
        log_metrics(Path(cfg.out) / "tools.jsonl", model=name, **row)

    epochs = sft.fine_tune(model, examples, cfg.epochs, cfg.batch_tokens, cfg.lr, cfg.seed, name,
                           log)
    for _ in epochs:
        pass
    return model


def accuracy(model, enc, tasks, db, executor, cfg):
    """Compute the share of tasks whose greedy response is right, word by word -> {shape: share}."""
    right = {}
    for first in range(0, len(tasks), 200):
        batch = tasks[first:first + 200]
        responses = respond_with_tools(model, enc, [task.prompt for task in batch],
                                       db if executor else None, cfg.max_new_tokens, temperature=0)
        for task, response in zip(batch, responses):
            hit = response.text == right_response(task, db)
            right.setdefault(task.shape, []).append(hit)
    return {shape: sum(hits) / len(hits) for shape, hits in right.items()}


def guess_rate(tasks, db):
    """Compute how often two different statements of a shape have the same result -> {shape: rate}.

    This is the accuracy of a model that guesses.
    """
    results = {}
    for task in tasks:
        results.setdefault(task.shape, {})[task.statement] = run_query(db, task.statement)
    rates = {}
    for shape, by_statement in results.items():
        found = list(by_statement.values())
        same = [a == b for i, a in enumerate(found) for b in found[:i]]
        rates[shape] = sum(same) / max(1, len(same))
    return rates


def report_row(label, rates, log):
    log_metrics(log, row=label, **rates)
    cells = [f"{rates[shape]:.1%}" if shape in rates else "-" for shape in COLUMNS]
    print(f"{label:<39}" + "".join(f"{cell:>9}" for cell in cells))


def report(models, enc, old, new, known, cfg, rng):
    """Print and log the accuracy of each model -> one test task of each shape."""
    log = Path(cfg.out) / "tools.jsonl"
    old_db, new_db = open_shops(cfg)
    block_size = models["tool"].config.block_size
    seen = held_out_tasks(new, known, range(5), cfg.n, rng)
    reworded = held_out_tasks(new, known, [5], cfg.n, rng)
    old_shop = held_out_tasks(old, known, range(5), cfg.n, rng)
    unnamed = {item: price for item, price in new.items() if item not in known}
    never_named = [draw_task("price", rng.randrange(5), unnamed, rng) for _ in range(cfg.n)]
    second = with_earlier_turn(seen, new_db, enc, block_size, rng)
    second = [task for task in second if len(task.prompt) > 1]
    rows = [Row("tool", "tool", seen, new_db, True),
            Row("tool, second question", "tool", second, new_db, True),
            Row("tool, held-out wording", "tool", reworded, new_db, True),
            Row("tool, items never named", "tool", never_named, new_db, True),
            Row("tool, executor off", "tool", seen, new_db, False),
            Row("no tool", "no tool", seen, new_db, False),
            Row("no tool, shop of training", "no tool", old_shop, old_db, False)]
    print("\nright responses, greedy, word by word  " + "".join(f"{shape:>9}" for shape in COLUMNS))
    for label, name, tasks, db, executor in rows:
        report_row(label, accuracy(models[name], enc, tasks, db, executor, cfg), log)
    answerable = [task for task in seen if task.shape != "nothing"]
    report_row("a guess", guess_rate(answerable, new_db), log)
    return seen[::cfg.n]


def report_usual_tasks(models, enc, db, cfg, path):
    """Print and log the gold grade of the village's usual tasks and the share of needless calls."""
    records = [record for _, record in read_records(path)]
    gold = load_grader(cfg.gold, records)
    if not gold:
        return
    prompts = [record["prompt"] for record in records]
    for name, model in models.items():
        responses = respond_with_tools(model, enc, prompts, db, cfg.max_new_tokens, seed=cfg.seed)
        golds = torch.tensor([gold(record["task"], response.text)
                              for record, response in zip(records, responses)])
        mean = golds.mean().item()
        half = 1.96 * golds.std(correction=0).item() / len(golds) ** 0.5   # of a 95% interval
        calls = sum(len(response.queries) > 0 for response in responses) / len(responses)
        log_metrics(Path(cfg.out) / "tools.jsonl", row=f"usual tasks: {name}", gold=mean,
                        gold_ci=half, needless_calls=calls)
        print(f"usual tasks, {name:<10} gold {mean:.2f} ±{half:.2f}, calls {calls:.1%}")


def print_samples(model, enc, tasks, db, cfg):
    for task in tasks:
        response, = respond_with_tools(model, enc, [task.prompt], db, cfg.max_new_tokens,
                                       temperature=0)
        print(f"--- {task.prompt[0]['content']!r}")
        for query in response.queries:
            print(f"    {query.statement} -> {query.result}")
        print(repr(response.text))


def open_shops(cfg):
    folder = Path(cfg.out) / "tools"
    return open_database(folder / "shop_train.db"), open_database(folder / "shop.db")


def main(cfg):
    require(cfg, 1, "demos", "epochs", "batch_tokens", "max_new_tokens", "n")
    require(cfg, 0, "lr", most=10)
    device = pick_device(cfg.device)
    out = run_folder(cfg.out)
    ensure_stage(out / "gpt.pt", gpt, cfg)
    _, enc, base = gpt.load_model(out / "gpt.pt", device)
    block_size = base["gpt"]["block_size"]
    data = corpus.ensure(out / "data", cfg.seed)
    rng = random.Random(cfg.seed)
    old, new, known = make_shops(out / "tools", rng)
    old_db, new_db = open_shops(cfg)

    chats = load_chats(data / "sft_train.jsonl", cfg.seed)
    tasks = training_tasks(old, known, cfg.demos, rng)
    third = rng.sample(tasks, len(tasks) // 3)
    tasks += with_earlier_turn(third, old_db, enc, block_size, rng, chats)
    usual = sft.tokenize(chats, enc, block_size)
    print(f"tool_use.py: {len(usual):,} usual chats, {len(tasks):,} shop tasks, device {device}")
    log_metrics(out / "tools.jsonl", fresh=True, shop=new, shop_train=old)

    examples = usual + tool_examples(tasks, old_db, enc)
    models = {"tool": train("tool", out / "gpt.pt", examples, device, cfg)}
    gpt.save_model(out / "tools" / "sft.pt", models["tool"], enc, base["tokenizer"], seed=cfg.seed)
    filled_in = []
    for task in tasks:
        response = {"role": "assistant", "content": right_response(task, old_db)}
        filled_in.append({"messages": [*task.prompt, response]})
    examples = usual + sft.tokenize(filled_in, enc, block_size)
    models["no tool"] = train("no tool", out / "gpt.pt", examples, device, cfg)
    if (out / "sft.pt").exists():
        models["sft.pt"], _, _ = gpt.load_model(out / "sft.pt", device)

    samples = report(models, enc, old, new, known, cfg, rng)
    prompts = Path(cfg.prompts or data / "prompts_test.jsonl")
    report_usual_tasks(models, enc, new_db, cfg, prompts)
    print_samples(models["tool"], enc, samples, new_db, cfg)
    saved = out / "tools" / "sft.pt"
    print(f"---\nsaved {saved}; next: python chat.py --checkpoint {saved}")


if __name__ == "__main__":
    start(main, Config, __doc__)
