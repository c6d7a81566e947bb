"""One error body everywhere; every code of the table is raised once, by a real request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from loraplex.adapters.errors import StorageFull
from loraplex.engine.errors import (
    AdapterInUse,
    AdapterUnavailable,
    EngineDead,
    EngineError,
    InvalidRequest,
    ModelError,
    QueueFull,
)
from loraplex.platform import errors

JSON = {"content-type": "application/json"}


def check(answer: Any, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The body is the one body, and tells no secrets."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) - {"details"} == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert len(error["message"]) > 10
    assert "Traceback" not in answer.text
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    return error


BAD_FIELDS: dict[str, dict[str, Any]] = {
    "max_tokens": {"max_tokens": -1},
    "max_tokens zero": {"max_tokens": 0},
    "temperature": {"temperature": -0.5},
    "temperature word": {"temperature": "hot"},
    "top_p": {"top_p": 0},
    "top_p high": {"top_p": 1.5},
    "top_k": {"top_k": -2},
    "min_p": {"min_p": 2},
    "repetition_penalty": {"repetition_penalty": 0},
    "presence_penalty": {"presence_penalty": 5},
    "frequency_penalty": {"frequency_penalty": -5},
    "n": {"n": 0},
    "n huge": {"n": 1_000_000},
    "n times prompts": {"n": 100, "prompt": ["a", "b"]},
    "logprobs": {"logprobs": -1},
    "logprobs huge": {"logprobs": 10_000},
    "seed": {"seed": 1.5},
    "seed huge": {"seed": 2**70},
    "stop": {"stop": ["x"] * 5000},
    "stop object": {"stop": {"a": 1}},
    "stop empty": {"stop": ["a", ""]},
    "logit_bias": {"logit_bias": {"99999999": 1}},
    "logit_bias value": {"logit_bias": {"1": 1000}},
    "logit_bias word": {"logit_bias": {"the": 1}},
    "stop_token_ids": {"stop_token_ids": [100_000]},
    "allowed_token_ids": {"allowed_token_ids": []},
    "prompt ids": {"prompt": [1, 99_999_999]},
    "prompt negative": {"prompt": [-1]},
    "prompt empty": {"prompt": []},
    "prompt empty text": {"prompt": ""},
    "prompt empty ids": {"prompt": [[]]},
    "prompt object": {"prompt": {"a": 1}},
    "prompt surrogate": {"prompt": "\ud800"},
    "stream": {"stream": "maybe"},
    "adapter_id": {"adapter_id": 7},
    "adapters": {"adapters": [{"id": "a", "weight": "much"}]},
    "adapters many": {"adapters": [{"id": f"a{i}"} for i in range(9)]},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 0},
    "cache_salt": {"cache_salt": ""},
    "best_of": {"best_of": 2, "n": 3},
    "best_of times prompts": {"best_of": 100, "prompt": ["a", "b"]},
    "bad_words": {"bad_words": [""]},
    "stream_options": {"stream_options": {"include_usage": True}},
    "request_id": {"request_id": ""},
    "min_tokens": {"min_tokens": -1},
}

_TOOL = {"type": "function", "function": {"name": "add"}}
BAD_CHAT_FIELDS: dict[str, dict[str, Any]] = {
    "messages": {"messages": []},
    "messages role": {"messages": [{"content": "x"}]},
    "messages nothing": {"messages": [{"role": "user"}]},
    "messages image": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    },
    "messages call": {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
    "top_logprobs": {"top_logprobs": 3},
    "tools": {"tools": [{"type": "function"}]},
    "tools name": {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    "tools kind": {"tools": [{"type": "retrieval", "function": {"name": "a"}}]},
    "tools twice": {"tools": [_TOOL, _TOOL]},
    "tools schema": {"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]},
    "tool_choice": {"tool_choice": "required"},
    "tool_choice word": {"tools": [_TOOL], "tool_choice": "some"},
    "tool_choice name": {
        "tools": [_TOOL],
        "tool_choice": {"type": "function", "function": {"name": "sub"}},
    },
    "max_completion_tokens": {"max_completion_tokens": -1},
}


async def test_a_bad_value_is_named(server: Any) -> None:
    for kind, change in BAD_FIELDS.items():
        body = json.dumps({"prompt": "hello", **change})
        answer = await server.http.post("/v1/completions", content=body, headers=JSON)
        check(answer, 400, "invalid_request", kind.split()[0])
    assert server.engine.seen == []


async def test_a_bad_value_of_a_chat_is_named(server: Any) -> None:
    for kind, change in BAD_CHAT_FIELDS.items():
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **change}
        answer = await server.http.post("/v1/chat/completions", json=body)
        error = check(answer, 400, "invalid_request", kind.split()[0])
        if kind == "messages image":
            assert "image_url" in error["message"]
    assert server.engine.seen == []


async def test_what_is_not_supported_is_refused_by_name(server: Any) -> None:
    for field, value in (
        ("suffix", "end"),
        ("use_beam_search", True),
    ):
        answer = await server.http.post("/v1/completions", json={"prompt": "x", field: value})
        check(answer, 400, "unsupported_parameter", field)
    messages = [{"role": "user", "content": "x"}]
    for field, body in (
        ("tools", {"tools": [_TOOL]}),  # the template does not know them
        ("functions", {"functions": [{"name": "f"}]}),
        ("modalities", {"modalities": ["text", "audio"]}),
        ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}),
    ):
        answer = await server.http.post("/v1/chat/completions", json={"messages": messages, **body})
        check(answer, 400, "unsupported_parameter", field)
    streamed = {"prompt": "x", "best_of": 2, "stream": True}
    answer = await server.http.post("/v1/completions", json=streamed)
    check(answer, 400, "unsupported_parameter", "best_of")
    for harmless in ({"suffix": ""}, {"best_of": 1}, {"response_format": {"type": "text"}}):
        answer = await server.http.post("/v1/completions", json={"prompt": "x", **harmless})
        assert answer.status_code == 200


async def test_bad_chats(server: Any) -> None:
    for body in (
        {},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": "x"}], "chat_template": "{% if %}"},
        {
            "messages": [{"role": "user", "content": "x"}],
            "continue_final_message": True,
            "add_generation_prompt": True,
        },
    ):
        answer = await server.http.post("/v1/chat/completions", json=body)
        check(answer, 400, "invalid_request", "messages")
    answer = await server.http.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "x" * 500}]},
    )
    check(answer, 400, "context_length_exceeded", "messages")


async def test_bodies_that_are_no_requests(server: Any) -> None:
    for raw in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b'{"a":' * 3000,
    ):
        answer = await server.http.post("/v1/completions", content=raw, headers=JSON)
        check(answer, 400, "invalid_request", answer.json()["error"]["param"])


async def test_a_forgotten_content_type_is_named(server: Any) -> None:
    """curl -d sends a form unless told otherwise: the most common first mistake."""
    answer = await server.http.post(
        "/v1/completions",
        content=b'{"prompt": "x"}',
        headers={"content-type": "application/x-www-form-urlencoded"},
    )
    error = check(answer, 415, "unsupported_media_type")
    assert "Content-Type: application/json" in error["message"]


async def test_who_is_not_there(server: Any) -> None:
    await server.upload("sql")
    for reference in ("nobody", "sql@99", "sql:nope", "sha256:" + "0" * 64, "No Name"):
        answer = await server.http.post(
            "/v1/completions", json={"prompt": "x", "adapter_id": reference}
        )
        check(answer, 404, "adapter_not_found", "adapter_id")
    answer = await server.http.post("/v1/completions", json={"prompt": "x", "model": "gpt-17"})
    check(answer, 404, "model_not_found", "model")
    answer = await server.http.post("/v1/completions", json={"prompt": "x", "model": "sql@9"})
    check(answer, 404, "adapter_not_found", "model")
    answer = await server.http.post(
        "/v1/completions", json={"prompt": "x", "adapters": [{"id": "nobody"}]}
    )
    check(answer, 404, "adapter_not_found", "adapters")
    for order in ("load", "evict", "pin", "unpin"):
        answer = await server.http.post(f"/v1/admin/adapters/nobody/{order}", json={})
        check(answer, 404, "adapter_not_found")
    check(await server.http.get("/v1/adapters/nobody/download"), 404, "adapter_not_found")
    check(await server.http.delete("/v1/adapters/a/aliases/b"), 404, "adapter_not_found")


async def test_two_ways_to_name_adapters_must_agree(server: Any) -> None:
    await server.upload("one", alpha=8)
    await server.upload("two", alpha=16)
    both = {"prompt": "x", "adapter_id": "one", "adapters": [{"id": "one"}]}
    check(await server.http.post("/v1/completions", json=both), 400, "invalid_request", "adapters")
    differ = {"prompt": "x", "model": "one", "adapter_id": "two"}
    answer = await server.http.post("/v1/completions", json=differ)
    check(answer, 400, "invalid_request", "adapter_id")
    twice = {"prompt": "x", "adapters": [{"id": "one"}, {"id": "one@1"}]}
    answer = await server.http.post("/v1/completions", json=twice)
    check(answer, 400, "invalid_request", "adapters")


async def test_lone_surrogates_are_refused_everywhere(server: Any) -> None:
    """Valid JSON, but no text that could be stored or answered."""
    await server.upload("sql")
    for change in (
        {"description": "\ud800"},
        {"metadata": {"a": "\ud800"}},
        {"metadata": {"\ud800": 1}},
    ):
        answer = await server.http.patch(
            "/v1/adapters/sql", content=json.dumps(change), headers=JSON
        )
        check(answer, 400, "invalid_request", next(iter(change)))
    for body in ({"stop": "\ud800"}, {"model": "\ud800"}, {"adapter_id": "\ud800"}):
        answer = await server.http.post(
            "/v1/completions", content=json.dumps({"prompt": "x", **body}), headers=JSON
        )
        assert answer.status_code in (400, 404)
    assert (await server.http.get("/v1/adapters/sql")).status_code == 200


async def test_the_disk_is_full(
    server: Any, upload_parts: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StorageFull("no room on the disk for adapters")

    monkeypatch.setattr(server.runtime.store, "commit", full)
    answer = await server.http.post("/v1/adapters", data={"name": "a"}, files=upload_parts())
    check(answer, 507, "storage_full")


async def test_the_base_models_name_is_taken(server: Any, upload_parts: Callable[..., Any]) -> None:
    answer = await server.http.post("/v1/adapters", data={"name": "tiny"}, files=upload_parts())
    check(answer, 409, "name_taken", "name")


async def test_unknown_routes_and_methods(server: Any) -> None:
    check(await server.http.get("/v1/nothing-here"), 404, "not_found")
    check(await server.http.put("/v1/completions", json={}), 405, "method_not_allowed")


async def test_bad_query_parameters(server: Any) -> None:
    answer = await server.http.get("/v1/adapters", params={"limit": 0})
    check(answer, 400, "invalid_request", "limit")
    answer = await server.http.get("/v1/admin/events", params={"after": 10**30})
    check(answer, 400, "invalid_request", "after")
    answer = await server.http.delete("/v1/adapters/x", params={"version": "three"})
    check(answer, 400, "invalid_request", "version")


async def test_bodies_too_large(start: Any) -> None:
    async with start(max_body_bytes="1KB") as server:
        answer = await server.http.post("/v1/completions", json={"prompt": "x" * 2000})
        check(answer, 413, "content_too_large")

        async def chunks() -> Any:
            for _ in range(5):
                yield b"x" * 500

        answer = await server.http.post("/v1/completions", content=chunks(), headers=JSON)
        check(answer, 413, "content_too_large")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequest("the seed is out of reach of this engine"), 400, "invalid_request"),
        (
            AdapterUnavailable("adapter abc is gone", code="adapter_not_found"),
            404,
            "adapter_not_found",
        ),
        (AdapterUnavailable("adapter abc cannot be served"), 422, "adapter_unavailable"),
        *(
            (AdapterUnavailable("adapter abc cannot be served", code=code), status, code)
            for status, code in (
                (404, "adapter_deleted"),
                (409, "adapter_no_room"),
                (409, "adapter_quarantined"),
                (422, "adapter_too_large"),
                (422, "base_model_mismatch"),
                (500, "adapter_corrupt"),
                (503, "adapter_load_failed"),
                (503, "adapter_load_timeout"),
            )
        ),
        (AdapterInUse("unpin it first", code="adapter_pinned"), 409, "adapter_pinned"),
        (AdapterInUse("three requests run on it"), 409, "adapter_in_use"),
        (
            EngineError("the engine died 3 times", code="request_kills_engine"),
            500,
            "request_kills_engine",
        ),
        (QueueFull("4096 requests wait already"), 429, "queue_full"),
        (EngineDead("the engine is restarting"), 503, "engine_unavailable"),
        (ModelError("this model cannot be served"), 500, "model_unsupported"),
        (EngineError("something of a new kind", code="brand_new"), 500, "brand_new"),
    ],
)
async def test_what_the_engine_refuses(
    server: Any, error: EngineError, status: int, code: str
) -> None:
    """Refused before the first token: a plain error with its own status, also for a stream."""
    for stream in (False, True):
        server.engine.refuse = error
        body = {"prompt": "x", "stream": stream}
        check(await server.http.post("/v1/completions", json=body), status, code)
        again = await server.http.post("/v1/completions", json=body)
        assert again.status_code == 200


async def test_a_refusal_names_the_version_it_is_about(server: Any) -> None:
    """Of a canary above all: which of the two cannot be loaded?"""
    made = await server.upload("sql")
    for stream in (False, True):
        server.engine.refuse = AdapterUnavailable("it is broken", code="adapter_load_failed")
        body = {"prompt": "x", "model": "sql", "stream": stream}
        answer = await server.http.post("/v1/completions", json=body)
        check(answer, 503, "adapter_load_failed")
        assert answer.headers["x-adapter-version"] == "sql@1"
        assert answer.headers["x-adapter-digest"] == made["digest"]


async def test_a_field_that_the_engine_refuses_is_named(server: Any) -> None:
    server.engine.refuse = InvalidRequest("min_tokens=5: must not exceed max_tokens=3")
    answer = await server.http.post("/v1/completions", json={"prompt": "x"})
    check(answer, 400, "invalid_request", "min_tokens")


async def test_a_stream_that_fails_says_so_and_ends(server: Any) -> None:
    server.engine.fail_after = 3
    answer = await server.http.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert answer.status_code == 200
    last = answer.text.strip().split("\n\n")[-1]
    assert '"code":"engine_unavailable"' in last
    assert "[DONE]" not in answer.text
    plain = await server.http.post("/v1/completions", json={"prompt": "x"})
    check(plain, 503, "engine_unavailable")
    several = await server.http.post("/v1/completions", json={"prompt": "x", "n": 3})
    check(several, 503, "engine_unavailable")
    assert server.engine.running == {}


async def test_the_queue_refuses_and_counts(server: Any) -> None:
    server.engine.refuse = QueueFull("4096 requests wait already")
    await server.http.post("/v1/completions", json={"prompt": "x"})
    metrics = (await server.http.get("/metrics")).text
    assert 'vllm:admission_rejections_total{engine="0",model_name="tiny"} 1.0' in metrics


async def test_our_bugs_tell_nothing(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(server.runtime.adapters, "page", broken)
    error = check(await server.http.get("/v1/adapters"), 500, "internal_error")
    assert "secret" not in error["message"]


async def test_every_code_of_the_table_has_a_test(request: pytest.FixtureRequest) -> None:
    """The table is small enough to be checked by name against the tests of this folder."""
    sources = "".join(path.read_text() for path in request.path.parent.glob("test_*.py"))
    missing = [code for code in errors.STATUS if f'"{code}"' not in sources]
    assert missing == []


async def test_a_client_that_hangs_up_frees_the_engine(
    start: Any, until: Callable[..., Any]
) -> None:
    for stream, n in ((True, 1), (False, 1), (True, 3)):
        body = {"prompt": "x", "max_tokens": 9, "stream": stream, "n": n}
        async with start() as server:
            server.engine.hold = asyncio.Event()
            hung_up = asyncio.Event()
            request = asyncio.create_task(call_and_hang_up(server.app, body, hung_up))
            engine = server.engine
            await until(lambda engine=engine, n=n: len(engine.running) == n)
            hung_up.set()
            await request
            assert server.engine.running == {}
            assert len(server.engine.cancelled) == n
            assert server.runtime.metrics.finished == {"abort": 1}


async def call_and_hang_up(app: Any, body: dict[str, Any], hung_up: asyncio.Event) -> None:
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "headers": [(b"content-type", b"application/json")],
    }
    await app(scope, receive, send)


@pytest.mark.parametrize("number", [2**63, 10**40])
async def test_numbers_that_no_engine_can_be_told_are_refused(server: Any, number: int) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for path, name, prompt in (
        ("/v1/completions", "max_tokens", {"prompt": "x"}),
        ("/v1/completions", "min_tokens", {"prompt": "x"}),
        ("/v1/completions", "top_k", {"prompt": "x"}),
        ("/v1/chat/completions", "max_completion_tokens", {"messages": messages}),
    ):
        answer = await server.http.post(path, json={**prompt, name: number})
        assert answer.status_code == 400, name
        assert answer.json()["error"]["param"] == name
    for status, body in (
        (422, {"inputs": "x", "parameters": {"max_new_tokens": number}}),
        (400, {"text": "x", "sampling_params": {"max_new_tokens": number}}),
    ):
        answer = await server.http.post("/generate", json=body)
        assert answer.status_code == status
    await server.upload("sql")
    for name in ("max_tokens", "min_tokens", "top_k"):
        change = {"defaults": {name: number}}
        answer = await server.http.patch("/v1/adapters/sql", json=change)
        assert answer.status_code == 400, name
