"""Every kernel configuration compiles for the GPUs we serve on, within the registers they have.

The interpreter runs kernels that no compiler has seen. Here each is compiled, with the types and
sizes of real models, for a GPU that need not be there; in processes of their own, since kernels are
imported for the interpreter in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from loraplex.kernels.gpu.configurations import distinct
from loraplex.kernels.gpu.launch import is_interpreted
from loraplex.kernels.gpu.offline import compile_all
from loraplex.kernels.gpu.ops import TritonOps
from loraplex.kernels.gpu.used_kernels import META, PREFILLS, mixed_runs, recorded_launches
from loraplex.kernels.model_shapes import LLAMA_3_8B, QWEN_2_5_0_5B

# Two processes side by side. Each model and each type is compiled for one of the two at least, the
# widest model for both: what differs between them is the instructions, not the sizes.
RUNS = {
    "sm_90": [
        "--arch 90 --shape llama-3-8b --dtype bfloat16",
        "--arch 90 --shape qwen2.5-0.5b --dtype float16",
        "--arch 90 --shape llama-3-8b --dtype bfloat16 --batch-invariant",
    ],
    "sm_80": [
        "--arch 80 --shape llama-3-8b --dtype float16",
        "--arch 80 --shape llama-3.2-1b --dtype bfloat16",
        "--arch 80 --shape qwen3-0.6b --dtype bfloat16",
    ],
}


# ptxas sometimes keeps to 96 registers, of 255, so that more blocks fit, and puts two of them aside
# for that: its choice, and next to nothing. A kernel that runs out of registers spills hundreds.
MOST_SPILLED_BYTES = 16


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("compiled")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    children: dict[str, subprocess.Popen[bytes]] = {}
    for name, runs in RUNS.items():
        arguments = ["--json", str(folder / f"{name}.json"), *" -- ".join(runs).split()]
        command = [sys.executable, "-m", "loraplex.kernels.gpu.offline", *arguments]
        with (folder / f"{name}.log").open("wb") as log:
            children[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    results = {}
    for name, child in children.items():
        child.wait()
        out, said = folder / f"{name}.json", (folder / f"{name}.log").read_text()
        assert out.exists(), f"{name} wrote nothing:\n{said[-3000:]}"
        results[name] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize("name", RUNS)
def test_every_configuration_compiles(compiled: dict[str, list[dict[str, Any]]], name: str) -> None:
    failed = [f"{r['configuration']}: {r['error']}" for r in compiled[name] if r["error"]]
    assert failed == []
    assert len(compiled[name]) >= 60


@pytest.mark.parametrize("name", RUNS)
def test_no_configuration_spills(compiled: dict[str, list[dict[str, Any]]], name: str) -> None:
    spilled = {r["configuration"]: r["spilled_bytes"] for r in compiled[name]}
    assert {what: n for what, n in spilled.items() if n > MOST_SPILLED_BYTES} == {}
    assert all(0 < r["registers"] <= 255 for r in compiled[name])


def test_no_product_loses_an_operand(compiled: dict[str, list[dict[str, Any]]]) -> None:
    """The fault of ptxas before 13.3 that random data finds only now and then."""
    assert [r["configuration"] for r in compiled["sm_90"] if r["unsafe"]] == []


@pytest.mark.parametrize("name", RUNS)
def test_blocks_fit_the_multiprocessor(
    compiled: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """Shared memory of a block: 163 KiB on an A100, 227 KiB on an H100; 99 KiB on the small sm_8x
    is for another day."""
    most = {"sm_80": 163, "sm_90": 227}[name] * 1024
    too_large = [r["configuration"] for r in compiled[name] if r["shared_bytes"] > most]
    assert too_large == []


def of(results: list[dict[str, Any]], kernel: str) -> list[dict[str, Any]]:
    found = [r for r in results if r["kernel"] == kernel]
    assert found, f"no {kernel} among {sorted({r['kernel'] for r in results})}"
    return found


def test_matrix_units_are_used(compiled: dict[str, list[dict[str, Any]]]) -> None:
    """A prefill whose dots fall back to scalar code would be right and useless."""
    for kernel in ("shrink_large", "prefill_attention"):
        assert all(r["warpgroup"] > 0 for r in of(compiled["sm_90"], kernel)), kernel
        assert all(r["matrix"] > 0 for r in of(compiled["sm_80"], kernel)), kernel
    for kernel in ("shrink_small", "decode_attention"):
        assert all(r["matrix"] + r["warpgroup"] > 0 for r in of(compiled["sm_90"], kernel)), kernel


def test_weights_are_read_sixteen_bytes_at_a_time(
    compiled: dict[str, list[dict[str, Any]]],
) -> None:
    """The decode forms are bound by bytes: narrow loads would halve them."""
    for name in RUNS:
        for kernel in ("shrink_small", "decode_attention"):
            for result in of(compiled[name], kernel):
                wide = result["wide_loads"] + result["async_copies"]
                assert wide >= 8, f"{name} {result['configuration']}"


def test_compiling_needs_a_process_of_its_own() -> None:
    if not is_interpreted():
        pytest.skip("kernels are not interpreted here")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=0"):
        list(compile_all([], 90))


# The list that is compiled


def kernels_of(ops: TritonOps) -> set[str]:
    launches = recorded_launches(QWEN_2_5_0_5B, torch.bfloat16, ops)
    return {configuration.kernel for configuration in distinct(launches)}


def test_the_list_names_every_kernel_of_a_step() -> None:
    """Kernels that exist and are missing here are neither compiled nor tested at start."""
    assert kernels_of(TritonOps()) == {
        "add_norm", "append_blocks", "decode_attention", "draw", "edit", "embed", "likeliest",
        "logprobs", "peaks", "prefill_attention", "rms_norm", "rope_kv", "shrink_large",
        "shrink_small", "survey", "swiglu", "take_inputs",
    }  # fmt: skip


def test_the_batch_invariant_list_has_its_own_matmul_and_no_large_family() -> None:
    kernels = kernels_of(TritonOps(batch_invariant=True))
    assert "matmul" in kernels
    assert not kernels & {"shrink_large", "decode_attention"}


def test_shapes_and_types_have_configurations_of_their_own() -> None:
    sets = [
        distinct(recorded_launches(shape, dtype)).keys()
        for shape, dtype in (
            (LLAMA_3_8B, torch.bfloat16),
            (LLAMA_3_8B, torch.float16),
            (QWEN_2_5_0_5B, torch.bfloat16),
        )
    ]
    shared = sets[0] & sets[1] & sets[2]
    assert {configuration.kernel for configuration in shared} <= {"append_blocks", "take_inputs"}


def test_recording_allocates_nothing_and_runs_nothing() -> None:
    launches = recorded_launches(LLAMA_3_8B, torch.bfloat16)
    tensors = [a for note in launches for a in note.args.values() if isinstance(a, torch.Tensor)]
    assert {tensor.device for tensor in tensors} == {META}


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 64])
def test_mixed_runs_hold_every_kind_of_row(rows: int) -> None:
    runs = mixed_runs(rows)
    assert sum(count for count, _ in runs) == rows
    assert all(count for count, _ in runs)
    if rows >= 6:
        assert {len(composition) for _, composition in runs} == {0, 1, 2}
        assert runs[-1][0] > 1, "rows that share an adapter"
    assert PREFILLS[0] > 64, "the first prefill cuts a run into more than one tile"
