"""`loraplex plan`: tables for people, JSON for programs, refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loraplex.platform.cli import app

MODEL = str(Path(__file__).parents[3] / "platform" / "demo" / "assets" / "model")


def invoke(*arguments: str) -> Any:
    command = ["plan", "--model", MODEL, "--ram-gb", "8", *arguments]
    return CliRunner().invoke(app, command, env={"COLUMNS": "160"})


def test_json_and_tables_tell_the_same() -> None:
    done = invoke("--json", "--rank", "100", "--adapter-memory", "100MiB")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert [room["rank"] for room in found["adapters"]] == [8, 16, 32, 64, 100]
    parts = {part["purpose"]: part["bytes"] for part in found["memory"]}
    assert parts["adapters on the device"] == 100 << 20
    done = invoke("--adapter-memory", "100MiB")
    assert f"{found['kv_tokens']:,} tokens of KV cache" in done.output
    row = next(line for line in done.output.splitlines() if line.startswith("rank 16"))
    assert row.split()[3] == str(found["adapters"][1]["on_device"])
    assert "padded to largest" in done.output
    assert "trade it" not in done.output, "one side is fixed"


def test_shared_memory_is_explained() -> None:
    found = json.loads(invoke("--json").output)
    output = invoke().output
    assert f"up to {found['kv_tokens_at_most']:,} tokens" in output
    row = next(line for line in output.splitlines() if line.startswith("rank 16"))
    room = found["adapters"][1]
    assert row.split()[3:] == [f"{room[key]:,}" for key in ("on_device", "at_most", "on_host")]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--gpu-gb", "0.001"), 1, "does not fit"),
        (("--max-num-seqs", "0"), 1, "max_num_seqs=0"),
        (("--gpu-gb", "-1"), 2, "--gpu-gb -1.0: must be more than 0"),
        (("--adapter-memory", "lots"), 2, "--adapter-memory lots"),
    ],
)
def test_refusals(arguments: tuple[str, ...], status: int, words: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == status
    assert words in " ".join(done.output.split())
