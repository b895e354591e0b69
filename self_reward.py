"""Self-rewarding: one model writes responses and grades them; DPO on its own grades improves both.

Idea. PPO's reward model is frozen, and only as good as the people who ranked. Teach the model to be
its own judge, as one more instruction (LLM-as-a-judge), and let it make new preference data in each
round (Yuan et al., 2401.10020):

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
    -> Ben 1 tea 1 lake 0. some 1 much 1 all 0 true 3 polite 3. Score: 8

    python self_reward.py                       M1 to M4 and the table, on the village
    python self_reward.py --pairs random        controls: --pairs gold, --frozen-judge, --replay 0
    python self_reward.py --update sft          train on the chosen responses alone, without DPO
    python self_reward.py --halo 0.05           reward hacking: annotators overrate a phrase
    python self_reward.py --data chats.jsonl --eft judged.jsonl --prompts prompts.jsonl

Five minutes on two CPU cores, and three more if OUT/long/gpt.pt is missing. Needs OUT/gpt.pt and
the rankings of reward.py, and makes them if they are missing. Each variant writes a log,
OUT/self_reward-NAME.jsonl, and checkpoints in OUT/self_reward/. data/verdicts.py has the judge's
prompt and the seed data, lab/judge_quality.py the measures of the table. Read dpo.py first.
"""
import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import dpo
import gpt
import ppo
import reward
import self_instruct
import sft
from data import labelers, tasks, verdicts
from data.verdicts import judge_chat, mean_score, parse_score, prompt_text
from run import Run, UserError, announce


@dataclass
class Config:
    data: str = ""
    "IFT chats, as for sft.py; empty: the village's demonstrations"
    eft: str = ""
    "judged responses, see data/verdicts.py; empty: simulated annotators judge"
    prompts: str = ""
    "new prompts, as for ppo.py; empty: OUT/long/gpt.pt writes them"
    test: str = ""
    "prompts of the table; empty: the village's, or 5% of --prompts (by user)"
    init: str = ""
    "M0; empty: OUT/gpt.pt, trained first if missing"
    out: str = "out"
    "folder of this run"
    iterations: int = 3
    "rounds of DPO; 3 rounds end with M4"
    n_prompts: int = 1000
    "new prompts per round"
    candidates: int = 4
    "responses per prompt, at temperature 1"
    judgements: int = 3
    "verdicts per response; their scores are averaged"
    judge_temperature: float = 0.7
    "of verdicts; at 1 the judge repeats the annotators' slips"
    margin: float = 1.0
    "least score difference of a pair, in points of 9"
    pairs: str = "judge"
    "what orders the responses: judge, random (null) or gold (ceiling)"
    update: str = "dpo"
    "dpo, or sft (on the chosen responses of the same pairs)"
    frozen_judge: bool = False
    "M1 judges in every round, instead of the latest model"
    replay: float = 0.5
    "weight of the SFT loss on IFT and EFT; at 0 the model forgets to judge"
    nll: float = 0.2
    "weight of the chosen responses' mean token loss; keeps them likely"
    beta: float = 0.1
    "beta of DPO"
    lr: float = 2e-4
    "peak learning rate of a round, cosine to a tenth"
    epochs: int = 2
    "passes over the pairs of a round"
    batch_pairs: int = 32
    "pairs per step; a round with fewer pairs ends the run"
    sft_lr: float = 1e-3
    "peak learning rate of M1"
    sft_epochs: int = 4
    "passes over IFT and EFT for M1"
    batch_tokens: int = 512
    "tokens per step of M1 and of the replay; the judge needs small steps"
    noise: float = 0.05
    "village: probability that an annotator misjudges a criterion"
    halo: float = 0.0
    "village: share of IFT and EFT responses with a phrase that wins full marks"
    n_test: int = 256
    "prompts of the table, with --candidates responses each"
    max_new_tokens: int = 48
    "longest response and longest verdict"
    grade: str = "data.village:grade"
    "module:function that grades (task, response), for reports"
    save_every: int = 1
    "rounds between two saves for --resume; 0: only on Ctrl-C"
    resume: bool = False
    "continue a stopped run in OUT, this stage or an earlier one, bit for bit"
    seed: int = 0
    "same seed, same machine, same run"
    device: str = "auto"
    "auto (cuda if available, else cpu), cpu, cuda or mps"


class Pair(NamedTuple):
    prompt: int       # index of a prompt
    chosen: int       # indices of two of its responses
    rejected: int


def make_pairs(responses, scores, margin):
    """Pair the highest with the lowest score of each prompt.

    responses, scores: per prompt a row of N strings and a row of N scores, None without a score.
    -> [Pair], and a Counter of the reasons why the other prompts have no pair
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


def tokenize(enc, prompt, response):
    """-> ids (T,), mask (T,) of a chat and its next response; mask 1 on that response alone"""
    prompt_ids = sft.render_prompt(prompt, enc)
    response_ids = enc.encode_ordinary(response) + [gpt.end_of(enc)]
    mask = [0] * len(prompt_ids) + [1] * len(response_ids)
    return torch.tensor(prompt_ids + response_ids), torch.tensor(mask)


def eft_examples(records, enc, block_size, rng):
    """Tokenize judged responses, balanced over the scores; mask 1 on the verdict.

    Examples longer than the context are left out, and their number is printed.
    """
    judged = verdicts.balanced(verdicts.judged_responses(records), rng)
    examples = [tokenize(enc, judge_chat(j.prompt, j.response), j.verdict) for j in judged]
    fit = [(ids, mask) for ids, mask in examples if len(ids) <= block_size]
    if len(fit) < len(examples):
        print(f"{len(examples) - len(fit)} of {len(examples)} judged responses exceed the context "
              f"of {block_size} and are left out")
    return fit


def write_prompts(model, enc, shown, known, n, seed):
    """Let a base model write n new prompts, as Self-Instruct writes instructions. -> n strings

    It continues lists of eight prompts: six of people's (`shown`) and two of its own. A prompt is
    kept if it passes Self-Instruct's filters, likelihood included, and is not in `known`. ROUGE-L
    is left out: in a world this small it would keep only a few hundred prompts.
    """
    rng = random.Random(seed)
    new = []
    known = set(known)
    while len(new) < n:
        lists = []
        for _ in range(64):
            own = rng.sample(new, min(2, len(new)))
            given = rng.sample(shown, 8 - len(own))
            lists.append(self_instruct.list_prompt(rng.sample(own + given, 8)))
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


def new_prompts(cfg, t, seed, pool, writer, enc, block_size):
    """Draw the prompts of round t from the pool; without a pool, let the writer write them."""
    if pool:
        return random.Random(seed).sample(pool, min(cfg.n_prompts, len(pool)))
    records = []
    for text in writer(cfg.n_prompts, seed):
        prompt = [{"role": "user", "content": text}]
        records.append({"prompt": prompt, "task": tasks.read_prompt(text)})
    self_instruct.write_jsonl(Path(cfg.out) / "self_reward" / f"prompts-{t}.jsonl", records)
    valid = sum(r["task"]["kind"] != "nonsense" for r in records) / len(records)
    print(f"round {t}: the base model wrote {len(records)} prompts, {valid:.0%} of them valid")
    room = block_size - cfg.max_new_tokens
    return [r for r in records if len(sft.render_prompt(r["prompt"], enc)) < room]


def sample(model, enc, prompts, n, max_new_tokens, seed):
    """Sample n responses to each prompt at temperature 1. -> per prompt a row of n strings"""
    chats = [p["prompt"] for p in prompts for _ in range(n)]
    strings = []
    for start in range(0, len(chats), 1024):
        part = chats[start:start + 1024]
        strings += sft.reply(model, enc, part, max_new_tokens, seed=seed + start)
    return [strings[i:i + n] for i in range(0, len(strings), n)]


def judge(model, enc, prompts, responses, cfg, seed):
    """Score each response by the mean of cfg.judgements sampled verdicts.

    -> rows of scores like `responses` (None without a score), and the share of verdicts with one
    Equal responses to a prompt are judged once: a copy must not win by chance.
    """
    chats = {}
    for p, row in zip(prompts, responses):
        for response in row:
            chats[prompt_text(p["prompt"]), response] = judge_chat(p["prompt"], response)
    block_size = model.config.block_size
    fit = [k for k, chat in chats.items() if len(sft.render_prompt(chat, enc)) < block_size]
    # Chats of similar length share a batch, which saves padding.
    keys = sorted(fit * cfg.judgements, key=lambda k: len(k[0]) + len(k[1]))
    scores = {k: [] for k in chats}
    for start in range(0, len(keys), 1024):
        part = keys[start:start + 1024]
        written = sft.reply(model, enc, [chats[k] for k in part], cfg.max_new_tokens,
                            temperature=cfg.judge_temperature, seed=seed + start)
        for k, verdict in zip(part, written):
            scores[k].append(parse_score(verdict))
    parsed = sum(s is not None for row in scores.values() for s in row)
    means = [[mean_score(scores[prompt_text(p["prompt"]), response]) for response in row]
             for p, row in zip(prompts, responses)]
    return means, parsed / max(1, cfg.judgements * len(chats))


def replay_batches(examples, batch_tokens, rng):
    """Yield batches of similar length without end: ids (B, T), mask (B, T)."""
    while True:
        for rows in sft.batches([len(ids) for ids, _ in examples], batch_tokens, rng):
            yield sft.collate(examples, rows)


def pair_loss(policy, examples, reference, pairs, cfg):
    """DPO and NLL of a batch of b pairs; NLL alone for --update sft. -> loss, row of the log"""
    rows = [2 * i for i in pairs] + [2 * i + 1 for i in pairs]
    device = policy.wte.weight.device
    ids, mask = (x.to(device) for x in sft.collate(examples, rows))           # (2b, T) each
    chosen, rejected = dpo.answer_logprobs(policy, ids, mask).chunk(2)        # (b,) each
    nll = -(chosen / mask[:len(chosen), 1:].sum(1)).mean()
    row = dict(nll_loss=nll.item())
    if cfg.update == "sft":
        return nll, row
    ref = reference[rows].to(device).chunk(2)                                 # (b,) each
    loss, good, bad = dpo.dpo_loss(chosen, rejected, *ref, cfg.beta)
    row["loss"] = loss.item()
    row["accuracy"] = (good > bad).float().mean().item()
    row["margin"] = (good - bad).mean().item()
    return loss + cfg.nll * nll, row


def improve(policy, examples, replay, cfg, rng, log):
    """Train the policy on the pairs of one round, in place.

    examples: (ids, mask) of chosen, rejected, chosen, rejected, ...; replay: those of IFT and EFT;
    log: a function that takes the row of a step.
    """
    # The reference is the policy before the round. Its log-probabilities are all that DPO needs.
    reference = dpo.all_logprobs(policy, examples)                            # (2P,)
    P = len(examples) // 2
    plan = []
    for _ in range(cfg.epochs):
        order = rng.sample(range(P), P)
        plan += [order[i:i + cfg.batch_pairs] for i in range(0, P, cfg.batch_pairs)]
    optimizer = gpt.adamw(policy, cfg.lr)
    batches = replay_batches(replay, cfg.batch_tokens, rng)
    policy.train()
    for step, pairs in enumerate(tqdm(plan, desc=cfg.update, mininterval=1)):
        loss, row = pair_loss(policy, examples, reference, pairs, cfg)
        if cfg.replay:
            ids, mask = (x.to(policy.wte.weight.device) for x in next(batches))   # (B, T) each
            replay_loss = sft.response_loss(policy(ids), ids, mask)
            loss = loss + cfg.replay * replay_loss
            row["replay_loss"] = replay_loss.item()
        lr = gpt.lr_at(step, len(plan), cfg.lr)
        where = f"step {step} of a round, pairs {pairs}; last good checkpoint: the round before"
        grad_norm = gpt.take_step(loss, optimizer, policy, lr, where=where)
        log(step=step, **row, grad_norm=grad_norm)
    policy.eval()


def first_model(cfg, init, path, examples):
    """Return M1 = SFT(M0; IFT + EFT), trained unless `path` was made from the same inputs."""
    device = gpt.pick_device(cfg.device)
    settings = "data eft init sft_lr sft_epochs batch_tokens noise halo seed".split()
    made_from = {k: str(getattr(cfg, k)) for k in settings}
    inputs = [init] if cfg.eft else [init, Path(cfg.out) / "sft.pt"]
    changed = max(p.stat().st_mtime for p in inputs if p.exists())
    is_newer = path.exists() and path.stat().st_mtime > changed
    if is_newer and gpt.load_checkpoint(path).get("made_from") == made_from:
        print(f"{path} is there, made from the same data and settings")
    else:
        model, enc, base = gpt.load_model(init, device)
        log_path = path.with_suffix(".jsonl")   # beside M1: variants share both
        log_path.unlink(missing_ok=True)
        for _ in sft.tune(model, examples, cfg.sft_epochs, cfg.batch_tokens, cfg.sft_lr, cfg.seed,
                          "M1", partial(gpt.log_metrics, log_path)):
            pass
        gpt.save_model(path, model, enc, base["tokenizer"], made_from=made_from)
    return gpt.load_model(path, device)[0]


def variant(cfg):
    """Name a run by the settings that differ from the main run's."""
    parts = [
        (cfg.pairs != "judge", f"pairs-{cfg.pairs}"),
        (cfg.update != "dpo", f"update-{cfg.update}"),
        (cfg.frozen_judge, "frozen-judge"),
        (not cfg.replay, "no-replay"),
        (cfg.halo > 0, "halo"),
    ]
    return "-".join(part for differs, part in parts if differs) or "main"


def check(cfg):
    """Raise UserError for settings that cannot work."""
    gpt.require(cfg, 1, "iterations", "n_prompts", "judgements", "epochs", "batch_pairs")
    gpt.require(cfg, 1, "sft_epochs", "batch_tokens", "max_new_tokens")
    gpt.require(cfg, 2, "candidates", "n_test")
    gpt.require(cfg, 0, "margin", "replay", "nll", "judge_temperature")
    gpt.require(cfg, 0, "noise", "halo", most=0.5)
    gpt.require(cfg, 0, "lr", "sft_lr", most=10)
    gpt.require(cfg, 1e-6, "beta")
    if cfg.pairs not in ("judge", "random", "gold"):
        raise UserError(f"--pairs {cfg.pairs}: choose judge, random or gold")
    if cfg.update not in ("dpo", "sft"):
        raise UserError(f"--update {cfg.update}: choose dpo or sft")
    if cfg.data and not cfg.prompts:
        raise UserError("--data without --prompts: the base model can only write prompts about the "
                        "village; name a file of prompts")
    if cfg.halo and cfg.eft:
        raise UserError("--halo with --eft: only the village's annotators have a halo; leave one "
                        "out")


def load_seed_data(cfg, out):
    """Load the data of people, or make the village's. Returns verdicts.SeedData."""
    chats = cfg.data or sft.village_data(out, cfg.seed) / "sft_train.jsonl"
    chats = sft.load_chats(chats, cfg.seed)
    if cfg.eft:
        records = verdicts.load_judged(cfg.eft)
    else:
        if not (out / "sft.pt").exists():
            announce(out / "sft.pt", "training it, whose responses annotators judge,", cfg.resume)
            sft.main(sft.Config(out=cfg.out, seed=cfg.seed, device=cfg.device, resume=cfg.resume))
        ranked = reward.load_comparisons(labelers.ensure(out, cfg.seed, cfg.device)[0])
        records = verdicts.annotated(ranked, cfg.noise, cfg.halo, cfg.seed)
    return verdicts.seed_data(chats, records, cfg.halo, cfg.seed)


def load_prompts(cfg, out, enc, block_size):
    """-> prompts of the table, and the pool of new prompts (empty: a base model writes them)"""
    def load(path):
        return ppo.load_prompts(path, enc, block_size, cfg.max_new_tokens + 1)

    pool = load(cfg.prompts) if cfg.prompts else []
    if cfg.test or not cfg.prompts:
        test = load(cfg.test or out / "data" / "prompts_test.jsonl")
    else:
        pool, test = sft.split_by_user(pool, seed=cfg.seed)
    return test[:cfg.n_test], pool


def load_writer(cfg, enc, chats, test):
    """Return write_prompts(n, seed) of the base model OUT/long/gpt.pt, made if it is missing."""
    path = self_instruct.long_base(cfg.out, cfg.seed, cfg.device, cfg.resume)
    model = gpt.load_model(path, gpt.pick_device(cfg.device))[0]
    shown = sorted({c["messages"][0]["content"] for c in chats if len(c["messages"]) == 2})
    known = {prompt_text(p["prompt"]) for p in test}
    return partial(write_prompts, model, enc, shown, known)


def main(cfg):
    from lab import judge_quality   # imports this file
    check(cfg)
    device = gpt.pick_device(cfg.device)
    out = gpt.run_folder(cfg.out)
    folder = out / "self_reward"
    name = variant(cfg)
    init = Path(cfg.init or out / "gpt.pt")
    if not init.exists() and not cfg.init:
        announce(init, "pretraining it", cfg.resume)
        gpt.main(gpt.Config(out=cfg.out, seed=cfg.seed, device=cfg.device, resume=cfg.resume))
    gpt.set_seed(cfg.seed)
    policy, enc, base = gpt.load_model(init, device)
    block_size = policy.config.block_size
    rng = random.Random(cfg.seed)
    chats, judged, held_out = load_seed_data(cfg, out)
    test_prompts, pool = load_prompts(cfg, out, enc, block_size)
    writer = None if pool else load_writer(cfg, enc, chats, test_prompts)
    grade = sft.gold_hook(cfg.grade, test_prompts + pool)
    if cfg.pairs == "gold" and not grade:
        raise UserError("--pairs gold: the prompts carry no task to grade; leave it out")
    held_out = held_out if sft.gold_hook(cfg.grade, held_out) else []
    test = judge_quality.EvalSet(test_prompts, held_out, grade)
    ift = sft.tokenize(chats, enc, block_size)
    eft = eft_examples(judged, enc, block_size, rng)
    print(f"self_reward.py: {name}; {len(ift):,} IFT chats, {len(eft):,} judged responses, "
          f"device {device}")

    prefix = "" if name == "main" else f"{name}-"
    ended = folder / f"{name}.ended"   # marks a run that ended before its last round
    made = ended if ended.exists() else folder / f"{prefix}M{cfg.iterations + 1}.pt"
    inputs = [init, cfg.data, cfg.eft, cfg.prompts, cfg.test, *out.glob("data/*_train.jsonl")]
    rows = []       # of the table
    history = []    # gold scores and responses of M1, M2, ...
    run = Run(cfg, f"self_reward-{name}", inputs, made,
              policy=policy, rng=rng, rows=rows, history=history)
    if not run.resumed:
        ended.unlink(missing_ok=True)
        run.log(config=vars(cfg))
    m1 = first_model(cfg, init, folder / ("halo-M1.pt" if cfg.halo else "M1.pt"), ift + eft)
    policy.load_state_dict(m1.state_dict())
    judge_model = m1 if cfg.frozen_judge else policy

    def evaluate(stage, **extra):
        """Measure the policy; add rows to the log and to the table."""
        new = judge_quality.report(stage, policy, judge_model, enc, test, history, cfg)
        new[0] |= extra
        for row in new:
            rows.append(dict(run=name) | row)
            run.log(**rows[-1])
        print(judge_quality.format_table(rows[-len(new):]))

    if not run.resumed:
        evaluate("M1")
    for step in run.steps(cfg.iterations):
        t = step + 1
        seed = 1000 * cfg.seed + t
        prompts = new_prompts(cfg, t, seed, pool, writer, enc, block_size)
        responses = sample(policy, enc, prompts, cfg.candidates, cfg.max_new_tokens, seed)
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
            cause = "the judge sees no difference any more"
            if all(s is None for row in scores for s in row):
                cause = "no verdict has a score; bring more EFT data, or raise --sft-epochs"
            print(f"fewer than {cfg.batch_pairs} pairs, and the run ends here: {cause}")
            ended.touch()
            break
        examples = [tokenize(enc, prompts[p.prompt]["prompt"], responses[p.prompt][k])
                    for p in pairs for k in (p.chosen, p.rejected)]
        improve(policy, examples, ift + eft, cfg, rng, partial(run.log, round=t))
        gpt.save_model(folder / f"{prefix}M{t + 1}.pt", policy, enc, base["tokenizer"])
        evaluate(f"M{t + 1}", pairs=len(pairs), dropped=dict(dropped),
                 **judge_quality.agreement(pairs, golds))
    run.finish()
    print(f"--- all runs of {out}\n{judge_quality.table_of_runs(out, run.log_path, rows)}")
    for p, before, after in list(zip(test_prompts, history[0][1], history[-1][1]))[:4]:
        print(f"--- {p['prompt'][-1]['content']!r}\nM1:   {before[0]!r}\nlast: {after[0]!r}")
    print(f"---\nsaved {folder}; next: its controls, "
          f"python self_reward.py --out {out} --pairs random")


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
