"""The table must count as it says it counts."""
import json
import math
import random

import pytest
import torch

import eval as results
import gpt
import reward
import sft
from data.village import new_task
from gpt import UserError

ENC = gpt.get_tokenizer()


def test_interval_by_hand():
    mean, half = results.interval([0.0, 1.0, 0.5, 0.5])
    assert mean == 0.5 and half == pytest.approx(1.96 * math.sqrt(0.5 / 3) / 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with untrained checkpoints of all kinds: numbers mean nothing, bookkeeping must be right all the same."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    (folder / "text.txt").write_text("The cow says moo. " * 200)
    for stage in ("gpt", "sft", "ppo", "variant"):
        model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 96, 1, 2, 32))
        gpt.save_model(folder / f"{stage}.pt", model, ENC, "", seed=7, data=str(folder / "text.txt"), val_fraction=0.5, mixture="")
    torch.save(torch.load(folder / "sft.pt"), folder / "same.pt")
    rm = reward.RewardModel(gpt.load_model(folder / "sft.pt")[0])
    gpt.save_checkpoint(folder / "reward.pt", model=rm.state_dict(), gpt=vars(rm.body.config), tokenizer="", fingerprint=gpt.fingerprint(ENC))
    rng = random.Random(0)
    (folder / "data").mkdir()
    for name, use in (("test", None), ("unanswerable", "open_qa")):
        lines = [new_task(rng, use=use) for _ in range(24)]
        (folder / "data" / f"prompts_{name}.jsonl").write_text("".join(json.dumps({"prompt": m, "task": t}) + "\n" for t, m in lines))
    return folder


def test_rows_and_their_order(run):
    rows = results.evaluate(results.Config(out=str(run), best_of=2, max_new_tokens=4))
    assert [r["stage"] for r in rows] == ["base", "sft", "sft-greedy", "best-of-2", "ppo", "same", "variant"]
    by = {r["stage"]: r for r in rows}
    assert {"stage", "seed", "gold", "win_rate_vs_sft", "hallucination_rate", "rude_rate", "kl_to_sft", "lm_loss", "length", "n"} <= set(by["ppo"])
    assert by["sft"]["kl_to_sft"] == 0 and by["same"]["kl_to_sft"] == pytest.approx(0, abs=1e-6) and by["ppo"]["kl_to_sft"] != 0
    assert by["best-of-2"]["kl_to_sft"] == pytest.approx(math.log(2) - 0.5) and by["sft-greedy"]["gold_minus_greedy"] == 0
    assert by["ppo"]["n"] == 24 and by["ppo"]["seed"] == 7
    assert by["best-of-2"]["reward"] >= by["sft"]["reward"] - 1
    assert len(results.table(rows).splitlines()) == 1 + len(rows)
    json.dumps(rows)


def test_nobody_wins_where_all_answers_are_alike(run, monkeypatch):
    monkeypatch.setattr(sft, "gold_hook", lambda spec, records: lambda task, answer: dict(helpful=1.0, honest=0.0, harmless=0.0))
    rows = results.evaluate(results.Config(out=str(run), best_of=0, max_new_tokens=2))
    assert [(r["win_rate_vs_sft"], r["win_rate_ci"]) for r in rows] == [(0.5, 0.0)] * len(rows)


def test_answer_logprobs_sum_over_the_answer_and_its_end(run):
    model, enc, _ = gpt.load_model(run / "ppo.pt")
    chat = [{"role": "user", "content": "Hi"}]
    prompt = [enc._special_tokens["<|user|>"]] + enc.encode_ordinary("Hi") + [gpt.end_of(enc), enc._special_tokens["<|assistant|>"]]
    answer = enc.encode_ordinary("The cow.") + [gpt.end_of(enc)]
    want = gpt.token_logprobs(model, torch.tensor([prompt + answer]))[0, len(prompt) - 1:].sum()
    got = results.answer_logprobs(model, enc, [chat, chat * 3], ["The cow.", "x"])
    assert torch.allclose(got[0], want, atol=1e-5)


def test_prompts_without_tasks_are_refused(run, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n')
    with pytest.raises(UserError, match="task"):
        results.evaluate(results.Config(out=str(run), prompts=str(tmp_path / "p.jsonl")))
    with pytest.raises(UserError, match="sft.py"):
        results.evaluate(results.Config(out=str(tmp_path)))
