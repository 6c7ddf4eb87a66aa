"""Tests when vLLM's allocator uses expandable segments, and the memory that it loses without them."""

import msgspec
import pytest
from builders import EXPERTS, MIB, MOE, gpu, model, placed, run

from vllm_launch.sizing.allocator import FRAGMENTS, fragments, uses_expandable_segments
from vllm_launch.sizing.memory import memory_of_gpu
from vllm_launch.sizing.parallel import Layout

UNIFIED = msgspec.structs.replace(gpu(capability=(12, 1)), unified=True)
SLICE = msgspec.structs.replace(gpu(), mig_profile="1g.18gb")
SPARSE = model(layers=(MOE,), experts=EXPERTS)


@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=2), Layout(data=2)])
def test_a_gpu_that_runs_whole_layers_alone_uses_expandable_segments(layout):
    assert uses_expandable_segments(placed(model(), run(), layout, gpu()))


@pytest.mark.parametrize(
    ("llm", "layout", "device"),
    [
        (model(), Layout(tensor=2), gpu()),
        (SPARSE, Layout(data=2), gpu()),
        (model(), Layout(), SLICE),
        (model(), Layout(), UNIFIED),
        (model(), Layout(), None),
    ],
    ids=["tensor parallelism", "experts of several replicas", "MIG", "unified memory", "CPU"],
)
def test_expandable_segments_are_not_used_where_they_fail_or_nobody_tried_them(llm, layout, device):
    assert not uses_expandable_segments(placed(llm, run(), layout, device))


@pytest.mark.parametrize("choice", [True, False])
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2)])
def test_the_user_decides_on_expandable_segments_on_every_split(choice, layout):
    assert uses_expandable_segments(placed(model(), run(expandable_segments=choice), layout, gpu())) is choice


def test_ordinary_segments_lose_a_third_of_the_temporary_memory():
    ordinary, expandable = (
        placed(model(), run(expandable_segments=choice, compiled=False), Layout(), gpu()) for choice in (False, True)
    )
    assert fragments(expandable, 900 * MIB) == FRAGMENTS
    assert fragments(ordinary, 900 * MIB) == FRAGMENTS + 300 * MIB
    with_loss, without = memory_of_gpu(ordinary), memory_of_gpu(expandable)
    tables = 2 * 4 * 1024 * 512
    temporary = without.activation_peak + without.safety - FRAGMENTS - tables
    assert with_loss.safety == without.safety + round(temporary / 3)
    assert with_loss.activation_peak == without.activation_peak
