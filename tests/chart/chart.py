"""Runs Helm on the chart and returns what it renders."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml
from machine import ROOT

CHART = ROOT / "helm"


def helm(*words, check=True, timeout=300, **options):
    """Run ``helm`` and return its exit code, stdout and stderr. ``options`` are subprocess.run's."""
    if shutil.which("helm") is None:
        pytest.fail("helm is not installed: go install helm.sh/helm/v4/cmd/helm@v4.3.1", pytrace=False)
    result = subprocess.run(
        ["helm", *map(str, words)], check=False, capture_output=True, text=True, timeout=timeout, **options
    )
    if check and result.returncode:
        raise AssertionError(f"helm {words[0]}: {result.stderr}")
    return result


def template(values, *words, chart=CHART, check=True):
    """Run ``helm template llama3`` with ``values``, a dict."""
    text = yaml.safe_dump(values)
    return helm("template", "llama3", chart, "--namespace=serving", "-f-", *words, input=text, check=check)


def render(values=(), *words, chart=CHART):
    """Return the rendered manifests as {(kind, name): manifest}."""
    documents = yaml.safe_load_all(template(dict(values), *words, chart=chart).stdout)
    return {(document["kind"], document["metadata"]["name"]): document for document in documents if document}


def refusal(values):
    """Return the one line in which Helm says why it refuses ``values``."""
    result = template(values, check=False)
    assert result.returncode == 1, "Helm accepted the values"
    lines = [
        line for line in result.stderr.splitlines() if line.lstrip().startswith("- at ") or "execution error" in line
    ]
    assert len(lines) == 1, result.stderr
    return lines[0].rpartition("): ")[2] if "execution error" in lines[0] else lines[0].strip()
