"""Requests to vLLM over HTTP, with limits on time and size: /health, /metrics, and a one-token request, the canary."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Final, Literal
from urllib.parse import urlsplit

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample as Line

from vllm_health import metrics
from vllm_health.addresses import is_own_address
from vllm_health.state import CanaryResult, Engine, Health

STATE_HEADER: Final = "X-VLLM-Health-State"
"""Header of the prober's answers. It tells them from a proxy's."""
MAX_BYTES: Final = 1 << 20
"""Most bytes of an answer that are kept. Of /metrics only the wanted lines are kept, so it may be 64 times as long."""
_WANTED_LINE: Final = re.compile(
    rf"^(?:{'|'.join(map(re.escape, (*metrics.WANTED, *metrics.OLD_NAMES)))})[{{ ].*\n", re.MULTILINE
)
_OK, _BAD_REQUEST, _NO_KEY, _NOT_FOUND, _TOO_MANY, _UNAVAILABLE = 200, 400, 401, 404, 429, 503


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The vLLM that is watched. ``model``: the model name for requests. None: the name that /metrics shows."""

    url: str
    api_key: str | None = None
    model: str | None = None


NoAnswer = Literal["", "refused", "silent", "failed"]
"""Why a request got no answer. "": it got one. "refused": the connection was refused, so no server listens. "silent":
the server took the connection, or runs on this machine, and said nothing in time. "failed": anything else, such as a
reset, an unknown name, or no free file descriptor. It says nothing about vLLM's engine."""


class Answer(msgspec.Struct, frozen=True):
    """Status and body of an answer. Without an answer ``status`` is 0 and ``body`` is the reason."""

    status: int
    body: str
    none: NoAnswer = ""
    state: str = ""  # the state of vLLM, if a prober answered

    @property
    def ok(self) -> bool:
        """Whether the status is 200."""
        return self.status == _OK


class EngineMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of one /metrics: engines, the sizes of their KV caches in tokens, and the served model's name."""

    engines: dict[str, Engine] = {}
    kv_cache_tokens: dict[str, int] = {}
    model: str | None = None


def session() -> aiohttp.ClientSession:
    """Return the session for all requests to one vLLM.

    Each request has a connection of its own, so that the requests reach every API server process.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True, ssl=False, limit=64), trust_env=False, auto_decompress=False
    )


async def get(session: aiohttp.ClientSession, url: str, timeout_s: float, *, api_key: str | None = None) -> Answer:
    """GET ``url`` and return the answer. A response after ``timeout_s`` or above MAX_BYTES counts as no answer.

    Never raises, whatever the server does.
    """
    return await _ask(session, "GET", url, timeout_s, api_key=api_key)


async def get_metrics(
    session: aiohttp.ClientSession, url: str, timeout_s: float, *, api_key: str | None = None
) -> Answer:
    """As ``get``, for /metrics. Keeps only the lines that ``read`` needs, so a large /metrics costs little memory."""
    return await _ask(session, "GET", url, timeout_s, api_key=api_key, wanted_lines=True)


async def _ask(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    timeout_s: float,
    *,
    api_key: str | None,
    headers: Mapping[str, str] | None = None,
    body: object = None,
    wanted_lines: bool = False,
    connect_s: float | None = None,
) -> Answer:
    all_headers = dict(headers or {}) | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_s or timeout_s)
    try:
        async with session.request(
            method, url, json=body, headers=all_headers, timeout=timeout, allow_redirects=False
        ) as response:
            lines, rest, total = "", bytearray(), 0
            async for chunk in response.content.iter_chunked(65536):
                total += len(chunk)
                rest += chunk
                if wanted_lines and (end := rest.rfind(b"\n") + 1):
                    lines += "".join(_WANTED_LINE.findall(rest[:end].decode(errors="replace")))
                    del rest[:end]
                if len(lines) + len(rest) > MAX_BYTES or total > 64 * MAX_BYTES:
                    return Answer(0, f"{url}: the response is larger than {MAX_BYTES >> 20} MiB", "failed")
            text = lines if wanted_lines else rest.decode(errors="replace")
            return Answer(response.status, text, state=response.headers.get(STATE_HEADER, ""))
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
        return Answer(0, f"{url}: {_why_no_answer(error, timeout_s)}", _kind_of_no_answer(error, url))


def _kind_of_no_answer(error: Exception, url: str) -> NoAnswer:
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        # On this machine only a server whose queue of connections is full lets a connection wait.
        return "silent" if is_own_address(urlsplit(url).hostname or "") else "failed"
    return "silent" if isinstance(error, TimeoutError) else "failed"


_NO_ANSWER: Final[tuple[tuple[type[Exception], str], ...]] = (
    (aiohttp.ClientSSLError, "the server does not use TLS, or its TLS does not work"),
    (aiohttp.ServerDisconnectedError, "the server closed the connection before the end of its answer"),
    (aiohttp.ClientPayloadError, "the server closed the connection before the end of its answer"),
    (aiohttp.ClientResponseError, "the answer is not valid HTTP"),
    (aiohttp.InvalidURL, "the URL is not valid"),
)
"""What each exception of the HTTP client means to the user."""


def _why_no_answer(error: Exception, timeout_s: float) -> str:
    """Return why a request got no answer."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return "the server does not accept the connection in time"
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    for kind, reason in _NO_ANSWER:
        if isinstance(error, kind):
            return reason
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)  # below 0: no such host
    if isinstance(error, ValueError):  # its text can have the API key
        return "the prober cannot send the request: a header, such as the API key's, or the URL is not valid"
    return str(error) or "the request failed"


def health(answer: Answer) -> Health:
    """Return what an answer of /health means."""
    if answer.ok:
        return "ok"
    if answer.none == "refused":
        return "refused"
    if answer.status == _UNAVAILABLE:
        return "unavailable" if answer.body.strip() else "engine dead"
    return "unanswered"


def health_detail(answer: Answer) -> str:
    """Return what /health answered instead of 200, in one short line. Empty without an answer."""
    if answer.ok or not answer.status:
        return ""
    key = ", because it requires an API key: set VLLM_API_KEY or --api-key-file" if answer.status == _NO_KEY else ""
    said = _message(answer.body)
    return f"{answer.status}{key}" + (f": {said[:80]}" if said else "")


def read(text: str) -> EngineMetrics:
    """Return the contents of a /metrics. Skips lines that are invalid or cut off."""
    steps: dict[str, dict[str, float]] = {}
    awake: dict[str, bool] = {}
    tokens: dict[str, int] = {}
    model = None
    for line in (sample for match in _WANTED_LINE.finditer(text) for sample in _parsed(match[0])):
        if not math.isfinite(line.value):
            continue
        engine = line.labels.get(metrics.ENGINE, "0")
        model = model or line.labels.get(metrics.MODEL_NAME)
        if line.name == metrics.CACHE_CONFIG_INFO:
            size = line.labels.get(metrics.KV_CACHE_SIZE_TOKENS, "")
            if size.isdecimal() and size.isascii():
                tokens[engine] = int(size)
        elif line.name == metrics.SLEEP_STATE:
            if line.labels.get(metrics.SLEEP_LABEL) == metrics.AWAKE:
                awake[engine] = line.value != 0
        else:
            values, name = steps.setdefault(engine, {}), metrics.OLD_NAMES.get(line.name, line.name)
            values[name] = values.get(name, 0.0) + line.value
    engines = {name: _engine(values, awake=awake.get(name, True)) for name, values in steps.items()}
    return EngineMetrics(engines=engines, kv_cache_tokens=tokens, model=model)


def _parsed(line: str) -> list[Line]:
    """Return the samples of one line. Each line is parsed alone, so that an invalid line does not spoil others."""
    try:
        return [sample for family in text_string_to_metric_families(line) for sample in family.samples]
    except (ValueError, KeyError, IndexError):  # the parser raises these on invalid text
        return []


def _engine(values: dict[str, float], *, awake: bool) -> Engine:
    return Engine(
        steps={name: value for name, value in values.items() if name in metrics.STEP_SIGNS},
        gauges={name: value for name, value in values.items() if name in metrics.GAUGE_SIGNS},
        preemptions=values.get(metrics.PREEMPTIONS, 0.0),
        running=values.get(metrics.REQUESTS_RUNNING, 0.0),
        waiting=values.get(metrics.REQUESTS_WAITING, 0.0),
        kv_usage=values.get(metrics.KV_CACHE_USAGE, 0.0),
        asleep=not awake,
    )


# ---- the canary

_TOKEN: Final = [1]
"""A prompt of one token, as a token ID. It needs no tokenizer, and every vocabulary has this ID."""
_REQUESTS: Final = (
    ("/v1/completions", {"prompt": _TOKEN, "max_tokens": 1, "temperature": 0}),
    ("/pooling", {"input": _TOKEN}),  # every pooling model has this route (entrypoints/pooling/factories.py)
)


async def canary(
    session: aiohttp.ClientSession,
    target: Target,
    model: str | None,
    rank: int | None,
    timeout_s: float,
    *,
    connect_s: float,
) -> CanaryResult | None:
    """Request one token and return the result. None: no answer within ``timeout_s``.

    ``rank``: the engine to ask, counted from 0 among those of this API server, or None for any. ``connect_s``: the most
    seconds for the connection to another machine. A model that does not generate gets a pooling request instead. A
    paused engine would not answer, so the function asks first whether the engine is paused. Only vLLM's developer mode
    can pause an engine.
    """
    url = f"{target.url}/is_paused"
    paused = await _ask(session, "GET", url, timeout_s, api_key=target.api_key, connect_s=connect_s)
    if paused.none in {"refused", "failed"}:
        return CanaryResult("failed", paused.body)
    if paused.ok and '"is_paused":true' in paused.body.replace(" ", ""):
        return CanaryResult("paused")
    # vllm/entrypoints/generate/base/serving.py:_get_data_parallel_rank
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    answer = Answer(0, "")
    for path, body in _REQUESTS:
        payload = {"model": target.model or model, **body} if target.model or model else body
        url = target.url + path
        answer = await _ask(
            session, "POST", url, timeout_s, api_key=target.api_key, headers=headers, body=payload, connect_s=connect_s
        )
        if not _no_route(answer):
            break
    if answer.ok:
        return CanaryResult("answered")
    if answer.none:
        return None if answer.none == "silent" else CanaryResult("failed", answer.body)
    detail = f"{answer.status} from {path}: {_message(answer.body)}"
    refused = _BAD_REQUEST <= answer.status < 500 and answer.status != _TOO_MANY  # noqa: PLR2004 - HTTP's classes
    return CanaryResult("refused" if refused else "inconclusive", detail)


def _no_route(answer: Answer) -> bool:
    """Whether the server or this model does not have the route. vLLM's 404 for a wrong model name does not count."""
    if answer.status == 405:  # noqa: PLR2004 - HTTP's
        return True
    message = _message(answer.body)
    return (answer.status == _NOT_FOUND and "model" not in message) or "does not support" in message


def _message(body: str) -> str:
    """Return the message of an error in OpenAI's format, or the body, as one short line."""
    try:
        error = json.loads(body)
        text = error["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = body
    return " ".join(str(text).split())[:200]
