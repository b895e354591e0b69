"""Size of the reward model: can it be smaller than the policy that it teaches?

Claim (Ouyang et al. 2022, appendix C: a reward model of 6B parameters serves policies of up to
175B). A reward model of half the policy's width is nearly as accurate, and PPO gains nearly as
much.

OUT/sft.pt is the policy. A model of half its width is pretrained and fine-tuned on the same data,
in OUT/width-W. A reward model starts from it, another from OUT/sft.pt, and both learn from the same
rankings of the policy's samples. Then PPO runs with each; its value model has the same size as the
reward model.

    accuracy        share of pairs of held-out users ordered as a labeler does
    against gold    the same, as the gold program does
    probes          share of made pairs whose better response scores higher, by kind of mistake;
                    see data/probes.py
    PPO's gold      mean gold of the policy's responses to new prompts

    python lab/reward_size.py                three seeds
    python lab/reward_size.py --double       also twice the width

Fifteen minutes on two CPU cores. Needs OUT/sft.pt and trains it first if it is missing.
Read next: lab/rouge.py.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
import ppo
import reward
import sft
from data import corpus, labelers, probes
from data.records import read_records
from lab.candidates import measure_rlhf
from lab.cot import mean, print_table, spread
from scaffold.cli import BaseConfig, UserError, pick_device, require, run_folder, start
from scaffold.run import ensure_stage, load_checkpoint, log_metrics, set_seed


@dataclass
class Config(BaseConfig):
    double: bool = False         # also a reward model of twice the width, four times the time
    steps: int = gpt.Config.steps       # of pretraining models of other widths; as for OUT/gpt.pt
    prompts: int = 3000          # prompts whose responses are ranked for training
    updates: int = ppo.Config.updates   # of PPO, with each reward model
    n: int = 512                 # held-out prompts to grade PPO's responses on
    seeds: int = 3               # repetitions with their own rankings, reward models and PPO
    seed: int = 0                # first seed, also that of the models of other widths


WIDTHS = {"half": 0.5, "equal": 1, "double": 2}      # of the reward model, times the policy's


def tuned_model(out, width, policy, cfg):
    """Return the path of a fine-tuned model of this width; train it if it is missing.

    Everything but the width is as in the policy. cfg: has steps, seed and device.
    """
    if width == policy.n_embd:
        return out / "sft.pt"
    folder = out / f"width-{width}"
    base = load_checkpoint(out / "gpt.pt")
    text = {key: base[key] for key in ("data", "val_fraction", "mixture", "tokenizer")}
    ensure_stage(folder / "gpt.pt", gpt, cfg, **text, steps=cfg.steps, n_embd=width,
                 n_layer=policy.n_layer, n_head=policy.n_head, block_size=policy.block_size)
    ensure_stage(folder / "sft.pt", sft, cfg, data=str(out / "data" / "sft_train.jsonl"),
                 val=str(out / "data" / "sft_val.jsonl"))
    return folder / "sft.pt"


def measure_probes(model, enc, pairs):
    """Return {kind of mistake: share of the pairs whose better response scores higher}."""
    prompts = [pair["prompt"] for pair in pairs]
    chosen = reward.score_responses(model, enc, prompts, [pair["chosen"] for pair in pairs])
    rejected = reward.score_responses(model, enc, prompts, [pair["rejected"] for pair in pairs])
    rates = probes.probe_rates(pairs, chosen, rejected)
    return {kind: rates[kind] for kind in probes.KINDS}


def verdict(rows, loss=0.03):
    """Judge the claim from the rows of all seeds, in one sentence.

    On average over the seeds, half the width may lose at most `loss` of accuracy and of gold.
    """
    def change(key):
        return mean([r[key] for r in rows if r["run"] == "half"]) - mean(
            [r[key] for r in rows if r["run"] == "equal"])

    holds = change("accuracy") >= -loss and change("ppo_gold") >= -loss
    return (f"the claim {'holds' if holds else 'does not hold'} here: half the width changes the "
            f"reward model's accuracy by {100 * change('accuracy'):+.1f} points, right against "
            f"wrong by {100 * change('right_vs_wrong'):+.1f} points, and PPO's gold by "
            f"{change('ppo_gold'):+.2f} (allowed: {-100 * loss:+.0f} points of accuracy, "
            f"{-loss:+.2f} of gold)")


def print_results(rows):
    """Print means and ranges over the seeds: the models, then their probes."""
    headings = {"accuracy": "accuracy", "against gold": "accuracy_against_gold",
                "PPO's gold": "ppo_gold"}
    probe_headings = {kind.replace("_", " "): kind for kind in probes.KINDS}
    models = []
    probed = []
    for name in WIDTHS:
        chosen = [r for r in rows if r["run"] == name]
        if not chosen:
            continue
        size = f"{chosen[0]['width']}, {chosen[0]['parameters'] / 1e6:.2f}M"
        models.append({"width, parameters": size} | {
            heading: spread([r[key] for r in chosen], 3) for heading, key in headings.items()})
        probed.append({"width, parameters": size} | {
            heading: spread([r[key] for r in chosen]) for heading, key in probe_headings.items()})
    print_table(models)
    print()
    print_table(probed)


def main(cfg):
    require(cfg, 1, "steps", "prompts", "n", "seeds")
    require(cfg, ppo.Config.value_warmup + 1, "updates")
    out = run_folder(cfg.out)
    device = pick_device(cfg.device)
    ensure_stage(out / "sft.pt", sft, cfg)
    folder = corpus.ensure(out / "data", cfg.seed)

    def records(name):
        return [r for _, r in read_records(folder / f"{name}.jsonl")]

    policy, enc, _ = gpt.load_model(out / "sft.pt", device)
    sizes = policy.config
    if sizes.n_embd // 2 % sizes.n_head:
        raise UserError(f"{out / 'sft.pt'}: half of its width of {sizes.n_embd} is not a multiple "
                        f"of its {sizes.n_head} heads")
    starts = {}   # name -> the fine-tuned model that a reward model starts from
    for name, factor in WIDTHS.items():
        if name != "double" or cfg.double:
            starts[name] = tuned_model(out, int(factor * sizes.n_embd), sizes, cfg)
    pairs = probes.probe_pairs(records("prompts_test") + records("prompts_unanswerable")
                               + records("prompts_answerable"))
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        train = labelers.rank(policy, enc, records("rank_train")[:cfg.prompts], seed)
        val = labelers.rank(policy, enc, records("rank_val"), seed)
        for name, path in starts.items():
            set_seed(seed)
            with TemporaryDirectory() as made:
                results = measure_rlhf(out, made, train, val, seed, cfg, init=str(path))
                model, _ = reward.load_reward(Path(made) / "reward.pt", device)
            row = {"run": name, "seed": seed, "width": model.body.config.n_embd,
                   "parameters": sum(p.numel() for p in model.parameters())}
            rows.append(row | results | measure_probes(model, enc, pairs))
            log_metrics(out / "lab-reward_size.jsonl", fresh=len(rows) == 1, **rows[-1])
    print_results(rows)
    print(verdict(rows))


if __name__ == "__main__":
    start(main, Config, __doc__)
