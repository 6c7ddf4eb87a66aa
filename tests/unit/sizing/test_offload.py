"""Tests of weights in host memory. tests/engine/test_memory_flags_against_vllm.py compares them with vLLM."""

import pytest
from builders import GIB, MIB, gpu, model, placed, run, tensor

from vllm_launch.sizing.offload import LayerTensor, Offload, offloaded
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.weights import offloaded_by_rank, offloaded_on_host, weights_by_rank

LAYERS = 8
SIZES = {"self_attn.qkv_proj.weight": 48 * MIB, "mlp.gate_up_proj.weight": 224 * MIB, "mlp.down_proj.weight": 112 * MIB}
LAYER = sum(SIZES.values())
TENSORS = [LayerTensor(layer, path, size) for layer in range(LAYERS) for path, size in SIZES.items()]


def llm(layers=LAYERS):
    """Return a model with an embedding of 512 MiB, a head of 512 MiB and layers of 192 MiB."""
    rows = 512 * MIB // 2 // 4096
    parts = [
        f"model.layers.{n}.{name}_proj.weight" for n in range(layers) for name in ("mlp.gate", "mlp.up", "mlp.down")
    ]
    tensors = [tensor(name, 64 * MIB // 2 // 4096, 4096) for name in parts]
    ends = [tensor("model.embed_tokens.weight", rows, 4096), tensor("lm_head.weight", rows, 4096)]
    return model(layers=layers, vocab_size=rows, tensors=(*ends, *tensors))


def weights(offload, layout=None, device=None):
    return weights_by_rank(placed(llm(), run(offload=offload), layout, device or gpu()))


def test_uva_saves_its_limit_and_moves_one_tensor_beyond_it():
    result = offloaded(Offload(backend="uva", limit=2 * LAYER + 50 * MIB), TENSORS)
    assert result.saved == 2 * LAYER + 50 * MIB
    assert result.host == 2 * LAYER + (48 + 224) * MIB


def test_uva_saves_at_most_the_layers():
    result = offloaded(Offload(backend="uva", limit=1000 * GIB), TENSORS)
    assert (result.saved, result.host) == (LAYERS * LAYER, LAYERS * LAYER)


def test_pinned_memory_is_rounded_up_to_powers_of_two_for_each_tensor():
    result = offloaded(Offload(backend="uva", limit=LAYER), TENSORS)
    assert result.pinned == (64 + 256 + 128) * MIB


def test_prefetch_moves_the_last_layers_of_each_group_and_keeps_buffers():
    result = offloaded(Offload(backend="prefetch", group_size=4, num_in_group=2, prefetch_step=1), TENSORS)
    assert (result.host, result.saved) == (4 * LAYER, 3 * LAYER)
    more = offloaded(Offload(backend="prefetch", group_size=4, num_in_group=2, prefetch_step=3), TENSORS)
    assert more.saved == LAYER


def test_prefetch_can_cost_more_than_it_saves():
    assert offloaded(Offload(backend="prefetch", group_size=8, prefetch_step=2), TENSORS).saved == -LAYER


def test_layers_of_different_sizes_need_buffers_of_each_size():
    uneven = [*TENSORS, LayerTensor(LAYERS - 1, "mlp.down_proj.weight", 64 * MIB)]
    result = offloaded(Offload(backend="prefetch", group_size=2), uneven)
    assert result.host - result.saved == LAYER + 64 * MIB


@pytest.mark.parametrize(
    ("params", "moved"),
    [(("down_proj",), 112), (("mlp",), 336), (("mlp.down_proj",), 112), (("down",), 0), (("proj.weight",), 0)],
)
def test_only_parameters_with_a_named_segment_move(params, moved):
    result = offloaded(Offload(backend="uva", limit=1000 * GIB, params=params), TENSORS)
    assert result.host == LAYERS * moved * MIB


def test_a_gpu_holds_what_is_not_offloaded():
    assert weights(None)[0] - weights(Offload(backend="uva", limit=GIB))[0] == GIB
    everything = weights(Offload(backend="uva", limit=1000 * GIB))[0]
    assert everything == weights(None)[0] - LAYERS * 192 * MIB
    half = weights(Offload(backend="prefetch", group_size=2))[0]
    assert weights(None)[0] - half == (LAYERS // 2 - 1) * 192 * MIB


def test_vllms_names_of_fused_tensors_select_weights():
    for names, moved in ((("gate_up_proj",), 128), (("mlp.down_proj",), 64), (("gate_proj",), 0)):
        offload = Offload(backend="uva", limit=1000 * GIB, params=names)
        assert weights(None)[0] - weights(offload)[0] == LAYERS * moved * MIB


def test_each_pipeline_stage_counts_its_own_groups():
    offload = Offload(backend="prefetch", group_size=4)
    layout = Layout(pipeline=2)
    assert [moved.host for moved in offloaded_by_rank(placed(llm(), run(offload=offload), layout, gpu()))] == [
        192 * MIB, 192 * MIB,
    ]  # fmt: skip


def test_every_gpu_of_the_machine_has_its_own_copy_on_the_host():
    offload = Offload(backend="uva", limit=GIB)
    one = offloaded_on_host(placed(llm(), run(offload=offload), Layout(), gpu()))
    four = offloaded_on_host(placed(llm(), run(offload=offload), Layout(data=4), gpu()))
    assert sum(moved.host for moved in four) == 4 * sum(moved.host for moved in one)


def test_the_cpu_engine_offloads_nothing():
    on_cpu = placed(llm(), run(offload=Offload(backend="uva", limit=GIB)), None, None)
    assert offloaded_by_rank(on_cpu) == ((0, 0, 0),)
