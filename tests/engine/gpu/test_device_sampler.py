"""The device sampler against the CPU's on the same logits, and what it must not do: wait."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sampling_cases import CASES, CPU, EOS, VOCAB, make_logits, make_sequence, set_mask
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loraplex.engine.api import TokenLogprobs
from loraplex.engine.gpu import sample_plan, sampler, token_counts
from loraplex.engine.gpu.device_logprobs import PromptLogprobs
from loraplex.engine.gpu.sampler import DeviceSampler
from loraplex.engine.sampling import Sampler, token_logprobs
from loraplex.engine.sequence import Sequence
from loraplex.kernels.gpu.configurations import distinct, kernel_name
from loraplex.kernels.gpu.launch import Launch, recording

ALL_CASES: dict[str, dict[str, Any]] = {
    **CASES,
    "greedy": {"temperature": 0.0},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.2, "logprobs": 0},
    "allowed with bias": {"allowed_token_ids": (4, 5, 9), "logit_bias": {4: 3.0, 7: 50.0}},
    "greedy grammar": {**CASES["grammar with bias"], "temperature": 0.0, "logprobs": 2},
    "logprobs": {"logprobs": 4, "top_p": 0.9},
}
ROWS = 8  # state rows


def sample(logits: Tensor, *sequences: Sequence, device: DeviceSampler | None = None) -> list[int]:
    """Each sequence in the state row of its place."""
    device = device or DeviceSampler(logits.shape[1], len(sequences), CPU)
    items = [(seq, row, seq.num_tokens) for row, seq in enumerate(sequences)]
    return device.collect(device.launch(logits, items)).token_ids


def same(found: TokenLogprobs | None, expected: TokenLogprobs | None) -> bool:
    """Up to float rounding. Only for rows without ties: torch orders equal ones as it likes."""
    if found is None or expected is None:
        return found is expected
    exact = (found.token_id, found.rank, found.top_ids)
    return exact == (expected.token_id, expected.rank, expected.top_ids) and all(
        math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5)
        for a, b in zip(
            [found.logprob, *found.top_logprobs],
            [expected.logprob, *expected.top_logprobs],
            strict=True,
        )
    )


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(VOCAB, torch.bfloat16), (272, torch.float16), (1000, torch.float32)]
)
def test_the_same_tokens_as_on_the_cpu(vocab: int, dtype: torch.dtype) -> None:
    """All cases in one batch, three steps; each step is launched before the host has the last's
    tokens, which pend."""
    params = list(ALL_CASES.values())
    numbers = range(len(params))
    sequences = [
        make_sequence((1, 2, 9), (4, 4, 11), seed=i, **p)
        for i, p in zip(numbers, params, strict=True)
    ]
    device, host = DeviceSampler(vocab, len(params), CPU), Sampler(vocab, CPU)
    last_tokens = torch.full((len(params) + 1,), -1)
    pending: list[int] = []
    for step in range(3):
        logits = make_logits(len(params), seed=step, vocab=vocab).to(dtype)
        items = [(s, len(params) - 1 - i, 6 + step) for i, s in enumerate(sequences)]
        allowed = [
            set_mask(s, vocab, 100 * i + step) if s.has_grammar else set(range(vocab))
            for i, s in enumerate(sequences)
        ]
        handle = device.launch(logits, items, last_tokens)
        for seq, token in zip(sequences, pending, strict=step > 0):
            seq.token_ids.append(token)
        expected = host.sample(logits, sequences)
        assert handle.token_ids.tolist() == expected.token_ids
        assert last_tokens.tolist() == [*reversed(expected.token_ids), -1]
        found = device.collect(handle)
        assert found.token_ids == expected.token_ids
        for token, tokens in zip(found.token_ids, allowed, strict=True):
            assert token in tokens
        assert all(map(same, found.logprobs, expected.logprobs))
        assert found.logprobs[-1] is not None
        pending = found.token_ids


@pytest.mark.parametrize("order", [(2, 0, 1, 3), (3, 2, 1, 0)])
def test_a_row_does_not_see_its_neighbours(order: tuple[int, ...]) -> None:
    """Bit for bit: alone, in a batch, in another place, beside greedy rows and others."""
    names = ("top_p and min_p", "greedy", "penalties", "logprobs")
    logits = make_logits(4, vocab=272).round().bfloat16()
    sequences = [make_sequence((1, 2), (5, 5), seed=7, **ALL_CASES[name]) for name in names]
    device = DeviceSampler(272, ROWS, CPU)
    items = [(sequences[i], i, 4) for i in order]
    together = device.collect(device.launch(logits[list(order)], items))
    for place, i in enumerate(order):
        other = DeviceSampler(272, ROWS, CPU)
        alone = other.collect(other.launch(logits[i : i + 1], [(sequences[i], 5, 4)]))
        assert alone.token_ids == [together.token_ids[place]]
        assert alone.logprobs == [together.logprobs[place]]


def test_a_vocabulary_of_no_round_size() -> None:
    logits = make_logits(3, vocab=32_003).bfloat16()
    sequences = [
        make_sequence(temperature=0.0),
        make_sequence(seed=3, top_k=700, top_p=0.9),
        make_sequence(seed=4, min_p=0.02, logprobs=2),
    ]
    expected = Sampler(32_003, CPU).sample(logits, sequences)
    assert sample(logits, *sequences) == expected.token_ids


def test_another_seed_or_position_changes_tokens() -> None:
    """What the comparison with the CPU would miss if numbers did not depend on their place."""
    logits = make_logits().expand(6, -1)
    device = DeviceSampler(VOCAB, ROWS, CPU)

    def tokens(seed: int, shift: int) -> list[int]:
        sequences = [make_sequence(output=(5,) * i, seed=seed) for i in range(6)]
        items = [(s, i, s.num_tokens + shift) for i, s in enumerate(sequences)]
        device.forget(range(6))
        return device.collect(device.launch(logits, items)).token_ids

    first = tokens(1, 0)
    assert first == tokens(1, 0)
    assert first != tokens(2, 0)
    assert first != tokens(1, 1)
    assert first[1:] == tokens(1, 1)[:-1]


def test_tokens_come_with_their_probability() -> None:
    """200 draws by chi-square, fixed seeds; a slightly other temperature fails the same test."""
    num_draws, [logits] = 200, make_logits(vocab=12)
    sequences = [make_sequence((1,), seed=seed, temperature=0.9) for seed in range(num_draws)]
    drawn = sample(logits.expand(num_draws, -1), *sequences)
    counts = torch.bincount(torch.tensor(drawn), minlength=12)

    def excess(temperature: float) -> float:
        """Standard deviations of the statistic above its mean."""
        expected = (logits / temperature).softmax(-1) * num_draws
        likely = expected >= 5
        terms = ((counts - expected) ** 2 / expected)[likely]
        return float(terms.sum() - len(terms)) / math.sqrt(2 * len(terms))

    assert excess(0.9) < 3
    assert excess(2.0) > 6


def test_suppressed_tokens_may_come_from_their_position_on() -> None:
    logits = make_logits()
    logits[0, EOS] = 20
    seq = make_sequence((1, 2), temperature=0.0, min_tokens=2)
    device = DeviceSampler(VOCAB, ROWS, CPU)
    tokens = []
    for position in range(2, 6):
        handle = device.launch(logits, [(seq, 0, position)])
        tokens += device.collect(handle).token_ids
    assert [token == EOS for token in tokens] == [False, False, True, True]


def test_a_preempted_sequence_is_counted_again() -> None:
    """In a row whose last owner left its counts there, and back in one that holds its old ones."""
    params = {"temperature": 0.0, "frequency_penalty": 1.5, "repetition_penalty": 1.1}
    logits, device = make_logits(), DeviceSampler(VOCAB, ROWS, CPU)
    seq, other = make_sequence(**params), make_sequence((7, 8, 9), **params)
    rows = [2, 2, 2, 3, 3, 3, 2, 2]
    for step, row in enumerate(rows):
        if row != rows[step - 1]:
            device.forget([2, 3])
        items = [(seq, row, seq.num_tokens)]
        if step < 3:
            items.append((other, 3, other.num_tokens))
        found = device.collect(device.launch(logits.expand(len(items), -1), items))
        [expected] = Sampler(VOCAB, CPU).sample(logits, [seq]).token_ids
        assert found.token_ids[0] == expected
        for (s, _, _), token in zip(items, found.token_ids, strict=True):
            s.token_ids.append(token)
    assert len(set(seq.output_token_ids)) > 3


def test_counting_needs_the_tokens_before_the_first_sample() -> None:
    device, seq = DeviceSampler(VOCAB, ROWS, CPU), make_sequence(presence_penalty=1.0)
    with pytest.raises(AssertionError, match="first counted at position 3"):
        device.launch(make_logits(), [(seq, 0, 3)])


def test_prompt_logprobs() -> None:
    logits, targets = make_logits(5, vocab=272).half(), [3, 271, 0, 64, 63]
    found = PromptLogprobs.start(logits, targets, 3).collect()
    expected = token_logprobs(logits, targets, [3] * 5)
    assert all(map(same, found, expected))
    assert not all(map(same, found, token_logprobs(logits, [*targets[1:], 3], [3] * 5)))
    # As many as the vocabulary has, where the request asks for more.
    [all_of_them] = PromptLogprobs.start(logits[:1, :7], [2], 20).collect()
    assert len(all_of_them.top_ids) == 7


# --- what a step costs


class Waits(TorchDispatchMode):
    """Lists the calls after which the host knows something of a device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.FORBIDDEN:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def launches(names: list[str]) -> list[Launch]:
    sequences = [make_sequence((1, 2), **ALL_CASES[name]) for name in names]
    items = [(seq, row, 2) for row, seq in enumerate(sequences)]
    device = DeviceSampler(VOCAB, ROWS, CPU)
    with Waits() as waits, recording() as notes:
        device.launch(make_logits(len(names)), items, torch.zeros(ROWS, dtype=torch.int64))
    assert waits.found == []
    return notes


def test_rows_pay_for_what_they_ask_only() -> None:
    def kernels(*names: str) -> list[str]:
        return [kernel_name(launch.kernel) for launch in launches(list(names))]

    assert kernels("greedy", "greedy") == ["peaks", "likeliest"]
    assert kernels("greedy", "top_p") == ["peaks", "draw"]
    assert kernels("temperature", "bias") == ["edit", "peaks", "draw"]
    assert kernels("greedy with penalties") == [
        "count", "edit", "peaks", "likeliest", "survey", "logprobs",
    ]  # fmt: skip


def test_one_compilation_serves_every_number_of_rows() -> None:
    """Nothing that is specialised on, the alignment of a slice say, may depend on it: compiling
    takes seconds, in the middle of a step."""
    names = ["penalties", "logprobs"]
    expected = set(distinct(launches(names)))
    for rows in (3, 4, 5, 8):
        assert set(distinct(launches((names * rows)[:rows]))) == expected


def test_waits_would_be_found() -> None:
    with Waits() as waits:
        Sampler(VOCAB, CPU).sample(make_logits(), [make_sequence(temperature=0.5, top_p=0.5)])
    assert waits.found


def test_parameters_are_sent_when_the_rows_change(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    def spy(module: Any) -> None:
        send = module.send

        def sending(array: Any, device: torch.device) -> Tensor:
            sent.append(module.__name__.rpartition(".")[2])
            return send(array, device)

        monkeypatch.setattr(module, "send", sending)

    for module in (sample_plan, sampler, token_counts):
        spy(module)
    device = DeviceSampler(VOCAB, ROWS, CPU)
    greedy = [make_sequence(temperature=0.0) for _ in range(3)]
    drawing = make_sequence(frequency_penalty=0.5, min_tokens=2)

    def step(position: int, *rows: tuple[Sequence, int]) -> list[str]:
        sent.clear()
        logits = make_logits(len(rows))
        device.collect(device.launch(logits, [(seq, row, position) for seq, row in rows]))
        return sorted(set(sent))

    assert step(2, (greedy[0], 0), (greedy[1], 1)) == ["sample_plan"]
    assert step(3, (greedy[0], 0), (greedy[1], 1)) == []
    assert step(4, (greedy[1], 1), (greedy[0], 0)) == ["sample_plan"]
    assert step(2, (drawing, 3)) == ["sample_plan", "sampler", "token_counts"]
    assert step(3, (drawing, 3)) == ["sampler"], "the position"
    assert step(4, (drawing, 3)) == ["sample_plan", "sampler"], "min_tokens is over"
    assert step(5, (drawing, 3)) == ["sampler"]


def test_logits_are_not_changed() -> None:
    logits = make_logits(2)
    before = logits.clone()
    sample(logits, make_sequence(logit_bias={1: 9.0}), make_sequence(repetition_penalty=2.0))
    assert torch.equal(logits, before)
