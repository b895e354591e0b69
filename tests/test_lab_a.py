"""lab/attention.py and lab/rouge.py: what each model can see, what the judges compute, and verdicts that follow from the numbers."""
import importlib.util
import itertools
import json
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402
import reward  # noqa: E402
from data import corpus, village  # noqa: E402


def script(name):
    spec = importlib.util.spec_from_file_location(f"lab_{name}", ROOT / "lab" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module      # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


attention, rouge = script("attention"), script("rouge")
ENC = gpt.get_tokenizer()
MASK = ENC._special_tokens["<|system|>"]


def tiny(seed=0):
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, attention.T, 2, 2, 16))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.eval()


# ---- attention

@pytest.mark.parametrize("causal", [True, False])
def test_who_sees_what(causal):
    model, T = tiny(), 9
    ids = torch.randint(0, 500, (1, T))
    before = attention.logits_of(model, ids, causal)[0]
    for changed in range(T):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 500
        differs = (attention.logits_of(model, other, causal)[0] - before).abs().amax(-1) > 1e-5
        assert differs.tolist() == [not causal or t >= changed for t in range(T)]


@pytest.mark.parametrize("causal", [True, False])
def test_packed_texts_do_not_see_each_other(causal):
    model = tiny()
    texts = [torch.randint(0, 500, (n,)) for n in (5, 11, 3, 20)]
    ids, segments = gpt.pack(texts, 40)
    states, it = attention.hidden(model, ids, segments, causal), iter(texts)
    for row, seg in zip(states, segments):
        for k in range(1, int(seg.max()) + 1):
            text = next(it)
            alone = attention.hidden(model, text[None], torch.ones(1, len(text), dtype=torch.long), causal)[0]
            assert torch.allclose(row[seg == k], alone, atol=1e-5)


def test_the_causal_view_is_the_models_own_and_the_last_token_is_seen_alike():
    model, ids = tiny(), torch.randint(0, 500, (3, 12))
    assert torch.allclose(attention.logits_of(model, ids, True), model(ids), atol=1e-5)
    one = attention.logits_of(model, ids[:, :1], False)
    assert torch.allclose(one, model(ids[:, :1]), atol=1e-5)       # a single token has no other side
    assert not torch.allclose(attention.logits_of(model, ids, False)[:, 0], model(ids)[:, 0], atol=1e-2)


def test_hidden_tokens_are_chosen_and_shown_as_bert_has_it():
    rng = torch.Generator().manual_seed(0)
    ids, real = torch.randint(0, 500, (400, 64)), torch.ones(400, 64, dtype=torch.bool)
    real[:, 50:] = False
    shown, chosen = attention.hide_tokens(ids, real, 0.15, MASK, 500, rng)
    assert not chosen[~real].any() and (shown == ids)[~chosen].all()
    n = chosen.sum().item()
    assert n / real.sum().item() == pytest.approx(0.15, abs=0.01)
    masked, same = (shown == MASK)[chosen].sum().item() / n, (shown == ids)[chosen].sum().item() / n
    assert masked == pytest.approx(0.8, abs=0.02) and same == pytest.approx(0.1, abs=0.02)      # a random token is the old one once in 500


def test_best_fit_is_the_likeliest_of_all_whole_texts():
    model = tiny(3)
    ids, candidates = torch.randint(0, 500, (1, 10)), random.Random(0).sample(range(500), 80)
    for place in (1, 4, 9):
        def score(word):
            text = ids[0].tolist()
            text[place] = word
            logprobs = model(torch.tensor([text]))[0].log_softmax(-1)
            return sum(logprobs[t, text[t + 1]].item() for t in range(9))
        assert attention.best_fit(model, ids, place, candidates) == max(candidates, key=score)


def test_questions_are_words_in_the_middle_of_held_out_documents(tmp_path):
    corpus.write(tmp_path, seed=1, megabytes=0.2)
    sources = gpt.read_corpus(tmp_path / "pretrain", ENC, attention.T, 0.2)
    held_out = {tuple(d[:attention.T].tolist()) for _, val, _ in sources.values() for d in val}
    asked, candidates = attention.questions(sources, ENC, 40, random.Random(0))
    assert len(asked) == 40
    for document, place in asked:
        assert tuple(document) in held_out and document[place] in candidates
        assert len(document) // 3 <= place <= 2 * len(document) // 3 and place + 4 < len(document)
        assert ENC.decode([document[place]])[0] == " " and ENC.decode([document[place]])[1:].isalpha()


def test_both_models_learn_a_text_and_answer(tmp_path):
    document = torch.tensor(ENC.encode_ordinary("Tom has a red boat and Ann has a blue kite in the old barn.") + [gpt.end_of(ENC)])
    sources = {"one": ([document], [document], 1.0)}
    cfg = attention.Config(steps=60, batch_tokens=64, n_embd=32, lr=1e-2)
    place = next(t for t in range(5, 12) if attention.is_word(ENC, document[t].item()))
    asked, words = [(document.tolist(), place)], sorted({t for t in document.tolist() if attention.is_word(ENC, t)})
    for causal in (True, False):
        model = attention.train(causal, sources, ENC, cfg, 0, torch.device("cpu"))
        right = attention.answers(model, causal, asked, words, MASK)
        assert right["gap, both sides"] == 1 and set(right) == {"gap, both sides", "next", "run"} | ({"gap, left side"} if causal else set())
        if causal:
            assert right["run"] == right["next"] == 1


def copier(seed):
    """Blocks that add nothing: what stands at a place is what such a model says there, so that a word left in sight is found."""
    model = tiny(seed)
    for block in model.h:
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            layer.weight.data.zero_()
            layer.bias.data.zero_()
    return model


@pytest.mark.parametrize("causal", [True, False])
def test_no_answer_depends_on_the_word_that_is_asked_for(causal):
    model, rng = copier(5), random.Random(6)
    document, candidates, place = [rng.randrange(500) for _ in range(14)], sorted(rng.sample(range(500), 20)), 6
    asked = [(document[:place] + [word] + document[place + 1:], place) for word in candidates]
    right = attention.answers(model, causal, asked, candidates, MASK)
    for task in set(right) - {"run"}:
        assert right[task] == pytest.approx(1 / 20)                # the same guess each time, so it is right exactly once


def test_the_bidirectional_guess_of_what_comes_next_is_read_at_a_mask():
    model, rng = copier(7), random.Random(8)
    document, candidates, place = [rng.randrange(500) for _ in range(14)], list(range(500)), 6

    def guess(ids):
        return attention.logits_of(model, torch.tensor([ids]), False)[0, -1, :500].argmax().item()
    at_mask, at_word = guess(document[:place] + [MASK]), guess(document[:place])
    assert at_mask != at_word
    document[place] = at_mask
    assert attention.answers(model, False, [(document, place)], candidates, MASK)["next"] == 1


def test_attentions_verdict_follows_the_numbers():
    causal = {"gap, left side": 0.5, "gap, both sides": 0.7, "next": 0.5, "run": 0.4}
    good = {"causal": causal, "bidirectional": {"gap, both sides": 0.8, "next": 0.3, "run": 0.2}}
    assert attention.verdict([good, good]).count("does not hold") == 0 and attention.verdict([good]).count("holds") == 3
    for task, value, says in (("gap, both sides", 0.6, "whole document it does not hold"), ("gap, both sides", 0.4, "and does not hold here for the gap"),
                              ("next", 0.6, "claim does not hold here for what comes next"), ("run", 0.5, "claim does not hold here for what comes next")):
        bad = {"causal": causal, "bidirectional": good["bidirectional"] | {task: value}}
        assert says in attention.verdict([good, bad])              # one seed is enough


# ---- rouge

def test_spearman_is_pearson_of_shared_ranks():
    assert rouge.spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert rouge.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rouge.spearman([1, 1, 1], [1, 2, 3]) == 0
    assert rouge.average_ranks([3.0, 1.0, 3.0, 7.0]) == [1.5, 0, 1.5, 3]
    rng = random.Random(0)
    for _ in range(30):                                             # without ties: 1 - 6 sum d^2 / n(n^2-1)
        n = rng.randint(3, 9)
        x, y = rng.sample(range(100), n), rng.sample(range(100), n)
        d = [sorted(x).index(a) - sorted(y).index(b) for a, b in zip(x, y)]
        assert rouge.spearman(x, y) == pytest.approx(1 - 6 * sum(k * k for k in d) / (n * (n * n - 1)))
    assert rouge.spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_ideal_references_have_full_marks():
    rng = random.Random(1)
    for _ in range(25):
        task, _ = village.new_task(rng)
        assert village.gold(task, rouge.ideal(task, rng)) == pytest.approx(1)


@pytest.mark.parametrize("kind", rouge.MADE)
def test_made_pairs_are_right_and_wrong_and_overlap_misleads(kind):
    from self_instruct import rouge_l
    rng = random.Random(2)
    for _ in range(40):
        task, chat, reference, right, wrong = rouge.made_pair(kind, rng)
        assert chat[-1]["role"] == "user" and village.gold(task, reference) == 1
        assert village.gold(task, right) > village.gold(task, wrong) and right != reference
        if kind != "other ignorance":
            assert rouge_l(reference, wrong) > rouge_l(reference, right)


def record(rng):
    task, prompt = village.new_task(rng, use="open_qa")
    answers = [village.demonstration(task, rng) for _ in range(5)] + [rouge.ideal(task, rng)]
    golds = [village.gold(task, a) for a in answers]
    return {"prompt": prompt, "task": task, "responses": answers, "ranks": [1 + sum(g > h for g in set(golds)) for h in golds]}


def test_judges_against_pairs_counted_by_hand():
    rng = random.Random(3)
    records = [record(rng) for _ in range(25)]
    golds = [[village.gold(r["task"], a) for a in r["responses"]] for r in records]
    right = rouge.judge(records, [g for row in golds for g in row], random.Random(0))
    assert right["reward model"] == pytest.approx((1, 1)) and right["labeler"] == pytest.approx((1, 1))
    wrong = rouge.judge(records, [-g for row in golds for g in row], random.Random(0))
    assert wrong["reward model"] == pytest.approx((0, -1))
    pairs = [(len(r["responses"][i].split()), len(r["responses"][j].split())) for r, g in zip(records, golds)
             for i, j in itertools.permutations(range(6), 2) if g[i] > g[j]]
    assert right["length"][0] == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
    assert right["ROUGE-L, ideal"][0] > right["ROUGE-L, demonstration"][0]


def test_rouges_verdict_follows_the_numbers():
    run = {"ROUGE-L, demonstration": (0.6, 0.2), "ROUGE-L, ideal": (0.7, 0.3), "reward model": (0.9, 0.8)}
    made = {k: (0.1, 0.9) for k in rouge.MADE}
    assert "claim holds" in rouge.verdict([run], [made]) and "model in 0." in rouge.verdict([run], [made])
    assert "does not hold" in rouge.verdict([run, run | {"ROUGE-L, demonstration": (0.95, 0.9)}], [made])
    assert "not always worse;" in rouge.verdict([run | {"ROUGE-L, ideal": (0.95, 0.9)}], [made])
    assert "model in 1 (polite)." in rouge.verdict([run], [made | {"polite": (0.1, 0.2)}])


# ---- end to end

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    corpus.write(folder / "data", seed=0, megabytes=0.3)
    body = tiny()
    gpt.save_model(folder / "sft.pt", body, ENC, "")
    model = reward.RewardModel(body)
    gpt.save_checkpoint(folder / "reward.pt", model=model.state_dict(), gpt=vars(body.config), tokenizer="", fingerprint=gpt.fingerprint(ENC))
    rng = random.Random(4)
    for name in ("ranked_train", "ranked_val"):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(record(rng)) + "\n" for _ in range(12)))
    return folder


def test_both_run_and_log(out, capsys):
    attention.main(attention.Config(out=str(out), steps=2, n=3, seeds=2, n_embd=16, device="cpu"))
    rouge.main(rouge.Config(out=str(out), n=8, seeds=2, device="cpu"))
    printed = capsys.readouterr().out
    assert printed.count("The claim ") == 2 and "bidirectional" in printed and "reward model" in printed
    for name in ("attention", "rouge"):
        rows = [json.loads(line) for line in open(out / f"lab-{name}.jsonl")]
        assert [r["seed"] for r in rows] == [0, 1]
