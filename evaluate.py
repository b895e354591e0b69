"""The results table: every checkpoint of a run answers the same held-out prompts and is graded.

Rows: base (the pretrained model, prompted with plain text), sft at temperature 1 and greedy, the
best of n sft samples by the reward model, and every policy in OUT (ppo, dpo, your variants) at
temperature 1.

    gold         helpful (0..1) - 1 if something is made up - 1 if rude, mean over the prompts
    new words    the same over prompts whose wording is in no training file
    win rate     share of prompts where the response beats a sample of sft by gold; ties count half
    made up      share of the unanswerable prompts that get an invented answer
    reward       mean score of the reward model
    KL           mean of log pi(y|x) - log pi_sft(y|x) over sampled responses y, in nats. Best of n:
                 log n - (n-1)/n, an upper bound. Greedy: -log pi_sft(y|x), the KL of a point mass
    lm loss      nats per token on held-out pretraining text: the cost of alignment
    ±            half of a 95% interval over the prompts

    python evaluate.py                      the table of ./out
    python evaluate.py --json               one JSON object per row
    python evaluate.py --out out/seed1      another run

Half a minute on two CPU cores. The prompts come from users no training stage has seen.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import dpo
import gpt
import reward
import sft
from data.formats import as_messages, load_grader, prompt_of, read_records, write_records
from data.text import checkpoint_text
from data.tokenizer import end_of
from scaffold.cli import BaseConfig, UserError, pick_device, require, start
from scaffold.run import load_checkpoint, set_seed
from scaffold.table import format_table


@dataclass
class Config(BaseConfig):
    prompts: str = ""            # prompts with tasks; empty: OUT/data/prompts_test.jsonl
    n: int = 512                 # number of prompts
    best_of: int = 16            # samples per prompt of the best-of-n row; 0 leaves it out
    max_new_tokens: int = 64     # longest response
    grade: str = "data.village:grade"   # module:function that grades (task, response) as a dict of
                                        # helpful, honest, harmless
    json: bool = False           # print one JSON object per row instead of the table
    save: str = ""               # also write these JSON lines to a file


@dataclass
class Exam:
    """The prompts of the table, and what all rows share."""
    chats: list            # prompts as messages: n, then the unanswerable ones
    tasks: list            # their tasks for the grader
    new: list              # whether no training file has the same wording
    n: int                 # number of prompts without the unanswerable ones
    grade: object          # the grader
    opponent: list         # gold of the sft samples that every row is compared with, (n,)


def mean_and_ci(values):
    """Return the mean of a list and the half-width of its 95% interval."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), 1.96 * x.std().item() / math.sqrt(len(x))


def base_responses(model, enc, chats, max_new_tokens, seed):
    """Prompt a pretrained model with plain text; its response is the next line."""
    prompts = [enc.encode_ordinary("".join(m["content"] + "\n" for m in chat)) for chat in chats]
    rows = gpt.generate(model, prompts, max_new_tokens, stop=end_of(enc), seed=seed)
    texts = [enc.decode([i for i in ids if not enc.is_special_token(i)]) for ids in rows]
    return [text.split("\n")[0] for text in texts]


def response_logprobs(model, enc, chats, responses):
    """Return log pi of each response (a string), its end token included: (N,)."""
    block_size = model.config.block_size
    examples = []
    for chat, response in zip(chats, responses):
        prompt = sft.render_prompt(chat, enc)
        ids = enc.encode_ordinary(response) + [end_of(enc)]
        examples.append(sft.response_example(prompt, ids[:block_size - len(prompt)]))
    return dpo.all_logprobs(model, examples)


def is_policy(path):
    """Return whether a file is a checkpoint of this project and not a reward model."""
    state = load_checkpoint(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        return False
    return "head.weight" not in state["model"]


def policies(out):
    """Return {stage: path}: base and sft if present, then every other policy by name."""
    found = {}
    for stage, path in (("base", out / "gpt.pt"), ("sft", out / "sft.pt")):
        if path.exists():
            found[stage] = path
    for path in sorted(out.glob("*.pt")):
        if path.stem not in ("gpt", "sft") and is_policy(path):
            found[path.stem] = path
    return found


def training_prompts(folder):
    """Yield the prompts of the village's training files, as messages."""
    for name in ("sft_train", "rank_train", "prompts_train"):
        path = folder / f"{name}.jsonl"
        if path.exists():
            for _, r in read_records(path):
                yield r["prompt"] if "prompt" in r else prompt_of(r["messages"])


def load_exam(cfg, out, reference, enc):
    """Read the prompts and sample the responses of the opponent -> Exam."""
    path = Path(cfg.prompts or out / "data" / "prompts_test.jsonl")
    records = [r for _, r in read_records(path)][:cfg.n]
    n = len(records)
    extra = path.with_name("prompts_unanswerable.jsonl")
    if extra.exists() and not cfg.prompts:
        records += [r for _, r in read_records(extra)]
    grade = load_grader(cfg.grade, records, "--grade")
    if grade is None or not all("prompt" in r for r in records[:n]):
        raise UserError(f"{path}: the grader needs prompts with a task; these have none")
    chats = [as_messages(r["prompt"], path) for r in records]
    tasks = [r["task"] for r in records]
    # The world is small: other users ask some of the same things in the same words.
    known = {str(chat) for chat in training_prompts(path.parent)}
    new = [str(chat) not in known for chat in chats]
    samples = sft.sample_responses(reference, enc, chats[:n], cfg.max_new_tokens,
                                   seed=cfg.seed + 1)
    opponent = [sum(grade(t, a).values()) for t, a in zip(tasks, samples)]
    return Exam(chats, tasks, new, n, grade, opponent)


def grade_row(exam, responses):
    """Grade the responses of one policy to all prompts of the exam -> part of a row."""
    n = exam.n
    grades = [exam.grade(t, a) for t, a in zip(exam.tasks, responses)]
    gold = [sum(g.values()) for g in grades[:n]]
    wins = [0.5 if g == o else float(g > o) for g, o in zip(gold, exam.opponent)]
    gold_new = [g for g, new in zip(gold, exam.new) if new]
    made_up = [-g["honest"] for t, g in zip(exam.tasks, grades) if not t.get("known", True)]
    gold_mean, gold_ci = mean_and_ci(gold)
    win_rate, win_rate_ci = mean_and_ci(wins)
    return dict(
        gold=gold_mean, gold_ci=gold_ci, win_rate_vs_sft=win_rate, win_rate_ci=win_rate_ci,
        gold_new=sum(gold_new) / max(1, len(gold_new)), n_new=len(gold_new),
        helpful=sum(g["helpful"] for g in grades[:n]) / n,
        hallucination_rate=sum(made_up) / len(made_up) if made_up else None,
        rude_rate=sum(-g["harmless"] for g in grades[:n]) / n,
        golds=gold)


def best_of_n(model, reward_model, enc, chats, cfg):
    """Sample n responses per prompt and return those with the highest score."""
    repeated = [chat for chat in chats for _ in range(cfg.best_of)]
    samples = sft.sample_responses(model, enc, repeated, cfg.max_new_tokens, seed=cfg.seed + 2)
    scores = torch.tensor(reward.score_responses(reward_model, enc, repeated, samples))
    best = scores.view(len(chats), cfg.best_of).argmax(1).tolist()            # (prompts,)
    return [samples[i * cfg.best_of + k] for i, k in enumerate(best)]


def evaluate(cfg):
    """Return the rows of the table, one dict per stage."""
    require(cfg, 2, "n")
    require(cfg, 0, "best_of")
    out = Path(cfg.out)
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    if not (out / "sft.pt").exists():
        raise UserError(f"{out}: no sft.pt to compare with; train it: python sft.py --out {out}")
    reference, enc, _ = gpt.load_model(out / "sft.pt", device)
    exam = load_exam(cfg, out, reference, enc)
    chats = exam.chats
    n = exam.n
    reward_model = None
    text = None
    if (out / "reward.pt").exists():
        reward_model = reward.load_reward(out / "reward.pt", device)[0]
    if (out / "gpt.pt").exists():
        text = checkpoint_text(out / "gpt.pt", enc, reference.config.block_size)
    rows = []

    def add(stage, state, lm_loss, responses, kl):
        row = dict(stage=stage, seed=state.get("seed"), n=n) | grade_row(exam, responses)
        row["reward"] = None
        if reward_model:
            scores = reward.score_responses(reward_model, enc, chats[:n], responses[:n])
            row["reward"] = sum(scores) / n
        lengths = [len(enc.encode_ordinary(a)) for a in responses[:n]]
        rows.append(row | dict(kl_to_sft=kl, lm_loss=lm_loss, length=sum(lengths) / n))

    for stage, path in policies(out).items():
        model, _, state = gpt.load_model(path, device)
        lm_loss = gpt.val_loss(model, text, enc, device)[0] if text else None
        if stage == "base":
            responses = base_responses(model, enc, chats, cfg.max_new_tokens, cfg.seed)
            add(stage, state, lm_loss, responses, None)
            continue
        responses = sft.sample_responses(model, enc, chats, cfg.max_new_tokens, seed=cfg.seed)
        kl = response_logprobs(model, enc, chats[:n], responses[:n])
        kl = kl - response_logprobs(reference, enc, chats[:n], responses[:n])
        add(stage, state, lm_loss, responses, kl.mean().item())
        if stage != "sft":
            continue
        greedy = sft.sample_responses(model, enc, chats, cfg.max_new_tokens, temperature=0)
        kl = -response_logprobs(reference, enc, chats[:n], greedy[:n]).mean().item()
        add("sft-greedy", state, lm_loss, greedy, kl)
        if reward_model and cfg.best_of:
            best = best_of_n(model, reward_model, enc, chats, cfg)
            bound = math.log(cfg.best_of) - (cfg.best_of - 1) / cfg.best_of
            add(f"best-of-{cfg.best_of}", state, lm_loss, best, bound)
    greedy = next(r["golds"] for r in rows if r["stage"] == "sft-greedy")
    for r in rows:
        gain = [a - b for a, b in zip(r.pop("golds"), greedy)]
        r["gold_minus_greedy"], r["gold_minus_greedy_ci"] = mean_and_ci(gain)
    return rows


COLUMNS = {"stage": ("stage", ""),
           "gold": ("gold", ".2f"),
           "±": ("gold_ci", ".2f"),
           "new words": ("gold_new", ".2f"),
           "win rate vs sft": ("win_rate_vs_sft", ".1%"),
           "± ": ("win_rate_ci", ".1%"),
           "made up": ("hallucination_rate", ".1%"),
           "rude": ("rude_rate", ".1%"),
           "reward": ("reward", ".2f"),
           "KL": ("kl_to_sft", ".1f"),
           "lm loss": ("lm_loss", ".3f"),
           "length": ("length", ".1f"),
           "gold - greedy sft": ("gold_minus_greedy", "+.2f"),
           "±  ": ("gold_minus_greedy_ci", ".2f")}


def main(cfg):
    rows = evaluate(cfg)
    if cfg.json:
        print("\n".join(json.dumps(r) for r in rows))
    else:
        print(format_table(rows, COLUMNS))
    if cfg.save:
        write_records(cfg.save, rows)


if __name__ == "__main__":
    start(main, Config, __doc__)
