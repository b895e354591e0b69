"""The reward model: learn from people's rankings what a good answer is.

Idea. Nobody can write down "helpful", but anybody can say which of K answers is better. Take the fine-tuned model, replace
its unembedding (C -> V) by one linear layer to a number (C -> 1), and train that number to be larger for the better answer:

    loss = -1/P * sum over the P pairs (w better than l) of log sigmoid( r(x, w) - r(x, l) )        InstructGPT, eq. 1

The number is read at the end token, where the whole answer has been seen. The K answers of a prompt stay in one batch:
K forward passes serve K(K-1)/2 pairs, and no answer is trained on K-1 times (InstructGPT, footnote 5: that overfits).
Answers tied in rank give no pair. Afterwards scores are shifted and scaled to mean 0 and deviation 1 on answers
of the fine-tuned model: only then does PPO's KL coefficient mean the same thing for every reward model.

    python reward.py                                       rankings of the village's simulated labelers
    python reward.py --data pairs.jsonl.gz --out out/mine  {"prompt", "chosen", "rejected"}, Anthropic's transcripts, or
                                                           {"prompt", "responses", "ranks"}
    python reward.py --loss token-margin                   other losses: token-margin, regression

A minute on two CPU cores, sampling included. Needs OUT/sft.pt and trains it first when it is missing. Read next: gae.py, ppo.py.
"""
import random, re
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt, sft
from run import Run, UserError, announce, fair, once, share


@dataclass
class Config:
    data: str = ""
    "ranked answers, .json, .jsonl or .gz; empty: the village's, made from answers of OUT/sft.pt"
    val: str = ""
    "ranked answers for validation; empty: every twentieth user of the data, or every twentieth record"
    out: str = "out"
    "folder of this run"
    loss: str = "ranking"
    "ranking (the paper's), token-margin (a hinge at every aligned token) or regression (on scores, or ranks if there are none)"
    margin: float = 1.0
    "token-margin only: how far apart two tokens' scores should be"
    epochs: int = 1
    "1: with more, a reward model overfits before its accuracy shows it"
    lr: float = 5e-4
    "peak learning rate, cosine to a tenth"
    batch_prompts: int = 16
    "prompts per step on average, each with all its answers"
    normalise_on: int = 256
    "prompts whose sampled answers define mean 0 and deviation 1"
    max_new_tokens: int = 64
    "longest answer when these are sampled"
    gold: str = "data.village:gold"
    "module:function that grades (task, answer), for reports only; used where records carry a task"
    save_every: int = 200
    "steps between two savings of all that --resume needs, in OUT/reward.state; 0: on Ctrl-C alone"
    resume: bool = False
    "go on with what was stopped or killed in OUT, this stage or one before it, bit for bit"
    seed: int = 0
    "same seed, same machine, same run"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


class RewardModel(nn.Module):
    """A GPT whose unembedding is replaced by a linear layer to one number per position."""

    def __init__(self, body):
        super().__init__()
        C = body.config.n_embd
        self.body, self.head = body, nn.Linear(C, 1)
        nn.init.normal_(self.head.weight, std=1 / (C + 1) ** 0.5)   # Stiennon et al., appendix B.1
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, ids):
        """(B, T) -> (B, T) fp32: the score of the text up to and including each token."""
        return (self.head(self.body.hidden(ids))[..., 0].float() - self.mean) / self.std

    def score(self, ids, lengths):
        """(B, T), (B,) -> (B,): the score at the last real token, which should be the end token."""
        return self(ids)[torch.arange(len(ids), device=ids.device), lengths - 1]


def pair_mask(ranks):
    """(B, K) -> (B, K, K): True where the first answer is ranked above the second. Rank 1 is best, 0 means no answer."""
    there = ranks > 0
    return (ranks[:, :, None] < ranks[:, None, :]) & there[:, :, None] & there[:, None, :]


def ranking_loss(scores, ranks):
    """-log sigmoid(r_w - r_l): mean over the kept pairs of a prompt, then over the prompts that have one.

    scores, ranks: (B, K); rank 1 is best, equal ranks are a tie and give no pair, rank 0 marks an absent answer.
    Raises UserError when no pair is left. InstructGPT (2203.02155) eq. 1; ties as in its appendix C.2.
    """
    pairs = pair_mask(ranks)                                                  # (B, K, K)
    if not pairs.any():
        raise UserError("all answers are tied: there is no pair to learn from")
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]) * pairs   # (B, K, K)
    n = pairs.sum((1, 2))                                                     # (B,)
    return (losses.sum((1, 2)) / n.clamp(min=1))[n > 0].mean()


def token_margin_loss(better, worse, mask, margin=1.0):
    """Hinge on every aligned response token: each should score `margin` higher in the better answer than in the worse.

    better, worse, mask: (B, T); mask 1 where both answers have a response token (the longer one's overhang has no partner).
    """
    mask = mask.float()
    return (F.relu(margin - (better - worse)) * mask).sum() / mask.sum().clamp(min=1)


def parse_transcript(text, where="transcript"):
    """Anthropic's '\\n\\nHuman: ...\\n\\nAssistant: ...' -> messages."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    if parts[0].strip() or len(parts) < 3:
        raise UserError(f"{where}: expected a transcript that starts with 'Human:' or 'Assistant:'")
    role = {"Human": "user", "Assistant": "assistant"}
    return [{"role": role[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2])]


def as_messages(prompt, where):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else sft.check_messages(prompt, where)


def is_number(x, least):
    """Neither a truth value nor nan, and less than 1e9: what a fp32 can hold."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and least <= x < 1e9


def read_comparison(r, where):
    """One record of any format -> (prompt messages, answers, ranks); None where the two transcripts do not share a prompt."""
    if "responses" in r and "ranks" in r and "prompt" in r:
        answers, ranks = r["responses"], r["ranks"]
        if not isinstance(answers, list) or not isinstance(ranks, list) or len(answers) != len(ranks) or len(answers) < 2:
            raise UserError(f"{where}: responses and ranks must be two lists of one length K >= 2")
        if not all(isinstance(x, str) for x in answers):
            raise UserError(f"{where}: every response must be a text")
        if not all(is_number(x, 1) for x in ranks):
            raise UserError(f"{where}: every rank must be a number from 1 (best); equal ranks are a tie")
        for k in ("scores", "ranks_other"):
            if k in r and (not isinstance(r[k], list) or len(r[k]) != len(answers) or not all(is_number(x, -1e9) for x in r[k])):
                raise UserError(f"{where}: {k} must be a list with one number per response")
        return as_messages(r["prompt"], where), answers, ranks
    if "chosen" not in r or "rejected" not in r:
        raise UserError(f'{where}: expected "chosen" and "rejected", or "prompt", "responses" and "ranks"; '
                        f'found {gpt.brief(sorted(r))}')
    chosen, rejected = r["chosen"], r["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and "prompt" in r:
        return as_messages(r["prompt"], where), [chosen, rejected], [1, 2]
    chats = [parse_transcript(c, where) if isinstance(c, str) else sft.check_messages(c, where) for c in (chosen, rejected)]
    if "prompt" in r:   # beside it, two whole chats, or only what follows it: then they start with the assistant
        prompt = as_messages(r["prompt"], where)
        chats = [prompt + c if c[0]["role"] == "assistant" and c[:len(prompt)] != prompt else c for c in chats]
    if chats[0][:-1] != chats[1][:-1] or not chats[0][:-1] or any(c[-1]["role"] != "assistant" for c in chats):
        return None
    return chats[0][:-1], [c[-1]["content"] for c in chats], [1, 2]


def load_comparisons(path):
    """Ranked answers of any of the formats -> [{"prompt", "responses", "ranks", ...}]; what cannot be used is counted, aloud."""
    kept, odd, tied = [], 0, 0
    for where, r in sft.read_records(path):
        found = read_comparison(r, where)
        if found is None:
            odd += 1
            continue
        prompt, answers, ranks = found
        # In fp32, as the loss sees them: ranks that differ in the ninth digit are a tie.
        if len(set(rank_tensor([ranks])[0].tolist())) < 2 or len(set(answers)) < 2:
            tied += 1
            continue
        if ranks is not r.get("ranks"):   # a pair: what it calls scores is not one number per answer
            r = {k: v for k, v in r.items() if k not in ("scores", "ranks_other")}
        kept.append({**r, "prompt": prompt, "responses": answers, "ranks": ranks})
    for n, why in ((odd, "the two sides do not share one prompt and end with an answer"),
                   (tied, "all answers are tied or the same text")):
        if n:
            print(f"{path}: {n} of {len(kept) + odd + tied} records left out: {why}")
    if not kept:
        raise UserError(f"{path}: no record with two answers of different rank: nothing to learn from")
    return kept


def tokenize(records, enc, block_size):
    """-> [(list of K id tensors, start of the answers, record)]. A prompt too long for the context loses its beginning, for
    all its answers alike, so that a comparison stays fair; an answer that fills the context alone is left out, and counted."""
    examples, cut, lost = [], 0, 0
    end = gpt.end_of(enc)
    for r in records:
        prompt = sft.render_prompt(r["prompt"], enc)
        answers = [enc.encode_ordinary(a) + [end] for a in r["responses"]]
        fits = [i for i, a in enumerate(answers) if len(a) < block_size]
        lost += len(answers) - len(fits)
        if len({r["ranks"][i] for i in fits}) < 2:
            continue
        room = block_size - max(len(answers[i]) for i in fits)
        cut += len(prompt) > room
        prompt = prompt[-room:]
        record = {**r, **{k: [r[k][i] for i in fits] for k in ("responses", "ranks", "ranks_other", "scores") if k in r}}
        examples.append(([torch.tensor(prompt + answers[i]) for i in fits], len(prompt), record))
    if cut or lost:
        print(f"{cut} of {len(records)} prompts lose their beginning to fit the context of {block_size} tokens; "
              f"{lost} answers longer than the context are left out")
    if not examples:
        raise UserError(f"no comparison fits the context of {block_size}; pretrain with a larger --block-size")
    return examples


def rank_tensor(rows):
    return gpt.pad([torch.tensor(r, dtype=torch.float) for r in rows])        # (B, K), 0 where there is no answer


def score_all(model, examples, device, batch=256):
    """Scores at the end token of all answers -> one list of K floats per example."""
    flat = [ids for e in examples for ids in e[0]]
    order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
    scores = [0.0] * len(flat)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch):
            rows = order[start:start + batch]
            lengths = torch.tensor([len(flat[i]) for i in rows], device=device)
            for i, s in zip(rows, model.score(gpt.pad([flat[i] for i in rows]).to(device), lengths).tolist()):
                scores[i] = s
    it = iter(scores)
    return [[next(it) for _ in e[0]] for e in examples]


def score_answers(model, enc, chats, answers):
    """The score of one answer to each chat, its end token added; what exceeds the context is cut before it."""
    room = model.body.config.block_size - 1
    rows = [torch.tensor((sft.render_prompt(c, enc) + enc.encode_ordinary(a))[:room] + [gpt.end_of(enc)])
            for c, a in zip(chats, answers)]
    return score_all(model, [(rows, 0, None)], model.head.weight.device)[0]


def pair_accuracy(scores, ranks, distance=None):
    """Share of non-tied pairs that the scores order as the ranks do (a tie in scores counts half) -> (accuracy, pairs)."""
    right = n = 0
    for s, r in zip(scores, ranks):
        for i in range(len(r)):
            for j in range(len(r)):
                if r[i] < r[j] and (distance is None or distance(r[j] - r[i])):
                    right, n = right + (s[i] > s[j]) + 0.5 * (s[i] == s[j]), n + 1
    return (right / n if n else float("nan")), n


def word_scores(examples):
    """The poor man's reward model: +1 to each token of the better answer of a pair, -1 to each of the worse. -> {token: -1..1}"""
    good, bad = Counter(), Counter()
    for answers, start, r in examples:
        for i, a in enumerate(answers):
            for j, b in enumerate(answers):
                if r["ranks"][i] < r["ranks"][j]:
                    good.update(a[start:].tolist())
                    bad.update(b[start:].tolist())
    return {t: (good[t] - bad[t]) / (good[t] + bad[t]) for t in good | bad}


def targets(record):
    """Regression's goal: the labeler's scores (else minus the ranks), centred per prompt: (K,)."""
    wanted = torch.tensor(record.get("scores") or [-r for r in record["ranks"]], dtype=torch.float)
    return wanted - wanted.mean()


def aligned(scores, lengths, examples):
    """Token scores (sum of K, T) -> those of the better and of the worse answer of every pair, and where both have a token."""
    T, row, better, worse, mask = scores.shape[1], 0, [], [], []
    for answers, start, record in examples:
        for i, j in pair_mask(torch.tensor([record["ranks"]]))[0].nonzero().tolist():
            better.append(row + i)
            worse.append(row + j)
            mask.append((torch.arange(T) >= start) & (torch.arange(T) < min(len(answers[i]), len(answers[j]))))
        row += len(answers)
    return scores[better], scores[worse], torch.stack(mask).to(scores.device)  # (pairs, T) each


def normalise(model, policy, enc, records, cfg):
    """Set mean and std so that answers of the fine-tuned model score 0 +- 1 (Ziegler et al.; both, not only the mean)."""
    chats = [r["prompt"] for r in records if len(sft.render_prompt(r["prompt"], enc)) < policy.config.block_size]
    chats = chats[:cfg.normalise_on]
    if len(chats) < 2:
        raise UserError(f"--normalise-on {cfg.normalise_on}: {len(chats)} prompts fit the context; "
                        f"a mean and a deviation want 2 and more")
    answers = sft.reply(policy, enc, chats, cfg.max_new_tokens, seed=cfg.seed)
    model.mean.zero_()
    model.std.fill_(1)
    scores = torch.tensor(score_answers(model, enc, chats, answers))
    model.mean.fill_(scores.mean())
    model.std.fill_(scores.std(correction=0).clamp(min=1e-3))


def load_reward(path, device="cpu"):
    """-> (RewardModel in eval mode, tokenizer). Raises UserError as gpt.load_model does."""
    body, enc, state = gpt.load_model(path, device)
    model = RewardModel(body).to(device)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise UserError(f"{path}: no reward model; make one with: python reward.py") from None
    return model.eval(), enc


def report(name, examples, scores, extra=()):
    """Accuracy against the labelers, by rank distance, beside what length alone and word counts would get."""
    ranks = [e[2]["ranks"] for e in examples]
    row = dict(split=name, prompts=len(examples), pairs=pair_accuracy(scores, ranks)[1], accuracy=pair_accuracy(scores, ranks)[0])
    for label, test in (("distance_1", lambda d: d == 1), ("distance_2", lambda d: d == 2), ("distance_3+", lambda d: d > 2)):
        row[label] = pair_accuracy(scores, ranks, test)[0]
    row["length_alone"] = pair_accuracy([[len(a) for a in e[0]] for e in examples], ranks)[0]
    for label, other in extra:
        row[label] = pair_accuracy(other, ranks)[0]
    if all("ranks_other" in e[2] for e in examples):
        # Of the pairs that neither labeler ties, as people's agreement is counted.
        other = [e[2]["ranks_other"] for e in examples]
        pairs = [(a[i] < a[j]) == (b[i] < b[j]) for a, b in zip(ranks, other) for i in range(len(a)) for j in range(i)
                 if a[i] != a[j] and b[i] != b[j]]
        row["labelers_agree"] = sum(pairs) / len(pairs) if pairs else float("nan")
    return row


def main(cfg):
    gpt.require(cfg, 1, "epochs", "batch_prompts", "max_new_tokens")
    gpt.require(cfg, 0, "lr", most=10)
    if cfg.loss not in ("ranking", "token-margin", "regression"):
        raise UserError(f"--loss {cfg.loss}: choose ranking, token-margin or regression")
    device, out = gpt.pick_device(cfg.device), gpt.run_folder(cfg.out)
    if not (out / "sft.pt").exists():
        announce(out / "sft.pt", "fine-tuning it", cfg.resume)
        sft.main(sft.Config(out=cfg.out, seed=cfg.seed, device=cfg.device, resume=cfg.resume))
    gpt.set_seed(cfg.seed)
    policy, enc, base = gpt.load_model(out / "sft.pt", device)
    if not cfg.data:
        from data import labelers
        cfg.data, val_file = once(lambda: labelers.ensure(out, cfg.seed, cfg.device))
        cfg.val = cfg.val or val_file
    train = load_comparisons(cfg.data)
    train, val = (train, load_comparisons(cfg.val)) if cfg.val else sft.split_by_user(train, seed=cfg.seed)
    block = policy.config.block_size
    train, val = tokenize(train, enc, block), tokenize(val, enc, block)
    gpt.set_seed(cfg.seed)   # again: whether the rankings were made just now must not decide how the head starts
    model = RewardModel(gpt.load_model(out / "sft.pt", device)[0]).to(device)
    rng, B = random.Random(cfg.seed), cfg.batch_prompts
    # Similar lengths share a batch, as in sft.py: half of the time would go into padding otherwise.
    size = [len(e[0]) * max(map(len, e[0])) for e in train]
    budget = B * sum(size) // len(size)
    plan = [b for _ in range(cfg.epochs) for b in sft.batches(size, budget, rng)]
    print(f"reward.py: {len(train):,} prompts, {sum(len(e[0]) for e in train):,} answers, {len(plan)} steps, device {device}")
    optimizer = gpt.adamw(model, cfg.lr, 0.01)
    run = Run(cfg, "reward", [out / "sft.pt", cfg.data, cfg.val], model=model, optimizer=optimizer)
    model.train()
    for step in run.steps(len(plan)):
        rows = share(plan[step])
        answers = [ids for i in rows for ids in train[i][0]]
        lengths = torch.tensor([len(a) for a in answers], device=device)
        ids = gpt.pad(answers).to(device)                                     # (sum of K, T)
        with gpt.autocast(device):
            if cfg.loss == "ranking":
                flat = model.score(ids, lengths)                              # (sum of K,)
                scores = gpt.pad(list(flat.split([len(train[i][0]) for i in rows])))              # (B, K)
                ranks = rank_tensor([train[i][2]["ranks"] for i in rows]).to(device)              # (B, K)
                loss = fair(ranking_loss(scores, ranks), len(rows))   # load_comparisons keeps no prompt whose answers are all tied
            elif cfg.loss == "regression":
                wanted = torch.cat([targets(train[i][2]) for i in rows]).to(device)               # (sum of K,)
                loss = fair(F.mse_loss(model.score(ids, lengths), wanted), len(wanted))
            else:
                better, worse, mask = aligned(model(ids), lengths, [train[i] for i in rows])
                loss = fair(token_margin_loss(better, worse, mask, cfg.margin), mask.sum())
        norm = run.take_step(loss, optimizer, model, gpt.lr_at(step, len(plan), cfg.lr), f"prompts {plan[step]}, counted from 0")
        run.log(step=step, loss=loss.item(), grad_norm=norm)
        run.bar.set_postfix(loss=f"{loss.item():.3f}")
    normalise(model, policy, enc, [e[2] for e in train], cfg)
    gpt.save_checkpoint(out / "reward.pt", model=model.state_dict(), gpt=base["gpt"], tokenizer=base["tokenizer"],
                        fingerprint=base["fingerprint"], seed=cfg.seed, loss=cfg.loss)
    gold, words = sft.gold_hook(cfg.gold, [e[2] for e in train + val]), word_scores(train)
    for name, examples in (("training users", train[:400]), ("held-out users", val)):
        scores = score_all(model, examples, device)
        extra = [("word_counts", [[sum(words.get(t, 0) for t in a[e[1]:].tolist()) for a in e[0]] for e in examples])]
        if gold:
            extra.append(("gold_program", [[gold(e[2]["task"], a) for a in e[2]["responses"]] for e in examples]))
        row = report(name, examples, scores, extra)
        if gold:
            row["accuracy_against_gold"] = pair_accuracy(scores, [[-g for g in golds] for golds in extra[1][1]])[0]
        run.log(**row)
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    run.finish()
    e, s = max(zip(val, score_all(model, val, device)), key=lambda x: max(x[1]) - min(x[1]))
    print(f"--- {e[2]['prompt'][-1]['content']!r}")
    for score, rank, answer in sorted(zip(s, e[2]["ranks"], e[2]["responses"]), reverse=True):
        print(f"score {score:6.2f}  labeler's rank {rank}  {answer!r}")
    print(f"---\nsaved {out / 'reward.pt'}; next: python ppo.py --out {out}")


if __name__ == "__main__":
    gpt.run(main, Config, __doc__, shared=True)
