"""Who goes on after a death, who is suspected, who is convicted. No processes."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models

from loraplex.engine.api import (
    AdapterUse,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceOutput,
)
from loraplex.engine.errors import AdapterUnavailable, EngineError
from loraplex.engine.flight_recorder import FlightRecord, FlightRecorder, Hand
from loraplex.engine.recovery import Live, Recovery
from loraplex.engine.stream import Stream
from loraplex.engine.tokenizer import Tokenizer

RAW = RawTokenizer(models.BPE(vocab={chr(ord("a") + i): i for i in range(26)}, merges=[]))
RAW.decoder = decoders.Fuse()
TOKENIZER = Tokenizer(RAW.to_str(), {})


class World:
    """A recovery, and an engine that is a list of what was submitted to it."""

    def __init__(self) -> None:
        self.submitted: list[GenerationRequest] = []
        self.recovery = Recovery(self.submitted.extend)

    def add(self, serial: int, adapter: str = "") -> Live:
        request = GenerationRequest(
            request_id=f"r#{serial}",
            prompt_token_ids=[0],
            sampling=SamplingParams(max_tokens=100),
            adapters=(AdapterUse(adapter),) if adapter else (),
        )
        live = Live(serial, request, Stream(request, TOKENIZER))
        self.recovery.live[request.request_id] = live
        self.submitted.append(request)
        return live

    def token(self, live: Live, finish: FinishReason | None = None) -> None:
        live.stream.feed(
            SequenceOutput(request_id=live.request.request_id, token_ids=[1], finish_reason=finish)
        )
        if finish is not None:
            self.recovery.leave(live.request.request_id)
        elif live is self.recovery.on_trial:
            self.recovery.try_next()

    def die(self, *in_hand: Live) -> None:
        self.submitted.clear()
        self.recovery.died({live.serial for live in in_hand}, "signal 9")
        self.recovery.back()

    @property
    def serials(self) -> list[int]:
        return [int(request.request_id[2:]) for request in self.submitted]


async def error_of(live: Live) -> EngineError:
    try:
        while True:
            await live.stream.next()
    except EngineError as error:
        return error


def test_all_go_on_with_what_they_have():
    world = World()
    lives = [world.add(i) for i in range(1, 5)]
    world.token(lives[0])
    world.token(lives[0])
    world.die(*lives[:3])
    assert world.serials == [1, 2, 3, 4]
    assert world.submitted[0].output_token_ids == [1, 1]
    assert world.submitted[1].output_token_ids == []
    assert world.recovery.num_resumed == 4


async def test_the_one_it_dies_of_is_found_among_many():
    world = World()
    lives = [world.add(i) for i in range(1, 33)]
    killer = lives[20]
    deaths = 0
    while killer.request.request_id in world.recovery.live:
        in_engine = [live for live in lives if live.serial in world.serials]
        if killer in in_engine:
            world.die(*in_engine)
            deaths += 1
            continue
        for live in in_engine:
            world.token(live)  # which submits the next suspect
    assert deaths == 3
    assert (await error_of(killer)).code == "request_kills_engine"
    others = [live for live in lives if live is not killer]
    while world.recovery.on_trial is not None:  # the innocent, one after the other
        world.token(world.recovery.on_trial)
    assert sorted(world.serials) == [live.serial for live in others]
    assert not any(live.stream.ended for live in others)


def test_who_makes_progress_is_never_convicted():
    """However often the engine is killed from outside."""
    world = World()
    chance = random.Random(0)
    lives = [world.add(i) for i in range(1, 9)]
    for _ in range(200):
        in_engine = [live for live in lives if live.serial in world.serials]
        for live in in_engine:
            world.token(live)
        world.die(*chance.sample(lives, 5))
        assert len(world.recovery.live) == len(lives)


def test_who_was_not_in_hand_has_no_strike():
    world = World()
    running, waiting = world.add(1), world.add(2)
    for _ in range(2):
        world.die(running)
    assert (running.strikes, waiting.strikes) == (2, 0)
    assert world.serials == [2, 1]


def test_a_suspect_that_leaves_makes_way():
    world = World()
    lives = [world.add(i) for i in range(1, 4)]
    for _ in range(2):
        world.die(*lives)
    assert world.serials == [1]
    world.recovery.leave("r#2")  # it was not its turn yet
    world.recovery.leave("r#1")
    assert world.serials == [1, 3]
    world.token(lives[2], FinishReason.STOP)
    assert world.recovery.on_trial is None
    assert not world.recovery.live


async def test_two_convictions_put_an_adapter_into_quarantine():
    world = World()
    for serial in (1, 2):
        killer = world.add(serial, adapter="a" * 64)
        world.recovery.check(killer.request)
        for _ in range(3):
            world.die(killer)
        assert (await error_of(killer)).code == "request_kills_engine"
    with pytest.raises(AdapterUnavailable, match="quarantine"):
        world.recovery.check(killer.request)
    world.recovery.check(world.add(3, adapter="b" * 64).request)
    world.recovery.release("a" * 64)
    world.recovery.check(killer.request)


def test_a_record_is_read_after_its_writer(tmp_path):
    record = FlightRecord(tmp_path / "record")
    assert record.pulse() is None
    assert record.in_hand() == set()
    recorder = FlightRecorder(tmp_path / "record")
    pulse = record.pulse()
    assert pulse is not None
    assert pulse.turn_s is None
    recorder.turn()
    recorder.hold(Hand.MESSAGE, [3])
    recorder.hold(Hand.STEPS, range(1 << 40, (1 << 40) + 100_000))  # more than there is room for
    del recorder
    pulse = record.pulse()
    assert pulse is not None
    assert pulse.turn_s is not None
    assert pulse.silent_s >= 0
    found = record.in_hand()
    assert 3 in found
    assert len(found) == 2048
    record.close()
