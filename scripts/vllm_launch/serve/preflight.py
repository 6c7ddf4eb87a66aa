"""Folders, files, sockets and shared memory, checked before vLLM starts. Touches files."""

from __future__ import annotations

import contextlib
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

RING_BYTES = 240 * MIB
"""Of a worker's answers: 10 slots of 24 MiB (shm_broadcast.py:MessageQueue)."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - glibc's shm_open has it there

MODEL_INFOS = Path(sys.prefix, "share", "vllm-launch", "modelinfos")
"""What an image brings for vLLM's cache of the same name (docker/model_infos.py)."""

PROBE_BYTES = MIB
"""Written to a cache before the start: a disk that is full shows now, not after minutes of loading."""


@contextlib.contextmanager
def run_folder(settings: Settings, environ: Mapping[str, str]) -> Iterator[Path]:
    """A folder of this run alone, which only this user may enter; gone afterwards, as API keys are in it.

    Raises:
        UsageError: none can be made.
    """
    above = settings.launch.state_dir or environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    try:
        Path(above).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="vllm-launch-", dir=above)).absolute()
    except OSError as error:
        raise _unwritable(settings, "state_dir", Path(above), error) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def writable(folder: Path) -> bool:
    """Whether this process may make files in ``folder``."""
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def make_caches(settings: Settings, environ: Mapping[str, str], env: Mapping[str, str]) -> None:
    """The folders that ``env`` names and the person's ``environ`` does not, and room for a megabyte in each disk.

    What an image has built ahead for vLLM's cache is put there, unless earlier starts have.

    Raises:
        UsageError: one cannot be made or is full.
    """
    chosen = [
        Path(env[name])
        for name in (*environment.CACHES, "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR")
        if name in env and env[name] != environ.get(name)
    ]
    cache = environment.vllm_cache(env)
    for folder in (*chosen, cache):
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
    """Names and versions of what is installed beside this Python's vLLM."""
    return [path.stem for path in Path(sysconfig.get_path("purelib")).glob("*.dist-info")]


def check_files(settings: Settings) -> None:
    """Files that vLLM opens only after the weights are loaded.

    A chat template may also be the template itself, or the name of one that vLLM brings
    (vllm/renderers/chat_utils.py:_load_chat_template).

    Raises:
        UsageError: one cannot be read.
    """
    for dest in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "chat_template"):
        name = settings.engine.get(dest)
        if not isinstance(name, str) or (dest == "chat_template" and ("/" not in name or {*"{}\n"} & {*name})):
            continue
        try:
            Path(name).open("rb").close()
        except OSError as error:
            what = f"{name} cannot be read: {error.strerror or error}"
            raise UsageError(
                settings.origin[dest], what, "name a file that is there, and that this user may read"
            ) from None


def check_sockets(settings: Settings, env: Mapping[str, str]) -> None:
    """Unix sockets of vLLM's processes have names of 36 characters in a folder, and Linux takes 107 in all.

    Source: vllm/utils/network_utils.py:get_open_zmq_ipc_path, unix(7).

    Raises:
        UsageError: the folder's own name is too long.
    """
    folder = env["VLLM_RPC_BASE_PATH"]
    if len(folder) + 1 + 36 > SOCKET_PATH_MAX:
        where = settings.origin.get("launch.state_dir", "VLLM_RPC_BASE_PATH")
        what = f"{folder} is too long a name for the sockets in it: {len(folder)} characters of {SOCKET_PATH_MAX - 37}"
        raise UsageError(where, what, "name a folder nearer to the root")


def check_shared_memory(plan: Plan, settings: Settings, env: Mapping[str, str], free: int) -> None:
    """Room in /dev/shm, of which ``free`` bytes are, for the rings of messages between an engine and its workers.

    vLLM makes one for each worker and one for all of them, and refuses when there is no room for the one that it makes
    next (vllm/distributed/device_communicators/shm_broadcast.py); Docker gives a container 64 MiB. On a single GPU the
    worker is the engine's own process (vllm/v1/executor/uniproc_executor.py).

    Raises:
        UsageError: there is no room.
    """
    if plan.gpus_per_replica == 1 or (settings.engine.get("distributed_executor_backend") or "mp") != "mp":
        return
    chunk = env.get("VLLM_MQ_MAX_CHUNK_BYTES_MB", "")
    needed = max(RING_BYTES, 10 * int(chunk) * MIB if chunk.isdecimal() else 0)
    if free <= needed:
        what = f"{free >> 20} MiB are free, and the engine and its workers talk through rings of {needed >> 20} MiB"
        remedy = "give the container more: docker run --shm-size=1g, shm_size in Compose, a memory emptyDir in a pod"
        raise UsageError(str(SHARED_MEMORY), what, remedy)


def _unwritable(settings: Settings, field: str, folder: Path, error: OSError) -> UsageError:
    where = settings.origin.get(f"launch.{field}", f"launch.{field}")
    what = f"{folder} cannot be written: {error.strerror or error}"
    return UsageError(where, what, f"free space there, or name another folder with --launch-{field.replace('_', '-')}")
