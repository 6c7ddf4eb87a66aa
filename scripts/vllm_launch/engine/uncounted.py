"""Options and variables that change vLLM's memory in a way that the plan does not compute. Pure.

``memory_options`` has the options that the plan reads, and those that change no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vllm_launch.engine.options import options

SMALLER = (
    "so vLLM's KV cache is smaller than planned. If vLLM refuses to start, set a lower --max-model-len than the plan's"
)
LARGER = "so vLLM's KV cache can be larger than planned"
UNKNOWN = "so vLLM's KV cache can be smaller or larger than planned"
FEWER = (
    "so the KV cache holds fewer tokens than planned. If vLLM refuses to start, set a lower --max-model-len than the "
    "plan's"
)
LATE = "so a GPU can run out of memory. If it does, lower --gpu-memory-utilization"
KERNELS = "so vLLM's KV cache can be smaller or larger than planned, and a GPU can run out of memory"
HOST = "so vLLM needs more host memory than planned"
CONNECTOR = f"{SMALLER}. With some connectors, sliding-window layers keep all tokens, so the cache holds fewer"


class Uncounted(NamedTuple):
    """A fact that the plan does not consider, and its effect.

    ``what``: a noun phrase. ``effect``: a clause that starts with "so". A warning has both.
    ``harmless``: values of the option that do not have this effect. None never has it, and
    neither has vLLM's default, if the table of options has one.
    """

    what: str
    effect: str
    harmless: tuple[object, ...] = ()


_ROUTED = Uncounted("the buffers of routed experts", SMALLER, (False,))
_MOE = Uncounted("the workspaces of the chosen MoE kernel", UNKNOWN, ("auto",))
_LINEAR = Uncounted("how the chosen linear kernel stores weights", UNKNOWN, ("auto",))
_ATTENTION = Uncounted("the workspaces and block sizes of attention with this option", KERNELS, ("auto", "AUTO"))
_SPLITS = Uncounted("attention's buffers for this number of splits", UNKNOWN, (32,))
_DBO = Uncounted("the second microbatch, which runs at the same time as the first", SMALLER, (False, 0))
_ELASTIC = Uncounted("the memory for the experts of replicas that vLLM adds later", SMALLER, (False,))
_STATE_DTYPE = Uncounted("the data type of recurrent states that this option sets", UNKNOWN, ("auto",))
_REPLAY = Uncounted("ReplaySSM's buffers, which keep recent inputs of recurrent states", FEWER, (False,))
_CUMEM = Uncounted("the memory that vLLM's allocator for sleep mode keeps in its pools", SMALLER, (False,))
_ENCODER = Uncounted("the effect of this option on the encoder's batch size and memory", UNKNOWN)
_CUSTOM = Uncounted("the memory of your own code", LATE, ("auto", ""))

UNCOUNTED: Mapping[str, Uncounted] = {
    # the model
    "hf_config_path": Uncounted("the config.json that vLLM reads instead of the model's", UNKNOWN),
    "config_format": Uncounted(
        "the configuration file that vLLM reads instead of config.json", UNKNOWN, ("auto", "hf")
    ),
    "model_class_overrides": Uncounted("the weights and layers of another model class", UNKNOWN),
    "model_impl": Uncounted("the layers of another implementation of the model", UNKNOWN, ("auto", "vllm")),
    "quantization_config": Uncounted("the layers that quantization_config selects", UNKNOWN),
    "load_format": Uncounted(
        "the weights as this format stores them",
        UNKNOWN,
        ("auto", "hf", "pt", "safetensors", "dummy", "mistral", "fastsafetensors", "instanttensor", "runai_streamer"),
    ),
    "safetensors_load_strategy": Uncounted("whole checkpoint files in host memory", HOST, ("lazy", "prefetch")),
    "model_loader_extra_config": Uncounted("the buffers of the loader", HOST, ({},)),
    "pt_load_map_location": Uncounted("checkpoint files on the GPU while vLLM loads them", LATE, ("cpu",)),
    # the sampler
    "max_logprobs": Uncounted("the logprobs of more than 1,024 tokens", LATE, tuple(range(1025))),
    "return_sampling_mask": Uncounted("the sorted logits of all requests", LATE, (False,)),
    "use_fp64_gumbel": Uncounted("the random numbers in float64 for all logits", LATE, (False,)),
    "watermark_config": Uncounted("the random numbers of watermarking for all logits", LATE),
    "logits_processors": _CUSTOM,
    "enable_return_routed_experts": _ROUTED,
    "aux_output_config": _ROUTED,
    "enable_trace_replay": Uncounted("the recorded tokens in pinned host memory", HOST, (False,)),
    "enable_prompt_embeds": Uncounted("the prompt embeddings that each request keeps on the GPU", LATE, (False,)),
    "diffusion_config": Uncounted("the block of tokens that a diffusion model generates in one step", UNKNOWN),
    # sleep mode
    "enable_sleep_mode": Uncounted(
        "the memory that vLLM's allocator keeps in its pools, and the host memory of a sleeping engine",
        SMALLER,
        (False,),
    ),
    "enable_cumem_allocator": _CUMEM,
    "sleep_mode_offload_cudagraph": _CUMEM,
    "sleep_preserve_parameter_names": Uncounted("the parameters that a sleeping engine keeps", HOST),
    # attention
    "attention_backend": _ATTENTION,
    "attention_config.backend": _ATTENTION,
    "attention_config.backend_per_kind": _ATTENTION,
    "attention_config.flash_attn_version": _ATTENTION,
    "attention_config.use_trtllm_attention": _ATTENTION,
    "attention_config.mla_prefill_backend": _ATTENTION,
    "attention_config.sparse_mla_force_mqa": _ATTENTION,
    "attention_config.sparse_mla_prefill_workspace_factor": _ATTENTION,
    "attention_config.flash_attn_max_num_splits_for_cuda_graph": _SPLITS,
    "attention_config.tq_max_kv_splits_for_cuda_graph": _SPLITS,
    "attention_config.tokenspeed_mla_min_split_kv": Uncounted(
        "attention's workspace for this number of splits", SMALLER, (1,)
    ),
    "attention_config.indexer_kv_dtype": Uncounted(
        "the data type of the indexer's cache that this option sets", UNKNOWN, ("auto",)
    ),
    "attention_config.indexer_sparse_logits": Uncounted(
        "the memory that sparse logits of the indexer save", LARGER, (False,)
    ),
    "attention_config.hisparse_config": Uncounted("the part of the KV cache in host memory", UNKNOWN),
    "gdn_prefill_backend": Uncounted("the workspaces of the chosen kernel", LATE, ("triton",)),
    "kda_prefill_backend": Uncounted("the workspaces of the chosen kernel", LATE, ("auto", "triton")),
    "kda_decode_backend": Uncounted("the workspaces of the chosen kernel", LATE, ("auto", "native", "triton")),
    # kernels
    "moe_backend": _MOE,
    "kernel_config.moe_backend": _MOE,
    "linear_backend": _LINEAR,
    "kernel_config.linear_backend": _LINEAR,
    "kernel_config.linear_backend_per_quant": _LINEAR,
    # parallelism
    "decode_context_parallel_size": Uncounted("the split of the KV cache over the GPUs of a replica", LARGER),
    "prefill_context_parallel_size": Uncounted("the split of a prompt over several GPUs", UNKNOWN),
    "dcp_q_replicate": Uncounted("the copies of query projections", SMALLER, (False,)),
    "enable_hc_sp": Uncounted("the split of activations over the GPUs of a replica", UNKNOWN, (False,)),
    "enable_batch_sharded_sampling": Uncounted("the split of sampling over the GPUs of a replica", LARGER, (False,)),
    "all2all_backend": Uncounted("the buffers of the chosen all-to-all backend", SMALLER),
    "enable_dbo": _DBO,
    "ubatch_size": _DBO,
    "enable_shm_tensor_arena": Uncounted("the arena in /dev/shm", HOST, (False,)),
    "enable_elastic_ep": _ELASTIC,
    "elastic_ep_max_dp_size": _ELASTIC,
    "enable_eplb": Uncounted("the buffers and the counters of expert load balancing", SMALLER, (False,)),
    "eplb_config.window_size": Uncounted("the counters of expert load balancing", SMALLER, tuple(range(1001))),
    "eplb_config.communicator": Uncounted("the buffers of the chosen communicator", SMALLER),
    "worker_cls": _CUSTOM,
    "worker_extension_cls": _CUSTOM,
    "weight_transfer_config": Uncounted("the buffers that receive new weights", LATE),
    # the KV cache
    "kv_cache_dtype_skip_layers": Uncounted("the layers that keep the model's data type", FEWER, ([], ())),
    "swa_bounded_replay": Uncounted("the tokens that sliding-window layers keep for prefix caching", FEWER, (True,)),
    "mamba_cache_dtype": _STATE_DTYPE,
    "mamba_ssm_cache_dtype": _STATE_DTYPE,
    "use_replayssm": _REPLAY,
    "replayssm_buffer_len": _REPLAY,
    "kv_offloading_backend": Uncounted(
        "the tokens before the window, which sliding-window layers can keep with this backend", FEWER, ("native",)
    ),
    "kv_transfer_config.kv_connector": Uncounted("the buffers of the KV connector", CONNECTOR),
    "kv_transfer_config.kv_connector_extra_config": Uncounted(
        "the buffers that the KV connector's options set", HOST, ({},)
    ),
    # media and the encoder
    "media_io_kwargs": _ENCODER,
    "video_pruning_rate": _ENCODER,
    "mm_encoder_attn_backend": _ENCODER,
    "mm_encoder_attn_dtype": _ENCODER,
    "enable_mm_embeds": Uncounted("the embeddings of media that requests bring", LATE, (False,)),
    "mm_processor_cache_type": Uncounted("the cache of processed media in /dev/shm", HOST),
    "mm_tensor_ipc": Uncounted("the media in shared memory", HOST),
    "mm_ipc_gpu_memory_gb": Uncounted("the GPU memory for decoded media", SMALLER, (0,)),
    "mm_encoder_only": Uncounted("the memory that vLLM saves without the language model's weights", LARGER, (False,)),
    "ec_transfer_config.ec_connector": Uncounted("the buffers of the encoder cache's connector", SMALLER),
    "ec_transfer_config.ec_buffer_size": Uncounted("the buffers of the encoder cache's connector", SMALLER),
    "ec_transfer_config.ec_connector_extra_config": Uncounted(
        "the buffers of the encoder cache's connector", SMALLER, ({},)
    ),
    "ec_manager_config": Uncounted("the memory of the chosen manager of the encoder cache", LATE),
    "engram_config": Uncounted("the memory in which the tables of n-gram embeddings are", UNKNOWN),
    # adapters
    "lora_dtype": Uncounted("the data type of adapters that this option sets", UNKNOWN, ("auto",)),
    "enable_tower_connector_lora": Uncounted("the adapters of the encoder", SMALLER, (False,)),
    "max_cpu_loras": Uncounted("the adapters in host memory", HOST),
    "fully_sharded_loras": Uncounted("the split of adapters over all GPUs of a replica", LARGER, (False,)),
    "lora_target_modules": Uncounted("the layers without adapters", LARGER),
    "specialize_active_lora": Uncounted("the CUDA graphs for each number of active adapters", SMALLER, (False,)),
    "enable_mixed_moe_lora_format": Uncounted("the adapters of each expert", SMALLER, (False,)),
    "enable_moe_shared_loras": Uncounted("the adapters that experts share", LARGER, (False,)),
    "max_lora_cls_labels": Uncounted("the adapters of the classification head", SMALLER),
    # compilation
    "compilation_config.backend": Uncounted(
        "temporary tensors of a model that Inductor does not compile", UNKNOWN, ("", "inductor")
    ),
    "compilation_config.custom_ops": Uncounted("temporary tensors of the chosen operators", UNKNOWN, ([],)),
    "compilation_config.splitting_ops": Uncounted("a different split of the model into CUDA graphs", UNKNOWN),
    "compilation_config.use_inductor_graph_partition": Uncounted(
        "a different split of the model into CUDA graphs", UNKNOWN, (False,)
    ),
    "compilation_config.cudagraph_mm_encoder": Uncounted("the CUDA graphs of the encoder", SMALLER, (False,)),
    "compilation_config.cudagraph_decoder_replay": Uncounted(
        "the memory that vLLM saves because decoder replay has no CUDA graphs", LARGER, (True,)
    ),
    "compilation_config.decoder_replay_cudagraph_capture_sizes": Uncounted(
        "the CUDA graphs of decoder replay", SMALLER, ([],)
    ),
    "compilation_config.compile_sizes": Uncounted("the memory of autotuning for these sizes", SMALLER, ([],)),
    "compilation_config.inductor_compile_config": Uncounted(
        "temporary memory with these settings of Inductor", UNKNOWN, ({},)
    ),
    "compilation_config.inductor_passes": Uncounted("temporary memory with these passes of Inductor", UNKNOWN, ({},)),
    "compilation_config.cudagraph_copy_inputs": Uncounted("the copies of inputs of CUDA graphs", SMALLER, (False,)),
    "compilation_config.cudagraph_specialize_lora": Uncounted(
        "the CUDA graphs that batches with and without adapters share", LARGER, (True,)
    ),
    # speculative decoding
    "speculative_config.num_speculative_tokens_per_batch_size": Uncounted(
        "the CUDA graphs of each number of draft tokens", SMALLER
    ),
    "speculative_config.enable_adaptive_verification": Uncounted(
        "the CUDA graphs and buffers of adaptive verification", SMALLER, (False,)
    ),
    "additional_config": Uncounted("the memory that a plug-in uses with this option", UNKNOWN, ({},)),
}
"""Options and keys ("option.key") of which the plan warns."""

OFF = ("", "0", "false", "False")

UNCOUNTED_VARIABLES: Mapping[str, Uncounted] = {
    "VLLM_PP_LAYER_PARTITION": Uncounted("the layers that this variable gives to each pipeline stage", UNKNOWN),
    "VLLM_USE_V2_MODEL_RUNNER": Uncounted("the memory of model runner V1", UNKNOWN, ("", "1")),
    "VLLM_WEIGHT_OFFLOADING_DISABLE_UVA": Uncounted("the copies of offloaded weights on the GPU", LATE, OFF),
    "VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE": Uncounted("the size of FlashInfer's workspace", UNKNOWN, ("",)),
    "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE": Uncounted(
        "the older tokens, which layers with chunked attention then keep", FEWER, ("", "1")
    ),
    "VLLM_MLA_DISABLE": Uncounted("the keys and values that layers then keep instead of latent vectors", FEWER, OFF),
    "VLLM_REPLICATE_EMBED": Uncounted("the copies of the embedding table", SMALLER, OFF),
    "VLLM_DEEPEP_BUFFER_SIZE_MB": Uncounted("the size of DeepEP's buffer", UNKNOWN, ("",)),
    "VLLM_USE_NCCL_SYMM_MEM": Uncounted("the symmetric memory of NCCL", SMALLER, OFF),
    "VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE": Uncounted("the memory of autotuning", UNKNOWN, ("", "1")),
    "VLLM_MXFP4_EMULATION_DEQUANT_AT_LOAD": Uncounted("the weights without quantisation", SMALLER, OFF),
    "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD": Uncounted("the weights without quantisation", SMALLER, OFF),
    "VLLM_USE_BREAKABLE_CUDAGRAPH": Uncounted("a different split of the model into CUDA graphs", UNKNOWN, ("",)),
    "VLLM_BATCH_INVARIANT": Uncounted("the memory of batch-invariant kernels", UNKNOWN, OFF),
    "VLLM_SPARSE_INDEXER_MAX_LOGITS_MB": Uncounted("the size of the indexer's logits", UNKNOWN, ("",)),
}
"""Environment variables of vLLM that change memory in a way that the plan does not compute (vllm/envs.py).

The plan computes with VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS, VLLM_CPU_KVCACHE_SPACE and PyTorch's variables for its
allocator (``settings.read``).
"""


def uncounted(engine: Mapping[str, object]) -> Iterator[tuple[str, str, Uncounted]]:
    """Yield (dest, name, what the plan does not consider) for each option or key of ``engine`` that needs a warning.

    ``name``: "option" or "option.key".
    """
    for dest, value in engine.items():
        if dest in UNCOUNTED:
            rows = [(dest, value, options()[dest].default)]
        elif isinstance(value, Mapping):
            rows = [(f"{dest}.{str(key).replace('-', '_')}", item, None) for key, item in value.items()]
        else:
            rows = []
        for name, item, default in rows:
            if (row := UNCOUNTED.get(name)) and item is not None and item != default and item not in row.harmless:
                yield dest, name, row
