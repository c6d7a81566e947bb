"""The model with an adapter by the shortest way that could be right: what the probe compares with.

fp32 beside the base model's weight products, dense attention, no pages, no lane, no fusion; the
adapter straight from its files. Slow, and of one sequence only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraplex.adapters.extras import Extras, Key, TableLora
from loraplex.adapters.fused import FUSED
from loraplex.adapters.weights import LoadedAdapter
from loraplex.engine.loader import Checkpoint
from loraplex.engine.model import Decoder
from loraplex.engine.model_config import MODULE_NAMES, DecoderConfig
from loraplex.kernels.ops import GATE_UP, QKV, Linear, Module

Delta = dict[Key, tuple[Tensor, Tensor, float]]  # A, B^T, scaling


@dataclass(frozen=True, slots=True)
class Adapter:
    """gains: DoRA's `m / |W + s B A|`, by module, `[out]`. All fp32, on the device.
    first: position from which A and B apply, above 0 of an activated LoRA only.
    """

    delta: Delta = field(default_factory=dict)
    gains: dict[Key, Tensor] = field(default_factory=dict)
    extras: Extras = field(default_factory=Extras)
    first: int = 0

    @classmethod
    def of(
        cls,
        loaded: LoadedAdapter,
        norms: dict[Key, Tensor],
        device: torch.device,
        first: int = 0,
    ) -> Adapter:
        """norms: of `dora_norms`."""
        return cls(
            {
                key: (m.a.to(device).float(), m.bt.to(device).float(), m.scaling)
                for key, m in loaded.modules.items()
            },
            {key: (m / norms[key]).to(device) for key, m in loaded.extras.magnitudes.items()},
            loaded.extras,
            first,
        )


def dora_norms(
    loaded: LoadedAdapter, checkpoint: Checkpoint, config: DecoderConfig, dtype: torch.dtype
) -> dict[Key, Tensor]:
    """`|W + s B A|` of every module that has a magnitude, `[out]` fp32, with W read from its file,
    rounded to the dtype that is served.
    """
    norms = {}
    for layer, module in loaded.extras.magnitudes:
        weight = _weight(checkpoint, config, layer, module).to(dtype).float()
        m = loaded.modules[layer, module]
        weight = weight + m.scaling * (m.bt.float().t() @ m.a.float())
        norms[layer, module] = torch.linalg.vector_norm(weight, dim=1)
    return norms


def _weight(checkpoint: Checkpoint, config: DecoderConfig, layer: int, module: int) -> Tensor:
    parent, _, name = MODULE_NAMES[module].rpartition(".")
    fused = next((f for f, parts in FUSED.items() if config.fused and name in parts), None)
    weight = checkpoint.read(f"model.layers.{layer}.{parent}.{fused or name}.weight")
    if fused is None:
        return weight
    first = MODULE_NAMES.index(f"{parent}.{FUSED[fused][0]}")
    start = sum(config.module_shapes[other][1] for other in range(first, module))
    return weight[start : start + config.module_shapes[module][1]]


def reference_logits(decoder: Decoder, token_ids: Tensor, adapter: Adapter) -> Tensor:
    """`[T] -> [T, vocab]` fp32."""
    config, dtype, device = decoder.config, decoder.embedding.dtype, token_ids.device
    delta, extras = adapter.delta, adapter.extras
    positions = torch.arange(len(token_ids), device=device)
    cos, sin = (part[:, None].float() for part in decoder.rope(positions))
    behind = positions[:, None] - positions[None, :]  # how far the query is after the key

    def own(tensor: Tensor) -> Tensor:
        return tensor.to(device).float()

    def linear(i: int, base: Linear, x: Tensor, *modules: Module) -> Tensor:
        fused = base.product(x.to(dtype)).float()
        columns = []
        for module in modules:
            key = (i, int(module))
            y = fused[:, decoder.lane_model.columns[module]]
            if key in extras.linears:
                y = x @ own(extras.linears[key]).t()
            if key in delta:
                a, bt, scaling = delta[key]
                applies = positions[:, None] >= adapter.first
                y = y + applies * (x @ a.t() @ bt) * scaling
            if key in adapter.gains:
                y = y * adapter.gains[key]
            if key in extras.biases:
                y = y + own(extras.biases[key])
            elif base.bias is not None:
                y = y + base.bias[decoder.lane_model.columns[module]].float()
            if key in extras.delta_biases:
                y = y + own(extras.delta_biases[key])
            columns.append(y)
        return torch.cat(columns, dim=-1)

    def norm(x: Tensor, weight: Tensor, path: str = "") -> Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + config.rms_norm_eps) * own(extras.norms.get(path, weight))

    residual = _embedded(decoder.embedding, token_ids, extras)
    x = norm(residual, decoder.first_norm, "model.layers.0.input_layernorm")
    for i, layer in enumerate(decoder.layers):
        prefix, is_last = f"model.layers.{i}.", i + 1 == len(decoder.layers)
        qkv = linear(i, layer.qkv, x, *QKV)
        heads = qkv.view(len(token_ids), -1, config.head_dim)
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = torch.split(heads, sizes, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        q, k = (part * cos + _turned(part) * sin for part in (q, k))
        sees = behind >= 0
        if layer.sliding_window is not None:
            sees &= behind < layer.sliding_window
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        x = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=sees, enable_gqa=True
        )
        residual = residual + linear(i, layer.o, x.transpose(0, 1).flatten(1), Module.O)
        x = norm(residual, layer.post_attention_norm, prefix + "post_attention_layernorm")
        gate, up = linear(i, layer.gate_up, x, *GATE_UP).chunk(2, dim=-1)
        x = torch.nn.functional.silu(gate) * up
        residual = residual + linear(i, layer.down, x, Module.DOWN)
        following = "model.norm" if is_last else f"model.layers.{i + 1}.input_layernorm"
        x = norm(residual, layer.next_norm, following)
    return _logits(decoder, x, extras)


def _embedded(base: Tensor, token_ids: Tensor, extras: Extras) -> Tensor:
    """One token after the other, as the formats are defined."""
    rows = []
    own = (
        {}
        if extras.token_rows is None
        else dict(zip(extras.token_rows.ids.tolist(), extras.token_rows.rows, strict=True))
    )
    for token in token_ids.tolist():
        table = base if extras.embedding is None else extras.embedding
        row = own.get(token, table[token]).to(base.device).float()
        if extras.embedding_lora is not None:
            lora = extras.embedding_lora
            row = row + lora.scaling * (lora.at[token].float() @ lora.bt.float()).to(base.device)
        rows.append(row)
    return torch.stack(rows)


def _logits(decoder: Decoder, x: Tensor, extras: Extras) -> Tensor:
    device = x.device
    logits = decoder.lm_head(x.to(decoder.embedding.dtype)).float()
    if extras.head is not None:
        logits = x @ extras.head.to(device).float().t()
    if extras.token_rows is not None and extras.token_rows.in_head:
        for token, row in zip(extras.token_rows.ids.tolist(), extras.token_rows.rows, strict=True):
            logits[:, token] = x @ row.to(device).float()
    if extras.head_lora is not None:
        logits = logits + _times(extras.head_lora, x)
    return logits


def _times(lora: TableLora, x: Tensor) -> Tensor:
    return lora.scaling * (x @ lora.at.to(x.device).float() @ lora.bt.to(x.device).float())


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
