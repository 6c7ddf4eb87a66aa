"""The tensors of DeepSeek V4, as vLLM allocates them. Pure.

Source: vllm/models/deepseek_v4/nvidia/model.py and attention.py. Experts are FP4 with one scale for 32 values, if
``expert_dtype`` says so, and else quantised as other linear layers.
"""

from __future__ import annotations

from vllm_launch.model import tensors_moe
from vllm_launch.model.config import Config
from vllm_launch.model.layers import INDEXED_RATIO
from vllm_launch.model.model import Layer
from vllm_launch.model.tensor_list import TensorList

FP4_BLOCK = 32


def deepseek_v4(tensor_list: TensorList, config: Config, layers: tuple[Layer, ...]) -> None:
    """Append the embeddings, the layers and the last norm."""
    hidden, copies = config.integer("hidden_size"), config.integer("hc_mult", default=4)
    tensor_list.add("model.embed_tokens.weight", config.integer("vocab_size"), hidden)
    tensor_list.add("model.hc_head_fn", copies, copies * hidden, dtype="F32")
    for n, layer in enumerate(layers):
        prefix = f"model.layers.{n}."
        for name in ("attn", "ffn"):
            tensor_list.add(f"{prefix}hc_{name}_fn", (2 + copies) * copies, copies * hidden, dtype="F32")
            tensor_list.norm(f"{prefix}{name}_norm", hidden)
        _attention(tensor_list, f"{prefix}attn.", config, layer.compression)
        _experts(
            tensor_list, f"{prefix}ffn.", config, hashed=n < config.integer("num_hash_layers", default=0, minimum=0)
        )
    tensor_list.add("model.norm.weight", hidden)


def _attention(tensor_list: TensorList, prefix: str, config: Config, ratio: int) -> None:
    hidden, heads, dim = (
        config.integer("hidden_size"),
        config.integer("num_attention_heads"),
        config.integer("head_dim"),
    )
    rank, groups = config.integer("q_lora_rank"), config.integer("o_groups", default=8)
    output = groups * config.integer("o_lora_rank", default=1024)
    tensor_list.add(f"{prefix}sinks", heads, dtype="F32")
    tensor_list.linear(f"{prefix}wq_a", rank, hidden)
    tensor_list.linear(f"{prefix}wkv", dim, hidden)
    tensor_list.norm(f"{prefix}q_norm", rank)
    tensor_list.norm(f"{prefix}kv_norm", dim)
    tensor_list.linear(f"{prefix}wq_b", heads * dim, rank)
    tensor_list.linear(f"{prefix}wo_a", output, heads * dim // groups)
    tensor_list.linear(f"{prefix}wo_b", hidden, output)
    if ratio > 1:
        _compressor(tensor_list, f"{prefix}compressor.", hidden, dim, ratio)
    if ratio == INDEXED_RATIO:
        index_heads, width = config.integer("index_n_heads"), config.integer("index_head_dim", default=128)
        tensor_list.linear(f"{prefix}indexer.wq_b", index_heads * width, rank)
        tensor_list.linear(f"{prefix}indexer.weights_proj", index_heads, hidden, quantized=False)
        _compressor(tensor_list, f"{prefix}indexer.compressor.", hidden, width, ratio)


def _compressor(tensor_list: TensorList, prefix: str, hidden: int, width: int, ratio: int) -> None:
    """Append the projections of keys and scores. They are twice as wide if neighbouring vectors overlap."""
    wide = width * (2 if ratio == INDEXED_RATIO else 1)
    tensor_list.add(f"{prefix}ape", ratio, wide, dtype="F32")
    tensor_list.linear(f"{prefix}wkv_wgate", 2 * wide, hidden, quantized=False)
    tensor_list.norm(f"{prefix}norm", width)


def _experts(tensor_list: TensorList, prefix: str, config: Config, *, hashed: bool) -> None:
    mixture, hidden = tensors_moe.read_experts(config), config.integer("hidden_size")
    if mixture is None:
        return
    count, width = mixture.count, mixture.intermediate_size
    tensor_list.add(f"{prefix}gate.weight", count, hidden)
    if hashed:
        tensor_list.add(f"{prefix}gate.tid2eid", config.integer("vocab_size"), mixture.per_token, dtype="I32")
    else:
        tensor_list.add(f"{prefix}gate.e_score_correction_bias", count, dtype="F32")
    if mixture.shared_intermediate_size:
        tensor_list.gated(f"{prefix}shared_experts.", mixture.shared_intermediate_size, hidden)
    if config.text("expert_dtype") != "fp4":
        for expert in range(count):
            tensor_list.gated(f"{prefix}experts.{expert}.", width, hidden)
        return
    for name, rows, columns in (("w13", 2 * width, hidden), ("w2", hidden, width)):
        tensor_list.add(f"{prefix}experts.{name}_weight", count, rows, columns // 2, dtype="U8")
        tensor_list.add(f"{prefix}experts.{name}_weight_scale", count, rows, columns // FP4_BLOCK, dtype="U8")
