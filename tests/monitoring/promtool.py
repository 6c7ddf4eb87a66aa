"""Rules against series that one writes down: promtool's unit tests, put together from short descriptions."""

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
    """The path of whichever is here; a machine without it must say so."""
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.fail(f"{names[0]} is not here: apt-get install prometheus prometheus-alertmanager, or put it on the PATH")


class Look(msgspec.Struct, frozen=True):
    """At a time of a case: so many alerts of a name ("": of any) with these labels are firing."""

    at: str
    alert: str
    firing: int
    labels: dict[str, str] = {}


class Case(msgspec.Struct, frozen=True):
    """Series, a value each ``step``, and what is looked at. ``step`` is how often rules are evaluated, too."""

    name: str
    series: dict[str, str]
    looks: Sequence[Look]
    step: str = "30s"


def series(name, labels, values, **more):
    """``name`` with labels, and its values as promtool writes them: "0x10 1x5" is eleven noughts, then six ones."""
    inner = ",".join(f'{label}="{value}"' for label, value in (labels | more).items())
    return {f"{name}{{{inner}}}": values}


def firing(at, alert, **labels):
    return Look(at, alert, 1, labels)


def quiet(at, alert):
    return Look(at, alert, 0)


def run(folder, rules, cases):
    """The names of the cases that failed, and what promtool said. ``rules`` is the text of a file of groups."""
    (folder / "rules.yaml").write_text(rules)
    said, names = "", [case.name for case in cases]
    for step in sorted({case.step for case in cases}):
        tests = [_test(case, place) for place, case in enumerate(cases) if case.step == step]
        said += complaints(folder, step, tests)
    return {names[int(place)] for place in re.findall(r"case_(\d+)=", said)}, said


def complaints(folder, step, tests):
    """What promtool has against ``tests`` in its own form, of the rules.yaml in ``folder``; nothing if all is well."""
    path = folder / f"tests-{step}.yaml"
    path.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": step, "tests": tests}))
    done = subprocess.run(
        [program("promtool"), "test", "rules", str(path)], check=False, capture_output=True, text=True, timeout=110
    )
    said = done.stderr + done.stdout if done.returncode else ""
    assert not said or "got:" in said, said  # it could not even begin
    return said


def as_test(case, **looks):
    """A case in promtool's own form, and what is looked at."""
    told = [{"series": name, "values": values} for name, values in case.series.items()]
    return {"interval": case.step, "input_series": told, **looks}


def _test(case, place):
    looks = []
    for look in case.looks:
        # The last label is on no alert: promtool 2.42 tells of a test that fails its expression alone.
        labels = {"alertname": look.alert, "alertstate": "firing"} | look.labels | {f"case_{place}": ""}
        labels = {name: value for name, value in labels.items() if value or name != "alertname"}
        chosen = ",".join(f'{label}="{value}"' for label, value in labels.items())
        expected = [{"labels": "{}", "value": look.firing}] if look.firing else []
        looks.append({"expr": f"count(ALERTS{{{chosen}}})", "eval_time": look.at, "exp_samples": expected})
    return as_test(case, promql_expr_test=looks)
