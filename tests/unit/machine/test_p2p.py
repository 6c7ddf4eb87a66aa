"""The parent's side with real child processes: small programs that stand for the probe, as no machine here has peers."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.machine.p2p import Verdict, check, judge, read_boot_id

UUIDS = ["GPU-a", "GPU-b"]
COPYING = '{"event": "copying", "pair": [0, 1]}'
COPIED = '{"event": "copied", "pair": [0, 1], "ok": true}'
CORRUPT = '{"event": "copied", "pair": [0, 1], "ok": false}'
BACK = '{"event": "copying", "pair": [1, 0]}\n{"event": "copied", "pair": [1, 0], "ok": true}'
DONE = '{"event": "done"}'


class Probes:
    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"

    def check(self, program: str, *, gpus: list[str] = UUIDS, **changes: Any) -> Verdict:
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


def says(*lines: str) -> str:
    return f"print({chr(10).join(lines)!r}, flush=True)"


GOOD = says(COPYING, COPIED, BACK, DONE)
LYING = says(COPYING, CORRUPT, BACK, DONE)
MUTE = says('{"event": "unknown", "why": "torch cannot be loaded (No module)"}')


@pytest.fixture
def probes(tmp_path: Path) -> Probes:
    return Probes(tmp_path)


def test_copies_that_arrive_leave_p2p_on(probes: Probes) -> None:
    verdict = probes.check(GOOD)
    assert (verdict.ok, verdict.why, verdict.cached) == (True, "all 2 peer copies arrived", False)
    assert verdict.seconds > 0


def test_a_copy_that_brings_other_bytes_turns_p2p_off(probes: Probes) -> None:
    verdict = probes.check(LYING)
    assert verdict.ok is False
    assert verdict.pairs_failed == ((0, 1),)
    assert "0 to 1" in verdict.why
    assert "other bytes" in verdict.why


def test_a_copy_that_hangs_turns_p2p_off_and_the_probe_is_ended_with_its_children(probes: Probes) -> None:
    pids = probes.folder / "pids"
    program = (
        f"{says(COPYING)}\nchild = os.fork()\n"
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\ntime.sleep(600) if child else time.sleep(600)"
    )
    verdict = probes.check(program, timeout_s=2.0)
    assert verdict.ok is False
    assert "hung" in verdict.why
    written = [int(pid) for pid in pids.read_text().split()]
    assert len(written) == 2
    assert gone(written)


def gone(pids: list[int]) -> bool:
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
    verdict = probes.check(f"{says(COPYING)}\nos.abort()")
    assert verdict.ok is False
    assert "status -6" in verdict.why


def test_a_crash_before_any_copy_is_no_verdict_and_quotes_the_last_words(probes: Probes) -> None:
    verdict = probes.check("sys.exit('CUDA driver initialization failed')")
    assert verdict.ok is None
    assert "CUDA driver initialization failed" in verdict.why
    assert "status 1" in verdict.why


def test_a_hang_before_any_copy_is_no_verdict(probes: Probes) -> None:
    verdict = probes.check("time.sleep(600)", timeout_s=0.5)
    assert verdict.ok is None
    assert "did not finish in time" in verdict.why


def test_missing_torch_is_no_verdict_and_is_asked_again(probes: Probes) -> None:
    assert "torch cannot be loaded" in probes.check(MUTE).why
    assert probes.check(GOOD).ok is True


def test_a_missing_interpreter_is_no_verdict(probes: Probes) -> None:
    verdict = probes.check(GOOD, python="/nonexistent/python")
    assert verdict.ok is None
    assert "/nonexistent/python" in verdict.why


def test_one_gpu_needs_no_probe(probes: Probes) -> None:
    assert probes.check(LYING, gpus=["GPU-a"]).ok is True
    assert probes.runs == 0


def test_the_probe_sees_these_gpus_alone_and_not_our_modules(probes: Probes) -> None:
    (probes.folder / "memory.py").write_text("raise SystemExit('shadowed')")
    program = (
        "try:\n    import memory\nexcept ImportError:\n    pass\n"
        "seen = os.environ['CUDA_VISIBLE_DEVICES'], os.environ['HOME']\n"
        'print(\'{"event": "unknown", "why": "\' + \' \'.join(seen) + \'"}\')'
    )
    verdict = probes.check(program, environ={"HOME": "/h", "CUDA_VISIBLE_DEVICES": "7"})
    assert "GPU-a,GPU-b /h" in verdict.why


@pytest.mark.parametrize(("program", "ok"), [(GOOD, True), (LYING, False)])
def test_a_verdict_holds_until_the_next_boot(probes: Probes, program: str, *, ok: bool) -> None:
    first = probes.check(program)
    again = probes.check("sys.exit('must not run')")
    assert probes.runs == 1
    assert again.cached
    assert (again.ok, again.why, again.pairs_failed) == (first.ok, first.why, first.pairs_failed)
    assert again.ok is ok
    assert probes.check(GOOD, boot_id="boot-2").cached is False


@pytest.mark.parametrize("change", [{"driver": "595.1"}, {"driver": None}, {"gpus": ["GPU-a", "GPU-c"]}])
def test_another_driver_or_other_gpus_are_tried_anew(probes: Probes, change: dict[str, Any]) -> None:
    probes.check(LYING)
    assert probes.check(GOOD, **change).ok is True
    assert probes.check("", **change).cached
    assert probes.check("").ok is False


def test_without_a_boot_id_nothing_is_cached(probes: Probes) -> None:
    probes.check(GOOD, boot_id="")
    assert probes.check(LYING, boot_id="").ok is False
    assert not probes.cache.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b'{"boot_id": "boot-1"}', b'{"boot_id": "boot-1", "verdicts": 3}', b"[" * 100_000],
)
def test_a_corrupt_cache_is_as_none_and_is_mended(probes: Probes, content: bytes) -> None:
    probes.cache.mkdir()
    (probes.cache / "p2p.json").write_bytes(content)
    assert probes.check(GOOD).cached is False
    assert probes.check(LYING).cached is True


def test_a_cache_that_cannot_be_written_is_no_error(probes: Probes) -> None:
    probes.cache.write_text("a file where the folder should be")
    assert probes.check(GOOD).ok is True
    assert probes.check(LYING).ok is False


def test_writing_the_cache_leaves_no_other_file(probes: Probes) -> None:
    probes.check(GOOD)
    assert [file.name for file in probes.cache.iterdir()] == ["p2p.json"]


@pytest.mark.parametrize(
    ("output", "status", "ok", "pairs_failed"),
    [
        (DONE, 0, True, ()),
        (f"[W] a library's line\n{COPYING}\n{COPIED}\n{DONE}", 0, True, ()),
        (f"{COPYING}\n{COPIED}", 0, None, ()),  # it ended without having said that it was done
        (f"{COPYING}\n{COPIED}\n{DONE}", 1, None, ()),
        (f"{COPYING}\n{COPIED}\n{DONE}", None, None, ()),  # every copy arrived; its own end hung
        (f"{COPYING}\n{COPIED}", None, None, ()),
        (f"{COPYING}\n{CORRUPT}", None, False, ((0, 1),)),
        (f"{COPYING}\n{CORRUPT}\n{BACK}\n{DONE}", 0, False, ((0, 1),)),
        (COPYING, None, False, ((0, 1),)),
        (COPYING, -11, False, ((0, 1),)),
        ("", None, None, ()),
        ("", 0, None, ()),
        ('{"event": "copied"}', 0, None, ()),
    ],
)
def test_what_a_probe_said_is_judged(
    output: str, status: int | None, *, ok: bool | None, pairs_failed: tuple[tuple[int, int], ...]
) -> None:
    verdict = judge(output, status=status)
    assert (verdict.ok, verdict.pairs_failed) == (ok, pairs_failed)


def test_gpus_that_are_no_peers_need_no_copy() -> None:
    assert "no two of these GPUs peers" in judge(DONE, status=0).why


@given(st.text() | st.lists(st.sampled_from([COPYING, COPIED, CORRUPT, BACK, DONE, "noise"])).map("\n".join))
def test_any_output_gets_a_verdict_of_one_line_and_good_news_needs_the_end(output: str) -> None:
    verdict = judge(output, status=0, stderr=output)
    assert len(verdict.why.splitlines()) == 1
    assert verdict.ok is not True or "done" in output
    assert (CORRUPT in output.splitlines()) <= (verdict.ok is False)


def test_the_boot_id_is_the_kernels(tmp_path: Path) -> None:
    file = tmp_path / "proc/sys/kernel/random/boot_id"
    file.parent.mkdir(parents=True)
    file.write_text("6b1e\n")
    assert read_boot_id(tmp_path) == "6b1e"
    assert read_boot_id(tmp_path / "elsewhere") == ""
