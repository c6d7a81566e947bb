"""Which modules of a base model a PEFT config means.

PEFT's rules (peft 0.21, `tuners/tuners_utils.py`, `check_target_module_exists`): a list of names
selects the paths that equal a name or end with it after a dot; a string is a regular expression
for the whole path; exclude_modules takes away by the same rules, modules_to_save by rules of its
own; layers_to_transform narrows a list. Stricter than PEFT in one way: a target that selects
nothing is an error, not silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.errors import AdapterRefused, Problem
from loraplex.adapters.manifest import CONFIG_FILE
from loraplex.adapters.module_shape import TABLE_NAMES, ModuleShape, containers, names_table
from loraplex.adapters.patterns import Pattern

ALL_LINEAR = "all-linear"

_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The selecting keys of a config. A str is a regular expression, or `ALL_LINEAR`."""

    modules: str | tuple[str, ...]
    exclude: str | tuple[str, ...] = ()  # empty = none
    layers: tuple[int, ...] = ()  # layers_to_transform; empty = all
    layer_names: tuple[str, ...] = ()  # layers_pattern; empty = any list of modules

    def canonical(self) -> dict[str, Any]:
        """One spelling of what they mean, for the digest."""
        return {
            "target_modules": _unordered(self.modules),
            "exclude_modules": _unordered(self.exclude),
            "layers_to_transform": sorted(set(self.layers)),
            "layers_pattern": list(self.layer_names),
        }

    @property
    def names_tables(self) -> bool:
        """Whether they name the embedding or the head, by PEFT's measure for tied weights."""
        if isinstance(self.modules, str):
            return any(map(_selector(self.modules), TABLE_NAMES))
        return any(map(names_table, self.modules))

    def select(
        self, modules: Sequence[ModuleShape], saved: Callable[[str], bool] = lambda path: False
    ) -> list[str]:
        """The paths of the adapted ones among the model's modules, in their order.

        saved: whether a path is taken out because modules_to_save names it.

        Raises: AdapterRefused if a target means nothing here, or something that cannot be adapted.
        """
        excluded = _selector(self.exclude)

        def free(path: str) -> bool:
            return not excluded(path) and not saved(path)

        linear = [m.path for m in modules if m.kind == "linear"]
        paths = linear if self.modules == ALL_LINEAR else [m.path for m in modules if _takes(m)]
        others = [m.path for m in modules if not _takes(m)] + containers(modules)
        problems = self._missed_targets(paths, others, free) + self._missed_layers(linear)
        if problems:
            raise AdapterRefused(problems)
        targeted = _chooser(self.modules)
        chosen = [p for p in paths if targeted(p) and self._in_layers(p) and free(p)]
        if not chosen:
            message = "the config selects no module: the adapter would change nothing"
            raise AdapterRefused([_problem("no_target", message)])
        return chosen

    def _in_layers(self, path: str) -> bool:
        # A target given by its whole path passes whatever its layer; so PEFT has it.
        return not self.layers or path in self.modules or self._layer(path) in self.layers

    def _layer(self, path: str) -> int | None:
        if not self.layer_names:
            match = _ANY_LAYER.match(path)
            return match and int(match["idx"])
        for name in self.layer_names:
            if match := re.match(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.", path):
                return int(match["idx"])
        return None

    def _missed_targets(
        self, paths: Sequence[str], others: Sequence[str], free: Callable[[str], bool]
    ) -> list[Problem]:
        """others: what no LoRA can be put around."""
        problems = []
        names = sorted({path.rpartition(".")[2] for path in paths})
        if isinstance(self.modules, str):
            chosen = _chooser(self.modules)
            found = {self.modules: [path for path in paths if chosen(path)]}
            wrong = {self.modules: [path for path in others if chosen(path)]}
            targets: tuple[str, ...] = (self.modules,)
        else:
            found, wrong, targets = _by_ending(paths), _by_ending(others), self.modules
        for target in targets:
            beyond = [path for path in wrong.get(target, ()) if free(path)]
            if beyond and target != ALL_LINEAR:
                problems.append(
                    _problem(
                        "target_unsupported",
                        f"target_modules: {target[:200]!r} selects {', '.join(beyond[:3])}, which "
                        "LoRA cannot adapt; name the linear modules only",
                    )
                )
            elif not found.get(target):
                problems.append(
                    _problem(
                        "target_unmatched",
                        f"target_modules: {target[:200]!r} matches no module of this base model",
                        expected=f"one of {', '.join(names)}",
                        actual=target[:200],
                    )
                )
        return problems

    def _missed_layers(self, paths: Sequence[str]) -> list[Problem]:
        there = {layer for path in paths if (layer := self._layer(path)) is not None}
        return [
            _problem(
                "layer_unmatched",
                f"layers_to_transform: this base model has no layer {layer}",
                expected=f"0 to {max(there)}" if there else "no layers of that name",
                actual=str(layer),
            )
            for layer in self.layers
            if layer not in there
        ]


def _by_ending(paths: Sequence[str]) -> dict[str, list[str]]:
    """The paths that equal a name or end with it after a dot, by all names that do so."""
    found: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")
        for start in range(len(parts)):
            found.setdefault(".".join(parts[start:]), []).append(path)
    return found


def _takes(module: ModuleShape) -> bool:
    """Whether PEFT puts LoRA around such a module."""
    return module.kind not in ("norm", "qk_norm")


def _chooser(target: str | tuple[str, ...]) -> Callable[[str], bool]:
    return (lambda path: True) if target == ALL_LINEAR else _selector(target)


def _selector(modules: str | tuple[str, ...]) -> Callable[[str], bool]:
    if isinstance(modules, str):
        return Pattern(modules).matches if modules else lambda path: False
    names = frozenset(modules)
    ends = tuple(f".{name}" for name in names)
    return lambda path: path in names or path.endswith(ends)


def _unordered(modules: str | tuple[str, ...]) -> str | list[str]:
    return modules if isinstance(modules, str) else sorted(set(modules))


def _problem(code: str, message: str, **more: str) -> Problem:
    return Problem(code, message, file=CONFIG_FILE, **more)
