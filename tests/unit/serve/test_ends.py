"""How the supervisor judges the ends of vLLM, with small real processes in place of vLLM."""

import os
import shlex
import signal
import sys
import time

import pytest
from supervised import SERVER, SERVING, Run, shell

from vllm_launch.serve import process

LOAD = '1.0\\nvllm:num_requests_running{engine="0"} 2.0\\nvllm:num_requests_waiting{engine="0"} 1.0\\n'
REQUESTS = SERVER.replace("1.0\\n", LOAD)
LAST_BREATH = "def end(*_): sys.exit(0)"
CLIENT = """echo '(APIServer pid=1) ERROR 12-01 10:00:00 [serving.py:200] ValueError: the prompt of a client' >&2; """


def end_like(text):
    """Return a server that does ``text`` at SIGTERM."""
    assert LAST_BREATH in SERVER
    return [*SERVING[:2], SERVER.replace(LAST_BREATH, f"def end(*_): {text}"), "PORT"]


def vllm_of(run):
    """Return the pid of the run's child: vLLM."""
    (child,) = (
        found.pid for found in process.descendants(run.process.pid)
        if found.parent == run.process.pid and "read _" not in found.title
    )  # fmt: skip
    return child


def serving(tmp_path, command=SERVING, **options):
    run = Run(tmp_path, command, **options)
    run.read_until("KV cache")
    return run


# ---- SIGTERM to the launcher and vLLM together


@pytest.mark.parametrize("first", ["vllm", "launcher"])
@pytest.mark.parametrize(
    "last_breath", ["sys.exit(0)", "sys.exit(143)", "(signal.signal(15, signal.SIG_DFL), signal.raise_signal(15))"]
)
def test_sigterm_to_launcher_and_vllm_together_is_a_good_end(tmp_path, first, last_breath):
    run = serving(tmp_path, end_like(last_breath), drain_delay=60)
    pids = [vllm_of(run), run.process.pid]
    began = time.monotonic()
    for pid in pids if first == "vllm" else reversed(pids):
        os.kill(pid, signal.SIGTERM)
    code, _, err = run.end()
    assert code == 0, err
    assert "ERROR" not in err
    assert time.monotonic() - began < 10  # not after the delay


def test_sigterm_to_vllm_alone_is_no_good_end(tmp_path):
    run = serving(tmp_path)
    os.kill(vllm_of(run), signal.SIGTERM)
    code, _, err = run.end()
    assert code == 1
    assert "vLLM exited with status 0 while serving" in err


def test_a_vllm_that_fails_during_the_delay_is_not_a_good_end(tmp_path):
    fails = end_like("(print('(EngineCore pid=7) RuntimeError: no GPU', file=sys.stderr, flush=True), sys.exit(3))")
    run = serving(tmp_path, fails, drain_delay=60)
    pid = vllm_of(run)
    run.process.send_signal(signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)
    code, _, err = run.end()
    assert code == 3
    assert err.endswith("vLLM exited with status 3 at the end of the drain: RuntimeError: no GPU\n")


SLOW_SERVER = SERVER.replace(LAST_BREATH, "def end(*_): time.sleep(6); sys.exit(0)").replace(
    "import", "import time,", 1
)
WITH_ENGINE = f"(exec -a VLLM::EngineCore sleep 300) & exec {sys.executable} -c {shlex.quote(SLOW_SERVER)} PORT"


def test_engines_that_end_before_their_server_at_sigterm_to_all_are_a_good_end_simulated(tmp_path):
    run = serving(tmp_path, shell(WITH_ENGINE), drain_delay=60)
    began = time.monotonic()
    for found in process.descendants(run.process.pid):
        if "read _" not in found.title:
            os.kill(found.pid, signal.SIGTERM)
    run.process.send_signal(signal.SIGTERM)
    code, _, err = run.end()
    assert code == 0, err
    assert "VLLM::EngineCore 300 was killed by SIGTERM during the drain" in err
    assert time.monotonic() - began < 30


def test_an_error_of_the_engine_during_a_drain_is_in_the_log(tmp_path):
    says = "(EngineCore pid=7) ERROR 12-01 10:00:00 [multiproc_executor.py:316] Worker proc VllmWorker-0 died unexpectedly (exit code: -9)"
    run = serving(tmp_path, end_like(f"(print({says!r}, flush=True), sys.exit(0))"), drain_delay=60)
    pid = vllm_of(run)
    run.process.send_signal(signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)
    code, _, err = run.end()
    assert code == 0
    assert (
        "WARNING vllm-launch: vLLM had an error before the end of the drain: VllmWorker-0 was killed by SIGKILL" in err
    )


# ---- streams that the shutdown timeout cuts


@pytest.mark.parametrize(("seconds", "cut"), [(2.5, True), (0, False)])
def test_requests_that_the_shutdown_timeout_cuts_are_counted_in_the_log(tmp_path, seconds, cut):
    assert "num_requests_running" in REQUESTS
    late = REQUESTS.replace(LAST_BREATH, f"import time\ndef end(*_): time.sleep({seconds}); sys.exit(0)")
    run = serving(tmp_path, [*SERVING[:2], late, "PORT"], shutdown_timeout=2)
    run.process.send_signal(signal.SIGTERM)
    code, _, err = run.end()
    assert code == 0
    line = "WARNING vllm-launch: vLLM's shutdown timeout of 2 s was over. This cut 3 requests, the last number in vLLM's metrics. "
    assert (line in err) == cut
    assert ("cut" in err) == cut


def test_requests_are_counted_if_vllms_log_says_that_it_ended_its_engine_by_force(tmp_path):
    says = "[shutdown] Process manager: force killing remaining process EngineCore pid 7"
    early = REQUESTS.replace(LAST_BREATH, f"def end(*_): print({says!r}, flush=True); sys.exit(0)")
    run = serving(tmp_path, [*SERVING[:2], early, "PORT"], shutdown_timeout=60)
    run.process.send_signal(signal.SIGTERM)
    assert "This cut 3 requests" in run.end()[2]


# ---- the cause of an unexpected end


def test_a_clients_error_in_the_log_is_not_the_cause_of_a_sigkill(tmp_path):
    server = f"{CLIENT} exec {sys.executable} -c {shlex.quote(SERVER)} PORT"
    run = serving(tmp_path, shell(server))
    os.kill(vllm_of(run), signal.SIGKILL)
    code, _, err = run.end()
    assert code == 137
    last = err.splitlines()[-1]
    assert "vLLM was killed by SIGKILL while serving: " in last
    assert "ValueError" not in last
    assert "dmesg" in last


def test_a_clients_error_in_the_log_is_not_the_cause_of_a_dead_engine_simulated(tmp_path):
    server = f"{CLIENT} (exec -a VLLM::EngineCore sleep 300) & exec {sys.executable} -c {shlex.quote(SERVER)} PORT"
    run = serving(tmp_path, shell(server))
    time.sleep(6)  # the launcher looks for new processes every 5 s
    (engine,) = (found.pid for found in process.descendants(run.process.pid) if "EngineCore" in found.title[:20])
    os.kill(engine, signal.SIGKILL)
    code, _, err = run.end()
    assert code == 1
    last = err.splitlines()[-1]
    assert "VLLM::EngineCore 300 died (was killed by SIGKILL), but vLLM kept running" in last
    assert "ValueError" not in last


FAILED = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"


def test_an_engine_that_is_killed_at_the_start_is_named(tmp_path):
    script = (
        f"(exec -a VLLM::EngineCore sleep 300) & sleep 2; kill -9 $!; echo '(APIServer pid=1) {FAILED}' >&2; exit 1"
    )
    code, _, err = Run(tmp_path, shell(script)).end()
    assert code == 1
    last = err.splitlines()[-1]
    assert "vLLM exited with status 1 in phase 'starting': VLLM::EngineCore 300 " in last
    assert "dmesg" in last


@pytest.mark.parametrize("starting", [True, False])
def test_a_worker_that_died_of_a_signal_is_named_with_it(tmp_path, starting):
    died = "Worker proc VllmWorker-0 died unexpectedly (exit code: -4), shutting down executor."
    dead = "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."
    lines = [
        f"(EngineCore pid=7) ERROR 12-01 10:00:00 [multiproc_executor.py:316] {died}",
        "(EngineCore pid=7) ERROR 12-01 10:00:00 [core.py:1513] EngineCore encountered a fatal error.",
        "(EngineCore pid=7) ERROR 12-01 10:00:00 [core.py:1513] RuntimeError: Executor failed.",
        *[f"(APIServer pid=1) ERROR 12-01 10:00:00 [serving.py:300] {dead}"] * 1000,
    ]
    log = tmp_path / "log"
    log.write_text("\n".join(lines) + "\n")
    if starting:
        run = Run(tmp_path, shell(f"cat {log}; exit 1"))
    else:
        run = serving(tmp_path, end_like(f"(print(open({str(log)!r}).read(), flush=True), sys.exit(1))"))
        os.kill(vllm_of(run), signal.SIGTERM)
    code, _, err = run.end()
    assert code == 1
    assert err.splitlines()[-1].endswith(": VllmWorker-0 was killed by SIGILL")


# ---- titles


@pytest.mark.parametrize("prefix", ["llama-3", "team.llama"])
def test_a_dead_engine_is_noticed_whatever_the_prefix_of_its_title_simulated(tmp_path, prefix, monkeypatch):
    monkeypatch.setenv("VLLM_PROCESS_NAME_PREFIX", prefix)
    script = f"(exec -a {prefix}::EngineCore sleep 2) & for i in $(seq 60); do sleep 0.5; done"
    code, _, err = Run(tmp_path, shell(script)).end()
    assert code == 1
    assert f"{prefix}::EngineCore 2 died" in err
