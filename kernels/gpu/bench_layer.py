"""A whole decode step of the model's shape as one graph: base, ours, a peer's LoRA in its place.

The weights are random and every layer has its own, so the step reads what a real one reads. The
peer's step is ours without adapters plus the peer's shrink and expand after each linear, in its
order: what the rest of its server costs is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.kernels.gpu.attention_work import attention_work
from loraplex.kernels.gpu.bench_context import BLOCK_SIZE, Bench
from loraplex.kernels.gpu.layer_checks import fill
from loraplex.kernels.gpu.ops import TritonOps
from loraplex.kernels.gpu.peers import LoraProblem, Peer
from loraplex.kernels.gpu.roofline import decode_step_us
from loraplex.kernels.gpu.work import lora_work
from loraplex.kernels.model_shapes import ModelShape
from loraplex.kernels.ops import GATE_UP, QKV, AttentionBatch, KVCache, LoraBatch, Module
from loraplex.kernels.random_step import (
    RMS_EPS,
    RandomAdapters,
    Run,
    make_adapters,
    make_attention,
    make_lora,
    random_tensor,
)

CONTEXT = 512
RANK = 16
After = Callable[[int, str, Tensor], None]  # layer, linear, its result: a peer adds to it


@dataclass(frozen=True, slots=True, eq=False)
class RandomModel:
    """Weights of all layers, `[out, in]`."""

    shape: ModelShape
    layers: list[dict[str, Tensor]]
    norm: Tensor
    head: Tensor


def make_model(bench: Bench) -> RandomModel:
    shape = bench.shape

    def weight(width: int, out: int) -> Tensor:
        return random_tensor(out, width, dtype=bench.dtype, device=bench.device, std=width**-0.5)

    return RandomModel(
        shape,
        [
            {name: weight(*size) for name, size in shape.linears().items()}
            for _ in range(shape.num_layers)
        ],
        torch.ones(shape.hidden, dtype=bench.dtype, device=bench.device),
        weight(shape.hidden, shape.vocab_size),
    )


@dataclass(frozen=True, slots=True, eq=False)
class DecodeStep:
    """One token of every sequence through all layers and the output head."""

    model: RandomModel
    ops: TritonOps
    x: Tensor
    cos: Tensor
    kv: KVCache
    batch: AttentionBatch

    def run(self, lora: LoraBatch, after: After | None = None) -> Tensor:
        ops, shape = self.ops, self.model.shape

        def linear(layer: int, name: str, x: Tensor) -> Tensor:
            y = torch.nn.functional.linear(x, self.model.layers[layer][name])
            if after is not None:
                after(layer, name, y)
            return y

        residual = self.x.clone()
        x = ops.rms_norm(residual, self.model.norm, RMS_EPS)
        norm = self.model.norm
        for i in range(shape.num_layers):
            t = ops.lora_shrink(x, lora, i, QKV)
            q = ops.rope_kv_write(
                linear(i, "qkv", x), t, lora, i, self.cos, self.cos, None, None, RMS_EPS,
                shape.num_heads, self.kv, self.batch,
            )  # fmt: skip
            x = ops.attention(q, self.kv, i, self.batch, shape.head_dim**-0.5, None)
            t = ops.lora_shrink(x, lora, i, (Module.O,))
            x = ops.add_rms_norm(linear(i, "o", x), t, lora, i, Module.O, residual, norm, RMS_EPS)
            t = ops.lora_shrink(x, lora, i, GATE_UP)
            x = ops.swiglu(linear(i, "gate_up", x), t, lora, i)
            t = ops.lora_shrink(x, lora, i, (Module.DOWN,))
            x = ops.add_rms_norm(
                linear(i, "down", x), t, lora, i, Module.DOWN, residual, norm, RMS_EPS
            )
        return torch.nn.functional.linear(x, self.model.head)


def make_decode(bench: Bench, model: RandomModel, rows: int, *, overlap: bool = True) -> DecodeStep:
    shape, device = bench.shape, bench.device
    ops = TritonOps(overlap=overlap)
    context = 20 if bench.dry_run else CONTEXT
    batch, blocks = make_attention([context] * rows, [1] * rows, BLOCK_SIZE, device)
    kv = ops.kv_cache(
        shape.num_layers, blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim, bench.dtype,
        device,
    )  # fmt: skip
    fill(kv)
    batch.plan = attention_work(batch, shape.num_heads, kv)
    x = random_tensor(rows, shape.hidden, dtype=bench.dtype, device=device)
    cos = torch.full((rows, shape.head_dim), 0.7, device=device)
    return DecodeStep(model, ops, x, cos, kv, batch)


def lora_of(adapters: RandomAdapters, runs: Sequence[Run], rows: int) -> LoraBatch:
    lora = make_lora(adapters, runs)
    lora.plan = lora_work(lora, rows, adapters.tables.arena.device)
    return lora


def bench_layer(bench: Bench) -> None:
    """Milliseconds of a step by batch size: the LoRA tax with every adapter distinct."""
    model = make_model(bench)
    for rows in bench.sizes("layer", (1, 64, 8, 32, 256), (1, 64), (2,)):
        step = make_decode(bench, model, rows)
        adapters = make_adapters(
            bench.shape, [RANK] * rows, bench.dtype, bench.device, shuffled=True
        )
        bare = lora_of(adapters, [(rows, ())], rows)
        distinct = lora_of(adapters, [(1, (i,)) for i in range(rows)], rows)
        shared = lora_of(adapters, [(rows, (0,))], rows)
        contexts = step.batch.host_context_lens
        machine, shape = bench.machine, bench.shape
        floor = decode_step_us(machine, shape, contexts)
        base = bench.time([lambda step=step, lora=bare: step.run(lora)]).us  # type: ignore[misc]
        bench.add("layer", floor, rows=rows, lora="none", us=base)
        for name, lora, ranks in (
            ("distinct", distinct, [RANK] * rows),
            ("one shared", shared, [RANK]),
        ):
            floor = decode_step_us(machine, shape, contexts, ranks)
            us = bench.time([lambda step=step, lora=lora: step.run(lora)]).us  # type: ignore[misc]
            bench.add("layer", floor, rows=rows, lora=name, us=us, tax=us / base - 1)
        alone = make_decode(bench, model, rows, overlap=False)
        us = bench.time([lambda step=alone, lora=distinct: step.run(lora)]).us  # type: ignore[misc]
        bench.add("layer", floor, rows=rows, lora="distinct, no fork", us=us, tax=us / base - 1)
        for peer in bench.peers:
            _peer_step(bench, peer, step, bare, rows, base)


def _peer_step(
    bench: Bench, peer: Peer, step: DecodeStep, bare: LoraBatch, rows: int, base: float
) -> None:
    """Its expand adds to zeros of its own, of the linear's size: the same work on other memory."""
    shape = bench.shape
    groups = {"qkv": QKV, "o": (Module.O,), "gate_up": GATE_UP, "down": (Module.DOWN,)}

    def problem(modules: tuple[Module, ...]) -> LoraProblem:
        width = shape.widths(modules[0])[0]
        outs = [shape.widths(module)[1] for module in modules]

        def rand(*size: int) -> Tensor:
            return random_tensor(*size, dtype=bench.dtype, device=bench.device, std=0.02)

        return LoraProblem(
            x=rand(rows, width),
            a=[rand(rows, RANK, width) for _ in outs],
            b=[rand(rows, out, RANK) for out in outs],
            rows=list(range(rows)),
            scaling=1.0,
            max_adapters=max(8, rows),
        )

    ready = [
        {name: peer.variants(problem(modules)) for name, modules in groups.items()}
        for _ in range(shape.num_layers)
    ]
    for variant in ready[0]["qkv"]:

        def after(layer: int, name: str, y: Tensor, variant: str = variant) -> None:
            ready[layer][name][variant]()

        try:
            us = bench.time([lambda after=after: step.run(bare, after)]).us  # type: ignore[misc]
        except Exception as error:
            bench.add("layer", rows=rows, lora=f"{peer.name} {variant}", error=str(error)[:200])
            continue
        bench.add("layer", rows=rows, lora=f"{peer.name} {variant}", us=us, tax=us / base - 1)
