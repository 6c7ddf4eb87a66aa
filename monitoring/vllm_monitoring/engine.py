"""The engine dashboard: latency, load, KV cache and HTTP responses, over the selected models and replicas."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import (
    OF_POD,
    OF_TARGET,
    RATE,
    TOKENS_PER_SECOND,
    Panel,
    Row,
    heatmap_panel,
    line_panel,
    quantile,
    select,
)
from vllm_monitoring.thresholds import Thresholds

UID = "vllm-engine"
_BY_ENGINE = f"namespace, pod, {metrics.ENGINE}"
_LEGEND = "{{pod}} engine {{engine}}"


def build(thresholds: Thresholds) -> str:
    """Return the dashboard's JSON."""
    return panels.dashboard_json(
        UID,
        "vLLM / Engine",
        "Latency, batches and KV cache of the engines.",
        [
            Row("Latency", [*_time_to_first_token(thresholds), *_inter_token_latency(thresholds)]),
            Row("Load", [*_batches(), *_request_lengths_and_ends()]),
            Row("KV cache", [*_kv_usage_and_hits(thresholds), _kv_capacity(thresholds)]),
            Row("HTTP", _responses(thresholds)),
        ],
        pods=True,
    )


def _time_to_first_token(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of TTFT and of its parts, queue time and prefill time."""
    objective = thresholds.slo.time_to_first_token.seconds
    return [
        line_panel(
            "TTFT",
            "p95 is below the objective (red line). 'Mean request time by phase' shows which part is slow.",
            "s",
            _quantiles(metrics.TIME_TO_FIRST_TOKEN),
            limit=objective,
            top=objective,
            runbook=thresholds.runbook("VLLMTimeToFirstTokenBurn"),
        ),
        heatmap_panel(
            "TTFT distribution",
            "One band. Two bands are two kinds of requests: short and long prompts, or cached and uncached ones. A "
            "percentile does not show that.",
            "s",
            _distribution(metrics.TIME_TO_FIRST_TOKEN),
        ),
        line_panel(
            "Mean request time by phase",
            "Mostly decode. If queue time grows, add replicas. If prefill time grows, shorten or share prompts.",
            "s",
            {
                "queue": _mean(metrics.QUEUE_TIME),
                "prefill": _mean(metrics.PREFILL_TIME),
                "decode": _mean(metrics.DECODE_TIME),
            },
            stacked=True,
            runbook=thresholds.runbook("VLLMQueueTimeHigh"),
        ),
    ]


def _inter_token_latency(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of ITL and of the latency of whole requests."""
    objective = thresholds.slo.time_per_output_token.seconds
    return [
        line_panel(
            "ITL",
            "p95 is below the objective (red line). Spikes are long prompts that are prefilled in the same step.",
            "s",
            _quantiles(metrics.INTER_TOKEN_LATENCY),
            limit=objective,
            top=objective,
            runbook=thresholds.runbook("VLLMTimePerOutputTokenBurn"),
        ),
        heatmap_panel(
            "ITL distribution",
            "One narrow band: the duration of a step.",
            "s",
            _distribution(metrics.INTER_TOKEN_LATENCY),
        ),
        line_panel(
            "End-to-end latency",
            "Normal: it rises with the output length. Compare it with the panel 'Output length'.",
            "s",
            _quantiles(metrics.E2E_LATENCY),
        ),
    ]


def _batches() -> list[Panel]:
    """Return the panels of running and waiting requests, of tokens per second and of tokens per step."""
    running = f"sum by ({_BY_ENGINE}) ({select(metrics.REQUESTS_RUNNING, OF_POD)})"
    waiting = f"sum by ({_BY_ENGINE}, reason) ({select(metrics.WAITING_BY_REASON, OF_POD)})"
    return [
        line_panel(
            "Running and waiting requests",
            "Running requests are below max-num-seqs, and few wait. Requests with the reason 'deferred' wait for a "
            "LoRA or a KV cache transfer, not for free capacity.",
            "short",
            {f"{_LEGEND}, running": running, f"{_LEGEND}, waiting: {{{{reason}}}}": waiting},
        ),
        line_panel(
            "Token throughput",
            "It follows the load. Prompt tokens from a cache cost almost nothing.",
            TOKENS_PER_SECOND,
            {
                "output": _rate(metrics.GENERATION_TOKENS, "namespace"),
                "prompt: {{source}}": _rate(metrics.PROMPT_TOKENS_BY_SOURCE, "source"),
            },
            stacked=True,
        ),
        heatmap_panel(
            "Tokens per step",
            "Low values are decode only: a step reads all weights for few tokens. The highest value is "
            "max-num-batched-tokens: prefill fills the step.",
            "none",
            _distribution(metrics.ITERATION_TOKENS),
        ),
    ]


def _request_lengths_and_ends() -> list[Panel]:
    """Return the panels of prompt lengths, output lengths and finish reasons."""
    return [
        heatmap_panel(
            "Prompt length",
            "All prompts are well below max-model-len.",
            "short",
            _distribution(metrics.REQUEST_PROMPT_TOKENS),
        ),
        heatmap_panel(
            "Output length",
            "It is well below max-model-len. A band at a round number is the clients' max_tokens.",
            "short",
            _distribution(metrics.REQUEST_GENERATION_TOKENS),
        ),
        line_panel(
            "Finish reasons",
            "stop and length are normal. abort: the client disconnected. error: the engine failed.",
            "reqps",
            {"{{finished_reason}}": _rate(metrics.REQUEST_SUCCESS, "finished_reason")},
            stacked=True,
        ),
    ]


def _kv_usage_and_hits(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of KV cache usage, preemptions and prefix cache hits."""
    hits, queries = (_rate(name, _BY_ENGINE) for name in (metrics.PREFIX_CACHE_HITS, metrics.PREFIX_CACHE_QUERIES))
    return [
        line_panel(
            "KV cache usage",
            "High is good. The cache is too small if usage is at the red line and requests are preempted.",
            "percentunit",
            {_LEGEND: f"max by ({_BY_ENGINE}) ({select(metrics.KV_CACHE_USAGE, OF_POD)})"},
            limit=thresholds.alerts["VLLMKVPressure"].usage,
            top=1.0,
            runbook=thresholds.runbook("VLLMKVPressure"),
        ),
        line_panel(
            "Preemptions",
            "Zero. A preempted request is computed again from its beginning.",
            "short",
            {_LEGEND: _rate(metrics.PREEMPTIONS, _BY_ENGINE)},
            top=1.0,
            runbook=thresholds.runbook("VLLMKVPressure"),
        ),
        line_panel(
            "Prefix cache hit rate",
            "Share of prompt tokens that come from the prefix cache. It is high with a shared system prompt. If it is "
            "low, one user's requests go to different replicas.",
            "percentunit",
            {_LEGEND: f"{hits} / {queries}"},
        ),
    ]


def _kv_capacity(thresholds: Thresholds) -> Panel:
    """Return the panel of each engine's KV cache size as a share of the planned size."""
    actual = f"max by ({_BY_ENGINE}) ({select(metrics.PREFIX + 'kv_cache_tokens', OF_POD)})"
    planned = f"max by (namespace, pod) ({select(metrics.PREFIX + 'kv_cache_planned_tokens', OF_POD)})"
    return line_panel(
        "KV cache size vs plan",
        "98 to 102 %. Less: another process uses the GPU's memory, or the plan is wrong.",
        "percentunit",
        {_LEGEND: f"{actual} / on (namespace, pod) group_left () {planned}"},
        top=1.2,
        runbook=thresholds.runbook("VLLMKVCacheBelowPlan"),
    )


def _responses(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of HTTP responses by status and of requests rejected at admission."""
    responses = f"sum by (handler, status) (rate({select(metrics.HTTP_REQUESTS, OF_TARGET)}[{RATE}]))"
    return [
        line_panel(
            "HTTP responses",
            "2xx, and some 4xx from wrong client requests. 5xx is an error of the server.",
            "reqps",
            {"{{status}} {{handler}}": responses},
            stacked=True,
            runbook=thresholds.runbook("VLLMAvailabilityBurn"),
        ),
        line_panel(
            "Rejected requests",
            "Zero, unless you limit the queue (--max-num-queued-reqs, --max-num-queued-tokens).",
            "reqps",
            {"{{pod}} {{reason}}": _rate(metrics.ADMISSION_REJECTIONS, "namespace, pod, reason")},
            top=1.0,
            runbook=thresholds.runbook("VLLMAdmissionRejections"),
        ),
    ]


def _rate(counter: str, by: str) -> str:
    """Return the query for a counter's rate, summed by the labels ``by``."""
    return f"sum by ({by}) (rate({select(counter, OF_POD)}[{RATE}]))"


def _distribution(histogram: str) -> str:
    """Return the query for the observations in each bucket of a histogram."""
    return f"sum by (le) (increase({select(f'{histogram}_bucket', OF_POD)}[{RATE}]))"


def _mean(histogram: str) -> str:
    """Return the query for the mean of a histogram's observations."""
    total, count = (f"sum(rate({select(f'{histogram}_{part}', OF_POD)}[{RATE}]))" for part in ("sum", "count"))
    return f"{total} / {count}"


def _quantiles(histogram: str) -> dict[str, str]:
    """Return the queries for a histogram's p50, p95 and p99, by these names."""
    buckets = _rate(f"{histogram}_bucket", "le")
    return {f"p{100 * share:g}": quantile(share, buckets) for share in (0.5, 0.95, 0.99)}
