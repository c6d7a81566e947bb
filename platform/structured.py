"""What shape a request wants its output to have: the fields of OpenAI and of vLLM, as one grammar.

Only the form of the fields is checked here; whether a schema or expression can be followed is the
engine's to say, before it generates anything. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from loraplex.engine.api import Grammar, GrammarKind
from loraplex.engine.validation import MAX_GRAMMAR_CHARS
from loraplex.platform.errors import ApiError

ANY_OBJECT = '{"type":"object"}'
MAX_TEXTS = 4096  # of a choice

_WAYS = ("json", "regex", "choice", "grammar", "json_object")
_OPTIONS = ("whitespace_pattern", "disable_any_whitespace")
_WITHOUT_EFFECT = ("backend", "disable_fallback")  # which library, which vLLM chooses among


class Fields(Protocol):
    """Of a request's body. vLLM's older names are those of `structured_outputs` with `guided_`."""

    response_format: dict[str, Any] | None
    structured_outputs: dict[str, Any] | None
    guided_json: Any
    guided_regex: Any
    guided_choice: Any
    guided_grammar: Any
    guided_whitespace_pattern: Any


@dataclass(frozen=True, slots=True)
class Structured:
    """`param`: the field that asks for it."""

    grammar: Grammar
    param: str


def structured_output(body: Fields) -> Structured | None:
    """Raises: ApiError(invalid_request | invalid_grammar | unsupported_parameter)."""
    found = [
        structured
        for structured in (
            _of_response_format(body.response_format),
            _of_structured_outputs(body.structured_outputs),
            *_of_guided(body),
        )
        if structured is not None
    ]
    if len(found) > 1:
        raise ApiError(
            "invalid_request",
            f"{found[0].param} and {found[1].param} exclude each other; send one of them",
            param=found[1].param,
        )
    return found[0] if found else None


def json_schema(schema: Any, param: str, whitespace: str | None = None) -> Grammar:
    """schema: an object, a boolean, or the JSON text of one. Raises: ApiError."""
    if isinstance(schema, str):
        try:
            json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _wrong(param, f"is text that is no JSON schema: {error}") from None
        text = schema
    elif isinstance(schema, dict | bool):
        text = json.dumps(schema, ensure_ascii=False)
    else:
        raise _wrong(param, "must be a JSON schema: an object")
    return _grammar(GrammarKind.JSON_SCHEMA, text, param, whitespace)


def _of_response_format(value: Mapping[str, Any] | None) -> Structured | None:
    param = "response_format"
    if value is None or value.get("type") == "text":
        return None
    match value.get("type"):
        case "json_object":
            schema = value.get("schema")  # not OpenAI's, but sent by many
            return Structured(json_schema(ANY_OBJECT if schema is None else schema, param), param)
        case "json_schema":
            holder = value.get("json_schema")
            if not isinstance(holder, dict) or "schema" not in holder:
                raise _wrong(param, 'needs {"json_schema": {"name": ..., "schema": {...}}}')
            return Structured(json_schema(holder["schema"], param), param)
        case "structural_tag":
            raise _unsupported(param, "of type structural_tag is not supported; use json_schema")
    raise _wrong(
        param,
        f"has the type {str(value.get('type'))[:80]!r}; it may be text, json_object or json_schema",
    )


def _of_structured_outputs(
    value: Mapping[str, Any] | None, param: str = "structured_outputs"
) -> Structured | None:
    given = {key: item for key, item in (value or {}).items() if item not in (None, False)}
    for key in given:
        if key in ("structural_tag", "disable_additional_properties"):
            raise _unsupported(param, f"does not support {key}")
        if key not in (*_WAYS, *_OPTIONS, *_WITHOUT_EFFECT) and not key.startswith("_"):
            raise _wrong(param, f"has no field {key[:80]!r}; it may have {', '.join(_WAYS)}")
    ways = [way for way in _WAYS if way in given]
    if not given:
        return None
    if not ways:
        raise _wrong(param, f"needs one of {', '.join(_WAYS)}")
    if len(ways) > 1:
        raise _wrong(param, f"has {ways[0]} and {ways[1]}, which exclude each other; send one")
    return Structured(_by_way(ways[0], given, param), param)


def _by_way(way: str, given: Mapping[str, Any], param: str) -> Grammar:
    value = given[way]
    whitespace = given.get("whitespace_pattern")
    if whitespace is not None and not isinstance(whitespace, str):
        raise _wrong(param, "has a whitespace_pattern that is no text")
    if given.get("disable_any_whitespace"):
        whitespace = ""
    match way:
        case "json":
            return json_schema(value, param, whitespace)
        case "json_object":
            return json_schema(ANY_OBJECT, param, whitespace)
        case "choice":
            return _choice(value, param)
    if not isinstance(value, str) or not value:
        raise _wrong(param, f"has a {way} that is no text or empty")
    kind = GrammarKind.REGEX if way == "regex" else GrammarKind.GRAMMAR
    return _grammar(kind, value, param)


def _choice(value: Any, param: str) -> Grammar:
    if not isinstance(value, list) or not all(isinstance(t, str) and t for t in value):
        raise _wrong(param, "needs a choice that is a list of texts, none of them empty")
    if not 0 < len(value) <= MAX_TEXTS:
        raise _wrong(param, f"has a choice of {len(value)} texts; 1 to {MAX_TEXTS} are possible")
    return _grammar(GrammarKind.CHOICE, json.dumps(value, ensure_ascii=False), param)


def _of_guided(body: Fields) -> list[Structured]:
    whitespace = body.guided_whitespace_pattern
    given = {
        way: value
        for way in ("json", "regex", "choice", "grammar")
        if (value := getattr(body, f"guided_{way}")) is not None
    }
    found = []
    for way, value in given.items():
        fields = {way: value, "whitespace_pattern": whitespace}
        structured = _of_structured_outputs(fields, f"guided_{way}")
        if structured is not None:
            found.append(structured)
    return found


def _grammar(kind: GrammarKind, text: str, param: str, whitespace: str | None = None) -> Grammar:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise _wrong(
            param, f"has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} bytes are possible"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _wrong(param, "is not valid Unicode: it has a lone surrogate") from None
    return Grammar(kind=kind, text=text, whitespace=whitespace)


def _wrong(param: str, why: str) -> ApiError:
    return ApiError("invalid_grammar", f"{param} {why}", param=param)


def _unsupported(param: str, why: str) -> ApiError:
    return ApiError("unsupported_parameter", f"{param} {why}", param=param)
