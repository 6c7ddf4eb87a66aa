"""Which changes are suggested if nothing fits, in which order, and for which machines."""

from __future__ import annotations

import msgspec
import pytest
from builders import GIB, gpu, model, quantized, tensor

from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.gpus import Gpu, Hardware
from vllm_launch.plan.alternatives import _changes, _with_gpus, nothing_fits
from vllm_launch.plan.fit import NoFit
from vllm_launch.plan.request import PlanRequest
from vllm_launch.sizing.parallel import Layout

H100 = gpu(total=80 * GIB, free=79 * GIB, name="NVIDIA H100 80GB HBM3")
A100 = gpu(total=80 * GIB, free=79 * GIB, capability=(8, 0), name="NVIDIA A100-SXM4-80GB")
LARGER = ["1 x A100-80GB", "1 x H200", "1 x B200"]
COUNTS = (2, 4, 8, 16)


def machine(*gpus: Gpu, linked: bool = True) -> Hardware:
    matrix = tuple(tuple(linked and a != b for b in range(len(gpus))) for a in range(len(gpus)))
    return Hardware(gpus=gpus, nvlink=matrix, p2p=matrix)


def changes(request, *gpus, of=None, longest=0):
    hardware = machine(*gpus)
    return {
        change.text: (change.request, change.hardware)
        for change in _changes(request, hardware, gpus, of or model(), longest)
    }


def larger_machines(card: Gpu) -> list[str]:
    """Return the changes of hardware that are suggested on a machine with one ``card``, in their order."""
    more = [f"{count} x {card.name}" for count in COUNTS]
    larger = [f"{count} x {name}" for count in COUNTS for name in ("A100-80GB", "H200", "B200")]
    return [*more, *LARGER, *(f"{name} with --quantization fp8" for name in more), *larger]


def test_cheap_changes_come_before_larger_machines():
    request = PlanRequest(gpu_memory_utilization=0.5, kv_cache_memory_bytes=GIB)
    first = list(changes(request, H100, longest=512))
    assert first[:6] == [
        "remove --gpu-memory-utilization", "remove --kv-cache-memory-bytes", "--max-model-len 512", "--kv-cache-dtype fp8",
        "--quantization fp8", "--quantization fp8 --kv-cache-dtype fp8",
    ]  # fmt: skip
    assert first[6:] == larger_machines(H100)
    short = model(max_model_len=2048)
    assert list(changes(PlanRequest(), A100, of=short)) == ["--quantization fp8", *larger_machines(A100)]


def test_gpus_of_different_kinds_are_used_together_before_options_that_lose_something():
    both = list(changes(PlanRequest(), A100, H100, longest=512))
    assert both[:3] == ["--tensor-parallel-size 2", "--pipeline-parallel-size 2", "--max-model-len 512"]
    assert both.index("--tensor-parallel-size 2 --quantization fp8") < both.index(f"4 x {A100.name}")
    assert "--tensor-parallel-size 2" not in changes(PlanRequest(), H100, H100)  # the plan has tried it
    assert "--tensor-parallel-size 3" in changes(PlanRequest(), H100, H100, A100)
    assert "--tensor-parallel-size 2" not in changes(PlanRequest(), H100, H100, A100)
    assert "--tensor-parallel-size 2" not in changes(PlanRequest(tensor_parallel_size=1), A100, H100)


def test_each_change_changes_what_it_says_and_nothing_else():
    request = PlanRequest(
        gpu_memory_utilization=0.5, kv_cache_memory_bytes=GIB, tensor_parallel_size=2, pipeline_parallel_size=3,
        data_parallel_size=4,
    )  # fmt: skip
    found = changes(request, H100, H100, longest=512)
    replace = msgspec.structs.replace
    free = replace(request, tensor_parallel_size=None, pipeline_parallel_size=None, data_parallel_size=None)
    expected = {
        "remove --gpu-memory-utilization": replace(request, gpu_memory_utilization=None),
        "remove --kv-cache-memory-bytes": replace(request, kv_cache_memory_bytes=None),
        "--max-model-len 512": replace(request, max_model_len=512),
        "--kv-cache-dtype fp8": replace(request, kv_cache_dtype="fp8"),
        "--quantization fp8": replace(request, quantization="fp8"),
        "--quantization fp8 --kv-cache-dtype fp8": replace(request, quantization="fp8", kv_cache_dtype="fp8"),
        "remove the parallel sizes that you set": free,
        f"4 x {H100.name}": request,
        f"4 x {H100.name} without the parallel sizes that you set": free,
        "2 x H200": request,
        "2 x H200 without the parallel sizes that you set": free,
        f"4 x {H100.name} with --quantization fp8": replace(request, quantization="fp8"),
    }
    assert {name: found[name][0] for name in expected} == expected
    assert {len(larger.gpus) for name, (_, larger) in found.items() if name.startswith(f"4 x {H100.name}")} == {4}
    assert [one.name for one in found["2 x H200"][1].gpus] == ["NVIDIA H200"] * 2
    assert f"2 x {H100.name}" not in found  # they are there already


def test_a_gpu_that_is_part_of_a_processor_is_not_multiplied():
    alone = changes(PlanRequest(), msgspec.structs.replace(H100, unified=True))
    assert not [name for name in alone if H100.name in name]
    assert "2 x H200" in alone


@pytest.mark.parametrize(
    ("request_", "of", "card", "missing"),
    [
        (PlanRequest(kv_cache_dtype="fp8"), None, H100, "--kv-cache-dtype fp8"),
        (PlanRequest(), None, A100, "--kv-cache-dtype fp8"),
        (PlanRequest(quantization="awq"), None, H100, "--quantization fp8"),
        (PlanRequest(), model(quantization=quantized("awq")), H100, "--quantization fp8"),
        (PlanRequest(), None, H100, "remove the parallel sizes that you set"),
    ],
)
def test_what_is_set_or_not_possible_is_not_suggested(request_, of, card, missing):
    found = changes(request_, card, of=of)
    assert missing not in found
    assert any("with --quantization fp8" in name for name in found) == (missing != "--quantization fp8")


@pytest.mark.parametrize(
    ("request_", "card"),
    [(PlanRequest(kv_cache_dtype="auto"), H100), (PlanRequest(), gpu(capability=(8, 9), name="NVIDIA L40S"))],
)
def test_an_fp8_cache_is_suggested_from_ada_on_if_the_user_set_none(request_, card):
    assert "--kv-cache-dtype fp8" in changes(request_, card)


def test_mig_slices_are_not_multiplied():
    assert not [
        name for name in changes(PlanRequest(), msgspec.structs.replace(H100, mig_profile="3g.40gb")) if "these" in name
    ]


@pytest.mark.parametrize("linked", [True, False])
def test_more_gpus_are_like_the_first_and_linked_as_the_first_two_are(linked):
    larger = _with_gpus(machine(H100, H100, linked=linked), H100, 3)
    assert [one.index for one in larger.gpus] == [0, 1, 2]
    assert len({one.uuid for one in larger.gpus}) == 3
    assert {one.name for one in larger.gpus} == {H100.name}
    expected = tuple(tuple(linked and a != b for b in range(3)) for a in range(3))
    assert larger.nvlink == larger.p2p == expected
    alone = _with_gpus(Hardware(gpus=(H100,), nvlink=(), p2p=()), H100, 2)
    assert alone.nvlink == alone.p2p == ((False, False), (False, False))


def no_fit(tensor_size, why, missing=None, longest=0):
    return NoFit(layout=Layout(tensor=tensor_size), why=why, missing=missing, longest=longest)


HUGE = model(tensors=(tensor("model.layers.0.self_attn.o_proj.weight", 1 << 30, 4096),))
"""Weights of 8 TiB, which no suggested machine holds."""


def test_the_error_names_the_plan_that_lacks_least():
    missed = [no_fit(1, "much", 9 * GIB), no_fit(2, "little", GIB), no_fit(3, "refused")]
    error = nothing_fits(PlanRequest(), machine(H100, A100), (H100, A100), HUGE, missed)
    assert error.where == "made-up on 1 x NVIDIA H100 80GB HBM3, 1 x NVIDIA A100-SXM4-80GB"
    assert error.problem == "TP=2: little"
    assert error.remedy == "no small change makes it fit: use a smaller model or larger GPUs"
    assert (
        nothing_fits(PlanRequest(), machine(H100), (H100,), HUGE, [no_fit(4, "nothing", 0), *missed]).problem
        == "TP=4: nothing"
    )


def test_if_memory_is_not_the_reason_the_first_three_refusals_are_named():
    missed = [no_fit(size, f"no {size}") for size in (2, 3, 3, 4, 5)]
    error = nothing_fits(PlanRequest(), machine(H100), (H100,), HUGE, missed)
    assert (error.where, error.problem) == ("made-up on 1 x NVIDIA H100 80GB HBM3", "TP=2: no 2; TP=3: no 3")
    assert error.remedy == "change the options that you set, or remove them so that the plan chooses"
    error = nothing_fits(PlanRequest(tensor_parallel_size=2), machine(H100), (H100,), HUGE, [])
    problem = (
        "the parallel sizes that you set need more GPUs (2) than this machine has (1), and a plan is for one machine"
    )
    assert error.problem == problem
    mig = msgspec.structs.replace(H100, mig_profile="7g.80gb")
    error = nothing_fits(PlanRequest(tensor_parallel_size=2), machine(mig), (mig,), HUGE, [])
    assert error.problem.endswith("need more GPUs (2) than a vLLM instance can use here: one MIG slice")


def test_the_smallest_number_of_gpus_that_is_enough_is_suggested_once():
    names = [f"model.layers.{n}.self_attn.o_proj.weight" for n in range(32)]
    large = model(tensors=tuple(tensor(name, 420_000, 4096) for name in names))  # 102 GiB
    error = nothing_fits(PlanRequest(quantization="awq"), machine(H100), (H100,), large, [no_fit(1, "much", GIB)])
    assert error.remedy == "any of these changes makes it fit: 2 x NVIDIA H100 80GB HBM3; or 1 x H200; or 1 x B200"


def test_a_single_change_is_suggested_as_one():
    request = PlanRequest(tensor_parallel_size=3)
    error = nothing_fits(request, machine(H100), (H100,), model(), [no_fit(3, "refused")])
    assert error.remedy == "this change makes it fit: remove the parallel sizes that you set"


def test_more_gpus_of_a_larger_kind_are_suggested_if_one_is_not_enough():
    names = [f"model.layers.{n}.self_attn.o_proj.weight" for n in range(32)]
    large = model(tensors=tuple(tensor(name, 620_000, 4096) for name in names))  # 151 GiB
    request = PlanRequest(quantization="awq", kv_cache_dtype="fp8")
    mig = msgspec.structs.replace(H100, mig_profile="7g.80gb")
    error = nothing_fits(request, machine(mig), (mig,), large, [no_fit(1, "much", GIB)])
    assert error.remedy == "any of these changes makes it fit: 1 x B200; or 2 x A100-80GB; or 2 x H200"


def test_sizes_that_the_user_set_are_named_if_no_change_is_enough():
    request = PlanRequest(max_model_len=-1, max_num_seqs=4_000_000, max_num_batched_tokens=4_000_000)
    error = nothing_fits(request, machine(H100), (H100,), HUGE, [no_fit(1, "much", 9 * GIB)])
    assert error.remedy == (
        "no small change makes it fit: use a smaller model or larger GPUs, "
        "or lower --max-num-seqs or --max-num-batched-tokens"
    )


def test_a_reason_that_all_splits_share_is_said_once_and_without_a_split():
    splits = [Layout(data=2), Layout(pipeline=2), Layout(tensor=2)]
    whys = ["too old", "too old; few layers", "too old"]
    no_fits = [NoFit(layout=layout, why=why) for layout, why in zip(splits, whys, strict=True)]
    error = nothing_fits(PlanRequest(), machine(A100, A100), (A100, A100), model(), no_fits)
    assert error.problem == f"too old; {splits[1].title}: few layers"
    one = nothing_fits(PlanRequest(), machine(A100), (A100,), model(), [NoFit(layout=Layout(), why="too old")])
    assert one.problem == f"{Layout().title}: too old"


def test_a_small_mig_slice_is_offered_larger_slices_and_the_whole_gpu_before_other_gpus():
    [small] = parse_hardware_name("H100-1g.10gb").gpus
    names = [name for name in changes(PlanRequest(), small, of=model(max_model_len=2048)) if name.startswith("1 x ")]
    assert names.index("1 x H100-2g.20gb") < names.index("1 x H100-3g.40gb") < names.index("1 x H100")
    assert names.index("1 x H100") < names.index("1 x A100-80GB")
