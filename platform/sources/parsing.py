"""The text of a source, read: which kind it is, and whether the operator allows it at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from yarl import URL

from loraplex.platform.errors import ApiError
from loraplex.platform.sources import buckets
from loraplex.platform.sources.directories import DirectoryOrigin, check_relative
from loraplex.platform.sources.http_client import HttpClient
from loraplex.platform.sources.http_origins import (
    DEFAULT_REVISION,
    HttpOrigin,
    HubOrigin,
    parse_hub,
)
from loraplex.platform.sources.origin import Origin

KINDS = (
    "https://host/a.tar.gz, https://host/folder/, hub:org/name@revision, s3://bucket/prefix, "
    "dir:NAME/path"
)


class Sources:
    """The kinds of sources, as one server allows them."""

    def __init__(
        self,
        client: HttpClient,
        *,
        hub_endpoint: str,
        buckets: tuple[str, ...],
        directories: dict[str, Path],
        max_pulls: int,
    ) -> None:
        self._client = client
        self._hub_endpoint = hub_endpoint
        self._buckets = buckets
        self._directories = directories
        self._threads = ThreadPoolExecutor(max_pulls, thread_name_prefix="bucket")

    async def close(self) -> None:
        """Once no pull runs any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._client.close()

    def origin(self, source: str, revision: str | None = None, token: str | None = None) -> Origin:
        """Raises: ApiError(invalid_request | source_not_allowed)."""
        kind, _, rest = source.partition(":")
        if revision is not None and kind != "hub":
            raise _invalid("only hub sources have a revision", "revision")
        if token is not None and kind not in ("hub", "https", "http"):
            raise _invalid("only https and hub sources take a token", "token")
        if kind == "hub":
            return self._hub(rest, revision, token)
        if kind in ("https", "http"):
            return self._http(source, token)
        if kind == "dir":
            return self._directory(source, rest)
        if rest.startswith("//"):
            return self._bucket(source, kind)
        raise _invalid(f"{source[:120]!r} is no source; sources are {KINDS}")

    def _hub(self, text: str, revision: str | None, token: str | None) -> Origin:
        found = parse_hub(text)
        if found is None:
            raise _invalid(f"'hub:{text[:120]}' is not hub:org/name, hub:org/name/folder@revision")
        repository, folder, named = found
        if revision is not None and named not in (None, revision):
            raise _invalid(f"the source says {named!r} and the revision {revision!r}", "revision")
        self._client.check(URL(self._hub_endpoint))
        return HubOrigin(
            self._client,
            self._hub_endpoint,
            repository,
            folder,
            revision or named or DEFAULT_REVISION,
            token,
        )

    def _http(self, source: str, token: str | None) -> Origin:
        try:
            url = URL(source).with_fragment(None)
            host, secret = url.host, url.user or url.password
        except ValueError:
            raise _invalid("the source is no URL") from None
        if not host:
            raise _invalid("the source names no host")
        if secret:
            raise _invalid("the source must not hold a user or a password; send a token")
        self._client.check(url)
        return HttpOrigin(self._client, url, token)

    def _directory(self, source: str, rest: str) -> Origin:
        name, _, path = rest.partition("/")
        if name not in self._directories:
            known = ", ".join(sorted(self._directories)) or "none"
            raise ApiError(
                "source_not_allowed",
                f"{name[:80]!r} is not a directory that pulls may read (allowed: {known}); "
                f"--source-dirs {name[:80] or 'NAME'}=PATH adds it",
                param="source",
            )
        check_relative(path)
        return DirectoryOrigin(self._directories[name], path, source)

    def _bucket(self, source: str, protocol: str) -> Origin:
        parts = source.partition("://")[2].split("/")
        if {"..", "."} & set(parts) or "::" in source or "?" in source or "@" in parts[0]:
            raise _invalid(f"{source[:120]!r} is no plain bucket and prefix")
        if not any(buckets.within(source, prefix) for prefix in self._buckets):
            known = ", ".join(self._buckets) or "none"
            raise ApiError(
                "source_not_allowed",
                f"{protocol}://{parts[0]} is not among the buckets that pulls may read "
                f"(allowed: {known}); --source-buckets {protocol}://{parts[0]} adds it",
                param="source",
            )
        return buckets.BucketOrigin(source, self._threads)


def _invalid(message: str, param: str = "source") -> ApiError:
    return ApiError("invalid_request", message, param=param)
