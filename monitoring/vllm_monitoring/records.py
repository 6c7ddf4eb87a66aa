"""Recording rules, named level:metric:operations. Level ``model`` is one model in one namespace, over all replicas.

Dashboards over many replicas and the objectives' alerts read the recorded series. Everything else reads raw series.
Each raw series must have the labels ``namespace`` and ``pod``, as a PodMonitor adds them.
"""

from __future__ import annotations

from typing import Final

from vllm_health import metrics
from vllm_monitoring.thresholds import LATENCIES, Thresholds, seconds

MODEL: Final = f"namespace, {metrics.MODEL_NAME}"
POD: Final = f"namespace, pod, {metrics.MODEL_NAME}"
RATE_WINDOW: Final = "5m"
SLO_REQUESTS: Final = "model:slo_requests"
SLO_ERRORS: Final = "model:slo_errors"
OBJECTIVE: Final = "slo:objective:ratio"
REPLICAS: Final = "model:vllm_replicas:count"
KV_MEAN: Final = "model:vllm_kv_cache_usage_perc:avg"
KV_MAX: Final = "model:vllm_kv_cache_usage_perc:max"
RECORDED_HISTOGRAMS: Final = (
    metrics.TIME_TO_FIRST_TOKEN,
    metrics.INTER_TOKEN_LATENCY,
    metrics.E2E_LATENCY,
    metrics.QUEUE_TIME,
)
RECORDED_COUNTERS: Final = (
    metrics.GENERATION_TOKENS,
    metrics.PROMPT_TOKENS,
    metrics.REQUEST_SUCCESS,
    metrics.PREEMPTIONS,
    metrics.PREFIX_CACHE_QUERIES,
    metrics.PREFIX_CACHE_HITS,
)
_SUMMED_GAUGES: Final = (
    metrics.REQUESTS_RUNNING,
    metrics.REQUESTS_WAITING,
    metrics.PREFIX + "ready",
    metrics.PREFIX + "planned_gpus",
)

Rule = dict[str, str | dict[str, str]]
"""A rule as Prometheus reads it."""


def recorded_rate(metric: str) -> str:
    """Return the name of a model's recorded rate of ``metric``, which is a counter or a histogram's bucket."""
    return f"model:{metric.replace(':', '_').removesuffix('_total')}:rate{RATE_WINDOW}"


def recorded_sum(metric: str) -> str:
    """Return the name of the recorded sum of a gauge over a model's replicas."""
    return f"model:{metric.replace(':', '_')}:sum"


def load_rules() -> list[Rule]:
    """Return the rules that aggregate over a model.

    With them a dashboard over 200 replicas reads a few series, not thousands.
    """
    buckets = [f"{name}_bucket" for name in RECORDED_HISTOGRAMS]
    expressions = {
        **{recorded_sum(name): f"sum by ({MODEL}) ({name})" for name in _SUMMED_GAUGES},
        REPLICAS: f"count by ({MODEL}) ({metrics.PREFIX}ready)",
        KV_MEAN: f"avg by ({MODEL}) ({metrics.KV_CACHE_USAGE})",
        KV_MAX: f"max by ({MODEL}) ({metrics.KV_CACHE_USAGE})",
        **{recorded_rate(name): f"sum by ({MODEL}) (rate({name}[{RATE_WINDOW}]))" for name in RECORDED_COUNTERS},
        **{recorded_rate(name): f"sum by ({MODEL}, le) (rate({name}[{RATE_WINDOW}]))" for name in buckets},
    }
    return [{"record": record, "expr": expr} for record, expr in expressions.items()]


def slo_rules(thresholds: Thresholds) -> list[Rule]:
    """Return the rules of the objectives: rates of requests and of missed requests by ``slo``, then error ratios.

    Rates are per second over RATE_WINDOW. A longer window is the mean of the recorded rates, so each request has the
    same weight and no rule reads three days of raw series.
    """
    window = RATE_WINDOW
    # The API server's counter has no model name. The prober's metrics have it, also while the API server restarts.
    models = f"group by ({POD}) ({metrics.PREFIX}ready)"
    answered = f"sum by (namespace, pod) (rate({metrics.HTTP_REQUESTS}[{window}]))"
    failed = f'sum by (namespace, pod) (rate({metrics.HTTP_REQUESTS}{{status="5xx"}}[{window}]))'
    rules: list[Rule] = [
        {"record": OBJECTIVE, "expr": f"vector({objective.objective:g})", "labels": {"slo": name}}
        for name, objective in thresholds.slo.objectives().items()
    ]

    def add_both(name: str, requests: str, errors: str) -> None:
        for record, expr in ((SLO_REQUESTS, requests), (SLO_ERRORS, errors)):
            rules.append({"record": f"{record}:rate{window}", "expr": expr, "labels": {"slo": name}})

    def by_model(rate: str) -> str:
        return f"sum by ({MODEL}) ({rate} * on (namespace, pod) group_left ({metrics.MODEL_NAME}) {models})"

    # Do not count the prober's own requests. An idle replica gets 60 of them an hour, and all are fast.
    canaries = f'sum by ({MODEL}) (rate({metrics.PREFIX}canaries_total{{result="answered"}}[{window}]))'

    def of_users(requests: str) -> str:
        return f"clamp_min({requests} - {canaries}, 0) or {requests}"

    add_both("availability", of_users(by_model(answered)), f"{by_model(failed)} or 0 * {by_model(answered)}")
    for name, histogram in LATENCIES.items():
        bound = thresholds.slo.objectives()[name].seconds
        requests = f"sum by ({MODEL}) (rate({histogram}_count[{window}]))"
        # The bound as vLLM writes it: 1.0, not 1.
        fast = f'sum by ({MODEL}) (rate({histogram}_bucket{{le="{float(bound or 0)}"}}[{window}]))'
        add_both(name, of_users(requests), f"{requests} - {fast}")
    for length in windows(thresholds):
        requests, errors = (f"{record}:rate{window}" for record in (SLO_REQUESTS, SLO_ERRORS))
        if length != window:
            requests, errors = (f"avg_over_time({record}[{length}])" for record in (requests, errors))
            rules.append({"record": f"{SLO_REQUESTS}:rate{length}", "expr": requests})
        rules.append({"record": f"{SLO_ERRORS}:ratio_rate{length}", "expr": f"{errors} / {requests}"})
    return rules


def windows(thresholds: Thresholds) -> list[str]:
    """Return every window that an alert or the overview dashboard reads, the shortest first."""
    alert_windows = {window for burn in thresholds.slo.burn for window in (burn.short, burn.long)}
    return sorted({RATE_WINDOW, *alert_windows}, key=seconds)
