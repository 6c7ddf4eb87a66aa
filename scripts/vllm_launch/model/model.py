"""What the model is: its shape, as data."""

from __future__ import annotations

from typing import Literal

import msgspec

AttentionKind = Literal["full", "sliding", "chunked", "mla", "mamba", "none"]
"""How a layer keeps its past. "mamba" is any fixed-size recurrent state (Mamba 1/2, gated delta net, short conv)."""


class Tensor(msgspec.Struct, frozen=True):
    """One stored tensor, under its checkpoint name; ``dtype`` in safetensors' words ("BF16", "F8_E4M3", "I32")."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder layer's cache: what it keeps per token, or per request."""

    kind: AttentionKind
    kv_heads: int = 0
    head_dim: int = 0  # of keys
    head_dim_v: int = 0  # of values, where it differs from keys; else the same number
    window: int | None = None  # tokens, for "sliding" and "chunked"
    index_bytes: int = 0  # of a token in the cache of a sparse attention's indexer, beside "mla"
    state_shapes: tuple[tuple[int, ...], ...] = ()  # per request, for "mamba"; before tensor parallelism
    state_dtypes: tuple[str, ...] = ()
    state_checkpoints: int = 0  # states that a request keeps for resuming in the middle of a prefill, beside the two
    moe: bool = False


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts: ``count`` routed experts, ``per_token`` of them run, ``intermediate_size`` each."""

    count: int
    per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0


class Mla(msgspec.Struct, frozen=True, kw_only=True):
    """Multi-head latent attention: what one token leaves in the cache is ``kv_lora_rank + qk_rope_head_dim`` wide."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """How the checkpoint's weights are stored. ``method`` is vLLM's word for it ("fp8", "awq", "gptq", …)."""

    method: str
    bits: int
    group_size: int | None = None  # input channels that share a scale (AWQ, GPTQ, compressed-tensors); None: a tensor
    block_shape: tuple[int, int] | None = None  # (output, input) of a block-FP8 scale
    ignored: tuple[str, ...] = ()  # module-name patterns that stay in the model's dtype
    format: str = ""  # compressed-tensors: "pack-quantized", "float-quantized", "int-quantized", "nvfp4-pack-quantized"
    kv_cache_dtype: str | None = None  # the cache dtype that "auto" means for this checkpoint; None: the model's


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model as the planner needs it. Sizes are before any parallel split."""

    name: str  # as the person gave it: a folder or a hub id
    path: str | None  # the local folder, where there is one
    architecture: str  # config.json's architectures[0]
    model_type: str
    task: Literal["generate", "pooling"]
    dtype: str  # vLLM's: "bfloat16", "float16", "float32"
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    heads: int
    head_dim: int
    kv_heads: int
    layers: tuple[Layer, ...]
    max_model_len: int  # the model's own, as vLLM derives it
    tie_word_embeddings: bool
    tensors: tuple[Tensor, ...]
    tensors_from: Literal["safetensors", "config"]
    experts: Experts | None = None
    mla: Mla | None = None
    quantization: Quantization | None = None
    multimodal: bool = False
    qk_norm: bool = False  # attention norms its queries and keys
    rope_positions: int | None = None  # rows of its tables of cosines and sines, where they are not max_model_len
    warnings: tuple[str, ...] = ()
