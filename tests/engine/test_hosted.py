"""The engine as its process sees it, on a real tiny model: refusals, news, sleep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_fakes import Bench

from loraplex.engine import api
from loraplex.engine.build import build_engine
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import EngineBroken, ModelError
from loraplex.engine.hosted import HostedEngine


def settings(directory: Path, tmp_path: Path, **changes: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "model": str(directory),
        "adapter_dir": tmp_path,
        "backend": "torch",
        "num_threads": 1,
        "kv_cache_memory": 4 << 20,
        "adapter_memory": 4 << 20,
    }
    return EngineConfig(**{**defaults, **changes})


@pytest.fixture
def hosted(tiny_model: Any, tmp_path: Path) -> Iterator[HostedEngine]:
    hosted = build_engine(settings(tiny_model("llama"), tmp_path))
    yield hosted
    hosted.close()


def request(number: str, **changes: Any) -> api.GenerationRequest:
    fields: dict[str, Any] = {
        "request_id": number,
        "prompt_token_ids": [1, 2, 3],
        "sampling": api.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True),
    }
    return api.GenerationRequest(**{**fields, **changes})


def run(hosted: HostedEngine) -> list[api.SequenceOutput]:
    outputs: list[api.SequenceOutput] = []
    while hosted.idle_s() is not None:
        outputs += hosted.step()
    return outputs


def test_a_request_runs_to_its_end_and_then_there_is_nothing_to_do(hosted: HostedEngine) -> None:
    assert hosted.idle_s() is None
    hosted.add(request("1"))
    assert hosted.idle_s() == 0.0
    outputs = run(hosted)
    assert sum(len(output.token_ids) for output in outputs) == 3
    assert outputs[-1].finish_reason == api.FinishReason.LENGTH


def test_a_refused_request_still_ends_in_one_output(hosted: HostedEngine) -> None:
    hosted.add(request("1", prompt_token_ids=[1] * 5000))
    hosted.add(request("2", adapters=(api.AdapterUse("0" * 64),)))
    long, unknown = run(hosted)
    assert (long.request_id, long.finish_reason) == ("1", api.FinishReason.ERROR)
    assert long.error is not None
    assert long.error.kind == "invalid_request"
    assert unknown.error is not None
    assert unknown.error.code == "adapter_not_found"


def test_cancelled_requests_end_and_strangers_are_ignored(hosted: HostedEngine) -> None:
    hosted.add(request("1"))
    hosted.cancel(["1", "nobody"])
    [output] = run(hosted)
    assert output.finish_reason == api.FinishReason.ABORT


def test_answers_are_collected_once(hosted: HostedEngine) -> None:
    hosted.call(api.Call(call_id=7, method="memory"))
    [answer] = hosted.take_answers()
    assert answer.call_id == 7
    assert answer.error is None
    assert hosted.take_answers() == []


def test_with_nothing_to_run_it_sleeps_until_the_end_of_a_load() -> None:
    bench = Bench(at_once=False)
    hosted = HostedEngine(bench.engine, lambda: None)
    rung: list[None] = []
    hosted.on_wake = lambda: rung.append(None)
    bench.add([1], {"a": 1.0})
    assert bench.engine.has_work()
    hosted.step()
    idle_s = hosted.idle_s()
    assert idle_s is not None
    assert idle_s > 0
    bench.engine.wake()  # as the loader does
    assert rung == [None]


def test_with_a_step_in_flight_it_never_sleeps() -> None:
    bench = Bench(max_in_flight=1)
    hosted = HostedEngine(bench.engine, lambda: None)
    bench.add([1], max_tokens=3)
    while hosted.idle_s() is not None:
        hosted.step()
        assert hosted.idle_s() in (0.0, None)
    assert bench.runner.events[-1] == "collect 2"


def test_start_up_reports_its_phases(tiny_model: Any, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    hosted = build_engine(
        settings(tiny_model("llama"), tmp_path), lambda *progress: seen.append(progress)
    )
    hosted.close()
    phases = list(dict.fromkeys(phase for phase, _, _ in seen))
    assert phases == ["model", "kernels", "weights"]
    for phase in phases:
        steps = [(done, total) for name, done, total in seen if name == phase]
        assert steps[-1][0] == steps[-1][1]


def test_model_info_carries_what_the_api_needs(tiny_model: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    model = tiny_model("qwen3", dtype="bfloat16")
    hosted = build_engine(settings(model, tmp_path, dtype="float32", max_model_len=200))
    hosted.close()
    info = hosted.model
    assert (info.architecture, info.dtype, info.device) == ("Qwen3ForCausalLM", "float32", "cpu")
    assert (info.vocab_size, info.num_layers, info.max_model_len) == (272, 3, 200)
    assert (info.bos_token_id, info.eos_token_ids) == (256, [257])
    assert info.special_tokens["eos_token"] == "</s>"
    assert info.chat_template is not None
    tokenizer = Tokenizer.from_str(info.tokenizer_json)
    assert tokenizer.decode(tokenizer.encode("Grüße").ids) == "Grüße"
    assert sum(module.kind == "linear" for module in info.modules) == 3 * 7
    memory = hosted.memory()
    assert memory.weights_bytes > 0
    assert memory.kv_cache_bytes <= 4 << 20
    assert memory.adapter_bytes_total <= 4 << 20


@pytest.mark.parametrize(
    ("changes", "message", "code"),
    [
        ({"model": "/no/such/model"}, "no such directory", "model_not_found"),
        ({"device": "cuda"}, "--device cpu", "no_device"),
        ({"backend": "torch", "batch_invariant": True}, "batch_invariant", "backend_unavailable"),
        ({"adapter_memory": 100}, "--adapter-memory", "adapter_memory_too_small"),
        ({"kv_cache_memory": 100}, "--kv-cache-memory", "kv_cache_too_small"),
        ({"max_model_len": 10_000}, "--max-model-len", "max_model_len_exceeded"),
    ],
)
def test_what_cannot_be_served_says_what_would_help(
    changes: dict[str, Any], message: str, code: str, tiny_model: Any, tmp_path: Path
) -> None:
    import torch

    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ModelError, match=message) as caught:
        build_engine(settings(tiny_model("llama"), tmp_path, **changes))
    assert caught.value.code == code


def test_a_directory_without_tokenizer_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    import shutil

    model = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        build_engine(settings(model, tmp_path / "store"))


def test_an_engine_whose_steps_fail_for_good_ends_its_process(
    hosted: HostedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request hears of it: another engine goes on with them."""

    def out_of_memory(schedule: object) -> None:
        raise MemoryError

    hosted.add(request("1"))
    monkeypatch.setattr(hosted.engine._runner, "launch", out_of_memory)
    assert hosted.step() == []
    with pytest.raises(EngineBroken):
        hosted.step()
