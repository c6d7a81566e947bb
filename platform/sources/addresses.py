"""Where a pull may connect to: which hosts by name, which addresses by number.

The names are an operator's allow-list. The numbers are looked at when a socket is about to be
connected, after all name resolution, so that a name which resolves to something else the second
time gains nothing. Knows nothing of HTTP.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Metadata services of clouds at addresses that no general rule catches.
_METADATA = frozenset(
    map(ipaddress.ip_address, ("168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254"))
)
_DEFAULT_PORTS = {"https": 443, "http": 80}
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?"
_ENTRY = re.compile(
    rf"(?P<host>\*|(?:\*\.)?{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{{1,5}}))?"
)


class AddressRefused(Exception):
    """No connection to this address. Not an OSError: nobody may take it for a reason to retry."""


class HostList:
    """`example.org`, `*.example.org` (its sub-domains), `example.org:8443`, `*` (any host).

    Without a port, an entry means the scheme's own.

    Raises: ValueError naming the entry that is none.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self._entries: list[tuple[str, int | None]] = []
        for entry in entries:
            found = _ENTRY.fullmatch(entry.lower())
            if found is None:
                raise ValueError(
                    f"{entry!r} is not a host; write example.org, *.example.org or example.org:8443"
                )
            host = _normal(found["host"].strip("[]"))
            self._entries.append((host, int(found["port"]) if found["port"] else None))

    def __bool__(self) -> bool:
        return bool(self._entries)

    def allows(self, scheme: str, host: str, port: int) -> bool:
        host = _normal(host.lower().rstrip("."))
        return any(
            port == (entry_port or _DEFAULT_PORTS.get(scheme)) and _matches(entry, host)
            for entry, entry_port in self._entries
        )


def _normal(host: str) -> str:
    """One spelling of every address."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _matches(entry: str, host: str) -> bool:
    if entry.startswith("*."):
        return host.endswith(entry[1:])
    return entry in ("*", host)


def refuse_address(text: str, *, allow_private: bool) -> None:
    """Raises: AddressRefused unless a pull may connect to this address.

    Link-local, multicast, reserved and metadata addresses are never allowed.
    """
    try:
        address = _unwrapped(ipaddress.ip_address(text))
    except ValueError:  # 127.1 and other spellings that only the C library reads
        raise AddressRefused(f"{text!r} is no plain address") from None
    if (
        address in _METADATA
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or (address.is_reserved and not address.is_loopback)  # ::1 is within a reserved block
    ):
        raise AddressRefused(f"{text} is an address that pulls never connect to")
    if not allow_private and (not address.is_global or getattr(address, "is_site_local", False)):
        raise AddressRefused(
            f"{text} is an address of a private network; --source-private-addresses allows those"
        )


def _unwrapped(address: Address) -> Address:
    """The IPv4 address that an IPv6 one leads to, if it does."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return inner
    return address


def guarded_socket(info: tuple[Any, ...], *, allow_private: bool) -> socket.socket:
    """A socket for exactly this address (as of getaddrinfo), not connected yet.

    Raises: AddressRefused.
    """
    family, kind, protocol, _, target = info
    refuse_address(str(target[0]), allow_private=allow_private)
    return socket.socket(family=family, type=kind, proto=protocol)
