"""DPO: improve the fine-tuned model on ranked responses, without a reward model or sampling.

Idea. The optimum that PPO seeks is pi*(y|x) = pi_ref(y|x) * exp( r(x, y) / beta ) / Z(x). Solve
it for the reward (DPO, 2305.18290, eq. 5):

    r(x, y) = beta * log( pi*(y|x) / pi_ref(y|x) ) + beta * log Z(x)

So every policy is the optimum of an implicit reward. Put this reward into the loss of the reward
model. Z(x) is the same for both responses and cancels, and the loss trains the policy (eq. 7):

    loss = -log sigmoid( beta * [ log pi(w|x)/pi_ref(w|x) - log pi(l|x)/pi_ref(l|x) ] )

for w better than l, where log pi(y|x) is the sum over the response's tokens and its end token. The
reference is the frozen fine-tuned model, so its log-probs are computed once. The K responses of a
prompt stay in one batch, as in reward.py: each is computed once, whatever its number of pairs. The
loss is the mean over the pairs of a batch: of its prompts, those with more pairs weigh more.

    python dpo.py                                          on the same rankings as reward.py
    python dpo.py --data pairs.jsonl.gz --out out/mine     pairs or ranks, see data/README.md
    python dpo.py --nll 0.2 --name dpo-nll                 variants: --loss ipo, --pairs extreme

45 seconds on one CPU core. Needs OUT/sft.pt and trains it first if missing. Read next: evaluate.py.
Elsewhere: metrics (scaffold/health.py), pairs (data/rankings.py).
"""
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import gpt
import reward
import sft
from data.formats import load_grader, mean_grade
from data.rankings import choose_pairs
from data.text import sorted_batches
from data.tokenizer import end_of
from scaffold.cli import (
    RunConfig, UserError, check_name, choose, pick_device, require, run_folder, start)
from scaffold.distributed import global_mean, shard
from scaffold.health import DPO_COLUMNS, dpo_metrics
from scaffold.optim import adamw, lr_at
from scaffold.run import Run, ensure_stage, set_seed
from scaffold.table import format_table, print_samples


@dataclass
class Config(RunConfig):
    data: str = ""               # ranked responses; empty: the village's, of samples of OUT/sft.pt
    val: str = ""                # the same for validation; empty: 5% of the users (or prompts)
    name: str = "dpo"            # the checkpoint becomes OUT/NAME.pt; evaluate.py lists all names
    loss: str = "sigmoid"        # sigmoid (the paper's) or ipo (squared loss to a fixed margin)
    beta: float = 0.3            # KL strength; the paper's 0.1 moves further and gains less here
    label_smoothing: float = 0.0   # assumed share of wrong rankings (cDPO); sigmoid only
    nll: float = 0.0             # weight of the better response's token loss (RPO): keeps it likely
    pairs: str = "all"           # all, extreme (best against worst) or random (one per prompt)
    epochs: int = 1              # passes over the rankings
    lr: float = 3e-4             # peak, cosine to a tenth; 3e-4 below 1M parameters, 5e-7 at 7B
    batch_prompts: int = 16      # prompts per step on average, each with all its responses
    grad_accum: int = 1          # compute each batch in so many parts: less memory, a third slower
    eval_every: int = 50         # steps between evaluations
    max_new_tokens: int = 64     # longest response when samples are drawn
    gold: str = "data.village:gold"   # module:function that grades (task, response), for reports
    save_every: int = 200        # steps between saves of the training state; 0: on Ctrl-C only


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1,
             label_smoothing=0.0, kind="sigmoid"):
    """DPO's loss from the log-probs of whole responses, each (B,), in nats.

    Returns (mean loss, rewards of the chosen (B,), of the rejected (B,)), where a reward is
    beta * (log pi - log pi_ref), detached. Raises ValueError for another kind.

    kind "sigmoid" is DPO (2305.18290, eq. 7). With label_smoothing e it is cDPO,
    -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h), with h the difference of the log-ratios.
    kind "ipo" is (h - 1/(2 beta))^2 (2310.12036, eq. 17) on sums of log-probs, as in its paper;
    TRL divides by the lengths first, which changes the meaning of beta.
    """
    chosen = policy_chosen - ref_chosen                                       # (B,)
    rejected = policy_rejected - ref_rejected
    h = chosen - rejected
    if kind == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif kind == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h)
        losses = losses - label_smoothing * F.logsigmoid(-beta * h)
    else:
        raise ValueError(f"kind {kind!r}: choose sigmoid or ipo")
    return losses.mean(), beta * chosen.detach(), beta * rejected.detach()


def response_logprobs(model, ids, mask, parts=1):
    """log pi(y|x) of whole responses: ids, mask (B, T) -> (B,), fp32; the mask is 1 on y."""
    return gpt.token_logprobs(model, ids, mask=mask[:, 1:], parts=parts).sum(1)


def flatten(comparisons, how, rng):
    """Put all responses into one list -> ([sft.Example], pairs of indices per prompt)."""
    examples, pairs = [], []
    for c in comparisons:
        chosen = choose_pairs(c.record["responses"], c.record["ranks"], how, rng)
        if not chosen:
            continue
        first = len(examples)
        pairs.append([(first + i, first + j) for i, j in chosen])
        for ids in c.rows:
            mask = (torch.arange(len(ids)) >= c.start).long()
            examples.append(sft.Example(ids, mask))
    if not pairs:
        raise UserError("no prompt has two different responses of different rank")
    return examples, pairs


def pair_logprobs(model, examples, pairs, parts=1):
    """log pi of the better and worse response of P pairs -> (2, P), each computed only once."""
    used = sorted({i for pair in pairs for i in pair})
    row = {i: n for n, i in enumerate(used)}
    ids, mask = sft.collate(examples, used, model.wte.weight.device)          # (N, T) each
    index = torch.tensor([[row[i], row[j]] for i, j in pairs]).T              # (2, P)
    return response_logprobs(model, ids, mask, parts)[index]


@torch.no_grad()
def all_logprobs(model, examples, batch=64):
    """log pi of every response -> (N,) on the CPU. Similar lengths share a batch."""
    result = torch.zeros(len(examples))
    for rows in sorted_batches([len(e.ids) for e in examples], batch):
        ids, mask = sft.collate(examples, rows, model.wte.weight.device)      # (b, T) each
        result[rows] = response_logprobs(model, ids, mask).cpu()
    return result


def held_out(policy, examples, pairs, ref, cfg):
    """Return the metrics of validation pairs. ref: the reference's log-probs (N,)."""
    index = torch.tensor(pairs).T                                             # (2, P)
    logprobs = all_logprobs(policy, examples)[index]
    result = dpo_loss(*logprobs, *ref[index], cfg.beta, cfg.label_smoothing, cfg.loss)
    row = dpo_metrics(logprobs, ref[index], *result)
    return {f"eval_{k}": v for k, v in row.items()}


def sampled(policy, reference, enc, records, gold, cfg):
    """Return KL to the reference (nats per response), length and gold of samples of the policy."""
    if not records:
        return {}
    prompts = [r["ids"] for r in records]
    responses = gpt.generate(policy, prompts, cfg.max_new_tokens, stop=end_of(enc), seed=cfg.seed)
    examples = [sft.response_example(p, r) for p, r in zip(prompts, responses)]
    kl = all_logprobs(policy, examples) - all_logprobs(reference, examples)   # (N,)
    row = {"samples/kl": kl.mean().item(),
           "samples/length": sum(map(len, responses)) / len(responses)}
    if gold:
        texts = [sft.decode_response(ids, enc) for ids in responses]
        row["samples/gold"] = mean_grade(gold, records, texts)
    return row


def check(cfg):
    require(cfg, 1, "epochs", "batch_prompts", "grad_accum", "eval_every", "max_new_tokens")
    require(cfg, 1e-6, "beta")
    require(cfg, 0, "nll")
    require(cfg, 0, "lr", most=10)
    require(cfg, 0, "label_smoothing", most=0.49)
    choose(cfg, "loss", "sigmoid", "ipo")
    choose(cfg, "pairs", "all", "extreme", "random")
    if cfg.loss == "ipo" and cfg.label_smoothing:
        raise UserError("--label-smoothing with --loss ipo: only the sigmoid loss uses it")
    check_name(cfg, "gpt", "sft", "reward", "ppo")


def main(cfg):
    check(cfg)
    device = pick_device(cfg.device)
    out = run_folder(cfg.out)
    ensure_stage(out / "sft.pt", sft, cfg)
    set_seed(cfg.seed)
    policy, enc, base = gpt.load_model(out / "sft.pt", device)
    reference = gpt.load_model(out / "sft.pt", device)[0].requires_grad_(False)
    block_size = policy.config.block_size
    hint = "" if cfg.data else f"; next: python evaluate.py --out {out}"
    train, val = reward.ranked_data(cfg, out, enc, block_size)
    rng = random.Random(cfg.seed)
    examples, pairs = flatten(train, cfg.pairs, rng)
    val_examples, val_pairs = flatten(val, "all", rng)
    val_pairs = [pair for of_prompt in val_pairs for pair in of_prompt]
    shown = sft.fit_prompts([c.record for c in val], enc, block_size - 1)[:256]
    gold = load_grader(cfg.gold, shown)
    ref = all_logprobs(reference, examples)   # (N,), once: the reference never changes
    val_ref = all_logprobs(reference, val_examples)
    n_tokens = torch.tensor([e.mask.sum() for e in examples])                 # (N,)
    used = [{i for pair in of_prompt for i in pair} for of_prompt in pairs]
    sizes = [len(u) * max(len(examples[i].ids) for i in u) for u in used]
    plan = reward.batch_plan(sizes, cfg, rng)
    print(f"dpo.py: {len(pairs):,} prompts, {sum(map(len, used)):,} responses, "
          f"{sum(map(len, pairs)):,} pairs, {len(plan)} steps, device {device}")
    optimizer = adamw(policy, cfg.lr)
    table = []   # one row per evaluation
    run = Run(cfg, cfg.name, [out / "sft.pt", cfg.data, cfg.val], policy=policy,
              optimizer=optimizer, table=table)

    def evaluate(step):
        row = dict(step=step) | held_out(policy, val_examples, val_pairs, val_ref, cfg)
        table.append(row | sampled(policy, reference, enc, shown, gold, cfg))
        run.log(**table[-1])

    if not run.resumed:
        evaluate(0)
    for step in run.steps(len(plan)):
        batch = [pair for i in shard(plan[step]) for pair in pairs[i]]
        index = torch.tensor(batch).T                                         # (2, P)
        # No autocast, and no dropout: either would blur the difference of two nearly equal models.
        logprobs = pair_logprobs(policy, examples, batch, parts=cfg.grad_accum)   # (2, P)
        ref_logprobs = ref[index].to(device)
        loss, chosen, rejected = dpo_loss(*logprobs, *ref_logprobs, cfg.beta, cfg.label_smoothing,
                                          cfg.loss)
        loss = global_mean(loss, len(batch))
        row = dpo_metrics(logprobs, ref_logprobs, loss, chosen, rejected)
        if cfg.nll:
            nll = global_mean(-(logprobs[0] / n_tokens[index[0]].to(device)).mean(), len(batch))
            loss = loss + cfg.nll * nll
            row["nll_loss"] = nll.item()
        lr = lr_at(step, len(plan), cfg.lr)
        row["grad_norm"] = run.take_step(loss, optimizer, policy, lr, plan[step])
        run.log(step=step, **row)
        run.bar.set_postfix(loss=f"{row['loss']:.3f}", margin=f"{row['rewards/margins']:.2f}")
        if (step + 1) % cfg.eval_every == 0 or step + 1 == len(plan):
            evaluate(step + 1)
    gpt.save_model(out / f"{cfg.name}.pt", policy, enc, base["tokenizer"], seed=cfg.seed,
                   beta=cfg.beta)
    run.finish()
    print(format_table(table, DPO_COLUMNS))
    chats = [r["prompt"] for r in shown[:4]]
    before = sft.sample_responses(reference, enc, chats, cfg.max_new_tokens, seed=cfg.seed)
    after = sft.sample_responses(policy, enc, chats, cfg.max_new_tokens, seed=cfg.seed)
    print_samples(chats, before, after)
    print(f"---\nsaved {out / cfg.name}.pt{hint}")


if __name__ == "__main__":
    start(main, Config, __doc__, distributed=True)
