"""Clean a corpus: drop low-quality documents and copies, mask personal data.

A model learns whatever is frequent: menus, spam, a page with a thousand mirrors, somebody's phone
number. Cleaning takes three steps.

1. Quality. Rules of thumb about one document, from Gopher (arXiv:2112.11446, appendix A.1.1) and
   C4 (arXiv:1910.10683, section 2.2). They are loosened for short documents and extended to
   Chinese, where each character counts as a word.
2. Masks. E-mail addresses and phone, card, ID and IP numbers become <EMAIL>, <PHONE>, <CARD>, <ID>
   and <IP>. Check digits are verified, so prices, dates, versions and order numbers stay.
3. Copies. Exact copies have the same words; case and punctuation do not count. Near copies have
   similar sets of word triples. MinHash (Broder 1997) estimates the Jaccard similarity of two sets:

       J(A, B) = |A and B| / |A or B|        P( min h(A) = min h(B) ) = J   for a random hash h

   The share of equal minima under 120 hashes estimates J with a std of sqrt(J (1-J) / 120) <= 0.05.
   Comparing all pairs would be slow. So the 120 minima are cut into 20 bands of 6, and only
   documents that agree in a whole band are compared (LSH). At similarity s this happens with

       P = 1 - (1 - s^6)^20                  0.00 at s = 0.2, 0.27 at 0.5, 0.92 at 0.7, 0.998 at 0.8

    python data/clean.py --data web --out web-clean            # a .txt file, or a folder of them
    python data/clean.py --data web --out web-clean --show 3   # also print some of what is dropped
    python lab/cleaning.py                                     # how well does it work?

Cleaning 10 MB takes about 20 seconds on one CPU core. Rules of thumb fail: read what is dropped
before you trust them on a new kind of text. They are made for prose and drop half of all source
code. Read next: lab/cleaning.py.
"""
import ipaddress
import re
import sys
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.text import find_texts, read_documents, read_text, write_text
from scaffold.cli import UserError, require, run_folder, start


@dataclass
class Config:
    data: str = ""           # a file of documents, or a folder of *.txt and *.jsonl
    out: str = ""            # the folder for the cleaned files
    min_words: int = 4       # drop shorter documents; 4 suits the village, 50 web pages (Gopher)
    threshold: float = 0.8   # documents are copies if their estimated similarity is this high
    show: int = 0            # print this many dropped documents per reason
    seed: int = 0            # seed of the hashes


HAN = "\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[{HAN}]|[^\W_{HAN}]+(?:['’][^\W_{HAN}]+)*")
ENGLISH = set(
    "the of and to is that it with for you are this have has had they be not he she we my your "
    "what at by from a an in was i do does me on or as will can so if but all no there her his "
    "their our us who which when how would could".split()
)
CHINESE = set(
    "的一是了不在有人我他她它这那来们个上下和你到说就要也会对能很都没着过地得与及为以去吗呢吧"
)
# The lookahead spares this file's own masks: <EMAIL>, <ID>, ... are not HTML tags.
MARKUP = re.compile(
    r"</?[a-zA-Z!](?!D>|P>|MAIL>|HONE>|ARD>)[^<>]*>|&#?\w{2,8};|[{}]|\]\(|https?://"
)
MOJIBAKE = re.compile(r"[\ufffd\x00-\x08\x0e-\x1f]|[ÂÃâ][\x80-\xbf€™œ\u201a-\u201e]")
BOILERPLATE = re.compile(
    r"cookies? policy|uses? cookies|accept (all )?cookies|terms (of (use|service)|and conditions)|"
    r"privacy policy|all rights reserved|javascript|click (here|below)|subscribe (now|to)|"
    r"sign up (now|for)|log ?in to|add to (cart|basket)|page not found|"
    r"share on (facebook|twitter)|powered by|"
    r"版权所有|点击(这里|此处|查看|下载)|立即(注册|购买|下载)|未经(授权|许可)|隐私政策|用户协议|"
    r"关注.{0,4}公众号|页面(不存在|未找到)|请先登录|免责声明",
    re.I,
)
# Five consonants in a row, or four or more letters without a vowel. Few English words look like
# this, but half of all random strings do.
NO_WORD = re.compile(r"[b-df-hj-np-tv-xz]{5}|^[b-df-hj-np-tv-xz]{4,}$")
BULLET = re.compile(r"\s*([-*+•·●▪►]|\d+[.)])\s")
CUT_OFF = re.compile(r"(\.\.\.|…)\s*$")


def split_words(text):
    """Split a string into lower-case words; a Chinese character is a word.

    'It costs 3 coins, 你好' -> ['it', 'costs', '3', 'coins', '你', '好']
    """
    return WORD.findall(text.lower())


def is_low_quality(text, min_words=4):
    """Return the name of the first quality rule that a document breaks, or None.

    The rules are Gopher's and C4's. A share over very few items means nothing, so many rules need a
    minimum of characters, lines or words to apply.
    """
    words = split_words(text)
    if len(words) < min_words:
        return "short"
    if re.search("lorem ipsum", text, re.I) or len(BOILERPLATE.findall(text)) > len(words) / 40:
        return "boilerplate"
    if len(MARKUP.findall(text)) > len(words) / 10:
        return "markup"
    return character_rule(text) or line_rule(text) or word_rule(words)


def character_rule(text):
    """Return the name of the first rule about characters that a document breaks, or None."""
    solid = re.sub(r"\s+", "", text)
    if len(MOJIBAKE.findall(solid)) > len(solid) / 100:
        return "encoding"
    letters = [c for c in solid if c.isalpha()]
    if len(solid) >= 20 and len(letters) < 0.6 * len(solid):
        return "symbols"
    # Neither Latin nor Chinese.
    foreign = [c for c in letters if c > "\u024f" and not "\u3400" <= c <= "\u9fff"]
    if len(foreign) > 0.3 * len(letters):
        return "script"
    return None


def line_rule(text):
    """Return the name of the first rule about lines that a document breaks, or None."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bullets = [line for line in lines if BULLET.match(line)]
    if len(lines) >= 5 and len(bullets) > 0.9 * len(lines):
        return "list"
    cut_off = [line for line in lines if CUT_OFF.search(line)]
    if len(lines) >= 3 and len(cut_off) > 0.3 * len(lines):
        return "cut off"
    n_characters = sum(map(len, lines))
    n_repeated = sum(len(line) * (n - 1) for line, n in Counter(lines).items())
    if len(lines) >= 3 and n_repeated > 0.3 * n_characters:
        return "repeated lines"
    return None


def word_rule(words):
    """Return the name of the first rule about words that a document breaks, or None."""
    if len(words) >= 12 and repeated_share(words) > 0.4:
        return "repeated words"
    latin = [word for word in words if "a" <= word[0] <= "z"]
    if len(latin) >= 5 and not 2.5 <= sum(map(len, latin)) / len(latin) <= 10:
        return "word length"
    unlikely = [word for word in latin if NO_WORD.search(word)]
    if len(latin) >= 5 and len(unlikely) > 0.15 * len(latin):
        return "gibberish"
    # Small words hold sentences together. Lists of keywords and other languages lack them.
    small = [word for word in words if word in ENGLISH or word in CHINESE]
    least = 0.15 if len(latin) > len(words) / 2 else 0.04
    if len(words) >= 12 and len(small) < least * len(words):
        return "no sentences"
    return None


def repeated_share(words, n=5):
    """Return the share of words inside a repetition.

    A repetition is a run of n words that occurred before, or a pair of words that occurred three
    times before.
    """
    covered = np.zeros(len(words), bool)
    for size, free in ((n, 1), (2, 3)):
        seen = Counter()
        for i in range(len(words) - size + 1):
            gram = tuple(words[i:i + size])
            if seen[gram] >= free:
                covered[i:i + size] = True
            seen[gram] += 1
    return covered.mean()


def luhn(digits):
    """Return whether the check digit of a card number is right.

    Double every second digit from the right and add up all digits: the sum is a multiple of ten.
    """
    total = 0
    for i, digit in enumerate(reversed(digits)):
        tens, ones = divmod(int(digit) * (1 + i % 2), 10)
        total += tens + ones
    return total % 10 == 0


def is_card(text):
    """Return whether a string is a card number: length, first digit and check digit are right."""
    digits = re.sub(r"\D", "", text)
    if not 13 <= len(digits) <= 19 or digits[0] not in "23456":
        return False
    return len(set(digits)) > 1 and luhn(digits)


def is_resident_id(text):
    """Return whether 18 characters are a Chinese resident ID.

    The parts are region, date of birth, serial number and a check character (ISO 7064 MOD 11-2).
    """
    try:
        date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * 2 ** (17 - i) for i, digit in enumerate(text[:17]))
    return "10X98765432"[total % 11] == text[17].upper()


def is_iban(text):
    """Return whether a string is an IBAN (ISO 13616).

    With the first four characters at the end and letters as 10..35, the number is 1 modulo 97.
    """
    iban = text.replace(" ", "")
    if not 15 <= len(iban) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97 == 1


def is_ip(text):
    """Return whether a string is an IP address that can belong to a person.

    Four single digits are more likely a version number, and a::b is code.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.is_loopback or address.is_unspecified:
        return False
    return not re.fullmatch(r"\d(\.\d){3}|[A-Fa-f:]+", text)


DATE_OR_DECIMAL = re.compile(
    r"(19|20)\d\d([-/.])\d\d?\2\d\d?\b|\d\d?([-/.])\d\d?\3(19|20)\d\d\b|\+?\d+\.\d+$"
)


def is_phone(text):
    """Return whether a string can be a phone number.

    It has at most 15 digits (E.164), and it is neither a date nor a decimal fraction.
    """
    number = re.split("[xe]", text)[0]   # without the extension
    return len(re.sub(r"\D", "", number)) <= 15 and not DATE_OR_DECIMAL.match(text)


class Rule(NamedTuple):
    """How to find one form of personal data."""
    kind: str
    pattern: re.Pattern             # its group `told`, if any, introduces the number and is kept
    check: Callable | None = None   # string -> whether it is personal data; None: it always is


# The characters at the edges are ASCII: Chinese has no spaces around a number.
START = r"(?<![A-Za-z\d])(?<![A-Za-z]-)(?<!\d[.,-])"
STOP = r"(?![A-Za-z\d]|[.,:-]\d)"
EXTENSION = r"(?: ?(?:x|ext\.?) ?\d{1,6})?"
AT = r"\s*[\[({<]\s*at\s*[\])}>]\s*"
DOT = r"(?:\s*[\[({<]\s*dot\s*[\])}>]\s*|\s+dot\s+)"
EMAIL = r"[A-Za-z0-9._%+-]{1,64}[@＠](?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}"
SPELLED_EMAIL = (                   # ann [at] mill [dot] org
    rf"(?i)[a-z0-9._%+-]{{1,64}}(?:{AT}[a-z0-9-]+(?:(?:\.|{DOT})[a-z0-9-]+)+"
    rf"|\s+at\s+(?!the\b)[a-z0-9-]+(?:{DOT}[a-z0-9-]+)+)"
)
IBAN = START + r"[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?" + STOP
RESIDENT_ID = START + r"[1-9]\d{16}[\dXx]" + STOP
US_SOCIAL_SECURITY = START + r"(?!000|666|9)\d{3}([- ])(?!00)\d\d\1(?!0000)\d{4}" + STOP
CARD = START + r"\d(?:[ -]?\d){12,18}" + STOP
IPV4 = r"(?<![A-Za-z\d.])(?<![A-Za-z]/)\d{1,3}(?:\.\d{1,3}){3}(?![A-Za-z\d]|\.\d)"
IPV6 = (
    r"(?<![A-Za-z\d:.])[0-9A-Fa-f]{1,4}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}"
    r"(?![A-Za-z\d:])"
)
INTERNATIONAL_PHONE = START + r"(?:\+|00)[1-9]\d{0,2}(?:[ .()/-]{0,2}\d){6,12}" + EXTENSION + STOP
US_PHONE = (
    START + r"(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[.-]|[2-9]\d\d )\d{3}[ .-]\d{4}" + EXTENSION + STOP
)
CHINESE_MOBILE = START + r"1[3-9]\d(?:[ -]?\d{4}){2}" + STOP
LOCAL_PHONE = START + r"(?:\(0\d{1,4}\) ?|0\d{1,4}[ /-])\d{3,4}[ -]?\d{2,4}(?:[ -]?\d{2,4})?" + STOP
FRENCH_PHONE = START + r"0[1-9](?:(?:[ .-]\d\d){4}|\d{8,9})" + STOP
INTRODUCED_PHONE = (                # call 555 12 34
    r"(?i)(?P<told>(?:(?<![a-z])"
    r"(?:tel|telephone|phone|call|mobile|cell|fax|whatsapp|dial|text|sms)(?![a-z])|电话|手机|致电)"
    r"[^\d\n]{0,20}?)"
    r"\(?\d(?:[ .()/-]{0,2}\d){6,14}" + STOP
)
# Applied in this order: a rule does not see what an earlier rule has masked.
PERSONAL = [
    Rule("EMAIL", re.compile(EMAIL)),
    Rule("EMAIL", re.compile(SPELLED_EMAIL)),
    Rule("ID", re.compile(IBAN), is_iban),
    Rule("ID", re.compile(RESIDENT_ID), is_resident_id),
    Rule("ID", re.compile(US_SOCIAL_SECURITY)),
    Rule("CARD", re.compile(CARD), is_card),
    Rule("IP", re.compile(IPV4), is_ip),
    Rule("IP", re.compile(IPV6), is_ip),
    Rule("PHONE", re.compile(INTERNATIONAL_PHONE), is_phone),
    Rule("PHONE", re.compile(US_PHONE), is_phone),
    Rule("PHONE", re.compile(CHINESE_MOBILE), is_phone),
    Rule("PHONE", re.compile(LOCAL_PHONE), is_phone),
    Rule("PHONE", re.compile(FRENCH_PHONE), is_phone),
    Rule("PHONE", re.compile(INTRODUCED_PHONE), is_phone),
]
# Words before a number that is not personal, such as "order no. ".
OTHER_NUMBER = re.compile(
    r"(?i)(?:(?<![a-z])(?:order|invoice|isbn|issn|part|serial|ref|reference|tracking|article|item"
    r"|version|release|section|rv)(?![a-z])|订单|编号|版本|单号)"
    r"[\s.:#：号是为-]{0,3}(?:(?:no|nr|number|id|code)(?![a-z])[\s.:#]{0,3})?$"
)


def mask_personal(text):
    """Mask personal data.

    Returns (text, counts): the text with <EMAIL>, <PHONE>, <CARD>, <ID> and <IP> in place of the
    data, and a Counter of the kinds.
    """
    counts = Counter()
    for rule in PERSONAL:
        text = rule.pattern.sub(partial(mask_match, rule, counts), text)
    return text, counts


def mask_match(rule, counts, match):
    """Return the mask of a match and count it, or return the match itself if it may stay."""
    told = match.groupdict().get("told") or ""
    if rule.check and not rule.check(match[0][len(told):]):
        return match[0]
    before = match.string[max(0, match.start() - 30):match.start()]
    if rule.kind in ("CARD", "IP", "PHONE") and OTHER_NUMBER.search(before):
        return match[0]
    counts[rule.kind] += 1
    return f"{told}<{rule.kind}>"


def exact_duplicates(texts):
    """Find documents with the same words; case, punctuation, spaces and width do not count.

    Returns {index of a copy: index of the first document with these words}.
    """
    first = {}
    copies = {}
    for i, text in enumerate(texts):
        key = " ".join(split_words(unicodedata.normalize("NFKC", text))) or text
        j = first.setdefault(blake2b(key.encode(), digest_size=16).digest(), i)
        if j != i:
            copies[i] = j
    return copies


def hash_words(texts, n):
    """Hash every word of N documents to 64 bits.

    Returns (hashes, lengths): (W,) uint64, all words one after the other, and (N,), the number of
    words of each document. A document of fewer than n words is padded with empty words.
    """
    hash_of = {}
    hashes = array("Q")
    lengths = []
    for text in texts:
        words = split_words(text)
        words += [""] * (n - len(words))
        lengths.append(len(words))
        for word in words:
            if word not in hash_of:   # not Python's hash(), which differs from run to run
                digest = blake2b(word.encode(), digest_size=8).digest()
                hash_of[word] = int.from_bytes(digest, "little")
            hashes.append(hash_of[word])
    return np.frombuffer(hashes, np.uint64), np.array(lengths, int)


def minhash(texts, n_hashes=120, seed=0, n=3):
    """Compute the minima of n_hashes random hashes over the word n-grams of each document.

    Returns (N, n_hashes) uint32. The share of equal entries in two rows estimates the Jaccard
    similarity of the two sets of n-grams (Broder 1997). A document of fewer than n words has one
    n-gram. The random hashes are multiply-shift (Dietzfelbinger et al. 1997) of 64-bit numbers.
    """
    words, lengths = hash_words(texts, n)
    ends = np.cumsum(lengths)
    rng = np.random.default_rng(seed)
    factors = rng.integers(2**63, size=n, dtype=np.uint64) * 2 + 1
    a, b = rng.integers(2**63, size=(2, n_hashes), dtype=np.uint64) * 2 + 1
    signatures = np.empty((len(texts), n_hashes), np.uint32)
    for offset in range(0, len(texts), 2000):   # in blocks, to bound the memory
        size = lengths[offset:offset + 2000]
        block = words[ends[offset] - size[0]:ends[offset + len(size) - 1]]
        h = np.zeros(len(block) - n + 1, np.uint64)                    # one number per n-gram
        for j in range(n):
            h += factors[j] * block[j:len(block) - n + 1 + j]
        # Mix the bits: with multiply-shift alone, close numbers keep close hashes.
        h = (h ^ h >> np.uint64(31)) * np.uint64(0x9E3779B97F4A7C15)
        h ^= h >> np.uint64(29)
        inside = np.ones(len(block), bool)                             # not across two documents
        inside[(np.cumsum(size)[:, None] - np.arange(1, n)).ravel()] = False
        h = h[inside[:len(h)]]
        first = np.cumsum(size - n + 1) - (size - n + 1)               # of each document
        for k in range(n_hashes):
            hashes = (a[k] * h + b[k]) >> np.uint64(32)
            signatures[offset:offset + len(size), k] = np.minimum.reduceat(hashes, first)
    return signatures


def near_duplicates(texts, threshold=0.8, seed=0, bands=20):
    """Find near copies. Returns {index of a near copy: index of the kept document it resembles}.

    A document is dropped if and only if it resembles a document that stays. So the first of a
    family stays, and a chain of small changes never drops a document unlike everything kept.
    """
    signatures = minhash(texts, seed=seed)
    width = signatures.shape[1] // bands
    tables = [defaultdict(list) for _ in range(bands)]   # per band {minima: kept documents}
    copies = {}
    for i, signature in enumerate(signatures):
        keys = [signature[k * width:(k + 1) * width].tobytes() for k in range(bands)]
        candidates = set()
        for key, table in zip(keys, tables):
            candidates.update(table.get(key, ()))
        if candidates:
            candidates = sorted(candidates)
            similarity = (signatures[candidates] == signature).mean(1)
            if similarity.max() >= threshold:
                copies[i] = candidates[similarity.argmax()]
                continue
        for key, table in zip(keys, tables):
            table[key].append(i)
    return copies


class Cleaned(NamedTuple):
    """The result for one document."""
    text: str | None   # with its masks; None if it is dropped
    reason: str        # "kept", or the reason why it is dropped
    masked: Counter    # {kind: number of masks} of a document that is kept


def clean(texts, min_words=4, threshold=0.8, seed=0):
    """Clean a list of documents. Returns a list of Cleaned, in the same order.

    Masking comes before the search for copies: two mirrors of a page may differ in a phone number.
    """
    cleaned = []
    for text in texts:
        reason = is_low_quality(text, min_words)
        if reason:
            cleaned.append(Cleaned(None, reason, Counter()))
        else:
            masked_text, counts = mask_personal(text)
            cleaned.append(Cleaned(masked_text, "kept", counts))
    for reason, find in (
        ("copy", exact_duplicates),
        ("near copy", partial(near_duplicates, threshold=threshold, seed=seed)),
    ):
        kept = [i for i, document in enumerate(cleaned) if document.text is not None]
        for i in find([cleaned[i].text for i in kept]):
            cleaned[kept[i]] = Cleaned(None, reason, Counter())
    return cleaned


def read_sources(path):
    """Read a file, or every *.txt and *.jsonl of a folder -> {name: documents}."""
    return {name: [document.strip("\r\n") for document in read_documents(file)]
            for name, file in find_texts(path).items()}


def check(cfg):
    """Raise UserError for settings that cannot work."""
    require(cfg, 1, "min_words")
    require(cfg, 0.1, "threshold", most=1)
    if not cfg.data:
        raise UserError("nothing to clean: type --data FILE_OR_FOLDER")
    if not cfg.out:
        raise UserError("no folder for the cleaned files: type --out FOLDER")


def summary(counts):
    """Format a Counter as '12 short, 3 copy', or 'none'."""
    return ", ".join(f"{n:,} {name}" for name, n in counts.most_common()) or "none"


def write_cleaned(out, name, cleaned):
    """Write the kept documents of a source to out/name.txt, and print one line of counts."""
    kept = [document.text for document in cleaned if document.text is not None]
    reasons = Counter(document.reason for document in cleaned)
    masked = sum((document.masked for document in cleaned), Counter())
    if not kept:
        raise UserError(f"{name}: nothing would be left of {len(cleaned)} documents "
                        f"({summary(reasons)}); remove the file, or lower --min-words")
    write_text(out / f"{name}.txt", "\n<|end|>\n".join(kept) + "\n")
    del reasons["kept"]
    print(f"{name}.txt: {len(cleaned):,} documents in, {len(kept):,} kept; "
          f"dropped: {summary(reasons)}; masked: {summary(masked)}")


def main(cfg):
    check(cfg)
    data = Path(cfg.data)
    root = data if data.is_dir() else data.parent
    out = run_folder(cfg.out)
    if out.resolve() == root.resolve():
        raise UserError(f"--out {out} is the folder of the data itself: name another folder")
    documents = read_sources(data)
    texts = [text for of_file in documents.values() for text in of_file]
    print(f"clean.py: {len(texts):,} documents in {len(documents)} files")

    # One list for all files: copies are found across files.
    cleaned = clean(texts, cfg.min_words, cfg.threshold, cfg.seed)
    offset = 0
    for name, before in documents.items():
        write_cleaned(out, name, cleaned[offset:offset + len(before)])
        offset += len(before)
    if (data / "mixture.json").exists():
        write_text(out / "mixture.json", read_text(data / "mixture.json"))

    for reason in sorted({document.reason for document in cleaned} - {"kept"}):
        dropped = [text for text, document in zip(texts, cleaned) if document.reason == reason]
        for text in dropped[:cfg.show]:
            print(f"--- {reason}: {text[:300]!r}")
    written = out if data.is_dir() else out / f"{name}.txt"
    print(f"wrote {out}; next: python gpt.py --data {written}")


if __name__ == "__main__":
    start(main, Config, __doc__)
