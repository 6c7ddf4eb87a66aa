"""The supervisor over small stand-ins for vLLM, real processes all of them; the real engine is in tests/engine."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine import free_port

RUN = Path(__file__).with_name("run_supervisor.py")
ENGINE_CORE = "(exec -a VLLM::EngineCore sleep 300) & "
SERVER = """
import http.server, signal, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'vllm:cache_config_info{engine="0",kv_cache_size_tokens="900"} 1.0\\n'
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
def end(*_): sys.exit(0)
signal.signal(signal.SIGTERM, end)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


class Run:
    def __init__(self, tmp_path, command, **options):
        self.mark = f"LAUNCH_TEST_MARK={tmp_path}"
        self.port = options.pop("api_port", None) or free_port()
        self.termination_log = tmp_path / "termination-log"
        chosen = {
            "api_host": "127.0.0.1", "api_port": self.port, "health_host": "127.0.0.1", "health_port": free_port(),
            "drain_delay": 0.2, "shutdown_timeout": 5, "exit_margin": 5, "drain_flag": str(tmp_path / "draining"), "refuse_flag": str(tmp_path / "refusing"),
            "api_url": f"http://127.0.0.1:{self.port}",
            "termination_log": str(self.termination_log), **options,
        }  # fmt: skip
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, str(RUN), json.dumps(chosen), *[word.replace("PORT", str(self.port)) for word in command]],
            env={**os.environ, name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.err = ""

    def read_until(self, words):
        while words not in self.err:
            line = self.process.stderr.readline()
            assert line, f"ended before saying {words!r}: {self.err}"
            self.err += line

    def end(self):
        """Exit code, stdout, stderr; nothing may be left of it."""
        try:
            out, err = self.process.communicate(timeout=60)
        finally:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGQUIT)
        assert self.left_over() == []
        return self.process.returncode, out, self.err + err

    def left_over(self):
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes())
            except OSError:
                continue
        return found


def shell(script):
    return ["bash", "-c", script]


SERVING = [sys.executable, "-c", SERVER, "PORT"]


def test_the_childs_log_comes_through_byte_for_byte(tmp_path):
    script = "head -c 3000000 /dev/zero | tr '\\0' x; echo; printf 'no end'; printf 'to stderr\\n' >&2; exit 3"
    code, out, err = Run(tmp_path, shell(script)).end()
    assert code == 3
    assert out == "x" * 3_000_000 + "\nno end"
    assert "to stderr\n" in err


@pytest.mark.parametrize(("gpus", "nicer"), [(0, 5), (2, 0)])
def test_only_an_engine_that_takes_every_core_comes_second_to_us(tmp_path, gpus, nicer):
    code, out, _ = Run(tmp_path, shell("sleep 0.5; nice; exit 3"), planned_gpus=gpus).end()
    assert (code, int(out)) == (3, os.getpriority(os.PRIO_PROCESS, 0) + nicer)


def test_an_unrequested_exit_0_is_our_exit_1_and_its_reason_reaches_kubernetes(tmp_path):
    (tmp_path / "termination-log").touch()
    run = Run(tmp_path, shell("echo '(EngineCore pid=7) ValueError: no room' >&2; exit 0"))
    code, _, err = run.end()
    assert code == 1
    assert err.endswith("vLLM exited with 0 in phase 'starting': ValueError: no room\n")
    assert run.termination_log.read_text().endswith("ValueError: no room")


def test_a_termination_log_is_never_made_and_never_longer_than_kubernetes_reads(tmp_path):
    run = Run(tmp_path, shell("exit 3"))
    assert run.end()[0] == 3
    assert not run.termination_log.exists()


def test_a_child_killed_by_a_signal_is_told_so(tmp_path):
    code, _, err = Run(tmp_path, shell("kill -9 $$")).end()
    assert code == 137
    assert "SIGKILL" in err


def test_vllm_is_out_of_a_terminals_reach_and_scheduled_with_us_and_after_us(tmp_path):
    """Ctrl-C goes to the foreground's process group; a session of its own would be another scheduling group."""
    # Its place in the order of processes is given to it just after it has begun.
    _, out, _ = Run(tmp_path, shell("sleep 1; ps -o pgid=,sid=,ni= -p $$,$PPID; exit 3")).end()
    ours, its = (line.split() for line in out.splitlines())
    assert ours[0] != its[0]
    assert ours[1] == its[1]
    assert int(its[2]) == int(ours[2]) + 5


@pytest.mark.parametrize(
    ("forbidden", "ways", "said"),
    [
        (True, "'CUSTOM', 'PYNCCL'", "INFO vllm-launch: all-reduce leaves NVLink multicast alone: CUSTOM, PYNCCL"),
        (True, "'FLASHINFER', 'CUSTOM'", "WARNING vllm-launch: all-reduce uses NVLink multicast: FLASHINFER"),
        (False, "'FLASHINFER', 'CUSTOM'", None),
    ],
)
def test_whether_vllm_keeps_off_multicast_is_read_from_its_log_simulated(tmp_path, forbidden, ways, said):
    line = f"(Worker pid=9) INFO [cuda_communicator.py:353] Using [{ways}] all-reduce backends (in dispatch order)"
    run = Run(tmp_path, shell(f'echo "{line}"; sleep 2; exit 3'), no_multicast=forbidden)
    told = [text for text in run.end()[2].splitlines() if "multicast" in text]
    assert [text.partition(" ")[2] for text in told] == ([said] if said else [])  # after the time


@pytest.mark.parametrize("title", ["VLLM::EngineCore", "VLLM::Worker_TP1"])
def test_a_part_that_dies_while_the_server_lives_on_ends_everything_simulated(tmp_path, title):
    script = f"(exec -a {title} sleep 2) & (exec -a VLLM::Worker_TP0 setsid sleep 300) & sleep 300"
    code, _, err = Run(tmp_path, shell(script)).end()
    assert code == 1
    assert f"{title} 2 died" in err


def test_an_engine_that_its_killed_server_left_behind_is_ended_simulated(tmp_path):
    code, _, _ = Run(tmp_path, shell(ENGINE_CORE + "sleep 1; kill -9 $$")).end()
    assert code == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_during_the_start_ends_it_at_once(tmp_path, number):
    run = Run(tmp_path, shell("echo up >&2; trap '' TERM INT HUP QUIT; while :; do sleep 0.2; done"))
    run.read_until("up")
    time.sleep(0.3)
    run.process.send_signal(number)
    assert run.end()[0] == 128 + number


def test_a_start_in_which_nothing_moves_is_ended_with_the_reason(tmp_path):
    code, _, err = Run(tmp_path, shell("while :; do :; done"), limits={"start_stall_s": 2}).end()
    assert code == 1
    assert "Start-up is stuck" in err


SICKENS = (  # after 3 s
    SERVER.replace("import http.server", "import time, http.server")
    .replace("class Answer", "began = time.monotonic()\nclass Answer")
    .replace("(200)", "(503 if self.path == '/health' and time.monotonic() > began + 3 else 200)")
)


def test_an_engine_that_vllm_calls_dead_ends_everything_within_a_sample(tmp_path):
    run = Run(tmp_path, [*SERVING[:2], SICKENS, "PORT"], limits={"stall_s": 6})
    run.read_until("ready after")
    began = time.monotonic()
    code, _, err = run.end()
    assert code == 1
    assert err.endswith("vLLM reports that its engine is dead (503 from /health). All was ended.\n")
    assert err.count("ready after") == 1
    assert "dead:" not in err  # the last line says it, and nothing is announced after the end has been decided
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_serving_drains_and_is_exit_0(tmp_path, number):
    run = Run(tmp_path, SERVING, planned_kv_tokens=1000)
    run.read_until("KV cache")
    assert "WARNING vllm-launch: engine 0: KV cache: 900 tokens, planned 1,000 (-10.0%)" in run.err
    run.process.send_signal(number)
    code, _, err = run.end()
    assert code == 0
    assert (tmp_path / "draining").exists()
    assert "not ready any more" in err


LATE_SERVER = shlex.quote("import time; time.sleep(2)" + SERVER)  # until the watch has seen it
SEVERAL_SERVERS = f"""
(exec -a VLLM::APIServer_0 {sys.executable} -c {LATE_SERVER} PORT) &
trap 'kill $!; wait $!; sleep 300' TERM
wait
"""


def test_engines_that_dawdle_after_the_last_api_server_are_not_waited_for(tmp_path):
    run = Run(tmp_path, shell(SEVERAL_SERVERS), shutdown_timeout=60)
    run.read_until("KV cache")
    run.process.send_signal(signal.SIGTERM)
    code, _, err = run.end()
    assert code == 0
    assert "every stream has ended" in err


def test_a_second_signal_ends_a_drain_at_once(tmp_path):
    run = Run(tmp_path, SERVING, drain_delay=60)
    run.read_until("KV cache")
    run.process.send_signal(signal.SIGTERM)
    run.read_until("not ready")
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == 130


def test_a_drain_that_does_not_end_is_ended_and_said(tmp_path):
    deaf = [*SERVING[:2], SERVER.replace("sys.exit(0)", "None"), "PORT"]
    run = Run(tmp_path, deaf, shutdown_timeout=0.5, exit_margin=0.5)
    run.read_until("KV cache")
    run.process.send_signal(signal.SIGTERM)
    code, _, err = run.end()
    assert code == 1
    assert "did not end within" in err


def test_a_busy_port_is_one_line_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options, name in (({"api_port": port}, "--port"), ({"health_port": port}, "--launch-health-port")):
            code, out, err = Run(tmp_path, shell("echo started"), **options).end()
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert f"{name} {port}: the port is in use" in err


def test_a_program_that_cannot_be_executed_is_one_line(tmp_path):
    code, _, err = Run(tmp_path, [str(tmp_path / "nothing")]).end()
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot be executed: No such file or directory" in err
