"""PEFT's `adapter_config.json`, read closed: every key is used, known to be harmless, or refused by name.

The source of truth is peft 0.21, `tuners/lora/config.py` for the keys and `tuners/tuners_utils.py`
(`check_target_module_exists`), `utils/other.py` (`get_pattern_key`) for what they select; tests/adapters compares
with it. Scaling: alpha/r (2106.09685), or alpha/sqrt(r) for rsLoRA (2312.03732).

Knows which modules an adapter means; knows nothing of its tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from loraplex.adapters import strict_json
from loraplex.adapters.config_keys import (
    HARMLESS,
    OFF,
    PLAIN_INITS,
    REFUSED,
    REWRITES_BASE,
    USED,
)
from loraplex.adapters.errors import AdapterRefused, Problem
from loraplex.adapters.limits import Limits
from loraplex.adapters.manifest import CONFIG_FILE, ModuleShape
from loraplex.adapters.patterns import Pattern, PatternError, is_plain, tail_matcher

ALL_LINEAR = "all-linear"
MAX_RANK = 4096  # beyond this it is a typing error; `Limits.max_rank` says what a server takes
MAX_ALPHA = 1e6
MAX_ENTRIES = 4096  # of target_modules, rank_pattern...
MAX_REGEX_KEYS = 64  # of a pattern table that need the automaton

# Modules every causal LM has that adapters here cannot change: their names deserve a clear refusal.
UNADAPTABLE = ("lm_head", "model.embed_tokens")

_N = TypeVar("_N", int, float)

_LAYER_NAME = re.compile(r"[\w.]+", re.ASCII)
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@dataclass(frozen=True, slots=True)
class ModuleLora:
    """How one module is adapted. Its output gains `scaling * B A x`."""

    rank: int
    alpha: float
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The keys of the file that have a meaning at inference. A str of modules is a regular expression."""

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]  # empty = all
    layers_pattern: tuple[str, ...]  # empty = any list of layers
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    base_model: str | None

    @classmethod
    def parse(cls, raw: bytes | dict[str, Any], limits: Limits | None = None) -> AdapterConfig:
        """Raises: AdapterRefused with every problem of the file."""
        config, problems = read_config(raw, limits)
        if problems:
            raise AdapterRefused(problems)
        assert config is not None, "no config and no reason"
        return config

    @property
    def scaling(self) -> float:
        return self.scale(self.r, self.lora_alpha)

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def canonical(self) -> dict[str, Any]:
        """What of this config changes the adapter's meaning, in one spelling; goes into the digest."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "use_rslora": self.use_rslora,
            "target_modules": _unordered(self.target_modules),
            "exclude_modules": _unordered(self.exclude_modules),
            "layers_to_transform": sorted(set(self.layers_to_transform)),
            "layers_pattern": list(self.layers_pattern),
            # The first key that matches counts, so the order is part of the meaning.
            "rank_pattern": list(self.rank_pattern.items()),
            "alpha_pattern": list(self.alpha_pattern.items()),
        }

    def resolve(self, modules: Sequence[ModuleShape]) -> dict[str, ModuleLora]:
        """Which of the model's modules are adapted, and how: {path: ModuleLora}, in the model's order.

        modules: every linear module of the base model that can be adapted.

        Raises: AdapterRefused if a target means nothing in this model, or nothing that can be adapted.
        """
        paths = [m.path for m in modules]
        excluded = _selector(self.exclude_modules)
        problems = self._pointless_targets(paths, excluded)
        if problems:
            raise AdapterRefused(problems)
        targeted = _selector(self.target_modules)
        rank_keys = [(tail_matcher(key), rank) for key, rank in self.rank_pattern.items()]
        alpha_keys = [(tail_matcher(key), alpha) for key, alpha in self.alpha_pattern.items()]
        resolved = {}
        for path in paths:
            if targeted(path) and self._in_layers(path) and not excluded(path):
                # The first key that matches counts.
                rank = next((rank for hit, rank in rank_keys if hit(path)), self.r)
                alpha = next((alpha for hit, alpha in alpha_keys if hit(path)), self.lora_alpha)
                resolved[path] = ModuleLora(rank, alpha, self.scale(rank, alpha))
        if not resolved:
            raise AdapterRefused(
                [_problem("no_target", "this adapter changes no module of the base model")]
            )
        return resolved

    def _in_layers(self, path: str) -> bool:
        """Whether layers_to_transform lets this path through. A target given by its whole path always passes."""
        if not self.layers_to_transform or path in self.target_modules:
            return True
        return self._layer(path) in self.layers_to_transform

    def _layer(self, path: str) -> int | None:
        if not self.layers_pattern:
            match = _ANY_LAYER.match(path)
            return match and int(match["idx"])
        for name in self.layers_pattern:
            if match := re.match(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.", path):
                return int(match["idx"])
        return None

    def _pointless_targets(
        self, paths: list[str], excluded: Callable[[str], bool]
    ) -> list[Problem]:
        """Targets that PEFT would pass over in silence, or that we cannot adapt."""
        problems = []
        targets = self.target_modules
        rules = [(targets, targets)] if isinstance(targets, str) else [(t, (t,)) for t in targets]
        for target, rule in rules:
            chosen = _selector(rule)
            hits = [path for path in paths if chosen(path)]
            missed = [name for name in UNADAPTABLE if chosen(name) and not excluded(name)]
            if missed and target != ALL_LINEAR:
                problems.append(
                    _problem(
                        "target_unsupported",
                        f"target_modules: {_quote(target)} means {', '.join(missed)}, which cannot be "
                        "adapted yet; retrain without it",
                    )
                )
            elif not hits:
                names = sorted({path.rpartition(".")[2] for path in paths})
                problems.append(
                    _problem(
                        "target_unmatched",
                        f"target_modules: {_quote(target)} matches no module of this base model",
                        expected=f"one of {', '.join(names)}",
                        actual=_quote(target),
                    )
                )
        layers = {self._layer(path) for path in paths}
        for layer in self.layers_to_transform:
            if layer not in layers:
                problems.append(
                    _problem(
                        "layer_unmatched",
                        f"layers_to_transform: this base model has no layer {layer}",
                        expected=f"0 to {max((n for n in layers if n is not None), default=0)}",
                        actual=str(layer),
                    )
                )
        return problems


def read_config(
    raw: bytes | dict[str, Any], limits: Limits | None = None
) -> tuple[AdapterConfig | None, list[Problem]]:
    """Read as much as can be understood, and tell everything that is wrong.

    A config beside problems lets the tensors be checked against it all the same; it must not be served.
    """
    limits = limits or Limits()
    if isinstance(raw, bytes):
        if len(raw) > limits.max_config_bytes:
            message = f"{len(raw)} bytes exceed the limit of {limits.max_config_bytes}"
            return None, [_problem("config_too_large", message)]
        try:
            raw = strict_json.loads(raw)
        except ValueError as error:
            return None, [_problem("config_not_json", f"not valid JSON: {error}")]
    if not isinstance(raw, dict):
        return None, [_problem("config_invalid", "the file must hold a JSON object")]
    reader = _Reader(raw)
    reader.check_features()
    return reader.config(), reader.problems


class _Reader:
    """Takes the values out of a parsed file, collecting problems; a value with a problem is None."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.problems: list[Problem] = []

    def refuse(self, code: str, message: str, **more: str) -> None:
        self.problems.append(_problem(code, message, **more))

    def check_features(self) -> None:
        """Refuse what we would serve wrongly."""
        if self.raw.get("peft_type") != "LORA":
            self.refuse(
                "peft_type_unsupported",
                f"peft_type is {_quote(self.raw.get('peft_type'))}, only LORA is supported",
                expected="LORA",
                actual=_quote(self.raw.get("peft_type")),
            )
        if self.raw.get("task_type") not in (None, "", "CAUSAL_LM"):
            self.refuse(
                "task_type_unsupported",
                f"task_type is {_quote(self.raw['task_type'])}; only CAUSAL_LM adapters can be served",
                expected="CAUSAL_LM",
                actual=_quote(self.raw["task_type"]),
            )
        for key, value in self.raw.items():
            if key in USED or key in HARMLESS or _is_off(key, value):
                continue
            if key in REFUSED:
                self.refuse(
                    "feature_unsupported",
                    f"{key} = {_quote(value)} is not supported: {REFUSED[key]}",
                )
            else:
                self.refuse(
                    "key_unknown",
                    f"unknown key {_quote(key)} = {_quote(value)}: serving the adapter without knowing what it "
                    "means could give wrong answers; remove it if it does not matter",
                )
        self._check_init(self.raw.get("init_lora_weights"))

    def _check_init(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            return
        name = value.lower() if isinstance(value, str) else ""
        if name.startswith(REWRITES_BASE):
            self.refuse(
                "feature_unsupported",
                f"init_lora_weights = {_quote(value)} trained against changed base weights; save it as plain LoRA: "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
            )
        elif name not in PLAIN_INITS:
            self.refuse("init_unknown", f"unknown init_lora_weights {_quote(value)}")

    def config(self) -> AdapterConfig | None:
        """None if a value that says what the adapter is cannot be understood."""
        known = len(self.problems)
        r = self._rank("r", self.raw.get("r", 8))
        alpha = self._alpha("lora_alpha", self.raw.get("lora_alpha", 8))
        rslora = self.raw.get("use_rslora", False)
        if not isinstance(rslora, bool):
            self.refuse("value_invalid", f"use_rslora must be true or false, not {_quote(rslora)}")
        targets = self._modules("target_modules")
        if not targets:
            self.refuse("no_target", "target_modules is empty: the adapter would change nothing")
        excludes = self._modules("exclude_modules")
        layers = self._layers()
        layer_names = self._layer_names()
        if layers is not None and isinstance(targets, str):
            self.refuse(
                "value_invalid",
                "layers_to_transform needs target_modules to be a list, not a string",
            )
        if layer_names and layers is None:
            self.refuse("value_invalid", "layers_pattern is set but layers_to_transform is not")
        ranks = self._table("rank_pattern", self._rank)
        alphas = self._table("alpha_pattern", self._alpha)
        base = self.raw.get("base_model_name_or_path")
        if len(self.problems) > known or r is None or alpha is None:
            return None
        return AdapterConfig(
            r=r,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=targets,
            exclude_modules=excludes,
            layers_to_transform=layers or (),
            layers_pattern=layer_names,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            base_model=base if isinstance(base, str) and base else None,
        )

    def _rank(self, key: str, value: Any) -> int | None:
        # `type`, since true is an int to Python and a rank of 1 to nobody.
        if type(value) is int and 1 <= value <= MAX_RANK:
            return value
        self.refuse(
            "rank_invalid",
            f"{key} must be a whole number from 1 to {MAX_RANK}, not {_quote(value)}",
        )
        return None

    def _alpha(self, key: str, value: Any) -> float | None:
        if type(value) in (int, float) and 0 < abs(value) <= MAX_ALPHA:
            return float(value)
        self.refuse(
            "alpha_invalid",
            f"{key} must be a number other than 0, at most {MAX_ALPHA:g}, not {_quote(value)}",
        )
        return None

    def _modules(self, key: str) -> str | tuple[str, ...]:
        value = self.raw.get(key)
        if value is None:
            return ()
        if isinstance(value, str):
            if value.lower() == ALL_LINEAR and key == "target_modules":
                return ALL_LINEAR
            self._check_pattern(key, value, Pattern)
            return value
        if not _is_names(value):
            self.refuse(
                "value_invalid",
                f"{key} must be a list of at most {MAX_ENTRIES} module names or one regular expression, "
                f"not {_quote(value)}",
            )
            return ("?",)
        return tuple(value)

    def _layers(self) -> tuple[int, ...] | None:
        value = self.raw.get("layers_to_transform")
        if value is None:
            return None
        value = value if isinstance(value, list) else [value]
        if len(value) > MAX_ENTRIES or not all(type(v) is int and v >= 0 for v in value):
            self.refuse(
                "value_invalid",
                f"layers_to_transform must be layer numbers, not {_quote(value)}",
            )
            return ()
        return tuple(value)

    def _layer_names(self) -> tuple[str, ...]:
        value = self.raw.get("layers_pattern") or []
        names = [value] if isinstance(value, str) else value
        if not _is_names(names) or not all(_LAYER_NAME.fullmatch(name) for name in names):
            self.refuse(
                "value_invalid", f"layers_pattern must be names such as layers, not {_quote(value)}"
            )
            return ()
        return tuple(names)

    def _table(self, key: str, read: Callable[[str, Any], _N | None]) -> dict[str, _N]:
        value = self.raw.get(key) or {}
        regexes = [k for k in value if not is_plain(k)] if isinstance(value, dict) else []
        if not isinstance(value, dict) or len(value) > MAX_ENTRIES or len(regexes) > MAX_REGEX_KEYS:
            self.refuse(
                "value_invalid",
                f"{key} must map at most {MAX_ENTRIES} module names ({MAX_REGEX_KEYS} regular expressions) "
                f"to numbers, not {_quote(value)}",
            )
            return {}
        table = {}
        for name, entry in value.items():
            self._check_pattern(key, name, tail_matcher)
            number = read(f"{key}[{_quote(name)}]", entry)
            if number is not None:
                table[name] = number
        return table

    def _check_pattern(self, key: str, source: str, compile: Callable[[str], Any]) -> None:
        try:
            compile(source)
        except PatternError as error:
            self.refuse("pattern_invalid", f"{key}: {_quote(source)}: {error}")


def _is_off(key: str, value: Any) -> bool:
    return value is None or value is False or value in ("", OFF.get(key)) or value in ([], {})


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_ENTRIES
        and all(isinstance(name, str) and 0 < len(name) <= 512 for name in value)
    )


def _selector(modules: str | tuple[str, ...]) -> Callable[[str], bool]:
    """PEFT's rule: a string must match the whole path, a name the path or its end after a dot."""
    if modules == ALL_LINEAR:
        return lambda path: True
    if isinstance(modules, str):
        return Pattern(modules).matches if modules else lambda path: False
    names = frozenset(modules)
    ends = tuple(f".{name}" for name in names)
    return lambda path: path in names or path.endswith(ends)


def _unordered(modules: str | tuple[str, ...]) -> str | list[str]:
    return modules if isinstance(modules, str) else sorted(set(modules))


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _problem(code: str, message: str, **more: str) -> Problem:
    return Problem(code, message, file=CONFIG_FILE, **more)
