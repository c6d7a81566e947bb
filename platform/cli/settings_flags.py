"""Flags of `loraplex serve`, made from the Settings model: one flag per field, never out of step.

pydantic is the only judge of values: every flag but the switches arrives as text.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from loraplex.platform.cli.output import UsageError
from loraplex.platform.settings import ENV_PREFIX, Settings


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def with_settings_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give `function(given, **own)` a flag per setting; `given` receives those that were on the
    line.
    """
    own = [
        p
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.name != "given"
    ]

    def wrapper(**values: Any) -> Any:
        given = {n: values.pop(n) for n in Settings.model_fields}
        return function({n: v for n, v in given.items() if v not in (None, [])}, **values)

    made = [_parameter(name, field) for name, field in Settings.model_fields.items()]
    wrapper.__signature__ = inspect.Signature([*made, *own])  # type: ignore[attr-defined]
    wrapper.__name__ = function.__name__
    wrapper.__doc__ = function.__doc__
    return wrapper


def build_settings(given: dict[str, Any]) -> Settings:
    """Flags over environment over defaults. Raises: UsageError naming each wrong setting."""
    try:
        settings = Settings(**given)
        settings.engine_config()
    except ValidationError as error:
        problems = [_explain(dict(item), given) for item in error.errors()]
        if len(problems) == 1:
            raise UsageError(problems[0]) from None
        raise UsageError(f"{len(problems)} settings are wrong", problems) from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    return settings


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind, metavar = _kind(field.annotation)
    names = [flag(name) + (f"/--no-{name.replace('_', '-')}" if kind is bool else "")]
    option = typer.Option(*names, help=_help(field), metavar=metavar, show_default=False)
    # typer reads the annotation for the type, the Annotated part for everything else.
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    if field.is_required():
        return f"{text} [required]"
    if field.default in (None, ()):
        return text  # the description says what is chosen
    return f"{text} [default: {_plain(field.default)}]"


def _plain(value: object) -> str:
    """A default as the user would write it: `2GiB`, `on`."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        for unit, shift in (("GiB", 30), ("MiB", 20)):
            if value >= 1 << shift and value % (1 << shift) == 0:
                return f"{value >> shift}{unit}"
    return str(value)


def _kind(annotation: Any) -> tuple[Any, str | None]:
    """The type typer shall parse, and what to call the value in the help."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [a for a in get_args(annotation) if a is not type(None)]
        return _kind(inner[0])
    if annotation is bool:
        return bool, None
    if get_origin(annotation) is tuple:
        return list[str], "TEXT"
    if get_origin(annotation) is Literal:
        return str, "|".join(map(str, get_args(annotation)))
    names = {int: "N", float: "X", Path: "PATH"}
    return str, names.get(annotation, "TEXT")


def _explain(item: dict[str, Any], given: dict[str, Any]) -> str:
    """One pydantic error in words, named as the user wrote it: flag or variable."""
    name = str(item["loc"][0]) if item["loc"] else ""
    if item["type"] == "extra_forbidden":
        return f"{name} is not a setting; `loraplex serve --help` lists them"
    if item["type"] == "missing":
        return f"{flag(name)} is required (or {ENV_PREFIX}{name.upper()} in the environment)"
    where = flag(name) if name in given else f"{ENV_PREFIX}{name.upper()}"
    value = "" if name == "api_key" else f" {item['input']}"
    return f"{where}{value}: {str(item['msg']).removeprefix('Value error, ')}"
