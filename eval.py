"""The results table: every checkpoint of a run answers the same held-out prompts, and the gold program grades the answers.

Rows: base (the pretrained model, prompted with plain text), sft at temperature 1 and greedy, the best of n samples of sft
by the reward model, and every policy found in OUT (ppo, dpo and your named variants), all at temperature 1.

    gold         helpful (0..1) - 1 if something is made up - 1 if rude, mean over the prompts
    new words    the same over the prompts that nobody asked in the same words in training
    win rate     share of prompts on which the row's answer beats a sample of sft by gold; ties count half
    made up      share of the unanswerable questions (those among the prompts, and prompts_unanswerable.jsonl) that get an answer
    reward       mean score by the reward model; length: tokens of an answer; ±: half of a 95% interval over the prompts
    KL           mean of log pi(y|x) - log pi_sft(y|x) over sampled answers y, in nats. Best of n: log n - (n-1)/n, an upper
                 bound; greedy: -log pi_sft(y|x), what it costs to be sure
    lm loss      nats per token on held-out pretraining text: what alignment costs the language model

    python eval.py                      the table of ./out
    python eval.py --json               one JSON object per row
    python eval.py --out out/seed1      another run

Half a minute on two CPU cores. The prompts come from users whom no training stage has seen.
"""
import json, math
from dataclasses import dataclass
from pathlib import Path

import torch

import gpt, reward, sft
from gpt import UserError


@dataclass
class Config:
    out: str = "out"
    "folder of the run"
    prompts: str = ""
    "prompts with tasks; empty: OUT/data/prompts_test.jsonl"
    n: int = 512
    "prompts to answer"
    best_of: int = 16
    "samples per prompt of the best-of-n row; 0 leaves it out"
    max_new_tokens: int = 64
    "longest answer"
    grade: str = "data.village:grade"
    "module:function that grades (task, answer) as {'helpful', 'honest', 'harmless'}"
    json: bool = False
    "print one JSON object per row instead of the table"
    save: str = ""
    "also write these JSON lines to a file"
    seed: int = 0
    "seed of the samples"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


def interval(x):
    """Mean and half-width of its 95% interval, from a list of numbers."""
    x = torch.tensor(x, dtype=torch.float64)
    return x.mean().item(), 1.96 * x.std().item() / math.sqrt(len(x))


def base_answers(model, enc, chats, max_new_tokens, seed):
    """A model that only continues texts is asked in plain text: the turns as lines, and what it says on the next line."""
    prompts = [enc.encode_ordinary("".join(m["content"] + "\n" for m in chat)) for chat in chats]
    ids = gpt.generate(model, prompts, max_new_tokens, stop=gpt.end_of(enc), seed=seed)
    return [enc.decode([i for i in row if i < len(enc._mergeable_ranks)]).split("\n")[0] for row in ids]


@torch.no_grad()
def answer_logprobs(model, enc, chats, answers, batch=256):
    """(N,) sums of log-probabilities of the answers, their end token included."""
    rows, end, device = [], gpt.end_of(enc), model.wte.weight.device
    for chat, answer in zip(chats, answers):
        prompt = sft.render_prompt(chat, enc)
        ids = (prompt + enc.encode_ordinary(answer) + [end])[:model.config.block_size]
        rows.append((torch.tensor(ids), torch.tensor([0] * len(prompt) + [1] * (len(ids) - len(prompt)))))
    total = []
    for start in range(0, len(rows), batch):
        ids, mask = (t.to(device) for t in sft.collate(rows, range(start, min(start + batch, len(rows)))))
        total.append((gpt.token_logprobs(model, ids) * mask[:, 1:]).sum(1).cpu())
    return torch.cat(total)


def is_policy(path):
    """Neither a reward model nor somebody else's file."""
    state = gpt.load_checkpoint(path)
    return isinstance(state, dict) and isinstance(state.get("model"), dict) and "head.weight" not in state["model"]


def policies(out):
    """[(stage, path)] of what is there: base, sft, then every other checkpoint that is no reward model, by name."""
    known = [("base", out / "gpt.pt"), ("sft", out / "sft.pt")]
    others = [(p.stem, p) for p in sorted(out.glob("*.pt")) if p.stem not in ("gpt", "sft")]
    return [x for x in known if x[1].exists()] + [x for x in others if is_policy(x[1])]


def asked_in_training(folder):
    """The prompts of every training file of the village, as messages."""
    for name in ("sft_train", "rank_train", "prompts_train"):
        if (folder / f"{name}.jsonl").exists():
            for _, r in sft.read_records(folder / f"{name}.jsonl"):
                yield r["prompt"] if "prompt" in r else sft.prompt_of(r["messages"])


def evaluate(cfg):
    """-> rows, one dict per stage."""
    gpt.require(cfg, 2, "n")
    gpt.require(cfg, 0, "best_of")
    out, device = Path(cfg.out), gpt.pick_device(cfg.device)
    gpt.set_seed(cfg.seed)
    if not (out / "sft.pt").exists():
        raise UserError(f"{out}: no sft.pt to compare with; train it: python sft.py --out {out}")
    path = Path(cfg.prompts or out / "data" / "prompts_test.jsonl")
    prompts = [r for _, r in sft.read_records(path)][:cfg.n]
    extra = path.with_name("prompts_unanswerable.jsonl")
    unanswerable = [r for _, r in sft.read_records(extra)] if extra.exists() and not cfg.prompts else []
    grade = sft.gold_hook(cfg.grade, prompts + unanswerable)
    if grade is None or not all("prompt" in r for r in prompts):
        raise UserError(f"{path}: the gold program needs prompts with a task; these have none")
    chats = [reward.as_messages(r["prompt"], path) for r in prompts + unanswerable]
    tasks, N = [r["task"] for r in prompts + unanswerable], len(prompts)
    # The world is small: other users ask some of the same questions in the same words. What was never asked is graded apart.
    asked = {str(c) for c in asked_in_training(path.parent)}
    new = [str(c) not in asked for c in chats]
    reference, enc, base = gpt.load_model(out / "sft.pt", device)
    reward_model = reward.load_reward(out / "reward.pt", device)[0] if (out / "reward.pt").exists() else None
    text = gpt.corpus_of(out / "gpt.pt", enc, reference.config.block_size) if (out / "gpt.pt").exists() else None
    opponent = sft.reply(reference, enc, chats[:N], cfg.max_new_tokens, seed=cfg.seed + 1)
    opponent = [sum(grade(t, a).values()) for t, a in zip(tasks, opponent)]

    def row(stage, lm_loss, answers, kl, seed):
        grades = [grade(t, a) for t, a in zip(tasks, answers)]
        gold = [sum(g.values()) for g in grades[:N]]
        wins = [0.5 + 0.5 * ((g > o) - (g < o)) for g, o in zip(gold, opponent)]
        made_up = [-g["honest"] for t, g in zip(tasks, grades) if not t.get("known", True)]
        return dict(
            stage=stage, seed=seed, n=N, gold=interval(gold)[0], gold_ci=interval(gold)[1],
            win_rate_vs_sft=interval(wins)[0], win_rate_ci=interval(wins)[1],
            gold_new=sum(g for g, x in zip(gold, new) if x) / max(1, sum(new[:N])), n_new=sum(new[:N]),
            helpful=sum(g["helpful"] for g in grades[:N]) / N,
            hallucination_rate=sum(made_up) / len(made_up) if made_up else None, rude_rate=sum(-g["harmless"] for g in grades[:N]) / N,
            reward=sum(reward.score_answers(reward_model, enc, chats[:N], answers[:N])) / N if reward_model else None,
            kl_to_sft=kl, lm_loss=lm_loss,
            length=sum(len(enc.encode_ordinary(a)) for a in answers[:N]) / N, golds=gold)

    rows = []
    for stage, path in policies(out):
        model, _, state = gpt.load_model(path, device)
        lm_loss = gpt.val_loss(model, text, enc, device)[0] if text else None
        if stage == "base":
            rows.append(row(stage, lm_loss, base_answers(model, enc, chats, cfg.max_new_tokens, cfg.seed), None, state.get("seed")))
            continue
        answers = sft.reply(model, enc, chats, cfg.max_new_tokens, seed=cfg.seed)
        kl = answer_logprobs(model, enc, chats[:N], answers[:N]) - answer_logprobs(reference, enc, chats[:N], answers[:N])
        rows.append(row(stage, lm_loss, answers, kl.mean().item(), state.get("seed")))
        if stage == "sft":
            greedy = sft.reply(model, enc, chats, cfg.max_new_tokens, temperature=0)
            cost = -answer_logprobs(reference, enc, chats[:N], greedy[:N]).mean().item()
            rows.append(row("sft-greedy", lm_loss, greedy, cost, state.get("seed")))
        if stage == "sft" and reward_model and cfg.best_of:
            samples = [sft.reply(model, enc, chats, cfg.max_new_tokens, seed=cfg.seed + 2 + k) for k in range(cfg.best_of)]
            scores = torch.tensor([reward.score_answers(reward_model, enc, chats, s) for s in samples])      # (n, N+)
            best = [samples[k][i] for i, k in enumerate(scores.argmax(0).tolist())]
            n = cfg.best_of
            rows.append(row(f"best-of-{n}", lm_loss, best, math.log(n) - (n - 1) / n, state.get("seed")))
    greedy = next(r["golds"] for r in rows if r["stage"] == "sft-greedy")
    for r in rows:
        r["gold_minus_greedy"], r["gold_minus_greedy_ci"] = interval([a - b for a, b in zip(r.pop("golds"), greedy)])
    return rows


def table(rows):
    """Rows -> the printed table."""
    def cell(x, form):
        return "-" if x is None else format(x, form)
    lines = ["stage             gold     new words   win rate vs sft   made up   rude   reward     KL   lm loss   length   gold - greedy sft"]
    for r in rows:
        lines.append(
            f"{r['stage']:<14} {r['gold']:5.2f} ±{r['gold_ci']:.2f}   {r['gold_new']:8.2f}   {100 * r['win_rate_vs_sft']:5.1f}% ±{100 * r['win_rate_ci']:.1f}   "
            f"{cell(r['hallucination_rate'], '8.1%'):>9} {100 * r['rude_rate']:5.1f}%  {cell(r['reward'], '6.2f'):>6} {cell(r['kl_to_sft'], '6.1f'):>6}  "
            f"{cell(r['lm_loss'], '8.3f'):>8}   {r['length']:6.1f}   {r['gold_minus_greedy']:+.2f} ±{r['gold_minus_greedy_ci']:.2f}")
    return "\n".join(lines)


def main(cfg):
    rows = evaluate(cfg)
    if cfg.save:
        Path(cfg.save).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.save).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    print("\n".join(json.dumps(r) for r in rows) if cfg.json else table(rows))


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
