"""What clients notice while the engine process is killed, stopped and starved of memory.

    python -m loraplex.platform.bench.faults --faults 50 --streams 32

Starts a server on the demo model with its adapters, writes down what every case answers when
nothing is wrong, then keeps that many streams open while faults come at random moments. Every
stream must end as usual, with the very text it had before; a fault may cost time only. Prints how
long streams paused and one line of JSON; exit status 1 if any stream was cut, wrong or refused for
another reason than "restarting, try again".

    kill    SIGKILL, as the kernel does when memory is short
    stop    SIGSTOP: a process that hangs as a whole
    memory  its address space may not grow any more: allocations fail inside steps
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from loraplex.platform.bench.peer import ServerPeer
from loraplex.platform.bench.report import json_line
from loraplex.platform.bench.upload import upload_folder

ASSETS = Path(__file__).resolve().parent.parent / "demo" / "assets"
KINDS = ("kill", "stop", "memory")
RECOVERY_DEADLINE_S = 120.0
UNFELT_S = 10.0  # memory that nobody asks for is not missed: then the limit is lifted again


@dataclass(frozen=True, slots=True)
class Case:
    """One request, the same every time; seeded, so its text is known."""

    name: str
    body: dict[str, Any]


@dataclass(slots=True)
class Tally:
    """What the streams saw."""

    completed: int = 0
    paused: int = 0  # completed, after a fault had come in between
    told_to_retry: int = 0
    problems: list[str] = field(default_factory=list)
    last_token: float = 0.0  # monotonic, of any stream


def make_cases(adapters: Sequence[str], count: int, max_tokens: int) -> list[Case]:
    """Greedy and sampled ones in turn, on the base model and on each adapter."""
    models = [None, *adapters]
    cases = []
    for i in range(count):
        body: dict[str, Any] = {
            "prompt": f"case {i}: " + "tell me more " * (1 + i % 7),
            "max_tokens": max_tokens + 13 * (i % 5),
            "ignore_eos": True,
            "stream": True,
            "temperature": 0.0 if i % 2 == 0 else 1.0,
            "seed": i,
        }
        if (adapter := models[i % len(models)]) is not None:
            body["adapter_id"] = adapter
        cases.append(Case(f"case-{i}", body))
    return cases


async def run_case(http: httpx.AsyncClient, case: Case, tally: Tally) -> str | None:
    """Its text; None when the server said to try again later.

    Raises: AssertionError when the stream did not end as it should.
    """
    text, finished = "", False
    async with http.stream("POST", "/v1/completions", json=case.body) as answer:
        if answer.status_code == 503:
            assert "retry-after" in answer.headers, "503 without retry-after"
            return None
        assert answer.status_code == 200, f"{answer.status_code}: {await answer.aread()!r}"
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                finished = True
                break
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, f"in the stream: {event['error']}"
            for choice in event["choices"]:
                text += choice["text"]
            tally.last_token = time.monotonic()
    assert finished, f"cut off after {len(text)} characters"
    return text


class FaultRun:
    def __init__(self, url: str, server_pid: int, cases: list[Case], rng: random.Random) -> None:
        self.tally = Tally()
        self.recoveries: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.unfelt = 0
        self.num_faults = 0
        self._server = psutil.Process(server_pid)
        self._cases = cases
        self._expected: dict[str, str] = {}
        self._rng = rng
        self._over = False
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(30, read=RECOVERY_DEADLINE_S),
            limits=httpx.Limits(max_connections=None),
        )

    async def run(self, kinds: Sequence[str], count: int) -> None:
        """kinds: of faults, drawn from at random."""
        async with self._http:
            texts = await asyncio.gather(*(self._undisturbed(case) for case in self._cases))
            self._expected = {
                case.name: text for case, text in zip(self._cases, texts, strict=True)
            }
            streams = [asyncio.create_task(self._keep_open(case)) for case in self._cases]
            try:
                for _ in range(count):
                    await self._inject(self._rng.choice(kinds))
            finally:
                self._over = True
                await asyncio.gather(*streams)

    async def _undisturbed(self, case: Case) -> str:
        text = await run_case(self._http, case, self.tally)
        assert text is not None, "the server is not ready"
        return text

    async def _keep_open(self, case: Case) -> None:
        """One stream after the other, the last of them after the last fault."""
        is_last = False
        while not is_last:
            is_last, faults_before = self._over, self.num_faults
            try:
                text = await run_case(self._http, case, self.tally)
            except (AssertionError, httpx.HTTPError) as error:
                self.tally.problems.append(f"{case.name}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.5)
                continue
            if text is None:
                self.tally.told_to_retry += 1
                is_last = False
                await asyncio.sleep(0.2)
                continue
            if text != self._expected[case.name]:
                self.tally.problems.append(f"{case.name}: the text differs")
            self.tally.completed += 1
            self.tally.paused += self.num_faults > faults_before

    async def _inject(self, kind: str) -> None:
        """One fault at a random moment, and the wait until streams go on."""
        await asyncio.sleep(self._rng.uniform(0.0, 1.5))
        engine = self._engine()
        self.num_faults += 1
        began = time.monotonic()
        if kind == "kill":
            engine.kill()
        elif kind == "stop":
            os.kill(engine.pid, signal.SIGSTOP)
        elif not await self._starve(engine):
            self.unfelt += 1
            return
        await self._until(lambda: not _runs(engine))
        ready = await self._ready_again()
        await self._until(lambda: self.tally.last_token > ready)
        self.recoveries[kind].append(self.tally.last_token - began)

    async def _ready_again(self) -> float:
        """Returns when, in monotonic seconds; what streams still had of the old engine is out."""
        deadline = time.monotonic() + RECOVERY_DEADLINE_S
        while time.monotonic() < deadline:
            if (await self._http.get("/readyz")).status_code == 200:
                return time.monotonic()
            await asyncio.sleep(0.02)
        raise RuntimeError(f"no recovery within {RECOVERY_DEADLINE_S:.0f} s")

    async def _starve(self, engine: psutil.Process) -> bool:
        """Its address space may not grow. False if it got by with what it had."""
        before = resource.prlimit(engine.pid, resource.RLIMIT_AS)
        resource.prlimit(engine.pid, resource.RLIMIT_AS, (engine.memory_info().vms, before[1]))
        deadline = time.monotonic() + UNFELT_S
        while time.monotonic() < deadline:
            if not _runs(engine):
                return True
            await asyncio.sleep(0.05)
        if _runs(engine):
            resource.prlimit(engine.pid, resource.RLIMIT_AS, before)
            return False
        return True

    def _engine(self) -> psutil.Process:
        for child in self._server.children(recursive=True):
            if "loraplex.engine.process" in " ".join(child.cmdline()):
                return child
        raise RuntimeError("the server has no engine process")

    async def _until(self, condition: Any) -> None:
        deadline = time.monotonic() + RECOVERY_DEADLINE_S
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no recovery within {RECOVERY_DEADLINE_S:.0f} s")
            await asyncio.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def measure(
    kinds: Sequence[str], faults: int, streams: int, max_tokens: int, seed: int
) -> dict[str, Any]:
    """The whole run, with a server of its own in a temporary directory."""
    adapters = sorted(path for path in (ASSETS / "adapters").iterdir() if path.is_dir())
    with (
        tempfile.TemporaryDirectory(prefix="loraplex-faults-") as folder,
        # fp32: in bf16 the matrix products of another batch size may round to another token.
        ServerPeer(ASSETS / "model", Path(folder) / "data", "--dtype", "float32") as server,
    ):
        server.wait_ready()
        for adapter in adapters:
            upload_folder(server.url, adapter.name, adapter)
        cases = make_cases([adapter.name for adapter in adapters], streams, max_tokens)
        run = FaultRun(server.url, server.pid, cases, random.Random(seed))
        asyncio.run(run.run(kinds, faults))
        listed = httpx.get(f"{server.url}/v1/adapters", params={"limit": 100}).json()["data"]
    lost = {adapter.name for adapter in adapters} - {item["id"] for item in listed}
    problems = run.tally.problems + [f"adapter {name} is lost" for name in sorted(lost)]
    return {
        "faults": run.num_faults,
        "unfelt": run.unfelt,
        "streams": streams,
        "completed": run.tally.completed,
        "completed_through_faults": run.tally.paused,
        "told_to_retry": run.tally.told_to_retry,
        "problems": len(problems),
        "problem_kinds": dict(Counter(p.partition(": ")[2] for p in problems).most_common(5)),
        "recovery_s": {
            kind: {
                "count": len(times),
                "median": round(statistics.median(times), 2),
                "max": round(max(times), 2),
            }
            for kind, times in run.recoveries.items()
            if times
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, default=50, help="how many faults")
    parser.add_argument("--streams", type=int, default=32, help="streams open at any time")
    parser.add_argument("--tokens", type=int, default=300, help="tokens of a stream, at least")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which faults, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds: unknown {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    result = measure(kinds, arguments.faults, arguments.streams, arguments.tokens, arguments.seed)
    for kind, times in result["recovery_s"].items():
        print(
            f"{kind:8} {times['count']:3} times, streams went on after {times['median']:.2f} s "
            f"(median), {times['max']:.2f} s at most"
        )
    print(
        f"{result['completed']} streams completed, {result['completed_through_faults']} of them "
        f"through a fault; {result['problems']} problems {result['problem_kinds'] or ''}"
    )
    print(json_line("faults", **result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
