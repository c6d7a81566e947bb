"""Tiny valid PEFT adapters for the fake model, written by hand without torch."""

from __future__ import annotations

import io
import json
import math
import struct
import tarfile
import zipfile
from typing import Any

from loraplex.engine.api import ModuleShape


def config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        **changes,
    }


def weights(
    modules: list[ModuleShape], *, rank: int = 4, fill: float = 0.5, dora: bool = False
) -> bytes:
    header: dict[str, Any] = {}
    data = b""
    for module in modules:
        for factor, shape in (
            ("lora_A.weight", [rank, module.in_features]),
            ("lora_B.weight", [module.out_features, rank]),
            ("lora_magnitude_vector", [module.out_features]),
        )[: 3 if dora else 2]:
            raw = struct.pack("<f", fill) * math.prod(shape)
            header[f"base_model.model.{module.path}.{factor}"] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def zipped(config_json: bytes, weights_file: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("adapter_config.json", config_json)
        archive.writestr("adapter_model.safetensors", weights_file)
    return out.getvalue()


def tarred(config_json: bytes, weights_file: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in (
            ("adapter_config.json", config_json),
            ("adapter_model.safetensors", weights_file),
        ):
            info = tarfile.TarInfo(f"my-adapter/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()
