"""Token ids to text, a few at a time: never half a character, O(1) per token whatever the length.

`push` the new ids of each step and show what it returns; `finish` gives what was still held back.
The pieces joined are `Tokenizer.decode` of all ids, with one deliberate exception: where bytes that
are no UTF-8 follow whole characters in one run of byte-fallback tokens, `decode` throws the whole
run away; here the characters are already on the user's screen, and only the broken bytes become
U+FFFD (the Unicode standard's way: one for each maximal broken part).

It knows nothing of stop strings and nothing of requests.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from loraplex.engine.tokenizer import Tokenizer

# Text that follows a prompt depends on at most these tokens of it: a character has up to four
# bytes.
_CONTEXT_TOKENS = 4
# An unknown decoder may hold back this many tokens that end in U+FFFD before they are shown as they
# are.
_MAX_HELD_TOKENS = 8


class Detokenizer(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """The text these tokens complete; may be empty."""
        ...

    def finish(self) -> str:
        """The text still held back. Nothing may be pushed after it."""
        ...


def new_detokenizer(
    tokenizer: Tokenizer,
    *,
    skip_special_tokens: bool = True,
    prompt_token_ids: Sequence[int] = (),
) -> Detokenizer:
    """A detokenizer for one sequence; with a prompt its text continues the prompt's (it may begin
    with a space).
    """
    rule = tokenizer.rule
    detokenizer: ByteDetokenizer | WindowDetokenizer
    if rule is not None:
        pieces = tokenizer.visible_pieces if skip_special_tokens else tokenizer.pieces
        detokenizer = ByteDetokenizer(pieces, rule.strip, rule.max_strip)
    else:
        detokenizer = WindowDetokenizer(tokenizer, skip_special_tokens)
    if prompt_token_ids:
        detokenizer.push(prompt_token_ids[-_CONTEXT_TOKENS:])
    return detokenizer


class ByteDetokenizer:
    """For tokenizers whose tokens are bytes: a table look-up and a UTF-8 decoder that keeps an
    unfinished tail.
    """

    __slots__ = ("_pieces", "_strip", "_strips_left", "_tail")

    def __init__(self, pieces: dict[int, bytes], strip: str = "", max_strip: int = 0) -> None:
        self._pieces = pieces
        self._strip = strip
        self._strips_left = max_strip
        self._tail = b""

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        data = self._tail
        for token_id in token_ids:
            data += pieces[token_id]
        text, used = utf_8_decode(data, "replace", False)
        self._tail = data[used:]
        return self._lstrip(text) if self._strips_left else text

    def finish(self) -> str:
        text, self._tail = self._tail.decode("utf-8", "replace"), b""
        return text

    def _lstrip(self, text: str) -> str:
        while text and self._strips_left:
            if not text.startswith(self._strip):
                self._strips_left = 0
                break
            text = text[len(self._strip) :]
            self._strips_left -= 1
        return text


class WindowDetokenizer:
    """For any other tokenizer: decode the last shown group together with what is new, and show the
    difference.

    The group before the new tokens gives the decoder its context (is this the first word, a space
    before it?).
    """

    __slots__ = ("_context", "_context_text", "_decode", "_held", "_hidden", "_name")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._decode = tokenizer.raw.decode
        self._name = tokenizer.raw.id_to_token
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        # Hidden and unknown tokens decode to nothing. As context they would make the next word look
        # like the first.
        for token_id in token_ids:
            if token_id not in self._hidden and self._name(token_id) is not None:
                self._held.append(token_id)
        if not self._held:
            return ""
        text = self._decode(self._context + self._held, skip_special_tokens=False)
        if text.endswith("\ufffd") and len(self._held) < _MAX_HELD_TOKENS:
            return ""
        return self._show(text)

    def finish(self) -> str:
        if not self._held:
            return ""
        return self._show(self._decode(self._context + self._held, skip_special_tokens=False))

    def _show(self, text: str) -> str:
        new = text[len(self._context_text) :]
        self._context, self._held = self._held, []
        self._context_text = self._decode(self._context, skip_special_tokens=False)
        return new
