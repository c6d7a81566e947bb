"""`loraplex adapter alias ...` and `adapter versions` against a stub: what is sent and printed."""

from __future__ import annotations

from typing import Any

import pytest

PROD = "/v1/adapters/sql/aliases/prod"
SPLIT = [{"version": 3, "weight": 90}, {"version": 4, "weight": 10}]


def alias(split: list[dict[str, int]], revision: int = 7) -> dict[str, Any]:
    return {"id": "sql", "object": "alias", "alias": "prod", "revision": revision, "split": split}


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (["3"], {"version": 3}),
        (["3=90", "4=10"], {"split": SPLIT}),
        (["3=0"], {"split": [{"version": 3, "weight": 0}]}),
    ],
)
def test_set_sends_a_version_or_a_split(cli: Any, stub: Any, words: Any, body: Any) -> None:
    stub.routes[f"PUT {PROD}"] = (200, alias(SPLIT))
    done = cli("adapter", "alias", "set", "sql", "prod", *words, "--url", stub.url)
    assert done.stdout == "sql:prod is now 3: 90 %, 4: 10 % (revision 7)\n"
    assert stub.asked[0].json == body


@pytest.mark.parametrize(
    "words", [["prod"], ["3", "4"], ["3=0.9", "4=0.1"], ["3="], ["=3"], ["-3"]]
)
def test_what_is_no_split_is_a_usage_error(cli: Any, stub: Any, words: Any) -> None:
    done = cli("adapter", "alias", "set", "--url", stub.url, "sql", "prod", "--", *words)
    assert (done.exit_code, done.stdout, stub.asked) == (2, "", [])
    assert "3=90 4=10" in done.stderr


def test_list_and_history(cli: Any, stub: Any) -> None:
    stub.routes["GET /v1/adapters/sql/aliases"] = (
        200,
        {"data": [{**alias([{"version": 4, "weight": 100}]), "alias": "beta"}, alias(SPLIT)]},
    )
    printed = cli("adapter", "alias", "list", "sql", "--url", stub.url).stdout.splitlines()
    assert [line.split(maxsplit=1)[0] for line in printed] == ["alias", "beta", "prod"]
    assert "3: 90 %, 4: 10 %" in printed[2]
    revisions = [
        {"revision": 3, "at": 0, "actor": "key:ab", "split": SPLIT, "restores": 1},
        {"revision": 2, "at": 0, "actor": "anonymous", "split": [], "restores": None},
    ]
    stub.routes[f"GET {PROD}/history"] = (200, {"data": revisions, "has_more": True})
    command = ("adapter", "alias", "history", "sql", "prod", "--limit", 2, "--url", stub.url)
    printed = cli(*command).stdout.splitlines()
    assert "key:ab" in printed[1]
    assert "rollback to 1" in printed[1]
    assert "deleted" in printed[2]
    assert stub.asked[-1].path == f"{PROD}/history?limit=2"
    assert cli(*command, "--json").json["data"] == revisions


def test_no_aliases_says_so(cli: Any, stub: Any) -> None:
    stub.routes["GET /v1/adapters/sql/aliases"] = (200, {"data": []})
    assert cli("adapter", "alias", "list", "sql", "--url", stub.url).stdout == "no aliases\n"


def test_rollback_and_rm(cli: Any, stub: Any) -> None:
    stub.routes[f"POST {PROD}/rollback"] = (200, alias([{"version": 3, "weight": 100}]))
    command = ("adapter", "alias", "rollback", "sql", "prod", "--url", stub.url)
    assert cli(*command).stdout == "sql:prod is now 3 (revision 7)\n"
    assert stub.asked[-1].body == b""
    assert cli(*command, "--revision", 2, "--json").json["revision"] == 7
    assert stub.asked[-1].json == {"revision": 2}
    stub.routes[f"DELETE {PROD}"] = (200, {"id": "sql", "alias": "prod", "deleted": True})
    done = cli("adapter", "alias", "rm", "sql", "prod", "--url", stub.url)
    assert done.stdout == "removed sql:prod\n"


def test_a_refusal_is_one_line(cli: Any, stub: Any) -> None:
    message = "alias 'prod' has no earlier meaning"
    stub.routes[f"POST {PROD}/rollback"] = (409, {"error": {"message": message}})
    done = cli("adapter", "alias", "rollback", "sql", "prod", "--url", stub.url)
    assert (done.exit_code, done.stderr) == (1, f"error: {message}\n")


def test_odd_names_stay_one_part_of_the_path(cli: Any, stub: Any) -> None:
    cli("adapter", "alias", "rm", "sql", "a/../b?c", "--url", stub.url)
    assert stub.asked[0].path == "/v1/adapters/sql/aliases/a%2F..%2Fb%3Fc"


def test_versions_show_the_aliases_that_lead_to_them(
    cli: Any, stub: Any, adapter_object: Any
) -> None:
    used = {"num_requests": 12, "num_generated_tokens": 345}
    versions = [adapter_object("sql", version=number, **used) for number in (2, 3, 4)]
    beta = [{"version": 4, "weight": 100}]
    found = {**versions[-1], "versions": versions, "aliases": {"beta": beta, "prod": SPLIT}}
    stub.routes["GET /v1/adapters/sql"] = (200, found)
    printed = cli("adapter", "versions", "sql", "--url", stub.url).stdout.splitlines()
    assert [line.split()[0] for line in printed[1:]] == ["2", "3", "4"]
    assert "prod 90 %" in printed[2]
    assert "beta, prod 10 %" in printed[3]
    assert "345" in printed[3]
    as_json = cli("adapter", "versions", "sql", "--json", "--url", stub.url).json
    assert [v["version"] for v in as_json["data"]] == [2, 3, 4]
