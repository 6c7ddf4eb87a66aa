"""Containers of the images that ``make test-image`` builds before, on a real Docker."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # so that tests can import what stands here
from containers import Container


@pytest.fixture
def begin(tiny_model):
    """Starts containers and removes them."""
    begun = []

    def one(*flags, **options):
        begun.append(Container(tiny_model, *flags, **options))
        return begun[-1]

    yield one
    for container in begun:
        container.remove()
