"""Memory: the peak of one training step of each stage, at the sizes of GPT-2 small.

    stage       one step                                    trained, frozen   their memory
    pretrain    4 packed rows of 1024 tokens                1, 0              2.0 GB
    sft         16 chats; a copy of the best weights        1, 1              2.5 GB
    reward      8 prompts with 2 responses each             1, 1              2.5 GB
    dpo         8 prompts with 2 responses each             1, 1              2.5 GB
    ppo         16 responses: rollout, policy and value     2, 2              5.0 GB

A prompt has 128 tokens, a response 64; weights and tokens are random. A model of 124M parameters
in fp32 has 0.5 GB of weights. To train it takes 0.5 GB of gradients and 1 GB of AdamW's averages
more. The rest of the peak is what the backward pass needs to know of the batch, about 0.7 MB per
token (on a GPU, where pretrain, sft and reward compute in bf16, less), and at most 0.5 GB for 667
tokens' logits. --grad-accum divides the part of the tokens, and no other.

So with 8 GB, pretrain, sft, reward and dpo fit as they are; ppo needs --grad-accum 2 or more. Their
samples have a KV cache of 74 kB per token besides: 3.6 GB for the 256 responses of 192 tokens with
which reward and dpo measure, 1.8 GB for a rollout of 128. ppo then needs --rollout-size 64 or less.
These are sums, checked on a CPU; no GPU of that size has run them.

    python lab/memory.py                            all stages, whole and in 4 parts: ten minutes
    python lab/memory.py --only ppo --grad-accum 8  one measurement
    python lab/memory.py --device cuda              on a GPU

Each measurement has its own process. On a CPU the peak is that of the resident set, 0.3 GB of which
are Python and torch; on a GPU it is that of torch's allocator.
"""
import json
import random
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
from data.text import Source, write_text
from scaffold.cli import choose, pick_device, require, start
from scaffold.optim import adamw, autocast
from scaffold.run import keep_best, set_seed, take_step
from scaffold.table import format_table


@dataclass
class Config:
    only: str = ""               # pretrain, sft, reward, dpo or ppo; empty: all
    grad_accum: int = 1          # with --only: the parts of a batch, as in the scripts
    batch: int = 16              # responses per step
    prompt: int = 128            # tokens of a prompt
    response: int = 64           # tokens of a response
    rows: int = 4                # rows of the whole context per pretraining step
    device: str = "auto"         # auto (cuda if available, else cpu), cpu or cuda
    json: bool = False           # print one JSON object a row instead of a table
    save: str = ""               # a file that gets a copy of what is printed
    seed: int = 0                # of weights and tokens


GPT2 = gpt.GPTConfig(50257, 1024, 12, 12, 768)
ASSISTANT = 0   # the last token of every prompt
NO_END = -1     # an end token that is never sampled
LR = 1e-5


def body(device):
    """Return a GPT with random weights."""
    return gpt.GPT(GPT2).to(device).eval()


def scorer(device):
    """Return a reward or value model with random weights."""
    return reward.RewardModel(body(device), ASSISTANT).to(device).eval()


def trainer(model):
    """Return AdamW with its averages, which it would otherwise make after the first backward."""
    optimizer = adamw(model, LR)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def random_prompts(cfg):
    ids = torch.randint(1, GPT2.vocab_size, (cfg.batch, cfg.prompt))          # (B, T)
    ids[:, -1] = ASSISTANT
    return ids.tolist()


def random_examples(cfg):
    """Return a batch of random prompts with responses: [sft.Example]."""
    responses = torch.randint(1, GPT2.vocab_size, (cfg.batch, cfg.response)).tolist()
    return [sft.response_example(p, r) for p, r in zip(random_prompts(cfg), responses)]


def pretrain_step(cfg, device):
    model = body(device)
    optimizer = trainer(model)
    T = GPT2.block_size
    ids = torch.randint(GPT2.vocab_size, (cfg.rows, T), device=device)        # (B, T)
    segments = (1 + torch.arange(T, device=device) // 400).expand_as(ids)     # three documents
    with autocast(device):
        loss = gpt.lm_loss(model, ids, segments)
    take_step(loss, optimizer, model, LR)


def sft_step(cfg, device):
    model = body(device)
    optimizer = trainer(model)
    best = {}
    keep_best(best, model, 0.0)
    ids, mask = sft.collate(random_examples(cfg), range(cfg.batch), device)   # (B, T) each
    with autocast(device):
        loss = sft.chat_loss(model, ids, mask, cfg.grad_accum)
    take_step(loss, optimizer, model, LR)


def reward_step(cfg, device):
    tuned = body(device)   # samples the responses that define mean and std
    model = scorer(device)
    optimizer = trainer(model)
    rows = [e.ids for e in random_examples(cfg)]
    batch = [Comparison(rows[i:i + 2], cfg.prompt, {"ranks": [1, 2]})
             for i in range(0, cfg.batch, 2)]
    with autocast(device):
        loss = reward.batch_loss(model, batch, device, reward.Config(grad_accum=cfg.grad_accum))
    take_step(loss, optimizer, model, LR)
    del tuned


def dpo_step(cfg, device):
    policy = body(device)
    reference = body(device).requires_grad_(False)
    optimizer = trainer(policy)
    examples = random_examples(cfg)
    pairs = [(i, i + 1) for i in range(0, cfg.batch, 2)]
    with torch.no_grad():
        ref = dpo.pair_logprobs(reference, examples, pairs)                   # (2, P)
    logprobs = dpo.pair_logprobs(policy, examples, pairs, cfg.grad_accum)
    loss, *_ = dpo.dpo_loss(*logprobs, *ref)
    take_step(loss, optimizer, policy, LR)


def ppo_step(cfg, device):
    p = ppo.Config(rollout_size=cfg.batch, max_new_tokens=cfg.response, grad_accum=cfg.grad_accum)
    policy = body(device)
    reference = body(device).requires_grad_(False)
    reward_model = scorer(device).requires_grad_(False)
    value_model = scorer(device)
    policy_optimizer = trainer(policy)
    value_optimizer = trainer(value_model)
    rng = random.Random(cfg.seed)
    text = {"text": Source([torch.randint(GPT2.vocab_size, (400,)) for _ in range(4)], [], 1.0)}
    b = ppo.rollout(policy, policy, reference, reward_model, value_model, random_prompts(cfg),
                    NO_END, p, cfg.seed)
    rewards = ppo.kl_rewards(b.scores, b.logprobs, b.ref_logprobs, b.mask, p.beta)
    advantages, returns = gae.gae(rewards, b.values, b.mask, p.gamma, p.lam)  # (B, T-1) each
    advantages = gae.whiten(advantages, b.mask)
    rows = torch.arange(cfg.batch, device=device)
    pg_loss, vf_loss, _ = ppo.losses(policy, value_model, b, advantages, returns, rows, p)
    pg_loss += p.ptx * ppo.ptx_loss(policy, text, {"text": 0}, p, rng)
    take_step(pg_loss, policy_optimizer, policy, LR)
    take_step(vf_loss, value_optimizer, value_model, LR)


STEPS = {"pretrain": pretrain_step, "sft": sft_step, "reward": reward_step, "dpo": dpo_step,
         "ppo": ppo_step}
MEASURED = [("pretrain", 1), *[(stage, n) for stage in list(STEPS)[1:] for n in (1, 4)]]


def measure(cfg):
    """Take the step of one stage in this process -> its row."""
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    STEPS[cfg.only](cfg, device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024   # Linux counts kB
    return {"stage": cfg.only, "parts": cfg.grad_accum, "device": device.type,
            "peak_gb": round(peak / 1e9, 2)}


def measure_in_child(cfg, stage, parts):
    """Take the step of one stage in a process of its own -> its row."""
    settings = asdict(cfg) | {"only": stage, "grad_accum": parts}
    command = [sys.executable, __file__, "--json"]
    for name, value in settings.items():
        if name not in ("json", "save"):
            command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="", file=sys.stderr)
    return json.loads(done.stdout)


def main(cfg):
    choose(cfg, "only", "", *STEPS)
    require(cfg, 1, "grad_accum", "prompt", "response", "rows")
    require(cfg, 2, "batch")
    if cfg.only:
        rows = [measure(cfg)]
    else:
        rows = [measure_in_child(cfg, stage, parts) for stage, parts in MEASURED]
    columns = {"stage": ("stage", ""), "parts": ("parts", "d"), "device": ("device", ""),
               "peak, GB": ("peak_gb", ".2f")}
    printed = "\n".join(map(json.dumps, rows)) if cfg.json else format_table(rows, columns)
    print(printed)
    if cfg.save:
        write_text(cfg.save, printed + "\n")


if __name__ == "__main__":
    start(main, Config, __doc__)
