"""Tests of settings that vLLM refuses for a model. tests/engine/test_plans_against_vllm.py asks vLLM itself."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from builders import DEEPSEEK, EXPERTS, FULL, LATENT, SLIDING, STATE, model

from vllm_launch.decide import plan_request, without_windows
from vllm_launch.errors import UsageError
from vllm_launch.model.model import Layer, Quantization
from vllm_launch.plan import refusals
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings

CROSS = Layer(kind="full", kv_heads=8, head_dim=128, head_dim_v=128, cross=True)


def case(flags: str, *, on_gpu: bool = True, **changes: Any) -> refusals.Case:
    settings = read_settings(parse_flags(["m", *shlex.split(flags)]), {})
    return refusals.Case(settings, plan_request(settings), model(**changes), on_gpu=on_gpu)


def refused(flags: str, **changes: Any) -> str:
    with pytest.raises(UsageError) as error:
        refusals.check(case(flags, **changes))
    return str(error.value)


def quantized(method: str, bits: int = 4) -> Quantization:
    return Quantization(method=method, bits=bits)


@pytest.mark.parametrize(
    ("own", "flag"),
    [
        ("awq", "gptq"), ("awq", "fp8"), ("awq", "compressed-tensors"), ("gptq", "awq_marlin"), ("fp8", "awq"),
        ("compressed-tensors", "fp8"), ("compressed-tensors", "gptq"), ("mxfp4", "fp8"),
    ],
)  # fmt: skip
def test_a_quantization_that_does_not_match_the_checkpoint_is_refused(own, flag):
    error = refused(f"--quantization {flag}", quantization=quantized(own), dtype="bfloat16")
    assert error == (
        f"flag --quantization: {flag} does not match the checkpoint, which is {own}; remove --quantization: vLLM reads "
        "the method from the checkpoint"
    )


@pytest.mark.parametrize("flag", ["awq", "gptq", "compressed-tensors", "modelopt", "inc", "torchao"])
def test_an_unquantized_checkpoint_cannot_be_read_as_a_quantized_one(flag):
    assert "the checkpoint is not quantised" in refused(f"--quantization {flag}")


@pytest.mark.parametrize("flag", ["fp8", "FP8", "fp8_per_block", "mxfp8", "experts_int8", "humming"])
def test_an_unquantized_checkpoint_can_be_quantized_while_it_is_loaded(flag):
    refusals.check(case(f"--quantization {flag}"))


def test_an_unknown_or_removed_method_is_named():
    assert "no longer supports the method 'bitsandbytes'" in refused("-q bitsandbytes")
    assert "did you mean fp8?" in refused("-q fp9")
    assert "needs --quantization-config" in refused("-q online")


def test_a_deprecated_method_needs_its_flag():
    own = quantized("fbgemm_fp8", 8)
    assert "add --allow-deprecated-quantization" in refused("-q fbgemm_fp8", quantization=own)
    refusals.check(case("-q fbgemm_fp8 --allow-deprecated-quantization", quantization=own))


def test_another_name_of_the_checkpoints_method_is_accepted_with_a_warning_on_gpus():
    awq = case("-q awq_marlin", quantization=quantized("awq"))
    refusals.check(awq)
    warning = "vLLM's CUDA build accepts awq_marlin for an awq checkpoint, but its CPU build refuses it: remove"
    assert warning in refusals.warnings(awq)[0]
    gptq = refusals.warnings(case("-q gptq_marlin", quantization=quantized("gptq")))
    assert "vLLM accepts gptq_marlin for a gptq checkpoint, but does not need it" in gptq[0]
    assert "does not match" in refused("-q awq_marlin", quantization=quantized("awq"), on_gpu=False)
    assert not refusals.warnings(case("-q awq", quantization=quantized("awq")))


def test_a_method_that_vllm_ignores_is_warned_about():
    ignored = case("-q fp8", quantization=quantized("modelopt_fp4"))
    refusals.check(ignored)
    assert "vLLM ignores fp8, because the checkpoint is modelopt_fp4" in refusals.warnings(ignored)[0]
    gpt_oss = case("-q humming", quantization=quantized("mxfp4"), model_type="gpt_oss")
    with pytest.raises(UsageError, match="does not match"):
        refusals.check(gpt_oss)


def test_a_quantization_in_hf_overrides_is_not_judged():
    refusals.check(case("""-q awq --hf-overrides '{"quantization_config_file": "q.json"}'"""))


def test_code_in_the_models_repository_needs_the_flag():
    assert "add --trust-remote-code if you trust that code" in refused(
        "", config_code="repository", model_type="exaone"
    )
    refusals.check(case("--trust-remote-code", config_code="repository"))
    assert "config.json names no code" in refused("--trust-remote-code", config_code="unknown")
    refusals.check(case("--hf-config-path x", config_code="unknown"))


def test_a_batch_must_hold_a_prompt_that_vllm_does_not_split():
    pooling = {"task": "pooling", "chunked_prefill": False, "max_model_len": 8192}
    assert "set at least 8192, or --max-model-len 100" in refused(
        "--max-num-batched-tokens 100 --max-num-seqs 8", **pooling
    )
    refusals.check(case("--max-num-batched-tokens 100 --max-num-seqs 8"))
    refusals.check(case("--max-num-batched-tokens 100 --max-num-seqs 8 --max-model-len 100", **pooling))
    flags = "--max-num-batched-tokens 100 --max-num-seqs 8"
    for text in (refused(f"{flags} --no-enable-chunked-prefill"), refused(flags, layers=(CROSS,))):
        assert "without chunked prefill a batch must hold a whole prompt" in text


def test_cached_recurrent_states_need_chunked_prefill():
    layers = (STATE, FULL)
    assert "--no-enable-prefix-caching" in refused("--no-enable-chunked-prefill", layers=layers)
    refusals.check(case("--no-enable-chunked-prefill --no-enable-prefix-caching", layers=layers))
    refusals.check(case("--no-enable-chunked-prefill", layers=(STATE,)))


@pytest.mark.parametrize(
    ("flags", "changes", "problem"),
    [
        ("--dtype half", {"model_type": "gemma2"}, "numerically unstable in float16"),
        ("--dtype float32", {"quantization": quantized("awq")}, "does not compute in float32"),
        ("--dtype half", {"quantization": quantized("mxfp4")}, "set --dtype bfloat16"),
        ("--long-prefill-token-threshold 9000", {}, "more than max_model_len 8192"),
        ("--enable-prompt-embeds", {"layers": (CROSS,)}, "encoder-decoder"),
        ("""--default-mm-loras '{"audio": "x"}'""", {}, "reads only text"),
        ("-tp 8 -dcp 2", {}, "above 8, the model's number of KV heads, but tensor_parallel_size is 8"),
        ("-tp 16 -dcp 4", {}, "set at most 2"),
        ("-tp 32 -dcp 4", {"heads": 24}, "does not divide the 3 query heads"),
        ("-dp 2 --data-parallel-rank 0", {}, "only if the model has experts"),
        ("--kv-cache-dtype nvfp4", {"layers": (LATENT,), "mla": DEEPSEEK}, "does not work with MLA"),
        ("--enable-return-routed-experts", {}, "a model with experts"),
        ("--enable-return-routed-experts -pp 2", {"experts": EXPERTS}, "pipeline_parallel_size 2"),
        ("--runner generate", {"architecture": "BertModel"}, "is a pooling model"),
        ("--runner pooling --convert none", {"task": "pooling"}, "--convert embed"),
    ],
)
def test_what_the_model_cannot_do_is_refused(flags, changes, problem):
    assert problem in refused(flags, **changes)


def test_blocks_on_the_cpu_are_multiples_of_32():
    assert "needs a multiple of 32" in refused("--block-size 16", on_gpu=False)
    refusals.check(case("--block-size 64", on_gpu=False))
    refusals.check(case("--block-size 16"))


def test_a_model_without_windows_is_as_long_as_its_window():
    windowless = without_windows(model(layers=(SLIDING, FULL)))
    assert windowless.max_model_len == SLIDING.window
    assert {(layer.kind, layer.window) for layer in windowless.layers} == {("full", None)}


@pytest.mark.parametrize("method", ["bitsandbytes", "tpu_int8"])
def test_a_removed_method_for_an_unquantized_checkpoint_is_replaced_and_not_added(method):
    assert "replace it by --quantization " in refused(f"--quantization {method}")


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ('{"image": -1}', "count of image is -1; give 0 or more"),
        ('{"video": {"num_frames": 0}}', "num_frames of video is 0; give 1 or more"),
        ('{"image": {"num_frames": 4}}', "image has no option 'num_frames'"),
    ],
)
def test_limits_that_vllm_refuses_for_a_multimodal_model_are_refused(limits, problem):
    flags = f"--limit-mm-per-prompt '{limits}'"
    assert problem in refused(flags, multimodal=True)
    refusals.check(case(flags))  # vLLM ignores them for a model that reads only text


def test_other_limits_of_a_multimodal_model_are_accepted():
    limits = '{"image": {"count": 1, "width": 5}, "video": 0, "foo": 1}'
    refusals.check(case(f"--limit-mm-per-prompt '{limits}'", multimodal=True))
