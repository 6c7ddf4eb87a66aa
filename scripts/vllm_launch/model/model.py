"""Data classes that describe a model: its shape, layers, tensors and quantization."""

from __future__ import annotations

from typing import Literal

import msgspec

from vllm_launch.model.chat import Chat

AttentionKind = Literal["full", "sliding", "chunked", "mla", "compressed", "mamba", "none"]
"""What a layer stores of earlier tokens. "mamba" is any fixed-size recurrent state: Mamba 1 and 2, gated delta net,
short convolution. "compressed" is DeepSeek V4's: a window of latent vectors, and one for several older tokens. "none"
stores nothing."""


class TowerPart(msgspec.Struct, frozen=True, kw_only=True):
    """What vLLM does with a tensor of a vision or audio tower.

    ``split``: whether tensor parallelism splits it. vLLM does not load it if all of ``modalities`` are disabled. ()
    means that vLLM always loads it.
    """

    modalities: tuple[str, ...]
    split: bool


class Tensor(msgspec.Struct, frozen=True):
    """One stored tensor, by its name in the checkpoint. ``dtype`` is safetensors' name ("BF16", "F8_E4M3", "I32").

    ``tower`` is None for the language model, and for all tensors that were read from safetensors headers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    tower: TowerPart | None = None


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """The cache of one decoder layer: what it stores per token, or per request."""

    kind: AttentionKind
    kv_heads: int = 0
    head_dim: int = 0  # of keys
    head_dim_v: int = 0  # of values; usually the same as of keys
    window: int | None = None  # tokens, for "sliding", "chunked" and "compressed"
    compression: int = 0  # tokens in one latent vector, for "compressed", or in one key of the indexer; 0: none
    index_bytes: int = 0  # bytes of a key in the cache of the sparse attention's indexer, beside the layer's own
    index_ring: int = 0  # bytes of the tokens of one request that the indexer has not compressed yet
    state_shapes: tuple[tuple[int, ...], ...] = ()  # per request, for "mamba"; before tensor parallelism
    state_dtypes: tuple[str, ...] = ()
    attentions: int = 1  # attention blocks in the layer, each with such a cache
    loop_windows: tuple[int, ...] = ()  # tokens that each further pass through the layer keeps in a cache of its own
    cross: bool = False  # the layer also stores the encoder's states: as many as one batch has tokens
    state_checkpoints: int = 0  # extra states that a request keeps to resume in the middle of a prefill
    moe: bool = False


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts: ``count`` routed experts of ``intermediate_size``, ``per_token`` of them run per token."""

    count: int
    per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0


class Mla(msgspec.Struct, frozen=True, kw_only=True):
    """Multi-head latent attention. The cache stores ``kv_lora_rank + qk_rope_head_dim`` values per token."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """How the checkpoint's weights are quantised. ``method`` is vLLM's name for it ("fp8", "awq", "gptq", …)."""

    method: str
    bits: int
    group_size: int | None = None  # input channels per scale (AWQ, GPTQ, compressed-tensors); None: no groups
    block_shape: tuple[int, int] | None = None  # (output, input) channels per scale of block FP8
    ignored: tuple[str, ...] = ()  # patterns of module names that are not quantised
    own_schemes: tuple[tuple[tuple[str, ...], Quantization], ...] = ()  # patterns of module names, and their scheme
    all_linear: bool = True  # False: only modules with a scheme of their own are quantised
    format: str = ""  # compressed-tensors: "pack-quantized", "float-quantized", "int-quantized", "nvfp4-pack-quantized"
    kv_cache_dtype: str | None = None  # what kv-cache-dtype "auto" selects; None: the model's dtype


class MediaItem(msgspec.Struct, frozen=True, kw_only=True):
    """The largest item of one modality: ``parts`` parts with ``tokens`` tokens each.

    A video has as many parts as fit into the model's length, at most ``parts`` and at least 1. Others have 1.
    """

    modality: str  # "image", "video" or "audio"
    tokens: int
    parts: int = 1
    per_prompt: int | None = None  # the most items in a prompt, if the model has a limit

    def tokens_within(self, length: int) -> int:
        """Return the tokens of the largest item of a model with ``length`` tokens."""
        return self.tokens * max(1, min(self.parts, length // max(1, self.tokens)))


class Media(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes besides text, and what its encoder needs.

    ``bytes_per_token``: the most bytes that the encoder has alive per token of its output, in 16-bit numbers.
    ``share_of_gpu``: the encoder limits itself to this share of a GPU's memory, or to one part if that is more.
    """

    items: tuple[MediaItem, ...]
    bytes_per_token: int
    share_of_gpu: float | None = None
    output_copies: int = 1  # hidden sizes that an encoder's output has per token: more than 1 with deepstack
    chunked: bool = True  # a batch can hold a part of an item
    encoder_tp_data: bool = False  # vLLM supports --mm-encoder-tp-mode data
    needs_torchvision: bool = False  # vLLM cannot import the model without it


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model as the planner needs it. Sizes are those of the whole model, before any parallel split."""

    name: str  # as the user gave it: a folder or a hub id
    path: str | None  # the local folder, if there is one
    architecture: str  # config.json's architectures[0]
    model_type: str
    task: Literal["generate", "pooling"]
    dtype: str  # compute dtype: "bfloat16", "float16" or "float32"
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    heads: int
    head_dim: int
    kv_heads: int
    layers: tuple[Layer, ...]
    max_model_len: int  # tokens, as vLLM derives it from the model's files
    tie_word_embeddings: bool
    keeps_head: bool = False  # also for pooling: its class is one for generation
    tensors: tuple[Tensor, ...]
    tensors_from: Literal["safetensors", "config"]
    experts: Experts | None = None
    mla: Mla | None = None
    quantization: Quantization | None = None
    multimodal: bool = False
    media: Media | None = None
    chunked_prefill: bool = True  # False: a pooling model whose prompts must each fit into one batch
    config_code: Literal["vllm", "repository", "unknown"] = "vllm"  # where the code is that reads config.json
    qk_norm: bool = False  # attention normalises queries and keys
    index_topk: int = 0  # tokens of a context that sparse attention chooses
    residual_copies: int = 1  # hidden sizes that a token's residual has (hyper-connections)
    rope_positions: int | None = None  # rows of the tables of cosines and sines, if not max_model_len
    chat: Chat | None = None  # None: unknown
    warnings: tuple[str, ...] = ()
