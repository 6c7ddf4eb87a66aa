"""Addresses that servers listen on: default ports, the address for a local client, and why listening fails."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from typing import Final

API_PORT: Final = 8000
"""Default of vLLM's own ``--port``."""
HEALTH_PORT: Final = 8001
"""Default port of /livez, /readyz, /startupz and /metrics, in the launcher and in a sidecar."""


def reachable(host: str) -> str:
    """Return the host for a URL by which this machine reaches a server that listens on ``host``.

    A wildcard address ("" is one too) becomes loopback. An IPv6 address gets the brackets that a URL needs.
    """
    wildcards = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - nothing listens here
    return wildcards.get(host, f"[{host}]" if ":" in host else host)


def is_own_address(host: str) -> bool:
    """Whether ``host`` is an address of this machine. A name other than localhost is none, because it may move."""
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except (ValueError, OSError):
        return False
    return True


def explain_listen_error(error: OSError, flag: str) -> tuple[str, str]:
    """Return why a server cannot listen, and what to do about it. ``flag`` is the option that sets the port."""
    if error.errno == errno.EADDRINUSE:
        return "the port is in use", f"stop the process that listens there, or give another {flag}"
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"cannot listen: {os.strerror(error.errno)}",
            f"set {flag.replace('port', 'host')} to an address of this machine",
        )
    return f"cannot listen: {os.strerror(error.errno or 0)}", f"give another {flag}"
