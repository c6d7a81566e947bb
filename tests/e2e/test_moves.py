"""The moves that the README shows: another server's client, and another base URL.

From the OpenAI service: also `test_openai_client.py`; from LoRAX and TGI: `test_tgi_clients.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.e2e


@pytest.fixture
def client(demo_server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture
def loaded(demo_server: Any, assets: Path) -> Iterator[str]:
    """An adapter that vLLM's route loaded from its path, under a name of its own."""
    url, name = f"{demo_server.url}/v1", "from-vllm"
    body = {"lora_name": name, "lora_path": str(assets / "adapters" / "reverse")}
    answer = httpx.post(f"{url}/load_lora_adapter", json=body, timeout=60)
    assert (answer.status_code, answer.text) == (
        200,
        f"Success: LoRA adapter '{name}' added successfully.",
    )
    yield name
    answer = httpx.post(f"{url}/unload_lora_adapter", json={"lora_name": name}, timeout=60)
    assert (answer.status_code, answer.text) == (
        200,
        f"Success: LoRA adapter '{name}' removed successfully.",
    )


def ask(client: openai.OpenAI, model: str, example: dict[str, str]) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": example["input"]}],
        temperature=0,
        max_tokens=40,
    )
    assert answer.choices[0].message.content == example["expected"]


def test_from_openai(client: openai.OpenAI, uploaded: list[str], skills: Any) -> None:
    for name in uploaded[:2]:
        ask(client, name, skills[name]["tour"][0])


def test_from_vllm(client: openai.OpenAI, loaded: str, skills: Any) -> None:
    models = {model.id: model for model in client.models.list()}
    base = next(name for name, model in models.items() if model.parent is None)  # type: ignore[attr-defined]
    assert models[loaded].parent == base  # type: ignore[attr-defined]
    ask(client, loaded, skills["reverse"]["tour"][0])
    ask(client, f"{base}:{loaded}", skills["reverse"]["tour"][0])  # as SGLang's clients say it


def test_from_vllm_an_unloaded_adapter_is_gone(client: openai.OpenAI, loaded: str) -> None:
    """The fixture of the test above has unloaded it; this one's has loaded it again."""
    assert client.models.retrieve(loaded).id == loaded
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="never-loaded", prompt="x")


def test_from_sglang(demo_server: Any, uploaded: list[str], skills: Any) -> None:
    example = skills["rot13"]["tour"][0]
    body = {
        "text": f"<|user|>{example['input']}<|assistant|>",
        "sampling_params": {"max_new_tokens": 40, "temperature": 0},
        "lora_path": "rot13",
    }
    answer = httpx.post(f"{demo_server.url}/generate", json=body, timeout=60).json()
    assert answer["text"] == example["expected"]
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
