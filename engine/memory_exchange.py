"""Which superblock of the shared device memory is the KV cache's and which the adapters', and when
one changes hands. Moves no memory itself: a `Mover` does.

Each superblock belongs to one side, or is on its way from one to the other. The rules, in short:
live work goes before what is only kept, what holds nothing is given before what is kept, and of
what is kept the longest unused goes.

* The KV cache asks when an allocation lacks blocks, which would make a request wait or preempt one.
  It gets adapter memory that holds no adapter; else that of the adapters worth least
  (`adapters.eviction`) among those that nobody runs, wants or pins and nobody used within `HOLD_S`.
  All it lacks or nothing. It gets none while a wanted adapter lacks room.
* Adapters ask when one that is wanted lacks room (`adapters.load_planner`). They get KV memory that
  holds nothing; then, before an adapter is evicted, KV memory whose cached prefixes nobody used
  for longer than that adapter. The KV cache keeps a superblock's worth of blocks to go on with.
* An adapter that has waited for long, and for which all adapters together have no room, makes the
  KV cache close superblocks: no new block is handed out there, so they empty as their sequences
  end.
* Floors: the KV cache keeps what a sequence of the greatest length needs, adapters keep a page.
* What one side took of what the other kept is not taken back for `HOLD_S`.

KV memory that a step in flight may still read is given when that step has settled. Adapters have no
such moment: what a step in flight uses counts as running. All calls come from the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from loraplex.adapters.frames import Frames
from loraplex.adapters.slots import AdapterSlots
from loraplex.engine.api import MemoryInfo
from loraplex.engine.block_manager import BlockManager
from loraplex.engine.superblocks import Division

logger = logging.getLogger(__name__)

HOLD_S = 0.5
LOOK_AGAIN_S = 0.05  # a look at all adapters in vain is not repeated in every step


class FrameMemory(Protocol):
    """What the exchange asks of `adapters.pool.PagePool`."""

    frames: Frames
    frame_bytes: int

    def is_quiet(self, superblock: int) -> bool: ...


class Mover(Protocol):
    """Moves memory between the two address spaces. The one that receives has room."""

    def to_adapters(self, kv_superblock: int, adapter_superblock: int) -> None: ...
    def to_kv(self, adapter_superblock: int, kv_superblock: int) -> None: ...


class MemoryExchange:
    """Implements `adapters.residency.Lender` and `BlockManager.more_blocks`.

    when_settled: calls back when no step in flight reads KV memory that is unused now.
    """

    def __init__(
        self,
        division: Division,
        blocks: BlockManager,
        slots: AdapterSlots,
        pool: FrameMemory,
        mover: Mover,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.division = division
        self.num_to_kv = 0  # superblocks, ever
        self.num_to_adapters = 0
        self.num_lost = 0  # superblocks that could not be moved
        self.when_settled: Callable[[Callable[[], None]], None] = lambda then: then()
        self._blocks = blocks
        self._slots = slots
        self._pool = pool
        self._mover = mover
        self._clock = clock
        self._coming: set[int] = set()  # KV superblocks that wait for a step in flight
        self._lacking = False  # a wanted adapter lacks room
        self._kv_holds_until = float("-inf")
        self._adapters_hold_until = float("-inf")
        self._kv_looks_again_at = float("-inf")
        self._superblock_bytes = division.frames_per_superblock * pool.frame_bytes  # of frames
        blocks.min_blocks = division.kv_floor * division.blocks_per_superblock
        blocks.more_blocks = self.more_blocks
        slots.lender = self

    # --- for the KV cache -----------------------------------------------------------------------

    def more_blocks(self, num_blocks: int) -> bool:
        """An allocation lacks so many. Returns whether they are there now."""
        count = -(-num_blocks // self.division.blocks_per_superblock)
        if self._lacking or self.num_lost:
            return False
        frames, spare = self._pool.frames, len(self._pool.frames.owned) - count
        if spare < self.division.adapter_floor:
            return False
        chosen = [s for s in frames.owned if not frames.holders(s) and self._pool.is_quiet(s)]
        if len(chosen) < count:
            chosen += self._least_needed(count - len(chosen))
        if len(chosen) < count:
            return False
        chosen.sort(key=lambda s: (len(frames.holders(s)), -s))
        return all([self._give_to_kv(superblock) for superblock in chosen[:count]])

    def _least_needed(self, count: int) -> list[int]:
        """So many superblocks, or fewer, whose adapters are idle; those worth least to keep."""
        if self._clock() < max(self._kv_looks_again_at, self._adapters_hold_until):
            return []
        found: list[tuple[float, int]] = []
        frames = self._pool.frames
        for superblock in frames.owned:
            holders = frames.holders(superblock)
            worth = self._slots.worth_of_idle(holders, HOLD_S) if holders else None
            if worth is not None and self._pool.is_quiet(superblock):
                found.append((worth, superblock))
        if len(found) < count:
            self._kv_looks_again_at = self._clock() + LOOK_AGAIN_S
        return [superblock for _, superblock in sorted(found)[:count]]

    def _give_to_kv(self, superblock: int) -> bool:
        holders = self._pool.frames.holders(superblock)
        if holders:
            self._slots.make_way(holders)
            self._kv_holds_until = self._clock() + HOLD_S
        if not self._pool.is_quiet(superblock):
            return False  # the last bytes of an adapter that has just left still come
        left = self._slots.device_bytes_total - self._superblock_bytes
        if self._slots.device_bytes_used > left:
            return False  # adapters count for more bytes than their frames
        self._pool.frames.remove(superblock)
        self._slots.resize_device(left)
        unused = self._blocks.unused
        target = next(
            s
            for s in range(self.division.max_kv_superblocks)
            if s not in unused.owned and s not in self._coming
        )
        if not self._moved(lambda: self._mover.to_kv(superblock, target)):
            return False
        unused.add(target)
        self.num_to_kv += 1
        return True

    # --- for the adapters -----------------------------------------------------------------------

    @property
    def bytes_coming(self) -> int:
        return len(self._coming) * self._superblock_bytes

    def lend(self, num_bytes: int, unused_since: float | None = None) -> None:
        self._lacking = True
        unused = self._blocks.unused
        if self._clock() < self._kv_holds_until:
            unused_since = None
        candidates = []
        for superblock in unused.owned - unused.closed:
            if unused.is_empty(superblock):
                candidates.append((float("-inf"), -superblock))
            elif unused_since is not None and not unused.used[superblock]:
                candidates.append((unused.kept_at[superblock], -superblock))
        for kept_at, minus_superblock in sorted(candidates):
            if num_bytes <= 0 or not self._kv_may_give():
                return
            superblock = -minus_superblock
            if not unused.is_empty(superblock):
                if unused_since is None or kept_at >= unused_since:
                    return
                self._adapters_hold_until = self._clock() + HOLD_S
            self._blocks.close(superblock)
            self._give_to_adapters(superblock)
            num_bytes -= self._superblock_bytes

    def _kv_may_give(self) -> bool:
        """One superblock more, and still have some blocks to go on with."""
        size = self.division.blocks_per_superblock
        return self._kv_may_close() and self._blocks.num_available_blocks >= 2 * size

    def _kv_may_close(self) -> bool:
        unused = self._blocks.unused
        return not self.num_lost and len(unused.owned - unused.closed) > self.division.kv_floor

    def insist(self, num_bytes: int) -> None:
        self._lacking = True
        unused = self._blocks.unused
        count = -(-num_bytes // self._superblock_bytes) - len(self._coming) - len(unused.closed)
        emptiest = sorted(unused.owned - unused.closed, key=lambda s: (unused.used[s], -s))
        for superblock in emptiest[: max(count, 0)]:
            if not self._kv_may_close():
                return
            self._blocks.close(superblock)
            logger.debug("superblock %d of the KV cache is to leave", superblock)

    def enough(self) -> None:
        self._lacking = False
        for superblock in list(self._blocks.unused.closed):
            self._blocks.unused.reopen(superblock)

    def poll(self) -> None:
        """Between steps: closed superblocks that nobody uses any more go. Sequences may have given
        back what a wanted adapter lacks.
        """
        unused = self._blocks.unused
        for superblock in [s for s in unused.closed if not unused.used[s]]:
            self._give_to_adapters(superblock)
        if self._lacking and self._kv_may_give():
            self._slots.look_again()

    def _give_to_adapters(self, superblock: int) -> None:
        """A closed one that nobody uses."""
        self._blocks.unused.remove(superblock)
        self._coming.add(superblock)
        self.when_settled(lambda: self._arrive(superblock))

    def _arrive(self, superblock: int) -> None:
        self._coming.remove(superblock)
        frames = self._pool.frames
        target = next(s for s in frames.superblocks if s not in frames.owned)
        if self._moved(lambda: self._mover.to_adapters(superblock, target)):
            frames.add(target)
            self._slots.resize_device(self._slots.device_bytes_total + self._superblock_bytes)
            self.num_to_adapters += 1

    # --- questions ------------------------------------------------------------------------------

    def add_to(self, info: MemoryInfo) -> MemoryInfo:
        division, unused, frames = self.division, self._blocks.unused, self._pool.frames
        size = division.blocks_per_superblock
        kv_unused = sum(not unused.used[s] for s in unused.owned)
        kv_spare = min(kv_unused, len(unused.owned) - division.kv_floor)
        idle = sum(
            self._slots.worth_of_idle(frames.holders(s), HOLD_S) is not None for s in frames.owned
        )
        frames_spare = min(idle, len(frames.owned) - division.adapter_floor)
        return msgspec.structs.replace(
            info,
            superblock_bytes=division.superblock_bytes,
            shared_bytes=division.num_bytes,
            kv_blocks_min=division.kv_floor * size,
            kv_blocks_max=division.max_kv_superblocks * size,
            kv_blocks_obtainable=frames_spare * size,
            adapter_bytes_obtainable=kv_spare * self._superblock_bytes,
            superblocks_to_kv=self.num_to_kv,
            superblocks_to_adapters=self.num_to_adapters,
            superblocks_lost=self.num_lost,
        )

    # --- inside ---------------------------------------------------------------------------------

    def _moved(self, move: Callable[[], None]) -> bool:
        """A superblock that cannot be moved is nobody's from then on, and none is moved again."""
        try:
            move()
        except Exception:
            self.num_lost += 1
            self._slots.limit_device(self._slots.device_bytes_total + self.bytes_coming)
            logger.exception("memory could not be moved: the division stays as it is now")
            return False
        return True

    def check_invariants(self) -> None:
        """Every superblock has one owner, and the floors hold. For tests and idle time."""
        division, frames, unused = self.division, self._pool.frames, self._blocks.unused
        assert not self._coming & unused.owned, "a superblock has two owners"
        in_all = len(unused.owned) + len(frames.owned) + len(self._coming) + self.num_lost
        assert in_all == division.num_superblocks, "superblocks are lost"
        assert len(unused.owned - unused.closed) >= division.kv_floor, "the KV cache's floor"
        assert len(frames.owned) >= division.adapter_floor, "the adapters' floor"
        total = len(frames.owned) * self._superblock_bytes
        assert self._slots.device_bytes_total == total, "the adapters' bytes"
        assert self._lacking or not unused.closed, "a superblock is closed for nobody"
