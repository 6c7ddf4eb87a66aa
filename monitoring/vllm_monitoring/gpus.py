"""The GPU dashboard: the prober's NVML metrics, and those of NVIDIA's DCGM exporter if it is installed."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import OF_POD, RATE, TOKENS_PER_SECOND, Panel, Row, line_panel, select
from vllm_monitoring.thresholds import Thresholds

UID = "vllm-gpus"
_BY_GPU = "namespace, pod, gpu"
_LEGEND = "{{pod}} GPU {{gpu}}"
_DCGM_LEGEND = "{{Hostname}} GPU {{gpu}}"
_OF_DCGM = 'pod=~"$pod|", namespace=~"$namespace|"'
"""Selects DCGM series of the chosen pods, and series without a pod.

With time slicing the exporter does not name the pod that uses a GPU (NVIDIA/dcgm-exporter#151).
"""


def build(thresholds: Thresholds) -> str:
    """Return the dashboard's JSON."""
    nvml = [
        *_utilization_and_power(),
        *_temperature_and_faults(thresholds),
        *_ecc_errors_and_nvml(thresholds),
        _output_per_gpu(),
    ]
    dcgm = [*_dcgm_profiling(), *_dcgm_utilization_and_power(), *_dcgm_temperature_and_faults(thresholds)]
    return panels.dashboard_json(
        UID,
        "vLLM / GPUs",
        "Utilization, memory, temperature and faults of the GPUs.",
        [Row("NVML, read by the prober", nvml), Row("DCGM exporter, if installed", dcgm, collapsed=True)],
        pods=True,
    )


def _utilization_and_power() -> list[Panel]:
    """Return the panels of memory usage, GPU utilization and power."""
    return [
        line_panel(
            "GPU memory usage",
            "Share of each GPU's memory that all processes together use. Normal: flat after start-up, near the plan's "
            "gpu-memory-utilization, because vLLM allocates its memory at start-up. Look when: it rises later. Then "
            "another process uses the GPU.",
            "percentunit",
            {_LEGEND: f"{_by_gpu('gpu_memory_used_bytes')} / {_by_gpu('gpu_memory_total_bytes')}"},
        ),
        line_panel(
            "GPU utilization",
            "Share of time in which a kernel runs on the GPU. Normal: near 100 % under load. It does not show how "
            "much of the GPU the kernel uses. For that see the panels 'Power' and 'Output throughput per GPU'.",
            "percentunit",
            {_LEGEND: _by_gpu("gpu_utilization")},
        ),
        line_panel(
            "Power",
            "Power draw of each GPU. Normal: near the card's power limit during prefill, and lower during decode, "
            "because memory bandwidth limits decode.",
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
        line_panel(
            "Temperature",
            "Temperature of each GPU's core. Normal: below the card's slowdown threshold, which is usually 85 to 90 "
            "°C. Runbook: GPUThrottled.",
            "celsius",
            {_LEGEND: _by_gpu("gpu_temperature_celsius")},
            runbook=thresholds.runbook("GPUThrottled"),
        ),
        line_panel(
            "Current GPU faults",
            "1 for each fault of a GPU, by kind. An Xid error stays until the prober restarts. Normal: 0. With a fatal "
            "fault the replica is not ready. Runbook: GPUXidFatal.",
            "short",
            {f"{_LEGEND} {{{{kind}}}}": f'{faults} or label_replace({no_fault}, "kind", "none", "", "")'},
            top=1.0,
            counts=True,
            runbook=thresholds.runbook("GPUXidFatal"),
        ),
        line_panel(
            "Throttling",
            "1 while heat or the power supply slows the GPU down, by reason. Normal: 0. Look when: it is 1. Then all "
            "GPUs of the replica wait for this GPU. Runbook: GPUThrottled.",
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
        line_panel(
            "Uncorrectable ECC errors",
            "Uncorrectable ECC errors since the driver was loaded. Normal: 0. Look when: the number rises. Runbook: "
            "GPUECCErrors.",
            "short",
            {_LEGEND: _by_gpu("gpu_ecc_uncorrected_errors")},
            top=1.0,
            counts=True,
            runbook=thresholds.runbook("GPUECCErrors"),
        ),
        line_panel(
            "NVML up",
            "1 while NVML answers the prober, else 0. Normal: 1. Without a GPU it is 0. Look when: it is 0 with a "
            "GPU. Then the prober cannot see GPU faults, but the engine may still work. Runbook: GPUUnwatched.",
            "short",
            {"{{pod}}": f"min by (namespace, pod) ({select(metrics.PREFIX + 'nvml_up', OF_POD)})"},
            runbook=thresholds.runbook("GPUUnwatched"),
        ),
    ]


def _output_per_gpu() -> Panel:
    """Return the panel of each replica's output tokens per second and per GPU."""
    tokens = f"sum by (namespace, pod) (rate({select(metrics.GENERATION_TOKENS, OF_POD)}[{RATE}]))"
    gpus = f"max by (namespace, pod) ({select(metrics.PREFIX + 'planned_gpus', OF_POD)})"
    return line_panel(
        "Output throughput per GPU",
        "Generated tokens per second and per GPU, for each replica. Normal: about the same at equal load. Compare it "
        "only with times when model, prompt lengths and output lengths were the same.",
        TOKENS_PER_SECOND,
        {"{{pod}}": f"{tokens} / ({gpus} > 0)"},
    )


def _dcgm_profiling() -> list[Panel]:
    """Return the panels of tensor core activity, memory bandwidth usage and NVLink traffic."""
    nvlink = f"sum by (Hostname, gpu) (rate({metrics.DCGM_NVLINK}{{{_OF_DCGM}}}[{RATE}]))"
    return [
        line_panel(
            "Tensor core activity",
            "Share of time in which the tensor cores compute. Normal: high during prefill, and low during decode, "
            "because memory bandwidth limits decode.",
            "percentunit",
            {_DCGM_LEGEND: _dcgm(metrics.DCGM_TENSOR_ACTIVE)},
        ),
        line_panel(
            "Memory bandwidth usage",
            "Share of the GPU's memory bandwidth that is in use. Normal: high during decode. No card reaches more "
            "than 70 to 90 %.",
            "percentunit",
            {_DCGM_LEGEND: _dcgm(metrics.DCGM_DRAM_ACTIVE)},
        ),
        line_panel(
            "NVLink traffic",
            "NVLink traffic of each GPU. Normal: with tensor parallelism it follows the load, and with one GPU per "
            "replica it is 0. Look when: it is 0 with tensor parallelism under load. Then the GPUs communicate over "
            "PCIe.",
            "short",
            {_DCGM_LEGEND: nvlink},
        ),
    ]


def _dcgm_utilization_and_power() -> list[Panel]:
    """Return DCGM's panels of GPU utilization, memory usage and power."""
    used, free = _dcgm(metrics.DCGM_MEMORY_USED), _dcgm(metrics.DCGM_MEMORY_FREE)
    return [
        line_panel(
            "GPU utilization (DCGM)",
            "Share of time in which a kernel runs on the GPU, also for GPUs that no replica uses. Normal: near 100 % "
            "under load.",
            "percent",
            {_DCGM_LEGEND: _dcgm(metrics.DCGM_UTILIZATION)},
        ),
        line_panel(
            "GPU memory usage (DCGM)",
            "Share of each GPU's memory that is in use, also for GPUs that no replica uses. Normal: flat after "
            "start-up.",
            "percentunit",
            {_DCGM_LEGEND: f"{used} / ({used} + {free})"},
        ),
        line_panel(
            "Power (DCGM)",
            "Power draw of each GPU, also of GPUs that no replica uses. Normal: near the card's power limit during "
            "prefill, and lower during decode.",
            "watt",
            {_DCGM_LEGEND: _dcgm(metrics.DCGM_POWER)},
        ),
    ]


def _dcgm_temperature_and_faults(thresholds: Thresholds) -> list[Panel]:
    """Return DCGM's panels of temperature and of the last Xid error."""
    return [
        line_panel(
            "Temperature (DCGM)",
            "Temperature of each GPU's core, also of GPUs that no replica uses. Normal: below the card's slowdown "
            "threshold, which is usually 85 to 90 °C.",
            "celsius",
            {_DCGM_LEGEND: _dcgm(metrics.DCGM_TEMPERATURE)},
        ),
        line_panel(
            "Last Xid error (DCGM)",
            "Number of the last Xid error of each GPU. Normal: 0. The number stays after the error, so no alert uses "
            "it. Runbook: GPUXidFatal.",
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
