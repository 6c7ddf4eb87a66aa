import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_launch.serve import process


def test_a_process_has_its_parent_title_and_memory():
    own = process.read_process(os.getpid())
    assert own.parent == os.getppid()
    assert "pytest" in own.title
    assert own.resident > 1 << 20
    assert own.read > 0


def test_a_missing_process_is_none():
    assert process.read_process(2**22 + 1) is None


def run_python(code):
    """Run ``code`` in a new process, because it changes attributes of its process. Return its stdout."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_subreaper_adopts_and_reaps_orphans():
    out = run_python("""
import os, subprocess, time
from vllm_launch.serve import process
process.become_subreaper()
middle = subprocess.Popen(["sh", "-c", "sleep 0.3 & exec true"])
deadline = time.monotonic() + 30
seen = {}
while time.monotonic() < deadline and len(seen) < 2:
    seen |= process.reap()
    time.sleep(0.02)
middle.returncode = seen[middle.pid]
print(len(seen), process.descendants(os.getpid()))
""")
    assert out == "2 []\n"


def test_descendants_end_even_if_they_ignore_sigterm_and_have_their_own_session():
    out = run_python("""
import os, subprocess, time
from vllm_launch.serve import process
process.become_subreaper()
stubborn = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
child = subprocess.Popen(["setsid", "sh", "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()
print(len(process.descendants(os.getpid())) > 0, process.end_all(os.getpid(), 0.3))
statuses = process.reap()
child.returncode = statuses[child.pid]
print(child.returncode, process.descendants(os.getpid()))
child.stdout.close()
""")
    assert out == "True []\n-9 []\n"


def test_a_group_does_not_outlive_a_killed_launcher_even_if_it_ignores_sigterm():
    code = """
import subprocess
from vllm_launch.serve import process
stubborn = "trap '' TERM HUP; echo ready; while :; do sleep 0.1; done"
child = subprocess.Popen(["sh", "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
guard = process.kill_group_on_exit(child.pid)
print(child.pid, flush=True)
input()
"""
    launcher = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = os.pidfd_open(int(launcher.stdout.readline()))
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate(timeout=30)
    assert select.select([child], [], [], 30)[0], "the child still runs"
    os.close(child)


def test_without_a_shell_the_group_guard_raises_and_leaves_no_pipe(monkeypatch):
    before = sorted(Path("/proc/self/fd").iterdir())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError):
        process.kill_group_on_exit(1)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_all_descendants_of_another_process_are_ended():
    child = subprocess.Popen(["sh", "-c", "sleep 300 & sleep 300 & echo up; wait"], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"up\n"
    assert len(process.descendants(child.pid)) == 2
    assert process.end_all(child.pid, 10.0) == []
    assert child.wait(30) is not None
    child.stdout.close()
