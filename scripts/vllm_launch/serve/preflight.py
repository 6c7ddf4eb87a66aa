"""Checks folders, files, sockets and shared memory before vLLM starts. Touches files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from vllm_launch.errors import UsageError
from vllm_launch.plan.plan import Plan
from vllm_launch.serve import environment
from vllm_launch.settings.settings import Settings
from vllm_launch.units import MIB

SOCKET_PATH_MAX = 107
"""Longest path of a Unix socket on Linux, in bytes (unix(7))."""

RING_BYTES = 240 * MIB
"""Bytes of one message queue in shared memory: 10 slots of 24 MiB (shm_broadcast.py:MessageQueue)."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the path that glibc's shm_open uses

MODEL_INFOS = Path(sys.prefix, "share", "vllm-launch", "modelinfos")
"""Folder of the image with prebuilt files for vLLM's cache of the same name (docker/model_infos.py)."""

PROBE_BYTES = MIB
"""Bytes written to a cache before the start, to find a full disk now and not after minutes of loading."""


@contextlib.contextmanager
def run_folder(settings: Settings, environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield a new folder for this run. Only this user may enter it. It is removed afterwards, as it contains API keys.

    Raises:
        UsageError: the folder cannot be created.
    """
    parent = settings.launch.state_dir or environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    try:
        Path(parent).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="vllm-launch-", dir=parent)).absolute()
    except OSError as error:
        raise _unwritable(settings, "state_dir", Path(parent), error) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def writable(folder: Path) -> bool:
    """Whether this process may create files in ``folder``."""
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def make_caches(settings: Settings, environ: Mapping[str, str], env: Mapping[str, str]) -> None:
    """Create the folders that ``env`` names and the user's ``environ`` does not, and write a megabyte to vLLM's cache.

    Copy the image's prebuilt model infos into vLLM's cache, unless an earlier start has done so.

    Raises:
        UsageError: a folder cannot be created, or its disk is full.
    """
    folders = [
        Path(env[name])
        for name in (*environment.CACHES, "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR")
        if name in env and env[name] != environ.get(name)
    ]
    cache = environment.vllm_cache(env)
    for folder in (*folders, cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(settings, "cache_dir", folder, error) from None
    try:
        with tempfile.TemporaryFile(dir=cache) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
        if MODEL_INFOS.is_dir() and not (cache / MODEL_INFOS.name).exists():
            shutil.copytree(MODEL_INFOS, cache / MODEL_INFOS.name, copy_function=shutil.copyfile, dirs_exist_ok=True)
    except OSError as error:
        raise _unwritable(settings, "cache_dir", cache, error) from None


def distributions() -> list[str]:
    """Return the names and versions of the packages that are installed with vLLM, such as "torch-2.13.0"."""
    return [path.stem for path in Path(sysconfig.get_path("purelib")).glob("*.dist-info")]


def check_files(settings: Settings) -> None:
    """Check the files that vLLM opens only after it has loaded the weights.

    The chat template may also be the template's text, or the name of a template that vLLM ships
    (vllm/renderers/chat_utils.py:_load_chat_template).

    Raises:
        UsageError: a file cannot be read.
    """
    for dest in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "chat_template"):
        name = settings.engine.get(dest)
        if not isinstance(name, str) or (dest == "chat_template" and ("/" not in name or {*"{}\n"} & {*name})):
            continue
        try:
            Path(name).open("rb").close()
        except OSError as error:
            problem = f"{name} cannot be read: {error.strerror or error}"
            raise UsageError(settings.origin[dest], problem, "give an existing file that this user may read") from None


def check_sockets(settings: Settings, environ: Mapping[str, str], env: Mapping[str, str]) -> None:
    """Check that the path of the sockets' folder is short enough. ``environ``: the user's. ``env``: vLLM's.

    vLLM's Unix sockets have names of 36 characters in that folder, and Linux allows 107 in all. Source:
    vllm/utils/network_utils.py:get_open_zmq_ipc_path, unix(7).

    Raises:
        UsageError: the folder's path is too long.
    """
    folder = env["VLLM_RPC_BASE_PATH"]
    if len(folder) + 1 + 36 > SOCKET_PATH_MAX:
        problem = f"{folder} has {len(folder)} characters, but vLLM's sockets allow at most {SOCKET_PATH_MAX - 37}"
        if "VLLM_RPC_BASE_PATH" in environ:
            raise UsageError("environment VLLM_RPC_BASE_PATH", problem, "set it to a folder with a shorter path")
        where = settings.origin.get("launch.state_dir", "launch.state_dir")
        raise UsageError(where, problem, "set --launch-state-dir to a folder with a shorter path")


def check_shared_memory(plan: Plan, settings: Settings, env: Mapping[str, str], free: int) -> None:
    """Check that the message queues between an engine and its workers fit into /dev/shm. ``free``: its free bytes.

    vLLM creates one queue for each worker and one for all of them. It refuses to start if the next queue does not fit
    (vllm/distributed/device_communicators/shm_broadcast.py). Docker gives a container 64 MiB. On a single GPU the
    worker runs in the engine's process (vllm/v1/executor/uniproc_executor.py) and needs no queue.

    Raises:
        UsageError: a queue does not fit.
    """
    if plan.gpus_per_replica == 1 or (settings.engine.get("distributed_executor_backend") or "mp") != "mp":
        return
    chunk = env.get("VLLM_MQ_MAX_CHUNK_BYTES_MB", "")
    needed = max(RING_BYTES, 10 * int(chunk) * MIB if chunk.isdecimal() else 0)
    if free <= needed:
        problem = f"{free >> 20} MiB are free, but the engine and its workers need more than {needed >> 20} MiB"
        remedy = "give the container more: docker run --shm-size=1g, shm_size in Compose, a memory emptyDir in a pod"
        raise UsageError(str(SHARED_MEMORY), problem, remedy)


def _unwritable(settings: Settings, field: str, folder: Path, error: OSError) -> UsageError:
    where = settings.origin.get(f"launch.{field}", f"launch.{field}")
    problem = f"{folder} cannot be written: {error.strerror or error}"
    first = "free disk space" if error.errno == errno.ENOSPC else "make it writable for this user"
    return UsageError(where, problem, f"{first}, or give another folder with --launch-{field.replace('_', '-')}")
