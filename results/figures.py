"""From the numbers of results/*.jsonl to the tables of both README files and the figure.

    python results/figures.py        the figure needs matplotlib; without it, the tables alone
"""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from results.keep import is_header
from results.make import CONTROLS, FIRST, LABS, LONG_SEEDS, REWARDS, SIZES

README = HERE / "README.md"
FRONT = HERE.parent / "README.md"
END = "<!-- end of table -->"


def begin(name):
    """Return the mark in a README above a table; everything from there to END is replaced."""
    return f"<!-- table {name}: made by figures.py -->"


def read_rows(name):
    """Return the rows of one file without its first line, which says where they come from."""
    rows = [json.loads(line) for line in (HERE / name).read_text().splitlines()]
    return [row for row in rows if not is_header(row)]


def read_headers():
    """Return {file: first line} of the files that have such a line."""
    found = {}
    for path in sorted(HERE.glob("*.jsonl")):
        with open(path, encoding="utf-8") as f:
            first = json.loads(f.readline())
        if is_header(first):
            found[path.name] = first
    return found


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


class Mean(Column):
    """A column of means without their ranges."""

    def cell(self, rows):
        values = [row[self.key] for row in rows if row.get(self.key) is not None]
        return self.form.format(statistics.mean(values)) if values else "-"


def markdown(heads, lines):
    """Return a Markdown table."""
    rows = ["| " + " | ".join(cells) + " |" for cells in [heads, *lines]]
    return "\n".join([rows[0], "|---" * len(heads) + "|", *rows[1:]])


FRONT_STAGES = ("base", "sft", "sft-greedy", "best-of-16", "dpo", "ppo", "ppo-greedy")
FRONT_COLUMNS = [
    Mean("gold", "gold"),
    Mean("win rate vs sft", "win_rate_vs_sft", "{:.0%}"),
    Mean("right", "right_rate", "{:.0%}"),
    Mean("refused", "refused_rate", "{:.0%}"),
    Mean("made up", "hallucination_rate", "{:.0%}"),
    Mean("rude", "rude_rate", "{:.1%}"),
    Mean("KL", "kl_to_sft", "{:.1f}"),
    Mean("LM loss", "lm_loss"),
]


def front_results():
    """Return the table and the figure of the project's README: the means of (A), and (C)."""
    runs = load("eval")
    lines = []
    for stage in FRONT_STAGES:
        rows = select(runs, "stage", stage)
        lines.append([stage, *[column.cell(rows) for column in FRONT_COLUMNS]])
    table = markdown(["", *[column.head for column in FRONT_COLUMNS]], lines)
    ends = []
    for stage, beta in LONG_RUNS.items():
        for rows in load(stage).values():
            score = smooth([row["objective/scores"] for row in rows])[-1]
            gold = smooth([row["objective/gold"] for row in rows])[-1]
            ends.append(f"beta {beta}: score {score:.1f}, gold {gold:.2f}")
    picture = "![score, gold and KL over PPO updates](results/overoptimisation.png)"
    return f"{table}\n\n{picture}\n*At the end, {'; '.join(ends)}*"


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


COLUMNS_PROBES = [
    Column("right against wrong", "right_vs_wrong"),
    Column("right against refusal", "right_vs_refusal"),
    Column("refusal against invention", "refusal_vs_invention"),
    Column("whole against lazy", "whole_vs_lazy"),
    Column("polite against rude", "polite_vs_rude"),
    Column("wish met against passed over", "wish_vs_none"),
]
COLUMNS_REWARD = [
    Column("accuracy", "accuracy", "{:.3f}"),
    Column("accuracy against gold", "accuracy_against_gold", "{:.3f}"),
    *COLUMNS_PROBES,
]


def table_of_rewards(head, columns, seed, names):
    """Return what reward models of one seed know. names: {name: what its files add to theirs}."""
    lines = []
    for name, end in names.items():
        graded = {seed: load(f"eval{end}").get(seed, [])}
        trained = {seed: load(f"reward{end}").get(seed, [])}
        row = {}
        for part in (select(graded, "stage", "base"), select(graded, "stage", "reward"),
                     select(trained, "split", "held-out users")):
            row |= part[0] if part else {}
        for part in select(graded, "stage", "ppo"):
            row |= {f"ppo_{key}": value for key, value in part.items()}
        lines.append([name, *[column.cell([row]) for column in columns]])
    return markdown([head, *[column.head for column in columns]], lines)


def table_b_sizes():
    """Return what the reward model knows at three sizes, one run each."""
    smaller, larger = SIZES
    names = {smaller.replace("x", " x "): f"-size-{smaller}", "the default": "",
             larger.replace("x", " x "): f"-size-{larger}"}
    columns = [Column("LM loss of base", "lm_loss"), *COLUMNS_REWARD]
    return table_of_rewards("layers x width", columns, FIRST, names)


def table_b_others():
    """Return what other reward models of the same run know."""
    names = {"the default": ""} | {f"`{flags}`": f"-{name}" for name, flags in REWARDS.items()}
    columns = [*COLUMNS_REWARD, Column("PPO's gold", "ppo_gold"),
               Column("PPO refuses", "ppo_refused_rate", "{:.0%}"),
               Column("PPO is right", "ppo_right_rate", "{:.0%}")]
    return table_of_rewards("", columns, LONG_SEEDS[1], names)


def smooth(values, n=9):
    """Return the means of n neighbours, fewer at the ends."""
    half = n // 2
    return [statistics.mean(values[max(0, i - half):i + half + 1]) for i in range(len(values))]


LONG_RUNS = {"ppo-long": "0.1", "ppo-beta-0": "0"}      # the beta of each
PANELS = {
    "objective/scores": "reward model's score (what PPO sees)",
    "objective/gold": "gold grade of the same responses (the truth)",
    "objective/kl": "KL to sft, nats per response",
}


def table_c():
    """Return where the long PPO runs with and without the KL penalty end."""
    lines = []
    for stage, beta in LONG_RUNS.items():
        for rows in load(stage).values():
            score, gold, kl = [smooth([row[key] for row in rows]) for key in PANELS]
            best = max(gold)
            lines.append([beta, f"{score[-1]:.1f}", f"{best:.2f} ({gold.index(best)})",
                          f"{gold[-1]:.2f}", f"{kl[-1]:.1f}"])
    heads = ["beta", "last score", "highest gold (after update)", "last gold", "last KL"]
    return markdown(heads, lines)


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
            model = f"{stage} ({len(rows)})" if name in CONTROLS else stage
            lines.append([name, model, *[column.cell(rows) for column in COLUMNS_E]])
    return markdown(["run", "model", *[column.head for column in COLUMNS_E]], lines)


def table_e_judge():
    """Return what the judges of the self-rewarding runs know, with fresh judgements and without."""
    lines = []
    for name in ("main", "fresh-eft"):
        runs = load(f"self_reward-{name}")
        for stage in values_of(runs, "stage"):
            rows = [row for row in select(runs, "stage", stage) if COLUMNS_PROBES[0].key in row]
            if rows:
                lines.append([name, stage, *[column.cell(rows) for column in COLUMNS_PROBES]])
    return markdown(["run", "model", *[column.head for column in COLUMNS_PROBES]], lines)


def lab_rows(name):
    """Return the rows of a short experiment: names, numbers and a seed; [] without its file."""
    if name == "tool_use":
        return [row | {"seed": seed} for seed, rows in load("tools").items() for row in rows
                if "row" in row]
    path = HERE / f"lab-{name}.jsonl"
    if not path.exists():
        return []
    rows = read_rows(path.name)
    if name == "attention":
        return [{"seed": row["seed"], "model": model} | row[model]
                for row in rows for model in ("causal", "bidirectional")]
    if name == "rouge":
        return [{"seed": row["seed"], "judge": judge, "as gold orders": values[0],
                 "correlation": values[1]}
                for row in rows for judge, values in row["judges"].items()]
    if name == "icl":      # the mean of its tasks, and of the pretrained model alone
        names = ("task", "model")
        return [{key: value for key, value in row.items() if key not in names}
                for row in rows if row["model"] == "base"]
    return rows


def split_keys(rows):
    """Return the keys that name the lines of a table, and those of its numbers.

    A key names lines if its values are no fractions and are the same, two or more, in every seed.
    Of the others, those with numbers alone are numbers. Samples of text and lists are neither.
    """
    seeds = {row["seed"] for row in rows}
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "seed"]
    names = []
    numbers = []
    for key in keys:
        values = [row[key] for row in rows if row.get(key) is not None]
        if not all(isinstance(value, str | int | float) for value in values):
            continue
        of_seeds = [{row[key] for row in rows if row["seed"] == seed and key in row}
                    for seed in seeds]
        same = all(values_of_seed == of_seeds[0] for values_of_seed in of_seeds)
        fractions = any(isinstance(value, float) for value in values)
        if same and len(of_seeds[0]) > 1 and not fractions:
            names.append(key)
        elif not any(isinstance(value, str) for value in values):
            numbers.append(key)
    return names, numbers


def seed_means(rows, keys):
    """Average the rows of each seed: return one row per seed with these keys."""
    means = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        row_of_seed = {}
        for key in keys:
            values = [row[key] for row in rows
                      if row["seed"] == seed and row.get(key) is not None]
            row_of_seed[key] = statistics.mean(values) if values else None
        means.append(row_of_seed)
    return means


def lab_table(rows):
    """Return the means and ranges over the seeds of any experiment whose rows are flat."""
    names, numbers = split_keys(rows)
    whole = [key for key in numbers
             if all(isinstance(row[key], int) for row in rows if row.get(key) is not None)]
    columns = [Column(key.replace("_", " "), key, "{:,.0f}" if key in whole else "{:.2f}")
               for key in numbers]
    lines = []
    for label in dict.fromkeys(tuple(row.get(key) for key in names) for row in rows):
        chosen = [row for row in rows if tuple(row.get(key) for key in names) == label]
        means = seed_means(chosen, numbers)
        lines.append([*map(str, label), *[column.cell(means) for column in columns]])
    return markdown([*names, *[column.head for column in columns]], lines)


def tables_f():
    """Return the tables of the short experiments, one under the other."""
    made = []
    for name in ("tool_use", *LABS):
        rows = lab_rows(name)
        if rows:
            made.append(f"`lab/{name}.py`:\n\n{lab_table(rows)}")
    return "\n\n".join(made)


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


def table_h_memory():
    """Return the peak memory of a step of each stage, before and after, and in parts."""
    rows = read_rows("memory.jsonl")
    before, after = dict.fromkeys(row["commit"] for row in rows)
    peaks = {(row["commit"], row["stage"], row["parts"]): f"{row['peak_gb']:.1f}" for row in rows}
    cells = [(before, 1), (after, 1), (after, 4)]
    lines = [[stage, *[peaks.get((commit, stage, parts), "-") for commit, parts in cells]]
             for stage in dict.fromkeys(row["stage"] for row in rows)]
    heads = ["one step of", f"{before}, GB", f"{after}, GB", "with `--grad-accum 4`, GB"]
    return markdown(heads, lines)


REAL_REWARDS = {"the default": "", "`--epochs 1`": "-epochs1", "`--no-logprobs`": "-no-logprobs"}
REAL_COLUMNS = [
    Mean("reward", "reward"),
    Mean("reward wins vs sft", "reward_win_rate", "{:.0%}"),
    Mean("ended", "end_rate", "{:.0%}"),
    Mean("KL", "kl_to_sft", "{:.1f}"),
    Mean("LM loss", "lm_loss"),
    Mean("length", "length", "{:.0f}"),
]


def table_i_rewards():
    """Return the accuracy of reward models on pairs of people, with 95% intervals."""
    lines = []
    for name, suffix in REAL_REWARDS.items():
        train, val = read_rows(f"real-pairs-reward{suffix}.jsonl")
        p, n = val["accuracy"], val["pairs"]
        half = 1.96 * (p * (1 - p) / n) ** 0.5
        held_out = f"{p:.3f} ({p - half:.3f} to {p + half:.3f})"
        baselines = [f"{val[key]:.3f}" for key in ("length_alone", "word_counts")]
        lines.append([name, f"{train['accuracy']:.3f}", held_out, *baselines, str(n)])
    heads = ["reward model", "training pairs", "held-out pairs", "length alone", "word counts",
             "pairs"]
    return markdown(heads, lines)


def table_i_policies():
    """Return the policies tuned on pairs of people, measured without a grader."""
    rows = [row for row in read_rows("real-pairs-eval.jsonl") if row["stage"] != "reward"]
    lines = [[row["stage"], *[column.cell([row]) for column in REAL_COLUMNS]] for row in rows]
    return markdown(["", *[column.head for column in REAL_COLUMNS]], lines)


def symptom(row):
    """Say what the runs of a bug show first -> (metric, update or step, seeds that show it)."""
    runs = row["runs"]
    if all(run["crash"] for run in runs):
        return "the run stops", "-", len(runs)
    shown = [run for run in runs if run["first"]]
    names = [run["first"] for run in shown]
    name = max(names, key=names.count, default="nothing")
    at = [run["at"] for run in shown if run["first"] == name]
    return name, f"{statistics.median(at):g}" if at else "-", names.count(name)


def table_j():
    """Return the atlas of symptoms: what each bug of the zoo shows in a short run."""
    lines = []
    for row in read_rows("atlas.jsonl"):
        if "bug" in row:
            name, at, n = symptom(row)
            seeds = f"{n} of {len(row['runs'])}"
            others = [other for other in row["outside"] if other != name]
            rest = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if others[3:] else "")
            lines.append([row["stage"], f"`{row['bug']}`", name, at, seeds, rest or "-"])
    heads = ["stage", "bug", "first outside its band", "update or step", "seeds",
             "then, in most seeds"]
    return markdown(heads, lines)


def table_commits():
    """Return which files were made where: one line for each commit and machine."""
    files = {}
    for first in read_headers().values():
        machine = first["machine"]
        commit = first["commit"] or "unknown"
        if first["dirty"]:
            commit += ", with changes"
        cell = (commit, f"{machine['cpu']}, {machine['cores']} cores",
                f"torch {machine['torch']}, Python {machine['python']}")
        files.setdefault(cell, []).append(first["seed"])
    lines = [[*cell, str(len(seeds)), ", ".join(map(str, sorted(set(seeds))))]
             for cell, seeds in files.items()]
    return markdown(["commit", "processor", "versions", "files", "seeds"], lines)


def tables():
    """Return {name: table} of results/README.md."""
    return {
        "A": table_a(),
        "B": table_b(),
        "B, others": table_b_others(),
        "B, sizes": table_b_sizes(),
        "C": table_c(),
        "D, made": table_d_made(),
        "D, worth": table_d_worth(),
        "E": table_e(),
        "E, judge": table_e_judge(),
        "F": tables_f(),
        "H, peers": table_h_peers(),
        "H, chain": table_h_chain(),
        "H, optimizers": table_h_optimizers(),
        "H, memory": table_h_memory(),
        "I, rewards": table_i_rewards(),
        "I, policies": table_i_policies(),
        "J": table_j(),
        "commits": table_commits(),
    }


def write_tables(path, made):
    """Put tables {name: table} between their marks in a README."""
    text = path.read_text(encoding="utf-8")
    for name, table in made.items():
        before, mark, after = text.partition(begin(name))
        _, end, rest = after.partition(END)
        if not mark or not end:
            raise SystemExit(f"{path}: no {begin(name)} ... {END}")
        text = f"{before}{mark}\n\n{table}\n\n{end}{rest}"
    path.write_text(text, encoding="utf-8")


def figure(plt):
    """Draw figure (C): score, gold and KL of the PPO runs with and without the KL penalty."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for (stage, beta), colour in zip(LONG_RUNS.items(), ("tab:blue", "tab:red")):
        for rows in load(stage).values():
            updates = [row["update"] for row in rows]
            for ax, key in zip(axes, PANELS):
                values = smooth([row[key] for row in rows])
                ax.plot(updates, values, color=colour, alpha=0.8, lw=1.3, label=f"beta {beta}")
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
    write_tables(README, made)
    write_tables(FRONT, {"results": front_results()})
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
