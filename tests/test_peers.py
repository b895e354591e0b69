"""The same numbers as public libraries: each formula of ours against somebody else's code, on random ragged batches.

No peer is needed to run the project, so none is in requirements.txt: what is not installed is skipped, and `pytest -rs` says
what to install; tests/README.md has one command for all. Losses must agree in value and in gradient. Where a peer follows
another convention on purpose, the test converts it in sight and says why; the tolerance stays.
"""
import functools
import importlib
import importlib.util
import itertools
import sys
import types
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402
from dpo import dpo_loss  # noqa: E402
from gae import gae, whiten  # noqa: E402
from ppo import kl_rewards, policy_loss, value_loss  # noqa: E402
from reward import ranking_loss  # noqa: E402

INSTALL = {   # --no-deps where what a peer depends on is large and the functions used here need none of it
    "verl": "--no-deps verl==0.4.1", "openrlhf": "--no-deps openrlhf==0.8.11", "torchtune": "--no-deps torchtune==0.6.1",
    "allRank": "--no-deps allRank==1.4.3", "torchrl": "torchrl==0.14.1", "transformers": "transformers==4.57.6",
    "trl": "trl==0.24.0 transformers==4.57.6 datasets==4.4.1"}
SEEDS = range(20)


def peer(name, module, empty=()):
    """A module of a pinned peer, or a skip that says how to install it.

    The packages in `empty` are entered without running their __init__: that would import ray, deepspeed and the like.
    """
    install = f"pip install {INSTALL[name]}"
    try:
        found = metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        pytest.skip(install)
    if f"{name}=={found}" not in install.split():
        pytest.skip(f"{install} (found {found})")
    for package in empty:
        if package not in sys.modules:
            top, *below = package.split(".")
            spec = ModuleSpec(package, None, is_package=True)
            home = sys.modules[top].__path__ if top in sys.modules else importlib.util.find_spec(top).submodule_search_locations
            spec.submodule_search_locations = [str(Path(home[0], *below))]
            sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(module)
    except ImportError as e:
        pytest.skip(f"{install}; as it is: {e}")


def verl():
    return peer("verl", "verl.trainer.ppo.core_algos", empty=["verl", "verl.utils"])


def openrlhf():
    return peer("openrlhf", "openrlhf.models.loss", empty=["openrlhf.models"])


def torchtune(module):
    return peer("torchtune", f"torchtune.rlhf.{module}", empty=["torchtune", "torchtune.rlhf"])


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


def agree(ours, theirs, *inputs):
    """Two losses are one: their values, and their gradients by each input."""
    close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)):
        close(a, b)


def batches():
    """Ragged batches (B, T) in double precision: prompt, answer, padding; outside the mask there is noise, not zeros."""
    for seed in SEEDS:
        g = torch.Generator().manual_seed(seed)
        noise = lambda: torch.randn(9, 14, generator=g, dtype=torch.float64)
        starts = torch.cat([torch.tensor([0, 13, 5, 0]), torch.randint(14, (5,), generator=g)])   # whole row, one token twice, none
        ends = torch.cat([torch.tensor([14, 14, 6, 0]), torch.randint(1, 15, (5,), generator=g).maximum(starts[4:] + 1)])
        steps = torch.arange(14)
        mask = (steps >= starts[:, None]) & (steps < ends[:, None])                               # (B, T)
        b = {k: noise() for k in ("rewards", "values", "advantages", "returns")}
        # Steps of this size put about half the tokens beyond the clip range, on either side.
        b["old_values"], b["old_logprobs"] = b["values"] + 0.3 * noise(), -noise().exp()
        b["logprobs"], b["ref_logprobs"] = b["old_logprobs"] + 0.3 * noise(), b["old_logprobs"] + noise()
        b["values"].requires_grad_(), b["logprobs"].requires_grad_()
        yield types.SimpleNamespace(mask=mask, scores=noise()[:, 0], starts=starts, ends=ends, **b)


GAMMA_LAM = [(1.0, 0.95), (1.0, 0.0), (1.0, 1.0), (0.9, 0.5)]


def test_gae_torchrl():
    estimate = peer("torchrl", "torchrl.objectives.value.functional").generalized_advantage_estimate
    double = functools.partial(torch.tensor, dtype=torch.float64)   # plain numbers would make their discount fp32
    for b, (gamma, lam) in itertools.product(batches(), GAMMA_LAM):
        values, column = b.values.detach(), lambda x: x[..., None]                                # they want (B, T, 1)
        next_values = torch.cat([values[:, 1:], torch.zeros(9, 1)], 1)
        done = ~b.mask | (torch.arange(14) == b.ends[:, None] - 1)   # outside the answer every step is an episode of its own
        theirs = estimate(double(gamma), double(lam), *map(column, (values, next_values, b.rewards, done)))
        for ours, x in zip(gae(b.rewards, values, b.mask, gamma, lam), theirs):
            close(ours, x[..., 0] * b.mask)


@pytest.mark.parametrize("name", ["verl", "torchtune"])
def test_gae(name):
    estimate = verl().compute_gae_advantage_return if name == "verl" else torchtune("rewards").estimate_advantages
    for b, (gamma, lam) in itertools.product(batches(), GAMMA_LAM):
        # They do not cut an answer off at its end: their trainers hand over zeros behind it.
        rewards, values = b.rewards * b.mask, b.values.detach() * b.mask
        if name == "verl":
            theirs = estimate(rewards, values, b.mask, gamma, lam)[1]
        else:
            theirs = estimate(values, rewards, gamma, lam, b.mask)[1]
        advantages, returns = gae(b.rewards, b.values, b.mask, gamma, lam)
        close(returns, theirs * b.mask)
        close(advantages, (theirs - values) * b.mask)   # of advantages they give the whitened ones only


@pytest.mark.parametrize("name", ["verl", "trl", "torchtune"])
def test_whitening(name):
    if name == "torchtune":
        peer_whiten = functools.partial(torchtune("rewards").whiten, shift_mean=False)   # there, True adds the mean back
    else:
        peer_whiten = (verl().verl_F if name == "verl" else peer("trl", "trl.core")).masked_whiten
    for b in batches():
        n = b.mask.sum().double()
        # They divide the variance by n - 1; ours, by n, is defined for a single token, too.
        theirs = peer_whiten(b.advantages, b.mask.double()) * (n / (n - 1)).sqrt()   # they count tokens in the mask's precision
        close(whiten(b.advantages, b.mask), theirs * b.mask)


def test_kl_rewards_torchtune():
    get_rewards = torchtune("rewards").get_rewards_ppo
    for b in batches():
        theirs = get_rewards(b.scores, b.logprobs.detach(), b.ref_logprobs, 0.1, (b.ends - 1).clamp(min=0))[0]
        # They have no mask, so padding has rewards, and an empty answer a score.
        close(kl_rewards(b.scores, b.logprobs.detach(), b.ref_logprobs, b.mask, 0.1), theirs * b.mask)


@pytest.mark.parametrize("clip", [0.1, 0.2])
def test_policy_loss_verl(clip):
    peer_loss = verl().compute_policy_loss
    for b in batches():
        # Dual clip, a second bound for ratios above 3 at a bad action, is not in the PPO paper: a huge bound turns it off.
        theirs, clipped = peer_loss(b.old_logprobs, b.logprobs, b.advantages, b.mask, clip, clip_ratio_c=1e9)[:2]
        loss, fraction = policy_loss(b.logprobs, b.old_logprobs, b.advantages, b.mask, clip)
        agree(loss, theirs, b.logprobs)
        close(fraction, clipped)
        assert 0 < fraction < 1


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
    peer_loss = verl().compute_value_loss
    for b in batches():
        theirs = peer_loss(b.values, b.returns, b.old_values, b.mask, clip)[0]
        agree(value_loss(b.values, b.old_values, b.returns, b.mask, clip), theirs, b.values)


@pytest.mark.parametrize("clip", [0.1, 0.2])
def test_value_loss_openrlhf(clip):
    peer_loss = openrlhf().ValueLoss(clip)
    for b in batches():
        theirs = peer_loss(b.values, b.old_values, b.returns, b.mask)
        agree(value_loss(b.values, b.old_values, b.returns, b.mask, clip), theirs, b.values)


def rankings(K):
    """Scores (B, K) and their ranks, with ties; from the third answer on, some rows have no more (rank 0)."""
    for seed in SEEDS:
        g = torch.Generator().manual_seed(seed)
        scores = 2 * torch.randn(8, K, generator=g, dtype=torch.float64)
        ranks = torch.randint(1, K + 1, (8, K), generator=g)
        ranks[0] = torch.arange(1, K + 1)                    # at least one row without ties
        ranks[1] = 1                                         # and one that is all a tie: it must not count as a prompt
        ranks[torch.arange(K) >= torch.randint(2, K + 1, (8, 1), generator=g)] = 0
        yield scores.requires_grad_(), ranks


@pytest.mark.parametrize("name", ["PairWiseLoss", "LogExpLoss"])
@pytest.mark.parametrize("K", [2, 4, 9])
def test_ranking_loss_openrlhf(name, K):
    pairwise = getattr(openrlhf(), name)()
    for scores, ranks in rankings(K):
        prompts = []
        for s, r in zip(scores, ranks.tolist()):
            pairs = [(i, j) for i, j in itertools.permutations(range(K), 2) if 0 < r[i] < r[j]]
            if pairs:   # they know pairs only: ours is the mean of their loss over each prompt's pairs, then over prompts
                better, worse = zip(*pairs)
                prompts.append(pairwise(s[list(better)], s[list(worse)]))
        agree(ranking_loss(scores, ranks), torch.stack(prompts).mean(), scores)


@pytest.mark.parametrize("K", [2, 4, 9])
def test_ranking_loss_allrank(K, monkeypatch):
    # All it takes from this module is the label of an absent answer; the module itself wants torchvision and scikit-learn.
    monkeypatch.setitem(sys.modules, "allrank.data.dataset_loading", types.SimpleNamespace(PADDED_Y_VALUE=-1))
    rank_net = peer("allRank", "allrank.models.losses.rankNet", empty=["allrank", "allrank.models", "allrank.models.losses"]).rankNet
    for scores, ranks in rankings(K):
        relevance = torch.where(ranks > 0, K - ranks, -1).double()   # theirs grows with quality
        # Row by row: their mean (fp32) is over all the pairs of a batch, ours gives every prompt the same weight.
        prompts = [rank_net(s[None], y[None]) for s, y in zip(scores, relevance) if len(set(y.tolist()) - {-1.0}) > 1]
        agree(ranking_loss(scores, ranks), torch.stack(prompts).mean(), scores)


DPO_KINDS = [("sigmoid", 0.0), ("sigmoid", 0.1), ("sigmoid", 0.4), ("ipo", 0.0)]
DPO_CASES = [(n, *k) for n in ("openrlhf", "trl", "torchtune") for k in DPO_KINDS if (n, k[0]) != ("torchtune", "ipo")]   # it has none


@pytest.mark.parametrize("name, kind, smoothing", DPO_CASES)
def test_dpo_loss(name, kind, smoothing):
    if name == "openrlhf":
        peer_loss = lambda beta: openrlhf().DPOLoss(beta, smoothing, kind == "ipo")
    elif name == "torchtune":
        peer_loss = lambda beta: torchtune("loss.dpo").DPOLoss(beta, smoothing)
    else:   # a method of the trainer: it reads these settings of it
        method, cpu = peer("trl", "trl.trainer.dpo_trainer").DPOTrainer.dpo_loss, types.SimpleNamespace(device="cpu")
        peer_loss = lambda beta: functools.partial(method, types.SimpleNamespace(
            beta=beta, label_smoothing=smoothing, reference_free=False, f_divergence_type="reverse_kl", accelerator=cpu), loss_type=kind)
    for beta in (0.05, 0.1, 0.5):
        peer_loss_at = peer_loss(beta)
        for seed in SEEDS:
            g = torch.Generator().manual_seed(seed)
            # Of the policy: chosen, rejected; of the reference: chosen, rejected.
            logprobs = list(-20 * torch.rand(4, 16, generator=g, dtype=torch.float64))
            policy = [x.requires_grad_() for x in logprobs[:2]]
            ours, theirs = dpo_loss(*logprobs, beta, smoothing, kind), peer_loss_at(*logprobs)
            agree(ours[0], theirs[0].mean(), *policy)   # TRL and torchtune leave the mean to the trainer
            close(ours[1], theirs[1])
            close(ours[2], theirs[2])


# Vocabulary, context, layers, heads, channels
SIZES = [(50, 64, 2, 4, 32), (97, 33, 3, 1, 24), (31, 16, 1, 6, 48)]


def same_logits(ours, theirs, sizes):
    """In double precision: there 1e-9 tells another epsilon or another GELU from rounding."""
    ids = torch.randint(sizes[0], (3, sizes[1]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(ours.double().eval()(ids), theirs.double().eval()(ids).logits, 1e-9)


def randomise(model):
    """Far from GPT-2's nearly uniform start, biases and gains included: no term is too small to be missed."""
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def transformers():
    return pytest.importorskip("transformers", reason=f"pip install {INSTALL['transformers']}")   # any version: the files are public


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_transformers_reads_our_gpt2(tmp_path, sizes, bias):
    GPT2 = transformers().GPT2LMHeadModel
    for seed in range(3):
        torch.manual_seed(seed)
        model = randomise(gpt.GPT(gpt.GPTConfig(*sizes, bias=bias)))
        model.save_pretrained(tmp_path)
        same_logits(model, GPT2.from_pretrained(tmp_path), sizes)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("sizes", SIZES)
def test_we_read_transformers_gpt2(tmp_path, sizes, file):
    GPT2, GPT2Config = transformers().GPT2LMHeadModel, transformers().GPT2Config
    config = GPT2Config(**dict(zip(("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"), sizes)))
    for seed in range(3):
        torch.manual_seed(seed)
        model = randomise(GPT2(config))
        model.save_pretrained(tmp_path)
        if file == "pytorch_model.bin":   # transformers 5 writes safetensors only; this is how those before wrote the other
            (tmp_path / "model.safetensors").unlink()
            torch.save(model.state_dict(), tmp_path / file)
        same_logits(gpt.GPT.from_pretrained(tmp_path), model, sizes)
