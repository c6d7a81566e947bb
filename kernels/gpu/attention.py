"""Attention of a step: its decode rows, then its other runs. At most two launches."""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex.kernels.gpu.attention_work import AttentionWork
from loraplex.kernels.gpu.decode_attention import decode_attention
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.gpu.prefill_attention import prefill_attention
from loraplex.kernels.ops import AttentionBatch


def attention(
    q: Tensor,
    kv: PagedKVCache,
    layer: int,
    batch: AttentionBatch,
    work: AttentionWork,
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of each query over its sequence's pages, which hold the step's own keys.

    q: `[T, num_heads, head_dim]`. Returns `[T, num_heads * head_dim]`. Padding rows among the
    decodes (context 0) are zero; rows that no tile covers are left as they come from the allocator.

    Raises: ValueError for tensors the kernels would misread.
    """
    _check(q, kv, batch, work, window)
    num_tokens, num_heads, head_dim = q.shape
    out = torch.empty((num_tokens, num_heads * head_dim), dtype=q.dtype, device=q.device)
    if work.num_decodes:
        decode_attention(
            q[: work.num_decodes],
            kv,
            layer,
            batch.block_tables,
            batch.context_lens,
            work.num_splits,
            scale,
            window,
            softcap,
            out,
        )
    if work.prefill_capacity:
        prefill_attention(q, kv, layer, batch.block_tables, work, scale, window, softcap, out)
    return out


def _check(
    q: Tensor, kv: PagedKVCache, batch: AttentionBatch, work: AttentionWork, window: int | None
) -> None:
    if q.dim() != 3 or q.shape[1] % kv.num_kv_heads or q.shape[2] != kv.head_dim:
        raise ValueError(
            f"q has shape {tuple(q.shape)}: must be [tokens, heads, {kv.head_dim}] with heads a "
            f"multiple of the cache's {kv.num_kv_heads} kv heads"
        )
    if q.dtype != kv.dtype:
        raise ValueError(f"q is {q.dtype}, the KV cache {kv.dtype}: both must be the model's dtype")
    if not q.is_contiguous():
        raise ValueError(f"q has strides {q.stride()}: must be contiguous; call .contiguous()")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: must be at least 1, or None for no window")
    if work.num_decodes > q.shape[0]:
        raise ValueError(f"{work.num_decodes} decode rows: the step has only {q.shape[0]} tokens")
    tables, lens = batch.block_tables, batch.context_lens
    if tables.dim() != 2 or tables.stride(1) != 1:
        raise ValueError(
            f"block_tables has shape {tuple(tables.shape)} and strides {tables.stride()}: must be "
            "[sequences, blocks] with neighbouring blocks next to each other"
        )
    for name, tensor in (
        ("block_tables", tables),
        ("context_lens", lens),
        ("prefill_tiles", work.prefill_tiles),
    ):
        if tensor is not None and tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}: must be torch.int32")
    if min(tables.shape[0], lens.shape[0]) < work.num_decodes:
        raise ValueError(
            f"{work.num_decodes} decode rows: block_tables has {tables.shape[0]} rows and "
            f"context_lens {lens.shape[0]}; both need one per decode"
        )
