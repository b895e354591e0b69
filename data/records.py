"""Files become records: JSON, JSON lines, CSV and TSV.

    read_bytes        the content of a file, decompressed if its name ends in .gz
    read_records      [(where, record)], where is 'file:line' for messages
    read_usable       the same for records of one format; counts those that cannot be used
"""
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from pathlib import Path

from data.encodings import decode
from scaffold.cli import UserError, brief

# The first bytes of files that are no text, and what to do with them.
BINARY = {
    b"PAR1": "a parquet file; convert it to JSON lines, with pandas: "
             "read_parquet(IN).to_json(OUT, orient='records', lines=True)",
    b"ARROW1": "an Arrow file; convert it to JSON lines, with pandas: "
               "read_feather(IN).to_json(OUT, orient='records', lines=True)",
    b"\x1f\x8b": "compressed with gzip; let its name end in .gz",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unzip it, or save it as CSV",
}

# A file of one object is a record if it has one of these keys; else the object may wrap a list.
RECORD_KEYS = {"messages", "conversations", "conversation", "prompt", "instruction", "question",
               "query", "chosen", "rejected", "responses", "output", "completion", "text"}


class Unusable(UserError):
    """A well-formed record that a script cannot use. Readers skip it and count its reason."""

    def __init__(self, where, reason):
        super().__init__(f"{where}: {reason}")
        self.reason = reason


def read_bytes(path):
    """Return the content of a file, decompressed if it ends in .gz. Raises UserError."""
    try:
        raw = path.read_bytes()
        if path.suffix.lower() != ".gz":
            return refuse_binary(raw, path)
        # Text shrinks 3 to 20 times; a file made to fill the memory shrinks 1,000 times.
        most = max(10_000_000, 100 * len(raw))
        content = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(most + 1)
    except OSError as e:   # BadGzipFile is an OSError
        raise UserError(f"{path}: {e.strerror or e}") from None
    except (EOFError, zlib.error):
        raise UserError(f"{path}: the compressed file is damaged or cut off") from None
    if len(content) > most:
        raise UserError(f"{path}: decompresses to more than 100 times its size, unlike any text; "
                        f"if you trust it: gunzip {path}")
    return refuse_binary(content, path)


def refuse_binary(raw, path):
    """Return the bytes of a text. Raises UserError for well-known files of other kinds."""
    for magic, advice in BINARY.items():
        if raw.startswith(magic):
            raise UserError(f"{path}: {advice}")
    return raw


def kind_of(path):
    """Return the ending of a file name, such as ".jsonl"; a ".gz" behind it does not count."""
    path = Path(str(path).lower())
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def parse_json(text, where):
    """Return the value of a JSON string. Raises UserError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not a JSON object ({brief(e)})") from None


def json_values(text, path):
    """Read one JSON value a line, or values that span lines -> [(where, value)]."""
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:   # splitlines() would also cut at U+2028
        return []
    try:
        json.loads(lines[0][1])
    except (ValueError, RecursionError):
        return spanning_values(text, path)
    return [(f"{path}:{i}", parse_json(line, f"{path}:{i}")) for i, line in lines]


def spanning_values(text, path):
    """Read pretty-printed JSON values -> [(where, value)], where names the line they start in."""
    decoder = json.JSONDecoder()
    blank = re.compile(r"\s*")
    values = []
    line = 1
    end = 0
    while True:
        start = blank.match(text, end).end()
        line += text.count("\n", end, start)
        if start == len(text):
            return values
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{line}: not a JSON object ({brief(e)})") from None
        values.append((f"{path}:{line}", value))
        line += text.count("\n", start, end)


def is_list_of_objects(value):
    """Return whether a JSON value is a list of objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def is_chat(value):
    """Return whether a JSON value is a bare list of messages, not a list of records."""
    return (is_list_of_objects(value) and bool(value)
            and all("role" in m or "from" in m for m in value))


def unwrap(values, path):
    """Turn a file of one list, or of one object around a list, into the items of the list."""
    if len(values) != 1:
        return values
    [(_, value)] = values
    if isinstance(value, dict) and not RECORD_KEYS & set(value):
        lists = [v for v in value.values() if isinstance(v, list) and not is_chat(v)
                 and all(isinstance(item, (dict, list)) for item in v)]
        if len(lists) == 1:
            value = lists[0]
    if not isinstance(value, list) or is_chat(value):
        return values
    return [(f"{path}: record {i}", item) for i, item in enumerate(value, 1)]


def table_rows(text, path):
    """Read the rows of a CSV or TSV file with a header -> [(where, record)].

    The names of the header are taken in lower case. Empty cells are None.

    The columns are parted by tabs in a .tsv file, else by the most common of comma, semicolon and
    tab in the header.
    """
    header = text.lstrip("\r\n").split("\n")[0]
    parted_by = "\t" if kind_of(path) == ".tsv" else max(",;\t", key=header.count)
    csv.field_size_limit(2**31 - 1)   # a document may be longer than the 128 KB of the default
    # Not strict, the reader would take the rest of the file for a cell that lacks a quote.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=parted_by, strict=True)
    names = None
    rows = []
    line = 1
    try:
        for cells in reader:
            where = f"{path}:{line}"
            line = reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if names is None:
                names = [cell.strip().lower() for cell in cells]
                if len(set(names)) < len(names):
                    raise UserError(f"{where}: two columns of the header have the same name")
                continue
            if len(cells) != len(names):
                raise UserError(f"{where}: {len(cells)} cells, but the header has {len(names)}")
            rows.append((where, {name: cell or None for name, cell in zip(names, cells)}))
    except csv.Error as e:
        raise UserError(f"{path}:{line}: not a row of cells ({brief(e)}); "
                        f"a quote inside a quoted cell is written twice") from None
    return rows


def read_records(path):
    """Read a .json, .jsonl, .csv or .tsv file, plain or .gz -> [(where, record)].

    A bare list of messages becomes {"messages": list}. Raises UserError unless the file holds at
    least one record and every record is an object.
    """
    path = Path(path)
    text = decode(read_bytes(path), path)
    if kind_of(path) in (".csv", ".tsv"):
        records = table_rows(text, path)
    else:
        records = unwrap(json_values(text, path), path)
        records = [(where, {"messages": r} if is_list_of_objects(r) else r)
                   for where, r in records]
    if not records:
        raise UserError(f"{path}: no records in it")
    for where, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return records


def read_usable(path, read, wanted):
    """Read the usable records of a file -> [read(record, where)].

    `read` raises UserError for a malformed record and Unusable for one to skip. How many are
    skipped is printed with the reasons. Raises UserError if more than half are skipped: then the
    file is probably not what the user thinks. wanted: what a usable record has, for this message.
    """
    kept, reasons = [], Counter()
    for where, record in read_records(path):
        try:
            kept.append(read(record, where))
        except Unusable as e:
            reasons[e.reason] += 1
    skipped = reasons.total()
    total = len(kept) + skipped
    if 2 * skipped > total:
        [(reason, n)] = reasons.most_common(1)
        found = f"only {len(kept)} of {total} records have" if kept else "no record has"
        raise UserError(f"{path}: {found} {wanted}; {n} of {total} skipped: {reason}")
    for reason, n in reasons.most_common():
        print(f"{path}: {n} of {total} records skipped: {reason}")
    return kept
