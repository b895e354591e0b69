"""results/: every file says where it comes from, the tables are those of the files, and make.py
runs, skips, resumes and stops as it says."""
import importlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import pytest

from results import figures, keep, make, real
from scaffold import record
from scaffold.cli import UserError, parse
from tiny import ROOT, write_jsonl

RESULTS = ROOT / "results"
LOGS = sorted(RESULTS.glob("*.jsonl"))
STEPS = make.all_steps()
REAL_STEPS = real.all_steps(Path("real"))
MADE = {name: step for step in [*STEPS, *REAL_STEPS] for name in step.files}   # file -> its step

BY_HAND = {                     # no step makes them, and their seeds are below 100
    "bench": "speed, beside programs that are not installed here",
    "chain": "speed of two commits",
    "memory": "two commits",
    "optimizer": "settings were chosen with these runs, so their seeds are not reported ones",
    "optimizer-sweep": "the same",
    "real-seed-tasks": "counts, by results/real.py",
    "real-text": "a text that is not in this repository",
}


# The published files


def test_every_step_and_run_by_hand_has_its_file():
    assert set(MADE) | set(BY_HAND) == {path.stem for path in LOGS}


@pytest.mark.parametrize("path", [p for p in LOGS if p.stem in MADE], ids=lambda path: path.stem)
def test_a_file_says_how_it_was_made_on_a_reported_seed(path):
    check_published(path, MADE[path.stem])


def check_published(path, step):
    first, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert set(first) == set(keep.HEADER)
    assert first["commit"]
    assert first["settings"] == step.settings
    seeds = [row["seed"] for row in [first, *rows] if "seed" in row]
    assert [seed for seed in seeds if seed not in make.SEEDS] == []
    assert rows
    lines = [json.dumps(row) for row in rows]
    assert len(set(lines)) == len(lines)        # a script that starts again empties its log


@pytest.mark.parametrize("changed, row, good", [
    ({}, {"seed": 101}, True),
    ({"seed": 0}, {}, False),
    ({"seed": 99}, {}, False),
    ({"seed": 105}, {}, False),
    ({}, {"seed": 7}, False),
    ({"commit": None}, {}, False),
    ({"settings": "python ppo.py"}, {}, False),
    ({"host": "here"}, {}, False),
])
def test_the_check_refuses_other_seeds_commands_and_lines(tmp_path, changed, row, good):
    step = STEPS[0]
    path = tmp_path / "x.jsonl"
    first = keep.header(step.seed, step.settings) | {"commit": "36c0f7d"} | changed
    path.write_text(json.dumps(first) + "\n" + json.dumps(row))
    if good:
        check_published(path, step)
        path.write_text(json.dumps(row))        # without the line
    with pytest.raises(AssertionError):
        check_published(path, step)


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_a_published_log_has_nothing_to_leave_out(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.stem in MADE:
        assert keep.keep(lines, MADE[path.stem].every) == lines
    else:
        assert keep.keep(lines, 5 if path.stem.startswith("ppo-no-ptx") else 1) == lines


def test_the_folder_is_small():
    assert len(LOGS) > 40
    files = [path for path in RESULTS.iterdir() if path.is_file()]
    sizes = {path: path.stat().st_size for path in files}
    assert sum(size for path, size in sizes.items() if path.suffix != ".png") < 1_000_000
    assert all(size < 250_000 for path, size in sizes.items() if path.suffix == ".png")


# The tables


def test_the_tables_of_both_readmes_are_those_of_the_files(tmp_path):
    for name, made in ((figures.README, figures.tables()),
                       (figures.FRONT, {"results": figures.front_results()})):
        copy = tmp_path / "README.md"
        copy.write_bytes(name.read_bytes())
        figures.write_tables(copy, made)
        assert copy.read_bytes() == name.read_bytes()


def test_every_mark_of_the_readmes_is_of_a_table():
    marks = [figures.README.read_text().count("made by figures.py -->"),
             figures.FRONT.read_text().count("made by figures.py -->")]
    assert marks == [len(figures.tables()), 1]


def test_the_readme_is_short():
    text = figures.FRONT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    assert len(text.split()) <= 1600


def test_a_table_without_its_marks_is_an_error(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Results\n")
    with pytest.raises(SystemExit, match="no <!-- table A"):
        figures.write_tables(path, {"A": "|a|"})


def test_the_row_of_the_reward_model_is_in_table_b_alone(monkeypatch):
    policy = dict(stage="ppo", gold=0.5, refused_rate=0.25, gold_minus_greedy_ci=0.06)
    probes = dict(stage="reward", right_vs_wrong=0.75, n_right_vs_wrong=80, wish_vs_none=None)
    runs = dict(eval={0: [policy, probes]}, reward={})
    monkeypatch.setattr(figures, "load", runs.get)
    assert "| ppo | 0.50 | - | - | 25% |" in figures.table_a()
    assert "| reward |" not in figures.table_a()
    assert "| right vs wrong | 0.75 | 80 |" in figures.table_b()
    assert "| wish vs none | - | - |" in figures.table_b()


@pytest.mark.parametrize("values, text", [
    ([0.1, 0.5, 0.3], "0.30 (0.10 to 0.50)"),
    ([0.201, 0.202], "0.20"),
    ([0.5, None], "0.50"),
    ([None], "-"),
])
def test_spread_is_the_mean_and_the_range(values, text):
    assert figures.spread(values) == text


def cells(table):
    """Return a Markdown table as lists of cells, without the line below the heads."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Return {stage: golds} of three made-up runs in place of results/, published as by make.py."""
    rng = random.Random(0)
    golds = {stage: [] for stage in ("base", "ppo")}
    for seed in (100, 101, 102):
        rows = []
        for stage in golds:
            golds[stage].append(rng.random())
            rows.append({"stage": stage, "seed": seed, "gold": golds[stage][-1], "kl_to_sft": None})
        source = tmp_path / "eval"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        keep.publish(source, tmp_path / f"eval-seed{seed}.jsonl", keep.header(seed, "python x.py"))
    monkeypatch.setattr(figures, "HERE", tmp_path)
    return golds


def test_the_front_table_has_the_means_of_the_seeds(evaluated):
    table = figures.front_results().split("\n\n")[0]
    heads, *lines = cells(table)
    found = {line[0]: line[heads.index("gold")] for line in lines}
    for stage in figures.FRONT_STAGES:
        golds = evaluated.get(stage)
        assert found[stage] == (f"{statistics.mean(golds):.2f}" if golds else "-")


def test_the_first_line_of_a_file_is_no_row_of_a_table(evaluated):
    assert [len(rows) for rows in figures.load("eval").values()] == [2, 2, 2]
    headers = figures.read_headers()
    assert sorted(headers) == [f"eval-seed{seed}.jsonl" for seed in (100, 101, 102)]
    (line,) = cells(figures.table_commits())[1:]
    assert line[-2:] == ["3", "100, 101, 102"]


def test_a_table_of_any_experiment_is_the_mean_over_its_rows_and_the_range_over_its_seeds():
    rng = random.Random(0)
    rows = []
    for seed in (100, 101, 102):
        for run in ("one", "all"):
            for epoch in (1, 4):
                for task in range(5):
                    rows.append({"run": run, "seed": seed, "epoch": epoch, "gold": rng.random(),
                                 "tokens": rng.randrange(9000), "sample": f"{seed} {task}",
                                 "curve": [1, 2]})
    rng.shuffle(rows)
    assert figures.split_keys(rows) == (["run", "epoch"], ["gold", "tokens"])
    heads, *lines = cells(figures.lab_table(rows))
    assert heads == ["run", "epoch", "gold", "tokens"]
    assert {tuple(line[:2]) for line in lines} == {(r, e) for r in ("one", "all") for e in "14"}
    for run, epoch, gold, tokens in lines:
        chosen = [r for r in rows if r["run"] == run and r["epoch"] == int(epoch)]
        of_seeds = [statistics.mean(r["gold"] for r in chosen if r["seed"] == seed)
                    for seed in (100, 101, 102)]
        assert gold == figures.spread(of_seeds)
        assert f"{statistics.mean(r['tokens'] for r in chosen):,.0f}" in tokens


def test_smooth_keeps_a_line_and_takes_away_noise():
    line = [2.0 * n for n in range(30)]
    assert figures.smooth(line)[4:-4] == pytest.approx(line[4:-4])
    rng = random.Random(0)
    noise = [rng.gauss(0, 1) for _ in range(300)]
    assert statistics.stdev(figures.smooth(noise)) < statistics.stdev(noise) / 2


# keep.py


@pytest.mark.parametrize("row, published", [
    ({"step": 1, "loss": 0.5}, False),
    ({"step": 1, "loss": 0.5, "val_loss": 0.6}, True),
    ({"step": 1, "eval_loss": 0.6}, True),
    ({"epoch": 1, "val_loss": 0.6}, True),
    ({"split": "held-out users"}, True),
    ({"config": {"out": "out"}}, False),
])
def test_training_steps_are_not_published(row, published):
    assert keep.is_report(row) == published


def test_every_thins_out_the_updates_and_keeps_the_last():
    lines = [json.dumps({"update": n}) for n in range(13)]
    kept = [json.loads(line)["update"] for line in keep.keep(lines, every=5)]
    assert kept == [0, 5, 10, 12]


def test_the_first_line_names_no_machine_and_no_place():
    first = keep.header(100, "python ppo.py")
    assert set(first) == set(keep.HEADER)
    text = json.dumps(first)
    assert str(ROOT) not in text
    assert platform.node() not in text
    assert os.path.expanduser("~") not in text


@pytest.mark.parametrize("path, dirty", [
    ("ppo.py", True),
    ("results/make.py", True),
    ("results/x.jsonl", False),
    ("results/README.md", False),
    ("README.md", False),
])
def test_dirty_means_that_the_code_differs_from_the_commit(tmp_path, monkeypatch, path, dirty):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / path).write_text("1")
    assert keep.header(100, "")["commit"] is None        # no repository yet
    for command in ("init", "add .", "-c user.name=a -c user.email=a commit -m a"):
        assert record.git(*command.split()).returncode == 0
    (tmp_path / "notes").write_text("untracked")
    assert not keep.header(100, "")["dirty"]
    (tmp_path / path).write_text("2")
    first = keep.header(100, "")
    assert first["dirty"] == dirty
    assert record.git("rev-parse", first["commit"]).returncode == 0


# make.py: the steps


def test_the_files_of_the_steps_differ():
    names = [name for step in STEPS for name in step.files]
    assert len(set(names)) == len(names)
    metrics = [(step.folder, name) for step in STEPS for name in step.files.values()]
    twice = {pair for pair in metrics if metrics.count(pair) > 1}
    # The second run of self_instruct.py writes over the log of the first, which is published then.
    assert {name for _, name in twice} == {"self_instruct"}


def test_the_seeds_are_reported_ones():
    assert {step.seed for step in STEPS} == set(make.SEEDS) == set(range(100, 105))
    assert {step.seed for step in STEPS if step.source} <= set(make.LONG_SEEDS)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_command_has_flags_that_its_script_knows(step):
    if not (ROOT / step.script).exists():
        pytest.skip(f"no {step.script}")
    script = importlib.import_module(step.script.removesuffix(".py").replace("/", "."))
    cfg = parse(script.Config, "", step.settings.split()[2:])
    assert cfg.seed == step.seed
    assert cfg.out == f"out/{step.folder}"
    assert hasattr(cfg, "resume") == (step.script in make.RESUMABLE)


# make.py: running them

FAKE = """
import argparse, json, os, sys, time
from pathlib import Path
p = argparse.ArgumentParser()
for flag in ("--seed", "--out", "--name", "--seconds"):
    p.add_argument(flag, default=0)
for flag in ("--fail", "--mute", "--resume"):
    p.add_argument(flag, action="store_true")
a = p.parse_args()
out = Path(a.out)
out.mkdir(parents=True, exist_ok=True)
print("seen", sorted(path.name for path in out.iterdir()))
row = {"began": time.time(), "resume": a.resume, "threads": os.environ["OMP_NUM_THREADS"]}
time.sleep(float(a.seconds))
if a.fail and not Path("mended").exists():
    sys.exit("something broke")
if not a.mute:
    (out / f"{a.name}.jsonl").write_text(json.dumps(row | {"ended": time.time()}) + "\\n")
"""


@pytest.fixture
def tree(tmp_path):
    """Return a folder with a script that can resume, ppo.py, one that cannot, and results/."""
    (tmp_path / "results").mkdir()
    for script in ("ppo.py", "other.py"):
        (tmp_path / script).write_text(FAKE)
    return tmp_path


def fake(name, folder, flags="", script="other.py", source=""):
    return make.Step(script, f"--name {name} {flags}", 100, folder, {name: name}, source=source)


def run(tree, steps, jobs=2):
    make.Maker(steps, tree, jobs, pause=0.02).run()


def rows(tree, steps):
    """Return the published row of each step."""
    found = []
    for step in steps:
        lines = (tree / "results" / f"{step.name}.jsonl").read_text().splitlines()
        first, row = map(json.loads, lines)
        assert first["settings"] == step.settings
        found.append(row)
    return found


def most_at_once(intervals):
    return max(sum(a["began"] <= b["began"] < a["ended"] for a in intervals) for b in intervals)


@pytest.mark.parametrize("jobs", [1, 2])
def test_steps_run_some_at_a_time_with_one_thread_each(tree, jobs):
    steps = [fake(f"s{n}", f"run{n}", "--seconds 0.5") for n in range(4)]
    run(tree, steps, jobs)
    made = rows(tree, steps)
    assert most_at_once(made) == jobs
    assert {row["threads"] for row in made} == {"1"}


def test_steps_of_one_folder_run_one_after_the_other(tree):
    steps = [fake(f"s{n}", "run", "--seconds 0.1") for n in range(4)]
    run(tree, steps)
    made = rows(tree, steps)
    assert most_at_once(made) == 1
    assert [row["began"] for row in made] == sorted(row["began"] for row in made)


def test_a_second_start_skips_what_is_done(tree):
    steps = [fake(f"s{n}", f"run{n}") for n in range(3)]
    run(tree, steps)
    before = rows(tree, steps)
    (tree / "results" / "s1.jsonl").unlink()
    steps[2] = fake("s2", "run2", "--seconds 0.01")      # other settings
    run(tree, steps)
    assert [a == b for a, b in zip(before, rows(tree, steps))] == [True, False, False]


@pytest.mark.parametrize("flag, problem", [
    ("--fail", "exit code 1"),
    ("--mute", "no out/run1/bad.jsonl"),
])
def test_the_first_failure_is_the_end_and_the_next_start_goes_on(tree, flag, problem):
    slow = fake("slow", "run0", "--seconds 0.5")
    bad = fake("bad", "run1", flag)
    later = [fake("same_folder", "run1"), fake("other_folder", "run2")]
    steps = [slow, bad, *later]
    with pytest.raises(UserError, match=f"{problem}.*; see .*bad.log"):
        run(tree, steps)
    assert make.Maker(steps, tree).is_done(slow)          # it ran and came to its end
    assert not [step for step in (bad, *later) if make.Maker(steps, tree).is_done(step)]
    assert not (tree / "out" / "run2").exists()
    if flag == "--fail":
        assert "something broke" in (tree / "out" / "make" / "bad.log").read_text()
        (tree / "mended").touch()
        before = rows(tree, [slow])
        run(tree, steps)
        assert rows(tree, steps)[:1] == before


@pytest.mark.parametrize("script, resumes", [("ppo.py", True), ("other.py", False)])
def test_an_interrupted_step_resumes_or_starts_again(tree, script, resumes):
    steps = [fake("a", "run", "--fail", script=script)]
    with pytest.raises(UserError):
        run(tree, steps)
    state = tree / "out" / "run" / "long" / "gpt.state"   # left by a stage that was killed
    state.parent.mkdir()
    state.touch()
    (tree / "mended").touch()
    run(tree, steps)
    assert rows(tree, steps)[0]["resume"] == resumes
    assert state.exists() == resumes                      # a script that resumes deletes its own


def test_a_copy_is_made_of_what_stands_above_it(tree):
    steps = [fake("first", "run", "--seconds 0.3", script="ppo.py"),
             fake("second", "run", script="ppo.py"),
             fake("in_copy", "run-copy", source="run"),
             fake("again", "run-copy", source="run"),
             fake("third", "run", script="ppo.py")]
    (tree / "out" / "make").mkdir(parents=True)
    (tree / "out" / "make" / "first.log").touch()          # an earlier start was stopped
    (tree / "out" / "run").mkdir()
    (tree / "out" / "run" / "ppo.state.old").touch()
    run(tree, steps)
    seen = (tree / "out" / "make" / "in_copy.log").read_text()
    assert "'first.jsonl', 'second.jsonl'" in seen
    assert "state" not in seen                             # it is of a step of the other folder
    assert (tree / "out" / "run" / "ppo.state.old").exists()
    assert "in_copy.jsonl" in (tree / "out" / "make" / "again.log").read_text()
    assert not (tree / "out" / "run" / "in_copy.jsonl").exists()


def test_a_run_of_another_origin_is_refused(tree):
    (tree / "out" / "run").mkdir(parents=True)
    with pytest.raises(UserError, match="not made by results/make.sh"):
        run(tree, [fake("a", "run")])


def test_steps_of_other_commits_are_named(tree, capsys):
    steps = [fake("a", "run")]
    run(tree, steps)
    run(tree, steps)
    assert "other commits" not in capsys.readouterr().out
    mark = make.Maker(steps, tree).mark(steps[0])
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"commit": "0ld"}))
    run(tree, steps)
    assert "1 of 1 steps are done, but at other commits: 0ld" in capsys.readouterr().out


def test_an_interrupt_waits_for_the_steps_that_save_their_state(tree, monkeypatch):
    steps = [fake("a", "run", "--seconds 0.5")]
    maker = make.Maker(steps, tree, pause=0.02)
    started = []
    begin = maker.begin
    monkeypatch.setattr(maker, "begin", lambda step: started.append(begin(step)) or started[-1])

    def press(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", press)
    with pytest.raises(KeyboardInterrupt):
        maker.run()
    assert started[0].process.poll() is not None
    assert not maker.is_done(steps[0])


@pytest.mark.parametrize("failing", ["", "make.py"])
def test_make_sh_makes_the_files_and_then_the_tables(tmp_path, failing):
    (tmp_path / "results").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(RESULTS / "make.sh", tmp_path / "results")
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> calls\ncase "$1" in *{failing or "none"}) exit 2;; '
                      f'esac\n')
    python.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(["bash", tmp_path / "results" / "make.sh", "--jobs", "3"], cwd="/",
                          env=os.environ | {"PATH": path})
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "results/make.py --jobs 3"
    assert calls[1:] == ([] if failing else ["results/figures.py"])
    assert done.returncode == (2 if failing else 0)


# real.py


def test_pairs_of_one_first_question_are_in_one_part():
    def pair(question, rest):
        return {"chosen": f"\n\nHuman: {question}\n\nAssistant: {rest}", "rejected": "no"}

    held_out = [{real.is_held_out(pair(f"question {i}?", rest)) for rest in ("a", "b\n\nHuman: c")}
                for i in range(200)]
    assert all(len(parts) == 1 for parts in held_out)
    assert 20 < sum(parts == {True} for parts in held_out) < 60   # a fifth


def test_seed_tasks_are_filtered_against_those_before(tmp_path):
    def task(instruction, output="yes"):
        instances = [{"input": "", "output": output}]
        return {"instruction": instruction, "is_classification": False, "instances": instances}

    instructions = [f"Tell me what the {animal} likes to eat {time}."
                    for animal, time in zip("cow dog hen cat pig fox owl".split(), "abcdefg")]
    tasks = [*map(task, instructions), task(instructions[0]), task("Too short."),
             task("Write a list of foods that the cow likes:", "Here they are:")]
    write_jsonl(tmp_path / "seeds.jsonl", *tasks)
    row = real.filter_seed_tasks(tmp_path / "seeds.jsonl")
    assert sum(row["instructions"].values()) == sum(row["instances"].values()) == 10
    assert row["instructions"]["short"] == 1
    assert row["instructions"]["rouge"] >= 1
    assert row["instances"] == {"kept": 9, "ends with a colon": 1}


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="input.txt is missing; see --help"):
        real.main(real.Config(files=str(tmp_path)))
