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
    """The three steps of the drain. ``total``: seconds from SIGTERM to the end of the last process. 0: end at once.

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


class LauncherSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The launcher's own settings.

    A user can set every field in three places. ``health_port`` is ``launch: {health_port: 8001}`` in config.yaml,
    ``LAUNCH_HEALTH_PORT`` in the environment and ``--launch-health-port`` on the command line.
    """

    objective: Literal["throughput", "latency"] = "throughput"
    """throughput: the fewest GPUs per replica, and more replicas. latency: the largest TP that the model allows."""
    quality: Literal["lossless", "fp8-kv"] = "lossless"
    """lossless: the plan keeps the model's own dtypes. fp8-kv: the plan may store the KV cache in FP8."""
    nvlink_multicast: Literal["auto", "off"] = "auto"
    """off: NCCL, PyTorch, NVSHMEM and vLLM do not use it. auto: off if the environment turns it off for one of them."""
    health_host: Text = "0.0.0.0"  # noqa: S104 - probes come from outside the container
    """Address on which the launcher serves /livez, /readyz, /startupz and /metrics."""
    health_port: Port = addresses.HEALTH_PORT
    """Port on which the launcher serves them."""
    drain_seconds: Seconds = 90
    """Seconds from SIGTERM to the last exit. Grace periods of Kubernetes or Compose must be as long. 0: end at once."""
    cache_dir: Text | None = None
    """Folder for every cache, and for HOME if HOME is not writable. Default: below HOME, else below state_dir."""
    state_dir: Text | None = None
    """Folder for the files of one run. Default: below XDG_RUNTIME_DIR, else a new temporary folder."""
    api_key_file: Text | None = None
    """File of API keys that clients may use, one per line. Adds to the keys of --api-key or VLLM_API_KEY."""
    allowed_routes: tuple[Text, ...] = ()
    """Routes that vLLM serves, with every route below them. Separated by commas in text. Empty: every route."""
    start_stall_seconds: Seconds = DEFAULT_START_STALL_S
    """Seconds without progress after which the launcher ends a start. 0: never."""
    stall_seconds: Seconds = DEFAULT_STALL_S
    """Seconds from the last step of a hanging engine to its end. It becomes unready after 4/5 of them. 0: never."""
    gpu_fault_kills: bool = False
    """Whether a fatal GPU fault (Xid, lost GPU) also fails /livez, so that Kubernetes restarts the container."""
    p2p_check: Literal["auto", "off", "disable"] = "auto"
    """auto: test copies between a replica's GPUs. off: trust NVML without a test. disable: do not use P2P."""
    greet: bool = False
    """Whether to stream one answer to the terminal once vLLM is ready."""
    termination_log: Text = "/dev/termination-log"
    """File from which Kubernetes reads the reason of a failure. The launcher writes it only if it already exists."""

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
    cpu_kv_cache_bytes: int | None = None  # VLLM_CPU_KVCACHE_SPACE, likewise; that variable is in GiB
    no_multicast: str | None = None  # the flag, line or variable that forbids NVLink multicast

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
