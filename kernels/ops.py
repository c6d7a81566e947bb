"""The operations a decoder layer is made of, and the one place that chooses who computes them.

A backend is an object with the methods of `Ops`. Three exist or will: `TorchOps` (plain torch, the
path where there is no compiler), `NativeOps` (C++ compiled at first start where a compiler is
found) and `TritonOps` (GPU). The LoRA delta is folded into operations the base model needs anyway
(rope + KV write, SwiGLU, add + norm), with "no adapters" as the base case, so base and LoRA are one
code path.

Shapes: T = tokens of the step, S = sequences of the step, M = adapted module kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor


class Module(IntEnum):
    """Columns of the page tables. The order is part of the page layout: append, never insert."""

    Q = 0
    K = 1
    V = 2
    O = 3  # noqa: E741
    GATE = 4
    UP = 5
    DOWN = 6


NUM_MODULES = len(Module)
QKV = (Module.Q, Module.K, Module.V)
GATE_UP = (Module.GATE, Module.UP)
PAGE_RANKS = 16  # ranks per page


@dataclass(slots=True)
class PageTables:
    """Where every adapter page lies. Owned and updated by the adapter pool; read by the kernels.

    A page holds 16 ranks of one adapter: for each adapted module of each layer a tile A `[16, in]`
    and a tile B-transposed `[16, out]`, both row-major, rows past the live ranks zero. The offsets
    are those of the tiles' first elements in the arena, -1 where the page does not adapt the
    module.

    version: the owner adds 1 at every install or remove; a backend may keep what it derived until
    then.
    """

    arena: Tensor  # [num_elements] model dtype
    offset_a: Tensor  # [num_pages, num_layers, M] int64
    offset_b: Tensor  # [num_pages, num_layers, M] int64
    live_ranks: Tensor  # [num_pages, num_layers, M] int32, rows in use, 0 = not adapted
    scaling: Tensor  # [num_pages, num_layers, M] float32, alpha/r (or alpha/sqrt(r)) of the module
    version: int = 0


@dataclass(slots=True)
class LoraBatch:
    """Which pages apply to which rows of the step.

    Rows of equal composition are contiguous. Tile i covers rows `tiles[i, 0] .. tiles[i, 0] +
    tiles[i, 1]` and uses pages `page_ids[tiles[i, 2] : tiles[i, 2] + tiles[i, 3]]`. Rows without
    adapters appear in no tile. The host lists equal the tensors, for backends that walk them in
    Python.

    adapted: the (layer, module) pairs that any page of the batch adapts.
    plan: a backend's own notes. A batch object may serve another step only if the rows, their pages
    and the tables' version are the same.
    """

    tables: PageTables
    tiles: Tensor  # [num_tiles, 4] int32: first row, rows, first page entry, page entries
    page_ids: Tensor  # [num_page_entries] int32
    page_weights: Tensor  # [num_page_entries] float32, the composition weight
    max_pages: int  # most page entries of one tile
    host_tiles: list[tuple[int, int, int, int]] = field(default_factory=list)
    host_page_ids: list[int] = field(default_factory=list)
    host_page_weights: list[float] = field(default_factory=list)
    adapted: frozenset[tuple[int, int]] = frozenset()
    plan: object | None = None


@dataclass(slots=True)
class AttentionBatch:
    """Where the step's tokens stand. The `num_decodes` sequences with one query token come first.

    seq_ids: engine-wide unique sequence numbers; a backend may keep per-sequence state under them.
    plan: a backend's own notes for this step; a batch object is never reused for another step.
    """

    positions: Tensor  # [T] int64, position of each token in its sequence
    slot_mapping: Tensor  # [T] int64, block_id * block_size + offset
    block_tables: Tensor  # [S, max_blocks] int32, padded with 0
    query_start: Tensor  # [S + 1] int32, first row of each sequence
    context_lens: Tensor  # [S] int32, tokens in the KV cache after this step's writes
    num_decodes: int
    seq_ids: list[int]  # [S]
    host_query_start: list[int]
    host_context_lens: list[int]
    host_block_tables: list[list[int]]
    plan: object | None = None


class Linear(Protocol):
    """A weight prepared for this backend, `[T, in] -> [T, out]`, bias included if it has one."""

    in_features: int
    out_features: int
    nbytes: int
    bias: Tensor | None  # [out]

    def __call__(self, x: Tensor) -> Tensor: ...

    def product(self, x: Tensor) -> Tensor:
        """The same without the bias."""
        ...

    def row_squares(self) -> Tensor:
        """`[out]` fp32: the sum of squares of each row of the weight."""
        ...


# (shape, dtype, device) -> zeros
NewTensor = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]


def new_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


class KVCache(Protocol):
    """Paged keys and values of all layers, in the backend's own layout. Block 0 is a real block.

    planes: views `[num_blocks, elements]` of all its memory, each contiguous, all of one shape: one
    layer's keys or values.
    """

    num_blocks: int
    block_size: int
    nbytes: int
    planes: list[Tensor]

    def copy_block(self, source: int, target: int) -> None: ...


class Ops(Protocol):
    name: str  # "torch" | "native" | "triton"

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Prepare weight `[out, in]`. May keep a packed copy only; the caller drops its own."""
        ...

    def kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        new: NewTensor = new_zeros,
    ) -> KVCache:
        """new: makes its memory."""
        ...

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """`[T] int64, [V, H] -> [T, H]`."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x * rsqrt(mean(x^2) + eps) * weight`, statistics in fp32. `[T, H] -> [T, H]`, new."""
        ...

    def lora_shrink(
        self, x: Tensor, lora: LoraBatch | None, layer: int, modules: tuple[Module, ...]
    ) -> Tensor | None:
        """`t[i] = x A_i^T` for every row, page and module.

        Opaque to the caller, who hands it to the matching expand. None when the batch has no
        adapters or none that adapts these modules of this layer.
        """
        ...

    def rope_kv_write(
        self,
        qkv: Tensor,
        t: Tensor | None,
        lora: LoraBatch | None,
        layer: int,
        cos: Tensor,
        sin: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        norm_eps: float,
        num_heads: int,
        kv: KVCache,
        batch: AttentionBatch,
    ) -> Tensor:
        """Add the q/k/v deltas, RMSNorm q and k per head if given (Qwen3), rotate, write K and V.

        qkv: `[T, (num_heads + 2 * num_kv_heads) * head_dim]`, may be changed. cos, sin: `[T,
        head_dim]` in fp32 or model dtype, already gathered by position, halves duplicated
        (`cat(freqs, freqs)`), for half-split rope. Returns q `[T, num_heads, head_dim]` rotated.
        """
        ...

    def attention(
        self,
        q: Tensor,
        kv: KVCache,
        layer: int,
        batch: AttentionBatch,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Causal attention of each query over its sequence's blocks, `[T, num_heads * head_dim]`.

        Called after `rope_kv_write` of the same layer. sliding_window w: position i sees j with
        i - w < j <= i.
        """
        ...

    def add_rms_norm(
        self,
        y: Tensor,
        t: Tensor | None,
        lora: LoraBatch | None,
        layer: int,
        module: Module,
        residual: Tensor,
        weight: Tensor,
        eps: float,
    ) -> Tensor:
        """`residual += y + delta` in place, then RMSNorm of it, `[T, H]`. module: O or DOWN."""
        ...

    def swiglu(
        self, gate_up: Tensor, t: Tensor | None, lora: LoraBatch | None, layer: int
    ) -> Tensor:
        """`silu(gate + dg) * (up + du)`. gate_up: `[T, 2 * I]`, gate first. Returns `[T, I]`."""
        ...
