"""What vLLM says over HTTP, with bounds on time and size: /health, /metrics, and a one-token request, the canary."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Final

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample as Line

from vllm_health import metrics
from vllm_health.state import Canary, Engine, Health

MAX_BYTES: Final = 1 << 20
"""Of an answer that is kept. A whole exposition may be 64 times as long: of it only the wanted lines are."""
_WANTED: Final = re.compile(rf"^(?:{'|'.join(map(re.escape, metrics.WANTED))})[{{ ].*\n", re.MULTILINE)
_OK, _BAD_REQUEST, _NOT_FOUND, _TOO_MANY, _UNAVAILABLE = 200, 400, 404, 429, 503


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The vLLM that is watched. ``model``: the name to ask for; None takes the one that /metrics shows."""

    url: str
    api_key: str | None = None
    model: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """Status and body of an answer; status 0 when there was none (``body`` says why)."""

    status: int
    body: str
    refused: bool = False  # nobody listens

    @property
    def ok(self) -> bool:
        """Whether it is a 200."""
        return self.status == _OK


class EngineMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What we read of one /metrics: engines, their KV caches in tokens, and the served model's name."""

    engines: dict[str, Engine] = {}
    kv_cache_tokens: dict[str, int] = {}
    model: str | None = None


def session() -> aiohttp.ClientSession:
    """For all requests to one vLLM. Each has a connection of its own, so that each API server process is met."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True, ssl=False, limit=64), trust_env=False, auto_decompress=False
    )


async def get(session: aiohttp.ClientSession, url: str, timeout_s: float, *, api_key: str | None = None) -> Answer:
    """GET ``url`` within ``timeout_s``; one of more than MAX_BYTES is no answer.

    Never raises for what the other side does.
    """
    return await _ask(session, "GET", url, timeout_s, api_key=api_key)


async def get_metrics(session: aiohttp.ClientSession, url: str, timeout_s: float) -> Answer:
    """As ``get``, of an exposition: only its lines that ``read`` wants are kept, so its size costs no memory."""
    return await _ask(session, "GET", url, timeout_s, api_key=None, wanted_lines=True)


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
) -> Answer:
    sent = dict(headers or {}) | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    limit = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.request(
            method, url, json=body, headers=sent, timeout=limit, allow_redirects=False
        ) as answer:
            kept, line, total = "", bytearray(), 0
            async for chunk in answer.content.iter_chunked(65536):
                total += len(chunk)
                line += chunk
                if wanted_lines and (end := line.rfind(b"\n") + 1):
                    kept += "".join(_WANTED.findall(line[:end].decode(errors="replace")))
                    del line[:end]
                if len(kept) + len(line) > MAX_BYTES or total > 64 * MAX_BYTES:
                    return Answer(0, f"more than {MAX_BYTES >> 20} MiB")
            return Answer(answer.status, kept if wanted_lines else line.decode(errors="replace"))
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
        refused = isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ConnectionRefusedError)
        return Answer(0, f"{type(error).__name__}: {error}", refused)


def health(answer: Answer) -> Health:
    """What an answer of /health says."""
    if answer.ok:
        return "ok"
    if answer.refused:
        return "refused"
    return "engine dead" if answer.status == _UNAVAILABLE else "unanswered"


def read(text: str) -> EngineMetrics:
    """What we want of an exposition; whatever in it is garbage, or was cut off in the middle, is passed over."""
    steps: dict[str, dict[str, float]] = {}
    awake: dict[str, bool] = {}
    tokens: dict[str, int] = {}
    model = None
    for line in (sample for found in _WANTED.finditer(text) for sample in _parsed(found[0])):
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
            seen = steps.setdefault(engine, {})
            seen[line.name] = seen.get(line.name, 0.0) + line.value
    engines = {name: _engine(values, awake=awake.get(name, True)) for name, values in steps.items()}
    return EngineMetrics(engines=engines, kv_cache_tokens=tokens, model=model)


def _parsed(line: str) -> list[Line]:
    """One line alone, so that a neighbour's garbage costs nothing."""
    try:
        return [sample for family in text_string_to_metric_families(line) for sample in family.samples]
    except (ValueError, KeyError, IndexError):  # what the parser raises on text that is no exposition
        return []


def _engine(values: dict[str, float], *, awake: bool) -> Engine:
    return Engine(
        steps={name: value for name, value in values.items() if name in metrics.STEP_SIGNS},
        running=values.get(metrics.REQUESTS_RUNNING, 0.0),
        waiting=values.get(metrics.REQUESTS_WAITING, 0.0),
        kv_usage=values.get(metrics.KV_CACHE_USAGE, 0.0),
        asleep=not awake,
    )


# ---- the canary

_TOKEN: Final = [1]
"""A prompt of one token, by its number: it needs no tokenizer, and every vocabulary has it."""
_REQUESTS: Final = (
    ("/v1/completions", {"prompt": _TOKEN, "max_tokens": 1, "temperature": 0}),
    ("/pooling", {"input": _TOKEN}),  # every pooling model has this route (entrypoints/pooling/factories.py)
)


async def canary(
    session: aiohttp.ClientSession, target: Target, model: str | None, engine: str | None, timeout_s: float
) -> Canary | None:
    """Ask for one token, of the data-parallel ``engine`` if one is named; None: no answer within ``timeout_s``.

    A model that generates nothing is asked to pool. An engine that was paused (vLLM's developer mode alone can) would
    not answer, so that is asked first.
    """
    paused = await get(session, f"{target.url}/is_paused", timeout_s, api_key=target.api_key)
    if paused.ok and '"is_paused":true' in paused.body.replace(" ", ""):
        return Canary("paused")
    # vllm/entrypoints/generate/base/serving.py:_get_data_parallel_rank
    headers = {"X-data-parallel-rank": engine} if engine else {}
    answer = Answer(0, "")
    for path, body in _REQUESTS:
        named = {"model": target.model or model, **body} if target.model or model else body
        url = target.url + path
        answer = await _ask(session, "POST", url, timeout_s, api_key=target.api_key, headers=headers, body=named)
        if not _no_route(answer):
            break
    if answer.ok:
        return Canary("answered")
    if answer.status == 0:
        return None
    detail = f"{answer.status} of {path}: {_said(answer.body)}"
    wrong = _BAD_REQUEST <= answer.status < 500 and answer.status != _TOO_MANY  # noqa: PLR2004 - HTTP's classes
    return Canary("refused" if wrong else "inconclusive", detail)


def _no_route(answer: Answer) -> bool:
    """404 or 405 of the router, or of a route that this model does not serve; not vLLM's 404 for a model's name."""
    if answer.status == 405:  # noqa: PLR2004 - HTTP's
        return True
    said = _said(answer.body)
    return (answer.status == _NOT_FOUND and "model" not in said) or "does not support" in said


def _said(body: str) -> str:
    """The message of an error in OpenAI's form, or the body; one short line."""
    try:
        error = json.loads(body)
        text = error["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = body
    return " ".join(str(text).split())[:200]
