"""An engine without a model, for the tests of process and client: it says the prompt again and
again.

Tokens are bytes. `EngineConfig.model` is "fake" or "fake:<how the start goes>"; a request's
`cache_salt` is what happens to it: "kill@3" kills the process in the step of the fourth token.
No torch.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loraplex.engine.api import (
    AdapterEvent,
    AdapterResidencyInfo,
    AdapterState,
    Answer,
    Call,
    EngineStats,
    ErrorInfo,
    FinishReason,
    FreedBytes,
    GenerationRequest,
    MemoryInfo,
    ModelInfo,
    RequestInfo,
    SequenceOutput,
    TokenLogprobs,
)
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ModelError

EOS = 256


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; 256 is the end of the text."""
    names = {byte: name for name, byte in _byte_names().items()}
    raw = Tokenizer(models.BPE(vocab={names[i]: i for i in range(256)}, merges=[]))
    raw.add_special_tokens([AddedToken("</s>", special=True)])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return raw


def _byte_names() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class _Live:
    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.num_out = len(request.output_token_ids)


class FakeEngine:
    def __init__(self, config: EngineConfig) -> None:
        self.model = ModelInfo(
            name=config.model,
            architecture="FakeForCausalLM",
            dtype="float32",
            device="cpu",
            backend="torch",
            vocab_size=257,
            max_model_len=1 << 20,
            num_layers=1,
            eos_token_ids=[EOS],
            bos_token_id=None,
            tokenizer_json=byte_tokenizer().to_str(),
            chat_template=None,
            special_tokens={"eos_token": "</s>"},
            generation_defaults={},
            modules=[],
            num_parameters=0,
        )
        self.steps = 0
        self.idle_looks = 0
        self.closed = False
        self._live: dict[str, _Live] = {}
        self._outputs: list[SequenceOutput] = []
        self._events: list[AdapterEvent] = []
        self._answers: list[Answer] = []
        self._step_s = 0.0005
        self._pins: list[str] = []
        self.on_run: Callable[[list[str]], None] = lambda request_ids: None

    def add(self, request: GenerationRequest) -> None:
        if request.cache_salt == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if request.cache_salt == "exception":
            raise RuntimeError("a bug in the engine")
        if request.cache_salt == "hang":
            time.sleep(1000)
        if request.cache_salt == "refuse":
            self._fail(request.request_id, ErrorInfo("queue_full", "no room"))
        else:
            self._live[request.request_id] = _Live(request)

    def cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if self._live.pop(request_id, None) is not None:
                self._end(request_id, FinishReason.ABORT)

    def step(self) -> list[SequenceOutput]:
        self.steps += 1
        self.on_run(list(self._live))
        time.sleep(self._step_s)
        if any(live.request.cache_salt == f"kill@{live.num_out}" for live in self._live.values()):
            os.kill(os.getpid(), signal.SIGKILL)
        for request_id, live in list(self._live.items()):
            self._advance(request_id, live)
        self.on_run([])
        outputs, self._outputs = self._outputs, []
        return outputs

    def _advance(self, request_id: str, live: _Live) -> None:
        request, sampling = live.request, live.request.sampling
        if request.cache_salt == "stall":
            return
        if request.cache_salt == "break" and live.num_out == 3:
            del self._live[request_id]
            self._fail(request_id, ErrorInfo("adapter_corrupt", "bad file", "adapter_unavailable"))
            return
        prompt = request.prompt_token_ids
        token = prompt[live.num_out % len(prompt)]
        first = live.num_out == 0
        live.num_out += 1
        reason = FinishReason.STOP if token == EOS and not sampling.ignore_eos else None
        if reason is None and live.num_out == (sampling.max_tokens or 1 << 20):
            reason = FinishReason.LENGTH
        stop_token = token if token in sampling.stop_token_ids else None
        if stop_token is not None:
            reason = FinishReason.STOP
        if reason is not None:
            del self._live[request_id]
        self._outputs.append(
            SequenceOutput(
                request_id=request_id,
                token_ids=[token],
                logprobs=None
                if sampling.logprobs is None
                else [TokenLogprobs(token, -0.5, 1, [], [])],
                finish_reason=reason,
                stop_token_id=stop_token,
                num_cached_tokens=0 if first else None,
                queue_s=0.25 if first else None,
            )
        )

    def _end(self, request_id: str, reason: FinishReason) -> None:
        self._outputs.append(SequenceOutput(request_id=request_id, finish_reason=reason))

    def _fail(self, request_id: str, error: ErrorInfo) -> None:
        self._outputs.append(
            SequenceOutput(request_id=request_id, finish_reason=FinishReason.ERROR, error=error)
        )

    def idle_s(self) -> float | None:
        self.idle_looks += 1
        return 0.0 if self._live or self._outputs else None

    def call(self, call: Call) -> None:
        results: dict[str, object] = {
            "memory": self.memory(),
            "stats": self.stats(),
            "requests": [
                RequestInfo(
                    request_id=request_id,
                    state="running",
                    waiting_reason=None,
                    digests=[],
                    prompt_tokens=len(live.request.prompt_token_ids),
                    output_tokens=live.num_out,
                    age_s=0.0,
                )
                for request_id, live in self._live.items()
            ],
            "adapters": [_residency(digest) for digest in self._pins],
            "evict": FreedBytes(device_bytes=7, host_bytes=len(call.tier)),
            "reset_prefix_cache": True,
        }
        if call.method == "pin" and self.model.name == "fake:pins":
            self._pins.append(call.digest)
        elif call.method == "pin":
            error = ErrorInfo(
                "adapter_not_found", f"no adapter {call.digest}", "adapter_unavailable"
            )
            self._answers.append(Answer(call.call_id, error=error))
            return
        if call.method in ("load", "pin", "unpin", "forget"):
            before, after = AdapterState.HOST, AdapterState.DEVICE
            self._events.append(AdapterEvent(call.digest, before, after, 0.5, time.time()))
            results["load"] = results["pin"] = results["unpin"] = _residency(call.digest)
            results["forget"] = FreedBytes(host_bytes=3)
        result = msgspec.Raw(msgspec.msgpack.encode(results[call.method]))
        self._answers.append(Answer(call.call_id, result))

    def take_events(self) -> list[AdapterEvent]:
        events, self._events = self._events, []
        return events

    def take_answers(self) -> list[Answer]:
        answers, self._answers = self._answers, []
        return answers

    def memory(self) -> MemoryInfo:
        return MemoryInfo(
            **{**dict.fromkeys(MemoryInfo.__struct_fields__, 1), "static_because": ""}
        )

    def stats(self) -> EngineStats:
        numbers = dict.fromkeys(EngineStats.__struct_fields__, 0)
        return msgspec.convert(
            {
                **numbers,
                "waiting_by_reason": {},
                "running_digests": [],
                "waiting_digests": [],
                "step_token_counts": [],
                "num_running": len(self._live),
                "steps": self.steps,
            },
            EngineStats,
        )

    def close(self) -> None:
        self.closed = True


def _residency(digest: str) -> AdapterResidencyInfo:
    return AdapterResidencyInfo(
        digest=digest,
        state=AdapterState.DEVICE,
        rank=8,
        pages=1,
        device_bytes=1,
        host_bytes=1,
        running=0,
        waiting=0,
        pinned=False,
        loaded_at=None,
        last_used_at=None,
        hits=0,
        loads=1,
        evictions=0,
    )


def build(config: EngineConfig, on_progress: Callable[[str, int, int], None]) -> FakeEngine:
    how = config.model.partition(":")[2]
    on_progress("weights", 1, 2)
    on_progress("weights", 2, 2)
    if how == "unsupported":
        raise ModelError("the model needs 3 GiB more; try --max-model-len 1024")
    if how == "bug":
        raise FileNotFoundError("config.json")
    if how == "die":
        print("about to fall over", flush=True)
        os.kill(os.getpid(), signal.SIGABRT)
    if how == "slow":
        time.sleep(1000)
    if how == "slowly_again":
        time.sleep(0.3)
    if how.startswith("once="):  # the first start goes well, the later ones do not
        marker = how.removeprefix("once=")
        if os.path.exists(marker):
            raise ModelError("the disk is gone")
        with open(marker, "w"):
            pass
    print("fake engine is up", flush=True)
    return FakeEngine(config)
