import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)


def test_a_killed_engine_core_ends_the_run_with_a_failure_within_ten_seconds(start):
    run = start()
    run.wait_for("vllm-launch: ready")
    os.kill(run.wait_for_title("VLLM::EngineCore"), signal.SIGKILL)
    assert run.end(10) != 0
    assert "VLLM::EngineCore died" in run.termination_log.read_text()


def test_a_worker_killed_during_start_up_ends_the_run_within_ten_seconds(start):
    run = start()
    os.kill(run.wait_for_title("VLLM::Worker"), signal.SIGKILL)
    assert run.end(10) != 0


def test_a_killed_api_server_ends_its_engine(start):
    run = start()
    run.wait_for_title("VLLM::EngineCore")
    server = next(pid for pid, title in run.processes().items() if "openai.api_server" in title)
    os.kill(server, signal.SIGKILL)
    assert run.end(10) == 137


def test_a_killed_launcher_ends_all_its_processes(start):
    run = start()
    run.wait_for_title("VLLM::Worker")
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 10
    while run.processes():
        assert time.monotonic() < deadline, run.processes()
        time.sleep(0.2)


def test_a_wrong_model_path_is_a_one_line_error_before_the_start(start, tmp_path):
    run = start(model=tmp_path / "not-there")
    assert run.end(30) == 2
    assert one_line(run).startswith(f"vllm-launch: model {tmp_path}/not-there")


def test_a_busy_port_is_an_error_before_the_start(start):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        run = start(port=listener.getsockname()[1])
        assert run.end(60) == 2
    assert "the port is in use" in run.log.read_text().splitlines()[-1]


def test_a_full_disk_for_caches_is_a_one_line_error_before_the_start(start, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], check=True)
    try:
        run = start(flags=[f"--launch-cache-dir={full}"])
        assert run.end(60) == 2
    finally:
        subprocess.run(["umount", str(full)], check=True)
    assert "No space left on device" in one_line(run)


def one_line(run):
    text = run.log.read_text()
    assert text.count("\n") == 1, text
    return text


def test_an_error_that_only_vllm_finds_is_one_line_in_the_termination_log(start, tmp_path):
    run = start(flags=[f"--tokenizer={tmp_path}/no-tokenizer"])
    assert run.end(200) == 1
    reason = run.termination_log.read_text()
    assert "no-tokenizer" in reason
    assert "\n" not in reason


def test_as_pid_1_the_launcher_reaps_orphans_and_leaves_no_process(start):
    """The launcher runs in its own PID namespace. The second signal comes during the drain."""
    run = start(prefix=["unshare", "--fork", "--kill-child", "--pid", "--mount-proc"], drain_seconds=300)
    run.wait_for("vllm-launch: ready")
    launcher = next(
        pid for pid, title in run.processes().items() if "vllm_launch serve" in title and "unshare" not in title
    )
    orphan = ["nsenter", f"--target={launcher}", "--pid", "--mount", "sh", "-c", "(sleep 0.1 &) ; true"]
    subprocess.run(orphan, check=True, start_new_session=True)
    os.kill(launcher, signal.SIGTERM)
    run.wait_for("not ready any more")
    time.sleep(0.5)
    states = [line.rsplit(")")[-1].split()[0] for line in _stats(launcher)]
    assert "Z" not in states
    os.kill(launcher, signal.SIGTERM)
    assert run.end(10) == 143


def _stats(launcher):
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        yield Path(f"/proc/{child}/stat").read_text()
