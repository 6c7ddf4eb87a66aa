"""Validates manifests with kubeconform and the schemas in tests/data/schemas. Uses no network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from machine import ROOT

SCHEMAS = ROOT / "tests/data/schemas"
MISSING = "kubeconform is not installed: go install github.com/yannh/kubeconform/cmd/kubeconform@v0.8.0"


def problems(manifests: str) -> list[str]:
    """Return one line per problem: ``Kind name: /path: reason``. Includes kinds without a schema and duplicate keys."""
    program = shutil.which("kubeconform")
    if program is None:
        pytest.fail(MISSING, pytrace=False)
    result = subprocess.run(
        [program, "-strict", "-output=json", f"-schema-location={SCHEMAS}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"],
        input=manifests, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    resources = json.loads(result.stdout)["resources"] if result.stdout else []
    assert result.returncode == bool(resources), result.stderr
    return sorted(
        f"{resource['kind']} {resource['name']}: {reason}"
        for resource in resources
        for reason in _reasons(" ".join(resource["msg"].split()))
    )


def _reasons(message):
    """Return the innermost of kubeconform's nested reasons, or the whole message if no schema made it."""
    nested = re.findall(r"- at '([^']*)': (.*?)(?= - at '|$)", message)
    return [f"{path}: {reason}" for path, reason in nested if reason != "validation failed"] or [message]
