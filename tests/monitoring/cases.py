"""Cases in which each alert fires, and in which it just does not: at its threshold, and just before its duration."""

from __future__ import annotations

from promtool import ENGINE, GPU, MODEL, POD, TARGET, Case, Expectation, firing, quiet, series

from vllm_health import metrics

OURS = metrics.PREFIX
OTHER = POD | {"pod": "llama-7d9f-xyz"}


def state(name, values, labels=POD):
    return series(f"{OURS}state", labels, values, state=name)


def ours(name, values, labels=POD, **more):
    return series(OURS + name, labels, values, **more)


def all_metrics(values, labels, without=""):
    """Return a series of each metric that dashboards and alerts need, except ``without``."""
    result = {}
    for name in metrics.ALWAYS_SHOWN:
        if name != without:
            result |= series(name, labels, values)
    return result


SERVING = [
    Case(
        "an engine stalls for a minute",
        state("stalled", "0x10 1x1 0x30"),
        [
            quiet("5m", "VLLMEngineStalled"),
            firing("5m30s", "VLLMEngineStalled", severity="page", **POD),
            firing("11m", "VLLMEngineStalled"),
            quiet("11m30s", "VLLMEngineStalled"),
        ],
    ),
    Case(
        "an engine is suspect, or its run ends",
        state("suspect", "1x30") | state("dead", "0x10 1x2"),
        [quiet("6m", "VLLMEngineStalled")],
    ),
    Case(
        "the only replica is no longer ready",
        ours("ready", "1x20 0x800") | ours("draining", "0x820"),
        [
            quiet("15m", "VLLMNoReplicaReady"),
            firing("15m30s", "VLLMNoReplicaReady", severity="page", **MODEL),
            firing("370m", "VLLMNoReplicaReady"),
            quiet("370m30s", "VLLMNoReplicaReady"),
            quiet("25m", "VLLMReplicaNotReady"),
            firing("25m30s", "VLLMReplicaNotReady", severity="ticket", **POD),
            firing("370m", "VLLMReplicaNotReady"),
            quiet("370m30s", "VLLMReplicaNotReady"),
        ],
    ),
    Case(
        "the only replica disappears without a drain",
        ours("ready", "1x20 _x60") | ours("draining", "0x20 _x60"),
        [quiet("15m", "VLLMNoReplicaReady"), firing("25m", "VLLMNoReplicaReady")],
    ),
    Case(
        "one of two replicas is no longer ready",
        ours("ready", "1x20 0x60") | ours("ready", "1x80", OTHER),
        [quiet("30m", "VLLMNoReplicaReady"), firing("30m", "VLLMReplicaNotReady", **POD)],
    ),
    Case(
        "scaled to zero: the only replica drains and disappears",
        ours("ready", "1x20 0x2 _x80") | ours("draining", "0x20 1x2 _x80") | state("draining", "0x20 1x2 _x80"),
        [quiet("40m", "VLLMNoReplicaReady"), quiet("40m", "VLLMReplicaNotReady")],
    ),
    Case(
        "a rollout drains one replica, and later the new replica is lost with its node",
        ours("ready", "1x20 0x2 _x80") | ours("draining", "0x20 1x2 _x80")
        | ours("ready", "_x20 1x10 _x80", OTHER) | ours("draining", "_x20 0x10 _x80", OTHER),
        [firing("40m", "VLLMNoReplicaReady")],
    ),
    Case(
        "one replica drains, and the new one does not become ready",
        ours("ready", "1x20 0x2 _x80") | ours("draining", "0x20 1x2 _x80") | ours("ready", "_x25 0x80", OTHER),
        [firing("40m", "VLLMNoReplicaReady")],
    ),
    Case(
        "the operator puts the replica to sleep",
        ours("ready", "1x20 0x80") | state("asleep", "0x20 1x80"),
        [quiet("40m", "VLLMNoReplicaReady"), quiet("40m", "VLLMReplicaNotReady")],
    ),
    Case(
        "a replica drains for an hour",
        ours("ready", "1x20 0x120") | state("draining", "0x20 1x120"),
        [quiet("60m", "VLLMReplicaNotReady")],
    ),
    Case(
        "requests wait and none runs",
        series(metrics.REQUESTS_WAITING, ENGINE, "0x10 3x20")
        | series(metrics.REQUESTS_RUNNING, ENGINE, "5x10 0x20")
        | series(f"{metrics.ITERATION_TOKENS}_count", ENGINE, "0+10x10 100x20"),
        [quiet("7m30s", "VLLMAdmissionStalled"), firing("8m", "VLLMAdmissionStalled", severity="page", **ENGINE)],
    ),
    *(
        Case(
            f"admission is not stalled: {why}",
            series(metrics.REQUESTS_WAITING, ENGINE, waiting)
            | series(metrics.REQUESTS_RUNNING, ENGINE, running)
            | series(f"{metrics.ITERATION_TOKENS}_count", ENGINE, steps)
            | more,
            [quiet("9m", "VLLMAdmissionStalled")],
        )
        for why, waiting, running, steps, more in (
            ("one runs", "3x30", "1x30", "100x30", {}),
            ("steps are made", "3x30", "0x30", "0+10x30", {}),
            ("the engine is paused", "3x30", "0x30", "100x30", state("asleep", "1x30")),
            ("the queue is empty", "0x30", "0x30", "100x30", {}),
        )
    ),
    *(
        Case(
            f"mean queue time is {seconds} s",
            series(f"{metrics.QUEUE_TIME}_sum", ENGINE, f"0+{30 * seconds}x60")
            | series(f"{metrics.QUEUE_TIME}_count", ENGINE, "0+30x60"),
            expectations,
        )
        for seconds, expectations in (
            (29.9, [quiet("25m", "VLLMQueueTimeHigh")]),
            (30.5, [quiet("15m", "VLLMQueueTimeHigh"),
                    firing("15m30s", "VLLMQueueTimeHigh", severity="ticket", **MODEL)]),
        )
    ),
    *(
        Case(
            f"KV cache usage is {usage} with preemptions {preempted}",
            series(metrics.KV_CACHE_USAGE, ENGINE, f"{usage}x60") | series(metrics.PREEMPTIONS, ENGINE, preempted),
            expectations,
        )
        for usage, preempted, expectations in (
            (0.9, "0+1x60", [quiet("20m", "VLLMKVPressure")]),
            (0.95, "7x60", [quiet("20m", "VLLMKVPressure")]),
            (0.91, "0+1x60", [quiet("10m", "VLLMKVPressure"),
                              firing("10m30s", "VLLMKVPressure", severity="ticket", **ENGINE)]),
        )
    ),
    *(
        Case(
            f"{each} requests are rejected per 30 s",
            series(metrics.ADMISSION_REJECTIONS, ENGINE, f"0+{each}x60", reason="max_num_queued_reqs"),
            expectations,
        )
        for each, expectations in (
            (0.5, [quiet("20m", "VLLMAdmissionRejections")]),
            (0.52, [quiet("9m30s", "VLLMAdmissionRejections"),
                    firing("10m", "VLLMAdmissionRejections", severity="ticket", **MODEL)]),
        )
    ),
    *(
        Case(
            f"the autoscaler wants {wanted} of 4 replicas and {waiting} requests wait{where}",
            series(metrics.KUBE_HPA_DESIRED, HPA, f"{wanted}x60")
            | series(metrics.KUBE_HPA_MAX, HPA, "4x60")
            | series(metrics.KUBE_HPA_INFO, HPA, "1x60", scaletargetref_name=target)
            | series(metrics.REQUESTS_WAITING, ENGINE, f"{waiting}x60"),
            expectations,
        )
        for HPA in ({"namespace": "chat", "horizontalpodautoscaler": "keda-hpa-llama"},)
        for wanted, waiting, target, where, expectations in (
            (4, 2, "llama", "", [quiet("14m30s", "VLLMAtMaxReplicas"),
                                 firing("15m", "VLLMAtMaxReplicas", severity="ticket", scaletargetref_name="llama")]),
            (3, 2, "llama", "", [quiet("20m", "VLLMAtMaxReplicas")]),
            (4, 0, "llama", "", [quiet("20m", "VLLMAtMaxReplicas")]),
            (4, 2, "web", " in another Deployment", [quiet("20m", "VLLMAtMaxReplicas")]),
        )
    ),
]  # fmt: skip

ROLLOUT = [
    *(
        Case(
            f"{times} restarts within an hour",
            ours("process_start_time_seconds", values, TARGET) | ours("live", "1x200"),
            expectations,
        )
        for times, values, expectations in (
            (2, "1x10 2x10 3x180", [quiet("20m", "VLLMRestartLoop")]),
            (3, "1x10 2x10 3x10 4x170", [quiet("16m", "VLLMRestartLoop"),
                                         firing("16m30s", "VLLMRestartLoop", severity="page", **POD),
                                         firing("65m", "VLLMRestartLoop"), quiet("65m30s", "VLLMRestartLoop")]),
        )
    ),
    *(
        Case(
            f"the kubelet counts {times} restarts of {container}",
            series(metrics.KUBE_RESTARTS, TARGET, values, container=container),
            expectations,
        )
        for times, container, values, expectations in (
            (3, "vllm", "0x60 3x60", [quiet("30m", "VLLMRestartLoop"),
                                      firing("30m30s", "VLLMRestartLoop", severity="page", **TARGET)]),
            (2, "vllm", "0x60 2x60", [quiet("40m", "VLLMRestartLoop")]),
            (9, "proxy", "0x60 9x60", [quiet("40m", "VLLMRestartLoop")]),
        )
    ),
    Case(
        "start-up takes more than half an hour",
        ours("start_seconds", "0+30x70") | state("starting", "1x70"),
        [quiet("30m", "VLLMStartupSlow"), firing("30m30s", "VLLMStartupSlow", severity="ticket", **POD)],
    ),
    Case(
        "start-up took more than half an hour and is finished",
        ours("start_seconds", "0+30x62 1860x20") | state("starting", "1x62 0x20"),
        [quiet("32m", "VLLMStartupSlow")],
    ),
    Case(
        "start-up makes no progress",
        ours("last_progress_seconds", "0+30x20", ENGINE | {"engine": ""})
        | ours("limit_seconds", "600x20", limit="start_stall")
        | ours("limit_seconds", "300x20", limit="stall")
        | state("starting", "1x20"),
        [quiet("8m", "VLLMStartupStuck"), firing("8m30s", "VLLMStartupStuck", severity="ticket", **POD)],
    ),
    Case(
        "a serving engine makes no progress",
        ours("last_progress_seconds", "0+30x20", ENGINE)
        | ours("limit_seconds", "600x20", limit="start_stall")
        | state("starting", "0x20"),
        [quiet("9m30s", "VLLMStartupStuck")],
    ),
    *(
        Case(
            f"a drain with {streams} open streams",
            ours("state_seconds", "0+5x20")
            | ours("limit_seconds", "75x20", limit="drain")
            | ours("drain_streams", f"{streams}x20"),
            expectations,
            step="5s",
        )
        for streams, expectations in (
            (3, [quiet("60s", "VLLMDrainLate"), firing("65s", "VLLMDrainLate", severity="ticket", **POD)]),
            (0, [quiet("90s", "VLLMDrainLate")]),
        )
    ),
]  # fmt: skip

METRICS = [
    Case(
        "Prometheus has every metric",
        ours("ready", "1x60") | all_metrics("1x60", ENGINE),
        [quiet("25m", "VLLMMetricsAbsent")],
    ),
    *(
        Case(
            f"vLLM has renamed {name}",
            ours("ready", "1x60") | all_metrics("1x60", ENGINE, without=name),
            [quiet("9m30s", "VLLMMetricsAbsent"), firing("10m", "VLLMMetricsAbsent", severity="ticket", **POD)],
        )
        for name in (metrics.ALWAYS_SHOWN[0], metrics.ALWAYS_SHOWN[-1])
    ),
    Case(
        "a starting vLLM has no metrics yet",
        ours("ready", "0x60"),
        [quiet("25m", "VLLMMetricsAbsent")],
    ),
    *(
        Case(
            f"{share} of the scrapes fail, and an engine is unwatched: {unwatched}",
            ours("scrapes_total", f"0+{share}x60", result="failed")
            | ours("scrapes_total", f"0+{1 - share}x60", result="ok")
            | ours("unwatched", unwatched, ENGINE),
            expectations,
        )
        for share, unwatched, expectations in (
            (0.5, "0x60", [quiet("25m", "VLLMProberBlind")]),
            (0.52, "0x60", [quiet("15m", "VLLMProberBlind"),
                       firing("15m30s", "VLLMProberBlind", severity="ticket", **POD)]),
            (0, "1x60", [quiet("14m30s", "VLLMProberBlind"), firing("15m", "VLLMProberBlind", **POD)]),
            (0, "1x40 0x20", [firing("20m", "VLLMProberBlind", **POD), quiet("20m30s", "VLLMProberBlind")]),
        )
    ),
    *(
        Case(
            f"the KV cache has {tokens} of 1000 planned tokens",
            ours("kv_cache_tokens", f"{tokens}x60", ENGINE) | ours("kv_cache_planned_tokens", "1000x60"),
            expectations,
        )
        for tokens, expectations in (
            (900, [quiet("25m", "VLLMKVCacheBelowPlan")]),
            (895, [quiet("14m30s", "VLLMKVCacheBelowPlan"),
                   firing("15m", "VLLMKVCacheBelowPlan", severity="ticket", **ENGINE)]),
        )
    ),
]  # fmt: skip


def fault(kind, fatal, values):
    """Return the series of a GPU fault."""
    return ours("gpu_faults", values, GPU, kind=kind, fatal=fatal)


GPUS = [
    Case(
        "a fatal Xid",
        fault("xid 79", "true", "_x3 1x10"),
        [quiet("1m", "GPUXidFatal"), firing("1m30s", "GPUXidFatal", severity="page", kind="xid 79", **GPU),
         quiet("2m", "GPULost"), quiet("2m", "GPURowRemapFailure")],
    ),
    Case("a non-fatal Xid, caused by a program", fault("xid 31", "false", "1x10"), [quiet("3m", "GPUXidFatal")]),
    Case(
        "a GPU falls off the bus",
        fault("lost", "true", "1x10"),
        [firing("30s", "GPULost", severity="page", **GPU), quiet("1m", "GPUXidFatal")],
    ),
    Case(
        "a broken row has no spare row",
        fault("row remap failure", "false", "1x10"),
        [firing("30s", "GPURowRemapFailure", severity="ticket", **GPU)],
    ),
    Case("a row remap is pending", fault("row remap pending", "false", "1x10"),
         [quiet("3m", "GPURowRemapFailure")]),
    Case("no GPU faults, with series of value 0", fault("xid 79", "true", "0x10") | fault("lost", "true", "0x10")
         | fault("row remap failure", "false", "0x10"),
         [quiet("3m", "GPUXidFatal"), quiet("3m", "GPULost"), quiet("3m", "GPURowRemapFailure")]),
    Case(
        "an uncorrectable ECC error",
        ours("gpu_ecc_uncorrected_errors", "2x10 3x200", GPU),
        [quiet("5m", "GPUECCErrors"), firing("5m30s", "GPUECCErrors", severity="ticket", **GPU),
         firing("65m", "GPUECCErrors"), quiet("66m", "GPUECCErrors")],
    ),
    *(
        Case(
            f"throttled in {times} of 31 samples",
            ours("gpu_throttled", f"0x{30 - times} 1x{times - 1}", GPU, reason="HW Thermal Slowdown"),
            expectations,
        )
        for times, expectations in (
            (16, [firing("15m", "GPUThrottled", severity="ticket", reason="HW Thermal Slowdown", **GPU)]),
            (15, [quiet("15m", "GPUThrottled")]),
        )
    ),
    Case(
        "throttled half of the time",
        ours("gpu_throttled", "0x9 1x9", GPU, reason="HW Power Brake Slowdown"),
        [quiet("9m30s", "GPUThrottled")],
    ),
    Case(
        "throttled for 15 minutes, an hour ago",
        ours("gpu_throttled", "1x30 0x120", GPU, reason="HW Thermal Slowdown"),
        [firing("22m", "GPUThrottled"), quiet("23m30s", "GPUThrottled")],
    ),
    *(
        Case(
            f"nvml_up is {up} and the plan uses {gpus} GPUs",
            ours("nvml_up", f"{up}x60") | ours("planned_gpus", f"{gpus}x60"),
            expectations,
        )
        for up, gpus, expectations in (
            (0, 2, [quiet("14m30s", "GPUUnwatched"), firing("15m", "GPUUnwatched", severity="ticket", **POD)]),
            (1, 2, [quiet("25m", "GPUUnwatched")]),
            (0, 0, [quiet("25m", "GPUUnwatched")]),
        )
    ),
]  # fmt: skip

# ---- objectives
MINUTES = 2
"""Evaluation interval of the rules. It is long because the windows are hours long."""
ALERT_OF = {
    "availability": "VLLMAvailabilityBurn",
    "time_to_first_token": "VLLMTimeToFirstTokenBurn",
    "time_per_output_token": "VLLMTimePerOutputTokenBurn",
}
ERROR_BUDGETS = {"availability": 0.005, "time_to_first_token": 0.05, "time_per_output_token": 0.05}


def counter(*pieces):
    """Return a counter in promtool's form. ``pieces``: pairs of minutes and increase per MINUTES."""
    value, parts = 10_000.0, []  # It does not begin at 0, because rate() extrapolates less near 0.
    for minutes, each in pieces:
        steps = minutes // MINUTES
        first = value if not parts else value + each
        parts.append(f"{first:.10g}+{each:.10g}x{steps if not parts else steps - 1}")
        value += each * steps
    return " ".join(parts)


def requests(slo, *pieces):
    """Return the series of an objective's requests. ``pieces``: (minutes, requests per MINUTES, bad ones of them)."""
    good = counter(*((minutes, total - bad) for minutes, total, bad in pieces))
    bad = counter(*((minutes, bad) for minutes, _, bad in pieces))
    every = counter(*((minutes, total) for minutes, total, _ in pieces))
    if slo == "availability":
        route = TARGET | {"handler": "/v1/chat/completions", "method": "POST"}
        steps = sum(minutes for minutes, _, _ in pieces) // MINUTES
        return (
            series(metrics.HTTP_REQUESTS, route, good, status="2xx")
            | series(metrics.HTTP_REQUESTS, route, bad, status="5xx")
            | ours("ready", f"1x{steps}")
        )
    histogram, bound = {
        "time_to_first_token": (metrics.TIME_TO_FIRST_TOKEN, "2.5"),
        "time_per_output_token": (metrics.TIME_PER_OUTPUT_TOKEN, "0.1"),
    }[slo]
    return series(f"{histogram}_count", ENGINE, every) | series(f"{histogram}_bucket", ENGINE, good, le=bound)


def burn(slo, name, pieces, expectations, more=None):
    """Return a case of an objective."""
    return Case(f"{slo}: {name}", requests(slo, *pieces) | (more or {}), expectations, step=f"{MINUTES}m")


def expect(slo, at, window, severity):
    """Expect the alert of ``window`` to fire with ``severity``, or not to fire if ``severity`` is None."""
    labels = {"slo": slo, "window": window} | ({"severity": severity, **MODEL} if severity else {})
    return Expectation(at, ALERT_OF[slo], 1 if severity else 0, labels)


def burns(slo):
    """Yield the cases that the three burn rate alerts of an objective must distinguish."""
    budget, busy = ERROR_BUDGETS[slo], 1200.0  # share; requests per MINUTES
    for window, rate, severity, duration in (("1h", 14.4, "page", 2), ("6h", 6, "page", 15), ("3d", 1, "ticket", 180)):
        over, under = (busy * rate * budget * factor for factor in (1.02, 0.98))
        # promtool evaluates groups in any order, so a recorded series may be one step late.
        soon, late = f"{duration}m", f"{duration + 4 * MINUTES}m"
        yield burn(slo, f"burn rate just above {rate}", [(duration + 10, busy, over)],
                   [expect(slo, soon, window, None), expect(slo, late, window, severity)])  # fmt: skip
        yield burn(
            slo, f"burn rate just below {rate}", [(duration + 10, busy, under)], [expect(slo, late, window, None)]
        )
    # About 50 requests in a window, all of them bad. 50 is least_requests.
    for window, hours in (("1h", 1), ("6h", 6), ("3d", 72)):
        for count, severity in ((51, "ticket" if hours == 72 else "page"), (49, None)):
            each = count / (hours * 60) * MINUTES
            yield burn(
                slo, f"{count} bad requests in {window}", [(360, each, each)], [expect(slo, "340m", window, severity)]
            )
    # The short window resolves the alert soon. The long window prevents an alert on a short burst.
    yield burn(
        slo,
        "all requests bad for an hour, then good",
        [(60, busy, busy), (60, busy, 0)],
        [
            expect(slo, "60m", "1h", "page"),
            expect(slo, "68m", "1h", None),
            expect(slo, "80m", "6h", "page"),
            expect(slo, "96m", "6h", None),
        ],
    )
    yield burn(
        slo,
        "all requests bad for four hours, then good",
        [(240, busy, busy), (400, busy, 0)],
        [expect(slo, "580m", "3d", "ticket"), expect(slo, "608m", "3d", None)],
    )
    short = 14.4 * budget * 60  # minutes of only errors that are a burn rate of 14.4 over an hour
    yield burn(
        slo,
        "bad for ten minutes after five good hours",
        [(300, busy, 0), (10, busy, busy * min(short / 10 * 0.9, 1))],
        [expect(slo, "309m", "1h", None), expect(slo, "309m", "6h", None)],
    )
    yield burn(
        slo,
        "bad for some hours after two good days",
        [(2880, busy, 0), (150, busy, busy * budget * 19)],
        [expect(slo, "3028m", "6h", "page"), expect(slo, "3028m", "3d", None)],
    )


BURNS = [case for slo in ALERT_OF for case in burns(slo)] + [
    Case(
        "two minutes of errors",
        ours("ready", "1x20")
        | series(metrics.HTTP_REQUESTS, TARGET, "10000+90x20", status="2xx")
        | series(metrics.HTTP_REQUESTS, TARGET, "10000+10x20", status="5xx"),
        [expect("availability", "2m", "1h", None), expect("availability", "3m", "1h", "page")],
    ),
    Case(
        "the prober's own requests do not count",
        series(f"{metrics.TIME_TO_FIRST_TOKEN}_count", ENGINE, "0+2x60")
        | series(f"{metrics.TIME_TO_FIRST_TOKEN}_bucket", ENGINE, "0+1.9x60", le="2.5")
        | ours("canaries_total", "0+1.9x60", result="answered")
        | ours("canaries_total", "0+1.9x60", result="not needed"),
        # With the prober's there are 60 requests an hour, 5 % slow. Users' three an hour are all slow, but too few.
        [expect("time_to_first_token", "110m", "1h", None), expect("time_to_first_token", "110m", "6h", None)],
        step="2m",
    ),
    Case(
        "users' requests count beside the prober's",
        series(f"{metrics.TIME_TO_FIRST_TOKEN}_count", ENGINE, "0+4x60")
        | series(f"{metrics.TIME_TO_FIRST_TOKEN}_bucket", ENGINE, "0+2x60", le="2.5")
        | ours("canaries_total", "0+2x60", result="answered"),
        [expect("time_to_first_token", "110m", "1h", "page")],  # 50 % of all, and 100 % of users'
        step="2m",
    ),
]

ALL_CASES = [*SERVING, *ROLLOUT, *METRICS, *GPUS, *BURNS]
