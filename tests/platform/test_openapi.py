"""The published document, and schemathesis over it: no 500, and no status it does not name."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from loraplex.platform.app import create_app
from loraplex.platform.cli import serve
from loraplex.platform.cli.http_protocol import BoundedProtocol
from loraplex.platform.settings import Settings

EXAMPLES = 2  # of each operation
OPERATOR = {"authorization": "Bearer operator-key"}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def base_url(
    tmp_path_factory: pytest.TempPathFactory, fake_engine_module: Any, upload_parts: Any
) -> Iterator[str]:
    """A server in a thread of its own, with an adapter `sql` in it."""
    import httpx

    folder: Path = tmp_path_factory.mktemp("fuzzed")
    engine = fake_engine_module.FakeEngine()
    app = create_app(
        Settings(model="tiny", data_dir=folder / "data", api_key=("operator-key",)), engine
    )
    listener = serve.bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(
        uvicorn.Config(app, http=BoundedProtocol, log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    while not (server.started and app.state.runtime.ready):
        time.sleep(0.01)
    made = httpx.post(
        f"{url}/v1/adapters", data={"name": "sql"}, files=upload_parts(), headers=OPERATOR
    )
    assert made.status_code == 201
    yield url
    server.should_exit = True
    thread.join()


def test_no_500_and_no_surprise(base_url: str) -> None:
    """With an operator's key: who may call what is the matter of test_access.py."""
    document = schemathesis.openapi.from_url(f"{base_url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) > 40
    problems = [problem for operation in operations for problem in _fuzzed(operation)]
    assert problems == [], "\n\n".join(problems)


def _fuzzed(operation: Any) -> list[str]:
    """What is wrong with one operation's answers to what it takes, and to what it does not."""
    good = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    bad = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @given(case=good | bad)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def call(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, headers=OPERATOR, timeout=20)

    try:
        call()
    except FailureGroup as found:
        return [f"{operation.label}: {failure}" for failure in found.exceptions]
    return []


def test_the_fuzzer_sees_a_status_that_is_not_named(base_url: str) -> None:
    """The companion of the test above."""
    import httpx

    raw = httpx.get(f"{base_url}/openapi.json").json()
    del raw["paths"]["/v1/models"]["get"]["responses"]["200"]
    document = schemathesis.openapi.from_dict(raw)
    document.config.update(base_url=base_url)
    problems = [
        problem
        for found in document.include(path="/v1/models").get_all_operations()
        for problem in _fuzzed(found.ok())
    ]
    assert len(problems) == 1
    assert "Undocumented status code" in problems[0]


def test_every_operation_names_its_errors(base_url: str) -> None:
    import httpx

    found = httpx.get(f"{base_url}/openapi.json").json()
    assert len(found["paths"]) > 25
    for path, item in found["paths"].items():
        for method, operation in item.items():
            if "security" not in operation:
                assert path in ("/healthz", "/readyz", "/version", "/health", "/ping"), path
                continue
            assert {"401", "403", "404", "429"} <= set(operation["responses"]), (method, path)
    assert "ValidationError" not in str(found)
