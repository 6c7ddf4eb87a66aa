"""Compares the rules for PyTorch's allocator with the pinned vLLM's own."""

# ruff: noqa: TID251 - the engine is what these tests compare with

import warnings
from types import SimpleNamespace

import pytest

from vllm_launch.engine import allocator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates what its own import uses
    from vllm.config import VllmConfig
    from vllm.device_allocator import alloc_conf

SETTINGS = ("expandable_segments:True", "expandable_segments:False", "max_split_size_mb:64,expandable_segments:True",
            " expandable_segments : true ", "expandable_segments:1", "max_split_size_mb:64")  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", allocator.VARIABLES)
def test_expandable_segments_are_read_from_the_environment_as_vllm_does(name, setting):
    ours = allocator.expandable_segments({name: setting}, {})
    assert ours is alloc_conf.expandable_segments_enabled_from_env({name: setting})


def test_the_first_variable_counts_as_in_vllm():
    assert allocator.VARIABLES == alloc_conf.ALLOC_CONF_ENV_VARS


@pytest.mark.parametrize("sleep_mode", [False, True])
def test_vllm_refuses_the_plans_variable_with_a_kv_connector(monkeypatch, sleep_mode):
    """So the plan does not set it then, and a user who does is told before the start (settings/rules.py)."""
    [(variable, value)] = allocator.EXPANDABLE.items()
    monkeypatch.setenv(variable, value)
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector="NixlConnector"),
        model_config=SimpleNamespace(enable_cumem_allocator=sleep_mode),
    )
    if sleep_mode:
        VllmConfig._verify_kv_transfer_compat(config)
    else:
        with pytest.raises(ValueError, match="incompatible with PYTORCH_CUDA_ALLOC_CONF"):
            VllmConfig._verify_kv_transfer_compat(config)
    assert allocator.expandable_segments({}, {"kv_transfer_config": {"kv_connector": "NixlConnector"}}) is False
