"""The engine as `process.py` wants it: errors become outputs, news is collected, close ends all.

Only translation; everything that decides is in `engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loraplex.engine import api
from loraplex.engine.engine import Engine, News
from loraplex.engine.errors import EngineBroken, EngineError

# How long to sleep with work that cannot run yet. The end of a load ends the sleep; this is how
# late the deadline of an order, or of a wait for room, may be noticed.
WAITING_POLL_S = 0.02


class HostedEngine:
    """on_close: ends what was started for the engine."""

    def __init__(self, engine: Engine, on_close: Callable[[], None]) -> None:
        self.engine = engine
        self._on_close = on_close
        self._refused: list[api.SequenceOutput] = []
        self._events: list[api.AdapterEvent] = []
        self._answers: list[api.Answer] = []
        self._is_new = False  # something came since the last step
        engine.on_news = self._note

    @property
    def on_wake(self) -> Callable[[], None]:
        return self.engine.on_wake

    @on_wake.setter
    def on_wake(self, wake: Callable[[], None]) -> None:
        self.engine.on_wake = wake

    @property
    def on_run(self) -> Callable[[list[str]], None]:
        return self.engine.on_run

    @on_run.setter
    def on_run(self, on_run: Callable[[list[str]], None]) -> None:
        self.engine.on_run = on_run

    @property
    def model(self) -> api.ModelInfo:
        return self.engine.model

    def add(self, request: api.GenerationRequest) -> None:
        self._is_new = True
        try:
            self.engine.add(request)
        except EngineError as error:
            info = api.ErrorInfo(error.code, error.message, type(error).code)
            self._refused.append(
                api.SequenceOutput(
                    request_id=request.request_id,
                    finish_reason=api.FinishReason.ERROR,
                    error=info,
                )
            )

    def cancel(self, request_ids: Sequence[str]) -> None:
        self._is_new = True
        for request_id in request_ids:
            self.engine.cancel(request_id)

    def call(self, call: api.Call) -> None:
        self._is_new = True
        self.engine.call(call)

    def step(self) -> list[api.SequenceOutput]:
        """Raises: EngineBroken when steps fail for good: the process is to end, and another will
        go on with the requests.
        """
        self._is_new = False
        refused, self._refused = self._refused, []
        outputs = self.engine.step()
        if self.engine.is_broken:
            raise EngineBroken("steps fail one after the other; see the errors above")
        return refused + outputs

    def idle_s(self) -> float | None:
        if self._refused:
            return 0.0
        if not self.engine.has_work():
            return None
        if self._is_new or self.engine.ran_last_step:
            return 0.0
        return WAITING_POLL_S

    def take_events(self) -> list[api.AdapterEvent]:
        events, self._events = self._events, []
        return events

    def take_answers(self) -> list[api.Answer]:
        answers, self._answers = self._answers, []
        return answers

    def memory(self) -> api.MemoryInfo:
        return self.engine.memory()

    def stats(self) -> api.EngineStats:
        return self.engine.stats()

    def close(self) -> None:
        self._on_close()

    def _note(self, news: News) -> None:
        if isinstance(news, api.Answer):
            self._answers.append(news)
        else:
            self._events.append(news)
