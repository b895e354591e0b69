"""Speed beside peers: the same work in our code and in a peer's, in turn, on one machine.

    row           peer                         measured
    machine       a bare matrix product        FLOP/s of our pretraining step, and its share
    pretraining   nanoGPT's train.py           CPU seconds of the whole command; the loss it reaches
    generation    transformers' generate       new tokens per CPU second, from equal weights
    ppo           TRL's experimental.ppo       episodes per CPU second, after the first update

The table has medians over rounds. CPU seconds add up all threads and leave out waiting. A ratio
above 1 means that ours is faster. For the machine, it is our share of the product's FLOP/s.

pretraining: ours takes fewer steps than nanoGPT; lab/bench_nanogpt.py has the details.
generation: 24 + 48 tokens, a vocabulary of 1,024, the full softmax, a KV cache; no row ends early.
ppo: 128 episodes of 24 + 24 tokens, 4 epochs of 2 minibatches, 4 layers x 128, no pretraining loss.
TRL runs in fp32 and without gradient checkpointing.

    python lab/bench.py --only generation                               three minutes
    python lab/bench.py --text tinyshakespeare.txt --nanogpt nanoGPT    all rows, half an hour
    python lab/bench.py --device cuda --peak-tflops 989                 an H100, in wall seconds:
                                                                        generation, GPT-2's MFU
Peers: pip install transformers trl==1.12.0 requests. Read next: results/README.md.
"""
import contextlib
import importlib
import random
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import gae
import gpt
import ppo
import reward
from data import bpe
from data.text import write_text
from lab import bench_nanogpt
from scaffold.cli import choose, pick_device, require, start
from scaffold.optim import adamw, autocast, muon
from scaffold.run import json_line, set_seed, take_step
from scaffold.table import format_table


@dataclass
class Config:
    only: str = ""               # machine, pretraining, generation or ppo; empty: all
    rounds: int = 5              # measurements of each side
    threads: int = 1             # CPU threads of each side
    text: str = ""               # tinyshakespeare or another ASCII text, for pretraining
    nanogpt: str = ""            # a clone of github.com/karpathy/nanoGPT; it stays as it is
    pretrain_steps: int = 600    # our steps; more steps reach a lower loss
    pretrain_tokens: int = 768   # tokens per step of ours; nanoGPT has 768
    pretrain_lr: float = 1e-2    # our peak learning rate; gpt.py has 6e-3, for longer runs
    device: str = "cpu"          # cpu measures CPU seconds, cuda wall seconds
    peak_tflops: float = 0.0     # of the GPU in bf16, for the MFU: H100 989, A100 312
    json: bool = False           # print one JSON object a row instead of a table
    save: str = ""               # a file that gets a copy of what is printed
    seed: int = 0                # of weights, prompts and samples


SMALL = dict(n_layer=4, n_head=4, n_embd=128)
LARGER = dict(n_layer=6, n_head=6, n_embd=384)
GENERATION = [(SMALL, 128), (SMALL, 8), (LARGER, 32)]   # sizes, batch
VOCAB = 1024
PROMPT = 24             # tokens
NEW = 48
PPO = ppo.Config(max_new_tokens=24, rollout_size=128, epochs=4, minibatches=2)
UPDATES = 2             # that are measured, after one that is not
NO_END = -1             # an end token that is never sampled
GPT2 = gpt.GPTConfig(50257, 1024, 12, 12, 768)


@dataclass
class Row:
    """Medians over the rounds; without the peer, its three fields are None."""
    name: str
    unit: str
    ours: float
    theirs: float | None
    ratio: float | None     # how many times as fast ours is
    peer: str | None
    note: str | None = None


def row(cfg, name, unit, functions, peer, note=None, reverse=False):
    """Call ours and, if there is one, the peer's once a round, in turn -> Row.

    Each function takes the number of the round and returns a rate or, with reverse, a time.
    """
    results = [[] for _ in functions]
    for n in range(cfg.rounds):
        for function, side, values in zip(functions, ("ours", peer), results):
            values.append(function(n))
            print(f"{name}, round {n + 1}, {side}: {values[-1]:.2f} {unit}", file=sys.stderr)
    ours, *rest = map(statistics.median, results)
    if not rest:
        return Row(name, unit, ours, None, None, None, note)
    ratio = rest[0] / ours if reverse else ours / rest[0]
    return Row(name, unit, ours, rest[0], ratio, peer, note)


def seconds(function, cuda=False):
    """Return the CPU seconds of a call, finished children included; with cuda its wall seconds."""
    def now():
        if cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    begin = now()
    function()
    return now() - begin


def load_peer(name, command):
    """Import a peer's module; without it, print how to get it and return None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"without {name}, ours runs alone; get it with: {command}", file=sys.stderr)
        return None


def to_transformers(cls, model, **settings):
    """Copy a gpt.GPT into a class of transformers."""
    importlib.import_module("transformers").logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return cls.from_pretrained(folder, **settings)


def training_flops(config, B, T):
    """Return the model FLOPs of forward and backward on (B, T) tokens.

    Causality saves none, and the optimizer's do not count (2204.02311, appendix B).
    """
    L, C = config.n_layer, config.n_embd
    N = 12 * L * C * C + config.vocab_size * C   # parameters in matrix products
    return (6 * N + 12 * L * C * T) * B * T


def train_rate(config, B, device):
    """Return a function that measures the model FLOP/s of ten pretraining steps on random ids."""
    T = config.block_size
    model = gpt.GPT(config).to(device)
    optimizer = muon(model, 1e-4)
    ids = torch.randint(config.vocab_size, (B, T), device=device)             # (B, T)

    def train():
        for _ in range(10):
            with autocast(device):
                loss = gpt.lm_loss(model, ids, torch.ones_like(ids))
            take_step(loss, optimizer, model, 1e-4)

    train()   # a first call is slower
    return lambda n: 10 * training_flops(config, B, T) / seconds(train, device.type == "cuda")


def machine(cfg):
    """Measure our pretraining step beside matrix products in fp32."""
    def product(n, k, m, repeats):
        a, b = torch.randn(n, k), torch.randn(k, m)
        used = seconds(lambda: [a @ b for _ in range(repeats)])
        return 2 * n * k * m * repeats / used / 1e9

    config = gpt.GPTConfig(len(bpe.BYTES) + len(bpe.SPECIAL), **bench_nanogpt.SIZES)
    B = max(1, cfg.pretrain_tokens // config.block_size)
    rate = train_rate(config, B, torch.device("cpu"))
    layer = statistics.median(product(512, 128, 512, 200) for _ in range(cfg.rounds))
    return row(cfg, "machine: pretraining step", "GFLOP/s",
               [lambda n: rate(n) / 1e9, lambda n: product(1024, 1024, 1024, 10)],
               "product of 1024 x 1024", f"512 x 128 x 512: {layer:.1f} GFLOP/s")


def gpt2(cfg, device):
    """Measure pretraining steps of GPT-2 124M on a GPU."""
    B, T = 8, GPT2.block_size
    flops = training_flops(GPT2, B, T) / (B * T)   # per token
    rate = train_rate(GPT2, B, device)
    result = row(cfg, "gpt2-124m pretraining", "tokens/s", [lambda n: rate(n) / flops], None)
    result.note = f"{result.ours * flops / 1e12:.1f} TFLOP/s"
    if cfg.peak_tflops:
        result.note += f", MFU {result.ours * flops / 1e12 / cfg.peak_tflops:.1%}"
    return result


def pretraining(cfg):
    """Run gpt.py and nanoGPT, and compare the losses of their models."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench_nanogpt.prepare(cfg, folder)
        functions = [lambda n: seconds(lambda: bench_nanogpt.train_ours(cfg, folder, n))]
        if cfg.nanogpt:
            functions.append(lambda n: seconds(lambda: bench_nanogpt.train_theirs(cfg, folder)))
        result = row(cfg, "pretraining", "CPU s", functions, "nanoGPT", reverse=True)
        result.note = bench_nanogpt.losses(cfg, folder)
    return result


def generation(cfg, device, sizes, batch):
    """Sample with gpt.generate and with transformers, from the same weights and prompts."""
    model = gpt.GPT(gpt.GPTConfig(VOCAB, PROMPT + NEW, **sizes)).to(device).eval()
    prompts = torch.randint(VOCAB, (batch, PROMPT), device=device)            # (B, T)
    lists = prompts.tolist()
    samplers = [lambda: gpt.generate(model, lists, NEW)]
    transformers = load_peer("transformers", "pip install transformers")
    if transformers:
        peer = to_transformers(transformers.GPT2LMHeadModel, model).to(device)
        peer.generation_config.eos_token_id = None
        sampling = transformers.GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, max_new_tokens=NEW, pad_token_id=0)
        samplers.append(lambda: peer.generate(
            prompts, attention_mask=torch.ones_like(prompts), generation_config=sampling))
    for sample in samplers:   # a first call is slower
        sample()
    cuda = device.type == "cuda"
    functions = [lambda n, f=f: batch * NEW / seconds(f, cuda) for f in samplers]
    unit = "tokens/s" if cuda else "tokens per CPU s"
    name = f"generation: {sizes['n_layer']} x {sizes['n_embd']}, batch {batch}"
    return row(cfg, name, unit, functions, "transformers")


def our_ppo(body, prompts, seed):
    """Return the CPU seconds of UPDATES of ppo.py; body() builds a GPT."""
    policy, reference, reward_model, value_model = (
        body(), body(), reward.RewardModel(body()), reward.RewardModel(body()))
    optimizer = adamw(policy, PPO.lr)
    value_optimizer = adamw(value_model, PPO.lr)
    rng = random.Random(seed)

    def update():
        b = ppo.rollout(policy, policy, reference, reward_model, value_model, prompts, NO_END, PPO,
                        seed=rng.randrange(2**31))
        rewards = ppo.kl_rewards(b.scores, b.logprobs, b.ref_logprobs, b.mask, PPO.beta)
        advantages, returns = gae.gae(rewards, b.values, b.mask, PPO.gamma, PPO.lam)
        advantages = gae.whiten(advantages, b.mask)
        for rows in ppo.minibatches(len(prompts), PPO, rng, b.ids.device):
            pg_loss, vf_loss, _ = ppo.losses(policy, value_model, b, advantages, returns, rows, PPO)
            take_step(pg_loss, optimizer, policy, PPO.lr)
            take_step(vf_loss, value_optimizer, value_model, PPO.lr)

    update()
    return seconds(lambda: [update() for _ in range(UPDATES)])


def trl_ppo(trl, body, prompts, seed):
    """Return the CPU seconds of UPDATES of TRL's PPOTrainer, with copies of the same models."""
    transformers = importlib.import_module("transformers")
    stamps = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            stamps.append(time.process_time())

    n = len(prompts)
    tokenizer = SimpleNamespace(pad_token_id=VOCAB, eos_token_id=VOCAB + 1)   # never sampled
    policy, reference, reward_model, value_model = (
        to_transformers(getattr(transformers, name), body(), num_labels=1) for name in
        ["GPT2LMHeadModel"] * 2 + ["GPT2ForSequenceClassification"] * 2)
    with tempfile.TemporaryDirectory() as folder:
        args = trl.PPOConfig(
            folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", num_sample_generations=0, seed=seed, learning_rate=PPO.lr,
            per_device_train_batch_size=n, local_rollout_forward_batch_size=n,
            num_ppo_epochs=PPO.epochs, num_mini_batches=PPO.minibatches, temperature=1.0,
            total_episodes=n * (UPDATES + 1), response_length=PPO.max_new_tokens)
        trl.PPOTrainer(args, tokenizer, policy, reference, reward_model, prompts, value_model,
                       lambda rows: {"input_ids": torch.tensor(rows)}, callbacks=[Clock()]).train()
    return stamps[-1] - stamps[0]


def ppo_updates(cfg):
    """Measure updates of both, from the same weights and prompts."""
    def body():
        torch.manual_seed(cfg.seed)
        return gpt.GPT(gpt.GPTConfig(VOCAB, PROMPT + PPO.max_new_tokens, **SMALL)).eval()

    prompts = torch.randint(VOCAB, (PPO.rollout_size, PROMPT)).tolist()
    episodes = UPDATES * len(prompts)
    functions = [lambda n: episodes / our_ppo(body, prompts, cfg.seed + n)]
    trl = load_peer("trl.experimental.ppo", "pip install trl==1.12.0")
    if trl:
        functions.append(lambda n: episodes / trl_ppo(trl, body, prompts, cfg.seed + n))
    return row(cfg, "ppo", "episodes per CPU s", functions, "TRL")


def check(cfg):
    require(cfg, 1, "rounds", "threads", "pretrain_steps", "pretrain_tokens")
    require(cfg, 0, "peak_tflops", "pretrain_lr")
    choose(cfg, "device", "cpu", "cuda")
    choose(cfg, "only", "", "machine", "pretraining", "generation", "ppo")
    if cfg.device == "cuda":
        choose(cfg, "only", "", "generation", "pretraining")
    elif cfg.only in ("", "pretraining"):
        bench_nanogpt.check(cfg)


def main(cfg):
    check(cfg)
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    torch.set_num_threads(cfg.threads)
    jobs = {"pretraining": [lambda: gpt2(cfg, device)],
            "generation": [lambda s=s: generation(cfg, device, *s) for s in GENERATION]}
    if device.type == "cpu":
        jobs |= {"machine": [lambda: machine(cfg)], "pretraining": [lambda: pretraining(cfg)],
                 "ppo": [lambda: ppo_updates(cfg)]}
    names = [cfg.only] if cfg.only else list(jobs)
    with contextlib.redirect_stdout(sys.stderr):   # peers print
        rows = [vars(job()) for name in names for job in jobs[name]]
    columns = {"row": ("name", ""), "ours": ("ours", ",.1f"), "theirs": ("theirs", ",.1f"),
               "unit": ("unit", ""), "ratio": ("ratio", ".2f"), "peer": ("peer", ""),
               "note": ("note", "")}
    printed = "".join(map(json_line, rows)) if cfg.json else format_table(rows, columns) + "\n"
    print(printed, end="")
    if cfg.save:
        write_text(cfg.save, printed)


if __name__ == "__main__":
    start(main, Config, __doc__)
