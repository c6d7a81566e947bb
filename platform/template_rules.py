"""Whose chat templates may run, and for how long.

A template is a program. Jinja's sandbox keeps it from everything but its own data; it does not keep
it from eating memory, so templates of tenants run only where the operator says so. Time is bounded
for all that the base model does not bring.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from loraplex.platform.callers import ANONYMOUS, Caller
from loraplex.platform.errors import ApiError

T = TypeVar("T")

MAX_SECONDS = 5.0
WAY_OUT = "--tenant-templates on the server allows them"


def may_bring_template(caller: Caller, allowed: bool) -> bool:
    """allowed: the setting `tenant_templates`. Anonymous are those of a server without keys, also
    where it does for them what they ordered.
    """
    return allowed or caller.is_operator or caller.actor == ANONYMOUS


def check_may_bring_template(caller: Caller, allowed: bool, *, param: str) -> None:
    """Raises: ApiError(permission_denied)."""
    if not may_bring_template(caller, allowed):
        raise ApiError(
            "permission_denied",
            f"chat templates of tenants are not run here; {WAY_OUT}",
            param=param,
        )


class _Stop(BaseException):
    """Thrown into a template that takes too long; no `except Exception` on the way catches it."""


class TookTooLong(Exception):
    pass


async def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, which runs in a thread of its own and is ended at its next bytecode
    when the time is over.

    Raises: TookTooLong; whatever `work` raises.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[T] = loop.create_future()

    def tell(set_it: Callable[[], None]) -> None:
        if not ended.done():
            set_it()

    def run() -> None:
        with suppress(_Stop):
            try:
                result = work()
            except Exception as error:
                failed = error
                loop.call_soon_threadsafe(tell, lambda: ended.set_exception(failed))
            else:
                loop.call_soon_threadsafe(tell, lambda: ended.set_result(result))

    thread = threading.Thread(target=run, name="chat-template", daemon=True)
    thread.start()
    try:
        async with asyncio.timeout(seconds):
            return await ended
    except TimeoutError:
        raise TookTooLong from None
    finally:
        if ended.cancelled() and thread.ident is not None:  # too late, or the client hung up
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(_Stop)
            )
