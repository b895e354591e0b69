"""DPO: improve the fine-tuned model on ranked answers directly, without a reward model and without sampling.

Idea. What PPO looks for has a closed form, pi*(y|x) = pi_ref(y|x) * exp( r(x, y) / beta ) / Z(x). Solve it for the reward:

    r(x, y) = beta * log( pi*(y|x) / pi_ref(y|x) ) + beta * log Z(x)                                DPO (2305.18290), eq. 5

So every policy is the optimum of some reward, which it holds implicitly. Put that reward into the reward model's loss: Z(x) is
the same for both answers to a prompt, cancels, and what is left trains the policy as if it were a reward model:

    loss = -log sigmoid( beta * [ log pi(w|x)/pi_ref(w|x) - log pi(l|x)/pi_ref(l|x) ] )             eq. 7; w better than l

log pi(y|x) is the sum over the answer's tokens and its end token. The reference is the fine-tuned model, frozen, so what it
says of the answers is computed once. The K answers of a prompt stay in one batch, as in reward.py: one pass per answer,
whatever the number of pairs it takes part in. Ties, and pairs of the same text, teach nothing and are left out.

    python dpo.py                                          on the same rankings as reward.py
    python dpo.py --data pairs.jsonl.gz --out out/mine     any format that reward.py reads
    python dpo.py --nll 0.2 --name dpo-nll                 variants: --loss ipo, --label-smoothing 0.1, --pairs extreme

A minute and a quarter on one CPU core. Needs OUT/sft.pt and trains it first when it is missing. Read next: eval.py, self_reward.py.
"""
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import gpt, reward, sft
from run import Run, UserError, announce, fair, once, share


@dataclass
class Config:
    data: str = ""
    "ranked answers, .json, .jsonl or .gz; empty: the village's, made from answers of OUT/sft.pt"
    val: str = ""
    "ranked answers for validation; empty: every twentieth user of the data, or every twentieth record"
    out: str = "out"
    "folder of this run"
    name: str = "dpo"
    "the checkpoint becomes OUT/NAME.pt: name your variants, and eval.py shows them side by side"
    loss: str = "sigmoid"
    "sigmoid (the paper's) or ipo (a square: it aims at a margin instead of pushing for ever)"
    beta: float = 0.3
    "the price of leaving the reference: 0.1 (the paper's) moves further for the same rankings, and here gains less"
    label_smoothing: float = 0.0
    "the share of rankings taken to be the wrong way round (cDPO), below 0.5; sigmoid only"
    nll: float = 0.0
    "weight of the better answer's mean token loss beside DPO (RPO): keeps its log-probability from falling"
    pairs: str = "all"
    "all (that are not tied), extreme (best against worst) or random (one per prompt)"
    epochs: int = 1
    "passes over the rankings"
    lr: float = 3e-4
    "peak learning rate, cosine to a tenth; it shrinks with size: 3e-4 below 1M parameters, 5e-7 at 7B"
    batch_prompts: int = 16
    "prompts per step on average, each with all its answers"
    eval_every: int = 50
    "steps between two looks at the validation rankings, and at samples"
    max_new_tokens: int = 64
    "longest answer when samples are drawn"
    gold: str = "data.village:gold"
    "module:function that grades (task, answer), for reports only; used where records carry a task"
    save_every: int = 200
    "steps between two savings of all that --resume needs, in OUT/NAME.state; 0: on Ctrl-C alone"
    resume: bool = False
    "go on with what was stopped or killed in OUT, this stage or one before it, bit for bit"
    seed: int = 0
    "same seed, same machine, same run"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0, kind="sigmoid"):
    """Log-probabilities of whole answers, each (B,), in nats -> (mean loss, rewards of the chosen (B,), of the rejected (B,)).

    The rewards are beta * (log pi - log pi_ref), detached: for the log. kind "sigmoid" is DPO (2305.18290, eq. 7), with
    label_smoothing e its conservative form, -(1-e) log sigmoid(m) - e log sigmoid(-m): flat where the margin says "e of the
    rankings are wrong". kind "ipo" is (h - 1/(2 beta))^2 of the difference h = m / beta (2310.12036, eq. 17). Its paper has
    sums of log-probabilities, as here; TRL divides each by its answer's length first, which makes beta another number.
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)       # (B,)
    losses = {"sigmoid": -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h),
              "ipo": (h - 1 / (2 * beta)) ** 2}[kind]
    return losses.mean(), beta * (policy_chosen - ref_chosen).detach(), beta * (policy_rejected - ref_rejected).detach()


def answer_logprobs(model, ids, mask):
    """log pi(y|x) of whole answers: ids (B, T); mask (B, T), 1 on the answer's tokens and its end token -> (B,) fp32."""
    return (gpt.token_logprobs(model, ids) * mask[:, 1:]).sum(1)


def choose_pairs(answers, ranks, how, rng):
    """K answers (any objects), K ranks (1 is best) -> [(index of the better, of the worse)], without ties and equal answers."""
    pairs = [(i, j) for i, j in reward.pair_mask(torch.tensor([ranks]))[0].nonzero().tolist() if answers[i] != answers[j]]
    if how == "extreme" and pairs:
        widest = max(ranks[j] - ranks[i] for i, j in pairs)
        pairs = [(i, j) for i, j in pairs if ranks[j] - ranks[i] == widest]
    return pairs if how == "all" or not pairs else [rng.choice(pairs)]


def flatten(examples, how, rng):
    """reward.tokenize's examples -> answers [(ids, mask)] of all prompts, and per prompt its pairs of indices into them."""
    answers, pairs = [], []
    for rows, start, record in examples:
        found = choose_pairs(record["responses"], record["ranks"], how, rng)
        if found:
            pairs.append([(len(answers) + i, len(answers) + j) for i, j in found])
            answers += [(ids, (torch.arange(len(ids)) >= start).long()) for ids in rows]
    if not pairs:
        raise UserError("no prompt has two different answers of different rank: nothing to learn from")
    return answers, pairs


def pair_logprobs(model, answers, pairs):
    """-> (2, P): log pi of the better and of the worse answer of each pair. An answer in several pairs passes once."""
    used = sorted({i for pair in pairs for i in pair})
    row = {i: n for n, i in enumerate(used)}
    ids, mask = (t.to(model.wte.weight.device) for t in sft.collate(answers, used))               # (N, T) each
    return answer_logprobs(model, ids, mask)[torch.tensor([[row[i] for i in pair] for pair in pairs]).T]


@torch.no_grad()
def all_logprobs(model, answers, batch=64):
    """(N,) on the CPU: log pi of every answer; similar lengths share a batch."""
    result, order = torch.zeros(len(answers)), sorted(range(len(answers)), key=lambda i: len(answers[i][0]))
    for start in range(0, len(order), batch):
        rows = order[start:start + batch]
        ids, mask = (t.to(model.wte.weight.device) for t in sft.collate(answers, rows))           # (b, T) each
        result[rows] = answer_logprobs(model, ids, mask).cpu()
    return result


COLUMNS = [(" step", "step"), ("held-out loss", "eval_loss"), ("accuracy", "eval_rewards/accuracies"), ("margin", "eval_rewards/margins"),
           ("drift chosen", "eval_drift/chosen"), ("drift rejected", "eval_drift/rejected"), ("samples' KL", "samples/kl"),
           ("length", "samples/length"), (" gold", "samples/gold")]


def metrics(policy, ref, loss, chosen, rejected):
    """One row of the log in TRL's names; policy, ref (2, P). drift: how far the log-probabilities left the reference, in nats.

    The loss asks for a difference only. Mostly both fall, the worse answer's faster: watch drift/chosen, too.
    """
    (logps_chosen, logps_rejected), drift = policy.detach().mean(1).tolist(), (policy - ref).detach().mean(1).tolist()
    return {"loss": loss.item(), "rewards/chosen": chosen.mean().item(), "rewards/rejected": rejected.mean().item(),
            "rewards/margins": (chosen - rejected).mean().item(), "rewards/accuracies": (chosen > rejected).float().mean().item(),
            "logps/chosen": logps_chosen, "logps/rejected": logps_rejected, "drift/chosen": drift[0], "drift/rejected": drift[1]}


def held_out(policy, answers, pairs, ref, cfg):
    """metrics of validation pairs (a flat list of indices into answers); ref (N,): what the reference says of all answers."""
    index = torch.tensor(pairs).T                                                                 # (2, P)
    logprobs = all_logprobs(policy, answers)[index]
    row = metrics(logprobs, ref[index], *dpo_loss(*logprobs, *ref[index], cfg.beta, cfg.label_smoothing, cfg.loss))
    return {"eval_" + k: v for k, v in row.items()}


def sampled(policy, reference, enc, records, gold, cfg):
    """What samples of the policy show: KL to the reference in nats per answer, length, and the mean gold grade where there is one."""
    if not records:
        return {}
    prompts, end = [sft.render_prompt(r["prompt"], enc) for r in records], gpt.end_of(enc)
    said = gpt.generate(policy, prompts, cfg.max_new_tokens, stop=end, seed=cfg.seed)
    answers = [(torch.tensor(p + a), torch.tensor([0] * len(p) + [1] * len(a))) for p, a in zip(prompts, said)]
    row = {"samples/kl": (all_logprobs(policy, answers) - all_logprobs(reference, answers)).mean().item(),
           "samples/length": sum(map(len, said)) / len(said)}
    if gold:
        texts = [enc.decode([i for i in a if i != end]) for a in said]
        row["samples/gold"] = sum(gold(r["task"], t) for r, t in zip(records, texts)) / len(texts)
    return row


def main(cfg):
    gpt.require(cfg, 1, "epochs", "batch_prompts", "eval_every", "max_new_tokens")
    gpt.require(cfg, 1e-6, "beta")
    gpt.require(cfg, 0, "nll")
    gpt.require(cfg, 0, "lr", most=10)
    gpt.require(cfg, 0, "label_smoothing", most=0.49)
    for flag, value, choices in (("loss", cfg.loss, ("sigmoid", "ipo")), ("pairs", cfg.pairs, ("all", "extreme", "random"))):
        if value not in choices:
            raise UserError(f"--{flag} {value}: choose {', '.join(choices[:-1])} or {choices[-1]}")
    if cfg.loss == "ipo" and cfg.label_smoothing:
        raise UserError("--label-smoothing with --loss ipo: only the sigmoid loss has it; leave one out")
    if cfg.name in ("gpt", "sft", "reward", "ppo") or "/" in cfg.name:
        raise UserError(f"--name {cfg.name}: that is another stage's checkpoint; choose another")
    device, out = gpt.pick_device(cfg.device), gpt.run_folder(cfg.out)
    if not (out / "sft.pt").exists():
        announce(out / "sft.pt", "fine-tuning it", cfg.resume)
        sft.main(sft.Config(out=cfg.out, seed=cfg.seed, device=cfg.device, resume=cfg.resume))
    gpt.set_seed(cfg.seed)
    policy, enc, base = gpt.load_model(out / "sft.pt", device)
    reference = gpt.load_model(out / "sft.pt", device)[0].requires_grad_(False)
    own = bool(cfg.data)
    if not own:
        from data import labelers
        cfg.data, val_file = once(lambda: labelers.ensure(out, cfg.seed, cfg.device))
        cfg.val = cfg.val or val_file
    train = reward.load_comparisons(cfg.data)
    train, val = (train, reward.load_comparisons(cfg.val)) if cfg.val else sft.split_by_user(train, seed=cfg.seed)
    block, rng = policy.config.block_size, random.Random(cfg.seed)
    answers, pairs = flatten(reward.tokenize(train, enc, block), cfg.pairs, rng)
    val_examples = reward.tokenize(val, enc, block)
    val_answers, val_pairs = flatten(val_examples, "all", rng)
    val_pairs = [p for per_prompt in val_pairs for p in per_prompt]
    shown = [e[2] for e in val_examples if len(sft.render_prompt(e[2]["prompt"], enc)) < block][:256]
    gold = sft.gold_hook(cfg.gold, shown)
    # The reference never changes: one look at every answer serves all epochs.
    ref, val_ref = all_logprobs(reference, answers), all_logprobs(reference, val_answers)         # (N,) each
    n_tokens = torch.tensor([mask.sum() for _, mask in answers])                                  # (N,)
    # Similar lengths share a batch, as in reward.py: half of the time would go into padding otherwise.
    used = [{i for pair in p for i in pair} for p in pairs]
    size = [len(u) * max(len(answers[i][0]) for i in u) for u in used]
    plan = [b for _ in range(cfg.epochs) for b in sft.batches(size, cfg.batch_prompts * sum(size) // len(size), rng)]
    print(f"dpo.py: {len(pairs):,} prompts, {sum(map(len, used)):,} answers, {sum(map(len, pairs)):,} pairs, {len(plan)} steps, "
          f"device {device}")
    look = lambda: held_out(policy, val_answers, val_pairs, val_ref, cfg) | sampled(policy, reference, enc, shown, gold, cfg)
    optimizer, table = gpt.adamw(policy, cfg.lr), []
    run = Run(cfg, cfg.name, [out / "sft.pt", cfg.data, cfg.val], policy=policy, optimizer=optimizer, table=table)
    if not run.resumed:
        table.append(dict(step=0) | look())
        run.log(**table[0])
    for step in run.steps(len(plan)):
        batch = [pair for i in share(plan[step]) for pair in pairs[i]]
        index = torch.tensor(batch).T                                                             # (2, P)
        # No autocast, and no dropout: either would blur the difference of two nearly equal models.
        logprobs, old = pair_logprobs(policy, answers, batch), ref[index].to(device)              # (2, P) each
        loss, chosen, rejected = dpo_loss(*logprobs, *old, cfg.beta, cfg.label_smoothing, cfg.loss)
        loss = fair(loss, len(batch))
        row = metrics(logprobs, old, loss, chosen, rejected)
        if cfg.nll:
            nll = fair(-(logprobs[0] / n_tokens[index[0]].to(device)).mean(), len(batch))
            loss, row["nll_loss"] = loss + cfg.nll * nll, nll.item()
        norm = run.take_step(loss, optimizer, policy, gpt.lr_at(step, len(plan), cfg.lr), f"prompts {plan[step]}, counted from 0")
        run.log(step=step, **row, grad_norm=norm)
        run.bar.set_postfix(loss=f"{row['loss']:.3f}", margin=f"{row['rewards/margins']:.2f}")
        if (step + 1) % cfg.eval_every == 0 or step + 1 == len(plan):
            table.append(dict(step=step + 1) | look())
            run.log(**table[-1])
    gpt.save_model(out / f"{cfg.name}.pt", policy, enc, base["tokenizer"], seed=cfg.seed, beta=cfg.beta)
    run.finish()
    columns = [(name, key) for name, key in COLUMNS if key in table[0]]
    print("  ".join(name for name, _ in columns))
    for row in table:
        print("  ".join(f"{row[key]:{len(name)}.{3 if isinstance(row[key], float) else 0}f}" for name, key in columns))
    chats = [r["prompt"] for r in shown[:4]]
    for chat, old, new in zip(chats, *(sft.reply(m, enc, chats, cfg.max_new_tokens, seed=cfg.seed) for m in (reference, policy))):
        print(f"--- {chat[-1]['content']!r}\nbefore: {old!r}\nafter:  {new!r}")
    print(f"---\nsaved {out / cfg.name}.pt" + ("" if own else f"; next: python eval.py --out {out}"))


if __name__ == "__main__":
    gpt.run(main, Config, __doc__, shared=True)
