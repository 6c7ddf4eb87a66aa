"""The commands on a GB10, with NVML simulated at its binding: it answers "Not Supported" when asked for the memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from builders import model, placed, run

from vllm_health.gpu_faults import Reader
from vllm_health.nvml import open_nvml
from vllm_launch import commands
from vllm_launch.__main__ import main
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.gpus import read_hardware
from vllm_launch.machine.hardware_file import load_hardware
from vllm_launch.serve import serving
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings
from vllm_launch.sizing.memory import memory_of_gpu
from vllm_launch.units import GIB

MODELS = Path(__file__).parents[1] / "data" / "models"
LLAMA = str(MODELS / "meta-llama--Meta-Llama-3-8B")
TOTAL, AVAILABLE = 127_601_836 * 1024, 122_085_700 * 1024  # 121.69 and 116.43 GiB, as on an idle DGX Spark


@pytest.fixture
def gb10(fake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Simulate a GB10, and return the root of its file system."""
    [gpu] = fake.machine["gpus"] = fake.machine["gpus"][:1]
    fake.machine["count"] = 1
    gpu |= {"name": "NVIDIA GB10", "cc": [12, 1], "mem": "ERR:Not Supported", "mem_v2": "ERR:Not Supported"}
    gpu |= {"mig": "ERR:Not Supported", "nvlink": []}
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {TOTAL // 1024} kB\nMemAvailable: {AVAILABLE // 1024} kB\n")
    monkeypatch.setattr(commands, "read_hardware", lambda environ: read_hardware(environ, root))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return root


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = main(words)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


@pytest.mark.usefixtures("gb10")
def test_gpus_shows_a_gb10_with_the_memory_that_vllm_takes_simulated(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert output(capsys, "gpus", "--format", "engine") == "cuda\n"
    table = output(capsys, "gpus")
    assert "NVIDIA GB10" in table
    assert "116.43 GiB" in table
    assert "121.69 GiB (shared with the host)" in table
    assert "left out" not in table
    (tmp_path / "gb10.json").write_text(output(capsys, "gpus", "--format", "json"))
    [gpu] = load_hardware(tmp_path / "gb10.json").gpus
    assert (gpu.unified, gpu.memory_total, gpu.memory_free) == (True, TOTAL, AVAILABLE)


@pytest.mark.usefixtures("gb10")
def test_a_plan_for_a_gb10_passes_vllms_check_of_free_memory_and_leaves_room_for_the_host_simulated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = json.loads(output(capsys, "plan", LLAMA, "--format", "json"))
    claimed = math.ceil(TOTAL * plan["gpu_memory_utilization"])
    measured_by_vllm = AVAILABLE - 2.74 * GIB  # reported for a GB10: 113.69 GiB are free when vLLM looks
    assert claimed <= measured_by_vllm
    assert claimed <= AVAILABLE - 10 * GIB
    assert 0.8 < plan["gpu_memory_utilization"] < 0.88  # users report 0.85 as stable, and failures from 0.90 on
    assert plan["max_num_batched_tokens"] == 2048  # vLLM asks NVML, which does not know the memory
    assert (plan["max_num_seqs"], plan["tensor_parallel_size"]) == (256, 1)
    [why] = [reason["why"] for reason in plan["reasons"] if reason["field"] == "gpu_memory_utilization"]
    assert "121.69 GiB that GPU 0 shares with the host" in why
    assert "page cache" in why


def test_the_growth_of_vllms_processes_counts_only_with_unified_memory() -> None:
    gb10 = parse_hardware_name("GB10").gpus[0]
    own = msgspec.structs.replace(gb10, unified=False)
    batch = run(expandable_segments=False)
    unified, separate = (memory_of_gpu(placed(model(), batch, on=gpu)) for gpu in (gb10, own))
    assert unified.non_torch - separate.non_torch == 4 * GIB
    assert unified.context == 3 * GIB
    assert unified.safety - separate.safety == round(gb10.memory_total / 16)
    assert (unified.weights, unified.activation_peak) == (separate.weights, separate.activation_peak)


@pytest.mark.usefixtures("gb10")
def test_serve_accepts_a_gb10_and_does_not_fill_its_memory_with_page_cache_simulated(tmp_path: Path) -> None:
    hardware = commands._this_machine()
    assert commands._for_engine("vllm", hardware) == hardware
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 16))
    settings = read_settings(parse_flags([str(tmp_path)]), {})
    assert serving.read_weights_ahead(settings, hardware) == 0


@pytest.mark.usefixtures("gb10")
def test_a_model_that_is_too_large_for_a_gb10_gets_remedies_that_serve_has_simulated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", str(MODELS / "meta-llama--Meta-Llama-3-70B")]) == 2
    error = capsys.readouterr().err
    assert "--quantization fp8" in error
    assert "NVIDIA GB10" not in error.partition("makes it fit: ")[2]  # a GB10 has one GPU
    assert "--hardware" not in error


@pytest.mark.usefixtures("gb10")
def test_the_prober_reports_a_gb10_without_memory_and_without_faults_simulated() -> None:
    with open_nvml() as opened:
        report = Reader(opened).read()
    assert (report.memory, report.faults) == ({}, ())
    assert [name for _, name in report.names.values()] == ["NVIDIA GB10"]
