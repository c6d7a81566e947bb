"""Which key may call which route: one table, read before any body is.

A route that no rule names takes an operator's admin key; a test holds every route of the app
against the table. What a caller may then see of the registry is decided in the queries
(`repositories.py`), which know whose each adapter is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from loraplex.platform.callers import ALL_SCOPES, Caller, Scope


@dataclass(frozen=True, slots=True)
class Rule:
    """Any one of `scopes` is enough. `open`: without a key. `operator`: not for tenants' keys."""

    methods: frozenset[str]
    path: re.Pattern[str]
    scopes: frozenset[Scope]
    open: bool = False
    operator: bool = False

    def admits(self, caller: Caller) -> bool:
        return bool(self.scopes & caller.scopes) and (caller.is_operator or not self.operator)


def _rule(
    methods: str, path: str, *scopes: Scope, open: bool = False, operator: bool = False
) -> Rule:
    return Rule(frozenset(methods.split()), re.compile(path), frozenset(scopes), open, operator)


_ANY = tuple(ALL_SCOPES)
_ALL_METHODS = "GET POST PUT PATCH DELETE"

RULES: tuple[Rule, ...] = (
    _rule("GET", r"/(healthz|readyz|version|docs|openapi\.json|health|ping)", open=True),
    # Tells of all tenants.
    _rule("GET", r"/(metrics|load)", Scope.ADMIN, operator=True),
    _rule("GET", r"/v1/models(/.*)?", *_ANY),
    _rule("POST", r"/v1/(chat/)?completions", Scope.INFER),
    _rule("POST", r"/v1/embeddings", Scope.INFER),
    _rule("POST", r"(/v1)?/(de)?tokenize", Scope.INFER),
    _rule("POST", r"/|/generate|/generate_stream", Scope.INFER),
    _rule("GET", r"/info", *_ANY),
    _rule("POST", r"(/v1)?/(un)?load_lora_adapter", Scope.UPLOAD),
    # The weights themselves are not for those who may only ask.
    _rule("GET", r"/v1/adapters/[^/]+/download", Scope.UPLOAD),
    _rule("GET", r"/v1/adapters(/.*)?", *_ANY),
    _rule("POST PUT PATCH DELETE", r"/v1/adapters(/.*)?", Scope.UPLOAD),
    _rule("GET", r"/v1/usage", *_ANY),
    _rule(_ALL_METHODS, r"/v1/admin/(memory|tenants(/.*)?)", Scope.ADMIN, operator=True),
    _rule("POST", r"/v1/admin/adapters/[^/]+/(un)?pin", Scope.ADMIN, operator=True),
    _rule(_ALL_METHODS, r"/v1/admin/.+", Scope.ADMIN),
)

UNKNOWN = _rule("", "", Scope.ADMIN, operator=True)


def rule_of(method: str, path: str) -> Rule:
    """`UNKNOWN` where no rule names the route."""
    method = "GET" if method == "HEAD" else method
    for rule in RULES:
        if method in rule.methods and rule.path.fullmatch(path):
            return rule
    return UNKNOWN
