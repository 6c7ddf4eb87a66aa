"""What people get wrong with containers: one line that says what, where and what to do; exit 2; nothing started."""

from __future__ import annotations

import pytest
from containers import CUDA_IMAGE, IMAGE, LOCKED_DOWN, docker, run_once

pytestmark = pytest.mark.timeout(300)
SERVE = ("serve", "/model", "--max-model-len=512")
ROOM = ("--shm-size=1g", "--tmpfs=/tmp")


def refused(*words, flags):
    """The one line."""
    code, out, err = run_once(*words, flags=[*LOCKED_DOWN, "--network=none", *flags])
    assert code == 2, err
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("vllm-launch: ")]
    assert "Traceback" not in err
    return line


def test_a_model_that_is_not_mounted():
    assert "/model" in refused(*SERVE, flags=ROOM)


def test_a_cache_volume_that_is_read_only(tiny_model):
    line = refused(*SERVE, flags=[*ROOM, f"-v={tiny_model}:/model:ro", "--tmpfs=/cache:ro"])
    assert "/cache" in line
    assert "Read-only file system" in line


def test_the_64_mib_of_shared_memory_that_docker_gives(tiny_model):
    line = refused(*SERVE, flags=[f"-v={tiny_model}:/model:ro", "--tmpfs=/tmp", "-v=/cache"])
    assert line.startswith("vllm-launch: /dev/shm: 64 MiB are free")
    assert "docker run --shm-size=1g" in line


def test_a_setting_with_a_mistake_in_its_name(tiny_model):
    flags = [*ROOM, f"-v={tiny_model}:/model:ro", "-e=LAUNCH_HEALTH_PROT=8001"]
    assert "LAUNCH_HEALTH_PORT" in refused(*SERVE, flags=flags)


def test_one_thing_said_by_the_environment_and_the_file_is_told(tiny_model, tmp_path):
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


def test_gpus_where_docker_has_no_runtime_for_them_are_refused_by_docker():
    """Nothing of ours runs then; a machine that has one says what the image for GPUs says of a missing GPU."""
    code, _, err = run_once("--version", flags=["--gpus=all"], image=CUDA_IMAGE)
    if code:
        assert "could not select device driver" in err
    else:
        assert "nvidia" in docker("info", "--format={{json .Runtimes}}")


def test_a_port_that_is_taken(tiny_model):
    """By another container whose network this one shares; a taken port of the host Docker refuses itself."""
    other = docker(
        "run", "-d", "--network=none", "--entrypoint=python3", IMAGE, "-m", "http.server", "8000", "--bind=127.0.0.1"
    )
    try:
        flags = [*LOCKED_DOWN, f"--network=container:{other}", *ROOM, f"-v={tiny_model}:/model:ro", "-v=/cache"]
        code, _, err = run_once(*SERVE, flags=flags)
        assert code == 2
        assert "vllm-launch: --port 8000: the port is in use" in err
    finally:
        docker("rm", "-f", "-v", other)
