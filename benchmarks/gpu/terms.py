"""Memory figures of vLLM's workers. vLLM loads this file into them: ``--worker-extension-cls terms.Terms``."""

from __future__ import annotations

from typing import Any


class Terms:
    """Methods for ``collective_rpc``. ``self`` is a vLLM worker (v1/worker/gpu_worker.py). All sizes are bytes."""

    def memory_terms(self: Any) -> dict[str, Any]:
        """Return the terms that determine_available_memory subtracted from the requested memory."""
        from vllm import envs  # noqa: PLC0415, TID251 - this file runs inside the engine

        snapshot = {key: value for key, value in vars(self.init_snapshot).items() if type(value) is int}
        parameters = self.model_runner.model.parameters()
        counted = self.cudagraph_memory_estimate if envs.VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS else 0
        return {
            "model_runner": "V2" if self.use_v2_model_runner else "V1",
            "init": snapshot,
            "requested_bytes": int(self.requested_memory),
            "weights_bytes": int(self.model_runner.model_memory_usage),
            "total_consumed_bytes": int(self.total_consumed),
            "activation_peak_bytes": int(self.peak_activation_memory - counted),
            "cuda_graphs_estimate_bytes": int(self.cudagraph_memory_estimate),
            "available_kv_bytes": int(self.available_kv_cache_memory_bytes),
            "parameters_bytes": sum(tensor.numel() * tensor.element_size() for tensor in parameters),
        }

    def memory_now(self: Any, *, forget_peak: bool = False) -> dict[str, int]:
        """Return the device's free memory, and the bytes that PyTorch has allocated and reserved, now and at most."""
        import torch  # noqa: PLC0415, TID251 - this file runs inside the engine

        torch.cuda.synchronize()
        if forget_peak:
            torch.cuda.reset_peak_memory_stats()
        free, total = torch.cuda.mem_get_info()
        stats = torch.cuda.memory_stats()
        return {
            "free": free,
            "total": total,
            "allocated": torch.cuda.memory_allocated(),
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
            "retries": stats.get("num_alloc_retries", 0),
        }
