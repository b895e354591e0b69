"""One page about a run, OUT/report.html: is it healthy, what did it learn, what was a token paid?

ppo.py writes it at its end. For any folder, finished or not, with or without grades:

    python lab/report.py                                    the page of ./out
    python lab/report.py --out out/mine --name ppo-beta-0   another folder, another run of PPO
    python lab/report.py --tensorboard runs                 copy the logs of OUT instead, see
    python lab/report.py --csv                              lab/replay.py
    python lab/report.py --wandb

The page needs no network and no script, and prints well. It shows what the folder has: the logs
(gpt, sft, reward, dpo, NAME).jsonl, their .run.json, the last rollout NAME-rollout.jsonl, the table
eval.jsonl (made by: python evaluate.py --save OUT/eval.jsonl), and scores by OUT/reward.pt.

Behind the charts of a run with the default settings stands the range of the published runs,
results/ppo-seed*.jsonl, in grey. A healthy run leaves the range of five others about a third of the
time, for a short while; look at how far and how long.

Five seconds. Read next: charts.py (how it is drawn), tokens.py (the token view).
"""
import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate
from data.exam import COLUMNS
from data.text import write_text
from lab.charts import Line, Panel, chart, escape, facts, interval, page, table
from lab.healthy import health_section
from lab.replay import replay
from lab.run_files import (
    STAGES, band, end_rate, entropy, found_warnings, missing_band, published, read_files, series)
from lab.samples import reward_section, sample_sections
from scaffold.cli import (
    BaseConfig, UserError, brief, check_name, pick_device, run_folder, start)
from scaffold.distributed import world_size
from scaffold.table import cell


@dataclass
class Config(BaseConfig):
    name: str = "ppo"            # the run of PPO to show, by its --name
    csv: bool = False            # write OUT/csv/*.csv instead of the page
    tensorboard: str = ""        # write TensorBoard's event files below this folder instead
    wandb: bool = False          # send the logs to Weights & Biases instead; needs wandb


class Curve(NamedTuple):
    """A line of a chart. key: of the log, or a function of its rows."""
    key: object
    name: str
    form: str = ".2f"
    kind: str = "a"       # a: accent, b: grey
    least: float = None   # the axis reaches at least from here
    most: float = None    # to here


# Title, unit, the warnings that belong to it, its panels of curves.
CHARTS = [
    ("Score and gold", "mean per response", ["scores"],
     [[Curve("objective/scores", "score", kind="b"), Curve("objective/gold", "gold")]]),
    ("KL to sft", "nats per response", ["kl", "kl below 0"],
     [[Curve("objective/kl", "KL", least=0)]]),
    ("Entropy", "nats per token", ["entropy"], [[Curve(entropy, "entropy", least=0)]]),
    ("Clip fraction", "share of the ratios", ["clip", "ratio"],
     [[Curve("policy/clipfrac_avg", "clipped", ".1%", least=0)]]),
    ("Explained variance", "by the critic, at most 1", ["value"],
     [[Curve("val/explained_variance", "explained")]]),
    ("Length, end rate", "tokens; share", ["length"],
     [[Curve("objective/length", "tokens", ".1f")], [Curve(end_rate, "ended", ".0%", "b", 0, 1)]]),
]


def chart_section(files, found):
    """Draw the log of PPO."""
    reason = missing_band(files)
    theirs = [] if reason else published()
    figures = []
    for title, unit, names, panels in CHARTS:
        drawn = []
        for curves in panels:
            lines = [Line(series(files.rows, c.key), c.name, c.form, c.kind) for c in curves]
            first = curves[0]
            drawn.append(Panel(lines, [band(theirs, c.key) for c in curves],
                               150 if len(panels) == 1 else 68,
                               ".0%" if "%" in first.form else "g", first.least, first.most))
        if title == "Score and gold" and not drawn[0].lines[1].points:
            title, unit = "Score", "by the reward model; gold is unknown"
        marks = [found[name][1][0] for name in names if name in found]
        figures.append(chart(title, unit, drawn, "update", marks))
    grey = (f"No published runs behind the lines: {reason}." if reason else
            "Grey: the range of the published runs, seeds 100 to 104, with the same settings. A "
            "healthy run leaves the range of five others about a third of the time, but not far.")
    return [f"<h2>Update by update</h2><p class=\"soft\">{escape(grey)}</p>",
            f'<div class="grid">{"".join(figures)}</div>']


def verdict(files, found):
    """Return the run in one or two sentences, as HTML."""
    if not files.rows:
        return f"No update of PPO yet: this folder has {escape(', '.join(files.logs))}."
    table_of = {row["stage"]: row for row in files.table if "stage" in row}
    ours, sft_row = table_of.get(files.name, {}), table_of.get("sft", {})
    first, last = files.rows[0], files.rows[-1]
    steps = files.records.get(files.name, {}).get("steps", 0)
    n = len(files.rows)
    done = f"Stopped after {n} of {steps} updates. " if steps > n else ""
    text = f"On {ours.get('n')} prompts, {escape(files.name)} "
    kl = ours.get("kl_to_sft")
    if files.stale or done or not ours:
        moved = [f"{name} goes from {cell(first.get(key), '.2f')} to <b>{last[key]:.2f}</b>"
                 for name, key in (("the score", "objective/scores"), ("gold", "objective/gold"))
                 if last.get(key) is not None]
        text = f"{done}In {n} updates {' and '.join(moved) or 'no score is logged'}"
        kl = last.get("objective/kl")
    elif ours.get("gold") is not None:
        text += (f"has gold <b>{ours['gold']:.2f}</b> where sft has "
                 f"<b>{cell(sft_row.get('gold'), '.2f')}</b>, and wins "
                 f"<b>{ours['win_rate_vs_sft']:.0%}</b> of the pairs")
    else:
        text += (f"scores <b>{cell(ours.get('reward'), '.2f')}</b> where sft scores "
                 f"<b>{cell(sft_row.get('reward'), '.2f')}</b> by the reward model, the only "
                 "judge of these data")
    distance = f", at a KL of <b>{kl:.1f}</b> nats per response" if kl is not None else ""
    if not found:
        return f"{text}{distance}; no warnings."
    kinds = f"{len(found)} warning{'s' if len(found) > 1 else ''}"
    return f'{text}{distance}; <span class="bad">{kinds}</span>.'


def about(files):
    """Return what one must know to make this run again."""
    record = files.records.get(files.name) or next(iter(files.records.values()), None)
    if not record:
        return ['<p class="soft">How this run was started is not recorded: an older version made '
                'it, or only its logs are here.</p>']
    commit = record.get("commit") or "unknown"
    if record.get("dirty"):
        commit += ", with changes"
    minutes = {stage: r["seconds"] / 60 for stage, r in files.records.items() if r.get("seconds")}
    times = ", ".join(f"{stage} {m:.1f}" for stage, m in minutes.items())
    changed = []
    for stage, r in files.records.items():
        flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in r["changed"].items())
        if flags:
            changed.append(f"{stage}: <code>{escape(flags)}</code>")
    absent = [s for s in ("gpt", "sft", "reward") if s not in files.records]
    if absent:
        changed.append(f"not recorded: {', '.join(absent)}")
    inputs = [f"<code>{escape(file)}</code> {escape(crc)}"
              for file, crc in record["inputs"].items()]
    device = record.get("device", "")
    if record.get("processes", 1) > 1:
        device += f", {record['processes']} processes"
    return [facts([
        ("command", f"<code>{escape(record['command'])}</code>"),
        ("commit", escape(commit)), ("seed", escape(record.get("seed"))),
        ("device", escape(device)),
        ("minutes", f"{sum(minutes.values()):.1f} ({escape(times)})" if minutes else ""),
        ("settings other than the defaults", "; ".join(changed) or "none"),
        ("inputs, with checksums", ", ".join(inputs))])]


def losses(rows):
    """Return the lines of a stage's log: training loss, as means of 20 steps, and held-out loss.

    The first twentieth of the steps is left out: its losses would hide the rest.
    """
    step, train, held_out = 0, [], []
    for row in rows:
        step = row.get("step", step)
        if row.get("loss") is not None:
            train.append((step, row["loss"]))
        value = row.get("val_loss", row.get("eval_loss"))
        if value is not None:
            held_out.append((step, value))
    blocks = [train[i:i + 20] for i in range(0, len(train), 20)]
    means = [(b[-1][0], sum(v for _, v in b) / len(b)) for b in blocks]
    return [Line([p for p in points if p[0] >= step / 20], name, ".2f", kind)
            for points, name, kind in ((means, "train", "b"), (held_out, "held out", "a"))]


def stage_section(files):
    """Show evaluate.py's table with intervals as bars, and the losses of the other stages."""
    parts = ["<h2>Stage by stage</h2>"]
    rows = [row for row in files.table if row.get("stage") not in (None, "reward")]
    if files.stale:
        parts.append(f'<p class="bad">This table is older than {escape(files.name)}.pt.</p>')
    if rows:
        n = rows[0].get("n")
        parts.append(f'<p class="soft">{n} prompts; bars are 95% intervals.</p>')
        columns = {head: c for head, c in COLUMNS.items() if not c[0].startswith("gold_minus")
                   and any(r.get(c[0]) is not None for r in rows)}
        heads, keys = [], []
        for head, (key, form) in columns.items():
            if key.endswith("_ci"):   # drawn with the value before it
                keys[-1] = (*keys[-1][:2], key)
            else:
                heads.append(head)
                keys.append((key, form, None))
        lines = [[stage_cell(row, rows, *k) for k in keys] for row in rows]
        parts.append(table(heads, lines, numbers=[i for i, k in enumerate(keys) if i and not k[2]]))
    else:
        parts.append(f"<p>No table yet: <code>python evaluate.py --out {escape(files.out)} --save "
                     f"{escape(files.out / 'eval.jsonl')}</code></p>")
    curves = [chart(f"{stage}.py", "loss; train: means of 20 steps",
                    [Panel(losses(stage_rows), (), 110)], "step")
              for stage, stage_rows in files.logs.items()]
    return [*parts, f'<div class="grid">{"".join(curves)}</div>']


def stage_cell(row, rows, key, form, half):
    """Return a cell of the table of stages; half: the key of the interval, or None."""
    value = row.get(key)
    text = escape(cell(value, form))
    if half is None or value is None:
        return text
    ends = [r[key] + sign * (r.get(half) or 0) for r in rows if r.get(key) is not None
            for sign in (-1, 1)]
    ci = row.get(half)
    return f"{text} ± {escape(cell(ci, form))}" + interval(value, ci, min(*ends, 0), max(ends))


def section(make, *args):
    """Return a section; one whose files are damaged says so, and does not cost the page."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):   # readers print what they skip
            return make(*args)
    except UserError as e:
        return [f'<p class="bad">A section is missing: {escape(e)}</p>']


def make_page(files, cfg):
    """Return the HTML of the page."""
    found = found_warnings(files) if files.rows else {}
    parts = [f"<h1>{escape(files.out / files.name)}</h1>",
             f'<p class="verdict">{verdict(files, found)}</p>', *about(files)]
    if files.rows:
        parts += chart_section(files, found) + health_section(files, found)
    parts += section(stage_section, files)
    device = pick_device(cfg.device)
    if files.rows:
        parts += section(sample_sections, files, cfg.seed, device)
    parts += section(reward_section, files, device)
    return page(f"Run report: {files.out / files.name}", parts)


def main(cfg):
    check_name(cfg, *STAGES)
    files = read_files(run_folder(cfg.out), cfg.name)
    if cfg.csv or cfg.tensorboard or cfg.wandb:
        replay(files, cfg)
        return
    path = files.out / ("report.html" if cfg.name == "ppo" else f"report-{cfg.name}.html")
    write_text(path, make_page(files, cfg))
    print(f"wrote {path}")


def after_training(cfg, graded):
    """End a run of ppo.py, cfg: ppo.Config: evaluate.py's table if there are grades, then the page.

    A page that fails costs one line: the run is complete and saved. Under torchrun there is none.
    """
    if graded:
        print("--- on prompts of users that no stage has seen")
        table = Path(cfg.out) / "eval.jsonl"
        evaluate.main(evaluate.Config(out=cfg.out, device=cfg.device, save=str(table)))
    if world_size() > 1:
        return
    try:
        main(Config(out=cfg.out, name=cfg.name, seed=cfg.seed, device=cfg.device))
    except Exception as e:
        print(f"no report ({brief(repr(e))}); try again: python lab/report.py --out {cfg.out}")


if __name__ == "__main__":
    start(main, Config, __doc__)
