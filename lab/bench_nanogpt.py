"""Pretrain the same model with gpt.py and with nanoGPT: the runs behind a row of lab/bench.py.

nanoGPT's side is the command for a CPU from its README: 2,000 steps of 768 characters, AdamW. Ours
trains the same sizes with gpt.py's optimizer, Muon, for fewer steps. The number of steps, their
tokens and the learning rate were chosen on tinyshakespeare with seed 1, by the loss on the same
last tenth: of seven settings, the only one that was better than nanoGPT. nanoGPT's settings are its
authors'; we tried no others.

Start-up and evaluation count on both sides. Both models then predict the last tenth of the text in
the same windows of 64, so the losses compare. The losses printed in training do not: nanoGPT
samples a few windows, and gpt.py reads the first 40,000 characters, of each window without the
first. nanoGPT has one seed. Ours has one per round, and the table shows the worst loss.
"""
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
from data import bpe
from data.text import read_text, write_text
from scaffold.cli import UserError, brief
from scaffold.run import load_checkpoint

# nanoGPT's settings for a CPU, from its README
SIZES = dict(block_size=64, n_layer=4, n_head=4, n_embd=128)
ROWS = 12
STEPS = 2000


def run_python(command, cfg, folder):
    """Run a Python script in a folder. Raises UserError with its last line if it fails."""
    env = os.environ | {"OMP_NUM_THREADS": str(cfg.threads)}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=env,
                          capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{command[0]} failed: {brief(reason)}")


def check(cfg):
    if not cfg.text:
        raise UserError("pretraining needs --text tinyshakespeare.txt; without it, choose "
                        "--only machine, generation or ppo")
    if not read_text(cfg.text).isascii():   # gpt.py would predict several bytes a character
        raise UserError(f"{cfg.text}: not ASCII; a character must be one byte here")
    if cfg.nanogpt and not Path(cfg.nanogpt, "train.py").is_file():
        raise UserError(f"--nanogpt {cfg.nanogpt}: no train.py there; name a clone of nanoGPT")


def prepare(cfg, folder):
    """Write the text and our tokenizer into a folder and, if there is a clone, copy it there."""
    text = read_text(cfg.text)
    write_text(folder / "text.txt", text)
    bpe.save(folder / "bytes.json", [])   # no merges: a byte is a token
    if not cfg.nanogpt:
        print("without nanoGPT, ours runs alone; get it with: git clone "
              "https://github.com/karpathy/nanoGPT, and add --nanogpt nanoGPT", file=sys.stderr)
    else:
        clone = folder / "nanoGPT"
        shutil.copytree(cfg.nanogpt, clone, ignore=shutil.ignore_patterns(".git", "*.bin"))
        write_text(clone / "data/shakespeare_char/input.txt", text)
        run_python(["data/shakespeare_char/prepare.py"], cfg, clone)


def train_ours(cfg, folder, n):
    """Run gpt.py with the seed of round n. Its checkpoint is folder/n/gpt.pt."""
    settings = dict(
        SIZES, data="text.txt", tokenizer=folder / "bytes.json", val_fraction=0.1, device="cpu",
        steps=cfg.pretrain_steps, batch_tokens=cfg.pretrain_tokens, lr=cfg.pretrain_lr,
        eval_every=cfg.pretrain_steps, seed=cfg.seed + n, out=n)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    run_python([gpt.__file__, *flags], cfg, folder)


def train_theirs(cfg, folder):
    """Run nanoGPT. It has one seed. Its checkpoint is folder/nanoGPT/out/ckpt.pt."""
    settings = dict(
        SIZES, batch_size=ROWS, max_iters=STEPS, lr_decay_iters=STEPS, dropout=0.0, eval_iters=20,
        log_interval=1, device="cpu", compile=False, out_dir="out")
    flags = [f"--{name}={value}" for name, value in settings.items()]
    run_python(["train.py", "config/train_shakespeare_char.py", *flags], cfg, folder / "nanoGPT")


@torch.no_grad()
def text_loss(logits_of, ids):
    """Return the nats per token of a list of ids, in windows of T inputs and T targets."""
    T = SIZES["block_size"]
    n = (len(ids) - 1) // T * T
    x = torch.tensor(ids[:n]).view(-1, T)                                     # (windows, T)
    y = torch.tensor(ids[1:n + 1]).view(-1, T)                                # (windows, T)
    losses = [F.cross_entropy(logits_of(inputs).mT, targets, reduction="sum").item()
              for inputs, targets in zip(x.split(64), y.split(64))]
    return sum(losses) / n


def our_loss(path, text):
    """Return the loss of a checkpoint of gpt.py on a string."""
    model, enc, _ = gpt.load_model(path)
    return text_loss(model, enc.encode_ordinary(text))


def their_loss(clone, text, characters):
    """Return the loss of the checkpoint in a clone; characters are those of the whole text."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", clone / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    state = load_checkpoint(clone / "out/ckpt.pt")
    model = module.GPT(module.GPTConfig(**state["model_args"])).eval()
    model.load_state_dict(state["model"])
    number = {c: i for i, c in enumerate(characters)}
    # Without targets, nanoGPT's model returns the last logits only.
    return text_loss(lambda x: model(x, x)[0], [number[c] for c in text])


def losses(cfg, folder):
    """Return the note of the row: the loss of our worst model and, if it ran, of nanoGPT's."""
    text = read_text(folder / "text.txt")
    rest = text[int(0.9 * len(text)):]   # neither side trains on it
    ours = max(our_loss(folder / f"{n}/gpt.pt", rest) for n in range(cfg.rounds))
    note = f"loss {ours:.4f} after {cfg.pretrain_steps} steps"
    if cfg.nanogpt:
        note += f", theirs {their_loss(folder / 'nanoGPT', rest, sorted(set(text))):.4f}"
    return note
