"""Every kernel is started here, so one place can also write down what would be started.

`recording` turns launches into notes: run the operations on meta tensors inside it and the list
says exactly which kernels, types and configurations a model uses. The offline compile and the
start-up self-test work from that list, so neither can forget a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import triton


@dataclass(frozen=True, slots=True)
class Launch:
    """args: by parameter name, constexprs included; tensors as they were passed."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int


_notes: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constexprs: Any,
) -> None:
    """Start `kernel` on the current stream; nothing for an empty grid."""
    num_stages = min(num_stages, getattr(kernel, "max_stages", None) or num_stages)
    notes = _notes.get()
    if notes is not None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | constexprs
        notes.append(Launch(kernel, grid, named, num_warps, num_stages))
        return
    if 0 in grid:
        return
    kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)


def limit_stages(kernel: Any, most: int | None) -> None:
    """Start `kernel` with at most `most` pipeline stages from now on; None = as its launchers say.

    For the self-test: code that a compiler got wrong when pipelined is often right without. Written
    on the kernel, which is one per process, as its compiled forms are.
    """
    kernel.max_stages = most


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the block launches are listed, not run."""
    notes: list[Launch] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def is_interpreted() -> bool:
    """Kernels run in Triton's interpreter, on the CPU. Settled when the kernels are imported."""
    return bool(triton.knobs.runtime.interpret)
