"""Grammars over the real library: a model that says anything allowed says only what is right.

Hostile grammars run in a process of their own: the library recurses in native code, where a stack
that ends takes the process with it.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from loraplex.engine.api import Grammar, GrammarKind, ModelInfo
from loraplex.engine.errors import InvalidRequest
from loraplex.engine.grammars import GuidanceCompiler, Mask

MODEL = Path(__file__).resolve().parents[2] / "platform" / "demo" / "assets" / "model"


def model_info(tokenizer: Tokenizer, eos: list[int], vocab_size: int | None = None) -> ModelInfo:
    return ModelInfo(
        name="m", architecture="x", dtype="float32", device="cpu", backend="torch",
        vocab_size=vocab_size or tokenizer.get_vocab_size(), max_model_len=512, num_layers=1,
        eos_token_ids=eos, bos_token_id=None, tokenizer_json=tokenizer.to_str(),
        chat_template=None, special_tokens={}, generation_defaults={}, modules=[],
        num_parameters=1,
    )  # fmt: skip


def byte_level_bpe() -> Tokenizer:
    """Merged tokens, as in most models: one may span what is inside and outside a JSON string."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ['{"name": "value", "count": 12, "items": ["a", "b"]}', "größer, 日本, naïve \\n "] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


class Speaker:
    """Says allowed tokens at random, the end a little likelier so that it comes."""

    def __init__(self, info: ModelInfo, tokenizer: Tokenizer) -> None:
        self.info, self.tokenizer = info, tokenizer
        self.compiler = GuidanceCompiler(info)

    def say(self, grammar: Grammar, seed: int, max_tokens: int = 600) -> str | None:
        """None: it did not come to an end."""
        draw = random.Random(seed)
        matcher = self.compiler.compile(grammar).start()
        output: list[int] = []
        while len(output) < max_tokens:
            allowed = token_ids(matcher.mask())
            assert allowed
            assert allowed[-1] < self.info.vocab_size
            ends = set(allowed) & set(self.info.eos_token_ids)
            if ends and (len(ends) == len(allowed) or draw.random() < 0.3):
                return self.tokenizer.decode(output)
            closing = [t for t in allowed if self.text(t).strip() in ('"', "}", "]", '"}', '"]')]
            pool = closing if closing and draw.random() < 0.3 else allowed
            output.append(draw.choice([t for t in pool if t not in ends] or allowed))
            matcher.accept(output[-1])
        return None

    def text(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id], skip_special_tokens=False)


def token_ids(mask: Mask) -> list[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return [int(i) for i in bits.nonzero()[0]]


def demo_speaker() -> Speaker:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return Speaker(model_info(tokenizer, [2]), tokenizer)


def bpe_speaker() -> Speaker:
    tokenizer = byte_level_bpe()
    return Speaker(model_info(tokenizer, [0], vocab_size=tokenizer.get_vocab_size()), tokenizer)


SPEAKERS = {"one token a byte": demo_speaker(), "byte-level bpe": bpe_speaker()}
speakers = pytest.mark.parametrize("speaker", list(SPEAKERS.values()), ids=list(SPEAKERS))


def schema(value: Any, **options: Any) -> Grammar:
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(value), **options)


def regex(pattern: str) -> Grammar:
    return Grammar(kind=GrammarKind.REGEX, text=pattern)


def choice(*texts: str) -> Grammar:
    return Grammar(kind=GrammarKind.CHOICE, text=json.dumps(texts))


def grammar(text: str) -> Grammar:
    return Grammar(kind=GrammarKind.GRAMMAR, text=text)


NAMES = st.sampled_from(["a", "b", "longer name", 'quo"te', "ünï"])
LEAVES = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n},
              st.integers(-20, 20), st.integers(0, 300)),
    st.just({"type": "number"}),
    st.builds(lambda low, n: {"type": "string", "minLength": low, "maxLength": low + n},
              st.integers(0, 3), st.integers(0, 4)),
    st.just({"type": "string", "pattern": "^[a-c]{1,3}-[0-9]+$"}),
    st.just({"type": "string", "format": "date"}),
    st.just({"enum": ["x", 1, None, ["y", {"z": 2}]]}),
    st.just({"const": {"k": "ü"}}),
)  # fmt: skip


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def array(items: Any, low: int, n: int) -> Any:
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + n}

    def object_(properties: dict[str, Any], data: Any, extra: bool) -> Any:
        required = [name for name in properties if data.random() < 0.5]
        more: Any = {"type": "integer"} if extra else False
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": more,
        }

    return st.one_of(
        st.builds(array, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(
            object_,
            st.dictionaries(NAMES, inner, max_size=3),
            st.randoms(use_true_random=False),
            st.booleans(),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    )


SCHEMAS = st.recursive(LEAVES, _containers, max_leaves=6)


@speakers
@settings(max_examples=60, deadline=None)
@given(value=SCHEMAS, seed=st.integers(0, 2**32))
def test_what_a_schema_lets_through_is_valid_json_of_it(
    speaker: Speaker, value: Any, seed: int
) -> None:
    said = speaker.say(schema(value), seed)
    if said is not None:
        jsonschema.validate(json.loads(said), value, format_checker=jsonschema.FormatChecker())


def test_the_validity_test_can_fail() -> None:
    speaker, seen = demo_speaker(), 0
    for seed in range(20):
        said = speaker.say(schema({"type": "integer", "minimum": 0, "maximum": 99}), seed)
        assert said is not None
        try:
            jsonschema.validate(json.loads(said), {"type": "integer", "maximum": 9})
        except jsonschema.ValidationError:
            seen += 1
    assert seen > 5


def test_the_schema_true_lets_any_json_through() -> None:
    assert {type(json.loads(demo_speaker().say(schema(True), s) or '""')) for s in range(30)} > {
        int,
        str,
    }


@speakers
def test_any_object(speaker: Speaker) -> None:
    found = [speaker.say(schema({"type": "object"}), seed) for seed in range(8)]
    assert all(isinstance(json.loads(said), dict) for said in found if said is not None)
    assert any(said is not None for said in found)


PATTERNS = [
    "[a-z]+@[a-z]+\\.(com|org)",
    "^\\d{4}-[01]\\d$",
    "(ab|cd){2,4}x?",
    "[äöü]{1,3}|日本",
    "(?i:yes|no)",
]


@speakers
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_regular_expression_holds_for_the_whole_output(speaker: Speaker, pattern: str) -> None:
    for seed in range(6):
        said = speaker.say(regex(pattern), seed)
        assert said is not None
        assert re.fullmatch(pattern, said)


@speakers
def test_a_choice_is_one_of_them_and_each_can_be(speaker: Speaker) -> None:
    texts = ["yes", "yes, sir", 'a "quoted" one', "back\\slash", "two\nlines", "日本 😀", "%x /y/"]
    assert {speaker.say(choice(*texts), seed) for seed in range(200)} == set(texts)


@speakers
@pytest.mark.parametrize(
    "text",
    [
        'start: sum\nsum: sum "+" NUMBER | NUMBER\nNUMBER: /[1-9][0-9]{0,2}/',
        'root ::= number ("+" number)*\nnumber ::= [1-9] [0-9]? [0-9]?',
    ],
    ids=["lark", "gbnf"],
)
def test_a_grammar(speaker: Speaker, text: str) -> None:
    for seed in range(8):
        said = speaker.say(grammar(text), seed)
        assert said is not None
        assert re.fullmatch("[1-9][0-9]{0,2}(\\+[1-9][0-9]{0,2})*", said)


def test_white_space_is_bounded_unless_told_otherwise() -> None:
    """A model that is allowed any amount may write nothing else to the end of its tokens."""
    value = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"],
             "additionalProperties": False}  # fmt: skip
    speaker = demo_speaker()
    for seed in range(20):
        said = speaker.say(schema(value), seed)
        assert said is not None
        space = r"( |\n[ \t]{0,40})?"
        assert re.fullmatch(space.join([r"\{", '"a"', ":", "null", r"\}"]), said)
    assert {speaker.say(schema(value, whitespace=""), seed) for seed in range(5)} == {'{"a":null}'}
    said = {speaker.say(schema(value, whitespace="\t"), seed) for seed in range(40)}
    assert len(said) > 8
    assert all(re.fullmatch('\\{\t?"a"\t?:\t?null\t?\\}', str(text)) for text in said)


def test_indented_json_may_be_written() -> None:
    matcher = demo_speaker().compiler.compile(schema({"type": "object"})).start()
    raw = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text = json.dumps({"a": [1, {"b": {"c": "d"}}], "e": {}}, indent=4)
    for token_id in raw.encode(text, add_special_tokens=False).ids:
        assert token_id in token_ids(matcher.mask())
        matcher.accept(token_id)
    assert 2 in token_ids(matcher.mask())


def test_every_end_token_ends() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    matcher = GuidanceCompiler(model_info(tokenizer, [2, 5])).compile(regex("")).start()
    assert token_ids(matcher.mask()) == [2, 5]


@pytest.mark.parametrize("vocab_size", [264, 300, 512])
def test_a_padded_vocabulary_gets_no_tokens_beyond_the_tokenizers(vocab_size: int) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    compiler = GuidanceCompiler(model_info(tokenizer, [2], vocab_size))
    mask = compiler.compile(regex("(.|\\n)*")).start().mask()
    assert len(mask) == -(-vocab_size // 32)
    assert token_ids(mask)[-1] < 264


def test_tokens_the_model_lacks_are_never_allowed() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    compiler = GuidanceCompiler(model_info(tokenizer, [2], vocab_size=100))
    assert token_ids(compiler.compile(regex(".*")).start().mask())[-1] < 100
    with pytest.raises(InvalidRequest, match="no token of this model"):
        compiler.compile(regex("\\n"))  # 206


# --- what cannot be followed ----------------------------------------------------------------------

WRONG = [
    (schema({"type": "foo"}), "Invalid type: foo"),
    (schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
    (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (schema({"$ref": "#/nowhere"}), "does not exist"),
    (schema({"$ref": "https://example.org/schema"}), "does not fetch"),
    (schema({"$ref": "#"}), "schema cannot be followed"),
    (schema(False), "nothing satisfies"),
    (schema([]), "object or boolean"),
    (regex("("), "unclosed group"),
    (grammar("start: ("), "grammar cannot be followed"),
    (grammar("root ::= ("), "Expected '\\)'"),
    (grammar("nothing"), "grammar cannot be followed"),
    (grammar("start: other"), "grammar cannot be followed"),
]


@pytest.mark.parametrize(("wrong", "why"), WRONG, ids=[g.text for g, _ in WRONG])
def test_a_wrong_grammar_is_told_before_the_first_token(wrong: Grammar, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        demo_speaker().compiler.compile(wrong)
    assert caught.value.code == "invalid_grammar"
    assert len(caught.value.message) < 700


def test_a_model_without_an_end_token_is_refused() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    with pytest.raises(InvalidRequest, match="eos_token_id"):
        GuidanceCompiler(model_info(tokenizer, [])).compile(regex("a"))


HOSTILE = """
import json, resource, sys, threading, time
sys.path.insert(0, sys.argv[1])
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("grammars_test", sys.argv[1])
module = module_from_spec(spec)
sys.modules["grammars_test"] = module
spec.loader.exec_module(module)
from loraplex.engine.errors import InvalidRequest
from loraplex.engine.grammars import STACK_BYTES
from loraplex.engine.validation import MAX_GRAMMAR_CHARS

def chain(link, end, limit=MAX_GRAMMAR_CHARS):
    parts, i = [], 0
    size = 200
    while size < limit:
        parts.append(link(i, i + 1)); i += 1
        size += len(parts[-1]) + 1
    return parts + [end(i)]

def defs(link):
    parts = chain(lambda i, j: '"%d":%s' % (i, link % j), lambda i: '"%d":{"type":"null"}' % i)
    text = '{"$ref":"#/$defs/0","$defs":{' + ",".join(parts) + "}}"
    return module.Grammar(kind=module.GrammarKind.JSON_SCHEMA, text=text)

def rules(link, first="start: r0\\n"):
    name = first[7]
    parts = chain(lambda i, j: link % (i, j), lambda i: name + '%d: "a"' % i)
    return module.grammar(first + "\\n".join(parts))

many = [{"properties": {f"{c}{i}": {"type": "string"}}, "required": [f"{c}{i}"]}
        for i in range(12) for c in "ab"]
cases = {
    "references": defs('{"$ref":"#/$defs/%d"}'),
    "references in properties": defs('{"properties":{"a":{"$ref":"#/$defs/%d"}}}'),
    "references in anyOf": defs('{"anyOf":[{"$ref":"#/$defs/%d"},{"type":"null"}]}'),
    "references in allOf": defs('{"allOf":[{"$ref":"#/$defs/%d"},{"minLength":1}]}'),
    "rules": rules("r%d: r%d"),
    "rules with text": rules('r%d: "x" r%d "y"'),
    "terminals": rules("T%d: ~T%d", "start: T0\\n"),
    "deep schema": module.Grammar(kind=module.GrammarKind.JSON_SCHEMA,
        text='{"items":' * 6000 + "{}" + "}" * 6000),
    "deep expression": module.regex("(" * 30000 + ")" * 30000),
    "deep rule": module.grammar("start: " + "(" * 30000 + '"a"' + ")" * 30000),
    "combinations": module.schema({"allOf": [{"anyOf": many[i : i + 2]} for i in range(0, 24, 2)]}),
    "counters": module.regex("((a{1,1000}){1,1000}){1,1000}"),
    "many optional letters": module.regex("a?" * 4000),
    "ambiguity": module.grammar('start: s\\ns: s s | s s s | "x" | "" '),
    "many properties": module.schema({"properties": {f"p{i}": {} for i in range(2500)}}),
    "many choices": module.choice(*(f"w{i}x{i * 7}" for i in range(4000))),
}
def work():
    speaker = module.demo_speaker()
    speaker.compiler.compile(module.regex("a"))
    for name, case in cases.items():
        assert len(case.text) <= MAX_GRAMMAR_CHARS, (name, len(case.text))
        began = time.process_time()
        try:
            speaker.say(case, 1, max_tokens=20)
            end = "followed"
        except InvalidRequest as error:
            end = "refused"
            assert error.code == "invalid_grammar"
        print(json.dumps([name, end, time.process_time() - began]), flush=True)

threading.stack_size(STACK_BYTES)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_hostile_grammars_are_followed_or_refused_within_bounds() -> None:
    """CPU time, so that a busy machine changes little; the bounds are ten times what was seen."""
    run = subprocess.run(
        [sys.executable, "-c", HOSTILE, __file__], capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-2000:]
    *lines, megabytes = run.stdout.split("\n")[:-1]
    ends = {name: (end, seconds) for name, end, seconds in map(json.loads, lines)}
    assert len(ends) == 16, run.stderr[-2000:]
    assert all(seconds < 20 for _, seconds in ends.values()), ends
    assert {end for end, _ in ends.values()} == {"followed", "refused"}
    assert int(megabytes) < 2000
