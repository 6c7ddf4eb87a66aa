"""The options of one run under the supervisor."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vllm_health.limits import Limits


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The options of ``serve`` besides the child's argv and environment. Durations are in seconds."""

    api_host: str  # "" is every IPv4 address
    api_port: int
    api_url: str  # the API's URL on this machine
    health_host: str  # "" is every address, IPv4 and IPv6
    health_port: int
    drain_flag: Path  # this field and the next four: see ``drain.Drain``
    refuse_flag: Path
    drain_delay: float
    shutdown_timeout: float
    exit_margin: float
    limits: Limits = Limits()
    history_file: Path | None = None  # file with the durations of earlier starts (``start_history``)
    history_key: str = ""  # key in that file for starts like this one
    gpu_uuids: tuple[str, ...] = ()
    termination_log: Path | None = None
    planned_kv_tokens: int | None = None
    planned_gpus: int | None = None
    no_multicast: bool = False  # NVLink multicast must stay unused
    kv_tolerance: float = 0.05
    weights_bytes: int | None = None
    log_format: str = "text"
    greet: bool = False
    served_model_name: str = ""
    api_key: str | None = None  # a client's key, for the greeting
    probe_key: str | None = None  # the prober's own key
