"""Which requests go on after the engine process died, and which one it dies of.

Every live request is kept with what came of it. When the engine is back, each is submitted again
with its tokens so far, and its stream goes on: since randomness is counted from (seed, position),
with the very tokens that would have come.

A request may be the reason of the death, and would be again. Blame goes by what the engine had in
hand (`flight_recorder.py`): a request that was in hand and had got no token since it was last
submitted has a strike more, one that had got some starts anew with one. With two strikes a request
is a suspect: suspects are submitted one after the other, each when the one before it got a token,
so that the next death has one suspect in hand. Three strikes, the last of them alone among
suspects, are proof. Whoever merely shared steps with it goes on, however often that happens.

An adapter that two requests were convicted with is quarantined.

Knows nothing of processes or sockets; `client.py` asks.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from loraplex.engine.api import GenerationRequest
from loraplex.engine.errors import AdapterUnavailable, EngineError
from loraplex.engine.stream import Stream

SUSPECT_STRIKES = 2
PROOF_STRIKES = 3
QUARANTINE_CONVICTIONS = 2


@dataclass(frozen=True, slots=True)
class Supervision:
    """What became of engines so far. Counters only grow."""

    restarts: int = 0
    resumed: int = 0  # requests that went on in another engine
    quarantined: Mapping[str, str] = field(default_factory=dict)  # digest -> why it is refused


@dataclass(slots=True, eq=False)
class Live:
    """A request whose stream is open. request: as first submitted, with a seed and its id on the
    wire, which ends in its serial.
    """

    serial: int
    request: GenerationRequest
    stream: Stream
    strikes: int = 0
    num_tokens_submitted: int = 0
    num_resumes: int = 0

    @property
    def made_progress(self) -> bool:
        """It got a token since it was last submitted."""
        return len(self.stream.token_ids) > self.num_tokens_submitted

    def resumed(self) -> GenerationRequest:
        """What to submit now."""
        self.num_tokens_submitted = len(self.stream.token_ids)
        self.num_resumes += 1
        return msgspec.structs.replace(self.request, output_token_ids=list(self.stream.token_ids))


class Recovery:
    """submit: sends requests to the engine."""

    def __init__(self, submit: Callable[[list[GenerationRequest]], None]) -> None:
        self.live: dict[str, Live] = {}  # by id on the wire
        self.quarantined: dict[str, str] = {}  # digest -> why
        self.num_resumed = 0  # requests that went on after a death, ever
        self.on_trial: Live | None = None  # the one suspect that is submitted
        self._submit = submit
        self._suspects: deque[Live] = deque()
        self._convictions: Counter[str] = Counter()

    def check(self, request: GenerationRequest) -> None:
        """Raises: AdapterUnavailable for an adapter in quarantine."""
        for use in request.adapters:
            if why := self.quarantined.get(use.digest):
                raise AdapterUnavailable(why, code="adapter_quarantined")

    def release(self, digest: str) -> None:
        """An operator wants to see it tried again."""
        self.quarantined.pop(digest, None)
        self._convictions.pop(digest, None)

    def died(self, in_hand: set[int], how: str) -> None:
        """The engine died with these in hand: note who may be the reason, end who is."""
        self.on_trial = None
        self._suspects.clear()
        for wire_id, live in list(self.live.items()):
            if live.serial not in in_hand:
                continue
            live.strikes = 1 if live.made_progress else live.strikes + 1
            if live.strikes >= PROOF_STRIKES:
                del self.live[wire_id]
                self._convict(live, how)

    def back(self) -> None:
        """A new engine is ready: submit what is alive, suspects one after the other."""
        going_on = []
        for live in self.live.values():
            if live.strikes >= SUSPECT_STRIKES:
                self._suspects.append(live)
            else:
                going_on.append(live)
        self.num_resumed += len(self.live)
        if going_on:
            self._submit([live.resumed() for live in going_on])
        self.try_next()

    def try_next(self) -> None:
        """Submit the next suspect: the one on trial got a token, or is gone."""
        self.on_trial = self._suspects.popleft() if self._suspects else None
        if self.on_trial is not None:
            self._submit([self.on_trial.resumed()])

    def leave(self, wire_id: str) -> Live | None:
        """Its stream is over; None if it was not alive."""
        live = self.live.pop(wire_id, None)
        if live is None:
            return None
        if live is self.on_trial:
            self.try_next()
        elif live in self._suspects:
            self._suspects.remove(live)
        return live

    def fail_all(self, error: EngineError) -> None:
        """Nothing goes on."""
        self.on_trial = None
        self._suspects.clear()
        lives, self.live = self.live, {}
        for live in lives.values():
            live.stream.fail(error)

    def _convict(self, live: Live, how: str) -> None:
        live.stream.fail(
            EngineError(
                f"the engine died {live.strikes} times while it computed this request, the last "
                f"time ({how}) with no other suspect; it is not tried again. Other requests went "
                "on; if this one is valid, please report it with the engine's log",
                code="request_kills_engine",
            )
        )
        for use in live.request.adapters:
            self._convictions[use.digest] += 1
            if self._convictions[use.digest] >= QUARANTINE_CONVICTIONS:
                self.quarantined[use.digest] = (
                    f"adapter {use.digest[:12]} is in quarantine: the engine died of "
                    f"{self._convictions[use.digest]} requests for it; an explicit load lifts it"
                )
