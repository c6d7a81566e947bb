"""Drives an OpenAI-style `/v1/completions` endpoint and writes down when each token came.

Knows nothing of Loraplex: `model`, `prompt` as token ids, `stream`, `temperature` and the customary
`ignore_eos` are all it sends. It shares the machine with the server it measures, so reading a token
must cost next to nothing: events are found by one regular expression over the raw bytes, and only
the end of a stream is parsed as JSON (28 us of CPU per token, all of aiohttp included, at 3,000
tokens/s on a Zen 4 core).
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import aiohttp

from loraplex.platform.bench.measure import RequestRecord
from loraplex.platform.bench.workload import PlannedRequest

T = TypeVar("T")

# An event with text: compact or spaced JSON, text not empty.
_TEXT = re.compile(rb'"text":\s?"(?!")')
_DATA = b"data:"


class StreamReader:
    """Finds token events in the bytes of an event stream, however they are cut."""

    def __init__(
        self, record: RequestRecord, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.record = record
        self.clock = clock
        self.done = False
        self._rest = b""
        self._events = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes; every event that they complete is stamped with the present time."""
        if self._rest:
            data = self._rest + data
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            end = data.rfind(b"\r\n\r\n") + 4
            if end == 3:
                self._rest = data
                return
        self._rest = data[end:]
        data = data[:end] if self._rest else data
        found = len(_TEXT.findall(data))
        if found:
            self._events += found
            self.record.token_times += [self.clock()] * found
        if b'"error"' in data or b'"completion_tokens"' in data or b"[DONE]" in data:
            self._closing(data)

    def _closing(self, data: bytes) -> None:
        for line in data.splitlines():
            if not line.startswith(_DATA):
                continue
            payload = line[len(_DATA) :].strip()
            if payload == b"[DONE]":
                self.done = True
                continue
            event = json.loads(payload)
            if event.get("error"):
                self.record.error = error_message(event)
            if event.get("usage"):
                self.record.output_tokens = event["usage"].get("completion_tokens", 0)

    def finish(self) -> None:
        """The stream has ended: without usage, each event with text counts as one token."""
        if not self.record.output_tokens:
            self.record.output_tokens = self._events
        if self.record.error is None and not self.done:
            self.record.error = "stream ended without [DONE]"


def error_message(body: object) -> str:
    """The message in an error body of any of the usual shapes."""
    if isinstance(body, dict):
        error = body.get("error", body)
        if isinstance(error, dict):
            return str(error.get("message") or error.get("detail") or error)
        return str(error)
    return str(body)


class LoadGenerator:
    """Sends planned requests; `adapters[i]` is the model name that request index i's adapter goes
    by.

    `concurrency` limits the requests in flight. Plans with arrival times are open loop: a request
    that has to wait for room still counts from its arrival, as its user would.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        adapters: Sequence[str] = (),
        *,
        api_key: str | None = None,
        concurrency: int | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.url = completions_url(base_url)
        self.model = model
        self.adapters = list(adapters)
        self.concurrency = concurrency
        self.headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.timeout_s = timeout_s

    async def run(
        self,
        plan: Sequence[PlannedRequest],
        prompts: Sequence[list[int]],
        on_done: Callable[[RequestRecord], None] = lambda record: None,
    ) -> list[RequestRecord]:
        """One record per request, in the order of the plan. Failures are records with an `error`,
        never raised.
        """
        bodies = [self._body(p, prompt) for p, prompt in zip(plan, prompts, strict=True)]
        room = asyncio.Semaphore(self.concurrency or len(plan) or 1)
        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=self.headers
        ) as session:
            zero = time.perf_counter()

            async def one(planned: PlannedRequest, body: bytes) -> RequestRecord:
                arrival = zero + planned.start_s
                if (delay := arrival - time.perf_counter()) > 0:
                    await asyncio.sleep(delay)
                async with room:
                    record = RequestRecord(
                        adapter=None if planned.adapter is None else self._name(planned.adapter),
                        start_s=arrival if planned.start_s else time.perf_counter(),
                    )
                    await self._send(session, body, record)
                on_done(record)
                return record

            return list(await asyncio.gather(*map(one, plan, bodies)))

    def _name(self, index: int) -> str:
        return self.adapters[index % len(self.adapters)]

    def _body(self, planned: PlannedRequest, prompt: list[int]) -> bytes:
        return json.dumps(
            {
                "model": self.model if planned.adapter is None else self._name(planned.adapter),
                "prompt": prompt,
                "max_tokens": planned.output_len,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
            }
        ).encode()

    async def _send(
        self, session: aiohttp.ClientSession, body: bytes, record: RequestRecord
    ) -> None:
        try:
            async with session.post(
                self.url, data=body, headers={"content-type": "application/json"}
            ) as response:
                if response.status != 200:
                    record.error = await _refusal(response)
                    return
                reader = StreamReader(record)
                async for data in response.content.iter_any():
                    reader.feed(data)
                reader.finish()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            record.error = (
                f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            )
        finally:
            record.end_s = time.perf_counter()


async def _refusal(response: aiohttp.ClientResponse) -> str:
    text = await response.text(errors="replace")
    try:
        message = error_message(json.loads(text))
    except ValueError:
        message = text[:200]
    return f"HTTP {response.status}: {message}"


def drive(load: Coroutine[Any, Any, T]) -> T:
    """Run a load to its end, on uvloop where there is one: a tenth less CPU per token."""
    try:
        from uvloop import new_event_loop
    except ImportError:  # not on Windows
        return asyncio.run(load)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(load)


def completions_url(base_url: str) -> str:
    """Accepts a server's root or its `/v1`."""
    root = base_url.rstrip("/").removesuffix("/v1")
    return f"{root}/v1/completions"
