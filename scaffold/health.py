"""What PPO and DPO log, under TRL's names, and what a healthy PPO update looks like."""
import sys
from statistics import variance

from scaffold.distributed import rank


def masked_mean(x, mask):
    """Mean of x over the mask, both (B, T-1); 0 for an empty mask."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def ppo_metrics(b, returns, stats, beta, lr, update):
    """Return one row of PPO's log. KL: nats per response.

    With --offline the responses are samples of the reference. Then objective/kl is -KL(ref || pi),
    and the KL terms of non_score_reward and rlhf_reward have the wrong sign. lab/doctor.py lists
    where TRL's metrics of these names differ.
    """
    mask = b.mask
    n = len(b.scores)
    kl = ((b.logprobs - b.ref_logprobs) * mask).sum(1)                        # (B,)
    mean = {k: sum(s[k] for s in stats) / len(stats) for k in stats[0]}
    ratios = [s["ratio"] for s in stats]   # one per step of this update
    error = masked_mean((returns - b.values) ** 2, mask)
    spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return {
        "update": update,
        "episode": (update + 1) * n,
        "lr": lr,
        "objective/beta": beta,
        "objective/kl": kl.mean().item(),
        "objective/scores": b.scores.mean().item(),
        "objective/scores_std": b.scores.std().item(),
        "objective/non_score_reward": -beta * kl.mean().item(),
        "objective/rlhf_reward": (b.scores - beta * kl).mean().item(),
        "objective/entropy": -(b.logprobs * mask).sum(1).mean().item(),
        "objective/length": mask.sum(1).mean().item(),
        "val/num_eos_tokens": b.ended.sum().item(),
        "loss/policy_avg": mean["pg"],
        "loss/value_avg": mean["vf"],
        "policy/approxkl_avg": mean["approxkl"],
        "policy/clipfrac_avg": mean["clipfrac"],
        "policy/entropy_avg": -masked_mean(b.logprobs, mask).item(),
        "policy/grad_norm": mean["norm"],
        "val/clipfrac_avg": mean["vclip"],
        "val/ratio": mean["ratio"],
        "val/ratio_var": variance(ratios) if len(ratios) > 1 else 0.0,
        "val/ratio_first": stats[0]["ratio"],
        "val/explained_variance": (1 - error / spread.clamp(min=1e-8)).item()}


def dpo_metrics(policy, ref, loss, chosen, rejected):
    """Return one row of DPO's log. policy, ref: log-probs (2, P), better and worse.

    drift is how far the log-probs moved from the reference, in nats. The loss depends only on the
    difference of the two, so usually both fall, the worse one faster. Watch drift/chosen.
    """
    logps = policy.detach().mean(1).tolist()
    drift = (policy - ref).detach().mean(1).tolist()
    return {"loss": loss.item(),
            "rewards/chosen": chosen.mean().item(),
            "rewards/rejected": rejected.mean().item(),
            "rewards/margins": (chosen - rejected).mean().item(),
            "rewards/accuracies": (chosen > rejected).float().mean().item(),
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
            "drift/chosen": drift[0],
            "drift/rejected": drift[1]}


DPO_COLUMNS = {"step": ("step", "d"),
               "held-out loss": ("eval_loss", ".3f"),
               "accuracy": ("eval_rewards/accuracies", ".3f"),
               "margin": ("eval_rewards/margins", ".3f"),
               "drift chosen": ("eval_drift/chosen", ".3f"),
               "drift rejected": ("eval_drift/rejected", ".3f"),
               "samples' KL": ("samples/kl", ".3f"),
               "length": ("samples/length", ".3f"),
               "gold": ("samples/gold", ".3f")}


def warnings(row, first_entropy, cfg):
    """Return the problems of an update -> {name: one line with the likely cause}.

    row: the metrics of the update; first_entropy: the entropy of update 0, in nats per token.
    """
    ratio = row["val/ratio_first"]
    kl = row["objective/kl"]
    entropy = row["objective/entropy"] / max(1, row["objective/length"])
    clipped = row["policy/clipfrac_avg"]
    explained = row["val/explained_variance"]
    std = row["objective/scores_std"]
    found = {}
    if abs(ratio - 1) > 0.01 and not cfg.offline:
        found["ratio"] = (f"the ratio is {ratio:.3f} before the first step and should be 1: "
                          f"dropout, another temperature, or log-probs shifted against the mask")
    if kl < -0.5 and not cfg.offline:
        found["kl below 0"] = (f"KL to the reference is {kl:.1f} and cannot be negative: the "
                               f"responses are not samples of the policy at temperature 1, or the "
                               f"mask is off")
    if kl > max(20, 4 * cfg.target_kl):
        found["kl"] = (f"KL to the reference is {kl:.0f} nats, too far for the reward model to be "
                       f"reliable: raise --beta, or lower --lr")
    if entropy < 0.2 * first_entropy:
        found["entropy"] = (f"entropy fell from {first_entropy:.3f} to {entropy:.3f} nats per "
                            f"token: the policy collapses to one response; raise --beta, or "
                            f"lower --lr")
    if clipped > 0.3:
        found["clip"] = (f"{clipped:.0%} of the ratios are clipped: "
                         f"lower --lr, or use fewer --epochs")
    if explained < 0 and row["update"] >= max(5, cfg.value_warmup):   # a new critic needs time
        found["value"] = (f"explained variance is {explained:.2f}: the values are worse than a "
                          f"constant; try a longer --value-warmup, a lower --lr, or a larger "
                          f"--value-clip")
    if row["val/num_eos_tokens"] == 0:
        found["length"] = (f"no response ended within {cfg.max_new_tokens} tokens: "
                           f"raise --max-new-tokens, or train sft.py longer")
    if std < 0.05:
        found["scores"] = (f"all responses have the same score (std {std:.3f}): the reward model "
                           f"does not tell them apart, or the policy collapsed to one response")
    return found


def warn_once(run, row, state, cfg):
    """Print each warning the first time it occurs, and update the progress bar.

    state: a dict that keeps the first entropy and {warning: update}.
    """
    entropy = row["objective/entropy"] / row["objective/length"]
    first_entropy = state.setdefault("first_entropy", entropy)
    for name, line in warnings(row, first_entropy, cfg).items():
        if name not in state["warned"]:
            state["warned"][name] = row["update"]
            if rank() == 0:
                run.bar.write(f"warning, update {row['update']}: {line}", file=sys.stderr)
    shown = {k: row.get(f"objective/{k}") for k in ("scores", "gold", "kl")}
    run.bar.set_postfix({k: f"{v:.2f}" for k, v in shown.items() if v is not None})
