"""Tests of the bytes of tensors on a GPU, from their names. A tensor of (512, 1024) in bfloat16 has 1 MiB."""

from __future__ import annotations

import msgspec
import pytest
from builders import DEEPSEEK, EXPERTS, FULL, LATENT, MIB, MOE, STATE, gpu, model, placed, quantized, run, tensor
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.model.model import Experts, Layer
from vllm_launch.sizing.memory import memory_of_gpu
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.weights import allocated, weights, weights_by_rank

ONE, TP2, TP8 = Layout(), Layout(tensor=2), Layout(tensor=8)
LAYER = "model.layers.0."
BARE = (Layer(kind="none"),) * 4  # no attention, so no table of rotary positions


def nbytes(*tensors, layout=ONE, batch=None, layers=BARE, **changes):
    """Return the bytes of weights on a GPU of each stage, or a number if there is one stage."""
    result = weights_by_rank(placed(model(layers=layers, tensors=tensors, **changes), batch or run(), layout))
    return result[0] if len(result) == 1 else result


def mib(name, size=1, dtype="BF16"):
    """Return a tensor of ``size`` MiB in bfloat16."""
    return tensor(name, 512, 1024 * size, dtype=dtype)


# --- PyTorch's allocator (c10/cuda/CUDACachingAllocator.cpp)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 0),
        (1, 512),
        (512, 512),
        (513, 1024),
        (10 * MIB - 1, 10 * MIB),
        (10 * MIB, 10 * MIB),
        # a segment of 12 MiB. Other tensors can use the rest if it is larger than 1 MiB
        (10 * MIB + 1, 10 * MIB + 512),
        (11 * MIB - 512, 11 * MIB - 512),
        (11 * MIB, 12 * MIB),
        (12 * MIB, 12 * MIB),
        (16 * MIB + 1, 16 * MIB + 512),
        # from 20 MiB on, other tensors never use the rest
        (18 * MIB + 1, 20 * MIB),
        (20 * MIB, 20 * MIB),
        (20 * MIB + 1, 22 * MIB),
        (1001 * MIB, 1002 * MIB),
    ],
)
def test_the_allocator_rounds_up(size, expected):
    assert allocated(size) == expected


@given(st.integers(0, 100 * MIB), st.integers(0, 1000))
def test_the_allocator_adds_less_than_2_mib_and_never_gives_a_larger_tensor_less(size, more):
    assert 0 <= allocated(size) - size < 2 * MIB
    assert allocated(size + more) >= allocated(size)


# --- which tensors are split


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.q_proj.weight", "self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight",
        "mlp.up_proj.weight", "mlp.down_proj.weight", "mlp.gate_up_proj.weight", "mlp.fc2.weight",
        "feed_forward.w1.weight", "feed_forward.w2.weight", "self_attn.q_b_proj.weight", "self_attn.kv_b_proj.weight",
        "mixer.in_proj.weight", "mixer.out_proj.weight", "attn.c_attn.weight", "attn.c_proj.weight",
        "mlp.gate_proj.bias", "self_attn.q_proj.bias", "mixer.A_log", "mlp.shared_experts.down_proj.weight",
    ],
)  # fmt: skip
def test_linear_layers_are_split_over_tensor_parallel_ranks(name):
    assert nbytes(mib(LAYER + name)) == MIB
    assert nbytes(mib(LAYER + name), layout=TP8) == MIB // 8
    assert nbytes(mib(LAYER + name), layout=Layout(data=8)) == MIB


@pytest.mark.parametrize(
    "name",
    [
        "input_layernorm.weight", "self_attn.q_norm.weight", "mlp.gate.weight", "mlp.router.weight", "ln_1.weight",
        "mlp.shared_expert_gate.weight", "self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight",
        "mlp.gate.e_score_correction_bias", "self_attn.indexer.wk.weight", "mlp.down_proj.bias", "self_attn.o_proj.bias",
    ],
)  # fmt: skip
def test_norms_routers_low_rank_projections_and_output_biases_are_complete_on_every_rank(name):
    assert nbytes(mib(LAYER + name), layout=TP8) == MIB


def test_a_scalar_has_512_bytes_on_every_rank():
    assert nbytes(tensor(LAYER + "mixer.scalar"), layout=TP8) == 512
    assert nbytes(tensor(LAYER + "mixer.scalar", 1), layout=TP8) == 512
    # 512 and 256 numbers of two bytes: a quarter and an eighth of 1,024 bytes is less than a step of 512
    assert nbytes(tensor(LAYER + "mixer.vector", 4096), layout=TP8) == 1024
    assert nbytes(tensor(LAYER + "mixer.vector", 2, 4096), layout=TP8) == 2048


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_kv_heads_are_copied_if_there_are_more_ranks_than_heads(name):
    projection = mib(f"{LAYER}self_attn.{name}.weight", 8)
    two = (msgspec.structs.replace(FULL, kv_heads=2),) * 4
    rope = nbytes(layers=two)
    for ranks, share in [(1, 8), (2, 4), (8, 4)]:
        assert nbytes(projection, layers=two, layout=Layout(tensor=ranks)) - rope == share * MIB
    # a layer without its own KV heads has the model's eight
    assert nbytes(projection, layout=Layout(tensor=16)) == MIB
    assert nbytes(projection, layout=Layout(tensor=16), kv_heads=4) == 2 * MIB
    assert nbytes(mib(f"model.resampler.{name}.weight", 8), layout=Layout(tensor=16)) == MIB
    assert nbytes(mib(f"{LAYER}self_attn.q_proj.weight", 16), layout=Layout(tensor=16)) == MIB


def test_the_copies_of_a_layer_depend_on_its_own_kv_heads():
    layers = tuple(msgspec.structs.replace(FULL, kv_heads=heads) for heads in (1, 4))
    tensors = [mib(f"model.layers.{n}.self_attn.k_proj.weight", 8) for n in (0, 1)]
    assert nbytes(*tensors, layers=layers, layout=TP8) - nbytes(layers=layers) == (8 + 2) * MIB


def test_the_up_projection_of_latent_attention_is_split_and_the_down_projection_is_not():
    layers = (LATENT,) * 2
    parts = [mib(LAYER + "self_attn.kv_b_proj.weight", 8), mib(LAYER + "self_attn.kv_a_proj_with_mqa.weight", 8)]
    assert nbytes(*parts, layers=layers, layout=TP8) - nbytes(layers=layers) == (1 + 8) * MIB


# --- fused tensors are rounded up once


def small(*names):
    """Return tensors of 600 bytes. Each has 1,024 bytes if it is not fused."""
    return [tensor(LAYER + name, 3, 100) for name in names]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"], 2048),  # 1,800
        (["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"], 2048),
        (["self_attn.q_proj.weight", "self_attn.k_proj.bias"], 2 * 1024),
        (["mlp.gate_proj.weight", "mlp.up_proj.weight"], 1536),  # 1,200
        (["mlp.gate_proj.weight", "mlp.shared_expert.up_proj.weight"], 2 * 1024),
        (["mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"], 1536),
        (["mlp.gate_proj.weight", "mlp.down_proj.weight"], 2 * 1024),
        (["self_attn.o_proj.weight", "mlp.down_proj.weight"], 2 * 1024),
        # experts: one tensor has gate and up of all experts, another has down of all
        (["mlp.experts.0.gate_proj.weight", "mlp.experts.1.gate_proj.weight", "mlp.experts.1.up_proj.weight"], 2048),
        (["block_sparse_moe.experts.0.w1.weight", "block_sparse_moe.experts.0.w3.weight"], 1536),
        (["mlp.experts.0.down_proj.weight", "mlp.experts.1.down_proj.weight"], 1536),
        (["mlp.experts.0.gate_proj.weight", "mlp.experts.0.down_proj.weight"], 2 * 1024),
        (["mlp.experts.0.w1.weight", "mlp.experts.0.w2.weight"], 2 * 1024),
        (["mlp.experts.0.gate_proj.weight", "mlp.experts.0.gate_proj.weight_scale"], 2 * 1024),
        (["mlp.experts.0.up_proj.weight_scale", "mlp.experts.0.gate_proj.weight_scale"], 1536),
        (["mlp.experts.0.up_proj.qzeros", "mlp.experts.0.gate_proj.qweight"], 2 * 1024),
        (["mlp.experts.gate_up_proj_bias", "mlp.experts.gate_up_proj"], 2 * 1024),
    ],
)
def test_fused_tensors_are_rounded_up_once(names, expected):
    assert nbytes(*small(*names)) == expected


def test_tensors_of_different_layers_are_not_fused():
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"]
    assert nbytes(*[tensor(name, 3, 100) for name in names]) == 2 * 1024


# --- experts


def test_experts_are_spread_over_tensor_and_data_parallel_ranks():
    parts = [mib(f"{LAYER}mlp.experts.{n}.{part}.weight", 4) for n in range(4) for part in ("gate_proj", "down_proj")]
    for layout in (Layout(tensor=4, data=2), Layout(tensor=4, data=2, expert_parallel=True)):
        assert nbytes(*parts, layout=layout, experts=EXPERTS) == 32 * MIB // 8


def test_gpt_oss_pads_the_inputs_of_its_experts_to_128():
    """fused_moe/oracle/mxfp4.py, TRITON: 2,880 inputs become 2,944."""
    experts = Experts(count=2, per_token=1, intermediate_size=2880)
    blocks = [
        tensor(LAYER + "mlp.experts.gate_up_proj_blocks", 2, 5760, 90, 16, dtype="U8"),
        tensor(LAYER + "mlp.experts.down_proj_blocks", 2, 2880, 90, 16, dtype="U8"),
    ]
    result = nbytes(*blocks, experts=experts, hidden_size=2880, quantization=quantized("mxfp4"))
    rows = 2 * (5760 + 2880)
    assert result == allocated(2 * 5760 * 2944 // 2) + allocated(2 * 2880 * 2944 // 2)
    assert result >= rows * 2944 // 2
    # the input of down_proj is the experts' width, that of gate and up the model's
    narrow = msgspec.structs.replace(experts, intermediate_size=128)
    assert nbytes(blocks[1], experts=narrow, hidden_size=2880) == allocated(2 * 2880 * 2880 // 2)
    assert nbytes(blocks[0], experts=narrow, hidden_size=2880) == allocated(2 * 5760 * 2944 // 2)
    assert nbytes(blocks[0], experts=experts, hidden_size=2944) == allocated(2 * 5760 * 2880 // 2)
    assert nbytes(blocks[0], hidden_size=2880) == allocated(2 * 5760 * 2880 // 2)  # config.json has no experts


def test_mxfp4_experts_are_padded_for_the_kernels_of_the_gpu():
    """fused_moe/oracle/mxfp4.py:mxfp4_round_up_hidden_size_and_intermediate_size, on one GPU's shard of 2,880 channels."""
    experts = Experts(count=2, per_token=1, intermediate_size=2880)
    kinds = [("gate_up_proj", 5760), ("down_proj", 2880)]
    stored = tuple(
        tensor(f"{LAYER}mlp.experts.{name}_{part}", 2, rows, 90, *last, dtype="U8")
        for name, rows in kinds
        for part, last in (("blocks", (16,)), ("scales", ()))
    )
    llm = model(layers=BARE, tensors=stored, experts=experts, hidden_size=2880, quantization=quantized("gpt_oss_mxfp4"))

    def padded(inner, outer, *, capability, layout):
        """Return the bytes of three matrices of two experts: half a byte for a number, and a byte for 32 numbers."""
        result = weights(placed(llm, run(), layout, gpu(capability=capability)))
        sizes = [count * 2 * inner * outer // part for count in (2, 1) for part in (2, 32)]
        return result, sum(allocated(size) for size in sizes)

    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        for layout, inner in [(ONE, 2944), (TP2, 1536), (Layout(tensor=2, expert_parallel=True), 2944 // 2)]:
            result, expected = padded(inner, 3072, capability=capability, layout=layout)
            assert result == expected
    # Hopper: 1,440 become 1,472, of which down_proj's inputs become 1,536
    hopper = weights(placed(llm, run(), TP2, gpu(capability=(9, 0))))
    blocks = allocated(2 * 2 * 1472 * 2944 // 2) + allocated(2 * 1536 * 2880 // 2)
    assert hopper == blocks + allocated(2 * 2 * 1472 * 90) + allocated(2 * 1472 * 90)


# --- vocabulary, head and pipelines

EMBEDDING, HEAD = tensor("model.embed_tokens.weight", 1024, 512), tensor("lm_head.weight", 1024, 512)


def test_the_vocabulary_is_padded_and_cut():
    rows = tensor("model.embed_tokens.weight", 1000, 512)  # pads to 1,024
    assert nbytes(rows) == MIB
    assert nbytes(rows, layout=TP8) == MIB // 8
    assert nbytes(tensor("lm_head.weight", 1000, 512), layout=TP8) == MIB // 8
    assert nbytes(tensor("lm_head.weight", 0, 512)) == 0
    assert nbytes(tensor("lm_head.weight_scale", dtype="F32")) == 512
    # the output of a layer with 1,000 rows is not a vocabulary
    assert nbytes(tensor(LAYER + "attention.output.weight", 1000, 512)) == 1_024_000


@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "gpt_neox.embed_in.weight", "tok_embeddings.weight", "output.weight"]
)
def test_embeddings_and_heads_are_recognised_by_other_names(name):
    assert nbytes(tensor(name, 1000, 512)) == MIB


def test_tied_embeddings_count_once():
    assert nbytes(EMBEDDING, HEAD) == 2 * MIB
    assert nbytes(EMBEDDING, HEAD, tie_word_embeddings=True) == nbytes(HEAD, EMBEDDING, tie_word_embeddings=True) == MIB
    # "output" of an attention layer is not a head
    assert nbytes(EMBEDDING, mib(LAYER + "attention.output.weight"), tie_word_embeddings=True) == 2 * MIB


def test_the_first_stage_has_the_embedding_and_the_last_has_norm_and_head():
    norm = mib("model.norm.weight")
    assert nbytes(EMBEDDING, HEAD, norm, layout=Layout(pipeline=3)) == (MIB, 0, 2 * MIB)
    assert nbytes(norm, layout=Layout(pipeline=2, tensor=2)) == (0, MIB)


def test_some_models_have_embedding_and_head_on_every_stage():
    """models/mixtral.py, qwen3_moe.py, gpt_oss.py and others do not check the rank before they create them."""
    three = Layout(pipeline=3)
    for model_type in ("mixtral", "qwen3_moe", "gpt_oss"):
        assert nbytes(EMBEDDING, HEAD, layout=three, model_type=model_type) == (2 * MIB,) * 3
    norm = mib("model.norm.weight")
    assert nbytes(EMBEDDING, norm, layout=three, model_type="gemma2", tie_word_embeddings=True) == (MIB, MIB, 2 * MIB)
    assert nbytes(EMBEDDING, HEAD, layout=three, model_type="lfm2") == (
        MIB,
        MIB,
        2 * MIB,
    )  # only the head checks the rank
    assert nbytes(EMBEDDING, HEAD, layout=three, model_type="deepseek_v2") == (MIB, 0, MIB)


def test_the_first_and_the_last_stage_have_tied_embeddings():
    assert nbytes(EMBEDDING, HEAD, tie_word_embeddings=True, layout=Layout(pipeline=3)) == (MIB, 0, MIB)
    assert nbytes(EMBEDDING, tie_word_embeddings=True, layout=Layout(pipeline=2, tensor=2)) == (MIB // 2, MIB // 2)
    assert nbytes(mib(LAYER + "mlp.down_proj.weight"), tie_word_embeddings=True, layout=Layout(pipeline=2)) == (MIB, 0)
    norm = mib("model.norm.weight", 2)
    assert nbytes(EMBEDDING, norm, tie_word_embeddings=True, layout=Layout(pipeline=2)) == (MIB, 3 * MIB)


def test_each_stage_has_its_layers():
    parts = [mib(f"model.layers.{n}.mlp.down_proj.weight", n + 1) for n in range(4)]
    assert nbytes(*parts, layout=Layout(pipeline=2)) == ((1 + 2) * MIB, (3 + 4) * MIB)
    # three stages of four layers: 1, 2, 1 (distributed/utils.py:get_pp_indices)
    assert nbytes(*parts, layout=Layout(pipeline=3)) == (1 * MIB, (2 + 3) * MIB, 4 * MIB)
    llm = model(layers=BARE, tensors=tuple(parts))
    assert weights(placed(llm, run(), Layout(pipeline=3))) == 5 * MIB
    assert weights(placed(llm, run(), ONE)) == 10 * MIB


@pytest.mark.parametrize("prefix", ["transformer.h.", "model.layers.", "blocks.", "encoder.layers.", "layers."])
def test_layers_are_recognised_by_other_names(prefix):
    assert nbytes(mib(f"{prefix}3.mlp.fc1.weight"), layout=Layout(pipeline=2)) == (0, MIB)


@pytest.mark.parametrize("name", ["final_layernorm", "ln_f", "norm_f", "norm"])
def test_the_last_norm_is_recognised_by_other_names(name):
    assert nbytes(mib(f"transformer.{name}.weight"), layout=Layout(pipeline=2)) == (0, MIB)


# --- tensors that are not loaded, or only sometimes


@pytest.mark.parametrize(
    "name",
    [
        LAYER + "self_attn.rotary_emb.inv_freq", "mtp.layers.0.mlp.up_proj.weight", LAYER + "mlp.up_proj.g_idx",
        "h.0.attn.bias", "h.0.attn.masked_bias", LAYER + "self_attn.k_output_scale", "model.layers.4.mlp.up_proj.weight",  # the fifth of four layers is a draft's
    ],
)  # fmt: skip
def test_tables_and_draft_layers_are_not_loaded(name):
    assert nbytes(mib(name)) == 0
    assert nbytes(mib(name), EMBEDDING) == MIB


def test_scales_are_loaded():
    assert nbytes(tensor(LAYER + "mlp.up_proj.input_scale", 1, dtype="F32")) == 512
    assert nbytes(mib(LAYER + "mlp.up_proj.weight_scale", dtype="F32")) == 2 * MIB


@pytest.mark.parametrize(
    "name",
    [
        "visual.blocks.3.attn.qkv.weight",
        "vision_tower.encoder.layers.9.mlp.fc1.weight",
        "multi_modal_projector.linear",
        "vpm.encoder.layers.9.mlp.fc1.weight",
        "model.connector.modality_projection.proj.weight",
    ],
)
def test_a_vision_tower_is_split_on_the_first_stage_and_absent_with_language_model_only(name):
    assert nbytes(mib(name), layout=Layout(pipeline=2, tensor=2)) == (MIB // 2, 0)
    assert nbytes(mib(name), EMBEDDING, batch=run(language_model_only=True)) == MIB
    assert nbytes(mib(LAYER + "mlp.fc1.weight"), batch=run(language_model_only=True)) == MIB


def test_vectors_of_a_vision_tower_are_not_split_and_its_tensors_are_not_fused():
    assert nbytes(tensor("visual.merger.norm.weight", 2048), layout=TP2) == 4096
    towers = [f"visual.blocks.0.attn.{name}.weight" for name in ("q_proj", "k_proj")]
    assert nbytes(*[tensor(name, 3, 100) for name in towers]) == 2 * 1024
    assert nbytes(mib("visual.norm.weight"), layout=Layout(pipeline=2)) == (MIB, 0)


# --- dtypes


@pytest.mark.parametrize(
    ("stored", "size"),
    [
        # loaded in the model's dtype
        ("BF16", 1), ("F16", 1), ("F32", 1), ("F64", 1),
        # quantised: loaded unchanged
        ("I64", 4), ("U64", 4), ("I32", 2), ("U32", 2), ("I16", 1), ("U16", 1), ("I8", 0.5), ("U8", 0.5),
        ("BOOL", 0.5), ("F8_E4M3", 0.5), ("F8_E5M2", 0.5), ("F8_E8M0", 0.5), ("F4", 0.25),
        ("F8_E4M3FNUZ", 0.5), ("F8_E5M2FNUZ", 0.5), ("F6_E2M3", 0.375), ("F6_E3M2", 0.375), ("C64", 4),
    ],
)  # fmt: skip
def test_weights_are_loaded_in_the_models_dtype_unless_they_are_quantised(stored, size):
    assert nbytes(mib(LAYER + "mlp.up_proj.weight", dtype=stored)) == size * MIB


def test_weights_are_loaded_in_the_dtype_of_the_run():
    name = LAYER + "mlp.up_proj.weight"
    assert nbytes(mib(name), batch=run(dtype="float32")) == 2 * MIB
    assert nbytes(mib(name), batch=run(dtype="float16"), dtype="float32") == MIB


@pytest.mark.parametrize(
    "kind", ["weight_scale", "weight_scale_inv", "scales", "A_log", "e_score_correction_bias", "absmax"]
)
def test_scales_and_decays_are_loaded_in_float32(kind):
    assert nbytes(mib(f"{LAYER}mlp.up_proj.{kind}", dtype="F32")) == 2 * MIB


# --- quantised by --quantization

FP8 = run(quantization="fp8")


@pytest.mark.parametrize(
    ("method", "size"),
    [
        ("fp8", 8), ("fp8_per_block", 8), ("int8_per_channel_weight_only", 8), ("mxfp8", 8),
        ("online", 8), ("bitsandbytes", 4.5),  # four bits, and a float32 absmax for 64 weights
        ("something-else", 16),
    ],
)  # fmt: skip
def test_quantization_makes_linear_layers_smaller(method, size):
    batch = run(quantization=method)
    assert nbytes(mib(LAYER + "mlp.up_proj.weight", 16), batch=batch) == size * MIB
    wide = run(quantization=method, dtype="float32")
    assert nbytes(mib(LAYER + "mlp.up_proj.weight", 16), batch=wide) == min(size, 32) * MIB * (2 if size == 16 else 1)


def test_quantization_gives_the_same_size_for_every_dtype_of_the_run():
    batch = run(quantization="fp8", dtype="float32")
    assert nbytes(mib(LAYER + "mlp.up_proj.weight", 16), batch=batch) == 8 * MIB


def test_quantization_does_not_apply_to_embeddings_norms_vectors_and_vision():
    for tensor_of_model in (
        EMBEDDING,
        HEAD,
        mib(LAYER + "input_layernorm.weight"),
        mib(LAYER + "mlp.gate.weight"),
        tensor(LAYER + "mlp.up_proj.bias", 512 * 1024),
        mib("visual.blocks.0.mlp.fc1.weight"),
        tensor(LAYER + "mixer.conv1d.weight", 8, 64, 1024),
        mib(LAYER + "mlp.up_proj.qweight", dtype="I8"),
    ):
        assert nbytes(tensor_of_model, batch=FP8) == nbytes(tensor_of_model)


def test_quantization_applies_to_experts_and_low_rank_projections():
    for tensor_of_model in (
        mib(LAYER + "mlp.experts.0.down_proj.weight", 2),
        tensor(LAYER + "mlp.experts.gate_up_proj", 2, 512, 1024),
        mib(LAYER + "self_attn.q_a_proj.weight", 2),
        mib(LAYER + "self_attn.q_b_proj.weight", 2),
        mib(LAYER + "self_attn.o_proj.weight", 2, dtype="F32"),
        mib(LAYER + "self_attn.k_proj.weight", 2, dtype="F16"),
    ):
        assert nbytes(tensor_of_model, batch=FP8) == MIB


def test_experts_int8_quantises_only_experts():
    """quantization/experts_int8.py:get_quant_method."""
    only = run(quantization="experts_int8")
    assert nbytes(mib(LAYER + "mlp.experts.0.down_proj.weight", 2), batch=only) == MIB
    assert nbytes(mib(LAYER + "self_attn.o_proj.weight", 2), batch=only) == 2 * MIB
    assert nbytes(layers=(LATENT,), mla=DEEPSEEK, batch=only) == nbytes(layers=(LATENT,), mla=DEEPSEEK)


def test_a_quantised_checkpoint_is_not_quantised_again():
    assert nbytes(mib(LAYER + "mlp.up_proj.weight"), batch=FP8, quantization=quantized("awq")) == MIB


# --- tensors that are not in the checkpoint


def test_the_table_of_rotary_positions_has_the_longest_length():
    """rotary_embedding/base.py:_compute_cos_sin_cache: positions times head_dim."""
    assert nbytes(layers=(FULL,)) == 8192 * 128 * 2
    assert nbytes(layers=(FULL,), batch=run(max_model_len=100)) == 8192 * 128 * 2
    assert nbytes(layers=(FULL,), batch=run(max_model_len=16_384)) == 16_384 * 128 * 2
    assert nbytes(layers=(FULL,), batch=run(dtype="float32")) == 8192 * 128 * 4
    assert nbytes(layers=(FULL, STATE), layout=Layout(pipeline=2, tensor=2)) == (2 * MIB, 2 * MIB)
    assert nbytes(layers=(STATE, *BARE)) == 0


def test_latent_attention_copies_a_quantised_up_projection():
    """mla_attention.py:split_kv_b_proj: W_UK_T and W_UV of each layer, for a rank's own heads, in one tensor."""
    rope = 8192 * 64 * 2
    both = 512 * 32 * (128 + 128) * 2  # rank, heads, widths: 8 MiB
    fp8 = {"mla": DEEPSEEK, "quantization": quantized("fp8", bits=8)}
    assert nbytes(layers=(LATENT,), **fp8) == rope + both
    assert nbytes(layers=(LATENT,) * 3, **fp8) == rope + 3 * both
    assert nbytes(layers=(LATENT,), layout=Layout(tensor=4), **fp8) == rope + both // 4
    assert nbytes(layers=(LATENT,), batch=run(dtype="float32"), **fp8) == 2 * (rope + both)
    assert nbytes(layers=(LATENT,) * 3, layout=Layout(pipeline=2), **fp8) == (rope + 2 * both, rope + both)
    uneven = {**fp8, "mla": msgspec.structs.replace(DEEPSEEK, qk_nope_head_dim=192, v_head_dim=64)}
    assert nbytes(layers=(LATENT,), **uneven) == rope + both
    assert nbytes(layers=(LATENT,), mla=DEEPSEEK, batch=run(quantization="fp8")) == rope + both


def test_latent_attention_does_not_copy_an_up_projection_that_is_not_quantised():
    rope = 8192 * 64 * 2
    assert nbytes(layers=(LATENT,), mla=DEEPSEEK) == rope
    left = quantized("compressed-tensors", bits=4, ignored=("re:.*self_attn.*",))
    assert nbytes(layers=(LATENT,), mla=DEEPSEEK, quantization=left) == rope


# --- the cache of fused tensors


def test_the_cache_of_fused_tensors_never_confuses_two_models():
    llm = [model(layers=BARE, tensors=(tensor(LAYER + "mlp.up_proj.weight", n, 256),)) for n in range(1, 13)]
    for _ in range(2):
        assert [weights(placed(each, run(), ONE)) for each in llm] == [n * 512 for n in range(1, 13)]
    vision = model(layers=BARE, tensors=(mib("visual.fc1.weight"),))
    for _ in range(2):
        assert weights(placed(vision, run(), ONE)) == MIB
        assert weights(placed(vision, run(language_model_only=True), ONE)) == 0
        assert weights(placed(vision, run(dtype="float32"), ONE)) == 2 * MIB


def test_memory_of_gpu_has_the_weights_of_the_heaviest_stage():
    llm = model(layers=BARE, tensors=(mib("model.layers.3.mlp.up_proj.weight", 100),), task="pooling")
    assert memory_of_gpu(placed(llm, run(), Layout(pipeline=2), gpu())).weights == 100 * MIB


# --- adapters (vllm/lora/layers: create_lora_weights), as numbers of two bytes for each rank of each adapter

ENDS = 4096 + 128_256  # of the embedding or of the head


def adapters(layout=ONE, ranks=1, dtype="bfloat16", **changes):
    llm = model(**changes)
    with_them, without = (
        weights_by_rank(placed(llm, run(adapter_ranks=count, dtype=dtype), layout)) for count in (ranks, 0)
    )
    result = [(more - less) // 2 for more, less in zip(with_them, without, strict=True)]
    return result[0] if len(result) == 1 else result


def test_every_linear_layer_has_adapters():
    # query, key, value and output; then gate, up and down: inputs and outputs of each
    attention = 3 * 4096 + (4096 + 2 * 1024) + 4096 + 4096
    dense = 2 * (4096 + 14_336) + (14_336 + 4096)
    assert adapters() == 32 * (attention + dense) + 2 * ENDS
    assert adapters(ranks=8 * 256) == 8 * 256 * adapters()
    assert adapters(dtype="float32") == 2 * adapters()
    assert adapters(Layout(pipeline=2)) == [16 * (attention + dense) + ENDS] * 2


def test_a_shard_has_one_complete_matrix_of_each_adapter():
    # A of layers split along outputs, and B of layers split along inputs, are complete. 8 KV heads on 16 ranks are copied.
    attention = 3 * 4096 + (4096 // 16 + 2 * 128) + 4096 // 16 + 4096
    dense = 2 * (4096 + 896) + (896 + 4096)
    assert adapters(Layout(tensor=16)) == 32 * (attention + dense) + 2 * ENDS


def test_every_expert_has_its_own_adapter():
    experts = msgspec.structs.replace(EXPERTS, shared_intermediate_size=2048)
    sparse = {"layers": (MOE,), "experts": experts}
    attention = 3 * 4096 + (4096 + 2 * 1024) + 4096 + 4096
    assert adapters(**sparse) == attention + 64 * 3 * (4096 + 1024) + 3 * (4096 + 2048) + 2 * ENDS
    cut, whole = (adapters(Layout(tensor=2, expert_parallel=spread), **sparse) for spread in (False, True))
    assert cut - whole == 64 * 3 * (4096 + 512) - 32 * 3 * (4096 + 1024)


def test_every_projection_of_latent_attention_has_adapters():
    latent = {"layers": (LATENT,), "mla": DEEPSEEK, "heads": 16}
    query = (4096 + 1536) + (1536 + 16 * 192)
    latents = (4096 + 576) + (512 + 16 * 256) + (16 * 128 + 4096)
    dense = 3 * (4096 + 14_336)
    assert adapters(**latent) == query + latents + dense + 2 * ENDS
    plain = msgspec.structs.replace(DEEPSEEK, q_lora_rank=None)
    assert adapters(**{**latent, "mla": plain}) == (4096 + 16 * 192) + latents + dense + 2 * ENDS


def test_only_the_feed_forward_of_a_recurrent_layer_has_adapters():
    assert adapters(layers=(STATE,)) == 3 * (4096 + 14_336) + 2 * ENDS


# --- properties

NAMES = st.sampled_from(
    [
        LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight", LAYER + "mlp.gate_proj.weight",
        LAYER + "mlp.down_proj.weight", LAYER + "mlp.experts.0.down_proj.weight", LAYER + "input_layernorm.weight",
        "model.layers.3.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight",
        "visual.blocks.0.attn.qkv.weight",
    ]
)  # fmt: skip
TENSORS = st.lists(st.builds(tensor, NAMES, st.integers(1, 5000), st.integers(1, 5000)), max_size=12).map(tuple)


@given(tensors=TENSORS, ranks=st.integers(1, 16), tied=st.booleans(), pipeline=st.integers(1, 4))
def test_a_split_never_adds_to_a_gpu_and_never_loses_bytes(tensors, ranks, tied, pipeline):
    llm = model(layers=(MOE,) * 4, experts=EXPERTS, tensors=tensors, tie_word_embeddings=tied)
    layout = Layout(tensor=ranks, pipeline=pipeline)
    whole, split = weights(placed(llm, run(), ONE)), weights_by_rank(placed(llm, run(), layout))
    assert max(split) <= whole
    assert sum(split) * ranks >= whole - 2 * MIB * len(tensors)  # the most that rounding up an unsplit tensor adds
    assert weights(placed(llm, run(), Layout(tensor=2 * ranks, pipeline=pipeline))) <= max(split)


@given(tensors=TENSORS, method=st.sampled_from(["fp8", "bitsandbytes", "other"]))
def test_quantization_never_adds_bytes(tensors, method):
    llm = model(layers=BARE, tensors=tensors)
    assert weights(placed(llm, run(quantization=method), ONE)) <= weights(placed(llm, run(), ONE))
