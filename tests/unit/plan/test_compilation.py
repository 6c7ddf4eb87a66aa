"""Tests of how vLLM compiles and captures. tests/engine/test_memory_flags_against_vllm.py compares them with vLLM."""

import msgspec
import pytest
from builders import FULL, model

from vllm_launch.plan.compilation import compilation_of

CROSS = msgspec.structs.replace(FULL, cross=True)


def compiled(llm=None, *, eager=False, level=None, **config):
    result = compilation_of(llm or model(), enforce_eager=eager, optimization_level=level, config=config)
    return result.compiled, result.cudagraph_mode, result.fuse_allreduce_rms


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("0", (False, "NONE", False)),
        ("1", (True, "PIECEWISE", False)),
        ("2", (True, "FULL_AND_PIECEWISE", True)),
        ("3", (True, "FULL_AND_PIECEWISE", True)),
        (None, (True, "FULL_AND_PIECEWISE", True)),
    ],
)
def test_the_optimization_level_decides_on_compilation_and_graphs(level, expected):
    assert compiled(level=level) == expected


def test_eager_overrides_all_other_options():
    assert compiled(eager=True, level="3", mode=3, cudagraph_mode="FULL") == (False, "NONE", False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"cudagraph_mode": "NONE"}, (True, "NONE", True)),
        ({"cudagraph_mode": "none"}, (True, "NONE", True)),
        ({"cudagraph_mode": None}, (True, "FULL_AND_PIECEWISE", True)),
        ({"cudagraph_mode": "piecewise"}, (True, "PIECEWISE", True)),
        ({"mode": 0}, (False, "FULL_DECODE_ONLY", False)),
        ({"mode": "none", "cudagraph_mode": "PIECEWISE"}, (False, "NONE", False)),
        ({"mode": "STOCK_TORCH_COMPILE"}, (False, "NONE", False)),
        ({"mode": 2, "cudagraph_mode": "FULL"}, (False, "FULL", False)),
        ({"pass_config": {"fuse_allreduce_rms": False}}, (True, "FULL_AND_PIECEWISE", False)),
    ],
)
def test_the_compilation_config_overrides_the_level(config, expected):
    assert compiled(**config) == expected


def test_the_fused_all_reduce_can_be_switched_on_below_level_two():
    assert compiled(level="1", pass_config={"fuse_allreduce_rms": True}) == (True, "PIECEWISE", True)


def test_a_pooling_model_has_only_piecewise_graphs():
    assert compiled(model(task="pooling")) == (True, "PIECEWISE", True)
    assert compiled(model(task="pooling"), mode=0) == (False, "NONE", False)


def test_an_encoder_decoder_model_has_only_full_graphs_of_decoding_batches():
    whisper = model(layers=(CROSS,) * 4)
    assert compiled(whisper) == (True, "FULL_DECODE_ONLY", True)
    assert compiled(whisper, level="0") == (False, "NONE", False)
