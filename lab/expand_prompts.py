"""Expanded prompts: a model that has read a few hundred of people's prompts writes more for PPO.

Claim (InstructGPT, 2203.02155, appendix A.1, and Self-Instruct). A model of instructions needs many
and varied prompts. People write some; few-shot examples turn these into many more.

PPO needs prompts alone, no demonstrations and no rankings: the reward model grades what the policy
answers. So the base model itself can extend people's PEOPLE prompts. It reads a page of five of
them and continues it, in one of two forms:

    gpt.pt          one prompt a line. OUT/gpt.pt has never read such a page
    long/gpt.pt     a numbered list, as in self_instruct.py. OUT/long/gpt.pt has read numbered lists
                    of prompts, which other people of the village asked

A candidate is new if it is none of people's PEOPLE prompts and comes for the first time; it is
unread if it stands in no text of pretraining. The filters drop what is too short or too long, and
what has a token that its writer finds unlikely. data/tasks.py reads a prompt back into a task of
the village; `mean something` is the share that it can read. It only reports: no filter uses it.

Three copies of OUT/sft.pt are then improved by PPO against OUT/reward.pt, with equal numbers of
responses, and graded on prompts of held-out users:

    people          people's PEOPLE prompts alone
    expanded        the same, and those that long/gpt.pt wrote and the filters kept
    more people     as many of people's prompts as `expanded` has: the upper bound

    python lab/expand_prompts.py                   three seeds, each with its own PEOPLE prompts
    python lab/expand_prompts.py --people 50       fewer people

Twelve minutes on two CPU cores. Needs OUT/reward.pt and OUT/long/gpt.pt and trains them first if
they are missing. What was written is in OUT/expand_prompts. Read next: ../self_instruct.py.
"""
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
import ppo
import reward
import sft
from data import corpus, tasks, village
from data.formats import load_prompts, mean_grade, write_records
from data.records import read_records
from lab.cot import mean, print_table, spread
from lab.instruction_quality import lines_read
from scaffold.cli import BaseConfig, pick_device, require, run_folder, start
from scaffold.run import ensure_stage, log_metrics, set_seed
from self_instruct import ask, least_likely, list_prompt, long_base, read_list, reject_reason


@dataclass
class Config(BaseConfig):
    people: int = 200            # prompts of people; those of a single turn are shown to the writer
    lists: int = 256             # pages that each writer continues
    likelihood: float = 0.01     # drop prompts with a less likely token; 0 keeps them
    updates: int = 30            # PPO updates of each copy
    rollout_size: int = 128      # responses per update
    seeds: int = 3               # repetitions with their own prompts, samples and PPO runs
    seed: int = 0                # first seed


SHOWN = 5                                   # prompts on a page
RUNS = {"people": "people", "expanded": "people and model", "more": "more people"}


class Writer(NamedTuple):
    """How a base model is asked for prompts."""
    page: Callable    # prompts (strings) -> the string that the model continues
    read: Callable    # its continuation -> candidates (strings)


def line_page(prompts):
    return "\n".join(prompts) + "\n"


def read_lines(text):
    return [" ".join(line.split()) for line in text.split("\n") if line.strip()]


WRITERS = {"gpt.pt": Writer(line_page, read_lines), "long/gpt.pt": Writer(list_prompt, read_list)}


def single_turn(records):
    """Return the prompts of one turn as strings."""
    return [r["prompt"][0]["content"] for r in records if len(r["prompt"]) == 1]


def write_candidates(writer, model, enc, people, lists, rng):
    """Let the model continue pages of people's prompts -> candidates (strings)."""
    pages = [writer.page(rng.sample(people, SHOWN)) for _ in range(lists)]
    sampling = dict(temperature=1.0, top_p=0.9, seed=rng.randrange(2**31))
    candidates = []
    for text, ended in ask(model, enc, pages, model.config.block_size, **sampling):
        if ended:       # else the last prompt is cut off at an unknown place
            candidates += writer.read(text)
    return candidates


def new_ones(candidates, people):
    """Return the candidates that people did not write, each once, in order."""
    return [x for x in dict.fromkeys(candidates) if x not in set(people)]


def passes(prompt, probability, likelihood):
    """Return whether a prompt passes the simple filters: Self-Instruct's rules and likelihood.

    probability: of its least likely token. Similarity (ROUGE) is no reason to drop a prompt: people
    ask for similar things, too.
    """
    return probability >= likelihood and reject_reason(prompt, pool=[]) is None


def use_of(prompt):
    """Return the use case of a prompt of one turn, or None if it means nothing."""
    kind = tasks.read_prompt(prompt)["kind"]
    return village.KINDS[kind].use if kind in village.KINDS else None


def measure_writing(candidates, new, kept, read):
    """Count what became of the candidates -> part of a row. read: lines of pretraining."""
    uses = Counter(filter(None, map(use_of, kept)))
    return {
        "candidates": len(candidates),
        "new": len(new),
        "unread": sum(x not in read for x in new),
        "new_meaning": sum(use_of(x) is not None for x in new),
        "kept": len(kept),
        "kept_unread": sum(x not in read for x in kept),
        "kept_meaning": uses.total(),
        "uses": dict(uses),
        "sample": kept[:5],
    }


def copy_stages(out, folder):
    """Copy the checkpoints that PPO starts from, so that its policies do not land in OUT."""
    folder.mkdir(exist_ok=True)
    for name in ("gpt.pt", "sft.pt", "reward.pt"):
        shutil.copy(out / name, folder / name)


def grade(model, enc, exam, seed):
    """Return the mean gold of responses at temperature 1 to the prompts of the exam."""
    prompts = [record["prompt"] for record in exam]
    return mean_grade(village.gold, exam, sft.sample_responses(model, enc, prompts, 64, seed=seed))


def improve(name, prompts, folder, exam, seed, device, cfg):
    """Improve a copy of sft.pt by PPO on these records -> part of a row."""
    path = folder / f"{name}-seed{seed}.jsonl"
    write_records(path, prompts)
    ppo.main(ppo.Config(out=str(folder), name=name, prompts=str(path), updates=cfg.updates,
                        rollout_size=cfg.rollout_size, seed=seed, device=cfg.device))
    model, enc, _ = gpt.load_model(folder / f"{name}.pt", device)
    _, last = read_records(folder / f"{name}.jsonl")[-1]
    return {"prompts": len(prompts), "score": last["objective/scores"], "kl": last["objective/kl"],
            "gold": grade(model, enc, exam, seed)}


def verdict(rows, gain=0.02, meaning=0.8):
    """Judge the claim from the rows of all seeds, in one sentence.

    `meaning` of the new prompts that are kept must mean something, and they must raise gold by
    `gain` on average and by more than 0 in each seed.
    """
    written = [r for r in rows if r["row"] == "writing" and r["writer"] == "long/gpt.pt"]
    share = mean([r["kept_meaning"] / max(1, r["kept"]) for r in written])
    of = {(r["run"], r["seed"]): r["gold"] for r in rows if r["row"] == "ppo"}
    seeds = sorted({r["seed"] for r in rows})
    added = [of["expanded", s] - of["people", s] for s in seeds]
    bound = [of["more", s] - of["people", s] for s in seeds]
    holds = share >= meaning and mean(added) >= gain and min(added) > 0
    return (f"the claim {'holds' if holds else 'does not hold'} here: {share:.0%} of the new "
            f"prompts mean something (wanted {meaning:.0%}); they change gold by "
            f"{mean(added):+.3f} (worst seed {min(added):+.3f}; wanted {gain:+.3f}), as many "
            f"prompts of people by {mean(bound):+.3f}")


def print_results(rows, people):
    """Print means and ranges over the seeds: what was written, its use cases, and its worth.

    people: the records of people's prompts, for their use cases.
    """
    writing = [r for r in rows if r["row"] == "writing"]
    table = []
    for name in WRITERS:
        chosen = [r for r in writing if r["writer"] == name]
        line = {"writer": name}
        for key, heading in (("candidates", "candidates"), ("new", "new"), ("unread", "unread"),
                             ("new_meaning", "mean something"), ("kept", "kept"),
                             ("kept_meaning", "mean something (kept)")):
            line[heading] = spread([r[key] for r in chosen], 0)
        table.append(line)
    print_table(table)
    asked = Counter(record["task"]["use"] for record in people)
    table = []
    for use in village.SHARES:
        shares = [r["uses"].get(use, 0) / max(1, r["kept_meaning"]) for r in chosen]
        table.append({"use case": use, "people": f"{asked[use] / asked.total():.0%}",
                      f"{name}, mean something": f"{mean(shares):.0%}"})
    print_table(table)
    table = [{"PPO on": "no PPO: sft.pt", "prompts": "-", "gold, held-out users": spread(
        [r["gold"] for r in rows if r["row"] == "sft"], 3), "reward in training": "-", "KL": "-"}]
    for run, title in RUNS.items():
        chosen = [r for r in rows if r["row"] == "ppo" and r["run"] == run]
        table.append({"PPO on": title, "prompts": spread([r["prompts"] for r in chosen], 0),
                      "gold, held-out users": spread([r["gold"] for r in chosen], 3),
                      "reward in training": spread([r["score"] for r in chosen]),
                      "KL": spread([r["kl"] for r in chosen], 1)})
    print_table(table)


def main(cfg):
    require(cfg, 10, "people")      # a page shows five of a single turn
    require(cfg, 1, "lists", "seeds")
    require(cfg, 0, "likelihood", most=1)
    require(cfg, ppo.Config.value_warmup + 1, "updates")
    require(cfg, 2, "rollout_size")
    out = run_folder(cfg.out)
    device = pick_device(cfg.device)
    ensure_stage(out / "reward.pt", reward, cfg)
    long_base(cfg)
    folder = out / "expand_prompts"
    copy_stages(out, folder)
    data = corpus.ensure(out / "data", cfg.seed)
    everybody = load_prompts(data / "prompts_train.jsonl")
    exam = load_prompts(data / "prompts_val.jsonl") + load_prompts(data / "prompts_test.jsonl")
    read = lines_read(data)
    rows = []

    def log(**row):
        rows.append(row)
        log_metrics(out / "lab-expand_prompts.jsonl", fresh=len(rows) == 1, **row)

    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        set_seed(seed)
        rng = random.Random(seed)
        shuffled = rng.sample(everybody, len(everybody))
        people = shuffled[:cfg.people]
        shown = single_turn(people)
        for name, writer in WRITERS.items():
            model, enc, _ = gpt.load_model(out / name, device)
            candidates = write_candidates(writer, model, enc, shown, cfg.lists, rng)
            new = new_ones(candidates, shown)
            probabilities = least_likely(model, enc, new)
            kept = [x for x, p in zip(new, probabilities) if passes(x, p, cfg.likelihood)]
            log(row="writing", seed=seed, writer=name,
                **measure_writing(candidates, new, kept, read))
        added = [{"prompt": [{"role": "user", "content": x}]} for x in kept]
        model, enc, _ = gpt.load_model(out / "sft.pt", device)
        log(row="sft", seed=seed, gold=grade(model, enc, exam, seed))
        runs = {"people": people, "expanded": people + added,
                "more": shuffled[:cfg.people + len(added)]}
        for run, prompts in runs.items():
            log(row="ppo", seed=seed, run=run,
                **improve(run, prompts, folder, exam, seed, device, cfg))
            print(f"seed {seed}, {RUNS[run]}: done", flush=True)
    print_results(rows, everybody)
    print(verdict(rows))


if __name__ == "__main__":
    start(main, Config, __doc__)
