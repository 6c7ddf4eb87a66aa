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
            "Time to first token: p50, p95 and p99. Normal: p95 is below the objective (red line). Look when: p95 is "
            "above it. The panel 'Mean request time by phase' shows which part is slow. Runbook: "
            "VLLMTimeToFirstTokenBurn.",
            "s",
            _quantiles(metrics.TIME_TO_FIRST_TOKEN),
            limit=objective,
            top=objective,
            runbook=thresholds.runbook("VLLMTimeToFirstTokenBurn"),
        ),
        heatmap_panel(
            "TTFT distribution",
            "Number of requests in each range of TTFT. Normal: one band. Two bands mean two kinds of requests, for "
            "example short and long prompts, or cached and uncached ones. Percentiles do not show this.",
            "s",
            _distribution(metrics.TIME_TO_FIRST_TOKEN),
        ),
        line_panel(
            "Mean request time by phase",
            "Mean time that finished requests spent in the queue, in prefill and in decode. Normal: mostly decode. "
            "Look when: queue time grows (add replicas), or prefill time grows (shorten prompts, or begin all with "
            "the same text, so that the prefix cache has it). Runbook: VLLMQueueTimeHigh.",
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
            "Time between two tokens of a stream: p50, p95 and p99. Normal: p95 is below the objective for TPOT (red "
            "line). Spikes come from long prompts that are prefilled in the same step. Runbook: "
            "VLLMTimePerOutputTokenBurn.",
            "s",
            _quantiles(metrics.INTER_TOKEN_LATENCY),
            limit=objective,
            top=objective,
            runbook=thresholds.runbook("VLLMTimePerOutputTokenBurn"),
        ),
        heatmap_panel(
            "ITL distribution",
            "Number of tokens in each range of ITL. Normal: one narrow band, at the duration of one engine step.",
            "s",
            _distribution(metrics.INTER_TOKEN_LATENCY),
        ),
        line_panel(
            "End-to-end latency",
            "Time from the arrival of a request to its last token: p50, p95 and p99. Normal: it rises with the output "
            "length. Compare it with the panel 'Output length'.",
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
            "Requests that each engine runs, and requests that wait, by reason. Normal: running requests are below "
            "max-num-seqs, and few requests wait. Requests with the reason 'deferred' wait for a LoRA, a KV cache "
            "transfer or a grammar, not for free capacity.",
            "short",
            {f"{_LEGEND}, running": running, f"{_LEGEND}, waiting: {{{{reason}}}}": waiting},
        ),
        line_panel(
            "Token throughput",
            "Tokens per second: generated tokens, and prompt tokens by source. Normal: it follows the load. Prompt "
            "tokens from a cache need almost no GPU time.",
            TOKENS_PER_SECOND,
            {
                "output": _rate(metrics.GENERATION_TOKENS, "namespace"),
                "prompt: {{source}}": _rate(metrics.PROMPT_TOKENS_BY_SOURCE, "source"),
            },
            stacked=True,
        ),
        heatmap_panel(
            "Tokens per step",
            "Number of engine steps in each range of tokens. vLLM counts all computed tokens of a prompt in the step "
            "that ends its prefill. Normal: most steps have few tokens (decode only), and some have many (a prefill "
            "ends). If all steps have few tokens, the load is small: the GPU reads all weights for few tokens.",
            "none",
            _distribution(metrics.ITERATION_TOKENS),
        ),
    ]


def _request_lengths_and_ends() -> list[Panel]:
    """Return the panels of prompt lengths, output lengths and finish reasons."""
    return [
        heatmap_panel(
            "Prompt length",
            "Number of finished requests in each range of prompt tokens. Normal: all prompts are well below "
            "max-model-len.",
            "short",
            _distribution(metrics.REQUEST_PROMPT_TOKENS),
        ),
        heatmap_panel(
            "Output length",
            "Number of finished requests in each range of generated tokens. Normal: well below max-model-len. A band "
            "at a round number comes from the max_tokens of clients.",
            "short",
            _distribution(metrics.REQUEST_GENERATION_TOKENS),
        ),
        line_panel(
            "Finish reasons",
            "Requests that finish per second, by reason. vLLM does not count a request whose client disconnects. "
            "Normal: 'stop' and 'length'. 'abort': vLLM ended the request, for example when it shut down. 'error': "
            "vLLM failed on the request. 'repetition': vLLM stopped an output that repeated itself.",
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
            "Share of each engine's KV cache that is in use. Normal: any value without preemptions. High usage is "
            "good. Look when: usage is above the red line and requests are preempted. Then the cache is too small. "
            "Runbook: VLLMKVPressure.",
            "percentunit",
            {_LEGEND: f"max by ({_BY_ENGINE}) ({select(metrics.KV_CACHE_USAGE, OF_POD)})"},
            limit=thresholds.alerts["VLLMKVPressure"].usage,
            top=1.0,
            runbook=thresholds.runbook("VLLMKVPressure"),
        ),
        line_panel(
            "Preemptions",
            "Preempted requests per second. A preempted request is computed again from its beginning. Normal: 0. "
            "Runbook: VLLMKVPressure.",
            "short",
            {_LEGEND: _rate(metrics.PREEMPTIONS, _BY_ENGINE)},
            top=1.0,
            runbook=thresholds.runbook("VLLMKVPressure"),
        ),
        line_panel(
            "Prefix cache hit rate",
            "Share of prompt tokens that come from the prefix cache. Normal: stable. It is high if prompts have a "
            "common system prompt, and near 0 if they have nothing in common. Look when: it drops. Then check whether "
            "requests of one conversation go to different replicas.",
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
        "Size of each engine's KV cache as a share of the planned size. Normal: 98 to 102 %. Look when: it is less. "
        "Then another process uses the GPU's memory, or the plan is wrong. Runbook: VLLMKVCacheBelowPlan.",
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
            "Responses of the API server per second, by status and route. Normal: 2xx, and a few 4xx for wrong "
            "requests of clients. Look when: there are 5xx. Then the server fails or rejects requests. Runbook: "
            "VLLMAvailabilityBurn.",
            "reqps",
            {"{{status}} {{handler}}": responses},
            stacked=True,
            runbook=thresholds.runbook("VLLMAvailabilityBurn"),
        ),
        line_panel(
            "Rejected requests",
            "Requests per second that get 503 because a queue limit is reached. Normal: 0. Only a limit that you set "
            "(--max-num-queued-reqs, --max-num-queued-tokens) rejects requests. Runbook: VLLMAdmissionRejections.",
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
