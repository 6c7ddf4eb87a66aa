"""The settings as data. Owns every path and drain time; default ports are in ``vllm_health.addresses``."""

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
"""Files in a run's folder: what the guard inside vLLM is told, and those whose presence says that connections are to
end with their next answer, and that new requests are turned away."""


class Drain(msgspec.Struct, frozen=True):
    """The one drain number, ``total`` seconds from SIGTERM to the end of the last process, in its parts.

    At first readiness is off while requests are still served (``delay``: load balancers take some seconds to notice),
    then vLLM refuses new ones and finishes those under way (``shutdown_timeout``, whole seconds as vLLM takes them),
    and the rest is for processes to go (``margin``). 0 ends everything at once.
    """

    total: int

    @property
    def delay(self) -> float:
        """Seconds: 15, or a sixth of a short drain."""
        return min(15.0, self.total / 6)

    @property
    def shutdown_timeout(self) -> int:
        """Seconds for vLLM's ``--shutdown-timeout``."""
        return int(self.total - 2 * self.delay)

    @property
    def margin(self) -> float:
        """Seconds: what is left, about as long as ``delay``."""
        return self.total - self.delay - self.shutdown_timeout


class LauncherSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The launcher's own settings.

    Every field has three spellings: ``health_port`` is ``launch: {health_port: 8001}`` in config.yaml,
    ``LAUNCH_HEALTH_PORT`` in the environment and ``--launch-health-port`` on the command line.
    """

    objective: Literal["throughput", "latency"] = "throughput"
    """throughput: the fewest GPUs a replica needs, then more replicas; latency: the widest TP that the model allows."""
    quality: Literal["lossless", "fp8-kv"] = "lossless"
    """lossless: answers are what the model's own dtypes give; fp8-kv: the plan may keep the KV cache in FP8."""
    nvlink_multicast: Literal["auto", "off"] = "auto"
    """off: NCCL, PyTorch, NVSHMEM and vLLM leave it alone; auto: off where the environment says so to one of them."""
    health_host: Text = "0.0.0.0"  # noqa: S104 - probes come from outside the container
    """Address that /livez, /readyz, /startupz and /metrics of the launcher listen on."""
    health_port: Port = addresses.HEALTH_PORT
    """Port of the same."""
    drain_seconds: Seconds = 90
    """Seconds from SIGTERM to the end of everything; grace periods of carriers must be as long. 0: end at once."""
    cache_dir: Text | None = None
    """Folder for every cache, and for HOME where that cannot be written. Default: below HOME, or else state_dir."""
    state_dir: Text | None = None
    """Folder for what one run needs on disk. Default: below XDG_RUNTIME_DIR, or a fresh temporary one."""
    api_key_file: Text | None = None
    """File of the API keys that clients may use, one a line, besides those of --api-key or VLLM_API_KEY."""
    allowed_routes: tuple[Text, ...] = ()
    """Routes that are served, with all that lies below them; in text separated by commas. None given: every route."""
    start_stall_seconds: Seconds = DEFAULT_START_STALL_S
    """Seconds without any progress after which a start is ended. 0: never."""
    stall_seconds: Seconds = DEFAULT_STALL_S
    """Seconds from the last step of an engine that hangs until it is ended; 4/5 of it until not ready. 0: never."""
    gpu_fault_kills: bool = False
    """Let /livez fail too at a fatal GPU fault (Xid, lost GPU), so that Kubernetes starts the container again."""
    p2p_check: Literal["auto", "off", "disable"] = "auto"
    """auto: try copies between the GPUs of a replica and believe those; off: believe NVML; disable: use no P2P."""
    greet: bool = False
    """Stream one answer to the terminal when ready."""
    termination_log: Text = "/dev/termination-log"
    """File for the reason of a failure, where Kubernetes reads it; written only where it already exists."""

    @property
    def drain(self) -> Drain:
        """``drain_seconds`` in its parts."""
        return Drain(self.drain_seconds)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything asked for, by whichever carrier.

    ``engine`` has vLLM's options that the person set, by dest and typed as vLLM types them; ``origin`` says where each
    came from ("flag --port", "config.yaml line 12", "environment LAUNCH_HEALTH_PORT"), under the dest, under
    "launch.<field>" or under "model". Never print it but through ``redacted``.
    """

    model: str
    launch: LauncherSettings
    engine: Mapping[str, object]
    origin: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    long_max_model_len: bool = False  # VLLM_ALLOW_LONG_MAX_MODEL_LEN, which vLLM reads from the environment alone
    estimate_cudagraphs: bool | None = None  # VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS, likewise
    cpu_kv_cache_bytes: int | None = None  # VLLM_CPU_KVCACHE_SPACE, as above, there in GiB
    no_multicast: str | None = None  # who forbids NVLink multicast, as the person would find it

    @property
    def port(self) -> int:
        """The API's port; vLLM's default where none is set."""
        port = self.engine.get("port", options()["port"].default)
        assert isinstance(port, int)  # noqa: S101 - an int option
        return port

    @property
    def shutdown_timeout(self) -> int:
        """Seconds that vLLM may take to finish what it has begun."""
        given = self.engine.get("shutdown_timeout")
        return given if isinstance(given, int) else self.launch.drain.shutdown_timeout

    @property
    def url(self) -> str:
        """Where this machine reaches vLLM's server, without a slash at the end."""
        host = addresses.reachable(str(self.engine.get("host") or ""))
        return f"{'https' if self.engine.get('ssl_certfile') else 'http'}://{host}:{self.port}"


def redacted(settings: Settings) -> Settings:
    """The same with every secret as "***": what may be printed."""
    return msgspec.structs.replace(settings, engine=redacted_values(settings.engine))
