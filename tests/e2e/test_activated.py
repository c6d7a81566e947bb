"""A long chat with the base model goes on with an activated LoRA, on a real server: what is not
computed again, and the tokens of peft.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CALL = "assistant: "  # the tiny models' generation prompt: a token a byte
BLOCK = 16


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Path:
    directory: Path = tiny_model("llama", max_position_embeddings=2048)
    return directory


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Its folder, and peft's own model with it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(3)
    tokens = AutoTokenizer.from_pretrained(model).encode(CALL)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "up_proj"],
        alora_invocation_tokens=tokens,
        task_type="CAUSAL_LM",
    )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = get_peft_model(base, config).eval()
    for key, weight in made.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(weight, std=0.12)
    folder = tmp_path_factory.mktemp("activated")
    made.save_pretrained(folder)
    return folder, made


def test_a_base_conversation_is_not_computed_again(
    server_class: Any, model: Path, adapter: Any, tmp_path: Path, upload_adapter: Any
) -> None:
    import torch

    folder, reference = adapter
    question = "0123456789" * 98
    chat = [{"role": "user", "content": question}]

    def ask(url: str, messages: list[dict[str, str]], **more: Any) -> httpx.Response:
        body = {"messages": messages, "max_tokens": 5, "temperature": 0, "return_token_ids": True}
        body |= {"ignore_eos": True, **more}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer

    def cached(answer: httpx.Response) -> int:
        found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    with server_class(model, tmp_path / "data", "--dtype", "float32") as server:
        made = upload_adapter(server.url, "check", folder)
        assert len(made["invocation_tokens"]) == len(CALL)
        base = ask(server.url, chat)
        num_prompt = base.json()["usage"]["prompt_tokens"]
        assert num_prompt == len(f"user: {question}\n{CALL}")
        assert (cached(base), base.json()["adapter"]) == (0, None)

        # The same conversation by the adapter: only from its block on it is another computation.
        called = ask(server.url, chat, model="check")
        assert called.json()["adapter"]["invoked"] is True
        assert called.headers["x-adapter-invoked"] == "true"
        assert cached(called) == (num_prompt - len(CALL)) // BLOCK * BLOCK == 976
        choice = called.json()["choices"][0]
        prompt, tokens = called.json()["prompt_token_ids"], choice["token_ids"]
        ids = torch.tensor([prompt])
        expected = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=258,
        )
        assert tokens == expected[0, len(prompt) :].tolist()
        assert tokens != base.json()["choices"][0]["token_ids"]

        # The next turn calls it anew: the first call's place is history, the base model's.
        turn = [*chat, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "?"}]
        assert cached(ask(server.url, turn)) == num_prompt // BLOCK * BLOCK
        later = ask(server.url, turn, model="check", stream=False)
        assert later.json()["adapter"]["invoked"] is True
        assert (
            cached(later) == (later.json()["usage"]["prompt_tokens"] - len(CALL)) // BLOCK * BLOCK
        )

        # And without a call it answers as the base model does, and says so.
        body = {"prompt": question, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        answers = [
            httpx.post(f"{server.url}/v1/completions", json=body | more, timeout=120)
            for more in ({}, {"adapter_id": "check"})
        ]
        assert answers[1].headers["x-adapter-invoked"] == "false"
        texts = [answer.json()["choices"][0]["text"] for answer in answers]
        assert texts[0] == texts[1]
        assert cached(answers[1]) == len(question) // BLOCK * BLOCK
