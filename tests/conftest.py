"""For tests of every kind: what stands in common/ can be imported, and a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "common"))
from machine import generate_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return generate_tiny_model(tmp_path_factory.mktemp("model") / "tiny-chat")
