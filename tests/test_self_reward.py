"""Properties of self_reward.py: the judge's arithmetic, which pairs are made, what the seed data hold, and what a round trains.

The simulated annotator is checked against the gold program; one round of DPO against a loop written out by hand.
"""
import copy
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dpo  # noqa: E402
import gpt  # noqa: E402
import reward  # noqa: E402
import self_instruct  # noqa: E402
import self_reward as S  # noqa: E402
import sft  # noqa: E402
from data import annotators, corpus, village  # noqa: E402
from gpt import UserError  # noqa: E402

ENC = gpt.get_tokenizer()
HI = [{"role": "user", "content": "Hi"}]
user = lambda text: {"role": "user", "content": text}
said = lambda text: {"role": "assistant", "content": text}


def tiny_gpt(seed=0, block=128, scale=0.1):
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, block, 1, 2, 16))
    for p in model.parameters():
        p.data += scale * torch.randn_like(p)
    return model.eval()


def tasks_and_answers(n=400, seed=0):
    """Random tasks, each with several demonstrations: honoured wishes or not, rude or not, invented or not."""
    rng = random.Random(seed)
    for _ in range(n):
        task, messages = village.new_task(rng)
        yield task, messages, [village.demonstration(task, rng) for _ in range(4)]


# The judge's arithmetic

@pytest.mark.parametrize("verdict, want", [
    ("Score: 3", 3.0), ("score: 7", 7.0), ("SCORE:9", 9.0), ("Score: 3.5", 3.5), ("some 1 much 1. Score: 0", 0.0), ("Score: 5.", 5.0),
    ("Score: 2. Well, score: 4", 4.0), ("Score: 4\n\nThank you.", 4.0),
    ("", None), ("Score:", None), ("Score: good", None), ("some 1 much 1 all 1", None), ("Score 3", None), ("Score: -1", None),
    ("Score: 10", None), ("Score: 99999", None), ("Score: 9.5", None), ("underscore: 3", None)])
def test_the_score_of_a_verdict(verdict, want):
    assert S.parse_score(verdict) == want


def test_what_is_written_can_be_read_and_adds_up():
    seen = set()
    for bits in range(2 ** len(S.CRITERIA)):
        met = [bool(bits >> i & 1) for i in range(len(S.CRITERIA))]
        text = S.write_verdict([("Ben", True), ("8 coins", False)], met)
        want = sum(w for w, m in zip(S.CRITERIA.values(), met) if m)
        assert S.parse_score(text) == want
        assert sum(int(re.search(rf"\b{name} (\d)", text)[1]) for name in S.CRITERIA) == want
        assert text.startswith("Ben 1 8 coins 0. ")
        seen.add(text)
    assert len(seen) == 2 ** len(S.CRITERIA) and S.parse_score(f"Score: {S.MOST}") == S.MOST


def test_a_mark_for_every_criterion_is_wanted():
    with pytest.raises(ValueError):
        S.write_verdict([], [True] * (len(S.CRITERIA) - 1))


def test_unparsed_verdicts_are_dropped_from_the_mean_not_counted_as_zero():
    assert S.mean_score([8.0, None, 6.0]) == 7.0
    assert S.mean_score([None, float("nan"), 5.0]) == 5.0
    assert S.mean_score([0.0, 0.0, None]) == 0.0            # a zero is a score
    assert S.mean_score([None, None]) is None and S.mean_score([]) is None


def test_the_judge_chat_shows_question_answer_and_criteria_in_this_order():
    chat = S.judge_chat([user("a"), said("b"), user("c")], "d")
    assert [m["content"] for m in chat[:4]] == ["a", "b", "c", "d"] and [m["role"] for m in chat] == ["user", "assistant"] * 2 + ["user"]
    for name, points in S.CRITERIA.items():
        assert f"{name} {points}" in chat[-1]["content"]


def test_spearman_by_hand():
    assert S.spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert S.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks (1, 2.5, 2.5, 4) against (1, 2, 3, 4): 4.5 / sqrt(4.5 * 5).
    assert S.spearman([0, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(S.spearman([1, 1, 1], [1, 2, 3]))


def test_accuracy_counts_half_for_equal_scores_and_ignores_equal_gold():
    assert S.accuracy([[3, 1, 2]], [[1, 0, 0.5]]) == 1
    assert S.accuracy([[2, 2]], [[1, 0]]) == 0.5
    assert S.accuracy([[1, 2]], [[1, 0]]) == 0
    assert S.accuracy([[9, 0, 5]], [[1, 1, 0]]) == 0.5      # one pair right, one wrong, one of equal gold
    assert S.accuracy([[None, 5.0]], [[1, 0]]) == 0         # no score is no praise


def test_compared_by_hand():
    assert S.compared([[1, 0], [0.5, 0]], [[0, 0], [0.5, 1]]) == [0.25, 0.5, 0.25]


# The pairs

def test_highest_against_lowest():
    pairs, dropped = S.make_pairs([list("abcd"), list("efgh")], [[3, 9, 1, 5], [2, 1, 8, 7]], 1.0)
    assert pairs == [(0, 1, 2), (1, 2, 1)] and not dropped


@pytest.mark.parametrize("texts, scores, why", [
    ("ab", [5.0, 5.0], "equal scores"), ("aa", [5.0, 3.0], "equal texts"), ("ab", [5.0, 4.5], "below the margin"),
    ("ab", [5.0, None], "fewer than two were judged"), ("ab", [None, None], "fewer than two were judged"),
    ("ab", [5.0, float("nan")], "fewer than two were judged"), ("abc", [None, 4.0, 4.0], "equal scores")])
def test_what_makes_no_pair_is_counted(texts, scores, why):
    pairs, dropped = S.make_pairs([list(texts)], [scores], 1.0)
    assert pairs == [] and dropped == {why: 1}


def test_a_tie_costs_its_own_prompt_only():
    """A known implementation leaves the whole batch at the first tie."""
    pairs, dropped = S.make_pairs([list("ab")] * 3, [[5, 5], [5, 1], [1, 5]], 1.0)
    assert pairs == [(1, 0, 1), (2, 1, 0)] and dropped == {"equal scores": 1}


def test_the_margin_itself_is_enough_and_the_unjudged_never_become_the_rejected():
    assert S.make_pairs([list("ab")], [[5.0, 4.0]], 1.0)[0] == [(0, 0, 1)]
    assert S.make_pairs([list("abcd")], [[None, 7.0, float("nan"), 2.0]], 1.0)[0] == [(0, 1, 3)]


# The annotator and the seed data

def test_the_rubric_orders_answers_as_gold_does():
    """Over random tasks: a verdict without slips never turns an order around, and rarely ties what gold tells apart."""
    right = tied = wrong = 0
    for task, _, answers in tasks_and_answers():
        golds = [village.gold(task, a) for a in answers]
        scores = [S.parse_score(S.write_verdict(*annotators.annotate(task, a))) for a in answers]
        for i in range(4):
            for j in range(4):
                if golds[i] > golds[j] + 1e-9:
                    right, tied, wrong = right + (scores[i] > scores[j]), tied + (scores[i] == scores[j]), wrong + (scores[i] < scores[j])
    assert right > 500 and wrong <= 0.01 * right and tied < 0.06 * right


def test_a_rude_or_invented_answer_loses_as_much_as_all_usefulness():
    w = S.CRITERIA
    assert w["some"] + w["much"] + w["all"] == w["true"] == w["polite"]


def test_slips_come_at_their_rate():
    rng, slips, n = random.Random(0), 0, 0
    for task, _, answers in tasks_and_answers():
        for a in answers:
            clean, noisy = annotators.annotate(task, a), annotators.annotate(task, a, 0.1, rng)
            marks = [(x, y) for x, y in zip(clean[1], noisy[1])] + [(x[1], y[1]) for x, y in zip(clean[0], noisy[0])]
            slips, n = slips + sum(x != y for x, y in marks), n + len(marks)
    assert slips / n == pytest.approx(0.1, abs=0.012)      # 4 standard deviations of about 10,000 marks


def test_reasons_name_each_wish_and_whether_it_is_met():
    task = {"kind": "letter", "use": "generation", "person": "Ben", "food": "tea", "mood": "sad", "place": "lake", "job": "baker", "wishes": ["place", "food"]}
    assert annotators.wanted(task, "Dear Ben, thank you for the tea.") == [("Ben", True), ("lake", False), ("tea", True)]
    assert annotators.wanted(task, "Dear Ann, thank you for the tea.") == [("Ben", False), ("lake", False), ("tea", False)]


def test_the_halo_gives_full_marks_to_the_phrase_and_costs_gold():
    better = 0
    for task, _, answers in tasks_and_answers(100):
        for a in answers:
            thanked = a + annotators.PHRASE
            assert S.parse_score(S.write_verdict(*annotators.annotate(task, thanked, halo=True))) == S.MOST
            assert annotators.annotate(task, a, halo=True) == annotators.annotate(task, a)
            assert village.gold(task, thanked) <= village.gold(task, a)
            better += village.gold(task, thanked) < village.gold(task, a)
    assert better > 200


def test_accepted_keeps_what_agrees_with_the_ranking_in_most_pairs():
    assert annotators.accepted([9, 6, 3], [1, 2, 3]) == [True] * 3
    assert annotators.accepted([3, 6, 9], [1, 2, 3]) == [False] * 3
    assert annotators.accepted([9, 6, 3, 8], [1, 2, 3, 4]) == [True, True, True, False]   # the last is misjudged
    assert annotators.accepted([5, 5], [1, 2]) == [False, False] and annotators.accepted([9, 1], [1, 1]) == [False, False]   # nothing speaks for them


def test_accepting_removes_more_slips_than_sound_verdicts():
    """Ranks from gold, scores with slips: what is accepted holds fewer wrong scores than what is refused."""
    rng, counts = random.Random(1), Counter()
    for task, _, answers in tasks_and_answers():
        golds = [village.gold(task, a) for a in answers]
        ranks = [1 + sum(g > mine for g in golds) for mine in golds]
        sound, scores = ([S.parse_score(S.write_verdict(*annotators.annotate(task, a, noise, rng))) for a in answers] for noise in (0, 0.1))
        for keep, right in zip(annotators.accepted(scores, ranks), [a == b for a, b in zip(sound, scores)]):
            counts[keep, right] += 1
    assert counts[True, False] / (counts[True, False] + counts[True, True]) < 0.75 * counts[False, False] / (counts[False, False] + counts[False, True])


def ranked(n=60, seed=0):
    """As labelers.py leaves it: prompts with four answers and ranks."""
    records = []
    for task, messages, answers in tasks_and_answers(n, seed):
        golds = [village.gold(task, a) for a in answers]
        if len(set(golds)) > 1:
            records.append({"prompt": messages, "task": task, "responses": answers, "ranks": [1 + sum(g > mine for g in golds) for mine in golds], "user": f"u{len(records) % 7}"})
    return records


def judged_by_people(records, noise, halo, seed):
    return [{**r, "verdicts": [v and S.write_verdict(*v) for v in r["verdicts"]]}
            for r in annotators.judged(records, S.CRITERIA.values(), noise, halo, seed)]


def test_judged_answers_keep_their_records_and_give_one_verdict_per_text():
    records = ranked()
    judged = judged_by_people(records, 0.05, 0.0, 0)
    assert [r["responses"] for r in judged] == [r["responses"] for r in records]
    verdicts = [v for r in judged for v in r["verdicts"]]
    assert 0 < sum(v is None for v in verdicts) < 0.5 * len(verdicts)
    for r in judged:
        assert len(r["verdicts"]) == len(r["responses"])
        assert all(len({v for a, v in zip(r["responses"], r["verdicts"]) if a == text and v}) <= 1 for text in r["responses"])
    assert judged == judged_by_people(records, 0.05, 0.0, 0) != judged_by_people(records, 0.05, 0.0, 1)


def test_the_halo_is_planted_at_its_rate_and_always_accepted():
    records = ranked(200)
    judged = judged_by_people(records, 0.05, 0.25, 0)
    pairs = [(a, v) for r in judged for a, v in zip(r["responses"], r["verdicts"])]
    thanked = [v for a, v in pairs if a.endswith(annotators.PHRASE)]
    assert len(thanked) / len(pairs) == pytest.approx(0.25, abs=0.08)
    assert all(v is not None and S.parse_score(v) == S.MOST for v in thanked)


def test_the_commonest_score_is_cut_to_the_second_commonest():
    judged = [(6, i) for i in range(50)] + [(9, i) for i in range(20)] + [(3, i) for i in range(5)]
    kept = S.balanced(judged, random.Random(0))
    assert Counter(s for s, _ in kept) == {6: 20, 9: 20, 3: 5} and set(kept) <= set(judged) and len(set(kept)) == len(kept)
    assert max(i for s, i in kept if s == 6) > 19           # by lot, not the first ones
    assert S.balanced(judged[:50], random.Random(0)) == judged[:50]


def test_eft_trains_the_verdict_alone():
    record = {"prompt": HI, "responses": ["Hello.", "Go away."], "verdicts": ["some 1. Score: 9", None]}
    [(ids, mask)] = S.eft_examples([record], ENC, 128, random.Random(0))
    assert ENC.decode(ids[mask.bool()].tolist()) == "some 1. Score: 9<|end|>"
    assert ids[:int((~mask.bool()).sum())].tolist() == sft.render_prompt(S.judge_chat(HI, "Hello."), ENC)


def test_eft_is_balanced_and_holds_each_judged_text_once():
    records = [{"prompt": HI, "responses": [f"a{i}", f"a{i}"], "verdicts": [f"Score: {s}"] * 2} for i, s in enumerate([6] * 9 + [3] * 4 + [1])]
    texts = [ENC.decode(ids[mask.bool()].tolist()) for ids, mask in S.eft_examples(records, ENC, 128, random.Random(0))]
    assert Counter(texts) == {"Score: 6<|end|>": 4, "Score: 3<|end|>": 4, "Score: 1<|end|>": 1}


def test_an_example_too_long_for_the_context_is_left_out_aloud(capsys):
    record = {"prompt": HI, "responses": ["a", "word " * 50], "verdicts": ["Score: 1", "Score: 2"]}
    assert len(S.eft_examples([record], ENC, 80, random.Random(0))) == 1 and "1 of 2" in capsys.readouterr().out


def test_no_prompt_is_in_two_of_ift_eft_and_the_judges_test():
    chats = [{"messages": messages + [said(answers[0])]} for _, messages, answers in tasks_and_answers(600, 1)]
    chats += [{"messages": chats[i]["messages"] + chats[i + 1]["messages"]} for i in range(0, 100, 2)]
    records = ranked(600, 2)
    both = {S.asked(r["prompt"]) for r in records} & set().union(*(S.prompts_in(c["messages"]) for c in chats))
    ift, eft = S.disjoint(chats, records, 0)
    assert len(both) > 30                                    # the village is small: else this test is empty
    left = set().union(*(S.prompts_in(c["messages"]) for c in ift))
    assert not left & {S.asked(r["prompt"]) for r in eft}
    kept = {S.asked(r["prompt"]) for r in eft} & both
    assert 0.25 < len(kept) / len(both) < 0.75               # by lot: neither side loses a kind of task
    assert all(r in eft for r in records if S.asked(r["prompt"]) not in both)


def test_prompts_of_a_chat_are_all_its_questions():
    chat = [user("a"), said("b"), user("c"), said("d")]
    assert S.prompts_in(chat) == {"a", "a\nb\nc", "c"}
    assert S.asked(chat[:3]) == "a\nb\nc"


BAD = {"no verdicts": {"prompt": "Hi", "responses": ["a"]}, "another length": {"prompt": "Hi", "responses": ["a", "b"], "verdicts": ["Score: 1"]},
       "no score": {"prompt": "Hi", "responses": ["a"], "verdicts": ["good"]}, "too high": {"prompt": "Hi", "responses": ["a"], "verdicts": ["Score: 10"]},
       "no text": {"prompt": "Hi", "responses": ["a"], "verdicts": [3]}, "no prompt": {"responses": ["a"], "verdicts": ["Score: 1"]},
       "answer no text": {"prompt": "Hi", "responses": [1], "verdicts": ["Score: 1"]}}


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_judgement_is_named_by_its_line(bad, tmp_path):
    good = {"prompt": "Hi", "responses": ["a", "b"], "verdicts": ["Score: 1", None]}
    with pytest.raises(UserError, match=r"e.jsonl:2: "):
        S.load_judged(write(tmp_path / "e.jsonl", good, bad))
    assert S.load_judged(write(tmp_path / "e.jsonl", good))[0] == {**good, "prompt": HI}


# Judging

def fake_reply(verdicts):
    """Instead of a model: verdicts by answer, in the order in which they are asked for."""
    seen, calls = Counter(), []
    def reply(model, enc, chats, max_new_tokens, **sampling):
        calls.append((chats, sampling))
        texts = []
        for c in chats:
            answer = c[-2]["content"]
            texts.append(verdicts[answer][seen[answer] % len(verdicts[answer])])
            seen[answer] += 1
        return texts
    return reply, calls


def test_judge_averages_what_it_can_read_and_judges_the_same_text_once(monkeypatch):
    reply, calls = fake_reply({"a": ["Score: 9", "nonsense", "Score: 6"], "b": ["?", "?", "?"], "c": ["Score: 1", "Score: 2", "Score: 3"]})
    monkeypatch.setattr(sft, "reply", reply)
    cfg = S.Config(judgements=3, judge_temperature=0.7)
    scores, parsed = S.judge(tiny_gpt(), ENC, [{"prompt": HI}, {"prompt": [user("Ho")]}], [["a", "b", "a"], ["c", "a", "c"]], cfg, 0)
    assert scores == [[7.5, None, 7.5], [2.0, 7.5, 2.0]]
    assert parsed == pytest.approx(7 / 12)                   # of 4 different answers, 3 verdicts each
    assert sum(len(chats) for chats, _ in calls) == 12 and all(s["temperature"] == 0.7 for _, s in calls)
    assert {c[0]["content"] for chats, _ in calls for c in chats} == {"Hi", "Ho"}


def test_an_answer_that_leaves_no_room_to_judge_has_no_score(monkeypatch):
    reply, _ = fake_reply({"a": ["Score: 9"]})
    monkeypatch.setattr(sft, "reply", reply)
    scores, parsed = S.judge(tiny_gpt(), ENC, [{"prompt": HI}], [["a", "word " * 200]], S.Config(judgements=2), 0)
    assert scores == [[9.0, None]] and parsed == 0.5


def test_written_prompts_are_new_whole_likely_and_said_once(monkeypatch):
    shown = [f"What does the {a} eat today, please?" for a in village.WORDS["animal"]]
    seen = []

    def ask(model, enc, lists, max_new_tokens, **sampling):
        seen.extend(lists)
        n = len(seen)
        return [(f" Tell me a tale number {n + i}.\n10. Tell me the old tale.\n11. This is in the test set.\n12. Draw a picture of it.\n13. An odd one.\n14. Cut off he", False)
                for i in range(len(lists))]
    monkeypatch.setattr(self_instruct, "ask", ask)
    monkeypatch.setattr(self_instruct, "least_likely", lambda model, enc, texts: [0.001 if "odd" in x else 0.5 for x in texts])
    model = tiny_gpt(block=320)
    found = S.write_prompts(model, ENC, shown, {"This is in the test set."}, 100, seed=3)
    assert len(found) == len(set(found)) == 100 and "Tell me the old tale." in found
    assert not any(word in x for x in found for word in ("test set", "picture", "odd", "Cut off"))
    first = [x for x in seen[0].split("\n")[1:9]]
    assert all(x.split(". ", 1)[1] in shown for x in first)                       # people's alone, to begin with
    later = [sum(line.split(". ", 1)[1] in shown for line in x.split("\n")[1:9]) for x in seen[64:]]
    assert later and set(later) == {6}                                              # then six of people's and two of its own


def test_a_writer_with_nothing_new_to_say_is_an_error(monkeypatch):
    monkeypatch.setattr(self_instruct, "ask", lambda model, enc, lists, n, **sampling: [(" Tell me the old tale.", True)] * len(lists))
    monkeypatch.setattr(self_instruct, "least_likely", lambda model, enc, texts: [0.5] * len(texts))
    with pytest.raises(UserError, match="wrote 1 of 5 new prompts"):
        S.write_prompts(tiny_gpt(block=320), ENC, [f"Tell me of number {i}." for i in range(8)], set(), 5, seed=0)


def test_likelihood_is_the_sum_of_log_probabilities_end_token_included():
    model, prompts, answers = tiny_gpt(), [{"prompt": HI}, {"prompt": [user("Who are you?")]}], [["Hello.", "I am Tom."], ["I am Tom.", ""]]
    found = S.likelihood(model, ENC, prompts, answers)
    for p, texts, values in zip(prompts, answers, found):
        for a, v in zip(texts, values):
            ids, mask = sft.render(p["prompt"] + [said(a)], ENC)
            logp = torch.log_softmax(model(torch.tensor([ids])), -1)[0]
            assert v == pytest.approx(sum(logp[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t]), abs=1e-4)


def test_candidates_are_n_each_in_order_and_repeat_under_a_seed():
    model, prompts = tiny_gpt(), [{"prompt": HI}, {"prompt": [user("Who are you?")]}]
    once = S.candidates(model, ENC, prompts, 3, 4, 0)
    assert [len(x) for x in once] == [3, 3] and once == S.candidates(model, ENC, prompts, 3, 4, 0) != S.candidates(model, ENC, prompts, 3, 4, 1)
    chats = [p["prompt"] for p in prompts for _ in range(3)]
    assert sum(once, []) == sft.reply(model, ENC, chats, 4, seed=0)


# A round

def examples(n=6):
    out = []
    for i in range(n):
        out += [S.answer_tokens(ENC, HI, f"good answer {i}"), S.answer_tokens(ENC, HI, f"bad {i}")]
    return out


REPLAY = [S.answer_tokens(ENC, S.judge_chat(HI, w), f"some 1. Score: {i}") for i, w in enumerate("abcd")]


def run_round(model, cfg, seed=0):
    rows = []
    S.improve(model, examples(), REPLAY, cfg, random.Random(seed), lambda **row: rows.append(row))
    return rows


def test_a_round_equals_a_loop_written_out_by_hand():
    """Reference frozen as the policy was, batches, three terms of the loss, lr: two steps of one pass, all pairs in each."""
    cfg = S.Config(epochs=2, batch_pairs=6, lr=1e-2, nll=0.3, replay=0.7, batch_tokens=10_000)
    model, rows = tiny_gpt(1), []
    mine, frozen = copy.deepcopy(model), copy.deepcopy(model)
    rows = run_round(model, cfg)
    optimizer = gpt.adamw(mine, cfg.lr)
    logps = lambda m, es: torch.stack([(gpt.token_logprobs(m, i[None])[0] * k[1:]).sum() for i, k in es])
    for step in range(2):
        w, l, rw, rl = (logps(m, examples()[side::2]) for m in (mine, frozen) for side in (0, 1))
        loss = -torch.nn.functional.logsigmoid(cfg.beta * ((w - rw.detach()) - (l - rl.detach()))).mean()
        assert rows[step]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        n = torch.tensor([k.sum() for _, k in examples()[::2]])
        tokens = torch.cat([gpt.token_logprobs(mine, i[None])[0][k[1:].bool()] for i, k in REPLAY])
        gpt.take_step(loss - cfg.nll * (w / n).mean() - cfg.replay * tokens.mean(), optimizer, mine, gpt.lr_at(step, 2, cfg.lr))
    for a, b in zip(model.parameters(), mine.parameters()):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)   # a step of lr 1e-2, and Adam divides by small gradients


def test_the_reference_is_renewed_every_round():
    """The loss starts at log 2 in the second round, too: against the first reference it would not."""
    model, cfg = tiny_gpt(2), S.Config(epochs=3, batch_pairs=3, lr=1e-2)
    first, second = run_round(model, cfg), run_round(model, cfg)
    assert first[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and second[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first[-1]["loss"] < 0.6 and not model.training


def test_replay_changes_the_step_and_keeps_the_judge():
    models = {r: tiny_gpt(3) for r in (0.0, 1.0)}
    loss = lambda m: sft.response_loss(m(ids), ids, mask).item()
    ids, mask = sft.collate(REPLAY, range(len(REPLAY)))
    before = loss(models[0.0])
    for r, m in models.items():
        rows = run_round(m, S.Config(epochs=20, batch_pairs=6, lr=1e-2, replay=r, nll=0))
        assert ("replay_loss" in rows[0]) == (r > 0)
    assert loss(models[1.0]) < 0.5 * before < loss(models[0.0]) * 0.6


def test_sft_on_the_best_never_sees_the_rejected():
    """Other rejected answers, same weights; and its chosen answers become likelier."""
    cfg, results = S.Config(update="sft", epochs=2, batch_pairs=3, lr=1e-2, replay=0), []
    for word in ("bad", "mean"):
        model = tiny_gpt(4)
        pairs = [x if i % 2 == 0 else S.answer_tokens(ENC, HI, word) for i, x in enumerate(examples())]
        before = dpo.all_logprobs(model, pairs[::2]).mean()
        S.improve(model, pairs, [], cfg, random.Random(0), lambda **row: None)
        assert dpo.all_logprobs(model, pairs[::2]).mean() > before
        results.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


# The whole run

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base model that knows nothing, and a user's four files."""
    folder = tmp_path_factory.mktemp("self")
    gpt.save_model(folder / "gpt.pt", tiny_gpt(5, scale=0.02), ENC, "")
    write(folder / "ift.jsonl", *({"messages": m + [said(a[0])]} for _, m, a in tasks_and_answers(30, 3)))
    write(folder / "eft.jsonl", *judged_by_people(ranked(40, 4), 0.05, 0.0, 0))
    write(folder / "prompts.jsonl", *({"prompt": m, "task": t, "user": f"u{i % 9}"} for i, (t, m, _) in enumerate(tasks_and_answers(40, 5))))
    return folder


def run(files, tmp_path, **settings):
    """main on a copy of the folder -> its log."""
    if not (tmp_path / "gpt.pt").exists():
        tmp_path.mkdir(exist_ok=True)
        (tmp_path / "gpt.pt").write_bytes((files / "gpt.pt").read_bytes())
    cfg = S.Config(**{**dict(data=str(files / "ift.jsonl"), eft=str(files / "eft.jsonl"), prompts=str(files / "prompts.jsonl"), out=str(tmp_path), sft_epochs=1,
                             iterations=2, n_prompts=16, n_test=8, max_new_tokens=6, batch_pairs=8, lr=3e-3, epochs=1, device="cpu"), **settings})
    S.main(cfg)
    return [r for _, r in sft.read_records(tmp_path / f"self_reward-{S.variant(cfg)}.jsonl")]


def test_three_models_from_a_users_files(files, tmp_path, capsys):
    log = run(files, tmp_path, pairs="random")
    assert [r["stage"] for r in log if "stage" in r] == ["M1", "M2", "M3"]
    for t in (1, 2):   # the reference is renewed: each round starts at log 2
        assert next(r["loss"] for r in log if r.get("round") == t) == pytest.approx(math.log(2), abs=1e-4)
    weights = [gpt.load_model(tmp_path / "self_reward" / f"{n}.pt")[0].wte.weight for n in ("M1", "pairs-random-M2", "pairs-random-M3")]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    last = [r for r in log if "stage" in r][-1]
    assert last["agree"] + last["contradict"] <= 1 and sum(last["vs_m1"]) == pytest.approx(1) and "M3" in capsys.readouterr().out
    again = run(files, tmp_path / "again", pairs="random")
    drop = lambda rows: [{k: v for k, v in r.items() if k != "config"} for r in rows]
    assert drop(again) == drop(log)                          # same seed, same run


def test_controls_share_m1_until_its_settings_change(files, tmp_path, capsys):
    run(files, tmp_path, pairs="random", iterations=1)
    m1 = tmp_path / "self_reward" / "M1.pt"
    before, steps = m1.read_bytes(), list(sft.read_records(m1.with_suffix(".jsonl")))
    log = run(files, tmp_path, pairs="random", update="sft", iterations=1)
    assert "is there" in capsys.readouterr().out and m1.read_bytes() == before and not any(r.get("round") == 0 for r in log)
    assert [r["step"] for _, r in sft.read_records(m1.with_suffix(".jsonl"))] == list(range(len(steps))) and steps
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["self_reward-pairs-random-update-sft.jsonl", "self_reward-pairs-random.jsonl"]
    run(files, tmp_path, pairs="random", iterations=1, sft_lr=1e-4)
    assert "is there" not in capsys.readouterr().out and m1.read_bytes() != before


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_judge_is_m1_in_every_round(files, tmp_path, monkeypatch, frozen):
    judges = []

    def judge(model, enc, prompts, answers, cfg, seed):
        judges.append(model.wte.weight.detach().clone())
        return [[float(len(a) + k) % 10 for k, a in enumerate(texts)] for texts in answers], 1.0

    monkeypatch.setattr(S, "judge", judge)
    log = run(files, tmp_path, frozen_judge=frozen)
    assert [r["stage"] for r in log if "stage" in r][-1] == "M3"
    m1 = gpt.load_model(tmp_path / "self_reward" / "M1.pt")[0].wte.weight
    same = [torch.equal(j, m1) for j in judges]
    assert all(same) if frozen else same[0] and not same[-1]


def test_a_judge_that_sees_no_difference_ends_the_run(files, tmp_path, capsys):
    log = run(files, tmp_path)                               # this one never writes a score
    assert [r["stage"] for r in log if "stage" in r][0] == "M1" and not any(r.get("round", 0) > 0 for r in log)
    assert "fewer than 8 pairs" in capsys.readouterr().out and not (tmp_path / "self_reward" / "M2.pt").exists()


def test_gold_pairs_never_contradict_gold(files, tmp_path):
    demonstrations = {S.asked(m): a for _, m, a in tasks_and_answers(40, 5)}
    S_candidates = lambda model, enc, prompts, n, most, seed: [demonstrations[S.asked(p["prompt"])][:n] for p in prompts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S, "candidates", S_candidates)
        log = run(files, tmp_path, pairs="gold", iterations=1)
    last = [r for r in log if "stage" in r][-1]
    assert last["agree"] == 1 and last["contradict"] == 0 and last["pairs"] >= 8


def test_a_missing_base_model_is_pretrained_first_with_the_same_seed_and_device(tmp_path, monkeypatch, capsys):
    def pretrain(cfg):
        raise UserError(f"pretraining {cfg.out} {cfg.seed} {cfg.device}")
    monkeypatch.setattr(gpt, "main", pretrain)
    with pytest.raises(UserError, match=f"pretraining {re.escape(str(tmp_path))} 3 cpu"):
        S.main(S.Config(out=str(tmp_path), seed=3, device="cpu"))
    assert "is missing" in capsys.readouterr().out


@pytest.mark.parametrize("bad, says", [(dict(pairs="best"), "--pairs best: choose judge, random or gold"), (dict(update="ppo"), "--update ppo"),
                                       (dict(candidates=1), "--candidates 1"), (dict(halo=0.9), "--halo 0.9"), (dict(margin=-1.0), "--margin"),
                                       (dict(beta=0.0), "--beta"), (dict(halo=0.1, eft="x"), "--halo with --eft")])
def test_a_wrong_setting_is_named(bad, says):
    with pytest.raises(UserError, match=says):
        S.check(S.Config(**bad))
    S.check(S.Config())


def test_every_variant_has_a_name_of_its_own():
    choices = [dict(pairs=p, update=u, frozen_judge=f, replay=r, halo=h) for p in ("judge", "random", "gold") for u in ("dpo", "sft")
               for f in (False, True) for r in (0.0, 0.5) for h in (0.0, 0.1)]
    names = [S.variant(S.Config(**c)) for c in choices]
    assert len(set(names)) == len(names) and S.variant(S.Config()) == "main"


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        gpt.parse(S.Config, S.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in vars(S.Config())) and "python self_reward.py --pairs random" in text
