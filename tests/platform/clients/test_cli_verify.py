"""`loraplex adapter verify` against a stub of the API: what it asks, prints and exits with."""

from __future__ import annotations

import time
from typing import Any

import pytest


def proof(**changes: Any) -> dict[str, Any]:
    return {
        "agrees": True,
        "error": 1e-7,
        "tolerance": 2e-6,
        "base_error": 5e-7,
        "effect": 0.25,
        "accepted": False,
        "flags": [],
        "probed_at": int(time.time()),
        "device": "cpu",
        "dtype": "float32",
        "backend": "torch",
        **changes,
    }


def result(**changes: Any) -> dict[str, Any]:
    made = {"id": "sql", "version": 1, "digest": "sha256:" + "ab" * 32, "ok": True}
    return {**made, "damage": None, "proof": proof(), **changes}


OFF = proof(agrees=False, error=0.2, flags=["disagrees"])


def test_one_that_is_as_it_should_be(cli: Any, stub: Any) -> None:
    stub.routes["POST /v1/adapters/sql@1/verify"] = (200, result())
    done = cli("adapter", "verify", "sql@1", "--url", stub.url)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(
        "ok sql@1: files as uploaded; probe agrees: error 1e-07 of at most 2e-06, effect 0.25"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"damage": "w of ab has changed since it was stored"}, "has changed since it was stored;"),
        ({"proof": OFF}, "probe disagrees: error 0.2 of at most 2e-06"),
        ({"proof": proof(agrees=False, error=None)}, "error not a number of at most"),
    ],
)
def test_what_is_wrong_is_said_and_is_exit_status_1(
    cli: Any, stub: Any, changes: dict[str, Any], said: str
) -> None:
    stub.routes["POST /v1/adapters/sql/verify"] = (200, result(ok=False, **changes))
    done = cli("adapter", "verify", "sql", "--url", stub.url)
    assert done.exit_code == 1
    assert done.stdout.startswith("wrong sql@1: ")
    assert said in done.stdout


def test_one_without_effect_is_named_and_not_wrong(cli: Any, stub: Any) -> None:
    idle = result(proof=proof(effect=0.0, flags=["no_effect"]))
    stub.routes["POST /v1/adapters/sql/verify"] = (200, idle)
    done = cli("adapter", "verify", "sql", "--url", stub.url)
    assert (done.exit_code, "probe no effect" in done.stdout) == (0, True)


def test_accept_is_sent(cli: Any, stub: Any) -> None:
    accepted = result(proof={**OFF, "accepted": True})
    stub.routes["POST /v1/adapters/sql/verify"] = (200, accepted)
    done = cli("adapter", "verify", "sql", "--accept", "--url", stub.url)
    assert (done.exit_code, "probe accepted" in done.stdout) == (0, True)
    assert stub.asked[0].json == {"accept": True}


def test_all_goes_through_every_version_whatever_fails(
    cli: Any, stub: Any, adapter_object: Any
) -> None:
    for name, versions in (("a", [1, 2]), ("b", [4])):
        detail = adapter_object(name, versions=[{"version": v} for v in versions])
        stub.routes[f"GET /v1/adapters/{name}"] = (200, detail)
        for version in versions:
            found = result(id=name, version=version)
            stub.routes[f"POST /v1/adapters/{name}@{version}/verify"] = (200, found)
    listed = {"object": "list", "data": [adapter_object("a"), adapter_object("b")]}
    stub.routes["GET /v1/adapters"] = (200, {**listed, "has_more": False})
    failure = {"error": {"message": "the engine is restarting", "code": "engine_unavailable"}}
    stub.routes["POST /v1/adapters/a@2/verify"] = (503, failure)
    done = cli("adapter", "verify", "--all", "--url", stub.url)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["ok a@1", "wrong a@2", "ok b@4"]
    assert "the engine is restarting" in lines[1]
    assert lines[3] == "3 verified, 1 wrong"
    one = cli("adapter", "verify", "b", "--all", "--url", stub.url, "--json")
    assert (one.exit_code, [r["version"] for r in one.json["data"]]) == (0, [4])


@pytest.mark.parametrize("arguments", [(), ("--all", "--accept")])
def test_half_an_order_is_a_usage_error(cli: Any, arguments: tuple[str, ...]) -> None:
    assert cli("adapter", "verify", *arguments).exit_code == 2


def test_list_and_show_tell_of_it(cli: Any, stub: Any, adapter_object: Any) -> None:
    idle = adapter_object("idle", proof=proof(effect=0.0, flags=["no_effect"]))
    found = [adapter_object("sql", proof=OFF), idle, adapter_object("new", proof=None)]
    stub.routes["GET /v1/adapters"] = (200, {"object": "list", "data": found, "has_more": False})
    stub.routes["GET /v1/adapters/sql"] = (200, found[0])
    listed = cli("adapter", "list", "--url", stub.url).stdout
    assert "disagrees" in listed
    assert "no effect" in listed
    shown = cli("adapter", "show", "sql", "--url", stub.url).stdout
    assert "disagrees: error 0.2 of at most 2e-06" in shown
