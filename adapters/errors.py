"""The adapters' errors.

AdapterError
 +-- AdapterRefused      an upload is wrong; carries every Problem found
 +-- AdapterNotFound     no such digest in the store
 +-- AdapterCorrupt      the stored files are not what was stored
 +-- StorageFull         no room on the disk

Every error has a stable `code`; HTTP statuses are `platform/errors.py`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_PROBLEMS = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with an upload. `code` is stable, `message` is for a person.

    `expected` and `actual` are short texts (a shape, a dtype, a number) where it is a mismatch.
    """

    code: str
    message: str
    file: str | None = None
    tensor: str | None = None
    expected: str | None = None
    actual: str | None = None

    def to_dict(self) -> dict[str, str]:
        """The fields that are set, for JSON."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in fields.items() if value is not None}


class AdapterError(Exception):
    """Base of everything this layer reports to its callers."""

    code = "adapter_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class AdapterRefused(AdapterError):
    """An adapter that must not be served. `problems` holds what was found, in order, never empty.

    A broken file may have a problem in each of 60,000 tensors; the first hundred tell as much.
    """

    code = "adapter_refused"

    def __init__(self, problems: Iterable[Problem]) -> None:
        found = list(problems)
        assert found, "refused without a reason"
        if len(found) > MAX_PROBLEMS:
            more = Problem("more_problems", f"and {len(found) - MAX_PROBLEMS} more problems")
            found = [*found[:MAX_PROBLEMS], more]
        self.problems = tuple(found)
        rest = len(found) - 1
        super().__init__(found[0].message + (f" (and {rest} more)" if rest else ""))


class AdapterNotFound(AdapterError):
    code = "adapter_not_found"


class AdapterCorrupt(AdapterError):
    code = "adapter_corrupt"


class StorageFull(AdapterError):
    code = "storage_full"
