"""What the engine's loop asks of whoever runs the model, and what passes between the two. No
torch.

The scheduler writes a `Schedule`, the runner turns it into one forward pass, the engine reads
back one `StepSample` per scheduled sequence. `launch` and `collect` are separate so that the CPU
can prepare step n + 1 while a GPU runs n.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from loraplex.engine.api import AdapterProbe, TokenLogprobs
from loraplex.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens `start` to `start + num_tokens - 1` of `seq` run in this step; their blocks are in
    `seq.block_table`.

    `samples`: the run reaches the last token, so its logits choose the next one.
    `feeds_back`: the one token of this run is pending: not in `seq.token_ids`, but what the last
    step sampled for this sequence, in the runner's own memory.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    feeds_back: bool = False

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == 1 and self.samples

    @property
    def pools(self) -> bool:
        """The run reaches the end of a prompt that is to become one vector."""
        end = self.start + self.num_tokens
        return self.seq.request.pooling is not None and end == self.seq.num_prompt_tokens

    @property
    def num_prompt_logprobs(self) -> int:
        """How many prompt log-probabilities this run owes: one per row whose next token is in the
        prompt.

        Row i (token `start + i`) gives the entry of prompt token `start + i + 1`.
        """
        if not self.seq.wants_prompt_logprobs:
            return 0
        return max(
            0, min(self.start + self.num_tokens, self.seq.num_prompt_tokens - 1) - self.start
        )


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step. Decodes come first; inside decodes and inside the rest equal compositions are
    neighbours.
    """

    scheduled: list[ScheduledSequence]
    num_decodes: int
    num_tokens: int
    released_seq_ids: list[int]  # left the running set since the last schedule (ended or preempted)


@dataclass(frozen=True, slots=True)
class StepSample:
    """What one scheduled sequence got from the step. `token_id` is None exactly when it did not
    sample.
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None  # of `token_id`, when the request asks for it
    prompt_logprobs: list[TokenLogprobs] | None = (
        None  # `ScheduledSequence.num_prompt_logprobs` entries
    )
    embedding: bytes | None = None  # float32, little endian: of a run that `pools`


class Runner(Protocol):
    """Steps take effect in the order of their launches: what one writes, later ones read."""

    @property
    def max_in_flight(self) -> int:
        """How many steps may still run when the next one is launched. 0: `launch` is synchronous;
        1: step n + 1 is launched before step n is collected.
        """
        ...

    def launch(self, schedule: Schedule) -> Any:
        """Start the step; `schedule.scheduled` is not empty. The handle goes to `collect`, once,
        in launch order, whatever becomes of its sequences.

        All that the runner needs of the sequences it reads here: by the time of `collect` they
        have moved on, lost their blocks or ended. For a row that samples, `seq.num_tokens` is the
        position of the token it chooses.

        Invariant the prefix cache rests on: within a layer the K and V of *all* the step's tokens
        are written before any attention of that layer reads, since a sequence may share full
        blocks that another fills in this same step.
        """
        ...

    def collect(self, handle: Any) -> list[StepSample]:
        """Wait for the step; one entry per scheduled sequence, in order.

        When this raises, the step is over, too; the steps launched after it are still collected.
        """
        ...


class Prober(Protocol):
    """Compares an adapter's pages with its files. Used from the engine's thread."""

    def read(self, digest: str) -> Future[Any]:
        """Begin to read the files; for `compare`."""
        ...

    def run_paged(self, source: Any) -> Any:
        """Run what was read, which must be on the device; for `compare`. As long as two short
        steps.
        """
        ...

    def compare(self, source: Any, paged: Any) -> AdapterProbe: ...

    def close(self) -> None: ...
