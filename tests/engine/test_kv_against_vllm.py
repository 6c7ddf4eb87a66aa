"""Compares our arithmetic of the KV cache with vLLM's, to the block, for random models (with fixed seeds)."""

# ruff: noqa: TID251 - the engine is what these tests compare with

import random
import warnings
from types import SimpleNamespace

import msgspec
import pytest

from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.model import Layer, Mla, Model
from vllm_launch.sizing.kv import kv_cache, longest_that_fits
from vllm_launch.sizing.kv_layers import layer_specs
from vllm_launch.sizing.parallel import Layout, layer_split, problems
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates what its own import uses
    import torch
    from vllm.v1.core import kv_cache_utils as theirs
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        MambaSpec,
        MLAAttentionSpec,
        SlidingWindowMLASpec,
        SlidingWindowSpec,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout

GIB = 1 << 30
GPU = Gpu(
    index=0, uuid="GPU-0", name="NVIDIA H200", memory_total=140 * GIB, memory_free=139 * GIB, compute_capability=(9, 0)
)
BYTES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "fp8": torch.uint8}


def state_mode(model, run):
    """Return vLLM's mamba_cache_mode. By default models without attention have no prefix caching."""
    with_attention = any(layer.kind != "mamba" for layer in model.layers)
    caching = with_attention if run.enable_prefix_caching is None else run.enable_prefix_caching
    return "align" if caching else "none"


def engine_config(model, run, layout):
    """Return the part of VllmConfig that the KV cache's arithmetic reads, for async scheduling on the V2 runner."""
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=run.max_model_len, original_max_model_len=run.max_model_len),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=layout.tensor),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBNHC,
            num_gpu_blocks_override=run.num_gpu_blocks_override,
            mamba_cache_mode=state_mode(model, run),
            prefix_cache_retention_interval=None,
        ),
        scheduler_config=SimpleNamespace(
            disable_hybrid_kv_cache_manager=run.disable_hybrid_kv_cache_manager,
            max_num_batched_tokens=run.max_num_batched_tokens,
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        device_config=SimpleNamespace(device_type="cuda"),
        speculative_config=None,
        num_prefill_lookahead_tokens=0,
        max_in_flight_tokens=(layout.pipeline + run.async_scheduling) * run.max_num_batched_tokens,
    )


def engine_specs(model, run, layout):
    """Return the specs that vLLM's layers report on each pipeline rank. Hybrid pages are already aligned, as in vLLM."""
    dtype = BYTES[run.kv_cache_dtype if run.kv_cache_dtype != "auto" else model.dtype]
    our_specs = layer_specs(Placement(model, run, layout, GPU))
    specs = []
    for number, (layer, layer_caches) in enumerate(zip(model.layers, our_specs, strict=True)):
        heads = max(1, layer.kv_heads // layout.tensor)
        sizes = {"num_kv_heads": heads, "head_size": layer.head_dim, "head_size_v": layer.head_dim_v, "dtype": dtype}
        specs_by_name = {}
        for cache in layer_caches:
            name = f"layers.{number}.{'mixer' if cache.kind == 'mamba' else 'attn'}"
            match cache.kind:
                case "full":
                    specs_by_name[name] = FullAttentionSpec(block_size=cache.block, **sizes)
                case "sliding":
                    specs_by_name[name] = SlidingWindowSpec(
                        block_size=cache.block, sliding_window=layer.window, **sizes
                    )
                case "chunked":
                    specs_by_name[name] = ChunkedLocalAttentionSpec(
                        block_size=cache.block, attention_chunk_size=layer.window, **sizes
                    )
                case "mla":
                    specs_by_name[name] = MLAAttentionSpec(
                        block_size=cache.block, num_kv_heads=1, head_size=layer.head_dim, dtype=dtype
                    )
                case "mamba":
                    shapes = tuple((shape[0] // layout.tensor, *shape[1:]) for shape in layer.state_shapes)
                    specs_by_name[name] = MambaSpec(
                        block_size=cache.block, shapes=shapes, dtypes=(torch.bfloat16,) * len(shapes),
                        page_size_padded=cache.page, mamba_cache_mode=state_mode(model, run),
                    )  # fmt: skip
        specs.append(specs_by_name)
    ranks, start = [], 0
    for count in layer_split(len(specs), layout.pipeline):
        ranks.append({name: spec for by_name in specs[start : start + count] for name, spec in by_name.items()})
        start += count
    return ranks


def random_model(rng):
    """Return a random model, run and layout, with one of the attention kinds in a regular or irregular pattern."""
    heads, dim = rng.choice([1, 2, 4, 8, 32]), rng.choice([64, 80, 128, 192, 256])
    full = Layer(kind="full", kv_heads=heads, head_dim=dim, head_dim_v=dim)
    kind = rng.choice(["full", "sliding", "mixed", "two sizes", "chunked", "mla", "hybrid", "both", "uneven"])
    window = rng.choice([128, 512, 1024, 4096])
    sliding = msgspec.structs.replace(full, kind="sliding", window=window)
    mamba = Layer(kind="mamba", state_shapes=((32, rng.choice([3, 128]), 64), (16, 8)), state_dtypes=("BF16", "BF16"))
    period = rng.randint(2, 7)
    count = rng.randint(4, 64)
    pattern = {
        "full": [full],
        "sliding": [sliding],
        "mixed": [sliding] * (period - 1) + [full],
        "two sizes": [full] * 3 + [msgspec.structs.replace(full, head_dim=2 * dim)],
        "chunked": [msgspec.structs.replace(full, kind="chunked", window=8192)] * 3 + [full],
        "mla": [Layer(kind="mla", kv_heads=1, head_dim=576)],
        "hybrid": [mamba] * (period - 1) + [full],
        "both": [msgspec.structs.replace(full, state_shapes=mamba.state_shapes, state_dtypes=mamba.state_dtypes)],
        "uneven": [msgspec.structs.replace(sliding, kv_heads=2 * heads)] * (period - 1) + [full, Layer(kind="none")],
    }[kind]
    layers = tuple(pattern[n % len(pattern)] for n in range(count))
    mla = None
    if kind == "mla":
        mla = Mla(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, q_lora_rank=None)
    model = Model(
        name="random", path=None, architecture="LlamaForCausalLM", task="generate",
        model_type="mamba2" if all(layer.kind == "mamba" for layer in layers) else "llama",
        dtype=rng.choice(["bfloat16", "float16", "float32"]), hidden_size=4096, intermediate_size=14336, vocab_size=128256,
        heads=32, head_dim=dim, kv_heads=heads, layers=layers, max_model_len=131072, tie_word_embeddings=False,
        tensors=(), tensors_from="config", mla=mla,
    )  # fmt: skip
    run = RunConfig(
        max_model_len=rng.choice([4096, 8192, 10_000, 65_536, 131_072]),
        max_num_seqs=256,
        max_num_batched_tokens=rng.choice([2048, 8192, 16384]),
        kv_cache_dtype=rng.choice(["auto", "fp8"]) if kind not in {"hybrid", "both"} else "auto",
        block_size=rng.choice([None, 16, 32, 64]),
        dtype=model.dtype,
        num_gpu_blocks_override=rng.choice([None, None, rng.randint(1, 20_000)]),
        enable_prefix_caching=rng.choice([None, True, False]),
        disable_hybrid_kv_cache_manager=kind not in {"hybrid", "both"} and rng.random() < 0.3,
        async_scheduling=rng.random() < 0.7,
    )
    pipeline = rng.choice([1, 1, 2, 3]) if len(layers) >= 12 else 1
    return model, run, Layout(tensor=rng.choice([1, 2, 4, 8]), pipeline=pipeline)


def test_vllm_refuses_a_hybrid_model_without_its_hybrid_manager():
    attention = Layer(kind="full", kv_heads=8, head_dim=128, head_dim_v=128)
    state = Layer(kind="mamba", state_shapes=((32, 3, 64),), state_dtypes=("BF16",))
    model, run, _ = random_model(random.Random(0))
    model = msgspec.structs.replace(model, layers=(attention, state) * 2, mla=None, heads=32)
    run = msgspec.structs.replace(run, disable_hybrid_kv_cache_manager=True)
    [specs] = engine_specs(model, run, Layout())
    with pytest.raises(ValueError, match="Failed to promote"):
        theirs.get_kv_cache_groups(engine_config(model, run, Layout()), specs)
    assert problems(model, run, Layout(), ()) == [
        "a model with attention and recurrent states needs vLLM's hybrid KV cache manager"
    ]


@pytest.mark.parametrize("seed", range(400))
def test_tokens_and_the_longest_request_equal_vllms(seed):
    rng = random.Random(seed)
    model, run, layout = random_model(rng)
    available = [rng.randint(GIB // 4, 100 * GIB) for _ in range(layout.pipeline)]
    config = engine_config(model, run, layout)
    ranks = engine_specs(model, run, layout)
    try:
        configs = theirs.get_kv_cache_configs(config, ranks, available)
        tokens, _ = theirs.get_kv_cache_capacity(config, theirs.generate_scheduler_kv_cache_config(configs))
    except ValueError as error:
        if "To serve at least one request" not in str(error):
            raise
        tokens = 0
    assert kv_cache(Placement(model, run, layout, GPU), available).tokens == tokens
    groups = theirs.get_kv_cache_groups(config, {name: spec for rank in ranks for name, spec in rank.items()})
    longest = run.max_model_len
    for rank, memory in zip(ranks, available, strict=True):
        projected = theirs._project_kv_cache_groups_to_worker(groups, rank)
        block = theirs._pool_bytes_per_block(config, projected)
        usable = (run.num_gpu_blocks_override * block if run.num_gpu_blocks_override else memory) - block
        longest = min(longest, theirs._estimate_max_model_len_from_groups(config, projected, usable))
    assert longest_that_fits(Placement(model, run, layout, GPU), available) == longest


def compressed_specs_of_vllm(layer_caches):
    """Return vLLM's specs for the caches of a model with compressed layers."""
    specs = {}
    for number, caches in enumerate(layer_caches):
        for place, cache in enumerate(caches):
            sizes = {
                "block_size": cache.block, "num_kv_heads": 1, "max_tp_shards": 1, "head_size": cache.page // cache.block,
                "dtype": torch.uint8, "page_size_padded": cache.page,
            }  # fmt: skip
            name = f"layers.{number}.{place}"
            if cache.kind == "mla":
                specs[name] = MLAAttentionSpec(**sizes)
            else:
                specs[name] = SlidingWindowMLASpec(sliding_window=cache.window, **sizes)
    return specs


@pytest.mark.parametrize("seed", range(60))
def test_pages_of_several_sizes_share_blocks_as_in_vllm(seed):
    rng = random.Random(seed)
    pattern = [rng.choice([0, 4, 128]) for _ in range(rng.randint(1, 5))]
    pattern += [4]  # vLLM needs no packing without a layer that has an indexer
    layers = tuple(
        Layer(
            kind="compressed", kv_heads=1, head_dim=512, window=128, compression=ratio, index_bytes=132 * (ratio == 4)
        )
        for ratio in (pattern[n % len(pattern)] for n in range(rng.randint(len(pattern), 62)))
    )
    model = msgspec.structs.replace(
        random_model(rng)[0], layers=layers, mla=None, dtype="bfloat16", model_type="deepseek_v4"
    )
    run = RunConfig(
        max_model_len=rng.choice([8192, 65_536, 1_048_576]), max_num_seqs=256,
        max_num_batched_tokens=rng.choice([2048, 8192]), dtype="bfloat16",
    )  # fmt: skip
    placement = Placement(model, run, Layout(tensor=rng.choice([1, 8])), GPU)
    config = engine_config(model, run, Layout())
    config.cache_config.get_resolved_kv_cache_layout = lambda: KVCacheLayout.BLHNC
    specs = compressed_specs_of_vllm(layer_specs(placement))
    available = rng.randint(16 * GIB, 100 * GIB)
    configs = theirs.get_kv_cache_configs(config, [specs], [available])
    tokens, _ = theirs.get_kv_cache_capacity(config, theirs.generate_scheduler_kv_cache_config(configs))
    assert kv_cache(placement, available).tokens == tokens
