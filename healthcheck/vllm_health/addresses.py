"""Addresses that servers listen on: default ports, how this machine reaches one, and why one cannot be had."""

from __future__ import annotations

import errno
import os
from typing import Final

API_PORT: Final = 8000
"""VLLM's own default for ``--port``."""
HEALTH_PORT: Final = 8001
"""Of /livez, /readyz, /startupz and /metrics, in the launcher and beside it."""


def reachable(host: str) -> str:
    """Return the host for a URL by which this machine reaches a server that listens on ``host``.

    A wildcard address ("" is one too) becomes loopback. An IPv6 address gets the brackets that a URL needs.
    """
    wildcards = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - nothing listens here
    return wildcards.get(host, f"[{host}]" if ":" in host else host)


def why_not(error: OSError, flag: str) -> tuple[str, str]:
    """Return why a server cannot listen, and what to do about it. ``flag`` is the option that sets the port."""
    if error.errno == errno.EADDRINUSE:
        return "the port is in use", f"end what listens there, or give another {flag}"
    return f"cannot listen: {os.strerror(error.errno or 0)}", f"give another {flag}"
