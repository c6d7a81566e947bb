"""A few hundred requests of the soak, and proof that it would notice: it has to find errors planted
in a server.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.platform.bench.soak.driver import OPERATIONS
from loraplex.platform.bench.soak.ledger import Ledger
from loraplex.platform.bench.soak.plan import Plan
from loraplex.platform.bench.soak.processes import MIB, Sample, Watched, grown
from loraplex.platform.bench.soak.reference import KINDS, greedy
from loraplex.platform.bench.soak.run import soak
from loraplex.platform.bench.soak.world import (
    BASE,
    FILES,
    NUM_ADDITIVE,
    NUM_KINDS,
    Composition,
    Content,
    World,
    plain,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def small(num_requests: int) -> Plan:
    """Few requests, and as many orders of operators: each kind of them is to happen."""
    return Plan(num_requests, seed=1, num_volatile=8, concurrency=16, operators=8.0)


def test_a_short_soak_finds_nothing(soak_world: World, tmp_path: Path) -> None:
    result = soak(small(200), tmp_path, print, soak_world)
    assert result["violations"] == []
    assert result["tokens_checked"] > 400
    done = {outcome.partition(":")[0] for outcome in result["outcomes"]}
    assert done >= set(OPERATIONS) - {"verify"}, "something was not tried"
    assert result["adapters_that_filled_the_memory"] >= 4


# What a server that knew only A and B of linear modules would read in a config.
AB_ONLY: dict[str, Any] = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "trainable_token_indices": None,
}


def test_what_adapters_have_beyond_a_and_b_is_heard(soak_world: World, tmp_path: Path) -> None:
    """Else a server that left it out would go unseen."""
    from peft import PeftModel
    from safetensors.torch import load, save_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(soak_world.model), dtype=torch.float32)
    for index in range(NUM_ADDITIVE, NUM_KINDS):
        folder, content = tmp_path / str(index), soak_world.contents[index]
        folder.mkdir()
        config = json.loads(content.config) | AB_ONLY
        config["target_modules"] = list({*config["target_modules"]} - {"lm_head", "embed_tokens"})
        (folder / FILES[0]).write_text(json.dumps(config))
        tensors = {
            name: tensor
            for name, tensor in load(content.weights).items()
            if ".layers." in name and name.endswith((".lora_A.weight", ".lora_B.weight"))
        }
        save_file(tensors, str(folder / FILES[1]))
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
        told = greedy(model.eval(), list(soak_world.prompts))
        heard = soak_world.answers[plain(index)]
        differs = [a[: len(b)] != b[: len(a)] for a, b in zip(told, heard, strict=True)]
        assert sum(differs) >= len(differs) / 2, f"{KINDS[index]}: heard in {differs}"


# Python imports `sitecustomize` first; this one spoils the engine's process.
PLANT = """
import sys

if "loraplex.engine.process" in sys.orig_argv:
    from loraplex.adapters.pool import PagePool
    from loraplex.engine import prefix_hash

    prefix_hash.root_hash = lambda composition, cache_salt: b"the same for every adapter"
    right = PagePool.remove

    def remove(self, digest):
        if len(self._residents[digest].frames) > 1:
            self._residents[digest].frames.pop()
        return right(self, digest)

    PagePool.remove = remove
"""


def test_planted_errors_are_found(
    soak_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV of one adapter that another finds, and a page that is lost with an eviction."""
    (tmp_path / "sitecustomize.py").write_text(PLANT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    result = soak(small(100), tmp_path / "soak", print, soak_world)
    told = " ".join(result["violations"])
    assert "are not [" in told, result["violations"]
    assert "adapter_memory" in told, result["violations"]


# --- the judge, without a server ------------------------------------------------------------------


@pytest.fixture
def ledger() -> Ledger:
    """Two contents, registered as a@1 and b@1."""
    nothing = Content(b"", b"", b"")
    answers = {
        BASE: [[9, 9, 9]],
        plain(0): [[1, 2, 3]],
        plain(1): [[4, 5, 6]],
        Composition(((0, 1.0), (1, 0.5))): [[7, 8, 9]],
    }
    found = Ledger(World(Path(), [[1]], [nothing, nothing], answers), 0, 2)
    for name, content, digest in zip(found.names, (0, 1), ("sha256:aa", "sha256:bb"), strict=True):
        found.registered(name, content, {"version": 1, "digest": digest})
    return found


def named(name: str, digest: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "version": 1, "digest": digest, **more}


A, B = named("soak-00", "sha256:aa"), named("soak-01", "sha256:bb")


def test_what_is_right_is_no_violation(ledger: Ledger) -> None:
    ledger.check_answer("", [], 0, [9, 9])
    ledger.check_answer("", [A], 0, [1, 2, 3, 55])
    ledger.check_answer("", [A, {**B, "weight": 0.5}], 0, [7, 8, 9])
    ledger.settle_claims()
    assert ledger.violations == []
    assert ledger.tokens_checked == 8


def test_many_of_one_kind_leave_room_for_others(ledger: Ledger) -> None:
    for i in range(50):
        ledger.wrong(f"soak-{i:02}: tokens {list(range(i % 7))} of prompt {i} are not [9]")
    ledger.wrong("generate: adapter_memory: adapter 12ab needs 9 bytes")
    assert len(ledger.violations) == 4
    assert ledger.num_violations == 51
    assert "adapter_memory" in ledger.violations[-1]


@pytest.mark.parametrize(
    ("adapters", "tokens", "told"),
    [
        ([A], [1, 2, 7], "are not [1, 2, 3]"),
        ([A], [4, 5, 6], "those of ((1, 1.0),)"),
        ([A], [9, 9, 9], "the base model"),
        ([], [1, 2, 3], "those of ((0, 1.0),)"),
        ([B, {**A, "weight": 0.5}], [7, 8, 9], "nobody asked for"),
        ([named("soak-00", "sha256:bb")], [4, 5, 6], "soak-00@1 is sha256:bb, it is sha256:aa"),
    ],
)
def test_what_is_wrong_is_told(
    ledger: Ledger, adapters: list[dict[str, Any]], tokens: list[int], told: str
) -> None:
    ledger.check_answer("asked", adapters, 0, tokens)
    ledger.settle_claims()
    assert len(ledger.violations) == 1
    assert told in ledger.violations[0]


def test_a_version_that_changes_its_content_is_told(ledger: Ledger) -> None:
    ledger.registered(ledger.names[0], 1, {"version": 1, "digest": "sha256:bb"})
    assert "registered as sha256:bb" in ledger.violations[0]


def test_growth_is_of_the_last_half_and_ignores_a_warm_up() -> None:
    process: Any = None

    def watched(name: str, rss_mib: Callable[[int], int]) -> Watched:
        return Watched(name, process, [_sample(i, rss_mib(i) * MIB) for i in range(100)])

    warm = watched("warm", lambda i: min(i, 40))
    filling = watched("filling", lambda i: 2 * min(i, 60))  # a cache, full after the half
    leaky = watched("leaky", lambda i: i)
    filling_and_leaky = watched("both", lambda i: 2 * min(i, 60) + i)
    told = grown([warm, filling, leaky, filling_and_leaky], 8 * MIB)
    assert len(told) == 2
    assert "leaky process grew by 49.0 MiB" in told[0]
    assert "both process grew" in told[1]


def _sample(requests: int, rss: int) -> Sample:
    return Sample(requests, float(requests), rss, 10, 4)
