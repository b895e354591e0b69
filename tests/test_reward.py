"""What the reward model must satisfy, each stated once. Slow references are plain Python over one pair or one text at a time."""
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import gpt
import reward
import sft
from gpt import UserError

ENC = gpt.get_tokenizer()
END, PAD = (ENC._special_tokens[t] for t in ("<|end|>", "<|pad|>"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_gpt(seed):
    """2 layers x 32, random; pushed towards the end token, so that answers of 8 tokens end about half of the time."""
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 64, 2, 2, 32))
    torch.manual_seed(seed)  # after the init, and every matrix anew: the tests do not depend on how gpt.py draws its weights
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.1)
        end = model.wte.weight[END]
        model.ln_f.bias.copy_(5.5 * end / end.square().sum())
    return model.eval()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder as sft.py leaves it, without having trained."""
    folder = tmp_path_factory.mktemp("chain")
    gpt.save_model(folder / "sft.pt", tiny_gpt(1), ENC, "")
    return folder


@pytest.fixture
def model():
    return reward.RewardModel(tiny_gpt(2)).eval()


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def pairs(ranks):
    """(better, worse) of every pair that is not tied; rank 0 is no answer."""
    return [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if 0 < ranks[i] < ranks[j]]


def softplus(x):
    return math.log1p(math.exp(x))


# The ranking loss

RANKS = torch.tensor([[1, 2, 3, 4, 5], [2, 1, 2, 3, 1], [3, 1, 2, 0, 0], [1, 2, 0, 0, 0], [2, 2, 2, 2, 0], [1.5, 1, 9, 1, 0]])


def test_ranking_loss_by_brute_force():
    """Mean over the kept pairs of a prompt, then over the prompts that have one: ragged K, ties, a prompt that is all tied."""
    scores = torch.randn(RANKS.shape, dtype=torch.float64)
    prompts = [[softplus(s[j] - s[i]) for i, j in pairs(r)] for s, r in zip(scores.tolist(), RANKS.tolist())]
    assert [len(p) for p in prompts] == [10, 8, 3, 1, 0, 5]
    want = [sum(p) / len(p) for p in prompts if p]
    assert reward.ranking_loss(scores, RANKS).item() == pytest.approx(sum(want) / len(want))


def test_ranking_loss_by_hand():
    """K = 4 with a tie gives 5 of 6 pairs: differences 1, 1, 2, 2, 3, whose -log sigmoid are .313262, .126928, .048587."""
    scores, ranks = torch.tensor([[1., 2, -1, 0]]), torch.tensor([[2, 1, 3, 2]])
    assert reward.ranking_loss(scores, ranks).item() == pytest.approx((2 * 0.313262 + 2 * 0.126928 + 0.048587) / 5, abs=1e-6)
    assert reward.ranking_loss(torch.zeros(1, 4), ranks).item() == pytest.approx(math.log(2))


def test_two_answers_are_the_logistic_loss():
    scores = torch.randn(20, 2)
    loss = reward.ranking_loss(scores, torch.tensor([[2, 1]] * 20))
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(scores[:, 1] - scores[:, 0]).mean())


def test_every_prompt_weighs_the_same():
    """One pair of loss log 2 beside 36 pairs of loss 0: half of log 2. A mean over all pairs would be 1/37 of it."""
    scores = torch.stack([torch.zeros(9), -100 * torch.arange(9.)])
    ranks = torch.stack([torch.tensor([1, 2] + [0] * 7), torch.arange(1, 10)])
    assert reward.ranking_loss(scores, ranks).item() == pytest.approx(math.log(2) / 2)


def test_order_of_answers_and_of_prompts_changes_nothing():
    scores = torch.randn(RANKS.shape, dtype=torch.float64)
    want = reward.ranking_loss(scores, RANKS)
    answers, prompts = torch.randperm(5), torch.randperm(len(RANKS))
    torch.testing.assert_close(reward.ranking_loss(scores[:, answers], RANKS[:, answers]), want)
    torch.testing.assert_close(reward.ranking_loss(scores[prompts], RANKS[prompts]), want)


def test_only_differences_within_a_prompt_count():
    scores = torch.randn(RANKS.shape, dtype=torch.float64)
    shifted = scores + 10 * torch.randn(len(RANKS), 1, dtype=torch.float64)
    torch.testing.assert_close(reward.ranking_loss(shifted, RANKS), reward.ranking_loss(scores, RANKS))
    # Only the order of ranks counts, too, not their distance.
    torch.testing.assert_close(reward.ranking_loss(scores, RANKS ** 3), reward.ranking_loss(scores, RANKS))


@pytest.mark.parametrize("garbage", [0.0, 50.0, -1e6])
def test_an_absent_answer_counts_for_nothing(garbage):
    scores = torch.randn(RANKS.shape, dtype=torch.float64)
    dirty = torch.where(RANKS > 0, scores, garbage).requires_grad_()
    loss = reward.ranking_loss(dirty, RANKS)
    torch.testing.assert_close(loss, reward.ranking_loss(scores, RANKS))
    loss.backward()
    assert torch.equal(dirty.grad[RANKS == 0], torch.zeros_like(dirty.grad[RANKS == 0]))


def test_tied_answers_do_not_pull_at_each_other():
    """Between two tied answers nothing is learned, whatever they score: each sees only the third."""
    scores = torch.tensor([[3., -3, 0]], requires_grad=True)
    reward.ranking_loss(scores, torch.tensor([[1, 1, 2]])).backward()
    pull = lambda d: -torch.sigmoid(torch.tensor(-d)) / 2
    torch.testing.assert_close(scores.grad, torch.stack([pull(3.), pull(-3.), -pull(3.) - pull(-3.)])[None])


def test_the_gradient_raises_the_best_and_lowers_the_worst():
    scores = torch.randn(4, 5, requires_grad=True)
    reward.ranking_loss(scores, torch.tensor([[3, 1, 2, 5, 4]] * 4)).backward()
    assert (scores.grad[:, 1] < 0).all() and (scores.grad[:, 3] > 0).all()
    torch.testing.assert_close(scores.grad.sum(1), torch.zeros(4))


def test_large_differences_are_neither_infinite_nor_nan():
    scores = torch.tensor([[-500., 500]], requires_grad=True)
    loss = reward.ranking_loss(scores, torch.tensor([[1, 2]]))
    loss.backward()
    assert loss.item() == 1000 and scores.grad.tolist() == [[-1, 1]]


@pytest.mark.parametrize("ranks", [[[1, 1]], [[2, 2, 2], [1, 0, 0]], [[0, 0]]])
def test_nothing_but_ties_is_an_error(ranks):
    with pytest.raises(UserError, match="tied"):
        reward.ranking_loss(torch.zeros(len(ranks), len(ranks[0])), torch.tensor(ranks))


def test_rank_tensor_marks_absent_answers_with_0():
    assert reward.rank_tensor([[2, 1], [1, 2.5, 3]]).tolist() == [[2, 1, 0], [1, 2.5, 3]]


# The other losses

@pytest.mark.parametrize("margin", [0.0, 1.0, 2.5])
def test_token_margin_loss_by_brute_force(margin):
    better, worse = torch.randn(2, 4, 7, dtype=torch.float64)
    mask = torch.randint(2, (4, 7))
    hinges = [max(0.0, margin - b + w) for b, w, m in zip(better.flatten().tolist(), worse.flatten().tolist(), mask.flatten().tolist()) if m]
    assert reward.token_margin_loss(better, worse, mask, margin).item() == pytest.approx(sum(hinges) / len(hinges))


def test_token_margin_loss_case_by_case():
    better, worse = torch.tensor([[2., 1, 0.5, 0, 7]], requires_grad=True), torch.tensor([[0., 0, 0, 1, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])  # enough, just enough, half of it, the wrong way round, not aligned
    loss = reward.token_margin_loss(better, worse, mask)
    assert loss.item() == (0 + 0 + 0.5 + 2) / 4
    loss.backward()
    assert better.grad[0, [0, 2, 3, 4]].tolist() == [0, -0.25, -0.25, 0]
    assert reward.token_margin_loss(better, worse, 0 * mask).item() == 0


def example(ranks, lengths, start, **extra):
    """(answers, start, record) as `tokenize` makes them; answer i is `start` zeros and then tokens of value i + 1."""
    return [torch.tensor([0] * start + [i + 1] * n) for i, n in enumerate(lengths)], start, dict(ranks=ranks, **extra)


def test_aligned_finds_every_pair_and_the_tokens_both_have():
    """The overhang of the longer answer, the prompt and the padding take no part; tied answers make no pair."""
    examples = [example([2, 1, 2], [3, 1, 4], 2), example([1, 2], [2, 2], 4)]
    T, flat = 9, [a for e in examples for a in e[0]]
    scores = torch.randn(5, T)
    better, worse, mask = reward.aligned(scores, None, examples)
    want, row = [], 0
    for answers, start, record in examples:
        for i, j in pairs(record["ranks"]):
            common = min(len(flat[row + i]), len(flat[row + j]))
            want.append((scores[row + i].tolist(), scores[row + j].tolist(), [start <= t < common for t in range(T)]))
        row += len(answers)
    got = list(zip(better.tolist(), worse.tolist(), mask.tolist()))
    assert len(want) == 3 and sorted(map(str, got)) == sorted(map(str, want))
    assert sorted(m.sum().item() for m in mask) == [1, 1, 2]  # the answer of one token shares one with either other


def test_targets_are_centred_scores_or_else_ranks():
    assert reward.targets(dict(ranks=[1, 2, 3])).tolist() == [1, 0, -1]
    assert reward.targets(dict(ranks=[1, 2], scores=[0.5, 2.5])).tolist() == [-1, 1]


# The model

def test_score_is_read_at_the_last_real_token(model):
    """Not at the padding's, and not at the one before the end token: the score of each text alone, read at its own end."""
    texts = [[5, 6, 7, END], [9, END], [3] * 20 + [END], [4, 4, END]]
    ids, lengths = gpt.pad([torch.tensor(t) for t in texts], PAD), torch.tensor([len(t) for t in texts])
    scores = model.score(ids, lengths)
    for text, score in zip(texts, scores):
        torch.testing.assert_close(score, model(torch.tensor([text]))[0, -1])
    garbage = torch.randint(ENC.n_vocab, ids.shape)
    here = torch.arange(ids.shape[1]) < lengths[:, None]
    torch.testing.assert_close(model.score(torch.where(here, ids, garbage), lengths), scores)       # padding is not seen
    torch.testing.assert_close(model.score(ids[1:2, :2], lengths[1:2]), scores[1:2])                # nor is the batch
    torch.testing.assert_close(model.score(ids.flip(0), lengths.flip(0)), scores.flip(0))
    unended = torch.where(here & (ids == END), 8, ids)
    assert (model.score(unended, lengths) - scores).abs().min() > 1e-3                              # but the end token is


def test_a_score_sees_its_text_so_far_and_nothing_later(model):
    ids = torch.randint(ENC.n_vocab, (2, 12))
    ids[1, :7] = ids[0, :7]
    scores = model(ids)
    torch.testing.assert_close(scores[0, :7], scores[1, :7])
    assert (scores[0, 7:] != scores[1, 7:]).all() and scores.dtype == torch.float32


def test_head_starts_with_deviation_1_over_root_of_c_plus_1():
    """Stiennon et al., B.1. (1 / (C + 1) without the root, as some have it, starts with scores of almost 0.)"""
    head = reward.RewardModel(SimpleNamespace(config=SimpleNamespace(n_embd=9_999))).head
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert head.weight.mean().item() == pytest.approx(0, abs=5e-4)
    assert head.bias.item() == 0


def test_the_body_learns_too(model):
    model.score(torch.tensor([[5, 6, END]]), torch.tensor([3])).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert "mean" not in dict(model.named_parameters())  # the normalisation is no weight: no optimizer may move it


QUESTIONS = ["Hi", "What does the cow say?", "Name two animals.", "Who bakes the bread?", "Is it late?", "苹果", "Why?", "Where is Ada?"]


def sampled(policy, chats, seed, n=8):
    """SFT samples as the reward model meets them: prompt, answer, end token."""
    answers = sft.reply(policy, ENC, chats, n, seed=seed)
    return [(sft.render_prompt(c, ENC) + ENC.encode_ordinary(a))[:63] + [END] for c, a in zip(chats, answers)]


def test_score_answers_scores_each_text_at_its_end_token(model):
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS]
    answers = ["moo", "", "It is late. " * 30, "<|end|>", *QUESTIONS[4:]]  # one exceeds the context: its tail goes, not the end token
    texts = [(sft.render_prompt(c, ENC) + ENC.encode_ordinary(a))[:63] + [END] for c, a in zip(chats, answers)]
    want = [model(torch.tensor([t]))[0, -1].item() for t in texts]
    assert len(texts[2]) == 64
    assert reward.score_answers(model, ENC, chats, answers) == pytest.approx(want, abs=1e-5)


def test_normalised_scores_of_sft_samples_have_mean_0_and_deviation_1(model):
    policy, cfg = tiny_gpt(1), reward.Config(normalise_on=40, max_new_tokens=8, seed=3)
    with torch.no_grad():
        model.head.weight.mul_(20)  # a scale that is not 1 to begin with
        model.head.bias.fill_(4)
    records = [dict(prompt=[{"role": "user", "content": q}]) for q in QUESTIONS * 6]
    records.insert(2, dict(prompt=[{"role": "user", "content": "long " * 80}]))  # longer than the context: no sample of it
    texts = sampled(policy, [r["prompt"] for r in records if len(r["prompt"][0]["content"]) < 300][:40], 3)
    score = lambda: torch.stack([model(torch.tensor([t]))[0, -1] for t in texts]).detach()
    before = score()
    reward.normalise(model, policy, ENC, records, cfg)
    after = score()
    assert abs(before.mean()) > 1 and abs(before.std() - 1) > 0.2
    assert after.mean().item() == pytest.approx(0, abs=1e-5) and after.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(after.argsort(), before.argsort())
    reward.normalise(model, policy, ENC, records, cfg)  # once more changes nothing
    torch.testing.assert_close(score(), after, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, (before - before.mean()) / before.std(correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_samples_to_normalise_on_are_an_error_not_nan(model, n):
    """A deviation of nothing is NaN, and of one sample 0: every later score would be NaN, or a thousand times too large."""
    records = [dict(prompt=[{"role": "user", "content": q}]) for q in QUESTIONS]
    with pytest.raises(UserError, match="normalise"):
        reward.normalise(model, tiny_gpt(1), ENC, records, reward.Config(normalise_on=n, max_new_tokens=8))


def save(path, model):
    gpt.save_checkpoint(path, model=model.state_dict(), gpt=vars(model.body.config), tokenizer="", fingerprint=gpt.fingerprint(ENC))


def test_saved_and_loaded_it_scores_the_same(model, tmp_path):
    model.mean.fill_(0.4)
    model.std.fill_(2.5)
    save(tmp_path / "reward.pt", model)
    loaded, enc = reward.load_reward(tmp_path / "reward.pt")
    ids = torch.randint(ENC.n_vocab, (3, 20))
    assert torch.equal(loaded(ids), model(ids))
    assert not loaded.training and gpt.fingerprint(enc) == gpt.fingerprint(ENC)


def test_a_fine_tuned_model_is_no_reward_model(checkpoints):
    with pytest.raises(UserError, match="sft.pt: no reward model"):
        reward.load_reward(checkpoints / "sft.pt")


# Reading ranked answers

HI = [{"role": "user", "content": "Hi"}]
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who are you?"}]
said = lambda text: {"role": "assistant", "content": text}

FORMATS = {
    "ranked": ({"prompt": "Hi", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}, (HI, ["a", "b", "c"], [2, 1, 2])),
    "ranked, chat": ({"prompt": CHAT, "responses": ["a", "b"], "ranks": [1.5, 1]}, (CHAT, ["a", "b"], [1.5, 1])),
    "pair": ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, (HI, ["a", "b"], [1, 2])),
    "pair, chat": ({"prompt": CHAT, "chosen": "a", "rejected": ""}, (CHAT, ["a", ""], [1, 2])),
    "pair of chats": ({"chosen": CHAT + [said("a")], "rejected": CHAT + [said("b")]}, (CHAT, ["a", "b"], [1, 2])),
    "pair of chats beside a prompt": ({"prompt": "Hi", "chosen": HI + [said("a")], "rejected": HI + [said("b")]}, (HI, ["a", "b"], [1, 2])),
    "what follows a prompt": ({"prompt": CHAT, "chosen": [said("a")], "rejected": [said("b")]}, (CHAT, ["a", "b"], [1, 2])),
    "what follows a text": ({"prompt": "Hi", "chosen": [said("a")], "rejected": [said("b")]}, (HI, ["a", "b"], [1, 2])),
    "several turns follow": ({"prompt": HI, "chosen": [said("Hello."), *HI, said("a")], "rejected": [said("Hello."), *HI, said("b")]},
                             ([*HI, said("Hello."), *HI], ["a", "b"], [1, 2])),
    "whole chats that the assistant opens": ({"prompt": [said("Hello."), *HI], "chosen": [said("Hello."), *HI, said("a")], "rejected": [said("Hello."), *HI, said("b")]},
                                             ([said("Hello."), *HI], ["a", "b"], [1, 2])),
    "transcripts": ({"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, (HI, ["a", "b"], [1, 2])),
    "no blank lines before, no spaces": ({"chosen": "Human:Hi\n\nAssistant:a", "rejected": "\n\n\nHuman:  Hi\n\nAssistant: b\n"}, (HI, ["a", "b"], [1, 2])),
    "Human: in the middle": ({"chosen": "\n\nHuman: Say Human: or\nAssistant: now\n\nAssistant: Human: it is", "rejected": "\n\nHuman: Say Human: or\nAssistant: now\n\nAssistant: no"},
                             ([{"role": "user", "content": "Say Human: or\nAssistant: now"}], ["Human: it is", "no"], [1, 2])),
    "several turns": ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Two\n\nparts?\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Two\n\nparts?\n\nAssistant: "},
                      ([*HI, said("Hello."), {"role": "user", "content": "Two\n\nparts?"}], ["a", ""], [1, 2])),
}


@pytest.mark.parametrize("record, want", FORMATS.values(), ids=FORMATS)
def test_every_format_is_read(record, want, tmp_path):
    assert reward.read_comparison(record, "here") == want
    [found] = reward.load_comparisons(write(tmp_path / "r.jsonl", {**record, "user": "u1"}))
    assert (found["prompt"], found["responses"], found["ranks"]) == want and found["user"] == "u1"


RANKED = {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2]}
BAD = [{**RANKED, "responses": ["a"], "ranks": [1]}, {**RANKED, "ranks": [1, 2, 3]}, {**RANKED, "responses": "ab"}, {**RANKED, "ranks": 1},
       {**RANKED, "responses": []}, {**RANKED, "responses": ["a", 2]}, {**RANKED, "responses": ["a", None]}, {**RANKED, "prompt": 5}, {**RANKED, "prompt": []},
       *({**RANKED, "ranks": [1, r]} for r in (math.nan, math.inf, -math.inf, 0, -1, 0.5, True, "2", None, [2])),
       {**RANKED, "scores": [1.0]}, {**RANKED, "scores": 3},
       {"prompt": "Hi", "chosen": "a"}, {"prompt": "Hi", "rejected": "a"}, {"responses": ["a", "b"], "ranks": [1, 2]}, {"text": "Hi"}, {},
       {"prompt": "Hi", "chosen": 1, "rejected": "b"}, {"chosen": "no transcript", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, {"chosen": [], "rejected": []},
       {"chosen": [{"role": "boss", "content": "x"}], "rejected": HI}, [1, 2], "text", "{", '"text"', "null"]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_record_is_named_in_one_line(bad, tmp_path):
    with pytest.raises(UserError, match=r"r\.jsonl:2: ") as e:
        reward.load_comparisons(write(tmp_path / "r.jsonl", RANKED, bad))
    assert "\n" not in str(e.value)


def test_what_cannot_be_compared_is_left_out_aloud(tmp_path, capsys):
    """Other prompts on the two sides, no answer at the end: odd. All tied, or the same text twice: nothing to learn."""
    transcript = lambda prompt, answer: f"\n\nHuman: {prompt}\n\nAssistant: {answer}"
    odd = [{"chosen": transcript("Hi", "a"), "rejected": transcript("Ho", "b")}, {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"},
           {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}]
    tied = [{**RANKED, "ranks": [3, 3]}, {"prompt": "Hi", "chosen": "a", "rejected": "a"}]
    path = write(tmp_path / "r.jsonl", *odd, RANKED, *tied, RANKED)
    assert len(reward.load_comparisons(path)) == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "r.jsonl: 3 of 7 records left out" in said[0] and "prompt" in said[0]
    assert "r.jsonl: 2 of 7 records left out" in said[1] and "tied" in said[1]
    with pytest.raises(UserError, match="r.jsonl: no record"):
        reward.load_comparisons(write(tmp_path / "r.jsonl", *odd, *tied))


def test_ties_beside_other_ranks_are_kept(tmp_path, capsys):
    record = {"prompt": "Hi", "responses": ["a", "a", "b", "c"], "ranks": [1, 2, 2, 2]}
    [found] = reward.load_comparisons(write(tmp_path / "r.jsonl", record))
    assert found["ranks"] == [1, 2, 2, 2] and capsys.readouterr().out == ""


# Tokens

def test_tokenize_puts_prompt_answer_and_end_together():
    [(answers, start, record)] = reward.tokenize([{**RANKED, "prompt": HI}], ENC, 64)
    prompt = sft.render_prompt(HI, ENC)
    assert [a.tolist() for a in answers] == [prompt + ENC.encode_ordinary(t) + [END] for t in "ab"]
    assert start == len(prompt) and record["ranks"] == [1, 2]


def test_text_cannot_spell_an_end_token():
    [(answers, start, _)] = reward.tokenize([{**RANKED, "prompt": HI, "responses": ["a<|end|>", "b"]}], ENC, 64)
    assert [a.tolist().count(END) - a[:start].tolist().count(END) for a in answers] == [1, 1]


def test_a_long_prompt_loses_its_beginning_for_all_its_answers_alike(capsys):
    """Cut for each answer on its own, the short answer would be judged with more of the prompt than the long one."""
    responses, record = ["a", "b c d e f", "g h"], {"prompt": [{"role": "user", "content": "x y " * 60}], "ranks": [1, 2, 3]}
    [(answers, start, _)] = reward.tokenize([{**record, "responses": responses}], ENC, 64)
    whole = sft.render_prompt(record["prompt"], ENC)
    longest = max(len(ENC.encode_ordinary(r)) + 1 for r in responses)
    assert start == 64 - longest and max(map(len, answers)) == 64
    for a, text in zip(answers, responses):
        assert a.tolist() == whole[-start:] + ENC.encode_ordinary(text) + [END]  # the end token is never what is cut
    assert "1 of 1 prompts lose their beginning" in capsys.readouterr().out


def test_an_answer_longer_than_the_context_is_left_out_with_all_that_belongs_to_it(capsys):
    record = {"prompt": HI, "responses": ["a", "long " * 80, "b"], "ranks": [3, 1, 2], "ranks_other": [1, 2, 3], "scores": [0.1, 0.2, 0.3]}
    [(answers, start, kept)] = reward.tokenize([record, {**record, "responses": ["a", "long " * 80, "long " * 80]}], ENC, 64)
    assert len(answers) == 2 and start == len(sft.render_prompt(HI, ENC))
    assert [kept[k] for k in ("responses", "ranks", "ranks_other", "scores")] == [["a", "b"], [3, 2], [1, 3], [0.1, 0.3]]
    assert "3 answers longer than the context are left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="no comparison fits"):
        reward.tokenize([{**record, "responses": ["long " * 80] * 3}], ENC, 64)


# Scoring and reporting

@pytest.mark.parametrize("batch", [1, 2, 256])
def test_score_all_keeps_the_order_and_equals_one_by_one(model, batch):
    """Rows are sorted by length to save padding, so they must find their way back. And dropout must not play dice."""
    model.body.drop.p = 0.5
    examples = [example([1, 2, 3], [5, 1, 9], 3), example([1, 2], [2, 7], 12), example([2, 1, 2, 3], [4, 4, 30, 1], 1)]
    scores = reward.score_all(model.train(), examples, torch.device("cpu"), batch)
    model.eval()
    with torch.no_grad():
        want = [[model(a[None])[0, -1].item() for a in e[0]] for e in examples]
    assert [len(s) for s in scores] == [3, 2, 4]
    assert sum(scores, []) == pytest.approx(sum(want, []), abs=1e-5)
    assert len({round(s, 4) for s in sum(want, [])}) == 9


def test_pair_accuracy_by_brute_force():
    scores = [[0.1, 0.5, 0.5, -2.0], [1.0, 1.0], [3.0, 2.0, 1.0], [0.0, 1.0]]
    ranks = [[3, 1, 2, 2], [1, 2], [1, 2, 4], [5, 5]]
    for distance in (None, lambda d: d == 1, lambda d: d > 1, lambda d: d > 9):
        points = [0.5 if s[i] == s[j] else float(s[i] > s[j]) for s, r in zip(scores, ranks) for i, j in pairs(r)
                  if distance is None or distance(r[j] - r[i])]
        accuracy, n = reward.pair_accuracy(scores, ranks, distance)
        assert n == len(points)
        assert accuracy == pytest.approx(sum(points) / n) if n else math.isnan(accuracy)
    assert reward.pair_accuracy(scores, ranks) == (pytest.approx((3.5 + 0.5 + 3) / 9), 9)  # a tie in scores counts half


def test_word_scores_by_hand():
    """Ranks 1, 2, 2: two pairs. The best answer's tokens count +1 in each, the two others' -1 once; the prompt's never."""
    answers = [torch.tensor([7, 7] + words) for words in ([1, 2, END], [1, 3, END], [3, 4, 4, END])]
    [score] = [reward.word_scores([(answers, 2, dict(ranks=[1, 2, 2]))])]
    assert score == {1: pytest.approx((2 - 1) / 3), 2: 1.0, 3: -1.0, 4: -1.0, END: 0.0}


def test_report_rows():
    """The second labeler ties the last pair and turns one of the other three round: people agree on 2 of 3."""
    examples = [example([1, 2, 4], [3, 2, 5], 2, ranks_other=[1, 3, 2]), example([2, 1], [1, 4], 1, ranks_other=[1, 1])]
    scores = [[0.0, 1.0, -1.0], [5.0, 6.0]]
    row = reward.report("held-out", examples, scores, [("count", [[1, 2, 3], [0, 0]])])
    assert row.pop("split") == "held-out"
    assert row == pytest.approx({"prompts": 2, "pairs": 4, "accuracy": 3 / 4, "distance_1": 1 / 2, "distance_2": 1, "distance_3+": 1,
                                 "length_alone": 2 / 4, "count": 0.5 / 4, "labelers_agree": 2 / 3})
    for e in examples:
        e[2]["ranks_other"] = [1] * len(e[0])
    assert math.isnan(reward.report("x", examples, scores)["labelers_agree"])  # nothing to compare is no disagreement
    assert "labelers_agree" not in reward.report("x", examples + [example([1, 2], [1, 1], 1)], scores + [[1.0, 0.0]])


# The stage as a whole

def ranked_file(path, n=96):
    """Answers that say 'good' are better, and better still when they say it twice: easy, and the same words in any order."""
    words, records = ["mill", "dog", "bread", "cow"], []
    for i in range(n):
        w = words[i % 4]
        texts = [f"{w} bad bad", f"good {w} bad", f"good good {w}"]
        order = [(i + k) % 3 for k in range(3 if i % 2 else 2)]
        records.append(dict(prompt=f"Tell me about the {w}.", responses=[texts[k] for k in order], ranks=[3 - k for k in order], user=f"u{i % 24}"))
    return write(path, *records)


@pytest.fixture
def train(checkpoints, tmp_path):
    """train(**settings) -> (rows of the log, the folder): one short run of reward.main, each in its own folder."""
    def run(**settings):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(checkpoints, out)
        small = dict(data=str(ranked_file(tmp_path / "ranked.jsonl")), out=str(out), epochs=4, lr=3e-3, batch_prompts=8, normalise_on=32, max_new_tokens=8, gold="", device="cpu")
        reward.main(reward.Config(**{**small, **settings}))
        return [json.loads(line) for line in (out / "reward.jsonl").read_text().splitlines()], out
    return run


@pytest.mark.parametrize("loss", ["ranking", "token-margin", "regression"])
def test_training_orders_the_answers_of_users_it_never_saw(train, loss):
    rows, out = train(loss=loss)
    held_out = next(r for r in rows if r.get("split") == "held-out users")
    assert held_out["accuracy"] > 0.9 and held_out["pairs"] >= 4
    losses = [r["loss"] for r in rows if "loss" in r]
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]  # not 0: a token that both answers share can have no margin
    model, _ = reward.load_reward(out / "reward.pt")
    chats = [[{"role": "user", "content": f"Tell me about the {w}."}] for w in ("mill", "dog", "bread", "cow")]
    good, bad = ([sft.render_prompt(c, ENC) + ENC.encode_ordinary(text) + [END] for c in chats] for text in ("good good cow", "cow bad bad"))
    for a, b in zip(good, bad):
        assert model(torch.tensor([a]))[0, -1] > model(torch.tensor([b]))[0, -1]
    assert model.std != 1 and model.mean != 0  # normalised, and saved so


def test_same_seed_same_log_and_same_weights(train):
    logs, weights = zip(*(((out / "reward.jsonl").read_bytes(), gpt.load_checkpoint(out / "reward.pt")["model"])
                          for _, out in (train(seed=s, epochs=1) for s in (7, 7, 8))))
    assert logs[0] == logs[1] != logs[2]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_an_unknown_loss_is_named(train):
    with pytest.raises(UserError, match="--loss hinge: choose ranking, token-margin or regression"):
        train(loss="hinge")


def test_a_missing_fine_tuned_model_is_trained_first_with_the_same_seed_and_device(tmp_path, monkeypatch, capsys):
    class Stop(Exception):
        pass
    def stage(cfg):
        assert (cfg.out, cfg.seed, cfg.device) == (str(tmp_path), 5, "cpu")
        raise Stop
    monkeypatch.setattr(sft, "main", stage)
    with pytest.raises(Stop):
        reward.main(reward.Config(out=str(tmp_path), seed=5, device="cpu"))
    assert "sft.pt is missing" in capsys.readouterr().out


def test_rankings_made_just_now_make_the_same_model_as_rankings_that_were_there(train, tmp_path, monkeypatch):
    """Making them draws random numbers; the head must not be drawn from what is left."""
    from data import labelers
    runs = []
    for n in (0, 7):
        path = str(ranked_file(tmp_path / "ranked.jsonl"))
        monkeypatch.setattr(labelers, "ensure", lambda *_, n=n: torch.rand(n) is not None and [path, path])
        _, out = train(data="", epochs=1)
        runs.append(gpt.load_checkpoint(out / "reward.pt")["model"])
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
