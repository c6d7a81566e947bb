"""Prompts as token ids: encoded, checked against the vocabulary, fitted into the context."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.engine.errors import InvalidRequest
from loraplex.platform.errors import ApiError
from loraplex.platform.served_model import ServedModel

# Longer texts are tokenised in a worker thread (the library releases the GIL), so that streams do
# not stall. ~1 us per character: 16k characters are about 15 ms.
INLINE_CHARS = 16_384

PromptInput = str | list[int] | list[list[int]] | list[str]


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    text: str | None  # None when the client sent ids, or some were cut off


async def encode_prompts(
    prompt: PromptInput, model: ServedModel, add_special: bool, *, param: str = "prompt"
) -> list[Prompt]:
    """Raises: ApiError(invalid_request) for an empty prompt, bad text or unknown ids."""
    if isinstance(prompt, str):
        return [await encode_text(prompt, model, add_special, param=param)]
    if not prompt:
        raise ApiError(
            "invalid_request", f"{param} is empty; send text or at least one token id", param=param
        )
    if isinstance(prompt[0], int):
        return [_from_ids(prompt, model, param)]
    return [
        await encode_text(item, model, add_special, param=param)
        if isinstance(item, str)
        else _from_ids(item, model, param)
        for item in prompt
    ]


async def encode_text(text: str, model: ServedModel, add_special: bool, *, param: str) -> Prompt:
    """Raises: ApiError(invalid_request)."""

    def run() -> list[int]:
        return model.tokenizer.encode(text, add_special_tokens=add_special)

    try:
        ids = run() if len(text) <= INLINE_CHARS else await asyncio.to_thread(run)
    except InvalidRequest as error:
        raise ApiError("invalid_request", error.message, param=param) from None
    if not ids:
        raise ApiError("invalid_request", f"{param} has no tokens", param=param)
    return Prompt(ids, text)


def _from_ids(ids: Sequence[int], model: ServedModel, param: str) -> Prompt:
    if not ids:
        raise ApiError("invalid_request", f"{param} has no tokens", param=param)
    check_token_ids(ids, model.info.vocab_size, param)
    return Prompt(list(ids), None)


def fit(prompt: Prompt, truncate: int | None, model: ServedModel, param: str) -> Prompt:
    """The prompt, cut to its last `truncate` tokens (-1: to what the model takes); a token of
    output must fit behind it.

    Raises: ApiError(context_length_exceeded).
    """
    longest = model.info.max_model_len - 1
    kept = len(prompt.token_ids) if truncate is None else longest if truncate < 0 else truncate
    if kept < len(prompt.token_ids):
        prompt = Prompt(prompt.token_ids[-kept:], None)
    if len(prompt.token_ids) > longest:
        raise ApiError(
            "context_length_exceeded",
            f"the prompt has {len(prompt.token_ids)} tokens, this model takes {longest} "
            f"and one of output (max_model_len {longest + 1}); shorten it "
            "or set truncate_prompt_tokens",
            param=param,
        )
    return prompt


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises: ApiError(invalid_request) naming the first id that is none."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise ApiError(
            "invalid_request",
            f"{param} has token id {wrong}; this model's ids are 0 to {vocab_size - 1}",
            param=param,
        )
