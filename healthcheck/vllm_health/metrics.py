"""All metric names: vLLM's (v1/metrics/loggers.py of 0.32.0) and ours, with their help. No other file spells one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, get_args

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_health import state

# ---- vLLM's metrics, as its /metrics spells them: counters with "_total", histograms with "_count"

ENGINE: Final = "engine"
"""Label: the data-parallel rank of the engine."""
MODEL_NAME: Final = "model_name"
"""Label: the first of --served-model-name."""
CACHE_CONFIG_INFO: Final = "vllm:cache_config_info"
KV_CACHE_SIZE_TOKENS: Final = "kv_cache_size_tokens"
"""Label of CACHE_CONFIG_INFO: size of one engine's KV cache, in tokens."""
REQUESTS_RUNNING: Final = "vllm:num_requests_running"
REQUESTS_WAITING: Final = "vllm:num_requests_waiting"
KV_CACHE_USAGE: Final = "vllm:kv_cache_usage_perc"
"""A share, 0 to 1, although its name says percent."""
SLEEP_STATE: Final = "vllm:engine_sleep_state"
SLEEP_LABEL: Final = "sleep_state"
AWAKE: Final = "awake"
GENERATION_TOKENS: Final = "vllm:generation_tokens_total"
PROMPT_TOKENS: Final = "vllm:prompt_tokens_total"
PROMPT_TOKENS_BY_SOURCE: Final = "vllm:prompt_tokens_by_source_total"
REQUEST_SUCCESS: Final = "vllm:request_success_total"
"""By finished_reason. An aborted request is not counted before vLLM's next step (vllm-project/vllm#31503)."""
PREEMPTIONS: Final = "vllm:num_preemptions_total"
PREFIX_CACHE_QUERIES: Final = "vllm:prefix_cache_queries_total"
PREFIX_CACHE_HITS: Final = "vllm:prefix_cache_hits_total"
WAITING_BY_REASON: Final = "vllm:num_requests_waiting_by_reason"
ADMISSION_REJECTIONS: Final = "vllm:admission_rejections_total"

# Histograms: the name without _bucket, _sum and _count.
ITERATION_TOKENS: Final = "vllm:iteration_tokens_total"
TIME_TO_FIRST_TOKEN: Final = "vllm:time_to_first_token_seconds"
INTER_TOKEN_LATENCY: Final = "vllm:inter_token_latency_seconds"
TIME_PER_OUTPUT_TOKEN: Final = "vllm:request_time_per_output_token_seconds"
"""For each finished request, the mean time of all its output tokens except the first, in seconds."""
E2E_LATENCY: Final = "vllm:e2e_request_latency_seconds"
QUEUE_TIME: Final = "vllm:request_queue_time_seconds"
PREFILL_TIME: Final = "vllm:request_prefill_time_seconds"
DECODE_TIME: Final = "vllm:request_decode_time_seconds"
REQUEST_PROMPT_TOKENS: Final = "vllm:request_prompt_tokens"
REQUEST_GENERATION_TOKENS: Final = "vllm:request_generation_tokens"
HISTOGRAMS: Final = (
    ITERATION_TOKENS, TIME_TO_FIRST_TOKEN, INTER_TOKEN_LATENCY, TIME_PER_OUTPUT_TOKEN, E2E_LATENCY, QUEUE_TIME,
    PREFILL_TIME, DECODE_TIME, REQUEST_PROMPT_TOKENS, REQUEST_GENERATION_TOKENS,
)  # fmt: skip
BUCKETS: Final = {
    TIME_TO_FIRST_TOKEN: (
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
        160.0, 640.0, 2560.0,
    ),
    TIME_PER_OUTPUT_TOKEN: (
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    ),
}  # fmt: skip
"""Upper bounds of the buckets, in seconds. The number of faster requests is known only for these bounds."""

HTTP_REQUESTS: Final = "http_requests_total"
"""The API server's, by handler, method and status ("2xx"). It has no model_name and does not count health routes."""

STEP_SIGNS: Final = (GENERATION_TOKENS, PROMPT_TOKENS, f"{ITERATION_TOKENS}_count", REQUEST_SUCCESS)
GAUGE_SIGNS: Final = (KV_CACHE_USAGE, REQUESTS_RUNNING)
"""The metrics that only a step of the engine changes. The API server sets all of them from the engine's outputs
(v1/engine/async_llm.py:_run_output_handler). During a chunked prefill the counters stand still, but KV_CACHE_USAGE
changes. While an engine preempts the same requests again and again, the gauges change and no token comes. Two metrics
are left out. REQUESTS_WAITING also changes when requests arrive at an engine that makes no step
(vllm-project/vllm#45388). prefix_cache_queries also rises while a request is retried without end."""

OLD_NAMES: Final = {"vllm:gpu_cache_usage_perc": KV_CACHE_USAGE}
"""Names in vLLM before 0.10 that a sidecar may meet, and their present names."""

WANTED: Final = (*STEP_SIGNS, *GAUGE_SIGNS, PREEMPTIONS, REQUESTS_WAITING, SLEEP_STATE, CACHE_CONFIG_INFO)
"""All metrics of vLLM that the prober reads."""

ALWAYS_SHOWN: Final = (
    *WANTED, PROMPT_TOKENS_BY_SOURCE, PREFIX_CACHE_QUERIES, PREFIX_CACHE_HITS, WAITING_BY_REASON, ADMISSION_REJECTIONS,
    *(f"{name}_count" for name in HISTOGRAMS if name != ITERATION_TOKENS),
)  # fmt: skip
"""All metrics of vLLM that the prober, dashboards and alerts read and that an engine shows from its start on."""

# ---- metrics of other exporters, read by dashboards and alerts

ALERTS: Final = "ALERTS"
"""Prometheus' own metric, by alertname, alertstate and the alert's labels."""
KUBE_HPA_DESIRED: Final = "kube_horizontalpodautoscaler_status_desired_replicas"
KUBE_HPA_MAX: Final = "kube_horizontalpodautoscaler_spec_max_replicas"
KUBE_HPA_INFO: Final = "kube_horizontalpodautoscaler_info"
KUBE_RESTARTS: Final = "kube_pod_container_status_restarts_total"
"""Metrics of kube-state-metrics (source: its docs/metrics/workload). The autoscaler's are by namespace and
horizontalpodautoscaler. The info also has the Deployment's name (scaletargetref_name). Restarts are by namespace, pod
and container."""
DCGM_UTILIZATION: Final = "DCGM_FI_DEV_GPU_UTIL"
DCGM_MEMORY_USED: Final = "DCGM_FI_DEV_FB_USED"
DCGM_MEMORY_FREE: Final = "DCGM_FI_DEV_FB_FREE"
DCGM_POWER: Final = "DCGM_FI_DEV_POWER_USAGE"
DCGM_TEMPERATURE: Final = "DCGM_FI_DEV_GPU_TEMP"
DCGM_TENSOR_ACTIVE: Final = "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"
DCGM_DRAM_ACTIVE: Final = "DCGM_FI_PROF_DRAM_ACTIVE"
DCGM_NVLINK: Final = "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL"
DCGM_XID: Final = "DCGM_FI_DEV_XID_ERRORS"
"""Metrics of dcgm-exporter (source: its etc/default-counters.csv), by gpu, UUID, modelName, Hostname, and the pod that
uses the GPU. Memory in MiB, power in W, temperature in degrees Celsius, activity 0 to 1, utilisation in percent."""

# ---- our metrics

STATES: Final[tuple[str, ...]] = get_args(state.Name)
COLORS: Final[Mapping[state.Name, str]] = {
    "starting": "blue", "ready": "green", "saturated": "light green", "suspect": "yellow", "stalled": "orange",
    "unavailable": "chocolate", "asleep": "grey", "gpu_fault": "dark red", "draining": "purple", "dead": "red",
}  # fmt: skip
"""Colour of each state. A CSS colour name, with a space between its words."""

_GAUGES: Final = {
    "state": ("1 for the state that vLLM is in, 0 for the others.", ("state",)),
    "live": ("Whether /livez answers 200.", ()),
    "ready": ("Whether /readyz answers 200.", ()),
    "state_seconds": ("How long vLLM has been in its state.", ()),
    "last_progress_seconds": (
        "Seconds since an engine's last step, or since start-up made progress, without pauses of the prober itself.",
        (ENGINE,),
    ),
    "unwatched": (
        "1 if the prober's one-token requests to an engine are refused or fail, so that it cannot confirm a hang.",
        (ENGINE,),
    ),
    "kv_cache_tokens": ("Size of an engine's KV cache in tokens, as vLLM reports it.", (ENGINE,)),
    "kv_cache_planned_tokens": ("Planned size of an engine's KV cache in tokens.", ()),
    "planned_gpus": ("GPUs that the plan uses.", ()),
    "limit_seconds": ("Time limit of a stall, of a start without progress (start_stall), or of a drain.", ("limit",)),
    "start_seconds": ("How long the start took, or has taken so far.", ()),
    "start_phase_seconds": ("How long each phase of the start took, or has taken so far.", ("phase",)),
    "start_remaining_seconds": ("Estimate of the remaining start time, from earlier starts.", ()),
    "start_weights_bytes": ("Bytes of weights that the start loads.", ()),
    "start_weights_loaded_bytes": ("Bytes of weights that the start has loaded.", ()),
    "draining": ("1 while a drain is in progress.", ()),
    "drain_streams": ("Requests that a drain is still waiting for.", ()),
    "gpu_faults": ("1 for each GPU fault, by kind. Fatal faults make /readyz fail.", ("gpu", "kind", "fatal")),
    "gpu_ecc_uncorrected_errors": ("Uncorrectable ECC errors since the driver was loaded.", ("gpu",)),
    "gpu_throttled": ("Whether the GPU is slowed down, by reason.", ("gpu", "reason")),
    "gpu_info": ("1 for each GPU that the prober reads.", ("gpu", "uuid", "name")),
    "gpu_memory_used_bytes": ("Memory in use on the GPU, by all processes.", ("gpu",)),
    "gpu_memory_total_bytes": ("Memory of the GPU.", ("gpu",)),
    "gpu_utilization": ("Share of time, 0 to 1, with any kernel running. It is no measure of efficiency.", ("gpu",)),
    "gpu_power_watts": ("Power draw of the GPU.", ("gpu",)),
    "gpu_temperature_celsius": ("Temperature of the GPU core.", ("gpu",)),
    "nvml_up": ("Whether NVML answers. Without a GPU it does not.", ()),
}  # fmt: skip
_COUNTERS: Final = {
    "canaries": ("One-token requests of the prober, by result.", ("result",)),
    "scrapes": ("Requests of the prober to vLLM's /metrics, by result.", ("result",)),
    "gpu_xid_errors": ("Xid errors that the driver has reported since the prober started.", ("gpu", "xid")),
}
RESULTS: Final = {
    "canaries": (*get_args(state.CanaryKind), "unanswered", "not needed"),
    "scrapes": ("ok", "failed"),
}
"""Values of the label ``result``. Each counter is shown from 0 on, because rate() ignores a counter's first value."""
PREFIX: Final = "vllm_health_"
GAUGES: Final = tuple(PREFIX + name for name in _GAUGES)
COUNTERS: Final = tuple(f"{PREFIX}{name}_total" for name in _COUNTERS)
"""All names in our /metrics are in GAUGES and COUNTERS, except those of ProcessCollector for the prober's process."""

Labels = tuple[str, ...]
Values = Mapping[str, Mapping[Labels, float]]
"""Samples by short name (without PREFIX and "_total"), then by label values. A name that is missing has no sample."""


class Exposition(Collector):
    """Our /metrics. Shows what ``values`` and ``model`` hold at the time of the request.

    Every sample has the label ``model_name``, as vLLM's samples do. So a rule needs no join to name the model.
    """

    def __init__(self) -> None:
        self.values: Values = {}
        self.model = ""
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(namespace="vllm_health", registry=self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families for prometheus_client. Raises KeyError for a name that is not described above."""
        for name, samples in self.values.items():
            family: GaugeMetricFamily | CounterMetricFamily
            if name in _COUNTERS:
                text, labels = _COUNTERS[name]
                family = CounterMetricFamily(PREFIX + name, text, labels=(MODEL_NAME, *labels))
            else:
                text, labels = _GAUGES[name]
                family = GaugeMetricFamily(PREFIX + name, text, labels=(MODEL_NAME, *labels))
            for values, value in sorted(samples.items()):
                family.add_metric((self.model, *values), value)
            yield family

    def text(self) -> bytes:
        """Return our metrics in Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)
