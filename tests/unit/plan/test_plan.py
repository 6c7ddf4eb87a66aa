"""Which GPUs and which split a plan takes, and what it says of them."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from builders import DEEPSEEK, EXPERTS, FULL, GIB, STATE, model, placed, quantized, run, tensor
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
from vllm_launch.plan.explain import Source
from vllm_launch.plan.plan import Plan, plan
from vllm_launch.plan.request import PlanRequest, dtype_of
from vllm_launch.sizing import memory
from vllm_launch.sizing.parallel import Layout


def sized(gib, *, layers=32, **changes):
    """Llama-3-8B's shape whose weights take ``gib``, in matrices that tensor parallelism cuts."""
    names = [f"model.layers.{n}.self_attn.o_proj.weight" for n in range(layers)]
    tensors = tuple(tensor(name, round(gib * GIB / 2 / 4096 / layers), 4096) for name in names)
    return model(layers=layers, tensors=tensors, **changes)


def machine(count=1, *, total=80, free=None, linked=True, name="NVIDIA H100 80GB HBM3", capability=(9, 0), **changes):
    """GPUs of ``total`` GiB; ``free`` is GiB of all or a list; ``linked`` says which pairs NVLink joins, or all."""
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


NO_GUESS = {"VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0"}
"""Where the plan decides on memory, it leaves room for CUDA graphs itself."""


def sizes(found):
    return found.tensor_parallel_size, found.pipeline_parallel_size, found.data_parallel_size


def reason(found, field):
    [one] = [one for one in found.reasons if one.field == field]
    return one


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
def test_a_replica_gets_the_fewest_gpus_that_hold_it_and_the_rest_are_replicas(weights, count, expected):
    found = plan(PlanRequest(), machine(count), sized(weights))
    assert sizes(found) == expected
    assert found.gpus_per_replica == expected[0] * expected[1]
    assert found.env == NO_GUESS


def test_latency_gets_the_widest_tensor_parallelism_that_the_heads_allow():
    assert sizes(plan(PlanRequest(objective="latency"), machine(8), sized(16))) == (8, 1, 1)
    assert sizes(plan(PlanRequest(objective="latency"), machine(8), sized(16, heads=20, kv_heads=20))) == (4, 1, 2)
    assert sizes(plan(PlanRequest(objective="latency"), machine(6), sized(16))) == (4, 1, 1)


def test_a_kv_cache_of_sixteen_short_requests_is_useful_and_less_is_not():
    found = plan(PlanRequest(), machine(2), sized(72))
    assert sizes(found) == (2, 1, 1)
    [passed_over] = found.rejected
    assert passed_over.plan == "TP=1 DP=2"
    assert "fewer than 16 requests of 2,048" in passed_over.why
    roomier = plan(PlanRequest(), machine(2), sized(68))
    assert sizes(roomier) == (1, 1, 2)
    assert roomier.kv_cache.tokens >= 16 * 2048


def test_one_request_of_the_models_whole_length_is_part_of_useful():
    long = sized(60, max_model_len=200_000)
    found = plan(PlanRequest(), machine(2), long)
    assert sizes(found) == (2, 1, 1)
    assert found.max_model_len == 200_000
    assert "max_model_len is cut to" in found.rejected[0].why


def test_over_pcie_a_replica_is_a_pipeline_and_over_nvlink_it_is_not():
    assert sizes(plan(PlanRequest(), machine(4, linked=False), sized(200))) == (1, 4, 1)
    assert sizes(plan(PlanRequest(), machine(4, linked=True), sized(200))) == (4, 1, 1)
    assert sizes(plan(PlanRequest(objective="latency"), machine(4, linked=False), sized(200))) == (4, 1, 1)
    unknown = msgspec.structs.replace(machine(2), nvlink=(), p2p=())
    assert sizes(plan(PlanRequest(), unknown, sized(100))) == (1, 2, 1)
    for found in (plan(PlanRequest(), machine(4, linked=False), sized(200)), plan(PlanRequest(), unknown, sized(100))):
        assert "NVLink does not join them" in reason(found, "pipeline_parallel_size").why


def test_a_pipeline_over_nvlink_says_why_it_is_one():
    three = plan(PlanRequest(), machine(3), sized(160))
    assert sizes(three) == (1, 3, 1)
    assert "TP=3 is not possible: 32 attention heads" in reason(three, "pipeline_parallel_size").why


def test_the_stage_with_the_fewest_blocks_decides_though_another_is_fuller():
    """Three layers on two GPUs: the first stage caches two, the last one, and holds a head of 10 GiB."""
    head = tensor("lm_head.weight", 10 * GIB // 2 // 4096, 4096)
    layers = sized(3, layers=3)
    made = msgspec.structs.replace(layers, tensors=(*layers.tensors, head))
    found = plan(PlanRequest(pipeline_parallel_size=2, gpu_memory_utilization=0.9), machine(2), made)
    batch, on = run(), machine(2).gpus[0]
    first, last = memory.memory_by_rank(placed(made, batch, Layout(pipeline=2), on))
    assert found.memory == last
    page = 16 * 8 * (128 + 128) * 2
    assert found.kv_cache.tokens == 16 * (memory.kv_bytes(first, batch, on, 0.9) // (2 * page))
    assert memory.kv_bytes(last, batch, on, 0.9) // page > found.kv_cache.tokens // 16


def test_replicas_are_made_of_gpus_that_nvlink_joins():
    found = plan(PlanRequest(), machine(4, linked={(0, 2), (1, 3)}), sized(100))
    assert sizes(found) == (2, 1, 2)
    assert found.env == NO_GUESS | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0,2,1,3"}


def test_gpus_that_make_no_replica_of_their_own_make_the_one_larger():
    found = plan(PlanRequest(), machine(4, linked=False), sized(200, heads=30, kv_heads=30))
    assert found.gpus_per_replica == 4
    assert sizes(plan(PlanRequest(), machine(3), sized(200))) == (1, 3, 1)
    assert plan(PlanRequest(), machine(7), sized(16)).data_parallel_size == 7


def test_splits_that_vllm_refuses_are_passed_over_with_the_reason():
    found = plan(PlanRequest(), machine(8), sized(200))
    assert {one.plan for one in found.rejected} >= {"TP=1 DP=8", "TP=2 DP=4", "TP=3 DP=2"}
    assert next(one.why for one in found.rejected if one.plan == "TP=3 DP=2").startswith("32 attention heads are not")
    assert re.match(r"[\d.]+ GiB of GPU 0", found.rejected[0].why)


def test_experts_are_spread_whole_where_their_width_cannot_be_cut():
    moe = tuple(msgspec.structs.replace(FULL, moe=True) for _ in range(32))
    block = quantized("fp8", bits=8, block_shape=(128, 128))
    experts = msgspec.structs.replace(EXPERTS, intermediate_size=768)
    names = [f"model.layers.{n}.mlp.experts.0.up_proj.weight" for n in range(32)]
    tensors = tuple(tensor(name, round(100 * GIB / 2 / 4096 / 32), 4096) for name in names)
    mixture = model(layers=moe, tensors=tensors, experts=experts, quantization=block)
    found = plan(PlanRequest(tensor_parallel_size=4), machine(4), mixture)
    assert found.options["enable_expert_parallel"] is True
    assert reason(found, "enable_expert_parallel").source == "model"
    assert "enable_expert_parallel" not in plan(PlanRequest(tensor_parallel_size=2), machine(2), mixture).options
    assert "not a multiple of the FP8 block" in refusal(
        PlanRequest(tensor_parallel_size=4, enable_expert_parallel=False), machine(4), mixture
    )


# ---- which GPUs


def test_a_half_taken_gpu_is_left_alone_where_it_would_drag_the_others_down():
    found = plan(PlanRequest(), machine(4, free=[80, 80, 80, 30]), sized(16))
    assert sizes(found) == (1, 1, 3)
    assert found.env["CUDA_VISIBLE_DEVICES"] == "0,1,2"
    assert reason(found, "data_parallel_size").why.startswith(
        "3 replicas, 1 GPU each (3 of 4 GPUs used). The others stay free"
    )


def test_the_emptiest_gpus_are_taken():
    found = plan(
        PlanRequest(tensor_parallel_size=2, data_parallel_size=1), machine(4, free=[40, 80, 30, 80]), sized(16)
    )
    assert found.env["CUDA_VISIBLE_DEVICES"] == "1,3"


def test_a_small_difference_of_free_memory_changes_nothing_but_the_utilisation():
    found = plan(PlanRequest(), machine(2, free=[79, 80]), sized(16))
    assert sizes(found) == (1, 1, 2)
    assert found.env == NO_GUESS
    assert found.gpu_memory_utilization < plan(PlanRequest(), machine(2), sized(16)).gpu_memory_utilization


def test_memory_that_others_hold_is_not_claimed_and_they_are_named():
    busy = machine(1, free=50)
    gpu = msgspec.structs.replace(busy.gpus[0], processes=(GpuProcess(pid=7, name="jupyter", memory=30 * GIB),))
    found = plan(PlanRequest(), msgspec.structs.replace(busy, gpus=(gpu,)), sized(16))
    assert memory.requested_bytes(gpu, found.gpu_memory_utilization) < gpu.memory_free
    assert any("GPU 0 is shared: 30.00 GiB" in text and "jupyter (pid 7)" in text for text in found.warnings)


def test_faults_of_a_gpu_in_use_are_told():
    one = machine(1)
    ill = msgspec.structs.replace(one, gpus=(msgspec.structs.replace(one.gpus[0], faults=("replace the GPU",)),))
    assert "GPU 0: replace the GPU" in plan(PlanRequest(), ill, sized(16)).warnings


def mixed():
    small = machine(2, total=24, name="NVIDIA L4", capability=(8, 9), linked=False).gpus
    large = machine(1).gpus
    gpus = tuple(msgspec.structs.replace(gpu, index=n, uuid=f"GPU-{n}") for n, gpu in enumerate([*small, *large]))
    return Hardware(gpus=gpus)


def test_unlike_gpus_are_not_mixed_and_the_better_kind_is_taken():
    found = plan(PlanRequest(), mixed(), sized(16))
    assert (found.gpus_per_replica, found.data_parallel_size) == (1, 1)
    assert found.env == NO_GUESS | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "2"}


def test_unlike_gpus_are_mixed_where_the_person_asks_for_more_than_are_alike():
    found = plan(PlanRequest(pipeline_parallel_size=3), mixed(), sized(16, max_model_len=4096))
    assert found.env["CUDA_VISIBLE_DEVICES"].count(",") == 2
    assert found.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_mig_slice_is_a_machine_of_its_own():
    found = plan(PlanRequest(), parse_hardware_name("H100-3g.40gb:2"), sized(16))
    assert sizes(found) == (1, 1, 1)
    assert found.env["CUDA_VISIBLE_DEVICES"] == parse_hardware_name("H100-3g.40gb:2").gpus[0].uuid
    assert "more GPUs" in refusal(PlanRequest(tensor_parallel_size=2), parse_hardware_name("H100-3g.40gb:2"), sized(16))


def test_gpus_without_kernels_are_left_out_and_none_left_is_refused():
    old = machine(1, name="Tesla V100", capability=(7, 0)).gpus[0]
    both = Hardware(gpus=(*machine(1).gpus, msgspec.structs.replace(old, index=1, uuid="GPU-1")))
    found = plan(PlanRequest(), both, sized(16))
    assert found.env["CUDA_VISIBLE_DEVICES"] == "0"
    assert any("compute capability 7.0" in text and "left out" in text for text in found.warnings)
    assert "compute capability 7.0" in refusal(PlanRequest(), Hardware(gpus=(old,)), sized(16))


# ---- what the person sets


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
def test_what_the_person_sets_is_taken_and_not_decided_again(field, value):
    found = plan(PlanRequest(**{field: value}), machine(4), sized(16))
    assert getattr(found, field) == value
    assert field not in found.options
    assert reason(found, field).source == "you"
    others = {one.field for one in found.reasons if one.source == "you"}
    assert others == {field}


def test_data_parallel_and_tensor_parallel_sizes_leave_the_rest_to_the_plan():
    assert sizes(plan(PlanRequest(data_parallel_size=2), machine(8), sized(100))) == (2, 1, 2)
    assert sizes(plan(PlanRequest(tensor_parallel_size=4), machine(8), sized(16))) == (4, 1, 2)
    assert sizes(plan(PlanRequest(pipeline_parallel_size=2), machine(8), sized(16))) == (1, 2, 4)
    assert "more GPUs" in refusal(PlanRequest(tensor_parallel_size=4, data_parallel_size=4), machine(8), sized(16))


CPU_MACHINE = Hardware(
    gpus=(), cpu=Cpu(cores=16, memory_total=64 * GIB, memory_limit=None, memory_available=60 * GIB, numa_nodes=())
)


@pytest.mark.parametrize(
    "asked",
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
def test_each_option_of_a_plan_has_a_reason_and_is_an_option_that_the_user_left_open(asked, hardware, moe):
    changes = {"layers": 4, "experts": EXPERTS} if moe else {}
    of = sized(8, **changes)
    if moe:
        of = msgspec.structs.replace(of, layers=(msgspec.structs.replace(FULL, moe=True),) * 4)
    if asked.enable_expert_parallel and (not moe or len(hardware.gpus) == 1):
        with pytest.raises(UsageError):  # there are no experts, or no second GPU
            plan(asked, hardware, of)
        return
    found = plan(asked, hardware, of)
    assert found.options.keys() <= options().keys()
    by_field = {one.field: one for one in found.reasons}
    for dest, value in found.options.items():
        assert by_field[dest].value == value
        assert by_field[dest].why
        assert by_field[dest].source is not Source.YOU
        assert getattr(asked, dest) is None
    told = {one.field for one in found.reasons if one.source is not Source.YOU} & options().keys()
    sizes_of_one = {f"{kind}_parallel_size" for kind in ("tensor", "pipeline", "data")} - found.options.keys()
    assert told - sizes_of_one == found.options.keys()


def test_the_options_of_a_plan_are_what_it_says():
    found = plan(PlanRequest(), machine(4, linked=False), sized(200))
    assert all(getattr(found, dest) == value for dest, value in found.options.items())
    assert "tensor_parallel_size" not in found.options  # 1 is vLLM's own
    assert found.options["pipeline_parallel_size"] == 4


def test_a_length_is_cut_to_what_fits_and_that_is_said_loudly():
    found = plan(PlanRequest(), machine(1), sized(60, max_model_len=1_000_000))
    assert 100_000 < found.max_model_len < 200_000
    assert found.kv_cache.tokens >= found.max_model_len
    assert any(text.startswith("max_model_len is cut from the model's own 1,000,000") for text in found.warnings)
    assert reason(found, "max_model_len").source == "hardware"
    assert "1,000,000" in reason(found, "max_model_len").why


def test_auto_is_the_longest_that_fits_without_a_warning_for_a_models_own_length():
    auto = plan(PlanRequest(max_model_len=-1), machine(1), sized(60, max_model_len=1_000_000))
    assert auto.max_model_len == plan(PlanRequest(), machine(1), sized(60, max_model_len=1_000_000)).max_model_len
    assert reason(auto, "max_model_len").why == "set by you to auto: the longest request that fits"
    assert "max_model_len" not in auto.options


def test_room_for_adapters_is_taken_from_the_cache():
    one = plan(PlanRequest(enable_lora=True), machine(1), sized(16))
    many = plan(PlanRequest(enable_lora=True, max_loras=8, max_lora_rank=256), machine(1), sized(16))
    none = plan(PlanRequest(max_loras=8, max_lora_rank=256), machine(1), sized(16))
    assert none.memory == plan(PlanRequest(), machine(1), sized(16)).memory
    each = (one.memory.weights - none.memory.weights) / 16  # vLLM's default rank, of one adapter
    assert many.memory.weights - none.memory.weights == 8 * 256 * each > 9 * GIB
    assert many.kv_cache.tokens < one.kv_cache.tokens < none.kv_cache.tokens


def test_a_length_that_the_person_sets_is_never_cut():
    text = refusal(PlanRequest(max_model_len=900_000), machine(1), sized(60, max_model_len=1_000_000))
    assert re.search(r"[\d.]+ GiB are missing to a request of 900,000 tokens; [\d,]+ would fit", text)


def test_more_than_the_model_is_made_for_is_refused_unless_the_person_knows_better():
    assert "made for 8192 tokens" in refusal(PlanRequest(max_model_len=8193), machine(1), sized(16))
    found = plan(PlanRequest(max_model_len=8193, long_max_model_len=True), machine(1), sized(16))
    assert found.max_model_len == 8193
    assert plan(PlanRequest(max_model_len=8192), machine(1), sized(16)).max_model_len == 8192


def test_a_guess_of_vllms_that_costs_much_of_the_cache_is_told_of():
    def told(asked, weights):
        return [text for text in plan(asked, machine(total=79), sized(weights, heads=64)).warnings if "guess" in text]

    yours = PlanRequest(gpu_memory_utilization=0.92)
    (text,) = told(yours, 61)
    (gpu,) = machine(total=79).gpus
    graphs = [
        memory.memory_of_gpu(placed(sized(61, heads=64), run(estimate_cudagraphs=guess), Layout(), gpu))
        for guess in (True, False)
    ]
    guess, taken = (units.gib(one.cuda_graphs) for one in graphs)
    assert f"{guess} off the KV cache for CUDA graphs that take {taken}" in text
    assert not told(yours, 16)  # little of a large cache
    assert not told(PlanRequest(), 61)
    for more in ({"estimate_cudagraphs": True}, {"enforce_eager": True}, {"kv_cache_memory_bytes": 2 * GIB}):
        assert not told(msgspec.structs.replace(yours, **more), 61)


def test_a_utilisation_that_leaves_no_margin_is_taken_with_a_warning():
    found = plan(PlanRequest(gpu_memory_utilization=0.99), machine(1), sized(16))
    assert any("gpu_memory_utilization 0.99 leaves less than" in text for text in found.warnings)
    assert not plan(PlanRequest(gpu_memory_utilization=0.9), machine(1), sized(16)).warnings


def test_a_utilisation_of_more_than_is_free_is_refused_as_vllm_would():
    assert "to gpu_memory_utilization 0.9, with 49.49 GiB free" in refusal(
        PlanRequest(gpu_memory_utilization=0.9), machine(1, free=50), sized(16)
    )


def test_smaller_batches_are_tried_where_the_usual_one_leaves_no_useful_cache():
    wide = sized(14, vocab_size=256_000)
    found = plan(PlanRequest(), machine(1, total=71, free=24), wide)
    assert (found.max_num_batched_tokens, found.max_num_seqs) == (2048, 256)
    assert "less than vLLM's default, 1,024" in reason(found, "max_num_seqs").why
    assert reason(found, "max_num_seqs").source == "rule"
    usual = plan(PlanRequest(), machine(1), wide)
    assert (usual.max_num_batched_tokens, usual.max_num_seqs) == (8192, 1024)
    assert reason(usual, "max_num_seqs").source == "vLLM"


def test_a_smaller_batch_is_not_blamed_on_states_that_a_model_has_not():
    """An L4's own batch has as many tokens as the next smaller ones, and more requests."""
    found = plan(
        PlanRequest(), machine(1, total=22, capability=(8, 9), name="NVIDIA L4"), sized(14, vocab_size=256_000)
    )
    assert (found.max_num_batched_tokens, found.max_num_seqs) == (2048, 64)
    assert "activations would leave too little" in reason(found, "max_num_seqs").why


def test_a_batch_that_vllm_itself_would_take_is_called_its_own():
    doubled = plan(PlanRequest(performance_mode="throughput"), machine(1), sized(16))
    assert (doubled.max_num_batched_tokens, doubled.max_num_seqs) == (16384, 2048)
    short = plan(PlanRequest(max_num_seqs=2, max_model_len=100), machine(1), sized(16))
    assert short.max_num_batched_tokens == 200
    whole = plan(PlanRequest(), machine(1), sized(1, task="pooling", max_model_len=32_768))
    assert whole.max_num_batched_tokens == 32_768
    for found in (doubled, short, whole):
        told = reason(found, "max_num_batched_tokens")
        assert told.source == "vLLM"
        assert told.why.startswith("what vLLM makes of its default, 8,192")


def test_no_more_requests_than_recurrent_states_fit():
    layers = (*[msgspec.structs.replace(STATE, state_shapes=((4096, 64, 128),))] * 16, *[FULL] * 16)
    found = plan(PlanRequest(), machine(1), model(layers=layers))
    assert found.max_num_seqs < 1024
    assert "recurrent state" in reason(found, "max_num_seqs").why


# ---- nothing fits


def test_the_refusal_says_by_how_much_and_what_would_fit():
    text = refusal(PlanRequest(), machine(1), sized(100))
    assert text.startswith("made-up on 1 x NVIDIA H100 80GB HBM3: TP=1: ")
    assert re.search(r"\d\d\.\d\d GiB of GPU 0", text)
    assert "what would fit: " in text
    assert "2 of these GPUs" in text
    assert "--quantization fp8" in text
    assert text.count("; or ") == 2


FP8_KV = PlanRequest(fp8_kv=True)


def test_an_fp8_cache_is_chosen_where_it_is_allowed_and_holds_twice_the_tokens():
    plain, halved = plan(PlanRequest(), machine(), sized(16)), plan(FP8_KV, machine(), sized(16))
    assert "kv_cache_dtype" not in plain.options
    assert halved.options["kv_cache_dtype"] == halved.kv_cache.dtype == "fp8"
    assert halved.kv_cache.tokens == pytest.approx(2 * plain.kv_cache.tokens, rel=1e-3)
    [why] = [reason for reason in halved.reasons if reason.field == "kv_cache_dtype"]
    assert why.source == "rule"
    assert "launch.quality fp8-kv" in why.why


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ({"capability": (8, 0)}, {}),
        ({}, {"quantization": quantized("fp8", bits=8, kv_cache_dtype="fp8")}),
        ({}, {"mla": DEEPSEEK}),
    ],
    ids=["a GPU without FP8", "a checkpoint that says so itself", "a latent cache"],
)
def test_an_fp8_cache_is_not_chosen_for(where, changes):
    assert "kv_cache_dtype" not in plan(FP8_KV, machine(**where), sized(16, **changes)).options


def test_a_cache_that_the_person_chose_stays():
    chosen = plan(msgspec.structs.replace(FP8_KV, kv_cache_dtype="auto"), machine(), sized(16))
    assert chosen.kv_cache.dtype == "bfloat16"
    assert "kv_cache_dtype" not in chosen.options


def test_fewer_tokens_and_an_fp8_cache_are_offered_where_they_would_do():
    asked = PlanRequest(max_model_len=400_000)
    text = refusal(asked, machine(1), sized(50, max_model_len=1_000_000))
    offered = re.search(r"--max-model-len (\d+); or --kv-cache-dtype fp8", text)
    assert offered
    longest = int(offered[1])
    assert plan(msgspec.structs.replace(asked, max_model_len=longest), machine(1), sized(50, max_model_len=1_000_000))
    assert plan(msgspec.structs.replace(asked, kv_cache_dtype="fp8"), machine(1), sized(50, max_model_len=1_000_000))


def test_a_set_utilisation_or_split_is_offered_to_be_dropped():
    assert "no --gpu-memory-utilization" in refusal(PlanRequest(gpu_memory_utilization=0.3), machine(1), sized(40))
    assert "no parallel sizes set" in refusal(
        PlanRequest(tensor_parallel_size=1, pipeline_parallel_size=1), machine(2), sized(100)
    )
    assert "no --kv-cache-memory-bytes" in refusal(PlanRequest(kv_cache_memory_bytes=70 * GIB), machine(1), sized(16))


def test_what_no_change_would_make_fit_is_said_so():
    assert "take a smaller model or larger GPUs" in refusal(
        PlanRequest(quantization="fp8"), machine(1, total=8, name="small", capability=(8, 6)), sized(9000)
    )


def test_a_split_that_can_never_be_says_why():
    text = refusal(PlanRequest(tensor_parallel_size=3), machine(4), sized(16))
    assert "32 attention heads are not divisible by TP=3" in text
    assert "change what was set" in text


# ---- the CPU


def cpu(available=64, *, nodes=1):
    found = tuple(NumaNode(index=n, cores=8, memory_total=available * GIB // nodes) for n in range(nodes))
    facts = Cpu(cores=8, memory_total=256 * GIB, memory_limit=None, memory_available=available * GIB, numa_nodes=found)
    return Hardware(gpus=(), cpu=facts)


def test_on_the_cpu_the_cache_is_set_in_bytes_and_nothing_is_said_of_gpus():
    found = plan(PlanRequest(), cpu(128), sized(2))
    assert sizes(found) == (1, 1, 1)
    assert (found.gpus_per_replica, found.gpu_memory_utilization, found.env) == (0, 0.0, {})
    assert found.options["kv_cache_memory_bytes"] == pytest.approx(found.kv_cache.bytes, rel=0.01)
    assert "gpu_memory_utilization" not in found.options
    assert found.kv_cache.tokens >= 8192 + 128 * 2048
    assert found.kv_cache.tokens < 1.1 * (8192 + 128 * 2048)


def test_on_a_small_machine_the_cache_takes_half_of_what_weights_leave():
    found = plan(PlanRequest(), cpu(16), sized(2))
    left = 16 * GIB - found.memory.weights - found.memory.non_torch
    assert found.kv_cache.bytes == pytest.approx(left / 2, rel=0.01)
    assert "half of the memory" in reason(found, "kv_cache_memory_bytes").why


def test_on_the_cpu_what_the_person_says_of_the_cache_counts():
    flag = plan(PlanRequest(kv_cache_memory_bytes=3 * GIB), cpu(), sized(2))
    assert flag.kv_cache.bytes == pytest.approx(3 * GIB, rel=0.01)
    assert "kv_cache_memory_bytes" not in flag.options
    variable = plan(PlanRequest(cpu_kv_cache_bytes=2 * GIB, kv_cache_memory_bytes=3 * GIB), cpu(), sized(2))
    assert variable.kv_cache.bytes == pytest.approx(2 * GIB, rel=0.01)
    assert "VLLM_CPU_KVCACHE_SPACE" in reason(variable, "kv_cache_memory_bytes").why
    assert "are missing to a KV cache of 90.00 GiB" in refusal(
        PlanRequest(cpu_kv_cache_bytes=90 * GIB), cpu(), sized(2)
    )


def test_on_the_cpu_a_share_that_the_person_sets_is_of_the_node_and_left_to_vllm():
    found = plan(PlanRequest(gpu_memory_utilization=0.5), cpu(), sized(2))
    taken = found.memory.weights + found.memory.non_torch
    assert found.kv_cache.bytes == pytest.approx(32 * GIB - taken, rel=0.01)
    assert found.gpu_memory_utilization == 0.5
    assert "kv_cache_memory_bytes" not in found.options
    assert reason(found, "gpu_memory_utilization").source == "you"
    assert "to a KV cache" in refusal(
        PlanRequest(gpu_memory_utilization=1.0),
        msgspec.structs.replace(cpu(), cpu=msgspec.structs.replace(cpu().cpu, memory_available=20 * GIB)),
        sized(2),
    )


def test_a_cpu_without_the_memory_is_refused_by_how_much():
    text = refusal(PlanRequest(), cpu(8), sized(16))
    assert re.search(r"on this CPU: [\d.]+ GiB of memory are missing before any KV cache", text)
    assert "raise the memory limit" in text
    assert "are missing to a KV cache of 60.00 GiB" in refusal(
        PlanRequest(kv_cache_memory_bytes=60 * GIB), cpu(), sized(16)
    )


def test_a_second_numa_node_is_pointed_out_and_used_when_asked_for():
    found = plan(PlanRequest(), cpu(nodes=2), sized(2))
    assert any("2 NUMA nodes" in text for text in found.warnings)
    both = plan(PlanRequest(tensor_parallel_size=2), cpu(nodes=2), sized(2))
    assert both.tensor_parallel_size == 2
    assert not any("NUMA" in text for text in both.warnings)
    assert both.max_num_seqs == 256


def test_one_small_numa_node_bounds_a_worker():
    whole = plan(PlanRequest(kv_cache_memory_bytes=20 * GIB), cpu(), sized(2))
    assert whole.kv_cache.bytes
    nodes = (NumaNode(index=0, cores=8, memory_total=30 * GIB, memory_available=10 * GIB),)
    small = msgspec.structs.replace(cpu(), cpu=msgspec.structs.replace(cpu().cpu, numa_nodes=nodes))
    assert "are missing to a KV cache" in refusal(PlanRequest(kv_cache_memory_bytes=20 * GIB), small, sized(2))


def test_no_machine_at_all_is_refused():
    assert "neither GPUs nor a CPU" in refusal(PlanRequest(), Hardware(gpus=()), sized(2))


# ---- any model on any machine

ASKED = st.builds(
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
@given(ASKED, MACHINES, MODELS)
def test_any_question_gets_a_plan_or_one_line(asked, hardware, of):
    try:
        found = plan(asked, hardware, of)
    except UsageError as error:
        one_line = "\n" not in str(error)
        assert one_line
        return
    each = found.tensor_parallel_size * found.pipeline_parallel_size
    assert found.gpus_per_replica == each
    assert each * found.data_parallel_size <= len(hardware.gpus)
    assert found.max_num_seqs <= found.max_num_batched_tokens or asked.max_num_batched_tokens
    assert found.kv_cache.tokens >= found.max_model_len
    for gpu in hardware.gpus:
        if asked.gpu_memory_utilization is None:
            assert memory.requested_bytes(gpu, found.gpu_memory_utilization) + found.memory.context <= gpu.memory_free


@settings(deadline=None)
@given(MACHINES, MODELS)
def test_to_ask_for_what_wwith_command_changes_nothing(hardware, of):
    try:
        found = plan(PlanRequest(), hardware, of)
    except UsageError:
        return
    fields = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "gpu_memory_utilization",
              "max_model_len", "max_num_seqs", "max_num_batched_tokens", "watermark")  # fmt: skip
    asked = {field: getattr(found, field) for field in fields}
    again = plan(PlanRequest(**asked, estimate_cudagraphs=not found.env), hardware, of)  # its environment
    assert isinstance(again, Plan)
    assert again.kv_cache == found.kv_cache
    assert again.options == {}


def test_one_utilisation_leaves_every_stage_what_it_may_take_while_serving():
    of = read_model(str(Path(__file__).parents[2] / "data" / "models" / "Qwen--Qwen3-30B-A3B"))
    hardware = parse_hardware_name("H200:2")
    found = plan(PlanRequest(pipeline_parallel_size=2, tensor_parallel_size=1), hardware, of)
    batch = run(max_model_len=found.max_model_len, max_num_seqs=found.max_num_seqs,
                max_num_batched_tokens=found.max_num_batched_tokens, estimate_cudagraphs=False)  # fmt: skip
    stages = memory.memory_by_rank(placed(of, batch, Layout(tensor=1, pipeline=2, data=1), hardware.gpus[0]))
    safe = [memory.safe_utilization(stage, batch, hardware.gpus[0]) for stage in stages]
    assert safe[0] < safe[1]  # though the last stage, with the head, leaves less for the cache
    assert memory.rank_with_least_room(stages, batch) == stages[1]
    assert found.gpu_memory_utilization == safe[0]
    more = PlanRequest(pipeline_parallel_size=2, tensor_parallel_size=1, gpu_memory_utilization=safe[1],
                 estimate_cudagraphs=False)  # fmt: skip
    assert any(text.endswith(f"up to {safe[0]} is safe") for text in plan(more, hardware, of).warnings)


# ---- the watermark


def test_room_is_kept_for_requests_that_can_outgrow_the_cache():
    found = plan(PlanRequest(), machine(1), sized(60))
    assert found.watermark == found.options["watermark"] == 0.02
    assert reason(found, "watermark").source == "rule"


@pytest.mark.parametrize(("share", "watermark"), [(0.9, 0), (1.1, 0.02)])
def test_no_room_is_kept_where_all_requests_fit_to_their_end(share, watermark):
    asked = PlanRequest(max_num_seqs=4, max_model_len=4096, max_num_batched_tokens=4096)
    tokens = plan(asked, machine(1), sized(60)).kv_cache.tokens
    asked = msgspec.structs.replace(asked, max_num_seqs=int(share * tokens / 4096))
    found = plan(asked, machine(1), sized(60))
    assert found.watermark == watermark
    assert ("watermark" in found.options) == (watermark > 0)


def test_no_room_is_kept_in_a_cache_for_few_requests():
    few = plan(PlanRequest(kv_cache_memory_bytes=3 * GIB, max_model_len=8192), machine(1), sized(60))
    assert 2 * 8192 < few.kv_cache.tokens < 16 * 2048
    assert few.watermark == 0


def test_no_room_is_kept_for_a_model_that_pools():
    assert plan(PlanRequest(), machine(1), sized(1, task="pooling")).watermark == 0


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_watermark_of_ones_own_stays(share):
    found = plan(PlanRequest(watermark=share), machine(1), sized(60))
    assert found.watermark == reason(found, "watermark").value == share
    assert reason(found, "watermark").source == "you"
    assert "watermark" not in found.options


@pytest.mark.parametrize(("times", "watermark"), [(1.9, 0), (2.1, 0.02)])
def test_no_room_is_kept_where_the_longest_request_would_wait_for_it_alone(times, watermark):
    long = sized(60, max_model_len=1_000_000)
    tokens = plan(PlanRequest(max_model_len=60_000), machine(1), long).kv_cache.tokens
    found = plan(PlanRequest(max_model_len=int(tokens / times)), machine(1), long)
    assert found.watermark == watermark


# ---- CUDA graphs: counted by vLLM's guess, or by the plan


@pytest.mark.parametrize(
    "asked",
    [
        PlanRequest(gpu_memory_utilization=0.9),
        PlanRequest(kv_cache_memory_bytes=8 * GIB),
        PlanRequest(estimate_cudagraphs=True),
    ],
)
def test_vllm_guesses_at_graphs_where_the_person_decides(asked):
    found = plan(asked, machine(1), sized(16))
    assert found.env == {}


def test_the_plan_knows_what_graphs_take_and_says_so():
    ours, theirs = (
        plan(PlanRequest(), machine(1), sized(16)),
        plan(PlanRequest(estimate_cudagraphs=True), machine(1), sized(16)),
    )
    assert ours.env == NO_GUESS
    assert ours.kv_cache.tokens > theirs.kv_cache.tokens
    assert f"CUDA graphs {units.gib(ours.memory.cuda_graphs)} and" in reason(ours, "gpu_memory_utilization").why
    assert "CUDA graphs" not in reason(theirs, "gpu_memory_utilization").why
    asked_for = plan(PlanRequest(gpu_memory_utilization=0.9, estimate_cudagraphs=False), machine(1), sized(16))
    assert asked_for.env == NO_GUESS


def test_nothing_is_said_of_graphs_where_there_are_none():
    found = plan(PlanRequest(enforce_eager=True), machine(1), sized(16))
    assert "CUDA graphs" not in reason(found, "gpu_memory_utilization").why


@pytest.mark.parametrize(
    ("stored", "asked", "capability", "runs"),
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
def test_a_model_runs_in_the_dtype_that_was_asked_for_else_in_its_own(stored, asked, capability, runs):
    assert dtype_of(PlanRequest(dtype=asked), model(dtype=stored), capability and generation_of(capability)) == runs


def test_before_ampere_a_model_that_does_not_run_in_float16_runs_in_float32():
    assert dtype_of(PlanRequest(), model(model_type="gemma2"), Generation.TURING) == "float32"
    assert dtype_of(PlanRequest(), model(model_type="gemma2"), Generation.A100) == "bfloat16"


def on_amx(**changes):
    """A CPU machine with AMX instructions, and the plan of a model there."""
    hardware = msgspec.structs.replace(CPU_MACHINE, cpu=msgspec.structs.replace(CPU_MACHINE.cpu, amx=True))
    asked = changes.pop("asked", PlanRequest())
    of = msgspec.structs.replace(sized(1, layers=4), **changes)
    return plan(asked, hardware, of)


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, "float16"),
        ({"model_type": "gemma2"}, "float32"),  # does not run in float16
        ({"dtype": "float32"}, None),
        ({"dtype": "float16"}, None),
        ({"mla": DEEPSEEK}, None),  # takes other kernels, which know bfloat16 alone
        ({"quantization": quantized("mxfp4")}, None),  # computes in bfloat16 alone
    ],
)
def test_on_a_cpu_with_amx_no_plan_has_attention_in_bfloat16(changes, runs):
    found = on_amx(**changes)
    assert found.options.get("dtype") == runs
    assert [one.value for one in found.reasons if one.field == "dtype"] == ([runs] if runs else [])
    elsewhere = plan(PlanRequest(), CPU_MACHINE, msgspec.structs.replace(sized(1, layers=4), **changes))
    assert not [one for one in elsewhere.reasons if one.field == "dtype"]


@pytest.mark.parametrize(("head_dim", "runs"), [(80, None), (96, "float16")])
def test_heads_that_take_no_amx_instructions_keep_bfloat16(head_dim, runs):
    layers = (msgspec.structs.replace(FULL, head_dim=head_dim, head_dim_v=head_dim),) * 4
    assert on_amx(layers=layers).options.get("dtype") == runs


def test_bfloat16_on_a_cpu_with_amx_is_taken_and_warned_of():
    [warning] = on_amx(asked=PlanRequest(dtype="bfloat16")).warnings
    assert "SIGILL" in warning
    assert "--dtype float16" in warning
    [warning] = on_amx(quantization=quantized("mxfp4")).warnings
    assert "no other" in warning
    assert on_amx(asked=PlanRequest(dtype="float16")).warnings == []
    assert on_amx(asked=PlanRequest(dtype="bfloat16"), mla=DEEPSEEK).warnings == []
