"""Self-Instruct: a base model grows a few seed tasks into an instruction-tuning set.

Idea (Wang et al., arXiv:2212.10560). A base model cannot follow instructions, but it can continue
a list of them. So it writes the training set itself:

    1. grow        show a list of 8 instructions: 6 seed tasks and 2 of the model's own; the model
                   writes numbers 9, 10, ...; keep those that pass the filters below
    2. identify    ask, with a few examples: "Is it classification?"
    3. instances   let the model write an input and its output; for classification the label first,
                   then an input for it (input first gives the commonest label again and again)
    4. filter      drop instances without an output, and all of a task that gives one input two
                   outputs
    5. fine-tune   the same base model on what it wrote, in several prompt templates

An instruction is dropped if it is too short or too long, if it asks for an image, or if it is too
similar to one in the pool (words of any language: data/words.py):

    ROUGE-L(a, b) = 2 LCS(a, b) / (|a| + |b|) > 0.7      LCS: longest common subsequence of words

This keeps what is new, but the newest instructions are the garbled ones. So we add a filter: drop
an instruction with a token that the model itself finds unlikely.

    python self_instruct.py                                   the village: 175 seed tasks, audited
    python self_instruct.py --likelihood 0 --steps 0          the paper's filters alone
    python self_instruct.py --seeds mine.jsonl --base my.pt   your own tasks and model, not graded

Four minutes on one CPU core. The base model is OUT/long/gpt.pt: OUT/gpt.pt, trained further at a
context of 320 tokens. It is made first if it is missing, which takes two minutes. Read next:
self_reward.py. Elsewhere: the masked loss (sft.py), seed tasks and pages (data/tasks.py), and the
measures of what was made (lab/instruction_quality.py; it imports this file, so main imports it).
"""
import importlib
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path

import torch
from tqdm import tqdm

import gpt
import sft
from data import tasks as village_tasks
from data.formats import load_seed_tasks, write_records
from data.text import batches, pad
from data.tokenizer import end_of
from data.words import count_words, words
from scaffold.cli import BaseConfig, UserError, pick_device, require, run_folder, start
from scaffold.optim import adamw, lr_at
from scaffold.run import ensure_stage, keep_best, log_metrics, set_seed, take_step


@dataclass
class Config(BaseConfig):
    base: str = ""               # the model that writes; empty: OUT/long/gpt.pt, made if missing
    seeds: str = ""              # seed tasks, see data/README.md; empty: 175 of the village's
    rounds: int = 8              # how often the pool grows
    requests: int = 64           # lists per round
    temperature: float = 1.0     # of the lists; the paper's 0.7 makes a small model repeat itself
    top_p: float = 0.9           # of the lists; 0.5 in the paper
    shots: int = 0               # worked tasks shown in step 3; a small model copies from them
    likelihood: float = 0.01     # drop instructions with a less likely token; 0 keeps them
    steps: int = 300             # optimizer steps of each fine-tuning; 0: do not fine-tune
    batch_tokens: int = 1024     # tokens per step, padding included
    lr: float = 1e-3             # peak learning rate, cosine to a tenth
    gold: str = "data.tasks"     # module that grades tasks: for reports, and to choose checkpoints


LIST_HEAD = "Come up with a series of tasks:\n"

# The paper's templates. Each prompt gets a random one, so that the layout is not learned.
WITH_INPUT = ["{instruction}\nInput: {input}\nOutput:",
              "{instruction}\n\nInput: {input}\n\nOutput:",
              "Task: {instruction}\nInput: {input}\nOutput:",
              "{instruction}\n\n{input}\n\nOutput:",
              "{instruction}\n\n{input}\n\n",
              "{instruction}\n{input}\n\n",
              "Task: {instruction}\n\n{input}\n\n"]
WITHOUT_INPUT = ["{instruction} Output:", "{instruction}\nOutput:", "{instruction}\n\nOutput:",
                 "{instruction}\n", "{instruction}\n\n", "Task: {instruction}\n\n"]

KEYWORDS = "image images graph graphs picture pictures file files map maps draw plot".split()


@lru_cache(maxsize=1 << 12)
def positions(text):
    """Return {word: bit mask of its positions}."""
    masks = {}
    for i, word in enumerate(words(text)):
        masks[word] = masks.get(word, 0) | 1 << i
    return masks


def rouge_l(a, b):
    """Return the F-measure of the longest common subsequence of words (Lin, 2004), 0 without words.

    Equals rouge-score's without stemming on English; data/words.py splits other languages. The bits
    of one integer are a row of the dynamic program (Hyyro, 2004).
    """
    masks = positions(a)
    m, n = len(words(a)), len(words(b))
    if m == 0 or n == 0:
        return 0.0
    full = (1 << m) - 1
    row = full
    for word in words(b):
        hits = row & masks.get(word, 0)
        row = (row + hits | row - hits) & full
    lcs = m - row.bit_count()
    return 2 * lcs / (m + n)   # precision lcs/n and recall lcs/m


def reject_reason(instruction, pool):
    """Return the name of the filter that refuses the instruction, or None if it may join the pool.

    The rules are those of the paper's code: more than 3 and at most 150 words, no word that asks
    for what a language model cannot do, no "Write a program", a letter or digit first, and a
    ROUGE-L of at most 0.7 with every string in the pool. The paper's code wants an ASCII letter:
    it keeps English alone. Here all languages pass, but KEYWORDS and "Write a program" are English.
    The limits count words between spaces; a Chinese, Japanese or Thai character counts as one.
    """
    n = count_words(instruction)
    if n <= 3:
        return "short"
    if n > 150:
        return "long"
    if re.search(rf"\b({'|'.join(KEYWORDS)}|go to)\b", instruction, re.I):
        return "keyword"
    if instruction.startswith("Write a program"):
        return "program"
    if not instruction.lstrip("¿¡")[:1].isalnum():   # Spanish opens a question with a mark
        return "first letter"
    if any(rouge_l(instruction, other) > 0.7 for other in pool):
        return "rouge"
    return None


def list_prompt(instructions):
    """Write the numbered list that the model should continue."""
    lines = [f"{i}. {' '.join(x.split())}" for i, x in enumerate(instructions, 1)]
    return LIST_HEAD + "\n".join(lines) + f"\n{len(lines) + 1}."


def read_list(text):
    """Parse the continuation of a list_prompt -> instructions."""
    items = [" ".join(item.split()) for item in re.split(r"\n\d+\s?\.", text)]
    return [item for item in items if item]


def read_instances(text, label_first):
    """Parse what the model wrote under a task -> [(input, output)]; skip incomplete ones."""
    text = re.split(r"^Task:", text, flags=re.M)[0]
    if label_first:
        parts = [part.split("\nInput:") for part in re.split(r"^Class label:", text, flags=re.M)]
        return [(part[1].strip(), part[0].strip()) for part in parts if len(part) == 2]
    # Inputs and outputs may have several lines.
    pattern = r"(?:^Input:((?:(?!^Input:).)*?)\n)?^Output:(.*?)(?=^Input:|^Output:|\Z)"
    pairs = re.findall(pattern, text, flags=re.M | re.S)
    return [(x.strip(), y.strip()) for x, y in pairs]


def instance_reject_reason(x, y):
    """Return why an instance with input x and output y is refused, or None."""
    if not y:
        return "empty output"
    if x == y:
        return "input is output"
    if x.endswith((":", "：")) or y.endswith((":", "：")):
        return "ends with a colon"
    return None


def keep_instances(instances):
    """Step 4: filter the instances of one task -> (kept, reasons of the dropped ones).

    Keeps the first five, where the paper draws five.
    """
    kept, reasons = [], []
    for x, y in dict.fromkeys(instances):
        reason = instance_reject_reason(x, y)
        if reason is None:
            kept.append((x, y))
        else:
            reasons.append(reason)
    inputs = Counter(x for x, _ in kept if x)
    if any(n > 1 for n in inputs.values()):   # one output is wrong, and we cannot tell which
        return [], reasons + ["same input, other output"] * len(kept)
    return kept[:5], reasons + ["more than five"] * len(kept[5:])


def ask(model, enc, prompts, max_new_tokens, batch=64, **sampling):
    """Continue strings -> [(string, whether the model ended it)]."""
    results = []
    for i in tqdm(range(0, len(prompts), batch), desc="ask", mininterval=1, leave=False):
        ids = [enc.encode_ordinary(p) for p in prompts[i:i + batch]]
        if "seed" in sampling:
            sampling["seed"] += 1   # else every batch would repeat the draws of the first
        for new in gpt.generate(model, ids, max_new_tokens, stop=end_of(enc), **sampling):
            results.append((sft.decode_response(new, enc), new[-1] == end_of(enc)))
    return results


@torch.no_grad()
def least_likely(model, enc, instructions, batch=64):
    """Return the probability of each instruction's least likely token, first in a list."""
    head = enc.encode_ordinary(LIST_HEAD + "1.")
    results = []
    for i in range(0, len(instructions), batch):
        lines = [head + enc.encode_ordinary(f" {x}\n") for x in instructions[i:i + batch]]
        rows = [torch.tensor(ids[:model.config.block_size]) for ids in lines]
        ids = pad(rows).to(model.wte.weight.device)                       # (B, T)
        logprobs = gpt.token_logprobs(model, ids)                             # (B, T-1)
        for row, logprob in zip(rows, logprobs):
            results.append(logprob[len(head) - 1:len(row) - 1].min().exp().item())
    return results


def sample_list(seeds, kept, rng):
    """Show 8 instructions in random order: up to 2 of the model's own, the rest seeds."""
    own = rng.sample(kept, min(2, len(kept)))
    return list_prompt(rng.sample(own + rng.sample(seeds, 8 - len(own)), 8))


def grow(model, enc, seeds, cfg, rng):
    """Step 1: grow a pool of instructions from the seeds.

    Returns the kept instructions in order, a Counter of the outcomes of all candidates, and a row
    for each round.
    """
    kept, counts, rounds = [], Counter(), []
    for number in range(cfg.rounds):
        before, tried = len(kept), 0
        prompts = [sample_list(seeds, kept, rng) for _ in range(cfg.requests)]
        sampling = dict(temperature=cfg.temperature, top_p=cfg.top_p, seed=rng.randrange(2**31))
        for text, ended in ask(model, enc, prompts, model.config.block_size, **sampling):
            candidates = read_list(text)
            if not ended:   # cut off at an unknown place: drop the list, as in the paper
                counts["list without end"] += len(candidates)
                continue
            tried += len(candidates)
            probs = [1.0] * len(candidates)
            if cfg.likelihood:
                probs = least_likely(model, enc, candidates)
            for candidate, p in zip(candidates, probs):
                reason = reject_reason(candidate, seeds + kept)
                if reason is None and p < cfg.likelihood:
                    reason = "unlikely"
                if reason is None:
                    kept.append(candidate)
                counts[reason or "kept"] += 1
        rounds.append(dict(round=number, pool=len(seeds) + before, tried=tried,
                           kept=len(kept) - before))
    return kept, counts, rounds


def identify(model, enc, instructions, seeds, rng):
    """Step 2: is it classification? -> list of bools.

    The prompt shows seed tasks, yes and no in turn, as many as fit (12 and 19 in the paper).
    """
    def block(instruction, label=""):
        return f"Task: {instruction}\nIs it classification?{label}"

    yes = [t for t in seeds if t["is_classification"]]
    no = [t for t in seeds if not t["is_classification"]]
    in_turn = zip(rng.sample(yes, len(yes)), rng.sample(no, len(no)))
    longest = max(len(enc.encode_ordinary(block(x))) for x in instructions)
    room = model.config.block_size - 4 - longest
    shots = ""
    for task in chain.from_iterable(in_turn):
        label = " Yes\n\n" if task["is_classification"] else " No\n\n"
        longer = shots + block(task["instruction"], label)
        if len(enc.encode_ordinary(longer)) > room:
            break
        shots = longer
    answers = ask(model, enc, [shots + block(x) for x in instructions], 3, temperature=0)
    return [text.strip().startswith("Yes") for text, _ in answers]


def write_shot(task, label_first):
    """Write a seed task and its instances in the form that the model should write."""
    lines = [f"Task: {task['instruction']}\n"]
    for instance in task["instances"]:
        x = f"Input: {instance['input']}\n" if instance["input"] else ""
        y = instance["output"]
        lines.append(f"Class label: {y}\n{x}" if label_first else f"{x}Output: {y}\n")
    return "".join(lines) + "\n"


def instances(model, enc, instructions, label_first, seeds, shots, rng):
    """Step 3: let the model write inputs and outputs, greedily -> [[(input, output)]]."""
    group = [t for t in seeds if t["is_classification"] == label_first]
    shown = rng.sample(group, min(shots, len(group)))
    head = "".join(write_shot(task, label_first) for task in shown)
    first = "Class label:" if label_first else ""
    prompts = [f"{head}Task: {x}\n{first}" for x in instructions]
    longest = max((len(enc.encode_ordinary(p)) for p in prompts), default=0)
    room = min(96, model.config.block_size - 1 - longest)
    results = []
    for text, ended in ask(model, enc, prompts, max(1, room), temperature=0):
        pairs = read_instances(first + text, label_first)
        if not ended and "\nTask:" not in text:
            pairs = pairs[:-1]   # the last instance was cut off
        results.append(pairs)
    return results


def make_tasks(model, enc, seeds, cfg, rng, log):
    """Run steps 1 to 4 -> tasks with instances. Count, print and log what was dropped."""
    made, counts, rounds = grow(model, enc, [s["instruction"] for s in seeds], cfg, rng)
    if not made:
        raise UserError(f"no usable instruction; has the base model read numbered lists? "
                        f"What became of its lines: {dict(counts)}")
    print("candidates:  " + ", ".join(f"{k} {n}" for k, n in counts.most_common()))
    for row in rounds:
        print("  pool {pool:5d}   candidates {tried:5d}   kept {kept:4d}".format(**row))
    kinds = identify(model, enc, made, seeds, rng)
    tasks = [{"instruction": x, "is_classification": kind} for x, kind in zip(made, kinds)]
    dropped = Counter()
    for label_first in (False, True):
        group = [t for t in tasks if t["is_classification"] == label_first]
        asked = [t["instruction"] for t in group]
        written = instances(model, enc, asked, label_first, seeds, cfg.shots, rng)
        for task, pairs in zip(group, written):
            kept, reasons = keep_instances(pairs)
            task["instances"] = [{"input": x, "output": y} for x, y in kept]
            dropped.update(reasons if pairs else ["no instance"])
    n_kept = len(as_records(tasks))
    outcomes = [("kept", n_kept), *dropped.most_common()]
    print("instances:   " + ", ".join(f"{k} {n}" for k, n in outcomes))
    log(row="growth", candidates=dict(counts), instances=dict(dropped), kept_instances=n_kept,
        rounds=rounds)
    return tasks


def as_records(tasks):
    """Turn tasks with instances into Alpaca records {"instruction", "input", "output"}."""
    return [{"instruction": task["instruction"], **instance}
            for task in tasks for instance in task["instances"]]


def prompt_of(record, rng):
    """Put an instruction and its input into a random template."""
    template = rng.choice(WITH_INPUT if record["input"] else WITHOUT_INPUT)
    # One pass of substitution: braces in a record are only text.
    return re.sub(r"\{(\w+)\}", lambda m: record[m[1]], template)


def encode(record, enc, rng):
    """Tokenize a record; the mask is 1 on the output and its end token."""
    prompt = prompt_of(record, rng)
    output = record["output"] if prompt.endswith("\n") else " " + record["output"]
    ids = enc.encode_ordinary(prompt)
    response = enc.encode_ordinary(output) + [end_of(enc)]
    return sft.response_example(ids, response)


def endless_batches(records, enc, block_size, batch_tokens, rng, device):
    """Yield (ids, mask), (B, T) each, epoch after epoch. Every epoch draws new templates."""
    while True:
        examples = [encode(record, enc, rng) for record in records]
        examples = [sft.Example(e.ids[:block_size], e.mask[:block_size]) for e in examples]
        for rows in batches([len(e.ids) for e in examples], batch_tokens, rng):
            yield sft.collate(examples, rows, device)


def fine_tune(base, device, records, val_score, cfg):
    """Step 5: fine-tune the base model; return the best of five checkpoints by val_score(model)."""
    model, enc, _ = gpt.load_model(base, device)
    optimizer = adamw(model, cfg.lr, 0.01)
    best = {}
    examples = endless_batches(records, enc, model.config.block_size, cfg.batch_tokens,
                               random.Random(cfg.seed), device)
    bar = tqdm(islice(examples, cfg.steps), total=cfg.steps, desc=f"fine-tune on {len(records)}",
               mininterval=1, leave=False)
    for step, (ids, mask) in enumerate(bar):                                  # (B, T) each
        model.train()
        loss = sft.chat_loss(model, ids, mask)
        take_step(loss, optimizer, model, lr_at(step, cfg.steps, cfg.lr))
        if (step + 1) % max(1, cfg.steps // 5) == 0:
            keep_best(best, model, val_score(model.eval()))
    model.load_state_dict(best["model"])
    return model.eval()


def long_base(cfg):
    """Return the path of the default base model; make it first if it is missing.

    It is OUT/gpt.pt, trained further at a context of 320 tokens, mostly on pages of tasks.
    """
    out = Path(cfg.out)
    path = out / "long" / "gpt.pt"
    ensure_stage(out / "gpt.pt", gpt, cfg)
    if not path.exists():
        village_tasks.ensure(out / "data", cfg.seed)
    ensure_stage(path, gpt, cfg, init=str(out / "gpt.pt"), data=str(out / "data" / "pages"),
                 block_size=320, steps=1250)
    return path


def check(cfg):
    require(cfg, 1, "rounds", "requests", "batch_tokens")
    require(cfg, 0, "temperature", "lr", "shots", most=10)
    require(cfg, 0, "top_p", "likelihood", most=1)
    require(cfg, 0, "steps")


def main(cfg):
    from lab import instruction_quality   # lazy: it imports this file
    check(cfg)
    device = pick_device(cfg.device)
    out = run_folder(cfg.out)
    base = Path(cfg.base or long_base(cfg))
    gold = None
    if not cfg.seeds:
        gold = importlib.import_module(cfg.gold) if cfg.gold else None
        cfg.seeds = str(village_tasks.ensure(out / "data", cfg.seed) / "seed_tasks.jsonl")
    seeds = load_seed_tasks(cfg.seeds)
    rng = random.Random(cfg.seed)
    set_seed(cfg.seed)
    model, enc, _ = gpt.load_model(base, device)
    print(f"self_instruct.py: {len(seeds)} seed tasks, {cfg.rounds} rounds of {cfg.requests} "
          f"lists, device {device}")
    log = partial(log_metrics, out / "self_instruct.jsonl")
    log(fresh=True, row="settings", seed=cfg.seed, likelihood=cfg.likelihood, shots=cfg.shots)
    tasks = make_tasks(model, enc, seeds, cfg, rng, log)
    folder = out / "self_instruct"
    write_records(folder / "tasks.jsonl", tasks)
    write_records(folder / "sft.jsonl", as_records(tasks))
    instruction_quality.report(model, enc, tasks, seeds, gold, out / "data", rng, log)
    if gold and cfg.steps:
        instruction_quality.report_worth(cfg, base, device, tasks, seeds, gold, out / "data", log)
    for task in rng.sample(tasks, min(5, len(tasks))):
        print(f"--- {task['instruction']}")
        print("\n".join(f"    {i['input']!r} -> {i['output']!r}" for i in task["instances"]))
    print(f"---\nsaved {folder / 'tasks.jsonl'}, and as chats for sft.py: sft.jsonl; "
          f"next: python self_reward.py --out {out}")


if __name__ == "__main__":
    start(main, Config, __doc__)
