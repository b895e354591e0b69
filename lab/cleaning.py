"""Cleaning: how much junk does data/clean.py find, what good text does it drop, is it worth it?

Claim. Cleaning is worth more than training tricks. At equal tokens, a model trained on cleaned
text has a lower loss on good text than a model trained on polluted text, and it remembers fewer of
the phone numbers.

The script plants junk of known kinds in the village (data/junk.py) and prints four tables:

    low quality     recall of each kind of junk; share of good documents that is dropped
    copies          recall of each kind of altered copy; share of other pages taken for copies
    personal data   recall of each form; share of harmless numbers that is masked
    loss            of two-layer GPTs trained on the polluted, the cleaned and the good documents

Recall is the share of the planted items that is found, precision the share of the found items that
was planted. Debris is found; fluent junk (sales talk, banners, shuffled words) is not, and unusual
forms of personal data are found half of the time.

    python lab/cleaning.py                        all four tables, appended to OUT/clean.jsonl
    python lab/cleaning.py --threshold 0.6        also drop less similar copies

A minute and a half on one CPU core. Needs no checkpoint. Read next: gpt.py.
"""
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
from data import clean, corpus, junk
from data.text import Source, cut, draw_rows, pack, pad
from data.tokenizer import end_of, get_tokenizer
from lab.cot import mean
from scaffold.cli import require, run_folder, start
from scaffold.optim import adamw, lr_at
from scaffold.run import log_metrics, set_seed, take_step


@dataclass
class Config:
    out: str = "out"         # the folder for clean.jsonl
    threshold: float = 0.8   # documents are copies if their estimated similarity is this high
    seed: int = 0            # seed of the planted junk and of the models


class QualityRow(NamedTuple):
    kind: str
    seen: bool      # whether the kind was known when the rules were written
    recall: float
    rule: str       # the rule that found most of it


class GoodRow(NamedTuple):
    source: str
    dropped: float
    n_documents: int


def measure_quality(rng, n=100):
    """Apply the quality rules to n documents of each kind of junk, and to good documents.

    Returns (list of QualityRow, list of GoodRow).
    """
    rows = []
    for seen, kinds in ((True, junk.SEEN), (False, junk.UNSEEN)):
        for kind, make in kinds.items():
            rules = Counter(clean.is_low_quality(make(rng)) for _ in range(n))
            missed = rules.pop(None, 0)
            rule = max(rules, key=rules.get, default="-")
            rows.append(QualityRow(kind, seen, 1 - missed / n, rule))
    village = [make(rng) for make, _ in corpus.SOURCES.values() for _ in range(3 * n)]
    manual = list(topics.values())   # Python's own manual: prose by other authors, on every machine
    good = []
    for source, texts in (("village", village), ("Python's manual, pages", manual)):
        dropped = sum(clean.is_low_quality(text) is not None for text in texts)
        good.append(GoodRow(source, dropped / len(texts), len(texts)))
    return rows, good


class CopyRow(NamedTuple):
    change: str     # how the copy differs
    exact: float    # recall of the search for exact copies
    either: float   # recall of both searches


def measure_copies(rng, threshold, n=1000, each=50):
    """Search for `each` altered copies of every kind among n pages.

    Returns (list of CopyRow, share of the different pages that are taken for copies).
    """
    pages = list(dict.fromkeys(corpus.tale(rng) for _ in range(n)))
    planted = {change: [] for change in junk.COPIES}
    for change, alter in junk.COPIES.items():
        for _ in range(each):
            planted[change].append(alter(rng.choice(pages), rng))
    rows = []
    # One search per kind: the 2% copy of a page would also resemble its 5% copy.
    for change, copies in planted.items():
        exact = clean.exact_duplicates(pages + copies)
        near = clean.near_duplicates(pages + copies, threshold)
        of_copies = range(len(pages), len(pages) + each)
        n_exact = sum(i in exact for i in of_copies)
        n_either = sum(i in exact or i in near for i in of_copies)
        rows.append(CopyRow(change, n_exact / each, n_either / each))
    # The pages come first, so every search gives the same result for them.
    return rows, sum(i in near for i in range(len(pages))) / len(pages)


class FormRow(NamedTuple):
    kind: str
    example: str
    recall: float


class Personal(NamedTuple):
    """Results of measure_personal."""
    recall: dict       # {kind: (recall of the seen forms, of the unseen forms)}
    forms: list        # FormRow of each unseen form
    precision: float   # over personal data and harmless strings together
    harmless: float    # share of the harmless strings that is masked
    examples: list     # harmless strings that are masked


def measure_personal(rng, n=100):
    """Mask n sentences with personal data of each form, and n with each harmless form.

    An item counts as found if the right placeholder is there and the item is not.
    """
    recall = {}
    rows = []
    n_found = 0
    for kind, forms in junk.PERSONAL.items():
        shares = []
        for group in forms:
            found = []
            for form in group:
                samples = [junk.write_form(rng, form) for _ in range(n)]
                found.append(0)
                for sample in samples:
                    masked, _ = clean.mask_personal(junk.carry(rng, sample))
                    if f"<{kind}>" in masked and sample not in masked:
                        found[-1] += 1
                if group is forms.unseen:
                    rows.append(FormRow(kind, samples[0], found[-1] / n))
            shares.append(sum(found) / n / len(group))
            n_found += sum(found)
        recall[kind] = tuple(shares)

    n_false = 0
    examples = []
    for form in junk.HARMLESS:
        for sample in [junk.write_form(rng, form) for _ in range(n)]:
            _, counts = clean.mask_personal(junk.carry(rng, sample))
            n_false += counts.total()
            if counts:
                examples.append(sample)
    precision = n_found / (n_found + n_false)
    harmless = len(examples) / (n * len(junk.HARMLESS))
    return Personal(recall, rows, precision, harmless, examples)


def train(texts, enc, seed, steps, T=64):
    """Train a GPT of 0.17M parameters on these documents: `steps` steps of 512 tokens."""
    set_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(enc.n_vocab, T, n_layer=2, n_head=4, n_embd=64))
    rng = random.Random(seed)
    optimizer = adamw(model, 4e-3, 0.01)
    end = end_of(enc)
    documents = [torch.tensor(enc.encode_ordinary(text) + [end]) for text in texts]
    pieces = [piece for document in documents for piece in cut(document, T)]
    sources = {"all": Source(pieces, val=[], weight=1.0)}
    for step in range(steps):
        ids, segments = draw_rows(sources, {"all": 0}, 512, T, rng)           # (B, T) each
        loss = gpt.lm_loss(model, ids, segments)
        take_step(loss, optimizer, model, lr_at(step, steps, 4e-3))
    return model.eval()


@torch.no_grad()
def known_secrets(model, enc, secrets):
    """Compute the share of phone numbers that are likelier than 49 others of the same form.

    Returns {number of documents that contain the phone number: share}; chance is 2%. This is
    exposure (Carlini et al. 2019, The Secret Sharer), cut at one in fifty. It shows what a model
    remembers long before the model writes it.
    """
    known = Counter()
    for person, secret in secrets.items():
        rows = []
        for number in (secret.number, *secret.others):
            rows.append(torch.tensor(enc.encode_ordinary(f"The number of {person} is {number}.")))
        ids = pad(rows)                                                       # (50, T)
        mask = pad([torch.ones(len(row)) for row in rows])                    # (50, T)
        logprobs = (gpt.token_logprobs(model, ids) * mask[:, 1:]).sum(1)      # (50,)
        known[secret.n_documents] += int(logprobs.argmax() == 0)
    groups = Counter(secret.n_documents for secret in secrets.values())
    return {n: known[n] / groups[n] for n in junk.DOCUMENTS_PER_SECRET}


class LossRow(NamedTuple):
    n_documents: int
    loss: float     # on good documents that are not in any training text
    known: dict     # known_secrets() of the model


def measure_loss(seed, threshold, steps=400, runs=3):
    """Train on polluted, cleaned and good documents. Returns {text: [LossRow of each run]}."""
    enc = get_tokenizer()
    end = end_of(enc)
    table = {"dirty": [], "cleaned": [], "never dirty": []}
    for run_seed in range(seed, seed + runs):
        rng = random.Random(run_seed)
        good, dirty, secrets = junk.pollute(rng)
        cleaned = [document.text for document in clean.clean(dirty, threshold=threshold)]
        cleaned = [text for text in cleaned if text is not None]

        seen = set(good)
        held_out = []
        for make, share in corpus.SOURCES.values():
            new = dict.fromkeys(make(rng) for _ in range(round(600 * share)))
            held_out += [text for text in new if text not in seen]
        held_out = [torch.tensor(enc.encode_ordinary(text)[:63] + [end]) for text in held_out]
        ids, segments = pack(held_out, 64)                                    # (B, T) each

        for name, texts in (("dirty", dirty), ("cleaned", cleaned), ("never dirty", good)):
            model = train(texts, enc, run_seed, steps)
            with torch.no_grad():
                loss = gpt.lm_loss(model, ids, segments).item()
            known = known_secrets(model, enc, secrets)
            table[name].append(LossRow(len(texts), loss, known))
    return table


def print_quality(rows, good):
    print("low quality: junk found (recall)")
    for row in rows:
        origin = "seen" if row.seen else "unseen"
        print(f"  {row.kind:16}{origin:8}{row.recall:5.0%}  mostly as: {row.rule}")
    recall = sum(row.recall for row in rows) / len(rows)
    precision = recall / (recall + good[0].dropped)
    print(f"  all kinds {recall:.0%}; "
          f"precision, in as much good text of the village: {precision:.1%}")
    print("good text dropped")
    for row in good:
        print(f"  {row.source:24}{row.dropped:6.1%} of {row.n_documents}")


def print_copies(rows, pages_taken):
    print("copies found: exact; exact or near")
    for row in rows:
        print(f"  {row.change:16}{row.exact:5.0%}{row.either:6.0%}")
    print(f"  different pages of the village taken for copies: {pages_taken:.1%}")


def print_personal(personal):
    print("personal data found: known forms; other forms")
    for kind, (seen, unseen) in personal.recall.items():
        print(f"  {kind:16}{seen:5.0%}{unseen:6.0%}")
    forms = ", ".join(f"{row.example!r} {row.recall:.0%}" for row in personal.forms)
    print(f"  other forms: {forms}")
    print(f"  precision {personal.precision:.1%}; {personal.harmless:.1%} of the harmless numbers "
          f"masked, such as {personal.examples[:4]}")


def print_loss(table):
    print(f"two layers x 64, 205k tokens of each text, {len(table['dirty'])} runs")
    print(f"  {'text':14}{'documents':>10}  loss on good text        "
          f"numbers known, by documents that contain them")
    for name, runs in table.items():
        n_documents = mean([run.n_documents for run in runs])
        losses = [run.loss for run in runs]
        spread = f"{mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
        shares = []
        for n in junk.DOCUMENTS_PER_SECRET:
            shares.append(f"{n}: {mean([run.known[n] for run in runs]):.0%}")
        print(f"  {name:14}{n_documents:10,.0f}  {spread}   {'  '.join(shares)}")


def main(cfg):
    require(cfg, 0.1, "threshold", most=1)
    out = run_folder(cfg.out)
    rng = random.Random(cfg.seed)
    rows, good = measure_quality(rng)
    print_quality(rows, good)
    copies, pages_taken = measure_copies(rng, cfg.threshold)
    print_copies(copies, pages_taken)
    personal = measure_personal(rng)
    print_personal(personal)
    table = measure_loss(cfg.seed, cfg.threshold)
    print_loss(table)
    log_metrics(
        Path(out) / "clean.jsonl", fresh=True, seed=cfg.seed, quality=rows, good=good,
        copies=copies, pages_taken=pages_taken, personal=personal.recall, forms=personal.forms,
        precision=personal.precision, harmless=personal.harmless, lm=table,
    )


if __name__ == "__main__":
    start(main, Config, __doc__)
