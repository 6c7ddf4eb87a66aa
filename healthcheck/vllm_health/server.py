"""The health port: /livez, /readyz and /startupz, each one English sentence. Opens a socket."""

from __future__ import annotations

from typing import Literal

import msgspec
from aiohttp import web

State = Literal["starting", "ready", "draining", "stopped"]


class Health(msgspec.Struct):
    """What the port answers from; whoever knows better sets it."""

    state: State = "starting"
    reason: str = "vLLM is starting."


class Verdict(msgspec.Struct, frozen=True):
    """``ok`` is 200, else 503."""

    ok: bool
    sentence: str


def judge(route: Literal["/livez", "/readyz", "/startupz"], health: Health) -> Verdict:
    """What a probe is told. A start or a drain never fails liveness: a restart would only lose what was achieved."""
    ok = {
        "/livez": health.state != "stopped",
        "/readyz": health.state == "ready",
        "/startupz": health.state in {"ready", "draining"},
    }[route]
    return Verdict(ok, health.reason)


async def serve(health: Health, host: str, port: int) -> web.AppRunner:
    """Listen until the runner's ``cleanup``. OSError when the port cannot be had."""

    async def livez(_: web.Request) -> web.Response:
        return _response(judge("/livez", health))

    async def readyz(_: web.Request) -> web.Response:
        return _response(judge("/readyz", health))

    async def startupz(_: web.Request) -> web.Response:
        return _response(judge("/startupz", health))

    app = web.Application(client_max_size=1024)
    app.add_routes([web.get("/livez", livez), web.get("/readyz", readyz), web.get("/startupz", startupz)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, reuse_address=True).start()
    except OSError:
        await runner.cleanup()
        raise
    return runner


def _response(verdict: Verdict) -> web.Response:
    return web.Response(status=200 if verdict.ok else 503, text=f"{verdict.sentence}\n")
