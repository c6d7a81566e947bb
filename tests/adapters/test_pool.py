"""The page pool: what is installed reads back through the tables, and memory is neither lost nor
shared.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.pool import PAGE_RANKS, PagePool, SharedArena, frame_elements
from loraplex.adapters.weights import LoadedAdapter, LoadedModule

SHAPES = ((12, 8), (12, 6), (12, 6), (8, 12), (12, 20), (12, 20), (20, 12))
NUM_LAYERS = 2
FRAME_BYTES = frame_elements(SHAPES) * 4


def make_pool(num_frames: int = 12) -> PagePool:
    cpu = torch.device("cpu")
    return PagePool(NUM_LAYERS, SHAPES, num_frames * FRAME_BYTES, torch.float32, cpu)


def make_adapter(digest: str, ranks: dict[tuple[int, int], int], seed: int = 0) -> LoadedAdapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        (layer, kind): LoadedModule(
            a=torch.randn(rank, SHAPES[kind][0], generator=generator),
            bt=torch.randn(rank, SHAPES[kind][1], generator=generator),
            rank=rank,
            scaling=0.5 + kind + 10 * layer,
        )
        for (layer, kind), rank in ranks.items()
    }
    return LoadedAdapter(digest, max(ranks.values()), modules)


def everywhere(rank: int) -> dict[tuple[int, int], int]:
    return {(layer, kind): rank for layer in range(NUM_LAYERS) for kind in range(len(SHAPES))}


def assert_readable(pool: PagePool, loaded: LoadedAdapter) -> None:
    """Every weight, read back the way a kernel reads it; nothing where nothing was given."""
    pages = pool.pages(loaded.digest)
    for layer in range(NUM_LAYERS):
        for kind, shape in enumerate(SHAPES):
            module = loaded.modules.get((layer, kind))
            for index, page in enumerate(pages):
                live = 0
                if module is not None:
                    live = min(max(module.rank - index * PAGE_RANKS, 0), PAGE_RANKS)
                assert pool.live_ranks[page, layer, kind] == live
                for table, weight, width in (
                    (pool.offset_a, module and module.a, shape[0]),
                    (pool.offset_b, module and module.bt, shape[1]),
                ):
                    start = int(table[page, layer, kind])
                    if live == 0:
                        assert start == -1
                        continue
                    assert module is not None
                    assert weight is not None
                    tile = pool.arena[start : start + PAGE_RANKS * width].view(PAGE_RANKS, width)
                    first = index * PAGE_RANKS
                    assert torch.equal(tile[:live], weight[first : first + live])
                    assert not tile[live:].any(), "rows past the live ranks are zero"
                    assert pool.scaling[page, layer, kind] == module.scaling


@pytest.mark.parametrize("rank", [1, 8, 16, 17, 24, 64])
def test_installed_weights_read_back(rank: int) -> None:
    pool = make_pool()
    loaded = make_adapter("a", everywhere(rank))
    pages = pool.install("a", pool.build_image(loaded))
    assert len(pages) == -(-rank // PAGE_RANKS)
    assert_readable(pool, loaded)
    assert pool.adapted("a") == frozenset(everywhere(rank))
    pool.check_invariants()


def test_ranks_may_differ_by_module() -> None:
    pool = make_pool()
    loaded = make_adapter("a", {(0, 0): 20, (1, 6): 3, (1, 2): 33})
    pool.install("a", pool.build_image(loaded))
    assert_readable(pool, loaded)
    pool.check_invariants()


def test_a_full_adapter_wastes_nothing_and_a_small_one_takes_less() -> None:
    pool = make_pool()
    full, small = pool.layout(everywhere(32)), pool.layout({(0, 0): 4})
    assert pool.device_bytes(full) == 2 * pool.page_bytes == 4 * FRAME_BYTES
    assert pool.host_bytes(full) == pool.device_bytes(full)
    assert pool.device_bytes(small) == FRAME_BYTES


def test_only_what_is_published_is_seen() -> None:
    pool = make_pool()
    loaded = make_adapter("a", everywhere(8))
    image = pool.build_image(loaded)
    before = pool.version
    pool.reserve("a", image.layout)
    pool.copy("a", image)
    assert "a" not in pool
    assert pool.version == before
    assert not pool.live_ranks.any()
    pool.publish("a", image)
    assert "a" in pool
    assert pool.version > before


def test_a_load_given_up_returns_its_frames() -> None:
    pool = make_pool()
    pool.reserve("a", pool.layout(everywhere(16)))
    assert pool.bytes_used == 2 * FRAME_BYTES
    assert pool.remove("a") == 2 * FRAME_BYTES
    assert pool.bytes_used == 0
    pool.check_invariants()


def test_a_full_pool_says_what_would_help() -> None:
    pool = make_pool(num_frames=3)
    pool.install("a", pool.build_image(make_adapter("a", everywhere(16))))
    with pytest.raises(AdapterError, match="--adapter-memory") as caught:
        pool.reserve("b", pool.layout(everywhere(16)))
    assert caught.value.code == "adapter_memory"
    pool.check_invariants()


def test_a_pool_too_small_for_one_frame_is_refused() -> None:
    with pytest.raises(AdapterError, match="--adapter-memory"):
        make_pool(num_frames=0)


def test_a_copy_under_way_keeps_its_superblock() -> None:
    """Frames may be given back while their last bytes still come; their memory may not be."""

    class Slow:
        is_complete = False

    pool = make_pool()
    pool._transport.expect = lambda num_layers: slow  # type: ignore[method-assign,assignment,return-value]
    slow = Slow()
    pool.reserve("a", pool.layout(everywhere(16)))
    pool.remove("a")
    assert not pool.frames.holders(0)
    assert not pool.is_quiet(0)
    slow.is_complete = True
    assert pool.is_quiet(0)


class PoolMachine(RuleBasedStateMachine):
    """Adapters of random shapes come and go in any order, some in the middle of their load."""

    digests: Bundle[str] = Bundle("digests")

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(num_frames=10)
        self.published: dict[str, LoadedAdapter] = {}
        self.loading: dict[str, LoadedAdapter] = {}
        self.count = 0

    keys = st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(0, len(SHAPES) - 1))

    @rule(
        target=digests,
        ranks=st.dictionaries(keys, st.integers(1, 40), min_size=1, max_size=14),
        seed=st.integers(0, 99),
    )
    def reserve(self, ranks: dict[tuple[int, int], int], seed: int) -> object:
        self.count += 1
        loaded = make_adapter(f"adapter-{self.count}", ranks, seed)
        layout = self.pool.layout(ranks)
        fits = self.pool.bytes_used + self.pool.device_bytes(layout) <= self.pool.bytes_total
        if not fits:
            with pytest.raises(AdapterError):
                self.pool.reserve(loaded.digest, layout)
            return multiple()
        self.pool.reserve(loaded.digest, layout)
        self.loading[loaded.digest] = loaded
        return loaded.digest

    @rule(digest=digests)
    def finish(self, digest: str) -> None:
        if digest in self.loading:
            loaded = self.loading.pop(digest)
            image = self.pool.build_image(loaded)
            self.pool.copy(digest, image)
            self.pool.publish(digest, image)
            self.published[digest] = loaded

    @rule(digest=digests)
    def remove(self, digest: str) -> None:
        if digest in self.loading or digest in self.published:
            used = self.pool.bytes_used
            assert self.pool.remove(digest) == used - self.pool.bytes_used
            self.loading.pop(digest, None)
            self.published.pop(digest, None)

    @invariant()
    def sound(self) -> None:
        self.pool.check_invariants()
        for loaded in self.published.values():
            assert_readable(self.pool, loaded)


class SharedPoolMachine(PoolMachine):
    """Superblocks of five frames come and go, with a rest at their end; some hold what the KV cache
    left there.
    """

    FRAMES, SUPERBLOCKS = 5, 4

    def __init__(self) -> None:
        super().__init__()
        unit = self.FRAMES * FRAME_BYTES + 512
        memory = torch.full((self.SUPERBLOCKS * unit,), 255, dtype=torch.uint8)
        arena = SharedArena(memory, unit, num_owned=2)
        cpu = torch.device("cpu")
        self.pool = PagePool(NUM_LAYERS, SHAPES, 0, torch.float32, cpu, arena)

    @rule(superblock=st.integers(0, SUPERBLOCKS - 1))
    def trade(self, superblock: int) -> None:
        frames = self.pool.frames
        if superblock not in frames.owned:
            frames.add(superblock)
        elif not frames.holders(superblock) and len(frames.owned) > 1:
            frames.remove(superblock)
            self.pool.superblock(superblock).view(torch.uint8).fill_(255)

    @invariant()
    def sizes_follow(self) -> None:
        assert self.pool.bytes_total == len(self.pool.frames.owned) * self.FRAMES * FRAME_BYTES
        assert self.pool.bytes_total <= self.pool.bytes_max


SharedPoolMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=16, deadline=None
)
test_shared_pool_machine = SharedPoolMachine.TestCase
PoolMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
test_pool_machine = PoolMachine.TestCase
