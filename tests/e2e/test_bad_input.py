"""Broken uploads and broken requests against a real server: each a specific 4xx, nothing left
behind, server still fine.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.e2e

Files = dict[str, Any]


@pytest.fixture(scope="module")
def good(assets: Path) -> tuple[dict[str, Any], bytes]:
    folder = min(
        (p for p in (assets / "adapters").iterdir() if p.is_dir()),
        key=lambda p: (p / "adapter_model.safetensors").stat().st_size,
    )
    return json.loads((folder / "adapter_config.json").read_text()), (
        folder / "adapter_model.safetensors"
    ).read_bytes()


# --- a safetensors file as a dictionary, so that one thing at a time can be broken ---


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def tensors(header: dict[str, Any]) -> list[str]:
    return sorted(name for name in header if name != "__metadata__")


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def broken(data: bytes) -> bytes:
        header, body = split(data)
        change(header)
        return join(header, body)

    return broken


def without(part: str) -> Callable[[bytes], bytes]:
    """Drop the first tensor whose name holds `part`, moving the others together so that only
    that is wrong.
    """

    def broken(data: bytes) -> bytes:
        header, body = split(data)
        victim = next(name for name in tensors(header) if part in name)
        out: dict[str, Any] = {}
        packed = b""
        for name in tensors(header):
            if name == victim:
                continue
            begin, end = header[name]["data_offsets"]
            out[name] = {**header[name], "data_offsets": [len(packed), len(packed) + end - begin]}
            packed += body[begin:end]
        return join(out, packed)

    return broken


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for name in [n for n in tensors(header) if old in n]:
            header[name.replace(old, new)] = header.pop(name)

    return change


def first(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[tensors(header)[0]][key] = value

    return change


def transpose_first(header: dict[str, Any]) -> None:
    entry = header[tensors(header)[0]]
    entry["shape"] = entry["shape"][::-1]


def poison(data: bytes) -> bytes:
    header, body = split(data)
    dtype = header[tensors(header)[0]]["dtype"]
    nan = {"F32": struct.pack("<f", float("nan")), "BF16": b"\xc0\x7f", "F16": b"\x00\x7e"}[dtype]
    begin = header[tensors(header)[0]]["data_offsets"][0]
    return join(header, body[:begin] + nan + body[begin + len(nan) :])


WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "empty file": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "trailing bytes": lambda data: data + b"\0\0\0\0",
    "header length is a lie": lambda data: struct.pack("<Q", 2**62) + data[8:],
    "header is not JSON": lambda data: join(b"{not json", split(data)[1]),
    "header is a list": lambda data: join(b"[1,2]", split(data)[1]),
    "header nested without end": lambda data: join(b"[" * 100_000, split(data)[1]),
    "offsets beyond the end": edit(first("data_offsets", [0, 10**12])),
    "negative offsets": edit(first("data_offsets", [-4, 60])),
    "shape lies about size": edit(first("shape", [1, 1])),
    "unknown dtype": edit(first("dtype", "F13")),
    "integer weights": edit(first("dtype", "I32")),
    "shape transposed": edit(transpose_first),
    "missing B": without("lora_B"),
    "missing A": without("lora_A"),
    "unknown module": edit(rename("q_proj", "z_proj")),
    "layer beyond the model": edit(rename("layers.0.", "layers.99.")),
    "NaN in a weight": poison,
    "pickle in disguise": lambda data: pickle.dumps({"weights": [1, 2, 3]}),
    "random bytes": lambda data: bytes(range(256)) * 64,
}

CONFIG: dict[str, dict[str, Any] | Callable[[dict[str, Any]], Any]] = {
    "rank 0": {"r": 0},
    "rank negative": {"r": -8},
    "rank a string": {"r": "8"},
    "rank a boolean": {"r": True},
    "rank does not fit the tensors": {"r": 3},
    "alpha not a number": {"lora_alpha": "a lot"},
    "not LoRA": {"peft_type": "PREFIX_TUNING"},
    "unknown key": {"rotate_by": 90},
    "DoRA without magnitudes": {"use_dora": True},
    "bias of an unknown kind": {"bias": "some"},
    "lora_bias without biases": {"lora_bias": True},
    "modules to save that are not there": {"modules_to_save": ["lm_head"]},
    "token rows that are not there": {"trainable_token_indices": [1, 2]},
    "stored transposed": {"fan_in_fan_out": True},
    "target that is not there": {"target_modules": ["c_attn"]},
    "target regex that does not compile": {"target_modules": "(q_proj"},
    "no targets": {"target_modules": []},
    "layer replication": {"layer_replication": [[0, 2], [1, 3]]},
    "config a list": lambda config: [config],
    "pattern rank 0": {"rank_pattern": {"q_proj": 0}},
}


def registered(http: httpx.Client) -> list[str]:
    page = http.get("/v1/adapters", params={"limit": 100}).json()["data"]
    return sorted(item["id"] for item in page)


@pytest.fixture
def http(demo_server: Any, uploaded: list[str]) -> Any:
    with httpx.Client(base_url=demo_server.url, timeout=60) as client:
        yield client


@pytest.fixture
def nothing_left_behind(http: httpx.Client, demo_server: Any) -> Any:
    def files() -> set[Path]:
        root = demo_server.data_dir
        return {
            p.relative_to(root)
            for p in root.rglob("*")
            if p.is_file()
            and ".sqlite" not in p.name
            and ".db" not in p.name
            # Caches of the engine: it may write them for good adapters at any time.
            and "pages-" not in p.name
        }

    before = files(), registered(http)
    yield
    assert http.get("/readyz").status_code == 200
    assert (files(), registered(http)) == before


def refused(answer: httpx.Response, *statuses: int) -> dict[str, Any]:
    assert answer.status_code in statuses, f"{answer.status_code}: {answer.text}"
    error: dict[str, Any] = answer.json()["error"]
    assert len(error["message"]) > 15, "a message a person can act on"
    assert isinstance(error["code"], str)
    assert "Traceback" not in answer.text
    return error


def post(http: httpx.Client, config: Any, weights: bytes, name: str = "broken") -> httpx.Response:
    raw = config if isinstance(config, bytes) else json.dumps(config).encode()
    files = {
        "config": ("adapter_config.json", raw),
        "weights": ("adapter_model.safetensors", weights),
    }
    return http.post("/v1/adapters", data={"name": name}, files=files)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_broken_weights(
    kind: str, http: httpx.Client, good: Any, nothing_left_behind: None
) -> None:
    config, weights = good
    error = refused(post(http, config, WEIGHTS[kind](weights)), 400, 413, 422)
    assert error.get("details"), "every problem is named"


@pytest.mark.parametrize("kind", CONFIG)
def test_broken_config(kind: str, http: httpx.Client, good: Any, nothing_left_behind: None) -> None:
    config, weights = good
    change = CONFIG[kind]
    broken = change(config) if callable(change) else {**config, **change}
    error = refused(post(http, broken, weights), 400, 422)
    assert error.get("details")


def test_all_problems_are_told_at_once(
    http: httpx.Client, good: Any, nothing_left_behind: None
) -> None:
    config, weights = good
    error = refused(
        post(http, {**config, "fan_in_fan_out": True, "surprise": 1}, without("lora_B")(weights)),
        422,
    )
    text = json.dumps(error["details"])
    assert "fan_in_fan_out" in text
    assert "surprise" in text
    assert "lora_B" in text


def archive(*members: tuple[str, bytes], kind: str = "zip") -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            for name, data in members:
                z.writestr(name, data)
    else:
        with tarfile.open(fileobj=out, mode="w:gz") as t:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
    return out.getvalue()


def link_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        info = tarfile.TarInfo("adapter_config.json")
        info.type = tarfile.SYMTYPE
        info.linkname = "/etc/passwd"
        t.addfile(info)
    return out.getvalue()


ARCHIVES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "path traversal (zip)": lambda c, w: archive(
        ("../../adapter_config.json", c), ("adapter_model.safetensors", w)
    ),
    "absolute path (tar)": lambda c, w: archive(
        ("/adapter_config.json", c), ("/adapter_model.safetensors", w), kind="tar"
    ),
    "symbolic link (tar)": lambda c, w: link_tar(),
    "zip bomb": lambda c, w: archive(
        ("adapter_config.json", c), ("adapter_model.safetensors", bytes(600_000_000))
    ),
    "pickle instead of safetensors": lambda c, w: archive(
        ("adapter_config.json", c), ("adapter_model.bin", w)
    ),
    "no config": lambda c, w: archive(("adapter_model.safetensors", w)),
    "not an archive": lambda c, w: b"hello there, this is no archive",
    "truncated archive": lambda c, w: archive(
        ("adapter_config.json", c), ("adapter_model.safetensors", w)
    )[:-200],
    "two configs": lambda c, w: archive(
        ("a/adapter_config.json", c),
        ("b/adapter_config.json", c),
        ("a/adapter_model.safetensors", w),
    ),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_broken_archives(
    kind: str, http: httpx.Client, good: Any, nothing_left_behind: None
) -> None:
    config, weights = good
    data = ARCHIVES[kind](json.dumps(config).encode(), weights)
    answer = http.post("/v1/adapters", data={"name": "broken"}, files={"archive": ("a.zip", data)})
    refused(answer, 400, 413, 415, 422)


@pytest.mark.parametrize(
    "name",
    ["", "Has Spaces", "../up", "UPPER", "-dash-first", "a" * 200, "a/b", "x@3", "x:y", "\u00e9"],
)
def test_bad_names(name: str, http: httpx.Client, good: Any, nothing_left_behind: None) -> None:
    refused(post(http, *good, name=name), 400, 422)


def test_the_base_models_name_is_taken(
    http: httpx.Client, good: Any, nothing_left_behind: None
) -> None:
    base = next(m["id"] for m in http.get("/v1/models").json()["data"] if not m.get("parent"))
    refused(post(http, *good, name=base), 400, 409, 422)


def test_missing_parts(http: httpx.Client, good: Any, nothing_left_behind: None) -> None:
    refused(http.post("/v1/adapters", data={"name": "broken"}), 415)
    refused(http.post("/v1/adapters", json={"name": "broken"}), 400, 415, 422)
    refused(http.post("/v1/adapters", data={"name": "broken"}, files={"config": b"{}"}), 400, 422)
    refused(
        http.post(
            "/v1/adapters",
            data={"name": "x", "metadata": "{"},
            files={"config": b"{}", "weights": b""},
        ),
        400,
        422,
    )
    refused(
        http.post(
            "/v1/adapters",
            content=b"--x\r\ngarbage",
            headers={"content-type": "multipart/form-data; boundary=x"},
        ),
        400,
        422,
    )


def test_a_race_for_one_name_has_two_winners_with_two_versions(
    http: httpx.Client, demo_server: Any, good: Any
) -> None:
    config, weights = good
    answers: list[httpx.Response] = []

    def run(alpha: int) -> None:
        with httpx.Client(base_url=demo_server.url, timeout=60) as own:
            answers.append(post(own, {**config, "lora_alpha": alpha}, weights, name="raced"))

    threads = [threading.Thread(target=run, args=(alpha,)) for alpha in (101, 102, 103, 101)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {a.status_code for a in answers} <= {200, 201}, [a.text for a in answers]
    found = http.get("/v1/adapters/raced").json()
    versions = [v["version"] for v in found["versions"]]
    assert len(set(versions)) == len(versions)
    assert len({v["digest"] for v in found["versions"]}) == 3
    assert http.delete("/v1/adapters/raced").status_code == 200
    assert http.get("/v1/adapters/raced").status_code == 404


BAD_REQUESTS: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "negative max_tokens": ({"max_tokens": -1}, 400, "max_tokens"),
    "zero max_tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "temperature below 0": ({"temperature": -0.5}, 400, "temperature"),
    "temperature a string": ({"temperature": "hot"}, 400, "temperature"),
    "top_p 0": ({"top_p": 0}, 400, "top_p"),
    "top_p above 1": ({"top_p": 1.5}, 400, "top_p"),
    "min_p above 1": ({"min_p": 2}, 400, "min_p"),
    "repetition penalty 0": ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    "presence penalty 5": ({"presence_penalty": 5}, 400, "presence_penalty"),
    "n 0": ({"n": 0}, 400, "n"),
    "n a million": ({"n": 1_000_000}, 400, "n"),
    "logprobs -1": ({"logprobs": -1}, 400, "logprobs"),
    "logprobs 10000": ({"logprobs": 10_000}, 400, "logprobs"),
    "seed a float": ({"seed": 1.5}, 400, "seed"),
    "stop too many": ({"stop": ["x"] * 5000}, 400, "stop"),
    "stop an object": ({"stop": {"a": 1}}, 400, "stop"),
    "logit_bias of an unknown token": ({"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    "token ids out of range": ({"prompt": [1, 99_999_999]}, 400, "prompt"),
    "negative token ids": ({"prompt": [-1]}, 400, "prompt"),
    "empty prompt": ({"prompt": []}, 400, "prompt"),
    "prompt an object": ({"prompt": {"a": 1}}, 400, "prompt"),
    "prompt too long": ({"prompt": [5] * 100_000}, 400, "prompt"),
    "stream a string": ({"stream": "maybe"}, 400, "stream"),
    "suffix": ({"suffix": "the end"}, 400, "suffix"),
    "unknown adapter": ({"adapter_id": "nobody"}, 404, "adapter_id"),
    "unknown version": ({"adapter_id": "{first}@99"}, 404, "adapter_id"),
    "unknown alias": ({"adapter_id": "{first}:nope"}, 404, "adapter_id"),
    "unknown digest": ({"adapter_id": "sha256:" + "0" * 64}, 404, "adapter_id"),
    "adapter_id a number": ({"adapter_id": 7}, 400, "adapter_id"),
    "unknown model": ({"model": "gpt-17"}, 404, "model"),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_bad_requests(
    kind: str, http: httpx.Client, uploaded: list[str], nothing_left_behind: None
) -> None:
    change, status, param = BAD_REQUESTS[kind]
    base = next(m["id"] for m in http.get("/v1/models").json()["data"] if not m.get("parent"))
    body = {"model": base, "prompt": "hello", "max_tokens": 2, **change}
    if isinstance(body.get("adapter_id"), str):
        body["adapter_id"] = body["adapter_id"].format(first=uploaded[0])
    error = refused(http.post("/v1/completions", json=body), status)
    assert error["param"] == param
    if status == 404 and param == "adapter_id":
        assert error["code"] == "adapter_not_found"


def test_bodies_that_are_no_requests(http: httpx.Client) -> None:
    for raw in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b'{"a":' * 3000,
    ):
        refused(
            http.post("/v1/completions", content=raw, headers={"content-type": "application/json"}),
            400,
            413,
            422,
        )
    refused(http.post("/v1/chat/completions", json={"messages": []}), 400)
    refused(http.post("/v1/chat/completions", json={"messages": "hello"}), 400)
    refused(http.post("/v1/chat/completions", json={"messages": [{"role": "user"}]}), 400)
    refused(http.get("/v1/nothing-here"), 404)
    refused(http.put("/v1/completions", json={}), 405)


def test_both_adapter_id_and_adapters(http: httpx.Client, uploaded: list[str]) -> None:
    body = {
        "prompt": "x",
        "adapter_id": uploaded[0],
        "adapters": [{"id": uploaded[0], "weight": 1.0}],
    }
    refused(http.post("/v1/completions", json=body), 400)


def test_admin_of_what_is_not_there(http: httpx.Client) -> None:
    for path in ("load", "evict", "pin", "unpin"):
        refused(http.post(f"/v1/admin/adapters/nobody/{path}", json={}), 404)
    refused(http.delete("/v1/adapters/nobody"), 404)
    refused(http.get("/v1/adapters/nobody/download"), 404)
