"""A real uvicorn, with the parsers and event loops that vLLM can have, serves a small application behind the guard."""

import json
import socket
import threading
from http.client import HTTPException, HTTPResponse

import pytest
import uvicorn

from vllm_launch.inside_vllm.guard import FILE_VARIABLE, Guard

HANDSHAKE = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


class Reply:
    """An answer as a client reads it. ``status`` is None if the server closed the connection without one."""

    def __init__(self, connection, method=b"GET"):
        self.status, self.headers, self.body = None, {}, b""
        response = HTTPResponse(connection, method=method.decode())
        try:
            response.begin()
            self.status, self.headers = response.status, {name.lower(): text for name, text in response.getheaders()}
            self.body = response.read() if response.status != 101 else b""
        except (ConnectionError, HTTPException):
            pass


class GuardedServer:
    """A guard with ``rules`` under uvicorn. ``reached`` has the scopes of the requests that came through."""

    def __init__(self, parser, loop, folder, app=None, root=""):
        self.drain_flag, self.refuse_flag, self.reached = folder / "draining", folder / "refusing", []
        self.inner, guard = app or self.answer, Guard(self.app)

        async def served(scope, receive, send):  # as FastAPI does with --root-path
            await guard({**scope, "root_path": root}, receive, send)

        config = uvicorn.Config(served, http=parser, loop=loop, lifespan="off", log_config=None, timeout_keep_alive=2)
        self.server, self.socket = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = self.socket.getsockname()
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    async def app(self, scope, receive, send):
        self.reached.append(scope)
        await self.inner(scope, receive, send)

    @staticmethod
    async def answer(scope, receive, send):
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close"})
            return
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    def connect(self):
        return socket.create_connection(self.address, timeout=20)

    def ask(self, target=b"/v1/models", *headers, method=b"GET", body=b""):
        """Send one request, whose parts may be invalid, and return the reply."""
        lines = [b"%s %s HTTP/1.1" % (method, target), b"Host: h", *headers, b"", body]
        with self.connect() as connection:
            connection.sendall(b"\r\n".join(lines))
            return Reply(connection, method)

    def ask_websocket(self, target=b"/v1/realtime", *headers):
        return self.ask(target, HANDSHAKE.rstrip(), *headers)

    def close(self):
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()


@pytest.fixture(params=[("httptools", "uvloop"), ("h11", "asyncio")], ids=["httptools", "h11"])
def serve(request, monkeypatch, tmp_path):
    """Return a function that starts a guarded server. ``rules`` are those of the file. ``lost``: there is no file."""
    servers = []

    def start(app=None, root="", *, lost=False, **rules):
        file = tmp_path / "guard.json"
        flags = {"drain_flag": str(tmp_path / "draining"), "refuse_flag": str(tmp_path / "refusing")}
        file.write_text(json.dumps({"keys": ["right"], "retry_after": 7, **flags, **rules}))
        monkeypatch.setenv(FILE_VARIABLE, str(file))
        if lost:
            monkeypatch.delenv(FILE_VARIABLE)
        servers.append(GuardedServer(*request.param, tmp_path, app, root))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
