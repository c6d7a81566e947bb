"""How messages of `engine/api.py` travel between the two processes: launch order, sockets, bytes,
errors.

Two one-way ZeroMQ sockets in a private directory. Both sides connect or bind with no limit on
queued messages: neither process ever blocks on the other, and what can pile up is bounded by the
requests alive.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import zmq

from loraplex.engine import errors
from loraplex.engine.api import ErrorInfo, FromEngine, ToEngine
from loraplex.engine.config import EngineConfig


class LaunchOrder(msgspec.Struct, frozen=True):
    """The one line of JSON that the engine process reads from its standard input.

    The input then stays open for as long as the parent lives: its end means that the parent is
    gone.
    """

    factory: str  # "module:function" that builds the engine
    config: EngineConfig
    to_engine: str  # ZeroMQ endpoints, bound by the parent
    from_engine: str
    record: Path  # of `flight_recorder.py`
    parent_pid: int


def encode_order(order: LaunchOrder) -> bytes:
    return msgspec.json.encode(order, enc_hook=str) + b"\n"


def decode_order(line: bytes) -> LaunchOrder:
    return msgspec.json.decode(line, type=LaunchOrder, dec_hook=_path)


def _path(kind: type[Any], value: Any) -> Any:
    assert kind is Path, f"no way to read a {kind}"
    return Path(value)


encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.LINGER, 0)
    return socket


_CLASSES: dict[str, type[errors.EngineError]] = {
    kind.code: kind
    for kind in (
        errors.EngineError,
        errors.InvalidRequest,
        errors.AdapterUnavailable,
        errors.AdapterInUse,
        errors.QueueFull,
        errors.ModelError,
        errors.EngineDead,
    )
}


def error_to_wire(error: errors.EngineError) -> ErrorInfo:
    return ErrorInfo(error.code, error.message, type(error).code)


def error_from_wire(info: ErrorInfo) -> errors.EngineError:
    """The exception that the engine meant: its class by `kind` (or by `code`), its code kept."""
    kind = _CLASSES.get(info.kind) or _CLASSES.get(info.code) or errors.EngineError
    return kind(info.message, code=info.code)
