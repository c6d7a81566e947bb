"""The engine's bench: its arithmetic, what it asks of the runner, that its commands hold."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.engine import bench
from loraplex.engine.bench import DRY, FULL, QUICK, Report, Sizes, bench_shape, wishes
from loraplex.engine.gpu import bench_all
from loraplex.engine.gpu.bench_all import Part, parts, run_all
from loraplex.engine.gpu.bench_steps import popularity, run_steps, summarise
from loraplex.kernels.gpu.roofline import H200, Machine, base_bytes, decode_step_us, lora_bytes
from loraplex.kernels.model_shapes import LLAMA_3_8B, TINY

# popularity


def test_distinct_and_one() -> None:
    assert popularity("distinct", 4, 9) == [0, 1, 2, 3]
    assert popularity("one", 3, 9) == [0, 0, 0]
    with pytest.raises(ValueError, match="4 distinct requests need as many adapters, not 3"):
        popularity("distinct", 4, 3)
    with pytest.raises(ValueError, match="popularity 'zipf'"):
        popularity("zipf", 4, 3)


def test_power_law_prefers_the_popular_and_repeats() -> None:
    chosen = popularity("power law", 4000, 100)
    counts = Counter(chosen)
    assert chosen == popularity("power law", 4000, 100)
    assert chosen == sorted(chosen), "requests of one adapter are neighbours"
    assert set(chosen) <= set(range(100))
    # The most popular gets 1 / (1 + 1/2 + ... + 1/100) = 19 % of the requests, the second half.
    assert 0.16 < counts[0] / 4000 < 0.22
    assert 1.6 < counts[0] / counts[1] < 2.5


def test_wishes_fit_the_pages() -> None:
    names = [wish.name for wish in wishes(64, 272, 256)]
    assert names == [
        "distinct r16", "distinct r64", "distinct, ranks 8 to 64", "one r16", "power law r16",
    ]  # fmt: skip
    assert "distinct r64" not in [wish.name for wish in wishes(128, 272, 256)]
    for wish in wishes(8, 272, 256):
        assert len(wish.chosen) == 8
        assert max(wish.chosen) < len(wish.ranks)


@pytest.mark.parametrize("sizes", [FULL, QUICK, DRY])
def test_sizes_leave_room_for_a_cold_adapter(sizes: Sizes) -> None:
    resident = min(sizes.cold_batch, sizes.pages - 1)
    assert resident + 1 <= sizes.pages
    assert sizes.popular <= sizes.pages
    assert sizes.at_least >= 2


# times


def test_summary_of_steps() -> None:
    ends = [0.0, 0.010, 0.020, 0.030, 0.130]
    times = summarise(ends)
    assert times.median == pytest.approx(10)
    assert times.p99 == pytest.approx(100)
    assert times.mean == pytest.approx(32.5)
    assert times.steps == 4


class FakeRunner:
    """Notes the order of calls; a step takes 5 ms of the fake clock, spent when it is collected."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def launch(self, step: Any) -> int:
        self.calls.append("launch")
        return len(self.calls)

    def collect(self, handle: int) -> None:
        self.calls.append("collect")
        self.now += 0.005


def test_steps_overlap_and_are_counted_once() -> None:
    runner = FakeRunner()
    ends = run_steps(runner, None, 0.02, 2, lambda: runner.now)  # type: ignore[arg-type]
    assert runner.calls[:3] == ["launch", "launch", "collect"], "the next before the last is over"
    assert runner.calls.count("launch") == runner.calls.count("collect") == len(ends) + 1
    assert summarise(ends).median == pytest.approx(5)
    assert len(ends) == 4, "until 20 ms are over"
    assert len(run_steps(runner, None, 0.0, 3, lambda: runner.now)) == 3  # type: ignore[arg-type]


# floors: the numbers of an 8B model are known by hand


def test_floor_of_a_decode() -> None:
    assert LLAMA_3_8B.layer_parameters() == 218_103_808
    assert base_bytes(LLAMA_3_8B) == 2 * (32 * 218_103_808 + 128256 * 4096)
    assert decode_step_us(H200, LLAMA_3_8B, [1]) == pytest.approx(3_490, rel=0.01)
    assert lora_bytes(LLAMA_3_8B, [16]) == 16 * 81_920 * 2
    one = decode_step_us(H200, LLAMA_3_8B, [1] * 64, [16] * 64)
    none = decode_step_us(H200, LLAMA_3_8B, [1] * 64)
    assert one / none - 1 == pytest.approx(0.36, abs=0.02), "the issue's floor for 64 distinct r16"


def test_a_large_batch_is_bound_by_arithmetic() -> None:
    slow = Machine(bytes_per_us=1e9, flops_per_us=1.0)
    assert slow.floor_us(5.0, 7.0) == 7.0
    assert H200.floor_us(4.3e6, 0) == pytest.approx(1.0)


# the whole, dry


def test_dry_run_measures_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    report = Report()
    bench_shape(TINY, DRY, torch.float32, torch.device("cpu"), report, deadline=float("inf"))
    assert {row["case"] for row in report.rows} == {"graphs", "decode", "prefill", "cold load r16"}
    graphs = report.rows[0]
    assert graphs["rows_that_differ_from_eager"] == 0
    assert graphs["rows_that_adapters_change"] > 0
    decodes = [row for row in report.rows if row["case"] == "decode"]
    assert decodes[0]["adapters"] == "none"
    assert all(row["ms"] > 0 for row in decodes)
    assert all("tax" in row for row in decodes[1:])
    cold = report.rows[-1]
    assert 0 < cold["usable_ms"] <= cold["landed_ms"] * 1.5
    assert report.not_reached == []


def test_past_the_deadline_nothing_is_begun() -> None:
    report = Report()
    sizes = bench.Sizes(
        batches=(1, 2), context=20, prefills=((1, 18),), pages=4, popular=2, seconds=0.0,
        at_least=2, cold_batch=2, cold_loads=1,
    )  # fmt: skip
    for measure in (bench._decode, bench._prefill, bench._cold):
        measure(None, TINY, sizes, report, 0.0)
    assert report.rows == []
    assert report.not_reached == [
        "tiny decode 1", "tiny decode 2", "tiny prefill 1 x 18", "tiny cold loads",
    ]  # fmt: skip


def test_a_shape_that_fails_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench, "bench_shape", fail)
    assert bench.main(["--dry-run", "--out", str(tmp_path / "a/b.json"), "--commit", "abc"]) == 1
    report = json.loads((tmp_path / "a/b.json").read_text())
    assert report["errors"] == {"tiny": "RuntimeError: out of memory"}
    assert report["commit"] == "abc"
    assert report["torch"] == torch.__version__
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main([])
    assert "--dry-run" in capsys.readouterr().err


# all of it


def test_all_parts_end_within_ten_minutes_in_order_of_importance() -> None:
    every = parts(dry_run=False, peers=["vllm=x"], commit="abc")
    names = [part.name for part in every]
    assert names[0] == "self-test", "correctness first"
    assert len(set(names)) == len(names)
    assert bench_all.TOTAL_SECONDS < 600
    for part in every:
        if "loraplex.kernels.bench" in part.command:
            assert part.command[-2:] == ("--peer", "vllm=x")
            limit = float(part.command[part.command.index("--seconds") + 1])
            assert limit < part.seconds, "it stops by itself before it is stopped"


def test_every_part_is_a_command_its_program_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo here would show on a GPU, minutes into a lease."""
    from loraplex.kernels import bench as kernels_bench
    from loraplex.kernels.gpu import bench as gpu_bench
    from loraplex.kernels.gpu import self_test

    seen: list[str] = []
    monkeypatch.setattr(gpu_bench, "run_gpu_bench", lambda names, **_: seen.append("kernels") or {})
    monkeypatch.setattr(bench, "bench_shape", lambda *_: seen.append("engine"))
    monkeypatch.setattr(self_test, "self_test", lambda *_: seen.append("self-test") or [])
    mains = {
        "loraplex.kernels.bench": kernels_bench.main,
        "loraplex.engine.bench": bench.main,
        "loraplex.kernels.gpu.self_test": self_test.main,
    }
    for part in parts(dry_run=False, peers=[], commit="abc"):
        module, arguments = part.command[1], list(part.command[2:])
        if module == "pytest":
            continue
        if module != "loraplex.kernels.gpu.self_test":
            arguments.append("--dry-run")  # this machine has no GPU
        before = len(seen)
        assert mains[module](arguments) == 0, part.name
        assert len(seen) > before, part.name


def test_tests_are_a_part_where_the_sources_are(tmp_path: Path) -> None:
    (part,) = bench_all.tests_on_gpu(bench_all.SOURCE)
    assert part.command[:2] == ("-m", "pytest")
    for word in part.command:
        if word.startswith("/"):
            assert Path(word).exists(), word
    assert bench_all.tests_on_gpu(tmp_path) == []


def small_parts(*commands: tuple[str, str]) -> Any:
    def made(**_: Any) -> list[Part]:
        return [Part(name, ("-c", code), 20) for name, code in commands]

    return made


def test_parts_run_apart_and_leave_their_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench_all,
        "parts",
        small_parts(
            ("good", "print('words'); print('{\"a\": 1}')"),
            ("bad", "import sys; print('no'); sys.exit(3)"),
            (
                "after",
                "import os; print('{\"interpret\": ' + os.environ['TRITON_INTERPRET'] + '}')",
            ),
        ),
    )
    assert run_all(tmp_path / "out") == 1
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [done["status"] for done in summary["parts"].values()] == [0, 3, 0]
    assert json.loads((tmp_path / "out/good.json").read_text()) == {"a": 1}
    assert json.loads((tmp_path / "out/after.json").read_text()) == {"interpret": 0}
    assert not (tmp_path / "out/bad.json").exists()
    assert "no" in (tmp_path / "out/bad.log").read_text()


def test_a_part_that_hangs_is_stopped_and_the_rest_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small_parts(("slow", "import time; time.sleep(60)"), ("next", "print('{}')"))
    monkeypatch.setattr(bench_all, "parts", made)
    monkeypatch.setattr(bench_all, "LEAST_SECONDS", 0.5)
    assert run_all(tmp_path, total_seconds=1.0) == 1
    done = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert done["slow"]["status"].startswith("stopped after")
    assert done["next"]["status"].startswith("not begun")
    assert sys.executable
