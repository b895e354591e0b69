"""The results table counts what its columns say."""
import json
import math
import random
import re
import shutil

import pytest
import torch

import evaluate
import gpt
import ppo
import reward
import sft
from data import exam
from data.checkpoint import tokenizer_entries
from data.probes import KINDS, probe_pairs
from data.tokenizer import get_tokenizer
from data.village import new_task
from lab_run import make_run
from scaffold.cli import UserError
from scaffold.run import load_checkpoint, save_checkpoint
from scaffold.table import format_table
from tiny import (
    END, ENC, ROOT, SPECIAL, Recorder, assistant, read_jsonl, save_reward, user, write_jsonl,
    write_tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of untrained checkpoints of all kinds: bad models, but every count must be right."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    text = folder / "text.txt"
    text.write_text("The cow says moo. " * 200)
    for stage in ("gpt", "sft", "ppo", "variant"):
        model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 96, 1, 2, 32))
        extra = dict(seed=7, data=str(text), val_fraction=0.5, mixture="")
        gpt.save_model(folder / f"{stage}.pt", model, ENC, "", **extra)
    shutil.copy(folder / "sft.pt", folder / "same.pt")
    save_reward(folder / "reward.pt", reward.RewardModel(gpt.load_model(folder / "sft.pt")[0]))
    rng = random.Random(0)
    (folder / "data").mkdir()
    for name, use in (("test", None), ("unanswerable", "open_qa"), ("answerable", "extract")):
        tasks = [new_task(rng, use=use) for _ in range(24)]
        records = [{"prompt": messages, "task": task} for task, messages in tasks]
        write_jsonl(folder / "data" / f"prompts_{name}.jsonl", *records)
    return folder


def test_rows_and_their_order(folder):
    cfg = evaluate.Config(out=str(folder), best_of=2, max_new_tokens=4)
    rows = evaluate.evaluate(cfg)
    stages = ["base", "sft", "sft-greedy", "best-of-2", "ppo", "ppo-greedy", "same", "same-greedy",
              "variant", "variant-greedy"]
    assert [r["stage"] for r in rows] == [*stages, "reward"]
    by_stage = {r["stage"]: r for r in rows}
    documented = {
        "stage", "seed", "gold", "win_rate_vs_sft", "hallucination_rate", "rude_rate",
        "kl_to_sft", "lm_loss", "length", "n", "refused_rate", "right_rate", "wrong_rate",
        "n_answerable", "n_unanswerable",
    }
    assert documented <= set(by_stage["ppo"])
    assert by_stage["sft"]["kl_to_sft"] == 0
    assert by_stage["same"]["kl_to_sft"] == pytest.approx(0, abs=1e-6)
    assert by_stage["ppo"]["kl_to_sft"] != 0
    assert by_stage["best-of-2"]["kl_to_sft"] == pytest.approx(math.log(2) - 0.5)
    assert by_stage["sft-greedy"]["gold_minus_greedy"] == 0
    assert by_stage["ppo"]["n"] == 24
    assert by_stage["ppo"]["seed"] == 7
    assert by_stage["best-of-2"]["reward"] >= by_stage["sft"]["reward"] - 1
    assert by_stage["ppo"]["n_answerable"] + by_stage["ppo"]["n_unanswerable"] > 48
    assert len(format_table(rows[:-1], exam.COLUMNS).splitlines()) == len(rows)
    json.dumps(rows)


def test_the_row_of_the_reward_model_holds_its_rates_on_probe_pairs(folder):
    cfg = evaluate.Config(out=str(folder), best_of=0, max_new_tokens=2)
    row = evaluate.evaluate(cfg)[-1]
    names = ("test", "unanswerable", "answerable")
    records = [r for name in names for r in read_jsonl(folder / "data" / f"prompts_{name}.jsonl")]
    pairs = probe_pairs(records)
    model, enc = reward.load_reward(folder / "reward.pt")
    for kind in KINDS:
        some = [p for p in pairs if p["kind"] == kind]
        better = 0
        for pair in some:
            better += (reward.score_responses(model, enc, [pair["prompt"]], [pair["chosen"]])
                       > reward.score_responses(model, enc, [pair["prompt"]], [pair["rejected"]]))
        assert row[f"n_{kind}"] == len(some) > 0
        assert row[kind] == pytest.approx(better / len(some), abs=1e-9)


def test_the_probes_are_printed_below_the_table_and_left_out_without_a_reward_model(
        folder, tmp_path, capsys):
    evaluate.main(evaluate.Config(out=str(folder), best_of=0, max_new_tokens=2))
    printed = capsys.readouterr().out
    table, probes = printed.split("\n\n")
    assert "right vs wrong" in probes
    assert "reward  " not in table.split("\n", 1)[1], "the reward model is no policy"
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "reward.pt").unlink()
    evaluate.main(evaluate.Config(out=str(tmp_path / "run"), best_of=0, max_new_tokens=2))
    assert "\n\n" not in capsys.readouterr().out


def test_ppo_ends_with_the_table_that_evaluate_prints(tmp_path, capsys):
    """Also if its --seed is not that of the stages before it."""
    out = make_run(tmp_path)
    model = reward.RewardModel(gpt.load_model(out / "sft.pt")[0])
    save_reward(out / "reward.pt", model)
    ppo.main(ppo.Config(
        out=str(out), seed=3, updates=1, rollout_size=4, epochs=1, minibatches=1, value_warmup=0,
        max_new_tokens=4, ptx=0.0, lr=1e-2))
    _, printed = capsys.readouterr().out.split("no stage has seen\n")
    evaluate.main(evaluate.Config(out=str(out), save=str(tmp_path / "rows.jsonl")))
    assert capsys.readouterr().out + f"wrote {out / 'report.html'}\n" == printed
    assert (tmp_path / "rows.jsonl").read_bytes() == (out / "eval.jsonl").read_bytes()
    assert "right vs wrong" in printed


def test_the_win_rate_is_one_half_if_all_responses_have_equal_grades(folder, monkeypatch):
    def load_grader(spec, records, flag):
        return lambda task, response: dict(helpful=1.0, honest=0.0, harmless=0.0)

    monkeypatch.setattr(exam, "load_grader", load_grader)
    rows = evaluate.evaluate(evaluate.Config(out=str(folder), best_of=0, max_new_tokens=2))
    rates = [(r["win_rate_vs_sft"], r["win_rate_ci"]) for r in rows if r["stage"] != "reward"]
    assert set(rates) == {(0.5, 0.0)}


@pytest.fixture
def own(folder, tmp_path):
    """A run on files of a user: no village, no grader; sft.pt names its chats."""
    out = tmp_path / "own"
    shutil.copytree(folder, out)
    shutil.rmtree(out / "data")
    chats = [{"messages": [user(f"What is {i}?"), assistant("A number.")]} for i in range(100)]
    names = [str(write_jsonl(out / "chats.jsonl", *chats)), ""]
    save_checkpoint(out / "sft.pt", **load_checkpoint(out / "sft.pt") | dict(data=names))
    return out


def test_a_run_without_grades_gets_the_columns_that_need_none(own, capsys):
    cfg = evaluate.Config(out=str(own), best_of=2, max_new_tokens=6)
    rows = {row["stage"]: row for row in evaluate.evaluate(cfg)}
    graded = ("gold", "win_rate_vs_sft", "hallucination_rate", "rude_rate")
    assert all(row[key] is None for row in rows.values() for key in graded)
    assert {row["n"] for row in rows.values()} == {5}
    assert rows["sft"]["kl_to_sft"] == 0
    assert rows["ppo"]["kl_to_sft"] != 0
    assert rows["ppo"]["lm_loss"] > 0
    assert rows["same"]["reward"] == rows["sft"]["reward"]
    assert rows["best-of-2"]["reward_win_rate"] >= rows["sft"]["reward_win_rate"] - 0.5
    assert "right_rate" not in rows["sft"]
    assert "reward" not in rows, "the probes need the village's tasks"
    capsys.readouterr()
    evaluate.main(cfg)
    printed, notices = capsys.readouterr()
    heads = ["stage", "reward", "reward wins", "±", "ended", "KL", "lm loss", "length"]
    assert re.split(r"  +", printed.splitlines()[0]) == heads
    assert len(printed.splitlines()) == 1 + len(rows)
    assert "not graded" in notices


def test_the_rate_of_ends_and_wins_is_of_the_printed_responses(own, monkeypatch):
    """Scores and ends are counted again, from the responses that the models gave."""
    samples = Recorder(monkeypatch, sft, "sample_responses")
    cfg = evaluate.Config(out=str(own), best_of=0, max_new_tokens=40)
    rows = {row["stage"]: row for row in evaluate.evaluate(cfg)}
    model, enc = reward.load_reward(own / "reward.pt")
    (_, theirs), (args, mine) = samples.calls[:2]
    ended = [end for _, end in mine]
    assert rows["sft"]["end_rate"] == sum(ended) / len(ended)
    for (text, end) in mine:
        assert end == (len(enc.encode_ordinary(text)) < 40)
    scores = [reward.score_responses(model, enc, args[2], texts)
              for texts in ([text for text, _ in mine], theirs)]
    wins = [(a > b) + (a == b) / 2 for a, b in zip(*scores)]
    assert rows["sft"]["reward_win_rate"] == pytest.approx(sum(wins) / len(wins))
    assert rows["sft"]["reward"] == pytest.approx(sum(scores[0]) / len(wins))


def test_what_is_missing_leaves_columns_out(own, capsys):
    """Neither a reward model nor the text of pretraining is needed; stdout has the rows only."""
    (own / "reward.pt").unlink()
    (own / "text.txt").unlink()
    state = load_checkpoint(own / "gpt.pt")
    save_checkpoint(own / "gpt.pt", **state | dict(data="gone.txt"))
    pairs = [{"prompt": f"Hi {i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    prompts = write_jsonl(own / "pairs.jsonl", *pairs, {"prompt": "Hi " * 90})
    evaluate.main(evaluate.Config(out=str(own), prompts=str(prompts), json=True, max_new_tokens=4))
    printed, notices = capsys.readouterr()
    rows = [json.loads(line) for line in printed.splitlines()]
    assert {row["lm_loss"] for row in rows} == {row["reward"] for row in rows} == {None}
    assert {row["n"] for row in rows} == {3}
    assert "no LM loss" in notices
    assert "gone.txt" in notices


def test_response_logprobs_are_summed_over_the_response_and_its_end(folder):
    model, enc, _ = gpt.load_model(folder / "ppo.pt")
    chat = [user("Hi")]
    prompt = [SPECIAL["<|user|>"], *enc.encode_ordinary("Hi"), END, SPECIAL["<|assistant|>"]]
    response = [*enc.encode_ordinary("The cow."), END]
    logprobs = gpt.token_logprobs(model, torch.tensor([prompt + response]))
    want = logprobs[0, len(prompt) - 1:].sum()
    got = evaluate.response_logprobs(model, enc, [chat, chat * 3], ["The cow.", "x"])
    assert torch.allclose(got[0], want, atol=1e-5)


def test_a_folder_without_a_fine_tuned_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="sft.py"):
        evaluate.evaluate(evaluate.Config(out=str(tmp_path)))


def with_other_tokenizer(path, tmp_path):
    """Save a checkpoint again as one of a tokenizer whose last two tokens are swapped."""
    ranks = json.loads((ROOT / "data" / "tokenizer.json").read_text())["ranks"]
    other = write_tokenizer(tmp_path / "other.json", ranks=[*ranks[:-2], *reversed(ranks[-2:])])
    save_checkpoint(path, **load_checkpoint(path) | tokenizer_entries(get_tokenizer(other), other))


def test_a_policy_of_another_tokenizer_is_left_out(own, tmp_path, capsys):
    with_other_tokenizer(own / "ppo.pt", tmp_path)
    rows = evaluate.evaluate(evaluate.Config(out=str(own), best_of=0, max_new_tokens=4))
    assert "ppo.pt has another tokenizer than sft.pt: left out" in capsys.readouterr().err
    assert {"ppo", "ppo-greedy"}.isdisjoint(row["stage"] for row in rows)
    assert "variant" in {row["stage"] for row in rows}


def test_a_reward_model_of_another_tokenizer_is_refused(own, tmp_path):
    with_other_tokenizer(own / "reward.pt", tmp_path)
    with pytest.raises(UserError, match="differ in tokenizer"):
        evaluate.evaluate(evaluate.Config(out=str(own), best_of=0, max_new_tokens=4))


def test_prompts_of_kinds_that_the_village_does_not_know_are_not_graded(own, capsys):
    records = [{"prompt": f"What is {i}?", "task": {"kind": "arithmetic"}} for i in range(9)]
    path = write_jsonl(own / "mine.jsonl", *records)
    cfg = evaluate.Config(out=str(own), prompts=str(path), best_of=0, max_new_tokens=4)
    rows = evaluate.evaluate(cfg)
    assert {row["gold"] for row in rows} == {None}
