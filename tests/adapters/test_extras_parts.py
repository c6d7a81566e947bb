"""What an adapter has beyond A and B, in frames: where it lies, and that it comes back whole."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraplex.adapters.extras import Extras, TableLora, TokenRows
from loraplex.adapters.extras_parts import ExtrasShape, dtype_of, table_parts
from loraplex.adapters.page_layout import Part, PartName, frame_elements, pack_tiles
from loraplex.adapters.pool import PagePool
from loraplex.adapters.weights import LoadedAdapter, LoadedModule

SHAPES = ((32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32))
LAYERS, VOCAB, HIDDEN = 2, 700, 32
FRAME = frame_elements(SHAPES)


@given(
    parts=st.lists(st.tuples(st.integers(1, 2000), st.integers(1, FRAME // 8)), max_size=6),
    ranks=st.dictionaries(
        st.tuples(st.integers(0, LAYERS - 1), st.integers(0, 6)), st.integers(1, 40), max_size=8
    ),
)
@settings(max_examples=60, deadline=None)
def test_nothing_overlaps_and_no_row_crosses_a_frame(
    parts: list[tuple[int, int]], ranks: dict[tuple[int, int], int]
) -> None:
    wanted = [Part(("table", str(i)), rows, width) for i, (rows, width) in enumerate(parts)]
    layout = pack_tiles(ranks, LAYERS, SHAPES, wanted)
    spans = []
    for place in layout.parts:
        row = 0
        for first, rows, offset in place.pieces():
            assert first == row
            row += rows
            size = rows * place.part.row_elements
            assert offset // FRAME == (offset + size - 1) // FRAME
            spans.append((offset, offset + size))
        assert row == place.part.rows
    end_of_parts = max((end for _, end in spans), default=0)
    for side, offsets in enumerate((layout.offset_a, layout.offset_b)):
        for page, layer, module in np.argwhere(offsets >= 0):
            start = int(offsets[page, layer, module])
            assert start >= end_of_parts
            spans.append((start, start + 16 * SHAPES[module][side]))
    spans.sort()
    for (_, end), (start, _) in pairwise(spans):
        assert end <= start
    assert layout.num_image_frames * FRAME >= max((end for _, end in spans), default=0)
    if wanted:  # a step may wait for the first layer and then use them
        assert layout.last_frames[0] >= (end_of_parts - 1) // FRAME


def extras_of(dtype: torch.dtype) -> Extras:
    torch.manual_seed(0)

    def some(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(of)

    return Extras(
        magnitudes={(0, 1): some(16, of=torch.float32)},
        linears={(1, 6): some(32, 48)},
        norms={"model.norm": some(HIDDEN)},
        embedding=some(VOCAB, HIDDEN),
        head_lora=TableLora(some(HIDDEN, 5), some(5, VOCAB), 5, 0.3),
        token_rows=TokenRows(torch.arange(0, VOCAB, 7), some(VOCAB // 7, HIDDEN), in_head=True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_pages", [True, False])
def test_it_comes_back_from_scattered_frames(dtype: torch.dtype, with_pages: bool) -> None:
    pool = PagePool(LAYERS, SHAPES, 100 * FRAME * dtype.itemsize, dtype, torch.device("cpu"))
    extras = extras_of(dtype)
    module = LoadedModule(torch.randn(4, 32).to(dtype), torch.randn(4, 16).to(dtype), 4, 2.0)
    modules = {(0, 1): module} if with_pages else {}
    loaded = LoadedAdapter("it", 4, modules, extras)
    parts: dict[PartName, Tensor] = {**table_parts(extras)}
    for part in ExtrasShape.of(extras).parts(SHAPES, dtype):
        if part.name not in parts:
            own = dtype_of(part.name) or dtype
            width = part.row_elements * dtype.itemsize // own.itemsize
            parts[part.name] = torch.randn(part.rows, width).to(own)
    plain = LoadedAdapter("other", 4, {(1, 3): LoadedModule(module.a, module.a, 4, 1.0)})
    for i in range(60):  # leave every other frame or so to it
        pool.install(f"other {i}", pool.build_image(plain))
    for i in random.Random(0).sample(range(60), 40):
        pool.remove(f"other {i}")
    free = pool.bytes_total - pool.bytes_used
    pool.install("it", pool.build_image(loaded, parts=parts))
    pool.check_invariants()
    found = pool.extras("it")
    assert found is not None
    assert pool.has_extras
    assert pool.pages("it") == [] or with_pages
    assert pool.adapted("it") == frozenset(modules)
    assert torch.equal(found.gains[0, 0], parts["gain", 0, 0][0])
    assert torch.equal(found.shifts[1, 3], parts["shift", 1, 3][0])
    assert torch.equal(found.norms["model.norm"], parts["norm", "model.norm"][0])
    assert torch.equal(found.linears[1, 6].whole(), parts["linear", 1, 6])
    assert found.embedding is not None
    assert len(found.embedding.pieces) > 1, "it should not fit a frame"
    assert torch.equal(found.embedding.whole(), parts["table", "embedding"])
    ids = torch.tensor([0, 1, VOCAB - 1, 300, 300])
    assert torch.equal(found.embedding.gather(ids), parts["table", "embedding"][ids])
    x = torch.randn(3, HIDDEN).to(dtype)
    expected = x @ parts["table", "embedding"].t()
    torch.testing.assert_close(found.embedding.multiply(x), expected)
    assert found.head_lora is not None
    assert found.head_lora.scaling.tolist() == pytest.approx([0.3])
    assert found.token_ids is not None
    assert torch.equal(found.token_ids.whole(), parts["tokens", "ids"])
    assert found.changes_logits
    pool.remove("it")
    assert not pool.has_extras
    assert pool.bytes_total - pool.bytes_used == free
