"""What an adapter has beyond A and B, as matrices in its frames (`page_layout.Part`).

So these are loaded, cached, counted and evicted with the pages, and there is no second kind of
adapter memory. A large matrix lies in pieces, one per frame, and is used piece by piece.

Magnitudes and biases are not stored as the files have them but as what they do to a row of the base
model's output: `y * gain + shift` (`Prepared`, made by whoever has the base model).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex.adapters.extras import Extras, TableLora
from loraplex.adapters.manifest import AdapterManifest
from loraplex.adapters.page_image import NO_PARTS, Parts
from loraplex.adapters.page_layout import FUSED_GROUPS, Key, Part, PartName, PartPlace
from loraplex.adapters.weights import LoadedAdapter, locate

GROUP_OF = {module: i for i, group in enumerate(FUSED_GROUPS) for module in group}

EMBEDDING, HEAD = ("table", "embedding"), ("table", "head")
TOKEN_IDS, TOKEN_ROWS = ("tokens", "ids"), ("tokens", "rows")
TOKEN_ROWS_IN_HEAD = ("tokens", "rows in head, too")  # instead of TOKEN_ROWS
TABLES: tuple[PartName, ...] = (
    EMBEDDING, HEAD, ("embedding", "scaling"), ("embedding", "a"), ("embedding", "b"),
    ("head", "scaling"), ("head", "a"), ("head", "b"), TOKEN_IDS, TOKEN_ROWS, TOKEN_ROWS_IN_HEAD,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prepared:
    """An adapter ready for its image.

    loaded: the gains are folded into B, so that what the kernels add needs no second look. parts:
    all else.
    """

    loaded: LoadedAdapter
    parts: Parts = field(default_factory=lambda: NO_PARTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtrasShape:
    """What an adapter has of `Extras`, without the values.

    gains, shifts, linears: (layer, module) with a magnitude, with a bias of either kind, with a
    weight of its own. tables: rows and columns by the name of their part.
    """

    gains: frozenset[Key] = frozenset()
    shifts: frozenset[Key] = frozenset()
    linears: frozenset[Key] = frozenset()
    norms: tuple[str, ...] = ()
    tables: tuple[tuple[PartName, int, int], ...] = ()

    @classmethod
    def of(cls, extras: Extras) -> Self:
        return cls(
            gains=frozenset(extras.magnitudes),
            shifts=frozenset(extras.delta_biases) | frozenset(extras.biases),
            linears=frozenset(extras.linears),
            norms=tuple(sorted(extras.norms)),
            tables=tuple((name, *table.shape) for name, table in table_parts(extras).items()),
        )

    @classmethod
    def of_manifest(cls, manifest: AdapterManifest) -> Self:
        """Of what `load_weights` will give of it."""
        tables: list[tuple[PartName, int, int]] = []
        biases, linears, norms = set(), set(), []
        for r in manifest.replacements:
            if r.parameter == "bias":
                biases.add(_key(r.path))
            elif r.kind == "linear":
                linears.add(_key(r.path))
            elif r.kind == "norm":
                norms.append(r.path)
            else:
                tables.append(
                    (EMBEDDING if r.kind == "embedding" else HEAD, r.shape[0], r.shape[1])
                )
        for where, m in (("embedding", manifest.embedding_lora), ("head", manifest.head_lora)):
            if m is not None:
                a = (m.in_features, m.rank) if where == "embedding" else (m.rank, m.in_features)
                tables += [
                    ((where, "scaling"), 1, 1),
                    ((where, "a"), *a),
                    ((where, "b"), m.out_features, m.rank),
                ]
        if manifest.token_rows is not None:
            rows = manifest.token_rows
            name = TOKEN_ROWS_IN_HEAD if rows.in_head else TOKEN_ROWS
            tables += [(TOKEN_IDS, len(rows.ids), 1), (name, len(rows.ids), rows.hidden_size)]
        order = {name: i for i, name in enumerate(TABLES)}
        return cls(
            gains=frozenset(_key(m.path) for m in manifest.modules if m.magnitude is not None),
            shifts=frozenset(biases).union(
                _key(m.path) for m in manifest.modules if m.delta_bias is not None
            ),
            linears=frozenset(linears),
            norms=tuple(sorted(norms)),
            tables=tuple(sorted(tables, key=lambda table: order[table[0]])),
        )

    def parts(
        self, module_shapes: tuple[tuple[int, int], ...], dtype: torch.dtype
    ) -> tuple[Part, ...]:
        """In the order of the image: what the first layers need comes first."""
        found: list[Part] = []

        def add(name: PartName, rows: int, width: int) -> None:
            element_bytes = (dtype_of(name) or dtype).itemsize
            found.append(Part(name, rows, width * element_bytes // dtype.itemsize))

        for name, rows, width in self.tables:
            add(name, rows, width)
        for path in self.norms:
            add(("norm", path), 1, module_shapes[0][0])
        for what, keys in (
            ("gain", self.gains),
            ("shift", self.gains | self.shifts | self.linears),
        ):
            for layer, group in sorted({(layer, GROUP_OF[module]) for layer, module in keys}):
                width = sum(module_shapes[module][1] for module in FUSED_GROUPS[group])
                add((what, layer, group), 1, width)
        for layer, module in sorted(self.linears):
            add(("linear", layer, module), module_shapes[module][1], module_shapes[module][0])
        return tuple(found)


NO_EXTRAS = ExtrasShape()


def table_parts(extras: Extras) -> dict[PartName, Tensor]:
    """What is about the vocabulary. Factors are turned so that no row is as long as it."""
    found: dict[PartName, Tensor] = {}
    if extras.embedding is not None:
        found[EMBEDDING] = extras.embedding
    if extras.head is not None:
        found[HEAD] = extras.head
    if extras.embedding_lora is not None:
        lora = extras.embedding_lora
        found |= _lora_parts("embedding", lora.at, lora)
    if extras.head_lora is not None:
        lora = extras.head_lora
        found |= _lora_parts("head", lora.at.t(), lora)
    if extras.token_rows is not None:
        tokens = extras.token_rows
        found[TOKEN_IDS] = tokens.ids[:, None]
        found[TOKEN_ROWS_IN_HEAD if tokens.in_head else TOKEN_ROWS] = tokens.rows
    return found


def _lora_parts(where: str, a: Tensor, lora: TableLora) -> dict[PartName, Tensor]:
    scaling = torch.tensor([[lora.scaling]], dtype=torch.float32)
    return {(where, "scaling"): scaling, (where, "a"): a, (where, "b"): lora.bt.t()}


def _key(path: str) -> Key:
    key = locate(path)
    assert key is not None, f"{path} is a module of the model, but has no column"
    return key


def dtype_of(name: PartName) -> torch.dtype | None:
    """None: the model's."""
    if name[0] in ("gain", "shift") or name[1] == "scaling":
        return torch.float32
    return torch.int64 if name == TOKEN_IDS else None


class Table:
    """A matrix `[rows, width]` in device memory, in pieces of equally many rows (the last maybe
    fewer). Reads nothing from the device, so a step may use it at any time.

    memory: what the pieces lie in, flat, of their dtype. starts: `[pieces]` int64 on the device,
    where in it each begins.
    """

    def __init__(
        self, memory: Tensor, pieces: list[Tensor], rows_per_piece: int, starts: Tensor
    ) -> None:
        self.pieces = pieces
        self._memory = memory
        self._rows_per_piece = rows_per_piece
        self._starts = starts
        self._width = pieces[0].shape[1]

    def whole(self) -> Tensor:
        """`[rows, width]`; a copy if it lies in pieces."""
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces)

    def gather(self, rows: Tensor) -> Tensor:
        """`[N] int64 -> [N, width]`, new."""
        if len(self.pieces) == 1:
            return self.pieces[0].index_select(0, rows)
        starts = self._starts[rows // self._rows_per_piece]
        starts = starts + rows % self._rows_per_piece * self._width
        columns = torch.arange(self._width, device=rows.device)
        return self._memory[starts[:, None] + columns]

    def multiply(self, x: Tensor) -> Tensor:
        """`x` times the transpose, `[N, width] -> [N, rows]`."""
        if len(self.pieces) == 1:
            return F.linear(x, self.pieces[0])
        return torch.cat([F.linear(x, piece) for piece in self.pieces], dim=-1)


@dataclass(frozen=True, slots=True)
class TableFactors:
    """LoRA of the embedding or the head, see `extras.TableLora`."""

    scaling: Tensor  # [1] fp32
    a: Table  # embedding: [vocab, rank]; head: [rank, hidden]
    b: Table  # [out, rank]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceExtras:
    """An adapter's parts on the device, by what they are for.

    gains, shifts: by (layer, fused group) `[out]` fp32. linears: by (layer, module).
    """

    gains: dict[Key, Tensor]
    shifts: dict[Key, Tensor]
    linears: dict[Key, Table]
    norms: dict[str, Tensor]
    embedding: Table | None
    head: Table | None
    embedding_lora: TableFactors | None
    head_lora: TableFactors | None
    token_ids: Table | None  # [n, 1]
    token_rows: Table | None
    token_rows_in_head: bool

    @property
    def changes_logits(self) -> bool:
        return bool(self.head or self.head_lora or (self.token_rows and self.token_rows_in_head))

    @classmethod
    def find(
        cls,
        places: tuple[PartPlace, ...],
        arena: Tensor,
        absolute: Callable[[int], int],
        upload: Callable[[Tensor], Tensor],
    ) -> Self:
        """arena: `[elements]` of the pool. absolute: element of an image -> element of the arena.
        upload: brings a small tensor to the device without waiting.
        """

        def table(place: PartPlace) -> Table:
            dtype = dtype_of(place.part.name) or arena.dtype
            scale = dtype.itemsize // arena.dtype.itemsize
            memory = arena.view(dtype)
            width = place.part.row_elements // scale
            pieces, starts = [], []
            for _, rows, offset in place.pieces():
                start, rest = divmod(absolute(offset), scale)
                assert rest == 0, f"{place.part.name} is not aligned"
                starts.append(start)
                pieces.append(memory[start : start + rows * width].view(rows, width))
            return Table(memory, pieces, place.rows_per_piece, upload(torch.tensor(starts)))

        tables = {place.part.name: table(place) for place in places}

        def rows(what: str) -> dict[Key, Tensor]:
            return {
                (name[1], name[2]): part.pieces[0][0]
                for name, part in tables.items()
                if len(name) == 3 and name[0] == what
            }

        def factors(where: str) -> TableFactors | None:
            if (where, "a") not in tables:
                return None
            scaling = tables[where, "scaling"].pieces[0][0]
            return TableFactors(scaling, tables[where, "a"], tables[where, "b"])

        return cls(
            gains=rows("gain"),
            shifts=rows("shift"),
            linears={
                (name[1], name[2]): part
                for name, part in tables.items()
                if len(name) == 3 and name[0] == "linear"
            },
            norms={
                name[1]: part.pieces[0][0]
                for name, part in tables.items()
                if len(name) == 2 and name[0] == "norm"
            },
            embedding=tables.get(EMBEDDING),
            head=tables.get(HEAD),
            embedding_lora=factors("embedding"),
            head_lora=factors("head"),
            token_ids=tables.get(TOKEN_IDS),
            token_rows=tables.get(TOKEN_ROWS) or tables.get(TOKEN_ROWS_IN_HEAD),
            token_rows_in_head=TOKEN_ROWS_IN_HEAD in tables,
        )
