"""Adapter pages gathered into matrices that a plain GEMM can use: the LoRA half of `TorchOps`.

A *stack* is the live rows of a set of pages: one A matrix per fused group of modules and one B
matrix per module. Tiles of few rows share one stack of all their pages and a mask with the weights
(zero where a page is not the row's); a long prefill tile has a stack of its own pages. Stacks are
keyed by their SET of pages: with 32 short requests the batch changes every other step, the set of
adapters does not. Knows nothing about attention or norms.

The cost of a stack is a copy of its adapters, kept until `max_bytes` (LRU) or until the page tables
change.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex.kernels.ops import LoraBatch, Module, PageTables

MERGE_ROWS = 64  # tiles are merged under one masked stack up to this many rows
OWN_STACK_ROWS = 32  # a tile with this many rows computes only its own pages

Modules = tuple[Module, ...]
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Columns:
    """What the columns of a shrink result are: page (index in the stack) and scaling of each."""

    page: Tensor  # [R] int64
    scaling: Tensor  # [R] float32


@dataclass(slots=True, eq=False)
class Group:
    """One fused group of modules of one layer, for one stack."""

    a: Tensor  # [R, in], the modules one after the other
    spans: list[tuple[int, int]]  # per module, its columns of the shrink result
    columns: Columns
    b: list[Tensor | None] | None = None  # per module [out, R_module], gathered by the first expand


@dataclass(slots=True, eq=False)
class Stack:
    pages: tuple[int, ...]
    groups: dict[tuple[int, Modules], Group | None] = field(default_factory=dict)
    columns: dict[tuple[tuple[int, ...], tuple[float, ...]], Columns] = field(default_factory=dict)
    nbytes: int = 0


@dataclass(slots=True, eq=False)
class Segment:
    """A run of rows computed together."""

    row: int
    rows: int
    stack: Stack
    weights: Tensor  # [rows or 1, pages] float32, 0 where the page is not the row's
    masks: dict[Columns, Tensor] = field(default_factory=dict)

    def mask(self, columns: Columns) -> Tensor:
        """`[rows or 1, R]` float32: composition weight times scaling of each column."""
        mask = self.masks.get(columns)
        if mask is None:
            mask = self.masks[columns] = self.weights[:, columns.page] * columns.scaling
        return mask


@dataclass(slots=True, eq=False)
class LoraPlan:
    """How one step's rows are cut into segments. Made once per step."""

    owner: StackCache
    tables: PageTables
    segments: list[Segment]

    def groups(
        self, layer: int, modules: Modules, in_features: int = 0
    ) -> list[tuple[Segment, Group]]:
        found = []
        for segment in self.segments:
            group = self.owner.group(self.tables, segment.stack, layer, modules, in_features)
            if group is not None:
                found.append((segment, group))
        return found

    def shrink(self, x: Tensor, layer: int, modules: Modules) -> Tensor | None:
        """The shrink results of all segments one after the other, flat."""
        parts = []
        for segment, group in self.groups(layer, modules, x.shape[1]):
            t = F.linear(x[segment.row : segment.row + segment.rows], group.a)
            parts.append(t.mul_(segment.mask(group.columns)))
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])

    def expand(
        self,
        y: Tensor,
        t: Tensor,
        layer: int,
        modules: Modules,
        slices: tuple[tuple[int, int], ...],
    ) -> None:
        """Add the deltas to y in place. slices: (first column, columns) of each module in y."""
        found = self.groups(layer, modules)
        offset = 0
        for segment, group in found:
            width = group.a.shape[0]
            size = segment.rows * width
            part = t if len(found) == 1 else t[offset : offset + size].view(segment.rows, width)
            offset += size
            b = group.b
            if b is None:
                widths = [columns for _, columns in slices]
                b = self.owner.gather_b(self.tables, segment.stack, group, layer, modules, widths)
            rows = y[segment.row : segment.row + segment.rows]
            for (start, columns), matrix, (first, last) in zip(slices, b, group.spans, strict=True):
                if matrix is not None:
                    delta = F.linear(part[:, first:last], matrix)
                    rows[:, start : start + columns].add_(delta)


class StackCache:
    """Stacks by their set of pages, least recently used first out.

    max_bytes bounds the copies kept between steps; one step may hold more than that.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._stacks: OrderedDict[tuple[int, ...], Stack] = OrderedDict()
        self._seen: tuple[PageTables, int, int] | None = None

    @property
    def nbytes(self) -> int:
        return sum(stack.nbytes for stack in self._stacks.values())

    def plan(self, lora: LoraBatch) -> LoraPlan:
        """The segments of this step; kept on the batch, so every layer and module shares them."""
        plan = lora.plan
        if isinstance(plan, LoraPlan) and plan.owner is self:
            return plan
        self._drop_stale(lora.tables)
        device = lora.tables.arena.device
        segments = []
        for tiles in _merge(lora.host_tiles):
            row = tiles[0][0]
            rows = tiles[-1][0] + tiles[-1][1] - row
            pages = tuple(sorted({p for tile in tiles for p in _entries(lora.host_page_ids, tile)}))
            index = {page: i for i, page in enumerate(pages)}
            weights = torch.zeros(1 if len(tiles) == 1 else rows, len(pages))
            for tile in tiles:
                first = 0 if len(tiles) == 1 else tile[0] - row
                last = 1 if len(tiles) == 1 else first + tile[1]
                entries = zip(
                    _entries(lora.host_page_ids, tile),
                    _entries(lora.host_page_weights, tile),
                    strict=True,
                )
                for page, weight in entries:
                    weights[first:last, index[page]] += weight
            segments.append(Segment(row, rows, self._stack(pages), weights.to(device)))
        self._trim(keep={segment.stack.pages for segment in segments})
        lora.plan = plan = LoraPlan(self, lora.tables, segments)
        return plan

    def group(
        self, tables: PageTables, stack: Stack, layer: int, modules: Modules, in_features: int
    ) -> Group | None:
        """One fused group, gathered at first use; None if none of the stack's pages adapts it."""
        key = (layer, modules)
        if key not in stack.groups:
            group = stack.groups[key] = _gather_a(tables, stack, layer, modules, in_features)
            stack.nbytes += group.a.nbytes if group is not None else 0
        return stack.groups[key]

    def gather_b(
        self,
        tables: PageTables,
        stack: Stack,
        group: Group,
        layer: int,
        modules: Modules,
        widths: list[int],
    ) -> list[Tensor | None]:
        """The B matrices of a group, widths: output columns of each module."""
        b: list[Tensor | None] = []
        for module, width in zip(modules, widths, strict=True):
            rows = _tiles(tables, tables.offset_b, stack, layer, module, width)
            b.append(torch.cat(rows).t().contiguous() if rows else None)
            stack.nbytes += sum(row.nbytes for row in rows)
        group.b = b
        return b

    def _stack(self, pages: tuple[int, ...]) -> Stack:
        stack = self._stacks.setdefault(pages, Stack(pages))
        self._stacks.move_to_end(pages)
        return stack

    def _trim(self, keep: set[tuple[int, ...]]) -> None:
        total = self.nbytes
        for pages in list(self._stacks):
            if total <= self.max_bytes:
                return
            if pages not in keep:
                total -= self._stacks.pop(pages).nbytes

    def _drop_stale(self, tables: PageTables) -> None:
        """Forget everything once a page was installed: its number may mean another adapter."""
        writes = 0 if tables.scaling.is_inference() else tables.scaling._version
        seen = self._seen
        if seen is None or seen[0] is not tables or seen[1:] != (tables.version, writes):
            self._stacks.clear()
            self._seen = (tables, tables.version, writes)


def _entries(values: list[T], tile: tuple[int, int, int, int]) -> list[T]:
    return values[tile[2] : tile[2] + tile[3]]


def _merge(tiles: list[tuple[int, int, int, int]]) -> list[list[tuple[int, int, int, int]]]:
    """Neighbouring small tiles together, up to MERGE_ROWS rows; large ones alone."""
    merged: list[list[tuple[int, int, int, int]]] = []
    for tile in sorted(tiles):
        if tile[1] == 0 or tile[3] == 0:
            continue
        group = merged[-1] if merged else None
        small = tile[1] < OWN_STACK_ROWS and group is not None and group[-1][1] < OWN_STACK_ROWS
        if group is not None and small and tile[0] + tile[1] - group[0][0] <= MERGE_ROWS:
            group.append(tile)
        else:
            merged.append([tile])
    return merged


def _tiles(
    tables: PageTables, offsets: Tensor, stack: Stack, layer: int, module: Module, width: int
) -> list[Tensor]:
    """Views of the live rows of one module of every page of the stack that adapts it."""
    pages = torch.tensor(stack.pages, dtype=torch.int64, device=offsets.device)
    ranks = tables.live_ranks[pages, layer, module].tolist()
    starts = offsets[pages, layer, module].tolist()
    return [
        tables.arena[start : start + rank * width].view(rank, width)
        for rank, start in zip(ranks, starts, strict=True)
        if rank > 0
    ]


def _gather_a(
    tables: PageTables, stack: Stack, layer: int, modules: Modules, in_features: int
) -> Group | None:
    pages = torch.tensor(stack.pages, dtype=torch.int64, device=tables.live_ranks.device)
    ranks = tables.live_ranks[pages, layer].tolist()
    scalings = tables.scaling[pages, layer].tolist()
    rows: list[Tensor] = []
    spans: list[tuple[int, int]] = []
    column_pages: list[int] = []
    column_scalings: list[float] = []
    for module in modules:
        first = len(column_pages)
        rows += _tiles(tables, tables.offset_a, stack, layer, module, in_features)
        for i in range(len(stack.pages)):
            column_pages += [i] * ranks[i][module]
            column_scalings += [scalings[i][module]] * ranks[i][module]
        spans.append((first, len(column_pages)))
    if not rows:
        return None
    a = torch.cat(rows)
    key = (tuple(column_pages), tuple(column_scalings))
    columns = stack.columns.get(key)
    if columns is None:
        columns = stack.columns[key] = Columns(
            torch.tensor(column_pages, device=a.device),
            torch.tensor(column_scalings, device=a.device),
        )
    return Group(a, spans, columns)
