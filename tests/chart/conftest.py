"""Tests of the chart as Helm renders it, without a cluster."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # so that tests can import the modules in this folder
