"""Residency: who loads, who stays, who goes, and that everybody who waits is served."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from loraplex.adapters import books
from loraplex.adapters.books import WantFailed
from loraplex.adapters.errors import AdapterError, AdapterNotFound
from loraplex.adapters.residency import (
    AdapterSize,
    AdapterState,
    LoadDone,
    Phase,
    Stage,
    Transition,
)
from loraplex.adapters.slots import AdapterSlots

SIZES = {"a": 10, "b": 10, "c": 10, "d": 20, "e": 30}


class FakeLoader:
    """Checks that it is asked for sensible things only; loads end when told to."""

    def __init__(self, device_bytes: int) -> None:
        self.device_bytes = device_bytes
        self.images: set[str] = set()
        self.device: set[str] = set()
        self.under_way: dict[str, Stage] = {}
        self.begun: list[str] = []
        self.forgotten: list[str] = []
        self.phases: dict[Stage, dict[Phase, float]] = {Stage.HOST: {}, Stage.DEVICE: {}}
        self._done: list[LoadDone] = []

    def describe(self, digest: str) -> AdapterSize:
        if digest not in SIZES:
            raise AdapterNotFound(f"no adapter {digest} in the store")
        return AdapterSize(16, 1, SIZES[digest], SIZES[digest])

    def begin_host_load(self, digest: str) -> None:
        assert digest not in self.under_way
        assert digest not in self.images
        self.under_way[digest] = Stage.HOST
        self.begun.append(digest)

    def begin_device_load(self, digest: str) -> None:
        assert digest not in self.under_way
        assert digest in self.images
        assert digest not in self.device
        self.device.add(digest)
        assert sum(SIZES[d] for d in self.device) <= self.device_bytes
        self.under_way[digest] = Stage.DEVICE
        self.begun.append(digest)

    def finish(self, digest: str, *, ok: bool = True) -> None:
        stage = self.under_way.pop(digest)
        if ok and stage is Stage.HOST:
            self.images.add(digest)
        if not ok and stage is Stage.DEVICE:
            self.device.remove(digest)
        error = "" if ok else "broken"
        self._done.append(LoadDone(digest, stage, ok, 0.5, error, phases=self.phases[stage]))

    def drop_device(self, digest: str) -> int:
        assert digest not in self.under_way
        self.device.remove(digest)
        return SIZES[digest]

    def drop_host(self, digest: str) -> int:
        assert digest not in self.under_way
        self.images.remove(digest)
        return SIZES[digest]

    def forget(self, digest: str) -> None:
        assert digest not in self.under_way
        assert digest not in self.images
        assert digest not in self.device
        self.forgotten.append(digest)

    def poll(self) -> list[LoadDone]:
        done, self._done = self._done, []
        return done


class Bench:
    def __init__(
        self, device_bytes: int = 30, host_bytes: int = 60, device_bytes_max: int | None = None
    ) -> None:
        self.now = 100.0
        self.loader = FakeLoader(device_bytes)
        self.transitions: list[Transition] = []
        self.slots = AdapterSlots(
            self.loader,
            device_bytes_total=device_bytes,
            host_bytes_total=host_bytes,
            device_bytes_max=device_bytes_max,
            on_transition=self.transitions.append,
            patience_s=1.0,
            clock=lambda: self.now,
        )

    @property
    def changes(self) -> list[tuple[str, str, str, float]]:
        return [(t.digest, t.before.value, t.after.value, t.seconds) for t in self.transitions]

    def states(self) -> dict[str, str]:
        return {r.digest: r.state.value for r in self.slots.residents()}

    def settle(self) -> list[WantFailed]:
        """Let every load end well until nothing moves."""
        failed = self.slots.advance()
        for _ in range(50):
            if not self.loader.under_way:
                return failed
            for digest in list(self.loader.under_way):
                self.loader.finish(digest)
            failed += self.slots.advance()
            self.slots.check_invariants()
        raise AssertionError("adapters come and go for ever")

    def bring(self, *digests: str, rank: int = 1000) -> None:
        for digest in digests:
            self.slots.want(rank, [digest])
            self.settle()
            self.slots.unwant(rank)


def test_a_want_goes_through_the_states_and_is_ready() -> None:
    bench = Bench()
    bench.slots.want(1, ["a"])
    bench.slots.advance()
    bench.now += 2
    bench.loader.finish("a")
    bench.slots.advance()
    assert not bench.slots.is_ready(["a"])
    bench.settle()
    assert bench.slots.is_ready(["a"])
    assert bench.changes == [
        ("a", "absent", "host_loading", 0.0),
        ("a", "host_loading", "host", 2.0),
        ("a", "host", "device_loading", 0.0),
        ("a", "device_loading", "device", 0.0),
    ]
    assert (bench.slots.num_loads, bench.slots.load_seconds) == (1, 1.0)


def test_what_a_load_took_is_told_by_phase_from_the_first_want_on() -> None:
    bench = Bench()
    bench.loader.phases = {
        Stage.HOST: {Phase.QUEUE: 0.25, Phase.READ: 2.0, Phase.VERIFY: 0.5},
        Stage.DEVICE: {Phase.QUEUE: 0.25, Phase.COPY: 1.0},
    }
    bench.now += 1000  # on disk for long: nobody waited
    bench.slots.want(1, ["a"])
    bench.now += 3
    bench.slots.want(2, ["a"])
    bench.slots.advance()
    bench.loader.finish("a")  # took 0.5 s, and was taken in after a long step
    bench.now += 2.5
    bench.settle()
    assert bench.transitions[-1].phases == {
        Phase.QUEUE: 5.5,
        Phase.READ: 2.0,
        Phase.VERIFY: 0.5,
        Phase.COPY: 1.0,
    }
    assert not any(change.phases for change in bench.transitions[:-1])
    # From the host it is a copy only: what was read once is not told again.
    for rank in (1, 2):
        bench.slots.unwant(rank)
    bench.slots.evict_device("a", drain=False)
    bench.bring("a")
    assert bench.transitions[-1].phases == {Phase.QUEUE: 0.25, Phase.COPY: 1.0}


def test_why_one_left_the_device_is_told() -> None:
    def reasons() -> list[str]:
        return [t.reason for t in bench.transitions if t.reason]

    bench = Bench(device_bytes=10, host_bytes=10)
    bench.bring("a", "b")
    assert reasons() == ["room"]
    bench.slots.evict_device("b", drain=False)
    assert reasons() == ["room", "order"]
    bench.bring("a")
    bench.slots.forget("a")
    assert reasons() == ["room", "order", "deleted"]
    bench.slots.want(1, ["c"])
    bench.slots.advance()
    bench.loader.finish("c", ok=False)
    bench.slots.advance()
    assert reasons()[3:] == ["adapter_load_failed"]


def test_joined_loads_and_refusals_are_counted() -> None:
    bench = Bench()
    bench.slots.want(1, ["a"])
    bench.slots.want(2, ["a"])
    bench.slots.advance()
    bench.slots.want(3, ["a"])
    bench.settle()
    bench.slots.want(4, ["a"])
    assert bench.slots.num_joins == 2
    bench.slots.want(5, ["b"])
    bench.slots.advance()
    bench.loader.finish("b", ok=False)
    bench.slots.advance()
    for _ in range(3):
        with pytest.raises(AdapterError, match="broken"):
            bench.slots.check(["b"])
    assert bench.slots.num_refusals == 3


def test_books_of_those_that_are_nowhere_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "MAX_BOOKS", 16)
    many = {f"m{i}": 10 for i in range(100)}
    monkeypatch.setattr(f"{__name__}.SIZES", {**SIZES, **many})
    bench = Bench(device_bytes=30, host_bytes=30)
    bench.bring("a", "m0")  # these stay: on the device,
    bench.slots.pin("b")  # pinned,
    bench.slots.want(1, ["c"])  # wanted,
    bench.slots.check(["d"])
    bench.slots.refuse("d", True)  # being deleted
    for digest in many:
        bench.slots.check([digest])
        assert len(bench.slots.residents()) <= 16
        bench.slots.check_invariants()
    kept = {r.digest for r in bench.slots.residents()}
    assert {"a", "m0", "b", "c", "d", "m98", "m99"} <= kept
    assert bench.loader.forgotten[:3] == ["m1", "m2", "m3"], "the oldest first"
    assert kept.isdisjoint(bench.loader.forgotten)
    bench.bring("m1")  # begins anew
    assert bench.slots.is_ready(["m1"])


def test_many_wants_cause_one_load() -> None:
    bench = Bench()
    for i in range(5):
        bench.slots.want(i, ["a"])
        bench.slots.advance()
    assert bench.loader.begun == ["a"]


def test_the_unwanted_go_first_longest_unused_first() -> None:
    bench = Bench()
    bench.bring("a", "b", "c")
    bench.slots.acquire(["a"])
    bench.slots.release(["a"])
    bench.slots.want(5, ["d"])  # needs two of the three places
    bench.settle()
    assert bench.states() == {"a": "device", "b": "host", "c": "host", "d": "device"}
    assert bench.slots.get("b").evictions == 1  # type: ignore[union-attr]


def test_what_is_used_often_outlives_what_was_used_last() -> None:
    bench = Bench()
    bench.bring("a", "b", "c")
    for digest in ("a", "a", "a", "b", "c"):
        bench.slots.acquire([digest])
        bench.slots.release([digest])
    bench.slots.want(5, ["d"])  # needs two of the three places
    bench.settle()
    assert bench.states() == {"a": "device", "b": "host", "c": "host", "d": "device"}


def test_what_has_no_host_image_is_dearer_to_evict() -> None:
    bench = Bench(host_bytes=0)
    bench.bring("a")
    assert bench.slots.get("a").has_host_image is False  # type: ignore[union-attr]
    books = bench.slots._books
    bench.slots.acquire(["a"])
    bench.slots.release(["a"])
    alone = books.worth(books.residents["a"], Stage.DEVICE)
    books.residents["a"].has_host_image = True
    assert books.worth(books.residents["a"], Stage.DEVICE) == alone / 2 > 0


def test_what_runs_is_pinned_or_wanted_earlier_stays() -> None:
    bench = Bench()
    bench.bring("a", "b", "c")
    bench.slots.acquire(["a"])
    bench.slots.pin("b")
    bench.slots.want(1, ["c"])
    bench.slots.want(2, ["d"])
    bench.settle()
    assert bench.states() == {"a": "device", "b": "device", "c": "device", "d": "host"}
    assert bench.slots.waits_for_room(["d"])
    bench.slots.unwant(1)
    bench.slots.release(["a"])
    bench.settle()
    assert bench.states() == {"a": "host", "b": "device", "c": "host", "d": "device"}


def test_an_earlier_want_takes_the_place_of_a_later_one() -> None:
    bench = Bench(device_bytes=10)
    bench.slots.want(5, ["a"])
    bench.settle()
    bench.slots.want(1, ["b"])
    bench.settle()
    assert bench.states() == {"a": "host", "b": "device"}


def test_of_the_wanted_the_latest_goes_first() -> None:
    bench = Bench(device_bytes=20)
    bench.slots.want(9, ["b"])
    bench.slots.want(5, ["a"])
    bench.settle()
    bench.slots.want(1, ["c"])
    bench.settle()
    assert bench.states() == {"a": "device", "b": "host", "c": "device"}
    assert bench.slots.num_evictions == 1


def test_members_of_one_composition_do_not_evict_each_other() -> None:
    bench = Bench(device_bytes=20)
    bench.bring("c")
    bench.slots.acquire(["c"])
    bench.slots.want(1, ["a", "b"])
    bench.settle()
    assert bench.states() == {"a": "device", "b": "host", "c": "device"}
    assert bench.slots.num_evictions == 0


def test_no_more_is_drained_than_needed() -> None:
    bench = Bench(device_bytes=30)
    bench.bring("a", "b", "c")
    bench.slots.acquire(["a", "a", "b", "c"])
    bench.slots.want(1, ["d"])
    bench.settle()
    bench.now += 1.5
    bench.settle()
    bench.slots.release(["a"])  # makes it plan again
    bench.settle()
    assert bench.states() == {"a": "device", "b": "draining", "c": "draining", "d": "host"}


def test_patience_ends_in_draining_a_busy_adapter() -> None:
    bench = Bench(device_bytes=10)
    bench.bring("a")
    bench.slots.acquire(["a"])
    bench.slots.want(1, ["b"])
    bench.settle()
    assert bench.slots.is_ready(["a"])
    bench.now += 1.5
    bench.settle()
    assert bench.states() == {"a": "draining", "b": "host"}
    assert not bench.slots.is_ready(["a"])
    bench.slots.release(["a"])
    bench.settle()
    assert bench.states() == {"a": "host", "b": "device"}


def test_a_failure_ends_its_wants_and_backs_off() -> None:
    bench = Bench()
    bench.slots.want(1, ["a"])
    bench.slots.want(2, ["a", "b"])
    bench.slots.want(3, ["b"])
    bench.slots.advance()
    bench.loader.finish("a", ok=False)
    failed = bench.slots.advance()
    assert [(f.rank, f.code, f.message) for f in failed] == [
        (1, "adapter_load_failed", "broken"),
        (2, "adapter_load_failed", "broken"),
    ]
    for wait_s in (1, 2, 4):  # doubles with each failure in a row
        bench.now += wait_s - 0.5
        with pytest.raises(AdapterError, match="broken; tried again in"):
            bench.slots.check(["a"])
        bench.now += 0.5
        bench.slots.check(["a"])
        bench.slots.want(9, ["a"])
        bench.slots.advance()
        bench.loader.finish("a", ok=False)
        bench.slots.advance()
    bench.slots.retry("a")
    bench.slots.check(["a"])
    bench.slots.want(9, ["a"])
    assert bench.settle() == []
    assert bench.slots.is_ready(["a"])


def test_a_failed_device_load_gives_its_room_back() -> None:
    bench = Bench(device_bytes=10)
    bench.slots.want(1, ["a"])
    bench.slots.advance()
    bench.loader.finish("a")
    bench.slots.advance()
    bench.loader.finish("a", ok=False)
    bench.slots.advance()
    bench.slots.check_invariants()
    assert (bench.slots.device_bytes_used, bench.slots.host_bytes_used) == (0, 0)


@pytest.mark.parametrize("host_bytes", [0, 10, 60])
def test_loads_work_with_any_host_budget(host_bytes: int) -> None:
    bench = Bench(device_bytes=30, host_bytes=host_bytes)
    for i, digest in enumerate("abcde"):
        bench.slots.want(i, [digest])
        bench.settle()
        bench.slots.unwant(i)
        assert bench.slots.is_ready([digest])
        assert bench.slots.host_bytes_used <= host_bytes


def test_evicting_to_the_host_makes_the_next_load_skip_the_file() -> None:
    bench = Bench()
    bench.bring("a")
    assert bench.slots.evict_device("a", drain=False) == 10
    bench.loader.begun.clear()
    bench.bring("a")
    assert bench.loader.begun == ["a"]  # one stage, not two
    assert bench.slots.evict_device("a", drain=False) == 10
    assert bench.slots.evict_host("a") == 10
    assert bench.states() == {"a": "absent"}
    assert bench.slots.evict_device("a", drain=False) == 0


def test_nothing_is_dropped_while_it_loads() -> None:
    bench = Bench()
    bench.slots.want(1, ["a"])
    bench.slots.advance()
    bench.slots.unwant(1)
    assert bench.slots.evict_host("a") is None
    assert bench.slots.forget("a") is None
    bench.settle()
    assert bench.slots.forget("a") == (0, 10)
    assert bench.slots.residents() == []


def test_orders_that_cannot_be() -> None:
    bench = Bench()
    bench.bring("a")
    bench.slots.acquire(["a"])
    for order, code in (
        (lambda: bench.slots.evict_device("a", drain=False), "adapter_in_use"),
        (lambda: bench.slots.check(["nobody"]), "adapter_not_found"),
        (lambda: bench.slots.check(["d", "e"]), "adapter_too_large"),
        (lambda: bench.slots.pin("nobody"), "adapter_not_found"),
    ):
        with pytest.raises(AdapterError) as caught:
            order()
        assert caught.value.code == code
    bench.slots.pin("a")
    with pytest.raises(AdapterError, match=r"30 bytes.*10 bytes of 1 pinned.*30 bytes") as caught:
        bench.slots.pin("e")
    assert caught.value.code == "adapter_no_room"
    with pytest.raises(AdapterError, match=r"needs 30 bytes.*1 pinned adapters hold 10 of 30"):
        bench.slots.check(["e"])


class FakeLender:
    """Has so many bytes to give, at once or when told to; and asks for some back."""

    def __init__(self, bench: Bench, num_bytes: int) -> None:
        self.bench = bench
        self.left = num_bytes
        self.bytes_coming = 0
        self.is_slow = False
        self.insisted = 0
        self.asked: list[tuple[int, float | None]] = []

    def lend(self, num_bytes: int, unused_since: float | None = None) -> None:
        self.asked.append((num_bytes, unused_since))
        given = min(self.left, -(-num_bytes // 10) * 10)
        self.left -= given
        self.bytes_coming += given
        if not self.is_slow:
            self.arrive()

    def arrive(self) -> None:
        self.bench.loader.device_bytes += self.bytes_coming
        total = self.bench.slots.device_bytes_total + self.bytes_coming
        self.bytes_coming = 0
        self.bench.slots.resize_device(total)

    def take_back(self) -> None:
        slots = self.bench.slots
        if slots.device_bytes_total - slots.device_bytes_used >= 10:
            self.bench.loader.device_bytes -= 10
            slots.resize_device(slots.device_bytes_total - 10)
            self.left += 10

    def insist(self, num_bytes: int) -> None:
        self.insisted = num_bytes

    def enough(self) -> None:
        self.insisted = 0


def lent(num_bytes: int, device_bytes: int = 20) -> tuple[Bench, FakeLender]:
    bench = Bench(device_bytes, device_bytes_max=device_bytes + num_bytes)
    lender = bench.slots.lender = FakeLender(bench, num_bytes)
    return bench, lender


def test_what_is_lent_spares_an_eviction() -> None:
    bench, lender = lent(10)
    bench.bring("a", "b", "c")
    assert bench.states() == {"a": "device", "b": "device", "c": "device"}
    assert lender.asked == [(10, None)], "first what holds nothing"
    bench.bring("d")
    assert bench.slots.num_evictions == 2
    assert [since for _, since in lender.asked[1:]] == [None, 100.0, 100.0], "as old as each victim"


def test_nothing_is_evicted_while_lent_memory_is_on_its_way() -> None:
    bench, lender = lent(10)
    lender.is_slow = True
    bench.bring("a", "b")
    bench.slots.want((0, 1), ["c"])
    bench.settle()
    assert (lender.bytes_coming, bench.slots.num_evictions) == (10, 0)
    assert bench.slots.waits_for_room(["c"])
    lender.arrive()
    bench.settle()
    assert bench.slots.is_ready(["c"])
    assert bench.slots.num_evictions == 0


def test_one_too_large_for_now_insists_and_one_too_large_for_ever_is_refused() -> None:
    bench, lender = lent(20, device_bytes=10)
    lender.left = 0
    bench.slots.check(["e"])
    bench.slots.want((0, 1), ["e"])
    bench.settle()
    assert lender.insisted == 0
    bench.now += 1.5
    bench.settle()
    assert lender.insisted == 20
    bench.slots.unwant((0, 1))
    bench.settle()
    assert lender.insisted == 0, "nobody wants it any more"
    with pytest.raises(AdapterError, match="more than the 30 bytes"):
        bench.slots.check(["d", "e"])


class SlotsMachine(RuleBasedStateMachine):
    """Sequences come, wait, run and go; loads end or fail; operators pin and evict."""

    @initialize(device_bytes=st.sampled_from([30, 40]), host_bytes=st.sampled_from([0, 20, 90]))
    def build(self, device_bytes: int, host_bytes: int) -> None:
        self.bench = Bench(device_bytes, host_bytes)
        self.waiting: dict[tuple[int, int], list[str]] = {}
        self.running: list[list[str]] = []
        self.num_wants = 0

    def advance(self) -> None:
        for failed in self.bench.slots.advance():
            del self.waiting[failed.rank]

    @rule(
        digests=st.lists(st.sampled_from("abcde"), min_size=1, max_size=2, unique=True),
        priority=st.sampled_from([0, 0, -1]),
    )
    def want(self, digests: list[str], priority: int) -> None:
        try:
            self.bench.slots.check(digests)
        except AdapterError:
            return
        rank = priority * 1000 + self.num_wants
        self.num_wants += 1
        self.bench.slots.want(rank, digests)
        self.waiting[rank] = digests

    @rule(data=st.data())
    @precondition(lambda self: self.waiting)
    def cancel(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[rank]
        self.bench.slots.unwant(rank)

    @rule(limit=st.integers(1, 3))
    def admit(self, limit: int) -> None:
        for rank in sorted(self.waiting):
            if limit and self.bench.slots.is_ready(self.waiting[rank]):
                limit -= 1
                digests = self.waiting.pop(rank)
                self.bench.slots.acquire(digests)
                self.bench.slots.unwant(rank)
                self.running.append(digests)

    @rule(data=st.data())
    @precondition(lambda self: self.running)
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.running) - 1))
        self.bench.slots.release(self.running.pop(index))

    @rule(seconds=st.sampled_from([0.1, 1.1, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.bench.now += seconds
        self.advance()

    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    @precondition(lambda self: self.bench.loader.under_way)
    def load_ends(self, data: st.DataObject, ok: bool) -> None:
        digest = data.draw(st.sampled_from(sorted(self.bench.loader.under_way)))
        self.bench.loader.finish(digest, ok=ok)
        self.advance()

    @rule(
        order=st.sampled_from(["pin", "unpin", "evict", "drain", "undrain", "host", "forget"]),
        digest=st.sampled_from("abcde"),
    )
    def operate(self, order: str, digest: str) -> None:
        slots = self.bench.slots
        orders: dict[str, Any] = {
            "pin": lambda: slots.pin(digest),
            "unpin": lambda: slots.unpin(digest),
            "evict": lambda: slots.evict_device(digest, drain=False),
            "drain": lambda: slots.evict_device(digest, drain=True),
            "undrain": lambda: slots.stop_draining(digest),
            "host": lambda: slots.evict_host(digest),
            "forget": lambda: slots.forget(digest),
        }
        try:
            orders[order]()
        except AdapterError as error:
            allowed = {"adapter_in_use", "adapter_pinned", "adapter_no_room"}
            if error.code not in allowed:
                raise

    @invariant()
    def books_agree_with_the_loader(self) -> None:
        if not hasattr(self, "bench"):
            return
        slots, loader = self.bench.slots, self.bench.loader
        slots.check_invariants()
        assert sum(SIZES[d] for d in loader.device) == slots.device_bytes_used
        assert loader.images == {r.digest for r in slots.residents() if r.has_host_image}
        for digests in self.running:
            assert loader.device.issuperset(digests)

    def teardown(self) -> None:
        """Nobody starves: with loads that work and sequences that end, every want comes true."""
        if not hasattr(self, "bench"):
            return
        bench = self.bench
        for digest in SIZES:
            bench.slots.unpin(digest)
            bench.slots.stop_draining(digest)
        for _ in range(20 * (len(self.waiting) + 1)):
            bench.now += 1.1
            for digest in list(bench.loader.under_way):
                bench.loader.finish(digest)
            self.advance()
            self.admit(limit=100)
            if self.running:
                bench.slots.release(self.running.pop())
        assert not self.waiting
        assert not self.running
        assert all(r.state is not AdapterState.DRAINING for r in bench.slots.residents())


class LentSlotsMachine(SlotsMachine):
    """Memory comes from a lender, late or at once, and goes back to it."""

    @initialize(given=st.sampled_from([10, 20]), host_bytes=st.sampled_from([0, 90]))
    def build(self, given: int, host_bytes: int) -> None:  # type: ignore[override]
        super().build(30, host_bytes)
        self.bench = Bench(30, host_bytes, 30 + given)
        self.lender = self.bench.slots.lender = FakeLender(self.bench, given)

    @rule(is_slow=st.booleans())
    def lender_changes(self, is_slow: bool) -> None:
        self.lender.is_slow = is_slow

    @rule()
    def memory_arrives(self) -> None:
        self.lender.arrive()
        self.advance()

    @rule()
    def memory_goes(self) -> None:
        self.lender.take_back()

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.lender.is_slow = False
            self.lender.arrive()
        super().teardown()


def test_any_order_of_events_with_a_lender() -> None:
    run_state_machine_as_test(
        LentSlotsMachine, settings=settings(max_examples=60, stateful_step_count=50, deadline=None)
    )


def test_any_order_of_events() -> None:
    run_state_machine_as_test(
        SlotsMachine, settings=settings(max_examples=150, stateful_step_count=50, deadline=None)
    )
