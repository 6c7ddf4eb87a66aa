"""Every alert fires when it should and not when it only nearly should, by Prometheus' own tool."""

from __future__ import annotations

import re

import pytest
from cases import EVERY
from near_misses import NEAR_MISSES
from promtool import as_test, complaints, run
from some_rules import kept

from vllm_monitoring import rules, thresholds

SHIPPED = thresholds.read()
ALERTS = [alert for group in rules.every_alert(SHIPPED).values() for alert in group]


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """Names of cases that fail with the rules as they are shipped, and what promtool says of them.

    Of the rules each case gets those of the alerts it looks for: with all of them, promtool takes a minute.
    """
    by_alerts = {}
    for case in EVERY:
        by_alerts.setdefault(frozenset(look.alert for look in case.looks), []).append(case)
    groups = rules.groups(SHIPPED)["groups"]
    names, said = set(), ""
    for alerts, cases in by_alerts.items():
        assert "" not in alerts, "a case that looks for any alert needs all rules"
        found = run(tmp_path_factory.mktemp("rules"), kept(alerts, groups), cases)
        names, said = names | found[0], said + found[1]
    return names, said


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_alerts_fire_when_they_should(case, failed):
    assert case.name not in failed[0], failed[1]


def test_cases_have_names_of_their_own():
    assert len({case.name for case in EVERY}) == len(EVERY)


@pytest.mark.parametrize("alert", sorted({alert.name for alert in ALERTS}))
def test_each_alert_fires_somewhere_and_is_quiet_somewhere(alert):
    looks = [look.firing for case in EVERY for look in case.looks if look.alert == alert]
    assert 0 in looks
    assert 1 in looks


@pytest.mark.parametrize("case", NEAR_MISSES, ids=lambda case: case.name)
def test_nobody_is_told_of_a_near_miss(case, tmp_path):
    failed, said = run(tmp_path, rules.as_yaml(SHIPPED), [case])
    assert not failed, said


def test_what_people_read_is_filled_in(tmp_path):
    """Summaries and descriptions as Prometheus writes them, with names and numbers and no gap."""
    (tmp_path / "rules.yaml").write_text(rules.as_yaml(SHIPPED))
    shown = {}
    for case in EVERY:
        for look in (look for look in case.looks if look.firing and look.alert not in shown):
            nothing = {"alertname": look.alert, "eval_time": look.at, "exp_alerts": []}
            shown[look.alert] = case.step, as_test(case, alert_rule_test=[nothing])
    steps = {step for step, _ in shown.values()}
    said = "".join(complaints(tmp_path, step, [test for its, test in shown.values() if its == step]) for step in steps)
    texts = dict(re.findall(r'Labels:\{alertname="(\w+)".*\n\s+Annotations:\{(.*)\}', said))
    assert set(texts) == {alert.name for alert in ALERTS}
    for name, text in texts.items():
        assert not re.search(r"<no value>|%!|\{\{|\}\}| in  |  ", text), (name, text)
        where = ("llama", "chat") if "GPU" not in name else ("llama-7d9f-abc", "chat")
        assert all(word in text for word in where), (name, text)
