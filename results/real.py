"""Run the scripts on four public files of real text, and publish the numbers.

    mkdir real; cd real; from=https://raw.githubusercontent.com
    curl -LO $from/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    curl -LO $from/anthropics/hh-rlhf/master/harmless-base/test.jsonl.gz
    curl -LO $from/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json
    curl -LO $from/yizhongw/self-instruct/main/data/seed_tasks.jsonl
    cd ..; python results/real.py

Twenty-five minutes on two CPU cores. Each command is printed before it runs; README.md (I) has
what it gave. The pairs were ranked by people and are offensive by design: they try to get a model
to say harmful things. Pairs of one first question are in one part, because many conversations begin
with the same one. The settings were not tuned on the held-out part.

At the end, 20 responses of each policy go to out/real/samples.txt, to be read.
"""
import gzip
import json
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpt
import self_instruct
import sft
from data import bpe, formats
from results.keep import header
from results.make import FIRST, Maker, Step
from scaffold.cli import UserError, require, start
from scaffold.record import ROOT


@dataclass
class Config:
    files: str = "real"      # the folder of the four files
    jobs: int = 2            # steps at a time, each with one thread


SHAKESPEARE, PAIRS, TASKS, SEED_TASKS = FILES = (
    "input.txt", "test.jsonl.gz", "instruction-data.json", "seed_tasks.jsonl")
REWARDS = {"epochs1": "--epochs 1", "no-logprobs": "--no-logprobs"}


def is_held_out(pair):
    """Return whether a pair belongs to the held-out fifth, by its first question."""
    question = pair["chosen"].split("\n\nAssistant:")[0]
    return zlib.crc32(question.encode()) % 5 == 0


def prepare(files, folder):
    """Write the two parts of the pairs, the text of the chosen sides, and two tokenizers."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(files / PAIRS, "rt", encoding="utf-8") as f:
        pairs = [json.loads(line) for line in f]
    train = [pair for pair in pairs if not is_held_out(pair)]
    formats.write_records(folder / "train.jsonl", train)
    formats.write_records(folder / "test.jsonl", filter(is_held_out, pairs))
    text = "\n<|end|>\n".join(pair["chosen"].strip() for pair in train)
    (folder / "train.txt").write_text(text, encoding="utf-8")
    bpe.main(bpe.Config(str(files / SHAKESPEARE), str(folder / "bytes.json"), 262))
    bpe.main(bpe.Config(str(folder / "train.txt"), str(folder / "bpe.json"), 2048))


def all_steps(files):
    """Return the commands as steps of make.py."""
    data = "--data out/real/train.jsonl --val out/real/test.jsonl"
    run = "real-pairs"
    bytes_ = ("--tokenizer out/real/bytes.json --n-layer 4 --block-size 64 --batch-tokens 768 "
              "--steps 2000 --val-fraction 0.1")
    pretrain = ("--data out/real/train.txt --tokenizer out/real/bpe.json --n-layer 4 "
                "--block-size 256 --steps 800")
    rollouts = "--prompts out/real/train.jsonl --updates 40 --rollout-size 64 --no-table"
    exam = f"--prompts out/real/test.jsonl --json --save out/{run}/eval.jsonl"

    def step(script, flags, name, metrics, folder=run, source=""):
        return Step(script, flags, FIRST, folder, {name: metrics}, source)

    return [
        step("gpt.py", f"--data {files / SHAKESPEARE} {bytes_}", "real-shakespeare", "gpt",
             "real-shakespeare"),
        step("gpt.py", pretrain, f"{run}-gpt", "gpt"),
        step("sft.py", f"{data} --epochs 2", f"{run}-sft", "sft"),
        step("reward.py", data, f"{run}-reward", "reward"),
        step("dpo.py", data, f"{run}-dpo", "dpo"),
        step("ppo.py", rollouts, f"{run}-ppo", "ppo"),
        step("evaluate.py", exam, f"{run}-eval", "eval"),
        *[step("reward.py", f"{data} {flags}", f"{run}-reward-{name}", "reward",
               f"{run}-{name}", source=run) for name, flags in REWARDS.items()],
        step("sft.py", f"--data {files / TASKS} --init out/{run}/gpt.pt", "real-tasks", "sft",
             "real-tasks", source=run),
    ]


def filter_seed_tasks(path):
    """Apply Self-Instruct's filters to the seed tasks, one after another -> a row of counts."""
    pool, reasons, instances = [], Counter(), Counter()
    for task in formats.load_seed_tasks(path):
        reason = self_instruct.reject_reason(task["instruction"], pool)
        reasons[reason or "kept"] += 1
        if reason is None:
            pool.append(task["instruction"])
        for x in task["instances"]:
            instances[self_instruct.instance_reject_reason(x["input"], x["output"]) or "kept"] += 1
    return {"instructions": dict(reasons), "instances": dict(instances)}


def write_samples(path, run, test, n=20):
    """Write the responses of each policy to n held-out prompts."""
    policies = {name: gpt.load_model(run / f"{name}.pt") for name in ("sft", "dpo", "ppo")}
    model, enc, _ = policies["sft"]
    prompts = sft.fit_prompts(formats.load_prompts(test), enc, model.config.block_size - 64)[:n]
    chats = [p["prompt"] for p in prompts]
    responses = {name: sft.sample_responses(model, enc, chats, 64, seed=FIRST)
                 for name, (model, enc, _) in policies.items()}
    lines = []
    for i, chat in enumerate(chats):
        lines.append(f"--- {chat[-1]['content']!r}")
        lines += [f"{name}: {rows[i]!r}" for name, rows in responses.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(cfg):
    require(cfg, 1, "jobs")
    files = Path(cfg.files)
    missing = [name for name in FILES if not (files / name).exists()]
    if missing:
        raise UserError(f"{files / missing[0]} is missing; see --help for the commands that "
                        f"download the four files")
    folder = ROOT / "out" / "real"
    if not (folder / "bpe.json").exists():
        prepare(files, folder)
    Maker(all_steps(files), jobs=cfg.jobs).run()
    first = header(FIRST, "python results/real.py")
    rows = [first, filter_seed_tasks(files / SEED_TASKS)]
    formats.write_records(ROOT / "results" / "real-seed-tasks.jsonl", rows)
    write_samples(folder / "samples.txt", ROOT / "out" / "real-pairs", folder / "test.jsonl")


if __name__ == "__main__":
    start(main, Config, __doc__)
