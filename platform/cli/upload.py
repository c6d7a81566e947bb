"""Multipart upload that streams from disk, with progress. Knows nothing of what it sends."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

CHUNK_BYTES = 256 * 1024


class MultipartUpload:
    """A multipart/form-data body: small text fields, then files read as they are sent.

    Iterate it for the bytes; `headers` has the type and the exact length, so that the server can
    refuse a too large upload before it has arrived.
    """

    def __init__(
        self,
        fields: Mapping[str, str],
        files: Mapping[str, Path],
        on_sent: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        self._boundary = f"loraplex-{secrets.token_hex(16)}"
        self._on_sent = on_sent
        self._parts: list[tuple[bytes, Path | bytes]] = []
        for name, value in fields.items():
            self._parts.append((self._head(name), value.encode()))
        for name, path in files.items():
            self._parts.append((self._head(name, path.name), path))
        self._tail = f"--{self._boundary}--\r\n".encode()
        self.total_bytes = sum(
            len(head) + (p.stat().st_size if isinstance(p, Path) else len(p)) + 2
            for head, p in self._parts
        ) + len(self._tail)

    @property
    def headers(self) -> dict[str, str]:
        return {
            "content-type": f"multipart/form-data; boundary={self._boundary}",
            "content-length": str(self.total_bytes),
        }

    def __iter__(self) -> Iterator[bytes]:
        for head, payload in self._parts:
            yield self._sent(head)
            if isinstance(payload, Path):
                with payload.open("rb") as file:
                    while data := file.read(CHUNK_BYTES):
                        yield self._sent(data)
            else:
                yield self._sent(payload)
            yield self._sent(b"\r\n")
        yield self._sent(self._tail)

    def _sent(self, data: bytes) -> bytes:
        self._on_sent(len(data))
        return data

    def _head(self, name: str, filename: str | None = None) -> bytes:
        disposition = f'form-data; name="{_quoted(name)}"'
        if filename is not None:
            disposition += f'; filename="{_quoted(filename)}"'
            disposition += "\r\nContent-Type: application/octet-stream"
        return f"--{self._boundary}\r\nContent-Disposition: {disposition}\r\n\r\n".encode()


def _quoted(name: str) -> str:
    """As browsers do it (WHATWG form data)."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
