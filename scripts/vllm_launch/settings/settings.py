"""Defines the settings. Owns every path and drain time. Default ports are in ``vllm_health.addresses``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from vllm_health import addresses
from vllm_health.limits import DEFAULT_STALL_S, DEFAULT_START_STALL_S
from vllm_launch.engine.options import options, redacted_values

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=86400)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
GUARD_FILE = "guard.json"
DRAIN_FLAG = "draining"
REFUSE_FLAG = "refusing"
"""Files in the run's folder. ``GUARD_FILE`` has the rules of the guard inside vLLM. While ``DRAIN_FLAG`` exists, the
guard closes each connection after its next response. While ``REFUSE_FLAG`` exists, it refuses new requests."""


class Drain(msgspec.Struct, frozen=True):
    """The three steps of the drain. ``total``: seconds from SIGTERM until the last process has exited. 0: stop at once.

    ``delay``: the replica is unready and still serves requests, because load balancers take some seconds to notice.
    ``shutdown_timeout``: vLLM refuses new requests and finishes the others. In whole seconds, as vLLM's option.
    ``margin``: the rest, in which the processes exit.
    """

    total: int

    @property
    def delay(self) -> float:
        """Seconds of the first step: 15, or a sixth of ``total`` if that is less."""
        return min(15.0, self.total / 6)

    @property
    def shutdown_timeout(self) -> int:
        """Seconds of the second step, for vLLM's ``--shutdown-timeout``."""
        return int(self.total - 2 * self.delay)

    @property
    def margin(self) -> float:
        """Seconds of the last step, about as long as ``delay``."""
        return self.total - self.delay - self.shutdown_timeout


def _about(text: str) -> msgspec.Meta:
    """Return a description for `serve --help` and for the schema of the chart's values."""
    return msgspec.Meta(description=text)


class LauncherSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The launcher's own settings; each field's description is its help text.

    A user can set every field in three places. ``health_port`` is ``launch: {health_port: 8001}`` in config.yaml,
    ``LAUNCH_HEALTH_PORT`` in the environment and ``--launch-health-port`` on the command line.
    """

    objective: Annotated[
        Literal["throughput", "latency"],
        _about(
            "throughput: as many replicas as possible, each on the fewest GPUs that hold it; latency: the "
            "largest tensor_parallel_size that the model allows"
        ),
    ] = "throughput"
    quality: Annotated[
        Literal["lossless", "fp8-kv"],
        _about("lossless: keep the checkpoint's dtypes; fp8-kv: the plan may use an FP8 KV cache"),
    ] = "lossless"
    parsers: Annotated[
        Literal["auto", "off"],
        _about(
            "auto: the plan sets the parsers of reasoning and tool calls that vLLM has for the model's family, unless "
            "you set them; off: it sets none"
        ),
    ] = "auto"
    nvlink_multicast: Annotated[
        Literal["auto", "off"],
        _about(
            "auto: use NVLink multicast, unless an environment variable of NCCL, PyTorch or NVSHMEM disables it; off: "
            "NCCL, PyTorch, NVSHMEM and vLLM do not use it"
        ),
    ] = "auto"
    health_host: Annotated[
        Text,
        _about(
            "address of the health port: /livez, /readyz, /startupz, /metrics, and / (status page); :: is every "
            "address, IPv4 and IPv6"
        ),
    ] = "::"  # probes come from outside the container
    health_port: Annotated[Port, _about("the health port")] = addresses.HEALTH_PORT
    drain_seconds: Annotated[
        Seconds,
        _about(
            "seconds from SIGTERM until the last process has exited; the grace period of Kubernetes or Compose must "
            "not be shorter; 0: stop at once"
        ),
    ] = 90
    cache_dir: Annotated[
        Text | None,
        _about(
            "folder for all caches; also used as HOME if HOME is not writable; default: the folder "
            "that each library chooses below HOME, mostly ~/.cache, or a folder of this run if HOME is not writable"
        ),
    ] = None
    state_dir: Annotated[
        Text | None,
        _about(
            "folder in which each run creates its own temporary folder; default: XDG_RUNTIME_DIR, else the system's "
            "temporary folder"
        ),
    ] = None
    api_key_file: Annotated[
        Text | None,
        _about("file with the API keys of clients, one per line, in addition to --api-key and VLLM_API_KEY"),
    ] = None
    allowed_routes: Annotated[
        tuple[Text, ...],
        _about(
            "routes that clients may use, separated by commas; a route includes all routes below it; default: every "
            "route"
        ),
    ] = ()
    start_stall_seconds: Annotated[
        Seconds, _about("stop vLLM if its start makes no progress for this many seconds; 0: never")
    ] = DEFAULT_START_STALL_S
    stall_seconds: Annotated[
        Seconds,
        _about(
            "stop a hung engine about this many seconds after its last step; with 300, /readyz fails within 260 s, and "
            "the engine is stopped within 325 s; 0: never"
        ),
    ] = DEFAULT_STALL_S
    gpu_fault_kills: Annotated[
        bool,
        _about(
            "/livez also fails on a fatal GPU fault (Xid, lost GPU), so that Kubernetes restarts the container; "
            "default: off"
        ),
    ] = False
    p2p_check: Annotated[
        Literal["auto", "off", "disable"],
        _about(
            "auto: test P2P copies before the start; off: no test, use P2P as the driver reports it; disable: no P2P"
        ),
    ] = "auto"
    greet: Annotated[bool, _about("when ready, send one test prompt and print the answer; default: off")] = False
    log_format: Annotated[
        Literal["text", "json"], _about("format of the launcher's own log lines; vLLM's stay as they are")
    ] = "text"
    termination_log: Annotated[
        Text, _about("file for the reason of a failure, which Kubernetes reads; written only if it already exists")
    ] = "/dev/termination-log"

    @property
    def drain(self) -> Drain:
        """The steps of the drain, from ``drain_seconds``."""
        return Drain(self.drain_seconds)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of the user: from flags, the environment and the config file.

    ``engine``: the vLLM options that the user set, by dest, with vLLM's types. ``origin``: where each setting comes
    from ("flag --port", "config.yaml line 12", "environment LAUNCH_HEALTH_PORT"). Its keys are the dest,
    "launch.<field>" or "model". Print only the result of ``redacted``, because the settings hold secrets.
    """

    model: str
    launch: LauncherSettings
    engine: Mapping[str, object]
    origin: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    long_max_model_len: bool = False  # VLLM_ALLOW_LONG_MAX_MODEL_LEN, which vLLM reads only from the environment
    estimate_cudagraphs: bool | None = None  # VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS, likewise
    expandable_segments: bool | None = None  # of PyTorch's allocator (engine/allocator.py:expandable_segments)
    cpu_kv_cache_bytes: int | None = None  # VLLM_CPU_KVCACHE_SPACE, likewise; that variable is in GiB
    no_multicast: str | None = None  # the flag, line or variable that forbids NVLink multicast

    @property
    def chosen(self) -> Mapping[str, object]:
        """The options in ``engine`` that leave the plan no choice: all but ``--dtype auto``."""
        return {dest: value for dest, value in self.engine.items() if (dest, value) != ("dtype", "auto")}

    @property
    def port(self) -> int:
        """The API's port, or vLLM's default if the user set none."""
        port = self.engine.get("port", options()["port"].default)
        assert isinstance(port, int)  # noqa: S101 - an int option
        return port

    @property
    def shutdown_timeout(self) -> int:
        """Seconds that vLLM may take to finish its requests during a drain."""
        option = self.engine.get("shutdown_timeout")
        return option if isinstance(option, int) else self.launch.drain.shutdown_timeout

    @property
    def url(self) -> str:
        """The URL at which this machine reaches vLLM's server, without a slash at the end."""
        host = addresses.reachable(str(self.engine.get("host") or ""))
        return f"{'https' if self.engine.get('ssl_certfile') else 'http'}://{host}:{self.port}"


def redacted(settings: Settings) -> Settings:
    """Return the settings with every secret replaced by "***", for printing."""
    return msgspec.structs.replace(settings, engine=redacted_values(settings.engine))
