"""Tests of lab/report.py and what it is made of: charts, token view, replay; and of its logs."""

import csv
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

import chat
import data.village
import gpt
import ppo
import reward
import sft
from data.rollouts import token_text
from lab import report
from lab.charts import Line, escape, limits, spread_labels, ticks
from lab.healthy import WARNINGS_OF, readings
from lab.replay import csv_text, event_file, masked_crc, record, scalars, steps_of
from lab.run_files import band, end_rate, entropy, found_warnings, published, read_files, series
from lab.samples import GRADES, choose, groups_of, ranked_records, share_interval, with_before
from lab.tokens import Inspector, coloured, measure, token_rows
from scaffold.cli import UserError
from scaffold.health import warnings
from scaffold.record import record_path, write_record
from lab_run import make_reward_run
from tiny import END, ENC, ROOT, Recorder, read_jsonl, save_reward, tiny_gpt, tiny_reward, user
from tiny import write_jsonl

RESULTS = ROOT / "results"


class Page(HTMLParser):
    """Reads a page; collects its texts and tags, and fails if a tag is not closed."""

    VOID = {"meta"}

    def __init__(self, html):
        super().__init__()
        self.open = []
        self.tags = []
        self.texts = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def rows_of(name):
    """Return the rows of a published log without its first line."""
    return [row for row in read_jsonl(RESULTS / name) if "machine" not in row]


def record_of(**changed):
    return dict(command="python ppo.py", commit="36c0f7d", dirty=False, device="cpu", processes=1,
                seed=100, settings=vars(ppo.Config(**changed)), changed=changed,
                inputs={"out/sft.pt": "5d0e0f3a"}, steps=60, seconds=66.0, finished=True)


def published_run(out, log="ppo-seed100", **changed):
    """Write a folder with the published logs of run 100 and no checkpoint."""
    out.mkdir(parents=True)
    for stage in ("gpt", "sft", "reward", "dpo", "eval"):
        write_jsonl(out / f"{stage}.jsonl", *rows_of(f"{stage}-seed100.jsonl"))
    write_jsonl(out / "ppo.jsonl", *rows_of(f"{log}.jsonl"))
    write_record(record_path(out, "ppo"), record_of(**changed))
    return out


PROMPTS = ["Who has a dog?", "What is a mill?", "Count to three, please.", "Where is Ada?"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run of PPO on prompts without a grader; ppo.main wrote its page."""
    out = tmp_path_factory.mktemp("run") / "out"
    out.mkdir()
    gpt.save_model(out / "sft.pt", tiny_gpt(1), ENC, "")
    save_reward(out / "reward.pt", tiny_reward(2))
    write_jsonl(out / "prompts.jsonl", *({"prompt": p} for p in PROMPTS))
    ppo.main(ppo.Config(prompts=str(out / "prompts.jsonl"), out=str(out), updates=3,
                        rollout_size=8, epochs=2, value_warmup=0, max_new_tokens=8, ptx=0.0,
                        device="cpu"))
    return out


def html_of(out, **settings):
    report.main(report.Config(out=str(out), device="cpu", **settings))
    return (out / "report.html").read_text(encoding="utf-8")


# The page


def addresses(html):
    """Return what would make a browser fetch something or run a script."""
    return re.findall(r"https?:|//\w|<script|<link|<img|<iframe|src=|href=|url\(|@import|\son\w+=",
                      html)


@pytest.mark.parametrize("log", ["ppo-seed100", "ppo-beta-0-seed100", "ppo-long-seed100"])
def test_the_page_is_well_formed_and_has_no_address(tmp_path, log):
    html = html_of(published_run(tmp_path / "out", log))
    page = Page(html)
    assert addresses(html) == []
    assert [tag for tag, _ in page.tags].count("h2") == 5
    assert "nan" not in page.text.split() and "None" not in page.text
    assert "prefers-color-scheme:dark" in html and "@media print" in html


def test_the_page_of_a_trained_folder_is_whole(trained):
    """ppo.py wrote it, from prompts without a grader."""
    html = (trained / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert addresses(html) == []
    assert "gold is unknown" in page.text and "missing" not in page.text
    assert "Responses before and after" in page.text and "What each token was paid" in page.text
    assert "score gained most" in page.text
    assert "python" in page.text and "--rollout-size 8" in page.text
    assert "No published runs behind the lines: ppo has other settings" in page.text


def test_150_updates_take_300_kb_and_five_seconds_at_most(tmp_path):
    out = published_run(tmp_path / "out", "ppo-long-seed100")
    start = time.process_time()
    html = html_of(out)
    assert time.process_time() - start < 5
    assert len(html.encode()) < 300_000


def test_hostile_text_stays_text(trained, tmp_path):
    evil = "</b><script>alert(1)</script>\x00\x1b[31m\ud800 <img src=x onerror=y> & \u202e"
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    rows = read_jsonl(out / "ppo-rollout.jsonl")
    for row in rows:
        row["prompt"] = [user(evil)]
        row["response"] = evil
        row["tokens"] = [evil for _ in row["tokens"]]
    write_jsonl(out / "ppo-rollout.jsonl", *rows)
    found = json.loads(record_path(out, "ppo").read_text())
    write_record(record_path(out, "ppo"), found | dict(command=evil, inputs={evil: evil}))
    page = Page(html_of(out))
    assert {"script", "img"} & {tag for tag, _ in page.tags} == set()
    assert "\x1b" not in page.text and "\x00" not in page.text
    assert "<script>alert(1)</script>" in page.text


# Its numbers


def figures(html):
    """Return {title: html of the figure}."""
    found = re.findall(r"<figure>.*?</figure>", html, re.S)
    return {re.search("<figcaption>(.*?) <span>", f)[1]: f for f in found}


def lines_of(figure):
    """Return the lines of a chart: lists of (x, y) in the units of the picture."""
    paths = re.findall(r'<path class="line \w" d="M(.*?)"/>', figure)
    return [[tuple(map(float, p.split())) for p in path.split("L")] for path in paths]


def assert_affine(drawn, values):
    """Assert that a straight scale maps the values to the drawn numbers, to rounding."""
    low, high = min(values), max(values)
    a = drawn[values.index(low)]
    b = drawn[values.index(high)]
    for x, value in zip(drawn, values, strict=True):
        assert abs(x - (a + (b - a) * (value - low) / ((high - low) or 1))) < 0.15


CHARTED = [
    ("Score and gold", 0, "objective/scores", "score {:.2f}"),
    ("Score and gold", 1, "objective/gold", "gold {:.2f}"),
    ("KL to sft", 0, "objective/kl", "KL {:.2f}"),
    ("Entropy", 0, entropy, "entropy {:.2f}"),
    ("Clip fraction", 0, "policy/clipfrac_avg", "clipped {:.1%}"),
    ("Explained variance", 0, "val/explained_variance", "explained {:.2f}"),
    ("Length, end rate", 0, "objective/length", "tokens {:.1f}"),
    ("Length, end rate", 1, end_rate, "ended {:.0%}"),
]


@pytest.fixture(scope="module")
def default_page(tmp_path_factory):
    return html_of(published_run(tmp_path_factory.mktemp("page") / "out"))


@pytest.mark.parametrize("title, number, key, label", CHARTED)
def test_the_lines_are_those_of_the_log(default_page, title, number, key, label):
    rows = rows_of("ppo-seed100.jsonl")
    values = [key(row) if callable(key) else row[key] for row in rows]
    figure = figures(default_page)[title]
    xs, ys = zip(*lines_of(figure)[number])
    assert_affine(xs, [row["update"] for row in rows])
    assert_affine(ys, values)
    assert xs[0] < xs[-1] and ys[values.index(max(values))] <= ys[values.index(min(values))]
    assert f">{label.format(values[-1])}<" in figure


@pytest.mark.parametrize("title, key", [(t, k) for t, n, k, _ in CHARTED if n == 0])
def test_the_ticks_stand_where_their_values_are_drawn(default_page, title, key):
    rows = rows_of("ppo-seed100.jsonl")
    values = [key(row) if callable(key) else row[key] for row in rows]
    figure = figures(default_page)[title]
    drawn = [y for _, y in lines_of(figure)[0]]
    low, high = values.index(min(values)), values.index(max(values))
    slope = (drawn[high] - drawn[low]) / (values[high] - values[low])
    upper = figure.split('class="line')[0]   # of two panels the first
    found = re.findall(r'y="([\d.]+)" text-anchor="end">([-\d.]+)(%?)<', upper)
    assert len(found) >= 2
    for y, number, percent in found:
        value = float(number) / (100 if percent else 1)
        assert abs(float(y) - 4 - drawn[low] - slope * (value - values[low])) < 0.2


def test_the_end_rate_is_the_share_of_responses_with_an_end():
    assert end_rate({"update": 1, "episode": 20, "val/num_eos_tokens": 9}) == 0.9
    assert end_rate({"update": 1}) is None
    assert entropy({"objective/entropy": 6.0, "objective/length": 4.0}) == 1.5


def test_the_verdict_has_the_numbers_of_the_table(default_page):
    table = {row["stage"]: row for row in rows_of("eval-seed100.jsonl")}
    ours, theirs = table["ppo"], table["sft"]
    said = re.search('<p class="verdict">(.*?)</p>', default_page)[1]
    said = re.sub("<.*?>", "", said)
    assert said == (f"On 512 prompts, ppo has gold {ours['gold']:.2f} where sft has "
                    f"{theirs['gold']:.2f}, and wins {ours['win_rate_vs_sft']:.0%} of the pairs, "
                    f"at a KL of {ours['kl_to_sft']:.1f} nats per response; no warnings.")


def test_the_table_has_every_row_and_interval(default_page):
    page = Page(default_page)
    for row in rows_of("eval-seed100.jsonl"):
        if row["stage"] != "reward":
            assert row["stage"] in page.texts
            assert f"{row['gold']:.2f} ± {row['gold_ci']:.2f}" in page.texts
            assert f"{row['lm_loss']:.3f}" in page.texts
        else:
            assert f"{row['polite_vs_rude']:.1%}" in page.texts


def test_the_healthy_table_is_that_of_the_readme(default_page):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Is my PPO run healthy?")[1].split("##")[0]
    listed = re.findall(r"^\| `(.+?)`", section, re.M)
    rows = rows_of("ppo-seed100.jsonl")
    assert listed == list(readings(rows)) == list(WARNINGS_OF)
    page = Page(default_page)
    assert page.texts.count("yes") == len(listed)
    kl = [row["objective/kl"] for row in rows]
    assert f"{kl[0]:.2f} to {kl[-1]:.2f}, highest {max(kl):.2f}" in page.texts


def test_what_the_log_does_not_show_is_not_judged():
    rows = rows_of("ppo-seed100.jsonl")
    assert "val/explained_variance" not in readings(rows[:10])   # of ten updates and more
    assert list(readings(rows, offline=True)) == list(readings(rows))[2:]
    bare = [{"update": row["update"], "objective/scores": row["objective/scores"]} for row in rows]
    assert readings(bare) == {"objective/scores": (
        f"score {bare[0]['objective/scores']:.2f} to {bare[-1]['objective/scores']:.2f}; "
        "gold unknown", True)}


SICK = {   # what to change in a log -> the line of the table that is no longer healthy
    "val/ratio_first": {"val/ratio_first": 1.2},
    "objective/kl": {"objective/kl": 30.0},
    "objective/entropy": {"objective/entropy": 0.1},
    "policy/clipfrac_avg": {"policy/clipfrac_avg": 0.5},
    "val/explained_variance": {"val/explained_variance": -1.0},
    "val/num_eos_tokens": {"val/num_eos_tokens": 0},
    "objective/scores": {"objective/scores": -3.0},
}


@pytest.mark.parametrize("metric", SICK)
def test_a_sick_run_is_told_with_its_updates(tmp_path, metric):
    out = published_run(tmp_path / "out")
    rows = rows_of("ppo-seed100.jsonl")
    for row in rows[40:]:
        row.update(SICK[metric])
    write_jsonl(out / "ppo.jsonl", *rows)
    page = Page(html_of(out))
    assert page.texts.count("no") == 1
    files = read_files(out, "ppo")
    first = rows[0]["objective/entropy"] / rows[0]["objective/length"]
    said = {}
    for row in rows:
        for name, text in warnings(row, first, ppo.Config()).items():
            said.setdefault(name, (text, []))[1].append(row["update"])
    assert found_warnings(files) == said
    for text, updates in said.values():
        assert updates == list(range(40, 60)) and f" {text}" in page.texts
        assert "Update 40, and 19 more times:" in page.texts
    assert bool(said) == (metric != "objective/scores") == ("warning" in page.texts)


# The published runs behind the lines


def bands(html):
    return html.count('class="band"')


def test_default_settings_have_the_published_runs_behind_them(default_page):
    assert bands(default_page) == 8
    assert "Grey: the range of the published runs" in Page(default_page).text


@pytest.mark.parametrize("stage", ["gpt", "reward", "ppo"])
def test_other_settings_have_none_and_say_why(tmp_path, stage):
    out = published_run(tmp_path / "out")
    write_record(record_path(out, stage), record_of(lr=0.5))
    html = html_of(out)
    assert bands(html) == 0
    assert f"{stage} has other settings (lr)" in Page(html).text


def test_another_name_and_no_table_are_no_other_settings(tmp_path):
    out = published_run(tmp_path / "out", table=False)
    assert bands(html_of(out)) == 8
    record_path(out, "ppo").unlink()
    assert bands(html_of(out)) == 0


def test_the_band_is_the_range_of_the_five_logs():
    logs = [rows_of(f"ppo-seed{seed}.jsonl") for seed in range(100, 105)]
    at = {row["update"] for row in logs[1]}
    found = band(published(), "objective/kl")
    assert [x for x, *_ in found] == sorted(x for x in at if x >= 5)
    for update, low, high in found:
        values = [row["objective/kl"] for rows in logs for row in rows if row["update"] == update]
        assert len(values) == 5 and (low, high) == (min(values), max(values))


# Partial folders


@pytest.mark.parametrize("missing", ["gpt.jsonl", "sft.jsonl", "reward.jsonl", "dpo.jsonl",
                                     "eval.jsonl", "ppo.jsonl", "ppo.run.json"])
def test_a_folder_without_one_of_its_files_has_a_page(tmp_path, missing):
    out = published_run(tmp_path / "out")
    (out / missing).unlink()
    html = html_of(out)
    page = Page(html)
    assert addresses(html) == []
    if missing == "eval.jsonl":
        rows = rows_of("ppo-seed100.jsonl")
        assert f"gold goes from {rows[0]['objective/gold']:.2f} to " in page.text
        assert "python evaluate.py" in page.text
    if missing == "ppo.jsonl":
        assert "No update of PPO yet" in page.text


@pytest.mark.parametrize("kept", [["gpt.jsonl"], ["ppo.jsonl"], ["sft.jsonl", "reward.jsonl"]])
def test_a_folder_with_few_files_has_a_page(tmp_path, kept):
    out = published_run(tmp_path / "out")
    for path in list(out.iterdir()):
        if path.name not in kept:
            path.unlink()
    Page(html_of(out))


def test_a_folder_without_logs_is_a_user_error(tmp_path):
    for out in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no log to report on; make one: python ppo.py"):
            html_of(out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gpt", "a/b", ""])
def test_a_name_that_ppo_would_refuse_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="--name"):
        report.main(report.Config(out=str(published_run(tmp_path / "out")), name=name))


def test_a_line_that_a_kill_cut_off_is_left_out_and_others_are_errors(tmp_path):
    out = published_run(tmp_path / "out")
    rows = rows_of("ppo-seed100.jsonl")[:20]
    log = write_jsonl(out / "ppo.jsonl", *rows)
    log.write_text(log.read_text() + '{"update": 20, "objec')
    assert "Stopped after 20 of 60 updates." in Page(html_of(out)).text
    log.write_text(log.read_text() + "\n")
    with pytest.raises(UserError, match=r"ppo.jsonl:21: not a line of JSON"):
        html_of(out)


def test_missing_numbers_leave_gaps(tmp_path):
    """A log has null for a NaN, and logs of other versions lack keys."""
    out = published_run(tmp_path / "out")
    rows = rows_of("ppo-seed100.jsonl")
    for row in rows[:10]:
        row["objective/kl"] = None
    for row in rows:
        del row["val/explained_variance"], row["objective/length"]
    write_jsonl(out / "ppo.jsonl", *rows)
    html = html_of(out)
    Page(html)
    assert "not in this log" in figures(html)["Explained variance"]
    assert len(lines_of(figures(html)["KL to sft"])[0]) == 50


def test_a_table_older_than_the_policy_says_so(tmp_path):
    out = published_run(tmp_path / "out")
    (out / "ppo.pt").write_bytes(b"")
    os.utime(out / "eval.jsonl", (1e9, 1e9))
    text = Page(html_of(out)).text
    assert "This table is older than ppo.pt" in text and "On 512 prompts" not in text


def test_a_damaged_checkpoint_costs_a_section_and_not_the_page(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    (out / "reward.pt").write_bytes(b"damaged")
    text = Page(html_of(out)).text
    assert "A section is missing" in text and "reward.pt" in text and "Is it healthy?" in text


def test_a_report_that_fails_costs_the_run_one_line(trained, monkeypatch, capsys):
    def broken(cfg):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(report, "main", broken)
    report.after_training(ppo.Config(out="out/mine"), graded=False)
    assert capsys.readouterr().out == ("no report (ZeroDivisionError('a bug')); try again: "
                                       "python lab/report.py --out out/mine\n")


# The rollout and the token view


def test_the_last_rollout_is_what_the_last_update_saw(trained, tmp_path, monkeypatch):
    """Its rows, recomputed from what ppo.py's functions received and returned."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    rollouts = Recorder(monkeypatch, ppo, "rollout")
    rewards = Recorder(monkeypatch, ppo, "kl_rewards")
    whitened = Recorder(monkeypatch, ppo.gae, "whiten")
    ppo.main(ppo.Config(prompts=str(out / "prompts.jsonl"), out=str(out), updates=2, beta=0.3,
                        rollout_size=8, epochs=1, value_warmup=0, max_new_tokens=8, ptx=0.0,
                        device="cpu", table=False))
    rows = read_jsonl(out / "ppo-rollout.jsonl")
    b = rollouts.calls[-1][1]
    mask = b.mask.bool()
    columns = dict(logprobs=b.logprobs, ref_logprobs=b.ref_logprobs, values=b.values,
                   rewards=rewards.calls[-1][1], advantages=whitened.calls[-1][1])
    assert len(rows) == 8
    for i, row in enumerate(rows):
        assert (row["update"], row["beta"]) == (1, 0.3)
        assert row["response"] == sft.decode_response(b.responses[i], ENC)
        assert row["ended"] == (b.responses[i][-1] == END)
        assert row["score"] == b.scores[i].item()
        assert len(row["tokens"]) == len(b.responses[i])
        for name, x in columns.items():
            torch.testing.assert_close(torch.tensor(row[name]), x[i][mask[i]], atol=1e-5, rtol=0)
    assert {row["prompt"][0]["content"] for row in rows} == set(PROMPTS)


def test_what_the_tokens_are_paid_adds_up(trained):
    for row in read_jsonl(trained / "ppo-rollout.jsonl"):
        tokens = token_rows(row)
        kl = sum(t["log_ratio"] for t in tokens)
        assert abs(sum(t["penalty"] for t in tokens) + row["beta"] * kl) < 1e-9
        assert abs(sum(t["reward"] for t in tokens) - row["score"] + row["beta"] * kl) < 1e-3
        text = "".join(t["token"] for t in tokens).removesuffix("<|end|>")
        assert text == row["response"] or "\ufffd" in row["response"]   # part of a character


def test_a_token_that_is_part_of_a_character_is_escaped():
    ids = ENC.encode_ordinary("鱷")   # a rare character: several tokens
    assert len(ids) > 1
    texts = [token_text(ENC, token) for token in [*ids, END]]
    assert texts[-1] == "<|end|>" and all("\\x" in text for text in texts[:-1])


def test_the_page_shows_tokens_and_numbers_of_the_rollout(trained):
    html = (trained / "report.html").read_text(encoding="utf-8")
    rows = read_jsonl(trained / "ppo-rollout.jsonl")
    best = max(rows, key=lambda row: row["score"])
    view = html.split("What each token was paid")[1].split("<h3>")[1]
    strips = re.findall(r'<div class="tokens">(.*?)</div>', view)
    assert len(strips) == 2
    for strip in strips:
        assert len(re.findall("<b ", strip)) == len(best["tokens"])
    cells = re.findall(r"<td.*?>(.*?)</td>", view)
    for i, advantage in enumerate(best["advantages"]):
        assert float(cells[9 * i + 8]) == pytest.approx(advantage, abs=6e-4)
        assert float(cells[9 * i + 6]) == pytest.approx(best["rewards"][i], abs=6e-4)
        assert cells[9 * i + 1] == "1"


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    """A folder of the village after two updates of PPO, with ranked responses, no page yet."""
    out = make_reward_run(tmp_path_factory.mktemp("village") / "out")
    ppo.main(ppo.Config(out=str(out), updates=2, rollout_size=16, epochs=1, minibatches=1,
                        value_warmup=0, max_new_tokens=8, ptx=0.0, device="cpu", table=False))
    prompts = read_jsonl(out / "data" / "prompts_val.jsonl")
    write_jsonl(out / "data" / "ranked_val.jsonl", *(
        p | dict(responses=["I do not know.", "Yes.", "You are so dumb."], ranks=[1, 2, 3])
        for p in prompts))
    return out


def test_with_a_grader_rows_have_gold_before_and_after(village):
    rows = with_before(read_files(village, "ppo"), 0, "cpu")
    model, enc = reward.load_reward(village / "reward.pt")
    assert len(rows) == 16
    for row in rows:
        assert row["gold"] == data.village.gold(row["task"], row["response"])
        assert row["before_gold"] == data.village.gold(row["task"], row["before"])
    scores = reward.score_responses(model, enc, [row["prompt"] for row in rows],
                                    [row["before"] for row in rows])
    assert [row["before_score"] for row in rows] == pytest.approx(scores)
    log = read_jsonl(village / "ppo.jsonl")[-1]
    assert log["objective/gold"] == pytest.approx(sum(row["gold"] for row in rows) / 16)
    assert log["objective/scores"] == pytest.approx(sum(row["score"] for row in rows) / 16)


def test_scores_are_grouped_by_gold_and_without_a_grader_by_rank(village):
    records = ranked_records(read_files(village, "ppo"))
    scores = [[3 * i + k for k in range(3)] for i in range(len(records))]
    groups = groups_of(records, scores, data.village.gold)
    assert list(groups) == list(GRADES)
    flat = {}
    for ranked, row in zip(records, scores):
        for response, score in zip(ranked["responses"], row):
            flat[score] = data.village.gold(ranked["task"], response)
    for (low, high), found in zip(((1, math.inf), (0, 1), (-math.inf, 0)), groups.values()):
        assert found == [score for score, grade in flat.items() if low <= grade < high]
    best, others = groups_of(records, scores, None).values()
    assert best == [row[0] for row in scores] and len(others) == 2 * len(best)


def test_the_page_of_the_village_has_the_histogram(village):
    page = Page(html_of(village))
    n = len(read_jsonl(village / "data" / "prompts_val.jsonl"))
    counts = [int(text.split()[0]) for text in page.texts if " responses, mean score" in text]
    assert sum(counts) == 3 * n and "gold below 0: wrong, made up or rude" in page.text


def test_ranked_responses_of_a_user_are_those_that_reward_py_kept(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    path = write_jsonl(tmp_path / "pairs.jsonl", *(
        dict(prompt=f"Who is {i}?", chosen="Ada.", rejected="Tom.") for i in range(40)))
    write_record(record_path(out, "reward"), record_of() | dict(settings=dict(data=str(path))))
    assert len(ranked_records(read_files(out, "ppo"))) == 2   # 5% of the prompts
    assert "best of their prompt" in Page(html_of(out)).text
    path.unlink()
    assert ranked_records(read_files(out, "ppo")) == []


def graded(score, gold, before_score, before_gold):
    return dict(score=score, gold=gold, before_score=before_score, before_gold=before_gold)


def test_eight_responses_are_chosen_by_what_they_show():
    gen = torch.Generator().manual_seed(0)
    rows = [graded(*torch.randn(4, generator=gen).tolist()) for _ in range(40)]
    chosen = choose(rows, seed=0)
    assert [reason for reason, _ in chosen] == [reason for reason in (
        "best", "worst", "score up, gold down", "at random") for _ in range(2)]
    assert len({id(row) for _, row in chosen}) == 8
    golds = sorted(row["gold"] for row in rows)
    assert [row["gold"] for _, row in chosen[:4]] == [*golds[:-3:-1], *golds[:2]]
    for _, row in chosen[4:6]:
        assert row["score"] > row["before_score"] and row["gold"] < row["before_gold"]
    assert choose(rows, seed=0) == chosen


def test_few_responses_are_shown_once():
    rows = [dict(score=1.0), dict(score=2.0), dict(score=0.0)]
    assert [row["score"] for _, row in choose(rows, 0)] == [2, 1, 0]


# chat.py --inspect


def test_measure_equals_the_models(trained):
    policy, enc, _ = gpt.load_model(trained / "ppo.pt")
    reference = gpt.load_model(trained / "sft.pt")[0]
    model = reward.load_reward(trained / "reward.pt")[0]
    prompt = sft.render_prompt([user("Who has a dog?")], enc)
    response = enc.encode_ordinary("The miller.") + [END]
    rows = measure(policy, reference, model, enc, prompt, response, beta=0.2)
    for name, net in (("logprob", policy), ("ref_logprob", reference)):
        logits = net(torch.tensor([prompt + response])).log_softmax(-1)[0]
        for t, token in enumerate(response):
            assert abs(rows[t][name] - logits[len(prompt) + t - 1, token].item()) < 1e-5
    score = reward.score_responses(model, enc, [[user("Who has a dog?")]], ["The miller."])[0]
    assert abs(rows[-1]["score"] - score) < 1e-5
    assert all(abs(r["penalty"] + 0.2 * (r["logprob"] - r["ref_logprob"])) < 1e-9 for r in rows)
    same = measure(reference, reference, None, enc, prompt, response, beta=0.2)
    assert all(r["log_ratio"] == 0 and math.isnan(r["score"]) for r in same)


def test_inspect_shows_the_tokens_that_were_sampled(trained, monkeypatch, capsys):
    views = []
    monkeypatch.setattr(Inspector, "__call__", lambda self, prompt, ids: views.append(
        (prompt, ids)) or "VIEW")
    model, enc, _ = gpt.load_model(trained / "ppo.pt")
    cfg = chat.Config(out=str(trained), device="cpu", max_new_tokens=8)
    monkeypatch.setattr(chat, "read_lines", lambda terminal: iter(["Who?", "Why?"]))
    chat.converse(model, enc, None, False, cfg, False, Inspector(trained, model, enc))
    out, err = capsys.readouterr()
    assert err == "VIEW\nVIEW\n"
    for (prompt, ids), line in zip(views, out.splitlines()):
        assert prompt[-1] == enc.encode_single_token("<|assistant|>")
        assert sft.decode_response(ids, enc) == line or not enc.is_special_token(ids[-1])


def test_inspect_prints_a_table_in_the_terminal(trained):
    done = subprocess.run([sys.executable, ROOT / "chat.py", "--inspect", "--out", str(trained),
                           "--max-new-tokens", "6"], input="Who has a dog?\n", text=True,
                          capture_output=True, encoding="utf-8", check=True)
    head, *rows, last = done.stderr.splitlines()
    assert head.split() == ["token", "mask", "log", "pi", "log", "pi", "ref", "log-ratio", "KL",
                            "penalty", "score"]
    assert 1 <= len(rows) <= 6 and last.startswith("KL ") and "\x1b" not in done.stderr
    assert done.stdout.count("\n") == 1


def test_inspect_needs_what_it_compares_with(trained, tmp_path):
    model, enc, _ = gpt.load_model(trained / "ppo.pt")
    with pytest.raises(UserError, match="sft.pt, which is missing; name its folder with --out"):
        Inspector(tmp_path, model, enc)
    shutil.copy(trained / "sft.pt", tmp_path)
    view = Inspector(tmp_path, model, enc)([1, 2], [3, 4])
    assert "score" not in view   # no reward.pt


def test_colours_of_the_terminal_follow_the_sign():
    rows = [dict(token=t, log_ratio=v) for t, v in (("a", 2.5), ("b", -2.5), ("c", 0.0))]
    blue, red, plain = re.findall(r"(?:\x1b\[97;48;5;(\d+)m)?([abc])", coloured(rows))
    assert [t for _, t in (blue, red, plain)] == ["a", "b", "c"]
    assert int(blue[0]) == 16 + 5 and int(red[0]) == 16 + 36 * 5 and plain[0] == ""


# Replay


def test_csv_reads_back_as_the_log(tmp_path):
    out = published_run(tmp_path / "out")
    report.main(report.Config(out=str(out), csv=True))
    assert not (out / "report.html").exists()
    for stage in ("gpt", "sft", "reward", "dpo", "ppo"):
        with open(out / "csv" / f"{stage}.csv", encoding="utf-8", newline="") as f:
            back = [{k: v for k, v in row.items() if v} for row in csv.DictReader(f)]
        rows = read_jsonl(out / f"{stage}.jsonl")
        assert len(back) == len(rows)
        for found, row in zip(back, rows):
            kept = {k: v for k, v in row.items() if v is not None}
            assert found.keys() == kept.keys()
            assert all(type(kept[k])(found[k]) == kept[k] for k in kept)   # bit for bit


def test_csv_quotes_what_needs_it():
    rows = [{"a": 'x,"y"\n', "b": None}, {"b": 0.1}]
    assert csv_text(rows) == 'a,b\n"x,""y""\n",\n,0.1\n'


def test_the_checksum_is_crc32c():
    """The check value of the catalogue of CRCs, and TFRecord's rotation undone."""
    masked = masked_crc(b"123456789")
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated << 15 | rotated >> 17) & 0xFFFFFFFF == 0xE3069283
    framed = record(b"ab")
    assert framed[:8] == struct.pack("<Q", 2) and framed[12:14] == b"ab" and len(framed) == 18


def test_steps_are_those_of_the_rows():
    rows = [{"step": 3, "loss": 1.0}, {"epoch": 1}, {"update": 7, "kl": 0, "ok": True, "s": "x"}]
    assert [step for step, _ in steps_of(rows)] == [3, 3, 7]
    assert [scalars(row) for row in rows] == [{"loss": 1.0}, {"epoch": 1}, {"kl": 0}]


def test_tensorboard_reads_the_events_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = published_run(tmp_path / "out")
    for _ in range(2):   # the second copy replaces the first
        report.main(report.Config(out=str(out), tensorboard=str(tmp_path / "runs")))
    for stage in ("gpt", "ppo"):
        events = accumulator.EventAccumulator(str(tmp_path / "runs" / stage),
                                              size_guidance={"scalars": 0})
        events.Reload()
        rows = read_jsonl(out / f"{stage}.jsonl")
        tags = {k for row in rows for k, v in row.items() if isinstance(v, int | float)}
        assert set(events.Tags()["scalars"]) == tags - {"step", "update"}
        for tag in events.Tags()["scalars"]:
            wanted = [(step, v[tag]) for step, v in steps_of(rows) if v.get(tag) is not None]
            found = [(e.step, e.value) for e in events.Scalars(tag)]
            single = [(s, struct.unpack("<f", struct.pack("<f", v))[0]) for s, v in wanted]
            assert found == single


def test_an_event_file_begins_with_its_version(tmp_path):
    assert b"brain.Event:2" in event_file([])
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UserError, match="--tensorboard .*: this is a file"):
        report.main(report.Config(out=str(published_run(tmp_path / "out")), tensorboard=str(path)))


def test_wandb_gets_every_number_and_is_asked_for_only_then(tmp_path, monkeypatch):
    out = published_run(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb: the package is not installed"):
        report.main(report.Config(out=str(out), wandb=True))
    logged = {}

    class FakeRun:
        def __init__(self, project, name):
            assert project == "out"
            self.rows = logged.setdefault(name, [])

        def log(self, row, step):
            self.rows.append((step, row))

        def finish(self):
            pass

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=FakeRun))
    report.main(report.Config(out=str(out), wandb=True))
    rows = read_jsonl(out / "ppo.jsonl")
    assert logged["ppo"] == [(step, scalars(row)) for step, row in steps_of(rows)]
    assert set(logged) == {"gpt", "sft", "reward", "dpo", "ppo"}


# The drawing


@pytest.mark.parametrize("low, high", [(0, 1), (-0.4, 0.7), (0, 1e-6), (3, 20_000), (-5, -4.9)])
def test_ticks_are_round_inside_and_few(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in found)
    steps = {round((b - a) / (high - low), 6) for a, b in zip(found, found[1:])}
    assert len(steps) == 1


def test_an_axis_holds_all_values():
    assert limits([2.0]) == (1.5, 2.5)
    low, high = limits([1.0, 3.0], least=0)
    assert low == 0 and high > 3


def test_labels_keep_their_distance_and_stay_above_the_axis():
    for heights in ([10, 11], [50, 10, 48], [100, 99, 98]):
        moved = spread_labels(heights, lowest=100)
        order = sorted(moved)
        assert all(b - a >= 12 - 1e-9 for a, b in zip(order, order[1:])) and order[-1] <= 100
        assert sorted(range(len(heights)), key=heights.__getitem__) == sorted(
            range(len(heights)), key=moved.__getitem__)
    assert spread_labels([10, 50], lowest=100) == [10, 50]


def test_a_label_has_the_last_value():
    assert Line([(0, 1.0), (1, 0.126)], "gold").label() == "gold 0.13"


def test_text_is_escaped_for_html():
    assert escape('<a b="c">&\x07\ud800') == "&lt;a b=&quot;c&quot;&gt;&amp;\ufffd?"


def test_series_skip_what_is_no_number():
    rows = [{"update": 0, "a": 1}, {"update": 1, "a": None}, {"update": 2}, {"update": 3, "a": "x"}]
    assert series(rows, "a") == [(0, 1)]


def test_the_interval_of_a_share_is_wilsons():
    """7 of 10: 0.397 to 0.892, as tables have it; its half is that of the centre."""
    assert share_interval(0.7, 10) == pytest.approx((0.892 - 0.397) / 2, abs=1e-3)
