"""lab/templates.py: who reads which phrasings and tasks, and a verdict that follows the numbers."""
import random

import pytest

import gpt
import sft
from data import village
from lab import cot, templates
from lab_run import Started, make_run, start
from tiny import ENC, read_jsonl


def test_the_number_decides_the_task_and_not_its_phrasing():
    for number in range(100):
        asked = [templates.numbered_task(number, phrasing) for phrasing in range(4)]
        assert all(record["task"] == asked[0]["task"] for record in asked)
        assert len({record["prompt"][-1]["content"] for record in asked}) == 4
        assert len({len(record["prompt"]) for record in asked}) == 1


def test_numbered_tasks_are_of_every_use_case():
    uses = {templates.numbered_task(number, 0)["task"]["use"] for number in range(100)}
    assert uses == set(village.SHARES)


def test_perfect_demonstrations_have_full_marks():
    rng = random.Random(0)
    for number in range(100):
        task = templates.numbered_task(number, 0)["task"]
        response = templates.perfect_demonstration(task, rng)
        assert village.gold(task, response) == pytest.approx(1)


def phrasings_of(chat):
    """Return the phrasings that give this chat's task the words of its prompt."""
    task = chat["task"]
    kind = village.KINDS[task["kind"]]
    words = chat["messages"][-2]["content"]
    return {p for p in range(4) if kind.ask(task, p, random.Random(0)) == words}


def test_variants_have_equal_tokens_and_only_their_phrasings():
    sizes = []
    for phrasings in templates.VARIANTS.values():
        chats = templates.demonstrations(ENC, phrasings, 6000, seed=1)
        sizes.append(cot.count_tokens(chats, ENC))
        used = [phrasings_of(chat) for chat in chats]
        for found in used:
            assert len(found) == 1
            assert found <= set(phrasings)
        assert set.union(*used) == set(phrasings)
    assert max(sizes) - min(sizes) < 0.01 * min(sizes)
    assert min(sizes) >= 6000


def test_no_variant_reads_the_held_out_phrasing():
    assert 3 not in set().union(*templates.VARIANTS.values())


def test_training_and_test_draw_other_tasks(monkeypatch):
    numbers = []
    numbered_task = templates.numbered_task

    def spy(number, *rest):
        numbers.append(number)
        return numbered_task(number, *rest)

    monkeypatch.setattr(templates, "numbered_task", spy)
    templates.demonstrations(ENC, [0], 500, seed=1)
    train = set(numbers)
    numbers.clear()
    templates.new_tasks(50, 1, 3)
    assert len(train) > 5
    assert len(set(numbers)) == 50
    assert not train & set(numbers)


def test_grade_is_the_mean_gold_of_greedy_responses(monkeypatch):
    tasks = templates.new_tasks(40, 0, 0)
    rng = random.Random(0)
    responses = [templates.perfect_demonstration(record["task"], rng) for record in tasks]
    responses[::4] = ["Go away."] * 10

    def respond(model, enc, chats, n, **sampling):
        assert sampling == {"temperature": 0}
        return responses

    monkeypatch.setattr(sft, "sample_responses", respond)
    rude = sum(village.gold(record["task"], "Go away.") for record in tasks[::4])
    expected = (30 + rude) / 40
    assert templates.grade(None, ENC, tasks) == pytest.approx(expected)
    assert expected < 0.75


def verdict(one, three):
    """Return the verdict on two seeds with these gold grades on all phrasings but the first."""
    rows = []
    for name, values in (("one", one), ("two", [.4, .4]), ("three", three)):
        for seed, value in enumerate(values):
            row = {"run": name, "seed": seed, "phrasing_0": .9}
            rows.append(row | {f"phrasing_{p}": value for p in (1, 2, 3)})
    return templates.verdict(rows)


def test_the_verdict_holds_when_three_phrasings_gain_in_every_seed():
    text = verdict([.2, .3], [.5, .5])
    assert "claim holds" in text
    assert "+0.25" in text
    assert "worst seed +0.20" in text
    assert "both read by +0.00" in text
    assert "knew, by +0.15" in text


@pytest.mark.parametrize("one, three", [([.2, .48], [.5, .5]), ([.5, .5], [.2, .3])])
def test_the_verdict_does_not_hold(one, three):
    assert "does not hold" in verdict(one, three)


def test_it_runs_and_logs(tmp_path, capsys):
    out = make_run(tmp_path)
    cfg = templates.Config(out=str(out), tokens=500, epochs=1, n=4, seeds=1, device="cpu")
    templates.main(cfg)
    rows = read_jsonl(out / "lab-templates.jsonl")
    assert [r["run"] for r in rows] == list(templates.VARIANTS)
    for row in rows:
        assert {f"phrasing_{p}" for p in range(4)} <= set(row)
    assert "the claim does not hold here" in capsys.readouterr().out


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "main", start)
    with pytest.raises(Started) as started:
        templates.main(templates.Config(out=str(tmp_path / "new"), seed=3, device="cpu"))
    stage = started.value.args[0]
    assert (stage.out, stage.seed, stage.device) == (str(tmp_path / "new"), 3, "cpu")
    assert "gpt.pt is missing" in capsys.readouterr().out
