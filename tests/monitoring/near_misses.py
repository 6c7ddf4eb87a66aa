"""Cases of hours without a fault, some of which look like one. No alert may fire."""

from __future__ import annotations

from cases import all_metrics, ours, state
from promtool import ENGINE, GPU, TARGET, Case, Expectation, series

from vllm_health import metrics

STEPS = 8 * 120  # eight hours, one sample per 30 s
ROUTE = TARGET | {"handler": "/v1/chat/completions", "method": "POST"}


def steady(value):
    """Return a constant series."""
    return f"{value}x{STEPS}"


def healthy_replica(since=0):
    """Return the series of a replica with two GPUs that serves from step ``since`` on and starts before."""
    absent = f"_x{since} " if since else ""
    ones, zeros = f"{absent}1x{STEPS}", f"{absent}0x{STEPS}"
    result = all_metrics(ones, ENGINE)
    for name in (metrics.REQUESTS_WAITING, metrics.REQUESTS_RUNNING, metrics.KV_CACHE_USAGE, metrics.PREEMPTIONS):
        result |= series(name, ENGINE, zeros)
    result |= series(f"{metrics.ITERATION_TOKENS}_count", ENGINE, f"{absent}0+1x{STEPS}")
    for name in ("live", "nvml_up"):
        result |= ours(name, steady(1))
    for kind in ("answered", "refused"):
        result |= ours("canaries_total", f"{absent}0+0.5x{STEPS}" if kind == "answered" else steady(0), result=kind)
    result |= ours("unwatched", zeros, ENGINE)
    return result | (
        ours("ready", f"0x{since} 1x{STEPS}" if since else steady(1))
        | state("starting", f"1x{since} 0x{STEPS}" if since else steady(0))
        | state("ready", f"0x{since} 1x{STEPS}" if since else steady(1))
        | state("stalled", steady(0))
        | ours("draining", steady(0))
        | ours("start_seconds", f"0+30x{since} {30 * since}x{STEPS}" if since else steady(90))
        | ours("last_progress_seconds", steady(40), ENGINE)
        | ours("state_seconds", f"0+30x{STEPS}")
        | ours("limit_seconds", steady(600), limit="start_stall")
        | ours("limit_seconds", steady(75), limit="drain")
        | ours("planned_gpus", steady(2))
        | ours("kv_cache_tokens", f"{absent}995x{STEPS}", ENGINE)
        | ours("kv_cache_planned_tokens", steady(1000))
        | ours("scrapes_total", f"0+6x{STEPS}", result="ok")
        | ours("scrapes_total", steady(0), result="failed")
        | ours("process_start_time_seconds", steady(1), TARGET)
        | ours("gpu_throttled", steady(0), GPU, reason="HW Thermal Slowdown")
        | ours("gpu_ecc_uncorrected_errors", steady(0), GPU)
        | series(metrics.HTTP_REQUESTS, ROUTE, f"{absent}0+0.5x{STEPS}", status="2xx")
    )


def histogram(name, bound, count, fast, seconds):
    """Return a latency histogram: the count of requests, those below ``bound``, and the sum of their ``seconds``."""
    return (
        series(f"{name}_count", ENGINE, count)
        | series(f"{name}_bucket", ENGINE, fast, le=bound)
        | series(f"{name}_sum", ENGINE, seconds)
    )


# Counts of requests: the prober's own, one a minute, and the same with one slow user request in the third hour.
PROBER_ONLY, ONE_MORE = f"0+0.5x{STEPS}", f"0+0.5x240 121.5+0.5x{STEPS}"
FAST_SECONDS = f"0+0.01x{STEPS}"


def latencies(count, slow):
    """Return the latency histograms. ``slow``: seconds of the one slow request, or 0."""
    seconds = f"0+0.01x240 {slow}+0.01x{STEPS}" if slow else FAST_SECONDS
    return (
        histogram(metrics.TIME_TO_FIRST_TOKEN, "2.5", count, PROBER_ONLY, seconds)
        | histogram(metrics.TIME_PER_OUTPUT_TOKEN, "0.1", count, PROBER_ONLY, seconds)
        | histogram(metrics.QUEUE_TIME, "0.3", count, PROBER_ONLY, seconds)
    )


def nothing_fires(*times):
    """Expect no firing alert at each time."""
    return [Expectation(at, "", 0) for at in times]


EVERY_7_MINUTES = [f"{minutes}m" for minutes in range(1, 470, 7)]
NEAR_MISSES = [
    Case("start-up takes twenty minutes", healthy_replica(since=40), nothing_fires(*EVERY_7_MINUTES)),
    Case("an idle night", healthy_replica() | latencies(PROBER_ONLY, 0), nothing_fires(*EVERY_7_MINUTES)),
    Case(
        "one slow request in an idle night",
        healthy_replica()
        | latencies(ONE_MORE, 60)
        | series(metrics.KV_CACHE_USAGE, ENGINE, f"0x240 0.97x3 0x{STEPS}")
        | series(metrics.PREEMPTIONS, ENGINE, f"0x242 1x{STEPS}")
        | series(metrics.REQUESTS_WAITING, ENGINE, f"0x239 1x1 0x{STEPS}")
        | series(metrics.HTTP_REQUESTS, ROUTE, f"0x250 1x{STEPS}", status="5xx"),
        nothing_fires(*EVERY_7_MINUTES),
    ),
]
