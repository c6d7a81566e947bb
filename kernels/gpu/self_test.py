"""Every kernel configuration a model uses, run on random data and compared with torch.

A compiler may make wrong code of a right kernel: Triton 3.6 carries ptxas 12.8, and matrix
instructions that take an operand from registers inside a pipelined loop were miscompiled before
13.3 (triton-lang/triton#9433). So before a process serves, each configuration its steps will use
has been right once, on this device, with this compiler. A kernel that is wrong is tried again
without pipelining; `require_sound` refuses what stays wrong.

Knows operations and their inputs; which kernels they start is read from a recording.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from loraplex.kernels.gpu import expected
from loraplex.kernels.gpu.configurations import Configuration, distinct
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.gpu.launch import Launch, limit_stages, recording
from loraplex.kernels.gpu.shrink import Shrunk
from loraplex.kernels.gpu.used_kernels import DECODES, PREFILLS, steps_of
from loraplex.kernels.gpu.work import LoraWork, TileList, lora_work
from loraplex.kernels.model_shapes import ModelShape
from loraplex.kernels.ops import GATE_UP, PAGE_RANKS, QKV, Module, Ops
from loraplex.kernels.random_step import RMS_EPS, LayerStep
from loraplex.kernels.versions import versions

logger = logging.getLogger(__name__)

# Enough for the interpreter, where a program takes milliseconds.
FEW_DECODES = ((1, 40), (7, 50))
FEW_PREFILLS = (20, 67)

Pair = tuple[Tensor, Tensor]  # got, expected


class KernelFault(RuntimeError):
    """A kernel computes something else than torch, and no safe configuration of it is known."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An operation whose result was wrong. error: of the worst element, in units of the tolerance.

    remedied: right since the named kernels are no longer pipelined (num_stages=1).
    """

    operation: str
    kernels: tuple[str, ...]
    shape: str
    dtype: str
    error: float
    remedied: bool
    versions: dict[str, str | None]

    def __str__(self) -> str:
        now = "right without pipelining, which it now does without" if self.remedied else "wrong"
        known = ", ".join(f"{name} {value}" for name, value in self.versions.items() if value)
        return (
            f"{self.operation} is off by {self.error:.3g} times what rounding explains for "
            f"{self.shape} in {self.dtype}; {now}. Kernels: {'; '.join(self.kernels)}. {known}"
        )


@dataclass(frozen=True, slots=True)
class _Check:
    """run: computes and returns what it got beside what it should have got."""

    operation: str
    start: Callable[[], object]  # launches the same kernels, for the recording
    run: Callable[[], list[Pair]]


@torch.inference_mode()
def self_test(
    ops: Ops,
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    decodes: Sequence[tuple[int, int]] = DECODES,
    prefills: Sequence[int] = PREFILLS,
    block_size: int = 16,
) -> list[Finding]:
    """Run and compare every configuration that steps of these sizes use; what was wrong is
    returned.

    decodes: (sequences, longest context) of decode steps. prefills: tokens of a prefill. Compiles
    what is not compiled yet, so it is also the kernels' warm-up. Launches nothing twice that a
    smaller step has shown to be right. Waits for the device; a few seconds when all is compiled.
    """
    right: set[Configuration] = set()
    findings: list[Finding] = []
    for step in steps_of(shape, dtype, device, ops, decodes, prefills, block_size):
        assert isinstance(step.kv, PagedKVCache), "the self-test is for the paged GPU cache"
        _fill(step.kv)
        for check in _checks(step):
            with recording() as notes:
                check.start()
            used = {key: launch for key, launch in distinct(notes).items() if key not in right}
            if not used:
                continue
            error = _worst(check, dtype)
            if error <= 1:
                right |= used.keys()
                continue
            remedied = _without_pipelining(check, list(used.values()), dtype)
            finding = Finding(
                operation=check.operation,
                kernels=tuple(map(str, used)),
                shape=f"{shape.name} ({step.given.x.shape[0]} rows)",
                dtype=str(dtype).removeprefix("torch."),
                error=error,
                remedied=remedied,
                versions=versions(device),
            )
            (logger.warning if remedied else logger.error)("kernel self-test: %s", finding)
            findings.append(finding)
            right |= used.keys()  # named once; the next step would find the same again
    logger.info("kernel self-test: %d configurations, %d wrong", len(right), len(findings))
    return findings


def require_sound(findings: Sequence[Finding]) -> None:
    """Raises: KernelFault naming every finding that no safe configuration remedied."""
    wrong = [str(finding) for finding in findings if not finding.remedied]
    if wrong:
        raise KernelFault(
            "kernels disagree with torch: " + " | ".join(wrong) + ". Point TRITON_PTXAS_PATH at a "
            "newer ptxas (13.3 or later), change the versions named, or serve with --backend torch"
        )


def _worst(check: _Check, dtype: torch.dtype) -> float:
    return max((expected.excess(got, want, dtype) for got, want in check.run()), default=0.0)


def _without_pipelining(check: _Check, launches: list[Launch], dtype: torch.dtype) -> bool:
    """Try the kernels at num_stages=1; they stay there if that makes them right."""
    pipelined = [launch.kernel for launch in launches if launch.num_stages > 1]
    if not pipelined:
        return False
    for kernel in pipelined:
        limit_stages(kernel, 1)
    if _worst(check, dtype) <= 1:
        return True
    for kernel in pipelined:
        limit_stages(kernel, None)
    return False


def _fill(kv: PagedKVCache) -> None:
    for pages in (*kv.keys, *kv.values):
        pages.normal_()


def _checks(step: LayerStep) -> Iterator[_Check]:
    given, shape, lora = step.given, step.shape, step.lora
    yield _Check(
        "rms_norm",
        lambda: step.ops.rms_norm(given.x, given.norm, RMS_EPS),
        lambda: [
            (
                step.ops.rms_norm(given.x, given.norm, RMS_EPS),
                expected.rms_norm(given.x, given.norm, RMS_EPS),
            )
        ],
    )
    if lora is not None:
        for modules in (QKV, (Module.O,), GATE_UP, (Module.DOWN,)):
            names = "/".join(module.name.lower() for module in modules)
            yield _Check(
                f"lora_shrink of {names}",
                partial(step.shrink, modules),
                partial(_shrink, step, modules),
            )
    # The shrinks have been checked; what an expand starts is recorded with a T from them.
    yield _after_shrink(step, "rope_kv_write", QKV, LayerStep.rope_kv_write, _rope)
    yield _Check(
        "attention",
        step.attention,
        lambda: [
            (
                step.attention(),
                expected.attention(
                    given.attended.view(-1, shape.num_heads, shape.head_dim),
                    _paged(step),
                    0,
                    step.attention_batch,
                    shape.head_dim**-0.5,
                    shape.sliding_window,
                ),
            )
        ],
    )
    yield _after_shrink(step, "swiglu", GATE_UP, LayerStep.swiglu, _swiglu)
    for module in (Module.O, Module.DOWN):
        yield _after_shrink(
            step,
            f"add_rms_norm of {module.name.lower()}",
            (module,),
            partial(_start_add_norm, module),
            partial(_add_norm, module),
        )


def _after_shrink(
    step: LayerStep,
    operation: str,
    modules: tuple[Module, ...],
    start: Callable[[LayerStep, Tensor | None], object],
    run: Callable[[LayerStep, Tensor | None], list[Pair]],
) -> _Check:
    # A private copy: these operations work in place on what they are given.
    mine = replace(
        step,
        given=replace(step.given, qkv=step.given.qkv.clone(), residual=step.given.residual.clone()),
    )
    return _Check(
        operation,
        lambda: start(mine, step.shrink(modules)),
        lambda: run(mine, step.shrink(modules)),
    )


def _paged(step: LayerStep) -> PagedKVCache:
    assert isinstance(step.kv, PagedKVCache)
    return step.kv


def _shrink(step: LayerStep, modules: tuple[Module, ...]) -> list[Pair]:
    """T of both families against `x A^T`, entry by entry."""
    lora = step.lora
    assert lora is not None
    t: object = step.shrink(modules)  # opaque to `Ops`, ours to look into
    assert isinstance(t, Shrunk)
    x = step.input_of(modules)
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


def _rope(step: LayerStep, t: Tensor | None) -> list[Pair]:
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


def _swiglu(step: LayerStep, t: Tensor | None) -> list[Pair]:
    given, width = step.given, step.shape.intermediate
    gate, up = (
        half.float() + expected.lora_delta(given.x, step.lora, 0, module, width)
        for half, module in zip(given.gate_up.split(width, dim=1), GATE_UP, strict=True)
    )
    return [(step.swiglu(t), expected.swiglu(gate, up))]


def _start_add_norm(module: Module, step: LayerStep, t: Tensor | None) -> Tensor:
    return step.add_rms_norm(module, t)


def _add_norm(module: Module, step: LayerStep, t: Tensor | None) -> list[Pair]:
    given = step.given
    delta = expected.lora_delta(step.input_of((module,)), step.lora, 0, module, step.shape.hidden)
    residual = given.residual.float() + given.y.float() + delta
    normed = step.add_rms_norm(module, t)
    return [
        (given.residual, residual),
        (normed, expected.rms_norm(residual, given.norm, RMS_EPS)),
    ]
