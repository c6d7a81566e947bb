"""The benchmark of issue 2: our server and transformers + peft on the same random models, in turns.

Absolute figures move with the machine and with whatever else runs on it; so both sides are measured
in every round, minutes apart at most, and what is reported is the ratio of medians, against its
target. Everything of ours goes through HTTP, streaming. Prompt 128, output 64, greedy.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from loraplex.platform.bench import models, workload
from loraplex.platform.bench.loadgen import LoadGenerator, drive
from loraplex.platform.bench.measure import RequestRecord, summarize
from loraplex.platform.bench.peer import BaselinePeer, ServerPeer
from loraplex.platform.bench.upload import upload_folder

PROMPT_LEN = 128
OUTPUT_LEN = 64
PEFT_ADAPTERS = 8
MANY_ADAPTERS = 32

# The rotation case; half of its clients stay on adapters that are resident.
REGISTERED, IN_ROTATION, ROOM_FOR = 200, 64, 16
HOT_ADAPTERS = 8
HOT_CLIENTS = COLD_CLIENTS = 8

Result = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ratio:
    """`measured[over] / measured[under]` of one figure; `at_least` or `at_most` is the target."""

    name: str
    over: str
    under: str
    figure: str = "output_tok_s"
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, slots=True)
class RatioResult:
    ratio: Ratio
    over: float
    under: float

    @property
    def value(self) -> float:
        return self.over / self.under if self.under else float("nan")

    @property
    def reached(self) -> bool:
        low, high = self.ratio.at_least, self.ratio.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    @property
    def target(self) -> str:
        if self.ratio.at_least is not None:
            return f">= {self.ratio.at_least:g}"
        return f"<= {self.ratio.at_most:g}" if self.ratio.at_most is not None else "-"


def ratios(model: str) -> list[Ratio]:
    """The targets of issue 2, 'Speed and memory'."""
    small = model == "small"
    static, mixed = (1.5, 4.0) if small else (1.4, 2.7)
    found = [
        Ratio("base vs transformers static, 8 at once", "base@8", "static@8", at_least=static),
        Ratio("base vs transformers static, 32 at once", "base@32", "static@32", at_least=static),
        Ratio("8 adapters vs own base, 8 at once", "8 adapters@8", "base@8", at_least=0.7),
        Ratio("8 adapters vs own base, 32 at once", "8 adapters@32", "base@32", at_least=0.8),
        Ratio("8 adapters vs peft mixed, 8 at once", "8 adapters@8", "peft mixed@8"),
        Ratio(
            "8 adapters vs peft mixed, 32 at once", "8 adapters@32", "peft mixed@32", at_least=mixed
        ),
        Ratio("32 adapters vs own base, 32 at once", "32 adapters@32", "base@32", at_least=0.6),
        Ratio(
            "TTFT p50, 8 adapters vs own base",
            "8 adapters@32",
            "base@32",
            "ttft_p50_ms",
            at_most=1.4,
        ),
    ]
    if small:
        found.append(
            Ratio(
                "inter-token p99 of resident adapters, loads vs none",
                "rotation, loads",
                "rotation, no loads",
                "itl_p99_ms",
                at_most=1.5,
            )
        )
    return found


def evaluate(model: str, measured: Mapping[str, Sequence[Result]]) -> list[RatioResult]:
    """Ratios of medians; those whose cases were not measured are left out."""
    return [
        RatioResult(r, _median(measured[r.over], r.figure), _median(measured[r.under], r.figure))
        for r in ratios(model)
        if r.over in measured and r.under in measured
    ]


def _median(results: Sequence[Result], figure: str) -> float:
    return float(median(result[figure] for result in results))


def page_bytes(shape: models.LlamaShape) -> int:
    """One bf16 page of 16 ranks that adapts every linear module."""
    sizes = models.linear_shapes(shape.config()).values()
    return 16 * 2 * shape.num_layers * sum(sum(size) for size in sizes)


def pages(adapters: int) -> int:
    return sum(-(-models.RANKS[i % len(models.RANKS)] // 16) for i in range(adapters))


class Comparison:
    """One model shape, measured in rounds. `folder` takes a few GB and may be reused."""

    def __init__(self, shape: models.LlamaShape, folder: Path, rounds: int, say: Say) -> None:
        self.shape = shape
        self.folder = folder / shape.name
        self.rounds = rounds
        self.say = say
        self.measured: dict[str, list[Result]] = {}
        # A closed loop's first and last wave are not typical; the big model cannot afford many.
        self.waves = 4 if shape.name == "small" else 2

    def run(self, *, rotation: bool = True) -> dict[str, list[Result]]:
        """Every case, `rounds` times. Raises: PeerError when a side does not come up or refuses."""
        self.say(f"{self.shape.name}: writing the model and {MANY_ADAPTERS} adapters")
        model = models.write_model(self.folder / "model", self.shape)
        folders = self._adapters(MANY_ADAPTERS)
        room = int(page_bytes(self.shape) * pages(MANY_ADAPTERS) * 1.25)
        with ExitStack() as stack:
            baseline = stack.enter_context(
                BaselinePeer(model, list(folders.values())[:PEFT_ADAPTERS])
            )
            flags = ("--adapter-memory", str(room), "--served-model-name", "base")
            server = stack.enter_context(ServerPeer(model, self.folder / "data", *flags))
            server.wait_ready()
            baseline.wait_ready()
            for name, folder in folders.items():
                upload_folder(server.url, name, folder)
            self._warm(server, list(folders))
            for number in range(self.rounds):
                for case, result in self._round(number, server, baseline, list(folders)):
                    self._note(f"round {number + 1}/{self.rounds}", case, result)
        if rotation:
            self._rotation(model)
        return self.measured

    def _round(
        self, number: int, server: ServerPeer, baseline: BaselinePeer, names: list[str]
    ) -> Iterator[tuple[str, Result]]:
        few, seed = names[:PEFT_ADAPTERS], 1000 * number
        for clients in (8, 32):
            case = {
                "concurrency": clients,
                "num_requests": clients,
                "prompt_len": PROMPT_LEN,
                "output_len": OUTPUT_LEN,
                "seed": seed,
            }
            yield f"base@{clients}", self._ours(server, [], clients, seed + clients)
            yield f"static@{clients}", baseline.run({**case, "mode": "static"})
            yield f"8 adapters@{clients}", self._ours(server, few, clients, seed + clients + 1)
            yield f"peft mixed@{clients}", baseline.run({**case, "mode": "mixed"})
        yield "32 adapters@32", self._ours(server, names, 32, seed + 40)

    def _ours(self, server: ServerPeer, adapters: list[str], clients: int, seed: int) -> Result:
        plan = self._plan(adapters, clients * self.waves)
        generator = LoadGenerator(server.url, "base", adapters, concurrency=clients)
        prompts = workload.prompts(plan, self.shape.vocab_size, seed)
        return summarize(drive(generator.run(plan, prompts))).as_dict()

    def _warm(self, server: ServerPeer, names: list[str]) -> None:
        """Load every adapter, and let every batch size that is coming be met once."""
        self._ours(server, names, 32, seed=99)
        self._ours(server, [], 8, seed=98)

    def _plan(self, adapters: Sequence[str], count: int) -> list[workload.PlannedRequest]:
        # `distinct` over n adapters gives each the same share, in shuffled order.
        popularity = "distinct" if adapters else "base"
        return workload.punica(popularity, count, len(adapters), PROMPT_LEN, OUTPUT_LEN)

    def _adapters(self, count: int) -> dict[str, Path]:
        return models.write_adapters(self.folder / "adapters", self.shape.config(), count)

    def _note(self, when: str, case: str, result: Result) -> None:
        self.measured.setdefault(case, []).append(result)
        errors = f", {result['errors']} ERRORS" if result["errors"] else ""
        self.say(
            f"{self.shape.name} {when}: {case} {result['output_tok_s']:,.0f} tok/s, "
            f"TTFT p50 {result['ttft_p50_ms'] or 0:,.0f} ms, "
            f"inter-token p99 {result['itl_p99_ms'] or 0:,.0f} ms{errors}"
        )

    # --- rotation: loads must not be felt by those who need none ---

    def _rotation(self, model: Path) -> None:
        self.say(f"{self.shape.name}: writing and uploading {REGISTERED} adapters")
        folders = self._adapters(REGISTERED)
        room = page_bytes(self.shape) * pages(ROOM_FOR)
        flags = ("--adapter-memory", str(room), "--served-model-name", "base")
        with ServerPeer(model, self.folder / "rotation", *flags) as server:
            server.wait_ready()
            for name, folder in folders.items():
                upload_folder(server.url, name, folder)
            names = list(folders)
            hot = names[:HOT_ADAPTERS]
            for name in hot:
                _post(f"{server.url}/v1/admin/adapters/{name}/pin")
            still, turning = names[HOT_ADAPTERS:ROOM_FOR], names[HOT_ADAPTERS:IN_ROTATION]
            drive(self._hot_and_cold(server, hot, still, seed=97))
            for number in range(self.rounds):
                for case, cold in (("rotation, no loads", still), ("rotation, loads", turning)):
                    result = drive(self._hot_and_cold(server, hot, cold, 2000 + 2 * number))
                    self._note(f"round {number + 1}/{self.rounds}", case, result)

    async def _hot_and_cold(
        self, server: ServerPeer, hot: list[str], cold: list[str], seed: int
    ) -> Result:
        """The figures of the hot clients, while cold ones keep the server busy; errors are of
        both.
        """
        cold_records: list[RequestRecord] = []
        plan = self._plan(hot, HOT_CLIENTS * 6)
        hot_load = LoadGenerator(server.url, "base", hot, concurrency=HOT_CLIENTS)
        cold_plan = self._plan(cold, COLD_CLIENTS * 50)
        cold_load = LoadGenerator(server.url, "base", cold, concurrency=COLD_CLIENTS)
        background = asyncio.create_task(
            cold_load.run(
                cold_plan,
                workload.prompts(cold_plan, self.shape.vocab_size, seed + 1),
                cold_records.append,
            )
        )
        try:
            prompts = workload.prompts(plan, self.shape.vocab_size, seed)
            records = await hot_load.run(plan, prompts)
        finally:
            background.cancel()
            await asyncio.gather(background, return_exceptions=True)
        result = summarize(records).as_dict()
        failed = [r for r in cold_records if r.error]
        result["errors"] += len(failed)
        result["cold_requests"] = len(cold_records)
        for record in failed:
            message = str(record.error)
            result["error_messages"][message] = result["error_messages"].get(message, 0) + 1
        return result


def medians(results: Sequence[Result]) -> Result:
    """One result for a case: each figure its median over the rounds; counts are sums."""
    merged: Result = {"rounds": len(results)}
    for key, value in results[0].items():
        values = [r[key] for r in results]
        if key in ("requests", "errors", "output_tokens"):
            merged[key] = sum(values)
        elif isinstance(value, float):
            merged[key] = round(float(median(values)), 4)
    merged["output_tok_s_rounds"] = [r["output_tok_s"] for r in results]
    return merged


def _post(url: str) -> None:
    request = urllib.request.Request(
        url, data=json.dumps({}).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60):
        pass
