"""What the person asked: flags over ``LAUNCH_*`` over config.yaml over defaults. Owns ports, paths and drain times."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from vllm_launch.engine import multicast, parse, removed, values
from vllm_launch.engine.options import nearest, options, pinned_vllm, redacted_values
from vllm_launch.errors import UsageError
from vllm_launch.inside_vllm.guard import FILE_VARIABLE
from vllm_launch.plan.fit import Asked

if TYPE_CHECKING:
    from vllm_launch.settings import (
        config_file,  # it loads PyYAML, which a start without a config file need not wait for
    )

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=86400)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
GUARD_FILE = "guard.json"
DRAIN_FLAG = "draining"
REFUSE_FLAG = "refusing"
"""Files in a run's folder: what the guard inside vLLM is told, and those whose presence says that connections are to
end with their next answer, and that new requests are turned away."""
CONFIG_VARIABLE = "LAUNCH_CONFIG"
LARGEST_TEXT = 1 << 24
"""Characters of a config file or a file of keys; /dev/zero has more."""
PATHS = frozenset({"cache_dir", "state_dir", "api_key_file", "termination_log"})
"""Settings in which ~ is HOME, as a shell would have it: a file and Compose's variables see none."""
INTERNAL_VARIABLES = frozenset({CONFIG_VARIABLE, FILE_VARIABLE})
"""``LAUNCH_*`` that are no settings: the config file's place, and what the launcher tells the guard inside vLLM."""


class Drain(msgspec.Struct, frozen=True):
    """The one drain number, ``total`` seconds from SIGTERM to the end of the last process, in its parts.

    At first readiness is off while requests are still served (``delay``: load balancers take some seconds to notice),
    then vLLM refuses new ones and finishes those under way (``shutdown_timeout``, whole seconds as vLLM takes them),
    and the rest is for processes to go (``margin``). 0 ends everything at once.
    """

    total: int

    @property
    def delay(self) -> float:
        """Seconds: 15, or a sixth of a short drain."""
        return min(15.0, self.total / 6)

    @property
    def shutdown_timeout(self) -> int:
        """Seconds for vLLM's ``--shutdown-timeout``."""
        return int(self.total - 2 * self.delay)

    @property
    def margin(self) -> float:
        """Seconds: what is left, about as long as ``delay``."""
        return self.total - self.delay - self.shutdown_timeout


class Launch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The launcher's own settings.

    Every field has three spellings: ``health_port`` is ``launch: {health_port: 8001}`` in config.yaml,
    ``LAUNCH_HEALTH_PORT`` in the environment and ``--launch-health-port`` on the command line.
    """

    objective: Literal["throughput", "latency"] = "throughput"
    """throughput: the fewest GPUs a replica needs, then more replicas; latency: the widest TP that the model allows."""
    quality: Literal["lossless", "fp8-kv"] = "lossless"
    """lossless: answers are what the model's own dtypes give; fp8-kv: the plan may keep the KV cache in FP8."""
    nvlink_multicast: Literal["auto", "off"] = "auto"
    """off: NCCL, PyTorch, NVSHMEM and vLLM leave it alone; auto: off where the environment says so to one of them."""
    health_host: Text = "0.0.0.0"  # noqa: S104 - probes come from outside the container
    """Address that /livez, /readyz, /startupz and /metrics of the launcher listen on."""
    health_port: Port = 8001
    """Port of the same."""
    drain_seconds: Seconds = 90
    """Seconds from SIGTERM to the end of everything; grace periods of carriers must be as long. 0: end at once."""
    cache_dir: Text | None = None
    """Folder for every cache, and for HOME where that cannot be written. Default: below HOME, or else state_dir."""
    state_dir: Text | None = None
    """Folder for what one run needs on disk. Default: below XDG_RUNTIME_DIR, or a fresh temporary one."""
    api_key_file: Text | None = None
    """File of the API keys that clients may use, one a line, besides those of --api-key or VLLM_API_KEY."""
    allowed_routes: tuple[Text, ...] = ()
    """Routes that are served, with all that lies below them; in text separated by commas. None given: every route."""
    start_stall_seconds: Seconds = 600
    """Seconds without any progress after which a start is ended. 0: never."""
    stall_seconds: Seconds = 300
    """Seconds from the last step of an engine that hangs until it is ended; 4/5 of it until not ready. 0: never."""
    gpu_fault_kills: bool = False
    """Let /livez fail too at a fatal GPU fault (Xid, lost GPU), so that Kubernetes starts the container again."""
    p2p_check: Literal["auto", "off", "disable"] = "auto"
    """auto: try copies between the GPUs of a replica and believe those; off: believe NVML; disable: use no P2P."""
    greet: bool = False
    """Stream one answer to the terminal when ready."""
    termination_log: Text = "/dev/termination-log"
    """File for the reason of a failure, where Kubernetes reads it; written only where it already exists."""

    @property
    def drain(self) -> Drain:
        """``drain_seconds`` in its parts."""
        return Drain(self.drain_seconds)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything asked for, by whichever carrier.

    ``engine`` has vLLM's options that the person set, by dest and typed as vLLM types them; ``origin`` says where each
    came from ("flag --port", "config.yaml line 12", "environment LAUNCH_HEALTH_PORT"), under the dest, under
    "launch.<field>" or under "model". Never print it but through ``redacted``.
    """

    model: str
    launch: Launch
    engine: Mapping[str, object]
    origin: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    long_max_model_len: bool = False  # VLLM_ALLOW_LONG_MAX_MODEL_LEN, which vLLM reads from the environment alone
    estimate_cudagraphs: bool | None = None  # VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS, likewise
    cpu_kv_cache_bytes: int | None = None  # VLLM_CPU_KVCACHE_SPACE, as above, there in GiB
    no_multicast: str | None = None  # who forbids NVLink multicast, as the person would find it

    @property
    def port(self) -> int:
        """The API's port; vLLM's default where none is set."""
        port = self.engine.get("port", options()["port"].default)
        assert isinstance(port, int)  # noqa: S101 - an int option
        return port

    @property
    def shutdown_timeout(self) -> int:
        """Seconds that vLLM may take to finish what it has begun."""
        given = self.engine.get("shutdown_timeout")
        return given if isinstance(given, int) else self.launch.drain.shutdown_timeout

    @property
    def url(self) -> str:
        """Where this machine reaches vLLM's server, without a slash at the end."""
        host = str(self.engine.get("host") or "127.0.0.1")
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        return f"{'https' if self.engine.get('ssl_certfile') else 'http'}://{host}:{self.port}"


def redacted(settings: Settings) -> Settings:
    """The same with every secret as "***": what may be printed."""
    return msgspec.structs.replace(settings, engine=redacted_values(settings.engine))


def read_text(path: Path) -> str:
    """A file's text as UTF-8, with or without a byte order mark.

    Raises:
        OSError: it cannot be read, or is far too large for what a person writes.
        ValueError: it is not UTF-8.
    """
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return text


def read_settings(
    argv: Sequence[str], environ: Mapping[str, str], *, read_file: Callable[[Path], str] = read_text
) -> Settings:
    """Settings from the words after ``serve`` or ``plan``, the environment, and the file one of them names.

    Raises:
        UsageError: an unknown name at any level, a value of the wrong kind, values that cannot go together, a file that
            cannot be read or is not YAML, no model.
    """
    ours, words, path = _split(argv)
    path = path or environ.get(CONFIG_VARIABLE) or None
    launch: dict[str, object] = {}
    engine: dict[str, object] = {}
    origin: dict[str, str] = {}
    if path is not None:
        from vllm_launch.settings import config_file  # noqa: PLC0415 - as above

        _take_file(config_file.read(path, read_file), launch, engine, origin)
    overridden = []
    for name in sorted(name for name in environ if name.startswith("LAUNCH_") and name not in INTERNAL_VARIABLES):
        field = _field_of_variable(name, environ[name])
        if (place := origin.get(f"launch.{field}")) is not None:
            overridden.append(f"environment {name}: {environ[name]} counts, and not what {place} says")
        launch[field], origin[f"launch.{field}"] = environ[name], f"environment {name}"
    for field, (flag, value) in ours.items():
        launch[field], origin[f"launch.{field}"] = value, f"flag {flag}"
    said = parse.parse(words)
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
    _check(settings, environ)
    return msgspec.structs.replace(settings, warnings=(*overridden, *_warnings(settings)))


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
    return int(gib or 0) << 30 or None


# ---- carriers


def _split(argv: Sequence[str]) -> tuple[dict[str, tuple[str, str]], list[str], str | None]:
    """Our own flags as {field: (flag, text)}, the words for vLLM, and the file of --config."""
    ours: dict[str, tuple[str, str]] = {}
    words: list[str] = []
    path: str | None = None
    rest = iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        denied = flag.startswith("--no-launch-")
        if flag != "--config" and not flag.startswith("--launch-") and not denied:
            words.append(_for_vllm(word, flag))
            continue
        field = None
        if flag != "--config":
            field = _field(flag.removeprefix("--no" if denied else "-").lstrip("-").removeprefix("launch-"), flag)
        if field and Launch.__annotations__[field] == "bool" and not equals:
            value = "false" if denied else "true"
        elif denied:
            raise UsageError(flag, "cannot be denied", f"write --{flag.removeprefix('--no-')} VALUE, or leave it out")
        elif not equals:
            value = next(rest, "")
        if not value:
            raise UsageError(flag, "its value is missing", f"write {flag} VALUE")
        if path is not None if field is None else field in ours:
            raise UsageError(flag, "is given twice", "keep one")
        if field is None:
            path = value
        else:
            ours[field] = (flag, value)
    return ours, words, path


def _for_vllm(word: str, flag: str) -> str:
    if flag.startswith("--") and flag[2:].replace("-", "_") in Launch.__struct_fields__:
        raise UsageError(flag, "is a setting of the launcher, not of vLLM", f"write --launch-{flag[2:]}")
    return word


def _field(name: str, where: str, known: Callable[[str], str] | None = None) -> str:
    field = name.replace("-", "_")
    if field not in Launch.__struct_fields__:
        if field in options() and f"{field}_file" not in Launch.__struct_fields__:
            flag = options()[field].flags[0]
            remedy = f"write {flag}, or {field} in the config file without launch:"
            raise UsageError(where, f"{name} is vLLM's and no setting of the launcher", remedy)
        spelt = known or (lambda field: f"--launch-{field.replace('_', '-')}")
        close = nearest(spelt(field), [spelt(field) for field in Launch.__struct_fields__])
        raise UsageError(where, f"the launcher has no setting {name}", close)
    return field


SERVICE_LINK = re.compile(r"LAUNCH_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_(TCP|UDP|SCTP)\w*)")


def _field_of_variable(name: str, value: str) -> str:
    if SERVICE_LINK.fullmatch(name) or re.match(r"(tcp|udp|sctp)://", value):
        raise UsageError(
            f"environment {name}",
            "comes from Kubernetes (a link to a Service called launch…) and is no setting",
            "set enableServiceLinks: false in the pod, or give the Service another name",
        )
    return _field(name.removeprefix("LAUNCH_").lower(), f"environment {name}", lambda field: f"LAUNCH_{field.upper()}")


def _take_file(
    file: config_file.ConfigFile, launch: dict[str, object], engine: dict[str, object], origin: dict[str, str]
) -> None:
    kinds = get_type_hints(Launch)
    for key, value in file.values.items():
        where = file.where((key,))
        if key == "launch":
            for name, setting in _section(value, where).items():
                place = file.where((key, name))
                field = _field(name, place, lambda field: field)
                if setting is None:
                    raise UsageError(place, f"{name} says nothing", "give a value, or leave the key out")
                if (first := origin.get(f"launch.{field}")) is not None:
                    raise UsageError(place, f"{name} is said twice (first: {first})", "keep one of them")
                off = setting is False and "off" in get_args(kinds[field])  # YAML 1.1 reads a bare off as false
                launch[field], origin[f"launch.{field}"] = "off" if off else setting, place
            continue
        if re.sub("[-.]", "_", key).removeprefix("launch_") in Launch.__struct_fields__:
            raise UsageError(where, f"{key} is a setting of the launcher", "write it below launch:, further in")
        option = values.option_of("model" if key in {"model-tag", "model_tag"} else key, where)
        if option.dest == "config":
            raise UsageError(where, "a config file cannot name another", "write it all in one")
        if option.dest in origin:
            raise UsageError(where, f"{key} is said twice (first: {origin[option.dest]})", "keep one of them")
        origin[option.dest] = where
        if value != []:  # vLLM's own --config passes an empty list over
            engine[option.dest] = values.validate_value(option, value, where)


def _section(value: object, where: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(where, "launch is not a mapping of settings", "write one `setting: value` a line below it")
    for name in value:
        if not isinstance(name, str):
            raise UsageError(where, f"launch holds {name!r}, which is no name of a setting", "write `setting: value`")
    return value


def _launch(values: Mapping[str, object], origin: Mapping[str, str]) -> Launch:
    """Typed settings; text, as the environment and flags give it, is read leniently ("8001", "true", "/a,/b")."""
    found: dict[str, object] = {}
    kinds = get_type_hints(Launch, include_extras=True)
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
    return msgspec.convert(found, Launch)


def _wanted(kind: Any) -> str:
    """What a setting of this type takes, as a remedy."""
    if get_origin(kind) is Literal:
        return f"give {' or '.join(get_args(kind))}"
    if kind is bool:
        return "give true or false"
    if get_origin(kind) is tuple:
        return "give routes such as /v1/chat, with commas between them"
    bounds = next((part for part in getattr(kind, "__metadata__", ()) if part.ge is not None), None)
    return f"give a whole number from {bounds.ge} to {bounds.le}" if bounds else "give text, and not nothing"


# ---- what cannot work


COUNTS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_num_seqs",
          "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes")  # fmt: skip
EXECUTORS = ("mp", "ray", "uni", "external_launcher")
"""vllm/v1/executor/abstract.py:Executor.get_class."""
NO_HTTP = {"grpc": "gRPC", "headless": "no API at all", "uds": "a Unix socket"}


def _check(settings: Settings, environ: Mapping[str, str]) -> None:
    """Refuse now what vLLM would refuse minutes later, and what would run unwatched or unprotected."""
    for dest, what, remedy in _mistakes(settings):
        raise UsageError(settings.origin.get(dest, dest), what, remedy)
    port = environ.get("VLLM_PORT", "0")
    if "://" in port:
        raise UsageError(
            "environment VLLM_PORT",
            "comes from Kubernetes (a link to a Service called vllm), and vLLM would read it as a port",
            "set enableServiceLinks: false in the pod, or give the Service another name",
        )
    if not (port.isascii() and port.isdecimal()):  # vllm/envs.py:get_vllm_port
        remedy = "give a whole number, or unset it: it is for vLLM's own processes, and the API's port is --port"
        raise UsageError("environment VLLM_PORT", f"{port!r} is not a whole number", remedy)


def _mistakes(settings: Settings) -> Iterator[tuple[str, str, str]]:  # noqa: C901, PLR0912 - a list of rules, two lines each
    """(Key of ``origin``, what, remedy) of each value that cannot be, or cannot be with another."""
    engine, launch, port = settings.engine, settings.launch, settings.port
    whole = {dest: value for dest, value in engine.items() if isinstance(value, int)}
    share, length, keys = engine.get("gpu_memory_utilization"), whole.get("max_model_len", 1), engine.get("api_key")
    for dest in COUNTS:
        if whole.get(dest, 1) < 1:
            yield dest, f"{dest} is {whole[dest]}", "give 1 or more"
    if isinstance(share, float) and not 0 < share <= 1:
        yield "gpu_memory_utilization", f"gpu_memory_utilization is {share}", "give a share above 0, at most 1"
    if length < 1 and length != -1:
        yield "max_model_len", f"max_model_len is {length}", "give 1 or more, or auto"
    if not 1 <= port <= 65535:  # noqa: PLR2004 - TCP's
        yield "port", f"port is {port}", "give 1 to 65535"
    if port == launch.health_port:
        where = "launch.health_port" if "launch.health_port" in settings.origin else "port"
        yield where, f"the API and the health endpoints both want port {port}", "change one of them"
    if whole.get("max_num_batched_tokens", 1 << 30) < whole.get("max_num_seqs", 1):
        what = f"max_num_seqs {whole['max_num_seqs']} is more than max_num_batched_tokens"
        yield "max_num_seqs", what, "lower one or raise the other: every request needs a token in a batch"
    if whole.get("shutdown_timeout", 0) < 0:
        yield "shutdown_timeout", f"shutdown_timeout is {whole['shutdown_timeout']}", "give 0 or more seconds"
    for dest in ("hf_overrides", "speculative_config"):
        if engine.get(dest) is not None and not isinstance(engine[dest], dict):
            yield dest, f"{dest} is not a JSON object", values.OBJECT
    method = str(engine.get("quantization") or "").lower()
    if method in removed.REMOVED_METHODS:
        what = f"vLLM {pinned_vllm()} no longer has the method {method!r}"
        yield "quantization", what, removed.REMOVED_METHODS[method]
    backend = str(engine.get("distributed_executor_backend") or EXECUTORS[0])
    if backend not in EXECUTORS and "." not in backend:
        what, known = f"{backend!r} is no way to run workers", ", ".join(EXECUTORS)
        yield "distributed_executor_backend", what, f"give {known} or the dotted name of a class"
    for dest in NO_HTTP.keys() & {dest for dest, value in engine.items() if value}:
        what = f"vLLM would serve {NO_HTTP[dest]}, and the launcher watches it over HTTP"
        yield dest, what, "start vLLM itself for that"
    if isinstance(ids := engine.get("device_ids"), list):
        what = "the plan chooses among the GPUs that it sees, and these would be counted among its choice"
        yield "device_ids", what, f"set CUDA_VISIBLE_DEVICES={','.join(map(str, ids))} instead"
    if settings.no_multicast and multicast.fuses(engine.get("compilation_config")):
        what = f"{multicast.FUSION} uses NVLink multicast, which {settings.no_multicast} forbids"
        yield "compilation_config", what, f"leave {multicast.FUSION} out, or allow multicast"
    if settings.no_multicast and engine.get("all2all_backend") in multicast.ALL2ALL:
        what = f"{engine['all2all_backend']} uses NVLink multicast, which {settings.no_multicast} forbids"
        yield "all2all_backend", what, "take another way, or allow multicast"
    if engine.get("ssl_keyfile") and not engine.get("ssl_certfile"):
        yield "ssl_keyfile", "a key without a certificate is of no use", "set ssl_certfile too"
    if isinstance(keys, list) and not all(keys):
        yield "api_key", "a key is empty, and vLLM would serve without asking for any", "give a key, or leave it out"
    for route in launch.allowed_routes:
        if not route.startswith("/"):
            yield "launch.allowed_routes", f"the route {route!r} does not begin with /", f"write it as /{route}"


def _warnings(settings: Settings) -> tuple[str, ...]:
    return (*_late_stop(settings), *_uncounted(settings))


def _late_stop(settings: Settings) -> Iterator[str]:
    timeout, drain = settings.engine.get("shutdown_timeout"), settings.launch.drain
    if isinstance(timeout, int) and timeout + drain.delay > drain.total:
        where = settings.origin["shutdown_timeout"]
        what = f"{timeout} s do not fit into drain_seconds, {drain.total} s with {drain.delay:g} s of delay before"
        yield f"{where}: {what}; streams will be cut when drain_seconds are over"


def _uncounted(settings: Settings) -> Iterator[str]:
    """What the plan cannot know the memory of, so that its KV cache is larger than the one that vLLM will have."""
    drafts = settings.engine.get("speculative_config")
    if isinstance(drafts, dict) and "ngram" not in str(drafts.get("method", "")):
        where = settings.origin["speculative_config"]
        yield (
            f"{where}: the memory of what drafts, its weights and its cache, is not in the plan: the KV cache will be "
            "smaller; set --max-model-len if vLLM then refuses the planned one"
        )


# ---- what others need of it


def asked(settings: Settings) -> Asked:
    """What the plan must take as given."""
    engine = settings.engine
    known = {name: engine[name] for name in Asked.__struct_fields__ if engine.get(name) is not None}
    known["objective"] = settings.launch.objective
    known["fp8_kv"] = settings.launch.quality == "fp8-kv"
    fused = multicast.fuses(engine.get("compilation_config"))
    known["fuse_allreduce_rms"] = not settings.no_multicast and fused is not False
    known["cpu_kv_cache_bytes"] = settings.cpu_kv_cache_bytes
    known["estimate_cudagraphs"] = settings.estimate_cudagraphs
    known["long_max_model_len"] = settings.long_max_model_len or bool(engine.get("hf_overrides"))
    return msgspec.convert(known, Asked)


def read_api_keys(
    settings: Settings, environ: Mapping[str, str], *, read_file: Callable[[Path], str] = read_text
) -> tuple[str, ...]:
    """The keys that clients may use; empty: no key is asked for.

    Those of api_key_file, and of --api-key or, where that is not set, VLLM_API_KEY
    (vllm/entrypoints/serve/middleware/register.py has the same order).

    Raises:
        UsageError: the file cannot be read or has no usable key: to serve without keys must not come of a mistake.
    """
    given = settings.engine.get("api_key") or [environ.get("VLLM_API_KEY", "")]
    assert isinstance(given, list)  # noqa: S101 - nargs "+"
    keys = _usable([str(key) for key in given if key], settings.origin.get("api_key", "environment VLLM_API_KEY"))
    if (path := settings.launch.api_key_file) is not None:
        where = f"{settings.origin.get('launch.api_key_file', 'api_key_file')} ({path})"
        from vllm_launch.settings import config_file  # noqa: PLC0415 - as above

        text = config_file.text_of(path, where, read_file, "name a file that holds a key a line")
        in_file = [line.strip() for line in text.splitlines() if line.strip()]
        if not in_file:
            raise UsageError(where, "the file holds no key", "write one key a line")
        keys += _usable(in_file, where)
    return tuple(dict.fromkeys(keys))


def _usable(keys: list[str], where: str) -> list[str]:
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        what = "an API key holds a space or a character beyond ASCII, which HTTP headers cannot carry"
        raise UsageError(where, what, "make another, such as `openssl rand -hex 32` does")
    return keys
