#!/usr/bin/env python3
"""Test what works on this machine's NVIDIA GPUs: ``make test-gpu``. Takes at most a few minutes: each step has a limit.

Prints one line per step: NVML, GPU fault reporting, memory used by other programs, copies between GPUs, a start with
the plan, a completion, the KV cache against the plan, a drain that frees the GPUs. The model is the tiny one of ``make
run``, on every GPU at once, because this tests the machine and not a model. Exit code 0 if everything works, 1 if
something fails, 2 without a GPU.
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
"""Largest allowed difference between the planned and the real KV cache, as a share of the plan."""
DRIVER_MIB = 256
"""MiB that a driver may keep in use after a program has ended."""
failed: list[str] = []
"""Names of the failed steps."""


@contextlib.contextmanager
def step(name: str) -> Iterator[list[str]]:
    """Run one step and print its line: result, name, seconds, and the details that the step adds to the yielded list.

    After a failed step the next one still runs.
    """
    began, details = time.monotonic(), list[str]()
    try:
        yield details
        mark = "ok  "
    except Exception as error:  # noqa: BLE001 - the line shows it, and ``failed`` counts it
        details.append(str(error).strip() or repr(error))
        failed.append(name)
        mark = "FAIL"
    print(f"{mark} {name:32} {time.monotonic() - began:5.1f} s  {'; '.join(details)}", flush=True)


def expect(condition: object, why: str) -> None:
    if not condition:
        raise RuntimeError(why)


def used_mib(snapshot: gpu_facts.Snapshot) -> dict[int, int]:
    """Return the MiB in use on each GPU, by index."""
    return {device.index: device.memory.used >> 20 for device in snapshot.devices if device.memory}


def inspect_gpus() -> tuple[dict[int, str], dict[int, int]]:
    """Run the steps for NVML. Return the UUIDs of the GPUs and the MiB in use before vLLM starts, each by index."""
    with nvml.open_nvml() as opened:
        snapshot = opened.snapshot()
        with step("GPUs (NVML)") as details:
            details.append(f"driver {snapshot.driver}")
            details.extend(
                f"{device.index}: {device.name}, "
                f"{(device.memory.total - (device.memory.reserved or 0)) / 2**30:.1f} GiB"
                for device in snapshot.devices
                if device.memory
            )
            expect(snapshot.devices and not snapshot.lost, f"lost GPUs: {snapshot.lost}")
        with step("GPU fault reporting") as details:
            report = gpu_faults.Reader(opened).read()
            details.append(
                "Xid events" if opened.xid_events(range(opened.count())) else "no Xid events on this machine"
            )
            details.append(f"ECC of {len(report.ecc)}, slowdowns of {len(report.slowdowns)} of {opened.count()} GPUs")
            expect(report.down is None, f"{report.down}")
        with step("memory used by others") as details:  # never fails: the plan uses the free memory
            before = used_mib(snapshot)
            details.extend(f"GPU {index}: {size} MiB" for index, size in before.items())
        return {device.index: device.uuid for device in snapshot.devices}, before


def wait_until_freed(before: dict[int, int], seconds: float = 10) -> None:
    """Wait until no GPU has more than DRIVER_MIB in use above ``before``.

    Raises:
        RuntimeError: a GPU still has more in use after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    with nvml.open_nvml() as opened:
        while problems := [
            f"GPU {index} still has {size} MiB in use, {before[index]} MiB before the start"
            for index, size in used_mib(opened.snapshot()).items()
            if index in before and size > before[index] + DRIVER_MIB
        ]:
            expect(time.monotonic() < deadline, "; ".join(problems))
            time.sleep(0.5)


def check_copies(uuids: dict[int, str], folder: Path) -> None:
    with step("copies between GPUs (P2P)") as details:
        verdict = p2p.check(uuids, python=sys.executable, cache_dir=folder, boot_id="", driver=None, timeout_s=120)
        details.append(verdict.why)
        expect(verdict.ok is not False, verdict.why)


def serve(folder: Path, gpus: int, before: dict[int, int]) -> None:
    """Run the steps for a start, a completion, the KV cache and a drain.

    ``before``: the MiB in use on each GPU before the start.
    """
    log = folder / "log"
    command = [
        sys.executable, "-m", "vllm_launch", "serve", str(MODEL), "--served-model-name=shape",
        f"--port={bench.PORT}", f"--launch-health-port={bench.PORT + 1}", "--launch-drain-seconds=12",
        f"--launch-state-dir={folder}",
    ]  # fmt: skip
    with log.open("wb") as stream:
        launcher = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        with step("vLLM starts with the plan") as details:
            deadline = time.monotonic() + 240
            while not (
                caches := re.findall(
                    r"engine \d+: KV cache: ([\d,]+) tokens, planned ([\d,]+)", log.read_text(errors="replace")
                )
            ):
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                expect(launcher.poll() is None, f"the launcher ended: {last}")
                expect(time.monotonic() < deadline, f"not ready within 240 s: {last}")
                time.sleep(0.5)
            details.append(f"{len(caches)} engine(s) on {gpus} GPU(s)")
        with step("completion") as details:
            answer = bench.ask(bench.PORT, {"prompt": "hi", "max_tokens": 16, "ignore_eos": True})
            tokens = answer["usage"]["completion_tokens"]
            details.append(f"{tokens} tokens")
            expect(tokens == 16, f"{tokens} tokens instead of 16")  # noqa: PLR2004
        with step("KV cache as planned") as details:
            for real, planned in ([int(word.replace(",", "")) for word in pair] for pair in caches):
                details.append(f"{real:,} tokens, planned {planned:,} ({real / planned - 1:+.2%})")
                expect(abs(real / planned - 1) <= TOLERANCE, "differs by more than 2 %")
            expect(caches, "the launcher did not log the KV cache")
        with step("drain frees the GPUs") as details:
            launcher.send_signal(signal.SIGTERM)
            code = launcher.wait(40)
            details.append(f"exit code {code}")
            expect(code == 0, f"exit code {code}")
            wait_until_freed(before)
    finally:
        launcher.kill()
        launcher.wait()
        if failed:
            print(log.read_text(errors="replace")[-3000:], file=sys.stderr)


def main() -> int:
    began = time.monotonic()
    try:
        uuids, before = inspect_gpus()
    except nvml.NvmlUnavailable as error:
        print(f"test-gpu: {error.what}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        if len(uuids) > 1:
            check_copies(uuids, Path(name))
        serve(Path(name), len(uuids), before)
    print(f"{'everything works' if not failed else 'failed: ' + ', '.join(failed)}, {time.monotonic() - began:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
