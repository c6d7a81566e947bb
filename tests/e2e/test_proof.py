"""A real engine proves adapters that peft made; `verify` finds what was done to their files."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def made_by_peft(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`live` has a B of its own, `idle` the zeros that peft begins with."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("peft")
    for name in ("live", "idle"):
        base = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(base, config)
        if name == "live":
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(weight, std=0.05)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in ("live", "idle")}


def cli(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from loraplex.platform.cli import main; main()"
    command = [sys.executable, "-c", code, "adapter", *arguments, "--url", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def proof_of(url: str, name: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (proof := httpx.get(f"{url}/v1/adapters/{name}").json()["proof"]) is None:
        assert time.monotonic() < deadline, f"{name} was not probed"
        time.sleep(0.05)
    found: dict[str, Any] = proof
    return found


def test_what_peft_made_is_proven_and_what_was_changed_is_found(
    server_class: Any,
    assets: Path,
    tmp_path: Path,
    made_by_peft: dict[str, Path],
    upload_adapter: Any,
) -> None:
    with server_class(assets / "model", tmp_path / "data", "--dtype", "float32") as server:
        made = {
            name: upload_adapter(server.url, name, folder) for name, folder in made_by_peft.items()
        }
        live, idle = proof_of(server.url, "live"), proof_of(server.url, "idle")
        assert (live["agrees"], live["flags"]) == (True, [])
        assert live["effect"] > 100 * live["error"]
        assert (idle["agrees"], idle["effect"], idle["flags"]) == (True, 0.0, ["no_effect"])
        whole = cli(server.url, "verify", "--all")
        assert (whole.returncode, whole.stdout.splitlines()[-1]) == (0, "2 verified, 0 wrong")

        digest = made["live"]["digest"].removeprefix("sha256:")
        (weights,) = (tmp_path / "data").glob(f"adapters/**/{digest}/adapter_model.safetensors")
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 0x01
        weights.chmod(0o644)
        weights.write_bytes(raw)
        damaged = cli(server.url, "verify", "--all")
        assert damaged.returncode == 1
        assert "wrong live@1: adapter_model.safetensors of" in damaged.stdout
        assert "ok idle@1" in damaged.stdout
        body = {"adapter_id": "live", "prompt": "x", "max_tokens": 2}
        refused = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert refused.json()["error"]["code"] == "adapter_not_ready"

        # The same content again mends it: nothing made of the damaged file is used any more.
        again = upload_adapter(server.url, "live", made_by_peft["live"])
        assert (again["version"], again["digest"]) == (1, made["live"]["digest"])
        assert proof_of(server.url, "live")["agrees"]
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert answer.is_success, answer.text
