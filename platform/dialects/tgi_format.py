"""Answers in TGI's and LoRAX's form: `generated_text`, details by token, events, headers.

A token's text in a stream is what it adds to the generated text, so that the pieces joined are the
whole; in the details of a whole answer it is the token by itself, as special tokens are there.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from loraplex.engine.api import FinishReason, TokenLogprobs
from loraplex.engine.stream import TextChunk
from loraplex.platform.dialects.error_bodies import tgi_event
from loraplex.platform.dialects.tgi_schemas import GenerateBody
from loraplex.platform.errors import ApiError
from loraplex.platform.generation import Choice, Generation
from loraplex.platform.inference import Prepared
from loraplex.platform.openai_format import encode
from loraplex.platform.responses import EventWriter, GenerationResponse, OnEnd
from loraplex.platform.served_model import ServedModel


@dataclass(slots=True)
class _Collected:
    """All chunks of one choice."""

    choice: Choice
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    last: TextChunk | None = None

    def add(self, chunk: TextChunk) -> None:
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs or ()
        self.prompt_logprobs += chunk.prompt_logprobs or ()
        self.last = chunk

    @property
    def mean_logprob(self) -> float:
        """By which the best of several is chosen."""
        return sum(entry.logprob for entry in self.logprobs) / max(1, len(self.logprobs))


class TokenWriter:
    """Tokens as JSON objects."""

    def __init__(self, body: GenerateBody, model: ServedModel) -> None:
        self._tokenizer = model.tokenizer
        self._ends = model.tokenizer.special_ids | frozenset(model.info.eos_token_ids)
        self._num_alternatives = body.parameters.return_k_alternatives
        self._num_top = body.parameters.top_n_tokens

    def token(self, entry: TokenLogprobs, text: str | None = None) -> dict[str, Any]:
        written = self._written(entry.token_id, entry.logprob, text)
        written["skipped"] = False
        if self._num_alternatives is not None:
            written["alternative_tokens"] = [
                {"id": i, "text": self._tokenizer.token_text(i), "logprob": logprob}
                for i, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
            ][: self._num_alternatives]
        return written

    def top_tokens(self, entries: list[TokenLogprobs]) -> dict[str, Any]:
        if not self._num_top:
            return {}
        return {"top_tokens": [self.likeliest(entry) for entry in entries]}

    def likeliest(self, entry: TokenLogprobs) -> list[dict[str, Any]]:
        pairs = zip(entry.top_ids, entry.top_logprobs, strict=True)
        return [self._written(i, logprob) for i, logprob in pairs][: self._num_top]

    @property
    def wants_top(self) -> bool:
        return bool(self._num_top)

    def prefill(self, choice: Choice, entries: list[TokenLogprobs | None]) -> list[dict[str, Any]]:
        return [
            {
                "id": token_id,
                "text": self._tokenizer.token_text(token_id),
                "logprob": None if entry is None else entry.logprob,
            }
            for token_id, entry in zip(choice.request.prompt_token_ids, entries, strict=False)
        ]

    def _written(self, token_id: int, logprob: float, text: str | None = None) -> dict[str, Any]:
        return {
            "id": token_id,
            "text": self._tokenizer.token_text(token_id) if text is None else text,
            "logprob": logprob,
            "special": token_id in self._ends,
        }


class TgiResponse(GenerationResponse):
    """as_list: a whole answer is a list of one, as `/` gives it."""

    def __init__(
        self,
        prepared: Prepared,
        on_end: OnEnd,
        body: GenerateBody,
        model: ServedModel,
        *,
        as_list: bool = False,
    ) -> None:
        super().__init__(prepared, on_end)
        self._body = body
        self._model = model
        self._tokens = TokenWriter(body, model)
        self._as_list = as_list

    def _writer(self) -> EventWriter:
        return _TgiWriter(self._prepared.generation, self._body, self._tokens)

    async def _answer(self) -> Any:
        generation = self._prepared.generation
        collected = [_Collected(choice) for choice in generation.choices]
        async with aclosing(generation.deltas()) as deltas:
            async for index, chunk in deltas:
                collected[index].add(chunk)
        collected.sort(key=lambda choice: -choice.mean_logprob)
        best, *others = collected
        answer: dict[str, Any] = {"generated_text": self._text(best)}
        if self._body.parameters.details or self._body.parameters.decoder_input_details:
            answer["details"] = {
                **self._details(best),
                "prompt_tokens": generation.num_prompt_tokens,
                "skipped_tokens": 0,
                "best_of_sequences": [
                    {"generated_text": self._text(other), **self._details(other)}
                    for other in others
                ]
                or None,
            }
        return [answer] if self._as_list else answer

    def _text(self, choice: _Collected) -> str:
        prompt = self._body.inputs if self._body.parameters.return_full_text else ""
        return prompt + choice.text

    def _details(self, choice: _Collected) -> dict[str, Any]:
        assert choice.last is not None, "a choice without an end"
        entries = choice.prompt_logprobs
        return {
            "finish_reason": _finish_reason(choice.last),
            "generated_tokens": len(choice.token_ids),
            "seed": choice.choice.request.sampling.seed,
            "prefill": self._tokens.prefill(choice.choice, entries),
            "tokens": [self._tokens.token(entry) for entry in choice.logprobs],
            **self._tokens.top_tokens(choice.logprobs),
        }

    def _answer_headers(self) -> dict[str, str]:
        composition = self._prepared.composition
        names = ",".join(adapter.reference for adapter, _ in composition.members)
        device = self._model.info.device.partition(":")[0]
        headers = {
            **super()._answer_headers(),
            "x-compute-type": "gpu" if device == "cuda" else device,
            "x-model-id": self._model.name,
            "x-adapter-id": names,
            "x-adapter-source": "local" if names else "",
        }
        return headers if self._prepared.stream else {**headers, **self._counted()}

    def _counted(self) -> dict[str, str]:
        """Times in milliseconds, but `x-compute-time` in seconds."""
        generation = self._prepared.generation
        timing, num_tokens = generation.timing, generation.num_tokens
        ended = timing.last_token or timing.started
        began = timing.first_token or ended
        total_ms, queue_ms = (ended - timing.started) * 1e3, generation.queue_s * 1e3
        inference_ms = max(0.0, total_ms - queue_ms)
        between_ms = (ended - began) * 1e3 / max(1, num_tokens - 1)
        numbers = {
            "total-time": total_ms,
            "validation-time": 0,
            "queue-time": queue_ms,
            "inference-time": inference_ms,
            "time-per-token": inference_ms / max(1, num_tokens),
            "time-to-first-token": (began - timing.started) * 1e3,
            "time-per-output-token": between_ms,
            "prompt-tokens": generation.num_prompt_tokens,
            "generated-tokens": num_tokens,
            "skipped-tokens": 0,
            "total-tokens": generation.num_prompt_tokens + num_tokens,
        }
        headers = {f"x-{name}": str(round(number)) for name, number in numbers.items()}
        return {"x-compute-time": f"{total_ms / 1e3:.6f}", **headers}


class _TgiWriter:
    def __init__(self, generation: Generation, body: GenerateBody, tokens: TokenWriter) -> None:
        self._generation = generation
        self._full_text = body.inputs if body.parameters.return_full_text else ""
        self._tokens = tokens
        self._index = 0

    def chunk(self, index: int, chunk: TextChunk) -> bytes:
        """An event for each token; of several at once the last has the text."""
        if chunk.finish_reason is FinishReason.ABORT:
            return _event({"error": "the request was cancelled", "error_type": "generation"})
        self._full_text += chunk.text
        entries = chunk.logprobs or []
        events = []
        for entry in entries:
            is_last = entry is entries[-1]
            self._index += 1
            event: dict[str, Any] = {
                "index": self._index,
                "token": self._tokens.token(entry, chunk.text if is_last else ""),
                "generated_text": None,
                "details": None,
            }
            if self._tokens.wants_top:
                event["top_tokens"] = self._tokens.likeliest(entry)
            if is_last and chunk.finish_reason is not None:
                event |= {"generated_text": self._full_text, "details": self._details(chunk)}
            events.append(_event(event))
        return b"".join(events)

    def last(self) -> bytes:
        return b""

    def error(self, status: int, code: str, message: str) -> bytes:
        return _event(tgi_event(status, code, message))

    def _details(self, chunk: TextChunk) -> dict[str, Any]:
        generation = self._generation
        return {
            "finish_reason": _finish_reason(chunk),
            "prompt_tokens": generation.num_prompt_tokens,
            "input_length": generation.num_prompt_tokens,  # TGI's name of the same
            "generated_tokens": generation.num_tokens,
            "seed": generation.choices[0].request.sampling.seed,
        }


def _event(fields: dict[str, Any]) -> bytes:
    return b"data:" + encode(fields) + b"\n\n"


def _finish_reason(last: TextChunk) -> str:
    """Raises: ApiError when the request was cancelled from elsewhere."""
    if last.finish_reason is FinishReason.LENGTH:
        return "length"
    if last.finish_reason is FinishReason.STOP:
        return "stop_sequence" if isinstance(last.stop_reason, str) else "eos_token"
    raise ApiError("engine_unavailable", "the request was cancelled before its end")
