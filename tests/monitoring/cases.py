"""When each alert fires, and when it only nearly does: right at its threshold, and just before its time."""

from __future__ import annotations

from promtool import ENGINE, GPU, MODEL, POD, TARGET, Case, Look, firing, quiet, series

from vllm_health import metrics

OURS = metrics.PREFIX
OTHER = POD | {"pod": "llama-7d9f-xyz"}


def state(name, values, labels=POD):
    return series(f"{OURS}state", labels, values, state=name)


def ours(name, values, labels=POD, **more):
    return series(OURS + name, labels, values, **more)


def all_shown(values, labels, without=""):
    """A sample of each name that dashboards and alerts need."""
    found = {}
    for name in metrics.ALWAYS_SHOWN:
        if name != without:
            found |= series(name, labels, values)
    return found


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
        "an engine is suspected, or its run ends",
        state("suspect", "1x30") | state("dead", "0x10 1x2"),
        [quiet("6m", "VLLMEngineStalled")],
    ),
    Case(
        "nobody is ready any more",
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
        "the only replica vanishes without a drain",
        ours("ready", "1x20 _x60") | ours("draining", "0x20 _x60"),
        [quiet("15m", "VLLMNoReplicaReady"), firing("25m", "VLLMNoReplicaReady")],
    ),
    Case(
        "one of two replicas is left",
        ours("ready", "1x20 0x60") | ours("ready", "1x80", OTHER),
        [quiet("30m", "VLLMNoReplicaReady"), firing("30m", "VLLMReplicaNotReady", **POD)],
    ),
    Case(
        "scaled to nothing: it drains and is gone",
        ours("ready", "1x20 0x2 _x80") | ours("draining", "0x20 1x2 _x80") | state("draining", "0x20 1x2 _x80"),
        [quiet("40m", "VLLMNoReplicaReady"), quiet("40m", "VLLMReplicaNotReady")],
    ),
    Case(
        "a rollout drains one replica, and later its successor is lost with its node",
        ours("ready", "1x20 0x2 _x80") | ours("draining", "0x20 1x2 _x80")
        | ours("ready", "_x20 1x10 _x80", OTHER) | ours("draining", "_x20 0x10 _x80", OTHER),
        [firing("40m", "VLLMNoReplicaReady")],
    ),
    Case(
        "it drains, and its successor does not become ready",
        ours("ready", "1x20 0x2 _x80") | ours("draining", "0x20 1x2 _x80") | ours("ready", "_x25 0x80", OTHER),
        [firing("40m", "VLLMNoReplicaReady")],
    ),
    Case(
        "put to sleep by its operator",
        ours("ready", "1x20 0x80") | state("asleep", "0x20 1x80"),
        [quiet("40m", "VLLMNoReplicaReady"), quiet("40m", "VLLMReplicaNotReady")],
    ),
    Case(
        "a replica drains for an hour",
        ours("ready", "1x20 0x120") | state("draining", "0x20 1x120"),
        [quiet("60m", "VLLMReplicaNotReady")],
    ),
    Case(
        "requests wait and none is let in",
        series(metrics.REQUESTS_WAITING, ENGINE, "0x10 3x20")
        | series(metrics.REQUESTS_RUNNING, ENGINE, "5x10 0x20")
        | series(f"{metrics.ITERATION_TOKENS}_count", ENGINE, "0+10x10 100x20"),
        [quiet("7m30s", "VLLMAdmissionStalled"), firing("8m", "VLLMAdmissionStalled", severity="page", **ENGINE)],
    ),
    *(
        Case(
            f"requests wait, but {why}",
            series(metrics.REQUESTS_WAITING, ENGINE, waiting)
            | series(metrics.REQUESTS_RUNNING, ENGINE, running)
            | series(f"{metrics.ITERATION_TOKENS}_count", ENGINE, steps)
            | more,
            [quiet("9m", "VLLMAdmissionStalled")],
        )
        for why, waiting, running, steps, more in (
            ("one runs", "3x30", "1x30", "100x30", {}),
            ("steps are made", "3x30", "0x30", "0+10x30", {}),
            ("it is paused", "3x30", "0x30", "100x30", state("asleep", "1x30")),
            ("not a single one", "0x30", "0x30", "100x30", {}),
        )
    ),
    *(
        Case(
            f"requests wait {seconds} s in the mean",
            series(f"{metrics.QUEUE_TIME}_sum", ENGINE, f"0+{30 * seconds}x60")
            | series(f"{metrics.QUEUE_TIME}_count", ENGINE, "0+30x60"),
            looks,
        )
        for seconds, looks in (
            (29.9, [quiet("25m", "VLLMQueueTimeHigh")]),
            (30.5, [quiet("15m", "VLLMQueueTimeHigh"),
                    firing("15m30s", "VLLMQueueTimeHigh", severity="ticket", **MODEL)]),
        )
    ),
    *(
        Case(
            f"the KV cache is at {usage}, {preempted} preempted",
            series(metrics.KV_CACHE_USAGE, ENGINE, f"{usage}x60") | series(metrics.PREEMPTIONS, ENGINE, preempted),
            looks,
        )
        for usage, preempted, looks in (
            (0.9, "0+1x60", [quiet("20m", "VLLMKVPressure")]),
            (0.95, "7x60", [quiet("20m", "VLLMKVPressure")]),
            (0.91, "0+1x60", [quiet("10m", "VLLMKVPressure"),
                              firing("10m30s", "VLLMKVPressure", severity="ticket", **ENGINE)]),
        )
    ),
    *(
        Case(
            f"{each} requests are turned away in half a minute",
            series(metrics.ADMISSION_REJECTIONS, ENGINE, f"0+{each}x60", reason="max_num_queued_reqs"),
            looks,
        )
        for each, looks in (
            (0.5, [quiet("20m", "VLLMAdmissionRejections")]),
            (0.52, [quiet("9m30s", "VLLMAdmissionRejections"),
                    firing("10m", "VLLMAdmissionRejections", severity="ticket", **MODEL)]),
        )
    ),
    *(
        Case(
            f"the autoscaler wants {wanted} of 4 and {waiting} requests wait{where}",
            series(metrics.KUBE_HPA_DESIRED, HPA, f"{wanted}x60")
            | series(metrics.KUBE_HPA_MAX, HPA, "4x60")
            | series(metrics.KUBE_HPA_INFO, HPA, "1x60", scaletargetref_name=target)
            | series(metrics.REQUESTS_WAITING, ENGINE, f"{waiting}x60"),
            looks,
        )
        for HPA in ({"namespace": "chat", "horizontalpodautoscaler": "keda-hpa-llama"},)
        for wanted, waiting, target, where, looks in (
            (4, 2, "llama", "", [quiet("14m30s", "VLLMAtMaxReplicas"),
                                 firing("15m", "VLLMAtMaxReplicas", severity="ticket", scaletargetref_name="llama")]),
            (3, 2, "llama", "", [quiet("20m", "VLLMAtMaxReplicas")]),
            (4, 0, "llama", "", [quiet("20m", "VLLMAtMaxReplicas")]),
            (4, 2, "web", " for another program", [quiet("20m", "VLLMAtMaxReplicas")]),
        )
    ),
]  # fmt: skip

ROLLOUT = [
    *(
        Case(
            f"{times} starts anew in an hour",
            ours("process_start_time_seconds", values, TARGET) | ours("live", "1x200"),
            looks,
        )
        for times, values, looks in (
            (2, "1x10 2x10 3x180", [quiet("20m", "VLLMRestartLoop")]),
            (3, "1x10 2x10 3x10 4x170", [quiet("16m", "VLLMRestartLoop"),
                                         firing("16m30s", "VLLMRestartLoop", severity="page", **POD),
                                         firing("65m", "VLLMRestartLoop"), quiet("65m30s", "VLLMRestartLoop")]),
        )
    ),
    *(
        Case(
            f"kubelet counts {times} restarts of {container}",
            series(metrics.KUBE_RESTARTS, TARGET, values, container=container),
            looks,
        )
        for times, container, values, looks in (
            (3, "vllm", "0x60 3x60", [quiet("30m", "VLLMRestartLoop"),
                                      firing("30m30s", "VLLMRestartLoop", severity="page", **TARGET)]),
            (2, "vllm", "0x60 2x60", [quiet("40m", "VLLMRestartLoop")]),
            (9, "proxy", "0x60 9x60", [quiet("40m", "VLLMRestartLoop")]),
        )
    ),
    Case(
        "a start takes more than half an hour",
        ours("start_seconds", "0+30x70") | state("starting", "1x70"),
        [quiet("30m", "VLLMStartupSlow"), firing("30m30s", "VLLMStartupSlow", severity="ticket", **POD)],
    ),
    Case(
        "a start took so long, but is over",
        ours("start_seconds", "0+30x62 1860x20") | state("starting", "1x62 0x20"),
        [quiet("32m", "VLLMStartupSlow")],
    ),
    Case(
        "a start does not move",
        ours("last_progress_seconds", "0+30x20", ENGINE | {"engine": ""})
        | ours("limit_seconds", "600x20", limit="start_stall")
        | ours("limit_seconds", "300x20", limit="stall")
        | state("starting", "1x20"),
        [quiet("8m", "VLLMStartupStuck"), firing("8m30s", "VLLMStartupStuck", severity="ticket", **POD)],
    ),
    Case(
        "an engine that serves does not move",
        ours("last_progress_seconds", "0+30x20", ENGINE)
        | ours("limit_seconds", "600x20", limit="start_stall")
        | state("starting", "0x20"),
        [quiet("9m30s", "VLLMStartupStuck")],
    ),
    *(
        Case(
            f"a drain with {streams} streams",
            ours("state_seconds", "0+5x20")
            | ours("limit_seconds", "75x20", limit="drain")
            | ours("drain_streams", f"{streams}x20"),
            looks,
            step="5s",
        )
        for streams, looks in (
            (3, [quiet("60s", "VLLMDrainLate"), firing("65s", "VLLMDrainLate", severity="ticket", **POD)]),
            (0, [quiet("90s", "VLLMDrainLate")]),
        )
    ),
]  # fmt: skip

SEEN = [
    Case(
        "every name is shown",
        ours("ready", "1x60") | all_shown("1x60", ENGINE),
        [quiet("25m", "VLLMMetricsAbsent")],
    ),
    *(
        Case(
            f"the engine has renamed {name}",
            ours("ready", "1x60") | all_shown("1x60", ENGINE, without=name),
            [quiet("9m30s", "VLLMMetricsAbsent"), firing("10m", "VLLMMetricsAbsent", severity="ticket", **POD)],
        )
        for name in (metrics.ALWAYS_SHOWN[0], metrics.ALWAYS_SHOWN[-1])
    ),
    Case(
        "a start shows nothing of vLLM yet",
        ours("ready", "0x60"),
        [quiet("25m", "VLLMMetricsAbsent")],
    ),
    *(
        Case(
            f"of its looks {share} fail and {refused} requests are refused",
            ours("scrapes_total", f"0+{share}x60", result="failed")
            | ours("scrapes_total", f"0+{1 - share}x60", result="ok")
            | ours("canaries_total", f"{refused}x60", result="refused"),
            looks,
        )
        for share, refused, looks in (
            (0.5, 0, [quiet("25m", "VLLMProberBlind")]),
            (0.52, 0, [quiet("15m", "VLLMProberBlind"),
                       firing("15m30s", "VLLMProberBlind", severity="ticket", **POD)]),
            (0, 1, [quiet("14m30s", "VLLMProberBlind"), firing("15m", "VLLMProberBlind", **POD)]),
        )
    ),
    *(
        Case(
            f"{tokens} tokens of 1000 that were planned",
            ours("kv_cache_tokens", f"{tokens}x60", ENGINE) | ours("kv_cache_planned_tokens", "1000x60"),
            looks,
        )
        for tokens, looks in (
            (900, [quiet("25m", "VLLMKVCacheBelowPlan")]),
            (895, [quiet("14m30s", "VLLMKVCacheBelowPlan"),
                   firing("15m", "VLLMKVCacheBelowPlan", severity="ticket", **ENGINE)]),
        )
    ),
]  # fmt: skip


def fault(kind, fatal, values):
    return ours("gpu_faults", values, GPU, kind=kind, fatal=fatal)


GPUS = [
    Case(
        "a fatal Xid",
        fault("xid 79", "true", "_x3 1x10"),
        [quiet("1m", "GPUXidFatal"), firing("1m30s", "GPUXidFatal", severity="page", kind="xid 79", **GPU),
         quiet("2m", "GPULost"), quiet("2m", "GPURowRemapFailure")],
    ),
    Case("an Xid of a program's own making", fault("xid 31", "false", "1x10"), [quiet("3m", "GPUXidFatal")]),
    Case(
        "a GPU falls off the bus",
        fault("lost", "true", "1x10"),
        [firing("30s", "GPULost", severity="page", **GPU), quiet("1m", "GPUXidFatal")],
    ),
    Case(
        "a row has no spare one",
        fault("row remap failure", "false", "1x10"),
        [firing("30s", "GPURowRemapFailure", severity="ticket", **GPU)],
    ),
    Case("a row waits for its spare one", fault("row remap pending", "false", "1x10"),
         [quiet("3m", "GPURowRemapFailure")]),
    Case("no fault at all, as zeros", fault("xid 79", "true", "0x10") | fault("lost", "true", "0x10")
         | fault("row remap failure", "false", "0x10"),
         [quiet("3m", "GPUXidFatal"), quiet("3m", "GPULost"), quiet("3m", "GPURowRemapFailure")]),
    Case(
        "an uncorrectable memory error",
        ours("gpu_ecc_uncorrected_errors", "2x10 3x200", GPU),
        [quiet("5m", "GPUECCErrors"), firing("5m30s", "GPUECCErrors", severity="ticket", **GPU),
         firing("65m", "GPUECCErrors"), quiet("66m", "GPUECCErrors")],
    ),
    *(
        Case(
            f"slowed down {times} looks of 31",
            ours("gpu_throttled", f"0x{30 - times} 1x{times - 1}", GPU, reason="heat (hardware)"),
            looks,
        )
        for times, looks in (
            (16, [firing("15m", "GPUThrottled", severity="ticket", reason="heat (hardware)", **GPU)]),
            (15, [quiet("15m", "GPUThrottled")]),
        )
    ),
    Case(
        "slowed down half of the time",
        ours("gpu_throttled", "0x9 1x9", GPU, reason="power brake"),
        [quiet("9m30s", "GPUThrottled")],
    ),
    Case(
        "slowed down for a quarter of an hour, an hour ago",
        ours("gpu_throttled", "1x30 0x120", GPU, reason="heat (hardware)"),
        [firing("22m", "GPUThrottled"), quiet("23m30s", "GPUThrottled")],
    ),
    *(
        Case(
            f"NVML says {up} and the plan uses {gpus} GPUs",
            ours("nvml_up", f"{up}x60") | ours("planned_gpus", f"{gpus}x60"),
            looks,
        )
        for up, gpus, looks in (
            (0, 2, [quiet("14m30s", "GPUUnwatched"), firing("15m", "GPUUnwatched", severity="ticket", **POD)]),
            (1, 2, [quiet("25m", "GPUUnwatched")]),
            (0, 0, [quiet("25m", "GPUUnwatched")]),
        )
    ),
]  # fmt: skip

# ---- objectives: windows of hours, so rules are evaluated every two minutes
MINUTES = 2
ALERT_OF = {
    "availability": "VLLMAvailabilityBurn",
    "time_to_first_token": "VLLMTimeToFirstTokenBurn",
    "time_per_output_token": "VLLMTimePerOutputTokenBurn",
}
ALLOWED = {"availability": 0.005, "time_to_first_token": 0.05, "time_per_output_token": 0.05}


def counter(*pieces):
    """A counter from pairs of minutes and increase per two minutes, as promtool writes it."""
    value, said = 10_000.0, []  # not 0, from which on a rate is not extrapolated
    for minutes, each in pieces:
        steps = minutes // MINUTES
        first = value if not said else value + each
        said.append(f"{first:.10g}+{each:.10g}x{steps if not said else steps - 1}")
        value += each * steps
    return " ".join(said)


def requests(slo, *pieces):
    """Requests of an objective: pieces of (minutes, per two minutes, of them bad)."""
    good = counter(*((minutes, every - bad) for minutes, every, bad in pieces))
    bad = counter(*((minutes, bad) for minutes, _, bad in pieces))
    every = counter(*((minutes, every) for minutes, every, _ in pieces))
    if slo == "availability":
        route = TARGET | {"handler": "/v1/chat/completions", "method": "POST"}
        total = sum(minutes for minutes, _, _ in pieces) // MINUTES
        return (
            series(metrics.HTTP_REQUESTS, route, good, status="2xx")
            | series(metrics.HTTP_REQUESTS, route, bad, status="5xx")
            | ours("ready", f"1x{total}")
        )
    histogram, bound = {
        "time_to_first_token": (metrics.TIME_TO_FIRST_TOKEN, "2.5"),
        "time_per_output_token": (metrics.TIME_PER_OUTPUT_TOKEN, "0.1"),
    }[slo]
    return series(f"{histogram}_count", ENGINE, every) | series(f"{histogram}_bucket", ENGINE, good, le=bound)


def burn(slo, name, pieces, looks, more=None):
    return Case(f"{slo}: {name}", requests(slo, *pieces) | (more or {}), looks, step=f"{MINUTES}m")


def of(slo, at, window, severity):
    """That window's alert is firing at ``at`` and, as ``severity`` None, that it is not."""
    labels = {"slo": slo, "window": window} | ({"severity": severity, **MODEL} if severity else {})
    return Look(at, ALERT_OF[slo], 1 if severity else 0, labels)


def burns(slo):
    """All that an objective's three pairs of windows must tell apart."""
    allowed, busy = ALLOWED[slo], 1200.0
    for window, rate, severity, held in (("1h", 14.4, "page", 2), ("6h", 6, "page", 15), ("3d", 1, "ticket", 180)):
        over, under = (busy * rate * allowed * factor for factor in (1.02, 0.98))
        # promtool evaluates groups in any order, so what others record may come a step late.
        soon, late = f"{held}m", f"{held + 4 * MINUTES}m"
        yield burn(slo, f"{rate} times too fast", [(held + 10, busy, over)],
                   [of(slo, soon, window, None), of(slo, late, window, severity)])  # fmt: skip
        yield burn(slo, f"not quite {rate} times too fast", [(held + 10, busy, under)], [of(slo, late, window, None)])
    # Fewer than 50 requests in a window, all of them bad
    for window, hours in (("1h", 1), ("6h", 6), ("3d", 72)):
        for count, severity in ((51, "ticket" if hours == 72 else "page"), (49, None)):
            each = count / (hours * 60) * MINUTES
            yield burn(slo, f"{count} requests in {window}", [(360, each, each)], [of(slo, "340m", window, severity)])
    # The short window ends it soon; the long one does not begin for a short one's sake.
    yield burn(
        slo,
        "all bad for an hour, then good",
        [(60, busy, busy), (60, busy, 0)],
        [
            of(slo, "60m", "1h", "page"),
            of(slo, "68m", "1h", None),
            of(slo, "80m", "6h", "page"),
            of(slo, "96m", "6h", None),
        ],
    )
    yield burn(
        slo,
        "all bad for four hours, then good",
        [(240, busy, busy), (400, busy, 0)],
        [of(slo, "580m", "3d", "ticket"), of(slo, "608m", "3d", None)],
    )
    short = 14.4 * allowed * 60  # minutes of nothing but errors that burn so fast in an hour
    yield burn(
        slo,
        "bad for a moment after five good hours",
        [(300, busy, 0), (10, busy, busy * min(short / 10 * 0.9, 1))],
        [of(slo, "309m", "1h", None), of(slo, "309m", "6h", None)],
    )
    yield burn(
        slo,
        "bad for some hours after two good days",
        [(2880, busy, 0), (150, busy, busy * allowed * 19)],
        [of(slo, "3028m", "6h", "page"), of(slo, "3028m", "3d", None)],
    )


BURNS = [case for slo in ALERT_OF for case in burns(slo)] + [
    Case(
        "two minutes of errors",
        ours("ready", "1x20")
        | series(metrics.HTTP_REQUESTS, TARGET, "10000+90x20", status="2xx")
        | series(metrics.HTTP_REQUESTS, TARGET, "10000+10x20", status="5xx"),
        [of("availability", "2m", "1h", None), of("availability", "3m", "1h", "page")],
    ),
    Case(
        "the prober's own requests count for nothing",
        series(f"{metrics.TIME_TO_FIRST_TOKEN}_count", ENGINE, "0+2x60")
        | series(f"{metrics.TIME_TO_FIRST_TOKEN}_bucket", ENGINE, "0+1.9x60", le="2.5")
        | ours("canaries_total", "0+1.9x60", result="answered")
        | ours("canaries_total", "0+1.9x60", result="not needed"),
        # Else 60 requests an hour, 5 % of them slow; of users' three an hour each was slow, but those are too few.
        [of("time_to_first_token", "110m", "1h", None), of("time_to_first_token", "110m", "6h", None)],
        step="2m",
    ),
    Case(
        "users' requests are counted beside the prober's",
        series(f"{metrics.TIME_TO_FIRST_TOKEN}_count", ENGINE, "0+4x60")
        | series(f"{metrics.TIME_TO_FIRST_TOKEN}_bucket", ENGINE, "0+2x60", le="2.5")
        | ours("canaries_total", "0+2x60", result="answered"),
        [of("time_to_first_token", "110m", "1h", "page")],  # 50 % of all, and 100 % of users'
        step="2m",
    ),
]

EVERY = [*SERVING, *ROLLOUT, *SEEN, *GPUS, *BURNS]
