"""Tests of common mistakes with containers: a one-line error with what, where and what to do; exit 2; nothing started."""

from __future__ import annotations

import pytest
from containers import CUDA_IMAGE, IMAGE, LOCKED_DOWN, docker, run_once

pytestmark = pytest.mark.timeout(300)
SERVE = ("serve", "/model", "--max-model-len=512")
SPACE = ("--shm-size=1g", "--tmpfs=/tmp")


def error_line(*words, flags):
    """Run a container and check that it exits with 2. Return its one line of error."""
    code, out, err = run_once(*words, flags=[*LOCKED_DOWN, "--network=none", *flags])
    assert code == 2, err
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("vllm-launch: ")]
    assert "Traceback" not in err
    return line


def test_a_model_that_is_not_mounted():
    assert "/model" in error_line(*SERVE, flags=SPACE)


def test_a_cache_volume_that_is_read_only(tiny_model):
    line = error_line(*SERVE, flags=[*SPACE, f"-v={tiny_model}:/model:ro", "--tmpfs=/cache:ro"])
    assert "/cache" in line
    assert "Read-only file system" in line


def test_dockers_default_shared_memory_of_64_mib(tiny_model):
    line = error_line(*SERVE, flags=[f"-v={tiny_model}:/model:ro", "--tmpfs=/tmp", "-v=/cache"])
    assert line.startswith("vllm-launch: /dev/shm: 64 MiB are free")
    assert "docker run --shm-size=1g" in line


def test_an_environment_variable_with_a_misspelt_name(tiny_model):
    flags = [*SPACE, f"-v={tiny_model}:/model:ro", "-e=LAUNCH_HEALTH_PROT=8001"]
    assert "LAUNCH_HEALTH_PORT" in error_line(*SERVE, flags=flags)


def test_a_setting_in_both_the_environment_and_the_file_is_reported(tiny_model, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model: /model\nlaunch:\n  drain_seconds: 60\n")
    config.chmod(0o644)
    flags = [
        *LOCKED_DOWN, f"-v={tiny_model}:/model:ro", f"-v={config}:/config.yaml:ro", "-e=LAUNCH_DRAIN_SECONDS=30",
        "--tmpfs=/tmp",
    ]  # fmt: skip
    code, out, err = run_once("check", "/config.yaml", flags=flags)
    assert code == 0, err
    (line,) = [line for line in (out + err).splitlines() if " overrides /config.yaml " in line]
    assert line.endswith("environment LAUNCH_DRAIN_SECONDS: 30 overrides /config.yaml line 3")


def test_docker_rejects_gpus_without_a_gpu_runtime():
    """None of our code runs then. On a machine with a GPU runtime, the test checks only that Docker knows it."""
    code, _, err = run_once("--version", flags=["--gpus=all"], image=CUDA_IMAGE)
    if code:
        assert "could not select device driver" in err
    else:
        assert "nvidia" in docker("info", "--format={{json .Runtimes}}")


def test_a_port_that_is_in_use(tiny_model):
    """Another container that shares the network uses the port. Docker itself rejects a used port of the host."""
    port_user = docker(
        "run", "-d", "--network=none", "--entrypoint=python3", IMAGE, "-m", "http.server", "8000", "--bind=127.0.0.1"
    )
    try:
        flags = [*LOCKED_DOWN, f"--network=container:{port_user}", *SPACE, f"-v={tiny_model}:/model:ro", "-v=/cache"]
        code, _, err = run_once(*SERVE, flags=flags)
        assert code == 2
        assert "vllm-launch: --port 8000: the port is in use" in err
    finally:
        docker("rm", "-f", "-v", port_user)
