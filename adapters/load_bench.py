"""Times bringing an adapter from disk to the host against this machine's own rates.

    python -m loraplex.adapters.load_bench [--rank 16] [--folder DIR]

One adapter of a Llama-3-8B's size (84 MB at rank 16, all seven modules) as a page file. Per round,
in turns: a plain read of the file, and `PageFile.read` (the same read into frames, and its check);
both with the file dropped from the system's cache before ("cold") and from it ("warm"). Then a copy
of the frames within memory. Medians of the rounds; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from loraplex.adapters.host_arena import HostArena
from loraplex.adapters.page_file import PageFile
from loraplex.adapters.page_image import PageImage
from loraplex.adapters.page_layout import frame_elements, pack_tiles

LAYERS = 32
SHAPES = (
    (4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096),
    (4096, 14336), (4096, 14336), (14336, 4096),
)  # fmt: skip
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as the loader's thread does
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder), args.rank)
    print(f"{found['mb']:.0f} MB of pages, rank {args.rank}; MB/s:")
    for name in ("cold", "warm"):
        plain, ours = found[f"{name}_read_mb_s"], found[f"{name}_pages_mb_s"]
        print(
            f"  {name:5} plain read {plain:6.0f}   pages, checked {ours:6.0f}   {ours / plain:.2f}"
        )
    print(f"  copy within memory {found['copy_mb_s']:.0f}")
    print(json.dumps({"bench": "adapter load", "rank": args.rank, "rounds": ROUNDS} | found))


def measure(folder: Path, rank: int) -> dict[str, float]:
    keys = {(layer, module): rank for layer in range(LAYERS) for module in range(len(SHAPES))}
    layout = pack_tiles(keys, LAYERS, SHAPES)
    frame = frame_elements(SHAPES)
    num_bytes = layout.num_image_frames * frame * 2
    arena = HostArena(2 * num_bytes, frame, torch.bfloat16, pinned=False)
    written, into = (arena.take(layout.num_image_frames) for _ in range(2))
    for tensor in (*written, *into):
        tensor.normal_()
    file = PageFile(LAYERS, SHAPES, torch.bfloat16)
    scaling = np.ones((LAYERS, len(SHAPES)), dtype=np.float32)
    assert file.write(folder, PageImage(layout, written, scaling)), f"{folder} takes no files"
    path = file.path(folder)
    buffer = np.empty(path.stat().st_size, dtype=np.uint8)
    buffer.fill(1)  # touched, as the arena is

    def plain() -> None:
        with path.open("rb", buffering=0) as raw:
            view = buffer.data
            while view and (count := raw.readinto(view)):
                view = view[count:]

    def pages() -> None:
        assert file.read(folder, layout, into) is not None

    def copy() -> None:
        for source, target in zip(written, into, strict=True):
            target.copy_(source)

    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, run in (("read", plain), ("pages", pages)):
            for cache in ("cold", "warm"):
                if cache == "cold":
                    _drop_from_cache(path)
                seconds.setdefault(f"{cache}_{name}", []).append(_time(run))
        seconds.setdefault("copy", []).append(_time(copy))
    mb = num_bytes / 1e6
    return {"mb": mb} | {f"{n}_mb_s": mb / statistics.median(s) for n, s in seconds.items()}


def _drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _time(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
