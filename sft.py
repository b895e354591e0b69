"""Supervised fine-tuning: turn a model that continues text into one that answers.

Idea. Show the model chats and train it with the next-token loss of pretraining, but only on what
the assistant says:

    L = -1/|M| * sum over t in M of log p(x_t | x_<t)       M: the assistant's tokens and <|end|>

A chat becomes one row of tokens. Special tokens mark the roles, and <|end|> ends a turn; a model
that never trains on <|end|> never stops.

    <|user|> What does the cow say? <|end|> <|assistant|> The cow says moo. <|end|>
      0      0   0   0   0   0    0    0          0         1   1   1   1 1    1      <- loss mask

    python sft.py                                     the village's 6,000 demonstrations
    python sft.py --data alpaca.json --out out/mine   your chats or pairs, see data/README.md
    python sft.py --epochs 16 --select reward         keep the epoch with the highest mean reward

Half a minute on two CPU cores. Needs OUT/gpt.pt and pretrains it first if it is missing. Read next:
reward.py. Elsewhere: data/formats.py reads records, scaffold/ holds flags and checkpoints.
"""
import random
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import gpt
from data import corpus
from data.chats import check_messages, prompt_of
from data.formats import load_chats, load_grader, load_val
from data.text import batches, pad, sorted_batches
from data.tokenizer import end_of
from scaffold.cli import RunConfig, UserError, choose, pick_device, require, run_folder, start
from scaffold.distributed import global_mean, rank0_first, shard
from scaffold.optim import LOGITS, adamw, autocast, lr_at
from scaffold.run import Run, ensure_stage, keep_best, set_seed, take_step
from scaffold.table import print_row, print_samples


@dataclass
class Config(RunConfig):
    data: str = ""               # chats, Alpaca, or pairs (their chosen side); empty: the village's
    val: str = ""                # chats for validation; empty: 5% of the users (or prompts) of data
    init: str = ""               # the checkpoint to start from; empty: OUT/gpt.pt
    epochs: int = 4              # passes over the data; InstructGPT made 16 and chose by reward
    select: str = "val"          # epoch to keep: val (lowest loss), reward (highest score) or last
    lr: float = 1e-3             # peak learning rate, cosine to a tenth
    batch_tokens: int = 2048     # tokens per step, padding included
    dropout: float = 0.0         # 0.1 to 0.2 delays overfitting with many epochs over few chats
    grad_accum: int = 1          # compute each batch in so many parts: less memory, a third slower
    max_new_tokens: int = 64     # longest response when samples are drawn
    gold: str = "data.village:gold"   # module:function that grades (task, response), for reports


class Example(NamedTuple):
    """One tokenized chat: two 1-D tensors of the same length."""
    ids: torch.Tensor
    mask: torch.Tensor   # 1 on the assistant's tokens and their <|end|>


def render(messages, enc):
    """Turn [{"role", "content"}] into (ids, mask), two lists of the same length.

    The mask is 1 exactly on the assistant's text and its end token. Content is encoded as ordinary
    text, so it cannot produce special tokens. Raises UserError for malformed messages.
    """
    ids, mask = [], []

    def add(tokens, value):   # the only place that grows the two lists, so they cannot drift apart
        ids.extend(tokens)
        mask.extend([value] * len(tokens))

    for m in check_messages(messages):
        trained = int(m["role"] == "assistant")
        add([enc.encode_single_token(f"<|{m['role']}|>")], 0)
        add(enc.encode_ordinary(m["content"]) + [end_of(enc)], trained)
    return ids, mask


def render_prompt(messages, enc):
    """Return the ids of a chat, opened for the assistant's next response."""
    ids, _ = render(messages, enc)
    return ids + [enc.encode_single_token("<|assistant|>")]


def response_loss(logits, ids, mask):
    """Mean cross-entropy of the masked tokens, in nats.

    logits (B, T, V), ids and mask (B, T) are unshifted: the shift by one happens here.
    """
    mask = mask[:, 1:].bool()                                                 # (B, T-1)
    total = F.cross_entropy(logits[:, :-1][mask].float(), ids[:, 1:][mask], reduction="sum")
    return total / mask.sum().clamp(min=1)


def chat_loss(model, ids, mask, parts=1):
    """Return response_loss without the logits of the prompt; parts: see gpt.token_logprobs."""
    mask = mask[:, 1:]                                                        # (B, T-1)
    return -gpt.token_logprobs(model, ids, mask=mask, parts=parts).sum() / mask.sum().clamp(min=1)


def tokenize(chats, enc, block_size):
    """Render chats -> [Example]. Chats longer than the context lose their end."""
    examples = []
    cut = 0
    for chat in chats:
        ids, mask = render(chat["messages"], enc)
        cut += len(ids) > block_size
        example = Example(torch.tensor(ids[:block_size]), torch.tensor(mask[:block_size]))
        if example.mask.any():
            examples.append(example)
    if cut:
        print(f"{cut} of {len(chats)} chats lose their end to fit the context of {block_size}; "
              f"{len(chats) - len(examples)} have no response left and are skipped")
    if not examples:
        raise UserError(f"no response fits the context of {block_size}; enlarge --block-size")
    return examples


def collate(examples, rows, device="cpu"):
    """Stack the examples of these indices -> ids (B, T), mask (B, T), padded on the right."""
    ids = pad([examples[i].ids for i in rows]).to(device)
    return ids, pad([examples[i].mask for i in rows]).to(device)


def fit_prompts(records, enc, most):
    """Return the records whose prompt has at most `most` tokens, with these tokens as "ids"."""
    records = [r | {"ids": render_prompt(r["prompt"], enc)} for r in records]
    fitting = [r for r in records if len(r["ids"]) <= most]
    if len(fitting) < len(records):
        print(f"{len(records) - len(fitting)} of {len(records)} prompts skipped: "
              f"more than {most} tokens leave no room for a response in the context")
    return fitting


def response_example(prompt, response):
    """Join the ids of a prompt and its response -> Example with mask 1 on the response."""
    mask = [0] * len(prompt) + [1] * len(response)
    return Example(torch.tensor(prompt + response), torch.tensor(mask))


def decode_response(ids, enc):
    """Turn the ids of a response into a string, without the end token."""
    return enc.decode([i for i in ids if i != end_of(enc)])


def sample_responses(model, enc, chats, max_new_tokens, seed=0, decode=decode_response, **sampling):
    """Sample a response to each chat that ends with the user's turn: decode(ids, enc), a string."""
    prompts = [render_prompt(c, enc) for c in chats]
    seeds = random.Random(seed)
    responses = {}
    for rows in sorted_batches([len(p) for p in prompts], 256):
        new = gpt.generate(model, [prompts[i] for i in rows], max_new_tokens, stop=end_of(enc),
                           seed=seeds.randrange(2**31), **sampling)
        responses |= zip(rows, new)
    return [decode(responses[i], enc) for i in range(len(prompts))]


@torch.no_grad()
def val_loss(model, examples, device, batch_tokens=8192):
    """Return the mean loss per response token over all examples, in nats."""
    model.eval()
    total = n = 0.0
    batch_tokens = min(batch_tokens, LOGITS // model.config.vocab_size)
    for rows in batches([len(e.ids) for e in examples], batch_tokens, random.Random(0)):
        ids, mask = collate(examples, rows, device)                           # (B, T) each
        k = mask[:, 1:].sum().item()
        total += response_loss(model(ids), ids, mask).item() * k
        n += k
    return total / n


def fine_tune(model, examples, epochs, batch_tokens, lr, seed, name="sft", log=lambda **row: None):
    """The training loop alone, without resume, for other scripts. Yields after each epoch."""
    rng = random.Random(seed)
    plan = [batches([len(e.ids) for e in examples], batch_tokens, rng) for _ in range(epochs)]
    steps = sum(map(len, plan))
    optimizer = adamw(model, lr, 0.01)
    step = 0
    for epoch, epoch_batches in enumerate(plan, 1):
        model.train()
        for rows in tqdm(epoch_batches, desc=f"{name}, epoch {epoch}", mininterval=1):
            ids, mask = collate(examples, rows, model.wte.weight.device)      # (B, T) each
            with autocast(ids.device):
                loss = chat_loss(model, ids, mask)
            norm = take_step(loss, optimizer, model, lr_at(step, steps, lr),
                             where=f"{name}, step {step}, examples {rows}")
            log(step=step, loss=loss.item(), grad_norm=norm)
            step += 1
        model.eval()
        yield epoch


def main(cfg):
    require(cfg, 1, "epochs", "batch_tokens", "grad_accum", "max_new_tokens")
    require(cfg, 0, "lr", most=10)
    require(cfg, 0, "dropout", most=0.99)
    choose(cfg, "select", "val", "reward", "last")
    device = pick_device(cfg.device)
    out = run_folder(cfg.out)
    if not cfg.init:
        ensure_stage(out / "gpt.pt", gpt, cfg)
    init = cfg.init or out / "gpt.pt"
    set_seed(cfg.seed)
    model, enc, base = gpt.load_model(init, device, cfg.dropout)
    if not cfg.data:
        folder = rank0_first(lambda: corpus.ensure(out / "data", cfg.seed))
        cfg.data = str(folder / "sft_train.jsonl")
        cfg.val = cfg.val or str(folder / "sft_val.jsonl")
    train, val = load_val(load_chats(cfg.data, cfg.seed), cfg.val, load_chats, cfg.seed)
    block_size = model.config.block_size
    examples = tokenize(train, enc, block_size)
    val_examples = tokenize(val, enc, block_size)
    prompts = [c | {"prompt": prompt_of(c["messages"])} for c in val]
    prompts = fit_prompts([p for p in prompts if p["prompt"]], enc, block_size - 1)
    shown = [p["prompt"] for p in prompts[:3]]
    before = sample_responses(model, enc, shown, cfg.max_new_tokens, seed=cfg.seed)
    inputs = [init, cfg.data, cfg.val]
    if cfg.select == "reward":
        import reward   # lazy: a later stage, which only this choice needs
        if not (out / "reward.pt").exists() or not prompts:
            raise UserError(f"--select reward needs prompts that fit the context, and "
                            f"{out / 'reward.pt'}; train it first: python reward.py --out {out}")
        inputs.append(out / "reward.pt")
        reward_model = reward.load_reward(out / "reward.pt", device, enc)[0]
        gold = load_grader(cfg.gold, prompts)
    rng = random.Random(cfg.seed)
    lengths = [len(e.ids) for e in examples]
    plan = [batches(lengths, cfg.batch_tokens, rng) for _ in range(cfg.epochs)]
    order = [rows for epoch in plan for rows in epoch]
    ends = list(accumulate(map(len, plan)))   # the number of steps at the end of each epoch
    optimizer = adamw(model, cfg.lr, 0.01)
    table, best = [], {}   # one row per epoch; the epoch to keep
    run = Run(cfg, "sft", inputs, model=model, optimizer=optimizer, table=table, best=best)
    print(f"sft.py: {len(examples):,} chats, {sum(lengths):,} tokens, {len(order)} steps, "
          f"device {device}")
    for step in run.steps(len(order)):
        model.train()
        ids, mask = collate(examples, shard(order[step]), device)             # (B, T) each
        with autocast(device):
            loss = global_mean(chat_loss(model, ids, mask, cfg.grad_accum), mask[:, 1:].sum())
        norm = run.take_step(loss, optimizer, model, lr_at(step, len(order), cfg.lr), order[step])
        epoch = 1 + sum(step >= end for end in ends)
        run.log(step=step, epoch=epoch, loss=loss.item(), grad_norm=norm)
        if step + 1 in ends:
            row = dict(epoch=epoch, train_loss=loss.item(),
                       val_loss=val_loss(model, val_examples, device))
            if cfg.select == "reward":
                row |= reward.score_policy(reward_model, model, enc, prompts, gold, cfg)
            table.append(row)
            run.log(**row)
            run.bar.set_postfix(loss=f"{loss.item():.3f}", val=f"{row['val_loss']:.3f}")
            quality = {"val": -row["val_loss"], "reward": row.get("reward"), "last": epoch}
            keep_best(best, model, quality[cfg.select], epoch=epoch)
    model.load_state_dict(best["model"])
    for row in table:
        print_row(row)
    gpt.save_model(out / "sft.pt", model, enc, base["tokenizer"], seed=cfg.seed, data=inputs[1:3])
    run.finish()
    after = sample_responses(model, enc, shown, cfg.max_new_tokens, seed=cfg.seed)
    print_samples(shown, before, after)
    print(f"---\nsaved {out / 'sft.pt'}, epoch {best['epoch']}; next: python reward.py --out {out}")


if __name__ == "__main__":
    start(main, Config, __doc__, distributed=True)
