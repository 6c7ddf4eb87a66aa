"""Every alert fires when it should, and only then. Prometheus' own promtool evaluates the rules."""

from __future__ import annotations

import re

import pytest
from cases import ALL_CASES
from near_misses import NEAR_MISSES
from promtool import as_test, complaints, run
from some_rules import rules_for

from vllm_monitoring import rules, thresholds

SHIPPED = thresholds.read()
ALERTS = [alert for group in rules.every_alert(SHIPPED).values() for alert in group]


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """Return the names of the cases that fail with the shipped rules, and promtool's output.

    Each case gets only the rules of the alerts that it expects. With all rules promtool takes a minute.
    """
    by_alerts = {}
    for case in ALL_CASES:
        by_alerts.setdefault(frozenset(expectation.alert for expectation in case.expectations), []).append(case)
    groups = rules.groups(SHIPPED)["groups"]
    names, output = set(), ""
    for alerts, cases in by_alerts.items():
        assert "" not in alerts, 'a case with the alert name "" needs all rules'
        new_names, new_output = run(tmp_path_factory.mktemp("rules"), rules_for(alerts, groups), cases)
        names, output = names | new_names, output + new_output
    return names, output


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_alerts_fire_when_they_should(case, failed):
    assert case.name not in failed[0], failed[1]


def test_case_names_are_unique():
    assert len({case.name for case in ALL_CASES}) == len(ALL_CASES)


@pytest.mark.parametrize("alert", sorted({alert.name for alert in ALERTS}))
def test_each_alert_fires_in_some_case_and_is_quiet_in_another(alert):
    counts = [
        expectation.firing for case in ALL_CASES for expectation in case.expectations if expectation.alert == alert
    ]
    assert 0 in counts
    assert 1 in counts


@pytest.mark.parametrize("case", NEAR_MISSES, ids=lambda case: case.name)
def test_no_alert_fires_in_a_near_miss(case, tmp_path):
    failed, output = run(tmp_path, rules.as_yaml(SHIPPED), [case])
    assert not failed, output


def test_summaries_and_descriptions_have_names_and_numbers(tmp_path):
    """Prometheus fills in every template of summaries and descriptions."""
    (tmp_path / "rules.yaml").write_text(rules.as_yaml(SHIPPED))
    tests = {}
    for case in ALL_CASES:
        for expectation in case.expectations:
            if expectation.firing and expectation.alert not in tests:
                # The test fails, so promtool prints the alert with its annotations.
                test = {"alertname": expectation.alert, "eval_time": expectation.at, "exp_alerts": []}
                tests[expectation.alert] = case.step, as_test(case, alert_rule_test=[test])
    output = "".join(
        complaints(tmp_path, step, [test for test_step, test in tests.values() if test_step == step])
        for step in {step for step, _ in tests.values()}
    )
    texts = dict(re.findall(r'Labels:\{alertname="(\w+)".*\n\s+Annotations:\{(.*)\}', output))
    assert set(texts) == {alert.name for alert in ALERTS}
    for name, text in texts.items():
        assert not re.search(r"<no value>|%!|\{\{|\}\}| in  |  ", text), (name, text)
        where = ("llama", "chat") if "GPU" not in name else ("llama-7d9f-abc", "chat")
        assert all(word in text for word in where), (name, text)
