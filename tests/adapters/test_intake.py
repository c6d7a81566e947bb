"""From two files to a manifest: what is refused, with which code, and what the manifest says."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraplex.adapters.errors import AdapterCorrupt, AdapterRefused
from loraplex.adapters.intake import inspect
from loraplex.adapters.limits import Limits
from loraplex.adapters.manifest import AdapterManifest
from loraplex.engine.api import ModuleShape

PREFIX = "base_model.model."
Q0_A = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
Q0_B = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"

ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"

Change = Callable[[Any], None]


def tensors(**changes: Any) -> Change:
    """Replace (or with None drop) tensors: A or B of layer 0's q_proj, or any by its name."""

    def change(draft: Any) -> None:
        for name, value in changes.items():
            key = {"A": Q0_A, "B": Q0_B}.get(name, name)
            if value is None:
                del draft.tensors[key]
            else:
                draft.tensors[key] = value

    return change


def config(**changes: Any) -> Change:
    return lambda draft: draft.config.update(changes)


def renamed(old: str, new: str) -> Change:
    def change(draft: Any) -> None:
        draft.tensors = {re.sub(old, new, name): t for name, t in draft.tensors.items()}

    return change


def added(name: str, *shape: int) -> Change:
    return tensors(**{PREFIX + name: np.ones(shape, "f4")})


def both(*changes: Change) -> Change:
    def change(draft: Any) -> None:
        for one in changes:
            one(draft)

    return change


def poisoned(value: float) -> Change:
    def change(draft: Any) -> None:
        draft.tensors[Q0_B][3, 1] = value

    return change


def edited(edit: Callable[[bytes], bytes]) -> Change:
    def change(draft: Any) -> None:
        draft.edit_file = edit

    return change


def ones(*shape: int, kind: str = "f4") -> Any:
    return np.ones(shape, kind)


BROKEN: dict[str, tuple[Change, set[str]]] = {
    "missing A": (tensors(A=None), {"pair_incomplete"}),
    "missing B": (tensors(B=None), {"pair_incomplete"}),
    "missing both": (tensors(A=None, B=None), {"tensor_missing"}),
    "A transposed": (tensors(A=ones(32, 4)), {"shape_mismatch", "rank_mismatch"}),
    "A for another width": (tensors(A=ones(4, 31)), {"shape_mismatch"}),
    "B for another width": (tensors(B=ones(33, 4)), {"shape_mismatch"}),
    "A of one dimension": (tensors(A=ones(128)), {"shape_mismatch"}),
    "A of three dimensions": (tensors(A=ones(4, 32, 1)), {"shape_mismatch"}),
    "A of no dimension": (tensors(A=np.float32(1).reshape(())), {"shape_mismatch"}),
    "A empty": (tensors(A=ones(0, 32)), {"shape_mismatch", "rank_mismatch"}),
    "ranks of A and B differ": (tensors(A=ones(3, 32)), {"rank_mismatch"}),
    "another rank than the config's": (config(r=5), {"rank_mismatch"}),
    "another rank than rank_pattern's": (
        config(rank_pattern={"0.self_attn.q_proj": 2}),
        {"rank_mismatch"},
    ),
    "rank beyond the limit": (config(r=513), {"rank_too_large", "rank_mismatch"}),
    "integers": (tensors(A=ones(4, 32, kind="i4")), {"dtype_unsupported"}),
    "NaN": (poisoned(math.nan), {"not_finite"}),
    "infinity": (poisoned(-math.inf), {"not_finite"}),
    "unknown module": (
        renamed("q_proj", "z_proj"),
        {"module_unknown", "tensor_missing"},
    ),
    "layer beyond the model": (
        renamed(r"layers\.0", "layers.99"),
        {"module_unknown", "tensor_missing"},
    ),
    "made for a model without head": (
        renamed(r"model\.model\.layers", "model.layers"),
        {"module_unknown", "tensor_missing"},
    ),
    "a module the config does not name": (
        config(target_modules=["v_proj"]),
        {"tensor_untargeted"},
    ),
    "a target without tensors": (
        config(target_modules=["q_proj", "v_proj", "up_proj"]),
        {"tensor_missing"},
    ),
    "a target this model lacks": (
        config(target_modules=["q_proj", "v_proj", "c_attn"]),
        {"target_unmatched"},
    ),
    "the same tensor twice": (
        added("model.layers.0.self_attn.q_proj.lora_A.default.weight", 4, 32),
        {"tensor_duplicate"},
    ),
    "a magnitude without DoRA": (
        added("model.layers.0.self_attn.q_proj.lora_magnitude_vector", 32),
        {"tensor_unsupported"},
    ),
    "DoRA without a magnitude": (config(use_dora=True), {"tensor_missing"}),
    "a bias of B without lora_bias": (
        added("model.layers.0.self_attn.q_proj.lora_B.bias", 32),
        {"tensor_unsupported"},
    ),
    "lora_bias without a bias of B": (config(lora_bias=True), {"tensor_missing"}),
    "a bias that the model lacks": (
        both(added("model.layers.0.self_attn.q_proj.base_layer.bias", 32), config(bias="all")),
        {"tensor_unsupported"},
    ),
    "an adapted embedding that the config does not name": (
        both(
            added("model.embed_tokens.lora_embedding_A", 4, 64),
            added("model.embed_tokens.lora_embedding_B", 32, 4),
        ),
        {"tensor_untargeted"},
    ),
    "half of an adapted embedding": (
        added("model.embed_tokens.lora_embedding_A", 4, 64),
        {"pair_incomplete", "tensor_untargeted"},
    ),
    "LoRA factors of a linear module for the embedding": (
        added("model.embed_tokens.lora_A.weight", 4, 64),
        {"tensor_unsupported"},
    ),
    "a head for another vocabulary": (added("lm_head.weight", 70, 32), {"shape_mismatch"}),
    "a saved norm that the config does not name": (
        added("model.norm.weight", 32),
        {"tensor_unsupported"},
    ),
    "a saved linear that the config does not name": (
        added("model.layers.0.mlp.up_proj.weight", 48, 32),
        {"tensor_unsupported"},
    ),
    "a saved module without tensor": (config(modules_to_save=["lm_head"]), {"tensor_missing"}),
    "a saved module that is none": (config(modules_to_save=["score"]), {"target_unmatched"}),
    "saved whole layers": (config(modules_to_save=["layers.1"]), {"feature_unsupported"}),
    "saved and adapted": (config(modules_to_save=["proj"]), {"module_conflict"}),
    "DoRA of the head": (
        config(use_dora=True, target_modules=["q_proj", "v_proj", "lm_head"]),
        {"feature_unsupported"},
    ),
    "lora_bias of the head": (
        config(lora_bias=True, target_modules=["q_proj", "v_proj", "lm_head"]),
        {"feature_unsupported"},
    ),
    "tokens without rows": (config(trainable_token_indices=[3]), {"tensor_missing"}),
    "rows without tokens": (added(ROWS, 2, 32), {"tensor_unsupported"}),
    "fewer rows than tokens": (
        both(added(ROWS, 1, 32), config(trainable_token_indices=[3, 4])),
        {"shape_mismatch"},
    ),
    "rows of another width": (
        both(added(ROWS, 2, 31), config(trainable_token_indices=[3, 4])),
        {"shape_mismatch"},
    ),
    "a token that the model lacks": (
        both(added(ROWS, 1, 32), config(trainable_token_indices=[64])),
        {"token_unknown"},
    ),
    "tokens of a norm": (
        both(added(ROWS, 1, 32), config(trainable_token_indices={"norm": [6]})),
        {"target_unmatched"},
    ),
    "tokens of a head of its own": (
        config(trainable_token_indices={"lm_head": [6]}),
        {"feature_unsupported"},
    ),
    "tokens of an adapted embedding": (
        config(trainable_token_indices=[6], target_modules=["q_proj", "v_proj", "embed_tokens"]),
        {"module_conflict"},
    ),
    "tokens of a saved embedding": (
        config(trainable_token_indices=[6], modules_to_save=["embed_tokens"]),
        {"module_conflict"},
    ),
    "a tensor of nothing": (added("hello", 3), {"tensor_unsupported"}),
    "another adapter's name": (
        renamed("lora_A.weight", "lora_A.mine.weight"),
        {"tensor_unsupported", "pair_incomplete"},
    ),
    "truncated": (edited(lambda data: data[: len(data) // 2]), {"file_truncated"}),
    "trailing bytes": (edited(lambda data: data + b"1234"), {"trailing_bytes"}),
    "header length a lie": (
        edited(lambda data: struct.pack("<Q", 2**62) + data[8:]),
        {"header_truncated"},
    ),
    "no file to speak of": (edited(lambda data: b""), {"header_truncated"}),
}


def refusal(folder: Path, modules: list[ModuleShape], limits: Limits | None = None) -> Any:
    with pytest.raises(AdapterRefused) as refused:
        inspect(folder, modules, limits)
    return refused.value


@pytest.mark.parametrize("kind", BROKEN)
def test_broken(kind: str, draft: Any, tmp_path: Path, modules: list[ModuleShape]) -> None:
    change, codes = BROKEN[kind]
    change(draft)
    refused = refusal(draft.write(tmp_path), modules)
    assert {p.code for p in refused.problems} == codes
    assert all(p.file and 15 < len(p.message) < 400 for p in refused.problems)
    json.dumps([p.to_dict() for p in refused.problems])


def test_a_wrong_shape_names_tensor_expected_and_actual(
    draft: Any, tmp_path: Path, modules: list[ModuleShape]
) -> None:
    draft.tensors[Q0_B] = ones(33, 4)
    (problem,) = refusal(draft.write(tmp_path), modules).problems
    assert problem.to_dict() == {
        "code": "shape_mismatch",
        "message": problem.message,
        "file": "adapter_model.safetensors",
        "tensor": Q0_B,
        "expected": "[32, rank]",
        "actual": "[33, 4]",
    }


def test_all_problems_of_both_files_at_once(
    draft: Any, tmp_path: Path, modules: list[ModuleShape]
) -> None:
    draft.config |= {"use_qalora": True, "surprise": 1, "target_modules": ["q_proj", "v_proj", "x"]}
    del draft.tensors[Q0_B]
    poisoned_name = f"{PREFIX}model.layers.1.self_attn.v_proj.lora_A.weight"
    draft.tensors[poisoned_name][0, 0] = math.nan
    refused = refusal(draft.write(tmp_path), modules)
    assert {p.code for p in refused.problems} == {
        "feature_unsupported",
        "key_unknown",
        "target_unmatched",
        "pair_incomplete",
        "not_finite",
    }
    assert f"and {len(refused.problems) - 1} more" in refused.message


def test_tensors_are_checked_even_if_the_config_is_unreadable(
    draft: Any, tmp_path: Path, modules: list[ModuleShape]
) -> None:
    draft.raw_config = b"{"
    del draft.tensors[Q0_B]
    codes = [p.code for p in refusal(draft.write(tmp_path), modules).problems]
    assert codes == ["config_not_json", "pair_incomplete"]


def test_missing_files(tmp_path: Path, modules: list[ModuleShape]) -> None:
    codes = [p.code for p in refusal(tmp_path, modules).problems]
    assert codes == ["config_missing", "weights_missing"]


def test_limits_of_the_caller(draft: Any, tmp_path: Path, modules: list[ModuleShape]) -> None:
    draft.write(tmp_path)
    refused = refusal(tmp_path, modules, Limits(max_rank=2))
    assert [p.code for p in refused.problems] == ["rank_too_large"]
    refused = refusal(tmp_path, modules, Limits(max_config_bytes=10))
    assert [p.code for p in refused.problems] == ["config_too_large"]


def test_the_manifest(draft: Any, tmp_path: Path, modules: list[ModuleShape]) -> None:
    draft.config |= {"rank_pattern": {"1.self_attn.q_proj": 20}, "use_rslora": True}
    draft.config["base_model_name_or_path"] = "org/tiny"
    path = "model.layers.1.self_attn.q_proj"
    draft.tensors[f"{PREFIX}{path}.lora_A.weight"] = ones(20, 32)
    draft.tensors[f"{PREFIX}{path}.lora_B.weight"] = ones(32, 20)
    manifest = inspect(draft.write(tmp_path), modules, base_model="/models/Tiny/")
    assert (manifest.rank, manifest.pages, manifest.alpha) == (20, 2, 8)
    assert manifest.scaling == 8 / math.sqrt(4)
    assert manifest.target_modules == ("q_proj", "v_proj")
    numbers = sum(t.size for t in draft.tensors.values())
    assert (manifest.num_parameters, manifest.size_bytes) == (numbers, numbers * 4)
    assert (manifest.dtype, manifest.base_model, manifest.warnings) == ("float32", "org/tiny", ())
    assert re.fullmatch("[0-9a-f]{64}", manifest.digest)
    module = next(m for m in manifest.modules if m.path == path)
    assert (module.rank, module.scaling) == (20, 8 / math.sqrt(20))
    assert (module.in_features, module.out_features) == (32, 32)
    assert AdapterManifest.from_json(manifest.to_json()) == manifest


def test_an_activated_lora(draft: Any, tmp_path: Path, modules: list[ModuleShape]) -> None:
    plain = inspect(draft.write(tmp_path), modules)
    draft.config["alora_invocation_tokens"] = [5, 3]
    manifest = inspect(draft.write(tmp_path), modules, vocab_size=6)
    assert manifest.invocation_tokens == (5, 3)
    assert manifest.features == ("alora",)
    assert manifest.digest != plain.digest
    assert AdapterManifest.from_json(manifest.to_json()) == manifest
    with pytest.raises(AdapterRefused) as refused:
        inspect(draft.write(tmp_path), modules, vocab_size=5)
    [problem] = refused.value.problems
    assert (problem.code, problem.expected, problem.actual) == (
        "invocation_impossible",
        "below 5",
        "5",
    )


@pytest.mark.parametrize("feature", ["use_dora", "lora_bias"])
def test_an_activated_lora_has_a_and_b_and_nothing_else(
    feature: str, draft: Any, tmp_path: Path, modules: list[ModuleShape]
) -> None:
    """peft refuses DoRA with it; the bias of B it would apply from the tokens on, we do not yet."""
    more = "lora_magnitude_vector" if feature == "use_dora" else "lora_B.bias"
    draft.config[feature] = True
    for name, b in list(draft.tensors.items()):
        if name.endswith("lora_B.weight"):
            draft.tensors[name.replace("lora_B.weight", more)] = np.ones(len(b), "f4")
    assert inspect(draft.write(tmp_path), modules).features
    draft.config["alora_invocation_tokens"] = [5, 3]
    with pytest.raises(AdapterRefused) as refused:
        inspect(draft.write(tmp_path), modules)
    [problem] = refused.value.problems
    assert problem.code == "feature_unsupported"
    assert feature.removeprefix("use_") in problem.message


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"format": 2}', b'{"format": 1}'])
def test_a_manifest_that_is_none(raw: bytes) -> None:
    with pytest.raises(AdapterCorrupt):
        AdapterManifest.from_json(raw)


def test_a_store_filled_for_another_model(
    draft: Any, tmp_path: Path, modules: list[ModuleShape]
) -> None:
    manifest = inspect(draft.write(tmp_path), modules)
    assert manifest.mismatches(modules) == []
    shallow = [m for m in modules if ".2." not in m.path]
    assert {p.code for p in manifest.mismatches(shallow)} == {"base_model_mismatch"}
    wide = [ModuleShape(m.path, m.in_features * 2, m.out_features) for m in modules]
    assert len(manifest.mismatches(wide)) == len(manifest.modules)


def test_warnings(draft: Any, tmp_path: Path, modules: list[ModuleShape]) -> None:
    def codes(model: str | None = None) -> list[str]:
        folder = draft.write(tmp_path)
        return [p.code for p in inspect(folder, modules, base_model=model).warnings]

    draft.config["base_model_name_or_path"] = "org/tiny"
    assert codes("someone/tiny") == []
    assert codes("org/other") == ["base_model_differs"]
    draft.config["alpha_pattern"] = {"qproj": 3}
    assert codes() == ["pattern_unmatched"]
    del draft.config["alpha_pattern"]
    draft.tensors[Q0_B] *= 0
    assert codes() == ["partly_no_effect"]
    for name in draft.tensors:
        if "lora_B" in name:
            draft.tensors[name] *= -0.0
    assert codes() == ["no_effect"]


def test_biases_that_were_meant_and_not_saved(draft: Any, tmp_path: Path) -> None:
    biased = [
        ModuleShape(f"model.layers.{layer}.self_attn.{name}", 32, size, bias=True)
        for layer in range(3)
        for name, size in (("q_proj", 32), ("v_proj", 16))
    ]
    folder = draft.write(tmp_path)
    assert inspect(folder, biased).warnings == ()
    draft.config["bias"] = "lora_only"
    folder = draft.write(tmp_path)
    assert [p.code for p in inspect(folder, biased).warnings] == ["bias_missing"]


# --- the digest ----------------------------------------------------------------------------------


def reorder(draft: Any) -> None:
    draft.tensors = dict(reversed(draft.tensors.items()))


SAME: dict[str, Change] = {
    "tensors in another order": reorder,
    "keys in another order": lambda d: setattr(d, "config", dict(reversed(d.config.items()))),
    "no prefix": renamed(r"base_model\.model\.", ""),
    "with the adapter's name": renamed(r"lora_(.)\.weight", r"lora_\1.default.weight"),
    "other training settings": config(lora_dropout=0.3, inference_mode=True, peft_version="9"),
    "alpha as a float": config(lora_alpha=8.0),
    "targets in another order": config(target_modules=["v_proj", "q_proj"]),
    "padding in the header": edited(
        lambda data: (
            struct.pack("<Q", struct.unpack("<Q", data[:8])[0] + 3)
            + data[8:].replace(b"}}", b"}}   ", 1)
        )
    ),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_digest_is_of_the_meaning(
    kind: str, draft: Any, tmp_path: Path, modules: list[ModuleShape]
) -> None:
    before = inspect(draft.write(tmp_path), modules).digest
    SAME[kind](draft)
    assert inspect(draft.write(tmp_path), modules).digest == before


def flip(draft: Any) -> None:
    draft.tensors[Q0_A].view("u4")[0, 0] ^= 1


def swap(draft: Any) -> None:
    other = Q0_A.replace("layers.0", "layers.1")
    draft.tensors[Q0_A], draft.tensors[other] = draft.tensors[other], draft.tensors[Q0_A]


def narrower(draft: Any) -> None:
    draft.tensors[Q0_A] = draft.tensors[Q0_A].astype("f2")


OTHER: dict[str, Change] = {
    "one bit": flip,
    "two tensors swapped": swap,
    "another dtype": narrower,
    "another alpha": config(lora_alpha=9),
    "rslora": config(use_rslora=True),
}


@pytest.mark.parametrize("kind", OTHER)
def test_the_digest_tells_meanings_apart(
    kind: str, draft: Any, tmp_path: Path, modules: list[ModuleShape]
) -> None:
    before = inspect(draft.write(tmp_path), modules).digest
    OTHER[kind](draft)
    assert inspect(draft.write(tmp_path), modules).digest != before


def test_the_digest_never_changes_between_releases(
    draft: Any, tmp_path: Path, modules: list[ModuleShape]
) -> None:
    """Registries hold digests for years: old adapters must not get a second identity."""
    for i, name in enumerate(sorted(draft.tensors)):
        draft.tensors[name] = np.full(draft.tensors[name].shape, i + 1, "f4")
    manifest = inspect(draft.write(tmp_path), modules)
    assert manifest.digest == ("d6ea7992960efa01904c3cee8278740fd34d89649dbe36f71bc10ef7e4b295f4")
