"""Tests of data/encodings.py: what is read, and the advice for what is not."""

from pathlib import Path

import pytest

from data.encodings import decode, likely_encodings
from scaffold.cli import UserError

STRING = "The cow says moo.\n牛说哞。\u2028 Été, Привет 👩‍👩‍👧\r\n\0"
MARKED = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("encoding", MARKED)
def test_utf_8_and_marked_files_are_read(encoding):
    assert decode(STRING.encode(encoding), Path("a.txt")) == STRING


@pytest.mark.parametrize("mark, encoding", [
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
])
def test_the_mark_tells_the_order_of_the_bytes(mark, encoding):
    assert decode(mark + STRING.encode(encoding), Path("a.txt")) == STRING


FOREIGN = {  # what people write -> its encoding, as Python and as iconv call it
    "Où est passée la boîte? Le garçon a déjà mangé.": ("cp1252", "CP1252"),
    "Der Bäcker hat frische Brötchen, schöne Grüße.": ("cp1252", "CP1252"),
    "El niño comió la canción de España ¿qué pasó?": ("cp1252", "CP1252"),
    "é": ("latin1", "CP1252"),
    "Cześć, dzisiaj jest ładna pogoda, chodźmy do parku.": ("cp1250", "CP1250"),
    "Привет, сегодня хорошая погода, пойдём в парк.": ("cp1251", "CP1251"),
    "Привет, сегодня хорошая погода. ": ("koi8_r", "KOI8-R"),
    "你好，今天的天气很好，我们去公园玩吧。": ("gb18030", "GB18030"),
    "请用一句话解释什么是机器学习。": ("gbk", "GB18030"),
    "你好，今天的天氣很好，我們去公園玩吧。": ("big5", "BIG5"),
    "こんにちは、今日はいい天気ですね。": ("shift_jis", "SHIFT_JIS"),
    "こんにちは、公園に行きましょう。": ("euc_jp", "EUC-JP"),
    "안녕하세요. 오늘은 날씨가 좋습니다.": ("euc_kr", "EUC-KR"),
    "Hello there.": ("utf-16-le", "UTF-16LE"),
    "Hello there. ": ("utf-16-be", "UTF-16BE"),
    "我们去公园玩吧，今天的天气很好。": ("utf-16-le", "UTF-16LE"),
}


@pytest.mark.parametrize("string", FOREIGN)
@pytest.mark.parametrize("before", ["", "Plain letters before it: "])
def test_the_advice_names_the_encoding(string, before):
    encoding, name = FOREIGN[string]
    raw = (before + string).encode(encoding)
    assert likely_encodings(raw)[0] == name
    with pytest.raises(UserError) as e:
        decode(raw, Path("a.txt"))
    assert f"it may be {name} or " in str(e.value)
    assert f"iconv -f {name} -t UTF-8" in str(e.value)


def test_the_message_names_the_byte_and_the_line():
    raw = "Plain.\n\nNa\u00efve.\n".encode() + b"caf\xe9\n"
    with pytest.raises(UserError, match="a.txt:4: byte 19 is not UTF-8"):
        decode(raw, Path("a.txt"))


def test_a_damaged_marked_file_is_called_damaged():
    with pytest.raises(UserError, match="a.txt:2: byte 8 is not UTF-16; the file is damaged"):
        decode("ab\n".encode("utf-16") + b"\0\xd8", Path("a.txt"))
