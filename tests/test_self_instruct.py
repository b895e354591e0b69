"""Properties of self_instruct.py: the filters against brute force, what is read from what a model wrote, and each step with a model that says what the
test wants it to say. Also of the two things of gpt.py that it needs: a longer context, and --init.
"""
import functools
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402
import self_instruct as si  # noqa: E402
from data import tasks  # noqa: E402
from gpt import UserError  # noqa: E402

ENC = gpt.get_tokenizer()
END = gpt.end_of(ENC)


def tiny(block=64, seed=0, **sizes):
    """A small model far from GPT-2's nearly uniform start."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, block, **{**dict(n_layer=1, n_head=2, n_embd=16), **sizes}))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.eval()


def saved(path, **choice):
    model = tiny(**choice)
    gpt.save_model(path, model, ENC, "", seed=0, data="")
    return model


def paper(n=400):
    """A stand-in where only the size of the context is asked for."""
    return SimpleNamespace(config=SimpleNamespace(block_size=n))


# ROUGE-L

def lcs(a, b):
    """Longest common subsequence by its definition, recursively."""
    @functools.lru_cache(None)
    def longest(i, j):
        if not i or not j:
            return 0
        return longest(i - 1, j - 1) + 1 if a[i - 1] == b[j - 1] else max(longest(i - 1, j), longest(i, j - 1))
    return longest(len(a), len(b))


def random_pairs(n, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        some = [f"w{i}" for i in range(rng.choice([2, 5, 30]))]
        yield tuple(rng.choice([" ", ", ", "! "]).join(rng.choices(some, k=rng.randint(0, rng.choice([4, 20, 90])))) for _ in range(2))


HAND_MADE = [("testing one two", "testing one", 0.8), ("the cat sat on the mat", "the cat lay on the mat", 10 / 12), ("a b c d", "d c b a", 0.25),
             ("Name two animals.", "name TWO animals", 1.0), ("", "", 0.0), ("", "cat", 0.0), ("... !?", "cat", 0.0), ("猫和狗", "猫和狗", 0.0), ("猫 is cat", "狗 is cat", 1.0),
             ("don't stop", "don t stop", 1.0), ("snake_case", "snake case", 1.0), ("naïve", "na ve", 1.0), ("a a a", "a", 0.5), ("x1 2y", "x1 2y z", 0.8),
             ("police killed the gunman", "police kill the gunman", 0.75), ("police killed the gunman", "the gunman kill police", 0.5)]


@pytest.mark.parametrize("a, b, f", HAND_MADE)
def test_rouge_l_of_known_pairs(a, b, f):
    assert si.rouge_l(a, b) == pytest.approx(f, abs=1e-12)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    for a, b in random_pairs(250):
        x, y = (t.replace(",", " ").replace("!", " ").split() for t in (a, b))
        common = lcs(tuple(x), tuple(y))
        precision, recall = common / max(1, len(y)), common / max(1, len(x))
        assert si.rouge_l(a, b) == pytest.approx(2 * precision * recall / (precision + recall) if common else 0, abs=1e-12)
        assert si.rouge_l(a, b) == si.rouge_l(b, a)
        assert (si.rouge_l(a, b) == 1) == (x == y != [])


def test_rouge_l_is_what_the_rouge_score_package_computes():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    rng = random.Random(1)
    asked = [tasks.new_task(rng)["instruction"] for _ in range(60)]
    for a, b in [*random_pairs(150, seed=2), *(x[:2] for x in HAND_MADE), *zip(asked, asked[1:])]:
        assert si.rouge_l(a, b) == pytest.approx(scorer.score(a, b)["rougeL"].fmeasure, abs=1e-9), (a, b)


# The filters of instructions

@pytest.mark.parametrize("instruction, reason", [
    ("Name two animals.", "short"), ("Name two more animals.", None), ("word " * 150, None), ("word " * 151, "long"), ("", "short"),
    ("Draw a cat for me.", "keyword"), ("Describe the image to me.", "keyword"), ("Look at these images, please.", "keyword"), ("Go to the mill and sit.", "keyword"),
    ("Tell me of the MAP.", "keyword"), ("What is in a file?", "keyword"), ("Tell me about graphite, please.", None), ("What is a profile of Tom?", None),
    ("Tell me what a drawer is.", None), ("He is going to the mill.", None), ("Let the dog go tomorrow.", None), ("Write a plot for me.", "keyword"),
    ("Write a program that counts.", "program"), ("Help me write a program today.", None), ("Write a programme for Tom.", "program"),
    ("\"Quoted\" is this whole thing.", "first letter"), ("- Name two more animals.", "first letter"), ("请 告诉 我 猫 的 名字", "first letter"), ("3 and 4 make what?", None),
    ("_Name two more animals.", "first letter")])
def test_every_filter_has_its_reason(instruction, reason):
    assert si.reject_reason(instruction, []) == reason


@pytest.mark.parametrize("word", "image images graph graphs picture pictures file files map maps draw plot".split() + ["go to"])
def test_what_a_text_model_cannot_do_is_refused_as_a_word_only(word):
    assert si.reject_reason(f"Please {word} the cat now", []) == "keyword" and si.reject_reason(f"Now {word.upper()}, please do it", []) == "keyword"
    assert si.reject_reason(f"Please x{word}y the cat now", []) is None


def test_rouge_of_exactly_seven_tenths_is_kept():
    """As the paper's code has it: similarity above 0.7 goes, 0.7 itself stays."""
    ten = [f"w{i}" for i in range(10)]
    same = lambda n: " ".join(ten[:n] + [f"x{i}" for i in range(10 - n)])
    assert si.rouge_l(same(7), " ".join(ten)) == 0.7 and si.reject_reason(same(7), [" ".join(ten)]) is None
    assert si.reject_reason(same(8), [" ".join(ten)]) == "rouge"
    assert si.reject_reason(same(8), []) is None and si.reject_reason(same(8), ["Name two more animals.", " ".join(ten), "Add 3 and 4."]) == "rouge"
    assert si.reject_reason("image of w", ["image of w"]) == "short" and si.reject_reason("an image of w", ["an image of w"]) == "keyword"


# Lists

def test_a_list_goes_on_where_its_prompt_stops():
    rng = random.Random(3)
    for _ in range(50):
        given = [tasks.new_task(rng)["instruction"] for _ in range(rng.randint(2, 12))]
        whole, n = si.list_prompt(given), rng.randint(1, len(given) - 1)
        head = si.list_prompt(given[:n])
        assert whole.startswith(head) and whole.endswith(f"\n{len(given) + 1}.")
        assert si.read_list(whole.removeprefix(head)) == given[n:], "what follows the prompt reads back to the rest of the list"
    assert si.list_prompt(["a\nb", " c  d "]) == "Come up with a series of tasks:\n1. a b\n2. c d\n3."


@pytest.mark.parametrize("text, found", [
    (" a b.\n10. c d.\n11.e", ["a b.", "c d.", "e"]), (" a\n 2 of them.\n10 . b", ["a 2 of them.", "b"]), ("", []), ("\n\n", []), (" a 3. b", ["a 3. b"]),
    (" a\n9.\n10. b\n11.", ["a", "b"]), (" a  \t b \n", ["a b"])])
def test_lists_are_read_by_numbers_at_the_start_of_a_line(text, found):
    assert si.read_list(text) == found


def test_the_pages_show_what_is_asked_for_later():
    """data/tasks.py writes the pages, self_instruct.py the prompts and the readers: they must speak one format."""
    rng = random.Random(4)
    for _ in range(20):
        page = tasks.list_page(rng)
        head = "Come up with a series of tasks:"
        shown = si.read_list(page.removeprefix(head))
        assert page.startswith(head) and len(shown) >= 10 and page.startswith(si.list_prompt(shown[:8]))
        for block in tasks.example_page(rng).split("Task: ")[1:]:
            instruction, _, rest = block.partition("\n")
            (pair,) = si.read_instances(rest + "\nTask: the next one\nOutput: no", False)
            assert tasks.audit(instruction, pair[0], pair[1])[:2] == (True, True)
        page = tasks.kind_page(rng)
        asked = [x.removeprefix("Task: ").split("\n")[0] for x in page.split("\n\n")]
        assert page == "\n".join(f"Task: {x}\nIs it classification? {'Yes' if tasks.read_instruction(x)['op'][1] in tasks.CLASSIFICATION else 'No'}\n" for x in asked)
        for block in tasks.label_page(rng).split("\n\n"):
            instruction, _, rest = block.partition("\n")
            pairs = si.read_instances(rest, True)
            assert len(pairs) == 2 and all(tasks.audit(instruction.removeprefix("Task: "), x, y) == (True, True, True) for x, y in pairs)


# Instances

@pytest.mark.parametrize("text, found", [
    ("Input: a cat\nOutput: animal.", [("a cat", "animal.")]), ("Output: yes", [("", "yes")]), ("Input: a cat\n", []), ("Input: a cat", []), ("", []), ("nonsense", []),
    ("Input: a\nOutput: b\nInput: c\nOutput: d", [("a", "b"), ("c", "d")]), ("Output: b\nOutput: d", [("", "b"), ("", "d")]),
    ("Input: a\nOutput: b\nInput: c\nOutp", [("a", "b")]), ("Input: a\nOutput: b\n\nTask: Add 3 and 4.\nOutput: 7.", [("a", "b")]),
    ("Input: a\nOutput:", [("a", "")]), ("Output:  x: y  ", [("", "x: y")]), ("Input: Output: b", []), ("The Output: b", []), ("Input: a\nOutput: Input: b", [("a", "Input: b")]),
    ("\nTask: Add 3 and 4.\nOutput: 7.", [])])
def test_inputs_and_outputs_of_what_a_model_wrote(text, found):
    assert si.read_instances(text, False) == found


@pytest.mark.parametrize("text, found", [
    ("Class label: happy.\nInput: Tom is merry.", [("Tom is merry.", "happy.")]), ("Class label: happy.", []), ("Class label: happy.\n", []), ("", []), ("nonsense", []),
    ("Class label: a\nInput: x\nClass label: b\nInput: y", [("x", "a"), ("y", "b")]), ("Class label: a\nClass label: b\nInput: y", [("y", "b")]),
    ("Class label: a\nInput: x\nInput: y", []), ("Class label: a\nInput: x\nClass la", [("x\nClass la", "a")]), ("Class label: a\nInput:", [("", "a")]),
    ("Class label: a\nInput: x\n\nTask: Is it b?\nClass label: b\nInput: y", [("x", "a")])])
def test_labels_and_inputs_of_what_a_model_wrote(text, found):
    assert si.read_instances(text, True) == found


@pytest.mark.parametrize("given, kept, reasons", [
    ([("a", "x"), ("b", "y")], [("a", "x"), ("b", "y")], []), ([], [], []),
    ([("a", "x"), ("a", "x"), ("b", "y")], [("a", "x"), ("b", "y")], []),
    ([("a", "x"), ("a", "y"), ("b", "z")], [], ["same input, other output"] * 3),
    ([("", "x"), ("", "y")], [("", "x"), ("", "y")], []), ([("a", "")], [], ["empty output"]), ([("", "")], [], ["empty output"]), ([("a", "a")], [], ["input is output"]),
    ([("a:", "x"), ("b", "y:"), ("c:d", "y")], [("c:d", "y")], ["ends with a colon"] * 2),
    ([("a", "x"), ("a", "")], [("a", "x")], ["empty output"]),
    ([(str(i), "x") for i in range(7)], [(str(i), "x") for i in range(5)], ["more than five"] * 2),
    ([(str(i), "x") for i in range(6)] + [("0", "z")], [], ["same input, other output"] * 7)])
def test_the_filters_of_instances(given, kept, reasons):
    assert si.keep_instances(given) == (kept, reasons)
    assert len(set(given)) == len(kept) + len(reasons), "each different instance is kept or has a reason"


# The model's own odds

def test_the_least_likely_token_is_found_by_hand():
    rng, model, header = random.Random(7), tiny(block=48), ENC.encode_ordinary("Come up with a series of tasks:\n1.")
    texts = ["Name two animals.", "猫 zebra?", "x", "Name two animals."] + [" ".join(rng.choices("cat Tom mill red two soup".split(), k=rng.randint(1, 6))) for _ in range(30)]
    got, where = si.least_likely(model, ENC, texts), set()
    for text, p in zip(texts, got):
        own = ENC.encode_ordinary(f" {text}\n")
        probs = model(torch.tensor([header + own]))[0].softmax(-1)
        odds = [probs[len(header) - 1 + n, token].item() for n, token in enumerate(own)]
        where |= {"first"} if min(odds) == odds[0] else {"last"} if min(odds) == odds[-1] else {"between"}
        assert p == pytest.approx(min(odds), rel=1e-4) and 0 < p < 1
    assert where == {"first", "between", "last"}, "each place of the least likely token was tried"
    assert got[0] == pytest.approx(got[3], rel=1e-6)
    for batch in (1, 7):
        assert si.least_likely(model, ENC, texts, batch) == pytest.approx(got, rel=1e-4), "it does not depend on the neighbours in a batch"
    assert si.least_likely(model, ENC, ["cat " * 80])[0] > 0 and si.least_likely(model, ENC, []) == []


# Step 1

class Says:
    """In place of ask(): notes what it is asked, and says what `answer(prompt, n)` has for the n-th prompt of all."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, model, enc, prompts, max_new_tokens, **sampling):
        n = sum(len(c[0]) for c in self.calls)
        self.calls.append((list(prompts), max_new_tokens, sampling))
        return [self.answer(p, n + i) for i, p in enumerate(prompts)]


SEEDS = [f"s{i} " + " ".join(f"s{i}{c}" for c in "abcd") for i in range(20)]   # no two alike
CFG = dict(rounds=3, requests=4, likelihood=0, temperature=0.7, top_p=0.5)


def fresh(n):
    """A new instruction, unlike any other."""
    return f"m{n} " + " ".join(f"m{n}{c}" for c in "abcd")


def grown(monkeypatch, answer, seed=0, model=None, seeds=SEEDS, **choice):
    says = Says(answer)
    monkeypatch.setattr(si, "ask", says)
    kept, fate, rounds = si.grow(model or paper(), ENC, list(seeds), SimpleNamespace(**CFG | choice), random.Random(seed))
    return kept, fate, rounds, says


def test_lists_show_8_of_people_first_and_later_6_and_2_of_its_own(monkeypatch):
    kept, fate, rounds, says = grown(monkeypatch, lambda p, n: (f" {fresh(2 * n)}\n10. {fresh(2 * n + 1)}", True))
    assert kept == [fresh(i) for i in range(24)] and fate == {"kept": 24}
    orders = set()
    for number, (prompts, _, _) in enumerate(says.calls):
        for prompt in prompts:
            shown = si.read_list(prompt.removeprefix("Come up with a series of tasks:"))
            assert len(shown) == len(set(shown)) == 8 and prompt == si.list_prompt(shown)
            own = [x for x in shown if x in kept[:8 * number]]
            assert len(own) == (0 if number == 0 else 2) and len([x for x in shown if x in SEEDS]) == 8 - len(own)
            orders.add(tuple(x in own for x in shown))
    assert len(orders) > 3, "its own stand anywhere in the list"
    assert rounds == [dict(round=i, pool=20 + 8 * i, tried=8, kept=8) for i in range(3)]


def test_one_own_instruction_is_shown_where_there_is_one(monkeypatch):
    _, _, _, says = grown(monkeypatch, lambda p, n: (f" {fresh(0)}", True), rounds=2)
    assert all(sum(x == fresh(0) for x in si.read_list(p)) == 1 for p in says.calls[1][0])


def test_lists_without_an_end_go_whole(monkeypatch):
    kept, fate, rounds, _ = grown(monkeypatch, lambda p, n: (f" {fresh(2 * n)}\n10. {fresh(2 * n + 1)}\n11.", n % 2 == 0))
    assert fate == {"kept": 12, "list without end": 12} and kept == [fresh(i) for n in range(0, 12, 2) for i in (2 * n, 2 * n + 1)]
    assert sum(r["kept"] for r in rounds) == 12


def test_every_candidate_has_one_fate_and_twins_of_one_round_are_twins(monkeypatch):
    lines = ["Too short.", "Draw a picture of me.", "Write a program that counts.", "- no letter at first here", SEEDS[3], "cat " * 151, fresh(0), fresh(0)]
    kept, fate, rounds, _ = grown(monkeypatch, lambda p, n: (" " + "\n10. ".join(lines), n != 5), rounds=2)
    assert kept == [fresh(0)]
    assert fate == {"short": 7, "keyword": 7, "program": 7, "first letter": 7, "long": 7, "rouge": 7 + 7 + 6, "kept": 1, "list without end": 8}
    assert sum(fate.values()) == 8 * len(lines), "sums to all candidates"
    assert [r["tried"] for r in rounds] == [32, 24] and [r["pool"] for r in rounds] == [20, 21] and [r["kept"] for r in rounds] == [1, 0]


def test_what_the_model_itself_finds_unlikely_is_dropped_last(monkeypatch):
    monkeypatch.setattr(si, "least_likely", lambda model, enc, texts: [0.009 if x.startswith("m1 ") or len(x) < 5 else 0.01 for x in texts])
    answer = lambda p, n: (f" {fresh(1)}\n10. {fresh(2)}\n11. abc", True)
    assert grown(monkeypatch, answer, rounds=1, requests=1, likelihood=0.01)[:2] == ([fresh(2)], {"unlikely": 1, "kept": 1, "short": 1})
    monkeypatch.setattr(si, "least_likely", lambda *a: 1 / 0)
    assert grown(monkeypatch, answer, rounds=1, requests=1)[:2] == ([fresh(1), fresh(2)], {"kept": 2, "short": 1}), "the paper's filters alone"


def test_growing_is_decided_by_the_seed_and_asks_as_it_was_told(monkeypatch):
    answer = lambda p, n: (f" {fresh(n)}", True)
    one, again, other = (grown(monkeypatch, answer, seed)[3].calls for seed in (1, 1, 2))
    assert one == again and [c[0] for c in one] != [c[0] for c in other]
    assert all(c[2]["temperature"] == 0.7 and c[2]["top_p"] == 0.5 for c in one)
    assert len({c[2]["seed"] for c in one}) == 3, "each round draws anew"
    assert all(c[1] + max(len(ENC.encode_ordinary(p)) for p in c[0]) >= 400 for c in one), "a list may fill the context"


def test_asking_is_seeded_batched_and_tells_who_came_to_an_end(monkeypatch):
    model, prompts = tiny(block=40), ["Name two", "Name two", "Name two", "Write a letter to Tom and"]
    one = si.ask(model, ENC, prompts, 12, temperature=1.0, seed=5)
    assert one == si.ask(model, ENC, prompts, 12, temperature=1.0, seed=5) != si.ask(model, ENC, prompts, 12, temperature=1.0, seed=6)
    assert len({text for text, _ in si.ask(model, ENC, prompts[:3], 12, batch=1, temperature=1.0, seed=5)}) == 3, "no batch repeats the draws of another"
    assert [t for t, _ in si.ask(model, ENC, prompts, 12, batch=3, temperature=0)] == [t for p in prompts for t, _ in si.ask(model, ENC, [p], 12, temperature=0)]
    ids = ENC.encode_ordinary("a cat")
    monkeypatch.setattr(gpt, "generate", lambda m, prompts, n, stop, **k: [ids + [END] if p == ENC.encode_ordinary("Name two") else ids for p in prompts])
    assert si.ask(model, ENC, prompts, 12) == [("a cat", True)] * 3 + [("a cat", False)]


@pytest.mark.parametrize("step", ["grow", "instances"])
def test_a_prompt_that_fills_the_context_is_one_line(step):
    model = tiny(block=64)
    with pytest.raises(UserError, match="context"):
        if step == "grow":
            si.grow(model, ENC, [f"Write a letter to Tom about number {i}." for i in range(9)], SimpleNamespace(**CFG), random.Random(0))
        else:
            si.instances(model, ENC, ["Tell it to Tom. " * 20], False, [], 0, random.Random(0))


# Steps 2 and 3

def seeds_of(n=30, seed=5):
    return [{k: t[k] for k in ("instruction", "is_classification", "instances")} for t in tasks.seed_tasks(random.Random(seed), n)]


def test_identify_shows_both_kinds_in_turn_and_stays_in_the_context(monkeypatch):
    seeds, asked = seeds_of(78), ["Name two animals. Say it twice.", "Is the line happy or sad? " + "Say it to Tom. " * 5]
    of_kind = {s["instruction"]: s["is_classification"] for s in seeds}
    for block in (120, 200, 400):
        says = Says(lambda p, n: (" Yes\nmore" if n == 0 else " No", True))
        monkeypatch.setattr(si, "ask", says)
        assert si.identify(paper(block), ENC, asked, seeds, random.Random(0)) == [True, False]
        (prompts, room, sampling), = says.calls
        assert sampling["temperature"] == 0 and all(len(ENC.encode_ordinary(p)) + room <= block for p in prompts)
        assert len(ENC.encode_ordinary(prompts[1])) + room > block - 80, "as many shots as there is room for"
        blocks = prompts[1].split("\n\n")
        shots = [(lines.split("\n")[0].removeprefix("Task: "), lines.split("\n")[1]) for lines in blocks[:-1]]
        assert len(shots) >= (1 if block == 120 else 3) and all(of_kind[x] == (answer == "Is it classification? Yes") for x, answer in shots)
        assert [of_kind[x] for x, _ in shots] == [i % 2 == 0 for i in range(len(shots))]
        assert blocks[-1] == f"Task: {asked[1]}\nIs it classification?" and prompts[0].startswith("\n\n".join(blocks[:-1]))


def test_only_yes_is_yes(monkeypatch):
    texts = [" Yes", "Yes", " No", "", " yes", " Maybe Yes", "\nYes\n"]
    monkeypatch.setattr(si, "ask", Says(lambda p, n: (texts[n], True)))
    assert si.identify(paper(), ENC, ["Name two more animals."] * 7, seeds_of(), random.Random(0)) == [True, True, False, False, False, False, True]


def test_instances_are_asked_label_first_or_input_first(monkeypatch):
    seeds = seeds_of(78)
    for label_first in (False, True):
        says = Says(lambda p, n: ((" sad.\nInput: Tom is sad." if label_first else "Input: Tom is sad.\nOutput: sad.") + "\n\nTask: x\nOutput: y", True))
        monkeypatch.setattr(si, "ask", says)
        assert si.instances(paper(), ENC, ["Which mood is it?", "Name it."], label_first, seeds, 2, random.Random(1)) == [[("Tom is sad.", "sad.")]] * 2
        assert si.instances(paper(150), ENC, ["Which mood is it?"], label_first, seeds, 0, random.Random(1)) == [[("Tom is sad.", "sad.")]]
        (prompts, room, sampling), (bare, _, _) = says.calls
        assert bare == ["Task: Which mood is it?" + ("\nClass label:" if label_first else "\n")]
        assert 0 < room and all(len(ENC.encode_ordinary(p)) + room <= 400 for p in prompts)
        head, _, last = prompts[0].rpartition("Task: ")
        assert sampling["temperature"] == 0 and prompts[1] == f"{head}Task: Name it." + ("\nClass label:" if label_first else "\n")
        assert last == "Which mood is it?" + ("\nClass label:" if label_first else "\n")
        shots = head.split("\n\n")
        assert shots.pop() == "" and len(shots) == 2
        for shot in shots:
            instruction, _, rest = shot.partition("\n")
            seed = next(s for s in seeds if s["instruction"] == instruction.removeprefix("Task: "))
            assert seed["is_classification"] == label_first
            assert si.read_instances(rest, label_first) == [(i["input"], i["output"]) for i in seed["instances"]], "a shot reads back"
            assert ("Class label:" in rest) == label_first


@pytest.mark.parametrize("label_first", [False, True])
def test_the_last_instance_of_a_text_without_an_end_was_cut_off(monkeypatch, label_first):
    text = " sad.\nInput: Tom is sad.\nClass label: happy.\nInput: Ann" if label_first else "Input: Tom is sad.\nOutput: sad.\nInput: Ann\nOutput: happy."
    whole = [("Tom is sad.", "sad."), ("Ann", "happy.")]
    for said, ended, want in ((text, True, whole), (text, False, whole[:1]), (text + "\n\nTask: x", False, whole)):
        monkeypatch.setattr(si, "ask", Says(lambda p, n: (said, ended)))
        assert si.instances(paper(), ENC, ["Which mood is it?"], label_first, seeds_of(78), 0, random.Random(1)) == [want]



# Seeds and records

GOOD = {"instruction": "Name two more animals.", "instances": [{"input": "", "output": "cat and dog."}], "is_classification": False}


def written(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_seeds_are_read_in_the_papers_format(tmp_path):
    paper_record = {"id": "seed_task_0", "name": "x", "instruction": "Is it?", "instances": [{"input": "猫", "output": "yes"}, {"output": "no"}], "is_classification": True}
    found = si.read_seeds(written(tmp_path / "s.jsonl", [GOOD] * 7 + [paper_record]))
    assert found[:7] == [GOOD] * 7
    assert found[7] == {"instruction": "Is it?", "is_classification": True, "instances": [{"input": "猫", "output": "yes"}, {"input": "", "output": "no"}]}


@pytest.mark.parametrize("bad", [{"instances": []}, {"instruction": 3, "instances": []}, {"instruction": "x"}, {"instruction": "x", "instances": {}}, {"instruction": "x", "instances": ["y"]},
                                 {"instruction": "x", "instances": [{"input": "y"}]}, {"instruction": "x", "instances": [{"output": 3}]}, {"instruction": "x", "instances": [{"input": 3, "output": "y"}]}])
def test_a_bad_seed_is_one_line_with_its_place(tmp_path, bad):
    with pytest.raises(UserError, match=r"s\.jsonl:9: expected") as e:
        si.read_seeds(written(tmp_path / "s.jsonl", [GOOD] * 8 + [bad]))
    assert "\n" not in str(e.value)


def test_too_few_seeds_none_and_no_file(tmp_path):
    for n, words in ((7, "7 seed tasks"), (0, "no records")):
        with pytest.raises(UserError, match=words):
            si.read_seeds(written(tmp_path / "s.jsonl", [GOOD] * n))
    with pytest.raises(UserError, match="none.jsonl"):
        si.read_seeds(tmp_path / "none.jsonl")


def test_records_are_alpaca_records_one_an_instance():
    made = [{"instruction": "I", "is_classification": True, "instances": [{"input": "a", "output": "b"}, {"input": "", "output": "c"}]}, {"instruction": "J", "instances": []}]
    assert si.as_records(made) == [{"instruction": "I", "input": "a", "output": "b"}, {"instruction": "I", "input": "", "output": "c"}]


# Numbers

@pytest.mark.parametrize("text, pair", [("Write a story about Tom.", ("write", "story")), ("Tell me the price of it.", ("tell", "price")), ("Is it an animal?", ("is", "animal")),
                                        ("Name", ("name", "")), ("Is it a", ("is", "")), ("Sum up the story.", ("sum", "up"))])
def test_first_words(text, pair):
    assert si.first_words(text) == pair


def test_statistics_of_what_was_made(tmp_path):
    seeds = [{"instruction": "Name two more animals."}, {"instruction": "Write a letter to Tom."}]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("Come up with a series of tasks:\n1. Read on the page.\nTask: Heard in a task here.\n12. Twelfth of a list.\n", encoding="utf-8")
    read = si.corpus_lines(tmp_path)
    assert {"Read on the page.", "Heard in a task here.", "Twelfth of a list."} <= read
    made = ["Name two more animals.", "Read on the page.", "Heard in a task here.", "Write a letter to Ann.", "Write a poem for Ann.", "zebra quagga okapi"]
    got = si.statistics([{"instruction": x} for x in made], seeds, read)
    assert got["new_share"] == pytest.approx(3 / 6), "neither a seed nor a line that was read is new"
    nearest = [max(si.rouge_l(x, s["instruction"]) for s in seeds) for x in made]
    assert nearest[0] == 1 and got["rouge_to_seed"] == pytest.approx(sum(nearest) / 6)
    assert len(got["histogram"]) == 10 and sum(got["histogram"]) == 6 and got["histogram"][9] == 1 and got["histogram"][8] == 1 and got["histogram"][0] == 3 - sum(0.1 <= r < 0.8 for r in nearest) + 1
    assert got["verb_noun_pairs"] == 6 and got["verb_noun_top"] == 1 and got["words"] == pytest.approx(sum(len(x.split()) for x in made) / 6)
    many = [{"instruction": f"Write {c}{d} now please"} for c in "abcdef" for d in "gh"]
    assert si.statistics(many, seeds, set())["verb_noun_top"] == pytest.approx(4 / 12), "the four commonest objects of a verb"


def test_the_audit_counts_what_the_world_says():
    row = lambda i, x="", y="": {"instruction": i, "is_classification": x == "zebra", "instances": [{"input": x, "output": y}] if y else []}
    op, m = next((op, m) for op in [("openqa", "price")] for m in ("well", "thanks", "sure", "twice") if not tasks.seen(op, m))
    form = {"well": "Say well before it.", "thanks": "Say thank you after it.", "sure": "I want you to be sure.", "twice": "Say it twice."}[m]
    made = [row("How much is the cake?", "", "9."), row("How much is the cake?", "", "4."), row("How much is the cake?", "zebra", "9."), row("Fly to the moon.", "", "9."),
            row(f"How much is the cake? {form}")]
    got = si.audit(made, tasks)
    assert got.pop("kind_right") == 3 / 4   # of the four that are tasks of this world, one was called a classification
    assert got == dict(tasks=5, with_instance=4, valid=4 / 5, fits=2 / 4, right=1 / 4, unseen_pairs=1 / 5)


def test_corrected_outputs_are_right_and_what_nobody_can_read_is_left_out():
    given = [{"instruction": "How much is the cake?", "input": "", "output": "4."}, {"instruction": "Fly to the moon.", "input": "", "output": "4."},
             {"instruction": "Find the food in the text.", "input": "Tom likes soup.", "output": "x"}, {"instruction": "Find the food in the text.", "input": "zebra", "output": "x"}]
    found = si.corrected(given, tasks, random.Random(0))
    assert [(r["instruction"], r["input"]) for r in found] == [(given[i]["instruction"], given[i]["input"]) for i in (0, 2)]
    assert all(tasks.audit(r["instruction"], r["input"], r["output"]) == (True, True, True) for r in found) and given[0]["output"] == "4."


# Step 5

RECORDS = [{"instruction": f"Name {n} animals.", "input": x, "output": "cat and dog."} for n in ("two", "three", "four") for x in ("", "Tom has 牛.")]


def test_the_loss_falls_on_the_output_and_its_end_in_every_template():
    rng, shapes = random.Random(6), [set(), set()]
    for record in RECORDS * 40:
        ids, mask = si.encode(record, ENC, rng)
        prompt, answer = (ENC.decode([i for i, m in zip(ids.tolist(), mask.tolist()) if m == v]) for v in (0, 1))
        assert len(ids) == len(mask) and sorted(mask.tolist()) == mask.tolist() and answer.lstrip() == "cat and dog.<|end|>" and ids[-1] == END
        assert answer.startswith(" ") == (not prompt.endswith("\n")), "one space or a line end between the two"
        assert record["instruction"] in prompt and record["input"] in prompt and "{" not in prompt and "cat" not in prompt
        shapes[bool(record["input"])].add(prompt.replace(record["instruction"], "I").replace(record["input"] or "\0", "X"))
    assert len(shapes[0]) == len(set(si.WITHOUT_INPUT)) > 2 and len(shapes[1]) == len(set(si.WITH_INPUT)) > 2, "every template comes up"


def test_braces_in_a_users_text_are_only_text():
    record = {"instruction": "Mend this template.", "input": "Dear {instruction}, {input}!", "output": "x"}
    assert all("Dear {instruction}, {input}!" in si.prompt_of(record, random.Random(i)) for i in range(9))


def test_an_answer_is_the_first_line_of_what_follows(monkeypatch):
    says = Says(lambda p, n: ([" cat.\nTask: more", "\n\ndog. ", ""][n], n > 0))
    monkeypatch.setattr(si, "ask", says)
    assert si.follow(paper(), ENC, RECORDS[:3], random.Random(0)) == ["cat.", "dog.", ""]
    (prompts, _, sampling), = says.calls
    assert sampling["temperature"] == 0 and all(r["instruction"] in p and r["input"] in p and "cat" not in p for r, p in zip(RECORDS, prompts))


def test_fine_tuning_gives_the_model_of_the_best_look_and_leaves_the_base_alone(tmp_path):
    base = saved(tmp_path / "gpt.pt", block=32)
    before, looks, scores = (tmp_path / "gpt.pt").read_bytes(), [], iter([1.0, 3.0, 2.0, 3.0, 0.0])

    def val_score(model):
        assert not model.training
        looks.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(scores)
    cfg = SimpleNamespace(seed=0, lr=1e-2, steps=10, batch_tokens=60)
    model = si.fine_tune(tmp_path / "gpt.pt", "cpu", RECORDS, val_score, cfg)
    assert len(looks) == 5 and not model.training
    same = lambda a, b: all(torch.equal(a[k], b[k]) for k in a)
    assert same(looks[1], model.state_dict()) and not same(looks[0], looks[1]) and not same(base.state_dict(), looks[0])
    assert (tmp_path / "gpt.pt").read_bytes() == before
    for steps, n in ((1, 1), (4, 4)):
        looks.clear()
        scores = iter([0.0] * 9)
        si.fine_tune(tmp_path / "gpt.pt", "cpu", RECORDS, val_score, SimpleNamespace(**vars(cfg) | {"steps": steps}))
        assert len(looks) == n, "few steps are looked at, too"


def loss_of(model, records):
    torch.manual_seed(0)
    ids, mask = si.sft.collate([si.encode(r, ENC, random.Random(0)) for r in records], range(len(records)))
    return si.sft.response_loss(model(ids), ids, mask).item()


def test_fine_tuning_learns_the_records(tmp_path):
    base = saved(tmp_path / "gpt.pt", block=32)
    model = si.fine_tune(tmp_path / "gpt.pt", "cpu", RECORDS, lambda m: 1 / (1 + loss_of(m, RECORDS)), SimpleNamespace(seed=0, lr=1e-2, steps=20, batch_tokens=300))
    assert loss_of(model, RECORDS) < 0.6 * loss_of(base, RECORDS)


def test_the_longer_base_is_made_once_from_what_is_there(tmp_path, monkeypatch, capsys):
    runs = []

    def pretrain(cfg):
        runs.append(cfg)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        (Path(cfg.out) / "gpt.pt").write_text("weights")
    monkeypatch.setattr(gpt, "main", pretrain)
    monkeypatch.setattr(tasks, "ensure", lambda folder, seed: Path(folder))
    assert si.long_base(tmp_path / "o", 7, "cpu") == tmp_path / "o" / "long" / "gpt.pt"
    assert [(c.out, c.init, c.seed, c.device) for c in runs] == [(str(tmp_path / "o"), "", 7, "cpu"), (str(tmp_path / "o" / "long"), str(tmp_path / "o" / "gpt.pt"), 7, "cpu")]
    assert runs[1].data == str(tmp_path / "o" / "data" / "pages") and runs[1].block_size > 128 and "missing" in capsys.readouterr().out
    si.long_base(str(tmp_path / "o"), 7, "cpu")
    assert len(runs) == 2 and capsys.readouterr().out == ""
    (tmp_path / "o" / "long" / "gpt.pt").unlink()
    si.long_base(tmp_path / "o", 7, "cpu")
    assert len(runs) == 3 and runs[2].init


# A whole run

def village_says(prompt, n):
    """A model that knows its village: lists, kinds and instances, a tenth of them wrong."""
    rng = random.Random(prompt)
    if prompt.startswith("Come up"):
        return " " + "\n10. ".join(tasks.new_task(rng)["instruction"] for _ in range(4)), n % 7 != 0
    asked = prompt.rpartition("Task: ")[2].split("\n")[0]
    read = tasks.read_instruction(asked)
    if prompt.endswith("classification?"):
        return (" Yes" if read["op"][1] in tasks.CLASSIFICATION else " No"), True
    task = tasks.new_task(rng, op=read["op"], half="plain")
    if prompt.endswith("Class label:"):
        return f" {tasks.ideal(task, rng)}\nInput: {task['input']}\n", True
    x = f"Input: {task['input']}\n" if task["input"] else ""
    return (f"{x}Output: {tasks.ideal(tasks.read_input(read, task['input']) or task, rng)}\n\nTask: next" if n % 10 else "nothing"), True


def run(tmp_path, monkeypatch, name="o", **choice):
    monkeypatch.setattr(si, "ask", Says(village_says))
    si.main(si.Config(base=str(tmp_path / "gpt.pt"), out=str(tmp_path / name), device="cpu", likelihood=0, **{**dict(rounds=2, requests=6), **choice}))
    return tmp_path / name


def jsonl(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_a_run_on_seeds_of_ones_own_writes_tasks_records_and_numbers(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "gpt.pt")
    written(tmp_path / "mine.jsonl", tasks.seed_tasks(random.Random(0), 60))
    monkeypatch.setattr(si, "audit", lambda *a: 1 / 0)
    monkeypatch.setattr(si, "worth", lambda *a: 1 / 0)
    outs = [run(tmp_path, monkeypatch, name, seeds=str(tmp_path / "mine.jsonl"), seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    files = [{n: (o / "self_instruct" / n).read_bytes() for n in ("tasks.jsonl", "sft.jsonl")} for o in outs]
    assert files[0] == files[1] != files[2], "same seed, same tasks"
    made, records, rows = (jsonl(outs[0] / n) for n in ("self_instruct/tasks.jsonl", "self_instruct/sft.jsonl", "self_instruct.jsonl"))
    fate, numbers = (next(r for r in rows if name in r) for name in ("candidates", "histogram"))
    assert len(made) > 10 and records == si.as_records(made) and si.sft.load_chats(outs[0] / "self_instruct" / "sft.jsonl")
    assert all(t["is_classification"] == (tasks.read_instruction(t["instruction"])["op"][1] in tasks.CLASSIFICATION) for t in made)
    assert fate["candidates"]["kept"] == len(made) and sum(fate["candidates"].values()) == 2 * 6 * 4 and fate["candidates"]["list without end"] == 8
    assert fate["instances"]["no instance"] == sum(not t["instances"] for t in made) > 0 and sum(numbers["histogram"]) == len(made)
    assert not list(tmp_path.rglob("*.part")) and not (outs[0] / "data").exists()
    assert str(outs[0] / "self_instruct" / "tasks.jsonl") in capsys.readouterr().out


def test_a_run_of_the_village_is_audited(tmp_path, monkeypatch):
    saved(tmp_path / "gpt.pt")
    (tmp_path / "o" / "data").mkdir(parents=True)
    monkeypatch.setattr(tasks, "write_pages", functools.partial(tasks.write_pages, megabytes=0.03))
    monkeypatch.setattr(si, "worth", lambda *a: [])
    out = run(tmp_path, monkeypatch)
    row, = (r for r in jsonl(out / "self_instruct.jsonl") if "unseen_pairs" in r)
    made = jsonl(out / "self_instruct" / "tasks.jsonl")
    assert si.audit(made, tasks).items() <= row.items() and row["valid"] == 1 and 0 < row["with_instance"] <= row["tasks"] == len(made)


def test_a_model_that_writes_no_list_is_told_so(tmp_path, monkeypatch):
    saved(tmp_path / "gpt.pt")
    written(tmp_path / "mine.jsonl", [GOOD] * 9)
    monkeypatch.setattr(si, "ask", Says(lambda p, n: (" no.", True)))
    with pytest.raises(UserError, match="not one usable instruction.*short"):
        si.main(si.Config(base=str(tmp_path / "gpt.pt"), seeds=str(tmp_path / "mine.jsonl"), out=str(tmp_path / "o"), device="cpu", rounds=1, requests=2))


@pytest.mark.parametrize("flag", [dict(rounds=0), dict(requests=0), dict(top_p=1.5), dict(likelihood=-1.0), dict(temperature=-1.0)])
def test_settings_out_of_bounds_are_refused_before_anything_is_made(tmp_path, flag):
    with pytest.raises(UserError, match="--" + next(iter(flag)).replace("_", "-")):
        si.main(si.Config(base=str(tmp_path / "gpt.pt"), out=str(tmp_path / "o"), device="cpu", **flag))
    assert not (tmp_path / "o").exists()


def test_the_command_line_ends_with_one_line_for_a_missing_seed_file(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "gpt.pt")
    flags = dict(base=tmp_path / "gpt.pt", seeds=tmp_path / "none.jsonl", out=tmp_path / "o", device="cpu")
    monkeypatch.setattr(sys, "argv", ["self_instruct.py", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))])
    with pytest.raises(SystemExit) as e:
        gpt.run(si.main, si.Config, si.__doc__)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1 and "none.jsonl" in error


# gpt.py: a longer context

def test_sines_are_those_of_the_transformer():
    for T, C in ((7, 8), (5, 6), (4, 5)):
        got = gpt.sines(T, C)
        assert got.shape == (T, C)
        for t in range(T):
            for c in range(C):
                angle = t / 10_000 ** ((c - c % 2) / C)
                assert got[t, c].item() == pytest.approx(0.05 * (math.cos(angle) if c % 2 else math.sin(angle)), abs=1e-6)
    assert torch.equal(gpt.sines(9, 8)[:4], gpt.sines(4, 8)), "a longer table begins as the shorter"


def test_a_longer_context_changes_nothing_of_short_texts():
    model, ids = tiny(block=16), torch.randint(0, ENC.n_vocab, (3, 16), generator=torch.Generator().manual_seed(0))
    before, old = model(ids), model.wpe.weight.data.clone()
    with pytest.raises(UserError, match="longer than the context"):
        model(torch.cat([ids, ids], 1))
    model.lengthen(40)
    assert torch.equal(model(ids), before) and model.config.block_size == 40
    assert torch.equal(model.wpe.weight.data[:16], old) and torch.equal(model.wpe.weight.data[16:], gpt.sines(40, 16)[16:])
    assert model(torch.cat([ids, ids, ids], 1)[:, :40]).shape == (3, 40, ENC.n_vocab)
    long = gpt.generate(model, [ids[0].tolist()], 100, temperature=0)[0]
    assert len(long) == 40 - 16, "the new context can be written to its end"
    model(torch.cat([ids, ids], 1)).sum().backward()
    assert model.wpe.weight.grad[16:32].abs().sum() > 0 and model.wpe.weight.grad[32:].abs().sum() == 0, "new positions learn"


def read_on(tmp_path, **choice):
    text = tmp_path / "t.txt"
    text.write_text("Tom has a cat.\n<|end|>\nThe cat of Tom has a hat.\n<|end|>\n" * 60)
    gpt.main(gpt.Config(data=str(text), out=str(tmp_path / "new"), init=str(tmp_path / "gpt.pt"), device="cpu", batch_tokens=64, val_fraction=0.2, **choice))
    return gpt.load_model(tmp_path / "new" / "gpt.pt")


def test_init_reads_on_from_a_checkpoint_and_may_lengthen_it(tmp_path):
    old = saved(tmp_path / "gpt.pt", block=16)
    before = (tmp_path / "gpt.pt").read_bytes()
    model, _, state = read_on(tmp_path, steps=1, lr=0.0, block_size=24, n_layer=5, n_embd=64)
    assert (model.config.block_size, model.config.n_layer, model.config.n_embd) == (24, 1, 16), "the checkpoint decides the sizes, but for a longer context"
    assert all(torch.equal(v, old.state_dict()[k][:len(v)] if k != "wpe.weight" else torch.cat([old.wpe.weight.data, gpt.sines(24, 16)[16:]]))
               for k, v in model.state_dict().items()), "and every weight"
    assert state["tokenizer"] == "" and (tmp_path / "gpt.pt").read_bytes() == before
    assert read_on(tmp_path, steps=1, lr=0.0, block_size=8)[0].config.block_size == 16, "a context is never cut"
    assert not torch.equal(read_on(tmp_path, steps=2, block_size=16)[0].wte.weight, old.wte.weight), "it learns"


def test_init_of_nothing_is_one_line(tmp_path):
    with pytest.raises(UserError, match="gpt.pt: no such checkpoint"):
        read_on(tmp_path, steps=1)
    (tmp_path / "gpt.pt").write_text("no")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_on(tmp_path, steps=1)
