"""The command line. ``vllm-health serve`` is a sidecar for any vLLM. ``smoke`` and ``wait`` test one."""

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
from vllm_health.limits import DEFAULT_STALL_S, Limits

try:
    from vllm_health import gpu_faults, prober, scrape, server, smoke
except ModuleNotFoundError as missing:  # installed without the extra "serve"
    print(f"vllm-health: {missing.name} is not installed; install 'vllm-launch[serve]'", file=sys.stderr)
    raise SystemExit(2) from None

USAGE_ERROR = 2
"""Exit code for invalid input of the user."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print the error in one line, like all errors of this project, and exit."""
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. For invalid input it prints one line to stderr and returns 2."""
    options = _parser().parse_args(argv)
    try:
        key = _api_key(options.api_key_file)
        target = scrape.Target(url=_url(options.url), api_key=key, model=options.model)
        code: int = options.run(options, target)
    except _InputError as error:
        print(f"vllm-health: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code


class _InputError(Exception):
    """Invalid input. The message says where, what is wrong, and what to do."""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vllm-health",
        description="Check the health of vLLM. Distinguishes a busy engine from a hung or dead one.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    serve_parser = commands.add_parser("serve", help="watch a vLLM server and answer health probes", allow_abbrev=False)
    serve_parser.set_defaults(run=_serve)
    serve_parser.add_argument(
        "--target",
        dest="url",
        default=f"http://127.0.0.1:{addresses.API_PORT}",
        metavar="URL",
        help="URL of the API to watch; default: %(default)s",
    )
    serve_parser.add_argument("--host", default="::", help="address to listen on; default: all, IPv4 and IPv6")
    serve_parser.add_argument(
        "--port", type=_port, default=addresses.HEALTH_PORT, help="port to listen on; default: %(default)s"
    )
    serve_parser.add_argument(
        "--stall-seconds",
        type=_seconds,
        default=DEFAULT_STALL_S,
        help="seconds without an engine step after which /livez fails; 0: never; default: %(default)g",
    )
    serve_parser.add_argument(
        "--gpu-fault-kills", action="store_true", help="make /livez fail after a fatal GPU fault too"
    )

    smoke_parser = commands.add_parser("smoke", help="test a server with the openai client", allow_abbrev=False)
    smoke_parser.set_defaults(run=_smoke)
    wait_parser = commands.add_parser(
        "wait", help="wait until /readyz of the prober, or /health of vLLM, answers 200", allow_abbrev=False
    )
    wait_parser.set_defaults(run=_wait)
    wait_parser.add_argument(
        "--seconds", type=_seconds, default=0.0, help="seconds after which to give up; 0: never; default: 0"
    )
    smoke_parser.add_argument(
        "url", metavar="URL", help=f"URL of the API, such as http://127.0.0.1:{addresses.API_PORT}"
    )
    wait_parser.add_argument(
        "url", metavar="URL", help=f"URL of the prober or of vLLM, such as http://127.0.0.1:{addresses.HEALTH_PORT}"
    )
    for command in (serve_parser, smoke_parser, wait_parser):
        command.add_argument(
            "--api-key-file",
            metavar="FILE",
            help="file whose first line is the API key; default: the key in the variable VLLM_API_KEY",
        )
        command.add_argument("--model", help="model name for requests; default: the first that the server lists")
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535):  # noqa: PLR2004 - TCP's
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give a number from 1 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: give seconds, 0 or more")
    return seconds


def _url(text: str) -> str:
    url = text.rstrip("/").removesuffix("/v1").rstrip("/")
    scheme, separator, rest = url.partition("://")
    if scheme not in {"http", "https"} or not separator or not rest.strip("/"):
        raise _InputError(
            f"URL {text!r}: it needs http:// or https:// and a host; write it like http://127.0.0.1:{addresses.API_PORT}"
        )
    return url


def _api_key(file: str | None) -> str | None:
    if file is None:
        key = os.environ.get("VLLM_API_KEY", "").strip()  # a Kubernetes Secret often ends with a line end
        if not is_usable(key):
            problem = "the API key has characters that an HTTP header cannot contain"
            raise _InputError(f"variable VLLM_API_KEY: {problem}; set it to the API key alone")
        return key or None
    try:
        keys = keys_in(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise _InputError(
            f"--api-key-file {file}: cannot be read: {reason}; give a file with a key in its first line"
        ) from None
    if not keys:
        raise _InputError(f"--api-key-file {file}: the file holds no key; write one in its first line")
    if not is_usable(keys[0]):
        problem = "its first line has characters that an HTTP header cannot contain"
        raise _InputError(f"--api-key-file {file}: {problem}; write only the API key there")
    return keys[0]


# ---- serve


def _serve(options: argparse.Namespace, target: scrape.Target) -> int:
    limits = Limits(
        stall_s=options.stall_seconds,
        start_stall_s=0.0,  # a sidecar cannot see whether a start makes progress
        gpu_fault_kills=options.gpu_fault_kills,
    )
    return asyncio.run(_watch(target, limits, options.host, options.port))


async def _watch(target: scrape.Target, limits: Limits, host: str, port: int) -> int:
    gpus = gpu_faults.GpuWatcher()

    def say(line: str) -> None:
        print(f"vllm-health: {line}", file=sys.stderr, flush=True)

    watch = prober.Prober(target, limits, lambda: prober.Surroundings(gpus=gpus.report), on_note=say)

    async def announce() -> None:
        while True:
            now = (await watch.transitions.get()).after
            say(f"{now.name.replace('_', ' ')}: {now.reason}")

    try:
        listening = await server.serve(
            server.View(lambda: watch.state, limits, watch.values, lambda: watch.model), host, port
        )
    except OSError as error:
        problem, remedy = addresses.explain_listen_error(error, "--port")
        raise _InputError(f"--port {port}: {problem}; {remedy}") from None
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    say(f"watching {target.url}, answering on port {listening.port}")
    duties = {asyncio.create_task(duty) for duty in (watch.run(), announce(), stop.wait())}
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


def _wait(options: argparse.Namespace, target: scrape.Target) -> int:
    return asyncio.run(_wait_until_ready(target, options.seconds))


async def _wait_until_ready(target: scrape.Target, seconds: float) -> int:
    """Wait until the prober's /readyz answers 200, or vLLM's /health if the URL is vLLM's own.

    Return 0 then, and 1 if vLLM is dead or the time is up.
    """
    began, last_line = time.monotonic(), None
    async with scrape.session() as session:
        while True:
            answer = await scrape.get(session, f"{target.url}/readyz", 10.0)
            is_health_port = bool(answer.state)
            if not is_health_port and answer.status:
                answer = await scrape.get(session, f"{target.url}/health", 10.0, api_key=target.api_key)
            line = " ".join(answer.body.split())[:300]
            if answer.status and not is_health_port:
                line = f"{target.url}/health: HTTP {answer.status}" + (f" ({line})" if line else "")
            if line != last_line and not answer.ok:
                print(f"vllm-health: {line}", file=sys.stderr, flush=True)
                last_line = line
            if answer.ok:
                print(line if is_health_port else "vLLM answers /health", flush=True)
                return 0
            live = await scrape.get(session, f"{target.url}/livez", 10.0) if is_health_port else answer
            if live.state and live.status == 503:  # noqa: PLR2004 - a proxy's 503 has no state
                print("vllm-health: vLLM will not become ready: /livez fails", file=sys.stderr)
                return 1
            if seconds and time.monotonic() - began > seconds:
                print(f"vllm-health: not ready after {seconds:g} s", file=sys.stderr)
                return 1
            await asyncio.sleep(1.0)


def _smoke(options: argparse.Namespace, target: scrape.Target) -> int:
    return smoke.run(target.url, target.api_key, options.model, print)


if __name__ == "__main__":
    sys.exit(main())
