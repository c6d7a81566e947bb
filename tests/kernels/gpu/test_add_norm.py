"""Delta, residual sum and RMSNorm: one launch for decode rows, two with prefill rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import Adapter, Shape, make_lora, make_pool, rand
from torch import Tensor
from work_cases import make_work, shrink

from loraplex.kernels import reference
from loraplex.kernels.gpu import norm
from loraplex.kernels.gpu.add_norm import add_rms_norm
from loraplex.kernels.gpu.launch import recording
from loraplex.kernels.gpu.work import LoraWork
from loraplex.kernels.ops import LoraBatch, Module

EPS = 1e-5
LAYER = 1
# fp32: the order of sums. 16 bits: one rounding of the sum, and of T on the matrix units.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 2e-2},
}
ADAPTERS = [
    Adapter(8),
    Adapter(16, alpha=5.0),
    Adapter(40),
    Adapter(4, modules=(Module.Q, Module.O)),
    Adapter(16, layers=(0,)),
    Adapter(16),  # of no row
]
ROWS = {
    "one base row": [(1, [])],
    "one row": [(1, [(1, 1.0)])],
    "rows apart": [(1, [(0, 1.0)]), (1, [(2, 0.5)]), (2, []), (1, [(3, 1.0)]), (1, [(4, 1.0)])],
    "rows shared": [(3, [(2, 1.0)]), (1, []), (10, [(3, 2.0)]), (5, [(0, 1.0)])],
    "composed": [(1, [(1, 0.5), (2, -1.5)]), (2, [(0, 0.25), (3, 0.75), (4, 1.0)])],
    "with prefill": [(1, [(1, 1.0)]), (2, [(0, 1.0)]), (18, [(2, 1.0), (3, 0.5)])],
    "base prefill": [(20, [])],
}
WIDTHS = {"narrow": 24, "odd": 50, "two programs": 530}


class Step:
    def __init__(
        self, width: str, rows: str, dtype: torch.dtype, module: Module = Module.O
    ) -> None:
        self.shape = Shape(hidden=WIDTHS[width], num_heads=3, head_dim=10, intermediate=34)
        self.dtype, self.module = dtype, module
        self.tables, self.pages = make_pool(self.shape, ADAPTERS, dtype)
        self.arrivals = torch.zeros(40, dtype=torch.int32)
        self.weight = 1 + rand(self.shape.hidden, dtype=dtype, scale=0.2)
        self.fill(rows)

    def fill(self, rows: str) -> None:
        """The same pool and counters, another batch."""
        self.num_rows = sum(count for count, _ in ROWS[rows])
        lora = make_lora(self.tables, self.pages, ROWS[rows])
        self.lora: LoraBatch | None = lora if lora.host_tiles else None
        width, hidden = self.shape.widths(self.module)
        self.x = rand(self.num_rows, width, dtype=self.dtype, scale=0.8)
        self.y = rand(self.num_rows, hidden, dtype=self.dtype)
        self.residual = rand(self.num_rows, hidden, dtype=self.dtype)
        delta = reference.lora_delta(self.x, self.lora, LAYER, self.module, hidden)
        self.expected = self.residual.float() + self.y.float() + delta

    def work(self, **options: object) -> LoraWork:
        return make_work(self.lora, self.num_rows, **options)  # type: ignore[arg-type]

    def run(
        self, work: LoraWork, *, planes: int = 3, layer: int = LAYER, **options: bool
    ) -> Tensor:
        t = None
        if self.lora is not None:
            t = shrink(self.x, self.lora, work, LAYER, (self.module,), planes)
        return add_rms_norm(
            self.y, t, self.tables, work, layer, self.module, self.residual, self.weight, EPS,
            self.arrivals, **options,
        )  # fmt: skip

    def check(self, normed: Tensor) -> None:
        torch.testing.assert_close(self.residual.float(), self.expected, **TOLERANCE[self.dtype])
        of_rounded = reference.rms_norm(self.residual, self.weight, EPS)
        torch.testing.assert_close(normed.float(), of_rounded, **TOLERANCE[self.dtype])
        assert not self.arrivals.any(), "the counters must be zero for the next launch"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_every_width_and_mix(width: str, rows: str) -> None:
    step = Step(width, rows, torch.float32)
    step.check(step.run(step.work(padding=2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", ["rows apart", "rows shared", "with prefill"])
def test_sixteen_bit_types(dtype: torch.dtype, rows: str) -> None:
    step = Step("odd", rows, dtype, Module.DOWN)
    step.check(step.run(step.work()))


@pytest.mark.parametrize("rows", ["rows apart", "rows shared"])
def test_the_norm_may_be_a_launch_of_its_own(rows: str) -> None:
    step = Step("two programs", rows, torch.float16)
    step.check(step.run(step.work(), one_launch=False))


def test_decode_is_one_launch_and_prefill_few() -> None:
    for rows, launches in (("rows apart", 1), ("rows shared", 1), ("with prefill", 3)):
        step = Step("odd", rows, torch.float32)
        with recording() as notes:
            step.run(step.work())
        assert len(notes) == launches


@pytest.mark.parametrize("planes", [1, 2, 5])
def test_planes_of_t_are_summed(planes: int) -> None:
    for rows in ("rows apart", "rows shared"):
        step = Step("odd", rows, torch.float32)
        step.check(step.run(step.work(), planes=planes))


def test_replay_with_other_contents_on_the_same_buffers() -> None:
    """As a captured graph is used: same addresses and capacity, other tiles, pages and counts."""
    step = Step("odd", "rows shared", torch.float32)
    held = step.work(padding=12)
    assert held.norm is not None
    page_ids, weights = torch.zeros(64, dtype=torch.int32), torch.zeros(64)
    held = replace(held, page_ids=page_ids, page_weights=weights)
    for rows in ("rows shared", "composed", "one row", "rows apart", "rows shared"):
        step.fill(rows)
        assert step.lora is not None
        new = step.work()
        assert held.norm is not None
        assert new.norm is not None
        held.norm.tiles.random_()
        held.norm.tiles[: new.norm.capacity] = new.norm.tiles
        held.norm.count.copy_(new.norm.count)
        page_ids[: len(new.page_ids)] = new.page_ids
        weights[: len(new.page_weights)] = new.page_weights
        t = shrink(step.x, step.lora, new, LAYER, (step.module,))
        normed = add_rms_norm(
            step.y, t, step.tables, held, LAYER, step.module, step.residual, step.weight, EPS,
            step.arrivals,
        )  # fmt: skip
        step.check(normed)


def test_rows_beyond_the_tiles_stay_as_they_are() -> None:
    step = Step("odd", "rows apart", torch.float32)
    work = step.work()
    assert work.norm is not None
    assert step.lora is not None
    work.norm.count.fill_(2)
    before = step.residual.clone()
    normed = step.run(work)
    torch.testing.assert_close(step.residual[:2], step.expected[:2])
    assert torch.equal(step.residual[2:], before[2:])
    torch.testing.assert_close(normed[:2], reference.rms_norm(step.residual[:2], step.weight, EPS))
    assert not step.arrivals.any()


def test_one_way_for_every_row_gives_the_same_bits_alone_and_beside_others() -> None:
    step = Step("odd", "rows shared", torch.float16)
    assert step.lora is not None
    lora = step.lora
    x, y, before = step.x, step.y, step.residual.clone()
    together = step.run(step.work(small_only=True), batch_invariant=True)
    for row in (0, 2, 3, 9, 18):
        run = next((r for r in lora.host_tiles if r[0] <= row < r[0] + r[1]), None)
        alone = None if run is None else replace(lora, host_tiles=[(0, 1, run[2], run[3])])
        here = slice(row, row + 1)
        step.lora, step.num_rows = alone, 1
        step.x, step.y, step.residual = x[here], y[here], before[here].clone()
        got = step.run(step.work(small_only=True), batch_invariant=True)
        assert torch.equal(got, together[here])


@pytest.mark.parametrize("rows", ["one row", "rows shared", "with prefill"])
@pytest.mark.parametrize("wrong", ["scaling", "weight", "adapter", "layer", "planes"])
def test_the_tolerances_catch_a_wrong_adapter(rows: str, wrong: str) -> None:
    step = Step("odd", rows, torch.bfloat16)
    assert step.lora is not None
    work, layer = step.work(), LAYER
    t = shrink(step.x, step.lora, work, LAYER, (step.module,))
    if wrong == "scaling":
        step.tables.scaling *= 1.3
    elif wrong == "weight":
        step.lora.page_weights *= 0.7
    elif wrong == "adapter":
        used = set(step.lora.host_page_ids)
        fit = (step.tables.offset_b[:, LAYER, step.module] >= 0).nonzero().flatten().tolist()
        work.page_ids.fill_(next(page for page in fit if page not in used))
    elif wrong == "layer":
        layer = 0
    else:
        for part in (t.small, t.large):
            if part is not None:
                part[1] = 0
    add_rms_norm(
        step.y, t, step.tables, work, layer, step.module, step.residual, step.weight, EPS,
        step.arrivals,
    )  # fmt: skip
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            step.residual.float(), step.expected, **TOLERANCE[torch.bfloat16]
        )


def test_a_norm_of_the_unfinished_sum_is_seen() -> None:
    step = Step("two programs", "one row", torch.float32)
    early = norm.rms_norm(step.residual, step.weight, EPS)
    step.run(step.work())
    with pytest.raises(AssertionError):
        step.check(early)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("y", torch.zeros(1, 49), "must be like the residual"),
        ("y", torch.zeros(1, 50, dtype=torch.float16), "must be like the residual"),
        ("residual", torch.zeros(1, 100)[:, ::2], "contiguous"),
        ("weight", torch.zeros(49), r"must be \[50\]"),
        ("arrivals", torch.zeros(0, dtype=torch.int32), "1 tiles need as many"),
    ],
)
def test_misfits_are_refused(name: str, value: Tensor, message: str) -> None:
    step = Step("odd", "one row", torch.float32)
    setattr(step, name, value)
    work = step.work()
    with pytest.raises(ValueError, match=message):
        step.run(work)
