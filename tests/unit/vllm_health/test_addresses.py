"""Addresses that servers listen on."""

from __future__ import annotations

import errno

import pytest

from vllm_health.addresses import reachable, why_not


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
def test_a_wildcard_is_reached_by_loopback_and_any_other_host_by_itself(host, expected):
    assert reachable(host) == expected


def test_a_port_in_use_has_another_remedy_than_a_port_that_is_not_ours_to_take():
    taken, forbidden = OSError(errno.EADDRINUSE, "in use"), OSError(errno.EACCES, "denied")
    assert why_not(taken, "--port") == ("the port is in use", "end what listens there, or give another --port")
    assert why_not(forbidden, "--port") == ("cannot listen: Permission denied", "give another --port")
