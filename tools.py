"""Tool calls: a model may write a SQL query into its response, and the result replaces the query.

Idea. Facts that change every day do not belong in the weights. Generation stops at `>>>`, the query
runs on a SQLite database, the result takes its place, and generation continues:

    How much is the red kite in the shop?
    The red kite costs <<< SELECT price FROM shop WHERE item = 'red kite' >>>  the model stops here
    The red kite costs 47                                                      the database
    The red kite costs 47 coins.                                               the model again

The database is only read, whatever the model writes: see open_database. The result is data: it is
not searched for calls, and it cannot contain a special token. To train a model to make calls:

    python lab/tool_use.py                                     train, and test on a new shop
    python chat.py --checkpoint out/tools/sft.pt               ask about that shop yourself
    python chat.py --checkpoint out/tools/sft.pt --db my.db    or use your own: shop(item, price)

Related: Toolformer (2302.04761), WebGPT (2112.09332). Read next: chat.py.
"""
import re
import sqlite3
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import gpt
from data.tokenizer import end_of
from scaffold.cli import UserError
from sft import decode_response, render_prompt

FUNCTIONS = set("count sum total avg min max abs round length lower upper trim substr instr "
                "coalesce ifnull nullif like".split())
# SQL_LENGTH matters most. SQLite can take forever to compile nested SELECTs that repeat a column,
# and run_query cannot interrupt its compiler; 200 characters of them take a tenth of a second.
LIMITS = dict(LENGTH=10_000, SQL_LENGTH=200, COLUMN=32, EXPR_DEPTH=50, COMPOUND_SELECT=5,
              VDBE_OP=25_000, FUNCTION_ARG=10, ATTACHED=0, LIKE_PATTERN_LENGTH=100,
              VARIABLE_NUMBER=0, TRIGGER_DEPTH=1, WORKER_THREADS=0)
NOTHING = "[nothing found]"
TOO_MANY = "[error: too many calls]"
MAX_CALLS = 3


class Call(NamedTuple):   # found in a string: before <<< statement >>> after
    before: str
    statement: str
    after: str


class Query(NamedTuple):
    statement: str
    result: str


class Response(NamedTuple):
    text: str       # calls are replaced by their results
    queries: list   # of Query, in the order they ran


def open_database(path):
    """Open a SQLite file -> a connection that can only SELECT from the tables of this file.

    There are four defences. Each of the first two alone stops a DROP:
    - The file is opened read-only.
    - SQLite asks an authorizer about every action, table and function of a statement. It allows
      SELECT, the file's own tables and FUNCTIONS, and denies the rest: ATTACH, PRAGMA, recursion,
      the schema.
    - SQLite's own limits bound the size of values and statements; run_query limits the time.
    - The schema has no code: no views, and no columns or indexes that are computed.
    Raises UserError if `path` is not a readable SQLite database or has such code.
    """
    path = Path(path)
    db = sqlite3.connect(read_only_uri(path), uri=True, timeout=0.1, isolation_level=None,
                         cached_statements=0)
    db.text_factory = lambda raw: raw.decode("utf-8", "replace")
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)   # of each definition in the schema
    try:
        db.execute("PRAGMA temp_store = FILE")      # large sorts go to a temporary file
        db.execute("PRAGMA trusted_schema = OFF")   # schemas may call only safe functions
        db.execute("PRAGMA query_only = ON")
        with time_limit(db, 1):
            tables, code = read_schema(db)
    except (sqlite3.Error, UnicodeDecodeError, MemoryError) as e:
        db.close()   # SQLite's message may quote a damaged schema
        message = one_line(describe(e), 80)
        raise UserError(f"{path}: not a readable SQLite database ({message})") from None
    if code:
        db.close()
        raise UserError(f"{path}: {one_line(code[0], 40)} is a view, a virtual table or computed; "
                        "the tool reads plain tables (CREATE TABLE new AS SELECT * FROM old)")

    def authorize(action, table, name, schema, view):
        """Allow or deny one action; `view` is the view that asks, None for the statement itself."""
        if action == sqlite3.SQLITE_READ:
            allowed = table in tables and schema in ("main", None) and view is None
        elif action == sqlite3.SQLITE_FUNCTION:
            allowed = name.lower() in FUNCTIONS
        else:
            allowed = action == sqlite3.SQLITE_SELECT
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    for name, value in LIMITS.items():
        db.setlimit(getattr(sqlite3, "SQLITE_LIMIT_" + name), value)
    db.set_authorizer(authorize)
    return db


def read_schema(db):
    """Return (names of the tables, names of what computes values: views, generated columns, ...).

    SQLite expands such code while it compiles a statement, before it asks the authorizer and where
    no clock can stop it: 16 views that each refer twice to the one before take a second.
    """
    found = db.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    # Only sql is sure: a hostile file may call a view a table, and a name may be bytes.
    plain = re.compile("CREATE (TABLE|INDEX|UNIQUE INDEX|TRIGGER) ")
    code = [name for _, name, sql in found if sql and not plain.match(str(sql))]
    if not code:   # with views, the next line would expand them
        code = [name for name, in db.execute(
            "SELECT m.name FROM sqlite_master m, pragma_table_xinfo(m.name) WHERE hidden > 1 UNION "
            "SELECT m.name FROM sqlite_master m, pragma_index_xinfo(m.name) WHERE cid = -2")]
    tables = {name for kind, name, _ in found
              if kind == "table" and isinstance(name, str) and not name.startswith("sqlite_")}
    return tables, code


@contextmanager
def time_limit(db, seconds):
    """Interrupt `db` if the block takes longer. No progress handler: count(*) never calls it."""
    done = threading.Event()

    def watch():
        done.wait(seconds)
        while not done.wait(0.01):   # between two statements SQLite forgets an interrupt
            db.interrupt()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def read_only_uri(path):
    """Return the URI that opens a SQLite file read-only. Raises UserError for any other file."""
    if not path.is_file():
        raise UserError(f"{path}: no such database")
    with open(path, "rb") as f:
        header = f.read(20)
    if header[:16] != b"SQLite format 3\0":
        raise UserError(f"{path}: not a SQLite database")
    uri = path.resolve().as_uri() + "?mode=ro"
    # In WAL mode (header bytes 18, 19) even a reader writes two files beside the database, except
    # with `immutable`. But that takes no locks, so no other process may have it open.
    log = path.with_name(path.name + "-wal")
    if header[18:20] == b"\2\2" and not (log.exists() and log.stat().st_size):
        uri += "&immutable=1"
    return uri


def one_line(text, limit):
    """Make one printable line of at most `limit` characters: data may hold escape codes."""
    text = "".join(c if c.isprintable() else " " for c in str(text))
    return text if len(text) <= limit else text[:limit - 3] + "..."


def run_query(db, statement, seconds=0.5, rows=10):
    """Run one SELECT -> its values in one printable line, or "[error: ...]". Never raises."""
    # This check is only for a clear message; the authorizer enforces the rule.
    if not re.match(r"\s*select\b", statement, re.I):
        return "[error: only SELECT is allowed]"
    cursor = db.cursor()
    try:
        with time_limit(db, seconds):
            found = cursor.execute(statement).fetchmany(rows + 1)
    except MemoryError:
        return "[error: out of memory]"
    except (sqlite3.Error, sqlite3.Warning, ValueError) as e:   # ValueError: NUL, lone surrogate
        return f"[error: {one_line(describe(e), 80)}]"
    finally:
        cursor.close()   # an unfinished query would keep its lock on the file
    values = [value for row in found[:rows] for value in row]
    if all(value is None for value in values):   # no rows, or an aggregate of no rows
        return NOTHING
    shown = [format_value(value) for value in values]
    if len(found) > rows:
        shown.append("...")
    return one_line(", ".join(shown), 300)


def describe(error):
    """Put an error of sqlite3 into a few words."""
    if str(error) == "not authorized":
        return "only SELECT is allowed"
    code = getattr(error, "sqlite_errorcode", None) or 0
    known = {sqlite3.SQLITE_INTERRUPT: "the query takes too long",
             sqlite3.SQLITE_TOOBIG: "too long", sqlite3.SQLITE_BUSY: "the database is busy"}
    return known.get(code & 255, str(error))   # the low byte is the primary code


def format_value(value):
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"[{len(value)} bytes]"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def find_call(text):
    """Find the first complete <<< statement >>> -> Call, or None."""
    before, _, rest = text.partition("<<<")
    statement, closed, after = rest.partition(">>>")
    return Call(before, statement.strip(), after) if closed else None


def splice(enc, prompt, text, result, block_size, reserve=16):
    """Append a result to the response so far, cut so that `reserve` tokens of context stay free."""
    while result and len(prompt) + len(enc.encode_ordinary(text + result)) > block_size - reserve:
        result = result[:-1]
    return text + result


def respond_with_tools(model, enc, chats, db, max_new_tokens=100, seed=None, **sampling):
    """Sample responses to chats whose last turn is the user's, and run their calls -> [Response].

    Without a database (None) the statements stay in the text. A call counts only if the model wrote
    all of it since the last result. After MAX_CALLS results, the next call ends the response.
    chat.respond repeats this loop: it yields one chat token by token, this one samples a batch.
    """
    block_size = model.config.block_size
    prompts = [render_prompt(chat, enc) for chat in chats]
    texts = [""] * len(chats)
    queries = [[] for _ in chats]
    active = list(range(len(chats)))
    for turn in range(MAX_CALLS + 1):
        heads = [prompts[i] + enc.encode_ordinary(texts[i]) for i in active]
        new = gpt.generate(model, heads, max_new_tokens, stop=end_of(enc),
                           seed=None if seed is None else seed + turn, **sampling)
        unfinished = []
        for i, ids in zip(active, new):
            written = decode_response(ids, enc)
            call = find_call(written) if db else None
            if call is None:
                texts[i] += written
                continue
            result = run_query(db, call.statement) if turn < MAX_CALLS else TOO_MANY
            queries[i].append(Query(call.statement, result))
            texts[i] = splice(enc, prompts[i], texts[i] + call.before, result, block_size)
            head = prompts[i] + enc.encode_ordinary(texts[i])
            if turn < MAX_CALLS and len(head) < block_size:
                unfinished.append(i)
        active = unfinished
    return [Response(text, made) for text, made in zip(texts, queries)]
