"""Where a GPU's bytes go, when the weights are loaded and a step has been measured.

It serves nobody else, so all that may be used is used: adapters first, for they are what makes one
model many; the KV cache takes the rest. Arithmetic only, see `memory_profile` for the measuring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ModelError
from loraplex.engine.machine import Memory
from loraplex.engine.memory import (
    RUNTIME_BYTES,
    MemoryPlan,
    adapter_page_bytes,
    kv_block_bytes,
    kv_blocks,
    memory_exceeded,
    page_table_bytes,
    share_memory,
    size,
    weights_bytes,
)
from loraplex.engine.model_config import DecoderConfig

ADAPTER_SHARE = (
    0.20  # of what is left: adapters for every sequence of a step, but no more than this
)
HOST_ADAPTERS_PER_DEVICE = 4  # host memory for adapters, in units of the device's
PINNED_SHARE = 0.25  # ... but no more than this share of the free host memory
MAX_PINNED_BYTES = 16 << 30  # ... nor than this: pinning takes about a third of a second a GiB


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGpu:
    """A GPU with the weights loaded. Sizes in bytes."""

    before: Memory  # when nothing was loaded
    now: Memory
    weights: int
    step: int  # what the largest step needed beyond the weights
    graphs: int  # what captured steps will need


def check_weights_fit(
    config: EngineConfig, model: DecoderConfig, dtype: torch.dtype, gpu: Memory
) -> None:
    """Before anything is loaded. Raises: ModelError when the weights alone are too much."""
    needed, limit = weights_bytes(model, dtype), usable_bytes(config, gpu)
    if needed > limit:
        raise ModelError(
            f"the model does not fit: {size(needed)} of weights, {size(limit)} of GPU memory that "
            "may be used; use a smaller model or raise --gpu-memory-utilization",
            code="model_too_large",
        )


def usable_bytes(config: EngineConfig, gpu: Memory) -> int:
    """Of a GPU as it is now."""
    limit = int(gpu.total * config.gpu_memory_utilization)
    return max(0, limit - (gpu.total - gpu.free))


def plan_gpu_memory(
    config: EngineConfig,
    model: DecoderConfig,
    dtype: torch.dtype,
    gpu: MeasuredGpu,
    host: Memory,
    granule: int = 0,
) -> MemoryPlan:
    """granule: in which memory can be traded (`engine.superblocks`), 0 = it cannot.

    Raises: ModelError when the length asked for, or what was asked for together, cannot fit."""
    max_num_seqs, max_num_tokens = config.step_sizes
    usable = usable_bytes(config, gpu.now)
    workspace = gpu.step + gpu.graphs + RUNTIME_BYTES
    rest = usable - workspace
    block_bytes = kv_block_bytes(model, config.block_size, dtype)
    page_bytes = adapter_page_bytes(model, dtype)
    if granule:  # the tables are for as many adapters as there may come to be
        rest -= rest // page_bytes * model.num_layers * page_table_bytes(model)
    if rest < block_bytes + page_bytes:
        raise ModelError(
            f"the model does not fit: {size(usable)} may be used beside the weights, a step needs "
            f"{size(workspace)} and the smallest KV cache and adapter "
            f"{size(block_bytes + page_bytes)}; raise --gpu-memory-utilization, lower "
            "--max-num-batched-tokens or use a smaller model",
            code="model_too_large",
        )
    reasons = {
        "workspace": f"measured: {max_num_tokens} tokens, {max_num_seqs} sequences in a step",
        "left to others": f"--gpu-memory-utilization {config.gpu_memory_utilization:g}",
    }
    adapter_bytes = config.adapter_memory
    if adapter_bytes is None:
        share = int(rest * ADAPTER_SHARE)
        adapter_bytes = max(page_bytes, min(max_num_seqs * page_bytes, share))
        reasons["adapters on the device"] = f"{adapter_bytes // page_bytes} of rank 16: " + (
            f"{ADAPTER_SHARE:.0%} of what is left" if adapter_bytes == share else "one a sequence"
        )
    left = rest - adapter_bytes
    kv_bytes = config.kv_cache_memory or block_bytes
    if kv_bytes > left:
        raise memory_exceeded(kv_bytes, adapter_bytes, rest)
    max_model_len, num_blocks = kv_blocks(config, model, left // block_bytes, block_bytes)
    if config.kv_cache_memory is None:
        tokens = num_blocks * config.block_size
        reasons["kv cache"] = f"{tokens:,} tokens: all that is left"
    host_bytes = config.host_adapter_memory
    if host_bytes is None:
        host_bytes = min(
            HOST_ADAPTERS_PER_DEVICE * adapter_bytes,
            int(host.free * PINNED_SHARE),
            MAX_PINNED_BYTES,
        )
        reasons["adapters on the host"] = f"{host_bytes // page_bytes} of rank 16, pinned"
    plan = MemoryPlan(
        max_model_len=max_model_len,
        weights_bytes=gpu.weights,
        workspace_bytes=workspace,
        kv_block_bytes=block_bytes,
        num_kv_blocks=num_blocks,
        adapter_bytes=adapter_bytes,
        adapter_page_bytes=page_bytes,
        host_adapter_bytes=host_bytes,
        device_bytes_total=gpu.before.total,
        device_bytes_free=gpu.before.free,
        shares_host=False,
        reasons=reasons,
    )
    return share_memory(plan, config, model, dtype, granule)
