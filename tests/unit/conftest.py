"""Puts this folder on the path, so that tests can import the builders they share."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from simulated_nvml import FakePynvml


@pytest.fixture
def fake(monkeypatch):
    """NVML of a machine of four H200s, simulated; break what you like of it."""
    binding = FakePynvml()
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    return binding
