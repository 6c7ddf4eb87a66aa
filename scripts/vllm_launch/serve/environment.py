"""vLLM's environment: caches, HOME, and the variables that the launcher decides. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from vllm_launch.engine import multicast
from vllm_launch.inside_vllm.guard import FILE_VARIABLE
from vllm_launch.serve.command import Distribution
from vllm_launch.settings.settings import GUARD_FILE, Settings

SHARED_CACHES = {
    "HF_HOME": "huggingface",  # huggingface_hub/constants.py
    "VLLM_ASSETS_CACHE": "vllm-assets",  # vllm/envs.py
    "OUTLINES_CACHE_DIR": "outlines",  # vllm/v1/structured_output/utils.py:get_outlines_cache_path
}
"""Variables that say where a library keeps what it fetched, and their folders below XDG_CACHE_HOME."""

COMPILED_CACHES = {
    "VLLM_CACHE_ROOT": "vllm",  # vllm/envs.py: what torch.compile and FlashInfer's autotuning found
    "TRITON_HOME": "triton",  # triton/knobs.py: ~/.triton, for what is not in the cache
    "TRITON_CACHE_DIR": "triton/cache",  # triton/knobs.py; torch/_inductor/runtime/cache_dir_utils.py
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",  # torch/_inductor/runtime/cache_dir_utils.py; else below TMPDIR
    "NUMBA_CACHE_DIR": "numba",  # numba/core/config.py; else beside the source
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",  # FlashInfer's installation guide: its .cache lies below this
    "CUDA_CACHE_PATH": "nv",  # CUDA C++ Programming Guide, environment variables; else ~/.nv/ComputeCache
}
"""The same for what was compiled or tuned: their folders are below ``compiled_folder``."""

CACHES = SHARED_CACHES | COMPILED_CACHES


def vllm_cache(env: Mapping[str, str]) -> Path:
    """Where a vLLM with ``env`` keeps what it compiled and looked up (vllm/envs.py:VLLM_CACHE_ROOT)."""
    return Path(env.get("VLLM_CACHE_ROOT") or Path(env.get("XDG_CACHE_HOME") or Path(env["HOME"]) / ".cache") / "vllm")


def compiled_folder(distributions: Iterable[str], devices: Iterable[str]) -> Path:
    """Below a cache, where an engine of ``distributions`` ("torch-2.13.0", …) keeps what it compiles for ``devices``.

    A volume may be shared by images and kinds of GPU; what one of them compiled or tuned must not reach another.
    ``devices`` are names of GPUs or of a CPU.
    """
    engine = hashlib.sha256("\n".join(sorted(distributions)).encode()).hexdigest()[:12]
    names = "+".join(sorted({re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") for device in devices}))
    return Path("compiled", f"{engine}-{names}"[:200])


SLOW_START_S = 86400
"""For VLLM_ENGINE_READY_TIMEOUT_S: vLLM's 600 s also end starts that are slow but well. The launcher ends those in
which nothing moves (``launch.start_stall_seconds``)."""


def engine_environment(
    settings: Settings,
    environ: Mapping[str, str],
    plan_env: Mapping[str, str],
    *,
    run_dir: Path,
    writable: Callable[[Path], bool],
    compiled: Path = Path("compiled"),
    vllm_distribution: Distribution = "vllm",
) -> dict[str, str]:
    """The child's environment: the person's, what vLLM needs beside it, and the plan's (such as NCCL_P2P_DISABLE).

    What the person set stays, but for what would endanger the server. Caches go to ``launch.cache_dir``, or below
    ``run_dir`` (an absolute folder of this run) where HOME cannot be written, as for a user id without a name on a
    read-only root; what is compiled goes to ``compiled`` below them. ``writable`` says whether this process may make
    files in a folder. Folders are named, not made.
    """
    env = {name: value for name, value in environ.items() if not name.startswith("LAUNCH_")}
    # An optimised Python drops the assertions with which vLLM checks what users send (CVE-2026-41523).
    env.pop("PYTHONOPTIMIZE", None)
    env.pop("VLLM_API_KEY", None)  # the guard has it; vLLM would let only this one of the keys pass
    env |= multicast.SWITCHES if settings.no_multicast else {}
    env["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"] = "0"  # a server whose engine is dead must end, or nobody replaces it
    env[FILE_VARIABLE] = str(run_dir / GUARD_FILE)
    if isinstance(token := settings.engine.get("hf_token"), str):
        env["HF_TOKEN"] = token
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(SLOW_START_S),
        "VLLM_RPC_BASE_PATH": str(run_dir),  # its sockets, which it leaves behind in TMPDIR
        # For getpass.getuser() in torch and vLLM, which fails where the user id has no name (vllm-project/vllm#44548).
        "USER": "vllm",
        "LOGNAME": "vllm",
    }
    if vllm_distribution == "vllm":
        # vLLM's server would spawn: every process imports it all again, 16 s each. Its library forks by default, and so
        # do these servers where nothing has touched CUDA yet; where something has, vLLM spawns whatever is said here
        # (utils/system_utils.py:_maybe_force_spawn).
        defaults["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    else:
        defaults["VLLM_TARGET_DEVICE"] = "cpu"
    cache_dir = Path(settings.launch.cache_dir or run_dir / "cache")
    home = Path(environ.get("HOME") or "/")
    homeless = home == Path("/") or not writable(home)
    if homeless:
        env["HOME"] = str(cache_dir)
        config = Path(env.setdefault("XDG_CONFIG_HOME", str(cache_dir / "config")))
        defaults["VLLM_CONFIG_ROOT"] = str(config / "vllm")  # vllm/envs.py: usage_stats.json
    if homeless or settings.launch.cache_dir is not None:
        cache = Path(env.setdefault("XDG_CACHE_HOME", str(cache_dir)))
        defaults |= {name: str(cache / folder) for name, folder in SHARED_CACHES.items()}
        defaults |= {name: str(cache / compiled / folder) for name, folder in COMPILED_CACHES.items()}
    if not writable(Path(environ.get("TMPDIR") or "/tmp")):  # noqa: S108 - where Python's tempfile looks first
        env["TMPDIR"] = str(run_dir / "tmp")
    return defaults | env | dict(plan_env)
