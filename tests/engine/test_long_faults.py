"""What takes minutes to show of the real engine: `make test-faults`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import after, free_port, loaded

from vllm_health.limits import Limits

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]
SATURATED_SECONDS = 15 * 60
THROTTLED_SECONDS = 10 * 60
QUICK, QUICKEST = Limits(stall_s=20.0), Limits(stall_s=10.0)


class Quota:
    """A cgroup whose processes get ``share`` of one core, of version 1 or 2; needs root."""

    def __init__(self, name):
        first = Path("/sys/fs/cgroup/cpu")
        self.folder = (first if first.is_dir() else Path("/sys/fs/cgroup")) / name
        self.v1 = first.is_dir()
        self.folder.mkdir()  # PermissionError: this test needs root and a cgroup mount that can be written

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
    """A start that gets so little of a core that it would take longer than ten minutes; it goes on beside other tests."""
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


class Probe(threading.Thread):
    """Asks /livez and /readyz ten times a second, as a kubelet would: a connection for each."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.port, self.over = port, threading.Event()
        self.seconds, self.bad, self.asked = [], [], 0

    def run(self):
        while not self.over.wait(0.1):
            for route in ("/livez", "/readyz"):
                began = time.perf_counter()
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
                try:
                    connection.request("GET", route)
                    answer = connection.getresponse()
                    text = answer.read().decode()
                except OSError as error:
                    self.bad.append((route, 0, str(error)))
                    continue
                finally:
                    connection.close()
                self.asked += 1
                if route == "/livez":
                    self.seconds.append(time.perf_counter() - began)
                if answer.status != 200:
                    self.bad.append((route, answer.status, text))

    def end(self):
        self.over.set()
        self.join()
        return self


def test_a_quarter_of_an_hour_of_saturation_fails_no_probe(start, throttled):
    """64 streams for 8 places, of which every third goes away in the middle of its answer."""
    del throttled  # it starts meanwhile
    run = start()
    run.wait_for("vllm-launch: ready")
    probe = Probe(run.health_port)
    probe.start()
    load = loaded(run, 64, leave=0.33, tokens=120)
    after(lambda: run.health("/readyz")[1].startswith("vLLM serves as much as it can"), 60)
    time.sleep(SATURATED_SECONDS)
    load.terminate()
    counts = json.loads(load.communicate(timeout=60)[0])
    probe.end()
    p50, p99 = (statistics.quantiles(probe.seconds, n=100)[place] * 1000 for place in (49, 98))
    print(f"{counts}; {probe.asked} probes; /livez p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    assert probe.bad == []
    assert counts["done"] > 100
    assert counts["left"] > 100
    assert counts["failed"] == 0
    assert p99 < 5
    assert "suspect" not in run.log.read_text()
    run.process.send_signal(signal.SIGTERM)
    assert run.end(60) == 0


def test_a_start_that_moves_survives_ten_minutes(throttled):
    run, quota = throttled
    while time.monotonic() - run.began < THROTTLED_SECONDS:
        assert run.process.poll() is None, run.log.read_text()[-3000:]
        assert run.health("/livez")[0] == 200
        assert run.health("/readyz")[0] == run.health("/startupz")[0] == 503
        time.sleep(1)
    took = time.monotonic() - run.began
    quota.limit(0)
    run.wait_for("vllm-launch: ready")
    print(f"still starting after {took:.0f} s, ready after {time.monotonic() - run.began:.0f} s")
    run.process.send_signal(signal.SIGTERM)
    assert run.end(60) == 0


# ---- a sidecar whose vLLM answers strangely


class Proxy(ThreadingHTTPServer):
    """Between a sidecar and the engine; ``twist`` says what becomes of /metrics."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, url):
        self.url, self.twist = url, "none"
        super().__init__(("127.0.0.1", 0), Relay)
        self.own = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Relay(BaseHTTPRequestHandler):
    def relay(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0)) or None
        headers = {
            name: value for name, value in self.headers.items() if name.lower() in {"authorization", "content-type"}
        }
        ask = urllib.request.Request(self.server.url + self.path, body, headers, method=self.command)
        try:
            with urllib.request.urlopen(ask, timeout=60) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        twist = self.server.twist if self.path == "/metrics" else "none"
        if twist == "slow":
            time.sleep(3)
        if twist == "garbage":
            text = os.urandom(1 << 20)
        if twist == "huge":
            text += b"# filler filler filler filler\n" * 3_000_000
        with contextlib.suppress(OSError):
            self.send_response(status)
            if twist != "half, and no length":
                self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[: len(text) // 2] if twist.startswith("half") else text)

    do_GET = do_POST = relay  # noqa: N815 - the library's names

    def log_message(self, *_):
        pass


TWISTS = ("none", "slow", "half", "half, and no length", "garbage", "huge")


def resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_strange_metrics_and_a_flood_bring_no_wrong_verdict_and_no_growth(serving, tmp_path):
    proxy, port = Proxy(serving.url), free_port()
    with (tmp_path / "log").open("wb") as log:
        sidecar = subprocess.Popen(
            [sys.executable, "-m", "vllm_health", "serve", "--target", proxy.own, "--host", "127.0.0.1", "--port", str(port),
             "--stall-seconds", str(QUICKEST.stall_s), "--api-key-file", str(serving.keys)],
            stderr=log,
        )  # fmt: skip
    try:
        serving_too = type(serving).health

        class Beside:
            health_port = port

            def health(self, route):
                return serving_too(self, route)

        beside = Beside()
        after(lambda: b"answering on port" in (tmp_path / "log").read_bytes(), 60)
        after(lambda: beside.health("/readyz")[0] == 200, 60)
        probe = Probe(port)
        probe.start()
        load = loaded(serving, 6, tokens=200)
        for twist in TWISTS:
            proxy.twist = twist
            time.sleep(QUICKEST.dead_after_s + 2)
        before = resident(sidecar.pid)
        crowd = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(2000)]
        time.sleep(5)
        for one in crowd:
            one.close()
        load.terminate()
        load.wait(60)
        for twist in TWISTS:  # and the same with an idle engine
            proxy.twist = twist
            time.sleep(QUICKEST.dead_after_s + 2)
        time.sleep(5)
        grown = resident(sidecar.pid) - before
        probe.end()
        print(
            f"{probe.asked} probes; sidecar {resident(sidecar.pid) / 2**20:.0f} MiB, grown by {grown / 2**20:.1f} MiB"
        )
        assert probe.bad == []
        assert grown < 4 << 20
        told = (tmp_path / "log").read_text()
        assert "dead" not in told
        assert "stalled" not in told
    finally:
        sidecar.send_signal(signal.SIGTERM)
        assert sidecar.wait(30) == 0
        proxy.shutdown()


# ---- the clock


def test_a_clock_that_is_set_back_and_forth_ends_nothing(start, tmp_path):
    """The wall clock as every process of the run sees it, by libfaketime; monotonic clocks are what they are."""
    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
    assert library, "this test needs libfaketime: apt-get install faketime (as root)"
    clock = tmp_path / "clock"
    clock.write_text("+0")
    faked = {
        "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_RESET": "1",
    }  # fmt: skip
    run = start(flags=["--launch-stall-seconds=20"], environ=faked)
    run.wait_for("vllm-launch: ready")
    date = shutil.which("date")
    probe = Probe(run.health_port)
    probe.start()
    for streams in (0, 4):
        load = loaded(run, streams)
        for shift in ("+3600", "-7200", "+0", "-86400000", "+0"):
            clock.write_text(shift)
            shown = subprocess.run([date, "+%s"], env=os.environ | faked, capture_output=True, text=True, check=True)
            assert abs(int(shown.stdout) - time.time() - int(shift)) < 5
            time.sleep(QUICK.idle_quiet_s + QUICK.canary_s)
        time.sleep(QUICK.dead_after_s)
        load.terminate()
        load.wait(60)
    probe.end()
    assert probe.bad == []
    assert "suspect" not in run.log.read_text()
    run.process.send_signal(signal.SIGTERM)
    assert run.end(60) == 0
