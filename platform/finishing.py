"""Work that is not left half-way when whoever waits for it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """Await work to its end even when cancelled meanwhile; the cancellation comes after it.

    A thread cannot be stopped: whoever removes what it works on must wait for it.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _ended(task)
        if not task.cancelled():
            task.exception()  # looked at: the cancellation is what matters now
        raise


async def _ended(task: asyncio.Task[Any]) -> None:
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            continue  # the one that is being kept for later


async def irrevocable(work: Coroutine[Any, Any, T]) -> T:
    """Await work to its end, whatever is cancelled meanwhile: it came too late."""
    task = asyncio.ensure_future(work)
    await _ended(task)
    return task.result()
