"""User settings that vLLM refuses for this model. vLLM itself reports them only about a minute after its start. Pure.

Rules that need no model are in ``settings``, and rules about a split of the model are in ``sizing.parallel``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vllm_launch.engine.architectures import tasks_of
from vllm_launch.engine.options import nearest, pinned_vllm
from vllm_launch.engine.removed import REMOVED_METHODS, UNQUANTIZED
from vllm_launch.errors import UsageError
from vllm_launch.model.dtypes import NO_FLOAT16
from vllm_launch.model.model import Model
from vllm_launch.model.quantization import DEPRECATED, MIN_CAPABILITY
from vllm_launch.model.quantization_flag import answer, computes_in
from vllm_launch.plan.request import PlanRequest, dtype_of, splits_prompts
from vllm_launch.settings.settings import Settings

REMOVE_QUANTIZATION = "remove --quantization: vLLM reads the method from the checkpoint"

FROM_ELSEWHERE = {"quantization_config_file", "quantization_config_dict_json"}
"""Keys of --hf-overrides that hold a quantisation (model_executor/model_loader/weight_utils.py:get_quant_config)."""

CPU_BLOCK = 32
"""Blocks of vLLM's attention on the CPU are multiples of this number of tokens
(v1/attention/backends/cpu_attn.py:get_supported_kernel_block_sizes)."""


class Case(NamedTuple):
    """What the rules look at. ``on_gpu``: whether vLLM's CUDA build runs the model."""

    settings: Settings
    request: PlanRequest
    model: Model
    on_gpu: bool

    def option(self, dest: str) -> object:
        """Return the user's value of a vLLM option, or None."""
        return self.settings.engine.get(dest)

    def size(self, dest: str) -> int:
        """Return the user's value of a parallel size, or 1."""
        value = self.settings.engine.get(dest)
        return value if isinstance(value, int) else 1

    @property
    def length(self) -> int:
        """Return max_model_len."""
        length = self.size("max_model_len")
        return length if self.option("max_model_len") is not None and length > 0 else self.model.max_model_len


class Refusal(NamedTuple):
    """One thing that vLLM refuses. ``dest``: the option, or "model". ``problem``: what is wrong."""

    dest: str
    problem: str
    remedy: str


def check(case: Case) -> None:
    """Check the user's settings against ``RULES``.

    Raises:
        UsageError: vLLM refuses the settings for this model. Names the place where the user set the first one.
    """
    for rule in RULES:
        for refusal in rule(case):
            where = f"model {case.model.name}"
            if refusal.dest != "model":
                where = case.settings.origin.get(refusal.dest, refusal.dest)
            raise UsageError(where, refusal.problem, refusal.remedy)


def warnings(case: Case) -> list[str]:
    """Return a sentence for a --quantization that vLLM accepts but does not need."""
    method = _method(case)
    if method is None or case.model.quantization is None:
        return []
    own = case.model.quantization.method
    where = case.settings.origin["quantization"]
    if answer(case.model, method, on_gpu=case.on_gpu) == "ignored":
        return [f"{where}: vLLM ignores {method}, because the checkpoint is {own}: {REMOVE_QUANTIZATION}"]
    if method == "humming":
        counted = f"the plan counts the checkpoint's own weights ({own})"
        return [f"{where}: {counted}, and the method humming may store them in another format"]
    if method != own and own == "awq":
        other = f"vLLM's CUDA build accepts {method} for an awq checkpoint, but its CPU build refuses it"
        return [f"{where}: {other}: {REMOVE_QUANTIZATION}"]
    if method != own:
        return [f"{where}: vLLM accepts {method} for a {own} checkpoint, but does not need it: {REMOVE_QUANTIZATION}"]
    return []


def _method(case: Case) -> str | None:
    return None if case.request.quantization is None else case.request.quantization.lower()


def _config_code(case: Case) -> Iterator[Refusal]:
    """The code that reads config.json (transformers/dynamic_module_utils.py:resolve_trust_remote_code)."""
    kind, model = case.model.config_code, case.model
    if case.option("hf_config_path") or case.option("config_format") not in {None, "auto", "hf"}:
        return
    what = f"the model type {model.model_type!r} is not part of vLLM {pinned_vllm()} or its transformers"
    if kind == "repository" and not case.option("trust_remote_code"):
        problem = f"{what}, and vLLM runs the code in the model's repository only with --trust-remote-code"
        yield Refusal("model", problem, "add --trust-remote-code if you trust that code")
    if kind == "unknown":
        remedy = "use a checkpoint that was uploaded for transformers, or correct model_type in config.json"
        yield Refusal("model", f"{what}, and config.json names no code for it (auto_map)", remedy)


def _quantization(case: Case) -> Iterator[Refusal]:
    method = _method(case)
    overrides = case.option("hf_overrides")
    if method is None or (isinstance(overrides, dict) and FROM_ELSEWHERE & overrides.keys()):
        return
    verdict = answer(case.model, method, on_gpu=case.on_gpu)
    if verdict == "refused":
        yield Refusal("quantization", *_why_refused(case, method))
    if verdict == "accepted" and method in DEPRECATED and not case.option("allow_deprecated_quantization"):
        yield Refusal("quantization", f"{method} is deprecated", "add --allow-deprecated-quantization")


def _why_refused(case: Case, method: str) -> tuple[str, str]:
    """Return why vLLM refuses ``method`` for this checkpoint, and what to do."""
    own = case.model.quantization
    if own is not None:
        return f"{method} does not match the checkpoint, which is {own.method}", REMOVE_QUANTIZATION
    if method in REMOVED_METHODS:
        remedy = REMOVED_METHODS[method].replace(UNQUANTIZED, "replace it by")  # the user has this model already
        return f"vLLM {pinned_vllm()} no longer supports the method {method!r}", remedy
    if method == "online" and case.option("quantization_config") is None:
        return "online needs --quantization-config", "add it, or use --quantization fp8"
    if method not in MIN_CAPABILITY:
        return f"vLLM {pinned_vllm()} has no method {method!r}", nearest(method, MIN_CAPABILITY, "use fp8")
    problem = f"the checkpoint is not quantised, and {method} needs a checkpoint that was quantised with it"
    return problem, f"use the model's {method} checkpoint, or --quantization fp8 to quantise while loading"


def _dtype(case: Case) -> Iterator[Refusal]:
    """The dtype that the quantisation computes in (config/vllm.py:VllmConfig._get_quantization_config)."""
    own = case.model.quantization
    method = own.method if own else _method(case)
    dtype = dtype_of(case.request, case.model, None)
    if method is not None and not computes_in(method, dtype):
        yield Refusal("dtype", f"{method} quantisation does not compute in {dtype}", "set --dtype bfloat16")


def _float16(case: Case) -> Iterator[Refusal]:
    if dtype_of(case.request, case.model, None) == "float16" and case.model.model_type in NO_FLOAT16:
        problem = f"models of the type {case.model.model_type} are numerically unstable in float16"
        yield Refusal("dtype", problem, "set --dtype bfloat16, or --dtype float32 on GPUs without bfloat16")


def _batch(case: Case) -> Iterator[Refusal]:
    """A batch must hold a whole prompt if vLLM does not split prompts (config/scheduler.py:verify_max_model_len)."""
    tokens, length = case.option("max_num_batched_tokens"), case.length
    if not isinstance(tokens, int) or tokens >= length or splits_prompts(case.request, case.model):
        return
    problem = (
        f"a batch of {tokens} tokens is smaller than max_model_len ({length}), and without chunked prefill a batch "
        "must hold a whole prompt"
    )
    yield Refusal("max_num_batched_tokens", problem, f"set at least {length}, or --max-model-len {tokens}")


def _states(case: Case) -> Iterator[Refusal]:
    """Prefix caching of recurrent states (model_executor/models/config.py:MambaModelConfig)."""
    caches = case.option("enable_prefix_caching")
    if caches is None:  # vLLM's default (config/model.py:ModelConfig.is_prefix_caching_supported)
        generates = case.model.task == "generate"
        caches = any(layer.kv_heads for layer in case.model.layers) if generates else case.model.chunked_prefill
    has_states = any(layer.state_shapes for layer in case.model.layers)
    if has_states and caches and not splits_prompts(case.request, case.model):
        problem = "prefix caching of a model with recurrent states needs chunked prefill"
        yield Refusal("enable_chunked_prefill", problem, "enable it, or add --no-enable-prefix-caching")


def _long_prefill(case: Case) -> Iterator[Refusal]:
    length, threshold = case.length, case.size("long_prefill_token_threshold")
    if threshold > length and not any(layer.cross for layer in case.model.layers):
        problem = f"long_prefill_token_threshold {threshold} is more than max_model_len {length}"
        yield Refusal("long_prefill_token_threshold", problem, f"set at most {length}")


def _encoder_decoder(case: Case) -> Iterator[Refusal]:
    if case.option("enable_prompt_embeds") and any(layer.cross for layer in case.model.layers):
        problem = "prompt embeddings do not work with an encoder-decoder model"
        yield Refusal("enable_prompt_embeds", problem, "remove it")


def _item_limits(case: Case) -> Iterator[Refusal]:
    """Limits of images, videos and audio (config/multimodal.py:MultiModalConfig._validate_limit_per_prompt)."""
    if not case.model.multimodal:
        return
    dest = "limit_mm_per_prompt"
    for modality, limit in (case.request.limit_mm_per_prompt or {}).items():
        known = ("count", *ITEM_OPTIONS.get(modality, ()))
        for name, value in (limit if isinstance(limit, dict) else {"count": limit}).items():
            least = 0 if name == "count" else 1
            if name not in known:
                yield Refusal(dest, f"{modality} has no option {name!r}", nearest(name, known))
            elif value is not None and value < least:
                yield Refusal(dest, f"{name} of {modality} is {value}", f"give {least} or more")


ITEM_OPTIONS = {"image": ("width", "height"), "video": ("num_frames", "width", "height"), "audio": ("length",)}
"""Options of a limit besides "count", by modality (config/multimodal.py)."""


def _adapters(case: Case) -> Iterator[Refusal]:
    if case.option("default_mm_loras") and not case.model.multimodal:
        problem = "adapters for a modality need a multimodal model, and this model reads only text"
        yield Refusal("default_mm_loras", problem, "use --lora-modules")


def _decode_context(case: Case) -> Iterator[Refusal]:
    """Decode context parallelism without MLA (config/model.py:verify_with_parallel_config)."""
    dcp, tensor, model = case.size("decode_context_parallel_size"), case.size("tensor_parallel_size"), case.model
    if dcp == 1 or model.mla is not None or not model.kv_heads:
        return
    dest = "decode_context_parallel_size"
    if tensor <= model.kv_heads:
        needed = f"a tensor_parallel_size above {model.kv_heads}, the model's number of KV heads"
        problem = f"{dest} {dcp} needs {needed}, but tensor_parallel_size is {tensor}"
        yield Refusal(dest, problem, "remove --decode-context-parallel-size, or raise --tensor-parallel-size")
    elif dcp > tensor // model.kv_heads:
        largest = tensor // model.kv_heads
        problem = f"{dest} is {dcp}, but {tensor} GPUs hold each of the {model.kv_heads} KV heads only {largest} times"
        yield Refusal(dest, problem, f"set at most {largest}")
    elif (model.heads // model.kv_heads) % dcp:
        problem = f"{dest} {dcp} does not divide the {model.heads // model.kv_heads} query heads of a KV head"
        yield Refusal(dest, problem, "set a divisor of that number")


def _external_balancer(case: Case) -> Iterator[Refusal]:
    """One replica of several (engine/arg_utils.py:create_engine_config)."""
    if case.model.experts is not None or case.size("data_parallel_size") == 1:
        return
    for dest in ("data_parallel_rank", "data_parallel_external_lb"):
        if case.option(dest) is not None and case.option(dest) is not False:
            problem = "vLLM supports an external load balancer for replicas only if the model has experts"
            yield Refusal(dest, problem, "start one vLLM per replica, without --data-parallel flags")


def _routed_experts(case: Case) -> Iterator[Refusal]:
    """The recorded experts of each token (config/vllm.py:VllmConfig._verify_aux_output_compat)."""
    dest = "enable_return_routed_experts"
    if case.option(dest):
        if case.model.experts is None or case.model.task == "pooling":
            yield Refusal(dest, "it needs a model with experts that generates text", "remove it")
        for size in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
            if case.size(size) > 1:
                yield Refusal(dest, f"it does not work with {size} {case.size(size)}", "remove one of them")


def _kv_cache_dtype(case: Case) -> Iterator[Refusal]:
    dtype = str(case.option("kv_cache_dtype") or "")
    if dtype.startswith("nvfp4") and not dtype.endswith("_ds_mla") and case.model.mla is not None:
        yield Refusal("kv_cache_dtype", f"{dtype} does not work with MLA", "use fp8, auto or nvfp4_ds_mla")


def _block_size(case: Case) -> Iterator[Refusal]:
    size = case.option("block_size")
    own_kernel = case.model.mla is not None or case.model.task == "pooling"
    if not case.on_gpu and isinstance(size, int) and size % CPU_BLOCK and not own_kernel:
        problem = f"block_size is {size}, and the attention of vLLM's CPU engine needs a multiple of {CPU_BLOCK}"
        yield Refusal("block_size", problem, "remove it: vLLM then uses 128")


def _runner(case: Case) -> Iterator[Refusal]:
    """What the model can do (config/model.py:ModelConfig.__post_init__)."""
    runner, convert = case.option("runner"), case.option("convert")
    can = set(tasks_of(case.model.architecture))
    if runner in {"generate", "draft"} and can == {"pooling"}:
        yield Refusal("runner", f"{case.model.architecture} is a pooling model", "remove it, or use --runner pooling")
    if case.model.task == "pooling" and convert == "none" and "pooling" not in can:
        problem = f"{case.model.architecture} does not pool by itself"
        yield Refusal("convert", problem, "use --convert embed or --convert classify")


RULES = (
    _config_code, _runner, _quantization, _float16, _dtype, _batch, _states, _long_prefill, _encoder_decoder,
    _item_limits, _adapters, _decode_context, _external_balancer, _routed_experts, _kv_cache_dtype, _block_size,
)  # fmt: skip
"""Rules in the order of their checks. ``check`` reports only the first refusal."""
