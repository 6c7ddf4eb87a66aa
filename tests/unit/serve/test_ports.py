"""The port checks before vLLM starts, with real sockets."""

from __future__ import annotations

import socket

import pytest
from machine import free_port

from vllm_launch.errors import UsageError
from vllm_launch.serve import ports


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_busy_port_is_refused(host):
    with socket.socket() as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: the port is in use; end what listens there"):
            ports.check(host, port, "--port")
    ports.check(host, port, "--port")


def test_an_address_of_another_machine_is_refused_with_the_systems_error():
    with pytest.raises(UsageError, match="cannot listen: Cannot assign requested address; give another --port"):
        ports.check("192.0.2.1", free_port(), "--port")
