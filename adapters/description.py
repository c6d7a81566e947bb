"""The manifest of an adapter that has passed `validation.py`: what loads, from which tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from loraplex.adapters.adapter_config import AdapterConfig, ModuleLora
from loraplex.adapters.digest import adapter_digest, values_digest
from loraplex.adapters.errors import Problem
from loraplex.adapters.fused import split
from loraplex.adapters.header import FLOAT_DTYPES, TensorInfo
from loraplex.adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, AdapterManifest, FileStamp
from loraplex.adapters.manifest_parts import ManifestModule, ManifestRows, Replacement
from loraplex.adapters.module_shape import EMBEDDING, HEAD, ModuleShape
from loraplex.adapters.tensor_names import Part, TensorKey
from loraplex.adapters.validation import Findings, base_table

_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
assert set(_DTYPE_NAMES) == set(FLOAT_DTYPES), "every float dtype has a name"


def describe(
    config: AdapterConfig, findings: Findings, folder: Path, base_model: str | None = None
) -> AdapterManifest:
    """The manifest of an adapter without problems. Reads both files once more, to hash them."""
    assert not findings.problems, "describing an adapter that must be refused"
    effects, placed = findings.effects, findings.placed
    meant = {key: info for key, info in placed.items() if key not in findings.unread}
    dtypes = {_DTYPE_NAMES[info.dtype] for info in meant.values()}
    shapes = {m.path: m for m in findings.modules}
    loras = {path: list(_lora(path, shapes[path], findings)) for path in effects.loras}
    table_loras = {path: loras.pop(path)[0] for path in (EMBEDDING, HEAD) if path in loras}
    tables = _base_tables(findings)
    own = {
        m.path: m.weight_digest for m in findings.modules if m.weight_digest and m.path in tables
    }
    copies = {
        path: digest
        for path, digest in own.items()
        if values_digest(folder / WEIGHTS_FILE, tables[path]) == digest
    }
    trained = {path: table for path, table in tables.items() if path not in copies}
    replacements = sorted(
        _replacements(findings, trained), key=lambda r: (r.path, r.parameter != "weight")
    )
    touches_tables = table_loras or tables or effects.token_ids or {EMBEDDING, HEAD} & effects.saved
    return AdapterManifest(
        digest=adapter_digest(
            config.canonical(),
            {key.canonical: info for key, info in meant.items()},
            folder / WEIGHTS_FILE,
        ),
        rank=max(lora.rank for lora in effects.loras.values()),
        alpha=config.lora_alpha,
        scaling=config.scaling,
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in effects.loras})),
        num_parameters=sum(info.numel for info in meant.values()),
        size_bytes=sum(info.nbytes for info in meant.values()),
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        base_model=config.base_model,
        modules=tuple(sorted((m for group in loras.values() for m in group), key=lambda m: m.path)),
        files={name: stamp(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)},
        warnings=tuple(_warnings(config, findings, base_model)),
        embedding_lora=table_loras.get(EMBEDDING),
        head_lora=table_loras.get(HEAD),
        replacements=tuple(replacements),
        token_rows=_token_rows(findings),
        tied_head=effects.tied if touches_tables else None,
        base_tables=copies,
        invocation_tokens=config.invocation_tokens,
    )


def _lora(path: str, module: ModuleShape, findings: Findings) -> Iterator[ManifestModule]:
    """The module's own entry, or one for each part of a fused projection."""
    lora: ModuleLora = findings.effects.loras[path]

    def name(part: Part, path: str = path) -> str | None:
        info = findings.placed.get(TensorKey(path, part))
        return None if info is None else info.name

    a, b = name(Part.A), name(Part.B)
    shared = path == EMBEDDING and findings.effects.shares_lora
    if shared:  # PEFT loads the head's last, into the memory of both
        a, b = name(Part.B, HEAD), name(Part.A, HEAD)
    elif path == EMBEDDING:
        a, b = name(Part.EMBEDDING_A), name(Part.EMBEDDING_B)
    assert a is not None, "validation finds every factor"
    assert b is not None, "validation finds every factor"
    for part, rows in split(module):
        yield ManifestModule(
            path=part,
            rank=lora.rank,
            alpha=lora.alpha,
            scaling=lora.scaling,
            in_features=module.in_features,
            out_features=module.out_features if rows is None else rows.count,
            lora_a=a,
            lora_b=b,
            rows=rows,
            magnitude=name(Part.MAGNITUDE),
            delta_bias=name(Part.B_BIAS),
            tied=shared,
        )


def _replacements(findings: Findings, tables: Mapping[str, TensorInfo]) -> Iterator[Replacement]:
    effects, placed = findings.effects, findings.placed
    modules = {m.path: m for m in findings.modules}
    for path, module in modules.items():
        saved = path in effects.saved
        if saved:
            yield from _replace(module, "weight", placed[TensorKey(path, Part.WEIGHT)].name)
        for part in (Part.BIAS, Part.BASE_BIAS):
            if TensorKey(path, part) in placed:
                yield from _replace(module, "bias", placed[TensorKey(path, part)].name)
    for path, table in tables.items():
        yield from _replace(modules[path], "weight", table.name)


def _replace(module: ModuleShape, parameter: str, tensor: str) -> Iterator[Replacement]:
    for path, rows in split(module):
        outputs = module.out_features if rows is None else rows.count
        entry = Replacement(path, parameter, module.kind, (), tensor, rows)
        shape = entry.shape_in(module, outputs)
        assert shape is not None, "validation places tensors on what a module has"
        yield Replacement(path, parameter, module.kind, shape, tensor, rows)


def _base_tables(findings: Findings) -> dict[str, TensorInfo]:
    """By path, the tensor that PEFT loads in place of the base model's own table, if there is one.

    Tied tables share their memory; PEFT loads the head's last.
    """
    effects, found = findings.effects, {}
    for path in {EMBEDDING, HEAD} & {m.path for m in findings.modules} - effects.saved:
        for table in (HEAD, EMBEDDING) if effects.tied else (path,):
            info = findings.placed.get(base_table(table, effects))
            if info is not None:
                found[path] = info
                break
    return found


def _token_rows(findings: Findings) -> ManifestRows | None:
    ids = findings.effects.token_ids
    if not ids:
        return None
    info = findings.placed[TensorKey(EMBEDDING, Part.ROWS)]
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    return ManifestRows(
        ids=tuple(ids[i] for i in order),
        order=tuple(order),
        hidden_size=info.shape[1],
        tensor=info.name,
        in_head=findings.effects.tied,
    )


def _warnings(config: AdapterConfig, findings: Findings, base_model: str | None) -> list[Problem]:
    warnings = []
    if base_model and config.base_model and _last_name(config.base_model) != _last_name(base_model):
        warnings.append(
            Problem(
                "base_model_differs",
                f"trained on {config.base_model}, served on {base_model}; the shapes fit",
                file=CONFIG_FILE,
                expected=base_model,
                actual=config.base_model,
            )
        )
    loras = findings.effects.loras
    if unmatched := config.idle_patterns(loras):
        shown = ", ".join(repr(key[:80]) for key in unmatched[:3])
        message = f"{len(unmatched)} keys of rank_pattern or alpha_pattern match nothing: {shown}"
        warnings.append(Problem("pattern_unmatched", message, file=CONFIG_FILE))
    if config.bias != "none" and _lacks_biases(config, findings):
        message = f"bias is {config.bias}, but the file has no bias: those of the base model stay"
        warnings.append(_problem("bias_missing", message))
    idle = _idle(findings)
    others = any(key.part not in _FACTORS for key in findings.placed)
    if len(idle) == len(loras) and not others:
        warnings.append(
            _problem("no_effect", "every lora_B is zero: the adapter answers like the base model")
        )
    elif idle:
        message = (
            f"lora_B is zero in {len(idle)} modules, which stay as they are: {', '.join(idle[:3])}"
        )
        warnings.append(_problem("partly_no_effect", message))
    return warnings


_FACTORS = (Part.A, Part.B, Part.EMBEDDING_A, Part.EMBEDDING_B)


def _lacks_biases(config: AdapterConfig, findings: Findings) -> bool:
    """Older releases of PEFT trained the biases of lora_only and did not save them."""
    loras = findings.effects.loras
    meant = [m for m in findings.modules if m.bias and (config.bias == "all" or m.path in loras)]
    there = any(key.part in (Part.BIAS, Part.BASE_BIAS) for key in findings.placed)
    return bool(meant) and not there


def _idle(findings: Findings) -> Sequence[str]:
    """Modules whose LoRA adds nothing, and nothing else is there to do it."""
    moved = {key.path for key in findings.placed if key.part in (Part.MAGNITUDE, Part.B_BIAS)}
    zero = {
        key.path
        for key, info in findings.placed.items()
        if key.part in _FACTORS and findings.scans[info.name].all_zero and key.part is not Part.A
    }
    return sorted(zero - moved)


def stamp(path: Path) -> FileStamp:
    """Size and hash of a file as it lies on the disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileStamp(file.tell(), digest)


def _last_name(model: str) -> str:
    # A hub id and a local directory of the same model agree only in their last part.
    return model.rstrip("/").rpartition("/")[2].lower()


def _problem(code: str, message: str) -> Problem:
    return Problem(code, message, file=WEIGHTS_FILE)
