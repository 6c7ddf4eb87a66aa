"""Sockets for IPv4 and IPv6, over real sockets."""

from __future__ import annotations

import errno
import socket

import pytest

from vllm_health import listen


class WithoutIPv6(socket.socket):
    """A socket on a kernel that was booted with ipv6.disable=1."""

    def __init__(self, family=socket.AF_INET, *rest):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        super().__init__(family, *rest)


class OnlyIPv6(socket.socket):
    """A socket on a machine with net.ipv6.bindv6only=1."""

    def getsockopt(self, level, option):
        return 1 if (level, option) == (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) else super().getsockopt(level, option)


def answers(port, host):
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


def test_every_address_has_both_families_where_the_kernel_gives_both():
    assert listen.every_address() == "::"


@pytest.mark.parametrize("kernel", [WithoutIPv6, OnlyIPv6])
def test_every_address_is_ipv4_where_the_kernel_does_not_give_both_simulated(monkeypatch, kernel):
    monkeypatch.setattr(socket, "socket", kernel)
    assert listen.every_address() == "0.0.0.0"


def test_a_wildcard_socket_answers_on_both_families():
    with listen.wildcard_socket(0) as listening:
        listening.listen()
        port = listening.getsockname()[1]
        assert (answers(port, "127.0.0.1"), answers(port, "::1")) == (True, True)


def test_a_wildcard_socket_answers_on_ipv4_without_ipv6_simulated(monkeypatch):
    monkeypatch.setattr(socket, "socket", WithoutIPv6)
    with listen.wildcard_socket(0) as listening:
        listening.listen()
        assert answers(listening.getsockname()[1], "127.0.0.1")


@pytest.mark.parametrize("taken_host", ["127.0.0.1", "0.0.0.0", "::1"])
def test_a_port_that_is_in_use_in_one_family_is_in_use(taken_host):
    with socket.socket(listen.family(taken_host)) as taken:
        taken.bind((taken_host, 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            listen.wildcard_socket(taken.getsockname()[1])
