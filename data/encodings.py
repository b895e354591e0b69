"""Bytes become strings: UTF-8, or UTF-16 and UTF-32 with a byte order mark.

Other encodings are not guessed, because a wrong guess trains a model on nonsense. The message for
them names the two in which the bytes look most like a language.
"""
import codecs
import re

from scaffold.cli import UserError

# UTF-32 first: its mark starts with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

# Encodings as iconv calls them, and the most frequent characters of what is written in them. Read
# in a wrong encoding, a text shows few of these.
WESTERN = "éèêëàâçùûîïôœäöüßáíóúñãõåæø¿¡’“”–«»"
CENTRAL = "ąęłóśżźćńěščřžýáíéůúöőüűäß’“”–„"
CYRILLIC = "оеаинтсрвлкмдпуяыь"
CHINESE = ("的一是不了在人有我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过"
           "家学对可里后小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本，。")
TAIWANESE = ("的一是不了在人有我他這中大來上個國到說們為子和你地出道也時年得就那要下以生會自著去之"
             "過家學對可裡後小麼心多天而能好都然沒日於起還發成事只作當想看文無開手十用主行方又如前所。")
JAPANESE = "のにはをたがでてとしれさいるなもかすまうこらりくけきアイスンーラルト、。"
KOREAN = "이다는을의에가고한하지기로사도를은나요니들어자시대아인서있그"
ENCODINGS = {
    "CP1252": WESTERN,
    "GB18030": CHINESE,
    "CP1251": CYRILLIC,
    "SHIFT_JIS": JAPANESE,
    "BIG5": TAIWANESE,
    "EUC-KR": KOREAN,
    "EUC-JP": JAPANESE,
    "KOI8-R": CYRILLIC,
    "CP1250": CENTRAL,
    "UTF-16LE": CYRILLIC + CHINESE + TAIWANESE + JAPANESE + KOREAN,
    "UTF-16BE": CYRILLIC + CHINESE + TAIWANESE + JAPANESE + KOREAN,
}

def has_many_nuls(raw):
    """Return whether a quarter of the bytes is NUL: half of each ASCII character in UTF-16."""
    return raw.count(0) > len(raw) // 4


def likely_encodings(raw):
    """Return the two encodings in which the bytes look most like a language."""
    def frequent(encoding):
        text = raw.decode(encoding, "replace")
        foreign = len(re.findall(r"[^\0-\x7f]", text))
        if encoding in ("CP1252", "CP1250"):   # there, an accent stands between plain letters
            text = " ".join(re.findall(r"(?<![^\0-\x7f])[^\0-\x7f](?![^\0-\x7f])", text))
        return sum(char in ENCODINGS[encoding] for char in text) / max(1, foreign)

    if has_many_nuls(raw):
        order = ["UTF-16BE", "UTF-16LE"]
        return order if raw.find(0) % 2 == 0 else order[::-1]
    return sorted(ENCODINGS, key=frequent, reverse=True)[:2]


def decode(raw, path):
    """Turn the bytes of a file into a string. Raises UserError with byte, line and advice."""
    marked = [encoding for mark, encoding in MARKS.items() if raw.startswith(mark)]
    encoding = marked[0] if marked else "UTF-8"
    try:
        text = raw.decode(encoding if marked else "utf-8-sig")
        if marked or not has_many_nuls(raw):
            return text
        first_bad = raw.find(0)
    except UnicodeDecodeError as e:
        first_bad = e.start
    line = raw[:first_bad].decode(encoding, "ignore").count("\n") + 1
    advice = "the file is damaged"
    if not marked:
        start = max(raw.rfind(b"\n", 0, first_bad) + 1, first_bad - 10_000)
        a, b = likely_encodings(raw[start:first_bad + 10_000])
        advice = f"it may be {a} or {b}; convert it: iconv -f {a} -t UTF-8 IN > OUT"
    raise UserError(f"{path}:{line}: byte {first_bad} is not {encoding}; {advice}")
