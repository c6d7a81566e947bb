"""The API process's tokenizer and chat templates give what transformers gives, without
transformers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from loraplex.engine.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate
from loraplex.engine.errors import InvalidRequest
from loraplex.engine.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {{- "You have these functions:\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}<|eot_id|>
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls|length != 1 %}
            {{- raise_exception("This model supports one tool call at once.") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}{{ call.arguments | tojson }}{{ "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" + message.content + "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}{{ tool_call.name }}{{ '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

MISTRAL = """{%- set ns = namespace(index=0, last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and loop.index0 == ns.last %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {{- '"' + key + '": ' + (val | tojson) }}{{ "" if loop.last else ", " }}
                {%- endfor %}
                {{- "}}" }}{{ "" if loop.last else ", " }}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message.content + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function|tojson %}
            {{- out[:-1] }}{{- ', "id": "' + call.id + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message.role == 'assistant' %}
        {% generation %}{{- " " + message.content|trim + eos_token }}{% endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user, assistant and tool roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "mistral": MISTRAL}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter für <einen> Ort & Tag",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

SIMPLE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Grüß <Gott> 你好 😀 \n"},
]
TURNS = [*SIMPLE, {"role": "assistant", "content": " Hi. "}, {"role": "user", "content": "More"}]
TOOL_USE = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "abc123def",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Köln"}},
            }
        ],
    },
    {"role": "tool", "content": '{"t": 7}', "tool_call_id": "abc123def"},
]


def raw_tokenizer() -> RawTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", "<|im_end|>", *alphabet]
    raw = RawTokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    raw.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return raw


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(raw_tokenizer().to_str(), SPECIAL)


@pytest.fixture(scope="module")
def hf_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=raw_tokenizer(), **SPECIAL)


def test_encodes_and_decodes_as_transformers(
    tokenizer: Tokenizer, hf_tokenizer: PreTrainedTokenizerFast
):
    text = "Hällo 你好 </s> x"
    for special in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert ids == hf_tokenizer.encode(text, add_special_tokens=special)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == hf_tokenizer.decode(
                ids, skip_special_tokens=skip
            )
    assert tokenizer.encode_batch(["a", ""]) == [tokenizer.encode("a"), [0]]
    assert tokenizer.vocab_size == len(hf_tokenizer)
    assert tokenizer.special_ids == {0, 1, 2}


def test_a_saved_length_limit_does_not_cut_prompts():
    raw = raw_tokenizer()
    raw.enable_truncation(4)
    raw.enable_padding(length=8)
    assert len(Tokenizer(raw.to_str(), SPECIAL).encode("abcdefghijkl")) == 13
    assert len(Tokenizer(raw.to_str(), SPECIAL).encode("a")) == 2


def test_single_tokens_as_bytes_and_text(tokenizer: Tokenizer):
    first, second = tokenizer.encode("é", add_special_tokens=False)
    assert tokenizer.token_bytes(first) + tokenizer.token_bytes(second) == "é".encode()
    assert tokenizer.token_text(first) == "\ufffd"
    assert tokenizer.token_text(1) == "</s>"
    assert tokenizer.token_text(5000) == ""


def test_text_that_is_no_unicode_is_the_callers_fault(tokenizer: Tokenizer):
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode(json.loads('"a\\ud800"'))


def test_batches_start_no_threads():
    """The library's pool has a thread per core; they would fight the engine for the cores."""
    code = (
        "import sys, threading, pathlib\n"
        "from loraplex.engine.tokenizer import Tokenizer\n"
        "t = Tokenizer(sys.stdin.read(), {})\n"
        "t.encode_batch(['some text'] * 500)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
        "print(len(list(pathlib.Path('/proc/self/task').iterdir())))\n"
    )
    if sys.platform != "linux":
        pytest.skip("counts threads in /proc")
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input=raw_tokenizer().to_str(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == ["1"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [SIMPLE, TURNS, TOOL_USE], ids=["simple", "turns", "tools"])
@pytest.mark.parametrize("generate", [True, False], ids=["prompt", "no_prompt"])
def test_templates_render_as_in_transformers(
    name: str,
    messages: list[dict[str, Any]],
    generate: bool,
    hf_tokenizer: PreTrainedTokenizerFast,
):
    tools = TOOLS if messages is TOOL_USE else None
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    ours = template.render(messages, tools=tools, add_generation_prompt=generate)
    theirs = hf_tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=TEMPLATES[name],
        add_generation_prompt=generate,
        tokenize=False,
    )
    assert ours == theirs
    assert len(ours) > 20


@pytest.mark.parametrize("name", TEMPLATES)
def test_continuing_the_final_message_as_in_transformers(
    name: str, hf_tokenizer: PreTrainedTokenizerFast
):
    for content in ("The answer is", "The answer is ", "a\nb\n"):
        messages = [SIMPLE[1], {"role": "assistant", "content": content}]
        ours = ChatTemplate(TEMPLATES[name], SPECIAL).render(
            messages, add_generation_prompt=False, continue_final_message=True
        )
        theirs = hf_tokenizer.apply_chat_template(
            messages, chat_template=TEMPLATES[name], continue_final_message=True, tokenize=False
        )
        assert ours == theirs


def test_helpers_behave_as_in_transformers(hf_tokenizer: PreTrainedTokenizerFast):
    source = (
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m|tojson }}{% endfor %}"
        "{{ strftime_now('%Y') }}{{ pad_token is defined }}{{ thinking }}"
        "{{ {'b': 1, 'a': '<é>'}|tojson(separators=(',', ':'), sort_keys=true) }}{{ documents }}"
    )
    documents = [{"title": "t", "text": "x"}]
    ours = ChatTemplate(source, SPECIAL).render(
        SIMPLE, documents=documents, variables={"thinking": True}
    )
    theirs = hf_tokenizer.apply_chat_template(
        SIMPLE, documents=documents, chat_template=source, tokenize=False, thinking=True
    )
    assert ours == theirs


def test_openai_forms_are_made_plain():
    """Content parts become text, arguments in a JSON string become an object, null is the same as
    absent.
    """
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": parts, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    source = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    assert ChatTemplate(source, {}).render(messages) == (
        '{"role": "user", "content": "a\\nb"}'
        '{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", '
        '"function": {"name": "f", "arguments": {"x": 1}}}]}'
    )


def test_a_requests_template_replaces_the_models():
    template = ChatTemplate("model's", SPECIAL)
    assert template.render(SIMPLE, chat_template="{{ bos_token }}mine") == "<s>mine"


@pytest.mark.parametrize(
    ("source", "messages", "options", "message"),
    [
        (None, SIMPLE, {}, "no chat template; use /v1/completions or pass chat_template"),
        ("x", [], {}, "messages is empty"),
        ("x", [{"content": "x"}], {}, r"messages\[0\] has no role"),
        ("x", [{"role": "user", "content": [{"type": "image_url"}]}], {}, "'image_url'; only text"),
        ("{% for %}", SIMPLE, {}, "not valid Jinja, line 1"),
        ("{{ raise_exception('roles must alternate') }}", SIMPLE, {}, "roles must alternate"),
        ("{{ messages.x.y }}", SIMPLE, {}, "has no attribute"),
        ("{{ 1 / 0 }}", SIMPLE, {}, "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", SIMPLE, {}, "unsafe"),
        ("{{ messages.append(1) }}", SIMPLE, {}, "not safely callable|unsafe"),
        ("x" * (MAX_TEMPLATE_CHARS + 1), SIMPLE, {}, "the limit is"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", SIMPLE, {}, "more than"),
        ("x", SIMPLE, {"continue_final_message": True}, "exclude each other"),
        (
            "x",
            SIMPLE,
            {"continue_final_message": True, "add_generation_prompt": False},
            "leaves out the final message",
        ),
    ],
)
def test_refusals_say_what_is_wrong(
    source: str | None, messages: list[dict[str, Any]], options: dict[str, bool], message: str
):
    with pytest.raises(InvalidRequest, match=message):
        ChatTemplate(source, SPECIAL).render(messages, **options)
