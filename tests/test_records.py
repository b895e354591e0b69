"""Tests of data/records.py: every layout of a file gives the same records, or one clear line."""

import csv
import gzip
import io
import json

import pytest

from data.records import Unusable, kind_of, read_records, read_usable
from scaffold.cli import UserError

A = {"instruction": "Say [it], {please}.", "input": "a\nb, c", "output": '"It", \t;he said.'}
B = {"instruction": "牛\u2028\x85?", "input": None, "output": "x"}
CHAT = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
FROM = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]


def records_of(path):
    return [record for _, record in read_records(path)]


def pretty(value):
    return json.dumps(value, indent=4, ensure_ascii=False)


LAYOUTS = {
    "wrapped": json.dumps({"data": [A, B]}),
    "wrapped, pretty": pretty({"version": "1.0", "license": None, "examples": [A, B]}),
    "wrapped beside a list of strings": json.dumps({"train": [A, B], "tags": ["x", "y"]}),
    "pretty, one after the other": pretty(A) + "\n" + pretty(B) + "\n",
    "pretty, in one line": pretty(A) + pretty(B),
    "pretty list": "\n" + pretty([A, B]),
    "first line alone": json.dumps(A) + "\n\n" + json.dumps(B),
}


@pytest.mark.parametrize("content", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.json.gz", "f"])
def test_every_layout_of_json_gives_the_same_records(tmp_path, content, name):
    raw = content.encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert records_of(path) == [A, B]


ONE_RECORD = [A, {"messages": CHAT}, {"conversations": FROM, "id": 1}, {"prompt": CHAT, "x": [A]},
              {"chosen": CHAT, "rejected": CHAT}, {"messages": CHAT, "tools": [{"name": "f"}]}]


@pytest.mark.parametrize("record", ONE_RECORD)
@pytest.mark.parametrize("write", [json.dumps, pretty])
def test_a_file_of_one_record_is_not_taken_for_a_wrapped_list(tmp_path, record, write):
    path = tmp_path / "f.json"
    path.write_text(write(record))
    assert records_of(path) == [record]
    path.write_text(write([record]))
    assert records_of(path) == [record]


BARE = {
    "one chat": json.dumps(CHAT),
    "one chat, pretty": pretty(CHAT),
    "a chat a line": json.dumps(CHAT) + "\n" + json.dumps(CHAT),
    "a list of chats": pretty([CHAT, CHAT]),
    "wrapped chats": json.dumps({"data": [CHAT, CHAT]}),
}


@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("chat", [CHAT, FROM], ids=["role", "from"])
def test_a_bare_list_of_messages_is_a_chat(tmp_path, name, chat):
    path = tmp_path / "f.jsonl"
    content = BARE[name]
    for message, other in zip(CHAT, chat):
        content = content.replace(json.dumps(message), json.dumps(other))
    path.write_text(content)
    found = records_of(path)
    assert len(found) == (1 if name.startswith("one") else 2)
    assert all(set(record) == {"messages"} for record in found)
    assert [len(record["messages"]) for record in found] == [2] * len(found)


def table(rows, **options):
    out = io.StringIO()
    csv.writer(out, **options).writerows(rows)
    return out.getvalue()


ROWS = [list(A), *[[r[key] for key in A] for r in (A, B)]]
TABLES = {  # name, content
    "comma": ("f.csv", table(ROWS)),
    "semicolon": ("f.csv", table(ROWS, delimiter=";")),
    "tabs in .csv": ("f.csv", table(ROWS, delimiter="\t")),
    "tabs": ("f.tsv", table(ROWS, delimiter="\t")),
    "Unix": ("f.csv", table(ROWS, lineterminator="\n")),
    "all quoted": ("f.csv", table(ROWS, quoting=csv.QUOTE_ALL)),
    "blank rows": ("f.csv", "\r\n" + table([*ROWS[:2], [], [" "], ROWS[2], []])),
    "spaces in the header": ("f.csv", table([[" instruction ", "input", "output "], *ROWS[1:]])),
    "capitals": ("F.CSV", table([["Instruction", "Input", "OUTPUT"], *ROWS[1:]])),
    "UTF-8 of Excel": ("f.csv", "\ufeff" + table(ROWS)),
}


@pytest.mark.parametrize("name, content", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_every_layout_of_a_table_gives_the_same_records(tmp_path, name, content, encoding):
    raw = content.removeprefix("\ufeff" if encoding == "utf-16" else "").encode(encoding)
    (tmp_path / name).write_bytes(raw)
    assert records_of(tmp_path / name) == [A, B]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
    assert records_of(tmp_path / f"{name}.gz") == [A, B]


def test_a_cell_may_be_longer_than_the_reader_of_the_library_allows(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text(table([["text"], ["x" * 200_000]]))
    assert records_of(path) == [{"text": "x" * 200_000}]


BAD = {  # name, content -> what the message says
    "a missing cell": ("f.csv", "a,b\n1,2\n3\n", "f.csv:3: 1 cells, but the header has 2"),
    "a cell too many": ("f.tsv", "a\tb\n1\t2\t3\n", "f.tsv:2: 3 cells, but the header has 2"),
    "behind a cell of two lines": ("f.csv", 'a,b\n"1\n1",2\n3\n', "f.csv:4: 1 cells"),
    "a name twice": ("f.csv", "a,b,a\n1,2,3\n", "f.csv:1: two columns"),
    "an open quote": ("f.csv", 'a,b\n1,"2\n3,4\n5,6\n', "f.csv:2: not a row of cells"),
    "text behind a quote": ("f.csv", 'a,b\n1,"2" x\n', "f.csv:2: not a row of cells"),
    "a header alone": ("f.csv", "a,b\n", "f.csv: no records"),
    "an empty table": ("f.tsv", "", "f.tsv: no records"),
    "pretty, damaged": ("f.json", pretty(A) + '\n{\n  "a": 1,\n', "f.json:6: not a JSON object"),
    "a damaged first line": ("f.jsonl", '{"a": \n{"b": 1}\n', "f.jsonl:1: not a JSON object"),
    "a number in a line": ("f.jsonl", '{"a": 1}\n3\n', "f.jsonl:2: expected a JSON object"),
    "an empty wrapped list": ("f.json", '{"data": []}', "f.json: no records"),
    "parquet": ("f.parquet", "PAR1...", "to_json"),
    "parquet by another name": ("f.jsonl", "PAR1...", "a parquet file; convert it to JSON lines"),
    "a zip file": ("f.json", "PK\3\4...", "unzip"),
}


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD)
def test_a_bad_file_is_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode())
    with pytest.raises(UserError) as e:
        read_records(tmp_path / name)
    assert message in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_a_gzip_file_needs_its_ending(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match="let its name end in .gz"):
        read_records(tmp_path / "f.jsonl")


@pytest.mark.parametrize("name, kind", [
    ("a.jsonl", ".jsonl"), ("a.b.csv.gz", ".csv"), ("a.json.txt", ".txt"), ("a", ""), ("a.gz", ""),
    ("A.JSONL.GZ", ".jsonl"),
])
def test_the_kind_of_a_file_is_its_last_ending_but_gz(name, kind):
    assert kind_of(name) == kind


# Usable records


def read(record, where):
    if "why" in record:
        raise Unusable(where, record["why"])
    return record["n"]


def write(tmp_path, good, *why):
    path = tmp_path / "f.jsonl"
    records = [{"n": n} for n in range(good)] + [{"why": reason} for reason in why]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_unusable_records_are_counted_by_reason(tmp_path, capsys):
    path = write(tmp_path, 3, "odd", "old", "old")
    assert read_usable(path, read, "a number") == [0, 1, 2]
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 2 of 6 records skipped: old", f"{path}: 1 of 6 records skipped: odd"]


def test_more_than_half_unusable_stop_with_the_commonest_reason(tmp_path, capsys):
    path = write(tmp_path, 2, "odd", "old", "old")
    with pytest.raises(UserError) as e:
        read_usable(path, read, "a number")
    assert str(e.value) == (f"{path}: only 2 of 5 records have a number; 2 of 5 skipped: old")
    with pytest.raises(UserError, match="no record has a number; 1 of 1 skipped: odd"):
        read_usable(write(tmp_path, 0, "odd"), read, "a number")
    assert capsys.readouterr().out == ""
