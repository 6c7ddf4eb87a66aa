"""Runs ``vllm-launch serve`` with the real vLLM on the CPU, sends requests to it, and puts load on it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from machine import free_port

HERE = Path(__file__).parent
START_SECONDS = 600
"""Limit, not expectation: a start takes 45 to 130 s of a core, and other suites may run beside it."""
KEY = "first-key"


class Serving:
    """One run of ``vllm-launch serve``, with its log and its other files in ``folder``."""

    key = KEY

    def __init__(
        self, folder, model, *, prefix=(), flags=(), name="tiny", max_num_seqs=8, drain_seconds=18, port=None,
        health_port=None, environ=(), state=None,
    ):  # fmt: skip
        self.port, self.health_port = port or free_port(), health_port or free_port()
        self.url, self.groups = f"http://127.0.0.1:{self.port}", set()
        self.termination_log, self.keys = folder / "termination-log", folder / "keys"
        self.termination_log.touch()
        self.keys.write_text(f"{KEY}\nsecond-key\n")
        self.drain_seconds = drain_seconds
        # The paths of pytest's folders are too long for sockets.
        self.state = state or Path(tempfile.mkdtemp(prefix="state-"))
        command = [
            sys.executable, "-m", "vllm_launch", "serve", str(model), "--served-model-name", name, "--enforce-eager",
            "--max-model-len=512", f"--max-num-seqs={max_num_seqs}", "--host=127.0.0.1", f"--port={self.port}",
            "--launch-health-host=127.0.0.1", f"--launch-health-port={self.health_port}",
            f"--launch-drain-seconds={drain_seconds}", f"--launch-api-key-file={self.keys}",
            f"--launch-state-dir={self.state}", f"--launch-termination-log={self.termination_log}", *flags,
        ]  # fmt: skip
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, *command],
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | dict(environ),
                stdout=log,
                stderr=log,
                # Like a job of a shell: in our session, so that the kernel schedules it together with its clients.
                process_group=0,
            )

    def wait_for(self, words):
        deadline = time.monotonic() + START_SECONDS
        while words not in self.log.read_text(errors="replace"):
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, f"no {words!r}"
            self.processes()
            time.sleep(0.2)

    def wait_for_title(self, title):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for pid, process_title in self.processes().items():
                if process_title.startswith(title):
                    return pid
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            time.sleep(0.1)
        raise AssertionError(f"no process {title}")

    def processes(self):
        """Return the titles, by pid, of all processes in the process groups that this run ever had, without zombies.

        The groups identify the processes. Their environment cannot, because setproctitle overwrites it.
        """
        stats = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                    title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                except OSError:
                    continue
                if fields[0] != "Z":
                    stats[int(folder.name)] = int(fields[1]), int(fields[2]), title
        descendants = {self.process.pid}
        while children := {pid for pid, (parent, _, _) in stats.items() if parent in descendants} - descendants:
            descendants |= children
        self.groups |= {stats[pid][1] for pid in descendants if pid in stats}
        return {pid: title for pid, (_, group, title) in stats.items() if group in self.groups}

    def end(self, timeout):
        """Wait for the end of the run and return its exit code. Check that no process is left."""
        code = self.process.wait(timeout)
        assert self.processes() == {}
        if self.state.exists():
            self.state.rmdir()  # fails if the run left a file in it
        return code

    def ask(self, path, body=None, key=KEY, timeout=60):
        """Send a request, a POST if it has a body. Return the response's status, headers and body."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, data, headers), timeout=timeout
            ) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def health(self, route):
        return asked(self.health_port, route)


@contextlib.contextmanager
def begun(folder, model, **options):
    """Start a server and yield it while it is starting. At the end, SIGQUIT ends it if it still runs."""
    run = Serving(folder, model, **options)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGQUIT)
            run.process.wait(60)


def asked(port, route):
    """Return the status and the body of the health port's response."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{route}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def loaded(run, streams, *, leave=0.0, tokens=400):
    """Start a process that keeps ``streams`` streams running against ``run``. ``ended`` ends it."""
    words = [run.url, run.key, str(streams), str(leave), str(tokens)]
    return subprocess.Popen([sys.executable, str(HERE / "load.py"), *words], stdout=subprocess.PIPE, text=True)


def ended(load):
    """End the process that ``loaded`` started. Return the counts of its requests."""
    load.terminate()
    return json.loads(load.communicate(timeout=60)[0])


def after(condition, limit):
    """Wait until ``condition()`` is true and return the seconds. Fail after ``limit`` seconds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit, f"not within {limit} s"
        time.sleep(0.1)
    return time.monotonic() - start
