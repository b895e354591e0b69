"""The sections of lab/report.py that show responses, and what the reward model says about them."""
import math
import random
from pathlib import Path

import gpt
import reward
import sft
from data.formats import load_comparisons, load_grader, load_val
from data.probes import probe_rows
from data.rankings import tokenize
from lab.charts import escape, histograms, interval, table
from lab.tokens import token_view
from scaffold.table import printable

ROLLOUT = 128  # responses of the rollout that get a response of sft beside them, and may be shown
RANKED = 100   # prompts whose ranked responses are scored for the histogram
GRADES = {"gold 1": 1, "gold from 0 to 1": 0, "gold below 0: wrong, made up or rude": -math.inf}


def with_before(files, seed, device):
    """Return the first rows of the rollout with "before", a response of sft, its score and gold.

    The rows come back unchanged without sft.pt.
    """
    rollout = files.rollout[:ROLLOUT]
    if not (files.out / "sft.pt").exists():
        return rollout
    model, enc, _ = gpt.load_model(files.out / "sft.pt", device)
    settings = files.records.get(files.name, {}).get("settings", {})
    room = model.config.block_size - 1
    fitting = sft.fit_prompts(rollout, enc, room)
    chats = [row["prompt"] for row in fitting]
    texts = sft.sample_responses(model, enc, chats, settings.get("max_new_tokens", 48), seed)
    rows = [row | dict(before=text) for row, text in zip(fitting, texts)]
    if (files.out / "reward.pt").exists():
        reward_model = reward.load_reward(files.out / "reward.pt", device)[0]
        scores = reward.score_responses(reward_model, enc, chats, texts)
        rows = [row | dict(before_score=score) for row, score in zip(rows, scores)]
    if all("gold" in row for row in rows):
        gold = load_grader(settings.get("gold", "data.village:gold"), rows)
        rows = [row | dict(before_gold=gold(row["task"], row["before"])) for row in rows]
    return rows


def quality(row):
    """Return what orders responses: gold where there is a grader, then the score."""
    return row.get("gold", 0), row["score"]


def choose(rows, seed):
    """Return [(reason, row)] of eight responses at most; no row comes twice."""
    rows = sorted(rows, key=quality, reverse=True)
    gain = {id(row): row["score"] - row.get("before_score", 0) for row in rows}
    by_gain = sorted(rows, key=lambda row: gain[id(row)], reverse=True)
    if all("before_gold" in row for row in rows):
        reason = "score up, gold down"
        third = [row for row in by_gain if gain[id(row)] > 0 and row["gold"] < row["before_gold"]]
    else:
        reason = "score gained most"
        third = by_gain
    chosen = []
    taken = set()

    def take(reason, candidates):
        for row in [row for row in candidates if id(row) not in taken][:2]:
            taken.add(id(row))
            chosen.append((reason, row))

    take("best", rows)
    take("worst", rows[::-1])
    take(reason, third)
    take("at random", random.Random(seed).sample(rows, len(rows)))
    return chosen


def numbers(score, gold):
    """Return a score and a gold, of which either may be missing, as text."""
    parts = [] if score is None else [f"score {score:.2f}"]
    if gold is not None:
        parts.append(f"gold {gold:.2f}")
    return f'<span class="soft">{", ".join(parts)}</span>'


def short(text, most=400):
    """Return text for the page, cut if it is long."""
    text = printable(text)
    return escape(text if len(text) <= most else text[:most] + " ...")


def card(reason, row):
    """Show one prompt with the responses before and after."""
    lines = [f'<p class="soft">{escape(reason)}</p><p><b>{short(row["prompt"][-1]["content"])}</b>']
    if "before" in row:
        lines.append(f"<p>before: {short(row['before'])} "
                     f"{numbers(row.get('before_score'), row.get('before_gold'))}")
    end = "" if row["ended"] else ' <span class="bad">(no end)</span>'
    lines.append(f"<p>after: {short(row['response'])}{end} "
                 f"{numbers(row['score'], row.get('gold'))}")
    return f'<div class="card">{"</p>".join(lines)}</p></div>'


def sample_sections(files, seed, device):
    """Show eight responses of the last rollout before and after, and two of them token by token."""
    if not files.rollout:
        return ["<h2>Responses</h2><p class=\"soft\">This folder has no "
                f"<code>{escape(files.name)}-rollout.jsonl</code>, which ppo.py writes beside its "
                "log.</p>"]
    chosen = choose(with_before(files, seed, device), seed)
    update, beta = files.rollout[0]["update"], files.rollout[0]["beta"]
    cards = "".join(card(reason, row) for reason, row in chosen)
    views = {}   # the first response of a kind: one of the best, and one that deserves a look
    for reason, row in chosen:
        views.setdefault(reason, row)
    others = [reason for reason in ("score up, gold down", "worst") if reason in views]
    shown = [views[reason] for reason in ["best", *others][:2] if reason in views]
    return [
        "<h2>Responses before and after</h2>"
        f'<p class="soft">From the first {min(ROLLOUT, len(files.rollout))} responses of update '
        f"{update}, to prompts of the training. Before: samples of sft.</p>"
        f'<div class="pair">{cards}</div>',
        "<h2>What each token was paid</h2>"
        '<p class="soft">Two of these responses. The tokens of the prompt are not trained '
        "(mask 0); those of the response are (mask 1, framed here), the end token among them. "
        f"Reward: the KL penalty, -{beta:g} times the log-ratio; on the last token, plus the "
        "score. V is the critic's prediction before the token, A the whitened advantage.</p>"
        f'<div class="pair small">{"".join(f"<div>{token_view(row)}</div>" for row in shown)}'
        "</div>"]


def ranked_records(files):
    """Return the ranked responses that reward.py kept for validation; [] if they are not here."""
    village = files.out / "data" / "ranked_val.jsonl"
    record = files.records.get("reward", {})
    settings = record.get("settings", {})
    own = Path(settings.get("data") or village)
    val = Path(settings.get("val") or village)
    if val.is_file():
        return load_comparisons(val)
    if not settings.get("data") or not own.is_file():
        return []
    return load_val(load_comparisons(own), "", load_comparisons, record.get("seed") or 0)[1]


def groups_of(records, scores, gold):
    """Group the scores of ranked responses by gold, or by rank -> {label: scores}."""
    def label(record, response, rank):
        if not gold:
            return "best of their prompt" if rank == min(record["ranks"]) else "others"
        grade = gold(record["task"], response)
        return next(name for name, least in GRADES.items() if grade >= least)

    groups = {name: [] for name in (GRADES if gold else ["best of their prompt", "others"])}
    for record, row in zip(records, scores):
        for response, rank, score in zip(record["responses"], record["ranks"], row):
            groups[label(record, response, rank)].append(score)
    return groups


def share_interval(share, n):
    """Return half of Wilson's 95% interval of a share."""
    z = 1.96
    return z / (1 + z * z / n) * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5


def reward_section(files, device):
    """Show the scores of ranked validation responses by gold, and the reward model's probes."""
    parts = ["<h2>The reward model</h2>"]
    accuracy = [row for row in files.logs.get("reward", []) if "accuracy" in row][-1:]
    for row in accuracy:
        facts = [f"prefers the better of two responses in {row['accuracy']:.1%} of "
                 f"{row['pairs']:,} pairs of {row['split']}"]
        if row.get("labelers_agree") is not None:
            facts.append(f"two labelers agree on {row['labelers_agree']:.1%}")
        if row.get("accuracy_against_gold") is not None:
            facts.append(f"with gold it agrees on {row['accuracy_against_gold']:.1%}")
        parts.append(f"<p>It {'; '.join(facts)}.</p>")
    figures = []
    records = ranked_records(files)[:RANKED]
    if records and (files.out / "reward.pt").exists():
        model, enc = reward.load_reward(files.out / "reward.pt", device)
        comparisons = tokenize(records, sft.render_prompt, enc, model.body.config.block_size)
        gold = load_grader("data.village:gold", records)
        groups = groups_of([c.record for c in comparisons],
                           reward.score_all(model, comparisons, device), gold)
        figures.append("<figure><figcaption>Scores of ranked responses <span>each row scaled to "
                       f"its highest bar</span></figcaption>{histograms(groups, 'score')}</figure>")
    probes = [row for row in files.table if row.get("stage") == "reward"]
    if probes:
        rows = [[escape(row["kind"]), f"{row['share']:.1%}", row["n"],
                 interval(row["share"], share_interval(row["share"], row["n"]), 0.5, 1)]
                for row in probe_rows(probes[0])]
        figures.append("<figure><figcaption>Accuracy by kind of mistake <span>pairs that differ in "
                       "one thing; bars from 50%, chance, to 100%</span></figcaption>"
                       f"{table(['kind', 'right', 'pairs', ''], rows, numbers=(1, 2))}</figure>")
    if len(parts) == 1 and not figures:
        return []
    return [*parts, f'<div class="pair">{"".join(figures)}</div>']
