"""Options of ``vllm serve`` that the plan reads, and options that change no memory. ``uncounted`` has all others.

A key of a JSON option is written "option.key". Each option of the table is in exactly one of PLANNED, NO_MEMORY,
``uncounted.UNCOUNTED`` and ``settings.rules.ONE_MACHINE``, as a whole or with each of its keys.
tests/unit/engine/test_memory_options.py checks this.
"""

PLANNED = frozenset(
    {
        # the model, as read from its files
        "model", "revision", "hf_token", "hf_overrides", "runner", "convert", "dtype", "quantization",
        "max_model_len", "disable_sliding_window",
        # images, videos and audio
        "language_model_only", "limit_mm_per_prompt", "mm_processor_kwargs", "mm_processor_cache_gb",
        "mm_encoder_tp_mode", "skip_mm_profiling", "disable_chunked_mm_input",
        # the split and the batch
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel",
        "max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "performance_mode",
        "disable_custom_all_reduce",
        "eplb_config.num_redundant_experts",
        # the KV cache
        "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "kv_cache_dtype", "block_size",
        "watermark", "enable_prefix_caching", "disable_hybrid_kv_cache_manager", "async_scheduling",
        # compilation and CUDA graphs
        "enforce_eager", "optimization_level", "cudagraph_capture_sizes", "max_cudagraph_capture_size",
        "compilation_config.mode", "compilation_config.cudagraph_mode", "compilation_config.cudagraph_capture_sizes",
        "compilation_config.max_cudagraph_capture_size", "compilation_config.pass_config",
        # weights in host memory, and adapters
        "offload_backend", "cpu_offload_gb", "cpu_offload_params", "offload_group_size", "offload_num_in_group",
        "offload_prefetch_step", "offload_params", "kv_offloading_size", "enable_lora", "max_loras", "max_lora_rank",
        # speculative decoding: draft tokens are counted, and ``speculative`` knows which methods need more
        "spec_method", "spec_model", "spec_tokens", "speculative_config.method", "speculative_config.model",
        "speculative_config.num_speculative_tokens", "speculative_config.suffix_decoding_max_tree_depth",
    }
)  # fmt: skip
"""Options that the plan reads."""

NO_MEMORY = frozenset(
    {
        # the API server, its tools and templates
        "headless", "api_server_count", "config", "grpc", "lora_modules", "chat_template",
        "chat_template_content_format", "trust_request_chat_template", "trust_request_mm_kwargs",
        "default_chat_template_kwargs", "response_role", "return_tokens_as_token_ids", "enable_auto_tool_choice",
        "exclude_tools_when_tool_choice_none", "tool_call_parser", "tool_parser_plugin", "tool_strict_level",
        "tool_server", "max_log_len", "enable_prompt_tokens_details", "enable_per_request_metrics",
        "enable_server_load_tracking", "enable_force_include_usage", "sse_keep_alive_interval",
        "enable_tokenizer_info_endpoint", "enable_log_outputs", "enable_log_deltas", "cohere_is_reasoning_model",
        "cohere_format", "anthropic_disabled_thinking_effort", "log_error_stack", "tokens_only", "enable_scale_out",
        "fingerprint_mode", "fingerprint_value", "host", "port", "grpc_port", "data_parallel_supervisor_port",
        "dp_supervisor_probe_interval_s", "dp_supervisor_probe_timeout_s", "dp_supervisor_probe_failure_threshold",
        "uds", "uvicorn_log_level", "disable_uvicorn_access_log", "disable_access_log_for_endpoints",
        "allow_credentials", "allowed_origins", "allowed_methods", "allowed_headers", "api_key", "ssl_keyfile",
        "ssl_certfile", "ssl_ca_certs", "enable_ssl_refresh", "ssl_cert_reqs", "ssl_ciphers", "root_path",
        "middleware", "enable_request_id_headers", "disable_fastapi_docs", "h11_max_incomplete_event_size",
        "h11_max_header_count", "enable_offline_docs", "served_model_name", "reasoning_parser",
        "reasoning_parser_plugin", "reasoning_config", "structured_outputs_config", "io_processor_plugin",
        "renderer_num_workers", "enable_log_requests", "shutdown_timeout", "stream_interval",
        "fail_on_environ_validation",
        # the tokenizer, files and their download
        "tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init", "trust_remote_code",
        "code_revision", "seed", "allowed_local_media_path", "allowed_media_domains", "generation_config",
        "override_generation_config", "allow_deprecated_quantization", "download_dir", "use_tqdm_on_load",
        "ignore_patterns", "safetensors_prefetch_num_threads", "safetensors_prefetch_block_size",
        "enable_ep_weight_filter", "max_parallel_loading_workers",
        # the sampler and the pooler: ``margin.SAMPLER_COPIES`` covers them
        "logprobs_mode", "pooler_config", "enable_flash_late_interaction",
        # processes, addresses and timeouts. ``settings.rules`` refuses device_ids
        "distributed_executor_backend", "device_ids", "master_port", "distributed_timeout_seconds",
        "cpu_distributed_timeout_seconds", "numa_bind", "numa_bind_nodes", "numa_bind_cpus",
        "data_parallel_rpc_port", "dp_sync_interval",
        "disable_nccl_for_dp_synchronization", "ray_workers_use_nsight", "enable_fault_tolerance",
        "fault_tolerance_config", "enable_nccl_comm_suspend",
        # kernels without memory of their own. A rank has as many experts with each placement strategy
        "disable_cascade_attn", "mamba_backend", "mamba_ssu_algorithm", "enable_mamba_cache_stochastic_rounding",
        "mamba_cache_philox_rounds", "sparse_indexer_topk_backend", "ir_op_priority", "enable_flashinfer_autotune",
        "expert_placement_strategy", "dcp_comm_backend", "dcp_kv_cache_interleave_size",
        "cp_kv_cache_interleave_size", "dbo_decode_token_threshold", "dbo_prefill_token_threshold",
        "kernel_config.ir_op_priority", "kernel_config.enable_flashinfer_autotune",
        "kernel_config.enable_rocm_segmented_attn_autotune", "kernel_config.enable_cutedsl_warmup",
        "kernel_config.enable_jit_warmup", "kernel_config.sparse_indexer_topk_backend",
        "attention_config.disable_flashinfer_q_quantization", "attention_config.use_prefill_query_quantization",
        "attention_config.use_non_causal", "attention_config.flex_attn_block_m",
        "attention_config.flex_attn_block_n", "attention_config.flex_attn_q_block_size",
        "attention_config.flex_attn_kv_block_size", "attention_config.minimax_m3_msa_decode_backend",
        # what the prefix cache keeps. models/config.py sets the mode and the block size of recurrent states itself
        "prefix_caching_hash_algo", "prefix_cache_retention_interval", "prefix_match_unit", "mamba_block_size",
        "mamba_cache_mode", "enable_mamba_shared_prefix_checkpoint", "kv_sharing_fast_prefill",
        # the scheduler's order and its limits below the batch
        "max_num_scheduled_tokens", "max_num_active_seqs", "max_num_queued_reqs", "max_num_queued_tokens",
        "long_prefill_token_threshold", "long_prefill_token_threshold_adaptive", "scheduling_policy",
        "scheduler_cls", "scheduler_reserve_full_isl", "prefill_schedule_interval",
        # media, before they reach the encoder
        "mm_hasher_algorithm", "mm_shm_cache_max_object_size_mb", "interleave_mm_strings",
        "mm_encoder_fp8_scale_path", "mm_encoder_fp8_scale_save_path", "mm_encoder_fp8_scale_save_margin",
        "video_pruning_method", "mm_device_do_normalize", "mm_processor_device", "default_mm_loras",
        # compilation: where its results are kept, and what it prints
        "compilation_config.debug_dump_path", "compilation_config.cache_dir",
        "compilation_config.compile_cache_save_format", "compilation_config.ir_enable_torch_wrap",
        "compilation_config.compile_mm_encoder", "compilation_config.encoder_cudagraph_token_budgets",
        "compilation_config.encoder_cudagraph_max_vision_items_per_batch",
        "compilation_config.encoder_cudagraph_max_frames_per_batch",
        "compilation_config.decoder_replay_trim_threshold", "compilation_config.compile_ranges_endpoints",
        "compilation_config.cudagraph_num_of_warmups", "compilation_config.dynamic_shapes_config",
        "compilation_config.fast_moe_cold_start",
        # how often experts move between ranks
        "eplb_config.step_interval", "eplb_config.log_balancedness", "eplb_config.log_balancedness_interval",
        "eplb_config.use_async", "eplb_config.policy", "eplb_config.enable_migration_batching",
        # speculative decoding: how it drafts and accepts tokens. Its method decides on the memory of a draft
        "speculative_config.enforce_eager", "speculative_config.draft_tensor_parallel_size",
        "speculative_config.tensor_parallel_size", "speculative_config.quantization",
        "speculative_config.moe_backend", "speculative_config.attention_backend", "speculative_config.kv_cache_dtype",
        "speculative_config.max_model_len", "speculative_config.revision", "speculative_config.code_revision",
        "speculative_config.index_share_for_mtp_iteration", "speculative_config.disable_padded_drafter_batch",
        "speculative_config.disable_eagle_block_drop", "speculative_config.use_local_argmax_reduction",
        "speculative_config.use_heterogeneous_vocab", "speculative_config.prompt_lookup_max",
        "speculative_config.prompt_lookup_min", "speculative_config.parallel_drafting",
        "speculative_config.target_model_config", "speculative_config.target_parallel_config",
        "speculative_config.draft_model_config", "speculative_config.draft_parallel_config",
        "speculative_config.suffix_decoding_max_cached_requests", "speculative_config.suffix_decoding_max_spec_factor",
        "speculative_config.suffix_decoding_min_token_prob", "speculative_config.draft_load_config",
        "speculative_config.rejection_sample_method", "speculative_config.synthetic_acceptance_rates",
        "speculative_config.synthetic_acceptance_length", "speculative_config.draft_sample_method",
        "speculative_config.dspark_draft_topk",
        # connectors: names, addresses and policies. ``kv_connector`` and ``ec_connector`` decide on memory
        "kv_transfer_config.engine_id", "kv_transfer_config.kv_role", "kv_transfer_config.kv_port",
        "kv_transfer_config.kv_connector_module_path", "kv_transfer_config.enable_permute_local_kv",
        "kv_transfer_config.kv_load_failure_policy", "kv_transfer_config.kv_buffer_device", "kv_events_config",
        "ec_transfer_config.engine_id", "ec_transfer_config.ec_role", "ec_transfer_config.ec_ip",
        "ec_transfer_config.ec_port", "ec_transfer_config.ec_connector_module_path",
        "ec_transfer_config.ec_buffer_device",
        # logs, metrics, traces
        "logging_config", "log_level", "log_config_file", "show_hidden_metrics_for_version", "otlp_traces_endpoint",
        "collect_detailed_traces", "per_request_spec_decode_metrics", "kv_cache_metrics", "kv_cache_metrics_sample",
        "custom_histogram_buckets", "cudagraph_metrics", "enable_layerwise_nvtx_tracing", "enable_mfu_metrics",
        "enable_logging_iteration_details", "jit_monitor_mode", "jit_monitor_verbose", "profiler_config",
        "disable_log_stats", "aggregate_engine_logging",
    }
)  # fmt: skip
"""Options that change neither the memory of a GPU nor what the KV cache holds."""
