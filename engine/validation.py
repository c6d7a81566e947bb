"""What a request must be to be accepted. Pure: looks at the request, the model's facts and
nothing else.

Whether its adapters exist and fit is `adapters/slots.py`'s question, whether there is room now
the scheduler's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from loraplex.engine.api import AdapterUse, GenerationRequest, Grammar, ModelInfo, SamplingParams
from loraplex.engine.errors import InvalidRequest

MAX_ADAPTERS = 8  # of one request
MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_BIAS = 100.0
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0
MAX_ADAPTER_WEIGHT = 100.0
MAX_GRAMMAR_CHARS = 64 * 1024
MAX_WHITESPACE_CHARS = 256


def validate_request(request: GenerationRequest, model: ModelInfo, max_model_len: int) -> None:
    """`max_model_len`: tokens, prompt + output, that this engine can hold.

    Raises: InvalidRequest naming the field, its value and its limit; code
    "context_length_exceeded" for an over-long prompt, "invalid_request" for the rest.
    """
    _check_prompt(request.prompt_token_ids, model.vocab_size, max_model_len)
    _check_output(request, model.vocab_size, max_model_len)
    _check_adapters(request)
    _check_range("share", request.share, 0.01, 100)
    if request.pooling not in (None, "mean", "last"):
        raise InvalidRequest(f"pooling={request.pooling!r}: must be 'mean' or 'last'")
    _check_sampling(request.sampling, model)


def _check_prompt(prompt: list[int], vocab_size: int, max_model_len: int) -> None:
    if not prompt:
        raise InvalidRequest("the prompt is empty; send at least one token")
    _check_token_ids("prompt_token_ids", prompt, vocab_size)
    if len(prompt) > max_model_len - 1:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens, but prompt and output together may have "
            f"{max_model_len} and one is needed for the output; "
            f"shorten it by {len(prompt) - max_model_len + 1}",
            code="context_length_exceeded",
        )


def _check_output(request: GenerationRequest, vocab_size: int, max_model_len: int) -> None:
    """A resumed request must have a token to go."""
    output, max_tokens = request.output_token_ids, request.sampling.max_tokens
    if not output:
        return
    _check_token_ids("output_token_ids", output, vocab_size)
    room = max_model_len - len(request.prompt_token_ids)
    limit = room if max_tokens is None else min(room, max_tokens)
    if len(output) >= limit:
        raise InvalidRequest(f"output_token_ids: {len(output)} given, at most {limit - 1} allowed")


def _check_adapters(request: GenerationRequest) -> None:
    adapters = request.adapters
    if len(adapters) > MAX_ADAPTERS:
        raise InvalidRequest(f"adapters: {len(adapters)} given, at most {MAX_ADAPTERS} are allowed")
    if len({use.digest for use in adapters}) < len(adapters):
        raise InvalidRequest(
            "adapters: one is named twice; name it once, with the sum of the weights"
        )
    for use in adapters:
        _check_range(
            f"weight of adapter {use.digest[:12]}",
            use.weight,
            -MAX_ADAPTER_WEIGHT,
            MAX_ADAPTER_WEIGHT,
        )


def check_composition(adapters: tuple[AdapterUse, ...], needing_weight_one: list[str]) -> None:
    """Raises: InvalidRequest when one that is not linear in its weight is scaled or composed. Of
    weight 0 means left out.
    """
    weights = {use.digest: use.weight for use in adapters if use.weight != 0}
    for digest in needing_weight_one:
        if len(weights) == 1 and weights[digest] == 1:
            continue
        how = f"has weight {weights[digest]:g}" if len(weights) == 1 else "is combined with others"
        raise InvalidRequest(
            f"adapters: {digest[:12]} {how}, but it scales or replaces weights of the base model "
            "(DoRA, biases, whole modules or token rows), which has no meaning but whole; use it "
            "alone with weight 1"
        )


def _check_sampling(s: SamplingParams, model: ModelInfo) -> None:
    _check_range("temperature", s.temperature, 0, MAX_TEMPERATURE)
    if not 0 < s.top_p <= 1:
        raise InvalidRequest(f"top_p={s.top_p}: must be greater than 0 and at most 1 (1 = off)")
    if s.top_k < -1:
        raise InvalidRequest(f"top_k={s.top_k}: must be at least -1 (0 or -1 = off)")
    _check_range("min_p", s.min_p, 0, 1)
    _check_range("presence_penalty", s.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_range("frequency_penalty", s.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    if not 0 < s.repetition_penalty < math.inf:
        raise InvalidRequest(
            f"repetition_penalty={s.repetition_penalty}: must be finite and above 0 (1 = off)"
        )
    if s.seed is not None and not -(2**63) <= s.seed < 2**63:
        raise InvalidRequest(f"seed={s.seed}: must fit into 64 bits with sign")
    if s.max_tokens is not None and s.max_tokens < 1:
        raise InvalidRequest(f"max_tokens={s.max_tokens}: must be at least 1")
    if s.min_tokens < 0:
        raise InvalidRequest(f"min_tokens={s.min_tokens}: must be at least 0")
    if s.max_tokens is not None and s.min_tokens > s.max_tokens:
        raise InvalidRequest(
            f"min_tokens={s.min_tokens}: must not exceed max_tokens={s.max_tokens}"
        )
    for name, count in (("logprobs", s.logprobs), ("prompt_logprobs", s.prompt_logprobs)):
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise InvalidRequest(f"{name}={count}: must be between 0 and {MAX_LOGPROBS}")
    _check_token_lists(s, model)
    if s.grammar is not None:
        _check_grammar(s.grammar)


def _check_grammar(grammar: Grammar) -> None:
    """Its length only: whether it can be followed shows when it is compiled."""
    for name, text, limit in (
        (f"grammar ({grammar.kind})", grammar.text, MAX_GRAMMAR_CHARS),
        ("whitespace", grammar.whitespace or "", MAX_WHITESPACE_CHARS),
    ):
        if len(text.encode(errors="replace")) > limit:
            raise InvalidRequest(
                f"{name}: {len(text)} characters are too many, at most {limit} bytes are allowed; "
                "shorten it",
                code="invalid_grammar",
            )


def _check_token_lists(s: SamplingParams, model: ModelInfo) -> None:
    if len(s.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids: {len(s.stop_token_ids)} given, at most {MAX_STOP_TOKEN_IDS} allowed"
        )
    _check_token_ids("stop_token_ids", s.stop_token_ids, model.vocab_size)
    if len(s.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"logit_bias: {len(s.logit_bias)} entries given, at most {MAX_LOGIT_BIAS} are allowed"
        )
    _check_token_ids("logit_bias", s.logit_bias, model.vocab_size)
    for token_id, bias in s.logit_bias.items():
        _check_range(f"logit_bias of token {token_id}", bias, -MAX_BIAS, MAX_BIAS)
    if s.allowed_token_ids is None:
        return
    if not s.allowed_token_ids:
        raise InvalidRequest("allowed_token_ids is empty; name at least one token or leave it out")
    _check_token_ids("allowed_token_ids", s.allowed_token_ids, model.vocab_size)
    ends = {*s.stop_token_ids, *(() if s.ignore_eos else model.eos_token_ids)}
    if s.min_tokens and ends.issuperset(s.allowed_token_ids):
        raise InvalidRequest(
            "allowed_token_ids holds only tokens that end the output, but "
            f"min_tokens={s.min_tokens} forbids to end it; allow one more token"
        )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # false for nan
        raise InvalidRequest(f"{name}={value}: must be between {low:g} and {high:g}")


def _check_token_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{name}: token id {token_id} is not in the vocabulary of {vocab_size} tokens"
            )
