"""Does this adapter fit this base model? Every problem is told, not the first one.

Config (what is meant), header (what is there) and the model's modules (what there could be) are
held against each other: every tensor must land on a module with the right shape, every targeted
module must have both factors, every number must be finite. Bounded memory, no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loraplex.adapters.config import AdapterConfig, ModuleLora
from loraplex.adapters.digest import adapter_digest
from loraplex.adapters.errors import AdapterRefused, Problem
from loraplex.adapters.header import (
    FLOAT_DTYPES,
    Header,
    TensorInfo,
    TensorScan,
    scan_finite,
)
from loraplex.adapters.limits import Limits
from loraplex.adapters.manifest import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterManifest,
    FileStamp,
)
from loraplex.adapters.manifest_parts import ManifestModule
from loraplex.adapters.module_shape import ModuleShape
from loraplex.adapters.tensor_names import PREFIX, TensorKey, describe_foreign, parse_key

_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
assert set(_DTYPE_NAMES) == set(FLOAT_DTYPES), "every float dtype has a name"


@dataclass(slots=True)
class Findings:
    """What a look at an adapter gave. It may be served only if there are no problems."""

    problems: list[Problem] = field(default_factory=list)
    resolved: dict[str, ModuleLora] = field(default_factory=dict)
    factors: dict[TensorKey, TensorInfo] = field(default_factory=dict)
    scans: dict[str, TensorScan] = field(default_factory=dict)


def validate(
    config: AdapterConfig,
    header: Header,
    folder: Path,
    modules: Sequence[ModuleShape],
    limits: Limits | None = None,
    base_model: str | None = None,
) -> AdapterManifest:
    """Check an adapter whose two files lie in `folder`, and describe it.

    modules: every linear module of the base model that can be adapted.
    base_model: the served model's name. Another in the config is a warning only: shapes decide.

    Raises: AdapterRefused with every problem.
    """
    findings = examine(config, header, folder, modules, limits)
    if findings.problems:
        raise AdapterRefused(findings.problems)
    return describe(config, findings, folder, modules, base_model)


def examine(
    config: AdapterConfig | None,
    header: Header | None,
    folder: Path,
    modules: Sequence[ModuleShape],
    limits: Limits | None = None,
) -> Findings:
    """Find every problem; of an adapter that is half readable (None) those of the readable half."""
    limits = limits or Limits()
    findings = Findings()
    if header:
        _place_tensors(header, {m.path: m for m in modules}, findings)
        findings.scans = scan_finite(folder / WEIGHTS_FILE, header)
        for name, scan in findings.scans.items():
            if scan.first_nonfinite is not None:
                message = f"{name}: element {scan.first_nonfinite} is NaN or infinite"
                findings.problems.append(_problem("not_finite", message, name))
    if config:
        try:
            findings.resolved = config.resolve(modules)
        except AdapterRefused as refused:
            findings.problems += refused.problems
        else:
            _check_ranks(findings, limits)
            if header:
                _compare(findings)
    return findings


def _place_tensors(header: Header, modules: Mapping[str, ModuleShape], findings: Findings) -> None:
    """Every tensor on its module, with the right shape, A and B in pairs."""

    def refuse(code: str, name: str, message: str, **more: str) -> None:
        findings.problems.append(_problem(code, f"{name}: {message}", name, **more))

    for name, info in header.tensors.items():
        key = parse_key(name)
        if key is None:
            what = describe_foreign(name) or f"not a LoRA tensor ({PREFIX}<module>.lora_A.weight)"
            refuse("tensor_unsupported", name, what)
            continue
        module = modules.get(key.path)
        if module is None:
            refuse("module_unknown", name, f"this base model has no module {key.path}")
            continue
        if key in findings.factors:
            refuse("tensor_duplicate", name, f"also there as {findings.factors[key].name}")
            continue
        findings.factors[key] = info
        if info.dtype not in FLOAT_DTYPES:
            refuse(
                "dtype_unsupported",
                name,
                f"dtype {info.dtype} is no weight type we can serve",
                expected=" or ".join(FLOAT_DTYPES),
                actual=info.dtype,
            )
        fixed = module.in_features if key.side == "A" else module.out_features
        axis = 1 if key.side == "A" else 0
        if len(info.shape) != 2 or info.shape[axis] != fixed or 0 in info.shape:
            expected = f"[rank, {fixed}]" if key.side == "A" else f"[{fixed}, rank]"
            refuse(
                "shape_mismatch",
                name,
                f"shape {list(info.shape)} does not fit this base model, which needs {expected}",
                expected=expected,
                actual=str(list(info.shape)),
            )
    for key, info in findings.factors.items():
        other = TensorKey(key.path, "B" if key.side == "A" else "A")
        if other not in findings.factors:
            refuse("pair_incomplete", info.name, f"its lora_{other.side} is missing")


def _check_ranks(findings: Findings, limits: Limits) -> None:
    largest = max(lora.rank for lora in findings.resolved.values())
    if largest > limits.max_rank:
        findings.problems.append(
            Problem(
                "rank_too_large",
                f"rank {largest} exceeds the limit of {limits.max_rank}; retrain with a smaller r",
                file=CONFIG_FILE,
                expected=f"at most {limits.max_rank}",
                actual=str(largest),
            )
        )


def _compare(findings: Findings) -> None:
    """What the config means against what the file has."""
    resolved, factors = findings.resolved, findings.factors
    present = {key.path for key in factors}
    for path in resolved:
        if path not in present:
            name = TensorKey(path, "A").canonical
            message = f"the config adapts {path} but the file has no tensors for it"
            findings.problems.append(_problem("tensor_missing", message, name))
    for key, info in factors.items():
        if key.path not in resolved:
            message = f"{info.name}: the config does not adapt {key.path}"
            findings.problems.append(_problem("tensor_untargeted", message, info.name))
            continue
        rank = resolved[key.path].rank
        actual = info.shape[0 if key.side == "A" else -1] if len(info.shape) == 2 else None
        if actual is not None and actual != rank:
            findings.problems.append(
                _problem(
                    "rank_mismatch",
                    f"{info.name}: the tensor has rank {actual}, the config says {rank}",
                    info.name,
                    expected=str(rank),
                    actual=str(actual),
                )
            )


def describe(
    config: AdapterConfig,
    findings: Findings,
    folder: Path,
    modules: Sequence[ModuleShape],
    base_model: str | None = None,
) -> AdapterManifest:
    """The manifest of an adapter without problems. Reads both files once more, to hash them."""
    assert not findings.problems, "describing an adapter that must be refused"
    factors = findings.factors
    shapes = {m.path: m for m in modules}
    tensors = {key.canonical: info for key, info in factors.items()}
    dtypes = {_DTYPE_NAMES[info.dtype] for info in factors.values()}
    return AdapterManifest(
        digest=adapter_digest(config.canonical(), tensors, folder / WEIGHTS_FILE),
        rank=max(lora.rank for lora in findings.resolved.values()),
        alpha=config.lora_alpha,
        scaling=config.scaling,
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in findings.resolved})),
        num_parameters=sum(info.numel for info in factors.values()),
        size_bytes=sum(info.nbytes for info in factors.values()),
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        base_model=config.base_model,
        modules=tuple(
            ManifestModule(
                path=path,
                rank=lora.rank,
                alpha=lora.alpha,
                scaling=lora.scaling,
                in_features=shapes[path].in_features,
                out_features=shapes[path].out_features,
                lora_a=factors[TensorKey(path, "A")].name,
                lora_b=factors[TensorKey(path, "B")].name,
            )
            for path, lora in sorted(findings.resolved.items())
        ),
        files={name: stamp(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)},
        warnings=tuple(_warnings(config, findings, base_model)),
        invocation_tokens=config.invocation_tokens,
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
    if unmatched := config.idle_patterns(findings.resolved):
        shown = ", ".join(repr(key[:80]) for key in unmatched[:3])
        message = f"{len(unmatched)} keys of rank_pattern or alpha_pattern match nothing: {shown}"
        warnings.append(Problem("pattern_unmatched", message, file=CONFIG_FILE))
    idle = [
        key.path
        for key, info in sorted(findings.factors.items())
        if key.side == "B" and findings.scans[info.name].all_zero
    ]
    if len(idle) == len(findings.resolved):
        warnings.append(
            _problem("no_effect", "every lora_B is zero: the adapter answers like the base model")
        )
    elif idle:
        message = (
            f"lora_B is zero in {len(idle)} modules, which stay as they are: {', '.join(idle[:3])}"
        )
        warnings.append(_problem("partly_no_effect", message))
    return warnings


def stamp(path: Path) -> FileStamp:
    """Size and hash of a file as it lies on the disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileStamp(file.tell(), digest)


def _last_name(model: str) -> str:
    # A hub id and a local directory of the same model agree only in their last part.
    return model.rstrip("/").rpartition("/")[2].lower()


def _problem(code: str, message: str, tensor: str | None = None, **more: str) -> Problem:
    return Problem(code, message, file=WEIGHTS_FILE, tensor=tensor, **more)
