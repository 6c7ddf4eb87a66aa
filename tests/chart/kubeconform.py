"""What kubeconform has against manifests, by the schemas in tests/data/schemas alone: no network is asked."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from machine import ROOT

SCHEMAS = ROOT / "tests/data/schemas"
MISSING = "kubeconform is not here: go install github.com/yannh/kubeconform/cmd/kubeconform@v0.8.0"


def problems(manifests: str) -> list[str]:
    """One line each, ``Kind name: /path: what``. A kind without a schema is one, a key that stands twice another."""
    program = shutil.which("kubeconform")
    if program is None:
        pytest.fail(MISSING, pytrace=False)
    done = subprocess.run(
        [program, "-strict", "-output=json", f"-schema-location={SCHEMAS}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"],
        input=manifests, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    found = json.loads(done.stdout)["resources"] if done.stdout else []
    assert done.returncode == bool(found), done.stderr
    return sorted(
        f"{one['kind']} {one['name']}: {what}" for one in found for what in _reasons(" ".join(one["msg"].split()))
    )


def _reasons(message):
    """The innermost of kubeconform's nested ones; what is no schema's is one as it is."""
    at = re.findall(r"- at '([^']*)': (.*?)(?= - at '|$)", message)
    return [f"{path}: {what}" for path, what in at if what != "validation failed"] or [message]
