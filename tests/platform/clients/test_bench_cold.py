"""What the comparison of cold and resident adapters makes of its figures. No server."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.platform.bench.cold import _copy, _samples, evaluate


def test_ratios_are_of_medians_and_held_against_their_targets() -> None:
    measured = {
        "resident": [{"ttft_p50_ms": t, "itl_p99_ms": 20.0} for t in (100.0, 110.0, 500.0)],
        "cold": [{"ttft_p50_ms": t, "itl_p99_ms": 23.0} for t in (120.0, 121.0, 90.0)],
    }
    first, gaps = evaluate(measured)
    assert first.value == pytest.approx(120 / 110)
    assert first.reached
    assert gaps.value == pytest.approx(1.15)
    assert not gaps.reached


def test_metrics_are_summed_by_name_and_labels() -> None:
    text = """# HELP x y
loraplex:adapter_proofs{model_name="m",outcome="agrees"} 3.0
loraplex:adapter_proofs{model_name="m",outcome="unproven"} 2.0
vllm:lora_adapter_load_seconds_count{model_name="m"} 7.0
"""
    assert list(_samples(text, 'loraplex:adapter_proofs{.*outcome="unproven".*}')) == [2.0]
    assert list(_samples(text, "vllm:lora_adapter_load_seconds_count.*")) == [7.0]


def test_a_copied_registry_is_its_own_and_files_are_shared(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "store").mkdir(parents=True)
    for name in ("registry.sqlite", "store/weights", "server.log"):
        (source / name).write_text("x")
    _copy(source, target)
    assert (target / "store/weights").samefile(source / "store/weights")
    assert not (target / "registry.sqlite").samefile(source / "registry.sqlite")
    assert not (target / "server.log").exists()
