"""The GPUs: from our own reading of NVML, which is always there, and more from NVIDIA's DCGM exporter where it runs."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import OF_POD, RATE, Row, lines, select
from vllm_monitoring.thresholds import Thresholds

UID = "vllm-gpus"
_GPU = "{{pod}} GPU {{gpu}}"
_DCGM = "{{Hostname}} GPU {{gpu}}"
_OF_DCGM = 'pod=~"$pod|", namespace=~"$namespace|"'
"""DCGM's exporter names the pod that uses a GPU, where it can: not with time slicing, NVIDIA/dcgm-exporter#151."""


def build(thresholds: Thresholds) -> str:
    """The dashboard's JSON."""
    each = "namespace, pod, gpu"
    none = f"0 * sum by ({each}) ({select(metrics.PREFIX + 'gpu_info', OF_POD)})"
    faults = f"sum by ({each}, kind) ({select(metrics.PREFIX + 'gpu_faults', OF_POD)})"
    tokens = f"sum by (namespace, pod) (rate({select(metrics.GENERATION_TOKENS, OF_POD)}[{RATE}]))"
    gpus = f"max by (namespace, pod) ({select(metrics.PREFIX + 'planned_gpus', OF_POD)})"

    def gpu(name: str) -> str:
        return f"max by ({each}) ({select(metrics.PREFIX + name, OF_POD)})"

    def dcgm(name: str) -> str:
        return f"max by (Hostname, gpu) ({name}{{{_OF_DCGM}}})"

    ours = [
        lines(
            "Memory in use",
            "Flat from the end of the start on: vLLM takes all that it will need. A step up is somebody else.",
            "percentunit",
            {_GPU: f"{gpu('gpu_memory_used_bytes')} / {gpu('gpu_memory_total_bytes')}"},
        ),
        lines(
            "Time with any kernel at work",
            "Near 100 % under load. It says that the GPU is not idle, not that it is used well: see power, and tokens.",
            "percentunit",
            {_GPU: gpu("gpu_utilization")},
        ),
        lines(
            "Power",
            "Near the card's limit while prompts are prefilled; decode draws less, since it waits for memory.",
            "watt",
            {_GPU: gpu("gpu_power_watts")},
        ),
        lines(
            "Temperature",
            "Below the card's slowdown threshold, mostly 85 to 90 degrees.",
            "celsius",
            {_GPU: gpu("gpu_temperature_celsius")},
            runbook=thresholds.runbook("GPUThrottled"),
        ),
        lines(
            "Faults at present",
            "None. A fatal one takes its replica out of rotation.",
            "short",
            {f"{_GPU} {{{{kind}}}}": f'{faults} or label_replace({none}, "kind", "none", "", "")'},
            top=1.0,
            counts=True,
            runbook=thresholds.runbook("GPUXidFatal"),
        ),
        lines(
            "Slowed down",
            "Never: 1 while heat or a weak power supply slows the GPU; all GPUs of its replica then wait for it.",
            "short",
            {
                f"{_GPU} {{{{reason}}}}": (
                    f"sum by ({each}, reason) ({select(metrics.PREFIX + 'gpu_throttled', OF_POD)})"
                )
            },
            top=1.0,
            counts=True,
            runbook=thresholds.runbook("GPUThrottled"),
        ),
        lines(
            "Uncorrectable memory errors",
            "None since the driver was loaded.",
            "short",
            {_GPU: gpu("gpu_ecc_uncorrected_errors")},
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
        lines(
            "Output of a GPU",
            "What a GPU earns; compare it with the same model and lengths on another day.",
            panels.TOKENS_PER_SECOND,
            {"{{pod}}": f"{tokens} / ({gpus} > 0)"},
        ),
    ]
    used = dcgm(metrics.DCGM_MEMORY_USED)
    profiled = [
        lines(
            "Tensor cores at work",
            "High in prefill. Low in decode is normal: it is bound by memory.",
            "percentunit",
            {_DCGM: dcgm(metrics.DCGM_TENSOR_ACTIVE)},
        ),
        lines(
            "Memory interface at work",
            "High in decode: 70 to 90 % is as fast as the card goes.",
            "percentunit",
            {_DCGM: dcgm(metrics.DCGM_DRAM_ACTIVE)},
        ),
        lines(
            "NVLink traffic",
            "With tensor parallelism it follows the load; nothing at all means that peers talk over PCIe.",
            "short",
            {_DCGM: f"sum by (Hostname, gpu) (rate({metrics.DCGM_NVLINK}{{{_OF_DCGM}}}[{RATE}]))"},
        ),
        lines(
            "Time with any kernel at work, by DCGM",
            "As ours above, for GPUs that no replica of ours uses too.",
            "percent",
            {_DCGM: dcgm(metrics.DCGM_UTILIZATION)},
        ),
        lines(
            "Memory in use, by DCGM",
            "As ours above.",
            "percentunit",
            {_DCGM: f"{used} / ({used} + {dcgm(metrics.DCGM_MEMORY_FREE)})"},
        ),
        lines("Power, by DCGM", "As ours above.", "watt", {_DCGM: dcgm(metrics.DCGM_POWER)}),
        lines("Temperature, by DCGM", "As ours above.", "celsius", {_DCGM: dcgm(metrics.DCGM_TEMPERATURE)}),
        lines(
            "The last Xid error, by DCGM",
            "0. It stays at the last one's number for ever, so no alert reads it: ours count.",
            "short",
            {_DCGM: dcgm(metrics.DCGM_XID)},
            runbook=thresholds.runbook("GPUXidFatal"),
        ),
    ]
    return panels.board(
        UID,
        "vLLM / GPUs",
        "How busy, full, hot and healthy the GPUs are.",
        [Row("From NVML, by the prober", ours), Row("From DCGM's exporter, where it runs", profiled, folded=True)],
        pods=True,
    )
