"""Where the bytes go: weights, KV cache, adapters, workspace. Decided before anything is loaded.

Settings that are given are kept, or refused with the flag that would help; those that are not are
chosen from what the model needs and the machine has. Arithmetic only: allocates nothing. A GPU is
measured instead, see `engine.gpu.memory_plan`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from loraplex.adapters.page_layout import frame_elements
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ModelError
from loraplex.engine.machine import Memory
from loraplex.engine.model_config import DecoderConfig
from loraplex.engine.superblocks import Division, divide

logger = logging.getLogger(__name__)

MIB = 1 << 20
# Shares of what is left after weights and workspace. Modest on a CPU, whose memory others use too.
KV_SHARE = {"cpu": 0.40, "cuda": 0.80}
ADAPTER_SHARE = 0.15
HOST_ADAPTER_SHARE = 0.15
# What the defaults aim at; the shares above are the limit.
TYPICAL_TOKENS = 2048  # of a sequence
TYPICAL_ADAPTERS = 64  # of rank 16, every module adapted
MIN_ADAPTER_BYTES = 256 * MIB
RUNTIME_BYTES = 256 * MIB  # allocator slack, Python, the kernels' own copies


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes unless said otherwise."""

    max_model_len: int  # tokens
    weights_bytes: int
    workspace_bytes: int
    kv_block_bytes: int
    num_kv_blocks: int
    adapter_bytes: int
    adapter_page_bytes: int  # one 16-rank page that adapts every module
    host_adapter_bytes: int
    device_bytes_total: int
    device_bytes_free: int  # before loading
    shares_host: bool = True  # the device's memory is the host's
    reasons: Mapping[str, str] = field(
        default_factory=dict
    )  # of sizes nobody asked for, by purpose
    division: Division | None = None  # of what KV cache and adapters share; None: each has its own

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_kv_blocks * self.kv_block_bytes

    def table(self) -> list[tuple[str, int, str]]:
        """The start-up table: (purpose, bytes, why so many). The sizes of a device add up to what
        was free.
        """
        sizes = {
            "weights": self.weights_bytes,
            "kv cache": self.kv_cache_bytes,
            "adapters on the device": self.adapter_bytes,
            "adapters on the host": self.host_adapter_bytes,
            "workspace": self.workspace_bytes,
        }
        used = sum(sizes.values()) - (0 if self.shares_host else self.host_adapter_bytes)
        sizes["left to others"] = self.device_bytes_free - used
        return [(purpose, size, self.reasons.get(purpose, "")) for purpose, size in sizes.items()]


def plan_memory(
    config: EngineConfig,
    model: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    memory: Memory,
    granule: int = 0,
) -> MemoryPlan:
    """granule: in which memory can be traded (`superblocks.py`), 0 = it cannot.

    Raises: ModelError when the model, or the length asked for, cannot fit.
    """
    weights = weights_bytes(model, dtype)
    workspace = workspace_bytes(config, model, dtype)
    usable = memory.free
    if device.type == "cuda":
        usable = min(usable, int(memory.total * config.gpu_memory_utilization))
    rest = usable - weights - workspace
    block_bytes = kv_block_bytes(model, config.block_size, dtype)
    page_bytes = adapter_page_bytes(model, dtype)
    if rest < block_bytes:
        raise ModelError(
            f"the model does not fit: {size(weights)} of weights and {size(workspace)} to compute "
            f"in {size(usable)} of free memory; use a smaller model"
            + (" or --dtype bfloat16" if dtype == torch.float32 else ""),
            code="model_too_large",
        )
    share = int(rest * KV_SHARE[device.type]) // block_bytes
    if device.type != "cuda":
        longest = config.max_model_len or model.max_position_embeddings
        typical = math.ceil(min(longest, TYPICAL_TOKENS) / config.block_size)
        wanted = max(config.step_sizes[0] * typical, math.ceil(longest / config.block_size))
        share = min(share, wanted)
    max_model_len, num_blocks = kv_blocks(config, model, share, block_bytes)
    kv_bytes = num_blocks * block_bytes
    adapter_bytes = config.adapter_memory
    if adapter_bytes is None:
        wanted = max(TYPICAL_ADAPTERS * page_bytes, MIN_ADAPTER_BYTES)
        adapter_bytes = min(wanted, int(rest * ADAPTER_SHARE), max(rest - kv_bytes, 0))
    host_bytes = config.host_adapter_memory
    if host_bytes is None:
        host_bytes = min(2 * adapter_bytes, int(rest * HOST_ADAPTER_SHARE))
    if kv_bytes + adapter_bytes > rest:
        raise memory_exceeded(kv_bytes, adapter_bytes, rest)
    plan = MemoryPlan(
        max_model_len=max_model_len,
        weights_bytes=weights,
        workspace_bytes=workspace,
        kv_block_bytes=block_bytes,
        num_kv_blocks=num_blocks,
        adapter_bytes=adapter_bytes,
        adapter_page_bytes=page_bytes,
        host_adapter_bytes=host_bytes,
        device_bytes_total=memory.total,
        device_bytes_free=memory.free,
    )
    return share_memory(plan, config, model, dtype, granule)


def share_memory(
    plan: MemoryPlan, config: EngineConfig, model: DecoderConfig, dtype: torch.dtype, granule: int
) -> MemoryPlan:
    """Let the KV cache and the adapters trade what they have, unless one of them is fixed by a
    setting.
    """
    if not granule or config.kv_cache_memory is not None or config.adapter_memory is not None:
        return plan
    division = divide(
        kv_bytes=plan.kv_cache_bytes,
        adapter_bytes=plan.adapter_bytes,
        granule=granule,
        num_planes=2 * model.num_layers,
        block_bytes=plan.kv_block_bytes,
        frame_bytes=frame_elements(model.module_shapes) * dtype.itemsize,
        blocks_of_longest=math.ceil(plan.max_model_len / config.block_size),
        page_bytes=plan.adapter_page_bytes,
    )
    if division is None:
        return plan
    num_blocks = division.kv_superblocks * division.blocks_per_superblock
    num_tokens = division.max_kv_superblocks * division.blocks_per_superblock * config.block_size
    pages, most_pages = (
        superblocks * division.frames_per_superblock // model.num_layers
        for superblocks in (division.adapter_superblocks, division.max_adapter_superblocks)
    )
    return replace(
        plan,
        num_kv_blocks=num_blocks,
        adapter_bytes=division.adapter_superblocks * division.superblock_bytes,
        division=division,
        reasons={
            **plan.reasons,
            "kv cache": f"{num_blocks * config.block_size:,} tokens at first, up to "
            f"{num_tokens:,} while adapters leave them room",
            "adapters on the device": f"{pages:,} of rank 16 at first, up to "
            f"{most_pages:,} while sequences are short",
        },
    )


def kv_blocks(
    config: EngineConfig,
    model: DecoderConfig,
    num_blocks: int,
    block_bytes: int,
) -> tuple[int, int]:
    """(max_model_len, number of blocks). A length nobody asked for shrinks to what fits.

    num_blocks: unless --kv-cache-memory says otherwise.
    """
    longest = model.max_position_embeddings
    wanted_len = config.max_model_len
    if wanted_len is not None and wanted_len > longest:
        raise ModelError(
            f"max_model_len {wanted_len} exceeds the model's {longest} positions; "
            f"use --max-model-len {longest} or less",
            code="max_model_len_exceeded",
        )
    max_model_len = wanted_len or longest
    block_size = config.block_size
    if config.kv_cache_memory is not None:
        num_blocks = config.kv_cache_memory // block_bytes
    needed = math.ceil(max_model_len / block_size)
    if num_blocks >= needed:
        return max_model_len, num_blocks
    fits = num_blocks * block_size
    if wanted_len is not None or fits == 0:
        raise ModelError(
            f"one sequence of {max_model_len} tokens takes {size(needed * block_bytes)} of KV "
            f"cache, there are {size(num_blocks * block_bytes)}; give --kv-cache-memory "
            f"{needed * block_bytes} or more"
            + (f", or --max-model-len {fits} or less" if fits else ""),
            code="kv_cache_too_small",
        )
    logger.warning(
        "max_model_len is %d instead of the model's %d: that is what the KV cache of %s holds "
        "(--kv-cache-memory, --max-model-len)",
        fits,
        longest,
        size(num_blocks * block_bytes),
    )
    return fits, num_blocks


def memory_exceeded(kv_bytes: int, adapter_bytes: int, rest: int) -> ModelError:
    return ModelError(
        f"{size(kv_bytes)} of KV cache and {size(adapter_bytes)} of adapters do not fit: "
        f"{size(rest)} are free beside the model; lower --kv-cache-memory or --adapter-memory",
        code="memory_exceeded",
    )


def weights_bytes(model: DecoderConfig, dtype: torch.dtype) -> int:
    """What the loaded weights take; a tied output head is packed, so it is a copy of its own."""
    elements = sum(math.prod(shape) for shape in model.tensor_shapes().values())
    if model.tie_word_embeddings:
        elements += model.vocab_size * model.hidden_size
    return elements * dtype.itemsize


def kv_block_bytes(model: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
    return 2 * model.num_layers * model.kv_size * block_size * dtype.itemsize


def adapter_page_bytes(model: DecoderConfig, dtype: torch.dtype) -> int:
    """16 ranks of an adapter that adapts every module of every layer."""
    return model.num_layers * frame_elements(model.module_shapes) * dtype.itemsize


def page_table_bytes(model: DecoderConfig) -> int:
    """Of one page: two offsets, live ranks and scaling of each module of each layer."""
    return model.num_layers * len(model.module_shapes) * (8 + 8 + 4 + 4)


def workspace_bytes(config: EngineConfig, model: DecoderConfig, dtype: torch.dtype) -> int:
    """The widest moment of a step, and the sampler's fp32 copies of the logits."""
    widest = 4 * model.hidden_size + 3 * model.intermediate_size + 2 * model.q_size
    max_num_seqs, max_num_tokens = config.step_sizes
    activations = max_num_tokens * widest * dtype.itemsize
    logits = max_num_seqs * model.vocab_size * (dtype.itemsize + 3 * 4)
    return activations + logits + RUNTIME_BYTES


def size(num_bytes: int) -> str:
    """`1.5 GiB`, for messages."""
    amount = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError("unreachable")
