"""Every kernel configuration a model uses, run on random data and compared with torch.

A compiler may make wrong code of a right kernel: Triton 3.6 carries ptxas 12.8, and matrix
instructions that take an operand from registers inside a pipelined loop were miscompiled before
13.3 (triton-lang/triton#9433). So before a process serves, each configuration its steps will use
has been right once, on this device, with this compiler. A kernel that is wrong is tried again
without pipelining; `require_sound` refuses what stays wrong.

Knows operations and their inputs; which kernels they start is read from a recording.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from loraplex.kernels.gpu import expected
from loraplex.kernels.gpu.configurations import Configuration, distinct
from loraplex.kernels.gpu.launch import Launch, is_interpreted, limit_stages, recording
from loraplex.kernels.gpu.layer_checks import (
    Pair,
    check_add_norm,
    check_attention,
    check_linear,
    check_norm,
    check_rope_kv,
    check_shrink,
    check_swiglu,
    fill,
)
from loraplex.kernels.gpu.ops import TritonOps
from loraplex.kernels.gpu.sample_checks import SampleStep
from loraplex.kernels.gpu.used_kernels import DECODES, PREFILLS, steps_of
from loraplex.kernels.model_shapes import SHAPES, ModelShape
from loraplex.kernels.ops import GATE_UP, QKV, Module, Ops
from loraplex.kernels.random_step import RMS_EPS, LayerStep
from loraplex.kernels.versions import versions

logger = logging.getLogger(__name__)

# Enough for the interpreter, where a program takes milliseconds.
FEW_DECODES = ((7, 50), (1, 40))
FEW_PREFILLS = (67, 20)


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
    decodes: Sequence[tuple[int, int]] | None = None,
    prefills: Sequence[int] | None = None,
    block_size: int = 16,
) -> list[Finding]:
    """Run and compare every configuration that steps of these sizes use; what was wrong is
    returned.

    decodes: (sequences, longest context) of decode steps. prefills: tokens of a prefill. None:
    those of `used_kernels`, which cover every configuration; a few, where kernels are interpreted.
    Compiles
    what is not compiled yet, so it is also the kernels' warm-up. Launches nothing twice that a
    smaller step has shown to be right. Waits for the device; a few seconds when all is compiled.
    """
    few = device.type == "cpu"
    decodes = (FEW_DECODES if few else DECODES) if decodes is None else decodes
    prefills = (FEW_PREFILLS if few else PREFILLS) if prefills is None else prefills
    tested: set[Configuration] = set()
    findings: list[Finding] = []
    for rows, check in _all_checks(shape, dtype, device, ops, decodes, prefills, block_size):
        with recording() as notes:
            check.start()
        used = {key: launch for key, launch in distinct(notes).items() if key not in tested}
        if not used:
            continue
        tested |= used.keys()  # wrong ones, too: named once, the next step would find them again
        error = _worst(check, dtype)
        if error <= 1:
            continue
        remedied = _without_pipelining(check, list(used.values()), dtype)
        finding = Finding(
            operation=check.operation,
            kernels=tuple(map(str, used)),
            shape=f"{shape.name} ({rows} rows)",
            dtype=str(dtype).removeprefix("torch."),
            error=error,
            remedied=remedied,
            versions=versions(device),
        )
        (logger.warning if remedied else logger.error)("kernel self-test: %s", finding)
        findings.append(finding)
    logger.info("kernel self-test: %d configurations, %d wrong", len(tested), len(findings))
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


def _all_checks(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    decodes: Sequence[tuple[int, int]],
    prefills: Sequence[int],
    block_size: int,
) -> Iterator[tuple[int, _Check]]:
    """With the rows of each."""
    for step in steps_of(shape, dtype, device, ops, decodes, prefills, block_size):
        fill(step.kv)
        for check in _checks(step):
            yield step.given.x.shape[0], check
    for rows, _ in decodes:
        sampling = SampleStep(rows, shape.vocab_size, dtype, device)
        yield rows, _Check("sampling", sampling.start, sampling.check)


def _checks(step: LayerStep) -> Iterator[_Check]:
    given = step.given
    yield _Check(
        "rms_norm",
        lambda: step.ops.rms_norm(given.x, given.norm, RMS_EPS),
        partial(check_norm, step),
    )
    for name in step.shape.linears():
        yield _Check(
            f"linear {name}",
            partial(_start_linear, step, name),
            partial(check_linear, step, name),
        )
    if step.lora is not None:
        for modules in (QKV, (Module.O,), GATE_UP, (Module.DOWN,)):
            names = "/".join(module.name.lower() for module in modules)
            yield _Check(
                f"lora_shrink of {names}",
                partial(step.shrink, modules),
                partial(check_shrink, step, modules),
            )
    # The shrinks have been checked; what an expand starts is recorded with a T from them.
    yield _after_shrink(step, "rope_kv_write", QKV, LayerStep.rope_kv_write, check_rope_kv)
    yield _Check("attention", step.attention, partial(check_attention, step))
    yield _after_shrink(step, "swiglu", GATE_UP, LayerStep.swiglu, check_swiglu)
    for module in (Module.O, Module.DOWN):
        yield _after_shrink(
            step,
            f"add_rms_norm of {module.name.lower()}",
            (module,),
            lambda step, t, module=module: step.add_rms_norm(module, t),  # type: ignore[misc]
            partial(check_add_norm, module),
        )


def _start_linear(step: LayerStep, name: str) -> None:
    x, weight, bias = step.linear_operands(name)
    step.ops.linear(weight, bias)(x)


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


def main(arguments: list[str] | None = None) -> int:
    """Of `python -m loraplex.kernels.gpu.self_test`: the last line is JSON, 1 means unsound."""
    parser = argparse.ArgumentParser(prog="loraplex.kernels.gpu.self_test", description=__doc__)
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batch-invariant", action="store_true", help="those kernels, too")
    chosen = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not is_interpreted():
        print(json.dumps({"error": "no CUDA device, and TRITON_INTERPRET is not set"}))
        return 2
    shapes = chosen.shape or (["tiny"] if device.type == "cpu" else ["llama-3-8b"])
    findings: list[Finding] = []
    started = time.monotonic()
    for invariant in (False, True) if chosen.batch_invariant else (False,):
        for name in shapes:
            for dtype in chosen.dtype or ["bfloat16"]:
                torch.manual_seed(0)
                ops = TritonOps(batch_invariant=invariant)
                findings += self_test(ops, SHAPES[name], getattr(torch, dtype), device)
    sound = all(finding.remedied for finding in findings)
    report = {
        "sound": sound,
        "shapes": shapes,
        "findings": [{"text": str(finding), **asdict(finding)} for finding in findings],
        "seconds": round(time.monotonic() - started, 1),
        "versions": versions(device),
    }
    print(json.dumps(report))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
