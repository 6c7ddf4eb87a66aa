"""Tests of the real vLLM that take minutes: `make test-faults`. Most tests share one saturated run, in their order."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from machine import free_port
from serving import after, asked, ended, loaded

from vllm_health.limits import Limits

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]
SATURATED_SECONDS = 60 * float(os.environ.get("SATURATED_MINUTES", "6"))  # `make soak` sets 15
THROTTLED_SECONDS = SATURATED_SECONDS * 2 / 3
QUICK = Limits(stall_s=30.0)


class Quota:
    """A cgroup (v1 or v2) that limits its processes to a share of one core. Needs root."""

    def __init__(self, name):
        v1_folder = Path("/sys/fs/cgroup/cpu")
        self.folder = (v1_folder if v1_folder.is_dir() else Path("/sys/fs/cgroup")) / name
        self.v1 = v1_folder.is_dir()
        self.folder.mkdir()  # PermissionError here means: this test needs root and a writable cgroup mount

    def limit(self, share):
        period = 100_000
        if self.v1:
            (self.folder / "cpu.cfs_quota_us").write_text(str(int(share * period)) if share else "-1")
        else:
            (self.folder / "cpu.max").write_text(f"{int(share * period) if share else 'max'} {period}")

    @property
    def prefix(self):
        tasks = self.folder / ("tasks" if self.v1 else "cgroup.procs")
        return ["sh", "-c", f'echo $$ > {tasks} && exec "$@"', "sh"]

    def remove(self):
        after(lambda: not (self.folder / "cgroup.procs").read_text(), 60)
        self.folder.rmdir()


@pytest.fixture(scope="module")
def throttled(tmp_path_factory, tiny_model, serving_class):
    """Start vLLM with so little CPU that the start would take 15 minutes. It continues while other tests run."""
    quota = Quota(f"vllm-launch-test-{os.getpid()}")
    quota.limit(0.03)
    run = serving_class(
        tmp_path_factory.mktemp("throttled"),
        tiny_model,
        prefix=quota.prefix,
        flags=["--launch-start-stall-seconds=120"],
    )
    run.began = time.monotonic()
    yield run, quota
    if run.process.poll() is None:
        quota.limit(0)
        run.process.send_signal(signal.SIGQUIT)
        run.process.wait(60)
    quota.remove()


BARE_SERVER = """
import asyncio
async def answer(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
    await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""
"""A minimal HTTP server. Its response times are the fastest that this machine allows, for comparison."""


class Probe(threading.Thread):
    """Requests ``routes`` of ``port`` every ``interval`` seconds, each on a new connection, as a kubelet does.

    ``seconds`` has the response times by route, and ``failures`` has (route, status, body or error).
    """

    def __init__(self, port, routes=("/livez", "/readyz"), interval=0.1):
        super().__init__(daemon=True)
        self.port, self.routes, self.interval, self.ended = port, routes, interval, threading.Event()
        self.seconds, self.failures = {route: [] for route in routes}, []
        self.start()

    def run(self):
        while not self.ended.wait(self.interval):
            for route in self.routes:
                start = time.perf_counter()
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
                try:
                    connection.request("GET", route)
                    answer = connection.getresponse()
                    text = answer.read().decode()
                except OSError as error:
                    self.failures.append((route, 0, str(error)))
                    continue
                finally:
                    connection.close()
                self.seconds[route].append(time.perf_counter() - start)
                if answer.status != 200:
                    self.failures.append((route, answer.status, text))

    def end(self):
        self.ended.set()
        self.join()


def percentile_ms(seconds, percent):
    return statistics.quantiles(seconds, n=100)[percent - 1] * 1000


class Saturated:
    """A run with 64 streams and max_num_seqs=8. A third of the clients disconnect in the middle of a response.

    The tests can set the wall clock that the run's processes read. Needs a C compiler.
    """

    def __init__(self, folder, model, serving_class):
        library, self.clock = folder / "wall_clock.so", folder / "shift"
        source = Path(__file__).with_name("wall_clock.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source)], check=True)
        self.clock.write_bytes(bytes(8))
        self.shifted = {"LD_PRELOAD": str(library), "CLOCK_SHIFT_FILE": str(self.clock)}
        stall = f"--launch-stall-seconds={QUICK.stall_s:.0f}"
        self.run = serving_class(folder, model, flags=[stall], environ=self.shifted)
        self.run.wait_for("vllm-launch: ready")
        self.probe = Probe(self.run.health_port)
        self.bare_server = subprocess.Popen([sys.executable, "-c", BARE_SERVER], stdout=subprocess.PIPE, text=True)
        self.bare_server_probe = Probe(int(self.bare_server.stdout.readline()), routes=["/"])
        self.load = loaded(self.run, 64, leave=0.33, tokens=120)
        after(lambda: self.run.health("/readyz")[1].startswith("vLLM serves as much as it can"), 60)
        self.began = time.monotonic()

    def set_clock(self, shift):
        # Overwrite without truncating: a process that has mapped a truncated file gets SIGBUS.
        with self.clock.open("r+b") as file:
            file.write(struct.pack("q", shift))

    def now(self):
        """Return the wall clock that a process of the run reads, in seconds since 1970."""
        date = subprocess.run(
            ["date", "+%s"], env=os.environ | self.shifted, capture_output=True, text=True, check=True
        )
        return int(date.stdout)

    def well(self):
        """Return whether no probe has failed and the health port never suspected vLLM."""
        return self.probe.failures == [] and "suspect" not in self.run.log.read_text()

    def relieve(self):
        """End the load and return the counts of its requests. Later calls do nothing and return None."""
        load, self.load = self.load, None
        return ended(load) if load else None

    def end(self):
        self.relieve()
        self.probe.end()
        self.bare_server_probe.end()
        self.bare_server.terminate()
        self.bare_server.communicate()
        if self.run.process.poll() is None:
            self.run.process.send_signal(signal.SIGQUIT)
            self.run.process.wait(60)


@pytest.fixture(scope="module")
def saturated(tmp_path_factory, tiny_model, serving_class, throttled):
    del throttled  # requested only so that its slow start runs meanwhile
    saturated_run = Saturated(tmp_path_factory.mktemp("saturated"), tiny_model, serving_class)
    yield saturated_run
    saturated_run.end()


# ---- a sidecar that gets broken responses for /metrics


class Proxy(ThreadingHTTPServer):
    """A proxy between a sidecar and vLLM. ``fault`` names what it does to the response of /metrics."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, url):
        self.url, self.fault = url, "none"
        super().__init__(("127.0.0.1", 0), Relay)
        self.own_url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Relay(BaseHTTPRequestHandler):
    """Forwards one request to vLLM and applies the proxy's fault to the response."""

    def relay(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0)) or None
        headers = {
            name: value for name, value in self.headers.items() if name.lower() in {"authorization", "content-type"}
        }
        request = urllib.request.Request(self.server.url + self.path, body, headers, method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        fault = self.server.fault if self.path == "/metrics" else "none"
        if fault == "slow":
            time.sleep(3)
        if fault == "garbage":
            text = os.urandom(1 << 20)
        if fault == "huge":
            text += b"# filler filler filler filler\n" * 3_000_000
        with contextlib.suppress(OSError):
            self.send_response(status)
            if fault != "half, and no length":
                self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[: len(text) // 2] if fault.startswith("half") else text)

    do_GET = do_POST = relay  # noqa: N815 - names of the library

    def log_message(self, *_):
        pass


class Sidecar:
    """A sidecar of the saturated vLLM. Its requests go through a proxy that can break the response of /metrics."""

    def __init__(self, folder, run):
        self.proxy, self.port, self.log = Proxy(run.url), free_port(), folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm_health", "serve", "--target", self.proxy.own_url, "--host", "127.0.0.1",
                 "--port", str(self.port), "--stall-seconds", str(QUICK.stall_s), "--api-key-file", str(run.keys)],
                stderr=log,
            )  # fmt: skip
        after(lambda: b"answering on port" in self.log.read_bytes(), 60)
        after(lambda: asked(self.port, "/readyz")[0] == 200, 60)
        self.probe = Probe(self.port, interval=0.5)

    def resident_bytes(self):
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def well(self):
        """Return whether no probe has failed and the sidecar never reported that vLLM is dead or stalled."""
        log = self.log.read_text()
        return self.probe.failures == [] and "dead" not in log and "stalled" not in log

    def end(self):
        self.probe.end()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.proxy.shutdown()
        self.proxy.server_close()
        return code


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory, saturated):
    running_sidecar = Sidecar(tmp_path_factory.mktemp("sidecar"), saturated.run)
    yield running_sidecar
    assert running_sidecar.end() == 0


SHIFTS = (3600, -7200, 0, -86_400_000, 0)
"""Differences of the run's wall clock from the real one, seconds."""


def test_no_probe_of_a_saturated_engine_fails_when_the_clock_is_set(saturated):
    for shift in SHIFTS:
        saturated.set_clock(shift)
        assert abs(saturated.now() - time.time() - shift) < 5
        time.sleep(QUICK.busy_quiet_s + QUICK.canary_s)
        assert saturated.well(), saturated.probe.failures


@pytest.mark.parametrize("fault", ["slow", "half", "half, and no length", "garbage", "huge"])
def test_broken_metrics_do_not_lead_to_a_wrong_verdict(sidecar, fault):
    sidecar.proxy.fault = fault
    time.sleep(QUICK.dead_after_s + 2)
    sidecar.proxy.fault = "none"
    assert sidecar.well(), (sidecar.probe.failures, sidecar.log.read_text())


def test_two_thousand_connections_cause_no_wrong_verdict_and_no_memory_growth(sidecar):
    before = sidecar.resident_bytes()
    connections = [socket.create_connection(("127.0.0.1", sidecar.port), timeout=30) for _ in range(2000)]
    time.sleep(5)
    for connection in connections:
        connection.close()
    time.sleep(5)
    growth = sidecar.resident_bytes() - before
    print(f"sidecar: {before / 2**20:.0f} MiB, grew by {growth / 2**20:.1f} MiB")
    assert sidecar.well(), sidecar.probe.failures
    assert growth < 8 << 20


def test_no_probe_fails_during_minutes_of_saturation(saturated):
    times = {"/livez": saturated.probe.seconds["/livez"], "bare server": saturated.bare_server_probe.seconds["/"]}
    before = {name: len(seconds) for name, seconds in times.items()}
    time.sleep(max(60.0, saturated.began + SATURATED_SECONDS - time.monotonic()))
    counts = saturated.relieve()
    p99 = {}
    for name, seconds in times.items():
        recent = seconds[before[name] :]  # measured while no other test used the CPU
        p50, p99[name] = percentile_ms(recent, 50), percentile_ms(recent, 99)
        print(f"{name}: p50 {p50:.2f} ms, p99 {p99[name]:.2f} ms of {len(recent)} responses; "
              f"p99 of the whole run {percentile_ms(seconds, 99):.2f} ms of {len(seconds)} responses")  # fmt: skip
    print(counts)
    assert saturated.well(), saturated.probe.failures
    assert counts["done"] > 100
    assert counts["left"] > 100
    assert counts["failed"] == 0, counts["why"]
    # 5 ms is the limit, unless this machine is so slow that the bare server does not reach it either.
    assert p99["/livez"] < max(5.0, 1.5 * p99["bare server"])


def test_clock_changes_and_broken_metrics_of_an_idle_engine_cause_no_wrong_verdict(saturated, sidecar):
    saturated.relieve()
    for shift in SHIFTS:
        saturated.set_clock(shift)
        sidecar.proxy.fault = "garbage" if shift else "slow"
        time.sleep(QUICK.idle_quiet_s + QUICK.canary_s)
    time.sleep(QUICK.dead_after_s)
    assert saturated.well(), saturated.probe.failures
    assert sidecar.well(), sidecar.probe.failures
    saturated.run.process.send_signal(signal.SIGTERM)
    assert saturated.run.end(60) == 0


def test_a_slow_start_with_progress_is_not_ended(throttled):
    run, quota = throttled
    while time.monotonic() - run.began < THROTTLED_SECONDS:
        assert run.process.poll() is None, run.log.read_text()[-3000:]
        assert run.health("/livez")[0] == 200
        assert run.health("/readyz")[0] == run.health("/startupz")[0] == 503
        time.sleep(1)
    start_seconds = time.monotonic() - run.began
    quota.limit(0)
    run.wait_for("vllm-launch: ready")
    print(f"still starting after {start_seconds:.0f} s, ready after {time.monotonic() - run.began:.0f} s")
    run.process.send_signal(signal.SIGTERM)
    assert run.end(60) == 0
