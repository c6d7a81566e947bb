"""An engine that computes nothing: what a request costs beside it is the server's own work.

Runs in an engine process of its own, so that tokens take their usual way. `EngineConfig.model` is
"instant:<s>": the first token comes at once, then one for every request each s seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loraplex.engine.api import (
    AdapterEvent,
    Answer,
    Call,
    EngineStats,
    ErrorInfo,
    FinishReason,
    GenerationRequest,
    MemoryInfo,
    ModelInfo,
    SequenceOutput,
)
from loraplex.engine.config import EngineConfig

TEXT = b"The quick brown fox jumps over the lazy dog. "
MAX_MODEL_LEN = 1 << 16


class InstantEngine:
    """Implements `loraplex.engine.process.EngineLoop`."""

    def __init__(self, interval_s: float) -> None:
        self.on_wake: Callable[[], None] = lambda: None
        self.model = ModelInfo(
            name="instant",
            architecture="Instant",
            dtype="float32",
            device="cpu",
            backend="torch",
            vocab_size=256,
            max_model_len=MAX_MODEL_LEN,
            num_layers=1,
            eos_token_ids=[],
            bos_token_id=None,
            tokenizer_json=_tokenizer().to_str(),
            chat_template=None,
            special_tokens={},
            generation_defaults={},
            modules=[],
            num_parameters=0,
        )
        self._interval_s = interval_s
        self._next = 0.0
        self._made: dict[str, int] = {}  # tokens so far, by request
        self._last: dict[str, int] = {}
        self._new: list[str] = []
        self._ended: list[SequenceOutput] = []
        self._answers: list[Answer] = []

    def add(self, request: GenerationRequest) -> None:
        self._made[request.request_id] = 0
        self._last[request.request_id] = request.sampling.max_tokens or MAX_MODEL_LEN
        self._new.append(request.request_id)

    def cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if self._made.pop(request_id, None) is not None:
                end = SequenceOutput(request_id=request_id, finish_reason=FinishReason.ABORT)
                self._ended.append(end)

    def step(self) -> list[SequenceOutput]:
        due, self._new = self._new, []
        now = time.perf_counter()
        if now >= self._next:
            due = list(self._made)
            self._next = max(self._next + self._interval_s, now - self._interval_s)
        outputs, self._ended = self._ended, []
        return outputs + [self._token(request_id) for request_id in due if request_id in self._made]

    def _token(self, request_id: str) -> SequenceOutput:
        made = self._made[request_id]
        self._made[request_id] = made + 1
        ends = made + 1 == self._last[request_id]
        if ends:
            del self._made[request_id]
        return SequenceOutput(
            request_id=request_id,
            token_ids=[TEXT[made % len(TEXT)]],
            finish_reason=FinishReason.LENGTH if ends else None,
        )

    def idle_s(self) -> float | None:
        if self._new or self._ended:
            return 0.0
        return max(0.0, self._next - time.perf_counter()) if self._made else None

    def call(self, call: Call) -> None:
        self._answers.append(Answer(call.call_id, error=ErrorInfo("engine", "it only speaks")))

    def take_events(self) -> list[AdapterEvent]:
        return []

    def take_answers(self) -> list[Answer]:
        answers, self._answers = self._answers, []
        return answers

    def memory(self) -> MemoryInfo:
        numbers: dict[str, Any] = dict.fromkeys(MemoryInfo.__struct_fields__, 0)
        return MemoryInfo(**{**numbers, "static_because": ""})

    def stats(self) -> EngineStats:
        numbers: dict[str, Any] = dict.fromkeys(EngineStats.__struct_fields__, 0)
        empty: dict[str, Any] = {
            "waiting_by_reason": {},
            "running_digests": [],
            "waiting_digests": [],
            "step_token_counts": (),
        }
        return EngineStats(**(numbers | empty))

    def close(self) -> None:
        pass


def _tokenizer() -> Tokenizer:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    vocab |= {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build(config: EngineConfig, on_progress: Callable[[str, int, int], None]) -> InstantEngine:
    return InstantEngine(float(config.model.partition(":")[2]))
