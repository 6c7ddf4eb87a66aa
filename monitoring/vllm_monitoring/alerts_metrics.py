"""Alerts on metrics that are missing, and on a prober or a plan that is wrong."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring.alerts import ENGINE, POD_TEXT, PREFIX, READY, Alert, Limits, alert_with_limit
from vllm_monitoring.records import POD


def group(limits: Limits) -> list[Alert]:
    """Return the group's alerts, in the order of the rules file."""
    return [_metrics_absent(limits), _prober_blind(limits), _kv_cache_below_plan(limits)]


def _metrics_absent(limits: Limits) -> Alert:
    """Return the alert on a ready replica for which Prometheus lacks some of vLLM's metrics."""
    names = "|".join(metrics.ALWAYS_SHOWN)
    names_per_pod = f'count by (namespace, pod) (group by (namespace, pod, __name__) ({{__name__=~"{names}"}}))'
    return alert_with_limit(
        limits,
        "VLLMMetricsAbsent",
        f"max by ({POD}) ({READY}) == 1 unless on (namespace, pod) {names_per_pod} >= {len(metrics.ALWAYS_SHOWN)}",
        f"{POD_TEXT}: some of vLLM's metrics are missing",
        "Prometheus has the prober's metrics but not all of vLLM's. It does not scrape vLLM's /metrics, or vLLM has "
        "renamed metrics. Some dashboard panels are empty, and alerts on the missing metrics cannot fire.",
    )


def _prober_blind(limits: Limits) -> Alert:
    """Return the alert on a prober whose scrapes fail or whose one-token requests are refused or fail."""
    scrapes = f"sum by ({POD}) (rate({PREFIX}scrapes_total[5m]))"
    failed = f'sum by ({POD}) (rate({PREFIX}scrapes_total{{result="failed"}}[5m]))'
    return alert_with_limit(
        limits,
        "VLLMProberBlind",
        f"{failed} / {scrapes} > {limits['VLLMProberBlind'].share:g}\nor max by ({POD}) ({PREFIX}unwatched) == 1",
        f"{POD_TEXT}: the prober cannot detect a hang",
        "The prober cannot read vLLM's /metrics, or its one-token requests are refused or fail, for example because of "
        "the API key, the model name or the network. An engine that hangs may not be noticed.",
    )


def _kv_cache_below_plan(limits: Limits) -> Alert:
    """Return the alert on an engine whose KV cache is smaller than planned."""
    planned = f"on ({POD}) group_left () max by ({POD}) ({PREFIX}kv_cache_planned_tokens)"
    return alert_with_limit(
        limits,
        "VLLMKVCacheBelowPlan",
        f"max by ({ENGINE}) ({PREFIX}kv_cache_tokens) / {planned} < {limits['VLLMKVCacheBelowPlan'].share:g}",
        f"{POD_TEXT} has {{{{ $value | humanizePercentage }}}} of the planned KV cache",
        "Another process uses the GPU's memory, or the plan is wrong. Fewer requests fit than planned.",
    )
