"""What settings cannot be, or cannot be together: refused before anything starts, instead of minutes later by vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vllm_launch.engine import multicast
from vllm_launch.engine.options import pinned_vllm
from vllm_launch.engine.removed import REMOVED_METHODS
from vllm_launch.engine.values import OBJECT_REMEDY
from vllm_launch.errors import UsageError
from vllm_launch.settings.settings import Settings

COUNTS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_num_seqs",
          "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes")  # fmt: skip
"""Options whose values are at least 1."""

EXECUTORS = ("mp", "ray", "uni", "external_launcher")
"""vllm/v1/executor/abstract.py:Executor.get_class."""

NO_HTTP = {"grpc": "gRPC", "headless": "no API at all", "uds": "a Unix socket"}
"""Options with which vLLM does not serve HTTP on a port, and what it serves instead."""


class Mistake(NamedTuple):
    """One value that cannot be: ``key`` of ``Settings.origin``, what is wrong, and what to do."""

    key: str
    what: str
    remedy: str


def check(settings: Settings, environ: Mapping[str, str]) -> None:
    """Refuse what vLLM would refuse minutes later, and what would run unwatched or unprotected.

    Raises:
        UsageError: the first mistake, at the place that it came from.
    """
    for rule in RULES:
        for mistake in rule(settings):
            raise UsageError(settings.origin.get(mistake.key, mistake.key), mistake.what, mistake.remedy)
    _check_vllm_port(environ.get("VLLM_PORT", "0"))


def warnings(settings: Settings) -> tuple[str, ...]:
    """Return a sentence for each setting that works but surprises."""
    return (*_late_stop(settings), *_uncounted(settings))


def _check_vllm_port(port: str) -> None:
    """Source: vllm/envs.py:get_vllm_port."""
    if "://" in port:
        raise UsageError(
            "environment VLLM_PORT",
            "comes from Kubernetes (a link to a Service called vllm), and vLLM would read it as a port",
            "set enableServiceLinks: false in the pod, or give the Service another name",
        )
    if not (port.isascii() and port.isdecimal()):
        remedy = "give a whole number, or unset it: it is for vLLM's own processes, and the API's port is --port"
        raise UsageError("environment VLLM_PORT", f"{port!r} is not a whole number", remedy)


def _counts(settings: Settings) -> Iterator[Mistake]:
    for dest in COUNTS:
        if (value := _whole(settings, dest, 1)) < 1:
            yield Mistake(dest, f"{dest} is {value}", "give 1 or more")


def _utilization(settings: Settings) -> Iterator[Mistake]:
    share = settings.engine.get("gpu_memory_utilization")
    if isinstance(share, float) and not 0 < share <= 1:
        what = f"gpu_memory_utilization is {share}"
        yield Mistake("gpu_memory_utilization", what, "give a share above 0, at most 1")


def _length(settings: Settings) -> Iterator[Mistake]:
    length = _whole(settings, "max_model_len", 1)
    if length < 1 and length != -1:
        yield Mistake("max_model_len", f"max_model_len is {length}", "give 1 or more, or auto")


def _ports(settings: Settings) -> Iterator[Mistake]:
    port = settings.port
    if not 1 <= port <= 65535:  # noqa: PLR2004 - TCP's
        yield Mistake("port", f"port is {port}", "give 1 to 65535")
    if port == settings.launch.health_port:
        key = "launch.health_port" if "launch.health_port" in settings.origin else "port"
        yield Mistake(key, f"the API and the health endpoints both want port {port}", "change one of them")


def _batch(settings: Settings) -> Iterator[Mistake]:
    seqs = _whole(settings, "max_num_seqs", 1)
    if _whole(settings, "max_num_batched_tokens", 1 << 30) < seqs:
        what = f"max_num_seqs {seqs} is more than max_num_batched_tokens"
        yield Mistake("max_num_seqs", what, "lower one or raise the other: every request needs a token in a batch")


def _shutdown(settings: Settings) -> Iterator[Mistake]:
    if (seconds := _whole(settings, "shutdown_timeout", 0)) < 0:
        yield Mistake("shutdown_timeout", f"shutdown_timeout is {seconds}", "give 0 or more seconds")


def _objects(settings: Settings) -> Iterator[Mistake]:
    for dest in ("hf_overrides", "speculative_config"):
        value = settings.engine.get(dest)
        if value is not None and not isinstance(value, dict):
            yield Mistake(dest, f"{dest} is not a JSON object", OBJECT_REMEDY)


def _quantization(settings: Settings) -> Iterator[Mistake]:
    method = str(settings.engine.get("quantization") or "").lower()
    if method in REMOVED_METHODS:
        what = f"vLLM {pinned_vllm()} no longer has the method {method!r}"
        yield Mistake("quantization", what, REMOVED_METHODS[method])


def _executor(settings: Settings) -> Iterator[Mistake]:
    backend = str(settings.engine.get("distributed_executor_backend") or EXECUTORS[0])
    if backend not in EXECUTORS and "." not in backend:
        remedy = f"give {', '.join(EXECUTORS)} or the dotted name of a class"
        yield Mistake("distributed_executor_backend", f"{backend!r} is no way to run workers", remedy)


def _http(settings: Settings) -> Iterator[Mistake]:
    for dest, served in NO_HTTP.items():
        if settings.engine.get(dest):
            what = f"vLLM would serve {served}, and the launcher watches it over HTTP"
            yield Mistake(dest, what, "start vLLM itself for that")


def _device_ids(settings: Settings) -> Iterator[Mistake]:
    if isinstance(ids := settings.engine.get("device_ids"), list):
        what = "the plan chooses among the GPUs that it sees, and these would be counted among its choice"
        yield Mistake("device_ids", what, f"set CUDA_VISIBLE_DEVICES={','.join(map(str, ids))} instead")


def _multicast(settings: Settings) -> Iterator[Mistake]:
    if not settings.no_multicast:
        return
    forbidden = f"uses NVLink multicast, which {settings.no_multicast} forbids"
    if multicast.fused_all_reduce(settings.engine.get("compilation_config")):
        remedy = f"leave {multicast.FUSION} out, or allow multicast"
        yield Mistake("compilation_config", f"{multicast.FUSION} {forbidden}", remedy)
    if (backend := settings.engine.get("all2all_backend")) in multicast.ALL2ALL:
        yield Mistake("all2all_backend", f"{backend} {forbidden}", "take another way, or allow multicast")


def _certificate(settings: Settings) -> Iterator[Mistake]:
    if settings.engine.get("ssl_keyfile") and not settings.engine.get("ssl_certfile"):
        yield Mistake("ssl_keyfile", "a key without a certificate is of no use", "set ssl_certfile too")


def _api_keys(settings: Settings) -> Iterator[Mistake]:
    keys = settings.engine.get("api_key")
    if isinstance(keys, list) and not all(keys):
        what = "a key is empty, and vLLM would serve without asking for any"
        yield Mistake("api_key", what, "give a key, or leave it out")


def _routes(settings: Settings) -> Iterator[Mistake]:
    for route in settings.launch.allowed_routes:
        if not route.startswith("/"):
            what = f"the route {route!r} does not begin with /"
            yield Mistake("launch.allowed_routes", what, f"write it as /{route}")


RULES = (
    _counts, _utilization, _length, _ports, _batch, _shutdown, _objects, _quantization, _executor, _http, _device_ids,
    _multicast, _certificate, _api_keys, _routes,
)  # fmt: skip
"""In this order; the first mistake is the one that is told."""


def _whole(settings: Settings, dest: str, otherwise: int) -> int:
    """Return the whole number that the user set for ``dest``, else ``otherwise``."""
    value = settings.engine.get(dest)
    return value if isinstance(value, int) else otherwise


def _late_stop(settings: Settings) -> Iterator[str]:
    timeout, drain = settings.engine.get("shutdown_timeout"), settings.launch.drain
    if isinstance(timeout, int) and timeout + drain.delay > drain.total:
        where = settings.origin["shutdown_timeout"]
        what = f"{timeout} s do not fit into drain_seconds, {drain.total} s with {drain.delay:g} s of delay before"
        yield f"{where}: {what}; streams will be cut when drain_seconds are over"


def _uncounted(settings: Settings) -> Iterator[str]:
    """What the plan cannot know the memory of, so that its KV cache is larger than the one that vLLM will have."""
    drafts = settings.engine.get("speculative_config")
    if isinstance(drafts, dict) and "ngram" not in str(drafts.get("method", "")):
        where = settings.origin["speculative_config"]
        yield (
            f"{where}: the memory of what drafts, its weights and its cache, is not in the plan: the KV cache will be "
            "smaller; set --max-model-len if vLLM then refuses the planned one"
        )
