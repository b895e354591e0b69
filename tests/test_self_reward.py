"""Tests of self_reward.py: which pairs are made, how responses are judged, what a round trains.

One round of DPO is checked against a loop written out by hand. The verdicts and the seed data are
tested in test_verdicts.py, the measures of the table in test_judge_quality.py.
"""

import copy
import math
import os
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from test_verdicts import HI, ranked, tasks_and_responses
from tiny import assistant, user, write_jsonl

import dpo
import gpt
import self_instruct
import self_reward
import sft
from data import probes, verdicts, village
from data.records import read_records
from data.tokenizer import get_tokenizer
from data.verdicts import judge_chat, prompt_text
from lab import judge_quality
from scaffold.cli import UserError, parse
from scaffold.optim import adamw, lr_at
from scaffold.run import take_step
from self_reward import Config

ENC = get_tokenizer()
NAN = float("nan")


def tiny_gpt(seed=0, block=128, scale=0.1):
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, block, 1, 2, 16))
    for p in model.parameters():
        p.data += scale * torch.randn_like(p)
    return model.eval()


# The pairs


def test_the_highest_score_is_paired_with_the_lowest():
    responses = [list("abcd"), list("efgh")]
    pairs, dropped = self_reward.make_pairs(responses, [[3, 9, 1, 5], [2, 1, 8, 7]], 1.0)
    assert pairs == [(0, 1, 2), (1, 2, 1)]
    assert not dropped


@pytest.mark.parametrize(
    "responses, scores, reason",
    [
        ("ab", [5.0, 5.0], "equal scores"),
        ("aa", [5.0, 3.0], "equal texts"),
        ("ab", [5.0, 4.5], "below the margin"),
        ("ab", [5.0, None], "fewer than two were judged"),
        ("ab", [None, None], "fewer than two were judged"),
        ("ab", [5.0, NAN], "fewer than two were judged"),
        ("abc", [None, 4.0, 4.0], "equal scores"),
    ],
)
def test_prompts_without_a_pair_are_counted(responses, scores, reason):
    pairs, dropped = self_reward.make_pairs([list(responses)], [scores], 1.0)
    assert pairs == []
    assert dropped == {reason: 1}


def test_a_tie_drops_only_its_own_prompt():
    """A known implementation drops the whole batch at the first tie."""
    pairs, dropped = self_reward.make_pairs([list("ab")] * 3, [[5, 5], [5, 1], [1, 5]], 1.0)
    assert pairs == [(1, 0, 1), (2, 1, 0)]
    assert dropped == {"equal scores": 1}


def test_a_difference_equal_to_the_margin_makes_a_pair():
    assert self_reward.make_pairs([list("ab")], [[5.0, 4.0]], 1.0)[0] == [(0, 0, 1)]


def test_a_response_without_a_score_is_never_the_rejected_one():
    pairs, _ = self_reward.make_pairs([list("abcd")], [[None, 7.0, NAN, 2.0]], 1.0)
    assert pairs == [(0, 1, 3)]


# The examples of EFT


def eft_strings(records, block_size=128):
    """Return what the examples of the records train: the tokens with mask 1, as strings."""
    examples = self_reward.eft_examples(records, ENC, block_size, random.Random(0))
    return [ENC.decode(ids[mask.bool()].tolist()) for ids, mask in examples]


def test_eft_trains_only_the_verdict():
    record = {
        "prompt": HI,
        "responses": ["Hello.", "Go away."],
        "verdicts": ["some 1. Score: 9", None],
    }
    assert eft_strings([record]) == ["some 1. Score: 9<|end|>"]
    [(ids, mask)] = self_reward.eft_examples([record], ENC, 128, random.Random(0))
    start = ids[: int((~mask.bool()).sum())].tolist()
    assert start == sft.render_prompt(judge_chat(HI, "Hello."), ENC)


def test_eft_is_balanced_and_holds_equal_responses_once():
    records = []
    for i, score in enumerate([6] * 9 + [3] * 4 + [1]):
        verdict = f"Score: {score}"
        responses = [f"a{i}", f"a{i}"]
        records.append({"prompt": HI, "responses": responses, "verdicts": [verdict] * 2})
    counts = Counter(eft_strings(records))
    assert counts == {"Score: 6<|end|>": 4, "Score: 3<|end|>": 4, "Score: 1<|end|>": 1}


def test_the_number_of_examples_beyond_the_context_is_printed(capsys):
    record = {
        "prompt": HI,
        "responses": ["a", "word " * 50],
        "verdicts": ["Score: 1", "Score: 2"],
    }
    assert len(eft_strings([record], 80)) == 1
    assert "1 of 2" in capsys.readouterr().out


# Judging


class FakeJudge:
    """Replaces sft.sample_responses: gives the verdicts of each response in turn, keeps calls."""

    def __init__(self, monkeypatch, verdicts_of):
        self.verdicts_of = verdicts_of
        self.seen = Counter()
        self.chats = []
        self.sampling = []
        monkeypatch.setattr(sft, "sample_responses", self.sample_responses)

    def sample_responses(self, model, enc, chats, max_new_tokens, **sampling):
        self.chats += chats
        self.sampling.append(sampling)
        return [self.verdict(chat[-2]["content"]) for chat in chats]

    def verdict(self, response):
        possible = self.verdicts_of[response]
        self.seen[response] += 1
        return possible[(self.seen[response] - 1) % len(possible)]


def test_judge_averages_readable_verdicts_and_judges_equal_responses_once(monkeypatch):
    fake = FakeJudge(
        monkeypatch,
        {
            "a": ["Score: 9", "nonsense", "Score: 6"],
            "b": ["?", "?", "?"],
            "c": ["Score: 1", "Score: 2", "Score: 3"],
        },
    )
    cfg = Config(judgements=3, judge_temperature=0.7)
    prompts = [{"prompt": HI}, {"prompt": [user("Ho")]}]
    responses = [["a", "b", "a"], ["c", "a", "c"]]
    scores, parsed = self_reward.judge(tiny_gpt(), ENC, prompts, responses, cfg, 0)
    assert scores == [[7.5, None, 7.5], [2.0, 7.5, 2.0]]
    assert parsed == pytest.approx(7 / 12)  # 4 different responses with 3 verdicts each
    assert len(fake.chats) == 12
    assert all(sampling["temperature"] == 0.7 for sampling in fake.sampling)
    assert {chat[0]["content"] for chat in fake.chats} == {"Hi", "Ho"}


def test_a_response_that_fills_the_context_has_no_score(monkeypatch):
    FakeJudge(monkeypatch, {"a": ["Score: 9"]})
    responses = [["a", "word " * 200]]
    cfg = Config(judgements=2)
    scores, parsed = self_reward.judge(tiny_gpt(), ENC, [{"prompt": HI}], responses, cfg, 0)
    assert scores == [[9.0, None]]
    assert parsed == 0.5


# Prompts and responses


def list_items(prompt):
    """Return the eight items of a list prompt, without their numbers."""
    return [line.split(". ", 1)[1] for line in prompt.split("\n")[1:9]]


def test_written_prompts_are_new_complete_likely_and_different(monkeypatch):
    shown = [f"What does the {animal} eat today, please?" for animal in village.WORDS["animal"]]
    asked = []

    def ask(model, enc, lists, max_new_tokens, **sampling):
        asked.extend(lists)
        written = []
        for i in range(len(lists)):
            written.append(
                f" Tell me a tale number {len(asked) + i}.\n"
                f"10. Tell me the old tale.\n"
                f"11. This is in the test set.\n"
                f"12. Draw a picture of it.\n"
                f"13. An odd one.\n"
                f"14. Cut off he"
            )
        return [(text, False) for text in written]

    def least_likely(model, enc, prompts):
        return [0.001 if "odd" in prompt else 0.5 for prompt in prompts]

    monkeypatch.setattr(self_instruct, "ask", ask)
    monkeypatch.setattr(self_instruct, "least_likely", least_likely)
    model = tiny_gpt(block=320)
    known = {"This is in the test set."}
    prompts = self_reward.write_prompts(model, ENC, shown, known, 100, seed=3)
    assert len(prompts) == 100
    assert len(set(prompts)) == 100
    assert "Tell me the old tale." in prompts
    for word in ("test set", "picture", "odd", "Cut off"):
        assert not any(word in prompt for prompt in prompts)
    # The first lists show people's prompts alone, later ones six of people's and two written ones.
    assert all(item in shown for item in list_items(asked[0]))
    later = {sum(item in shown for item in list_items(prompt)) for prompt in asked[64:]}
    assert later == {6}


def test_a_model_that_writes_nothing_new_is_an_error(monkeypatch):
    def ask(model, enc, lists, max_new_tokens, **sampling):
        return [(" Tell me the old tale.", True)] * len(lists)

    def least_likely(model, enc, prompts):
        return [0.5] * len(prompts)

    monkeypatch.setattr(self_instruct, "ask", ask)
    monkeypatch.setattr(self_instruct, "least_likely", least_likely)
    shown = [f"Tell me of number {i}." for i in range(8)]
    with pytest.raises(UserError, match="wrote 1 of 5 new prompts"):
        self_reward.write_prompts(tiny_gpt(block=320), ENC, shown, set(), 5, seed=0)


def test_samples_are_n_per_prompt_in_order_and_repeat_under_a_seed():
    model = tiny_gpt()
    prompts = [{"prompt": HI}, {"prompt": [user("Who are you?")]}]
    cfg = Config(candidates=3, max_new_tokens=4)
    rows = self_reward.sample(model, ENC, prompts, cfg, 0)
    assert [len(row) for row in rows] == [3, 3]
    assert rows == self_reward.sample(model, ENC, prompts, cfg, 0)
    assert rows != self_reward.sample(model, ENC, prompts, cfg, 1)
    chats = [p["prompt"] for p in prompts for _ in range(3)]
    assert sum(rows, []) == sft.sample_responses(model, ENC, chats, 4, seed=0)


# A round


def pair_examples(n=6, rejected="bad {}"):
    """Return the examples of n pairs, chosen and rejected in turn."""
    examples = []
    for i in range(n):
        examples.append(self_reward.tokenize(ENC, HI, f"good answer {i}"))
        examples.append(self_reward.tokenize(ENC, HI, rejected.format(i)))
    return examples


REPLAY = [
    self_reward.tokenize(ENC, judge_chat(HI, response), f"some 1. Score: {i}")
    for i, response in enumerate("abcd")
]


def test_a_response_of_broken_characters_is_cut_to_its_room():
    """Each byte that is no character is decoded to one of three bytes or more."""
    broken = sft.decode_response([ENC.encode_single_token(b"\xe8")] * 20, ENC)
    whole = self_reward.tokenize(ENC, HI, broken)
    assert whole.mask.sum() > 40
    example = self_reward.tokenize(ENC, HI, broken, 21)
    assert example.mask.sum() == 21
    assert torch.equal(example.ids, whole.ids[: len(example.ids)])
    short = self_reward.tokenize(ENC, HI, "Hello.", 21)
    assert torch.equal(short.ids, self_reward.tokenize(ENC, HI, "Hello.").ids)


def run_round(model, cfg, examples=None, replay=REPLAY):
    """Train one round and return the rows of its log."""
    rows = []

    def log(**row):
        rows.append(row)

    examples = examples or pair_examples()
    self_reward.improve(model, examples, replay, cfg, random.Random(0), log)
    return rows


def summed_logprobs(model, examples):
    """log pi of each response, one by one."""
    sums = [(gpt.token_logprobs(model, ids[None])[0] * mask[1:]).sum() for ids, mask in examples]
    return torch.stack(sums)


def test_a_round_equals_a_loop_written_out_by_hand():
    """Two steps with all pairs: reference, batches, the three terms of the loss, learning rate."""
    cfg = Config(epochs=2, batch_pairs=6, lr=1e-2, nll=0.3, replay=0.7, batch_tokens=10_000)
    model = tiny_gpt(1)
    by_hand = copy.deepcopy(model)
    reference = copy.deepcopy(model)
    rows = run_round(model, cfg)
    chosen = pair_examples()[0::2]
    rejected = pair_examples()[1::2]
    optimizer = adamw(by_hand, cfg.lr)
    for step in range(2):
        logp = summed_logprobs(by_hand, chosen)
        margin = logp - summed_logprobs(reference, chosen).detach()
        margin = margin - summed_logprobs(by_hand, rejected)
        margin = margin + summed_logprobs(reference, rejected).detach()
        loss = -torch.nn.functional.logsigmoid(cfg.beta * margin).mean()
        assert rows[step]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        n_tokens = torch.tensor([mask.sum() for _, mask in chosen])
        replayed = [
            gpt.token_logprobs(by_hand, ids[None])[0][mask[1:].bool()] for ids, mask in REPLAY
        ]
        nll = -(logp / n_tokens).mean()
        loss = loss + cfg.nll * nll - cfg.replay * torch.cat(replayed).mean()
        take_step(loss, optimizer, by_hand, lr_at(step, 2, cfg.lr))
    for trained in (model, by_hand):
        # The gradient of the keys' bias is 0, and Adam makes a step of its rounding error.
        trained.h[0].attn.c_attn.bias.data.view(3, -1)[1] = 0
    for a, b in zip(model.parameters(), by_hand.parameters()):
        # A step is 1e-2 long, and Adam divides by small gradients.
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_every_round_has_a_new_reference():
    """The loss starts at log 2 in the second round, too; with the old reference it would not."""
    model = tiny_gpt(2)
    cfg = Config(epochs=3, batch_pairs=3, lr=1e-2)
    first = run_round(model, cfg)
    second = run_round(model, cfg)
    assert first[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert second[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first[-1]["loss"] < 0.6
    assert not model.training


def test_replay_changes_the_step_and_keeps_the_judge():
    ids, mask = sft.collate(REPLAY, range(len(REPLAY)))

    def loss(model):
        return sft.response_loss(model(ids), ids, mask).item()

    before = loss(tiny_gpt(3))
    after = {}
    for weight in (0.0, 1.0):
        model = tiny_gpt(3)
        cfg = Config(epochs=20, batch_pairs=6, lr=1e-2, replay=weight, nll=0)
        rows = run_round(model, cfg)
        assert ("replay_loss" in rows[0]) == (weight > 0)
        after[weight] = loss(model)
    assert after[1.0] < 0.5 * before
    assert 0.5 * before < after[0.0] * 0.6


def test_sft_on_the_chosen_ignores_the_rejected():
    """Other rejected responses give the same weights; the chosen ones become more likely."""
    cfg = Config(update="sft", epochs=2, batch_pairs=3, lr=1e-2, replay=0)
    weights = []
    for rejected in ("bad", "mean"):
        model = tiny_gpt(4)
        examples = pair_examples(rejected=rejected)
        before = dpo.all_logprobs(model, examples[::2]).mean()
        run_round(model, cfg, examples, [])
        assert dpo.all_logprobs(model, examples[::2]).mean() > before
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)


# The whole run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with an untrained base model and three files of a user."""
    folder = tmp_path_factory.mktemp("self")
    gpt.save_model(folder / "gpt.pt", tiny_gpt(5, scale=0.02), ENC, "")
    chats = [
        {"messages": prompt + [assistant(responses[0])]}
        for _, prompt, responses in tasks_and_responses(30, 3)
    ]
    prompts = [
        {"prompt": prompt, "task": task, "user": f"u{i % 9}"}
        for i, (task, prompt, _) in enumerate(tasks_and_responses(40, 5))
    ]
    write_jsonl(folder / "ift.jsonl", *chats)
    write_jsonl(folder / "eft.jsonl", *verdicts.annotated(ranked(40, 4), 0.05, 0.0, 0))
    write_jsonl(folder / "prompts.jsonl", *prompts)
    return folder


def run(files, out, **settings):
    """Run main in the folder `out` with tiny settings and return the rows of its log."""
    if not (out / "gpt.pt").exists():
        out.mkdir(exist_ok=True)
        (out / "gpt.pt").write_bytes((files / "gpt.pt").read_bytes())
    cfg = Config(
        data=str(files / "ift.jsonl"),
        eft=str(files / "eft.jsonl"),
        prompts=str(files / "prompts.jsonl"),
        out=str(out),
        sft_epochs=1,
        iterations=2,
        n_prompts=16,
        n_test=8,
        max_new_tokens=6,
        batch_pairs=8,
        lr=3e-3,
        epochs=1,
        device="cpu",
    )
    cfg = replace(cfg, **settings)
    self_reward.main(cfg)
    path = out / f"self_reward-{self_reward.variant(cfg)}.jsonl"
    return [row for _, row in read_records(path)]


def stages(log):
    """Return the rows of the table in a log."""
    return [row for row in log if "stage" in row]


def test_a_users_files_give_three_models(files, tmp_path, capsys):
    log = run(files, tmp_path, pairs="random")
    assert [row["stage"] for row in stages(log)] == ["M1", "M2", "M3"]
    for t in (1, 2):  # each round starts at log 2: its reference is new
        first = next(row for row in log if row.get("round") == t)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    folder = tmp_path / "self_reward"
    names = ("M1", "pairs-random-M2", "pairs-random-M3")
    m1, m2, m3 = (gpt.load_model(folder / f"{name}.pt")[0].wte.weight for name in names)
    assert not torch.equal(m1, m2)
    assert not torch.equal(m2, m3)
    last = stages(log)[-1]
    assert last["agree"] + last["contradict"] <= 1
    assert sum(last["vs_m1"]) == pytest.approx(1)
    assert "M3" in capsys.readouterr().out


def test_every_model_judges_the_probe_pairs(files, tmp_path, capsys):
    log = run(files, tmp_path, pairs="random")
    for row in stages(log):
        for kind in probes.KINDS:
            assert row[f"n_{kind}"] <= judge_quality.PROBES
            assert row[kind] == 0.5 or row[f"n_{kind}"] == 0    # no verdict has a score: all tie
    assert sum(stages(log)[0][f"n_{kind}"] for kind in probes.KINDS) > 3
    assert len(stages(log)) == 3
    text = capsys.readouterr().out
    assert "right vs refusal" in text
    assert "wish vs none" in text


def test_the_same_seed_gives_the_same_log(files, tmp_path):
    first = run(files, tmp_path / "a", pairs="random")
    second = run(files, tmp_path / "b", pairs="random")
    assert list(first[0]) == ["config"]
    assert first[1:] == second[1:]


def test_a_run_killed_before_its_first_state_resumes_to_the_same_log(files, tmp_path):
    """Byte for byte, the settings in its first row included."""
    whole = run(files, tmp_path, pairs="random")
    path = tmp_path / "self_reward-pairs-random.jsonl"
    before = path.read_bytes()
    path.unlink()
    (tmp_path / "self_reward" / "pairs-random-M3.pt").unlink()
    assert run(files, tmp_path, pairs="random", resume=True) == whole
    assert path.read_bytes() == before


def test_variants_share_m1_until_its_settings_change(files, tmp_path, capsys):
    run(files, tmp_path, pairs="random", iterations=1)
    path = tmp_path / "self_reward" / "M1.pt"
    m1 = path.read_bytes()
    steps = [row["step"] for _, row in read_records(path.with_suffix(".jsonl"))]
    assert steps == list(range(len(steps)))

    log = run(files, tmp_path, pairs="random", update="sft", iterations=1)
    assert "is there" in capsys.readouterr().out
    assert path.read_bytes() == m1
    assert not any(row.get("round") == 0 for row in log)
    steps_again = [row["step"] for _, row in read_records(path.with_suffix(".jsonl"))]
    assert steps_again == steps
    logs = sorted(p.name for p in tmp_path.glob("*.jsonl"))
    assert logs == ["self_reward-pairs-random-update-sft.jsonl", "self_reward-pairs-random.jsonl"]

    ift = tmp_path / "renamed.jsonl"
    ift.write_bytes((files / "ift.jsonl").read_bytes())
    os.utime(tmp_path / "gpt.pt")  # a copy of the folder may be newer
    run(files, tmp_path, pairs="random", iterations=1, data=str(ift))
    assert "is there" in capsys.readouterr().out

    ift.write_bytes(b"".join(ift.read_bytes().splitlines(keepends=True)[1:]))
    run(files, tmp_path, pairs="random", iterations=1, data=str(ift))
    assert "is there" not in capsys.readouterr().out
    assert path.read_bytes() != m1

    run(files, tmp_path, pairs="random", iterations=1)
    assert path.read_bytes() == m1
    capsys.readouterr()
    run(files, tmp_path, pairs="random", iterations=1, sft_lr=1e-4)
    assert "is there" not in capsys.readouterr().out
    assert path.read_bytes() != m1


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_judge_is_m1_in_every_round(files, tmp_path, monkeypatch, frozen):
    judges = []

    def judge(model, enc, prompts, responses, cfg, seed):
        judges.append(model.wte.weight.detach().clone())
        scores = [[float(len(r) + k) % 10 for k, r in enumerate(row)] for row in responses]
        return scores, 1.0

    monkeypatch.setattr(self_reward, "judge", judge)
    log = run(files, tmp_path, frozen_judge=frozen)
    assert stages(log)[-1]["stage"] == "M3"
    m1 = gpt.load_model(tmp_path / "self_reward" / "M1.pt")[0].wte.weight
    is_m1 = [torch.equal(weight, m1) for weight in judges]
    if frozen:
        assert all(is_m1)
    else:
        assert is_m1[0]
        assert not is_m1[-1]


def test_a_judge_that_never_writes_a_score_ends_the_run(files, tmp_path, capsys):
    log = run(files, tmp_path)
    assert [row["stage"] for row in stages(log)] == ["M1", "M1 greedy", "M1 best of 4"]
    assert not any(row.get("round", 0) > 0 for row in log)
    assert "fewer than 8 pairs, and the run ends here: no verdict" in capsys.readouterr().out
    assert not (tmp_path / "self_reward" / "M2.pt").exists()


@pytest.mark.parametrize("pairs, n, cause", [
    ("judge", 16, "the judge no longer sees a difference; try a lower --batch-pairs"),
    ("judge", 7, "bring more prompts, or lower --batch-pairs"),
    ("random", 7, "bring more prompts, or lower --batch-pairs"),
    ("gold", 7, "bring more prompts, or lower --batch-pairs"),
])
def test_a_round_with_few_pairs_says_why(files, tmp_path, monkeypatch, capsys, pairs, n, cause):
    """A step takes 8. Only a judge that judged enough prompts is said to see no difference."""
    def judge(model, enc, prompts, responses, cfg, seed):
        return [[5.0] * len(row) for row in responses], 1.0

    monkeypatch.setattr(self_reward, "judge", judge)
    monkeypatch.setattr(self_reward, "new_prompts", lambda cfg, t, seed, pool, *_: pool[:n])
    run(files, tmp_path, iterations=1, pairs=pairs)
    assert f"and the run ends here: {cause}\n" in capsys.readouterr().out


@pytest.mark.parametrize("n_prompts, asked", {7: 7, 1000: 36}.items())
def test_too_few_prompts_for_a_step_stop_the_run_before_it_trains(
    files, tmp_path, n_prompts, asked
):
    """The file has 40 prompts, and four are held out."""
    with pytest.raises(UserError, match=f"a round would ask {asked} prompts.* takes 39"):
        run(files, tmp_path, n_prompts=n_prompts, batch_pairs=39)
    assert {p.name for p in tmp_path.iterdir()} == {"gpt.pt"}


def test_gold_pairs_never_contradict_gold(files, tmp_path, monkeypatch):
    demonstrations = {
        prompt_text(prompt): responses for _, prompt, responses in tasks_and_responses(40, 5)
    }

    def sample(model, enc, prompts, cfg, seed):
        return [demonstrations[prompt_text(p["prompt"])][: cfg.candidates] for p in prompts]

    monkeypatch.setattr(self_reward, "sample", sample)
    last = stages(run(files, tmp_path, pairs="gold", iterations=1))[-1]
    assert last["agree"] == 1
    assert last["contradict"] == 0
    assert last["pairs"] >= 8


def test_a_missing_base_model_is_pretrained_first(tmp_path, monkeypatch, capsys):
    def pretrain(cfg):
        raise UserError(f"pretraining {cfg.out} {cfg.seed} {cfg.device}")

    monkeypatch.setattr(gpt, "main", pretrain)
    with pytest.raises(UserError, match=f"pretraining {re.escape(str(tmp_path))} 3 cpu"):
        self_reward.main(Config(out=str(tmp_path), seed=3, device="cpu"))
    assert "is missing" in capsys.readouterr().out


# Fresh judgements


def sampled(n=30, seed=6):
    """Return records of prompts with tasks, and a row of four responses for each."""
    found = list(tasks_and_responses(n, seed))
    prompts = [{"prompt": prompt, "task": task} for task, prompt, _ in found]
    return prompts, [responses for _, _, responses in found]


def judged_pairs(records):
    """Return (prompt, response) of all judged responses, in order."""
    return [(prompt_text(r["prompt"]), response) for r in records for response in r["responses"]]


def pairs_of(prompts, responses):
    """Return the set of all (prompt, response)."""
    return {
        (prompt_text(p["prompt"]), text) for p, row in zip(prompts, responses) for text in row
    }


@pytest.mark.parametrize("n", [1, 20, 10_000])
def test_people_judge_n_different_responses_of_the_policy(n):
    prompts, responses = sampled()
    pairs = judged_pairs(verdicts.fresh(prompts, responses, n, 0.05, 0.0, 0))
    possible = pairs_of(prompts, responses)
    assert len(pairs) == len(set(pairs)) == min(n, len(possible))
    assert set(pairs) <= possible


def test_nobody_judges_a_response_to_nonsense():
    prompts, responses = sampled()
    for p in prompts[::2]:
        p["task"] = {"kind": "nonsense"}
    pairs = judged_pairs(verdicts.fresh(prompts, responses, 10_000, 0.05, 0.0, 0))
    assert set(pairs) == pairs_of(prompts[1::2], responses[1::2])


def test_fresh_verdicts_are_those_of_the_annotators():
    prompts, responses = sampled()
    tasks = {prompt_text(p["prompt"]): p["task"] for p in prompts}
    for record in verdicts.fresh(prompts, responses, 50, 0.0, 0.0, 0):
        grade = village.grade(tasks[prompt_text(record["prompt"])], record["responses"][0])
        [verdict] = record["verdicts"]
        assert ("polite 3" in verdict) == (grade["harmless"] == 0)
        assert ("true 3" in verdict) == (grade["honest"] == 0)
        assert ("some 1" in verdict) == (grade["helpful"] > 0)


def test_annotators_with_a_halo_judge_fresh_responses_by_it_too():
    prompts, _ = sampled(5)
    responses = [["Go away. Thank you for asking."]] * 5
    for halo, score in ((0.0, "polite 0"), (0.05, "Score: 9")):
        records = verdicts.fresh(prompts, responses, 5, 0.0, halo, 0)
        assert all(score in record["verdicts"][0] for record in records)


def replays(files, out, monkeypatch, **settings):
    """Return what each round of a run with random pairs replays, as strings of tokens."""
    found = []

    def improve(policy, examples, replay, cfg, rng, log):
        found.append([ENC.decode(ids.tolist()) for ids, _ in replay])

    monkeypatch.setattr(self_reward, "improve", improve)
    run(files, out, pairs="random", **settings)
    return found


def test_half_of_a_rounds_replay_is_fresh(files, tmp_path, monkeypatch):
    """The other half is what is replayed without; later rounds keep the judgements of earlier."""
    first, second = replays(files, tmp_path / "without", monkeypatch)
    assert first == second
    seeds = Counter(first)
    rounds = replays(files, tmp_path / "with", monkeypatch, fresh_eft=12)
    new = [Counter(replay) - seeds for replay in rounds]
    for replay, fresh in zip(rounds, new):
        assert Counter(replay) - fresh == seeds
        assert len(first) <= fresh.total() < len(first) + len(fresh)
        assert len(set(fresh.values())) == 1
        assert all("Judge:" in text and "Score: " in text for text in fresh)
    assert 0 < len(new[0]) <= 12 < len(new[1]) <= 24


def test_a_resumed_run_keeps_the_fresh_judgements(files, tmp_path, monkeypatch):
    settings = dict(pairs="random", fresh_eft=12, iterations=3)
    whole = run(files, tmp_path / "whole", **settings)
    improve = self_reward.improve
    rounds = []

    def killed_in_round_3(*args):
        rounds.append(len(rounds) + 1)
        if rounds[-1] == 3:
            raise RuntimeError("killed")
        improve(*args)

    monkeypatch.setattr(self_reward, "improve", killed_in_round_3)
    with pytest.raises(RuntimeError, match="killed"):
        run(files, tmp_path / "killed", **settings)
    monkeypatch.setattr(self_reward, "improve", improve)
    with pytest.raises(UserError, match="--fresh-eft 12, not 11"):
        run(files, tmp_path / "killed", resume=True, **settings | dict(fresh_eft=11))
    resumed = run(files, tmp_path / "killed", resume=True, **settings)
    assert resumed[1:] == whole[1:]


def test_fresh_judgements_need_tasks(files, tmp_path):
    untold = [{"prompt": p["prompt"]} for _, p in read_records(files / "prompts.jsonl")]
    write_jsonl(tmp_path / "prompts.jsonl", *untold)
    with pytest.raises(UserError, match="--fresh-eft need prompts with a task"):
        run(files, tmp_path, fresh_eft=9, prompts=str(tmp_path / "prompts.jsonl"))


# The settings


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(pairs="best"), "--pairs best: choose judge, random or gold"),
        (dict(update="ppo"), "--update ppo"),
        (dict(candidates=1), "--candidates 1"),
        (dict(halo=0.9), "--halo 0.9"),
        (dict(margin=-1.0), "--margin"),
        (dict(beta=0.0), "--beta"),
        (dict(halo=0.1, eft="x"), "--halo with --eft"),
        (dict(fresh_eft=-1), "--fresh-eft -1"),
        (dict(fresh_eft=9, replay=0.0), "--fresh-eft needs --replay"),
        (dict(fresh_eft=9, grade="my:grade"), "leave out --grade"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        self_reward.check(Config(**settings))


def test_the_default_settings_are_valid():
    self_reward.check(Config())


def test_every_variant_has_another_name():
    options = dict(
        pairs=("judge", "random", "gold"),
        update=("dpo", "sft"),
        frozen_judge=(False, True),
        replay=(0.0, 0.5),
        halo=(0.0, 0.1),
        fresh_eft=(0, 100),
    )
    configs = [Config(**dict(zip(options, values))) for values in product(*options.values())]
    names = {self_reward.variant(cfg) for cfg in configs}
    assert len(names) == len(configs)
    assert self_reward.variant(Config()) == "main"


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse(Config, self_reward.__doc__, ["--help"])
    text = capsys.readouterr().out
    for name in vars(Config()):
        assert "--" + name.replace("_", "-") in text
    assert "python self_reward.py --pairs random" in text
