"""`NativeOps`: the operations in C++, adapters applied in place from their pages.

Nothing is prepared per batch but a few small arrays, so any mix of adapters costs its bytes. The
base model's linears stay with oneDNN. Structures passed by pointer mirror those of `native/*.h`.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.kernels.native_build import load_library
from loraplex.kernels.ops import (
    NUM_MODULES,
    PAGE_RANKS,
    AttentionBatch,
    KVCache,
    LoraBatch,
    Module,
    NewTensor,
    new_zeros,
)
from loraplex.kernels.torch_ops import TorchOps

MAX_ROWS = 32  # rows of a span, as in lora.h
SPLIT_TOKENS = 256  # a sequence is cut into parts of at least this for idle threads
MAX_PARTS = 64
TILE = 16  # tokens of a key tile
MAX_HEAD_DIM = 512
MAX_GROUP = 128  # query heads per key head, MAX_HEADS in attention.h
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}

SIGNATURES: dict[str, list[Any]] = {
    "rms_norm": [c_void_p] * 3 + [c_int32] * 2 + [c_float],
    "add_rms_norm": [c_void_p] * 2 + [c_int32] * 2 + [c_void_p] * 3 + [c_int32] * 2 + [c_float],
    "swiglu": [c_void_p] * 2 + [c_int32, c_void_p] + [c_int32] * 2,
    "lora_shrink": [c_void_p] * 2 + [c_int32] * 2 + [c_void_p, c_int32],
    "rope_kv_write": [c_void_p] * 2
    + [c_int32]
    + [c_void_p] * 4
    + [c_float]
    + [c_int32] * 2
    + [c_void_p] * 2,
    "decode_attention": [c_void_p] * 2
    + [c_int64, c_void_p, c_int32, c_float, c_int32]
    + [c_void_p],
    "prefill_attention": [c_void_p, c_int64, c_void_p]
    + [c_int32] * 4
    + [c_float, c_void_p, c_void_p],
}


class LoraStep(ctypes.Structure):
    _fields_ = (
        ("arena", c_void_p),
        ("offset_a", c_void_p),
        ("offset_b", c_void_p),
        ("live", c_void_p),
        ("scaling", c_void_p),
        ("spans", c_void_p),
        ("page_ids", c_void_p),
        ("weights", c_void_p),
        ("t", c_void_p),
        ("t_size", c_int64),
        ("num_spans", c_int32),
        ("num_layers", c_int32),
    )


class AttentionStep(ctypes.Structure):
    _fields_ = (
        ("block_tables", c_void_p),
        ("lengths", c_void_p),
        ("order", c_void_p),
        ("scratch", c_void_p),
        ("num_decodes", c_int32),
        ("max_blocks", c_int32),
        ("parts", c_int32),
    )


class KVLayer(ctypes.Structure):
    _fields_ = (
        ("k", c_void_p),
        ("v", c_void_p),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
    )


@dataclass(slots=True, eq=False)
class NativeLoraPlan:
    """One step's adapters as the kernels read them."""

    owner: NativeOps
    address: int  # of `step`
    t: Tensor  # [modules, t_size] float32, reused by every layer
    adapted: frozenset[tuple[int, int]]
    alive: tuple[object, ...]  # what the addresses in `step` point to


@dataclass(slots=True, eq=False)
class NativeAttentionPlan:
    """One step's sequences as the kernels read them."""

    owner: NativeKVCache
    step: AttentionStep
    address: int
    alive: tuple[object, ...]
    rope: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # cos, sin as given; in fp32


class NativeKVCache:
    """Pages that the kernels read in place.

    K: `[L, blocks, Hk, block_size / 16, D / P, 16, P]`, P elements of a 4-byte word (2 for bf16):
    one load of keys serves 16 tokens. V: `[L, blocks, Hk, block_size, D]`.

    Raises: ValueError for a block size or head size the kernels cannot take.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        new: NewTensor = new_zeros,
    ) -> None:
        if block_size % TILE:
            raise ValueError(
                f"block_size {block_size} is not a multiple of {TILE}, as the native kernels need;"
                " change it or take the torch backend"
            )
        if head_dim % 2 or head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim {head_dim}: the native kernels need an even number up to"
                f" {MAX_HEAD_DIM}; take the torch backend"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        shape = (num_layers, num_blocks, num_kv_heads * block_size * head_dim)
        self.k = new(shape, dtype, torch.device("cpu"))
        self.v = new(shape, dtype, torch.device("cpu"))
        self.nbytes = self.k.nbytes + self.v.nbytes
        self.planes = [*self.k, *self.v]
        self._layers = [
            KVLayer(k.data_ptr(), v.data_ptr(), num_kv_heads, head_dim, block_size)
            for k, v in zip(self.k, self.v, strict=True)
        ]
        self.layers = [ctypes.addressof(layer) for layer in self._layers]

    def copy_block(self, source: int, target: int) -> None:
        self.k[:, target].copy_(self.k[:, source])
        self.v[:, target].copy_(self.v[:, source])


class NativeOps(TorchOps):
    """See `Ops`. Calls release the GIL.

    Raises: BuildError where the kernels cannot be compiled.
    """

    name = "native"

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        super().__init__()
        library = library or load_library()
        for name, arguments in SIGNATURES.items():
            functions = {}
            for dtype, suffix in SUFFIXES.items():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes = arguments
                function.restype = None
                functions[dtype] = function
            setattr(self, f"_{name}", functions)
        self._set_num_threads = library.set_num_threads
        self._num_threads = 0
        self._follow_threads()
        self._modules: dict[tuple[Module, ...], tuple[Any, int]] = {}

    # Filled in by __init__, one function per dtype.
    _rms_norm: dict[torch.dtype, Any]
    _add_rms_norm: dict[torch.dtype, Any]
    _swiglu: dict[torch.dtype, Any]
    _lora_shrink: dict[torch.dtype, Any]
    _rope_kv_write: dict[torch.dtype, Any]
    _decode_attention: dict[torch.dtype, Any]
    _prefill_attention: dict[torch.dtype, Any]

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
        return NativeKVCache(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype, new)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert weight.dtype == x.dtype, "activations and norm weight differ in dtype"
        x = x.contiguous()
        out = torch.empty_like(x)
        rows, width = x.shape
        self._rms_norm[x.dtype](x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, eps)
        return out

    def lora_shrink(
        self, x: Tensor, lora: LoraBatch | None, layer: int, modules: tuple[Module, ...]
    ) -> Tensor | None:
        if lora is None or not lora.host_tiles:
            return None
        plan = self._lora_plan(lora, x.shape[0])
        if not any((layer, module) in plan.adapted for module in modules):
            return None
        assert x.dtype == lora.tables.arena.dtype, "activations and adapter pages differ in dtype"
        x = x.contiguous()
        known = self._modules.get(modules)
        if known is None:
            array = (c_int32 * len(modules))(*modules)
            known = self._modules[modules] = (array, ctypes.addressof(array))
        self._lora_shrink[x.dtype](
            plan.address, x.data_ptr(), x.shape[1], layer, known[1], len(modules)
        )
        return plan.t

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
        assert isinstance(kv, NativeKVCache), "a KV cache of another backend"
        plan = self._attention_plan(kv, batch)
        rope = plan.rope
        if rope is None or rope[0] is not cos or rope[1] is not sin:
            plan.rope = rope = (cos, sin, cos.float().contiguous(), sin.float().contiguous())
        assert qkv.dtype == kv.k.dtype, "activations and KV cache differ in dtype"
        qkv = qkv.contiguous()
        rows, width = qkv.shape
        dim = kv.head_dim
        self._rope_kv_write[qkv.dtype](
            qkv.data_ptr(),
            _address(t, lora),
            layer,
            rope[2].data_ptr(),
            rope[3].data_ptr(),
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            norm_eps,
            rows,
            num_heads,
            kv.layers[layer],
            batch.slot_mapping.data_ptr(),
        )
        return qkv.as_strided((rows, num_heads, dim), (width, dim, 1))

    def attention(
        self,
        q: Tensor,
        kv: KVCache,
        layer: int,
        batch: AttentionBatch,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        assert isinstance(kv, NativeKVCache), "a KV cache of another backend"
        rows, num_heads, dim = q.shape
        assert num_heads // kv.num_kv_heads <= MAX_GROUP, "too many query heads per key head"
        plan = self._attention_plan(kv, batch)
        out = torch.empty(rows, num_heads * dim, dtype=q.dtype)
        if batch.num_decodes:
            if not plan.step.scratch:
                size = batch.num_decodes * num_heads * plan.step.parts * (dim + 2)
                scratch = torch.empty(size, dtype=torch.float32)
                plan.step.scratch = scratch.data_ptr()
                plan.alive += (scratch,)
            self._decode_attention[q.dtype](
                plan.address,
                q.data_ptr(),
                q.stride(0),
                kv.layers[layer],
                num_heads,
                scale,
                sliding_window or 0,
                out.data_ptr(),
            )
        for index in range(batch.num_decodes, len(batch.seq_ids)):
            first, last = batch.host_query_start[index], batch.host_query_start[index + 1]
            if first < last:
                self._prefill_attention[q.dtype](
                    q.data_ptr() + first * q.stride(0) * q.element_size(),
                    q.stride(0),
                    batch.block_tables.data_ptr() + index * batch.block_tables.stride(0) * 4,
                    last - first,
                    batch.host_context_lens[index],
                    num_heads,
                    sliding_window or 0,
                    scale,
                    kv.layers[layer],
                    out.data_ptr() + first * num_heads * dim * out.element_size(),
                )
        return out

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
        assert residual.is_contiguous(), "residual is changed in place and must be contiguous"
        assert y.dtype == residual.dtype == weight.dtype, "y, residual and norm weight differ"
        out = torch.empty_like(residual)
        rows, width = residual.shape
        self._add_rms_norm[residual.dtype](
            y.contiguous().data_ptr(),
            _address(t, lora),
            layer,
            module,
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            width,
            eps,
        )
        return out

    def swiglu(
        self, gate_up: Tensor, t: Tensor | None, lora: LoraBatch | None, layer: int
    ) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, width, dtype=gate_up.dtype)
        self._swiglu[out.dtype](
            gate_up.data_ptr(), _address(t, lora), layer, out.data_ptr(), rows, width
        )
        return out

    def _follow_threads(self) -> None:
        """Use as many threads as torch does now."""
        num_threads = torch.get_num_threads()
        if num_threads != self._num_threads:
            self._set_num_threads(num_threads)
            self._num_threads = num_threads

    def _lora_plan(self, lora: LoraBatch, num_rows: int) -> NativeLoraPlan:
        plan = lora.plan
        if isinstance(plan, NativeLoraPlan) and plan.owner is self:
            return plan
        self._follow_threads()
        tables = lora.tables
        _check_tables(lora)
        spans: list[tuple[int, int, int, int, int]] = []
        t_size = 0

        def add(row: int, rows: int, first: int, entries: int) -> None:
            nonlocal t_size
            blocks = -(-rows // MAX_ROWS)
            for block in range(blocks):
                start, end = rows * block // blocks, rows * (block + 1) // blocks
                spans.append((row + start, end - start, first, entries, t_size))
                t_size += (end - start) * entries * PAGE_RANKS

        row = 0
        for tile_row, rows, first, entries in sorted(lora.host_tiles):
            add(row, tile_row - row, 0, 0)
            add(tile_row, rows, first, entries)
            row = tile_row + rows
        add(row, num_rows - row, 0, 0)
        adapted = lora.adapted or _adapted(lora)
        t = torch.empty(NUM_MODULES, t_size, dtype=torch.float32)
        # Heavy spans first, so that no thread is left with one at the end.
        spans.sort(key=lambda span: -span[1] * span[3])
        array = (c_int32 * (5 * len(spans)))(*(value for span in spans for value in span))
        step = LoraStep(
            tables.arena.data_ptr(),
            tables.offset_a.data_ptr(),
            tables.offset_b.data_ptr(),
            tables.live_ranks.data_ptr(),
            tables.scaling.data_ptr(),
            ctypes.addressof(array),
            lora.page_ids.data_ptr(),
            lora.page_weights.data_ptr(),
            t.data_ptr(),
            t_size,
            len(spans),
            tables.offset_a.shape[1],
        )
        lora.plan = plan = NativeLoraPlan(
            self, ctypes.addressof(step), t, adapted, (step, array, tables)
        )
        return plan

    def _attention_plan(self, kv: NativeKVCache, batch: AttentionBatch) -> NativeAttentionPlan:
        plan = batch.plan
        if isinstance(plan, NativeAttentionPlan) and plan.owner is kv:
            return plan
        self._follow_threads()
        num_decodes = batch.num_decodes
        lengths = batch.host_context_lens[:num_decodes]
        order = sorted(range(num_decodes), key=lambda i: -lengths[i])
        array = (c_int32 * num_decodes)(*order)
        parts = 1
        pairs = num_decodes * kv.num_kv_heads
        if 0 < pairs < 4 * self._num_threads:
            parts = min(4 * self._num_threads // pairs, -(-max(lengths) // SPLIT_TOKENS), MAX_PARTS)
        assert batch.block_tables.is_contiguous(), "block tables must be contiguous"
        assert batch.block_tables.dtype == batch.context_lens.dtype == torch.int32
        assert batch.slot_mapping.dtype == torch.int64, "slots must be int64"
        step = AttentionStep(
            batch.block_tables.data_ptr(),
            batch.context_lens.data_ptr(),
            ctypes.addressof(array),
            None,
            num_decodes,
            batch.block_tables.shape[1],
            parts,
        )
        batch.plan = plan = NativeAttentionPlan(kv, step, ctypes.addressof(step), (array,))
        return plan


def _address(t: Tensor | None, lora: LoraBatch | None) -> int | None:
    if t is None or lora is None:
        return None
    assert isinstance(lora.plan, NativeLoraPlan), "expand without a shrink"
    return lora.plan.address


def _check_tables(lora: LoraBatch) -> None:
    """The kernels read these by address: another dtype or stride would be other memory."""
    tables = lora.tables
    expected = (
        (tables.offset_a, torch.int64),
        (tables.offset_b, torch.int64),
        (tables.live_ranks, torch.int32),
        (tables.scaling, torch.float32),
        (lora.page_ids, torch.int32),
        (lora.page_weights, torch.float32),
    )
    for tensor, dtype in expected:
        assert tensor.dtype == dtype, f"page table of {tensor.dtype} instead of {dtype}"
        assert tensor.is_contiguous(), "page tables must be contiguous"
        assert tensor.device.type == "cpu", "page tables must lie in host memory"


def _adapted(lora: LoraBatch) -> frozenset[tuple[int, int]]:
    live = lora.tables.live_ranks[lora.page_ids.long()].amax(0)
    return frozenset((layer, module) for layer, module in live.nonzero().tolist())
