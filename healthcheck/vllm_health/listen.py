"""Sockets that answer on IPv4 and IPv6. Opens sockets."""

from __future__ import annotations

import errno
import socket


def every_address() -> str:
    """Return the host for a server that is to answer on every address of this machine.

    It is "::" where the kernel gives such a socket both families, as Linux does by default. Else it is "0.0.0.0".
    """
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            only_ipv6 = probe.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)  # net.ipv6.bindv6only
            probe.bind(("::", 0))
    except OSError:  # a kernel without IPv6
        return "0.0.0.0"  # noqa: S104 - every address is what the caller asked for
    return "0.0.0.0" if only_ipv6 else "::"  # noqa: S104 - as above


def family(host: str) -> socket.AddressFamily:
    """Return the family of a socket that listens on ``host``, an address or "". vLLM chooses in the same way."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def wildcard_socket(port: int) -> socket.socket:
    """Return a socket bound to ``port`` of every address, IPv4 and IPv6, or only IPv4 on a kernel without IPv6.

    asyncio alone would bind only IPv6 for "::", and on a kernel without IPv6 nothing for "".

    Raises:
        OSError: the port is in use, or the kernel refuses.
    """
    try:
        return _bound("::", port)
    except OSError as error:
        if error.errno not in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:
            raise
    return _bound("0.0.0.0", port)  # noqa: S104 - every address is what the caller asked for


def _bound(address: str, port: int) -> socket.socket:
    bound = socket.socket(family(address), socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if bound.family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound
