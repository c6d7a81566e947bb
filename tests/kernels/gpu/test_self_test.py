"""The start-up self-test finds wrong kernels, names them, and knows a way out or refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.kernels import reference
from loraplex.kernels.gpu import expected
from loraplex.kernels.gpu.decode_attention import decode_attention_kernel
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.gpu.launch import limit_stages, recording
from loraplex.kernels.gpu.ops import TritonOps
from loraplex.kernels.gpu.self_test import Finding, KernelFault, require_sound, self_test
from loraplex.kernels.gpu.swiglu import _swiglu_kernel
from loraplex.kernels.model_shapes import ModelShape
from loraplex.kernels.ops import Module
from loraplex.kernels.random_step import make_adapters, make_attention, make_lora, random_tensor

CPU = torch.device("cpu")
SHAPE = ModelShape("little", 1, 32, 4, 2, 16, 40, 70)
BOTH: dict[str, Any] = {"decodes": [(7, 40)], "prefills": [67]}
DECODES: dict[str, Any] = {"decodes": [(5, 20)], "prefills": []}  # enough where one must be wrong


@pytest.fixture(autouse=True)
def _unlimited() -> Iterator[None]:
    yield
    for kernel in (_swiglu_kernel, decode_attention_kernel):
        limit_stages(kernel, None)


class Meddling(TritonOps):
    """Real kernels, one result of which is changed afterwards."""

    def __init__(self, wrong: str, how: Any) -> None:
        super().__init__()
        self.wrong, self.how = wrong, how

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name in ("wrong", "how") or name != self.wrong:
            return method

        def meddle(*args: Any, **kwargs: Any) -> Any:
            return self.how(method(*args, **kwargs))

        return meddle


def run(
    ops: TritonOps, dtype: torch.dtype = torch.float32, sizes: dict[str, Any] = DECODES
) -> list[Finding]:
    torch.manual_seed(0)
    return self_test(ops, SHAPE, dtype, CPU, **sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finds_nothing_wrong_with_right_kernels(dtype: torch.dtype) -> None:
    findings = run(TritonOps(), dtype, BOTH)
    assert findings == []
    require_sound(findings)


def test_batch_invariant_kernels_are_tested_too() -> None:
    assert run(TritonOps(batch_invariant=True), sizes=BOTH) == []


def scaled(out: Tensor) -> Tensor:
    return out * 1.01


def one_element(out: Tensor) -> Tensor:
    out = out.clone()
    out[-1, ..., -1] += 3 * out.float().square().mean().sqrt()
    return out


def one_nan(out: Tensor) -> Tensor:
    out = out.clone()
    out[0, ..., 0] = float("nan")
    return out


def swapped_rows(out: Tensor) -> Tensor:
    return out.flip(0)


@pytest.mark.parametrize("how", [scaled, one_element, one_nan, swapped_rows])
def test_names_a_wrong_operation_and_no_other(how: Any, caplog: pytest.LogCaptureFixture) -> None:
    findings = run(Meddling("swiglu", how))
    assert {finding.operation for finding in findings} == {"swiglu"}
    finding = findings[0]
    assert finding.error > 1
    assert not finding.remedied
    assert all(name.startswith("swiglu float32") for name in finding.kernels)
    for fact in ("little", "float32", f"torch {torch.__version__}", "triton 3", "ptxas"):
        assert fact in str(finding)
    assert caplog.records[0].levelno == logging.ERROR


@pytest.mark.parametrize("operation", ["rope_kv_write", "attention", "add_rms_norm", "rms_norm"])
def test_every_operation_is_compared(operation: str) -> None:
    findings = run(Meddling(operation, one_element))
    named = {finding.operation.split(" of ")[0] for finding in findings}
    assert named == {operation}


def test_refuses_what_nothing_remedies() -> None:
    findings = run(Meddling("attention", scaled))
    with pytest.raises(KernelFault, match=r"attention is off by .* TRITON_PTXAS_PATH"):
        require_sound(findings)


class WrongWhenPipelined(TritonOps):
    """As a compiler's pipelining bug would be: right again with one stage."""

    def attention(self, *args: Any, **kwargs: Any) -> Tensor:
        out = super().attention(*args, **kwargs)
        with recording() as notes:
            super().attention(*args, **kwargs)
        pipelined = [note for note in notes if note.num_stages > 1]
        wrong = any(note.kernel is decode_attention_kernel for note in pipelined)
        return out + 1 if wrong else out


def test_falls_back_to_kernels_without_pipelining(caplog: pytest.LogCaptureFixture) -> None:
    findings = run(WrongWhenPipelined())
    assert [finding.remedied for finding in findings] == [True]
    assert findings[0].operation == "attention"
    assert any(name.startswith("decode_attention") for name in findings[0].kernels)
    require_sound(findings)
    assert caplog.records[0].levelno == logging.WARNING
    assert "without pipelining" in caplog.text
    assert run(WrongWhenPipelined()) == [], "the limit stays, so the next test finds it right"


def test_a_remedy_that_does_not_help_is_taken_back() -> None:
    run(Meddling("attention", scaled))
    with recording() as notes:
        run_once = TritonOps()
        kv = run_once.kv_cache(1, 8, 16, 2, 16, torch.float32, CPU)
        batch, _ = make_attention([20], [1], 16, CPU)
        run_once.attention(torch.zeros(1, 4, 16), kv, 0, batch, 0.25, None)
    assert notes[0].num_stages > 1


# The oracle itself, held against the slow reference.


def test_expected_delta_is_the_references() -> None:
    torch.manual_seed(0)
    adapters = make_adapters(
        SHAPE, [8, 40], torch.float32, CPU, modules=[(Module.Q,), tuple(Module)]
    )
    lora = make_lora(adapters, [(2, ()), (3, (0, 1)), (1, (0,)), (4, (1,))])
    for module in (Module.Q, Module.DOWN):
        width_in, width_out = SHAPE.widths(module)
        x = torch.randn(10, width_in)
        got = expected.lora_delta(x, lora, 0, module, width_out)
        want = reference.lora_delta(x, lora, 0, module, width_out)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert want[2:].abs().max() > 0.1, "a delta worth comparing"
        assert not want[:2].any()


@pytest.mark.parametrize("window", [None, 9])
def test_expected_attention_is_the_references(window: int | None) -> None:
    torch.manual_seed(0)
    kv = PagedKVCache(1, 8, 16, 2, 16, torch.float32, CPU)
    for pages in (*kv.keys, *kv.values):
        pages.normal_()
    batch, blocks = make_attention([20, 33, 17], [1, 5, 17], 16, CPU)
    assert blocks == 2 + 3 + 2
    q = random_tensor(23, 4, 16, dtype=torch.float32, device=CPU)

    def plain(pages: Tensor) -> list[Tensor]:
        return [
            pages[table].transpose(1, 2).flatten(0, 1)[:length]
            for table, length in zip(batch.host_block_tables, batch.host_context_lens, strict=True)
        ]

    want = reference.attention(q, plain(kv.keys[0]), plain(kv.values[0]), batch, 0.25, window)
    got = expected.attention(q, kv, 0, batch, 0.25, window)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_expected_norm_rope_and_gate_are_the_references() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 32), torch.randn(32)
    torch.testing.assert_close(
        expected.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)
    )
    heads, angles = torch.randn(5, 3, 16), torch.rand(5, 16)
    cos, sin = angles.cos(), angles.sin()
    want = torch.stack(
        [
            torch.stack([reference.rope(h, c, s) for h in t])
            for t, c, s in zip(heads, cos, sin, strict=True)
        ]
    )
    torch.testing.assert_close(expected.rotate(heads, cos, sin), want)
    gate, up = torch.randn(5, 8), torch.randn(5, 8)
    torch.testing.assert_close(expected.swiglu(gate, up), reference.swiglu(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_excess_tells_rounding_from_errors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 30)
    assert expected.excess(x.to(dtype), x, dtype) <= 1
    assert expected.excess(x * 1.2, x, dtype) > 1
    assert expected.excess(x.roll(1, 0), x, dtype) > 1
    x_nan = x.clone()
    x_nan[3, 4] = float("nan")
    assert expected.excess(x_nan, x, dtype) == float("inf")
    assert expected.excess(x[:0], x[:0], dtype) == 0
