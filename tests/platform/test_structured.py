"""The fields that ask for a structured output, and what becomes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loraplex.engine.api import Grammar, GrammarKind
from loraplex.engine.errors import InvalidRequest

SCHEMA = {"type": "object", "properties": {"ü": {"type": "integer"}}}
AS_TEXT = json.dumps(SCHEMA, ensure_ascii=False)


def of_schema(text: str = AS_TEXT, whitespace: str | None = None) -> Grammar:
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=text, whitespace=whitespace)


ANY_OBJECT = of_schema('{"type":"object"}')
GOOD: list[tuple[dict[str, Any], Grammar | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, of_schema()),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
        of_schema(),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, of_schema()),
    ({"structured_outputs": {"json": AS_TEXT, "regex": None}}, of_schema()),
    ({"structured_outputs": {"json": True}}, of_schema("true")),
    ({"structured_outputs": {"json_object": True, "backend": "auto"}}, ANY_OBJECT),
    ({"structured_outputs": {}}, None),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        of_schema(whitespace=""),
    ),
    (
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "[ ]?"}},
        of_schema(whitespace="[ ]?"),
    ),
    ({"structured_outputs": {"regex": "a+"}}, Grammar(kind=GrammarKind.REGEX, text="a+")),
    (
        {"structured_outputs": {"choice": ["a", "ü"]}},
        Grammar(kind=GrammarKind.CHOICE, text='["a", "ü"]'),
    ),
    (
        {"structured_outputs": {"grammar": "start: /a/"}},
        Grammar(kind=GrammarKind.GRAMMAR, text="start: /a/"),
    ),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": " "}, of_schema(whitespace=" ")),
    ({"guided_regex": "a"}, Grammar(kind=GrammarKind.REGEX, text="a")),
    ({"guided_choice": ["a"]}, Grammar(kind=GrammarKind.CHOICE, text='["a"]')),
    ({"guided_grammar": "x"}, Grammar(kind=GrammarKind.GRAMMAR, text="x")),
    ({"guided_json": None, "guided_decoding_backend": "xgrammar"}, None),
]


@pytest.mark.parametrize(("fields", "expected"), GOOD, ids=[str(f) for f, _ in GOOD])
async def test_a_field_becomes_a_grammar_of_every_choice(
    server: Any, fields: dict[str, Any], expected: Grammar | None
) -> None:
    answer = await server.http.post("/v1/completions", json={"prompt": "x", "n": 2, **fields})
    assert answer.status_code == 200, answer.text
    assert [r.sampling.grammar for r in server.engine.seen] == [expected, expected]


BAD: list[tuple[str, Any, str]] = [
    ("response_format", {"type": "xml"}, "invalid_grammar"),
    ("response_format", {}, "invalid_grammar"),
    ("response_format", {"type": "json_schema"}, "invalid_grammar"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "invalid_grammar"),
    ("response_format", {"type": "json_object", "schema": 3}, "invalid_grammar"),
    ("response_format", {"type": "structural_tag", "structures": []}, "unsupported_parameter"),
    ("response_format", "json", "invalid_request"),
    ("structured_outputs", {"json": "{"}, "invalid_grammar"),
    ("structured_outputs", {"json": [1]}, "invalid_grammar"),
    ("structured_outputs", {"regex": "a", "choice": ["b"]}, "invalid_grammar"),
    ("structured_outputs", {"regex": ""}, "invalid_grammar"),
    ("structured_outputs", {"regex": 7}, "invalid_grammar"),
    ("structured_outputs", {"choice": []}, "invalid_grammar"),
    ("structured_outputs", {"choice": ["a", ""]}, "invalid_grammar"),
    ("structured_outputs", {"choice": "ab"}, "invalid_grammar"),
    ("structured_outputs", {"reg": "a"}, "invalid_grammar"),
    ("structured_outputs", {"disable_any_whitespace": True}, "invalid_grammar"),
    ("structured_outputs", {"json": {}, "whitespace_pattern": 1}, "invalid_grammar"),
    ("structured_outputs", {"structural_tag": "x"}, "unsupported_parameter"),
    ("structured_outputs", {"grammar": "x" * 70_000}, "invalid_grammar"),
    ("structured_outputs", {"regex": "\ud800"}, "invalid_grammar"),
    ("structured_outputs", {"json": "[" * 100_000}, "invalid_grammar"),
    ("guided_json", 7, "invalid_request"),
    ("guided_json", "{", "invalid_grammar"),
    ("guided_choice", "ab", "invalid_request"),
    ("guided_choice", [""], "invalid_grammar"),
    ("guided_regex", "", "invalid_grammar"),
]


@pytest.mark.parametrize(("param", "value", "code"), BAD, ids=[f"{p} {v!s:.60}" for p, v, _ in BAD])
async def test_a_bad_field_is_named(server: Any, param: str, value: Any, code: str) -> None:
    text = json.dumps({"prompt": "x", param: value})
    answer = await server.http.post(
        "/v1/completions", content=text, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert server.engine.seen == []


async def test_two_fields_exclude_each_other(server: Any) -> None:
    answer = await server.http.post(
        "/v1/completions",
        json={
            "prompt": "x",
            "response_format": {"type": "json_object"},
            "structured_outputs": {"regex": "a"},
        },
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "structured_outputs"


async def test_what_the_engine_refuses_names_the_field_that_asked_for_it(server: Any) -> None:
    for stream in (False, True):
        server.engine.refuse = InvalidRequest("cannot be followed", code="invalid_grammar")
        answer = await server.http.post(
            "/v1/chat/completions",
            json={
                "messages": [{"role": "user", "content": "x"}],
                "response_format": {"type": "json_object"},
                "stream": stream,
            },
        )
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_grammar", "response_format")
