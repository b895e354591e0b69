"""What the tests of lab/ share: a tiny run to experiment on, and its logs."""
import torch

import gpt
from data import corpus
from tiny import ENC


class Started(Exception):
    """Raised in place of a stage's main; its argument is the Config."""


def start(cfg):
    raise Started(cfg)


def make_run(out):
    """Write a run whose gpt.pt and sft.pt have learned nothing; cut the village's files short."""
    corpus.write(out / "data", seed=0, megabytes=0.15)
    for name in corpus.SIZES:
        path = out / "data" / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:20]), encoding="utf-8")
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 128, n_layer=1, n_head=2, n_embd=16))
    data = str(out / "data" / "pretrain")
    for name in ("gpt.pt", "sft.pt"):
        gpt.save_model(out / name, model, ENC, "", seed=0, data=data, val_fraction=0.2, mixture="")
    return out
