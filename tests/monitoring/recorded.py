"""A Prometheus with the recording of two H100s and the series that the recording rules make of it."""

from __future__ import annotations

import gzip
import re
import subprocess

import yaml
from machine import ROOT
from promtool import program
from stack import Prometheus

from vllm_monitoring import rules, thresholds

(FILE,) = (ROOT / "tests/data/metrics").glob("vllm-*-h100-x2.om.gz")
INTERVAL_S = 5

# Names, types and labels of dcgm-exporter. Source: its etc/default-counters.csv, etc/dcp-metrics-included.csv, and its
# docs for the labels. The values are invented, because no machine here runs it.
DCGM = {
    "DCGM_FI_DEV_GPU_UTIL": 93.0, "DCGM_FI_DEV_FB_USED": 74_000.0, "DCGM_FI_DEV_FB_FREE": 7_000.0,
    "DCGM_FI_DEV_POWER_USAGE": 512.5, "DCGM_FI_DEV_GPU_TEMP": 61.0, "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": 0.31,
    "DCGM_FI_PROF_DRAM_ACTIVE": 0.72, "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL": 0.0, "DCGM_FI_DEV_XID_ERRORS": 0.0,
}  # fmt: skip


def times(text):
    """Return the Unix times of the first and the last sample."""
    seconds = [float(time) for time in re.findall(r" (\d+\.\d+)$", text, re.MULTILINE)]
    return min(seconds), max(seconds)


def dcgm(begin, end):
    """Yield dcgm-exporter's samples of that time as lines of OpenMetrics. Counters increase."""
    labels = 'gpu="0",UUID="GPU-0",device="nvidia0",modelName="NVIDIA H100",Hostname="node-1",namespace="recorded",pod="llama-0"'
    for at in range(int(begin), int(end), INTERVAL_S):
        for name, value in DCGM.items():
            more = at - begin if name.endswith("_TOTAL") else 0
            yield f"{name}{{{labels}}} {value + more} {at}\n"


def load(folder, *, with_dcgm):
    """Return a running Prometheus with the recording, and the recording's begin and end in Unix seconds."""
    text = gzip.decompress(FILE.read_bytes()).decode()
    begin, end = times(text)
    lines = text.removesuffix("# EOF\n") + ("".join(dcgm(begin, end)) if with_dcgm else "") + "# EOF\n"
    (folder / "recording.om").write_text(lines)
    data = folder / "data"
    promtool("tsdb", "create-blocks-from", "openmetrics", folder / "recording.om", data)
    groups = rules.groups(thresholds.read())["groups"]
    recording = [
        group | {"interval": f"{INTERVAL_S}s"} for group in groups if group["name"] in {"vllm-load", "vllm-slo"}
    ]
    (folder / "records.yaml").write_text(yaml.safe_dump({"groups": recording}))
    for _ in range(2):  # Some rules read recorded series. The second pass computes them.
        prometheus = Prometheus(folder, rules=(), data=data)
        promtool(
            "tsdb", "create-blocks-from", "rules", f"--start={int(begin)}", f"--end={int(end)}",
            f"--eval-interval={INTERVAL_S}s", f"--url={prometheus.url}", f"--output-dir={data}", folder / "records.yaml",
        )  # fmt: skip
        prometheus.close()
    return Prometheus(folder, rules=(), data=data), begin, end


def promtool(*arguments):
    """Run promtool."""
    subprocess.run([program("promtool"), *map(str, arguments)], check=True, capture_output=True, timeout=300)
