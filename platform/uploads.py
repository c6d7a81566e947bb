"""Receives a multipart upload as it arrives: files go to the caller's writers in bounded pieces,
text into a dict.

Nothing is ever whole in memory, and nothing the client sends becomes a path: which file is written
is decided by the form field it arrived in. Knows nothing of adapters.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from loraplex.platform.errors import ApiError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELD_BYTES = 64 * 1024
MAX_PARTS = 16
FLUSH_BYTES = 1024 * 1024


class Writer(Protocol):
    """Where a file goes. Both methods may block: they are called in a worker thread."""

    def write(self, data: bytes, /) -> Any: ...

    def close(self) -> None: ...


OpenWriter = Callable[[], Writer]


@dataclass(slots=True)
class Upload:
    """What arrived: text fields, and the form fields that were files."""

    fields: dict[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)


async def receive_upload(
    chunks: AsyncIterator[bytes],
    content_type: str,
    writers: Mapping[str, OpenWriter],
    max_bytes: int,
) -> Upload:
    """Write each file of a multipart body to the writer of its form field.

    Raises: ApiError(unsupported_media_type | content_too_large | invalid_request), and what the
    writers raise.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data":
        raise ApiError(
            "unsupported_media_type",
            f"uploads are multipart/form-data, not {content_type[:80]!r}",
        )
    if not boundary:
        raise ApiError("invalid_request", "the multipart content type names no boundary")
    receiver = _Receiver(writers)
    total = 0
    try:
        parser = MultipartParser(boundary, receiver.callbacks())
        async for chunk in chunks:
            total += len(chunk)
            if total > max_bytes:
                raise too_large(max_bytes)
            parser.write(chunk)
            if receiver.pending_bytes >= FLUSH_BYTES:
                await asyncio.to_thread(receiver.flush)
        parser.finalize()
        await asyncio.to_thread(receiver.flush)
    except FormParserError as error:
        raise ApiError("invalid_request", f"the multipart body is malformed: {error}") from None
    finally:
        await asyncio.to_thread(receiver.close)
    if not receiver.ended:
        raise ApiError(
            "invalid_request", "the multipart body ends before its closing boundary; send it again"
        )
    return receiver.upload


def too_large(max_bytes: int) -> ApiError:
    return ApiError(
        "content_too_large",
        f"the upload exceeds {max_bytes} bytes; raise LORAPLEX_MAX_UPLOAD_BYTES to allow it",
    )


class _Receiver:
    """The parser's callbacks. Data is only queued here; `flush` writes it, in a worker thread."""

    def __init__(self, writers: Mapping[str, OpenWriter]) -> None:
        self.upload = Upload()
        self.ended = False
        self.pending_bytes = 0
        self._writers = writers
        self._pending: list[tuple[Writer, bytes]] = []
        self._open: list[Writer] = []
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._parts = 0
        self._field = ""
        self._text = bytearray()
        self._file: Writer | None = None

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def flush(self) -> None:
        pending, self._pending, self.pending_bytes = self._pending, [], 0
        for file, data in pending:
            file.write(data)

    def close(self) -> None:
        for file in self._open:
            file.close()

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise ApiError("invalid_request", f"an upload has at most {MAX_PARTS} parts")
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if not name:
            raise ApiError("invalid_request", "a part of the upload has no name")
        if name in self.upload.fields or name in self.upload.files:
            raise ApiError("invalid_request", f"{name[:80]!r} was sent twice", param=name[:80])
        self._field, self._text, self._file = name, bytearray(), None
        if name in self._writers:
            self._file = self._writers[name]()
            self._open.append(self._file)
            self.upload.files.add(name)
        elif b"filename" in options:
            raise ApiError(
                "invalid_request",
                f"unexpected file {name[:80]!r}; files are {', '.join(self._writers)}",
                param=name[:80],
            )

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._pending.append((self._file, data[start:end]))
            self.pending_bytes += end - start
            return
        self._text += data[start:end]
        if len(self._text) > MAX_FIELD_BYTES:
            raise ApiError(
                "invalid_request",
                f"field {self._field[:80]!r} exceeds {MAX_FIELD_BYTES} bytes",
                param=self._field[:80],
            )

    def _on_part_end(self) -> None:
        if self._file is None:
            try:
                self.upload.fields[self._field] = self._text.decode()
            except UnicodeDecodeError:
                raise ApiError(
                    "invalid_request",
                    f"field {self._field[:80]!r} is not UTF-8",
                    param=self._field[:80],
                ) from None

    def _on_end(self) -> None:
        self.ended = True
