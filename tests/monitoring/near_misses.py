"""Hours in which nothing is wrong though it may look so; nobody may be told of anything."""

from __future__ import annotations

from cases import all_shown, ours, state
from promtool import ENGINE, GPU, TARGET, Case, Look, series

from vllm_health import metrics

STEPS = 8 * 120  # eight hours, a sample each half a minute
ROUTE = TARGET | {"handler": "/v1/chat/completions", "method": "POST"}


def steady(value):
    return f"{value}x{STEPS}"


def well(since=0):
    """A replica with two GPUs that serves from the step ``since`` on."""
    absent = f"_x{since} " if since else ""
    one, none = f"{absent}1x{STEPS}", f"{absent}0x{STEPS}"
    found = all_shown(one, ENGINE)
    for name in (metrics.REQUESTS_WAITING, metrics.REQUESTS_RUNNING, metrics.KV_CACHE_USAGE, metrics.PREEMPTIONS):
        found |= series(name, ENGINE, none)
    found |= series(f"{metrics.ITERATION_TOKENS}_count", ENGINE, f"{absent}0+1x{STEPS}")
    for name in ("live", "nvml_up"):
        found |= ours(name, steady(1))
    for kind in ("answered", "refused"):
        found |= ours("canaries_total", f"{absent}0+0.5x{STEPS}" if kind == "answered" else steady(0), result=kind)
    return found | (
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
        | ours("gpu_throttled", steady(0), GPU, reason="heat (hardware)")
        | ours("gpu_ecc_uncorrected_errors", steady(0), GPU)
        | series(metrics.HTTP_REQUESTS, ROUTE, f"{absent}0+0.5x{STEPS}", status="2xx")
    )


def histogram(name, bound, every, fast, seconds):
    """Counts of a latency: all requests, those below ``bound``, and the sum of their ``seconds``."""
    return (
        series(f"{name}_count", ENGINE, every)
        | series(f"{name}_bucket", ENGINE, fast, le=bound)
        | series(f"{name}_sum", ENGINE, seconds)
    )


# The prober's own requests, one a minute; and with a slow one of a user's in the second hour.
ASKED, ONE_MORE = f"0+0.5x{STEPS}", f"0+0.5x240 121.5+0.5x{STEPS}"
QUICK = f"0+0.01x{STEPS}"


def latencies(every, slow):
    seconds = f"0+0.01x240 {slow}+0.01x{STEPS}" if slow else QUICK
    return (
        histogram(metrics.TIME_TO_FIRST_TOKEN, "2.5", every, ASKED, seconds)
        | histogram(metrics.TIME_PER_OUTPUT_TOKEN, "0.1", every, ASKED, seconds)
        | histogram(metrics.QUEUE_TIME, "0.3", every, ASKED, seconds)
    )


def nothing_fires(*times):
    return [Look(at, "", 0) for at in times]


ALL_THE_TIME = [f"{minutes}m" for minutes in range(1, 470, 7)]
NEAR_MISSES = [
    Case("the start of a pod takes twenty minutes", well(since=40), nothing_fires(*ALL_THE_TIME)),
    Case("an idle night", well() | latencies(ASKED, 0), nothing_fires(*ALL_THE_TIME)),
    Case(
        "one slow request in an idle night",
        well()
        | latencies(ONE_MORE, 60)
        | series(metrics.KV_CACHE_USAGE, ENGINE, f"0x240 0.97x3 0x{STEPS}")
        | series(metrics.PREEMPTIONS, ENGINE, f"0x242 1x{STEPS}")
        | series(metrics.REQUESTS_WAITING, ENGINE, f"0x239 1x1 0x{STEPS}")
        | series(metrics.HTTP_REQUESTS, ROUTE, f"0x250 1x{STEPS}", status="5xx"),
        nothing_fires(*ALL_THE_TIME),
    ),
]
