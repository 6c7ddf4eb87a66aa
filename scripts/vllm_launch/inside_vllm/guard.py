"""ASGI middleware for vLLM's API server: checks API keys, allows only configured routes, answers 503 while draining.

/health, /ping and /metrics are always open. vLLM loads this with ``--middleware
vllm_launch.inside_vllm.guard.Guard`` and gives it the application alone (vllm/entrypoints/launchers/app.py), so what it
should do is in the JSON file that ``LAUNCH_GUARD_FILE`` names. It runs inside vLLM's processes and imports the standard
library only.
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
"""Without a key: probes carry none, and Prometheus reads /metrics; both say nothing of what users send."""

MAX_PATH = 4096


def plain_path(path: str) -> str | None:
    """The route that ``path`` asks for, with every disguise taken off; None where it stays ambiguous.

    Routers and proxies disagree on "//", "/./", "%2f" and the like, so a path that still has one after decoding once is
    refused rather than guessed at.
    """
    decoded = unquote(path[:MAX_PATH])
    if "%" in decoded or "\\" in decoded or any(part in {".", ".."} for part in decoded.split("/")):
        return None
    return re.sub(r"/{2,}", "/", decoded).rstrip("/") or "/"


def routed_path(scope: Scope) -> str:
    """The path that the router will look at: without ``--root-path`` (starlette/_utils.py:get_route_path)."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    below = path.removeprefix(root)
    return below if root and below.startswith("/") else path


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the guard does; the launcher writes them as JSON into the file that ``FILE_VARIABLE`` names.

    ``keys`` empty: no key is asked for. ``routes`` empty: every route is allowed; else a route is allowed when it is
    one of them or lies below one. ``probe_key`` is the launcher's own and opens every route: whether the engine hangs
    must not depend on what clients may do. ``drain_flag`` and ``refuse_flag`` are paths; ``retry_after`` is in seconds.
    """

    keys: Sequence[str] = ()
    probe_key: str | None = None
    routes: Sequence[str] = ()
    drain_flag: str | None = None
    refuse_flag: str | None = None
    retry_after: int = 5

    def as_json(self) -> str:
        """Return the rules as the text of their file."""
        return json.dumps(dataclasses.asdict(self))


class Guard:
    """ASGI middleware that holds requests against ``Rules``.

    Draining begins when the file ``drain_flag`` appears: from then on an
    answer is the last of its connection, so that clients who keep theirs come by way of the load balancer again and
    find another replica. When ``refuse_flag`` appears new requests are turned away. Every API server process sees both
    with its next request, and streams that are under way go on.

    vLLM adds it last, so it stands outside of vLLM's own key check and CORS (entrypoints/serve/middleware/register.py):
    with ``--api-key`` given too a request needs a key that both know. OPTIONS carries no key (CORS preflight).
    """

    def __init__(self, app: App) -> None:
        self.app = app
        path = os.environ.get(FILE_VARIABLE)
        self.rules = rules = Rules(**json.loads(Path(path).read_text())) if path else Rules()
        self.keys = tuple(hashlib.sha256(key.encode()).digest() for key in rules.keys)
        self.probe = hashlib.sha256((rules.probe_key or os.urandom(32).hex()).encode()).digest()
        self.routes = tuple(route.rstrip("/") or "/" for route in rules.routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, 404 or 503 here, or hand the request on to vLLM untouched."""
        if scope["type"] not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        route, shown = plain_path(routed_path(scope)), _key_shown(scope)
        if route in OPEN_ROUTES or hmac.compare_digest(shown, self.probe):
            await self.app(scope, receive, send)
        elif route is None or not self._allowed(route):
            await _refuse(scope, send, 404, "This route is not served here.", {})
        elif _there(self.rules.refuse_flag):
            headers = {"retry-after": str(self.rules.retry_after), "connection": "close"}
            await _refuse(scope, send, 503, "This server is draining; ask another replica.", headers)
        elif scope.get("method") != "OPTIONS" and not self._known(shown):
            await _refuse(scope, send, 401, "A valid API key is needed.", {"www-authenticate": "Bearer"})
        else:
            await self.app(scope, receive, _last_of_its_connection(send) if _there(self.rules.drain_flag) else send)

    def _allowed(self, route: str) -> bool:
        return not self.routes or any(
            route == allowed or route.startswith(f"{allowed.rstrip('/')}/") for allowed in self.routes
        )

    def _known(self, shown: bytes) -> bool:
        """Whether it is one of the keys; every key is compared, so time tells nothing of which."""
        matches = [hmac.compare_digest(shown, key) for key in self.keys]
        return not self.keys or any(matches)


def _there(flag: str | None) -> bool:
    return flag is not None and os.path.exists(flag)  # noqa: PTH110 - one stat


def _last_of_its_connection(send: Send) -> Send:
    """``send`` that lets the server close the connection after the answer, as HTTP/1.1 spells it (RFC 9112, 9.6)."""

    async def closing(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return closing


def _key_shown(scope: Scope) -> bytes:
    """The digest of the request's bearer token; of nothing where it shows none."""
    headers = dict(scope.get("headers", ()))
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return hashlib.sha256(token.strip().encode("latin-1") if scheme.lower() == "bearer" else b"").digest()


async def _refuse(scope: Scope, send: Send, status: int, message: str, headers: dict[str, str]) -> None:
    """An error in OpenAI's form, so that clients raise what they raise for OpenAI's own."""
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
