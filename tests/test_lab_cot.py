"""lab/cot.py: sums agree with an independent solver, and the verdict follows the numbers."""
import itertools
import random

import pytest
import torch

import gpt
import sft
from lab import cot
from lab_run import Started, make_run, start
from tiny import ENC, read_jsonl

FOODS = "cake bread soup cheese honey jam milk pie".split()
PRICES = dict(zip(FOODS, [9, 4, 5, 7, 8, 3, 6, 2]))


def test_a_sum_agrees_with_a_solver_that_reads_the_prompt():
    rng = random.Random(0)
    for _ in range(300):
        size = rng.choice([2, 3, 4])
        problem = cot.make_sum(rng, size)
        words = problem.prompt.rstrip("?").replace(",", "").split()
        named = [w for w in words if w in PRICES]
        assert named == problem.foods
        assert len(set(named)) == size
        assert problem.total == sum(PRICES[food] for food in named)


def test_the_steps_lead_to_the_total_one_price_at_a_time():
    rng = random.Random(1)
    for _ in range(300):
        problem = cot.make_sum(rng, rng.choice([2, 3, 4]))
        total = 0
        steps = problem.steps.split(". ")
        assert len(steps) == len(problem.foods)
        for food, step in zip(problem.foods, steps):
            name, *numbers = step.rstrip(".").replace(",", "").split()
            price = cot.PRICE[food]
            total += price
            assert name == food
            assert [int(x) for x in numbers] in ([price, total], [total])
        with_steps = cot.chat_of(problem, True)[1]["content"]
        assert with_steps == f"{problem.steps} So {total}."
        assert cot.chat_of(problem, False)[1]["content"] == f"{total}."


@pytest.mark.parametrize("steps", [True, False])
def test_the_final_number_of_a_demonstration_is_the_total(steps):
    rng = random.Random(2)
    for _ in range(50):
        problem = cot.make_sum(rng, 3)
        assert cot.final_number(cot.chat_of(problem, steps)[1]["content"]) == problem.total


@pytest.mark.parametrize("response, number", [
    ("12", 12),
    ("12.", 12),
    (" 12. ", 12),
    ("1 2.", 2),
    ("So 7. no", None),
    ("", None),
    ("12 coins.", None),
    ("²", None),
    ("x12.", None),
])
def test_the_final_number_is_read_whole_or_not_at_all(response, number):
    assert cot.final_number(response) == number


@pytest.mark.parametrize("seed", range(3))
def test_training_and_test_share_no_set_of_foods(seed):
    rng = random.Random(seed)
    drawn = {}
    for test in (True, False):
        drawn[test] = {frozenset(cot.draw_sum(rng, size, seed, test).foods)
                       for size in (2, 3, 4) for _ in range(200)}
    assert not drawn[True] & drawn[False]
    assert 15 < len(drawn[True]) < 50 < len(drawn[False])   # a fifth of the 154 sets, and the rest


def test_every_seed_holds_out_other_sets():
    pairs = list(itertools.combinations(cot.PRICE, 2))
    splits = [tuple(cot.held_out(pair, seed) for pair in pairs) for seed in range(5)]
    assert len(set(splits)) == 5


@pytest.mark.parametrize("foods", [
    ["pie", "jam"],
    ["cake", "pie", "milk"],
    ["soup", "jam", "honey"],
])
def test_the_order_of_foods_does_not_decide_whether_they_are_held_out(foods):
    assert cot.held_out(foods, 0) == cot.held_out(foods[::-1], 0)


@pytest.mark.parametrize("seed", range(2))
def test_training_sums_have_equal_tokens_or_equal_number(seed):
    chats = cot.all_training_sums(ENC, seed, 20_000)
    tokens = {name: cot.count_tokens(chats[name], ENC) for name in cot.VARIANTS}
    assert abs(tokens["steps"] - tokens["answers"]) < 0.01 * tokens["steps"]
    assert tokens["steps"] >= 20_000
    assert tokens["same"] < 0.75 * tokens["steps"]
    assert len(chats["answers"]) > 1.4 * len(chats["steps"])
    prompts = {name: [c["messages"][0]["content"] for c in chats[name]] for name in cot.VARIANTS}
    assert prompts["steps"] == prompts["same"]
    assert prompts["steps"] == prompts["answers"][:len(prompts["steps"])]
    assert prompts["none"] == []


def verdict(steps=(.5, .6), answers=(.1, .2), gold=.1, gold_none=(.1, .1)):
    """Return the verdict on two seeds with these accuracies on new sums and these gold grades."""
    rows = []
    for seed in range(2):
        rows.append({"run": "steps", "seed": seed, "new_sums": steps[seed], "gold": gold})
        rows.append({"run": "answers", "seed": seed, "new_sums": answers[seed], "gold": .5})
        rows.append({"run": "none", "seed": seed, "new_sums": 0, "gold": gold_none[seed]})
    return cot.verdict(rows)


def test_the_verdict_holds_when_steps_gain_in_every_seed():
    assert "claim holds" in verdict()
    assert "+40 points" in verdict()


def test_the_usual_tasks_may_lose_a_little_on_average():
    assert "claim holds" in verdict(gold_none=(.2, .05))


@pytest.mark.parametrize("numbers", [
    pytest.param({"steps": (.9, .25)}, id="one seed gains only five points"),
    pytest.param({"answers": (.5, .6)}, id="no gain"),
    pytest.param({"gold_none": (.2, .2)}, id="the usual tasks lose a tenth"),
])
def test_the_verdict_does_not_hold(numbers):
    assert "does not hold" in verdict(**numbers)


def test_fine_tuning_yields_after_every_epoch_and_learns():
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 32, 1, 2, 16)).eval()
    sums = [cot.make_sum(random.Random(i), 2) for i in range(20)]
    examples = sft.tokenize([{"messages": cot.chat_of(s, False)} for s in sums], ENC, 32)
    losses = [sft.val_loss(model, examples, torch.device("cpu"))]
    for epoch in sft.fine_tune(model, examples, 3, 128, 1e-2, 0):
        assert epoch == len(losses)
        assert not model.training
        losses.append(sft.val_loss(model, examples, torch.device("cpu")))
    assert len(losses) == 4
    assert losses[0] > losses[1] > losses[2] > losses[3]


def test_spread_is_the_mean_and_the_extremes():
    assert cot.spread([0.1, 0.5, 0.3]) == "0.30 (0.10..0.50)"
    assert cot.spread([0.123], 3) == "0.123"


def test_it_runs_and_logs(tmp_path, capsys):
    out = make_run(tmp_path)
    cot.main(cot.Config(out=str(out), tokens=600, demos=10, epochs=1, n=3, seed=1, seeds=1,
                        device="cpu"))
    rows = read_jsonl(out / "lab-cot.jsonl")
    assert [(r["seed"], r["run"]) for r in rows] == [(1, name) for name in cot.VARIANTS]
    steps, answers, same, none = rows
    assert steps["sums"] == same["sums"] < answers["sums"]
    assert none["sums"] == 0
    assert abs(steps["tokens"] - answers["tokens"]) < 40
    assert same["tokens"] < steps["tokens"]
    printed = capsys.readouterr().out
    assert all(title in printed for title in cot.VARIANTS.values())
    assert "the claim does not hold here" in printed


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "main", start)
    with pytest.raises(Started) as started:
        cot.main(cot.Config(out=str(tmp_path / "new"), seed=3, device="cpu"))
    stage = started.value.args[0]
    assert (stage.out, stage.seed, stage.device) == (str(tmp_path / "new"), 3, "cpu")
    assert "gpt.pt is missing" in capsys.readouterr().out
