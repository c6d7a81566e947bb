"""q, k and v with deltas, norms and rope, and where in the cache k and v come to lie."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Adapter, Sequences, Shape, cos_sin, make_lora, make_pool, rand
from torch import Tensor
from work_cases import make_work, shrink

from loraplex.kernels import reference
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.gpu.rope_kv import rope_kv
from loraplex.kernels.ops import QKV, LoraBatch, Module

CPU = torch.device("cpu")
EPS = 1e-6
# fp32: the order of sums. 16 bits: one rounding of the result, and of T where the matrix units
# multiply.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 2e-2},
}
SHAPES = {
    "even": Shape(hidden=32, num_heads=4, num_kv_heads=2, head_dim=32, layers=2),
    "odd": Shape(hidden=50, num_heads=3, num_kv_heads=1, head_dim=10, layers=2),
    "five heads": Shape(hidden=40, num_heads=5, num_kv_heads=5, head_dim=24, layers=2),
    "wide": Shape(hidden=32, num_heads=6, num_kv_heads=2, head_dim=80, layers=2),
    "eight to one": Shape(hidden=24, num_heads=8, num_kv_heads=1, head_dim=96, layers=2),
}
ADAPTERS = [
    Adapter(8),
    Adapter(16, alpha=5.0),
    Adapter(24, ranks={Module.V: 8}),
    Adapter(4, modules=(Module.Q, Module.V)),
    Adapter(16, modules=(Module.K,), layers=(0,)),
]
ROWS = {
    "one base row": [(1, [])],
    "one row": [(1, [(1, 1.0)])],
    "rows apart": [(1, [(0, 1.0)]), (1, [(1, 0.5)]), (2, []), (1, [(2, 1.0)]), (1, [(4, 1.0)])],
    "rows shared": [(3, [(2, 1.0)]), (1, []), (17, [(3, 2.0)])],
    "composed": [(1, [(1, 0.5), (2, -1.5)]), (2, [(0, 0.25), (3, 0.75), (4, 1.0)])],
    "prefill": [(19, [(2, 1.0), (3, 0.5)])],
    "base prefill": [(20, [])],
}


class Step:
    """One call's inputs and what it must give."""

    def __init__(
        self,
        shape: Shape,
        rows: str,
        dtype: torch.dtype,
        *,
        layer: int = 1,
        norms: str = "",
        block_size: int = 16,
    ) -> None:
        s = self.shape = shape
        self.layer, self.dtype = layer, dtype
        tables, pages = make_pool(s, ADAPTERS, dtype)
        self.num_rows = sum(count for count, _ in ROWS[rows])
        self.lora: LoraBatch | None = make_lora(tables, pages, ROWS[rows])
        if not self.lora.host_tiles:
            self.lora = None
        self.x = rand(self.num_rows, s.hidden, dtype=dtype, scale=0.3)
        heads = s.num_heads + 2 * s.num_kv_heads
        self.qkv = rand(self.num_rows, heads * s.head_dim, dtype=dtype)
        weight = 1 + rand(2, s.head_dim, dtype=dtype, scale=0.2)
        self.q_norm = weight[0] if "q" in norms else None
        self.k_norm = weight[1] if "k" in norms else None
        self.batch = Sequences(s, block_size=block_size).step([(0, self.num_rows)])
        self.cos, self.sin = cos_sin(self.batch, s.head_dim, torch.float32)
        self.kv = PagedKVCache(s.layers, 64, block_size, s.num_kv_heads, s.head_dim, dtype, CPU)
        for layer_kv in (*self.kv.keys, *self.kv.values):
            layer_kv.fill_(float("nan"))

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        s = self.shape
        deltas = [
            reference.lora_delta(self.x, self.lora, self.layer, m, s.widths(m)[1]) for m in QKV
        ]
        return reference.rope_qkv(
            self.qkv.float() + torch.cat(deltas, 1), self.cos, self.sin, self.q_norm, self.k_norm,
            EPS, s.num_heads, s.num_kv_heads, s.head_dim,
        )  # fmt: skip

    def run(self, *, slots: Tensor | None = None, **work_options: object) -> Tensor:
        batch_invariant = bool(work_options.pop("batch_invariant", False))
        work = make_work(self.lora, self.num_rows, **work_options)  # type: ignore[arg-type]
        t = None
        if self.lora is not None:
            t = shrink(self.x, self.lora, work, self.layer, QKV)
        tables = None if self.lora is None else self.lora.tables
        return rope_kv(
            self.qkv, t, tables, work, self.layer, self.cos, self.sin, self.q_norm, self.k_norm,
            EPS, self.shape.num_heads, self.kv,
            self.batch.slot_mapping if slots is None else slots, batch_invariant=batch_invariant,
        )  # fmt: skip

    def cached(self) -> tuple[Tensor, Tensor]:
        """k and v of the step's rows, read back by the layout's definition."""
        slots, size = self.batch.slot_mapping, self.kv.block_size
        block, offset = slots // size, slots % size
        return (
            self.kv.keys[self.layer][block, :, offset],
            self.kv.values[self.layer][block, :, offset],
        )

    def check(self, q: Tensor) -> None:
        for got, expected in zip((q, *self.cached()), self.expected(), strict=True):
            torch.testing.assert_close(got.float(), expected, **TOLERANCE[self.dtype])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [("odd", rows) for rows in ROWS]
    + [(shape, rows) for shape in SHAPES for rows in ("rows shared", "composed", "prefill")],
)
def test_every_shape_and_mix(shape: str, rows: str) -> None:
    step = Step(SHAPES[shape], rows, torch.float32, norms="qk" if shape == "odd" else "")
    step.check(step.run(padding=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", ["rows apart", "rows shared", "prefill"])
def test_sixteen_bit_types(dtype: torch.dtype, rows: str) -> None:
    step = Step(SHAPES["even"], rows, dtype, norms="qk")
    step.check(step.run())


@pytest.mark.parametrize("norms", ["q", "k", "qk"])
@pytest.mark.parametrize(("shape", "rows"), [("five heads", "rows apart"), ("odd", "prefill")])
def test_head_norms(norms: str, shape: str, rows: str) -> None:
    step = Step(SHAPES[shape], rows, torch.float32, norms=norms)
    step.check(step.run())


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_prefill_rows_on_the_small_path(batch_invariant: bool) -> None:
    step = Step(SHAPES["odd"], "prefill", torch.float32)
    step.check(step.run(small_only=True, batch_invariant=batch_invariant))


def test_one_way_for_every_row_gives_the_same_bits_alone_and_beside_others() -> None:
    step = Step(SHAPES["even"], "rows shared", torch.float16)
    together = step.run(small_only=True, batch_invariant=True)
    kept = [t.clone() for t in step.cached()]
    alone = step.run(small_only=True, batch_invariant=True)
    assert torch.equal(together, alone)
    assert step.lora is not None
    for row in (0, 2, 3, 20):
        one = Step(SHAPES["even"], "one row", torch.float16)
        run = next((r for r in step.lora.host_tiles if r[0] <= row < r[0] + r[1]), None)
        one.lora = None
        if run is not None:
            one.lora = make_lora(step.lora.tables, [], [])
            one.lora.host_tiles = [(0, 1, run[2], run[3])]
            one.lora.host_page_ids = step.lora.host_page_ids
            one.lora.page_ids = step.lora.page_ids
            one.lora.page_weights = step.lora.page_weights
        here = slice(row, row + 1)
        one.x, one.qkv = step.x[here], step.qkv[here]
        one.cos, one.sin = step.cos[here], step.sin[here]
        q = one.run(small_only=True, batch_invariant=True)
        for got, expected in zip((q, *one.cached()), (together, *kept), strict=True):
            assert torch.equal(got, expected[here])


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rows", ["rows apart", "rows shared", "prefill"])
def test_slot_minus_one_writes_nothing(slot_dtype: torch.dtype, rows: str) -> None:
    step = Step(SHAPES["even"], rows, torch.float32)
    slots = step.batch.slot_mapping.to(slot_dtype)
    skipped = torch.arange(len(slots)) % 3 == 1
    slots[skipped] = -1
    q = step.run(slots=slots)
    expected_q, expected_k, expected_v = step.expected()
    torch.testing.assert_close(q, expected_q, **TOLERANCE[torch.float32])
    for got, expected in zip(step.cached(), (expected_k, expected_v), strict=True):
        assert got[skipped].isnan().all()
        torch.testing.assert_close(got[~skipped], expected[~skipped], **TOLERANCE[torch.float32])
    written = sum(int((~layer.isnan()).sum()) for layer in (*step.kv.keys, *step.kv.values))
    assert written == int((~skipped).sum()) * 2 * step.shape.num_kv_heads * step.shape.head_dim


def test_no_rows_start_nothing() -> None:
    step = Step(SHAPES["even"], "one base row", torch.float32)
    step.num_rows, step.qkv = 0, step.qkv[:0]
    step.cos, step.sin = step.cos[:0], step.sin[:0]
    assert step.run(slots=torch.zeros(0, dtype=torch.int64)).shape == (0, 4, 32)


def test_no_shrink_means_no_delta() -> None:
    """A composition that adapts none of q, k, v here: its tiles have pages, but there is no T."""
    step = Step(SHAPES["even"], "composed", torch.float32)
    work = make_work(step.lora, step.num_rows)
    q = rope_kv(
        step.qkv, None, step.lora.tables, work, step.layer, step.cos, step.sin, None, None, EPS,
        4, step.kv, step.batch.slot_mapping,
    )  # fmt: skip
    step.lora = None
    step.check(q)


def test_block_sizes_other_than_sixteen() -> None:
    step = Step(SHAPES["odd"], "rows shared", torch.float32, block_size=4)
    step.check(step.run())


@pytest.mark.parametrize("rows", ["one row", "rows shared", "prefill"])
@pytest.mark.parametrize("wrong", ["scaling", "weight", "adapter", "layer", "planes"])
def test_the_tolerances_catch_a_wrong_adapter(rows: str, wrong: str) -> None:
    step = Step(SHAPES["even"], rows, torch.bfloat16, layer=0)
    expected = step.expected()
    assert step.lora is not None
    tables = step.lora.tables
    work = make_work(step.lora, step.num_rows)
    t = shrink(step.x, step.lora, work, 0, QKV)
    layer = 0
    if wrong == "scaling":
        tables.scaling *= 1.2
    elif wrong == "weight":
        step.lora.page_weights *= 0.8
    elif wrong == "adapter":
        work.page_ids.copy_(torch.full_like(work.page_ids, make_other(step.lora)))
    elif wrong == "layer":
        layer = 1
        step.layer = 1
    else:
        t = shrink(step.x, step.lora, work, 0, QKV, planes=2)
        for part in (t.small, t.large):
            if part is not None:
                part[1] = 0
    q = rope_kv(
        step.qkv, t, tables, work, layer, step.cos, step.sin, None, None, EPS,
        4, step.kv, step.batch.slot_mapping,
    )  # fmt: skip
    got = torch.cat((q, *step.cached()), 1).float()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, torch.cat(expected, 1), **TOLERANCE[torch.bfloat16])


def make_other(lora: LoraBatch) -> int:
    """A page with q, k and v in layer 0 that the batch does not use."""
    fit = (lora.tables.offset_b[:, 0, :3] >= 0).all(1)
    return next(page for page in fit.nonzero().flatten().tolist() if page not in lora.host_page_ids)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qkv", torch.zeros(1, 255)),
        ("qkv", torch.zeros(1, 256, dtype=torch.float16)),
        ("cos", torch.zeros(1, 16)),
        ("sin", torch.zeros(2, 32)),
        ("slots", torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_misfits_are_refused(name: str, value: Tensor) -> None:
    step = Step(SHAPES["even"], "one base row", torch.float32)
    slots = value if name == "slots" else None
    if slots is None:
        setattr(step, name, value)
    with pytest.raises(ValueError, match=name):
        step.run(slots=slots)


def test_an_odd_head_is_refused() -> None:
    step = Step(SHAPES["even"], "one base row", torch.float32)
    step.kv = PagedKVCache(2, 4, 16, 2, 31, torch.float32, CPU)
    with pytest.raises(ValueError, match="head_dim 31"):
        step.run()
