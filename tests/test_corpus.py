"""The files: no user in two splits, held-out phrasings held out, same bytes for the same seed."""
import json
import re
from collections import Counter

import pytest

from data import corpus
from scaffold.cli import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("world"), seed=3, megabytes=0.3)


def records(folder, name):
    with open(folder / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_no_user_is_in_two_splits_or_asks_more_than_200_times(folder):
    users, asked = {}, Counter()
    for name in corpus.SIZES:
        split = name.split("_")[1]
        split = split if split in ("train", "val") else "test"
        for record in records(folder, name):
            users.setdefault(split, set()).add(record["user"])
            asked[record["user"]] += 1
    assert set(users) == {"train", "val", "test"}
    assert max(asked.values()) <= corpus.CAP
    assert not users["train"] & users["val"]
    assert not users["train"] & users["test"]
    assert not users["val"] & users["test"]


def test_the_last_phrasing_of_a_task_is_in_prompts_rephrased_alone(folder):
    def prompts(name):
        return [record["prompt"][-1]["content"] for record in records(folder, name)]

    last = ("Make up a story", "Can you write", "Tell buyers")
    for prompt in prompts("prompts_train"):
        assert not prompt.startswith(last)
    assert any(prompt.startswith(last) for prompt in prompts("prompts_rephrased"))


def test_the_last_phrasing_has_no_word_that_pretraining_has_not(folder):
    """It tests whether the model reads a new sentence, not whether it knows a new word."""
    def words(text):
        return set(re.findall(r"\w+", text.lower()))

    known = set.union(*(words(path.read_text()) for path in (folder / "pretrain").glob("*.txt")))
    for record in records(folder, "prompts_rephrased"):
        assert words(record["prompt"][-1]["content"]) <= known


@pytest.mark.parametrize("name, known", [("answerable", True), ("unanswerable", False)])
def test_answerable_and_unanswerable_prompts_have_the_same_use_cases(folder, name, known):
    tasks = [record["task"] for record in records(folder, f"prompts_{name}")]
    assert {task["known"] for task in tasks} == {known}
    assert {task["use"] for task in tasks} == {"open_qa", "closed_qa", "extract", "chat"}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(tmp_path, folder):
    again = corpus.write(tmp_path / "a", 3, 0.3)
    other = corpus.write(tmp_path / "b", 4, 0.3)
    names = files(folder)
    assert len(names) > 12
    assert names == files(again)
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert (folder / "sft_train.jsonl").read_bytes() != (other / "sft_train.jsonl").read_bytes()


def test_an_incomplete_folder_is_written_again(tmp_path, monkeypatch):
    corpus.write(tmp_path, 3, 0.05)
    (tmp_path / "village.json").unlink()
    (tmp_path / "sft_train.jsonl").write_text("half")
    monkeypatch.setattr(corpus, "SIZES", {"sft_train": 20})
    corpus.ensure(tmp_path, 3)
    assert len(records(tmp_path, "sft_train")) == 20


def test_ensure_keeps_a_complete_folder(tmp_path):
    corpus.write(tmp_path, 3, 0.05)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert corpus.ensure(str(tmp_path), 3) == tmp_path
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


@pytest.mark.parametrize("name", ["village.json", *(f"{name}.jsonl" for name in corpus.SIZES)])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\0", None])
def test_damaged_data_is_named_with_what_to_delete(tmp_path, monkeypatch, name, content):
    """None cuts the file in its last line. Deleting the named file mends it."""
    monkeypatch.setattr(corpus, "SIZES", dict.fromkeys(corpus.SIZES, 5))
    corpus.write(tmp_path, 3, 0.01)
    path = tmp_path / name
    good = path.read_bytes()
    path.write_bytes(good[:-5] if content is None else content)
    sign = tmp_path / "village.json"
    with pytest.raises(UserError, match=f"{path}.*generated: delete {sign}") as e:
        corpus.ensure(tmp_path, 3)
    assert "\n" not in str(e.value)
    sign.unlink()
    corpus.ensure(tmp_path, 3)
    assert path.read_bytes() != content
    corpus.ensure(tmp_path, 3)


def test_files_of_a_user_with_the_village_s_names_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "write", lambda folder, seed: None)
    (tmp_path / "sft_train.jsonl").write_text("mine")
    (tmp_path / "chats.jsonl").write_text("mine, too")
    corpus.ensure(tmp_path, 0)
    kept = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert kept == {"sft_train.jsonl.old": "mine", "chats.jsonl": "mine, too"}
    assert "sft_train.jsonl is kept as sft_train.jsonl.old" in capsys.readouterr().out
