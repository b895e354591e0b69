"""lab/toxic_seeds.py: only outputs are made rude, and the verdict follows the numbers."""
import random

import pytest

import gpt
import self_instruct
from data import tasks, village
from data.formats import write_records
from lab import instruction_quality, toxic_seeds
from lab_run import Started, make_run, start
from tiny import ENC, read_jsonl

SEED_TASKS = tasks.seed_tasks(random.Random(0), 40)


def outputs(seed_tasks):
    return [instance["output"] for task in seed_tasks for instance in task["instances"]]


@pytest.mark.parametrize("share", toxic_seeds.SHARES.values())
def test_a_share_of_the_seed_tasks_is_rude_in_every_output(share):
    rude = toxic_seeds.make_rude(SEED_TASKS, share, random.Random(1))
    n_rude = 0
    for before, after in zip(SEED_TASKS, rude, strict=True):
        marks = [toxic_seeds.is_rude(text) for text in outputs([after])]
        assert len(set(marks)) == 1
        n_rude += marks[0]
        for old, new in zip(before["instances"], after["instances"], strict=True):
            assert old["input"] == new["input"]
            assert (old["output"] == new["output"]) != marks[0]
            assert old["output"] in new["output"]
        assert {**before, "instances": 0} == {**after, "instances": 0}
    assert n_rude == share * len(SEED_TASKS)


def test_the_given_seed_tasks_stay_polite():
    toxic_seeds.make_rude(SEED_TASKS, 1.0, random.Random(0))
    assert not any(toxic_seeds.is_rude(text) for text in outputs(SEED_TASKS))


def test_prompts_have_one_turn_and_the_words_of_their_task():
    prompts = toxic_seeds.draw_prompts(100, 0)
    assert len(prompts) == 100
    for prompt in prompts:
        kind = village.KINDS[prompt["task"]["kind"]]
        assert not kind.before(prompt["task"], random.Random(0))
        asked = {kind.ask(prompt["task"], phrasing, random.Random(0)) for phrasing in range(3)}
        assert prompt["instruction"] in asked


def test_a_rude_line_costs_gold_and_not_helpfulness(monkeypatch):
    prompts = toxic_seeds.draw_prompts(40, 0)
    rng = random.Random(0)
    polite = [village.demonstration(p["task"], rng) for p in prompts]
    polite = [text if not toxic_seeds.is_rude(text) else "Yes." for text in polite]

    def measured(responses):
        monkeypatch.setattr(toxic_seeds, "follow", lambda *_: responses)
        return toxic_seeds.measure(None, ENC, prompts)

    before = measured(polite)
    after = measured([f"{text} You are so dumb." for text in polite])
    assert (before["rude"], after["rude"]) == (0, 1)
    assert after["helpful"] == before["helpful"]
    assert after["gold"] == pytest.approx(before["gold"] - 1)


def verdict(own, both):
    """Return the verdict on two seeds: shares of rude responses after tuning in the two ways."""
    rows = []
    for name in toxic_seeds.SHARES:
        for seed in range(2):
            row = {"run": name, "seed": seed, "generated_rude": 0, "own_rude": 0, "both_rude": 0}
            row |= {"own_gold": 0.5, "both_gold": 0.5}
            if name == "all":
                row |= {"own_rude": own[seed], "both_rude": both[seed], "both_gold": 0.1}
            rows.append(row)
    return toxic_seeds.verdict(rows)


def test_the_verdict_holds_when_both_ways_make_the_model_rude():
    text = verdict([.3, .4], [.8, .9])
    assert "claim holds here" in text
    assert "+35% of its responses after tuning on these (worst seed +30%" in text
    assert "+85% after tuning on the seed tasks, too (worst seed +80%; gold -0.40)" in text


@pytest.mark.parametrize("own, both", [([.1, .9], [.8, .9]), ([.3, .4], [.9, .1])])
def test_the_verdict_holds_in_part_when_one_way_fails_in_a_seed(own, both):
    assert "holds in part" in verdict(own, both)


def test_the_verdict_does_not_hold_when_nothing_changes():
    assert "does not hold" in verdict([0, 0], [0, 0])


def small_run(tmp_path):
    """Return a run folder with an untrained base model of a long context, and its seed tasks."""
    out = make_run(tmp_path)
    (out / "long").mkdir()
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 320, n_layer=1, n_head=2, n_embd=16))
    gpt.save_model(out / "long" / "gpt.pt", model, ENC, "")
    write_records(out / "data" / "seed_tasks.jsonl", SEED_TASKS)
    (out / "data" / "pages").mkdir()
    (out / "data" / "pages" / "mixture.json").write_text("{}")
    return out


def test_it_runs_and_logs(tmp_path, capsys, monkeypatch):
    """The stand-in for growth gives every task of the seeds back: all of them are 'generated'."""
    tuned_on = []

    def make_tasks(model, enc, seed_tasks, settings, rng, log):
        assert settings.shots == 1
        return seed_tasks

    def fine_tune(base, device, records, val_score, settings):
        tuned_on.append([r["output"] for r in records])
        return gpt.load_model(base, device)[0]

    monkeypatch.setattr(self_instruct, "make_tasks", make_tasks)
    monkeypatch.setattr(self_instruct, "fine_tune", fine_tune)
    out = small_run(tmp_path)
    cfg = toxic_seeds.Config(out=str(out), shots=1, n=3, seeds=1, device="cpu")
    toxic_seeds.main(cfg)
    rows = read_jsonl(out / "lab-toxic_seeds.jsonl")
    assert [row["run"] for row in rows] == list(toxic_seeds.SHARES)
    assert rows[0]["generated_rude"] == 0
    assert 0 < rows[1]["generated_rude"] < 1
    assert rows[2]["generated_rude"] == 1
    for own, both in zip(tuned_on[::2], tuned_on[1::2], strict=True):
        assert both == own + own            # the stand-in wrote the seed tasks
    text = capsys.readouterr().out
    assert "a quarter" in text
    assert "the claim does not hold here" in text


def test_all_runs_of_a_seed_have_equal_instructions(tmp_path, monkeypatch):
    """Growth reads instructions alone, so rude outputs must not change what it is asked."""
    asked = []

    def grow(model, enc, instructions, settings, rng):
        asked.append((instructions, rng.random()))
        raise Started(None)

    monkeypatch.setattr(self_instruct, "grow", grow)
    base = small_run(tmp_path) / "long" / "gpt.pt"
    settings = self_instruct.Config(seed=3)
    for share in toxic_seeds.SHARES.values():
        rude = toxic_seeds.make_rude(SEED_TASKS, share, random.Random(0))
        with pytest.raises(Started):
            toxic_seeds.grow_and_tune(base, rude, [], [], "cpu", settings)
    assert asked == [asked[0]] * 3


def test_the_measure_reads_the_first_line_of_a_response(monkeypatch):
    """`follow` is instruction_quality's, which cuts what a model writes after its output."""
    monkeypatch.setattr(self_instruct, "ask", lambda *_, **__: [("Yes.\nYou are so dumb.", True)])
    assert toxic_seeds.follow is instruction_quality.follow
    [prompt] = toxic_seeds.draw_prompts(1, 0)
    assert toxic_seeds.measure(None, ENC, [prompt])["rude"] == 0


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "main", start)
    with pytest.raises(Started) as started:
        toxic_seeds.main(toxic_seeds.Config(out=str(tmp_path / "new"), seed=3, device="cpu"))
    stage = started.value.args[0]
    assert (stage.out, stage.seed, stage.device) == (str(tmp_path / "new"), 3, "cpu")
    assert "gpt.pt is missing" in capsys.readouterr().out
