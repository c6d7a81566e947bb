"""What the API process costs: tokens streamed per second of its CPU, and time added to the first.

Question: does the server keep up with an engine that answers at once? Physics: a token is one
message from the engine process (shared by all streams of a step), a table look-up for its text,
one JSON string and one write to a socket. Beside it, in the same run, Starlette alone streams the
same events from a timer: the floor of this framework and machine.

Seconds of CPU are read from the process, so the result holds on a machine that others use, too;
wall-clock figures do not.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

Which = Literal["ours", "plain"]
WHICH: tuple[Which, ...] = ("ours", "plain")

GOAL_TOKENS_PER_S = 2000.0  # per core, 64 streams open
GOAL_TTFT_MS = 3.0
START_DEADLINE_S = 120.0
DONE = b"data: [DONE]"
CPU_TICK_S = 0.01  # the system counts a process's seconds in steps of this


@dataclass(frozen=True, slots=True)
class Streaming:
    """One server at one offered rate. events: server-sent events, of which each should carry one
    token; fewer means that the server fell behind and put tokens together.
    """

    offered_per_s: float
    tokens: int
    events: int
    wall_s: float
    cpu_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s

    @property
    def tokens_per_cpu_s(self) -> float:
        return self.events / max(self.cpu_s, CPU_TICK_S)

    @property
    def kept_up(self) -> bool:
        return self.events >= 0.95 * self.tokens and self.tokens_per_s >= 0.9 * self.offered_per_s


@dataclass(frozen=True, slots=True)
class FirstToken:
    """At low load, from sending a request to its first event; cpu_ms: of the server for all of
    the request.
    """

    median_ms: float
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class Overhead:
    """ours, plain: by offered rate."""

    streams: int
    ours: list[Streaming]
    plain: list[Streaming]
    our_first: FirstToken
    plain_first: FirstToken

    @property
    def highest(self) -> Streaming:
        """The highest rate that our server kept up with; the lowest measured if none."""
        return next((run for run in reversed(self.ours) if run.kept_up), self.ours[0])

    @property
    def ratio(self) -> float:
        """Our CPU per token to Starlette's, at the highest rate."""
        at = self.ours.index(self.highest)
        return self.plain[at].tokens_per_cpu_s / self.highest.tokens_per_cpu_s

    @property
    def added_ttft_ms(self) -> float:
        return self.our_first.median_ms - self.plain_first.median_ms

    def as_dict(self) -> dict[str, Any]:
        best = self.highest
        return {
            "streams": self.streams,
            "kept_up_tokens_per_s": round(best.tokens_per_s) if best.kept_up else None,
            "tokens_per_cpu_s": round(best.tokens_per_cpu_s),
            "cpu_per_token_vs_starlette": round(self.ratio, 2),
            "added_ttft_ms": round(self.added_ttft_ms, 3),
            "goals": {"tokens_per_s_per_core": GOAL_TOKENS_PER_S, "added_ttft_ms": GOAL_TTFT_MS},
            "goals_met": best.tokens_per_cpu_s >= GOAL_TOKENS_PER_S
            and self.added_ttft_ms < GOAL_TTFT_MS,
            "first_token": {"ours": asdict(self.our_first), "plain": asdict(self.plain_first)},
            "ours": [asdict(run) for run in self.ours],
            "plain": [asdict(run) for run in self.plain],
        }


async def measure(
    *,
    streams: int = 64,
    rates: tuple[float, ...] = (2000.0, 4000.0, 8000.0),
    seconds: float = 4.0,
    probes: int = 200,
) -> Overhead:
    """Both servers in turns, rate by rate. Raises: RuntimeError when one does not start."""
    found: dict[Which, list[Streaming]] = {"ours": [], "plain": []}
    firsts: dict[Which, FirstToken] = {}
    for rate in rates:
        for which in WHICH:
            async with _server(which, streams / rate) as (url, process):
                await _stream_all(url, streams, 10)  # warm
                found[which].append(await _one(url, process, streams, rate, seconds))
                if which not in firsts:
                    firsts[which] = await _first_tokens(url, process, probes)
    return Overhead(streams, found["ours"], found["plain"], firsts["ours"], firsts["plain"])


async def _one(
    url: str, process: psutil.Process, streams: int, rate: float, seconds: float
) -> Streaming:
    tokens = max(2, round(rate * seconds / streams))
    before, started = _cpu_s(process), time.perf_counter()
    events = await _stream_all(url, streams, tokens)
    return Streaming(
        offered_per_s=rate,
        tokens=tokens * streams,
        events=events,
        wall_s=time.perf_counter() - started,
        cpu_s=_cpu_s(process) - before,
    )


def _cpu_s(process: psutil.Process) -> float:
    """Of the API process alone, without its engine."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def _stream_all(url: str, streams: int, tokens: int) -> int:
    """Events that came on all streams, without the ends."""
    return sum(await asyncio.gather(*(_stream(url, tokens) for _ in range(streams))))


async def _stream(url: str, tokens: int) -> int:
    reader, writer = await _request(url, tokens)
    events, unread = 0, b""
    try:
        while data := await reader.read(1 << 16):
            unread += data
            *whole, unread = unread.split(b"\n\n")  # a read may end anywhere
            events += sum(b"data: {" in event for event in whole)
            if any(DONE in event for event in whole):
                break
    finally:
        writer.close()
    return events


async def _first_tokens(url: str, process: psutil.Process, count: int) -> FirstToken:
    """Requests for two tokens, one after the other."""
    seconds = []
    before = _cpu_s(process)
    for _ in range(count):
        started = time.perf_counter()
        reader, writer = await _request(url, 2)
        seen = b""
        while b"data: {" not in seen:
            seen += await reader.read(1 << 16)
        seconds.append(time.perf_counter() - started)
        while DONE not in seen:
            seen += await reader.read(1 << 16)
        writer.close()
    cpu_s = (_cpu_s(process) - before) / count
    return FirstToken(statistics.median(seconds) * 1000, cpu_s * 1000)


async def _request(url: str, tokens: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """By hand: a client library would cost more than the server."""
    address = httpx.URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    body = json.dumps({"prompt": "hello", "max_tokens": tokens, "stream": True}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )
    return reader, writer


@asynccontextmanager
async def _server(which: Which, interval_s: float) -> AsyncIterator[tuple[str, psutil.Process]]:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "loraplex.platform.bench.overhead_server"]
        process = subprocess.Popen(
            [*command, which, repr(interval_s), str(Path(directory) / "data")],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            port = await asyncio.to_thread(process.stdout.readline)
            url = f"http://127.0.0.1:{port.strip()}"
            await _wait_ready(url, process)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, 20)
            except subprocess.TimeoutExpired:  # a machine that is very busy
                process.kill()
                await asyncio.to_thread(process.wait)
            assert process.stdout is not None
            process.stdout.close()


async def _wait_ready(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    async with httpx.AsyncClient() as http:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if (await http.get(f"{url}/readyz")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)
    raise RuntimeError("a server of the bench did not start; its output says why")
