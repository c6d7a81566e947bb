"""OpenAI's own client against a real uvicorn on a loopback port, with the fake engine behind it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

from loraplex.platform.app import create_app
from loraplex.platform.settings import Settings


@pytest.fixture
async def real(tmp_path: Path, fake_engine_module: Any) -> AsyncIterator[tuple[str, Any]]:
    """(base URL, engine) of a running server."""
    engine = fake_engine_module.FakeEngine()
    app = create_app(Settings(model="tiny", data_dir=tmp_path / "data"), engine)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    async with asyncio.timeout(10):
        while not (server.started and app.state.runtime.ready):
            await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", engine
    finally:
        server.should_exit = True
        await serving
        listener.close()


@pytest.fixture
async def client(real: tuple[str, Any]) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=real[0], api_key="unused", max_retries=0) as made:
        yield made


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="tiny", prompt=["x", "y"], n=2, max_tokens=3, logprobs=1
    )
    assert [(c.index, c.text) for c in answer.choices] == [(i, "abc") for i in range(4)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 12)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["a", "b", "c"]
    stream = await client.completions.create(model="tiny", prompt="x", max_tokens=3, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "abc"


async def test_chat(client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    answer = await client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content == "abc"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert [t.token for t in answer.choices[0].logprobs.content] == ["a", "b", "c"]
    stream = await client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "abc"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 3


async def test_embeddings(client: openai.AsyncOpenAI) -> None:
    """The client asks for base64 by itself, and makes numbers of it."""
    answer = await client.embeddings.create(model="tiny", input=["ab", "c"])
    assert [item.index for item in answer.data] == [0, 1]
    assert answer.data[0].embedding[0] / answer.data[0].embedding[1] == pytest.approx(97 / 98)
    plain = await client.embeddings.create(model="tiny", input="ab", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(answer.data[0].embedding)
    assert plain.usage.prompt_tokens == 2


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_errors_are_the_clients_own_classes(client: openai.AsyncOpenAI, real: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="no-such", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as negative:
        await client.completions.create(model="tiny", prompt="x", max_tokens=-1)
    assert negative.value.param == "max_tokens"
    from loraplex.engine.errors import QueueFull

    real[1].refuse = QueueFull("4096 requests wait already")
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model="tiny", prompt="x")
    real[1].fail_after = 2
    with pytest.raises(openai.APIError):  # in the middle of a stream
        async for _ in await client.completions.create(model="tiny", prompt="x", stream=True):
            pass


async def test_closing_a_stream_cancels_it(client: openai.AsyncOpenAI, real: Any) -> None:
    engine = real[1]
    engine.hold = asyncio.Event()
    stream = await client.completions.create(model="tiny", prompt="x", max_tokens=50, stream=True)
    async for _ in stream:
        break
    assert len(engine.running) == 1
    await stream.close()
    async with asyncio.timeout(10):
        await engine.finished.wait()
    assert engine.running == {}
    assert len(engine.cancelled) == 1
