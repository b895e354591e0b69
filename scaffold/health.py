"""What a PPO update logs, and what it should look like: the metrics and their warnings."""


def masked_mean(x, mask):
    """Mean of x over the mask, both (B, T-1); 0 for an empty mask."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def diagnostics(b, returns, stats, beta, lr, update):
    """Return one row of the log, under TRL's names. KL: nats per response.

    With --offline the responses are the reference's: objective/kl is minus KL(ref || pi), and what
    is computed from it (non_score_reward, rlhf_reward) has the wrong sign, too.
    """
    mask, n = b.mask, len(b.scores)
    kl = ((b.logprobs - b.ref_logprobs) * mask).sum(1)                        # (B,)
    mean = {k: sum(s[k] for s in stats) / len(stats) for k in stats[0]}
    error = masked_mean((returns - b.values) ** 2, mask)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
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
        "policy/grad_norm": mean["norm"],
        "val/clipfrac_avg": mean["vclip"],
        "val/ratio": mean["ratio"],
        "val/ratio_first": stats[0]["ratio"],
        "val/explained_variance": (1 - error / variance.clamp(min=1e-8)).item()}


def warnings(row, first_entropy, cfg):
    """Return what is wrong with an update -> {name: one line with the likely cause}.

    row: its diagnostics; first_entropy: that of update 0, in nats per token.
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
                       f"right: raise --beta, or lower --lr")
    if entropy < 0.2 * first_entropy:
        found["entropy"] = (f"entropy fell from {first_entropy:.3f} to {entropy:.3f} nats per "
                            f"token: the policy collapses to one response; raise --beta, or lower --lr")
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
