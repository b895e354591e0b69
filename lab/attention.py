"""Causal against bidirectional attention: the same blocks and the same text, two masks.

Claim (Radford et al. 2018, Devlin et al. 2019, and every textbook since). A causal model (GPT)
predicts better what comes next, without further training. A bidirectional model (BERT) fills a gap
better, because it sees both sides of it.

Two small GPTs start from the same weights and read the same tokens of OUT/data/pretrain. The causal
one predicts every next token from those to its left. The bidirectional one sees the whole document
with 40% of the tokens hidden, and guesses these. As in BERT, 80% of the chosen tokens become a
mask, 10% a random token, and 10% stay. BERT chose 15% of the tokens. With few tokens to read, a
higher share teaches more (Wettig et al., 2202.08005).

The test takes a word in the middle of a held-out document. The models choose it from all words of
the vocabulary that such documents contain:

    gap, left side    causal: its prediction at the gap, which cannot use the right side
    gap, both sides   bidirectional: its guess at a mask, in one pass
                      causal: the word that makes the whole document likeliest, one pass per word,
                      which is the fair way to let a causal model use the right side
    next              the document ends before the word
                      causal: its prediction; bidirectional: its guess at a mask that ends the text
    run               the next four tokens, greedily: the share that is right before the first error

    python lab/attention.py                three seeds of both
    python lab/attention.py --steps 3000   three times as long

Three minutes on one CPU core. Needs only the village's documents, which the first run makes.
Read next: lab/rouge.py.
"""
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
from data import corpus
from data.text import draw_rows, read_corpus
from data.tokenizer import SPECIAL, get_tokenizer
from lab.cot import print_table, spread
from scaffold.cli import BaseConfig, pick_device, require, run_folder, start
from scaffold.optim import adamw, lr_at
from scaffold.run import log_metrics, set_seed, take_step


@dataclass
class Config(BaseConfig):
    steps: int = 1000            # optimizer steps of each model
    batch_tokens: int = 512      # tokens per step
    n_embd: int = 64             # width of both models; two layers, four heads
    lr: float = 4e-3             # peak learning rate, the same for both
    hide: float = 0.4            # share of tokens that the bidirectional model must guess; BERT
                                 # used 0.15, more teaches a small model faster
    n: int = 200                 # held-out documents
    seeds: int = 3               # repetitions with their own weights, order and held-out words
    seed: int = 0                # first seed


T = 64                                      # context of both; longer documents are cut into windows
RUN = 4                                     # tokens of the task "run"
MODELS = {"causal": True, "bidirectional": False}
TASKS = ("gap, left side", "gap, both sides", "next", "run")


def hidden(model, ids, segments, causal):
    """Return the states after the last LayerNorm: (B, T) -> (B, T, C).

    Without `causal`, every token attends to its whole segment, to the right as well.
    """
    if causal:
        return model.hidden(ids, segments=segments)
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))                # (B, T)
    positions = torch.arange(ids.shape[1], device=ids.device)                  # (T,)
    positions = positions - (positions * starts).cummax(1).values              # (B, T)
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]             # (B, 1, T, T)
    x = model.wte(ids) + model.wpe(positions)                                  # (B, T, C)
    for block in model.h:
        x = block(x, mask=mask)
    return model.ln_f(x)


def logits_of(model, ids, causal):
    """Return logits (B, T, V) of ids (B, T), one document per row, without padding."""
    return model.unembed(hidden(model, ids, torch.ones_like(ids), causal))


def hide_tokens(ids, real, share, mask_id, V, rng):
    """Choose a share of the real tokens and hide most of them: return (ids as shown, chosen).

    All tensors are (B, T). Of the chosen tokens, 80% become mask_id, 10% become a random token
    below V, and 10% stay. Devlin et al. (2019), section 3.1.
    """
    chosen = (torch.rand(ids.shape, generator=rng) < share) & real             # (B, T)
    u = torch.rand(ids.shape, generator=rng)                                   # (B, T)
    random_ids = torch.randint(0, V, ids.shape, generator=rng)                 # (B, T)
    shown = torch.where(chosen & (u < 0.8), torch.full_like(ids, mask_id), ids)
    return torch.where(chosen & (u >= 0.9), random_ids, shown), chosen


def masked_lm_loss(model, ids, segments, shown, chosen):
    """Return the cross-entropy of the chosen tokens of packed rows, all (B, T), seen as `shown`."""
    device = model.wte.weight.device
    states = hidden(model, shown.to(device), segments.to(device), causal=False)    # (B, T, C)
    logits = model.unembed(states[chosen.to(device)])                              # (N, V)
    return F.cross_entropy(logits.float(), ids[chosen].to(device))


def train(causal, sources, enc, cfg, seed, device):
    """Train a GPT for cfg.steps steps of next-token prediction, or of guessing hidden tokens."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(enc.n_vocab, T, 2, 4, cfg.n_embd)).to(device)
    optimizer = adamw(model, cfg.lr, 0.01)
    drawn = dict.fromkeys(sources, 0)   # tokens of each source so far
    rng = random.Random(seed)
    mask_rng = torch.Generator().manual_seed(seed)
    mask_id = mask_token(enc)
    name = "causal" if causal else "bidirectional"
    bar = tqdm(range(cfg.steps), desc=f"{name}, seed {seed}", mininterval=1)
    for step in bar:
        ids, segments = draw_rows(sources, drawn, cfg.batch_tokens, T, rng)    # (B, T) each
        if causal:
            loss = gpt.lm_loss(model, ids.to(device), segments.to(device))
        else:
            n_words = enc.n_vocab - len(SPECIAL)
            shown, chosen = hide_tokens(ids, segments > 0, cfg.hide, mask_id, n_words, mask_rng)
            loss = masked_lm_loss(model, ids, segments, shown, chosen)
        take_step(loss, optimizer, model, lr_at(step, cfg.steps, cfg.lr))
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def mask_token(enc):
    """Return the id that stands for a hidden token: no document of the village has <|system|>."""
    return enc.encode_single_token("<|system|>")


def is_word(enc, token):
    """Return whether a token is a whole word: a space and two or more letters."""
    text = enc.decode_single_token_bytes(token)
    return text[:1] == b" " and len(text) >= 3 and text[1:].isalpha()


class Gap(NamedTuple):
    """A held-out document (a list of ids) and the position of the word to find."""
    document: list
    place: int


def draw_gaps(sources, enc, n, rng):
    """Return n Gaps in the middle thirds of held-out documents, and the words to choose from.

    The choice is all words of all documents drawn, as sorted ids.
    """
    gaps = []
    candidates = set()
    names = list(sources)
    weights = [source.weight for source in sources.values()]
    while len(gaps) < n:
        name = rng.choices(names, weights)[0]
        document = rng.choice(sources[name].val)[:T].tolist()
        words = [t for t, token in enumerate(document) if is_word(enc, token)]
        candidates |= {document[t] for t in words}
        first = len(document) // 3
        last = min(2 * len(document) // 3, len(document) - RUN - 2)
        places = [t for t in words if first <= t <= last]
        if places and places[0] > 0:
            gaps.append(Gap(document, rng.choice(places)))
    return gaps, sorted(candidates)


@torch.no_grad()
def best_fit(model, ids, place, candidates):
    """Return the candidate that makes the whole document (1, T) likeliest for a causal model."""
    rows = ids.repeat(len(candidates), 1)                                      # (K, T)
    rows[:, place] = torch.tensor(candidates, device=ids.device)
    logprobs = [gpt.token_logprobs(model, part).sum(1) for part in rows.split(64)]
    return candidates[torch.cat(logprobs).argmax()]


def next_logits(model, causal, prefix, mask_id):
    """Return the logits (V,) of the token after a prefix.

    A bidirectional model reads them at a mask that ends the prefix.
    """
    ids = prefix if causal else prefix + [mask_id]
    return logits_of(model, torch.tensor([ids], device=model.wte.weight.device), causal)[0, -1]


def guesses(model, causal, gap, candidates, mask_id):
    """Return {task: the model's choice among the candidates} for every task except "run"."""
    def choose(logits):
        return candidates[logits[candidates].argmax()]

    ids = torch.tensor([gap.document], device=model.wte.weight.device)         # (1, T)
    next_word = choose(next_logits(model, causal, gap.document[:gap.place], mask_id))
    if causal:
        both_sides = best_fit(model, ids, gap.place, candidates)
        return {"gap, left side": next_word, "next": next_word, "gap, both sides": both_sides}
    ids[0, gap.place] = mask_id
    both_sides = choose(logits_of(model, ids, causal)[0, gap.place])
    return {"gap, both sides": both_sides, "next": next_word}


def run_score(model, causal, gap, mask_id):
    """Generate RUN tokens greedily; return the share of them before the first error."""
    ids = gap.document[:gap.place]
    for n, target in enumerate(gap.document[gap.place:gap.place + RUN]):
        token = next_logits(model, causal, ids, mask_id).argmax().item()
        if token != target:
            return n / RUN
        ids.append(token)
    return 1.0


@torch.no_grad()
def measure(model, causal, gaps, candidates, mask_id):
    """Return {task: share right} over the Gaps."""
    right = {}
    for gap in gaps:
        word = gap.document[gap.place]
        for task, guess in guesses(model, causal, gap, candidates, mask_id).items():
            right[task] = right.get(task, 0) + (guess == word)
        right["run"] = right.get("run", 0) + run_score(model, causal, gap, mask_id)
    return {task: n / len(gaps) for task, n in right.items()}


def verdict(rows):
    """Judge both halves of the claim in one sentence; each must be true for every seed."""
    def ahead(model, task, other, other_task):
        return all(r[model][task] > r[other][other_task] for r in rows)

    def holds(true):
        return "holds" if true else "does not hold"

    later = (ahead("causal", "next", "bidirectional", "next")
             and ahead("causal", "run", "bidirectional", "run"))
    one_pass = ahead("bidirectional", "gap, both sides", "causal", "gap, left side")
    all_words = ahead("bidirectional", "gap, both sides", "causal", "gap, both sides")
    return (f"The claim {holds(later)} here for what comes next, and {holds(one_pass)} here for "
            f"the gap in one pass; against a causal model that tries every word in the whole "
            f"document it {holds(all_words)}.")


def print_results(rows):
    """Print means and ranges over the seeds."""
    table = []
    for task in TASKS:
        line = {"share right": task}
        for name in MODELS:
            values = [r[name][task] for r in rows if task in r[name]]
            line[name] = spread(values, 3) if values else "-"
        table.append(line)
    print_table(table)


def main(cfg):
    require(cfg, 1, "steps", "batch_tokens", "n_embd", "n", "seeds")
    require(cfg, 0, "lr", most=10)
    require(cfg, 0.01, "hide", most=1)
    device = pick_device(cfg.device)
    out = run_folder(cfg.out)
    enc = get_tokenizer()
    folder = corpus.ensure(out / "data", cfg.seed) / "pretrain"
    sources = read_corpus(folder, enc, T, gpt.Config.val_fraction)
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        set_seed(seed)
        gaps, candidates = draw_gaps(sources, enc, cfg.n, random.Random(seed))
        row = {}
        for name, causal in MODELS.items():
            model = train(causal, sources, enc, cfg, seed, device)
            row[name] = measure(model, causal, gaps, candidates, mask_token(enc))
        rows.append(row)
        log_metrics(out / "lab-attention.jsonl", fresh=seed == cfg.seed, seed=seed, steps=cfg.steps,
                    words=len(candidates), **row)
    print(f"{cfg.n} held-out documents, {len(candidates)} words to choose from, "
          f"{cfg.steps * cfg.batch_tokens:,} tokens each, {cfg.seeds} seeds")
    print_results(rows)
    print(verdict(rows))


if __name__ == "__main__":
    start(main, Config, __doc__)
