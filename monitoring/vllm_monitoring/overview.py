"""The overview dashboard: a table row for each model and each replica.

Queries by model read recorded series. The dashboard then opens fast over many replicas.
"""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import (
    GREEN,
    OF_MODEL,
    RED,
    TOKENS_PER_SECOND,
    YELLOW,
    Column,
    Panel,
    Row,
    Steps,
    line_panel,
    quantile,
    select,
    stat_panel,
)
from vllm_monitoring.records import (
    KV_MAX,
    KV_MEAN,
    MODEL,
    POD,
    RATE_WINDOW,
    REPLICAS,
    SLO_ERRORS,
    recorded_rate,
    recorded_sum,
)
from vllm_monitoring.thresholds import Thresholds

UID = "vllm-overview"
_READY, _GPUS = metrics.PREFIX + "ready", metrics.PREFIX + "planned_gpus"
_LEGEND = "{{model_name}} in {{namespace}}"


def build(thresholds: Thresholds) -> str:
    """Return the dashboard's JSON."""
    return panels.dashboard_json(
        UID,
        "vLLM / Overview",
        "Ready replicas, latency, load and GPUs of each model and each replica.",
        [
            Row("Now", [*_alerts_and_replicas(), *_throughput_and_queue()]),
            Row("Models and replicas", [_models(thresholds), _replicas(thresholds)]),
            Row("Over time", [*_load_over_time(), *_latency_over_time(thresholds)]),
        ],
        pods=False,
    )


def _alerts_and_replicas() -> list[Panel]:
    """Return the numbers of firing alerts, unready replicas and GPUs."""
    firing = f'count({metrics.ALERTS}{{alertstate="firing", namespace=~"$namespace"}}) or vector(0)'
    return [
        stat_panel(
            "Firing alerts",
            "Alerts that fire now in the selected namespaces, also those of other rules files. Normal: 0. The "
            "annotation 'runbook' of an alert names its runbook.",
            firing,
            steps=((None, GREEN), (1, RED)),
        ),
        stat_panel(
            "Unready replicas",
            "Replicas that are not ready, draining ones too. Normal: 0, except during a start-up, a rollout or a "
            "scale-down. Runbook: VLLMReplicaNotReady.",
            f"sum({_by_model(REPLICAS)}) - sum({_by_model(recorded_sum(_READY))})",
            steps=((None, GREEN), (1, YELLOW)),
        ),
        stat_panel(
            "Planned GPUs",
            "GPUs that the plans of all replicas use. Normal: replicas times GPUs per replica. A sidecar has no plan, "
            "so its GPUs do not count.",
            f"sum({_by_model(recorded_sum(_GPUS))})",
        ),
    ]


def _throughput_and_queue() -> list[Panel]:
    """Return the numbers of output tokens, finished requests and waiting requests."""
    return [
        stat_panel(
            "Output throughput",
            "Generated tokens per second of all models together, mean over 5 minutes. Normal: it follows the load.",
            f"sum({_output()})",
            TOKENS_PER_SECOND,
        ),
        stat_panel(
            "Finished requests",
            "Requests that finish per second, mean over 5 minutes, with any finish reason. vLLM does not count a "
            "request whose client disconnects. Normal: it follows the load.",
            f"sum({_by_model(recorded_rate(metrics.REQUEST_SUCCESS))})",
            "reqps",
            decimals=1,
        ),
        stat_panel(
            "Waiting requests",
            "Requests that wait, of all models together. Normal: few, for a short time. Look when: more requests wait "
            "than run. Then add a replica. Runbook: VLLMQueueTimeHigh.",
            f"sum({_by_model(recorded_sum(metrics.REQUESTS_WAITING))})",
            steps=((None, GREEN), (50, YELLOW)),
        ),
    ]


def _models(thresholds: Thresholds) -> Panel:
    """Return the table of models."""
    return panels.table_panel(
        "Models",
        "One row for each model, over all its replicas. Normal: Ready equals Replicas, the columns 5xx and TTFT over "
        "target are green, and few requests wait.",
        ("namespace", metrics.MODEL_NAME),
        [*_model_load(), *_model_kv_cache(thresholds), *_model_latency(), *_model_errors(thresholds)],
        linked_dashboard="vllm-engine",
        height=6,
    )


def _model_load() -> list[Column]:
    """Return a model's columns of replicas, GPUs, requests and output tokens."""
    gpus = _by_model(recorded_sum(_GPUS))
    return [
        Column("Ready", _by_model(recorded_sum(_READY)), steps=((None, RED), (1, GREEN))),
        Column("Replicas", _by_model(REPLICAS)),
        Column("GPUs", gpus),
        Column("Running", _by_model(recorded_sum(metrics.REQUESTS_RUNNING))),
        Column("Waiting", _by_model(recorded_sum(metrics.REQUESTS_WAITING))),
        Column("Output", _output(), TOKENS_PER_SECOND),
        Column("Output per GPU", f"{_output()} / ({gpus} > 0)", TOKENS_PER_SECOND),
    ]


def _model_kv_cache(thresholds: Thresholds) -> list[Column]:
    """Return a model's columns of KV cache usage."""
    return [
        Column("KV cache usage, mean", _by_model(KV_MEAN), "percentunit"),
        Column("KV cache usage, max", _by_model(KV_MAX), "percentunit", _kv_usage_steps(thresholds)),
    ]


def _model_latency() -> list[Column]:
    """Return a model's columns of TTFT and ITL."""
    return [
        Column("TTFT p95", _p95(metrics.TIME_TO_FIRST_TOKEN), "s", decimals=2),
        Column("ITL p95", _p95(metrics.INTER_TOKEN_LATENCY), "s", decimals=2),
    ]


def _model_errors(thresholds: Thresholds) -> list[Column]:
    """Return a model's columns of requests that missed an objective."""
    objectives = thresholds.slo.objectives()
    titles = {"availability": "5xx", "time_to_first_token": "TTFT over target"}
    return [
        Column(
            title,
            _by_model(f"{SLO_ERRORS}:ratio_rate{RATE_WINDOW}", f'slo="{name}"'),
            "percentunit",
            ((None, GREEN), (objectives[name].budget, RED)),
            decimals=1,
        )
        for name, title in titles.items()
    ]


def _replicas(thresholds: Thresholds) -> Panel:
    """Return the table of replicas."""
    kv_usage = f"max by ({POD}) ({select(metrics.KV_CACHE_USAGE, OF_MODEL)})"
    output = f"sum by ({POD}) (rate({select(metrics.GENERATION_TOKENS, OF_MODEL)}[{RATE_WINDOW}]))"
    return panels.table_panel(
        "Replicas",
        "One row for each replica. Normal: all are ready or saturated (high load, not a fault) and equally busy. Look "
        "when: one replica stays idle while others are full (check the load balancer), or one stays full while others "
        "are idle (it may hang).",
        ("namespace", metrics.MODEL_NAME, "pod"),
        [
            Column("State", panels.state_code(OF_MODEL, POD), states=True),
            Column("In state for", _by_pod(metrics.PREFIX + "state_seconds"), "s"),
            Column("GPUs", _by_pod(_GPUS)),
            Column("Running", _by_pod(metrics.REQUESTS_RUNNING)),
            Column("Waiting", _by_pod(metrics.REQUESTS_WAITING)),
            Column("KV cache usage", kv_usage, "percentunit", _kv_usage_steps(thresholds)),
            Column("Output", output, TOKENS_PER_SECOND),
            Column("KV cache tokens", _by_pod(metrics.PREFIX + "kv_cache_tokens"), "short"),
        ],
        linked_dashboard="vllm-engine",
    )


def _load_over_time() -> list[Panel]:
    """Return the panels of output tokens, requests and ready replicas over time."""
    return [
        line_panel(
            "Output throughput by model",
            "Generated tokens per second of each model, mean over 5 minutes. Normal: it follows the load.",
            TOKENS_PER_SECOND,
            {_LEGEND: _output()},
            stacked=True,
        ),
        line_panel(
            "Running and waiting requests",
            "Running and waiting requests of each model. Normal: far fewer requests wait than run. Look when: the "
            "number of waiting requests keeps rising. Then add replicas.",
            "short",
            {
                f"{_LEGEND}, running": _by_model(recorded_sum(metrics.REQUESTS_RUNNING)),
                f"{_LEGEND}, waiting": _by_model(recorded_sum(metrics.REQUESTS_WAITING)),
            },
        ),
        line_panel(
            "Ready replicas",
            "Ready replicas of each model. Normal: a flat line at the number of replicas. A short dip is a rollout "
            "without a spare replica.",
            "short",
            {_LEGEND: _by_model(recorded_sum(_READY))},
            counts=True,
        ),
    ]


def _latency_over_time(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of TTFT, ITL and queue time over time."""
    slo = thresholds.slo
    return [
        line_panel(
            "TTFT p95",
            "95th percentile of the time to first token over all replicas of a model, estimated from the histogram's "
            "buckets. Normal: below the objective (red line). Runbook: VLLMTimeToFirstTokenBurn.",
            "s",
            {_LEGEND: _p95(metrics.TIME_TO_FIRST_TOKEN)},
            limit=slo.time_to_first_token.seconds,
            top=slo.time_to_first_token.seconds,
            runbook=thresholds.runbook("VLLMTimeToFirstTokenBurn"),
        ),
        line_panel(
            "ITL p95",
            "95th percentile of the time between two tokens of a stream, over all replicas of a model. Normal: below "
            "the objective for TPOT (red line). It rises with the batch size, and with each long prompt that is "
            "prefilled in the same step. Runbook: VLLMTimePerOutputTokenBurn.",
            "s",
            {_LEGEND: _p95(metrics.INTER_TOKEN_LATENCY)},
            limit=slo.time_per_output_token.seconds,
            top=slo.time_per_output_token.seconds,
            runbook=thresholds.runbook("VLLMTimePerOutputTokenBurn"),
        ),
        line_panel(
            "Queue time p95",
            "95th percentile of the time that a request waits before the engine begins to compute it. Normal: from "
            "milliseconds, if replicas have free capacity, to about 3 s. The red line is the limit of "
            "VLLMQueueTimeHigh. That alert compares the mean. Runbook: VLLMQueueTimeHigh.",
            "s",
            {_LEGEND: _p95(metrics.QUEUE_TIME)},
            limit=thresholds.alerts["VLLMQueueTimeHigh"].seconds,
            runbook=thresholds.runbook("VLLMQueueTimeHigh"),
        ),
    ]


def _by_model(series: str, *more: str) -> str:
    """Return the query for the sum of a recorded series over each model."""
    # The sum drops __name__. With __name__ a table would have one row for each recorded name.
    return f"sum by ({MODEL}) ({select(series, OF_MODEL, *more)})"


def _by_pod(series: str) -> str:
    """Return the query for the sum of a series over each replica."""
    return f"sum by ({POD}) ({select(series, OF_MODEL)})"


def _output() -> str:
    """Return the query for a model's output tokens per second."""
    return _by_model(recorded_rate(metrics.GENERATION_TOKENS))


def _p95(histogram: str) -> str:
    """Return the query for the 95th percentile of a histogram over all replicas of a model."""
    buckets = select(recorded_rate(f"{histogram}_bucket"), OF_MODEL)
    return quantile(0.95, f"sum by ({MODEL}, le) ({buckets})")


def _kv_usage_steps(thresholds: Thresholds) -> Steps:
    """Return the thresholds of KV cache usage: yellow at the limit of the alert VLLMKVPressure and above."""
    return ((None, GREEN), (thresholds.alerts["VLLMKVPressure"].usage, YELLOW))
