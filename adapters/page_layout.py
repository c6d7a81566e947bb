"""How an adapter is laid out: pages of 16 ranks, cut into tiles, packed into frames.

A *page* is 16 ranks of one adapter. For each module it adapts in each layer it has two tiles: A
`[16, in]` and B transposed `[16, out]`. Tiles are packed one after the other into *frames* of one
size, so any free frame serves any adapter and memory never fragments. A frame holds exactly one
page of one layer with every module adapted: such adapters waste nothing.

Tiles are packed layer by layer, so an adapter that is copied frame by frame arrives in the order in
which a forward pass needs it. What an adapter has beyond A and B (`extras_parts.py`) lies in its
frames as well, ahead of the tiles, cut between rows where a frame ends. Arithmetic only; knows
nothing of tensors, files or devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

PAGE_RANKS = 16
ALIGNMENT = 64  # elements: 128 bytes in bf16, a whole number of cache lines
FUSED_GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))  # modules whose tiles of one kind lie side by side

Key = tuple[int, int]  # layer, module
PartName = tuple[str, int, int] | tuple[str, str]  # what, and of which layer and module, or of what
Offsets = np.ndarray[tuple[int, int, int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix that an adapter has beside its tiles. row_elements: of the pool's dtype."""

    name: PartName
    rows: int
    row_elements: int


@dataclass(frozen=True, slots=True)
class PartPlace:
    """Where a part lies in an image: from element `offsets[i]` on its rows `i * rows_per_piece`
    and following, one after the other; the last piece has what is left.
    """

    part: Part
    rows_per_piece: int
    offsets: tuple[int, ...]

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """(first row, rows, offset) of each."""
        for i, offset in enumerate(self.offsets):
            first = i * self.rows_per_piece
            yield first, min(self.rows_per_piece, self.part.rows - first), offset


@dataclass(frozen=True, slots=True, eq=False)
class PageLayout:
    """Where an adapter's tiles and parts lie in its own image, before it has frames.

    offset_a, offset_b: `[num_pages, num_layers, num_modules]` elements, -1 = not adapted.
    num_frames: frames to reserve on the device; at least one per page, so that page numbers never
    run out first. num_image_frames: frames that hold anything.
    last_frames: per layer, the frame after which all its tiles, and those of earlier layers and all
    parts, are there; -1 while nothing is adapted.
    """

    num_pages: int
    num_frames: int
    num_image_frames: int
    offset_a: Offsets
    offset_b: Offsets
    live_ranks: np.ndarray[tuple[int, int, int], np.dtype[np.int32]]
    last_frames: tuple[int, ...]
    parts: tuple[PartPlace, ...] = ()


def frame_elements(module_shapes: Sequence[tuple[int, int]]) -> int:
    """Elements of a frame: one page of one layer with every module adapted."""
    return sum(_tile_elements(features) for shape in module_shapes for features in shape)


def pack_tiles(
    ranks: Mapping[Key, int],
    num_layers: int,
    module_shapes: Sequence[tuple[int, int]],
    parts: Sequence[Part] = (),
) -> PageLayout:
    """Lay an adapter out: its parts, then its tiles by layer, page, fused group, A before B. No
    tile, and no row of a part, crosses a frame.

    ranks: rank of each adapted (layer, module), all >= 1; may be empty, then there are no pages.
    """
    frame = frame_elements(module_shapes)
    num_pages = -(-max(ranks.values(), default=0) // PAGE_RANKS)
    shape = (num_pages, num_layers, len(module_shapes))
    offsets = np.full((2, *shape), -1, dtype=np.int64)
    live_ranks = np.zeros(shape, dtype=np.int32)
    for (layer, module), rank in ranks.items():
        for page in range(-(-rank // PAGE_RANKS)):
            live_ranks[page, layer, module] = min(rank - page * PAGE_RANKS, PAGE_RANKS)
    places, cursor = _pack_parts(parts, frame)
    last_frames = []
    for layer in range(num_layers):
        for page in range(num_pages):
            for group in FUSED_GROUPS:
                for side in (0, 1):
                    for module in group:
                        if live_ranks[page, layer, module] == 0:
                            continue
                        size = _tile_elements(module_shapes[module][side])
                        if cursor % frame + size > frame:
                            cursor += frame - cursor % frame
                        offsets[side, page, layer, module] = cursor
                        cursor += size
        last_frames.append(-(-cursor // frame) - 1)
    num_image_frames = -(-cursor // frame)
    return PageLayout(
        num_pages=num_pages,
        num_frames=max(num_image_frames, num_pages),
        num_image_frames=num_image_frames,
        offset_a=offsets[0],
        offset_b=offsets[1],
        live_ranks=live_ranks,
        last_frames=tuple(last_frames),
        parts=places,
    )


def _pack_parts(parts: Sequence[Part], frame: int) -> tuple[tuple[PartPlace, ...], int]:
    """Their places, and the first element behind them. What fits no frame's rest begins a frame, so
    that all its pieces but the last hold equally many rows.
    """
    places = []
    cursor = 0
    for part in parts:
        assert 0 < part.row_elements <= frame, f"a row of {part.name} exceeds a frame"
        if part.rows * part.row_elements > -cursor % frame:
            cursor += -cursor % frame
        rows_per_piece = min(part.rows, frame // part.row_elements)
        num_pieces = -(-part.rows // rows_per_piece)
        places.append(
            PartPlace(part, rows_per_piece, tuple(cursor + i * frame for i in range(num_pieces)))
        )
        rest = part.rows - (num_pieces - 1) * rows_per_piece
        cursor = places[-1].offsets[-1] + _aligned(rest * part.row_elements)
    return tuple(places), cursor


def _tile_elements(features: int) -> int:
    return _aligned(PAGE_RANKS * features)


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT
