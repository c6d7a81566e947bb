"""An engine without a model: it says the alphabet, and does as it is told about when and how."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from loraplex.engine.api import (
    AdapterEvent,
    AdapterProbe,
    AdapterResidencyInfo,
    AdapterState,
    EngineStats,
    FinishReason,
    FreedBytes,
    GenerationRequest,
    MemoryInfo,
    ModelInfo,
    ModuleShape,
    RequestInfo,
    SequenceOutput,
    Stats,
    TokenLogprobs,
)
from loraplex.engine.errors import AdapterInUse, EngineDead, EngineError
from loraplex.engine.recovery import Supervision
from loraplex.engine.stream import Stream, TextChunk
from loraplex.engine.tokenizer import Tokenizer

HIDDEN = 16
NUM_LAYERS = 2
EOS = 256
BOS = 257
TEXT = b"abcdefghijklmnopqrstuvwxyz"
DEVICE_BYTES = 4096
HOST_BYTES = 2048
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_json() -> str:
    """One token per byte, then <eos> and <bos>."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": EOS, "content": "<eos>", "special": True, **special},
                {"id": BOS, "content": "<bos>", "special": True, **special},
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
            "post_processor": None,
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {names[byte]: byte for byte in range(256)},
                "merges": [],
            },
        }
    )


def model_info(**changes: Any) -> ModelInfo:
    modules = [
        ModuleShape(f"model.layers.{layer}.self_attn.{name}", HIDDEN, HIDDEN)
        for layer in range(NUM_LAYERS)
        for name in ("q_proj", "v_proj")
    ]
    fields: dict[str, Any] = {
        "name": "tiny",
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "device": "cpu",
        "backend": "torch",
        "vocab_size": 258,
        "max_model_len": 128,
        "num_layers": NUM_LAYERS,
        "eos_token_ids": [EOS],
        "bos_token_id": BOS,
        "tokenizer_json": tokenizer_json(),
        "chat_template": CHAT_TEMPLATE,
        "special_tokens": {"eos_token": "<eos>", "bos_token": "<bos>"},
        "generation_defaults": {},
        "modules": modules,
        "num_parameters": 1000,
        "hidden_size": 4,
    }
    return ModelInfo(**{**fields, **changes})


class FakeEngine:
    """Speaks `TEXT`, one byte a token, then again from the start. `say` replaces the text of a
    request.
    """

    def __init__(self, info: ModelInfo | None = None, *, loaded: bool = True) -> None:
        self._info = info or model_info()
        self._tokenizer = Tokenizer.from_info(self._info)
        self.loaded = asyncio.Event()
        if loaded:
            self.loaded.set()
        self.alive = True
        self.failure: str | None = None
        self.supervision = Supervision()
        self.start_error: Exception | None = None
        self.started = False
        self.stopped = False
        self.memory_changes: dict[str, Any] = {}
        self.hold: asyncio.Event | None = None  # when set, tokens wait for it (after the first)
        self.refuse: EngineError | None = None  # the next request fails with it at once
        self.fail_after: int | None = None  # a request fails after so many tokens
        self.say: bytes = TEXT
        self.end_after: int | None = None  # eos after so many tokens
        self.lengths: dict[int, int] = {}  # the same for the choice of this index
        self.seen: list[GenerationRequest] = []
        self.running: dict[str, GenerationRequest] = {}
        self.cancelled: list[str] = []
        self.completed: list[str] = []
        self.finished: asyncio.Event = asyncio.Event()
        self.residents: dict[str, AdapterState] = {}
        self.pinned: set[str] = set()
        self.forgotten: list[str] = []
        self.forget_hold: asyncio.Event | None = None  # deletions wait for it
        self.kept: list[str] = []
        self.probed: list[str] = []
        self.probe_result: dict[str, Any] = {}  # what differs from a probe that agrees
        self.probe_hold: asyncio.Event | None = None  # when set, probes wait for it
        self.probe_error: EngineError | None = None  # the next probe fails with it
        self.listeners: list[Callable[[AdapterEvent | Stats], None]] = []

    @property
    def ready(self) -> bool:
        return self.started and self.alive

    @property
    def info(self) -> ModelInfo | None:
        return self._info if self.started else None

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer if self.started else None

    async def start(self) -> None:
        await self.loaded.wait()
        if self.start_error is not None:
            raise self.start_error
        self.started = True

    async def stop(self) -> None:
        self.stopped = True

    def on_event(self, callback: Callable[[AdapterEvent | Stats], None]) -> None:
        self.listeners.append(callback)

    def tell(self, event: AdapterEvent | Stats) -> None:
        for callback in self.listeners:
            callback(event)

    def _alive(self) -> None:
        if not self.ready:
            raise EngineDead("the engine is restarting")

    async def generate(
        self, request: GenerationRequest, **text: Any
    ) -> AsyncGenerator[TextChunk, None]:
        """Tokens become text by the engine client's own `Stream`."""
        self._alive()
        if self.refuse is not None:
            refused, self.refuse = self.refuse, None
            raise refused
        self.seen.append(request)
        self.running[request.request_id] = request
        for use in request.adapters:
            self.residents[use.digest] = AdapterState.DEVICE
        if request.pooling is not None:
            await asyncio.sleep(0)
            vector = struct.pack("<4f", *_vector(request))
            del self.running[request.request_id]
            yield TextChunk("", [], finish_reason=FinishReason.STOP, embedding=vector)
            return
        stream = Stream(request, self._tokenizer, **text)
        try:
            async for output in self._tokens(request):
                stream.feed(output)
                yield await stream.next()
                if stream.ended:
                    break
        finally:
            if stream.ended and output.finish_reason is not None:
                self.completed.append(request.request_id)
            else:
                self.cancelled.append(request.request_id)
            del self.running[request.request_id]
            self.finished.set()

    async def _tokens(self, request: GenerationRequest) -> AsyncGenerator[SequenceOutput, None]:
        sampling = request.sampling
        count = sampling.max_tokens or 128 - len(request.prompt_token_ids)
        for i in range(count):
            if self.fail_after == i:
                raise EngineDead("the engine process died")
            choice = int(request.request_id.rpartition("-")[2]) if self.lengths else 0
            ends = self.lengths.get(choice, self.end_after) == i and not sampling.ignore_eos
            token = EOS if ends else self.say[i % len(self.say)]
            stops = token in sampling.stop_token_ids
            finish = FinishReason.STOP if ends or stops else None
            if finish is None and i == count - 1:
                finish = FinishReason.LENGTH
            yield SequenceOutput(
                request_id=request.request_id,
                token_ids=[token],
                logprobs=[_logprobs(token, sampling.logprobs)]
                if sampling.logprobs is not None
                else None,
                prompt_logprobs=_prompt_logprobs(request) if i == 0 else None,
                finish_reason=finish,
                stop_token_id=token if stops else None,
                num_cached_tokens=0 if i == 0 else None,
                queue_s=0.001 if i == 0 else None,
            )
            if finish is not None:
                return
            if self.hold is not None:
                await self.hold.wait()
            else:
                await asyncio.sleep(0)

    async def load(self, digest: str, *, wait: bool = True) -> AdapterResidencyInfo:
        self._alive()
        self.residents[digest] = AdapterState.DEVICE if wait else AdapterState.HOST_LOADING
        return self._info_of(digest)

    async def evict(
        self,
        digest: str,
        *,
        tier: str = "device",
        drain: bool = False,
        timeout_s: float | None = None,
    ) -> FreedBytes:
        self._alive()
        if not drain:
            self._refuse_in_use(digest)
        state = self.residents.get(digest)
        if tier == "host":
            self.residents.pop(digest, None)
        elif state is AdapterState.DEVICE:
            self.residents[digest] = AdapterState.HOST
        on_device = state is AdapterState.DEVICE
        return FreedBytes(
            device_bytes=DEVICE_BYTES if on_device else 0,
            host_bytes=HOST_BYTES if tier == "host" and state else 0,
        )

    async def pin(self, digest: str) -> AdapterResidencyInfo:
        self._alive()
        self.pinned.add(digest)
        self.residents[digest] = AdapterState.DEVICE
        return self._info_of(digest)

    async def unpin(self, digest: str) -> AdapterResidencyInfo:
        self._alive()
        self.pinned.discard(digest)
        return self._info_of(digest)

    async def forget(
        self, digest: str, *, force: bool = False, timeout_s: float | None = None
    ) -> FreedBytes:
        self._alive()
        if not force:
            assert timeout_s is not None, "the engine would wait for ever"
            self._refuse_in_use(digest)
        self.forgotten.append(digest)
        if self.forget_hold is not None:
            await self.forget_hold.wait()
        there = self.residents.pop(digest, None) is not None
        return FreedBytes(
            device_bytes=DEVICE_BYTES if there else 0, host_bytes=HOST_BYTES if there else 0
        )

    async def keep(self, digest: str) -> bool:
        self._alive()
        self.kept.append(digest)
        return False

    async def probe(self, digest: str, *, timeout_s: float | None = None) -> AdapterProbe:
        self._alive()
        self.probed.append(digest)
        if self.probe_hold is not None:
            await self.probe_hold.wait()
            self._alive()
        if self.probe_error is not None:
            failed, self.probe_error = self.probe_error, None
            raise failed
        fields = {"agrees": True, "error": 1e-7, "tolerance": 2e-6, "base_error": 5e-7}
        return AdapterProbe(digest=digest, **{**fields, "effect": 0.25, **self.probe_result})

    async def memory(self) -> MemoryInfo:
        self._alive()
        used = DEVICE_BYTES * sum(s is AdapterState.DEVICE for s in self.residents.values())
        info = MemoryInfo(
            weights_bytes=1000,
            kv_cache_bytes=16 * 64,
            kv_block_bytes=64,
            kv_blocks_total=16,
            kv_blocks_used=len(self.running),
            kv_blocks_cached=0,
            block_size=16,
            adapter_bytes_total=10 * DEVICE_BYTES,
            adapter_bytes_used=used,
            adapter_page_bytes=DEVICE_BYTES,
            host_adapter_bytes_total=10 * HOST_BYTES,
            host_adapter_bytes_used=0,
            workspace_bytes=100,
            device_bytes_total=1 << 20,
            device_bytes_free=1 << 19,
            static_because="fixed by --adapter-memory",
        )
        return msgspec.structs.replace(info, **self.memory_changes)

    async def stats(self) -> EngineStats:
        self._alive()
        return EngineStats(
            time=time.time(),
            num_running=len(self.running),
            num_waiting=3,
            waiting_by_reason={"kv": 1, "adapter_loading": 2},
            running_digests=[u.digest for r in self.running.values() for u in r.adapters],
            waiting_digests=[],
            kv_cache_usage=0.25,
            num_preemptions=4,
            prefix_cache_queries=100,
            prefix_cache_hits=40,
            prompt_tokens=100,
            generation_tokens=50,
            steps=10,
            step_tokens=150,
            adapter_loads=2,
            adapter_evictions=1,
            adapter_load_seconds=0.5,
            adapters_on_device=len(self.residents),
            adapters_on_host=0,
            adapter_bytes_used=DEVICE_BYTES,
            adapter_bytes_total=10 * DEVICE_BYTES,
            adapter_joins=6,
            adapter_refusals=7,
            step_token_counts=(2, 5, 0, 3),
        )

    async def requests(self) -> list[RequestInfo]:
        self._alive()
        return [
            RequestInfo(
                request_id=request.request_id,
                state="running",
                waiting_reason=None,
                digests=[use.digest for use in request.adapters],
                prompt_tokens=len(request.prompt_token_ids),
                output_tokens=0,
                age_s=0.1,
            )
            for request in self.running.values()
        ]

    async def adapters(self) -> list[AdapterResidencyInfo]:
        self._alive()
        return [self._info_of(digest) for digest in self.residents]

    def _info_of(self, digest: str) -> AdapterResidencyInfo:
        state = self.residents.get(digest, AdapterState.ABSENT)
        on_device = state is AdapterState.DEVICE
        return AdapterResidencyInfo(
            digest=digest,
            state=state,
            rank=4,
            pages=1,
            device_bytes=DEVICE_BYTES if on_device else 0,
            host_bytes=HOST_BYTES,
            running=self._uses(digest),
            waiting=0,
            pinned=digest in self.pinned,
            loaded_at=1.0 if on_device else None,
            last_used_at=None,
            hits=1,
            loads=1,
            evictions=0,
        )

    def _uses(self, digest: str) -> int:
        return sum(use.digest == digest for r in self.running.values() for use in r.adapters)

    def _refuse_in_use(self, digest: str) -> None:
        if self._uses(digest):
            raise AdapterInUse(f"{self._uses(digest)} requests run on adapter {digest[:12]}")


def _vector(request: GenerationRequest) -> list[float]:
    """Says what it was asked: the first id, the last, how many, and how to pool."""
    ids = request.prompt_token_ids
    return [ids[0], ids[-1], len(ids), 1.0 if request.pooling == "mean" else -1.0]


def _logprobs(token: int, top: int | None) -> TokenLogprobs:
    ids = [token, *(i for i in range(97, 123) if i != token)][: top or 0]
    return TokenLogprobs(token, -0.5, 1, ids, [-0.5 - i for i in range(len(ids))])


def _prompt_logprobs(request: GenerationRequest) -> list[TokenLogprobs | None] | None:
    top = request.sampling.prompt_logprobs
    if top is None:
        return None
    return [None, *(_logprobs(token, top) for token in request.prompt_token_ids[1:])]
