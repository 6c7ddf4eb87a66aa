"""Change each threshold, comparison and and/or/unless of the alerts once. Some case must fail then."""

from __future__ import annotations

import copy
import os
import re
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import yaml
from cases import ALERT_OF, ALL_CASES
from near_misses import NEAR_MISSES
from promtool import run
from some_rules import rules_for

from vllm_health import metrics
from vllm_monitoring import rules, thresholds
from vllm_monitoring.thresholds import Thresholds

pytestmark = [pytest.mark.timeout(1200), pytest.mark.long]
GROUPS = rules.groups(thresholds.read())["groups"]
OPPOSITE = {">": "<", ">=": "<", "<": ">", "==": "!=", "and": "or", "or": "and", "unless": "and"}
BOUNDARY = {">": ">=", ">=": ">", "<": "<="}
OPERATOR = re.compile(r"(?<=[\s)])(>=|<=|==|>|<|and|or|unless)(?=\s)")
QUOTIENTS = {*ALERT_OF.values(), "VLLMQueueTimeHigh"}
"""Alerts on a quotient of rates. It almost never equals its bound exactly, so ">" and ">=" are equivalent."""


class Mutant(msgspec.Struct, frozen=True):
    """The text of a rules file with one change. ``alerts``: a case of one of these alerts must fail."""

    change: str
    alerts: tuple[str, ...]
    rules: str


def comparisons():
    """Yield a mutant for each changed operator of each alert."""
    for group in GROUPS:
        for rule in (rule for rule in group["rules"] if "alert" in rule):
            window = rule["labels"].get("window", "")
            for match in OPERATOR.finditer(rule["expr"]):
                for new in {OPPOSITE[match[1]], BOUNDARY.get(match[1], OPPOSITE[match[1]])}:
                    if rule["alert"] in QUOTIENTS and new == BOUNDARY.get(match[1]):
                        continue
                    expr = rule["expr"][: match.start()] + new + rule["expr"][match.end() :]
                    changed = {"name": "changed", "rules": [rule | {"expr": expr}]}
                    # The other rules of that name do not change.
                    others = [other | {"rules": [kept for kept in other["rules"] if kept != rule]} for other in GROUPS]
                    yield Mutant(
                        f"{rule['alert']} {window} {match[1]!r} at {match.start()}: {new!r}",
                        (rule["alert"],),
                        rules_for((rule["alert"],), [*others, changed]),
                    )


def leaves(value, path=()):
    """Yield each number and text of nested mappings and lists, with its path."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def changes(path, value):  # noqa: PLR0911 - one return for each kind of value
    """Return other plausible values: 10 % more and less, another time, the other severity."""
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
        return ["10m"]  # A shorter one is refused.
    return [f"{2 * int(number)}{unit}", f"{thresholds.seconds(value) // 2}s"]


def changed_thresholds():
    """Yield a mutant for each changed number of thresholds.yaml."""
    raw = yaml.safe_load(thresholds.SHIPPED.read_text())
    for path, value in leaves(raw):
        if path == ("runbooks",):
            continue  # An address, tested in test_generated.py.
        for new in changes(path, value):
            changed = copy.deepcopy(raw)
            inner = changed
            for step in path[:-1]:
                inner = inner[step]
            inner[path[-1]] = new
            alerts = (path[1],) if path[0] == "alerts" else tuple(
                alert for slo, alert in ALERT_OF.items() if path[1] in (slo, "burn", "least_requests")
            )[:1]  # fmt: skip
            groups = rules.groups(msgspec.convert(changed, Thresholds, strict=False))["groups"]
            yield Mutant(f"{'.'.join(map(str, path))}: {value} is {new}", alerts, rules_for(alerts, groups))


MUTANTS = [*comparisons(), *changed_thresholds()]


def survives(mutant, folder):
    """Return whether every case passes with the mutant's rules."""
    folder.mkdir()
    cases = [case for case in ALL_CASES if any(expectation.alert in mutant.alerts for expectation in case.expectations)]
    cases = [
        msgspec.structs.replace(
            case, expectations=[wanted for wanted in case.expectations if wanted.alert in mutant.alerts]
        )
        for case in cases
    ]
    return not run(folder, mutant.rules, cases)[0] and not run(folder, mutant.rules, NEAR_MISSES)[0]


@pytest.fixture(scope="module")
def survivors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        alive = pool.map(lambda pair: survives(pair[1], folder / str(pair[0])), enumerate(MUTANTS))
        return {mutant.change for mutant, lives in zip(MUTANTS, alive, strict=True) if lives}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.change)
def test_a_case_fails_with_the_mutant(mutant, survivors):
    assert mutant.change not in survivors


def test_unchanged_rules_survive(tmp_path):
    """Otherwise every mutant would seem to fail a case."""
    for name in {alert for mutant in MUTANTS for alert in mutant.alerts}:
        assert survives(Mutant("", (name,), rules_for((name,), GROUPS)), tmp_path / name)
