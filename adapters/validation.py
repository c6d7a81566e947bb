"""Does this adapter fit this base model? Every problem is told, not the first one.

Config (what is meant), header (what is there) and the model's modules (what there could be) are
held against each other: every tensor must land on a module with the right shape and mean what PEFT
would make of it, everything that the config changes must have its tensors, every number must be
finite. Bounded memory, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loraplex.adapters.adapter_config import AdapterConfig
from loraplex.adapters.effects import Effects, resolve
from loraplex.adapters.errors import AdapterRefused, Problem
from loraplex.adapters.fused import as_adapter_sees
from loraplex.adapters.header import Header, TensorScan, scan_finite
from loraplex.adapters.limits import Limits
from loraplex.adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from loraplex.adapters.module_shape import EMBEDDING, HEAD, ModuleShape
from loraplex.adapters.placement import Placed, place
from loraplex.adapters.tensor_names import Part, TensorKey


@dataclass(slots=True)
class Findings:
    """What a look at an adapter gave. It may be served only if there are no problems.

    modules: the base model's, with projections fused where the adapter's tensors have them so.
    unread: tensors that PEFT reads no more than we do; they are no part of what the adapter is.
    """

    problems: list[Problem] = field(default_factory=list)
    modules: Sequence[ModuleShape] = ()
    effects: Effects = field(default_factory=Effects)
    placed: Placed = field(default_factory=dict)
    unread: set[TensorKey] = field(default_factory=set)
    scans: dict[str, TensorScan] = field(default_factory=dict)


def examine(
    config: AdapterConfig | None,
    header: Header | None,
    folder: Path,
    modules: Sequence[ModuleShape],
    limits: Limits | None = None,
) -> Findings:
    """Find every problem; of an adapter that is half readable (None) those of the readable half.

    modules: every module of the base model that adapters may change.
    """
    limits = limits or Limits()
    findings = Findings(modules=modules)
    if header:
        findings.modules = as_adapter_sees(modules, header.tensors)
        findings.placed = place(header, findings.modules, findings.problems)
        findings.scans = scan_finite(folder / WEIGHTS_FILE, header)
        for name, scan in findings.scans.items():
            if scan.first_nonfinite is not None:
                message = f"{name}: element {scan.first_nonfinite} is NaN or infinite"
                findings.problems.append(_problem("not_finite", message, name))
    if config:
        try:
            findings.effects = resolve(config, findings.modules)
        except AdapterRefused as refused:
            findings.problems += refused.problems
        else:
            _check_ranks(findings, limits)
            if header:
                _compare(config, findings)
    return findings


def _check_ranks(findings: Findings, limits: Limits) -> None:
    largest = max(lora.rank for lora in findings.effects.loras.values())
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


def _compare(config: AdapterConfig, findings: Findings) -> None:
    """What the config means against what the file has."""
    placed, loras = findings.placed, findings.effects.loras
    needed = set(_needed(config, findings))
    welcome = set(_welcome(config, findings))
    findings.unread = set(_unread(findings)) & placed.keys()
    known = needed | welcome | findings.unread
    paths = {key.path for key in placed if key.part in _FACTORS}
    for key in sorted(needed - placed.keys()):
        if key.part in _FACTORS and key.path in paths:
            continue  # the other of the pair told it
        if key.part in (Part.B, Part.EMBEDDING_B):
            continue  # one problem for both
        message = f"the config changes {key.path} but the file has no {key.part} for it"
        findings.problems.append(_problem("tensor_missing", message, key.canonical))
    for key, info in placed.items():
        if key not in known:
            code, message = _untargeted(key)
            findings.problems.append(_problem(code, f"{info.name}: {message}", info.name))
        elif key.part in _FACTORS and len(info.shape) == 2:
            rank = loras[key.path].rank
            actual = info.shape[0 if key.part in (Part.A, Part.EMBEDDING_A) else 1]
            if actual != rank:
                findings.problems.append(
                    _problem(
                        "rank_mismatch",
                        f"{info.name}: the tensor has rank {actual}, the config says {rank}",
                        info.name,
                        expected=str(rank),
                        actual=str(actual),
                    )
                )
    rows = placed.get(TensorKey(EMBEDDING, Part.ROWS))
    num_tokens = len(findings.effects.token_ids)
    if rows is not None and num_tokens and rows.shape[:1] != (num_tokens,):
        message = f"{rows.name}: {num_tokens} tokens need as many rows, not {rows.shape[:1]}"
        findings.problems.append(_problem("shape_mismatch", message, rows.name))


_FACTORS = (Part.A, Part.B, Part.EMBEDDING_A, Part.EMBEDDING_B)


def _needed(config: AdapterConfig, findings: Findings) -> Iterator[TensorKey]:
    """What PEFT saves of such an adapter, and fails without or silently takes a default for."""
    effects = findings.effects
    for path in effects.loras:
        for part in (Part.EMBEDDING_A, Part.EMBEDDING_B) if path == EMBEDDING else (Part.A, Part.B):
            yield TensorKey(path, part)
        if config.use_dora:
            yield TensorKey(path, Part.MAGNITUDE)
        if config.lora_bias:
            yield TensorKey(path, Part.B_BIAS)
    for module in findings.modules:
        if module.path in effects.saved:
            yield TensorKey(module.path, Part.WEIGHT)
            if module.bias:
                yield TensorKey(module.path, Part.BIAS)
    if effects.token_ids:
        yield TensorKey(EMBEDDING, Part.ROWS)


def _welcome(config: AdapterConfig, findings: Findings) -> Iterator[TensorKey]:
    """What PEFT loads where it is there: the base model's biases and tables, as trained."""
    effects = findings.effects
    for module in findings.modules:
        path, adapted = module.path, module.path in effects.loras
        if config.bias != "none" and adapted:
            yield TensorKey(path, Part.BASE_BIAS)
        elif config.bias == "all":
            yield TensorKey(path, Part.BIAS)
        if module.kind in ("embedding", "head"):
            yield base_table(path, effects)


def base_table(path: str, effects: Effects) -> TensorKey:
    """The name under which PEFT's save_embedding_layers writes the base model's own table."""
    if path in effects.saved:
        return TensorKey(path, Part.ORIGINAL_WEIGHT)
    wrapped = path in effects.loras or (
        bool(effects.token_ids) and (path == EMBEDDING or effects.tied)
    )
    return TensorKey(path, Part.BASE_WEIGHT if wrapped else Part.WEIGHT)


def _unread(findings: Findings) -> Iterator[TensorKey]:
    """What PEFT 0.21 writes along and does not read: what it names again is read there."""
    effects = findings.effects
    for path in effects.saved:
        yield TensorKey(path, Part.SAVED_WEIGHT)
        yield TensorKey(path, Part.SAVED_BIAS)
        yield TensorKey(path, Part.ORIGINAL_BIAS)
    if effects.token_ids and effects.tied:
        yield TensorKey(HEAD, Part.ROWS)


def _untargeted(key: TensorKey) -> tuple[str, str]:
    if key.part in _FACTORS:
        return "tensor_untargeted", f"the config does not adapt {key.path}"
    switch = {
        Part.MAGNITUDE: "use_dora is off in the config",
        Part.B_BIAS: "lora_bias is off in the config",
        Part.ROWS: f"trainable_token_indices does not name {key.path}",
        Part.WEIGHT: f"modules_to_save does not name {key.path}",
        Part.BIAS: f"neither bias nor modules_to_save replaces that of {key.path}",
        Part.BASE_BIAS: f"the config's bias does not replace that of {key.path}",
    }
    message = switch.get(key.part, f"PEFT writes no such tensor for {key.path} with this config")
    return "tensor_unsupported", message


def _problem(code: str, message: str, tensor: str | None = None, **more: str) -> Problem:
    return Problem(code, message, file=WEIGHTS_FILE, tensor=tensor, **more)
