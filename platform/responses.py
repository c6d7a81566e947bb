"""Responses that generate while they are being sent, and stop the engine at once when the client
hangs up.

Both wait for the first news before the headers go out, so a request that the engine refuses is a
plain error with its own status; once a stream has begun, an error is an event and the stream ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraplex.engine.errors import EngineError
from loraplex.engine.stream import TextChunk
from loraplex.platform import errors
from loraplex.platform.embeddings import VectorForm, written
from loraplex.platform.inference import Prepared
from loraplex.platform.lifetimes import ClientStalled, Lifetimes
from loraplex.platform.openai_format import Collected, StreamWriter, encode, whole

log = logging.getLogger(__name__)

OnEnd = Callable[[Prepared, str], None]

ABORT = "loraplex.abort"  # ASGI extension: a function that drops the connection at once


class EventWriter(Protocol):
    """What is sent of a stream; `openai_format.StreamWriter` is one."""

    def chunk(self, index: int, chunk: TextChunk) -> bytes: ...

    def last(self) -> bytes:
        """What follows the last chunk."""
        ...

    def error(self, status: int, code: str, message: str) -> bytes:
        """Instead of all that would follow."""
        ...


class GenerationResponse(Response):
    """Runs one prepared generation. `on_end` hears exactly once how it ended: a finish reason,
    "abort" or "error". Dialects say in subclasses how answers look.
    """

    _lifetimes: Lifetimes

    def __init__(self, prepared: Prepared, on_end: OnEnd) -> None:
        super().__init__()
        self._prepared = prepared
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lease = self._prepared.caller.lease
        if lease is not None:  # raises what is answered with 429: nothing has begun yet
            generation = self._prepared.generation
            lease.begin(self._prepared.answer.id, generation.num_prompt_tokens)
            generation.on_tokens = lease.charge
        self._lifetimes = scope["app"].state.runtime.lifetimes
        send = sending = self._lifetimes.guarded(send)
        work = self._stream(send) if self._prepared.stream else self._limited(self._whole(send))
        outcome = "abort"
        try:
            outcome = await _unless_disconnected(receive, work) or "abort"
        except ClientStalled:
            log.warning("client_stalled", extra={"answer_id": self._prepared.answer.id})
            await _hang_up(scope)
        except EngineError as error:
            outcome = "error"
            # The error's own response says as well which weights it was about, and which field.
            state = scope.setdefault("state", {})
            state["adapter_headers"] = self._prepared.composition.headers()
            if error.code == "invalid_grammar":
                state["param"] = self._prepared.grammar_param
            raise
        finally:
            self._lifetimes.release(sending)
            self._on_end(self._prepared, outcome)

    async def _limited(self, work: Coroutine[Any, Any, str]) -> str:
        async with self._lifetimes.limited():
            return await work

    def _writer(self) -> EventWriter:
        return StreamWriter(self._prepared.answer, self._prepared.generation)

    async def _answer(self) -> Any:
        """The body of a whole answer, once all of it is there."""
        prepared = self._prepared
        generation = prepared.generation
        collected = [Collected(prepared.answer, choice) for choice in generation.choices]
        async with aclosing(generation.deltas()) as deltas:
            async for index, chunk in deltas:
                collected[index].add(chunk)
        return whole(prepared.answer, generation, collected)

    def _answer_headers(self) -> dict[str, str]:
        """Sent with an answer, which may just begin."""
        return self._prepared.composition.headers()

    async def _whole(self, send: Send) -> str:
        body = encode(await self._answer())
        await send(self._start(b"application/json", len(body)))
        await send({"type": "http.response.body", "body": body})
        return self._finish_reason()

    async def _stream(self, send: Send) -> str:
        prepared = self._prepared
        writer = self._writer()
        body = b""
        begun = False
        running = len(prepared.generation.choices)
        async with aclosing(prepared.generation.deltas()) as deltas:
            try:
                async with self._lifetimes.limited():
                    async for index, chunk in deltas:
                        if not begun:
                            begun = True
                            await send(self._start(b"text/event-stream; charset=utf-8"))
                        body = writer.chunk(index, chunk)
                        running -= chunk.finish_reason is not None
                        if not running:
                            break
                        await send({"type": "http.response.body", "body": body, "more_body": True})
            except EngineError as error:
                if not begun:
                    raise
                body = writer.error(errors.status_of(error), error.code, error.message)
                await send({"type": "http.response.body", "body": body})
                return "error"
        # Sent when nothing is left to do: a server may report the end of the response as a
        # disconnect.
        await send({"type": "http.response.body", "body": body + writer.last()})
        return self._finish_reason()

    def _finish_reason(self) -> str:
        return self._prepared.generation.choices[0].finish_reason or "abort"

    def _start(self, content_type: bytes, length: int | None = None) -> dict[str, Any]:
        headers = [(b"content-type", content_type)]
        if length is None:
            headers.append((b"cache-control", b"no-cache"))
            headers.append((b"x-accel-buffering", b"no"))  # nginx would hold the stream back
        else:
            headers.append((b"content-length", b"%d" % length))
        headers += [
            (name.encode(), value.encode()) for name, value in self._answer_headers().items()
        ]
        return {"type": "http.response.start", "status": 200, "headers": headers}


class EmbeddingResponse(GenerationResponse):
    """One vector for each prompt, when all are there."""

    def __init__(self, prepared: Prepared, on_end: OnEnd, form: VectorForm) -> None:
        super().__init__(prepared, on_end)
        self._form = form

    async def _whole(self, send: Send) -> str:
        generation = self._prepared.generation
        vectors: dict[int, bytes] = {}
        async with aclosing(generation.deltas()) as deltas:
            async for index, chunk in deltas:
                assert chunk.embedding is not None, "a pooled request without a vector"
                vectors[index] = chunk.embedding
        answer = await asyncio.to_thread(
            lambda: encode(written(self._prepared.answer, generation, vectors, self._form))
        )
        await send(self._start(b"application/json", len(answer)))
        await send({"type": "http.response.body", "body": answer})
        return self._finish_reason()


async def _hang_up(scope: Scope) -> None:
    """Close a connection whose send buffer is full, where the server lets us (`http_protocol`)."""
    abort = scope.get("extensions", {}).get(ABORT)
    if abort is not None:
        abort()
        await asyncio.sleep(0)


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, str]) -> str | None:
    """The work's result, or None when the client left first; the work is cancelled then, and has
    ended on return.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        await _end(gone)
        await _end(task)


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()  # seen, whoever raised it
