"""Tests of data/huggingface.py: GPT-2 weights in Hugging Face's layout, in and out."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import gpt
from scaffold.cli import UserError
from tiny import assert_close, random_gpt, random_ids


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
