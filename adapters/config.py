"""PEFT's `adapter_config.json`, read closed: every key is used, known to be harmless, or refused.

The source of truth is peft 0.21 (`tuners/lora/config.py`); tests/adapters compares with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from loraplex.adapters import strict_json
from loraplex.adapters.adapter_config import AdapterConfig
from loraplex.adapters.config_keys import (
    HARMLESS,
    PLAIN_INITS,
    REFUSED,
    REWRITES_BASE,
    USED,
)
from loraplex.adapters.errors import AdapterRefused, Problem
from loraplex.adapters.limits import Limits
from loraplex.adapters.manifest import CONFIG_FILE
from loraplex.adapters.patterns import Pattern, PatternError, is_plain, tail_matcher
from loraplex.adapters.targets import ALL_LINEAR, Targets

MAX_RANK = 4096  # beyond this it is a typing error; `Limits.max_rank` says what a server takes
MAX_ALPHA = 1e6
MAX_ENTRIES = 4096  # of target_modules, rank_pattern...
MAX_SAVED = 512  # of modules_to_save
MAX_TOKEN_MODULES = 16  # of trainable_token_indices
MAX_REGEX_KEYS = 64  # of a pattern table that need the automaton
MAX_INVOCATION_TOKENS = 1024
MAX_TOKEN_ID = 2**31 - 1

BIASES = ("none", "all", "lora_only")

_PLAIN_NAME = re.compile(r"[\w.]+", re.ASCII)
_Number = TypeVar("_Number", int, float)


def read_config(
    raw: bytes | dict[str, Any], limits: Limits | None = None
) -> tuple[AdapterConfig | None, list[Problem]]:
    """Read as much as can be understood, and tell everything that is wrong.

    A config that comes with problems must not be served; it lets the tensors be checked as well.
    """
    limits = limits or Limits()
    if isinstance(raw, bytes):
        if len(raw) > limits.max_config_bytes:
            message = f"the config exceeds the limit of {limits.max_config_bytes} bytes"
            return None, [_problem("config_too_large", message)]
        try:
            raw = strict_json.loads(raw)
        except ValueError as error:
            return None, [_problem("config_not_json", f"the config is not valid JSON: {error}")]
    if not isinstance(raw, dict):
        return None, [_problem("config_invalid", "the config must be a JSON object")]
    reader = _Reader(raw)
    reader.check_features()
    return reader.config(), reader.problems


def parse_config(raw: bytes | dict[str, Any], limits: Limits | None = None) -> AdapterConfig:
    """Raises: AdapterRefused with every problem of the file."""
    config, problems = read_config(raw, limits)
    if problems:
        raise AdapterRefused(problems)
    assert config is not None, "no config and no reason"
    return config


class _Reader:
    """Takes the values out of a parsed file and collects what is wrong with them."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.problems: list[Problem] = []

    def refuse(self, code: str, message: str, **more: str) -> None:
        self.problems.append(_problem(code, message, **more))

    def check_features(self) -> None:
        """Refuse what would be served wrongly."""
        self._must_be("peft_type", "LORA")
        self._must_be("task_type", "CAUSAL_LM", None, "")
        self._check_init(self.raw.get("init_lora_weights"))
        for key, value in self.raw.items():
            if key in USED or key in HARMLESS or _is_off(value):
                continue
            if key in REFUSED:
                message = f"{key} = {_quote(value)} is not supported: {REFUSED[key]}"
                self.refuse("feature_unsupported", message)
            else:
                self.refuse(
                    "key_unknown",
                    f"unknown key {_quote(key)} = {_quote(value)}: it may change what the adapter "
                    "computes; remove it if it does not",
                )

    def _must_be(self, key: str, *allowed: str | None) -> None:
        value = self.raw.get(key)
        if value not in allowed:
            self.refuse(
                f"{key}_unsupported",
                f"{key} is {_quote(value)}, only {allowed[0]} adapters can be served",
                expected=str(allowed[0]),
                actual=_quote(value),
            )

    def _check_init(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            return
        name = value.lower() if isinstance(value, str) else ""
        if name.startswith(REWRITES_BASE):
            self.refuse(
                "feature_unsupported",
                f"init_lora_weights = {_quote(value)} trains against changed base weights; convert "
                "with save_pretrained(..., path_initial_model_for_weight_conversion=...)",
            )
        elif name not in PLAIN_INITS:
            self.refuse("init_unknown", f"unknown init_lora_weights {_quote(value)}")

    def config(self) -> AdapterConfig | None:
        """None if a value that says what the adapter is cannot be understood."""
        known = len(self.problems)
        r = self._rank("r", self.raw.get("r", 8))  # PEFT's defaults
        alpha = self._alpha("lora_alpha", self.raw.get("lora_alpha", 8))
        rslora = self._switch("use_rslora")
        targets = self._targets()
        ranks = self._table("rank_pattern", self._rank)
        alphas = self._table("alpha_pattern", self._alpha)
        invocation_tokens = self._invocation_tokens()
        bias = self.raw.get("bias") or "none"
        if bias not in BIASES:
            self._invalid("bias", f"one of {', '.join(BIASES)}", bias)
        dora = self._switch("use_dora")
        lora_bias = self._switch("lora_bias")
        self._check_combination(dora, lora_bias)
        ties = self._switch("ensure_weight_tying")
        saved = self._saved()
        token_ids = self._token_ids()
        base = self.raw.get("base_model_name_or_path")
        if len(self.problems) > known or r is None or alpha is None:
            return None
        return AdapterConfig(
            r=r,
            lora_alpha=alpha,
            use_rslora=rslora,
            targets=targets,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            base_model=base if isinstance(base, str) and base else None,
            invocation_tokens=invocation_tokens,
            use_dora=dora,
            lora_bias=lora_bias,
            bias=bias,
            modules_to_save=saved,
            token_ids=token_ids,
            ensure_weight_tying=ties,
        )

    def _check_combination(self, dora: bool, lora_bias: bool) -> None:
        """PEFT makes no adapter with these together, so there is none to compare with."""
        init = self.raw.get("init_lora_weights")
        if dora and (self.raw.get("velora_config") or str(init).lower() == "mica"):
            self._invalid("use_dora", "false with MiCA or VeLoRA", dora)
        if lora_bias and (dora or isinstance(init, str)):
            self._invalid("lora_bias", "false with use_dora or an initialisation", lora_bias)

    def _switch(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            self._invalid(key, "true or false", value)
        return value is True

    def _rank(self, key: str, value: Any) -> int | None:
        # `type`, since true is an int to Python and a rank to nobody.
        if type(value) is int and 1 <= value <= MAX_RANK:
            return value
        message = f"{key} must be a whole number from 1 to {MAX_RANK}, not {_quote(value)}"
        self.refuse("rank_invalid", message)
        return None

    def _alpha(self, key: str, value: Any) -> float | None:
        if type(value) in (int, float) and 0 < abs(value) <= MAX_ALPHA:
            return float(value)
        message = f"{key} must be a number, not 0, at most {MAX_ALPHA:g}; it is {_quote(value)}"
        self.refuse("alpha_invalid", message)
        return None

    def _invocation_tokens(self) -> tuple[int, ...]:
        value: Any = self.raw.get("alora_invocation_tokens")
        if _is_off(value):
            return ()
        if (
            isinstance(value, list)
            and len(value) <= MAX_INVOCATION_TOKENS
            and all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in value)
        ):
            return tuple(value)
        must = f"a list of at most {MAX_INVOCATION_TOKENS} token ids"
        self._invalid("alora_invocation_tokens", must, value)
        return ()

    def _targets(self) -> Targets:
        modules = self._modules("target_modules")
        if not modules:
            message = "target_modules is empty: the adapter would change nothing"
            self.refuse("no_target", message)
        layers = self._layers()
        names = self._layer_names()
        if layers is not None and isinstance(modules, str):
            self._invalid("target_modules", "a list where layers_to_transform is set", modules)
        if names and layers is None:
            self._invalid("layers_to_transform", "set where layers_pattern is", None)
        return Targets(
            modules=modules,
            exclude=self._modules("exclude_modules"),
            layers=layers or (),
            layer_names=names,
        )

    def _modules(self, key: str) -> str | tuple[str, ...]:
        value = self.raw.get(key)
        if value is None:
            return ()
        if isinstance(value, str):
            if key == "target_modules" and value.lower() == ALL_LINEAR:
                return ALL_LINEAR
            self._check_pattern(key, value, Pattern)
            return value
        if not _is_names(value):
            self._invalid(key, "a list of module names or one regular expression", value)
            return ("?",)
        return tuple(value)

    def _saved(self) -> tuple[str, ...]:
        value = self.raw.get("modules_to_save") or []
        plain = _is_names(value) and all(_PLAIN_NAME.fullmatch(name) for name in value)
        if not plain or len(value) > MAX_SAVED:
            self._invalid("modules_to_save", f"a list of at most {MAX_SAVED} module names", value)
            return ()
        return tuple(value)

    def _token_ids(self) -> dict[str | None, tuple[int, ...]]:
        value = self.raw.get("trainable_token_indices")
        if value is None or value in ([], {}):
            return {}
        entries = value if isinstance(value, dict) else {None: value}
        if len(entries) > MAX_TOKEN_MODULES or not all(map(_are_tokens, entries.values())):
            must = "different token ids, or an object of such lists by module"
            self._invalid("trainable_token_indices", must, value)
            return {}
        return {name: tuple(ids) for name, ids in entries.items()}

    def _layers(self) -> tuple[int, ...] | None:
        value = self.raw.get("layers_to_transform")
        if value is None:
            return None
        layers = value if isinstance(value, list) else [value]
        if len(layers) > MAX_ENTRIES or not all(type(v) is int and v >= 0 for v in layers):
            self._invalid("layers_to_transform", "layer numbers", value)
            return ()
        return tuple(layers)

    def _layer_names(self) -> tuple[str, ...]:
        value = self.raw.get("layers_pattern") or []
        names = [value] if isinstance(value, str) else value
        if not _is_names(names) or not all(_PLAIN_NAME.fullmatch(name) for name in names):
            self._invalid("layers_pattern", "names such as layers", value)
            return ()
        return tuple(names)

    def _table(self, key: str, read: Callable[[str, Any], _Number | None]) -> dict[str, _Number]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
            self._invalid(key, f"an object of at most {MAX_ENTRIES} module names", value)
            return {}
        if sum(not is_plain(name) for name in value) > MAX_REGEX_KEYS:
            self._invalid(key, f"limited to {MAX_REGEX_KEYS} regular expressions", value)
            return {}
        table = {}
        for name, entry in value.items():
            self._check_pattern(key, name, tail_matcher)
            number = read(f"{key}[{_quote(name)}]", entry)
            if number is not None:
                table[name] = number
        return table

    def _check_pattern(self, key: str, source: str, compiler: Callable[[str], object]) -> None:
        try:
            compiler(source)
        except PatternError as error:
            self.refuse("pattern_invalid", f"{key}: {_quote(source)}: {error}")

    def _invalid(self, key: str, must: str, value: Any) -> None:
        self.refuse("value_invalid", f"{key} must be {must}; it is {_quote(value)}")


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_ENTRIES
        and all(isinstance(name, str) and 0 < len(name) <= 512 for name in value)
    )


def _are_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(type(token) is int and 0 <= token < 1 << 31 for token in value)
        and len(set(value)) == len(value)
    )


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _problem(code: str, message: str, **more: str) -> Problem:
    return Problem(code, message, file=CONFIG_FILE, **more)
