"""Sequences, logits and parameter sets for the tests of both samplers."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraplex.engine.api import GenerationRequest, Grammar, GrammarKind, SamplingParams
from loraplex.engine.sequence import Sequence

CPU = torch.device("cpu")
VOCAB = 50
EOS = 3
_numbers = count()


def make_sequence(
    prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **params: Any
) -> Sequence:
    number = next(_numbers)
    request = GenerationRequest(
        request_id=str(number),
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(**params),
    )
    seq = Sequence.from_request(
        request,
        seq_id=number,
        arrival_time=0.0,
        max_model_len=10_000,
        eos_token_ids=frozenset({EOS}),
        seed=request.sampling.seed or 0,
    )
    seq.token_ids.extend(output)
    if seq.has_grammar:
        set_mask(seq, VOCAB, 5)
    return seq


def set_mask(seq: Sequence, vocab: int, seed: int) -> set[int]:
    """About a fifth of the tokens, at least one."""
    flags = np.random.default_rng(seed).random(-(-vocab // 32) * 32) < 0.2
    flags[seed % vocab], flags[vocab:] = True, False
    seq.mask = np.packbits(flags, bitorder="little").view("<u4")
    return set(flags.nonzero()[0].tolist())


GRAMMAR = Grammar(kind=GrammarKind.REGEX, text="unused")


def make_logits(rows: int = 1, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "small top_p": {"top_p": 0.2, "temperature": 2.0},
    "top_p of nothing": {"top_p": 0.0},
    "top_p and min_p": {"top_p": 0.7, "min_p": 0.3},
    "min_p": {"min_p": 0.2},
    "all filters": {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
    "penalties": {
        "repetition_penalty": 1.5,
        "presence_penalty": 0.4,
        "frequency_penalty": -0.3,
        "top_p": 0.8,
    },
    "bias": {"logit_bias": {7: 5.0, 8: -100.0}},
    "allowed": {"allowed_token_ids": (4, 5, EOS)},
    "grammar": {"grammar": GRAMMAR, "temperature": 0.8, "min_tokens": 9},
    "grammar with bias": {"grammar": GRAMMAR, "logit_bias": {7: 5.0, 8: -100.0}},
    "grammar with penalties": {"grammar": GRAMMAR, "repetition_penalty": 1.4, "top_p": 0.9},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (0, 6), "logit_bias": {EOS: 9.0}},
}
