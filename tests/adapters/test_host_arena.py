"""Frames are handed out once, come back, and never run out for the caller."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplex.adapters.host_arena import HostArena


def make(num_frames: int) -> HostArena:
    return HostArena(num_frames * 8 * 4 + 31, 8, torch.float32, pinned=False)


@given(st.lists(st.integers(1, 7), max_size=12), st.randoms(use_true_random=False))
def test_no_frame_has_two_owners(sizes: list[int], random: object) -> None:
    arena = make(10)
    held: list[list[torch.Tensor]] = []
    for value, size in enumerate(sizes):
        frames = arena.take(size)
        assert [tuple(frame.shape) for frame in frames] == [(8,)] * size
        for frame in frames:
            frame.fill_(value)
        held.append(frames)
        if len(held) > 3:
            arena.give_back(held.pop(random.randrange(4)))  # type: ignore[attr-defined]
        for frames in held:
            assert len({float(x) for frame in frames for x in frame}) == 1, "somebody wrote here"
    for frames in held:
        arena.give_back(frames)
    assert arena.num_free_frames == 10


def test_what_does_not_fit_gets_memory_of_its_own() -> None:
    arena = make(2)
    big = arena.take(3)
    assert len(big) == 3
    assert arena.num_free_frames == 2
    arena.give_back(big)
    assert arena.num_free_frames == 2
    assert len(make(0).take(2)) == 2
