"""Options and variables that change vLLM's memory in a way that the plan does not compute. Pure.

``memory_options`` has the options that the plan reads, and those that change no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vllm_launch.engine.options import options

SMALLER = "so vLLM's KV cache is smaller than planned. Set --max-model-len if vLLM refuses the planned length"
LARGER = "so vLLM's KV cache can be larger than planned"
UNKNOWN = "so vLLM's KV cache can be smaller or larger than planned"
FEWER = "so the KV cache holds fewer tokens than planned. Set --max-model-len if vLLM refuses the planned length"
LATE = "so a GPU can run out of memory. Lower --gpu-memory-utilization if it does"
KERNELS = "so vLLM's KV cache can be smaller or larger than planned, and a GPU can run out of memory"
HOST = "so vLLM needs more host memory than planned"


class Uncounted(NamedTuple):
    """What the plan does not consider, and the effect of it.

    ``harmless``: values without this effect. None and vLLM's default, if the table has it, never have it.
    """

    what: str
    effect: str
    harmless: tuple[object, ...] = ()


_ROUTED = Uncounted("the buffers of routed experts", SMALLER, (False,))
_MOE = Uncounted("the workspaces of that kernel for experts", UNKNOWN, ("auto",))
_LINEAR = Uncounted("how that kernel stores weights", UNKNOWN, ("auto",))
_ATTENTION = Uncounted(
    "the workspaces and block sizes of another attention backend than vLLM's default", KERNELS, ("auto", "AUTO")
)
_DBO = Uncounted("the second half of a batch that runs at the same time", SMALLER, (False, 0))
_ELASTIC = Uncounted("the memory for experts of added replicas", SMALLER, (False,))
_STATE_DTYPE = Uncounted("another data type of recurrent states than the model's", UNKNOWN, ("auto",))
_REPLAY = Uncounted("the buffers of recent inputs of recurrent states", FEWER, (False,))
_CUMEM = Uncounted("the memory that vLLM's allocator for sleep mode keeps in its pools", SMALLER, (False,))
_ENCODER = Uncounted("its effect on the encoder's largest batch", UNKNOWN)
_CUSTOM = Uncounted("the memory of your own code", LATE, ("auto", ""))

UNCOUNTED: Mapping[str, Uncounted] = {
    # the model
    "hf_config_path": Uncounted("that vLLM reads another config.json than the plan", UNKNOWN),
    "config_format": Uncounted("that vLLM reads another configuration file than config.json", UNKNOWN, ("auto", "hf")),
    "model_class_overrides": Uncounted("the weights and layers of another model class", UNKNOWN),
    "model_impl": Uncounted("the layers of another implementation of the model", UNKNOWN, ("auto", "vllm")),
    "quantization_config": Uncounted("which layers it quantises", UNKNOWN),
    "load_format": Uncounted(
        "the weights as this format stores them",
        UNKNOWN,
        ("auto", "hf", "pt", "safetensors", "dummy", "mistral", "fastsafetensors", "instanttensor", "runai_streamer"),
    ),
    "safetensors_load_strategy": Uncounted(
        "files that are read into host memory as a whole", HOST, ("lazy", "prefetch")
    ),
    "model_loader_extra_config": Uncounted("the buffers of the loader", HOST, ({},)),
    "pt_load_map_location": Uncounted("checkpoint files on the GPU while it loads", LATE, ("cpu",)),
    # the sampler
    "max_logprobs": Uncounted("the log probabilities of most of the vocabulary", LATE, tuple(range(1025))),
    "return_sampling_mask": Uncounted("the sorted logits of all requests", LATE, (False,)),
    "use_fp64_gumbel": Uncounted("the random numbers in float64 for all logits", LATE, (False,)),
    "watermark_config": Uncounted("the random numbers of watermarking for all logits", LATE),
    "logits_processors": _CUSTOM,
    "enable_return_routed_experts": _ROUTED,
    "aux_output_config": _ROUTED,
    "enable_trace_replay": Uncounted("the recorded tokens in pinned host memory", HOST, (False,)),
    "enable_prompt_embeds": Uncounted("the prompt embeddings that each request keeps on the GPU", LATE, (False,)),
    "diffusion_config": Uncounted("the canvas of a diffusion model", UNKNOWN),
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
    "attention_config.flash_attn_max_num_splits_for_cuda_graph": Uncounted("another number of splits", UNKNOWN, (32,)),
    "attention_config.tq_max_kv_splits_for_cuda_graph": Uncounted("another number of splits", UNKNOWN, (32,)),
    "attention_config.tokenspeed_mla_min_split_kv": Uncounted("the workspace of more splits", SMALLER, (1,)),
    "attention_config.indexer_kv_dtype": Uncounted("another data type of the indexer's cache", UNKNOWN, ("auto",)),
    "attention_config.indexer_sparse_logits": Uncounted("the smaller logits of the indexer", LARGER, (False,)),
    "attention_config.hisparse_config": Uncounted("the part of the KV cache in host memory", UNKNOWN),
    "gdn_prefill_backend": Uncounted("the workspaces of that kernel", LATE, ("triton",)),
    "kda_prefill_backend": Uncounted("the workspaces of that kernel", LATE, ("auto", "triton")),
    "kda_decode_backend": Uncounted("the workspaces of that kernel", LATE, ("auto", "native", "triton")),
    # kernels
    "moe_backend": _MOE,
    "kernel_config.moe_backend": _MOE,
    "linear_backend": _LINEAR,
    "kernel_config.linear_backend": _LINEAR,
    "kernel_config.linear_backend_per_quant": _LINEAR,
    # parallelism
    "decode_context_parallel_size": Uncounted("that the GPUs of a replica share the KV cache", LARGER),
    "prefill_context_parallel_size": Uncounted("the GPUs that share a prompt", UNKNOWN),
    "dcp_q_replicate": Uncounted("the copies of query projections", SMALLER, (False,)),
    "enable_hc_sp": Uncounted("the activations that the GPUs of a replica share", UNKNOWN, (False,)),
    "enable_batch_sharded_sampling": Uncounted("that each GPU samples a part of the batch", LARGER, (False,)),
    "all2all_backend": Uncounted("the buffers of that backend for experts", SMALLER),
    "enable_dbo": _DBO,
    "ubatch_size": _DBO,
    "enable_shm_tensor_arena": Uncounted("the arena in /dev/shm", HOST, (False,)),
    "enable_elastic_ep": _ELASTIC,
    "elastic_ep_max_dp_size": _ELASTIC,
    "enable_eplb": Uncounted("the buffers and the counters of expert load balancing", SMALLER, (False,)),
    "eplb_config.window_size": Uncounted("the counters of expert load balancing", SMALLER, tuple(range(1001))),
    "eplb_config.communicator": Uncounted("the buffers of that communicator", SMALLER),
    "worker_cls": _CUSTOM,
    "worker_extension_cls": _CUSTOM,
    "weight_transfer_config": Uncounted("the buffers that receive new weights", LATE),
    # the KV cache
    "kv_cache_dtype_skip_layers": Uncounted("the layers that keep the model's data type", FEWER, ([], ())),
    "swa_bounded_replay": Uncounted("the tokens that layers with a window keep", FEWER, (True,)),
    "mamba_cache_dtype": _STATE_DTYPE,
    "mamba_ssm_cache_dtype": _STATE_DTYPE,
    "use_replayssm": _REPLAY,
    "replayssm_buffer_len": _REPLAY,
    "kv_offloading_backend": Uncounted(
        "that layers with a window can keep all tokens with this backend", FEWER, ("native",)
    ),
    "kv_transfer_config.kv_connector": Uncounted(
        "the buffers of the KV connector, and that with some connectors layers with a window keep all tokens", SMALLER
    ),
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
    "mm_encoder_only": Uncounted("that the language model's weights are not loaded", LARGER, (False,)),
    "ec_transfer_config.ec_connector": Uncounted("the buffers of the encoder cache's connector", SMALLER),
    "ec_transfer_config.ec_buffer_size": Uncounted("the buffers of the encoder cache's connector", SMALLER),
    "ec_transfer_config.ec_connector_extra_config": Uncounted(
        "the buffers of the encoder cache's connector", SMALLER, ({},)
    ),
    "ec_manager_config": Uncounted("the memory of another manager of the encoder cache", LATE),
    "engram_config": Uncounted("where the tables of n-gram embeddings are", UNKNOWN),
    # adapters
    "lora_dtype": Uncounted("another data type of adapters than the model's", UNKNOWN, ("auto",)),
    "enable_tower_connector_lora": Uncounted("the adapters of the encoder", SMALLER, (False,)),
    "max_cpu_loras": Uncounted("the adapters in host memory", HOST),
    "fully_sharded_loras": Uncounted("that adapters are split over all GPUs of a replica", LARGER, (False,)),
    "lora_target_modules": Uncounted("that only some layers have adapters", LARGER),
    "specialize_active_lora": Uncounted("the CUDA graphs for each number of active adapters", SMALLER, (False,)),
    "enable_mixed_moe_lora_format": Uncounted("the adapters of each expert", SMALLER, (False,)),
    "enable_moe_shared_loras": Uncounted("that experts share adapters", LARGER, (False,)),
    "max_lora_cls_labels": Uncounted("the adapters of the classification head", SMALLER),
    # compilation
    "compilation_config.backend": Uncounted(
        "temporary tensors of a model that Inductor does not compile", UNKNOWN, ("", "inductor")
    ),
    "compilation_config.custom_ops": Uncounted("temporary tensors of other operators", UNKNOWN, ([],)),
    "compilation_config.splitting_ops": Uncounted("another cut of the model into CUDA graphs", UNKNOWN),
    "compilation_config.use_inductor_graph_partition": Uncounted(
        "another cut of the model into CUDA graphs", UNKNOWN, (False,)
    ),
    "compilation_config.cudagraph_mm_encoder": Uncounted("the CUDA graphs of the encoder", SMALLER, (False,)),
    "compilation_config.cudagraph_decoder_replay": Uncounted("that decoder replay has no CUDA graphs", LARGER, (True,)),
    "compilation_config.decoder_replay_cudagraph_capture_sizes": Uncounted(
        "the CUDA graphs of decoder replay", SMALLER, ([],)
    ),
    "compilation_config.compile_sizes": Uncounted("the memory that autotuning of these sizes needs", SMALLER, ([],)),
    "compilation_config.inductor_compile_config": Uncounted(
        "temporary memory with other settings of Inductor", UNKNOWN, ({},)
    ),
    "compilation_config.inductor_passes": Uncounted("temporary memory with other passes of Inductor", UNKNOWN, ({},)),
    "compilation_config.cudagraph_copy_inputs": Uncounted("the copies of inputs of CUDA graphs", SMALLER, (False,)),
    "compilation_config.cudagraph_specialize_lora": Uncounted(
        "that batches with and without adapters share CUDA graphs", LARGER, (True,)
    ),
    # speculative decoding
    "speculative_config.num_speculative_tokens_per_batch_size": Uncounted(
        "the CUDA graphs of each number of draft tokens", SMALLER
    ),
    "speculative_config.enable_adaptive_verification": Uncounted(
        "the CUDA graphs and buffers of adaptive verification", SMALLER, (False,)
    ),
    "additional_config": Uncounted("what a plug-in does with it", UNKNOWN, ({},)),
}
"""Options and keys ("option.key") of which the plan warns."""

OFF = ("", "0", "false", "False")

UNCOUNTED_VARIABLES: Mapping[str, Uncounted] = {
    "VLLM_PP_LAYER_PARTITION": Uncounted("another number of layers on each pipeline stage", UNKNOWN),
    "VLLM_USE_V2_MODEL_RUNNER": Uncounted("the memory of model runner V1", UNKNOWN, ("", "1")),
    "VLLM_WEIGHT_OFFLOADING_DISABLE_UVA": Uncounted("the copies of offloaded weights on the GPU", LATE, OFF),
    "VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE": Uncounted("another size of FlashInfer's workspace", UNKNOWN, ("",)),
    "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE": Uncounted(
        "that all layers keep all tokens", FEWER, ("", "1")
    ),
    "VLLM_MLA_DISABLE": Uncounted("that layers keep keys and values instead of latent vectors", FEWER, OFF),
    "VLLM_REPLICATE_EMBED": Uncounted("the copies of the embedding table", SMALLER, OFF),
    "VLLM_DEEPEP_BUFFER_SIZE_MB": Uncounted("another size of DeepEP's buffer", UNKNOWN, ("",)),
    "VLLM_USE_NCCL_SYMM_MEM": Uncounted("the symmetric memory of NCCL", SMALLER, OFF),
    "VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE": Uncounted("another memory need of autotuning", UNKNOWN, ("", "1")),
    "VLLM_MXFP4_EMULATION_DEQUANT_AT_LOAD": Uncounted("the weights without quantisation", SMALLER, OFF),
    "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD": Uncounted("the weights without quantisation", SMALLER, OFF),
    "VLLM_USE_BREAKABLE_CUDAGRAPH": Uncounted("another cut of the model into CUDA graphs", UNKNOWN, ("",)),
    "VLLM_BATCH_INVARIANT": Uncounted("the memory of other kernels", UNKNOWN, OFF),
    "VLLM_SPARSE_INDEXER_MAX_LOGITS_MB": Uncounted("another size of the indexer's logits", UNKNOWN, ("",)),
}
"""Environment variables of vLLM that change memory (vllm/envs.py). The plan reads four others (``settings.read``)."""


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
