"""`TritonOps`: every operation on the device, for CUDA and, in the interpreter, for tests.

One set of kernels serves base rows and adapters. What depends on the rows of a step comes from the
batch's plans, which lie on the device: with plans given, no method looks at a host list or waits
for the device, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from loraplex.kernels.gpu.add_norm import add_rms_norm
from loraplex.kernels.gpu.attention import attention
from loraplex.kernels.gpu.attention_work import AttentionWork, attention_work
from loraplex.kernels.gpu.embed import embed
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.gpu.matmul import InvariantLinear
from loraplex.kernels.gpu.norm import rms_norm
from loraplex.kernels.gpu.rope_kv import rope_kv
from loraplex.kernels.gpu.shrink import Shrunk, shrink
from loraplex.kernels.gpu.streams import SideStream
from loraplex.kernels.gpu.swiglu import swiglu
from loraplex.kernels.gpu.work import LoraWork, lora_work
from loraplex.kernels.ops import (
    AttentionBatch,
    KVCache,
    Linear,
    LoraBatch,
    Module,
    NewTensor,
    PageTables,
    new_zeros,
)
from loraplex.kernels.packed_linear import DenseLinear

ARRIVAL_COUNTERS = 4096  # more than the rows of any captured step, so they grow in eager ones only
BASE_PLANS = 1024  # row counts whose tiles are kept for steps without a LoraBatch


class TritonOps:
    """See `Ops`.

    batch_invariant: the same request gives the same bits whatever shares its batch, at a price.
    overlap: decode shrinks run on a second stream beside the base GEMM. fused_norm: decode rows are
    normed in the launch that adds them. Both are there to be measured.
    """

    name = "triton"

    def __init__(
        self, *, batch_invariant: bool = False, overlap: bool = True, fused_norm: bool = True
    ) -> None:
        self.batch_invariant = batch_invariant
        self._fused_norm = fused_norm
        self._side = SideStream() if overlap else None
        self._arrivals: list[Tensor] = []  # never freed: captured graphs hold their addresses
        self._base_plans: dict[tuple[int, torch.device], LoraWork] = {}

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        if self.batch_invariant:
            return InvariantLinear(weight, bias)
        return DenseLinear(weight, bias)

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
    ) -> PagedKVCache:
        return PagedKVCache(
            num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype, device, new
        )

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return embed(token_ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def lora_shrink(
        self, x: Tensor, lora: LoraBatch | None, layer: int, modules: tuple[Module, ...]
    ) -> Tensor | None:
        """In truth a `Shrunk`. Call it before the base linear, which it then runs beside."""
        if lora is None or not any((layer, module) in lora.adapted for module in modules):
            return None
        work = self._lora_work(lora, x)
        if self._side is None or work.large is not None:  # prefill fills the machine by itself
            return cast(Tensor, self._shrink(x, lora, work, layer, modules))
        with self._side.fork(x.device):
            return cast(Tensor, self._shrink(x, lora, work, layer, modules))

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
        assert isinstance(kv, PagedKVCache), "a KV cache of another backend"
        return rope_kv(
            qkv, *self._deltas(qkv, t, lora), layer, cos, sin, q_norm, k_norm, norm_eps,
            num_heads, kv, batch.slot_mapping, batch_invariant=self.batch_invariant,
        )  # fmt: skip

    def attention(
        self,
        q: Tensor,
        kv: KVCache,
        layer: int,
        batch: AttentionBatch,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        assert isinstance(kv, PagedKVCache), "a KV cache of another backend"
        if batch.plan is None:
            batch.plan = attention_work(batch, q.shape[1], kv, batch_invariant=self.batch_invariant)
        assert isinstance(batch.plan, AttentionWork), "a plan of another backend"
        return attention(q, kv, layer, batch, batch.plan, scale, sliding_window)

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
        shrunk, tables, work = self._deltas(y, t, lora)
        tiles = 0 if work.norm is None else work.norm.capacity
        return add_rms_norm(
            y, shrunk, tables, work, layer, module, residual, weight, eps,
            self._counters(tiles, y.device),
            one_launch=self._fused_norm, batch_invariant=self.batch_invariant,
        )  # fmt: skip

    def swiglu(
        self, gate_up: Tensor, t: Tensor | None, lora: LoraBatch | None, layer: int
    ) -> Tensor:
        return swiglu(
            gate_up, *self._deltas(gate_up, t, lora), layer, batch_invariant=self.batch_invariant
        )

    def _shrink(
        self, x: Tensor, lora: LoraBatch, work: LoraWork, layer: int, modules: tuple[Module, ...]
    ) -> Shrunk:
        return shrink(x, lora.tables, work, layer, modules, batch_invariant=self.batch_invariant)

    def _deltas(
        self, y: Tensor, t: Tensor | None, lora: LoraBatch | None
    ) -> tuple[Shrunk | None, PageTables | None, LoraWork]:
        """What an expand of the step's rows takes, the shrink waited for."""
        work = self._lora_work(lora, y)
        if t is None or lora is None:
            return None, None, work
        if self._side is not None:
            self._side.join()
        shrunk: object = t
        assert isinstance(shrunk, Shrunk), "a shrink of another backend"
        return shrunk, lora.tables, work

    def _lora_work(self, lora: LoraBatch | None, rows_of: Tensor) -> LoraWork:
        rows, device = rows_of.shape[0], rows_of.device
        if lora is None:
            return self._base_plan(rows, device)
        if lora.plan is None:
            lora.plan = lora_work(lora, rows, device, small_only=self.batch_invariant)
        assert isinstance(lora.plan, LoraWork), "a plan of another backend"
        return lora.plan

    def _base_plan(self, rows: int, device: torch.device) -> LoraWork:
        plan = self._base_plans.get((rows, device))
        if plan is None:
            plan = lora_work(None, rows, device, small_only=self.batch_invariant)
            if len(self._base_plans) < BASE_PLANS:  # the first stay: graphs may hold them
                self._base_plans[rows, device] = plan
        return plan

    def _counters(self, count: int, device: torch.device) -> Tensor:
        for counters in self._arrivals:
            if counters.device == device and counters.numel() >= count:
                return counters
        size = max(ARRIVAL_COUNTERS, 2 * count)
        self._arrivals.append(torch.zeros(size, dtype=torch.int32, device=device))
        return self._arrivals[-1]
