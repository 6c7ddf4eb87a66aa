"""Adds this folder to the path, so that tests can import the shared builders, and sets up Hypothesis."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest

sys.path.append(str(Path(__file__).parent))

from simulated_nvml import FakePynvml

# Examples have no deadline, because a busy machine must not fail a test. Each mutant runs all tests that reach it. Twenty
# examples kill the same mutants as a hundred.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.register_profile("mutants", max_examples=20, deadline=None)
hypothesis.settings.load_profile("mutants" if "MUTANT_UNDER_TEST" in os.environ else "tests")


@pytest.fixture
def fake(monkeypatch):
    """Return a simulated NVML with four H200s. Tests can break any part of it."""
    binding = FakePynvml()
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    return binding
