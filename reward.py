"""The reward model: learn from rankings which response is better.

Idea. There is no formula for "helpful", but people can say which of K responses is better. Take the
fine-tuned model, replace its unembedding (C -> V) by one linear layer (C -> 1), and train this
score to be larger for the better response (InstructGPT, 2203.02155, eq. 1):

    loss = -1/P * sum over a prompt's P pairs, w better than l, of log sigmoid( r(x, w) - r(x, l) )

The score is read at the end token, which has seen the whole response. The K responses of a prompt
share a batch: K forward passes serve K(K-1)/2 pairs. With one batch per pair, each response would
be trained on K-1 times and overfit (footnote 5). Ties give no pair. At the end the scores get mean
0 and std 1 on samples of the fine-tuned model, so that PPO's KL coefficient keeps its meaning.

    python reward.py                                        rankings by the village's labelers
    python reward.py --data pairs.jsonl.gz --out out/mine   pairs or ranks, see data/README.md
    python reward.py --no-logprobs                          the score of InstructGPT alone
    python reward.py --loss token-margin                    other losses: token-margin, regression
    python reward.py --init out/half/sft.pt                 another start, such as a smaller model
    python reward.py --probe pairs.jsonl                    test OUT/reward.pt on pairs of yours

Half a minute on two CPU cores, sampling included. Trains OUT/sft.pt first if it is missing. Next:
gae.py, ppo.py. Elsewhere: data/formats.py reads records, data/rankings.py measures.
"""
import math
import random
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt
import sft
from data import checkpoint, labelers
from data.formats import load_comparisons, load_grader, load_val, mean_grade, split_names
from data.rankings import (
    aligned, print_probes, print_widest, report, targets, tokenize, word_scores)
from data.text import batches, by_length, pad, sorted_batches
from data.tokenizer import end_of, fingerprint
from scaffold.cli import RunConfig, UserError, choose, pick_device, require, run_folder, start
from scaffold.distributed import global_mean, rank0_first, shard
from scaffold.optim import adamw, autocast, in_parts, lr_at
from scaffold.run import Run, ensure_stage, save_checkpoint, set_seed
from scaffold.table import print_row


@dataclass
class Config(RunConfig):
    data: str = ""               # ranked responses; empty: ranked samples of OUT/sft.pt
    val: str = ""                # the same for validation; empty: 5% of the users (or prompts)
    init: str = ""               # the checkpoint to start from, of any size; empty: OUT/sft.pt
    probe: str = ""              # pairs to score with the finished OUT/reward.pt; no training
    loss: str = "ranking"        # ranking (the paper's), token-margin or regression (on scores)
    margin: float = 1.0          # token-margin only: how far apart two tokens' scores should be
    logprobs: bool = True        # add the weighted log-probs of the response to the score
    epochs: int = 2              # more memorise the labelers' noise
    lr: float = 5e-4             # peak learning rate, cosine to a tenth
    batch_prompts: int = 16      # prompts per step on average, each with all its responses
    grad_accum: int = 1          # compute each batch in so many parts: less memory, a third slower
    normalise_on: int = 256      # prompts whose sampled responses define mean 0 and std 1
    max_new_tokens: int = 64     # longest response when these are sampled
    save_every: int = 200        # steps between saves of the training state; 0: on Ctrl-C only
    gold: str = "data.village:gold"   # module:function that grades (task, response), for reports


class RewardModel(nn.Module):
    """A GPT with a linear layer to one number per position instead of its unembedding.

        score at t  =  head(h_t)  +  sum over i <= t of weight(h_i) * log p(x_i | x_<i)

    InstructGPT has the first term. With it alone, a small model learns style but no facts: to see
    that "The cow says meh." is wrong, it needs what it expected in place of "meh", and only its
    last block knows that. The second term, over the tokens after the last `assistant` token, tells
    how likely each of them was. Its weights start at 0.
    """

    def __init__(self, body, assistant=-1):
        super().__init__()
        C = body.config.n_embd
        self.body = body
        self.head = nn.Linear(C, 1)
        nn.init.normal_(self.head.weight, std=1 / (C + 1) ** 0.5)   # Stiennon et al., appendix B.1
        nn.init.zeros_(self.head.bias)
        self.weight = nn.Linear(C, 1, bias=False)
        nn.init.zeros_(self.weight.weight)
        self.register_buffer("assistant", torch.tensor(assistant))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, ids, lengths=None):
        """Score the text up to each token: (B, T) -> (B, T), fp32; lengths (B,) skip padding."""
        if lengths is not None:
            return by_length(self, ids, lengths)
        states = self.body.hidden(ids)                                        # (B, T, C)
        response = (ids == self.assistant).flip(1).cumsum(1).flip(1) == 0     # (B, T)
        logprobs = gpt.token_logprobs(self.body, ids, mask=response[:, 1:], states=states)
        with torch.autocast(ids.device.type, enabled=False):   # bf16 would round the scores
            states = states.to(self.head.weight.dtype)
            weighed = self.weight(states)[:, 1:, 0].float() * logprobs        # (B, T-1)
            raw = self.head(states)[..., 0].float() + F.pad(weighed.cumsum(1), (1, 0))   # (B, T)
            return (raw - self.mean) / self.std

    def score(self, ids, lengths):
        """Score at the last real token, which should be the end token: (B, T), (B,) -> (B,)."""
        return self(ids, lengths)[torch.arange(len(ids), device=ids.device), lengths - 1]


def pair_mask(ranks):
    """Mark the pairs whose first response is better: ranks (B, K) -> (B, K, K).

    Rank 1 is best, rank 0 marks an absent response.
    """
    present = ranks > 0
    better = ranks[:, :, None] < ranks[:, None, :]                            # (B, K, K)
    return better & present[:, :, None] & present[:, None, :]


def ranking_loss(scores, ranks):
    """-log sigmoid(r_w - r_l), mean over the pairs of a prompt, then over the prompts.

    scores, ranks (B, K); rank 1 is best, equal ranks are a tie and give no pair, rank 0 marks an
    absent response. Prompts without a pair do not count. Raises UserError if no prompt has one.
    InstructGPT (2203.02155), eq. 1; ties as in its appendix C.2.
    """
    pairs = pair_mask(ranks)                                                  # (B, K, K)
    if not pairs.any():
        raise UserError("all responses are tied: there is no pair to learn from")
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]) * pairs   # (B, K, K)
    n = pairs.sum((1, 2))                                                     # (B,)
    per_prompt = losses.sum((1, 2)) / n.clamp(min=1)                          # (B,)
    return per_prompt[n > 0].mean()


def token_margin_loss(better, worse, mask, margin=1.0):
    """Hinge: each token should score `margin` higher in the better response than in the worse.

    better, worse, mask (B, T); the mask is 1 where both responses have a token.
    """
    mask = mask.float()
    return (F.relu(margin - (better - worse)) * mask).sum() / mask.sum().clamp(min=1)


def rank_tensor(rows):
    """Stack lists of ranks (B, K), 0 where there is no response."""
    return pad([torch.tensor(r, dtype=torch.float) for r in rows])


@torch.no_grad()
def score_rows(model, rows, device, batch=256):
    """Score id tensors at their last token -> list of floats. Similar lengths share a batch."""
    scores = [0.0] * len(rows)
    model.eval()
    for chunk in sorted_batches([len(row) for row in rows], batch):
        lengths = torch.tensor([len(rows[i]) for i in chunk], device=device)
        ids = pad([rows[i] for i in chunk]).to(device)                        # (b, T)
        for i, score in zip(chunk, model.score(ids, lengths).tolist()):
            scores[i] = score
    return scores


def score_all(model, comparisons, device):
    """Score all responses -> one list of K floats per comparison."""
    scores = iter(score_rows(model, [ids for c in comparisons for ids in c.rows], device))
    return [[next(scores) for _ in c.rows] for c in comparisons]


def score_responses(model, enc, chats, responses):
    """Score one response (a string) per chat; a long one is cut to fit before its end token."""
    room = model.body.config.block_size - 1
    rows = []
    for chat, response in zip(chats, responses):
        ids = sft.render_prompt(chat, enc) + enc.encode_ordinary(response)
        rows.append(torch.tensor(ids[:room] + [end_of(enc)]))
    return score_rows(model, rows, model.head.weight.device)


def batch_loss(model, comparisons, device, cfg):
    """Return the loss of a batch, averaged over all processes."""
    rows = [ids for c in comparisons for ids in c.rows]
    lengths = torch.tensor([len(r) for r in rows], device=device)             # (sum of K,)
    ids = pad(rows).to(device)                                                # (sum of K, T)
    if cfg.loss == "token-margin":
        scores = in_parts(model, cfg.grad_accum, ids)                         # (sum of K, T)
        better, worse, mask = aligned(scores, comparisons)                    # (pairs, T) each
        return global_mean(token_margin_loss(better, worse, mask, cfg.margin), mask.sum())
    flat = in_parts(model.score, cfg.grad_accum, ids, lengths)                # (sum of K,)
    if cfg.loss == "regression":
        wanted = torch.cat([targets(c.record) for c in comparisons]).to(device)
        return global_mean(F.mse_loss(flat, wanted), len(wanted))
    scores = pad(list(flat.split([len(c.rows) for c in comparisons])))        # (B, K)
    ranks = rank_tensor([c.record["ranks"] for c in comparisons]).to(device)
    return global_mean(ranking_loss(scores, ranks), len(comparisons))         # each has one


def normalise(model, policy, enc, records, cfg):
    """Set mean and std so that samples of the fine-tuned model score with mean 0 and std 1.

    Raw scores are log-odds. A std below 0.1 says that the model has learned too little to tell the
    samples apart, so the scores are divided by 0.1 at least.
    """
    fitting = sft.fit_prompts(records, enc, policy.config.block_size - 1)
    chats = [r["prompt"] for r in fitting[:cfg.normalise_on]]
    if len(chats) < 16:
        print(f"warning: only {len(chats)} prompts to measure the scale of the scores on; "
              f"16 or more are better")
        chats = chats * math.ceil(16 / len(chats))   # several samples of each
    responses = sft.sample_responses(policy, enc, chats, cfg.max_new_tokens, seed=cfg.seed)
    model.mean.zero_()
    model.std.fill_(1)
    scores = torch.tensor(score_responses(model, enc, chats, responses))
    std = scores.std(correction=0)
    if std < 0.1:
        print(f"warning: samples of the fine-tuned model score nearly the same (std {std:.3f}); "
              f"bring more comparisons, or train for more --epochs")
    model.mean.fill_(scores.mean())
    model.std.fill_(std.clamp(min=0.1))


def load_reward(path, device="cpu", reads=None):
    """Read a reward model -> (RewardModel in eval mode, tokenizer). Raises UserError.

    reads: the tokenizer of the policy whose responses it is to read.
    """
    body, enc, state = gpt.load_model(path, device)
    if reads and fingerprint(enc) != fingerprint(reads):
        raise UserError(f"{path}: it and sft.pt differ in tokenizer; train it again")
    model = RewardModel(body).to(device)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise UserError(f"{path}: not a reward model; make one with: python reward.py") from None
    return model.eval(), enc


def probe(path, reward_path, device):
    """Print how often a finished reward model prefers the better response, by kind of pair."""
    if not reward_path.exists():
        raise UserError(f"{reward_path} is missing; make it with: "
                        f"python reward.py --out {reward_path.parent}")
    model, enc = load_reward(reward_path, device)
    T = model.body.config.block_size
    comparisons = tokenize(load_comparisons(path), sft.render_prompt, enc, T)
    print_probes([c.record for c in comparisons], score_all(model, comparisons, device))


def score_policy(model, policy, enc, records, gold, cfg):
    """Sample a response to each prompt -> {"reward": mean score, "gold": mean grade if graded}."""
    chats = [r["prompt"] for r in records]
    responses = sft.sample_responses(policy, enc, chats, cfg.max_new_tokens, seed=cfg.seed)
    row = {"reward": sum(score_responses(model, enc, chats, responses)) / len(chats)}
    if gold:
        row["gold"] = mean_grade(gold, records, responses)
    return row


def ranked_data(cfg, out, enc, block_size):
    """Load cfg.data and cfg.val, or the village's rankings -> (train, validation) comparisons."""
    if not cfg.data:
        paths = rank0_first(lambda: labelers.ensure(out, cfg.seed, cfg.device))
        cfg.data = paths[0]
        cfg.val = cfg.val or paths[1]
    train, val = load_val(load_comparisons(cfg.data), cfg.val, load_comparisons, cfg.seed)
    return [tokenize(part, sft.render_prompt, enc, block_size) for part in (train, val)]


def batch_plan(sizes, cfg, rng):
    """Batch prompts of similar size (in tokens); random batches would be half padding."""
    # The loss is a mean per batch, so prompts in small batches (many or long responses) weigh more.
    budget = cfg.batch_prompts * sum(sizes) // len(sizes)
    return [rows for _ in range(cfg.epochs) for rows in batches(sizes, budget, rng)]


def main(cfg):
    require(cfg, 1, "epochs", "batch_prompts", "grad_accum", "max_new_tokens", "normalise_on")
    require(cfg, 0, "lr", most=10)
    choose(cfg, "loss", "ranking", "token-margin", "regression")
    device = pick_device(cfg.device)
    out = run_folder(cfg.out)
    if cfg.probe:
        probe(cfg.probe, out / "reward.pt", device)
        return
    ensure_stage(out / "sft.pt", sft, cfg)
    set_seed(cfg.seed)
    tuned, enc, tuned_state = gpt.load_model(out / "sft.pt", device)
    body, _, base = gpt.load_model(cfg.init or out / "sft.pt", device)
    checkpoint.check_readable(tuned_state, base, f"--init {cfg.init}")
    train, val = ranked_data(cfg, out, enc, tuned.config.block_size)
    records = sft.fit_prompts([c.record for c in train], enc, tuned.config.block_size - 1)
    if not records:
        raise UserError(f"{cfg.data}: no prompt fits the context of {tuned.config.block_size} "
                        f"tokens; pretrain with a larger --block-size")
    gold = load_grader(cfg.gold, [c.record for c in train + val])
    set_seed(cfg.seed)   # again: making the rankings used random numbers
    model = RewardModel(body, enc.encode_single_token("<|assistant|>")).to(device)
    model.weight.requires_grad_(cfg.logprobs)
    sizes = [len(c.rows) * max(map(len, c.rows)) for c in train]
    plan = batch_plan(sizes, cfg, random.Random(cfg.seed))
    optimizer = adamw(model, cfg.lr, 0.01)
    run = Run(cfg, "reward", [out / "sft.pt", cfg.init, cfg.data, cfg.val], model=model,
              optimizer=optimizer)
    print(f"reward.py: {len(train):,} prompts, {sum(len(c.rows) for c in train):,} responses, "
          f"{len(plan)} steps, device {device}")
    model.train()
    for step in run.steps(len(plan)):
        with autocast(device):
            loss = batch_loss(model, [train[i] for i in shard(plan[step])], device, cfg)
        norm = run.take_step(loss, optimizer, model, lr_at(step, len(plan), cfg.lr), plan[step])
        run.log(step=step, loss=loss.item(), grad_norm=norm)
        run.bar.set_postfix(loss=f"{loss.item():.3f}")
    normalise(model, tuned, enc, records, cfg)
    save_checkpoint(out / "reward.pt", model=model.state_dict(), gpt=base["gpt"], seed=cfg.seed,
                    loss=cfg.loss, **checkpoint.tokenizer_entries(enc, base["tokenizer"]))
    words = word_scores(train)
    names = split_names([c.record for c in train], [c.record for c in val])
    rows = [report(name, comparisons, score_all(model, comparisons, device), words, gold)
            for name, comparisons in zip(names, (train[:400], val))]
    for row in rows:
        run.log(**row)
    run.finish()
    for row in rows:
        print_row(row)
    print_widest([c.record for c in val], score_all(model, val, device))
    print(f"---\nsaved {out / 'reward.pt'}; next: python ppo.py --out {out}")


if __name__ == "__main__":
    start(main, Config, __doc__, distributed=True)
