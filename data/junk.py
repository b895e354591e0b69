"""Planted junk: how much of it does data/clean.py find, how much good text does it take along, and what is cleaning worth?

Nothing here shares a word list, a pattern or a helper with data/clean.py: a filter measured on its own rules would be perfect.
The kinds in SEEN were known when the rules were made; those in UNSEEN were planted once the rules stood, and whatever then led to a
repair counts as seen. So the numbers to believe are those of the unseen: debris is found, but fluent junk (sales talk, banners,
shuffled words) is not, and personal data in unusual dress is found half of the time.

    python data/clean.py                             this measure: tables of what is found, then the loss of two small GPTs
    python data/junk.py                              print two of each kind

Recall: share of the planted that is found. Precision: share of the found that is planted. Read next: gpt.py.
"""
import ipaddress, json, random, sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
from data import clean, corpus, village

SALE = "watches pills loans casino bitcoin handbags slots crypto viagra shoes rolex poker insurance diet hosting seo".split()
SITE = "Home,About us,Products,News,Blog,Contact,Careers,FAQ,Imprint,Sitemap,Help,My account,Basket,Wishlist,Stores,Press".split(",")
ROMAN = "quis nostrud dolor sit amet consectetur adipiscing elit sed eiusmod tempor incididunt labore dolore magna aliqua enim minim".split()
RUSSIAN = "дом вода лес старый красный мост корова молоко хлеб идёт стоит большой вечером утром через речку вместе".split()
GERMAN = ["Der {a} lebt in einem alten Haus am See.", "Heute war der {a} sehr müde und ging früh nach Hause.", "Niemand wusste, wo der {a} war.",
          "Am Abend kam {p} und brachte frisches Brot.", "{p} sagte, dass alles wieder gut werde.", "Die Kinder lachten laut über den {a}."]
PITCH = ["You will not believe how little you pay for our {s} this week.", "Thousands of happy buyers trust us with their {s}.",
         "Why wait? The best {s} in town are gone by tonight.", "Tell your friends about our {s} and you both save money.",
         "We have been the home of good {s} for twenty years."]
CHINESE_PITCH = ["正品{s}低价批发", "加微信领取优惠", "全国包邮货到付款", "名额有限先到先得", "{s}代理招商加盟", "日赚千元轻松兼职", "老客户专享折扣"]
BANNER = ["We and our 742 partners store and access information on a device.", "You can change your mind at any time.",
          "Some vendors may process your data on the basis of legitimate interest.", "Manage choices. Reject. Agree and close."]


def mash(rng, letters, low, high):
    return "".join(rng.choice(letters) for _ in range(rng.randint(low, high)))


def page(rng):
    """A few sentences of the village in one document: what most of the debris stands around."""
    return corpus.tale(rng)


def html(rng):
    p = [f'<div class="c{rng.randrange(99)}"><a href="/{rng.choice(SALE)}">{s}</a></div>' for s in page(rng).split(". ")]
    return "\n".join(["<html><body>", *p, "<script>var q=[];q.push(1)</script></body></html>"])


def loop(rng):
    """The same sentence with a running number: no line is repeated, and nothing is said."""
    food = rng.choice(village.WORDS["food"])
    return " ".join(f"The {food} costs {i} coins." for i in range(1, rng.randint(15, 40)))


def shuffled(rng):
    w = page(rng).split()
    rng.shuffle(w)
    return " ".join(w)


def log(rng):
    return "\n".join(f"[{rng.randint(10, 23)}:{rng.randint(10, 59)}:{rng.randint(10, 59)}] GET /{rng.choice(SALE)}/{rng.randrange(9999)} "
                     f"{rng.choice([200, 304, 404])} {rng.randrange(99999)}" for _ in range(rng.randint(5, 12)))


SEEN = dict(
    punctuation=lambda rng: " ".join(mash(rng, "#*=~-_/|\\^%$@!?<>+.ab", 1, 9) for _ in range(30)),
    mashed_keys=lambda rng: " ".join(mash(rng, "asdfghjklqwertyuiopzxcvbnm", 2, 9) for _ in range(30)),
    html=html,
    stuck_sentence=lambda rng: "\n".join([rng.choice(page(rng).split(". "))] * rng.randint(4, 20)),
    keywords=lambda rng: " ".join(["cheap " + rng.choice(SALE) for _ in range(rng.randint(8, 30))]),
    filler=lambda rng: " ".join(rng.choice(ROMAN) for _ in range(40)) + ".",
    russian=lambda rng: " ".join(rng.choice(RUSSIAN) for _ in range(30)) + ".",
    stub=lambda rng: " ".join(rng.sample(SITE, rng.randint(1, 2))))
UNSEEN = dict(
    menu=lambda rng: "\n".join(rng.sample(SITE, rng.randint(6, 14))),
    log=log,
    json=lambda rng: json.dumps({rng.choice(SALE): rng.randrange(999), "items": rng.sample(village.WORDS["animal"], 3), "id": uuid(rng)}),
    base64=lambda rng: "\n".join(mash(rng, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", 60, 60) for _ in range(6)),
    syllables=lambda rng: " ".join("".join(mash(rng, "bdfgklmnprstv", 1, 1) + mash(rng, "aeiou", 1, 1)
                                           for _ in range(rng.randint(1, 4))) for _ in range(40)) + ".",
    german=lambda rng: " ".join(rng.sample(GERMAN, 4)).format(a=rng.choice(["Hund", "Bauer", "Müller"]), p=rng.choice(["Anna", "Jonas"])),
    loop=loop,
    mojibake=lambda rng: page(rng).replace("a", "ä").replace("e", "é").encode().decode("latin-1"),
    split_letters=lambda rng: " ".join(page(rng).replace(" ", "_"))[:200],
    banner=lambda rng: " ".join(rng.sample(BANNER, 3)),
    pitch=lambda rng: " ".join(rng.sample(PITCH, 3)).format(s=rng.choice(SALE)),
    chinese_pitch=lambda rng: "，".join(rng.sample(CHINESE_PITCH, 5)).format(s=rng.choice(["手表", "皮包", "香水"])) + "！",
    shuffled=shuffled)


def swapped(rate):
    def change(text, rng):
        w = text.split()
        pool = [x for words in village.WORDS.values() for x in words]
        for i in rng.sample(range(len(w)), max(1, round(rate * len(w)))):
            w[i] = rng.choice(pool)
        return " ".join(w)
    return change


def moved(text, rng):
    w = text.split()
    return " ".join(w[len(w) // 2:] + w[:len(w) // 2])


# How a page of a mirror differs from the page; what share of its words changes is in the name.
COPIES = {"exact": lambda text, rng: text, "case, spaces": lambda text, rng: text.upper().replace(". ", " .\n"),
          "swap 2%": swapped(0.02), "swap 5%": swapped(0.05), "swap 10%": swapped(0.1), "swap 20%": swapped(0.2),
          "cut to 90%": lambda text, rng: " ".join(text.split()[:int(0.9 * len(text.split()))]),
          "halves exchanged": moved,
          "frame added": lambda text, rng: f"{rng.choice(SITE)} > {rng.choice(SITE)}\n{text}\nPosted by {who(rng)}, page {rng.randrange(99)}"}


def card(rng, prefix, length):
    """A number with a right check digit, found by trying all ten: no formula in common with the filter."""
    body = prefix + mash(rng, "0123456789", length - len(prefix) - 1, length - len(prefix) - 1)
    double = {str(d): (2 * d - 9 if d > 4 else 2 * d) for d in range(10)}
    total = {c: sum(double[x] if i % 2 else int(x) for i, x in enumerate((body + c)[::-1])) for c in "0123456789"}
    return next(body + c for c in total if total[c] % 10 == 0)


def resident_id(rng):
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)          # as GB 11643 prints them
    body = f"{rng.choice([110101, 310104, 440305])}{rng.randint(1950, 2005)}{rng.randint(10, 12)}{rng.randint(10, 28)}{rng.randint(100, 999)}"
    return body + "10X98765432"[sum(w * int(d) for w, d in zip(weights, body)) % 11]


def who(rng):
    return mash(rng, "aeiou", 1, 1) + mash(rng, "bdlmnr", 1, 1) + mash(rng, "aeiouln", 3, 5)


def written(rng, form):
    """A form as text: a function makes its own; in a string '~' is a name, '9' a digit from 2 on, '#' any digit, the rest itself."""
    if not isinstance(form, str):
        return form(rng)
    draw = {"~": lambda: who(rng), "9": lambda: rng.choice("23456789"), "#": lambda: rng.choice("0123456789")}
    return "".join(draw[c]() if c in draw else c for c in form)


def grouped(digits, sizes, sep):
    it = iter(digits)
    return sep.join("".join(next(it) for _ in range(n)) for n in sizes)


def iban(rng):
    body = mash(rng, "0123456789", 18, 18)
    return next(f"DE{k:02d}{body}" for k in range(2, 99) if int(f"{body}1314{k:02d}") % 97 == 1)  # D is 13, E is 14


def visa(sep):
    return lambda rng: grouped(card(rng, "4", 16), (4, 4, 4, 4), sep)


def ip(template="{}.{}.{}.{}"):
    return lambda rng: template.format(rng.randint(11, 223), rng.randrange(256), rng.randrange(256), rng.randint(10, 255))


def day(template):
    return lambda rng: template.format(d=rng.randint(10, 28), m=rng.randint(10, 12), y=rng.randint(1980, 2030), h=rng.randint(10, 23), s=rng.randint(10, 59))


def uuid(rng):
    return "-".join(mash(rng, "0123456789abcdef", n, n) for n in (8, 4, 4, 4, 12))


# Personal data by the placeholder it should become: the forms that were known when the patterns were made, and others.
PERSONAL = {
    "EMAIL": (["~@~.org", "~ [at] ~ [dot] com"], ["~ AT ~ DOT com", "~@~ . com", "~(a)~.net", "~.~@mail.~.co.uk", "~ @ ~.org"]),
    "PHONE": (["(9##) 9##-####", "+44 20 #### ####", "138########", "9## 9## ####"],
              ["9##-9##-#### ext. ##", "9 # # 9 # # # # # #", "9##9######", "015## / #######", "+33.6.##.##.##.##"]),
    "CARD": ([visa(" "), lambda rng: card(rng, "52", 16)],
             [lambda rng: grouped(card(rng, "37", 15), (4, 6, 5), " "), visa("."), visa("-"), visa("  ")]),
    "ID": ([resident_id, "2##-9#-9###"],
           [iban, lambda rng: grouped(iban(rng), (4, 4, 4, 4, 4, 2), " "), lambda rng: grouped(resident_id(rng), (6, 8, 4), " "), "2##9#9###"]),
    "IP": ([ip(), lambda rng: str(ipaddress.IPv6Address(rng.getrandbits(128))), lambda rng: f"2001:db8::{rng.randrange(1, 65536):x}"],
           [ip("http://{}.{}.{}.{}:8080/"), ip("{}[.]{}[.]{}[.]{}"), ip("::ffff:{}.{}.{}.{}")])}
# What looks like it and must stay. All were known.
HARMLESS = ["$9,###.##", "9,###,###,###", "19##-20##", day("{y}-{m}-{d}"), day("{d}/{m}/{y}"), day("{d}.{m}.{y}, {h}:{s}"), "9.##.#", "v9.#.#.#",
            "version 10.0.1####.9##", "order 9##-#######-#######", "ISBN 978-3-##-######-#", "#99#99#99#99", "17########", "17###########",
            "48.####, 11.####", "9#:9#, 9#:9#, 9:1#", "AB-####-#####", "300.9##.400.1", "9## ### ###", uuid, day("{h}:{s}:{s}"), "3.1415#265358#7#",
            "std::map<a::b>", "pp. 1##-1##, 2##-2##", "10.1000/9##.####", "~ at noon. Then ~", "@~", "9### 9### 9### 9###"]
CARRIERS = ["{p} wrote: {x} and went home.", "For the {t}, {p} left {x} at the inn.", "{x} belongs to {p}.", "Ask {p} about the {t} ({x}).", "{p}有{x}。"]


def carried(rng, x):
    return rng.choice(CARRIERS).format(p=rng.choice(village.WORDS["person"]), t=rng.choice(village.WORDS["thing"]), x=x)


def measure_quality(rng, n=100):
    """-> rows (kind, known to the rules?, recall, the rule that found most), and (text, share dropped) for good texts."""
    rows = []
    for known, kinds in ((True, SEEN), (False, UNSEEN)):
        for name, make in kinds.items():
            found = Counter(clean.is_low_quality(make(rng)) for _ in range(n))
            rows.append((name, known, 1 - found.pop(None, 0) / n, max(found, key=found.get, default="-")))
    from pydoc_data.topics import topics   # prose that nobody here wrote, on every machine: Python's own manual
    good = {"village": [make(rng) for make, _ in corpus.SOURCES.values() for _ in range(3 * n)],
            "Python's manual, pages": list(topics.values())}
    return rows, [(k, sum(clean.is_low_quality(t) is not None for t in texts) / len(texts), len(texts)) for k, texts in good.items()]


def measure_copies(rng, threshold, n=1000, each=50):
    """-> rows (how a copy differs, found as exact, found as exact or near), and the share of n different pages taken for copies."""
    pages = list({corpus.tale(rng) for _ in range(n)})
    planted = [(name, change(rng.choice(pages), rng)) for name, change in COPIES.items() for _ in range(each)]
    # One look per kind: else the 2% copy of a page would also be near its 5% copy.
    rows = []
    for name in COPIES:
        texts = pages + [text for kind, text in planted if kind == name]
        exact, near = clean.exact_duplicates(texts), clean.near_duplicates(texts, threshold)
        found = [(i in exact, i in exact or i in near) for i in range(len(pages), len(texts))]
        rows.append((name, *(sum(f) / len(found) for f in zip(*found))))
    return rows, sum(i in near for i in range(len(pages))) / len(pages)


def measure_personal(rng, n=100):
    """-> {kind: (recall of known forms, of other forms)}, [(kind, example, recall) of each other form], precision over all of it,
    share of the harmless numbers masked, those masked. Found means: the right placeholder is there, and the number is not."""
    recall, forms, hits = {}, [], 0
    for kind, both in PERSONAL.items():
        shares = []
        for known, group in zip((True, False), both):
            found = []
            for form in group:
                samples = [written(rng, form) for _ in range(n)]
                masked = [clean.mask_personal(carried(rng, x))[0] for x in samples]
                found.append([f"<{kind}>" in m and x not in m for x, m in zip(samples, masked)])
                if not known:
                    forms.append((kind, samples[0], sum(found[-1]) / n))
            shares.append(sum(map(sum, found)) / n / len(group))
            hits += sum(map(sum, found))
        recall[kind] = tuple(shares)
    wrong = [(x, sum(clean.mask_personal(carried(rng, x))[1].values())) for form in HARMLESS for x in [written(rng, form) for _ in range(n)]]
    false = sum(k for _, k in wrong)
    return recall, forms, hits / (hits + false), sum(k > 0 for _, k in wrong) / len(wrong), [x for x, k in wrong if k]


SECRETS = (1, 8, 64)                        # in how many documents a phone number stands


def pollute(rng, n_good=2500):
    """-> (good documents, the same with as much junk, copies and personal data, {person: (number, documents with it, other numbers)})."""
    good = list({make(rng) for make, share in corpus.SOURCES.values() for _ in range(round(2 * share * n_good))})
    rng.shuffle(good)
    good, size = good[:n_good], sum(map(len, good[:n_good]))
    secrets = {}
    for k in [k for k in SECRETS for _ in range(12)]:
        form = rng.choice(sum(PERSONAL["PHONE"], []))
        secrets[who(rng).capitalize() + who(rng)] = written(rng, form), k, [written(rng, form) for _ in range(49)]
    dirty = good + [f"{rng.choice(page(rng).split('. '))}. The number of {name} is {x}."
                    for name, (x, k, _) in secrets.items() for _ in range(k)]
    pages = [t for t in good if len(t.split()) > 20]
    added, kinds = 0, list((SEEN | UNSEEN).values())
    while added < size:
        text = rng.choice(kinds)(rng) if rng.random() < 0.6 else rng.choice(list(COPIES.values()))(rng.choice(pages), rng)
        dirty.append(text)
        added += len(text)
    rng.shuffle(dirty)
    return good, dirty, secrets


def train(texts, enc, seed, steps, T=64):
    """A GPT of 0.17M parameters after `steps` steps of 512 tokens of these documents."""
    gpt.set_seed(seed)
    model, rng = gpt.GPT(gpt.GPTConfig(enc.n_vocab, T, 2, 4, 64)), random.Random(seed)
    optimizer = gpt.adamw(model, 4e-3, 0.01)
    sources = {"all": ([torch.tensor(enc.encode_ordinary(t) + [gpt.end_of(enc)]) for t in texts], [], 1.0)}
    for step in range(steps):
        drawn, _ = gpt.draw_documents(sources, [1], 512, T, rng)
        gpt.take_step(gpt.lm_loss(model, *gpt.pack(drawn, T)), optimizer, model, gpt.lr_at(step, steps, 4e-3))
    return model.eval()


@torch.no_grad()
def known(model, enc, secrets):
    """{documents with the number: share of the persons whose number the model finds likelier than 49 others of its form}.

    2% by chance. This is exposure (Carlini et al. 2019, The Secret Sharer), cut at one in fifty: it shows what a model remembers long
    before it says it aloud.
    """
    first = Counter()
    for name, (x, k, others) in secrets.items():
        rows = [torch.tensor(enc.encode_ordinary(f"The number of {name} is {y}.")) for y in (x, *others)]
        ids, real = gpt.pad(rows), gpt.pad([torch.ones(len(r)) for r in rows])                    # (50, T) each
        first[k] += int((gpt.token_logprobs(model, ids) * real[:, 1:]).sum(1).argmax() == 0)
    return {k: first[k] / sum(n == k for _, n, _ in secrets.values()) for k in SECRETS}


def measure_loss(seed, threshold, steps=400, runs=3):
    """-> {training text: [(documents, loss on good held-out text, {documents with it: numbers known}) of each run]}"""
    enc, table = gpt.get_tokenizer(), {}
    for run in range(seed, seed + runs):
        rng = random.Random(run)
        good, dirty, secrets = pollute(rng)
        cleaned = [t for t in clean.clean(dirty, threshold=threshold)[0] if t is not None]
        seen = set(good)
        held_out = [t for make, share in corpus.SOURCES.values() for t in {make(rng) for _ in range(round(600 * share))} if t not in seen]
        ids, segments = gpt.pack([torch.tensor(enc.encode_ordinary(t)[:63] + [gpt.end_of(enc)]) for t in held_out], 64)
        for name, texts in (("dirty", dirty), ("cleaned", cleaned), ("never dirty", good)):
            model = train(texts, enc, run, steps)
            with torch.no_grad():
                loss = gpt.lm_loss(model, ids, segments).item()
            table.setdefault(name, []).append((len(texts), loss, known(model, enc, secrets)))
    return table


def measure(out, seed, threshold):
    """Print the four tables and append them to OUT/clean.jsonl."""
    rng = random.Random(seed)
    rows, good = measure_quality(rng)
    print("low quality: junk found (recall)")
    print("\n".join(f"  {name:16}{'seen' if known else 'unseen':8}{r:5.0%}  mostly as: {rule}" for name, known, r, rule in rows))
    recall, wrong = sum(r for _, _, r, _ in rows) / len(rows), good[0][1]
    print(f"  all kinds {recall:.0%}; precision, in as much good text of the village: {recall / (recall + wrong):.1%}")
    print("good text dropped\n" + "\n".join(f"  {name:24}{share:6.1%} of {n}" for name, share, n in good))
    copies, false = measure_copies(rng, threshold)
    print("copies found: exact; exact or near\n" + "\n".join(f"  {name:16}{e:5.0%}{b:6.0%}" for name, e, b in copies))
    print(f"  different pages of the village taken for copies: {false:.1%}")
    recall, forms, precision, harmless, examples = measure_personal(rng)
    print("personal data found: known forms; other forms\n" + "\n".join(f"  {kind:16}{a:5.0%}{b:6.0%}" for kind, (a, b) in recall.items()))
    print("  other forms: " + ", ".join(f"{x!r} {r:.0%}" for _, x, r in forms))
    print(f"  precision {precision:.1%}; {harmless:.1%} of the harmless numbers masked, such as {examples[:4]}")
    table, mean = measure_loss(seed, threshold), lambda x: sum(x) / len(x)
    print(f"two layers x 64, 205k tokens of each text, {len(table['dirty'])} runs\n"
          f"  {'text':14}{'documents':>10}  loss on good text        numbers known, by documents they stand in")
    for name, runs in table.items():
        losses = [r[1] for r in runs]
        print(f"  {name:14}{mean([r[0] for r in runs]):10,.0f}  {mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})   "
              + "  ".join(f"{k}: {mean([r[2][k] for r in runs]):.0%}" for k in SECRETS))
    gpt.log_metrics(Path(out) / "clean.jsonl", seed=seed, quality=rows, good=good, copies=copies, pages_taken=false, personal=recall,
                    forms=forms, precision=precision, harmless=harmless, lm=table)


if __name__ == "__main__":
    rng = random.Random(0)
    for name, make in (SEEN | UNSEEN).items():
        print(f"--- {name}: {make(rng)[:200]!r}\n--- {name}: {make(rng)[:200]!r}")
