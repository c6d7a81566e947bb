"""Log-probabilities in the shapes of OpenAI's two routes, those of prompts in vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraplex.engine.api import TokenLogprobs
from loraplex.engine.tokenizer import Tokenizer


class LogprobWriter:
    """Log-probabilities of one choice in the shape of its route; remembers the text offset
    (completions only).

    ids_as_tokens: tokens as "token_id:123".
    """

    def __init__(self, tokenizer: Tokenizer, *, chat: bool, ids_as_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._is_chat = chat
        self._ids_as_tokens = ids_as_tokens
        self._offset = 0

    def write(self, entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        return self._chat(entries) if self._is_chat else self._completion(entries)

    def prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> Any:
        """The prompt's part of an echoed completion: its first token has no probability."""
        tokens = [self._token(token_id) for token_id in token_ids]
        return self._completion(entries, tokens)

    def _token(self, token_id: int) -> str:
        if self._ids_as_tokens:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)

    def _chat(self, entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._chat_token(entry.token_id, entry.logprob),
                    "top_logprobs": [
                        self._chat_token(token_id, logprob)
                        for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
                    ],
                }
                for entry in entries
                if entry is not None
            ],
            "refusal": None,
        }

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._token(token_id),
            "logprob": logprob,
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def _completion(
        self, entries: Sequence[TokenLogprobs | None], tokens: Sequence[str] | None = None
    ) -> dict[str, Any]:
        if tokens is None:
            tokens = [self._token(entry.token_id) for entry in entries if entry is not None]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            if entry is None:
                tops.append(None)
                continue
            top = {
                self._token(i): p for i, p in zip(entry.top_ids, entry.top_logprobs, strict=True)
            }
            top.setdefault(self._token(entry.token_id), entry.logprob)
            tops.append(top)
        return {
            "text_offset": offsets,
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "tokens": list(tokens),
            "top_logprobs": tops,
        }


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None]
) -> list[dict[str, Any] | None]:
    """vLLM's form: per prompt token the candidates by id."""
    written: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            written.append(None)
            continue
        found = dict(zip(entry.top_ids, entry.top_logprobs, strict=True))
        ranks = {token_id: rank for rank, token_id in enumerate(entry.top_ids, start=1)}
        found.setdefault(entry.token_id, entry.logprob)
        ranks[entry.token_id] = entry.rank
        written.append(
            {
                str(token_id): {
                    "logprob": logprob,
                    "rank": ranks[token_id],
                    "decoded_token": tokenizer.token_text(token_id),
                }
                for token_id, logprob in found.items()
            }
        )
    return written
