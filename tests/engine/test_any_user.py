"""One run by a user without a name, on a root that is read-only: it serves, is suspended, and drains a hundred streams.

The tests share it in their order; the last one ends it.
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
"""Reading everything is allowed, since the interpreter may lie below root's home; writing is not."""


@pytest.fixture(scope="module")
def nobody(tiny_model):
    folder = Path(tempfile.mkdtemp(prefix="any-user-"))  # a short name: sockets are below it
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


def test_any_user_id_serves_from_a_read_only_root(nobody):
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 3, "ignore_eos": True}
    assert nobody.ask("/v1/completions", body)[0] == 200
    launcher = next(pid for pid, title in nobody.processes().items() if "vllm_launch serve" in title)
    assert Path(f"/proc/{launcher}").stat().st_uid == 54321
    assert not os.access(Path("/proc", str(launcher), "root", "tmp"), os.W_OK)


def test_a_suspension_is_no_fault(nobody):
    """Everything stands still for longer than a verdict takes, the launcher too, then goes on where it was."""
    everything = list(nobody.processes())
    for pid in everything:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(LIMITS.dead_after_s + 10)
    for pid in everything:
        os.kill(pid, signal.SIGCONT)
    until = time.monotonic() + LIMITS.dead_after_s
    while time.monotonic() < until:
        assert nobody.health("/livez")[0] == nobody.health("/readyz")[0] == 200
        time.sleep(0.5)


def test_a_drain_of_a_hundred_streams_cuts_none_and_turns_newcomers_away(nobody):
    """The last on that run."""
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 300, "ignore_eos": True, "stream": True} | USAGE
    with ThreadPoolExecutor(100) as pool:
        streams = [pool.submit(nobody.ask, "/v1/completions", body, timeout=170) for _ in range(100)]
        after(lambda: nobody.health("/readyz")[1].startswith("vLLM serves as much as it can"), 30)
        nobody.process.send_signal(signal.SIGTERM)
        nobody.wait_for("not ready any more")
        assert nobody.health("/readyz")[0] == 503
        nobody.wait_for("vLLM finishes accepted requests")
        status, headers, _ = nobody.ask("/v1/models")
        assert (status, headers["Retry-After"]) == (503, "5")
        answers = [stream.result(180) for stream in streams]
    assert [status for status, _, _ in answers] == [200] * 100
    assert [why for _, _, text in answers if (why := cut(text.splitlines(), 300))] == []
    assert nobody.end(120) == 0
