"""What the person asked: flags over ``LAUNCH_*`` over config.yaml over defaults. Owns every port, path and drain time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml

from vllm_launch import engine_args
from vllm_launch.errors import UsageError
from vllm_launch.plan import Asked

API_PORT = 8000  # vLLM's own default
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]


class Launch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Our own settings. Field ``health_port`` is ``launch: health_port:`` in config.yaml, ``LAUNCH_HEALTH_PORT`` in the
    environment and ``--launch-health-port`` on the command line; every field so.
    """  # noqa: D205

    objective: Literal["throughput", "latency"] = "throughput"  # fewest GPUs per replica, or the widest split
    health_host: str = "0.0.0.0"  # noqa: S104 - probes come from outside the container
    health_port: Port = 8001  # /livez /readyz /startupz
    drain_seconds: Seconds = 90  # from the signal to the end, all of it: carriers take their grace period from it
    cache_dir: str | None = None  # compile and kernel caches, HOME where it cannot be written; default: ~/.cache
    state_dir: str | None = None  # what one run needs on disk; default: a fresh temporary folder
    api_key_file: str | None = None  # keys that clients may use, one a line
    allowed_routes: tuple[str, ...] = ()  # only these routes and what lies below them; empty: all
    start_stall_seconds: Seconds = 600  # a start in which nothing moves for so long is ended
    p2p: Literal["auto", "off"] = "auto"  # auto: copy between peers before the first start and believe only that
    greet: bool = False  # stream one answer to the terminal when ready
    termination_log: str = "/dev/termination-log"  # where Kubernetes reads the reason; used only where it exists


class Drain(msgspec.Struct, frozen=True):
    """The one drain number in its parts, seconds: readiness off and still serving, vLLM's own drain, time to exit."""

    delay: float
    shutdown_timeout: int
    margin: float


def drain(seconds: float) -> Drain:
    """15 s for load balancers to notice and 15 s to exit (a sixth each when short); the rest is for the streams."""
    edge = min(15.0, seconds / 6)
    return Drain(delay=edge, shutdown_timeout=int(seconds - 2 * edge), margin=edge)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything asked for. ``engine`` holds vLLM's options by dest, ``origin`` says where each value came from."""

    model: str | None
    launch: Launch
    engine: dict[str, object]
    engine_words: tuple[str, ...]  # the user's own flags, to be passed on as they are
    origin: dict[str, str]


SECRETS = {"api_key", "hf_token", "ssl_keyfile_password"}


def read_settings(
    argv: Sequence[str], environ: Mapping[str, str], *, read_text: Callable[[Path], str] = Path.read_text
) -> Settings:
    """Settings from all carriers.

    Raises:
        UsageError: an unknown name at any level, a value of the wrong kind, a file that cannot be read.
    """
    ours, words, path = _split(argv)
    path = path or environ.get("LAUNCH_CONFIG") or None
    origin: dict[str, str] = {}
    launch: dict[str, object] = {}
    model: str | None = None
    engine: dict[str, object] = {}
    if path:
        values, lines = _read_yaml(path, read_text)
        section = values.pop("launch", None) or {}
        if not isinstance(section, dict):
            raise UsageError(lines["launch"], "launch: is not a mapping", "put one setting a line below it")
        for key, value in section.items():
            where = lines.get(f"launch.{key}", path)
            launch[_field(str(key), str(key), where)] = value
            origin[f"launch.{key}"] = where
        model, engine = engine_args.from_mapping(values, lines)
        origin |= {dest: lines[key] for key in values if (dest := key.replace("-", "_")) in engine}
    for name, value in environ.items():
        if name.startswith("LAUNCH_") and name not in {"LAUNCH_CONFIG", "LAUNCH_GUARD_FILE"}:
            field = _from_environment(name, value)
            launch[field], origin[f"launch.{field}"] = value, f"environment {name}"
    for flag, value in ours:
        field = _field(flag.removeprefix("--launch-").replace("-", "_"), flag, "command line")
        launch[field], origin[f"launch.{field}"] = value, f"flag {flag}"
    given, flags = engine_args.parse(words)
    engine |= flags
    origin |= {dest: "command line" for dest in flags}
    settings = Settings(
        model=given or model,
        launch=_launch(launch, origin),
        engine=engine,
        engine_words=tuple(words),
        origin=origin,
    )
    _check(settings, environ)
    return settings


def _split(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str], str | None]:
    """Our own flags with their values, the words for vLLM, and --config's file."""
    ours: list[tuple[str, str]] = []
    words: list[str] = []
    path: str | None = None
    rest = iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        if flag != "--config" and not flag.startswith("--launch-"):
            words.append(word)
            continue
        boolean = Launch.__annotations__.get(flag.removeprefix("--launch-").replace("-", "_")) == "bool"
        if not equals:
            value = "true" if boolean else next(rest, "")
        if not value:
            raise UsageError(flag, "a value is missing", f"write {flag} VALUE")
        if flag == "--config":
            path = value
        else:
            ours.append((flag, value))
    return ours, words, path


def _field(name: str, said: str, where: str) -> str:
    field = name.replace("-", "_")
    if field not in Launch.__struct_fields__:
        raise UsageError(
            where, f"{said} is not a setting of the launcher", engine_args.nearest(field, Launch.__struct_fields__)
        )
    return field


def _from_environment(name: str, value: str) -> str:
    if value.startswith(("tcp://", "udp://")):
        raise UsageError(
            f"environment {name}",
            f"{value} is a Kubernetes service link, not a setting",
            "set enableServiceLinks: false in the pod, or do not name a Service `launch`",
        )
    known = [f"LAUNCH_{field.upper()}" for field in Launch.__struct_fields__]
    if name not in known:
        raise UsageError(f"environment {name}", "there is no such setting", engine_args.nearest(name, known))
    return name.removeprefix("LAUNCH_").lower()


def _launch(values: Mapping[str, object], origin: Mapping[str, str]) -> Launch:
    """Values of any carrier as typed settings; text from the environment and flags is read leniently ("8001", "true")."""
    found: dict[str, object] = {}
    for field, value in values.items():
        kind = Launch.__annotations__[field]
        if field == "allowed_routes" and isinstance(value, str):
            value = [route for route in value.replace(",", " ").split() if route]
        try:
            single = msgspec.convert({field: value}, Launch, strict=not isinstance(value, str))
        except msgspec.ValidationError as error:
            what = str(error).partition(" - at")[0]
            raise UsageError(
                origin[f"launch.{field}"], f"{field} cannot be {value!r}: {what}", f"give {kind}"
            ) from None
        found[field] = getattr(single, field)
    return Launch(**found)  # type: ignore[arg-type]  # each has just been converted to its field's type


class _Loader(yaml.SafeLoader):
    """YAML without aliases (a few lines can unfold to gigabytes) and without a key said twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not taken", problem_mark=mark)
        return super().compose_node(parent, index)


def _read_yaml(path: str, read_text: Callable[[Path], str]) -> tuple[dict[str, object], dict[str, str]]:
    """A config file's values, and for each key ("port", "launch.health_port") its place, "config.yaml line 3"."""
    try:
        text = read_text(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(path, f"cannot be read: {reason}", "name a YAML file with --config or LAUNCH_CONFIG") from None
    lines: dict[str, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(path, "is not a mapping of options", "write one `option: value` a line")
        _note_lines(node, path, "", lines)
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UsageError(f"{path} line {line}", f"not YAML: {error.problem}", "mend the line") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(path, f"not YAML: {error}", "mend the file") from None
    return {str(key): value for key, value in values.items()}, lines


def _note_lines(node: yaml.MappingNode, path: str, prefix: str, lines: dict[str, str]) -> None:
    for key, value in node.value:
        name, where = f"{prefix}{key.value}", f"{path} line {key.start_mark.line + 1}"
        if name in lines:
            raise UsageError(where, f"{key.value} is said a second time (first: {lines[name]})", "keep one of them")
        lines[name] = where
        if not prefix and name == "launch" and isinstance(value, yaml.MappingNode):
            _note_lines(value, path, "launch.", lines)


POSITIVE = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_num_seqs",
            "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes")  # fmt: skip


def _check(settings: Settings, environ: Mapping[str, str]) -> None:
    """What vLLM would refuse minutes later, or what cannot work at all."""
    engine, origin = settings.engine, settings.origin
    for dest in POSITIVE:
        if isinstance(value := engine.get(dest), int) and value < 1:
            raise UsageError(origin[dest], f"{dest} is {value}", "give 1 or more")
    share = engine.get("gpu_memory_utilization")
    if isinstance(share, float) and not 0 < share <= 1:
        raise UsageError(origin["gpu_memory_utilization"], f"gpu_memory_utilization is {share}", "give 0 < share <= 1")
    length = engine.get("max_model_len")
    if isinstance(length, int) and length < 1 and length != -1:
        raise UsageError(origin["max_model_len"], f"max_model_len is {length}", "give 1 or more, or auto")
    port = engine.get("port", API_PORT)
    if not isinstance(port, int) or not 1 <= port <= 65535:  # noqa: PLR2004
        raise UsageError(origin.get("port", "port"), f"port is {port}", "give 1 to 65535")
    if port == settings.launch.health_port:
        raise UsageError(
            origin.get("launch.health_port", origin.get("port", "port")),
            f"the API and the health endpoints both want port {port}",
            "change --port or --launch-health-port",
        )
    if "://" in environ.get("VLLM_PORT", ""):
        raise UsageError(
            "environment VLLM_PORT",
            f"{environ['VLLM_PORT']} is a Kubernetes service link and vLLM would read it as a port",
            "set enableServiceLinks: false in the pod, or do not name a Service `vllm`",
        )


def asked(settings: Settings, environ: Mapping[str, str]) -> Asked:
    """The part of it that the plan must take as given.

    Raises:
        UsageError: a value of a kind that the plan cannot count with.
    """
    known = {name: settings.engine[name] for name in Asked.__struct_fields__ if name in settings.engine}
    long = environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") not in {"", "0"} or "hf_overrides" in settings.engine
    try:
        return msgspec.convert({**known, "objective": settings.launch.objective, "long_max_model_len": long}, Asked)
    except msgspec.ValidationError as error:
        raise UsageError("settings", str(error), "give a value of that kind") from None
