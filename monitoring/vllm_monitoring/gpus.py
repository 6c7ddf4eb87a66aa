"""The GPU dashboard: NVML as the prober reads it, which is always there, and NVIDIA's DCGM exporter where it runs."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import OF_POD, RATE, TOKENS_PER_SECOND, Panel, Row, lines, select
from vllm_monitoring.thresholds import Thresholds

UID = "vllm-gpus"
_BY_GPU = "namespace, pod, gpu"
_LEGEND = "{{pod}} GPU {{gpu}}"
_DCGM_LEGEND = "{{Hostname}} GPU {{gpu}}"
_OF_DCGM = 'pod=~"$pod|", namespace=~"$namespace|"'
"""DCGM's exporter names the pod that uses a GPU, where it can: not with time slicing, NVIDIA/dcgm-exporter#151."""


def build(thresholds: Thresholds) -> str:
    """Return the dashboard's JSON."""
    nvml = [
        *_utilization_and_power(),
        *_temperature_and_faults(thresholds),
        *_ecc_errors_and_nvml(thresholds),
        _output_per_gpu(),
    ]
    dcgm = [*_dcgm_profiling(), *_dcgm_utilization_and_power(), *_dcgm_temperature_and_faults(thresholds)]
    return panels.board(
        UID,
        "vLLM / GPUs",
        "How busy, full, hot and healthy the GPUs are.",
        [Row("From NVML, by the prober", nvml), Row("From DCGM's exporter, where it runs", dcgm, folded=True)],
        pods=True,
    )


def _utilization_and_power() -> list[Panel]:
    """Return the panels of memory usage, GPU utilization and power."""
    return [
        lines(
            "Memory in use",
            "Flat from the end of the start on: vLLM takes all that it will need. A step up is somebody else.",
            "percentunit",
            {_LEGEND: f"{_by_gpu('gpu_memory_used_bytes')} / {_by_gpu('gpu_memory_total_bytes')}"},
        ),
        lines(
            "Time with any kernel at work",
            "Near 100 % under load. It says that the GPU is not idle, not that it is used well: see power, and tokens.",
            "percentunit",
            {_LEGEND: _by_gpu("gpu_utilization")},
        ),
        lines(
            "Power",
            "Near the card's limit while prompts are prefilled; decode draws less, since it waits for memory.",
            "watt",
            {_LEGEND: _by_gpu("gpu_power_watts")},
        ),
    ]


def _temperature_and_faults(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of temperature, faults and throttling."""
    faults = f"sum by ({_BY_GPU}, kind) ({select(metrics.PREFIX + 'gpu_faults', OF_POD)})"
    no_fault = f"0 * sum by ({_BY_GPU}) ({select(metrics.PREFIX + 'gpu_info', OF_POD)})"
    throttled = f"sum by ({_BY_GPU}, reason) ({select(metrics.PREFIX + 'gpu_throttled', OF_POD)})"
    return [
        lines(
            "Temperature",
            "Below the card's slowdown threshold, mostly 85 to 90 degrees.",
            "celsius",
            {_LEGEND: _by_gpu("gpu_temperature_celsius")},
            runbook=thresholds.runbook("GPUThrottled"),
        ),
        lines(
            "Faults at present",
            "None. A fatal one takes its replica out of rotation.",
            "short",
            {f"{_LEGEND} {{{{kind}}}}": f'{faults} or label_replace({no_fault}, "kind", "none", "", "")'},
            top=1.0,
            counts=True,
            runbook=thresholds.runbook("GPUXidFatal"),
        ),
        lines(
            "Slowed down",
            "Never: 1 while heat or a weak power supply slows the GPU; all GPUs of its replica then wait for it.",
            "short",
            {f"{_LEGEND} {{{{reason}}}}": throttled},
            top=1.0,
            counts=True,
            runbook=thresholds.runbook("GPUThrottled"),
        ),
    ]


def _ecc_errors_and_nvml(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of uncorrectable ECC errors and of whether NVML answers."""
    return [
        lines(
            "Uncorrectable memory errors",
            "None since the driver was loaded.",
            "short",
            {_LEGEND: _by_gpu("gpu_ecc_uncorrected_errors")},
            top=1.0,
            counts=True,
            runbook=thresholds.runbook("GPUECCErrors"),
        ),
        lines(
            "NVML answers",
            "1. Without it faults stay unseen, though the engine may work on.",
            "short",
            {"{{pod}}": f"min by (namespace, pod) ({select(metrics.PREFIX + 'nvml_up', OF_POD)})"},
            runbook=thresholds.runbook("GPUUnwatched"),
        ),
    ]


def _output_per_gpu() -> Panel:
    """Return the panel of each replica's output tokens per second and GPU."""
    tokens = f"sum by (namespace, pod) (rate({select(metrics.GENERATION_TOKENS, OF_POD)}[{RATE}]))"
    gpus = f"max by (namespace, pod) ({select(metrics.PREFIX + 'planned_gpus', OF_POD)})"
    return lines(
        "Output of a GPU",
        "What a GPU earns; compare it with the same model and lengths on another day.",
        TOKENS_PER_SECOND,
        {"{{pod}}": f"{tokens} / ({gpus} > 0)"},
    )


def _dcgm_profiling() -> list[Panel]:
    """Return the panels of tensor core activity, memory bandwidth usage and NVLink traffic."""
    nvlink = f"sum by (Hostname, gpu) (rate({metrics.DCGM_NVLINK}{{{_OF_DCGM}}}[{RATE}]))"
    return [
        lines(
            "Tensor cores at work",
            "High in prefill. Low in decode is normal: it is bound by memory.",
            "percentunit",
            {_DCGM_LEGEND: _dcgm(metrics.DCGM_TENSOR_ACTIVE)},
        ),
        lines(
            "Memory interface at work",
            "High in decode: 70 to 90 % is as fast as the card goes.",
            "percentunit",
            {_DCGM_LEGEND: _dcgm(metrics.DCGM_DRAM_ACTIVE)},
        ),
        lines(
            "NVLink traffic",
            "With tensor parallelism it follows the load; nothing at all means that peers talk over PCIe.",
            "short",
            {_DCGM_LEGEND: nvlink},
        ),
    ]


def _dcgm_utilization_and_power() -> list[Panel]:
    """Return DCGM's panels of GPU utilization, memory usage and power."""
    used, free = _dcgm(metrics.DCGM_MEMORY_USED), _dcgm(metrics.DCGM_MEMORY_FREE)
    return [
        lines(
            "Time with any kernel at work, by DCGM",
            "As ours above, for GPUs that no replica of ours uses too.",
            "percent",
            {_DCGM_LEGEND: _dcgm(metrics.DCGM_UTILIZATION)},
        ),
        lines("Memory in use, by DCGM", "As ours above.", "percentunit", {_DCGM_LEGEND: f"{used} / ({used} + {free})"}),
        lines("Power, by DCGM", "As ours above.", "watt", {_DCGM_LEGEND: _dcgm(metrics.DCGM_POWER)}),
    ]


def _dcgm_temperature_and_faults(thresholds: Thresholds) -> list[Panel]:
    """Return DCGM's panels of temperature and of the last Xid error."""
    return [
        lines("Temperature, by DCGM", "As ours above.", "celsius", {_DCGM_LEGEND: _dcgm(metrics.DCGM_TEMPERATURE)}),
        lines(
            "The last Xid error, by DCGM",
            "0. It stays at the last one's number for ever, so no alert reads it: ours count.",
            "short",
            {_DCGM_LEGEND: _dcgm(metrics.DCGM_XID)},
            runbook=thresholds.runbook("GPUXidFatal"),
        ),
    ]


def _by_gpu(name: str) -> str:
    """Return the query for one of the prober's metrics by GPU."""
    return f"max by ({_BY_GPU}) ({select(metrics.PREFIX + name, OF_POD)})"


def _dcgm(name: str) -> str:
    """Return the query for one of DCGM's metrics by GPU."""
    return f"max by (Hostname, gpu) ({name}{{{_OF_DCGM}}})"
