"""The engine's side of a deletion, where it meets requests and uploads of the same content."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from loraplex.engine.errors import EngineDead
from loraplex.platform.engine_port import EnginePort
from loraplex.platform.schemas import Freed


async def forget_stragglers(engine: EnginePort, digest: str, freed: Freed) -> None:
    """When its files are gone: whoever resolved the content before, and reached the engine after it
    had let go of it, loaded it once more. Adds what that frees to `freed`.
    """
    with suppress(EngineDead):
        released = await engine.forget(digest, force=True, timeout_s=0.0)
        freed.device_bytes += released.device_bytes
        freed.host_bytes += released.host_bytes


async def keep(engine: EnginePort, digests: Iterable[str]) -> None:
    """They are somebody's after all: what the engine is about to forget, it serves on."""
    for digest in digests:
        with suppress(EngineDead):  # then it has nothing to forget
            await engine.keep(digest)
