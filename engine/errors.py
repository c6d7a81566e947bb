"""The engine's errors.

EngineError
 +-- InvalidRequest        the caller's fault: over-long prompt, bad sampling value
 +-- AdapterUnavailable    the named adapter cannot be made resident (missing, broken, too large)
 +-- QueueFull             too many requests wait already
 +-- ModelError            this model, or this size of it, cannot be served here
 +-- EngineDead            the engine process is gone or restarting
 +-- EngineBroken          steps fail for good; inside the engine process, which ends by it

Every error has a stable `code` (see `code` of each class); HTTP statuses are
`platform/errors.py`'s business.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of everything the engine reports to its callers. `code` is stable and
    machine-readable.
    """

    code = "engine_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class InvalidRequest(EngineError):
    code = "invalid_request"


class AdapterUnavailable(EngineError):
    code = "adapter_unavailable"


class AdapterInUse(EngineError):
    code = "adapter_in_use"


class QueueFull(EngineError):
    code = "queue_full"


class ModelError(EngineError):
    code = "model_unsupported"


class EngineDead(EngineError):
    code = "engine_unavailable"


class EngineBroken(EngineError):
    code = "engine_broken"
