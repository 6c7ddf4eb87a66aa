"""Checks ports before the start, so that a busy one is reported before vLLM loads for minutes. Touches sockets."""

from __future__ import annotations

import socket

from vllm_health import addresses
from vllm_launch.errors import UsageError


def check(host: str, port: int, flag: str) -> None:
    """Check that a server can listen on ``port`` of ``host`` ("" is every address). ``flag``: the port's option.

    Raises:
        UsageError: it cannot.
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
