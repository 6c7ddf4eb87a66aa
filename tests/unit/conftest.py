"""Puts this folder on the path, so that tests can import the builders they share."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest

sys.path.append(str(Path(__file__).parent))

from simulated_nvml import FakePynvml

# Every mutant runs every test that reaches it; what a hundred examples find in it, twenty do.
hypothesis.settings.register_profile("mutants", max_examples=20, deadline=None)
if "MUTANT_UNDER_TEST" in os.environ:
    hypothesis.settings.load_profile("mutants")


@pytest.fixture
def fake(monkeypatch):
    """NVML of a machine of four H200s, simulated; break what you like of it."""
    binding = FakePynvml()
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    return binding
