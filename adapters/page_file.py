"""An adapter's page image as a file beside its weights, so that loading it is one sequential read.

The file is a cache: derived from the weights for one model's layout (an image with more than A and
B: for one model's weights), checked when read, rebuilt when missing or damaged, and removed with
the adapter's folder. It holds a header of whole blocks, then the image's frames one after the
other.

    header  magic, length and checksum of what follows: the layout's key, the adapter's digest (its
            folder's name), a checksum per frame, the scaling table
    frame   `frame_elements` of the model's dtype

The checksum is of sums over rows and columns of 4 KiB rows: it finds flipped bits, cut ends and
blocks in the wrong place at memory speed, which a cryptographic hash would not. It guards against
disks, not against people: who may write here may change the weights as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.page_image import PageImage
from loraplex.adapters.page_layout import ALIGNMENT, PAGE_RANKS, PageLayout
from loraplex.adapters.residency import Phase

FORMAT = 1
PARTS_FORMAT = 1  # of images with parts: what they hold, and how it is computed
BLOCK = 4096
_MAGIC = b"LPXPAGES"
_PREFIX = 8 + 8 + 32  # magic, length, sha256
_MAX_HEADER = 1 << 24
_ROW = 512  # int64 words
_MAX_BUFFERS = 512  # of one preadv or pwritev; systems allow 1024


class PageFile:
    """The page image of adapters under one model's layout.

    base: names the base model's weights, which an image with parts (`extras_parts.py`) was computed
    against; images of A and B alone are the same for all models of this layout.
    """

    def __init__(
        self,
        num_layers: int,
        module_shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        base: str = "",
    ) -> None:
        self._table = (num_layers, len(module_shapes))
        layout = [FORMAT, num_layers, list(module_shapes), str(dtype), PAGE_RANKS, ALIGNMENT]
        self._keys = {False: _hashed(layout), True: _hashed([*layout, PARTS_FORMAT, base])}

    def path(self, folder: Path, *, with_parts: bool = False) -> Path:
        """folder: the adapter's, in the store."""
        return folder / f"pages-{self._keys[with_parts]}.bin"

    def read(
        self,
        folder: Path,
        layout: PageLayout,
        frames: list[Tensor],
        lap: Callable[[Phase], None] = lambda phase: None,
    ) -> PageImage | None:
        """Fill `frames` from the file; None if there is none, or none that can be trusted.

        lap: told of each phase that ends.
        """
        with_parts = bool(layout.parts)
        path, key = self.path(folder, with_parts=with_parts), self._keys[with_parts]
        try:
            with path.open("rb", buffering=0) as file:
                found = _read_header(file.fileno())
                if found is None:
                    return None
                header, start = found
                if (header["key"], header["adapter"]) != (key, folder.name):
                    return None
                if not _transfer(os.preadv, file.fileno(), start, frames):
                    return None
            lap(Phase.READ)
            is_whole = header["frames"] == [_checksum(frame) for frame in frames]
            lap(Phase.VERIFY)
            if not is_whole:
                return None
            scaling = np.frombuffer(bytes.fromhex(header["scaling"]), dtype=np.float32)
            return PageImage(layout, frames, scaling.reshape(self._table))
        except (OSError, ValueError, KeyError, TypeError):  # no file, or not one we wrote
            return None

    def write(self, folder: Path, image: PageImage) -> bool:
        """Write the file, atomically; False if the disk does not take it. The folder must exist."""
        with_parts = bool(image.layout.parts)
        header = {
            "key": self._keys[with_parts],
            "adapter": folder.name,
            "frames": [_checksum(frame) for frame in image.frames],
            "scaling": image.scaling.tobytes().hex(),
        }
        body = json.dumps(header, separators=(",", ":")).encode()
        head = _MAGIC + len(body).to_bytes(8, "little") + hashlib.sha256(body).digest() + body
        start = -(-len(head) // BLOCK) * BLOCK
        target = self.path(folder, with_parts=with_parts)
        # Two engines may write it at once: the same bytes, so neither harms the other.
        part = target.with_suffix(".part")
        try:
            with part.open("wb", buffering=0) as file:
                os.pwrite(file.fileno(), head.ljust(start, b"\0"), 0)
                if not _transfer(os.pwritev, file.fileno(), start, image.frames):
                    raise OSError("short write")
            part.rename(target)
        except OSError:
            with suppress(OSError):
                part.unlink()
            return False
        return True


def _hashed(key: list[object]) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def _read_header(fd: int) -> tuple[dict[str, Any], int] | None:
    """The header and the offset of the frames."""
    first = os.pread(fd, BLOCK, 0)
    length = int.from_bytes(first[8:16], "little")
    if first[:8] != _MAGIC or length > _MAX_HEADER:
        return None
    start = -(-(_PREFIX + length) // BLOCK) * BLOCK
    body = (first + os.pread(fd, start - BLOCK, BLOCK))[_PREFIX : _PREFIX + length]
    if hashlib.sha256(body).digest() != first[16:_PREFIX]:
        return None
    header: dict[str, Any] = json.loads(body)
    return header, start


def _transfer(
    call: Callable[[int, list[memoryview], int], int], fd: int, offset: int, frames: list[Tensor]
) -> bool:
    """preadv or pwritev of whole frames; False at the end of the file."""
    views = [_bytes(frame).data for frame in frames]
    while views:
        some = views[:_MAX_BUFFERS]
        moved = call(fd, some, offset)
        if moved == 0:
            return False
        offset += moved
        while moved and moved >= len(views[0]):
            moved -= len(views.pop(0))
        if moved:
            views[0] = views[0][moved:]
    return True


def _bytes(frame: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return frame.view(torch.uint8).numpy()


def _checksum(frame: Tensor) -> str:
    data = _bytes(frame)
    whole = len(data) // (8 * _ROW) * (8 * _ROW)
    rows = data[:whole].view(np.int64).reshape(-1, _ROW)
    sha = hashlib.sha256(data[whole:].tobytes())
    sha.update(rows.sum(axis=0).tobytes())
    sha.update(rows.sum(axis=1).tobytes())
    return sha.hexdigest()[:16]
