"""The GPU runner against the CPU's: the same sequences, steps overlapped, graphs replayed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

steps_of = sys.modules["steps"]


@pytest.fixture
def expected(make_bench: Any, tiny_model: Any, make_prompt: Any) -> Callable[..., list[list[int]]]:
    """The tokens that the CPU path makes of the same cases."""

    def make(family: str, num_tokens: int) -> list[list[int]]:
        bench = make_bench(tiny_model(family))
        steps = steps_of.Steps(bench.runner, 128)
        return steps.run(steps_of.cases(steps, bench.digests, make_prompt), num_tokens)

    return make


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_the_tokens_of_the_cpu_path(
    family: str, capture: bool, make_runner: Any, expected: Any, make_prompt: Any
) -> None:
    runner, _, digests = make_runner(family, capture=capture)
    steps = steps_of.Steps(runner, 128)
    assert steps.run(steps_of.cases(steps, digests, make_prompt), 8) == expected(family, 8)
