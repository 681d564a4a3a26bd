"""Which IP addresses are public hosts. Pure: nothing is resolved here."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PUBLIC_V6: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_SPECIAL: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            # IANA IPv4 Special-Purpose Address Registry, all but AS112 and AMT (which are reachable); and multicast
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
            *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
            # IANA IPv6 Special-Purpose Address Registry, what of it is in 2000::/3; 6to4 is checked by its IPv4 address
            *("2001::/23", "2001:db8::/32", "3fff::/20"),
        ),
    )
)
"""A table of our own: what Python takes for private differs from version to version, and each lacks something."""


class NotPublicError(Exception):
    """An address that must not be connected to. It has no details, as the server that named it may read them."""


def is_public(address: Address) -> bool:
    """Return whether an address is a public host's; one that contains an IPv4 address is checked by that."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        behind = _behind(address)
        if behind is not None:
            return is_public(behind)
        if address not in _PUBLIC_V6:
            return False
    special = any(address.version == network.version and address in network for network in _SPECIAL)
    return address.is_global and not address.is_multicast and not special


def _behind(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 address contains, if it does."""
    if address in _NAT64:
        return ipaddress.IPv4Address(address.packed[-4:])
    return address.ipv4_mapped or address.sixtofour


def address_in(host: str) -> Address | None:
    """Return the address that a host of a URL is, in any notation that a resolver takes for one; None for a name.

    Args:
        host: Without brackets. ``127.1``, ``0x7f000001``, ``2130706433`` and ``localhost`` are addresses, too.
    """
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return ipaddress.IPv4Address("127.0.0.1")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    with contextlib.suppress(OSError, ValueError):  # a null byte is a ValueError
        return ipaddress.IPv4Address(socket.inet_aton(host))
    return None


def is_this_machine(host: str) -> bool:
    """Return whether a host is this machine, without asking the resolver."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
