"""`vllm-launch plan --format helm` writes values that the chart accepts. A pod with these values gets the same plan."""

from __future__ import annotations

import pytest
import yaml
from chart import render
from kubeconform import problems
from machine import ROOT

from vllm_launch.__main__ import main

MODELS = ROOT / "tests/data/models"
LLAMA_8B, LLAMA_70B = (str(MODELS / f"meta-llama--Meta-Llama-3-{size}") for size in ("8B", "70B"))


@pytest.fixture
def values(capsys):
    """Returns a function that runs `vllm-launch plan --format helm` and returns the parsed values."""

    def plan_as_values(*words):
        assert main(["plan", *words, "--format", "helm"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return plan_as_values


@pytest.mark.parametrize(
    ("words", "count", "replicas"),
    [
        ([LLAMA_8B, "--hardware", "H100:8"], 1, 8),
        ([LLAMA_70B, "--hardware", "H100:8"], 2, 4),
        ([LLAMA_8B, "--hardware", "L4"], 1, None),
        ([LLAMA_8B, "--hardware", "H100:4", "--launch-objective", "latency"], 4, None),
        ([LLAMA_8B, "--hardware", "H100:4", "--data-parallel-size", "4"], 4, None),
    ],
    ids=["replicas", "two-gpus-each", "one-gpu", "latency", "data-parallel"],
)
def test_replicas_become_pods(values, words, count, replicas):
    chart_values = values(*words)
    assert chart_values["gpus"] == {"count": count}
    assert chart_values.get("replicas") == replicas
    manifests = render(chart_values)
    limits = manifests["Deployment", "llama3"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == count
    assert problems(yaml.safe_dump_all(manifests.values())) == []


def test_the_config_file_has_the_users_options_but_no_secrets(values):
    options = ["--max-model-len", "4k", "--api-key", "secret", "--launch-drain-seconds=120", "--launch-cache-dir=/here"]
    chart_values = values(LLAMA_8B, "--hardware", "H100", *options)
    assert chart_values["config"] == {
        "model": "/models/meta-llama--Meta-Llama-3-8B",
        "max-model-len": 4000,
        "launch": {"drain_seconds": 120},
    }
    assert chart_values["models"] == {"claim": "models"}
    pod = render(chart_values)["Deployment", "llama3"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 125


def test_without_a_gpu_the_memory_request_is_that_of_the_plan(values):
    chart_values = values(str(MODELS / "openai--gpt-oss-20b"))
    assert chart_values["gpus"] == {"count": 0}
    assert 12 < int(chart_values["resources"]["memory"].removesuffix("Gi")) < 2000
