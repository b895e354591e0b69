"""Self-rewarding: one model writes responses and grades them; DPO on its own grades improves both.

Idea. PPO's reward model is frozen, and only as good as its human rankings. Teach the policy to
judge, as one more instruction (LLM-as-a-judge), and let it make its preference data (2401.10020):

    M1 = SFT(M0; IFT + EFT)         IFT: prompt -> response        EFT: judge's prompt -> verdict
    for t = 1, 2, 3:
        prompts   = write prompts   a base model continues lists of prompts, as in Self-Instruct
        responses = sample          4 responses of M_t to each prompt
        scores    = judge           the mean score of 3 verdicts of M_t on each response
        pairs     = make pairs      highest against lowest score
        M_t+1     = argmin DPO(pairs; reference M_t) + nll * NLL(chosen) + replay * SFT(IFT + EFT)
        evaluate M_t+1

A verdict gives its reasons before the score, so the model adds up what it has already written:

    Judge: some 1 much 1 all 1 true 3 polite 3.
    -> Ben 1 pie 1 lake 0 only 1. some 1 much 1 all 0 true 3 polite 3. Score: 8

    python self_reward.py                       M1 to M4 and the table, on the village
    python self_reward.py --pairs random        controls: --pairs gold, --frozen-judge, --replay 0
    python self_reward.py --update sft          train on the chosen responses alone, without DPO
    python self_reward.py --halo 0.05           reward hacking: annotators overrate a phrase
    python self_reward.py --fresh-eft 400       people judge some responses of every round, too
    python self_reward.py --data chats.jsonl --eft judged.jsonl --prompts prompts.jsonl

Five minutes on two CPU cores. Makes OUT/gpt.pt, OUT/long/gpt.pt and the rankings of reward.py first
if they are missing. Read dpo.py first. data/verdicts.py has the judge's prompt and the seed data.
"""
import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import dpo
import gpt
import self_instruct
import sft
from data import corpus, formats, labelers, tasks, verdicts
from data.text import batches
from data.tokenizer import end_of
from data.verdicts import judge_chat, mean_score, parse_score, prompt_text
from scaffold.cli import RunConfig, UserError, choose, pick_device, require, run_folder, start
from scaffold.optim import adamw, lr_at
from scaffold.run import (
    Run, digest, ensure_stage, load_checkpoint, log_metrics, set_seed, take_step)
from scaffold.table import print_samples


@dataclass
class Config(RunConfig):
    data: str = ""               # IFT chats, as for sft.py; empty: the village's demonstrations
    eft: str = ""                # judged responses; empty: simulated annotators judge the village's
    prompts: str = ""            # new prompts, as for ppo.py; empty: OUT/long/gpt.pt writes them
    test: str = ""               # prompts of the table; empty: the village's, or 5% of --prompts
    init: str = ""               # M0; empty: OUT/gpt.pt, trained first if missing
    iterations: int = 3          # rounds of DPO; 3 rounds end with M4
    n_prompts: int = 1000        # new prompts per round
    candidates: int = 4          # responses per prompt, at temperature 1
    judgements: int = 3          # verdicts per response; their scores are averaged
    judge_temperature: float = 0.7   # of verdicts; at 1 the judge repeats the annotators' slips
    margin: float = 1.0          # smallest score difference of a pair, in points of 9
    pairs: str = "judge"         # what orders responses: judge, random (null) or gold (ceiling)
    update: str = "dpo"          # dpo, or sft (on the chosen responses of the same pairs)
    frozen_judge: bool = False   # M1 instead of the latest model judges in every round
    replay: float = 0.5          # weight of the loss on IFT and EFT; at 0 the judge is forgotten
    nll: float = 0.2             # weight of the token loss on chosen responses: keeps them likely
    beta: float = 0.1            # KL strength of DPO
    lr: float = 2e-4             # peak learning rate of a round, cosine to a tenth
    epochs: int = 2              # passes over the pairs of a round
    batch_pairs: int = 32        # pairs per step; a round with fewer pairs ends the run
    sft_lr: float = 1e-3         # peak learning rate of M1
    sft_epochs: int = 4          # passes over IFT and EFT for M1
    batch_tokens: int = 512      # tokens per step of M1 and replay; the judge needs small steps
    noise: float = 0.05          # village: probability that an annotator misjudges a criterion
    halo: float = 0.0            # village: share of responses with a phrase that wins full marks
    fresh_eft: int = 0           # village: responses that people judge in each round, for replay
    n_test: int = 256            # prompts of the table, with --candidates responses each
    max_new_tokens: int = 48     # longest response and longest verdict
    grade: str = "data.village:grade"   # module:function that grades (task, response), for reports
    save_every: int = 1          # rounds between saves of the training state; 0: on Ctrl-C only


class Pair(NamedTuple):
    prompt: int     # index of a prompt
    chosen: int     # indices of two of its responses
    rejected: int


def make_pairs(responses, scores, margin):
    """Pair the highest with the lowest score of each prompt.

    responses, scores: for each prompt a row of K strings, and of K scores or None (not judged).
    Returns [Pair], and a Counter of the reasons why the other prompts have no pair.
    """
    pairs = []
    dropped = Counter()
    for i, (row, values) in enumerate(zip(responses, scores)):
        judged = [k for k, s in enumerate(values) if s is not None and not math.isnan(s)]
        if len(judged) < 2:
            dropped["fewer than two were judged"] += 1
            continue
        best = max(judged, key=lambda k: values[k])
        worst = min(judged, key=lambda k: values[k])
        if values[best] == values[worst]:
            dropped["equal scores"] += 1
        elif row[best] == row[worst]:
            dropped["equal texts"] += 1
        elif values[best] - values[worst] < margin:
            dropped["below the margin"] += 1
        else:
            pairs.append(Pair(i, best, worst))
    return pairs, dropped


def tokenize(enc, prompt, response, room=None):
    """Tokenize a chat and its next response -> sft.Example with mask 1 on that response alone.

    Cuts the response to `room` tokens: half a character is sampled as one token and read as three.
    """
    response_ids = enc.encode_ordinary(response) + [end_of(enc)]
    return sft.response_example(sft.render_prompt(prompt, enc), response_ids[:room])


def eft_examples(records, enc, block_size, rng):
    """Tokenize judge prompts with their verdicts, balanced over the scores -> [sft.Example]."""
    judged = verdicts.balanced(verdicts.judged_responses(records), rng)
    examples = [tokenize(enc, judge_chat(j.prompt, j.response), j.verdict) for j in judged]
    fitting = [e for e in examples if len(e.ids) <= block_size]
    if len(fitting) < len(examples):
        print(f"{len(examples) - len(fitting)} of {len(examples)} judged responses skipped: they "
              f"exceed the context of {block_size}")
    return fitting


def write_prompts(model, enc, shown, known, n, seed):
    """Let a base model write n new prompts, as Self-Instruct writes instructions -> [string].

    It continues lists of eight prompts, six by people (`shown`) and two of its own. The filters
    are Self-Instruct's without ROUGE-L, which would keep too few prompts in a world this small.
    """
    rng = random.Random(seed)
    new = []
    known = set(known)
    while len(new) < n:
        lists = [self_instruct.sample_list(shown, new, rng) for _ in range(64)]
        room = model.config.block_size - 40
        lists = [x for x in lists if len(enc.encode_ordinary(x)) < room]
        before = len(new)
        sampling = dict(top_p=0.9, seed=rng.randrange(2**31))
        for text, ended in self_instruct.ask(model, enc, lists, 96, **sampling):
            written = self_instruct.read_list(text)
            if not ended:
                written = written[:-1]   # the last prompt is cut off
            for prompt, p in zip(written, self_instruct.least_likely(model, enc, written)):
                likely = p >= self_instruct.Config.likelihood
                if likely and not self_instruct.reject_reason(prompt, []) and prompt not in known:
                    new.append(prompt)
                    known.add(prompt)
        if len(new) == before:
            raise UserError(f"the base model wrote {len(new)} of {n} new prompts and finds no "
                            f"more; ask for fewer: --n-prompts, --iterations")
    return new[:n]


def new_prompts(cfg, t, seed, pool, writer, enc, room):
    """Draw the prompts of round t from the pool; without a pool, let the writer write them."""
    if pool:
        return random.Random(seed).sample(pool, min(cfg.n_prompts, len(pool)))
    records = [{"prompt": [{"role": "user", "content": text}], "task": tasks.read_prompt(text)}
               for text in writer(cfg.n_prompts, seed)]
    formats.write_records(Path(cfg.out) / "self_reward" / f"prompts-{t}.jsonl", records)
    valid = sum(r["task"]["kind"] != "nonsense" for r in records) / len(records)
    print(f"round {t}: the base model wrote {len(records)} prompts, {valid:.0%} of them valid")
    return sft.fit_prompts(records, enc, room)


def sample(model, enc, prompts, cfg, seed):
    """Sample K = cfg.candidates responses to each prompt -> rows of K strings, one per prompt."""
    K = cfg.candidates
    chats = [p["prompt"] for p in prompts for _ in range(K)]
    responses = sft.sample_responses(model, enc, chats, cfg.max_new_tokens, seed=seed)
    return [responses[i:i + K] for i in range(0, len(responses), K)]


def judge(model, enc, prompts, responses, cfg, seed):
    """Score each response by the mean of cfg.judgements sampled verdicts.

    Returns rows of scores like `responses`, None where no verdict has a score, and the share of
    verdicts that have one. Equal responses to a prompt get the same verdicts, so that they tie.
    """
    chats = {}
    for p, row in zip(prompts, responses):
        for response in row:
            chats[prompt_text(p["prompt"]), response] = judge_chat(p["prompt"], response)
    room = model.config.block_size
    fitting = [k for k, chat in chats.items() if len(sft.render_prompt(chat, enc)) < room]
    keys = fitting * cfg.judgements
    written = sft.sample_responses(model, enc, [chats[k] for k in keys], cfg.max_new_tokens,
                                   seed=seed, temperature=cfg.judge_temperature)
    scores = {k: [] for k in chats}
    for k, verdict in zip(keys, written):
        scores[k].append(parse_score(verdict))
    parsed = sum(s is not None for values in scores.values() for s in values)
    means = [[mean_score(scores[prompt_text(p["prompt"]), response]) for response in row]
             for p, row in zip(prompts, responses)]
    return means, parsed / max(1, cfg.judgements * len(chats))


def replay_batches(examples, batch_tokens, rng, device):
    """Yield batches of similar length forever: ids (B, T), mask (B, T)."""
    while True:
        for rows in batches([len(e.ids) for e in examples], batch_tokens, rng):
            yield sft.collate(examples, rows, device)


def pair_loss(policy, examples, reference, pairs, cfg):
    """Return the loss of b pairs, DPO + nll * NLL or (--update sft) NLL, and a row of the log."""
    rows = [2 * i for i in pairs] + [2 * i + 1 for i in pairs]
    ids, mask = sft.collate(examples, rows, policy.wte.weight.device)         # (2b, T) each
    chosen, rejected = dpo.response_logprobs(policy, ids, mask).chunk(2)      # (b,) each
    nll = -(chosen / mask[:len(chosen), 1:].sum(1)).mean()
    row = dict(nll_loss=nll.item())
    if cfg.update == "sft":
        return nll, row
    ref = reference[rows].to(chosen.device).chunk(2)                          # (b,) each
    loss, good, bad = dpo.dpo_loss(chosen, rejected, *ref, cfg.beta)
    row["loss"] = loss.item()
    row["accuracy"] = (good > bad).float().mean().item()
    row["margin"] = (good - bad).mean().item()
    return loss + cfg.nll * nll, row


def improve(policy, examples, replay, cfg, rng, log):
    """Train the policy on the pairs of one round, in place; log is called with a row per step.

    examples: chosen, rejected, chosen, rejected, ...; replay: the examples of IFT and EFT.
    """
    # The reference is the policy before the round; DPO needs only its log-probs.
    reference = dpo.all_logprobs(policy, examples)                            # (2P,)
    P = len(examples) // 2
    plan = []
    for _ in range(cfg.epochs):
        order = rng.sample(range(P), P)
        plan += [order[i:i + cfg.batch_pairs] for i in range(0, P, cfg.batch_pairs)]
    optimizer = adamw(policy, cfg.lr)
    replayed = replay_batches(replay, cfg.batch_tokens, rng, policy.wte.weight.device)
    policy.train()
    for step, pairs in enumerate(tqdm(plan, desc=cfg.update, mininterval=1)):
        loss, row = pair_loss(policy, examples, reference, pairs, cfg)
        if cfg.replay:
            ids, mask = next(replayed)                                        # (B, T) each
            replay_loss = sft.chat_loss(policy, ids, mask)
            loss = loss + cfg.replay * replay_loss
            row["replay_loss"] = replay_loss.item()
        where = f"step {step} of a round, pairs {pairs}; last good checkpoint: the round before"
        norm = take_step(loss, optimizer, policy, lr_at(step, len(plan), cfg.lr), where=where)
        log(step=step, **row, grad_norm=norm)
    policy.eval()


def first_model(cfg, init, path, files, examples):
    """Return M1 = SFT(M0; IFT + EFT); train it unless `path` was made from the same files."""
    device = pick_device(cfg.device)
    names = "sft_lr sft_epochs batch_tokens noise halo seed".split()
    made_from = {name: str(getattr(cfg, name)) for name in names} | {"files": digest(files)}
    if path.exists() and load_checkpoint(path).get("made_from") == made_from:
        print(f"{path} is there, made from the same data and settings")
    else:
        model, enc, base = gpt.load_model(init, device)
        log_path = path.with_suffix(".jsonl")   # beside M1: all variants share both
        log_path.unlink(missing_ok=True)
        for _ in sft.fine_tune(model, examples, cfg.sft_epochs, cfg.batch_tokens, cfg.sft_lr,
                               cfg.seed, "M1", partial(log_metrics, log_path)):
            pass
        gpt.save_model(path, model, enc, base["tokenizer"], made_from=made_from)
    return gpt.load_model(path, device)[0]


def variant(cfg):
    """Name a run by the settings that differ from the main run's."""
    parts = [(cfg.pairs != "judge", f"pairs-{cfg.pairs}"),
             (cfg.update != "dpo", f"update-{cfg.update}"),
             (cfg.frozen_judge, "frozen-judge"),
             (not cfg.replay, "no-replay"),
             (cfg.halo > 0, "halo"),
             (cfg.fresh_eft > 0, "fresh-eft")]
    return "-".join(part for differs, part in parts if differs) or "main"


def check(cfg):
    require(cfg, 1, "iterations", "n_prompts", "judgements", "epochs", "batch_pairs", "sft_epochs")
    require(cfg, 1, "batch_tokens", "max_new_tokens")
    require(cfg, 2, "candidates", "n_test")
    require(cfg, 0, "margin", "replay", "nll", "judge_temperature", "fresh_eft")
    require(cfg, 0, "noise", "halo", most=0.5)
    require(cfg, 0, "lr", "sft_lr", most=10)
    require(cfg, 1e-6, "beta")
    choose(cfg, "pairs", "judge", "random", "gold")
    choose(cfg, "update", "dpo", "sft")
    if cfg.data and not cfg.prompts:
        raise UserError("--data without --prompts: the base model can only write prompts about "
                        "the village; name a file of prompts")
    if cfg.fresh_eft and (not cfg.replay or cfg.grade != Config.grade):
        raise UserError("--fresh-eft needs --replay, and the village's tasks: leave out --grade")
    if cfg.halo and cfg.eft:
        raise UserError("--halo with --eft: only the village's annotators have a halo; drop one")


def load_seed_data(cfg, out):
    """Load the human data, or make the village's. Returns verdicts.SeedData."""
    path = cfg.data or corpus.ensure(out / "data", cfg.seed) / "sft_train.jsonl"
    chats = formats.load_chats(path, cfg.seed)
    if cfg.eft:
        records = verdicts.load_judged(cfg.eft)
    else:
        ensure_stage(out / "sft.pt", sft, cfg)   # the annotators judge its responses
        ranked = formats.load_comparisons(labelers.ensure(out, cfg.seed, cfg.device)[0])
        records = verdicts.annotated(ranked, cfg.noise, cfg.halo, cfg.seed)
    return verdicts.seed_data(chats, records, cfg.halo, cfg.seed)


def load_prompts(cfg, out, enc, room):
    """Return the prompts of the table, and a pool of new ones; [] if a base model writes them."""
    def load(path):
        prompts = sft.fit_prompts(formats.load_prompts(path), enc, room)
        if not prompts:
            raise UserError(f"{path}: no prompt has at most {room} tokens; lower --max-new-tokens")
        return prompts

    pool = load(cfg.prompts) if cfg.prompts else []
    if not cfg.prompts:
        cfg.test = cfg.test or str(out / "data" / "prompts_test.jsonl")
    pool, test = formats.load_val(pool, cfg.test, load, cfg.seed)
    asked = min(cfg.n_prompts, len(pool)) if pool else cfg.n_prompts
    if asked < cfg.batch_pairs:
        raise UserError(f"a round would ask {asked} prompts, each for at most one pair, but a step "
                        f"takes {cfg.batch_pairs}: bring more prompts, or lower --batch-pairs")
    return test[:cfg.n_test], pool


def load_writer(cfg, enc, chats, test):
    """Return write_prompts(n, seed) of the base model OUT/long/gpt.pt, made if it is missing."""
    model = gpt.load_model(self_instruct.long_base(cfg), pick_device(cfg.device))[0]
    shown = sorted({c["messages"][0]["content"] for c in chats if len(c["messages"]) == 2})
    known = {prompt_text(p["prompt"]) for p in test}
    return partial(write_prompts, model, enc, shown, known)


def main(cfg):
    from lab import judge_quality   # lazy: it imports this file
    check(cfg)
    out = run_folder(cfg.out)
    folder = out / "self_reward"
    name = variant(cfg)
    if not cfg.init:
        ensure_stage(out / "gpt.pt", gpt, cfg)
    init = Path(cfg.init or out / "gpt.pt")
    set_seed(cfg.seed)
    policy, enc, base = gpt.load_model(init, pick_device(cfg.device))
    block_size = policy.config.block_size
    room = block_size - cfg.max_new_tokens - 1   # tokens of the longest prompt
    rng = random.Random(cfg.seed)
    chats, judged, held_out = load_seed_data(cfg, out)
    test_prompts, pool = load_prompts(cfg, out, enc, room)
    writer = None if pool else load_writer(cfg, enc, chats, test_prompts)
    grade = formats.load_grader(cfg.grade, test_prompts + pool)
    if (cfg.pairs == "gold" or cfg.fresh_eft) and not grade:
        raise UserError("--pairs gold and --fresh-eft need prompts with a task to grade")
    held_out = held_out if formats.load_grader(cfg.grade, held_out) else []
    test = judge_quality.EvalSet(test_prompts, held_out, grade)
    ift = sft.tokenize(chats, enc, block_size)
    eft = eft_examples(judged, enc, block_size, rng)
    print(f"self_reward.py: {name}; {len(ift):,} IFT chats, {len(eft):,} judged responses, "
          f"device {pick_device(cfg.device)}")

    prefix = "" if name == "main" else f"{name}-"
    ended = folder / f"{name}.ended"   # marks a run that ended before its last round
    made = ended if ended.exists() else folder / f"{prefix}M{cfg.iterations + 1}.pt"
    files = [init, cfg.data or out / "data/sft_train.jsonl",
             cfg.eft or out / "data/ranked_train.jsonl"]   # of M1
    inputs = [*files, cfg.test, cfg.prompts or out / "long" / "gpt.pt"]
    rows = []      # of the table
    history = []   # for each model its gold scores and its responses
    fresh = []     # judgements by people of the responses of all rounds so far
    run = Run(cfg, f"self_reward-{name}", inputs, made, policy=policy, rng=rng, rows=rows,
              history=history, fresh=fresh)
    if not run.resumed:
        ended.unlink(missing_ok=True)
        run.log(config=vars(cfg) | {"resume": False})   # the same for a run killed before this
    m1_path = folder / ("halo-M1.pt" if cfg.halo else "M1.pt")
    m1 = first_model(cfg, init, m1_path, files, ift + eft)
    policy.load_state_dict(m1.state_dict())
    judge_model = m1 if cfg.frozen_judge else policy

    def evaluate(stage, **extra):
        new = judge_quality.report(stage, policy, judge_model, enc, test, history, cfg, extra)
        rows.extend(new)
        for row in new:
            run.log(**row)
        judge_quality.print_tables(new)

    if not run.resumed:
        evaluate("M1")
    for step in run.steps(cfg.iterations):
        t = step + 1
        seed = 1000 * cfg.seed + t
        prompts = new_prompts(cfg, t, seed, pool, writer, enc, room)
        responses = sample(policy, enc, prompts, cfg, seed)
        golds = judge_quality.grade_all(prompts, responses, grade).golds if grade else None
        if cfg.pairs == "judge":
            scores, _ = judge(judge_model, enc, prompts, responses, cfg, seed)
        elif cfg.pairs == "gold":
            scores = golds
        else:
            scores = [[rng.random() for _ in row] for row in responses]
        pairs, dropped = make_pairs(responses, scores, cfg.margin if cfg.pairs == "judge" else 0)
        reasons = "".join(f", {n} {reason}" for reason, n in sorted(dropped.items()))
        print(f"round {t}: {len(pairs)} pairs of {len(prompts)} prompts{reasons}")
        if len(pairs) < cfg.batch_pairs:
            cause = "bring more prompts, or lower --batch-pairs"
            if cfg.pairs == "judge" and len(prompts) >= cfg.batch_pairs:
                cause = "the judge no longer sees a difference; try a lower --batch-pairs"
            if all(s is None for row in scores for s in row):
                cause = "no verdict has a score; bring more EFT data, or raise --sft-epochs"
            print(f"fewer than {cfg.batch_pairs} pairs, and the run ends here: {cause}")
            ended.touch()
            break
        examples = [tokenize(enc, prompts[i]["prompt"], responses[i][k], cfg.max_new_tokens + 1)
                    for i, chosen, rejected in pairs for k in (chosen, rejected)]
        fresh += verdicts.fresh(prompts, responses, cfg.fresh_eft, cfg.noise, cfg.halo, seed)
        new = eft_examples(fresh, enc, block_size, rng)
        # A round reads only some hundred examples of the replay: half of these are fresh ones.
        new = new * math.ceil(len(ift + eft) / max(1, len(new)))
        improve(policy, examples, ift + eft + new, cfg, rng, partial(run.log, round=t))
        gpt.save_model(folder / f"{prefix}M{t + 1}.pt", policy, enc, base["tokenizer"])
        evaluate(f"M{t + 1}", pairs=len(pairs), dropped=dict(dropped),
                 **judge_quality.agreement(pairs, golds))
    run.finish()

    judge_quality.print_runs(out, run.log_path, rows)
    before = [row[0] for row in history[0]["responses"]]
    after = [row[0] for row in history[-1]["responses"]]
    print_samples([p["prompt"] for p in test_prompts[:4]], before, after)
    print(f"---\nsaved {folder}; next: python self_reward.py --out {out} --pairs random")


if __name__ == "__main__":
    start(main, Config, __doc__)
