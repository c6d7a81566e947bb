"""The set-up of the logs: an event name and its fields per line, for people or for machines.

Modules log with `logging.getLogger(__name__)` and `extra={...}`: lengths, never prompts or keys.
"""

from __future__ import annotations

import json
import logging
from typing import Any, Literal

from loraplex.platform.envelope import REQUEST_ID

_PLAIN_FIELDS = frozenset(
    {*logging.LogRecord("", 0, "", 0, "", (), None).__dict__, "message", "asctime", "taskName"}
)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    request_id = REQUEST_ID.get()
    return ({} if request_id is None else {"request_id": request_id}) | {
        key: value
        for key, value in record.__dict__.items()
        if key not in _PLAIN_FIELDS and key != "color_message" and value is not None
    }


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`12:30:01 INFO  request adapter=sql@3 output_tokens=12`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        fields = " ".join(f"{key}={value}" for key, value in _extra(record).items() if value != "")
        return f"{line} {fields}" if fields else line


def setup_logging(level: str, fmt: Literal["text", "json"]) -> None:
    """Send all logs to stderr. Called by the CLI only, before the server starts."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if fmt == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)  # we log one line per request
    for noisy in ("alembic", "aiosqlite", "sqlalchemy", "python_multipart", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
