"""Every module of a model adapted by PEFT against the same module made of what intake loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.intake import inspect
from loraplex.adapters.manifest import MANIFEST_FILE, AdapterManifest
from loraplex.adapters.weights import LoadedAdapter, load_weights, locate
from loraplex.engine.api import ModuleShape
from loraplex.engine.loader import Checkpoint
from loraplex.engine.model_config import read_model_config
from loraplex.engine.table_digests import TableDigests

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def modules_of(model: Path) -> list[ModuleShape]:
    """As the engine tells them to the platform."""
    config = read_model_config(model)
    with Checkpoint(model) as checkpoint:
        return config.modules(TableDigests(checkpoint, config).result())


def take_in(
    folder: Path, model: Path, dtype: torch.dtype = torch.float32
) -> tuple[AdapterManifest, LoadedAdapter]:
    """Inspect, write the manifest, load: what an upload and a first request do."""
    manifest = inspect(folder, modules_of(model))
    (folder / MANIFEST_FILE).write_bytes(manifest.to_json())
    assert AdapterManifest.from_json(manifest.to_json()) == manifest
    loaded = load_weights(folder, dtype)
    assert manifest.extras_bytes(dtype.itemsize) == loaded.extras.nbytes
    return manifest, loaded


def assert_same(adapted: Any, base: Any, loaded: LoadedAdapter) -> None:
    """adapted: a PeftModel in fp32; base: the untouched model; loaded: in fp32."""
    peft, plain = adapted.base_model.model, dict(base.named_modules())
    extras = loaded.extras
    seen = set()
    with torch.no_grad():
        for path in plain:
            parent, _, name = path.rpartition(".")
            parts = [f"{parent}.{part}" for part in FUSED.get(name, (name,))]
            keys = [locate(part) for part in parts]
            if None not in keys:
                module = peft.get_submodule(path)
                x = torch.randn(5, plain[path].in_features, generator=_seeded())
                sizes = [shape.out_features for shape in _parts(base, plain[path], name)]
                weights = plain[path].weight.split(sizes)
                biases = [None] * len(sizes)
                if plain[path].bias is not None:
                    biases = list(plain[path].bias.split(sizes))
                ours = [
                    _linear(x, loaded, key, weight, bias)
                    for key, weight, bias in zip(keys, weights, biases, strict=True)
                ]
                torch.testing.assert_close(
                    module(x), torch.cat(ours, -1), rtol=2e-5, atol=2e-5, msg=f"{path} differs"
                )
                seen.update(keys)
            elif name.endswith("norm"):
                ours = extras.norms.get(path, plain[path].weight)
                assert torch.equal(peft.get_submodule(path).weight, ours), path
    assert seen >= loaded.modules.keys() | extras.biases.keys() | extras.linears.keys()
    assert extras.norms.keys() <= plain.keys()
    _assert_same_tables(peft, plain, loaded)


def _assert_same_tables(peft: Any, plain: dict[str, Any], loaded: LoadedAdapter) -> None:
    extras = loaded.extras
    with torch.no_grad():
        embedding = plain["model.embed_tokens"].weight
        vocab, hidden = embedding.shape
        head = plain["lm_head"].weight
        embedding = embedding.clone() if extras.embedding is None else extras.embedding.clone()
        head = head.clone() if extras.head is None else extras.head.clone()
        if (rows := extras.token_rows) is not None:
            assert torch.equal(rows.ids, rows.ids.sort().values)
            embedding[rows.ids] = rows.rows
            if rows.in_head:
                head[rows.ids] = rows.rows
        if (lora := extras.embedding_lora) is not None:
            embedding += lora.scaling * lora.at @ lora.bt
        if (lora := extras.head_lora) is not None:
            head += lora.scaling * (lora.at @ lora.bt).T
        theirs = peft.get_submodule("model.embed_tokens")(torch.arange(vocab))
        torch.testing.assert_close(theirs, embedding, rtol=2e-5, atol=2e-5, msg="embedding")
        theirs = peft.get_submodule("lm_head")(torch.eye(hidden)).T
        torch.testing.assert_close(theirs, head, rtol=2e-5, atol=2e-5, msg="head")


def _linear(
    x: Tensor, loaded: LoadedAdapter, key: Any, weight: Tensor, bias: Tensor | None
) -> Tensor:
    extras, lora = loaded.extras, loaded.modules.get(key)
    weight = extras.linears.get(key, weight)
    bias = extras.biases.get(key, bias)
    if lora is not None:
        assert key not in extras.linears
        weight = weight + lora.scaling * lora.bt.T @ lora.a
    y = x @ weight.T
    if key in extras.magnitudes:
        assert lora is not None
        y = y * (extras.magnitudes[key] / weight.norm(dim=1))
    if key in extras.delta_biases:
        y = y + extras.delta_biases[key]
    return y if bias is None else y + bias


def _parts(base: Any, module: Any, name: str) -> list[torch.nn.Linear]:
    """The linear modules that a fused one would be of, on the meta device."""
    config = base.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * head_dim
    sizes = {
        "qkv_proj": [config.num_attention_heads * head_dim, kv, kv],
        "gate_up_proj": [config.intermediate_size] * 2,
    }.get(name, [module.out_features])
    return [torch.nn.Linear(module.in_features, size, device="meta") for size in sizes]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)
