"""lab/refresh.py: the runs differ in their reward models alone, and the verdict follows."""
import copy
import random

import pytest
import torch

import reward
import sft
from data import labelers, rankings, village
from lab import grpo, refresh
from lab_run import Started, make_reward_run, start
from scaffold.cli import UserError
from tiny import read_jsonl, same_weights

TINY = dict(rounds=3, updates=4, rankings=6, seeds=1, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that all tests share; they change nothing in it but the log."""
    return make_reward_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def s(folder):
    s = grpo.load(grpo.Config(out=str(folder), device="cpu"))
    s.ppo.rollout_size = 8
    s.ppo.max_new_tokens = 8
    return s


@pytest.fixture
def records(s):
    return refresh.load_records(s, refresh.Config(out=str(s.out), device="cpu"))


def learn_two(s, learner):
    """Take two updates, the second of which changes the policy, too."""
    for update in (2, 3):
        grpo.ppo_update(update, 8, s, learner)


def test_copies_of_a_learner_go_on_alike_and_apart(s):
    learner = grpo.new_learner(s, 0, critic=True)
    learn_two(s, learner)
    first = copy.deepcopy(learner)
    second = copy.deepcopy(learner)
    learn_two(s, first)
    assert same_weights(second.policy, learner.policy)
    assert not same_weights(first.policy, learner.policy)
    assert not same_weights(first.value_model, learner.value_model)
    learn_two(s, second)
    assert same_weights(first.policy, second.policy)
    assert same_weights(first.value_model, second.value_model)


def test_people_rank_other_prompts_each_time(s, records, monkeypatch):
    asked = []

    def spy(policy, enc, prompts, seed):
        asked.append((policy, seed, [str(p) for p in prompts]))
        return prompts

    monkeypatch.setattr(labelers, "rank", spy)
    for seed in (0, 1, 0):
        refresh.rank_again(s, "policy", records.prompts, 5, seed)
    assert asked[0] == asked[2]
    assert asked[0][1] != asked[1][1]
    assert set(asked[0][2]) != set(asked[1][2])
    for policy, _, prompts in asked:
        assert policy == "policy"
        assert len(prompts) == 5
    assert len(refresh.rank_again(s, "policy", records.prompts[:3], 5, 0)) == 3


@pytest.mark.parametrize("n_new, n_old", [(4, 10), (4, 4), (4, 2)])
def test_as_many_old_rankings_as_new_ones(n_new, n_old):
    new = [f"new {i}" for i in range(n_new)]
    old = [f"old {i}" for i in range(n_old)]
    mixed = refresh.with_old(new, old, 0)
    assert mixed[:n_new] == new
    assert len(mixed) == len(set(mixed)) == n_new + min(n_new, n_old)
    assert set(mixed) <= set(new + old)


def test_the_reward_model_learns_from_new_rankings_and_is_normalised(s, records):
    new = [{**r, "responses": ["No.", "Yes."], "ranks": [2, 1]} for r in records.prompts * 40]
    before = copy.deepcopy(s.reward_model)
    model = refresh.train_on(s, s.reward_model, new, 0)
    assert same_weights(s.reward_model, before)
    assert not any(p.requires_grad for p in model.parameters())
    comparisons = rankings.tokenize(new, sft.render_prompt, s.enc, 128)
    right = [no < yes for no, yes in reward.score_all(model, comparisons, "cpu")]
    assert sum(right) > 0.9 * len(right)
    cfg = reward.Config()
    chats = [r["prompt"] for r in new[:cfg.normalise_on]]
    samples = sft.sample_responses(s.reference, s.enc, chats, cfg.max_new_tokens)
    scores = torch.tensor(reward.score_responses(model, s.enc, chats, samples))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_a_reward_model_that_knows_gold_is_always_right(s, records, monkeypatch):
    def gold_scores(model, comparisons, device):
        assert model is s.reward_model
        return [[village.gold(c.record["task"], a) for a in c.record["responses"]]
                for c in comparisons]

    def rank(policy, enc, prompts, seed):
        """Sample demonstrations instead: the tiny policy has no response with a high grade."""
        rng = random.Random(seed)
        ranked = []
        for p in prompts:
            responses = [village.demonstration(p["task"], rng) for _ in range(5)]
            scores = [village.gold(p["task"], a) + rng.gauss(0, 0.5) for a in responses]
            ranked.append({**p, "responses": responses, "ranks": labelers.ranks_of(scores)})
        return ranked

    monkeypatch.setattr(labelers, "rank", rank)
    monkeypatch.setattr(reward, "score_all", gold_scores)
    row = refresh.quality(s, s.reference, records.held_out, 0)
    assert row["right"] == 1
    assert row["agrees"] == row["possible"] < 1
    assert row["pairs"] > 50


def spy_on(monkeypatch, name, calls):
    """Keep the arguments and the result of each call of refresh.NAME."""
    function = getattr(refresh, name)

    def spy(*args):
        result = function(*args)
        calls.append((args, result))
        return result

    monkeypatch.setattr(refresh, name, spy)


def test_the_runs_differ_in_their_reward_models_alone(s, records, monkeypatch):
    rounds, ranked, mixed = [], [], []
    policies = {}

    def play_round(setup, learner, number, prompts, seed, cfg):
        rounds.append(setup)
        total = cfg.rounds * cfg.updates
        grpo.train("", range((number - 1) * cfg.updates, number * cfg.updates), grpo.ppo_update,
                   total, setup, learner)
        return {"round": number}

    def keep(setup, found, seed):
        policies.update(found)
        row = dict.fromkeys([key for key, _ in grpo.COLUMNS.values()])
        return dict.fromkeys([*found, "sft", "sft-greedy"], row)

    monkeypatch.setattr(refresh, "play_round", play_round)
    monkeypatch.setattr(refresh, "evaluate_policies", keep)
    spy_on(monkeypatch, "rank_again", ranked)
    spy_on(monkeypatch, "with_old", mixed)
    rows = refresh.play_all(s, records, 0, refresh.Config(more=True, **TINY))

    runs = [("first", 1)] + [(r, n) for r in ("stale", "fresh", "more") for n in (2, 3)]
    assert [(r["run"], r["round"]) for r in rows[:-2]] == runs
    assert [r["run"] for r in rows[-2:]] == ["sft", "sft-greedy"]
    models = {run: setup.reward_model for run, setup in zip(runs, rounds)}
    assert models["first", 1] is models["stale", 2] is models["stale", 3] is s.reward_model
    trained = [models[run] for run in runs[3:]]
    for i, model in enumerate(trained):
        assert not any(same_weights(model, other) for other in trained[:i] + [s.reward_model])
    assert all(setup.reference is s.reference for setup in rounds)

    # People rank the policy itself in the run "fresh", and the SFT model in the run "more".
    fresh_2, fresh_3, more_2, more_3 = [args[1] for args, _ in ranked]
    assert fresh_2 is fresh_3 is not s.reference
    assert more_2 is more_3 is s.reference

    # Old rankings are those of OUT/reward.pt, then also those of earlier rounds of the same run.
    for first, second in (mixed[:2], mixed[2:]):
        (new, old, _), _ = first
        assert old == records.ranked
        assert second[0][1] == old + new

    # The run "stale" is one long run.
    learner = grpo.new_learner(s, 0, critic=True)
    for update in range(12):
        grpo.ppo_update(update, 12, s, learner)
    assert same_weights(policies["stale-3"], learner.policy)
    assert not same_weights(policies["fresh-2"], policies["stale-2"])
    assert not same_weights(policies["stale-2"], policies["stale-3"])


def verdict(sft=.9, stale=.8, old=.85, new=.9, fresh_gold=.7):
    """Return the verdict on two seeds.

    How often the reward model is right: at the start, after three rounds, on the responses after
    the first round before and after new rankings. Gold of the long run is .6.
    """
    rows = []
    for seed in range(2):
        for row in (
            dict(run="first", round=1, right_before=sft, right_after=old, gold=.5),
            dict(run="stale", round=2, right_before=old, right_after=old, gold=.55),
            dict(run="stale", round=3, right_before=old, right_after=stale, gold=.6),
            dict(run="fresh", round=2, right_before=new, right_after=new, gold=.6),
            dict(run="fresh", round=3, right_before=new, right_after=new, gold=fresh_gold),
            dict(run="sft", round=0, gold=.1),
        ):
            rows.append(row | {"seed": seed})
    return refresh.verdict(rows)


def test_the_verdict_holds_when_all_parts_do():
    text = verdict()
    assert "claim holds here" in text
    assert "0.90 right before PPO and 0.80 after 3 rounds" in text
    assert "from 0.85 to 0.90" in text
    assert "gold by +0.10" in text


@pytest.mark.parametrize("numbers", [
    pytest.param({"stale": .9}, id="never stale"),
    pytest.param({"new": .85}, id="new rankings teach nothing"),
    pytest.param({"fresh_gold": .6}, id="gold is no better"),
])
def test_the_verdict_holds_in_part_when_one_part_fails(numbers):
    assert "holds in part" in verdict(**numbers)


def test_the_verdict_does_not_hold_when_all_parts_fail():
    assert "does not hold" in verdict(stale=.95, new=.8, fresh_gold=.5)


@pytest.mark.parametrize("more", [False, True])
def test_it_runs_and_logs(s, capsys, monkeypatch, more):
    monkeypatch.setattr(refresh, "load", lambda cfg: s)
    refresh.main(refresh.Config(out=str(s.out), seed=2, more=more, **(TINY | {"rounds": 2})))
    rows = read_jsonl(s.out / "lab-refresh.jsonl")
    expected = [("first", 1), ("stale", 2), ("fresh", 2), ("more", 2)][:3 + more]
    assert [(r["run"], r["round"]) for r in rows] == [*expected, ("sft", 0), ("sft-greedy", 0)]
    assert {r["seed"] for r in rows} == {2}
    played = {r["run"]: r for r in rows if r["round"]}
    for when in ("before", "after"):
        assert {f"{name}_{when}" for name in ("right", "agrees", "possible")} <= set(rows[0])
    # The second round begins with the responses that end the first.
    for key in ("pairs", "possible"):
        for run in [run for run, number in expected if number == 2]:
            assert played[run][f"{key}_before"] == played["first"][f"{key}_after"]
    assert played["stale"]["right_before"] == played["first"]["right_after"]
    assert "the claim" in capsys.readouterr().out


@pytest.mark.parametrize("flag, settings", [
    ("--rounds 1", dict(rounds=1)),
    ("--updates 3", dict(updates=3)),
    ("--rankings 0", dict(rankings=0)),
])
def test_settings_that_cannot_work_are_user_errors(tmp_path, flag, settings):
    with pytest.raises(UserError, match=flag):
        refresh.main(refresh.Config(out=str(tmp_path), **settings))


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reward, "main", start)
    with pytest.raises(Started) as started:
        refresh.main(refresh.Config(out=str(tmp_path / "new"), seed=3, device="cpu"))
    stage = started.value.args[0]
    assert (stage.out, stage.seed, stage.device) == (str(tmp_path / "new"), 3, "cpu")
    assert "reward.pt is missing" in capsys.readouterr().out
