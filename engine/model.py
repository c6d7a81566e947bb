"""The decoder: Llama, Mistral, Qwen2, Qwen3 and Phi-3 in one forward pass over a flat token axis.

T tokens of all the step's sequences stand in one row after another; where each belongs is said by
the batch. Every operation comes from `kernels.ops`, which also adds the adapters' deltas: there is
no other forward pass for LoRA. Knows nothing about requests, sampling or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.adapters.extras_parts import GROUP_OF
from loraplex.engine.lane import Lane, LaneModel
from loraplex.engine.loader import Checkpoint
from loraplex.engine.model_config import DecoderConfig
from loraplex.engine.rope import RotaryEmbedding
from loraplex.kernels.ops import (
    GATE_UP,
    QKV,
    AttentionBatch,
    KVCache,
    Linear,
    LoraBatch,
    Module,
    Ops,
)

O_ONLY = (Module.O,)
DOWN_ONLY = (Module.DOWN,)


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: Linear
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    o: Linear
    post_attention_norm: Tensor  # [hidden]
    gate_up: Linear
    down: Linear
    next_norm: Tensor  # the next layer's input norm, after the last layer the final norm
    sliding_window: int | None


class Decoder:
    def __init__(
        self,
        config: DecoderConfig,
        ops: Ops,
        embedding: Tensor,
        first_norm: Tensor,
        layers: list[Layer],
        lm_head: Linear,
    ) -> None:
        self.config = config
        self.ops = ops
        self.embedding = embedding  # [vocab, hidden]
        self.first_norm = first_norm
        self.layers = layers
        self.lm_head = lm_head
        self.lane_model = LaneModel.of(config, ops.rms_norm)
        self.rope = RotaryEmbedding(config.rope, embedding.device)
        self._scale: float = config.head_dim**-0.5

    def forward(
        self,
        token_ids: Tensor,
        kv: KVCache,
        batch: AttentionBatch,
        lora: LoraBatch | None,
        before_layer: Callable[[int], None] | None = None,
        lane: Lane | None = None,
    ) -> Tensor:
        """One step: `[T] int64 -> [T, hidden]`, normed, ready for `logits`. Writes K and V.

        before_layer: called with each layer's number ahead of it, to wait for adapters on their
        way. lane: what adapters change beyond their pages; None if no row's does.
        """
        ops, eps, heads = self.ops, self.config.rms_norm_eps, self.config.num_heads
        cos, sin = self.rope(batch.positions)
        residual = ops.embed(token_ids, self.embedding)
        if lane is not None:
            lane.embed(residual, token_ids)
        x = ops.rms_norm(residual, self.first_norm, eps)
        if lane is not None:
            lane.norm(x, residual, 0)
        for i, layer in enumerate(self.layers):
            if before_layer is not None:
                before_layer(i)
            t = ops.lora_shrink(x, lora, i, QKV)
            y = layer.qkv(x) if lane is None else lane.project(layer.qkv, x, i, QKV)
            q = ops.rope_kv_write(
                y, t, lora, i,
                cos, sin, layer.q_norm, layer.k_norm, eps, heads, kv, batch,
            )  # fmt: skip
            x = ops.attention(q, kv, i, batch, self._scale, layer.sliding_window)
            t = ops.lora_shrink(x, lora, i, O_ONLY)
            y = layer.o(x) if lane is None else lane.project(layer.o, x, i, O_ONLY)
            x = ops.add_rms_norm(y, t, lora, i, Module.O, residual, layer.post_attention_norm, eps)
            if lane is not None:
                lane.norm(x, residual, 2 * i + 1)
            t = ops.lora_shrink(x, lora, i, GATE_UP)
            y = layer.gate_up(x) if lane is None else lane.project(layer.gate_up, x, i, GATE_UP)
            x = ops.swiglu(y, t, lora, i)
            t = ops.lora_shrink(x, lora, i, DOWN_ONLY)
            y = layer.down(x) if lane is None else lane.project(layer.down, x, i, DOWN_ONLY)
            x = ops.add_rms_norm(y, t, lora, i, Module.DOWN, residual, layer.next_norm, eps)
            if lane is not None:
                lane.norm(x, residual, 2 * i + 2)
        return x

    def logits(self, hidden: Tensor, lane: Lane | None = None) -> Tensor:
        """`[R, hidden] -> [R, vocab]` in model dtype. lane: of these rows (`Lane.at`)."""
        logits = self.lm_head(hidden)
        if lane is not None:
            lane.logits(logits, hidden)
        return logits

    def linear(self, layer: int, module: int) -> tuple[Linear, slice]:
        """The linear that computes a module, fused with its like, and the module's columns of its
        output.
        """
        of = self.layers[layer]
        linear = (of.qkv, of.o, of.gate_up, of.down)[GROUP_OF[module]]
        return linear, self.lane_model.columns[module]

    @property
    def nbytes(self) -> int:
        linears = [self.lm_head]
        norms = [self.embedding, self.first_norm]
        for layer in self.layers:
            linears += [layer.qkv, layer.o, layer.gate_up, layer.down]
            norms += [layer.post_attention_norm, layer.next_norm]
        return sum(linear.nbytes for linear in linears) + sum(norm.nbytes for norm in norms)


@torch.inference_mode()
def load_decoder(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Decoder:
    """Read the weights layer by layer, fusing q/k/v and gate/up unless they are already.

    progress: called with steps done and steps in all.

    Raises: ModelError when a tensor is missing or misshapen.
    """
    checkpoint.check(
        config.tensor_shapes(), ignored=("lm_head.weight",) if config.tie_word_embeddings else ()
    )
    embedding = checkpoint.read_stacked(["model.embed_tokens.weight"], dtype, device)

    def tensor(name: str) -> Tensor:
        return checkpoint.read_stacked([name], dtype, device)

    def linear(prefix: str, names: tuple[str, ...], bias: bool) -> Linear:
        weight = checkpoint.read_stacked([f"{prefix}{n}.weight" for n in names], dtype, device)
        if not bias:
            return ops.linear(weight)
        return ops.linear(
            weight, checkpoint.read_stacked([f"{prefix}{n}.bias" for n in names], dtype, device)
        )

    qkv_names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up_names: tuple[str, ...] = ("gate_proj", "up_proj")
    if config.fused:
        qkv_names, gate_up_names = ("qkv_proj",), ("gate_up_proj",)

    def layer(i: int) -> Layer:
        prefix = f"model.layers.{i}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        last = i + 1 == config.num_layers
        return Layer(
            qkv=linear(attention, qkv_names, config.qkv_bias),
            q_norm=tensor(attention + "q_norm.weight") if config.qk_norm else None,
            k_norm=tensor(attention + "k_norm.weight") if config.qk_norm else None,
            o=linear(attention, ("o_proj",), config.o_bias),
            post_attention_norm=tensor(prefix + "post_attention_layernorm.weight"),
            gate_up=linear(mlp, gate_up_names, config.mlp_bias),
            down=linear(mlp, ("down_proj",), config.mlp_bias),
            next_norm=tensor(
                "model.norm.weight" if last else f"model.layers.{i + 1}.input_layernorm.weight"
            ),
            sliding_window=config.sliding_windows[i],
        )

    layers = []
    for i in range(config.num_layers):
        progress(i, config.num_layers + 1)
        layers.append(layer(i))
    progress(config.num_layers, config.num_layers + 1)
    lm_head = (
        ops.linear(embedding) if config.tie_word_embeddings else linear("", ("lm_head",), False)
    )
    progress(config.num_layers + 1, config.num_layers + 1)
    return Decoder(
        config, ops, embedding, tensor("model.layers.0.input_layernorm.weight"), layers, lm_head
    )
