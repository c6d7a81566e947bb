"""`Struct` and `Raw` of msgspec, or stand-ins on a machine that does not have it.

A bare GPU machine can then run the model runner and its benches, which pass these objects around
but send them nowhere. The stand-ins know the same class arguments and cannot be encoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msgspec import Raw, Struct
else:
    try:
        from msgspec import Raw, Struct
    except ImportError:
        from dataclasses import dataclass, field

        Raw = bytes

        class Struct:
            def __init_subclass__(
                cls, *, frozen=False, kw_only=False, tag=None, array_like=False, omit_defaults=False
            ):
                for name, value in vars(cls).copy().items():
                    if isinstance(value, list | dict) and name in cls.__annotations__:
                        setattr(cls, name, field(default_factory=value.copy))
                dataclass(frozen=frozen, kw_only=kw_only)(cls)


__all__ = ["Raw", "Struct"]
