"""What the API process must know of the model, gathered from its directory.

The only place that opens the tokenizer's files: the API process gets the tokenizer as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from loraplex.engine.api import ModelInfo
from loraplex.engine.errors import ModelError
from loraplex.engine.model_config import DecoderConfig

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# Sampling parameters that generation_config.json may set, by the names of `SamplingParams`.
GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def describe_model(
    name: str,
    directory: Path,
    model: DecoderConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    max_model_len: int,
    weight_digests: Mapping[str, str] | None = None,
) -> ModelInfo:
    """Raises: ModelError when the directory has no fast tokenizer."""
    config = _json(directory / "config.json")
    generation = _json(directory / "generation_config.json")
    tokenizer = _tokenizer(directory)
    special = {
        kind: str(getattr(tokenizer, kind))
        for kind in SPECIAL_TOKENS
        if getattr(tokenizer, kind, None) is not None
    }
    eos = {*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id"))}
    if not eos:
        eos = set(_ids(tokenizer.eos_token_id))
    bos = _ids(config.get("bos_token_id")) or _ids(tokenizer.bos_token_id)
    template = tokenizer.chat_template
    return ModelInfo(
        name=name,
        architecture=model.architecture,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        backend=backend,
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        num_layers=model.num_layers,
        eos_token_ids=sorted(i for i in eos if i < model.vocab_size),  # others cannot come
        bos_token_id=bos[0] if bos else None,
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        chat_template=template if isinstance(template, str) else None,
        special_tokens=special,
        generation_defaults={
            key: generation[key] for key in GENERATION_KEYS if generation.get(key) is not None
        },
        modules=model.modules(weight_digests),
        num_parameters=sum(math.prod(shape) for shape in model.tensor_shapes().values()),
        hidden_size=model.hidden_size,
    )


def _tokenizer(directory: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{directory}: no tokenizer that can be read: {reason}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"{directory}: there is no tokenizer.json; save one with transformers' fast tokenizer"
        )
    return tokenizer


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelError(f"{file}: not JSON: {error}") from error
    return content


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
