"""Runs containers of the CPU image on a real Docker. ``make test-image`` builds the image first."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request

from machine import free_port

IMAGE = "vllm-launch:test-cpu"
CUDA_IMAGE = "vllm-launch:test-cuda"
LOCKED_DOWN = ("--read-only", "--user=12345:0", "--cap-drop=ALL", "--security-opt=no-new-privileges")
START_SECONDS = 300


def docker(*words, check=True, timeout=300):
    """Run ``docker`` and return its stdout, stripped."""
    done = subprocess.run(["docker", *words], check=False, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise AssertionError(f"docker {' '.join(words)}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def run_once(*words, flags=(), image=IMAGE):
    """Run a container that ends by itself. Return its exit code, stdout and stderr."""
    done = subprocess.run(
        ["docker", "run", "--rm", *flags, image, *words], check=False, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def inside(name, script):
    """Run a shell script in the container ``name`` and return its stdout."""
    return docker("exec", name, "bash", "-c", script)


class Container:
    """A container that serves the tiny model. Its ports are on 127.0.0.1."""

    def __init__(self, model, *flags, serve=()):
        self.port, self.health_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.name = docker(
            "run", "-d", f"-v={model}:/model:ro", "-v=/cache", "--tmpfs=/tmp", "--shm-size=1g", *flags,
            f"-p=127.0.0.1:{self.port}:8000", f"-p=127.0.0.1:{self.health_port}:8001", IMAGE,
            "serve", "/model", "--served-model-name=tiny", "--enforce-eager", "--max-model-len=512", "--max-num-seqs=8",
            *serve,
        )  # fmt: skip

    def log(self):
        done = subprocess.run(["docker", "logs", self.name], check=True, capture_output=True, text=True)
        return done.stdout + done.stderr

    def state(self, field):
        return json.loads(docker("inspect", "--format", f"{{{{json .{field}}}}}", self.name))

    def wait_for(self, words, times=1):
        """Wait until the container's log has ``words`` at least ``times`` times."""
        deadline = time.monotonic() + START_SECONDS
        while self.log().count(words) < times:
            assert self.state("State.Status") in {"running", "restarting"}, self.log()[-3000:]
            assert time.monotonic() < deadline, f"no {words!r}: {self.log()[-3000:]}"
            time.sleep(0.5)

    def wait(self, seconds=120):
        """Wait until the container ends and return its exit code."""
        return int(docker("wait", self.name, timeout=seconds))

    def processes(self):
        """Return (pid on the host, state, title) of each process."""
        table = docker("top", self.name, "-eo", "pid,stat,args").splitlines()[1:]
        return [(int(pid), stat, title) for pid, stat, title in (line.split(None, 2) for line in table)]

    def ask(self, path, body, timeout=170):
        """POST ``body`` and return the status and body of the response."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def remove(self):
        docker("rm", "-f", "-v", self.name, check=False)
