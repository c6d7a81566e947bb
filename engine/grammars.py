"""Grammars that outputs must follow, over the library llguidance: text -> compiled -> matcher.

The library walks a grammar lazily with an Earley parser over regular-expression derivatives, so
there is no table that a hostile grammar could blow up; what remains is bounded by `_limits`. It is
imported with the first grammar. Everything here is slow or may be: it runs in the workers of
`constraints.py`, whose stacks are large, since the library recurses along chains of references.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np

from loraplex.engine.api import Grammar, GrammarKind, ModelInfo
from loraplex.engine.errors import InvalidRequest

Mask = np.ndarray[tuple[int], np.dtype[np.uint32]]  # bit i of word w: token 32 * w + i is allowed

# A grammar is refused above 64 KiB (validation.py). Within that, on a core of 2026: nothing found
# takes over a second to compile, 0.3 s for its worst mask, 75 MB, or 60 MB of stack.
STACK_BYTES = 512 << 20  # reserved, not used: pages come as they are touched
_MAX_SYMBOLS = 50_000
_MAX_LEXER_STATES = 20_000  # 1 to 2 kB each
_MASK_LEXER_FUEL = 100_000  # about 7 ms
_MASK_ITEMS = 25_000  # about 2 ms

# Between JSON's tokens: nothing, a space, or a new line with its indentation. Models that are
# allowed more write white space without end.
JSON_WHITESPACE = r" |\n[ \t]{0,40}"


class Matcher(Protocol):
    """Where one sequence stands in its grammar."""

    def accept(self, token_id: int) -> None:
        """The sequence got this token. Raises: InvalidRequest when it may not stand here."""
        ...

    def mask(self) -> Mask:
        """The tokens that may come next, a fresh array; eos is among them where the output is
        complete. Never empty.

        Raises: InvalidRequest when the grammar is too complex here, or admits nothing.
        """
        ...


class CompiledGrammar(Protocol):
    def start(self) -> Matcher:
        """At the beginning of an output."""
        ...


class GrammarCompiler(Protocol):
    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Raises: InvalidRequest when the grammar is wrong, unsupported or too large."""
        ...


class GuidanceCompiler:
    """Compiles for one model's tokenizer."""

    def __init__(self, model: ModelInfo) -> None:
        self._model = model
        self._tokenizer: Any = None

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        library = _library()
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer(library)
        try:
            text = _to_library(library, grammar)
        except (ValueError, RecursionError) as error:
            raise _invalid(grammar, str(error)) from None
        matcher = library.LLMatcher(self._tokenizer, text, log_level=0, limits=_limits(library))
        if matcher.is_error():
            raise _invalid(grammar, matcher.get_error())
        return _Compiled(matcher, grammar, self._model.vocab_size)

    def _make_tokenizer(self, library: Any) -> Any:
        """Raises: InvalidRequest when the model has no eos token, or a tokenizer that is no map
        from tokens to bytes.
        """
        model = self._model
        if not model.eos_token_ids:
            raise InvalidRequest(
                "this model has no end-of-sequence token, without which an output that follows a "
                "grammar cannot end; add eos_token_id to its config.json",
                code="unsupported_parameter",
            )
        try:
            return _tokenizer(library, model)
        except (ValueError, TypeError) as error:
            raise InvalidRequest(
                f"structured outputs do not work with this model's tokenizer: {error}",
                code="unsupported_parameter",
            ) from error


class _Compiled:
    """The first mask is made here: many grammars show only then that they are too complex."""

    def __init__(self, matcher: Any, grammar: Grammar, vocab_size: int) -> None:
        self._first = _GuidanceMatcher(matcher, grammar, vocab_size)
        self._first.mask()

    def start(self) -> Matcher:
        return self._first.copy()


class _GuidanceMatcher:
    def __init__(self, matcher: Any, grammar: Grammar, vocab_size: int) -> None:
        self._matcher = matcher
        self._grammar = grammar
        self._vocab_size = vocab_size

    def copy(self) -> _GuidanceMatcher:
        return _GuidanceMatcher(self._matcher.deep_copy(), self._grammar, self._vocab_size)

    def accept(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise _invalid(self._grammar, self._matcher.get_error())

    def mask(self) -> Mask:
        num_words = -(-self._vocab_size // 32)
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype="<u4")[:num_words].copy()
        if self._matcher.is_error():
            raise _invalid(self._grammar, self._matcher.get_error())
        if self._vocab_size % 32:  # the tokenizer may know more tokens than the model
            words[-1] &= np.uint32((1 << self._vocab_size % 32) - 1)
        if not words.any():
            raise _invalid(self._grammar, "no token of this model can go on here")
        return words


def _library() -> Any:
    """Raises: InvalidRequest where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise InvalidRequest(
            "structured outputs need the Python package llguidance, which this server lacks; "
            "install it with `pip install llguidance`",
            code="unsupported_parameter",
        ) from None
    return llguidance


def _limits(library: Any) -> Any:
    return library.LLParserLimits(
        max_grammar_size=_MAX_SYMBOLS,
        max_lexer_states=_MAX_LEXER_STATES,
        step_lexer_fuel=_MASK_LEXER_FUEL,
        step_max_items=_MASK_ITEMS,
        verbose_errors=False,
    )


def _tokenizer(library: Any, model: ModelInfo) -> Any:
    from tokenizers import Tokenizer

    raw = Tokenizer.from_str(model.tokenizer_json)
    raw.no_truncation()
    raw.no_padding()
    return library.LLTokenizer(
        raw.to_str(),
        n_vocab=max(model.vocab_size, raw.get_vocab_size(with_added_tokens=True)),
        eos_token=model.eos_token_ids,
    )


def _to_library(library: Any, grammar: Grammar) -> str:
    """The library's own form. Raises: ValueError."""
    text, matcher = grammar.text, library.LLMatcher
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            space = JSON_WHITESPACE if grammar.whitespace is None else grammar.whitespace
            options: dict[str, Any] = {"whitespace_flexible": bool(space)}
            if space:
                options["whitespace_pattern"] = space
            converted = matcher.grammar_from_json_schema(_as_object(text), overrides=options)
        case GrammarKind.REGEX:
            converted = matcher.grammar_from_regex(text)
        case GrammarKind.CHOICE:
            words = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
            converted = matcher.grammar_from_lark("start: " + " | ".join(words))
        case GrammarKind.GRAMMAR:
            if "::=" in text:
                text = _from_gbnf(text)
            converted = matcher.grammar_from_lark(text)
    return str(converted)


def _as_object(schema: str) -> str:
    """Raises: ValueError."""
    match schema.strip():
        case "true":
            return "{}"
        case "false":
            raise ValueError("nothing satisfies the schema false")
        case text if not text.startswith("{"):
            raise ValueError("a schema must be an object or boolean")
    return schema


def _from_gbnf(text: str) -> str:
    """Raises: ValueError."""
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    try:
        return str(any_to_lark(text))
    except GbnfToLarkError as error:
        raise ValueError(str(error)) from None


def _invalid(grammar: Grammar, reason: str) -> InvalidRequest:
    reason = " ".join(reason.replace("<non-verbose/>", "").split())[:600]
    return InvalidRequest(f"{_NAMES[grammar.kind]}: {reason}", code="invalid_grammar")


_NAMES = {
    GrammarKind.JSON_SCHEMA: "the JSON schema cannot be followed",
    GrammarKind.REGEX: "the regular expression cannot be followed",
    GrammarKind.CHOICE: "the choices cannot be followed",
    GrammarKind.GRAMMAR: "the grammar cannot be followed",
}
