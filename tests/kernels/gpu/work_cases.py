"""Work lists and shrink results made the slow way, with NaN wherever no kernel may read."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from loraplex.kernels.gpu.shrink import Shrunk
from loraplex.kernels.gpu.work import LoraWork, TileList, lora_work
from loraplex.kernels.ops import PAGE_RANKS, LoraBatch, Module

CPU = torch.device("cpu")


def padded(tiles: TileList | None, extra: int = 3) -> TileList | None:
    """Room for more programs than there are tiles, as in a captured graph."""
    if tiles is None:
        return None
    spare = torch.full((extra, tiles.tiles.shape[1]), 1 << 20, dtype=torch.int32)
    return TileList(torch.cat((tiles.tiles, spare)), tiles.count, tiles.capacity + extra)


def make_work(
    lora: LoraBatch | None, num_rows: int, *, small_only: bool = False, padding: int = 0
) -> LoraWork:
    work = lora_work(lora, num_rows, CPU, small_only=small_only)
    if not padding:
        return work
    return replace(
        work,
        small=padded(work.small, padding),
        norm=padded(work.norm, padding),
        large=padded(work.large, padding),
    )


def shrink(
    x: Tensor,
    lora: LoraBatch,
    work: LoraWork,
    layer: int,
    modules: tuple[Module, ...],
    planes: int = 3,
) -> Shrunk:
    """T of both families in fp32; its planes are cuts of K of unequal width."""

    def family(tiles: TileList | None, entries: int) -> Tensor | None:
        if tiles is None:
            return None
        t = torch.full((planes, max(entries, 1), len(modules) * PAGE_RANKS), float("nan"))
        for row0, rows, first, pages, start in tiles.tiles[: int(tiles.count), :5].tolist():
            for row in range(rows):
                for page in range(pages):
                    entry = start + row * pages + page
                    for s, module in enumerate(modules):
                        values = _project(x[row0 + row], lora, first + page, layer, module, planes)
                        if values is not None:
                            t[:, entry, s * PAGE_RANKS : (s + 1) * PAGE_RANKS] = values
        return t

    return Shrunk(
        family(work.small, work.small_entries),
        family(work.large, work.large_entries),
        len(modules),
    )


def _project(
    x: Tensor, lora: LoraBatch, entry: int, layer: int, module: Module, planes: int
) -> Tensor | None:
    page = lora.host_page_ids[entry]
    offset = int(lora.tables.offset_a[page, layer, module])
    if offset < 0:
        return None
    width = len(x)
    a = lora.tables.arena[offset : offset + PAGE_RANKS * width].float().view(PAGE_RANKS, width)
    cuts = [width * i // planes for i in range(planes + 1)]
    return torch.stack([a[:, i:j] @ x[i:j].float() for i, j in pairwise(cuts)])
