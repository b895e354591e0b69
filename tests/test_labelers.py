"""The labelers: ranks with ties, and about as much agreement as between people."""
import random
from itertools import combinations

import pytest

import sft
from data import beam, corpus, labelers
from data.formats import load_comparisons
from data.village import demonstration, new_task
from lab_run import make_run
from scaffold.cli import UserError
from tiny import ENC, tiny_gpt


def test_equal_scores_share_a_rank():
    assert labelers.ranks_of([0.5, 2.0, 0.5, -1.0]) == [2, 1, 2, 3]


def test_two_labelers_agree_as_often_as_people_do():
    """They agree on about 73% of the SFT model's responses, and a little less on demonstrations.

    The share is of the pairs that neither of them ties. Equal responses never get two scores.
    """
    tasks_rng = random.Random(5)
    tasks = [new_task(tasks_rng)[0] for _ in range(700)]
    rng = random.Random(0)
    people = labelers.habits(0)
    agree = []
    for task in tasks:
        responses = [demonstration(task, rng) for _ in range(6)]
        first, second = rng.sample(people, 2)
        one = labelers.opinions(task, responses, first, rng)
        two = labelers.opinions(task, responses, second, rng)
        for i, j in combinations(range(6), 2):
            if responses[i] == responses[j]:
                assert one[i] == one[j]
            if one[i] != one[j] and two[i] != two[j]:
                agree.append((one[i] > one[j]) == (two[i] > two[j]))
    assert 0.65 < sum(agree) / len(agree) < 0.78


def test_a_missing_model_is_an_error_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "ensure", lambda folder, seed: folder)
    with pytest.raises(UserError, match=f"python sft.py --out {tmp_path}"):
        labelers.ensure(tmp_path)


def numbered_prompts(n):
    prompts = []
    for i in range(n):
        task, messages = new_task(random.Random(i))
        prompts.append({"task": task, "prompt": messages})
    return prompts


@pytest.mark.parametrize("candidates", ["sample", "beam"])
def test_each_prompt_gets_its_own_responses_and_ranks(candidates, monkeypatch):
    """Every response names its prompt, so a response in the wrong record is seen."""
    prompts = numbered_prompts(30)
    numbers = {str(p["prompt"]): i for i, p in enumerate(prompts)}
    drawn = iter(range(10**6))

    def sample(model, enc, chats, n, seed):
        return [f"{numbers[str(chat)]}: {next(drawn)} " + demonstration(
            prompts[numbers[str(chat)]]["task"], random.Random(next(drawn))) for chat in chats]

    def search(model, enc, chats, n, most):
        return [sample(model, enc, [chat] * n, most, 0) for chat in chats]

    monkeypatch.setattr(sft, "sample_responses", sample)
    monkeypatch.setattr(beam, "beam_responses", search)
    records = labelers.rank(None, None, prompts, candidates=candidates)
    assert len(records) > 20
    assert {len(r["responses"]) for r in records} == {4, 5, 6, 7, 8, 9}
    for r in records:
        number = numbers[str(r["prompt"])]
        order = [int(response.split()[1]) for response in r["responses"]]
        assert all(response.startswith(f"{number}: ") for response in r["responses"])
        assert order == sorted(order)       # of a beam, the best are kept in their order
        assert len(r["ranks"]) == len(r["ranks_other"]) == len(r["responses"])
        assert r["ranks"] == labelers.ranks_of(r["scores"])


def test_the_candidates_of_a_beam_are_its_best():
    model = tiny_gpt(0)
    chats = [p["prompt"] for p in numbered_prompts(6)]
    sizes = [4, 9, 5, 4, 7, 6]
    made = labelers.make_candidates(model, ENC, chats, sizes, "beam", 6, seed=0)
    for chat, size, responses in zip(chats, sizes, made):
        [best] = beam.beam_responses(model, ENC, [chat], 9, 6)
        assert responses == best[:size]
        assert len(set(responses)) == size


def test_rankings_of_samples_and_of_beams_are_two_files(tmp_path, capsys):
    out = make_run(tmp_path)
    sampled = labelers.ensure(out, device="cpu")
    first = [load_comparisons(path) for path in sampled]
    labelers.main(labelers.Config(out=str(out), candidates="beam", device="cpu"))
    shown = capsys.readouterr().out
    found = labelers.ensure(out, device="cpu", candidates="beam")
    assert f"reward.py --out {out} --data {found[0]} --val {found[1]}" in shown
    assert not set(found) & set(sampled)
    assert [load_comparisons(path) for path in labelers.ensure(out, device="cpu")] == first
    for path in found:
        for r in load_comparisons(path):
            assert len(set(r["responses"])) == len(r["responses"])


def test_unknown_candidates_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match="--candidates best: choose sample or beam"):
        labelers.main(labelers.Config(out=str(tmp_path), candidates="best"))


@pytest.mark.parametrize("name", ["ranked_train.jsonl", "ranked_val.jsonl"])
def test_a_cut_ranking_is_named_with_what_to_delete(tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpus, "ensure", lambda folder, seed: folder)
    (tmp_path / "sft.pt").touch()
    (tmp_path / "data").mkdir()
    for file in ("ranked_train.jsonl", "ranked_val.jsonl"):
        (tmp_path / "data" / file).write_text('{"prompt": "a"}\n')
    assert [path.rpartition("/")[2] for path in labelers.ensure(tmp_path)] == [
        "ranked_train.jsonl", "ranked_val.jsonl"]
    path = tmp_path / "data" / name
    path.write_text('{"prompt": "a"}\n{"promp')
    with pytest.raises(UserError, match=f"{name}:2.*generated: delete {path}"):
        labelers.ensure(tmp_path)
