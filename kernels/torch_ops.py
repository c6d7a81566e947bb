"""`TorchOps`: every operation in plain torch. The path where there is no compiler, on any device.

Decodes attend in one padded call, prefills one call per sequence; adapters are applied by the
stacked GEMMs of `lora_stacks`. Knows nothing about requests or scheduling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex.kernels.lora_stacks import StackCache
from loraplex.kernels.ops import (
    GATE_UP,
    QKV,
    AttentionBatch,
    KVCache,
    LoraBatch,
    Module,
    NewTensor,
    new_zeros,
)
from loraplex.kernels.packed_linear import DenseLinear, PackedLinear, make_linear
from loraplex.kernels.torch_attention import TorchKVCache, attend

LORA_STACK_BYTES = 1 << 30


class TorchOps:
    """See `Ops`. lora_stack_bytes: bound on the adapter copies kept between steps."""

    name = "torch"

    def __init__(self, lora_stack_bytes: int = LORA_STACK_BYTES) -> None:
        self.stacks = StackCache(lora_stack_bytes)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> DenseLinear | PackedLinear:
        return make_linear(weight, bias)

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
        return TorchKVCache(
            num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype, device, new=new
        )

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(token_ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def lora_shrink(
        self, x: Tensor, lora: LoraBatch | None, layer: int, modules: tuple[Module, ...]
    ) -> Tensor | None:
        if lora is None or not lora.host_tiles:
            return None
        return self.stacks.plan(lora).shrink(x, layer, modules)

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
        assert isinstance(kv, TorchKVCache), "a KV cache of another backend"
        num_kv_heads, head_dim = kv.num_kv_heads, kv.head_dim
        q_width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        self._expand(
            qkv,
            t,
            lora,
            layer,
            QKV,
            ((0, q_width), (q_width, kv_width), (q_width + kv_width, kv_width)),
        )
        heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
        v = heads[:, num_heads + num_kv_heads :]
        if q_norm is None and k_norm is None:
            qk = _rotate(heads[:, : num_heads + num_kv_heads], cos, sin)
            q, k = qk[:, :num_heads], qk[:, num_heads:]
        else:
            q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
            q = _rotate(q if q_norm is None else self.rms_norm(q, q_norm, norm_eps), cos, sin)
            k = _rotate(k if k_norm is None else self.rms_norm(k, k_norm, norm_eps), cos, sin)
        kv.write(layer, k, v, batch)
        return q

    def attention(
        self,
        q: Tensor,
        kv: KVCache,
        layer: int,
        batch: AttentionBatch,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        assert isinstance(kv, TorchKVCache), "a KV cache of another backend"
        return attend(q, kv, layer, batch, scale, sliding_window)

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
        residual.add_(y)
        self._expand(residual, t, lora, layer, (module,), ((0, residual.shape[1]),))
        return self.rms_norm(residual, weight, eps)

    def swiglu(
        self, gate_up: Tensor, t: Tensor | None, lora: LoraBatch | None, layer: int
    ) -> Tensor:
        width = gate_up.shape[1] // 2
        self._expand(gate_up, t, lora, layer, GATE_UP, ((0, width), (width, width)))
        return F.silu(gate_up[:, :width]).mul_(gate_up[:, width:])

    def _expand(
        self,
        y: Tensor,
        t: Tensor | None,
        lora: LoraBatch | None,
        layer: int,
        modules: tuple[Module, ...],
        slices: tuple[tuple[int, int], ...],
    ) -> None:
        if t is not None and lora is not None:
            self.stacks.plan(lora).expand(y, t, layer, modules, slices)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rope. x: `[T, heads, D]`, cos and sin: `[T, D]` with duplicated halves."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, turned.to(cos.dtype), sin).to(x.dtype)
