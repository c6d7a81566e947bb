"""Text that arrives in pieces equals the text decoded at once, and never shows half a character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from loraplex.engine.detokenizer import ByteDetokenizer, WindowDetokenizer, new_detokenizer
from loraplex.engine.tokenizer import Tokenizer


def byte_level() -> Tokenizer:
    """GPT-2 style, with added tokens that are no byte-level text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    raw.add_tokens(["é x", "你好", "<think>"])
    return Tokenizer(raw.to_str(), {})


def byte_fallback(strip: int = 1) -> Tokenizer:
    """Llama-2 style: ▁ for the space, one before the text, bytes for unknown characters."""
    names = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdeé你,.", "▁a", "▁ab", "▁▁"]
    merges = [("▁", "a"), ("▁a", "b"), ("▁", "▁")]
    raw = RawTokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, decoders.Strip(" ", strip, 0)] if strip else steps)
    raw.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(raw.to_str(), {})


def word_piece() -> Tokenizer:
    names = ["[UNK]", "a", "b", "##c", "##d", ".", ",", "hello", "##ing", "'", "n't", "你", "é"]
    raw = RawTokenizer(
        models.WordPiece(vocab={name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece()
    raw.add_special_tokens([AddedToken("[SEP]", special=True)])
    return Tokenizer(raw.to_str(), {})


def metaspace() -> Tokenizer:
    names = ["<unk>", "▁", "▁a", "b", "c", "▁▁", "▁hello", "é"]
    raw = RawTokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>")
    )
    raw.decoder = decoders.Metaspace()
    return Tokenizer(raw.to_str(), {})


def undecorated() -> Tokenizer:
    raw = RawTokenizer(models.WordLevel(vocab={"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    return Tokenizer(raw.to_str(), {})


TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "byte_fallback_unstripped": byte_fallback(strip=0),
    "word_piece": word_piece(),
    "metaspace": metaspace(),
    "undecorated": undecorated(),
}
EXACT = sorted(TOKENIZERS.keys() - {"byte_fallback", "byte_fallback_unstripped"})

ids_of_any = st.lists(st.integers(0, 300), max_size=24)
cuts = st.lists(st.integers(1, 4), min_size=24, max_size=24)


def increments(
    tokenizer: Tokenizer,
    ids: list[int],
    sizes: list[int],
    *,
    skip: bool,
    prompt: tuple[int, ...] = (),
) -> list[str]:
    """The text of `ids`, pushed in groups of `sizes`."""
    detokenizer = new_detokenizer(tokenizer, skip_special_tokens=skip, prompt_token_ids=prompt)
    texts, at = [], 0
    for size in sizes:
        texts.append(detokenizer.push(ids[at : at + size]))
        at += size
    texts.append(detokenizer.push(ids[at:]))
    texts.append(detokenizer.finish())
    return texts


def test_the_fast_path_is_taken_where_tokens_are_bytes():
    fast = {
        name for name, t in TOKENIZERS.items() if isinstance(new_detokenizer(t), ByteDetokenizer)
    }
    assert fast == {"byte_level", "byte_fallback", "byte_fallback_unstripped"}


@pytest.mark.parametrize("name", EXACT)
@given(ids=ids_of_any, sizes=cuts, skip=st.booleans())
def test_any_ids_give_the_text_of_decode(name: str, ids: list[int], sizes: list[int], skip: bool):
    """Also broken UTF-8, special tokens between the bytes of a character, and ids beyond the
    vocabulary.
    """
    tokenizer = TOKENIZERS[name]
    text = "".join(increments(tokenizer, ids, sizes, skip=skip))
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "byte_fallback_unstripped"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30), sizes=cuts)
def test_any_text_comes_back_without_half_characters(name: str, text: str, sizes: list[int]):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    pieces = increments(tokenizer, ids, [1] * len(ids), skip=True)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(increments(tokenizer, ids, sizes, skip=True)) == tokenizer.decode(ids)


@given(ids=ids_of_any, sizes=cuts)
def test_broken_byte_fallback_keeps_the_whole_characters(ids: list[int], sizes: list[int]):
    """`decode` would turn a whole run of bytes into U+FFFD; see the module's docstring."""
    tokenizer = TOKENIZERS["byte_fallback_unstripped"]
    data = b"".join(tokenizer.token_bytes(i) for i in ids if i not in tokenizer.special_ids)
    assert "".join(increments(tokenizer, ids, sizes, skip=True)) == data.decode("utf-8", "replace")


def test_a_character_is_shown_when_its_last_byte_arrives():
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = new_detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in tokenizer.encode("a😀b")] == ["a", "", "", "", "😀", "b"]


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_an_unfinished_character_becomes_one_replacement_character(name: str):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("😀")[:-1]
    pieces = increments(tokenizer, ids, [1] * len(ids), skip=True)
    assert pieces[-1] == "\ufffd"
    assert "".join(pieces[:-1]).strip() == ""


def test_text_after_a_prompt_keeps_its_leading_space():
    """Llama-2's decoder strips the first space of a text; the output is not the first text."""
    tokenizer = TOKENIZERS["byte_fallback"]
    prompt, output = tokenizer.encode("a"), tokenizer.encode("ab")
    assert "".join(increments(tokenizer, output, [], skip=True)) == "ab"
    after = increments(tokenizer, output, [], skip=True, prompt=tuple(prompt))
    assert "".join(after) == " ab"


@pytest.mark.parametrize("name", ["byte_level", "word_piece"])
def test_the_cost_of_a_token_does_not_grow_with_those_before(name: str):
    """Bytes that never become a character are the bad case: a window of them must not grow for
    ever.
    """
    tokenizer = TOKENIZERS[name]
    stuck = tokenizer.encode("é")[0]
    detokenizer = new_detokenizer(tokenizer)
    shown = sum(len(detokenizer.push([stuck])) for _ in range(2000))
    assert shown >= 2000 - 8
    if isinstance(detokenizer, WindowDetokenizer):
        assert len(detokenizer._context) + len(detokenizer._held) <= 16
