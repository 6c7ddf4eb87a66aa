#!/usr/bin/env python3
"""Record what NVML reports about this machine's GPUs, the time of one read of all faults, and whether P2P works.

``python benchmarks/gpu/facts.py --out FILE`` needs no vLLM, and PyTorch only for copies between two GPUs. Exit code 0
if Xid events and the faults of every GPU can be read, no GPU has a fault, and P2P did not fail.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench
import msgspec
from result import Result

from vllm_health import gpu_faults, metrics, nvml
from vllm_launch.machine import p2p

READS = 20
"""Timed reads of the GPU faults."""


def main() -> int:
    options = bench.parser(__doc__, shape=None).parse_args()
    result = Result(options.out, "facts")
    with nvml.open_nvml() as opened:
        began = time.perf_counter()
        snapshot = opened.snapshot()
        seconds = time.perf_counter() - began
        result.add(fact="snapshot", ms=round(seconds * 1000, 2), **msgspec.to_builtins(snapshot))
        uuids = {device.index: device.uuid for device in snapshot.devices}
        reader, durations = gpu_faults.Reader(opened), []
        for _ in range(READS):
            began = time.perf_counter()
            report = reader.read()
            durations.append(time.perf_counter() - began)
        has_xid_events = opened.xid_events(range(opened.count())) is not None
    result.add(
        fact="look at faults",
        ms_median=round(statistics.median(durations) * 1000, 2),
        ms_max=round(max(durations) * 1000, 2),
        xid_events=has_xid_events,
        down=report.down,
        ecc=len(report.ecc),
        slowdowns=len(report.slowdowns),
    )
    exposition = metrics.Exposition()
    exposition.values = report.values()
    lines = [line for line in exposition.text().decode().splitlines() if line.startswith("vllm_health_gpu")]
    result.add(fact="metrics", lines=lines)
    with tempfile.TemporaryDirectory() as folder:
        verdict = p2p.check(
            uuids, python=sys.executable, cache_dir=Path(folder), boot_id="now", driver=snapshot.driver, timeout_s=120
        )
    result.add(fact="p2p", **msgspec.to_builtins(verdict))
    readable = has_xid_events and len(report.ecc) == len(report.slowdowns) == len(uuids)
    good = readable and report.down is None and not report.faults
    return int(not good or verdict.ok is False)


if __name__ == "__main__":
    bench.run(main)
