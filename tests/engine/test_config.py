"""The engine's settings: what nobody chose depends on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import EngineConfig


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(model="m", adapter_dir=Path("a"), **settings)


@pytest.mark.parametrize(
    ("given", "cpu", "cuda"),
    [
        ({}, (64, 512), (256, 2048)),
        ({"max_num_seqs": 8}, (8, 512), (8, 2048)),
        ({"max_num_seqs": 600}, (600, 600), (600, 2048)),
        ({"max_num_batched_tokens": 32}, (32, 32), (32, 32)),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 9}, (8, 9), (8, 9)),
    ],
)
def test_step_sizes(given: dict[str, int], cpu: tuple[int, int], cuda: tuple[int, int]) -> None:
    assert config(**given).for_device("cpu").step_sizes == cpu
    assert config(**given).for_device("cuda").step_sizes == cuda


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": -1},
        {"max_num_seqs": 9, "max_num_batched_tokens": 8},
        {"device": "tpu"},
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{list(wrong)[-1]}="):
        config(**wrong)
