"""What vLLM says over HTTP, /health and /metrics, with bounds on time and size; and what we read out of it."""

from __future__ import annotations

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from vllm_health import metrics

MAX_BYTES = 16 << 20


class Answer(msgspec.Struct, frozen=True):
    """Status and body of an answer; status 0 when there was none (``body`` says why)."""

    status: int
    body: str


async def get(session: aiohttp.ClientSession, url: str, timeout_s: float) -> Answer:
    """GET ``url`` within ``timeout_s``; a body is cut at 16 MiB. Never raises for what the other side does."""
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=timeout_s), ssl=False) as response:
            body = bytearray()
            async for chunk in response.content.iter_chunked(65536):
                body += chunk
                if len(body) >= MAX_BYTES:
                    break
            return Answer(response.status, body[:MAX_BYTES].decode(errors="replace"))
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        return Answer(0, f"{type(error).__name__}: {error}")


def kv_cache_tokens(exposition: str) -> dict[str, int]:
    """Tokens that each engine's KV cache holds, by engine label; empty where the text does not say."""
    tokens: dict[str, int] = {}
    try:
        for family in text_string_to_metric_families(exposition):
            for sample in family.samples:
                size = sample.labels.get(metrics.KV_CACHE_SIZE_TOKENS, "")
                if sample.name == metrics.CACHE_CONFIG_INFO and size.isdecimal() and size.isascii():
                    tokens[sample.labels.get(metrics.ENGINE, "0")] = int(size)
    except (ValueError, KeyError, IndexError):  # what the parser raises on text that is no exposition
        return tokens
    return tokens
