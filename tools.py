"""Tool use: an answer may ask a database, and the result takes the place of the question.

Idea. What changes every day does not belong into weights. So the model writes a query into its answer; generation stops at
`>>>`, the query runs on a SQLite database, its result replaces it, and generation goes on:

    How much is the red kite in the shop?
    The red kite costs <<< SELECT price FROM shop WHERE item = 'red kite' >>>      <- the model; here it is stopped
    The red kite costs 47                                                          <- the database
    The red kite costs 47 coins.                                                   <- the model again

It is taught by demonstrations alone. As the result replaces the statement, each gives two sequences, with these loss masks:

    <|user|> How ... shop? <|end|> <|assistant|> The red kite costs <<< SELECT ... >>>         no end token: the turn is not over
       0      0        0      0          0        1   1   1    1     1    1     1   1
    <|user|> How ... shop? <|end|> <|assistant|> The red kite costs 47 coins. <|end|>          what the database says is no
       0      0        0      0          0        0   0   0    0    0    1       1             habit of the model: mask 0

The database is only read, whatever the model (or whoever talks it into something) writes: see open_database.
Related: Toolformer (2302.04761), where the model finds out by itself where a call helps; WebGPT (2112.09332), which reads the web.

    python tools.py                                            train with and without the tool, ask both about a new shop
    python chat.py --checkpoint out/tools/sft.pt               ask that shop yourself
    python chat.py --checkpoint out/tools/sft.pt --db my.db    or your own: a table shop(item, price) is what it has learned

Five to six minutes on one CPU core. Needs OUT/gpt.pt, trained first when it is missing, and Python 3.11. Read next: chat.py.
"""
import os, random, re, sqlite3, time
from dataclasses import dataclass
from pathlib import Path

import torch

import gpt, sft
from run import UserError, announce
from data.village import WORDS


@dataclass
class Config:
    out: str = "out"
    "folder of this run; checkpoint and shops go to OUT/tools"
    demos: int = 3000
    "questions about the shop to learn from; they are mixed with the usual demonstrations"
    epochs: int = 4
    "passes over the data"
    lr: float = 1e-3
    "peak learning rate, cosine to a tenth"
    batch_tokens: int = 1024
    "tokens per step, padding included; half of sft.py's: copying a number into a statement wants many steps"
    n: int = 100
    "questions of each shape and wording in the test"
    prompts: str = ""
    "prompts with tasks, to see that nothing else is lost; empty: OUT/data/prompts_test.jsonl"
    max_new_tokens: int = 100
    "longest piece of an answer: a statement takes up to 60 tokens"
    gold: str = "data.village:gold"
    "module:function that grades (task, answer), for reports only"
    seed: int = 0
    "same seed, same machine, same run"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


FUNCTIONS = set("count sum total avg min max abs round length lower upper trim substr instr coalesce ifnull nullif like".split())
# A query may build no long text, and be none: nested SELECTs that repeat a column can take SQLite for ever to compile, where no
# clock ticks; 200 characters of them take a tenth of a second.
LIMITS = dict(LENGTH=10_000, SQL_LENGTH=200, COLUMN=32, EXPR_DEPTH=50, COMPOUND_SELECT=5, VDBE_OP=25_000, FUNCTION_ARG=10,
              ATTACHED=0, LIKE_PATTERN_LENGTH=100, VARIABLE_NUMBER=0, TRIGGER_DEPTH=1, WORKER_THREADS=0)
NOTHING = "[nothing found]"
MAX_CALLS = 3


def open_database(path):
    """-> a connection that can do nothing but SELECT from the tables of this file. Raises UserError where there is no database.

    Three walls, each enough against DROP: the file is opened read-only; an authorizer is asked about every table, function and
    action while a statement is compiled, and knows SELECT, the file's own tables and a list of harmless functions, nothing else
    (no ATTACH, no PRAGMA, no recursion, no schema); SQLite's own limits bound what a value or a statement may become.
    """
    path = Path(path)
    if not hasattr(sqlite3.Connection, "setlimit"):
        raise UserError("the SQL tool needs Python 3.11 or newer")
    if not path.is_file():
        raise UserError(f"{path}: no such database")
    try:
        with open(path, "rb") as f:
            header = f.read(20)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    if header[:16] != b"SQLite format 3\0":
        raise UserError(f"{path}: not a SQLite database")
    # `immutable` reads without locks, so it is wrong for a file that others write. But a file in WAL mode (bytes 18 and 19)
    # makes even a reader write -wal and -shm files beside it. So: immutable only for such a file, and only while it is closed.
    log = path.with_name(path.name + "-wal")
    closed = header[18:20] == b"\2\2" and not (log.exists() and log.stat().st_size)
    db = sqlite3.connect(path.resolve().as_uri() + "?mode=ro" + "&immutable=1" * closed, uri=True, timeout=0.1,
                         isolation_level=None, cached_statements=0)
    db.text_factory = lambda raw: raw.decode("utf-8", "replace")
    try:
        # Large sorts go to a temporary file, not to memory; what the schema computes may call nothing but plain functions.
        for setting in ("temp_store = FILE", "trusted_schema = OFF", "query_only = ON"):
            db.execute("PRAGMA " + setting)
        # No views, no virtual tables: what is behind them is somebody's program. A name may be bytes, in a file made for mischief.
        tables = {name for name, in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0")
                  if isinstance(name, str) and not name.startswith("sqlite_")}
    except (sqlite3.Error, UnicodeDecodeError) as e:   # the second: a damaged schema is quoted in SQLite's own error text
        db.close()
        raise UserError(f"{path}: not a readable SQLite database ({clean(str(e), 80)})") from None

    def allow(action, table, name, schema, source):   # source: the view that asks
        ok = (action == sqlite3.SQLITE_SELECT
              or action == sqlite3.SQLITE_FUNCTION and name.lower() in FUNCTIONS
              or action == sqlite3.SQLITE_READ and table in tables and schema in ("main", None) and source is None)
        return sqlite3.SQLITE_OK if ok else sqlite3.SQLITE_DENY

    for name, value in LIMITS.items():
        db.setlimit(getattr(sqlite3, "SQLITE_LIMIT_" + name), value)
    db.set_authorizer(allow)
    return db


def clean(text, most):
    """One printable line of at most `most` characters: a database may hold line breaks and escape codes."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else text[:most - 3] + "..."


def run_query(db, statement, seconds=0.5, rows=10):
    """Run one SELECT -> its values, joined by ", " (at most `rows` rows and 300 characters), or a short error text; no raise."""
    deadline = time.monotonic() + seconds
    if not re.match(r"\s*select\b", statement, re.I):   # for a clear answer; the authorizer is the wall
        return "[error: only SELECT is allowed]"
    cursor = db.cursor()
    db.set_progress_handler(lambda: time.monotonic() > deadline, 100)
    try:
        found = cursor.execute(statement).fetchmany(rows + 1)
    except MemoryError:
        return "[error: out of memory]"
    except (sqlite3.Error, sqlite3.Warning, ValueError) as e:   # ValueError: a NUL or half a surrogate pair in the statement
        code = getattr(e, "sqlite_errorcode", 0) or 0
        known = {sqlite3.SQLITE_INTERRUPT: "the query takes too long", sqlite3.SQLITE_TOOBIG: "too long",
                 sqlite3.SQLITE_BUSY: "the database is busy"}
        text = "only SELECT is allowed" if str(e) == "not authorized" else known.get(code & 255, str(e))
        return f"[error: {clean(text, 80)}]"
    finally:
        cursor.close()   # else a query with more rows would keep its lock on the file
        db.set_progress_handler(None, 0)
    values = [v for row in found[:rows] for v in row]
    if all(v is None for v in values):   # no row, or the sum of none
        return NOTHING
    shown = ["NULL" if v is None else f"[{len(v)} bytes]" if isinstance(v, bytes) else f"{v:.10g}" if isinstance(v, float)
             else str(v) for v in values]
    return clean(", ".join(shown + ["..."] * (len(found) > rows)), 300)


def find_call(text):
    """The first complete <<< statement >>> of a text -> (what stands before it, statement, what follows), or None."""
    before, _, rest = text.partition("<<<")
    statement, closed, after = rest.partition(">>>")
    return (before, statement.strip(), after) if closed else None


def splice(enc, prompt, said, result, block_size, reserve=16):
    """The answer so far, and as much of the result as leaves `reserve` tokens of the context to go on -> text."""
    while result and len(prompt) + len(enc.encode_ordinary(said + result)) > block_size - reserve:
        result = result[:-1]
    return said + result


def answer_with_tools(model, enc, chats, db, max_new_tokens=100, seed=None, **sampling):
    """Answers to chats whose last turn is the user's -> [(text, [(statement, result), ...])]. Without a database (None) the
    statements stay in the text.

    Only what the model wrote since the last result is searched for calls: a result is data, whatever it spells, and its tokens
    are those of ordinary text. After MAX_CALLS results the next call ends the answer.
    """
    end, block = gpt.end_of(enc), model.config.block_size
    prompts = [sft.render_prompt(c, enc) for c in chats]
    said, calls, alive = [""] * len(chats), [[] for _ in chats], list(range(len(chats)))
    for turn in range(MAX_CALLS + 1):
        heads = [prompts[i] + enc.encode_ordinary(said[i]) for i in alive]
        new = gpt.generate(model, heads, max_new_tokens, stop=end, seed=None if seed is None else seed + turn, **sampling)
        going_on = []
        for i, ids in zip(alive, new):
            text = enc.decode([t for t in ids if t != end])
            call = find_call(text) if db else None
            if call is None:
                said[i] += text
                continue
            result = run_query(db, call[1]) if turn < MAX_CALLS else "[error: too many calls]"
            calls[i].append((call[1], result))
            said[i] = splice(enc, prompts[i], said[i] + call[0], result, block)
            if turn < MAX_CALLS and len(prompts[i]) + len(enc.encode_ordinary(said[i])) < block:
                going_on.append(i)
        alive = going_on
    return list(zip(said, calls))


# Shape -> (wordings, the last one held out of training; statement; answer). All name the shop: what a kite costs elsewhere nobody
# in the village knows, and it must stay so.
COST = ["How much is the {} in the shop?", "What does the {} cost in the shop?", "Tell me the price of the {} in the shop.",
        "What is the price of the {} in the shop?", "In the shop, how much is the {}?", "In the shop, what does the {} cost?"]
SHAPES = dict(
    price=([ask.format("{item}") for ask in COST],
           "SELECT price FROM shop WHERE item = '{item}'", "The {item} costs {call} coins."),
    which=(["What can I buy in the shop for {n} coins?", "Which thing in the shop costs {n} coins?",
            "In the shop, what costs {n} coins?", "I have {n} coins. What do I get in the shop?",
            "Tell me what I get for {n} coins in the shop.", "What do I get for {n} coins in the shop?"],
           "SELECT item FROM shop WHERE price = {n}", "For {n} coins you get the {call}."),
    extreme=([ask.format("{most} {thing}") for ask in COST],
             "SELECT {minmax}(price) FROM shop WHERE item LIKE '% {thing}'", "The {most} {thing} costs {call} coins."),
    sum=(["What do the {item} and the {other} cost in the shop?", "How much are the {item} and the {other} in the shop?",
          "I buy the {item} and the {other} in the shop. How much is it?",
          "In the shop, how much are the {item} and the {other}?",
          "Tell me the price of the {item} and the {other} in the shop.",
          "In the shop, what do the {item} and the {other} cost?"],
         "SELECT sum(price) FROM shop WHERE item IN ('{item}', '{other}')", "Together they cost {call} coins."),
    count=(["How many things in the shop cost less than {n} coins?", "How many things cost less than {n} coins in the shop?",
            "Count the things in the shop for less than {n} coins.",
            "Tell me how many things in the shop cost less than {n} coins.",
            "In the shop, how many things cost less than {n} coins?", "In the shop, count the things for less than {n} coins."],
           "SELECT count(*) FROM shop WHERE price < {n}", "In the shop {call} things cost less than {n} coins."))
SHARES = dict(price=0.2, which=0.2, extreme=0.15, sum=0.3, count=0.15)   # of the demonstrations: more of what is harder to copy


def make_shop(path, items, rng, unlike=None):
    """Write a shop: a price of two digits for each item, no two alike, none as in the shop `unlike`. -> {item: price}"""
    while True:
        prices = dict(zip(items, rng.sample(range(10, 100), len(items))))
        if not any(prices[i] == (unlike or {}).get(i) for i in items):
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


def new_question(shape, wording, shop, rng, absent=()):
    """-> {"shape", "messages", "statement", "answer"} about the shop {item: price}; {call} stands in the answer for the result.
    With `absent`, items that the shop does not have: a question to which the database finds nothing."""
    asks, statement, answer = SHAPES[shape]
    item, other = rng.sample(list(shop), 2)
    n = rng.randint(11, 99) if shape == "count" else shop[item]
    if absent:
        item, n = rng.choice(absent), rng.choice([p for p in range(10, 100) if p not in shop.values()])
    minmax, most = rng.choice([("min", "cheapest"), ("max", "dearest")])
    slots = dict(item=item, other=other, n=n, thing=item.split()[-1], minmax=minmax, most=most)
    return dict(shape="nothing" if absent else shape, messages=[{"role": "user", "content": asks[wording].format(**slots)}],
                statement=statement.format(**slots), answer=answer.format(**slots, call="{call}"))


def parts(question, db):
    """-> the right answer in three parts: before the result, the result, after it."""
    result = run_query(db, question["statement"])
    before, after = question["answer"].split("{call}")
    return before, result, ": I do not know." if result == NOTHING else after


def tool_examples(questions, db, enc):
    """The two sequences of each demonstration -> [(ids, mask)], as sft.tokenize gives them."""
    examples = []
    for q in questions:
        before, result, after = parts(q, db)
        prompt = sft.render_prompt(q["messages"], enc)
        call = enc.encode_ordinary(f"{before}<<< {q['statement']} >>>")
        head, tail = prompt + enc.encode_ordinary(before + result), enc.encode_ordinary(after) + [gpt.end_of(enc)]
        for given, learned in ((prompt, call), (head, tail)):
            examples.append((torch.tensor(given + learned), torch.tensor([0] * len(given) + [1] * len(learned))))
    return examples


def later_turns(questions, db, enc, block_size, rng, usual=()):
    """The questions, each behind an earlier turn of a talk, where that fits the context: another question with its answer, or one
    of the `usual` chats. Who has only ever been asked first does not know what to do when asked again."""
    talks = []
    for q in questions:
        other = rng.choice(questions)
        earlier = other["messages"] + [{"role": "assistant", "content": "".join(parts(other, db))}]
        if usual and rng.random() < 0.5:
            earlier = rng.choice(usual)["messages"][:2]
        talk = {**q, "messages": earlier + q["messages"]}
        fits = max(len(ids) for ids, _ in tool_examples([talk], db, enc)) <= block_size
        talks.append(talk if fits else q)
    return talks


def train(name, path, examples, device, cfg):
    """Fine-tune the checkpoint at `path` on (ids, mask) examples, as sft.py does -> model."""
    gpt.set_seed(cfg.seed)
    model = gpt.load_model(path, device)[0]

    def log(**row):
        gpt.log_metrics(Path(cfg.out) / "tools.jsonl", model=name, **row)
    for _ in sft.tune(model, examples, cfg.epochs, cfg.batch_tokens, cfg.lr, cfg.seed, name, log):
        pass
    return model


def accuracy(model, enc, questions, db, executor, cfg):
    """Share of questions, by shape, whose greedy answer is the right sentence, word by word. `db` knows what is right."""
    right = {}
    for start in range(0, len(questions), 200):
        some = questions[start:start + 200]
        chats = [q["messages"] for q in some]
        answers = answer_with_tools(model, enc, chats, db if executor else None, cfg.max_new_tokens, temperature=0)
        for q, (text, _) in zip(some, answers):
            right.setdefault(q["shape"], []).append(text == "".join(parts(q, db)))
    return {shape: sum(r) / len(r) for shape, r in right.items()}


def guess_rate(questions, db):
    """What a guess is worth, by shape: how often the result of another question of the shape is right, too."""
    results = {}
    for q in questions:
        results.setdefault(q["shape"], {})[q["statement"]] = run_query(db, q["statement"])
    rates = {}
    for shape, found in results.items():
        found = list(found.values())
        pairs = [a == b for i, a in enumerate(found) for b in found[:i]]
        rates[shape] = sum(pairs) / max(1, len(pairs))
    return rates


def two_shops(folder, rng):
    """-> (shop of the training, new shop, the items that training may name); shops are {item: price}. Eight items are sold in the
    new shop alone and never named before; of the others neither shop has all, and what both have costs something else."""
    items = [f"{c} {t}" for c in WORDS["colour"] for t in WORDS["thing"]]
    rng.shuffle(items)
    unseen, known = items[:8], items[8:]
    sold, sold_new = rng.sample(known, 24), unseen + rng.sample(known, 20)
    old = make_shop(folder / "shop_train.db", sold, rng)
    return old, make_shop(folder / "shop.db", sold_new, rng, unlike=old), known


def databases(cfg):
    return [open_database(Path(cfg.out) / "tools" / name) for name in ("shop_train.db", "shop.db")]


def lesson(shop, known, n, rng):
    """n questions to learn from; a quarter of those for a price or an item find nothing."""
    questions = []
    for shape in (rng.choices(list(SHARES), list(SHARES.values()))[0] for _ in range(n)):
        absent = [i for i in known if i not in shop] if shape in ("price", "which") and rng.random() < 0.25 else ()
        questions.append(new_question(shape, rng.randrange(5), shop, rng, absent))
    return questions


def exam(shop, known, wordings, n, rng):
    """n questions of each shape, and n to which there is no answer."""
    absent = [i for i in known if i not in shop]
    return [new_question(shape, rng.choice(wordings), shop, rng) for shape in SHAPES for _ in range(n)] + [
        new_question(rng.choice(["price", "which"]), rng.choice(wordings), shop, rng, absent) for _ in range(n)]


def show(label, rates, log):
    gpt.log_metrics(log, row=label, **rates)
    print(f"{label:<39}" + "".join(f"{rates[s]:9.1%}" if s in rates else f"{'-':>9}" for s in [*SHAPES, "nothing"]))


def usual_tasks(models, enc, db, cfg, path, log):
    """Gold of the village's usual tasks, sampled as eval.py does, and how often a call was made where none belongs."""
    prompts = [r for _, r in sft.read_records(path)]
    gold = sft.gold_hook(cfg.gold, prompts)
    for name, model in models.items() if gold else ():
        answers = answer_with_tools(model, enc, [p["prompt"] for p in prompts], db, cfg.max_new_tokens, seed=cfg.seed)
        golds = torch.tensor([gold(p["task"], text) for p, (text, _) in zip(prompts, answers)])
        calls = sum(bool(c) for _, c in answers) / len(answers)
        mean, half = golds.mean().item(), 1.96 * golds.std(correction=0).item() / len(golds) ** 0.5
        gpt.log_metrics(log, row=f"usual tasks: {name}", gold=mean, gold_ci=half, needless_calls=calls)
        print(f"usual tasks, {name:<10} gold {mean:.2f} ±{half:.2f}, calls {calls:.1%}")


def report(models, enc, old, new, known, cfg, rng):
    """Print and log who answers how much: each row a model, a set of questions, and the database that knows the right answers."""
    log, (old_db, new_db) = Path(cfg.out) / "tools.jsonl", databases(cfg)
    seen, reworded = (exam(new, known, wordings, cfg.n, rng) for wordings in (range(5), [5]))
    theirs = exam(old, known, range(5), cfg.n, rng)
    never = [new_question("price", rng.randrange(5), {i: new[i] for i in new if i not in known}, rng) for _ in range(cfg.n)]
    second = later_turns(seen, new_db, enc, models["tool"].config.block_size, rng)
    second = [q for q in second if len(q["messages"]) > 1]
    print(f"\nright answers, greedy, word by word    " + "".join(f"{s:>9}" for s in [*SHAPES, "nothing"]))
    for label, asked, db, executor in (
            ("tool", seen, new_db, True), ("tool, second question", second, new_db, True),
            ("tool, held-out wording", reworded, new_db, True), ("tool, items never named", never, new_db, True),
            ("tool, executor off", seen, new_db, False), ("no tool", seen, new_db, False),
            ("no tool, shop of training", theirs, old_db, False)):
        show(label, accuracy(models[label.split(",")[0]], enc, asked, db, executor, cfg), log)
    show("a guess", guess_rate([q for q in seen if q["shape"] != "nothing"], new_db), log)
    return seen[::cfg.n]


def main(cfg):
    gpt.require(cfg, 1, "demos", "epochs", "batch_tokens", "max_new_tokens", "n")
    gpt.require(cfg, 0, "lr", most=10)
    device, out = gpt.pick_device(cfg.device), gpt.run_folder(cfg.out)
    if not (out / "gpt.pt").exists():
        announce(out / "gpt.pt", "pretraining it", False)
        gpt.main(gpt.Config(out=cfg.out, seed=cfg.seed, device=cfg.device))
    _, enc, base = gpt.load_model(out / "gpt.pt", device)
    data, rng, folder, log = sft.village_data(out, cfg.seed), random.Random(cfg.seed), out / "tools", out / "tools.jsonl"
    old, new, known = two_shops(folder, rng)
    old_db, new_db = databases(cfg)
    block, chats = base["gpt"]["block_size"], sft.load_chats(data / "sft_train.jsonl", cfg.seed)
    questions = lesson(old, known, cfg.demos, rng)
    questions += later_turns(rng.sample(questions, len(questions) // 3), old_db, enc, block, rng, chats)
    usual = sft.tokenize(chats, enc, block)
    told = [{"messages": q["messages"] + [{"role": "assistant", "content": "".join(parts(q, old_db))}]} for q in questions]
    print(f"tools.py: {len(usual):,} usual chats, {len(questions):,} about the shop, device {device}")
    gpt.log_metrics(log, fresh=True, shop=new, shop_train=old)
    models = {"tool": train("tool", out / "gpt.pt", usual + tool_examples(questions, old_db, enc), device, cfg)}
    gpt.save_model(folder / "sft.pt", models["tool"], enc, base["tokenizer"], seed=cfg.seed)
    models["no tool"] = train("no tool", out / "gpt.pt", usual + sft.tokenize(told, enc, block), device, cfg)
    if (out / "sft.pt").exists():
        models["sft.pt"] = gpt.load_model(out / "sft.pt", device)[0]
    examples = report(models, enc, old, new, known, cfg, rng)
    usual_tasks(models, enc, new_db, cfg, Path(cfg.prompts or data / "prompts_test.jsonl"), log)
    for q in examples:
        (text, calls), = answer_with_tools(models["tool"], enc, [q["messages"]], new_db, cfg.max_new_tokens, temperature=0)
        print(f"--- {q['messages'][0]['content']!r}\n" + "".join(f"    {s} -> {r}\n" for s, r in calls) + repr(text))
    print(f"---\nsaved {folder / 'sft.pt'}; next: python chat.py --checkpoint {folder / 'sft.pt'}")


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
