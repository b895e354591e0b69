"""What the tests of lab/ share: a tiny run to experiment on, and its logs."""
import torch

import gpt
import reward
from data import corpus
from tiny import END, ENC, save_reward


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


def make_reward_run(out):
    """Add a reward model that has learned nothing; sft.pt now ends half its responses in 8 tokens.

    Otherwise hardly any response would have an end, and all of them the same score.
    """
    make_run(out)
    model, enc, base = gpt.load_model(out / "sft.pt")
    end = model.wte.weight[END].detach()
    model.ln_f.bias.data += 4.5 * end / end.square().sum()   # raises the end token's logit by 4.5
    gpt.save_model(out / "sft.pt", model, enc, base["tokenizer"], seed=0)
    torch.manual_seed(1)
    save_reward(out / "reward.pt", reward.RewardModel(model))
    return out
