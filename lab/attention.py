"""Causal against bidirectional attention: the same blocks, the same text, two ways to look.

Claim (Radford et al. 2018, Devlin et al. 2019, and every textbook since). A causal model (GPT) is better at saying what comes
next, without further training; a bidirectional one (BERT) is better at filling a gap, because it sees both sides of it.

Two small GPTs start from the same weights and read the same tokens of OUT/data/pretrain. One predicts every next token and sees the
left; the other sees everything, has 40% of the tokens hidden and guesses these (BERT's recipe: of the hidden 80% become a mask, 10% another
token, 10% stay; but BERT hid 15%: with few tokens to read, more lessons from each are better, Wettig et al. 2202.08005).
Then, on held-out documents, a word of the middle is to be found among all words of the vocabulary that documents have:

    gap, left side    causal: its prediction there, which cannot use the right side
    gap, both sides   bidirectional: its guess at a mask, one pass. Causal: the word that makes the whole document likeliest, as many
                      passes as there are words: the fair way to let a causal model see the right side
    next              the document ends before the word. Causal: its prediction; bidirectional: its guess at a mask that ends the text
    run               the next tokens one by one, greedily: how many of the document's next four come out right in a row

    python lab/attention.py                three seeds of both
    python lab/attention.py --steps 3000   three times as long

Three minutes on one CPU core. Needs nothing but the village's texts, made on the first run. Read next: lab/rouge.py.
"""
import random, sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
from data import corpus


@dataclass
class Config:
    out: str = "out"
    "folder of the run, whose data are read"
    steps: int = 1000
    "optimizer steps of each model"
    batch_tokens: int = 512
    "tokens per step"
    n_embd: int = 64
    "width of both models; two layers, four heads"
    lr: float = 4e-3
    "peak learning rate, the same for both"
    hide: float = 0.4
    "share of the tokens that the bidirectional model has to guess; BERT hid 0.15, more teaches a small model faster"
    n: int = 200
    "held-out documents"
    seeds: int = 3
    "repetitions: initial weights, order of the texts and held-out words; the table has mean and range"
    seed: int = 0
    "first seed"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


T = 64                                      # context of both; longer documents are cut into windows


def hidden(model, ids, segments, causal):
    """(B, T) -> (B, T, C): the states of a GPT whose attention looks to the left, or, not causal, to both sides of its segment."""
    if causal:
        return model.hidden(ids, segments=segments)
    fresh = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))                                    # (B, T)
    positions = torch.arange(ids.shape[1], device=ids.device)
    positions = positions - (positions * fresh).cummax(1).values                                  # (B, T)
    x = model.wte(ids) + model.wpe(positions)                                                     # (B, T, C)
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]                                # (B, 1, T, T), no tril
    for block in model.h:
        x = block(x, mask=mask)
    return model.ln_f(x)


def logits_of(model, ids, causal):
    """One text per row, no padding: (B, T) -> (B, T, V)."""
    return F.linear(hidden(model, ids, torch.ones_like(ids), causal), model.wte.weight)


def hide_tokens(ids, real, share, mask_id, V, rng):
    """-> (ids with some hidden, where): of the chosen tokens 80% become mask_id, 10% any token, 10% stay. Devlin et al., 3.1."""
    chosen = (torch.rand(ids.shape, generator=rng) < share) & real                                # (B, T)
    fate = torch.rand(ids.shape, generator=rng)
    anything = torch.randint(0, V, ids.shape, generator=rng)
    shown = torch.where(chosen & (fate < 0.8), torch.full_like(ids, mask_id), ids)
    return torch.where(chosen & (fate >= 0.9), anything, shown), chosen


def train(causal, sources, enc, cfg, seed, device):
    """A GPT after cfg.steps steps of next-token prediction, or of guessing hidden tokens."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(enc.n_vocab, T, 2, 4, cfg.n_embd)).to(device)
    optimizer, odds, rng = gpt.adamw(model, cfg.lr, 0.01), gpt.document_odds(sources, T), random.Random(seed)
    masks, mask_id = torch.Generator().manual_seed(seed), enc._special_tokens["<|system|>"]        # no text of the village has it
    for step in (bar := tqdm(range(cfg.steps), desc=f"{'causal' if causal else 'bidirectional'}, seed {seed}", mininterval=1)):
        ids, segments = gpt.pack(gpt.draw_documents(sources, odds, cfg.batch_tokens, T, rng)[0], T)    # (B, T) each
        if causal:
            loss = gpt.lm_loss(model, ids.to(device), segments.to(device))
        else:
            shown, chosen = hide_tokens(ids, segments > 0, cfg.hide, mask_id, len(enc._mergeable_ranks), masks)
            states = hidden(model, shown.to(device), segments.to(device), False)[chosen.to(device)]    # (N, C)
            loss = F.cross_entropy(F.linear(states, model.wte.weight).float(), ids[chosen].to(device))
        gpt.take_step(loss, optimizer, model, gpt.lr_at(step, cfg.steps, cfg.lr))
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def is_word(enc, token):
    text = enc.decode_single_token_bytes(token)
    return text[:1] == b" " and len(text) >= 3 and text[1:].isalpha()


def questions(sources, enc, n, rng):
    """-> [(ids of a held-out document, the place of a word in its middle third)], and all word tokens that documents have there."""
    asked, candidates = [], set()
    names, odds = list(sources), gpt.document_odds(sources, T)
    while len(asked) < n:
        document = rng.choice(sources[rng.choices(names, odds)[0]][1])[:T].tolist()
        places = [t for t in range(len(document) // 3, len(document) - 5) if t <= 2 * len(document) // 3 and is_word(enc, document[t])]
        candidates |= {i for i in document if is_word(enc, i)}
        if places and places[0] > 0:
            asked.append((document, rng.choice(places)))
    return asked, sorted(candidates)


@torch.no_grad()
def best_fit(model, ids, place, candidates):
    """The candidate that makes a causal model's likelihood of the whole text largest when it stands at `place`."""
    rows = ids.repeat(len(candidates), 1)                                     # (K, T)
    rows[:, place] = torch.tensor(candidates, device=ids.device)
    return candidates[torch.cat([gpt.token_logprobs(model, r).sum(1) for r in rows.split(64)]).argmax()]


@torch.no_grad()
def answers(model, causal, asked, candidates, mask_id):
    """-> {task: share right}. Every answer is a word of the candidates, but for the run, which may be any token."""
    device, right = model.wte.weight.device, {}

    def guess(logits):
        return candidates[logits[candidates].argmax()]

    for document, place in asked:
        ids, word = torch.tensor([document], device=device), document[place]
        prefix, rest = document[:place], document[place:place + 4]
        hints = {}
        if causal:
            hints["gap, left side"] = hints["next"] = guess(logits_of(model, ids[:, :place], True)[0, -1])
            hints["gap, both sides"] = best_fit(model, ids, place, candidates)
        else:
            gap = ids.clone()
            gap[0, place] = mask_id
            hints["gap, both sides"] = guess(logits_of(model, gap, False)[0, place])
            hints["next"] = guess(logits_of(model, torch.tensor([prefix + [mask_id]], device=device), False)[0, -1])
        for task, found in hints.items():
            right[task] = right.get(task, 0) + (found == word)
        said = []
        for _ in rest:
            text = prefix + said + ([] if causal else [mask_id])
            said.append(logits_of(model, torch.tensor([text], device=device), causal)[0, -1].argmax().item())
        right["run"] = right.get("run", 0) + next((i for i, (a, b) in enumerate(zip(said, rest)) if a != b), len(rest)) / len(rest)
    return {task: n / len(asked) for task, n in right.items()}


def verdict(runs):
    """Both halves of the claim, each put to the numbers of all seeds."""
    def ahead(one, task, other, other_task):
        return all(r[one][task] > r[other][other_task] for r in runs)

    def says(true):
        return "holds" if true else "does not hold"
    gap = "gap, both sides"
    later = ahead("causal", "next", "bidirectional", "next") and ahead("causal", "run", "bidirectional", "run")
    left, both = ahead("bidirectional", gap, "causal", "gap, left side"), ahead("bidirectional", gap, "causal", gap)
    return (f"The claim {says(later)} here for what comes next, and {says(left)} here for the gap in one pass; against a causal model that "
            f"tries every word in the whole document it {says(both)}.")


def main(cfg):
    gpt.require(cfg, 1, "steps", "batch_tokens", "n_embd", "n", "seeds")
    gpt.require(cfg, 0, "lr", most=10)
    gpt.require(cfg, 0.01, "hide", most=1)
    device, out, enc = gpt.pick_device(cfg.device), gpt.run_folder(cfg.out), gpt.get_tokenizer()
    sources = gpt.read_corpus(corpus.ensure(out / "data", cfg.seed) / "pretrain", enc, T, gpt.Config.val_fraction)
    runs = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        gpt.set_seed(seed)
        asked, candidates = questions(sources, enc, cfg.n, random.Random(seed))
        runs.append({})
        for name, causal in (("causal", True), ("bidirectional", False)):
            model = train(causal, sources, enc, cfg, seed, device)
            runs[-1][name] = answers(model, causal, asked, candidates, enc._special_tokens["<|system|>"])
        gpt.log_metrics(out / "lab-attention.jsonl", seed=seed, steps=cfg.steps, words=len(candidates), **runs[-1])
    print(f"{cfg.n} held-out documents, {len(candidates)} words to choose from, {cfg.steps * cfg.batch_tokens:,} tokens each, {cfg.seeds} seeds\n"
          f"{'share right':20}{'causal':>24}{'bidirectional':>24}")
    for task in ("gap, left side", "gap, both sides", "next", "run"):
        cells = [[r[name][task] for r in runs if task in r[name]] for name in ("causal", "bidirectional")]
        print(f"{task:20}" + "".join(f"{f'{sum(c) / len(c):.3f} ({min(c):.3f} to {max(c):.3f})' if c else '-':>24}" for c in cells))
    print(verdict(runs))


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
