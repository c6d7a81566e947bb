"""How many adapters and how many tokens fit at once, with fixed shares and with one memory that
both sides trade: `python -m` this, with `--model` and `--gpu-gb`. Counts, no timing.

The books are the engine's own (blocks, residency, frames, exchange); only the bytes are left out.
In turns, without a restart: adapters come, while short sequences run, until one would have to go;
then long sequences, with few adapters in use, until one would have to wait; then adapters again.
The division is that of a start, see `engine.plan`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

import torch

from loraplex.adapters.frames import Frames
from loraplex.adapters.residency import AdapterSize, LoadDone, Stage
from loraplex.adapters.slots import AdapterSlots
from loraplex.engine.api import GenerationRequest, SamplingParams
from loraplex.engine.block_manager import BlockManager
from loraplex.engine.config import EngineConfig
from loraplex.engine.loader import CONFIG_PATTERNS, choose_dtype, find_model
from loraplex.engine.machine import Memory
from loraplex.engine.memory import MemoryPlan
from loraplex.engine.memory_exchange import HOLD_S, MemoryExchange
from loraplex.engine.model_config import read_model_config
from loraplex.engine.plan import GIB, Layouts, plan_gpu
from loraplex.engine.sequence import Sequence
from loraplex.engine.superblocks import Division

SHORT = 256  # tokens
NUM_SHORT = 32
NUM_IN_USE = 4  # adapters of the long sequences


@dataclass(frozen=True, slots=True)
class Counts:
    """What was there at once, by phase."""

    adapters: int  # beside short sequences
    tokens: int  # of long sequences, beside few adapters
    adapters_again: int
    to_kv: int  # superblocks traded
    to_adapters: int


class _Pool:
    """Frames without bytes; loads end at once. Implements `Loader` and `FrameMemory`."""

    def __init__(self, frames: Frames, frame_bytes: int, frames_of_adapter: int) -> None:
        self.frames = frames
        self.frame_bytes = frame_bytes
        self._size = frames_of_adapter
        self._held: dict[str, list[int]] = {}
        self._done: list[LoadDone] = []

    def is_quiet(self, superblock: int) -> bool:
        return True

    def describe(self, digest: str) -> AdapterSize:
        num_bytes = self._size * self.frame_bytes
        return AdapterSize(rank=16, pages=1, device_bytes=num_bytes, host_bytes=num_bytes)

    def begin_host_load(self, digest: str) -> None:
        self._done.append(LoadDone(digest, Stage.HOST, True, 0.1))

    def begin_device_load(self, digest: str) -> None:
        self._held[digest] = self.frames.take(digest, self._size)
        self._done.append(LoadDone(digest, Stage.DEVICE, True, 0.1))

    def drop_device(self, digest: str) -> int:
        self.frames.give_back(digest, self._held.pop(digest))
        return self._size * self.frame_bytes

    def drop_host(self, digest: str) -> int:
        return self._size * self.frame_bytes

    def forget(self, digest: str) -> None: ...

    def poll(self) -> list[LoadDone]:
        done, self._done = self._done, []
        return done


class _NoBytes:
    """Implements `Mover`."""

    def to_adapters(self, kv_superblock: int, adapter_superblock: int) -> None: ...
    def to_kv(self, adapter_superblock: int, kv_superblock: int) -> None: ...


class Books:
    """An engine's, for one plan. frames_of_adapter: what each adapter takes."""

    def __init__(
        self, plan: MemoryPlan, block_size: int, frame_bytes: int, frames_of_adapter: int
    ) -> None:
        self.now = 0.0
        self.plan = plan
        self._numbers = count()
        division = plan.division
        self.pool = _Pool(_frames(plan, frame_bytes), frame_bytes, frames_of_adapter)
        unit = None if division is None else division.blocks_per_superblock
        self.blocks = BlockManager(
            plan.num_kv_blocks,
            block_size,
            max_blocks=plan.num_kv_blocks if division is None else _most_blocks(division),
            blocks_per_superblock=unit,
            clock=self.clock,
        )
        frames = self.pool.frames
        self.slots = AdapterSlots(
            self.pool,
            device_bytes_total=frames.num_owned * frame_bytes,
            device_bytes_max=len(frames.superblocks) * frames.frames_per_superblock * frame_bytes,
            host_bytes_total=1 << 60,
            clock=self.clock,
        )
        self.exchange: MemoryExchange | None = None
        if division is not None:
            self.exchange = MemoryExchange(
                division, self.blocks, self.slots, self.pool, _NoBytes(), self.clock
            )

    def clock(self) -> float:
        return self.now

    def sequence(self, num_tokens: int) -> Sequence | None:
        """One that holds so many tokens; None if it would have to wait."""
        number = next(self._numbers)
        request = GenerationRequest(
            request_id=str(number),
            prompt_token_ids=[number] * num_tokens,
            sampling=SamplingParams(),
        )
        seq = Sequence.from_request(
            request,
            seq_id=number,
            arrival_time=self.now,
            max_model_len=num_tokens,
            eos_token_ids=frozenset(),
            seed=0,
        )
        return seq if self.blocks.allocate(seq) else None

    def adapters(self) -> int:
        """Bring adapters, each used once, until one has to go or one finds no room."""
        evictions = self.slots.num_evictions
        while self.slots.num_evictions == evictions:
            rank, digest = next(self._numbers), f"adapter-{next(self._numbers)}"
            self.slots.want(rank, [digest])
            for _ in range(4):
                self.slots.advance()
            self.slots.unwant(rank)
            if not self.slots.is_ready([digest]):
                break
            self.now += 2 * HOLD_S
        return len(self.resident())

    def resident(self) -> list[str]:
        return [r.digest for r in self.slots.residents() if self.slots.is_ready([r.digest])]

    def fill(self, num_tokens: int, most: int) -> Iterator[Sequence]:
        for _ in range(most):
            seq = self.sequence(num_tokens)
            if seq is None:
                return
            yield seq


def count_phases(books: Books) -> Counts:
    def adapters_beside_short_ones() -> int:
        short = list(books.fill(SHORT, NUM_SHORT))
        found = books.adapters()
        for seq in short:
            books.blocks.free(seq)
        return found

    first = adapters_beside_short_ones()
    in_use = books.resident()[:NUM_IN_USE]
    books.slots.acquire(in_use)
    books.now += 2 * HOLD_S
    length = books.plan.max_model_len
    long = list(books.fill(length, 1 << 20))
    rest = list(books.fill(books.blocks.block_size, 1 << 20))
    tokens = len(long) * length + len(rest) * books.blocks.block_size
    for seq in (*long, *rest):
        books.blocks.free(seq)
    books.slots.release(in_use)
    books.now += 2 * HOLD_S
    again = adapters_beside_short_ones()
    exchange = books.exchange
    traded = (0, 0) if exchange is None else (exchange.num_to_kv, exchange.num_to_adapters)
    return Counts(first, tokens, again, *traded)


def compare(model: str, gpu_gb: float, rank: int, max_model_len: int) -> dict[str, Counts]:
    """The counts with fixed shares, and with shared memory. Raises: ModelError, ValueError."""
    decoder = read_model_config(find_model(model, CONFIG_PATTERNS))
    config = EngineConfig(model=model, adapter_dir=Path(), max_model_len=max_model_len)
    config = config.for_device("cuda")
    dtype = choose_dtype(config.dtype, decoder.dtype, torch.device("cuda"))
    gpu = Memory(total=int(gpu_gb * GIB), free=int(gpu_gb * GIB))
    shared = plan_gpu(config, decoder, dtype, gpu, Memory(total=64 * GIB, free=64 * GIB))
    layouts = Layouts(decoder, dtype)
    size = layouts.here(rank, layouts.all_modules) // layouts.frame_bytes
    plans = {"fixed": replace(shared, division=None), "shared": shared}
    return {
        name: count_phases(Books(plan, config.block_size, layouts.frame_bytes, size))
        for name, plan in plans.items()
    }


def _frames(plan: MemoryPlan, frame_bytes: int) -> Frames:
    division = plan.division
    if division is None:
        return Frames(1, plan.adapter_bytes // frame_bytes, 1)
    return Frames(
        division.max_adapter_superblocks,
        division.frames_per_superblock,
        division.adapter_superblocks,
    )


def _most_blocks(division: Division) -> int:
    return division.max_kv_superblocks * division.blocks_per_superblock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a directory or hub id; its config is read")
    parser.add_argument("--gpu-gb", type=float, default=80.0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=8192)
    args = parser.parse_args()
    found = compare(args.model, args.gpu_gb, args.rank, args.max_model_len)
    names = ("adapters", "tokens", "adapters again", "to kv", "to adapters")
    print("memory  " + "".join(f"{name:>16}" for name in names))
    for name, counts in found.items():
        print(f"{name:8}" + "".join(f"{number:16,}" for number in asdict(counts).values()))
    print(json.dumps({name: asdict(counts) for name, counts in found.items()}))


if __name__ == "__main__":
    main()
