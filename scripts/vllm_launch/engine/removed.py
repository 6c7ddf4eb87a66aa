"""What earlier releases of vLLM took and the pinned one does not, and what to use instead."""

from __future__ import annotations

REMOVED_FLAGS = {
    "--block-manager-v2": "drop it, there is only one block manager now",
    "--calculate-kv-scales": "drop it, the scales of an FP8 cache come with the checkpoint",
    "--cuda-graph-sizes": "use --cudagraph-capture-sizes",
    "--device": "drop it, an installed vLLM is built for one device",
    "--disable-async-output-proc": "use --no-async-scheduling",
    "--disable-frontend-multiprocessing": "drop it, the engine always has a process of its own",
    "--disable-log-requests": "drop it, requests are logged only with --enable-log-requests",
    "--disable-logprobs-during-spec-decoding": "drop it, logprobs are there whoever proposed a token",
    "--disable-mm-preprocessor-cache": "use --mm-processor-cache-gb 0",
    "--enable-prompt-adapter": "drop it, LoRA adapters are the only ones: --enable-lora",
    "--enable-reasoning": "drop it, --reasoning-parser alone is enough",
    "--engine-use-ray": "use --distributed-executor-backend ray",
    "--eplb-log-balancedness": "use --eplb-config.log_balancedness",
    "--eplb-step-interval": "use --eplb-config.step_interval",
    "--eplb-window-size": "use --eplb-config.window_size",
    "--guided-decoding-backend": "use --structured-outputs-config.backend",
    "--guided-decoding-disable-additional-properties": "use --structured-outputs-config.disable_additional_properties",
    "--guided-decoding-disable-any-whitespace": "use --structured-outputs-config.disable_any_whitespace",
    "--guided-decoding-disable-fallback": "drop it, a backend that is named never falls back to another",
    "--long-lora-scaling-factors": "drop it, vLLM has no long-context adapters any more",
    "--lora-extra-vocab-size": "drop it, adapters cannot add words to the vocabulary any more",
    "--max-context-len-to-capture": "use --max-cudagraph-capture-size",
    "--max-long-partial-prefills": "drop it, the scheduler mixes prefills by itself",
    "--max-num-partial-prefills": "drop it, the scheduler mixes prefills by itself",
    "--max-parallel-prefills": "drop it, the scheduler mixes prefills by itself",
    "--max-prompt-adapter-token": "drop it, LoRA adapters are the only ones: --enable-lora",
    "--max-prompt-adapters": "drop it, LoRA adapters are the only ones: --enable-lora",
    "--max-seq-len-to-capture": "use --max-cudagraph-capture-size",
    "--multi-step-stream-outputs": "drop it, there is no multi-step scheduling any more",
    "--ngram-prompt-lookup-max": "use --speculative-config.prompt_lookup_max",
    "--ngram-prompt-lookup-min": "use --speculative-config.prompt_lookup_min",
    "--num-lookahead-slots": "drop it, --speculative-config decides it",
    "--num-redundant-experts": "use --eplb-config.num_redundant_experts",
    "--num-scheduler-steps": "drop it, --async-scheduling does what it was for and is on by default",
    "--num-speculative-tokens": "use --speculative-config.num_speculative_tokens",
    "--override-pooler-config": "use --pooler-config",
    "--preemption-mode": "drop it, a preempted request is always computed again",
    "--qlora-adapter-name-or-path": "use --lora-modules NAME=PATH",
    "--rope-scaling": "use --hf-overrides with rope_parameters",
    "--rope-theta": "use --hf-overrides with rope_parameters",
    "--scheduler-delay-factor": "drop it, the scheduler has no such delay any more",
    "--speculative-disable-by-batch-size": "use --speculative-config.num_speculative_tokens_per_batch_size",
    "--speculative-disable-mqa-scorer": "drop it, there is only one scorer now",
    "--speculative-draft-tensor-parallel-size": "use --speculative-config.draft_tensor_parallel_size",
    "--speculative-max-model-len": "use --speculative-config.max_model_len",
    "--speculative-model": "use --speculative-config.model",
    "--swap-space": "use --kv-offloading-size, in GiB, to keep KV blocks in host memory",
    "--task": "use --runner, and --convert for embeddings and classes",
    "--tokenizer-pool-extra-config": "drop it, every API server has a tokenizer of its own: --api-server-count",
    "--tokenizer-pool-size": "drop it, every API server has a tokenizer of its own: --api-server-count",
    "--tokenizer-pool-type": "drop it, every API server has a tokenizer of its own: --api-server-count",
    "--use-v2-block-manager": "drop it, there is only one block manager now",
    "--worker-use-ray": "use --distributed-executor-backend ray",
}
"""Flags of ``vllm serve``. Source: vLLM's release notes and ``--help=all``. A test checks that no option has them."""

REMOVED_KEYS = {
    "compilation_config.full_cuda_graph": "use cudagraph_mode: FULL",
    "compilation_config.level": "use mode",
    "compilation_config.use_cudagraph": "use cudagraph_mode",
    "speculative_config.disable_by_batch_size": "use num_speculative_tokens_per_batch_size",
}
"""Keys of JSON options, as "dest.key"."""


FOUR_BITS = "take an AWQ, GPTQ or compressed-tensors upload of the model, or quantise it with llm-compressor"
EIGHT_BITS = "take the unquantised model and add --quantization fp8"

REMOVED_METHODS = {
    "squeezellm": FOUR_BITS,
    "aqlm": FOUR_BITS,
    "quip": FOUR_BITS,
    "marlin": "take the GPTQ upload of the model: vLLM runs GPTQ with Marlin kernels by itself",
    "gptq_marlin_24": "take a compressed-tensors or GPTQ upload of the model",
    "bitblas": FOUR_BITS,
    "gptq_bitblas": FOUR_BITS,
    "qqq": FOUR_BITS,
    "hqq": FOUR_BITS,
    "vptq": FOUR_BITS,
    "eetq": EIGHT_BITS,
    "deepspeedfp": EIGHT_BITS,
    "ptpc_fp8": "take the unquantised model and add --quantization fp8_per_channel",
    "tpu_int8": "take the unquantised model and add --quantization int8_per_channel_weight_only",
    "neuron_quant": EIGHT_BITS,
    "ipex": "take the AWQ or GPTQ upload of the model",
    "rtn": EIGHT_BITS,
    "petit_nvfp4": "take the modelopt NVFP4 upload of the model",
    "bitsandbytes": "take the unquantised model and add --quantization fp8, or take an AWQ or GPTQ upload",
    "gguf": "take the safetensors upload of the model",
}
"""Quantization methods of checkpoints that vLLM or transformers once read."""
