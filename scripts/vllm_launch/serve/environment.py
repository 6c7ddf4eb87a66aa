"""vLLM's environment: caches, HOME, and the variables that the launcher decides. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from vllm_launch.engine import multicast
from vllm_launch.inside_vllm.rules import FILE_VARIABLE
from vllm_launch.serve.command import Distribution
from vllm_launch.settings.settings import GUARD_FILE, Settings

SHARED_CACHES = {
    "HF_HOME": "huggingface",  # huggingface_hub/constants.py
    "VLLM_ASSETS_CACHE": "vllm-assets",  # vllm/envs.py
    "OUTLINES_CACHE_DIR": "outlines",  # vllm/v1/structured_output/utils.py:get_outlines_cache_path
}
"""Variables that set a library's download cache, with the folder of each below XDG_CACHE_HOME."""

COMPILED_CACHES = {
    "VLLM_CACHE_ROOT": "vllm",  # vllm/envs.py: results of torch.compile and of FlashInfer's autotuning
    "TRITON_HOME": "triton",  # triton/knobs.py: ~/.triton, for files outside its cache
    "TRITON_CACHE_DIR": "triton/cache",  # triton/knobs.py; torch/_inductor/runtime/cache_dir_utils.py
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",  # torch/_inductor/runtime/cache_dir_utils.py; default: below TMPDIR
    "NUMBA_CACHE_DIR": "numba",  # numba/core/config.py; default: beside the source
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",  # FlashInfer's installation guide: its .cache is below this
    "CUDA_CACHE_PATH": "nv",  # CUDA C++ Programming Guide, environment variables; default: ~/.nv/ComputeCache
}
"""Variables that set a cache of compiled or tuned code, with the folder of each below ``compiled_folder``."""

CACHES = SHARED_CACHES | COMPILED_CACHES


def vllm_cache(env: Mapping[str, str]) -> Path:
    """Return vLLM's cache folder, given its environment ``env`` (vllm/envs.py:VLLM_CACHE_ROOT)."""
    return Path(env.get("VLLM_CACHE_ROOT") or Path(env.get("XDG_CACHE_HOME") or Path(env["HOME"]) / ".cache") / "vllm")


def compiled_folder(distributions: Iterable[str], devices: Iterable[str]) -> Path:
    """Return the folder, relative to the cache, for the compiled code of one engine on one kind of device.

    ``distributions``: the engine's packages ("torch-2.13.0", …). ``devices``: names of the GPUs or of the CPU. Several
    images and kinds of GPU may share a volume. They must not share compiled or tuned code.
    """
    engine = hashlib.sha256("\n".join(sorted(distributions)).encode()).hexdigest()[:12]
    names = "+".join(sorted({re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") for device in devices}))
    return Path("compiled", f"{engine}-{names}"[:200])


READY_TIMEOUT_S = 86400
"""Default for VLLM_ENGINE_READY_TIMEOUT_S, in seconds. vLLM's default of 600 s would also end a slow start that makes
progress. The launcher ends a start that makes no progress (``launch.start_stall_seconds``)."""


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
    """Return vLLM's environment: the user's variables, the launcher's defaults, and the plan's variables.

    A variable of the plan is, for example, NCCL_P2P_DISABLE. The user's variables override the defaults. The plan's
    variables override both. Variables that would endanger the server are removed or set to a safe value.

    Caches go to ``launch.cache_dir``. Without it they go below ``run_dir`` (an absolute folder of this run) if HOME is
    not writable, for example for a user id without a name on a read-only root. Compiled code goes to ``compiled`` below
    the cache. ``writable`` says whether this process may create files in a folder. This function creates no folder.
    """
    env = {name: value for name, value in environ.items() if not name.startswith("LAUNCH_")}
    # An optimised Python removes the assertions with which vLLM checks requests (CVE-2026-41523).
    env.pop("PYTHONOPTIMIZE", None)
    env.pop("VLLM_API_KEY", None)  # the guard checks keys; vLLM would accept only this one
    env |= multicast.SWITCHES if settings.no_multicast else {}
    env["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"] = "0"  # a server with a dead engine must exit, or nothing restarts it
    env[FILE_VARIABLE] = str(run_dir / GUARD_FILE)
    if isinstance(token := settings.engine.get("hf_token"), str):
        env["HF_TOKEN"] = token
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(READY_TIMEOUT_S),
        "VLLM_RPC_BASE_PATH": str(run_dir),  # its sockets, which it would leave behind in TMPDIR
        # torch and vLLM call getpass.getuser(), which fails for a user id without a name (vllm-project/vllm#44548).
        "USER": "vllm",
        "LOGNAME": "vllm",
    }
    if vllm_distribution == "vllm":
        # By default vLLM's server spawns its processes, and each one imports everything again, in 16 s. vLLM's library
        # forks by default. With this variable the server forks too, as long as nothing has initialised CUDA. After
        # that, vLLM spawns even if this variable is "fork" (utils/system_utils.py:_maybe_force_spawn).
        defaults["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    else:
        defaults["VLLM_TARGET_DEVICE"] = "cpu"
    cache_dir = Path(settings.launch.cache_dir or run_dir / "cache")
    home = Path(environ.get("HOME") or "/")
    home_unusable = home == Path("/") or not writable(home)
    if home_unusable:
        env["HOME"] = str(cache_dir)
        config = Path(env.setdefault("XDG_CONFIG_HOME", str(cache_dir / "config")))
        defaults["VLLM_CONFIG_ROOT"] = str(config / "vllm")  # vllm/envs.py: usage_stats.json
    if home_unusable or settings.launch.cache_dir is not None:
        cache = Path(env.setdefault("XDG_CACHE_HOME", str(cache_dir)))
        defaults |= {name: str(cache / folder) for name, folder in SHARED_CACHES.items()}
        defaults |= {name: str(cache / compiled / folder) for name, folder in COMPILED_CACHES.items()}
    if not writable(Path(environ.get("TMPDIR") or "/tmp")):  # noqa: S108 - the first default of tempfile
        env["TMPDIR"] = str(run_dir / "tmp")
    return defaults | env | dict(plan_env)
