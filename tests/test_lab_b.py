"""Properties of lab/cot.py, icl.py, templates.py and forgetting.py: the data say what they claim, and the verdicts follow the numbers.

The generators are checked against solvers written anew from the question's words; every verdict is turned both ways.
"""
import itertools
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402
import sft  # noqa: E402
from data import corpus, village  # noqa: E402
from lab import cot, forgetting, icl, templates  # noqa: E402

ENC = gpt.get_tokenizer()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with a one-layer model that has learned nothing, and the village's files cut short."""
    out = tmp_path_factory.mktemp("run")
    corpus.write(out / "data", seed=0, megabytes=0.15)
    for name in corpus.SIZES:
        path = out / "data" / f"{name}.jsonl"
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:20]), encoding="utf-8")
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 128, 1, 2, 16))
    for name in ("gpt.pt", "sft.pt"):
        gpt.save_model(out / name, model, ENC, "", seed=0, data=str(out / "data" / "pretrain"), val_fraction=0.2, mixture="")
    return out


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Sums

def test_a_sum_agrees_with_a_solver_that_reads_the_question():
    prices = dict(zip("cake bread soup cheese honey jam milk tea".split(), [9, 4, 5, 7, 8, 3, 1, 2]))
    rng = random.Random(0)
    for _ in range(300):
        size = rng.choice([2, 3, 4])
        task = cot.make_sum(rng, size)
        named = [w for w in task["question"].rstrip("?").replace(",", "").split() if w in prices]
        assert named == task["foods"] and len(set(named)) == size
        assert task["total"] == sum(prices[f] for f in named)


def test_the_steps_lead_to_the_answer_one_price_at_a_time():
    rng = random.Random(1)
    for _ in range(300):
        task, total = cot.make_sum(rng, rng.choice([2, 3, 4])), 0
        steps = task["steps"].split(". ")
        assert len(steps) == len(task["foods"])
        for food, step in zip(task["foods"], steps):
            name, *numbers = step.rstrip(".").replace(",", "").split()
            total += cot.PRICE[food]
            assert name == food and [int(x) for x in numbers] in ([cot.PRICE[food], total], [total])
        assert cot.chat_of(task, True)[1]["content"] == f"{task['steps']} So {total}."
        assert cot.chat_of(task, False)[1]["content"] == f"{total}."


def test_the_last_number_of_an_answer_is_read_whole_or_not_at_all():
    rng = random.Random(2)
    for _ in range(50):
        task = cot.make_sum(rng, 3)
        for steps in (True, False):
            assert cot.final_number(cot.chat_of(task, steps)[1]["content"]) == task["total"]
    for text, number in [("12", 12), ("12.", 12), (" 12. ", 12), ("So 7. no", None), ("", None), ("12 coins.", None), ("1 2.", 2), ("²", None), ("x12.", None)]:
        assert cot.final_number(text) == number


def test_training_and_test_share_no_set_of_foods_in_any_order():
    for seed in range(3):
        rng = random.Random(seed)
        drawn = {test: {frozenset(cot.draw_sum(rng, size, seed, test)["foods"]) for size in (2, 3, 4) for _ in range(200)} for test in (True, False)}
        assert not drawn[True] & drawn[False]
        assert 15 < len(drawn[True]) < 50 < len(drawn[False])   # a fifth of the 154 sets, and most of the others
    splits = [[cot.held_out(pair, seed) for pair in itertools.combinations(cot.PRICE, 2)] for seed in range(5)]
    assert len(set(map(tuple, splits))) == 5   # every seed has a split of its own
    assert all(cot.held_out(f, 0) == cot.held_out(f[::-1], 0) for f in (["tea", "jam"], ["cake", "tea", "milk"], ["soup", "jam", "honey"]))


def test_sums_for_training_have_equal_tokens_or_equal_number():
    for seed in range(2):
        steps, answers = (cot.training_sums(ENC, seed, s, tokens=20_000) for s in (True, False))
        a, b = cot.size_of(steps, ENC), cot.size_of(answers, ENC)
        assert abs(a - b) < 0.01 * a and a >= 20_000
        assert len(answers) > 1.4 * len(steps)
        same = cot.training_sums(ENC, seed, False, n=len(steps))
        asked = [[c["messages"][0]["content"] for c in chats] for chats in (steps, same, answers)]
        assert asked[0] == asked[1] == asked[2][:len(steps)]       # the very same sums, one with its steps and one without
        assert cot.size_of(same, ENC) < 0.75 * a


def cot_rows(new, gold, seeds=2):
    return [dict(run=run, seed=s, new_sums=new[run][s], gold=gold[run][s]) for run in ("steps", "answers", "none") for s in range(seeds)]


def test_the_verdict_on_steps_follows_the_numbers():
    new, gold = dict(steps=[.5, .6], answers=[.1, .2], none=[0, 0]), dict(steps=[.1, .1], answers=[.5, .5], none=[.1, .1])
    assert "claim holds" in cot.verdict(cot_rows(new, gold)) and "+40 points" in cot.verdict(cot_rows(new, gold))
    assert "does not hold" in cot.verdict(cot_rows({**new, "steps": [.9, .25]}, gold))            # one seed gains five points only
    assert "does not hold" in cot.verdict(cot_rows({**new, "answers": [.5, .6]}, gold))
    assert "does not hold" in cot.verdict(cot_rows(new, {**gold, "none": [.2, .2]}))              # the usual tasks lost a tenth
    assert "claim holds" in cot.verdict(cot_rows(new, {**gold, "none": [.2, .05]}))               # within the allowance on average


def test_tune_yields_after_every_epoch_and_learns():
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 32, 1, 2, 16)).eval()
    examples = sft.tokenize([{"messages": cot.chat_of(cot.make_sum(random.Random(i), 2), False)} for i in range(20)], ENC, 32)
    losses = [sft.evaluate(model, examples, torch.device("cpu"))]
    for epoch in sft.tune(model, examples, 3, 128, 1e-2, 0):
        assert epoch == len(losses) and not model.training
        losses.append(sft.evaluate(model, examples, torch.device("cpu")))
    assert len(losses) == 4 and losses[0] > losses[1] > losses[2] > losses[3]


def test_spread_is_the_mean_and_the_extremes():
    assert cot.spread([0.1, 0.5, 0.3]) == "0.30 (0.10..0.50)"
    assert cot.spread([0.123], 3) == "0.123"


# Pages of examples

def test_the_examples_are_right():
    rng = random.Random(0)
    for _ in range(100):
        text, label = icl.tone(rng)
        assert (label == "This is happy") == any(m in text for m in ("happy", "proud", "merry"))
        text, label = icl.manners(rng)
        assert (label == "This is rude") == bool(village.RUDE_WORDS.search(text) or "Not you again" in text)
    for name, (draw, labels) in icl.TESTED.items():
        assert {draw(rng)[1] for _ in range(400)} == set(labels)
    assert not set(icl.TESTED) & set(icl.READ)      # what the copy reads on is never what it is asked
    for name, verb in (("sound", "says"), ("feed", "eats")):
        text, label = icl.TESTED[name][0](rng)
        assert icl.line(text, label) == f"The {text[4:]} {verb} {village.FACTS[name][text[4:]]}.\n"


TRUTH = {name: dict(draw(random.Random(i)) for i in range(1500)) for name, (draw, _) in icl.TESTED.items()}


def examples_in(body):
    """The examples of a page as (text, label), read back with every text and label of every task."""
    texts, labels, found = sorted({t for truth in TRUTH.values() for t in truth}), [x for _, ls in icl.TESTED.values() for x in ls], []
    while body:
        text, label = next((t, x) for t in texts if body.startswith(t) for x in labels if body.startswith(f"{t}{x}.\n"))
        found.append((text, label))
        body = body.removeprefix(f"{text}{label}.\n")
    return found


@pytest.mark.parametrize("name", icl.TESTED)
def test_what_the_pages_show(name):
    draw, labels = icl.TESTED[name]
    truth, moved = TRUTH[name], 0
    for i in range(30):
        query = draw(random.Random(i))[0]
        pages = {kind: icl.page(kind, 8, name, query, random.Random(f"p{i}")) for kind in icl.PAGES}
        assert all(p.endswith(query) for p in pages.values())
        bodies = {kind: p.removesuffix(query) for kind, p in pages.items()}
        right, shuffled, wrong, foreign = (examples_in(bodies[k]) for k in icl.PAGES[:4])
        assert len(right) == len(shuffled) == len(wrong) == len(foreign) == 8
        assert all(text != query and label == truth[text] for text, label in right)
        assert [t for t, _ in right] == [t for t, _ in shuffled] == [t for t, _ in wrong]                 # the same texts
        assert sorted(x for _, x in right) == sorted(x for _, x in shuffled)                              # the same labels in all
        assert all(label != truth[text] and label in labels for text, label in wrong)
        assert not {x for _, x in foreign} & set(labels) and not {t for t, _ in foreign} & set(truth)
        assert bodies["other format"] == "".join(f"{label.strip()}: {text.strip()}\n" for text, label in right)
        moved += sum(a != b for a, b in zip(right, shuffled))
    assert moved > 30


def test_fewer_examples_are_the_beginning_of_more():
    for kind in icl.PAGES:
        pages = [icl.page(kind, shots, "tone", "Tom is sad.\n", random.Random(1)) for shots in icl.SHOTS]
        heads = [p.removesuffix("Tom is sad.\n") for p in pages]
        assert heads[0] == "" and all(b.startswith(a) and len(b) > len(a) for a, b in zip(heads, heads[1:]))
    longest = max(len(ENC.encode_ordinary(icl.page(k, 8, n, icl.TESTED[n][0](random.Random(i))[0], random.Random(i))))
                  for k in icl.PAGES for n in icl.TESTED for i in range(20))
    assert longest + 12 < 128      # fits the context, answer included


def test_the_likeliest_label_is_that_of_the_sums_written_out():
    torch.manual_seed(1)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 64, 1, 2, 16)).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p)
    prompts, labels = [f"{word}\n" for word in village.WORDS["animal"] + village.WORDS["food"]], ["meow", "moo", "happy", "sad", " says moo"]

    def best(stop):
        found = []
        for prompt in prompts:
            scores = []
            for label in labels:
                start, said = ENC.encode_ordinary(prompt), ENC.encode_ordinary(label + stop)
                logprobs = model(torch.tensor([start + said]))[0].log_softmax(-1)
                scores.append(sum(logprobs[len(start) + i - 1, t].item() for i, t in enumerate(said)))
            found.append(labels[scores.index(max(scores))])
        return found
    expected = best(".")
    assert icl.likeliest(model, ENC, prompts, labels, torch.device("cpu"), batch=7) == expected
    assert len(set(expected)) > 1 and expected != best("")      # the full stop counts: "moo" must not win as the start of "moon"


def icl_rows(right, none, **others):
    values = {"right": right, "shuffled": right, "wrong": right, "other domain": none, "other format": none} | others
    return ([dict(model="base", seed=s, page=k, shots=n, task=t, likely=v if n > 2 else none, generated=0)
             for k, v in values.items() for n in (1, 2, 4, 8) for s in range(2) for t in "ab"]
            + [dict(model="base", seed=s, page="right", shots=0, task=t, likely=none, generated=0) for s in range(2) for t in "ab"])


def test_the_verdict_on_examples_follows_the_numbers():
    assert "claim holds here" in icl.verdict(icl_rows(.9, .5), "base", "likely")
    for change, part in [({"shuffled": .6}, "shuffled labels hardly matter: no"), ({"wrong": .6}, "wrong labels hardly matter: no"),
                         ({"other domain": .88}, "another domain is worse: no"), ({"other format": .9}, "another format is worse: no")]:
        said = icl.verdict(icl_rows(.9, .5, **change), "base", "likely")
        assert "holds in part" in said and part in said and said.count(": no") == 1
    fewer = [{**r, "likely": .5 if r["shots"] == 8 else r["likely"]} for r in icl_rows(.9, .5)]
    said = icl.verdict(fewer, "base", "likely")
    assert "at 4 shots" in said and "the more the better: no" in said and said.count(": no") == 1 and "holds in part" in said
    said = icl.verdict(icl_rows(.5, .5), "base", "likely")     # nothing helps, so nothing is said by labels that do not matter
    assert "examples help: no" in said and "wrong labels hardly matter: yes" in said and "does not hold" in said
    assert "holds in part" in icl.verdict(icl_rows(.9, .5, wrong=.1), "base", "likely")
    bad = {"shuffled": .3, "wrong": .3, "other domain": .6, "other format": .6}
    assert "does not hold" in icl.verdict(icl_rows(.5, .6, **bad), "base", "likely")


def test_accuracy_is_the_mean_over_tasks_for_each_seed():
    rows = [dict(model="base", seed=s, page="right", shots=4, task=t, likely=v) for s, t, v in ((0, "a", .2), (0, "b", .4), (1, "a", 1.), (1, "b", 0.))]
    assert icl.accuracy(rows, "base", "right", 4) == pytest.approx([.3, .5])


# Templates

def test_a_careful_demonstration_has_full_marks_and_one_task_has_many_wordings():
    rng, words = random.Random(0), set()
    for i in range(100):
        asked = [templates.ask(i, p) for p in range(4)]
        assert all(task == asked[0][0] for task, _ in asked)
        assert len({m[-1]["content"] for _, m in asked}) == 4
        assert len({len(m) for _, m in asked}) == 1
        assert village.gold(asked[0][0], templates.careful(asked[0][0], rng)) == pytest.approx(1)
        words.add(asked[0][0]["use"])
    assert words == set(village.SHARES)


def phrasing_of(chat):
    """Which phrasing a chat is asked in: the one that asks the same task in the same words."""
    task, said = chat["task"], chat["messages"][-2]["content"]
    return {p for p in range(4) if village.KINDS[task["kind"]].ask(task, p, random.Random(0)) == said}


def test_equal_tokens_and_only_the_allowed_wordings():
    sizes = {}
    for run, phrasings in templates.RUNS.items():
        chats = templates.demonstrations(ENC, phrasings, 6000, seed=1)
        sizes[run] = cot.size_of(chats, ENC)
        found = [phrasing_of(c) for c in chats]
        assert all(len(f) == 1 and f <= set(phrasings) for f in found) and set.union(*found) == set(phrasings)
    assert 3 not in set().union(*templates.RUNS.values())
    assert max(sizes.values()) - min(sizes.values()) < 0.01 * min(sizes.values()) and min(sizes.values()) >= 6000


def test_training_and_test_draw_other_tasks():
    """By number: even for training, odd for the test, and seeds far apart."""
    numbers = []

    def spy(number, *rest):
        numbers.append(number)
        return real(number, *rest)
    real, templates.ask = templates.ask, spy
    try:
        templates.demonstrations(ENC, [0], 500, seed=1)
        train = set(numbers)
        numbers.clear()
        templates.new_tasks(50, 1, 3)
        test = set(numbers)
    finally:
        templates.ask = real
    assert len(test) == 50 and len(train) > 5 and not train & test


def test_grade_is_the_mean_gold_of_greedy_answers(monkeypatch):
    tasks = templates.new_tasks(40, 0, 0)
    answers = [templates.careful(t, random.Random(0)) if i % 4 else "Go away." for i, (t, _) in enumerate(tasks)]
    monkeypatch.setattr(sft, "reply", lambda model, enc, chats, n, **how: answers if how == {"temperature": 0} else None)
    expected = (30 + sum(village.gold(t, "Go away.") for t, _ in tasks[::4])) / 40
    assert templates.grade(None, ENC, tasks) == pytest.approx(expected) and expected < 0.75


def template_rows(one, three):
    return [dict(run=run, seed=s, phrasing_0=.9, phrasing_1=v, phrasing_2=v, phrasing_3=v)
            for run, values in (("one", one), ("two", [.4, .4]), ("three", three)) for s, v in enumerate(values)]


def test_the_verdict_on_wordings_follows_the_numbers():
    said = templates.verdict(template_rows([.2, .3], [.5, .5]))
    assert "claim holds" in said and "+0.25" in said and "worst seed +0.20" in said and "both read by +0.00" in said and "knew, by +0.15" in said
    assert "does not hold" in templates.verdict(template_rows([.2, .48], [.5, .5]))
    assert "does not hold" in templates.verdict(template_rows([.5, .5], [.2, .3]))


# Forgetting

def test_looks_end_with_the_last_epoch():
    assert forgetting.looks(1) == [1] and forgetting.looks(16) == [1, 4, 16] and forgetting.looks(20) == [1, 4, 16, 20]


def test_one_task_and_all_tasks_have_equal_tokens():
    one, every = (templates.demonstrations(ENC, [0, 1, 2], 8000, 0, use) for use in ("rewrite", None))
    assert {c["task"]["use"] for c in one} == {"rewrite"} and {c["task"]["use"] for c in every} == set(village.SHARES)
    a, b = cot.size_of(one, ENC), cot.size_of(every, ENC)
    assert abs(a - b) < 0.015 * a


def forgetting_rows(one_task, one_others, all_others, first=0.4):
    values = {("one", 0): (.2, .5), ("one", 1): (.5, first), ("one", 16): (one_task, one_others),
              ("all", 0): (.2, .5), ("all", 1): (.4, .6), ("all", 16): (.5, all_others)}
    return [dict(run=run, epoch=e, seed=s, task=t, others=o, lm_loss=1.0) for (run, e), (t, o) in values.items() for s in range(2)]


def test_the_verdict_on_forgetting_follows_the_numbers():
    said = forgetting.verdict(forgetting_rows(.9, .1, .7))
    assert "claim holds here" in said and "16 epochs" in said and "+0.70" in said and "-0.40 (by -0.30 since epoch 1)" in said
    assert "holds in part" in forgetting.verdict(forgetting_rows(.9, .6, .7))           # nothing forgotten
    assert "holds in part" in forgetting.verdict(forgetting_rows(.9, .1, .1))           # so do all tasks together
    assert "holds in part" in forgetting.verdict(forgetting_rows(.2, .1, .7))           # nothing learned
    assert "holds in part" in forgetting.verdict(forgetting_rows(.9, .1, .7, first=.1))            # longer is no worse
    assert "does not hold" in forgetting.verdict(forgetting_rows(.2, .5, .1, first=.5))


# The scripts, from end to end

def test_cot_runs(run_folder, capsys):
    cot.main(cot.Config(out=str(run_folder), tokens=600, demos=10, epochs=1, n=3, seed=1, seeds=1, device="cpu"))
    rows = rows_of(run_folder / "lab-cot.jsonl")
    assert [(r["seed"], r["run"]) for r in rows] == [(s, run) for s in (1,) for run in cot.RUNS]
    by = {(r["run"], r["seed"]): r for r in rows}
    for s in (1,):
        assert by["steps", s]["sums"] == by["same", s]["sums"] < by["answers", s]["sums"] and by["none", s]["sums"] == 0
        assert abs(by["steps", s]["tokens"] - by["answers", s]["tokens"]) < 40 and by["same", s]["tokens"] < by["steps", s]["tokens"]
    said = capsys.readouterr().out
    assert all(name in said for name in cot.RUNS.values()) and "the claim does not hold here" in said


def test_icl_runs_and_leaves_the_base_model_alone(run_folder, capsys):
    before = (run_folder / "gpt.pt").read_bytes()
    icl.main(icl.Config(out=str(run_folder), n=2, read_on=2, batch_tokens=128, seeds=1, device="cpu"))
    rows = rows_of(run_folder / "lab-icl.jsonl")
    assert len(rows) == 2 * len(icl.TESTED) * (1 + 4 * len(icl.PAGES)) and {r["model"] for r in rows} == {"base", "read on"}
    assert all(0 <= r["likely"] <= 1 and 0 <= r["generated"] <= 1 for r in rows)
    said = capsys.readouterr().out
    assert all(f"{m}, {s}: the claim" in said for m in ("base", "read on") for s in ("likely", "generated")) and (run_folder / "gpt.pt").read_bytes() == before


def test_templates_runs(run_folder, capsys):
    templates.main(templates.Config(out=str(run_folder), tokens=500, epochs=1, n=4, seeds=1, device="cpu"))
    rows = rows_of(run_folder / "lab-templates.jsonl")
    assert [r["run"] for r in rows] == list(templates.RUNS) and all({f"phrasing_{p}" for p in range(4)} <= set(r) for r in rows)
    assert "the claim does not hold here" in capsys.readouterr().out


def test_forgetting_runs(run_folder, capsys, monkeypatch):
    real, used = forgetting.demonstrations, []
    monkeypatch.setattr(forgetting, "demonstrations", lambda *a: used.append(a[-1]) or real(*a))
    forgetting.main(forgetting.Config(out=str(run_folder), tokens=300, epochs=2, n=9, seeds=1, device="cpu"))
    rows = rows_of(run_folder / "lab-forgetting.jsonl")
    assert [(r["run"], r["epoch"]) for r in rows] == [(run, e) for run in forgetting.RUNS for e in (0, 1, 2)]
    assert used == ["rewrite", None]
    start = [r for r in rows if r["epoch"] == 0]
    assert {k: start[0][k] for k in ("task", "others", "lm_loss")} == {k: start[1][k] for k in ("task", "others", "lm_loss")}
    assert "the claim" in capsys.readouterr().out
    with pytest.raises(gpt.UserError, match="--task cooking"):
        forgetting.main(forgetting.Config(out=str(run_folder), task="cooking"))


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(gpt, "main", lambda cfg: made.append(("gpt", cfg.out, cfg.seed, cfg.device)))
    monkeypatch.setattr(sft, "main", lambda cfg: made.append(("sft", cfg.out, cfg.seed, cfg.device)))
    cfg = cot.Config(out=str(tmp_path / "new"), seed=3, device="cpu")
    cot.base_model(cfg)
    cot.base_model(cfg, "sft.pt")
    assert made == [("gpt", cfg.out, 3, "cpu"), ("sft", cfg.out, 3, "cpu")]
    assert "gpt.pt is missing" in capsys.readouterr().out
