"""The numbers of alerts and objectives, from thresholds.yaml and from a user's file that changes some of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import yaml

from vllm_health import metrics

SHIPPED: Final = Path(__file__).parents[1] / "thresholds.yaml"
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
"""Seconds of each unit of a duration."""
_DURATION: Final = re.compile(r"(\d+)([smhd])")
LATENCIES: Final = {
    "time_to_first_token": metrics.TIME_TO_FIRST_TOKEN,
    "time_per_output_token": metrics.TIME_PER_OUTPUT_TOKEN,
}
"""The histogram of each latency objective."""

BURN_ALERTS: Final = {
    "availability": "VLLMAvailabilityBurn",
    "time_to_first_token": "VLLMTimeToFirstTokenBurn",
    "time_per_output_token": "VLLMTimePerOutputTokenBurn",
}
"""The alert on each objective's error budget."""

Severity = Literal["page", "ticket"]


class ThresholdError(Exception):
    """A mistake in a thresholds file. The message is one line: where, what is wrong, what to do."""


class Objective(msgspec.Struct, frozen=True):
    """A service level objective.

    ``objective``: share of requests that must meet it. ``seconds``: upper bound of a latency, one of
    ``metrics.BUCKETS``, or None for availability.
    """

    objective: float
    seconds: float | None = None

    @property
    def budget(self) -> float:
        """Return the error budget: the share of requests that may miss the objective."""
        return 1 - self.objective


class Burn(msgspec.Struct, frozen=True, rename={"duration": "for"}):
    """A burn rate alert. It fires if the error budget burns ``rate`` times too fast over both windows."""

    severity: Severity
    rate: float
    long: str
    short: str
    duration: str


class Slo(msgspec.Struct, frozen=True):
    """The objectives and their burn rate alerts."""

    availability: Objective
    time_to_first_token: Objective
    time_per_output_token: Objective
    least_requests: float
    burn: tuple[Burn, ...]

    def objectives(self) -> dict[str, Objective]:
        """Return the objectives by name. The name is the value of the label ``slo``."""
        return {name: getattr(self, name) for name in ("availability", *LATENCIES)}


class Limit(msgspec.Struct, frozen=True, rename={"duration": "for"}):
    """The numbers of one alert. The shipped file says which of the fields an alert has."""

    severity: Severity
    duration: str
    within: str = ""
    seconds: float = 0.0
    share: float = 0.0
    usage: float = 0.0
    restarts: float = 0.0
    per_minute: float = 0.0


class Thresholds(msgspec.Struct, frozen=True):
    """All thresholds. ``runbooks`` is the URL of the folder of runbooks, or "" if they are not published."""

    runbooks: str
    slo: Slo
    alerts: Mapping[str, Limit]

    def runbook(self, alert: str) -> str:
        """Return the URL of an alert's runbook, or "" if the runbooks are not published."""
        return f"{self.runbooks}/{alert}.md" if self.runbooks else ""


def seconds(duration: str) -> int:
    """Return the seconds of a Prometheus duration: "15m" is 900."""
    number, unit = _DURATION.fullmatch(duration).groups()  # type: ignore[union-attr]  # read() checked it
    return int(number) * _UNITS[unit]


def read(path: Path = SHIPPED) -> Thresholds:
    """Return the shipped thresholds with the changes in the file ``path``.

    Raises:
        ThresholdError: ``path`` cannot be read, or it has a mistake.
    """
    shipped = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    try:
        changes = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ThresholdError(f"{path}: cannot be read: {reason}; name a YAML file such as {SHIPPED.name}") from None
    merged = _merged(shipped, {} if changes is None else changes, str(path))
    thresholds = msgspec.convert(merged, Thresholds, strict=False)
    _check(thresholds, str(path))
    return thresholds


def _merged(shipped: Any, changes: Any, where: str) -> Any:
    """Return ``shipped`` with ``changes``. ``shipped`` defines the known names and the type of each value.

    Raises:
        ThresholdError: ``changes`` has an unknown name or a value of another type.
    """
    if isinstance(shipped, dict):
        if not isinstance(changes, dict):
            raise ThresholdError(f"{where}: {changes!r} is not a mapping; write some of {', '.join(shipped)} below it")
        for name in changes:
            if name not in shipped:
                near = difflib.get_close_matches(str(name), shipped, 1) or list(shipped)
                raise ThresholdError(f"{where}: {name!r} is not known; did you mean {' or '.join(near)}?")
        return {
            name: _merged(value, changes[name], f"{where}: {name}") if name in changes else value
            for name, value in shipped.items()
        }
    if isinstance(shipped, list):
        if not isinstance(changes, list) or not changes or not all(isinstance(entry, dict) for entry in changes):
            raise ThresholdError(f"{where}: {changes!r} is not a list of windows; write them as in {SHIPPED.name}")
        return [_complete_entry(shipped[0], entry, f"{where}: {number}") for number, entry in enumerate(changes, 1)]
    return _checked_value(shipped, changes, where)


def _complete_entry(shipped: dict[str, Any], entry: dict[str, Any], where: str) -> Any:
    """Return an entry of a list. It must have every name, because an entry has no defaults."""
    if missing := [name for name in shipped if name not in entry]:
        raise ThresholdError(f"{where}: {missing[0]} is missing; add it, such as {missing[0]}: {shipped[missing[0]]}")
    return _merged(shipped, entry, where)


def _checked_value(shipped: Any, value: Any, where: str) -> Any:
    """Return ``value`` if it is of the same kind as the shipped value."""
    if isinstance(shipped, int | float):
        valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        kind = "a number, 0 or more"
    elif _DURATION.fullmatch(shipped):
        valid, kind = isinstance(value, str) and bool(_DURATION.fullmatch(value)), "a time such as 30s, 15m, 6h or 3d"
    elif shipped in {"page", "ticket"}:
        valid, kind = value in {"page", "ticket"}, "a severity (page or ticket)"
    else:
        valid, kind = isinstance(value, str) and (not value or value.startswith(("http://", "https://"))), "a URL"
    if not valid:
        raise ThresholdError(f"{where}: {value!r} is not {kind}; the shipped value is {shipped}")
    return value


def _check(thresholds: Thresholds, where: str) -> None:
    """Raise ThresholdError for a number with which an alert would fire never or always."""
    _check_objectives(thresholds, where)
    for number, burn in enumerate(thresholds.slo.burn, 1):
        if seconds(burn.long) <= seconds(burn.short) or seconds(burn.short) < _UNITS["m"] * 5:
            windows = f"long {burn.long} and short {burn.short}"
            raise ThresholdError(
                f"{where}: slo: burn: {number}: {windows}; short must be 5m or more, and long longer than short"
            )
    for name, limit in thresholds.alerts.items():
        for field in ("share", "usage"):
            if not 0 <= (share := getattr(limit, field)) <= 1:
                raise ThresholdError(f"{where}: alerts: {name}: {field}: {share:g} is not a share; write 0 to 1")
        if limit.within and not seconds(limit.within):
            raise ThresholdError(f"{where}: alerts: {name}: within: 0s is an empty window; write such as 5m")


def _check_objectives(thresholds: Thresholds, where: str) -> None:
    """Raise ThresholdError for an objective that no alert can watch."""
    fastest = max(burn.rate for burn in thresholds.slo.burn)
    for name, slo in thresholds.slo.objectives().items():
        place = f"{where}: slo: {name}"
        if not 0 < slo.objective < 1:
            raise ThresholdError(f"{place}: objective: {slo.objective:g} is not between 0 and 1; write such as 0.99")
        if fastest * slo.budget >= 1:
            raise ThresholdError(
                f"{place}: objective: {slo.objective:g} is too low: an alert at {fastest:g} times its budget can never "
                f"fire; write more than {1 - 1 / fastest:.3f}, or a lower rate in slo: burn"
            )
        if name in LATENCIES and slo.seconds not in (bounds := metrics.BUCKETS[LATENCIES[name]]):
            nearest = sorted(bounds, key=lambda bound: abs(bound - (slo.seconds or 0)))[:2]
            raise ThresholdError(
                f"{place}: seconds: {slo.seconds:g} is not a bucket of {LATENCIES[name]}, so the share of faster "
                f"requests is unknown; write {' or '.join(f'{bound:g}' for bound in sorted(nearest))}"
            )
