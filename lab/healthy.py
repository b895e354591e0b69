"""The section "Is it healthy?" of lab/report.py: warnings, README's table with a run's numbers."""
import re

from lab.charts import escape, table
from lab.run_files import end_rate, entropy, series
from scaffold.record import ROOT

# A line of README's table of healthy values: | `objective/kl` | below 10 | raise `--beta` |
METRIC_ROW = r"^\| (`\w+/.+) \| (.+) \| (.+) \|$"
# The warnings of scaffold/health.py that belong to a line of README's table.
WARNINGS_OF = {"val/ratio_first": ["ratio"], "objective/kl": ["kl", "kl below 0"],
               "objective/entropy": ["entropy"], "policy/clipfrac_avg": ["clip"],
               "val/explained_variance": ["value"], "val/num_eos_tokens": ["length"],
               "objective/scores": ["scores"]}


def both(rows, key):
    """Return the first and the last number of a log; (None, None) without any."""
    values = [value for _, value in series(rows, key)]
    return (values[0], values[-1]) if values else (None, None)


def readings(rows, offline=False):
    """Return {metric: (this run's numbers, whether they are healthy)} for the lines of README.

    What the log lacks is left out. offline: the samples are of sft, which ratio and KL show.
    """
    made = {}

    def add(metric, key, write, healthy, start=0):
        values = [value for _, value in series(rows[start:], key)]
        if values:
            made[metric] = (write(values), healthy(values))

    if not offline:
        add("val/ratio_first", "val/ratio_first",
            lambda v: f"{max(v, key=lambda x: abs(x - 1)):.6f} at its farthest",
            lambda v: all(abs(x - 1) < 1e-3 for x in v))
        add("objective/kl", "objective/kl",
            lambda v: f"{v[0]:.2f} to {v[-1]:.2f}, highest {max(v):.2f}",
            lambda v: abs(v[0]) < 0.5 and max(v) < 10)
    add("objective/entropy", entropy,
        lambda v: f"{v[0]:.2f} to {v[-1]:.2f} nats per token", lambda v: v[-1] > 0.2 * v[0])
    add("policy/clipfrac_avg", "policy/clipfrac_avg",
        lambda v: f"last {v[-1]:.1%}, highest {max(v):.1%}", lambda v: max(v) < 0.2)
    add("val/explained_variance", "val/explained_variance",
        lambda v: f"mean {sum(v) / len(v):.2f} after ten updates, last {v[-1]:.2f}",
        lambda v: sum(v) / len(v) > 0.5, start=10)
    add("val/num_eos_tokens", end_rate,
        lambda v: f"{v[-1]:.1%} of the last rollout", lambda v: v[-1] > 0.95)
    score = both(rows, "objective/scores")
    gold = both(rows, "objective/gold")
    if None not in score:
        grade = "unknown" if None in gold else f"{gold[0]:.2f} to {gold[1]:.2f}"
        rise = [a < b for a, b in (score, gold) if None not in (a, b)]
        made["objective/scores"] = (f"score {score[0]:.2f} to {score[1]:.2f}; gold {grade}",
                                    all(rise))
    return made


def health_section(files, found):
    """List the warnings, and README's table of healthy values beside this run's."""
    parts = ["<h2>Is it healthy?</h2>"]
    for text, updates in found.values():
        more = f", and {len(updates) - 1} more times" if len(updates) > 1 else ""
        parts.append(f'<p><span class="bad">Update {updates[0]}{more}:</span> {escape(text)}</p>')
    if not found:
        parts.append("<p>ppo.py warned of nothing.</p>")
    settings = files.records.get(files.name, {}).get("settings", {})
    own = readings(files.rows, settings.get("offline"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = []
    for metric, healthy, advice in re.findall(METRIC_ROW, readme, re.M):
        name = re.match("`(.+?)`", metric)[1]
        numbers, good = own.get(name, ("-", None))
        if any(key in found for key in WARNINGS_OF.get(name, [])):
            good = False
        sign = {True: "yes", False: '<span class="bad">no</span>', None: "-"}[good]
        rows.append([code(metric), code(healthy), escape(numbers), sign, code(advice)])
    return [*parts, table(["metric", "should be", "this run", "healthy?", "if not"], rows)]


def code(markdown):
    """Turn Markdown's `code` into HTML."""
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(markdown))
