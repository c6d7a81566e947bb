"""`loraplex adapter ...` against a stub of the API: what is sent, what is printed, how failures
end.
"""

from __future__ import annotations

import json
import zipfile
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "mine"
    made.mkdir()
    (made / "adapter_config.json").write_text('{"r": 16}')
    (made / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 4000)  # several chunks
    return made


def parts(asked: Any) -> dict[str, tuple[str | None, bytes]]:
    """The multipart body read by Python's own parser: field -> (file name, content)."""
    headers = {k.lower(): v for k, v in asked.headers.items()}
    message = BytesParser().parsebytes(
        b"Content-Type: " + headers["content-type"].encode() + b"\r\n\r\n" + asked.body
    )
    found = {}
    for part in message.get_payload():
        name = part.get_param("name", header="content-disposition")
        found[name] = (part.get_filename(), part.get_payload(decode=True))
    return found


def test_add_streams_the_files_as_they_are(
    cli: Any, stub: Any, folder: Path, adapter_object: Any
) -> None:
    stub.routes["POST /v1/adapters"] = (201, adapter_object("sql"))
    done = cli(
        *("adapter", "add", "sql", folder, "--url", stub.url, "--description", "to SQL"),
        *("--metadata", '{"team": "search"}', "--alias", "prod"),
    )
    assert done.exit_code == 0, done.stderr
    assert "added sql@1: rank 16, 13.6 MB" in done.stdout
    sent = parts(stub.asked[0])
    assert sent["name"] == (None, b"sql")
    assert sent["description"] == (None, b"to SQL")
    assert json.loads(sent["metadata"][1]) == {"team": "search"}
    assert sent["alias"] == (None, b"prod")
    for field, name in (
        ("config", "adapter_config.json"),
        ("weights", "adapter_model.safetensors"),
    ):
        assert sent[field] == (name, (folder / name).read_bytes())


def test_add_an_archive(cli: Any, stub: Any, folder: Path, adapter_object: Any) -> None:
    archive = folder.parent / "mine.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.write(folder / "adapter_config.json", "adapter_config.json")
    stub.routes["POST /v1/adapters"] = (200, adapter_object("sql", version=2))
    done = cli("adapter", "add", "sql", archive, "--url", stub.url, "--json")
    assert done.json["version"] == 2
    assert parts(stub.asked[0])["archive"] == ("mine.zip", archive.read_bytes())


def test_a_refusal_is_one_line_and_a_list(cli: Any, stub: Any, folder: Path) -> None:
    details = [
        {"code": "wrong_shape", "message": "wrong shape", "file": "adapter_model.safetensors",
         "tensor": "layers.0.q_proj.lora_A", "expected": [16, 64], "actual": [16, 65]},
        {"code": "missing_b", "message": "lora_A without lora_B", "tensor": "layers.1.q_proj"},
    ]  # fmt: skip
    stub.routes["POST /v1/adapters"] = (
        422,
        {"error": {"message": "adapter refused:\n2 problems", "details": details}},
    )
    done = cli("adapter", "add", "sql", folder, "--url", stub.url)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: adapter refused: 2 problems",
        "  - adapter_model.safetensors, layers.0.q_proj.lora_A: wrong shape "
        "(expected [16, 64], actual [16, 65])",
        "  - layers.1.q_proj: lora_A without lora_B",
    ]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda p: p / "absent", "does not exist"),
        (lambda p: (p / "notes.txt").write_text("") or p / "notes.txt", "neither a folder nor"),
        (lambda p: p, "has no adapter_config.json and no adapter_model.safetensors"),
    ],
)
def test_wrong_paths_are_usage_errors(cli: Any, tmp_path: Path, make: Any, complaint: str) -> None:
    done = cli("adapter", "add", "x", make(tmp_path))
    assert done.exit_code == 2
    assert complaint in done.stderr


@pytest.mark.parametrize("metadata", ["{", "[1]"])
def test_metadata_must_be_a_json_object(cli: Any, folder: Path, metadata: str) -> None:
    done = cli("adapter", "add", "x", folder, "--metadata", metadata)
    assert done.exit_code == 2
    assert "--metadata" in done.stderr


def test_list_reads_all_pages(cli: Any, stub: Any, adapter_object: Any) -> None:
    def page(asked: Any) -> tuple[int, Any]:
        if "after=b" in asked.path:
            return 200, {"data": [adapter_object("c", residency="device")], "has_more": False}
        return 200, {"data": [adapter_object("a"), adapter_object("b")], "has_more": True}

    stub.routes["GET /v1/adapters"] = page
    done = cli("adapter", "list", "--url", stub.url, "--json")
    assert [a["id"] for a in done.json["data"]] == ["a", "b", "c"]
    printed = cli("adapter", "list", "--url", stub.url).stdout
    assert [line.split()[0] for line in printed.splitlines()] == ["adapter", "a", "b", "c"]
    assert "device" in printed.splitlines()[3]


def test_an_empty_list_says_so(cli: Any, stub: Any) -> None:
    stub.routes["GET /v1/adapters"] = (200, {"data": [], "has_more": False})
    assert cli("adapter", "list", "--url", stub.url).stdout == "no adapters\n"


def test_show(cli: Any, stub: Any, adapter_object: Any) -> None:
    stub.routes["GET /v1/adapters/sql@3"] = (
        200,
        adapter_object("sql", version=3, metadata={"a": 1}),
    )
    done = cli("adapter", "show", "sql@3", "--url", stub.url)
    assert "13.6 MB" in done.stdout
    assert '{"a": 1}' in done.stdout
    assert cli("adapter", "show", "sql@3", "--url", stub.url, "--json").json["version"] == 3


def test_rm_reports_what_was_freed(cli: Any, stub: Any) -> None:
    freed = {"device_bytes": 2_000_000, "host_bytes": 0, "disk_bytes": 3_000_000}
    stub.routes["DELETE /v1/adapters/sql"] = (200, {"id": "sql", "deleted": True, "freed": freed})
    done = cli("adapter", "rm", "sql", "--version", 2, "--force", "--url", stub.url)
    assert done.stdout == "deleted sql, freed 2.0 MB of device memory, 3.0 MB of disk\n"
    assert stub.asked[0].path == "/v1/adapters/sql?version=2&force=true"


@pytest.mark.parametrize("verb", ["load", "evict", "pin", "unpin"])
def test_admin_verbs(cli: Any, stub: Any, verb: str) -> None:
    stub.routes[f"POST /v1/admin/adapters/sql/{verb}"] = (200, {"id": "sql", "state": "device"})
    done = cli("adapter", verb, "sql", "--url", stub.url, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.json["state"] == "device"
    assert verb in cli("adapter", verb, "sql", "--url", stub.url).stdout


def test_evict_passes_tier_and_drain(cli: Any, stub: Any) -> None:
    stub.routes["POST /v1/admin/adapters/sql/evict"] = (200, {"id": "sql", "freed": {}})
    cli("adapter", "evict", "sql", "--tier", "host", "--drain", "--url", stub.url)
    assert stub.asked[0].json == {"tier": "host", "drain": True}
    assert cli("adapter", "evict", "sql", "--tier", "disk", "--url", stub.url).exit_code == 2


def test_download_writes_the_whole_file_or_none(cli: Any, stub: Any, tmp_path: Path) -> None:
    target = tmp_path / "sql.tar.gz"
    stub.routes["GET /v1/adapters/sql/download"] = (200, b"\x1f\x8b" + b"x" * 100_000)
    done = cli("adapter", "download", "sql", "-o", target, "--url", stub.url, "--json")
    assert done.json == {"path": str(target), "size_bytes": 100_002}
    target.unlink()
    assert cli("adapter", "download", "gone", "-o", target, "--url", stub.url).exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_key_and_url_come_from_the_environment(
    cli: Any, stub: Any, adapter_object: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.routes["GET /v1/adapters/sql"] = (200, adapter_object("sql"))
    monkeypatch.setenv("LORAPLEX_URL", stub.url + "/v1/")
    monkeypatch.setenv("LORAPLEX_API_KEY", "first-key,second-key")
    assert cli("adapter", "show", "sql", "--json").exit_code == 0
    headers = {k.lower(): v for k, v in stub.asked[0].headers.items()}
    assert headers["authorization"] == "Bearer first-key"
    cli("adapter", "show", "sql", "--json", "--api-key", "flag-wins")
    headers = {k.lower(): v for k, v in stub.asked[1].headers.items()}
    assert headers["authorization"] == "Bearer flag-wins"


def test_no_server_is_one_line(cli: Any) -> None:
    done = cli("adapter", "list", "--url", "http://127.0.0.1:9")
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert "cannot reach a server at http://127.0.0.1:9" in done.stderr


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (404, {"error": {"message": "no adapter [red]x"}}, "error: no adapter [red]x"),
        (401, {"error": "Unauthorized"}, "error: HTTP 401: Unauthorized"),
        (502, b"<html>bad gateway</html>", "error: HTTP 502: <html>bad gateway</html>"),
    ],
)
def test_errors_of_any_shape_are_one_line(
    cli: Any, stub: Any, status: int, body: Any, line: str
) -> None:
    stub.routes["GET /v1/adapters/x"] = (status, body)
    done = cli("adapter", "show", "x", "--url", stub.url)
    assert (done.exit_code, done.stderr) == (1, line + "\n")


def test_another_tenants_adapter_is_named_in_a_header(cli: Any, stub: Any) -> None:
    stub.routes["DELETE /v1/adapters/sql"] = (404, {"error": {"message": "no", "code": "x"}})
    cli("adapter", "rm", "acme/sql", "--url", stub.url)
    assert [asked.path.partition("?")[0] for asked in stub.asked][-1] == "/v1/adapters/sql"
    headers = {name.lower(): value for name, value in stub.asked[-1].headers.items()}
    assert headers["x-tenant"] == "acme"
