"""CORS for answers that vLLM does not see: without these headers, a browser hides the answer from the page.

vLLM's own CORS runs behind the guard (vllm/entrypoints/serve/middleware/register.py) and follows the same options.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from vllm_launch.inside_vllm.answer import Answer
from vllm_launch.inside_vllm.asgi import Scope, header
from vllm_launch.inside_vllm.rules import Rules

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY")
"""The methods that "*" allows. Source: starlette/middleware/cors.py."""

ALWAYS_ALLOWED = ("Accept", "Accept-Language", "Content-Language", "Content-Type")
"""Request headers that need no permission (Fetch standard, "CORS-safelisted request-header")."""

MAX_AGE_S = 600
"""Seconds for which a browser may remember the answer to a preflight. Starlette's default, which vLLM uses."""

PRINTABLE = re.compile(r"[\t -~]*")
"""Text that an answer may repeat. The server refuses to send other header values."""


def is_preflight(scope: Scope) -> bool:
    """Return whether a browser asks for permission. Such a request has no key and no body."""
    return (
        scope.get("method") == "OPTIONS"
        and header(scope, b"origin") is not None
        and header(scope, b"access-control-request-method") is not None
    )


@dataclasses.dataclass(frozen=True)
class Cors:
    """vLLM's options --allowed-origins, --allowed-methods, --allowed-headers and --allow-credentials."""

    origins: Sequence[str]
    methods: Sequence[str]
    headers: Sequence[str]
    credentials: bool

    @classmethod
    def of(cls, rules: Rules) -> Cors:
        """Return the options in ``rules``."""
        methods = METHODS if "*" in rules.allowed_methods else rules.allowed_methods
        return cls(rules.allowed_origins, methods, rules.allowed_headers, rules.allow_credentials)

    def answer_headers(self, scope: Scope) -> dict[str, str]:
        """Return the CORS headers of an answer to ``scope``. A page may also read when it should retry."""
        varies = {"vary": "Origin"} if self.origins and not self._any_origin() else {}
        origin = header(scope, b"origin")
        if origin is None or not self._allows_origin(origin):
            return varies
        return {**self._permission(origin), "access-control-expose-headers": "Retry-After", **varies}

    def preflight(self, scope: Scope) -> Answer:
        """Return the answer to a preflight."""
        origin, method = header(scope, b"origin") or "", header(scope, b"access-control-request-method")
        names = header(scope, b"access-control-request-headers")
        refused = {
            "origin": not self._allows_origin(origin),
            "method": method not in self.methods,
            "headers": names is not None and not self._allows_headers(names),
            # vLLM has no option that allows pages of a public network to reach a private one.
            "private network": header(scope, b"access-control-request-private-network") is not None,
        }
        vary = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"
        headers = {
            "content-type": "text/plain; charset=utf-8",
            "vary": f"{vary}, Access-Control-Request-Private-Network",
            "access-control-allow-methods": ", ".join(self.methods),
            "access-control-max-age": str(MAX_AGE_S),
        }
        if not refused["origin"]:
            headers |= self._permission(origin)
        if "*" not in self.headers:
            headers["access-control-allow-headers"] = ", ".join(sorted({*ALWAYS_ALLOWED, *self.headers}))
        elif names is not None and not refused["headers"]:
            headers["access-control-allow-headers"] = names
        problems = [name for name, is_refused in refused.items() if is_refused]
        if problems:
            text = f"CORS does not allow: {', '.join(problems)}. See vLLM's option --allowed-origins."
            return Answer(400, headers, text.encode())
        return Answer(200, headers, b"OK")

    def _any_origin(self) -> bool:
        """Return whether all origins get the same answer, "*". With credentials, browsers do not accept "*"."""
        return "*" in self.origins and not self.credentials

    def _allows_origin(self, origin: str) -> bool:
        return origin in self.origins or ("*" in self.origins and PRINTABLE.fullmatch(origin) is not None)

    def _allows_headers(self, names: str) -> bool:
        if "*" in self.headers:
            return PRINTABLE.fullmatch(names) is not None
        allowed = {name.lower() for name in (*ALWAYS_ALLOWED, *self.headers)}
        return all(name.strip().lower() in allowed for name in names.split(","))

    def _permission(self, origin: str) -> dict[str, str]:
        permission = {"access-control-allow-origin": "*" if self._any_origin() else origin}
        return permission | ({"access-control-allow-credentials": "true"} if self.credentials else {})
