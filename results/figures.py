"""From the numbers of results/*.jsonl to README's tables (results/tables.md) and figures. Made by results/make.sh.

    python results/figures.py        needs matplotlib for the figures; without it, the tables alone
"""
import json, re, statistics
from pathlib import Path

HERE = Path(__file__).parent


def load(stage):
    """{seed: rows} of one stage's metrics."""
    files = sorted(HERE.glob(f"{stage}-seed*.jsonl"))
    return {int(re.search(r"seed(\d+)", f.name)[1]): [json.loads(line) for line in f.read_text().splitlines()] for f in files}


def spread(values, form="{:.2f}", scale=1):
    """Mean and range over the seeds."""
    values = [scale * v for v in values if v is not None]
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(statistics.mean(values)) + (f" ({low} to {high})" if low != high else "")


def table_a(runs):
    heads = ["", "gold", "on new words", "win rate vs sft", "made up", "rude", "KL", "LM loss", "length", "gold above greedy sft"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    stages = list(dict.fromkeys(r["stage"] for rows in runs.values() for r in rows))
    for stage in stages:
        rows = [r for run in runs.values() for r in run if r["stage"] == stage]
        get = {key: [r[key] for r in rows] for key in rows[0]}
        cells = [stage if len(rows) == len(runs) else f"{stage} ({len(rows)} seeds)", spread(get["gold"]), spread(get["gold_new"]),
                 spread(get["win_rate_vs_sft"], "{:.0f}%", 100), spread(get["hallucination_rate"], "{:.0f}%", 100),
                 spread(get["rude_rate"], "{:.1f}%", 100), spread(get["kl_to_sft"], "{:.1f}"), spread(get["lm_loss"]),
                 spread(get["length"], "{:.0f}"), spread(get["gold_minus_greedy"], "{:+.2f}")]
        if stage != "sft-greedy":
            cells[-1] += f", each ±{max(get['gold_minus_greedy_ci']):.2f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_b(runs):
    keys = ["accuracy", "labelers_agree", "gold_program", "accuracy_against_gold", "word_counts", "length_alone",
            "distance_1", "distance_2", "distance_3+"]
    lines = ["| pairs of | " + " | ".join(k.replace("_", " ") for k in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for split in ("training users", "held-out users"):
        rows = [r for run in runs.values() for r in run if r.get("split") == split]
        lines.append(f"| {split} | " + " | ".join(spread([r[k] for r in rows], "{:.3f}") for k in keys) + " |")
    return "\n".join(lines)


def table(heads, lines):
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"] + ["| " + " | ".join(line) + " |" for line in lines])


def table_d(runs, paper):
    """Self-Instruct: what was made (own filter and the paper's), and what it is worth."""
    def of(runs, row, key, form="{:.0f}%", scale=100):
        values = [r[key] for rows in runs.values() for r in rows if r.get("row") == row and r.get(key) is not None]
        return spread(values, form, scale)
    facts = [("instructions kept", "audit", "tasks", "{:.0f}", 1), ("valid", "audit", "valid"), ("input fits", "audit", "fits"), ("output right", "audit", "right"),
             ("new: in no text it read, no seed", "diversity", "new_share"), ("a pair of topic and manner that no text has", "audit", "unseen_pairs"),
             ("mean ROUGE-L to the nearest seed", "diversity", "rouge_to_seed", "{:.2f}", 1), ("verb and noun pairs", "diversity", "verb_noun_pairs", "{:.0f}", 1),
             ("commonest label of a topic, input first", "one label", "input_first"), ("commonest label of a topic, label first", "one label", "label_first")]
    first = table(["", "with the likelihood filter", "the paper's filters alone"], [[name, of(runs, *key), of(paper, *key)] for name, *key in facts])
    arms = {}
    for rows in runs.values():
        for r in rows:
            if r.get("row") == "worth":
                arms.setdefault(r["arm"], []).append(r)
    second = table(["tuned on", "records", "gold", "seen pairs", "unseen pairs", "unseen wording", "above seeds only"], [
        [arm, spread([r["records"] for r in rs], "{:.0f}")] + [spread([r[k] for r in rs], "{:.3f}") for k in ("gold", "seen", "unseen", "user")]
        + [spread([r.get("above_seeds") for r in rs], "{:+.3f}") + (f", each ±{max(r['above_seeds_ci'] for r in rs):.3f}" if "above_seeds" in rs[0] and arm != "seeds only" else "")]
        for arm, rs in arms.items()])
    return first + "\n\n" + second


def table_e(names):
    """Self-rewarding: every run, every model, mean over the seeds there are."""
    lines = []
    for name in names:
        runs = load(f"self_reward-{name}")
        stages = list(dict.fromkeys(r["stage"] for rows in runs.values() for r in rows if "stage" in r))
        for stage in stages:
            if name not in ("main", "halo") and stage != stages[-1]:   # of a control its end; the rest is in its file
                continue
            rs = [r for rows in runs.values() for r in rows if r.get("stage") == stage]

            def cell(key, form="{:.2f}", scale=1):
                return spread([r.get(key) for r in rs], form, scale)

            def wtl(key):
                found = [r[key] for r in rs if r.get(key)]
                return "/".join(f"{100 * statistics.mean(x):.0f}" for x in zip(*found)) if found else "-"
            lines.append([name, f"{stage} ({len(rs)})" if len(rs) != 3 else stage, cell("gold"), wtl("vs_m1"), wtl("vs_last"), cell("judge_accuracy"), cell("likelihood_accuracy"),
                          cell("self_score"), cell("agree"), cell("made_up", "{:.0f}%", 100), cell("rude", "{:.1f}%", 100),
                          cell("length", "{:.0f}"), cell("thanks", "{:.0f}%", 100)])
    heads = ["run", "model", "gold", "win/tie/lose M1", "win/tie/lose previous", "judge right, own answers", "log p right", "own score", "pairs agree", "made up", "rude", "length",
             "thanks"]
    keep = [i for i in range(len(heads)) if any(line[i] != "-" for line in lines)]
    return table([heads[i] for i in keep], [[line[i] for i in keep] for line in lines])


def smooth(values, n=9):
    return [statistics.mean(values[max(0, i - n // 2):i + n // 2 + 1]) for i in range(len(values))]


def figures(plt):
    runs = {"default beta 0.1": load("ppo-long"), "beta 0": load("ppo-beta-0")}
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for (label, seeds), colour in zip(runs.items(), ("tab:blue", "tab:red")):
        for n, rows in enumerate(seeds.values()):
            x = [r["update"] for r in rows]
            for ax, key in zip(axes, ("objective/scores", "objective/gold", "objective/kl")):
                ax.plot(x, smooth([r[key] for r in rows]), color=colour, alpha=0.8, lw=1.3, label=label if n == 0 else None)
    for ax, title in zip(axes, ("reward model's score (what PPO sees)", "gold score of the same answers (what is true)", "KL to sft, nats per answer")):
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("PPO update")
        ax.grid(alpha=0.3)
    axes[2].set_yscale("symlog")
    axes[0].legend()
    fig.tight_layout()
    fig.savefig(HERE / "overoptimisation.png", dpi=110)


def main():
    parts = [("(A) gold grades of held-out prompts, three seeds: mean (lowest to highest)", table_a(load("eval"))),
             ("(B) the reward model", table_b(load("reward"))),
             ("(D) Self-Instruct", table_d(load("self_instruct"), load("self_instruct-paper"))),
             ("(E) Self-rewarding", table_e(["main", "update-sft", "pairs-gold", "pairs-random", "frozen-judge", "no-replay", "halo"]))]
    (HERE / "tables.md").write_text("\n\n".join(f"{title}\n\n{text}" for title, text in parts) + "\n")
    print((HERE / "tables.md").read_text())
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figures: pip install matplotlib")
    figures(plt)


if __name__ == "__main__":
    main()
