"""Puts an engine together from its settings: the only place that knows all the parts.

directory -> config -> memory plan -> weights -> KV cache, page pool -> runner, loader -> Engine

On a GPU the memory plan comes after the weights: it is made from measurements.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import msgspec
import torch

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.pool import PagePool
from loraplex.adapters.slots import AdapterSlots
from loraplex.engine.adapter_loader import AdapterLoader
from loraplex.engine.api import MemoryInfo
from loraplex.engine.base_weights import BaseWeights
from loraplex.engine.batch import BatchBuilder
from loraplex.engine.block_manager import BlockManager
from loraplex.engine.config import EngineConfig
from loraplex.engine.constraints import Constraints
from loraplex.engine.engine import Engine
from loraplex.engine.errors import ModelError
from loraplex.engine.grammars import GuidanceCompiler
from loraplex.engine.host_memory import host_address_space
from loraplex.engine.hosted import HostedEngine
from loraplex.engine.loader import Checkpoint, choose_dtype, find_model
from loraplex.engine.machine import available_cpus, device_memory
from loraplex.engine.memory import MemoryPlan, plan_memory, size
from loraplex.engine.memory_exchange import MemoryExchange
from loraplex.engine.model import Decoder, load_decoder
from loraplex.engine.model_config import DecoderConfig, read_model_config
from loraplex.engine.model_info import describe_model
from loraplex.engine.model_runner import ModelRunner
from loraplex.engine.probe import AdapterProber
from loraplex.engine.sampling import Sampler
from loraplex.engine.seams import Runner
from loraplex.engine.table_digests import TableDigests
from loraplex.engine.traded_memory import AddressSpace, TradedMemory
from loraplex.kernels.ops import KVCache, Ops, new_zeros
from loraplex.kernels.select import select_ops

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]


def build_engine(
    config: EngineConfig, on_progress: OnProgress = lambda phase, done, total: None
) -> HostedEngine:
    """Load the model and make everything ready to serve.

    on_progress: called with (phase, steps done, steps in all).

    Raises: ModelError when this model, or this size of it, cannot be served here.
    """
    torch.set_num_threads(config.num_threads or available_cpus())
    on_progress("model", 0, 1)
    directory = find_model(config.model)
    model = read_model_config(directory)
    device = _choose_device(config.device)
    config = config.for_device(device.type)
    dtype = choose_dtype(config.dtype, model.dtype, device)
    on_progress("model", 1, 1)

    on_progress("kernels", 0, 1)
    try:
        ops = select_ops(config.backend, device, dtype, batch_invariant=config.batch_invariant)
    except ValueError as error:
        raise ModelError(str(error), code="backend_unavailable") from error
    on_progress("kernels", 1, 1)

    before = device_memory(device)
    space, static_because = address_space(config, device)
    granule = 0 if space is None else space.granule
    measures = ops.name == "triton" and device.type == "cuda"
    if measures:
        from loraplex.engine.gpu.memory_plan import check_weights_fit

        check_weights_fit(config, model, dtype, before)
    else:
        plan = plan_memory(config, model, dtype, device, before, granule)
    with Checkpoint(directory) as checkpoint:
        table_digests = TableDigests(checkpoint, model)
        decoder = load_decoder(
            model,
            checkpoint,
            ops,
            dtype,
            device,
            lambda done, total: on_progress("weights", done, total),
        )
        weight_digests = table_digests.result()
        base = BaseWeights(decoder, checkpoint.fingerprint())
    if measures:
        from loraplex.engine.gpu.assembly import measured_plan

        plan = measured_plan(config, model, decoder, dtype, device, before, on_progress, granule)
    memory = None
    if space is not None and plan.division is not None:
        try:
            memory = TradedMemory(plan.division, space)
        except (OSError, ValueError, RuntimeError) as error:
            static_because = f"there are no addresses for it: {error}"
            plan = replace(plan, division=None)
    elif not static_because:
        static_because = "there is too little of it to cut up"
    for purpose, num_bytes, reason in plan.table():
        logger.info("memory %-22s %10s  %s", purpose, size(num_bytes), reason)
    info = describe_model(
        config.model,
        directory,
        model,
        dtype=dtype,
        device=device,
        backend=ops.name,
        max_model_len=plan.max_model_len,
        weight_digests=weight_digests,
    )
    if static_because:
        logger.info("KV cache and adapters have memory of their own: %s", static_because)
    pool = _make_pool(model, plan, memory, dtype, device)
    kv_cache = _make_kv_cache(config, model, ops, plan, memory, dtype, device)
    if memory is not None:
        _join(memory, kv_cache, pool)
    runner = _make_runner(config, decoder, kv_cache, pool, plan, device, on_progress)
    loader = AdapterLoader(config.adapter_dir, pool, info.modules, plan.host_adapter_bytes, base)
    slots = AdapterSlots(
        loader,
        device_bytes_total=pool.bytes_total,
        device_bytes_max=pool.bytes_max,
        host_bytes_total=plan.host_adapter_bytes,
    )
    division = plan.division
    blocks = BlockManager(
        plan.num_kv_blocks,
        config.block_size,
        enable_prefix_cache=config.enable_prefix_cache,
        max_blocks=kv_cache.num_blocks,
        blocks_per_superblock=division.blocks_per_superblock if division else None,
    )
    exchange = None
    if division is not None and memory is not None:
        exchange = MemoryExchange(division, blocks, slots, pool, memory)
    still = _memory_info(config, plan, decoder, pool, static_because)

    def memory_now() -> MemoryInfo:
        return msgspec.structs.replace(still, device_bytes_free=device_memory(device).free)

    prober = AdapterProber(decoder, pool, config.block_size, config.adapter_dir, directory)
    constraints = Constraints(
        GuidanceCompiler(info),
        vocab_size=info.vocab_size,
        eos_token_ids=frozenset(info.eos_token_ids),
        num_threads=max(1, min(4, available_cpus() // 4)),
    )
    engine = Engine(
        config,
        info,
        runner,
        slots,
        blocks,
        memory_now,
        exchange=exchange,
        prober=prober,
        constraints=constraints,
    )
    loader.on_done = constraints.on_news = engine.wake

    def close() -> None:
        constraints.close()
        loader.close()
        prober.close()

    return HostedEngine(engine, close)


def _choose_device(wanted: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ModelError(
            "device 'cuda': torch finds no CUDA device; use --device cpu", code="no_device"
        )
    return torch.device("cuda:0" if has_cuda and wanted != "cpu" else "cpu")


def address_space(config: EngineConfig, device: torch.device) -> tuple[AddressSpace | None, str]:
    """What the KV cache and the adapters trade in, or None and why they cannot."""
    fixed = {
        "--kv-cache-memory": config.kv_cache_memory,
        "--adapter-memory": config.adapter_memory,
    }
    given = [flag for flag, num_bytes in fixed.items() if num_bytes is not None]
    if given:
        return None, f"fixed by {' and '.join(given)}"
    if device.type == "cuda":
        from loraplex.engine.gpu.virtual_memory import cuda_address_space

        return cuda_address_space(device)
    space = host_address_space()
    return space, "" if space else "this system cannot take memory back piece by piece"


def _join(memory: TradedMemory, kv_cache: KVCache, pool: PagePool) -> None:
    try:
        memory.join(kv_cache, pool)
    except RuntimeError as error:
        raise ModelError(
            f"the planned memory is not there: {error}; lower --gpu-memory-utilization",
            code="kv_cache_unavailable",
        ) from error


def _make_pool(
    model: DecoderConfig,
    plan: MemoryPlan,
    memory: TradedMemory | None,
    dtype: torch.dtype,
    device: torch.device,
) -> PagePool:
    try:
        return PagePool(
            model.num_layers,
            model.module_shapes,
            plan.adapter_bytes,
            dtype,
            device,
            None if memory is None else memory.arena(),
        )
    except AdapterError as error:
        raise ModelError(error.message, code="adapter_memory_too_small") from error


def _make_kv_cache(
    config: EngineConfig,
    model: DecoderConfig,
    ops: Ops,
    plan: MemoryPlan,
    memory: TradedMemory | None,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    num_blocks = plan.num_kv_blocks
    if plan.division is not None:
        num_blocks = plan.division.max_kv_superblocks * plan.division.blocks_per_superblock
    try:
        return ops.kv_cache(
            model.num_layers,
            num_blocks,
            config.block_size,
            model.num_kv_heads,
            model.head_dim,
            dtype,
            device,
            new_zeros if memory is None else memory.new_kv_tensor,
        )
    except (ValueError, RuntimeError) as error:  # a shape the backend lacks, or no memory
        raise ModelError(
            f"no KV cache of {size(plan.kv_cache_bytes)}: {error}", code="kv_cache_unavailable"
        ) from error


def _make_runner(
    config: EngineConfig,
    decoder: Decoder,
    kv_cache: KVCache,
    pool: PagePool,
    plan: MemoryPlan,
    device: torch.device,
    on_progress: OnProgress,
) -> Runner:
    if decoder.ops.name == "triton":
        from loraplex.engine.gpu.assembly import ready_runner

        return ready_runner(config, decoder, kv_cache, pool, plan, device, on_progress)
    batches = BatchBuilder(
        pool,
        config.block_size,
        config.step_sizes[0],
        -(-plan.max_model_len // config.block_size),
        device,
    )
    return ModelRunner(decoder, kv_cache, batches, Sampler(decoder.config.vocab_size, device))


def _memory_info(
    config: EngineConfig, plan: MemoryPlan, decoder: Decoder, pool: PagePool, static_because: str
) -> MemoryInfo:
    """The bytes that do not change; the engine fills in what is used."""
    return MemoryInfo(
        weights_bytes=decoder.nbytes if plan.shares_host else plan.weights_bytes,
        kv_cache_bytes=plan.kv_cache_bytes,
        kv_block_bytes=plan.kv_block_bytes,
        kv_blocks_total=plan.num_kv_blocks,
        kv_blocks_used=0,
        kv_blocks_cached=0,
        block_size=config.block_size,
        adapter_bytes_total=pool.bytes_total,
        adapter_bytes_used=0,
        adapter_page_bytes=pool.page_bytes,
        host_adapter_bytes_total=plan.host_adapter_bytes,
        host_adapter_bytes_used=0,
        workspace_bytes=plan.workspace_bytes,
        device_bytes_total=plan.device_bytes_total,
        device_bytes_free=plan.device_bytes_free,
        static_because=static_because,
    )
