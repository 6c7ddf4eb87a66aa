"""The chart as Helm renders it."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml
from machine import ROOT

CHART = ROOT / "helm"


def helm(*words, check=True, timeout=300, **more):
    """Exit code, stdout and stderr of ``helm``."""
    if shutil.which("helm") is None:
        pytest.fail("helm is not here: go install helm.sh/helm/v4/cmd/helm@v4.3.1", pytrace=False)
    done = subprocess.run(
        ["helm", *map(str, words)], check=False, capture_output=True, text=True, timeout=timeout, **more
    )
    if check and done.returncode:
        raise AssertionError(f"helm {words[0]}: {done.stderr}")
    return done


def template(values, *words, chart=CHART, check=True):
    """What ``helm template llama3`` says with ``values``, a dict."""
    text = yaml.safe_dump(values)
    return helm("template", "llama3", chart, "--namespace=serving", "-f-", *words, input=text, check=check)


def render(values=(), *words, chart=CHART):
    """{(kind, name): manifest}"""
    found = [one for one in yaml.safe_load_all(template(dict(values), *words, chart=chart).stdout) if one]
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def refusal(values):
    """The one line that says why ``values`` are refused."""
    done = template(values, check=False)
    assert done.returncode == 1, "it was taken"
    lines = [
        line for line in done.stderr.splitlines() if line.lstrip().startswith("- at ") or "execution error" in line
    ]
    assert len(lines) == 1, done.stderr
    return lines[0].rpartition("): ")[2] if "execution error" in lines[0] else lines[0].strip()
