"""Memory: the peak of one training step of each stage, at the sizes of GPT-2 small.

    stage       one step
    pretrain    4 packed rows of 1024 tokens
    sft         16 chats
    reward      8 prompts with 2 responses each
    dpo         8 prompts with 2 responses each
    ppo         a rollout of 16 responses and one step of policy and value

A prompt has 128 tokens, a response 64; the vocabulary has 50,257. All weights are random.

    python lab/memory.py                 every stage, five minutes on one CPU core
    python lab/memory.py --only ppo      one stage
    python lab/memory.py --device cuda   on a GPU

Each stage runs in its own process. On a CPU the peak is that of the resident set, 0.3 GB of which
are Python and torch; on a GPU it is that of torch's allocator.
"""
import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dpo
import gae
import gpt
import ppo
import reward
import sft
from data.rankings import Comparison
from data.text import write_text
from scaffold.cli import choose, pick_device, require, start
from scaffold.optim import adamw, autocast
from scaffold.run import set_seed, take_step
from scaffold.table import format_table


@dataclass
class Config:
    only: str = ""               # pretrain, sft, reward, dpo or ppo; empty: all
    batch: int = 16              # responses per step
    prompt: int = 128            # tokens of a prompt
    response: int = 64           # tokens of a response
    rows: int = 4                # rows of the context's length per pretraining step
    device: str = "auto"         # auto (cuda if available, else cpu), cpu or cuda
    json: bool = False           # print one JSON object a row instead of a table
    save: str = ""               # a file that gets a copy of what is printed
    seed: int = 0                # of weights and ids


GPT2 = gpt.GPTConfig(50257, 1024, 12, 12, 768)
NO_END = -1     # an end token that is never sampled


def make(cfg):
    """Return a GPT with random weights, on the device of cfg."""
    return gpt.GPT(GPT2).to(pick_device(cfg.device)).eval()


def trainer(model):
    """Return AdamW with its two averages, which otherwise the first step would make at its end."""
    optimizer = adamw(model, 1e-5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def random_rows(cfg, n, length):
    return list(torch.randint(GPT2.vocab_size, (n, length)))


def examples(cfg):
    """Return a batch of random chats: [sft.Example]."""
    mask = torch.arange(cfg.prompt + cfg.response) >= cfg.prompt
    rows = random_rows(cfg, cfg.batch, cfg.prompt + cfg.response)
    return [sft.Example(ids, mask.long()) for ids in rows]


def pairs(cfg):
    """Return the indices of the better and the worse response of each prompt."""
    return [(i, i + 1) for i in range(0, cfg.batch, 2)]


def pretrain(cfg):
    model = make(cfg)
    device = model.wte.weight.device
    optimizer = trainer(model)
    T = GPT2.block_size
    ids = torch.stack(random_rows(cfg, cfg.rows, T)).to(device)               # (B, T)
    segments = (1 + torch.arange(T) // 400).expand_as(ids).to(device)         # three documents
    with autocast(device):
        loss = gpt.lm_loss(model, ids, segments)
    take_step(loss, optimizer, model, 1e-5)


def sft_step(cfg):
    model = make(cfg)
    device = model.wte.weight.device
    optimizer = trainer(model)
    ids, mask = sft.collate(examples(cfg), range(cfg.batch), device)          # (B, T) each
    with autocast(device):
        loss = sft.chat_loss(model, ids, mask)
    take_step(loss, optimizer, model, 1e-5)


def reward_step(cfg):
    model = reward.RewardModel(make(cfg), assistant=NO_END)
    device = model.body.wte.weight.device
    model = model.to(device)
    optimizer = trainer(model)
    rows = [e.ids for e in examples(cfg)]
    for ids in rows:
        ids[cfg.prompt - 1] = 0
    model.assistant.fill_(0)   # the last token of each prompt
    batch = [Comparison([rows[i], rows[j]], cfg.prompt, {"ranks": [1, 2]}) for i, j in pairs(cfg)]
    with autocast(device):
        loss = reward.batch_loss(model, batch, device, reward.Config())
    take_step(loss, optimizer, model, 1e-5)


def dpo_step(cfg):
    policy = make(cfg)
    reference = make(cfg).requires_grad_(False)
    optimizer = trainer(policy)
    batch = examples(cfg)
    with torch.no_grad():
        ref = dpo.pair_logprobs(reference, batch, pairs(cfg))                 # (2, P)
    loss, *_ = dpo.dpo_loss(*dpo.pair_logprobs(policy, batch, pairs(cfg)), *ref)
    take_step(loss, optimizer, policy, 1e-5)


def ppo_step(cfg):
    policy = make(cfg)
    reference = make(cfg).requires_grad_(False)
    reward_model = reward.RewardModel(make(cfg), assistant=0).requires_grad_(False)
    value_model = reward.RewardModel(make(cfg), assistant=0)
    for model in (reward_model, value_model):
        model.to(policy.wte.weight.device)
    optimizer = trainer(policy)
    value_optimizer = trainer(value_model)
    settings = ppo.Config(max_new_tokens=cfg.response, rollout_size=cfg.batch)
    rows = random_rows(cfg, cfg.batch, cfg.prompt - 1)
    prompts = [ids.tolist() + [0] for ids in rows]   # 0: the last token of a prompt
    b = ppo.rollout(policy, policy, reference, reward_model, value_model, prompts, NO_END, settings,
                    cfg.seed)
    rewards = ppo.kl_rewards(b.scores, b.logprobs, b.ref_logprobs, b.mask, settings.beta)
    advantages, returns = gae.gae(rewards, b.values, b.mask)
    advantages = gae.whiten(advantages, b.mask)
    pg_loss, vf_loss, _ = ppo.losses(policy, value_model, b, advantages, returns,
                                     torch.arange(cfg.batch), settings)
    take_step(pg_loss, optimizer, policy, 1e-5)
    take_step(vf_loss, value_optimizer, value_model, 1e-5)


STAGES = dict(pretrain=pretrain, sft=sft_step, reward=reward_step, dpo=dpo_step, ppo=ppo_step)


def measure(cfg):
    """Run one stage in this process -> its row."""
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    STAGES[cfg.only](cfg)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024   # Linux counts in KiB
    return dict(stage=cfg.only, device=device.type, peak_gb=round(peak / 1e9, 2))


def main(cfg):
    choose(cfg, "only", "", *STAGES)
    require(cfg, 1, "batch", "prompt", "response", "rows")
    if cfg.only:
        rows = [measure(cfg)]
    else:
        rows = []
        for stage in STAGES:
            flags = asdict(cfg) | {"only": stage, "json": True, "save": ""}
            command = [sys.executable, __file__]
            for k, v in flags.items():
                if k == "json":
                    command.append("--json")
                elif v != "":
                    command += [f"--{k.replace('_', '-')}", str(v)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout, end="", file=sys.stderr)
            rows.append(json.loads(done.stdout))
    columns = {"stage": ("stage", ""), "device": ("device", ""), "peak, GB": ("peak_gb", ".2f")}
    printed = "\n".join(map(json.dumps, rows)) if cfg.json else format_table(rows, columns)
    print(printed)
    if cfg.save:
        write_text(cfg.save, printed + "\n")


if __name__ == "__main__":
    start(main, Config, __doc__)
