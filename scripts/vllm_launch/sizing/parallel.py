"""Checks which splits of a model over GPUs vLLM accepts, and why it refuses the others. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from vllm_launch.engine import architectures
from vllm_launch.machine.generation import Generation
from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.dtypes import NO_FLOAT16, ONLY_BFLOAT16
from vllm_launch.model.model import Experts, Model, Quantization
from vllm_launch.model.quantization import MIN_CAPABILITY
from vllm_launch.sizing.run_config import RunConfig

_GPTQ = {"gptq", "auto_gptq", "gptq_marlin"}
_AWQ = {"awq", "auto_awq", "awq_marlin"}
_METHODS_WITH_GROUPS = {*_GPTQ, *_AWQ, "compressed-tensors", "modelopt_fp4"}


class Layout(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """The split of one replica (``tensor``, ``pipeline``), and the number of replicas (``data``)."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert_parallel: bool = False

    @property
    def gpus_per_replica(self) -> int:
        """Return the number of GPUs of one replica, or of its workers on the CPU engine."""
        return self.tensor * self.pipeline

    @property
    def gpus(self) -> int:
        """Return the number of GPUs of all replicas."""
        return self.gpus_per_replica * self.data

    @property
    def title(self) -> str:
        """Return the layout as text, such as "TP=2" or "TP=2 PP=2 DP=2 EP"."""
        words = [f"TP={self.tensor}"]
        words += [f"PP={self.pipeline}"] if self.pipeline > 1 else []
        words += [f"DP={self.data}"] if self.data > 1 else []
        return " ".join([*words, "EP"] if self.expert_parallel else words)


def padded_vocab(size: int) -> int:
    """Return the rows of the embedding table, a multiple of 64 (vocab_parallel_embedding.py)."""
    return -(-size // 64) * 64


def layer_split(layers: int, pipeline: int) -> tuple[int, ...]:
    """Return the number of layers on each pipeline rank. The remaining layers go to the ranks before the last.

    Source: vllm/distributed/utils.py:get_pp_indices.
    """
    per_rank, remaining = divmod(layers, pipeline)
    counts = [per_rank] * pipeline
    for position in range(2, remaining + 2):
        counts[-position] += 1
    return tuple(counts)


def expert_ranks(layout: Layout) -> int:
    """Return the number of GPUs that share the experts: the tensor-parallel times the data-parallel size.

    Source: fused_moe/config.py:FusedMoEParallelConfig.make.
    """
    return layout.tensor * layout.data


def expert_width(experts: Experts, layout: Layout) -> int:
    """Return the inner channels of an expert on one GPU: all with expert parallelism, or else its shard."""
    return experts.intermediate_size // (1 if layout.expert_parallel else expert_ranks(layout))


def problems(model: Model, run: RunConfig, layout: Layout, gpus: Sequence[Gpu]) -> list[str]:
    """Return the reasons why vLLM 0.32.0 would refuse this layout, one sentence each.

    The list is empty if vLLM accepts it. ``gpus`` are the GPUs of all replicas. It is empty on the CPU engine.
    """
    return [
        *_head_problems(model, layout),
        *_width_problems(model, run, layout),
        *_pipeline_problems(model, layout),
        *_expert_problems(model, run, layout),
        *_cache_problems(model, run),
        *_gpu_problems(model, run, layout, gpus),
    ]


def _head_problems(model: Model, layout: Layout) -> Iterator[str]:
    """Yield the problems of attention heads and of the vocabulary.

    Source: config/model.py:verify_with_parallel_config, linear.py:QKVParallelLinear, vocab_parallel_embedding.py.
    """
    tensor = layout.tensor
    if model.heads % tensor:
        yield f"{model.heads} attention heads are not divisible by TP={tensor}"
    if not model.mla:
        for heads in sorted({layer.kv_heads for layer in model.layers if layer.kv_heads}):
            if heads > tensor and heads % tensor:
                yield f"{heads} KV heads are not divisible by TP={tensor}"
            if heads <= tensor and tensor % heads:
                yield f"TP={tensor} is not a multiple of the {heads} KV heads, so they cannot be replicated evenly"
    vocab = padded_vocab(model.vocab_size)
    if vocab % tensor:
        padded = f" padded to {vocab}" if vocab != model.vocab_size else ""
        yield f"the vocabulary, {model.vocab_size}{padded}, is not divisible by TP={tensor}"


def _width_problems(model: Model, run: RunConfig, layout: Layout) -> Iterator[str]:
    """Yield the problems of feed-forward sizes: linear.py:divide, and the shard sizes that quantised kernels need."""
    quantization = model.quantization
    block = quantization.block_shape if quantization else None
    if block is None and run.quantization == "fp8_per_block":
        block = (128, 128)
    for name, width, ranks in _widths(model, layout):
        shard, remainder = divmod(width, ranks)
        if remainder:
            yield f"the {name} size {width} is not divisible by {ranks} ranks"
        elif block and ranks > 1 and (shard % block[0] or shard % block[1]):
            # fp8_utils.py:validate_fp8_block_shape, fp8.py:Fp8MoEMethod.create_weights
            yield (
                f"the {name} size {width} split over {ranks} ranks is {shard}, which is not a multiple of the FP8 "
                f"block size {block[0]} x {block[1]}"
            )
        elif quantization and ranks > 1:
            yield from _group_problems(quantization, name, shard)


def _widths(model: Model, layout: Layout) -> Iterator[tuple[str, int, int]]:
    """Yield (name, size, ranks) of each size that is split: of dense layers, of experts and of shared experts."""
    if any(not layer.moe for layer in model.layers) and model.intermediate_size:
        yield "intermediate", model.intermediate_size, layout.tensor
    if model.experts and model.experts.intermediate_size and not layout.expert_parallel:
        yield "expert intermediate", model.experts.intermediate_size, expert_ranks(layout)
    if model.experts and model.experts.shared_intermediate_size:
        yield "shared-expert intermediate", model.experts.shared_intermediate_size, layout.tensor


def _group_problems(quantization: Quantization, name: str, shard: int) -> Iterator[str]:
    """Yield the problem of a shard that splits a quantisation group.

    The sharded dimension is the input of down_proj and the output of gate_proj and up_proj. A shard need not be a
    multiple of a kernel's tile size, because Marlin pads it (marlin_padded_nk).
    Source: kernels/linear/mixed_precision/marlin.py:can_implement, quantization/auto_awq.py:create_weights,
    compressed_tensors/schemes (verify_group_size_divides_partition).
    """
    method, group = quantization.method, quantization.group_size
    if method in _METHODS_WITH_GROUPS and group and group > 0 and shard % group:
        yield f"a shard of the {name} size is {shard}, which is not a multiple of the quantisation group size {group}"


def _pipeline_problems(model: Model, layout: Layout) -> Iterator[str]:
    """Yield the problems of a pipeline.

    Source: config/model.py:verify_with_parallel_config. A rank without a layer fails in models/utils.py:make_layers.
    """
    if layout.pipeline == 1:
        return
    if len(model.layers) < layout.pipeline:
        yield f"{len(model.layers)} layers are fewer than PP={layout.pipeline}"
    architecture, _ = architectures.resolve([model.architecture], "model", custom_code=True)
    if architecture.native and "pipeline" not in architecture.flags:  # the Transformers backend always supports it
        yield f"{model.architecture} does not support pipeline parallelism"


def _expert_problems(model: Model, run: RunConfig, layout: Layout) -> Iterator[str]:
    """Yield the problems of expert parallelism.

    Source: config/model.py:_verify_with_expert_parallelism, layers/fused_moe/layer.py:FusedMoE.
    """
    if not layout.expert_parallel:
        return
    if model.experts is None:
        yield "expert parallelism needs a mixture-of-experts model, and this model has no experts"
    elif model.experts.count < expert_ranks(layout):
        yield f"{model.experts.count} experts are fewer than the {expert_ranks(layout)} ranks of expert parallelism"
    elif run.redundant_experts and (model.experts.count + run.redundant_experts) % expert_ranks(layout):
        both = f"{model.experts.count} experts and {run.redundant_experts} redundant experts"
        yield f"{both} are not divisible by the {expert_ranks(layout)} ranks of expert parallelism"


def _cache_problems(model: Model, run: RunConfig) -> Iterator[str]:
    """Yield the problem of a hybrid model without the hybrid KV cache manager.

    Source: v1/core/kv_cache_utils.py:_promote_local_kv_cache_specs.
    """
    kinds = {layer.kind for layer in model.layers} - {"none"}
    hybrid = any(layer.state_shapes for layer in model.layers) and kinds != {"mamba"}
    if run.disable_hybrid_kv_cache_manager and hybrid:
        yield "a model with attention and recurrent states needs vLLM's hybrid KV cache manager"


def _gpu_problems(model: Model, run: RunConfig, layout: Layout, gpus: Sequence[Gpu]) -> Iterator[str]:
    """Yield the problems of the GPUs: too few, or too old for the dtype or the quantisation.

    Source of the dtype check: platforms/cuda.py:check_if_supports_dtype.
    """
    if not gpus:
        return
    if layout.gpus > len(gpus):
        yield f"{layout.gpus} GPUs are needed and {len(gpus)} are available"
    oldest = min(gpus, key=lambda gpu: gpu.compute_capability)
    have = "{}.{}".format(*oldest.compute_capability) if any(oldest.compute_capability) else "an unknown one"
    method = run.quantization or (model.quantization.method if model.quantization else None)
    if run.dtype == "bfloat16" and oldest.generation < Generation.A100:
        dtype = "float32" if model.model_type in NO_FLOAT16 else "half"
        remedy = "" if method in ONLY_BFLOAT16 else f": set --dtype {dtype}"
        yield f"bfloat16 needs compute capability 8.0 and {oldest.name} has {have}{remedy}"
    least = MIN_CAPABILITY.get(method or "", (0, 0))
    if oldest.compute_capability < least:
        yield f"{method} quantisation needs compute capability {least[0]}.{least[1]} and {oldest.name} has {have}"
