"""An adapter's two files as a tar.gz, made while it is sent: one chunk in memory, the tensors byte
for byte.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from loraplex.adapters.manifest import CONFIG_FILE, WEIGHTS_FILE

CHUNK_BYTES = 256 * 1024


def tar_gz(directory: Path, folder: str) -> Iterator[bytes]:
    """`folder/adapter_config.json` and `folder/adapter_model.safetensors`, compressed lightly
    (weights hardly shrink).

    The files are opened at once, so a removal meanwhile does not cut the download. Raises:
    FileNotFoundError.
    """
    return _pack(
        folder, [(name, (directory / name).open("rb")) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    )


def _pack(folder: str, files: Sequence[tuple[str, BinaryIO]]) -> Iterator[bytes]:
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31)
    try:
        for name, file in files:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            header = tarfile.TarInfo(f"{folder}/{name}")
            header.size, header.mode = size, 0o644
            yield compressor.compress(header.tobuf(tarfile.PAX_FORMAT))
            while chunk := file.read(CHUNK_BYTES):
                yield compressor.compress(chunk)
            yield compressor.compress(b"\0" * (-size % tarfile.BLOCKSIZE))
        yield compressor.compress(b"\0" * (2 * tarfile.BLOCKSIZE)) + compressor.flush()
    finally:
        for _, file in files:
            file.close()
