"""Adapters made byte by byte, without torch: small, quick, and as wrong as a test wants them."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraplex.engine.api import ModuleShape

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS = 32, 4, 2, 8, 48, 3
VOCAB = 64


@pytest.fixture(scope="session")
def modules() -> list[ModuleShape]:
    """What adapters may change of a tiny Llama, in the order of the model."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (HIDDEN, q),
        "self_attn.k_proj": (HIDDEN, kv),
        "self_attn.v_proj": (HIDDEN, kv),
        "self_attn.o_proj": (q, HIDDEN),
        "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
        "mlp.up_proj": (HIDDEN, INTERMEDIATE),
        "mlp.down_proj": (INTERMEDIATE, HIDDEN),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    found = [ModuleShape("model.embed_tokens", VOCAB, HIDDEN, "embedding")]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found += [ModuleShape(prefix + name, *shape) for name, shape in shapes.items()]
        found += [ModuleShape(prefix + name, HIDDEN, HIDDEN, "norm") for name in norms]
    found.append(ModuleShape("model.norm", HIDDEN, HIDDEN, "norm"))
    found.append(ModuleShape("lm_head", HIDDEN, VOCAB, "head"))
    return found


def pack(tensors: dict[str, np.ndarray[Any, Any]], dtypes: dict[str, str] | None = None) -> bytes:
    """A safetensors file, tensors in the given order. `dtypes` overrides the name of a dtype."""
    names = {"float32": "F32", "float16": "F16", "float64": "F64", "uint16": "BF16", "int32": "I32"}
    header, body = {}, b""
    for name, array in tensors.items():
        data = array.tobytes()
        header[name] = {
            "dtype": (dtypes or {}).get(name, names[str(array.dtype)]),
            "shape": list(array.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


@dataclass
class Draft:
    """A valid adapter of rank 4 on q and v; change it, then `write` it."""

    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    raw_config: bytes | None = None
    edit_file: Callable[[bytes], bytes] = lambda data: data

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        config = self.raw_config or json.dumps(self.config).encode()
        (folder / "adapter_config.json").write_bytes(config)
        weights = self.edit_file(pack(self.tensors))
        (folder / "adapter_model.safetensors").write_bytes(weights)
        return folder


@pytest.fixture
def draft(modules: list[ModuleShape]) -> Draft:
    rng = np.random.default_rng(0)
    made = Draft({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"})
    made.config["target_modules"] = ["q_proj", "v_proj"]
    for m in modules:
        if m.path.endswith(("q_proj", "v_proj")):
            a, b = (4, m.in_features), (m.out_features, 4)
            prefix = f"base_model.model.{m.path}"
            made.tensors[f"{prefix}.lora_A.weight"] = rng.normal(size=a).astype(np.float32)
            made.tensors[f"{prefix}.lora_B.weight"] = rng.normal(size=b).astype(np.float32)
    return made


@pytest.fixture(scope="session")
def safetensors_bytes() -> Callable[..., bytes]:
    return pack


@pytest.fixture(scope="session")
def peft_effects() -> Any:
    """The sibling module: importlib import mode gives test folders no package."""
    name = "loraplex_tests_peft_effects"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, Path(__file__).with_name("peft_effects.py")
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
