#!/usr/bin/env python3
"""Measure the cost of the health port beside a saturated engine: memory and CPU of a sidecar, latency of /livez.

Starts the tiny model on the CPU engine, a sidecar beside it, and 64 streams. Takes about three minutes. All processes
run in one session, as in one container: Linux makes each session a scheduling group, and the engine's group would
starve the others for seconds.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 60
"""Duration of each of the two measurements."""
RSS_MIB, CPU_SHARE, P99_MS = 60, 0.01, 5.0
"""Limits: resident memory of the sidecar, its share of a core, and the latency of /livez."""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="cost-") as folder:
        model = f"{folder}/model"
        subprocess.run(
            [sys.executable, str(ROOT / "scripts/generators/tiny_model.py"), model], check=True, capture_output=True
        )
        api, health, sidecar_port = (_free_port() for _ in range(3))
        url = f"http://127.0.0.1:{api}"
        serve = [
            *(sys.executable, "-m", "vllm_launch", "serve", model, "--served-model-name=tiny", "--enforce-eager"),
            *("--max-model-len=512", "--max-num-seqs=8", f"--port={api}", f"--launch-health-port={health}"),
        ]
        load = [sys.executable, str(ROOT / "tests/common/load.py"), url, "none", "64", "0.3", "120"]
        running = [_start(serve)]
        try:
            sidecar = _start([sys.executable, "-m", "vllm_health", "serve", "--target", url, f"--port={sidecar_port}"])
            running.append(sidecar)
            subprocess.run(
                [sys.executable, "-m", "vllm_health", "wait", f"http://127.0.0.1:{sidecar_port}"], check=True
            )
            running.append(streams := _start(load))
            time.sleep(5)
            before, began = _cpu_seconds(sidecar.pid), time.monotonic()
            time.sleep(SECONDS)
            share = (_cpu_seconds(sidecar.pid) - before) / (time.monotonic() - began)
            latencies: dict[str, list[float]] = {"launcher": [], "sidecar": []}
            until = time.monotonic() + SECONDS
            while time.monotonic() < until:
                for name, port in (("launcher", health), ("sidecar", sidecar_port)):
                    latencies[name].append(_livez(port))
                time.sleep(0.05)
            resident = _resident(sidecar.pid)
            if streams.poll() is not None:
                raise SystemExit(
                    f"the load ended early with exit code {streams.returncode}: the engine was not saturated"
                )
        finally:
            for process in reversed(running):
                process.send_signal(signal.SIGTERM if process is not running[0] else signal.SIGQUIT)
                process.wait(60)
    print(
        f"sidecar: {resident / 2**20:.0f} MiB resident (limit {RSS_MIB}), "
        f"{share:.2%} of a core when it probes every 5 s (limit {CPU_SHARE:.0%})"
    )
    good = resident < RSS_MIB << 20 and share < CPU_SHARE
    for name, seconds in latencies.items():
        p50, p99 = (statistics.quantiles(seconds, n=100)[place] * 1000 for place in (49, 98))
        print(
            f"/livez of the {name} under saturation: p50 {p50:.2f} ms, p99 {p99:.2f} ms (limit {P99_MS:.0f}), "
            f"{len(seconds)} probes"
        )
        good = good and p99 < P99_MS
    return int(not good)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    # An installed package has bytecode. The first run writes it if it is missing.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environ["HF_HUB_OFFLINE"] = "1"
    return subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _livez(port: int) -> float:
    """Return the seconds until /livez answers."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/livez")
    status = connection.getresponse().status
    connection.close()
    if status != http.HTTPStatus.OK:
        raise SystemExit(f"/livez answered {status}")
    return time.perf_counter() - began


def _cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of all threads. /proc/pid/stat counts in 10 ms, which is too coarse here."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def _resident(pid: int) -> int:
    """Return the resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
