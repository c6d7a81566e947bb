"""The sampling kernels one by one, against torch and numpy on the same logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from loraplex.engine.sampling import uniform as host_uniform
from loraplex.kernels.gpu import sample_uniform
from loraplex.kernels.gpu.launch import launch, recording
from loraplex.kernels.gpu.sample_draw import draw
from loraplex.kernels.gpu.sample_edits import TokenMasks, count_tokens, edit_logits
from loraplex.kernels.gpu.sample_logprobs import HEAD_FIELDS, find_logprobs
from loraplex.kernels.gpu.sample_peaks import MIN_GROUP, Groups, find_peaks, take_likeliest
from loraplex.kernels.gpu.sample_rows import EDIT, RECORD, WORDS, SampleRows
from loraplex.kernels.gpu.sample_uniform import load_seed

INF = float("inf")
VOCABS = (7, 64, 272, 1000, 5003)


def make_logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    return (torch.randn(rows, vocab, generator=generator) * 2).to(dtype)


def make_records(rows: int, **fields: Any) -> Tensor:
    records = np.zeros(rows, dtype=RECORD)
    records["inverse_temperature"], records["top_p"], records["repetition"] = 1, 1, 1
    records["edit_slot"], records["state_row"] = -1, np.arange(rows)
    for name, value in fields.items():
        records[name] = value
    return torch.from_numpy(records.view(np.int32).reshape(rows, WORDS))


def likeliest(logits: Tensor) -> list[int]:
    rows = SampleRows(logits, make_records(len(logits)))
    token_ids = torch.full((len(logits),), -1)
    take_likeliest(rows, find_peaks(rows, sums=False), token_ids, None, None)
    return token_ids.tolist()


def drawn(logits: Tensor, positions: list[int] | None = None, **fields: Any) -> list[int]:
    rows = SampleRows(logits, make_records(len(logits), **fields))
    token_ids = torch.full((len(logits),), -1)
    at = torch.tensor(positions or [0] * len(logits), dtype=torch.int32)
    draw(rows, find_peaks(rows, sums=True), at, token_ids, None, None)
    return token_ids.tolist()


# --- random numbers


@triton.jit
def _uniform_kernel(records, positions, attempt, out):
    row = triton.language.program_id(0)
    position = triton.language.load(positions + row)
    number = sample_uniform.uniform(load_seed(records, row), position, attempt)
    triton.language.store(out + row, number)


@pytest.mark.parametrize("attempt", [0, 1, 63])
def test_the_random_numbers_are_the_hosts_bit_for_bit(attempt: int) -> None:
    seeds = [0, 1, 12345, 2**31, 2**32 + 7, 2**63 - 1, 2**63, 2**64 - 1]
    positions = [0, 1, 5, 127, 70_000, 2**20, 3, 131_071]
    records = make_records(8, seed=np.array(seeds, dtype=np.uint64))
    out = torch.zeros(8, dtype=torch.float64)
    at = torch.tensor(positions, dtype=torch.int32)
    launch(_uniform_kernel, (8,), records, at, attempt, out)
    assert np.array_equal(out.numpy(), host_uniform(seeds, positions, attempt))


# --- the likeliest


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_likeliest_of_equals_is_the_lowest(vocab: int, dtype: torch.dtype) -> None:
    """Few values, so that most rows have ties; torch takes the first of them, too."""
    logits = make_logits(6, vocab, dtype).round()
    assert likeliest(logits) == logits.max(-1).indices.tolist()
    assert any((row == row.max()).sum() > 1 for row in logits), "no ties, nothing shown"


def test_a_last_token_and_a_group_of_its_own() -> None:
    for vocab in (MIN_GROUP + 1, 2 * MIN_GROUP, 2 * MIN_GROUP + 1):
        logits = torch.zeros(2, vocab)
        logits[0, -1], logits[1, MIN_GROUP] = 1, 1
        assert likeliest(logits) == [vocab - 1, MIN_GROUP]


def test_large_vocabularies_have_larger_groups() -> None:
    """So that their peaks find room in registers."""
    for vocab in (1, 64, 128_256, 151_936, 262_144, 500_000):
        groups = Groups.of(vocab)
        assert (groups.count - 1) * groups.size < vocab <= groups.count * groups.size
        assert groups.count <= groups.padded <= 2048
        assert groups.per_tile * groups.size <= 4096
    assert (Groups.of(128_256).size, Groups.of(151_936).size) == (64, 128)
    logits = torch.zeros(2, 151_936)
    logits[0, 151_935], logits[1, 128] = 1, 1
    assert likeliest(logits) == [151_935, 128]


def test_rows_with_nan_and_infinities_give_a_token_of_the_vocabulary() -> None:
    """A model that is broken must not break the sampler: nan counts as impossible."""
    logits = make_logits(6, 272)
    logits[0, 5] = torch.nan
    logits[1] = torch.nan
    logits[2] = -INF
    logits[3, 100] = INF
    logits[4, 200:] = -INF
    logits[5] = -1e38
    logits[5, 3] = 1e38
    first = int(logits[0].nan_to_num(-INF).argmax())
    expected = [first, 0, 0, 100, int(logits[4].argmax()), 3]
    assert likeliest(logits) == expected
    with np.errstate(over="ignore"):
        assert drawn(logits, greedy=1, min_p=1.0) == expected
    for filters in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        with np.errstate(over="ignore"):  # differences of 1e38, which a GPU does not mention
            tokens = drawn(logits, seed=np.arange(6), **filters)
        assert tokens[1:4] == [0, 0, 100]
        assert tokens[0] != 5
        assert tokens[4] < 200
        assert tokens[5] == 3


def test_rows_may_lie_apart() -> None:
    """As the head's output does whose columns were padded."""
    logits = make_logits(3, 400)[:, :272]
    assert likeliest(logits) == logits.argmax(-1).tolist()
    assert drawn(logits, greedy=1, min_p=1.0) == logits.argmax(-1).tolist()


# --- filters: which tokens can be drawn


def kept(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """By sorting, in float64. Tokens of equal probability stay or go together."""
    probs = logits.double().softmax(-1)
    if top_k:
        probs = torch.where(probs >= probs.sort(descending=True).values[top_k - 1], probs, 0)
    above = torch.stack([probs[probs > p].sum() for p in probs])
    keep = (above < top_p * probs.sum()) | (above == 0)
    return set(torch.where(keep & (probs >= min_p * probs.max()) & (probs > 0))[0].tolist())


def spread_seeds(count: int) -> np.ndarray[Any, Any]:
    """Seeds whose first numbers at position 0 lie evenly in [0, 1)."""
    numbers = host_uniform(list(range(100 * count)), [0] * 100 * count)
    places = (np.arange(count) + 0.5) / count
    return np.abs(numbers - places[:, None]).argmin(1)


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 5, "top_p": 0.6},
        {"top_k": 5, "min_p": 0.2},
        {"top_p": 0.3},
        {"top_p": 0.9, "min_p": 0.5},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_the_filters_keep_what_sorting_keeps(filters: dict[str, Any]) -> None:
    """Every kept token comes up and no other, with equal ones at every cut.

    A kept token has more than 1/22 of the mass, so 22 even numbers find it.
    """
    logits = torch.full((70,), -9.0)
    logits[[3, 66]], logits[[64, 0]], logits[69] = 2.0, 1.0, 0.0
    expected = kept(logits, **filters)
    assert 2 <= len(expected) <= 5
    rows = logits.bfloat16().expand(22, -1)
    assert set(drawn(rows, seed=spread_seeds(22), **filters)) == expected


@pytest.mark.parametrize("top_k", [1, 16, 17, 200, 999])
def test_top_k_beside_and_beyond_the_number_of_groups(top_k: int) -> None:
    """1000 tokens are 16 groups. An even spread of the numbers reaches the least likely, too."""
    logits = make_logits(4, 1000) * 0.01
    tokens = drawn(logits, seed=np.arange(4), top_k=top_k)
    for row, token in zip(logits, tokens, strict=True):
        assert token in kept(row, top_k=top_k)
    bars = logits.sort(descending=True).values[:, top_k - 1]
    barely = torch.where(logits >= bars[:, None], logits, logits - 1e4)
    assert tokens == drawn(barely, seed=np.arange(4)), "the same draw from the kept ones alone"


def test_equal_logits_everywhere() -> None:
    logits = torch.zeros(8, 300)
    seeds = np.arange(8)
    plain = drawn(logits, seed=seeds)
    assert plain == [int(u * 300) for u in host_uniform(list(range(8)), [0] * 8)]
    for filters in ({"top_k": 3}, {"top_p": 0.01}, {"min_p": 1.0}):
        assert drawn(logits, seed=seeds, **filters) == plain, "equals are not told apart"


def test_another_position_or_seed_draws_another_token() -> None:
    logits = torch.zeros(1, 1000).expand(6, -1)
    tokens = drawn(logits, list(range(6)), seed=9)
    assert len(set(tokens)) == 6
    assert tokens[1:] == drawn(logits[1:], list(range(1, 6)), seed=9)
    assert not set(drawn(logits, list(range(6)), seed=10)) & set(tokens)


# --- edits and counts


def test_edits_and_penalties_change_the_copy_only() -> None:
    vocab = 5000  # two blocks
    logits = make_logits(3, vocab, torch.bfloat16)
    before = logits.clone()
    edits = np.array([(7, 5.0), (4999, -INF), (0, 2.0), (4500, 0.0)], dtype=EDIT)
    records = make_records(
        3,
        edit_slot=[1, -1, 0],
        first_edit=[0, 0, 2],
        num_edits=[2, 0, 2],
        exclusive=[0, 0, 1],
        penalised=[1, 0, 0],
        repetition=[1.5, 1, 1],
        presence=[0.25, 0, 0],
        frequency=[-0.5, 0, 0],
        state_row=[4, 5, 6],
    )
    counts = torch.full((7, vocab), 99, dtype=torch.int32)
    held = torch.tensor([11, 7, 4600, 7, 4600, 4600, 30], dtype=torch.int32)
    count_tokens(counts, torch.tensor([[4, 1, 2, 6]], dtype=torch.int32), held)
    assert counts[4].nonzero()[:, 0].tolist() == [7, 30, 4600]
    assert counts[4, 30] == 1

    rows = edit_logits(
        logits,
        records,
        torch.tensor([2, 0], dtype=torch.int32),
        torch.from_numpy(edits.view(np.int32).reshape(-1, 2)),
        counts,
    )
    first, third = logits[0].float(), torch.full((vocab,), -INF)
    first[7] += 5
    first[4999] = -INF
    for token in (7, 4600, 30):
        first[token] = first[token] / 1.5 if first[token] > 0 else first[token] * 1.5
    # Prompt: 7, 4600. Output: 7, 4600, 4600, 30.
    for token, count in ((7, 1), (4600, 2), (30, 1)):
        first[token] -= 0.25 - 0.5 * count
    third[0], third[4500] = logits[2, 0].float() + 2, logits[2, 4500].float()
    assert rows.edited is not None
    torch.testing.assert_close(rows.edited, torch.stack([third, first]), rtol=1e-6, atol=1e-6)
    assert torch.equal(logits, before)
    assert (counts[:4] == 99).all()


@pytest.mark.parametrize("vocab", [50, 5000])
def test_masks_exclude_tokens_of_their_rows_only(vocab: int) -> None:
    logits = make_logits(4, vocab, torch.bfloat16)
    edits = np.array([(3, 100.0), (40, 1.0), (41, 100.0)], dtype=EDIT)
    records = make_records(
        4,
        edit_slot=[0, -1, 2, 1],
        first_edit=[0, 0, 0, 1],
        num_edits=[1, 0, 0, 2],
        exclusive=[0, 0, 0, 1],
    )
    allowed = torch.rand(2, vocab, generator=torch.Generator().manual_seed(1)) < 0.3
    allowed[:, 3], allowed[1, 40], allowed[1, 41] = False, True, False
    bits = np.packbits(
        np.pad(allowed.numpy(), ((0, 0), (0, -vocab % 32))), axis=1, bitorder="little"
    )
    masks = TokenMasks(
        torch.tensor([0, 1, -1], dtype=torch.int32), torch.from_numpy(bits.view(np.int32))
    )
    rows = edit_logits(
        logits,
        records,
        torch.tensor([0, 3, 2], dtype=torch.int32),
        torch.from_numpy(edits.view(np.int32).reshape(-1, 2)),
        None,
        masks,
    )
    only = torch.full((vocab,), -INF)
    only[40] = logits[3, 40].float() + 1
    expected = [logits[0].float().where(allowed[0], -INF), only, logits[2].float()]
    assert rows.edited is not None
    torch.testing.assert_close(rows.edited, torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_masks_of_another_vocabulary_are_refused() -> None:
    logits, one = make_logits(1, 50), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="2 words each"):
        edit_logits(
            logits,
            make_records(1, edit_slot=[0]),
            one,
            torch.zeros(0, 2, dtype=torch.int32),
            None,
            TokenMasks(one, torch.zeros(1, 3, dtype=torch.int32)),
        )


def test_published_tokens_are_counted_and_kept_for_the_next_step() -> None:
    logits = make_logits(3, 272)
    rows = SampleRows(logits, make_records(3, state_row=[4, 0, 2], penalised=[1, 0, 1]))
    peaks = find_peaks(rows, sums=True)
    for greedy in (True, False):
        counts = torch.zeros(5, 272, dtype=torch.int32)
        last = torch.full((5,), -1)
        tokens = torch.empty(3, dtype=torch.int64)
        if greedy:
            take_likeliest(rows, peaks, tokens, last, counts)
        else:
            draw(rows, peaks, torch.zeros(3, dtype=torch.int32), tokens, last, counts)
        assert last.tolist() == [tokens[1], -1, tokens[2], -1, tokens[0]]
        assert counts.sum() == 2
        assert counts[4, tokens[0]] == counts[2, tokens[2]] == 1


# --- log-probabilities


@pytest.mark.parametrize("vocab", VOCABS)
def test_logprobs_ranks_and_the_likeliest(vocab: int) -> None:
    """Ties: the lower id comes first."""
    logits = make_logits(4, vocab, torch.float16).round()
    token_ids = torch.tensor([0, 1, vocab - 1, vocab // 2])
    num_top = [min(vocab, 9), 0, min(vocab, 4)]
    asked = torch.tensor([[3, num_top[0]], [0, num_top[1]], [2, num_top[2]]], dtype=torch.int32)
    found = find_logprobs(logits, token_ids, asked, 9)
    values = found.view(torch.float32)
    logprobs = logits.float().log_softmax(-1)
    for i, (row, count) in enumerate(asked.tolist()):
        expected, chosen = logprobs[row], logprobs[row, token_ids[row]]
        assert found[i, 0] == (expected > chosen).sum() + 1
        torch.testing.assert_close(values[i, 1], chosen)
        order = sorted(range(vocab), key=lambda t: (-logits[row, t], t))[:count]
        assert found[i, HEAD_FIELDS : HEAD_FIELDS + count].tolist() == order
        top = values[i, HEAD_FIELDS + 9 : HEAD_FIELDS + 9 + count]
        torch.testing.assert_close(top, expected[order])


def test_logprobs_of_impossible_tokens() -> None:
    logits = torch.full((1, 70), -INF)
    logits[0, 66], logits[0, 3] = 2.0, 1.0
    asked = torch.tensor([[0, 5]], dtype=torch.int32)
    with np.errstate(over="ignore"):
        found = find_logprobs(logits, torch.tensor([0]), asked, 5)
    values = found.view(torch.float32)
    assert found[0, 0] == 3
    assert values[0, 1] == -INF
    assert found[0, HEAD_FIELDS : HEAD_FIELDS + 5].tolist() == [66, 3, 0, 1, 2]
    assert values[0, HEAD_FIELDS + 7 :].tolist() == [-INF] * 3


# --- launchers


def test_launchers_refuse_what_kernels_would_misread() -> None:
    logits, records = make_logits(2, 70), make_records(2)
    with pytest.raises(ValueError, match="neighbouring columns"):
        SampleRows(logits.t(), records)
    with pytest.raises(ValueError, match="float64"):
        SampleRows(logits.double(), records)
    with pytest.raises(ValueError, match="2 rows of logits but 1 records"):
        SampleRows(logits, records[:1])
    with pytest.raises(ValueError, match="int32"):
        SampleRows(logits, records.float())
    rows = SampleRows(logits, records)
    with pytest.raises(ValueError, match="sums=True"):
        draw(rows, find_peaks(rows, sums=False), records[:, 0], torch.zeros(2), None, None)
    with pytest.raises(ValueError, match="spans"):
        count_tokens(records, records, records)
    with pytest.raises(ValueError, match="asked"):
        find_logprobs(logits, torch.zeros(2), records, 3)


def test_no_rows_start_nothing() -> None:
    rows = SampleRows(torch.empty(0, 70), make_records(0))
    with recording() as launches:
        find_peaks(rows, sums=True)
    assert launches[0].grid[0] == 0
    find_peaks(rows, sums=True)
