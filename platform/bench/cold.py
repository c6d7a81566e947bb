"""What cold adapters cost: the same requests at a server that holds every adapter, and at one that
has room for few, in turns.

Two figures, each a ratio of medians over the rounds: the median time to first token (a cold request
waits for its load), and the 99th percentile of the gaps between tokens. The gaps are of all
requests: whoever decodes is on a resident adapter, and must not feel the loads of others.

Arrivals are Poisson and an open loop, so what counts is that the machine keeps up: the rate is
`UTILISATION` of what the server with room for all does in a closed loop, measured first. Both
servers begin from one data directory, in which every adapter was loaded once and so has its page
file; both are idle but for the one that is asked, and nothing is left to prove in the background.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from loraplex.platform.bench import models, workload
from loraplex.platform.bench.compare import Ratio, RatioResult, Result, page_bytes
from loraplex.platform.bench.loadgen import LoadGenerator, drive
from loraplex.platform.bench.measure import summarize
from loraplex.platform.bench.peer import PeerError, ServerPeer
from loraplex.platform.bench.upload import upload_folder

PROMPT_LEN, OUTPUT_LEN = 128, 32
RANK = 16  # a page each
UTILISATION = 0.4
CALIBRATION_CLIENTS, CALIBRATION_REQUESTS = 8, 32
MIN_REQUESTS = 8  # in a round, or its figures are of nothing
UPLOADS_AT_ONCE = 4
HOST_PAGES = 16  # while adapters are only prepared
SETTLE_TIMEOUT_S = 240.0  # for page files and proofs
RESIDENT, COLD = "resident", "cold"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Case:
    """adapters: of rank 16. room, host_room: how many the cold server holds on the device and on
    the host. alpha: of S-LoRA's power law; 1 is uniform.
    """

    name: str
    adapters: int
    room: int
    host_room: int
    alpha: float


CASES = (
    Case("16 adapters on room for 8", 16, 8, 16, 1.0),
    Case("200 adapters on room for 20, power law", 200, 20, 60, 0.3),
)
# For trying it out: the same in small, on a model of next to nothing. Its figures mean nothing.
TINY_SHAPE = models.LlamaShape("tiny", 2, 64, 4, 2, 16, 128, 512, max_model_len=256)
TINY_CASES = (
    Case("16 adapters on room for 8", 16, 8, 16, 1.0),
    Case("40 adapters on room for 8, power law", 40, 8, 16, 0.3),
)

TARGETS = (
    Ratio("TTFT p50, cold vs all resident", COLD, RESIDENT, "ttft_p50_ms", at_most=1.3),
    Ratio("inter-token p99, loads vs none", COLD, RESIDENT, "itl_p99_ms", at_most=1.1),
)


def evaluate(measured: dict[str, list[Result]]) -> list[RatioResult]:
    def middle(side: str, figure: str) -> float:
        values = sorted(float(result[figure]) for result in measured[side])
        half = len(values) // 2
        return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2

    return [RatioResult(r, middle(r.over, r.figure), middle(r.under, r.figure)) for r in TARGETS]


class ColdBench:
    """One model shape. round_s: seconds of arrivals, for each side. folder: takes 10 MB for each
    adapter.
    """

    def __init__(
        self, shape: models.LlamaShape, folder: Path, rounds: int, round_s: float, say: Say
    ) -> None:
        self.shape = shape
        self.folder = folder
        self.rounds = rounds
        self.round_s = round_s
        self.say = say

    def run(self, case: Case) -> tuple[dict[str, list[Result]], dict[str, Any]]:
        """The results of both sides, and how it was done. Raises: PeerError, UploadError."""
        model = models.write_model(self.folder / "model", self.shape)
        config = self.shape.config()
        folders = models.write_adapters(
            self.folder / "adapters", config, case.adapters, (RANK,), prefix="cold"
        )
        place = self.folder / case.name.replace(" ", "-").replace(",", "")
        names = list(folders)
        page = self._prepare(model, place / RESIDENT, folders)
        _copy(place / RESIDENT, place / COLD)
        with ExitStack() as stack:
            resident, cold = (
                stack.enter_context(
                    _server(model, place / side, page * room, page * case.host_room)
                )
                for side, room in ((RESIDENT, case.adapters), (COLD, case.room))
            )
            for server, loaded in ((resident, names), (cold, names[: case.room])):
                server.wait_ready()
                _load(server.url, loaded)
            rate = self._calibrate(resident, names)
            self.say(f"{case.name}: {rate:.2f} requests/s, {UTILISATION:.0%} of a closed loop's")
            if rate * self.round_s < MIN_REQUESTS:
                raise PeerError(
                    f"{rate:.2f} requests/s make no {MIN_REQUESTS} in a round of "
                    f"{self.round_s:.0f} s; give --round-s {MIN_REQUESTS / rate + 1:.0f}"
                )
            measured: dict[str, list[Result]] = {RESIDENT: [], COLD: []}
            for number in range(self.rounds):
                sides = [(RESIDENT, resident), (COLD, cold)]
                for side, server in sides if number % 2 == 0 else sides[::-1]:
                    result = self._measure(server, names, case.alpha, rate, number)
                    measured[side].append(result)
                    self.say(
                        f"{case.name}, round {number + 1}: {side} TTFT p50 "
                        f"{result['ttft_p50_ms']:,.1f} ms, inter-token p99 "
                        f"{result['itl_p99_ms']:,.1f} ms, {result['loads']} loads, "
                        f"{result['errors']} errors"
                    )
        how = {
            "adapters": case.adapters, "room": case.room, "host_room": case.host_room,
            "alpha": case.alpha, "rate": round(rate, 3), "utilisation": UTILISATION,
            "loads": {side: sum(r["loads"] for r in rows) for side, rows in measured.items()},
            "round_s": self.round_s, "prompt_len": PROMPT_LEN, "output_len": OUTPUT_LEN,
        }  # fmt: skip
        return measured, how

    def _prepare(self, model: Path, data: Path, folders: dict[str, Path]) -> int:
        """Every adapter is registered, was loaded once, has its page file and its proof. Returns
        the bytes that one takes on the device.
        """
        self.say(f"uploading and loading {len(folders)} adapters")
        # One that left the device before its proof would stay without. Pages are twice as large
        # where the model runs in float32.
        page = 2 * page_bytes(self.shape)
        with _server(model, data, page * (len(folders) + 8), page * HOST_PAGES) as server:
            server.wait_ready()
            with ThreadPoolExecutor(UPLOADS_AT_ONCE) as pool:
                list(pool.map(lambda item: upload_folder(server.url, *item), folders.items()))
            _load(server.url, list(folders))
            _verify(server.url, list(folders))
            deadline = time.monotonic() + SETTLE_TIMEOUT_S
            while time.monotonic() < deadline:
                files = sum(1 for _ in data.rglob("pages-*.bin"))
                unproven = _metric(server.url, 'loraplex:adapter_proofs{.*outcome="unproven".*}')
                if files >= len(folders) and unproven == 0:
                    break
                time.sleep(0.5)
            else:
                self.say(
                    f"{files} page files, {unproven:.0f} proofs to come; going on all the same"
                )
            with urllib.request.urlopen(f"{server.url}/v1/admin/memory", timeout=30) as answer:
                return int(json.load(answer)["adapter_page_bytes"])

    def _calibrate(self, server: ServerPeer, names: Sequence[str]) -> float:
        """Requests per second to send: a share of what a closed loop does, after one to warm up."""
        plan = workload.punica("distinct", CALIBRATION_REQUESTS, len(names), PROMPT_LEN, OUTPUT_LEN)
        generator = LoadGenerator(server.url, "base", names, concurrency=CALIBRATION_CLIENTS)
        found = [
            summarize(drive(generator.run(plan, workload.prompts(plan, self.shape.vocab_size, s))))
            for s in (1, 2)
        ]
        return UTILISATION * found[-1].req_s

    def _measure(
        self, server: ServerPeer, names: Sequence[str], alpha: float, rate: float, number: int
    ) -> Result:
        plan = workload.slora(
            len(names), alpha, rate, 1.0, self.round_s,
            (PROMPT_LEN, PROMPT_LEN + 1), (OUTPUT_LEN, OUTPUT_LEN + 1), seed=100 + number,
        )  # fmt: skip
        prompts = workload.prompts(plan, self.shape.vocab_size, 1000 + number)
        before = _metric(server.url, "vllm:lora_adapter_load_seconds_count.*")
        records = drive(LoadGenerator(server.url, "base", names).run(plan, prompts))
        loads = _metric(server.url, "vllm:lora_adapter_load_seconds_count.*") - before
        return {**summarize(records).as_dict(), "loads": int(loads)}


def _server(model: Path, data: Path, device_bytes: int, host_bytes: int) -> ServerPeer:
    flags = ["--served-model-name", "base", "--adapter-memory", str(device_bytes)]
    return ServerPeer(model, data, *flags, "--host-adapter-memory", str(host_bytes))


def _load(url: str, names: Sequence[str]) -> None:
    with httpx.Client(base_url=url, timeout=60) as http:
        for name in names:
            answer = http.post(f"/v1/admin/adapters/{name}/load", json={"wait": True})
            if answer.is_error:
                raise PeerError(f"{name} could not be loaded: {answer.text[:300]}")


def _verify(url: str, names: Sequence[str]) -> None:
    """Proofs in the background rest between each other, for five times as long in all."""
    with httpx.Client(base_url=url, timeout=120) as http:
        for name in names:
            answer = http.post(f"/v1/adapters/{name}/verify")
            if answer.is_error:
                raise PeerError(f"{name} could not be proven: {answer.text[:300]}")


def _copy(source: Path, target: Path) -> None:
    """The same registry and the same files; those never change, so they are only linked."""

    def copy(old: str, new: str) -> None:
        if os.path.basename(old).startswith("registry"):
            shutil.copy2(old, new)
        else:
            os.link(old, new)

    shutil.copytree(source, target, copy_function=copy, ignore=shutil.ignore_patterns("*.log"))


def _metric(url: str, pattern: str) -> float:
    """The sum of the samples whose name and labels match."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(_samples(text, pattern))


def _samples(text: str, pattern: str) -> Iterator[float]:
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if re.fullmatch(pattern, name):
            yield float(value)
