"""A plan and a machine on paper: the contract for programs, the picture for people."""

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
    "one": parse_hardware_name("L4"),
    "eight": parse_hardware_name("H100:8"),
    "recorded": load_hardware(DATA / "hardware" / "nvml-h200-x4.json"),
    "cpu": Hardware(gpus=(), cpu=CPU),
}


@functools.cache
def planned(machine: str = "eight", words: str = "", model: Path = LLAMA, **asked: Any) -> PlanWithCommand:
    return commanded(plan(PlanRequest(**asked), MACHINES[machine], read_model(str(model))), words)


def commanded(decided: Plan, words: str = "") -> PlanWithCommand:
    settings = read_settings(parse_flags(["/models/with space", *shlex.split(words)]), {})
    argv = engine_command(decided.options, settings, python="python3", vllm_distribution="vllm")
    return with_command(decided, settings, argv, {})


def fields(value: Any) -> Any:
    return {key: fields(one) for key, one in value.items()} if isinstance(value, dict) else type(value).__name__


# ---- for programs


@pytest.mark.parametrize("machine", MACHINES)
def test_the_json_has_exactly_the_fields_of_the_contract(machine: str) -> None:
    found = json.loads(plan_as(planned(machine), MACHINES[machine], "json"))
    env, options, gpus = found.pop("env"), found.pop("options"), found.pop("gpus")
    reasons, rejected = found["reasons"], found["rejected"]
    assert fields(found) == {
        "model": "str", "objective": "str", "tensor_parallel_size": "int", "pipeline_parallel_size": "int",
        "data_parallel_size": "int", "gpus_per_replica": "int", "gpu_memory_utilization": "float", "max_model_len": "int",
        "max_num_seqs": "int", "max_num_batched_tokens": "int", "watermark": "float",
        "kv_cache": {"dtype": "str", "bytes": "int", "tokens": "int", "bytes_per_token": "int"},
        "memory": {"weights": "int", "activation_peak": "int", "cuda_graphs": "int", "non_torch": "int", "context": "int", "safety": "int"},
        "argv": "list", "reasons": "list", "rejected": "list", "warnings": "list",
    }  # fmt: skip
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in env.items())
    assert all(isinstance(word, str) for word in [*found["argv"], *found["warnings"]])
    assert reasons
    assert all(reason.keys() == {"field", "value", "why", "source", "origin"} for reason in reasons)
    assert options.keys() <= {reason["field"] for reason in reasons}
    assert all(gpu.keys() == {*Gpu.__struct_fields__} for gpu in gpus)
    assert all(one.keys() == {"plan", "why"} for one in rejected)


def test_every_plan_that_was_not_taken_has_its_reason() -> None:
    found = json.loads(plan_as(planned(model=LARGE), MACHINES["eight"], "json"))
    assert found["rejected"]
    assert all(one["plan"] and one["why"] for one in found["rejected"])


@pytest.mark.parametrize("machine", MACHINES)
def test_the_yaml_says_what_the_json_says_in_the_same_order(machine: str) -> None:
    shown = planned(machine)
    from_json = json.loads(plan_as(shown, MACHINES[machine], "json"))
    from_yaml = yaml.safe_load(plan_as(shown, MACHINES[machine], "yaml"))
    assert from_yaml == from_json
    assert list(from_yaml) == list(from_json) == list(PlanWithCommand.__struct_fields__)


@pytest.mark.parametrize("how", ["table", "json", "yaml"])
def test_every_format_ends_with_one_newline(how: Any) -> None:
    text = plan_as(planned(), MACHINES["eight"], how)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


# ---- for people


def bar(text: str) -> tuple[str, dict[str, str]]:
    """What stands between the brackets, and the legend: size by letter."""
    drawn = re.search(r"^  \[(.*)\]$", text, re.MULTILINE)
    assert drawn
    legend = re.findall(r"^   (\S) (.*?)  +([\d.]+ [MG]iB)$", text, re.MULTILINE)
    return drawn[1], {letter: size for letter, _, size in legend}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_bar_is_of_one_width_and_has_every_part_of_its_legend_in_order(machine: str) -> None:
    drawn, legend = bar(plan_as(planned(machine), MACHINES[machine], "table"))
    assert len(drawn) == BAR
    assert list(dict.fromkeys(drawn)) == list(legend)
    assert {"W", "K", "s"} <= set(legend)
    assert drawn == "".join(sorted(drawn, key=list(legend).index))  # each part is one piece


def test_parts_are_drawn_to_scale() -> None:
    memory = planned("one").memory
    drawn, legend = bar(plan_as(planned("one"), MACHINES["one"], "table"))
    share = memory.weights / MACHINES["one"].gpus[0].memory_total
    assert drawn.count("W") == pytest.approx(BAR * share, abs=1)
    assert legend["W"] == f"{memory.weights / GIB:.2f} GiB"


def test_what_others_hold_is_drawn_too() -> None:
    machine = MACHINES["one"]
    shared = msgspec.structs.replace(machine.gpus[0], memory_free=machine.gpus[0].memory_free - 2 * GIB)
    machine = msgspec.structs.replace(machine, gpus=(shared,))
    decided = plan(PlanRequest(), machine, read_model(str(LLAMA)))
    drawn, legend = bar(plan_as(commanded(decided), machine, "table"))
    assert legend["x"] == "2.00 GiB"
    assert drawn.startswith("x" * round(BAR * 2 / (machine.gpus[0].memory_total / GIB)))


@given(st.lists(st.integers(1, 1 << 50), min_size=1, max_size=9))
def test_any_parts_fill_the_bar_and_each_is_seen(sizes: list[int]) -> None:
    columns = _scaled([("p", "part", size) for size in sizes])
    assert sum(columns) == BAR
    assert min(columns) >= 1


def pasted(table: str) -> list[str]:
    """The words that a shell makes of the table's last paragraph."""
    command = table.rstrip("\n").rpartition("\n\n")[2]
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {command.lstrip()}"], capture_output=True, text=True, check=True
    )
    assert shlex.split(command.replace("\\\n", "")) == done.stdout.split("\0")[:-1]
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("width", [40, 80, 100, 300])
def test_the_command_line_that_is_shown_is_the_one_that_runs(width: int) -> None:
    given = """--chat-template '{% if "a" %}\n{{ x }}' --api-key k --served-model-name "it's" b"""
    shown = planned(words=given)
    words = pasted(plan_as(shown, MACHINES["eight"], "table", width))
    assert words == [*(f"{name}={value}" for name, value in shown.env.items()), *shown.argv]
    assert {"/models/with space", "it's"} <= {*words}


def test_the_environment_stands_before_the_command_as_a_shell_takes_it() -> None:
    shown = msgspec.structs.replace(planned(), env={"NCCL_P2P_DISABLE": "1", "X": "a b"})
    words = pasted(plan_as(shown, MACHINES["eight"], "table"))
    assert words == ["NCCL_P2P_DISABLE=1", "X=a b", *shown.argv]


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_table_says_all_that_the_json_says(width: int) -> None:
    shown = msgspec.structs.replace(planned(model=LARGE), warnings=["beware of " + "very " * 40 + "much"])
    text = plan_as(shown, MACHINES["eight"], "table", width)
    unwrapped = " ".join(text.split())
    for reason in shown.reasons:
        assert re.search(rf"^  {reason.field} ", text, re.MULTILINE)
    assert shown.rejected
    for one in shown.rejected:
        assert re.search(rf"^  {one.plan} ", text, re.MULTILINE)
    assert "warning: " + " ".join(shown.warnings[0].split()) in unwrapped


def test_numbers_are_grouped_but_words_and_truths_are_not() -> None:
    text = plan_as(planned(max_model_len=8192), MACHINES["eight"], "table")
    assert re.search(r"^  max_model_len +8,192 ", text, re.MULTILINE)


def test_a_plan_for_the_cpu_names_the_cpu_and_draws_its_memory() -> None:
    text = plan_as(planned("cpu"), MACHINES["cpu"], "table")
    assert "on the CPU (16 cores, 60.00 GiB of memory available)" in text
    assert "memory, 60.00 GiB" in text
    assert "CUDA" not in bar(text)[1]


# ---- which GPUs


def test_a_plan_carries_the_gpus_that_it_uses_in_vllms_order() -> None:
    machine = MACHINES["eight"]
    assert planned(tensor_parallel_size=2, data_parallel_size=1).gpus == machine.gpus[:2]
    full = [msgspec.structs.replace(gpu, memory_free=gpu.memory_free - 40 * GIB) for gpu in machine.gpus[:6]]
    busy = msgspec.structs.replace(machine, gpus=(*full, *machine.gpus[6:]))
    found = plan(PlanRequest(tensor_parallel_size=2, data_parallel_size=1), busy, read_model(str(LLAMA)))
    assert found.gpus == machine.gpus[6:]
    assert found.env["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_a_slice_is_named_by_its_uuid() -> None:
    machine = parse_hardware_name("A100-80GB-3g.40gb:2")
    found = plan(PlanRequest(), machine, read_model(str(LLAMA)))
    assert found.env["CUDA_VISIBLE_DEVICES"] == found.gpus[0].uuid


# ---- a machine


def test_the_machines_table_names_gpus_links_driver_and_cpu() -> None:
    text = hardware_table(msgspec.structs.replace(MACHINES["recorded"], cpu=CPU))
    assert text.startswith("driver 580.159.04, CUDA up to 13.0\n")
    assert text.count("NVIDIA H200  139.80 GiB  139.80 GiB  9.0") == 4
    assert "NVLink joins 6 of 6 pairs; 6 can copy to each other directly" in text
    assert "CPU: 16 cores; memory: 60.00 GiB of 64.00 GiB available, no limit" in text


def test_faults_neighbours_and_warnings_are_told_of_the_gpu_that_has_them() -> None:
    gpu = msgspec.structs.replace(
        MACHINES["one"].gpus[0],
        processes=(GpuProcess(pid=7, name="other", memory=GIB), GpuProcess(pid=8, name="hidden", memory=None)),
        faults=("row remapping failed: replace the GPU",),
    )
    text = hardware_table(Hardware(gpus=(gpu,), driver="580.1", warnings=("GPU 1 is left out: gone",)))
    assert "  GPU 0 is used by other (pid 7) 1.00 GiB, hidden (pid 8)\n" in text
    assert "  GPU 0: row remapping failed: replace the GPU\n" in text
    assert text.endswith("warning: GPU 1 is left out: gone\n")
    assert text.startswith("driver 580.1\n")
    assert "NVLink" not in text  # one GPU has nobody to be joined to


def test_a_machine_without_gpus_and_with_a_limit_says_so() -> None:
    nodes = (*CPU.numa_nodes, msgspec.structs.replace(CPU.numa_nodes[0], index=1))
    cpu = msgspec.structs.replace(CPU, memory_limit=8 * GIB, numa_nodes=nodes)
    text = hardware_table(Hardware(gpus=(), cpu=cpu))
    assert text.startswith("  no GPU\n")
    assert "16 cores, 2 NUMA nodes; memory: 60.00 GiB of 64.00 GiB available, limit 8.00 GiB" in text


def test_links_that_nobody_told_of_are_not_claimed() -> None:
    unknown = msgspec.structs.replace(MACHINES["eight"], nvlink=(), p2p=())
    assert "NVLink" not in hardware_table(unknown)
    half = msgspec.structs.replace(MACHINES["eight"], p2p=())
    assert "28 of 28 pairs; 0 can copy" in hardware_table(half)
