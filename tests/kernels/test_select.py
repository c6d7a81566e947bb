"""Which backend is chosen, and that the compiled one shares torch's thread pool."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from loraplex.kernels import native_build, select
from loraplex.kernels.native_build import BuildError, load_library
from loraplex.kernels.native_ops import NativeOps
from loraplex.kernels.ops import Ops
from loraplex.kernels.select import select_ops
from loraplex.kernels.self_check import backends_agree
from loraplex.kernels.torch_ops import TorchOps

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def native() -> NativeOps:
    try:
        return NativeOps()
    except BuildError as error:
        pytest.skip(f"native kernels cannot be built here: {error}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_the_native_kernels(native: NativeOps, dtype: torch.dtype) -> None:
    assert select_ops("auto", CPU, dtype).name == "native"
    assert select_ops("native", CPU, dtype).name == "native"


def test_torch_is_taken_on_request_and_for_other_dtypes() -> None:
    assert select_ops("torch", CPU, torch.float32).name == "torch"
    assert select_ops("auto", CPU, torch.float16).name == "torch"


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend='cuda-graphs'"):
        select_ops("cuda-graphs", CPU, torch.float32)


def test_triton_is_taken_on_request_where_it_is_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loraplex.kernels.gpu import launch

    monkeypatch.setattr(launch, "is_interpreted", lambda: True)
    assert select_ops("triton", CPU, torch.float32).name == "triton"
    assert select_ops("triton", CPU, torch.float32, batch_invariant=True).name == "triton"
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match="run on CUDA devices, not on cpu"):
        select_ops("triton", CPU, torch.float32)


def test_a_gpu_takes_triton_and_an_old_one_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert select_ops("auto", cuda, torch.bfloat16).name == "triton"
    assert select_ops("torch", cuda, torch.bfloat16).name == "torch"
    with pytest.raises(ValueError, match="backend='native': compiled for CPUs"):
        select_ops("native", cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert select_ops("auto", cuda, torch.float16).name == "torch"
    assert "Tesla T4 has 7.5" in caplog.text
    with pytest.raises(ValueError, match=r"need compute capability 8\.0"):
        select_ops("triton", cuda, torch.float16)


@pytest.mark.parametrize("backend", ["auto", "torch", "native"])
def test_batch_invariance_is_refused_where_nothing_has_it(backend: str) -> None:
    with pytest.raises(ValueError, match="leave --batch-invariant out"):
        select_ops(backend, CPU, torch.float32, batch_invariant=True)


def test_without_a_compiler_torch_computes_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_build, "COMPILERS", ("no-such-compiler",))
    with caplog.at_level(logging.WARNING):
        assert select_ops("auto", CPU, torch.bfloat16).name == "torch"
    assert [record.message for record in caplog.records if "no-such-compiler" in record.message]
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        select_ops("native", CPU, torch.bfloat16)


def test_a_compiler_that_fails_is_a_build_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native_build, "FLAGS", ["-no-such-flag"])
    monkeypatch.setattr(native_build, "COMPILERS", (*native_build.COMPILERS, "false"))
    with pytest.raises(BuildError):
        load_library(tmp_path)
    assert list(tmp_path.glob("*.so")) == []


def test_the_compiled_library_is_cached(native: NativeOps) -> None:
    before = {p: p.stat().st_mtime_ns for p in native_build.default_cache_dir().glob("*.so")}
    NativeOps()
    after = {p: p.stat().st_mtime_ns for p in native_build.default_cache_dir().glob("*.so")}
    assert before
    assert before == after


def test_kernels_that_disagree_are_not_used(
    native: NativeOps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(NativeOps):
        def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            return super().rms_norm(x, weight, eps) * 1.2

    monkeypatch.setattr(select, "NativeOps", Wrong)
    assert select_ops("auto", CPU, torch.bfloat16).name == "torch"
    assert "disagree" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads_computes_the_same(
    native: NativeOps, dtype: torch.dtype, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert backends_agree(native, TorchOps(), dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_check_sees_each_operation(native: NativeOps, dtype: torch.dtype) -> None:
    class Broken(TorchOps):
        def __init__(self, broken: str) -> None:
            super().__init__()
            self.broken = broken

        def __getattribute__(self, name: str) -> object:
            value = super().__getattribute__(name)
            if name == super().__getattribute__("broken"):
                return lambda *a, **k: value(*a, **k) * 1.2  # type: ignore[operator]
            return value

    names = ("rms_norm", "rope_kv_write", "attention", "add_rms_norm", "swiglu", "lora_shrink")
    for name in names:
        if name != "broken":
            assert not backends_agree(native, Broken(name), dtype), name


def test_one_thread_pool_serves_torch_and_the_kernels(native: Ops) -> None:
    """Two OpenMP libraries would mean two pools of spinning threads on the same cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    torch.ones(64, 64) @ torch.ones(64, 64)
    native.rms_norm(torch.ones(64, 64), torch.ones(64), 1e-6)
    libraries = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line}
    pools = {
        path for path in libraries if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))
    }
    assert len(pools) == 1, pools
