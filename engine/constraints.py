"""Works out, beside the step loop, which tokens each sequence with a grammar may get next.

    begin:   compile the grammar, or find it compiled; the mask of the first token
    advance: a token is known; the mask of the next one
    poll:    what has become of both

Neither is ever waited for long: a sequence without its mask waits or sits steps out, and the others
go on (`scheduler.py`). The work is native and runs without the interpreter's lock, in threads of
two queues, so that compiling holds no mask up. A matcher follows the tokens that the host knows, so
a preemption changes nothing for it.

Only so many different grammars are kept at a time, compiled or in the making; more of them wait
for one of these to be used by nobody. That bounds the memory whatever the grammars are.
"""

from __future__ import annotations

import queue
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from loraplex.engine.api import Grammar
from loraplex.engine.errors import EngineError, InvalidRequest
from loraplex.engine.grammars import STACK_BYTES, CompiledGrammar, GrammarCompiler, Mask, Matcher
from loraplex.engine.sequence import Sequence
from loraplex.engine.workers import JobQueue, Workers

MAX_GRAMMARS = 64  # different ones at a time


@dataclass(slots=True, eq=False)
class _Entry:
    """A grammar: being compiled, or compiled. `waiting`: who began meanwhile."""

    users: int = 0
    compiled: CompiledGrammar | None = None
    waiting: list[_Constraint] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Constraint:
    """One sequence's place in its grammar. `edit` turns what the grammar allows into what is
    allowed.
    """

    seq: Sequence
    grammar: Grammar
    edit: MaskEdit
    matcher: Matcher | None = None


@dataclass(frozen=True, slots=True)
class _News:
    """Of one job: a mask, or why there is none. `compiled`: the job made this."""

    constraint: _Constraint | None
    mask: Mask | None = None
    error: Exception | None = None
    grammar: Grammar | None = None
    compiled: CompiledGrammar | None = None


class MaskEdit:
    """The other parameters that forbid tokens, on top of a grammar.

    eos_token_ids: the model's.
    """

    def __init__(self, seq: Sequence, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        params = seq.sampling
        ends = eos_token_ids | frozenset(params.stop_token_ids)
        self._min_tokens = params.min_tokens
        self._early = ~_bits(ends, vocab_size) if params.min_tokens else None
        self._late = ~_bits(eos_token_ids, vocab_size) if params.ignore_eos else None
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else _bits(frozenset(allowed), vocab_size)

    def apply(self, mask: Mask, num_output_tokens: int) -> Mask:
        """The mask of the token after so many. Raises: InvalidRequest when nothing is left."""
        if self._allowed is not None:
            mask &= self._allowed
            if not mask.any():
                raise InvalidRequest(
                    f"after {num_output_tokens} tokens the grammar allows none of "
                    "allowed_token_ids; allow more tokens or leave one of the two out",
                    code="invalid_grammar",
                )
        goes_on = self._early if num_output_tokens < self._min_tokens else self._late
        if goes_on is not None and (mask & goes_on).any():
            mask &= goes_on
        return mask


class Constraints:
    """All methods belong to the engine's thread. on_news: called in a worker's."""

    def __init__(
        self,
        compiler: GrammarCompiler,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        num_threads: int = 1,
        on_news: Callable[[], None] = lambda: None,
        compile_workers: JobQueue | None = None,
        mask_workers: JobQueue | None = None,
    ) -> None:
        self.on_news = on_news
        self._compiler = compiler
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._compile_workers = compile_workers or Workers("grammar", num_threads, STACK_BYTES)
        self._mask_workers = mask_workers or Workers("mask", num_threads, STACK_BYTES)
        self._news: queue.SimpleQueue[_News] = queue.SimpleQueue()
        self._entries: OrderedDict[Grammar, _Entry] = OrderedDict()  # least lately begun first
        self._constraints: dict[int, _Constraint] = {}  # by seq_id
        self._without_room: deque[_Constraint] = deque()  # whose grammar would be one too many

    def begin(self, seq: Sequence) -> None:
        """A new sequence with a grammar; its first mask is on its way."""
        grammar = seq.sampling.grammar
        assert grammar is not None, "a sequence without a grammar"
        edit = MaskEdit(seq, self._vocab_size, self._eos_token_ids)
        constraint = self._constraints[seq.seq_id] = _Constraint(seq, grammar, edit)
        if self._without_room or not self._enter(constraint):
            self._without_room.append(constraint)

    def advance(self, seq: Sequence) -> None:
        """The sequence got its next token and goes on."""
        seq.mask = None
        constraint, token_id = self._constraints[seq.seq_id], seq.token_ids[-1]
        num_output_tokens = len(seq.token_ids) - seq.num_prompt_tokens

        def run() -> _News:
            assert constraint.matcher is not None
            constraint.matcher.accept(token_id)
            mask = constraint.edit.apply(constraint.matcher.mask(), num_output_tokens)
            return _News(constraint, mask)

        self._submit(self._mask_workers, run, _News(constraint))

    def forget(self, seq: Sequence) -> None:
        """It ended. A job that still runs for it ends unheard."""
        constraint = self._constraints.pop(seq.seq_id, None)
        if constraint is None:
            return
        if constraint in self._without_room:
            self._without_room.remove(constraint)
        else:
            self._leave(constraint)

    def poll(self, running: list[Sequence], wait_s: float) -> list[tuple[Sequence, EngineError]]:
        """Give the sequences the masks that are ready, waiting up to `wait_s` seconds for those of
        the running ones. Returns those that can have none, and why.
        """
        failed: list[tuple[Sequence, EngineError]] = []
        if not self._entries:
            return failed
        self._take_in(failed, 0)
        deadline = time.monotonic() + wait_s
        while any(seq.has_grammar and seq.mask is None for seq in running):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._take_in(failed, left_s):
                break
        return failed

    def close(self) -> None:
        self._compile_workers.close()
        self._mask_workers.close()

    def check_invariants(self, live: list[Sequence]) -> None:
        """Assert that exactly the live sequences with grammars hold one each."""
        assert set(self._constraints) == {seq.seq_id for seq in live if seq.has_grammar}
        assert len(self._entries) <= MAX_GRAMMARS, "too many grammars are kept"
        users = sum(entry.users for entry in self._entries.values())
        assert users + len(self._without_room) == len(self._constraints), "users of grammars"

    # --- grammars -------------------------------------------------------------------------------

    def _enter(self, constraint: _Constraint) -> bool:
        """Use its grammar; False when there is no room for one more."""
        grammar = constraint.grammar
        entry = self._entries.get(grammar)
        if entry is None:
            if len(self._entries) >= MAX_GRAMMARS and not self._drop_unused():
                return False
            entry = self._entries[grammar] = _Entry()
            self._submit(
                self._compile_workers,
                lambda: _News(None, grammar=grammar, compiled=self._compiler.compile(grammar)),
                _News(None, grammar=grammar),
            )
        self._entries.move_to_end(grammar)
        entry.users += 1
        if entry.compiled is None:
            entry.waiting.append(constraint)
        else:
            self._start(constraint, entry.compiled)
        return True

    def _leave(self, constraint: _Constraint) -> None:
        entry = self._entries.get(constraint.grammar)
        if entry is not None:
            entry.users -= 1
            if constraint in entry.waiting:
                entry.waiting.remove(constraint)
        self._admit()

    def _admit(self) -> None:
        while self._without_room and self._enter(self._without_room[0]):
            self._without_room.popleft()

    def _drop_unused(self) -> bool:
        for grammar, entry in self._entries.items():
            if entry.users == 0 and entry.compiled is not None:
                del self._entries[grammar]
                return True
        return False

    def _start(self, constraint: _Constraint, compiled: CompiledGrammar) -> None:
        seq = constraint.seq
        output = seq.token_ids[seq.num_prompt_tokens :]  # of an engine that died

        def run() -> _News:
            matcher = constraint.matcher = compiled.start()
            for token_id in output:
                matcher.accept(token_id)
            return _News(constraint, constraint.edit.apply(matcher.mask(), len(output)))

        self._submit(self._mask_workers, run, _News(constraint))

    # --- jobs -----------------------------------------------------------------------------------

    def _submit(self, workers: JobQueue, run: Callable[[], _News], failed: _News) -> None:
        def job() -> None:
            try:
                news = run()
            except Exception as error:
                news = _News(failed.constraint, error=error, grammar=failed.grammar)
            self._news.put(news)
            self.on_news()

        workers.submit(job)

    def _take_in(self, failed: list[tuple[Sequence, EngineError]], wait_s: float) -> bool:
        """All news there are, waiting for a first one; False when none came."""
        came = False
        while True:
            try:
                news = self._news.get(block=wait_s > 0, timeout=wait_s or None)
            except queue.Empty:
                return came
            came, wait_s = True, 0
            self._hear(news, failed)

    def _hear(self, news: _News, failed: list[tuple[Sequence, EngineError]]) -> None:
        if news.grammar is not None:
            self._hear_of_grammar(news, news.grammar, failed)
            return
        constraint = news.constraint
        assert constraint is not None
        if self._constraints.get(constraint.seq.seq_id) is not constraint:
            return  # it ended meanwhile
        if news.error is None:
            constraint.seq.mask = news.mask
        else:
            failed.append((constraint.seq, _engine_error(news.error)))

    def _hear_of_grammar(
        self, news: _News, grammar: Grammar, failed: list[tuple[Sequence, EngineError]]
    ) -> None:
        entry = self._entries[grammar]
        waiting, entry.waiting = entry.waiting, []
        if news.compiled is not None:
            entry.compiled = news.compiled
            for constraint in waiting:
                self._start(constraint, news.compiled)
        else:  # who has it ends now; another try would compile it again
            assert news.error is not None
            del self._entries[grammar]
            for constraint in waiting:
                del self._constraints[constraint.seq.seq_id]
                failed.append((constraint.seq, _engine_error(news.error)))
        self._admit()


def _engine_error(error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return error
    return EngineError(f"the grammar failed: {type(error).__name__}: {error}")


def _bits(token_ids: frozenset[int], vocab_size: int) -> Mask:
    flags = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    flags[list(token_ids)] = 1
    return np.packbits(flags, bitorder="little").view("<u4")
