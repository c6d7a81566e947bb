"""The lane of adapters that change more than A and B of linear modules: DoRA, biases, whole
modules, norms, the embedding, the head, single tokens.

A step of such adapters is the usual step; after each of its operations the lane corrects the rows
of these adapters, and no other row. What the kernels fuse stays fused: the lane works on the base
model's output before the delta is added to it, and on the sum after. Nothing here reads from the
device. Adapters without extras, and steps without such an adapter, pay nothing.

Whatever is linear in the adapter (biases of B, LoRA of the embedding and the head) adds up over a
composition; all else comes with weight 1 and alone (`validation.check_composition`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from loraplex.adapters.extras_parts import GROUP_OF, DeviceExtras, TableFactors
from loraplex.adapters.page_layout import FUSED_GROUPS
from loraplex.adapters.pool import PagePool
from loraplex.engine.api import AdapterUse
from loraplex.engine.model_config import DecoderConfig
from loraplex.kernels.ops import Linear, Module

Run = tuple[int, int, tuple[AdapterUse, ...]]  # first row, rows, composition
RmsNorm = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, slots=True)
class LaneRows:
    """Neighbouring rows of one adapter. weight: of the adapter in their composition."""

    rows: slice
    weight: float
    extras: DeviceExtras


@dataclass(frozen=True, slots=True)
class LaneModel:
    """What the lane knows of the model. norms: module paths in the order of the forward pass;
    columns: of each module in the output of its fused linear.
    """

    rms_norm: RmsNorm
    eps: float
    norms: tuple[str, ...]
    columns: tuple[slice, ...]

    @classmethod
    def of(cls, config: DecoderConfig, rms_norm: RmsNorm) -> Self:
        norms = []
        for layer in range(config.num_layers):
            norms.append(f"model.layers.{layer}.input_layernorm")
            norms.append(f"model.layers.{layer}.post_attention_layernorm")
        columns = []
        for group in FUSED_GROUPS:
            first = 0
            for module in group:
                columns.append(slice(first, first + config.module_shapes[module][1]))
                first = columns[-1].stop
        return cls(rms_norm, config.rms_norm_eps, (*norms, "model.norm"), tuple(columns))


@dataclass(frozen=True, slots=True)
class Lane:
    """Of one step. Every method changes its first argument in place."""

    model: LaneModel
    parts: tuple[LaneRows, ...]

    def embed(self, residual: Tensor, token_ids: Tensor) -> None:
        """residual: `[T, hidden]`, the base model's embedding."""
        for part in self.parts:
            extras, ids, out = part.extras, token_ids[part.rows], residual[part.rows]
            if extras.embedding is not None:
                out.copy_(extras.embedding.gather(ids))
            if extras.token_rows is not None and extras.token_ids is not None:
                known = extras.token_ids.whole()[:, 0]
                place = torch.searchsorted(known, ids).clamp_(max=len(known) - 1)
                own = extras.token_rows.gather(place)
                out.copy_(torch.where((known[place] == ids)[:, None], own, out))
            if extras.embedding_lora is not None:
                t = extras.embedding_lora.a.gather(ids)
                out.add_(_expand(extras.embedding_lora, t, part.weight))

    def project(self, linear: Linear, x: Tensor, layer: int, modules: tuple[Module, ...]) -> Tensor:
        """What the linear of these fused modules makes of x, `[T, in] -> [T, out]`, before the
        delta of A and B.
        """
        y = linear(x)
        key = (layer, GROUP_OF[modules[0]])
        for part in self.parts:
            extras = part.extras
            shift = extras.shifts.get(key)
            if shift is None:  # there is one whenever there is anything
                continue
            out = y[part.rows]
            for module in modules:
                own = extras.linears.get((layer, module))
                if own is not None:
                    out[:, self.model.columns[module]] = own.multiply(x[part.rows])
            gain = extras.gains.get(key)
            # In fp32, rounded once; `out=` spares a prefill a copy of it all in fp32.
            if gain is not None:
                torch.addcmul(shift, out, gain, out=out)
            else:
                torch.add(out, shift, alpha=part.weight, out=out)
        return y

    def norm(self, x: Tensor, residual: Tensor, index: int) -> None:
        """x: `[T, hidden]`, the residual normed by the base model's norm of this index."""
        path = self.model.norms[index]
        for part in self.parts:
            weight = part.extras.norms.get(path)
            if weight is not None:
                own = self.model.rms_norm(residual[part.rows], weight, self.model.eps)
                x[part.rows].copy_(own)

    def logits(self, logits: Tensor, hidden: Tensor) -> None:
        """logits: `[R, vocab]`, the base model's of hidden `[R, hidden]`."""
        for part in self.parts:
            extras, h, out = part.extras, hidden[part.rows], logits[part.rows]
            if extras.head is not None:
                out.copy_(extras.head.multiply(h))
            if extras.token_rows is not None and extras.token_rows_in_head:
                assert extras.token_ids is not None, "token rows without ids"
                ids = extras.token_ids.whole()[:, 0]
                out.index_copy_(1, ids, extras.token_rows.multiply(h))
            if extras.head_lora is not None:
                t = extras.head_lora.a.multiply(h)
                out.add_(_expand(extras.head_lora, t, part.weight))

    def at(self, rows: Sequence[int]) -> Lane | None:
        """The lane for `logits` of these rows of the step, ascending, in a batch of their own; None
        if it would do nothing.
        """
        parts = []
        for part in self.parts:
            if not part.extras.changes_logits:
                continue
            first, end = (bisect_left(rows, row) for row in (part.rows.start, part.rows.stop))
            if first < end:
                parts.append(replace(part, rows=slice(first, end)))
        return replace(self, parts=tuple(parts)) if parts else None


def _expand(lora: TableFactors, t: Tensor, weight: float) -> Tensor:
    """t: `[N, rank]` in model dtype -> `[N, out]`."""
    return lora.b.multiply((t * (lora.scaling * weight)).to(t.dtype))


class Lanes:
    """Makes the lane of each step."""

    def __init__(self, pool: PagePool, model: LaneModel) -> None:
        self._pool = pool
        self._model = model

    def find(self, runs: list[Run]) -> Lane | None:
        """None when no adapter of these rows has extras."""
        if not self._pool.has_extras:
            return None
        parts = []
        for row, count, adapters in runs:
            for use in adapters:
                extras = self._pool.extras(use.digest)
                if extras is not None:
                    parts.append(LaneRows(slice(row, row + count), use.weight, extras))
        return Lane(self._model, tuple(parts)) if parts else None
