"""The results table counts what its columns say."""
import json
import math
import random
import shutil

import pytest
import torch

import evaluate
import gpt
import reward
from data.village import new_task
from scaffold.cli import UserError
from scaffold.table import format_table
from tiny import END, ENC, SPECIAL, save_reward, user, write_jsonl


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
    for name, use in (("test", None), ("unanswerable", "open_qa")):
        tasks = [new_task(rng, use=use) for _ in range(24)]
        records = [{"prompt": messages, "task": task} for task, messages in tasks]
        write_jsonl(folder / "data" / f"prompts_{name}.jsonl", *records)
    return folder


def test_mean_and_ci_by_hand():
    mean, half_width = evaluate.mean_and_ci([0.0, 1.0, 0.5, 0.5])
    assert mean == 0.5
    assert half_width == pytest.approx(1.96 * math.sqrt(0.5 / 3) / 2)


def test_rows_and_their_order(folder):
    cfg = evaluate.Config(out=str(folder), best_of=2, max_new_tokens=4)
    rows = evaluate.evaluate(cfg)
    stages = ["base", "sft", "sft-greedy", "best-of-2", "ppo", "same", "variant"]
    assert [r["stage"] for r in rows] == stages
    by_stage = {r["stage"]: r for r in rows}
    documented = {
        "stage", "seed", "gold", "win_rate_vs_sft", "hallucination_rate", "rude_rate",
        "kl_to_sft", "lm_loss", "length", "n",
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
    assert len(format_table(rows, evaluate.COLUMNS).splitlines()) == 1 + len(rows)
    json.dumps(rows)


def test_the_win_rate_is_one_half_if_all_responses_have_equal_grades(folder, monkeypatch):
    def load_grader(spec, records, flag):
        return lambda task, response: dict(helpful=1.0, honest=0.0, harmless=0.0)

    monkeypatch.setattr(evaluate, "load_grader", load_grader)
    rows = evaluate.evaluate(evaluate.Config(out=str(folder), best_of=0, max_new_tokens=2))
    assert [(r["win_rate_vs_sft"], r["win_rate_ci"]) for r in rows] == [(0.5, 0.0)] * len(rows)


def test_response_logprobs_are_summed_over_the_response_and_its_end(folder):
    model, enc, _ = gpt.load_model(folder / "ppo.pt")
    chat = [user("Hi")]
    prompt = [SPECIAL["<|user|>"], *enc.encode_ordinary("Hi"), END, SPECIAL["<|assistant|>"]]
    response = [*enc.encode_ordinary("The cow."), END]
    logprobs = gpt.token_logprobs(model, torch.tensor([prompt + response]))
    want = logprobs[0, len(prompt) - 1:].sum()
    got = evaluate.response_logprobs(model, enc, [chat, chat * 3], ["The cow.", "x"])
    assert torch.allclose(got[0], want, atol=1e-5)


def test_prompts_without_tasks_are_refused(folder, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "Hi"})
    with pytest.raises(UserError, match="task"):
        evaluate.evaluate(evaluate.Config(out=str(folder), prompts=str(path)))


def test_a_folder_without_a_fine_tuned_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="sft.py"):
        evaluate.evaluate(evaluate.Config(out=str(tmp_path)))
