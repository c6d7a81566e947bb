"""The loader: off the engine's thread, tables untouched until `poll`, every end reported once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.errors import AdapterCorrupt, AdapterError, AdapterNotFound
from loraplex.adapters.pool import PagePool
from loraplex.adapters.residency import LoadDone, Phase, Stage
from loraplex.engine import adapter_loader
from loraplex.engine.adapter_loader import AdapterLoader
from loraplex.engine.model_config import read_model_config


class Watched:
    """A loader on a pool of `num_frames`, and an event that its thread sets at each end."""

    def __init__(self, model: Path, store: Path, num_frames: int) -> None:
        config = read_model_config(model)
        shapes, cpu = config.module_shapes, torch.device("cpu")
        frame = PagePool(config.num_layers, shapes, 1 << 30, torch.float32, cpu).frame_bytes
        self.pool = PagePool(config.num_layers, shapes, num_frames * frame, torch.float32, cpu)
        self.loader = AdapterLoader(store, self.pool, config.modules())
        self._ended = threading.Event()
        self.loader.on_done = self._ended.set

    def wait(self) -> LoadDone:
        while True:
            if done := self.loader.poll():
                assert len(done) == 1
                return done[0]
            assert self._ended.wait(20), "no load ended"
            self._ended.clear()

    def load(self, digest: str) -> None:
        self.loader.begin_host_load(digest)
        assert self.wait().ok
        self.loader.begin_device_load(digest)
        assert self.wait().ok


@pytest.fixture
def digests(
    tiny_model: Any, tiny_adapters: Any, store_adapters: Any, tmp_path: Path
) -> dict[str, str]:
    model = tiny_model("llama")
    stored: dict[str, str] = store_adapters(tmp_path, model, tiny_adapters(model))
    return stored


@pytest.fixture
def watched(tiny_model: Any, digests: dict[str, str], tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tiny_model("llama"), tmp_path, num_frames=9)
    yield watched
    watched.loader.close()


def test_through_both_stages_and_back(watched: Watched, digests: dict[str, str]) -> None:
    digest, pool, loader = digests["rank24"], watched.pool, watched.loader
    expected = loader.describe(digest)
    assert (expected.rank, expected.pages) == (24, 2)
    assert loader.poll() == []
    loader.begin_host_load(digest)
    done = watched.wait()
    assert (done.digest, done.stage, done.ok, done.error) == (digest, Stage.HOST, True, "")
    assert pool.bytes_used == 0
    loader.begin_device_load(digest)
    assert pool.bytes_used == expected.device_bytes, "room is taken at once"
    assert digest not in pool, "the tables change in poll"
    assert watched.wait().stage is Stage.DEVICE
    assert digest in pool
    pool.check_invariants()
    assert loader.drop_device(digest) == expected.device_bytes
    assert loader.drop_host(digest) == expected.host_bytes
    assert pool.bytes_used == 0


def test_the_phases_of_a_load_add_up(
    watched: Watched, digests: dict[str, str], tmp_path: Path
) -> None:
    digest, loader = digests["all"], watched.loader

    def host_load() -> LoadDone:
        loader.begin_host_load(digest)
        done = watched.wait()
        assert sum(done.phases.values()) == pytest.approx(done.seconds)
        assert min(done.phases.values()) >= 0
        return done

    assert set(host_load().phases) == {Phase.QUEUE, Phase.READ, Phase.BUILD}
    loader.begin_device_load(digest)
    done = watched.wait()
    assert set(done.phases) == {Phase.QUEUE, Phase.COPY}
    loader.drop_device(digest)
    page_file(tmp_path, digest)
    loader.drop_host(digest)
    assert set(host_load().phases) == {Phase.QUEUE, Phase.READ, Phase.VERIFY}


def test_what_is_forgotten_can_be_loaded_again(watched: Watched, digests: dict[str, str]) -> None:
    watched.loader.describe(digests["all"])
    watched.loader.forget(digests["all"])
    watched.loader.forget("0" * 64)
    watched.load(digests["all"])


def test_a_missing_adapter_is_said_at_once(watched: Watched) -> None:
    with pytest.raises(AdapterNotFound):
        watched.loader.describe("0" * 64)


def test_a_manifest_that_cannot_be_read_is_the_adapters_error(
    watched: Watched, digests: dict[str, str], tmp_path: Path
) -> None:
    """Any other error would end the engine, which asks for it when a request comes."""
    digest = digests["all"]
    manifest = tmp_path / digest[:2] / digest / "manifest.json"
    manifest.unlink()
    manifest.mkdir()  # fails to be read whoever asks, root as well
    with pytest.raises(AdapterCorrupt) as found:
        watched.loader.describe(digest)
    assert str(tmp_path) not in found.value.message
    watched.load(digests["qv"])


def test_no_path_is_told_when_the_system_refuses(
    watched: Watched, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/secret/place")

    monkeypatch.setattr(adapter_loader, "load_weights", refused)
    watched.loader.begin_host_load(digests["all"])
    done = watched.wait()
    assert (done.ok, done.error) == (False, "PermissionError: Permission denied")


def test_files_that_vanish_are_reported(
    watched: Watched, digests: dict[str, str], tmp_path: Path
) -> None:
    digest = digests["all"]
    watched.loader.describe(digest)
    (tmp_path / digest[:2] / digest / "adapter_model.safetensors").unlink()
    watched.loader.begin_host_load(digest)
    done = watched.wait()
    assert not done.ok
    assert done.code == "adapter_corrupt"
    watched.load(digests["qv"])  # the thread lives on


def test_no_room_is_reported_like_any_end(watched: Watched, digests: dict[str, str]) -> None:
    watched.load(digests["patterns"])
    watched.load(digests["all"])
    watched.loader.begin_host_load(digests["rank24"])
    watched.wait()
    woken = threading.Event()
    watched.loader.on_done = woken.set
    watched.loader.begin_device_load(digests["rank24"])
    assert woken.is_set(), "nobody else says that there is an end to take in"
    (done,) = watched.loader.poll()
    assert (done.stage, done.ok, done.code) == (Stage.DEVICE, False, "adapter_memory")
    watched.pool.check_invariants()
    size = watched.loader.describe(digests["rank24"])
    assert watched.loader.drop_host(digests["rank24"]) == size.host_bytes, "the image is there"


def test_an_adapter_larger_than_the_pool_can_never_be_loaded(
    tiny_model: Any, digests: dict[str, str], tmp_path: Path
) -> None:
    watched = Watched(tiny_model("llama"), tmp_path, num_frames=1)
    with pytest.raises(AdapterError, match="--adapter-memory") as caught:
        watched.loader.describe(digests["all"])
    assert caught.value.code == "adapter_too_large"
    watched.loader.close()


def test_an_adapter_of_another_model_is_refused(
    tiny_model: Any, digests: dict[str, str], tmp_path: Path
) -> None:
    watched = Watched(tiny_model("llama", hidden_size=32), tmp_path, num_frames=9)
    with pytest.raises(AdapterError, match="another base model"):
        watched.loader.describe(digests["all"])
    watched.loader.close()


def test_the_loader_computes_with_one_thread_and_the_engine_with_all(
    watched: Watched, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a load would take the processors from the running step."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[int] = []
        build = watched.pool.build_image

        def build_image(*args: Any) -> Any:
            seen.append(torch.get_num_threads())
            return build(*args)

        monkeypatch.setattr(watched.pool, "build_image", build_image)
        watched.load(digests["all"])
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def page_file(root: Path, digest: str) -> Path:
    """Waits for it: it is written once the loader has nothing else to do."""
    folder = root / digest[:2] / digest
    deadline = time.monotonic() + 20
    while not (found := list(folder.glob("pages-*.bin"))):
        assert time.monotonic() < deadline, "no page file"
        time.sleep(0.01)
    return found[0]


def tables(pool: PagePool, digest: str) -> list[torch.Tensor]:
    pages = pool.pages(digest)
    frames = pool._residents[digest].frames
    bytes_of = [pool.arena.view(-1, pool.frame_elements)[frame] for frame in frames]
    return [*bytes_of, pool.live_ranks[pages], pool.scaling[pages]]


def test_the_second_load_reads_pages_not_weights(
    watched: Watched,
    tiny_model: Any,
    digests: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest = digests["patterns"]
    watched.load(digest)
    first = tables(watched.pool, digest)
    written = page_file(tmp_path, digest)
    read: list[Path] = []
    load_weights = adapter_loader.load_weights

    def spy(folder: Path, dtype: torch.dtype) -> Any:
        read.append(folder)
        return load_weights(folder, dtype)

    monkeypatch.setattr(adapter_loader, "load_weights", spy)
    for damage in (False, True):
        if damage:
            data = bytearray(written.read_bytes())
            data[-100] ^= 4
            written.write_bytes(data)
        again = Watched(tiny_model("llama"), tmp_path, num_frames=9)
        again.load(digest)
        again.pool.check_invariants()
        for a, b in zip(first, tables(again.pool, digest), strict=True):
            assert torch.equal(a, b)
        assert len(read) == damage, "weights are read only when the pages are damaged"
        again.loader.close()
