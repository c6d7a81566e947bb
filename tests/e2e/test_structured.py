"""Structured outputs of a real server, by the official client, beside free requests."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import openai
import pytest

pytestmark = pytest.mark.e2e

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "bé"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
}


@pytest.fixture
def client(demo_server: Any, uploaded: list[str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="unused", max_retries=0)


def base_model(client: openai.OpenAI) -> str:
    return next(m.id for m in client.models.list() if not getattr(m, "parent", None))


def complete(demo_server: Any, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{demo_server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_mixed_requests_follow_their_grammars_and_say_what_they_say_alone(
    demo_server: Any, uploaded: list[str]
) -> None:
    bodies: list[dict[str, Any]] = []
    for i, name in enumerate(uploaded):
        common = {
            "prompt": f"tell me {i}", "model": name, "max_tokens": 120, "seed": i,
            "temperature": i % 3 / 2,
        }  # fmt: skip
        shapes: list[dict[str, Any]] = [
            {"response_format": FORMAT},
            {"structured_outputs": {"regex": "[a-z]{3,6}-[0-9]{2}"}},
            {"structured_outputs": {"choice": ["left", "right", "lefty"]}, "logprobs": 3},
            {"max_tokens": 12},
        ]
        bodies += [{**common, **shape} for shape in shapes]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: complete(demo_server, **body), bodies))
    for body, answer in zip(bodies, together, strict=True):
        [choice] = answer["choices"]
        if "response_format" in body:
            jsonschema.validate(json.loads(choice["text"]), SCHEMA)
        elif "regex" in body.get("structured_outputs", ()):
            assert re.fullmatch("[a-z]{3,6}-[0-9]{2}", choice["text"])
        elif "choice" in body.get("structured_outputs", ()):
            assert choice["text"] in ("left", "right", "lefty")
            probability = choice["logprobs"]["token_logprobs"][0]
            assert probability < 0  # the raw one: the mask does not make it certain
        if "max_tokens" not in body or body["max_tokens"] == 120:
            assert choice["finish_reason"] == "stop"
    for body, answer in list(zip(bodies, together, strict=True))[::5]:
        alone = complete(demo_server, **body)
        assert alone["choices"][0]["text"] == answer["choices"][0]["text"]


def test_a_skill_that_writes_json_is_not_changed_by_a_schema_it_follows(
    client: openai.OpenAI, skills: Any
) -> None:
    question = skills["kv-json"]["tour"][0]["input"]
    ask: Any = {
        "model": "kv-json",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 60,
    }
    free = client.chat.completions.create(**ask).choices[0]
    held = client.chat.completions.create(**ask, response_format={"type": "json_object"}).choices[0]
    assert held.message.content == free.message.content
    assert held.finish_reason == free.finish_reason == "stop"


def test_streams_and_several_choices(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=base_model(client),
        messages=[{"role": "user", "content": "hi"}],
        response_format=FORMAT,
        max_tokens=120,
        seed=3,
        n=3,
        stream=True,
    )
    texts, reasons = ["", "", ""], []
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert reasons == ["stop"] * 3
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1


def test_max_tokens_may_cut_and_min_tokens_end_with_the_grammar(demo_server: Any) -> None:
    cut = complete(demo_server, prompt="x", max_tokens=4, response_format=FORMAT)
    assert cut["choices"][0]["finish_reason"] == "length"
    for more in ({"min_tokens": 20}, {"ignore_eos": True}):
        answer = complete(
            demo_server, prompt="x", max_tokens=30, structured_outputs={"regex": "a{1,9}"}, **more
        )
        assert answer["choices"][0]["text"] == "a" * 9
        assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": {"type": "json_object", "schema": {"type": "foo"}}}, "Invalid type"),
        ({"structured_outputs": {"json": {"not": {}}}}, "not"),
        ({"structured_outputs": {"regex": "("}}, "unclosed"),
        ({"guided_grammar": "start: nowhere"}, "grammar"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_field(
    demo_server: Any, fields: dict[str, Any], words: str
) -> None:
    for stream in (False, True):
        answer = httpx.post(
            f"{demo_server.url}/v1/completions",
            json={"prompt": "x", "stream": stream, **fields},
            timeout=30,
        )
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_grammar", next(iter(fields)))
        assert words in error["message"]
        assert "/" + "root" not in error["message"]
