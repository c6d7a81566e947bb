"""From a loaded decoder to a runner that is ready: kernels checked, memory measured, graphs
captured, everything compiled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loraplex.adapters.page_layout import frame_elements
from loraplex.adapters.pool import PagePool
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ModelError
from loraplex.engine.gpu.graphs import CudaGraphs, GraphBackend, RepeatedCalls
from loraplex.engine.gpu.memory_plan import plan_gpu_memory
from loraplex.engine.gpu.memory_profile import measure_gpu
from loraplex.engine.gpu.runner import GpuRunner, RunnerLimits
from loraplex.engine.gpu.sampler import DeviceSampler
from loraplex.engine.gpu.warm_up import warm_up
from loraplex.engine.machine import Memory, device_memory
from loraplex.engine.memory import MemoryPlan
from loraplex.engine.model import Decoder
from loraplex.engine.model_config import DecoderConfig
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.gpu.self_test import KernelFault, require_sound, self_test
from loraplex.kernels.model_shapes import ModelShape
from loraplex.kernels.ops import KVCache

OnProgress = Callable[[str, int, int], None]


def measured_plan(
    config: EngineConfig,
    model: DecoderConfig,
    decoder: Decoder,
    dtype: torch.dtype,
    device: torch.device,
    before: Memory,
    on_progress: OnProgress,
    granule: int = 0,
) -> MemoryPlan:
    """Check the kernels, then run the largest step and plan with what it took.

    before: the GPU's memory when nothing was loaded. granule: in which memory can be traded, 0 = it
    cannot.

    Raises: ModelError when a kernel computes wrongly here, or the model does not fit.
    """
    on_progress("kernel self-test", 0, 1)
    check_kernels(decoder, dtype, device, config.block_size)
    on_progress("kernel self-test", 1, 1)
    max_len = config.max_model_len or model.max_position_embeddings
    frame_bytes = frame_elements(model.module_shapes) * dtype.itemsize
    one_frame = PagePool(model.num_layers, model.module_shapes, frame_bytes, dtype, device)

    def make_runner(pool: PagePool, num_blocks: int) -> GpuRunner:
        kv = decoder.ops.kv_cache(
            model.num_layers,
            num_blocks,
            config.block_size,
            model.num_kv_heads,
            model.head_dim,
            dtype,
            device,
        )
        return make_gpu_runner(config, decoder, kv, pool, max_len, device)

    on_progress("memory", 0, 1)
    measured = measure_gpu(config, before, one_frame, make_runner, max_len, device)
    on_progress("memory", 1, 1)
    host = device_memory(torch.device("cpu"))
    return plan_gpu_memory(config, model, dtype, measured, host, granule)


def check_kernels(
    decoder: Decoder, dtype: torch.dtype, device: torch.device, block_size: int
) -> None:
    """Raises: ModelError naming what computes wrongly and has no safe configuration."""
    try:
        require_sound(
            self_test(
                decoder.ops, model_shape(decoder.config), dtype, device, block_size=block_size
            )
        )
    except KernelFault as error:
        raise ModelError(str(error), code="kernel_fault") from error
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ready_runner(
    config: EngineConfig,
    decoder: Decoder,
    kv_cache: KVCache,
    pool: PagePool,
    plan: MemoryPlan,
    device: torch.device,
    on_progress: OnProgress,
) -> GpuRunner:
    """With graphs captured and, on a GPU, everything compiled."""
    runner = make_gpu_runner(config, decoder, kv_cache, pool, plan.max_model_len, device)

    def progress(done: int, total: int) -> None:
        on_progress("graphs", done, total)

    if device.type == "cuda":
        warm_up(runner, pool, *config.step_sizes, plan.max_model_len, progress)
    else:
        runner.graphs.capture(progress)  # interpreted kernels are not compiled
    return runner


def make_gpu_runner(
    config: EngineConfig,
    decoder: Decoder,
    kv_cache: KVCache,
    pool: PagePool,
    max_len: int,
    device: torch.device,
) -> GpuRunner:
    assert isinstance(kv_cache, PagedKVCache), "a KV cache of another backend"
    max_num_seqs, max_num_tokens = config.step_sizes
    graphs: GraphBackend = CudaGraphs() if device.type == "cuda" else RepeatedCalls()
    return GpuRunner(
        decoder,
        kv_cache,
        pool,
        DeviceSampler(decoder.config.vocab_size, max_num_seqs, device),
        graphs,
        RunnerLimits(
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            max_blocks=-(-max_len // config.block_size),
        ),
        device,
        batch_invariant=config.batch_invariant,
    )


def model_shape(model: DecoderConfig) -> ModelShape:
    windows = [window for window in model.sliding_windows if window is not None]
    return ModelShape(
        name=model.architecture,
        num_layers=model.num_layers,
        hidden=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        intermediate=model.intermediate_size,
        vocab_size=model.vocab_size,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        sliding_window=windows[0] if windows else None,
    )
