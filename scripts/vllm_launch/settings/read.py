"""Reads settings: flags over ``LAUNCH_*`` over config.yaml over defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from vllm_launch.engine import multicast
from vllm_launch.engine.options import options
from vllm_launch.engine.parse import parse
from vllm_launch.engine.values import find_option, validate_value
from vllm_launch.errors import UsageError
from vllm_launch.inside_vllm.guard import FILE_VARIABLE
from vllm_launch.settings.flags import Flags, field_of
from vllm_launch.settings.rules import check, warnings
from vllm_launch.settings.settings import LauncherSettings, Settings
from vllm_launch.units import GIB

if TYPE_CHECKING:
    from vllm_launch.settings.config_file import ConfigFile

CONFIG_VARIABLE = "LAUNCH_CONFIG"

PATHS = frozenset({"cache_dir", "state_dir", "api_key_file", "termination_log"})
"""Settings in which ~ is HOME, as a shell would have it: a file and Compose's variables see none."""

INTERNAL_VARIABLES = frozenset({CONFIG_VARIABLE, FILE_VARIABLE})
"""``LAUNCH_*`` that are no settings: the config file's place, and what the launcher tells the guard inside vLLM."""


def read_settings(
    flags: Flags, environ: Mapping[str, str], *, read_file: Callable[[Path], str] | None = None
) -> Settings:
    """Return the settings from the command line, the environment, and the config file that one of them names.

    Raises:
        UsageError: an unknown name at any level, a value of the wrong kind, values that cannot go together, a file that
            cannot be read or is not YAML, no model.
    """
    path = flags.config or environ.get(CONFIG_VARIABLE) or None
    launch: dict[str, object] = {}
    engine: dict[str, object] = {}
    origin: dict[str, str] = {}
    if path is not None:
        from vllm_launch.settings import config_file  # noqa: PLC0415 - PyYAML, which a start without a file does not need

        _take_file(config_file.read(path, read_file), launch, engine, origin)
    overridden = []
    for name in sorted(name for name in environ if name.startswith("LAUNCH_") and name not in INTERNAL_VARIABLES):
        field = _field_of_variable(name, environ[name])
        if (place := origin.get(f"launch.{field}")) is not None:
            overridden.append(f"environment {name}: {environ[name]} counts, and not what {place} says")
        launch[field], origin[f"launch.{field}"] = environ[name], f"environment {name}"
    for field, (flag, value) in flags.launch.items():
        launch[field], origin[f"launch.{field}"] = value, f"flag {flag}"
    said = parse(flags.engine_words)
    engine |= said
    origin |= {dest: f"flag {options()[dest].flags[0]}" for dest in said}
    if "config" in said:
        raise UsageError("--config", "is shortened or spelt oddly", "write --config FILE")
    model = engine.pop("model", None)
    if not isinstance(model, str) or not model:
        raise UsageError(
            "command line", "no model is named", "give a folder or a name on the hub, or model: in config.yaml"
        )
    settings = Settings(
        model=os.path.expanduser(model),  # noqa: PTH111 - in a file no shell does it, and vLLM does not
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
    return msgspec.structs.replace(settings, warnings=(*overridden, *warnings(settings)))


def _no_multicast(said: object, origin: Mapping[str, str], environ: Mapping[str, str]) -> str | None:
    if said == "off":
        return origin["launch.nvlink_multicast"]
    name = multicast.forbidden_by(environ)
    return name and f"environment {name}={environ[name]}"


def _cpu_kv_cache(gib: str) -> int | None:
    """As vllm/platforms/cpu.py reads it; 0 leaves it to the plan."""
    if gib and not (gib.isascii() and gib.isdecimal()):
        where, what = "environment VLLM_CPU_KVCACHE_SPACE", f"{gib!r} is not a whole number of GiB"
        raise UsageError(where, what, "write 4 for 4 GiB, or leave it out")
    return int(gib or 0) * GIB or None


SERVICE_LINK = re.compile(r"LAUNCH_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_(TCP|UDP|SCTP)\w*)")


def _field_of_variable(name: str, value: str) -> str:
    if SERVICE_LINK.fullmatch(name) or re.match(r"(tcp|udp|sctp)://", value):
        raise UsageError(
            f"environment {name}",
            "comes from Kubernetes (a link to a Service called launch…) and is no setting",
            "set enableServiceLinks: false in the pod, or give the Service another name",
        )
    return field_of(name.removeprefix("LAUNCH_").lower(), f"environment {name}", "LAUNCH_{}")


def _take_file(file: ConfigFile, launch: dict[str, object], engine: dict[str, object], origin: dict[str, str]) -> None:
    kinds = get_type_hints(LauncherSettings)
    for key, value in file.values.items():
        where = file.where((key,))
        if key == "launch":
            for name, setting in _section(value, where).items():
                place = file.where((key, name))
                field = field_of(name, place, "{}")
                if setting is None:
                    raise UsageError(place, f"{name} says nothing", "give a value, or leave the key out")
                if (first := origin.get(f"launch.{field}")) is not None:
                    raise UsageError(place, f"{name} is set twice (first: {first})", "keep one of them")
                off = setting is False and "off" in get_args(kinds[field])  # YAML 1.1 reads a bare off as false
                launch[field], origin[f"launch.{field}"] = "off" if off else setting, place
            continue
        if re.sub("[-.]", "_", key).removeprefix("launch_") in LauncherSettings.__struct_fields__:
            raise UsageError(where, f"{key} is a setting of the launcher", "write it below launch:, further in")
        option = find_option("model" if key in {"model-tag", "model_tag"} else key, where)
        if option.dest == "config":
            raise UsageError(where, "a config file cannot name another", "write it all in one")
        if option.dest in origin:
            raise UsageError(where, f"{key} is set twice (first: {origin[option.dest]})", "keep one of them")
        origin[option.dest] = where
        if value != []:  # vLLM's own --config passes an empty list over
            engine[option.dest] = validate_value(option, value, where)


def _section(value: object, where: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(where, "launch is not a mapping of settings", "write one `setting: value` a line below it")
    for name in value:
        if not isinstance(name, str):
            raise UsageError(where, f"launch holds {name!r}, which is no name of a setting", "write `setting: value`")
    return value


def _launch(values: Mapping[str, object], origin: Mapping[str, str]) -> LauncherSettings:
    """Typed settings; text, as the environment and flags give it, is read leniently ("8001", "true", "/a,/b")."""
    found: dict[str, object] = {}
    kinds = get_type_hints(LauncherSettings, include_extras=True)
    for field, value in values.items():
        given = value
        if field == "allowed_routes" and isinstance(value, str):
            given = [route for route in value.replace(",", " ").split() if route]
        elif field in PATHS and isinstance(value, str):
            given = os.path.expanduser(value)  # noqa: PTH111 - as for the model
        try:
            found[field] = msgspec.convert(given, kinds[field], strict=not isinstance(given, str))
        except msgspec.ValidationError:
            raise UsageError(origin[f"launch.{field}"], f"{field} cannot be {value!r}", _wanted(kinds[field])) from None
    return msgspec.convert(found, LauncherSettings)


def _wanted(kind: Any) -> str:
    """What a setting of this type takes, as a remedy."""
    bare = kind.__origin__
    if get_origin(bare) is Literal:
        return f"give {' or '.join(get_args(bare))}"
    if bare is bool:
        return "give true or false"
    if get_origin(bare) is tuple:
        return "give routes such as /v1/chat, with commas between them"
    bounds = next((part for part in kind.__metadata__ if part.ge is not None), None)
    return f"give a whole number from {bounds.ge} to {bounds.le}" if bounds else "give text, and not nothing"
