"""The defaults that an adapter's own files name: generation_config.json, and a chat template in
chat_template.jinja or tokenizer_config.json.

Trainers save these beside the weights. Only what we know is read; a template equal to the base
model's says nothing.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loraplex.adapters.errors import AdapterRefused, Problem
from loraplex.platform.adapter_defaults import AdapterDefaults
from loraplex.platform.default_checks import check_defaults
from loraplex.platform.errors import ApiError
from loraplex.platform.served_model import ServedModel
from loraplex.platform.template_rules import WAY_OUT

GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer_config.json"

# transformers' names -> ours
_GENERATION_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}


@dataclass(frozen=True, slots=True)
class Shipped:
    """defaults: `AdapterDefaults.stored_form`. warnings: what was left out, and why."""

    defaults: dict[str, Any] | None
    warnings: tuple[Problem, ...] = ()


async def shipped_defaults(folder: Path, model: ServedModel, *, with_template: bool) -> Shipped:
    """Of the files in a folder, a template tried on a chat. with_template: False leaves one out.

    Raises: AdapterRefused naming the file.
    """
    found = await asyncio.to_thread(_read, folder, model, with_template)
    template = (found.defaults or {}).get("chat_template")
    if template is not None:
        try:
            await check_defaults(AdapterDefaults.model_validate({"chat_template": template}), model)
        except ApiError as error:
            has_own = (folder / TEMPLATE_FILE).is_file()
            raise _refused(TEMPLATE_FILE if has_own else TOKENIZER_FILE, error.message) from None
    return found


def _read(folder: Path, model: ServedModel, with_template: bool) -> Shipped:
    found = _generation(folder / GENERATION_FILE, model)
    file, template = _template(folder)
    warnings: tuple[Problem, ...] = ()
    if template is not None and template != model.chat_template.source:
        if with_template:
            found["chat_template"] = template
        else:
            why = f"its chat template is left out: those of tenants are not run here; {WAY_OUT}"
            warnings = (Problem("chat_template_left_out", why, file=file),)
    try:
        return Shipped(AdapterDefaults.model_validate(found).stored_form(), warnings)
    except ValidationError as error:
        first = error.errors()[0]
        file = TEMPLATE_FILE if first["loc"][0] == "chat_template" else GENERATION_FILE
        raise _refused(file, f"{first['loc'][0]}: {first['msg']}") from None


def _generation(file: Path, model: ServedModel) -> dict[str, Any]:
    content = _json(file)
    found = {
        ours: content[theirs]
        for theirs, ours in _GENERATION_KEYS.items()
        if content.get(theirs) is not None
    }
    if content.get("do_sample") is False:
        found["temperature"] = 0.0
    ends = content.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    more = [end for end in ends if end not in model.info.eos_token_ids]
    if more:
        size = model.info.vocab_size
        if not all(isinstance(end, int) and 0 <= end < size for end in more):
            raise _refused(file.name, f"eos_token_id {more}: this model's ids are 0 to {size - 1}")
        found["stop_token_ids"] = more
    return found


def _template(folder: Path) -> tuple[str, str | None]:
    file = folder / TEMPLATE_FILE
    if file.is_file():
        try:
            return file.name, file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise _refused(file.name, "is not UTF-8") from None
    found = _json(folder / TOKENIZER_FILE).get("chat_template")
    if isinstance(found, list):  # several by name
        named = [item for item in found if isinstance(item, dict)]
        found = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return TOKENIZER_FILE, found if isinstance(found, str) and found else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refused(file.name, f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise _refused(file.name, "is not a JSON object")
    return content


def _refused(file: str, message: str) -> AdapterRefused:
    return AdapterRefused([Problem("defaults_invalid", f"{file}: {message}", file=file)])
