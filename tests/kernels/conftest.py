"""Random pools, batches and sequences for the kernel tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# `--import-mode=importlib` leaves the folder off sys.path: load the helpers by their file, once.
_spec = importlib.util.spec_from_file_location(
    "kernel_cases", Path(__file__).parent / "kernel_cases.py"
)
assert _spec is not None
assert _spec.loader is not None
if "kernel_cases" not in sys.modules:
    sys.modules["kernel_cases"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["kernel_cases"])
