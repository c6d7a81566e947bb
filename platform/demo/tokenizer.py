"""A tokenizer with one token per byte.

Bytes need no training text, never meet an unknown character, and let a tiny model see letters,
which all its skills are about.  They also split every non-ASCII character over several tokens,
which is what a streaming server has to get right.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from loraplex.platform.demo import corpus

CONTEXT_LENGTH = 512
# Two spares make the vocabulary 264, a multiple of eight.
_SPECIAL = (
    corpus.PAD,
    corpus.BOS,
    corpus.EOS,
    corpus.SYSTEM,
    corpus.USER,
    corpus.ASSISTANT,
    "<|spare0|>",
    "<|spare1|>",
)
VOCAB_SIZE = len(_SPECIAL) + 256

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build() -> Tokenizer:
    """Byte-pair encoding without a single merge: what is left are the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*_SPECIAL, *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{corpus.BOS} $A", special_tokens=[(corpus.BOS, names.index(corpus.BOS))]
    )
    return tokenizer


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that is known to exist."""
    number = tokenizer.token_to_id(token)
    assert number is not None, token
    return number


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files every loader looks for."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": corpus.BOS,
        "eos_token": corpus.EOS,
        "pad_token": corpus.PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
