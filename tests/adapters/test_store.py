"""The adapter store: whole or absent, whatever dies, fills up or runs at the same time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loraplex.adapters.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    AdapterRefused,
    StorageFull,
)
from loraplex.adapters.intake import inspect
from loraplex.adapters.manifest import AdapterManifest
from loraplex.adapters.store import AdapterStore
from loraplex.engine.api import ModuleShape


@pytest.fixture
def source(draft: Any, tmp_path: Path, modules: list[ModuleShape]) -> Path:
    folder: Path = draft.write(tmp_path / "source")
    (folder / "manifest.json").write_bytes(inspect(folder, modules).to_json())
    return folder


@pytest.fixture
def manifest(source: Path) -> AdapterManifest:
    return AdapterManifest.from_json((source / "manifest.json").read_bytes())


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def put(source: Path, manifest: AdapterManifest) -> Callable[[AdapterStore], Path]:
    def put(store: AdapterStore) -> Path:
        with store.staging() as staging:
            for name in manifest.files:
                with staging.writer(name, 1 << 20) as out:
                    out.write((source / name).read_bytes())
            return store.commit(staging, manifest)

    return put


def left_in(root: Path) -> list[str]:
    """Everything but the fixed furniture and empty shards."""
    found = (p.relative_to(root) for p in root.rglob("*"))
    furniture = {".lock", ".staging", ".trash"}
    return sorted(str(p) for p in found if str(p) not in furniture and len(p.parts[0]) != 2)


def test_what_is_put_can_be_read(
    store: AdapterStore, put: Any, manifest: AdapterManifest, source: Path
) -> None:
    assert not store.exists(manifest.digest)
    path = put(store)
    digest = manifest.digest
    assert path == store.path(digest) == store.root / digest[:2] / digest
    assert store.exists(digest)
    assert store.manifest(digest) == store.verify(digest) == manifest
    assert list(store.digests()) == [digest]
    for name in manifest.files:
        assert (path / name).read_bytes() == (source / name).read_bytes()
    assert store.disk_bytes(digest) == sum(p.stat().st_size for p in path.iterdir())
    assert left_in(store.root) == []


def test_removing_frees_the_bytes(store: AdapterStore, put: Any, manifest: AdapterManifest) -> None:
    put(store)
    size = store.disk_bytes(manifest.digest)
    assert store.remove(manifest.digest) == size > 0
    assert not store.exists(manifest.digest)
    assert store.remove(manifest.digest) == 0
    assert store.disk_bytes(manifest.digest) == 0
    assert left_in(store.root) == []
    put(store)
    assert store.exists(manifest.digest)


def test_a_reader_keeps_its_file(store: AdapterStore, put: Any, manifest: AdapterManifest) -> None:
    with (put(store) / "adapter_model.safetensors").open("rb") as file:
        store.remove(manifest.digest)
        assert len(file.read()) == manifest.files["adapter_model.safetensors"].size_bytes


@pytest.mark.parametrize(
    "digest", ["", "..", "../../etc", "a" * 63, "A" * 64, "sha256:" + "a" * 64]
)
def test_a_digest_that_is_none(store: AdapterStore, digest: str) -> None:
    with pytest.raises(AdapterNotFound):
        store.path(digest)


def test_unknown_digest(store: AdapterStore) -> None:
    with pytest.raises(AdapterNotFound):
        store.manifest("a" * 64)
    assert not store.exists("a" * 64)


def test_other_files_of_the_upload_are_not_stored(
    store: AdapterStore, source: Path, manifest: AdapterManifest
) -> None:
    with store.staging() as staging:
        shutil.copytree(source, staging.path, dirs_exist_ok=True)
        (staging.path / "archive").write_bytes(b"zip")
        path = store.commit(staging, manifest)
    assert sorted(os.listdir(path)) == sorted([*manifest.files, "manifest.json"])


def test_an_upload_that_fails_leaves_nothing(store: AdapterStore) -> None:
    def upload() -> None:
        with store.staging() as staging:
            with staging.writer("adapter_config.json", 10) as out:
                out.write(b"{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload()
    assert left_in(store.root) == []


def test_a_writer_stops_at_its_limit(store: AdapterStore) -> None:
    with store.staging() as staging:
        with staging.writer("adapter_config.json", 10) as out:
            out.write(b"12345")
            out.write(b"67890")
        with (
            pytest.raises(AdapterRefused) as refused,
            staging.writer("adapter_model.safetensors", 10) as out,
        ):
            out.write(b"12345678901")
        assert [p.code for p in refused.value.problems] == ["file_too_large"]
        with pytest.raises(FileExistsError):
            staging.writer("adapter_config.json", 10)


def test_bytes_that_changed_since_they_arrived_are_refused(
    store: AdapterStore, source: Path, manifest: AdapterManifest
) -> None:
    with store.staging() as staging:
        for name in manifest.files:
            with staging.writer(name, 1 << 20) as out:
                out.write((source / name).read_bytes() + b" ")
        with pytest.raises(AdapterCorrupt, match="changed"):
            store.commit(staging, manifest)
    assert left_in(store.root) == []


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_full_disk_is_named_and_leaves_nothing(size: int, store: AdapterStore) -> None:
    """/dev/full is a disk without room. It tells at once, or when the buffer is flushed last."""

    def upload() -> None:
        with store.staging() as staging:
            out = staging.writer("adapter_model.safetensors", 1 << 20)
            out._file.close()
            out._file = Path("/dev/full").open("wb")
            with out:
                out.write(b"x" * size)

    with pytest.raises(StorageFull):
        upload()
    assert left_in(store.root) == []


@pytest.mark.parametrize("name", ["mkdir", "fsync", "rename"])
def test_a_disk_that_fills_up_in_commit(
    name: str, store: AdapterStore, put: Any, manifest: AdapterManifest, monkeypatch: Any
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(StorageFull):
            put(store)
    assert not store.exists(manifest.digest)
    assert left_in(store.root) == []
    put(store)
    assert store.verify(manifest.digest)


def test_durable_before_it_is_visible(
    store: AdapterStore, put: Any, manifest: AdapterManifest, monkeypatch: Any
) -> None:
    """Every file, then the folder, then the move, then the folder moved into: so it survives a
    power cut. A test cannot cut the power; it can watch the order."""
    seen: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(handle: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2])
        fsync(handle)

    def watched_rename(old: Any, new: Any) -> None:
        seen.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    put(store)
    move = seen.index("rename")
    assert set(seen[:3]) == {*manifest.files, "manifest.json"}
    assert len(seen[3]) == 32  # the staging folder
    assert store.root.name in seen[4:move]
    assert seen[move + 1 :] == [manifest.digest[:2]]


@pytest.mark.parametrize("operation", ["commit", "remove"])
def test_killed_at_any_point(
    operation: str, source: Path, manifest: AdapterManifest, tmp_path: Path
) -> None:
    """Before each disk operation in turn the process dies; a restart finds all or nothing."""
    roots = tmp_path / "roots"
    roots.mkdir()
    script = Path(__file__).with_name("crash_store.py")
    command = [sys.executable, str(script), operation, str(source), str(roots)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    states = []
    for n in range(steps):
        store = AdapterStore(roots / str(n))
        store.sweep()
        assert left_in(store.root) == [], f"died before step {n}"
        states.append(store.exists(manifest.digest))
        assert list(store.digests()) == ([manifest.digest] if states[-1] else [])
        if states[-1]:
            assert store.verify(manifest.digest) == manifest
    # Once, and only once, it turns from the old state to the new.
    assert states == sorted(states, reverse=operation == "remove")
    assert len(set(states)) == 2
    assert steps > 8


def test_sweep_clears_what_crashes_left(store: AdapterStore, put: Any) -> None:
    put(store)
    for place in (".staging", ".trash"):
        folder = store.root / place / "left"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"12345")
        (store.root / place / "stray").write_bytes(b"1")
    assert store.sweep() == 10
    assert left_in(store.root) == []
    assert len(list(store.digests())) == 1


def test_sweep_spares_an_upload_under_way(store: AdapterStore) -> None:
    """Another process starts and sweeps while this one is receiving."""
    with store.staging() as staging:
        with staging.writer("adapter_config.json", 10) as out:
            out.write(b"{}")
        AdapterStore(store.root).sweep()
        assert (staging.path / "adapter_config.json").read_bytes() == b"{}"
    assert left_in(store.root) == []


def test_the_same_adapter_many_times_at_once(
    store: AdapterStore, put: Any, manifest: AdapterManifest
) -> None:
    start = threading.Barrier(8)

    def upload(_: int) -> Path:
        start.wait()
        path: Path = put(AdapterStore(store.root))
        return path

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(upload, range(8))) == {store.path(manifest.digest)}
    assert store.verify(manifest.digest)
    assert left_in(store.root) == []


def test_put_and_removed_at_once(store: AdapterStore, put: Any, manifest: AdapterManifest) -> None:
    """Whatever the order, the adapter ends whole or absent, and nothing else is left."""

    def work(i: int) -> None:
        if i % 2:
            put(store)
        else:
            store.remove(manifest.digest)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(40)))
    if store.exists(manifest.digest):
        store.verify(manifest.digest)
    assert left_in(store.root) == []


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damage_is_found_and_an_upload_repairs_it(
    name: str, store: AdapterStore, put: Any, manifest: AdapterManifest
) -> None:
    file = put(store) / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(AdapterCorrupt):
        store.verify(manifest.digest)
    put(store)
    assert store.verify(manifest.digest) == manifest
    file.write_bytes(whole[:-1])
    with pytest.raises(AdapterCorrupt):
        store.verify(manifest.digest)
    put(store)
    assert store.verify(manifest.digest) == manifest
    file.unlink()
    with pytest.raises(AdapterCorrupt):
        store.verify(manifest.digest)
    put(store)
    assert store.verify(manifest.digest) == manifest
    (file.parent / "manifest.json").write_bytes(b"{}")
    with pytest.raises(AdapterCorrupt):
        store.manifest(manifest.digest)
    put(store)
    assert store.verify(manifest.digest) == manifest
    assert left_in(store.root) == []
