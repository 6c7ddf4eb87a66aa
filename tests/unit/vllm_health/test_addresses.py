"""Addresses that servers listen on."""

from __future__ import annotations

import errno

import pytest

from vllm_health.addresses import explain_listen_error, reachable


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("fe80::1", "[fe80::1]"),
        ("10.0.0.1", "10.0.0.1"),
        ("gpu-7.example", "gpu-7.example"),
    ],
)
def test_a_wildcard_host_is_reached_through_loopback_and_other_hosts_by_their_own_address(host, expected):
    assert reachable(host) == expected


def test_a_port_in_use_and_a_forbidden_port_have_different_remedies():
    in_use, forbidden = OSError(errno.EADDRINUSE, "in use"), OSError(errno.EACCES, "denied")
    remedy = "stop the process that listens there, or give another --port"
    assert explain_listen_error(in_use, "--port") == ("the port is in use", remedy)
    assert explain_listen_error(forbidden, "--port") == ("cannot listen: Permission denied", "give another --port")
