"""Attention over pages: decode against the bytes of the keys and values, prefill in TFLOP/s."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from loraplex.kernels.gpu import expected
from loraplex.kernels.gpu.attention import attention
from loraplex.kernels.gpu.attention_work import attention_work
from loraplex.kernels.gpu.bench_context import BLOCK_SIZE, Bench
from loraplex.kernels.gpu.bench_timing import num_passes
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.gpu.layer_checks import fill
from loraplex.kernels.gpu.roofline import attention_flops, kv_bytes
from loraplex.kernels.ops import AttentionBatch
from loraplex.kernels.random_step import make_attention

KV_BYTES = 24 << 30  # of all layers of one measurement, at most
CHECKED_TOKENS = 1 << 18  # contexts in all up to which a result is compared: scores in fp32


def bench_attention(bench: Bench) -> None:
    decodes: list[tuple[int, int, int | None]] = [
        (batch, length, None) for length in (2048, 512, 8192) for batch in (64, 1, 16, 256)
    ]
    decodes.append((64, 8192, 1024))
    quick = [(64, 2048, None), (1, 8192, None)]
    for rows, length, window in bench.sizes("attention decode", decodes, quick, [(3, 40, 24)]):
        nbytes = kv_bytes(bench.shape, [min(length, window or length)] * rows)
        if kv_bytes(bench.shape, [length] * rows) * 2 > KV_BYTES:
            continue
        us = _measure(bench, [length] * rows, [1] * rows, window, nbytes)
        row = {"what": "decode", "rows": rows, "context": length, "window": window or 0}
        bench.add("attention", bench.machine.floor_us(nbytes), **row, us=us)
    prefills = [(1, 8192, 8192), (1, 2048, 2048), (4, 2048, 2048), (1, 8192, 512)]
    for count, context, queries in bench.sizes(
        "attention prefill", prefills, prefills[:1], [(1, 70, 40)]
    ):
        flops = count * attention_flops(bench.shape, context, queries)
        us = _measure(bench, [context] * count, [queries] * count, None, 1 << 40)
        bench.add(
            "attention", bench.machine.floor_us(0, flops), what="prefill", prompts=count,
            context=context, queries=queries, us=us, tflop_s=flops / us / 1e6,
            sdpa_us=_sdpa(bench, count, context) if context == queries else None,
        )  # fmt: skip


def _measure(
    bench: Bench, contexts: list[int], queries: list[int], window: int | None, nbytes: int
) -> float:
    shape, device = bench.shape, bench.device
    batch, blocks = make_attention(contexts, queries, BLOCK_SIZE, device)
    layers = max(2, min(num_passes(nbytes), KV_BYTES // max(1, kv_bytes(shape, contexts))))
    kv = PagedKVCache(
        2 if bench.dry_run else min(layers, shape.num_layers), blocks, BLOCK_SIZE,
        shape.num_kv_heads, shape.head_dim, bench.dtype, device,
    )  # fmt: skip
    fill(kv)
    q = torch.empty(
        sum(queries), shape.num_heads, shape.head_dim, dtype=bench.dtype, device=device
    ).normal_()
    scale = shape.head_dim**-0.5
    batch.plan = attention_work(batch, shape.num_heads, kv)
    if sum(contexts) <= CHECKED_TOKENS and max(queries) <= 2048:
        want = expected.attention(q, kv, 0, batch, scale, window)
        bench.check("attention", _run(q, kv, batch, scale, window, 0), want)
    passes = [partial(_run, q, kv, batch, scale, window, i) for i in range(len(kv.keys))]
    return bench.time(passes).us


def _run(
    q: Tensor,
    kv: PagedKVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    layer: int,
) -> Tensor:
    work = batch.plan
    return attention(q, kv, layer, batch, work, scale, window)  # type: ignore[arg-type]


def _sdpa(bench: Bench, count: int, context: int) -> float:
    """torch's own on contiguous keys and values with as many heads as queries have: a scale."""
    shape = bench.shape
    size = (count, shape.num_heads, context, shape.head_dim)
    q, k, v = (torch.empty(size, dtype=bench.dtype, device=bench.device).normal_() for _ in "qkv")
    run = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True)
    return bench.time([run] * 2).us
