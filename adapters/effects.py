"""What a PEFT config changes in a given base model: which modules, in which of PEFT's ways.

The rules are peft 0.21's: `utils/other.py` (`_set_trainable`, `set_additional_trainable_modules`)
for modules_to_save and trainable tokens, `tuners/tuners_utils.py` for tied weights. Knows nothing
of tensors; `validation.py` compares with those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loraplex.adapters.adapter_config import AdapterConfig, ModuleLora
from loraplex.adapters.errors import AdapterRefused, Problem
from loraplex.adapters.manifest import CONFIG_FILE
from loraplex.adapters.module_shape import EMBEDDING, HEAD, ModuleShape, containers, names_table


@dataclass(frozen=True, slots=True)
class Effects:
    """loras: by path of module. saved: paths of modules that the adapter's own stand for, with
    weight and bias. token_ids: rows of the embedding that are replaced, in the file's order.
    tied: whether the base model's head is tied to its embedding.
    """

    loras: dict[str, ModuleLora] = field(default_factory=dict)
    saved: frozenset[str] = frozenset()
    token_ids: tuple[int, ...] = ()
    tied: bool = False
    shares_lora: bool = False  # ensure_weight_tying: the embedding's LoRA is the head's, transposed


def resolve(config: AdapterConfig, modules: Sequence[ModuleShape]) -> Effects:
    """Raises: AdapterRefused with all that means nothing here, conflicts, or is not served."""
    head = next((m for m in modules if m.kind == "head"), None)
    tied = head is not None and head.tied
    problems: list[Problem] = []
    keeps = list(config.modules_to_save)
    ties_saved = config.ensure_weight_tying and tied and any(map(names_table, keeps))
    if ties_saved:
        keeps = [name for name in keeps if not _within([name])(HEAD)] + [EMBEDDING]
    saved = _saved(keeps, modules, problems) | ({EMBEDDING, HEAD} if ties_saved else set())
    shares_lora = (
        config.ensure_weight_tying and tied and not ties_saved and config.targets.names_tables
    )
    loras: dict[str, ModuleLora] = {}
    try:
        more = (EMBEDDING, HEAD) if shares_lora else ()
        loras = config.resolve(modules, _within(keeps), more)
    except AdapterRefused as refused:
        problems += refused.problems
    if beyond := sorted(m.path for m in modules if m.kind == "qk_norm" and m.path in saved):
        message = (
            f"modules_to_save selects {beyond[0]}; norms of queries and keys cannot be replaced"
        )
        problems.append(_unsupported(message))
    for path in sorted(saved & loras.keys()):
        problems.append(_conflict(path, "is in modules_to_save and has LoRA"))
    for path in {EMBEDDING, HEAD} & loras.keys():
        for key, on in (("use_dora", config.use_dora), ("lora_bias", config.lora_bias)):
            if on:
                problems.append(_unsupported(f"{key} on {path} is not supported; retrain without"))
    token_ids = _token_ids(config, modules, problems)
    if token_ids:
        by_saving = {EMBEDDING, HEAD} if tied else {EMBEDDING}
        for path in sorted((saved & by_saving) | ({EMBEDDING} & loras.keys())):
            problems.append(_conflict(path, "has trained tokens and is adapted in another way"))
    if problems:
        raise AdapterRefused(problems)
    return Effects(loras, frozenset(saved), token_ids, tied, shares_lora)


def _saved(
    names: Sequence[str], modules: Sequence[ModuleShape], problems: list[Problem]
) -> set[str]:
    """What modules_to_save names: by the end of a path, whether or not a dot stands before it."""
    around = containers(modules)
    innermost = [c for c in around if not any(other.startswith(f"{c}.") for other in around)]
    saved: set[str] = set()
    for name in names:
        hit = [c for c in around if c.endswith(name)]
        beyond = [c for c in hit if c not in innermost]
        within = tuple(f"{c}." for c in hit)
        paths = {m.path for m in modules if m.path.endswith(name) or m.path.startswith(within)}
        if beyond:
            message = (
                f"modules_to_save: {name[:80]!r} selects {beyond[0]}, which holds whole layers"
            )
            problems.append(_unsupported(f"{message}; name the modules in it"))
        elif not paths:
            message = f"modules_to_save: {name[:80]!r} matches no module of this base model"
            problems.append(_problem("target_unmatched", message))
        saved |= paths
    return saved


def _token_ids(
    config: AdapterConfig, modules: Sequence[ModuleShape], problems: list[Problem]
) -> tuple[int, ...]:
    """The rows of the embedding; those of the head only go with it, where the two are tied."""
    tokens = config.token_ids
    if not tokens:
        return ()
    embedding = next((m for m in modules if m.kind == "embedding"), None)
    head = next((m for m in modules if m.kind == "head"), None)
    if embedding is None:
        problems.append(_problem("target_unmatched", "this base model's embedding is unknown"))
        return ()
    paths = [*containers(modules), *(m.path for m in modules)]
    ids = tokens.get(None, ())
    for name, of_name in tokens.items():
        hits = [EMBEDDING] if name is None else [path for path in paths if path.endswith(name)]
        if hits == [EMBEDDING]:
            ids = of_name
        elif hits != [HEAD]:
            message = f"trainable_token_indices: {str(name)[:80]!r} is not the embedding"
            problems.append(_problem("target_unmatched", message))
        elif head is None or not head.tied or list(tokens.values()) != [of_name, of_name]:
            problems.append(
                _unsupported(
                    "trainable_token_indices of lm_head are served only where it is tied to the "
                    "embedding and the same tokens are trained there"
                )
            )
    beyond = [token for token in ids if token >= embedding.in_features]
    if beyond:
        message = f"trainable_token_indices: token {beyond[0]} is not in this model's vocabulary"
        problems.append(
            _problem("token_unknown", message, expected=f"below {embedding.in_features}")
        )
    return ids


def _within(names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a path has one of these plain names in it, as whole parts between dots."""
    if not names:
        return lambda path: False
    regex = re.compile(rf"(^|.*\.)(?:{'|'.join(names)})($|\..*)")
    return lambda path: regex.match(path) is not None


def _conflict(path: str, how: str) -> Problem:
    return _problem("module_conflict", f"{path} {how}; one of the two must go")


def _unsupported(message: str) -> Problem:
    return _problem("feature_unsupported", message)


def _problem(code: str, message: str, **more: str) -> Problem:
    return Problem(code, message, file=CONFIG_FILE, **more)
