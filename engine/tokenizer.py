"""Text to token ids and back, over the `tokenizers` library alone: the API process has neither
torch nor transformers.

It knows nothing of chats (chat_template.py) and nothing of streams (detokenizer.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import Tokenizer as RawTokenizer

from loraplex.engine.api import ModelInfo
from loraplex.engine.errors import InvalidRequest
from loraplex.engine.pieces import ByteRule, TokenBytes, byte_rule


class Tokenizer:
    """A model's tokenizer. One text is encoded at a time, so the library's thread pool is never
    started.
    """

    def __init__(self, tokenizer_json: str, special_tokens: Mapping[str, str]) -> None:
        self.raw = RawTokenizer.from_str(tokenizer_json)
        self.raw.no_truncation()  # a limit saved with the tokenizer must not cut prompts in silence
        self.raw.no_padding()
        self.special_tokens = dict(special_tokens)  # bos_token, eos_token, ... as text
        self.special_ids = frozenset(
            token_id
            for token_id, token in self.raw.get_added_tokens_decoder().items()
            if token.special
        )
        self.rule: ByteRule | None = byte_rule(json.loads(tokenizer_json).get("decoder"))
        to_bytes = self.rule.to_bytes if self.rule else str.encode
        self.pieces = TokenBytes(self.raw, to_bytes, hidden=frozenset())
        self.visible_pieces = TokenBytes(self.raw, to_bytes, hidden=self.special_ids)

    @classmethod
    def from_info(cls, info: ModelInfo) -> Tokenizer:
        return cls(info.tokenizer_json, info.special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of known tokens; the model's own `vocab_size` may be padded beyond it."""
        return self.raw.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises: InvalidRequest when `text` is no valid Unicode (a lone surrogate from a JSON
        escape).
        """
        try:
            return self.raw.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # the library's word for a str that has no UTF-8 form
            raise InvalidRequest("the text is not valid Unicode: it has a lone surrogate") from None

    def encode_batch(
        self, texts: Iterable[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.raw.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds to the text; special tokens by name, unknown ids as nothing."""
        if self.rule is not None:
            return self.pieces[token_id]
        return self.raw.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """One token as text; the bytes of half a character as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")
