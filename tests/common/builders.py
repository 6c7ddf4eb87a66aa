"""Builders of models, GPUs and runs for tests. Defaults: the shape of Llama-3-8B, on an H200."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.model import Experts, Layer, Media, MediaItem, Mla, Model, Quantization, Tensor
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig

MIB, GIB = 1 << 20, 1 << 30

FULL = Layer(kind="full", kv_heads=8, head_dim=128, head_dim_v=128)
SLIDING = msgspec.structs.replace(FULL, kind="sliding", window=4096)
CHUNKED = msgspec.structs.replace(FULL, kind="chunked", window=8192)
LATENT = Layer(kind="mla", kv_heads=1, head_dim=576)
STATE = Layer(kind="mamba", state_shapes=((64, 64, 128),), state_dtypes=("BF16",))  # 1 MiB per request
MOE = msgspec.structs.replace(FULL, moe=True)

IMAGES = Media(items=(MediaItem(modality="image", tokens=1024),), bytes_per_token=100_000)

DEEPSEEK = Mla(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, q_lora_rank=1536)
EXPERTS = Experts(count=64, per_token=8, intermediate_size=1024)


def model(*, layers: int | tuple[Layer, ...] = 32, **changes: Any) -> Model:
    """Return Llama-3-8B without tensors. ``layers`` is a number of full-attention layers, or the layers themselves."""
    defaults: dict[str, Any] = {
        "name": "made-up", "path": None, "architecture": "LlamaForCausalLM", "model_type": "llama", "task": "generate",
        "dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128_256, "heads": 32,
        "head_dim": 128, "kv_heads": 8, "max_model_len": 8192, "tie_word_embeddings": False, "tensors": (),
        "tensors_from": "safetensors",
    }  # fmt: skip
    return Model(**{**defaults, "layers": (FULL,) * layers if isinstance(layers, int) else layers, **changes})


def gpu(
    *, total: int = 140 * GIB, free: int | None = None, capability: tuple[int, int] = (9, 0), name: str = "NVIDIA H200"
) -> Gpu:
    """Return a GPU with ``total`` bytes of memory. ``free`` bytes are free, by default all but 512 MiB."""
    free_bytes = total - 512 * MIB if free is None else free
    return Gpu(
        index=0, uuid="GPU-0", name=name, memory_total=total, memory_free=free_bytes, compute_capability=capability
    )


def run(**changes: Any) -> RunConfig:
    """Return vLLM's default batch on an H200, with requests of 8,192 tokens."""
    return RunConfig(
        **{"max_model_len": 8192, "max_num_seqs": 1024, "max_num_batched_tokens": 8192, "dtype": "bfloat16", **changes}
    )


def placed(of: Model, batch: RunConfig, layout: Layout | None = None, on: Gpu | None = None) -> Placement:
    """Return model ``of`` with ``batch`` on GPUs like ``on``, or on the CPU if None. Default layout: one GPU."""
    return Placement(of, batch, layout or Layout(), on)


def quantized(method: str, *, bits: int = 4, **changes: Any) -> Quantization:
    """Return the quantization of a checkpoint by ``method``."""
    return Quantization(method=method, bits=bits, **changes)


def tensor(name: str, *shape: int, dtype: str = "BF16") -> Tensor:
    """Return one tensor of a checkpoint."""
    return Tensor(name, dtype, shape)
