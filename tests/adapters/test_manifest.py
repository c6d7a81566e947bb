"""The manifest between releases, what it tells of an adapter, and which models it fits."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from loraplex.adapters.errors import AdapterCorrupt
from loraplex.adapters.fused import Rows
from loraplex.adapters.manifest import AdapterManifest
from loraplex.adapters.manifest_parts import ManifestModule, ManifestRows, Replacement
from loraplex.engine.api import ModuleShape

Q0 = "model.layers.0.self_attn.q_proj"
# As the release before DoRA, biases, heads and the like wrote it.
OLD = (
    b'{"alpha":2.0,"base_model":null,'
    b'"digest":"5422020d4d1d9ccc39a45e373ea6b9d1f6c022197fc7459a0a1092e165f8bfa1",'
    b'"dtype":"float32","files":{"adapter_config.json":{"sha256":'
    b'"215766150ed85060fb7708627b463e64196b7d46c9fc7007b15a5e3823797e5e","size_bytes":76},'
    b'"adapter_model.safetensors":{"sha256":'
    b'"bdfcda9e5ad6d4a7cc4f761f14659df1b5d53999f421a1d0f80654cd50bc4f56","size_bytes":283}},'
    b'"format":1,"modules":[{"alpha":2.0,"in_features":2,'
    b'"lora_a":"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",'
    b'"lora_b":"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",'
    b'"out_features":4,"path":"model.layers.0.self_attn.q_proj","rank":1,"scaling":2.0}],'
    b'"num_parameters":6,"rank":1,"scaling":2.0,"size_bytes":24,"target_modules":["q_proj"],'
    b'"warnings":[]}'
)
MODEL = [
    ModuleShape("model.embed_tokens", 50, 2, "embedding"),
    ModuleShape(Q0, 2, 4, bias=True),
    ModuleShape("model.norm", 2, 2, "norm"),
    ModuleShape("lm_head", 2, 50, "head"),
]


def table(path: str, inputs: int, outputs: int) -> ManifestModule:
    return ManifestModule(path, 3, 6.0, 2.0, inputs, outputs, "a", "b")


EVERYTHING: dict[str, Any] = {
    "modules": (ManifestModule(Q0, 1, 2.0, 2.0, 2, 4, "a", "b", Rows(0, 4, 8), "m", "c"),),
    "embedding_lora": table("model.embed_tokens", 50, 2),
    "head_lora": table("lm_head", 2, 50),
    "replacements": (
        Replacement("lm_head", "weight", "head", (50, 2), "h"),
        Replacement(Q0, "bias", "linear", (4,), "b", Rows(0, 4, 8)),
        Replacement("model.norm", "weight", "norm", (2,), "n"),
    ),
    "token_rows": ManifestRows((3, 5, 9), (1, 0, 2), 2, "t", in_head=False),
    "tied_head": False,
}


def test_a_manifest_of_an_earlier_release_is_read() -> None:
    manifest = AdapterManifest.from_json(OLD)
    assert manifest.modules[0].path == Q0
    assert manifest.modules[0].magnitude is None
    assert (manifest.pages, manifest.features, manifest.extras_bytes(2)) == (1, (), 0)
    assert not manifest.needs_weight_one
    assert manifest.mismatches(MODEL) == []
    assert AdapterManifest.from_json(manifest.to_json()) == manifest


def test_a_manifest_with_everything_comes_back() -> None:
    manifest = dataclasses.replace(AdapterManifest.from_json(OLD), **EVERYTHING)
    assert AdapterManifest.from_json(manifest.to_json()) == manifest
    assert manifest.mismatches(MODEL) == []


@pytest.mark.parametrize(
    ("change", "features", "bound", "extra"),
    [
        ({"modules": ()}, (), False, 0),
        ({"modules": EVERYTHING["modules"]}, ("dora", "lora_bias", "fused_projections"), True, 32),
        ({"embedding_lora": EVERYTHING["embedding_lora"]}, ("embed_tokens_lora",), False, 312),
        ({"head_lora": EVERYTHING["head_lora"]}, ("lm_head_lora",), False, 312),
        (
            {"replacements": EVERYTHING["replacements"]},
            ("bias", "full_norm", "full_lm_head"),
            True,
            200 + 16 + 4,
        ),
        ({"token_rows": EVERYTHING["token_rows"]}, ("token_rows",), True, 3 * 2 * 2 + 3 * 8),
    ],
)
def test_what_a_manifest_tells(
    change: dict[str, Any], features: tuple[str, ...], bound: bool, extra: int
) -> None:
    manifest = dataclasses.replace(AdapterManifest.from_json(OLD), **change)
    assert manifest.features == features
    assert manifest.needs_weight_one is bound
    assert manifest.extras_bytes(2) == extra


MISFITS: dict[str, list[ModuleShape]] = {
    "a smaller vocabulary": [ModuleShape("model.embed_tokens", 9, 2, "embedding"), *MODEL[1:]],
    "a wider embedding": [ModuleShape("model.embed_tokens", 50, 3, "embedding"), *MODEL[1:]],
    "no bias": [MODEL[0], ModuleShape(Q0, 2, 4), *MODEL[2:]],
    "no norm": [*MODEL[:2], *MODEL[3:]],
    "a wider norm": [*MODEL[:2], ModuleShape("model.norm", 3, 3, "norm"), *MODEL[3:]],
    "a tied head": [*MODEL[:3], ModuleShape("lm_head", 2, 50, "head", tied=True)],
    "no head": MODEL[:3],
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_model_that_it_does_not_fit(kind: str) -> None:
    manifest = dataclasses.replace(AdapterManifest.from_json(OLD), **EVERYTHING)
    problems = manifest.mismatches(MISFITS[kind])
    assert problems
    assert {p.code for p in problems} == {"base_model_mismatch"}


def test_a_model_with_fused_projections_has_their_parts() -> None:
    manifest = AdapterManifest.from_json(OLD)
    fused = "model.layers.0.self_attn.qkv_proj"
    assert manifest.mismatches([ModuleShape(fused, 2, 8, parts=(4, 2, 2))]) == []
    assert manifest.mismatches([ModuleShape(fused, 2, 8, parts=(2, 2, 4))]) != []


@pytest.mark.parametrize(
    "change",
    [
        {"modules": [{}]},
        {"replacements": [{"path": "x"}]},
        {"replacements": 3},
        {"token_rows": []},
        {"token_rows": {"ids": 3, "order": 3}},
        {"embedding_lora": {"surprise": 1}},
        {"surprise": 1},
    ],
)
def test_a_damaged_manifest(change: dict[str, Any]) -> None:
    with pytest.raises(AdapterCorrupt):
        AdapterManifest.from_json(json.dumps({**json.loads(OLD), **change}).encode())
