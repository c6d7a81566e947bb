"""The operations of a layer held against torch in fp32, result by result.

Each function runs one operation of a `LayerStep` and returns what it got beside what it should have
got. Knows what the operations mean and how T is laid out; nothing of launches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loraplex.kernels.gpu import expected
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.gpu.shrink import Shrunk
from loraplex.kernels.gpu.work import LoraWork, TileList, lora_work
from loraplex.kernels.ops import GATE_UP, PAGE_RANKS, QKV, Module
from loraplex.kernels.random_step import RMS_EPS, LayerStep

Pair = tuple[Tensor, Tensor]  # got, expected


def fill(kv: object) -> None:
    """Random keys and values: attention over zeros would prove nothing."""
    assert isinstance(kv, PagedKVCache)
    for pages in (*kv.keys, *kv.values):
        pages.normal_()


def check_norm(step: LayerStep) -> list[Pair]:
    x, weight = step.given.x, step.given.norm
    return [(step.ops.rms_norm(x, weight, RMS_EPS), expected.rms_norm(x, weight, RMS_EPS))]


def check_linear(step: LayerStep, name: str) -> list[Pair]:
    x, weight, bias = step.linear_operands(name)
    want = x.float() @ weight.float().T
    if bias is not None:
        want += bias.float()
    return [(step.ops.linear(weight, bias)(x), want)]


def check_attention(step: LayerStep) -> list[Pair]:
    shape = step.shape
    q = step.given.attended.view(-1, shape.num_heads, shape.head_dim)
    want = expected.attention(
        q, _paged(step), 0, step.attention_batch, shape.head_dim**-0.5, shape.sliding_window
    )
    return [(step.attention(), want)]


def check_shrink(step: LayerStep, modules: tuple[Module, ...]) -> list[Pair]:
    """T of both families against `x A^T`, entry by entry."""
    lora = step.lora
    assert lora is not None
    t: object = step.shrink(modules)  # opaque to `Ops`, ours to look into
    assert isinstance(t, Shrunk)
    x = step.input_of(modules)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)  # it may run on a stream that only an expand waits for
    work = lora.plan if isinstance(lora.plan, LoraWork) else lora_work(lora, len(x), x.device)
    pairs: list[Pair] = []
    for planes, tiles in ((t.small, work.small), (t.large, work.large)):
        if planes is None or tiles is None:
            continue
        total = planes.sum(0).view(-1, len(modules), PAGE_RANKS)
        pairs += _entries(step, modules, x, total, tiles)
    return pairs


def _entries(
    step: LayerStep, modules: tuple[Module, ...], x: Tensor, total: Tensor, tiles: TileList
) -> Iterator[Pair]:
    lora = step.lora
    assert lora is not None
    for row, rows, first, pages, start, *_ in tiles.tiles.tolist()[: int(tiles.count)]:
        for page in range(pages):
            entries = start + page + torch.arange(rows, device=x.device) * pages
            for place, module in enumerate(modules):
                want = expected.shrink_result(
                    x[row : row + rows], lora, lora.host_page_ids[first + page], 0, module
                )
                if want is not None:
                    yield total[entries, place], want


def check_rope_kv(step: LayerStep, t: Tensor | None) -> list[Pair]:
    given, shape, kv = step.given, step.shape, _paged(step)
    widths = (shape.q_width, shape.kv_width, shape.kv_width)
    qkv = given.qkv.float() + torch.cat(
        [
            expected.lora_delta(given.x, step.lora, 0, module, width)
            for module, width in zip(QKV, widths, strict=True)
        ],
        1,
    )
    q, k, v = (
        part.view(part.shape[0], -1, shape.head_dim) for part in qkv.split(list(widths), dim=1)
    )
    if given.q_norm is not None and given.k_norm is not None:
        q = expected.rms_norm(q, given.q_norm, RMS_EPS)
        k = expected.rms_norm(k, given.k_norm, RMS_EPS)
    q, k = (expected.rotate(heads, given.cos, given.sin) for heads in (q, k))
    got = step.rope_kv_write(t)
    slots = step.attention_batch.slot_mapping.long()
    block, offset = slots // kv.block_size, slots % kv.block_size
    return [
        (got.view_as(q), q),
        (kv.keys[0][block, :, offset], k),
        (kv.values[0][block, :, offset], v),
    ]


def check_swiglu(step: LayerStep, t: Tensor | None) -> list[Pair]:
    given, width = step.given, step.shape.intermediate
    gate, up = (
        half.float() + expected.lora_delta(given.x, step.lora, 0, module, width)
        for half, module in zip(given.gate_up.split(width, dim=1), GATE_UP, strict=True)
    )
    return [(step.swiglu(t), expected.swiglu(gate, up))]


def check_add_norm(module: Module, step: LayerStep, t: Tensor | None) -> list[Pair]:
    given = step.given
    delta = expected.lora_delta(step.input_of((module,)), step.lora, 0, module, step.shape.hidden)
    residual = given.residual.float() + given.y.float() + delta
    normed = step.add_rms_norm(module, t)
    return [
        (given.residual, residual),
        (normed, expected.rms_norm(residual, given.norm, RMS_EPS)),
    ]


def _paged(step: LayerStep) -> PagedKVCache:
    assert isinstance(step.kv, PagedKVCache)
    return step.kv
