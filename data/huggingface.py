"""Hugging Face's layout of GPT-2, in and out: weights, and on the way out the tokenizer.

    python -m data.huggingface export out/ppo.pt my-model     a folder for transformers
    python gpt.py --init-from my-gpt2 --tokenizer gpt2        train the GPT-2 of such a folder

transformers opens the exported folder by its usual classes and generates the same text. The chat
template is that of sft.py, with one difference: transformers reads a special token in the text of a
message as that token, sft.py reads it as text.

    model = AutoModelForCausalLM.from_pretrained("my-model")
    tokenizer = AutoTokenizer.from_pretrained("my-model")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What does the cow say?"}],
                                           add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=48, do_sample=False)[0]))
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.text import read_text, write_text
from data.tokenizer import PROBE, SPECIAL, end_of, token_bytes
from scaffold.cli import UserError, brief, fail, start
from scaffold.run import load_checkpoint, save_checkpoint


@dataclass
class Config:
    checkpoint: str = "out/ppo.pt"   # the policy to export
    folder: str = "out/huggingface"  # the folder to write; it must be new or empty


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
    """Read the weights of a folder, which may be in several files -> {name: tensor}."""
    for name, read_file in (("model.safetensors", read_safetensors),
                            ("pytorch_model.bin", load_checkpoint)):
        if (folder / name).exists():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"   # says which file has which tensor
        if index.exists():
            weights = {}
            for part in parts_of(index):
                weights |= read_file(part)
            return weights
    raise UserError(f"{folder}: has neither model.safetensors nor pytorch_model.bin")


def parts_of(index):
    """Return the paths of the files that an index of weights names. Raises UserError."""
    try:
        names = dict.fromkeys(json.loads(read_text(index))["weight_map"].values())
        if any(Path(name).name != name for name in names):
            raise ValueError("a part in another folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{index}: not an index of weights ({brief(e)})") from None
    return [index.with_name(name) for name in names]


def read_safetensors(path):
    """Read a .safetensors file -> {name: tensor}. Raises UserError."""
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


def write(model, folder, **settings):
    """Write config.json and pytorch_model.bin, which transformers' GPT2LMHeadModel reads.

    settings: more of config.json, such as eos_token_id.
    """
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
    write_text(folder / "config.json", json.dumps(config | settings, indent=1))


# What sft.render does, as a Jinja template.
CHAT_TEMPLATE = """{%- for m in messages -%}
{%- if m['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('the roles are system, user and assistant') -}}
{%- endif -%}
{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""


def byte_letters():
    """Return GPT-2's letter for each byte: itself if it is printable, else one from 256 upwards."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def merges_of(ranks):
    """Return the pairs of tokens that make a longer one, in the order in which BPE merges them.

    ranks: {token: id} of bytes. tiktoken merges the two neighbours whose concatenation has the
    lowest id, whatever the two are. So every way to cut a token into two tokens is a merge.
    """
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def tokenizer_json(enc):
    """Describe a tiktoken.Encoding as the library `tokenizers` reads it -> tokenizer.json."""
    letters = byte_letters()
    ranks = {token: i for i, token in enumerate(token_bytes(enc)) if token}
    names = {token: "".join(letters[b] for b in token) for token in ranks}
    special = {enc.encode_single_token(token): token for token in enc.special_tokens_set}
    # Its regular expressions read {1,3}+ as "several times", tiktoken's as "do not backtrack".
    pattern = re.sub(r"(\{[\d,]+\})\+", r"\1", enc._pat_str)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)
    return dict(
        version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None,
        added_tokens=[dict(id=i, content=special[i], single_word=False, lstrip=False, rstrip=False,
                           normalized=False, special=True) for i in sorted(special)],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]), decoder=byte_level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=True,
                   vocab={names[token]: i for token, i in ranks.items()},
                   merges=[f"{names[a]} {names[b]}" for a, b in merges_of(ranks)]))


def check_tokenizer(enc, content):
    """Compare a tokenizer.json with its tiktoken.Encoding on text of all kinds. Raises UserError.

    A pattern may mean something else to another library.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        print("the tokenizer is not compared with the original: pip install tokenizers")
        return
    theirs = Tokenizer.from_str(content)
    for text in (PROBE, PROBE[::-1], *PROBE.split(), "12345 a's A'S\n\n  b  \t"):
        if theirs.encode(text).ids != enc.encode_ordinary(text):
            raise UserError(f"the library tokenizers reads the pattern of the tokenizer otherwise, "
                            f"see {brief(repr(text), 40)}; train one with data/bpe.py")


def knows_special_tokens(folder):
    """Return whether the tokenizer of a folder has our special tokens; False without one."""
    path = Path(folder) / "tokenizer.json"
    try:
        return all(json.dumps(token) in read_text(path) for token in SPECIAL)
    except (OSError, UserError):
        return False


def export(model, enc, folder):
    """Write model and tokenizer as transformers' Auto classes read them. Raises UserError."""
    tokenizer = json.dumps(tokenizer_json(enc), ensure_ascii=False)
    check_tokenizer(enc, tokenizer)
    part = folder.with_name(folder.name + ".part")   # a full disk leaves no half of a model
    ends = dict(bos_token_id=end_of(enc), eos_token_id=end_of(enc),
                pad_token_id=enc.encode_single_token("<|pad|>"))
    write(model, part, **ends)
    write_text(part / "generation_config.json", json.dumps(ends, indent=1))
    write_text(part / "tokenizer.json", tokenizer)
    write_text(part / "tokenizer_config.json", json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=model.config.block_size,
        eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE,
        padding_side="left",   # generate needs the prompts of a batch to end together
        model_input_names=["input_ids", "attention_mask"],   # no token types: GPT-2 adds them
        clean_up_tokenization_spaces=False), indent=1))
    part.replace(folder)


def main(cfg):
    import gpt   # lazy: gpt.py imports this file
    folder = Path(cfg.folder)
    if folder.exists() and (not folder.is_dir() or any(sorted(folder.iterdir()))):
        raise UserError(f"{folder} is there and not an empty folder; name a new one")
    model, enc, state = gpt.load_model(cfg.checkpoint)
    if "head.weight" in state["model"]:
        raise UserError(f"{cfg.checkpoint} is a reward model; name a policy, such as sft.pt")
    export(model, enc, folder)
    print(f"saved {folder}; open it: AutoModelForCausalLM.from_pretrained({str(folder)!r})")


if __name__ == "__main__":
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):   # the flags without their names
        if words[0] != "export" or len(words) != 3:
            fail("type: python -m data.huggingface export CHECKPOINT FOLDER")
        sys.argv[1:] = [f"--checkpoint={words[1]}", f"--folder={words[2]}"]
    start(main, Config, __doc__)
