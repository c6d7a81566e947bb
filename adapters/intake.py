"""The one door for adapters from outside: two files in a folder become a manifest, or a refusal.

What the platform calls after an upload has been written or unpacked. Changes nothing on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from loraplex.adapters.config import read_config
from loraplex.adapters.description import describe
from loraplex.adapters.errors import AdapterRefused, Problem
from loraplex.adapters.header import read_header
from loraplex.adapters.limits import Limits
from loraplex.adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, AdapterManifest
from loraplex.adapters.module_shape import ModuleShape
from loraplex.adapters.validation import examine

# What an activated LoRA may use: A and B of linear modules, however they are written.
ACTIVATED_FEATURES = ("alora", "fused_projections")


def inspect(
    folder: Path,
    modules: Sequence[ModuleShape],
    limits: Limits | None = None,
    base_model: str | None = None,
    vocab_size: int | None = None,
) -> AdapterManifest:
    """Check the adapter in `folder` against the base model and describe it.

    folder: holds `adapter_config.json` and `adapter_model.safetensors`.
    modules: every module of the base model that adapters may change.
    base_model: the served model's name, compared with the config's for a warning.
    vocab_size: of the served model, if an adapter's token ids are to be checked.

    Raises: AdapterRefused with every problem of both files.
    """
    limits = limits or Limits()
    problems: list[Problem] = []
    config = header = None
    try:
        with (folder / CONFIG_FILE).open("rb") as file:
            config, problems = read_config(file.read(limits.max_config_bytes + 1), limits)
    except FileNotFoundError:
        problems.append(Problem("config_missing", f"there is no {CONFIG_FILE}", file=CONFIG_FILE))
    try:
        header = read_header(folder / WEIGHTS_FILE, limits)
    except FileNotFoundError:
        message = f"there is no {WEIGHTS_FILE}"
        problems.append(Problem("weights_missing", message, file=WEIGHTS_FILE))
    except AdapterRefused as refused:
        problems += refused.problems
    findings = examine(config, header, folder, modules, limits)
    problems += findings.problems
    if problems:
        raise AdapterRefused(problems)
    assert config is not None, "no config and no problem"
    manifest = describe(config, findings, folder, base_model)
    if problems := list(_activation_problems(manifest, vocab_size)):
        raise AdapterRefused(problems)
    return manifest


def _activation_problems(manifest: AdapterManifest, vocab_size: int | None) -> Iterator[Problem]:
    """Why an activated LoRA could never be invoked, or would change what comes before it."""
    if not manifest.invocation_tokens:
        return
    largest = max(manifest.invocation_tokens)
    if vocab_size is not None and largest >= vocab_size:
        yield Problem(
            "invocation_impossible",
            f"alora_invocation_tokens has token {largest}, which this base model does not know",
            file=CONFIG_FILE,
            expected=f"below {vocab_size}",
            actual=str(largest),
        )
    if others := [name for name in manifest.features if name not in ACTIVATED_FEATURES]:
        yield Problem(
            "feature_unsupported",
            "an activated LoRA (alora_invocation_tokens) can only adapt linear modules of layers; "
            f"this one also has {', '.join(others)}",
            file=CONFIG_FILE,
        )
