"""The phases and the progress of a start, from vLLM's log and processes."""

from __future__ import annotations

import pytest

from vllm_launch.serve.process import Process
from vllm_launch.serve.start_follower import SPEAK_SECONDS, StartFollower, all_reduce_sentence
from vllm_launch.units import MIB

LOADING = "Starting to load model m..."


def follower(**changes):
    return StartFollower(
        100.0, **{"last_phases": {}, "weights_bytes": 64 * MIB, "gpu": True, "no_multicast": False, **changes}
    )


def process(**changes):
    return Process(**{"pid": 7, "parent": 1, "state": "S", "title": "vllm", **changes})


def test_a_new_phase_is_printed_at_once_and_the_same_phase_every_10_s():
    start = follower()
    assert start.follow(["non-default args: {}"], [], 0, 100.5) == [
        "initializing, 0 s so far (normal: 40-180 s, minutes for large models)"
    ]
    assert start.follow(["anything"], [], 0, 101.0) == []
    assert start.follow([], [], 0, 100.5 + SPEAK_SECONDS - 0.1) == []
    (line,) = start.follow([], [], 0, 100.5 + SPEAK_SECONDS)
    assert line.startswith("initializing, 10 s so far")
    assert start.follow([], [], 0, 101.0 + SPEAK_SECONDS) == []


def test_progress_is_summed_over_processes_and_skips_waiting_lines():
    start = follower()
    alive = [process(read=1, written=2, resident=3), process(pid=8, read=10, written=20, resident=30)]
    start.follow(["a", "Waiting for 1 local, 0 remote core engine proc(s) to start.", "b"], alive, 5, 101.0)
    moved = start.moved
    assert (moved.lines, moved.processes) == (2, 2)
    assert (moved.read, moved.written, moved.resident, moved.gpu) == (11, 22, 33, 5)


def test_weights_count_from_the_start_of_loading_and_never_exceed_their_size():
    start = follower()
    start.follow([], [process(read=90 * MIB)], 0, 101.0)
    assert start.loaded_bytes == 0
    start.follow([LOADING], [process(read=90 * MIB)], 0, 102.0)
    start.follow([], [process(read=106 * MIB)], 0, 103.0)
    assert (start.phase, start.loaded_bytes) == ("loading weights", 16 * MIB)
    assert "16 MiB of 64 MiB of weights" in start.sentence(104.0)
    start.follow([], [process(read=900 * MIB)], 0, 105.0)
    assert start.loaded_bytes == 64 * MIB
    assert follower(weights_bytes=None).loaded_bytes is None


def test_many_bytes_written_before_the_weights_are_a_download():
    start = follower()
    assert start.follow([], [process(written=20 * MIB)], 0, 101.0)[0].startswith("downloading, 0 B of 64 MiB")
    start.follow([LOADING], [process(written=90 * MIB)], 0, 102.0)
    assert start.phase == "loading weights"


def test_the_remaining_time_comes_from_the_last_start():
    start = follower(last_phases={"starting": 10.0, "compiling": 20.0})
    assert start.remaining_s({"starting": 4.0}) == 26.0
    assert start.sentence(101.0) == "starting, 1 s so far (last time: 30 s)"
    assert follower().remaining_s({}) is None


ALL_REDUCES = "Using ['FLASHINFER', 'CUSTOM'] all-reduce backends (in dispatch order)"


@pytest.mark.parametrize("forbidden", [True, False])
def test_multicast_is_reported_only_if_it_must_stay_unused(forbidden):
    messages = follower(no_multicast=forbidden).follow([ALL_REDUCES], [], 0, 101.0)
    warning = "warning: NVLink multicast is off, but these all-reduce backends of vLLM may use it: FLASHINFER"
    assert messages == ([warning] if forbidden else [])


def test_backends_without_multicast_are_no_warning():
    assert all_reduce_sentence(["CUSTOM", "PYNCCL"]) == "all-reduce does not use NVLink multicast: CUSTOM, PYNCCL"
