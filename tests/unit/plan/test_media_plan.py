"""Tests of plans for models that take images, videos or audio."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import msgspec
import pytest
from builders import GIB, IMAGES, model

from vllm_launch.__main__ import main
from vllm_launch.errors import UsageError
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.cpu import Cpu
from vllm_launch.plan.plan import Plan, plan
from vllm_launch.plan.reason import Reason
from vllm_launch.plan.request import PlanRequest

H200 = parse_hardware_name("H200:1")
WHOLE = msgspec.structs.replace(
    IMAGES, items=(msgspec.structs.replace(IMAGES.items[0], tokens=20_000),), chunked=False, encoder_tp_data=True
)

QWEN = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "dtype": "bfloat16",
    "text_config": {
        "model_type": "qwen3_vl_text", "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    "vision_config": {"depth": 2, "out_hidden_size": 1024},
}  # fmt: skip


def planned(media=IMAGES, **request) -> Plan:
    return plan(PlanRequest(**request), H200, model(media=media, max_model_len=32768))


def reason(result: Plan) -> Reason:
    return next(reason for reason in result.reasons if reason.field == "encoder_cache")


def test_the_plan_says_what_images_cost_and_how_to_do_without() -> None:
    result = planned()
    assert reason(result).value == 8192
    assert all(word in reason(result).why for word in ("image 1,024", "GiB", "--language-model-only"))
    assert result.memory.encoder > 0


def test_a_model_that_only_transcribes_is_not_told_to_do_without_audio() -> None:
    whisper = model(architecture="WhisperForConditionalGeneration", media=IMAGES, max_model_len=448)
    result = plan(PlanRequest(), H200, whisper)
    assert "--language-model-only" not in reason(result).why


@pytest.mark.parametrize("request_", [{"language_model_only": True}, {"limit_mm_per_prompt": {"image": 0}}])
def test_disabling_images_gives_their_memory_to_the_kv_cache(request_: dict[str, object]) -> None:
    large = msgspec.structs.replace(IMAGES, bytes_per_token=1_000_000)
    result = planned(large, **request_)
    assert (reason(result).value, result.memory.encoder) == (0, 0)
    assert result.kv_cache.tokens > planned(large).kv_cache.tokens


def test_a_limit_of_an_unknown_modality_is_a_warning() -> None:
    assert any(
        "vLLM ignores images in --limit-mm-per-prompt. It knows audio, image, video" in text
        for text in planned(limit_mm_per_prompt={"images": 0}).warnings
    )
    assert not any("vLLM ignores" in text for text in planned(limit_mm_per_prompt={"image": 1, "video": 0}).warnings)


def test_a_limit_with_options_limits_the_number_and_warns_of_the_sizes() -> None:
    result = planned(limit_mm_per_prompt={"image": {"count": 2, "width": 512}})
    assert any("--limit-mm-per-prompt: width reduces only" in warning for warning in result.warnings)
    both = planned(limit_mm_per_prompt={"image": {"width": 512, "height": 512}})
    assert any("--limit-mm-per-prompt: height, width reduce only" in warning for warning in both.warnings)
    assert result.memory.encoder == planned().memory.encoder
    assert planned(limit_mm_per_prompt={"image": {"count": 0}}).memory.encoder == 0


def test_a_batch_holds_an_item_that_vllm_cannot_split() -> None:
    assert planned(WHOLE).max_num_batched_tokens == 20_000
    assert planned(msgspec.structs.replace(WHOLE, chunked=True)).max_num_batched_tokens == 8192
    assert planned(msgspec.structs.replace(WHOLE, chunked=True), disable_chunked_mm_input=True).options[
        "max_num_batched_tokens"
    ] == 20_000  # fmt: skip
    assert planned(WHOLE, limit_mm_per_prompt={"image": 0}).max_num_batched_tokens == 8192
    assert planned(WHOLE, language_model_only=True).max_num_batched_tokens == 8192


def test_a_batch_that_is_set_too_small_for_an_item_is_refused() -> None:
    with pytest.raises(UsageError, match=r"one image has up to 20,000 tokens.*--max-num-batched-tokens 20000 or more"):
        planned(WHOLE, max_num_batched_tokens=4096)
    assert planned(max_num_batched_tokens=512).max_num_batched_tokens == 512


def test_a_processor_cache_larger_than_the_host_memory_is_warned_about() -> None:
    """vLLM keeps it in the API server and in each engine (config/multimodal.py:mm_processor_cache_gb)."""
    small = Cpu(cores=4, numa_nodes=(), memory_total=8 * GIB, memory_available=6 * GIB, memory_limit=None)
    host = msgspec.structs.replace(H200, cpu=small)
    for size, warned in ((None, True), (2.5, False), (3.5, True), (0.0, False)):
        result = plan(PlanRequest(mm_processor_cache_gb=size), host, model(media=IMAGES))
        found = [warning for warning in result.warnings if "mm-processor-cache-gb" in warning]
        assert bool(found) is warned
        assert all(warning.endswith("set --mm-processor-cache-gb to at most 3.0") for warning in found)
    assert not any("mm-processor" in warning for warning in plan(PlanRequest(), host, model()).warnings)


def test_data_parallel_encoders_are_warned_about_if_the_model_has_none() -> None:
    assert any("mm-encoder-tp-mode" in warning for warning in planned(mm_encoder_tp_mode="data").warnings)
    assert not any("mm-encoder" in warning for warning in planned(WHOLE, mm_encoder_tp_mode="data").warnings)


def test_flags_for_images_reach_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))

    def cache(*flags: str) -> tuple[int, int]:
        assert main(["plan", str(tmp_path), "--hardware", "H200", "--format", "json", *flags]) == 0
        document = json.loads(capsys.readouterr().out)
        value = next(reason["value"] for reason in document["reasons"] if reason["field"] == "encoder_cache")
        return value, document["memory"]["weights"]

    tokens, weights = cache()
    assert tokens == 16384
    assert cache("--mm-processor-kwargs", '{"max_pixels": 1048576}') == (8192, weights)
    for flags in (["--limit-mm-per-prompt", '{"image": 0, "video": 0}'], ["--language-model-only"]):
        value, less = cache(*flags)
        assert value == 0
        assert less < weights - 100_000_000


def test_a_cpu_without_torchvision_is_refused_before_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["plan", str(tmp_path)]) == 2
    assert "needs torchvision" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert main(["plan", str(tmp_path)]) == 0
