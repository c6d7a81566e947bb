"""Device memory of the resident adapters: which frames and pages are whose, and the page tables.

The tables say where each tile lies; `kernels.ops.PageTables` is made of the same tensors. How an
adapter is cut into tiles is `page_layout.py`'s, who holds which frames `frames.py`'s, how its bytes
travel `transport.py`'s. This module knows nothing about files, requests or kernels.

Threads: `copy` may run in a loader thread, since nobody reads frames that are not published;
everything else belongs to the engine's thread, between steps.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.extras_parts import NO_EXTRAS, DeviceExtras, ExtrasShape
from loraplex.adapters.frames import Frames
from loraplex.adapters.page_image import NO_PARTS, PageImage, Parts, build_image, plain_frames
from loraplex.adapters.page_layout import (
    PAGE_RANKS,
    Key,
    Offsets,
    PageLayout,
    frame_elements,
    pack_tiles,
)
from loraplex.adapters.transport import Arrival, transport_to
from loraplex.adapters.weights import LoadedAdapter


@dataclass(slots=True, eq=False)
class _Resident:
    frames: list[int]  # in the order of the image
    layout: PageLayout
    pages: list[int]
    arrival: Arrival | None  # None: its bytes are there when `copy` returns
    published: bool = False
    extras: DeviceExtras | None = None  # once published, if it has any


@dataclass(frozen=True, slots=True)
class SharedArena:
    """Address space for frames whose memory is traded with the KV cache by superblocks; a
    superblock begins at a multiple of `superblock_bytes` and ends with what holds no frame.

    memory: `[num_superblocks * superblock_bytes]` uint8; behind the first `num_owned` is memory.
    """

    memory: Tensor
    superblock_bytes: int
    num_owned: int


class PagePool:
    """module_shapes: (in_features, out_features) of the modules of a layer, in table order.
    shared: instead of an arena of `num_bytes` of its own.

    Raises: AdapterError(code="adapter_memory") when `num_bytes` does not hold a single frame.
    """

    def __init__(
        self,
        num_layers: int,
        module_shapes: Sequence[tuple[int, int]],
        num_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        shared: SharedArena | None = None,
    ) -> None:
        self.num_layers = num_layers
        self.module_shapes = tuple(module_shapes)
        self.dtype = dtype
        self.frame_elements = frame_elements(module_shapes)
        self.frame_bytes = self.frame_elements * dtype.itemsize
        unit = num_bytes if shared is None else shared.superblock_bytes
        if unit < self.frame_bytes:
            raise AdapterError(
                f"{num_bytes:,} bytes of adapter memory hold no adapter of this model: one frame "
                f"takes {self.frame_bytes:,}; raise --adapter-memory",
                code="adapter_memory",
            )
        if shared is None:
            num_elements = unit // self.frame_bytes * self.frame_elements
            # Not touched, so on a CPU it costs memory only where adapters come to lie.
            self.arena = torch.empty(num_elements, dtype=dtype, device=device)
            self.frames = Frames(1, unit // self.frame_bytes, 1)
        else:
            self.arena = shared.memory.view(dtype)
            num_superblocks = shared.memory.nbytes // unit
            self.frames = Frames(num_superblocks, unit // self.frame_bytes, shared.num_owned)
        self._superblock_elements = unit // dtype.itemsize
        self.num_pages = len(self.frames.superblocks) * self.frames.frames_per_superblock
        shape = (self.num_pages, num_layers, len(self.module_shapes))
        self.offset_a = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.offset_b = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.live_ranks = torch.zeros(shape, dtype=torch.int32, device=device)
        self.scaling = torch.zeros(shape, dtype=torch.float32, device=device)
        self._transport = transport_to(device)
        self.version = 0  # grows with every change of the tables
        self._free_pages = list(range(self.num_pages))  # a heap: low numbers first
        self._residents: dict[str, _Resident] = {}
        self._unfinished: list[tuple[list[int], Arrival]] = []  # removed while bytes still came
        self._num_with_extras = 0

    # --- sizes

    @property
    def page_bytes(self) -> int:
        """One page that adapts every module of every layer."""
        return self.num_layers * self.frame_bytes

    @property
    def bytes_total(self) -> int:
        return self.frames.num_owned * self.frame_bytes

    @property
    def bytes_max(self) -> int:
        """If the KV cache gave all that it may give."""
        return self.num_pages * self.frame_bytes

    @property
    def bytes_used(self) -> int:
        return self.bytes_total - self.frames.num_free * self.frame_bytes

    def layout(self, ranks: Mapping[Key, int], extras: ExtrasShape = NO_EXTRAS) -> PageLayout:
        """Pack an adapter. ranks: rank of each adapted (layer, module), all >= 1."""
        parts = extras.parts(self.module_shapes, self.dtype)
        return pack_tiles(ranks, self.num_layers, self.module_shapes, parts)

    def device_bytes(self, layout: PageLayout) -> int:
        return layout.num_frames * self.frame_bytes

    def host_bytes(self, layout: PageLayout) -> int:
        return layout.num_image_frames * self.frame_bytes

    # --- images

    def build_image(
        self,
        loaded: LoadedAdapter,
        frames: Sequence[Tensor] | None = None,
        parts: Parts = NO_PARTS,
    ) -> PageImage:
        """Bring loaded weights into the pool's layout. Runs anywhere; touches no pool state.

        frames: host memory to fill, `num_image_frames` of it; None for memory of its own.
        parts: of its extras (`extras_parts.Prepared`).
        """
        ranks = {key: module.rank for key, module in loaded.modules.items()}
        layout = self.layout(ranks, ExtrasShape.of(loaded.extras))
        if frames is None:
            frames = plain_frames(layout, self.frame_elements, self.dtype)
        return build_image(loaded, layout, frames, len(self.module_shapes), parts)

    # --- residence

    def reserve(self, digest: str, layout: PageLayout) -> None:
        """Take frames and pages for an adapter. Kernels do not see it before `publish`.

        Raises: AdapterError(code="adapter_memory") when there are not enough.
        """
        assert digest not in self._residents, f"{digest} has pages already"
        if layout.num_frames > self.frames.num_free:
            raise AdapterError(
                f"adapter {digest[:12]} needs {self.device_bytes(layout):,} bytes of adapter "
                f"memory, {self.bytes_total - self.bytes_used:,} of {self.bytes_total:,} are free; "
                "evict adapters or raise --adapter-memory",
                code="adapter_memory",
            )
        frames = self.frames.take(digest, layout.num_frames)
        pages = [heapq.heappop(self._free_pages) for _ in range(layout.num_pages)]
        arrival = self._transport.expect(self.num_layers)
        self._residents[digest] = _Resident(frames, layout, pages, arrival)

    def copy(
        self, digest: str, image: PageImage, on_head_start: Callable[[], None] = lambda: None
    ) -> None:
        """Write an image into the adapter's reserved frames; in order, so that layers arrive in
        order. on_head_start: called when so much has landed that it may be published.
        """
        resident = self._residents[digest]
        assert not resident.published, f"{digest} is in use"
        starts = self._starts(resident.frames).tolist()
        targets = [self.arena[start : start + self.frame_elements] for start in starts]
        copies = list(zip(targets, image.frames, strict=False))
        self._transport.send(resident.arrival, copies, image.layout.last_frames, on_head_start)

    def publish(self, digest: str, image: PageImage) -> list[int]:
        """Enter the adapter's pages in the tables; from now on kernels may use them."""
        resident = self._residents[digest]
        layout = image.layout
        starts = self._starts(resident.frames)

        def placed(offsets: Offsets) -> Tensor:
            at = np.maximum(offsets, 0)
            absolute = starts[at // self.frame_elements] + at % self.frame_elements
            return torch.from_numpy(np.where(offsets < 0, -1, absolute))

        scaling = np.where(layout.live_ranks > 0, image.scaling, np.float32(0))
        self._write_tables(
            resident.pages,
            placed(layout.offset_a),
            placed(layout.offset_b),
            torch.from_numpy(layout.live_ranks),
            torch.from_numpy(scaling),
        )
        if layout.parts:
            size = self.frame_elements
            resident.extras = DeviceExtras.find(
                layout.parts,
                self.arena,
                lambda at: int(starts[at // size]) + at % size,
                self._transport.upload,
            )
            self._num_with_extras += 1
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
            shape = (len(resident.pages), *self.offset_a.shape[1:])
            nowhere = torch.full(shape, -1, dtype=torch.int64)
            nothing = torch.zeros(shape, dtype=torch.int32)
            self._write_tables(resident.pages, nowhere, nowhere, nothing, nothing.float())
            self.version += 1
        if resident.extras is not None:
            self._num_with_extras -= 1
        self.frames.give_back(digest, resident.frames)
        if resident.arrival is not None and not resident.arrival.is_complete:
            self._unfinished.append((resident.frames, resident.arrival))
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
        layers, modules = np.nonzero(self._residents[digest].layout.live_ranks.any(axis=0))
        return frozenset(zip(layers.tolist(), modules.tolist(), strict=True))

    @property
    def has_extras(self) -> bool:
        """Some published adapter has."""
        return self._num_with_extras > 0

    def extras(self, digest: str) -> DeviceExtras | None:
        """What a published adapter has beyond its pages."""
        return self._residents[digest].extras

    def arriving(self, digests: Iterable[str]) -> tuple[Arrival, ...]:
        """Of these published adapters, the arrivals not complete: a step has to wait, by layer."""
        arrivals = (self._residents[digest].arrival for digest in digests)
        return tuple(a for a in arrivals if a is not None and not a.is_complete)

    # --- trading

    def superblock(self, superblock: int) -> Tensor:
        """Its memory: `[superblock_bytes]`, in elements."""
        size = self._superblock_elements
        return self.arena[superblock * size : (superblock + 1) * size]

    def is_quiet(self, superblock: int) -> bool:
        """No copy into frames that were given back is still under way in it."""
        self._unfinished = [(f, a) for f, a in self._unfinished if not a.is_complete]
        inside = self.frames.frames_of(superblock)
        return not any(frame in inside for frames, _ in self._unfinished for frame in frames)

    # --- inside

    def _starts(self, frames: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Element offsets in the arena."""
        size = self.frames.frames_per_superblock
        starts = [
            frame // size * self._superblock_elements + frame % size * self.frame_elements
            for frame in frames
        ]
        return np.array(starts, dtype=np.int64)

    def _write_tables(
        self,
        pages: list[int],
        offset_a: Tensor,
        offset_b: Tensor,
        live_ranks: Tensor,
        scaling: Tensor,
    ) -> None:
        if not pages:
            return
        upload = self._transport.upload
        rows = upload(torch.tensor(pages))
        self.offset_a.index_copy_(0, rows, upload(offset_a))
        self.offset_b.index_copy_(0, rows, upload(offset_b))
        self.live_ranks.index_copy_(0, rows, upload(live_ranks))
        self.scaling.index_copy_(0, rows, upload(scaling))

    def check_invariants(self) -> None:
        """Every frame and page has one owner, every tile lies inside its owner's frames, alone."""
        self.frames.check_invariants({d: r.frames for d, r in self._residents.items()})
        paged = [page for r in self._residents.values() for page in r.pages]
        assert sorted(paged + self._free_pages) == list(range(self.num_pages)), "pages"
        held = sum(len(resident.frames) for resident in self._residents.values())
        assert self.bytes_used == held * self.frame_bytes
        live = {p for r in self._residents.values() if r.published for p in r.pages}
        dead = torch.tensor([p for p in range(self.num_pages) if p not in live], dtype=torch.int64)
        assert bool((self.offset_a[dead] == -1).all() and (self.offset_b[dead] == -1).all())
        assert not self.live_ranks[dead].any()
        assert not self.scaling[dead].any()
        for digest, resident in self._residents.items():
            if not resident.published:
                continue
            frames, spans = sorted(self._starts(resident.frames).tolist()), []
            for table, side in ((self.offset_a, 0), (self.offset_b, 1)):
                offsets = table[resident.pages]
                adapted = self.live_ranks[resident.pages] > 0
                assert torch.equal(offsets >= 0, adapted), f"{digest}: tiles and ranks differ"
                for page, layer, module in adapted.nonzero().tolist():
                    start = int(offsets[page, layer, module])
                    end = start + PAGE_RANKS * self.module_shapes[module][side]
                    before = bisect_right(frames, start)
                    assert before > 0, f"{digest}: a stray tile"
                    assert end <= frames[before - 1] + self.frame_elements, f"{digest}: stray"
                    spans.append((start, end))
            spans.sort()
            for (_, end), (start, _) in pairwise(spans):
                assert end <= start, f"{digest}: tiles overlap"
