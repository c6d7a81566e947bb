"""How much a soak does, and of what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """num_requests: generations, cancelled ones included; everything else comes on top.

    operators: how much of everything else there is, relative to the usual.
    """

    num_requests: int
    seed: int = 0
    concurrency: int = 32
    num_contents: int = 48
    num_compositions: int = 8
    num_volatile: int = 32
    operators: float = 1.0
    server_flags: tuple[str, ...] = ()
