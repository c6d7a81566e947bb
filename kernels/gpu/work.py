"""What a launch works on: the rows of a step cut into tiles that share their adapter pages.

A *tile* is up to MAX_ROWS neighbouring rows of one composition, base rows included (no pages: the
fused kernels still do the base operation for them). Two families of kernels divide a step's rows:

    small   tiles of up to 16 rows: decode. A tile of one row is computed as matrix-vector products,
            one of more rows on the matrix units.
    large   tiles of up to 64 rows: prefill.

The cutting is host work (numpy), done again only when the rows or their pages change. Kernels are
started for `capacity` tiles and leave at once past `count`, which lies on the device: so a captured
graph serves any mix of adapters, ranks and compositions.

Shrink writes T, one entry of 16 fp32 values per (row, page entry, module): entry
`t_start + row * num_pages + page` of the tile's family. Nothing is padded to a largest rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex.kernels.ops import LoraBatch

TILE_FIELDS = (
    8  # first row, rows, first page entry, page entries, first T entry, 3 unused: 32 bytes
)
SMALL_ROWS = 16
NORM_ROWS = 4  # the last program of a tile normalises its rows alone, so there are few
LARGE_ROWS = 64

Run = tuple[int, int, int, int]  # first row, rows, first page entry, page entries
Tiles = np.ndarray[tuple[int, int], np.dtype[np.int32]]  # [num_tiles, TILE_FIELDS]


@dataclass(frozen=True, slots=True, eq=False)
class RowPlan:
    """A step's tiles on the host.

    norm: the rows of `small`, cut for add + RMSNorm. *_entries: the T entries of each family.
    """

    small: Tiles
    norm: Tiles
    large: Tiles
    small_entries: int
    large_entries: int


@dataclass(frozen=True, slots=True, eq=False)
class TileList:
    """Tiles on the device."""

    tiles: Tensor  # [capacity, TILE_FIELDS] int32
    count: Tensor  # [1] int32: tiles that are real
    capacity: int  # tiles to start programs for


@dataclass(frozen=True, slots=True, eq=False)
class LoraWork:
    """The `plan` of a LoraBatch for the Triton kernels. A family without tiles is None."""

    page_ids: Tensor  # [page entries] int32
    page_weights: Tensor  # [page entries] float32
    small: TileList | None
    norm: TileList | None  # None exactly when `small` is
    large: TileList | None
    small_entries: int  # room for T, at least what the tiles use
    large_entries: int


def plan_rows(runs: Iterable[Run], num_rows: int, *, small_only: bool = False) -> RowPlan:
    """Cut a step of `num_rows` rows into tiles.

    runs: neighbouring rows of one composition, in row order; rows in no run use the base model.
    small_only: no row goes to the large family, whatever the runs' lengths (captured decodes).
    """
    small: list[Run] = []
    large: list[Run] = []
    for run in _with_base_rows(runs, num_rows):
        (small if small_only or run[1] <= SMALL_ROWS else large).append(run)
    small_tiles, small_entries = _cut(small, SMALL_ROWS, base_rows=1)
    norm_tiles, _ = _cut(small, NORM_ROWS, base_rows=1)
    large_tiles, large_entries = _cut(large, LARGE_ROWS, base_rows=LARGE_ROWS)
    return RowPlan(small_tiles, norm_tiles, large_tiles, small_entries, large_entries)


def lora_work(
    lora: LoraBatch | None, num_rows: int, device: torch.device, *, small_only: bool = False
) -> LoraWork:
    """The work of a step that nobody prepared: tiles cut and copied now."""
    runs = [] if lora is None else lora.host_tiles
    plan = plan_rows(runs, num_rows, small_only=small_only)

    def on_device(tiles: Tiles) -> TileList | None:
        if not len(tiles):
            return None
        count = torch.tensor([len(tiles)], dtype=torch.int32, device=device)
        return TileList(torch.from_numpy(tiles).to(device), count, len(tiles))

    nothing = torch.zeros(1, device=device)
    return LoraWork(
        page_ids=nothing.int() if lora is None else lora.page_ids,
        page_weights=nothing if lora is None else lora.page_weights,
        small=on_device(plan.small),
        norm=on_device(plan.norm),
        large=on_device(plan.large),
        small_entries=plan.small_entries,
        large_entries=plan.large_entries,
    )


def _with_base_rows(runs: Iterable[Run], num_rows: int) -> Iterator[Run]:
    row = 0
    for run in runs:
        if run[0] > row:
            yield row, run[0] - row, 0, 0
        yield run
        row = run[0] + run[1]
    if row < num_rows:
        yield row, num_rows - row, 0, 0


def _cut(runs: list[Run], max_rows: int, *, base_rows: int) -> tuple[Tiles, int]:
    """Base rows have nothing to share, so smaller tiles spread them over more programs."""
    tiles: list[tuple[int, ...]] = []
    entries = 0
    for row, count, first, pages in runs:
        step = max_rows if pages else base_rows
        for at in range(row, row + count, step):
            rows = min(step, row + count - at)
            tiles.append((at, rows, first, pages, entries, 0, 0, 0))
            entries += rows * pages
    return np.array(tiles, dtype=np.int32).reshape(-1, TILE_FIELDS), entries
