"""Closed reading of adapter_config.json: what is used, what passes, what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from loraplex.adapters.config import parse_config, read_config
from loraplex.adapters.config_keys import HARMLESS, REFUSED, USED
from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.limits import Limits
from loraplex.engine.api import ModuleShape

BASE: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def codes(raw: Any) -> list[str]:
    return [p.code for p in read_config(raw)[1]]


def test_every_key_of_peft_is_sorted() -> None:
    """Fails when a new PEFT brings a key: read what it does, then put it into a table."""
    from peft import LoraConfig

    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    assert fields - USED - HARMLESS - set(REFUSED) == set()
    assert len(USED) + len(HARMLESS) + len(REFUSED) == len(USED | HARMLESS | set(REFUSED))


def test_pefts_defaults_are_accepted() -> None:
    from peft import LoraConfig

    raw = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    raw["target_modules"] = list(raw["target_modules"])
    assert codes(json.dumps(raw).encode()) == []


def test_values() -> None:
    config = parse_config({**BASE, "use_rslora": True, "base_model_name_or_path": "org/m"})
    assert (config.r, config.lora_alpha, config.base_model) == (8, 16.0, "org/m")
    assert config.scaling == 16 / math.sqrt(8)
    assert parse_config(BASE).scaling == 2.0


def test_peft_s_defaults_where_the_file_is_silent() -> None:
    config = parse_config({"peft_type": "LORA", "target_modules": "all-linear"})
    assert (config.r, config.lora_alpha, config.use_rslora) == (8, 8.0, False)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_feature_is_refused_by_name_when_on_and_passed_when_off(key: str) -> None:
    _, problems = read_config({**BASE, key: [1]})
    assert [p.code for p in problems] == ["feature_unsupported"]
    assert key in problems[0].message
    for off in (None, False, [], {}, ""):
        assert codes({**BASE, key: off}) == []


@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_a_harmless_key_may_hold_anything(key: str) -> None:
    assert codes({**BASE, key: {"some": ["thing"]}}) == []


@pytest.mark.parametrize("value", [1, 0, "x", [1], {"a": 1}, True])
def test_an_unknown_key_is_refused_by_name(value: Any) -> None:
    _, problems = read_config({**BASE, "rotate_by": value})
    assert [p.code for p in problems] == ["key_unknown"]
    assert "rotate_by" in problems[0].message


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_key_that_is_off_passes(value: Any) -> None:
    assert codes({**BASE, "rotate_by": value}) == []


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_plain_lora(init: Any) -> None:
    assert codes({**BASE, "init_lora_weights": init}) == []


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq"])
def test_initialisations_that_change_the_base(init: str) -> None:
    assert codes({**BASE, "init_lora_weights": init}) == ["feature_unsupported"]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"r": 0}, "rank_invalid"),
    "rank negative": ({"r": -8}, "rank_invalid"),
    "rank huge": ({"r": 10**30}, "rank_invalid"),
    "rank a float": ({"r": 8.0}, "rank_invalid"),
    "rank a string": ({"r": "8"}, "rank_invalid"),
    "rank true": ({"r": True}, "rank_invalid"),
    "rank null": ({"r": None}, "rank_invalid"),
    "alpha 0": ({"lora_alpha": 0}, "alpha_invalid"),
    "alpha text": ({"lora_alpha": "16"}, "alpha_invalid"),
    "alpha true": ({"lora_alpha": True}, "alpha_invalid"),
    "alpha nan": ({"lora_alpha": math.nan}, "alpha_invalid"),
    "alpha infinite": ({"lora_alpha": math.inf}, "alpha_invalid"),
    "alpha huge": ({"lora_alpha": 10**400}, "alpha_invalid"),
    "rslora a number": ({"use_rslora": 1}, "value_invalid"),
    "dora a number": ({"use_dora": 1}, "value_invalid"),
    "dora with MiCA": ({"use_dora": True, "init_lora_weights": "mica"}, "value_invalid"),
    "dora with VeLoRA": ({"use_dora": True, "velora_config": {"rank": 1}}, "value_invalid"),
    "a bias of B text": ({"lora_bias": "all"}, "value_invalid"),
    "a bias of B with dora": ({"lora_bias": True, "use_dora": True}, "value_invalid"),
    "a bias of B with eva": ({"lora_bias": True, "init_lora_weights": "eva"}, "value_invalid"),
    "a bias unknown": ({"bias": "some"}, "value_invalid"),
    "a bias true": ({"bias": True}, "value_invalid"),
    "saved modules text": ({"modules_to_save": "lm_head"}, "value_invalid"),
    "saved modules a regex": ({"modules_to_save": [".*norm"]}, "value_invalid"),
    "saved modules numbers": ({"modules_to_save": [1]}, "value_invalid"),
    "tokens text": ({"trainable_token_indices": "3"}, "value_invalid"),
    "tokens twice": ({"trainable_token_indices": [3, 4, 3]}, "value_invalid"),
    "tokens negative": ({"trainable_token_indices": [-1]}, "value_invalid"),
    "tokens true": ({"trainable_token_indices": [True]}, "value_invalid"),
    "tokens of nothing": ({"trainable_token_indices": {"embed_tokens": []}}, "value_invalid"),
    "tokens of a number": ({"trainable_token_indices": {"embed_tokens": 3}}, "value_invalid"),
    "no targets": ({"target_modules": []}, "no_target"),
    "targets null": ({"target_modules": None}, "no_target"),
    "targets empty": ({"target_modules": ""}, "no_target"),
    "targets a number": ({"target_modules": 3}, "value_invalid"),
    "targets of numbers": ({"target_modules": [1]}, "value_invalid"),
    "an empty target": ({"target_modules": [""]}, "value_invalid"),
    "too many targets": ({"target_modules": ["q_proj"] * 5000}, "value_invalid"),
    "a regex that is none": ({"target_modules": "(q_proj"}, "pattern_invalid"),
    "a regex with look-ahead": ({"target_modules": "(?!v).*q_proj"}, "pattern_invalid"),
    "excludes a number": ({"exclude_modules": 3}, "value_invalid"),
    "layers text": ({"layers_to_transform": "0"}, "value_invalid"),
    "layers true": ({"layers_to_transform": True}, "value_invalid"),
    "layers negative": ({"layers_to_transform": [-1]}, "value_invalid"),
    "layers with a regex": (
        {"layers_to_transform": [0], "target_modules": ".*q_proj"},
        "value_invalid",
    ),
    "layer names alone": ({"layers_pattern": "layers"}, "value_invalid"),
    "layer names a regex": (
        {"layers_to_transform": [0], "layers_pattern": "(a+)+"},
        "value_invalid",
    ),
    "pattern rank 0": ({"rank_pattern": {"q_proj": 0}}, "rank_invalid"),
    "pattern alpha text": ({"alpha_pattern": {"q_proj": "x"}}, "alpha_invalid"),
    "patterns a list": ({"rank_pattern": ["q_proj"]}, "value_invalid"),
    "a pattern that is none": ({"rank_pattern": {"(q": 4}}, "pattern_invalid"),
    "too many regexes": ({"rank_pattern": {f"q+{i}": 4 for i in range(65)}}, "value_invalid"),
    "invocation text": ({"alora_invocation_tokens": "<call>"}, "value_invalid"),
    "invocation of texts": ({"alora_invocation_tokens": ["7"]}, "value_invalid"),
    "invocation of truths": ({"alora_invocation_tokens": [True]}, "value_invalid"),
    "invocation negative": ({"alora_invocation_tokens": [-1]}, "value_invalid"),
    "invocation huge": ({"alora_invocation_tokens": [1] * 2000}, "value_invalid"),
    "not LoRA": ({"peft_type": "PREFIX_TUNING"}, "peft_type_unsupported"),
    "no type": ({"peft_type": None}, "peft_type_unsupported"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "task_type_unsupported"),
    "an unknown initialisation": ({"init_lora_weights": "magic"}, "init_unknown"),
    "a strange initialisation": ({"init_lora_weights": [1]}, "init_unknown"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_values(kind: str) -> None:
    change, code = BROKEN[kind]
    _, problems = read_config({**BASE, **change})
    assert [p.code for p in problems] == [code]
    assert len(problems[0].message) < 300
    with pytest.raises(AdapterRefused):
        parse_config({**BASE, **change})


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "config_not_json"),
        (b"{", "config_not_json"),
        (b"\xff\xfe{}", "config_not_json"),
        (b'{"r": NaN}', "config_not_json"),
        (b'{"r": 1, "r": 2}', "config_not_json"),
        (b'{"x": "\\ud800"}', "config_not_json"),
        (b'{"r": ' + b"9" * 5000 + b"}", "config_not_json"),
        (b'{"a":' * 50_000, "config_not_json"),
        (b"[" * 50_000 + b"]" * 50_000, "config_not_json"),
        (b"[]", "config_invalid"),
        (b"null", "config_invalid"),
        (b"{" + b" " * (1 << 20) + b"}", "config_too_large"),
    ],
)
def test_broken_files(raw: bytes, code: str) -> None:
    config, problems = read_config(raw)
    assert config is None
    assert [p.code for p in problems] == [code]


def test_everything_is_told_at_once() -> None:
    raw = {**BASE, "r": 0, "use_qalora": True, "surprise": 1, "target_modules": "("}
    assert set(codes(raw)) == {
        "rank_invalid",
        "feature_unsupported",
        "key_unknown",
        "pattern_invalid",
    }


def test_a_config_with_a_refused_feature_can_still_be_compared_with_the_tensors() -> None:
    config, problems = read_config({**BASE, "use_qalora": True})
    assert problems
    assert config is not None
    assert config.r == 8


def test_limits_are_the_callers() -> None:
    assert codes(json.dumps(BASE).encode()) == []
    _, problems = read_config(json.dumps(BASE).encode(), Limits(max_config_bytes=10))
    assert [p.code for p in problems] == ["config_too_large"]


TARGETS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"target_modules": ["q_proj", "c_attn"]}, "target_unmatched"),
    "unknown regex": ({"target_modules": ".*c_attn"}, "target_unmatched"),
    "a prefix is no suffix": ({"target_modules": ["proj"]}, "target_unmatched"),
    "a norm": ({"target_modules": ["q_proj", "input_layernorm"]}, "target_unsupported"),
    "a whole block": ({"target_modules": ["mlp"]}, "target_unsupported"),
    "everything": ({"target_modules": ".*"}, "target_unsupported"),
    "all excluded": ({"exclude_modules": ["q_proj"]}, "no_target"),
    "no such layer": ({"layers_to_transform": [0, 9]}, "layer_unmatched"),
    "no such layers": (
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
        "layer_unmatched",
    ),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_that_mean_nothing_here(kind: str, modules: list[ModuleShape]) -> None:
    change, code = TARGETS[kind]
    with pytest.raises(AdapterRefused) as refused:
        parse_config({**BASE, **change}).resolve(modules)
    assert [p.code for p in refused.value.problems] == [code]


def test_an_excluded_norm_is_no_problem(modules: list[ModuleShape]) -> None:
    raw = {**BASE, "target_modules": r".*(q_proj|norm)", "exclude_modules": r".*norm"}
    assert len(parse_config(raw).resolve(modules)) == 3


def test_invocation_tokens() -> None:
    raw = {**BASE, "alora_invocation_tokens": [7, 8, 7]}
    assert parse_config(raw).invocation_tokens == (7, 8, 7)
    for off in (None, []):  # peft takes either for plain LoRA
        assert parse_config({**BASE, "alora_invocation_tokens": off}).canonical() == (
            parse_config(BASE).canonical()
        )
    for order in ([7, 7, 8], [7, 8]):
        other = {**BASE, "alora_invocation_tokens": order}
        assert parse_config(other).canonical() != parse_config(raw).canonical()


def test_canonical_form_ignores_what_does_not_matter() -> None:
    one = {**BASE, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 16.0, "lora_dropout": 0.1}
    two = {**BASE, "target_modules": ["v_proj", "q_proj", "q_proj"], "inference_mode": True}
    assert parse_config(one).canonical() == parse_config(two).canonical()


@pytest.mark.parametrize(
    "change",
    [
        {"r": 4},
        {"lora_alpha": 8},
        {"use_rslora": True},
        {"target_modules": ["k_proj"]},
        {"exclude_modules": ["k_proj"]},
        {"layers_to_transform": [1]},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"alora_invocation_tokens": [1, 2]},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"modules_to_save": ["norm"]},
        {"trainable_token_indices": [3]},
        {"trainable_token_indices": {"embed_tokens": [3]}},
    ],
)
def test_canonical_form_holds_what_matters(change: dict[str, Any]) -> None:
    changed = parse_config({**BASE, **change}).canonical()
    assert changed != parse_config(BASE).canonical()


@pytest.mark.parametrize(
    ("named", "matters"),
    [
        ({}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ".*embed_tokens"}, True),
        ({"modules_to_save": ["model.embed_tokens"]}, True),
    ],
)
def test_tied_tables_matter_where_tables_are_named(named: dict[str, Any], matters: bool) -> None:
    raw = {**BASE, **named}
    tied = parse_config({**raw, "ensure_weight_tying": True}).canonical()
    assert (tied != parse_config(raw).canonical()) is matters
