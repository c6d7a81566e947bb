"""Every limit of a request, one step inside and one step outside."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loraplex.engine.api import (
    AdapterUse,
    GenerationRequest,
    Grammar,
    GrammarKind,
    ModelInfo,
    SamplingParams,
)
from loraplex.engine.errors import InvalidRequest
from loraplex.engine.validation import validate_request

MODEL = ModelInfo(
    name="fake", architecture="Fake", dtype="float32", device="cpu", backend="torch",
    vocab_size=100, max_model_len=32, num_layers=1, eos_token_ids=[99], bos_token_id=None,
    tokenizer_json="", chat_template=None, special_tokens={}, generation_defaults={}, modules=[],
    num_parameters=1,
)  # fmt: skip


def check(
    prompt: list[int] | None = None, adapters: tuple[AdapterUse, ...] = (), **sampling: Any
) -> None:
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=[1] if prompt is None else prompt,
        sampling=SamplingParams(**sampling),
        adapters=adapters,
    )
    validate_request(request, MODEL, 32)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.0, "top_p": 1e-9, "top_k": -1, "min_p": 0.0},
        {"temperature": 2.0, "top_p": 1.0, "top_k": 10**6, "min_p": 1.0},
        {"presence_penalty": 2.0, "frequency_penalty": -2.0, "repetition_penalty": 1e-3},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"max_tokens": 1, "min_tokens": 1},
        {"max_tokens": 10**9, "min_tokens": 10**9},
        {"logprobs": 0, "prompt_logprobs": 20},
        {"logit_bias": {0: -100.0, 99: 100.0}},
        {"stop_token_ids": (0, 99), "allowed_token_ids": (0, 99)},
        {"allowed_token_ids": (99, 5), "min_tokens": 3},
        {"allowed_token_ids": (99,), "min_tokens": 3, "ignore_eos": True},
    ],
)
def test_what_is_within_the_limits_passes(sampling: dict[str, Any]) -> None:
    check(**sampling)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": 2.1}, "between 0 and 2"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"top_k": -2}, "top_k=-2"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1"),
        ({"frequency_penalty": -2.1}, "frequency_penalty=-2.1"),
        ({"frequency_penalty": math.nan}, "frequency_penalty=nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan"),
        ({"seed": 2**63}, "64 bits"),
        ({"seed": -(2**63) - 1}, "64 bits"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": -5}, "max_tokens=-5"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 5, "max_tokens": 4}, "must not exceed max_tokens=4"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"prompt_logprobs": 21}, "prompt_logprobs=21"),
        ({"stop_token_ids": (100,)}, "stop_token_ids: token id 100"),
        ({"stop_token_ids": (1,) * 129}, "at most 128"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: token id -1"),
        ({"logit_bias": {1: 100.5}}, "logit_bias of token 1=100.5"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1=nan"),
        ({"allowed_token_ids": ()}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": (100,)}, "allowed_token_ids: token id 100"),
        ({"allowed_token_ids": (99,), "min_tokens": 1}, "forbids to end it"),
        ({"allowed_token_ids": (99, 7), "stop_token_ids": (7,), "min_tokens": 1}, "forbids"),
    ],
)
def test_what_is_outside_is_refused_by_name(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        check(**sampling)
    assert caught.value.code == "invalid_request"


def test_prompts() -> None:
    check([0, 99] + [1] * 29)
    for prompt, message in ([], "empty"), ([100], "token id 100"), ([-1], "token id -1"):
        with pytest.raises(InvalidRequest, match=message):
            check(prompt)
    with pytest.raises(InvalidRequest, match=r"32 tokens.*shorten it by 1$") as caught:
        check([1] * 32)
    assert caught.value.code == "context_length_exceeded"


def test_adapters() -> None:
    check(adapters=tuple(AdapterUse(str(i), -1.5) for i in range(8)))
    for adapters, message in (
        (tuple(AdapterUse(str(i)) for i in range(9)), "at most 8"),
        ((AdapterUse("a"), AdapterUse("a", 0.5)), "named twice"),
        ((AdapterUse("a", math.nan),), "weight of adapter a=nan"),
        ((AdapterUse("a", math.inf),), "weight of adapter a=inf"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            check(adapters=adapters)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar(kind=GrammarKind.REGEX, text="ä" * 40_000), "40000 characters"),
        (
            Grammar(kind=GrammarKind.JSON_SCHEMA, text="{}", whitespace=" " * 300),
            "whitespace: 300",
        ),
    ],
)
def test_a_grammar_has_a_length(grammar: Grammar, message: str) -> None:
    check(grammar=Grammar(kind=GrammarKind.REGEX, text="ä" * 32_768))
    with pytest.raises(InvalidRequest, match=message) as caught:
        check(grammar=grammar)
    assert caught.value.code == "invalid_grammar"
