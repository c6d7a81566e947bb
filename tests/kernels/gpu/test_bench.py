"""The GPU bench cases run, dry: every pass once on tiny shapes, so that a lease meets no typo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.kernels import bench as bench_module
from loraplex.kernels.gpu import bench as gpu_bench
from loraplex.kernels.gpu.bench_context import Bench, WrongResult
from loraplex.kernels.gpu.bench_sweep import variants, with_columns
from loraplex.kernels.gpu.bench_timing import (
    MAX_PASSES,
    WORKING_SET_BYTES,
    GraphTimer,
    Timing,
    WallTimer,
    num_passes,
)
from loraplex.kernels.gpu.launch import Launch, recording
from loraplex.kernels.gpu.ops import TritonOps
from loraplex.kernels.gpu.peers import LoraProblem, _geometry, _route, load_peer
from loraplex.kernels.gpu.roofline import (
    GROUPS,
    attention_flops,
    expand_bytes,
    kv_bytes,
    lora_bytes,
    shrink_bytes,
)
from loraplex.kernels.model_shapes import LLAMA_3_8B, TINY
from loraplex.kernels.random_step import LayerStep, make_activations, make_attention

CPU = torch.device("cpu")


def context(**changes: Any) -> Bench:
    settings: dict[str, Any] = {
        "shape": TINY,
        "dtype": torch.float32,
        "device": CPU,
        "timer": WallTimer(),
        "quick": False,
        "dry_run": True,
        "deadline": float("inf"),
    }
    return Bench(**{**settings, **changes})


@pytest.mark.parametrize("case", [name for name in gpu_bench.CASES if name != "popularity"])
def test_every_case_runs_dry(case: str) -> None:
    """`popularity` is what `compositions` is, with other sizes."""
    torch.manual_seed(0)
    found = gpu_bench.run_gpu_bench([case], dry_run=True)
    assert found["errors"] == {}
    assert found["not_reached"] == []
    assert found["rows"]
    for row in found["rows"]:
        assert row.get("us", 1.0) != 0.0
        assert all(value == value for value in row.values())


def test_a_case_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(bench: Bench) -> None:
        bench.check("it", torch.ones(3), torch.zeros(3) + 2)

    def right(bench: Bench) -> None:
        bench.add("right", 2.0, us=8.0)

    monkeypatch.setattr(gpu_bench, "CASES", {"wrong": wrong, "right": right})
    found = gpu_bench.run_gpu_bench([], dry_run=True)
    assert found["errors"]["wrong"].startswith("WrongResult: it: relative error 0.5")
    assert found["rows"] == [{"case": "right", "us": 8.0, "floor_us": 2.0, "fraction": 0.25}]


def test_a_result_is_checked_to_rounding() -> None:
    bench = context()
    bench.check("close", torch.full((9,), 1.00001), torch.ones(9))
    for got in (torch.full((9,), 1.01), torch.full((9,), float("nan"))):
        with pytest.raises(WrongResult):
            bench.check("far", got, torch.ones(9))


def test_past_the_deadline_sizes_are_noted_not_run() -> None:
    late = context(deadline=0.0, dry_run=False)
    assert list(late.sizes("case", (1, 2), (1,), ())) == []
    assert late.not_reached == ["case 1", "case 2"]
    assert list(context(dry_run=False, quick=True).sizes("case", (1, 2), (1,), ())) == [1]


def test_every_row_is_kept_at_once(tmp_path: Path) -> None:
    bench = context(journal=tmp_path / "new" / "rows.jsonl")
    bench.add("one", us=1.0)
    bench.add("two", 1.0, us=2.0)
    lines = (tmp_path / "new" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == bench.rows


def test_passes_outgrow_the_cache() -> None:
    for size in (1, 300_000, 10_000_000, 1 << 32):
        count = num_passes(size)
        assert 2 <= count <= MAX_PASSES
        assert count * size >= WORKING_SET_BYTES or count == MAX_PASSES


def test_graph_timer_takes_the_median_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [400.0, 100.0, 200.0, 300.0, 1000.0]
    timer = GraphTimer()
    monkeypatch.setattr(timer, "_replay", lambda graph: times)
    replays = []

    class Graph:
        def replay(self) -> None:
            replays.append(1)

    monkeypatch.setattr("loraplex.kernels.gpu.bench_timing.capture", lambda passes: Graph())
    assert timer([lambda: None] * 10) == Timing(us=30.0, us_p80=100.0)
    assert replays, "warmed up before it is timed"


def test_bytes_and_operations_are_those_of_the_issue() -> None:
    ranks = [16] * 64
    groups = sum(
        shrink_bytes(LLAMA_3_8B, modules, ranks) + expand_bytes(LLAMA_3_8B, modules, ranks)
        for modules in GROUPS.values()
    )
    assert groups == lora_bytes(LLAMA_3_8B, ranks) == 64 * 16 * 81_920 * 2
    assert kv_bytes(LLAMA_3_8B, [1000]) == 1000 * 2 * 1024 * 2
    assert attention_flops(LLAMA_3_8B, 4, 4) == 4 * (1 + 2 + 3 + 4) * 4096
    assert attention_flops(LLAMA_3_8B, 4, 1) == 4 * 4 * 4096


def recorded_swiglu() -> Launch:
    ops, rows = TritonOps(), 2
    batch, blocks = make_attention([20] * rows, [1] * rows, 16, CPU)
    kv = ops.kv_cache(1, blocks, 16, TINY.num_kv_heads, TINY.head_dim, torch.float32, CPU)
    given = make_activations(TINY, rows, torch.float32, CPU)
    step = LayerStep(TINY, ops, given, None, batch, kv)
    with recording() as notes:
        step.swiglu(None)
    return notes[0]


def test_a_sweep_changes_one_thing_and_the_grid_with_it() -> None:
    launch = recorded_swiglu()
    changed = with_columns(launch, 16)
    assert changed.args["COLUMNS"] == 16
    assert changed.grid[0] == -(-launch.args["WIDTH"] // 16)
    assert changed.grid[1:] == launch.grid[1:]
    for label, change in variants(launch):
        other = change(launch)
        assert other != launch, label
        assert other.kernel is launch.kernel


# peers, whose wheels are not here


def problem() -> LoraProblem:
    torch.manual_seed(0)
    return LoraProblem(
        x=torch.randn(4, 8),
        a=[torch.randn(3, 2, 8) for _ in range(2)],
        b=[torch.randn(3, width, 2) for width in (5, 6)],
        rows=[0, 0, 1, 2],
        scaling=0.5,
        max_adapters=4,
    )


def test_a_peers_result_is_compared_with_plain_arithmetic() -> None:
    given = problem()
    want = given.expected()
    assert want.shape == (4, 11)
    t = given.a[1][1] @ given.x[2]
    torch.testing.assert_close(want[2, 5:], 0.5 * (given.b[1][1] @ t))


def test_routes_are_padded_by_adapter() -> None:
    route = _route(problem(), 4)
    assert route.sorted_pair_ids.tolist() == [0, 1, 4, 4, 2, 4, 4, 4, 3, 4, 4, 4]
    assert route.block_bucket_ids.tolist() == [0, 1, 2]
    assert route.num_pairs_post_padded.tolist() == [12]


def test_geometry_of_slices() -> None:
    class Module:
        @staticmethod
        def SliceGeometry(**fields: Any) -> dict[str, Any]:
            return fields

    made = _geometry(Module, [8, 8, 8], 4, CPU)
    assert made["slice_offsets"].tolist() == [0, 8, 16, 24]
    assert (made["num_column_tiles"], made["uniform_width"], made["out_stride"]) == (6, 8, 8)
    assert made["full_tiles"]
    odd = _geometry(Module, [8, 3, 3], 4, CPU)
    assert (odd["num_column_tiles"], odd["uniform_width"], odd["out_stride"]) == (4, 0, 0)
    assert not odd["full_tiles"]


def test_a_folder_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    for name in ("vllm", "sglang"):
        with pytest.raises(ImportError, match="unpacked wheel"):
            load_peer(name, tmp_path)
    with pytest.raises(ValueError, match="known are vllm and sglang"):
        load_peer("punica", tmp_path)


# the command


def test_the_command_writes_one_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu_bench, "run_gpu_bench", lambda names, **options: {"rows": [], "names": names}
    )
    out = tmp_path / "bench.json"
    assert bench_module.main(["decode", "--dry-run", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["names"] == ["decode"]
    assert report["torch"] == torch.__version__
    assert {"gpu", "driver", "triton", "ptxas", "commit", "seconds"} <= report.keys()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "--dry-run"], "no case 'nothing' here; known: machine"),
        (["decode", "--device", "cpu"], "known: lora, attention"),
        (["--peer", "vllm=/nowhere"], "unpacked wheel"),
        (["--peer", "other=."], "vllm=FOLDER or sglang=FOLDER"),
    ],
)
def test_the_command_refuses_nonsense(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_module.main(arguments)
    assert said in capsys.readouterr().err
