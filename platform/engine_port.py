"""What the platform needs of an engine: the shape of `engine/client.py`, and of the fake in the
tests.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from loraplex.engine.api import (
    AdapterEvent,
    AdapterProbe,
    AdapterResidencyInfo,
    EngineStats,
    FreedBytes,
    GenerationRequest,
    MemoryInfo,
    ModelInfo,
    RequestInfo,
    Stats,
)
from loraplex.engine.recovery import Supervision
from loraplex.engine.stream import TextChunk
from loraplex.engine.tokenizer import Tokenizer


class EnginePort(Protocol):
    """All methods raise EngineError subclasses; EngineDead while the engine is starting or
    restarting.
    """

    @property
    def ready(self) -> bool:
        """The model is loaded and the engine answers."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the engine was given up after a good start."""
        ...

    @property
    def supervision(self) -> Supervision:
        """Restarts, resumed requests, adapters in quarantine."""
        ...

    @property
    def info(self) -> ModelInfo | None:
        """None until the model was loaded once; then it stays, also over restarts."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's, as long as `info` is known."""
        ...

    async def start(self) -> None:
        """Returns when the engine is ready. Raises EngineError (usually ModelError) when it never
        will be.
        """
        ...

    async def stop(self) -> None: ...

    def on_event(self, callback: Callable[[AdapterEvent | Stats], None]) -> None:
        """`callback` gets every change of residency and snapshot from now on; it must be quick."""
        ...

    def generate(
        self,
        request: GenerationRequest,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> AsyncGenerator[TextChunk, None]:
        """The request's text up to the chunk with a finish reason.

        Closing the generator early cancels the request at once.
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

    async def keep(self, digest: str) -> bool:
        """Take back a `forget` that still waits, if there is one; it then frees nothing."""
        ...

    async def probe(self, digest: str, *, timeout_s: float | None = None) -> AdapterProbe:
        """Compare what the adapter does in the engine with its files; loads it first."""
        ...

    async def memory(self) -> MemoryInfo: ...

    async def stats(self) -> EngineStats: ...

    async def requests(self) -> list[RequestInfo]: ...

    async def adapters(self) -> list[AdapterResidencyInfo]: ...
