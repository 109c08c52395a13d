"""JSON of ours and of servers is read by one function, which says in one line where it has another shape."""

import json
import re
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from se_keras.records import parse_json, read_json


class Inner(TypedDict):
    a: list[float]
    b: NotRequired[str | None]


class Outer(TypedDict):
    name: str
    pair: tuple[int, int]
    parts: dict[str, Inner]
    which: Literal["all"] | list[int]
    more: NotRequired[Any]


GOOD = {"name": "x", "pair": [1, 2], "parts": {"p": {"a": [1, 2.5], "b": None}}, "which": "all", "further": [[3]]}


def test_value_of_the_shape_is_read(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(GOOD))
    assert read_json(tmp_path / "x.json", Outer, what="a test") == GOOD


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": 3}, "name must be a string. Received: 3"),
        ({"name": None}, "name must be a string. Received: null"),
        ({"pair": [1]}, "pair must be a list of 2. Received: [1]"),
        ({"pair": [1, True]}, "pair.1 must be an integer. Received: true"),
        ({"pair": {}}, "pair must be a list. Received: {}"),
        ({"parts": {"p": {}}}, "parts.p lacks a"),
        ({"parts": {"p": {"a": [1, "2"]}}}, 'parts.p.a.1 must be a number. Received: "2"'),
        ({"parts": {"p": {"a": [], "b": 1}}}, "parts.p.b must be a string. Received: 1"),
        ({"which": "some"}, "which must be 'all'. Received: \"some\""),
        ({"more": json.loads("[" * 60 + "]" * 60)}, "more than 50 lists and objects are within one another"),
        ({"name": list(range(99))}, "name must be a string. Received: [0, 1, 2,"),
    ],
)
def test_value_of_another_shape_is_refused_with_the_place(change, message):
    with pytest.raises(ValueError, match=f"^'x' is not a test: {re.escape(message)}"):
        parse_json(json.dumps(GOOD | change), Outer, refusal="'x' is not a test")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000]
)
def test_deep_nesting_is_one_line(text):
    with pytest.raises(ValueError, match="^'x' is not a test: more than 50 lists and objects are within one another$"):
        parse_json(text, Any, refusal="'x' is not a test")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"nonsense", b"1" * 5000])
def test_text_that_is_not_json_is_one_line(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match="^'.+x.json' is not a test: .+$"):
        read_json(tmp_path / "x.json", Outer, what="a test")


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(ValueError, match="^it is wrong: it is not text$"):
        parse_json(b"\x1c\x00\x00\x00TFL3\xff\xff\xff\xff", dict[str, Any], refusal="it is wrong")
