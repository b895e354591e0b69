"""Words of a text in any language, for self_instruct.py's ROUGE-L and its length filter.

English text is split as rouge-score does: everything but a-z and 0-9 separates words. In other text
every letter counts, whatever its script, with the marks on it. Some scripts put no space between
words. In a text that is mostly written so, each of their characters is a word: 写一首诗 has four.
In other text, such as "What does 猫 mean?", they are skipped, as rouge-score does.
"""
import re
import unicodedata
from functools import lru_cache

# Thai, Lao, Tibetan, Burmese, Khmer; Japanese syllables; Chinese characters, also in Japanese.
UNSPACED = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
                      "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
                      "\U00020000-\U0003ffff]")


def is_part_of_word(character):
    """Return whether a character is a letter, a mark on a letter (as in Hindi) or a digit."""
    return unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Nd")


@lru_cache(maxsize=1 << 16)
def words(text):
    """Split a text into lower-case words -> tuple of strings."""
    text = text.lower()
    if text.isascii():
        return tuple(re.sub(r"[^a-z0-9]+", " ", text).split())
    text = unicodedata.normalize("NFC", text)   # e and an accent are one letter
    text = "".join(c if is_part_of_word(c) else " " for c in text)
    others = UNSPACED.sub(" ", text).split()
    if len(UNSPACED.findall(text)) <= len(others):
        return tuple(others)
    return tuple(UNSPACED.sub(r" \g<0> ", text).split())


def count_words(text):
    """Count words for a limit on length: what spaces separate, punctuation included.

    Characters without spaces between them count as words() splits them.
    """
    by_spaces = len(text.split())
    return max(by_spaces, len(words(text))) if UNSPACED.search(text) else by_spaces
