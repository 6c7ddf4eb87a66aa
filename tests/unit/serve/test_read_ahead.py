"""Reading weights into the page cache before vLLM reads them."""

import ctypes
import mmap
import os
import time
from pathlib import Path

import pytest
from builders import GIB

from vllm_launch.machine.cpu import Cpu
from vllm_launch.machine.gpus import Hardware
from vllm_launch.serve import read_ahead, serving
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings


def pages_in_memory(path: Path) -> int:
    """Return how many pages of a file are in memory, by mincore(2), without reading them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages)
        del start
        assert not failed
        return sum(page & 1 for page in pages)


@pytest.fixture
def weights(tmp_path):
    """Return a model's two weight files of 4 MiB each. No page of them is in memory."""
    (tmp_path / "config.json").write_text("{}")
    for number in (1, 2):
        path = tmp_path / f"model-{number:05}-of-00002.safetensors"
        with path.open("wb") as file:
            file.write(os.urandom(4 << 20))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert pages_in_memory(path) == 0, "this test needs its files on a disk, not in a tmpfs"
    return sorted(tmp_path.glob("*.safetensors"))


def test_files_that_fit_into_memory_are_read_ahead(weights):
    assert read_ahead.begin(weights, 11 << 20) == 8 << 20
    deadline = time.monotonic() + 20
    while sum(map(pages_in_memory, weights)) < (8 << 20) // mmap.PAGESIZE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_files_that_do_not_fit_are_not_read_ahead(weights):
    assert read_ahead.begin(weights, 9 << 20) == 0  # a fifth of the memory is for other uses
    time.sleep(0.3)
    assert sum(map(pages_in_memory, weights)) == 0


def test_missing_files_or_no_files_are_ignored(weights):
    assert read_ahead.begin([*weights, weights[0].with_name("gone")], GIB) == 0
    assert read_ahead.begin([], GIB) == 0


@pytest.mark.parametrize(
    ("words", "ahead"),
    [
        ("", 8 << 20),
        ("--load-format safetensors", 8 << 20),
        ("--load-format dummy", 0),
        ("--safetensors-load-strategy lazy", 0),
    ],
)
def test_only_vllms_own_way_through_the_page_cache_is_helped(weights, words, ahead):
    settings = read_settings(parse_flags([str(weights[0].parent), *words.split()]), {})
    machine = Hardware(
        gpus=(), cpu=Cpu(cores=1, memory_total=GIB, memory_limit=None, memory_available=GIB, numa_nodes=())
    )
    assert serving.read_weights_ahead(settings, machine) == ahead
    assert serving.read_weights_ahead(settings, Hardware(gpus=())) == 0
