"""Structured output: extraction as JSON that a program can read, few-shot against tuned.

Claim. A small base model does not pick up JSON from the examples in its prompt, as GPT-3 would. A
few hundred demonstrations, mixed with the usual ones, teach it: the output parses, the values are
right, combinations of fields that nobody asked for in training work as well, and the other tasks do
not suffer.

A request names one to three fields. A field that the text does not mention is null:

    Ann lives near the mill. Ann lost a ball. Give the place and the food as JSON.
    {"place": "mill", "food": null}

The response is parsed by Python's json module, which is stricter than an eye: one missing quotation
mark, or one word after the closing brace, and nothing can be read. Two ways to teach the format:

    few-shot    OUT/gpt.pt, never tuned, continues a page with 0, 1, 2 or 4 examples of a request
                for the same fields, or as many of them as fit the context. The page ends with the
                opening brace
    tuned       copies of OUT/gpt.pt are fine-tuned on demonstrations of the usual tasks, mixed with
                no, a few or many requests for JSON

Three groups of requests to test with: `asked` (one or two fields, as in tuning), `new pair` (two
fields that tuning never asks for together) and `three fields` (tuning asks for two at most).

    python lab/structured.py                    three seeds, each with its own new pairs
    python lab/structured.py --examples 1000    fewer requests for JSON

Three minutes on two CPU cores. Needs OUT/gpt.pt and trains it first if it is missing.
Read next: lab/tool_use.py.
"""
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
import sft
from data import corpus, village
from data.formats import load_chats
from data.records import read_records
from lab import templates
from lab.cot import mean, print_table, spread
from scaffold.cli import BaseConfig, pick_device, require, run_folder, start
from scaffold.run import ensure_stage, log_metrics, set_seed
from self_instruct import ask


@dataclass
class Config(BaseConfig):
    examples: int = 6000         # requests for JSON that the last copy reads; another reads a
                                 # tenth of them, and one none
    demos: int = 2000            # demonstrations of the usual tasks, mixed in
    epochs: int = 2              # passes over both
    lr: float = 2e-3             # peak learning rate, cosine to a tenth; twice that of sft.py,
                                 # because JSON is new to the model
    batch_tokens: int = 1024     # tokens per step, padding included
    n: int = 100                 # test requests of each group
    seeds: int = 3               # repetitions with their own new pairs, texts and order
    seed: int = 0                # first seed


FIELDS = list(village.LIFE)
TOLD = 2                                    # statements of a text
SHOTS = (0, 1, 2, 4)
OPENING = "{"                               # the base model would rather end its document than
                                            # begin JSON, so a page begins it
GROUPS = ("asked", "new pair", "three fields")


class Request(NamedTuple):
    """A request for JSON. record: {field: its word, or None}, in the order of the request."""
    prompt: str
    record: dict


class Grade(NamedTuple):
    """What a program can do with a response."""
    valid: bool    # parse it
    keys: bool     # find an object with the fields of the request and no others
    right: dict    # read the right value: {field: bool}

    @property
    def exact(self):
        return self.keys and all(self.right.values())


def make_request(fields, rng):
    """Draw a text about a person and ask for these fields -> Request."""
    pick = village.picker(rng)
    told = rng.sample(FIELDS, TOLD)
    words = {slot: pick(slot) for slot in ["person", *told]}
    text = " ".join(village.LIFE[field].statement for field in told).format(**words)
    *others, last = [f"the {field}" for field in fields]
    listed = f"{', '.join(others)} and {last}" if others else last
    return Request(f"{text} Give {listed} as JSON.", {field: words.get(field) for field in fields})


def new_pairs(seed):
    """Return the pairs of fields that tuning never asks for; no field is in two of them."""
    fields = random.Random(seed).sample(FIELDS, len(FIELDS))
    return {frozenset(pair) for pair in zip(fields[::2], fields[1::2])}


def draw_fields(group, seed, rng):
    """Draw the fields of a request of a group."""
    if group == "three fields":
        return rng.sample(FIELDS, 3)
    while True:
        fields = rng.sample(FIELDS, 2 if group == "new pair" else rng.choice([1, 2]))
        if (frozenset(fields) in new_pairs(seed)) == (group == "new pair"):
            return fields


def test_requests(n, seed):
    """Return {group: n Requests}."""
    rng = random.Random(f"{seed} test")
    return {group: [make_request(draw_fields(group, seed, rng), rng) for _ in range(n)]
            for group in GROUPS}


def training_chats(n, seed, tests):
    """Return n requests for JSON as chats, none of them in the tests. Fewer are the first ones."""
    rng = random.Random(f"{seed} training")
    tested = {request.prompt for group in tests.values() for request in group}
    chats = []
    while len(chats) < n:
        request = make_request(draw_fields("asked", seed, rng), rng)
        if request.prompt not in tested:
            messages = [{"role": "user", "content": request.prompt},
                        {"role": "assistant", "content": json.dumps(request.record)}]
            chats.append({"messages": messages})
    return chats


def grade(record, response):
    """Parse a response and compare it with the record -> Grade."""
    try:
        found = json.loads(response)
    except (ValueError, RecursionError):
        return Grade(False, False, dict.fromkeys(record, False))
    if not isinstance(found, dict):
        return Grade(True, False, dict.fromkeys(record, False))
    right = {field: field in found and found[field] == word for field, word in record.items()}
    return Grade(True, found.keys() == record.keys(), right)


def scores(requests, responses):
    """Return the shares of a group's responses that parse, have the right keys and are exact.

    fields, named and nulls are shares of right values: of all fields that are asked for, of those
    that the text names, and of those that it does not name. by_field has the share of each field.
    """
    grades = [grade(r.record, response) for r, response in zip(requests, responses)]
    right = [(field, r.record[field], g.right[field])
             for r, g in zip(requests, grades) for field in r.record]
    by_field = {}
    for field in FIELDS:
        of_field = [ok for name, _, ok in right if name == field]
        by_field[field] = mean(of_field) if of_field else None
    return {
        "valid": mean([g.valid for g in grades]),
        "keys": mean([g.keys for g in grades]),
        "exact": mean([g.exact for g in grades]),
        "fields": mean([ok for _, _, ok in right]),
        "named": mean([ok for _, word, ok in right if word is not None]),
        "nulls": mean([ok for _, word, ok in right if word is None]),
        "by_field": by_field,
        "sample": f"{requests[0].prompt} {responses[0]}",
    }


def page(request, shots, block_size, enc, rng):
    """Return (prompt, number of examples shown): a page that ends with the request and OPENING.

    The examples ask for the same fields. The last ones are left out if the page and the right
    response are longer than the context.
    """
    def block(example):
        return f"{example.prompt}\n{json.dumps(example.record)}\n"

    examples = [block(make_request(list(request.record), rng)) for _ in range(shots)]
    while examples:
        whole = "".join(examples) + block(request)
        if len(enc.encode_ordinary(whole)) <= block_size:
            break
        examples.pop()
    return "".join(examples) + f"{request.prompt}\n{OPENING}", len(examples)


def few_shot_rows(model, enc, tests, seed):
    """Return a row for each number of shots and each group. A response is the rest of the line."""
    rows = []
    for shots in SHOTS:
        for group, requests in tests.items():
            rng = random.Random(f"{seed} {group}")
            pages = [page(request, shots, model.config.block_size, enc, rng)
                     for request in requests]
            texts = ask(model, enc, [prompt for prompt, _ in pages], 64, temperature=0)
            responses = [OPENING + text.split("\n")[0] for text, _ in texts]
            rows.append({"model": "few-shot", "examples": shots, "group": group,
                         "shown": mean([shown for _, shown in pages]),
                         **scores(requests, responses)})
    return rows


def tuned_rows(model, enc, tests, usual, n):
    """Return a row for each group, of a copy that was tuned on n requests for JSON."""
    gold = templates.grade(model, enc, usual)
    rows = []
    for group, requests in tests.items():
        prompts = [[{"role": "user", "content": request.prompt}] for request in requests]
        responses = sft.sample_responses(model, enc, prompts, 64, temperature=0)
        rows.append({"model": "tuned", "examples": n, "group": group, "gold": gold,
                     **scores(requests, responses)})
    return rows


def chosen(rows, model, examples):
    """Return the rows of a model with this number of examples."""
    return [r for r in rows if (r["model"], r["examples"]) == (model, examples)]


def by_seed(rows, key, *groups):
    """Return one value per seed: the mean of a key over the rows of these groups, or of all."""
    seeds = sorted({r["seed"] for r in rows})
    return [mean([r[key] for r in rows if r["seed"] == seed and r["group"] in (groups or GROUPS)])
            for seed in seeds]


def verdict(rows, low=0.1, high=0.9, gap=0.1, harm=0.05):
    """Judge each part of the claim from the rows of all seeds, in one sentence.

    Compares means over the seeds. Without good responses to requests as in tuning, it means nothing
    that the other groups are no worse, so the claim does not hold.
    """
    few = max(mean(by_seed(chosen(rows, "few-shot", shots), "exact")) for shots in SHOTS)
    most = max(r["examples"] for r in rows if r["model"] == "tuned")
    tuned = chosen(rows, "tuned", most)
    exact = {group: mean(by_seed(tuned, "exact", group)) for group in GROUPS}
    change = mean(by_seed(tuned, "gold")) - mean(by_seed(chosen(rows, "tuned", 0), "gold"))
    parts = {
        f"few-shot fails (best {few:.2f})": few < low,
        f"tuned works ({exact['asked']:.2f})": exact["asked"] >= high,
    }
    for group in GROUPS[1:]:
        parts[f"{group} as well ({exact[group]:.2f})"] = exact[group] >= exact["asked"] - gap
    parts[f"the usual tasks keep their gold ({change:+.2f})"] = change >= -harm
    held = "does not hold"
    if all(parts.values()):
        held = "holds"
    elif exact["asked"] >= high:
        held = "holds in part"
    listed = "; ".join(f"{part}: {'yes' if true else 'no'}" for part, true in parts.items())
    return f"the claim {held} here, by exact responses after {most} examples: {listed}"


def print_results(rows):
    """Print means and ranges over the seeds, and a sample of each model of the last seed."""
    table = []
    samples = []
    for model, examples in dict.fromkeys((r["model"], r["examples"]) for r in rows):
        of_model = chosen(rows, model, examples)
        line = {"model": model, "examples": f"{examples}"}
        if model == "few-shot":
            line["examples"] += f" ({mean(by_seed(of_model, 'shown')):.1f} fit)"
        line["valid JSON"] = spread(by_seed(of_model, "valid"))
        for group in GROUPS:
            line[f"exact, {group}"] = spread(by_seed(of_model, "exact", group))
        for key in ("fields", "named", "nulls"):
            line[key] = spread(by_seed(of_model, key))
        line["gold of usual"] = "-"
        if model == "tuned":
            line["gold of usual"] = spread(by_seed(of_model, "gold"))
        table.append(line)
        samples.append(f"{model} {examples}: {of_model[-len(GROUPS)]['sample']}")
    print_table(table)
    print("\n".join(samples))


def main(cfg):
    require(cfg, 10, "examples")
    require(cfg, 20, "n")       # so few as leave no group without nulls or without named fields
    require(cfg, 1, "demos", "epochs", "batch_tokens", "seeds")
    require(cfg, 0, "lr", most=10)
    out = run_folder(cfg.out)
    device = pick_device(cfg.device)
    ensure_stage(out / "gpt.pt", gpt, cfg)
    folder = corpus.ensure(out / "data", cfg.seed)
    demos = load_chats(folder / "sft_train.jsonl")
    usual = [record for _, record in read_records(folder / "prompts_val.jsonl")]
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        tests = test_requests(cfg.n, seed)
        chats = training_chats(cfg.examples, seed, tests)
        mixed_in = random.Random(seed).sample(demos, min(cfg.demos, len(demos)))
        model, enc, _ = gpt.load_model(out / "gpt.pt", device)
        found = few_shot_rows(model, enc, tests, seed)
        print(f"seed {seed}, few-shot: done", flush=True)
        for n in (0, cfg.examples // 10, cfg.examples):
            set_seed(seed)
            model, _, _ = gpt.load_model(out / "gpt.pt", device)
            examples = sft.tokenize(chats[:n] + mixed_in, enc, model.config.block_size)
            for epoch in sft.fine_tune(model, examples, cfg.epochs, cfg.batch_tokens, cfg.lr, seed,
                                       f"{n} examples"):
                print(f"seed {seed}, {n} examples: epoch {epoch} done", flush=True)
            found += tuned_rows(model, enc, tests, usual, n)
        for row in found:
            rows.append({"seed": seed} | row)
            log_metrics(out / "lab-structured.jsonl", fresh=len(rows) == 1, **rows[-1])
    print_results(rows)
    print(verdict(rows))


if __name__ == "__main__":
    start(main, Config, __doc__)
