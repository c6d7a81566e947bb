"""Makes the `*_cases.py` of this folder importable (`--import-mode=importlib` does not)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
