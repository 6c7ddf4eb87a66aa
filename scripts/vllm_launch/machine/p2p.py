"""Tests copies between the GPUs of a replica in a child process, once per boot.

NVML and CUDA only report what should work. With ACS or an IOMMU enabled, and in some virtual machines, a peer copy
hangs or delivers wrong data (vllm-project/vllm#8087, #9920, #51513). vLLM trusts CUDA: VLLM_SKIP_P2P_CHECK defaults
to 1 (vllm/envs.py). So the launcher tries the copies. Only a failed copy turns P2P off. P2P stays on if the copies
could not be tried.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

PROBE = Path(__file__).with_name("p2p_probe.py")
_CACHE_FILE = "p2p.json"
_KILL_GRACE_S = 5.0  # longest wait after SIGKILL, which cannot end a child in an uninterruptible driver call
_STDERR_TAIL = 300  # characters of the end of the child's stderr that a warning quotes


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The result of testing peer copies.

    ``ok`` True: every peer copy arrived. False: turn P2P off. None: unknown, change nothing. ``why`` is a sentence
    for the operator. ``pairs_failed`` has (from, to) of each failed copy, as positions in the tested GPUs.
    """

    ok: bool | None
    why: str
    pairs_failed: tuple[tuple[int, int], ...] = ()
    seconds: float = 0.0  # duration of the probe, 0 if it did not run
    cached: bool = False  # from an earlier run in this boot


class _Line(msgspec.Struct):
    event: str
    pair: tuple[int, int] | None = None
    ok: bool = False
    why: str = ""


class _Cache(msgspec.Struct):
    boot_id: str
    verdicts: dict[str, Verdict]  # by driver and GPUs


def read_boot_id(root: Path = Path("/")) -> str:
    """Return the kernel's random ID of this boot, or "" if there is none. Without an ID nothing is cached."""
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def check(
    gpus: Sequence[str],
    *,
    python: str,
    cache_dir: Path,
    boot_id: str,
    driver: str | None,
    timeout_s: float,
    environ: Mapping[str, str] | None = None,
    probe: Path = PROBE,
) -> Verdict:
    """Test peer copies between ``gpus`` (UUIDs): take the result from the cache, or run ``probe`` with ``python``.

    ``python`` is an interpreter that has torch. The cache only keeps results whose ``ok`` is True or False.
    Never raises. A cache that cannot be read or written is ignored. If the probe cannot be started, ``ok`` is None.
    """
    if len(gpus) < 2:  # noqa: PLR2004  a pair
        return Verdict(ok=True, why="one GPU needs no peer")
    cache, key = cache_dir / _CACHE_FILE, " ".join([driver or "?", *gpus])
    verdicts = _read_cache(cache, boot_id)
    if key in verdicts:
        return msgspec.structs.replace(verdicts[key], cached=True)
    verdict = _run(
        gpus, python=python, timeout_s=timeout_s, environ=os.environ if environ is None else environ, probe=probe
    )
    if verdict.ok is not None and boot_id:
        _write_cache(cache, _Cache(boot_id=boot_id, verdicts={**verdicts, key: verdict}))
    return verdict


def judge(output: str, *, status: int | None, stderr: str = "") -> Verdict:
    """Return the verdict for a probe's output. ``status``: its exit status, negative for a signal, None if it hung.

    A hang or crash turns P2P off only if a copy was running. Before the first copy, it means that torch or CUDA did
    not start.
    """
    copied: dict[tuple[int, int], bool] = {}
    copying: tuple[int, int] | None = None
    unknown, done = "", False
    for line in output.splitlines():
        try:
            message = msgspec.json.decode(line, type=_Line)
        except msgspec.DecodeError:
            continue  # libraries print on stdout too
        if message.event == "copying":
            copying = message.pair
        elif message.event == "copied" and message.pair is not None:
            copied[message.pair] = message.ok and copied.get(message.pair, True)
            copying = None
        elif message.event == "unknown":
            unknown = message.why
        done = done or message.event == "done"
    end = "did not finish in time" if status is None else f"ended with status {status}"
    if failed := tuple(pair for pair, ok in copied.items() if not ok):
        return Verdict(ok=False, why=_p2p_off(failed, "delivered wrong data"), pairs_failed=failed)
    if copying is not None:
        failure = "hung" if status is None else f"killed the process that copied (status {status})"
        return Verdict(ok=False, why=_p2p_off((copying,), failure), pairs_failed=(copying,))
    if done and status == 0:
        why = f"all {len(copied)} peer copies arrived" if copied else "CUDA reports that no two of these GPUs are peers"
        return Verdict(ok=True, why=why)
    last = " ".join(stderr.split())[-_STDERR_TAIL:]
    why = unknown or f"the probe {end} before it had a result" + (f" ({last})" if last else "")
    return Verdict(ok=None, why=f"peer copies between GPUs could not be tried: {why}; P2P stays on")


def _p2p_off(pairs: tuple[tuple[int, int], ...], failure: str) -> str:
    """Return the sentence for the operator: which copy failed, how, and what to do."""
    between = ", ".join(f"{source} to {target}" for source, target in pairs)
    return (
        f"a copy between GPUs ({between}) {failure}, so P2P is turned off: to use it again, disable ACS on the PCIe"
        " switches and the IOMMU in the BIOS (NVIDIA NCCL documentation, Troubleshooting, PCI Access Control Services)"
    )


def _run(gpus: Sequence[str], *, python: str, timeout_s: float, environ: Mapping[str, str], probe: Path) -> Verdict:
    started = time.monotonic()
    # Files, not pipes: the output can still be read if the child hangs in a driver call and cannot be killed.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            child = subprocess.Popen(
                [python, "-P", str(probe)],  # -P: modules in the probe's folder must not shadow those torch imports
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)},
                start_new_session=True,
            )
        except OSError as error:
            return judge("", status=127, stderr=f"{python}: {error.strerror}")
        try:
            status: int | None = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _kill(child)
        out.seek(0)
        err.seek(0)
        verdict = judge(out.read().decode(errors="replace"), status=status, stderr=err.read().decode(errors="replace"))
    return msgspec.structs.replace(verdict, seconds=round(time.monotonic() - started, 3))


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and its process group if the child is still running."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_KILL_GRACE_S)


def _read_cache(path: Path, boot_id: str) -> dict[str, Verdict]:
    try:
        cache = msgspec.json.decode(path.read_bytes(), type=_Cache)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return cache.verdicts if boot_id and cache.boot_id == boot_id else {}


def _write_cache(path: Path, cache: _Cache) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(msgspec.json.encode(cache))
        Path(file.name).replace(path)  # atomic: a reader sees either the old file or the new one
