"""Corpus cleaning: drop low quality, drop copies and near copies, mask personal data.

Idea. A model learns whatever is frequent: menus and spam, a page that stands on a thousand mirrors, somebody's phone number. So

1. quality    rules of thumb over one document, as Gopher (2112.11446, appendix A.1.1) and C4 (1910.10683, section 2.2) have
              them, loosened for short documents and extended to Chinese, where a character counts as a word;
2. masks      e-mail, phone, card, ID and IP numbers become <EMAIL> <PHONE> <CARD> <ID> <IP>; what has a check digit is checked,
              so that prices, dates, versions and order numbers stay;
3. copies     exact: equal words, whatever their case and punctuation. Near: Jaccard similarity of the two sets of word triples

    J(A, B) = |A and B| / |A or B|          P( min h(A) = min h(B) ) = J   for a random hash h          Broder 1997, MinHash

   so the share of equal minima under 120 hashes estimates J, with deviation sqrt(J (1-J) / 120) <= 0.05. Only documents that
   agree in one whole band of 6 of them are compared at all (LSH): a pair of similarity s meets in one of 20 bands with probability

    1 - (1 - s^6)^20                        0.00 at s = 0.2, 0.27 at 0.5, 0.92 at 0.7, 0.998 at 0.8: an S with its step near 0.6

    python data/clean.py --data web --out web-clean          clean a .txt file, or a folder of them, as gpt.py reads them
    python data/clean.py                                     measure: junk planted in the village, and what cleaning does to LM loss

10 MB in about 20 seconds on one CPU core; the measure takes a minute and a half. Rules of thumb err: read some of what is dropped
(--show 3) before you trust them on a new kind of text. Code is no prose, and half of it is dropped. Read next: data/junk.py.
"""
import ipaddress, os, re, sys, unicodedata
from array import array
from collections import Counter
from dataclasses import dataclass
from datetime import date
from hashlib import blake2b
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
from gpt import UserError


@dataclass
class Config:
    data: str = ""
    "a UTF-8 text file, or a folder of *.txt; a line <|end|> parts documents; empty: measure on planted junk"
    out: str = ""
    "with --data: the folder for the cleaned files; without: the folder of the run, else out"
    min_words: int = 4
    "shorter documents are dropped; 4 suits the village, 50 suits web pages (Gopher)"
    threshold: float = 0.8
    "estimated Jaccard similarity from which two documents are copies; 0.8 is usual, 1 keeps all but equal sets"
    show: int = 0
    "print so many dropped documents of each kind, to be judged by a person"
    seed: int = 0
    "of the hashes, and of the measure"


HAN = "\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[{HAN}]|[^\W_{HAN}]+(?:['’][^\W_{HAN}]+)*")
ENGLISH = set("the of and to is that it with for you are this have has had they be not he she we my your what at by from a an in was "
              "i do does me on or as will can so if but all no there her his their our us who which when how would could".split())
CHINESE = set("的一是了不在有人我他她它这那来们个上下和你到说就要也会对能很都没着过地得与及为以去吗呢吧")
MARKUP = re.compile(r"</?[a-zA-Z!](?!D>|P>|MAIL>|HONE>|ARD>)[^<>]*>|&#?\w{2,8};|[{}]|\]\(|https?://")
MOJIBAKE = re.compile(r"[\ufffd\x00-\x08\x0e-\x1f]|[ÂÃâ][\x80-\xbf€™œ\u201a-\u201e]")
BOILERPLATE = re.compile(
    r"cookies? policy|uses? cookies|accept (all )?cookies|terms (of (use|service)|and conditions)|privacy policy|all rights reserved|"
    r"javascript|click (here|below)|subscribe (now|to)|sign up (now|for)|log ?in to|add to (cart|basket)|page not found|"
    r"share on (facebook|twitter)|powered by|版权所有|点击(这里|此处|查看|下载)|立即(注册|购买|下载)|未经(授权|许可)|隐私政策|用户协议|"
    r"关注.{0,4}公众号|页面(不存在|未找到)|请先登录|免责声明", re.I)
NO_WORD = re.compile(r"[b-df-hj-np-tv-xz]{5}|^[b-df-hj-np-tv-xz]{4,}$")
BULLET, CUT = re.compile(r"\s*([-*+•·●▪►]|\d+[.)])\s"), re.compile(r"(\.\.\.|…)\s*$")


def words(text):
    """'It costs 3 coins, 你好' -> ['it', 'costs', '3', 'coins', '你', '好']: lower case, a Chinese character is a word."""
    return WORD.findall(text.lower())


def is_low_quality(text, min_words=4):
    """The name of the first rule that a document breaks, or None.

    Gopher's and C4's rules; shares that mean nothing over a few words are taken from 20 characters or 12 words on.
    """
    w = words(text)
    if len(w) < min_words:
        return "short"
    if re.search("lorem ipsum", text, re.I) or len(BOILERPLATE.findall(text)) > len(w) / 40:
        return "boilerplate"
    if len(MARKUP.findall(text)) > len(w) / 10:
        return "markup"
    solid = re.sub(r"\s+", "", text)
    if len(MOJIBAKE.findall(solid)) > len(solid) / 100:
        return "encoding"
    letters = [c for c in solid if c.isalpha()]
    if len(solid) >= 20 and len(letters) < 0.6 * len(solid):
        return "symbols"
    if sum(c > "\u024f" and not "\u3400" <= c <= "\u9fff" for c in letters) > 0.3 * len(letters):   # neither Latin nor Chinese
        return "script"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) >= 5 and sum(bool(BULLET.match(line)) for line in lines) > 0.9 * len(lines):
        return "list"
    if len(lines) >= 3 and sum(bool(CUT.search(line)) for line in lines) > 0.3 * len(lines):
        return "cut off"
    if len(lines) >= 3 and sum(len(k) * (n - 1) for k, n in Counter(lines).items()) > 0.3 * sum(map(len, lines)):
        return "repeated lines"
    if len(w) >= 12 and repeated_share(w) > 0.4:
        return "repeated words"
    latin = [x for x in w if "a" <= x[0] <= "z"]
    if len(latin) >= 5 and not 2.5 <= sum(map(len, latin)) / len(latin) <= 10:
        return "word length"
    # No vowel in four letters, or five consonants in a row: few English words, half of the random ones.
    if len(latin) >= 5 and sum(bool(NO_WORD.search(x)) for x in latin) > 0.15 * len(latin):
        return "gibberish"
    # Sentences are held together by small words; lists of keywords, and other languages, do without ours.
    small = sum(x in ENGLISH or x in CHINESE for x in w)
    if len(w) >= 12 and small < (0.15 if len(latin) > len(w) / 2 else 0.04) * len(w):
        return "no sentences"
    return None


def repeated_share(w, n=5):
    """Share of the words that stand in a run of n words seen before, or in a pair of words seen three times before."""
    covered = np.zeros(len(w), bool)
    for size, free in ((n, 1), (2, 3)):
        seen = Counter()
        for i in range(len(w) - size + 1):
            gram = tuple(w[i:i + size])
            if seen[gram] >= free:
                covered[i:i + size] = True
            seen[gram] += 1
    return covered.mean()


def luhn(digits):
    """The check of card numbers: from the right, every second digit doubled, and the digits of all summed, gives a multiple of ten."""
    return sum(sum(divmod(int(d) * (1 + i % 2), 10)) for i, d in enumerate(reversed(digits))) % 10 == 0


def is_card(text):
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and digits[0] in "23456" and len(set(digits)) > 1 and luhn(digits)


def is_resident_id(text):
    """China's 18 digits: region, day of birth, serial number, and ISO 7064 MOD 11-2 over them."""
    try:
        date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    return "10X98765432"[sum(int(d) * 2 ** (17 - i) for i, d in enumerate(text[:17])) % 11] == text[17].upper()


def is_iban(text):
    """ISO 13616: the first four characters moved to the end, letters as 10..35, leave 1 modulo 97."""
    s = text.replace(" ", "")
    return 15 <= len(s) <= 34 and int("".join(str(int(c, 36)) for c in s[4:] + s[:4])) % 97 == 1


def is_ip(text):
    """An address that can belong to somebody. Four single digits are far more often a version, and a::b is code."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or re.fullmatch(r"\d(\.\d){3}|[A-Fa-f:]+", text))


def is_phone(text):
    """At most 15 digits (E.164's limit), extension aside, that are no date and no decimal fraction."""
    other = r"(19|20)\d\d([-/.])\d\d?\2\d\d?\b|\d\d?([-/.])\d\d?\3(19|20)\d\d\b|\+?\d+\.\d+$"
    return len(re.sub(r"\D", "", re.split("[xe]", text)[0])) <= 15 and not re.match(other, text)


# (kind, pattern, check of what it found). A group `told` is what gives a number away, and stays. ASCII edges: Chinese has no spaces.
START, STOP = r"(?<![A-Za-z\d])(?<![A-Za-z]-)(?<!\d[.,-])", r"(?![A-Za-z\d]|[.,:-]\d)"
EXTENSION = r"(?: ?(?:x|ext\.?) ?\d{1,6})?"
AT, DOT = r"\s*[\[({<]\s*at\s*[\])}>]\s*", r"(?:\s*[\[({<]\s*dot\s*[\])}>]\s*|\s+dot\s+)"
PERSONAL = [(kind, re.compile(pattern), check) for kind, pattern, check in (
    ("EMAIL", r"[A-Za-z0-9._%+-]{1,64}[@＠](?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}", None),
    ("EMAIL", rf"(?i)[a-z0-9._%+-]{{1,64}}(?:{AT}[a-z0-9-]+(?:(?:\.|{DOT})[a-z0-9-]+)+"
              rf"|\s+at\s+(?!the\b)[a-z0-9-]+(?:{DOT}[a-z0-9-]+)+)", None),
    ("ID", START + r"[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?" + STOP, is_iban),
    ("ID", START + r"[1-9]\d{16}[\dXx]" + STOP, is_resident_id),
    ("ID", START + r"(?!000|666|9)\d{3}([- ])(?!00)\d\d\1(?!0000)\d{4}" + STOP, None),          # SSA's rules for US numbers
    ("CARD", START + r"\d(?:[ -]?\d){12,18}" + STOP, is_card),
    ("IP", r"(?<![A-Za-z\d.])(?<![A-Za-z]/)\d{1,3}(?:\.\d{1,3}){3}(?![A-Za-z\d]|\.\d)", is_ip),
    ("IP", r"(?<![A-Za-z\d:.])[0-9A-Fa-f]{1,4}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![A-Za-z\d:])", is_ip),
    ("PHONE", START + r"(?:\+|00)[1-9]\d{0,2}(?:[ .()/-]{0,2}\d){6,12}" + EXTENSION + STOP, is_phone),
    ("PHONE", START + r"(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[.-]|[2-9]\d\d )\d{3}[ .-]\d{4}" + EXTENSION + STOP, is_phone),
    ("PHONE", START + r"1[3-9]\d(?:[ -]?\d{4}){2}" + STOP, is_phone),                                       # Chinese mobiles
    ("PHONE", START + r"(?:\(0\d{1,4}\) ?|0\d{1,4}[ /-])\d{3,4}[ -]?\d{2,4}(?:[ -]?\d{2,4})?" + STOP, is_phone),
    ("PHONE", START + r"0[1-9](?:(?:[ .-]\d\d){4}|\d{8,9})" + STOP, is_phone),
    ("PHONE", r"(?i)(?P<told>(?:(?<![a-z])"
              r"(?:tel|telephone|phone|call|mobile|cell|fax|whatsapp|dial|text|sms)(?![a-z])|电话|手机|致电)[^\d\n]{0,20}?)"
              r"\(?\d(?:[ .()/-]{0,2}\d){6,14}" + STOP, is_phone))]
# A number that is introduced as something else is left alone, unless its own check says what it is.
OTHER_NUMBER = re.compile(r"(?i)(?:(?<![a-z])(?:order|invoice|isbn|issn|part|serial|ref|reference|tracking|article|item|version"
                          r"|release|section|rv)(?![a-z])|订单|编号|版本|单号)[\s.:#：号是为-]{0,3}(?:(?:no|nr|number|id|code)(?![a-z])[\s.:#]{0,3})?$")


def mask_personal(text):
    """-> (text with <EMAIL>, <PHONE>, <CARD>, <ID>, <IP> in place of personal data, {kind: how many})."""
    counts = Counter()

    def mask(kind, check):
        def replace(m):
            told = m.groupdict().get("told") or ""
            before = m.string[max(0, m.start() - 30):m.start()]
            if (check and not check(m[0][len(told):])) or (kind in ("CARD", "IP", "PHONE") and OTHER_NUMBER.search(before)):
                return m[0]
            counts[kind] += 1
            return f"{told}<{kind}>"
        return replace

    for kind, pattern, check in PERSONAL:
        text = pattern.sub(mask(kind, check), text)
    return text, counts


def exact_duplicates(texts):
    """{index of a copy: index of the first text with the same words}; case, punctuation, spaces and width do not count."""
    first, copies = {}, {}
    for i, text in enumerate(texts):
        key = " ".join(words(unicodedata.normalize("NFKC", text))) or text
        j = first.setdefault(blake2b(key.encode(), digest_size=16).digest(), i)
        if j != i:
            copies[i] = j
    return copies


def minhash(texts, n_hashes=120, seed=0, n=3):
    """Texts -> (N, n_hashes) uint32 signatures of their sets of n-word shingles; equal entries estimate Jaccard. Broder 1997.

    A text of fewer than n words is one shingle. The hashes are multiply-shift (Dietzfelbinger et al. 1997) of mixed 64-bit numbers.
    """
    number, flat, lengths = {}, array("Q"), []
    for text in texts:
        w = words(text)
        w += [""] * (n - len(w))
        lengths.append(len(w))
        for x in w:
            if x not in number:   # Python's own hash() of a text differs from run to run
                number[x] = int.from_bytes(blake2b(x.encode(), digest_size=8).digest(), "little")
            flat.append(number[x])
    rng = np.random.default_rng(seed)
    odd = rng.integers(2**63, size=n, dtype=np.uint64) * 2 + 1
    a, b = rng.integers(2**63, size=(2, n_hashes), dtype=np.uint64) * 2 + 1
    w, ends, signatures = np.frombuffer(flat, np.uint64), np.cumsum(lengths), np.empty((len(texts), n_hashes), np.uint32)
    for start in range(0, len(texts), 2000):
        size = np.array(lengths[start:start + 2000])
        block = w[ends[start] - size[0]:ends[start + len(size) - 1]]
        h = sum(odd[j] * block[j:len(block) - n + 1 + j] for j in range(n))
        h = (h ^ h >> np.uint64(31)) * np.uint64(0x9E3779B97F4A7C15)          # else neighbours in h stay neighbours
        h ^= h >> np.uint64(29)
        own = np.ones(len(block), bool)
        own[(np.cumsum(size)[:, None] - np.arange(1, n)).ravel()] = False     # a shingle does not cross into the next text
        h = h[own[:len(h)]]
        first = np.cumsum(size - n + 1) - (size - n + 1)
        for k in range(n_hashes):
            signatures[start:start + len(size), k] = np.minimum.reduceat((a[k] * h + b[k]) >> np.uint64(32), first)
    return signatures


def near_duplicates(texts, threshold=0.8, seed=0, bands=20):
    """{index of a near copy: index of the kept text it is near to}. A text goes if it is near one that stays, and only then:
    so the first of a family stays, and no chain of small steps ends in something unlike everything kept."""
    signatures = minhash(texts, seed=seed)
    keys, width = signatures.tobytes(), signatures.shape[1] // bands * 4
    tables, copies = [{} for _ in range(bands)], {}
    for i in range(len(texts)):
        mine = [keys[at:at + width] for at in range(i * bands * width, (i + 1) * bands * width, width)]
        met = sorted({j for key, table in zip(mine, tables) for j in table.get(key, ())})
        if met:
            likeness = (signatures[met] == signatures[i]).mean(1)
            if likeness.max() >= threshold:
                copies[i] = met[likeness.argmax()]
                continue
        for key, table in zip(mine, tables):
            table.setdefault(key, []).append(i)
    return copies


def clean(texts, min_words=4, threshold=0.8, seed=0):
    """Texts -> (cleaned texts, fates, masked): per text the text with its masks, or None if it is dropped; "kept", or why it was
    dropped; {kind: how many} masked. Masks come before the search for copies: two mirrors of a page may differ in a number."""
    fates = [is_low_quality(text, min_words) or "kept" for text in texts]
    masks = [mask_personal(text) if fate == "kept" else (None, Counter()) for text, fate in zip(texts, fates)]
    cleaned, masked = [m[0] for m in masks], [m[1] for m in masks]
    for reason, find in (("copy", exact_duplicates), ("near copy", lambda t: near_duplicates(t, threshold, seed))):
        there = [i for i, text in enumerate(cleaned) if text is not None]
        for i in find([cleaned[i] for i in there]):
            fates[there[i]], cleaned[there[i]] = reason, None
    return cleaned, fates, [m if fate == "kept" else Counter() for m, fate in zip(masked, fates)]


def read_documents(path):
    """{file: its documents}: a file or a folder of *.txt, parted as gpt.read_corpus parts them. Raises UserError."""
    path = Path(path)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no *.txt file in this folder")
    return {f: [t.strip("\r\n") for t in re.split(r"^<\|end\|>\r?(?:\n|\Z)", gpt.read_text(f), flags=re.M) if t.strip()]
            for f in files}


def write_text(path, text):
    """Write atomically: what stands there stays whole until the new text is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def main(cfg):
    gpt.require(cfg, 1, "min_words")
    gpt.require(cfg, 0.1, "threshold", most=1)
    if not cfg.data:
        from data import junk
        return junk.measure(gpt.run_folder(cfg.out or "out"), cfg.seed, cfg.threshold)
    if not cfg.out:
        raise UserError("say where the cleaned files go: --out FOLDER")
    data, out = Path(cfg.data), gpt.run_folder(cfg.out)
    root = data if data.is_dir() else data.parent
    if out.resolve() == root.resolve():
        raise UserError(f"--out {out} holds the data itself; name another folder")
    documents = read_documents(data)
    owner = [file for file, texts in documents.items() for _ in texts]
    texts = [t for file in documents.values() for t in file]
    print(f"clean.py: {len(texts):,} documents in {len(documents)} files")
    cleaned, fates, masked = clean(texts, cfg.min_words, cfg.threshold, cfg.seed)
    for file, before in documents.items():
        mine = [i for i, f in enumerate(owner) if f == file]
        kept = [cleaned[i] for i in mine if cleaned[i] is not None]
        why, hidden = Counter(fates[i] for i in mine), sum((masked[i] for i in mine), Counter())
        if not kept:
            raise UserError(f"{file}: nothing would be left of {len(before)} documents ({dict(why)}); take the file away, "
                            f"or lower --min-words")
        write_text(out / file.relative_to(root), "\n<|end|>\n".join(kept) + "\n")
        del why["kept"]
        print(f"{file.relative_to(root)}: {len(before):,} documents in, {len(kept):,} kept; dropped: "
              + (", ".join(f"{n:,} {k}" for k, n in why.most_common()) or "none") + "; masked: "
              + (", ".join(f"{n:,} {k}" for k, n in hidden.most_common()) or "none"))
    if (data / "mixture.json").exists():
        write_text(out / "mixture.json", gpt.read_text(data / "mixture.json"))
    for reason in sorted(set(fates) - {"kept"}):
        for text in [t for t, fate in zip(texts, fates) if fate == reason][:cfg.show]:
            print(f"--- {reason}: {text[:300]!r}")
    print(f"wrote {out}; next: python gpt.py --data {out if data.is_dir() else out / data.name}")


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
