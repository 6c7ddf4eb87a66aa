#!/usr/bin/env python3
"""What works on this machine's NVIDIA GPUs: ``make test-gpu``; at most some minutes, each step has its limit.

Line by line: NVML, faults that can be seen, what others hold of the GPUs, copies between them, a start by the plan, an
answer, the KV cache against the plan, a drain that empties the GPUs. The model is the tiny one of ``make run``, on
every GPU at once, so what is tried is the machine and not a model. Exit 0 when everything works, 1 otherwise, 2 where
there is no GPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import bench

from vllm_health import gpu_facts, gpu_faults, nvml
from vllm_launch.machine import p2p

MODEL = Path("var/tiny-chat")
TOLERANCE = 0.02
DRIVER_MIB = 256
"""What a driver may keep of a program that has gone, above what was in use before it."""
failed: list[str] = []


@contextlib.contextmanager
def step(what: str) -> Iterator[list[str]]:
    """One line: what, whether it works, and what was seen; a failure does not keep the next from being tried."""
    began, seen = time.monotonic(), list[str]()
    try:
        yield seen
        mark = "ok  "
    except Exception as error:  # noqa: BLE001 - told, and counted
        seen.append(str(error).strip() or repr(error))
        failed.append(what)
        mark = "FAIL"
    print(f"{mark} {what:32} {time.monotonic() - began:5.1f} s  {'; '.join(seen)}", flush=True)


def expect(condition: object, why: str) -> None:
    if not condition:
        raise RuntimeError(why)


def used(snapshot: gpu_facts.Snapshot) -> dict[int, int]:
    """MiB that are in use on each GPU."""
    return {one.index: one.memory.used >> 20 for one in snapshot.devices if one.memory}


def look() -> tuple[list[str], dict[int, int]]:
    """NVML's part; the UUIDs of the GPUs, and the MiB that are in use before anything of ours runs."""
    with nvml.open_nvml() as opened:
        snapshot = opened.snapshot()
        with step("GPUs (NVML)") as seen:
            seen.append(f"driver {snapshot.driver}")
            seen.extend(
                f"{one.index}: {one.name}, {(one.memory.total - (one.memory.reserved or 0)) / 2**30:.1f} GiB"
                for one in snapshot.devices
                if one.memory
            )
            expect(snapshot.devices and not snapshot.lost, f"lost: {snapshot.lost}")
        with step("faults can be seen") as seen:
            report = gpu_faults.Reader(opened).read()
            seen.append("Xid events" if opened.xid_events(range(opened.count())) else "no Xid events here")
            seen.append(f"ECC of {len(report.ecc)}, slowdowns of {len(report.slowdowns)} of {opened.count()} GPUs")
            expect(report.down is None, f"{report.down}")
        with step("memory that others hold") as seen:  # no fault: the plan takes what is left
            before = used(snapshot)
            seen.extend(f"GPU {index}: {size} MiB" for index, size in before.items())
        return [one.uuid for one in snapshot.devices], before


def emptied(before: dict[int, int], seconds: float = 10) -> None:
    """Until no GPU has more MiB in use than ``before``, but for what a driver keeps.

    Raises:
        RuntimeError: one has after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    with nvml.open_nvml() as opened:
        while left := [
            f"GPU {index} still holds {size} MiB, {before[index]} before"
            for index, size in used(opened.snapshot()).items()
            if index in before and size > before[index] + DRIVER_MIB
        ]:
            expect(time.monotonic() < deadline, "; ".join(left))
            time.sleep(0.5)


def copies(uuids: list[str], folder: Path) -> None:
    with step("copies between GPUs (P2P)") as seen:
        verdict = p2p.check(uuids, python=sys.executable, cache_dir=folder, boot_id="", driver=None, timeout_s=120)
        seen.append(verdict.why)
        expect(verdict.ok is not False, verdict.why)


def serve(folder: Path, gpus: int, before: dict[int, int]) -> None:
    """``before``: MiB that were in use on each GPU; as much, and a driver's own, may be in use afterwards."""
    log = folder / "log"
    command = [
        sys.executable, "-m", "vllm_launch", "serve", str(MODEL), "--served-model-name=shape",
        f"--port={bench.PORT}", f"--launch-health-port={bench.PORT + 1}", "--launch-drain-seconds=12",
        f"--launch-state-dir={folder}",
    ]  # fmt: skip
    with log.open("wb") as stream:
        launcher = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        with step("vLLM starts by its plan") as seen:
            deadline = time.monotonic() + 240
            while not (
                said := re.findall(
                    r"engine \d+: KV cache: ([\d,]+) tokens, planned ([\d,]+)", log.read_text(errors="replace")
                )
            ):
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                expect(launcher.poll() is None, f"it ended: {last}")
                expect(time.monotonic() < deadline, f"not within 240 s: {last}")
                time.sleep(0.5)
            seen.append(f"{len(said)} engine(s) on {gpus} GPU(s)")
        with step("an answer") as seen:
            answer = bench.ask(bench.PORT, {"prompt": "hi", "max_tokens": 16, "ignore_eos": True})
            tokens = answer["usage"]["completion_tokens"]
            seen.append(f"{tokens} tokens")
            expect(tokens == 16, f"{tokens} tokens instead of 16")  # noqa: PLR2004
        with step("KV cache as planned") as seen:
            for real, planned in ([int(word.replace(",", "")) for word in pair] for pair in said):
                seen.append(f"{real:,} tokens, planned {planned:,} ({real / planned - 1:+.2%})")
                expect(abs(real / planned - 1) <= TOLERANCE, "more than 2 % off")
            expect(said, "vLLM did not say")
        with step("a drain that empties the GPUs") as seen:
            launcher.send_signal(signal.SIGTERM)
            code = launcher.wait(40)
            seen.append(f"exit {code}")
            expect(code == 0, f"exit {code}")
            emptied(before)
    finally:
        launcher.kill()
        launcher.wait()
        if failed:
            print(log.read_text(errors="replace")[-3000:], file=sys.stderr)


def main() -> int:
    began = time.monotonic()
    try:
        uuids, before = look()
    except nvml.NvmlUnavailable as error:
        print(f"test-gpu: {error.what}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        if len(uuids) > 1:
            copies(uuids, Path(name))
        serve(Path(name), len(uuids), before)
    print(f"{'all works' if not failed else 'does not work: ' + ', '.join(failed)}, {time.monotonic() - began:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
