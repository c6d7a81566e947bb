"""Where an activated LoRA begins, held to peft; and how a sequence is cut there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora.variants import calculate_alora_offsets

from loraplex.engine.activation import activation_spans, activation_start
from loraplex.engine.api import AdapterUse, GenerationRequest, SamplingParams
from loraplex.engine.sequence import Sequence

few = st.integers(0, 2)  # so that parts of the wanted tokens come up often


def pefts_start(prompt: list[int], wanted: list[int]) -> int | None:
    config: Any = {"x": SimpleNamespace(alora_invocation_tokens=wanted)}
    [offset] = calculate_alora_offsets(config, "x", torch.tensor([prompt]))
    return None if offset is None else len(prompt) - offset


@settings(max_examples=400, deadline=None)
@given(prompt=st.lists(few, min_size=1, max_size=24), wanted=st.lists(few, min_size=1, max_size=6))
def test_it_begins_where_peft_does(prompt: list[int], wanted: list[int]) -> None:
    assert activation_start(prompt, tuple(wanted)) == pefts_start(prompt, wanted)


def test_the_last_occurrence_counts_and_its_first_token_belongs_to_it() -> None:
    assert activation_start([7, 8, 1, 7, 8, 2], (7, 8)) == 3
    assert activation_start([7, 8], (7, 8)) == 0
    assert activation_start([5, 7, 7, 7], (7, 7)) == 2, "occurrences may overlap"
    assert activation_start([7], (7, 8)) is None
    assert activation_start([8, 7, 9], (7, 8)) is None


def test_no_tokens_make_the_search_slow() -> None:
    """An adapter and a prompt made to match almost everywhere: 10^8 steps if done naively."""

    class Counted(list[int]):
        num_reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.num_reads += 1
            return super().__getitem__(index)

    for wanted in ((1, *[0] * 1000), (*[0] * 1000, 1), (*[0] * 500, 1, *[0] * 500)):
        prompt = Counted([0] * 20_000)
        assert activation_start(prompt, wanted) is None
        assert prompt.num_reads < 4 * len(prompt)


def test_members_of_a_composition_begin_each_at_its_own_place() -> None:
    plain, first, second, never = (AdapterUse(digest) for digest in ("plain", "x", "y", "z"))
    spans = activation_spans(
        (plain, first, second, never),
        [1, 2, 3, 4, 5],
        {"x": (4,), "y": (2, 3), "z": (9,)},
    )
    assert spans == ((0, (plain,)), (1, (plain, second)), (3, (plain, first, second)))
    assert activation_spans((first,), [4, 1], {"x": (4,)}) == ((0, (first,)),)
    assert activation_spans((never,), [4, 1], {"z": (9,)}) == ((0, ()),)
    assert activation_spans((), [4, 1], {}) == ((0, ()),)


def test_what_was_generated_does_not_move_it() -> None:
    """Neither here nor in an engine that takes over from one that died."""
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=[1, 7, 8, 2],
        output_token_ids=[7, 8, 3],
        sampling=SamplingParams(),
        adapters=(AdapterUse("x"),),
    )
    seq = Sequence.from_request(
        request,
        seq_id=0,
        arrival_time=0.0,
        max_model_len=100,
        eos_token_ids=frozenset(),
        seed=0,
        invocations={"x": (7, 8)},
    )
    assert seq.token_ids == [1, 7, 8, 2, 7, 8, 3]
    assert seq.spans == ((0, ()), (1, (AdapterUse("x"),)))
    assert seq.not_invoked == []
