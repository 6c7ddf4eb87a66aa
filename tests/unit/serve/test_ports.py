"""The port checks before vLLM starts, with real sockets."""

from __future__ import annotations

import socket

import pytest
from machine import free_port

from vllm_health import listen
from vllm_launch.errors import UsageError
from vllm_launch.serve import ports


@pytest.mark.parametrize(
    ("host", "listener"), [("127.0.0.1", "127.0.0.1"), ("", ""), ("::", "127.0.0.1"), ("::", "::1")]
)
def test_a_port_that_somebody_listens_on_is_refused(host, listener):
    with socket.socket(listen.family(listener)) as taken:
        taken.bind((listener, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: the port is in use; stop the process that listens"):
            ports.check(host, port, "--port")
    ports.check(host, port, "--port")


def test_an_address_of_another_machine_is_refused_with_the_systems_error():
    with pytest.raises(
        UsageError, match="cannot listen: Cannot assign requested address; set --host to an address of this machine"
    ):
        ports.check("192.0.2.1", free_port(), "--port")
