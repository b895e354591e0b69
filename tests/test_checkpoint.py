"""Tests of data/checkpoint.py: models may grow; unusable weights are refused."""

import math

import pytest
import torch

import gpt
import reward
from data.checkpoint import add_special_tokens, extend_context
from data.tokenizer import get_tokenizer
from gpt import sinusoids
from scaffold.cli import UserError
from tiny import ENC, random_gpt, random_ids, save_reward, tiny_gpt, tiny_reward


def test_a_longer_context_changes_no_short_input():
    model = random_gpt(block=16)
    ids = torch.tensor(random_ids([16, 16]))
    before = model(ids)
    extend_context(model, sinusoids(24, 32))
    assert model.config.block_size == 24
    assert model.wpe.weight.dtype == torch.float64
    assert torch.equal(model(ids), before)
    assert torch.equal(model.wpe.weight[16:], sinusoids(24, 32)[16:].double())
    assert model(torch.tensor(random_ids([24]))).shape == (1, 24, 50)


def test_new_tokens_get_average_logits_and_change_no_other(theirs):
    enc = get_tokenizer("theirs")
    model = random_gpt(vocab=257)
    ids = torch.tensor(random_ids([9]))
    before = model(ids)
    add_special_tokens(model, enc, "theirs")
    after = model(ids)
    assert model.config.vocab_size == 262
    torch.testing.assert_close(after[..., :257], before)
    mean = before.mean(-1, keepdim=True).expand(-1, -1, 5)
    torch.testing.assert_close(after[..., 257:], mean)


def test_a_model_that_has_the_tokens_stays_as_it_is(theirs):
    model = random_gpt(vocab=262)
    weight = model.wte.weight.clone()
    add_special_tokens(model, get_tokenizer("theirs"), "theirs")
    assert torch.equal(model.wte.weight, weight)


@pytest.mark.parametrize("vocab", [256, 263])
def test_the_tokenizer_of_another_model_is_refused(theirs, vocab):
    with pytest.raises(UserError, match=f"--init-from folder has {vocab} tokens.*--tokenizer"):
        add_special_tokens(random_gpt(vocab=vocab), get_tokenizer("theirs"), "folder")


# Weights that cannot be used


def put(model, name, value):
    model.state_dict()[name].view(-1)[-1] = value


def refuse(load, path, words):
    """The checkpoint is refused with one line that has its name and these words."""
    with pytest.raises(UserError, match=f"{path.name}: .*{words}") as e:
        load(path)
    assert "\n" not in str(e.value)


BAD = [math.nan, math.inf, -math.inf, 1e30, -1e5]
PLACES = ["wte.weight", "wpe.weight", "h.1.attn.c_attn.bias", "h.0.mlp.c_proj.weight", "ln_f.bias"]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", PLACES)
def test_a_policy_with_nan_or_huge_weights_is_refused(tmp_path, monkeypatch, name, value):
    model = tiny_gpt(0)
    put(model, name, value)
    monkeypatch.setattr(gpt, "save_checkpoint", lambda path, **state: torch.save(state, path))
    gpt.save_model(tmp_path / "m.pt", model, ENC, "")
    refuse(gpt.load_model, tmp_path / "m.pt", name)


@pytest.mark.parametrize("name, value", [*(("head.weight", x) for x in BAD), ("mean", math.nan),
                                         ("weight.weight", math.inf), ("std", 0.0), ("std", -1.0),
                                         ("body.wte.weight", math.nan)])
def test_a_reward_model_with_unusable_numbers_is_refused(tmp_path, name, value):
    model = tiny_reward(0)
    save_reward(tmp_path / "reward.pt", model)
    state = torch.load(tmp_path / "reward.pt", weights_only=True)
    state["model"][name].view(-1)[-1] = value
    torch.save(state, tmp_path / "reward.pt")
    refuse(reward.load_reward, tmp_path / "reward.pt", name)


def test_nan_in_a_folder_of_weights_is_refused(tmp_path):
    random_gpt(dtype=torch.float32).save_pretrained(tmp_path / "theirs")
    weights = torch.load(tmp_path / "theirs" / "pytorch_model.bin", weights_only=True)
    weights["transformer.ln_f.weight"][3] = math.nan
    torch.save(weights, tmp_path / "theirs" / "pytorch_model.bin")
    refuse(gpt.GPT.from_pretrained, tmp_path / "theirs", "ln_f.weight")


@pytest.mark.parametrize("vocab", [ENC.n_vocab - 1, ENC.n_vocab + 1])
def test_embeddings_of_another_number_of_tokens_are_refused(tmp_path, vocab):
    """More rows than tokens: the model would sample ids that no text belongs to."""
    gpt.save_model(tmp_path / "m.pt", random_gpt(vocab, dtype=torch.float32), ENC, "")
    refuse(gpt.load_model, tmp_path / "m.pt", f"{vocab} tokens.*{ENC.n_vocab}")
