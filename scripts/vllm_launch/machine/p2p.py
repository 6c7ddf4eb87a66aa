"""Tests P2P copies between all GPUs of a plan. Runs once per boot, in a child process.

NVML and CUDA only report what should work. With ACS or an IOMMU enabled, and in some virtual machines, a P2P copy
hangs or delivers wrong data (vllm-project/vllm#8087, #9920, #51513). vLLM trusts CUDA: VLLM_SKIP_P2P_CHECK defaults
to 1 (vllm/envs.py). So the launcher tests the copies. Only a failed copy turns P2P off. P2P stays on if the copies
could not be tested.
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
    """The result of testing P2P copies.

    ``ok`` True: every P2P copy arrived. False: turn P2P off. None: unknown, change nothing. ``why`` is a sentence
    for the operator. ``pairs_failed`` has (from, to) of each failed copy, as nvidia-smi's indices.
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
    verdicts: dict[str, Verdict]  # by driver, and by the GPUs' indices and UUIDs


def read_boot_id(root: Path = Path("/")) -> str:
    """Return the kernel's random ID of this boot, or "" if there is none. Without an ID nothing is cached."""
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def check(
    gpus: Mapping[int, str],
    *,
    python: str,
    cache_dir: Path,
    boot_id: str,
    driver: str | None,
    timeout_s: float,
    environ: Mapping[str, str] | None = None,
    probe: Path = PROBE,
) -> Verdict:
    """Test P2P copies between ``gpus``: take the result from the cache, or run ``probe`` with ``python``.

    ``gpus``: UUIDs by nvidia-smi's index. ``python`` is an interpreter that has torch. The cache only keeps results
    whose ``ok`` is True or False.
    Never raises. A cache that cannot be read or written is ignored. If the probe cannot be started, ``ok`` is None.
    """
    if len(gpus) < 2:  # noqa: PLR2004  a pair
        return Verdict(ok=True, why="one GPU needs no peer")
    # The indices belong to the key because ``why`` names them. Two containers may number the same GPUs differently.
    key = " ".join([driver or "?", *(f"{index}={uuid}" for index, uuid in gpus.items())])
    cache = cache_dir / _CACHE_FILE
    verdicts = _read_cache(cache, boot_id)
    if key in verdicts:
        return msgspec.structs.replace(verdicts[key], cached=True)
    verdict = _run(
        gpus, python=python, timeout_s=timeout_s, environ=os.environ if environ is None else environ, probe=probe
    )
    if verdict.ok is not None and boot_id:
        _write_cache(cache, _Cache(boot_id=boot_id, verdicts={**verdicts, key: verdict}))
    return verdict


def judge(output: str, indices: Sequence[int], *, status: int | None, stderr: str = "") -> Verdict:
    """Return the verdict for a probe's output. ``status``: its exit status, negative for a signal, None if it hung.

    ``indices``: nvidia-smi's index of each GPU, in the order in which the probe sees the GPUs. A hang or crash turns
    P2P off only if a copy was running. Before the first copy, it means that torch or CUDA did not start.
    """
    copied: dict[tuple[int, int], bool] = {}
    copying: tuple[int, int] | None = None
    unknown, done = "", False
    for line in output.splitlines():
        try:
            message = msgspec.json.decode(line, type=_Line)
        except msgspec.DecodeError:
            continue  # libraries print on stdout too
        pair = _by_index(message.pair, indices)
        if message.event == "copying":
            copying = pair
        elif message.event == "copied" and pair is not None:
            copied[pair] = message.ok and copied.get(pair, True)
            copying = None
        elif message.event == "unknown":
            unknown = message.why
        done = done or message.event == "done"
    if failed := tuple(pair for pair, ok in copied.items() if not ok):
        return Verdict(ok=False, why=_p2p_off(failed, "delivered wrong data"), pairs_failed=failed)
    if copying is not None:
        failure = "hung" if status is None else f"killed the process that copied (status {status})"
        return Verdict(ok=False, why=_p2p_off((copying,), failure), pairs_failed=(copying,))
    if done and status == 0:
        why = f"all {len(copied)} P2P copies arrived" if copied else "CUDA reports no P2P between any two of these GPUs"
        return Verdict(ok=True, why=why)
    end = "did not finish in time" if status is None else f"exited with status {status} without a result"
    last = " ".join(stderr.split())[-_STDERR_TAIL:]
    why = unknown or f"the test {end}" + (f" ({last})" if last else "")
    return Verdict(ok=None, why=f"P2P copies between GPUs could not be tested: {why}. P2P stays on")


def _by_index(pair: tuple[int, int] | None, indices: Sequence[int]) -> tuple[int, int] | None:
    """Return nvidia-smi's indices of ``pair``, which is positions in ``indices``. None if there is no such GPU."""
    if pair is None or not all(0 <= place < len(indices) for place in pair):
        return None
    return indices[pair[0]], indices[pair[1]]


def _p2p_off(pairs: tuple[tuple[int, int], ...], failure: str) -> str:
    """Return the sentence for the operator: which copy failed, how, and what to do."""
    copies = "a P2P copy" if len(pairs) == 1 else "P2P copies"
    between = ", ".join(f"from GPU {source} to GPU {target}" for source, target in pairs)
    return (
        f"{copies} ({between}) {failure}, so P2P is turned off. To use P2P, disable ACS on the PCIe switches and the"
        " IOMMU in the BIOS, and reboot (NVIDIA NCCL documentation, Troubleshooting, PCI Access Control Services)"
    )


def _run(gpus: Mapping[int, str], *, python: str, timeout_s: float, environ: Mapping[str, str], probe: Path) -> Verdict:
    indices = list(gpus)
    started = time.monotonic()
    # Files, not pipes: the output can still be read if the child hangs in a driver call and cannot be killed.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            child = subprocess.Popen(
                # -P: modules in the probe's folder must not shadow modules that torch imports.
                [python, "-P", str(probe)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus.values())},
                start_new_session=True,
            )
        except OSError as error:
            return judge("", indices, status=127, stderr=f"{python}: {error.strerror}")
        try:
            status: int | None = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _kill(child)
        out.seek(0)
        err.seek(0)
        output, errors = (file.read().decode(errors="replace") for file in (out, err))
    verdict = judge(output, indices, status=status, stderr=errors)
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
