"""Tests of data/checkpoint.py: a model read from a checkpoint may grow."""

import pytest
import torch

from data.checkpoint import add_special_tokens, extend_context
from data.tokenizer import get_tokenizer
from gpt import sinusoids
from scaffold.cli import UserError
from tiny import random_gpt, random_ids


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
