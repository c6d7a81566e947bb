"""A model without files for the engine's bench: random weights on the device, adapters to go with.

What counts is the shape; random weights because zeros would run faster than real ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.page_image import PageImage
from loraplex.adapters.page_layout import frame_elements
from loraplex.adapters.pool import PagePool
from loraplex.engine.config import EngineConfig
from loraplex.engine.gpu.assembly import make_gpu_runner
from loraplex.engine.gpu.runner import GpuRunner
from loraplex.engine.model import Decoder, Layer
from loraplex.engine.model_config import DecoderConfig
from loraplex.engine.rope import Rope
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.model_shapes import ModelShape
from loraplex.kernels.ops import Linear, Ops
from loraplex.kernels.random_step import random_tensor

ROPE_THETA = 10_000.0


def decoder_config(shape: ModelShape, dtype: torch.dtype, max_len: int) -> DecoderConfig:
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    return DecoderConfig(
        architecture=shape.name,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        rope=Rope(tuple((1.0 / ROPE_THETA**exponents).tolist()), 1.0),
        sliding_windows=(shape.sliding_window,) * shape.num_layers,
        qkv_bias=shape.qkv_bias,
        o_bias=False,
        mlp_bias=False,
        qk_norm=shape.qk_norm,
        tie_word_embeddings=False,
        max_position_embeddings=max_len,
        dtype=dtype,
    )


def random_decoder(
    shape: ModelShape, ops: Ops, dtype: torch.dtype, device: torch.device, max_len: int
) -> Decoder:
    def rand(*size: int, std: float = 1.0) -> Tensor:
        return random_tensor(*size, dtype=dtype, device=device, std=std)

    def linear(name: str) -> Linear:
        width, out = shape.linears()[name]
        bias = rand(out, std=0.1) if name == "qkv" and shape.qkv_bias else None
        return ops.linear(rand(out, width, std=width**-0.5), bias)

    def norm(size: int) -> Tensor:
        return torch.ones(size, dtype=dtype, device=device)

    def layer() -> Layer:
        return Layer(
            qkv=linear("qkv"),
            q_norm=norm(shape.head_dim) if shape.qk_norm else None,
            k_norm=norm(shape.head_dim) if shape.qk_norm else None,
            o=linear("o"),
            post_attention_norm=norm(shape.hidden),
            gate_up=linear("gate_up"),
            down=linear("down"),
            next_norm=norm(shape.hidden),
            sliding_window=shape.sliding_window,
        )

    head = rand(shape.vocab_size, shape.hidden, std=shape.hidden**-0.5)
    return Decoder(
        decoder_config(shape, dtype, max_len),
        ops,
        rand(shape.vocab_size, shape.hidden),
        norm(shape.hidden),
        [layer() for _ in range(shape.num_layers)],
        ops.linear(head),
    )


def random_image(pool: PagePool, rank: int) -> PageImage:
    """An adapter of all modules, in pinned memory where that matters."""
    every = {
        (layer, module): rank
        for layer in range(pool.num_layers)
        for module in range(len(pool.module_shapes))
    }
    layout = pool.layout(every)
    data = random_tensor(
        layout.num_image_frames, pool.frame_elements,
        dtype=pool.dtype, device=torch.device("cpu"), std=0.05,
    )  # fmt: skip
    if pool.arena.device.type == "cuda":
        data = data.pin_memory()
    # Deltas as large as what they are added to, so that a wrong one shows in the tokens.
    scaling = np.full((pool.num_layers, len(pool.module_shapes)), 16.0, dtype=np.float32)
    return PageImage(layout, list(data), scaling)


def install_adapters(pool: PagePool, ranks: Sequence[int]) -> list[str]:
    """Adapters of these ranks, all resident; those of one rank are copies of one another, which
    lie in different memory. Returns their digests.
    """
    images = {rank: random_image(pool, rank) for rank in sorted(set(ranks))}
    digests = []
    for i, rank in enumerate(ranks):
        digests.append(f"bench-{i}-{rank}")
        pool.install(digests[-1], images[rank])
    return digests


def make_pool(shape: ModelShape, pages: int, dtype: torch.dtype, device: torch.device) -> PagePool:
    """Room for so many pages of 16 ranks of all modules."""
    shapes = [shape.widths(module) for module in range(7)]
    num_bytes = pages * shape.num_layers * frame_elements(shapes) * dtype.itemsize
    return PagePool(shape.num_layers, shapes, num_bytes, dtype, device)


def make_runner(
    decoder: Decoder,
    pool: PagePool,
    *,
    max_num_seqs: int,
    max_num_tokens: int,
    max_len: int,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> GpuRunner:
    """With nothing captured yet."""
    model = decoder.config
    kv = decoder.ops.kv_cache(
        model.num_layers, num_blocks, block_size, model.num_kv_heads, model.head_dim, dtype, device
    )
    assert isinstance(kv, PagedKVCache)
    for pages in (*kv.keys, *kv.values):
        pages.normal_()
    config = EngineConfig(
        model=model.architecture,
        adapter_dir=Path("none"),
        device=device.type,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_tokens,
        block_size=block_size,
    )
    return make_gpu_runner(config, decoder, kv, pool, max_len, device)
