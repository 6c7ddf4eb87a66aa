"""Tests of the GPUs and the split that a plan chooses, and of its reasons and warnings."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from builders import CHUNKED, DEEPSEEK, EXPERTS, FULL, GIB, SLIDING, STATE, model, placed, quantized, run, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_launch import units
from vllm_launch.engine.options import options
from vllm_launch.errors import UsageError
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.cpu import Cpu, NumaNode
from vllm_launch.machine.generation import Generation, generation_of
from vllm_launch.machine.gpus import Gpu, GpuProcess, Hardware
from vllm_launch.model.read import read_model
from vllm_launch.plan.plan import Plan, plan
from vllm_launch.plan.reason import Source
from vllm_launch.plan.request import PlanRequest, dtype_of, without_windows
from vllm_launch.sizing import memory
from vllm_launch.sizing.parallel import Layout


def sized(gib, *, layers=32, **changes):
    """Return a model of Llama-3-8B's shape with ``gib`` GiB of weights, in matrices that tensor parallelism splits."""
    count = layers if isinstance(layers, int) else len(layers)
    names = [f"model.layers.{n}.self_attn.o_proj.weight" for n in range(count)]
    tensors = tuple(tensor(name, round(gib * GIB / 2 / 4096 / count), 4096) for name in names)
    return model(layers=layers, tensors=tensors, **changes)


def machine(count=1, *, total=80, free=None, linked=True, name="NVIDIA H100 80GB HBM3", capability=(9, 0), **changes):
    """Return GPUs of ``total`` GiB.

    ``free`` is in GiB, one number for all GPUs or a list. ``linked`` is whether NVLink joins all pairs, or a set of pairs.
    """
    frees = free if isinstance(free, list) else [total if free is None else free] * count
    gpus = tuple(
        Gpu(
            index=n,
            uuid=f"GPU-{n}",
            name=name,
            memory_total=total * GIB,
            memory_free=int(frees[n] * GIB),
            compute_capability=capability,
        )
        for n in range(count)
    )
    pairs = linked if isinstance(linked, set) else {(a, b) for a in range(count) for b in range(count) if linked}
    matrix = tuple(tuple(a != b and ((a, b) in pairs or (b, a) in pairs) for b in range(count)) for a in range(count))
    return Hardware(gpus=gpus, nvlink=matrix, p2p=matrix, **changes)


NO_ESTIMATE = {"VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0"}
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
ALONE = NO_ESTIMATE | EXPANDABLE
"""The environment of a plan whose GPUs run whole layers alone."""
"""Environment of a plan that reserves the memory of CUDA graphs itself."""


def sizes(result):
    return result.tensor_parallel_size, result.pipeline_parallel_size, result.data_parallel_size


def reason(result, field):
    [match] = [reason for reason in result.reasons if reason.field == field]
    return match


def refusal(*arguments):
    with pytest.raises(UsageError) as caught:
        plan(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- how many GPUs a replica gets


@pytest.mark.parametrize(
    ("weights", "count", "expected"),
    [
        (16, 1, (1, 1, 1)),
        (16, 4, (1, 1, 4)),
        (16, 8, (1, 1, 8)),
        (100, 2, (2, 1, 1)),
        (100, 4, (2, 1, 2)),
        (100, 8, (2, 1, 4)),
        (200, 8, (4, 1, 2)),
        (500, 8, (8, 1, 1)),
    ],
)
def test_a_replica_gets_the_fewest_gpus_that_fit_and_the_other_gpus_become_replicas(weights, count, expected):
    result = plan(PlanRequest(), machine(count), sized(weights))
    assert sizes(result) == expected
    assert result.gpus_per_replica == expected[0] * expected[1]
    assert result.env == (ALONE if expected[0] == 1 else NO_ESTIMATE)


def test_the_reason_for_the_gpus_of_a_replica_says_when_it_got_spare_gpus_too():
    fewest = reason(plan(PlanRequest(), machine(4), sized(100)), "tensor_parallel_size").why
    assert fewest.startswith("a replica has 2 GPUs, the smallest number that holds the weights and a useful KV cache")
    enlarged = plan(PlanRequest(), machine(3), sized(100))
    assert enlarged.gpus_per_replica == 3
    why = reason(enlarged, "tensor_parallel_size").why
    assert why.startswith("2 GPUs hold the weights and a useful KV cache")
    assert "The spare GPUs are too few for another replica, so they enlarge the KV cache" in why
    assert "smallest number" not in why
    with_stages = plan(PlanRequest(pipeline_parallel_size=2), machine(4), sized(16))
    why = reason(with_stages, "tensor_parallel_size").why
    assert why.startswith("with the parallel sizes that you set, a replica has 2 GPUs, the smallest number that holds")


def test_objective_latency_chooses_the_largest_tensor_parallel_size_that_the_heads_allow():
    assert sizes(plan(PlanRequest(objective="latency"), machine(8), sized(16))) == (8, 1, 1)
    assert sizes(plan(PlanRequest(objective="latency"), machine(8), sized(16, heads=20, kv_heads=20))) == (4, 1, 2)
    assert sizes(plan(PlanRequest(objective="latency"), machine(6), sized(16))) == (4, 1, 1)


def test_a_kv_cache_is_useful_from_sixteen_short_requests_on():
    result = plan(PlanRequest(), machine(2), sized(72))
    assert sizes(result) == (2, 1, 1)
    [rejected] = result.rejected
    assert rejected.plan == "TP=1 DP=2"
    assert "fewer than 16 requests of 2,048" in rejected.why
    roomier = plan(PlanRequest(), machine(2), sized(68))
    assert sizes(roomier) == (1, 1, 2)
    assert roomier.kv_cache.tokens >= 16 * 2048


def test_a_short_length_is_named_once_and_windows_are_counted_for_short_requests():
    def cache(**changes):
        result = plan(PlanRequest(), machine(1), sized(16, **changes))
        return next(reason.why for reason in result.reasons if reason.field == "kv_cache")

    assert cache(max_model_len=448).endswith("requests of 448 tokens")
    windows = (*[msgspec.structs.replace(CHUNKED, window=8192)] * 24, *[FULL] * 8)
    dense, chunked = (
        int(re.search(r"or ([\d,]+) of 2,048", cache(**kind))[1].replace(",", ""))
        for kind in ({"max_model_len": 131_072}, {"max_model_len": 131_072, "layers": windows})
    )
    assert abs(dense - chunked) < dense / 50


def test_a_large_safety_margin_names_its_largest_part_and_the_options_that_lower_it():
    def why(**changes):
        result = plan(PlanRequest(**changes.pop("request", {})), machine(1, total=140), sized(16, **changes))
        return next(reason.why for reason in result.reasons if reason.field == "gpu_memory_utilization")

    windows = {"layers": (SLIDING,) * 24 + (FULL,) * 8, "max_model_len": 1_048_576}
    assert "of the margin" not in why()
    text = why(**windows, request={"max_num_seqs": 8192})
    assert text.endswith(
        "are for block tables. For a larger KV cache lower max_num_seqs (8,192) or max_model_len (1,048,576)"
    )
    assert "are for sampling. For a larger KV cache lower max_num_seqs (8,192)" in why(request={"max_num_seqs": 8192})


def test_a_useful_kv_cache_holds_one_request_of_the_models_full_length():
    long = sized(60, max_model_len=200_000)
    result = plan(PlanRequest(), machine(2), long)
    assert sizes(result) == (2, 1, 1)
    assert result.max_model_len == 200_000
    assert "max_model_len is cut to" in result.rejected[0].why


def test_a_replica_is_a_pipeline_over_pcie_and_tensor_parallel_over_nvlink():
    assert sizes(plan(PlanRequest(), machine(4, linked=False), sized(200))) == (1, 4, 1)
    assert sizes(plan(PlanRequest(), machine(4, linked=True), sized(200))) == (4, 1, 1)
    assert sizes(plan(PlanRequest(objective="latency"), machine(4, linked=False), sized(200))) == (4, 1, 1)
    unknown = msgspec.structs.replace(machine(2), nvlink=(), p2p=())
    assert sizes(plan(PlanRequest(), unknown, sized(100))) == (1, 2, 1)
    for result in (plan(PlanRequest(), machine(4, linked=False), sized(200)), plan(PlanRequest(), unknown, sized(100))):
        assert "NVLink does not join them" in reason(result, "pipeline_parallel_size").why


def test_the_reason_for_a_pipeline_over_nvlink_names_the_refused_tensor_parallel_size():
    three = plan(PlanRequest(), machine(3), sized(160))
    assert sizes(three) == (1, 3, 1)
    assert "TP=3 is not possible: 32 attention heads" in reason(three, "pipeline_parallel_size").why


def test_the_stage_with_the_fewest_blocks_limits_the_kv_cache_even_if_another_is_fuller():
    """Three layers on two GPUs. The first stage has two layers. The last stage has one layer and a head of 10 GiB."""
    head = tensor("lm_head.weight", 10 * GIB // 2 // 4096, 4096)
    layers = sized(3, layers=3)
    with_head = msgspec.structs.replace(layers, tensors=(*layers.tensors, head))
    result = plan(PlanRequest(pipeline_parallel_size=2, gpu_memory_utilization=0.9), machine(2), with_head)
    batch, device = run(), machine(2).gpus[0]
    first, last = memory.memory_by_rank(placed(with_head, batch, Layout(pipeline=2), device))
    assert result.memory == last
    page = 16 * 8 * (128 + 128) * 2
    assert result.kv_cache.tokens == 16 * (memory.kv_bytes(first, batch, device, 0.9) // (2 * page))
    assert memory.kv_bytes(last, batch, device, 0.9) // page > result.kv_cache.tokens // 16


def test_a_replica_gets_gpus_that_nvlink_joins():
    result = plan(PlanRequest(), machine(4, linked={(0, 2), (1, 3)}), sized(100))
    assert sizes(result) == (2, 1, 2)
    assert result.env == NO_ESTIMATE | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0,2,1,3"}


def test_spare_gpus_that_are_too_few_for_a_replica_enlarge_the_existing_one():
    result = plan(PlanRequest(), machine(4, linked=False), sized(200, heads=30, kv_heads=30))
    assert result.gpus_per_replica == 4
    assert sizes(plan(PlanRequest(), machine(3), sized(200))) == (1, 3, 1)
    assert plan(PlanRequest(), machine(7), sized(16)).data_parallel_size == 7


def test_splits_that_vllm_refuses_are_rejected_with_the_reason():
    result = plan(PlanRequest(), machine(8), sized(200))
    assert {rejected.plan for rejected in result.rejected} >= {"TP=1 DP=8", "TP=2 DP=4", "TP=3 DP=2"}
    assert next(rejected.why for rejected in result.rejected if rejected.plan == "TP=3 DP=2").startswith(
        "32 attention heads are not"
    )
    assert re.match(r"GPU 0 lacks [\d.]+ GiB", result.rejected[0].why)


def test_expert_parallelism_is_chosen_if_the_experts_intermediate_size_cannot_be_split():
    moe = tuple(msgspec.structs.replace(FULL, moe=True) for _ in range(32))
    block = quantized("fp8", bits=8, block_shape=(128, 128))
    experts = msgspec.structs.replace(EXPERTS, intermediate_size=768)
    names = [f"model.layers.{n}.mlp.experts.0.up_proj.weight" for n in range(32)]
    tensors = tuple(tensor(name, round(100 * GIB / 2 / 4096 / 32), 4096) for name in names)
    mixture = model(layers=moe, tensors=tensors, experts=experts, quantization=block)
    result = plan(PlanRequest(tensor_parallel_size=4), machine(4), mixture)
    assert result.options["enable_expert_parallel"] is True
    assert reason(result, "enable_expert_parallel").source == "model"
    assert "enable_expert_parallel" not in plan(PlanRequest(tensor_parallel_size=2), machine(2), mixture).options
    assert "not a multiple of the FP8 block" in refusal(
        PlanRequest(tensor_parallel_size=4, enable_expert_parallel=False), machine(4), mixture
    )


# ---- which GPUs


def test_a_half_full_gpu_is_not_used_if_it_would_shrink_the_kv_cache_of_the_others():
    result = plan(PlanRequest(), machine(4, free=[80, 80, 80, 30]), sized(16))
    assert sizes(result) == (1, 1, 3)
    assert result.env["CUDA_VISIBLE_DEVICES"] == "0,1,2"
    assert reason(result, "data_parallel_size").why.startswith(
        "3 replicas, 1 GPU each (3 of 4 GPUs used). The plan does not use GPU 3 (so little free memory"
    )


@pytest.mark.parametrize(
    ("plan_request", "hardware", "unused"),
    [
        (PlanRequest(tensor_parallel_size=2), machine(3), "GPU 2 (another replica needs 2 GPUs)"),
        (
            PlanRequest(pipeline_parallel_size=1, tensor_parallel_size=1, data_parallel_size=1),
            machine(3),
            "GPU 1, GPU 2 (you set data_parallel_size to 1)",
        ),
        (
            PlanRequest(),
            parse_hardware_name("H100-3g.40gb:2"),
            "1 other MIG slices or GPUs (with MIG, a vLLM process can use only one of them)",
        ),
    ],
    ids=["too few", "set by the user", "MIG"],
)
def test_the_plan_names_the_gpus_that_it_does_not_use_and_why(plan_request, hardware, unused):
    long = sized(16, max_model_len=2_000_000)  # the KV cache is not useful, so unused GPUs are a warning
    assert f"the plan does not use {unused}" in plan(plan_request, hardware, long).warnings


def test_the_emptiest_gpus_are_chosen():
    result = plan(
        PlanRequest(tensor_parallel_size=2, data_parallel_size=1), machine(4, free=[40, 80, 30, 80]), sized(16)
    )
    assert result.env["CUDA_VISIBLE_DEVICES"] == "1,3"


def test_a_small_difference_of_free_memory_changes_only_the_utilisation():
    result = plan(PlanRequest(), machine(2, free=[79, 80]), sized(16))
    assert sizes(result) == (1, 1, 2)
    assert result.env == ALONE
    assert result.gpu_memory_utilization < plan(PlanRequest(), machine(2), sized(16)).gpu_memory_utilization


def test_memory_of_other_processes_is_not_claimed_and_the_processes_are_named():
    busy = machine(1, free=50)
    gpu = msgspec.structs.replace(busy.gpus[0], processes=(GpuProcess(pid=7, name="jupyter", memory=30 * GIB),))
    result = plan(PlanRequest(), msgspec.structs.replace(busy, gpus=(gpu,)), sized(16))
    assert memory.requested_bytes(gpu, result.gpu_memory_utilization) < gpu.memory_free
    assert any("GPU 0 is shared: 30.00 GiB" in text and "jupyter (pid 7)" in text for text in result.warnings)


def test_faults_of_a_used_gpu_are_warnings():
    healthy = machine(1)
    gpu = msgspec.structs.replace(healthy.gpus[0], faults=("replace the GPU",))
    faulty = msgspec.structs.replace(healthy, gpus=(gpu,))
    assert "GPU 0: replace the GPU" in plan(PlanRequest(), faulty, sized(16)).warnings


def mixed():
    small = machine(2, total=24, name="NVIDIA L4", capability=(8, 9), linked=False).gpus
    large = machine(1).gpus
    gpus = tuple(msgspec.structs.replace(gpu, index=n, uuid=f"GPU-{n}") for n, gpu in enumerate([*small, *large]))
    return Hardware(gpus=gpus)


def test_different_kinds_of_gpus_are_not_mixed_and_the_better_kind_is_chosen():
    result = plan(PlanRequest(), mixed(), sized(16))
    assert (result.gpus_per_replica, result.data_parallel_size) == (1, 1)
    assert result.env == ALONE | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "2"}
    assert reason(result, "data_parallel_size").why == (
        "1 replica, 1 GPU (1 of 3 GPUs used). "
        "The plan does not use GPU 0, GPU 1 (the plan does not mix GPUs of different models or memory sizes)"
    )


def test_different_kinds_of_gpus_are_mixed_if_the_user_needs_more_than_there_are_of_one_kind():
    result = plan(PlanRequest(pipeline_parallel_size=3), mixed(), sized(16, max_model_len=4096))
    assert result.env["CUDA_VISIBLE_DEVICES"].count(",") == 2
    assert result.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_plan_uses_only_one_mig_slice():
    result = plan(PlanRequest(), parse_hardware_name("H100-3g.40gb:2"), sized(16))
    assert sizes(result) == (1, 1, 1)
    assert result.env["CUDA_VISIBLE_DEVICES"] == parse_hardware_name("H100-3g.40gb:2").gpus[0].uuid
    assert "more GPUs" in refusal(PlanRequest(tensor_parallel_size=2), parse_hardware_name("H100-3g.40gb:2"), sized(16))


def test_gpus_without_kernels_are_not_used_and_a_machine_with_only_such_gpus_is_refused():
    old = machine(1, name="Tesla V100", capability=(7, 0)).gpus[0]
    both = Hardware(gpus=(*machine(1).gpus, msgspec.structs.replace(old, index=1, uuid="GPU-1")))
    result = plan(PlanRequest(), both, sized(16))
    assert result.env["CUDA_VISIBLE_DEVICES"] == "0"
    assert any("compute capability 7.0" in text and "does not use this GPU" in text for text in result.warnings)
    assert reason(result, "data_parallel_size").why.endswith("The plan does not use GPU 1 (too old for vLLM)")
    assert "compute capability 7.0" in refusal(PlanRequest(), Hardware(gpus=(old,)), sized(16))


# ---- values that the user sets


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tensor_parallel_size", 2),
        ("pipeline_parallel_size", 2),
        ("data_parallel_size", 1),
        ("gpu_memory_utilization", 0.5),
        ("max_model_len", 4096),
        ("max_num_seqs", 77),
        ("max_num_batched_tokens", 3000),
    ],
)
def test_a_value_that_the_user_sets_is_never_changed(field, value):
    result = plan(PlanRequest(**{field: value}), machine(4), sized(16))
    assert getattr(result, field) == value
    assert field not in result.options
    assert reason(result, field).source == "you"
    fields_of_user = {reason.field for reason in result.reasons if reason.source == "you"}
    assert fields_of_user == {field}


def test_the_plan_chooses_the_parallel_sizes_that_the_user_did_not_set():
    assert sizes(plan(PlanRequest(data_parallel_size=2), machine(8), sized(100))) == (2, 1, 2)
    assert sizes(plan(PlanRequest(tensor_parallel_size=4), machine(8), sized(16))) == (4, 1, 2)
    assert sizes(plan(PlanRequest(pipeline_parallel_size=2), machine(8), sized(16))) == (1, 2, 4)
    text = refusal(PlanRequest(tensor_parallel_size=4, data_parallel_size=4), machine(8), sized(16))
    assert "need more GPUs (16) than this machine has (8), and a plan is for one machine" in text


CPU_MACHINE = Hardware(
    gpus=(), cpu=Cpu(cores=16, memory_total=64 * GIB, memory_limit=None, memory_available=60 * GIB, numa_nodes=())
)


@pytest.mark.parametrize(
    "plan_request",
    [
        PlanRequest(),
        PlanRequest(objective="latency"),
        PlanRequest(fp8_kv=True),
        PlanRequest(max_model_len=-1, watermark=0.1),
        PlanRequest(kv_cache_memory_bytes=GIB),
        PlanRequest(gpu_memory_utilization=0.5),
        PlanRequest(cpu_kv_cache_bytes=GIB),
        PlanRequest(tensor_parallel_size=2, enable_expert_parallel=True),
    ],
)
@pytest.mark.parametrize("hardware", [machine(4, linked=False), machine(1), CPU_MACHINE], ids=["four", "one", "cpu"])
@pytest.mark.parametrize("moe", [False, True])
def test_each_option_of_a_plan_has_a_reason_and_is_an_option_that_the_user_left_open(plan_request, hardware, moe):
    changes = {"layers": 4, "experts": EXPERTS} if moe else {}
    planned_model = sized(8, **changes)
    if moe:
        planned_model = msgspec.structs.replace(planned_model, layers=(msgspec.structs.replace(FULL, moe=True),) * 4)
    if plan_request.enable_expert_parallel and (not moe or len(hardware.gpus) == 1):
        with pytest.raises(UsageError):  # there are no experts, or no second GPU
            plan(plan_request, hardware, planned_model)
        return
    result = plan(plan_request, hardware, planned_model)
    assert result.options.keys() <= options().keys()
    by_field = {reason.field: reason for reason in result.reasons}
    for dest, value in result.options.items():
        assert by_field[dest].value == value
        assert by_field[dest].why
        assert by_field[dest].source is not Source.YOU
        assert getattr(plan_request, dest) is None
    planned = {reason.field for reason in result.reasons if reason.source is not Source.YOU} & options().keys()
    sizes_of_one = {f"{kind}_parallel_size" for kind in ("tensor", "pipeline", "data")} - result.options.keys()
    assert planned - sizes_of_one == result.options.keys()


def test_the_options_of_a_plan_equal_its_fields():
    result = plan(PlanRequest(), machine(4, linked=False), sized(200))
    assert all(getattr(result, dest) == value for dest, value in result.options.items())
    assert "tensor_parallel_size" not in result.options  # 1 is vLLM's default
    assert result.options["pipeline_parallel_size"] == 4


def test_a_length_that_is_cut_is_a_warning():
    result = plan(PlanRequest(), machine(1), sized(60, max_model_len=1_000_000))
    assert 100_000 < result.max_model_len < 200_000
    assert result.kv_cache.tokens >= result.max_model_len
    assert any(text.startswith("max_model_len is cut from the model's limit of 1,000,000") for text in result.warnings)
    assert reason(result, "max_model_len").source == "hardware"
    assert "1,000,000" in reason(result, "max_model_len").why


def test_max_model_len_auto_is_the_longest_request_that_fits():
    auto = plan(PlanRequest(max_model_len=-1), machine(1), sized(60, max_model_len=1_000_000))
    assert auto.max_model_len == plan(PlanRequest(), machine(1), sized(60, max_model_len=1_000_000)).max_model_len
    assert reason(auto, "max_model_len").why == "set by you to auto: the longest request that fits"
    assert "max_model_len" not in auto.options


def test_adapters_make_the_kv_cache_smaller():
    single = plan(PlanRequest(enable_lora=True), machine(1), sized(16))
    many = plan(PlanRequest(enable_lora=True, max_loras=8, max_lora_rank=256), machine(1), sized(16))
    none = plan(PlanRequest(max_loras=8, max_lora_rank=256), machine(1), sized(16))
    assert none.memory == plan(PlanRequest(), machine(1), sized(16)).memory
    per_rank = (single.memory.weights - none.memory.weights) / 16  # one adapter of vLLM's default rank
    assert many.memory.weights - none.memory.weights == 8 * 256 * per_rank > 9 * GIB
    assert many.kv_cache.tokens < single.kv_cache.tokens < none.kv_cache.tokens


def test_a_length_that_the_user_sets_is_never_cut():
    text = refusal(PlanRequest(max_model_len=900_000), machine(1), sized(60, max_model_len=1_000_000))
    assert re.search(
        r"the KV cache lacks [\d.]+ GiB for a request of 900,000 tokens \(the longest that fits: [\d,]+\)", text
    )


def test_a_length_above_the_models_limit_is_refused_unless_the_user_allows_it():
    assert "supports at most 8192 tokens" in refusal(PlanRequest(max_model_len=8193), machine(1), sized(16))
    result = plan(PlanRequest(max_model_len=8193, long_max_model_len=True), machine(1), sized(16))
    assert result.max_model_len == 8193
    assert plan(PlanRequest(max_model_len=8192), machine(1), sized(16)).max_model_len == 8192


def test_an_estimate_of_cuda_graphs_that_costs_much_of_the_kv_cache_is_a_warning():
    def estimate_warnings(plan_request, weights):
        return [
            text
            for text in plan(plan_request, machine(total=79), sized(weights, heads=64)).warnings
            if "an estimate of" in text
        ]

    user_request = PlanRequest(gpu_memory_utilization=0.92)
    (text,) = estimate_warnings(user_request, 61)
    (gpu,) = machine(total=79).gpus
    graphs = [
        memory.memory_of_gpu(placed(sized(61, heads=64), run(estimate_cudagraphs=estimated), Layout(), gpu))
        for estimated in (True, False)
    ]
    estimate, used = (units.gib(parts.cuda_graphs) for parts in graphs)
    assert f"vLLM reserves an estimate of {estimate} for CUDA graphs, but they use only {used}" in text
    assert not estimate_warnings(user_request, 16)  # little of a large cache
    assert not estimate_warnings(PlanRequest(), 61)
    for more in ({"estimate_cudagraphs": True}, {"enforce_eager": True}, {"kv_cache_memory_bytes": 2 * GIB}):
        assert not estimate_warnings(msgspec.structs.replace(user_request, **more), 61)


def test_a_utilisation_without_a_margin_is_accepted_with_a_warning():
    result = plan(PlanRequest(gpu_memory_utilization=0.99), machine(1), sized(16))
    assert any("gpu_memory_utilization 0.99 leaves less than" in text for text in result.warnings)
    assert not plan(PlanRequest(gpu_memory_utilization=0.9), machine(1), sized(16)).warnings


def test_a_utilisation_above_the_free_memory_is_refused_as_by_vllm():
    assert "for gpu_memory_utilization 0.9, with 49.49 GiB free" in refusal(
        PlanRequest(gpu_memory_utilization=0.9), machine(1, free=50), sized(16)
    )


def test_smaller_batches_are_tried_if_the_default_batch_leaves_no_useful_kv_cache():
    wide = sized(14, vocab_size=256_000)
    result = plan(PlanRequest(), machine(1, total=71, free=24), wide)
    assert (result.max_num_batched_tokens, result.max_num_seqs) == (2048, 256)
    assert "less than vLLM's default of 1,024" in reason(result, "max_num_seqs").why
    assert reason(result, "max_num_seqs").source == "launcher"
    usual = plan(PlanRequest(), machine(1), wide)
    assert (usual.max_num_batched_tokens, usual.max_num_seqs) == (8192, 1024)
    assert reason(usual, "max_num_seqs").source == "vLLM"


def test_the_reason_for_a_smaller_batch_names_recurrent_states_only_if_the_model_has_them():
    """An L4's default batch has as many tokens as the next smaller batches, and more requests."""
    result = plan(
        PlanRequest(), machine(1, total=22, capability=(8, 9), name="NVIDIA L4"), sized(14, vocab_size=256_000)
    )
    assert (result.max_num_batched_tokens, result.max_num_seqs) == (2048, 64)
    assert "activations leave too little" in reason(result, "max_num_seqs").why


def test_the_source_of_a_batch_that_vllm_itself_would_choose_is_vllm():
    doubled = plan(PlanRequest(performance_mode="throughput"), machine(1), sized(16))
    assert (doubled.max_num_batched_tokens, doubled.max_num_seqs) == (16384, 2048)
    short = plan(PlanRequest(max_num_seqs=2, max_model_len=100), machine(1), sized(16))
    assert short.max_num_batched_tokens == 200
    whole = plan(PlanRequest(), machine(1), sized(1, task="pooling", chunked_prefill=False, max_model_len=32_768))
    assert whole.max_num_batched_tokens == 32_768
    for result in (doubled, short, whole):
        batch_reason = reason(result, "max_num_batched_tokens")
        assert batch_reason.source == "vLLM"
        assert batch_reason.why.startswith("vLLM's default of 8,192, adjusted by vLLM")


def test_max_num_seqs_is_limited_to_the_recurrent_states_that_fit():
    layers = (*[msgspec.structs.replace(STATE, state_shapes=((4096, 64, 128),))] * 16, *[FULL] * 16)
    result = plan(PlanRequest(), machine(1), model(layers=layers))
    assert result.max_num_seqs < 1024
    assert "recurrent state" in reason(result, "max_num_seqs").why


# ---- nothing fits


def test_a_refusal_names_the_missing_bytes_and_changes_that_would_fit():
    text = refusal(PlanRequest(), machine(1), sized(100))
    assert text.startswith("made-up on 1 x NVIDIA H100 80GB HBM3: TP=1: ")
    assert re.search(r"GPU 0 lacks \d\d\.\d\d GiB", text)
    assert "any of these changes makes it fit: " in text
    assert "2 x NVIDIA H100 80GB HBM3; or" in text
    assert "--quantization fp8" in text
    assert text.count("; or ") == 2


FP8_KV = PlanRequest(fp8_kv=True)


def test_an_fp8_cache_is_chosen_if_allowed_and_holds_twice_the_tokens():
    plain, halved = plan(PlanRequest(), machine(), sized(16)), plan(FP8_KV, machine(), sized(16))
    assert "kv_cache_dtype" not in plain.options
    assert halved.options["kv_cache_dtype"] == halved.kv_cache.dtype == "fp8"
    assert halved.kv_cache.tokens == pytest.approx(2 * plain.kv_cache.tokens, rel=1e-3)
    dtype_reason = reason(halved, "kv_cache_dtype")
    assert dtype_reason.source == "launcher"
    assert "launch.quality fp8-kv" in dtype_reason.why


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ({"capability": (8, 0)}, {}),
        ({}, {"quantization": quantized("fp8", bits=8, kv_cache_dtype="fp8")}),
        ({}, {"mla": DEEPSEEK}),
    ],
    ids=["a GPU without FP8", "a checkpoint with its own cache dtype", "a latent cache"],
)
def test_an_fp8_cache_is_not_chosen_for(where, changes):
    assert "kv_cache_dtype" not in plan(FP8_KV, machine(**where), sized(16, **changes)).options


def test_a_cache_dtype_that_the_user_sets_is_not_changed():
    chosen = plan(msgspec.structs.replace(FP8_KV, kv_cache_dtype="auto"), machine(), sized(16))
    assert chosen.kv_cache.dtype == "bfloat16"
    assert "kv_cache_dtype" not in chosen.options


def test_a_refusal_suggests_a_shorter_length_and_an_fp8_cache_if_they_fit():
    plan_request = PlanRequest(max_model_len=400_000)
    text = refusal(plan_request, machine(1), sized(50, max_model_len=1_000_000))
    suggested = re.search(r"--max-model-len (\d+); or --kv-cache-dtype fp8", text)
    assert suggested
    longest = int(suggested[1])
    assert plan(
        msgspec.structs.replace(plan_request, max_model_len=longest), machine(1), sized(50, max_model_len=1_000_000)
    )
    assert plan(
        msgspec.structs.replace(plan_request, kv_cache_dtype="fp8"), machine(1), sized(50, max_model_len=1_000_000)
    )


def test_a_refusal_suggests_to_remove_a_utilisation_or_split_that_the_user_set():
    assert "remove --gpu-memory-utilization" in refusal(PlanRequest(gpu_memory_utilization=0.3), machine(1), sized(40))
    assert "remove the parallel sizes that you set" in refusal(
        PlanRequest(tensor_parallel_size=1, pipeline_parallel_size=1), machine(2), sized(100)
    )
    assert "remove --kv-cache-memory-bytes" in refusal(
        PlanRequest(kv_cache_memory_bytes=70 * GIB), machine(1), sized(16)
    )


def test_a_refusal_says_if_no_small_change_would_fit():
    assert "use a smaller model or larger GPUs" in refusal(
        PlanRequest(quantization="fp8"), machine(1, total=8, name="small", capability=(8, 6)), sized(9000)
    )


def test_a_refusal_names_the_reason_for_an_impossible_split():
    text = refusal(PlanRequest(tensor_parallel_size=3), machine(4), sized(16))
    assert "32 attention heads are not divisible by TP=3" in text
    assert text.endswith("this change makes it fit: remove the parallel sizes that you set")


# ---- the CPU


def cpu(available=64, *, nodes=1):
    numa_nodes = tuple(NumaNode(index=n, cores=8, memory_total=available * GIB // nodes) for n in range(nodes))
    facts = Cpu(
        cores=8, memory_total=256 * GIB, memory_limit=None, memory_available=available * GIB, numa_nodes=numa_nodes
    )
    return Hardware(gpus=(), cpu=facts)


def test_on_the_cpu_the_plan_sets_the_kv_cache_in_bytes_and_no_gpu_options():
    result = plan(PlanRequest(), cpu(128), sized(2))
    assert sizes(result) == (1, 1, 1)
    assert (result.gpus_per_replica, result.gpu_memory_utilization, result.env) == (0, 0.0, {})
    assert result.options["kv_cache_memory_bytes"] == pytest.approx(result.kv_cache.bytes, rel=0.01)
    assert "gpu_memory_utilization" not in result.options
    assert result.kv_cache.tokens >= 8192 + 128 * 2048
    assert result.kv_cache.tokens < 1.1 * (8192 + 128 * 2048)


def test_on_a_small_machine_the_kv_cache_gets_half_of_the_memory_beside_the_weights():
    result = plan(PlanRequest(), cpu(16), sized(2))
    left = 16 * GIB - result.memory.weights - result.memory.non_torch
    assert result.kv_cache.bytes == pytest.approx(left / 2, rel=0.01)
    assert "half of the memory" in reason(result, "kv_cache_memory_bytes").why


def test_on_the_cpu_the_kv_cache_has_the_size_that_the_user_sets():
    flag = plan(PlanRequest(kv_cache_memory_bytes=3 * GIB), cpu(), sized(2))
    assert flag.kv_cache.bytes == pytest.approx(3 * GIB, rel=0.01)
    assert "kv_cache_memory_bytes" not in flag.options
    variable = plan(PlanRequest(cpu_kv_cache_bytes=2 * GIB, kv_cache_memory_bytes=3 * GIB), cpu(), sized(2))
    assert variable.kv_cache.bytes == pytest.approx(2 * GIB, rel=0.01)
    assert "VLLM_CPU_KVCACHE_SPACE" in reason(variable, "kv_cache_memory_bytes").why
    assert "of memory for a KV cache of 90.00 GiB" in refusal(PlanRequest(cpu_kv_cache_bytes=90 * GIB), cpu(), sized(2))


def test_on_the_cpu_a_utilisation_that_the_user_sets_is_a_share_of_the_node():
    result = plan(PlanRequest(gpu_memory_utilization=0.5), cpu(), sized(2))
    worker_bytes = result.memory.weights + result.memory.non_torch
    assert result.kv_cache.bytes == pytest.approx(32 * GIB - worker_bytes, rel=0.01)
    assert result.gpu_memory_utilization == 0.5
    assert "kv_cache_memory_bytes" not in result.options
    assert reason(result, "gpu_memory_utilization").source == "you"
    assert "for a KV cache" in refusal(
        PlanRequest(gpu_memory_utilization=1.0),
        msgspec.structs.replace(cpu(), cpu=msgspec.structs.replace(cpu().cpu, memory_available=20 * GIB)),
        sized(2),
    )


def test_a_refusal_for_the_cpu_names_the_missing_bytes():
    text = refusal(PlanRequest(), cpu(8), sized(16))
    assert re.search(r"on this CPU: a worker lacks [\d.]+ GiB of memory even without a KV cache", text)
    assert "raise the memory limit" in text
    assert "of memory for a KV cache of 60.00 GiB" in refusal(
        PlanRequest(kv_cache_memory_bytes=60 * GIB), cpu(), sized(16)
    )


def test_an_unused_numa_node_is_a_warning_and_tensor_parallelism_uses_it():
    result = plan(PlanRequest(), cpu(nodes=2), sized(2))
    assert any("2 NUMA nodes" in text for text in result.warnings)
    both = plan(PlanRequest(tensor_parallel_size=2), cpu(nodes=2), sized(2))
    assert both.tensor_parallel_size == 2
    assert not any("NUMA" in text for text in both.warnings)
    assert both.max_num_seqs == 256


def test_a_small_numa_node_limits_a_worker():
    whole = plan(PlanRequest(kv_cache_memory_bytes=20 * GIB), cpu(), sized(2))
    assert whole.kv_cache.bytes
    nodes = (NumaNode(index=0, cores=8, memory_total=30 * GIB, memory_available=10 * GIB),)
    small = msgspec.structs.replace(cpu(), cpu=msgspec.structs.replace(cpu().cpu, numa_nodes=nodes))
    assert "of memory for a KV cache" in refusal(PlanRequest(kv_cache_memory_bytes=20 * GIB), small, sized(2))


def test_hardware_without_gpus_and_cpu_is_refused():
    assert "neither GPUs nor a CPU" in refusal(PlanRequest(), Hardware(gpus=()), sized(2))


# ---- any model on any machine

REQUESTS = st.builds(
    PlanRequest,
    objective=st.sampled_from(["throughput", "latency"]),
    tensor_parallel_size=st.sampled_from([None, None, 1, 2, 3, 8]),
    pipeline_parallel_size=st.sampled_from([None, None, 1, 2, 5]),
    data_parallel_size=st.sampled_from([None, None, 1, 2, 7]),
    gpu_memory_utilization=st.sampled_from([None, None, 0.1, 0.5, 0.9, 1.0]),
    kv_cache_memory_bytes=st.sampled_from([None, None, 1, GIB, 1000 * GIB]),
    max_model_len=st.sampled_from([None, None, -1, 1, 100, 8192]),
    max_num_seqs=st.sampled_from([None, None, 1, 5000]),
    max_num_batched_tokens=st.sampled_from([None, None, 1, 100_000]),
    kv_cache_dtype=st.sampled_from([None, "auto", "fp8"]),
    dtype=st.sampled_from([None, "auto", "half", "float", "bfloat16"]),
    quantization=st.sampled_from([None, "fp8"]),
    enforce_eager=st.booleans(),
    enable_expert_parallel=st.sampled_from([None, True, False]),
)
MACHINES = st.builds(
    machine,
    st.integers(1, 8),
    total=st.sampled_from([8, 16, 24, 80, 180]),
    free=st.sampled_from([None, 7, 1, 0]),
    linked=st.booleans(),
    capability=st.sampled_from([(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]),
)
MODELS = st.builds(
    sized,
    st.sampled_from([0.1, 5, 14, 70, 600]),
    max_model_len=st.sampled_from([1, 512, 8192, 10_000_000]),
    heads=st.sampled_from([7, 32]),
    vocab_size=st.sampled_from([1, 32_000, 256_000]),
    task=st.sampled_from(["generate", "pooling"]),
)


@settings(deadline=None)
@given(REQUESTS, MACHINES, MODELS)
def test_every_request_gets_a_plan_or_an_error_of_one_line(plan_request, hardware, planned_model):
    try:
        result = plan(plan_request, hardware, planned_model)
    except UsageError as error:
        one_line = "\n" not in str(error)
        assert one_line
        return
    each = result.tensor_parallel_size * result.pipeline_parallel_size
    assert result.gpus_per_replica == each
    assert each * result.data_parallel_size <= len(hardware.gpus)
    assert result.max_num_seqs <= result.max_num_batched_tokens or plan_request.max_num_batched_tokens
    assert result.kv_cache.tokens >= result.max_model_len
    for gpu in hardware.gpus:
        if plan_request.gpu_memory_utilization is None:
            assert memory.requested_bytes(gpu, result.gpu_memory_utilization) + result.memory.context <= gpu.memory_free


@settings(deadline=None)
@given(MACHINES, MODELS)
def test_a_request_for_the_planned_values_gives_the_same_plan(hardware, planned_model):
    try:
        result = plan(PlanRequest(), hardware, planned_model)
    except UsageError:
        return
    fields = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "gpu_memory_utilization",
              "max_model_len", "max_num_seqs", "max_num_batched_tokens", "watermark")  # fmt: skip
    values = {field: getattr(result, field) for field in fields}
    plan_request = PlanRequest(**values, estimate_cudagraphs=not result.env)  # as in the planned environment
    again = plan(plan_request, hardware, planned_model)
    assert isinstance(again, Plan)
    assert again.kv_cache == result.kv_cache
    assert again.options == {}


def test_the_reason_of_a_large_margin_follows_a_shorter_length():
    """The plan makes max_model_len shorter after it computed the margin, whose block tables depend on it."""
    long = sized(0.1, max_model_len=10_000_000, heads=7, vocab_size=1)
    result = plan(PlanRequest(), machine(2, total=8, linked=False, capability=(10, 0)), long)
    assert result.max_model_len < 10_000_000
    why = next(reason.why for reason in result.reasons if reason.field == "gpu_memory_utilization")
    assert " of the margin are for " in why


def test_one_utilisation_leaves_every_stage_enough_memory_for_serving():
    planned_model = read_model(str(Path(__file__).parents[2] / "data" / "models" / "Qwen--Qwen3-30B-A3B"))
    hardware = parse_hardware_name("H200:2")
    result = plan(PlanRequest(pipeline_parallel_size=2, tensor_parallel_size=1), hardware, planned_model)
    batch = run(max_model_len=result.max_model_len, max_num_seqs=result.max_num_seqs,
                max_num_batched_tokens=result.max_num_batched_tokens, estimate_cudagraphs=False)  # fmt: skip
    stages = memory.memory_by_rank(placed(planned_model, batch, Layout(tensor=1, pipeline=2, data=1), hardware.gpus[0]))
    safe = [memory.safe_utilization(stage, batch, hardware.gpus[0]) for stage in stages]
    assert safe[0] < safe[1]  # although the last stage, which has the head, leaves less for the KV cache
    assert memory.rank_with_least_room(stages, batch) == stages[1]
    assert result.gpu_memory_utilization == safe[0]
    more = PlanRequest(pipeline_parallel_size=2, tensor_parallel_size=1, gpu_memory_utilization=safe[1],
                 estimate_cudagraphs=False)  # fmt: skip
    warnings = plan(more, hardware, planned_model).warnings
    assert any(text.endswith(f"may run out of memory under load: set at most {safe[0]}") for text in warnings)


# ---- the watermark


def test_the_watermark_is_set_if_requests_can_outgrow_the_kv_cache():
    result = plan(PlanRequest(), machine(1), sized(60))
    assert result.watermark == result.options["watermark"] == 0.02
    assert reason(result, "watermark").source == "launcher"


@pytest.mark.parametrize(("share", "watermark"), [(0.9, 0), (1.1, 0.02)])
def test_the_watermark_is_zero_if_all_requests_fit_completely(share, watermark):
    plan_request = PlanRequest(max_num_seqs=4, max_model_len=4096, max_num_batched_tokens=4096)
    tokens = plan(plan_request, machine(1), sized(60)).kv_cache.tokens
    plan_request = msgspec.structs.replace(plan_request, max_num_seqs=int(share * tokens / 4096))
    result = plan(plan_request, machine(1), sized(60))
    assert result.watermark == watermark
    assert ("watermark" in result.options) == (watermark > 0)


def test_the_watermark_is_zero_in_a_kv_cache_for_few_requests():
    few = plan(PlanRequest(kv_cache_memory_bytes=3 * GIB, max_model_len=8192), machine(1), sized(60))
    assert 2 * 8192 < few.kv_cache.tokens < 16 * 2048
    assert few.watermark == 0


def test_the_watermark_is_zero_for_a_pooling_model():
    assert plan(PlanRequest(), machine(1), sized(1, task="pooling")).watermark == 0


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_watermark_that_the_user_sets_is_not_changed(share):
    result = plan(PlanRequest(watermark=share), machine(1), sized(60))
    assert result.watermark == reason(result, "watermark").value == share
    assert reason(result, "watermark").source == "you"
    assert "watermark" not in result.options


@pytest.mark.parametrize(("times", "watermark"), [(1.9, 0), (2.1, 0.02)])
def test_the_watermark_is_zero_if_the_kv_cache_cannot_hold_two_of_the_longest_requests(times, watermark):
    long = sized(60, max_model_len=1_000_000)
    tokens = plan(PlanRequest(max_model_len=60_000), machine(1), long).kv_cache.tokens
    result = plan(PlanRequest(max_model_len=int(tokens / times)), machine(1), long)
    assert result.watermark == watermark


# ---- CUDA graphs: vLLM's estimate, or the plan's own size


@pytest.mark.parametrize(
    "plan_request",
    [
        PlanRequest(gpu_memory_utilization=0.9),
        PlanRequest(kv_cache_memory_bytes=8 * GIB),
        PlanRequest(estimate_cudagraphs=True),
    ],
)
def test_vllm_estimates_cuda_graphs_if_the_user_sets_memory_options(plan_request):
    result = plan(plan_request, machine(1), sized(16))
    assert result.env == EXPANDABLE


@pytest.mark.parametrize("choice", [True, False])
def test_the_plan_does_not_change_the_users_allocator(choice):
    result = plan(PlanRequest(expandable_segments=choice), machine(1), sized(16))
    assert result.env == NO_ESTIMATE
    fragments = "loses memory to fragmentation" in reason(result, "gpu_memory_utilization").why
    assert fragments is not choice


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"expandable_segments": True}, True),
        ({"expandable_segments": True, "disable_custom_all_reduce": True}, False),
        ({"expandable_segments": False}, False),
        ({}, False),
    ],
)
def test_a_plan_warns_of_expandable_segments_that_end_vllms_custom_all_reduce(changes, warned):
    result = plan(PlanRequest(tensor_parallel_size=2, **changes), machine(2), sized(16))
    assert any("custom all-reduce" in warning for warning in result.warnings) is warned


def test_the_plan_reserves_the_real_size_of_cuda_graphs_and_names_it():
    by_plan, by_vllm = (
        plan(PlanRequest(), machine(1), sized(16)),
        plan(PlanRequest(estimate_cudagraphs=True), machine(1), sized(16)),
    )
    assert by_plan.env == ALONE
    assert by_plan.kv_cache.tokens > by_vllm.kv_cache.tokens
    assert f"CUDA graphs {units.gib(by_plan.memory.cuda_graphs)}, and" in reason(by_plan, "gpu_memory_utilization").why
    assert "CUDA graphs" not in reason(by_vllm, "gpu_memory_utilization").why
    by_user = plan(PlanRequest(gpu_memory_utilization=0.9, estimate_cudagraphs=False), machine(1), sized(16))
    assert by_user.env == ALONE


def test_the_reason_for_the_utilisation_names_no_cuda_graphs_if_there_are_none():
    result = plan(PlanRequest(enforce_eager=True), machine(1), sized(16))
    assert "CUDA graphs" not in reason(result, "gpu_memory_utilization").why


@pytest.mark.parametrize(
    ("stored", "dtype", "capability", "runs"),
    [
        ("bfloat16", None, (9, 0), "bfloat16"),
        ("bfloat16", "auto", (7, 5), "float16"),
        ("bfloat16", None, None, "bfloat16"),  # the CPU
        ("bfloat16", "half", (9, 0), "float16"),
        ("float16", "auto", (7, 5), "float16"),
        ("float16", "bfloat16", (9, 0), "bfloat16"),
        ("float16", "float", (9, 0), "float32"),
        ("float32", None, (9, 0), "float32"),
    ],
)
def test_a_model_runs_in_the_users_dtype_or_else_in_its_own(stored, dtype, capability, runs):
    assert dtype_of(PlanRequest(dtype=dtype), model(dtype=stored), capability and generation_of(capability)) == runs


def test_before_ampere_a_model_that_does_not_run_in_float16_runs_in_float32():
    assert dtype_of(PlanRequest(), model(model_type="gemma2"), Generation.TURING) == "float32"
    assert dtype_of(PlanRequest(), model(model_type="gemma2"), Generation.A100) == "bfloat16"


def on_amx(**changes):
    """Return the plan of a model on a CPU machine with AMX instructions."""
    hardware = msgspec.structs.replace(CPU_MACHINE, cpu=msgspec.structs.replace(CPU_MACHINE.cpu, amx=True))
    plan_request = changes.pop("plan_request", PlanRequest())
    planned_model = msgspec.structs.replace(sized(1, layers=4), **changes)
    return plan(plan_request, hardware, planned_model)


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, "float16"),
        ({"model_type": "gemma2"}, "float32"),  # does not run in float16
        ({"dtype": "float32"}, None),
        ({"dtype": "float16"}, None),
        ({"mla": DEEPSEEK}, None),  # uses other kernels, which support only bfloat16
        ({"quantization": quantized("mxfp4")}, None),  # supports only bfloat16
    ],
)
def test_on_a_cpu_with_amx_no_plan_runs_attention_in_bfloat16(changes, runs):
    result = on_amx(**changes)
    assert result.options.get("dtype") == runs
    assert [reason.value for reason in result.reasons if reason.field == "dtype"] == ([runs] if runs else [])
    elsewhere = plan(PlanRequest(), CPU_MACHINE, msgspec.structs.replace(sized(1, layers=4), **changes))
    assert not [reason for reason in elsewhere.reasons if reason.field == "dtype"]


@pytest.mark.parametrize(("head_dim", "runs"), [(80, None), (96, "float16")])
def test_bfloat16_is_kept_if_the_head_size_uses_no_amx_instructions(head_dim, runs):
    layers = (msgspec.structs.replace(FULL, head_dim=head_dim, head_dim_v=head_dim),) * 4
    assert on_amx(layers=layers).options.get("dtype") == runs


def test_bfloat16_that_the_user_sets_on_a_cpu_with_amx_is_a_warning():
    [warning] = on_amx(plan_request=PlanRequest(dtype="bfloat16")).warnings
    assert "SIGILL" in warning
    assert "--dtype float16" in warning
    [warning] = on_amx(quantization=quantized("mxfp4")).warnings
    assert "no other dtype. If the engine crashes, use the model in another quantisation" in warning
    assert on_amx(plan_request=PlanRequest(dtype="float16")).warnings == []
    assert on_amx(plan_request=PlanRequest(dtype="bfloat16"), mla=DEEPSEEK).warnings == []


# ---- options that set memory


def test_a_number_of_blocks_decides_on_the_cache_and_the_longest_request():
    llama = sized(15, max_model_len=131_072)
    result = plan(PlanRequest(num_gpu_blocks_override=1000), machine(1), llama)
    assert result.max_model_len == 999 * 16
    assert result.kv_cache.bytes == 1000 * 16 * result.kv_cache.bytes_per_token
    assert reason(result, "num_gpu_blocks_override").source is Source.YOU
    assert any("max_model_len is cut" in warning for warning in result.warnings)


def test_a_length_that_the_number_of_blocks_cannot_hold_is_refused_with_a_remedy():
    text = refusal(
        PlanRequest(num_gpu_blocks_override=1000, max_model_len=15_985), machine(1), sized(15, max_model_len=131_072)
    )
    assert "the longest that fits: 15,984" in text
    assert "remove --num-gpu-blocks-override" in text
    assert "--max-model-len 15984" in text


def test_more_blocks_than_the_memory_holds_are_refused():
    text = refusal(PlanRequest(num_gpu_blocks_override=100_000), machine(1), sized(15))
    assert "for 100,000 KV cache blocks" in text
    assert "remove --num-gpu-blocks-override" in text


def test_blocks_hold_for_each_stage_and_each_replica():
    request = PlanRequest(num_gpu_blocks_override=600, pipeline_parallel_size=2, data_parallel_size=2)
    result = plan(request, machine(4), sized(15))
    assert result.kv_cache.bytes == 600 * 16 * result.kv_cache.bytes_per_token
    assert result.kv_cache.tokens == 600 * 16


def test_blocks_decide_on_the_cache_of_the_cpu_engine_too():
    cpu = Cpu(cores=8, memory_total=64 * GIB, memory_limit=None, memory_available=60 * GIB)
    result = plan(PlanRequest(num_gpu_blocks_override=100), Hardware(gpus=(), cpu=cpu), sized(4))
    assert result.max_model_len == 8192
    assert result.kv_cache.bytes == 100 * 128 * result.kv_cache.bytes_per_token
    assert result.options["kv_cache_memory_bytes"] == result.kv_cache.bytes


def test_recurrent_states_limit_requests_by_the_number_of_blocks():
    hybrid = sized(15, layers=32)
    hybrid = msgspec.structs.replace(hybrid, layers=(STATE, FULL) * 16)
    assert plan(PlanRequest(num_gpu_blocks_override=300, max_model_len=2048), machine(1), hybrid).max_num_seqs == 300


def test_offloaded_weights_make_room_and_are_named():
    assert "lacks" in refusal(PlanRequest(), machine(1), sized(131))
    result = plan(PlanRequest(cpu_offload_gb=80), machine(1), sized(131))
    assert result.memory.weights < 60 * GIB
    assert reason(result, "cpu_offload_gb").value == 80
    assert re.search(r"8[01]\.\d\d GiB of each GPU's weights are in host memory", reason(result, "cpu_offload_gb").why)


def test_offloaded_layers_are_named_by_their_group():
    result = plan(PlanRequest(offload_group_size=4, offload_num_in_group=3), machine(1), sized(131))
    assert result.memory.weights < 60 * GIB
    assert reason(result, "offload_group_size").value == 4


@pytest.mark.parametrize(
    ("request_", "backend"),
    [
        (PlanRequest(cpu_offload_gb=1), "uva"),
        (PlanRequest(offload_group_size=2), "prefetch"),
        (PlanRequest(cpu_offload_gb=1, offload_group_size=2), "prefetch"),
        (PlanRequest(cpu_offload_gb=1, offload_group_size=2, offload_backend="uva"), "uva"),
        (PlanRequest(cpu_offload_gb=1, offload_backend="prefetch"), None),
        (PlanRequest(offload_group_size=2, offload_backend="uva"), None),
        (PlanRequest(offload_backend="uva"), None),
    ],
)
def test_the_backend_of_offloading_follows_from_the_options(request_, backend):
    assert (request_.offload and request_.offload.backend) == backend


def test_weights_that_the_host_cannot_hold_are_refused():
    cpu = Cpu(cores=8, memory_total=64 * GIB, memory_limit=None, memory_available=60 * GIB)
    text = refusal(PlanRequest(cpu_offload_gb=80), machine(1, cpu=cpu), sized(131))
    assert "would be in host memory, and 60.00 GiB are available" in text


def test_names_that_match_no_weights_are_warned_of():
    result = plan(PlanRequest(cpu_offload_gb=80, cpu_offload_params=("expert",)), machine(1), sized(15))
    assert any("finds no weights of expert" in warning for warning in result.warnings)


def test_the_cpu_engine_says_that_it_does_not_offload():
    cpu = Cpu(cores=8, memory_total=64 * GIB, memory_limit=None, memory_available=60 * GIB)
    result = plan(PlanRequest(cpu_offload_gb=2), Hardware(gpus=(), cpu=cpu), sized(4))
    assert any("offloads no weights on a CPU" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    "changes",
    [{"optimization_level": "0"}, {"compilation_config": {"cudagraph_mode": "NONE"}}, {"enforce_eager": True}],
)
def test_without_cuda_graphs_the_plan_reserves_no_memory_for_them(changes):
    assert plan(PlanRequest(), machine(1), sized(15)).memory.cuda_graphs > 0
    result = plan(PlanRequest(**changes), machine(1), sized(15))
    assert result.memory.cuda_graphs == 0


def test_fewer_captured_sizes_need_less_memory():
    few = plan(PlanRequest(cudagraph_capture_sizes=(1, 8)), machine(1), sized(15))
    same = plan(PlanRequest(compilation_config={"cudagraph_capture_sizes": [8, 1]}), machine(1), sized(15))
    assert few.memory == same.memory
    assert few.memory.cuda_graphs < plan(PlanRequest(), machine(1), sized(15)).memory.cuda_graphs


def test_draft_tokens_need_memory_for_their_logits():
    plain = plan(PlanRequest(), machine(1), sized(15))
    drafted = plan(PlanRequest(num_speculative_tokens=4), machine(1), sized(15))
    at_once = plan(PlanRequest(num_speculative_tokens=4, verifies_in_chunks=False), machine(1), sized(15))
    logits = 5 * 1024 * 128_256
    assert drafted.memory.safety - plain.memory.safety == pytest.approx(
        2 * logits + 4 * GIB - 16 * 1024 * 128_256, rel=0.001
    )
    assert at_once.memory.safety - plain.memory.safety == pytest.approx(18 * logits - 16 * 1024 * 128_256, rel=0.001)


def test_without_sliding_windows_requests_are_at_most_as_long_as_the_window():
    mistral = model(layers=(SLIDING, FULL) * 4, max_model_len=32_768)
    full = without_windows(mistral)
    assert full.max_model_len == 4096
    assert {layer.kind for layer in full.layers} == {"full"}
    assert without_windows(model()) == model()


def test_with_adapters_a_batch_holds_the_draft_tokens_of_all_requests():
    lora = {"enable_lora": True, "num_speculative_tokens": 15}
    result = plan(PlanRequest(**lora), machine(1), sized(15))
    assert (result.max_num_batched_tokens, result.max_num_seqs) == (8192, 512)
    result = plan(PlanRequest(**lora, max_num_seqs=600), machine(1), sized(15))
    assert (result.max_num_batched_tokens, result.max_num_seqs) == (9600, 600)


def test_a_cache_in_which_no_request_fits_says_so():
    tiny = PlanRequest(kv_cache_memory_bytes=1 << 20, max_model_len=8192)
    with pytest.raises(UsageError, match=r"for a request of 8,192 tokens \(no request fits\)"):
        plan(tiny, machine(1), sized(16))
