"""The commands' HTTP client: one server, its native API, its errors as CliError."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from loraplex.platform.cli.output import CliError

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[
    str, typer.Option("--url", envvar="LORAPLEX_URL", help="The server's address.", metavar="URL")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="LORAPLEX_API_KEY", help="Key to send, if the server asks for one."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")]


class ServerApi:
    """Use as a context manager. Every method raises CliError, with a message fit for the user."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        import httpx  # 0.1 s, which `--help` need not pay

        self.url = url.rstrip("/").removesuffix("/v1")
        # Several keys are the server's setting; a client sends the first.
        key = (api_key or "").split(",")[0]
        self._client = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=10),
        )

    def get(self, path: str, **params: Any) -> Any:
        return self.request("GET", path, params=params)

    def post(self, path: str, body: object = None) -> Any:
        return self.request("POST", path, json=body)

    def request(self, method: str, path: str, **arguments: Any) -> Any:
        """The decoded body of a successful answer."""
        path, whose = _of_tenant(path)
        headers = {**arguments.pop("headers", {}), **whose}
        with self._reaching():
            response = self._client.request(method, path, headers=headers, **arguments)
        raise_for_status(response)
        return response.json() if response.content else None

    @contextmanager
    def stream(self, method: str, path: str, **arguments: Any) -> Iterator[httpx.Response]:
        """A successful answer whose body is still to be read."""
        path, headers = _of_tenant(path)
        with (
            self._reaching(),
            self._client.stream(method, path, headers=headers, **arguments) as response,
        ):
            if response.is_error:
                response.read()
                raise_for_status(response)
            yield response

    def base_model(self) -> str:
        """The id of the served base model: the one that no other model is the parent of."""
        models = self.get("/v1/models")["data"]
        for model in models:
            if model.get("parent") is None:
                return str(model["id"])
        raise CliError(f"the server at {self.url} lists no base model")

    def adapters(self, **filters: Any) -> list[dict[str, Any]]:
        """All adapters, page by page."""
        found: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            page = self.get(
                "/v1/adapters", limit=100, **filters, **({"after": after} if after else {})
            )
            found += page["data"]
            if not page.get("has_more") or not page["data"]:
                return found
            after = page["data"][-1]["id"]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.TimeoutException as error:
            raise CliError(f"the server at {self.url} did not answer in time") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise CliError(
                f"cannot reach a server at {self.url} ({error}); is `loraplex serve` running, "
                "and is --url right?"
            ) from error

    def __enter__(self) -> ServerApi:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()


def adapter_path(reference: str, *rest: str) -> str:
    """`/v1/adapters/<reference>/...`, whatever characters the user typed."""
    return "/".join(["/v1/adapters", quote(reference, safe=":@"), *rest])


def _of_tenant(path: str) -> tuple[str, dict[str, str]]:
    """`/v1/adapters/acme%2Fsql`, which no path can say, as one of sql and whose that is."""
    found = re.fullmatch(r"(/v1/(?:admin/)?adapters/)([^/%]+)%2F(.*)", path)
    return (path, {}) if found is None else (found[1] + found[3], {"x-tenant": found[2]})


def raise_for_status(response: httpx.Response) -> None:
    """Raises: CliError with the server's own message, the refusal's problems as details."""
    if not response.is_error:
        return
    try:
        body = response.json()
    except json.JSONDecodeError:
        body = {}
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        details = [problem_text(p) for p in error.get("details") or []]
        raise CliError(str(error.get("message") or f"HTTP {response.status_code}"), details)
    text = str(error or response.text.strip() or response.reason_phrase)
    raise CliError(f"HTTP {response.status_code}: {text[:300]}")


def problem_text(problem: object) -> str:
    """`adapter_model.safetensors, layers.0.q_proj.lora_A: wrong shape (expected ..)`."""
    if not isinstance(problem, dict):
        return str(problem)
    where = ", ".join(str(problem[k]) for k in ("file", "tensor") if problem.get(k))
    sizes = ", ".join(
        f"{k} {problem[k]}" for k in ("expected", "actual") if problem.get(k) is not None
    )
    text = str(problem.get("message") or problem.get("code"))
    return (f"{where}: " if where else "") + text + (f" ({sizes})" if sizes else "")
