"""What of an adapter depends on the base model's weights, worked out once when it is loaded.

DoRA (2402.09353) scales each output row of a module by `g = m / |W + s B A|`, so that

    y = g (W x + s B A x) + bias

g B takes B's place in the pages, hence the kernels add the delta as ever; what is left is a gain
and a shift of the base model's own output, which replaced biases and biases of B are as well:

    y = gain (W x + b) + shift,   shift = b' + s b_B - gain b

The norm needs no W: `|W + s B A|^2 = |W|^2 + 2 s B (A W^T) + s^2 B (A A^T) B^T`, row by row, and
A W^T is the base model's own product, whatever form the weight is kept in.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.extras import Extras, Key
from loraplex.adapters.extras_parts import GROUP_OF, Prepared, table_parts
from loraplex.adapters.page_layout import FUSED_GROUPS, PartName
from loraplex.adapters.weights import MODULE_KINDS, LoadedAdapter, LoadedModule
from loraplex.engine.model import Decoder

_NOTHING = 1e-6  # of |W|^2: a norm that small is rounding


class BaseWeights:
    """fingerprint: of the checkpoint, "" where nothing is kept on disk. Safe from one thread at a
    time, beside the engine's.
    """

    def __init__(self, decoder: Decoder, fingerprint: str = "") -> None:
        self.fingerprint = fingerprint
        self._decoder = decoder
        self._squares: dict[Key, Tensor] = {}

    @torch.inference_mode()
    def prepare(self, loaded: LoadedAdapter) -> Prepared:
        """Fold the gains into B, and turn the extras into parts of the image.

        Raises: AdapterError "adapter_degenerate" where W + s B A has a row without length, which
        DoRA would divide by; "adapter_overflow" where a gain takes B beyond the dtype's range.
        """
        extras = loaded.extras
        if not extras:
            return Prepared(loaded)
        parts: dict[PartName, Tensor] = {**table_parts(extras)}
        parts |= {("norm", path): weight[None] for path, weight in extras.norms.items()}
        parts |= {("linear", *key): weight for key, weight in extras.linears.items()}
        modules = dict(loaded.modules)
        touched = {*extras.magnitudes, *extras.biases, *extras.delta_biases, *extras.linears}
        for layer, group in sorted({(layer, GROUP_OF[module]) for layer, module in touched}):
            gains, shifts = [], []
            for module in FUSED_GROUPS[group]:
                key = (layer, module)
                gain = self._gain(loaded, key)
                if key in extras.magnitudes:
                    modules[key] = _scaled(modules[key], gain, loaded.digest)
                gains.append(gain)
                shifts.append(self._shift(extras, key, gain))
            parts["shift", layer, group] = torch.cat(shifts)[None]
            if any((layer, module) in extras.magnitudes for module in FUSED_GROUPS[group]):
                parts["gain", layer, group] = torch.cat(gains)[None]
        return Prepared(replace(loaded, modules=modules), parts)

    def bias(self, key: Key) -> Tensor:
        """`[out]` fp32 on the CPU, zeros where the base model has none."""
        linear, columns = self._decoder.linear(*key)
        if linear.bias is None:
            return torch.zeros(columns.stop - columns.start)
        return linear.bias[columns].float().cpu()

    def _gain(self, loaded: LoadedAdapter, key: Key) -> Tensor:
        """`[out]` fp32, ones without a magnitude."""
        if key not in loaded.extras.magnitudes:
            return torch.ones(self._decoder.config.module_shapes[key[1]][1])
        squared = self._squared_norms(loaded.modules[key], key)
        is_sound = (squared > _NOTHING * self.row_squares(key)) & squared.isfinite()
        if not bool(is_sound.all()):
            row = int(is_sound.logical_not().nonzero()[0])
            raise AdapterError(
                f"adapter {loaded.digest[:12]}: row {row} of {MODULE_KINDS[key[1]]} of layer "
                f"{key[0]} has the squared length {float(squared[row]):g} after its delta, and "
                "DoRA divides by it; train it anew",
                code="adapter_degenerate",
            )
        return loaded.extras.magnitudes[key] / squared.sqrt()

    def _squared_norms(self, module: LoadedModule, key: Key) -> Tensor:
        """`|W + s B A|^2` by rows, `[out]` fp32."""
        linear, columns = self._decoder.linear(*key)
        device = self._decoder.embedding.device
        with _own_stream(device):
            product = linear.product(module.a.to(device))[:, columns].float().cpu()
        a, bt, scaling = module.a.float(), module.bt.float(), module.scaling
        crossed = (bt * product).sum(0)
        own = (bt * (a @ a.t() @ bt)).sum(0)
        return self.row_squares(key) + 2 * scaling * crossed + scaling**2 * own

    def _shift(self, extras: Extras, key: Key, gain: Tensor) -> Tensor:
        """`[out]` fp32."""
        base = self.bias(key)
        shift = extras.biases.get(key, base)
        if key in extras.delta_biases:
            shift = shift + extras.delta_biases[key]
        if key in extras.linears:  # replaces the base model's output, its bias included
            return shift
        return shift - gain * base

    def row_squares(self, key: Key) -> Tensor:
        """`|W|^2` by rows, `[out]` fp32 on the CPU."""
        layer, module = key
        group = (layer, GROUP_OF[module])
        linear, columns = self._decoder.linear(*key)
        if group not in self._squares:
            with _own_stream(self._decoder.embedding.device):
                self._squares[group] = linear.row_squares().cpu()
        return self._squares[group][columns]


def _scaled(module: LoadedModule, gain: Tensor, digest: str) -> LoadedModule:
    bt = (module.bt.float() * gain).to(module.bt.dtype)
    if not bool(bt.isfinite().all()):
        kind = str(bt.dtype).removeprefix("torch.")
        raise AdapterError(
            f"adapter {digest[:12]}: B, scaled by DoRA's gains, is beyond the range of {kind}; "
            "serve with --dtype bfloat16",
            code="adapter_overflow",
        )
    return replace(module, bt=bt)


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Beside the steps, not between them."""
    if device.type != "cuda":
        return nullcontext()
    cuda: Any = torch.cuda
    stream: AbstractContextManager[object] = cuda.stream(cuda.Stream(device))
    return stream
