"""Tests of the reports of a plan and of a machine: JSON and YAML for programs, tables for people."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from builders import GIB
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.cpu import Cpu, NumaNode
from vllm_launch.machine.gpus import Gpu, GpuProcess, Hardware
from vllm_launch.machine.hardware_file import load_hardware
from vllm_launch.model.read import read_model
from vllm_launch.plan.plan import Plan, PlanWithCommand, plan
from vllm_launch.plan.reason import Reason, Source
from vllm_launch.plan.request import PlanRequest
from vllm_launch.report.machine_table import hardware_table
from vllm_launch.report.plan_table import BAR, _scaled, plan_as
from vllm_launch.serve.command import engine_command, with_command
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings

DATA = Path(__file__).parents[2] / "data"
LARGE = DATA / "models" / "meta-llama--Meta-Llama-3-70B"
LLAMA = DATA / "models" / "meta-llama--Meta-Llama-3-8B"
CPU = Cpu(
    cores=16,
    numa_nodes=(NumaNode(index=0, cores=16, memory_total=64 * GIB, memory_available=60 * GIB),),
    memory_total=64 * GIB,
    memory_available=60 * GIB,
    memory_limit=None,
)
MACHINES = {
    "L4": parse_hardware_name("L4"),
    "H100:8": parse_hardware_name("H100:8"),
    "recorded": load_hardware(DATA / "hardware" / "nvml-h200-x4.json"),
    "cpu": Hardware(gpus=(), cpu=CPU),
}


@functools.cache
def planned(machine: str = "H100:8", words: str = "", model: Path = LLAMA, **request: Any) -> PlanWithCommand:
    return commanded(plan(PlanRequest(**request), MACHINES[machine], read_model(str(model))), words)


def commanded(decided: Plan, words: str = "") -> PlanWithCommand:
    settings = read_settings(parse_flags(["/models/with space", *shlex.split(words)]), {})
    argv = engine_command(decided.options, settings, python="python3", vllm_distribution="vllm")
    return with_command(decided, settings, argv, {})


def fields(value: Any) -> Any:
    return {key: fields(item) for key, item in value.items()} if isinstance(value, dict) else type(value).__name__


# ---- for programs


@pytest.mark.parametrize("machine", MACHINES)
def test_the_json_has_exactly_the_documented_fields(machine: str) -> None:
    document = json.loads(plan_as(planned(machine), MACHINES[machine], "json"))
    env, options, gpus = document.pop("env"), document.pop("options"), document.pop("gpus")
    reasons, rejected_plans = document["reasons"], document["rejected"]
    assert fields(document) == {
        "model": "str", "objective": "str", "tensor_parallel_size": "int", "pipeline_parallel_size": "int",
        "data_parallel_size": "int", "gpus_per_replica": "int", "gpu_memory_utilization": "float", "max_model_len": "int",
        "max_num_seqs": "int", "max_num_batched_tokens": "int", "watermark": "float",
        "kv_cache": {"dtype": "str", "bytes": "int", "tokens": "int", "bytes_per_token": "int"},
        "memory": {"weights": "int", "activation_peak": "int", "cuda_graphs": "int", "non_torch": "int", "context": "int", "safety": "int", "encoder": "int"},
        "argv": "list", "reasons": "list", "rejected": "list", "warnings": "list",
    }  # fmt: skip
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in env.items())
    assert all(isinstance(word, str) for word in [*document["argv"], *document["warnings"]])
    assert reasons
    assert all(reason.keys() == {"field", "value", "why", "source", "origin"} for reason in reasons)
    assert options.keys() <= {reason["field"] for reason in reasons}
    assert all(gpu.keys() == {*Gpu.__struct_fields__} for gpu in gpus)
    assert all(rejected.keys() == {"plan", "why"} for rejected in rejected_plans)


def test_every_rejected_plan_has_a_reason() -> None:
    rejected_plans = json.loads(plan_as(planned(model=LARGE), MACHINES["H100:8"], "json"))["rejected"]
    assert rejected_plans
    assert all(rejected["plan"] and rejected["why"] for rejected in rejected_plans)


@pytest.mark.parametrize("machine", MACHINES)
def test_yaml_and_json_have_the_same_fields_in_the_same_order(machine: str) -> None:
    shown = planned(machine)
    from_json = json.loads(plan_as(shown, MACHINES[machine], "json"))
    from_yaml = yaml.safe_load(plan_as(shown, MACHINES[machine], "yaml"))
    assert from_yaml == from_json
    assert list(from_yaml) == list(from_json) == list(PlanWithCommand.__struct_fields__)


@pytest.mark.parametrize("output_format", ["table", "json", "yaml"])
def test_every_format_ends_with_one_newline(output_format: Any) -> None:
    text = plan_as(planned(), MACHINES["H100:8"], output_format)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


# ---- for people


def bar(text: str) -> tuple[str, dict[str, str]]:
    """Return the bar between the brackets, and the legend: sizes by letter."""
    drawn = re.search(r"^  \[(.*)\]$", text, re.MULTILINE)
    assert drawn
    legend = re.findall(r"^   (\S) (.*?)  +([\d.]+ [MG]iB)$", text, re.MULTILINE)
    return drawn[1], {letter: size for letter, _, size in legend}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_bar_has_a_fixed_width_and_every_part_of_its_legend_in_order(machine: str) -> None:
    drawn, legend = bar(plan_as(planned(machine), MACHINES[machine], "table"))
    assert len(drawn) == BAR
    assert list(dict.fromkeys(drawn)) == list(legend)
    assert {"W", "K", "s"} <= set(legend)
    assert drawn == "".join(sorted(drawn, key=list(legend).index))  # the columns of each part are adjacent


def test_parts_are_drawn_to_scale() -> None:
    memory = planned("L4").memory
    drawn, legend = bar(plan_as(planned("L4"), MACHINES["L4"], "table"))
    share = memory.weights / MACHINES["L4"].gpus[0].memory_total
    assert drawn.count("W") == pytest.approx(BAR * share, abs=1)
    assert legend["W"] == f"{memory.weights / GIB:.2f} GiB"


def test_memory_of_other_processes_is_drawn() -> None:
    machine = MACHINES["L4"]
    shared = msgspec.structs.replace(machine.gpus[0], memory_free=machine.gpus[0].memory_free - 2 * GIB)
    machine = msgspec.structs.replace(machine, gpus=(shared,))
    decided = plan(PlanRequest(), machine, read_model(str(LLAMA)))
    drawn, legend = bar(plan_as(commanded(decided), machine, "table"))
    assert legend["x"] == "2.00 GiB"
    assert drawn.startswith("x" * round(BAR * 2 / (machine.gpus[0].memory_total / GIB)))


@given(st.lists(st.integers(1, 1 << 50), min_size=1, max_size=9))
def test_any_parts_fill_the_bar_and_each_has_a_column(sizes: list[int]) -> None:
    columns = _scaled([("p", "part", size) for size in sizes])
    assert sum(columns) == BAR
    assert min(columns) >= 1


def pasted(table: str) -> list[str]:
    """Return the words that a shell reads from the table's last paragraph, which is the command line."""
    command = table.rstrip("\n").rpartition("\n\n")[2]
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {command.lstrip()}"], capture_output=True, text=True, check=True
    )
    assert shlex.split(command.replace("\\\n", "")) == done.stdout.split("\0")[:-1]
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("width", [40, 80, 100, 300])
def test_the_shown_command_line_is_the_one_that_runs(width: int) -> None:
    options = """--chat-template '{% if "a" %}\n{{ x }}' --api-key k --served-model-name "it's" b"""
    shown = planned(words=options)
    words = pasted(plan_as(shown, MACHINES["H100:8"], "table", width))
    assert words == [*(f"{name}={value}" for name, value in shown.env.items()), *shown.argv]
    assert {"/models/with space", "it's"} <= {*words}


def test_the_environment_precedes_the_command_in_shell_syntax() -> None:
    shown = msgspec.structs.replace(planned(), env={"NCCL_P2P_DISABLE": "1", "X": "a b"})
    words = pasted(plan_as(shown, MACHINES["H100:8"], "table"))
    assert words == ["NCCL_P2P_DISABLE=1", "X=a b", *shown.argv]


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_table_has_all_reasons_rejected_plans_and_warnings(width: int) -> None:
    shown = msgspec.structs.replace(planned(model=LARGE), warnings=["beware of " + "very " * 40 + "much"])
    text = plan_as(shown, MACHINES["H100:8"], "table", width)
    unwrapped = " ".join(text.split())
    for reason in shown.reasons:
        assert re.search(rf"^  {reason.field} ", text, re.MULTILINE)
    assert shown.rejected
    for rejected in shown.rejected:
        assert re.search(rf"^  {rejected.plan} ", text, re.MULTILINE)
    assert "warning: " + " ".join(shown.warnings[0].split()) in unwrapped


def test_integers_have_thousands_separators() -> None:
    text = plan_as(planned(max_model_len=8192), MACHINES["H100:8"], "table")
    assert re.search(r"^  max_model_len +8,192 ", text, re.MULTILINE)


def test_the_table_of_a_plan_for_the_cpu_names_it_and_draws_its_memory() -> None:
    text = plan_as(planned("cpu"), MACHINES["cpu"], "table")
    assert "on the CPU (16 cores, 60.00 GiB of memory available)" in text
    assert "memory, 60.00 GiB" in text
    assert "CUDA" not in bar(text)[1]


# ---- which GPUs


def test_a_plan_has_the_gpus_that_it_uses_in_vllms_order() -> None:
    machine = MACHINES["H100:8"]
    assert planned(tensor_parallel_size=2, data_parallel_size=1).gpus == machine.gpus[:2]
    busy_gpus = [msgspec.structs.replace(gpu, memory_free=gpu.memory_free - 40 * GIB) for gpu in machine.gpus[:6]]
    busy_machine = msgspec.structs.replace(machine, gpus=(*busy_gpus, *machine.gpus[6:]))
    decided = plan(PlanRequest(tensor_parallel_size=2, data_parallel_size=1), busy_machine, read_model(str(LLAMA)))
    assert decided.gpus == machine.gpus[6:]
    assert decided.env["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_cuda_visible_devices_has_the_uuid_of_a_mig_slice() -> None:
    machine = parse_hardware_name("A100-80GB-3g.40gb:2")
    decided = plan(PlanRequest(), machine, read_model(str(LLAMA)))
    assert decided.env["CUDA_VISIBLE_DEVICES"] == decided.gpus[0].uuid


# ---- a machine


def test_the_machine_table_has_gpus_links_driver_and_cpu() -> None:
    text = hardware_table(msgspec.structs.replace(MACHINES["recorded"], cpu=CPU))
    assert text.startswith("driver 580.159.04, CUDA up to 13.0\n")
    assert text.count("NVIDIA H200  139.80 GiB  139.80 GiB  9.0") == 4
    assert "NVLink connects 6 of 6 GPU pairs; 6 pairs can copy directly (P2P)" in text
    assert "CPU: 16 cores; memory: 60.00 GiB of 64.00 GiB available, no limit" in text


def test_the_machine_table_has_faults_other_processes_and_warnings() -> None:
    gpu = msgspec.structs.replace(
        MACHINES["L4"].gpus[0],
        processes=(GpuProcess(pid=7, name="other", memory=GIB), GpuProcess(pid=8, name="hidden", memory=None)),
        faults=("row remapping failed: replace the GPU",),
    )
    text = hardware_table(Hardware(gpus=(gpu,), driver="580.1", warnings=("GPU 1 is left out: gone",)))
    assert "  GPU 0 is used by other (pid 7) 1.00 GiB, hidden (pid 8)\n" in text
    assert "  GPU 0: row remapping failed: replace the GPU\n" in text
    assert text.endswith("warning: GPU 1 is left out: gone\n")
    assert text.startswith("driver 580.1\n")
    assert "NVLink" not in text  # a single GPU has no links


def test_the_machine_table_of_a_cpu_machine_has_numa_nodes_and_the_memory_limit() -> None:
    nodes = (*CPU.numa_nodes, msgspec.structs.replace(CPU.numa_nodes[0], index=1))
    cpu = msgspec.structs.replace(CPU, memory_limit=8 * GIB, numa_nodes=nodes)
    text = hardware_table(Hardware(gpus=(), cpu=cpu))
    assert text.startswith("  no GPU\n")
    assert "16 cores, 2 NUMA nodes; memory: 60.00 GiB of 64.00 GiB available, limit 8.00 GiB" in text


def test_unknown_links_are_not_counted() -> None:
    unknown = msgspec.structs.replace(MACHINES["H100:8"], nvlink=(), p2p=())
    assert "NVLink" not in hardware_table(unknown)
    unknown_p2p = msgspec.structs.replace(MACHINES["H100:8"], p2p=())
    assert "28 of 28 GPU pairs; 0 pairs can copy" in hardware_table(unknown_p2p)


def test_an_option_that_the_plan_leaves_out_with_a_reason_is_shown_as_not_set() -> None:
    decided = planned("L4")
    reason = Reason(field="reasoning_parser", value=None, why="thinking is off by default", source=Source.MODEL)
    shown = plan_as(msgspec.structs.replace(decided, reasons=[reason]), MACHINES["L4"], "table", 120)
    assert "reasoning_parser  not set  model       thinking is off by default" in shown
