"""lab/rouge.py: what the judges compute, the made pairs, and a verdict that follows the numbers."""
import itertools
import json
import random

import pytest
import torch

import gpt
import reward
from data import village
from data.tokenizer import fingerprint
from lab import rouge
from lab_run import Started, start
from scaffold.run import save_checkpoint
from self_instruct import rouge_l
from tiny import ENC, read_jsonl


def test_average_ranks_share_ties():
    assert rouge.average_ranks([3.0, 1.0, 3.0, 7.0]) == [1.5, 0, 1.5, 3]


@pytest.mark.parametrize("x, y, expected", [
    ([1, 2, 3, 4], [10, 20, 30, 400], 1),
    ([1, 2, 3, 4], [4, 3, 2, 1], -1),
    ([1, 2, 2, 3], [1, 3, 2, 4], 4.5 / (4.5 * 5) ** 0.5),
])
def test_spearman_is_pearson_of_shared_ranks(x, y, expected):
    assert rouge.spearman(x, y) == pytest.approx(expected)


def test_spearman_of_a_constant_list_is_0():
    assert rouge.spearman([1, 1, 1], [1, 2, 3]) == 0


def test_spearman_without_ties_equals_the_formula_of_squared_differences():
    rng = random.Random(0)
    for _ in range(30):
        n = rng.randint(3, 9)
        x = rng.sample(range(100), n)
        y = rng.sample(range(100), n)
        squares = sum((sorted(x).index(a) - sorted(y).index(b)) ** 2 for a, b in zip(x, y))
        assert rouge.spearman(x, y) == pytest.approx(1 - 6 * squares / (n * (n * n - 1)))


def test_ideal_references_have_full_marks():
    rng = random.Random(1)
    for _ in range(25):
        task, _ = village.new_task(rng)
        assert village.gold(task, rouge.ideal(task, rng)) == pytest.approx(1)


@pytest.mark.parametrize("kind", rouge.MADE)
def test_made_pairs_are_right_and_wrong_and_overlap_misleads(kind):
    rng = random.Random(2)
    for _ in range(40):
        pair = rouge.made_pair(kind, rng)
        assert pair.prompt[-1]["role"] == "user"
        assert village.gold(pair.task, pair.reference) == 1
        assert village.gold(pair.task, pair.right) > village.gold(pair.task, pair.wrong)
        assert pair.right != pair.reference
        if kind != "other ignorance":
            assert rouge_l(pair.reference, pair.wrong) > rouge_l(pair.reference, pair.right)


def ranked_record(rng):
    """Return a record with six responses to one prompt, ranked by gold; the last is ideal."""
    task, prompt = village.new_task(rng, use="open_qa")
    responses = [village.demonstration(task, rng) for _ in range(5)] + [rouge.ideal(task, rng)]
    golds = [village.gold(task, r) for r in responses]
    ranks = [1 + sum(other > gold for other in set(golds)) for gold in golds]
    return {"prompt": prompt, "task": task, "responses": responses, "ranks": ranks}


def test_judges_agree_with_pairs_counted_by_hand():
    rng = random.Random(3)
    records = [ranked_record(rng) for _ in range(25)]
    golds = [[village.gold(r["task"], x) for x in r["responses"]] for r in records]
    flat = [gold for row in golds for gold in row]
    agreement = rouge.judge(records, flat, random.Random(0))
    assert agreement["reward model"] == pytest.approx((1, 1))
    assert agreement["labeler"] == pytest.approx((1, 1))
    assert agreement["ROUGE-L, ideal"].accuracy > agreement["ROUGE-L, demonstration"].accuracy
    lengths = []                                # of the better and of the worse response
    for record, row in zip(records, golds):
        words = [len(x.split()) for x in record["responses"]]
        for i, j in itertools.permutations(range(6), 2):
            if row[i] > row[j]:
                lengths.append((words[i], words[j]))
    right = sum((better > worse) + (better == worse) / 2 for better, worse in lengths)
    assert agreement["length"].accuracy == pytest.approx(right / len(lengths))
    reversed_scores = rouge.judge(records, [-gold for gold in flat], random.Random(0))
    assert reversed_scores["reward model"] == pytest.approx((0, -1))


RUN = {
    "ROUGE-L, demonstration": rouge.Agreement(0.6, 0.2),
    "ROUGE-L, ideal": rouge.Agreement(0.7, 0.3),
    "reward model": rouge.Agreement(0.9, 0.8),
}
MADE = {kind: rouge.Choices(rouge=0.1, reward=0.9) for kind in rouge.MADE}


def test_the_verdict_holds_when_rouge_loses():
    assert "claim holds" in rouge.verdict([RUN], [MADE])
    assert "model in 0." in rouge.verdict([RUN], [MADE])


@pytest.mark.parametrize("judge, part", [
    ("ROUGE-L, demonstration", "does not hold"),
    ("ROUGE-L, ideal", "not always worse;"),
])
def test_the_verdict_follows_the_numbers_of_every_seed(judge, part):
    better = RUN | {judge: rouge.Agreement(0.95, 0.9)}
    assert part in rouge.verdict([RUN, better], [MADE])


def test_the_verdict_names_the_pairs_that_mislead_the_reward_model():
    made = MADE | {"polite": rouge.Choices(rouge=0.1, reward=0.2)}
    assert "model in 1 (polite)." in rouge.verdict([RUN], [made])


def make_ranked_run(out):
    """Write a run with an untrained reward model and ranked responses."""
    torch.manual_seed(0)
    body = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 64, 2, 2, 16)).eval()
    gpt.save_model(out / "sft.pt", body, ENC, "")
    weights = reward.RewardModel(body).state_dict()
    save_checkpoint(out / "reward.pt", model=weights, gpt=vars(body.config), tokenizer="",
                        fingerprint=fingerprint(ENC))
    rng = random.Random(4)
    (out / "data").mkdir()
    for name in ("ranked_train", "ranked_val"):
        lines = [json.dumps(ranked_record(rng)) + "\n" for _ in range(12)]
        (out / "data" / f"{name}.jsonl").write_text("".join(lines))


def test_it_runs_and_logs(tmp_path, capsys):
    make_ranked_run(tmp_path)
    rouge.main(rouge.Config(out=str(tmp_path), n=8, seeds=2, device="cpu"))
    printed = capsys.readouterr().out
    assert printed.count("The claim ") == 1
    assert "reward model" in printed
    assert [r["seed"] for r in read_jsonl(tmp_path / "lab-rouge.jsonl")] == [0, 1]


def test_a_missing_checkpoint_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reward, "main", start)
    with pytest.raises(Started) as started:
        rouge.main(rouge.Config(out=str(tmp_path / "new"), seed=3, device="cpu"))
    stage = started.value.args[0]
    assert (stage.out, stage.seed, stage.device) == (str(tmp_path / "new"), 3, "cpu")
    assert "reward.pt is missing" in capsys.readouterr().out
