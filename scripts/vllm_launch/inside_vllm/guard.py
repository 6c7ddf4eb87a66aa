"""ASGI middleware for vLLM's API server: checks API keys, allows only configured routes, answers 503 while draining.

/health, /ping and /metrics are always open. vLLM loads this class with ``--middleware
vllm_launch.inside_vllm.guard.Guard`` and passes it only the application (vllm/entrypoints/launchers/app.py). Its
settings are therefore in a JSON file, whose path is in ``LAUNCH_GUARD_FILE``. It runs inside vLLM's processes and
imports only the standard library.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FILE_VARIABLE = "LAUNCH_GUARD_FILE"

OPEN_ROUTES = ("/health", "/ping", "/metrics")
"""Routes that need no key. Probes and Prometheus send none, and the responses contain no data of users."""

MAX_PATH = 4096
"""Characters of a path that are decoded. The rest of a longer path is ignored."""


def plain_path(path: str) -> str | None:
    """Return the normalised route of ``path``, or None if the path is ambiguous.

    Routers and proxies treat "//", "/./", "%2f" and the like differently. The path is decoded once and repeated slashes
    are merged. A path that then still contains an escape, a backslash or a dot segment is ambiguous.
    """
    decoded = unquote(path[:MAX_PATH])
    if "%" in decoded or "\\" in decoded or any(part in {".", ".."} for part in decoded.split("/")):
        return None
    return re.sub(r"/{2,}", "/", decoded).rstrip("/") or "/"


def routed_path(scope: Scope) -> str:
    """Return the path that the router matches: without ``--root-path`` (starlette/_utils.py:get_route_path)."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    relative = path.removeprefix(root)
    return relative if root and relative.startswith("/") else path


@dataclasses.dataclass(frozen=True)
class Rules:
    """Settings of the guard. The launcher writes them as JSON into the file that ``FILE_VARIABLE`` names.

    ``keys``: accepted API keys. If empty, no key is needed.
    ``routes``: a route is allowed if it is one of these or lies below one. If empty, every route is allowed.
    ``probe_key``: the launcher's own key. It opens every route, so that hang detection does not depend on ``routes``.
    ``drain_flag``, ``refuse_flag``: paths of flag files. ``retry_after``: seconds.
    """

    keys: Sequence[str] = ()
    probe_key: str | None = None
    routes: Sequence[str] = ()
    drain_flag: str | None = None
    refuse_flag: str | None = None
    retry_after: int = 5

    def as_json(self) -> str:
        """Return the rules as JSON, the text of their file."""
        return json.dumps(dataclasses.asdict(self))


class Guard:
    """ASGI middleware that applies ``Rules`` to each request.

    Draining begins when the file ``drain_flag`` appears. From then on each response closes its connection, so that
    clients with persistent connections reconnect through the load balancer and reach another replica. When
    ``refuse_flag`` appears, new requests are refused. Every API server process checks both files at each request.
    Running streams continue.

    vLLM adds it last, so it runs before vLLM's own key check and CORS (entrypoints/serve/middleware/register.py). With
    ``--api-key``, a request needs a key that both accept. OPTIONS needs no key (CORS preflight).
    """

    def __init__(self, app: App) -> None:
        self.app = app
        path = os.environ.get(FILE_VARIABLE)
        self.rules = rules = Rules(**json.loads(Path(path).read_text())) if path else Rules()
        self.key_digests = tuple(hashlib.sha256(key.encode()).digest() for key in rules.keys)
        self.probe_digest = hashlib.sha256((rules.probe_key or os.urandom(32).hex()).encode()).digest()
        self.routes = tuple(route.rstrip("/") or "/" for route in rules.routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, 404 or 503, or pass the request on to vLLM unchanged."""
        if scope["type"] not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        route, key_digest = plain_path(routed_path(scope)), _key_digest(scope)
        if route in OPEN_ROUTES or hmac.compare_digest(key_digest, self.probe_digest):
            await self.app(scope, receive, send)
        elif route is None or not self._allowed(route):
            await _refuse(scope, send, 404, "This route is not served here.", {})
        elif _exists(self.rules.refuse_flag):
            headers = {"retry-after": str(self.rules.retry_after), "connection": "close"}
            await _refuse(scope, send, 503, "This server is draining. Retry with another replica.", headers)
        elif scope.get("method") != "OPTIONS" and not self._accepts(key_digest):
            await _refuse(scope, send, 401, "A valid API key is needed.", {"www-authenticate": "Bearer"})
        else:
            await self.app(scope, receive, _closing_connection(send) if _exists(self.rules.drain_flag) else send)

    def _allowed(self, route: str) -> bool:
        return not self.routes or any(
            route == allowed or route.startswith(f"{allowed.rstrip('/')}/") for allowed in self.routes
        )

    def _accepts(self, key_digest: bytes) -> bool:
        """Return whether it is the digest of an API key. It is compared with all keys, so the time reveals none."""
        matches = [hmac.compare_digest(key_digest, key) for key in self.key_digests]
        return not self.key_digests or any(matches)


def _exists(flag: str | None) -> bool:
    return flag is not None and os.path.exists(flag)  # noqa: PTH110 - one stat


def _closing_connection(send: Send) -> Send:
    """Return a ``send`` that adds "connection: close", so that the server closes the connection (RFC 9112, 9.6)."""

    async def closing(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return closing


def _key_digest(scope: Scope) -> bytes:
    """Return the digest of the request's bearer token, or of the empty string if it has none."""
    headers = dict(scope.get("headers", ()))
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return hashlib.sha256(token.strip().encode("latin-1") if scheme.lower() == "bearer" else b"").digest()


async def _refuse(scope: Scope, send: Send, status: int, message: str, headers: dict[str, str]) -> None:
    """Send an error in OpenAI's format, so that clients raise the same exceptions as for OpenAI's API."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1013 if status == 503 else 1008, "reason": message})  # noqa: PLR2004
        return
    kind = {401: "invalid_request_error", 404: "invalid_request_error", 503: "service_unavailable"}[status]
    error = {"message": message, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
