import json

import pytest

from datamodules.readers.text import clean_text, decode_text, json_lines, parse_json, read_json, read_lines, split_lines
from models.errors import UserError


def test_lone_surrogates_are_replaced():
    assert clean_text("a \ud83d b") == "a � b" and clean_text("\ud83d\ude00 é") == "😀 é"
    assert parse_json(r'{"a": ["\ud83d x", {"b\udc00": "\ud83d\ude00"}]}') == {"a": ["� x", {"b�": "😀"}]}
    parse_json(r'"\ud83d"').encode()  # can be written


def test_json_that_cannot_be_read_is_a_value_error():
    for text in ("[" * 100_000, '{"a":' * 100_000, "", "{", b"\xff\xfe\xfa", "1" * 5000):
        with pytest.raises(ValueError):
            parse_json(text)
    assert parse_json("\ufeff[1]") == [1] and parse_json(b"\xef\xbb\xbf[1]") == [1]


def test_lines_end_where_people_end_them():
    text = "a\r\nb\u2028c\x0cd\re\u0085f\n"
    assert split_lines(text) == ["a", "b\u2028c\x0cd", "e\u0085f"]
    assert decode_text(b"\xef\xbb\xbfcat") == "cat" and decode_text("cat".encode("utf-16")) == "cat"


def test_files_with_byte_order_marks(tmp_path):
    file = tmp_path / "x.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_lines(file) == ["one", "two"]
    file.write_bytes("one".encode("utf-16"))
    with pytest.raises(UserError, match="x.txt is UTF-16"):
        read_lines(file)
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="x.txt is not UTF-8"):
        read_lines(file)
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([1]).encode())
    assert read_json(file) == [1]
    file.write_text('\ufeff{"a": 1}\n\n{"a"\n')
    with pytest.raises(UserError, match="x.txt, line 3"):
        list(json_lines(file))
