#!/usr/bin/env python3
"""What NVML says of this machine's GPUs, whether their faults can be seen, what a look costs, and whether P2P works.

``python benchmarks/gpu/facts.py --out FILE`` needs no vLLM; PyTorch only for copies between two GPUs. Exit 0 when
faults can be read of every GPU and none is told of.
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

LOOKS = 20


def main() -> int:
    given = bench.parser(__doc__, shape=None).parse_args()
    result = Result(given.out, "facts")
    with nvml.open_nvml() as opened:
        began = time.perf_counter()
        snapshot = opened.snapshot()
        seconds = time.perf_counter() - began
        result.add(fact="snapshot", ms=round(seconds * 1000, 2), **msgspec.to_builtins(snapshot))
        uuids = [device.uuid for device in snapshot.devices]
        reader, looks = gpu_faults.Reader(opened), []
        for _ in range(LOOKS):
            began = time.perf_counter()
            report = reader.read()
            looks.append(time.perf_counter() - began)
        seen = opened.xid_events(range(opened.count())) is not None
    result.add(
        fact="look at faults",
        ms_median=round(statistics.median(looks) * 1000, 2),
        ms_max=round(max(looks) * 1000, 2),
        xid_events=seen,
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
    good = seen and len(report.ecc) == len(report.slowdowns) == len(uuids) and report.down is None and not report.faults
    return int(not good or verdict.ok is False)


if __name__ == "__main__":
    bench.run(main)
