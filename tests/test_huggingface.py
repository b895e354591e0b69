"""Tests of data/huggingface.py: GPT-2 weights in Hugging Face's layout, in and out."""

import base64
import json
import math
import random
import re
import subprocess
import sys

import pytest
import tiktoken
import torch
import torch.nn.functional as F

import gpt
from data import huggingface
from data.checkpoint import add_special_tokens
from data.tokenizer import EMBEDDED, PROBE, SPECIAL, get_tokenizer
from scaffold.cli import UserError
from tiny import (
    END, ENC, ROOT, assert_close, random_gpt, random_ids, same_weights, save_reward, tiny_reward
)


def hugging_face_gpt2(w, config, ids):
    """Compute GPT-2's logits from the two files alone, as transformers does: (B, T) -> (B, T, V).

    Its Conv1D is x @ w + b with w (in, out).
    """
    eps = config["layer_norm_epsilon"]

    def layer_norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    def conv1d(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    T = ids.shape[1]
    future = torch.ones(T, T).tril() == 0
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]  # (B, T, C)
    for layer in range(config["n_layer"]):
        p = f"transformer.h.{layer}."
        qkv = conv1d(layer_norm(x, p + "ln_1"), p + "attn.c_attn").chunk(3, -1)
        q, k, v = (y.unflatten(-1, (config["n_head"], -1)).transpose(1, 2) for y in qkv)
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, T)
        attention = scores.masked_fill(future, -math.inf).softmax(-1)
        mixed = (attention @ v).transpose(1, 2).flatten(2)  # (B, T, C)
        x = x + conv1d(mixed, p + "attn.c_proj")
        hidden = gelu(conv1d(layer_norm(x, p + "ln_2"), p + "mlp.c_fc"))
        x = x + conv1d(hidden, p + "mlp.c_proj")
    return layer_norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def names_of_gpt2(n_layer):
    """The names of all weights in Hugging Face's file."""
    layers = ["ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    modules = ["ln_f"] + [f"h.{i}.{name}" for i in range(n_layer) for name in layers]
    names = {f"transformer.{m}.{kind}" for m in modules for kind in ("weight", "bias")}
    return names | {"lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"}


def test_the_saved_files_are_gpt_2_in_hugging_faces_names(tmp_path):
    model = random_gpt(dtype=torch.float32)
    ids = torch.tensor(random_ids([20, 20]))
    model.save_pretrained(tmp_path)
    w = torch.load(tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(w) == names_of_gpt2(n_layer=2)
    shapes = {k.removeprefix("transformer.h.0."): tuple(v.shape) for k, v in w.items()}
    assert shapes["attn.c_attn.weight"] == (32, 96)
    assert shapes["mlp.c_fc.weight"] == (32, 128)
    assert shapes["mlp.c_proj.weight"] == (128, 32)
    want = dict(
        model_type="gpt2",
        activation_function="gelu_new",
        vocab_size=50,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
    )
    assert {k: config[k] for k in want} == want
    assert_close(hugging_face_gpt2(w, config, ids), model(ids).detach(), 1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_saved_model_comes_back(tmp_path, bias):
    model = random_gpt(dtype=torch.float32, bias=bias)
    ids = torch.tensor(random_ids([20, 20]))
    model.save_pretrained(tmp_path)
    assert_close(gpt.GPT.from_pretrained(tmp_path).eval()(ids), model(ids), 1e-6)


def test_the_layout_of_the_hub_is_read(tmp_path):
    """gpt2's own file has no "transformer." before the names and no lm_head, but causal masks."""
    model = random_gpt(dtype=torch.float32)
    ids = torch.tensor(random_ids([20]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    w = torch.load(path)
    del w["lm_head.weight"]
    w = {k.removeprefix("transformer."): v for k, v in w.items()}
    torch.save(w | {"h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()}, path)
    assert torch.equal(gpt.GPT.from_pretrained(tmp_path).eval()(ids), model(ids))


def test_tensors_that_a_model_has_no_place_for_are_skipped(tmp_path):
    """Such as the layers of a deeper model, or a head of another task."""
    model = random_gpt(dtype=torch.float32, n_layer=3)
    ids = torch.tensor(random_ids([20]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(torch.load(path) | {"score.weight": torch.ones(2, 32)}, path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"n_layer": 3', '"n_layer": 2'))
    shallow = gpt.GPT.from_pretrained(tmp_path).eval()
    del model.h[2]
    assert torch.equal(shallow(ids), model(ids))


VARIANTS = [  # settings of config.json with which the same weights give other logits
    ("activation_function", "relu"),
    ("activation_function", "gelu"),
    ("activation_function", ["gelu_new"]),
    ("layer_norm_epsilon", 1e-2),
    ("layer_norm_epsilon", 1e-6),
    ("layer_norm_epsilon", None),
    ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True),
    ("model_type", "imagegpt"),
]


def set_in_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("key, value", VARIANTS)
def test_a_variant_that_we_do_not_compute_is_refused_by_name(tmp_path, key, value):
    random_gpt(dtype=torch.float32).save_pretrained(tmp_path)
    set_in_config(tmp_path, **{key: value})
    with pytest.raises(UserError) as e:
        gpt.GPT.from_pretrained(tmp_path)
    assert f"config.json: {key} is {value!r}, but" in str(e.value)
    assert "\n" not in str(e.value)


SAME = [
    {"activation_function": "gelu_pytorch_tanh"},
    {"layer_norm_epsilon": 0.00001},
    {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    {"reorder_and_upcast_attn": True, "summary_type": "cls_index", "resid_pdrop": 0.1},
]


@pytest.mark.parametrize("settings", SAME)
def test_settings_that_change_no_logit_are_read(tmp_path, settings):
    model = random_gpt(dtype=torch.float32)
    ids = torch.tensor(random_ids([20]))
    model.save_pretrained(tmp_path)
    set_in_config(tmp_path, **settings)
    assert torch.equal(gpt.GPT.from_pretrained(tmp_path).eval()(ids), model(ids))


def test_a_setting_that_is_missing_has_the_value_of_gpt_2(tmp_path):
    random_gpt(dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    sizes = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    path.write_text(json.dumps({key: raw[key] for key in sizes}))
    gpt.GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [lambda w: w + 0.1, lambda w: w[:-1], lambda w: w[:, :-1]])
def test_an_output_layer_of_its_own_is_refused_by_name(tmp_path, change):
    random_gpt(dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    w = torch.load(path)
    torch.save(w | {"lm_head.weight": change(w["lm_head.weight"])}, path)
    with pytest.raises(UserError, match="lm_head.weight differs from wte.weight"):
        gpt.GPT.from_pretrained(tmp_path)


DAMAGES = [
    "no folder",
    "no config",
    "no weights",
    "broken config",
    "config of another model",
    "a weight is missing",
    "other sizes",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named(tmp_path, damage):
    folder = tmp_path / "gpt2"
    if damage != "no folder":
        random_gpt(dtype=torch.float32).save_pretrained(folder)
    config = folder / "config.json"
    weights = folder / "pytorch_model.bin"
    if damage == "no config":
        config.unlink()
    if damage == "no weights":
        weights.unlink()
    if damage == "broken config":
        config.write_text(config.read_text()[:40])
    if damage == "config of another model":
        config.write_text('{"model_type": "llama", "hidden_size": 32}')
    if damage == "a weight is missing":
        torch.save({k: v for k, v in torch.load(weights).items() if "h.1." not in k}, weights)
    if damage == "other sizes":
        config.write_text(config.read_text().replace('"n_embd": 32', '"n_embd": 64'))
    with pytest.raises(UserError, match="gpt2"):
        gpt.GPT.from_pretrained(folder)


# Weights of other types, and in several files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision_are_read_as_fp32(tmp_path, dtype):
    model = random_gpt(dtype=torch.float32)
    ids = torch.tensor(random_ids([20]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    w = {name: tensor.to(dtype) for name, tensor in torch.load(path).items()}
    torch.save(w, path)
    set_in_config(tmp_path, torch_dtype=str(dtype).removeprefix("torch."))
    read = gpt.GPT.from_pretrained(tmp_path).eval()
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    assert torch.equal(read.wte.weight, model.wte.weight.to(dtype).float())
    assert same_weights(read, model.to(dtype).float())
    assert read(ids).dtype == torch.float32


def split_weights(folder, n=3):
    """Write the weights of a folder as n files and an index, as transformers does with large ones.

    Returns the index.
    """
    weights = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    where = {}
    for i in range(n):
        name = f"pytorch_model-{i + 1:05d}-of-{n:05d}.bin"
        part = dict(list(weights.items())[i::n])
        torch.save(part, folder / name)
        where |= dict.fromkeys(part, name)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def test_weights_in_several_files_are_read(tmp_path):
    model = random_gpt(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    split_weights(tmp_path)
    assert same_weights(gpt.GPT.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("content", [
    "{", "[]", "5", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": []}}',
    '{"weight_map": {"a": "../gpt.bin"}}', '{"weight_map": {"a": "gone.bin"}}',
    '{"weight_map": {}}', "[" * 100_000,
])
def test_a_damaged_index_is_named(tmp_path, content):
    folder = tmp_path / "gpt2"
    random_gpt(dtype=torch.float32).save_pretrained(folder)
    split_weights(folder).write_text(content)
    with pytest.raises(UserError, match="gpt2") as e:
        gpt.GPT.from_pretrained(folder)
    assert "\n" not in str(e.value)


# Padded vocabularies


@pytest.mark.parametrize("size", [320, 384])
def test_the_padding_of_a_vocabulary_is_dropped(tmp_path, theirs, capsys, size):
    """The special tokens start at the mean of the real rows, not as rows of padding."""
    model = random_gpt(vocab=size, dtype=torch.float32)
    old = model.wte.weight.detach().clone()
    add_special_tokens(model, get_tokenizer("theirs"), tmp_path)
    assert model.config.vocab_size == 262
    assert torch.equal(model.wte.weight[:257], old[:257])
    assert_close(model.wte.weight[257:], old[:257].mean(0).expand(5, -1), 1e-6)
    assert model(torch.tensor([[261]])).shape == (1, 1, 262)
    assert f"the last {size - 257} of {size} tokens are padding" in capsys.readouterr().out


def test_gpt_2_of_50304_tokens_is_gpt_2(tmp_path, capsys):
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b"%06d" % i: i for i in range(256, 50256)}
    special = {name: 50256 + i for i, name in enumerate(["<|endoftext|>", *SPECIAL])}
    enc = tiktoken.Encoding("gpt2", pat_str=r"(?s:.)", mergeable_ranks=ranks,
                            special_tokens=special)
    for size in (50304, 50432, 51200):
        model = random_gpt(vocab=size, dtype=torch.float32, n_embd=4, n_layer=1)
        old = model.wte.weight.detach().clone()
        add_special_tokens(model, enc, tmp_path)
        assert model.config.vocab_size == 50262
        assert torch.equal(model.wte.weight[:50257], old[:50257])
    for size in (50256, 50263, 50300, 51264, 52000):
        with pytest.raises(UserError, match=f"{size} tokens"):
            add_special_tokens(random_gpt(vocab=size, n_embd=4, n_layer=1), enc, tmp_path)


def test_our_tokens_survive_the_padding_of_another_program(tmp_path, theirs, capsys):
    """transformers pads an exported model: its tokenizer.json says that rows 257 to 261 count."""
    enc = get_tokenizer("theirs")
    model = random_gpt(vocab=262, dtype=torch.float32)
    huggingface.export(model, enc, tmp_path / "hub")
    old = model.wte.weight.detach().clone()
    model.wte.weight.data = torch.cat([old, torch.ones(58, 32)])
    model.config.vocab_size = 320
    add_special_tokens(model, enc, tmp_path / "hub")
    assert torch.equal(model.wte.weight, old)


# Export


def exported(folder, model=None, enc=ENC):
    """Export a model -> the contents of tokenizer.json."""
    model = model or random_gpt(vocab=enc.n_vocab, dtype=torch.float32)
    huggingface.export(model, enc, folder)
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def test_an_exported_model_comes_back(tmp_path):
    model = random_gpt(vocab=ENC.n_vocab, dtype=torch.float32)
    exported(tmp_path / "hub", model)
    again = gpt.GPT.from_pretrained(tmp_path / "hub")
    add_special_tokens(again, ENC, tmp_path / "hub")
    assert same_weights(again, model)


def test_the_end_and_padding_tokens_are_named_everywhere(tmp_path):
    exported(tmp_path / "hub")
    pad = ENC.encode_single_token("<|pad|>")
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "hub" / name).read_text())
        assert (config["eos_token_id"], config["pad_token_id"]) == (END, pad), name
    config = json.loads((tmp_path / "hub" / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["pad_token"]) == ("<|end|>", "<|pad|>")


def bpe(text, described):
    """Encode a string without special tokens from tokenizer.json alone -> ids.

    It is BPE as the library `tokenizers` does it: cut the text with the pattern, then merge the
    pair that stands first in the list of merges, the leftmost if it occurs twice.
    """
    pattern = described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    one_token_each = tiktoken.Encoding("pieces", pat_str=pattern, special_tokens={},
                                       mergeable_ranks={bytes([b]): b for b in range(256)})
    letters = huggingface.byte_letters()
    vocab = described["model"]["vocab"]
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(described["model"]["merges"])}
    ids = []
    for piece in re.findall(r"\S+|\s+", text):   # the tests use text that the pattern cuts so
        assert one_token_each.decode(one_token_each.encode_ordinary(piece)) == piece
        whole = "".join(letters[b] for b in piece.encode())
        tokens = [whole] if whole in vocab else list(whole)
        while True:
            pairs = [(ranks[pair], i) for i, pair in enumerate(zip(tokens, tokens[1:]))
                     if pair in ranks]
            if not pairs:
                break
            _, i = min(pairs)
            tokens[i:i + 2] = ["".join(tokens[i:i + 2])]
        ids += [vocab[token] for token in tokens]
    return ids


def random_encoding(rng, n_tokens):
    """A vocabulary in which most tokens can be cut into two tokens in several ways."""
    tokens = [bytes([b]) for b in range(256)]
    parts = [b"a", b"b", b"ab"]
    while len(tokens) < n_tokens:
        token = rng.choice(parts) + rng.choice(parts)
        if token not in tokens and len(token) < 9:
            tokens.append(token)
            parts.append(token)
    return tiktoken.Encoding("random", pat_str=r"\S+|\s+", special_tokens={
        token: n_tokens + i for i, token in enumerate(SPECIAL)},
        mergeable_ranks={token: i for i, token in enumerate(tokens)})


def test_merges_give_the_tokens_of_tiktoken():
    """tiktoken knows no merges: two neighbours join if their concatenation is a token."""
    rng = random.Random(0)
    for n_tokens in (260, 280, 330):
        enc = random_encoding(rng, n_tokens)
        described = huggingface.tokenizer_json(enc)
        for _ in range(300):
            text = "".join(rng.choices("aaabbb 牛", k=rng.randint(1, 30)))
            assert bpe(text, described) == enc.encode_ordinary(text), text


def test_tokenizer_json_has_every_token_once():
    described = huggingface.tokenizer_json(ENC)
    added = {t["content"]: t["id"] for t in described["added_tokens"]}
    assert added == {token: ENC.encode_single_token(token) for token in SPECIAL}
    assert all(t["special"] and not t["normalized"] for t in described["added_tokens"])
    ids = sorted([*described["model"]["vocab"].values(), *added.values()])
    assert ids == list(range(ENC.n_vocab))
    letters = huggingface.byte_letters()
    assert len(set(letters)) == 256
    assert letters[ord("a")] == "a"
    assert letters[ord(" ")] == "Ġ"      # as in GPT-2's vocab.json
    assert letters[ord("\n")] == "Ċ"
    raw = json.loads(EMBEDDED.read_text())["ranks"]
    names = ["".join(letters[b] for b in base64.b64decode(token)) for token in raw]
    assert [described["model"]["vocab"][name] for name in names] == list(range(len(names)))


def test_a_possessive_number_is_made_plain():
    """\\p{N}{1,3}+ of GPT-4's pattern: three digits for tiktoken, any number for `tokenizers`."""
    enc = tiktoken.Encoding("x", pat_str=r"\p{N}{1,3}+|\s++|[^\s\p{N}]++", special_tokens={},
                            mergeable_ranks={bytes([b]): b for b in range(256)})
    split = huggingface.tokenizer_json(enc)["pre_tokenizer"]["pretokenizers"][0]
    assert split["pattern"]["Regex"] == r"\p{N}{1,3}|\s++|[^\s\p{N}]++"


def run_main(*arguments):
    return subprocess.run([sys.executable, "-m", "data.huggingface", *map(str, arguments)],
                          cwd=ROOT, capture_output=True, text=True)


def test_the_command(tmp_path):
    model = random_gpt(vocab=ENC.n_vocab, dtype=torch.float32)
    gpt.save_model(tmp_path / "sft.pt", model, ENC, "")
    done = run_main("export", tmp_path / "sft.pt", tmp_path / "new" / "hub")
    assert done.returncode == 0, done.stderr
    files = sorted(file.name for file in (tmp_path / "new" / "hub").iterdir())
    assert files == ["config.json", "generation_config.json", "pytorch_model.bin",
                     "tokenizer.json", "tokenizer_config.json"]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["hub"]
    assert same_weights(gpt.GPT.from_pretrained(tmp_path / "new" / "hub"), model)

    done = run_main("export", tmp_path / "sft.pt", tmp_path / "new" / "hub")
    assert done.returncode == 2
    assert "hub is there and not an empty folder" in done.stderr
    assert done.stderr.count("\n") == 1
    done = run_main("export", tmp_path / "gone.pt", tmp_path / "x")
    assert done.returncode == 2
    assert "gone.pt: no such checkpoint" in done.stderr
    assert not (tmp_path / "x").exists()
    for arguments in (["export"], ["export", "a"], ["export", "a", "b", "c"], ["import", "a", "b"]):
        done = run_main(*arguments)
        assert done.returncode == 2
        assert done.stderr.endswith("type: python -m data.huggingface export CHECKPOINT FOLDER\n")
        assert done.stderr.count("\n") == 1


def test_a_reward_model_is_not_exported(tmp_path):
    save_reward(tmp_path / "reward.pt", tiny_reward(0))
    cfg = huggingface.Config(str(tmp_path / "reward.pt"), str(tmp_path / "hub"))
    with pytest.raises(UserError, match="reward.pt is a reward model"):
        huggingface.main(cfg)
    assert not (tmp_path / "hub").exists()


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "hub").mkdir()
    assert exported(tmp_path / "hub")["version"] == "1.0"


def test_a_library_that_reads_the_pattern_otherwise_is_noticed(tmp_path, monkeypatch):
    class Tokenizer:
        @classmethod
        def from_str(cls, content):
            return cls()

        def encode(self, text):
            self.ids = ENC.encode_ordinary(text)
            if text == PROBE:
                self.ids[-1] += 1
            return self

    monkeypatch.setitem(sys.modules, "tokenizers", type(sys)("tokenizers"))
    sys.modules["tokenizers"].Tokenizer = Tokenizer
    with pytest.raises(UserError, match="reads the pattern of the tokenizer otherwise") as e:
        exported(tmp_path / "hub")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "hub").exists()


def test_a_missing_library_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    exported(tmp_path / "hub")
    assert "pip install tokenizers" in capsys.readouterr().out
