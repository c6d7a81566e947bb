"""Which KV block belongs to whom: reference counts and shared prefixes. Touches no memory itself.

A block is in exactly one of three places:

    used    some block tables hold it (`ref_count` of them)
    cached  nobody holds it, but its contents are findable by hash (LRU, oldest is reused first)
    free    nobody holds it and nothing is known of its contents

Only full blocks are findable and only full blocks are shared, so nobody ever writes to a shared
block and no copy-on-write exists. The last token of a sequence is never taken from the cache: its
logits are needed.

A full block becomes findable when it is *scheduled*, before it is computed, so that sequences of
one step share it. This is sound because runners write the K/V of all of a step's tokens before
attention reads them, per layer, and steps take effect in order. After a step that fails, all
contents must be forgotten. A block whose last token is pending becomes findable when that is known.

Which of the blocks the KV cache owns may change at run time, by superblocks: `unused_blocks.py`
has the books of those, `memory_exchange.py` decides.

PagedAttention: 2309.06180. Every operation is O(1) per block, but O(log n) to pick the lowest
free one: neighbours in a sequence then tend to be neighbours in memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

from loraplex.engine.prefix_hash import block_hashes
from loraplex.engine.sequence import Sequence
from loraplex.engine.unused_blocks import UnusedBlocks


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens, ids from 0 on, all usable.

    max_blocks, blocks_per_superblock: with trading, how many there may come to be, and in what
    units; all counts are multiples of the unit then. `more_blocks` is asked for so many more when
    an allocation lacks them; it answers whether they are there now.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_cache: bool = True,
        max_blocks: int | None = None,
        blocks_per_superblock: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks}, block_size={block_size}: both must be >= 1")
        unit, max_blocks = blocks_per_superblock or num_blocks, max_blocks or num_blocks
        assert num_blocks % unit == max_blocks % unit == 0, "a part of a superblock"
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self.more_blocks: Callable[[int], bool] = lambda num_blocks: False
        self.min_blocks = num_blocks  # that trading always leaves here
        self.num_queried_tokens = 0  # prompt tokens looked up in the prefix cache, ever
        self.num_hit_tokens = 0  # ... and found
        self.unused = UnusedBlocks(max_blocks // unit, unit, num_blocks // unit, clock)
        self._ref_counts = [0] * max_blocks
        self._hash_of: dict[int, bytes] = {}  # findable blocks, used or cached
        self._tokens_of: dict[int, list[int]] = {}  # same keys
        self._block_of: dict[bytes, int] = {}

    # --- counts ---------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return self.unused.num_blocks

    @property
    def num_available_blocks(self) -> int:
        """Free or cached: what an allocation can take."""
        return self.unused.num_available

    @property
    def num_cached_blocks(self) -> int:
        return self.unused.num_cached

    @property
    def num_used_blocks(self) -> int:
        return self.unused.num_used

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # --- a sequence's life ----------------------------------------------------------------------

    def allocate(self, seq: Sequence, *, keep_available: int = 0) -> bool:
        """Give `seq` blocks for all its tokens, shared ones first; sets its table and computed
        count.

        False, and nothing changes, unless at least `keep_available` blocks stay available
        afterwards.
        """
        assert not seq.block_table, f"sequence {seq.seq_id} holds blocks already"
        shared = self._find_prefix(seq)
        num_new = self.num_blocks_for(seq.num_tokens) - len(shared)
        num_revived = sum(1 for block in shared if self._ref_counts[block] == 0)
        if not self._is_available(num_new + num_revived + keep_available):
            return False
        for block in shared:
            if self._ref_counts[block] == 0:
                self.unused.revive(block)
            self._ref_counts[block] += 1
        # Sorted, since the LRU hands out a chain tail first: memory order follows token order.
        seq.block_table = shared + sorted(self._take() for _ in range(num_new))
        seq.num_computed_tokens = len(shared) * self.block_size
        seq.num_published_blocks = len(shared)
        if self.enable_prefix_cache:
            self.num_queried_tokens += seq.num_tokens
            self.num_hit_tokens += seq.num_computed_tokens
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Extend the table until it holds `num_tokens`. False, and nothing changes, if blocks
        lack.
        """
        num_new = self.num_blocks_for(num_tokens) - len(seq.block_table)
        if not self._is_available(num_new):
            return False
        seq.block_table.extend(self._take() for _ in range(num_new))
        return True

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        """Make findable the full blocks of the leading `num_tokens`, computed or now scheduled,
        as far as the tokens are known.

        A block whose contents another block has already, or that is to leave, stays private.
        """
        size = self.block_size
        begin, end = seq.num_published_blocks, min(num_tokens, len(seq.token_ids)) // size
        if begin >= end or not self.enable_prefix_cache:
            return
        seq.num_published_blocks = end
        hashes = block_hashes(seq, end, size)
        for index in range(begin, end):
            block, block_hash = seq.block_table[index], hashes[index]
            if block_hash in self._block_of or self.unused.is_closed(block):
                continue
            assert block not in self._hash_of, f"block {block} would change under its hash"
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            self._tokens_of[block] = seq.token_ids[index * size : (index + 1) * size]

    def free(self, seq: Sequence) -> None:
        """Take back all blocks; the contents of published ones stay findable."""
        # Tail first, so that of a chain the end is reused before the beginning it depends on.
        for block in reversed(seq.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self.unused.give_back(block, keep=block in self._hash_of)
        seq.block_table = []
        seq.num_computed_tokens = seq.num_published_blocks = 0

    def reset_prefix_cache(self) -> None:
        """Forget all contents. Running sequences keep their blocks, but nobody new finds them."""
        self.unused.drop_contents(list(self.unused.cached()))
        self._hash_of.clear()
        self._tokens_of.clear()
        self._block_of.clear()

    def close(self, superblock: int) -> None:
        """It is to leave: nobody new gets or finds a block of it."""
        blocks = self.unused.blocks_of(superblock)
        findable = [block for block in blocks if block in self._hash_of]
        for block in findable:
            self._forget(block)
        self.unused.drop_contents([b for b in findable if self._ref_counts[b] == 0])
        self.unused.close(superblock)

    # --- inside ---------------------------------------------------------------------------------

    def _find_prefix(self, seq: Sequence) -> list[int]:
        if not self.enable_prefix_cache or seq.needs_all_rows:
            return []  # prompt log-probabilities need every prompt token computed
        size = self.block_size
        max_blocks = (seq.num_tokens - 1) // size
        found: list[int] = []
        for index, block_hash in enumerate(block_hashes(seq, max_blocks, size)[:max_blocks]):
            block = self._block_of.get(block_hash)
            if block is None:
                break
            if self._tokens_of[block] != seq.token_ids[index * size : (index + 1) * size]:
                break  # a hash collision: a miss like any other
            found.append(block)
        return found

    def _is_available(self, num_blocks: int) -> bool:
        lacking = num_blocks - self.num_available_blocks
        return lacking <= 0 or self.more_blocks(lacking)

    def _take(self) -> int:
        block, was_cached = self.unused.take()
        if was_cached:
            self._forget(block)
        self._ref_counts[block] = 1
        return block

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]
            del self._tokens_of[block]

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """Assert that the books agree with the tables of all `sequences`. O(blocks): for tests
        and idle time.
        """
        holders = Counter(block for seq in sequences for block in seq.block_table)
        assert Counter(dict(enumerate(self._ref_counts))) == holders, "ref counts"
        self.unused.check_invariants()
        free, cached = set(self.unused.free()), set(self.unused.cached())
        unused = free | cached | set(self.unused.withdrawn())
        owned = {b for s in self.unused.owned for b in self.unused.blocks_of(s)}
        assert unused == {b for b in owned if not holders[b]}, "lost blocks"
        assert holders.keys() <= owned, "a block in use is not owned"
        assert not any(b in self._hash_of for b in unused - cached), "a free block is findable"
        assert all(b in self._hash_of for b in cached), "a cached block cannot be found"
        assert self._block_of == {h: b for b, h in self._hash_of.items()}, "hash maps disagree"
        assert self._tokens_of.keys() == self._hash_of.keys(), "token map disagrees"
