"""Ports that are to be listened on: refused in one line before vLLM loads for minutes. Touches sockets."""

from __future__ import annotations

import socket

from vllm_health import addresses
from vllm_launch.errors import UsageError


def check(host: str, port: int, flag: str) -> None:
    """Check that ``port`` of ``host`` ("" is every address) is free. ``flag`` is the option that sets it.

    Raises:
        UsageError: it is not.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise refused(port, flag, error) from None


def refused(port: int, flag: str, error: OSError) -> UsageError:
    """Return the error for the user when a server cannot listen on ``port``."""
    return UsageError(f"{flag} {port}", *addresses.explain_listen_error(error, flag))
