"""ASGI middleware for vLLM's API server: checks API keys, allows only configured routes, answers 503 while draining.

/health, /ping and /metrics are always open. vLLM loads this class with ``--middleware
vllm_launch.inside_vllm.guard.Guard`` and passes it only the application (vllm/entrypoints/launchers/app.py). Its
settings are therefore in a JSON file, whose path is in ``LAUNCH_GUARD_FILE``. It runs inside vLLM's processes and
imports only the standard library.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any
from urllib.parse import unquote

from vllm_launch.inside_vllm.answer import UNAVAILABLE, Answer
from vllm_launch.inside_vllm.asgi import App, Receive, Scope, Send, header_values
from vllm_launch.inside_vllm.cors import Cors, is_preflight
from vllm_launch.inside_vllm.rules import FILE_VARIABLE, Rules, RulesError, read_rules

LOGGER = logging.getLogger("vllm.launch_guard")
"""Below vLLM's own logger, so that its lines are in vLLM's log."""

OPEN_ROUTES = ("/health", "/ping", "/metrics")
"""Routes that need no key. Kubernetes' probes and Prometheus send none, and the responses have no data of users."""

CLOSE = (b"connection", b"close")

MAX_PATH = 4096
"""Characters of the longest path that is served. vLLM's longest route is far shorter."""


def plain_path(path: str) -> str | None:
    """Return the normalised route of ``path``, or None if the path is ambiguous.

    Routers and proxies treat "//", "/./", "%2f" and the like differently. The path is decoded once and repeated slashes
    are merged. A path that then still contains an escape, a backslash or a dot segment is ambiguous. So is a path that
    is too long.
    """
    decoded = unquote(path[: MAX_PATH + 1])
    if len(path) > MAX_PATH or "%" in decoded or "\\" in decoded:
        return None
    if any(part in {".", ".."} for part in decoded.split("/")):
        return None
    return re.sub(r"/{2,}", "/", decoded).rstrip("/") or "/"


def routed_path(scope: Scope) -> str:
    """Return the path that the router matches: without ``--root-path`` (starlette/_utils.py:get_route_path)."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    relative = path.removeprefix(root)
    return relative if root and relative.startswith("/") else path


class Guard:
    """ASGI middleware that applies ``Rules`` to requests, except to open routes and from the launcher's prober.

    The prober has a key of its own (``probe_key``).
    Draining begins when the file ``drain_flag`` appears. From then on each response closes its connection, so that
    clients with persistent connections reconnect through the load balancer and reach another replica. When
    ``refuse_flag`` appears, new requests are refused. Every API server process checks both files at each request.
    Running streams continue.

    vLLM adds it last, so it runs before vLLM's own key check and CORS (entrypoints/serve/middleware/register.py). If
    vLLM itself has ``--api-key``, a request needs a key that both accept. Under vllm-launch it has none. The guard
    itself answers CORS preflights, which have no key.

    Without its rules it refuses every request, except those to the open routes: it cannot know who may enter.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.rules: Rules | None = None
        try:
            self.rules = read_rules(os.environ.get(FILE_VARIABLE))
        except RulesError as error:
            LOGGER.error(  # noqa: TRY400 - the traceback says nothing more
                "The guard of vllm-launch has no rules: %s. It refuses every request except %s. Start vLLM with "
                "`vllm-launch serve`, or without --middleware %s.%s.",
                error, ", ".join(OPEN_ROUTES), Guard.__module__, Guard.__qualname__,
            )  # fmt: skip
        rules = self.rules or Rules()
        self.cors = Cors.of(rules)
        self.key_digests = tuple(_digest(key.encode()) for key in rules.keys)
        self.probe_digest = _digest((rules.probe_key or os.urandom(32).hex()).encode())
        self.routes = tuple(route.rstrip("/") or "/" for route in rules.routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a CORS preflight, respond with 401, 404 or 503, or pass the request on to vLLM."""
        if scope["type"] not in {"http", "websocket"} or _is_open(scope):
            await self.app(scope, receive, send)
            return
        tokens = _tokens(scope)
        if not self._is_probe(tokens):
            if self.rules is not None:
                send = _closing_while(self.rules.drain_flag, send)
            if (answer := self._answer(scope, tokens)) is not None:
                await answer.send(scope, receive, send)
                return
        await self.app(_with_bearer(scope, self._accepted(tokens) or b""), receive, send)

    def _answer(self, scope: Scope, tokens: Sequence[bytes]) -> Answer | None:
        """Return the guard's own answer, or None if the request may reach vLLM."""
        route = plain_path(routed_path(scope))
        if self.rules is None:
            return self._error(scope, 503, "This server has no rules for requests. Its log says why.")
        if is_preflight(scope):
            return self.cors.preflight(scope)
        if route is None or not self._allowed(route):
            return self._error(scope, 404, "This route is not served here.")
        if _exists(self.rules.refuse_flag):
            later = {"retry-after": str(self.rules.retry_after)}
            return self._error(scope, 503, "This server is draining. Retry with another replica.", later)
        if self._accepted(tokens) is None:
            return self._error(scope, 401, "A valid API key is needed.", {"www-authenticate": "Bearer"})
        return None

    def _error(self, scope: Scope, status: int, message: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Return an error in OpenAI's format, so that clients raise the same exceptions as for OpenAI's API."""
        kind = "service_unavailable" if status == UNAVAILABLE else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": status}
        closing = {"connection": "close"} if status == UNAVAILABLE else {}
        fields = {"content-type": "application/json", **(headers or {}), **closing, **self.cors.answer_headers(scope)}
        return Answer(status, fields, json.dumps({"error": error}).encode())

    def _is_probe(self, tokens: Sequence[bytes]) -> bool:
        return any(hmac.compare_digest(_digest(token), self.probe_digest) for token in tokens)

    def _allowed(self, route: str) -> bool:
        return not self.routes or any(
            route == allowed or route.startswith(f"{allowed.rstrip('/')}/") for allowed in self.routes
        )

    def _accepted(self, tokens: Sequence[bytes]) -> bytes | None:
        """Return the token that is an API key, or None. If no key is needed, return the first token or b"".

        Each token is compared with every key, so the response time does not reveal a key.
        """
        if not self.key_digests:
            return next(iter(tokens), b"")
        accepted = None
        for token in tokens:
            matches = [hmac.compare_digest(_digest(token), key) for key in self.key_digests]
            accepted = token if any(matches) else accepted
        return accepted


def _is_open(scope: Scope) -> bool:
    """Return whether the router sees one of the open routes. A path that only resembles one needs a key."""
    return scope["type"] == "http" and routed_path(scope).removesuffix("/") in OPEN_ROUTES


def _exists(flag: str | None) -> bool:
    return flag is not None and os.path.exists(flag)  # noqa: PTH110 - one stat


def _closing_while(flag: str | None, send: Send) -> Send:
    """Return a ``send`` that adds "connection: close" while the file ``flag`` exists (RFC 9112, 9.6).

    The file is looked for when the response begins: a request may have come before the drain and be answered in it.
    """

    async def closing(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start" and _exists(flag):
            headers = list(message.get("headers", ()))
            message = {**message, "headers": headers if CLOSE in headers else [*headers, CLOSE]}
        await send(message)

    return closing


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _tokens(scope: Scope) -> list[bytes]:
    """Return the bearer token and the key in x-api-key, which Anthropic's clients send to /v1/messages.

    If a header appears several times, none of its values counts: vLLM would use the first one, and a proxy may use
    the last one.
    """
    bearers = [value.partition(b" ") for value in header_values(scope, b"authorization")]
    tokens = [token for scheme, _, token in bearers if scheme.lower() == b"bearer"] if len(bearers) == 1 else []
    keys = header_values(scope, b"x-api-key")
    return [token.strip(b" \t") for token in (*tokens, *(keys if len(keys) == 1 else ()))]


def _with_bearer(scope: Scope, token: bytes) -> Scope:
    """Return ``scope`` with ``token`` as its only bearer token, because vLLM's own key check reads no x-api-key."""
    if not token or not header_values(scope, b"x-api-key"):
        return scope
    others = [(name, value) for name, value in scope["headers"] if name.lower() != b"authorization"]
    return {**scope, "headers": [*others, (b"authorization", b"Bearer " + token)]}
