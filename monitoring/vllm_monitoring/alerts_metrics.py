"""Alerts on metrics that are missing or that cannot be believed."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring.alerts import ENGINE, OURS, POD_NAMED, READY, Alert, Limits, limited
from vllm_monitoring.records import POD


def group(limits: Limits) -> list[Alert]:
    """Return the group's alerts, in the order of the rules file."""
    return [_metrics_absent(limits), _prober_blind(limits), _kv_cache_below_plan(limits)]


def _metrics_absent(limits: Limits) -> Alert:
    """Return the alert on a ready replica without all of vLLM's metrics."""
    names = "|".join(metrics.ALWAYS_SHOWN)
    shown = f'count by (namespace, pod) (group by (namespace, pod, __name__) ({{__name__=~"{names}"}}))'
    return limited(
        limits,
        "VLLMMetricsAbsent",
        f"max by ({POD}) ({READY}) == 1 unless on (namespace, pod) {shown} >= {len(metrics.ALWAYS_SHOWN)}",
        f"{POD_NAMED} does not show all of vLLM's metrics",
        "The prober's are there and some of vLLM's are not: its /metrics is not scraped, or the engine has renamed "
        "them. Dashboards and alerts are blind to it.",
    )


def _prober_blind(limits: Limits) -> Alert:
    """Return the alert on a prober whose scrapes fail or whose one-token requests are refused."""
    scrapes = f"sum by ({POD}) (rate({OURS}scrapes_total[5m]))"
    failed = f'sum by ({POD}) (rate({OURS}scrapes_total{{result="failed"}}[5m]))'
    return limited(
        limits,
        "VLLMProberBlind",
        f"{failed} / {scrapes} > {limits['VLLMProberBlind'].share:g}\n"
        f'or max by ({POD}) ({OURS}canaries_total{{result="refused"}}) > 0',
        f"{POD_NAMED} is watched by a prober that sees too little",
        "vLLM's /metrics does not answer it, or its requests of one token are refused for their key or their model's "
        "name. An engine that hangs may stay unnoticed.",
    )


def _kv_cache_below_plan(limits: Limits) -> Alert:
    """Return the alert on an engine whose KV cache is smaller than planned."""
    planned = f"on ({POD}) group_left () max by ({POD}) ({OURS}kv_cache_planned_tokens)"
    return limited(
        limits,
        "VLLMKVCacheBelowPlan",
        f"max by ({ENGINE}) ({OURS}kv_cache_tokens) / {planned} < {limits['VLLMKVCacheBelowPlan'].share:g}",
        f"{POD_NAMED} has {{{{ $value | humanizePercentage }}}} of the KV cache that was planned",
        "Something else takes the memory, or the plan is wrong: fewer requests fit than were counted on.",
    )
