from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_health.state import Movement
from vllm_launch.serve import progress
from vllm_launch.serve.progress import PHASES
from vllm_launch.units import MIB, size

LOGS = Path(__file__).parents[2] / "data/logs"


def phases(lines):
    phase, order = "starting", ["starting"]
    for line in lines:
        phase = progress.phase_after(phase, line)
        if phase != order[-1]:
            order.append(phase)
    return order


def phases_of_log(hardware):
    (log,) = LOGS.glob(f"vllm-*-{hardware}-start.log")
    return phases(log.read_text().splitlines())


def test_a_real_start_on_the_cpu_goes_through_its_phases_in_order():
    assert phases_of_log("cpu") == ["starting", "initializing", "loading weights", "profiling", "warming up"]


def test_a_real_start_on_a_gpu_goes_through_all_phases_except_a_download():
    assert phases_of_log("h100") == [phase for phase in PHASES if phase not in {"downloading", "ready"}]


def test_cuda_graphs_captured_before_the_kv_cache_is_sized_are_profiling():
    estimate = "Capturing CUDA graphs (FULL): 100%|##########| 2/2 [00:00<00:00, 29.58it/s]"
    assert progress.phase_after("profiling", estimate) == "profiling"
    assert progress.phase_after("tuning kernels", estimate) == "capturing CUDA graphs"


def test_the_log_line_of_the_older_model_runner_is_known_simulated():
    loading = "(Worker pid=1) INFO 01-01 00:00:00 [gpu_model_runner.py:5040] Starting to load model m..."
    assert progress.phase_after("initializing", loading) == "loading weights"


@given(st.sampled_from(PHASES), st.text())
def test_a_phase_never_goes_back(phase, line):
    assert PHASES.index(progress.phase_after(phase, line)) >= PHASES.index(phase)
    assert progress.phase_after("ready", "Starting to load model") == "ready"


def test_lines_that_vllm_prints_while_it_waits_are_no_progress():
    assert not progress.shows_progress("INFO Waiting for 1 local, 0 remote core engine proc(s) to start.")
    assert not progress.shows_progress("No available shared memory broadcast block found in 60 seconds.")
    assert progress.shows_progress("Loading weights took 0.03 seconds")


def test_many_bytes_written_before_the_weights_are_a_download():
    before, more = Movement(written=MIB), Movement(written=17 * MIB)
    assert progress.downloading("starting", before, more)
    assert progress.downloading("initializing", before, more)
    assert not progress.downloading("compiling", before, more)
    assert not progress.downloading("starting", before, Movement(written=17 * MIB - 1))


def test_loaded_weights_are_counted_by_disk_reads_or_by_memory():
    before = Movement(read=100, resident=100, gpu=100)
    assert progress.loaded(before, Movement(read=150, resident=120, gpu=110)) == 50
    assert progress.loaded(before, Movement(read=100, resident=100, gpu=190)) == 90
    assert progress.loaded(before, Movement(read=90, resident=90, gpu=90)) == 0


LAST_PHASES = {"starting": 10.0, "loading weights": 30.0, "compiling": 20.0, "warming up": 5.0}


@pytest.mark.parametrize(
    ("phase", "phases", "remaining_s"),
    [
        ("starting", {}, 65),
        ("starting", {"starting": 4}, 61),
        ("loading weights", {"starting": 99, "loading weights": 10}, 45),
        ("compiling", {"compiling": 50}, 5),
        ("profiling", {"profiling": 3}, 5),
        ("ready", {}, 0),
    ],
)
def test_the_remaining_time_comes_from_the_last_start(phase, phases, remaining_s):
    assert progress.remaining(LAST_PHASES, phases, phase) == remaining_s


def test_without_an_earlier_start_the_remaining_time_is_unknown():
    assert progress.remaining({}, {}, "compiling") is None


def test_the_sentence_shows_weights_only_while_they_load():
    text = progress.sentence("loading weights", 12.4, 3 << 30, 2 << 30, {}, gpu=True)
    assert text.startswith("loading weights, 2.0 GiB of 2.0 GiB of weights, 12 s so far (normal: 40-180 s")
    assert progress.sentence("compiling", 12, 5, 10, {}, gpu=False) == "compiling, 12 s so far (normal: 45-130 s)"
    assert "of weights" not in progress.sentence("loading weights", 12, 5, None, {}, gpu=False)


def test_the_sentence_shows_the_time_of_the_last_start():
    assert (
        progress.sentence("compiling", 12, 5, 10, LAST_PHASES, gpu=True) == "compiling, 12 s so far (last time: 65 s)"
    )


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (5 * MIB, "5 MiB"), (1 << 40, "1024.0 GiB")]
)
def test_sizes_are_in_binary_units(count, text):
    assert size(count) == text


def test_the_kv_cache_is_compared_with_the_plan():
    assert progress.kv_sentence(524288, None, 0.05) == ("KV cache: 524,288 tokens", False)
    assert progress.kv_sentence(105, 100, 0.05) == ("KV cache: 105 tokens, planned 100 (+5.0%)", False)
    assert progress.kv_sentence(94, 100, 0.05)[1]
    assert progress.kv_sentence(106, 100, 0.05)[1]
