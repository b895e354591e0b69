"""lab/explain.py: the numbers it prints are those that ppo.py computes and logs."""
import re

import pytest
import torch

import gae
import gpt
import ppo
from lab import explain
from scaffold.cli import UserError
from tiny import ENC, Recorder, read_jsonl, save_reward, tiny_gpt, tiny_reward, write_jsonl

PROMPTS = ["Hi", "What does the cow say?", "Name two animals.", "Is it late?", "Why?"]


@pytest.fixture
def out(tmp_path):
    """A folder as the earlier stages leave it, with a policy that has left its reference."""
    gpt.save_model(tmp_path / "sft.pt", tiny_gpt(1), ENC, "")
    moved = tiny_gpt(1)
    moved.ln_f.bias.data += 0.1
    gpt.save_model(tmp_path / "ppo.pt", moved, ENC, "")
    save_reward(tmp_path / "reward.pt", tiny_reward(2))
    write_jsonl(tmp_path / "prompts.jsonl", *({"prompt": p} for p in PROMPTS))
    return tmp_path


def explained(out, monkeypatch, capsys, **settings):
    """Run explain.main -> (the Update, what it printed)."""
    updates = Recorder(monkeypatch, explain, "update")
    small = dict(out=str(out), prompts=str(out / "prompts.jsonl"), max_new_tokens=8, device="cpu")
    explain.main(explain.Config(**small | settings))
    [(_, u)] = updates.calls
    return u, capsys.readouterr().out


def tables(printed):
    """Return the printed tables as lists of {heading: cell}."""
    found = []
    for block in re.split(r"\n\s*\n", printed):
        lines = [re.split(r"\s{2,}", line.strip()) for line in block.splitlines()]
        head = lines[0]
        if len(head) > 3:
            found.append([dict(zip(head, line)) for line in lines[1:] if len(line) == len(head)])
    return found


def tables_with(printed, heading):
    return [rows for rows in tables(printed) if heading in rows[0]]


def test_the_update_is_that_of_ppo_main(out, monkeypatch, capsys):
    """From the same start it logs the same row, bit for bit."""
    u, _ = explained(out, monkeypatch, capsys, checkpoint=str(out / "sft.pt"), lr=3e-3)
    cfg = ppo.Config(out=str(out), prompts=str(out / "prompts.jsonl"), updates=1, rollout_size=2,
                     minibatches=1, value_warmup=0, ptx=0.0, max_new_tokens=8, lr=3e-3, name="one",
                     table=False, gold="", device="cpu")
    ppo.main(cfg)
    [row] = read_jsonl(out / "one.jsonl")
    assert u.row == row
    assert torch.equal(u.logprobs, gpt.token_logprobs(gpt.load_model(out / "one.pt")[0], u.b.ids,
                                                      mask=u.b.mask))


def test_the_printed_numbers_are_those_of_the_functions(out, monkeypatch, capsys):
    u, printed = explained(out, monkeypatch, capsys, beta=0.3, lam=0.9)
    rewards = ppo.kl_rewards(u.b.scores, u.b.logprobs, u.b.ref_logprobs, u.b.mask, 0.3)
    raw, returns = gae.gae(rewards, u.b.values, u.b.mask, 1.0, 0.9)
    want = {"log pi": u.b.logprobs, "log pi_ref": u.b.ref_logprobs, "reward": rewards,
            "V before": u.b.values, "A": raw, "return": returns,
            "whitened A": gae.whiten(raw, u.b.mask)}
    responses = tables_with(printed, "log pi")
    assert len(responses) == 2
    for i, rows in enumerate(responses):
        assert len(rows) == u.b.mask[i].sum()
        for row in rows:
            for name, x in want.items():
                assert float(row[name]) == pytest.approx(x[i, int(row["t"])].item(), abs=6e-4)
        paid = sum(float(row["reward"]) + 0.3 * float(row["log-ratio"]) for row in rows)
        assert paid == pytest.approx(u.b.scores[i].item(), abs=0.02)
        assert abs(sum(float(row["log-ratio"]) for row in rows)) > 0.01
    for name, value in u.row.items():
        assert f"\n{name:<28}{value:.6g}\n" in printed


def test_the_marks_are_the_tokens_that_the_loss_clips(out, monkeypatch, capsys):
    """Their share is the clip fraction of the step; in the first step all ratios are 1."""
    u, printed = explained(out, monkeypatch, capsys, lr=1e-2, epochs=3)
    ratios = [row for rows in tables_with(printed, "step 1") for row in rows]
    [steps] = tables_with(printed, "clipped")
    for n, step in enumerate(steps, 1):
        marked = [row[f"step {n}"].endswith("*") for row in ratios]
        assert float(step["clipped"]) == pytest.approx(sum(marked) / len(ratios), abs=1e-4)
        for row, mark in zip(ratios, marked):
            ratio, A = float(row[f"step {n}"].rstrip("*")), float(row["whitened A"])
            assert mark == ((A > 0 and ratio > 1.2) or (A < 0 and ratio < 0.8))
    assert {row["step 1"] for row in ratios} == {"1.000"}
    assert any(row[f"step {n}"].endswith("*") for row in ratios for n in (2, 3))
    assert len(steps) == 3


def test_what_moved_is_before_and_after(out, monkeypatch, capsys):
    u, printed = explained(out, monkeypatch, capsys, lr=1e-2)
    want = {"p before": u.b.logprobs.exp(), "p after": u.logprobs.exp(), "V after": u.values}
    for i, rows in enumerate(tables_with(printed, "p before")):
        for (t, _), row in zip(explain.tokens_of(u, i, ENC), rows):
            for name, x in want.items():
                assert float(row[name]) == pytest.approx(x[i, t].item(), abs=6e-4)
    with_it, of = explain.with_the_advantage(u)
    assert f"{with_it} of {of} tokens moved with their advantage" in printed
    assert with_it > of / 2


def test_it_saves_nothing(out, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    explained(out, monkeypatch, capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(("settings", "words"), [
    (dict(checkpoint="reward.pt"), "is a reward model"),
    (dict(max_new_tokens=64), "no prompt fits the context"),
    (dict(lam=1.5), "--lam 1.5: must be"),
])
def test_a_mistake_is_one_line(out, monkeypatch, settings, words):
    monkeypatch.chdir(out)
    with pytest.raises(UserError, match=words):
        explain.main(explain.Config(**dict(out=".", prompts="prompts.jsonl") | settings))
