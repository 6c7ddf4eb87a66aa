"""Every threshold, every comparison and every and/or/unless of the alerts, changed once: some case must notice."""

from __future__ import annotations

import copy
import os
import re
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import yaml
from cases import ALERT_OF, EVERY
from near_misses import NEAR_MISSES
from promtool import run
from some_rules import kept

from vllm_health import metrics
from vllm_monitoring import rules, thresholds
from vllm_monitoring.thresholds import Thresholds

pytestmark = [pytest.mark.timeout(1200), pytest.mark.long]
GROUPS = rules.groups(thresholds.read())["groups"]
OPPOSITE = {">": "<", ">=": "<", "<": ">", "==": "!=", "and": "or", "or": "and", "unless": "and"}
BOUNDARY = {">": ">=", ">=": ">", "<": "<="}
OPERATOR = re.compile(r"(?<=[\s)])(>=|<=|==|>|<|and|or|unless)(?=\s)")
QUOTIENTS = {*ALERT_OF.values(), "VLLMQueueTimeHigh"}
"""Compare a quotient of rates, which meets its bound to the last bit by chance alone: ">" and ">=" are the same."""


class Mutant(msgspec.Struct, frozen=True):
    """What was changed, whose cases must notice, and the rules with it."""

    what: str
    alerts: tuple[str, ...]
    rules: str


def comparisons():
    for group in GROUPS:
        for rule in (rule for rule in group["rules"] if "alert" in rule):
            window = rule["labels"].get("window", "")
            for found in OPERATOR.finditer(rule["expr"]):
                for new in {OPPOSITE[found[1]], BOUNDARY.get(found[1], OPPOSITE[found[1]])}:
                    if rule["alert"] in QUOTIENTS and new == BOUNDARY.get(found[1]):
                        continue
                    expr = rule["expr"][: found.start()] + new + rule["expr"][found.end() :]
                    changed = {"name": "changed", "rules": [rule | {"expr": expr}]}
                    # The other rules of that name stay as they are.
                    others = [one | {"rules": [it for it in one["rules"] if it != rule]} for one in GROUPS]
                    yield Mutant(
                        f"{rule['alert']} {window} {found[1]!r} at {found.start()}: {new!r}",
                        (rule["alert"],),
                        kept((rule["alert"],), [*others, changed]),
                    )


def leaves(value, path=()):
    if isinstance(value, dict):
        for name, one in value.items():
            yield from leaves(one, (*path, name))
    elif isinstance(value, list):
        for place, one in enumerate(value):
            yield from leaves(one, (*path, place))
    else:
        yield path, value


def changes(path, value):  # noqa: PLR0911  one for each kind
    """Other values that somebody could have meant: a tenth more and less, another time, the other severity."""
    if path[-1] == "seconds" and path[0] == "slo":
        bounds = metrics.BUCKETS[thresholds.LATENCIES[path[1]]]
        return [bounds[bounds.index(value) + step] for step in (-1, 1)]
    if path[-1] == "objective":
        return [1 - (1 - value) * factor for factor in (0.9, 1.1)]
    if path[-1] == "restarts":
        return [value - 1, value + 1]
    if isinstance(value, int | float):
        return [value * factor for factor in (0.9, 1.1)]
    if value in ("page", "ticket"):
        return ["ticket" if value == "page" else "page"]
    if value == "0s":
        return ["2m"] if path[0] == "slo" else ["1m"]
    number, unit = value[:-1], value[-1]
    if path[-1] == "short" and value == "5m":
        return ["10m"]  # less is refused
    return [f"{2 * int(number)}{unit}", f"{thresholds.seconds(value) // 2}s"]


def changed_thresholds():
    raw = yaml.safe_load(thresholds.SHIPPED.read_text())
    for path, value in leaves(raw):
        if path == ("runbooks",):
            continue  # an address, in test_generated
        for new in changes(path, value):
            other = copy.deepcopy(raw)
            inner = other
            for step in path[:-1]:
                inner = inner[step]
            inner[path[-1]] = new
            alerts = (path[1],) if path[0] == "alerts" else tuple(
                alert for slo, alert in ALERT_OF.items() if path[1] in (slo, "burn", "least_requests")
            )[:1]  # fmt: skip
            groups = rules.groups(msgspec.convert(other, Thresholds, strict=False))["groups"]
            yield Mutant(f"{'.'.join(map(str, path))}: {value} is {new}", alerts, kept(alerts, groups))


MUTANTS = [*comparisons(), *changed_thresholds()]


def survives(mutant, folder):
    folder.mkdir()
    cases = [case for case in EVERY if any(look.alert in mutant.alerts for look in case.looks)]
    cases = [
        msgspec.structs.replace(case, looks=[look for look in case.looks if look.alert in mutant.alerts])
        for case in cases
    ]
    return not run(folder, mutant.rules, cases)[0] and not run(folder, mutant.rules, NEAR_MISSES)[0]


@pytest.fixture(scope="module")
def survivors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        alive = pool.map(lambda pair: survives(pair[1], folder / str(pair[0])), enumerate(MUTANTS))
        return {mutant.what for mutant, lives in zip(MUTANTS, alive, strict=True) if lives}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_case_notices(mutant, survivors):
    assert mutant.what not in survivors


def test_what_is_not_changed_survives(tmp_path):
    """Else every mutant would seem to be noticed."""
    for name in {alert for mutant in MUTANTS for alert in mutant.alerts}:
        assert survives(Mutant("", (name,), kept((name,), GROUPS)), tmp_path / name)
