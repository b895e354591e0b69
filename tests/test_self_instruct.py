"""Properties of self_instruct.py, step by step.

ROUGE-L is compared with its definition, the parsers with strings written by hand. In the steps that
ask a model, FakeAsk stands in for it and answers what the test needs. The last section is about two
things in gpt.py that only self_instruct.py needs: a longer context, and --init.
"""

import functools
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import gpt
import self_instruct as si
import sft
from data import tasks
from data.checkpoint import extend_context
from data.formats import load_chats, load_seed_tasks
from data.words import words
from lab import instruction_quality
from scaffold import cli
from scaffold.cli import BaseConfig, UserError
from tiny import ENC, END, read_jsonl, same_weights, write_jsonl

HEAD = "Come up with a series of tasks:"


def random_gpt(block=64, seed=0):
    """Return a small model whose weights are far from their nearly uniform start."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, block, n_layer=1, n_head=2, n_embd=16))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.eval()


def saved_gpt(path, block=64):
    model = random_gpt(block)
    gpt.save_model(path, model, ENC, "", seed=0, data="")
    return model


def context_of(n):
    """Return a stand-in for a model of which only the context length is asked."""
    return SimpleNamespace(config=SimpleNamespace(block_size=n))


def n_tokens(text):
    return len(ENC.encode_ordinary(text))


class Call(NamedTuple):
    prompts: list
    max_new_tokens: int
    sampling: dict


class FakeAsk:
    """Replaces self_instruct.ask: keeps its calls, and answers respond(prompt, n).

    n counts the prompts of all calls. A response is (string, whether the model stopped by itself).
    """

    def __init__(self, monkeypatch, respond):
        self.respond = respond
        self.calls = []
        monkeypatch.setattr(si, "ask", self)

    def __call__(self, model, enc, prompts, max_new_tokens, **sampling):
        n = sum(len(call.prompts) for call in self.calls)
        self.calls.append(Call(list(prompts), max_new_tokens, sampling))
        return [self.respond(prompt, n + i) for i, prompt in enumerate(prompts)]


# ROUGE-L


def lcs(a, b):
    """Length of the longest common subsequence, by its recursive definition."""

    @functools.lru_cache(None)
    def longest(i, j):
        if i == 0 or j == 0:
            return 0
        if a[i - 1] == b[j - 1]:
            return longest(i - 1, j - 1) + 1
        return max(longest(i - 1, j), longest(i, j - 1))

    return longest(len(a), len(b))


def random_pairs(n, seed=0):
    """Yield n pairs of strings of 0 to 90 words, separated by spaces and punctuation."""
    rng = random.Random(seed)

    def string(vocabulary):
        separator = rng.choice([" ", ", ", "! "])
        return separator.join(rng.choices(vocabulary, k=rng.randint(0, rng.choice([4, 20, 90]))))

    for _ in range(n):
        vocabulary = [f"w{i}" for i in range(rng.choice([2, 5, 30]))]
        yield string(vocabulary), string(vocabulary)


ROUGE_PAIRS = {
    "a prefix": ("testing one two", "testing one", 0.8),
    "one word replaced": ("the cat sat on the mat", "the cat lay on the mat", 10 / 12),
    "reversed": ("a b c d", "d c b a", 0.25),
    "a repeated word": ("a a a", "a", 0.5),
    "Lin's example, in order": ("police killed the gunman", "police kill the gunman", 0.75),
    "Lin's example, reordered": ("police killed the gunman", "the gunman kill police", 0.5),
    "capitals": ("Name two animals.", "name TWO animals", 1.0),
    "an apostrophe separates": ("don't stop", "don t stop", 1.0),
    "an underscore separates": ("snake_case", "snake case", 1.0),
    "digits are letters": ("x1 2y", "x1 2y z", 0.8),
    "both empty": ("", "", 0.0),
    "one empty": ("", "cat", 0.0),
    "punctuation alone": ("... !?", "cat", 0.0),
    "Chinese in English is skipped": ("猫 is cat", "狗 is cat", 1.0),
    "English quotes and dashes": ("“Don’t” — stop…", "don t stop", 1.0),
}
OTHER_LANGUAGES = {
    "Chinese, the same": ("猫和狗", "猫和狗", 1.0),
    "Chinese, one of three characters": ("猫和狗", "猫与鸟", 1 / 3),
    "Chinese, punctuation and spaces": ("写一首诗。", "写 一首诗", 1.0),
    "Chinese, a word longer": ("写一首诗", "请写一首诗", 8 / 9),
    "Chinese with an English word": ("用Python写程序", "用Java写程序", 8 / 10),
    "Chinese, digits are words": ("写3首诗", "写12首诗", 0.75),
    "Japanese, one of nine characters": ("犬の名前を書いて。", "猫の名前を書いて。", 7 / 8),
    "Japanese, katakana": ("データ", "データベース", 6 / 9),
    "Thai": ("เขียนบทกวี", "เขียนบทกวี", 1.0),
    "Korean, words by spaces": ("시를 써 주세요", "글을 써 주세요", 2 / 3),
    "Russian": ("Напиши стих о коте", "напиши СТИХ о собаке", 0.75),
    "Russian, ё is a letter": ("ёлка", "елка", 0.0),
    "German": ("Schreibe ein Gedicht über Käse", "schreibe ein Gedicht über Brot", 0.8),
    "German capitals": ("ÜBER KÄSE", "über Käse", 1.0),
    "French": ("Décris une forêt", "Décris une fête", 2 / 3),
    "an accent is part of a word": ("naïve", "na ve", 0.0),
    "accents written in two ways": ("caf\u00e9", "cafe\u0301", 1.0),
    "Spanish question marks": ("¿Qué es esto?", "qué es esto", 1.0),
    "Greek, final and inner sigma": ("ΣΟΦΟΣ", "σοφος", 1.0),
    "Hindi, vowel signs are part of a word": ("कविता लिखो", "कविता पढ़ो", 0.5),
    "Arabic": ("اكتب قصيدة", "اكتب قصة", 0.5),
    "Hebrew": ("כתוב שיר", "כתוב שיר", 1.0),
}


@pytest.mark.parametrize("a, b, f", ROUGE_PAIRS.values(), ids=ROUGE_PAIRS)
def test_rouge_l_of_known_pairs(a, b, f):
    assert si.rouge_l(a, b) == pytest.approx(f, abs=1e-12)


@pytest.mark.parametrize("a, b, f", OTHER_LANGUAGES.values(), ids=OTHER_LANGUAGES)
def test_rouge_l_in_other_languages(a, b, f):
    """rouge-score sees only a-z and 0-9: it gives 0 to equal Chinese or Russian strings."""
    assert si.rouge_l(a, b) == pytest.approx(f, abs=1e-12)
    assert si.rouge_l(b, a) == pytest.approx(f, abs=1e-12)


def test_no_string_breaks_rouge_l():
    """Any characters give a value from 0 to 1, and 1 for equal strings with a word."""
    rng = random.Random(0)
    ranges = [(0, 0x250), (0x300, 0x700), (0x900, 0x1000), (0x3000, 0x3200), (0x4E00, 0x4F00),
              (0xD800, 0xE000), (0xFE00, 0x11000), (0x1F300, 0x1F700), (0x20000, 0x20100)]
    for _ in range(500):
        a, b = ("".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(12)))
                for _ in range(2))
        assert 0 <= si.rouge_l(a, b) <= 1
        assert si.rouge_l(a, a) == (1 if words(a) else 0)
        assert si.rouge_l(a, b) == si.rouge_l(b, a)
        si.reject_reason(a, [b])


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    for a, b in random_pairs(250):
        x, y = (t.replace(",", " ").replace("!", " ").split() for t in (a, b))
        common = lcs(tuple(x), tuple(y))
        precision = common / max(1, len(y))
        recall = common / max(1, len(x))
        f = 2 * precision * recall / (precision + recall) if common else 0
        assert si.rouge_l(a, b) == pytest.approx(f, abs=1e-12)
        assert si.rouge_l(a, b) == si.rouge_l(b, a)
        assert (si.rouge_l(a, b) == 1) == (x == y != [])


def test_rouge_l_is_what_the_rouge_score_package_computes():
    module = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = module.RougeScorer(["rougeL"], use_stemmer=False)
    rng = random.Random(1)
    asked = [tasks.new_task(rng)["instruction"] for _ in range(60)]
    known = [(a, b) for a, b, _ in ROUGE_PAIRS.values()]
    for a, b in [*random_pairs(150, seed=2), *known, *zip(asked, asked[1:])]:
        f = scorer.score(a, b)["rougeL"].fmeasure
        assert si.rouge_l(a, b) == pytest.approx(f, abs=1e-9), (a, b)


# The filters of instructions


INSTRUCTIONS = {
    "3 words": ("Name two animals.", "short"),
    "4 words": ("Name two more animals.", None),
    "no words": ("", "short"),
    "150 words": ("word " * 150, None),
    "151 words": ("word " * 151, "long"),
    "to draw": ("Draw a cat for me.", "keyword"),
    "a drawer": ("Tell me what a drawer is.", None),
    "an image": ("Describe the image to me.", "keyword"),
    "images with a comma": ("Look at these images, please.", "keyword"),
    "a map in capitals": ("Tell me of the MAP.", "keyword"),
    "a file with a question mark": ("What is in a file?", "keyword"),
    "a profile": ("What is a profile of Tom?", None),
    "graphite": ("Tell me about graphite, please.", None),
    "a plot": ("Write a plot for me.", "keyword"),
    "to go to": ("Go to the mill and sit.", "keyword"),
    "going to": ("He is going to the mill.", None),
    "go tomorrow": ("Let the dog go tomorrow.", None),
    "a program": ("Write a program that counts.", "program"),
    "a programme": ("Write a programme for Tom.", "program"),
    "a program later on": ("Help me write a program today.", None),
    "a quote first": ('"Quoted" is this whole thing.', "first letter"),
    "a dash first": ("- Name two more animals.", "first letter"),
    "an underscore first": ("_Name two more animals.", "first letter"),
    "a digit first": ("3 and 4 make what?", None),
    "Chinese": ("请告诉我猫的名字。", None),
    "Chinese with spaces": ("请 告诉 我 猫 的 名字", None),
    "Chinese, 3 characters": ("写首诗。", "short"),
    "Chinese, 4 characters": ("写一首诗。", None),
    "Chinese, 150 characters": ("诗" * 150 + "。", None),
    "Chinese, 151 characters": ("诗" * 151, "long"),
    "Chinese, a quote first": ("「猫」是什么意思？", "first letter"),
    "Chinese, a full-width digit first": ("３只猫有几条腿？", None),
    "Chinese word in English": ("What is 猫?", "short"),
    "Japanese": ("猫について短い詩を書いてください。", None),
    "Thai": ("เขียนบทกวีเกี่ยวกับแมว", None),
    "Russian": ("Напиши короткий стих о коте.", None),
    "Russian, 3 words": ("Напиши короткий стих.", "short"),
    "Russian, 151 words": ("слово " * 151, "long"),
    "German": ("Übersetze den Satz ins Englische.", None),
    "French": ("Écris un poème sur le chat.", None),
    "Spanish": ("¿Cuántas patas tiene un gato?", None),
    "Spanish, only marks": ("¿¡? a b c", "first letter"),
    "Hindi": ("बिल्ली पर एक कविता लिखो", None),
    "Arabic": ("اكتب قصيدة قصيرة عن القط", None),
    "an emoji first": ("😀 what does this mean?", "first letter"),
}


@pytest.mark.parametrize("instruction, reason", INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_an_instruction_is_rejected_with_its_reason(instruction, reason):
    assert si.reject_reason(instruction, []) == reason


KEYWORDS = "image images graph graphs picture pictures file files map maps draw plot".split()


@pytest.mark.parametrize("word", [*KEYWORDS, "go to"])
def test_a_keyword_is_rejected_as_a_whole_word_only(word):
    assert si.reject_reason(f"Please {word} the cat now", []) == "keyword"
    assert si.reject_reason(f"Now {word.upper()}, please do it", []) == "keyword"
    assert si.reject_reason(f"Please x{word}y the cat now", []) is None


TEN_WORDS = " ".join(f"w{i}" for i in range(10))


def sharing(n):
    """Return ten words of which the first n are those of TEN_WORDS."""
    return " ".join(f"w{i}" if i < n else f"x{i}" for i in range(10))


def test_a_rouge_l_of_exactly_seven_tenths_is_kept():
    assert si.rouge_l(sharing(7), TEN_WORDS) == 0.7
    assert si.reject_reason(sharing(7), [TEN_WORDS]) is None


def test_a_rouge_l_above_seven_tenths_with_any_of_the_pool_is_rejected():
    assert si.reject_reason(sharing(8), []) is None
    assert si.reject_reason(sharing(8), [TEN_WORDS]) == "rouge"
    pool = ["Name two more animals.", TEN_WORDS, "Add 3 and 4."]
    assert si.reject_reason(sharing(8), pool) == "rouge"


@pytest.mark.parametrize("text, near", [
    ("写一首关于小猫的诗。", "写一首关于小狗的诗。"),
    ("猫について短い詩を書いてください。", "犬について短い詩を書いてください。"),
    ("Напиши короткий стих о моём коте.", "Напиши короткий стих о моей коте."),
    ("Schreibe ein kurzes Gedicht über Käse.", "Schreibe ein kurzes Gedicht über Brötchen."),
])
def test_near_copies_are_rejected_in_any_language(text, near):
    assert si.reject_reason(near, [text]) == "rouge"


@pytest.mark.parametrize("text, far", [
    ("写一首关于小猫的诗。", "请告诉我今天的天气怎么样？"),
    ("猫について短い詩を書いてください。", "明日の天気を教えて。"),
    ("Напиши короткий стих о коте.", "Сколько будет два плюс три?"),
    ("Schreibe ein kurzes Gedicht über Käse.", "Übersetze das Wort ins Französische."),
])
def test_new_instructions_are_kept_in_any_language(text, far):
    assert si.reject_reason(far, [text]) is None


@pytest.mark.parametrize("text, reason", [("image of w", "short"), ("an image of w", "keyword")])
def test_the_first_filter_that_refuses_gives_the_reason(text, reason):
    assert si.reject_reason(text, [text]) == reason


# Lists


def test_a_list_prompt_numbers_its_lines_and_joins_broken_ones():
    assert si.list_prompt(["a\nb", " c  d "]) == f"{HEAD}\n1. a b\n2. c d\n3."


def test_what_follows_a_list_prompt_reads_back_to_the_rest_of_the_list():
    rng = random.Random(3)
    for _ in range(50):
        given = [tasks.new_task(rng)["instruction"] for _ in range(rng.randint(2, 12))]
        n = rng.randint(1, len(given) - 1)
        whole = si.list_prompt(given)
        head = si.list_prompt(given[:n])
        assert whole.startswith(head)
        assert whole.endswith(f"\n{len(given) + 1}.")
        assert si.read_list(whole.removeprefix(head)) == given[n:]


LISTS = {
    "three items": (" a b.\n10. c d.\n11.e", ["a b.", "c d.", "e"]),
    "a number inside an item": (" a 3. b", ["a 3. b"]),
    "an indented number": (" a\n 2 of them.\n10 . b", ["a 2 of them.", "b"]),
    "empty items": (" a\n9.\n10. b\n11.", ["a", "b"]),
    "white space": (" a  \t b \n", ["a b"]),
    "nothing": ("", []),
    "line ends alone": ("\n\n", []),
}


@pytest.mark.parametrize("text, items", LISTS.values(), ids=LISTS)
def test_a_list_is_split_at_numbers_at_the_start_of_a_line(text, items):
    assert si.read_list(text) == items


# data/tasks.py writes the pages that the base model reads; self_instruct.py writes the prompts and
# the parsers. Both must use one format.


@pytest.fixture(params=range(20))
def rng(request):
    return random.Random(request.param)


def test_list_prompts_are_the_beginning_of_list_pages(rng):
    page = tasks.list_page(rng)
    assert page.startswith(HEAD)
    shown = si.read_list(page.removeprefix(HEAD))
    assert len(shown) >= 10
    assert page.startswith(si.list_prompt(shown[:8]))


def test_the_blocks_of_example_pages_read_back_to_instances(rng):
    for block in tasks.example_page(rng).split("Task: ")[1:]:
        instruction, _, rest = block.partition("\n")
        ((x, y),) = si.read_instances(rest + "\nTask: the next one\nOutput: no", False)
        assert tasks.audit(instruction, x, y)[:2] == (True, True)


def test_the_blocks_of_label_pages_read_back_to_two_right_instances(rng):
    for block in tasks.label_page(rng).split("\n\n"):
        first, _, rest = block.partition("\n")
        pairs = si.read_instances(rest, True)
        assert len(pairs) == 2
        for x, y in pairs:
            assert tasks.audit(first.removeprefix("Task: "), x, y) == (True, True, True)


def test_kind_pages_ask_as_identify_does(rng):
    page = tasks.kind_page(rng)
    asked = [block.removeprefix("Task: ").split("\n")[0] for block in page.split("\n\n")]
    blocks = []
    for instruction in asked:
        _, topic = tasks.read_instruction(instruction)["op"]
        label = "Yes" if topic in tasks.CLASSIFICATION else "No"
        blocks.append(f"Task: {instruction}\nIs it classification? {label}\n")
    assert page == "\n".join(blocks)


# Instances


INPUT_FIRST = {
    "input and output": ("Input: a cat\nOutput: animal.", [("a cat", "animal.")]),
    "output alone": ("Output: yes", [("", "yes")]),
    "input alone, ended": ("Input: a cat\n", []),
    "input alone": ("Input: a cat", []),
    "nothing": ("", []),
    "nonsense": ("nonsense", []),
    "two": ("Input: a\nOutput: b\nInput: c\nOutput: d", [("a", "b"), ("c", "d")]),
    "two without inputs": ("Output: b\nOutput: d", [("", "b"), ("", "d")]),
    "a second without output": ("Input: a\nOutput: b\nInput: c\nOutp", [("a", "b")]),
    "a next task": ("Input: a\nOutput: b\n\nTask: Add 3 and 4.\nOutput: 7.", [("a", "b")]),
    "a next task alone": ("\nTask: Add 3 and 4.\nOutput: 7.", []),
    "an empty output": ("Input: a\nOutput:", [("a", "")]),
    "a colon in the output": ("Output:  x: y  ", [("", "x: y")]),
    "Output inside a line": ("Input: Output: b", []),
    "Output in the middle": ("The Output: b", []),
    "Input inside an output": ("Input: a\nOutput: Input: b", [("a", "Input: b")]),
}


@pytest.mark.parametrize("text, pairs", INPUT_FIRST.values(), ids=INPUT_FIRST)
def test_instances_with_the_input_first_are_parsed(text, pairs):
    assert si.read_instances(text, label_first=False) == pairs


LABEL_FIRST = {
    "label and input": ("Class label: a.\nInput: x y.", [("x y.", "a.")]),
    "label alone": ("Class label: a.", []),
    "label alone, ended": ("Class label: a.\n", []),
    "nothing": ("", []),
    "nonsense": ("nonsense", []),
    "two": ("Class label: a\nInput: x\nClass label: b\nInput: y", [("x", "a"), ("y", "b")]),
    "a label without input": ("Class label: a\nClass label: b\nInput: y", [("y", "b")]),
    "two inputs": ("Class label: a\nInput: x\nInput: y", []),
    "a cut keyword": ("Class label: a\nInput: x\nClass la", [("x\nClass la", "a")]),
    "an empty input": ("Class label: a\nInput:", [("", "a")]),
    "a next task": (
        "Class label: a\nInput: x\n\nTask: Is it b?\nClass label: b\nInput: y",
        [("x", "a")],
    ),
}


@pytest.mark.parametrize("text, pairs", LABEL_FIRST.values(), ids=LABEL_FIRST)
def test_instances_with_the_label_first_are_parsed(text, pairs):
    assert si.read_instances(text, label_first=True) == pairs


SEVEN = [(str(i), "x") for i in range(7)]
TWO_OUTPUTS = "same input, other output"
INSTANCES = {
    "two": ([("a", "x"), ("b", "y")], [("a", "x"), ("b", "y")], []),
    "none": ([], [], []),
    "one twice": ([("a", "x"), ("a", "x"), ("b", "y")], [("a", "x"), ("b", "y")], []),
    "two outputs": ([("a", "x"), ("a", "y"), ("b", "z")], [], [TWO_OUTPUTS] * 3),
    "two outputs, no input": ([("", "x"), ("", "y")], [("", "x"), ("", "y")], []),
    "two outputs, one empty": ([("a", "x"), ("a", "")], [("a", "x")], ["empty output"]),
    "an empty output": ([("a", "")], [], ["empty output"]),
    "both empty": ([("", "")], [], ["empty output"]),
    "input as output": ([("a", "a")], [], ["input is output"]),
    "colons": ([("a:", "x"), ("b", "y:"), ("c:d", "y")], [("c:d", "y")], ["ends with a colon"] * 2),
    "wide colons": ([("句子：", "x"), ("b", "答案：")], [], ["ends with a colon"] * 2),
    "seven": (SEVEN, SEVEN[:5], ["more than five"] * 2),
    "two outputs of seven": (SEVEN[:6] + [("0", "z")], [], [TWO_OUTPUTS] * 7),
}


@pytest.mark.parametrize("given, kept, reasons", INSTANCES.values(), ids=INSTANCES)
def test_each_instance_is_kept_or_dropped_with_a_reason(given, kept, reasons):
    assert si.keep_instances(given) == (kept, reasons)
    assert len(set(given)) == len(kept) + len(reasons)


# The likelihood filter


def token_probabilities(model, text):
    """Return the probability of each token of the text as the first item of a list."""
    head = ENC.encode_ordinary(f"{HEAD}\n1.")
    ids = ENC.encode_ordinary(f" {text}\n")
    probs = model(torch.tensor([head + ids]))[0].softmax(-1)
    return [probs[len(head) - 1 + n, token].item() for n, token in enumerate(ids)]


@pytest.fixture(scope="module")
def likelihood_case():
    rng = random.Random(7)
    vocabulary = "cat Tom mill red two soup".split()
    texts = ["Name two animals.", "猫 zebra?", "x", "Name two animals."]
    texts += [" ".join(rng.choices(vocabulary, k=rng.randint(1, 6))) for _ in range(30)]
    model = random_gpt(block=48)
    return model, texts, si.least_likely(model, ENC, texts)


def test_least_likely_is_the_smallest_token_probability(likelihood_case):
    model, texts, got = likelihood_case
    places = set()
    for text, p in zip(texts, got):
        probabilities = token_probabilities(model, text)
        least = min(probabilities)
        assert p == pytest.approx(least, rel=1e-4)
        assert 0 < p < 1
        if least == probabilities[0]:
            places.add("first")
        elif least == probabilities[-1]:
            places.add("last")
        else:
            places.add("between")
    assert places == {"first", "between", "last"}, "the least likely token was in every place"


def test_least_likely_does_not_depend_on_the_rest_of_the_batch(likelihood_case):
    model, texts, got = likelihood_case
    assert got[0] == pytest.approx(got[3], rel=1e-6)
    assert si.least_likely(model, ENC, texts, batch=1) == pytest.approx(got, rel=1e-4)
    assert si.least_likely(model, ENC, texts, batch=7) == pytest.approx(got, rel=1e-4)


def test_least_likely_cuts_a_string_that_exceeds_the_context():
    assert si.least_likely(random_gpt(block=48), ENC, ["cat " * 80])[0] > 0


def test_least_likely_of_no_strings_is_empty():
    assert si.least_likely(random_gpt(block=48), ENC, []) == []


# Step 1: grow


def unlike(name):
    """Return an instruction of words that no other has."""
    return f"{name} " + " ".join(f"{name}{c}" for c in "abcd")


SEEDS = [unlike(f"s{i}") for i in range(20)]


def fresh(n):
    return unlike(f"m{n}")


def two_fresh(prompt, n):
    """Continue every list by two instructions that are new."""
    return f" {fresh(2 * n)}\n10. {fresh(2 * n + 1)}", True


class Grown(NamedTuple):
    kept: list
    counts: dict
    rounds: list
    calls: list


def grow(monkeypatch, respond, seed=0, **settings):
    """Run self_instruct.grow: 3 rounds of 4 lists, no likelihood filter unless set."""
    cfg = dict(rounds=3, requests=4, likelihood=0, temperature=0.7, top_p=0.5) | settings
    ask = FakeAsk(monkeypatch, respond)
    rng = random.Random(seed)
    result = si.grow(context_of(400), ENC, list(SEEDS), SimpleNamespace(**cfg), rng)
    return Grown(*result, ask.calls)


def test_new_instructions_are_kept_in_order_and_counted_by_round(monkeypatch):
    grown = grow(monkeypatch, two_fresh)
    assert grown.kept == [fresh(i) for i in range(24)]
    assert grown.counts == {"kept": 24}
    assert grown.rounds == [dict(round=i, pool=20 + 8 * i, tried=8, kept=8) for i in range(3)]


def test_lists_show_8_seeds_first_and_later_6_seeds_and_2_of_its_own_in_any_order(monkeypatch):
    grown = grow(monkeypatch, two_fresh)
    orders = set()
    for number, call in enumerate(grown.calls):
        for prompt in call.prompts:
            shown = si.read_list(prompt.removeprefix(HEAD))
            own = [x for x in shown if x in grown.kept[: 8 * number]]
            assert prompt == si.list_prompt(shown)
            assert len(shown) == 8
            assert len(set(shown)) == 8
            assert len(own) == (0 if number == 0 else 2)
            assert sum(x in SEEDS for x in shown) == 8 - len(own)
            orders.add(tuple(x in own for x in shown))
    assert len(orders) > 3


def test_one_instruction_of_its_own_is_shown_if_there_is_only_one(monkeypatch):
    grown = grow(monkeypatch, lambda prompt, n: (f" {fresh(0)}", True), rounds=2)
    for prompt in grown.calls[1].prompts:
        assert si.read_list(prompt).count(fresh(0)) == 1


def test_a_list_without_an_end_is_dropped_whole(monkeypatch):
    def every_second_ends(prompt, n):
        text, _ = two_fresh(prompt, n)
        return text + "\n11.", n % 2 == 0

    grown = grow(monkeypatch, every_second_ends)
    assert grown.counts == {"kept": 12, "list without end": 12}
    assert grown.kept == [fresh(i) for n in range(0, 12, 2) for i in (2 * n, 2 * n + 1)]
    assert sum(row["kept"] for row in grown.rounds) == 12


def test_every_candidate_is_counted_once_and_a_twin_in_the_same_list_is_rejected(monkeypatch):
    lines = [
        "Too short.",
        "Draw a picture of me.",
        "Write a program that counts.",
        "- no letter at first here",
        SEEDS[3],
        "cat " * 151,
        fresh(0),
        fresh(0),
    ]
    text = " " + "\n10. ".join(lines)
    grown = grow(monkeypatch, lambda prompt, n: (text, n != 5), rounds=2)  # 7 lists of 8 end
    reasons = dict.fromkeys(["short", "keyword", "program", "first letter", "long"], 7)
    rouge = 7 + 7 + 6  # the seed, and of the two twins all but the first
    assert grown.kept == [fresh(0)]
    assert grown.counts == reasons | {"rouge": rouge, "kept": 1, "list without end": 8}
    assert sum(grown.counts.values()) == 8 * len(lines)
    assert [row["tried"] for row in grown.rounds] == [32, 24]
    assert [row["pool"] for row in grown.rounds] == [20, 21]
    assert [row["kept"] for row in grown.rounds] == [1, 0]


def three_lines(prompt, n):
    return f" {fresh(1)}\n10. {fresh(2)}\n11. abc", True


def test_the_likelihood_filter_comes_last_and_keeps_the_threshold_itself(monkeypatch):
    def least_likely(model, enc, texts):
        return [0.009 if x in (fresh(1), "abc") else 0.01 for x in texts]

    monkeypatch.setattr(si, "least_likely", least_likely)
    grown = grow(monkeypatch, three_lines, rounds=1, requests=1, likelihood=0.01)
    assert grown.kept == [fresh(2)]
    assert grown.counts == {"unlikely": 1, "kept": 1, "short": 1}


def test_a_likelihood_of_0_leaves_the_papers_filters_alone(monkeypatch):
    monkeypatch.setattr(si, "least_likely", lambda *args: pytest.fail("was asked"))
    grown = grow(monkeypatch, three_lines, rounds=1, requests=1, likelihood=0)
    assert grown.kept == [fresh(1), fresh(2)]
    assert grown.counts == {"kept": 2, "short": 1}


def one_fresh(prompt, n):
    return f" {fresh(n)}", True


def test_the_lists_are_decided_by_the_seed(monkeypatch):
    one, again, other = (grow(monkeypatch, one_fresh, seed).calls for seed in (1, 1, 2))
    assert one == again
    assert [call.prompts for call in one] != [call.prompts for call in other]


def test_lists_are_sampled_as_set_anew_in_each_round_up_to_the_end_of_the_context(monkeypatch):
    calls = grow(monkeypatch, one_fresh).calls
    for call in calls:
        assert call.sampling["temperature"] == 0.7
        assert call.sampling["top_p"] == 0.5
        assert call.max_new_tokens + max(n_tokens(p) for p in call.prompts) >= 400
    assert len({call.sampling["seed"] for call in calls}) == 3


# Asking the model


PROMPTS = ["Name two", "Name two", "Name two", "Write a letter to Tom and"]


def ask(prompts=PROMPTS, **sampling):
    return si.ask(random_gpt(block=40), ENC, prompts, 12, **sampling)


def test_asking_is_decided_by_the_seed():
    one = ask(temperature=1.0, seed=5)
    assert one == ask(temperature=1.0, seed=5)
    assert one != ask(temperature=1.0, seed=6)


def test_no_batch_repeats_the_draws_of_another():
    results = ask(PROMPTS[:3], batch=1, temperature=1.0, seed=5)
    assert len({text for text, _ in results}) == 3


def test_greedy_responses_do_not_depend_on_the_batch():
    alone = [ask([prompt], temperature=0)[0][0] for prompt in PROMPTS]
    assert [text for text, _ in ask(batch=3, temperature=0)] == alone


def test_asking_tells_which_responses_ended_by_themselves(monkeypatch):
    ids = ENC.encode_ordinary("a cat")
    short = ENC.encode_ordinary("Name two")

    def generate(model, prompts, n, stop, **sampling):
        return [ids + [END] if prompt == short else ids for prompt in prompts]

    monkeypatch.setattr(gpt, "generate", generate)
    assert ask() == [("a cat", True)] * 3 + [("a cat", False)]


def test_lists_that_fill_the_context_are_a_user_error():
    cfg = SimpleNamespace(rounds=3, requests=4, likelihood=0, temperature=0.7, top_p=0.5)
    seeds = [f"Write a letter to Tom about number {i}." for i in range(9)]
    with pytest.raises(UserError, match="context"):
        si.grow(random_gpt(block=64), ENC, seeds, cfg, random.Random(0))


def test_an_instruction_that_fills_the_context_is_a_user_error():
    instruction = "Tell it to Tom. " * 20
    with pytest.raises(UserError, match="context"):
        si.instances(random_gpt(block=64), ENC, [instruction], False, [], 0, random.Random(0))


# Step 2: identify


def village_seeds(n):
    """Return seed tasks as load_seed_tasks gives them."""
    keys = ("instruction", "is_classification", "instances")
    return [{k: seed[k] for k in keys} for seed in tasks.seed_tasks(random.Random(5), n)]


QUESTIONS = [
    "Name two animals. Say it twice.",
    "Is the line happy or sad? " + "Say it to Tom. " * 5,  # the longer one
]


@pytest.fixture(params=[120, 200, 400])
def identified(request, monkeypatch):
    """Return the result of identify, its only call of ask, the seeds and the context length."""
    seeds = village_seeds(78)
    fake = FakeAsk(monkeypatch, lambda prompt, n: (" Yes\nmore" if n == 0 else " No", True))
    model = context_of(request.param)
    result = si.identify(model, ENC, QUESTIONS, seeds, random.Random(0))
    (call,) = fake.calls
    return result, call, seeds, request.param


def test_identify_returns_a_bool_per_instruction(identified):
    result, call, _, _ = identified
    assert result == [True, False]
    assert call.sampling["temperature"] == 0


def test_identify_fills_the_context_with_shots_and_leaves_room_for_the_label(identified):
    _, call, _, block = identified
    for prompt in call.prompts:
        assert n_tokens(prompt) + call.max_new_tokens <= block
    assert n_tokens(call.prompts[1]) + call.max_new_tokens > block - 80


def test_identify_shows_right_labels_yes_and_no_in_turn(identified):
    _, call, seeds, block = identified
    kinds = {seed["instruction"]: seed["is_classification"] for seed in seeds}
    *shots, last = call.prompts[1].split("\n\n")
    assert len(shots) >= (1 if block == 120 else 3)
    assert last == f"Task: {QUESTIONS[1]}\nIs it classification?"
    assert call.prompts[0].startswith("\n\n".join(shots))
    for i, shot in enumerate(shots):
        instruction, label = shot.removeprefix("Task: ").split("\n")
        kind = kinds[instruction]
        assert kind == (i % 2 == 0)
        assert kind == (label == "Is it classification? Yes")


LABELS = {" Yes": True, "Yes": True, "\nYes\n": True} | dict.fromkeys(
    [" No", "", " yes", " Maybe Yes"], False
)


@pytest.mark.parametrize("label, kind", LABELS.items(), ids=map(repr, LABELS))
def test_only_a_yes_at_the_start_is_a_yes(monkeypatch, label, kind):
    FakeAsk(monkeypatch, lambda prompt, n: (label, True))
    asked = ["Name two more animals."]
    seeds = village_seeds(30)
    assert si.identify(context_of(400), ENC, asked, seeds, random.Random(0)) == [kind]


# Step 3: instances


MOODS = ["Which mood is it?", "Name it."]


def one_instance(label_first):
    if label_first:
        return " sad.\nInput: Tom is sad.\n\nTask: x\nOutput: y"
    return "Input: Tom is sad.\nOutput: sad.\n\nTask: x\nOutput: y"


def ask_instances(monkeypatch, label_first, shots, text, ended=True, questions=MOODS, block=400):
    """Return the instances and the only call of ask."""
    fake = FakeAsk(monkeypatch, lambda prompt, n: (text, ended))
    model = context_of(block)
    seeds = village_seeds(78)
    rng = random.Random(1)
    result = si.instances(model, ENC, questions, label_first, seeds, shots, rng)
    (call,) = fake.calls
    return result, call


in_both_orders = pytest.mark.parametrize(
    "label_first", [False, True], ids=["input first", "label first"]
)


@in_both_orders
def test_instances_are_read_from_greedy_responses(monkeypatch, label_first):
    result, call = ask_instances(monkeypatch, label_first, 2, one_instance(label_first))
    assert result == [[("Tom is sad.", "sad.")]] * 2
    assert call.sampling["temperature"] == 0


@in_both_orders
def test_without_shots_the_prompt_is_the_task_alone(monkeypatch, label_first):
    text = one_instance(label_first)
    result, call = ask_instances(monkeypatch, label_first, 0, text, True, MOODS[:1], 150)
    end = "\nClass label:" if label_first else "\n"
    assert call.prompts == [f"Task: {MOODS[0]}{end}"]
    assert result == [[("Tom is sad.", "sad.")]]


@in_both_orders
def test_prompts_share_their_shots_and_leave_room_for_instances(monkeypatch, label_first):
    _, call = ask_instances(monkeypatch, label_first, 2, one_instance(label_first))
    head, _, last = call.prompts[0].rpartition("Task: ")
    end = "\nClass label:" if label_first else "\n"
    assert last == MOODS[0] + end
    assert call.prompts[1] == f"{head}Task: {MOODS[1]}{end}"
    assert call.max_new_tokens > 0
    for prompt in call.prompts:
        assert n_tokens(prompt) + call.max_new_tokens <= 400


@in_both_orders
def test_shots_are_seeds_of_the_same_kind_and_read_back(monkeypatch, label_first):
    _, call = ask_instances(monkeypatch, label_first, 2, one_instance(label_first))
    head, _, _ = call.prompts[0].rpartition("Task: ")
    seeds = village_seeds(78)
    *shots, rest = head.split("\n\n")
    assert rest == ""
    assert len(shots) == 2
    for shot in shots:
        instruction, _, written = shot.removeprefix("Task: ").partition("\n")
        seed = next(s for s in seeds if s["instruction"] == instruction)
        pairs = [(i["input"], i["output"]) for i in seed["instances"]]
        assert seed["is_classification"] == label_first
        assert si.read_instances(written, label_first) == pairs
        assert ("Class label:" in written) == label_first


ENDS = {
    "ended": ("", True, 2),
    "cut off": ("", False, 1),
    "cut off in the next task": ("\n\nTask: x", False, 2),
}


@in_both_orders
@pytest.mark.parametrize("more, ended, n_kept", ENDS.values(), ids=ENDS)
def test_the_last_instance_is_dropped_if_it_was_cut_off(
    monkeypatch, label_first, more, ended, n_kept
):
    text = "Input: Tom is sad.\nOutput: sad.\nInput: Ann\nOutput: happy."
    if label_first:
        text = " sad.\nInput: Tom is sad.\nClass label: happy.\nInput: Ann"
    result, _ = ask_instances(monkeypatch, label_first, 0, text + more, ended, MOODS[:1])
    assert result == [[("Tom is sad.", "sad."), ("Ann", "happy.")][:n_kept]]


# Seed tasks and records


GOOD = {
    "instruction": "Name two more animals.",
    "instances": [{"input": "", "output": "cat and dog."}],
    "is_classification": False,
}


def test_seeds_are_read_in_the_papers_format(tmp_path):
    in_paper = {
        "id": "seed_task_0",
        "name": "x",
        "instruction": "Is it?",
        "instances": [{"input": "猫", "output": "yes"}, {"output": "no"}],
        "is_classification": True,
    }
    seeds = load_seed_tasks(write_jsonl(tmp_path / "s.jsonl", *[GOOD] * 7, in_paper))
    assert seeds[:7] == [GOOD] * 7
    assert seeds[7] == {
        "instruction": "Is it?",
        "instances": [{"input": "猫", "output": "yes"}, {"input": "", "output": "no"}],
        "is_classification": True,
    }


BAD_SEEDS = {
    "no instruction": {"instances": []},
    "instruction a number": {"instruction": 3, "instances": []},
    "no instances": {"instruction": "x"},
    "instances not a list": {"instruction": "x", "instances": {}},
    "instance a string": {"instruction": "x", "instances": ["y"]},
    "no output": {"instruction": "x", "instances": [{"input": "y"}]},
    "output a number": {"instruction": "x", "instances": [{"output": 3}]},
    "input a number": {"instruction": "x", "instances": [{"input": 3, "output": "y"}]},
}


@pytest.mark.parametrize("bad", BAD_SEEDS.values(), ids=BAD_SEEDS)
def test_a_bad_seed_is_one_line_with_its_place(tmp_path, bad):
    path = write_jsonl(tmp_path / "s.jsonl", *[GOOD] * 8, bad)
    with pytest.raises(UserError, match=r"s\.jsonl:9: expected") as e:
        load_seed_tasks(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("n, message", [(7, "7 seed tasks"), (0, "no records")])
def test_fewer_than_8_seeds_are_a_user_error(tmp_path, n, message):
    with pytest.raises(UserError, match=message):
        load_seed_tasks(write_jsonl(tmp_path / "s.jsonl", *[GOOD] * n))


def test_a_missing_seed_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        load_seed_tasks(tmp_path / "none.jsonl")


def test_records_are_alpaca_records_one_per_instance():
    two = [{"input": "a", "output": "b"}, {"input": "", "output": "c"}]
    made = [
        {"instruction": "I", "is_classification": True, "instances": two},
        {"instruction": "J", "instances": []},
    ]
    assert si.as_records(made) == [
        {"instruction": "I", "input": "a", "output": "b"},
        {"instruction": "I", "input": "", "output": "c"},
    ]


# Step 5: fine-tune


RECORDS = [
    {"instruction": f"Name {n} animals.", "input": x, "output": "cat and dog."}
    for n in ("two", "three", "four")
    for x in ("", "Tom has 牛.")
]


def encoded(record, rng):
    """Return ids, mask, and the two strings where the mask is 0 and 1."""
    ids, mask = (t.tolist() for t in si.encode(record, ENC, rng))
    prompt = ENC.decode([i for i, m in zip(ids, mask) if m == 0])
    response = ENC.decode([i for i, m in zip(ids, mask) if m == 1])
    return ids, mask, prompt, response


def test_the_loss_falls_on_the_output_and_its_end():
    rng = random.Random(6)
    for record in RECORDS * 40:
        ids, mask, prompt, response = encoded(record, rng)
        assert len(ids) == len(mask)
        assert sorted(mask) == mask, "the response comes last"
        assert ids[-1] == END
        assert response.lstrip() == "cat and dog.<|end|>"
        assert "cat" not in prompt


def test_a_space_or_a_line_end_separates_prompt_and_output():
    rng = random.Random(6)
    for record in RECORDS * 40:
        _, _, prompt, response = encoded(record, rng)
        assert response.startswith(" ") == (not prompt.endswith("\n"))


def test_every_template_is_drawn_and_filled():
    rng = random.Random(6)
    layouts = {"with": set(), "without": set()}
    for record in RECORDS * 40:
        _, _, prompt, _ = encoded(record, rng)
        assert record["instruction"] in prompt
        assert record["input"] in prompt
        assert "{" not in prompt
        layout = prompt.replace(record["instruction"], "I")
        if record["input"]:
            layouts["with"].add(layout.replace(record["input"], "X"))
        else:
            layouts["without"].add(layout)
    assert len(layouts["with"]) == len(set(si.WITH_INPUT)) > 2
    assert len(layouts["without"]) == len(set(si.WITHOUT_INPUT)) > 2


def test_braces_in_a_record_are_only_text():
    record = {"instruction": "Mend this.", "input": "Dear {instruction}, {input}!", "output": "x"}
    for seed in range(9):
        assert "Dear {instruction}, {input}!" in si.prompt_of(record, random.Random(seed))


def fine_tune(tmp_path, val_score, **settings):
    cfg = SimpleNamespace(**dict(seed=0, lr=1e-2, steps=10, batch_tokens=60) | settings)
    return si.fine_tune(tmp_path / "gpt.pt", "cpu", RECORDS, val_score, cfg)


class Scores:
    """Scores models from a list, and keeps a copy of their weights."""

    def __init__(self, scores):
        self.scores = iter(scores)
        self.weights = []

    def __call__(self, model):
        assert not model.training
        self.weights.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(self.scores)


def test_fine_tuning_returns_the_first_of_the_best_checkpoints(tmp_path):
    base = saved_gpt(tmp_path / "gpt.pt", block=32)
    scores = Scores([1.0, 3.0, 2.0, 3.0, 0.0])
    model = fine_tune(tmp_path, scores)
    assert not model.training
    assert len(scores.weights) == 5
    assert same_weights(scores.weights[1], model.state_dict())
    assert not same_weights(scores.weights[0], scores.weights[1])
    assert not same_weights(base.state_dict(), scores.weights[0])


def test_fine_tuning_leaves_the_base_model_alone(tmp_path):
    saved_gpt(tmp_path / "gpt.pt", block=32)
    before = (tmp_path / "gpt.pt").read_bytes()
    fine_tune(tmp_path, Scores([0.0] * 5))
    assert (tmp_path / "gpt.pt").read_bytes() == before


@pytest.mark.parametrize("steps", [1, 4])
def test_with_fewer_than_5_steps_each_step_is_a_checkpoint(tmp_path, steps):
    saved_gpt(tmp_path / "gpt.pt", block=32)
    scores = Scores([0.0] * 9)
    fine_tune(tmp_path, scores, steps=steps)
    assert len(scores.weights) == steps


def loss_of(model):
    torch.manual_seed(0)
    examples = [si.encode(record, ENC, random.Random(0)) for record in RECORDS]
    ids, mask = sft.collate(examples, range(len(RECORDS)))
    return sft.response_loss(model(ids), ids, mask).item()


def test_fine_tuning_learns_the_records(tmp_path):
    base = saved_gpt(tmp_path / "gpt.pt", block=32)
    model = fine_tune(tmp_path, lambda m: 1 / (1 + loss_of(m)), steps=20, batch_tokens=300)
    assert loss_of(model) < 0.6 * loss_of(base)


# The base model


@pytest.fixture
def pretraining(tmp_path, monkeypatch):
    """Replace gpt.main by one that writes an empty checkpoint; return the list of its configs."""
    runs = []

    def main(cfg):
        runs.append(cfg)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        (Path(cfg.out) / "gpt.pt").write_text("weights")

    monkeypatch.setattr(gpt, "main", main)
    monkeypatch.setattr(
        tasks, "ensure", lambda folder, seed: (folder / "pages").mkdir(parents=True)
    )
    return runs


def long_base(out):
    return si.long_base(BaseConfig(out=str(out), seed=7, device="cpu"))


def test_a_missing_base_is_pretrained_and_then_trained_on_pages(tmp_path, pretraining, capsys):
    out = tmp_path / "o"
    assert long_base(out) == out / "long" / "gpt.pt"
    first, second = pretraining
    assert (first.out, first.init) == (str(out), "")
    assert (second.out, second.init) == (str(out / "long"), str(out / "gpt.pt"))
    assert second.data == str(out / "data" / "pages")
    assert Path(second.data).is_dir()
    assert second.block_size > 128
    for cfg in pretraining:
        assert (cfg.seed, cfg.device) == (7, "cpu")
    assert "missing" in capsys.readouterr().out


def test_a_base_that_is_there_is_used_without_a_word(tmp_path, pretraining, capsys):
    long_base(tmp_path / "o")
    capsys.readouterr()
    long_base(tmp_path / "o")
    assert len(pretraining) == 2
    assert capsys.readouterr().out == ""


def test_only_what_is_missing_of_the_base_is_made(tmp_path, pretraining):
    long_base(tmp_path / "o")
    (tmp_path / "o" / "long" / "gpt.pt").unlink()
    (tmp_path / "o" / "data" / "pages").rmdir()
    long_base(tmp_path / "o")
    assert len(pretraining) == 3
    assert pretraining[2].init


# A whole run


def village_model(prompt, n):
    """Respond as a model that knows the village.

    Every seventh list has no end, and every tenth task has no instance.
    """
    rng = random.Random(prompt)
    if prompt.startswith("Come up"):
        lines = [tasks.new_task(rng)["instruction"] for _ in range(4)]
        return " " + "\n10. ".join(lines), n % 7 != 0
    asked = prompt.rpartition("Task: ")[2].split("\n")[0]
    read = tasks.read_instruction(asked)
    if prompt.endswith("classification?"):
        return (" Yes" if read["op"][1] in tasks.CLASSIFICATION else " No"), True
    task = tasks.new_task(rng, op=read["op"], half="plain")
    if prompt.endswith("Class label:"):
        return f" {tasks.ideal(task, rng)}\nInput: {task['input']}\n", True
    if n % 10 == 0:
        return "nothing", True
    x = f"Input: {task['input']}\n" if task["input"] else ""
    output = tasks.ideal(tasks.read_input(read, task["input"]) or task, rng)
    return f"{x}Output: {output}\n\nTask: next", True


def config(tmp_path, name="o", **settings):
    settings = dict(rounds=2, requests=6, likelihood=0, device="cpu") | settings
    return si.Config(base=str(tmp_path / "gpt.pt"), out=str(tmp_path / name), **settings)


def run(tmp_path, monkeypatch, name="o", **settings):
    FakeAsk(monkeypatch, village_model)
    si.main(config(tmp_path, name, **settings))
    return tmp_path / name


@pytest.fixture
def own_seeds(tmp_path, monkeypatch):
    """A base model, and a file of seeds; no run on it may ask the village for grades."""
    saved_gpt(tmp_path / "gpt.pt")
    monkeypatch.setattr(instruction_quality, "audit", lambda *args: pytest.fail("audited"))
    monkeypatch.setattr(instruction_quality, "worth", lambda *args: pytest.fail("graded"))
    return str(write_jsonl(tmp_path / "mine.jsonl", *tasks.seed_tasks(random.Random(0), 60)))


def test_a_run_is_decided_by_its_seed(tmp_path, monkeypatch, own_seeds):
    def files(name, seed):
        out = run(tmp_path, monkeypatch, name, seeds=own_seeds, seed=seed)
        names = ("tasks.jsonl", "sft.jsonl")
        return [(out / "self_instruct" / name).read_bytes() for name in names]

    one = files("a", seed=1)
    assert one == files("b", seed=1)
    assert one != files("c", seed=2)


def test_a_run_on_seeds_of_your_own_writes_tasks_and_chats(
    tmp_path, monkeypatch, own_seeds, capsys
):
    out = run(tmp_path, monkeypatch, seeds=own_seeds, seed=1)
    made = read_jsonl(out / "self_instruct" / "tasks.jsonl")
    assert len(made) > 10
    assert read_jsonl(out / "self_instruct" / "sft.jsonl") == si.as_records(made)
    assert load_chats(out / "self_instruct" / "sft.jsonl")
    for task in made:
        _, topic = tasks.read_instruction(task["instruction"])["op"]
        assert task["is_classification"] == (topic in tasks.CLASSIFICATION)
    assert not list(tmp_path.rglob("*.part"))
    assert not (out / "data").exists()
    assert str(out / "self_instruct" / "tasks.jsonl") in capsys.readouterr().out


def test_a_run_logs_what_became_of_every_candidate(tmp_path, monkeypatch, own_seeds):
    out = run(tmp_path, monkeypatch, seeds=own_seeds, seed=1)
    made = read_jsonl(out / "self_instruct" / "tasks.jsonl")
    rows = {row["row"]: row for row in read_jsonl(out / "self_instruct.jsonl")}
    growth = rows["growth"]
    without_instance = sum(not task["instances"] for task in made)
    assert growth["candidates"]["kept"] == len(made)
    assert growth["candidates"]["list without end"] == 8
    assert sum(growth["candidates"].values()) == 2 * 6 * 4
    assert growth["instances"]["no instance"] == without_instance > 0
    assert sum(rows["diversity"]["histogram"]) == len(made)


def test_a_run_on_the_village_is_audited(tmp_path, monkeypatch):
    saved_gpt(tmp_path / "gpt.pt")
    (tmp_path / "o" / "data").mkdir(parents=True)
    small = functools.partial(tasks.write_pages, megabytes=0.03)
    monkeypatch.setattr(tasks, "write_pages", small)
    monkeypatch.setattr(instruction_quality, "worth", lambda *args: [])
    out = run(tmp_path, monkeypatch)
    made = read_jsonl(out / "self_instruct" / "tasks.jsonl")
    (row,) = [r for r in read_jsonl(out / "self_instruct.jsonl") if "unseen_pairs" in r]
    assert instruction_quality.audit(made, tasks).items() <= row.items()
    assert row["valid"] == 1
    assert row["tasks"] == len(made)
    assert 0 < row["with_instance"] <= len(made)


def test_a_model_that_writes_no_list_is_a_user_error(tmp_path, monkeypatch):
    saved_gpt(tmp_path / "gpt.pt")
    seeds = str(write_jsonl(tmp_path / "mine.jsonl", *[GOOD] * 9))
    FakeAsk(monkeypatch, lambda prompt, n: (" no.", True))
    with pytest.raises(UserError, match="no usable instruction.*short"):
        si.main(config(tmp_path, seeds=seeds, rounds=1, requests=2))


@pytest.mark.parametrize(
    "name, value",
    [("rounds", 0), ("requests", 0), ("top_p", 1.5), ("likelihood", -1.0), ("temperature", -1.0)],
)
def test_a_setting_out_of_bounds_is_refused_before_anything_is_made(tmp_path, name, value):
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        si.main(config(tmp_path, **{name: value}))
    assert not (tmp_path / "o").exists()


def test_the_command_line_ends_with_one_line_for_a_missing_seed_file(tmp_path, monkeypatch, capsys):
    saved_gpt(tmp_path / "gpt.pt")
    flags = ["--base", tmp_path / "gpt.pt", "--seeds", tmp_path / "none.jsonl"]
    flags += ["--out", tmp_path / "o", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["self_instruct.py", *map(str, flags)])
    with pytest.raises(SystemExit) as e:
        cli.start(si.main, si.Config, si.__doc__)
    error = capsys.readouterr().err
    assert e.value.code == 2
    assert error.count("\n") == 1
    assert "none.jsonl" in error


# gpt.py: a longer context


@pytest.mark.parametrize("T, C", [(7, 8), (5, 6), (4, 5)])
def test_new_positions_are_the_transformers_sinusoids(T, C):
    table = gpt.sinusoids(T, C)
    assert table.shape == (T, C)
    for t in range(T):
        for c in range(C):
            angle = t / 10_000 ** ((c - c % 2) / C)
            wave = math.cos(angle) if c % 2 else math.sin(angle)
            assert table[t, c].item() == pytest.approx(0.05 * wave, abs=1e-6)


def test_a_longer_table_of_sinusoids_begins_as_the_shorter():
    assert torch.equal(gpt.sinusoids(9, 8)[:4], gpt.sinusoids(4, 8))


@pytest.fixture
def ids():
    return torch.randint(0, ENC.n_vocab, (3, 16), generator=torch.Generator().manual_seed(0))


def test_a_string_longer_than_the_context_is_a_user_error(ids):
    with pytest.raises(UserError, match="longer than the context"):
        random_gpt(block=16)(torch.cat([ids, ids], 1))


def test_a_longer_context_changes_nothing_for_short_strings(ids):
    model = random_gpt(block=16)
    before = model(ids)
    positions = model.wpe.weight.data.clone()
    extend_context(model, gpt.sinusoids(40, 16))
    assert model.config.block_size == 40
    assert torch.equal(model(ids), before)
    assert torch.equal(model.wpe.weight.data[:16], positions)
    assert torch.equal(model.wpe.weight.data[16:], gpt.sinusoids(40, 16)[16:])


def test_a_longer_context_can_be_read_and_written_to_its_end(ids):
    model = random_gpt(block=16)
    extend_context(model, gpt.sinusoids(40, 16))
    assert model(torch.cat([ids, ids, ids], 1)[:, :40]).shape == (3, 40, ENC.n_vocab)
    assert len(gpt.generate(model, [ids[0].tolist()], 100, temperature=0)[0]) == 40 - 16


def test_the_new_positions_learn(ids):
    model = random_gpt(block=16)
    extend_context(model, gpt.sinusoids(40, 16))
    model(torch.cat([ids, ids], 1)).sum().backward()
    assert model.wpe.weight.grad[16:32].abs().sum() > 0
    assert model.wpe.weight.grad[32:].abs().sum() == 0


# gpt.py: --init


def train_further(tmp_path, **settings):
    text = tmp_path / "t.txt"
    text.write_text("Tom has a cat.\n<|end|>\nThe cat of Tom has a hat.\n<|end|>\n" * 60)
    settings = dict(device="cpu", batch_tokens=64, val_fraction=0.2) | settings
    init = str(tmp_path / "gpt.pt")
    out = tmp_path / "new"
    gpt.main(gpt.Config(data=str(text), out=str(out), init=init, **settings))
    return gpt.load_model(out / "gpt.pt")


def test_init_keeps_the_weights_and_sizes_of_the_checkpoint_and_lengthens_it(tmp_path):
    old = saved_gpt(tmp_path / "gpt.pt", block=16)
    before = (tmp_path / "gpt.pt").read_bytes()
    model, _, state = train_further(tmp_path, steps=1, lr=0.0, block_size=24, n_layer=5, n_embd=64)
    expected = old.state_dict()
    expected["wpe.weight"] = torch.cat([old.wpe.weight.data, gpt.sinusoids(24, 16)[16:]])
    assert model.config.block_size == 24
    assert model.config.n_layer == 1
    assert model.config.n_embd == 16
    assert same_weights(model.state_dict(), expected)
    assert state["tokenizer"] == ""
    assert (tmp_path / "gpt.pt").read_bytes() == before


def test_init_never_cuts_the_context(tmp_path):
    saved_gpt(tmp_path / "gpt.pt", block=16)
    model, _, _ = train_further(tmp_path, steps=1, lr=0.0, block_size=8)
    assert model.config.block_size == 16


def test_a_model_from_init_learns(tmp_path):
    old = saved_gpt(tmp_path / "gpt.pt", block=16)
    model, _, _ = train_further(tmp_path, steps=2, block_size=16)
    assert not torch.equal(model.wte.weight, old.wte.weight)


def test_init_of_a_missing_checkpoint_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="gpt.pt: no such checkpoint"):
        train_further(tmp_path, steps=1)


def test_init_of_a_damaged_checkpoint_is_a_user_error(tmp_path):
    (tmp_path / "gpt.pt").write_text("no")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        train_further(tmp_path, steps=1)
