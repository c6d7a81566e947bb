"""What is read is what was written, or nothing: damage is a miss, never other weights."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from loraplex.adapters.page_file import BLOCK, PageFile
from loraplex.adapters.page_image import PageImage
from loraplex.adapters.page_layout import PageLayout, Part, frame_elements, pack_tiles

SHAPES = ((48, 64), (48, 32), (48, 32), (64, 48), (48, 96), (48, 96), (96, 48))
LAYERS = 3


def layout(rank: int = 20) -> PageLayout:
    return pack_tiles({(i, m): rank for i in range(LAYERS) for m in range(7)}, LAYERS, SHAPES)


def frames(of: PageLayout, dtype: torch.dtype) -> list[Tensor]:
    data = torch.randn(of.num_image_frames, frame_elements(SHAPES))
    return list(data.to(dtype))


def image(dtype: torch.dtype = torch.bfloat16) -> PageImage:
    of = layout()
    scaling = np.random.default_rng(0).random((LAYERS, 7)).astype(np.float32)
    return PageImage(of, frames(of, dtype), scaling)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_comes_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    file, written = PageFile(LAYERS, SHAPES, dtype), image(dtype)
    assert file.read(tmp_path, written.layout, frames(written.layout, dtype)) is None
    assert file.write(tmp_path, written)
    into = frames(written.layout, dtype)
    read = file.read(tmp_path, written.layout, into)
    assert read is not None
    assert np.array_equal(read.scaling, written.scaling)
    for a, b, c in zip(read.frames, written.frames, into, strict=True):
        assert a is c
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert [p.name for p in tmp_path.iterdir()] == [file.path(tmp_path).name]


def test_another_model_or_dtype_has_a_file_of_its_own(tmp_path: Path) -> None:
    files = [
        PageFile(LAYERS, SHAPES, torch.bfloat16),
        PageFile(LAYERS, SHAPES, torch.float16),
        PageFile(LAYERS + 1, SHAPES, torch.bfloat16),
        PageFile(LAYERS, SHAPES[::-1], torch.bfloat16),
    ]
    assert len({file.path(tmp_path) for file in files}) == 4
    assert files[0].write(tmp_path, image())
    os.rename(files[0].path(tmp_path), files[1].path(tmp_path))  # not fooled by the name
    assert files[1].read(tmp_path, layout(), frames(layout(), torch.float16)) is None


def test_an_image_with_parts_belongs_to_the_weights_it_was_computed_with(tmp_path: Path) -> None:
    """One of A and B alone does not: it serves every model of its layout."""
    parts = [Part(("shift", 0, 0), 1, 64)]
    ranks = {(0, 0): 4}
    for wanted in ([], parts):
        of = pack_tiles(ranks, LAYERS, SHAPES, wanted)
        scaling = np.ones((LAYERS, 7), dtype=np.float32)
        one, other = (PageFile(LAYERS, SHAPES, torch.bfloat16, base) for base in ("one", "other"))
        assert one.write(tmp_path, PageImage(of, frames(of, torch.bfloat16), scaling))
        assert one.read(tmp_path, of, frames(of, torch.bfloat16)) is not None
        read = other.read(tmp_path, of, frames(of, torch.bfloat16))
        assert (read is None) == bool(wanted)


def test_another_adapters_file_is_a_miss(tmp_path: Path) -> None:
    file, written = PageFile(LAYERS, SHAPES, torch.bfloat16), image()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert file.write(tmp_path / "one", written)
    file.path(tmp_path / "one").rename(file.path(tmp_path / "two"))
    into = frames(written.layout, torch.bfloat16)
    assert file.read(tmp_path / "two", written.layout, into) is None


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    file, written = PageFile(LAYERS, SHAPES, torch.bfloat16), image()
    assert file.write(tmp_path, written)
    path = file.path(tmp_path)
    good = path.read_bytes()
    used = len(good[:BLOCK].rstrip(b"\0"))
    chooser = random.Random(0)
    places = [*range(24), *chooser.sample(range(24, used), 60)]
    places += chooser.sample(range(BLOCK, len(good)), 200)
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << chooser.randrange(8)
        path.write_bytes(bad)
        read = file.read(tmp_path, written.layout, frames(written.layout, torch.bfloat16))
        assert read is None, f"byte {place} was flipped and nobody noticed"
    path.write_bytes(good)
    assert file.read(tmp_path, written.layout, frames(written.layout, torch.bfloat16)) is not None


@pytest.mark.parametrize("length", [0, 7, 100, BLOCK, BLOCK + 1, -1, -4096])
def test_a_cut_file_is_a_miss(tmp_path: Path, length: int) -> None:
    file, written = PageFile(LAYERS, SHAPES, torch.bfloat16), image()
    assert file.write(tmp_path, written)
    path = file.path(tmp_path)
    os.truncate(path, length if length >= 0 else path.stat().st_size + length)
    assert file.read(tmp_path, written.layout, frames(written.layout, torch.bfloat16)) is None


def test_swapped_blocks_are_found(tmp_path: Path) -> None:
    file, written = PageFile(LAYERS, SHAPES, torch.bfloat16), image()
    assert file.write(tmp_path, written)
    path = file.path(tmp_path)
    data = bytearray(path.read_bytes())
    one, two = BLOCK, BLOCK + 4096
    data[one : one + 4096], data[two : two + 4096] = (
        data[two : two + 4096],
        data[one : one + 4096],
    )
    path.write_bytes(data)
    assert file.read(tmp_path, written.layout, frames(written.layout, torch.bfloat16)) is None


def test_a_disk_that_refuses_is_no_error(tmp_path: Path) -> None:
    file, written = PageFile(LAYERS, SHAPES, torch.bfloat16), image()
    assert not file.write(tmp_path / "gone", written)
    full = Path("/dev/full")
    if full.exists():
        part = file.path(tmp_path).with_suffix(".part")
        part.symlink_to(full)
        assert not file.write(tmp_path, written)
        assert not list(tmp_path.iterdir())
