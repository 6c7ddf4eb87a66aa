"""Checks ports before the start, so that a busy one is reported before vLLM loads for minutes. Touches sockets."""

from __future__ import annotations

import socket

from vllm_health import addresses, listen
from vllm_launch.errors import UsageError


def check(host: str, port: int, flag: str) -> None:
    """Check that a server can listen on ``port`` of ``host`` ("" is every IPv4 address). ``flag``: the port's option.

    Raises:
        UsageError: it cannot.
    """
    with socket.socket(listen.family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise refused(port, flag, error) from None


def refused(port: int, flag: str, error: OSError) -> UsageError:
    """Return the error for the user when a server cannot listen on ``port``."""
    return UsageError(f"{flag} {port}", *addresses.explain_listen_error(error, flag))
