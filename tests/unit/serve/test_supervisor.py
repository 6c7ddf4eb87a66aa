"""The supervisor with small real processes in place of vLLM. tests/engine uses the real engine."""

import os
import shlex
import signal
import socket
import sys
import time

import pytest
from supervised import SERVER, SERVING, Run, shell

ENGINE_CORE = "(exec -a VLLM::EngineCore sleep 300) & "


def test_the_childs_log_is_copied_byte_for_byte(tmp_path):
    script = "head -c 3000000 /dev/zero | tr '\\0' x; echo; printf 'no end'; printf 'to stderr\\n' >&2; exit 3"
    code, out, err = Run(tmp_path, shell(script)).end()
    assert code == 3
    assert out == "x" * 3_000_000 + "\nno end"
    assert "to stderr\n" in err


@pytest.mark.parametrize(("gpus", "extra_niceness"), [(0, 5), (2, 0)])
def test_only_the_cpu_engine_has_a_higher_niceness_than_the_launcher(tmp_path, gpus, extra_niceness):
    code, out, _ = Run(tmp_path, shell("sleep 0.5; nice; exit 3"), planned_gpus=gpus).end()
    assert (code, int(out)) == (3, os.getpriority(os.PRIO_PROCESS, 0) + extra_niceness)


def test_an_unexpected_exit_0_becomes_exit_1_with_its_reason_in_the_termination_log(tmp_path):
    (tmp_path / "termination-log").touch()
    run = Run(tmp_path, shell("echo '(EngineCore pid=7) ValueError: no room' >&2; exit 0"))
    code, _, err = run.end()
    assert code == 1
    assert err.endswith("vLLM exited with status 0 in phase 'starting': ValueError: no room\n")
    assert run.termination_log.read_text().endswith("ValueError: no room")


def test_the_launcher_does_not_create_the_termination_log(tmp_path):
    run = Run(tmp_path, shell("exit 3"))
    assert run.end()[0] == 3
    assert not run.termination_log.exists()


def test_the_reason_names_the_signal_that_killed_the_child(tmp_path):
    code, _, err = Run(tmp_path, shell("kill -9 $$")).end()
    assert code == 137
    assert "SIGKILL" in err


def test_vllm_has_its_own_process_group_our_session_and_a_higher_niceness(tmp_path):
    """Ctrl-C goes to the terminal's foreground process group. Linux schedules each session as a group."""
    # The launcher sets the niceness just after the child has started.
    _, out, _ = Run(tmp_path, shell("sleep 1; ps -o pgid=,sid=,ni= -p $$,$PPID; exit 3")).end()
    launcher, child = (line.split() for line in out.splitlines())
    assert launcher[0] != child[0]
    assert launcher[1] == child[1]
    assert int(child[2]) == int(launcher[2]) + 5


@pytest.mark.parametrize(
    ("forbidden", "backends", "message"),
    [
        (True, "'CUSTOM', 'PYNCCL'", "INFO vllm-launch: all-reduce does not use NVLink multicast: CUSTOM, PYNCCL"),
        (
            True,
            "'FLASHINFER', 'CUSTOM'",
            "WARNING vllm-launch: NVLink multicast is off, but these all-reduce backends of vLLM may use it: FLASHINFER",
        ),
        (False, "'FLASHINFER', 'CUSTOM'", None),
    ],
)
def test_the_use_of_multicast_is_read_from_vllms_log_simulated(tmp_path, forbidden, backends, message):
    line = f"(Worker pid=9) INFO [cuda_communicator.py:353] Using [{backends}] all-reduce backends (in dispatch order)"
    run = Run(tmp_path, shell(f'echo "{line}"; sleep 2; exit 3'), no_multicast=forbidden)
    lines = [text for text in run.end()[2].splitlines() if "multicast" in text]
    assert [text.partition(" ")[2] for text in lines] == ([message] if message else [])  # after the time


@pytest.mark.parametrize("title", ["VLLM::EngineCore", "VLLM::Worker_TP1"])
def test_a_dead_vllm_process_ends_all_others_simulated(tmp_path, title):
    script = f"(exec -a {title} sleep 2) & (exec -a VLLM::Worker_TP0 setsid sleep 300) & sleep 300"
    code, _, err = Run(tmp_path, shell(script)).end()
    assert code == 1
    assert f"{title} 2 died" in err


def test_an_orphaned_engine_is_ended_after_its_server_was_killed_simulated(tmp_path):
    code, _, _ = Run(tmp_path, shell(ENGINE_CORE + "sleep 1; kill -9 $$")).end()
    assert code == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_during_start_up_ends_vllm_at_once(tmp_path, number):
    run = Run(tmp_path, shell("echo up >&2; trap '' TERM INT HUP QUIT; while :; do sleep 0.2; done"))
    run.read_until("up")
    time.sleep(0.3)
    run.process.send_signal(number)
    assert run.end()[0] == 128 + number


def test_a_start_without_progress_is_ended_with_a_reason(tmp_path):
    code, _, err = Run(tmp_path, shell("while :; do :; done"), limits={"start_stall_s": 2}).end()
    assert code == 1
    assert "Start-up is stuck" in err


UNHEALTHY_AFTER_3_S = (
    SERVER.replace("import http.server", "import time, http.server")
    .replace("class Answer", "began = time.monotonic()\nclass Answer")
    .replace("(200)", "(503 if self.path == '/health' and time.monotonic() > began + 3 else 200)")
    .replace("self.send_response", "body = b'' if self.path == '/health' else body; self.send_response")
)


def test_two_503_of_health_without_a_body_end_everything(tmp_path):
    run = Run(tmp_path, [*SERVING[:2], UNHEALTHY_AFTER_3_S, "PORT"], limits={"stall_s": 6})
    run.read_until("ready after")
    began = time.monotonic()
    code, _, err = run.end()
    assert code == 1
    stopped = "The launcher stopped all processes."
    assert err.endswith(f"vLLM reports that its engine is dead (503 from /health). {stopped}\n")
    assert err.count("ready after") == 1
    assert "dead:" not in err  # only the last line reports it
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_serving_drains_vllm_and_exits_with_0(tmp_path, number):
    run = Run(tmp_path, SERVING, planned_kv_tokens=1000)
    run.read_until("KV cache")
    assert "WARNING vllm-launch: engine 0: KV cache: 900 tokens, planned 1,000 (-10.0%)" in run.err
    run.process.send_signal(number)
    code, _, err = run.end()
    assert code == 0
    assert (tmp_path / "draining").exists()
    assert "not ready any more" in err


LATE_SERVER = shlex.quote("import time; time.sleep(2)" + SERVER)  # late, so that the launcher sees its title first
SEVERAL_SERVERS = f"""
(exec -a VLLM::APIServer_0 {sys.executable} -c {LATE_SERVER} PORT) &
trap 'kill $!; wait $!; sleep 300' TERM
wait
"""


def test_the_drain_does_not_wait_for_engines_after_the_last_api_server_exits(tmp_path):
    run = Run(tmp_path, shell(SEVERAL_SERVERS), shutdown_timeout=60)
    run.read_until("KV cache")
    run.process.send_signal(signal.SIGTERM)
    code, _, err = run.end()
    assert code == 0
    assert "all API servers have exited" in err


def test_a_second_signal_ends_a_drain_at_once(tmp_path):
    run = Run(tmp_path, SERVING, drain_delay=60)
    run.read_until("KV cache")
    run.process.send_signal(signal.SIGTERM)
    run.read_until("not ready")
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == 130


def test_a_drain_over_its_time_limit_ends_vllm_with_a_reason(tmp_path):
    ignores_sigterm = [*SERVING[:2], SERVER.replace("sys.exit(0)", "None"), "PORT"]
    run = Run(tmp_path, ignores_sigterm, shutdown_timeout=0.5, exit_margin=0.5)
    run.read_until("KV cache")
    run.process.send_signal(signal.SIGTERM)
    code, _, err = run.end()
    assert code == 1
    assert "did not exit within" in err


def test_a_busy_port_is_a_one_line_error_before_anything_starts(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        for options, name in (({"api_port": port}, "--port"), ({"health_port": port}, "--launch-health-port")):
            code, out, err = Run(tmp_path, shell("echo started"), **options).end()
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert f"{name} {port}: the port is in use" in err


def test_a_program_that_cannot_be_executed_is_a_one_line_error(tmp_path):
    code, _, err = Run(tmp_path, [str(tmp_path / "nothing")]).end()
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot be executed: No such file or directory" in err
