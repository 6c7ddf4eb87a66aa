"""Tests of p2p with real child processes. Small programs simulate the probe, since no test machine has peer GPUs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.machine.p2p import Verdict, check, judge, read_boot_id

GPUS = {4: "GPU-a", 5: "GPU-b"}
COPYING = '{"event": "copying", "pair": [0, 1]}'
COPIED = '{"event": "copied", "pair": [0, 1], "ok": true}'
CORRUPT = '{"event": "copied", "pair": [0, 1], "ok": false}'
BACK = '{"event": "copying", "pair": [1, 0]}\n{"event": "copied", "pair": [1, 0], "ok": true}'
DONE = '{"event": "done"}'


class Probes:
    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"

    def check(self, program: str, *, gpus: dict[int, str] = GPUS, **changes: Any) -> Verdict:
        probe = self.folder / "probe.py"
        probe.write_text(f"import os, sys, time\nopen({str(self.folder / 'runs')!r}, 'a').write('x')\n{program}\n")
        settings: dict[str, Any] = {
            "python": sys.executable,
            "cache_dir": self.cache,
            "boot_id": "boot-1",
            "driver": "580.1",
            "timeout_s": 30.0,
        }
        return check(gpus, probe=probe, **{**settings, **changes})

    @property
    def runs(self) -> int:
        return len((self.folder / "runs").read_text()) if (self.folder / "runs").exists() else 0


def prints(*lines: str) -> str:
    return f"print({chr(10).join(lines)!r}, flush=True)"


ALL_COPIED = prints(COPYING, COPIED, BACK, DONE)
ONE_CORRUPT = prints(COPYING, CORRUPT, BACK, DONE)
NO_TORCH = prints('{"event": "unknown", "why": "torch cannot be loaded (No module)"}')


@pytest.fixture
def probes(tmp_path: Path) -> Probes:
    return Probes(tmp_path)


def test_copies_that_arrive_leave_p2p_on(probes: Probes) -> None:
    verdict = probes.check(ALL_COPIED)
    assert (verdict.ok, verdict.why, verdict.cached) == (True, "all 2 P2P copies arrived", False)
    assert verdict.seconds > 0


def test_a_copy_that_delivers_wrong_data_turns_p2p_off(probes: Probes) -> None:
    verdict = probes.check(ONE_CORRUPT)
    assert verdict.ok is False
    assert verdict.pairs_failed == ((4, 5),)
    assert verdict.why.startswith("a P2P copy (from GPU 4 to GPU 5) delivered wrong data, so P2P is turned off. ")


def test_a_copy_that_hangs_turns_p2p_off_and_the_probes_process_group_is_killed(probes: Probes) -> None:
    pids = probes.folder / "pids"
    program = (
        f"{prints(COPYING)}\nchild = os.fork()\n"
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\ntime.sleep(600) if child else time.sleep(600)"
    )
    verdict = probes.check(program, timeout_s=2.0)
    assert verdict.ok is False
    assert "hung" in verdict.why
    written = [int(pid) for pid in pids.read_text().split()]
    assert len(written) == 2
    assert have_ended(written)


def have_ended(pids: list[int]) -> bool:
    for _ in range(500):
        if all(state(pid) in ("", "Z") for pid in pids):
            return True
        time.sleep(0.01)
    return False


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_a_crash_during_a_copy_turns_p2p_off(probes: Probes) -> None:
    verdict = probes.check(f"{prints(COPYING)}\nos.abort()")
    assert verdict.ok is False
    assert "status -6" in verdict.why


def test_after_a_crash_before_any_copy_p2p_is_unknown_and_stderr_is_quoted(probes: Probes) -> None:
    verdict = probes.check("sys.exit('CUDA driver initialization failed')")
    assert verdict.ok is None
    assert verdict.why == (
        "P2P copies between GPUs could not be tested: "
        "the test exited with status 1 without a result (CUDA driver initialization failed). P2P stays on"
    )


def test_after_a_hang_before_any_copy_p2p_is_unknown(probes: Probes) -> None:
    verdict = probes.check("time.sleep(600)", timeout_s=0.5)
    assert verdict.ok is None
    assert "the test did not finish in time. P2P stays on" in verdict.why


def test_without_torch_p2p_is_unknown_and_the_probe_runs_again(probes: Probes) -> None:
    assert "torch cannot be loaded" in probes.check(NO_TORCH).why
    assert probes.check(ALL_COPIED).ok is True


def test_without_an_interpreter_p2p_is_unknown(probes: Probes) -> None:
    verdict = probes.check(ALL_COPIED, python="/nonexistent/python")
    assert verdict.ok is None
    assert "/nonexistent/python" in verdict.why


def test_one_gpu_needs_no_probe(probes: Probes) -> None:
    assert probes.check(ONE_CORRUPT, gpus={4: "GPU-a"}).ok is True
    assert probes.runs == 0


def test_the_probe_sees_only_these_gpus_and_not_our_modules(probes: Probes) -> None:
    (probes.folder / "memory.py").write_text("raise SystemExit('shadowed')")
    program = (
        "try:\n    import memory\nexcept ImportError:\n    pass\n"
        "values = os.environ['CUDA_VISIBLE_DEVICES'], os.environ['HOME']\n"
        'print(\'{"event": "unknown", "why": "\' + \' \'.join(values) + \'"}\')'
    )
    verdict = probes.check(program, environ={"HOME": "/h", "CUDA_VISIBLE_DEVICES": "7"})
    assert "GPU-a,GPU-b /h" in verdict.why


@pytest.mark.parametrize(("program", "ok"), [(ALL_COPIED, True), (ONE_CORRUPT, False)])
def test_a_verdict_is_cached_until_the_next_boot(probes: Probes, program: str, *, ok: bool) -> None:
    first = probes.check(program)
    again = probes.check("sys.exit('must not run')")
    assert probes.runs == 1
    assert again.cached
    assert (again.ok, again.why, again.pairs_failed) == (first.ok, first.why, first.pairs_failed)
    assert again.ok is ok
    assert probes.check(ALL_COPIED, boot_id="boot-2").cached is False


@pytest.mark.parametrize(
    "change",
    [
        {"driver": "595.1"},
        {"driver": None},
        {"gpus": {4: "GPU-a", 5: "GPU-c"}},
        {"gpus": {0: "GPU-a", 1: "GPU-b"}},  # another container numbers the same GPUs differently
    ],
)
def test_the_probe_runs_again_for_another_driver_or_other_gpus(probes: Probes, change: dict[str, Any]) -> None:
    probes.check(ONE_CORRUPT)
    assert probes.check(ALL_COPIED, **change).ok is True
    assert probes.check("", **change).cached
    assert probes.check("").ok is False


def test_without_a_boot_id_nothing_is_cached(probes: Probes) -> None:
    probes.check(ALL_COPIED, boot_id="")
    assert probes.check(ONE_CORRUPT, boot_id="").ok is False
    assert not probes.cache.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b'{"boot_id": "boot-1"}', b'{"boot_id": "boot-1", "verdicts": 3}', b"[" * 100_000],
)
def test_a_corrupt_cache_is_ignored_and_replaced(probes: Probes, content: bytes) -> None:
    probes.cache.mkdir()
    (probes.cache / "p2p.json").write_bytes(content)
    assert probes.check(ALL_COPIED).cached is False
    assert probes.check(ONE_CORRUPT).cached is True


def test_a_cache_that_cannot_be_written_is_ignored(probes: Probes) -> None:
    probes.cache.write_text("a file where the folder should be")
    assert probes.check(ALL_COPIED).ok is True
    assert probes.check(ONE_CORRUPT).ok is False


def test_writing_the_cache_leaves_no_other_file(probes: Probes) -> None:
    probes.check(ALL_COPIED)
    assert [file.name for file in probes.cache.iterdir()] == ["p2p.json"]


@pytest.mark.parametrize(
    ("output", "status", "ok", "pairs_failed"),
    [
        (DONE, 0, True, ()),
        (f"[W] a library's line\n{COPYING}\n{COPIED}\n{DONE}", 0, True, ()),
        (f"{COPYING}\n{COPIED}", 0, None, ()),  # the probe ended without the done event
        (f"{COPYING}\n{COPIED}\n{DONE}", 1, None, ()),
        (f"{COPYING}\n{COPIED}\n{DONE}", None, None, ()),  # every copy arrived, but the probe did not exit
        (f"{COPYING}\n{COPIED}", None, None, ()),
        (f"{COPYING}\n{CORRUPT}", None, False, ((4, 5),)),
        (f"{COPYING}\n{CORRUPT}\n{BACK}\n{DONE}", 0, False, ((4, 5),)),
        (COPYING, None, False, ((4, 5),)),
        (COPYING, -11, False, ((4, 5),)),
        ("", None, None, ()),
        ("", 0, None, ()),
        ('{"event": "copied"}', 0, None, ()),
        ('{"event": "copied", "pair": [0, 2], "ok": false}', 0, None, ()),  # no such GPU
    ],
)
def test_the_verdict_follows_from_the_probes_output(
    output: str, status: int | None, *, ok: bool | None, pairs_failed: tuple[tuple[int, int], ...]
) -> None:
    verdict = judge(output, [4, 5], status=status)
    assert (verdict.ok, verdict.pairs_failed) == (ok, pairs_failed)


def test_every_failed_copy_is_named() -> None:
    back = CORRUPT.replace("[0, 1]", "[1, 0]")
    verdict = judge(f"{COPYING}\n{CORRUPT}\n{back}\n{DONE}", [4, 5], status=0)
    assert verdict.why.startswith("P2P copies (from GPU 4 to GPU 5, from GPU 5 to GPU 4) delivered wrong data, ")


def test_without_peers_no_copy_is_needed() -> None:
    assert judge(DONE, [4, 5], status=0).why == "CUDA reports no P2P between any two of these GPUs"


@given(st.text() | st.lists(st.sampled_from([COPYING, COPIED, CORRUPT, BACK, DONE, "noise"])).map("\n".join))
def test_any_output_gives_a_one_line_verdict_and_ok_needs_the_done_event(output: str) -> None:
    verdict = judge(output, [4, 5], status=0, stderr=output)
    assert len(verdict.why.splitlines()) == 1
    assert verdict.ok is not True or "done" in output
    assert (CORRUPT in output.splitlines()) <= (verdict.ok is False)


def test_the_boot_id_comes_from_proc(tmp_path: Path) -> None:
    file = tmp_path / "proc/sys/kernel/random/boot_id"
    file.parent.mkdir(parents=True)
    file.write_text("6b1e\n")
    assert read_boot_id(tmp_path) == "6b1e"
    assert read_boot_id(tmp_path / "elsewhere") == ""
