"""Self-Instruct: a few tasks written by people, and a language model that was never tuned, grow into a training set.

Idea (Wang et al., 2212.10560). A pretrained model cannot follow instructions, but it can go on with a list of them. So let it:

    1. instructions     a numbered list of 8 (6 of people's, 2 of its own earlier ones), and it writes numbers 9, 10, ...
    2. which kind       "Is it classification?", asked in few shots
    3. instances        an input and its output; for classification the label first, then an input that gets it
                        (input first gives the commonest label again and again)
    4. filters          too short, too long, an image is asked for, ROUGE-L of 0.7 or more with any task there is, same input with
                        different outputs; and one of our own: no token that the model itself finds unlikely
    5. fine-tuning      the same model learns to follow what it wrote, in several templates

    python self_instruct.py                                  the village: 175 seed tasks, the audit, and what the data are worth
    python self_instruct.py --likelihood 0 --steps 0         the paper's filters alone
    python self_instruct.py --seeds mine.jsonl --base my.pt  your own tasks and model: {"instruction", "instances": [{"input", "output"}],
                                                             "is_classification"}; no audit, no grades

ROUGE-L alone keeps what is new, and the newest instructions are the garbled ones: hence the last filter. Four minutes on one CPU core.
Needs OUT/long/gpt.pt, the model of gpt.py that read on at a context of 320 tokens, and makes it when it is missing (three minutes).
Read next: self_reward.py.
"""
import importlib, json, random, re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

import gpt, sft
from run import UserError, announce


@dataclass
class Config:
    base: str = ""
    "the model that writes; empty: OUT/long/gpt.pt, made from OUT/gpt.pt when missing"
    seeds: str = ""
    "seed tasks, one JSON object a line, as the paper's seed_tasks.jsonl; empty: 175 of the village's"
    out: str = "out"
    "folder of the run; results go to OUT/self_instruct"
    rounds: int = 8
    "times the pool is shown and grows"
    requests: int = 64
    "lists asked for in a round"
    temperature: float = 1.0
    "of the lists; the paper's 0.7 repeats itself in a small model"
    top_p: float = 0.9
    "of the lists; the paper has 0.5"
    shots: int = 0
    "worked tasks shown before the one that wants an instance; the paper shows several, a model this small copies from them"
    likelihood: float = 0.01
    "drop an instruction with a token less likely than this to the model itself; 0: the paper's filters alone"
    steps: int = 300
    "optimizer steps of each fine-tuning run; 0 leaves the table of what the data are worth out"
    batch_tokens: int = 1024
    "tokens per step of these"
    lr: float = 1e-3
    "their peak learning rate"
    gold: str = "data.tasks"
    "module that audits tasks, for reports, and for the best of five looks in each fine-tuning that is compared there"
    seed: int = 0
    "same seed, same machine, same run"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


# The paper's templates: a prompt is put in one of them at random, so that the model learns the task and not the layout.
WITH_INPUT = ["{instruction}\nInput: {input}\nOutput:", "{instruction}\n\nInput: {input}\n\nOutput:",
              "Task: {instruction}\nInput: {input}\nOutput:", "{instruction}\n\n{input}\n\nOutput:", "{instruction}\n\n{input}\n\n",
              "{instruction}\n{input}\n\n", "Task: {instruction}\n\n{input}\n\n"]
WITHOUT_INPUT = ["{instruction} Output:", "{instruction}\nOutput:", "{instruction}\n\nOutput:", "{instruction}\n", "{instruction}\n\n",
                 "Task: {instruction}\n\n"]

KEYWORDS = "image images graph graphs picture pictures file files map maps draw plot".split()


@lru_cache(maxsize=1 << 16)
def words(text):
    """As rouge-score splits a text: lower case, everything but a-z and 0-9 parts words."""
    return tuple(re.sub(r"[^a-z0-9]+", " ", text.lower()).split())


@lru_cache(maxsize=1 << 12)
def places(text):
    """{word: bit mask of where it stands}."""
    masks = {}
    for i, word in enumerate(words(text)):
        masks[word] = masks.get(word, 0) | 1 << i
    return masks


def rouge_l(a, b):
    """F-measure of the longest common subsequence of words, as rouge-score computes it without stemming (Lin, 2004); 0 if empty.

    The subsequence is found a row at a time: the bits of one integer are a row of the dynamic program (Hyyro, 2004).
    """
    masks, m, n = places(a), len(words(a)), len(words(b))
    if not m or not n:
        return 0.0
    full = row = (1 << m) - 1
    for word in words(b):
        hits = row & masks.get(word, 0)
        row = (row + hits | row - hits) & full
    return 2 * (m - row.bit_count()) / (m + n)   # precision lcs/n and recall lcs/m make F = 2 lcs / (m + n)


def reject_reason(instruction, pool):
    """None if the instruction may join the pool (a list of texts), else the name of the filter that refuses it.

    The paper's rules, with its code's numbers: more than 3 and at most 150 words, no word that asks for what a text model cannot
    do, no "Write a program", a letter or digit of ASCII first, ROUGE-L of 0.7 at most with everything in the pool.
    """
    n = len(instruction.split())
    if n <= 3:
        return "short"
    if n > 150:
        return "long"
    if re.search(rf"\b({'|'.join(KEYWORDS)}|go to)\b", instruction, re.I):
        return "keyword"
    if instruction.startswith("Write a program"):
        return "program"
    if not re.match(r"[A-Za-z0-9]", instruction):
        return "first letter"
    return "rouge" if any(rouge_l(instruction, other) > 0.7 for other in pool) else None


def list_prompt(instructions):
    """The numbered list that the model is to go on with."""
    lines = [f"{i}. {' '.join(x.split())}" for i, x in enumerate(instructions, 1)]
    return "Come up with a series of tasks:\n" + "\n".join(lines) + f"\n{len(lines) + 1}."


def read_list(text):
    """What the model wrote after the last number -> instructions."""
    return [x for part in re.split(r"\n\d+\s?\.", text) if (x := " ".join(part.split()))]


def read_instances(text, label_first):
    """What the model wrote under a task -> [(input, output)]; a last one that was cut off has no output, or no input, and is none."""
    text = re.split(r"^Task:", text, flags=re.M)[0]
    if label_first:
        parts = [part.split("\nInput:") for part in re.split(r"^Class label:", text, flags=re.M)]
        return [(p[1].strip(), p[0].strip()) for p in parts if len(p) == 2]
    pattern = r"(?:^Input:((?:(?!^Input:).)*?)\n)?^Output:(.*?)(?=^Input:|^Output:|\Z)"   # either may have several lines
    return [(x.strip(), y.strip()) for x, y in re.findall(pattern, text, flags=re.M | re.S)]


def keep_instances(instances):
    """The paper's filters over the instances of one task: -> (kept, the reasons of what was dropped). The first five stay, where
    the paper draws five."""
    reasons, kept = [], []
    for x, y in dict.fromkeys(instances):
        colon = x.endswith(":") or y.endswith(":")
        reason = "empty output" if not y else "input is output" if x == y else "ends with a colon" if colon else None
        reasons.append(reason) if reason else kept.append((x, y))
    inputs = Counter(x for x, _ in kept if x)
    if any(n > 1 for n in inputs.values()):   # one input, two outputs: one of them is wrong, and nobody knows which
        return [], reasons + ["same input, other output"] * len(kept)
    return kept[:5], reasons + ["more than five"] * max(0, len(kept) - 5)


def ask(model, enc, prompts, max_new_tokens, batch=64, **sampling):
    """Continue plain texts -> [(text, whether the model came to an end by itself)]."""
    end, found = gpt.end_of(enc), []
    for start in tqdm(range(0, len(prompts), batch), desc="ask", mininterval=1, leave=False):
        ids = [enc.encode_ordinary(p) for p in prompts[start:start + batch]]
        if "seed" in sampling:
            sampling["seed"] += 1
        for row in gpt.generate(model, ids, max_new_tokens, stop=end, **sampling):
            found.append((enc.decode([i for i in row if i != end]), row[-1] == end))
    return found


@torch.no_grad()
def least_likely(model, enc, instructions, batch=64):
    """For each instruction the probability of its least likely token, as the first of a list: a list of floats."""
    header, found = enc.encode_ordinary("Come up with a series of tasks:\n1."), []
    for start in range(0, len(instructions), batch):
        texts = [header + enc.encode_ordinary(f" {x}\n") for x in instructions[start:start + batch]]
        rows = [torch.tensor(ids[:model.config.block_size]) for ids in texts]
        logprobs = gpt.token_logprobs(model, gpt.pad(rows).to(model.wte.weight.device))           # (B, T-1)
        found += [p[len(header) - 1:len(r) - 1].min().exp().item() for p, r in zip(logprobs, rows)]
    return found


def grow(model, enc, seeds, cfg, rng):
    """Step 1: instructions. -> (kept, in order; Counter of what became of each candidate; one row per round)."""
    kept, fate, rounds = [], Counter(), []
    for number in range(cfg.rounds):
        machine = [min(2, len(kept))] * cfg.requests   # the very first lists show people's tasks only
        prompts = [list_prompt(rng.sample(rng.sample(kept, m) + rng.sample(seeds, 8 - m), 8)) for m in machine]
        before, tried = len(kept), 0
        sampling = dict(temperature=cfg.temperature, top_p=cfg.top_p, seed=rng.randrange(2**31))
        for text, ended in ask(model, enc, prompts, model.config.block_size, **sampling):
            candidates = read_list(text)
            if not ended:   # out of room: nobody knows what was cut off, so the whole list goes, as in the paper
                fate["list without end"] += len(candidates)
                candidates = []
            odds = least_likely(model, enc, candidates) if cfg.likelihood else [1.0] * len(candidates)
            for x, p in zip(candidates, odds):
                reason = reject_reason(x, seeds + kept) or ("unlikely" if p < cfg.likelihood else None)
                fate[reason or "kept"] += 1
                tried += 1
                if reason is None:
                    kept.append(x)
        rounds.append(dict(round=number, pool=len(seeds) + before, tried=tried, kept=len(kept) - before))
    return kept, fate, rounds


def identify(model, enc, instructions, seeds, rng):
    """Step 2: is it classification? Few-shot, either kind by turns, as many as the context holds (the paper: 12 and 19). -> [bool]."""
    def block(instruction, answer=""):
        return f"Task: {instruction}\nIs it classification?{answer}"
    kinds = [rng.sample(k, len(k)) for k in ([t for t in seeds if t["is_classification"] == c] for c in (True, False))]
    room = model.config.block_size - 4 - max(len(enc.encode_ordinary(block(x))) for x in instructions)
    head = ""
    for t in (t for pair in zip(*kinds) for t in pair):
        longer = head + block(t["instruction"], " Yes\n\n" if t["is_classification"] else " No\n\n")
        if len(enc.encode_ordinary(longer)) > room:
            break
        head = longer
    answers = ask(model, enc, [head + block(x) for x in instructions], 3, temperature=0)
    return [text.strip().startswith("Yes") for text, _ in answers]


def instances(model, enc, instructions, label_first, seeds, shots, rng):
    """Step 3: inputs and outputs, from a fixed few-shot prompt, greedily. -> [[(input, output)]]."""
    shown = [t for t in seeds if t["is_classification"] == label_first]
    head = ""
    for t in rng.sample(shown, min(shots, len(shown))):
        head += f"Task: {t['instruction']}\n"
        for i in t["instances"]:
            x = f"Input: {i['input']}\n" if i["input"] else ""
            head += f"Class label: {i['output']}\n{x}" if label_first else f"{x}Output: {i['output']}\n"
        head += "\n"
    first = "Class label:" if label_first else ""
    prompts = [f"{head}Task: {x}\n{first}" for x in instructions]
    room = min(96, model.config.block_size - 1 - max((len(enc.encode_ordinary(p)) for p in prompts), default=0))
    texts = ask(model, enc, prompts, max(1, room), temperature=0)
    # Without an end, and without a next task, the last instance was cut off.
    return [read_instances(first + text, label_first)[:None if ended or "\nTask:" in text else -1] for text, ended in texts]


def first_words(instruction):
    """A verb and its object, near enough for a village: the first word, and the next that is neither article nor pronoun."""
    w, small = words(instruction) or ("",), "a an the me my it i is of to with for in from".split()
    return w[0], next((x for x in w[1:] if x not in small), "")


def prompt_of(record, rng):
    """An instruction and its input in one of the templates."""
    template = rng.choice(WITH_INPUT if record["input"] else WITHOUT_INPUT)
    return re.sub(r"\{(\w+)\}", lambda m: record[m[1]], template)   # one pass: braces in a user's text are only text


def encode(record, enc, rng):
    """-> (ids, mask): the loss falls on the output and its end token (the paper's prompt_loss_weight 0)."""
    prompt = prompt_of(record, rng)
    ids = enc.encode_ordinary(prompt)
    answer = enc.encode_ordinary(record["output"] if prompt.endswith("\n") else " " + record["output"]) + [gpt.end_of(enc)]
    return torch.tensor(ids + answer), torch.tensor([0] * len(ids) + [1] * len(answer))


def follow(model, enc, tasks, rng):
    """Greedy outputs for instructions in random templates: up to the end token, or the first line of whoever never learned to stop."""
    texts = ask(model, enc, [prompt_of(t, rng) for t in tasks], 64, temperature=0)
    return [text.strip().split("\n")[0] for text, _ in texts]


def fine_tune(base, device, records, val_score, cfg):
    """Step 5: a copy of the base model learns to follow the records. -> it, at the best of five looks at the validation tasks."""
    model, enc, _ = gpt.load_model(base, device)
    rng, T = random.Random(cfg.seed), model.config.block_size
    optimizer, step, best = gpt.adamw(model, cfg.lr, 0.01), 0, (-1.0, None)
    bar = tqdm(total=cfg.steps, desc=f"fine-tune on {len(records)}", mininterval=1, leave=False)
    while step < cfg.steps:
        examples = [(ids[:T], mask[:T]) for ids, mask in (encode(r, enc, rng) for r in records)]   # new templates in every epoch
        for rows in sft.batches([len(e[0]) for e in examples], cfg.batch_tokens, rng)[:cfg.steps - step]:
            ids, mask = (t.to(device) for t in sft.collate(examples, rows))                       # (B, T) each
            model.train()
            gpt.take_step(sft.response_loss(model(ids), ids, mask), optimizer, model, gpt.lr_at(step, cfg.steps, cfg.lr))
            step += 1
            bar.update()
            if step % max(1, cfg.steps // 5) == 0 and (score := val_score(model.eval())) > best[0]:
                best = score, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best[1])
    return model.eval()


def long_base(out, seed, device, resume=False):
    """The default base model: OUT/gpt.pt, which read on at a context of 320 tokens, mostly pages of tasks. Made when it is missing."""
    from data import tasks
    out, path = Path(out), Path(out) / "long" / "gpt.pt"
    if not (out / "gpt.pt").exists():
        announce(out / "gpt.pt", "pretraining it", resume)
        gpt.main(gpt.Config(out=str(out), seed=seed, device=device, resume=resume))
    if not path.exists():
        announce(path, "OUT/gpt.pt reads on, pages of tasks, with a longer context,", resume)
        pages = tasks.ensure(out / "data", seed) / "pages"
        gpt.main(gpt.Config(init=str(out / "gpt.pt"), data=str(pages), out=str(path.parent), block_size=320, steps=6000, seed=seed,
                            device=device, resume=resume))
    return path


def read_seeds(path):
    """Seed tasks in the paper's format -> list of dicts; raises UserError for a malformed or an empty file."""
    found = []
    for where, r in sft.read_records(path):
        given = r.get("instances")
        if not isinstance(r.get("instruction"), str) or not isinstance(given, list) or not all(
                isinstance(i, dict) and isinstance(i.get("output"), str) and isinstance(i.get("input", ""), str) for i in given) or (
                r.get("is_classification", False) not in (True, False, "true", "True", "false", "False")):
            raise UserError(f'{where}: expected {{"instruction": text, "instances": [{{"input", "output"}}], '
                            f'"is_classification": true or false}}')
        found.append({"instruction": r["instruction"], "is_classification": r.get("is_classification") in (True, "true", "True"),
                      "instances": [{"input": i.get("input") or "", "output": i["output"]} for i in given]})
    if len(found) < 8:
        raise UserError(f"{path}: {len(found)} seed tasks; a list shows 8 at a time, so bring 8 and more")
    return found


def as_records(tasks):
    """Tasks with instances -> Alpaca records, one each instance."""
    return [{"instruction": t["instruction"], **i} for t in tasks for i in t["instances"]]


def corpus_lines(folder):
    """Every line of every text that the model has read, without list numbers and 'Task:': what is among them is not new."""
    found = set()
    for file in Path(folder).rglob("*.txt"):
        found.update(re.sub(r"^(\d+\.|Task:) ", "", line) for line in gpt.read_text(file).split("\n"))
    return found


def statistics(tasks, seeds, read):
    """Diversity of what was kept: -> dict of plain numbers. read: the lines of the texts that the model has read."""
    new = [t["instruction"] for t in tasks]
    nearest = [max(rouge_l(x, s["instruction"]) for s in seeds) for x in new]
    pairs = Counter(first_words(x) for x in new)
    verbs = Counter(v for v, _ in pairs.elements()).most_common(20)
    top = sum(n for v, _ in verbs for n in sorted((n for (w, _), n in pairs.items() if w == v), reverse=True)[:4])
    given = {s["instruction"] for s in seeds}
    histogram = [sum(i <= 10 * r < i + 1 or i == 9 and r == 1 for r in nearest) for i in range(10)]
    return dict(new_share=sum(x not in read and x not in given for x in new) / len(new), verb_noun_pairs=len(pairs),
                verb_noun_top=top / len(new), rouge_to_seed=sum(nearest) / len(nearest), histogram=histogram,
                words=sum(len(x.split()) for x in new) / len(new))


def audit(tasks, gold):
    """The paper's table of quality, over everything, first instance of each task: valid, input fits, output right, all three."""
    found = [gold.audit(t["instruction"], t["instances"][0]["input"], t["instances"][0]["output"]) for t in tasks if t["instances"]]
    n, read = max(1, len(found)), [gold.read_instruction(t["instruction"]) for t in tasks]
    pairs = [t for t in read if t and t["manner"]]
    kinds = [(r["op"][1] in gold.CLASSIFICATION) == t["is_classification"] for t, r in zip(tasks, read) if r]
    return dict(tasks=len(tasks), with_instance=n, valid=len(kinds) / len(tasks), fits=sum(f[1] for f in found) / n,
                right=sum(f[2] for f in found) / n, kind_right=sum(kinds) / max(1, len(kinds)),
                unseen_pairs=sum(not gold.seen(t["op"], t["manner"]) for t in pairs) / len(tasks))


def corrected(records, gold, rng):
    """The 44-to-54 study: the same instructions and inputs, with outputs of somebody who knows; what nobody can answer is left out."""
    found = []
    for r in records:
        task = gold.read_instruction(r["instruction"])
        whole = task and gold.read_input(task, r["input"])
        if whole:
            found.append({**r, "output": gold.ideal(whole, rng)})
    return found


def worth(cfg, base, seeds, made, device, gold, folder):
    """What the data are worth: the same base model tuned on this and on that, graded on held-out tasks. -> rows of the table."""
    tests, val = ([r for _, r in sft.read_records(folder / f"{name}.jsonl")] for name in ("tasks_test", "tasks_val"))
    rng = random.Random(cfg.seed)

    def grades(model, tasks):
        return [gold.helpful(t, a) for t, a in zip(tasks, follow(model, enc, tasks, random.Random(0)))]

    model, enc, _ = gpt.load_model(base, device)
    seed_records, own = as_records(seeds), as_records(made)
    own = rng.sample(own, len(own))
    world = []
    for _ in own:
        t = gold.new_task(rng)
        world.append({"instruction": t["instruction"], "input": t["input"], "output": gold.ideal(t, rng)})
    arms = {"base, not tuned": None,
            "seeds only": seed_records,
            "seeds + a quarter of its own": seed_records + own[:len(own) // 4],
            "seeds + half of its own": seed_records + own[:len(own) // 2],
            "seeds + all of its own": seed_records + own,
            "the same, outputs corrected": seed_records + corrected(own, gold, rng),
            "seeds + as many of the world's": seed_records + world,
            "all of these": seed_records + world + own}
    rows, seeds_only = [], None
    for name, records in arms.items():
        if records:
            model = fine_tune(base, device, records, lambda m: sum(grades(m, val)), cfg)
        got = grades(model, tests)
        seeds_only = got if name == "seeds only" else seeds_only
        row = dict(arm=name, records=len(records or []), gold=sum(got) / len(got))
        for part in ("seen", "unseen", "user"):
            of_part = [g for g, t in zip(got, tests) if t["part"] == part]
            row[part], row[f"{part}_whole"] = sum(of_part) / len(of_part), sum(g > 0.999 for g in of_part) / len(of_part)
        if seeds_only:
            gain = torch.tensor([a - b for a, b in zip(got, seeds_only)], dtype=torch.float64)
            row["above_seeds"], row["above_seeds_ci"] = gain.mean().item(), 1.96 * gain.std().item() / len(gain) ** 0.5
        rows.append(row)
    return rows


def label_shares(model, enc, tasks, seeds, gold, rng):
    """Why labels come first: of the first outputs to classification tasks, how many are the commonest label of their topic?"""
    row, group = {}, [t["instruction"] for t in tasks if t["is_classification"]]
    for name, label_first in (("input_first", False), ("label_first", True)):
        labels = {}
        for x, found in zip(group, instances(model, enc, group, label_first, seeds, 0, rng)):
            task = gold.read_instruction(x)
            for text, _ in found if task else ():
                whole = gold.read_input(task, text)
                if whole and task["op"][1] in gold.CLASSIFICATION:
                    labels.setdefault(task["op"][1], []).append(gold.label_of(whole))
        n = sum(map(len, labels.values()))
        row[name] = sum(max(Counter(v).values()) for v in labels.values()) / n if n else None
    return row


def make_tasks(model, enc, seeds, cfg, rng, log):
    """Steps 1 to 4 -> tasks with instances, what was refused counted aloud."""
    made, fate, rounds = grow(model, enc, [s["instruction"] for s in seeds], cfg, rng)
    if not made:
        raise UserError(f"not one usable instruction; has this model read numbered lists? What became of its lines: {dict(fate)}")
    print("candidates:  " + ", ".join(f"{k} {n}" for k, n in fate.most_common()))
    for r in rounds:
        print("  pool {pool:5d}   candidates {tried:5d}   kept {kept:4d}".format(**r))
    tasks = [{"instruction": x, "is_classification": c} for x, c in zip(made, identify(model, enc, made, seeds, rng))]
    dropped = Counter()
    for label_first in (False, True):
        group = [t for t in tasks if t["is_classification"] == label_first]
        for t, found in zip(group, instances(model, enc, [t["instruction"] for t in group], label_first, seeds, cfg.shots, rng)):
            pairs, reasons = keep_instances(found)
            t["instances"] = [{"input": x, "output": y} for x, y in pairs]
            dropped.update(reasons + ([] if found else ["no instance"]))
    print("instances:   " + ", ".join(f"{k} {n}" for k, n in [("kept", len(as_records(tasks))), *dropped.most_common()]))
    log(row="growth", candidates=dict(fate), instances=dict(dropped), kept_instances=len(as_records(tasks)), rounds=rounds)
    return tasks


def write_jsonl(path, records):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8", newline="\n")
    part.replace(path)


def show(title, row):
    print(f"{title:12} " + "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def main(cfg):
    gpt.require(cfg, 1, "rounds", "requests", "batch_tokens")
    gpt.require(cfg, 0, "temperature", "lr", "shots", most=10)
    gpt.require(cfg, 0, "top_p", "likelihood", most=1)
    gpt.require(cfg, 0, "steps")
    device, out, folder = gpt.pick_device(cfg.device), gpt.run_folder(Path(cfg.out)), Path(cfg.out) / "data"
    base = Path(cfg.base or long_base(cfg.out, cfg.seed, cfg.device))
    gold = importlib.import_module(cfg.gold) if cfg.gold and not cfg.seeds else None
    if not cfg.seeds:
        from data import tasks as village_tasks
        cfg.seeds = str(village_tasks.ensure(folder, cfg.seed) / "seed_tasks.jsonl")
    seeds, rng, log_file = read_seeds(cfg.seeds), random.Random(cfg.seed), out / "self_instruct.jsonl"
    gpt.set_seed(cfg.seed)
    model, enc, _ = gpt.load_model(base, device)
    print(f"self_instruct.py: {len(seeds)} seed tasks, {cfg.rounds} rounds of {cfg.requests} lists, device {device}")
    gpt.log_metrics(log_file, fresh=True, row="settings", seed=cfg.seed, likelihood=cfg.likelihood, shots=cfg.shots)
    tasks = make_tasks(model, enc, seeds, cfg, rng, lambda **row: gpt.log_metrics(log_file, **row))
    write_jsonl(out / "self_instruct" / "tasks.jsonl", tasks)
    write_jsonl(out / "self_instruct" / "sft.jsonl", as_records(tasks))
    reports = {"diversity": statistics(tasks, seeds, corpus_lines(folder) if folder.exists() else set())}
    if gold:
        reports["audit"] = audit(tasks, gold)
        reports["one label"] = label_shares(model, enc, tasks, seeds, gold, rng)
    for name, row in reports.items():
        show(name, row)
        gpt.log_metrics(log_file, row=name, **row)
    for row in worth(cfg, base, seeds, tasks, device, gold, folder) if gold and cfg.steps else ():
        gpt.log_metrics(log_file, row="worth", **row)
        print("{arm:34} {records:5d}   gold {gold:.3f}   seen {seen:.3f}   unseen {unseen:.3f}   user {user:.3f}".format(**row)
              + ("   above seeds only {above_seeds:+.3f} ±{above_seeds_ci:.3f}".format(**row) if "above_seeds" in row else ""))
    for t in rng.sample(tasks, min(5, len(tasks))):
        print(f"--- {t['instruction']}\n    " + "\n    ".join(f"{i['input']!r} -> {i['output']!r}" for i in t["instances"]))
    print(f"---\nsaved {out / 'self_instruct' / 'tasks.jsonl'}, and as chats for sft.py: sft.jsonl; "
          f"next: python self_reward.py --out {out}")


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
