"""`vllm-launch plan --format helm` writes values that the chart takes, and a pod with them plans the same again."""

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
    def one(*words):
        assert main(["plan", *words, "--format", "helm"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return one


@pytest.mark.parametrize(
    ("words", "count", "replicas"),
    [
        ([LLAMA_8B, "--hardware", "H100:8"], 1, 8),
        ([LLAMA_70B, "--hardware", "H100:8"], 2, 4),
        ([LLAMA_8B, "--hardware", "L4"], 1, None),
        ([LLAMA_8B, "--hardware", "H100:4", "--launch-objective", "latency"], 4, None),
        ([LLAMA_8B, "--hardware", "H100:4", "--data-parallel-size", "4"], 4, None),
    ],
    ids=["replicas", "two-gpus-each", "one-gpu", "latency", "asked-for-together"],
)
def test_replicas_become_pods(values, words, count, replicas):
    found = values(*words)
    assert found["gpus"] == {"count": count}
    assert found.get("replicas") == replicas
    manifests = render(found)
    limits = manifests["Deployment", "llama3"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == count
    assert problems(yaml.safe_dump_all(manifests.values())) == []


def test_what_was_said_is_in_the_config_file_and_secrets_are_not(values):
    found = values(LLAMA_8B, "--hardware", "H100", "--max-model-len", "4k", "--api-key", "secret", "--launch-drain-seconds=120",
                   "--launch-cache-dir=/here")  # fmt: skip
    assert found["config"] == {
        "model": "/models/meta-llama--Meta-Llama-3-8B",
        "max-model-len": 4000,
        "launch": {"drain_seconds": 120},
    }
    assert found["models"] == {"claim": "models"}
    pod = render(found)["Deployment", "llama3"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 125


def test_without_a_gpu_the_memory_is_what_the_plan_takes(values):
    found = values(str(MODELS / "openai--gpt-oss-20b"))
    assert found["gpus"] == {"count": 0}
    assert 12 < int(found["resources"]["memory"].removesuffix("Gi")) < 2000
