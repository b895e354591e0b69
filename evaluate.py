"""The results table: every checkpoint of a run answers the same held-out prompts and is graded.

Rows: base (the pretrained model, prompted with plain text), sft and every other policy in OUT, at
temperature 1 and greedy, and the best of n sft samples by the reward model.

    gold         the mean grade, -2 to 1: helpful (0..1), less for what is wrong, made up or rude
    new words    the same over prompts whose wording appears nowhere in the training data
    win rate     share of prompts where the response beats a sample of sft by gold; ties count half
    refused      share of the prompts with one right answer that get "I do not know."
    right        share of them that get it, whole or lazy; wrong is the rest
    made up      share of the unanswerable prompts that get an invented answer
    reward       mean score of the reward model
    KL           mean of log pi(y|x) - log pi_sft(y|x) over sampled responses y, in nats. Best of n:
                 log n - (n-1)/n, an upper bound. Greedy: -log pi_sft(y|x), the KL of a point mass
    lm loss      nats per token on held-out pretraining text: the cost of alignment
    ±            half of a 95% interval over the prompts

Without a grader the prompts are --prompts or those that sft.py held out. Then "ended" is the share
of responses with an end token, and "reward wins" the win rate by the score of the reward model.

A second table shows the reward model on probe pairs (data/probes.py): how often it prefers the
better of two responses that differ in one thing, such as a single wrong word.

    python evaluate.py                      the tables of ./out
    python evaluate.py --json               one JSON object per row; that of the probes comes last
    python evaluate.py --out out/mine --prompts pairs.jsonl      prompts in any record format

Half a minute on two CPU cores. The prompts come from users no training stage has seen.
"""
import contextlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import dpo
import gpt
import reward
import sft
from data.checkpoint import policies
from data.corpus import plain_text
from data.exam import COLUMNS, grade_row, load_exam, mean_and_ci, ungraded_exam, ungraded_row
from data.formats import write_records
from data.probes import PROBE_COLUMNS, probe_pairs, probe_rates, probe_rows
from data.text import text_if_there
from data.tokenizer import end_of, fingerprint
from scaffold.cli import BaseConfig, UserError, pick_device, require, start
from scaffold.run import json_line, load_checkpoint, set_seed
from scaffold.table import format_table


@dataclass
class Config(BaseConfig):
    seed: int = -1               # of the samples; -1 takes the seed of OUT/sft.pt
    prompts: str = ""            # prompts; empty: the village's in OUT/data, else sft.py's held-out
    n: int = 512                 # number of prompts
    best_of: int = 16            # samples per prompt of the best-of-n row; 0 leaves it out
    max_new_tokens: int = 64     # longest response
    grade: str = "data.village:grade"   # module:function that grades (task, response) as a dict of
                                        # helpful, honest, harmless
    json: bool = False           # print one JSON object per row instead of the tables
    save: str = ""               # also write these JSON lines to a file


def base_responses(model, enc, chats, max_new_tokens, seed):
    """Prompt a pretrained model with plain text; its response is the next line."""
    prompts = [enc.encode_ordinary(plain_text(chat) + "\n") for chat in chats]
    rows = gpt.generate(model, prompts, max_new_tokens, stop=end_of(enc), seed=seed)
    texts = [enc.decode([i for i in ids if not enc.is_special_token(i)]) for ids in rows]
    return [text.split("\n")[0] for text in texts]


def with_end(ids, enc):
    """Return a response and whether it has an end token."""
    return sft.decode_response(ids, enc), end_of(enc) in ids


def response_logprobs(model, enc, chats, responses):
    """Return log pi of each response (a string), its end token included: (N,)."""
    block_size = model.config.block_size
    examples = []
    for chat, response in zip(chats, responses):
        prompt = sft.render_prompt(chat, enc)
        ids = enc.encode_ordinary(response) + [end_of(enc)]
        examples.append(sft.response_example(prompt, ids[:block_size - len(prompt)]))
    return dpo.all_logprobs(model, examples)


def best_of_n(model, reward_model, enc, chats, cfg):
    """Sample n responses per prompt and return those with the highest score, as of with_end."""
    repeated = [chat for chat in chats for _ in range(cfg.best_of)]
    samples = sft.sample_responses(model, enc, repeated, cfg.max_new_tokens, seed=cfg.seed + 2,
                                   decode=with_end)
    texts = [text for text, _ in samples]
    scores = torch.tensor(reward.score_responses(reward_model, enc, repeated, texts))
    best = scores.view(len(chats), cfg.best_of).argmax(1).tolist()            # (prompts,)
    return [samples[i * cfg.best_of + k] for i, k in enumerate(best)]


def probe_row(path, reward_model, enc, exam):
    """Score probe pairs on the prompts of the exam -> the row of the reward model."""
    pairs = probe_pairs([dict(prompt=c, task=t) for c, t in zip(exam.chats, exam.tasks)])
    prompts = [p["prompt"] for p in pairs]
    chosen, rejected = [reward.score_responses(reward_model, enc, prompts, [p[k] for p in pairs])
                        for k in ("chosen", "rejected")]
    seed = load_checkpoint(path).get("seed")
    return dict(stage="reward", seed=seed, **probe_rates(pairs, chosen, rejected))


def evaluate(cfg):
    """Return the rows of the table, one dict per stage, then the row of the reward model."""
    require(cfg, 2, "n")
    require(cfg, 0, "best_of")
    out = Path(cfg.out)
    device = pick_device(cfg.device)
    if not (out / "sft.pt").exists():
        raise UserError(f"{out}: no sft.pt to compare with; train it: python sft.py --out {out}")
    reference, enc, state = gpt.load_model(out / "sft.pt", device)
    if cfg.seed < 0:
        cfg.seed = state.get("seed", 0)
    set_seed(cfg.seed)
    T = reference.config.block_size
    exam = load_exam(out / "data", cfg.prompts, cfg.n, cfg.grade)
    if not exam:
        exam = ungraded_exam(cfg, state, out / "sft.pt", lambda r: sft.fit_prompts(r, enc, T // 2))
    chats = exam.chats
    n = exam.n
    reward_model = None
    if (out / "reward.pt").exists():
        reward_model = reward.load_reward(out / "reward.pt", device, enc)[0]
    text = text_if_there(out / "gpt.pt", enc, T)
    rows = []

    def score(responses):
        if not reward_model:
            return []
        return reward.score_responses(reward_model, enc, chats[:n], responses[:n])

    theirs = sft.sample_responses(reference, enc, chats[:n], cfg.max_new_tokens, seed=cfg.seed + 1)
    exam.opponent = exam.golds(theirs) if exam.grade else score(theirs)

    def add(stage, state, lm_loss, responses, kl, ended=()):
        row = dict(stage=stage, seed=state.get("seed"), n=n) | grade_row(exam, responses)
        scores = score(responses)
        row["reward"] = sum(scores) / n if scores else None
        if not exam.grade:
            row |= ungraded_row(scores, exam.opponent, ended[:n])
        lengths = [len(enc.encode_ordinary(a)) for a in responses[:n]]
        rows.append(row | dict(kl_to_sft=kl, lm_loss=lm_loss, length=sum(lengths) / n))

    for stage, path in policies(out).items():
        model, own, state = gpt.load_model(path, device)
        if fingerprint(own) != fingerprint(enc):
            print(f"{path} has another tokenizer than sft.pt: left out", file=sys.stderr)
            continue
        lm_loss = gpt.val_loss(model, text, enc, device)[0] if text else None
        if stage == "base":
            responses = base_responses(model, enc, chats, cfg.max_new_tokens, cfg.seed)
            add(stage, state, lm_loss, responses, None)
            continue
        responses, ended = zip(*sft.sample_responses(
            model, enc, chats, cfg.max_new_tokens, seed=cfg.seed, decode=with_end))
        kl = response_logprobs(model, enc, chats[:n], responses[:n])
        kl = kl - response_logprobs(reference, enc, chats[:n], responses[:n])
        add(stage, state, lm_loss, responses, kl.mean().item(), ended)
        greedy, ended = zip(*sft.sample_responses(
            model, enc, chats, cfg.max_new_tokens, temperature=0, decode=with_end))
        # A greedy policy is certain of its response: its own log-prob is 0.
        kl = -response_logprobs(reference, enc, chats[:n], greedy[:n])
        add(f"{stage}-greedy", state, lm_loss, greedy, kl.mean().item(), ended)
        if stage == "sft" and reward_model and cfg.best_of:
            best, ended = zip(*best_of_n(model, reward_model, enc, chats, cfg))
            bound = math.log(cfg.best_of) - (cfg.best_of - 1) / cfg.best_of
            add(f"best-of-{cfg.best_of}", state, lm_loss, best, bound, ended)
    if not exam.grade:
        return rows
    greedy = next(r["golds"] for r in rows if r["stage"] == "sft-greedy")
    for r in rows:
        gain = [a - b for a, b in zip(r.pop("golds"), greedy)]
        r["gold_minus_greedy"], r["gold_minus_greedy_ci"] = mean_and_ci(gain)
    if reward_model and cfg.grade == Config.grade:   # the probes need tasks of the village
        rows.append(probe_row(out / "reward.pt", reward_model, enc, exam))
    return rows


def main(cfg):
    with contextlib.redirect_stdout(sys.stderr):   # stdout is for the rows
        rows = evaluate(cfg)
    if cfg.json:
        print("".join(map(json_line, rows)), end="")
    else:
        print(format_table([r for r in rows if r["stage"] != "reward"], COLUMNS))
        for row in rows:
            if row["stage"] == "reward":
                print("\n" + format_table(probe_rows(row), PROBE_COLUMNS))
    if cfg.save:
        write_records(cfg.save, rows)


if __name__ == "__main__":
    start(main, Config, __doc__)
