"""Which splits of a model over GPUs are possible, and why the others are not. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from vllm_launch.engine import architectures
from vllm_launch.machine.generation import Generation
from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.model import Experts, Model, Quantization
from vllm_launch.model.quantization import MIN_CAPABILITY
from vllm_launch.sizing.run_config import RunConfig

_GPTQ = {"gptq", "auto_gptq", "gptq_marlin"}
_AWQ = {"awq", "auto_awq", "awq_marlin"}
_GROUPED = {*_GPTQ, *_AWQ, "compressed-tensors", "modelopt_fp4"}


class Layout(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """How one replica is split, and how many replicas there are."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert_parallel: bool = False

    @property
    def gpus_per_replica(self) -> int:
        """GPUs of one replica; on the CPU engine its workers."""
        return self.tensor * self.pipeline

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return self.gpus_per_replica * self.data

    @property
    def title(self) -> str:
        """In the field's words: "TP=2", "TP=2 PP=2 DP=2 EP"."""
        words = [f"TP={self.tensor}"]
        words += [f"PP={self.pipeline}"] if self.pipeline > 1 else []
        words += [f"DP={self.data}"] if self.data > 1 else []
        return " ".join([*words, "EP"] if self.expert_parallel else words)


def padded_vocab(size: int) -> int:
    """Rows of the embedding: vocab_parallel_embedding.py pads to 64."""
    return -(-size // 64) * 64


def layer_split(layers: int, pipeline: int) -> tuple[int, ...]:
    """Layers on each pipeline rank; what is left over goes to the ranks before the last.

    Source: vllm/distributed/utils.py:get_pp_indices.
    """
    each, left = divmod(layers, pipeline)
    counts = [each] * pipeline
    for back in range(2, left + 2):
        counts[-back] += 1
    return tuple(counts)


def expert_ranks(layout: Layout) -> int:
    """GPUs that the experts are spread over: tensor and data parallelism are one dimension for them.

    Source: fused_moe/config.py:FusedMoEParallelConfig.make.
    """
    return layout.tensor * layout.data


def expert_width(experts: Experts, layout: Layout) -> int:
    """Inner channels of an expert on one GPU: all of them where whole experts are spread, else a cut."""
    return experts.intermediate_size // (1 if layout.expert_parallel else expert_ranks(layout))


def problems(model: Model, run: RunConfig, layout: Layout, gpus: Sequence[Gpu]) -> list[str]:
    """Why vLLM 0.32.0 would refuse this layout, a sentence each; empty when it would not.

    ``gpus`` are those of all replicas, or none on the CPU engine.
    """
    return [
        *_head_problems(model, layout),
        *_width_problems(model, run, layout),
        *_pipeline_problems(model, layout),
        *_expert_problems(model, layout),
        *_gpu_problems(model, run, layout, gpus),
    ]


def _head_problems(model: Model, layout: Layout) -> Iterator[str]:
    """config/model.py:verify_with_parallel_config, linear.py:QKVParallelLinear, vocab_parallel_embedding.py."""
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
        yield f"the vocabulary, {model.vocab_size} padded to {vocab}, is not divisible by TP={tensor}"


def _width_problems(model: Model, run: RunConfig, layout: Layout) -> Iterator[str]:
    """linear.py:divide, and what quantised kernels ask of a shard of the feed-forward layer."""
    quantization = model.quantization
    block = quantization.block_shape if quantization else None
    if block is None and run.quantization == "fp8_per_block":
        block = (128, 128)
    for what, width, ranks in _widths(model, layout):
        shard, rest = divmod(width, ranks)
        if rest:
            yield f"the {what} size {width} is not divisible by {ranks} ranks"
        elif block and ranks > 1 and (shard % block[0] or shard % block[1]):
            # fp8_utils.py:validate_fp8_block_shape, fp8.py:Fp8MoEMethod.create_weights
            yield f"the {what} size {width} over {ranks} ranks is {shard}, not a multiple of the FP8 block {block[0]}"
        elif quantization and ranks > 1:
            yield from _group_problems(quantization, what, shard)


def _widths(model: Model, layout: Layout) -> Iterator[tuple[str, int, int]]:
    """The (name, size, ranks) that are cut: feed-forward of dense layers, of experts and of shared experts."""
    if any(not layer.moe for layer in model.layers) and model.intermediate_size:
        yield "intermediate", model.intermediate_size, layout.tensor
    if model.experts and model.experts.intermediate_size and not layout.expert_parallel:
        yield "expert intermediate", model.experts.intermediate_size, expert_ranks(layout)
    if model.experts and model.experts.shared_intermediate_size:
        yield "shared-expert intermediate", model.experts.shared_intermediate_size, layout.tensor


def _group_problems(quantization: Quantization, what: str, shard: int) -> Iterator[str]:
    """The sharded dimension is the input of down_proj and the output of gate and up.

    A group may not be cut; where a shard is no whole number of a kernel's tiles, Marlin pads it (marlin_padded_nk).
    Source: kernels/linear/mixed_precision/marlin.py:can_implement, quantization/auto_awq.py:create_weights,
    compressed_tensors/schemes (verify_group_size_divides_partition).
    """
    method, group = quantization.method, quantization.group_size
    if method in _GROUPED and group and group > 0 and shard % group:
        yield f"a shard of {shard} of the {what} size is not a whole number of quantisation groups of {group}"


def _pipeline_problems(model: Model, layout: Layout) -> Iterator[str]:
    """config/model.py:verify_with_parallel_config; a rank without a layer fails in models/utils.py:make_layers."""
    if layout.pipeline == 1:
        return
    if len(model.layers) < layout.pipeline:
        yield f"{len(model.layers)} layers are fewer than PP={layout.pipeline}"
    found, _ = architectures.resolve([model.architecture], "model", custom_code=True)
    if found.native and "pipeline" not in found.flags:  # the Transformers backend supports it for all its models
        yield f"{model.architecture} does not support pipeline parallelism"


def _expert_problems(model: Model, layout: Layout) -> Iterator[str]:
    """config/model.py:_verify_with_expert_parallelism."""
    if not layout.expert_parallel:
        return
    if model.experts is None:
        yield "expert parallelism needs a mixture of experts, which this model is not"
    elif model.experts.count < expert_ranks(layout):
        yield f"{model.experts.count} experts are fewer than the {expert_ranks(layout)} ranks of expert parallelism"


def _gpu_problems(model: Model, run: RunConfig, layout: Layout, gpus: Sequence[Gpu]) -> Iterator[str]:
    """Enough of them, new enough for the dtype (platforms/cuda.py:check_if_supports_dtype) and the quantisation."""
    if not gpus:
        return
    if layout.gpus > len(gpus):
        yield f"{layout.gpus} GPUs are needed and {len(gpus)} are there"
    oldest = min(gpus, key=lambda gpu: gpu.compute_capability)
    have = "{}.{}".format(*oldest.compute_capability)
    if run.dtype == "bfloat16" and oldest.generation < Generation.A100:
        yield f"bfloat16 needs compute capability 8.0 and {oldest.name} has {have}: add --dtype half"
    method = run.quantization or (model.quantization.method if model.quantization else None)
    least = MIN_CAPABILITY.get(method or "", (0, 0))
    if oldest.compute_capability < least:
        yield f"{method} quantisation needs compute capability {least[0]}.{least[1]} and {oldest.name} has {have}"
