"""From the numbers of results/*.jsonl to the tables of results/README.md and the figure.

    python results/figures.py        the figure needs matplotlib; without it, the tables alone
"""
import argparse
import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
README = HERE / "README.md"
END = "<!-- end of table -->"


def begin(name):
    """Return the mark in README.md above a table; everything from there to END is replaced."""
    return f"<!-- table {name}: made by figures.py -->"


def read_rows(name):
    """Return the rows of one file."""
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def load(stage):
    """Return {seed: rows} of a stage's metrics files."""
    runs = {}
    for path in sorted(HERE.glob(f"{stage}-seed*.jsonl")):
        seed = int(re.search(r"seed(\d+)", path.name)[1])
        runs[seed] = read_rows(path.name)
    return runs


def select(runs, key, value):
    """Return the rows of all seeds in which `key` has this value."""
    return [row for rows in runs.values() for row in rows if row.get(key) == value]


def values_of(runs, key):
    """Return the different values of `key` in the order of their first appearance."""
    return list(dict.fromkeys(row[key] for rows in runs.values() for row in rows if key in row))


def spread(values, form="{:.2f}"):
    """Format the mean and the range over seeds: '0.30 (0.10 to 0.50)', or '-' without values."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    low = form.format(min(values))
    high = form.format(max(values))
    text = form.format(statistics.mean(values))
    return text if low == high else f"{text} ({low} to {high})"


class Column(NamedTuple):
    """A column of a table: its head, the key of the rows, and the format of its numbers."""
    head: str
    key: str
    form: str = "{:.2f}"

    def cell(self, rows):
        return spread([row.get(self.key) for row in rows], self.form)


def markdown(heads, lines):
    """Return a Markdown table."""
    rows = ["| " + " | ".join(cells) + " |" for cells in [heads, *lines]]
    return "\n".join([rows[0], "|---" * len(heads) + "|", *rows[1:]])


COLUMNS_A = [
    Column("gold", "gold"),
    Column("on new words", "gold_new"),
    Column("win rate vs sft", "win_rate_vs_sft", "{:.0%}"),
    Column("refused", "refused_rate", "{:.0%}"),
    Column("right", "right_rate", "{:.0%}"),
    Column("wrong", "wrong_rate", "{:.0%}"),
    Column("made up", "hallucination_rate", "{:.0%}"),
    Column("rude", "rude_rate", "{:.1%}"),
    Column("KL", "kl_to_sft", "{:.1f}"),
    Column("LM loss", "lm_loss"),
    Column("length", "length", "{:.0f}"),
    Column("gold above greedy sft", "gold_minus_greedy", "{:+.2f}"),
]


def table_a():
    """Return the gold grades of every checkpoint, one line per stage."""
    runs = load("eval")
    lines = []
    for stage in values_of(runs, "stage"):
        if stage == "reward":   # the probes of the reward model, see table_b
            continue
        rows = select(runs, "stage", stage)
        name = stage if len(rows) == len(runs) else f"{stage} ({len(rows)} seeds)"
        cells = [column.cell(rows) for column in COLUMNS_A]
        if stage != "sft-greedy":
            cells[-1] += f", each ±{max(row['gold_minus_greedy_ci'] for row in rows):.2f}"
        lines.append([name, *cells])
    return markdown(["", *[column.head for column in COLUMNS_A]], lines)


PROBES = ["right_vs_wrong", "right_vs_wrong_open_qa", "right_vs_wrong_closed_qa",
          "right_vs_wrong_extract", "right_vs_wrong_sums", "right_vs_wrong_hanzi",
          "right_vs_refusal", "refusal_vs_invention", "whole_vs_lazy", "polite_vs_rude",
          "wish_vs_none"]


def table_b():
    """Return the accuracies of the reward model beside others, and below them its probes."""
    runs = load("reward")
    keys = ["accuracy", "labelers_agree", "gold_program", "accuracy_against_gold", "word_counts",
            "length_alone", "distance_1", "distance_2", "distance_3+"]
    columns = [Column(key.replace("_", " "), key, "{:.3f}") for key in keys]
    lines = []
    for split in ("training users", "held-out users"):
        rows = select(runs, "split", split)
        lines.append([split, *[column.cell(rows) for column in columns]])
    accuracies = markdown(["pairs of", *[column.head for column in columns]], lines)
    probes = select(load("eval"), "stage", "reward")
    lines = []
    for key in PROBES:
        share = Column("better preferred", key)
        number = Column("number", f"n_{key}", "{:.0f}")
        lines.append([key.replace("_", " "), share.cell(probes), number.cell(probes)])
    return accuracies + "\n\n" + markdown(["probe pairs", "better preferred", "number"], lines)


AUDIT = [                                   # the row of the log, and what to read from it
    ("audit", Column("instructions kept", "tasks", "{:.0f}")),
    ("audit", Column("valid", "valid", "{:.0%}")),
    ("audit", Column("input fits", "fits", "{:.0%}")),
    ("audit", Column("output right", "right", "{:.0%}")),
    ("diversity", Column("new: in no text it read, no seed", "new_share", "{:.0%}")),
    ("audit", Column("a pair of topic and manner that no text has", "unseen_pairs", "{:.0%}")),
    ("diversity", Column("mean ROUGE-L to the nearest seed", "rouge_to_seed")),
    ("diversity", Column("verb and noun pairs", "verb_noun_pairs", "{:.0f}")),
    ("one label", Column("commonest label of a topic, input first", "input_first", "{:.0%}")),
    ("one label", Column("commonest label of a topic, label first", "label_first", "{:.0%}")),
]


def table_d_made():
    """Return what Self-Instruct made, with its likelihood filter and with the paper's filters."""
    ours = load("self_instruct")
    paper = load("self_instruct-paper")
    lines = []
    for row, column in AUDIT:
        cells = [column.cell(select(runs, "row", row)) for runs in (ours, paper)]
        lines.append([column.head, *cells])
    return markdown(["", "with the likelihood filter", "the paper's filters alone"], lines)


COLUMNS_D = [
    Column("records", "records", "{:.0f}"),
    Column("gold", "gold", "{:.3f}"),
    Column("seen pairs", "seen", "{:.3f}"),
    Column("unseen pairs", "unseen", "{:.3f}"),
    Column("unseen wording", "user", "{:.3f}"),
    Column("above seeds only", "above_seeds", "{:+.3f}"),
]


def table_d_worth():
    """Return what the tasks are worth: the grades of models tuned on them."""
    runs = load("self_instruct")
    lines = []
    for arm in values_of(runs, "arm"):
        rows = select(runs, "arm", arm)
        cells = [column.cell(rows) for column in COLUMNS_D]
        if arm != "seeds only" and cells[-1] != "-":
            cells[-1] += f", each ±{max(row['above_seeds_ci'] for row in rows):.3f}"
        lines.append([arm, *cells])
    return markdown(["tuned on", *[column.head for column in COLUMNS_D]], lines)


class Rates(Column):
    """A column of three rates, such as win, tie and lose: '44/45/12'."""

    def cell(self, rows):
        values = [row[self.key] for row in rows if row.get(self.key)]
        if not values:
            return "-"
        return "/".join(f"{100 * statistics.mean(rates):.0f}" for rates in zip(*values))


COLUMNS_E = [
    Column("gold", "gold"),
    Rates("win/tie/lose M1", "vs_m1"),
    Rates("win/tie/lose previous", "vs_last"),
    Column("judge right, own answers", "judge_accuracy"),
    Column("log p right", "likelihood_accuracy"),
    Column("own score", "self_score"),
    Column("pairs agree", "agree"),
    Column("made up", "made_up", "{:.0%}"),
    Column("rude", "rude", "{:.1%}"),
    Column("length", "length", "{:.0f}"),
    Column("thanks", "thanks", "{:.0%}"),
]
CONTROLS = ("update-sft", "pairs-gold", "pairs-random", "frozen-judge", "no-replay")


def table_e():
    """Return every model of the self-rewarding runs; of the controls, the last model alone."""
    lines = []
    for name in ("main", *CONTROLS, "halo"):
        runs = load(f"self_reward-{name}")
        stages = values_of(runs, "stage")
        if name in CONTROLS:
            stages = stages[-1:]
        for stage in stages:
            rows = select(runs, "stage", stage)
            model = stage if len(rows) == 3 else f"{stage} ({len(rows)})"
            lines.append([name, model, *[column.cell(rows) for column in COLUMNS_E]])
    return markdown(["run", "model", *[column.head for column in COLUMNS_E]], lines)


def table_h_peers():
    """Return our speed beside peers, from lab/bench.py."""
    lines = []
    for row in read_rows("bench.jsonl"):
        ours = f"{row['ours']:,.1f}"
        theirs = f"{row['theirs']:,.1f} ({row['peer']})"
        lines.append([row["name"], row["unit"], ours, theirs, f"{row['ratio']:.2f}",
                      row["note"] or ""])
    return markdown(["work", "unit", "ours", "theirs", "times as fast", "note"], lines)


def table_h_chain():
    """Return the default run before and after the changes for speed."""
    lines = []
    for row in read_rows("chain.jsonl"):
        lines.append([row["commit"], str(row["seed"]), f"{row['cpu_s']:.0f}",
                      f"{row['memory_mb']:,}", f"{row['gold_ppo']:.2f}", f"{row['lm_base']:.3f}"])
    heads = ["commit", "seed", "CPU s", "memory, MB", "gold of ppo", "LM loss of base"]
    return markdown(heads, lines)


def table_h_optimizers():
    """Return the validation losses of AdamW and Muon after equal numbers of tokens."""
    rows = read_rows("optimizer.jsonl")
    lines = []
    for name in ("adamw", "muon"):
        losses = [row["val_loss"] for row in rows if row["optimizer"] == name]
        lines.append([name, *[f"{loss:.3f}" for loss in losses]])
    return markdown(["optimizer", *[f"seed {row['seed']}" for row in rows[:3]]], lines)


def tables():
    """Return {name: table} of README.md."""
    return {
        "A": table_a(),
        "B": table_b(),
        "D, made": table_d_made(),
        "D, worth": table_d_worth(),
        "E": table_e(),
        "H, peers": table_h_peers(),
        "H, chain": table_h_chain(),
        "H, optimizers": table_h_optimizers(),
    }


def write_tables(made):
    """Put tables {name: table} between their marks in README.md."""
    text = README.read_text(encoding="utf-8")
    for name, table in made.items():
        before, mark, after = text.partition(begin(name))
        _, end, rest = after.partition(END)
        if not mark or not end:
            raise SystemExit(f"{README}: no {begin(name)} ... {END}")
        text = f"{before}{mark}\n\n{table}\n\n{end}{rest}"
    README.write_text(text, encoding="utf-8")


def smooth(values, n=9):
    """Return the means of n neighbours, fewer at the ends."""
    half = n // 2
    return [statistics.mean(values[max(0, i - half):i + half + 1]) for i in range(len(values))]


PANELS = {
    "objective/scores": "reward model's score (what PPO sees)",
    "objective/gold": "gold grade of the same responses (the truth)",
    "objective/kl": "KL to sft, nats per response",
}


def figure(plt):
    """Draw figure (C): score, gold and KL of the PPO runs with and without the KL penalty."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for stage, label, colour in (("ppo-long", "default beta 0.1", "tab:blue"),
                                 ("ppo-beta-0", "beta 0", "tab:red")):
        for rows in load(stage).values():
            updates = [row["update"] for row in rows]
            for ax, key in zip(axes, PANELS):
                values = smooth([row[key] for row in rows])
                ax.plot(updates, values, color=colour, alpha=0.8, lw=1.3, label=label)
    for ax, title in zip(axes, PANELS.values()):
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("PPO update")
        ax.grid(alpha=0.3)
    axes[2].set_yscale("symlog")
    axes[0].legend()
    fig.tight_layout()
    fig.savefig(HERE / "overoptimisation.png", dpi=110)


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    made = tables()
    write_tables(made)
    for name, table in made.items():
        print(f"({name})\n\n{table}\n")
    try:
        import matplotlib
    except ImportError:
        print("no figure: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure(plt)


if __name__ == "__main__":
    main()
