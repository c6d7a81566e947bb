"""What every bench case shares: the model's shape, the timer, the time left, the results."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from loraplex.kernels.gpu.bench_timing import Pass, Timer, Timing
from loraplex.kernels.gpu.expected import relative_error
from loraplex.kernels.gpu.peers import Peer
from loraplex.kernels.gpu.roofline import H200, Machine
from loraplex.kernels.model_shapes import ModelShape

T = TypeVar("T")

# |got - expected| / |expected| of a whole tensor, operands rounded to the dtype.
MOST_ERROR = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 1e-4}
BLOCK_SIZE = 16


class WrongResult(AssertionError):
    """A kernel that is wrong is not timed."""


@dataclass(slots=True, kw_only=True)
class Bench:
    """deadline: of `time.monotonic`. rows: one dict per measurement. machine: as measured.

    journal: a file that gets every row at once, for the day when the process is stopped.
    """

    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    timer: Timer
    quick: bool
    dry_run: bool
    deadline: float
    peers: Sequence[Peer] = ()
    machine: Machine = H200
    rows: list[dict[str, Any]] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)
    journal: Path | None = None

    def sizes(
        self, case: str, full: Sequence[T], quick: Sequence[T], dry: Sequence[T]
    ) -> Iterator[T]:
        """Those of this run, as long as there is time; the rest is noted as not reached."""
        for size in dry if self.dry_run else quick if self.quick else full:
            if time.monotonic() > self.deadline:
                self.not_reached.append(f"{case} {size}")
            else:
                yield size

    def time(self, passes: Sequence[Pass]) -> Timing:
        return self.timer(passes)

    def check(self, what: str, got: Tensor, expected: Tensor) -> None:
        """Raises: WrongResult."""
        error = relative_error(got, expected)
        if not error <= MOST_ERROR[self.dtype]:
            raise WrongResult(
                f"{what}: relative error {error:.2g} against torch in fp32, at most "
                f"{MOST_ERROR[self.dtype]} is rounding"
            )

    def add(self, case: str, floor_us: float | None = None, **values: Any) -> None:
        """Note and print one row. us: measured, in `values`; its fraction of the floor is added."""
        row = {"case": case, **values}
        if floor_us is not None:
            row["floor_us"] = floor_us
            if row.get("us"):
                row["fraction"] = floor_us / row["us"]
        row = {key: _round(value) for key, value in row.items()}
        self.rows.append(row)
        note_row(self.journal, row)
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def note_row(journal: Path | None, row: dict[str, Any]) -> None:
    if journal is not None:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _round(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
