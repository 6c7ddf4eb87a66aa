"""Tests of combinations of vLLM's options that vLLM refuses. tests/engine/test_plans_against_vllm.py asks vLLM itself."""

import json

import pytest

from vllm_launch.errors import UsageError
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings


def read(*words: str):
    return read_settings(parse_flags(["m", *words]), {})


def speculative(**config: object) -> tuple[str, str]:
    return "--speculative-config", json.dumps(config)


def transfer(**config: object) -> tuple[str, str]:
    return "--kv-transfer-config", json.dumps(config)


REFUSED = [
    (["--lora-modules", "a=b"], "add --enable-lora"),
    (
        ["--enable-lora", "--max-loras=4", "--max-cpu-loras=2"],
        "max_cpu_loras 2 is less than max_loras 4; set --max-cpu-loras to 4 or more",
    ),
    (["--enable-auto-tool-choice"], "add --tool-call-parser NAME, or remove --enable-auto-tool-choice"),
    (["--ray-workers-use-nsight"], "add --distributed-executor-backend ray, or remove --ray-workers-use-nsight"),
    (["--tool-call-parser", "hermess"], "did you mean hermes?"),
    (["--reasoning-parser", "qwen33"], "did you mean qwen3?"),
    (["--enable-log-outputs"], "add --enable-log-requests"),
    (["--enable-per-request-metrics", "--disable-log-stats"], "remove one of them"),
    (["--sse-keep-alive-interval=-1"], "give 0 or more"),
    (["--enable-eplb"], "add --enable-expert-parallel"),
    (["--enable-eplb", "-ep", "-tp=1"], "needs more than one GPU"),
    (["--eplb-config", '{"num_redundant_experts": 2}'], "add --enable-eplb"),
    (
        ["-dcp=2"],
        "decode_context_parallel_size 2 does not divide tensor_parallel_size 1; set --tensor-parallel-size to a multiple of 2, or remove --decode-context-parallel-size",
    ),
    (["-pcp=2", "-dcp=3"], "takes only 1, 2"),
    (
        ["--nnodes=3", "-tp=8"],
        "not a multiple of nnodes 3; for several machines set all parallel sizes yourself, or run vllm serve",
    ),
    (["--nnodes=2", "-tp=8", "--node-rank=2"], "ranks 0 to 1"),
    (["--nnodes=2", "-tp=8", "--data-parallel-backend=ray"], "takes only mp"),
    (["-dp=2", "-dpl=4"], "data_parallel_size_local 4 is more than data_parallel_size 2"),
    (["--data-parallel-rank=0"], "data_parallel_size above 1"),
    (["-dp=2", "--data-parallel-rank=2"], "ranks 0 to 1"),
    (["-dp=2", "--data-parallel-external-lb"], "add --data-parallel-rank"),
    (["-dp=2", "--data-parallel-hybrid-lb"], "add --data-parallel-size-local"),
    (["-dp=2", "--data-parallel-rank=0", "-dph", "-dpl=1"], "one kind of load balancing"),
    (["-dp=4", "--data-parallel-rank=0", "-dpl=2"], "set --data-parallel-size-local to 1"),
    (["--enable-fault-tolerance"], "external load balancer"),
    (["--distributed-executor-backend=uni", "-tp=2"], "use mp"),
    (
        ["--enable-dbo"],
        "--enable-dbo needs --all2all-backend deepep_low_latency, deepep_high_throughput or nixl_ep; add one",
    ),
    (["--return-sampling-mask"], "--logprobs-mode processed_logprobs"),
    (["--attention-backend", "FLASH_ATTEN"], "did you mean FLASH_ATTN?"),
    (["--watermark=1.0"], "give less than 1"),
    (["--mamba-block-size=0"], "give more than 0"),
    (["--stream-interval=0"], "give 1 or more"),
    (
        ["--pooler-config", '{"pooling_type": "mean"}'],
        "vLLM has no pooling_type 'mean'; give one of ALL, CLS, LAST, MEAN, STEP",
    ),
    (transfer(kv_connector="NixlConnector"), "needs a kv_role; add kv_role, one of kv_producer, kv_consumer, kv_both"),
    (transfer(kv_connector="NixlConnector", kv_role="both"), "kv_role 'both' is not valid; give one of kv_producer"),
    (transfer(kv_connector="NixlConector", kv_role="kv_both"), "did you mean NixlConnector?"),
    (speculative(num_speculative_tokens=3), "names no method"),
    (speculative(method="eagle3", num_speculative_tokens=3), 'eagle3 needs a model; add "model"'),
    (speculative(method="draft_model", num_speculative_tokens=3), 'add "model"'),
    (speculative(method="custom_class", num_speculative_tokens=3), 'add "model"'),
    (speculative(method="ngram"), "needs num_speculative_tokens"),
    (speculative(method="eagel", num_speculative_tokens=3), "did you mean eagle?"),
    (speculative(method="ngram", num_speculative_tokens=3, prompt_lookup_min=5, prompt_lookup_max=2), "lower it"),
    ((*speculative(method="ngram", num_speculative_tokens=3), "--async-scheduling"), "remove it"),
]


@pytest.mark.parametrize(
    ("words", "remedy"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_a_combination_that_vllm_refuses_is_refused_with_a_remedy(words, remedy):
    with pytest.raises(UsageError, match=r"^flag --") as error:
        read(*words)
    assert remedy in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--enable-lora", "--lora-modules", "a=b", "--max-loras=2", "--max-cpu-loras=2"],
        ["--enable-eplb", "-ep", "-tp=2"],
        ["-tp=4", "-dcp=2"],
        ["-pcp=2", "-dcp=2"],
        ["--nnodes=2", "-tp=16", "--node-rank=1"],
        ["-dp=2", "--data-parallel-rank=1", "-dpl=1", "--enable-fault-tolerance"],
        ["-dp=4", "-dph", "-dpl=2"],
        ["--tool-call-parser", "mine", "--tool-parser-plugin", "mine.py"],
        ["--attention-backend", "flash_attn"],
        ["--watermark=0.99"],
        transfer(kv_connector="Mine", kv_role="kv_both", kv_connector_module_path="mine"),
        speculative(method="ngram", num_speculative_tokens=3),
        speculative(method="mtp", num_speculative_tokens=3),
        speculative(method="dspark", num_speculative_tokens=3),
        speculative(model="org/draft", num_speculative_tokens=3),
    ],
)
def test_a_combination_that_vllm_accepts_is_accepted(words):
    read(*words)


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (["--distributed-executor-backend=ray"], "ray"),
        (["--data-parallel-backend=ray"], "ray"),
        (speculative(method="suffix", num_speculative_tokens=4), "arctic-inference"),
    ],
)
def test_an_option_that_needs_another_package_is_warned_about(words, package):
    assert any(f"without the package {package}" in warning for warning in read(*words).warnings)
