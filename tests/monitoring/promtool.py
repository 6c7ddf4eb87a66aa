"""Test rules against given series with promtool's unit tests."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

import msgspec
import pytest
import yaml

POD = {"namespace": "chat", "pod": "llama-7d9f-abc", "model_name": "llama"}
ENGINE = POD | {"engine": "0"}
GPU = POD | {"gpu": "0"}
TARGET = {"namespace": "chat", "pod": "llama-7d9f-abc"}
MODEL = {"namespace": "chat", "model_name": "llama"}


def program(*names):
    """Return the path of the first program that is installed. Fail the test if none is."""
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.fail(
        f"{names[0]} is not installed: apt-get install prometheus prometheus-alertmanager, or put it on the PATH"
    )


class Expectation(msgspec.Struct, frozen=True):
    """The number of firing alerts with a name ("": any name) and labels, at a time of a case."""

    at: str
    alert: str
    firing: int
    labels: dict[str, str] = {}


class Case(msgspec.Struct, frozen=True):
    """Series with one value per ``step``, and the expected alerts. Rules are evaluated every ``step`` too."""

    name: str
    series: dict[str, str]
    expectations: Sequence[Expectation]
    step: str = "30s"


def series(name, labels, values, **more):
    """Return a series by its name and labels. Values are in promtool's form: "0x10 1x5" is 11 zeros, then 6 ones."""
    inner = ",".join(f'{label}="{value}"' for label, value in (labels | more).items())
    return {f"{name}{{{inner}}}": values}


def firing(at, alert, **labels):
    """Expect one firing alert at a time."""
    return Expectation(at, alert, 1, labels)


def quiet(at, alert):
    """Expect no firing alert at a time."""
    return Expectation(at, alert, 0)


def run(folder, rules, cases):
    """Return the names of the cases that failed and promtool's output. ``rules`` is the text of a rules file."""
    (folder / "rules.yaml").write_text(rules)
    output, names = "", [case.name for case in cases]
    for step in sorted({case.step for case in cases}):
        tests = [_test(case, number) for number, case in enumerate(cases) if case.step == step]
        output += complaints(folder, step, tests)
    return {names[int(number)] for number in re.findall(r"case_(\d+)=", output)}, output


def complaints(folder, step, tests):
    """Return promtool's output for ``tests`` of the rules.yaml in ``folder``, or "" if all pass."""
    path = folder / f"tests-{step}.yaml"
    path.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": step, "tests": tests}))
    result = subprocess.run(
        [program("promtool"), "test", "rules", str(path)], check=False, capture_output=True, text=True, timeout=110
    )
    output = result.stderr + result.stdout if result.returncode else ""
    assert not output or "got:" in output, output  # Without "got:" promtool could not run the tests.
    return output


def as_test(case, **expectations):
    """Return a case in promtool's form, with ``expectations``."""
    input_series = [{"series": name, "values": values} for name, values in case.series.items()]
    return {"interval": case.step, "input_series": input_series, **expectations}


def _test(case, number):
    """Return a case in promtool's form. Its number is in the expressions, so that it shows in promtool's output."""
    tests = []
    for expectation in case.expectations:
        # No alert has the last label. promtool 2.42 prints only the expression of a failed test.
        labels = {"alertname": expectation.alert, "alertstate": "firing"} | expectation.labels | {f"case_{number}": ""}
        labels = {name: value for name, value in labels.items() if value or name != "alertname"}
        selector = ",".join(f'{label}="{value}"' for label, value in labels.items())
        expected = [{"labels": "{}", "value": expectation.firing}] if expectation.firing else []
        tests.append({"expr": f"count(ALERTS{{{selector}}})", "eval_time": expectation.at, "exp_samples": expected})
    return as_test(case, promql_expr_test=tests)
