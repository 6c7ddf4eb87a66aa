"""The health port: /livez, /readyz, /startupz, /metrics, and / as an HTML page. Opens a socket.

It answers also under a flood of connections: above MAX_CONNECTIONS a new connection closes the oldest one, and each
answer closes its connection.
"""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
from aiohttp import web

from vllm_health import judgement, listen, state
from vllm_health.limits import Limits
from vllm_health.metrics import COLORS, Exposition, Values
from vllm_health.scrape import STATE_HEADER
from vllm_health.state import State

MAX_CONNECTIONS: Final = 256
"""Most open connections. The kubelet, Prometheus and users need a few. Each costs about 30 kB."""
_BACKLOG: Final = MAX_CONNECTIONS // 4
"""Most connections that one turn of the event loop accepts. So a probe in a flood is answered before it is closed."""
_CLOSE: Final = {"Connection": "close"}


Handler = Callable[[web.Request], Awaitable[web.Response]]


class View(msgspec.Struct, frozen=True):
    """Sources of the port's answers: present state, time limits, values of our metrics, and the model's name."""

    state: Callable[[], State]
    limits: Limits
    values: Callable[[], Values]
    model: Callable[[], str] = str


class Server:
    """A port that listens until ``close``."""

    def __init__(self, runner: web.AppRunner, port: int, close: Callable[[], None]) -> None:
        self._runner, self.port, self._close = runner, port, close

    async def close(self) -> None:
        """Stop listening and close all connections."""
        self._close()
        await self._runner.cleanup()


async def serve(view: View, host: str, port: int) -> Server:
    """Listen on ``host`` and ``port`` (0 is any free port), and return the server.

    The hosts "" and "::" are every address, IPv4 and IPv6. Raises OSError if it cannot listen.
    """
    app = web.Application(client_max_size=1024)
    app.add_routes([web.get(route, _probe(view, route)) for route in ("/livez", "/readyz", "/startupz")])
    app.add_routes([web.get("/metrics", _metrics(view)), web.get("/", _page(view))])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=5.0)
    await runner.setup()
    protocol = runner.server
    assert protocol is not None  # noqa: S101 - setup() has set it

    def connection() -> asyncio.Protocol:
        oldest_first = protocol.connections
        for handler in oldest_first[: max(len(oldest_first) + 1 - MAX_CONNECTIONS, 0)]:
            handler.force_close()
        return protocol()

    loop = asyncio.get_running_loop()
    try:
        if host in {"", "::"}:
            listening = await loop.create_server(connection, sock=listen.wildcard_socket(port), backlog=_BACKLOG)
        else:
            listening = await loop.create_server(connection, host, port, backlog=_BACKLOG)
    except OSError:
        await runner.cleanup()
        raise
    return Server(runner, listening.sockets[0].getsockname()[1], listening.close)


def _probe(view: View, route: str) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        now = view.state()
        verdicts = judgement.verdicts(now, view.limits)
        passed = {"/livez": verdicts.live, "/readyz": verdicts.ready, "/startupz": verdicts.started}[route]
        headers = _CLOSE | {STATE_HEADER: now.name}
        return web.Response(status=200 if passed else 503, text=f"{now.reason}\n", headers=headers)

    return answer


def _metrics(view: View) -> Handler:
    exposition = Exposition()

    async def answer(_: web.Request) -> web.Response:
        exposition.values, exposition.model = view.values(), view.model()
        headers = _CLOSE | {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=exposition.text(), headers=headers)

    return answer


_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5"><title>vLLM: {name}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 46rem; padding: 0 1rem }}
h1 {{ border-left: .4em solid {color}; padding-left: .4em }} td, th {{ padding-right: 2em; text-align: left }}
</style></head><body><h1>vLLM: {name}</h1><p>{reason}</p><p>In this state for {seconds:,.0f} s. {verdicts}</p>{tables}
<p><a href="/livez">/livez</a> <a href="/readyz">/readyz</a> <a href="/startupz">/startupz</a>
<a href="/metrics">/metrics</a></p></body></html>
"""


def _page(view: View) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        now = view.state()
        verdicts = judgement.verdicts(now, view.limits)
        by_name = {"live": verdicts.live, "ready": verdicts.ready, "started": verdicts.started}
        page = _PAGE.format(
            name=html.escape(now.name.replace("_", " ")),
            color=COLORS[now.name].replace(" ", ""),
            reason=html.escape(now.reason),
            seconds=time.monotonic() - now.since,
            verdicts=" ".join(f"{'' if passed else 'Not '}{name}.".capitalize() for name, passed in by_name.items()),
            tables=_phases(now) + _engines(now),
        )
        return web.Response(text=page, content_type="text/html", headers=_CLOSE)

    return answer


def _engines(now: State) -> str:
    rows = [
        (
            name,
            f"{watch.engine.running:.0f}",
            f"{watch.engine.waiting:.0f}",
            f"{watch.engine.kv_usage:.0%}",
            f"{watch.quiet_s:.0f} s",
        )
        for name, watch in now.engines.items()
        if name != state.API_SERVER
    ]
    head = ("engine", "running requests", "waiting requests", "KV cache usage", "time since last step")
    return _table(head, rows)


def _phases(now: State) -> str:
    rows = [(phase, f"{seconds:.0f} s") for phase, seconds in now.phases.items()]
    return _table(("start-up phase", f"{now.start_s:.0f} s in total"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    cells = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    cells += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
