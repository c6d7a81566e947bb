"""What the engine process is doing right now, in memory that outlives it.

A small file that both processes map. The engine writes which requests it has in hand, when it began
its present turn of work, and a beat once a second from a thread of its own. The API process reads
it: a beat that stops is a stopped process, a turn that does not end is a hang, and after a death
the requests in hand are the suspects. Writing is a copy into memory: no message, no system call.

Standard library only. Times are `time.monotonic`, which on one machine is the same clock for all
processes.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_CLOCKS = struct.Struct("<dd")  # beat, begin of the turn (0: at rest)
_SLOT_BYTES = 16384
_COUNT = struct.Struct("<Q")
_MAX_SERIALS = _SLOT_BYTES // 8 - 1
_HEADER_BYTES = 64
_BEAT_S = 1.0


class Hand(IntEnum):
    """The two things that requests can be in hand for, at the same time."""

    MESSAGE = 0  # being taken in
    STEPS = 1  # in a step that runs


_FILE_BYTES = _HEADER_BYTES + len(Hand) * _SLOT_BYTES


@dataclass(frozen=True, slots=True)
class Pulse:
    """Seconds since the last beat, and since the present turn of work began (None: at rest)."""

    silent_s: float
    turn_s: float | None


class FlightRecorder:
    """The engine's side. `path` was made by `FlightRecord.create`."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _FILE_BYTES)
        self._turn = 0.0
        self.beat()

    def beat(self) -> None:
        _CLOCKS.pack_into(self._map, 0, time.monotonic(), self._turn)

    def turn(self) -> None:
        """The next turn of work begins: a message, or a step."""
        self._turn = time.monotonic()
        self.beat()

    def rest(self) -> None:
        """The turn is over: nothing but a wait for messages follows."""
        self._turn = 0.0
        self.beat()

    def hold(self, hand: Hand, serials: Iterable[int]) -> None:
        """These requests are in hand from now on, and no others."""
        some = list(serials)[:_MAX_SERIALS]
        start = _HEADER_BYTES + hand * _SLOT_BYTES
        struct.pack_into(f"<Q{len(some)}Q", self._map, start, len(some), *some)

    def beat_for_ever(self) -> None:
        """From a thread of its own, for as long as the process lives."""

        def beat() -> None:
            while True:
                time.sleep(_BEAT_S)
                self.beat()

        threading.Thread(target=beat, name="flight-recorder", daemon=True).start()


class FlightRecord:
    """The API process's side: reads what the engine's `FlightRecorder` writes."""

    def __init__(self, path: Path) -> None:
        with path.open("xb") as file:
            file.write(bytes(_FILE_BYTES))
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), _FILE_BYTES, access=mmap.ACCESS_READ)

    def pulse(self) -> Pulse | None:
        """None before the engine's first beat."""
        beat, turn = _CLOCKS.unpack_from(self._map, 0)
        if not beat:
            return None
        now = time.monotonic()
        return Pulse(now - beat, now - turn if turn else None)

    def in_hand(self) -> set[int]:
        """Serials of the requests in hand; of a dead engine, when it died."""
        found: set[int] = set()
        for hand in Hand:
            start = _HEADER_BYTES + hand * _SLOT_BYTES
            (count,) = _COUNT.unpack_from(self._map, start)
            count = min(count, _MAX_SERIALS)  # should it have died while it wrote
            found.update(struct.unpack_from(f"<{count}Q", self._map, start + _COUNT.size))
        return found

    def close(self) -> None:
        self._map.close()
