"""Reads the settings. Flags override ``LAUNCH_*`` variables, which override config.yaml, which overrides defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from vllm_launch.engine import allocator, multicast
from vllm_launch.engine.options import options
from vllm_launch.engine.parse import parse
from vllm_launch.engine.values import find_option, validate_value
from vllm_launch.errors import UsageError
from vllm_launch.inside_vllm.rules import FILE_VARIABLE
from vllm_launch.settings import uncounted
from vllm_launch.settings.flags import Flags, field_of
from vllm_launch.settings.rules import check, warnings
from vllm_launch.settings.settings import LauncherSettings, Settings
from vllm_launch.units import GIB

if TYPE_CHECKING:
    from vllm_launch.settings.config_file import ConfigFile

CONFIG_VARIABLE = "LAUNCH_CONFIG"

PATHS = frozenset({"cache_dir", "state_dir", "api_key_file", "termination_log"})
"""Settings in which the launcher expands ~ to HOME. No shell does so for a file or for Compose's variables."""

INTERNAL_VARIABLES = frozenset({CONFIG_VARIABLE, FILE_VARIABLE})
"""``LAUNCH_*`` variables that are not settings: the config file's path, and the path of the guard's rules."""


def read_settings(
    flags: Flags, environ: Mapping[str, str], *, read_file: Callable[[Path], str] | None = None
) -> Settings:
    """Return the settings from the command line, the environment, and the config file that one of them names.

    Raises:
        UsageError: a name is unknown at any level, a value has the wrong type, two values contradict each other, the
            file cannot be read or is not YAML, or no model is set.
    """
    path = flags.config or environ.get(CONFIG_VARIABLE) or None
    launch: dict[str, object] = {}
    engine: dict[str, object] = {}
    origin: dict[str, str] = {}
    if path is not None:
        from vllm_launch.settings import config_file  # noqa: PLC0415 - PyYAML, which a start without a file does not need

        _apply_file(config_file.read(path, read_file), launch, engine, origin)
    override_warnings = []
    for name in sorted(name for name in environ if name.startswith("LAUNCH_") and name not in INTERNAL_VARIABLES):
        field = _field_of_variable(name, environ[name])
        if (place := origin.get(f"launch.{field}")) is not None:
            override_warnings.append(f"environment {name}: {environ[name]} overrides {place}")
        launch[field], origin[f"launch.{field}"] = environ[name], f"environment {name}"
    for field, (flag, value) in flags.launch.items():
        launch[field], origin[f"launch.{field}"] = value, f"flag {flag}"
    said = parse(flags.engine_argv)
    engine |= said
    origin |= {dest: f"flag {options()[dest].flags[0]}" for dest in said}
    if "config" in said:
        raise UsageError("command line", "--config is written in a short form", "write --config FILE")
    model = engine.pop("model", None)
    if not isinstance(model, str) or not model:
        raise UsageError(
            "command line", "no model is given", "give a folder or a name on the hub, or set model: in config.yaml"
        )
    settings = Settings(
        model=os.path.expanduser(model),  # noqa: PTH111 - for a file neither a shell nor vLLM does so
        launch=_launch(launch, origin),
        engine=engine,
        origin=origin,
        long_max_model_len=environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "").strip().lower() in {"1", "true"},
        estimate_cudagraphs={"0": False, "1": True}.get(
            environ.get("VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", "").strip()
        ),
        expandable_segments=allocator.expandable_segments(environ, engine),
        cpu_kv_cache_bytes=_cpu_kv_cache(environ.get("VLLM_CPU_KVCACHE_SPACE", "")),
        no_multicast=_no_multicast(launch.get("nvlink_multicast"), origin, environ),
    )
    check(settings, environ)
    return msgspec.structs.replace(
        settings, warnings=(*override_warnings, *warnings(settings), *uncounted.warnings(settings, environ))
    )


def _no_multicast(setting: object, origin: Mapping[str, str], environ: Mapping[str, str]) -> str | None:
    """Return the flag, line or variable that forbids NVLink multicast, or None."""
    if setting == "off":
        return origin["launch.nvlink_multicast"]
    name = multicast.forbidden_by(environ)
    return name and f"environment {name}={environ[name]}"


def _cpu_kv_cache(gib: str) -> int | None:
    """Return the bytes of VLLM_CPU_KVCACHE_SPACE, read as in vllm/platforms/cpu.py. None: the plan decides."""
    if gib and not (gib.isascii() and gib.isdecimal()):
        where, problem = "environment VLLM_CPU_KVCACHE_SPACE", f"{gib!r} is not a whole number of GiB"
        raise UsageError(where, problem, "write 4 for 4 GiB, or unset it")
    return int(gib or 0) * GIB or None


SERVICE_LINK = re.compile(r"LAUNCH_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_(TCP|UDP|SCTP)\w*)")


def _field_of_variable(name: str, value: str) -> str:
    if SERVICE_LINK.fullmatch(name) or re.match(r"(tcp|udp|sctp)://", value):
        raise UsageError(
            f"environment {name}",
            "is not a setting but a variable that Kubernetes sets for a Service named launch…",
            "set enableServiceLinks: false in the pod, or give the Service another name",
        )
    return field_of(name.removeprefix("LAUNCH_").lower(), f"environment {name}", "LAUNCH_{}")


def _apply_file(file: ConfigFile, launch: dict[str, object], engine: dict[str, object], origin: dict[str, str]) -> None:
    """Add the file's values to ``launch`` and ``engine``, and their lines to ``origin``."""
    types = get_type_hints(LauncherSettings)
    for key, value in file.values.items():
        where = file.where((key,))
        if key == "launch":
            for name, setting in _section(value, where).items():
                place = file.where((key, name))
                field = field_of(name, place, "{}")
                if setting is None:
                    raise UsageError(place, f"{name} has no value", "give a value, or leave the key out")
                if (first := origin.get(f"launch.{field}")) is not None:
                    raise UsageError(place, f"{name} is set twice (first: {first})", "keep one of them")
                off = setting is False and "off" in get_args(types[field])  # YAML 1.1 reads off without quotes as false
                launch[field], origin[f"launch.{field}"] = "off" if off else setting, place
            continue
        if re.sub("[-.]", "_", key).removeprefix("launch_") in LauncherSettings.__struct_fields__:
            raise UsageError(where, f"{key} is a setting of the launcher", "write it below launch:, indented")
        option = find_option("model" if key in {"model-tag", "model_tag"} else key, where)
        if option.dest == "config":
            raise UsageError(where, "a config file cannot name another config file", "write all options in one file")
        if option.dest in origin:
            raise UsageError(where, f"{key} is set twice (first: {origin[option.dest]})", "keep one of them")
        origin[option.dest] = where
        if value != []:  # vLLM's own --config ignores an empty list
            engine[option.dest] = validate_value(option, value, where)


def _section(value: object, where: str) -> dict[str, object]:
    """Return the mapping below launch:."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(where, "launch is not a mapping of settings", "write one `setting: value` per line below it")
    for name in value:
        if not isinstance(name, str):
            raise UsageError(where, f"launch has the key {name!r}, which is not a setting", "write `setting: value`")
    return value


def _launch(values: Mapping[str, object], origin: Mapping[str, str]) -> LauncherSettings:
    """Return the launcher's settings, typed. Convert text from the environment and from flags ("8001", "/a,/b")."""
    typed: dict[str, object] = {}
    types = get_type_hints(LauncherSettings, include_extras=True)
    for field, value in values.items():
        untyped = value
        if field == "allowed_routes" and isinstance(value, str):
            untyped = [route for route in value.replace(",", " ").split() if route]
        elif field in PATHS and isinstance(value, str):
            untyped = os.path.expanduser(value)  # noqa: PTH111 - as for the model
        try:
            typed[field] = msgspec.convert(untyped, types[field], strict=not isinstance(untyped, str))
        except msgspec.ValidationError:
            raise UsageError(origin[f"launch.{field}"], f"{field} cannot be {value!r}", _remedy(types[field])) from None
    return msgspec.convert(typed, LauncherSettings)


def _remedy(setting_type: Any) -> str:
    """Return the remedy for a value of the wrong type. ``setting_type`` is an Annotated type."""
    bare = setting_type.__origin__
    if get_origin(bare) is Literal:
        return f"give {' or '.join(get_args(bare))}"
    if bare is bool:
        return "give true or false"
    if get_origin(bare) is tuple:
        return "give routes such as /v1/chat, separated by commas"
    bounds = next((part for part in setting_type.__metadata__ if part.ge is not None), None)
    return f"give a whole number from {bounds.ge} to {bounds.le}" if bounds else "give text that is not empty"
