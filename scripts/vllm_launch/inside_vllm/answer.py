"""Sends the guard's own answers, so that the client can read them.

If a server closes a connection with unread data, the kernel resets it, and clients such as Python's http.client report
the reset instead of the answer. So the rest of the request's body is read and dropped first, within a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Mapping

from vllm_launch.inside_vllm.asgi import Receive, Scope, Send, header

MAX_DROPPED_BYTES = 256 << 20
"""Bytes of a body that are read and dropped. It is more than vLLM's largest useful request, with images and videos."""

MAX_DROPPING_S = 10.0
"""Seconds for which a body is read and dropped. A client that still sends then may see a reset."""

CLOSING_S = 0.1
"""Seconds until uvicorn has closed the connection of a refused websocket. It logs an error if the application returns
earlier (uvicorn/protocols/websockets/websockets_sansio_impl.py:run_asgi)."""

EXTENSION = "websocket.http.response"
"""The server can answer a websocket's request with HTTP (ASGI, "Websocket Denial Response")."""

UNAVAILABLE = 503
"""HTTP status of a server that will not serve this request, although another replica may."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A complete HTTP answer. It can also answer the request for a websocket."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer to the request ``scope``."""
        if scope["type"] == "http":
            await self._send(scope, receive, send)
        elif EXTENSION in scope.get("extensions", {}):
            await send({"type": f"{EXTENSION}.start", "status": self.status, "headers": self._fields(scope)})
            await send({"type": f"{EXTENSION}.body", "body": self.body})
            await asyncio.sleep(CLOSING_S)
        else:  # "try again later" or "policy violation" (IANA's WebSocket close codes)
            await send({"type": "websocket.close", "code": 1013 if self.status == UNAVAILABLE else 1008})

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": self._fields(scope)})
        if not _has_body(scope):
            await send({"type": "http.response.body", "body": self.body})
            return
        # The answer goes out at once, for clients that read while they send. The server closes after the last message.
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        await _drop_body(receive)
        await send({"type": "http.response.body", "body": b""})

    def _fields(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        fields = {"content-length": str(len(self.body)), **self.headers}
        if header(scope, b"expect") is not None:
            fields["connection"] = "close"  # the client may never send the body
        return [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]


def _has_body(scope: Scope) -> bool:
    return header(scope, b"transfer-encoding") is not None or header(scope, b"content-length") not in {None, "0"}


async def _drop_body(receive: Receive) -> None:
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(MAX_DROPPING_S):
            while dropped < MAX_DROPPED_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                dropped += len(message.get("body", b""))
