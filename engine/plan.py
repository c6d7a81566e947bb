"""How a machine's memory would be divided, before anything is loaded: `python -m` this, with the
questions as JSON, and the answer is one line of JSON.

The arithmetic is that of the start (`memory.py`, `gpu/memory_plan.py`), so a server on such a
machine divides alike. What a GPU is measured for at the start, the workspace, is estimated. Needs
the model's config only, and no GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.page_layout import PAGE_RANKS, frame_elements, pack_tiles
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ModelError
from loraplex.engine.host_memory import host_address_space
from loraplex.engine.loader import CONFIG_PATTERNS, choose_dtype, find_model
from loraplex.engine.machine import Memory, device_memory
from loraplex.engine.memory import (
    RUNTIME_BYTES,
    TYPICAL_TOKENS,
    MemoryPlan,
    plan_memory,
    weights_bytes,
    workspace_bytes,
)
from loraplex.engine.model_config import DecoderConfig, read_model_config
from loraplex.engine.superblocks import Division

GIB = 1 << 30
GPU_GRANULE = 2 << 20  # that of today's GPUs; a start asks the driver
RANKS = (8, 16, 32, 64)
# What servers hold: (words, ranks in equal parts). Padding makes each as large as the largest.
MIXES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("8, 16, 32, 64 in equal parts", (8, 16, 32, 64)),
    ("every rank from 8 to 64", tuple(range(8, 65))),
    ("nine of rank 8 to one of 64", (8,) * 9 + (64,)),
    ("all 16", (16,)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """gpu_gb, ram_gb: GiB of the device and of host memory; None = no GPU, and what is free here.
    settings: of `EngineConfig`.
    """

    model: str
    gpu_gb: float | None = None
    ram_gb: float | None = None
    ranks: tuple[int, ...] = ()  # besides the usual ones
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankRoom:
    """Adapters of one rank that adapt every module. at_most: on the device, if the KV cache keeps
    no more than it must.
    """

    rank: int
    adapter_bytes: int
    on_device: int
    at_most: int
    on_host: int


@dataclass(frozen=True, slots=True)
class Mix:
    """Mean bytes of an adapter. own: its true ranks; rounded: to whole pages of ranks; here: what
    it takes on the device; padded: every rank stored as the largest.
    """

    ranks: str
    modules: str
    own: float
    rounded: float
    here: float
    padded: float


class Layouts:
    """Bytes of adapters of one model, by rank."""

    def __init__(self, model: DecoderConfig, dtype: torch.dtype) -> None:
        self._model = model
        self._itemsize = dtype.itemsize
        self.frame_bytes = frame_elements(model.module_shapes) * dtype.itemsize
        self.all_modules = tuple(range(len(model.module_shapes)))

    def here(self, rank: int, modules: tuple[int, ...]) -> int:
        return (
            _device_frames(
                self._model.num_layers,
                tuple(self._model.module_shapes),
                _whole_pages(rank),
                modules,
            )
            * self.frame_bytes
        )

    def own(self, rank: int, modules: tuple[int, ...]) -> int:
        features = sum(sum(self._model.module_shapes[module]) for module in modules)
        return self._model.num_layers * rank * features * self._itemsize

    def mixes(self) -> list[Mix]:
        rows = [self._mix(words, ranks, "all", self.all_modules) for words, ranks in MIXES]
        query_and_value = (0, 2)
        return [*rows, self._mix(*MIXES[0], "q_proj, v_proj", query_and_value)]

    def _mix(self, words: str, ranks: Sequence[int], names: str, modules: tuple[int, ...]) -> Mix:
        def mean(sizes: Sequence[int]) -> float:
            return sum(sizes) / len(ranks)

        largest = max(ranks)
        return Mix(
            ranks=words,
            modules=names,
            own=mean([self.own(rank, modules) for rank in ranks]),
            rounded=mean([self.own(_whole_pages(rank), modules) for rank in ranks]),
            here=mean([self.here(rank, modules) for rank in ranks]),
            padded=mean([self.own(largest, modules) for _ in ranks]),
        )


def _whole_pages(rank: int) -> int:
    return -(-rank // PAGE_RANKS) * PAGE_RANKS


@cache
def _device_frames(
    num_layers: int, shapes: tuple[tuple[int, int], ...], rank: int, modules: tuple[int, ...]
) -> int:
    ranks = {(layer, module): rank for layer in range(num_layers) for module in modules}
    return pack_tiles(ranks, num_layers, shapes).num_frames


def answer(question: Question) -> dict[str, Any]:
    """Raises: ModelError when this does not fit, or the model is none that can be served;
    ValueError for settings that make no sense.
    """
    directory = find_model(question.model, CONFIG_PATTERNS)
    model = read_model_config(directory)
    kind = "cpu" if question.gpu_gb is None else "cuda"
    device = torch.device(kind)
    config = EngineConfig(model=question.model, adapter_dir=Path(), **question.settings)
    config = config.for_device(kind)
    dtype = choose_dtype(config.dtype, model.dtype, device)
    host = device_memory(torch.device("cpu")) if question.ram_gb is None else _all(question.ram_gb)
    if question.gpu_gb is None:
        space = host_address_space()
        plan = plan_memory(config, model, dtype, device, host, space.granule if space else 0)
    else:
        plan = plan_gpu(config, model, dtype, _all(question.gpu_gb), host)
    layouts = Layouts(model, dtype)
    division = plan.division
    tokens = plan.num_kv_blocks * config.block_size
    typical = min(TYPICAL_TOKENS, plan.max_model_len)
    rooms = []
    for rank in sorted({*RANKS, *question.ranks}):
        size = layouts.here(rank, layouts.all_modules)
        at_first = _adapters(
            layouts, plan, division.adapter_superblocks if division else None, size
        )
        at_most = _adapters(
            layouts, plan, division.max_adapter_superblocks if division else None, size
        )
        rooms.append(RankRoom(rank, size, at_first, at_most, plan.host_adapter_bytes // size))
    return {
        "model": question.model,
        "device": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "device_bytes_total": plan.device_bytes_total,
        "device_bytes_free": plan.device_bytes_free,
        "estimated": kind == "cuda",
        "memory": [
            {"purpose": purpose, "bytes": size, "reason": reason}
            for purpose, size, reason in plan.table()
        ],
        "max_model_len": plan.max_model_len,
        "model_positions": model.max_position_embeddings,
        "max_num_seqs": config.step_sizes[0],
        "kv_tokens": tokens,
        "kv_tokens_at_most": _most_tokens(config, plan),
        "shared": None if division is None else _shared(division),
        "sequences": {
            "of_typical_length": min(config.step_sizes[0], tokens // typical),
            "of_full_length": min(config.step_sizes[0], tokens // plan.max_model_len),
            "typical_length": typical,
        },
        "adapters": [asdict(room) for room in rooms],
        "mixes": [asdict(mix) for mix in layouts.mixes()],
    }


def _adapters(layouts: Layouts, plan: MemoryPlan, superblocks: int | None, size: int) -> int:
    """How many of `size` bytes fit; frames do not cross superblocks, adapters do."""
    if plan.division is None or superblocks is None:
        return plan.adapter_bytes // size
    num_frames = superblocks * plan.division.frames_per_superblock
    return num_frames // (size // layouts.frame_bytes)


def _most_tokens(config: EngineConfig, plan: MemoryPlan) -> int:
    division = plan.division
    if division is None:
        return plan.num_kv_blocks * config.block_size
    return division.max_kv_superblocks * division.blocks_per_superblock * config.block_size


def _shared(division: Division) -> dict[str, int]:
    size = division.superblock_bytes
    return {
        "bytes": division.num_bytes,
        "superblock_bytes": size,
        "superblocks": division.num_superblocks,
        "kv_cache_bytes_min": division.kv_floor * size,
        "adapter_bytes_min": division.adapter_floor * size,
    }


def plan_gpu(
    config: EngineConfig, model: DecoderConfig, dtype: torch.dtype, gpu: Memory, host: Memory
) -> MemoryPlan:
    """The plan of a GPU with nothing else on it, had its steps the estimated size."""
    from loraplex.engine.gpu.memory_plan import MeasuredGpu, check_weights_fit, plan_gpu_memory
    from loraplex.engine.gpu.memory_profile import graph_bytes

    check_weights_fit(config, model, dtype, gpu)
    weights = weights_bytes(model, dtype)
    step = workspace_bytes(config, model, dtype) - RUNTIME_BYTES
    measured = MeasuredGpu(
        before=gpu,
        now=Memory(total=gpu.total, free=gpu.free - weights),
        weights=weights,
        step=step,
        graphs=graph_bytes(config, step),
    )
    return plan_gpu_memory(config, model, dtype, measured, host, GPU_GRANULE)


def _all(gib: float) -> Memory:
    return Memory(total=int(gib * GIB), free=int(gib * GIB))


def main(text: str) -> None:
    question = json.loads(text)
    try:
        result = answer(Question(**{**question, "ranks": tuple(question.get("ranks", ()))}))
    except (ModelError, ValueError) as error:
        result = {"error": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
