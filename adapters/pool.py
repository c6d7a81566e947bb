"""Device memory of the resident adapters: pages of 16 ranks, cut into tiles, packed into frames.

A *page* is 16 ranks of one adapter. For each module it adapts in each layer it has two tiles: A
`[16, in]` and B transposed `[16, out]`. Tiles are packed one after the other into *frames* of one
size, so any free frame serves any adapter and memory never fragments. A frame holds exactly one
page of one layer with every module adapted: such adapters waste nothing.

The tables say where each tile lies; `kernels.ops.PageTables` is made of the same tensors. This
module knows nothing about files, requests or kernels.

Threads: `copy` may run in a loader thread, since nobody reads frames that are not published;
everything else belongs to the engine's thread, between steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.weights import LoadedAdapter

PAGE_RANKS = 16
ALIGNMENT = 64  # elements: 128 bytes in bf16, a whole number of cache lines
FUSED_GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))  # modules whose tiles of one kind lie side by side

Key = tuple[int, int]  # layer, module


@dataclass(frozen=True, slots=True, eq=False)
class PageLayout:
    """Where an adapter's tiles lie in its own image, before it has frames.

    offset_a, offset_b: `[num_pages, num_layers, num_modules]` int64 elements, -1 = not adapted.
    num_frames: frames to reserve; at least one per page, so that page numbers never run out first.
    """

    num_pages: int
    num_frames: int
    num_elements: int
    offset_a: np.ndarray[tuple[int, int, int], np.dtype[np.int64]]
    offset_b: np.ndarray[tuple[int, int, int], np.dtype[np.int64]]
    live_ranks: np.ndarray[tuple[int, int, int], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True, eq=False)
class PageImage:
    """An adapter in the byte layout of the pool, on the host: installing it is a few copies."""

    layout: PageLayout
    data: Tensor  # [num_elements] model dtype
    scaling: np.ndarray[tuple[int, int], np.dtype[np.float32]]  # [num_layers, num_modules]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


@dataclass(slots=True, eq=False)
class _Resident:
    frames: list[int]  # in the order of the image
    layout: PageLayout
    pages: list[int]
    published: bool = False


class PagePool:
    """module_shapes: (in_features, out_features) of the modules of a layer, in table order.

    Raises: AdapterError(code="adapter_memory") when `num_bytes` does not hold a single frame.
    """

    def __init__(
        self,
        num_layers: int,
        module_shapes: Sequence[tuple[int, int]],
        num_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_layers = num_layers
        self.module_shapes = tuple(module_shapes)
        self.dtype = dtype
        self.frame_elements = frame_elements(module_shapes)
        self.frame_bytes = self.frame_elements * dtype.itemsize
        self.num_frames = num_bytes // self.frame_bytes
        if self.num_frames == 0:
            raise AdapterError(
                f"{num_bytes:,} bytes of adapter memory hold no adapter of this model: one frame "
                f"takes {self.frame_bytes:,}; raise --adapter-memory",
                code="adapter_memory",
            )
        self.num_pages = self.num_frames
        # Not touched, so on a CPU it costs memory only where adapters come to lie.
        self.arena = torch.empty(self.num_frames * self.frame_elements, dtype=dtype, device=device)
        shape = (self.num_pages, num_layers, len(self.module_shapes))
        self.offset_a = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.offset_b = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.live_ranks = torch.zeros(shape, dtype=torch.int32, device=device)
        self.scaling = torch.zeros(shape, dtype=torch.float32, device=device)
        self.version = 0  # grows with every change of the tables
        self._free_frames = list(range(self.num_frames))  # heaps: low numbers first
        self._free_pages = list(range(self.num_pages))
        self._residents: dict[str, _Resident] = {}

    # --- sizes

    @property
    def page_bytes(self) -> int:
        """One page that adapts every module of every layer."""
        return self.num_layers * self.frame_bytes

    @property
    def bytes_total(self) -> int:
        return self.num_frames * self.frame_bytes

    @property
    def bytes_used(self) -> int:
        return self.bytes_total - len(self._free_frames) * self.frame_bytes

    def layout(self, ranks: Mapping[Key, int]) -> PageLayout:
        """Pack the tiles of an adapter. ranks: rank of each adapted (layer, module), all >= 1."""
        return pack_tiles(ranks, self.num_layers, self.module_shapes)

    def device_bytes(self, layout: PageLayout) -> int:
        return layout.num_frames * self.frame_bytes

    def host_bytes(self, layout: PageLayout) -> int:
        return layout.num_elements * self.dtype.itemsize

    # --- images

    def build_image(self, loaded: LoadedAdapter) -> PageImage:
        """Bring loaded weights into the pool's layout. Runs anywhere; touches no pool state."""
        layout = self.layout({key: module.rank for key, module in loaded.modules.items()})
        data = torch.zeros(layout.num_elements, dtype=self.dtype)
        scaling = np.zeros((self.num_layers, len(self.module_shapes)), dtype=np.float32)
        for (layer, kind), module in loaded.modules.items():
            scaling[layer, kind] = module.scaling
            for page in range(-(-module.rank // PAGE_RANKS)):
                rows = slice(page * PAGE_RANKS, min((page + 1) * PAGE_RANKS, module.rank))
                for weight, offsets in (
                    (module.a, layout.offset_a),
                    (module.bt, layout.offset_b),
                ):
                    tile = weight[rows]
                    start = int(offsets[page, layer, kind])
                    data[start : start + tile.numel()].view_as(tile).copy_(tile)
        return PageImage(layout, data, scaling)

    # --- residence

    def reserve(self, digest: str, layout: PageLayout) -> None:
        """Take frames and pages for an adapter. Kernels do not see it before `publish`.

        Raises: AdapterError(code="adapter_memory") when there are not enough.
        """
        assert digest not in self._residents, f"{digest} has pages already"
        if layout.num_frames > len(self._free_frames):
            raise AdapterError(
                f"adapter {digest[:12]} needs {self.device_bytes(layout):,} bytes of adapter "
                f"memory, {self.bytes_total - self.bytes_used:,} of {self.bytes_total:,} are free; "
                "evict adapters or raise --adapter-memory",
                code="adapter_memory",
            )
        frames = [heapq.heappop(self._free_frames) for _ in range(layout.num_frames)]
        pages = [heapq.heappop(self._free_pages) for _ in range(layout.num_pages)]
        self._residents[digest] = _Resident(frames, layout, pages)

    def copy(self, digest: str, image: PageImage) -> None:
        """Write an image into the adapter's reserved frames."""
        resident = self._residents[digest]
        assert not resident.published, f"{digest} is in use"
        for frame, start, size in _runs(
            resident.frames, self.frame_elements, image.layout.num_elements
        ):
            target = frame * self.frame_elements
            self.arena[target : target + size].copy_(image.data[start : start + size])

    def publish(self, digest: str, image: PageImage) -> list[int]:
        """Enter the adapter's pages in the tables; from now on kernels may use them."""
        resident = self._residents[digest]
        layout = image.layout
        frames = np.asarray(resident.frames, dtype=np.int64)

        def placed(offsets: np.ndarray[tuple[int, int, int], np.dtype[np.int64]]) -> Tensor:
            at = np.maximum(offsets, 0)
            absolute = frames[at // self.frame_elements] * self.frame_elements
            absolute += at % self.frame_elements
            return torch.from_numpy(np.where(offsets < 0, -1, absolute))

        pages = torch.tensor(resident.pages)
        scaling = np.where(layout.live_ranks > 0, image.scaling, np.float32(0))
        device = self.arena.device
        self.offset_a[pages] = placed(layout.offset_a).to(device)
        self.offset_b[pages] = placed(layout.offset_b).to(device)
        self.live_ranks[pages] = torch.from_numpy(layout.live_ranks).to(device)
        self.scaling[pages] = torch.from_numpy(scaling).to(device)
        resident.published = True
        self.version += 1
        return list(resident.pages)

    def install(self, digest: str, image: PageImage) -> list[int]:
        """`reserve`, `copy` and `publish` in one go; returns the page numbers."""
        self.reserve(digest, image.layout)
        self.copy(digest, image)
        return self.publish(digest, image)

    def remove(self, digest: str) -> int:
        """Give an adapter's frames back, published or only reserved; returns the bytes freed."""
        resident = self._residents.pop(digest)
        if resident.published:
            pages = torch.tensor(resident.pages)
            self.offset_a[pages] = -1
            self.offset_b[pages] = -1
            self.live_ranks[pages] = 0
            self.scaling[pages] = 0.0
            self.version += 1
        for frame in resident.frames:
            heapq.heappush(self._free_frames, frame)
        for page in resident.pages:
            heapq.heappush(self._free_pages, page)
        return len(resident.frames) * self.frame_bytes

    def __contains__(self, digest: str) -> bool:
        """Published, that is: usable by kernels."""
        resident = self._residents.get(digest)
        return resident is not None and resident.published

    def holds(self, digest: str) -> bool:
        """It has frames, whether published or still being copied."""
        return digest in self._residents

    def pages(self, digest: str) -> list[int]:
        resident = self._residents[digest]
        assert resident.published, f"{digest} is still loading"
        return resident.pages

    def adapted(self, digest: str) -> frozenset[Key]:
        """The (layer, module) pairs an adapter changes."""
        layers, modules = np.nonzero(self._residents[digest].layout.live_ranks[0])
        return frozenset(zip(layers.tolist(), modules.tolist(), strict=True))

    def check_invariants(self) -> None:
        """Every frame and page has one owner, every tile lies inside its owner's frames, alone."""
        held = [frame for r in self._residents.values() for frame in r.frames]
        assert sorted(held + self._free_frames) == list(range(self.num_frames)), "frames"
        paged = [page for r in self._residents.values() for page in r.pages]
        assert sorted(paged + self._free_pages) == list(range(self.num_pages)), "pages"
        assert self.bytes_used == len(held) * self.frame_bytes
        live = {p for r in self._residents.values() if r.published for p in r.pages}
        dead = torch.tensor([p for p in range(self.num_pages) if p not in live], dtype=torch.int64)
        assert bool((self.offset_a[dead] == -1).all() and (self.offset_b[dead] == -1).all())
        assert not self.live_ranks[dead].any()
        assert not self.scaling[dead].any()
        for digest, resident in self._residents.items():
            if not resident.published:
                continue
            owned, spans = set(resident.frames), []
            for table, side in ((self.offset_a, 0), (self.offset_b, 1)):
                offsets = table[resident.pages]
                adapted = self.live_ranks[resident.pages] > 0
                assert torch.equal(offsets >= 0, adapted), f"{digest}: tiles and ranks differ"
                for page, layer, module in adapted.nonzero().tolist():
                    start = int(offsets[page, layer, module])
                    end = start + PAGE_RANKS * self.module_shapes[module][side]
                    assert start // self.frame_elements in owned, f"{digest}: a stray tile"
                    assert (end - 1) // self.frame_elements == start // self.frame_elements
                    spans.append((start, end))
            spans.sort()
            for (_, end), (start, _) in pairwise(spans):
                assert end <= start, f"{digest}: tiles overlap"


def frame_elements(module_shapes: Sequence[tuple[int, int]]) -> int:
    """Elements of a frame: one page of one layer with every module adapted."""
    return sum(_tile_elements(features) for shape in module_shapes for features in shape)


def pack_tiles(
    ranks: Mapping[Key, int], num_layers: int, module_shapes: Sequence[tuple[int, int]]
) -> PageLayout:
    """Lay an adapter's tiles out: by layer, page, fused group, A before B; none crosses a frame."""
    frame = frame_elements(module_shapes)
    num_pages = -(-max(ranks.values()) // PAGE_RANKS)
    shape = (num_pages, num_layers, len(module_shapes))
    offsets = np.full((2, *shape), -1, dtype=np.int64)
    live_ranks = np.zeros(shape, dtype=np.int32)
    for (layer, module), rank in ranks.items():
        for page in range(-(-rank // PAGE_RANKS)):
            live_ranks[page, layer, module] = min(rank - page * PAGE_RANKS, PAGE_RANKS)
    cursor = 0
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
    return PageLayout(
        num_pages=num_pages,
        num_frames=max(-(-cursor // frame), num_pages),
        num_elements=cursor,
        offset_a=offsets[0],
        offset_b=offsets[1],
        live_ranks=live_ranks,
    )


def _tile_elements(features: int) -> int:
    return -(-PAGE_RANKS * features // ALIGNMENT) * ALIGNMENT


def _runs(frames: list[int], frame: int, num_elements: int) -> Iterator[tuple[int, int, int]]:
    """Neighbouring frames together: (first frame, offset in the image, elements)."""
    first = 0
    while first * frame < num_elements:
        last = first + 1
        while last < len(frames) and frames[last] == frames[last - 1] + 1:
            last += 1
        yield frames[first], first * frame, min(last * frame, num_elements) - first * frame
        first = last
