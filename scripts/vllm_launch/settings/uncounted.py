"""Warns of options and variables that change vLLM's memory in a way that the plan does not compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vllm_launch.engine import speculative
from vllm_launch.engine.uncounted import SMALLER, UNCOUNTED_VARIABLES, uncounted
from vllm_launch.settings.settings import Settings

SPECULATIVE = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
"""Options that turn speculative decoding on."""


def warnings(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each such option and variable that the user set: where, what the plan ignores, the effect."""
    for dest, name, row in uncounted(settings.engine):
        key = name.partition(".")[2]
        where = f"{settings.origin[dest]}: {key}" if key else settings.origin[dest]
        yield f"{where}: the plan does not consider {row.what}, {row.effect}"
    if what := speculative.uncounted_memory(settings.engine):
        where = next(settings.origin[dest] for dest in SPECULATIVE if dest in settings.origin)
        yield f"{where}: the plan does not consider {what}, {SMALLER}"
    for name, row in UNCOUNTED_VARIABLES.items():
        if (value := environ.get(name)) is not None and value.strip() not in row.harmless:
            yield f"environment {name}={value}: the plan does not consider {row.what}, {row.effect}"
