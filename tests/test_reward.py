"""What the reward model must satisfy. References are slow plain Python over one pair or token."""
import itertools
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import gpt
import ppo
import reward
import sft
from data import labelers, rankings
from data.rankings import (
    Comparison, aligned, pair_accuracy, probe_rows, report, targets, word_scores)
from data.text import pad
from data.tokenizer import fingerprint, get_tokenizer
from scaffold.cli import UserError
from scaffold.run import load_checkpoint, save_checkpoint
from tiny import (
    END,
    ENC,
    SPECIAL,
    read_jsonl,
    same_weights,
    save_reward,
    softplus,
    tiny_gpt,
    user,
    write_jsonl,
    write_tokenizer,
)

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder as sft.py leaves it, with an untrained model."""
    folder = tmp_path_factory.mktemp("chain")
    gpt.save_model(folder / "sft.pt", tiny_gpt(1), ENC, "")
    return folder


@pytest.fixture
def model():
    return reward.RewardModel(tiny_gpt(2)).eval()


def pairs(ranks):
    """Return (better, worse) of every pair that is not tied. Rank 0 is an absent response."""
    ordered = itertools.permutations(range(len(ranks)), 2)
    return [(i, j) for i, j in ordered if 0 < ranks[i] < ranks[j]]


# The ranking loss

RANKS = torch.tensor([
    [1, 2, 3, 4, 5],
    [2, 1, 2, 3, 1],
    [3, 1, 2, 0, 0],
    [1, 2, 0, 0, 0],
    [2, 2, 2, 2, 0],
    [1.5, 1, 9, 1, 0],
])


def random_scores():
    return torch.randn(RANKS.shape, dtype=torch.float64)


def test_ranking_loss_by_brute_force():
    """The mean over a prompt's pairs, then over the prompts that have one; K is ragged."""
    scores = random_scores()
    prompts = []
    for s, r in zip(scores.tolist(), RANKS.tolist()):
        prompts.append([softplus(s[j] - s[i]) for i, j in pairs(r)])
    assert [len(losses) for losses in prompts] == [10, 8, 3, 1, 0, 5]
    means = [sum(losses) / len(losses) for losses in prompts if losses]
    assert reward.ranking_loss(scores, RANKS).item() == pytest.approx(sum(means) / len(means))


def test_ranking_loss_by_hand():
    """K = 4 with one tie gives 5 pairs, whose scores differ by 1, 1, 2, 2 and 3.

    -log sigmoid of 1, 2 and 3 is .313262, .126928 and .048587.
    """
    scores = torch.tensor([[1., 2, -1, 0]])
    ranks = torch.tensor([[2, 1, 3, 2]])
    want = (2 * 0.313262 + 2 * 0.126928 + 0.048587) / 5
    assert reward.ranking_loss(scores, ranks).item() == pytest.approx(want, abs=1e-6)
    assert reward.ranking_loss(torch.zeros(1, 4), ranks).item() == pytest.approx(math.log(2))


def test_for_two_responses_it_is_the_logistic_loss():
    scores = torch.randn(20, 2)
    loss = reward.ranking_loss(scores, torch.tensor([[2, 1]] * 20))
    want = -torch.nn.functional.logsigmoid(scores[:, 1] - scores[:, 0]).mean()
    torch.testing.assert_close(loss, want)


def test_every_prompt_weighs_the_same():
    """One pair of loss log 2 beside 36 pairs of loss 0: half of log 2, not 1/37 of it."""
    scores = torch.stack([torch.zeros(9), -100 * torch.arange(9.)])
    ranks = torch.stack([torch.tensor([1, 2] + [0] * 7), torch.arange(1, 10)])
    assert reward.ranking_loss(scores, ranks).item() == pytest.approx(math.log(2) / 2)


def test_order_of_responses_and_of_prompts_changes_nothing():
    scores = random_scores()
    want = reward.ranking_loss(scores, RANKS)
    columns = torch.randperm(5)
    rows = torch.randperm(len(RANKS))
    torch.testing.assert_close(reward.ranking_loss(scores[:, columns], RANKS[:, columns]), want)
    torch.testing.assert_close(reward.ranking_loss(scores[rows], RANKS[rows]), want)


def test_only_differences_within_a_prompt_count():
    scores = random_scores()
    want = reward.ranking_loss(scores, RANKS)
    shifted = scores + 10 * torch.randn(len(RANKS), 1, dtype=torch.float64)
    torch.testing.assert_close(reward.ranking_loss(shifted, RANKS), want)
    # Of the ranks, only the order counts.
    torch.testing.assert_close(reward.ranking_loss(scores, RANKS ** 3), want)


@pytest.mark.parametrize("garbage", [0.0, 50.0, -1e6])
def test_an_absent_response_counts_for_nothing(garbage):
    scores = random_scores()
    dirty = torch.where(RANKS > 0, scores, garbage).requires_grad_()
    loss = reward.ranking_loss(dirty, RANKS)
    torch.testing.assert_close(loss, reward.ranking_loss(scores, RANKS))
    loss.backward()
    absent = dirty.grad[RANKS == 0]
    assert torch.equal(absent, torch.zeros_like(absent))


def test_tied_responses_do_not_push_each_other_apart():
    """The gradient of each tied score is that of its pair with the third response alone."""
    def pull(difference):
        return -torch.sigmoid(torch.tensor(-difference)) / 2

    scores = torch.tensor([[3., -3, 0]], requires_grad=True)
    reward.ranking_loss(scores, torch.tensor([[1, 1, 2]])).backward()
    want = torch.stack([pull(3.), pull(-3.), -pull(3.) - pull(-3.)])
    torch.testing.assert_close(scores.grad, want[None])


def test_the_gradient_raises_the_best_and_lowers_the_worst():
    scores = torch.randn(4, 5, requires_grad=True)
    reward.ranking_loss(scores, torch.tensor([[3, 1, 2, 5, 4]] * 4)).backward()
    assert (scores.grad[:, 1] < 0).all()
    assert (scores.grad[:, 3] > 0).all()
    torch.testing.assert_close(scores.grad.sum(1), torch.zeros(4))


def test_large_differences_are_neither_infinite_nor_nan():
    scores = torch.tensor([[-500., 500]], requires_grad=True)
    loss = reward.ranking_loss(scores, torch.tensor([[1, 2]]))
    loss.backward()
    assert loss.item() == 1000
    assert scores.grad.tolist() == [[-1, 1]]


@pytest.mark.parametrize("ranks", [[[1, 1]], [[2, 2, 2], [1, 0, 0]], [[0, 0]]], ids=str)
def test_nothing_but_ties_is_an_error(ranks):
    with pytest.raises(UserError, match="tied"):
        reward.ranking_loss(torch.zeros(len(ranks), len(ranks[0])), torch.tensor(ranks))


def test_rank_tensor_marks_absent_responses_with_0():
    assert reward.rank_tensor([[2, 1], [1, 2.5, 3]]).tolist() == [[2, 1, 0], [1, 2.5, 3]]


# The other losses

@pytest.mark.parametrize("margin", [0.0, 1.0, 2.5])
def test_token_margin_loss_by_brute_force(margin):
    better, worse = torch.randn(2, 4, 7, dtype=torch.float64)
    mask = torch.randint(2, (4, 7))
    inside = mask.bool()
    hinges = []
    for b, w in zip(better[inside].tolist(), worse[inside].tolist()):
        hinges.append(max(0.0, margin - b + w))
    loss = reward.token_margin_loss(better, worse, mask, margin)
    assert loss.item() == pytest.approx(sum(hinges) / len(hinges))


def test_token_margin_loss_case_by_case():
    """A large margin, one that just suffices, half of it, the wrong order, and outside the mask."""
    better = torch.tensor([[2., 1, 0.5, 0, 7]], requires_grad=True)
    worse = torch.tensor([[0., 0, 0, 1, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    loss = reward.token_margin_loss(better, worse, mask)
    assert loss.item() == (0 + 0 + 0.5 + 2) / 4
    loss.backward()
    assert better.grad[0, [0, 2, 3, 4]].tolist() == [0, -0.25, -0.25, 0]
    assert reward.token_margin_loss(better, worse, 0 * mask).item() == 0


def comparison(ranks, lengths, start, **extra):
    """Return a Comparison whose response i is `start` zeros and then tokens i + 1."""
    rows = [torch.tensor([0] * start + [i + 1] * n) for i, n in enumerate(lengths)]
    return Comparison(rows, start, dict(ranks=ranks, **extra))


def test_aligned_finds_every_pair_and_the_tokens_that_both_have():
    """Prompt, padding and the end of the longer response are outside; ties make no pair."""
    T = 9
    comparisons = [comparison([2, 1, 2], [3, 1, 4], 2), comparison([1, 2], [2, 2], 4)]
    scores = torch.randn(5, T)
    better, worse, mask = aligned(scores, comparisons)
    want = []
    first = 0  # row of the comparison's first response in `scores`
    for c in comparisons:
        for i, j in pairs(c.record["ranks"]):
            common = min(len(c.rows[i]), len(c.rows[j]))
            inside = [c.start <= t < common for t in range(T)]
            want.append((scores[first + i].tolist(), scores[first + j].tolist(), inside))
        first += len(c.rows)
    got = list(zip(better.tolist(), worse.tolist(), mask.tolist()))
    assert len(want) == 3
    assert sorted(map(str, got)) == sorted(map(str, want))
    # The response of one token shares one token with either of the others.
    assert sorted(m.sum().item() for m in mask) == [1, 1, 2]


def test_targets_are_centred_scores_or_else_ranks():
    assert targets(dict(ranks=[1, 2, 3])).tolist() == [1, 0, -1]
    assert targets(dict(ranks=[1, 2], scores=[0.5, 2.5])).tolist() == [-1, 1]


# The model

def test_score_is_read_at_the_last_real_token(model):
    """The score of each string alone, read at its last token: not on padding, not one early."""
    rows = [[5, 6, 7, END], [9, END], [3] * 20 + [END], [4, 4, END]]
    ids = pad([torch.tensor(r) for r in rows], SPECIAL["<|pad|>"])     # (B, T)
    lengths = torch.tensor([len(r) for r in rows])                         # (B,)
    scores = model.score(ids, lengths)
    for row, score in zip(rows, scores):
        torch.testing.assert_close(score, model(torch.tensor([row]))[0, -1])
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    garbage = torch.randint(ENC.n_vocab, ids.shape)
    # Neither the padding nor the batch matters. The end token does.
    torch.testing.assert_close(model.score(torch.where(real, ids, garbage), lengths), scores)
    torch.testing.assert_close(model.score(ids[1:2, :2], lengths[1:2]), scores[1:2])
    torch.testing.assert_close(model.score(ids.flip(0), lengths.flip(0)), scores.flip(0))
    unended = torch.where(real & (ids == END), 8, ids)
    assert (model.score(unended, lengths) - scores).abs().min() > 1e-3


def test_a_score_sees_the_tokens_so_far_and_nothing_later(model):
    ids = torch.randint(ENC.n_vocab, (2, 12))
    ids[1, :7] = ids[0, :7]
    scores = model(ids)
    torch.testing.assert_close(scores[0, :7], scores[1, :7])
    assert (scores[0, 7:] != scores[1, 7:]).all()
    assert scores.dtype == torch.float32


ASSISTANT = SPECIAL["<|assistant|>"]


def weighed_logprobs(model, row):
    """The second term of the score at every token of one row, token by token."""
    ids = torch.tensor([row])
    states = model.body.hidden(ids)[0]                                         # (T, C)
    logprobs = model.body(ids)[0].log_softmax(-1)                              # (T, V)
    begin = max(i for i, token in enumerate(row) if token == ASSISTANT) + 1
    sums = [torch.zeros(())] * begin
    for i in range(begin, len(row)):
        sums.append(sums[-1] + states[i] @ model.weight.weight[0] * logprobs[i - 1, row[i]])
    return torch.stack(sums)                                                   # (T,)


def test_the_log_probs_of_the_response_and_no_others_are_added(model):
    """Neither those of the prompt, nor of an earlier response; each with the weight after it."""
    rows = [[5, 6, ASSISTANT, 7, 8, END], [5, ASSISTANT, 9, END, 6, ASSISTANT, 7, 7, END],
            [*[4] * 20, ASSISTANT, 3, END], [5, ASSISTANT, END]]
    full = reward.RewardModel(model.body, ASSISTANT).eval()
    full.head = model.head
    torch.nn.init.normal_(full.weight.weight)
    ids = pad([torch.tensor(row) for row in rows], SPECIAL["<|pad|>"])         # (B, T)
    scores = full(ids, torch.tensor([len(row) for row in rows]))               # (B, T)
    plain = model(ids)                                                         # (B, T)
    for i, row in enumerate(rows):
        want = plain[i, :len(row)] + weighed_logprobs(full, row)
        torch.testing.assert_close(scores[i, :len(row)], want)


def test_without_logprobs_a_score_is_the_head_alone(train):
    _, out = train(epochs=1, logprobs=False)
    model, _ = reward.load_reward(out / "reward.pt")
    assert (model.weight.weight == 0).all()
    ids = torch.tensor([ids_of([user("Hi")], "good cow")])                     # (1, T)
    raw = model.head(model.body.hidden(ids))[..., 0]                           # (1, T)
    torch.testing.assert_close(model(ids), (raw - model.mean) / model.std)
    _, out = train(epochs=1)
    model, _ = reward.load_reward(out / "reward.pt")
    assert (model.weight.weight != 0).all()


def test_head_starts_with_std_1_over_root_of_c_plus_1():
    """Stiennon et al., B.1. Without the root, as in some code, scores start at almost 0."""
    body = SimpleNamespace(config=SimpleNamespace(n_embd=9_999))
    head = reward.RewardModel(body).head
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert head.weight.mean().item() == pytest.approx(0, abs=5e-4)
    assert head.bias.item() == 0


def test_every_parameter_gets_a_gradient(model):
    model.score(torch.tensor([[5, 6, END]]), torch.tensor([3])).sum().backward()
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.abs().sum() > 0
    # The normalisation is not a weight: no optimizer may change it.
    assert "mean" not in dict(model.named_parameters())


PROMPTS = [
    "Hi",
    "What does the cow say?",
    "Name two animals.",
    "Who bakes the bread?",
    "Is it late?",
    "苹果",
    "Why?",
    "Where is Ada?",
]
CONTEXT = 64


def ids_of(chat, response):
    """Prompt, response, end token; a long response loses its last tokens but not the end token."""
    ids = sft.render_prompt(chat, ENC) + ENC.encode_ordinary(response)
    return ids[:CONTEXT - 1] + [END]


def score_alone(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1]


def test_score_responses_scores_each_string_at_its_end_token(model):
    chats = [[user(p)] for p in PROMPTS]
    responses = ["moo", "", "It is late. " * 30, "<|end|>", *PROMPTS[4:]]
    rows = [ids_of(c, r) for c, r in zip(chats, responses)]
    assert len(rows[2]) == CONTEXT  # one response is too long
    want = [score_alone(model, ids).item() for ids in rows]
    got = reward.score_responses(model, ENC, chats, responses)
    assert got == pytest.approx(want, abs=1e-5)


def test_normalised_scores_of_sft_samples_have_mean_0_and_std_1(model):
    policy = tiny_gpt(1)
    cfg = reward.Config(normalise_on=40, max_new_tokens=8, seed=3)
    with torch.no_grad():
        model.head.weight.mul_(20)  # the scale is not 1 before
        model.head.bias.fill_(4)
    chats = [[user(p)] for p in PROMPTS * 6]
    records = [dict(prompt=chat) for chat in chats]
    # A prompt longer than the context gives no sample.
    records.insert(2, dict(prompt=[user("long " * 80)]))
    responses = sft.sample_responses(policy, ENC, chats[:40], 8, seed=3)
    rows = [ids_of(c, r) for c, r in zip(chats, responses)]

    def scores():
        return torch.stack([score_alone(model, ids) for ids in rows])

    before = scores()
    reward.normalise(model, policy, ENC, records, cfg)
    after = scores()
    assert abs(before.mean()) > 1
    assert abs(before.std() - 1) > 0.2
    assert after.mean().item() == pytest.approx(0, abs=1e-5)
    assert after.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(after.argsort(), before.argsort())
    want = (before - before.mean()) / before.std(correction=0)
    torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-5)
    reward.normalise(model, policy, ENC, records, cfg)  # a second time changes nothing
    torch.testing.assert_close(scores(), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 15])
def test_a_few_prompts_give_several_samples_each(model, n, capsys):
    """The std of one sample is 0: every later score would be wrong."""
    records = [dict(prompt=[user(p)]) for p in (PROMPTS * 2)[:n]]
    reward.normalise(model, tiny_gpt(1), ENC, records, reward.Config(max_new_tokens=8))
    assert f"warning: only {n} prompts" in capsys.readouterr().out
    assert 0.1 <= model.std.item() < 5


def test_the_scale_of_a_model_that_has_learned_nothing_is_bounded(model, capsys):
    """A std of 0.004 would turn a difference of nothing into scores of 36."""
    with torch.no_grad():
        model.head.weight.mul_(1e-3)
        model.weight.weight.zero_()
    records = [dict(prompt=[user(p)]) for p in PROMPTS * 4]
    reward.normalise(model, tiny_gpt(1), ENC, records, reward.Config(max_new_tokens=8))
    assert model.std.item() == pytest.approx(0.1)
    assert "warning: samples of the fine-tuned model score nearly the same" in (
        capsys.readouterr().out)


def test_a_saved_and_loaded_model_gives_the_same_scores(model, tmp_path):
    model.mean.fill_(0.4)
    model.std.fill_(2.5)
    save_reward(tmp_path / "reward.pt", model)
    loaded, enc = reward.load_reward(tmp_path / "reward.pt")
    ids = torch.randint(ENC.n_vocab, (3, 20))
    assert torch.equal(loaded(ids), model(ids))
    assert not loaded.training
    assert fingerprint(enc) == fingerprint(ENC)


def test_a_fine_tuned_model_is_not_a_reward_model(checkpoints):
    with pytest.raises(UserError, match="sft.pt: not a reward model"):
        reward.load_reward(checkpoints / "sft.pt")


# Tokens

HI = [user("Hi")]
RANKED = {"prompt": HI, "responses": ["a", "b"], "ranks": [1, 2]}

def tokenize(*records):
    return rankings.tokenize(list(records), sft.render_prompt, ENC, CONTEXT)


def test_tokenize_puts_prompt_response_and_end_together():
    [c] = tokenize(RANKED)
    prompt = sft.render_prompt(HI, ENC)
    assert c.rows[0].tolist() == [*prompt, *ENC.encode_ordinary("a"), END]
    assert c.rows[1].tolist() == [*prompt, *ENC.encode_ordinary("b"), END]
    assert len(c.rows) == 2
    assert c.start == len(prompt)
    assert c.record["ranks"] == [1, 2]


def test_text_cannot_spell_an_end_token():
    [c] = tokenize({**RANKED, "responses": ["a<|end|>", "b"]})
    assert [ids[c.start:].tolist().count(END) for ids in c.rows] == [1, 1]


def test_a_long_prompt_loses_its_beginning_for_all_its_responses_alike(capsys):
    """Otherwise a short response would be judged with more of the prompt than a long one."""
    prompt = [user("x y " * 60)]
    responses = ["a", "b c d e f", "g h"]
    [c] = tokenize(dict(prompt=prompt, responses=responses, ranks=[1, 2, 3]))
    longest = max(len(ENC.encode_ordinary(r)) + 1 for r in responses)
    assert c.start == CONTEXT - longest
    assert max(len(ids) for ids in c.rows) == CONTEXT
    kept = sft.render_prompt(prompt, ENC)[-c.start:]
    for ids, response in zip(c.rows, responses):
        assert ids.tolist() == kept + ENC.encode_ordinary(response) + [END]
    assert "1 of 1 prompts lose their beginning" in capsys.readouterr().out


def test_a_response_longer_than_the_context_is_left_out_with_all_its_entries(capsys):
    long = "long " * 80
    record = {
        "prompt": HI,
        "responses": ["a", long, "b"],
        "ranks": [3, 1, 2],
        "ranks_other": [1, 2, 3],
        "scores": [0.1, 0.2, 0.3],
    }
    [c] = tokenize(record, {**record, "responses": ["a", long, long]})
    assert len(c.rows) == 2
    assert c.start == len(sft.render_prompt(HI, ENC))
    assert c.record["responses"] == ["a", "b"]
    assert c.record["ranks"] == [3, 2]
    assert c.record["ranks_other"] == [1, 3]
    assert c.record["scores"] == [0.1, 0.3]
    assert "3 responses that do not fit at all are skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="no comparison fits"):
        tokenize({**record, "responses": [long] * 3})


# Scoring and reporting

def nine_responses():
    return [
        comparison([1, 2, 3], [5, 1, 9], 3),
        comparison([1, 2], [2, 7], 12),
        comparison([2, 1, 2, 3], [4, 4, 30, 1], 1),
    ]


@pytest.mark.parametrize("batch", [1, 2, 256])
def test_score_rows_keeps_the_order_and_equals_one_by_one(model, batch):
    """Rows are sorted by length to save padding and must be put back. Dropout must be off."""
    model.body.drop.p = 0.5
    rows = [ids for c in nine_responses() for ids in c.rows]
    scores = reward.score_rows(model.train(), rows, torch.device("cpu"), batch)
    model.eval()
    want = [score_alone(model, ids.tolist()).item() for ids in rows]
    assert scores == pytest.approx(want, abs=1e-5)
    assert len({round(s, 4) for s in want}) == 9


def test_score_all_gives_each_comparison_its_scores(model):
    comparisons = nine_responses()
    scores = reward.score_all(model, comparisons, torch.device("cpu"))
    want = [score_alone(model, ids.tolist()).item() for c in comparisons for ids in c.rows]
    assert [len(s) for s in scores] == [3, 2, 4]
    assert sum(scores, []) == pytest.approx(want, abs=1e-5)


PAIR_SCORES = [[0.1, 0.5, 0.5, -2.0], [1.0, 1.0], [3.0, 2.0, 1.0], [0.0, 1.0]]
PAIR_RANKS = [[3, 1, 2, 2], [1, 2], [1, 2, 4], [5, 5]]


@pytest.mark.parametrize("is_counted", [
    pytest.param(None, id="all"),
    pytest.param(lambda distance: distance == 1, id="distance 1"),
    pytest.param(lambda distance: distance > 1, id="distance above 1"),
])
def test_pair_accuracy_by_brute_force(is_counted):
    points = []
    for s, r in zip(PAIR_SCORES, PAIR_RANKS):
        for better, worse in pairs(r):
            if is_counted is None or is_counted(r[worse] - r[better]):
                points.append(0.5 if s[better] == s[worse] else float(s[better] > s[worse]))
    accuracy, n = pair_accuracy(PAIR_SCORES, PAIR_RANKS, is_counted)
    assert n == len(points)
    assert accuracy == pytest.approx(sum(points) / n)


def test_pair_accuracy_of_all_pairs_by_hand():
    """A tie in scores counts half: 3.5 of 5 pairs, 0.5 of 1, and 3 of 3."""
    accuracy, n = pair_accuracy(PAIR_SCORES, PAIR_RANKS, None)
    assert n == 9
    assert accuracy == pytest.approx((3.5 + 0.5 + 3) / 9)
    assert pair_accuracy(PAIR_SCORES, PAIR_RANKS) == (accuracy, n)


def test_pair_accuracy_without_pairs_is_nan():
    accuracy, n = pair_accuracy(PAIR_SCORES, PAIR_RANKS, lambda distance: distance > 9)
    assert n == 0
    assert math.isnan(accuracy)


def test_word_scores_by_hand():
    """Ranks 1, 2, 2 make two pairs.

    A token of the best response counts +1 in each pair, one of another response -1 in its pair,
    and one of the prompt nothing.
    """
    responses = [[1, 2, END], [1, 3, END], [3, 4, 4, END]]
    rows = [torch.tensor([7, 7, *ids]) for ids in responses]
    score = word_scores([Comparison(rows, 2, dict(ranks=[1, 2, 2]))])
    assert score == {1: pytest.approx((2 - 1) / 3), 2: 1.0, 3: -1.0, 4: -1.0, END: 0.0}


def two_labelers():
    """The second labeler ties the last pair and turns one of the other three round."""
    return [
        comparison([1, 2, 4], [3, 2, 5], 2, ranks_other=[1, 3, 2]),
        comparison([2, 1], [1, 4], 1, ranks_other=[1, 1]),
    ]


SCORES = [[0.0, 1.0, -1.0], [5.0, 6.0]]


def test_report_by_hand():
    """The word counts are -12, -2 and 0, then -4 twice: a tie in scores counts half."""
    row = report("held-out", two_labelers(), SCORES, {1: -4, 2: -1}, None)
    assert row.pop("split") == "held-out"
    assert row == pytest.approx({
        "prompts": 2,
        "pairs": 4,
        "accuracy": 3 / 4,
        "distance_1": 1 / 2,
        "distance_2": 1,
        "distance_3+": 1,
        "length_alone": 2 / 4,
        "word_counts": 0.5 / 4,
        "labelers_agree": 2 / 3,
    })


def test_distances_without_a_pair_are_not_reported():
    pairs = [comparison([1, 2], [3, 2], 2), comparison([2, 1], [1, 4], 1)]
    row = report("x", pairs, [[0.0, 1.0], [5.0, 6.0]], {}, None)
    assert [name for name in row if name.startswith("distance")] == ["distance_1"]
    assert row["distance_1"] == row["accuracy"] == 1 / 2


def test_no_agreement_is_reported_without_pairs_or_without_a_second_labeler():
    comparisons = two_labelers()
    for c in comparisons:
        c.record["ranks_other"] = [1] * len(c.rows)
    # Nothing to compare is not a disagreement.
    assert math.isnan(report("x", comparisons, SCORES, {}, None)["labelers_agree"])
    comparisons.append(comparison([1, 2], [1, 1], 1))
    assert "labelers_agree" not in report("x", comparisons, SCORES + [[1.0, 0.0]], {}, None)


# The stage as a whole

WORDS = ["mill", "dog", "bread", "cow"]


def ranked_file(path):
    """Responses with 'good' are better, with two still better; the other words say nothing."""
    records = []
    for i in range(96):
        word = WORDS[i % 4]
        responses = [f"{word} bad bad", f"good {word} bad", f"good good {word}"]
        n = 3 if i % 2 else 2
        order = [(i + k) % 3 for k in range(n)]
        records.append(dict(
            prompt=f"Tell me about the {word}.",
            responses=[responses[k] for k in order],
            ranks=[3 - k for k in order],
            user=f"u{i % 24}",
        ))
    return write_jsonl(path, *records)


@pytest.fixture
def train(checkpoints, tmp_path):
    """Run reward.main briefly in a new folder: train(**settings) -> (rows of the log, folder)."""
    def run(**settings):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(checkpoints, out)
        small = dict(
            data=str(ranked_file(tmp_path / "ranked.jsonl")),
            out=str(out),
            epochs=4,
            lr=3e-3,
            batch_prompts=8,
            normalise_on=32,
            max_new_tokens=8,
            gold="",
            device="cpu",
        )
        reward.main(reward.Config(**{**small, **settings}))
        return read_jsonl(out / "reward.jsonl"), out

    return run


@pytest.mark.parametrize("loss", ["ranking", "token-margin", "regression"])
def test_training_orders_the_responses_of_users_it_never_saw(train, loss):
    rows, out = train(loss=loss)
    held_out = next(r for r in rows if r.get("split") == "held-out users")
    assert held_out["accuracy"] > 0.9
    assert held_out["pairs"] >= 4
    losses = [r["loss"] for r in rows if "loss" in r]
    # It does not reach 0: a token that both responses share can have no margin.
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    model, _ = reward.load_reward(out / "reward.pt")
    for word in WORDS:
        chat = [user(f"Tell me about the {word}.")]
        good = score_alone(model, ids_of(chat, "good good cow"))
        bad = score_alone(model, ids_of(chat, "cow bad bad"))
        assert good > bad
    assert model.std != 1
    assert model.mean != 0


@pytest.mark.parametrize("name", ["print_row", "print_widest"])
def test_a_report_that_cannot_be_printed_leaves_a_finished_run(train, monkeypatch, tmp_path, name):
    def fail(*args):
        raise BrokenPipeError

    monkeypatch.setattr(reward, name, fail)
    with pytest.raises(BrokenPipeError):
        train(epochs=1)
    [out] = tmp_path.glob("run*")
    assert len([row for row in read_jsonl(out / "reward.jsonl") if "split" in row]) == 2
    assert (out / "reward.pt").exists()
    assert not list(out.glob("*.state*"))


def test_a_reward_model_carries_its_tokenizer(train, tmp_path, checkpoints):
    """Even one that was made from an older checkpoint, which only names it."""
    folder = tmp_path / "old"
    folder.mkdir()
    name = write_tokenizer(folder / "t.json")
    state = load_checkpoint(checkpoints / "sft.pt") | dict(tokenizer=name, tokenizer_json=None)
    save_checkpoint(folder / "sft.pt", **state)
    _, out = train(init=str(folder / "sft.pt"), epochs=1)
    shutil.rmtree(folder)
    moved = (out / "reward.pt").rename(tmp_path / "renamed.pt")
    assert fingerprint(reward.load_reward(moved)[1]) == fingerprint(ENC)


def test_without_users_the_report_is_on_held_out_prompts(train, tmp_path):
    records = [{"prompt": f"Tell me {i}.", "chosen": f"a{k}", "rejected": f"b{k}"}
               for i in range(40) for k in range(3)]
    rows, _ = train(data=str(write_jsonl(tmp_path / "pairs.jsonl", *records)), epochs=1)
    report = {row["split"]: row["prompts"] for row in rows if "split" in row}
    assert report == {"training prompts": 114, "held-out prompts": 6}


def test_same_seed_same_log_and_same_weights(train):
    (_, a), (_, b), (_, c) = (train(seed=s, epochs=1) for s in (7, 7, 8))
    log_a, log_b, log_c = ((out / "reward.jsonl").read_bytes() for out in (a, b, c))
    assert log_a == log_b
    assert log_b != log_c
    weights_a, weights_b = (load_checkpoint(out / "reward.pt")["model"] for out in (a, b))
    assert same_weights(weights_a, weights_b)


def test_an_unknown_loss_is_named(train):
    with pytest.raises(UserError, match="--loss hinge: choose ranking, token-margin or regression"):
        train(loss="hinge")


def test_a_missing_sft_model_is_trained_first_with_the_same_seed_and_device(
    tmp_path, monkeypatch, capsys
):
    class Stop(Exception):
        pass

    def stage(cfg):
        assert cfg.out == str(tmp_path)
        assert cfg.seed == 5
        assert cfg.device == "cpu"
        raise Stop

    monkeypatch.setattr(sft, "main", stage)
    with pytest.raises(Stop):
        reward.main(reward.Config(out=str(tmp_path), seed=5, device="cpu"))
    assert "sft.pt is missing" in capsys.readouterr().out


def test_new_and_existing_rankings_make_the_same_model(train, tmp_path, monkeypatch):
    """Making rankings draws random numbers. The initial head must not depend on how many."""
    path = str(ranked_file(tmp_path / "ranked.jsonl"))

    def weights(n_draws):
        def ensure(*_):
            torch.rand(n_draws)
            return [path, path]

        monkeypatch.setattr(labelers, "ensure", ensure)
        _, out = train(data="", epochs=1)
        return load_checkpoint(out / "reward.pt")["model"]

    assert same_weights(weights(n_draws=0), weights(n_draws=7))


# Another start: --init


def save_gpt(path, block_size=CONTEXT, n_embd=16, tokenizer=""):
    """Write a GPT of one layer, half as wide as that of the fixture `checkpoints`."""
    enc = get_tokenizer(tokenizer)
    sizes = gpt.GPTConfig(enc.n_vocab, block_size, n_layer=1, n_head=2, n_embd=n_embd)
    gpt.save_model(path, gpt.GPT(sizes), enc, tokenizer)
    return str(path)


def test_it_starts_from_the_weights_of_init(train, tmp_path):
    """After one step at a rate of almost 0, the body is that of the checkpoint named."""
    init = save_gpt(tmp_path / "half.pt")
    _, out = train(init=init, lr=1e-12, epochs=1)
    model, _ = reward.load_reward(out / "reward.pt")
    want, _, _ = gpt.load_model(init)
    assert model.body.config == want.config
    for a, b in zip(model.body.parameters(), want.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_init_of_the_fine_tuned_model_changes_nothing(train, checkpoints):
    (_, plain), (_, named) = (train(init=i, epochs=1) for i in ("", str(checkpoints / "sft.pt")))
    weights = [load_checkpoint(out / "reward.pt")["model"] for out in (plain, named)]
    assert same_weights(*weights)


def test_a_smaller_model_is_normalised_on_samples_of_the_policy(train, tmp_path):
    """Not on samples of the model that it starts from."""
    val = ranked_file(tmp_path / "val.jsonl")
    _, out = train(init=save_gpt(tmp_path / "half.pt"), val=str(val))
    policy, _, _ = gpt.load_model(out / "sft.pt")
    model, _ = reward.load_reward(out / "reward.pt")
    records = read_jsonl(ranked_file(tmp_path / "ranked.jsonl"))[:32]
    chats = [[user(r["prompt"])] for r in records]
    responses = sft.sample_responses(policy, ENC, chats, 8, seed=0)
    scores = torch.tensor(reward.score_responses(model, ENC, chats, responses))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("sizes", [
    pytest.param(dict(n_embd=16), id="smaller"),
    pytest.param(dict(n_embd=64, block_size=CONTEXT + 9), id="wider, longer context"),
])
def test_ppo_runs_with_reward_and_value_models_of_another_size(train, tmp_path, sizes):
    _, out = train(init=save_gpt(tmp_path / "other.pt", **sizes), epochs=1)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", *[{"prompt": p} for p in PROMPTS])
    ppo.main(ppo.Config(out=str(out), prompts=str(prompts), updates=2, rollout_size=8, epochs=1,
                        value_warmup=0, ptx=0.0, max_new_tokens=8, device="cpu"))
    policy, _, _ = gpt.load_model(out / "ppo.pt")
    tuned, _, _ = gpt.load_model(out / "sft.pt")
    assert policy.config == tuned.config
    assert not same_weights(policy, tuned)
    assert all(math.isfinite(r["loss/value_avg"]) for r in read_jsonl(out / "ppo.jsonl"))


def test_a_start_that_cannot_read_the_responses_is_an_error(train, tmp_path):
    short = save_gpt(tmp_path / "short.pt", block_size=CONTEXT - 1)
    with pytest.raises(UserError, match=f"--init {short}: its context of 63.*--block-size 64"):
        train(init=short)
    tokenizer = write_tokenizer(tmp_path / "tok.json", pattern=r"\S+|\s+")
    other = save_gpt(tmp_path / "other.pt", tokenizer=tokenizer)
    with pytest.raises(UserError, match=f"--init {other}: its tokenizer"):
        train(init=other)
    with pytest.raises(UserError, match="no such checkpoint"):
        train(init=str(tmp_path / "none.pt"))


# Probe pairs

PROBES = [
    {"prompt": "Hi", "chosen": "a", "rejected": "b b", "kind": "short"},
    {"prompt": "Why?", "chosen": "no no no", "rejected": "no", "kind": "long"},
    {"prompt": "Hi", "responses": ["x", "y", "z"], "ranks": [2, 1, 2], "kind": "short"},
    {"prompt": "Who?", "chosen": "me", "rejected": "you"},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: c", "rejected": "\n\nHuman: Hi\n\nAssistant: d"},
]


def test_probe_rows_by_brute_force():
    """A pair is right if the better response scores higher, half right at equal scores."""
    records = [{"kind": "a", "ranks": [1, 2]}, {"ranks": [3, 1, 1]}, {"kind": "a", "ranks": [2, 1]},
               {"kind": "a", "ranks": [1, 2]}, {"ranks": [1, 2]}]
    rows = probe_rows(records, [[2.0, 1.0], [0.0, 5.0, -1.0], [3.0, 3.0], [0.0, 7.0], [0.5, 0.0]])
    assert rows == [
        {"kind": "a", "share": 0.5, "n": 3, "better": (2 + 3 + 0) / 3, "worse": (1 + 3 + 7) / 3},
        {"kind": "pairs", "share": 2 / 3, "n": 3, "better": 4.5 / 3, "worse": 0.0},
    ]


def test_probe_prints_a_row_per_kind_and_trains_nothing(model, tmp_path, capsys):
    save_reward(tmp_path / "reward.pt", model)
    path = write_jsonl(tmp_path / "probes.jsonl", *PROBES)
    before = sorted(tmp_path.iterdir())
    reward.main(reward.Config(probe=str(path), out=str(tmp_path), device="cpu"))
    assert sorted(tmp_path.iterdir()) == before
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["short", "long", "pairs"]

    def score(prompt, response):
        return score_alone(model, ids_of([user(prompt)], response)).item()

    pairs = [
        [("Hi", "a", "b b"), ("Hi", "y", "x"), ("Hi", "y", "z")],
        [("Why?", "no no no", "no")],
        [("Who?", "me", "you"), ("Hi", "c", "d")],
    ]
    for line, group in zip(lines[1:], pairs):
        better = [score(prompt, chosen) for prompt, chosen, _ in group]
        worse = [score(prompt, rejected) for prompt, _, rejected in group]
        n = len(group)
        share = sum(a > b for a, b in zip(better, worse)) / n
        assert line.split()[1:] == [f"{share:.1%}", str(n), f"{sum(better) / n:.2f}",
                                    f"{sum(worse) / n:.2f}"]


def test_probe_without_a_reward_model_says_what_to_type(tmp_path):
    path = write_jsonl(tmp_path / "probes.jsonl", *PROBES)
    with pytest.raises(UserError, match=f"reward.pt is missing.*python reward.py --out {tmp_path}"):
        reward.main(reward.Config(probe=str(path), out=str(tmp_path), device="cpu"))
    assert [p.name for p in tmp_path.iterdir()] == ["probes.jsonl"]
