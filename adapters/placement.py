"""Every tensor of an adapter file on its module of the base model, with the shape it must have.

Knows nothing of the config: whether a tensor should be there is `validation.py`'s question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraplex.adapters.errors import Problem
from loraplex.adapters.header import FLOAT_DTYPES, Header, TensorInfo
from loraplex.adapters.manifest import WEIGHTS_FILE
from loraplex.adapters.module_shape import ModuleShape
from loraplex.adapters.tensor_names import PREFIX, Part, TensorKey, describe_foreign, parse_key

Placed = dict[TensorKey, TensorInfo]
Shape = tuple[int | str, ...]  # a word where any length will do

_BIASES = (Part.BIAS, Part.BASE_BIAS, Part.ORIGINAL_BIAS, Part.SAVED_BIAS)
_WEIGHTS = (Part.WEIGHT, Part.BASE_WEIGHT, Part.ORIGINAL_WEIGHT, Part.SAVED_WEIGHT)
_TABLE_ONLY = (Part.BASE_WEIGHT, Part.ORIGINAL_WEIGHT, Part.ROWS)
_PAIRS = {
    Part.A: Part.B,
    Part.B: Part.A,
    Part.EMBEDDING_A: Part.EMBEDDING_B,
    Part.EMBEDDING_B: Part.EMBEDDING_A,
}


def place(header: Header, modules: Sequence[ModuleShape], problems: list[Problem]) -> Placed:
    """What is wrong goes into `problems`; a tensor of the wrong shape is placed all the same."""
    by_path: Mapping[str, ModuleShape] = {m.path: m for m in modules}
    placed: Placed = {}

    def refuse(code: str, name: str, message: str, **more: str) -> None:
        problems.append(_problem(code, f"{name}: {message}", name, **more))

    for name, info in header.tensors.items():
        key = parse_key(name)
        if key is None:
            what = describe_foreign(name) or f"not a LoRA tensor ({PREFIX}<module>.lora_A.weight)"
            refuse("tensor_unsupported", name, what)
            continue
        module = by_path.get(key.path)
        if module is None:
            refuse("module_unknown", name, f"this base model has no module {key.path}")
            continue
        expected = expected_shape(key.part, module)
        if expected is None:
            refuse("tensor_unsupported", name, f"{key.path} can have no {key.part}")
            continue
        if key in placed:
            refuse("tensor_duplicate", name, f"also there as {placed[key].name}")
            continue
        placed[key] = info
        if info.dtype not in FLOAT_DTYPES:
            refuse(
                "dtype_unsupported",
                name,
                f"dtype {info.dtype} is no weight type we can serve",
                expected=" or ".join(FLOAT_DTYPES),
                actual=info.dtype,
            )
        if not _fits(info.shape, expected):
            wanted = f"[{', '.join(map(str, expected))}]"
            resized = module.kind in ("embedding", "head") and key.part in _WEIGHTS
            hint = "; a model with another vocabulary is another base model" if resized else ""
            refuse(
                "shape_mismatch",
                name,
                f"shape {list(info.shape)} does not fit this base model, which needs {wanted}"
                + hint,
                expected=wanted,
                actual=str(list(info.shape)),
            )
    for key, info in placed.items():
        if key.part in _PAIRS:
            other = TensorKey(key.path, _PAIRS[key.part])
            if other not in placed:
                short = other.part.removesuffix(".weight")
                refuse("pair_incomplete", info.name, f"its {short} is missing")
    return placed


def expected_shape(part: Part, module: ModuleShape) -> Shape | None:
    """None: a module of this kind has no such part."""
    inputs, outputs, kind = module.in_features, module.out_features, module.kind
    if part in (Part.A, Part.B) and kind in ("linear", "head"):
        return ("rank", inputs) if part is Part.A else (outputs, "rank")
    if part in (Part.EMBEDDING_A, Part.EMBEDDING_B) and kind == "embedding":
        return ("rank", inputs) if part is Part.EMBEDDING_A else (outputs, "rank")
    norm = kind in ("norm", "qk_norm")
    if part in (Part.B_BIAS, Part.MAGNITUDE) and not norm:
        return (outputs,)
    if part in _BIASES and module.bias:
        return (outputs,)
    table = kind in ("embedding", "head")
    if part is Part.ROWS and table:
        return ("tokens", outputs if kind == "embedding" else inputs)
    if part in _WEIGHTS and (table or part not in _TABLE_ONLY):
        if norm:
            return (outputs,)
        return (inputs, outputs) if kind == "embedding" else (outputs, inputs)
    return None


def _fits(shape: tuple[int, ...], expected: Shape) -> bool:
    return (
        len(shape) == len(expected)
        and 0 not in shape
        and all(e in (s, "rank", "tokens") for s, e in zip(shape, expected, strict=True))
    )


def _problem(code: str, message: str, tensor: str, **more: str) -> Problem:
    return Problem(code, message, file=WEIGHTS_FILE, tensor=tensor, **more)
