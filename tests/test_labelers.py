"""The labelers: ranks with ties, and about as much agreement as between people."""
import random
from itertools import combinations

import pytest

from data import corpus, labelers
from data.village import demonstration, new_task
from scaffold.cli import UserError


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
