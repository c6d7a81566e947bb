"""These tests run the kernels on the CPU, in Triton's interpreter, whatever the machine has.

Makes the folder's `*_cases.py` importable, too (`--import-mode=importlib` does not).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from loraplex.kernels.gpu.launch import is_interpreted

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    if not is_interpreted():
        pytest.skip("kernels are compiled for the GPU here; TRITON_INTERPRET=1 runs them on CPU")


@pytest.fixture
def sums_rows_alike() -> None:
    """For tests of equal bits. The interpreter multiplies tiles by numpy, and on some processors
    its BLAS sums a row in an order that depends on where the row stands in the tile: then the
    kernels' fixed tiles cannot give equal bits here, as they do on a GPU.
    """
    rng = np.random.default_rng(0)
    tile = rng.standard_normal((64, 32)).astype(np.float32)
    weight = rng.standard_normal((32, 64)).astype(np.float32)
    if any((np.roll(tile, i, 0) @ weight != np.roll(tile @ weight, i, 0)).any() for i in range(64)):
        pytest.skip("this machine's BLAS sums the rows of one tile in different orders")
