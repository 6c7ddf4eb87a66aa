#!/usr/bin/env python3
"""Whether GPU faults can be read on this machine's real GPUs, and what a look costs. Needs no vLLM and no torch."""

from __future__ import annotations

import json
import statistics
import sys
import time

from vllm_health import gpu_faults, metrics, nvml

LOOKS = 20


def main() -> int:
    with nvml.open_nvml() as opened:
        reader = gpu_faults.Reader(opened)
        seconds = []
        for _ in range(LOOKS):
            began = time.perf_counter()
            report = reader.read()
            seconds.append(time.perf_counter() - began)
        told = {
            "driver": opened.driver_version(),
            "gpus": opened.count(),
            "xid_events": opened.xid_events(range(opened.count())) is not None,
        }
    told |= {
        "look_ms_median": round(statistics.median(seconds) * 1000, 2),
        "look_ms_max": round(max(seconds) * 1000, 2),
    }
    print(json.dumps(told))
    exposition = metrics.Exposition()
    exposition.values = report.values()
    print("\n".join(line for line in exposition.text().decode().splitlines() if line.startswith("vllm_health_")))
    good = told["xid_events"] and len(report.ecc) == len(report.slowdowns) == told["gpus"] and report.down is None
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
