"""`loraplex tenant` and `loraplex key` on a registry of their own, `usage` against a stub."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from loraplex.platform.cli.registry import registry_has_keys


@pytest.fixture
def run(cli: Any, tmp_path: Path) -> Any:
    return lambda *words: cli(*words, "--data-dir", tmp_path / "data")


def test_a_tenant_and_its_key_from_first_to_last(run: Any, tmp_path: Path) -> None:
    made = run(
        *("tenant", "create", "acme", "--requests-per-s", "2", "--max-bytes", "2GB", "--json")
    )
    assert made.json["limits"]["requests_per_s"] == 2.0
    assert made.json["limits"]["max_bytes"] == 2_000_000_000
    key = run("key", "create", "--tenant", "acme", "--scope", "infer", "--expires", "90d")
    assert (key.exit_code, key.stdout.count("\n")) == (0, 1)
    assert key.stdout.startswith("lpx_")
    assert "shown this once" in key.stderr
    key_id = key.stdout.split("_")[1]
    listed = run("key", "list")
    assert key_id in listed.stdout
    assert "acme" in listed.stdout
    assert key.stdout.split("_", 2)[2].strip() not in listed.stdout
    url = f"sqlite+aiosqlite:///{tmp_path / 'data' / 'registry.sqlite'}"
    assert registry_has_keys(url, tmp_path / "data")
    assert "revoked" in run("key", "revoke", key_id).stdout
    assert run("key", "list", "--json").json["data"][0]["status"] == "revoked"
    with sqlite3.connect(tmp_path / "data" / "registry.sqlite") as rows:
        events = list(rows.execute("SELECT actor, action FROM audit_event ORDER BY id"))
    rows.close()
    assert events == [("cli", "tenant.create"), ("cli", "key.create"), ("cli", "key.revoke")]


def test_limits_change_one_by_one(run: Any) -> None:
    run("tenant", "create", "acme", "--requests-per-s", "2", "--max-adapters", "0")
    changed = run("tenant", "set", "acme", "--tokens-per-min", "100", "--disable", "--json").json
    limits = {name: value for name, value in changed["limits"].items() if value is not None}
    assert limits == {"requests_per_s": 2.0, "tokens_per_min": 100, "max_adapters": 0}
    assert changed["disabled"] is True
    changed = run("tenant", "set", "acme", "--requests-per-s", "0", "--enable", "--json").json
    assert (changed["limits"]["requests_per_s"], changed["disabled"]) == (None, False)
    assert [t["name"] for t in run("tenant", "list", "--json").json["data"]] == ["acme", "default"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("key", "create", "--scope", "root"), "--scope root"),
        (("key", "create", "--expires", "soon"), "90d, 12h"),
        (("key", "create", "--adapter", "A/B/C"), "--adapter"),
        (("tenant", "create", "Acme"), "--name Acme"),
        (("tenant", "create", "a", "--max-bytes", "many"), "--max-bytes"),
    ],
)
def test_wrong_words_are_usage_errors(run: Any, words: Any, said: str) -> None:
    done = run(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("key", "create", "--tenant", "nobody"), "no tenant 'nobody'"),
        (("key", "revoke", "ffff"), "no key 'ffff'"),
        (("tenant", "create", "default"), "there is a tenant 'default'"),
        (("tenant", "set", "nobody"), "no tenant 'nobody'"),
    ],
)
def test_what_cannot_be_done_is_one_line(run: Any, words: Any, said: str) -> None:
    done = run(*words)
    assert (done.exit_code, done.stdout) == (1, "")
    assert said in done.stderr


def test_no_registry_has_no_keys(tmp_path: Path) -> None:
    assert not registry_has_keys("sqlite+aiosqlite:///x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_usage_is_summed_over_the_hours(cli: Any, stub: Any) -> None:
    row = {"tenant": "acme", "key_id": "ab", "adapter": "sql@1", "failures": 0, "seconds": 1.5}
    counts = {"requests": 2, "prompt_tokens": 1000, "generated_tokens": 7}
    hours = [{**row, **counts, "hour": 3600 * hour} for hour in (1, 2)]
    stub.routes["GET /v1/usage"] = (200, {"data": hours, "has_more": False})
    printed = cli("usage", "--since", "2d", "--tenant", "acme", "--url", stub.url).stdout
    assert printed.splitlines()[1].split() == ["acme", "ab", "sql@1", "4", "0", "2,000", "14", "3"]
    assert "tenant=acme" in stub.asked[0].path
    text = cli("usage", "--csv", "--url", stub.url).stdout
    assert "1970-01-01T01:00:00Z,acme,ab,sql@1,2,0,1000,7,1.5" in text
