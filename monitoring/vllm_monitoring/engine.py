"""What one model's engines do with their time and memory; any choice of replicas, all of them together by default."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import OF_POD, OF_TARGET, RATE, TOKENS_PER_SECOND, Row, heat, lines, quantile, select
from vllm_monitoring.thresholds import Thresholds

UID = "vllm-engine"
_ENGINE = "{{pod}} engine {{engine}}"


def build(thresholds: Thresholds) -> str:
    """The dashboard's JSON."""
    slo, alerts = thresholds.slo, thresholds.alerts

    def rate(counter: str, by: str) -> str:
        return f"sum by ({by}) (rate({select(counter, OF_POD)}[{RATE}]))"

    def spread(histogram: str) -> str:
        return f"sum by (le) (increase({select(f'{histogram}_bucket', OF_POD)}[{RATE}]))"

    def mean(histogram: str) -> str:
        total, count = (f"sum(rate({select(f'{histogram}_{part}', OF_POD)}[{RATE}]))" for part in ("sum", "count"))
        return f"{total} / {count}"

    def quantiles(histogram: str) -> dict[str, str]:
        buckets = rate(f"{histogram}_bucket", "le")
        return {f"p{100 * share:g}": quantile(share, buckets) for share in (0.5, 0.95, 0.99)}

    by_engine = f"namespace, pod, {metrics.ENGINE}"
    real = f"max by ({by_engine}) ({select(metrics.PREFIX + 'kv_cache_tokens', OF_POD)})"
    planned = f"max by (namespace, pod) ({select(metrics.PREFIX + 'kv_cache_planned_tokens', OF_POD)})"
    hits = rate(metrics.PREFIX_CACHE_HITS, by_engine)
    http = select(metrics.HTTP_REQUESTS, OF_TARGET)
    latency = [
        lines(
            "Time to first token",
            "p95 below the objective. It is queue plus prefill; see below which of them it is.",
            "s",
            quantiles(metrics.TIME_TO_FIRST_TOKEN),
            limit=slo.time_to_first_token.seconds,
            top=slo.time_to_first_token.seconds,
            runbook=thresholds.runbook("VLLMTimeToFirstTokenBurn"),
        ),
        heat(
            "Time to first token, all of it",
            "One band. Two bands are two kinds of requests (short and long prompts, cached and not), of which no "
            "percentile tells.",
            "s",
            spread(metrics.TIME_TO_FIRST_TOKEN),
        ),
        lines(
            "Where a request's time goes, mean",
            "Mostly decode. A queue that grows wants replicas; prefill that grows, shorter or shared prompts.",
            "s",
            {
                "queue": mean(metrics.QUEUE_TIME),
                "prefill": mean(metrics.PREFILL_TIME),
                "decode": mean(metrics.DECODE_TIME),
            },
            stacked=True,
            runbook=thresholds.runbook("VLLMQueueTimeHigh"),
        ),
        lines(
            "Between tokens",
            "p95 below the objective. Spikes are long prompts that are prefilled in the same step.",
            "s",
            quantiles(metrics.INTER_TOKEN_LATENCY),
            limit=slo.time_per_output_token.seconds,
            top=slo.time_per_output_token.seconds,
            runbook=thresholds.runbook("VLLMTimePerOutputTokenBurn"),
        ),
        heat(
            "Between tokens, all of it",
            "One narrow band, which is the time of a step.",
            "s",
            spread(metrics.INTER_TOKEN_LATENCY),
        ),
        lines(
            "Whole request",
            "It follows the lengths of answers; compare it with those.",
            "s",
            quantiles(metrics.E2E_LATENCY),
        ),
    ]
    load = [
        lines(
            "Requests in the engine",
            "Running below max-num-seqs, waiting near nothing. Deferred ones wait for a LoRA or a KV transfer, not for "
            "room.",
            "short",
            {
                f"{_ENGINE}, running": f"sum by ({by_engine}) ({select(metrics.REQUESTS_RUNNING, OF_POD)})",
                f"{_ENGINE}, waiting: {{{{reason}}}}": (
                    f"sum by ({by_engine}, reason) ({select(metrics.WAITING_BY_REASON, OF_POD)})"
                ),
            },
        ),
        lines(
            "Tokens",
            "Output is what is sold. Prompts that come from a cache cost nothing.",
            TOKENS_PER_SECOND,
            {
                "output": rate(metrics.GENERATION_TOKENS, "namespace"),
                "prompt: {{source}}": rate(metrics.PROMPT_TOKENS_BY_SOURCE, "source"),
            },
            stacked=True,
        ),
        heat(
            "Tokens in a step",
            "How a batch is made up: low is decode alone, which reads all weights for few tokens; the top is "
            "max-num-batched-tokens, where prefill fills the step.",
            "none",
            spread(metrics.ITERATION_TOKENS),
        ),
        heat(
            "Length of prompts",
            "What you planned max-model-len for.",
            "short",
            spread(metrics.REQUEST_PROMPT_TOKENS),
        ),
        heat(
            "Length of answers",
            "As above; a band at a round number is max_tokens.",
            "short",
            spread(metrics.REQUEST_GENERATION_TOKENS),
        ),
        lines(
            "How requests end",
            "stop and length are good; abort is a client that left; error is not good.",
            "reqps",
            {"{{finished_reason}}": rate(metrics.REQUEST_SUCCESS, "finished_reason")},
            stacked=True,
        ),
    ]
    cache = [
        lines(
            "KV cache in use",
            "High is good use; at the top with preemptions it is too small.",
            "percentunit",
            {_ENGINE: f"max by ({by_engine}) ({select(metrics.KV_CACHE_USAGE, OF_POD)})"},
            limit=alerts["VLLMKVPressure"].usage,
            top=1.0,
            runbook=thresholds.runbook("VLLMKVPressure"),
        ),
        lines(
            "Preemptions",
            "None. Each throws away what a request had computed.",
            "short",
            {_ENGINE: rate(metrics.PREEMPTIONS, by_engine)},
            top=1.0,
            runbook=thresholds.runbook("VLLMKVPressure"),
        ),
        lines(
            "Prefix cache hits",
            "The share of prompt tokens that were computed before. With a shared system prompt it should be high; if "
            "not, requests of one user go to different replicas.",
            "percentunit",
            {_ENGINE: f"{hits} / {rate(metrics.PREFIX_CACHE_QUERIES, by_engine)}"},
        ),
        lines(
            "KV cache against its plan",
            "100 %, within 2. Less means that something else takes memory, or that the plan is wrong.",
            "percentunit",
            {_ENGINE: f"{real} / on (namespace, pod) group_left () {planned}"},
            top=1.2,
            runbook=thresholds.runbook("VLLMKVCacheBelowPlan"),
        ),
    ]
    answers = [
        lines(
            "HTTP answers",
            "2xx, and 4xx by clients' mistakes. 5xx is ours.",
            "reqps",
            {"{{status}} {{handler}}": f"sum by (handler, status) (rate({http}[{RATE}]))"},
            stacked=True,
            runbook=thresholds.runbook("VLLMAvailabilityBurn"),
        ),
        lines(
            "Requests turned away",
            "None, unless you limit the queue (--max-num-queued-reqs).",
            "reqps",
            {"{{pod}} {{reason}}": rate(metrics.ADMISSION_REJECTIONS, "namespace, pod, reason")},
            top=1.0,
            runbook=thresholds.runbook("VLLMAdmissionRejections"),
        ),
    ]
    return panels.board(
        UID,
        "vLLM / Engine",
        "What the engines do with their time, their batches and their KV cache.",
        [Row("Latency", latency), Row("Load", load), Row("KV cache", cache), Row("Answers", answers)],
        pods=True,
    )
