"""What the platform needs of an engine: the shape of `engine/client.py`, and of the fake in the
tests.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from loraplex.engine.api import (
    AdapterResidencyInfo,
    EngineStats,
    FreedBytes,
    GenerationRequest,
    MemoryInfo,
    ModelInfo,
    RequestInfo,
    SequenceOutput,
)


class EnginePort(Protocol):
    """All methods raise EngineError subclasses; EngineDead while the engine is starting or
    restarting.
    """

    @property
    def ready(self) -> bool:
        """The model is loaded and the engine answers."""
        ...

    @property
    def info(self) -> ModelInfo | None:
        """None until the model was loaded once; then it stays, also over restarts."""
        ...

    async def start(self) -> None:
        """Returns when the engine is ready. Raises EngineError (usually ModelError) when it never
        will be.
        """
        ...

    async def stop(self) -> None: ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[SequenceOutput, None]:
        """The request's outputs up to the one with a finish reason; closing the iterator early
        cancels it at once.
        """
        ...

    async def load(self, digest: str, *, wait: bool = True) -> AdapterResidencyInfo: ...

    async def evict(
        self,
        digest: str,
        *,
        tier: str = "device",
        drain: bool = False,
        timeout_s: float | None = None,
    ) -> FreedBytes: ...

    async def pin(self, digest: str) -> AdapterResidencyInfo: ...

    async def unpin(self, digest: str) -> AdapterResidencyInfo: ...

    async def forget(
        self, digest: str, *, force: bool = False, timeout_s: float | None = None
    ) -> FreedBytes: ...

    async def memory(self) -> MemoryInfo: ...

    async def stats(self) -> EngineStats: ...

    async def requests(self) -> list[RequestInfo]: ...

    async def adapters(self) -> list[AdapterResidencyInfo]: ...
