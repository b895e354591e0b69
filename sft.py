"""Supervised fine-tuning: from a model that continues texts to one that answers.

Idea. Show the model chats, and train it with the same next-token loss as before, but only on what the assistant says:

    L = -1/|M| * sum over t in M of log p(x_t | x_<t)              M: the assistant's tokens and their end token

The prompt is read, never imitated. A chat becomes one line of tokens; special tokens mark who speaks, and each
`<|end|>` says that a turn is over (a model that never trains on it never stops):

    <|user|> What does the cow say? <|end|> <|assistant|> The cow says moo. <|end|>
      0      0   0   0   0   0    0    0          0         1   1   1   1 1    1      <- the loss mask

    python sft.py                                          the village's 6,000 demonstrations
    python sft.py --data alpaca.json --out out/mine        {"messages": [...]} or {"instruction", "input", "output"}
    python sft.py --epochs 16 --select reward              after reward.py: keep the epoch that it likes best (InstructGPT
                                                           did); overwrites OUT/sft.pt, so run what follows it again

Half a minute on two CPU cores. Needs OUT/gpt.pt and trains it first when it is missing. Read next: reward.py.
"""
import gzip, importlib, io, json, random, re, zlib
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from tqdm import tqdm

import gpt
from run import Run, UserError, announce, fair, once, share


@dataclass
class Config:
    data: str = ""
    "chats or Alpaca records, .json, .jsonl or .gz; empty: the village's demonstrations, in OUT/data"
    val: str = ""
    "chats for validation; empty: every twentieth user of the data, or every twentieth record where no user is named"
    init: str = ""
    "the checkpoint to start from; empty: OUT/gpt.pt, trained first if missing"
    out: str = "out"
    "folder of this run"
    epochs: int = 4
    "passes over the data; InstructGPT made 16, overfitted after one by loss, and chose by reward"
    select: str = "val"
    "which epoch to keep: val (lowest validation loss), reward (highest score of OUT/reward.pt) or last"
    lr: float = 1e-3
    "peak learning rate, cosine to a tenth; about half of pretraining's"
    batch_tokens: int = 2048
    "tokens per step, padding included"
    dropout: float = 0.0
    "0.1 to 0.2 delays overfitting when there are many epochs over few chats"
    max_new_tokens: int = 64
    "longest answer when samples are drawn"
    gold: str = "data.village:gold"
    "module:function that grades (task, answer), for reports only; used where records carry a task"
    save_every: int = 500
    "steps between two savings of all that --resume needs, in OUT/sft.state; 0: on Ctrl-C alone"
    resume: bool = False
    "go on with what was stopped or killed in OUT, this stage or one before it, bit for bit"
    seed: int = 0
    "same seed, same machine, same run"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


# One intent, many wordings: a template drawn at random keeps the model from learning the wording (T0; Self-Instruct).
WITH_INPUT = ["{instruction}\n\n{input}", "{instruction}\nInput: {input}", "{input}\n\n{instruction}",
              "Task: {instruction}\n\n{input}"]
WITHOUT_INPUT = ["{instruction}", "Task: {instruction}"]


def read_records(path):
    """A .json (one list), .jsonl or .gz file -> [(where, record)]; where is 'file:line', ready for an error message."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            most = max(10_000_000, 100 * len(raw))   # text becomes 3 to 20 times smaller; what was made to fill a memory, 1000 times
            raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(most + 1)
            if len(raw) > most:
                raise UserError(f"{path}: more than 100 times larger inside, as no text is; if you trust it: gunzip {path}")
    except OSError as e:  # BadGzipFile is one, too
        raise UserError(f"{path}: {e.strerror or e}") from None
    except (EOFError, zlib.error):
        raise UserError(f"{path}: the compressed file is damaged or cut off") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}:{raw[:e.start].count(10) + 1}: byte {e.start} is not UTF-8") from None
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}: not a JSON list ({e})") from None
        records = [(f"{path}: record {i + 1}", r) for i, r in enumerate(whole)]
    else:
        records = []
        for i, line in enumerate(text.split("\n"), 1):   # not splitlines(): U+2028 may stand inside a JSON string
            if line.strip():
                try:
                    records.append((f"{path}:{i}", json.loads(line)))
                except (ValueError, RecursionError) as e:
                    raise UserError(f"{path}:{i}: not a JSON object ({e})") from None
    if not records:
        raise UserError(f"{path}: no records in it")
    for where, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return records


def check_messages(messages, where="messages"):
    """Raise UserError unless it is a non-empty list of {"role": system|user|assistant, "content": text}."""
    ok = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and m.get("role") in ("system", "user", "assistant") and isinstance(m.get("content"), str)
        for m in messages)
    if not ok:
        raise UserError(f'{where}: expected [{{"role": "system|user|assistant", "content": "..."}}, ...]')
    return messages


def as_chat(record, where, rng):
    """{"messages"} or Alpaca {"instruction", "input", "output"} -> messages; None where nothing is answered."""
    if "messages" in record:
        messages = check_messages(record["messages"], where)
    elif "instruction" in record and "output" in record:
        fields = {k: "" if record.get(k) is None else record[k] for k in ("instruction", "input", "output")}
        if not all(isinstance(v, str) for v in fields.values()):
            raise UserError(f"{where}: instruction, input and output must be texts")
        template = rng.choice(WITH_INPUT if fields["input"].strip() else WITHOUT_INPUT)
        # One pass of substitution: braces inside a user's text are only text.
        prompt = re.sub(r"\{(\w+)\}", lambda m: fields[m[1]], template)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": fields["output"]}]
    else:
        raise UserError(f'{where}: expected {{"messages": [...]}} or {{"instruction", "input", "output"}}, '
                        f'found {gpt.brief(sorted(record))}')
    return messages if any(m["role"] == "assistant" and m["content"].strip() for m in messages) else None


def load_chats(path, seed=0):
    """A file of chats or Alpaca records -> [{"messages", ...}]; records without an answer are left out and counted, aloud."""
    rng, chats, empty = random.Random(seed), [], 0
    for where, record in read_records(path):
        messages = as_chat(record, where, rng)
        if messages is None:
            empty += 1
        else:
            chats.append({**record, "messages": messages})
    if empty:
        print(f"{path}: {empty} of {empty + len(chats)} records have no answer to learn from and are left out")
    if not chats:
        raise UserError(f"{path}: not one record has an answer to learn from")
    return chats


def render(messages, enc):
    """[{"role", "content"}] -> (ids, mask): two lists of one length, mask 1 exactly on assistant text and its end token.

    Text is encoded as ordinary text, so no user can spell a special token. Raises UserError for malformed messages.
    """
    ids, mask = [], []

    def add(tokens, value):  # the only place that grows the two lists: they cannot drift apart
        ids.extend(tokens)
        mask.extend([value] * len(tokens))

    end = gpt.end_of(enc)
    for m in check_messages(messages):
        said = int(m["role"] == "assistant")
        add([enc._special_tokens[f"<|{m['role']}|>"]], 0)
        add(enc.encode_ordinary(m["content"]) + [end], said)
    return ids, mask


def render_prompt(messages, enc):
    """-> ids of the chat so far, opened for the assistant's next answer."""
    return render(messages, enc)[0] + [enc._special_tokens["<|assistant|>"]]


def response_loss(logits, ids, mask):
    """Mean cross-entropy of the masked tokens. logits (B, T, V), ids and mask (B, T), unshifted: the shift is in here."""
    mask = mask[:, 1:].float()                                                # (B, T-1)
    return -(gpt.logprobs_of(logits, ids) * mask).sum() / mask.sum().clamp(min=1)


def tokenize(chats, enc, block_size):
    """Chats -> [(ids, mask)] tensors. What is longer than the context is cut at its end; all of it is counted, aloud."""
    examples, cut, lost = [], 0, 0
    for chat in chats:
        ids, mask = render(chat["messages"], enc)
        cut += len(ids) > block_size
        ids, mask = torch.tensor(ids[:block_size]), torch.tensor(mask[:block_size])
        if mask.any():
            examples.append((ids, mask))
        else:
            lost += 1
    if cut:
        print(f"{cut} of {len(chats)} chats exceed the context of {block_size} tokens and are cut at its end"
              + (f"; in {lost} of them no answer was left, and those are left out" if lost else ""))
    if not examples:
        raise UserError(f"no chat has an answer within the context of {block_size}; pretrain with a larger --block-size")
    return examples


def batches(lengths, batch_tokens, rng):
    """Indices into batches of similar length, at most batch_tokens each with padding: as fast as packing, and no answer
    can attend to another's text. Pools keep the order random: sorting all of the data would put the same neighbours together in every epoch."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    result, pool_size = [], max(1, 32 * batch_tokens * len(lengths) // max(1, sum(lengths)))
    for start in range(0, len(order), pool_size):
        batch = []
        for i in sorted(order[start:start + pool_size], key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
                result.append(batch)
                batch = []
            batch.append(i)
        result.append(batch)
    rng.shuffle(result)
    return result


def collate(examples, rows):
    """-> ids (B, T), mask (B, T), padded on the right: no real token of a causal model sees what follows it."""
    return gpt.pad([examples[i][0] for i in rows]), gpt.pad([examples[i][1] for i in rows])


def split_by_user(records, fraction=0.05, seed=0):
    """-> (train, validation) that share no user: one user asks similar things, so a random split would leak."""
    users = sorted({str(r["user"]) for r in records if r.get("user") is not None})
    random.Random(seed).shuffle(users)
    held_out = set(users[:max(1, round(fraction * len(users)))]) if len(users) > 1 else set()
    if held_out:
        hidden = [r.get("user") is not None and str(r["user"]) in held_out for r in records]
        return [r for r, h in zip(records, hidden) if not h], [r for r, h in zip(records, hidden) if h]
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    n = max(1, round(fraction * len(records)))
    val = set(order[:n]) if len(records) > 1 else set()
    return [r for i, r in enumerate(records) if i not in val], [records[i] for i in sorted(val)] or records


def reply(model, enc, chats, max_new_tokens, **sampling):
    """Answers (texts, without the end token) to a list of chats whose last turn is the user's."""
    end = gpt.end_of(enc)
    ids = gpt.generate(model, [render_prompt(c, enc) for c in chats], max_new_tokens, stop=end, **sampling)
    return [enc.decode([i for i in row if i != end]) for row in ids]


def gold_hook(spec, records):
    """'package.module:function' -> the function that grades (task, answer), for reports only; None for an empty spec, or where
    not every record has a task with a kind (other people's records may have a "task" that means something else)."""
    if not spec or not all(isinstance(r.get("task"), dict) and "kind" in r["task"] for r in records):
        return None
    try:
        module, name = spec.split(":")
        return getattr(importlib.import_module(module), name)
    except (ValueError, ImportError, AttributeError) as e:
        raise UserError(f"--gold {spec}: write it as module:function ({e})") from None


def prompt_of(messages):
    """The chat up to its last answer, for sampling; empty where nobody answers."""
    return messages[:max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)]


def village_data(out, seed):
    from data import corpus
    return once(lambda: corpus.ensure(Path(out) / "data", seed))


def judge_from(path, val, block_size, device, cfg):
    """For --select reward: a function that lets a model answer the validation prompts, and returns what an earlier reward model
    (and the gold program, where records carry a task) think of the answers. For the other ways to select: no opinion."""
    if cfg.select != "reward":
        return lambda model: {}
    if not path.exists():
        raise UserError(f"--select reward needs {path}; train it on a first sft.pt: python reward.py --out {path.parent}")
    import reward   # a later stage, and only for this choice
    judge, enc = reward.load_reward(path, device)
    chats = [c for c in val if prompt_of(c["messages"]) and len(render_prompt(prompt_of(c["messages"]), enc)) < block_size]
    prompts, gold = [prompt_of(c["messages"]) for c in chats], gold_hook(cfg.gold, chats)
    if not prompts:
        raise UserError(f"--select reward: no validation prompt fits the context of {block_size}")

    def opinion(model):
        answers = reply(model, enc, prompts, cfg.max_new_tokens, seed=cfg.seed)
        row = {"reward": sum(reward.score_answers(judge, enc, prompts, answers)) / len(prompts)}
        if gold:
            row["gold"] = sum(gold(c["task"], a) for c, a in zip(chats, answers)) / len(chats)
        return row
    return opinion


@torch.no_grad()
def evaluate(model, examples, device, batch_tokens=8192):
    """Mean loss per response token over all examples."""
    model.eval()
    total = n = 0.0
    for rows in batches([len(e[0]) for e in examples], batch_tokens, random.Random(0)):
        ids, mask = (t.to(device) for t in collate(examples, rows))
        k = mask[:, 1:].sum().item()
        total, n = total + response_loss(model(ids), ids, mask).item() * k, n + k
    return total / n


def tune(model, examples, epochs, batch_tokens, lr, seed, name="sft", log=lambda **row: None):
    """main's loop without its trimmings, for the scripts that tune a model among other things. Yields after each epoch: the caller
    may look. log is called with a row for each step."""
    rng, device, step = random.Random(seed), model.wte.weight.device, 0
    plan = [batches([len(e[0]) for e in examples], batch_tokens, rng) for _ in range(epochs)]
    steps, optimizer = sum(map(len, plan)), gpt.adamw(model, lr, 0.01)
    with tqdm(total=steps, desc=name, mininterval=1) as bar:
        for epoch, epoch_batches in enumerate(plan, 1):
            model.train()
            for rows in epoch_batches:
                ids, mask = (t.to(device) for t in collate(examples, rows))   # (B, T) each
                with gpt.autocast(device):
                    loss = response_loss(model(ids), ids, mask)
                where = f"{name}, step {step}, examples {rows}"
                log(step=step, loss=loss.item(), grad_norm=gpt.take_step(loss, optimizer, model, gpt.lr_at(step, steps, lr), where=where))
                step += 1
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            model.eval()
            yield epoch


def main(cfg):
    gpt.require(cfg, 1, "epochs", "batch_tokens", "max_new_tokens")
    gpt.require(cfg, 0, "lr", most=10)
    gpt.require(cfg, 0, "dropout", most=0.99)
    if cfg.select not in ("val", "reward", "last"):
        raise UserError(f"--select {cfg.select}: choose val, reward or last")
    device, out = gpt.pick_device(cfg.device), gpt.run_folder(cfg.out)
    init = Path(cfg.init or out / "gpt.pt")
    if not init.exists() and not cfg.init:
        announce(init, "pretraining it", cfg.resume)
        gpt.main(gpt.Config(out=cfg.out, seed=cfg.seed, device=cfg.device, resume=cfg.resume))
    gpt.set_seed(cfg.seed)
    model, enc, base = gpt.load_model(init, device, cfg.dropout)
    if not cfg.data:
        folder = village_data(out, cfg.seed)
        cfg.data, cfg.val = str(folder / "sft_train.jsonl"), cfg.val or str(folder / "sft_val.jsonl")
    train = load_chats(cfg.data, cfg.seed)
    train, val = (train, load_chats(cfg.val, cfg.seed)) if cfg.val else split_by_user(train, seed=cfg.seed)
    block = model.config.block_size
    examples, val_examples = tokenize(train, enc, block), tokenize(val, enc, block)
    lengths = [len(e[0]) for e in examples]
    shown = [p for p in (prompt_of(c["messages"]) for c in val) if p and len(render_prompt(p, enc)) < block][:3]
    before = reply(model, enc, shown, cfg.max_new_tokens, seed=cfg.seed)
    rng = random.Random(cfg.seed)
    plan = [batches(lengths, cfg.batch_tokens, rng) for _ in range(cfg.epochs)]
    order, ends = [rows for epoch in plan for rows in epoch], list(accumulate(map(len, plan)))
    judge, table, best = judge_from(out / "reward.pt", val, block, device, cfg), [], {}
    optimizer = gpt.adamw(model, cfg.lr, 0.01)
    run = Run(cfg, "sft", [init, cfg.data, cfg.val], model=model, optimizer=optimizer, table=table, best=best)
    print(f"sft.py: {len(examples):,} chats, {sum(lengths):,} tokens, {len(order)} steps, device {device}")
    for step in run.steps(len(order)):
        model.train()
        ids, mask = (t.to(device) for t in collate(examples, share(order[step])))                 # (B, T) each
        with gpt.autocast(device):
            loss = fair(response_loss(model(ids), ids, mask), mask[:, 1:].sum())
        norm = run.take_step(loss, optimizer, model, gpt.lr_at(step, len(order), cfg.lr), f"chats {order[step]}, counted from 0")
        epoch = 1 + sum(step >= end for end in ends)
        run.log(step=step, epoch=epoch, loss=loss.item(), grad_norm=norm)
        if step + 1 in ends:
            row = dict(epoch=epoch, train_loss=loss.item(), val_loss=evaluate(model, val_examples, device)) | judge(model)
            table.append(row)
            run.log(**row)
            run.bar.set_postfix(loss=f"{loss.item():.3f}", val=f"{row['val_loss']:.3f}")
            better = {"val": -row["val_loss"], "last": epoch, "reward": row.get("reward")}[cfg.select]
            if not best or better > best["better"]:   # larger is better
                best.update(better=better, epoch=epoch, model={k: v.clone() for k, v in model.state_dict().items()})
    model.load_state_dict(best["model"])
    for row in table:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v:2d}" for k, v in row.items()))
    gpt.save_model(out / "sft.pt", model, enc, base["tokenizer"], seed=cfg.seed)
    after = reply(model, enc, shown, cfg.max_new_tokens, seed=cfg.seed)
    for prompt, old, new in zip(shown, before, after):
        print(f"--- {prompt[-1]['content']!r}\nbefore: {old!r}\nafter:  {new!r}")
    run.finish()
    print(f"---\nsaved {out / 'sft.pt'} (epoch {best['epoch']}); next: python reward.py --out {out}")


if __name__ == "__main__":
    gpt.run(main, Config, __doc__, shared=True)
