"""Every change that an error suggests is one that the planner accepts: each is fed back as a user would write it."""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from pathlib import Path

import msgspec
import pytest
from builders import model, tensor

from vllm_launch.decide import plan_request
from vllm_launch.errors import UsageError
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.cpu import Cpu
from vllm_launch.machine.gpus import Hardware, alike
from vllm_launch.model.model import Model
from vllm_launch.model.read import read_model
from vllm_launch.plan.alternatives import ANY_SPLIT, nothing_fits, unsafe_utilization
from vllm_launch.plan.choose import choose
from vllm_launch.plan.fit import NoFit
from vllm_launch.plan.plan import Plan, plan
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings
from vllm_launch.sizing.parallel import Layout
from vllm_launch.units import GIB

MODELS = Path(__file__).parents[2] / "data" / "models"
PARALLEL_SIZES = {"--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size"}


@cache
def published(name: str) -> Model:
    return read_model(str(MODELS / name))


def together(*names: str) -> Hardware:
    """Return one machine with the GPUs of several catalogue names, without links between them."""
    gpus = [gpu for name in names for gpu in parse_hardware_name(name).gpus]
    numbered = tuple(msgspec.structs.replace(gpu, index=n, uuid=f"GPU-{n}") for n, gpu in enumerate(gpus))
    none = tuple((False,) * len(gpus) for _ in gpus)
    return Hardware(gpus=numbered, nvlink=none, p2p=none)


def planned(flags: dict[str, str], hardware: Hardware, of: Model) -> Plan:
    words = [word for flag, value in flags.items() for word in (flag, value)]
    return plan(plan_request(read_settings(parse_flags(["m", *words]), {})), hardware, of)


def suggested(error: UsageError) -> list[str]:
    start, colon, changes = error.remedy.partition("makes it fit: ")
    return changes.split("; or ") if (colon and "any of these changes" in start) or start == "this change " else []


def with_change(change: str, flags: dict[str, str], hardware: Hardware) -> tuple[dict[str, str], Hardware]:
    """Return the flags and the machine after the user has made ``change``, as its words say."""
    flags = dict(flags)
    if change == "remove the parallel sizes that you set" or change.endswith(ANY_SPLIT):
        flags = {flag: value for flag, value in flags.items() if flag not in PARALLEL_SIZES}
        change = change.removesuffix(ANY_SPLIT).removeprefix("remove the parallel sizes that you set").strip()
    if change.startswith("remove --"):
        del flags[change.removeprefix("remove ")]
        return flags, hardware
    if machine := re.match(r"(\d+) x (.+?)(?= with |$)", change):
        hardware = parse_hardware_name(f"{machine[2]}:{machine[1]}")
        change = change[machine.end() :].removeprefix(" with ")
    words = change.split()
    flags |= dict(zip(words[::2], words[1::2], strict=True))
    return flags, hardware


MACHINES = {
    "T4": together("T4"),
    "RTX 3090": together("RTX 3090"),
    "3090 and 4090": together("RTX 3090", "RTX 4090"),
    "two L4 and an A10G": together("L4:2", "A10G"),
    "L40S": parse_hardware_name("L40S:2"),
    "MIG": parse_hardware_name("H100-2g.20gb:2"),
    "H100": parse_hardware_name("H100"),
    "GB10": parse_hardware_name("GB10"),
}
FLAGS: dict[str, dict[str, str]] = {
    "no flags": {},
    "fp8 and a length": {"--quantization": "fp8", "--max-model-len": "8192"},
    "length": {"--max-model-len": "32768"},
    "half": {"--gpu-memory-utilization": "0.5"},
    "one GPU": {"--tensor-parallel-size": "1", "--data-parallel-size": "1"},
    "three GPUs": {"--tensor-parallel-size": "3"},
    "sixteen GPUs": {"--tensor-parallel-size": "8", "--pipeline-parallel-size": "2"},
    "cache": {"--kv-cache-memory-bytes": "60G"},
    "bfloat16": {"--dtype": "bfloat16"},
}
LARGE = (
    "google--gemma-3-27b-it", "Qwen--Qwen3-30B-A3B", "meta-llama--Meta-Llama-3-70B", "openai--gpt-oss-20b",
)  # fmt: skip


@pytest.mark.parametrize(("machine", "flags"), [*product(MACHINES, FLAGS)])
def test_the_planner_accepts_each_change_that_it_suggests(machine: str, flags: str) -> None:
    for name in LARGE:
        try:
            planned(FLAGS[flags], MACHINES[machine], published(name))
        except UsageError as error:
            for change in suggested(error):
                assert planned(*with_change(change, FLAGS[flags], MACHINES[machine]), published(name)), change


QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600,
    "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


def test_a_pair_of_different_gpus_is_offered_tensor_parallelism_over_both_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(QWEN3_32B))
    with pytest.raises(UsageError) as caught:
        planned(FLAGS["fp8 and a length"], MACHINES["3090 and 4090"], read_model(str(tmp_path)))
    assert suggested(caught.value)[0] == "--tensor-parallel-size 2"
    result = planned(
        FLAGS["fp8 and a length"] | {"--tensor-parallel-size": "2"},
        MACHINES["3090 and 4090"],
        read_model(str(tmp_path)),
    )
    assert len(alike(result.gpus)) == 2


def test_a_model_whose_batch_holds_a_whole_prompt_is_offered_a_shorter_length_before_other_gpus() -> None:
    weights = tuple(tensor(f"model.layers.{n}.self_attn.o_proj.weight", 4096, 48_000) for n in range(32))
    whole = model(chunked_prefill=False, max_model_len=131_072, task="pooling", tensors=weights)
    with pytest.raises(UsageError) as caught:
        planned({}, MACHINES["RTX 3090"], whole)
    length = suggested(caught.value)[0].removeprefix("--max-model-len ")
    assert 2048 <= int(length) < 131_072
    assert planned({"--max-model-len": length}, MACHINES["RTX 3090"], whole).max_model_len == int(length)
    with pytest.raises(UsageError):
        planned({"--max-model-len": str(2 * int(length))}, MACHINES["RTX 3090"], whole)


@pytest.mark.parametrize("flags", [{}, {"--gpu-memory-utilization": "0.5"}])
def test_the_parts_that_a_refusal_names_add_up_to_what_is_missing(flags: dict[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        planned(flags, MACHINES["RTX 3090"], published("meta-llama--Meta-Llama-3-70B"))
    lacks, *parts, available = (float(size) for size in re.findall(r"([\d.]+) GiB", caught.value.problem))
    assert sum(parts) - available == pytest.approx(lacks, abs=0.03)


def test_gpus_that_are_too_old_do_not_make_a_suggestion_fit() -> None:
    old = msgspec.structs.replace(
        parse_hardware_name("A100-80GB").gpus[0], compute_capability=(7, 0), index=1, uuid="1"
    )
    new = parse_hardware_name("T4").gpus[0]
    machine = Hardware(gpus=(new, old))
    refused = [NoFit(layout=Layout(), why="much", missing=GIB)]
    request = plan_request(read_settings(parse_flags(["m", "--gpu-memory-utilization", "0.1"]), {}))
    llama = published("meta-llama--Meta-Llama-3-8B")
    assert "remove --gpu-memory-utilization" not in suggested(nothing_fits(request, machine, (new,), llama, refused))
    young = msgspec.structs.replace(old, compute_capability=(8, 0))
    both = Hardware(gpus=(new, young))
    assert "remove --gpu-memory-utilization" in suggested(nothing_fits(request, both, both.gpus, llama, refused))


def test_the_length_that_a_small_cpu_is_offered_is_accepted() -> None:
    cpu = Cpu(cores=8, memory_total=64 * GIB, memory_limit=None, memory_available=19 * GIB)
    machine, llama = Hardware(gpus=(), cpu=cpu), published("meta-llama--Meta-Llama-3-8B")
    with pytest.raises(UsageError) as caught:
        planned({"--max-model-len": "8192", "--kv-cache-memory-bytes": "256M"}, machine, llama)
    [longest] = re.findall(r"set --max-model-len (\d+)", caught.value.remedy)
    assert planned({"--max-model-len": longest, "--kv-cache-memory-bytes": "256M"}, machine, llama)


@pytest.mark.parametrize("utilization", ["0.985", "0.99"])
def test_the_utilization_that_a_warning_suggests_is_accepted(utilization: str) -> None:
    suggestions = []
    for gib in range(60, 79, 2):
        names = [f"model.layers.{n}.self_attn.o_proj.weight" for n in range(32)]
        of = model(tensors=tuple(tensor(name, round(gib * GIB / 2 / 4096 / 32), 4096) for name in names))
        try:
            warnings = planned({"--gpu-memory-utilization": utilization}, MACHINES["H100"], of).warnings
        except UsageError:
            continue
        for suggestion in re.findall(r"safety margin .*: set at most ([\d.]+)$", "\n".join(warnings), re.MULTILINE):
            assert planned({"--gpu-memory-utilization": suggestion}, MACHINES["H100"], of)
            suggestions.append(suggestion)
    assert len(suggestions) > 4


def test_a_utilization_that_leaves_no_room_for_the_model_is_not_suggested() -> None:
    request = plan_request(read_settings(parse_flags(["m", "--gpu-memory-utilization", "0.9"]), {}))
    chosen = choose(request, MACHINES["H100"], MACHINES["H100"].gpus, model())[0]
    assert chosen is not None
    for safe, remedy in (
        (0.8, "set at most 0.8"),
        (0.01, "use more or larger GPUs"),
        (-0.1, "use more or larger GPUs"),
    ):
        lower = msgspec.structs.replace(chosen, safe_utilization=safe)
        [warning] = unsafe_utilization(request, MACHINES["H100"], model(), lower)
        assert warning.endswith(remedy)
