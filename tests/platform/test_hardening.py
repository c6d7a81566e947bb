"""Towards strangers: on a real socket, with the fake engine behind it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
import uvicorn

from loraplex.platform import body_limit
from loraplex.platform.cli import http_protocol, serve

BODY = {"prompt": "x", "max_tokens": 5}


@asynccontextmanager
async def listening(app: Any, grace_s: int = 1) -> AsyncIterator[Any]:
    """uvicorn on a free port, as `loraplex serve` sets it up; the app's lifespan runs already."""
    config = uvicorn.Config(
        app,
        port=0,
        http=http_protocol.BoundedProtocol,
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=grace_s + 2,
    )
    server = serve._Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    listener = serve.bind("127.0.0.1", 0)
    server.port = listener.getsockname()[1]  # type: ignore[attr-defined]
    task = asyncio.create_task(server._serve([listener]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield server
    finally:
        server.should_exit = True
        await task


def raw_request(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw


def num_sockets() -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return found


async def misbehave(port: int, rng: random.Random) -> str:
    """One client, as it comes."""
    kind = rng.choice(("look", "half head", "half body", "leave", "read some", "stall", "finish"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = raw_request(
        {"prompt": "x", "max_tokens": 40, "stream": True, "n": rng.choice((1, 3))}
    )
    try:
        if kind == "half head":
            writer.write(request[:40])
        elif kind == "half body":
            writer.write(request[:-9])
        elif kind != "look":
            writer.write(request)
        await writer.drain()
        if kind == "read some":
            await reader.read(100)
        elif kind == "stall":
            await asyncio.sleep(rng.random() * 0.05)
        elif kind == "finish":
            while b"[DONE]" not in await reader.readuntil(b"\n\n"):
                pass
    finally:
        if kind == "leave":
            writer.transport.abort()  # a reset, not a farewell
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    return kind


async def test_a_thousand_clients_leave_nothing_behind(
    start: Any, until: Callable[..., Any]
) -> None:
    rng = random.Random(5)
    async with start() as running, listening(running.app) as server:
        await misbehave(server.port, rng)
        await until(lambda: not server.server_state.connections)
        tasks, sockets = len(asyncio.all_tasks()), num_sockets()
        kinds: list[str] = []
        for _ in range(10):
            kinds += await asyncio.gather(*(misbehave(server.port, rng) for _ in range(100)))
        assert len(kinds) == 1000
        assert all(kinds.count(kind) > 50 for kind in set(kinds))
        await until(lambda: not server.server_state.connections)
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        assert running.engine.running == {}
        assert running.runtime.admission.running == {}
        assert len(running.runtime.lifetimes) == 0
        assert num_sockets() == sockets
        ended = running.runtime.metrics.finished
        assert set(ended) <= {"length", "abort"}
        assert ended["length"] >= kinds.count("finish")
        # Whoever sent a whole request counts once, however it ended.
        assert sum(ended.values()) <= 1 + len(kinds) - kinds.count("look")
        assert (await running.http.post("/v1/completions", json=BODY)).status_code == 200


async def test_a_stalled_reader_is_cut_off_and_slows_nobody(
    start: Any, fake_engine_module: Any, until: Callable[..., Any], caplog: Any
) -> None:
    engine = fake_engine_module.FakeEngine(fake_engine_module.model_info(max_model_len=10**6))
    async with start(engine, stall_timeout_s=0.3) as running, listening(running.app) as server:
        loop = asyncio.get_running_loop()
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.setblocking(False)
            await loop.sock_connect(stalled, ("127.0.0.1", server.port))
            endless = {"prompt": "x", "max_tokens": 500_000, "stream": True, "logprobs": 5}
            await loop.sock_sendall(stalled, raw_request(endless))
            await until(lambda: len(engine.running) == 1)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as other:
                for _ in range(5):
                    answer = await other.post("/v1/completions", json=BODY)
                    assert answer.status_code == 200
            await until(lambda: not engine.running)
            assert len(engine.cancelled) == 1
            await until(lambda: "client_stalled" in [record.message for record in caplog.records])
            assert running.runtime.metrics.finished["abort"] == 1
            await until(lambda: len(server.server_state.connections) == 0)


async def test_a_request_that_takes_too_long_is_told_so(start: Any) -> None:
    async with start(request_timeout_s=1) as server:  # its streams begin within that
        server.engine.hold = asyncio.Event()
        answer = await server.http.post("/v1/completions", json=BODY)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "request_timeout"
        answer = await server.http.post("/v1/completions", json={**BODY, "stream": True})
        assert answer.status_code == 200  # it had begun
        *_, last = answer.text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert "[DONE]" not in answer.text
        assert server.engine.running == {}
        assert server.runtime.metrics.finished == {"error": 2}


async def test_a_stop_lets_streams_end_or_tells_them(start: Any, until: Callable[..., Any]) -> None:
    async with start(shutdown_timeout_s=0.3) as running:
        running.engine.hold = asyncio.Event()
        async with listening(running.app) as server:
            url = f"http://127.0.0.1:{server.port}/v1/completions"

            async def ask() -> str:
                async with httpx.AsyncClient() as client:
                    return (await client.post(url, json={**BODY, "stream": True})).text

            streams = [asyncio.create_task(ask()) for _ in range(3)]
            await until(lambda: len(running.engine.running) == 3)
        texts = await asyncio.gather(*streams)
        for text in texts:
            *_, last = text.strip().split("\n\n")
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_stopping"
        assert running.engine.running == {}


async def test_a_stop_waits_for_streams_that_end_in_time(
    start: Any, until: Callable[..., Any]
) -> None:
    async with start(shutdown_timeout_s=5) as running:
        running.engine.hold = asyncio.Event()
        async with listening(running.app) as server:
            url = f"http://127.0.0.1:{server.port}/v1/completions"
            async with httpx.AsyncClient() as client:
                stream = asyncio.create_task(client.post(url, json={**BODY, "stream": True}))
                await until(lambda: len(running.engine.running) == 1)
                server.should_exit = True
                await asyncio.sleep(0.15)
                running.engine.hold.set()
                assert (await stream).text.endswith("data: [DONE]\n\n")


async def head(port: int, *lines: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for line in lines:
            writer.write(line)
            await writer.drain()
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_heads_are_bounded_in_bytes_and_time(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.5)
    begin = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"
    big = b"x-big: " + b"a" * http_protocol.MAX_HEAD_BYTES + b"\r\n"
    async with start() as running, listening(running.app) as server:
        ok = await head(server.port, begin + b"x-some: a\r\nconnection: close\r\n\r\n")
        assert ok.startswith(b"HTTP/1.1 200")
        for request in (begin + big + b"\r\n", begin + big * 3):  # whole, and endless
            answer = await head(server.port, request)
            assert answer.startswith(b"HTTP/1.1 431"), answer[:100]
            assert b"headers_too_large" in answer
        assert await head(server.port, begin) == b""
        assert await head(server.port) == b""


async def test_bodies_are_bounded_in_depth(server: Any) -> None:
    deepest = body_limit.MAX_DEPTH
    for depth, expected in ((deepest - 1, 200), (deepest, 400), (5000, 400), (100_000, 400)):
        text = '{"prompt": "x", "max_tokens": 1, "user_data": ' + "[" * depth + "]" * depth + "}"
        answer = await server.http.post(
            "/v1/completions", content=text, headers={"content-type": "application/json"}
        )
        assert answer.status_code == expected, depth
    assert f"more than {deepest} objects and lists" in answer.json()["error"]["message"]
    # What only looks deep is not.
    for prompt in ("[" * 500, '\\"[' * 50, "{}" * 500):
        answer = await server.http.post("/v1/completions", json={**BODY, "prompt": prompt[:100]})
        assert answer.status_code == 200
    flat = {**BODY, "metadata": [[]] * 500}
    assert (await server.http.post("/v1/completions", json=flat)).status_code == 200


@pytest.mark.parametrize("end", [b"", b"\\", b'"'])
def test_looking_for_the_depth_takes_time_by_the_length_only(end: bytes) -> None:
    """Would take hours if a string without an end were tried again from each quote in it."""
    escaped = b'"' + b'\\"' * (1 << 18) + end
    assert not body_limit.is_too_deep(b"[]" * 65 + escaped)
    assert not body_limit.is_too_deep(b'["' + b"[" * 65 + end)
    assert body_limit.is_too_deep(b'{"a\\"[":' * 65)
    assert body_limit.is_too_deep(b'"\\\\"' + b"[" * 65)


async def test_a_body_that_does_not_come_is_not_waited_for(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_limit, "BODY_TIMEOUT_S", 0.3)
    async with start() as running, listening(running.app) as server:
        answer = await head(server.port, raw_request(BODY)[:-5])
        assert answer.startswith(b"HTTP/1.1 408"), answer
        assert b"body_timeout" in answer


async def test_no_page_may_call_unless_it_is_named(start: Any) -> None:
    ask = {"origin": "https://app.example.org", "access-control-request-method": "POST"}
    async with start() as server:
        answer = await server.http.options("/v1/completions", headers=ask)
        assert answer.status_code == 405
        answer = await server.http.post("/v1/completions", json=BODY, headers=ask)
        assert not any(name.startswith("access-control") for name in answer.headers)
    async with start(cors_origins="https://app.example.org", api_key="operator-key") as server:
        answer = await server.http.options("/v1/completions", headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://app.example.org"
        other = {**ask, "origin": "https://evil.example.org"}
        answer = await server.http.options("/v1/completions", headers=other)
        assert "access-control-allow-origin" not in answer.headers
        answer = await server.http.post("/v1/completions", json=BODY, headers=ask)
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == "https://app.example.org"


async def test_every_answer_has_its_headers(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"in {server.runtime.settings.data_dir}")

    monkeypatch.setattr(server.runtime.aliases, "list", broken)
    ids = set()
    for path, status in (
        ("/healthz", 200),
        ("/docs", 200),
        ("/nowhere", 404),
        ("/v1/models", 200),
        ("/v1/adapters/sql/aliases", 500),
    ):
        answer = await server.http.get(path)
        assert answer.status_code == status
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert str(server.runtime.settings.data_dir) not in answer.text
        assert "Traceback" not in answer.text
        ids.add(answer.headers["x-request-id"])
    assert len(ids) == 5
    mine = await server.http.get("/healthz", headers={"x-request-id": "job-17"})
    assert mine.headers["x-request-id"] == "job-17"
    odd = await server.http.get("/healthz", headers={"x-request-id": "a b\tc"})
    assert odd.headers["x-request-id"] != "a b\tc"


async def test_logs_name_the_request_and_never_its_text(start: Any, caplog: Any) -> None:
    """Prompts, answers, chats, bad bodies: no line of the log, at any level, has their words."""
    words = "zanzibar-quokka"
    caplog.set_level(logging.DEBUG)
    async with start() as server:
        server.engine.say = b"marmalade-fjord "
        headers = {"x-request-id": "job-17"}
        chat = {"messages": [{"role": "user", "content": words}], "max_tokens": 8}
        for path, body in (
            ("/v1/completions", {"prompt": words, "max_tokens": 16}),
            ("/v1/completions", {"prompt": words, "max_tokens": 16, "stream": True}),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", {**chat, "temperature": words}),
            ("/v1/completions", {"prompt": words * 100}),
            ("/tokenize", {"prompt": words}),
        ):
            await server.http.post(path, json=body, headers=headers)
        server.engine.fail_after = 1
        await server.http.post("/v1/chat/completions", json=chat, headers=headers)
    from loraplex.platform.telemetry import JsonFormatter

    text = "\n".join(JsonFormatter().format(record) for record in caplog.records)
    lines = [r for r in caplog.records if r.message == "request"]
    assert len(lines) == 4
    assert words not in text
    assert "marmalade" not in text


def test_log_lines_carry_the_request_id() -> None:
    from loraplex.platform.envelope import REQUEST_ID
    from loraplex.platform.telemetry import JsonFormatter

    record = logging.LogRecord("loraplex", logging.INFO, "", 0, "event", (), None)
    token = REQUEST_ID.set("job-17")
    assert json.loads(JsonFormatter().format(record))["request_id"] == "job-17"
    REQUEST_ID.reset(token)
    assert "request_id" not in json.loads(JsonFormatter().format(record))


async def test_why_the_engine_is_down_is_for_the_operator(
    start: Any, fake_engine_module: Any
) -> None:
    """It may name files of the server."""
    for settings, told in (({}, True), ({"api_key": "operator-key"}, False)):
        engine = fake_engine_module.FakeEngine()
        engine.start_error = RuntimeError("/srv/models/llama has no config.json")
        async with start(engine, wait=False, **settings) as server:
            while server.runtime.failure is None:
                await asyncio.sleep(0.001)
            headers = {"authorization": "Bearer operator-key"}
            for answer in (
                await server.http.get("/readyz"),
                await server.http.post("/v1/completions", json=BODY, headers=headers),
            ):
                assert answer.status_code == 503
                assert ("/srv/models" in answer.text) is told
