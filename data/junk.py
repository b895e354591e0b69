"""Make junk to test data/clean.py with: debris, spam, altered copies and personal data.

A filter measured on its own rules looks perfect, so nothing here shares a word list, a pattern or
a helper with data/clean.py. The kinds in SEEN were known when the rules of clean.py were written.
The kinds in UNSEEN were added afterwards, and any that led to a change of the rules moved to SEEN.
Trust the numbers of the unseen kinds.

    python data/junk.py          print two examples of each kind
    python lab/cleaning.py       measure how much of the junk data/clean.py finds

Every function draws from the random.Random that it is given. Read next: lab/cleaning.py.
"""
import ipaddress
import json
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import corpus, village
from scaffold.cli import start


@dataclass
class Config:
    seed: int = 0                # other seeds give other examples


DIGITS = "0123456789"
HEX_DIGITS = "0123456789abcdef"
UPPER_CASE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LOWER_CASE = "abcdefghijklmnopqrstuvwxyz"
SALE = (
    "watches pills loans casino bitcoin handbags slots crypto viagra shoes rolex poker insurance "
    "diet hosting seo".split()
)
SITE = (
    "Home,About us,Products,News,Blog,Contact,Careers,FAQ,Imprint,Sitemap,Help,My account,Basket,"
    "Wishlist,Stores,Press".split(",")
)
LATIN = (
    "quis nostrud dolor sit amet consectetur adipiscing elit sed eiusmod tempor incididunt labore "
    "dolore magna aliqua enim minim".split()
)
RUSSIAN = (
    "дом вода лес старый красный мост корова молоко хлеб идёт стоит большой вечером утром через "
    "речку вместе".split()
)
GERMAN = [
    "Der {a} lebt in einem alten Haus am See.",
    "Heute war der {a} sehr müde und ging früh nach Hause.",
    "Niemand wusste, wo der {a} war.",
    "Am Abend kam {p} und brachte frisches Brot.",
    "{p} sagte, dass alles wieder gut werde.",
    "Die Kinder lachten laut über den {a}.",
]
PITCH = [
    "You will not believe how little you pay for our {s} this week.",
    "Thousands of happy buyers trust us with their {s}.",
    "Why wait? The best {s} in town are gone by tonight.",
    "Tell your friends about our {s} and you both save money.",
    "We have been the home of good {s} for twenty years.",
]
CHINESE_PITCH = [
    "正品{s}低价批发",
    "加微信领取优惠",
    "全国包邮货到付款",
    "名额有限先到先得",
    "{s}代理招商加盟",
    "日赚千元轻松兼职",
    "老客户专享折扣",
]
BANNER = [
    "We and our 742 partners store and access information on a device.",
    "You can change your mind at any time.",
    "Some vendors may process your data on the basis of legitimate interest.",
    "Manage choices. Reject. Agree and close.",
]


def draw(rng, characters, low, high=None):
    """Draw a string of low to high characters; without high, of exactly low."""
    return "".join(rng.choice(characters) for _ in range(rng.randint(low, high or low)))


def page(rng):
    """Write a short story of the village. Most of the debris is made from such a page."""
    return corpus.tale(rng)


# Documents of low quality.

def punctuation(rng):
    return " ".join(draw(rng, "#*=~-_/|\\^%$@!?<>+.ab", 1, 9) for _ in range(30))


def mashed_keys(rng):
    return " ".join(draw(rng, "asdfghjklqwertyuiopzxcvbnm", 2, 9) for _ in range(30))


def html(rng):
    lines = ["<html><body>"]
    for sentence in page(rng).split(". "):
        style = rng.randrange(99)
        lines.append(f'<div class="c{style}"><a href="/{rng.choice(SALE)}">{sentence}</a></div>')
    lines.append("<script>var q=[];q.push(1)</script></body></html>")
    return "\n".join(lines)


def stuck_sentence(rng):
    sentence = rng.choice(page(rng).split(". "))
    return "\n".join([sentence] * rng.randint(4, 20))


def keywords(rng):
    return " ".join("cheap " + rng.choice(SALE) for _ in range(rng.randint(8, 30)))


def filler(rng):
    return " ".join(rng.choice(LATIN) for _ in range(40)) + "."


def russian(rng):
    return " ".join(rng.choice(RUSSIAN) for _ in range(30)) + "."


def stub(rng):
    return " ".join(rng.sample(SITE, rng.randint(1, 2)))


def menu(rng):
    return "\n".join(rng.sample(SITE, rng.randint(6, 14)))


def log(rng):
    lines = []
    for _ in range(rng.randint(5, 12)):
        time = f"{rng.randint(10, 23)}:{rng.randint(10, 59)}:{rng.randint(10, 59)}"
        request = f"GET /{rng.choice(SALE)}/{rng.randrange(9999)}"
        lines.append(f"[{time}] {request} {rng.choice([200, 304, 404])} {rng.randrange(99999)}")
    return "\n".join(lines)


def json_record(rng):
    record = {rng.choice(SALE): rng.randrange(999)}
    record["items"] = rng.sample(village.WORDS["animal"], 3)
    record["id"] = uuid(rng)
    return json.dumps(record)


def base64(rng):
    return "\n".join(draw(rng, UPPER_CASE + LOWER_CASE + DIGITS + "+/", 60) for _ in range(6))


def syllables(rng):
    words = []
    for _ in range(40):
        word = ""
        for _ in range(rng.randint(1, 4)):
            word += draw(rng, "bdfgklmnprstv", 1) + draw(rng, "aeiou", 1)
        words.append(word)
    return " ".join(words) + "."


def german(rng):
    sentences = " ".join(rng.sample(GERMAN, 4))
    hero = rng.choice(["Hund", "Bauer", "Müller"])
    return sentences.format(a=hero, p=rng.choice(["Anna", "Jonas"]))


def loop(rng):
    """Repeat a sentence with a running number: no line repeats, and the text says nothing."""
    food = rng.choice(village.WORDS["food"])
    return " ".join(f"The {food} costs {i} coins." for i in range(2, rng.randint(16, 41)))


def mojibake(rng):
    return page(rng).replace("a", "ä").replace("e", "é").encode().decode("latin-1")


def split_letters(rng):
    return " ".join(page(rng).replace(" ", "_"))[:200]


def banner(rng):
    return " ".join(rng.sample(BANNER, 3))


def pitch(rng):
    return " ".join(rng.sample(PITCH, 3)).format(s=rng.choice(SALE))


def chinese_pitch(rng):
    phrases = "，".join(rng.sample(CHINESE_PITCH, 5))
    return phrases.format(s=rng.choice(["手表", "皮包", "香水"])) + "！"


def shuffled(rng):
    words = page(rng).split()
    rng.shuffle(words)
    return " ".join(words)


SEEN = {
    "punctuation": punctuation,
    "mashed_keys": mashed_keys,
    "html": html,
    "stuck_sentence": stuck_sentence,
    "keywords": keywords,
    "filler": filler,
    "russian": russian,
    "stub": stub,
}
UNSEEN = {
    "menu": menu,
    "log": log,
    "json": json_record,
    "base64": base64,
    "syllables": syllables,
    "german": german,
    "loop": loop,
    "mojibake": mojibake,
    "split_letters": split_letters,
    "banner": banner,
    "pitch": pitch,
    "chinese_pitch": chinese_pitch,
    "shuffled": shuffled,
}


# Copies of a page, as a mirror site would show it.

def exact_copy(text, rng):
    return text


def upper_case(text, rng):
    return text.upper().replace(". ", " .\n")


def swap_words(text, rng, share):
    """Replace a share of the words, at least one, by other words of the village."""
    words = text.split()
    pool = [word for options in village.WORDS.values() for word in options]
    for i in rng.sample(range(len(words)), max(1, round(share * len(words)))):
        words[i] = rng.choice(pool)
    return " ".join(words)


def cut_end(text, rng):
    words = text.split()
    return " ".join(words[:int(0.9 * len(words))])


def exchange_halves(text, rng):
    words = text.split()
    middle = len(words) // 2
    return " ".join(words[middle:] + words[:middle])


def add_frame(text, rng):
    top = f"{rng.choice(SITE)} > {rng.choice(SITE)}"
    return f"{top}\n{text}\nPosted by {name(rng)}, page {rng.randrange(99)}"


COPIES = {
    "exact": exact_copy,
    "case, spaces": upper_case,
    "swap 2%": partial(swap_words, share=0.02),
    "swap 5%": partial(swap_words, share=0.05),
    "swap 10%": partial(swap_words, share=0.1),
    "swap 20%": partial(swap_words, share=0.2),
    "cut to 90%": cut_end,
    "halves exchanged": exchange_halves,
    "frame added": add_frame,
}


# Personal data. A form is a function of rng, or a template for write_form().

def name(rng):
    return draw(rng, "aeiou", 1) + draw(rng, "bdlmnr", 1) + draw(rng, "aeiouln", 3, 5)


def write_form(rng, form):
    """Write a string of this form.

    In a template '~' is a name, '9' a digit from 2 to 9, '#' any digit; other characters stay.
    """
    if callable(form):
        return form(rng)
    characters = []
    for c in form:
        if c == "~":
            c = name(rng)
        elif c == "9":
            c = rng.choice("23456789")
        elif c == "#":
            c = rng.choice(DIGITS)
        characters.append(c)
    return "".join(characters)


def group(digits, sizes, separator=" "):
    """Cut a string into groups of these sizes: '1234567', (3, 4) -> '123 4567'."""
    groups = []
    for size in sizes:
        groups.append(digits[:size])
        digits = digits[size:]
    return separator.join(groups)


def card(rng, prefix, length):
    """Write a card number. Try all ten check digits, and share no formula with clean.py."""
    doubled = {"0": 0, "1": 2, "2": 4, "3": 6, "4": 8, "5": 1, "6": 3, "7": 5, "8": 7, "9": 9}
    body = prefix + draw(rng, DIGITS, length - len(prefix) - 1)
    for check_digit in DIGITS:
        backwards = (body + check_digit)[::-1]
        total = sum(map(int, backwards[::2])) + sum(doubled[d] for d in backwards[1::2])
        if total % 10 == 0:
            return body + check_digit


def visa(rng, separator=" "):
    return group(card(rng, "4", 16), (4, 4, 4, 4), separator)


def mastercard(rng):
    return card(rng, "52", 16)


def american_express(rng):
    return group(card(rng, "37", 15), (4, 6, 5))


def resident_id(rng):
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)   # as printed in GB 11643
    region = rng.choice([110101, 310104, 440305])
    birthday = f"{rng.randint(1950, 2005)}{rng.randint(10, 12)}{rng.randint(10, 28)}"
    body = f"{region}{birthday}{rng.randint(100, 999)}"
    return body + "10X98765432"[sum(w * int(d) for w, d in zip(weights, body)) % 11]


def spaced_resident_id(rng):
    return group(resident_id(rng), (6, 8, 4))


def iban(rng):
    """Write a German IBAN; all check digits are tried."""
    body = draw(rng, DIGITS, 18)
    for check_digits in range(2, 99):
        if int(f"{body}1314{check_digits:02d}") % 97 == 1:   # D is 13, E is 14
            return f"DE{check_digits:02d}{body}"


def spaced_iban(rng):
    return group(iban(rng), (4, 4, 4, 4, 4, 2))


def ipv4(rng, template="{}.{}.{}.{}"):
    first = rng.randint(11, 223)
    return template.format(first, rng.randrange(256), rng.randrange(256), rng.randint(10, 255))


def ipv6(rng):
    return str(ipaddress.IPv6Address(rng.getrandbits(128)))


def short_ipv6(rng):
    return f"2001:db8::{rng.randrange(1, 65536):x}"


def day(rng, template):
    """Write a date and a time: d, m, y, h are day, month, year, hour; s is minute or second."""
    d = rng.randint(10, 28)
    m = rng.randint(10, 12)
    y = rng.randint(1980, 2030)
    h = rng.randint(10, 23)
    s = rng.randint(10, 59)
    return template.format(d=d, m=m, y=y, h=h, s=s)


def uuid(rng):
    return "-".join(draw(rng, HEX_DIGITS, size) for size in (8, 4, 4, 4, 12))


class Forms(NamedTuple):
    """The forms of one kind of personal data."""
    seen: list     # known when clean.py's patterns were written
    unseen: list   # added afterwards


# The key is the placeholder that a form should become.
PERSONAL = {
    "EMAIL": Forms(
        seen=["~@~.org", "~ [at] ~ [dot] com"],
        unseen=["~ AT ~ DOT com", "~@~ . com", "~(a)~.net", "~.~@mail.~.co.uk", "~ @ ~.org"],
    ),
    "PHONE": Forms(
        seen=["(9##) 9##-####", "+44 20 #### ####", "138########", "9## 9## ####"],
        unseen=["9##-9##-#### ext. ##", "9 # # 9 # # # # # #", "9##9######", "015## / #######",
                "+33.6.##.##.##.##"],
    ),
    "CARD": Forms(
        seen=[visa, mastercard],
        unseen=[american_express, partial(visa, separator="."), partial(visa, separator="-"),
                partial(visa, separator="  ")],
    ),
    "ID": Forms(
        seen=[resident_id, "2##-9#-9###"],
        unseen=[iban, spaced_iban, spaced_resident_id, "2##9#9###"],
    ),
    "IP": Forms(
        seen=[ipv4, ipv6, short_ipv6],
        unseen=[partial(ipv4, template="http://{}.{}.{}.{}:8080/"),
                partial(ipv4, template="{}[.]{}[.]{}[.]{}"),
                partial(ipv4, template="::ffff:{}.{}.{}.{}")],
    ),
}
# These look like personal data and must stay. All were known when the patterns were written.
HARMLESS = [
    "$9,###.##",
    "9,###,###,###",
    "19##-20##",
    partial(day, template="{y}-{m}-{d}"),
    partial(day, template="{d}/{m}/{y}"),
    partial(day, template="{d}.{m}.{y}, {h}:{s}"),
    "9.##.#",
    "v9.#.#.#",
    "version 10.0.1####.9##",
    "order 9##-#######-#######",
    "ISBN 978-3-##-######-#",
    "#99#99#99#99",
    "17########",
    "17###########",
    "48.####, 11.####",
    "9#:9#, 9#:9#, 9:1#",
    "AB-####-#####",
    "300.9##.400.1",
    "9## ### ###",
    uuid,
    partial(day, template="{h}:{s}:{s}"),
    "3.1415#265358#7#",
    "std::map<a::b>",
    "pp. 1##-1##, 2##-2##",
    "10.1000/9##.####",
    "~ at noon. Then ~",
    "@~",
    "9### 9### 9### 9###",
]
CARRIERS = [
    "{p} wrote: {x} and went home.",
    "For the {t}, {p} left {x} at the inn.",
    "{x} belongs to {p}.",
    "Ask {p} about the {t} ({x}).",
    "{p}有{x}。",
]


def carry(rng, text):
    """Put a string into a sentence."""
    carrier = rng.choice(CARRIERS)
    person = rng.choice(village.WORDS["person"])
    return carrier.format(p=person, t=rng.choice(village.WORDS["thing"]), x=text)


class Secret(NamedTuple):
    """A phone number of one person in the polluted text."""
    number: str
    n_documents: int   # documents that contain it
    others: list       # 49 other numbers of the same form


DOCUMENTS_PER_SECRET = (1, 8, 64)


def pollute(rng, n_good=2500):
    """Mix good documents with as many characters of junk, copies and personal data.

    Returns (good documents, all documents, {person: Secret}).
    """
    good = list(dict.fromkeys(   # not a set: its order differs from process to process
        make(rng)
        for make, share in corpus.SOURCES.values()
        for _ in range(round(2 * share * n_good))
    ))
    rng.shuffle(good)
    good = good[:n_good]
    dirty = list(good)

    secrets = {}
    for n_documents in DOCUMENTS_PER_SECRET:
        for _ in range(12):
            form = rng.choice(PERSONAL["PHONE"].seen + PERSONAL["PHONE"].unseen)
            number = write_form(rng, form)
            others = [write_form(rng, form) for _ in range(49)]
            person = name(rng).capitalize() + name(rng)
            secrets[person] = Secret(number, n_documents, others)
    for person, secret in secrets.items():
        for _ in range(secret.n_documents):
            sentence = rng.choice(page(rng).split(". "))
            dirty.append(f"{sentence}. The number of {person} is {secret.number}.")

    pages = [text for text in good if len(text.split()) > 20]
    kinds = list((SEEN | UNSEEN).values())
    changes = list(COPIES.values())
    missing = sum(map(len, good))
    while missing > 0:
        if rng.random() < 0.6:
            text = rng.choice(kinds)(rng)
        else:
            text = rng.choice(changes)(rng.choice(pages), rng)
        dirty.append(text)
        missing -= len(text)
    rng.shuffle(dirty)
    return good, dirty, secrets


def main(cfg):
    """Print two examples of each kind."""
    rng = random.Random(cfg.seed)
    for kind, make in (SEEN | UNSEEN).items():
        for _ in range(2):
            print(f"--- {kind}: {make(rng)[:200]!r}")


if __name__ == "__main__":
    start(main, Config, __doc__)
