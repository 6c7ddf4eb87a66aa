"""Fixtures for tests of the images on a real Docker. ``make test-image`` builds the images first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # so that tests can import modules of this folder
from containers import Container


@pytest.fixture
def begin(tiny_model):
    """Return a function that starts a container. Remove all containers after the test."""
    containers = []

    def start(*flags, **options):
        containers.append(Container(tiny_model, *flags, **options))
        return containers[-1]

    yield start
    for container in containers:
        container.remove()
