"""Rules for the settings. Refuses invalid values and combinations at once, which vLLM refuses only minutes later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vllm_health.api_keys import is_usable
from vllm_launch.engine import allocator, multicast, speculative
from vllm_launch.engine.values import OBJECT_REMEDY
from vllm_launch.errors import UsageError
from vllm_launch.settings import combinations, memory_rules
from vllm_launch.settings.mistake import Mistake, number
from vllm_launch.settings.settings import Settings

COUNTS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_num_seqs",
          "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes", "num_gpu_blocks_override")  # fmt: skip
"""Options whose values are at least 1."""

EXECUTORS = ("mp", "ray", "uni", "external_launcher")
"""Names of executor backends. Source: vllm/v1/executor/abstract.py:Executor.get_class."""

NO_HTTP = {"grpc": "gRPC", "headless": "no API at all, as one of several machines", "uds": "HTTP on a Unix socket"}
"""Options with which vLLM does not serve HTTP on a TCP port, with what it serves instead."""

CERT_REQUIRED = 2
"""Value of ssl_cert_reqs with which a server demands a client certificate (Python's ssl.CERT_REQUIRED)."""

ONE_MACHINE: dict[str, tuple[object, ...]] = {
    "nnodes": (1,),
    "node_rank": (0,),
    "master_addr": ("127.0.0.1", "localhost", "::1"),
    "data_parallel_address": ("127.0.0.1", "localhost", "::1"),
    "data_parallel_rank": (),
    "data_parallel_start_rank": (),
    "data_parallel_size_local": (),
    "data_parallel_backend": ("mp",),
    "data_parallel_hybrid_lb": (False,),
    "data_parallel_external_lb": (False,),
    "data_parallel_multi_port_external_lb": (False,),
}
"""Options of a vLLM on several machines or in several servers, with the values that mean one machine.
Source: vllm/engine/arg_utils.py:create_engine_config."""


def check(settings: Settings, environ: Mapping[str, str]) -> None:
    """Check the settings against ``RULES``. The rules also refuse a vLLM that would run unwatched or unprotected.

    Raises:
        UsageError: the first mistake, with the place where the user set it.
    """
    for rule in RULES:
        for mistake in rule(settings):
            raise UsageError(settings.origin.get(mistake.key, mistake.key), mistake.problem, mistake.remedy)
    _check_vllm_port(environ.get("VLLM_PORT", "0"))
    _check_allocator(settings, environ)


def _check_allocator(settings: Settings, environ: Mapping[str, str]) -> None:
    """Check that no KV connector is combined with expandable segments. Source: vllm/config/vllm.py."""
    ((variable, value),) = allocator.EXPANDABLE.items()
    connector = next((dest for dest in ("kv_transfer_config", "kv_offloading_size") if settings.engine.get(dest)), None)
    if connector and value in environ.get(variable, "") and not settings.engine.get("enable_sleep_mode"):
        raise UsageError(
            f"environment {variable}",
            f"has {value}, and vLLM refuses it with a KV connector ({settings.origin[connector]})",
            f"remove {value} from it",
        )


def check_combinations(settings: Settings) -> None:
    """Check what vLLM refuses of options together. ``settings`` may hold a plan's options too.

    Raises:
        UsageError: the first mistake.
    """
    for mistake in combinations.mistakes(settings):
        raise UsageError(settings.origin.get(mistake.key, mistake.key), mistake.problem, mistake.remedy)


def warnings(settings: Settings) -> tuple[str, ...]:
    """Return a sentence for each setting that is valid but has a surprising effect."""
    return (*_long_shutdown(settings), *_several_machines(settings), *_other_packages(settings))


def _check_vllm_port(port: str) -> None:
    """Check VLLM_PORT. Source: vllm/envs.py:get_vllm_port."""
    if "://" in port:
        raise UsageError(
            "environment VLLM_PORT",
            "is a variable that Kubernetes sets for a Service named vllm, and vLLM would read it as a port",
            "set enableServiceLinks: false in the pod, or give the Service another name",
        )
    if not (port.isascii() and port.isdecimal()):
        remedy = (
            "give a whole number, or unset it: vLLM's processes use this port to talk to each other. --port sets the "
            "port of the API"
        )
        raise UsageError("environment VLLM_PORT", f"{port!r} is not a whole number", remedy)


def _counts(settings: Settings) -> Iterator[Mistake]:
    for dest in COUNTS:
        if (value := number(settings.engine, dest, 1)) < 1:
            yield Mistake(dest, f"{dest} is {value}", "give 1 or more")


def _utilization(settings: Settings) -> Iterator[Mistake]:
    share = settings.engine.get("gpu_memory_utilization")
    if isinstance(share, float) and not 0 < share <= 1:
        problem = f"gpu_memory_utilization is {share}"
        yield Mistake("gpu_memory_utilization", problem, "give a share above 0, at most 1")


def _length(settings: Settings) -> Iterator[Mistake]:
    length = number(settings.engine, "max_model_len", 1)
    if length < 1 and length != -1:
        yield Mistake("max_model_len", f"max_model_len is {length}", "give 1 or more, or auto")


def _ports(settings: Settings) -> Iterator[Mistake]:
    port = settings.port
    if not 1 <= port <= 65535:  # noqa: PLR2004 - TCP's
        yield Mistake("port", f"port is {port}", "give 1 to 65535")
    if port == settings.launch.health_port:
        key = "launch.health_port" if "launch.health_port" in settings.origin else "port"
        yield Mistake(key, f"the API and the health endpoints both use port {port}", "change one of them")


def _batch(settings: Settings) -> Iterator[Mistake]:
    seqs = number(settings.engine, "max_num_seqs", 1)
    if number(settings.engine, "max_num_batched_tokens", 1 << 30) < seqs:
        problem = f"max_num_seqs {seqs} is more than max_num_batched_tokens"
        remedy = "lower max_num_seqs or raise max_num_batched_tokens: each request in a batch has at least one token"
        yield Mistake("max_num_seqs", problem, remedy)


def _shutdown(settings: Settings) -> Iterator[Mistake]:
    if (seconds := number(settings.engine, "shutdown_timeout", 0)) < 0:
        yield Mistake("shutdown_timeout", f"shutdown_timeout is {seconds}", "give 0 or more seconds")


def _objects(settings: Settings) -> Iterator[Mistake]:
    for dest in ("hf_overrides", "speculative_config"):
        value = settings.engine.get(dest)
        if value is not None and not isinstance(value, dict):
            yield Mistake(dest, f"{dest} is not a JSON object", OBJECT_REMEDY)


def _executor(settings: Settings) -> Iterator[Mistake]:
    backend = str(settings.engine.get("distributed_executor_backend") or EXECUTORS[0])
    if backend not in EXECUTORS and "." not in backend:
        remedy = f"give {', '.join(EXECUTORS)} or the dotted name of a class"
        yield Mistake("distributed_executor_backend", f"{backend!r} is not an executor backend", remedy)


def _http(settings: Settings) -> Iterator[Mistake]:
    for dest, service in NO_HTTP.items():
        if settings.engine.get(dest):
            problem = f"with it vLLM serves {service}, but the launcher can watch vLLM only over HTTP on a TCP port"
            yield Mistake(dest, problem, "remove it, or run vllm serve without the launcher")


def _unwatched(settings: Settings) -> Iterator[Mistake]:
    """Servers that the prober cannot ask.

    Source: vllm/entrypoints/launchers/dp_supervisor.py, which also gives its servers a process group of their own.
    """
    if settings.engine.get("data_parallel_multi_port_external_lb"):
        yield Mistake(
            "data_parallel_multi_port_external_lb",
            "with it vLLM starts one server on a port of its own for each replica, but the launcher watches one port",
            "remove it: vLLM then balances the load of its replicas behind one port",
        )
    if settings.engine.get("ssl_cert_reqs") == CERT_REQUIRED:
        problem = "vLLM would demand a client certificate, and the launcher's prober has none"
        remedy = "and let a proxy in front of vLLM demand certificates, or run vllm serve without the launcher"
        yield Mistake("ssl_cert_reqs", problem, f"give 0 or 1, {remedy}")


def _device_ids(settings: Settings) -> Iterator[Mistake]:
    if isinstance(ids := settings.engine.get("device_ids"), list):
        problem = "the plan chooses the GPUs, and vLLM would apply these numbers to the GPUs that the plan chose"
        yield Mistake("device_ids", problem, f"set CUDA_VISIBLE_DEVICES={','.join(map(str, ids))} instead")


def _multicast(settings: Settings) -> Iterator[Mistake]:
    if not settings.no_multicast:
        return
    forbidden = f"uses NVLink multicast, which {settings.no_multicast} forbids"
    if multicast.fused_all_reduce(settings.engine.get("compilation_config")):
        remedy = f"leave {multicast.FUSION} out, or allow multicast"
        yield Mistake("compilation_config", f"{multicast.FUSION} {forbidden}", remedy)
    if (backend := settings.engine.get("all2all_backend")) in multicast.ALL2ALL:
        yield Mistake("all2all_backend", f"{backend} {forbidden}", "choose another backend, or allow multicast")


def _cors(settings: Settings) -> Iterator[Mistake]:
    """Refuse what the guard and Starlette would read differently: of one text, Starlette allows every part."""
    for dest in ("allowed_origins", "allowed_methods", "allowed_headers"):
        values = settings.engine.get(dest, [])
        if not isinstance(values, list) or not all(isinstance(text, str) and is_usable(text) for text in values):
            remedy = """write a list, for example '["https://app.example.com"]', or '["*"]' for all"""
            yield Mistake(dest, f"{dest} is not a JSON list of texts that HTTP headers can carry", remedy)


def _certificate(settings: Settings) -> Iterator[Mistake]:
    if settings.engine.get("ssl_keyfile") and not settings.engine.get("ssl_certfile"):
        yield Mistake("ssl_keyfile", "a TLS key is set without a certificate", "set ssl_certfile too")


def _api_keys(settings: Settings) -> Iterator[Mistake]:
    keys = settings.engine.get("api_key")
    if isinstance(keys, list) and not all(keys):
        problem = "a key is empty, so vLLM would serve without checking keys"
        yield Mistake("api_key", problem, "give a key, or leave it out")


def _routes(settings: Settings) -> Iterator[Mistake]:
    for route in settings.launch.allowed_routes:
        if not route.startswith("/"):
            problem = f"the route {route!r} does not begin with /"
            yield Mistake("launch.allowed_routes", problem, f"write it as /{route}")


RULES = (
    _counts, _utilization, _length, _ports, _batch, _shutdown, _objects, *memory_rules.RULES, _executor, _http,
    _unwatched, _device_ids, _multicast, _cors, _certificate, _api_keys, _routes, combinations.mistakes,
)  # fmt: skip
"""Rules in the order of their checks. ``check`` reports only the first mistake."""


def _long_shutdown(settings: Settings) -> Iterator[str]:
    timeout, drain = settings.engine.get("shutdown_timeout"), settings.launch.drain
    if isinstance(timeout, int) and timeout + drain.delay > drain.total:
        where = settings.origin["shutdown_timeout"]
        problem = f"{timeout} s plus the first drain step of {drain.delay:g} s exceed drain_seconds ({drain.total} s)"
        effect = "Kubernetes or Compose cuts the streams that are still open when its grace period ends"
        yield f"{where}: {problem}; {effect}; lower shutdown_timeout, or raise drain_seconds and the grace period"


def _several_machines(settings: Settings) -> Iterator[str]:
    """Warn of options for several machines: the plan splits the model over the GPUs of this machine only."""
    set_options = {dest: settings.engine[dest] for dest in ONE_MACHINE if settings.engine.get(dest) is not None}
    if set_options.get("data_parallel_size_local") == settings.engine.get("data_parallel_size", 1):
        del set_options["data_parallel_size_local"]
    if several := [dest for dest, value in set_options.items() if value not in ONE_MACHINE[dest]]:
        yield (
            f"{', '.join(settings.origin[dest] for dest in several)}: the plan is for this one machine. It splits the "
            "model over this machine's GPUs, and does not know the other machines. If vLLM must run on several "
            "machines, choose all parallel sizes yourself and run vllm serve without the launcher"
        )


def _other_packages(settings: Settings) -> Iterator[str]:
    """Warn of options that need a Python package which the launcher's requirements do not contain."""
    engine = settings.engine
    suffix = speculative.method_of(speculative.speculative_config(engine)) == "suffix"
    needed = {
        "distributed_executor_backend": "ray" if engine.get("distributed_executor_backend") == "ray" else None,
        "data_parallel_backend": "ray" if engine.get("data_parallel_backend") == "ray" else None,
        "spec_method": "arctic-inference" if suffix and engine.get("spec_method") else None,
        "speculative_config": "arctic-inference" if suffix and not engine.get("spec_method") else None,
    }
    for dest, package in needed.items():
        if package:
            where = settings.origin[dest]
            yield f"{where}: vLLM refuses it without the package {package}, which vllm-launch does not install"
