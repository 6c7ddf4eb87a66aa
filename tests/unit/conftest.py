"""Puts this folder on the path, so that tests can import the builders they share."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest

sys.path.append(str(Path(__file__).parent))

from simulated_nvml import FakePynvml

# A busy machine is no failure, so no example has a deadline. Every mutant runs every test that reaches it; what a hundred
# examples find in it, twenty do.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.register_profile("mutants", max_examples=20, deadline=None)
hypothesis.settings.load_profile("mutants" if "MUTANT_UNDER_TEST" in os.environ else "tests")


@pytest.fixture
def fake(monkeypatch):
    """NVML of a machine of four H200s, simulated; break what you like of it."""
    binding = FakePynvml()
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    return binding
