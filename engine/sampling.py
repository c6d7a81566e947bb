"""From logits to tokens, for all rows of a step at once.

Rows that only take the most likely token pay for one `max`; every other feature works on the rows
that asked for it. A row's outcome depends on nothing but its own logits, parameters, seed and
position, so it is the same whatever shares the batch and after a preemption.

Order: bias, allowed and suppressed tokens, a grammar's mask; penalties; temperature; top-k; top-p;
min-p. Nothing is sorted: whether a token is in the nucleus can be asked of the token alone (how
much mass lies above it?), so top-p draws and asks again until the answer is yes. Tokens of equal
probability are kept or dropped together. Log-probabilities are of the raw logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex.engine.api import SamplingParams, TokenLogprobs
from loraplex.engine.seams import ScheduledSequence
from loraplex.engine.sequence import Sequence

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step
GREEDY_BELOW = 1e-5  # a temperature so low that dividing by it could overflow


@dataclass(frozen=True, slots=True)
class Sampled:
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class Traits:
    """What a sequence's parameters ask for; worked out once per sequence."""

    greedy: bool
    edits: bool  # bias, allowed or suppressed tokens, a grammar, which change single logits
    penalties: bool
    plain: bool  # nothing but the most likely token

    @classmethod
    def of(cls, p: SamplingParams) -> Traits:
        greedy = p.temperature < GREEDY_BELOW
        edits = (
            bool(p.logit_bias)
            or p.allowed_token_ids is not None
            or p.min_tokens > 0
            or p.grammar is not None
        )
        penalties = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        return cls(
            greedy=greedy,
            edits=edits,
            penalties=penalties,
            plain=greedy and not edits and not penalties and p.logprobs is None,
        )


@dataclass(slots=True)
class _Seen:
    """The tokens a penalised sequence holds, counted as they come."""

    counts: Tensor  # [vocab] float32, occurrences in the output
    present: Tensor  # [vocab] bool, in prompt or output
    num_tokens: int  # counted so far


class Sampler:
    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._traits: dict[int, Traits] = {}
        self._seen: dict[int, _Seen] = {}

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Drop what is kept for sequences that left the running set."""
        for seq_id in seq_ids:
            self._traits.pop(seq_id, None)
            self._seen.pop(seq_id, None)

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> Sampled:
        """Choose the next token of each sequence.

        logits: `[R, vocab]` model dtype, row i of `sequences[i]`. Not changed.
        """
        traits = [self._traits_of(seq) for seq in sequences]
        token_ids = logits.max(dim=-1).indices.tolist()
        nothing: list[TokenLogprobs | None] = [None] * len(sequences)
        if all(t.plain for t in traits):
            return Sampled(token_ids, nothing)

        rows = [i for i, t in enumerate(traits) if not t.greedy or t.edits or t.penalties]
        if rows:
            chosen = self._choose(
                logits[rows].float(), [sequences[i] for i in rows], [traits[i] for i in rows]
            )
            for i, token_id in zip(rows, chosen, strict=True):
                token_ids[i] = token_id

        rows = [i for i, seq in enumerate(sequences) if seq.sampling.logprobs is not None]
        if rows:
            wanted = [sequences[i].sampling.logprobs or 0 for i in rows]
            found = token_logprobs(logits[rows], [token_ids[i] for i in rows], wanted)
            for i, entry in zip(rows, found, strict=True):
                nothing[i] = entry
        return Sampled(token_ids, nothing)

    def _choose(self, logits: Tensor, sequences: list[Sequence], traits: list[Traits]) -> list[int]:
        """logits: `[R, vocab]` float32, ours to change."""
        for i, (seq, t) in enumerate(zip(sequences, traits, strict=True)):
            if t.edits:
                self._edit(logits[i], seq)
            if t.penalties:
                self._penalise(logits[i], seq)
        token_ids: list[int] = logits.max(dim=-1).indices.tolist()
        rows = [i for i, t in enumerate(traits) if not t.greedy]
        if not rows:
            return token_ids
        drawing = [sequences[i] for i in rows]
        temperatures = torch.tensor([s.sampling.temperature for s in drawing], device=self._device)
        probs = torch.softmax(logits[rows] / temperatures[:, None], dim=-1)
        for i, token_id in zip(rows, _draw(probs, drawing).tolist(), strict=True):
            token_ids[i] = token_id
        return token_ids

    def _traits_of(self, seq: Sequence) -> Traits:
        traits = self._traits.get(seq.seq_id)
        if traits is None:
            traits = self._traits[seq.seq_id] = Traits.of(seq.sampling)
        return traits

    def _edit(self, row: Tensor, seq: Sequence) -> None:
        params = seq.sampling
        for token_id, bias in params.logit_bias.items():
            row[token_id] += bias
        if params.allowed_token_ids is not None:
            allowed = torch.tensor(params.allowed_token_ids, device=row.device)
            kept = row[allowed]
            row.fill_(-torch.inf)
            row[allowed] = kept
        suppressed = seq.suppressed_token_ids
        if suppressed:
            row[torch.tensor(sorted(suppressed), device=row.device)] = -torch.inf
        if seq.has_grammar:
            assert seq.mask is not None, f"sequence {seq.seq_id} samples without its mask"
            bits = np.unpackbits(seq.mask.view(np.uint8), count=len(row), bitorder="little")
            row.masked_fill_(torch.from_numpy(bits == 0).to(row.device), -torch.inf)

    def _penalise(self, row: Tensor, seq: Sequence) -> None:
        """CTRL's repetition penalty over prompt and output; OpenAI's two over the output."""
        params, seen = seq.sampling, self._count(seq)
        if params.repetition_penalty != 1:
            penalty = params.repetition_penalty
            weakened = torch.where(row > 0, row / penalty, row * penalty)
            torch.where(seen.present, weakened, row, out=row)
        if params.frequency_penalty != 0:
            row.sub_(seen.counts, alpha=params.frequency_penalty)
        if params.presence_penalty != 0:
            row.sub_((seen.counts > 0).float(), alpha=params.presence_penalty)

    def _count(self, seq: Sequence) -> _Seen:
        seen = self._seen.get(seq.seq_id)
        if seen is None:
            seen = _Seen(
                counts=torch.zeros(self._vocab_size, device=self._device),
                present=torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device),
                num_tokens=0,
            )
            self._seen[seq.seq_id] = seen
        new = torch.tensor(seq.token_ids[seen.num_tokens :], dtype=torch.int64, device=self._device)
        output = new[max(0, seq.num_prompt_tokens - seen.num_tokens) :]
        seen.present[new] = True
        seen.counts.index_add_(0, output, torch.ones_like(output, dtype=torch.float32))
        seen.num_tokens = seq.num_tokens
        return seen


def uniform(
    seeds: list[int], positions: list[int], attempt: int = 0
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A number in [0, 1) for each (seed, position, attempt): counter-based, no state, no order.

    The output function of SplitMix64 (Steele, Lea, Flood 2014), once to spread the seed and once on
    the place in the seed's stream.
    """
    with np.errstate(over="ignore"):
        state = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
        places = np.array(positions, dtype=np.uint64) + np.uint64(attempt << 40)
        mixed = _mix(_mix(state + GOLDEN) + places * GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(
    x: np.ndarray[tuple[int], np.dtype[np.uint64]],
) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _draw(probs: Tensor, sequences: list[Sequence]) -> Tensor:
    """Draw a token for each row from what its filters keep. probs: `[R, vocab]` -> `[R]`."""
    params = [seq.sampling for seq in sequences]
    seeds, positions = [seq.seed for seq in sequences], [seq.num_tokens for seq in sequences]
    if any(p.top_k > 0 for p in params):
        probs = _keep_top_k(probs, [p.top_k for p in params])
    candidates = probs
    if any(p.min_p > 0 for p in params):
        min_p = torch.tensor([p.min_p for p in params], device=probs.device)
        floor = min_p[:, None] * probs.amax(-1, keepdim=True)
        candidates = torch.where(probs >= floor, probs, 0.0)
    tokens = _invert(candidates, uniform(seeds, positions))

    rows = [i for i, p in enumerate(params) if p.top_p < 1]
    attempt = 0
    while rows:
        attempt += 1
        top_p = torch.tensor([params[i].top_p for i in rows], device=probs.device)
        base, chosen = probs[rows], tokens[rows]
        drawn = base.gather(1, chosen[:, None])
        above = torch.where(base > drawn, base, 0.0).sum(-1)
        refused = (above >= top_p * base.sum(-1)) & (above > 0)  # the likeliest always stays
        kept = refused.nonzero()[:, 0]
        rows = [rows[i] for i in kept.tolist()]
        if rows:
            # What is not likelier than a refused token would be refused, too.
            left = candidates[rows]
            candidates = candidates.clone() if candidates is probs else candidates
            candidates[rows] = left = torch.where(left > drawn[kept], left, 0.0)
            numbers = uniform([seeds[i] for i in rows], [positions[i] for i in rows], attempt)
            tokens[rows] = _invert(left, numbers)
    return tokens


def _keep_top_k(probs: Tensor, top_k: list[int]) -> Tensor:
    """Rows with `top_k <= 0` stay whole."""
    vocab_size = probs.shape[1]
    rows = [i for i, k in enumerate(top_k) if 0 < k < vocab_size]
    if not rows:
        return probs
    counts = torch.tensor([top_k[i] for i in rows], device=probs.device)
    part = probs[rows]
    least = part.topk(int(counts.max()), dim=-1).values.gather(1, counts[:, None] - 1)
    probs = probs.clone()
    probs[rows] = torch.where(part >= least, part, 0.0)
    return probs


def _invert(weights: Tensor, uniforms: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Tensor:
    """Invert the distribution function. weights: `[R, N]`, any positive sum -> index `[R]`."""
    cumulative = weights.cumsum(-1)
    numbers = torch.from_numpy(uniforms).to(weights.device)[:, None]
    targets = (numbers * cumulative[:, -1:]).to(cumulative.dtype)
    index = torch.searchsorted(cumulative, targets, right=True).clamp_(max=weights.shape[1] - 1)
    # Rounding may push a target to the very end, past the last token with any weight.
    stray = weights.gather(1, index) == 0
    if bool(stray.any()):
        index = torch.where(stray, weights.argmax(-1, keepdim=True), index)
    return index[:, 0]


def token_logprobs(logits: Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    """The log-probability and rank of each row's token, and its `num_top[i]` likeliest ones.

    logits: `[R, vocab]`, any float dtype.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = (logprobs > chosen).sum(-1).add_(1).tolist()
    width = min(max(num_top), logits.shape[1])
    values, ids = logprobs.topk(width, dim=-1)
    return [
        TokenLogprobs(token_id, value, rank, top_ids[:k], top_values[:k])
        for token_id, value, rank, k, top_ids, top_values in zip(
            token_ids,
            chosen[:, 0].tolist(),
            ranks,
            num_top,
            ids.tolist(),
            values.tolist(),
            strict=True,
        )
    ]


def prompt_targets(scheduled: ScheduledSequence) -> list[int]:
    """The prompt tokens whose log-probabilities this run owes, in order of its rows."""
    first = scheduled.start + 1
    return scheduled.seq.token_ids[first : first + scheduled.num_prompt_logprobs]
