"""An adapter in the byte layout of the page pool, on the host: installing it is a few copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.page_layout import PAGE_RANKS, PageLayout, PartName
from loraplex.adapters.weights import LoadedAdapter

Scaling = np.ndarray[tuple[int, int], np.dtype[np.float32]]  # [num_layers, num_modules]

Parts = Mapping[PartName, Tensor]  # each [rows, width], of its part's dtype
NO_PARTS: Parts = {}


@dataclass(frozen=True, slots=True, eq=False)
class PageImage:
    layout: PageLayout
    frames: list[Tensor]  # `num_image_frames` x [frame_elements], model dtype
    scaling: Scaling  # alpha/r of each adapted module, 0 elsewhere

    @property
    def nbytes(self) -> int:
        return sum(frame.nbytes for frame in self.frames)


def build_image(
    loaded: LoadedAdapter,
    layout: PageLayout,
    frames: Sequence[Tensor],
    num_modules: int,
    parts: Parts = NO_PARTS,
) -> PageImage:
    """Bring loaded weights into pages, and what else there is beside them. Runs anywhere; writes
    nothing but `frames`.
    """
    size = frames[0].numel() if frames else 1
    for frame in frames:
        frame.zero_()  # rows past the live ranks are read, as zeros
    for place in layout.parts:
        part = parts[place.part.name]
        for first, num_rows, offset in place.pieces():
            index, start = divmod(offset, size)
            piece = frames[index][start : start + num_rows * place.part.row_elements].view(
                part.dtype
            )
            piece.view(num_rows, -1).copy_(part[first : first + num_rows])
    scaling = np.zeros((layout.live_ranks.shape[1], num_modules), dtype=np.float32)
    for (layer, kind), module in loaded.modules.items():
        scaling[layer, kind] = module.scaling
        for page in range(-(-module.rank // PAGE_RANKS)):
            rows = slice(page * PAGE_RANKS, min((page + 1) * PAGE_RANKS, module.rank))
            for weight, offsets in ((module.a, layout.offset_a), (module.bt, layout.offset_b)):
                tile = weight[rows]
                index, start = divmod(int(offsets[page, layer, kind]), size)
                frames[index][start : start + tile.numel()].view_as(tile).copy_(tile)
    return PageImage(layout, list(frames), scaling)


def plain_frames(layout: PageLayout, frame_elements: int, dtype: torch.dtype) -> list[Tensor]:
    """Frames in ordinary memory, for whoever has no arena."""
    return list(torch.empty((layout.num_image_frames, frame_elements), dtype=dtype))
