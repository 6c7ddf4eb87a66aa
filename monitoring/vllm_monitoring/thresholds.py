"""The numbers that alerts and objectives hang on, from thresholds.yaml and what a person's own file changes of it."""

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
_DURATION: Final = re.compile(r"(\d+)([smhd])")
LATENCIES: Final = {
    "time_to_first_token": metrics.TIME_TO_FIRST_TOKEN,
    "time_per_output_token": metrics.TIME_PER_OUTPUT_TOKEN,
}
"""The histogram that each objective of a latency is read from."""

BURN_ALERTS: Final = {
    "availability": "VLLMAvailabilityBurn",
    "time_to_first_token": "VLLMTimeToFirstTokenBurn",
    "time_per_output_token": "VLLMTimePerOutputTokenBurn",
}
"""The alert that tells of each objective."""

Severity = Literal["page", "ticket"]


class ThresholdError(Exception):
    """One line: where, what, what to do."""


class Objective(msgspec.Struct, frozen=True):
    """``objective`` is a share of requests; ``seconds`` the bound of a latency, one of ``metrics.BUCKETS``."""

    objective: float
    seconds: float | None = None

    @property
    def budget(self) -> float:
        """The share of requests that may miss it."""
        return 1 - self.objective


class Burn(msgspec.Struct, frozen=True, rename={"held": "for"}):
    """A pair of windows over which the budget of errors may not be used up ``rate`` times too fast."""

    severity: Severity
    rate: float
    long: str
    short: str
    held: str


class Slo(msgspec.Struct, frozen=True):
    """Objectives, and when one is in danger."""

    availability: Objective
    time_to_first_token: Objective
    time_per_output_token: Objective
    least_requests: float
    burn: tuple[Burn, ...]

    def objectives(self) -> dict[str, Objective]:
        """By name, as the label ``slo`` has it."""
        return {name: getattr(self, name) for name in ("availability", *LATENCIES)}


class Limit(msgspec.Struct, frozen=True, rename={"held": "for"}):
    """What one alert hangs on; which numbers it has is as in the shipped file."""

    severity: Severity
    held: str
    within: str = ""
    seconds: float = 0.0
    share: float = 0.0
    usage: float = 0.0
    restarts: float = 0.0
    per_minute: float = 0.0


class Thresholds(msgspec.Struct, frozen=True):
    """All of it."""

    runbooks: str
    slo: Slo
    alerts: Mapping[str, Limit]

    def runbook(self, alert: str) -> str:
        """The URL where somebody on call reads what to do."""
        return f"{self.runbooks}/{alert}.md"


def seconds(duration: str) -> int:
    """Of a time as Prometheus writes it: "15m" is 900."""
    number, unit = _DURATION.fullmatch(duration).groups()  # type: ignore[union-attr]  # checked when it was read
    return int(number) * _UNITS[unit]


def read(path: Path = SHIPPED) -> Thresholds:
    """The shipped thresholds with what ``path`` changes of them. Raises ThresholdError."""
    shipped = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ThresholdError(f"{path}: cannot be read: {what}; name a file of YAML such as {SHIPPED.name}") from None
    found = msgspec.convert(_merged(shipped, {} if given is None else given, str(path)), Thresholds, strict=False)
    _check(found, str(path))
    return found


def _merged(shipped: Any, given: Any, where: str) -> Any:
    """``given`` over ``shipped``, which shows what is known and of which kind it is."""
    if isinstance(shipped, dict):
        if not isinstance(given, dict):
            raise ThresholdError(f"{where}: {given!r} is no mapping; write some of {', '.join(shipped)} below it")
        for name in given:
            if name not in shipped:
                near = difflib.get_close_matches(str(name), shipped, 1) or list(shipped)
                raise ThresholdError(f"{where}: {name!r} is not known; did you mean {' or '.join(near)}?")
        return {
            name: _merged(value, given[name], f"{where}: {name}") if name in given else value
            for name, value in shipped.items()
        }
    if isinstance(shipped, list):
        if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
            raise ThresholdError(f"{where}: {given!r} is no list of windows; write them as in {SHIPPED.name}")
        return [_whole(shipped[0], one, f"{where}: {place}") for place, one in enumerate(given, 1)]
    return _one(shipped, given, where)


def _whole(shipped: dict[str, Any], given: dict[str, Any], where: str) -> Any:
    """An entry of a list, which has nothing to fall back upon."""
    if missing := [name for name in shipped if name not in given]:
        raise ThresholdError(f"{where}: {missing[0]} is missing; write it, such as {missing[0]}: {shipped[missing[0]]}")
    return _merged(shipped, given, where)


def _one(shipped: Any, given: Any, where: str) -> Any:
    if isinstance(shipped, int | float):
        good = isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given < float("inf")
        kind = "number, 0 or more"
    elif _DURATION.fullmatch(shipped):
        good, kind = isinstance(given, str) and bool(_DURATION.fullmatch(given)), "time such as 30s, 15m, 6h or 3d"
    elif shipped in {"page", "ticket"}:
        good, kind = given in {"page", "ticket"}, "severity: write page or ticket"
    else:
        good, kind = isinstance(given, str) and given.startswith(("http://", "https://")), "URL"
    if not good:
        raise ThresholdError(f"{where}: {given!r} is no {kind}; the shipped value is {shipped}")
    return given


def _check(found: Thresholds, where: str) -> None:
    """What would make an alert that never fires, or always."""
    _check_objectives(found, where)
    for number, burn in enumerate(found.slo.burn, 1):
        if seconds(burn.long) <= seconds(burn.short) or seconds(burn.short) < _UNITS["m"] * 5:
            what = f"long {burn.long} and short {burn.short}"
            raise ThresholdError(f"{where}: slo: burn: {number}: {what}; short is 5m or more, long is longer")
    for name, limit in found.alerts.items():
        for share in ("share", "usage"):
            if not 0 <= getattr(limit, share) <= 1:
                raise ThresholdError(f"{where}: alerts: {name}: {share}: {getattr(limit, share):g} is no share; 0 to 1")
        if limit.within and not seconds(limit.within):
            raise ThresholdError(f"{where}: alerts: {name}: within: 0s looks at nothing; write such as 5m")


def _check_objectives(found: Thresholds, where: str) -> None:
    fastest = max(burn.rate for burn in found.slo.burn)
    for name, slo in found.slo.objectives().items():
        place = f"{where}: slo: {name}"
        if not 0 < slo.objective < 1:
            raise ThresholdError(f"{place}: objective: {slo.objective:g} is no share between 0 and 1; such as 0.99")
        if fastest * slo.budget >= 1:
            what = f"objective: {slo.objective:g} lets no alert at {fastest:g} times its budget ever fire"
            raise ThresholdError(f"{place}: {what}; take more than {1 - 1 / fastest:.3f}, or a lower rate in slo: burn")
        if name in LATENCIES and slo.seconds not in (known := metrics.BUCKETS[LATENCIES[name]]):
            near = sorted(known, key=lambda bound: abs(bound - (slo.seconds or 0)))[:2]
            what = (
                f"seconds: {slo.seconds:g} is no bucket of {LATENCIES[name]}, so it is not known how many were faster"
            )
            raise ThresholdError(f"{place}: {what}; take {' or '.join(f'{bound:g}' for bound in sorted(near))}")
