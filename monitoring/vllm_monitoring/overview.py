"""The first dashboard: a row for each model and each replica. It reads recorded series: it opens fast over a fleet."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import GREEN, OF_MODEL, RED, TOKENS_PER_SECOND, YELLOW, Column, Row, quantile, select
from vllm_monitoring.records import (
    KV_FULLEST,
    KV_MEAN,
    MODEL,
    POD,
    RATE_WINDOW,
    REPLICAS,
    SLO_ERRORS,
    recorded,
    summed,
)
from vllm_monitoring.thresholds import Thresholds

UID = "vllm-overview"
_READY, _GPUS = metrics.PREFIX + "ready", metrics.PREFIX + "planned_gpus"


def build(thresholds: Thresholds) -> str:
    """The dashboard's JSON."""
    slo, alerts = thresholds.slo, thresholds.alerts

    def model(series: str, *more: str) -> str:
        # By the labels of a table's row and no more, else what is recorded under two names is two rows.
        return f"sum by ({MODEL}) ({select(series, OF_MODEL, *more)})"

    def buckets(histogram: str) -> str:
        return f"sum by ({MODEL}, le) ({select(recorded(f'{histogram}_bucket'), OF_MODEL)})"

    def missed(objective: str) -> str:
        return model(f"{SLO_ERRORS}:ratio_rate{RATE_WINDOW}", f'slo="{objective}"')

    def pod(series: str) -> str:
        return f"sum by ({POD}) ({select(series, OF_MODEL)})"

    firing = f'count({metrics.ALERTS}{{alertstate="firing", namespace=~"$namespace"}}) or vector(0)'
    tokens = model(recorded(metrics.GENERATION_TOKENS))
    first, apart, waited = (
        quantile(0.95, buckets(name))
        for name in (metrics.TIME_TO_FIRST_TOKEN, metrics.INTER_TOKEN_LATENCY, metrics.QUEUE_TIME)
    )
    numbers = [
        panels.stat_panel(
            "Alerts that fire",
            "None. Each has a runbook in its annotations.",
            firing,
            steps=((None, GREEN), (1, RED)),
        ),
        panels.stat_panel(
            "Replicas out of rotation",
            "None, but while a rollout or a start is on.",
            f"sum({model(REPLICAS)}) - sum({model(summed(_READY))})",
            steps=((None, GREEN), (1, YELLOW)),
        ),
        panels.stat_panel(
            "GPUs in use", "What all of this costs: the GPUs of every replica's plan.", f"sum({model(summed(_GPUS))})"
        ),
        panels.stat_panel(
            "Output", "Tokens that are generated, all models together.", f"sum({tokens})", TOKENS_PER_SECOND
        ),
        panels.stat_panel(
            "Requests",
            "That end each second; aborted ones are not among them.",
            f"sum({model(recorded(metrics.REQUEST_SUCCESS))})",
            "reqps",
            decimals=1,
        ),
        panels.stat_panel(
            "Requests that wait",
            "Few, and not for long: more than what runs means that a replica more would serve.",
            f"sum({model(summed(metrics.REQUESTS_WAITING))})",
            steps=((None, GREEN), (50, YELLOW)),
        ),
    ]
    tables = [
        panels.rows(
            "Models",
            "Ready equals replicas, errors and late first tokens are below their budget, nothing waits for long.",
            ("namespace", metrics.MODEL_NAME),
            [
                Column("Ready", model(summed(_READY)), steps=((None, RED), (1, GREEN))),
                Column("Replicas", model(REPLICAS)),
                Column("GPUs", model(summed(_GPUS))),
                Column("Running", model(summed(metrics.REQUESTS_RUNNING))),
                Column("Waiting", model(summed(metrics.REQUESTS_WAITING))),
                Column("Output", tokens, TOKENS_PER_SECOND),
                Column("Output a GPU", f"{tokens} / ({model(summed(_GPUS))} > 0)", TOKENS_PER_SECOND),
                Column("KV cache, mean", model(KV_MEAN), "percentunit"),
                Column(
                    "KV cache, fullest",
                    model(KV_FULLEST),
                    "percentunit",
                    ((None, GREEN), (alerts["VLLMKVPressure"].usage, YELLOW)),
                ),
                Column("First token, p95", first, "s", decimals=2),
                Column("Between tokens, p95", apart, "s", decimals=2),
                Column(
                    "5xx",
                    missed("availability"),
                    "percentunit",
                    ((None, GREEN), (slo.availability.budget, RED)),
                    decimals=1,
                ),
                Column(
                    "Late first tokens",
                    missed("time_to_first_token"),
                    "percentunit",
                    ((None, GREEN), (slo.time_to_first_token.budget, RED)),
                    decimals=1,
                ),
            ],
            about="vllm-engine",
            height=6,
        ),
        panels.rows(
            "Replicas",
            "All ready or saturated (which is load, not illness), and equally busy: one that stays idle beside full "
            "ones is not balanced to; one that stays full may hang.",
            ("namespace", metrics.MODEL_NAME, "pod"),
            [
                Column("State", panels.state_code(OF_MODEL, POD), states=True),
                Column("For", pod(metrics.PREFIX + "state_seconds"), "s"),
                Column("GPUs", pod(_GPUS)),
                Column("Running", pod(metrics.REQUESTS_RUNNING)),
                Column("Waiting", pod(metrics.REQUESTS_WAITING)),
                Column(
                    "KV cache",
                    f"max by ({POD}) ({select(metrics.KV_CACHE_USAGE, OF_MODEL)})",
                    "percentunit",
                    ((None, GREEN), (alerts["VLLMKVPressure"].usage, YELLOW)),
                ),
                Column(
                    "Output",
                    f"sum by ({POD}) (rate({select(metrics.GENERATION_TOKENS, OF_MODEL)}[{RATE_WINDOW}]))",
                    TOKENS_PER_SECOND,
                ),
                Column("KV tokens", pod(metrics.PREFIX + "kv_cache_tokens"), "short"),
            ],
            about="vllm-engine",
        ),
    ]
    by_model = "{{model_name}} in {{namespace}}"
    over_time = [
        panels.lines("Output by model", "It follows the load.", TOKENS_PER_SECOND, {by_model: tokens}, stacked=True),
        panels.lines(
            "Requests that run and wait",
            "What waits is a fraction of what runs; a line that only rises needs more replicas.",
            "short",
            {
                f"{by_model}, running": model(summed(metrics.REQUESTS_RUNNING)),
                f"{by_model}, waiting": model(summed(metrics.REQUESTS_WAITING)),
            },
        ),
        panels.lines(
            "Replicas that are ready",
            "A flat line; a notch is a rollout, and with a surge of one there is none.",
            "short",
            {by_model: model(summed(_READY))},
            counts=True,
        ),
        panels.lines(
            "First token, p95",
            "Below the objective. The quantile is of all replicas together, from the engine's buckets.",
            "s",
            {by_model: first},
            limit=slo.time_to_first_token.seconds,
            top=slo.time_to_first_token.seconds,
            runbook=thresholds.runbook("VLLMTimeToFirstTokenBurn"),
        ),
        panels.lines(
            "Between tokens, p95",
            "Below the objective for a token. It rises with the batch, and with each long prompt that is prefilled "
            "beside it.",
            "s",
            {by_model: apart},
            limit=slo.time_per_output_token.seconds,
            top=slo.time_per_output_token.seconds,
            runbook=thresholds.runbook("VLLMTimePerOutputTokenBurn"),
        ),
        panels.lines(
            "Wait in the queue, p95",
            "Milliseconds. Seconds mean that every replica is full.",
            "s",
            {by_model: waited},
            limit=alerts["VLLMQueueTimeHigh"].seconds,
            runbook=thresholds.runbook("VLLMQueueTimeHigh"),
        ),
    ]
    return panels.board(
        UID,
        "vLLM / Overview",
        "Is each model served, how fast, how full, what waits, what it costs in GPUs.",
        [Row("Now", numbers), Row("Models and replicas", tables), Row("Over time", over_time)],
        pods=False,
    )
