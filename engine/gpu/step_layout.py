"""Where the numbers of a step lie in one run of int32. Knows nothing of who writes or reads them.

Everything a step needs goes to the device in a single copy, so all of it is int32: ids, positions
and tiles as they are, floats by their bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex.kernels.gpu.attention_work import TILE_FIELDS as ATTENTION_TILE_FIELDS
from loraplex.kernels.gpu.work import TILE_FIELDS

Ints = np.ndarray[tuple[int], np.dtype[np.int32]]

ALIGNMENT = 16  # int32s: fields begin at 64 bytes, so that kernels may read them in wide loads
# Counts stand 16 bytes apart: Triton compiles a kernel anew for a pointer of other alignment.
COUNT_STRIDE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """Room of a step's fields; what is used may be less."""

    tokens: int
    seqs: int
    samples: int = 0  # 0: every row samples
    small: int = 0  # LoRA tiles by family
    norm: int = 0
    large: int = 0
    pages: int = 0
    small_entries: int = 0  # T entries; they take room elsewhere, but limit what fits
    large_entries: int = 0
    attention_tiles: int = 0

    def holds(self, other: StepSizes) -> bool:
        """A step of `other` fits where this one was laid out, its families being the same."""
        return (
            self.small >= other.small
            and self.norm >= other.norm
            and self.pages >= other.pages
            and self.small_entries >= other.small_entries
            and self.large >= other.large
            and self.attention_tiles >= other.attention_tiles
        )


class Layout:
    """Fields one after the other in the order given; an empty field has no place."""

    def __init__(self, sizes: StepSizes) -> None:
        self.sizes = sizes
        self._spans: dict[str, slice] = {}
        end = 0
        for name, count in _fields(sizes).items():
            self._spans[name] = slice(end, end + count)
            end += -(-count // ALIGNMENT) * ALIGNMENT
        self.size = end  # int32s

    def write(self, target: Ints, values: Mapping[str, Ints], padding: Mapping[str, int]) -> None:
        """Put values at the beginnings of their fields; fill the rest of those with a padding.

        Raises: ValueError for values that do not fit their field.
        """
        for name, array in values.items():
            span = self._spans[name]
            end = span.start + len(array)
            if end > span.stop:
                raise ValueError(
                    f"{name}: {len(array)} values do not fit a field of {span.stop - span.start}"
                )
            target[span.start : end] = array
            if end < span.stop and name in padding:
                target[end : span.stop] = padding[name]

    def view(self, memory: Tensor, name: str, columns: int | None = None) -> Tensor:
        """A field of `memory` (int32, this layout), as rows of `columns` if given."""
        field = memory[self._spans[name]]
        return field if columns is None else field.view(-1, columns)

    def count(self, memory: Tensor, index: int) -> Tensor:
        """`[1]`: small, norm, large or attention tiles."""
        at = index * COUNT_STRIDE
        return self.view(memory, "counts")[at : at + 1]

    def floats(self, memory: Tensor, name: str) -> Tensor:
        return self.view(memory, name).view(torch.float32)


def _fields(sizes: StepSizes) -> dict[str, int]:
    return {
        "counts": 4 * COUNT_STRIDE,  # small, norm, large and attention tiles
        "token_ids": sizes.tokens,
        "positions": sizes.tokens,
        "slots": sizes.tokens,
        "query_start": sizes.seqs + 1,
        "context_lens": sizes.seqs,
        "state_rows": sizes.seqs,
        "sample_rows": sizes.samples,
        "small": sizes.small * TILE_FIELDS,
        "norm": sizes.norm * TILE_FIELDS,
        "large": sizes.large * TILE_FIELDS,
        "page_ids": sizes.pages,
        "page_weights": sizes.pages,
        "attention_tiles": sizes.attention_tiles * ATTENTION_TILE_FIELDS,
    }
