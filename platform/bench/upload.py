"""Registers adapters at a Loraplex server for a benchmark: random ones made on the fly, or
folders.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from loraplex.platform.bench import models
from loraplex.platform.bench.loadgen import error_message

TIMEOUT_S = 300.0


class UploadError(Exception):
    """The server did not take an adapter."""


def upload_folder(base_url: str, name: str, folder: Path, api_key: str | None = None) -> None:
    """Raises: UploadError with the server's reason."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    with (
        (folder / "adapter_config.json").open("rb") as config,
        (folder / "adapter_model.safetensors").open("rb") as weights,
    ):
        try:
            response = httpx.post(
                f"{base_url.rstrip('/').removesuffix('/v1')}/v1/adapters",
                data={"name": name},
                files={"config": config, "weights": weights},
                headers=headers,
                timeout=TIMEOUT_S,
            )
        except httpx.HTTPError as error:
            raise UploadError(f"cannot upload {name}: {error}") from error
    if response.is_error:
        try:
            why = error_message(response.json())
        except ValueError:
            why = response.text[:200]
        raise UploadError(f"cannot upload {name}: HTTP {response.status_code}: {why}")


def upload_random(
    base_url: str,
    model_dir: Path,
    count: int,
    ranks: Sequence[int],
    api_key: str | None = None,
    on_done: Callable[[str], None] = lambda name: None,
) -> list[str]:
    """`count` random adapters for the model in `model_dir`, one at a time through a temporary
    folder.

    Returns their names. Same count and ranks give the same adapters, which the server keeps as they
    are. Raises: UploadError; OSError or ValueError when the model's config.json cannot be read.
    """
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    names = []
    for i in range(count):
        rank = ranks[i % len(ranks)]
        name = f"bench-{i:04d}-r{rank}"
        with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
            made = models.write_adapter(Path(folder), config, rank, seed=1000 + i)
            upload_folder(base_url, name, made, api_key)
        names.append(name)
        on_done(name)
    return names
