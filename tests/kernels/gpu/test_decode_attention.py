"""Paged decode attention in the interpreter: groups, head sizes, splits, windows, bad pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import TOLERANCE, Case

from loraplex.kernels.gpu.attention import attention
from loraplex.kernels.gpu.attention_work import AttentionWork


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


# Prompts of the sequences that decode; 0 = the decoded token is the first. Around block edges.
PROMPTS = (0, 14, 15, 16, 70)


def decode(case: Case, prompts: tuple[int, ...] = PROMPTS, **changes: int) -> None:
    case.write([(seq, count) for seq, count in enumerate(prompts) if count])
    case.step([(seq, 1) for seq in range(len(prompts))], **changes)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 20])
def test_groups(group: int) -> None:
    decode(Case(group=group), (0, 40))


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        *((head_dim, torch.float32) for head_dim in (10, 24, 80, 96, 256)),
        *((head_dim, torch.float16) for head_dim in (10, 64, 128)),
        *((head_dim, torch.bfloat16) for head_dim in (80, 128, 256)),
    ],
)
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    decode(Case(head_dim=head_dim, dtype=dtype), (0, 33))


@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 256])
def test_block_sizes(block_size: int) -> None:
    decode(Case(block_size=block_size, num_blocks=max(8, 512 // block_size)), (0, 15, 70, 150))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 4, 7])
def test_splits(num_splits: int) -> None:
    """129 to 385 tokens are 2 to 4 splits of 128: some splits have no keys, the last few."""
    case = Case(num_blocks=64)
    decode(case, (0, 127, 128, 384), num_splits=num_splits)
    assert not case.kv.split_arrivals.any(), "the counters must be zero for the next launch"


def test_more_splits_than_are_merged_at_once() -> None:
    decode(Case(num_blocks=90, num_kv_heads=1), (1300,), num_splits=11)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("window", [1, 16, 37, 150, 1000])
def test_windows(window: int, num_splits: int) -> None:
    decode(Case(window=window, num_blocks=64), (0, 15, 40, 400), num_splits=num_splits)


def test_windows_skip_the_blocks_before_them() -> None:
    """Pages wholly before the window may be anybody's by now."""
    case = Case(window=20, num_blocks=64)
    case.write([(0, 300)])
    batch, q = case.write([(0, 1)])
    batch.block_tables[:, :16] = 1 << 20  # of 19 blocks
    case.close(case.attend(batch, q), batch, q)


@pytest.mark.parametrize("window", [None, 30])
def test_softcap(window: int | None) -> None:
    decode(Case(softcap=0.8, window=window), (3, 60))


def test_softcap_matters() -> None:
    case = Case(softcap=0.8)
    case.write([(0, 60)])
    batch, q = case.write([(0, 1)])
    capped = case.attend(batch, q)
    case.softcap = None
    assert (capped - case.attend(batch, q)).abs().max() > 0.01


@pytest.mark.parametrize("num_splits", [1, 2])
def test_padding_rows_are_zero_and_harm_nobody(num_splits: int) -> None:
    case = Case()
    case.write([(0, 40), (1, 20)])
    batch, q = case.write([(0, 1), (1, 1)])
    padded = replace(
        batch,
        context_lens=torch.cat((batch.context_lens, torch.zeros(2, dtype=torch.int32))),
        block_tables=torch.cat((batch.block_tables, torch.full_like(batch.block_tables, 1 << 20))),
    )
    q_padded = torch.cat((q, torch.full_like(q, float("nan"))))
    work = AttentionWork(num_decodes=4, num_splits=num_splits)
    out = attention(q_padded, case.kv, 0, padded, work, case.scale, None)
    case.close(out[:2], batch, q)
    assert not out[2:].any()


def test_splitting_does_not_depend_on_who_arrives_last() -> None:
    """Every split merged by itself in order: twice the same step gives the same bits."""
    case = Case(dtype=torch.float16, num_blocks=64)
    case.write([(0, 400)])
    batch, q = case.write([(0, 1)])
    assert torch.equal(case.attend(batch, q, num_splits=3), case.attend(batch, q, num_splits=3))


def test_a_wrong_block_table_fails() -> None:
    case = Case()
    case.write([(0, 40), (1, 40)])
    batch, q = case.write([(0, 1), (1, 1)])
    right = case.expected(batch, q)
    batch.block_tables = batch.block_tables.flip(0)
    wrong = case.attend(batch, q)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, right, **TOLERANCE[case.dtype])


def test_a_key_too_many_fails() -> None:
    """The comparison sees one token more or less in 40."""
    case = Case()
    case.write([(0, 40)])
    batch, q = case.write([(0, 1)])
    right = case.expected(batch, q)
    batch.context_lens -= 1
    with pytest.raises(AssertionError):
        torch.testing.assert_close(case.attend(batch, q), right, **TOLERANCE[case.dtype])


def test_refuses_to_split_more_pairs_than_it_can_count() -> None:
    case = Case(num_kv_heads=2)
    case.kv.split_arrivals = case.kv.split_arrivals[:1]
    case.write([(0, 4)])
    batch, q = case.write([(0, 1)])
    with pytest.raises(ValueError, match=r"num_splits=2 for 1 sequences .* pass num_splits=1"):
        case.attend(batch, q, num_splits=2)
