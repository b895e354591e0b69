"""lab/expand_prompts.py: what counts as new, what the filters drop, who gets which prompts."""
import json
import random

import pytest

import gpt
import reward
from data import village
from data.formats import load_prompts
from lab import expand_prompts
from lab_run import Started, make_run, start
from scaffold.cli import UserError
from self_instruct import list_prompt
from tiny import ENC, read_jsonl, save_reward


def people_ask(n, seed=0):
    """Return n prompts of the village as records."""
    rng = random.Random(seed)
    tasks = [village.new_task(rng) for _ in range(n)]
    return [{"prompt": messages, "task": task} for task, messages in tasks]


@pytest.mark.parametrize("name", expand_prompts.WRITERS)
def test_a_writer_that_copies_its_page_gives_the_prompts_of_the_page(name):
    writer = expand_prompts.WRITERS[name]
    prompts = ["Who is the cat?", "What is a  dog?", "Say it."]
    continuation = writer.page(prompts)
    if writer.page is list_prompt:      # after "1." as a model would continue it, without the end
        continuation = continuation.split("1.", 1)[1].rsplit("\n", 1)[0]
    assert writer.read(continuation) == ["Who is the cat?", "What is a dog?", "Say it."]


@pytest.mark.parametrize("name", expand_prompts.WRITERS)
def test_candidates_come_from_pages_that_the_model_ended(name, monkeypatch):
    people = [f"Prompt {i}?" for i in range(20)]
    pages = []

    def answer(model, enc, prompts, max_new_tokens, **sampling):
        pages.extend(prompts)
        return [("1\n7. 2\n", i % 2 == 0) for i in range(len(prompts))]

    monkeypatch.setattr(expand_prompts, "ask", answer)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 64, 1, 1, 8))
    writer = expand_prompts.WRITERS[name]
    found = expand_prompts.write_candidates(writer, model, ENC, people, 6, random.Random(0))
    assert found == 3 * writer.read("1\n7. 2\n")
    assert len(set(pages)) == 6
    for page in pages:
        assert sum(prompt in page for prompt in people) >= expand_prompts.SHOWN


def test_new_is_what_people_did_not_write_once_and_in_order():
    assert expand_prompts.new_ones(list("cabacd"), ["a"]) == list("cbd")


@pytest.mark.parametrize("prompt, probability, kept", [
    ("What does the cow say?", 0.5, True),
    ("What does the cow say?", 0.05, True),
    ("What does the cow say?", 0.01, False),
    ("The cow?", 0.5, False),
    ("Draw a picture of the cow.", 0.5, False),
    ("cow " * 200, 0.5, False),
])
def test_filters(prompt, probability, kept):
    assert expand_prompts.passes(prompt, probability, likelihood=0.05) == kept


def test_the_use_case_of_peoples_prompts_is_read_back():
    """The reader that audits new prompts knows every prompt of one turn."""
    for record in people_ask(300):
        if len(record["prompt"]) == 1:
            use = expand_prompts.use_of(record["prompt"][0]["content"])
            assert use == record["task"]["use"]


@pytest.mark.parametrize("prompt", ["", "Cow the say what does.", "I am a fish of no village."])
def test_nonsense_has_no_use_case(prompt):
    assert expand_prompts.use_of(prompt) is None


def test_single_turn_leaves_out_chats():
    records = people_ask(200)
    strings = expand_prompts.single_turn(records)
    assert len(strings) == sum(record["task"]["kind"] != "chat" for record in records)
    assert 100 < len(strings) < 200


def test_measures_count_what_was_written():
    good = expand_prompts.single_turn(people_ask(20))[:4]
    new = [*good, "No such thing in the village."]
    row = expand_prompts.measure_writing(new * 2, new, [*good[:3], new[-1]], read=set(good[:1]))
    assert (row["candidates"], row["new"], row["unread"], row["new_meaning"]) == (10, 5, 4, 4)
    assert (row["kept"], row["kept_unread"], row["kept_meaning"]) == (4, 3, 3)
    assert sum(row["uses"].values()) == 3


def verdict(added, bound=(.03, .03), meaning=90):
    """Return the verdict on two seeds: what the new prompts and more of people's add to gold."""
    rows = []
    for seed in range(2):
        rows += [{"row": "writing", "writer": name, "seed": seed, "kept": 100, "kept_meaning": n}
                 for name, n in (("gpt.pt", 0), ("long/gpt.pt", meaning))]
        golds = {"people": .5, "expanded": .5 + added[seed], "more": .5 + bound[seed]}
        rows += [{"row": "ppo", "seed": seed, "run": run, "gold": gold}
                 for run, gold in golds.items()]
    return expand_prompts.verdict(rows)


def test_the_verdict_holds_when_new_prompts_mean_something_and_add_in_every_seed():
    text = verdict([.01, .05], (.02, .06))
    assert "claim holds here: 90%" in text
    assert "+0.030 (worst seed +0.010" in text
    assert text.endswith("prompts of people by +0.040")


@pytest.mark.parametrize("numbers", [
    pytest.param({"added": [.0, .01]}, id="too little"),
    pytest.param({"added": [-.01, .09]}, id="a seed that loses"),
    pytest.param({"added": [.05, .05], "meaning": 40}, id="nonsense"),
])
def test_the_verdict_does_not_hold(numbers):
    assert "does not hold" in verdict(**numbers)


def test_it_runs_and_every_copy_gets_its_prompts(tmp_path, capsys, monkeypatch):
    out = make_run(tmp_path)
    model, _, _ = gpt.load_model(out / "gpt.pt", "cpu")
    save_reward(out / "reward.pt", reward.RewardModel(model))
    gpt.save_model(out / "long" / "gpt.pt", model, ENC, "", seed=0)
    written = expand_prompts.single_turn(people_ask(30, seed=9))

    def write(writer, *_):
        return ["", *written] if writer.page is list_prompt else []

    monkeypatch.setattr(expand_prompts, "write_candidates", write)
    cfg = expand_prompts.Config(out=str(out), people=10, lists=1, likelihood=0, updates=4,
                                rollout_size=2, seeds=1, device="cpu")
    expand_prompts.main(cfg)
    rows = read_jsonl(out / "lab-expand_prompts.jsonl")
    assert [r["row"] for r in rows] == ["writing", "writing", "sft", "ppo", "ppo", "ppo"]
    kept = rows[1]["kept"]
    assert 0 < kept == rows[1]["kept_meaning"] < len(written) + 1
    files = {run: load_prompts(out / "expand_prompts" / f"{run}-seed0.jsonl")
             for run in expand_prompts.RUNS}
    everybody = [json.dumps(r["prompt"]) for r in load_prompts(out / "data/prompts_train.jsonl")]
    asked = {run: [json.dumps(r["prompt"]) for r in records] for run, records in files.items()}
    assert asked["expanded"][:10] == asked["more"][:10] == asked["people"]
    assert len(asked["people"]) == 10
    assert len(asked["expanded"]) == 10 + kept
    assert len(asked["more"]) == min(10 + kept, len(everybody))
    assert set(asked["more"]) <= set(everybody)
    assert {r["prompt"][0]["content"] for r in files["expanded"][10:]} <= set(written)
    assert not list(out.glob("people*"))        # the policies stay out of OUT, its table and chat
    assert "the claim" in capsys.readouterr().out


def test_too_few_people_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match="--people 3"):
        expand_prompts.main(expand_prompts.Config(out=str(tmp_path), people=3))


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reward, "main", start)
    with pytest.raises(Started) as started:
        expand_prompts.main(expand_prompts.Config(out=str(tmp_path / "new"), seed=3, device="cpu"))
    stage = started.value.args[0]
    assert (stage.out, stage.seed, stage.device) == (str(tmp_path / "new"), 3, "cpu")
    assert "reward.pt is missing" in capsys.readouterr().out
