"""Our formulas against public libraries, on random ragged batches.

No peer is needed to run the project, so none is in requirements.txt. A test whose peer is missing
is skipped; `pytest -rs` says what to install, and tests/README.md has one command for all of them.
Losses must agree in value and in gradient. Where a peer follows another convention on purpose, the
test converts its result and says why. The tolerance is the same everywhere.
"""
import functools
import importlib
import importlib.util
import itertools
import json
import random
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch

import gpt
from data import huggingface
from data.tokenizer import token_bytes
from dpo import dpo_loss
from gae import gae, whiten
from ppo import kl_rewards, policy_loss, value_loss
from reward import ranking_loss
from sft import decode_response, render_prompt
from tiny import ENC, END, tiny_gpt

# --no-deps: the dependencies are large, and the functions used here need none of them.
INSTALL = {
    "verl": "--no-deps verl==0.4.1",
    "openrlhf": "--no-deps openrlhf==0.8.11",
    "torchtune": "--no-deps torchtune==0.6.1",
    "allRank": "--no-deps allRank==1.4.3",
    "torchrl": "torchrl==0.14.1",
    "transformers": "transformers==4.57.6",
    "trl": "trl==0.24.0 transformers==4.57.6 datasets==4.4.1",
}
SEEDS = range(20)


# The peers

def peer(name, module, empty=()):
    """Return a module of a pinned peer, or skip the test and say how to install the peer.

    The packages in `empty` are imported without running their __init__, which would import ray,
    deepspeed and the like.
    """
    install = f"pip install {INSTALL[name]}"
    try:
        version = metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        pytest.skip(install)
    if f"{name}=={version}" not in install.split():
        pytest.skip(f"{install} (found {version})")
    for package in empty:
        if package not in sys.modules:
            sys.modules[package] = empty_package(package)
    try:
        return importlib.import_module(module)
    except ImportError as e:
        pytest.skip(f"{install}; as it is: {e}")


def empty_package(package):
    """Return a package whose submodules can be imported, without running its __init__."""
    top, *below = package.split(".")
    if top in sys.modules:
        locations = sys.modules[top].__path__
    else:
        locations = importlib.util.find_spec(top).submodule_search_locations
    spec = ModuleSpec(package, None, is_package=True)
    spec.submodule_search_locations = [str(Path(locations[0], *below))]
    return importlib.util.module_from_spec(spec)


def verl():
    return peer("verl", "verl.trainer.ppo.core_algos", empty=["verl", "verl.utils"])


def openrlhf():
    return peer("openrlhf", "openrlhf.models.loss", empty=["openrlhf.models"])


def torchtune(module):
    return peer("torchtune", f"torchtune.rlhf.{module}", empty=["torchtune", "torchtune.rlhf"])


def transformers():
    """Any version will do: the file formats are public."""
    return pytest.importorskip("transformers", reason=f"pip install {INSTALL['transformers']}")


# Comparing

def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


def agree(ours, theirs, *inputs):
    """Compare two losses: their values, and their gradients with respect to each input."""
    close(ours, theirs)
    our_gradients = torch.autograd.grad(ours, inputs)
    their_gradients = torch.autograd.grad(theirs, inputs)
    for a, b in zip(our_gradients, their_gradients):
        close(a, b)


# Batches

B = 9
T = 14


@dataclass
class Batch:
    """Rows of prompt, response and padding, fp64. Outside the mask is noise, not zeros."""
    mask: torch.Tensor          # (B, T)
    starts: torch.Tensor        # (B,) first token of the response
    ends: torch.Tensor          # (B,) one past its last token
    scores: torch.Tensor        # (B,)
    rewards: torch.Tensor       # (B, T), like all that follow
    values: torch.Tensor        # requires grad
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    logprobs: torch.Tensor      # requires grad
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor


def random_batch(seed):
    g = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(B, T, generator=g, dtype=torch.float64)

    # The first rows are a whole row, one token (twice) and an empty response.
    starts = torch.cat([torch.tensor([0, 13, 5, 0]), torch.randint(14, (5,), generator=g)])
    random_ends = torch.randint(1, 15, (5,), generator=g).maximum(starts[4:] + 1)
    ends = torch.cat([torch.tensor([14, 14, 6, 0]), random_ends])
    steps = torch.arange(T)
    mask = (steps >= starts[:, None]) & (steps < ends[:, None])       # (B, T)
    rewards = noise()
    values = noise()
    advantages = noise()
    returns = noise()
    # Steps of this size put about half the tokens beyond the clip range, on either side.
    old_values = values + 0.3 * noise()
    old_logprobs = -noise().exp()
    logprobs = old_logprobs + 0.3 * noise()
    ref_logprobs = old_logprobs + noise()
    return Batch(
        mask=mask,
        starts=starts,
        ends=ends,
        scores=noise()[:, 0],
        rewards=rewards,
        values=values.requires_grad_(),
        old_values=old_values,
        advantages=advantages,
        returns=returns,
        logprobs=logprobs.requires_grad_(),
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
    )


def batches():
    for seed in SEEDS:
        yield random_batch(seed)


# GAE, whitening and PPO

GAMMA_LAM = [(1.0, 0.95), (1.0, 0.0), (1.0, 1.0), (0.9, 0.5)]


def test_gae_torchrl():
    functional = peer("torchrl", "torchrl.objectives.value.functional")
    for b, (gamma, lam) in itertools.product(batches(), GAMMA_LAM):
        values = b.values.detach()
        next_values = torch.cat([values[:, 1:], torch.zeros(B, 1)], 1)
        # Outside the response every step is an episode by itself.
        done = ~b.mask | (torch.arange(T) == b.ends[:, None] - 1)
        theirs = functional.generalized_advantage_estimate(
            torch.tensor(gamma, dtype=torch.float64),  # a float would make their discount fp32
            torch.tensor(lam, dtype=torch.float64),
            values[..., None],                                            # (B, T, 1)
            next_values[..., None],
            b.rewards[..., None],
            done[..., None],
        )
        for ours, x in zip(gae(b.rewards, values, b.mask, gamma, lam), theirs):
            close(ours, x[..., 0] * b.mask)


def returns_verl(rewards, values, mask, gamma, lam):
    return verl().compute_gae_advantage_return(rewards, values, mask, gamma, lam)[1]


def returns_torchtune(rewards, values, mask, gamma, lam):
    return torchtune("rewards").estimate_advantages(values, rewards, gamma, lam, mask)[1]


@pytest.mark.parametrize(
    "peer_returns",
    [returns_verl, returns_torchtune],
    ids=["verl", "torchtune"],
)
def test_gae(peer_returns):
    for b, (gamma, lam) in itertools.product(batches(), GAMMA_LAM):
        # They do not cut a response off at its end: their trainers pass zeros behind it.
        rewards = b.rewards * b.mask
        values = b.values.detach() * b.mask
        theirs = peer_returns(rewards, values, b.mask, gamma, lam)
        advantages, returns = gae(b.rewards, b.values, b.mask, gamma, lam)
        close(returns, theirs * b.mask)
        # They return whitened advantages only, so the plain ones come from the returns.
        close(advantages, (theirs - values) * b.mask)


def whiten_verl(x, mask):
    return verl().verl_F.masked_whiten(x, mask)


def whiten_trl(x, mask):
    return peer("trl", "trl.core").masked_whiten(x, mask)


def whiten_torchtune(x, mask):
    return torchtune("rewards").whiten(x, mask, shift_mean=False)  # True adds the mean back


@pytest.mark.parametrize(
    "peer_whiten",
    [whiten_verl, whiten_trl, whiten_torchtune],
    ids=["verl", "trl", "torchtune"],
)
def test_whitening(peer_whiten):
    for b in batches():
        theirs = peer_whiten(b.advantages, b.mask.double())  # they count tokens in this precision
        # They divide the variance by n - 1. We divide by n, which is defined for a single token.
        n = b.mask.sum().double()
        close(whiten(b.advantages, b.mask), theirs * (n / (n - 1)).sqrt() * b.mask)


def test_kl_rewards_torchtune():
    get_rewards_ppo = torchtune("rewards").get_rewards_ppo
    for b in batches():
        logprobs = b.logprobs.detach()
        last = (b.ends - 1).clamp(min=0)
        theirs = get_rewards_ppo(b.scores, logprobs, b.ref_logprobs, 0.1, last)[0]
        # They have no mask, so padding has rewards and an empty response has a score.
        ours = kl_rewards(b.scores, logprobs, b.ref_logprobs, b.mask, 0.1)
        close(ours, theirs * b.mask)


@pytest.mark.parametrize("clip", [0.1, 0.2])
def test_policy_loss_verl(clip):
    compute_policy_loss = verl().compute_policy_loss
    for b in batches():
        # Dual clip, a second bound for ratios above 3 at a bad action, is not in the PPO paper.
        # A huge bound turns it off.
        theirs, clipped = compute_policy_loss(
            b.old_logprobs, b.logprobs, b.advantages, b.mask, clip, clip_ratio_c=1e9
        )[:2]
        loss, fraction = policy_loss(b.logprobs, b.old_logprobs, b.advantages, b.mask, clip)
        agree(loss, theirs, b.logprobs)
        close(fraction, clipped)
        assert fraction > 0
        assert fraction < 1


@pytest.mark.parametrize("clip", [0.1, 0.2])
def test_policy_loss_openrlhf(clip):
    peer_loss = openrlhf().PolicyLoss(clip, clip)
    for b in batches():
        theirs, clipped = peer_loss(b.logprobs, b.old_logprobs, b.advantages, b.mask)[:2]
        loss, fraction = policy_loss(b.logprobs, b.old_logprobs, b.advantages, b.mask, clip)
        agree(loss, theirs, b.logprobs)
        close(fraction, clipped)


@pytest.mark.parametrize("clip", [0.1, 0.2])
def test_value_loss_verl(clip):
    compute_value_loss = verl().compute_value_loss
    for b in batches():
        theirs = compute_value_loss(b.values, b.returns, b.old_values, b.mask, clip)[0]
        agree(value_loss(b.values, b.old_values, b.returns, b.mask, clip), theirs, b.values)


@pytest.mark.parametrize("clip", [0.1, 0.2])
def test_value_loss_openrlhf(clip):
    peer_loss = openrlhf().ValueLoss(clip)
    for b in batches():
        theirs = peer_loss(b.values, b.old_values, b.returns, b.mask)
        agree(value_loss(b.values, b.old_values, b.returns, b.mask, clip), theirs, b.values)


# The ranking loss

def rankings(K):
    """Yield scores (8, K) and ranks with ties; most rows have fewer than K responses (rank 0)."""
    for seed in SEEDS:
        g = torch.Generator().manual_seed(seed)
        scores = 2 * torch.randn(8, K, generator=g, dtype=torch.float64)
        ranks = torch.randint(1, K + 1, (8, K), generator=g)
        ranks[0] = torch.arange(1, K + 1)  # at least one row without ties
        ranks[1] = 1                       # one row of ties alone: it must not count as a prompt
        n_responses = torch.randint(2, K + 1, (8, 1), generator=g)
        ranks[torch.arange(K) >= n_responses] = 0
        yield scores.requires_grad_(), ranks


@pytest.mark.parametrize("name", ["PairWiseLoss", "LogExpLoss"])
@pytest.mark.parametrize("K", [2, 4, 9])
def test_ranking_loss_openrlhf(name, K):
    pairwise_loss = getattr(openrlhf(), name)()
    for scores, ranks in rankings(K):
        # They know pairs only. Our loss is the mean of theirs over the pairs of a prompt, then
        # over prompts.
        prompts = []
        for s, r in zip(scores, ranks.tolist()):
            pairs = [(i, j) for i, j in itertools.permutations(range(K), 2) if 0 < r[i] < r[j]]
            if not pairs:
                continue
            better, worse = zip(*pairs)
            prompts.append(pairwise_loss(s[list(better)], s[list(worse)]))
        agree(ranking_loss(scores, ranks), torch.stack(prompts).mean(), scores)


def rank_net_of_allrank(monkeypatch):
    # All that rankNet takes from this module is the label of an absent response. The module
    # itself imports torchvision and scikit-learn.
    stub = SimpleNamespace(PADDED_Y_VALUE=-1)
    monkeypatch.setitem(sys.modules, "allrank.data.dataset_loading", stub)
    empty = ["allrank", "allrank.models", "allrank.models.losses"]
    return peer("allRank", "allrank.models.losses.rankNet", empty=empty).rankNet


@pytest.mark.parametrize("K", [2, 4, 9])
def test_ranking_loss_allrank(K, monkeypatch):
    rank_net = rank_net_of_allrank(monkeypatch)
    for scores, ranks in rankings(K):
        relevance = torch.where(ranks > 0, K - ranks, -1).double()  # theirs grows with quality
        # Row by row: they average (in fp32) over all pairs of a batch, we weigh prompts equally.
        prompts = []
        for s, y in zip(scores, relevance):
            labels = set(y.tolist()) - {-1.0}
            if len(labels) > 1:
                prompts.append(rank_net(s[None], y[None]))
        agree(ranking_loss(scores, ranks), torch.stack(prompts).mean(), scores)


# DPO

def dpo_openrlhf(beta, smoothing, kind):
    return openrlhf().DPOLoss(beta, smoothing, kind == "ipo")


def dpo_torchtune(beta, smoothing, kind):
    assert kind == "sigmoid"  # it has no IPO
    return torchtune("loss.dpo").DPOLoss(beta, smoothing)


def dpo_trl(beta, smoothing, kind):
    """Their loss is a method of the trainer, from which it reads these settings."""
    trainer = SimpleNamespace(
        beta=beta,
        label_smoothing=smoothing,
        reference_free=False,
        f_divergence_type="reverse_kl",
        accelerator=SimpleNamespace(device="cpu"),
    )
    method = peer("trl", "trl.trainer.dpo_trainer").DPOTrainer.dpo_loss
    return functools.partial(method, trainer, loss_type=kind)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("peer_loss, kind, smoothing", [
    pytest.param(dpo_openrlhf, "sigmoid", 0.0, id="openrlhf"),
    pytest.param(dpo_openrlhf, "sigmoid", 0.1, id="openrlhf, smoothing 0.1"),
    pytest.param(dpo_openrlhf, "sigmoid", 0.4, id="openrlhf, smoothing 0.4"),
    pytest.param(dpo_openrlhf, "ipo", 0.0, id="openrlhf, ipo"),
    pytest.param(dpo_trl, "sigmoid", 0.0, id="trl"),
    pytest.param(dpo_trl, "sigmoid", 0.1, id="trl, smoothing 0.1"),
    pytest.param(dpo_trl, "sigmoid", 0.4, id="trl, smoothing 0.4"),
    pytest.param(dpo_trl, "ipo", 0.0, id="trl, ipo"),
    pytest.param(dpo_torchtune, "sigmoid", 0.0, id="torchtune"),
    pytest.param(dpo_torchtune, "sigmoid", 0.1, id="torchtune, smoothing 0.1"),
    pytest.param(dpo_torchtune, "sigmoid", 0.4, id="torchtune, smoothing 0.4"),
])
def test_dpo_loss(peer_loss, kind, smoothing, beta):
    their_loss = peer_loss(beta, smoothing, kind)
    for seed in SEEDS:
        g = torch.Generator().manual_seed(seed)
        logprobs = -20 * torch.rand(4, 16, generator=g, dtype=torch.float64)
        chosen, rejected, ref_chosen, ref_rejected = logprobs
        chosen.requires_grad_()
        rejected.requires_grad_()
        inputs = (chosen, rejected, ref_chosen, ref_rejected)
        ours = dpo_loss(*inputs, beta, smoothing, kind)
        theirs = their_loss(*inputs)
        agree(ours[0], theirs[0].mean(), chosen, rejected)  # TRL, torchtune: the trainer averages
        close(ours[1], theirs[1])
        close(ours[2], theirs[2])


# GPT-2's weights

SIZES = [
    dict(vocab_size=50, block_size=64, n_layer=2, n_head=4, n_embd=32),
    dict(vocab_size=97, block_size=33, n_layer=3, n_head=1, n_embd=24),
    dict(vocab_size=31, block_size=16, n_layer=1, n_head=6, n_embd=48),
]


def same_logits(ours, theirs, sizes):
    """Compare in double precision, where 1e-9 tells another epsilon or GELU from rounding."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(sizes["vocab_size"], (3, sizes["block_size"]), generator=g)
    with torch.no_grad():
        close(ours.double().eval()(ids), theirs.double().eval()(ids).logits, 1e-9)


def randomise(model):
    """Move a model far from GPT-2's nearly uniform start, so that no term is too small to miss."""
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s['n_layer']} layers")
def test_transformers_reads_our_gpt2(tmp_path, sizes, bias):
    GPT2 = transformers().GPT2LMHeadModel
    for seed in range(3):
        torch.manual_seed(seed)
        model = randomise(gpt.GPT(gpt.GPTConfig(**sizes, bias=bias)))
        model.save_pretrained(tmp_path)
        same_logits(model, GPT2.from_pretrained(tmp_path), sizes)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s['n_layer']} layers")
def test_we_read_transformers_gpt2(tmp_path, sizes, file):
    GPT2 = transformers().GPT2LMHeadModel
    their_sizes = dict(sizes)
    their_sizes["n_positions"] = their_sizes.pop("block_size")
    config = transformers().GPT2Config(**their_sizes)
    for seed in range(3):
        torch.manual_seed(seed)
        model = randomise(GPT2(config))
        model.save_pretrained(tmp_path)
        if file == "pytorch_model.bin":
            # transformers 5 writes safetensors only; earlier versions wrote the other file so.
            (tmp_path / "model.safetensors").unlink()
            torch.save(model.state_dict(), tmp_path / file)
        same_logits(gpt.GPT.from_pretrained(tmp_path), model, sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_we_read_transformers_gpt2_of_half_precision_and_padded(tmp_path, dtype):
    GPT2 = transformers().GPT2LMHeadModel
    torch.manual_seed(0)
    config = transformers().GPT2Config(vocab_size=50304, n_positions=16, n_layer=1, n_head=2,
                                       n_embd=8)
    theirs = randomise(GPT2(config)).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="300KB")
    sizes = dict(vocab_size=50304, block_size=16)
    same_logits(gpt.GPT.from_pretrained(tmp_path), theirs, sizes)


# An exported folder

HELLO = [{"role": "system", "content": "Be kind."},
         {"role": "user", "content": "  What does the 牛 say?\n\n"},
         {"role": "assistant", "content": "moo"},
         {"role": "user", "content": "Again 12345!  "}]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """An exported model as transformers' Auto classes open it -> (ours, theirs, tokenizer)."""
    folder = tmp_path_factory.mktemp("export") / "hub"
    auto = transformers()
    model = tiny_gpt(0)
    huggingface.export(model, ENC, folder)
    theirs = auto.AutoModelForCausalLM.from_pretrained(folder)
    return model, theirs, auto.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("n_turns", [1, 2, 4])
def test_transformers_generates_our_greedy_text(opened, n_turns):
    model, theirs, tokenizer = opened
    chat = HELLO[:2] if n_turns < 4 else HELLO
    ids = render_prompt(chat[-n_turns:], ENC)
    prompt = tokenizer.apply_chat_template(chat[-n_turns:], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)
    assert prompt["input_ids"].tolist() == [ids]
    new = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0, len(ids):]
    ours, = gpt.generate(model, [ids], 20, temperature=0, stop=END)
    assert new.tolist() == ours
    assert tokenizer.decode(new, skip_special_tokens=True) == decode_response(ours, ENC)


def test_transformers_generates_our_greedy_text_in_batches(opened):
    model, theirs, tokenizer = opened
    texts = ["a", "The cow says", "12 cats and 牛", "Hello, my name is"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    new = theirs.generate(**batch, max_new_tokens=20, do_sample=False)
    ours = gpt.generate(model, [ENC.encode_ordinary(t) for t in texts], 20, temperature=0, stop=END)
    start = batch["input_ids"].shape[1]
    for row, ids in zip(new[:, start:].tolist(), ours):
        assert row[:len(ids)] == ids
        assert set(row[len(ids):]) <= {tokenizer.pad_token_id}


def test_transformers_tokenizer_is_ours(opened):
    tokenizer = opened[2]
    rng = random.Random(0)
    ranges = [(1, 0x80), (1, 0x500), (0x3000, 0xA000), (1, 0xD800), (0x1F300, 0x1F700)]
    for _ in range(2000):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 30)))
        ids = tokenizer(text)["input_ids"]
        assert ids == ENC.encode_ordinary(text), text
        assert tokenizer.decode(ids) == text
    special = {name: ENC.encode_single_token(name) for name in huggingface.SPECIAL}
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in special} == special


def test_the_chat_template_is_render(opened):
    tokenizer = opened[2]
    for chat in (HELLO[1:2], HELLO[:2], HELLO):
        ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        assert ids + [ENC.encode_single_token("<|assistant|>")] == render_prompt(chat, ENC)
    with pytest.raises(Exception, match="the roles are"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("pattern", [
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s",
], ids=["GPT-2", "GPT-4"])
def test_the_patterns_of_openai_mean_the_same_to_tokenizers(pattern):
    tokenizers = pytest.importorskip("tokenizers")
    ranks = {token: i for i, token in enumerate(token_bytes(ENC)) if token}
    enc = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    theirs = tokenizers.Tokenizer.from_str(json.dumps(huggingface.tokenizer_json(enc)))
    rng = random.Random(0)
    parts = ["a", "the", " ", "1", "23", "A's", "'S", "\n", "\r\n", "  ", "é", "牛", "!?", "\t"]
    for _ in range(1000):
        text = "".join(rng.choices(parts, k=rng.randint(1, 25)))
        assert theirs.encode(text).ids == enc.encode_ordinary(text), text
