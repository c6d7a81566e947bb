"""Graphs captured empty and replayed for any adapters, and what a stale one would do."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from loraplex.engine.gpu import graphs
from loraplex.engine.gpu.graphs import RepeatedCalls, decode_buckets
from loraplex.engine.gpu.metadata import Metadata, StepInputs
from loraplex.engine.gpu.runner import GpuRunner
from loraplex.kernels.gpu.work import LoraWork, TileList

steps_of = sys.modules["steps"]


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (20, [1, 2, 4, 8, 16, 20]),
        (64, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]),
        (100, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]),
    ],
)
def test_buckets(max_num_seqs: int, expected: list[int]) -> None:
    assert decode_buckets(max_num_seqs) == expected


def test_the_list_of_buckets_is_bounded() -> None:
    assert len(decode_buckets(256)) == 23


class Counted(RepeatedCalls):
    """replays: by capture, in capture order."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def capture(self, run: Any) -> Any:
        graph, output = super().capture(run)
        number = len(self.replays)
        self.replays.append(0)
        replay = graph.replay

        def counted() -> None:
            self.replays[number] += 1
            replay()

        graph.replay = counted  # type: ignore[method-assign]
        return graph, output


def decode(make_runner: Any, make_prompt: Any, **settings: Any) -> tuple[list[Any], GpuRunner]:
    """The tokens of seven mixed cases, all decoding side by side."""
    runner, _, digests = make_runner(**settings)
    steps = steps_of.Steps(runner, 128)
    made = steps.run(steps_of.cases(steps, digests, make_prompt), 8)
    return made, runner


def test_one_capture_serves_every_mix(make_runner: Any, make_prompt: Any) -> None:
    backend = Counted()
    made, runner = decode(make_runner, make_prompt, graphs=backend)
    eager, _ = decode(make_runner, make_prompt, capture=False)
    assert made == eager
    assert len(backend.replays) == len(decode_buckets(8))
    assert sum(backend.replays) > 0
    assert runner.graphs.num_too_wide == 0


def test_replays_with_none_one_and_many_adapters(make_runner: Any, make_prompt: Any) -> None:
    """The same graph, one after the other, and back."""
    backend = Counted()
    runner, _, digests = make_runner(graphs=backend)
    eager, _, _ = make_runner(capture=False)
    every = list(digests.values())
    AdapterUse = steps_of.AdapterUse
    for uses in (
        [()] * 4,
        [(AdapterUse(every[1]),)] * 4,
        [(AdapterUse(d),) for d in every[:4]],
        [(), (AdapterUse(every[3]), AdapterUse(every[5], 0.5)), (), (AdapterUse(every[0]),)],
        [()] * 4,
    ):
        before, made = sum(backend.replays), []
        for one in (runner, eager):
            steps = steps_of.Steps(one, 128)
            sequences = [steps.sequence(make_prompt(6 + i, i), *use) for i, use in enumerate(uses)]
            made.append(steps.run(sequences, 4))
            for seq in sequences:
                one.forget([seq.seq_id])
        assert made[0] == made[1]
        assert sum(backend.replays) > before


@pytest.mark.parametrize("field", ["tiles", "count", "page_ids", "context_lens"])
def test_a_stale_field_shows(
    field: str, make_runner: Any, make_prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The companion: what is kept from the capture instead of read anew changes the tokens."""
    good, _ = decode(make_runner, make_prompt)
    static = Metadata.static

    def stale(self: Metadata, *args: Any) -> StepInputs:
        inputs = static(self, *args)
        work = inputs.lora.plan
        assert isinstance(work, LoraWork)
        assert work.small is not None
        if field == "tiles":
            tiles = work.small.tiles.clone().fill_(0)
            inputs.lora.plan = replace(work, small=replace(work.small, tiles=tiles))
        elif field == "count":
            count = torch.ones_like(work.small.count)
            small = TileList(work.small.tiles, count, work.small.capacity)
            inputs.lora.plan = replace(work, small=small)
        elif field == "page_ids":
            inputs.lora.plan = replace(work, page_ids=torch.zeros_like(work.page_ids))
        else:
            inputs.attention.context_lens = torch.ones_like(inputs.attention.context_lens)
        return inputs

    monkeypatch.setattr(Metadata, "static", stale)
    try:
        bad, _ = decode(make_runner, make_prompt)
    except (AssertionError, RuntimeError):
        return  # noticed even earlier
    assert bad != good


def test_a_step_too_wide_for_its_graph_runs_without(
    make_runner: Any, make_prompt: Any, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    good, _ = decode(make_runner, make_prompt)
    monkeypatch.setattr(graphs, "PAGES_PER_ROW", 1)
    monkeypatch.setattr(graphs, "MIN_PAGES", 1)
    with caplog.at_level(logging.WARNING):
        made, runner = decode(make_runner, make_prompt)
    assert made == good
    assert runner.graphs.num_too_wide > 1
    assert len([r for r in caplog.records if "without a graph" in r.message]) == 1
