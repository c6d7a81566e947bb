"""A checkpoint on disk: find it, check that it is whole, read its tensors one by one.

Only safetensors, from a directory or a hub id. Tensors are read lazily (mmap), so loading a model
needs memory for the model once, plus one fused weight.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraplex.engine.errors import ModelError

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HUB_PATTERNS = ("*.json", "model*.safetensors", "*.jinja", "*.txt", "tokenizer*", "vocab*")
CONFIG_PATTERNS = ("config.json",)  # enough for `plan.py`
SAMPLES, SAMPLE_BYTES = 8, 4096  # of each tensor, for `Checkpoint.fingerprint`
SHOWN = 5  # names listed in a message before "and N more"


def find_model(model: str, patterns: Sequence[str] = HUB_PATTERNS) -> Path:
    """The local directory of a model given by path or hub id; of a hub id the files that match are
    downloaded if needed.

    Raises: ModelError when it is neither a directory nor can be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"model {model!r}: no such directory", code="model_not_found")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model {model!r} is no directory and could not be fetched from the hub: {reason}; "
            "give the path of a Hugging Face model directory, or check the name and the network",
            code="model_not_found",
        ) from error


def choose_dtype(requested: str, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in. `auto` is the checkpoint's own where this device runs it well.

    On a CPU float16 has no fast path and bfloat16 has one only where oneDNN says so; asking for
    what is slow is a choice, getting it by default is not.
    """
    if requested != "auto":
        wanted: torch.dtype = getattr(torch, requested)
        if device.type == "cpu" and wanted == torch.float16:
            raise ModelError("dtype float16 is not supported on cpu; use --dtype bfloat16 or auto")
        return wanted
    if device.type != "cpu" or checkpoint == torch.float32:
        return checkpoint
    chosen = torch.bfloat16 if _cpu_has_bf16() else torch.float32
    if chosen != checkpoint:
        logger.warning(
            "the checkpoint is %s, which this CPU does not run well: computing in %s (see --dtype)",
            str(checkpoint).removeprefix("torch."),
            str(chosen).removeprefix("torch."),
        )
    return chosen


def _cpu_has_bf16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


class Checkpoint:
    """The tensors of a model directory, by name. Files stay mapped until `close`."""

    def __init__(self, directory: Path) -> None:
        """Raises: ModelError when there are no safetensors, or a file is missing or damaged."""
        self.directory = directory
        self._file_of = _locate_tensors(directory)
        self._files: dict[str, Any] = {}
        for file in sorted(set(self._file_of.values())):
            self._files[file] = _open(directory / file)
        for file, handle in self._files.items():
            held = set(handle.keys())
            absent = [name for name, at in self._file_of.items() if at == file and name not in held]
            if absent:
                raise ModelError(f"{directory / file}: {INDEX_FILE} promises {_listed(absent)}")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.clear()

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = ()) -> None:
        """Every expected tensor is there with its shape; unexpected ones are named in a warning.

        Raises: ModelError naming what is missing or has another shape.
        """
        missing = [name for name in expected if name not in self._file_of]
        if missing:
            raise ModelError(f"{self.directory}: the checkpoint lacks {_listed(missing)}")
        for name, shape in expected.items():
            actual = tuple(self._slice(name).get_shape())
            if actual != shape:
                raise ModelError(
                    f"{self.directory}: {name} is {list(actual)}, the config asks for {list(shape)}"
                )
        unexpected = [
            name
            for name in self._file_of
            if name not in expected
            and name not in ignored
            and not name.endswith("rotary_emb.inv_freq")
        ]
        if unexpected:
            logger.warning("%s: unused tensors: %s", self.directory, _listed(unexpected))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def fingerprint(self) -> str:
        """Tells checkpoints of one shape apart: a hash over samples of every tensor's bytes.

        Not of all bytes, which would take as long as loading. Training, merging or requantizing
        changes a tensor throughout; who edits single weights by hand gets the same fingerprint.
        """
        sha = hashlib.sha256()
        for name in sorted(self._file_of):
            tensor = self.read(name).contiguous()
            data = tensor.view(-1).view(torch.uint8).numpy()
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            last = max(0, len(data) - SAMPLE_BYTES)
            for i in range(SAMPLES):
                start = last * i // (SAMPLES - 1)
                sha.update(data[start : start + SAMPLE_BYTES].tobytes())
        return sha.hexdigest()

    def read(self, name: str) -> Tensor:
        """A tensor as stored, on the CPU, possibly still a view of the file."""
        tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)
        return tensor

    def read_stacked(
        self, names: Sequence[str], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Tensors joined along their first axis, each converted straight into its place."""
        shapes = [tuple(self._slice(name).get_shape()) for name in names]
        rows = sum(shape[0] for shape in shapes)
        out = torch.empty((rows, *shapes[0][1:]), dtype=dtype, device=device)
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            out[start : start + shape[0]].copy_(self.read(name))
            start += shape[0]
        return out

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)


def _locate_tensors(directory: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{index}: not an index of safetensors files: {error}") from error
        files = set(weight_map.values())
        if any(Path(file).name != file for file in files):
            raise ModelError(f"{index}: names a file outside the model's directory")
        absent = sorted(file for file in files if not (directory / file).is_file())
        if absent:
            raise ModelError(f"{directory}: the checkpoint lacks the file {_listed(absent)}")
        return weight_map
    if (directory / SINGLE_FILE).is_file():
        return dict.fromkeys(_open(directory / SINGLE_FILE).keys(), SINGLE_FILE)
    pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
    hint = f" ({pickled[0].name} is a pickle: convert it to safetensors)" if pickled else ""
    raise ModelError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there{hint}")


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: damaged or not a safetensors file: {error}") from error


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
