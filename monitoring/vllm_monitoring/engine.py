"""The engine dashboard: latency, load, KV cache and HTTP responses of one model, over any choice of replicas."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import OF_POD, OF_TARGET, RATE, TOKENS_PER_SECOND, Panel, Row, heat, lines, quantile, select
from vllm_monitoring.thresholds import Thresholds

UID = "vllm-engine"
_BY_ENGINE = f"namespace, pod, {metrics.ENGINE}"
_LEGEND = "{{pod}} engine {{engine}}"


def build(thresholds: Thresholds) -> str:
    """Return the dashboard's JSON."""
    return panels.board(
        UID,
        "vLLM / Engine",
        "What the engines do with their time, their batches and their KV cache.",
        [
            Row("Latency", [*_time_to_first_token(thresholds), *_inter_token_latency(thresholds)]),
            Row("Load", [*_batches(), *_request_lengths_and_ends()]),
            Row("KV cache", [*_kv_usage_and_hits(thresholds), _kv_capacity(thresholds)]),
            Row("Answers", _responses(thresholds)),
        ],
        pods=True,
    )


def _time_to_first_token(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of TTFT and of its parts, queue time and prefill time."""
    objective = thresholds.slo.time_to_first_token.seconds
    return [
        lines(
            "Time to first token",
            "p95 below the objective. It is queue plus prefill; see below which of them it is.",
            "s",
            _quantiles(metrics.TIME_TO_FIRST_TOKEN),
            limit=objective,
            top=objective,
            runbook=thresholds.runbook("VLLMTimeToFirstTokenBurn"),
        ),
        heat(
            "Time to first token, all of it",
            "One band. Two bands are two kinds of requests (short and long prompts, cached and not), of which no "
            "percentile tells.",
            "s",
            _distribution(metrics.TIME_TO_FIRST_TOKEN),
        ),
        lines(
            "Where a request's time goes, mean",
            "Mostly decode. A queue that grows wants replicas; prefill that grows, shorter or shared prompts.",
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
        lines(
            "Between tokens",
            "p95 below the objective. Spikes are long prompts that are prefilled in the same step.",
            "s",
            _quantiles(metrics.INTER_TOKEN_LATENCY),
            limit=objective,
            top=objective,
            runbook=thresholds.runbook("VLLMTimePerOutputTokenBurn"),
        ),
        heat(
            "Between tokens, all of it",
            "One narrow band, which is the time of a step.",
            "s",
            _distribution(metrics.INTER_TOKEN_LATENCY),
        ),
        lines(
            "Whole request",
            "It follows the lengths of answers; compare it with those.",
            "s",
            _quantiles(metrics.E2E_LATENCY),
        ),
    ]


def _batches() -> list[Panel]:
    """Return the panels of running and waiting requests, of tokens per second and of tokens per step."""
    running = f"sum by ({_BY_ENGINE}) ({select(metrics.REQUESTS_RUNNING, OF_POD)})"
    waiting = f"sum by ({_BY_ENGINE}, reason) ({select(metrics.WAITING_BY_REASON, OF_POD)})"
    return [
        lines(
            "Requests in the engine",
            "Running below max-num-seqs, waiting near nothing. Deferred ones wait for a LoRA or a KV transfer, not for "
            "room.",
            "short",
            {f"{_LEGEND}, running": running, f"{_LEGEND}, waiting: {{{{reason}}}}": waiting},
        ),
        lines(
            "Tokens",
            "Output is what is sold. Prompts that come from a cache cost nothing.",
            TOKENS_PER_SECOND,
            {
                "output": _rate(metrics.GENERATION_TOKENS, "namespace"),
                "prompt: {{source}}": _rate(metrics.PROMPT_TOKENS_BY_SOURCE, "source"),
            },
            stacked=True,
        ),
        heat(
            "Tokens in a step",
            "How a batch is made up: low is decode alone, which reads all weights for few tokens; the top is "
            "max-num-batched-tokens, where prefill fills the step.",
            "none",
            _distribution(metrics.ITERATION_TOKENS),
        ),
    ]


def _request_lengths_and_ends() -> list[Panel]:
    """Return the panels of prompt lengths, output lengths and finish reasons."""
    return [
        heat(
            "Length of prompts",
            "What you planned max-model-len for.",
            "short",
            _distribution(metrics.REQUEST_PROMPT_TOKENS),
        ),
        heat(
            "Length of answers",
            "As above; a band at a round number is max_tokens.",
            "short",
            _distribution(metrics.REQUEST_GENERATION_TOKENS),
        ),
        lines(
            "How requests end",
            "stop and length are good; abort is a client that left; error is not good.",
            "reqps",
            {"{{finished_reason}}": _rate(metrics.REQUEST_SUCCESS, "finished_reason")},
            stacked=True,
        ),
    ]


def _kv_usage_and_hits(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of KV cache usage, preemptions and prefix cache hits."""
    hits, queries = (_rate(name, _BY_ENGINE) for name in (metrics.PREFIX_CACHE_HITS, metrics.PREFIX_CACHE_QUERIES))
    return [
        lines(
            "KV cache in use",
            "High is good use; at the top with preemptions it is too small.",
            "percentunit",
            {_LEGEND: f"max by ({_BY_ENGINE}) ({select(metrics.KV_CACHE_USAGE, OF_POD)})"},
            limit=thresholds.alerts["VLLMKVPressure"].usage,
            top=1.0,
            runbook=thresholds.runbook("VLLMKVPressure"),
        ),
        lines(
            "Preemptions",
            "None. Each throws away what a request had computed.",
            "short",
            {_LEGEND: _rate(metrics.PREEMPTIONS, _BY_ENGINE)},
            top=1.0,
            runbook=thresholds.runbook("VLLMKVPressure"),
        ),
        lines(
            "Prefix cache hits",
            "The share of prompt tokens that were computed before. With a shared system prompt it should be high; if "
            "not, requests of one user go to different replicas.",
            "percentunit",
            {_LEGEND: f"{hits} / {queries}"},
        ),
    ]


def _kv_capacity(thresholds: Thresholds) -> Panel:
    """Return the panel of each engine's KV cache size as a share of the planned size."""
    actual = f"max by ({_BY_ENGINE}) ({select(metrics.PREFIX + 'kv_cache_tokens', OF_POD)})"
    planned = f"max by (namespace, pod) ({select(metrics.PREFIX + 'kv_cache_planned_tokens', OF_POD)})"
    return lines(
        "KV cache against its plan",
        "100 %, within 2. Less means that something else takes memory, or that the plan is wrong.",
        "percentunit",
        {_LEGEND: f"{actual} / on (namespace, pod) group_left () {planned}"},
        top=1.2,
        runbook=thresholds.runbook("VLLMKVCacheBelowPlan"),
    )


def _responses(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of HTTP responses by status and of requests rejected at admission."""
    responses = f"sum by (handler, status) (rate({select(metrics.HTTP_REQUESTS, OF_TARGET)}[{RATE}]))"
    return [
        lines(
            "HTTP answers",
            "2xx, and 4xx by clients' mistakes. 5xx is ours.",
            "reqps",
            {"{{status}} {{handler}}": responses},
            stacked=True,
            runbook=thresholds.runbook("VLLMAvailabilityBurn"),
        ),
        lines(
            "Requests turned away",
            "None, unless you limit the queue (--max-num-queued-reqs).",
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
