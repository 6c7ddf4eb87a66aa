"""The command line: ``vllm-health serve`` beside any vLLM, ``smoke`` and ``wait`` against one."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vllm_health import addresses
from vllm_health.api_keys import is_usable, keys_in
from vllm_health.limits import DEFAULT_STALL_S, DEFAULT_START_STALL_S, Limits
from vllm_health.state import Movement

try:
    from vllm_health import gpu_faults, prober, scrape, server, smoke
except ModuleNotFoundError as missing:  # a light install, which plans and does not serve
    print(f"vllm-health: {missing.name} is not installed; install 'vllm-launch[serve]'", file=sys.stderr)
    raise SystemExit(2) from None

MISTAKE = 2
"""Exit code of a mistake in what was given."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as everywhere in this project."""
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(MISTAKE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. 2 is a mistake in what was given, said in one line on stderr."""
    given = _parser().parse_args(argv)
    try:
        key = _key(given.api_key_file)
        target = scrape.Target(url=_url(given.url), api_key=key, model=given.model)
        code: int = given.run(given, target)
    except _Mistake as error:
        print(f"vllm-health: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code


class _Mistake(Exception):  # noqa: N818 - a line for people
    """Where, what, what to do."""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vllm-health", description="Is vLLM well? Tells busy from dead.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    serving = commands.add_parser("serve", help="watch a vLLM and answer probes about it", allow_abbrev=False)
    serving.set_defaults(run=_serve)
    serving.add_argument(
        "--target",
        dest="url",
        default=f"http://127.0.0.1:{addresses.API_PORT}",
        metavar="URL",
        help="default: %(default)s",
    )
    serving.add_argument("--host", default="0.0.0.0", help="address to listen on, default: every one")  # noqa: S104
    serving.add_argument("--port", type=_port, default=addresses.HEALTH_PORT, help="default: %(default)s")
    serving.add_argument(
        "--stall-seconds",
        type=_seconds,
        default=DEFAULT_STALL_S,
        help="a hung engine is dead after this; 0: never; default: %(default)g",
    )
    serving.add_argument(
        "--start-stall-seconds", type=_seconds, default=DEFAULT_START_STALL_S,
        help="a start in which nothing moves (GPU memory) is given up after this; 0: never; default: %(default)g",
    )  # fmt: skip
    serving.add_argument("--gpu-fault-kills", action="store_true", help="a fatal GPU fault fails /livez too")

    smoking = commands.add_parser("smoke", help="try a server through the openai client", allow_abbrev=False)
    smoking.set_defaults(run=_smoke)
    waiting = commands.add_parser("wait", help="wait until a health port says that vLLM is ready", allow_abbrev=False)
    waiting.set_defaults(run=_wait)
    waiting.add_argument("--seconds", type=_seconds, default=0.0, help="give up after this; default 0: never")
    smoking.add_argument("url", metavar="URL", help=f"of the API, such as http://127.0.0.1:{addresses.API_PORT}")
    waiting.add_argument(
        "url", metavar="URL", help=f"of the health port, such as http://127.0.0.1:{addresses.HEALTH_PORT}"
    )
    for command in (serving, smoking, waiting):
        command.add_argument("--api-key-file", metavar="FILE", help="its first line; else VLLM_API_KEY")
        command.add_argument("--model", help="name to ask for; default: the one that the server names first")
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535):  # noqa: PLR2004 - TCP's
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give 1 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give seconds, 0 or more")
    return seconds


def _url(text: str) -> str:
    url = text.rstrip("/").removesuffix("/v1").rstrip("/")
    scheme, separator, rest = url.partition("://")
    if scheme not in {"http", "https"} or not separator or not rest.strip("/"):
        raise _Mistake(
            f"URL {text!r}: it is not http:// or https:// and a host; write one such as http://127.0.0.1:{addresses.API_PORT}"
        )
    return url


def _key(file: str | None) -> str | None:
    if file is None:
        return os.environ.get("VLLM_API_KEY") or None
    try:
        keys = keys_in(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise _Mistake(
            f"--api-key-file {file}: cannot be read: {why}; name a file with a key in its first line"
        ) from None
    if not keys:
        raise _Mistake(f"--api-key-file {file}: the file holds no key; write one in its first line")
    if not is_usable(keys[0]):
        raise _Mistake(f"--api-key-file {file}: an HTTP header cannot carry its first line; write a key alone in it")
    return keys[0]


# ---- serve


def _serve(given: argparse.Namespace, target: scrape.Target) -> int:
    limits = Limits(
        stall_s=given.stall_seconds, start_stall_s=given.start_stall_seconds, gpu_fault_kills=given.gpu_fault_kills
    )
    return asyncio.run(_watch(target, limits, given.host, given.port))


async def _watch(target: scrape.Target, limits: Limits, host: str, port: int) -> int:
    gpus = gpu_faults.GpuWatcher()

    def look() -> prober.Surroundings:
        report = gpus.report
        seen = report is not None and report.down is None
        # vLLM's processes are another container's: of a start nothing can be seen but the GPUs' memory filling up.
        return prober.Surroundings(movement=Movement(gpu=report.used) if report and seen else None, gpus=report)

    def say(line: str) -> None:
        print(f"vllm-health: {line}", file=sys.stderr, flush=True)

    watch = prober.Prober(target, limits, look, on_note=say)

    async def announce() -> None:
        while True:
            now = (await watch.transitions.get()).after
            say(f"{now.name.replace('_', ' ')}: {now.reason}")

    try:
        listening = await server.serve(
            server.View(lambda: watch.state, limits, watch.values, lambda: watch.model), host, port
        )
    except OSError as error:
        what, remedy = addresses.why_not(error, "--port")
        raise _Mistake(f"--port {port}: {what}; {remedy}") from None
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    say(f"watching {target.url}, answering on port {listening.port}")
    duties = {asyncio.create_task(duty) for duty in (watch.run(), announce(), ended.wait())}
    try:
        done, _ = await asyncio.wait(duties, return_when=asyncio.FIRST_COMPLETED)
        for duty in done:
            duty.result()
    finally:
        for duty in duties:
            duty.cancel()
        await asyncio.gather(*duties, return_exceptions=True)
        gpus.close()
        await listening.close()
    return 0


# ---- wait and smoke


def _wait(given: argparse.Namespace, target: scrape.Target) -> int:
    return asyncio.run(_wait_until_ready(target, given.seconds))


async def _wait_until_ready(target: scrape.Target, seconds: float) -> int:
    """0 once /readyz says 200, or /health where the URL is vLLM's own; 1 when vLLM is dead or the time is over."""
    began, said = time.monotonic(), None
    async with scrape.session() as session:
        while True:
            answer = await scrape.get(session, f"{target.url}/readyz", 10.0)
            probed = answer.status in {200, 503}
            if not probed and answer.status:
                answer = await scrape.get(session, f"{target.url}/health", 10.0)
            line = " ".join(answer.body.split())[:300] or f"HTTP {answer.status}"
            if line != said and not answer.ok:
                print(f"vllm-health: {line}", file=sys.stderr, flush=True)
                said = line
            if answer.ok:
                print(line if probed else "vLLM answers /health", flush=True)
                return 0
            if probed and (await scrape.get(session, f"{target.url}/livez", 10.0)).status == 503:  # noqa: PLR2004
                print("vllm-health: it will not become ready: /livez says that it is dead", file=sys.stderr)
                return 1
            if seconds and time.monotonic() - began > seconds:
                print(f"vllm-health: not ready after {seconds:g} s", file=sys.stderr)
                return 1
            await asyncio.sleep(1.0)


def _smoke(given: argparse.Namespace, target: scrape.Target) -> int:
    return smoke.run(target.url, target.api_key, given.model, print)


if __name__ == "__main__":
    sys.exit(main())
