"""Reads the settings. Flags override ``LAUNCH_*`` variables, which override config.yaml, which overrides defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from vllm_launch.engine import multicast
from vllm_launch.engine.options import nearest, options
from vllm_launch.engine.parse import parse
from vllm_launch.engine.values import option_of, validate_value
from vllm_launch.errors import UsageError
from vllm_launch.inside_vllm.guard import FILE_VARIABLE
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
    argv: Sequence[str], environ: Mapping[str, str], *, read_file: Callable[[Path], str] | None = None
) -> Settings:
    """Return the settings from ``argv`` after ``serve`` or ``plan``, the environment, and the config file.

    Raises:
        UsageError: a name is unknown at any level, a value has the wrong type, two values contradict each other, the
            file cannot be read or is not YAML, or no model is set.
    """
    launcher_flags, vllm_argv, path = _split(argv)
    path = path or environ.get(CONFIG_VARIABLE) or None
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
    for field, (flag, value) in launcher_flags.items():
        launch[field], origin[f"launch.{field}"] = value, f"flag {flag}"
    vllm_flags = parse(vllm_argv)
    engine |= vllm_flags
    origin |= {dest: f"flag {options()[dest].flags[0]}" for dest in vllm_flags}
    if "config" in vllm_flags:
        raise UsageError("--config", "is abbreviated or misspelt", "write --config FILE")
    model = engine.pop("model", None)
    if not isinstance(model, str) or not model:
        raise UsageError(
            "command line", "no model is named", "give a folder or a name on the hub, or set model: in config.yaml"
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
        cpu_kv_cache_bytes=_cpu_kv_cache(environ.get("VLLM_CPU_KVCACHE_SPACE", "")),
        no_multicast=_no_multicast(launch.get("nvlink_multicast"), origin, environ),
    )
    check(settings, environ)
    return msgspec.structs.replace(settings, warnings=(*override_warnings, *warnings(settings)))


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


def _split(argv: Sequence[str]) -> tuple[dict[str, tuple[str, str]], list[str], str | None]:
    """Return the launcher's flags as {field: (flag, text)}, the arguments for vLLM, and the file of --config."""
    launcher_flags: dict[str, tuple[str, str]] = {}
    vllm_argv: list[str] = []
    path: str | None = None
    rest = iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        negated = flag.startswith("--no-launch-")
        if flag != "--config" and not flag.startswith("--launch-") and not negated:
            _check_vllm_flag(flag)
            vllm_argv.append(word)
            continue
        field = None
        if flag != "--config":
            field = _field(flag.removeprefix("--no" if negated else "-").lstrip("-").removeprefix("launch-"), flag)
        if field and LauncherSettings.__annotations__[field] == "bool" and not equals:
            value = "false" if negated else "true"
        elif negated:
            problem = "has no --no- form, because its setting takes a value"
            raise UsageError(flag, problem, f"write --{flag.removeprefix('--no-')} VALUE, or leave it out")
        elif not equals:
            value = next(rest, "")
        if not value:
            raise UsageError(flag, "its value is missing", f"write {flag} VALUE")
        if path is not None if field is None else field in launcher_flags:
            raise UsageError(flag, "is given twice", "keep one")
        if field is None:
            path = value
        else:
            launcher_flags[field] = (flag, value)
    return launcher_flags, vllm_argv, path


def _check_vllm_flag(flag: str) -> None:
    """Refuse a setting of the launcher without its ``--launch-`` prefix."""
    if flag.startswith("--") and flag[2:].replace("-", "_") in LauncherSettings.__struct_fields__:
        raise UsageError(flag, "is a setting of the launcher, not of vLLM", f"write --launch-{flag[2:]}")


def _field(name: str, where: str, spelling: Callable[[str], str] | None = None) -> str:
    """Return the launcher's setting called ``name``. ``spelling`` writes a setting as the user would, for the hint.

    Raises:
        UsageError: the launcher has no such setting.
    """
    field = name.replace("-", "_")
    if field not in LauncherSettings.__struct_fields__:
        if field in options() and f"{field}_file" not in LauncherSettings.__struct_fields__:
            flag = options()[field].flags[0]
            remedy = f"write {flag}, or {field} in the config file outside launch:"
            raise UsageError(where, f"{name} is an option of vLLM, not a setting of the launcher", remedy)
        spell = spelling or (lambda field: f"--launch-{field.replace('_', '-')}")
        hint = nearest(spell(field), [spell(field) for field in LauncherSettings.__struct_fields__])
        raise UsageError(where, f"the launcher has no setting {name}", hint)
    return field


SERVICE_LINK = re.compile(r"LAUNCH_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_(TCP|UDP|SCTP)\w*)")


def _field_of_variable(name: str, value: str) -> str:
    if SERVICE_LINK.fullmatch(name) or re.match(r"(tcp|udp|sctp)://", value):
        raise UsageError(
            f"environment {name}",
            "is not a setting but a variable that Kubernetes sets for a Service named launch…",
            "set enableServiceLinks: false in the pod, or give the Service another name",
        )
    return _field(name.removeprefix("LAUNCH_").lower(), f"environment {name}", lambda field: f"LAUNCH_{field.upper()}")


def _apply_file(file: ConfigFile, launch: dict[str, object], engine: dict[str, object], origin: dict[str, str]) -> None:
    """Add the file's values to ``launch`` and ``engine``, and their lines to ``origin``."""
    types = get_type_hints(LauncherSettings)
    for key, value in file.values.items():
        where = file.where((key,))
        if key == "launch":
            for name, setting in _section(value, where).items():
                place = file.where((key, name))
                field = _field(name, place, lambda field: field)
                if setting is None:
                    raise UsageError(place, f"{name} has no value", "give a value, or leave the key out")
                if (first := origin.get(f"launch.{field}")) is not None:
                    raise UsageError(place, f"{name} is set twice (first: {first})", "keep one of them")
                off = setting is False and "off" in get_args(types[field])  # YAML 1.1 reads off without quotes as false
                launch[field], origin[f"launch.{field}"] = "off" if off else setting, place
            continue
        if re.sub("[-.]", "_", key).removeprefix("launch_") in LauncherSettings.__struct_fields__:
            raise UsageError(where, f"{key} is a setting of the launcher", "write it below launch:, indented")
        option = option_of("model" if key in {"model-tag", "model_tag"} else key, where)
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
    """Return the remedy for a value of the wrong type."""
    if get_origin(setting_type) is Literal:
        return f"give {' or '.join(get_args(setting_type))}"
    if setting_type is bool:
        return "give true or false"
    if get_origin(setting_type) is tuple:
        return "give routes such as /v1/chat, separated by commas"
    bounds = next((part for part in getattr(setting_type, "__metadata__", ()) if part.ge is not None), None)
    return f"give a whole number from {bounds.ge} to {bounds.le}" if bounds else "give text that is not empty"
