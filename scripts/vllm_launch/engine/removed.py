"""Names that earlier releases of vLLM accepted and the pinned one does not, each with what to use instead."""

from __future__ import annotations

REMOVED_FLAGS = {
    "--block-manager-v2": "remove it, there is only one block manager now",
    "--calculate-kv-scales": "remove it, the scales of an FP8 cache come with the checkpoint",
    "--cuda-graph-sizes": "use --cudagraph-capture-sizes",
    "--device": "remove it, an installed vLLM is built for one device",
    "--disable-async-output-proc": "use --no-async-scheduling",
    "--disable-frontend-multiprocessing": "remove it, the engine always runs in its own process",
    "--disable-log-requests": "remove it, requests are logged only with --enable-log-requests",
    "--disable-logprobs-during-spec-decoding": "remove it, speculative decoding always returns logprobs",
    "--disable-mm-preprocessor-cache": "use --mm-processor-cache-gb 0",
    "--enable-prompt-adapter": "remove it, vLLM has only LoRA adapters: --enable-lora",
    "--enable-reasoning": "remove it, --reasoning-parser alone is enough",
    "--engine-use-ray": "use --distributed-executor-backend ray",
    "--eplb-log-balancedness": "use --eplb-config.log_balancedness",
    "--eplb-step-interval": "use --eplb-config.step_interval",
    "--eplb-window-size": "use --eplb-config.window_size",
    "--guided-decoding-backend": "use --structured-outputs-config.backend",
    "--guided-decoding-disable-additional-properties": "use --structured-outputs-config.disable_additional_properties",
    "--guided-decoding-disable-any-whitespace": "use --structured-outputs-config.disable_any_whitespace",
    "--guided-decoding-disable-fallback": "remove it, vLLM never replaces a backend that you name",
    "--long-lora-scaling-factors": "remove it, vLLM no longer has long-context adapters",
    "--lora-extra-vocab-size": "remove it, adapters can no longer add words to the vocabulary",
    "--max-context-len-to-capture": "use --max-cudagraph-capture-size",
    "--max-long-partial-prefills": "remove it, the scheduler mixes prefills by itself",
    "--max-num-partial-prefills": "remove it, the scheduler mixes prefills by itself",
    "--max-parallel-prefills": "remove it, the scheduler mixes prefills by itself",
    "--max-prompt-adapter-token": "remove it, vLLM has only LoRA adapters: --enable-lora",
    "--max-prompt-adapters": "remove it, vLLM has only LoRA adapters: --enable-lora",
    "--max-seq-len-to-capture": "use --max-cudagraph-capture-size",
    "--multi-step-stream-outputs": "remove it, vLLM no longer has multi-step scheduling",
    "--ngram-prompt-lookup-max": "use --speculative-config.prompt_lookup_max",
    "--ngram-prompt-lookup-min": "use --speculative-config.prompt_lookup_min",
    "--num-lookahead-slots": "remove it, --speculative-config sets the number",
    "--num-redundant-experts": "use --eplb-config.num_redundant_experts",
    "--num-scheduler-steps": "remove it, --async-scheduling replaces it and is on by default",
    "--num-speculative-tokens": "use --speculative-config.num_speculative_tokens",
    "--override-pooler-config": "use --pooler-config",
    "--preemption-mode": "remove it, vLLM always recomputes a preempted request",
    "--qlora-adapter-name-or-path": "use --lora-modules NAME=PATH",
    "--rope-scaling": "use --hf-overrides with rope_parameters",
    "--rope-theta": "use --hf-overrides with rope_parameters",
    "--scheduler-delay-factor": "remove it, the scheduler no longer has this delay",
    "--speculative-disable-by-batch-size": "use --speculative-config.num_speculative_tokens_per_batch_size",
    "--speculative-disable-mqa-scorer": "remove it, there is only one scorer now",
    "--speculative-draft-tensor-parallel-size": "use --speculative-config.draft_tensor_parallel_size",
    "--speculative-max-model-len": "use --speculative-config.max_model_len",
    "--speculative-model": "use --speculative-config.model",
    "--swap-space": "use --kv-offloading-size, in GiB, to keep KV blocks in host memory",
    "--task": "use --runner, and --convert for embedding and classification",
    "--tokenizer-pool-extra-config": "remove it, every API server has its own tokenizer: --api-server-count",
    "--tokenizer-pool-size": "remove it, every API server has its own tokenizer: --api-server-count",
    "--tokenizer-pool-type": "remove it, every API server has its own tokenizer: --api-server-count",
    "--use-v2-block-manager": "remove it, there is only one block manager now",
    "--worker-use-ray": "use --distributed-executor-backend ray",
}
"""Removed flags of ``vllm serve``. Source: release notes and ``--help=all``. A test checks that no option has them."""

REMOVED_KEYS = {
    "compilation_config.full_cuda_graph": "use cudagraph_mode: FULL",
    "compilation_config.level": "use mode",
    "compilation_config.use_cudagraph": "use cudagraph_mode",
    "speculative_config.disable_by_batch_size": "use num_speculative_tokens_per_batch_size",
}
"""Removed keys of JSON options, as "dest.key"."""

FOUR_BITS = "use an AWQ, GPTQ or compressed-tensors checkpoint of the model, or quantise it with llm-compressor"
"""Remedy for a 4-bit method."""

UNQUANTIZED = "use the unquantised model and add"
"""Start of a remedy for a checkpoint in a removed method."""

EIGHT_BITS = f"{UNQUANTIZED} --quantization fp8"
"""Remedy for an 8-bit method."""

REMOVED_METHODS = {
    "squeezellm": FOUR_BITS,
    "aqlm": FOUR_BITS,
    "quip": FOUR_BITS,
    "marlin": "use the GPTQ checkpoint of the model: vLLM chooses the Marlin kernels by itself",
    "gptq_marlin_24": "use a compressed-tensors or GPTQ checkpoint of the model",
    "bitblas": FOUR_BITS,
    "gptq_bitblas": FOUR_BITS,
    "qqq": FOUR_BITS,
    "hqq": FOUR_BITS,
    "vptq": FOUR_BITS,
    "eetq": EIGHT_BITS,
    "deepspeedfp": EIGHT_BITS,
    "ptpc_fp8": f"{UNQUANTIZED} --quantization fp8_per_channel",
    "tpu_int8": f"{UNQUANTIZED} --quantization int8_per_channel_weight_only",
    "neuron_quant": EIGHT_BITS,
    "ipex": "use an AWQ or GPTQ checkpoint of the model",
    "rtn": EIGHT_BITS,
    "petit_nvfp4": "use the modelopt NVFP4 checkpoint of the model",
    "bitsandbytes": f"{UNQUANTIZED} --quantization fp8, or use an AWQ or GPTQ checkpoint",
    "gguf": "use the safetensors checkpoint of the model",
}
"""Quantization methods of checkpoints that earlier releases of vLLM or transformers read."""
