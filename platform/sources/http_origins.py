"""Adapters behind URLs: an archive, a folder with the two files, or a repository of a hub.

A hub is asked through its plain file URLs rather than through huggingface_hub's client, which
follows redirects and retries by its own rules: pulls go through `HttpClient` and its checks only.
"""

from __future__ import annotations

import re
from contextlib import AbstractAsyncContextManager
from urllib.parse import quote

from yarl import URL

from loraplex.adapters.manifest import CONFIG_FILE
from loraplex.platform.sources.http_client import HttpClient, shown
from loraplex.platform.sources.origin import Opened

DEFAULT_REVISION = "main"
SIGNED = "?..."  # what is shown of a query string, which may be a signature

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,95})"
_REPOSITORY = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?P<folder>(?:/{_NAME})*)/?(?:@(?P<revision>[^\s@]+))?"
)


class HttpOrigin:
    """`https://host/a.tar.gz`: an archive; `https://host/folder/`: the two files in there."""

    def __init__(self, client: HttpClient, url: URL, token: str | None) -> None:
        self._client = client
        self._url = url
        self._token = token
        self.shown = shown(url) + (SIGNED if url.query_string else "")
        self.packed = not url.path.endswith("/")

    def open(
        self, name: str, offset: int, validator: str | None
    ) -> AbstractAsyncContextManager[Opened]:
        url = self._url
        if not self.packed:
            url = url.with_path(url.raw_path + name, encoded=True).with_query(url.query)
        return self._client.open(url, offset, validator, self._token)


class HubOrigin:
    """`hub:org/name`, `hub:org/name/folder@revision`.

    Both files come from one commit: the one that the revision meant when the config was read.
    """

    packed = False

    def __init__(
        self,
        client: HttpClient,
        endpoint: str,
        repository: str,
        folder: str,
        revision: str,
        token: str | None,
    ) -> None:
        self._client = client
        self._base = f"{endpoint.rstrip('/')}/{repository}/resolve"
        self._folder = folder
        self._revision = revision
        self._token = token
        self._told: dict[str, str] = {}
        self.shown = f"hub:{repository}{folder}@{revision}"

    def open(
        self, name: str, offset: int, validator: str | None
    ) -> AbstractAsyncContextManager[Opened]:
        if name == CONFIG_FILE:
            self._told.clear()  # a pull that begins anew asks anew
        revision = self._told.get("commit", self._revision)
        url = URL(f"{self._base}/{quote(revision, safe='')}{self._folder}/{name}", encoded=True)
        return self._client.open(url, offset, validator, self._token, self._told)


def parse_hub(text: str) -> tuple[str, str, str | None] | None:
    """(repository, folder with its leading slash or "", revision) of `org/name/folder@revision`."""
    found = _REPOSITORY.fullmatch(text)
    if found is None:
        return None
    return found["repo"], found["folder"], found["revision"]
