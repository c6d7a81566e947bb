"""Released clients of LoRAX and TGI against a real server: lorax-client and huggingface_hub.

lorax-client pins an old certifi and huggingface_hub, so it cannot be among the project's own
requirements; `make` installs it without them, and without it these tests are skipped.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import TextGenerationError, ValidationError

pytestmark = [
    pytest.mark.e2e,
    # lorax-client calls what pydantic has renamed since.
    pytest.mark.filterwarnings("ignore:The `dict` method is deprecated"),
]

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture
def prompts(skills: Any, uploaded: list[str]) -> dict[str, tuple[str, str]]:
    """(a prompt in the model's chat format, the answer) of each skill."""
    found = {}
    for name in uploaded:
        example = skills[name]["tour"][0]
        found[name] = (f"<|user|>{example['input']}<|assistant|>", example["expected"])
    return found


# --- lorax-client -------------------------------------------------------------------------------


@pytest.fixture
def lorax() -> Any:
    return pytest.importorskip("lorax", reason="lorax-client is not installed (see `make`)")


def test_lorax_generates_with_every_adapter(
    lorax: Any, demo_server: Any, prompts: dict[str, tuple[str, str]]
) -> None:
    client = lorax.Client(demo_server.url)
    for name, (prompt, expected) in prompts.items():
        answer = client.generate(prompt, adapter_id=name, max_new_tokens=60)
        assert answer.generated_text == expected
        assert answer.details.finish_reason.value == "eos_token"
        assert answer.details.generated_tokens == len(answer.details.tokens)
        assert answer.details.tokens[-1].special
    base = client.generate(prompts["rot13"][0], max_new_tokens=20, decoder_input_details=True)
    assert base.generated_text != prompts["rot13"][1]
    assert len(base.details.prefill) == base.details.prompt_tokens


def test_lorax_streams_what_it_generates(
    lorax: Any, demo_server: Any, prompts: dict[str, tuple[str, str]]
) -> None:
    client = lorax.Client(demo_server.url)
    for name in list(prompts)[:3]:
        prompt, expected = prompts[name]
        *_, last = events = list(client.generate_stream(prompt, adapter_id=name, max_new_tokens=60))
        assert "".join(event.token.text for event in events if not event.token.special) == expected
        assert last.generated_text == expected
        assert last.details.finish_reason.value == "eos_token"
        assert last.details.generated_tokens == len(events)


async def test_lorax_async(
    lorax: Any, demo_server: Any, prompts: dict[str, tuple[str, str]]
) -> None:
    client = lorax.AsyncClient(demo_server.url)
    prompt, expected = prompts["reverse"]
    answer = await client.generate(prompt, adapter_id="reverse", max_new_tokens=60)
    assert answer.generated_text == expected
    text = ""
    async for event in client.generate_stream(prompt, adapter_id="reverse", max_new_tokens=60):
        text += "" if event.token.special else event.token.text
    assert text == expected


def test_lorax_merges_samples_and_follows_schemas(
    lorax: Any, demo_server: Any, prompts: dict[str, tuple[str, str]]
) -> None:
    client = lorax.Client(demo_server.url)
    prompt, expected = prompts["rot13"]
    merged = lorax.MergedAdapters(ids=["rot13", "reverse"], weights=[1.0, 0.0], density=0.0)
    answer = client.generate(prompt, merged_adapters=merged, max_new_tokens=60)
    assert answer.generated_text == expected
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
    first = client.generate("hi", seed=3, **options)
    assert first.details.seed == 3
    assert client.generate("hi", seed=3, **options).generated_text == first.generated_text
    best = client.generate("hi", best_of=2, **options)
    assert len(best.details.best_of_sequences) == 1
    held = client.generate(
        "hi", max_new_tokens=60, response_format={"type": "json_object", "schema": SCHEMA}
    )
    jsonschema.validate(json.loads(held.generated_text), SCHEMA)


def test_lorax_reads_our_errors(lorax: Any, demo_server: Any) -> None:
    from lorax import errors

    client = lorax.Client(demo_server.url)
    with pytest.raises(errors.NotFoundError, match="nobody"):
        client.generate("hi", adapter_id="nobody")
    with pytest.raises(errors.ValidationError, match="typical_p"):
        client.generate("hi", typical_p=0.5)
    with pytest.raises(errors.ValidationError, match="prompt has"):
        client.generate("x" * 5000)


# --- huggingface_hub ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "/generate"])
def test_huggingface_generates(
    demo_server: Any, prompts: dict[str, tuple[str, str]], path: str
) -> None:
    client = InferenceClient(demo_server.url + path)
    for name in list(prompts)[:3]:
        prompt, expected = prompts[name]
        assert client.text_generation(prompt, adapter_id=name, max_new_tokens=60) == expected
    prompt, expected = prompts["rot13"]
    answer = client.text_generation(
        prompt, adapter_id="rot13", max_new_tokens=60, details=True, top_n_tokens=2
    )
    assert answer.generated_text == expected
    assert answer.details is not None
    assert answer.details.finish_reason == "eos_token"
    assert answer.details.generated_tokens == len(answer.details.tokens)


@pytest.mark.parametrize("path", ["", "/generate_stream"])
def test_huggingface_streams(
    demo_server: Any, prompts: dict[str, tuple[str, str]], path: str
) -> None:
    client = InferenceClient(demo_server.url + path)
    prompt, expected = prompts["rot13"]
    pieces = client.text_generation(prompt, adapter_id="rot13", max_new_tokens=60, stream=True)
    assert "".join(pieces) == expected
    *_, last = client.text_generation(
        prompt, adapter_id="rot13", max_new_tokens=60, stream=True, details=True
    )
    assert last.generated_text == expected
    assert last.details is not None
    assert last.details.finish_reason == "eos_token"
    assert last.details.input_length > 0


async def test_huggingface_async_and_its_grammar(demo_server: Any, uploaded: list[str]) -> None:
    async with AsyncInferenceClient(demo_server.url) as client:
        grammar: Any = {"type": "regex", "value": "[a-c]{3}"}
        text = await client.text_generation("hi", max_new_tokens=20, grammar=grammar)
    assert re.fullmatch("[a-c]{3}", text)


def test_huggingface_reads_our_errors(demo_server: Any, uploaded: list[str]) -> None:
    client = InferenceClient(demo_server.url)
    with pytest.raises(TextGenerationError, match="nobody"):
        client.text_generation("hi", adapter_id="nobody")
    with pytest.raises(ValidationError, match="typical_p"):
        client.text_generation("hi", typical_p=0.5)
