"""One request's token state inside the engine. Knows nothing of models, tensors, text or who asked.

`num_computed_tokens` is the heart: it counts the leading tokens whose K/V lie in `block_table`.
Chunked prefill, prefix hits, decode and recompute after preemption are all "let it catch up with
`num_tokens`".

    token_ids:  | prompt ............................ | output ........ | pending |
                0            num_computed      num_prompt                   num_tokens
                [--- in the KV cache ---)[--- to compute ----------------------)

A *pending* token is sampled by a step that still runs: it has its place and counts, but only the
device knows it yet. "In the KV cache" is meant in the device's order of work: it is there for
whatever is launched next.

Which adapters apply to a token depends on its position (`spans`): activated LoRAs begin somewhere
in the prompt, all others at its first token. That is settled once, when the request comes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from loraplex.engine.activation import Span, activation_spans
from loraplex.engine.api import (
    AdapterUse,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
)
from loraplex.engine.fair_order import Place

if TYPE_CHECKING:
    from loraplex.engine.grammars import Mask


class SequenceStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class WaitingReason(StrEnum):
    """Why a sequence waits; the values of `RequestInfo.waiting_reason`."""

    KV = "kv"  # not enough free blocks
    SLOT = "slot"  # no room on the device for one of its adapters
    ADAPTER_LOADING = "adapter_loading"
    GRAMMAR = "grammar"  # its grammar is not compiled yet
    QUOTA = "quota"  # the step has no sequence or token left


def canonical_composition(adapters: tuple[AdapterUse, ...]) -> tuple[AdapterUse, ...]:
    """The form in which requests with the same effect are equal: by digest, no zero weights."""
    used = (use for use in adapters if use.weight != 0)
    return tuple(sorted(used, key=lambda use: (use.digest, use.weight)))


@dataclass(slots=True, eq=False)
class Sequence:
    """`seq_id` is unique for the life of the engine and grows with arrival."""

    seq_id: int
    request: GenerationRequest
    spans: tuple[Span, ...]  # what the model applies, canonical, by position
    token_ids: list[int]  # prompt + output, as far as known
    num_prompt_tokens: int
    max_num_tokens: int  # prompt + output never grow past this
    eos_token_ids: frozenset[int]  # empty when the request ignores eos and has no grammar
    arrival_time: float  # seconds, the engine's clock
    seed: int  # the request's, or drawn when it was added
    place: Place  # in the order of service

    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    num_pending: int = 0  # at most one per step in flight; none unless a runner has steps in flight
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when first scheduled
    block_table: list[int] = field(default_factory=list)
    num_published_blocks: int = 0  # leading ones of `block_table`, shared or offered for sharing
    block_hashes: list[bytes] = field(default_factory=list)  # prefix_hash.py's memo
    adapters: tuple[AdapterUse, ...] = field(init=False)  # at the end of the prompt, and after
    composition: tuple[tuple[str, float], ...] = field(init=False)  # `adapters`, sortable
    digests: tuple[str, ...] = field(init=False)  # of `adapters`
    first_scheduled_time: float | None = None
    num_preemptions: int = 0
    num_failed_steps: int = 0  # since its last token
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    # With a grammar: the tokens that may come after those in `token_ids`; None = not known yet.
    mask: Mask | None = None

    def __post_init__(self) -> None:
        self.adapters = self.spans[-1][1]
        self.composition = tuple((use.digest, use.weight) for use in self.adapters)
        self.digests = tuple(use.digest for use in self.adapters)

    @classmethod
    def from_request(
        cls,
        request: GenerationRequest,
        *,
        seq_id: int,
        arrival_time: float,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        seed: int,
        invocations: Mapping[str, tuple[int, ...]] | None = None,
        place: Place | None = None,
    ) -> Sequence:
        """invocations: invocation tokens of the request's activated LoRAs, by digest.

        place: None for one that no engine serves.
        """
        num_prompt_tokens = len(request.prompt_token_ids)
        max_tokens = request.sampling.max_tokens
        return cls(
            seq_id=seq_id,
            request=request,
            spans=activation_spans(
                canonical_composition(request.adapters),
                request.prompt_token_ids,
                invocations or {},
            ),
            token_ids=[*request.prompt_token_ids, *request.output_token_ids],
            num_prompt_tokens=num_prompt_tokens,
            max_num_tokens=min(
                max_model_len,
                max_model_len if max_tokens is None else num_prompt_tokens + max_tokens,
            ),
            eos_token_ids=eos_token_ids
            if not request.sampling.ignore_eos or request.sampling.grammar is not None
            else frozenset(),
            arrival_time=arrival_time,
            seed=seed,
            place=place or Place.by_arrival(seq_id, request.priority),
        )

    @property
    def not_invoked(self) -> list[str]:
        """Digests that the request names and no token uses: their invocation tokens are not in the
        prompt."""
        uses = canonical_composition(self.request.adapters)
        return [use.digest for use in uses if use not in self.adapters]

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def num_tokens(self) -> int:
        """With the pending; also the position of the token that is sampled next."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """With the pending."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def order(self) -> int:
        """Who goes first (`fair_order.py`)."""
        return self.place.order

    @property
    def num_uncomputed_tokens(self) -> int:
        """What is left to run. The last token a sequence may have never runs: nothing follows it,
        so nobody asks for its logits."""
        return min(self.num_tokens, self.max_num_tokens - 1) - self.num_computed_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Asked for and not delivered yet: they go out with the first token."""
        is_first_unknown = len(self.token_ids) == self.num_prompt_tokens
        return self.sampling.prompt_logprobs is not None and is_first_unknown

    @property
    def needs_all_rows(self) -> bool:
        """Of the whole prompt, so the prefix cache is of no use to it."""
        return self.wants_prompt_logprobs or self.request.pooling == "mean"

    @property
    def has_grammar(self) -> bool:
        return self.request.sampling.grammar is not None

    @property
    def lacks_mask(self) -> bool:
        """It cannot run now: which tokens its grammar allows next depends on one that only the
        device knows, or is being worked out.
        """
        return self.has_grammar and (self.num_pending > 0 or self.mask is None)

    @property
    def suppressed_token_ids(self) -> frozenset[int]:
        """What the sampler must not choose now: tokens that would end it before `min_tokens`. With
        a grammar `mask` says it.
        """
        if self.has_grammar or self.num_output_tokens >= self.sampling.min_tokens:
            return frozenset()
        return self.eos_token_ids | frozenset(self.sampling.stop_token_ids)
