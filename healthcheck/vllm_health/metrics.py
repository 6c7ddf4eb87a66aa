"""The one place where metric names are spelt: vLLM's (v1/metrics/loggers.py of 0.32.0) and ours, with their help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, get_args

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_health import state

# ---- vLLM's, as its /metrics spells them: counters with "_total", histograms with "_count"

ENGINE: Final = "engine"
"""Label: the data-parallel rank that a sample speaks of."""
MODEL_NAME: Final = "model_name"
"""Label: the first of --served-model-name."""
CACHE_CONFIG_INFO: Final = "vllm:cache_config_info"
KV_CACHE_SIZE_TOKENS: Final = "kv_cache_size_tokens"
"""Label of CACHE_CONFIG_INFO: what the KV cache of one engine holds."""
REQUESTS_RUNNING: Final = "vllm:num_requests_running"
REQUESTS_WAITING: Final = "vllm:num_requests_waiting"
KV_CACHE_USAGE: Final = "vllm:kv_cache_usage_perc"
"""A share, 0 to 1, whatever its name says."""
SLEEP_STATE: Final = "vllm:engine_sleep_state"
SLEEP_LABEL: Final = "sleep_state"
AWAKE: Final = "awake"

STEP_SIGNS: Final = (
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:iteration_tokens_total_count",
    "vllm:request_success_total",
    "vllm:num_preemptions_total",
    KV_CACHE_USAGE,
    REQUESTS_RUNNING,
)
"""What only a step of the engine changes: the API server sets all of them from the engine's outputs
(v1/engine/async_llm.py:_run_output_handler). Counters stand still during a chunked prefill, KV_CACHE_USAGE does not.
Not among them: REQUESTS_WAITING, which moves as requests arrive at an engine that serves none
(vllm-project/vllm#45388), and prefix_cache_queries, which a request that is retried for ever keeps ticking."""

WANTED: Final = (*STEP_SIGNS, REQUESTS_WAITING, SLEEP_STATE, CACHE_CONFIG_INFO)
"""All that we read of vLLM's /metrics."""

# ---- ours

STATES: Final[tuple[str, ...]] = get_args(state.Name)

_GAUGES: Final = {
    "state": ("1 for the state that vLLM is in, 0 for the others.", ("state",)),
    "live": ("Whether /livez says 200.", ()),
    "ready": ("Whether /readyz says 200.", ()),
    "state_seconds": ("How long vLLM has been in its state.", ()),
    "last_progress_seconds": ("Observed time since an engine's last step, or a start's last movement.", (ENGINE,)),
    "kv_cache_tokens": ("Tokens that an engine's KV cache holds, as vLLM reports.", (ENGINE,)),
    "kv_cache_planned_tokens": ("Tokens that an engine's KV cache was planned to hold.", ()),
    "start_seconds": ("How long the start took, or has taken so far.", ()),
    "start_phase_seconds": ("How long each phase of the start took, or has taken so far.", ("phase",)),
    "start_remaining_seconds": ("How long the start will still take, by what it took before.", ()),
    "start_weights_bytes": ("Bytes of weights that the start loads.", ()),
    "start_weights_loaded_bytes": ("Bytes of weights that the start has loaded.", ()),
    "draining": ("1 while a drain is in progress.", ()),
    "drain_streams": ("Requests that a drain still waits for.", ()),
    "gpu_faults": ("GPU faults at present, by kind; fatal ones take vLLM out of rotation.", ("gpu", "kind", "fatal")),
    "gpu_ecc_uncorrected_errors": ("Uncorrectable ECC errors since the driver was loaded.", ("gpu",)),
    "gpu_throttled": ("1 while the GPU is slowed down, by reason.", ("gpu", "reason")),
    "nvml_up": ("Whether NVML answers; where there is no GPU it does not.", ()),
}  # fmt: skip
_COUNTERS: Final = {
    "canaries": ("One-token requests of the prober, by result.", ("result",)),
    "scrapes": ("Looks at vLLM's /metrics, by result.", ("result",)),
    "gpu_xid_errors": ("Xid errors that the driver has reported since the prober started.", ("gpu", "xid")),
}
PREFIX: Final = "vllm_health_"
GAUGES: Final = tuple(PREFIX + name for name in _GAUGES)
COUNTERS: Final = tuple(f"{PREFIX}{name}_total" for name in _COUNTERS)
"""Every name that our own /metrics may show, besides what ProcessCollector says of the prober's own process."""

Labels = tuple[str, ...]
Values = Mapping[str, Mapping[Labels, float]]
"""By short name (without PREFIX and "_total"), then by label values; a name left out has no sample."""


class Exposition(Collector):
    """Our /metrics, from whatever ``values`` holds when it is asked."""

    def __init__(self) -> None:
        self.values: Values = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(namespace="vllm_health", registry=self._registry)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client; a name that is not ours is a KeyError in the tests, not a new metric."""
        for name, samples in self.values.items():
            family: GaugeMetricFamily | CounterMetricFamily
            if name in _COUNTERS:
                text, labels = _COUNTERS[name]
                family = CounterMetricFamily(PREFIX + name, text, labels=labels)
            else:
                text, labels = _GAUGES[name]
                family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
            for values, value in sorted(samples.items()):
                family.add_metric(values, value)
            yield family

    def text(self) -> bytes:
        """Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)
