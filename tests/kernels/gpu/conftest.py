"""These tests run the kernels on the CPU, in Triton's interpreter, whatever the machine has.

Makes the folder's `*_cases.py` importable, too (`--import-mode=importlib` does not).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loraplex.kernels.gpu.launch import is_interpreted

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    if not is_interpreted():
        pytest.skip("kernels are compiled for the GPU here; TRITON_INTERPRET=1 runs them on CPU")
