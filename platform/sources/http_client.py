"""GET for pulls, in a hostile world: allow-listed hosts and checked addresses on every hop.

Redirects are followed by hand, at most five, each checked like the first; a token goes to the host
it was meant for and to no other; bodies come as they are (no content coding), so that a small
answer cannot become a large one. Proxies of the environment are not used: they would connect for
us, unchecked. Messages name a URL without its query, and a redirect's target by host only.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from loraplex.platform.errors import ApiError
from loraplex.platform.sources.addresses import AddressRefused, HostList, guarded_socket
from loraplex.platform.sources.origin import Broken, Opened, Stale

MAX_REDIRECTS = 5
CONNECT_TIMEOUT_S = 15.0
SILENCE_TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 20

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_COMMIT = "X-Repo-Commit"  # a hub's: the commit that a branch meant


class HttpClient:
    """Connections of all pulls. Close with `close`."""

    def __init__(
        self,
        hosts: HostList,
        *,
        allow_private: bool = False,
        resolver: AbstractResolver | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """resolver, tls: other name service or trust than the system's, for tests."""
        self._hosts = hosts
        self._allow_private = allow_private
        self._resolver = resolver
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def check(self, url: URL, *, hop: str = "") -> None:
        """Raises: ApiError(source_not_allowed) unless a pull may ask this URL."""
        if not self._hosts:
            raise ApiError(
                "source_not_allowed",
                "pulls over https and from hubs are switched off, because no host is allowed; "
                f"start the server with --source-hosts {url.host}",
                param="source",
            )
        if url.scheme not in ("https", "http") or not url.host or url.port is None:
            raise ApiError("source_not_allowed", f"{hop}{shown(url)} is no https URL")
        if url.scheme == "http" and not self._allow_private:
            raise ApiError(
                "source_not_allowed",
                f"{hop}{shown(url)} is not encrypted; use https (--source-private-addresses "
                "allows http too)",
                param="source",
            )
        host = url.raw_host or url.host  # as it is asked for: xn--... rather than letters
        if not self._hosts.allows(url.scheme, host, url.port):
            host = f"[{host}]" if ":" in host else host
            named = host if url.is_default_port() else f"{host}:{url.port}"
            raise ApiError(
                "source_not_allowed",
                f"{hop}{named} is not among the hosts that pulls may ask; "
                f"--source-hosts {named} adds it",
                param="source",
            )

    @asynccontextmanager
    async def open(
        self,
        url: URL,
        offset: int = 0,
        validator: str | None = None,
        token: str | None = None,
        told: dict[str, str] | None = None,
    ) -> AsyncIterator[Opened]:
        """Begin to read a URL, from `offset` if it still has this validator.

        told: takes what a hub says on the way: `commit`.

        Raises: Broken; ApiError(source_not_allowed | source_failed).
        """
        headers = {"Accept-Encoding": "identity"}
        resume = offset > 0 and validator is not None
        if resume:
            assert validator is not None, "resume says so"
            headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
        name = shown(url)
        async with AsyncExitStack() as stack:
            with _told_apart(name):
                response = await self._follow(stack, url, headers, token, told)
            yield _opened(response, name, offset if resume else 0)

    async def _follow(
        self,
        stack: AsyncExitStack,
        url: URL,
        headers: Mapping[str, str],
        token: str | None,
        told: dict[str, str] | None,
    ) -> aiohttp.ClientResponse:
        first, hop = url, ""
        for _ in range(MAX_REDIRECTS + 1):
            self.check(url, hop=hop)
            sent = dict(headers)
            if token is not None:
                sent["Authorization"] = f"Bearer {token}"
            response = await stack.enter_async_context(
                self._connected().get(url, headers=sent, allow_redirects=False)
            )
            if told is not None and _COMMIT in response.headers:
                told.setdefault("commit", response.headers[_COMMIT])
            if response.status not in _REDIRECTS:
                return response
            response.close()
            try:
                target = url.join(URL(response.headers.get("Location", "")))
                same = target.origin() == url.origin()
            except ValueError:
                raise ApiError("source_failed", f"{shown(first)} leads to no URL") from None
            if not same:
                token = None
            if url.scheme == "https" and target.scheme != "https":
                raise ApiError(
                    "source_not_allowed",
                    f"{shown(first)} leads from https to {target.scheme}; it has to stay https",
                )
            url, hop = target.with_user(None), f"{shown(first)} leads elsewhere: "
        raise ApiError("source_failed", f"{shown(first)} redirects more than {MAX_REDIRECTS} times")

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                resolver=self._resolver,
                ssl=True if self._tls is None else self._tls,
                use_dns_cache=False,
                happy_eyeballs_delay=None,  # one address after the other: a refusal is final
                socket_factory=partial(guarded_socket, allow_private=self._allow_private),
                limit=0,  # pulls are limited, not connections
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                read_bufsize=CHUNK_BYTES,
                headers={"User-Agent": "loraplex"},
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S
                ),
            )
        return self._session


def shown(url: URL) -> str:
    """A URL as anybody may see it: who asks, and with which signature, is left out."""
    return str(url.with_user(None).with_query(None).with_fragment(None))


def _opened(response: aiohttp.ClientResponse, name: str, asked: int) -> Opened:
    status = response.status
    if status == 416 and asked:
        raise Stale(f"{name} says there is nothing behind byte {asked}")
    if status in _TRANSIENT:
        raise Broken(f"{name} answers {status}")
    if status in (401, 403):
        message = f"{name} answers {status}: it wants a token that may read it, or is not there"
        raise ApiError("source_failed", message)
    if status not in (200, 206) or (status == 206 and not asked):
        raise ApiError("source_failed", f"{name} answers {status}")
    coding = response.headers.get("Content-Encoding", "identity").lower()
    if coding != "identity":
        raise ApiError(
            "source_failed", f"{name} sends {coding[:40]!r} although asked for plain bytes"
        )
    start, length = 0, response.content_length
    total = length
    if status == 206:
        start, total = asked, _whole(response.headers.get("Content-Range", ""), asked)
        if total is None:
            raise Stale(f"{name} sends another part than the one asked for")
    return Opened(
        chunks=_chunks(response, name),
        start=start,
        total=total,
        validator=_validator(response.headers),
    )


async def _chunks(response: aiohttp.ClientResponse, name: str) -> AsyncIterator[bytes]:
    while True:
        with _told_apart(name):
            chunk = await response.content.read(CHUNK_BYTES)
        if not chunk:
            return
        yield chunk


@contextmanager
def _told_apart(name: str) -> Iterator[None]:
    """Failures of the network as ours: final ones, and those worth another try."""
    try:
        yield
    except AddressRefused as error:
        raise ApiError("source_not_allowed", f"{name}: {error}", param="source") from None
    except aiohttp.InvalidURL:
        raise ApiError("source_failed", f"{name} leads to something that is no URL") from None
    except aiohttp.ClientConnectorCertificateError:
        message = f"{name}: its certificate is not valid for it, or by nobody this server trusts"
        raise ApiError("source_failed", message) from None
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise Broken(f"{name}: {_reason(error)}") from None


def _whole(content_range: str, asked: int) -> int | None:
    """The whole size from `bytes 100-999/1000`, None unless it starts where asked."""
    span, _, total = content_range.removeprefix("bytes ").partition("/")
    if span.split("-")[0] != str(asked) or not total.isdecimal():
        return None
    return int(total)


def _validator(headers: Mapping[str, str]) -> str | None:
    """What If-Range takes: a strong entity tag, else a date."""
    tag = headers.get("ETag", "")
    if tag.startswith('"'):
        return tag
    return headers.get("Last-Modified")


def _reason(error: BaseException) -> str:
    """In words, and without the URL that aiohttp likes to quote."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its name cannot be resolved"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"no connection ({error.os_error.strerror or type(error.os_error).__name__})"
    if isinstance(error, TimeoutError):
        return f"silent for {CONNECT_TIMEOUT_S:.0f} s (connecting) or {SILENCE_TIMEOUT_S:.0f} s"
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
        return "the connection broke before the end"
    return f"the transfer broke ({type(error).__name__})"
