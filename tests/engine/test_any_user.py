"""Tests of one run by a user ID without a name, on a read-only root: it serves, is suspended, and drains 100 streams.

The tests share the run and depend on their order. The last one ends it.
"""

import os
import shutil
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import after, begun
from streams import USAGE, cut

from vllm_health.limits import Limits

pytestmark = pytest.mark.timeout(600)
LIMITS = Limits(stall_s=20.0)
READ_ONLY_ROOT = """
mount --bind "$1" "$1"
mount -o remount,bind,ro /
shift
exec setpriv --reuid=54321 --regid=54321 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search "$@"
"""
"""Makes the root read-only and drops root's rights. The process may read all files, because the interpreter may lie
below root's home, but it may not write them."""


@pytest.fixture(scope="module")
def server(tiny_model):
    folder = Path(tempfile.mkdtemp(prefix="any-user-"))  # a short path, because it will contain sockets
    folder.chmod(0o777)
    prefix = ["unshare", "--mount", "sh", "-ec", READ_ONLY_ROOT, "sh", str(folder)]
    with begun(
        folder, tiny_model, prefix=prefix, flags=["--launch-stall-seconds=20"], drain_seconds=180,
        environ={"HOME": "/", "TMPDIR": "/tmp"}, state=folder / "state",
    ) as run:  # fmt: skip
        run.termination_log.chmod(0o666)
        run.wait_for("vllm-launch: ready")
        yield run
    shutil.rmtree(folder)


def test_any_user_id_serves_from_a_read_only_root(server):
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 3, "ignore_eos": True}
    assert server.ask("/v1/completions", body)[0] == 200
    launcher = next(pid for pid, title in server.processes().items() if "vllm_launch serve" in title)
    assert Path(f"/proc/{launcher}").stat().st_uid == 54321
    assert not os.access(Path("/proc", str(launcher), "root", "tmp"), os.W_OK)


def test_suspended_processes_are_not_counted_as_a_stall(server):
    """All processes, the launcher too, stop for longer than it takes to call vLLM dead, and then continue."""
    pids = list(server.processes())
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(LIMITS.dead_after_s + 10)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + LIMITS.dead_after_s
    while time.monotonic() < deadline:
        assert server.health("/livez")[0] == server.health("/readyz")[0] == 200
        time.sleep(0.5)


def test_a_drain_completes_a_hundred_streams_and_rejects_new_requests(server):
    """Last test on this run: it ends it."""
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 300, "ignore_eos": True, "stream": True} | USAGE
    with ThreadPoolExecutor(100) as pool:
        streams = [pool.submit(server.ask, "/v1/completions", body, timeout=170) for _ in range(100)]
        after(lambda: server.health("/readyz")[1].startswith("vLLM serves as much as it can"), 30)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("not ready any more")
        assert server.health("/readyz")[0] == 503
        server.wait_for("vLLM finishes accepted requests")
        status, headers, _ = server.ask("/v1/models")
        assert (status, headers["Retry-After"]) == (503, "5")
        answers = [stream.result(180) for stream in streams]
    assert [status for status, _, _ in answers] == [200] * 100
    assert [why for _, _, text in answers if (why := cut(text.splitlines(), 300))] == []
    assert server.end(120) == 0
