"""What one token adds to the text, as bytes: the table under the tokenizer's and the detokenizer's
text.

Most causal language models decode token by token into bytes (byte-level BPE, or SentencePiece with
byte fallback); for those `decode(ids)` is the concatenation of the tokens' bytes, read as UTF-8.
This module recognises such decoders in a `tokenizer.json` and builds the table lazily. It knows
nothing of streams, requests or models.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

ToBytes = Callable[[str], bytes]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class ByteRule:
    """How a decoder turns one token's name into bytes, and what it strips from the start of the
    whole text.
    """

    to_bytes: ToBytes
    strip: str = ""  # this character...
    max_strip: int = 0  # ...at most so often


class TokenBytes(dict[int, bytes]):
    """Token id -> the bytes it adds to the text; unknown ids (a padded vocabulary) and `hidden`
    ones add none.

    A dict that fills itself, because a look-up happens once per generated token.
    """

    def __init__(self, raw: RawTokenizer, to_bytes: ToBytes, hidden: frozenset[int]) -> None:
        super().__init__()
        self._raw = raw
        self._to_bytes = to_bytes
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        name = None if token_id in self._hidden else self._raw.id_to_token(token_id)
        piece = b"" if name is None else self._to_bytes(name)
        self[token_id] = piece
        return piece


def byte_rule(decoder: dict[str, Any] | None) -> ByteRule | None:
    """The rule of a `tokenizer.json`'s "decoder" entry, or None when it is not bytewise (e.g.
    WordPiece).
    """
    if decoder is None:
        return None
    if decoder["type"] == "ByteLevel":
        return ByteRule(_byte_level())
    if decoder["type"] == "Sequence":
        return _byte_fallback(decoder["decoders"])
    return None


def _byte_level() -> ToBytes:
    """GPT-2's rule: every byte has a printable character of its own (its own, or the next one from
    256 upwards).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}

    def to_bytes(name: str) -> bytes:
        try:
            return bytes([byte_of[char] for char in name])
        except KeyError:  # an added token: plain text
            return name.encode()

    return to_bytes


def _byte_fallback(steps: list[dict[str, Any]]) -> ByteRule | None:
    """SentencePiece's rule: [Replace ▁ by space..., ByteFallback, Fuse, Strip at the start], the
    last two optional.
    """
    kinds = [step["type"] for step in steps]
    if "ByteFallback" not in kinds:
        return None
    at = kinds.index("ByteFallback")
    before, after = steps[:at], steps[at + 1 :]
    if any(s["type"] != "Replace" or "String" not in s["pattern"] for s in before):
        return None
    if kinds[at + 1 :] not in ([], ["Fuse"], ["Fuse", "Strip"]):
        return None
    replacements = [(s["pattern"]["String"], s["content"]) for s in before]
    strip, max_strip = "", 0
    if len(after) == 2:
        if after[1]["stop"]:
            return None  # strips the end of the text: known only when all of it is
        strip, max_strip = after[1]["content"], after[1]["start"]

    def to_bytes(name: str) -> bytes:
        for old, new in replacements:
            name = name.replace(old, new)
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        return name.encode()

    return ByteRule(to_bytes, strip, max_strip)
