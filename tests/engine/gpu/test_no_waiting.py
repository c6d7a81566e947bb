"""A launch never asks the device for anything: on a device without values it would fail."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from loraplex.engine.gpu.dummy_steps import DummySteps, dummy_adapter
from loraplex.engine.gpu.runner import GpuRunner

meta = sys.modules["meta_runner"]
MAX_LEN = meta.MAX_BLOCKS * 16


@pytest.fixture(scope="module")
def runner() -> Any:
    runner, pool = meta.make_meta_runner()
    with meta.watched():
        runner.graphs.capture()
    return runner, pool


def test_a_decode_step_is_one_copy_there_and_one_back(runner: Any) -> None:
    gpu, pool = runner
    steps = DummySteps(gpu, MAX_LEN)
    with dummy_adapter(pool) as use:
        sequences = [steps.sequence(40, (use,)), steps.sequence(9, ()), steps.sequence(200, ())]
        for _ in range(3):
            schedule = steps.schedule([(seq, 1) for seq in sequences])
            with meta.watched() as (_, traffic):
                handle = gpu.launch(schedule)
            gpu.collect(handle)
    assert [name for name, _ in traffic.to_device] == ["copy_"]
    assert traffic.to_host == [("copy_", 3)]


@pytest.mark.parametrize("capture", [True, False])
def test_no_step_reads_from_the_device(runner: Any, capture: bool) -> None:
    gpu, pool = runner
    if not capture:
        gpu, pool = meta.make_meta_runner()
    with meta.watched() as (notes, traffic), dummy_adapter(pool) as use:
        before = len(traffic.to_device)
        steps = DummySteps(gpu, MAX_LEN)
        steps.run([(1, 7), (1, 100), (90, 300)], [(use,), (), (use, use)], prompt_logprobs=2)
        steps.run([(1, 7)] * 5, [(use,), ()], temperature=1.0, top_p=0.5, logprobs=3)
    assert len(traffic.to_device) > before
    assert notes


def test_a_lane_reads_nothing_from_the_device_either(runner: Any) -> None:
    gpu, pool = runner
    with meta.watched() as (_, traffic), meta.dummy_extras(pool) as use:
        steps = DummySteps(gpu, MAX_LEN)
        traffic.to_device.clear()
        steps.run([(1, 7), (1, 100), (90, 300)], [(use,), (), (use,)], prompt_logprobs=2)
        with_prompts = len(traffic.to_device)
        steps.run([(1, 7)] * 5, [(use,), ()])
        assert len(traffic.to_device) - with_prompts == 1, "a step is one copy"


def test_what_reads_is_found_out(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: one look at a length, and the step fails here."""
    gpu, _ = runner
    forward = GpuRunner._forward

    def curious(self: GpuRunner, inputs: Any, *rest: Any) -> Any:
        if int(inputs.attention.context_lens.max()) > 0:
            return forward(self, inputs, *rest)
        raise AssertionError

    monkeypatch.setattr(GpuRunner, "_forward", curious)
    steps = DummySteps(gpu, MAX_LEN)
    with pytest.raises(RuntimeError, match="meta"), meta.watched():
        steps.run([(30, 30)])
    gpu.forget(range(-100, 0))
