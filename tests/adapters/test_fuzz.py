"""Whatever a stranger uploads: a manifest or a refusal, never another error; what is taken loads.

Valid adapters of every format are broken in one to four places: keys and values of the config,
names, shapes, types and numbers of tensors, bytes of either file, another adapter's parts, another
base model, the archive around them.
"""

from __future__ import annotations

import io
import json
import math
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.archive import unpack
from loraplex.adapters.config_keys import HARMLESS, REFUSED, USED
from loraplex.adapters.errors import AdapterError, AdapterRefused
from loraplex.adapters.intake import inspect
from loraplex.adapters.limits import Limits
from loraplex.adapters.manifest import MANIFEST_FILE, AdapterManifest
from loraplex.adapters.store import AdapterStore
from loraplex.adapters.tensor_names import PREFIX, Part
from loraplex.adapters.weights import load_weights
from loraplex.engine.api import ModuleShape

HIDDEN, VOCAB, INNER = 8, 12, 10
Q = "model.layers.0.self_attn.q_proj"


def base_model(*, tied: bool = False, fused: bool = False, bias: bool = True) -> list[ModuleShape]:
    """One layer; q, k and v with biases."""
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    found = [ModuleShape("model.embed_tokens", VOCAB, HIDDEN, "embedding")]
    if fused:
        found += [
            ModuleShape(f"{attention}qkv_proj", HIDDEN, 16, bias=bias, parts=(8, 4, 4)),
            ModuleShape(f"{mlp}gate_up_proj", HIDDEN, 2 * INNER, parts=(INNER, INNER)),
        ]
    else:
        for name, size in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
            found.append(ModuleShape(attention + name, HIDDEN, size, bias=bias))
        for name in ("gate_proj", "up_proj"):
            found.append(ModuleShape(mlp + name, HIDDEN, INNER))
    found += [
        ModuleShape(f"{attention}o_proj", HIDDEN, HIDDEN),
        ModuleShape(f"{mlp}down_proj", INNER, HIDDEN),
        ModuleShape("model.layers.0.input_layernorm", HIDDEN, HIDDEN, "norm"),
        ModuleShape("model.layers.0.self_attn.q_norm", 4, 4, "qk_norm"),
        ModuleShape("model.norm", HIDDEN, HIDDEN, "norm"),
        ModuleShape("lm_head", HIDDEN, VOCAB, "head", tied=tied),
    ]
    return found


MODELS = [
    base_model(),
    base_model(tied=True),
    base_model(fused=True),
    base_model(bias=False),
    base_model()[:-1],
]

Tensors = dict[str, tuple[int, ...]]
_QKV = "model.layers.0.self_attn.qkv_proj"


def lora(path: str, inputs: int, outputs: int, rank: int = 2) -> Tensors:
    return {f"{path}.lora_A.weight": (rank, inputs), f"{path}.lora_B.weight": (outputs, rank)}


_LORA_Q = lora(Q, HIDDEN, 8)
_EMBEDDING_LORA = {
    "model.embed_tokens.lora_embedding_A": (2, VOCAB),
    "model.embed_tokens.lora_embedding_B": (HIDDEN, 2),
}
_ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"
# name -> base model, config, shapes of the tensors
SEEDS: dict[str, tuple[int, dict[str, Any], Tensors]] = {
    "plain": (0, {}, _LORA_Q),
    "aLoRA": (0, {"alora_invocation_tokens": [1, 2]}, _LORA_Q),
    "DoRA": (0, {"use_dora": True}, {**_LORA_Q, f"{Q}.lora_magnitude_vector": (8,)}),
    "biases": (
        0,
        {"bias": "all", "lora_bias": True},
        {
            **_LORA_Q,
            f"{Q}.lora_B.bias": (8,),
            f"{Q}.base_layer.bias": (8,),
            "model.layers.0.self_attn.k_proj.bias": (4,),
        },
    ),
    "tables": (
        1,
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {
            **_LORA_Q,
            **_EMBEDDING_LORA,
            **lora("lm_head", HIDDEN, VOCAB),
            "lm_head.base_layer.weight": (VOCAB, HIDDEN),
            "model.embed_tokens.base_layer.weight": (VOCAB, HIDDEN),
        },
    ),
    "tables, tied": (
        1,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {**_LORA_Q, **_EMBEDDING_LORA, **lora("lm_head", HIDDEN, VOCAB)},
    ),
    "saved": (
        0,
        {"modules_to_save": ["lm_head", "model.norm", "0.mlp.up_proj", "k_proj"]},
        {
            **_LORA_Q,
            "lm_head.weight": (VOCAB, HIDDEN),
            "model.norm.weight": (HIDDEN,),
            "model.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
            "model.layers.0.self_attn.k_proj.weight": (4, HIDDEN),
            "model.layers.0.self_attn.k_proj.bias": (4,),
        },
    ),
    "tokens": (1, {"trainable_token_indices": [7, 3]}, {**_LORA_Q, _ROWS: (2, HIDDEN)}),
    "fused": (
        2,
        {"target_modules": ["qkv_proj"], "use_dora": True, "bias": "lora_only"},
        {
            **lora(_QKV, HIDDEN, 16),
            f"{_QKV}.lora_magnitude_vector": (16,),
            f"{_QKV}.base_layer.bias": (16,),
        },
    ),
    "fused for a model with the parts apart": (
        0,
        {"target_modules": ["qkv_proj"]},
        lora(_QKV, HIDDEN, 16),
    ),
}
DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2", "I32": "<i4"}


class Upload:
    """An adapter to break: the parts of its two files, and what is done to their bytes."""

    def __init__(self, kind: str) -> None:
        model, config, shapes = SEEDS[kind]
        self.modules: list[ModuleShape] = MODELS[model]
        self.config: dict[str, Any] = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            **config,
        }
        rng = np.random.default_rng(5)
        self.tensors: dict[str, tuple[str, np.ndarray[Any, Any]]] = {
            PREFIX + name: ("F32", rng.normal(size=shape).astype("<f4"))
            for name, shape in shapes.items()
        }
        self.edit_config: Callable[[bytes], bytes] = lambda raw: raw
        self.edit_weights: Callable[[bytes], bytes] = lambda raw: raw

    def files(self) -> dict[str, bytes]:
        header, body = {}, b""
        for name, (dtype, array) in self.tensors.items():
            data = array.tobytes()
            span = [len(body), len(body) + len(data)]
            header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
            body += data
        raw = json.dumps(header).encode()
        weights = struct.pack("<Q", len(raw)) + raw + body
        return {
            "adapter_config.json": self.edit_config(json.dumps(self.config).encode()),
            "adapter_model.safetensors": self.edit_weights(weights),
        }


NAMES = ["q_proj", "k_proj", "lm_head", "embed_tokens", "norm", "qkv_proj", "mlp", "layers.0", ""]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, 10**400, math.inf, "", "all", "lora_only", "mica", ".*",
    "all-linear", "(", "[", [], {}, [[]], {"": []}, {"q_proj": 3}, [True], "x" * 3000,
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.sampled_from(NAMES),
    st.lists(st.sampled_from([*NAMES, 3, None, -1, "(a+)+$", 2**70]), max_size=4),
    st.lists(st.integers(-2, 40), max_size=4),
    st.dictionaries(st.sampled_from([*NAMES, ".*"]), st.lists(st.integers(0, 13), max_size=3)),
    st.dictionaries(st.sampled_from([*NAMES, "(", ".*"]), st.integers(-1, 5), max_size=3),
)
KEYS = st.sampled_from([*sorted(USED | HARMLESS | set(REFUSED)), "rotate_by", ""])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 12, 16]), max_size=3)
PATHS = [m.path for model in MODELS[:3] for m in model] + ["", "x", "model", Q + ".lora_A"]
Breaks = Callable[[Upload, st.DataObject], None]


def set_key(upload: Upload, data: st.DataObject) -> None:
    upload.config[data.draw(KEYS)] = data.draw(VALUES)


def drop_key(upload: Upload, data: st.DataObject) -> None:
    upload.config.pop(data.draw(st.sampled_from(sorted(upload.config))), None)


def drop_tensor(upload: Upload, data: st.DataObject) -> None:
    if upload.tensors:
        del upload.tensors[data.draw(st.sampled_from(sorted(upload.tensors)))]


def rename_tensor(upload: Upload, data: st.DataObject) -> None:
    if upload.tensors:
        tensor = upload.tensors.pop(data.draw(st.sampled_from(sorted(upload.tensors))))
        part = data.draw(st.sampled_from([*Part, "lora_A.x.weight", "lora_C.weight", "hello"]))
        prefix = data.draw(st.sampled_from([PREFIX, "", "model."]))
        upload.tensors[f"{prefix}{data.draw(st.sampled_from(PATHS))}.{part}"] = tensor


def add_tensor(upload: Upload, data: st.DataObject) -> None:
    part, path = data.draw(st.sampled_from(list(Part))), data.draw(st.sampled_from(PATHS))
    shape = data.draw(SHAPES)
    upload.tensors[f"{PREFIX}{path}.{part}"] = ("F32", np.ones(shape, "<f4"))


def reshape_tensor(upload: Upload, data: st.DataObject) -> None:
    if upload.tensors:
        name = data.draw(st.sampled_from(sorted(upload.tensors)))
        dtype = data.draw(st.sampled_from(sorted(DTYPES)))
        upload.tensors[name] = (dtype, np.ones(data.draw(SHAPES), DTYPES[dtype]))


def retype_tensor(upload: Upload, data: st.DataObject) -> None:
    if upload.tensors:
        name = data.draw(st.sampled_from(sorted(upload.tensors)))
        dtype = data.draw(st.sampled_from(sorted(DTYPES)))
        shape = upload.tensors[name][1].shape
        value = data.draw(st.sampled_from([0, 1, 30000]))
        upload.tensors[name] = (dtype, np.full(shape, value).astype(DTYPES[dtype]))


def poison_tensor(upload: Upload, data: st.DataObject) -> None:
    if upload.tensors:
        name = data.draw(st.sampled_from(sorted(upload.tensors)))
        value = data.draw(st.sampled_from([math.nan, math.inf, -0.0, 1e39, 1e-45, 3.4e38, 7e4]))
        if upload.tensors[name][1].size:
            with np.errstate(all="ignore"):
                upload.tensors[name] = ("F64", upload.tensors[name][1].astype("<f8"))
                upload.tensors[name][1].flat[0] = value


def borrow(upload: Upload, data: st.DataObject) -> None:
    other = Upload(data.draw(st.sampled_from(sorted(SEEDS))))
    what = data.draw(st.sampled_from(["config", "tensors", "both"]))
    if what != "tensors":
        upload.config |= other.config
    if what != "config":
        upload.tensors |= other.tensors


def other_model(upload: Upload, data: st.DataObject) -> None:
    upload.modules = data.draw(st.sampled_from(MODELS))


def edit_bytes(upload: Upload, data: st.DataObject) -> None:
    which = data.draw(st.sampled_from(["edit_config", "edit_weights"]))
    where, junk = data.draw(st.floats(0, 1)), data.draw(st.binary(min_size=1, max_size=9))
    how = data.draw(st.sampled_from(["cut", "insert", "overwrite", "header"]))

    def edit(raw: bytes) -> bytes:
        at = int(where * len(raw) * (0.2 if how == "header" else 1))
        if how == "cut":
            return raw[:at]
        return raw[:at] + junk + raw[at + (0 if how == "insert" else len(junk)) :]

    setattr(upload, which, edit)


BREAKS: list[Breaks] = [
    set_key, set_key, drop_key, drop_tensor, rename_tensor, add_tensor, reshape_tensor,
    retype_tensor, poison_tensor, borrow, borrow, other_model, edit_bytes,
]  # fmt: skip


def check(folder: Path, modules: list[ModuleShape]) -> AdapterManifest | None:
    """The property: None if it was refused."""
    try:
        manifest = inspect(folder, modules, vocab_size=VOCAB)
    except AdapterRefused as error:
        refused = error
    else:
        check_loads(manifest, folder, modules)
        return manifest
    assert 1 <= len(refused.problems) <= 101
    for problem in refused.problems:
        assert problem.code
        assert len(json.dumps(problem.to_dict())) < 8000
    return None


def check_loads(manifest: AdapterManifest, folder: Path, modules: list[ModuleShape]) -> None:
    assert AdapterManifest.from_json(manifest.to_json()) == manifest
    assert manifest.mismatches(modules) == []
    (folder / MANIFEST_FILE).write_bytes(manifest.to_json())
    for dtype in (torch.float32, torch.float16):
        try:
            loaded = load_weights(folder, dtype)
        except AdapterError as error:
            if error.code != "adapter_overflow":  # finite in its own type, but not in ours
                raise
            continue
        assert loaded.extras.nbytes == manifest.extras_bytes(dtype.itemsize)
        assert all(tensor.isfinite().all() for tensor in loaded.extras.tensors())
        assert {m.rank for m in loaded.modules.values()} == {m.rank for m in manifest.modules}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


@pytest.mark.parametrize("kind", SEEDS)
def test_the_seeds_are_taken(kind: str, tmp_path: Path) -> None:
    """Otherwise what follows would break what is broken already."""
    upload = Upload(kind)
    assert check(write(tmp_path, upload.files()), upload.modules) is not None


@settings(max_examples=250, deadline=None)
@given(kind=st.sampled_from(sorted(SEEDS)), data=st.data())
def test_a_broken_upload_is_a_refusal_or_loads(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    upload = Upload(kind)
    for change in data.draw(st.lists(st.sampled_from(BREAKS), min_size=1, max_size=4)):
        change(upload, data)
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    check(write(folder, upload.files()), upload.modules)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(SEEDS)), data=st.data())
def test_a_broken_archive_is_a_refusal_or_loads(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    upload = Upload(kind)
    raw = data.draw(st.sampled_from([zipped, tarred]))(upload.files())
    for _ in range(data.draw(st.integers(0, 3))):
        at, junk = data.draw(st.integers(0, len(raw))), data.draw(st.binary(max_size=6))
        raw = raw[:at] + junk + raw[at + len(junk) :]
    base = tmp_path_factory.getbasetemp()
    archive = base / "fuzz.archive"
    archive.write_bytes(raw)
    store = AdapterStore(base / "fuzz-store")
    with store.staging() as staging:
        try:
            unpack(archive, staging)
        except AdapterRefused:
            return
        check(staging.path, upload.modules)


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return out.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, raw in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return out.getvalue()


# --- time and memory ----------------------------------------------------------------------------


def deep_model() -> list[ModuleShape]:
    return [
        ModuleShape(m.path.replace("layers.0.", f"layers.{i}."), m.in_features, m.out_features,
                    m.kind, m.bias)
        for i in range(80)
        for m in base_model()
        if i == 0 or ".layers." in m.path
    ]  # fmt: skip


HOSTILE: dict[str, dict[str, Any]] = {
    "as many targets as may be": {"target_modules": [f"x{i}_proj" for i in range(4096)]},
    "as many targets that match": {"target_modules": ["q_proj"] + ["layers.1"] * 4095},
    "as many saved modules as may be": {"modules_to_save": [f"m{i}" for i in range(512)]},
    "saved modules that match all": {"modules_to_save": ["m", "j", "d"] * 170},
    "as many tokens as a config holds": {"trainable_token_indices": list(range(140_000))},
    "tokens of many modules": {
        "trainable_token_indices": {f"e{i}": list(range(8000)) for i in range(16)}
    },
    "patterns for everything": {"rank_pattern": {f"m{i}.q_proj": 2 for i in range(512)}},
    "a regex of many turns": {"target_modules": "(.*){20}q_proj(.*){20}x"},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_config_costs_little(kind: str, tmp_path: Path) -> None:
    """Seconds and megabytes: an attack would go past these bounds by orders of magnitude."""
    upload = Upload("plain")
    upload.config |= HOSTILE[kind]
    folder = write(tmp_path, upload.files())
    modules = deep_model()
    tracemalloc.start()
    started = time.process_time()
    try:
        check(folder, modules)
        assert time.process_time() - started < 20
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()


def test_as_many_tensors_as_may_be_cost_little(tmp_path: Path) -> None:
    upload = Upload("plain")
    tensor = ("F32", np.ones((2, HIDDEN), "<f4"))
    limits = Limits(max_tensors=20_000)
    for i in range(limits.max_tensors - len(upload.tensors)):
        upload.tensors[f"{PREFIX}model.layers.{i}.self_attn.q_proj.lora_A.weight"] = tensor
    folder = write(tmp_path, upload.files())
    started = time.process_time()
    with pytest.raises(AdapterRefused):
        inspect(folder, deep_model(), limits)
    assert time.process_time() - started < 20
