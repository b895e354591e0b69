"""PPO: improve the fine-tuned model against the reward model, without running away from what it was.

Idea. Let the model answer, let the reward model score the answers, and make the tokens of the better ones more likely. Four
models take part:

    policy     starts as the fine-tuned model; the one that learns          (the actor)
    reference  the fine-tuned model, frozen; the policy pays for leaving it
    reward     scores a finished answer, frozen
    value      starts as the reward model; learns to foresee the score      (the critic)

    maximise  E[ r(x, y) - beta * log( pi(y|x) / pi_ref(y|x) ) ] + ptx * E_text[ log pi(text) ]     InstructGPT, eq. 2

One update: sample answers -> score them -> reward per token (KL penalty on each, the score on the last) -> advantages by
GAE (gae.py) -> a few epochs of clipped steps:

    ratio  = pi_new(a|s) / pi_old(a|s)
    loss   = -mean min( ratio * A, clip(ratio, 1-eps, 1+eps) * A )                                  PPO, eq. 7

    python ppo.py                                    everything: stages that are missing run first; ends with the table
    python ppo.py --beta 0 --name ppo-beta-0 --updates 150   no KL penalty: the reward rises, the gold score falls
    python ppo.py --prompts pairs.jsonl --out out/mine    prompts of your own: any format that sft.py or reward.py reads

Two minutes on two CPU cores once the other stages are there; seven minutes for the whole chain.

Frame. All quantities of a token are (B, T-1): index t belongs to the action that produced ids[:, t+1]. Its value is V of
the state before it, read at position t. The mask is 1 on answer tokens including the end token, and on nothing after it.
"""
import math, random, sys
from dataclasses import dataclass

import torch

import gae, gpt, reward, sft
from run import Run, UserError, announce, averaged, fair, gathered, rank, share, world


@dataclass
class Config:
    prompts: str = ""
    "prompts, .json, .jsonl or .gz: {'prompt'}, chats or ranked answers; empty: the village's, in OUT/data"
    text: str = ""
    "text for the ptx term: a file or a folder of *.txt; empty: the text that OUT/gpt.pt was trained on"
    out: str = "out"
    "folder of this run"
    name: str = "ppo"
    "the checkpoint becomes OUT/NAME.pt: name your variants, and eval.py shows them side by side"
    updates: int = 60
    "rollouts, each followed by a few epochs of steps; stop when gold (or your own eyes) say so, not the reward"
    rollout: int = 128
    "answers per update; more is steadier"
    epochs: int = 4
    "passes over a rollout; the clip makes more than one safe, more than four rarely pays"
    minibatches: int = 2
    "steps per pass"
    warmup: int = 3
    "first updates in which only the value model learns: a reward model knows finished answers, not what half of one promises"
    lr: float = 3e-4
    "learning rate of policy and value; it shrinks with size: 3e-4 below 1M parameters, 1e-5 at 100M, 1e-6 at 7B"
    beta: float = 0.1
    "KL coefficient, in units of reward (deviation 1): 0 lets the policy exploit the reward model, 0.5 nails it down"
    target_kl: float = 0.0
    "if above 0: adapt beta so that the KL to the reference stays near this many nats per answer (6 is usual)"
    stop_kl: float = 0.0
    "if above 0: leave the epochs of an update once new and old policy differ by this much per token (0.02 is usual)"
    clip: float = 0.2
    "how far the ratio of a token may move in one update"
    value_clip: float = 0.2
    "the same for values; fits rewards of deviation 1"
    gamma: float = 1.0
    "1: a word is no worth less for standing later"
    lam: float = 0.95
    "GAE's lambda: 1 trusts the final score alone, 0 trusts the critic alone"
    ptx: float = 0.5
    "weight of next-token loss on the pretraining text; keeps the policy a language model. 0 switches it off"
    ptx_tokens: int = 256
    "tokens of that text per step"
    missing_end: float = -3.0
    "score of an answer without an end token, in deviations: the reward model has never seen one"
    max_new_tokens: int = 48
    "longest answer; what is longer counts as missing its end"
    offline: bool = False
    "sample every answer from the frozen fine-tuned model: the ratio alone carries the change; scores and KL then are of its samples"
    gold: str = "data.village:gold"
    "module:function that grades (task, answer), for reports only; used where records carry a task"
    table: bool = True
    "end with the results table of eval.py, where prompts carry a task"
    save_every: int = 5
    "updates between two savings of all that --resume needs, in OUT/NAME.state; 0: on Ctrl-C alone"
    resume: bool = False
    "go on with what was stopped or killed in OUT, this stage or one before it, bit for bit"
    seed: int = 0
    "same seed, same machine, same run"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


def masked_mean(x, mask):
    """Mean of x over the mask, both (B, T-1); 0 where the mask is empty."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def kl_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """Reward per token: -beta * (log pi - log pi_ref) on each, and the score of the whole answer added on the last.

    scores (B,); logprobs, ref_logprobs, mask (B, T-1) -> (B, T-1), zero outside the mask. A row without any answer
    token gets no score. The plain log-ratio (k1), not k3: both are the KL in expectation, but only k1's policy gradient is
    the KL's. -k3 is never positive: it charges a token that has become too rare, where -k1 pays it to come back.
    """
    mask = mask.bool()
    rewards = torch.where(mask, -beta * (logprobs - ref_logprobs), 0.0)       # (B, T-1)
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = mask & (steps == torch.where(mask, steps, -1).amax(1, keepdim=True))
    return rewards + torch.where(last, scores[:, None], 0.0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """PPO's clipped surrogate (1707.06347, eq. 7), mean over the masked tokens of the batch -> (loss, clip fraction).

    All (B, T-1). The maximum of two losses is the minimum of two gains: a step that already went far in the good
    direction earns nothing more, one that went far in the bad direction still pays in full.
    """
    mask = mask.float()
    ratio = torch.exp(torch.where(mask > 0, logprobs - old_logprobs, 0.0))    # (B, T-1)
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.maximum(unclipped, clipped), mask), masked_mean((clipped > unclipped).float(), mask).detach()


def value_loss(values, old_values, returns, mask, clip=0.2):
    """0.5 * mean of the larger of two squared errors: of the new value, and of the new value held near the old one.

    All (B, T-1) -> a scalar.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)           # (B, T-1)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask.float())


def adapt_beta(beta, kl, target, n, horizon=1_000):
    """Ziegler et al.'s controller: n answers whose mean KL is above target raise beta, below lower it, by at most 20% * n / horizon.

    Their horizon is 10,000 answers, for runs of a million; ours have about 8,000. More answers than the horizon count as many as
    it: beta must not turn negative.
    """
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * min(1.0, n / horizon))


def answer_mask(prompt_lengths, lengths, T):
    """(B,), (B,) -> (B, T-1): 1 where the action that produced ids[:, t+1] belongs to the answer, its end included."""
    target = torch.arange(1, T, device=lengths.device)
    return ((target >= prompt_lengths[:, None]) & (target < lengths[:, None])).float()


def load_prompts(path, enc, block_size, max_new_tokens):
    """Prompts of any format -> [{"prompt": messages, "ids", ...}]; those that leave no room for an answer are counted, aloud."""
    kept, long, odd, rng = [], 0, 0, random.Random(0)
    for where, r in sft.read_records(path):
        if "prompt" in r:
            messages = reward.as_messages(r["prompt"], where)
        elif "chosen" in r:
            found = reward.read_comparison(r, where)
            messages = found and found[0]
        else:
            # The answer is not used, so an empty one will do; as_chat, which is about answers, gets a stand-in.
            empty = not str(r.get("output", "-") or "").strip()
            chat = r["messages"] if "messages" in r else sft.as_chat({**r, "output": "-"} if empty else r, where, rng)
            asked = chat and sft.check_messages(chat, where)[-1]["role"] == "user"
            messages = chat if asked else chat and sft.prompt_of(chat)
        if not messages:   # no answer to tell the prompt from, or an answer to nothing
            odd += 1
            continue
        ids = sft.render_prompt(messages, enc)
        if len(ids) + max_new_tokens > block_size:
            long += 1
        else:
            kept.append({**r, "prompt": messages, "ids": ids})
    for n, why in ((long, f"prompt and {max_new_tokens} new tokens exceed the context of {block_size}"),
                   (odd, "no prompt could be told from the answer")):
        if n:
            print(f"{path}: {n} of {len(kept) + long + odd} prompts left out: {why}")
    if not kept:
        raise UserError(f"{path}: no usable prompt; lower --max-new-tokens, or pretrain with a larger --block-size")
    return kept


@torch.no_grad()
def roll_out(sampler, policy, reference, reward_model, value_model, prompts, end, cfg, seed):
    """Sample an answer to each prompt and measure it. -> dict: ids (B, T); mask, logprobs, ref_logprobs, old_logprobs and values
    (B, T-1); scores, lengths and ended (B,); answers, a list of id lists."""
    device = policy.wte.weight.device
    # Several processes sample a part each, by seeds of their own; after that all of them know all the answers.
    mine = gpt.generate(sampler, share(prompts), cfg.max_new_tokens, stop=end, seed=seed + rank())
    answers = gathered(mine, cfg.max_new_tokens, device)
    # Right padding, no masks: nothing to the right of a real token can reach it.
    ids = gpt.pad([torch.tensor(p + a) for p, a in zip(prompts, answers)]).to(device)            # (B, T)
    starts = torch.tensor([len(p) for p in prompts], device=device)
    lengths = starts + torch.tensor([len(a) for a in answers], device=device)                    # (B,)
    mask = answer_mask(starts, lengths, ids.shape[1])
    logprobs, ref_logprobs = gpt.token_logprobs(policy, ids), gpt.token_logprobs(reference, ids)
    ended = torch.tensor([a[-1] == end for a in answers], device=device)
    # Temperature 1 and the same forward pass as in the loss: so the ratio of the first step is 1.
    return dict(ids=ids, mask=mask, lengths=lengths, answers=answers, ended=ended, logprobs=logprobs, ref_logprobs=ref_logprobs,
                old_logprobs=ref_logprobs if sampler is reference else logprobs, values=value_model(ids)[:, :-1],
                scores=torch.where(ended, reward_model.score(ids, lengths), cfg.missing_end))


def minibatch_losses(policy, value_model, b, advantages, returns, rows, cfg):
    """The two losses of a minibatch, and what the log wants to know of it. rows: indices into the rollout b."""
    T = int(b["lengths"][rows].max())
    ids = b["ids"][rows, :T]                                                                      # (b, T)
    mask, old, old_values = (b[k][rows, :T - 1] for k in ("mask", "old_logprobs", "values"))      # (b, T-1) each
    logprobs, values = gpt.token_logprobs(policy, ids), value_model(ids)[:, :-1]                  # (b, T-1) each
    pg_loss, clipfrac = policy_loss(logprobs, old, advantages[rows, :T - 1], mask, cfg.clip)
    vf_loss = value_loss(values, old_values, returns[rows, :T - 1], mask, cfg.value_clip)
    pg_loss, vf_loss = fair(pg_loss, mask.sum()), fair(vf_loss, mask.sum())
    log_ratio = (logprobs - old).detach() * mask
    return pg_loss, vf_loss, dict(
        pg=pg_loss.item(), vf=vf_loss.item(), clipfrac=clipfrac.item(), ratio=masked_mean(log_ratio.exp(), mask).item(),
        approxkl=0.5 * masked_mean(log_ratio ** 2, mask).item(),
        vclip=masked_mean(((values - old_values).abs() > cfg.value_clip).float(), mask).item())


def diagnostics(b, returns, stats, beta, lr, update):
    """One row of the log, in TRL's names. KL is the mean over answers of the sum over their tokens, in nats.

    Under --offline the answers are the reference's: then objective/kl is minus KL(ref || pi), below 0, and what is computed of
    it (non_score_reward, rlhf_reward) has the wrong sign, too.
    """
    mask, n = b["mask"], len(b["scores"])
    kl = ((b["logprobs"] - b["ref_logprobs"]) * mask).sum(1)                                     # (B,)
    mean = {k: sum(s[k] for s in stats) / len(stats) for k in stats[0]}
    error = masked_mean((returns - b["values"]) ** 2, mask)
    spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return {
        "update": update, "episode": (update + 1) * n, "lr": lr, "objective/beta": beta, "objective/kl": kl.mean().item(),
        "objective/scores": b["scores"].mean().item(), "objective/scores_std": b["scores"].std().item(),
        "objective/non_score_reward": -beta * kl.mean().item(), "objective/rlhf_reward": (b["scores"] - beta * kl).mean().item(),
        "objective/entropy": -(b["logprobs"] * mask).sum(1).mean().item(), "objective/length": mask.sum(1).mean().item(),
        "val/num_eos_tokens": b["ended"].sum().item(), "loss/policy_avg": mean["pg"], "loss/value_avg": mean["vf"],
        "policy/approxkl_avg": mean["approxkl"], "policy/clipfrac_avg": mean["clipfrac"], "policy/grad_norm": mean["norm"],
        "val/clipfrac_avg": mean["vclip"], "val/ratio": mean["ratio"], "val/ratio_first": stats[0]["ratio"],
        "val/explained_variance": (1 - error / spread.clamp(min=1e-8)).item()}


def warnings(row, first_entropy, cfg):
    """All that is wrong with an update, by its row of the log -> {name: one line with the likely cause}.

    first_entropy: that of update 0, in nats per token.
    """
    ratio, kl, clipped = row["val/ratio_first"], row["objective/kl"], row["policy/clipfrac_avg"]
    explained, spread = row["val/explained_variance"], row["objective/scores_std"]
    entropy, found = row["objective/entropy"] / max(1, row["objective/length"]), {}
    if abs(ratio - 1) > 0.01 and not cfg.offline:
        found["ratio"] = (f"the ratio is {ratio:.3f} before the first step, and should be 1: dropout, another temperature, "
                          f"or log-probabilities shifted against the mask")
    if kl < -0.5 and not cfg.offline:
        found["kl below 0"] = (f"KL to the reference is {kl:.1f}, and cannot be below 0: the answers are not samples of the "
                               f"policy at temperature 1, or the mask is off")
    if kl > max(20, 4 * cfg.target_kl):
        found["kl"] = f"KL to the reference has grown to {kl:.0f} nats, where the reward means little: raise --beta, or lower --lr"
    if entropy < 0.2 * first_entropy:
        found["entropy"] = (f"entropy fell to {entropy:.3f} nats per token, from {first_entropy:.3f}: the policy says one "
                                 f"thing only; raise --beta, or lower --lr")
    if clipped > 0.3:
        found["clip"] = f"{clipped:.0%} of the ratios are clipped: lower --lr, or fewer --epochs"
    if explained < 0 and row["update"] >= max(5, cfg.warmup):   # before, the critic has only begun
        found["value"] = (f"explained variance is {explained:.2f}: the values are worse than a constant; try a longer --warmup, "
                          f"a lower --lr, or a larger --value-clip")
    if row["val/num_eos_tokens"] == 0:
        found["length"] = (f"no answer came to its end within {cfg.max_new_tokens} tokens: raise --max-new-tokens, or train "
                           f"sft.py longer")
    if spread < 0.05:
        found["scores"] = (f"all answers have the same score (deviation {spread:.3f}): the reward model does not tell them "
                           f"apart, or the policy says one thing only")
    return found


def main(cfg):
    gpt.require(cfg, 1, "updates", "epochs", "minibatches", "max_new_tokens")
    gpt.require(cfg, 2, "rollout")
    gpt.require(cfg, 0, "gamma", "lam", "clip", most=1)
    gpt.require(cfg, 0, "beta", "ptx", "target_kl", "stop_kl", "value_clip", "lr", "warmup")
    if cfg.offline and cfg.target_kl:
        raise UserError("--offline with --target-kl: samples of the frozen model say nothing of the policy's KL; leave one out")
    if cfg.target_kl and not cfg.beta:
        raise UserError("--beta 0 with --target-kl: beta is adapted by factors, and 0 stays 0; start from --beta 0.1")
    if cfg.warmup >= cfg.updates:
        raise UserError(f"--warmup {cfg.warmup} with --updates {cfg.updates}: no update is left to train the policy")
    if cfg.minibatches > cfg.rollout:
        raise UserError(f"--minibatches {cfg.minibatches}: a rollout of {cfg.rollout} answers has not so many parts")
    if cfg.rollout % world():
        raise UserError(f"--rollout {cfg.rollout}: {world()} processes cannot share it evenly")
    if cfg.name in ("gpt", "sft", "reward", "dpo") or "/" in cfg.name:
        raise UserError(f"--name {cfg.name}: that is another stage's checkpoint; choose another")
    device, out = gpt.pick_device(cfg.device), gpt.run_folder(cfg.out)
    if not (out / "reward.pt").exists():
        announce(out / "reward.pt", "training it", cfg.resume)
        reward.main(reward.Config(out=cfg.out, seed=cfg.seed, device=cfg.device, resume=cfg.resume))
    gpt.set_seed(cfg.seed)
    policy, enc, base = gpt.load_model(out / "sft.pt", device)
    reference = gpt.load_model(out / "sft.pt", device)[0].requires_grad_(False)
    reward_model, reward_enc = reward.load_reward(out / "reward.pt", device)
    value_model = reward.load_reward(out / "reward.pt", device)[0]
    reward_model.requires_grad_(False)
    if gpt.fingerprint(enc) != gpt.fingerprint(reward_enc):
        raise UserError(f"{out}: sft.pt and reward.pt use different tokenizers; train the reward model again")
    end, block = gpt.end_of(enc), policy.config.block_size
    own, unseen = bool(cfg.prompts), ""
    if not own:
        folder = sft.village_data(out, cfg.seed)
        cfg.prompts, unseen = str(folder / "prompts_train.jsonl"), str(folder / "prompts_val.jsonl")
    prompts = load_prompts(cfg.prompts, enc, block, cfg.max_new_tokens)
    gold = sft.gold_hook(cfg.gold, prompts)
    text = gpt.corpus_of(out / "gpt.pt", enc, block, cfg.text) if cfg.ptx else None
    odds = gpt.document_odds(text, block) if text else None
    policy_optimizer, value_optimizer = gpt.adamw(policy, cfg.lr), gpt.adamw(value_model, cfg.lr)
    rng, order, control, warned = random.Random(cfg.seed), [], {"beta": cfg.beta}, {}   # warned: warning -> the update that gave it
    run = Run(cfg, cfg.name, [out / "sft.pt", out / "reward.pt", cfg.prompts], policy=policy, value=value_model,
              policy_optimizer=policy_optimizer, value_optimizer=value_optimizer, rng=rng, order=order, control=control, warned=warned)
    print(f"ppo.py: {len(prompts):,} prompts, {cfg.updates} updates of {cfg.rollout} answers, device {device}")
    for update in run.steps(cfg.updates):
        if len(order) < cfg.rollout:   # a new pass over the prompts
            order[:] = rng.sample(range(len(prompts)), len(prompts)) * math.ceil(cfg.rollout / len(prompts))
        chosen, order[:] = [prompts[i] for i in order[:cfg.rollout]], order[cfg.rollout:]
        b = roll_out(reference if cfg.offline else policy, policy, reference, reward_model, value_model,
                     [p["ids"] for p in chosen], end, cfg, seed=rng.randrange(2**31))
        rewards = kl_rewards(b["scores"], b["logprobs"], b["ref_logprobs"], b["mask"], control["beta"])   # (B, T-1)
        advantages, returns = gae.gae(rewards, b["values"], b["mask"], cfg.gamma, cfg.lam)
        advantages = gae.whiten(advantages, b["mask"])                                            # after the returns
        lr, stats = gpt.lr_at(update, cfg.updates, cfg.lr, "linear"), []
        what = f"answers to {chosen[0]['prompt'][-1]['content'][:60]!r} and others"
        orders = [torch.tensor(rng.sample(range(len(chosen)), len(chosen)), device=device) for _ in range(cfg.epochs)]
        for rows in [part for o in orders for part in o.tensor_split(cfg.minibatches)]:   # flat: one break leaves all the epochs
            # No autocast here: bf16 would blur the ratio of two nearly equal policies.
            loss, vf_loss, stat = minibatch_losses(policy, value_model, b, advantages, returns, share(rows), cfg)
            stat = averaged(stat)
            if cfg.stop_kl and stats and stat["approxkl"] > cfg.stop_kl:
                break   # before the step: the policy has gone far enough already
            if text and update >= cfg.warmup:
                texts = share(gpt.draw_documents(text, odds, cfg.ptx_tokens, block, rng)[0])
                lm_loss = gpt.lm_loss(policy, *(t.to(device) for t in gpt.pack(texts, block)))
                loss = loss + cfg.ptx * fair(lm_loss, sum(map(len, texts)) - len(texts))
            stat["norm"] = run.take_step(loss, policy_optimizer, policy, lr, what) if update >= cfg.warmup else 0.0
            run.take_step(vf_loss, value_optimizer, value_model, lr, what)
            stats.append(stat)
        row = diagnostics(b, returns, stats, control["beta"], lr, update)
        if gold:
            texts = [enc.decode([i for i in a if i != end]) for a in b["answers"]]
            row["objective/gold"] = sum(gold(p["task"], t) for p, t in zip(chosen, texts)) / len(chosen)
        if cfg.target_kl and update > cfg.warmup:   # before, the policy that was sampled had not learned: its KL was 0
            control["beta"] = adapt_beta(control["beta"], row["objective/kl"], cfg.target_kl, len(chosen))
        run.log(**row)
        first_entropy = control.setdefault("first_entropy", row["objective/entropy"] / row["objective/length"])
        for name, line in warnings(row, first_entropy, cfg).items():
            if name not in warned:
                warned[name] = update
                if rank() == 0:
                    run.bar.write(f"warning, update {update}: {line}", file=sys.stderr)
        run.bar.set_postfix({k: f"{row['objective/' + k]:.2f}" for k in ("scores", "gold", "kl") if "objective/" + k in row})
    gpt.save_model(out / f"{cfg.name}.pt", policy, enc, base["tokenizer"], seed=cfg.seed, beta=cfg.beta)
    run.finish()
    shown = [p["prompt"] for p in (load_prompts(unseen, enc, block, cfg.max_new_tokens) if unseen else prompts)[:4]]
    for chat, old, new in zip(shown, *(sft.reply(m, enc, shown, cfg.max_new_tokens, seed=cfg.seed) for m in (reference, policy))):
        print(f"--- {chat[-1]['content']!r}\nbefore: {old!r}\nafter:  {new!r}")
    print(f"---\nsaved {out / cfg.name}.pt" + (f"; next: python eval.py --out {out}" if gold and not own and not cfg.table else ""))
    if cfg.table and gold and not own:
        import eval as results   # eval.py reads every checkpoint, so it stands above this file; only the closing table needs it
        print("--- on prompts of users whom no stage has seen")
        results.main(results.Config(out=cfg.out, seed=cfg.seed, device=cfg.device))


if __name__ == "__main__":
    gpt.run(main, Config, __doc__, shared=True)
