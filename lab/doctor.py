"""Doctor: read the log of a run, say what is wrong with it, and what to look at next.

It knows two kinds of signs. Those of an update are the warnings of scaffold/health.py: a ratio
other than 1 before the first step, a negative KL, a collapse. Those of a run are trends: a score
that falls, gold that does not follow the score, a KL that stays 0. Then it names the bugs of
tests/zoo.py that left the same signs when lab/break_it.py put them into this code
(results/atlas.jsonl). A log without signs is not proof: the atlas also has bugs that leave none.

    python lab/doctor.py out/ppo.jsonl              ours; those of sft, reward and dpo, too
    python lab/doctor.py trainer_state.json         what TRL's trainers save
    python lab/doctor.py metrics.jsonl              OpenRLHF's names, one JSON object per line

A metric that a log lacks gives no sign. The bounds are those of runs with this project's defaults;
a run with --offline, or with a large --target-kl, may be healthy beyond them.

Names are TRL's. These differ in meaning:

    objective/rlhf_reward       score - beta * KL in both; TRL's documentation writes "score minus
                                non_score_reward", but non_score_reward is already negative
    objective/entropy           nats per response; TRL before 1.12 counted padding, too
    policy/entropy_avg          nats per token. TRL: of the logits, in the update's steps, padding
                                included. Ours: mean -log p of the sampled tokens, before the update
    policy/approxkl_avg, val/ratio   TRL averages over padding, too, which dilutes both
    val/ratio_var               variance over the steps of an update of their mean ratio, in both
    val/num_eos_tokens          TRL counts tokens; ours counts responses with an end token
    loss/value_avg              half the squared error, in both
    logits/chosen, logits/rejected   TRL's DPO only. Adding a number to all logits changes no
                                probability, so their mean says nothing about the policy
    eps                         TRL only, episodes per second: with it, two equal runs would differ
    kl                          OpenRLHF's, nats per token; times response_length it is objective/kl
"""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, pstdev
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo
from scaffold.cli import BaseConfig, UserError, brief, start
from scaffold.health import warnings

ATLAS = Path(__file__).parent.parent / "results" / "atlas.jsonl"
# OpenRLHF's names; its kl is per token.
ALIASES = {"reward": "objective/scores", "response_length": "objective/length",
           "policy_loss": "loss/policy_avg", "critic_loss": "loss/value_avg",
           "ppo_clip_ratio": "policy/clipfrac_avg", "actor_grad_norm": "policy/grad_norm"}
MARKS = {"ppo": ("objective/scores", "policy/clipfrac_avg"),
         "dpo": ("rewards/margins", "eval_rewards/margins"),
         "training": ("loss", "train_loss", "accuracy")}   # metrics that tell the kind of a log
SHARE = 0.5   # of the signs of a log and a bug that must agree for the bug to be named


@dataclass
class Config(BaseConfig):
    logs: tuple = ()             # metrics files: JSON lines, or TRL's trainer_state.json
    bugs: int = 5                # name at most so many bugs with the same signs


class Sign(NamedTuple):
    name: str
    at: object    # update or step where it is seen first; None: a trend of the whole run
    line: str     # what is seen, and the likely cause


def read_log(path):
    """Return the rows of a log, dicts. Raises UserError for a file that is none."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text; name a log, such as out/ppo.jsonl") from None
    try:
        whole = json.loads(text)
        rows = whole.get("log_history", [whole]) if isinstance(whole, dict) else whole
    except (ValueError, RecursionError):
        rows = lines_of(path, text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected JSON objects, one a line, or TRL's trainer_state.json")
    return rows


def lines_of(path, text):
    """Parse JSON lines. The last one may be cut off: the run may still be writing it."""
    rows = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as e:
            if number == len(lines) > 1:
                break
            raise UserError(f"{path}:{number}: not a line of JSON ({brief(e)})") from None
    return rows


def renamed(row):
    """Return a row under TRL's names, without the prefix train/ that some loggers add."""
    row = {k.removeprefix("train/"): v for k, v in row.items()}
    if "kl" in row and "response_length" in row and number(row["kl"]) is not None:
        row["objective/kl"] = row["kl"] * row["response_length"]
    return row | {new: row[old] for old, new in ALIASES.items() if old in row}


def kind_of(rows):
    """Return ppo, dpo or training, the kind of a log; "" if no metric is known."""
    names = {name for row in rows for name in row}
    return next((kind for kind, marks in MARKS.items() if names & set(marks)), "")


def number(value):
    """Return a finite number as it is, anything else as None."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return value if real and math.isfinite(value) else None


def series(rows, key):
    """Return the finite values of a metric, in order."""
    return [row[key] for row in rows if number(row.get(key)) is not None]


def ends(rows, key):
    """Return the means of the first and the last quarter of a metric; None below 8 values."""
    values = series(rows, key)
    n = len(values) // 4
    return (mean(values[:n]), mean(values[-n:])) if n > 1 else None


def label(row, n):
    return row.get("update", row.get("step", n))


def entropy_per_token(row):
    """Return the entropy per token: of its own metric, else of the response by its length."""
    total = number(row.get("objective/entropy"))
    length = number(row.get("objective/length"))
    if total is not None and length:
        return total / length
    average = number(row.get("policy/entropy_avg"))
    return math.nan if average is None else average


def update_signs(rows):
    """Return the warnings of scaffold/health.py, each where it is first seen."""
    cfg = ppo.Config()
    needed = ("val/ratio_first", "objective/kl", "policy/clipfrac_avg", "val/explained_variance",
              "objective/scores_std", "val/num_eos_tokens")
    found = {}
    first_entropy = entropy_per_token(rows[0])
    for n, row in enumerate(rows):
        # A missing metric is NaN, and NaN is neither above nor below any bound.
        known = {k: math.nan if number(row.get(k)) is None else row[k] for k in needed}
        known |= {"update": n, "objective/entropy": entropy_per_token(row), "objective/length": 1}
        for name, line in warnings(known, first_entropy, cfg).items():
            found.setdefault(name, Sign(name, label(row, n), line))
    return list(found.values())


def not_finite(rows):
    """Find the first metric that is null, NaN or infinite although it was a number before."""
    seen = set()
    for n, row in enumerate(rows):
        for key, value in row.items():
            if number(value) is not None:
                seen.add(key)
            elif key in seen and not isinstance(value, str | list | dict | bool):
                return [Sign("not finite", label(row, n), f"{key} is not a number: the weights or "
                             f"the loss diverged; lower the learning rate")]
    return []


def score_signs(rows):
    """The score falls, or gold does while the score rises."""
    found = []
    score = ends(rows, "objective/scores")
    if score:
        values = series(rows, "objective/scores")
        stds = series(rows, "objective/scores_std")
        steps = [b - a for a, b in zip(values, values[1:])]
        scale = median(stds) if stds else 3 * pstdev(steps)
        if score[1] < score[0] - 0.5 * scale:
            found.append(Sign("score falls", None, f"the score falls from {score[0]:.2f} to "
                              f"{score[1]:.2f}: look at the sign of the policy loss and of the "
                              f"advantage, and at which token gets the score"))
    return found + gold_signs(rows)


def gold_signs(rows):
    """The score rises and gold does not: compare each eighth of the run with the last."""
    both = [row for row in rows if number(row.get("objective/scores")) is not None
            and number(row.get("objective/gold")) is not None]
    n = len(both) // 8
    if n < 1:
        return []
    rise = 0.5 * median(series(both, "objective/scores_std") or [1.0])
    parts = [both[i:i + n] for i in range(0, 7 * n, n)] + [both[-n:]]
    means = [(mean(series(part, "objective/scores")), mean(series(part, "objective/gold")))
             for part in parts]
    score, gold = means[-1]
    for earlier_score, earlier_gold in means[:-1]:
        if score > earlier_score + rise and gold < earlier_gold:
            return [Sign("gold stalls", None, f"the score rises from {earlier_score:.2f} to "
                         f"{score:.2f}, but gold goes from {earlier_gold:.2f} to {gold:.2f}: the "
                         f"reward model is exploited; stop earlier, or raise --beta")]
    return []


def policy_signs(rows):
    """What the policy does over the run: it does not move, moves too far, or turns random."""
    found = []
    kl = series(rows, "objective/kl")
    later = kl[len(kl) // 2:]
    if len(kl) >= 6 and max(map(abs, later)) < 1e-6:
        found.append(Sign("kl stays 0", None, "KL to the reference stays 0: the reference is the "
                          "policy itself, or the policy does not learn"))
    entropies = [x for x in map(entropy_per_token, rows) if not math.isnan(x)]
    n = len(entropies) // 4
    if n > 1 and mean(entropies[-n:]) > 1.5 * mean(entropies[:n]) + 0.01:
        found.append(Sign("entropy rises", None, f"entropy rises from {mean(entropies[:n]):.3f} to "
                          f"{mean(entropies[-n:]):.3f} nats per token: the policy turns random; "
                          f"look at the signs of the loss and of the KL penalty"))
    for n, row in enumerate(rows):
        moved = number(row.get("policy/approxkl_avg"))
        if moved is not None and moved > 0.1:
            found.append(Sign("large steps", label(row, n), f"the policy moves by {moved:.2f} nats "
                              f"per token within an update: lower the learning rate, or use fewer "
                              f"epochs; or the clip has no effect"))
            break
    return found


def length_signs(rows):
    """Fewer end tokens, or responses that grow or shrink."""
    found = []
    eos = ends(rows, "val/num_eos_tokens")
    if eos and eos[1] < 0.8 * eos[0]:
        found.append(Sign("ends fall", None, f"end tokens fall from {eos[0]:.0f} to {eos[1]:.0f} "
                          f"per rollout: the policy unlearns to stop; is the end token in the "
                          f"mask, and is there a penalty without it?"))
    length = ends(rows, "objective/length")
    if length and not 0.5 < length[1] / max(length[0], 1e-9) < 1.6:
        found.append(Sign("length", None, f"responses change from {length[0]:.1f} to "
                          f"{length[1]:.1f} tokens: the reward model pays for length, or a mean "
                          f"counts padding"))
    return found


def value_signs(rows):
    loss = ends(rows, "loss/value_avg")
    if loss and loss[1] > 2 * loss[0]:
        return [Sign("value loss rises", None, f"the value loss rises from {loss[0]:.3f} to "
                     f"{loss[1]:.3f}: the critic does not follow its targets; look at the returns")]
    return []


def dpo_signs(rows):
    """A start that is no start, pairs in the wrong order, and a policy far from its reference."""
    found = []
    steps = [row for row in rows if number(row.get("rewards/margins")) is not None]
    first = steps[0] if steps else {}
    loss = number(first.get("loss"))
    if first.get("step", 9) <= 1 and abs(first["rewards/margins"]) < 1e-4 and loss is not None:
        if abs(loss - math.log(2)) > 0.01:
            found.append(Sign("dpo start", first["step"], f"the loss starts at {loss:.3f}, not at "
                              f"log 2 = 0.693: is the reference left out? (ipo starts at "
                              f"1 / (2 beta)^2)"))
    elif first.get("step", 9) == 0:
        found.append(Sign("dpo start", 0, f"the margin starts at {first['rewards/margins']:.3f}, "
                          f"not at 0: policy and reference differ before the first step"))
    for key in ("eval_rewards/accuracies", "rewards/accuracies"):
        values = series(rows, key)
        if values:
            last = mean(values[-max(1, len(values) // 4):])
            if last < 0.55:
                found.append(Sign("dpo accuracy", None, f"{key} ends at {last:.2f}: chosen and "
                                  f"rejected are swapped, or nothing is learned"))
            break
    drift = ends(rows, "drift/chosen") or ends(rows, "logps/chosen")
    if drift and drift[1] < drift[0] - 20:
        found.append(Sign("dpo drift", None, f"the log-prob of the chosen response falls by "
                          f"{drift[0] - drift[1]:.0f} nats: raise beta, or add --nll"))
    return found


def loss_signs(rows):
    """What a loss may never do: be negative, or end higher than it began."""
    found = []
    for n, row in enumerate(rows):
        loss = number(row.get("loss"))
        if loss is not None and loss < 0:
            found.append(Sign("loss below 0", label(row, n), f"the loss is {loss:.3f}: a negative "
                              f"log-likelihood cannot be negative; its sign is wrong"))
            break
    loss = ends(rows, "loss")
    if loss and loss[1] > loss[0] + 0.02 * abs(loss[0]):
        found.append(Sign("loss rises", None, f"the loss rises from {loss[0]:.3f} to "
                          f"{loss[1]:.3f}: lower the learning rate; is its sign right?"))
    return found


EXAMINATIONS = {"ppo": (update_signs, not_finite, score_signs, policy_signs, length_signs,
                        value_signs),
                "dpo": (not_finite, dpo_signs, loss_signs),
                "training": (not_finite, loss_signs)}


def signs(rows):
    """Return the signs of trouble in a log, by name. Raises UserError if no metric is known."""
    rows = [renamed(row) for row in rows]
    kind = kind_of(rows)
    if not kind:
        raise UserError("no metric of this log is known; expected TRL's or OpenRLHF's names, such "
                        "as objective/kl, or loss")
    rows = [row for row in rows if set(MARKS[kind]) & set(row)]
    return {sign.name: sign for examine in EXAMINATIONS[kind] for sign in examine(rows)}


def similar_bugs(names, atlas=ATLAS):
    """Return (bug, share of signs that agree), best first, of the bugs with similar signs.

    names: the signs of a log. A bug has the signs that most of its runs in the atlas show.
    """
    if not atlas.exists():
        return []
    found = []
    for row in read_log(atlas):
        runs = [set(run["signs"]) for run in row.get("runs", [])]
        usual = {s for run in runs for s in run if sum(s in x for x in runs) > len(runs) / 2}
        share = len(usual & names) / max(1, len(usual | names))
        if share >= SHARE:
            found.append((row["bug"], share))
    return sorted(found, key=lambda x: -x[1])


def examine(log, n_bugs):
    """Print what is wrong in one log, and the known bugs with the same signs."""
    rows = read_log(log)
    try:
        found = signs(rows)
    except UserError as e:
        raise UserError(f"{log}: {e}") from None
    if not found:
        print(f"{log}: healthy; {len(rows)} rows without a sign of trouble")
        return
    print(f"{log}: signs of trouble in {len(rows)} rows")
    for sign in found.values():
        where = "over the run" if sign.at is None else f"from {sign.at}"
        print(f"  {sign.name} ({where}): {sign.line}")
    bugs = similar_bugs(set(found))[:n_bugs]
    if bugs:
        print("known bugs with these signs (share of the signs that agree); to see one: "
              "python tests/mutants.py --show NAME")
        for bug, share in bugs:
            print(f"  {share:4.0%}  {bug}")


def main(cfg):
    if not cfg.logs:
        raise UserError("name a log: python lab/doctor.py out/ppo.jsonl")
    for log in cfg.logs:
        examine(log, cfg.bugs)


if __name__ == "__main__":
    start(main, Config, __doc__)
