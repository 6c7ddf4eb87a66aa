"""Do copies between the GPUs of a replica arrive? Asked of a child process, once per boot.

NVML and CUDA say what should work. With ACS or an IOMMU in the way, or in some virtual machines, a peer copy hangs or
brings other bytes (vllm-project/vllm#8087, #9920, #51513), and vLLM trusts CUDA: VLLM_SKIP_P2P_CHECK defaults to 1
(vllm/envs.py). So the copy is tried, and only a failure turns P2P off; what could not be tried stays as it is.
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
_KILL_GRACE_S = 5.0  # a child in an uninterruptible driver call outlives SIGKILL; it must not hold us up
_STDERR_TAIL = 300  # characters of the child's last words that a warning quotes


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """``ok`` True: every peer copy arrived. False: turn P2P off. None: nobody knows, leave everything as it is.

    ``why`` is a sentence for the operator. ``pairs_failed`` holds (from, to) as places in the GPUs that were given.
    """

    ok: bool | None
    why: str
    pairs_failed: tuple[tuple[int, int], ...] = ()
    seconds: float = 0.0  # that the probe took, when it ran
    cached: bool = False


class _Line(msgspec.Struct):
    event: str
    pair: tuple[int, int] | None = None
    ok: bool = False
    why: str = ""


class _Cache(msgspec.Struct):
    boot_id: str
    verdicts: dict[str, Verdict]  # by driver and GPUs


def read_boot_id(root: Path = Path("/")) -> str:
    """The kernel's random name for this boot; "" where there is none, and then nothing is cached."""
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
    """Whether peer copies between ``gpus`` (UUIDs) work, from the cache or by running ``probe`` with ``python``.

    ``python`` is the interpreter that has torch. Only what was found out is cached, never None. Never raises: a cache
    that cannot be read or written is as none, a probe that cannot be started is as one that knows nothing.
    """
    if len(gpus) < 2:  # noqa: PLR2004  a pair
        return Verdict(ok=True, why="one GPU needs no peer")
    cache, key = cache_dir / _CACHE_FILE, " ".join([driver or "?", *gpus])
    known = _read_cache(cache, boot_id)
    if key in known:
        return msgspec.structs.replace(known[key], cached=True)
    verdict = _run(
        gpus, python=python, timeout_s=timeout_s, environ=os.environ if environ is None else environ, probe=probe
    )
    if verdict.ok is not None and boot_id:
        _write_cache(cache, _Cache(boot_id=boot_id, verdicts={**known, key: verdict}))
    return verdict


def judge(output: str, *, status: int | None, stderr: str = "") -> Verdict:
    """What a probe's output means. ``status`` is its exit status, negative for a signal, None when it hung.

    A hang or crash counts against P2P only while a copy was under way: before that, torch or CUDA failed to start.
    """
    copied: dict[tuple[int, int], bool] = {}
    copying: tuple[int, int] | None = None
    unknown, done = "", False
    for line in output.splitlines():
        try:
            said = msgspec.json.decode(line, type=_Line)
        except msgspec.DecodeError:
            continue  # libraries print on stdout too
        if said.event == "copying":
            copying = said.pair
        elif said.event == "copied" and said.pair is not None:
            copied[said.pair] = said.ok and copied.get(said.pair, True)
            copying = None
        elif said.event == "unknown":
            unknown = said.why
        done = done or said.event == "done"
    end = "did not finish in time" if status is None else f"ended with status {status}"
    if failed := tuple(pair for pair, ok in copied.items() if not ok):
        return Verdict(ok=False, why=_off(failed, "brought other bytes than were sent"), pairs_failed=failed)
    if copying is not None:
        what = "hung" if status is None else f"killed the process that made it (status {status})"
        return Verdict(ok=False, why=_off((copying,), what), pairs_failed=(copying,))
    if done and status == 0:
        pairs = f"all {len(copied)} peer copies arrived" if copied else "CUDA calls no two of these GPUs peers"
        return Verdict(ok=True, why=pairs)
    last = " ".join(stderr.split())[-_STDERR_TAIL:]
    why = unknown or f"the probe {end} before it knew" + (f" ({last})" if last else "")
    return Verdict(ok=None, why=f"peer copies between GPUs could not be tried: {why}; P2P stays on")


def _off(pairs: tuple[tuple[int, int], ...], what: str) -> str:
    between = ", ".join(f"{source} to {target}" for source, target in pairs)
    return (
        f"a copy between GPUs ({between}) {what}, so P2P is turned off: switch off ACS on the PCIe switches and the"
        " IOMMU in the BIOS (NVIDIA NCCL documentation, Troubleshooting, PCI Access Control Services) to have it back"
    )


def _run(gpus: Sequence[str], *, python: str, timeout_s: float, environ: Mapping[str, str], probe: Path) -> Verdict:
    started = time.monotonic()
    # Files, not pipes: what the child wrote is still there when it had to be left behind in a driver call.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            child = subprocess.Popen(
                [python, "-P", str(probe)],  # -P: our modules' names must not shadow what torch imports
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
            _end(child)
        out.seek(0)
        err.seek(0)
        verdict = judge(out.read().decode(errors="replace"), status=status, stderr=err.read().decode(errors="replace"))
    return msgspec.structs.replace(verdict, seconds=round(time.monotonic() - started, 3))


def _end(child: subprocess.Popen[bytes]) -> None:
    """Leaves nothing of the child behind that hangs, or whose wait was interrupted."""
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
        Path(file.name).replace(path)  # readers see the old file or the new one
