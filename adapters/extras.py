"""What an adapter may change beyond the factors A and B of the layers' linear modules.

Most adapters change nothing of this (`Extras()` is false), and the pages of A and B are all there
is to them. What stands here is loaded from the same files and applied in a lane of its own, to the
rows of the adapter's requests only (`engine/lane.py`).

Only data: `weights.py` reads it from files, the engine applies it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

Key = tuple[int, int]  # layer, module kind (`weights.MODULE_KINDS`)


@dataclass(frozen=True, slots=True)
class TableLora:
    """LoRA of the embedding or of the output head. Model dtype, CPU, contiguous.

    Embedding: a token's row gains `scaling * at[token] @ bt`.
    Head: the logits of h gain `scaling * (h @ at) @ bt`.

    at: [in, rank], bt: [rank, out], where in and out are vocab and hidden, or hidden and vocab.
    """

    at: Tensor
    bt: Tensor
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of the embedding (PEFT's trainable tokens) that stand for the base model's.

    in_head: the output head is tied to the embedding, so its rows are replaced as well.
    """

    ids: Tensor  # [n] int64, ascending
    rows: Tensor  # [n, hidden], model dtype
    in_head: bool


@dataclass(frozen=True, slots=True)
class Extras:
    """Tensors are on the CPU, contiguous, in the model's dtype, magnitudes and biases in fp32.

    magnitudes: DoRA's m, [out], of modules that have A and B, too. Then the module computes
        `m / |W + scaling * B A| * (W x + scaling * B A x) + bias` (2402.09353; norms over rows of
        W, i.e. over the input features).
    delta_biases: lora_bias, the bias of B [out]; the output gains `scaling * bias` (the scaling is
        in it already).
    biases: [out], stand for the base model's bias (bias="all" or "lora_only"); zeros there when
        the module has none.
    linears: [out, in], stand for the base model's weight of a linear module of a layer
        (modules_to_save); a module is never both here and adapted by A and B.
    norms: [hidden], by module path relative to the causal LM ("model.norm",
        "model.layers.3.input_layernorm", ...), stand for the base model's.
    embedding, head: [vocab, hidden], stand for the base model's `model.embed_tokens` and `lm_head`.
    embedding_lora, head_lora: see TableLora.
    token_rows: see TokenRows.
    """

    magnitudes: dict[Key, Tensor] = field(default_factory=dict)
    delta_biases: dict[Key, Tensor] = field(default_factory=dict)
    biases: dict[Key, Tensor] = field(default_factory=dict)
    linears: dict[Key, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None
    head: Tensor | None = None
    embedding_lora: TableLora | None = None
    head_lora: TableLora | None = None
    token_rows: TokenRows | None = None

    def __bool__(self) -> bool:
        tables = (self.embedding, self.head, self.embedding_lora, self.head_lora, self.token_rows)
        parts = (self.magnitudes, self.delta_biases, self.biases, self.linears, self.norms)
        return any(table is not None for table in tables) or any(parts)

    def tensors(self) -> list[Tensor]:
        """All of it, for counting bytes."""
        found: list[Tensor] = []
        for part in (self.magnitudes, self.delta_biases, self.biases, self.linears, self.norms):
            found += part.values()
        found += [table for table in (self.embedding, self.head) if table is not None]
        for lora in (self.embedding_lora, self.head_lora):
            found += [lora.at, lora.bt] if lora is not None else []
        found += [self.token_rows.ids, self.token_rows.rows] if self.token_rows else []
        return found

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())
