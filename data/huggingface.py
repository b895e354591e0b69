"""GPT-2 weights in Hugging Face's layout, in and out; gpt.GPT.from_pretrained calls this."""
import json
import re
from pathlib import Path

import torch

from data.text import read_text
from scaffold.cli import UserError, brief
from scaffold.run import load_checkpoint, save_checkpoint

# Our name for a size -> theirs.
SIZES = dict(vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head",
             n_embd="n_embd")
# The settings that a gpt.GPT computes. With other values the same weights give other logits. The
# first value is the one that transformers takes for a missing key.
COMPUTED = dict(model_type=["gpt2"], activation_function=["gelu_new", "gelu_pytorch_tanh"],
                layer_norm_epsilon=[1e-5], scale_attn_weights=[True],
                scale_attn_by_inverse_layer_idx=[False])
# Hugging Face stores these matrices of a block as (in, out), the transpose of nn.Linear.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# The parameters of a gpt.GPT; older files store other tensors beside them, such as causal masks.
NAME = re.compile(r"(wte|wpe)\.weight|(ln_f|h\.(?P<layer>\d+)\.(ln_1|ln_2|attn\.c_attn|"
                  r"attn\.c_proj|mlp\.c_fc|mlp\.c_proj))\.(weight|bias)")


def read_sizes(folder):
    """Read config.json -> {field of gpt.GPTConfig: number}.

    Raises UserError if it is malformed, or if it describes a model that a gpt.GPT does not compute.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: no config.json there; "
                        f"--init-from needs a folder in Hugging Face's GPT-2 layout")
    try:
        raw = json.loads(read_text(path))
        sizes = {ours: raw[theirs] for ours, theirs in SIZES.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        reason = f"{type(e).__name__} {brief(e)}"
        raise UserError(f"{path}: not a GPT-2 configuration ({reason})") from None
    for key, allowed in COMPUTED.items():
        value = raw.get(key, allowed[0])
        if value not in allowed:
            listed = " or ".join(map(repr, allowed))
            raise UserError(f"{path}: {key} is {brief(repr(value))}, but gpt.py computes only "
                            f"{listed}; convert a model with that setting instead")
    return sizes


def read_weights(folder):
    """Read model.safetensors or pytorch_model.bin -> {name: tensor}. Raises UserError."""
    path = folder / "model.safetensors"
    if not path.exists():
        if not (folder / "pytorch_model.bin").exists():
            raise UserError(f"{folder}: has neither model.safetensors nor pytorch_model.bin")
        return load_checkpoint(folder / "pytorch_model.bin")
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path} needs one more package: pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as e:   # safetensors raises its own exceptions
        raise UserError(f"{path}: not readable ({brief(e)}); fetch it again") from None


def read(folder):
    """Read a local folder with config.json and weights -> (sizes, state dict of a gpt.GPT)."""
    folder = Path(folder)
    sizes = read_sizes(folder)
    weights = read_weights(folder)
    ours = {}
    try:
        for name, tensor in weights.items():
            name = name.removeprefix("transformer.")
            match = NAME.fullmatch(name)
            if match and int(match["layer"] or 0) < sizes["n_layer"]:
                ours[name] = tensor.T if name.endswith(TRANSPOSED) else tensor
        wte = ours.get("wte.weight")
        head = weights.get("lm_head.weight", wte)   # gpt2's own file has none
        tied = head is wte or (head.shape == wte.shape and bool((head == wte).all()))
    except (AttributeError, TypeError) as e:   # not a dict of names and tensors
        raise UserError(f"{folder}: not GPT-2 weights ({brief(e)})") from None
    if not tied:
        raise UserError(f"{folder}: lm_head.weight differs from wte.weight, but gpt.py has one "
                        f"matrix for both; convert a model with tied embeddings instead")
    return sizes, ours


def write(model, folder):
    """Write config.json and pytorch_model.bin, which transformers' GPT2LMHeadModel reads."""
    folder = Path(folder)
    c = model.config
    state = model.state_dict()
    if not c.bias:   # GPT2LMHeadModel always has biases; zeros have no effect
        for name in list(state):
            if not name.startswith(("wte.", "wpe.")):
                state[name.replace("weight", "bias")] = torch.zeros(len(state[name]))
    weights = {}
    for name, tensor in state.items():
        if name.endswith(TRANSPOSED):
            tensor = tensor.T
        weights["transformer." + name] = tensor.cpu().contiguous()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    save_checkpoint(folder / "pytorch_model.bin", **weights)
    config = dict(
        model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size,
        n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
        activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
