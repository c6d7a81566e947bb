"""A file from an origin into a staged file: bounded, counted, resumed when the line breaks.

Bytes that have arrived are kept over a broken connection if the origin vouches that the rest
belongs to them (equal validators); else the file begins anew. Knows no kind of origin.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from loraplex.adapters.errors import AdapterRefused, Problem
from loraplex.adapters.manifest import CONFIG_FILE
from loraplex.adapters.store import StagedFile, Staging
from loraplex.platform.errors import ApiError
from loraplex.platform.finishing import finished
from loraplex.platform.sources.origin import Broken, Origin, Stale

MAX_FAILURES = 5  # in a row, without getting any further
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 15.0


@dataclass(slots=True)
class Progress:
    """Of all files of one pull. bytes_total: None until every file has said its size."""

    bytes_done: int = 0
    bytes_total: int | None = None
    retries: int = 0


async def fetch(
    origin: Origin,
    name: str,
    staging: Staging,
    limit: int,
    progress: Progress,
    *,
    last: bool = True,
) -> None:
    """Bring the file `name` of an origin into the staging folder, at most `limit` bytes.

    last: no further file comes, so the total is known with this one's.

    Raises: ApiError(source_failed, source_not_allowed...); AdapterRefused past the limit, declared
    or not; StorageFull.
    """
    file = await finished(asyncio.to_thread(staging.writer, name, limit))
    try:
        failures, furthest, validator, before = 0, 0, None, progress.bytes_done
        while True:
            arrived = file.size_bytes
            try:
                async with origin.open(name, arrived, validator) as opened:
                    if opened.start != arrived or (arrived and opened.validator != validator):
                        file = await finished(asyncio.to_thread(_anew, file, staging))
                        progress.bytes_done = before
                        if opened.start:
                            raise Broken(f"{origin.shown} has changed while it was pulled")
                        arrived = 0
                    validator = opened.validator
                    _check_total(name, opened.total, limit)
                    if last and opened.total is not None:
                        progress.bytes_total = before + opened.total
                    async for chunk in opened.chunks:
                        await finished(asyncio.to_thread(file.write, chunk))
                        progress.bytes_done += len(chunk)
                    if opened.total is not None and file.size_bytes != opened.total:
                        raise Broken(
                            f"{origin.shown} ended after {file.size_bytes} of {opened.total} bytes"
                        )
                break
            except Broken as error:
                failures = 1 if file.size_bytes > furthest else failures + 1
                furthest = max(furthest, file.size_bytes)
                if isinstance(error, Stale):
                    validator = None
                progress.retries += 1
                if failures >= MAX_FAILURES:
                    raise ApiError(
                        "source_failed", f"{error}; given up after {failures} tries"
                    ) from None
            delay = min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** (failures - 1))
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
    finally:
        await finished(asyncio.to_thread(file.close))


def _check_total(name: str, total: int | None, limit: int) -> None:
    if total is not None and total > limit:
        message = f"{name} has {total} bytes, the limit is {limit}"
        if name != CONFIG_FILE:
            message += "; raise LORAPLEX_MAX_UPLOAD_BYTES to allow it"
        raise AdapterRefused([Problem("file_too_large", message, file=name)])


def _anew(file: StagedFile, staging: Staging) -> StagedFile:
    file.close()
    (staging.path / file.name).unlink()
    return staging.writer(file.name, file.limit)
